"""The service itself: construction, engine options, probes, filters, round trips, what leaks."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sqlite3
import uuid
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from engines import engine_for
from servers import free_port
from sqlalchemy import event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from adk_sessions import (
    AlreadyExistsError,
    ConfigurationError,
    DatabaseError,
    Event,
    EventActions,
    GetSessionConfig,
    InvalidInputError,
    Session,
    SessionService,
    SessionStoreError,
    StaleSessionError,
    Store,
)

SECRET = "the-payload-of-ann"
every_kind = pytest.mark.parametrize(
    "database_url", ["sqlite", "postgresql", "mariadb"], indirect=True
)
on_servers = pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)


def appending(n: int, **delta: Any) -> Event:
    return Event(
        invocation_id="i", author="user", content=n, actions=EventActions(state_delta=delta)
    )


# Construction


@pytest.mark.parametrize("arguments", [{}, {"url": None}, {"url": None, "engine": None}])
def test_neither_url_nor_engine(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Exactly one of 'url' or 'engine'"):
        SessionService(**arguments)


async def test_both_url_and_engine(tmp_path: Path) -> None:
    async with engine_for(f"sqlite:///{tmp_path}/a.db") as engine:
        with pytest.raises(ConfigurationError, match="Exactly one of 'url' or 'engine'"):
            SessionService(f"sqlite:///{tmp_path}/a.db", engine=engine)
        with pytest.raises(ConfigurationError, match="max_overflow, pool_size: options are for"):
            SessionService(engine=engine, pool_size=3, max_overflow=1)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "Invalid database URL"),
        ("chats.db", "Invalid database URL"),
        ("nonsense://x", "Invalid database URL"),
        ("postgresql+psycopg2://ann:secret@h/d", "synchronous"),
        ("sqlite+pysqlite:///x.db", "synchronous"),
        ("postgresql://ann:secret@h/d?no_such=1", "no_such"),
    ],
)
def test_urls_that_cannot_be_used(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        SessionService(url)
    assert isinstance(caught.value, ValueError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://h/d", "mysql://h/d", "sqlite:///x.db"])
def test_an_option_that_the_engine_does_not_know(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="no_such_option"):
        SessionService(url, no_such_option=1)


async def test_building_a_service_connects_to_nothing() -> None:
    service = SessionService(f"postgresql://127.0.0.1:{free_port()}/none")
    await service.close()
    await service.close()


def test_a_service_is_a_store_of_the_packages_types() -> None:
    service = SessionService("sqlite://")
    assert isinstance(service, Store)
    assert (service.session_type, service.event_type) == (Session, Event)


# The engine and its options


async def test_pool_options_reach_the_engine() -> None:
    service = SessionService(
        "postgresql://h/d", pool_size=3, max_overflow=1, pool_timeout=2.5, pool_recycle=77
    )
    pool: Any = service._database.engine.pool
    assert (pool.size(), pool._max_overflow, pool._timeout, pool._recycle) == (3, 1, 2.5, 77)
    await service.close()


async def test_connect_args_reach_the_server(postgres_url: str, app_name: str) -> None:
    arguments = {"server_settings": {"application_name": app_name}}
    async with SessionService(postgres_url, connect_args=arguments) as service:
        await service.create_session(app_name=app_name, user_id="u")
        async with engine_for(postgres_url) as engine, engine.connect() as conn:
            query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
            assert (await conn.execute(query, {"name": app_name})).scalar() == 1


@on_servers
async def test_a_full_pool_says_so_in_time(database_url: str, app_name: str) -> None:
    service = SessionService(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    async with service:
        await service.prepare_tables()
        async with service._database.engine.connect():
            async with asyncio.timeout(25):  # less than the default
                with pytest.raises(DatabaseError, match="pool_size") as caught:
                    await service.get_app_state(app_name=app_name)
            assert caught.value.retryable
        assert await service.get_app_state(app_name=app_name) == {}


async def test_a_small_pool_serves_many_tasks(postgres_url: str, app_name: str) -> None:
    async def work(n: int) -> None:
        session = await service.create_session(app_name=app_name, user_id="u")
        await service.append_event(session, appending(n, **{f"app:{n}": n}))

    async with SessionService(postgres_url, pool_size=2, max_overflow=0) as service:
        await asyncio.gather(*map(work, range(20)))
        assert await service.get_app_state(app_name=app_name) == {str(n): n for n in range(20)}


async def every_operation(service: SessionService, app_name: str) -> None:
    """All that the service can do, what it refuses included."""
    ids = {"app_name": app_name, "user_id": "u", "session_id": uuid.uuid4().hex}
    session = await service.create_session(**ids, state={"a": 1, "app:b": 2, "user:c": 3})
    stale = session.model_copy(deep=True)
    await service.append_event(session, appending(1, a=2))
    for error, call in (
        (AlreadyExistsError, lambda: service.create_session(**ids)),
        (StaleSessionError, lambda: service.append_event(stale, appending(2))),
        (InvalidInputError, lambda: service.append_event(session, Event(timestamp=math.nan))),
        (InvalidInputError, lambda: service.create_session(app_name="\0", user_id="u")),
    ):
        with pytest.raises(error):
            await call()
    await service.get_session(**ids)
    await service.get_session(**ids, num_recent_events=1, after_timestamp=1.0)
    await service.list_sessions(app_name=app_name)
    await service.list_sessions(app_name=app_name, user_id="u")
    await service.get_user_state(app_name=app_name, user_id="u")
    await service.get_app_state(app_name=app_name)
    await service.ping()
    await service.flush()
    await service.delete_session(app_name, "u", session.id)


@on_servers
async def test_nothing_is_checked_out_afterwards(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service:
        pool: Any = service._database.engine.pool
        await every_operation(service, app_name)
        assert (pool.checkedout(), pool.checkedin()) == (0, 1)
        await asyncio.gather(*(every_operation(service, app_name) for _ in range(4)))
        assert pool.checkedout() == 0
        task = asyncio.create_task(every_operation(service, app_name))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.checkedout() == 0
        await every_operation(service, app_name)


def hooks(engine: AsyncEngine) -> dict[str, int]:
    """How many listeners each event of an engine, its pool and its dialect has."""
    sync = engine.sync_engine
    return {
        f"{owner} {name}": len(getattr(target.dispatch, name))
        for owner, target in (("engine", sync), ("pool", sync.pool), ("dialect", sync.dialect))
        for name in target.dispatch._event_names
    }


@on_servers
async def test_an_applications_engine_stays_as_it_was(database_url: str, app_name: str) -> None:
    table = f"t_{uuid.uuid4().hex[:16]}"
    async with engine_for(database_url) as engine:
        async with engine.begin() as conn:
            await conn.execute(text(f"CREATE TABLE {table} (i INT)"))
            before = await conn.get_isolation_level()
        listeners, options = hooks(engine), dict(engine.get_execution_options())
        pool: Any = engine.pool
        async with SessionService(engine=engine) as service:
            await every_operation(service, app_name)
        assert engine.pool is pool
        assert (pool.checkedin(), pool.checkedout()) == (1, 0)  # `close` has left it open
        assert hooks(engine) == listeners
        assert dict(engine.get_execution_options()) == options
        async with engine.connect() as conn:
            assert await conn.get_isolation_level() == before
            await conn.execute(text(f"INSERT INTO {table} VALUES (1)"))
            await conn.rollback()  # a transaction, not autocommit
            assert (await conn.execute(text(f"SELECT count(*) FROM {table}"))).scalar() == 0
        assert await service.get_app_state(app_name=app_name) == {"b": 2}


async def test_an_engine_made_from_a_url_is_closed(postgres_url: str, app_name: str) -> None:
    arguments = {"server_settings": {"application_name": app_name}}
    service = SessionService(postgres_url, connect_args=arguments)
    async with engine_for(postgres_url) as engine, engine.connect() as conn:
        query = text("SELECT pid FROM pg_stat_activity WHERE application_name = :name")

        async def connections() -> int:
            await conn.rollback()  # the statistics are of the transaction's start
            return len((await conn.execute(query, {"name": app_name})).all())

        await service.prepare_tables()
        assert await connections() == 1
        await service.close()
        async with asyncio.timeout(60):
            # a backend ends a moment after its connection
            while await connections():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await service.create_session(app_name=app_name, user_id="u")
        assert await connections() == 1
        await service.close()


# Life cycle


@every_kind
async def test_a_service_may_be_used_after_close(database_url: str, app_name: str) -> None:
    service = SessionService(database_url)
    async with service as entered:
        assert entered is service
        session = await service.create_session(app_name=app_name, user_id="u")
    await service.append_event(session, appending(1))
    await service.close()
    found = await service.get_session(app_name=app_name, user_id="u", session_id=session.id)
    assert found == session
    await service.close()


async def test_leaving_the_block_with_an_error_closes_and_passes_it_on(tmp_path: Path) -> None:
    service = SessionService(f"sqlite:///{tmp_path}/a.db")

    async def fail() -> None:
        async with service:
            await service.prepare_tables()
            assert (tmp_path / "a.db-wal").exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert not (tmp_path / "a.db-wal").exists()  # the last connection takes it away


@every_kind
async def test_flush_has_nothing_to_do(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="u")
        await service.append_event(session, appending(1))
        async with SessionService(database_url) as other:  # stored before any flush
            ids = {"app_name": app_name, "user_id": "u", "session_id": session.id}
            assert await other.get_session(**ids) == session
        assert await service.flush() is None  # type: ignore[func-returns-value]


@on_servers
def test_two_event_loops_one_after_another(database_url: str, app_name: str) -> None:
    service = SessionService(database_url)

    async def work(n: int) -> int:
        session = await service.create_session(app_name=app_name, user_id="u")
        await service.append_event(session, appending(n))
        await service.close()  # a driver's connections belong to their loop
        return len((await service.list_sessions(app_name=app_name)).sessions)

    async def work_and_close(n: int) -> int:
        try:
            return await work(n)
        finally:
            await service.close()

    assert [asyncio.run(work_and_close(n)) for n in range(2)] == [1, 2]


# ping


@every_kind
async def test_ping(database_url: str) -> None:
    async with SessionService(database_url) as service:
        assert await service.ping() is None  # type: ignore[func-returns-value]
        assert await service.ping(timeout=30) is None  # type: ignore[func-returns-value]


async def test_ping_needs_no_tables(fresh_database: Callable[[str], str]) -> None:
    url = fresh_database("postgresql")
    async with SessionService(url) as service:
        await service.ping()
        async with service._database.engine.connect() as conn:
            query = text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
            assert (await conn.execute(query)).scalar() == 0


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
async def test_ping_of_a_closed_port(scheme: str) -> None:
    async with SessionService(f"{scheme}://u@127.0.0.1:{free_port()}/d") as service:
        async with asyncio.timeout(60):
            with pytest.raises(DatabaseError) as caught:
                await service.ping(timeout=30)
        assert caught.value.retryable


class Mute:
    """A server's port that forwards until it is told to say nothing more."""

    def __init__(self, url: str | None = None) -> None:
        self._target = make_url(url) if url else None
        self._tasks: set[asyncio.Task[None]] = set()
        self.silent = self._target is None

    async def __aenter__(self) -> Mute:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            if self._target is None:
                await self._pump(reader, None)
                return
            other, there = await asyncio.open_connection(self._target.host, self._target.port)
            ends.append(there)
            await asyncio.gather(self._pump(reader, there), self._pump(other, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in ends:
                end.close()
                with suppress(OSError):
                    await end.wait_closed()

    async def _pump(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter | None) -> None:
        while data := await reader.read(65_536):
            if to is not None and not self.silent:
                to.write(data)
        if to is not None:
            to.close()


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
async def test_ping_of_a_server_that_never_answers(scheme: str) -> None:
    async with Mute() as mute, SessionService(f"{scheme}://u@127.0.0.1:{mute.port}/d") as service:
        async with asyncio.timeout(60):
            with pytest.raises(DatabaseError, match=r"did not answer in 0\.2 seconds") as caught:
                await service.ping(timeout=0.2)
        assert caught.value.retryable
        assert caught.value.__context__ is None


@on_servers
async def test_ping_of_a_server_that_falls_silent(database_url: str) -> None:
    async with Mute(database_url) as mute:
        url = make_url(database_url).set(host="127.0.0.1", port=mute.port)
        service = SessionService(url)
        await service.ping()
        mute.silent = True
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.timeout(60):
            with pytest.raises(DatabaseError, match=r"did not answer in 0\.3 seconds"):
                await service.ping(timeout=0.3)
        took = loop.time() - start
        mute.silent = False
        await service.ping()  # over a connection of its own
        await service.close()
        assert took < 20


async def test_ping_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with SessionService(f"sqlite:///{path}") as service:
        await service.prepare_tables()
        with closing(sqlite3.connect(path, isolation_level=None)) as raw:
            raw.execute("BEGIN EXCLUSIVE")
            await service.ping(timeout=9)


# Reading


@every_kind
async def test_filters_by_argument_and_by_config(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="u")
        for n in range(5):
            await service.append_event(session, Event(content=n, timestamp=1000.0 + n))
        ids = {"app_name": app_name, "user_id": "u", "session_id": session.id}

        async def contents(**filters: Any) -> list[Any]:
            found = await service.get_session(**ids, **filters)
            assert found is not None
            return [event.content for event in found.events]

        cases: list[tuple[dict[str, Any], list[int]]] = [
            ({}, [0, 1, 2, 3, 4]),
            ({"num_recent_events": 2}, [3, 4]),
            ({"num_recent_events": 0}, []),
            ({"num_recent_events": 99}, [0, 1, 2, 3, 4]),
            ({"after_timestamp": 1003.0}, [3, 4]),
            ({"after_timestamp": 1002.5}, [3, 4]),
            ({"after_timestamp": 0.0}, [0, 1, 2, 3, 4]),
            ({"after_timestamp": -5.0}, [0, 1, 2, 3, 4]),
            ({"after_timestamp": math.inf}, []),
            ({"after_timestamp": -math.inf}, [0, 1, 2, 3, 4]),
            ({"after_timestamp": 1e300}, []),
            ({"num_recent_events": 1, "after_timestamp": 1001.0}, [4]),
            ({"num_recent_events": 9, "after_timestamp": 1003.0}, [3, 4]),
        ]
        for filters, expected in cases:
            assert await contents(**filters) == expected, filters
            assert await contents(config=GetSessionConfig(**filters)) == expected, filters
        # the object wins, as its fields are all that google-adk passes
        config = GetSessionConfig(num_recent_events=1)
        assert await contents(config=config, num_recent_events=3) == [4]


@pytest.mark.parametrize(
    ("filters", "field"),
    [
        ({"num_recent_events": -1}, "num_recent_events"),
        ({"after_timestamp": math.nan}, "after_timestamp"),
        ({"config": GetSessionConfig(after_timestamp=math.nan)}, "after_timestamp"),
        ({"config": GetSessionConfig.model_construct(num_recent_events=-1)}, "num_recent_events"),
    ],
)
async def test_filters_that_make_no_sense(filters: dict[str, Any], field: str) -> None:
    async with SessionService("sqlite://") as service:
        with pytest.raises(InvalidInputError) as caught:
            await service.get_session(app_name="a", user_id="u", session_id="s", **filters)
        assert caught.value.field == field


@pytest.mark.parametrize("bad", ["x" * 129, "a\0b", "\ud800"], ids=["long", "nul", "surrogate"])
@every_kind
async def test_reading_with_an_impossible_id_finds_nothing(
    database_url: str, app_name: str, bad: str
) -> None:
    async with SessionService(database_url) as service:
        await service.create_session(app_name=app_name, user_id="u", session_id="s")
        good = {"app_name": app_name, "user_id": "u", "session_id": "s"}
        for field in good:
            assert await service.get_session(**{**good, field: bad}) is None
            await service.delete_session(**{**good, field: bad})
        assert (await service.list_sessions(app_name=bad)).sessions == []
        assert (await service.list_sessions(app_name=app_name, user_id=bad)).sessions == []
        assert await service.get_user_state(app_name=bad, user_id="u") == {}
        assert await service.get_user_state(app_name=app_name, user_id=bad) == {}
        assert await service.get_app_state(app_name=bad) == {}
        assert await service.get_session(**good) is not None


@pytest.mark.parametrize("wrong", [None, 7, b"s"])
async def test_an_id_that_is_no_text_is_an_error(wrong: Any) -> None:
    async with SessionService("sqlite://") as service:
        with pytest.raises(InvalidInputError):
            await service.get_session(app_name="a", user_id="u", session_id=wrong)
        with pytest.raises(InvalidInputError):
            await service.get_app_state(app_name=wrong)


# Round trips


OPERATIONS: dict[str, Callable[[SessionService, Session], Awaitable[Any]]] = {
    "create": lambda s, x: s.create_session(app_name=x.app_name, user_id="u"),
    "create, first of its app": lambda s, x: s.create_session(
        app_name=x.app_name + "2", user_id="v"
    ),
    "create with state": lambda s, x: s.create_session(
        app_name=x.app_name, user_id="u", state={"a": 1, "app:b": 2, "user:c": 3}
    ),
    **{
        f"append {'+'.join(delta) or 'nothing'}": lambda s, x, d=delta: s.append_event(
            x, appending(1, **dict.fromkeys(d, 1))
        )
        for delta in (
            (),
            ("a",),
            ("app:a",),
            ("user:a",),
            ("a", "app:a"),
            ("a", "user:a"),
            ("app:a", "user:a"),
            ("a", "app:a", "user:a", "temp:a"),
        )
    },
    "append what needs its exact form": lambda s, x: s.append_event(x, Event(content="a\0b")),
    **{
        f"get {filters}": lambda s, x, f=filters: s.get_session(
            app_name=x.app_name, user_id="u", session_id=x.id, **f
        )
        for filters in (
            {},
            {"num_recent_events": 0},
            {"num_recent_events": 1},
            {"num_recent_events": 9},
            {"after_timestamp": 1.0},
            {"after_timestamp": 4e9},
            {"num_recent_events": 2, "after_timestamp": 1.0},
        )
    },
    "get what is not there": lambda s, x: s.get_session(
        app_name=x.app_name, user_id="u", session_id="none"
    ),
    "list an app": lambda s, x: s.list_sessions(app_name=x.app_name),
    "list a user": lambda s, x: s.list_sessions(app_name=x.app_name, user_id="u"),
    "user state": lambda s, x: s.get_user_state(app_name=x.app_name, user_id="u"),
    "app state": lambda s, x: s.get_app_state(app_name=x.app_name),
    "ping": lambda s, x: s.ping(),
    "delete": lambda s, x: s.delete_session(x.app_name, "u", x.id),
    "delete what is not there": lambda s, x: s.delete_session(x.app_name, "u", "none"),
}


async def test_one_statement_for_each_call_on_postgresql(postgres_url: str, app_name: str) -> None:
    statements: list[str] = []
    async with engine_for(postgres_url) as engine:

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def count(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        service = SessionService(engine=engine)
        session = await service.create_session(app_name=app_name, user_id="u")
        for n in range(3):
            await service.append_event(session, appending(n))
        counts = {}
        for name, call in OPERATIONS.items():
            statements.clear()
            await call(service, session)
            counts[name] = len(statements)
        assert counts == dict.fromkeys(OPERATIONS, 1)


async def test_no_transaction_is_opened_around_them(postgres_url: str, app_name: str) -> None:
    async with SessionService(postgres_url) as service:
        engine = service._database.engine
        begun: list[str] = []
        session = await service.create_session(app_name=app_name, user_id="u")
        async with engine.connect() as conn:
            raw = (await conn.get_raw_connection()).driver_connection
            raw.add_query_logger(lambda record: begun.append(record.query.split()[0]))
        for call in OPERATIONS.values():
            await call(service, session)
        assert begun == []  # the statements themselves are prepared, and not logged
        async with engine.begin() as conn:
            await conn.execute(text("SELECT 1"))
        assert begun == ["BEGIN", "COMMIT;"]


# What leaks


SPOILED: dict[str, str] = {
    "another type": json.dumps({"id": SECRET, "timestamp": SECRET}),
    "a list": json.dumps([SECRET]),
    "text": json.dumps(SECRET),
    "a bad action": json.dumps({"actions": SECRET}),
}


@pytest.mark.parametrize("data", SPOILED.values(), ids=SPOILED)
@every_kind
async def test_an_unreadable_event_is_named_but_not_quoted(
    database_url: str, app_name: str, data: str
) -> None:
    async with SessionService(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="u")
        spoiled = f"spoiled-{uuid.uuid4()}"
        await service.append_event(session, Event(id=spoiled, content=SECRET))
        async with service._database.engine.begin() as conn:
            value = "CAST(:data AS JSONB)" if database_url.startswith("postgresql") else ":data"
            await conn.execute(
                text(f"UPDATE events SET event_data = {value} WHERE id = :id"),
                {"data": data, "id": spoiled},
            )
        ids = {"app_name": app_name, "user_id": "u", "session_id": session.id}
        with pytest.raises(DatabaseError, match=spoiled) as caught:
            await service.get_session(**ids)
        assert not caught.value.retryable
        assert_says_nothing(caught.value)
        # the rest of the session is still there
        found = await service.get_session(**ids, num_recent_events=0)
        assert found is not None
        assert len((await service.list_sessions(app_name=app_name)).sessions) == 1


@pytest.mark.parametrize("state", ["{", "[1]", f'"{SECRET}"', f"{SECRET}"])
async def test_an_unreadable_state_is_a_typed_error(tmp_path: Path, state: str) -> None:
    path = tmp_path / "a.db"
    async with SessionService(f"sqlite:///{path}") as service:
        session = await service.create_session(app_name="a", user_id="u")
        with closing(sqlite3.connect(path)) as raw:
            raw.execute("UPDATE sessions SET state = ?", (state,))
            raw.commit()
        with pytest.raises(DatabaseError) as caught:
            await service.get_session(app_name="a", user_id="u", session_id=session.id)
        assert_says_nothing(caught.value)
        with pytest.raises(DatabaseError):
            await service.list_sessions(app_name="a")


def assert_says_nothing(error: BaseException) -> None:
    """Neither the error nor anything that a logger finds by it quotes what is stored."""
    seen: BaseException | None = error
    while seen is not None:
        assert SECRET not in f"{seen!s}{seen!r}{seen.args}{vars(seen)}"
        seen = seen.__cause__ or seen.__context__


@on_servers
async def test_a_password_is_in_no_log(
    database_url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    password = "the-pass-word-of-ann"
    url = make_url(database_url).set(password=password)
    closed = url.set(port=free_port())
    with caplog.at_level(logging.DEBUG):
        for name in ("sqlalchemy", "sqlalchemy.pool", "sqlalchemy.engine", "adk_sessions"):
            caplog.set_level(logging.DEBUG, logger=name)
        for address in (url, closed, url.set(database="no-such-database")):
            service = SessionService(address.render_as_string(hide_password=False))
            with suppress(SessionStoreError):  # a server without passwords takes any
                await every_operation(service, app_name)
            await service.close()
            assert password not in repr(service._database.engine)
    assert caplog.records
    assert password not in caplog.text
    for record in caplog.records:
        assert password not in f"{record.msg}{record.args}"


async def test_a_payload_is_in_no_log_of_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="adk_sessions"):
        async with SessionService(f"sqlite:///{tmp_path}/a.db") as service:
            session = await service.create_session(
                app_name="a", user_id="u", state={"k": lambda: SECRET, "l": SECRET}
            )
            one = Event(content=SECRET, actions=EventActions(state_delta={"k": object()}))
            await service.append_event(session, one)
    ours = [record for record in caplog.records if record.name.startswith("adk_sessions")]
    assert ours
    assert all(SECRET not in record.getMessage() for record in ours)


# What was stored by somebody else


async def test_a_raw_number_in_a_time_column_of_sqlite_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with SessionService(f"sqlite:///{path}") as service:
        session = await service.create_session(app_name="a", user_id="u")
        await service.append_event(session, Event(content="x", timestamp=1_700_000_000.5))
        with closing(sqlite3.connect(path)) as raw:
            raw.execute("UPDATE events SET timestamp = 1700000000.25")
            raw.commit()
        found = await service.get_session(app_name="a", user_id="u", session_id=session.id)
        assert found is not None
        assert [event.timestamp for event in found.events] == [1_700_000_000.5]


async def test_columns_complete_a_payload_that_lacks_them(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with SessionService(f"sqlite:///{path}") as service:
        session = await service.create_session(app_name="a", user_id="u")
        with closing(sqlite3.connect(path)) as raw:
            moment = datetime(2026, 1, 2, 3, 4, 5, 250_000)
            raw.execute(
                "INSERT INTO events"
                " (id, app_name, user_id, session_id, invocation_id, timestamp, event_data)"
                " VALUES ('e', 'a', 'u', ?, 'i', ?, '{\"content\": 1}')",
                (session.id, str(moment)),
            )
            raw.commit()
        found = await service.get_session(app_name="a", user_id="u", session_id=session.id)
        assert found is not None
        [one] = found.events
        assert (one.id, one.invocation_id, one.content) == ("e", "i", 1)
        assert one.timestamp == 1_767_323_045.25


# What only shows under load, or at a limit


async def test_a_probe_of_a_locked_file_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with SessionService(f"sqlite:///{path}") as service:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("CREATE TABLE t (i)")
            start = asyncio.get_running_loop().time()
            with pytest.raises(DatabaseError, match="did not answer"):
                await service.ping(timeout=0.3)
            assert asyncio.get_running_loop().time() - start < 9  # the busy timeout is 10
            other.execute("ROLLBACK")
        await service.ping()


@every_kind
async def test_listed_sessions_share_nothing(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service:
        for _ in range(2):
            await service.create_session(
                app_name=app_name, user_id="u", state={"app:a": {"n": 1}, "user:b": [1]}
            )
        one, other = (await service.list_sessions(app_name=app_name)).sessions
        one.state["app:a"]["n"] = 2
        one.state["user:b"].append(2)
        assert other.state == {"app:a": {"n": 1}, "user:b": [1]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_recent_events", "3"),
        ("num_recent_events", 1.5),
        ("num_recent_events", -1),
        ("after_timestamp", "x"),
        ("after_timestamp", math.nan),
    ],
)
async def test_a_filter_that_is_no_number(tmp_path: Path, name: str, value: Any) -> None:
    async with SessionService(f"sqlite:///{tmp_path}/a.db") as service:
        with pytest.raises(InvalidInputError) as caught:
            await service.get_session(app_name="a", user_id="u", session_id="s", **{name: value})
        assert caught.value.field == name


@every_kind
async def test_a_state_of_null_is_an_empty_one(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service, engine_for(database_url) as engine:
        session = await service.create_session(app_name=app_name, user_id="u", state={"app:a": 1})
        async with engine.begin() as conn:
            for table in ("sessions", "app_states", "user_states"):
                null = text(f"UPDATE {table} SET state = 'null' WHERE app_name = :app_name")
                await conn.execute(null, {"app_name": app_name})
        delta = {"k": 1, "app:k": 2, "user:k": 3}
        await service.append_event(session, appending(1, **delta))
        again = await service.get_session(app_name=app_name, user_id="u", session_id=session.id)
        assert again is not None
        assert again.state == delta


async def test_what_is_larger_than_a_packet_is_refused(mariadb_url: str, app_name: str) -> None:
    async with engine_for(mariadb_url) as engine, engine.connect() as conn:
        limit: int = (await conn.execute(text("SELECT @@max_allowed_packet"))).scalar_one()
    large = "x" * limit
    async with SessionService(mariadb_url) as service:
        for scope in ("", "user:", "app:"):
            with pytest.raises(InvalidInputError, match="max_allowed_packet") as caught:
                await service.create_session(
                    app_name=app_name, user_id="u", session_id="s", state={f"{scope}k": large}
                )
            assert caught.value.field == "state"
        assert (await service.list_sessions(app_name=app_name)).sessions == []
        session = await service.create_session(app_name=app_name, user_id="u", session_id="s")
        before = session.model_copy(deep=True)
        with pytest.raises(InvalidInputError, match="max_allowed_packet") as caught:
            await service.append_event(session, Event(content=large))
        assert caught.value.field == "event"
        assert session == before
        # each delta fits, what they come to does not
        half = "y" * (limit * 2 // 3)
        await service.append_event(session, appending(1, one=half))
        with pytest.raises(InvalidInputError, match="max_allowed_packet"):
            await service.append_event(session, appending(2, two=half))
        await service.append_event(session, appending(3, one=None))
        again = await service.get_session(app_name=app_name, user_id="u", session_id="s")
        assert again == session


@every_kind
@pytest.mark.parametrize("user_id", [0, False, 1.5, b"u"])
async def test_a_user_id_that_is_no_string(database_url: str, app_name: str, user_id: Any) -> None:
    async with SessionService(database_url) as service:
        await service.create_session(app_name=app_name, user_id="u")
        with pytest.raises(InvalidInputError):
            await service.list_sessions(app_name=app_name, user_id=user_id)
        with pytest.raises(InvalidInputError):
            await service.get_user_state(app_name=app_name, user_id=user_id)


@every_kind
@pytest.mark.parametrize("marker", ["", "x\0", "\ud800", "17", 5])
async def test_a_revision_that_is_none_of_ours_is_stale(
    database_url: str, app_name: str, marker: Any
) -> None:
    async with SessionService(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="u")
        session._storage_update_marker = marker
        session.last_update_time = math.nan
        with pytest.raises(StaleSessionError):
            await service.append_event(session, appending(1))


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ COMMITTED", "REPEATABLE READ"])
@pytest.mark.parametrize("backend", ["auto", "generic"])
async def test_an_engines_isolation_level_loses_nothing(
    level: str, backend: Any, postgres_url: str, app_name: str
) -> None:
    # set when a connection is lent, such an option wins over that of an engine made from it
    options = {"isolation_level": level}
    async with engine_for(postgres_url, execution_options=options) as engine:
        for made in (engine, engine.execution_options(**options)):
            service = SessionService(engine=made, backend=backend)
            ids = {"app_name": app_name, "user_id": "ann"}
            session = await service.create_session(**ids, state={"app:a": 1})
            await service.append_event(session, Event(content="kept"))
            found = await service.get_session(**ids, session_id=session.id)
            assert found == session
            await service.delete_session(app_name, "ann", session.id)
            assert await service.get_session(**ids, session_id=session.id) is None
