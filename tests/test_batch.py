"""append_events: a batch is stored whole or not at all; the same batch again changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from engines import engine_for
from everywhere import EVERY_DATABASE, place_of
from sqlalchemy import event as hooks

from adk_sessions import (
    Event,
    EventActions,
    EventConflictError,
    GetSessionConfig,
    InvalidInputError,
    Session,
    SessionNotFoundError,
    SessionService,
    StaleSessionError,
)


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


@pytest.fixture
async def session(service: SessionService, app_name: str) -> Session:
    return await service.create_session(
        app_name=app_name, user_id="ann", session_id="s", state={"kept": 0, "app:kept": 0}
    )


def event(id: str, delta: dict[str, Any] | None = None, **fields: Any) -> Event:
    return Event(
        id=id, author="a", content=id, actions=EventActions(state_delta=delta or {}), **fields
    )


async def stored(service: SessionService, session: Session, **config: Any) -> Session:
    found = await service.get_session(
        app_name=session.app_name,
        user_id=session.user_id,
        session_id=session.id,
        config=GetSessionConfig(**config) if config else None,
    )
    assert found is not None
    return found


def ids(session: Session) -> list[str]:
    return [event.id for event in session.events]


def snapshot_of(*models: Any) -> list[Any]:
    return [model.model_dump() for model in models]


async def test_a_batch_is_what_its_events_are_one_by_one(
    service: SessionService, session: Session
) -> None:
    other = await service.create_session(
        app_name=session.app_name, user_id="ben", session_id="s", state={"kept": 0}
    )
    await service.append_event(session, event("first"))
    await service.append_event(other, event("first", timestamp=session.events[0].timestamp))
    deltas: list[dict[str, Any]] = [
        {},
        {"a": 1, "user:a": 1, "app:a": 1},
        {"a": 2, "temp:t": 1, "user:b": {"deep": [1]}},
        {"a": {"whole": 1}},
        {"a": {"replaced": 2}, "temp:t": 2, "none": None},
    ]
    # clocks that stand still, go back and run ahead
    times = [time.time() + plus for plus in (0, 0, -3600, 86_400, 1)]
    made = [
        event(f"e{n}", delta, timestamp=when)
        for n, (delta, when) in enumerate(zip(deltas, times, strict=True))
    ]
    copies = [one.model_copy(deep=True) for one in made]

    assert await service.append_events(session, made) == made
    for copy in copies:
        await service.append_event(other, copy)

    assert ids(session) == ["first", "e0", "e1", "e2", "e3", "e4"]
    assert session.state == other.state
    assert session.state["temp:t"] == 2
    assert snapshot_of(*session.events) == snapshot_of(*other.events)
    found = await stored(service, session)
    assert found.events == session.events
    assert found.last_update_time == session.last_update_time
    assert found.state == {k: v for k, v in session.state.items() if not k.startswith("temp:")}
    assert (await stored(service, other)).events == found.events
    assert ids(await stored(service, session, num_recent_events=2)) == ["e3", "e4"]
    later = await stored(service, session, after_timestamp=times[3])
    assert ids(later) == ["e3"]
    # the session goes on, and its clock stands after the batch
    await service.append_event(session, event("last"))
    assert ids(await stored(service, session))[-1] == "last"


async def test_many_events_come_back_in_order(service: SessionService, session: Session) -> None:
    now = time.time()
    made = [event(f"{n}", {"n": n}, timestamp=now, branch="x" * 1000) for n in range(500)]
    assert len(await service.append_events(session, iter(made))) == 500
    found = await stored(service, session)
    assert ids(found) == [f"{n}" for n in range(500)]
    assert found.events == made
    assert found.state["n"] == 499


async def test_a_stale_session_stores_none_of_it(service: SessionService, session: Session) -> None:
    behind = await stored(service, session)
    await service.append_event(session, event("between"))
    made = [event("a", {"k": 1, "app:k": 1}), event("b")]
    before = snapshot_of(behind, *made)
    with pytest.raises(StaleSessionError):
        await service.append_events(behind, made)
    assert snapshot_of(behind, *made) == before
    found = await stored(service, session)
    assert ids(found) == ["between"]
    assert found.state == {"kept": 0, "app:kept": 0}


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_an_id_that_is_taken_stores_none_of_it(
    service: SessionService, session: Session, place: int
) -> None:
    taken = event("taken", {"k": 0})
    await service.append_event(session, taken)
    made = [event("a", {"k": 1, "user:k": 1}), event("b", {"app:k": 1})]
    # even as it is stored: the batch as a whole is another one
    made.insert(place, taken.model_copy(deep=True))
    before = snapshot_of(session, *made)
    with pytest.raises(EventConflictError, match="append only the others"):
        await service.append_events(session, made)
    assert snapshot_of(session, *made) == before
    found = await stored(service, session)
    assert ids(found) == ["taken"]
    assert found.state == {"kept": 0, "app:kept": 0, "k": 0}


async def test_the_same_batch_again_changes_nothing(
    service: SessionService, session: Session
) -> None:
    behind = await stored(service, session)
    made = [event(f"{n}", {"n": n, "temp:n": n, "app:n": n}) for n in range(3)]
    again = [one.model_copy(deep=True) for one in made]
    await service.append_events(session, made)
    await service.append_events(session, [one.model_copy(deep=True) for one in again])
    assert ids(session) == ["0", "1", "2"]
    await service.append_event(session, event("last", {"n": 9}))
    # whoever does not know that it was stored learns it, and what came after
    await service.append_events(behind, again)
    assert ids(behind) == ["0", "1", "2", "last"]
    assert behind.state == {"kept": 0, "app:kept": 0, "n": 9, "temp:n": 2, "app:n": 2}
    assert [one.actions.state_delta for one in again] == [{"n": n, "app:n": n} for n in range(3)]
    await service.append_event(behind, event("really last"))
    assert ids(await stored(service, session)) == ["0", "1", "2", "last", "really last"]


async def test_the_same_ids_with_other_content_are_a_conflict(
    service: SessionService, session: Session
) -> None:
    await service.append_events(session, [event("a"), event("b")])
    with pytest.raises(EventConflictError):
        await service.append_events(session, [event("a"), event("b", {"k": 1})])
    assert (await stored(service, session)).state == {"kept": 0, "app:kept": 0}


async def test_partial_events_are_left_out(service: SessionService, session: Session) -> None:
    made = [event("a"), event("b", {"k": 1}, partial=True), event("c")]
    assert await service.append_events(session, made) == made
    assert ids(session) == ids(await stored(service, session)) == ["a", "c"]
    assert session.state == {"kept": 0, "app:kept": 0}
    before = session.last_update_time
    assert await service.append_events(session, []) == []
    assert await service.append_events(session, [made[1]]) == [made[1]]
    assert (await stored(service, session)).last_update_time == before


async def test_bad_batches_are_refused_before_anything_is_written(
    service: SessionService, session: Session
) -> None:
    bad = event("bad").model_copy(update={"id": "x" * 200})
    nobody: Any = {"id": "a"}
    for made, field in (
        ([event("a"), bad], "event.id"),
        ([event("a"), event("b"), event("a")], "events"),
        ([event("a"), nobody], "event"),
        ([event(f"{n}") for n in range(10_001)], "events"),
    ):
        with pytest.raises(InvalidInputError) as raised:
            await service.append_events(session, made)
        assert raised.value.field == field
    with pytest.raises(InvalidInputError) as raised:
        await service.append_events(session, 5)  # type: ignore[arg-type]
    assert raised.value.field == "events"
    with pytest.raises(InvalidInputError) as raised:
        await service.append_events(nobody, [])
    assert raised.value.field == "session"
    assert session.events == []
    assert ids(await stored(service, session)) == []


async def test_no_session_no_batch(service: SessionService, session: Session) -> None:
    await service.delete_session(session.app_name, "ann", "s")
    with pytest.raises(SessionNotFoundError):
        await service.append_events(session, [event("a"), event("b")])
    assert session.events == []


async def test_nobody_reads_a_part_of_a_batch(service: SessionService, session: Session) -> None:
    done = False
    seen = set()

    async def read() -> None:
        while not done:
            found = await stored(service, session)
            seen.add(len(found.events))
            assert found.state.get("n", -1) == len(found.events) - 1

    reading = asyncio.create_task(read())
    for batch in range(6):
        first = 20 * batch
        await service.append_events(
            session, [event(f"{n}", {"n": n}) for n in range(first, first + 20)]
        )
    done = True
    await reading
    assert {count % 20 for count in seen} == {0}


async def test_batches_and_single_events_take_turns(
    service: SessionService, session: Session
) -> None:
    async def batch(name: str) -> None:
        await service.append_events(
            session, [event(f"{name}{n}", {f"{name}{n}": n}) for n in range(10)]
        )

    async def single(name: str) -> None:
        await service.append_event(session, event(name, {name: 1}))

    await asyncio.gather(*(batch(name) for name in "abcd"), *(single(name) for name in "xyz"))
    found = await stored(service, session)
    assert len(found.events) == 43
    assert found.events == session.events
    assert found.state == session.state
    together = "".join(ids(found))
    for name in "abcd":
        assert "".join(f"{name}{n}" for n in range(10)) in together


async def test_the_largest_batch_can_be_repeated(service: SessionService, session: Session) -> None:
    made = [event(f"{n}") for n in range(10_000)]
    behind = await stored(service, session)
    await service.append_events(session, [one.model_copy(deep=True) for one in made])
    await service.append_events(behind, made)
    assert ids(behind) == ids(session) == [f"{n}" for n in range(10_000)]


async def test_no_statement_of_a_batch_is_larger_than_a_packet(
    mariadb_url: str, app_name: str
) -> None:
    """Drivers join rows to statements of a megabyte, whatever the server takes.

    The server's own limit is everybody's, so the service is told of a smaller one here.
    """
    async with engine_for(mariadb_url) as engine:
        many: list[bool] = []

        def note(*execution: Any) -> None:
            if execution[2].startswith("INSERT INTO events"):
                many.append(execution[5])

        async with SessionService(engine=engine) as service:
            session = await service.create_session(app_name=app_name, user_id="ann")
            hooks.listen(engine.sync_engine, "before_cursor_execute", note)
            service._statements._largest_packet = 262_144  # type: ignore[attr-defined]
            made = [event(f"{n}", branch="x" * 1000) for n in range(500)]
            await service.append_events(session, made)
            assert (await stored(service, session)).events == made
            assert many == [False] * 500
            service._statements._largest_packet = 16_777_216  # type: ignore[attr-defined]
            await service.append_events(session, [event("a"), event("b")])
            assert many[500:] == [True]
