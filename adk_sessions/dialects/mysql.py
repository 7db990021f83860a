"""MySQL and MariaDB: lock, merge in Python, write, in one transaction and few round trips.

An append is a read that locks every row it is going to write, the INSERT, one UPDATE of all those
rows and the COMMIT, whichever scopes its delta names.

Locking reads come before plain ones: the snapshot of REPEATABLE READ is taken by the first plain
read, and must not be older than the row that was waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    case,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.mysql import insert as upsert

from .. import codec
from .base import Generic
from .packets import STATEMENT, MySQLManner, escaped_size
from .reads import Tables
from .rows import Deltas, Key, NewEvent, Revisions, States
from .types import Timestamp

# What drivers put into one INSERT of many rows, at the most.
_MANY_ROWS = 1_024_000


class NamedLock(Generic):
    """The generic path; a migration holds one of the server's named locks."""

    locks_migrations = True
    quotes_json = True

    def as_steps(self, event_data: ColumnElement[Any]) -> ColumnElement[Any]:
        # the text stays as it is: what the server takes out of it need not be equal to it
        data = self.as_text(event_data)
        keys = func.json_length(data, "$.actions.state_delta")
        target = func.json_extract(data, "$.actions.rewind_before_invocation_id")
        whole = [func.json_type(data) != "OBJECT", func.coalesce(keys, 0) > 0, target.is_not(None)]
        sets = case(*((condition, data) for condition in whole), else_="{}")
        return case((func.json_valid(data) == 0, data), else_=sets)

    @property
    def cascades(self) -> bool:
        return not self.tables.host_owned

    def same_state(self) -> ColumnElement[Any]:
        # a column that stands before it, so that a large state is sent once
        return cast(ColumnElement[Any], self.tables.sessions.c.state)

    @contextmanager
    def migration_lock(self, conn: Connection) -> Iterator[bool]:
        # such locks are the server's: the name says which database
        database = func.coalesce(self.tables.sessions.schema, func.database())
        name = func.concat("adk_sessions.", func.sha1(database))
        held = conn.execute(select(func.get_lock(name, 0))).scalar() == 1
        waits = conn.execute(text("SELECT @@SESSION.lock_wait_timeout")).scalar_one()
        conn.commit()
        if not held:
            yield False
            return
        # An ALTER that waits makes every reader of the table wait behind it, by default for a day:
        # give up soon, try again.
        conn.execute(text("SET SESSION lock_wait_timeout = 2"))
        conn.commit()
        try:
            yield True
        finally:
            if not conn.invalidated:
                conn.rollback()
                conn.execute(text(f"SET SESSION lock_wait_timeout = {int(waits)}"))
                conn.execute(select(func.release_lock(name)))
                conn.commit()


class MySQL(MySQLManner, NamedLock):
    """Statements for MySQL 8 and later, and for MariaDB 10.11 and later."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        # the wider scopes, in the order of their locks
        self._scopes = {"app": tables.app_states, "user": tables.user_states}
        self._holds: dict[frozenset[str], Any] = {}
        self._writes: dict[frozenset[str], Any] = {}

    def create(self, conn: Connection, key: Key, now: datetime, deltas: Deltas) -> States:
        session = deltas.session or "{}"
        self.check_size(conn, "state", session)
        conn.execute(self._insert_session, {**key.parameters(), "v_state": session, "v_now": now})
        wider = deltas._replace(session=None)
        names = _named(wider) | {"others"}
        row = self._complete(conn, key, self._hold(conn, key, names), names, now)
        merged = self._write(conn, key, row, wider, now) if _named(wider) else {}
        return States(merged.get("app", row.app), merged.get("user", row.user), session)

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
        for event in events:
            self.check_size(conn, "event", event.text.data, event.text.exact or "")
        names = _named(deltas)
        row = self._hold(conn, key, names)
        if row is None or row.archive_time or expected not in (None, row.update_time):
            return None
        row = self._complete(conn, key, row, names, events[-1].timestamp)
        # The newest event is past update_time only where google-adk once moved that back: long
        # ago, so it does not matter that it is not locked.
        base = max(row.newest or row.update_time, row.update_time)
        now = self._insert_events(conn, key, events, base)
        self._write(conn, key, row, deltas, now, replace=replace)
        return Revisions(row.update_time, now)

    def _insert_events(
        self, conn: Connection, key: Key, events: Sequence[NewEvent], base: datetime
    ) -> datetime:
        if len(events) > 1 and self._is_too_large(_MANY_ROWS):
            for event in events:
                base = super()._insert_events(conn, key, [event], base)
            return base
        return super()._insert_events(conn, key, events, base)

    def _rows(self, names: frozenset[str], *, isouter: bool) -> Any:
        """The session's row and those of scopes, in the order of their locks."""
        rows: Any = self.tables.sessions
        for name, table in self._scopes.items():
            if name in names:
                same = [c == self.tables.sessions.c[c.name] for c in table.primary_key]
                rows = rows.join(table, and_(*same), isouter=isouter)
        return rows

    def _hold(self, conn: Connection, key: Key, names: frozenset[str]) -> Any:
        """Locks a session's row and those of some scopes, and reads them.

        Args:
            conn: in a transaction.
            key: the session.
            names: ``app`` and ``user`` for the scopes to lock, ``session`` for its state,
                ``others`` to read the state of the other scopes too, without a lock.

        Returns:
            A row, None if there is no such session. The state of a scope without a row is None.
        """
        statement = self._holds.get(names)
        if statement is None:
            session = self.tables.sessions.c
            # the rows of a subquery are not locked
            newest = self._newest_time.scalar_subquery().label("newest")
            columns: list[Any] = [session.update_time, session.archive_time, newest]
            if "session" in names:
                columns.append(self.as_text(session.state).label("session"))
            for name, table in self._scopes.items():
                state = self.as_text(table.c.state)
                if name in names:
                    columns += [state.label(name), table.c.update_time.label(f"{name}_time")]
                elif "others" in names:
                    plain = select(state).where(self.is_scope(table))
                    columns.append(plain.scalar_subquery().label(name))
            statement = self._holds[names] = (
                select(*columns)
                .prefix_with("STRAIGHT_JOIN")  # rows are locked in the order of the join
                .select_from(self._rows(names, isouter=True))
                .where(self._is_session)
                .with_for_update()
            )
        return conn.execute(statement, key.parameters()).first()

    def _complete(
        self, conn: Connection, key: Key, row: Any, names: frozenset[str], now: datetime
    ) -> Any:
        """The row that `_hold` gave; read again if a scope had none, which is made now."""
        missing = [name for name in self._scopes if getattr(row, name, "") is None]
        if not missing:
            return row
        for name in missing:
            parameters = {**key.parameters(), "v_now": now, "v_state": "{}"}
            self.insert_if_missing(conn, self._scopes[name], parameters)
        # locked even to be read: a snapshot may be older than the row somebody else has made
        return self._hold(conn, key, names.union(missing))

    def _write(
        self,
        conn: Connection,
        key: Key,
        row: Any,
        deltas: Deltas,
        now: datetime,
        *,
        replace: bool = False,
    ) -> dict[str, str]:
        """Writes the session's revision and the states of deltas; the states as they are now."""
        parameters: dict[str, Any] = {**key.parameters(), "v_now": now}
        merged: dict[str, str] = {}
        for name, delta in deltas._asdict().items():
            if delta is not None:
                whole = replace and name == "session"
                merged[name] = delta if whole else codec.merge_state(getattr(row, name), delta)
                self.check_size(conn, "state", merged[name])
                parameters[f"v_{name}"] = merged[name]
                parameters[f"v_{name}_time"] = max(now, getattr(row, f"{name}_time", now))
        together = [frozenset(merged)]
        if len(merged) > 1 and self._is_too_large(escaped_size(*merged.values())):
            together = [frozenset({name}) for name in merged]
        for names in together:
            self._update(conn, self._writing(names), parameters)
        return merged

    def _writing(self, names: frozenset[str]) -> Any:
        """One UPDATE of several tables: it writes a row of each, or none at all."""
        statement = self._writes.get(names)
        if statement is None:
            session = self.tables.sessions.c
            values: dict[Any, Any] = {session.update_time: bindparam("v_now", type_=Timestamp())}
            if "session" in names:
                values[session.state] = self.as_json("v_session")
            for name, table in self._scopes.items():
                if name in names:
                    values[table.c.state] = self.as_json(f"v_{name}")
                    values[table.c.update_time] = bindparam(f"v_{name}_time", type_=Timestamp())
            rows = self._rows(names, isouter=False)
            statement = update(rows).where(self._is_session).values(values)
            self._writes[names] = statement
        return statement

    def lock_session(self, conn: Connection, key: Key, *, with_state: bool) -> Any:
        return conn.execute(
            self.session_row(with_state).with_for_update(), key.parameters()
        ).first()

    def lock_scope(self, conn: Connection, table: Table, key: Key) -> Any:
        return conn.execute(self.wider_row(table).with_for_update(), key.parameters()).first()

    def insert_if_missing(self, conn: Connection, table: Table, parameters: dict[str, Any]) -> None:
        statement = self.insert_scope(upsert(table), table)
        conn.execute(statement.on_duplicate_key_update(app_name=table.c.app_name), parameters)

    def _is_too_large(self, size: int) -> bool:
        return size + STATEMENT > (self._largest_packet or 0)


def _named(deltas: Deltas) -> frozenset[str]:
    """The scopes that deltas name."""
    return frozenset(name for name, delta in deltas._asdict().items() if delta is not None)
