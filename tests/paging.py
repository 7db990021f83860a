"""A process that creates, appends and deletes while another one walks over pages."""

from __future__ import annotations

import asyncio
from pathlib import Path

from workers import Worker, event, work


class Disturber(Worker):
    """See `tests/test_pages.py`."""

    async def disturb(self, app: str, ids: list[str], stop: str) -> dict[str, int]:
        """Create, append and delete until ``stop`` exists.

        Args:
            app: the application.
            ids: sessions to append to; those whose id begins with ``goes`` are deleted in the end.
            stop: a file.
        """
        done = {"created": 0, "appended": 0, "deleted": 0}
        going = [id_ for id_ in ids if id_.startswith("goes")]
        staying = [id_ for id_ in ids if not id_.startswith("goes")]
        n = 0
        while going or not Path(stop).exists():
            user = f"user-{n % 10}"
            await self.service.create_session(
                app_name=app, user_id=user, session_id=f"new-{ids[0]}-{n}"
            )
            done["created"] += 1
            id_ = staying[n % len(staying)]
            session = await self.service.get_session(
                app_name=app, user_id=f"user-{id_[-1]}", session_id=id_
            )
            assert session is not None
            await self.service.append_event(session, event(f"e{n}", {}))
            done["appended"] += 1
            if going:
                id_ = going.pop()
                await self.service.delete_session(app, f"user-{id_[-1]}", id_)
                done["deleted"] += 1
            n += 1
        return done


if __name__ == "__main__":
    asyncio.run(work(Disturber()))
