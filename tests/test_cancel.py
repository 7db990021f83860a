"""Calls cancelled at each of their awaits: all of it or nothing, and no connection is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from everywhere import BACKENDS, SOAK, place_of
from sqlalchemy.pool import QueuePool
from workers import event, in_each_scope

from adk_sessions import Session, SessionService, appends

# Moments at which a call is cancelled; it is done before long.
MOST = 90


@dataclass
class Place:
    service: SessionService
    app: str

    def key(self, session: Session) -> dict[str, str]:
        return {"app_name": self.app, "user_id": session.user_id, "session_id": session.id}

    async def create(self, id: str) -> Session:
        return await self.service.create_session(
            app_name=self.app, user_id="ann", session_id=id, state=in_each_scope(id)
        )

    async def stored(self, id: str) -> Session | None:
        return await self.service.get_session(app_name=self.app, user_id="ann", session_id=id)

    def assert_nothing_is_held(self) -> None:
        if hasattr(self.service._database, "in_memory"):
            return  # a file's connections belong to threads, which nobody can leave
        pool = self.service._database.engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0


@pytest.fixture(params=[name for name in BACKENDS if SOAK or name != "sqlite-memory"])
async def place(
    request: pytest.FixtureRequest,
    fresh_database: Callable[[str], str],
    app_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Place]:
    # an append waits for two seconds and no longer for a server, which a loaded machine may take
    monkeypatch.setattr(appends, "_PATIENCE", 60.0)
    url, options = place_of(request.param, request, fresh_database)
    # with one connection, one that is lost is the end; a file has its own, whatever is said here
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 20}
    async with SessionService(url, **pool, **options) as service:
        await service.prepare_tables()
        yield Place(service, app_name)


async def cancelled_at_each_turn(
    place: Place, call: Callable[[int], Awaitable[Any]], judge: Callable[[int], Awaitable[None]]
) -> None:
    """Cancels the call later and later, until it is done before it is cancelled."""
    cut, turns, done = 0, 0, False
    for number in range(MOST):
        task = asyncio.ensure_future(call(number))
        for _ in range(turns):
            await asyncio.sleep(0)
        done = task.done()
        task.cancel()
        await asyncio.wait([task])
        cut += task.cancelled()
        if not task.cancelled():
            task.result()
        place.assert_nothing_is_held()
        await judge(number)
        place.assert_nothing_is_held()
        if done:
            break
        # a turn is short against a server's answer, and the first ones matter most
        turns += 1 + turns // 6
    assert cut, "no call was cancelled"
    assert done, "the last awaits were not reached"


async def test_a_create_is_whole_or_not_at_all(place: Place) -> None:
    async def judge(_: int) -> None:
        # a server may come to the end of a statement a moment after it was given up
        async with asyncio.timeout(30):
            while not await is_whole():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def is_whole() -> bool:
        listed = (await place.service.list_sessions(app_name=place.app)).sessions
        made = {session.id for session in listed}
        app = await place.service.get_app_state(app_name=place.app)
        user = await place.service.get_user_state(app_name=place.app, user_id="ann")
        own = all(session.id in session.state for session in listed)
        return own and app.keys() == user.keys() == made

    await cancelled_at_each_turn(place, lambda number: place.create(f"s{number}"), judge)


async def test_an_append_is_whole_or_not_at_all_and_the_callers_session_is_what_is_stored(
    place: Place,
) -> None:
    session = await place.create("s")

    async def judge(number: int) -> None:
        assert await place.stored("s") == session

    await cancelled_at_each_turn(
        place,
        lambda number: place.service.append_event(
            session, event(f"e{number}", in_each_scope(f"e{number}"))
        ),
        judge,
    )


async def test_a_second_writers_append_is_too(place: Place) -> None:
    session = await place.create("s")
    other = session.model_copy(deep=True)

    async def judge(number: int) -> None:
        stored = await place.stored("s")
        assert stored is not None
        assert session.events == stored.events[: len(session.events)]
        # what lies between is there only with the append that brought it
        assert {id for id in ids(stored) if id.startswith("e")} <= {*ids(session)}
        await place.service.append_event(other, event(f"o{number}", {}), on_stale="refresh")

    await cancelled_at_each_turn(
        place,
        lambda number: place.service.append_event(
            session, event(f"e{number}", in_each_scope(f"e{number}")), on_stale="refresh"
        ),
        judge,
    )


async def test_a_change_of_state_is_whole_or_not_at_all(place: Place) -> None:
    session = await place.create("s")
    before = 0

    async def judge(number: int) -> None:
        nonlocal before
        stored = await place.stored("s")
        assert stored is not None
        counts = {stored.state.get(f"{scope}n", 0) for scope in ("", "app:", "user:")}
        (count,) = counts
        # a server may come to the end of a statement a moment after it was given up
        assert before <= count <= number + 1
        before = count

    add = {"n": 1, "app:n": 1, "user:n": 1}
    await cancelled_at_each_turn(
        place, lambda number: place.service.update_state(**place.key(session), add=add), judge
    )


async def test_a_delete_is_whole_or_not_at_all(place: Place) -> None:
    for number in range(MOST):
        session = await place.create(f"s{number}")
        await place.service.append_event(session, event("e", {}))

    async def judge(number: int) -> None:
        stored = await place.stored(f"s{number}")
        assert stored is None or ids(stored) == ["e"]

    await cancelled_at_each_turn(
        place, lambda number: place.service.delete_session(place.app, "ann", f"s{number}"), judge
    )


async def test_a_read_gives_its_connection_back(place: Place) -> None:
    session = await place.create("s")
    for call in (
        lambda: place.service.get_session(**place.key(session)),
        lambda: place.service.list_sessions(app_name=place.app),
    ):

        async def judge(number: int) -> None:
            assert await place.stored("s") == session

        await cancelled_at_each_turn(place, lambda number, call=call: call(), judge)  # type: ignore[misc]


def ids(session: Session) -> list[str]:
    return [event.id for event in session.events]
