"""A database that is reached through an AsyncEngine: a server, or an engine of the application's.

Nothing is attached to an engine that was passed in. Its connections are borrowed with execution
options of our own, and go back as they came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from ..turns import Turns
from .base import Generic
from .faults import must_invalidate
from .sqlite import SQLite, finished

T = TypeVar("T")

# Tasks that share an engine's only connection must take turns, whichever service they go through.
_turns = Turns()


class EngineDatabase:
    """Runs operations on an AsyncEngine.

    Args:
        engine: the engine.
        statements: what decides whether an operation needs a transaction.
        owned: whether `close` disposes the engine.
    """

    def __init__(self, engine: AsyncEngine, statements: Generic, *, owned: bool) -> None:
        self.engine = engine
        self._owned = owned
        self._statements = statements
        self._explicit = isinstance(statements, SQLite)
        self._sync_engine: Engine = engine.sync_engine
        if statements.autocommit or self._explicit:
            self._sync_engine = engine.sync_engine.execution_options(isolation_level="AUTOCOMMIT")
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
            return self._work(conn, work, write)

    def _work(self, conn: Connection, work: Callable[[Connection], T], write: bool) -> T:
        try:
            if self._explicit:
                return SQLite.transact(conn, work, write=write)
            if write and not self._statements.autocommit:
                if self._statements.commits_each_statement(conn):
                    return _in_transaction(conn, work)
                with conn.begin():
                    return work(conn)
            return work(conn)
        except Exception as error:
            if must_invalidate(error):
                conn.invalidate()
            raise

    async def submit(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """Runs ``work`` on a connection that it controls itself, transactions included."""
        async with self._turn():
            return await self._greenlet.run_sync(lambda _: self._submit(work))

    def _submit(self, work: Callable[[Connection], T]) -> T:
        engine = self._sync_engine
        if self._statements.autocommit:
            engine = self.engine.sync_engine.execution_options(isolation_level="READ COMMITTED")
        with engine.connect() as conn:
            return work(conn)

    async def close(self) -> None:
        """Disposes the engine if the service made it."""
        if self._owned:
            await self.engine.dispose()

    def _turn(self) -> Any:
        if not self._shared:
            return nullcontext()
        return _turns.of(id(self.engine.pool))


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
