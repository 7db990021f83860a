"""Tasks of one process, with one service or several: nothing is lost, torn or left half done."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from everywhere import EVERY_DATABASE
from servers import Postgres
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from workers import (
    BACKENDS,
    SHARED,
    Call,
    Read,
    Record,
    errors_of,
    event,
    faults,
    fill,
    in_each_scope,
    load,
    read_all,
    seen,
    share,
)

from adk_sessions import (
    AlreadyExistsError,
    DatabaseError,
    Event,
    EventActions,
    Session,
    SessionService,
    StaleSessionError,
    appends,
)
from adk_sessions.dialects.sqlite import SQLite
from adk_sessions.models import models
from adk_sessions.url import create_engine

ON_POSTGRESQL = ["postgresql", "generic"]


@pytest.fixture(params=[name for name in BACKENDS if name in EVERY_DATABASE])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_service(
    backend: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> Callable[..., SessionService]:
    kind, options = BACKENDS[backend]
    shared = SHARED.get(kind)
    url = request.getfixturevalue(shared) if shared else fresh_database(kind)
    return lambda **more: SessionService(url, **options, **more)


@pytest.fixture
async def service(new_service: Callable[..., SessionService]) -> AsyncIterator[SessionService]:
    async with new_service() as service:
        yield service


# --- one service, many tasks -------------------------------------------------------------------


async def test_sixteen_tasks_keep_every_acknowledged_key_and_event_from_the_first_start_on(
    backend: str, fresh_database: Callable[[str], str], app_name: str
) -> None:
    kind, options = BACKENDS[backend]
    async with SessionService(fresh_database(kind), **options) as service:
        writers = [
            fill(service, app=app_name, user=f"user-{n % 4}", writer=f"t{n}", appends=6)
            for n in range(16)
        ]
        record = Record.of(await asyncio.gather(*writers))
        assert len(record.calls) == 16 * 7
        assert faults(record, await read_all(service, app_name)) == []


async def test_tasks_that_share_a_session_object_all_succeed(
    service: SessionService, app_name: str
) -> None:
    session = await service.create_session(app_name=app_name, user_id="ann")
    record = Record()

    async def append(name: str) -> None:
        delta = in_each_scope(name)
        began = time.monotonic()
        await service.append_event(session, event(name, delta))
        record.calls.append(Call("ann", session.id, name, delta, began, time.monotonic()))

    for round in range(8):
        await asyncio.gather(*(append(f"{round}-{n}") for n in range(8)))
        stored = await load(service, app_name, "ann", session.id)
        assert (session.state, session.events) == (stored.state, stored.events)
        assert session.last_update_time == stored.last_update_time
    assert len(record.calls) == 64
    assert faults(record, await read_all(service, app_name)) == []


async def test_the_order_of_appends_is_the_order_of_events_whatever_their_timestamps(
    service: SessionService, app_name: str
) -> None:
    session = await service.create_session(app_name=app_name, user_id="ann")
    offsets = [0, 0, -86_400, -86_400, 86_400, 0, 86_400, -86_400, 0]
    # the ids run backwards, so that they cannot stand in for the order
    ids = [f"e{n}" for n in reversed(range(len(offsets)))]
    # and the first of them is ahead of the session, so that its clock alone cannot make it
    start = session.last_update_time + 1000
    for id, offset in zip(ids, offsets, strict=True):
        await service.append_event(session, event(id, {}, timestamp=start + offset))
    assert seen(await load(service, app_name, "ann", session.id)).events == ids
    for few in range(len(ids)):
        recent = await service.get_session(
            app_name=app_name, user_id="ann", session_id=session.id, num_recent_events=few
        )
        assert recent is not None
        assert seen(recent).events == ids[len(ids) - few :]


async def test_of_concurrent_creates_of_one_id_one_wins(
    service: SessionService, app_name: str
) -> None:
    for round in range(8):
        results = await asyncio.gather(
            *(
                service.create_session(
                    app_name=app_name,
                    user_id="ann",
                    session_id=f"id-{round}",
                    state={"by": n, f"app:{round}": n},
                )
                for n in range(8)
            ),
            return_exceptions=True,
        )
        won = [result for result in results if isinstance(result, Session)]
        lost = [result for result in results if not isinstance(result, Session)]
        assert len(won) == 1
        assert {type(result) for result in lost} == {AlreadyExistsError}
        stored = await load(service, app_name, "ann", f"id-{round}")
        assert stored.state == won[0].state
        assert stored.state[f"app:{round}"] == stored.state["by"]


# --- locks -------------------------------------------------------------------------------------


# A writer keeps each row that it has locked for two more milliseconds before it goes on.
SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM pg_sleep(0.002); RETURN NEW; END';
CREATE TRIGGER slow BEFORE UPDATE ON app_states FOR EACH ROW EXECUTE FUNCTION slow();
CREATE TRIGGER slow BEFORE UPDATE ON user_states FOR EACH ROW EXECUTE FUNCTION slow();
CREATE TRIGGER slow BEFORE UPDATE ON sessions FOR EACH ROW EXECUTE FUNCTION slow();
"""


@pytest.mark.parametrize("backend", ON_POSTGRESQL)
async def test_crossing_writers_never_deadlock(
    backend: str, fresh_database: Callable[[str], str], app_name: str
) -> None:
    """Locks are taken in the order session, app, user; 40P01 would come up as an error."""
    url, options = fresh_database("postgresql"), BACKENDS[backend][1]
    places = [(user, f"{user}-{n}") for user in ("ann", "bob") for n in range(3)]
    services = [SessionService(url, retry_window=0, **options) for _ in range(8)]
    for user, id in places:
        await services[0].create_session(app_name=app_name, user_id=user, session_id=id)
    connection = await asyncpg.connect(url)
    await connection.execute(SLOW)
    await connection.close()
    appended = 0

    async def write(service: SessionService, writer: int) -> None:
        nonlocal appended
        choose = random.Random(writer)
        for n in range(24):
            name = f"{writer}-{n}"
            keys = [key for key in in_each_scope("k") if choose.random() < 0.7]
            choose.shuffle(keys)
            delta = dict.fromkeys(keys, name)
            if choose.random() < 0.3:
                user = choose.choice(["ann", "bob"])
                await service.create_session(app_name=app_name, user_id=user, state=delta)
                continue
            user, id = choose.choice(places)
            while True:
                session = await load(service, app_name, user, id)
                try:
                    await service.append_event(session, event(name, delta))
                except StaleSessionError:
                    continue
                appended += 1
                break

    try:
        results = await asyncio.gather(
            *(write(service, n) for n, service in enumerate(services)), return_exceptions=True
        )
        assert [result for result in results if result is not None] == []
        stored = [await load(services[0], app_name, user, id) for user, id in places]
        assert sum(len(session.events) for session in stored) == appended > 80
    finally:
        for service in services:
            await service.close()


@pytest.mark.parametrize("backend", ON_POSTGRESQL)
@pytest.mark.parametrize("repeats", [True, False], ids=["repeated", "not repeated"])
async def test_a_deadlock_that_others_cause_is_repeated(
    backend: str,
    repeats: bool,
    postgres: Postgres,
    fresh_database: Callable[[str], str],
    app_name: str,
) -> None:
    url = fresh_database("postgresql")
    options = BACKENDS[backend][1] | ({} if repeats else {"retry_window": 0})
    async with SessionService(url, **options) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        met = errors_of(service)
        lock_app = "SELECT 1 FROM app_states WHERE app_name = $1 FOR UPDATE"
        lock_session = "SELECT 1 FROM sessions WHERE app_name = $1 FOR UPDATE"
        holder, other = await asyncpg.connect(url), await asyncpg.connect(url)
        watcher = await asyncpg.connect(url)
        try:
            async with asyncio.timeout(60):
                holding, opposite = holder.transaction(), other.transaction()
                await holding.start()
                await opposite.start()
                # whoever looks for the deadlock is its victim: that must not be the other one
                await other.execute("SET LOCAL deadlock_timeout = '100s'")
                await holder.execute(lock_session, app_name)
                await other.execute(lock_app, app_name)
                # The append waits for the session first, then the other one does: in this order
                # they get it, and the append goes on to wait for the app.
                append = asyncio.create_task(
                    service.append_event(session, event("e", in_each_scope("k")))
                )
                await _waiting(watcher, 1)
                crossing = asyncio.create_task(other.execute(lock_session, app_name))
                await _waiting(watcher, 2)
                await holding.rollback()
                await crossing
                await opposite.rollback()
                if repeats:
                    await append
                else:
                    with pytest.raises(DatabaseError) as raised:
                        await append
                    assert (raised.value.code, raised.value.retryable) == ("40P01", True)
        finally:
            for connection in (holder, other, watcher):
                connection.terminate()
        # The repeated append may be at the session before the other one has woken up: one more.
        assert set(met) == {"DeadlockDetectedError"}, "there was no deadlock"
        stored = await load(service, app_name, "ann", session.id)
        expected = (["e"], in_each_scope("k")) if repeats else ([], {})
        assert (seen(stored).events, stored.state) == expected
        assert (session.events, session.state) == (stored.events, stored.state)


async def test_a_wait_for_a_lock_that_took_too_long_is_repeated(
    mariadb_url: str, app_name: str
) -> None:
    engine = create_engine(
        mariadb_url, connect_args={"init_command": "SET innodb_lock_wait_timeout = 1"}
    )
    service, impatient = (
        SessionService(engine=engine),
        SessionService(engine=engine, retry_window=0),
    )
    try:
        session = await service.create_session(app_name=app_name, user_id="ann")
        met = errors_of(service)
        async with engine.connect() as holder:
            lock = text("SELECT 1 FROM sessions WHERE app_name = :app FOR UPDATE")
            await holder.execute(lock, {"app": app_name})
            copy = session.model_copy(deep=True)
            with pytest.raises(DatabaseError) as raised:
                await impatient.append_event(copy, event("e", in_each_scope("k")))
            assert raised.value.retryable
            append = asyncio.create_task(
                service.append_event(session, event("e", in_each_scope("k")))
            )
            async with asyncio.timeout(60):
                while True:
                    if met or append.done():
                        break
                    await asyncio.sleep(0.01)
            await holder.rollback()
        await append
        assert met
        stored = await load(service, app_name, "ann", session.id)
        assert (seen(stored).events, stored.state) == (["e"], in_each_scope("k"))
        assert raised.value.code == 1205
    finally:
        await engine.dispose()


async def _waiting(watcher: Any, number: int) -> None:
    """Returns once so many connections to the database wait for a lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    while True:
        if await watcher.fetchval(query) >= number:
            return
        await asyncio.sleep(0.005)


# --- cancellation ------------------------------------------------------------------------------


async def _after_turns(work: Awaitable[Any], turns: int) -> None:
    """Cancel after so many turns of the event loop."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
        if task.done():
            break
    task.cancel()
    await task


async def _after_seconds(work: Awaitable[Any], seconds: float) -> None:
    await asyncio.wait_for(work, seconds)


async def test_a_cancelled_append_is_stored_whole_or_not_at_all(
    backend: str,
    request: pytest.FixtureRequest,
    fresh_database: Callable[[str], str],
    app_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # it waits for two seconds and no longer for a server, which a loaded machine may take
    monkeypatch.setattr(appends, "_PATIENCE", 60.0)
    kind, options = BACKENDS[backend]
    shared = SHARED.get(kind)
    url = request.getfixturevalue(shared) if shared else fresh_database(kind)
    engine: AsyncEngine | None = None
    if shared:
        engine = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=30)
    service = SessionService(None if engine else url, engine=engine, **options)
    moments: list[tuple[Callable[[Awaitable[Any], Any], Awaitable[None]], Any]] = []
    moments += [(_after_turns, turns) for turns in range(24)]
    moments += [(_after_turns, 2**n) for n in range(5, 13)]
    moments += [(_after_seconds, seconds / 8_000) for seconds in range(64)]
    moments += [(_after_seconds, 60.0)]  # on a slow machine none of the others lies after the end
    expected: list[str] = []
    cancelled = 0
    try:
        first = await service.create_session(app_name=app_name, user_id="ann")
        for n, (broken_off, when) in enumerate(moments):
            session = await load(service, app_name, "ann", first.id)
            name = f"e{n}"
            acknowledged = False
            try:
                await broken_off(
                    service.append_event(session, event(name, in_each_scope(name))), when
                )
                acknowledged = True
            except (asyncio.CancelledError, TimeoutError):
                cancelled += 1
            if engine:
                assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            stored = await load(service, app_name, "ann", first.id)
            ids = seen(stored).events
            if acknowledged or name in ids:
                expected.append(name)
            assert ids == expected
            assert stored.state == {
                key: value for id in expected for key, value in in_each_scope(id).items()
            }
            assert session == stored, "the caller's session is not what is stored"
        assert 0 < cancelled < len(moments), "no moment lay within an append"
        assert len(expected) < len(moments)
        assert await service.get_user_state(app_name=app_name, user_id="ann") == {
            id: id for id in expected
        }
    finally:
        await service.close()
        if engine:
            await engine.dispose()


# --- the judge ---------------------------------------------------------------------------------


async def test_the_judge_accepts_what_is_right(service: SessionService, app_name: str) -> None:
    ids = [(await service.create_session(app_name=app_name, user_id="ann")).id for _ in range(2)]
    writers = [
        share(service, app=app_name, user="ann", writer=f"t{n}", sessions=ids, appends=4)
        for n in range(4)
    ]
    record = Record.of(await asyncio.gather(*writers))
    assert faults(record, await read_all(service, app_name)) == []


def _call(event: str | None, began: float, delta: str = "", **more: Any) -> Call:
    name = delta or event or "created"
    return Call("ann", "s", event, in_each_scope(name), began, began + 0.5, **more)


CALLS = [_call(None, 0), _call("a", 1), _call("b", 2), _call("c", 3)]
STATE = {key: value for call in CALLS for key, value in call.delta.items()}
FINAL = Read("ann", "s", ["a", "b", "c"], STATE, 9)
UP_TO_A = {key: value for call in CALLS[:2] for key, value in call.delta.items()}
EARLIER = Read("ann", "s", ["a"], UP_TO_A, 1.7)


def _without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in STATE.items() if key not in keys}


WRONG = {
    "the session is lost": (None, EARLIER, "s is lost"),
    "an event is lost": (replace(FINAL, events=["a", "c"]), None, "event b is lost"),
    "the last event is lost": (replace(FINAL, events=["a", "b"]), None, "event c is lost"),
    "an event is there twice": (
        replace(FINAL, events=["a", "b", "b", "c"]),
        None,
        "event b is there 2 times",
    ),
    "an event that was refused": (
        replace(FINAL, events=["a", "b", "x", "c"]),
        None,
        "event x is nobody's",
    ),
    "events in another order": (
        replace(FINAL, events=["b", "a", "c"]),
        None,
        "event a comes after b, which began after its end",
    ),
    "a key of the app is lost": (
        replace(FINAL, state=_without("app:b")),
        None,
        "app:b is lost from the state of s",
    ),
    "a key of the user is lost": (
        replace(FINAL, state=_without("user:created")),
        None,
        "user:created is lost from the state of s",
    ),
    "a key of the session is lost": (
        replace(FINAL, state=_without("c")),
        None,
        "c is lost from the state of s",
    ),
    "a key has another value": (
        replace(FINAL, state={**STATE, "a": "b"}),
        None,
        "a is 'b' and not 'a' in the state of s",
    ),
    "a key that was refused": (
        replace(FINAL, state={**STATE, "app:x": "x"}),
        None,
        "app:x is nobody's in the state of s",
    ),
    "a read out of order": (
        FINAL,
        replace(EARLIER, events=["b", "a"], state=STATE),
        "a read of s is no prefix: ['b', 'a']",
    ),
    "a read that misses an event": (
        FINAL,
        replace(EARLIER, began=2.7),
        "a read of s misses b",
    ),
    "a read with an event before its delta": (
        FINAL,
        replace(EARLIER, events=["a", "b"]),
        "in a read of s b and ['app:b', 'user:b', 'b'] do not match",
    ),
    "a read with a delta before its event": (
        FINAL,
        replace(EARLIER, state={**UP_TO_A, "user:b": "b"}),
        "in a read of s b and ['user:b'] do not match",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_judge_sees(case: str) -> None:
    assert faults(Record(CALLS, [EARLIER]), [FINAL]) == []
    final, read, fault = WRONG[case]
    reads = [] if read is None else [read]
    assert fault in faults(Record(CALLS, reads), [] if final is None else [final])


async def test_the_judge_sees_what_a_service_without_locks_loses(
    fresh_database: Callable[[str], str], app_name: str
) -> None:
    """Two services that read, merge and write without a transaction, at the same time."""
    url = fresh_database("sqlite")
    together = threading.Barrier(2)

    class Unlocked(SQLite):
        def scope_row(self, *args: Any, **options: Any) -> Any:
            stored = super().scope_row(*args, **options)
            together.wait(30)
            return stored

    async with SessionService(url) as whole, SessionService(url) as one, SessionService(url) as two:
        await whole.create_session(app_name=app_name, user_id="ann", session_id="unused")
        for service in (one, two):
            await service.prepare_tables()
            service._statements = Unlocked(models())
            service._database.run = service._database.submit  # type: ignore[method-assign]
        writers = [
            fill(service, app=app_name, user="ann", writer=name, appends=2)
            for name, service in (("one", one), ("two", two))
        ]
        record = Record.of(await asyncio.gather(*writers))
        first = Call("ann", "unused", None, {}, 0, 0)
        record.calls.append(first)
        found = faults(record, await read_all(whole, app_name))
    for scope in ("app", "user"):
        assert any(fault.startswith(f"{scope}:") and " is lost from " in fault for fault in found)


async def test_a_row_that_changed_while_it_was_waited_for_is_no_error(
    mariadb_url: str, app_name: str
) -> None:
    # the default of recent MariaDB: REPEATABLE READ then refuses such a row, error 1020
    snapshots = {"init_command": "SET SESSION innodb_snapshot_isolation = ON"}
    async with SessionService(mariadb_url, connect_args=snapshots, retry_window=0) as service:
        sessions = [
            await service.create_session(app_name=app_name, user_id=f"u{n}") for n in range(8)
        ]

        async def append(n: int) -> None:
            for i in range(5):
                delta = {f"app:{n} {i}": i, f"user:{i}": i, "k": i}
                actions = EventActions(state_delta=delta)
                await service.append_event(sessions[n], Event(actions=actions))

        await asyncio.gather(*map(append, range(8)))
        state = await service.get_app_state(app_name=app_name)
        assert state == {f"{n} {i}": i for n in range(8) for i in range(5)}


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_the_generic_path_keeps_every_key_at_any_isolation_level(
    postgres_url: str, app_name: str, level: str
) -> None:
    options: dict[str, Any] = {"backend": "generic", "isolation_level": level}
    async with (
        SessionService(postgres_url, **options) as one,
        SessionService(postgres_url, **options) as other,
    ):
        for n in range(3):
            name = f"{app_name}-{n}"
            await asyncio.gather(
                *(
                    (one, other)[i % 2].create_session(
                        app_name=name, user_id="u", state={f"app:{i}": i, f"user:{i}": i}
                    )
                    for i in range(10)
                )
            )
            expected = {str(i): i for i in range(10)}
            assert await one.get_app_state(app_name=name) == expected
            assert await one.get_user_state(app_name=name, user_id="u") == expected


async def test_without_a_foreign_key_a_deleted_session_stays_deleted(
    postgres: Postgres, app_name: str
) -> None:
    with postgres.scratch_database() as url:
        async with SessionService(url) as service:
            ids = {"app_name": app_name, "user_id": "u", "session_id": "s"}
            await service.create_session(**ids)
            conn = await asyncpg.connect(url)
            key = await conn.fetchval(
                "SELECT conname FROM pg_constraint"
                " WHERE conrelid = 'events'::regclass AND contype = 'f'"
            )
            await conn.execute(f"ALTER TABLE events DROP CONSTRAINT {key}")
            # an append that holds the row and has written its event when the delete begins
            append = conn.transaction()
            await append.start()
            await conn.execute("UPDATE sessions SET update_time = update_time + interval '1 s'")
            await conn.execute(
                "INSERT INTO events (id, app_name, user_id, session_id, invocation_id, timestamp)"
                " VALUES ('e', $1, 'u', 's', '', now())",
                app_name,
            )
            deletion = asyncio.create_task(service.delete_session(**ids))
            watcher = await asyncpg.connect(url)
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            while not await watcher.fetchval(waiting):
                assert not deletion.done()
                await asyncio.sleep(0.01)
            await append.commit()
            await deletion
            await watcher.close()
            await conn.close()
            assert await service.get_session(**ids) is None
            await service.create_session(**ids)
            again = await service.get_session(**ids)
            assert again is not None
            assert again.events == []
