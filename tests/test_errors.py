"""The tree of errors, and what real databases' errors become in it."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import engine_for
from servers import free_port
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

import adk_sessions
from adk_sessions import (
    AlreadyExistsError,
    DatabaseError,
    Event,
    EventActions,
    EventConflictError,
    InvalidInputError,
    SessionNotFoundError,
    SessionService,
    SessionStoreError,
    StaleSessionError,
    errors,
)
from adk_sessions.dialects.faults import Fault, classify, code_of, must_invalidate, translate

CLASSES = {
    name: item
    for name, item in vars(errors).items()
    if isinstance(item, type) and issubclass(item, Exception)
}
SECRET = "the-payload-of-ann"
MISSING = (
    "a table or column is missing: run adk-sessions upgrade, or what else makes these tables; a"
    " service's validate_schema() says which"
)
WHO = (
    "the user or the password is wrong; check both in the URL, where @ : / ? # % in them are"
    " percent-encoded"
)


# The tree


def drawn_tree() -> dict[str, str | None]:
    """Class names of the docstring's drawing, each with the one that it hangs on."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if found:
            depth, name = len(found[1]), found[2]
            path = [(d, n) for d, n in path if d < depth]
            parents[name] = path[-1][1] if path else None
            path.append((depth, name))
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {
        name: next((b.__name__ for b in c.__bases__ if b.__name__ in CLASSES), None)
        for name, c in CLASSES.items()
    }
    assert drawn_tree() == real
    assert [name for name, parent in real.items() if parent is None] == ["SessionStoreError"]


def test_the_drawing_says_what_else_a_class_is_and_carries() -> None:
    lines = {
        found[1]: line
        for line in (errors.__doc__ or "").splitlines()
        if (found := re.match(r"^    [│├└─ ]*([A-Z]\w+Error)\b", line))
    }
    for name, item in CLASSES.items():
        assert ("(ValueError)" in lines[name]) is (ValueError in item.__bases__), name
    assert ".field" in lines["InvalidInputError"]
    assert ".retryable .code .driver_error" in (errors.__doc__ or "")


def test_all_is_complete_and_sorted() -> None:
    assert errors.__all__ == sorted(CLASSES)
    assert set(errors.__all__) <= set(adk_sessions.__all__)


@pytest.mark.parametrize(
    "name", sorted(CLASSES.keys() - {"InvalidInputError", "ConversionRefusedError"})
)
def test_the_docstring_is_the_default_message(name: str) -> None:
    first_paragraph = (CLASSES[name].__doc__ or "").strip().partition("\n\n")[0]
    assert str(CLASSES[name]()) == first_paragraph
    assert str(CLASSES[name]("another")) == "another"
    assert str(CLASSES[name]("")) == ""


@pytest.mark.parametrize(
    "name", sorted(CLASSES.keys() - {"InvalidInputError", "ConversionRefusedError"})
)
def test_a_bare_raise_is_a_sentence_for_people(name: str) -> None:
    message = str(CLASSES[name]())
    assert "\n" not in message
    assert "Attributes:" not in message
    assert message.endswith(".")


def test_attributes() -> None:
    assert InvalidInputError("x", field="state").field == "state"
    plain = DatabaseError()
    assert (plain.retryable, plain.code, plain.driver_error) == (False, None, None)
    full = errors.OutcomeUnknownError("x", retryable=True, code="08006", driver_error="E")
    assert (str(full), full.retryable, full.code, full.driver_error) == ("x", True, "08006", "E")


# What real databases raise


async def error_of(call: Awaitable[Any]) -> Exception:
    try:
        await call
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


async def run(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as conn:
        for statement in statements:
            await conn.execute(text(statement))


def check(
    error: Exception, fault: Fault, code: str | int | None, driver_error: str, hint: str = ""
) -> None:
    assert classify(error) is fault
    assert code_of(error) == code
    if fault is Fault.TAKEN:
        return
    ours = translate(error, unknown=False)
    assert type(ours) is DatabaseError
    assert (ours.code, ours.driver_error) == (code, driver_error)
    assert ours.retryable is (fault is not Fault.FATAL)
    shown = driver_error if code is None else f"{driver_error}, {code}"
    assert f"({shown})" in str(ours)
    assert str(ours).endswith(f": {hint}." if hint else ").")
    assert SECRET not in str(ours)
    assert ours.__cause__ is None
    assert ours.__context__ is None


async def deadlock(engine: AsyncEngine, table: str) -> Exception:
    """The error of the one of two transactions that the server sacrifices."""
    both = asyncio.Barrier(2)

    async def work(first: int, second: int) -> None:
        async with engine.begin() as conn:
            update = text(f"UPDATE {table} SET v = '{SECRET}' WHERE i = :i")
            await conn.execute(update, {"i": first})
            await both.wait()
            await conn.execute(update, {"i": second})

    async with asyncio.timeout(60):
        results = await asyncio.gather(work(1, 2), work(2, 1), return_exceptions=True)
    [error] = [result for result in results if isinstance(result, Exception)]
    return error


@pytest.fixture
def table() -> str:
    return f"t_{uuid.uuid4().hex[:16]}"


async def test_postgresql(postgres_url: str, table: str) -> None:
    async with engine_for(postgres_url) as engine:
        await run(
            engine,
            f"CREATE TABLE {table} (i int PRIMARY KEY, v text)",
            f"INSERT INTO {table} VALUES (1, ''), (2, '')",
        )
        check(await deadlock(engine, table), Fault.CONFLICT, "40P01", "DeadlockDetectedError")
        check(
            await error_of(run(engine, f"INSERT INTO {table} VALUES (1, '{SECRET}')")),
            Fault.TAKEN,
            "23505",
            "UniqueViolationError",
        )
        check(
            await error_of(run(engine, f"SELECT '{SECRET}' FROM no_{table}")),
            Fault.FATAL,
            "42P01",
            "UndefinedTableError",
            MISSING,
        )
        check(
            await error_of(run(engine, f"SELECT '{SECRET}' ? '"[:-1])),
            Fault.FATAL,
            "42601",
            "PostgresSyntaxError",
        )
        check(
            await error_of(run(engine, "SET LOCAL statement_timeout = 1", "SELECT pg_sleep(5)")),
            Fault.FATAL,
            "57014",
            "QueryCanceledError",
        )


async def test_postgresql_killed_connection(postgres_url: str) -> None:
    async with engine_for(postgres_url) as engine, engine.connect() as conn:
        pid = (await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await run(engine, f"SELECT pg_terminate_backend({pid}, 5000)")
        error = await error_of(conn.execute(text("SELECT 1")))
        assert classify(error) is Fault.LOST
        assert translate(error, unknown=False).retryable  # type: ignore[union-attr]
        assert isinstance(translate(error, unknown=True), errors.OutcomeUnknownError)


def test_an_answer_that_nobody_asked_for_is_a_lost_connection() -> None:
    """A server's farewell that crosses a request: asyncpg loses count, and tells it like this."""
    asyncpg = pytest.importorskip("asyncpg")
    seen_by_sqlalchemy = Exception("unknown protocol state")
    seen_by_sqlalchemy.__cause__ = asyncpg.InternalClientError("unknown protocol state")
    error = DBAPIError("SELECT 1", {}, seen_by_sqlalchemy)
    check(error, Fault.LOST, None, "InternalClientError")
    assert must_invalidate(error)
    assert isinstance(translate(error, unknown=True), errors.OutcomeUnknownError)


async def test_postgresql_refuses_a_connection(postgres_url: str, table: str) -> None:
    url = make_url(postgres_url)
    shown = url.set(database=table).render_as_string(hide_password=False)
    async with engine_for(shown) as engine:
        check(
            await error_of(run(engine, "SELECT 1")),
            Fault.FATAL,
            "3D000",
            "InvalidCatalogNameError",
            "the database does not exist: create it first",
        )
    nobody = url.set(username=table, password=SECRET).render_as_string(hide_password=False)
    async with engine_for(nobody) as engine:
        error = await error_of(run(engine, "SELECT 1"))
        assert classify(error) is Fault.FATAL
        assert code_of(error) in ("28000", "28P01")  # which one depends on pg_hba.conf
        assert SECRET not in str(translate(error, unknown=False))


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
async def test_a_closed_port(scheme: str) -> None:
    async with engine_for(f"{scheme}://ann:{SECRET}@127.0.0.1:{free_port()}/x") as engine:
        error = await error_of(run(engine, "SELECT 1"))
    assert classify(error) in (Fault.LOST, Fault.UNAVAILABLE)
    ours = translate(error, unknown=False)
    assert isinstance(ours, DatabaseError)
    assert ours.retryable
    assert SECRET not in str(ours)


async def test_mariadb(mariadb_url: str, table: str) -> None:
    async with engine_for(mariadb_url) as engine:
        await run(
            engine,
            f"CREATE TABLE {table} (i int PRIMARY KEY, v text) ENGINE=InnoDB",
            f"INSERT INTO {table} VALUES (1, ''), (2, '')",
        )
        check(await deadlock(engine, table), Fault.CONFLICT, 1213, "OperationalError")
        check(
            await error_of(run(engine, f"INSERT INTO {table} VALUES (1, '{SECRET}')")),
            Fault.TAKEN,
            1062,
            "IntegrityError",
        )
        check(
            await error_of(run(engine, f"SELECT '{SECRET}' FROM no_{table}")),
            Fault.FATAL,
            1146,
            "ProgrammingError",
            MISSING,
        )
        async with engine.begin() as holder:
            await holder.execute(text(f"UPDATE {table} SET v = 'x' WHERE i = 1"))
            waiting = f"UPDATE {table} SET v = '{SECRET}' WHERE i = 1"
            error = await error_of(run(engine, "SET innodb_lock_wait_timeout = 1", waiting))
        check(error, Fault.CONFLICT, 1205, "OperationalError")


async def test_mariadb_refuses_a_connection(mariadb_url: str, table: str) -> None:
    url = make_url(mariadb_url)
    nobody = url.set(username=table, password=SECRET).render_as_string(hide_password=False)
    async with engine_for(nobody) as engine:
        error = await error_of(run(engine, "SELECT 1"))
    assert table not in str(translate(error, unknown=False))
    code = code_of(error)
    assert code in (1045, 1698)  # which one depends on how root may log in
    check(error, Fault.FATAL, code, "OperationalError", WHO)
    nowhere = url.set(database=table).render_as_string(hide_password=False)
    async with engine_for(nowhere) as engine:
        error = await error_of(run(engine, "SELECT 1"))
    hint = "the database does not exist: create it first"
    check(error, Fault.FATAL, 1049, "OperationalError", hint)


@contextmanager
def sqlite_error(path: Path, *statements: str, **options: Any) -> Iterator[DBAPIError]:
    engine = create_engine(f"sqlite:///{path}", **options)
    try:
        with engine.connect() as conn:
            for statement in statements[:-1]:
                conn.exec_driver_sql(statement)
            with pytest.raises(DBAPIError) as caught:
                conn.exec_driver_sql(statements[-1])
        yield caught.value
    finally:
        engine.dispose()


def test_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    holder = sqlite3.connect(path, isolation_level=None)
    try:
        holder.execute("CREATE TABLE t (i INTEGER PRIMARY KEY, v TEXT)")
        holder.execute("INSERT INTO t VALUES (1, 'a')")
        taken = f"INSERT INTO t VALUES (1, '{SECRET}')"
        with sqlite_error(path, taken) as error:
            assert isinstance(error, IntegrityError)
            check(error, Fault.TAKEN, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, "IntegrityError")
        holder.execute("BEGIN IMMEDIATE")
        with sqlite_error(path, "BEGIN IMMEDIATE", connect_args={"timeout": 0}) as error:
            check(
                error,
                Fault.CONFLICT,
                sqlite3.SQLITE_BUSY,
                "OperationalError",
                "another process held the file locked for too long",
            )
        holder.execute("ROLLBACK")
        full = ("PRAGMA max_page_count = 4", f"INSERT INTO t VALUES (2, '{SECRET * 5000}')")
        with sqlite_error(path, *full) as error:
            check(error, Fault.FATAL, sqlite3.SQLITE_FULL, "OperationalError", "the disk is full")
        with sqlite_error(path, "PRAGMA query_only = ON", "DELETE FROM t") as error:
            check(
                error,
                Fault.FATAL,
                sqlite3.SQLITE_READONLY,
                "OperationalError",
                "the file cannot be written",
            )
        with sqlite_error(path, "SELECT * FROM missing") as error:
            hint = f"perhaps {MISSING}"
            check(error, Fault.FATAL, sqlite3.SQLITE_ERROR, "OperationalError", hint)
    finally:
        holder.close()
    folder = create_engine(f"sqlite:///{tmp_path}")
    with pytest.raises(DBAPIError) as caught:
        folder.connect()
    hint = "the file cannot be opened"
    check(caught.value, Fault.FATAL, sqlite3.SQLITE_CANTOPEN, "OperationalError", hint)
    (tmp_path / "text").write_text(SECRET * 100)
    with sqlite_error(tmp_path / "text", "SELECT * FROM t") as error:
        hint = "the file is not an SQLite database"
        check(error, Fault.FATAL, sqlite3.SQLITE_NOTADB, "DatabaseError", hint)


# What a caller of the service sees


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql", "mariadb"], indirect=True)
async def test_the_stores_errors_stand_alone(database_url: str, app_name: str) -> None:
    ids = {"app_name": app_name, "user_id": "ann", "session_id": "1"}
    async with SessionService(database_url) as service:
        session = await service.create_session(**ids, state={"k": SECRET})
        stale = await service.get_session(**ids)
        assert stale is not None
        gone = stale.model_copy(deep=True)
        gone.id = "gone"
        await service.append_event(session, Event(id="1", content=SECRET))
        other = Event(id="1", content=f"other {SECRET}", actions=EventActions(state_delta={"a": 1}))
        calls: list[tuple[type[SessionStoreError], Callable[[], Awaitable[Any]]]] = [
            (AlreadyExistsError, lambda: service.create_session(**ids, state={"k": SECRET})),
            (StaleSessionError, lambda: service.append_event(stale, Event(content=SECRET))),
            (EventConflictError, lambda: service.append_event(session, other)),
            (SessionNotFoundError, lambda: service.append_event(gone, Event(content=SECRET))),
        ]
        for kind, call in calls:
            error = await error_of(call())
            assert type(error) is kind
            assert list(chain(error)) == [error]
            assert SECRET not in str(error)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_a_missing_table_says_so_and_nothing_of_the_row(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    async with SessionService(fresh_database(kind)) as service:
        session = await service.create_session(app_name="a", user_id="u")
        await run(service._database.engine, "DROP TABLE events")
        ids = {"app_name": "a", "user_id": "u", "session_id": session.id}
        for call in (
            lambda: service.append_event(session, Event(content=SECRET)),
            lambda: service.get_session(**ids),
        ):
            error = await error_of(call())
            assert type(error) is DatabaseError
            assert not error.retryable
            assert error.code == {"sqlite": 1, "postgresql": "42P01", "mariadb": 1146}[kind]
            assert SECRET not in str(error)
            assert list(chain(error)) == [error]


async def test_a_password_is_in_no_error(postgres_url: str) -> None:
    address = make_url(postgres_url).set(username="nobody", password=SECRET, database="none")
    for url in (
        address.render_as_string(hide_password=False),
        f"postgresql://ann:{SECRET}@127.0.0.1:{free_port()}/x",
    ):
        async with SessionService(url) as service:
            for call in (service.prepare_tables, service.ping):
                error = await error_of(call())
                assert type(error) is DatabaseError
                assert all(SECRET not in f"{e!s}{e!r}{e.args}" for e in chain(error))
                assert list(chain(error)) == [error]
