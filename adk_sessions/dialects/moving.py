"""Whole sessions, on their way out of a database and into another.

A session may be longer than memory, so it is read in several statements, and nothing is held open
between them. What makes it one moment all the same: the head says in one statement how many events
and changes there are and which are the last ones; events never change, and later ones are left
out; and if what is found is not as many, or belongs to a session that was made again under the same
ids, the reader begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Integer,
    Select,
    String,
    Table,
    bindparam,
    func,
    insert,
    or_,
    select,
    text,
    update,
)

from .reads import Reads
from .rows import Key, StoredEvent
from .types import MYSQL_FAMILY, Json, Timestamp

#: rows of a statement: enough to make its round trip cheap, few enough to hold
BATCH = 500
# Characters of events in one INSERT: packets of servers are limited, memory too.
_LARGEST_INSERT = 262_144

_EARLIEST = datetime(1000, 1, 1)
_LIMIT = bindparam("k_limit", type_=Integer())


class Head(NamedTuple):
    """A session but for its events and changes, with how many there are and which are the last."""

    state: str | None
    create_time: datetime
    update_time: datetime
    title: str | None
    labels: str | None
    archive_time: datetime | None
    expire_time: datetime | None
    initial_state: str | None
    events: int
    newest: datetime | None
    state_changes: int
    last_revision: datetime | None
    last_number: int | None


class StoredChange(NamedTuple):
    """One row of state_changes."""

    revision: datetime
    number: int
    change_time: datetime
    delta: str | None
    deleted: str | None


class Scope(NamedTuple):
    """An app's or a user's stored state."""

    user_id: str
    state: str | None
    update_time: datetime


class InOrder:
    """Batches of events in the order of their append, which readers see.

    Databases order equal times by ids as their collation does, so such a run is held back until it
    is whole.
    """

    def __init__(self) -> None:
        self._held: list[StoredEvent] = []

    def of(self, batch: Iterable[StoredEvent]) -> list[StoredEvent]:
        """What is certain to come next."""
        rows = [*self._held, *batch]
        cut = len(rows)
        while cut and rows[cut - 1].timestamp == rows[-1].timestamp:
            cut -= 1
        self._held = rows[cut:]
        return sorted(rows[:cut], key=attrgetter("timestamp", "id"))

    def all(self, batch: Iterable[StoredEvent] = ()) -> list[StoredEvent]:
        """What comes next, as nothing follows."""
        held, self._held = self._held, []
        return sorted([*held, *batch], key=attrgetter("timestamp", "id"))


class Moving(Reads):
    """The statements."""

    # --- which ---------------------------------------------------------------------------------

    def session_count(self, conn: Connection, app_name: str, user_id: str | None) -> int:
        """How many sessions an app has, or one user of it."""
        s = self.tables.sessions.c
        where = [s.app_name == app_name, *([] if user_id is None else [s.user_id == user_id])]
        return int(conn.execute(select(func.count()).where(*where)).scalar_one())

    def session_keys(
        self, conn: Connection, app_name: str, user_id: str | None, after: Key | None
    ) -> list[Key]:
        """The next sessions of an app, or of one user of it, in the order of the primary key.

        Args:
            conn: a connection.
            app_name: the app.
            user_id: None for all users.
            after: the last one of the page before; None for the first page.
        """
        pages = self._key_pages
        last = after or Key(app_name, "", "")
        of_user = {"k_app": app_name, "k_user": user_id, "k_session": last.session_id}
        if user_id is not None:
            page = pages["user"] if after is None else pages["rest"]
            return self._keys(conn, page, app_name, of_user, BATCH)
        if after is None:
            return self._keys(conn, pages["app"], app_name, {"k_app": app_name}, BATCH)
        # two ranges of the index: as one condition not every database finds them
        of_user["k_user"] = last.user_id
        found = self._keys(conn, pages["rest"], app_name, of_user, BATCH)
        if left := BATCH - len(found):
            found += self._keys(conn, pages["next"], app_name, of_user, left)
        return found

    def _keys(
        self, conn: Connection, page: Any, app: str, parameters: dict[str, Any], limit: int
    ) -> list[Key]:
        rows = self.rows(conn, page, {**parameters, "k_limit": limit})
        return [Key(app, user, session) for user, session in rows]

    @cached_property
    def _key_pages(self) -> dict[str, Select[Any]]:
        s = self.tables.sessions.c
        page = select(s.user_id, s.id).where(s.app_name == bindparam("k_app")).limit(_LIMIT)
        of_user = page.where(s.user_id == bindparam("k_user")).order_by(s.id)
        return {
            "app": page.order_by(s.user_id, s.id),
            "next": page.where(s.user_id > bindparam("k_user")).order_by(s.user_id, s.id),
            "user": of_user,
            "rest": of_user.where(s.id > bindparam("k_session")),
        }

    # --- states of apps and users --------------------------------------------------------------

    def app_scope(self, conn: Connection, app_name: str) -> Scope | None:
        """An app's state."""
        rows = self.rows(conn, self._scopes_of["app"], {"k_app": app_name})
        return Scope("", *rows[0]) if rows else None

    def user_scopes(
        self, conn: Connection, app_name: str, user_id: str | None, after: str | None
    ) -> list[Scope]:
        """The state of one user of an app, or the next ones of all its users."""
        parameters: dict[str, Any] = {"k_app": app_name, "k_user": user_id}
        if user_id is not None:
            rows = self.rows(conn, self._scopes_of["user"], parameters)
            return [Scope(user_id, *row) for row in rows]
        parameters |= {"k_user": after, "k_limit": BATCH}
        page = self._scopes_of["users" if after is None else "more"]
        return [Scope(*row) for row in self.rows(conn, page, parameters)]

    @cached_property
    def _scopes_of(self) -> dict[str, Select[Any]]:
        app, user = self.tables.app_states, self.tables.user_states
        states = {t: (self.as_text(t.c.state), t.c.update_time) for t in (app, user)}
        users = (
            select(user.c.user_id, *states[user])
            .where(user.c.app_name == bindparam("k_app"))
            .order_by(user.c.user_id)
            .limit(_LIMIT)
        )
        return {
            "app": select(*states[app]).where(self._is_app),
            "user": select(*states[user]).where(self._is_user),
            "users": users,
            "more": users.where(user.c.user_id > bindparam("k_user")),
        }

    # --- one session ---------------------------------------------------------------------------

    def session_head(self, conn: Connection, key: Key) -> Head | None:
        """A session's row, and how much belongs to it."""
        rows = self.rows(conn, self._whole["head"], key.parameters())
        return Head(*rows[0]) if rows else None

    def session_events(
        self, conn: Connection, key: Key, head: Head, after: StoredEvent | None
    ) -> list[StoredEvent]:
        """The next events of a session as it was at its head; none if it was made again since.

        Events of one time come in the database's own order.

        Args:
            conn: a connection.
            key: the session.
            head: of the moment that is read.
            after: the last one of the batch before; None for the first batch.
        """
        parameters = {**key.parameters(), "k_until": head.newest, "k_limit": BATCH}
        if after is not None:
            parameters |= {"k_time": after.timestamp, "k_event": after.id}
        rows = self.rows(conn, self._whole["events" if after is None else "later"], parameters)
        return [StoredEvent(*row[:5]) for row in rows if row[5] == head.create_time]

    def session_changes(
        self, conn: Connection, key: Key, head: Head, after: StoredChange | None
    ) -> list[StoredChange]:
        """The next changes of a session's state, likewise."""
        parameters = {
            **key.parameters(),
            "k_until": head.last_revision,
            "k_last": head.last_number,
            "k_time": _EARLIEST if after is None else after.revision,
            "k_number": 0 if after is None else after.number,
            "k_limit": BATCH,
        }
        rows = self.rows(conn, self._whole["changes"], parameters)
        return [StoredChange(*row[:5]) for row in rows if row[5] == head.create_time]

    @cached_property
    def _whole(self) -> dict[str, Select[Any]]:
        s, e, c = (self.tables.sessions.c, self.tables.events.c, self.tables.state_changes.c)
        until, time = (bindparam(name, type_=Timestamp()) for name in ("k_until", "k_time"))
        changes = select(c.revision).where(self._is_change)
        last = changes.order_by(c.revision.desc(), c.number.desc()).limit(1)
        head = select(
            self.as_text(s.state),
            *(s.create_time, s.update_time, s.title, self.as_text(s.labels)),
            *(s.archive_time, s.expire_time, self.as_text(s.initial_state)),
            select(func.count()).where(self._is_event).scalar_subquery(),
            self._newest_time.scalar_subquery(),
            select(func.count()).where(self._is_change).scalar_subquery(),
            last.scalar_subquery(),
            last.with_only_columns(c.number).scalar_subquery(),
        ).where(self._is_session)
        made = select(s.create_time).where(self._is_session).scalar_subquery()
        events = (
            select(
                *(e.id, e.invocation_id, e.timestamp),
                *(self.as_text(e.event_data), e.event_exact, made),
            )
            .where(self._is_event, e.timestamp <= until)
            .order_by(e.timestamp, e.id)
            .limit(_LIMIT)
        )
        number = bindparam("k_number", type_=Integer())
        return {
            "head": head,
            "events": events,
            "later": events.where(
                self._compared([e.timestamp, e.id], [time, bindparam("k_event", type_=String())])
            ),
            "changes": select(
                *(c.revision, c.number, c.change_time),
                *(self.as_text(c.delta), self.as_text(c.deleted), made),
            )
            .where(
                self._is_change,
                self._compared([c.revision, c.number], [time, number]),
                c.revision <= until,
                or_(c.revision < until, c.number <= bindparam("k_last", type_=Integer())),
            )
            .order_by(c.revision, c.number)
            .limit(_LIMIT),
        }

    # --- writing -------------------------------------------------------------------------------

    def set_start(self, conn: Connection, key: Key, text: str) -> None:
        """Records what a session's own state began with."""
        values = {"initial_state": self.as_json("v_state")}
        statement = update(self.tables.sessions).where(self._is_session).values(values)
        conn.execute(statement, {**key.parameters(), "v_state": text})

    def insert_rows(
        self, conn: Connection, table: Table, key: Key | None, rows: Iterable[dict[str, Any]]
    ) -> None:
        """Inserts rows, their JSON as text.

        Args:
            conn: in a transaction.
            table: into which.
            key: the session that they belong to, None for a row that says so itself.
            rows: by column; all with the same ones. They are taken as they are needed.
        """
        of = key._asdict() if key is not None else {}
        statement: Any = None
        for batch in _batches(rows):
            if statement is None:
                statement = self._insertion(table, [*of, *batch[0]])
            of_row = {f"v_{name}": value for name, value in of.items()}
            conn.execute(
                statement, [of_row | {f"v_{n}": v for n, v in row.items()} for row in batch]
            )

    def _insertion(self, table: Table, names: Sequence[str]) -> Any:
        statement = self._insertions.get((table, *names))
        if statement is None:
            values = {
                name: self.as_json(f"v_{name}")
                if isinstance(column.type, Json)
                else bindparam(f"v_{name}", type_=column.type)
                for name, column in table.columns.items()
                if name in names
            }
            statement = self._insertions[(table, *names)] = insert(table).values(values)
        return statement

    @cached_property
    def _insertions(self) -> dict[tuple[Any, ...], Any]:
        return {}

    # --- where it is ---------------------------------------------------------------------------

    def whereabouts(self, conn: Connection) -> tuple[Any, ...] | None:
        """What no other database has, as far as a server tells; None where it does not."""
        if conn.dialect.name == "postgresql":
            return tuple(
                conn.execute(
                    text("SELECT pg_postmaster_start_time(), current_database(), current_schema()")
                ).one()
            )
        if conn.dialect.name in MYSQL_FAMILY:
            return tuple(
                conn.execute(text("SELECT @@hostname, @@port, @@datadir, database()")).one()
            )
        return None


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        length = sum(len(value) for value in row.values() if isinstance(value, str))
        if batch and (len(batch) == BATCH or size + length > _LARGEST_INSERT):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += length
    if batch:
        yield batch
