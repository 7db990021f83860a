"""asyncio locks by key: tasks that want the same thing take turns, others do not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from weakref import WeakKeyDictionary, WeakValueDictionary


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
