"""JSONB columns, and PostgreSQL's lock for migrations: what its dialect has whoever speaks it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    Text,
    bindparam,
    case,
    cast,
    false,
    func,
    literal_column,
    select,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB

from ..errors import ConfigurationError, SchemaError
from .base import Generic
from .reads import Tables

# The advisory lock's key, in the database of the tables: "adksess1" as a number.
_MIGRATION = 0x61646B7365737331

# What the application has set in this session; null when it is what the session began with.
_OWN_LOCK_TIMEOUT = text(
    "SELECT current_setting(name) FROM pg_settings"
    " WHERE name = 'lock_timeout' AND source = 'session'"
)


def bound(tables: Tables) -> tuple[Table, ...]:
    """The tables with rows of users, which policies may hide."""
    return (
        *(tables.sessions, tables.events, tables.state_changes),
        *(tables.user_states, tables.app_states),
    )


class JsonbColumns(Generic):
    """The generic path over JSONB columns: for databases that speak PostgreSQL's dialect."""

    locks_migrations = True
    compares_rows = True

    def has_pair(self, name: str) -> ColumnElement[bool]:
        pair = func.substr(bindparam(name, type_=Text()), 2, type_=Text())
        labels = literal_column("'{'", Text()).concat(pair).concat(literal_column("'}'", Text()))
        return type_coerce(self.tables.sessions.c.labels, JSONB()).contains(cast(labels, JSONB()))

    def is_author(self, name: str) -> ColumnElement[bool]:
        author = type_coerce(self.tables.events.c.event_data, JSONB())["author"].astext
        # of a bare comparison the planner thinks that it finds next to nothing, and then reads all
        # of a session to sort what it finds
        return func.coalesce(author == bindparam(name, type_=Text()), false())

    def as_text(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return cast(column, Text())

    def as_json(self, name: str) -> ColumnElement[Any]:
        return cast(bindparam(name, type_=Text()), JSONB())

    def as_steps(self, event_data: ColumnElement[Any]) -> ColumnElement[Any]:
        event = type_coerce(event_data, JSONB())
        actions = func.jsonb_build_object(literal_column("'actions'"), event["actions"])
        # what is no object is sent as it is, to be told from an event that sets nothing
        return self.as_text(case((func.jsonb_typeof(event) == "object", actions), else_=event))

    def require_sight(self, conn: Connection) -> None:
        quoted = conn.dialect.identifier_preparer.format_table
        active = (func.row_security_active(quoted(table)) for table in bound(self.tables))
        if any(conn.execute(select(*active)).one()):
            raise ConfigurationError(
                "Row level security hides rows from this role. Use one that the policies do not"
                " bind, or for one user row_level_security=True."
            )

    @contextmanager
    def migration_lock(self, conn: Connection) -> Iterator[bool]:
        # A lock of the session, since an index is built CONCURRENTLY, which no transaction may be
        # around. Never waited for: a statement that waits holds a snapshot, and such a build waits
        # for all of those.
        _refuse_pooler(conn)
        held = bool(conn.execute(select(func.pg_try_advisory_lock(_MIGRATION))).scalar())
        if not held:
            conn.commit()
            yield False
            return
        # A waiting ALTER makes every reader of the table wait behind it: give up soon, try again.
        own = conn.execute(_OWN_LOCK_TIMEOUT).scalar()
        conn.execute(text("SET lock_timeout = '2s'"))
        conn.commit()
        try:
            yield True
        finally:
            if not conn.invalidated:
                conn.rollback()
                back = "RESET lock_timeout" if own is None else f"SET lock_timeout = '{own}'"
                conn.execute(text(back))
                conn.execute(select(func.pg_advisory_unlock(_MIGRATION)))
                conn.commit()


def _refuse_pooler(conn: Connection) -> None:
    """Refuses to migrate where a session is not one: a lock would be left with a stranger.

    A pooler makes up the number that the protocol's start gives to the client.
    """
    driver: Any = conn.connection.driver_connection
    told = getattr(driver, "get_server_pid", lambda: None)()
    info = getattr(driver, "info", None)
    told = getattr(info, "backend_pid", None) if told is None else told
    real = conn.execute(select(func.pg_backend_pid())).scalar_one()
    conn.commit()
    if told is not None and real > 0 and told != real:
        raise SchemaError(
            "A connection pooler stands between, and a migration cannot be locked through it. Run"
            " adk-sessions upgrade with a URL that leads to the server itself."
        )
