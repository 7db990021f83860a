"""A database that is reached through an AsyncEngine: a server, or an engine of the application's.

Nothing is attached to an engine that was passed in. Its connections are borrowed with execution
options of our own, and go back as they came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import PoolResetState, SingletonThreadPool, StaticPool

from ..turns import Turns
from .base import Generic
from .faults import must_invalidate
from .sqlite import SQLite, finished

T = TypeVar("T")

# Tasks that share an engine's only connection must take turns, whichever service they go through.
_turns = Turns()

# In a pooled connection's `info`: the last thing it did was a commit of ours.
_COMMITTED = "adk_sessions.committed"


class EngineDatabase:
    """Runs operations on an AsyncEngine.

    Args:
        engine: the engine.
        statements: what decides whether an operation needs a transaction.
        owned: whether `close` disposes the engine.
        behind_pooler: whether a pooler may give each transaction another connection.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        statements: Generic,
        *,
        owned: bool,
        behind_pooler: bool = False,
    ) -> None:
        self.engine = engine
        self.behind_pooler = behind_pooler
        self._owned = owned
        self._statements = statements
        self._explicit = isinstance(statements, SQLite)
        self._sync_engine: Engine = engine.sync_engine
        # Set on each connection: options of the application's engine are set when it is lent, and
        # win over those of an engine that is made from it.
        self._isolation: str | None = None
        if statements.autocommit or self._explicit:
            self._isolation = "AUTOCOMMIT"
        self._shared = isinstance(engine.pool, StaticPool | SingletonThreadPool)
        # An idle AsyncSession is the public way into one greenlet for checkout, work and return;
        # an AsyncConnection makes three and a task.
        self._greenlet = AsyncSession()

    async def run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """One operation on a connection of the pool, in a transaction if it needs one."""
        async with self._turn():
            if self._statements.autocommit:
                return await self._greenlet.run_sync(lambda _: self._borrow(work, write))
            if self._explicit:
                # a driver with threads: cancelled in the middle, a connection would be lost
                running = self._greenlet.run_sync(lambda _: self._borrow(work, write))
                return await finished(asyncio.ensure_future(running), wait=True)
            conn = await self.engine.connect()
            try:
                return await conn.run_sync(self._work, work, write)
            finally:
                # its return to the pool awaits a ROLLBACK, and SQLAlchemy 2.0 loses a connection
                # that is cancelled there
                await finished(asyncio.ensure_future(conn.close()), wait=True)

    def _borrow(self, work: Callable[[Connection], T], write: bool) -> T:
        with self._sync_engine.connect() as conn:
            if self._isolation:
                conn.execution_options(isolation_level=self._isolation)
            return self._work(conn, work, write)

    def _work(self, conn: Connection, work: Callable[[Connection], T], write: bool) -> T:
        try:
            if self._explicit:
                return SQLite.transact(conn, work, write=write)
            if write and not self._statements.autocommit:
                if self._statements.commits_each_statement(conn):
                    result = _in_transaction(conn, work)
                else:
                    with conn.begin():
                        result = work(conn)
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
        async with self._turn():
            running = self._greenlet.run_sync(lambda _: self._submit(work))
            if self._explicit:
                return await finished(asyncio.ensure_future(running), wait=True)
            return await running

    def _submit(self, work: Callable[[Connection], T]) -> T:
        level = "READ COMMITTED" if self._statements.autocommit else self._isolation
        with self._sync_engine.connect() as conn:
            if level:
                conn.execution_options(isolation_level=level)
            return work(conn)

    def is_missing(self) -> bool:
        """A server is nothing that a connection makes."""
        return False

    async def close(self) -> None:
        """Disposes the engine if the service made it."""
        if self._owned:
            await self.engine.dispose()

    def _turn(self) -> Any:
        if not self._shared:
            return nullcontext()
        return _turns.of(id(self.engine.pool))


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


def _in_transaction(conn: Connection, work: Callable[[Connection], T]) -> T:
    """A transaction on a connection in autocommit, which stays as the application has set it."""
    conn.exec_driver_sql("START TRANSACTION")
    try:
        result = work(conn)
        conn.exec_driver_sql("COMMIT")
    except Exception:
        if not conn.invalidated:
            conn.exec_driver_sql("ROLLBACK")
        raise
    return result
