"""Declarative models of the tables: the five of google-adk's schema, version 1, and what is added.

What is added is nullable columns, indexes and a table of our own, so google-adk works on the same
tables. ``events.event_exact`` holds an event's escaped JSON where ``event_data`` cannot be exact
(see ``adk_sessions.codec``). ``sessions.initial_state`` is the session's own state before its
first event, null where that is not known, and ``state_changes`` what has changed it since without
an event. Alembic makes the tables; ``metadata.create_all`` is never called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import ForeignKeyConstraint, Index, MetaData, Table, desc
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .checks import KEY_LENGTH, TEXT_LENGTH
from .dialects.types import Json, KeyText, Timestamp, long_text
from .errors import ConfigurationError

TABLES = (
    *("sessions", "events", "app_states", "user_states", "adk_internal_metadata"),
    "state_changes",
)
VERSION_TABLE = "adk_sessions_version"
INDEX = "idx_events_app_user_session_ts_id"
#: the order in which pages show an application's sessions, and a user's
PAGE_INDEXES = {
    "idx_sessions_app_create_user_id": ("app_name", "create_time", "user_id", "id"),
    "idx_sessions_app_user_create_id": ("app_name", "user_id", "create_time", "id"),
}

_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,29}")  # an index's name holds it too: 63 bytes
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}")


@dataclass(frozen=True)
class Names:
    """Where the tables are and what they are called.

    Attributes:
        schema: the database schema (on MySQL and MariaDB: the database) that holds the tables,
            None for the connection's own.
        table_prefix: put before each table's and index's name.
        tables: pairs of a table's name here and its name in a database whose tables the host
            application owns.
    """

    schema: str | None = None
    table_prefix: str = ""
    tables: tuple[tuple[str, str], ...] = ()

    def of(self, name: str) -> str:
        """The name in the database of a table, or of an index, as `TABLES` calls it."""
        return dict(self.tables).get(name, self.table_prefix + name)

    @property
    def host_owned(self) -> bool:
        """Whether the tables are another application's to migrate."""
        return bool(self.tables)


def names(
    schema: str | None = None, table_prefix: str = "", tables: Mapping[str, str] | None = None
) -> Names:
    """Checks and bundles the three arguments of a service that say where its tables are.

    Raises:
        ConfigurationError: a name cannot be one, or two tables share one.
    """
    if schema is not None and not (isinstance(schema, str) and _NAME.fullmatch(schema)):
        raise ConfigurationError("schema must be a name: letters, digits, _ $ -, at most 63")
    if table_prefix and not (isinstance(table_prefix, str) and _PREFIX.fullmatch(table_prefix)):
        raise ConfigurationError("table_prefix must be letters, digits and _, at most 30")
    owned = dict(tables or {})
    if unknown := owned.keys() - set(TABLES):
        raise ConfigurationError(
            f"tables: there is no table {sorted(map(str, unknown))[0]!r} here, only"
            f" {', '.join(TABLES)}"
        )
    if wrong := [key for key, name in owned.items() if not _NAME.fullmatch(str(name))]:
        raise ConfigurationError(f"tables: the name for {wrong[0]} cannot be one of a table")
    found = Names(schema, table_prefix or "", tuple(sorted(owned.items())))
    if len({found.of(table) for table in TABLES}) < len(TABLES):
        raise ConfigurationError("tables: two tables have the same name")
    return found


@dataclass(frozen=True)
class Models:
    """The mapped classes over one set of table names.

    Attributes:
        names: where they are.
        base: their declarative base; ``base.metadata`` holds these tables alone.
        session, event, app_state, user_state, internal_metadata, state_change: the mapped classes.
        sessions, events, app_states, user_states, state_changes: the tables behind them.
    """

    names: Names
    base: type[DeclarativeBase]
    session: type[Any]
    event: type[Any]
    app_state: type[Any]
    user_state: type[Any]
    internal_metadata: type[Any]
    state_change: type[Any]
    sessions: Table
    events: Table
    app_states: Table
    user_states: Table
    state_changes: Table

    @property
    def host_owned(self) -> bool:
        """Whether the tables are another application's to migrate, foreign keys or not."""
        return self.names.host_owned

    @property
    def metadata(self) -> MetaData:
        """The tables' MetaData, for an application that lists them in its own tools."""
        return self.base.metadata


def models(
    schema: str | None = None, table_prefix: str = "", tables: Mapping[str, str] | None = None
) -> Models:
    """The models for one place in a database; the same object for the same arguments.

    Args:
        schema: the database schema that holds the tables, None for the connection's own.
        table_prefix: put before each table's and index's name.
        tables: other names, by name, for tables that the host application owns.

    Raises:
        ConfigurationError: a name cannot be one.
    """
    return models_of(names(schema, table_prefix, tables))


@cache
def models_of(where: Names) -> Models:
    """The models for a place that was checked already."""

    class Base(DeclarativeBase):
        metadata = MetaData(schema=where.schema)

    class StoredSession(Base):
        __tablename__ = where.of("sessions")
        __table_args__ = tuple(
            Index(where.of(name), *columns) for name, columns in PAGE_INDEXES.items()
        )

        app_name: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        user_id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        state: Mapped[Mapping[str, Any]] = mapped_column(Json)
        create_time: Mapped[datetime] = mapped_column(Timestamp)
        update_time: Mapped[datetime] = mapped_column(Timestamp)
        title: Mapped[str | None] = mapped_column(KeyText(TEXT_LENGTH))
        labels: Mapped[Mapping[str, Any] | None] = mapped_column(Json)
        archive_time: Mapped[datetime | None] = mapped_column(Timestamp)
        expire_time: Mapped[datetime | None] = mapped_column(Timestamp)
        initial_state: Mapped[Mapping[str, Any] | None] = mapped_column(Json)

    class StoredEvent(Base):
        __tablename__ = where.of("events")
        __table_args__ = (
            ForeignKeyConstraint(
                ["app_name", "user_id", "session_id"],
                [StoredSession.app_name, StoredSession.user_id, StoredSession.id],
                ondelete="CASCADE",
            ),
            Index(
                where.of(INDEX),
                "app_name",
                "user_id",
                "session_id",
                desc("timestamp"),
                desc("id"),
            ),
        )

        id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        app_name: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        user_id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        session_id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        invocation_id: Mapped[str] = mapped_column(KeyText(TEXT_LENGTH))
        timestamp: Mapped[datetime] = mapped_column(Timestamp)
        event_data: Mapped[Mapping[str, Any] | None] = mapped_column(Json)
        event_exact: Mapped[str | None] = mapped_column(long_text())

    class StoredAppState(Base):
        __tablename__ = where.of("app_states")

        app_name: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        state: Mapped[Mapping[str, Any]] = mapped_column(Json)
        update_time: Mapped[datetime] = mapped_column(Timestamp)

    class StoredUserState(Base):
        __tablename__ = where.of("user_states")

        app_name: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        user_id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        state: Mapped[Mapping[str, Any]] = mapped_column(Json)
        update_time: Mapped[datetime] = mapped_column(Timestamp)

    class StoredMetadata(Base):
        __tablename__ = where.of("adk_internal_metadata")

        key: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        value: Mapped[str] = mapped_column(KeyText(TEXT_LENGTH))

    class StoredStateChange(Base):
        __tablename__ = where.of("state_changes")
        __table_args__ = (
            ForeignKeyConstraint(
                ["app_name", "user_id", "session_id"],
                [StoredSession.app_name, StoredSession.user_id, StoredSession.id],
                ondelete="CASCADE",
            ),
        )

        app_name: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        user_id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        session_id: Mapped[str] = mapped_column(KeyText(KEY_LENGTH), primary_key=True)
        # the session's: the change lies after the event that has this time, before the next one
        revision: Mapped[datetime] = mapped_column(Timestamp, primary_key=True)
        number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        change_time: Mapped[datetime] = mapped_column(Timestamp)
        delta: Mapped[Mapping[str, Any]] = mapped_column(Json)
        deleted: Mapped[Mapping[str, Any] | None] = mapped_column(Json)

    mapped: list[Any] = [
        *(StoredSession, StoredEvent, StoredAppState, StoredUserState, StoredStateChange)
    ]
    sessions, events, app_states, user_states, state_changes = (model.__table__ for model in mapped)
    return Models(
        *(where, Base),
        *(StoredSession, StoredEvent, StoredAppState, StoredUserState, StoredMetadata),
        StoredStateChange,
        *(sessions, events, app_states, user_states, state_changes),
    )
