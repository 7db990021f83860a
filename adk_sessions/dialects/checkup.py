"""Reading whole tables: all of it from one moment, a few hundred rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    Connection,
    FromClause,
    Select,
    and_,
    bindparam,
    case,
    func,
    null,
    select,
)

from .. import replay
from .base import Generic
from .rows import Key
from .sqlite import SQLite
from .types import MYSQL_FAMILY

# Rows that are in memory at a time.
PAGE = 500


@contextmanager
def unchanging(conn: Connection, statements: Generic) -> Iterator[None]:
    """A transaction that reads: every statement sees the same moment, and none can write.

    On databases that are not known here it is their default one, which is rolled back.

    Args:
        conn: of `Database.submit`, in no transaction.
        statements: those of its database.
    """
    if isinstance(statements, SQLite):
        conn.exec_driver_sql("PRAGMA query_only = ON")
        try:
            with statements.transaction(conn, write=False):
                yield
        finally:
            conn.exec_driver_sql("PRAGMA query_only = OFF")
        return
    if conn.dialect.name == "postgresql":
        conn.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with conn.begin() as transaction:
        if conn.dialect.name in MYSQL_FAMILY:
            conn.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            conn.exec_driver_sql("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        try:
            yield
        except BaseException:
            conn.invalidate()  # or what is left of a result would have to be read
            raise
        transaction.rollback()


class Checkup:
    """Statements that look at every row.

    Args:
        statements: those of the database.
        app_name: of one application only; None for all.
    """

    def __init__(self, statements: Generic, app_name: str | None) -> None:
        self._statements = statements
        self._tables = statements.tables
        self._app_name = app_name

    def counted(self, conn: Connection) -> int:
        """How many events there are."""
        events = self._tables.events
        counting = self._of_app(select(func.count()).select_from(events), events)
        return int(conn.execute(counting, self._parameters).scalar_one())

    def events(self, conn: Connection) -> Iterator[Sequence[Any]]:
        """Every event, session by session and the newest first.

        Columns: app_name, user_id, session_id, id, invocation_id, timestamp, event_data and
        event_exact as text; the session's update_time, None if there is no session; the session's
        state as text, in the row of the event at which the session is, and None in all others;
        whether what the session began with is recorded.
        """
        e, s = self._tables.events, self._tables.sessions
        state = self._statements.as_text(s.c.state)
        of_session = and_(
            e.c.app_name == s.c.app_name, e.c.user_id == s.c.user_id, e.c.session_id == s.c.id
        )
        everything = select(
            *(e.c.app_name, e.c.user_id, e.c.session_id, e.c.id, e.c.invocation_id, e.c.timestamp),
            self._statements.as_text(e.c.event_data),
            e.c.event_exact,
            s.c.update_time,
            case((s.c.update_time == e.c.timestamp, state)),
            s.c.initial_state.is_not(None),
        ).select_from(e.outerjoin(s, of_session))
        # the order of the index
        ordered = self._of_app(everything, e).order_by(
            *(e.c.app_name, e.c.user_id, e.c.session_id, e.c.timestamp.desc(), e.c.id.desc())
        )
        return self._rows(conn, ordered)

    def states(self, conn: Connection) -> Iterator[Sequence[Any]]:
        """Every state as text, with app_name, user_id, and session_id, None for a wider scope's."""
        for table in (self._tables.app_states, self._tables.user_states, self._tables.sessions):
            keys = [table.c.get(name, null()) for name in ("app_name", "user_id", "id")]
            state = self._statements.as_text(table.c.state)
            yield from self._rows(conn, self._of_app(select(*keys, state), table))

    def past(self, conn: Connection, key: Key) -> replay.Past | None:
        """All that is recorded of a session's own state."""
        found = self._statements.past(conn, key)
        return None if found is None else found.past

    def without_app_state(self, conn: Connection) -> Iterator[Sequence[Any]]:
        """The app_name of sessions whose app has no row for its state."""
        s, a = self._tables.sessions, self._tables.app_states
        missing = (
            select(s.c.app_name)
            .distinct()
            .select_from(s.outerjoin(a, s.c.app_name == a.c.app_name))
        )
        return self._rows(conn, self._of_app(missing.where(a.c.app_name.is_(None)), s))

    def without_user_state(self, conn: Connection) -> Iterator[Sequence[Any]]:
        """The app_name and user_id of sessions whose user has no row for its state."""
        s, u = self._tables.sessions, self._tables.user_states
        same = and_(s.c.app_name == u.c.app_name, s.c.user_id == u.c.user_id)
        missing = select(s.c.app_name, s.c.user_id).distinct().select_from(s.outerjoin(u, same))
        return self._rows(conn, self._of_app(missing.where(u.c.app_name.is_(None)), s))

    def _of_app(self, statement: Select[Any], table: FromClause) -> Select[Any]:
        if self._app_name is None:
            return statement
        return statement.where(table.c.app_name == bindparam("k_app"))

    @property
    def _parameters(self) -> dict[str, Any]:
        return {} if self._app_name is None else {"k_app": self._app_name}

    def _rows(self, conn: Connection, statement: Select[Any]) -> Iterator[Sequence[Any]]:
        yield from conn.execute(statement, self._parameters, execution_options={"yield_per": PAGE})
