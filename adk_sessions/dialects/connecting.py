"""From a URL or an engine to a place where operations run, whatever they are operations of.

Pools, time-outs, several hosts, poolers and SQLite's threads are the same for each of them; only
what decides about a dialect's transactions is chosen by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from .. import url as urls
from ..errors import ConfigurationError
from . import rls
from .hosts import DRIVERS, Connector
from .manner import Manner
from .pools import Pool
from .servers import EngineDatabase, spare_rollbacks
from .sqlite import SQLiteDatabase, Synchronous
from .types import MYSQL_FAMILY

T = TypeVar("T")
M = TypeVar("M", bound=Manner)

Pooler = Literal["transaction"]

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


def connect_url(
    url: str | URL,
    choose: Callable[[str], M],
    *,
    schema: str | None = None,
    row_level_security: bool = False,
    sqlite_synchronous: Synchronous = "FULL",
    pooler: Pooler | None = None,
    connect_timeout: float | None = None,
    statement_timeout: float | None = None,
    writes: bool = True,
    **options: Any,
) -> tuple[Database, M]:
    """The database at a URL and its statements; nothing is connected yet.

    Args:
        url: as people paste it, see ``adk_sessions.url``.
        choose: the statements of a dialect, by its name.
        schema: where the tables are, None for the connection's own.
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
        statements = choose("sqlite")
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
        if not target.url.database and schema is None:
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
    statements = choose(pool.engine.dialect.name)
    database = EngineDatabase(
        pool,
        statements,
        make=make_another,
        # what `pgbouncer=true` turns into; nobody else would do without the cache
        behind_pooler=connect_args.get("statement_cache_size") == 0,
        timeout=statement_timeout,
    )
    return database, statements


def connect_engine(
    engine: AsyncEngine,
    choose: Callable[[str], M],
    *,
    row_level_security: bool = False,
    pooler: Pooler | None = None,
    statement_timeout: float | None = None,
) -> tuple[Database, M]:
    """A database behind an engine that the application made, and its statements.

    Args:
        engine: the engine.
        choose: the statements of a dialect, by its name.
        row_level_security: names the app and the user in each transaction.
        pooler: what stands between; the engine is to be made for it.
        statement_timeout: seconds that an operation may take once it has a connection.

    Raises:
        ConfigurationError: an option is not acceptable, or not for this engine's driver.
    """
    _check_pooler(pooler)
    _check_seconds("statement_timeout", statement_timeout)
    name, driver = engine.dialect.name, engine.dialect.driver
    statements = choose(name)
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


def _check_pooler(pooler: object) -> None:
    if pooler not in ("transaction", None):
        raise ConfigurationError("pooler must be 'transaction' or None")


def _check_seconds(name: str, value: object) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigurationError(f"{name} must be seconds, more than 0, or None")
