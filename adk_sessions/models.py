"""Declarative models of the five tables: google-adk's schema, version 1, and what is added to it.

What is added is nullable, so google-adk works on the same tables: ``events.event_exact`` holds an
event's escaped JSON where ``event_data`` cannot be exact (see ``adk_sessions.codec``). Alembic
makes the tables; ``metadata.create_all`` is never called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import ForeignKeyConstraint, Index, MetaData, Table, desc
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .checks import KEY_LENGTH, TEXT_LENGTH
from .dialects.types import Json, Timestamp, key_text, long_text

TABLES = ("sessions", "events", "app_states", "user_states", "adk_internal_metadata")


@dataclass(frozen=True)
class Models:
    """The five mapped classes over one set of table names.

    Attributes:
        base: their declarative base; ``base.metadata`` holds the five tables alone.
        session, event, app_state, user_state, internal_metadata: the mapped classes.
        sessions, events, app_states, user_states: the tables behind them.
    """

    base: type[DeclarativeBase]
    session: type[Any]
    event: type[Any]
    app_state: type[Any]
    user_state: type[Any]
    internal_metadata: type[Any]
    sessions: Table
    events: Table
    app_states: Table
    user_states: Table

    @property
    def metadata(self) -> MetaData:
        """The tables' MetaData, for an application that lists them in its own tools."""
        return self.base.metadata


@cache
def models(schema: str | None = None, table_prefix: str = "") -> Models:
    """The models for one place in a database; the same object for the same arguments.

    Args:
        schema: the database schema that holds the tables, None for the connection's own.
        table_prefix: put before each table's and index's name.
    """

    class Base(DeclarativeBase):
        metadata = MetaData(schema=schema)

    def named(table: str) -> str:
        return table_prefix + table

    class StoredSession(Base):
        __tablename__ = named("sessions")

        app_name: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        user_id: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        id: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        state: Mapped[Mapping[str, Any]] = mapped_column(Json)
        create_time: Mapped[datetime] = mapped_column(Timestamp)
        update_time: Mapped[datetime] = mapped_column(Timestamp)

    class StoredEvent(Base):
        __tablename__ = named("events")
        __table_args__ = (
            ForeignKeyConstraint(
                ["app_name", "user_id", "session_id"],
                [StoredSession.app_name, StoredSession.user_id, StoredSession.id],
                ondelete="CASCADE",
            ),
            Index(
                named("idx_events_app_user_session_ts_id"),
                "app_name",
                "user_id",
                "session_id",
                desc("timestamp"),
                desc("id"),
            ),
        )

        id: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        app_name: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        user_id: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        session_id: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        invocation_id: Mapped[str] = mapped_column(key_text(TEXT_LENGTH))
        timestamp: Mapped[datetime] = mapped_column(Timestamp)
        event_data: Mapped[Mapping[str, Any] | None] = mapped_column(Json)
        event_exact: Mapped[str | None] = mapped_column(long_text())

    class StoredAppState(Base):
        __tablename__ = named("app_states")

        app_name: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        state: Mapped[Mapping[str, Any]] = mapped_column(Json)
        update_time: Mapped[datetime] = mapped_column(Timestamp)

    class StoredUserState(Base):
        __tablename__ = named("user_states")

        app_name: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        user_id: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        state: Mapped[Mapping[str, Any]] = mapped_column(Json)
        update_time: Mapped[datetime] = mapped_column(Timestamp)

    class StoredMetadata(Base):
        __tablename__ = named("adk_internal_metadata")

        key: Mapped[str] = mapped_column(key_text(KEY_LENGTH), primary_key=True)
        value: Mapped[str] = mapped_column(key_text(TEXT_LENGTH))

    mapped: list[Any] = [StoredSession, StoredEvent, StoredAppState, StoredUserState]
    sessions, events, app_states, user_states = (model.__table__ for model in mapped)
    return Models(
        Base,
        *(StoredSession, StoredEvent, StoredAppState, StoredUserState, StoredMetadata),
        *(sessions, events, app_states, user_states),
    )
