"""A TCP proxy that makes each round trip longer, and counts round trips.

    with running_link("127.0.0.1", 5432, delay_ms=1) as link:
        ...  # connect to 127.0.0.1:link.port
        link.reset()
        ...
        link.trips()

It runs in a process of its own, so that the event loop which is measured does not also forward
bytes, and with blocking sockets in threads, since asyncio's timers are too coarse for 1 ms.

The delay is put on the requests' way. Each piece is stamped when it is read and is delivered at
that time plus the delay: order is kept, pieces that follow each other at once travel together, and
a round trip takes the delay longer, however many pieces its request came in.
"""

from __future__ import annotations

import ctypes
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LOOPBACK = "127.0.0.1"
PIECE = 262_144
_SET_TIMER_SLACK = 29  # prctl: Linux lets a sleep overrun by 50 microseconds otherwise


class _Trips:
    """Bursts of requests that were answered, over all connections."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.count += 1


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket, delay: float, trips: _Trips):
        self.client, self.server, self.delay, self.trips = client, server, delay, trips
        self.asking = False  # the client has sent something since the server's last word
        self.late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for work in (self.read_requests, self.deliver_requests, self.forward_replies):
            threading.Thread(target=self._until_closed, args=(work,), daemon=True).start()

    def _until_closed(self, work: Callable[[], None]) -> None:
        with suppress(OSError):
            work()
        self.late.put((0.0, b""))
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def read_requests(self) -> None:
        while piece := self.client.recv(PIECE):
            self.asking = True
            if self.delay:
                self.late.put((time.perf_counter() + self.delay, piece))
            else:
                self.server.sendall(piece)

    def deliver_requests(self) -> None:
        _sleep_precisely()
        while True:
            due, piece = self.late.get()
            if not piece:
                return
            if (rest := due - time.perf_counter()) > 0:
                time.sleep(rest)
            self.server.sendall(piece)

    def forward_replies(self) -> None:
        while piece := self.server.recv(PIECE):
            if self.asking:
                self.asking = False
                self.trips.add()
            self.client.sendall(piece)


def _sleep_precisely() -> None:
    """Asks Linux to end this thread's sleeps on time; elsewhere they end a little later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0)


def _accept(listener: socket.socket, target: tuple[str, int], delay: float, trips: _Trips) -> None:
    while True:
        client, _ = listener.accept()
        try:
            _Connection(client, socket.create_connection(target, 10), delay, trips)
        except OSError:
            client.close()


def main(host: str, port: int, delay_ms: float) -> None:
    """Prints the port to connect to, then answers each line of input with the count of trips."""
    trips = _Trips()
    listener = socket.create_server((LOOPBACK, 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    arguments = (listener, (host, port), delay_ms / 1000, trips)
    threading.Thread(target=_accept, args=arguments, daemon=True).start()
    for _ in sys.stdin:
        print(trips.count, flush=True)


class Link:
    """A proxy in another process."""

    def __init__(self, process: subprocess.Popen[str], delay_ms: str) -> None:
        self._process = process
        self._delay_ms = delay_ms
        self.port = int(self._answer())
        self._start = 0

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the delaying proxy ended")
        return line

    def _count(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._answer())

    def reset(self) -> None:
        self._start = self._count()

    def trips(self) -> int:
        """Round trips since `reset`."""
        return self._count() - self._start

    def measure(self) -> float:
        """Milliseconds that a small round trip through the proxy takes: its median, by an echo."""
        with socket.create_server((LOOPBACK, 0)) as echo:
            host, port = echo.getsockname()
            command = [sys.executable, __file__, host, str(port), self._delay_ms]
            with _started(command) as link, socket.create_connection((LOOPBACK, link.port)) as near:
                near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                far, _ = echo.accept()
                with far:
                    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    took = [_echoed(near, far) for _ in range(101)]
        return round(sorted(took)[len(took) // 2] * 1000, 3)


def _echoed(near: socket.socket, far: socket.socket) -> float:
    start = time.perf_counter()
    near.sendall(b"?")
    far.sendall(far.recv(1))
    near.recv(1)
    return time.perf_counter() - start


@contextmanager
def running_link(host: str, port: int, delay_ms: float = 0.0) -> Iterator[Link]:
    with _started([sys.executable, __file__, host, str(port), str(delay_ms)]) as link:
        yield link


@contextmanager
def _started(command: list[str]) -> Iterator[Link]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield Link(process, command[-1])
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
