"""SQLite: BEGIN IMMEDIATE is the lock, and a file is worked on by threads of its own.

A driver that hops to its thread for each statement spends most of an append hopping. Here a whole
transaction is one function on one thread: a synchronous engine with one connection. A file has two
such lanes, so a read never waits while this process waits for another one's write; an in-memory
database has one, which makes it safe under concurrent tasks.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    create_engine,
    event,
    literal_column,
    or_,
)
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from .. import url as urls
from ..errors import ConfigurationError, SchemaError
from .base import Generic
from .rows import Key

T = TypeVar("T")

Synchronous = Literal["FULL", "NORMAL"]

# Seconds that a statement waits for another process's lock before it fails as busy.
BUSY_TIMEOUT = 10.0


class SQLite(Generic):
    """Statements for SQLite. The transaction's BEGIN IMMEDIATE has locked everything already."""

    def lock(self, conn: Connection, table: Any, where: Any, key: Key) -> bool:
        """Nothing to do: what is read next cannot be changed by anybody else."""
        return True

    def _since(self) -> list[ColumnElement[bool]]:
        # a raw number in the column sorts before any text, and its event decides by its own time
        number = self.tables.events.c.timestamp < literal_column("''")
        return [or_(*super()._since(), number)]

    @staticmethod
    def begin(conn: Connection, *, write: bool) -> None:
        """Starts a transaction on an AUTOCOMMIT connection: a writer's takes the lock now.

        A deferred transaction that reads and then writes fails as busy at once, or with the
        driver's defaults loses updates.
        """
        if not conn.in_transaction():
            conn.begin()
        if _in_transaction(conn):
            conn.exec_driver_sql("ROLLBACK")  # a hook of the application's own has begun one
        conn.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    @classmethod
    @contextmanager
    def transaction(cls, conn: Connection, *, write: bool) -> Iterator[None]:
        """One transaction of an AUTOCOMMIT connection, all of it or nothing."""
        cls.begin(conn, write=write)
        try:
            yield
            conn.exec_driver_sql("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors, a full disk for one
            if _in_transaction(conn):
                conn.exec_driver_sql("ROLLBACK")
            raise

    @classmethod
    def transact(cls, conn: Connection, work: Callable[[Connection], T], *, write: bool) -> T:
        """Runs ``work`` in one transaction of an AUTOCOMMIT connection."""
        with cls.transaction(conn, write=write):
            return work(conn)

    @contextmanager
    def migrating(self, conn: Connection) -> Iterator[bool]:
        # with foreign keys on, altering a parent table would delete the rows of its children
        enforced = conn.exec_driver_sql("PRAGMA foreign_keys").scalar()
        conn.exec_driver_sql("PRAGMA foreign_keys = OFF")
        try:
            with self.transaction(conn, write=True):
                yield True  # the connection is in a transaction, so alembic leaves it alone
                if conn.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                    raise SchemaError("The migration would leave events without their session.")
        finally:
            conn.exec_driver_sql(f"PRAGMA foreign_keys = {'ON' if enforced else 'OFF'}")


def _in_transaction(conn: Connection) -> bool:
    return bool(conn.connection.driver_connection.in_transaction)  # type: ignore[union-attr]


def _enforce_foreign_keys(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


# Connections from before a fork. To close them here could drop locks that the parent relies on.
_of_the_parent: list[_Lane] = []


class _Worker:
    """One connection and the thread that alone uses it."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adk_sessions-sqlite")

    def submit(self, work: Callable[[Connection], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)

    def _work(self, work: Callable[[Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._connect()
        return work(self._connection)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            connection.engine.dispose()


class _Lane:
    """Where calls queue for a worker. Closing takes it away whole, with what it has still to do;
    a call that comes later gets another connection in another thread."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._worker: _Worker | None = None

    def submit(self, work: Callable[[Connection], T]) -> asyncio.Future[T]:
        if self._worker is None:
            self._worker = _Worker(self._connect)
        return self._worker.submit(work)

    async def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()


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
        if wait:
            await asyncio.wait([future])
        raise


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

    def __init__(
        self,
        url: URL,
        connect_args: dict[str, Any],
        *,
        synchronous: Synchronous = "FULL",
        **options: Any,
    ) -> None:
        self.url = url
        self._url = url.set(drivername="sqlite+pysqlite")
        self._connect_args = {"timeout": BUSY_TIMEOUT, **connect_args, "check_same_thread": False}
        self._synchronous = synchronous
        self._options = options
        self._engine: AsyncEngine | None = None
        failure: ConfigurationError | None = None
        try:
            self._make_engine()  # nothing is opened yet, but a wrong option shows
        except Exception as error:
            failure = urls.failure(error, url)
        if failure is not None:
            raise failure
        self._open()

    @property
    def in_memory(self) -> bool:
        """Whether the data is gone when the connection is."""
        database = self._url.database or ""
        return not database or ":memory:" in database or self._url.query.get("mode") == "memory"

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
                connect_args={"timeout": self._connect_args["timeout"]},
            )
            event.listen(self._engine.sync_engine, "connect", _enforce_foreign_keys)
        return self._engine

    async def run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """One transaction on the thread of its lane."""
        return await self.submit(lambda conn: SQLite.transact(conn, work, write=write), write=write)

    async def submit(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """Runs ``work`` on the lane's thread, with no transaction around it."""
        if self._process != os.getpid():
            # after a fork: neither the threads nor the connections are ours
            _of_the_parent.extend((self._writer, self._reader))
            self._open()
        lane = self._writer if write else self._reader
        # the thread cannot be stopped: a write commits or fails before the caller goes on
        return await finished(lane.submit(work), wait=write)

    async def close(self) -> None:
        """Closes the connections; a file is opened again when it is next used."""
        await self._writer.close()
        if self._reader is not self._writer:
            await self._reader.close()
        if self._engine is not None:
            await self._engine.dispose()

    def _open(self) -> None:
        self._process = os.getpid()
        self._writer = _Lane(self._connect)
        self._reader = self._writer if self.in_memory else _Lane(self._connect)

    def _connect(self) -> Connection:
        database = self._url.database or ""
        if not self.in_memory and not database.startswith("file:"):
            Path(database).parent.mkdir(parents=True, exist_ok=True)
        return self._make_engine().connect()

    def _make_engine(self) -> Engine:
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
        return engine

    def _prepare(self, connection: Any, _record: Any) -> None:
        timeout = float(self._connect_args["timeout"])
        _enforce_foreign_keys(connection, None)
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
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
