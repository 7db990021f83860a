"""An engine for each event loop and each process: a connection works where it was made only.

An engine that the service makes from a URL is made again for a second event loop, by the same
recipe, and closed when its loop is. In a forked child the parent's are kept, and never touched: to
close or even to forget them would speak on the parent's sockets, and take them out of its loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from weakref import WeakSet, finalize

from sqlalchemy import Dialect, NullPool, QueuePool
from sqlalchemy.ext.asyncio import AsyncEngine

from ..errors import ConfigurationError
from .hosts import Connector

# Seconds for a server to hear that a connection is closed.
_GRACE = 2.0

_ELSEWHERE = (
    "The engine has connections that belong to another event loop, or to the process that this one"
    " was forked from. Give the service a URL: it then keeps connections for each loop and each"
    " process. Or make the engine with poolclass=NullPool; or await engine.dispose() before another"
    " loop begins or the process forks; or make an engine and a service for each."
)


class Pool:
    """An engine, and where its connections live.

    Attributes:
        engine: the engine.
        connector: what makes its connections; None if we do not.
        loop: the event loop that has used it; None for none yet.
    """

    def __init__(self, engine: AsyncEngine, connector: Connector | None = None) -> None:
        self.engine = engine
        self.sync_engine = engine.sync_engine
        self.connector = connector
        self.loop: asyncio.AbstractEventLoop | None = None
        self._life: AsyncGenerator[None, None] | None = None

    def claim(self, loop: asyncio.AbstractEventLoop, *, owned: bool) -> None:
        """Says that its connections are going to live in the running loop."""
        self.loop = loop
        if owned:
            for one in list(_open):
                if one.loop is not None and one.loop.is_closed():
                    _open.discard(one)
            _open.add(self)
            # a loop that ends (asyncio.run's, for one) first closes the generators that it has seen
            self._life = self._live()
            with suppress(StopIteration):
                self._life.__anext__().send(None)

    async def _live(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self.close()
            _open.discard(self)

    def end(self) -> None:
        """Ends the connections; for the thread of their loop, which may itself be about to end."""
        if self.connector is not None:
            self.connector.abandon()
        _open.discard(self)

    async def close(self) -> None:
        """Closes the connections that are idle, in the loop that they belong to."""
        closing = asyncio.ensure_future(self.engine.dispose())
        try:
            await asyncio.wait([closing], timeout=_GRACE)
        finally:
            if self.connector is not None and (not closing.done() or closing.cancelled()):
                self.connector.abandon()
        if not closing.cancelled():  # as a loop that ends does; whoever waits here was not
            await closing

    @property
    def is_connected(self) -> bool:
        pool = self.engine.pool
        if isinstance(pool, QueuePool):
            return pool.checkedin() + pool.checkedout() > 0
        return not isinstance(pool, NullPool)


# Kept until their loop ends, or the garbage collector would break off what nobody has closed. In a
# forked child the parent's loops never end.
_open: set[Pool] = set()
_all: WeakSet[Pools] = WeakSet()


class Pools:
    """The engines of one database.

    Args:
        first: the engine to begin with.
        make: makes another one, with its connections; None for an engine of the application's.
        threaded: whether the driver's connections work in any event loop.
    """

    def __init__(
        self, first: Pool, make: Callable[[], Pool] | None, *, threaded: bool = False
    ) -> None:
        self._make = make
        self._threaded = threaded
        self._pools = [first]
        self._last: Pool | None = first
        self._forked = False
        self._lock = threading.Lock()
        _all.add(self)
        finalize(self, _let_go, self._pools).atexit = False

    def here(self) -> Pool:
        """The engine of the running event loop.

        Raises:
            ConfigurationError: it is the application's, and has connections of another one.
        """
        loop = asyncio.get_running_loop()
        pool = self._last
        if pool is not None and pool.loop is loop:
            return pool
        with self._lock:
            pool = self._last = self._lent(loop) if self._make is None else self._own(loop)
            return pool

    @property
    def latest(self) -> Pool:
        """The engine of the running event loop; outside of one that of the last."""
        if self._make is None:
            return self._pools[0]
        with suppress(RuntimeError):
            return self.here()
        with self._lock:
            if self._last is None:
                self._last = self._added()
            return self._last

    def _lent(self, loop: asyncio.AbstractEventLoop) -> Pool:
        (pool,) = self._pools
        elsewhere = self._forked or (pool.loop is not None and not self._threaded)
        if elsewhere and pool.is_connected:
            raise ConfigurationError(_ELSEWHERE)
        self._forked = False
        pool.claim(loop, owned=False)
        return pool

    def _own(self, loop: asyncio.AbstractEventLoop) -> Pool:
        open_loops = [one for one in self._pools if one.loop is None or not one.loop.is_closed()]
        self._pools[:] = open_loops
        for pool in self._pools:
            if pool.loop is loop:
                return pool
        unclaimed = (one for one in self._pools if one.loop is None)
        pool = next(unclaimed, None) or self._added()
        pool.claim(loop, owned=True)
        return pool

    def _added(self) -> Pool:
        assert self._make is not None
        pool = self._make()
        self._pools.append(pool)
        return pool

    async def close(self) -> None:
        """Closes what the service has made, in this loop and in those that other threads run."""
        if self._make is None:
            return
        here = asyncio.get_running_loop()
        for pool in list(self._pools):
            if pool.loop is None or pool.loop is here:
                await pool.close()
            elif pool.loop.is_running():
                closing = pool.close()
                try:
                    there = asyncio.run_coroutine_threadsafe(closing, pool.loop)
                except RuntimeError:  # it has just been closed, and has seen to it
                    closing.close()
                    continue
                # a loop that ends meanwhile cancels it, which is no cancelling of this task
                closed = asyncio.wrap_future(there)
                await asyncio.wait([closed], timeout=2 * _GRACE)
                if not closed.cancel() and not closed.cancelled():
                    closed.exception()  # of no consequence

    @property
    def dialect(self) -> Dialect:
        """That of the engine which was last used."""
        return (self._last or self.latest).sync_engine.dialect

    def connections(self) -> tuple[int, int] | None:
        """How many are in use and how many are idle; None where there is no queue of them."""
        pools = [one.engine.pool for one in list(self._pools)]
        queues = [pool for pool in pools if isinstance(pool, QueuePool)]
        if not queues:
            return None
        return sum(q.checkedout() for q in queues), sum(q.checkedin() for q in queues)

    def forked(self) -> None:
        """Leaves to the parent what is the parent's; in the child, before anything else runs."""
        self._lock = threading.Lock()
        self._forked = True
        self._last = None
        if self._make is not None:
            self._pools[:] = [one for one in self._pools if one.loop is None]


def _let_go(pools: list[Pool]) -> None:
    """Ends the engines of a service that was dropped, each in its loop."""
    for pool in pools:
        if pool.loop is not None:
            with suppress(RuntimeError):  # it is closed
                pool.loop.call_soon_threadsafe(pool.end)


def _forked() -> None:
    for pools in list(_all):
        pools.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
