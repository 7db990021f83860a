"""A database that is reached through an AsyncEngine: a server, or an engine of the application's.

Nothing is attached to an engine that was passed in. Its connections are borrowed with execution
options of our own, and go back as they came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.pool import PoolResetState, SingletonThreadPool, StaticPool

from ..errors import DatabaseError
from ..turns import Turns
from . import lanes
from .faults import Undecided, is_lost, must_invalidate
from .hosts import Clock
from .manner import Manner
from .pools import Pool, Pools
from .sqlite import finished
from .types import MYSQL_FAMILY

T = TypeVar("T")

# Tasks that share an engine's only connection must take turns, whichever service they go through.
_turns = Turns()

# In a pooled connection's `info`: the last thing it did was a commit of ours.
_COMMITTED = "adk_sessions.committed"

# What is older is not tested, or lacks a collation by which keys are compared.
_OLDEST = {"PostgreSQL": (14,), "MySQL": (8, 0, 17), "MariaDB": (10, 2)}


class EngineDatabase:
    """Runs operations on an AsyncEngine.

    Args:
        pool: the engine.
        statements: what decides whether an operation needs a transaction.
        make: makes such an engine for another event loop; None for one of the application's, which
            `close` leaves open.
        behind_pooler: whether a pooler may give each transaction another connection.
        timeout: seconds that an operation may take once it has a connection; None for no limit.
    """

    def __init__(
        self,
        pool: Pool,
        statements: Manner,
        *,
        make: Callable[[], Pool] | None = None,
        behind_pooler: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.behind_pooler = behind_pooler
        self._owned = make is not None
        self._statements = statements
        self._timeout = timeout
        #: a connection has been had: the server is there, or was
        self.reached = False
        self._explicit = statements.says_begin
        self._pools = Pools(pool, make, threaded=self._explicit)
        # Set on each connection: options of the application's engine are set when it is lent, and
        # win over those of an engine that is made from it.
        self._isolation: str | None = None
        if statements.autocommit or self._explicit:
            self._isolation = "AUTOCOMMIT"
        self._shared = isinstance(pool.engine.pool, StaticPool | SingletonThreadPool)
        # An idle AsyncSession is the public way into one greenlet for checkout, work and return;
        # an AsyncConnection makes three and a task.
        self._greenlet = AsyncSession()

    @property
    def engine(self) -> AsyncEngine:
        """The engine of the running event loop; outside of one that of the last."""
        return self._pools.latest.engine

    async def run(self, work: Callable[[Connection], T], *, write: bool, once: bool = False) -> T:
        """One operation on a connection of the pool, in a transaction if it needs one.

        Args:
            work: the operation.
            write: whether it writes.
            once: it must not happen twice, so a connection that breaks at its COMMIT is told from
                one that breaks before: always in a transaction.

        Raises:
            Undecided: with ``once``, the answer to the COMMIT was lost.
        """
        if once:
            return await self._submitted(
                lambda conn: self._work(conn, work, write, once), timeout=self._timeout
            )
        pool = self._pools.here()
        async with self._turn(pool):
            if self._statements.autocommit:
                return await self._greenlet.run_sync(lambda _: self._borrow(pool, work, write))
            if self._explicit:
                # a driver with threads: cancelled in the middle, a connection would be lost
                running = self._greenlet.run_sync(lambda _: self._borrow(pool, work, write))
                return await finished(asyncio.ensure_future(running), wait=True)
            with Clock(self._timeout) as clock:
                conn = await pool.engine.connect()
                try:
                    assert conn.sync_connection is not None
                    self._begin(clock, conn.sync_connection)
                    return await conn.run_sync(self._work, work, write)
                finally:
                    # its return to the pool awaits a ROLLBACK, and SQLAlchemy 2.0 loses a
                    # connection that is cancelled there
                    await finished(asyncio.ensure_future(_give_back(conn, clock)), wait=True)

    def _begin(self, clock: Clock, conn: Connection) -> None:
        if not self.reached and self._statements.needs_version:
            require_version(conn.dialect)
        self.reached = True
        clock.start(conn)

    def _borrow(self, pool: Pool, work: Callable[[Connection], T], write: bool) -> T:
        with Clock(self._timeout) as clock, pool.sync_engine.connect() as conn:
            self._begin(clock, conn)
            if self._isolation:
                conn.execution_options(isolation_level=self._isolation)
            return self._work(conn, work, write)

    def _work(
        self, conn: Connection, work: Callable[[Connection], T], write: bool, once: bool = False
    ) -> T:
        try:
            if self._explicit:
                with lanes.transaction(conn, write=write):
                    return work(conn)
            if once or (write and not self._statements.autocommit):
                if self._statements.commits_each_statement(conn):
                    result = _in_transaction(conn, work, once)
                    if once:
                        _end(conn)
                else:
                    with conn.begin() as transaction:
                        result = work(conn)
                        _commit(transaction.commit, once)
                if self._owned:
                    conn.info[_COMMITTED] = True
                return result
            return work(conn)
        except Exception as error:
            if must_invalidate(error):
                conn.invalidate()
            raise

    async def submit(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """Runs ``work`` on a connection that it controls itself, transactions included."""
        # as long as it takes: it may be a migration
        return await self._submitted(work, timeout=None)

    async def _submitted(self, work: Callable[[Connection], T], *, timeout: float | None) -> T:
        pool = self._pools.here()
        async with self._turn(pool):
            running = self._greenlet.run_sync(lambda _: self._submit(pool, work, timeout))
            if self._explicit:
                return await finished(asyncio.ensure_future(running), wait=True)
            return await running

    def _submit(self, pool: Pool, work: Callable[[Connection], T], timeout: float | None) -> T:
        level = "READ COMMITTED" if self._statements.autocommit else self._isolation
        with Clock(timeout) as clock, pool.sync_engine.connect() as conn:
            self._begin(clock, conn)
            if level:
                conn.execution_options(isolation_level=level)
            return work(conn)

    def is_missing(self) -> bool:
        """A server is nothing that a connection makes."""
        return False

    async def close(self) -> None:
        """Disposes the engines that the service made."""
        await self._pools.close()

    @property
    def system(self) -> str:
        """The kind of database; which of two that speak one language is known once connected."""
        dialect = self._pools.dialect
        return "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name

    def connections(self) -> tuple[int, int] | None:
        """How many connections are in use and how many are idle, in all event loops."""
        return self._pools.connections()

    def _turn(self, pool: Pool) -> Any:
        if not self._shared:
            return nullcontext()
        return _turns.of(id(pool.engine.pool))


def require_version(dialect: Dialect) -> None:
    """Refuses a server that is too old; SQLAlchemy has asked each for its version.

    Raises:
        DatabaseError: it is; the message says what is needed.
    """
    name = "PostgreSQL" if dialect.name == "postgresql" else ""
    if dialect.name in MYSQL_FAMILY:
        name = "MariaDB" if getattr(dialect, "is_mariadb", False) else "MySQL"
    found, oldest = getattr(dialect, "server_version_info", None), _OLDEST.get(name)
    if found and tuple(found[:3]) == (5, 5, 5) and len(found) > 3:
        found = found[3:]  # SQLAlchemy 2.0 leaves what MariaDB puts before its own for old replicas
    if not found or not oldest or tuple(found) >= oldest:
        return
    if name == "MariaDB" and found[0] < 10 and tuple(found[:2]) != (5, 5):
        return  # of Enterprise's 10.6.7-3 SQLAlchemy makes 6.7.3, and so on
    shown, needed = (".".join(map(str, version[:3])) for version in (found, oldest))
    raise DatabaseError(
        f"The server is {name} {shown}, which is too old: {name} {needed} or newer is needed."
        " Upgrade the server, or give the URL of another one."
    )


async def _give_back(conn: AsyncConnection, clock: Clock) -> None:
    try:
        await conn.close()
    finally:
        clock.stop()


def spare_rollbacks(engine: AsyncEngine) -> None:
    """Lets a connection that we have just committed go back to the pool without a round trip.

    Any other is rolled back: the application may use this engine too.

    Args:
        engine: of our own, made with ``pool_reset_on_return=None``.
    """
    event.listen(engine.sync_engine, "reset", _reset)


def _reset(connection: Any, record: Any, state: PoolResetState) -> None:
    committed = record.info.pop(_COMMITTED, False)
    # found by the garbage collector it cannot be spoken to, and is closed
    if state.asyncio_safe and not committed and not state.transaction_was_reset:
        connection.rollback()


def _commit(commit: Callable[[], object], once: bool) -> None:
    try:
        commit()
    except Exception as error:
        if once and is_lost(error):
            raise Undecided(error) from error
        raise


def _end(conn: Connection) -> None:
    """Ends what SQLAlchemy takes for a transaction: its ROLLBACK says nothing of our COMMIT."""
    try:
        conn.rollback()
    except Exception:
        conn.invalidate()


def _in_transaction(conn: Connection, work: Callable[[Connection], T], once: bool) -> T:
    """A transaction on a connection in autocommit, which stays as the application has set it."""
    conn.exec_driver_sql("START TRANSACTION")
    try:
        result = work(conn)
        _commit(lambda: conn.exec_driver_sql("COMMIT"), once)
    except Exception:
        if not conn.invalidated:
            conn.exec_driver_sql("ROLLBACK")
        raise
    return result
