"""The path that any SQL database can go: lock the row, merge in Python, write, in one transaction.

Every function here is synchronous, takes a Connection and does one operation of the store. The
databases that have a shorter way override what they do better. Reads are one statement everywhere,
so they are one snapshot: the state always matches the events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, NamedTuple, Protocol

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError

from .. import codec
from .types import Timestamp

TICK = timedelta(microseconds=1)


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


class Key(NamedTuple):
    """Which session."""

    app_name: str
    user_id: str
    session_id: str

    def parameters(self) -> dict[str, Any]:
        """As parameters of a statement. They must not be named like a column: SQLAlchemy would
        take them for values to set."""
        return {"k_app": self.app_name, "k_user": self.user_id, "k_session": self.session_id}


class NewEvent(NamedTuple):
    """An event's row but for its column ``timestamp``, which the session's clock decides.

    ``timestamp`` is the event's own time as naive UTC.
    """

    id: str
    invocation_id: str
    timestamp: datetime
    text: codec.EventText


class Deltas(NamedTuple):
    """Encoded state of each scope, None where there is nothing to write."""

    app: str | None
    user: str | None
    session: str | None


class States(NamedTuple):
    """Encoded state of each scope as stored, None for a missing row."""

    app: str | None
    user: str | None
    session: str | None


class StoredEvent(NamedTuple):
    """One row of events; ``timestamp`` is the column, the session's revision after this event."""

    id: str
    invocation_id: str
    timestamp: datetime
    data: str | None
    exact: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session and some of its events at one moment, events in the order of their append."""

    create_time: datetime
    update_time: datetime
    states: States
    events: list[StoredEvent]


class Listed(NamedTuple):
    """One session of a listing."""

    user_id: str
    id: str
    update_time: datetime
    state: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """Sessions of an app, or of one of its users, with the wider scopes' states."""

    app_state: str | None
    user_states: dict[str, str]
    sessions: list[Listed]


class Generic:
    """Statements and operations for any dialect.

    Args:
        tables: the tables to work on.
    """

    #: one statement does an operation, so it needs no transaction around it
    autocommit: ClassVar[bool] = False

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
        self._is_app = tables.app_states.c.app_name == bindparam("k_app")
        self._is_user = and_(
            tables.user_states.c.app_name == bindparam("k_app"),
            tables.user_states.c.user_id == bindparam("k_user"),
        )
        self._newest_time = select(func.max(e.timestamp)).where(self._is_event)
        self._reads: dict[tuple[bool, bool], Any] = {}
        self._lists: dict[bool, Any] = {}
        self._catch_up = union_all(
            self._head(),
            self._event_rows(or_(e.timestamp > bindparam("k_since"), e.id == bindparam("k_event"))),
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

    def _head(self) -> Select[Any]:
        t = self.tables
        s = t.sessions.c
        return select(
            literal_column("0").label("kind"),
            s.id,
            null().label("invocation_id"),
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
        return snapshot(conn.execute(statement, parameters))

    def catch_up(
        self, conn: Connection, key: Key, since: datetime, event_id: str
    ) -> Snapshot | None:
        """A session with the events appended after revision ``since``, and the one named."""
        return snapshot(
            conn.execute(
                self._catch_up, {**key.parameters(), "k_since": since, "k_event": event_id}
            )
        )

    def revision(self, conn: Connection, key: Key) -> tuple[datetime, str | None] | None:
        """A session's revision and the id of its newest event."""
        row = conn.execute(self._revision, key.parameters()).first()
        return None if row is None else (row[0], row[1])

    def list(self, conn: Connection, app_name: str, user_id: str | None) -> Listing:
        """The sessions of an app, or of one user of it, in no order."""
        statement = self._lists.get(user_id is not None)
        if statement is None:
            statement = self._lists[user_id is not None] = self._listing(user_id is not None)
        app_state: str | None = None
        user_states: dict[str, str] = {}
        sessions: list[Listed] = []
        for kind, user, id_, time, data in conn.execute(
            statement, {"k_app": app_name, "k_user": user_id}
        ):
            if kind == 0:
                app_state = data
            elif kind == 1:
                user_states[user] = data
            else:
                sessions.append(Listed(user, id_, time, data))
        return Listing(app_state, user_states, sessions)

    def _listing(self, one_user: bool) -> Any:
        t = self.tables
        s, u, a = t.sessions.c, t.user_states.c, t.app_states.c
        sessions = select(
            literal_column("2").label("kind"),
            s.user_id,
            s.id,
            s.update_time,
            self.as_text(s.state),
        ).where(s.app_name == bindparam("k_app"))
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
        t = self.tables.app_states
        found: str | None = conn.execute(
            select(self.as_text(t.c.state)).where(self._is_app), {"k_app": app_name}
        ).scalar()
        return found

    def user_state(self, conn: Connection, app_name: str, user_id: str) -> str | None:
        """The user's encoded state."""
        t = self.tables.user_states
        found: str | None = conn.execute(
            select(self.as_text(t.c.state)).where(self._is_user),
            {"k_app": app_name, "k_user": user_id},
        ).scalar()
        return found

    # --- writing -------------------------------------------------------------------------------

    def create(self, conn: Connection, key: Key, now: datetime, deltas: Deltas) -> States:
        """Inserts a session and sets its deltas in the wider scopes; makes both scope rows.

        Returns:
            The app's and the user's state as they are now, and the session's.

        Raises:
            IntegrityError: there is such a session already.
        """
        session_state = deltas.session or "{}"
        self.check_size(conn, session_state)
        conn.execute(
            insert(self.tables.sessions).values(
                app_name=bindparam("k_app"),
                user_id=bindparam("k_user"),
                id=bindparam("k_session"),
                state=self.as_json("v_state"),
                create_time=bindparam("v_now", type_=Timestamp()),
                update_time=bindparam("v_now", type_=Timestamp()),
            ),
            {**key.parameters(), "v_state": session_state, "v_now": now},
        )
        app = self._merge_scope(conn, self.tables.app_states, key, deltas.app, now)
        user = self._merge_scope(conn, self.tables.user_states, key, deltas.user, now)
        return States(app, user, session_state)

    def append(
        self, conn: Connection, key: Key, expected: datetime, event: NewEvent, deltas: Deltas
    ) -> datetime | None:
        """Appends an event and sets its deltas, if the session is still at revision ``expected``.

        Returns:
            The session's new revision, None when it is not at ``expected`` or does not exist.

        Raises:
            IntegrityError: the session has an event with this id.
        """
        self.check_size(conn, event.text.data, event.text.exact or "")
        row = self.lock_session(conn, key, with_state=deltas.session is not None)
        if row is None or row.update_time != expected:
            return None
        newest = conn.execute(self._newest_time, key.parameters()).scalar()
        # the newest event is past update_time only where google-adk once moved that back
        now: datetime = max(event.timestamp, max(newest or row.update_time, row.update_time) + TICK)
        self._insert_event(conn, key, event, now)
        values: dict[str, Any] = {"update_time": bindparam("v_now", type_=Timestamp())}
        parameters: dict[str, Any] = {**key.parameters(), "v_now": now}
        if deltas.session is not None:
            values["state"] = self.as_json("v_state")
            parameters["v_state"] = codec.merge_state(row.state, deltas.session)
            self.check_size(conn, parameters["v_state"])
        conn.execute(
            update(self.tables.sessions).where(self._is_session).values(values), parameters
        )
        if deltas.app is not None:
            self._merge_scope(conn, self.tables.app_states, key, deltas.app, now)
        if deltas.user is not None:
            self._merge_scope(conn, self.tables.user_states, key, deltas.user, now)
        return now

    def delete(self, conn: Connection, key: Key) -> None:
        """Deletes a session and its events; the events too where the tables have no foreign key."""
        self.lock_session(conn, key, with_state=False)
        conn.execute(delete(self.tables.events).where(self._is_event), key.parameters())
        conn.execute(delete(self.tables.sessions).where(self._is_session), key.parameters())

    def ping(self, conn: Connection) -> None:
        """Asks the database for an answer."""
        conn.execute(select(literal_column("1")))

    # --- what databases do differently ---------------------------------------------------------

    def lock_session(self, conn: Connection, key: Key, *, with_state: bool) -> Any:
        """Holds the session's row until the transaction ends; its update_time and state."""
        self.lock(conn, self.tables.sessions, self._is_session, key)
        return conn.execute(self.session_row(with_state), key.parameters()).first()

    def lock(self, conn: Connection, table: Table, where: ColumnElement[bool], key: Key) -> None:
        """Locks a row by writing it as it is: every database locks what it updates."""
        conn.execute(
            update(table).where(where).values(update_time=table.c.update_time), key.parameters()
        )

    def insert_if_missing(self, conn: Connection, table: Table, parameters: dict[str, Any]) -> None:
        """Inserts an empty scope row unless somebody else has done so meanwhile."""
        savepoint = conn.begin_nested()
        try:
            conn.execute(self.insert_scope(insert(table), table), parameters)
        except IntegrityError:
            savepoint.rollback()
        else:
            savepoint.commit()

    def check_size(self, conn: Connection, *texts: str) -> None:
        """Refuses what the server would not take in one packet; most have no such limit."""

    @contextmanager
    def migrating(self, conn: Connection) -> Iterator[bool]:
        """Holds the lock for changing the schema, if it can be had at once; alembic commits.

        A database that this library does not know has no lock that it could take.
        """
        yield True

    # --- shared pieces -------------------------------------------------------------------------

    def session_row(self, with_state: bool) -> Select[Any]:
        s = self.tables.sessions.c
        columns: list[ColumnElement[Any]] = [s.update_time]
        if with_state:
            columns.append(self.as_text(s.state).label("state"))
        return select(*columns).where(self._is_session)

    def _insert_event(self, conn: Connection, key: Key, event: NewEvent, now: datetime) -> None:
        conn.execute(
            insert(self.tables.events).values(
                id=bindparam("k_event"),
                app_name=bindparam("k_app"),
                user_id=bindparam("k_user"),
                session_id=bindparam("k_session"),
                invocation_id=bindparam("v_invocation"),
                timestamp=bindparam("v_now", type_=Timestamp()),
                event_data=self.as_json("v_data"),
                event_exact=bindparam("v_exact", type_=Text()),
            ),
            {**event_parameters(key, event), "v_now": now},
        )

    def insert_scope(self, statement: Any, table: Table) -> Any:
        """Completes an INSERT of a scope's row."""
        values = {
            "app_name": bindparam("k_app"),
            "state": self.as_json("v_state"),
            "update_time": bindparam("v_now", type_=Timestamp()),
        }
        if table is self.tables.user_states:
            values["user_id"] = bindparam("k_user")
        return statement.values(values)

    def scope_row(self, conn: Connection, table: Table, key: Key, *, lock: bool) -> Any:
        """A scope's stored state, and with ``lock`` its row held."""
        where = self.is_scope(table)
        if lock:
            self.lock(conn, table, where, key)
        return conn.execute(
            select(self.as_text(table.c.state)).where(where), key.parameters()
        ).scalar()

    def is_scope(self, table: Table) -> ColumnElement[bool]:
        return self._is_user if table is self.tables.user_states else self._is_app

    def _merge_scope(
        self, conn: Connection, table: Table, key: Key, delta: str | None, now: datetime
    ) -> str:
        lock = delta is not None
        parameters = {**key.parameters(), "v_now": now}
        stored = self.scope_row(conn, table, key, lock=lock)
        if stored is None:
            self.insert_if_missing(conn, table, {**parameters, "v_state": "{}"})
            stored = self.scope_row(conn, table, key, lock=lock)
        if delta is None:
            return stored or "{}"
        merged = codec.merge_state(stored, delta)
        self.check_size(conn, merged)
        conn.execute(
            update(table)
            .where(self.is_scope(table))
            .values(
                state=self.as_json("v_state"), update_time=bindparam("v_now", type_=Timestamp())
            ),
            {**parameters, "v_state": merged},
        )
        return merged


def event_parameters(key: Key, event: NewEvent) -> dict[str, Any]:
    """The parameters of an event's INSERT but for its time."""
    return {
        **key.parameters(),
        "k_event": event.id,
        "v_invocation": event.invocation_id,
        "v_data": event.text.data,
        "v_exact": event.text.exact,
    }


def snapshot(rows: Iterable[Any]) -> Snapshot | None:
    """What the statements of `Generic.read` return: one head row, told by its kind, and events."""
    head: Any = None
    events: list[StoredEvent] = []
    for row in rows:
        if row[0] == 0:
            head = row
        else:
            events.append(StoredEvent(*row[1:6]))
    if head is None:
        return None
    _, _, _, update_time, state, _, create_time, app_state, user_state = head
    events.sort(key=lambda event: (event.timestamp, event.id))
    return Snapshot(create_time, update_time, States(app_state, user_state, state), events)
