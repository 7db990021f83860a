"""A TCP proxy that counts what a client and a server make each other wait for.

    with wire.proxy("127.0.0.1", 5432) as line:
        service = SessionService(line.url("postgresql://…"))
        ...
        line.reset()
        await service.get_session(...)
        await line.settled()
        assert line.trips == 1

A round trip is a burst of requests, however many they are, and the answer that the client waited
for. Statements are not counted: a driver may send several at once, or ask the server for other
things (BEGIN, a ping, a statement's types) that no statement shows.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from socketserver import BaseRequestHandler, ThreadingTCPServer

from sqlalchemy import make_url

LOOPBACK = "127.0.0.1"
QUIET = 0.004  # seconds without a byte after which nothing more is coming


@dataclass(eq=False)
class _Connection:
    client: socket.socket
    server: socket.socket
    asking: bool = False  # the client has sent something since the server's last word
    dead: bool = False

    def close(self) -> None:
        self.dead = True
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Line:
    """Forwards connections to ``host:port`` from its own ``port``, and counts.

    It lives in threads of its own, so a test's event loop neither feeds it nor waits for it.

    Attributes:
        trips: bursts of requests that were answered.
        sent, received: bytes, as the client sees them.
        connections: how many were opened.
    """

    def __init__(self, host: str, port: int) -> None:
        self.trips = self.sent = self.received = self.connections = 0
        self.target = (host, port)
        self.port = 0
        self._lock = threading.Lock()
        self._open: set[_Connection] = set()
        self._moved = time.monotonic()

    def url(self, url: str) -> str:
        """The URL of a database on the server, by way of this proxy."""
        through = make_url(url).set(host=LOOPBACK, port=self.port)
        return through.render_as_string(hide_password=False)

    def reset(self) -> None:
        """Counts from zero; what is connected stays so."""
        with self._lock:
            self.trips = self.sent = self.received = self.connections = 0

    async def settled(self) -> None:
        """Waits until all is answered and silent, so what a call leaves behind it counts too."""
        async with asyncio.timeout(30):
            while True:
                await asyncio.sleep(QUIET / 4)
                with self._lock:
                    asking = any(one.asking and not one.dead for one in self._open)
                    if not asking and time.monotonic() - self._moved >= QUIET:
                        return

    def cut(self, *, silently: bool = False) -> int:
        """Ends every connection; how many there were.

        Args:
            silently: a client learns of it only when it next sends something, as from a firewall
                that has forgotten the connection.
        """
        with self._lock:
            ended = [one for one in self._open if not one.dead]
            for one in ended:
                one.dead = True
        for one in ended:
            if silently:
                with suppress(OSError):
                    one.server.shutdown(socket.SHUT_RDWR)
            else:
                one.close()
        return len(ended)

    def ended(self, timeout: float) -> None:
        """Waits for the threads of what was cut, which hold its sockets."""
        deadline = time.monotonic() + timeout
        while self._open and time.monotonic() < deadline:
            time.sleep(0.002)

    def carry(self, client: socket.socket) -> None:
        """Forwards one connection until an end of it closes."""
        with socket.create_connection(self.target) as server:
            connection = _Connection(client, server)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._open.add(connection)
            back = threading.Thread(target=self._back, args=(connection,), daemon=True)
            back.start()
            with suppress(OSError):
                while data := client.recv(65_536):
                    self._count(connection, sent=len(data))
                    if connection.dead:
                        break
                    server.sendall(data)
            connection.close()
            back.join()
            with self._lock:
                self._open.discard(connection)

    def _back(self, connection: _Connection) -> None:
        with suppress(OSError):
            while data := connection.server.recv(65_536):
                self._count(connection, received=len(data))
                connection.client.sendall(data)
        if not connection.dead:  # else it was ended here, and perhaps silently
            connection.close()

    def _count(self, connection: _Connection, *, sent: int = 0, received: int = 0) -> None:
        # before it is forwarded: what comes of it must not be counted first
        with self._lock:
            self._moved = time.monotonic()
            self.sent += sent
            self.received += received
            if received and connection.asking:
                self.trips += 1
            connection.asking = bool(sent)


@contextmanager
def proxy(host: str, port: int) -> Iterator[Line]:
    """A line to a server, up to the end of the block."""
    line = Line(host, port)

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                line.carry(self.request)

    class Listener(ThreadingTCPServer):
        daemon_threads = True

    with Listener((LOOPBACK, 0), Handler) as listener:
        line.port = listener.server_address[1]
        accepting = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        accepting.start()
        try:
            yield line
        finally:
            listener.shutdown()
            accepting.join()
            line.cut()
            line.ended(5)
