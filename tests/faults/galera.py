"""Three MariaDB nodes on 127.0.0.1 that replicate to each other with Galera.

with run_galera() as cluster:
    urls = [node.url("one") for node in cluster.nodes]
    cluster.nodes[0].kill()                 # freeze() and thaw() stop a node without an end
    cluster.nodes[0].start()
    cluster.wait_synced()
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import checker
from servers import (
    LOOPBACK,
    Child,
    MariaDB,
    ServerError,
    ServerNotFound,
    _find_program,
)
from sqlalchemy import URL
from workers import Record, work

from adk_sessions import SessionService
from adk_sessions.dialects.faults import Undecided, code_of

_LIBRARIES = [
    Path("/usr/lib/galera/libgalera_smm.so"),
    Path("/usr/lib64/galera-4/libgalera_smm.so"),
]
PATIENCE = 90.0  # seconds for nodes to find each other, which may take a copy of the data
# A node that is silent for two seconds is suspected and for four is out (by default it is five and
# fifteen), and the messages that this takes are sent more often.
_PROVIDER = {
    "evs.keepalive_period": "PT0.3S",
    "evs.inactive_check_period": "PT0.1S",
    "evs.join_retrans_period": "PT0.3S",
    "evs.suspect_timeout": "PT2S",
    "evs.inactive_timeout": "PT4S",
    "evs.install_timeout": "PT4S",
    "gcache.size": "32M",
}


@dataclass
class Ports:
    """What a node listens on: clients, the group, the two kinds of state transfer."""

    client: int
    group: int
    ist: int
    sst: int


@dataclass
class Node(MariaDB):
    """One node; its data is kept while it is down."""

    name: str = ""
    ports: Ports = field(default_factory=lambda: Ports(0, 0, 0, 0))

    def start(self) -> None:
        """Start and wait until it takes part in the cluster with all that the others have."""
        child = self._own()
        child.start(f"--defaults-file={child.directory / 'my.cnf'}", ready=lambda: True)
        _until(self._has_started, child.log_tail)

    def _has_started(self) -> bool:
        child = self._own()
        if child.process is not None and child.process.poll() is not None:
            raise ServerError(f"{self.name} has ended:\n{child.log_tail()}")
        return self.is_synced()

    def is_synced(self, size: int | None = None) -> bool:
        """Whether it takes part, and the cluster has got so many nodes."""
        try:
            status = dict(self.execute("SHOW STATUS LIKE 'wsrep\\_%'"))
        except Exception:  # it does not answer yet
            return False
        ready = (status.get("wsrep_ready"), status.get("wsrep_local_state_comment"))
        return ready == ("ON", "Synced") and size in (None, int(status["wsrep_cluster_size"]))

    def freeze(self) -> None:
        """Stop the process where it is: it holds its connections, and answers nobody."""
        process = self._own().process
        assert process is not None, "the node is down"
        process.send_signal(signal.SIGSTOP)


@dataclass
class Galera:
    nodes: list[Node]

    def thaw(self) -> None:
        """Let the nodes go on that were stopped."""
        for node in self.nodes:
            if (process := node._own().process) is not None:
                process.send_signal(signal.SIGCONT)

    def wait_synced(self) -> None:
        """Return once all nodes that are up form one cluster."""
        up = [node for node in self.nodes if node._own().process is not None]
        _until(
            lambda: all(node.is_synced(len(up)) for node in up),
            lambda: "\n".join(node._own().log_tail() for node in up),
        )


def _until(condition: Callable[[], bool], tell: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"the nodes do not come together:\n{tell()}")
        time.sleep(0.05)


def _ports(count: int) -> list[int]:
    """So many different ports that are free, and stay so when a node is down for a while.

    They are below those that the system gives to clients.
    """
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.sample(range(12_000, 32_000), 1000):
            probe = stack.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind((LOOPBACK, port))
                found.append(port)
            if len(found) == count:
                return found
    raise ServerError("no free ports")


def _settings(node: Node, library: Path, nodes: list[Node]) -> str:
    child, ports = node._own(), node.ports
    folder = child.directory
    provider = {
        **_PROVIDER,
        "base_port": ports.group,
        "gmcast.listen_addr": f"tcp://{LOOPBACK}:{ports.group}",
        "ist.recv_addr": f"{LOOPBACK}:{ports.ist}",
    }
    settings = {
        "datadir": folder / "data",
        "socket": folder / "socket",
        "pid_file": folder / "pid",
        "bind_address": LOOPBACK,
        "port": ports.client,
        "binlog_format": "ROW",
        "innodb_autoinc_lock_mode": 2,
        "innodb_buffer_pool_size": "32M",
        "innodb_flush_log_at_trx_commit": 0,
        "wsrep_on": "ON",
        "wsrep_provider": library,
        "wsrep_provider_options": '"' + ";".join(f"{k}={v}" for k, v in provider.items()) + '"',
        "wsrep_cluster_name": "adk_sessions",
        "wsrep_cluster_address": "gcomm://"
        + ",".join(f"{LOOPBACK}:{other.ports.group}" for other in nodes),
        "wsrep_node_name": node.name,
        "wsrep_node_address": LOOPBACK,
        "wsrep_sst_method": "rsync",
        "wsrep_sst_receive_address": f"{LOOPBACK}:{ports.sst}",
    }
    return "\n".join(["[mysqld]", *(f"{name} = {value}" for name, value in settings.items()), ""])


def _prepare(nodes: list[Node], install: Path) -> None:
    """Give each node the same data, as if they had been a cluster and had lost power at once.

    So they find each other and are the cluster again, without one that is first and without
    copies over the network: two seconds instead of ten.
    """
    flags = ["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]
    first = nodes[0]._own()
    first.run(install, f"--datadir={first.directory / 'data'}", *flags)
    for node in nodes[1:]:
        child = node._own()
        child.run("cp", "-a", first.directory / "data", child.directory / "data")
    group = uuid.uuid1()
    ids = [uuid.uuid1() for _ in nodes]
    members = [f"member: {id} 0" for id in ids]
    for id, node in zip(ids, nodes, strict=True):
        view = [f"view_id: 3 {ids[0]} 1", "bootstrap: 0", *members]
        state = ["version: 2.1", f"uuid: {group}", "seqno: 0", "safe_to_bootstrap: 0"]
        _write(node, "gvwstate.dat", [f"my_uuid: {id}", "#vwbeg", *view, "#vwend"])
        _write(node, "grastate.dat", ["# GALERA saved state", *state])


def _write(node: Node, name: str, lines: list[str]) -> None:
    data = node._own().directory / "data"
    (data / name).write_text("\n".join([*lines, ""]))
    owner = data.stat()
    os.chown(data / name, owner.st_uid, owner.st_gid)


@contextmanager
def run_galera(nodes: int = 3) -> Iterator[Galera]:
    """A cluster of so many nodes; it is gone at the end, whatever state they are in."""
    program, install = _find_program("mariadbd"), _find_program("mariadb-install-db")
    library = next((path for path in _LIBRARIES if path.exists()), None)
    if not (program and install and library and _find_program("rsync")):
        raise ServerNotFound("Galera not found: it takes mariadbd, libgalera_smm.so and rsync")
    with ExitStack() as stack:
        cluster = Galera([])
        free = iter(_ports(4 * nodes))
        for number in range(nodes):
            child = Child(program)
            stack.callback(child.remove, signal.SIGKILL)
            child.leave_root()
            ports = Ports(*(next(free) for _ in range(4)))
            address = URL.create("mysql", "root", host=LOOPBACK, port=ports.client)
            cluster.nodes.append(Node(address, child, name=f"node-{number}", ports=ports))
        for node in cluster.nodes:
            settings = _settings(node, library, cluster.nodes)
            (node._own().directory / "my.cnf").write_text(settings)
        _prepare(cluster.nodes, install)
        with ThreadPoolExecutor(nodes) as starters:
            list(starters.map(Node.start, cluster.nodes))
        cluster.wait_synced()
        yield cluster


def codes_of(service: SessionService) -> Counter[Any]:
    """The numbers of the servers' errors that the service will meet."""
    met: Counter[Any] = Counter()
    run = service._database.run

    async def watched(*args: Any, **options: Any) -> Any:
        try:
            return await run(*args, **options)
        except Exception as error:
            met[code_of(error.error if isinstance(error, Undecided) else error)] += 1
            raise

    service._database.run = watched  # type: ignore[method-assign]
    return met


class OnNode(checker.Lists):
    """A process of writers and a reader on one node."""

    async def open(self, url: str, **options: Any) -> None:
        await super().open(url, **options)
        self.codes = codes_of(self.service)

    async def lists_until(
        self, stop: str, writers: dict[str, dict[str, Any]], **place: Any
    ) -> dict[str, Any]:
        """`lists` again and again, until there is a file of that name."""
        records: list[Any] = []
        while not Path(stop).exists():
            # no two writers have one name
            named = {f"{name}-{len(records)}": own for name, own in writers.items()}
            records.append(await self.lists(**place, writers=named, appends=4))
        return asdict(Record.of(records))

    async def numbers(self) -> list[Any]:
        """Of the errors that were met, one for each time."""
        return list(self.codes.elements())


if __name__ == "__main__":
    asyncio.run(work(OnNode()))
