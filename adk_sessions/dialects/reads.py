"""Reading: one statement for each operation, the same on every database.

One statement is one snapshot everywhere, so the state always matches the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar, Protocol

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    delete,
    literal_column,
    null,
    or_,
    select,
    tuple_,
    type_coerce,
    union_all,
)

from .manner import Manner
from .rows import Key, Listed, Listing, Snapshot, snapshot

_PING: Any = select(literal_column("1"))


class Tables(Protocol):
    """The tables that statements are built on (``adk_sessions.models.Models``)."""

    @property
    def sessions(self) -> Table: ...
    @property
    def events(self) -> Table: ...
    @property
    def app_states(self) -> Table: ...
    @property
    def user_states(self) -> Table: ...
    @property
    def state_changes(self) -> Table: ...
    @property
    def host_owned(self) -> bool: ...


class Reads(Manner):
    """The operations that read.

    Args:
        tables: the tables to work on.
    """

    #: whether ``(a, b) < (c, d)`` is known, and makes use of an index
    compares_rows: ClassVar[bool] = False

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        s, e = tables.sessions.c, tables.events.c
        self._is_session = and_(
            s.app_name == bindparam("k_app"),
            s.user_id == bindparam("k_user"),
            s.id == bindparam("k_session"),
        )
        self._is_event = and_(
            e.app_name == bindparam("k_app"),
            e.user_id == bindparam("k_user"),
            e.session_id == bindparam("k_session"),
        )
        changes = tables.state_changes.c
        self._is_change = and_(
            changes.app_name == bindparam("k_app"),
            changes.user_id == bindparam("k_user"),
            changes.session_id == bindparam("k_session"),
        )
        self._is_app = tables.app_states.c.app_name == bindparam("k_app")
        self._is_user = and_(
            tables.user_states.c.app_name == bindparam("k_app"),
            tables.user_states.c.user_id == bindparam("k_user"),
        )
        # max() would read the whole index where it is descending, on MariaDB
        self._newest_time = (
            select(e.timestamp).where(self._is_event).order_by(e.timestamp.desc()).limit(1)
        )
        app, user = tables.app_states, tables.user_states
        self._app_state = select(self.as_text(app.c.state)).where(self._is_app)
        self._user_state = select(self.as_text(user.c.state)).where(self._is_user)
        self._reads: dict[tuple[bool, bool], Any] = {}
        self._lists: dict[tuple[bool, bool | None], Any] = {}
        self._catch_up = union_all(
            self._head(),
            self._event_rows(
                or_(
                    e.timestamp > bindparam("k_since"),
                    e.id.in_(bindparam("k_events", expanding=True)),
                )
            ),
        )
        newest_id = (
            select(e.id)
            .where(self._is_event)
            .order_by(e.timestamp.desc(), e.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        self._revision = select(s.update_time, newest_id).where(self._is_session)

    # --- JSON goes over the wire as the codec's text -------------------------------------------

    def as_text(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        """A JSON column as text."""
        return type_coerce(column, Text())

    def as_json(self, name: str) -> ColumnElement[Any]:
        """A parameter that carries JSON text into a JSON column."""
        return bindparam(name, type_=Text())

    # --- reading -------------------------------------------------------------------------------

    def rows(
        self, conn: Connection, statement: Any, parameters: dict[str, Any]
    ) -> Sequence[Sequence[Any]]:
        """All rows of a SELECT that is built once, and whose parameters are single values."""
        return conn.execute(statement, parameters).all()

    def _compared(
        self, place: Sequence[ColumnElement[Any]], at: Sequence[Any], *, backward: bool = False
    ) -> ColumnElement[bool]:
        """Whether a row's place lies behind another, before it where that is backward."""
        if self.compares_rows:
            rows = tuple_(*place), tuple_(*at)
            return rows[0] < rows[1] if backward else rows[0] > rows[1]
        *wider, last = zip(place, at, strict=True)
        found: ColumnElement[bool] = last[0] < last[1] if backward else last[0] > last[1]
        for column, value in reversed(wider):
            further = column < value if backward else column > value
            bound = column <= value if backward else column >= value
            # the bound by itself is what an index is good for
            found = and_(bound, or_(further, and_(column == value, found)))
        return found

    def _head(self) -> Select[Any]:
        t = self.tables
        s = t.sessions.c
        return select(
            literal_column("0").label("kind"),
            s.id,
            # where events have their invocation
            case((s.archive_time.is_not(None), literal_column("'archived'"))).label(
                "invocation_id"
            ),
            s.update_time.label("time"),
            self.as_text(s.state).label("data"),
            null().label("exact"),
            s.create_time.label("create_time"),
            select(self.as_text(t.app_states.c.state))
            .where(self._is_app)
            .scalar_subquery()
            .label("app_state"),
            select(self.as_text(t.user_states.c.state))
            .where(self._is_user)
            .scalar_subquery()
            .label("user_state"),
        ).where(self._is_session)

    def _event_rows(self, *where: ColumnElement[bool], limited: bool = False) -> Select[Any]:
        e = self.tables.events.c
        rows = select(
            e.id,
            e.invocation_id,
            e.timestamp,
            self.as_text(e.event_data).label("data"),
            e.event_exact,
        ).where(self._is_event, *where)
        if limited:
            rows = rows.order_by(e.timestamp.desc(), e.id.desc()).limit(
                bindparam("k_limit", type_=Integer())
            )
        newest = rows.subquery()
        return select(literal_column("1"), *newest.c, null(), null(), null())

    def _since(self) -> list[ColumnElement[bool]]:
        # the column is at most a microsecond older than the event's own time, which decides
        return [self.tables.events.c.timestamp >= bindparam("k_after")]

    def read(
        self, conn: Connection, key: Key, *, limit: int | None, after: datetime | None, epoch: float
    ) -> Snapshot | None:
        """A session with its newest ``limit`` events of ``after`` or later.

        Args:
            limit: None for all events.
            after: naive UTC, a microsecond before ``epoch``; None for no filter.
            epoch: the same moment exactly, for databases that can compare it.

        The result may hold events that are older than ``epoch``, never lacks one that is not.
        """
        shape = (limit is not None, after is not None)
        statement = self._reads.get(shape)
        if statement is None:
            where = self._since() if after is not None else []
            statement = self._reads[shape] = union_all(
                self._head(), self._event_rows(*where, limited=limit is not None)
            )
        parameters: dict[str, Any] = key.parameters()
        if limit is not None:
            parameters["k_limit"] = limit
        if after is not None:
            parameters |= {"k_after": after, "k_epoch": epoch}
        return snapshot(self.rows(conn, statement, parameters))

    def catch_up(
        self, conn: Connection, key: Key, since: datetime, event_ids: Sequence[str]
    ) -> Snapshot | None:
        """A session with the events appended after revision ``since``, and those named."""
        return snapshot(
            conn.execute(
                self._catch_up, {**key.parameters(), "k_since": since, "k_events": event_ids}
            )
        )

    def revision(self, conn: Connection, key: Key) -> tuple[datetime, str | None] | None:
        """A session's revision and the id of its newest event."""
        rows = self.rows(conn, self._revision, key.parameters())
        return (rows[0][0], rows[0][1]) if rows else None

    def listing(
        self,
        conn: Connection,
        app_name: str,
        user_id: str | None,
        archived: bool | None = False,
    ) -> Listing:
        """The sessions of an app, or of one user of it, in no order.

        Args:
            conn: a connection.
            app_name: the app.
            user_id: the user, None for all.
            archived: False without those that are archived, True only them, None both.
        """
        shape = (user_id is not None, archived)
        statement = self._lists.get(shape)
        if statement is None:
            statement = self._lists[shape] = self._list_statement(*shape)
        app_state: str | None = None
        user_states: dict[str, str] = {}
        sessions: list[Listed] = []
        rows = self.rows(conn, statement, {"k_app": app_name, "k_user": user_id})
        for kind, user, id_, time, data in rows:
            if kind == 2:
                sessions.append(Listed(user, id_, time, data))
            elif kind == 1:
                user_states[user] = data
            else:
                app_state = data
        return Listing(app_state, user_states, sessions)

    def is_archived(self, archived: bool | None) -> list[ColumnElement[bool]]:
        """Conditions on sessions: False for those that are not archived, True for those that are,
        None for all."""
        if archived is None:
            return []
        time = self.tables.sessions.c.archive_time
        return [time.is_not(None) if archived else time.is_(None)]

    def _list_statement(self, one_user: bool, archived: bool | None) -> Any:
        t = self.tables
        s, u, a = t.sessions.c, t.user_states.c, t.app_states.c
        sessions = select(
            literal_column("2").label("kind"),
            s.user_id,
            s.id,
            s.update_time,
            self.as_text(s.state),
        ).where(s.app_name == bindparam("k_app"), *self.is_archived(archived))
        users = select(literal_column("1"), u.user_id, null(), null(), self.as_text(u.state)).where(
            u.app_name == bindparam("k_app")
        )
        if one_user:
            sessions = sessions.where(s.user_id == bindparam("k_user"))
            users = users.where(u.user_id == bindparam("k_user"))
        apps = select(literal_column("0"), null(), null(), null(), self.as_text(a.state)).where(
            self._is_app
        )
        return union_all(sessions, users, apps)

    def app_state(self, conn: Connection, app_name: str) -> str | None:
        """The app's encoded state."""
        rows = self.rows(conn, self._app_state, {"k_app": app_name})
        return rows[0][0] if rows else None

    def user_state(self, conn: Connection, app_name: str, user_id: str) -> str | None:
        """The user's encoded state."""
        rows = self.rows(conn, self._user_state, {"k_app": app_name, "k_user": user_id})
        return rows[0][0] if rows else None

    def clear_leftovers(self, conn: Connection, key: Key) -> None:
        """Deletes what tables without a foreign key may still have of a session that is gone."""
        conn.execute(delete(self.tables.events).where(self._is_event), key.parameters())
        conn.execute(delete(self.tables.state_changes).where(self._is_change), key.parameters())

    def ping(self, conn: Connection) -> None:
        """Asks the database for an answer."""
        conn.execute(_PING)
