"""What wakes those who follow sessions: time, the end of the service, or PostgreSQL's NOTIFY.

A notice says that something was appended to a session, and which is told by a hash alone. Nothing
depends on notices: one that is lost makes an event late.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from .reads import Tables
from .rows import Key
from .sqlite import finished

logger = logging.getLogger(__name__)

# Seconds from one look at the session to the next while notices come: the safety net.
SAFETY = 5.0
# Seconds after which a connection that has been silent is asked whether it still is one.
_SILENCE = 30.0
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0


def channel_of(tables: Tables) -> str:
    """The channel of the notices about a set of tables.

    Not of their schema: there are two ways to name that, and a name of a channel is short.
    """
    return f"adk_sessions_{hashlib.blake2b(tables.events.name.encode(), digest_size=8).hexdigest()}"


def notice_of(key: Key) -> str:
    """What a notice says of a session: nothing that anybody could read."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


class Bell:
    """What one watcher waits for, in the event loop that it was made in.

    Attributes:
        ended: the service was closed.
    """

    def __init__(self, listener: _Listener | None = None) -> None:
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()
        self._listener = listener

    @property
    def listening(self) -> bool:
        """Whether notices come at the moment."""
        return self._listener is not None and self._listener.listening

    def ring(self) -> None:
        self._rung.set()

    def end(self) -> None:
        """Says that the service was closed; in any thread."""
        self.ended = True
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.ring)

    async def wait(self, seconds: float) -> None:
        """Returns when it is rung, or has been since the last call, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()


class Bells:
    """The watchers of one service, which nothing wakes before their time but its end."""

    def __init__(self) -> None:
        self._bells: set[Bell] = set()

    @asynccontextmanager
    async def bell(self, key: Key) -> AsyncIterator[Bell]:
        """A bell for a watcher of a session."""
        async with self._kept(Bell()) as bell:
            yield bell

    @asynccontextmanager
    async def _kept(self, bell: Bell) -> AsyncIterator[Bell]:
        self._bells.add(bell)
        try:
            yield bell
        finally:
            self._bells.discard(bell)

    async def close(self) -> None:
        """Ends all watchers."""
        for bell in list(self._bells):
            bell.end()


class Notices(Bells):
    """The watchers of a service whose appends are told to those of all services.

    Args:
        engine: finds the engine of the running event loop.
        channel: where notices come.
    """

    def __init__(self, engine: Callable[[], AsyncEngine], channel: str) -> None:
        super().__init__()
        self._engine = engine
        self._channel = channel
        self._listeners: WeakKeyDictionary[asyncio.AbstractEventLoop, _Listener] = (
            WeakKeyDictionary()
        )

    @asynccontextmanager
    async def bell(self, key: Key) -> AsyncIterator[Bell]:
        loop = asyncio.get_running_loop()
        listener = self._listeners.get(loop)
        if listener is None:
            listener = self._listeners[loop] = _Listener(self._engine, self._channel)
        notice = notice_of(key)
        async with self._kept(Bell(listener)) as bell:
            listener.add(notice, bell)
            try:
                yield bell
            finally:
                await listener.discard(notice, bell)

    async def close(self) -> None:
        await super().close()
        here = asyncio.get_running_loop()
        for loop, listener in list(self._listeners.items()):
            if loop is here:
                await listener.stop()
            # those of other loops end with their watchers, which have just been told


class _Listener:
    """One connection that hears notices, for all watchers of a service in one event loop."""

    def __init__(self, engine: Callable[[], AsyncEngine], channel: str) -> None:
        self.listening = False
        self._engine = engine
        self._channel = channel
        self._bells: dict[str, set[Bell]] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, notice: str, bell: Bell) -> None:
        self._bells.setdefault(notice, set()).add(bell)
        if self._task is None:
            self._task = asyncio.create_task(self._listen())

    async def discard(self, notice: str, bell: Bell) -> None:
        """Takes a watcher's bell away; the last one's takes the connection with it."""
        bells = self._bells.get(notice, set())
        bells.discard(bell)
        if not bells:
            self._bells.pop(notice, None)
        if not self._bells:
            await self.stop()

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _listen(self) -> None:
        delay, told = _FIRST_DELAY, False
        while True:
            try:
                async with _apart(self._engine()) as connection:
                    await connection.add_listener(self._channel, self._heard)
                    delay, told = _FIRST_DELAY, False
                    self._turn(True)
                    await _ended(connection)
                name = "ConnectionError"
            except Exception as error:  # it is made again, whatever it is
                name = type(error).__name__
            finally:
                self._turn(False)
            if not told:
                told = True
                logger.warning(
                    "The connection that listens for new events has failed (%s); they come later"
                    " until there is another one.",
                    name,
                )
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _turn(self, listening: bool) -> None:
        """Lets everybody look at once: what came while nobody listened has not been told."""
        if self.listening != listening:
            self.listening = listening
            for bells in self._bells.values():
                for bell in bells:
                    bell.ring()

    def _heard(self, _connection: Any, _pid: int, _channel: str, notice: str) -> None:
        for bell in self._bells.get(notice, ()):
            bell.ring()


@asynccontextmanager
async def _apart(engine: AsyncEngine) -> AsyncIterator[Any]:
    """A new connection of the driver's that is not, or no longer, its pool's."""
    conn = await engine.connect()
    try:
        driver = (await conn.get_raw_connection()).driver_connection
        await conn.run_sync(Connection.detach)
        yield driver
    finally:
        await finished(asyncio.ensure_future(conn.close()), wait=True)


async def _ended(connection: Any) -> None:
    """Returns or raises when the connection breaks, also if nobody says so."""
    ended = asyncio.Event()
    connection.add_termination_listener(lambda _: ended.set())
    while not connection.is_closed():
        try:
            async with asyncio.timeout(_SILENCE):
                await ended.wait()
        except TimeoutError:
            await connection.execute("SELECT 1", timeout=_SILENCE)
