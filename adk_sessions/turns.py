"""asyncio: tasks that want the same thing take turns, and what was begun is finished."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Hashable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

T = TypeVar("T")


class Turns:
    """Locks that exist while somebody holds or awaits them, in each event loop its own."""

    def __init__(self) -> None:
        self._loops: WeakKeyDictionary[
            asyncio.AbstractEventLoop, WeakValueDictionary[Hashable, asyncio.Lock]
        ] = WeakKeyDictionary()

    def of(self, key: Hashable) -> asyncio.Lock:
        """The lock for ``key``; keep a reference to it for as long as it is needed."""
        locks = self._loops.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        return locks.setdefault(key, asyncio.Lock())


async def settled(work: Coroutine[Any, Any, T], *, patience: float) -> T:
    """Awaits ``work``; a caller that is cancelled meanwhile goes on when it is done.

    Args:
        work: what is better finished than broken off.
        patience: seconds that it may take once the caller is cancelled; then it is cancelled too.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await _done(task, patience)
        if not task.done():
            task.cancel()
            await _done(task, None)
        if not task.cancelled():
            task.exception()  # nobody else will ask for it
        raise


async def _done(task: asyncio.Task[Any], patience: float | None) -> None:
    """Waits, however often the waiting one is cancelled: once is enough."""
    loop = asyncio.get_running_loop()
    end = None if patience is None else loop.time() + patience
    while not task.done() and (end is None or loop.time() < end):
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=None if end is None else end - loop.time())
