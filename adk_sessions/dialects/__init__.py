"""Everything that names a database: column types, statements, locks, error codes, connections.

`open_url` and `open_engine` choose; nothing above this package knows which database it talks to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy import URL, Connection, Dialect
from sqlalchemy.ext.asyncio import AsyncEngine

from .. import url as urls
from ..errors import ConfigurationError
from .base import Generic
from .mysql import MySQL
from .postgresql import JsonbColumns, PostgreSQL
from .reads import Tables
from .servers import EngineDatabase
from .sqlite import SQLite, SQLiteDatabase, Synchronous
from .types import MYSQL_FAMILY

__all__ = ["Backend", "Database", "Generic", "Synchronous", "open_engine", "open_url"]

T = TypeVar("T")

Backend = Literal["auto", "generic"]

_STATEMENTS: dict[str, type[Generic]] = {
    "sqlite": SQLite,
    "postgresql": PostgreSQL,
    "mysql": MySQL,
    "mariadb": MySQL,
}
# The generic path, where a dialect's columns or transactions need something of their own.
_GENERIC: dict[str, type[Generic]] = {"sqlite": SQLite, "postgresql": JsonbColumns}
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


class Database(Protocol):
    """A place to run operations: each is a synchronous function of a Connection."""

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

    async def close(self) -> None:
        """Lets go of the connections that are ours."""
        ...


def statements_for(dialect: Dialect, tables: Tables, backend: Backend) -> Generic:
    """The statements of a dialect; the generic ones for a dialect that has none of its own."""
    if backend == "generic":
        return _GENERIC.get(dialect.name, Generic)(tables)
    return _STATEMENTS.get(dialect.name, Generic)(tables)


def open_url(
    url: str | URL,
    tables: Tables,
    *,
    backend: Backend = "auto",
    sqlite_synchronous: Synchronous = "FULL",
    **options: Any,
) -> tuple[Database, Generic]:
    """The database at a URL and the statements it takes; nothing is connected yet.

    Args:
        url: as people paste it, see ``adk_sessions.url``.
        tables: the tables to work on.
        backend: ``generic`` forces the path that any SQL database can go.
        sqlite_synchronous: durability of an SQLite file.
        options: of ``create_async_engine``.

    Raises:
        ConfigurationError: bad URL, missing or synchronous driver, unknown option.
    """
    if sqlite_synchronous not in ("FULL", "NORMAL"):
        raise ConfigurationError("sqlite_synchronous must be 'FULL' or 'NORMAL'")
    target = urls.resolve(url)
    if target.url.get_backend_name() == "sqlite":
        statements = SQLite(tables)
        connect_args = {**target.connect_args, **options.pop("connect_args", {})}
        engine_options = {k: v for k, v in options.items() if k not in _POOL_OPTIONS}
        return (
            SQLiteDatabase(
                target.url, connect_args, synchronous=sqlite_synchronous, **engine_options
            ),
            statements,
        )
    if target.url.get_backend_name() in MYSQL_FAMILY:
        # REPEATABLE READ would lock gaps, and on recent MariaDB refuse rows that changed while a
        # transaction waited for another one; every statement here locks what it relies on
        options.setdefault("isolation_level", "READ COMMITTED")
    engine = urls.create_engine(url, **options)
    database, found = open_engine(engine, tables, backend=backend, owned=True)
    return database, found


def open_engine(
    engine: AsyncEngine, tables: Tables, *, backend: Backend = "auto", owned: bool = False
) -> tuple[Database, Generic]:
    """A database behind an engine that the application made, and the statements it takes."""
    statements = statements_for(engine.dialect, tables, backend)
    return EngineDatabase(engine, statements, owned=owned), statements
