"""Writes on SQLite that wait for the thread share a commit, and are durable when answered."""

from __future__ import annotations

import asyncio
import gc
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import forked
import pytest

from adk_sessions import (
    AlreadyExistsError,
    DatabaseError,
    Event,
    EventActions,
    EventConflictError,
    Session,
    SessionService,
    StaleSessionError,
)
from adk_sessions.dialects.lanes import GROUP, Lane

THREAD = "adk_sessions-sqlite"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


@pytest.fixture
async def service(path: Path) -> AsyncIterator[SessionService]:
    async with SessionService(f"sqlite:///{path}") as service:
        await service.prepare_tables()
        yield service


@pytest.fixture
def outside(path: Path, service: SessionService) -> Iterator[sqlite3.Connection]:
    """Another process's connection to the file of ``service``."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        yield connection


def ids_in(connection: sqlite3.Connection) -> set[str]:
    return {id_ for (id_,) in connection.execute("SELECT id FROM events")}


async def sessions_of(service: SessionService, count: int) -> list[Session]:
    return [await service.create_session(app_name="a", user_id=f"u{n}") for n in range(count)]


def an_event(name: str) -> Event:
    delta = {name: name, f"user:{name}": name, f"app:{name}": name}
    return Event(id=name, actions=EventActions(state_delta=delta))


async def watch(service: SessionService, seen: Callable[[str], None] | None = None) -> Counter[str]:
    """Counts the first words of what the writer's connection runs from now on."""
    counted: Counter[str] = Counter()

    def count(statement: str) -> None:
        counted[statement.split()[0]] += 1
        if seen is not None:
            seen(statement)

    await on_the_writer(service, lambda driver: driver.set_trace_callback(count))
    return counted


async def on_the_writer(service: SessionService, do: Callable[[Any], Any]) -> Any:
    return await service._database.submit(
        lambda conn: do(conn.connection.driver_connection), write=True
    )


@asynccontextmanager
async def held(
    service: SessionService,
) -> AsyncIterator[Callable[[int], Coroutine[Any, Any, None]]]:
    """Keeps the writer's thread busy; what is called meanwhile waits, and then is one group.

    Yields a function that returns when so many calls wait.
    """
    busy, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold(_: Any) -> None:
        loop.call_soon_threadsafe(busy.set)
        assert release.wait(30)

    holding = asyncio.create_task(on_the_writer(service, hold))
    await busy.wait()

    async def waiting(count: int) -> None:
        lane: Any = service._database._writer  # type: ignore[attr-defined]
        async with asyncio.timeout(30):
            while lane._worker._calls.qsize() < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    try:
        yield waiting
    finally:
        release.set()
        await holding


async def together(service: SessionService, calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results, or errors, of calls that are one group, in this order."""
    tasks = []
    async with held(service) as waiting:
        for number, call in enumerate(calls, 1):
            tasks.append(asyncio.create_task(call))
            await waiting(number)
    return await asyncio.gather(*tasks, return_exceptions=True)


# One commit, and nobody answered before it


async def test_calls_that_wait_share_a_commit(
    service: SessionService, outside: sqlite3.Connection
) -> None:
    sessions = await sessions_of(service, 16)
    counted = await watch(service)
    events = [an_event(f"e{n}") for n in range(16)]
    await together(service, list(map(service.append_event, sessions, events)))
    assert (counted["BEGIN"], counted["COMMIT"], counted["SAVEPOINT"]) == (1, 1, 16)
    for session, event in zip(sessions, events, strict=True):
        assert session.events == [event]
        stored = await service.get_session(
            app_name="a", user_id=session.user_id, session_id=session.id
        )
        assert stored is not None
        assert stored.events == [event]
        assert stored.state[event.id] == stored.state[f"user:{event.id}"] == event.id
    assert await service.get_app_state(app_name="a") == {event.id: event.id for event in events}


async def test_sixteen_tasks_commit_less_often_than_they_append(service: SessionService) -> None:
    sessions = await sessions_of(service, 16)
    counted = await watch(service)

    async def append(session: Session) -> None:
        for _ in range(10):
            await service.append_event(session, Event())

    await asyncio.gather(*map(append, sessions))
    assert counted["INSERT"] == 160
    assert counted["BEGIN"] == counted["COMMIT"] < 160
    assert counted["ROLLBACK"] == 0


async def test_a_lone_call_needs_no_savepoint(service: SessionService) -> None:
    (session,) = await sessions_of(service, 1)
    statements: list[str] = []
    await watch(service, statements.append)
    await service.append_event(session, Event())
    assert [statement.split()[0] for statement in statements] == [
        *("BEGIN", "UPDATE", "INSERT", "COMMIT")
    ]
    assert statements[0] == "BEGIN IMMEDIATE"  # a deferred one that has read may not write


@pytest.mark.parametrize("slow", ["COMMIT", "RELEASE"])
async def test_nobody_is_answered_before_the_commit(
    service: SessionService, outside: sqlite3.Connection, slow: str
) -> None:
    sessions = await sessions_of(service, 6)
    await watch(service, lambda sql: time.sleep(0.05) if sql.startswith(slow) else None)
    seen = []

    async def append(number: int) -> None:
        await service.append_event(sessions[number], Event(id=f"e{number}"))
        seen.append(f"e{number}" in ids_in(outside))

    await together(service, [append(n) for n in range(6)])
    assert seen == [True] * 6


async def test_a_read_sees_what_was_acknowledged(service: SessionService) -> None:
    sessions = await sessions_of(service, 8)

    async def work(session: Session) -> None:
        for n in range(1, 9):
            await service.append_event(session, Event())
            stored = await service.get_session(
                app_name="a", user_id=session.user_id, session_id=session.id
            )
            assert stored is not None
            assert len(stored.events) == n

    await asyncio.gather(*map(work, sessions))


async def test_first_come_first_served_and_no_group_without_end(service: SessionService) -> None:
    counted = await watch(service)
    order: list[int] = []
    count = GROUP + 10

    def work(n: int) -> Callable[[Any], int]:
        return lambda _: order.append(n) or n  # type: ignore[func-returns-value]

    calls = [service._database.run(work(n), write=True) for n in range(count)]
    assert await together(service, calls) == order == list(range(count))
    assert counted["COMMIT"] == 2
    assert counted["SAVEPOINT"] == count


async def test_work_with_transactions_of_its_own_is_alone(service: SessionService) -> None:
    def is_free(conn: Any) -> bool:
        return not conn.connection.driver_connection.in_transaction

    counted = await watch(service)
    run, submit = service._database.run, service._database.submit
    calls = [run, run, submit, submit, run]
    free = await together(service, [call(is_free, write=True) for call in calls])
    assert free == [False, False, True, True, False]
    assert (counted["COMMIT"], counted["SAVEPOINT"]) == (2, 2)


async def test_each_call_goes_to_the_thread_once(
    service: SessionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops = 0
    submit = Lane.submit

    def counted(*args: Any) -> Any:
        nonlocal hops
        hops += 1
        return submit(*args)

    monkeypatch.setattr(Lane, "submit", counted)
    session = await service.create_session(app_name="a", user_id="u", state={"app:a": 1})
    await service.append_event(session, an_event("e"))
    await service.append_events(session, [Event(), Event()])
    ids: dict[str, Any] = {"app_name": "a", "user_id": "u", "session_id": session.id}
    assert await service.get_session(**ids) == session
    await service.list_sessions(app_name="a")
    await service.get_user_state(app_name="a", user_id="u")
    await service.delete_session(**ids)
    assert hops == 7


# Failures


async def test_a_call_that_fails_leaves_the_others(
    service: SessionService, outside: sqlite3.Connection
) -> None:
    sessions = await sessions_of(service, 5)
    stale = sessions[0].model_copy(deep=True)
    await service.append_event(sessions[0], Event(id="first"))
    await service.append_event(sessions[1], Event(id="taken"))
    counted = await watch(service)
    taken = {"app_name": "a", "user_id": "u2", "session_id": sessions[2].id}

    def write_and_fail(conn: Any) -> None:
        conn.exec_driver_sql("UPDATE app_states SET state = '{\"half\": 1}'")
        raise ZeroDivisionError

    results = await together(
        service,
        [
            service.append_event(sessions[2], an_event("before")),
            service.create_session(**taken, state={"app:half": 1, "user:half": 1}),
            service.append_event(stale, an_event("stale")),
            service.append_event(sessions[1], Event(id="taken", content="other")),
            service._database.run(write_and_fail, write=True),
            service.append_event(sessions[3], an_event("after")),
        ],
    )
    wrong = [type(result) for result in results[1:5]]
    assert wrong == [AlreadyExistsError, StaleSessionError, EventConflictError, ZeroDivisionError]
    assert [results[0].id, results[5].id] == ["before", "after"]
    assert (counted["COMMIT"], counted["SAVEPOINT"]) == (1, 6)
    assert ids_in(outside) == {"first", "taken", "before", "after"}
    both = {"before": "before", "after": "after"}
    assert await service.get_app_state(app_name="a") == both
    assert await service.get_user_state(app_name="a", user_id="u2") == {"before": "before"}


async def test_a_full_disk_fails_all_and_nothing_of_it_is_stored(
    service: SessionService, outside: sqlite3.Connection
) -> None:
    sessions = await sessions_of(service, 6)

    def limit(driver: Any) -> None:
        (pages,) = driver.execute("PRAGMA page_count").fetchone()
        driver.execute(f"PRAGMA max_page_count = {pages + 2}")

    await on_the_writer(service, limit)
    big = Event(id="big", content="large" * 10_000)
    events = [Event(id="0"), Event(id="1"), big, Event(id="3"), Event(id="4"), Event(id="5")]
    before = [session.model_copy(deep=True) for session in sessions]
    results = await together(service, list(map(service.append_event, sessions, events)))
    assert [getattr(result, "code", None) for result in results] == [sqlite3.SQLITE_FULL] * 6
    assert sessions == before
    assert ids_in(outside) == set()
    await on_the_writer(service, lambda driver: driver.execute("PRAGMA max_page_count = 100000"))
    for session, event in zip(sessions, events, strict=True):
        await service.append_event(session, event)
    assert ids_in(outside) == {event.id for event in events}


@pytest.mark.parametrize("at", [0, 2, 4])
async def test_nobody_outlives_a_transaction_that_sqlite_has_rolled_back(
    service: SessionService, outside: sqlite3.Connection, at: int
) -> None:
    sessions = await sessions_of(service, 4)

    def lose(conn: Any) -> None:
        # what a full disk, an I/O error or a lack of memory do
        conn.connection.driver_connection.execute("ROLLBACK")
        raise sqlite3.OperationalError("gone")

    calls: list[Any] = [service.append_event(s, Event(id=s.user_id)) for s in sessions]
    calls.insert(at, service._database.run(lose, write=True))
    results = await together(service, calls)
    assert isinstance(results[at], sqlite3.OperationalError)
    assert all(isinstance(result, sqlite3.Error | DatabaseError) for result in results)
    assert ids_in(outside) == set()
    assert all(session.events == [] for session in sessions)
    for session in sessions:
        await service.append_event(session, Event(id=session.user_id))
    assert ids_in(outside) == {"u0", "u1", "u2", "u3"}


async def test_a_commit_that_fails_fails_all(
    service: SessionService, outside: sqlite3.Connection
) -> None:
    sessions = await sessions_of(service, 3)

    def break_the_commit(conn: Any) -> None:
        conn.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        conn.exec_driver_sql(
            "INSERT INTO events (id, app_name, user_id, session_id, invocation_id, timestamp)"
            " VALUES ('orphan', 'a', 'u', 'none', '', '2026-01-01 00:00:00.000000')"
        )

    results = await together(
        service,
        [
            service.append_event(sessions[0], Event(id="0")),
            service._database.run(break_the_commit, write=True),
            service.append_event(sessions[1], Event(id="1")),
        ],
    )
    assert all(isinstance(result, Exception) for result in results)
    assert ids_in(outside) == set()
    for n in (0, 1, 2):
        await service.append_event(sessions[n], Event(id=str(n)))
    assert ids_in(outside) == {"0", "1", "2"}


async def test_a_lock_that_is_not_had_is_everybodys_to_wait_for(
    service: SessionService, outside: sqlite3.Connection, path: Path
) -> None:
    sessions = await sessions_of(service, 5)
    options: dict[str, Any] = {"connect_args": {"timeout": 0.05}}
    async with SessionService(f"sqlite:///{path}", retry_window=0, **options) as impatient:
        await impatient.ping()
        outside.execute("BEGIN IMMEDIATE")
        calls = [impatient.append_event(s, Event(id=s.user_id)) for s in sessions]
        results = await together(impatient, calls)
        assert [result.code for result in results] == [sqlite3.SQLITE_BUSY] * 5
        assert all(result.retryable for result in results)
        assert all(session.events == [] for session in sessions)
    async with SessionService(f"sqlite:///{path}", **options) as patient:
        await patient.ping()
        calls = [patient.append_event(s, Event(id=s.user_id)) for s in sessions]
        appending = asyncio.gather(*calls)
        await asyncio.sleep(0.2)
        assert not appending.done()
        outside.execute("ROLLBACK")
        await appending
    assert ids_in(outside) == {f"u{n}" for n in range(5)}


async def test_a_member_that_is_cancelled_is_stored_when_its_caller_goes_on(
    service: SessionService, outside: sqlite3.Connection
) -> None:
    sessions = await sessions_of(service, 3)
    await watch(service, lambda sql: time.sleep(0.05) if sql == "COMMIT" else None)
    async with held(service) as waiting:
        tasks = []
        for number, session in enumerate(sessions, 1):
            append = service.append_event(session, Event(id=session.user_id))
            tasks.append(asyncio.create_task(append))
            await waiting(number)
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        assert not tasks[1].done()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert ids_in(outside) == {"u0", "u1", "u2"}
    await asyncio.gather(tasks[0], tasks[2])
    assert [len(session.events) for session in sessions] == [1, 1, 1]


# Processes, threads, event loops

STORM = """
import asyncio, sys
from adk_sessions import Event, EventActions, SessionService

async def main(url, name, tasks, appends):
    async with SessionService(url) as service:
        async def work(n):
            session = await service.create_session(app_name="a", user_id=f"{name} {n}")
            for i in range(appends):
                key = f"{name} {n} {i}"
                delta = {key: i, f"app:{key}": i, "user:last": i}
                await service.append_event(
                    session, Event(id=key, actions=EventActions(state_delta=delta))
                )
                print(key, flush=True)
        await asyncio.gather(*map(work, range(tasks)))

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


def storm(path: Path, name: str, tasks: int, appends: int) -> forked.Python:
    return forked.Python("-c", STORM, f"sqlite:///{path}", name, str(tasks), str(appends))


def check(path: Path, acknowledged: set[str], *, unknown: int) -> None:
    """Everything that was acknowledged is there, and at most so many more calls; no half ones."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stored = ids_in(connection)
        ((state,),) = connection.execute("SELECT state FROM app_states")
        own = [json.loads(text) for (text,) in connection.execute("SELECT state FROM sessions")]
    assert acknowledged <= stored
    assert len(stored - acknowledged) <= unknown
    assert json.loads(state).keys() == stored
    assert {key for state in own for key in state} == stored


@pytest.mark.parametrize("lines", [50, 300])
def test_what_a_killed_process_has_acknowledged_is_stored(path: Path, lines: int) -> None:
    with storm(path, "killed", 16, 10_000) as process:
        try:
            acknowledged = [process.stdout.readline() for _ in range(lines)]
        finally:
            process.kill()
        acknowledged += process.stdout.readlines()
    whole = {line.rstrip("\n") for line in acknowledged if line.endswith("\n")}
    assert len(whole) >= lines
    check(path, whole, unknown=16 + len(acknowledged) - len(whole))


def test_two_processes_with_groups_lose_nothing(path: Path) -> None:
    with storm(path, "one", 8, 25) as one, storm(path, "two", 8, 25) as two:
        lines = one.stdout.read() + two.stdout.read()
    assert (one.returncode, two.returncode) == (0, 0)
    acknowledged = set(lines.splitlines())
    assert len(acknowledged) == 400
    check(path, acknowledged, unknown=0)


def test_threads_with_event_loops_of_their_own(path: Path) -> None:
    service = SessionService(f"sqlite:///{path}")
    asyncio.run(service.prepare_tables())
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        async def append() -> None:
            session = await service.create_session(app_name="a", user_id=f"u{n}")
            for i in range(20):
                await service.append_event(session, Event(id=f"{n} {i}"))
            found[n] = await service.get_session(
                app_name="a", user_id=f"u{n}", session_id=session.id
            )

        asyncio.run(append())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(service.close())
    assert {n: [event.id for event in session.events] for n, session in found.items()} == {
        n: [f"{n} {i}" for i in range(20)] for n in range(4)
    }


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.mark.parametrize("close", [True, False])
async def test_no_thread_stays_of_a_service_that_is_gone(path: Path, close: bool) -> None:
    before = set(running())
    service = SessionService(f"sqlite:///{path}")
    await service.create_session(app_name="a", user_id="u")
    await service.list_sessions(app_name="a")
    mine = set(running()) - before
    assert len(mine) == 2
    if close:
        await service.close()
    del service
    async with asyncio.timeout(30):
        while any(thread.is_alive() for thread in mine):
            gc.collect()  # a thread lets go of its last call a moment after it has answered
            await asyncio.sleep(0.01)


async def test_a_call_after_close_has_a_new_thread(service: SessionService) -> None:
    async with held(service) as waiting:
        closing_ = asyncio.create_task(service.close())
        create = asyncio.create_task(service.create_session(app_name="a", user_id="u"))
        await asyncio.wait_for(create, 30)  # does not wait for what the old thread does
        assert not closing_.done()
        del waiting
    await closing_
    assert len((await service.list_sessions(app_name="a")).sessions) == 1
