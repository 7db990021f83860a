"""The path that any SQL database can go: lock the row, merge in Python, write, in one transaction.

Every function here is synchronous, takes a Connection and does one operation of the store. The
databases that have a shorter way override what they do better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, ClassVar, NamedTuple, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from .. import codec
from ..changes import Change, Changes, encode, removed
from .faults import Overtaken
from .following import Following
from .history import History
from .lifecycle import Lifecycle
from .moving import Moving
from .pages import Pages
from .reads import Tables
from .rows import Deltas, Key, NewEvent, Revisions, States, event_parameters
from .types import Timestamp

TICK = timedelta(microseconds=1)


class Changed(NamedTuple):
    """What was written into a scope's state.

    Attributes:
        text: the keys that were set.
        revision: of a session whose change is still to be recorded.
    """

    text: str
    revision: datetime | None = None


class Generic(Pages, Lifecycle, History, Moving, Following):
    """The operations for any dialect."""

    #: two processes never change the schema at once
    locks_migrations: ClassVar[bool] = False
    #: `rebuilding` is one transaction, and so the lock
    rebuilds_in_transaction: ClassVar[bool] = False

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self._insert_session = insert(tables.sessions).values(
            app_name=bindparam("k_app"),
            user_id=bindparam("k_user"),
            id=bindparam("k_session"),
            state=self.as_json("v_state"),
            create_time=bindparam("v_now", type_=Timestamp()),
            update_time=bindparam("v_now", type_=Timestamp()),
            initial_state=self.same_state(),
        )
        touched = {"update_time": bindparam("v_now", type_=Timestamp())}
        session = update(tables.sessions).where(self._is_session)
        # by whether the state is written too
        self._set_session = {
            False: session.values(touched),
            True: session.values(touched | {"state": self.as_json("v_state")}),
        }
        self._set_state = session.values(state=self.as_json("v_state"))
        scopes = (tables.app_states, tables.user_states)
        self._insert_event = insert(tables.events).values(
            id=bindparam("k_event"),
            app_name=bindparam("k_app"),
            user_id=bindparam("k_user"),
            session_id=bindparam("k_session"),
            invocation_id=bindparam("v_invocation"),
            timestamp=bindparam("v_now", type_=Timestamp()),
            event_data=self.as_json("v_data"),
            event_exact=bindparam("v_exact", type_=Text()),
        )

        changes = tables.state_changes
        at = bindparam("v_revision", type_=Timestamp())
        last = (
            select(changes.c.revision)
            .where(self._is_change)
            .order_by(changes.c.revision.desc(), changes.c.number.desc())
            .limit(1)
        )
        self._last_change = select(
            self._newest_time.scalar_subquery(),
            last.scalar_subquery(),
            last.with_only_columns(changes.c.number).scalar_subquery(),
        )
        self._insert_change = insert(changes).values(
            app_name=bindparam("k_app"),
            user_id=bindparam("k_user"),
            session_id=bindparam("k_session"),
            revision=at,
            number=bindparam("v_number", type_=Integer()),
            change_time=bindparam("v_now", type_=Timestamp()),
            delta=self.as_json("v_delta"),
            deleted=self.as_json("v_deleted"),
        )
        self._insert_scope = {table: self.insert_scope(insert(table), table) for table in scopes}
        self._set_scope = {
            table: update(table)
            .where(self.is_scope(table))
            .values(
                state=self.as_json("v_state"), update_time=bindparam("v_now", type_=Timestamp())
            )
            for table in scopes
        }

    # --- writing -------------------------------------------------------------------------------

    def create(self, conn: Connection, key: Key, now: datetime, deltas: Deltas) -> States:
        """Inserts a session and sets its deltas in the wider scopes; makes both scope rows.

        Returns:
            The app's and the user's state as they are now, and the session's.

        Raises:
            IntegrityError: there is such a session already.
        """
        session_state = deltas.session or "{}"
        self.check_size(conn, "state", session_state)
        self.write(
            conn, self._insert_session, {**key.parameters(), "v_state": session_state, "v_now": now}
        )
        app = self._merge_scope(conn, self.tables.app_states, key, deltas.app, now)
        user = self._merge_scope(conn, self.tables.user_states, key, deltas.user, now)
        return States(app, user, session_state)

    def append(
        self,
        conn: Connection,
        key: Key,
        expected: datetime | None,
        events: Sequence[NewEvent],
        deltas: Deltas,
        *,
        replace: bool = False,
    ) -> Revisions | None:
        """Appends events and sets their deltas, if the session is still at revision ``expected``.

        Nothing is appended to a session that is archived.

        Args:
            conn: in a transaction if an operation needs one.
            key: the session.
            expected: its revision as the caller knows it; None for any.
            events: one or more, in order.
            deltas: what all of them together set.
            replace: the session's own state becomes what ``deltas`` has for it.

        Returns:
            The session's revisions, None when it was not at ``expected``, is archived or does not
            exist.

        Raises:
            IntegrityError: the session has an event with one of the ids.
        """
        for event in events:
            self.check_size(conn, "event", event.text.data, event.text.exact or "")
        row = self.lock_session(conn, key, with_state=deltas.session is not None)
        if row is None or row.archive_time or expected not in (None, row.update_time):
            return None
        newest = conn.execute(self._newest_time, key.parameters()).scalar()
        # the newest event is past update_time only where google-adk once moved that back
        base: datetime = max(newest or row.update_time, row.update_time)
        now = self._insert_events(conn, key, events, base)
        parameters: dict[str, Any] = {**key.parameters(), "v_now": now}
        if deltas.session is not None:
            parameters["v_state"] = (
                deltas.session if replace else codec.merge_state(row.state, deltas.session)
            )
            self.check_size(conn, "state", parameters["v_state"])
        self._update(conn, self._set_session[deltas.session is not None], parameters)
        self._merge_wider(conn, key, deltas, now)
        return Revisions(row.update_time, now)

    def update_state(
        self, conn: Connection, key: Key, changes: Changes, now: datetime
    ) -> States | None:
        """Changes the states of scopes, and no session's revision.

        Args:
            conn: in a transaction.
            key: the session; where only wider scopes change, its other ids may be anything.
            changes: of each scope.
            now: the time, for the wider scopes' rows.

        Returns:
            What was written in each scope, None when there is no such session.

        Raises:
            InvalidInputError: a key that is added to is not a number, or a state is too large.
        """
        written: dict[str, str] = {}
        revision: datetime | None = None
        if changes.session is not None:
            changed = self._change(conn, self.tables.sessions, key, changes.session, now)
            if changed is None:
                return None
            written["session"], revision = changed
        for name, table in (("app", self.tables.app_states), ("user", self.tables.user_states)):
            change: Change | None = getattr(changes, name)
            if change is not None:
                changed = self._change(conn, table, key, change, now)
                if changed is None:
                    parameters = {**key.parameters(), "v_now": now, "v_state": "{}"}
                    self.insert_if_missing(conn, table, parameters)
                    changed = self._change(conn, table, key, change, now)
                if changed is None:
                    raise Overtaken
                written[name] = changed.text
        if changes.session is not None and revision is not None:
            # it reads, and a snapshot would be older than the rows that were waited for after it
            self._record(conn, key, revision, written["session"], changes.session, now)
        return States(*map(written.get, States._fields))

    def delete(self, conn: Connection, key: Key) -> None:
        """Deletes a session and its events, also where the tables have no foreign key."""
        self.lock_session(conn, key, with_state=False)
        conn.execute(delete(self.tables.events).where(self._is_event), key.parameters())
        if not self.cascades:
            changes = self.tables.state_changes
            conn.execute(delete(changes).where(self._is_change), key.parameters())
        conn.execute(delete(self.tables.sessions).where(self._is_session), key.parameters())

    # --- what databases do differently ---------------------------------------------------------

    @property
    def cascades(self) -> bool:
        """Whether state_changes are sure to go with their session: SQLite enforces its foreign
        keys, and a host application has them, or not."""
        return False

    def same_state(self) -> ColumnElement[Any]:
        """In an INSERT: what goes into the column ``state``."""
        return self.as_json("v_state")

    def write(self, conn: Connection, statement: Any, parameters: dict[str, Any]) -> int:
        """Runs a statement that is built once; how many rows it wrote."""
        return conn.execute(statement, parameters).rowcount

    def lock_session(self, conn: Connection, key: Key, *, with_state: bool) -> Any:
        """Holds the session's row until the transaction ends; its update_time and state."""
        if not self.lock(conn, self.tables.sessions, self._is_session, key):
            return None
        return conn.execute(self.session_row(with_state), key.parameters()).first()

    def lock_scope(self, conn: Connection, table: Table, key: Key) -> Any:
        """Holds a scope's row until the transaction ends; its update_time and state."""
        if not self.lock(conn, table, self.is_scope(table), key):
            return None
        return conn.execute(self.wider_row(table), key.parameters()).first()

    def lock(self, conn: Connection, table: Table, where: ColumnElement[bool], key: Key) -> bool:
        """Locks a row by writing it as it is: every database locks what it updates.

        Returns:
            Whether there was a row to lock. One that is found afterwards was put there by somebody
            else in between, and is not locked: merging into it lost 2 keys of 46.
        """
        locked = conn.execute(
            update(table).where(where).values(update_time=table.c.update_time), key.parameters()
        )
        return locked.rowcount > 0

    def insert_if_missing(self, conn: Connection, table: Table, parameters: dict[str, Any]) -> None:
        """Inserts an empty scope row unless somebody else has done so meanwhile."""
        savepoint = conn.begin_nested()
        try:
            conn.execute(self._insert_scope[table], parameters)
        except IntegrityError:
            savepoint.rollback()
        else:
            savepoint.commit()

    def check_size(self, conn: Connection, field: str, *texts: str) -> None:
        """Refuses what the server would not take in one packet; most have no such limit."""

    def require_sight(self, conn: Connection) -> None:
        """Nothing: what a role may read, it sees.

        Raises:
            ConfigurationError: policies hide rows from this role, so that there seem to be none.
        """

    @contextmanager
    def transaction(self, conn: Connection, *, write: bool = True) -> Iterator[None]:
        """One transaction of a connection that `Database.submit` gave; all of it or nothing."""
        with conn.begin():
            yield

    @contextmanager
    def migration_lock(self, conn: Connection) -> Iterator[bool]:
        """Holds the lock for changing the schema, if it can be had at once, over transactions.

        A database that this library does not know has no lock that it could take.
        """
        yield True

    def require_policies(self, conn: Connection) -> None:
        """Nothing: users are kept apart by each statement alone."""

    @contextmanager
    def rebuilding(self, conn: Connection) -> Iterator[None]:
        """What a database needs around alembic, which commits each revision."""
        yield

    # --- shared pieces -------------------------------------------------------------------------

    def session_row(self, with_state: bool) -> Select[Any]:
        s = self.tables.sessions.c
        columns: list[ColumnElement[Any]] = [s.update_time, s.archive_time]
        if with_state:
            columns.append(self.as_text(s.state).label("state"))
        return select(*columns).where(self._is_session)

    def wider_row(self, table: Table) -> Select[Any]:
        columns = (table.c.update_time, self.as_text(table.c.state).label("state"))
        return select(*columns).where(self.is_scope(table))

    def _insert_events(
        self, conn: Connection, key: Key, events: Sequence[NewEvent], base: datetime
    ) -> datetime:
        """Inserts events after revision ``base``; the revision of the last one."""
        rows = [
            {**event_parameters(key, event), "v_now": max(event.timestamp, base + number * TICK)}
            for number, event in enumerate(events, 1)
        ]
        if len(rows) > 1:
            conn.execute(self._insert_event, rows)
        else:
            self.write(conn, self._insert_event, rows[0])
        return cast(datetime, rows[-1]["v_now"])

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
        if lock and not self.lock(conn, table, self.is_scope(table), key):
            return None
        is_user = table is self.tables.user_states
        rows = self.rows(conn, self._user_state if is_user else self._app_state, key.parameters())
        return rows[0][0] if rows else None

    def is_scope(self, table: Table) -> ColumnElement[bool]:
        return self._is_user if table is self.tables.user_states else self._is_app

    def _update(self, conn: Connection, statement: Any, parameters: dict[str, Any]) -> None:
        """Writes one row, which a snapshot of REPEATABLE READ may not have though it is there."""
        if not self.write(conn, statement, parameters):
            raise Overtaken

    def _change(
        self, conn: Connection, table: Table, key: Key, change: Change, now: datetime
    ) -> Changed | None:
        """Changes one scope's state on its locked row; None without a row."""
        parameters: dict[str, Any] = {**key.parameters(), "v_now": now}
        if table is self.tables.sessions:
            row = self.lock_session(conn, key, with_state=True)
            statement = self._set_state
        else:
            row = self.lock_scope(conn, table, key)
            statement = self._set_scope[table]
            if row is not None:
                parameters["v_now"] = max(now, row.update_time)
        if row is None:
            return None
        text = encode(change, codec.load_state(row.state) if change.adds else {})
        parameters["v_state"] = codec.merge_state(row.state, text, change.deletes)
        self.check_size(conn, "state", parameters["v_state"])
        self._update(conn, statement, parameters)
        return Changed(text, row.update_time if table is self.tables.sessions else None)

    def _record(
        self,
        conn: Connection,
        key: Key,
        revision: datetime,
        text: str,
        change: Change,
        now: datetime,
    ) -> None:
        """Notes what has changed a session's own state; its row is held."""
        newest, last, number = conn.execute(self._last_change, key.parameters()).one()
        # an event is past update_time only where google-adk once moved that back
        revision = max(revision, newest or revision)
        parameters = {
            **key.parameters(),
            "v_revision": revision,
            "v_number": number + 1 if last == revision else 1,
            "v_now": now,
            "v_delta": text,
            "v_deleted": removed(change),
        }
        conn.execute(self._insert_change, parameters)

    def _merge_wider(self, conn: Connection, key: Key, deltas: Deltas, now: datetime) -> None:
        """Sets deltas in the wider scopes; rows are locked in this order."""
        if deltas.app is not None:
            self._merge_scope(conn, self.tables.app_states, key, deltas.app, now)
        if deltas.user is not None:
            self._merge_scope(conn, self.tables.user_states, key, deltas.user, now)

    def _merge_scope(
        self, conn: Connection, table: Table, key: Key, delta: str | None, now: datetime
    ) -> str:
        lock = delta is not None
        parameters = {**key.parameters(), "v_now": now}
        stored = self.scope_row(conn, table, key, lock=lock)
        if stored is None:
            self.insert_if_missing(conn, table, {**parameters, "v_state": "{}"})
            # locked even to be read: a snapshot may be older than the row somebody else has made
            stored = self.scope_row(conn, table, key, lock=True)
        if delta is None:
            return stored or "{}"
        merged = codec.merge_state(stored, delta)
        self.check_size(conn, "state", merged)
        self._update(conn, self._set_scope[table], {**parameters, "v_state": merged})
        return merged
