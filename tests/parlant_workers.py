"""Processes with Parlant's stores, and what both test files of them need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

from parlant.core.common import ItemNotFoundError
from parlant.core.customers import CustomerId
from parlant.core.sessions import Event, EventKind, EventSource, SessionId, SessionStore
from parlant.core.tags import TagId
from workers import Worker, work

from adk_sessions.parlant import ParlantStores, SQLDocumentDatabase, SQLSessionStore, parlant_stores


@asynccontextmanager
async def session_store(
    url: Any, prefix: str, *, migrate: bool = True, **options: Any
) -> AsyncIterator[SQLSessionStore]:
    async with (
        SQLDocumentDatabase(url, prefix=prefix, **options) as database,
        SQLSessionStore(database, migrate) as store,
    ):
        yield store


async def say(store: SessionStore, session_id: str, text: str, **more: Any) -> Event:
    """A message of the customer."""
    return await store.create_event(
        SessionId(session_id),
        more.pop("source", EventSource.CUSTOMER),
        more.pop("kind", EventKind.MESSAGE),
        more.pop("trace_id", "trace"),
        more.pop("data", {"message": text, "participant": {"display_name": "Ann"}}),
        **more,
    )


class ParlantWorker(Worker):
    """One process's stores; each method is a job."""

    store: SessionStore
    stores: ParlantStores
    stack: AsyncExitStack

    async def open(self, url: str, prefix: str | None = None, **options: Any) -> None:
        """The session store alone, or with no prefix all of them."""
        self.stack = AsyncExitStack()
        if prefix is None:
            self.stores = await self.stack.enter_async_context(parlant_stores(url, **options))
            self.store = self.stores.session_store
        else:
            self.store = await self.stack.enter_async_context(session_store(url, prefix, **options))

    async def close(self) -> None:
        await self.stack.aclose()

    async def write(self, session: str, writer: str, tasks: int, events: int) -> dict[str, int]:
        """Several tasks that create events at once; what was said, with its offset."""
        said = {}

        async def one(task: int) -> None:
            for n in range(events):
                text = f"{writer}-{task}-{n}"
                said[text] = (await say(self.store, session, text)).offset

        await asyncio.gather(*(one(task) for task in range(tasks)))
        return said

    async def note(self, session: str, writer: str, count: int) -> None:
        """Sets metadata and labels of one's own, and unsets some that are there."""
        id = SessionId(session)
        for n in range(count):
            await self.store.set_metadata(id, f"{writer}-{n}", n)
            await self.store.upsert_labels(id, {f"{writer}-{n}"})
            await self.store.unset_metadata(id, f"old-{writer}-{n}")
            await self.store.remove_labels(id, {f"old-{writer}-{n}"})
            await self.store.update_session(id, {"title": writer})

    async def talk_until_deleted(self, sessions: list[str]) -> int:
        """Creates events in sessions until each is gone; how many there were."""
        created = 0
        for session in sessions:
            while True:
                try:
                    await say(self.store, session, "anybody there?")
                except ItemNotFoundError:
                    break
                created += 1
        return created

    async def delete(self, sessions: list[str], after: int) -> int:
        """Deletes sessions, each when it has some events."""
        for session in sessions:
            count = 0
            while count < after:
                count = len(await self.store.list_events(SessionId(session)))
            await self.store.delete_session(SessionId(session))
        return 0

    async def tag(self, customer: str, writer: str, count: int) -> int:
        """Gives a customer extra keys of one's own, and tags that others give as well."""
        id, store = CustomerId(customer), self.stores.customer_store
        new = 0
        for n in range(count):
            await store.upsert_extra(id, {f"{writer}-{n}": str(n)})
            await store.remove_extra(id, [f"old-{writer}-{n}"])
            new += await store.upsert_tag(id, TagId(f"tag-{n}"))
        return new

    async def value(self, variable: str, writer: str, count: int) -> int:
        """Sets values of keys that others set as well."""
        for n in range(count):
            await self.stores.variable_store.update_value(cast(Any, variable), f"key-{n}", writer)
        return count


if __name__ == "__main__":
    asyncio.run(work(ParlantWorker()))
