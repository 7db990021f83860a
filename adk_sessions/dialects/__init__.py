"""Everything that names a database: column types, statements, locks, error codes, connections.

`open_url` and `open_engine` choose; nothing above this package knows which database it talks to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from .. import url as urls
from ..errors import ConfigurationError
from . import rls
from .adk_sqlite import is_adk_sqlite
from .base import Generic
from .mysql import MySQL, NamedLock
from .postgresql import JsonbColumns, PostgreSQL
from .reads import Tables
from .servers import EngineDatabase, spare_rollbacks
from .sqlite import SQLite, SQLiteDatabase, Synchronous
from .types import MYSQL_FAMILY

__all__ = [
    "Backend",
    "Database",
    "Generic",
    "Synchronous",
    "open_engine",
    "open_url",
    "policies",
    "statements_for",
    "supported",
    "unadoptable",
]

T = TypeVar("T")

Backend = Literal["auto", "generic"]

_STATEMENTS: dict[str, type[Generic]] = {
    "sqlite": SQLite,
    "postgresql": PostgreSQL,
    "mysql": MySQL,
    "mariadb": MySQL,
}
# The generic path, where a dialect's columns or transactions need something of their own.
_GENERIC: dict[str, type[Generic]] = {
    "sqlite": SQLite,
    "postgresql": JsonbColumns,
    "mysql": NamedLock,
    "mariadb": NamedLock,
}
supported = tuple(_STATEMENTS)
# Options of create_engine that shape a pool; an SQLite file has two connections, always.
_POOL_OPTIONS = {
    "pool_size",
    "max_overflow",
    "pool_timeout",
    "pool_recycle",
    "pool_pre_ping",
    "pool_use_lifo",
    "pool_reset_on_return",
    "poolclass",
    "isolation_level",
}
# The default keeps 5 connections and opens 10 more for a moment when they are all in use, closing
# each when it comes back: to connect takes longer than any call here, so waiting for one is faster.
# The last one used goes first: its statements are prepared, and a server may drop idle ones.
_POOL: dict[str, Any] = {"pool_size": 10, "max_overflow": 0, "pool_use_lifo": True}
_POOL_SIZE = {"pool", "poolclass", *_POOL}


class Database(Protocol):
    """A place to run operations: each is a synchronous function of a Connection."""

    #: a pooler stands between that may give each transaction another connection
    behind_pooler: bool

    @property
    def engine(self) -> AsyncEngine:
        """An engine on the same database, for the application's own statements."""
        ...

    async def run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """Runs one operation, all of it or nothing."""
        ...

    async def submit(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """Runs ``work``, which controls transactions itself."""
        ...

    def is_missing(self) -> bool:
        """Whether there is nothing yet, and a first connection would make it."""
        ...

    async def close(self) -> None:
        """Lets go of the connections that are ours."""
        ...


def unadoptable(conn: Connection, tables: Tables) -> str | None:
    """Why tables with the store's names and columns must not be adopted, None if they may be."""
    if not is_adk_sqlite(conn, tables):
        return None
    return (
        "This file belongs to google-adk's SqliteSessionService. Bring its sessions into another"
        " database with: adk-sessions import-adk-sqlite FILE --url …"
    )


def statements_for(
    name: str, tables: Tables, backend: Backend, row_level_security: bool = False
) -> Generic:
    """The statements of a dialect; the generic ones for a dialect that has none of its own.

    Raises:
        ConfigurationError: the database has no schemas, or no row level security.
    """
    if name == "sqlite" and tables.events.schema is not None:
        raise ConfigurationError("SQLite has no schemas: table_prefix= keeps tables apart")
    if row_level_security:
        _need_policies(name)
        return (rls.ContainedColumns if backend == "generic" else rls.ContainedPostgreSQL)(tables)
    if backend == "generic":
        return _GENERIC.get(name, Generic)(tables)
    return _STATEMENTS.get(name, Generic)(tables)


def policies(name: str, tables: Tables) -> str:
    """SQL that makes the policies of row level security, for a dialect that has them.

    Raises:
        ConfigurationError: it has none.
    """
    _need_policies(name)
    return rls.policies(tables)


def _need_policies(name: str) -> None:
    if name != "postgresql":
        raise ConfigurationError("row_level_security is for PostgreSQL")


def open_url(
    url: str | URL,
    tables: Tables,
    *,
    backend: Backend = "auto",
    row_level_security: bool = False,
    sqlite_synchronous: Synchronous = "FULL",
    **options: Any,
) -> tuple[Database, Generic]:
    """The database at a URL and the statements it takes; nothing is connected yet.

    Args:
        url: as people paste it, see ``adk_sessions.url``.
        tables: the tables to work on.
        backend: ``generic`` forces the path that any SQL database can go.
        row_level_security: names the app and the user in each transaction.
        sqlite_synchronous: durability of an SQLite file.
        options: of ``create_async_engine``.

    Raises:
        ConfigurationError: bad URL, missing or synchronous driver, unknown option.
    """
    if sqlite_synchronous not in ("FULL", "NORMAL"):
        raise ConfigurationError("sqlite_synchronous must be 'FULL' or 'NORMAL'")
    target = urls.resolve(url)
    if target.url.get_backend_name() == "sqlite":
        statements = statements_for("sqlite", tables, backend, row_level_security)
        connect_args = {**target.connect_args, **options.pop("connect_args", {})}
        engine_options = {k: v for k, v in options.items() if k not in _POOL_OPTIONS}
        return (
            SQLiteDatabase(
                target.url, connect_args, synchronous=sqlite_synchronous, **engine_options
            ),
            statements,
        )
    sparing = False
    if target.url.get_backend_name() in MYSQL_FAMILY:
        # REPEATABLE READ would lock gaps, and on recent MariaDB refuse rows that changed while a
        # transaction waited for another one; every statement here locks what it relies on
        options.setdefault("isolation_level", "READ COMMITTED")
        sparing = not options.keys() & {"pool", "pool_reset_on_return"}
        if sparing:
            options["pool_reset_on_return"] = None
        if not target.url.database and tables.sessions.schema is None:
            raise ConfigurationError("The URL names no database: add /name to it, or pass schema=")
    if not options.keys() & _POOL_SIZE:
        options |= _POOL
    engine = urls.create_engine(url, **options)
    if sparing:
        spare_rollbacks(engine)
    connect_args = {**target.connect_args, **(options.get("connect_args") or {})}
    return open_engine(
        engine,
        tables,
        backend=backend,
        row_level_security=row_level_security,
        owned=True,
        # what `pgbouncer=true` turns into; nobody else would do without the cache
        behind_pooler=connect_args.get("statement_cache_size") == 0,
    )


def open_engine(
    engine: AsyncEngine,
    tables: Tables,
    *,
    backend: Backend = "auto",
    row_level_security: bool = False,
    owned: bool = False,
    behind_pooler: bool = False,
) -> tuple[Database, Generic]:
    """A database behind an engine that the application made, and the statements it takes."""
    statements = statements_for(engine.dialect.name, tables, backend, row_level_security)
    if row_level_security:
        engine = rls.in_transactions(engine)
    database = EngineDatabase(engine, statements, owned=owned, behind_pooler=behind_pooler)
    return database, statements
