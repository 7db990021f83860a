"""Writers and readers of the list-append check, as jobs of a process.

    with Crew(3, script=checker.__file__) as crew:
        crew.open(url)
        writers = {"a": {"on_stale": "refresh", "offset": 0}, ...}
        record = Record.of(crew.run("lists", [{"writers": writers, ...}, ...]))

Each append has a value of its own, its event's id, for the session's list, and sets a key of its
own in each scope; after each the writer counts in keys that all writers share. `WithoutLocks` is a
service that must not pass.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from dataclasses import asdict
from typing import Any, Literal

from sqlalchemy import Table, insert, select, update
from workers import (
    Call,
    Count,
    Record,
    Worker,
    clock,
    errors_of,
    event,
    in_each_scope,
    load,
    seen,
    work,
)

from adk_sessions import (
    Event,
    OutcomeUnknownError,
    Session,
    SessionService,
    StaleSessionError,
)
from adk_sessions import clock as clocks
from adk_sessions import state as states

COUNTERS = ("app:n", "user:n", "n")
# Of so many appends one is of two events.
BATCHES = 4
# Seconds between two reads of one reader.
PAUSE = 0.02


def _calls(user: str, id: str, names: list[str], began: float, ended: float) -> list[Call]:
    """A batch as a call for each event; each has the delta of all, since they are one write."""
    delta = {key: value for name in names for key, value in in_each_scope(name).items()}
    return [Call(user, id, name, delta, began, ended) for name in names]


async def write_lists(
    service: SessionService,
    *,
    app: str,
    user: str,
    writer: str,
    sessions: list[str],
    appends: int,
    on_stale: Literal["raise", "refresh"],
    offset: float,
) -> Record:
    """Append to sessions that others append to as well, and count each append.

    Args:
        on_stale: with ``refresh`` no append may be refused; with ``raise`` the writer reloads, and
            appends another event in place of the refused one.
        offset: of the writer's clock, in seconds.
    """
    record = Record()
    held: dict[str, Session] = {}
    choose = random.Random(writer)
    now = clock(offset)
    for n in range(appends):
        id = choose.choice(sessions)
        for attempt in itertools.count():
            if id not in held:
                began = time.monotonic()
                held[id] = await load(service, app, user, id)
                record.reads.append(seen(held[id], began, time.monotonic()))
            names = [f"{writer}-{n}-{attempt}"]
            if n % BATCHES == 1:
                names.append(f"{names[0]}-b")
            events = [event(name, in_each_scope(name), timestamp=now()) for name in names]
            began = time.monotonic()
            try:
                if len(events) > 1:
                    await service.append_events(held[id], events, on_stale=on_stale)
                else:
                    await service.append_event(held[id], events[0], on_stale=on_stale)
            except StaleSessionError:
                if on_stale == "refresh":
                    raise
                record.failed += _calls(user, id, names, began, time.monotonic())
                del held[id]
                continue
            except OutcomeUnknownError:
                record.unknown += _calls(user, id, names, began, math.inf)
                del held[id]
                break
            ended = time.monotonic()
            record.calls += _calls(user, id, names, began, ended)
            record.reads.append(seen(held[id], began, ended, fresh=False))
            break
        record.counts += await count(service, app, user, id)
    return record


async def count(service: SessionService, app: str, user: str, id: str) -> list[Count]:
    """Add 1 to the counters that a session sees."""
    began = time.monotonic()
    values: dict[str, Any] = {}
    ended = math.inf
    try:
        values = await service.update_state(
            app_name=app, user_id=user, session_id=id, add=dict.fromkeys(COUNTERS, 1)
        )
        ended = time.monotonic()
    except OutcomeUnknownError:
        pass
    return [Count(user, id, key, values.get(key), began, ended) for key in COUNTERS]


async def read_lists(
    service: SessionService, *, app: str, user: str, sessions: list[str], until: asyncio.Event
) -> Record:
    """Read one session after the other, until it is told to stop."""
    record = Record()
    for id in itertools.cycle(sessions):
        if until.is_set():
            break
        began = time.monotonic()
        session = await load(service, app, user, id)
        record.reads.append(seen(session, began, time.monotonic()))
        await asyncio.sleep(PAUSE)
    return record


class Lists(Worker):
    """A process with writers and a reader on one service."""

    async def open(self, url: str, *, locks: bool = True, **options: Any) -> None:
        self.service = (SessionService if locks else WithoutLocks)(url, **options)
        self.met = errors_of(self.service)

    async def lists(
        self,
        app: str,
        user: str,
        writers: dict[str, dict[str, Any]],
        sessions: list[str],
        appends: int,
    ) -> dict[str, Any]:
        """What several writers, by name and their own arguments, and one reader did and saw."""
        done = asyncio.Event()
        place: dict[str, Any] = {"app": app, "user": user, "sessions": sessions}
        reader = asyncio.create_task(read_lists(self.service, **place, until=done))
        try:
            records = await asyncio.gather(
                *(
                    write_lists(self.service, **place, writer=name, appends=appends, **own)
                    for name, own in writers.items()
                )
            )
        finally:
            done.set()
        return asdict(Record.of([*records, await reader]))


class WithoutLocks(SessionService):
    """Reads a row, changes it in Python and writes it back, each in a transaction of its own."""

    async def append_events(self, session: Session, events: Any, **_: Any) -> list[Event]:
        return [await self.append_event(session, event) for event in events]

    async def append_event(self, session: Session, event: Event, **_: Any) -> Event:
        app, user = {"app_name": session.app_name}, {"user_id": session.user_id}
        own = states.split(event.actions.state_delta)
        await self._change(self.models.app_states, app, own.app)
        await self._change(self.models.user_states, app | user, own.user)
        await self._change(self.models.sessions, app | user | {"id": session.id}, own.session)
        row = {
            "id": event.id,
            "session_id": session.id,
            "invocation_id": event.invocation_id,
            "timestamp": clocks.to_datetime(event.timestamp),
            "event_data": event.model_dump(mode="json", exclude_none=True),
        }
        async with self._database.engine.begin() as conn:
            await conn.execute(insert(self.models.events).values(**app, **user, **row))
        session.events.append(event)
        session.state.update(event.actions.state_delta)
        return event

    async def update_state(self, *, app_name: str, add: Any = None, **place: Any) -> dict[str, Any]:
        app, user = {"app_name": app_name}, {"user_id": place["user_id"]}
        rows = {
            "app:n": (self.models.app_states, app),
            "user:n": (self.models.user_states, app | user),
            "n": (self.models.sessions, app | user | {"id": place["session_id"]}),
        }
        return {key: await self._change(*row, count=key in add) for key, row in rows.items()}

    async def _change(
        self, table: Table, key: dict[str, str], delta: dict[str, Any] | None = None, count: int = 0
    ) -> int:
        where = [table.c[name] == value for name, value in key.items()]
        async with self._database.engine.begin() as conn:
            state = (await conn.execute(select(table.c.state).where(*where))).scalar_one()
        await asyncio.sleep(0.002)
        state = {**state, **(delta or {})}
        if count:
            state["n"] = state.get("n", 0) + 1
        async with self._database.engine.begin() as conn:
            await conn.execute(update(table).where(*where).values(state=state))
        return int(state.get("n", 0))


if __name__ == "__main__":
    asyncio.run(work(Lists()))
