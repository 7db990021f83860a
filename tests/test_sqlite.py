"""SQLite files and memory: durability, other processes' locks, forks, what is no database."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import forked
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    Event,
    EventActions,
    SessionService,
    StaleSessionError,
)

IDS = {"app_name": "a", "user_id": "u", "session_id": "s"}
MEMORY = [
    "sqlite://",
    "sqlite:///:memory:",
    "sqlite+aiosqlite://",
    "sqlite+aiosqlite:///:memory:",
    "sqlite:///file::memory:?uri=true",
    "sqlite:///file:chats?mode=memory&uri=true",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


@pytest.fixture
async def service(path: Path) -> AsyncIterator[SessionService]:
    async with SessionService(f"sqlite:///{path}") as service:
        yield service


@pytest.fixture
def raw(path: Path, service: SessionService) -> Iterator[sqlite3.Connection]:
    """Another process's connection to the file of ``service``."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        yield connection


async def pragma(service: SessionService, name: str, *, write: bool) -> Any:
    return await service._database.submit(
        lambda conn: conn.exec_driver_sql(f"PRAGMA {name}").scalar(), write=write
    )


# The connections


@pytest.mark.parametrize("write", [True, False])
async def test_a_file_is_opened_to_keep_what_it_acknowledges(path: Path, write: bool) -> None:
    async with SessionService(f"sqlite:///{path}") as service:
        await service.create_session(app_name="a", user_id="u")
        await service.get_app_state(app_name="a")  # it is a file's mode: seen by the next read
        assert await pragma(service, "journal_mode", write=write) == "wal"
        assert await pragma(service, "synchronous", write=write) == 2
        assert await pragma(service, "foreign_keys", write=write) == 1
        assert await pragma(service, "busy_timeout", write=write) == 10_000


async def test_durability_and_busy_timeout_are_options(path: Path) -> None:
    url = f"sqlite:///{path}"
    options: dict[str, Any] = {"sqlite_synchronous": "NORMAL", "connect_args": {"timeout": 0.25}}
    async with SessionService(url, **options) as service:
        for write in (True, False):
            assert await pragma(service, "synchronous", write=write) == 1
            assert await pragma(service, "busy_timeout", write=write) == 250


@pytest.mark.parametrize("wrong", ["OFF", "full", "normal", 2, None, "FULL; DROP TABLE x"])
def test_durability_is_full_or_normal(path: Path, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="'FULL' or 'NORMAL'"):
        SessionService(f"sqlite:///{path}", sqlite_synchronous=wrong)
    assert not path.exists()


async def test_options_of_a_servers_pool_do_no_harm(path: Path) -> None:
    async with SessionService(
        f"sqlite:///{path}", pool_size=5, max_overflow=2, pool_timeout=1, pool_pre_ping=True
    ) as service:
        await service.create_session(**IDS)


def test_an_unknown_option_is_refused_when_the_service_is_built(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no_such_option"):
        SessionService(f"sqlite:///{path}", no_such_option=1)


async def test_the_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "one" / "two" / "chats.db"
    service = SessionService(f"sqlite:///{path}")
    assert not path.parent.exists()
    async with service:
        await service.create_session(**IDS)
    assert path.is_file()


async def test_a_relative_path_is_of_the_folder_where_the_service_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    async with SessionService("sqlite:///data/chats.db") as service:
        monkeypatch.chdir(tmp_path / "later")
        await service.create_session(**IDS)
    assert (tmp_path / "data" / "chats.db").is_file()
    assert list((tmp_path / "later").iterdir()) == []


# In memory


@pytest.mark.parametrize("url", MEMORY)
async def test_memory_is_safe_under_concurrent_tasks(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def work(n: int) -> None:
        session = await service.create_session(
            app_name="a", user_id="u", state={f"app:create {n}": n}
        )
        delta = EventActions(state_delta={f"app:append {n}": n, "user:last": n})
        await service.append_event(session, Event(actions=delta))
        stored = await service.get_session(app_name="a", user_id="u", session_id=session.id)
        assert stored is not None
        assert stored.events == session.events

    async with SessionService(url) as service:
        await asyncio.gather(*map(work, range(20)))
        state = await service.get_app_state(app_name="a")
        assert state == {f"{what} {n}": n for n in range(20) for what in ("create", "append")}
        assert len((await service.list_sessions(app_name="a")).sessions) == 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", MEMORY)
async def test_memory_is_empty_after_close(url: str) -> None:
    service = SessionService(url)
    for _ in range(2):
        assert await service.get_session(**IDS) is None
        await service.create_session(**IDS)
        assert await service.get_session(**IDS) is not None
        await service.close()


async def test_two_services_in_memory_share_nothing() -> None:
    async with SessionService("sqlite://") as one, SessionService("sqlite://") as other:
        await one.create_session(**IDS)
        assert await other.get_session(**IDS) is None


async def test_a_file_may_be_used_after_close(service: SessionService) -> None:
    created = await service.create_session(**IDS, state={"a": 1})
    await service.close()
    await service.close()
    assert await service.get_session(**IDS) == created
    await service.append_event(created, Event(content="later"))
    assert await service.get_session(**IDS) == created


# Other processes


async def test_a_read_does_not_wait_for_another_processs_write(
    service: SessionService, raw: sqlite3.Connection
) -> None:
    session = await service.create_session(**IDS)
    before = session.model_copy(deep=True)
    raw.execute("BEGIN IMMEDIATE")
    append = asyncio.create_task(service.append_event(session, Event(id="1")))
    async with asyncio.timeout(8):  # less than the busy timeout
        assert await service.get_session(**IDS) == before
        assert len((await service.list_sessions(app_name="a")).sessions) == 1
        assert await service.get_app_state(app_name="a") == {}
        await service.ping()
    assert not append.done()
    raw.execute("ROLLBACK")
    await append
    assert await service.get_session(**IDS) == session
    assert [event.id for event in session.events] == ["1"]


async def test_a_read_sees_only_what_was_committed(
    service: SessionService, raw: sqlite3.Connection
) -> None:
    session = await service.create_session(**IDS, state={"a": 1})
    raw.execute("BEGIN IMMEDIATE")
    raw.execute("UPDATE sessions SET state = '{\"a\": 2}'")
    assert await service.get_session(**IDS) == session
    raw.execute("COMMIT")
    stored = await service.get_session(**IDS)
    assert stored is not None
    assert stored.state == {"a": 2}


async def test_a_lock_held_for_too_long_is_a_retryable_error(
    service: SessionService, raw: sqlite3.Connection, path: Path
) -> None:
    session = await service.create_session(**IDS)
    impatient = SessionService(f"sqlite:///{path}", connect_args={"timeout": 0.1}, retry_window=0.0)
    async with impatient:
        await impatient.prepare_tables()
        raw.execute("BEGIN IMMEDIATE")
        loop = asyncio.get_running_loop()
        for call in (
            lambda: impatient.append_event(session, Event(content="secret")),
            lambda: impatient.create_session(app_name="a", user_id="u"),
            lambda: impatient.delete_session("a", "u", "s"),
        ):
            start = loop.time()
            with pytest.raises(DatabaseError, match="held the file locked") as caught:
                await call()
            assert 0.1 <= loop.time() - start < 5
            assert caught.value.retryable
            assert caught.value.code == sqlite3.SQLITE_BUSY
            assert "secret" not in str(caught.value)
        raw.execute("ROLLBACK")
        await impatient.append_event(session, Event())
        assert await impatient.get_session(**IDS) == session


async def test_a_busy_file_is_tried_again_within_the_window(
    service: SessionService, raw: sqlite3.Connection, path: Path
) -> None:
    session = await service.create_session(**IDS)
    patient = SessionService(f"sqlite:///{path}", connect_args={"timeout": 0.01})
    async with patient:
        await patient.prepare_tables()
        raw.execute("BEGIN IMMEDIATE")
        failed = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def count() -> None:
            run = patient._database.run
            fails = 0

            async def watched(*args: Any, **kwargs: Any) -> Any:
                nonlocal fails
                try:
                    return await run(*args, **kwargs)
                except Exception:
                    fails += 1
                    if fails == 3:
                        loop.call_soon(failed.set)
                    raise

            patient._database.run = watched  # type: ignore[method-assign]

        await count()
        append = asyncio.create_task(patient.append_event(session, Event()))
        async with asyncio.timeout(60):
            await failed.wait()
            assert not append.done()
            raw.execute("ROLLBACK")
            await append
    assert await service.get_session(**IDS) == session


async def test_a_cancelled_append_leaves_no_lock(
    service: SessionService, raw: sqlite3.Connection, path: Path
) -> None:
    session = await service.create_session(**IDS)
    other = SessionService(f"sqlite:///{path}", connect_args={"timeout": 0.3})
    async with other:
        stored = await other.get_session(**IDS)
        assert stored is not None
        raw.execute("BEGIN IMMEDIATE")
        append = asyncio.create_task(other.append_event(stored, Event(content="cancelled")))
        assert await other.get_session(**IDS) == session  # the append is under way by now
        append.cancel()
        with pytest.raises(asyncio.CancelledError):
            await append
        raw.execute("ROLLBACK")
        await service.append_event(session, Event(content="next"))
        found = await other.get_session(**IDS)
        assert found is not None
        assert [event.content for event in found.events] == ["next"]


FORKED = """
import asyncio, os, sys
from adk_sessions import Event, SessionService

service = SessionService(sys.argv[1])
ids = {"app_name": "a", "user_id": "u", "session_id": "s"}

async def append(content):
    session = await service.get_session(**ids)
    await service.append_event(session, Event(content=content))
    return [event.content for event in (await service.get_session(**ids)).events]

async def start():
    await service.create_session(**ids)
    return await append("before the fork")

assert asyncio.run(start()) == ["before the fork"]
child = os.fork()
if child == 0:
    status = 1
    try:
        assert asyncio.run(append("child")) == ["before the fork", "child"]
        assert asyncio.run(append("child again"))[-1] == "child again"
        asyncio.run(service.close())
        status = 0
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert asyncio.run(append("parent"))[1:] == ["child", "child again", "parent"]
asyncio.run(service.close())
assert asyncio.run(append("after close"))[-1] == "after close"
asyncio.run(service.close())
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_service_works_on_both_sides_of_a_fork(path: Path) -> None:
    done = forked.run("-c", FORKED, f"sqlite:///{path}", patience=60)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM events").fetchone() == (5,)


def test_one_service_in_two_event_loops(path: Path) -> None:
    service = SessionService(f"sqlite:///{path}")

    async def work(first: bool) -> None:
        if first:
            await service.create_session(**IDS)
        session = await service.get_session(**IDS)
        assert session is not None
        await service.append_event(session, Event())
        assert len(session.events) == (1 if first else 2)

    asyncio.run(work(True))
    asyncio.run(work(False))
    asyncio.run(service.close())


# What is no usable database


async def refused(url: str, code: int, words: str) -> None:
    async with SessionService(url, retry_window=5.0) as service:
        with pytest.raises(DatabaseError) as caught:
            await service.create_session(**IDS)
        error = caught.value
        assert (error.code, error.retryable) == (code, False)
        assert words in str(error)
        assert error.__cause__ is None
        assert error.__context__ is None


async def test_a_file_that_is_not_a_database(path: Path) -> None:
    path.write_text("not a database " * 100)
    await refused(f"sqlite:///{path}", sqlite3.SQLITE_NOTADB, "is not an SQLite database")
    assert path.read_text() == "not a database " * 100


async def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    await refused(f"sqlite:///{tmp_path}", sqlite3.SQLITE_CANTOPEN, "cannot be opened")


async def test_a_file_in_place_of_the_folder(path: Path) -> None:
    path.write_text("")
    async with SessionService(f"sqlite:///{path}/chats.db", retry_window=0.5) as service:
        with pytest.raises(DatabaseError) as caught:
            await service.create_session(**IDS)
        assert caught.value.driver_error in ("FileExistsError", "NotADirectoryError")


async def test_a_database_that_may_only_be_read(path: Path, service: SessionService) -> None:
    created = await service.create_session(**IDS)
    await service.close()
    read_only = f"sqlite:///file:{path}?mode=ro&uri=true"
    async with SessionService(read_only, retry_window=5.0) as reader:
        assert await reader.get_session(**IDS) == created
        with pytest.raises(DatabaseError, match="the file cannot be written") as caught:
            await reader.append_event(created, Event())
        assert caught.value.code == sqlite3.SQLITE_READONLY
        assert not caught.value.retryable
        assert await reader.get_session(**IDS) == created


async def test_a_missing_file_that_may_only_be_read(path: Path) -> None:
    url = f"sqlite:///file:{path}?mode=ro&uri=true"
    await refused(url, sqlite3.SQLITE_CANTOPEN, "cannot be opened")
    assert not path.exists()


async def test_a_full_disk_loses_nothing(path: Path, service: SessionService) -> None:
    session = await service.create_session(**IDS)

    def limit(conn: Any) -> None:
        pages = conn.exec_driver_sql("PRAGMA page_count").scalar()
        conn.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")

    await service._database.submit(limit, write=True)
    await service.append_event(session, Event(content="small"))
    before = session.model_copy(deep=True)
    with pytest.raises(DatabaseError, match="the disk is full") as caught:
        await service.append_event(session, Event(content="large" * 10_000))
    assert caught.value.code == sqlite3.SQLITE_FULL
    assert session == before
    assert await service.get_session(**IDS) == session
    await service._database.submit(
        lambda conn: conn.exec_driver_sql("PRAGMA max_page_count = 100000"), write=True
    )
    await service.append_event(session, Event(content="large" * 10_000))
    assert await service.get_session(**IDS) == session


@pytest.mark.parametrize(
    "left",
    [
        "UPDATE sessions SET update_time = '2020-01-01 00:00:00.000000'",
        "UPDATE sessions SET update_time = '2020-01-01 00:00:00'",
        "UPDATE events SET timestamp = '2100-01-01 00:00:00.000000'",
        "UPDATE events SET timestamp = 4102444800.5",
        "UPDATE events SET timestamp = 4102444800",
    ],
)
@pytest.mark.parametrize("delta", [{}, {"a": 1}])
async def test_an_append_goes_after_whatever_another_writer_has_left(
    service: SessionService, raw: sqlite3.Connection, left: str, delta: dict[str, Any]
) -> None:
    session = await service.create_session(**IDS)
    await service.append_event(session, Event(id="z"))
    raw.execute(left)
    stored = await service.get_session(**IDS)
    assert stored is not None
    for event_id in ("y", "x"):
        actions = EventActions(state_delta=delta)
        await service.append_event(stored, Event(id=event_id, actions=actions))
    found = await service.get_session(**IDS)
    assert found is not None
    assert [event.id for event in found.events] == ["z", "y", "x"]
    assert found == stored


@pytest.mark.parametrize("delta", [{}, {"a": 1}])
async def test_a_session_that_was_made_anew_is_another_one(
    service: SessionService, delta: dict[str, Any]
) -> None:
    # no event of the new one tells that the old one is stale
    old = await service.create_session(**IDS)
    await service.append_event(old, Event())
    await service.delete_session("a", "u", "s")
    new = await service.create_session(**IDS)
    with pytest.raises(StaleSessionError):
        await service.append_event(old, Event(actions=EventActions(state_delta=delta)))
    assert await service.get_session(**IDS) == new


# An engine of the application's


def with_recipe(engine: AsyncEngine, begin: str) -> None:
    """What SQLAlchemy's documentation tells an application to do for real transactions."""

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def do_begin(conn: Any) -> None:
        conn.exec_driver_sql(begin)


@asynccontextmanager
async def own_engine(path: Path, begin: str | None) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    if begin is not None:
        with_recipe(engine, begin)
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.mark.parametrize("begin", [None, "BEGIN", "BEGIN IMMEDIATE"])
async def test_an_applications_engine_and_its_own_transactions(
    path: Path, begin: str | None
) -> None:
    async with own_engine(path, begin) as engine:
        async with engine.begin() as conn:
            await conn.execute(text("CREATE TABLE notes (body TEXT)"))
        service = SessionService(engine=engine)
        session = await service.create_session(**IDS, state={"app:n": 0})
        await asyncio.gather(*(work(service, n) for n in range(12)))
        assert len(await service.get_app_state(app_name="a")) == 13
        await service.append_event(session, Event())
        stored = await service.get_session(**IDS)
        assert stored is not None
        assert stored.events == session.events
        # the application's transactions still are ones
        with pytest.raises(ZeroDivisionError):
            await note_and_fail(engine)
        async with engine.begin() as conn:
            await conn.execute(text("INSERT INTO notes VALUES ('kept')"))
        async with engine.connect() as conn:
            assert (await conn.execute(text("SELECT body FROM notes"))).all() == [("kept",)]
        await service.delete_session("a", "u", "s")
        async with engine.connect() as conn:
            query = text("SELECT count(*) FROM events WHERE session_id = 's'")
            assert (await conn.execute(query)).scalar() == 0
        await service.close()
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_an_applications_engine_shows_what_is_run_on_it(path: Path) -> None:
    async with own_engine(path, None) as engine:
        service = SessionService(engine=engine)
        session = await service.create_session(**IDS)
        seen: list[str] = []

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def note(*args: Any) -> None:
            seen.append(args[2].split()[0])

        await service.append_event(session, Event(actions=EventActions(state_delta={"a": 1})))
        assert seen == ["BEGIN", "SELECT", "UPDATE", "INSERT", "COMMIT"]
        assert await service.get_session(**IDS) == session


async def work(service: SessionService, n: int) -> None:
    session = await service.create_session(app_name="a", user_id="u", state={f"own {n}": n})
    delta = EventActions(state_delta={f"app:{n}": n})
    await service.append_event(session, Event(actions=delta))


async def note_and_fail(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await conn.execute(text("INSERT INTO notes VALUES ('rolled back')"))
        raise ZeroDivisionError


async def test_two_services_on_an_applications_only_connection() -> None:
    engine = create_async_engine("sqlite+aiosqlite:///:memory:")
    try:
        one, other = SessionService(engine=engine), SessionService(engine=engine)
        await asyncio.gather(*(work((one, other)[n % 2], n) for n in range(12)))
        assert await one.get_app_state(app_name="a") == {str(n): n for n in range(12)}
        assert len((await other.list_sessions(app_name="a")).sessions) == 12
    finally:
        await engine.dispose()


async def test_closing_while_calls_run_tears_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    async with SessionService(url) as service, SessionService(url) as reader:
        sessions = [await service.create_session(app_name="a", user_id=f"u{n}") for n in range(6)]

        async def append(n: int) -> None:
            for i in range(20):
                await service.append_event(
                    sessions[n],
                    Event(content=i, actions=EventActions(state_delta={"n": i, f"app:{n}": i})),
                )

        async def close() -> None:
            for _ in range(15):
                await asyncio.sleep(0.002)
                await service.close()

        await asyncio.gather(*map(append, range(6)), close())
        for session in sessions:
            stored = await reader.get_session(
                app_name="a", user_id=session.user_id, session_id=session.id
            )
            assert stored is not None
            assert [event.content for event in stored.events] == list(range(20))
            assert stored.state["n"] == 19
        assert await reader.get_app_state(app_name="a") == {str(n): 19 for n in range(6)}


async def test_a_cancelled_call_on_an_engine_of_ones_own_gives_its_connection_back(
    tmp_path: Path,
) -> None:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{tmp_path}/a.db", pool_size=1, max_overflow=0, pool_timeout=30
    )
    service = SessionService(engine=engine)
    await service.prepare_tables()
    cancelled = 0
    for n in range(60):
        try:
            async with asyncio.timeout(0.0002 * n):
                await service.create_session(app_name="a", user_id="u")
        except TimeoutError:
            cancelled += 1
    assert cancelled
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert await service.create_session(app_name="a", user_id="u")
    await engine.dispose()


async def test_a_counter_beside_a_large_state_writes_little(tmp_path: Path) -> None:
    """The log grows by the pages that differ, not by the whole document."""
    path = tmp_path / "a.db"
    async with SessionService(f"sqlite:///{path}") as service:
        state = {f"k{n}": "ü" * 1000 for n in range(200)} | {"app:big": "x" * 200_000}
        session = await service.create_session(app_name="app", user_id="ann", state=state)

        async def count(n: int) -> None:
            delta = {"n": n, "app:n": n}
            await service.append_event(
                session, Event(author="a", actions=EventActions(state_delta=delta))
            )

        await count(0)
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for n in range(1, 6):
            await count(10**n)
        # both documents anew with each append would be 3 MB
        assert 0 < Path(f"{path}-wal").stat().st_size < 1_000_000
        found = await service.get_session(app_name="app", user_id="ann", session_id=session.id)
        assert found is not None
        assert found.state == session.state
        assert found.state["n"] == found.state["app:n"] == 100_000


async def test_statements_are_kept_once(tmp_path: Path) -> None:
    """Also where google-adk has moved a session back in time, which takes the general way."""
    path = tmp_path / "a.db"
    kept = []
    async with SessionService(f"sqlite:///{path}") as service:
        session = await service.create_session(app_name="app", user_id="ann")
        await service.append_event(session, Event(author="a"))
        for n in range(6):
            with closing(sqlite3.connect(path)) as other, other:
                other.execute("UPDATE sessions SET update_time = '2020-01-01 00:00:00.000000'")
            again = await service.get_session(app_name="app", user_id="ann", session_id=session.id)
            assert again is not None
            for delta in ({}, {"n": n, "app:n": n, "user:n": n}):
                await service.append_event(
                    again, Event(author="a", actions=EventActions(state_delta=delta))
                )
            kept.append(len(service._statements._prepared))  # type: ignore[attr-defined]
    assert kept == kept[:1] * 6
