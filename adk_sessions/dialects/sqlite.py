"""SQLite: BEGIN IMMEDIATE is the lock, and a file is worked on by threads of its own.

A driver that hops to its thread for each statement spends most of an append hopping. Here a whole
transaction is one function on one thread: a synchronous engine with one connection. A file has two
such lanes, so a read never waits while this process waits for another one's write; an in-memory
database has one, which makes it safe under concurrent tasks.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Table,
    and_,
    bindparam,
    create_engine,
    event,
    func,
    inspect,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import pysqlite
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from .. import codec
from .. import url as urls
from ..errors import ConfigurationError, SchemaError
from .base import TICK, Generic
from .lanes import Kind, Lane, execute, is_ours, transaction
from .prepared import Compiled
from .reads import Tables
from .rows import Deltas, Key, NewEvent, Revisions
from .types import Timestamp, moment_of

T = TypeVar("T")

Synchronous = Literal["FULL", "NORMAL"]

# Seconds that a statement waits for another process's lock before it fails as busy.
BUSY_TIMEOUT = 10.0
# Milliseconds for one try of the lock for a migration.
_LOCK_WAIT = 200
# Bytes of a state from which on its pages are worth to be kept as they are.
_LARGE = 16_384

_DIALECT = pysqlite.dialect()


class _Prepared:
    """A statement that is compiled once, and goes straight to the driver where nobody can watch.

    Args:
        statement: its parameters are all bound by name, and none is expanding.
    """

    def __init__(self, statement: Any) -> None:
        self._statement = statement
        self._compiled = Compiled(statement, _DIALECT)
        columns = getattr(statement, "selected_columns", ())
        self._times = [at for at, c in enumerate(columns) if isinstance(c.type, Timestamp)]

    def __call__(self, conn: Connection, parameters: dict[str, Any]) -> Any:
        """Runs it; what is returned has ``rowcount``."""
        if not is_ours(conn):
            return conn.execute(self._statement, parameters)
        arguments = self._compiled.arguments(parameters)
        return execute(conn, self._compiled.sql, [_stored(value) for value in arguments])

    def rows(self, conn: Connection, parameters: dict[str, Any]) -> list[Any]:
        """Runs it and reads all that it finds."""
        rows: list[Any] = self(conn, parameters).fetchall()
        if is_ours(conn) and self._times:
            rows = [list(row) for row in rows]
            for at in self._times:
                for row in rows:
                    row[at] = moment_of(row[at])
        return rows


def _stored(value: Any) -> Any:
    return value.isoformat(" ", "microseconds") if isinstance(value, datetime) else value


def _padded(text: str) -> str:
    """A large JSON document with white space behind it, to a whole number of kilobytes.

    SQLite writes only the pages that differ, as long as a row keeps its length. A counter in a
    state of 200 KB would otherwise write a hundred pages to the log with each event.
    """
    if len(text) < _LARGE:
        return text
    size = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
    return text + " " * (-size % 1024)


class SQLite(Generic):
    """Statements for SQLite. The transaction's BEGIN IMMEDIATE has locked everything already."""

    says_begin = True
    locks_migrations = True
    rebuilds_in_transaction = True
    compares_rows = True
    raw_times = True

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        s, key = tables.sessions, self._is_session
        now, expected = (bindparam(name, type_=Timestamp()) for name in ("v_now", "k_expected"))
        # a raw number sorts before any text; where google-adk has moved update_time back, or left
        # such a number, the generic way finds out what is next
        newest = func.coalesce(self._newest_time.scalar_subquery(), expected)
        current = and_(
            *(key, s.c.update_time == expected, *self.is_archived(False)),
            newest.between(literal_column("''"), expected),
        )
        self._state = select(self.as_text(s.c.state)).where(current)
        self._touch = update(s).where(current).values(update_time=now)
        self._prepared: dict[Any, _Prepared] = {}

    def rows(
        self, conn: Connection, statement: Any, parameters: dict[str, Any]
    ) -> Sequence[Sequence[Any]]:
        return self._prepare(statement).rows(conn, parameters)

    def write(self, conn: Connection, statement: Any, parameters: dict[str, Any]) -> int:
        written: int = self._prepare(statement)(conn, parameters).rowcount
        return written

    def _prepare(self, statement: Any) -> _Prepared:
        prepared = self._prepared.get(statement)
        if prepared is None:
            prepared = self._prepared[statement] = _Prepared(statement)
        return prepared

    def append(
        self,
        conn: Connection,
        key: Key,
        expected: datetime | None,
        events: Sequence[NewEvent],
        deltas: Deltas,
        *,
        replace: bool = False,
    ) -> Revisions | None:
        if expected is None:
            current = self.revision(conn, key)
            if current is None:
                return None
            expected = current[0]
        # the statement that first meets the session's row sees whether it is at `expected`
        now = max(events[-1].timestamp, expected + len(events) * TICK)
        parameters = {**key.parameters(), "k_expected": expected, "v_now": now}
        if deltas.session is None:
            found = self.write(conn, self._touch, parameters) > 0
        elif found := bool(rows := self.rows(conn, self._state, parameters)):
            merged = deltas.session if replace else codec.merge_state(rows[0][0], deltas.session)
            parameters["v_state"] = _padded(merged)
            self.write(conn, self._set_session[True], parameters)
        if not found:
            return super().append(conn, key, expected, events, deltas, replace=replace)
        self._insert_events(conn, key, events, expected)
        self._merge_wider(conn, key, deltas, now)
        return Revisions(expected, now)

    def insert_if_missing(self, conn: Connection, table: Table, parameters: dict[str, Any]) -> None:
        """Inserts a scope's row: that it is missing cannot have changed since."""
        self.write(conn, self._insert_scope[table], parameters)

    def _merge_scope(
        self, conn: Connection, table: Table, key: Key, delta: str | None, now: datetime
    ) -> str:
        stored: str | None = self.scope_row(conn, table, key, lock=True)
        if stored is not None and delta is None:
            return stored
        merged = codec.merge_state(stored, delta or "{}")
        parameters = {**key.parameters(), "v_now": now, "v_state": _padded(merged)}
        if not self.write(conn, self._set_scope[table], parameters):
            self.insert_if_missing(conn, table, parameters)
        return merged

    def lock(self, conn: Connection, table: Any, where: Any, key: Key) -> bool:
        """Nothing to do: what is read next cannot be changed by anybody else."""
        return True

    def _since(self) -> list[ColumnElement[bool]]:
        # a raw number in the column sorts before any text, and its event decides by its own time
        number = self.tables.events.c.timestamp < literal_column("''")
        return [or_(*super()._since(), number)]

    transaction = staticmethod(transaction)

    @contextmanager
    def rebuilding(self, conn: Connection) -> Iterator[None]:
        # One transaction is the lock. With foreign keys on, altering a parent table would delete
        # the rows of its children.
        enforced = conn.exec_driver_sql("PRAGMA foreign_keys").scalar()
        conn.exec_driver_sql("PRAGMA foreign_keys = OFF")
        waits = conn.exec_driver_sql("PRAGMA busy_timeout").scalar()
        try:
            # whoever migrates asks again, until the time is up that the caller gave
            conn.exec_driver_sql(f"PRAGMA busy_timeout = {_LOCK_WAIT}")
            with self.transaction(conn, write=True):
                conn.exec_driver_sql(f"PRAGMA busy_timeout = {waits}")
                before = self._orphans(conn)
                yield  # the connection is in a transaction, so alembic leaves it alone
                if self._orphans(conn) > before:
                    raise SchemaError("The migration would leave events without their session.")
        finally:
            conn.exec_driver_sql(f"PRAGMA busy_timeout = {waits}")
            conn.exec_driver_sql(f"PRAGMA foreign_keys = {'ON' if enforced else 'OFF'}")

    def _orphans(self, conn: Connection) -> int:
        """How many events have no session: google-adk may have left some."""
        events = self.tables.events.name
        if not inspect(conn).has_table(events):
            return 0
        return len(conn.exec_driver_sql(f'PRAGMA foreign_key_check("{events}")').all())


def _enforce_foreign_keys(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


# Connections from before a fork. To close them here could drop locks that the parent relies on.
_of_the_parent: list[Lane] = []


async def finished(future: asyncio.Future[T], *, wait: bool) -> T:
    """A future's result; when the caller is cancelled the work goes on, unheard, to its end.

    Args:
        future: work that cannot be stopped half-way.
        wait: whether the caller goes on only after that end.
    """
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        while wait and not future.done():
            with suppress(asyncio.CancelledError):  # once is enough
                await asyncio.wait([future])
        raise


class _Connections:
    """How a lane's connection is made. It knows of no lane: one that is dropped ends its thread."""

    def __init__(
        self,
        url: URL,
        connect_args: dict[str, Any],
        synchronous: Synchronous,
        options: dict[str, Any],
    ) -> None:
        self._url = url.set(drivername="sqlite+pysqlite")
        self.timeout = connect_args.get("timeout", url.query.get("timeout", BUSY_TIMEOUT))
        self._connect_args = {**connect_args, "timeout": self.timeout, "check_same_thread": False}
        self._synchronous = synchronous
        self._options = options

    @property
    def in_memory(self) -> bool:
        return urls.is_in_memory(self._url)

    def open(self, *, write: bool) -> Connection:
        database = self._url.database or ""
        if not self.in_memory and not database.startswith("file:"):
            Path(database).parent.mkdir(parents=True, exist_ok=True)
        return self.engine(write=write).connect()

    def engine(self, *, write: bool = True) -> Engine:
        engine = create_engine(
            self._url,
            **{
                **self._options,
                "poolclass": StaticPool,
                "pool_reset_on_return": None,
                "isolation_level": "AUTOCOMMIT",
                "connect_args": self._connect_args,
            },
        )
        event.listen(engine, "connect", self._prepare)
        if write:  # the file remembers it: who only reads changes nothing
            event.listen(engine, "connect", self._use_wal)
        return engine

    def _prepare(self, connection: Any, _record: Any) -> None:
        _enforce_foreign_keys(connection, None)
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")

    def _use_wal(self, connection: Any, _record: Any) -> None:
        timeout = float(self.timeout)
        # SQLite does not wait for the lock that the change to WAL needs
        deadline = time.monotonic() + timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_READONLY:
                    return  # readable as it is
                if (
                    error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY
                    or time.monotonic() > deadline
                ):
                    raise
            time.sleep(0.02)


class SQLiteDatabase:
    """An SQLite database that the service opened itself.

    Args:
        url: file or memory, driver of no importance; a file's folder is made when it is opened.
        connect_args: for ``sqlite3.connect``; ``timeout`` is the busy timeout in seconds.
        synchronous: FULL keeps every commit over a power loss, NORMAL over a crash of the process.
        options: further options of ``create_engine``.

    Raises:
        ConfigurationError: an option is unknown.
    """

    behind_pooler = False
    reached = True
    system = "sqlite"

    def __init__(
        self,
        url: URL,
        connect_args: dict[str, Any],
        *,
        synchronous: Synchronous = "FULL",
        **options: Any,
    ) -> None:
        self.url = url
        self._connections = _Connections(url, connect_args, synchronous, options)
        self._engine: AsyncEngine | None = None
        failure: ConfigurationError | None = None
        try:
            self._connections.engine()  # nothing is opened yet, but a wrong option shows
        except Exception as error:
            failure = urls.failure(error, url)
        if failure is not None:
            raise failure
        self._open()

    @property
    def in_memory(self) -> bool:
        """Whether the data is gone when the connection is."""
        return self._connections.in_memory

    @property
    def engine(self) -> AsyncEngine:
        """An engine on the same file, made when it is first asked for."""
        if self.in_memory:
            raise ConfigurationError(
                "An in-memory database is behind one connection; it cannot be shared by an engine."
            )
        if self._engine is None:
            self._engine = create_async_engine(
                self.url.set(drivername="sqlite+aiosqlite"),
                connect_args={"timeout": self._connections.timeout},
            )
            event.listen(self._engine.sync_engine, "connect", _enforce_foreign_keys)
        return self._engine

    async def run(self, work: Callable[[Connection], T], *, write: bool, once: bool = False) -> T:
        """One transaction on the thread of its lane; writes that wait there share a commit.

        What became of it is known always, so ``once`` changes nothing.
        """
        return await self._submit(work, "write" if write else "read", write=write)

    async def submit(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """Runs ``work`` on the lane's thread, with no transaction around it."""
        return await self._submit(work, "own", write=write)

    async def _submit(self, work: Callable[[Connection], T], kind: Kind, *, write: bool) -> T:
        if self._process != os.getpid():
            # after a fork: neither the threads nor the connections are ours
            _of_the_parent.extend((self._writer, self._reader))
            self._open()
        lane = self._writer if write else self._reader
        future = lane.submit(work, kind)
        # the thread cannot be stopped: a write commits or fails before the caller goes on
        return await (finished(future, wait=True) if write else future)

    def connections(self) -> None:
        """There is no pool: one connection reads, and one writes."""

    def is_missing(self) -> bool:
        """Whether there is no such file yet; one that is named by a URI is taken to be there."""
        database = self.url.database or ""
        return not (self.in_memory or database.startswith("file:") or Path(database).exists())

    async def close(self) -> None:
        """Closes the connections; a file is opened again when it is next used."""
        await self._writer.close()
        if self._reader is not self._writer:
            await self._reader.close()
        if self._engine is not None:
            await self._engine.dispose()

    def _open(self) -> None:
        self._process = os.getpid()
        self._writer = Lane(functools.partial(self._connections.open, write=True))
        self._reader = self._writer
        if not self.in_memory:
            self._reader = Lane(functools.partial(self._connections.open, write=False))
