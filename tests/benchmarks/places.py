"""Where stores are measured: real servers that keep what they acknowledge, and a real disk.

A server that would lose acknowledged commits is refused, and so is a file system in memory: speed
that is bought with durability is not what is compared here.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from servers import MariaDB, Postgres, ServerNotFound, run_mariadb, run_postgres, run_sync
from sqlalchemy import make_url

from .link import LOOPBACK, Link, running_link
from .stores import Store

BACKENDS = ("postgresql", "sqlite", "mariadb")
_POSTGRES_SETTINGS = (
    "server_version",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "shared_buffers",
    "autovacuum",
)
_MARIADB_SETTINGS = (
    "version",
    "innodb_flush_log_at_trx_commit",
    "innodb_doublewrite",
    "log_bin",
    "sync_binlog",
    "innodb_buffer_pool_size",
)


class Unfit(Exception):
    """A place where the figures would mean nothing."""


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, as the kernel names it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    at = folder.resolve()
    fitting = [(place, kind) for place, kind in found if at.is_relative_to(place)]
    return max(fitting, key=lambda mount: len(mount[0]), default=("/", "unknown"))[1]


def require_disk(folder: Path, what: str) -> str:
    kind = file_system(folder)
    if kind in ("tmpfs", "ramfs", "devtmpfs"):
        raise Unfit(
            f"{what} would be on {folder}, which is in memory ({kind}): name a folder on a disk"
            " with --folder, or with TMPDIR for servers that are started here"
        )
    return kind


def check_postgres(settings: dict[str, Any]) -> None:
    if settings["fsync"] != "on" or settings["synchronous_commit"] == "off":
        raise Unfit(
            "This PostgreSQL does not keep what it acknowledges"
            f" (fsync={settings['fsync']}, synchronous_commit={settings['synchronous_commit']});"
            " the benchmark is for servers that do: turn both on."
        )


def check_mariadb(settings: dict[str, Any]) -> None:
    if int(settings["innodb_flush_log_at_trx_commit"]) != 1:
        raise Unfit(
            "This MariaDB does not keep what it acknowledges"
            f" (innodb_flush_log_at_trx_commit={settings['innodb_flush_log_at_trx_commit']});"
            " the benchmark is for servers that do: set it to 1."
        )


def check_sqlite(store: str, settings: dict[str, Any]) -> None:
    if int(settings["synchronous"]) != 2:
        raise Unfit(f"{store} uses SQLite with synchronous={settings['synchronous']}, not FULL (2)")


def _postgres_settings(server: Postgres) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        connection = await asyncpg.connect(server.url(server.address.database or "postgres"))
        try:
            return {
                name: await connection.fetchval("SELECT current_setting($1)", name)
                for name in _POSTGRES_SETTINGS
            }
        finally:
            await connection.close()

    return run_sync(ask())


def _mariadb_settings(server: MariaDB) -> dict[str, Any]:
    names = ", ".join(f"@@{name}" for name in _MARIADB_SETTINGS)
    (row,) = server.execute(f"SELECT {names}")
    return dict(zip(_MARIADB_SETTINGS, row, strict=True))


@dataclass
class Place:
    """A database system to measure on.

    Attributes:
        settings: what the results say about it.
    """

    backend: str
    server: Postgres | MariaDB | None
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        """The URL of a new, empty database that is dropped at the end."""
        if self.server is not None:
            with self.server.scratch_database() as url:
                yield url
            return
        path = self.folder / f"{name}-{uuid.uuid4().hex[:8]}.db"
        try:
            yield f"sqlite:///{path}"
        finally:
            for file in self.folder.glob(f"{path.name}*"):
                file.unlink(missing_ok=True)

    @contextmanager
    def link(self, delay_ms: float) -> Iterator[Link]:
        assert self.server is not None
        address = self.server.address
        port = address.port or {"postgresql": 5432}.get(self.backend, 3306)
        with running_link(address.host or LOOPBACK, port, delay_ms) as link:
            yield link

    @asynccontextmanager
    async def store(self, kind: type[Store], link: Link | None = None) -> AsyncIterator[Store]:
        """The store, open, on a new database, by way of the link if there is one."""
        with self.database(kind.name) as direct:
            store = kind(through(direct, link), direct)
            await store.open()
            try:
                yield store
            finally:
                await store.close()

    @asynccontextmanager
    async def stores(
        self, kinds: list[type[Store]], link: Link | None = None
    ) -> AsyncIterator[list[Store]]:
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(self.store(kind, link)) for kind in kinds]
            if self.backend == "sqlite":
                for store in opened:
                    pragmas = await store.pragmas()
                    check_sqlite(store.name, pragmas)
                    self.settings.setdefault("stores", {})[store.name] = pragmas
            yield opened


def through(url: str, link: Link | None) -> str:
    if link is None:
        return url
    by_way = make_url(url).set(host=LOOPBACK, port=link.port)
    return by_way.render_as_string(hide_password=False)


@contextmanager
def open_place(backend: str, folder: Path) -> Iterator[Place]:
    """A place for databases.

    Raises:
        ServerNotFound: there is no such server here.
        Unfit: there is, but it does not keep what it acknowledges.
    """
    with ExitStack() as stack:
        place = Place(backend, None, folder)
        match backend:
            case "postgresql":
                postgres = stack.enter_context(run_postgres(durable=True))
                place.server = postgres
                place.settings = _postgres_settings(postgres)
                check_postgres(place.settings)
            case "mariadb":
                mariadb = stack.enter_context(run_mariadb(durable=True))
                place.server = mariadb
                place.settings = _mariadb_settings(mariadb)
                check_mariadb(place.settings)
            case _:
                made = Path(tempfile.mkdtemp(prefix="adk-sessions-bench-", dir=folder))
                stack.callback(shutil.rmtree, made, ignore_errors=True)
                place.folder = made
                place.settings = {"version": sqlite3.sqlite_version}
                place.settings["file_system"] = require_disk(made, "SQLite's files")
        if place.server is not None and place.server.child is not None:
            where = place.server.child.directory
            place.settings["file_system"] = require_disk(where, "The server's files")
            place.settings["started_for_this_run"] = True
        yield place


__all__ = ["BACKENDS", "Place", "ServerNotFound", "Unfit", "open_place", "through"]
