"""Transactions of SQLite, and the threads that they run on, where writes are committed together.

A commit waits for the disk, longer than all the rest of a small write takes. So the calls that came
while one was under way share the next: one transaction, a savepoint for each, one commit, and
nobody is answered before it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

T = TypeVar("T")

#: around a call: a transaction that writes, one that reads, or what it does itself
Kind = Literal["write", "read", "own"]

# Calls of one commit: whoever is first in it waits for all of them.
GROUP = 64


def is_ours(conn: Connection) -> bool:
    """Whether a connection belongs to a lane: an application's engine has an async driver."""
    return conn.dialect.driver == "pysqlite"


def execute(conn: Connection, sql: str, parameters: Sequence[Any] = ()) -> Any:
    """Runs a statement as it is, on the driver's own cursor where nobody else can be watching.

    SQLAlchemy's way around it takes 30 microseconds, which is more than most statements do.

    Raises:
        DBAPIError: the driver's error, as SQLAlchemy raises it.
    """
    if not is_ours(conn):
        return conn.exec_driver_sql(sql, tuple(parameters))
    cursor = conn.connection.cursor()
    try:
        cursor.execute(sql, parameters)
    except sqlite3.Error as error:
        raise DBAPIError.instance(
            sql, None, error, sqlite3.Error, hide_parameters=True, dialect=conn.dialect
        ) from error
    return cursor


def in_transaction(conn: Connection) -> bool:
    """Whether SQLite is in one: after some errors, a full disk for one, it has rolled back."""
    return bool(conn.connection.driver_connection.in_transaction)  # type: ignore[union-attr]


@contextmanager
def transaction(conn: Connection, *, write: bool = True) -> Iterator[None]:
    """One transaction of an AUTOCOMMIT connection, all of it or nothing.

    A writer's takes the lock at its beginning: a deferred transaction that reads and then writes
    fails as busy at once, or with the driver's defaults loses updates.
    """
    if not conn.in_transaction():
        conn.begin()
    if in_transaction(conn):
        execute(conn, "ROLLBACK")  # a hook of the application's own has begun one
    execute(conn, "BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
        execute(conn, "COMMIT")
    except BaseException:
        if in_transaction(conn):
            execute(conn, "ROLLBACK")
        raise


class _Call(NamedTuple):
    work: Callable[[Connection], Any] | None  # None closes the connection
    kind: Kind
    future: asyncio.Future[Any] | None


class _Outcome(NamedTuple):
    result: Any
    error: BaseException | None = None


class _Worker:
    """One connection and the thread that alone uses it."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._next: _Call | None = None  # taken from the queue, but not of that group
        # a daemon, or a service that is never closed would keep the process from ending
        threading.Thread(target=self._serve, name="adk_sessions-sqlite", daemon=True).start()

    def submit(self, call: _Call) -> None:
        self._calls.put(call)

    def stop(self) -> None:
        """Closes the connection and ends the thread when all that came before is done."""
        self._calls.put(_Call(None, "own", None))

    def _serve(self) -> None:
        while self._serve_group():
            pass

    def _serve_group(self) -> bool:
        calls = self._take()
        try:
            outcomes = self._outcomes(calls)
        except BaseException as error:  # nothing of it is stored
            outcomes = [_Outcome(None, error)] * len(calls)
        _answer(calls, outcomes)
        return calls[0].work is not None

    def _take(self) -> list[_Call]:
        """The next call, and if it may share a commit those that wait behind it and may too."""
        calls = [self._next or self._calls.get()]
        self._next = None
        while calls[0].kind == "write" and len(calls) < GROUP:
            try:
                call = self._calls.get_nowait()
            except Empty:
                break
            if call.kind != "write":
                self._next = call
                break
            calls.append(call)
        return calls

    def _outcomes(self, calls: list[_Call]) -> list[_Outcome]:
        work, kind, _ = calls[0]
        if work is None:
            self._disconnect()
            return [_Outcome(None)]
        conn = self._connection
        if conn is None:
            conn = self._connection = self._connect()
        if kind == "own":
            return [_Outcome(work(conn))]
        with transaction(conn, write=kind == "write"):
            if len(calls) == 1:
                return [_Outcome(work(conn))]
            return [_part(conn, call.work) for call in calls if call.work is not None]

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            connection.engine.dispose()


def _part(conn: Connection, work: Callable[[Connection], Any]) -> _Outcome:
    """One call's part of a transaction: its result, or its error and nothing of it stored.

    Raises:
        Exception: SQLite has rolled back the transaction, and with it everybody's part.
    """
    execute(conn, "SAVEPOINT part")
    try:
        outcome = _Outcome(work(conn))
    except Exception as error:
        if not in_transaction(conn):
            raise
        execute(conn, "ROLLBACK TO part")
        outcome = _Outcome(None, error)
    execute(conn, "RELEASE part")
    return outcome


def _answer(calls: list[_Call], outcomes: list[_Outcome]) -> None:
    """Hands each call its outcome, with one wake-up of each event loop."""
    answers: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], _Outcome]]] = {}
    for call, outcome in zip(calls, outcomes, strict=True):
        if call.future is not None:
            answers.setdefault(call.future.get_loop(), []).append((call.future, outcome))
    for loop, answered in answers.items():
        with suppress(RuntimeError):  # it is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, answered)


def _resolve(answers: list[tuple[asyncio.Future[Any], _Outcome]]) -> None:
    for future, (result, error) in answers:
        if future.done():  # cancelled
            continue
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration):  # which a future refuses
            future.set_exception(RuntimeError("a call raised StopIteration"))
        else:
            future.set_exception(error)


class Lane:
    """Where calls queue for a worker, first come, first served.

    Closing takes the worker away whole, with what it has still to do; a call that comes later gets
    another connection in another thread. Calls may come from any thread and event loop.

    Args:
        connect: makes the connection, in the worker's thread.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def submit(self, work: Callable[[Connection], T], kind: Kind) -> asyncio.Future[T]:
        """Queues ``work``; the future of its result."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._worker is None:
                self._worker = _Worker(self._connect)
                # for a service that is dropped and was not closed
                self._unused = weakref.finalize(self, self._worker.stop)
            self._worker.submit(_Call(work, kind, future))
        return future

    async def close(self) -> None:
        """Closes the connection when what is queued is done."""
        with self._lock:
            worker, self._worker = self._worker, None
            if worker is None:
                return
            self._unused.detach()
            closed = asyncio.get_running_loop().create_future()
            worker.submit(_Call(None, "own", closed))
        await closed
