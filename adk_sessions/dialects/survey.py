"""What there is: counts by application, the size of the tables, changes outside a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, Table, bindparam, func, literal, select, text

from .base import Generic
from .rows import Key
from .sqlite import SQLite
from .types import MYSQL_FAMILY

Rows = Sequence[Sequence[Any]]


class Survey:
    """Statements that count, one for each thing.

    Args:
        statements: those of the database.
    """

    def __init__(self, statements: Generic) -> None:
        self._statements = statements
        self._tables = statements.tables

    def sessions(self, conn: Connection, app_name: str | None) -> Rows:
        """By application: sessions, archived ones, users, first create_time, last update_time."""
        s = self._tables.sessions
        counted = select(
            s.c.app_name,
            func.count(),
            func.count(s.c.archive_time),
            func.count(s.c.user_id.distinct()),
            func.min(s.c.create_time),
            func.max(s.c.update_time),
        ).group_by(s.c.app_name)
        return self._of(conn, counted, s, app_name)

    def events(self, conn: Connection, app_name: str | None) -> Rows:
        """By application: how many events."""
        e = self._tables.events
        return self._of(
            conn, select(e.c.app_name, func.count()).group_by(e.c.app_name), e, app_name
        )

    def _of(self, conn: Connection, counted: Select[Any], table: Table, app: str | None) -> Rows:
        if app is not None:
            counted = counted.where(table.c.app_name == bindparam("k_app"))
        return conn.execute(counted, {} if app is None else {"k_app": app}).all()

    def size(self, conn: Connection) -> int | None:
        """Bytes of the tables and indexes, of an SQLite file all of it; None where nobody knows."""
        t = self._tables
        tables = (t.sessions, t.events, t.app_states, t.user_states, t.state_changes)
        if isinstance(self._statements, SQLite):
            pages = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            return int(conn.execute(text(pages)).scalar_one())
        quoted = conn.dialect.identifier_preparer.format_table
        if conn.dialect.name == "postgresql":
            sizes = [
                func.pg_total_relation_size(func.to_regclass(literal(quoted(table))))
                for table in tables
            ]
            return sum(int(size or 0) for size in conn.execute(select(*sizes)).one())
        if conn.dialect.name in MYSQL_FAMILY:
            size = text(
                "SELECT sum(data_length + index_length) FROM information_schema.tables"
                " WHERE table_schema = coalesce(:schema, database()) AND table_name IN :names"
            ).bindparams(bindparam("names", expanding=True))
            names = [table.name for table in tables]
            found = conn.execute(size, {"schema": t.sessions.schema, "names": names}).scalar()
            return int(found or 0)
        return None

    def state_changes(self, conn: Connection, key: Key) -> Rows:
        """A session's changes in their order.

        Columns: the id of the event that each came after, None for none; change_time; delta and
        deleted as text.
        """
        c, e = self._tables.state_changes.c, self._tables.events.c
        # not the event of this revision: a fork's events are older than itself
        after = (
            select(e.id)
            .where(
                e.app_name == c.app_name,
                e.user_id == c.user_id,
                e.session_id == c.session_id,
                e.timestamp <= c.revision,
            )
            .order_by(e.timestamp.desc(), e.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        as_text = self._statements.as_text
        changes = (
            select(after, c.change_time, as_text(c.delta), as_text(c.deleted))
            .where(
                c.app_name == bindparam("k_app"),
                c.user_id == bindparam("k_user"),
                c.session_id == bindparam("k_session"),
            )
            .order_by(c.revision, c.number)
        )
        return conn.execute(changes, key.parameters()).all()
