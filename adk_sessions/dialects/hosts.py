"""How connections of our own are made and given up: no host, and no silence, is waited for forever.

A driver that is given several hosts may spend all of its time on a first one that hangs. Here each
has a time of its own, and what has connected must still be what was asked for: a former primary may
have come back as a standby.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

from .faults import Fault, Undecided, classify

# Seconds for one host, where neither the URL nor the application says.
CONNECT_TIMEOUT = 10.0

# The drivers that are known here, each with its argument for the same.
DRIVERS = {"asyncpg": "timeout", "asyncmy": "connect_timeout"}

# asyncmy takes no None.
_FOREVER = 31_536_000

_PROBE = "SELECT @@GLOBAL.read_only"


class TargetServerAttributeNotMatched(ConnectionError):
    """A host is not what is asked for, as yet: a standby may be about to be promoted."""


def abandon(connection: Any) -> None:
    """Ends a driver's connection without a word to the server, which may not be listening."""
    if hasattr(connection, "terminate"):
        connection.terminate()
        return
    # closing it would first send what is still to be sent
    transport = getattr(connection, "_transport", None)
    transport = transport or getattr(getattr(connection, "_writer", None), "transport", None)
    if transport is not None:
        transport.abort()
    connection.close()


class Connector:
    """Connects to the first host that can be used: an ``async_creator_fn`` of SQLAlchemy's.

    Args:
        driver: one of `DRIVERS`.
        timeout: seconds for each host; None for what the driver's arguments say.
        writes: whether hosts that cannot be written to are passed over, if there are several and
            the arguments do not say which are wanted.
        connect: the driver's function, or what the application has put in its place.
    """

    def __init__(
        self,
        driver: str,
        *,
        timeout: float | None = None,
        writes: bool = True,
        connect: Callable[..., Any] | None = None,
    ) -> None:
        self._driver = driver
        self._timeout = timeout
        self._writes = writes
        self._connect = connect or importlib.import_module(driver).connect
        self._made: WeakSet[Any] = WeakSet()
        self._starting: dict[int, asyncio.TimerHandle] = {}

    def attach(self, engine: AsyncEngine) -> None:
        """Takes note of what the engine connects; it is of our own."""
        # called after what SQLAlchemy itself asks a new connection
        event.listen(engine.sync_engine, "connect", self._started)

    async def __call__(self, *args: Any, **arguments: Any) -> Any:
        limit = arguments.pop(DRIVERS[self._driver], CONNECT_TIMEOUT)
        if self._timeout is not None:
            limit = self._timeout
        hosts = _listed(arguments)
        failure: Exception | None = None
        for host in hosts:
            try:
                connection = await self._one(args, {**arguments, **host}, limit, len(hosts) > 1)
            except Exception as error:
                refused = type(error).__name__ == TargetServerAttributeNotMatched.__name__
                if not refused and not _is_passed_over(error):
                    raise
                told = TargetServerAttributeNotMatched() if refused else error
                # what answers, and is the wrong one, says more than what does not
                if not isinstance(failure, TargetServerAttributeNotMatched):
                    failure = told
                continue
            self._made.add(connection)
            if limit is not None:
                timer = asyncio.get_running_loop().call_later(limit, self._give_up, connection)
                self._starting[id(connection)] = timer
            return connection
        assert failure is not None
        raise failure from None

    async def _one(
        self, args: Any, arguments: dict[str, Any], limit: float | None, several: bool
    ) -> Any:
        if self._driver == "asyncpg":
            if several and self._writes and "PGTARGETSESSIONATTRS" not in os.environ:
                arguments.setdefault("target_session_attrs", "read-write")
            return await self._connect(*args, **arguments, timeout=limit)
        async with asyncio.timeout(limit):
            connection = await self._connect(
                *args, **arguments, connect_timeout=_FOREVER if limit is None else limit
            )
            if several:
                await self._require(connection)
            return connection

    async def _require(self, connection: Any) -> None:
        """Asks a host if it works at all: a cluster's node lets in though it is not ready."""
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(_PROBE)
                (read_only,) = await cursor.fetchone()
            # a number, or on newer servers a word
            if self._writes and str(read_only).upper() not in ("0", "OFF"):
                raise TargetServerAttributeNotMatched
        except BaseException:
            abandon(connection)
            raise

    def _started(self, adapted: Any, _record: Any) -> None:
        timer = self._starting.pop(id(adapted.driver_connection), None)
        if timer is not None:
            timer.cancel()

    def _give_up(self, connection: Any) -> None:
        self._starting.pop(id(connection), None)
        abandon(connection)

    def abandon(self) -> None:
        """Ends all connections, without a word to the server."""
        for connection in list(self._made):
            with suppress(Exception):  # its event loop is closed
                abandon(connection)


class Clock:
    """The time that a call has on a connection; when it is over, the connection is given up.

    To the engine that is a server which has gone, so it also renews those that are idle when they
    are next asked for: nobody waits for each of them in turn.

    Args:
        seconds: None for as long as it takes.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self.over = False

    def start(self, conn: Connection) -> None:
        if self._seconds is not None:
            connection = conn.connection.driver_connection
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self._end, connection)

    def _end(self, connection: Any) -> None:
        self.over = True
        abandon(connection)

    def stop(self) -> None:
        """For before the connection is anybody else's."""
        if self._timer is not None:
            self._timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if self.over and isinstance(error, Exception) and not isinstance(error, Undecided):
            raise TimeoutError from None


def _listed(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Each host's arguments; they come as lists, or as text with commas."""
    hosts, ports = (
        value.split(",") if isinstance(value := arguments.get(name), str) else value
        for name in ("host", "port")
    )
    if not isinstance(hosts, list) or len(hosts) < 2:
        return [{}]
    if not isinstance(ports, list):
        ports = [ports]
    if len(ports) < len(hosts):
        ports = ports * len(hosts)
    return [
        {"host": host} | ({} if port is None else {"port": int(port)})
        for host, port in zip(hosts, ports, strict=False)
    ]


def _is_passed_over(error: Exception) -> bool:
    """Whether another host may do better: it cannot where a password is wrong."""
    passing = (Fault.LOST, Fault.UNAVAILABLE)
    return isinstance(error, OSError | TimeoutError) or classify(error) in passing
