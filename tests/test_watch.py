"""watch: each new event once and in order, whoever appends it and whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import re
import time
import types
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import _or_skip
from engines import engine_for
from everywhere import BACKENDS, EVERY_DATABASE, SOAK, place_of
from servers import Postgres, run_postgres
from sqlalchemy import StaticPool
from workers import Crew, event, load

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    EventNotFoundError,
    InvalidInputError,
    Session,
    SessionNotFoundError,
    SessionService,
    UnreadableEventError,
    migrate,
    watch,
)
from adk_sessions.dialects.notices import channel_of, notice_of
from adk_sessions.dialects.rows import Key
from adk_sessions.models import models

SOON = 0.02
PATIENCE = 30.0


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 20}
    async with SessionService(url, **pool, **options) as service:
        yield service


@pytest.fixture
async def session(service: SessionService, app_name: str) -> Session:
    return await service.create_session(app_name=app_name, user_id="ann", session_id="s")


def of(session: Session) -> dict[str, str]:
    return {"app_name": session.app_name, "user_id": session.user_id, "session_id": session.id}


async def append(service: SessionService, session: Session, *ids: str) -> None:
    """As another process would, which holds a session of its own."""
    own = await load(service, session.app_name, session.user_id, session.id)
    for id in ids:
        await service.append_event(own, event(id, {id: 1}))


async def next_ids(watching: AsyncGenerator[Any, None], count: int) -> list[str]:
    async with asyncio.timeout(PATIENCE):
        return [(await anext(watching)).id for _ in range(count)]


async def rest(watching: AsyncGenerator[Any, None]) -> list[str]:
    async with asyncio.timeout(PATIENCE):
        return [event.id async for event in watching]


@asynccontextmanager
async def following(watching: AsyncGenerator[Any, None]) -> AsyncIterator[list[str]]:
    """Ids as they come, read by a task of their own."""
    seen: list[str] = []

    async def follow() -> None:
        async with aclosing(watching):
            async for event in watching:
                seen.append(event.id)

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def in_use(service: SessionService) -> int:
    """Connections of the pool, if there is one."""
    return (service._database.connections() or (0, 0))[0]


async def until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    async with asyncio.timeout(patience):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- what is yielded ----------------------------------------------------------------------------


async def test_what_was_missed_comes_first_and_then_what_is_new(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_BATCH", 3)
    await service.append_event(session, event("known", {"known": 1}))
    before = session.model_dump()
    watching = service.watch(session, poll_interval=SOON)
    await append(service, session, *"abcdefg")
    async with aclosing(watching):
        assert await next_ids(watching, 7) == list("abcdefg")
        later = asyncio.ensure_future(next_ids(watching, 3))
        await asyncio.sleep(2 * SOON)
        assert not later.done()
        await append(service, session, *"hij")
        assert await later == list("hij")
    assert session.model_dump() == before


async def test_events_are_what_a_read_has(service: SessionService, session: Session) -> None:
    watching = service.watch(session)
    await append(service, session, *"ab")
    async with aclosing(watching):
        found = [await anext(watching) for _ in "ab"]
    assert found == (await load(service, session.app_name, "ann", "s")).events


async def test_a_batch_comes_whole_and_in_order(service: SessionService, session: Session) -> None:
    ids = [f"e{n}" for n in range(20)]
    now = time.time()
    watching = service.watch(session, poll_interval=SOON)
    async with aclosing(watching):
        # one time for all of them, and a clock that is behind
        await service.append_events(session, [event(id, {}, timestamp=now - 9) for id in ids])
        assert await next_ids(watching, 20) == ids


async def test_a_consumer_goes_on_behind_an_event(
    service: SessionService, session: Session
) -> None:
    await append(service, session, *"abc")
    for after, ids in (("a", ["b", "c"]), ("b", ["c"])):
        async with aclosing(service.watch(session, after=after)) as watching:
            assert await next_ids(watching, len(ids)) == ids
    fresh = await load(service, session.app_name, "ann", "s")
    async with aclosing(service.watch(fresh, after="c", poll_interval=SOON)) as watching:
        coming = asyncio.ensure_future(next_ids(watching, 1))
        await append(service, session, "d")
        assert await coming == ["d"]
    await service.create_session(app_name=session.app_name, user_id="ann", session_id="t")
    other = await load(service, session.app_name, "ann", "t")
    for wrong, after in ((session, "nothing"), (session, "x" * 200), (other, "a")):
        with pytest.raises(EventNotFoundError):
            await anext(service.watch(wrong, after=after))


async def test_a_fork_is_followed_behind_an_event_that_it_was_given(
    service: SessionService, session: Session
) -> None:
    await append(service, session, *"ab")
    await asyncio.sleep(0.002)
    fork = await service.fork_session(session)
    await append(service, fork, "c")
    async with aclosing(service.watch(fork, after="a")) as watching:
        assert await next_ids(watching, 2) == ["b", "c"]


async def test_a_session_made_by_hand_is_followed_from_its_time(
    service: SessionService, session: Session
) -> None:
    await append(service, session, *"ab")
    by_hand = Session(app_name=session.app_name, user_id="ann", id="s")
    async with aclosing(service.watch(by_hand)) as watching:
        assert await next_ids(watching, 2) == ["a", "b"]


async def test_other_sessions_are_not_heard(service: SessionService, session: Session) -> None:
    for user, id in (("ann", "t"), ("bob", "s")):
        other = await service.create_session(app_name=session.app_name, user_id=user, session_id=id)
        await append(service, other, "other")
    await append(service, session, "own")
    async with aclosing(service.watch(session)) as watching:
        assert await next_ids(watching, 1) == ["own"]


# --- how it ends --------------------------------------------------------------------------------


async def test_it_ends_when_the_session_is_deleted(
    service: SessionService, session: Session
) -> None:
    watching = service.watch(session, poll_interval=SOON)
    await append(service, session, "a")
    assert await next_ids(watching, 1) == ["a"]
    await service.delete_session(*of(session).values())
    assert await rest(watching) == []


async def test_a_session_made_anew_is_another_one(
    service: SessionService, session: Session
) -> None:
    watching = service.watch(session, poll_interval=SOON)
    late = service.watch(session)
    await append(service, session, "a")
    assert await next_ids(watching, 1) == ["a"]
    await service.delete_session(*of(session).values())
    again = await service.create_session(**of(session))
    await append(service, again, "new")
    assert await rest(watching) == []
    with pytest.raises(SessionNotFoundError):
        await anext(late)
    async with aclosing(service.watch(again)) as watching:
        assert await next_ids(watching, 1) == ["new"]


async def test_there_must_be_a_session(service: SessionService, session: Session) -> None:
    await service.delete_session(*of(session).values())
    with pytest.raises(SessionNotFoundError):
        await anext(service.watch(session))
    wrong = Session(app_name="a\0", user_id="ann", id="s")
    with pytest.raises(SessionNotFoundError):
        await anext(service.watch(wrong))


async def test_it_ends_with_the_service(service: SessionService, session: Session) -> None:
    await append(service, session, "a")
    async with following(service.watch(session, poll_interval=60)) as seen:
        await until(lambda: seen == ["a"])
        waiting = service.watch(session, poll_interval=60)
        assert await next_ids(waiting, 1) == ["a"]
        await service.close()
    # which would have opened the connections again
    assert await rest(waiting) == []


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), "1", True, None])
async def test_arguments_are_looked_at_by_the_call(interval: Any) -> None:
    service = SessionService("sqlite://")
    session = Session(app_name="a", user_id="ann", id="s")
    with pytest.raises(InvalidInputError) as caught:
        service.watch(session, poll_interval=interval)
    assert caught.value.field == "poll_interval"
    with pytest.raises(InvalidInputError) as caught:
        service.watch(session, after=7)  # type: ignore[arg-type]
    assert caught.value.field == "after"
    with pytest.raises(InvalidInputError) as caught:
        service.watch("s")  # type: ignore[arg-type]
    assert caught.value.field == "session"


async def test_a_damaged_event_is_named_or_stood_in_for(database_url: str, app_name: str) -> None:
    async with (
        SessionService(database_url) as strict,
        SessionService(database_url, on_bad_event="placeholder") as lenient,
    ):
        session = await strict.create_session(app_name=app_name, user_id="ann")
        await append(strict, session, "a", "b")
        async with strict._database.engine.begin() as conn:
            await conn.exec_driver_sql("UPDATE events SET event_data = '{' WHERE id = 'a'")
        with pytest.raises(UnreadableEventError) as caught:
            await anext(strict.watch(session))
        assert caught.value.event_id == "a"
        async with aclosing(lenient.watch(session)) as watching:
            assert await next_ids(watching, 2) == ["a", "b"]


@types.coroutine
def cancelled_at(number: int, step: Any, *, answered: bool) -> Generator[Any, Any, tuple[Any, int]]:
    """An asynchronous generator's step, in a task that is cancelled when it waits so many times.

    With ``answered`` that is when what it waits for is there, and it has not yet been told.
    """
    task = asyncio.current_task()
    assert task is not None
    go_on, value = step.send, None
    for count in itertools.count(1):
        try:
            waiting = go_on(value)
        except StopIteration as done:
            return done.value, count - 1
        if count == number:
            if answered and waiting is not None:
                waiting.add_done_callback(lambda _: task.cancel())
            else:
                asyncio.get_running_loop().call_soon(task.cancel)
        try:
            value = yield waiting
            go_on = step.send
        except BaseException as error:
            go_on, value = step.throw, error
    raise AssertionError("it counts on")


@pytest.mark.parametrize("answered", [False, True])
async def test_nothing_is_held_wherever_it_is_cancelled(
    service: SessionService, session: Session, answered: bool
) -> None:
    await append(service, session, "a")

    async def first(watching: AsyncGenerator[Any, None], number: int) -> Any:
        return await cancelled_at(number, watching.__anext__(), answered=answered)

    for number in itertools.count(1):
        watching = service.watch(session)
        task = asyncio.ensure_future(first(watching, number))
        await asyncio.wait([task])
        # one connection is all there is
        assert await service.get_session(**of(session)) is not None
        if not task.cancelled():
            break
        assert service._bells._bells == set()
    found, awaits = task.result()
    assert found.id == "a"
    # it has been cancelled at each of them before
    assert 0 < awaits < number
    # it may be dropped as well as closed
    if answered:
        await watching.aclose()
        assert service._bells._bells == set()
    else:
        del watching, task
        await until(lambda: service._bells._bells == set())
    await until(lambda: in_use(service) == 0)


# --- several processes --------------------------------------------------------------------------

# What several can reach, and notices beside.
PLACES = [*(name for name in BACKENDS if name != "sqlite-memory"), "notify"]


def place(
    name: str, request: pytest.FixtureRequest, migrated_database: Callable[[str], str]
) -> tuple[str, dict[str, Any]]:
    """Its URL and the service's options; where notices are told nobody else listens."""
    if name == "notify":
        return migrated_database("postgresql"), {"notify": True}
    return place_of(name, request, migrated_database)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


def appending(app_name: str, session: Session, count: int, **more: Any) -> list[Any]:
    every = {"app": app_name, "user": "ann", "sessions": [session.id], "appends": count, **more}
    return [{**every, "writer": f"w{n}"} for n in range(2)]


async def assert_all_seen(
    service: SessionService, session: Session, seen: list[str], least: int
) -> None:
    stored = [e.id for e in (await load(service, session.app_name, "ann", session.id)).events]
    assert len(stored) >= least
    await until(lambda: len(seen) >= len(stored))
    assert seen == stored


@pytest.mark.parametrize("name", PLACES)
async def test_each_event_of_several_processes_comes_once_and_in_order(
    name: str, crew: Crew, request: pytest.FixtureRequest, app_name: str,
    migrated_database: Callable[[str], str],
) -> None:  # fmt: skip
    url, options = place(name, request, migrated_database)
    await asyncio.to_thread(crew.open, url, **options)
    async with SessionService(url, **options) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        async with (
            following(service.watch(session, poll_interval=SOON)) as seen,
            following(service.watch(session, poll_interval=0.2)) as seen_late,
        ):
            await asyncio.to_thread(crew.run, "share", appending(app_name, session, 40))
            await assert_all_seen(service, session, seen, 80)
            await assert_all_seen(service, session, seen_late, 80)
    await asyncio.to_thread(crew.close)


# --- several event loops ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mariadb", "notify"])
async def test_threads_with_loops_of_their_own_watch_through_one_service(
    name: str, app_name: str, request: pytest.FixtureRequest,
    migrated_database: Callable[[str], str],
) -> None:  # fmt: skip
    url, options = place(name, request, migrated_database)
    # where notices come nothing else is to wake the watchers
    interval = 600 if options else SOON
    ids = [f"e{n}" for n in range(30)]
    seen: list[list[str]] = [[], []]
    async with SessionService(url, **options) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")

        async def follow(mine: list[str]) -> None:
            async with aclosing(service.watch(session, poll_interval=interval)) as watching:
                mine += await next_ids(watching, 10)
                mine += await next_ids(watching, 20)

        threads = [
            asyncio.ensure_future(asyncio.to_thread(asyncio.run, follow(mine))) for mine in seen
        ]
        try:
            await append(service, session, *ids[:10])
            await until(lambda: seen == 2 * [ids[:10]])
            if options:
                async with asyncio.timeout(PATIENCE):
                    while len(await listeners(url)) < 2:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
            async with SessionService(url, **options) as other:
                await append(other, session, *ids[10:])
        finally:
            await asyncio.gather(*threads)
        assert seen == 2 * [ids]
        if options:
            await until_nobody_listens(url)


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mariadb", "notify"])
async def test_closing_the_service_ends_watchers_in_other_threads(
    name: str, app_name: str, request: pytest.FixtureRequest,
    migrated_database: Callable[[str], str],
) -> None:  # fmt: skip
    url, options = place(name, request, migrated_database)
    service = SessionService(url, **options)
    session = await service.create_session(app_name=app_name, user_id="ann")
    seen: list[str] = []

    async def follow() -> None:
        async with aclosing(service.watch(session, poll_interval=SOON)) as watching:
            async for one in watching:
                seen.append(one.id)

    for turn in range(1, 6 if SOAK else 4):
        threads = [asyncio.ensure_future(asyncio.to_thread(asyncio.run, follow())) for _ in "ab"]
        await append(service, session, f"e{turn}")
        await until(lambda: len(seen) == 2 * turn)  # noqa: B023
        await service.close()
        await asyncio.wait_for(asyncio.gather(*threads), PATIENCE)
        session = await load(service, app_name, "ann", session.id)
    await service.close()
    # a loop that ends while a connection of it is being closed leaves the socket to the collector,
    # which says so: here, and not in whatever test it next looks around in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


# --- a database that goes away ------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal() -> Iterator[tuple[Postgres, str]]:
    """A server of one's own, which is killed, and a database on it."""
    with ExitStack() as stack:
        with _or_skip() as found:
            server = found.enter_context(run_postgres(durable=True))
            stack.push(found.pop_all())
        if server.child is None:
            pytest.skip("this server was not started by the tests: they do not stop it")
        url = server.create_database("watched")
        asyncio.run(migrate.upgrade(url))
        yield server, url


@pytest.mark.parametrize("notify", [False, True])
async def test_nothing_is_lost_over_a_restart(
    notify: bool, crew: Crew, mortal: tuple[Postgres, str], app_name: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    server, url = mortal
    stop = tmp_path / "stop"
    await asyncio.to_thread(crew.open, url, notify=notify, retry_window=120)

    def warned() -> int:
        return sum("watched" in record.getMessage() for record in caplog.records)

    # as little patience as there is: what waits is the watcher
    async with (
        SessionService(url, retry_window=0, notify=notify) as service,
        SessionService(url) as reader,
    ):
        session = await service.create_session(app_name=app_name, user_id="ann")
        async with following(service.watch(session, poll_interval=0.1)) as seen:
            work = [("share", job) for job in appending(app_name, session, 1, stop=str(stop))]
            jobs = asyncio.ensure_future(asyncio.to_thread(crew.run_all, work, patience=150))
            for restart in (server.restart, server.kill):
                before = len(seen)
                await until(lambda before=before: len(seen) >= before + 20)  # type: ignore[misc]
                told = warned()
                await asyncio.to_thread(restart)
                if restart == server.kill:
                    await until(lambda told=told: warned() > told)  # type: ignore[misc]
                    await asyncio.to_thread(server.start)
            before = len(seen)
            await until(lambda: len(seen) >= before + 20)
            stop.touch()
            await jobs
            await assert_all_seen(reader, session, seen, 60)
    await asyncio.to_thread(crew.close)
    assert warned() <= 10
    assert app_name not in caplog.text


async def test_a_server_that_was_never_there_is_not_waited_for() -> None:
    async with SessionService("postgresql://ann@127.0.0.1:1/x", migrate="off") as service:
        session = Session(app_name="a", user_id="ann", id="s")
        with pytest.raises(DatabaseError):
            await asyncio.wait_for(anext(service.watch(session)), PATIENCE)


async def test_a_fault_that_stays_is_raised(postgres_url: str, app_name: str) -> None:
    async with SessionService(postgres_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        async with following(service.watch(session, poll_interval=SOON)) as seen:
            await append(service, session, "a")
            await until(lambda: seen == ["a"])
    async with SessionService(postgres_url, migrate="off", table_prefix="no_") as service:
        await service.ping()
        with pytest.raises(DatabaseError) as caught:
            await anext(service.watch(session))
        assert not caught.value.retryable


# --- a copy that lags ---------------------------------------------------------------------------


async def test_a_replica_that_lags_delays_and_ends_nothing(
    postgres_url: str, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SessionService(postgres_url, read_url=postgres_url) as service:
        replica = service._replica
        assert replica is not None
        read, asked, lags = replica.read, 0, True

        async def lagging(work: Any, otherwise: Any) -> Any:
            nonlocal asked
            asked += 1
            return None if lags else await read(work, otherwise)

        monkeypatch.setattr(replica, "read", lagging)
        session = await service.create_session(app_name=app_name, user_id="ann")
        async with following(service.watch(session, poll_interval=SOON)) as seen:
            await append(service, session, "a")
            await until(lambda: seen == ["a"] and asked > 2)
            lags, asked = False, 0
            await append(service, session, "b")
            await until(lambda: seen == ["a", "b"] and asked > 2)
            await service.delete_session(*of(session).values())
            await until(lambda: not service._bells._bells)


# --- notices ------------------------------------------------------------------------------------


@pytest.fixture
async def telling(
    migrated_database: Callable[[str], str],
) -> AsyncIterator[tuple[SessionService, SessionService, str]]:
    url = migrated_database("postgresql")
    async with (
        SessionService(url, notify=True, pool_size=2) as one,
        SessionService(url, notify=True) as other,
    ):
        yield one, other, url


async def listeners(url: str) -> list[int]:
    """Process ids of the connections of a database that listen."""
    conn = await asyncpg.connect(url)
    try:
        query = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND query LIKE 'LISTEN %'"
        )
        return [row["pid"] for row in await conn.fetch(query)]
    finally:
        await conn.close()


async def until_listening(url: str, but: int = 0) -> int:
    async with asyncio.timeout(PATIENCE):
        while True:
            found = [pid for pid in await listeners(url) if pid != but]
            if found:
                assert len(found) == 1
                return found[0]
            await asyncio.sleep(0.02)


async def until_nobody_listens(url: str) -> None:
    """The server's end of a connection goes a moment after the client's."""
    async with asyncio.timeout(PATIENCE):
        while await listeners(url):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_notice_wakes_at_once(
    telling: tuple[SessionService, SessionService, str], app_name: str
) -> None:
    one, other, url = telling
    session = await one.create_session(app_name=app_name, user_id="ann")
    second = await one.create_session(app_name=app_name, user_id="bob")
    async with (
        following(one.watch(session, poll_interval=600)) as seen,
        following(one.watch(session, poll_interval=600)) as again,
        following(one.watch(second, poll_interval=600)) as nothing,
    ):
        await until_listening(url)
        await asyncio.sleep(0.2)
        # nothing else wakes them within ten minutes
        await append(other, session, *"abc")
        await until(lambda: seen == again == list("abc"))
        own = await load(other, app_name, "ann", session.id)
        await other.append_events(own, [event(id, {}) for id in "def"])
        await until(lambda: seen == again == list("abcdef"))
        assert nothing == []
        # the pool has nothing to do with it, once the watchers have looked
        await until(lambda: in_use(one) == 0)
        [pid] = await listeners(url)
        # the connection that listens breaks: what is appended meanwhile comes all the same
        conn = await asyncpg.connect(url)
        await conn.execute("SELECT pg_terminate_backend($1)", pid)
        await conn.close()
        await append(other, session, "g")
        await until(lambda: seen == again == list("abcdefg"))
        assert await until_listening(url, but=pid) != pid
        await asyncio.sleep(0.2)
        await append(other, session, "h")
        await until(lambda: seen == again == list("abcdefgh"))
    await until_nobody_listens(url)


async def test_closing_the_service_closes_what_listens(
    telling: tuple[SessionService, SessionService, str], app_name: str
) -> None:
    one, other, url = telling
    session = await one.create_session(app_name=app_name, user_id="ann")
    await append(other, session, "a")
    watching = one.watch(session)
    assert await next_ids(watching, 1) == ["a"]
    await until_listening(url)
    await one.close()
    await until_nobody_listens(url)
    assert await rest(watching) == []


async def test_what_nobody_tells_is_found_by_the_safety_net(
    telling: tuple[SessionService, SessionService, str],
    app_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "SAFETY", 0.3)
    one, _, url = telling
    async with SessionService(url) as silent:
        session = await one.create_session(app_name=app_name, user_id="ann")
        async with following(one.watch(session, poll_interval=SOON)) as seen:
            await until_listening(url)
            await append(silent, session, "a")
            await until(lambda: seen == ["a"])


async def test_a_notice_says_nothing_of_what_is_stored(
    telling: tuple[SessionService, SessionService, str], app_name: str
) -> None:
    one, _, url = telling
    heard: list[str] = []
    conn = await asyncpg.connect(url)
    await conn.add_listener(channel_of(one.models), lambda *told: heard.append(told[-1]))
    session = await one.create_session(app_name=app_name, user_id="ann")
    await one.append_event(session, event("a", {"app:a": 1, "user:a": 1, "a": 1}))
    await one.append_events(session, [event(id, {}) for id in "bcd"])
    await until(lambda: len(heard) == 2)
    await conn.remove_listener(channel_of(one.models), lambda *told: None)
    await conn.close()
    assert set(heard) == {notice_of(Key(app_name, "ann", session.id))}
    assert len(heard[0]) == 32
    assert len(channel_of(models("x" * 60, "p" * 30))) < 63


async def test_an_append_that_is_refused_tells_nothing(
    telling: tuple[SessionService, SessionService, str], app_name: str
) -> None:
    one, other, url = telling
    session = await one.create_session(app_name=app_name, user_id="ann")
    stale = await load(other, app_name, "ann", session.id)
    first = event("a", {})
    await one.append_event(session, first)
    heard: list[str] = []
    conn = await asyncpg.connect(url)
    await conn.add_listener(channel_of(one.models), lambda *told: heard.append(told[-1]))
    with pytest.raises(ValueError):
        await other.append_event(stale, event("b", {}))
    await one.append_event(session, first.model_copy())  # again
    await one.append_event(session, event("c", {}))
    await until(lambda: heard != [])
    await conn.close()
    assert len(heard) == 1


async def test_without_it_the_statements_are_what_they_were(postgres_url: str) -> None:
    service, telling = SessionService(postgres_url), SessionService(postgres_url, notify=True)
    for number in (0, 1, 8, 23, 30, 63):
        shape = [bool(number >> bit & 1) for bit in range(6)]
        plain, more = (
            str(one._statements._append(*shape).compile(one._database.engine.sync_engine))
            for one in (service, telling)
        )
        assert "pg_notify" not in plain
        assert plain == re.sub(r", pg_notify\([^()]*\) AS \w+", "", more)


async def test_notices_need_a_server_that_sends_them(postgres_url: str) -> None:
    for url, options in (
        ("sqlite://", {}),
        ("mysql://ann@127.0.0.1/x", {}),
        (postgres_url, {"backend": "generic"}),
        (postgres_url, {"pooler": "transaction"}),
        (f"{postgres_url}?pgbouncer=true", {}),
    ):
        with pytest.raises(ConfigurationError):
            SessionService(url, notify=True, **options)
    with pytest.raises(ConfigurationError):
        SessionService(postgres_url, notify="yes")  # type: ignore[arg-type]
    async with engine_for(postgres_url, poolclass=StaticPool) as engine:
        with pytest.raises(ConfigurationError):
            SessionService(engine=engine, notify=True)
    async with engine_for("sqlite://") as engine:
        with pytest.raises(ConfigurationError):
            SessionService(engine=engine, notify=True)


async def test_an_engine_of_the_applications_may_tell_too(
    postgres_url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        engine_for(postgres_url, pool_size=1, max_overflow=0) as engine,
        SessionService(engine=engine, notify=True) as service,
    ):
        session = await service.create_session(app_name=app_name, user_id="ann")
        async with following(service.watch(session, poll_interval=600)) as seen:
            await until(lambda: any(bell.listening for bell in service._bells._bells))
            await append(service, session, "a")
            await until(lambda: seen == ["a"])
        assert engine.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


# --- google-adk's types -------------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_the_binding_to_google_adk_watches_too(database_url: str, app_name: str) -> None:
    adk = pytest.importorskip("adk_sessions.adk")
    events = pytest.importorskip("google.adk.events.event")
    async with adk.DatabaseSessionService(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        watching = service.watch(session, poll_interval=SOON)
        own = await service.get_session(app_name=app_name, user_id="ann", session_id=session.id)
        appended = [events.Event(author="user", invocation_id=id) for id in "ab"]
        for one in appended:
            await service.append_event(own, one)
        async with aclosing(watching):
            assert [await anext(watching) for _ in "ab"] == own.events == appended
        with pytest.raises(service.not_found):
            await anext(service.watch(service.session_type(app_name="a", user_id="b", id="c")))
