"""Everything that names a database: column types, statements, locks, error codes, connections.

`open_url` and `open_engine` choose; nothing above this package knows which database it talks to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import URL, Connection, StaticPool
from sqlalchemy.ext.asyncio import AsyncEngine

from ..errors import ConfigurationError
from . import rls
from .adk_sqlite import is_adk_sqlite
from .base import Generic
from .connecting import Database, Pooler, connect_engine, connect_url
from .jsonb import JsonbColumns
from .mysql import MySQL, NamedLock
from .notices import Bells, Notices, channel_of
from .postgresql import PostgreSQL
from .reads import Tables
from .replica import Replica
from .sqlite import SQLite, Synchronous

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
    **options: Any,
) -> tuple[Database, Generic]:
    """The database at a URL and the statements it takes; nothing is connected yet.

    Args:
        url: as people paste it, see ``adk_sessions.url``.
        tables: the tables to work on.
        backend: ``generic`` forces the path that any SQL database can go.
        row_level_security: names the app and the user in each transaction.
        options: further ones of `connect_url`.

    Raises:
        ConfigurationError: bad URL, missing or synchronous driver, unknown option.
    """
    return connect_url(
        url,
        lambda name: statements_for(name, tables, backend, row_level_security),
        schema=tables.sessions.schema,
        row_level_security=row_level_security,
        **options,
    )


def open_engine(
    engine: AsyncEngine,
    tables: Tables,
    *,
    backend: Backend = "auto",
    row_level_security: bool = False,
    **options: Any,
) -> tuple[Database, Generic]:
    """A database behind an engine that the application made, and the statements it takes.

    Args:
        engine: the engine.
        tables: the tables to work on.
        backend: ``generic`` forces the path that any SQL database can go.
        row_level_security: names the app and the user in each transaction.
        options: further ones of `connect_engine`.

    Raises:
        ConfigurationError: an option is not acceptable, or not for this engine's driver.
    """
    return connect_engine(
        engine,
        lambda name: statements_for(name, tables, backend, row_level_security),
        row_level_security=row_level_security,
        **options,
    )


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
