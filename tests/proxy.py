"""A TCP proxy that loses a chosen request or its reply: the network's worst, at a known moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

Lose = Literal["request", "reply"]


@dataclass
class _Cut:
    lose: Lose
    meanwhile: Callable[[], Awaitable[object]] | None = None
    marker: bytes = b""
    exchange: int = 0  # 0: the marker decides

    def is_due(self, data: bytes, begins: bool) -> bool:
        if not self.exchange:
            return self.marker in data
        self.exchange -= begins
        return not self.exchange


@dataclass
class _Talk:
    """One connection's two directions."""

    replied: asyncio.Queue[_Cut]
    asking: bool = False  # the client has sent something since the server's last word


class Proxy:
    """Forwards connections to ``host:port`` from its own ``port`` on 127.0.0.1.

    Attributes:
        fired: how many connections were cut as planned; a test must look at it.
        lost: the request at which the last one was.
    """

    def __init__(self, host: str, port: int) -> None:
        self.fired = 0
        self.lost = b""
        self._target = (host, port)
        self._cut: _Cut | None = None
        self._lines: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._answers = asyncio.Event()
        self._answers.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)
        if exc_value is None and self._failure is not None:
            raise self._failure

    def cut(
        self,
        marker: str,
        *,
        lose: Lose,
        meanwhile: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """Cut the first connection on which a client sends ``marker``, once.

        Args:
            marker: part of a statement or of its parameters.
            lose: the request, which the server then never sees, or the server's reply to it.
            meanwhile: awaited at that moment, before the client can notice.
        """
        self._cut = _Cut(lose, meanwhile, marker.encode())

    def refuse(self) -> None:
        """Let nobody in any more; who is connected stays so."""
        self._server.close()

    def hang(self) -> None:
        """Accept connections, take what is sent, and answer nothing, until `resume`."""
        self._answers.clear()

    def resume(self) -> None:
        """Answer again, also what was sent meanwhile."""
        self._answers.set()

    async def deserted(self) -> None:
        """Waits until nobody is connected any more: a farewell would be an exchange."""
        async with asyncio.timeout(30):
            while self._lines:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def cut_exchange(self, number: int, *, lose: Lose) -> None:
        """Cut the connection that has the so many-th exchange from now on, once.

        An exchange is what a client sends until the server answers, in however many messages.

        Args:
            number: 1 is the next.
            lose: the request or the reply, as for `cut`.
        """
        self._cut = _Cut(lose, exchange=number)

    async def _accept(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        line = asyncio.current_task()
        assert line is not None
        self._lines.add(line)
        writers = [back]
        pumps: list[asyncio.Task[None]] = []
        # A handler that ends as cancelled is an error to asyncio's streams
        with suppress(OSError, asyncio.CancelledError):
            try:
                server, forth = await asyncio.open_connection(*self._target)
                writers.append(forth)
                talk = _Talk(asyncio.Queue())
                pumps += [
                    asyncio.create_task(self._forth(client, forth, talk)),
                    asyncio.create_task(self._back(server, back, talk)),
                ]
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for writer in writers:
                    writer.transport.abort()
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        self._lines.discard(line)

    async def _forth(
        self,
        client: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        talk: _Talk,
    ) -> None:
        """Requests, until one must be lost."""
        tail = b""
        while data := await client.read(65_536):
            cut = self._cut
            begins, talk.asking = not talk.asking, True
            if cut is not None:
                found = cut.is_due(tail + data, begins)
                tail = (tail + data)[1 - len(cut.marker) :]
                if found:
                    self._cut, self.lost = None, data
                    if cut.lose == "request":
                        return await self._fire(cut)
                    talk.replied.put_nowait(cut)
            server.write(data)
            await server.drain()

    async def _back(
        self,
        server: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        talk: _Talk,
    ) -> None:
        """Replies, until one must be lost."""
        while data := await server.read(65_536):
            await self._answers.wait()
            talk.asking = False
            if not talk.replied.empty():
                return await self._fire(talk.replied.get_nowait())
            client.write(data)
            await client.drain()

    async def _fire(self, cut: _Cut) -> None:
        self.fired += 1
        if cut.meanwhile is not None:
            try:
                await cut.meanwhile()
            except BaseException as error:
                self._failure = error
