"""Everything that names a database: column types, statements, locks, error codes, connections.

`open_url` and `open_engine` choose; nothing above this package knows which database it talks to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy import URL, Connection, StaticPool
from sqlalchemy.ext.asyncio import AsyncEngine

from .. import url as urls
from ..errors import ConfigurationError
from . import rls
from .adk_sqlite import is_adk_sqlite
from .base import Generic
from .hosts import DRIVERS, Connector
from .jsonb import JsonbColumns
from .mysql import MySQL, NamedLock
from .notices import Bells, Notices, channel_of
from .pools import Pool
from .postgresql import PostgreSQL
from .reads import Tables
from .replica import Replica
from .servers import EngineDatabase, spare_rollbacks
from .sqlite import SQLite, SQLiteDatabase, Synchronous
from .types import MYSQL_FAMILY

__all__ = [
    "Backend",
    "Database",
    "Generic",
    "Pooler",
    "Replica",
    "Synchronous",
    "open_bells",
    "open_engine",
    "open_replica",
    "open_url",
    "policies",
    "statements_for",
    "supported",
    "unadoptable",
]

T = TypeVar("T")

Backend = Literal["auto", "generic"]
Pooler = Literal["transaction"]

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
    #: it has been connected to
    reached: bool

    @property
    def engine(self) -> AsyncEngine:
        """An engine on the same database, for the application's own statements."""
        ...

    async def run(self, work: Callable[[Connection], T], *, write: bool, once: bool = False) -> T:
        """Runs one operation, all of it or nothing; with ``once``, `Undecided` if that is open."""
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

    @property
    def system(self) -> str:
        """The kind of database, as OpenTelemetry calls it."""
        ...

    def connections(self) -> tuple[int, int] | None:
        """How many connections are in use and how many are idle; None without a pool."""
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
    pooler: Pooler | None = None,
    connect_timeout: float | None = None,
    statement_timeout: float | None = None,
    writes: bool = True,
    **options: Any,
) -> tuple[Database, Generic]:
    """The database at a URL and the statements it takes; nothing is connected yet.

    Args:
        url: as people paste it, see ``adk_sessions.url``.
        tables: the tables to work on.
        backend: ``generic`` forces the path that any SQL database can go.
        row_level_security: names the app and the user in each transaction.
        sqlite_synchronous: durability of an SQLite file.
        pooler: ``transaction`` for one that may give each transaction another connection.
        connect_timeout: seconds for each host; None for what the URL says.
        statement_timeout: seconds that an operation may take once it has a connection.
        writes: whether, of several hosts, it must be one that can be written to.
        options: of ``create_async_engine``.

    Raises:
        ConfigurationError: bad URL, missing or synchronous driver, unknown option.
    """
    if sqlite_synchronous not in ("FULL", "NORMAL"):
        raise ConfigurationError("sqlite_synchronous must be 'FULL' or 'NORMAL'")
    _check_pooler(pooler)
    _check_seconds("connect_timeout", connect_timeout)
    _check_seconds("statement_timeout", statement_timeout)
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
    driver = target.url.get_driver_name()
    if driver not in DRIVERS and not connect_timeout is statement_timeout is None:
        raise ConfigurationError(
            f"connect_timeout and statement_timeout are for {' and '.join(DRIVERS)}: give {driver}"
            " its own in connect_args"
        )
    if pooler is not None:
        if driver != "asyncpg":
            raise ConfigurationError(f"pooler= is for PostgreSQL with asyncpg, not for {driver}")
        options["connect_args"] = {**(options.get("connect_args") or {}), "statement_cache_size": 0}

    def make() -> Pool:
        connector, given = None, options.get("connect_args") or {}
        if driver in DRIVERS and isinstance(given, Mapping):
            connect = given.get("async_creator_fn")
            connector = Connector(driver, timeout=connect_timeout, writes=writes, connect=connect)
            given = {**given, "async_creator_fn": connector}
        engine = urls.create_engine(url, **{**options, "connect_args": given})
        if connector is not None:
            connector.attach(engine)
        if sparing:
            spare_rollbacks(engine)
        return Pool(rls.in_transactions(engine) if row_level_security else engine, connector)

    def make_another() -> Pool:
        if "pool" in options:
            raise ConfigurationError("A pool that was passed works in one event loop only.")
        return make()

    pool = make()
    connect_args = {**target.connect_args, **(options.get("connect_args") or {})}
    statements = statements_for(pool.engine.dialect.name, tables, backend, row_level_security)
    database = EngineDatabase(
        pool,
        statements,
        make=make_another,
        # what `pgbouncer=true` turns into; nobody else would do without the cache
        behind_pooler=connect_args.get("statement_cache_size") == 0,
        timeout=statement_timeout,
    )
    return database, statements


def open_engine(
    engine: AsyncEngine,
    tables: Tables,
    *,
    backend: Backend = "auto",
    row_level_security: bool = False,
    pooler: Pooler | None = None,
    statement_timeout: float | None = None,
) -> tuple[Database, Generic]:
    """A database behind an engine that the application made, and the statements it takes.

    Args:
        engine: the engine.
        tables: the tables to work on.
        backend: ``generic`` forces the path that any SQL database can go.
        row_level_security: names the app and the user in each transaction.
        pooler: what stands between; the engine is to be made for it.
        statement_timeout: seconds that an operation may take once it has a connection.

    Raises:
        ConfigurationError: an option is not acceptable, or not for this engine's driver.
    """
    _check_pooler(pooler)
    _check_seconds("statement_timeout", statement_timeout)
    name, driver = engine.dialect.name, engine.dialect.driver
    statements = statements_for(name, tables, backend, row_level_security)
    if name == "sqlite":
        pooler = statement_timeout = None
    if pooler is not None and name != "postgresql":
        raise ConfigurationError(f"pooler= is for PostgreSQL, not for {name}")
    if statement_timeout is not None and driver not in DRIVERS:
        raise ConfigurationError(f"statement_timeout is for {' and '.join(DRIVERS)}")
    if row_level_security:
        engine = rls.in_transactions(engine)
    database = EngineDatabase(
        Pool(engine), statements, behind_pooler=pooler is not None, timeout=statement_timeout
    )
    return database, statements


def open_replica(
    statements: Generic,
    *,
    url: str | URL | None,
    engine: AsyncEngine | None,
    tables: Tables,
    path: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Replica | None:
    """The copy of a database that reads may use; None if there is none.

    Args:
        statements: the database's own.
        url: of the copy; any of its hosts will do.
        engine: the application's engine on it. Not both.
        tables: the tables to work on.
        path: what `open_url` and `open_engine` take alike.
        options: further ones of `open_url`.

    Raises:
        ConfigurationError: both are given, or it is no copy of such a database.
    """
    if url is None and engine is None:
        return None
    if url is not None and engine is not None:
        raise ConfigurationError("Give one of 'read_url' and 'read_engine', not both.")
    if not isinstance(url, str | URL | None) or not isinstance(engine, AsyncEngine | None):
        raise ConfigurationError("read_url is a string or a URL, and read_engine an AsyncEngine")
    if engine is not None:
        copy = open_engine(engine, tables, **path)
    else:
        assert url is not None
        copy = open_url(url, tables, **path, **options, writes=False)
    if isinstance(statements, SQLite) or type(copy[1]) is not type(statements):
        raise ConfigurationError(
            "A read replica is a server that follows the one that is written to: both of the same"
            " kind, and no SQLite file."
        )
    return Replica(*copy)


def open_bells(database: Database, statements: Generic, *, notify: bool) -> Bells:
    """What wakes the watchers of a service.

    Args:
        database: the service's.
        statements: what it takes; with ``notify`` its appends will tell other services.
        notify: whether notices are sent and listened for.

    Raises:
        ConfigurationError: they cannot be, there.
    """
    if not isinstance(notify, bool):
        raise ConfigurationError("notify must be True or False")
    if not notify:
        return Bells()
    if not isinstance(statements, PostgreSQL) or database.engine.dialect.driver != "asyncpg":
        raise ConfigurationError("notify=True is for PostgreSQL with asyncpg, and not 'generic'")
    if database.behind_pooler:
        raise ConfigurationError(
            "notify=True needs a connection that listens, which a pooler in transaction mode does"
            " not give"
        )
    if isinstance(database.engine.pool, StaticPool):
        raise ConfigurationError("notify=True needs a second connection, which StaticPool has not")
    statements.channel = channel_of(statements.tables)
    return Notices(lambda: database.engine, statements.channel)


def _check_pooler(pooler: object) -> None:
    if pooler not in ("transaction", None):
        raise ConfigurationError("pooler must be 'transaction' or None")


def _check_seconds(name: str, value: object) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigurationError(f"{name} must be seconds, more than 0, or None")
