"""PostgreSQL: one statement, one round trip, for every operation.

Writes are CTEs on an autocommit connection. The textual order of CTEs is not the order in which
they run, so each lock is made to depend on the one before: events, app and user select from what
the session's UPDATE returns, the user from what the app's upsert returns. Unchained, two such
statements lock in opposite orders and deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    CursorResult,
    Float,
    FromClause,
    Integer,
    String,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal_column,
    select,
    true,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import insert as upsert

from .. import codec
from ..changes import Change, encode, removed
from .base import Changed
from .jsonb import JsonbColumns
from .notices import notice_of
from .prepared import Compiled
from .reads import Tables
from .rows import Deltas, Key, NewEvent, Revisions, States, event_parameters
from .types import Timestamp

_JSON_NULL: ColumnElement[Any] = literal_column("'null'::jsonb", JSONB())
_EMPTY: ColumnElement[Any] = literal_column("'{}'::jsonb", JSONB())
# The columns of a batch, each an array of text: the one array that asyncpg knows without asking the
# server, for which it would turn the session's JIT off and on.
_BATCH_COLUMNS = ("k_event", "v_invocation", "v_times", "v_data", "v_exact")
_TICK: ColumnElement[Any] = literal_column("interval '1 microsecond'")


class PostgreSQL(JsonbColumns):
    """Statements for PostgreSQL 13 and later, with asyncpg or psycopg."""

    needs_version = True
    autocommit: ClassVar[bool] = True
    #: where appends are told to watchers; None to tell nobody
    channel: str | None = None

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self._compiled: dict[Any, Compiled] = {}
        self._creates: dict[tuple[bool, bool], Any] = {}
        self._appends: dict[tuple[bool, bool, bool, bool, bool, bool], Any] = {}
        self._changes: dict[Table, tuple[Any, Any]] = {}
        session = (
            delete(tables.sessions).where(self._is_session).returning(tables.sessions.c.id).cte("s")
        )
        # the session first: whoever appends holds its row before writing an event
        held = select(session.c.id)
        changes = delete(tables.state_changes).where(
            self._is_change, tables.state_changes.c.session_id.in_(held)
        )
        self._delete = (
            delete(tables.events)
            .where(self._is_event, tables.events.c.session_id.in_(held))
            .add_cte(changes.cte("c"))
        )

    def rows(
        self, conn: Connection, statement: Any, parameters: dict[str, Any]
    ) -> Sequence[Sequence[Any]]:
        return self._run(conn, statement, parameters).all()

    def write(self, conn: Connection, statement: Any, parameters: dict[str, Any]) -> int:
        return self._run(conn, statement, parameters).rowcount

    def _run(
        self, conn: Connection, statement: Any, parameters: dict[str, Any]
    ) -> CursorResult[Any]:
        if conn.get_execution_options().get("schema_translate_map"):
            return conn.execute(statement, parameters)  # a kept text names the tables as they are
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = Compiled(statement, conn.dialect)
        return conn.exec_driver_sql(compiled.sql, compiled.arguments(parameters))

    def _since(self) -> list[ColumnElement[bool]]:
        event = self.tables.events.c
        own = type_coerce(event.event_data, JSONB())["timestamp"]
        # a damaged event is not to keep the others from being read
        own_time = case((func.jsonb_typeof(own) == "number", cast(own.astext, Float(53))))
        return [
            *super()._since(),
            func.coalesce(own_time, func.extract("epoch", event.timestamp))
            >= bindparam("k_epoch", type_=Float(53)),
        ]

    def create(self, conn: Connection, key: Key, now: datetime, deltas: Deltas) -> States:
        shape = (deltas.app is not None, deltas.user is not None)
        statement = self._creates.get(shape)
        if statement is None:
            statement = self._creates[shape] = self._create(*shape)
        session = deltas.session or "{}"
        parameters = {
            **key.parameters(),
            "v_now": now,
            "v_state": session,
            "v_app": deltas.app or "{}",
            "v_user": deltas.user or "{}",
        }
        [(app, user)] = self.rows(conn, statement, parameters)
        return States(app, user, session)

    def _create(self, app_delta: bool, user_delta: bool) -> Any:
        sessions, apps, users = (
            self.tables.sessions,
            self.tables.app_states,
            self.tables.user_states,
        )
        session = (
            insert(sessions)
            .values(
                app_name=bindparam("k_app"),
                user_id=bindparam("k_user"),
                id=bindparam("k_session"),
                state=self.as_json("v_state"),
                create_time=bindparam("v_now", type_=Timestamp()),
                update_time=bindparam("v_now", type_=Timestamp()),
                initial_state=self.same_state(),
            )
            .returning(
                sessions.c.app_name, sessions.c.user_id, sessions.c.id, sessions.c.update_time
            )
            .cte("s")
        )
        app = self._upsert(apps, "a", session, "v_app", merge=app_delta)
        user = self._upsert(users, "u", session, "v_user", merge=user_delta, after=app)
        # what was there before is read by the statement's snapshot, what was written from its CTE
        app_state = func.coalesce(
            select(self.as_text(app.c.state)).scalar_subquery(),
            select(self.as_text(apps.c.state)).where(self._is_app).scalar_subquery(),
        )
        user_state = func.coalesce(
            select(self.as_text(user.c.state)).scalar_subquery(),
            select(self.as_text(users.c.state)).where(self._is_user).scalar_subquery(),
        )
        # Tables without a foreign key: a delete cannot see the event that an append committed while
        # the delete waited for the session's row. Whoever takes the id again clears it away.
        made = select(session.c.id)
        events = delete(self.tables.events).where(
            self._is_event, self.tables.events.c.session_id.in_(made)
        )
        changes = delete(self.tables.state_changes).where(
            self._is_change, self.tables.state_changes.c.session_id.in_(made)
        )
        return select(app_state, user_state).add_cte(events.cte("d"), changes.cte("c"))

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
        batch = len(events) > 1
        named = (deltas.session is not None, deltas.app is not None, deltas.user is not None)
        shape = (*named, batch, expected is None, replace)
        statement = self._appends.get(shape)
        if statement is None:
            statement = self._appends[shape] = self._append(*shape)
        parameters = {
            **(_columns(key, events) if batch else event_parameters(key, events[0])),
            "k_expected": expected,
            "v_time": events[-1].timestamp,
            "v_state": deltas.session,
            "v_app": deltas.app,
            "v_user": deltas.user,
        }
        if self.channel is not None:
            parameters["v_notice"] = notice_of(key)
        rows = self.rows(conn, statement, parameters)
        return Revisions(*rows[0][:2]) if rows else None

    def _append(
        self,
        session_delta: bool,
        app_delta: bool,
        user_delta: bool,
        batch: bool,
        anyhow: bool,
        replace: bool,
    ) -> Any:
        sessions, events = self.tables.sessions, self.tables.events
        time = Timestamp()
        before: ColumnElement[Any] = bindparam("k_expected", type_=time)
        current = and_(sessions.c.update_time == before, *self.is_archived(False))
        if anyhow:
            # what RETURNING gives is the new row; the old one is read where it is locked, which
            # sees what a writer has committed that was waited for
            old = (
                select(sessions.c.id, sessions.c.update_time)
                .where(self._is_session, *self.is_archived(False))
                .with_for_update()
                .cte("o")
            )
            before, current = old.c.update_time, sessions.c.id == old.c.id
        ticks = bindparam("v_count", type_=Integer()) * _TICK if batch else _TICK
        values: dict[str, Any] = {
            "update_time": func.greatest(
                bindparam("v_time", type_=time),
                sessions.c.update_time + ticks,
                self._newest_time.scalar_subquery() + ticks,
                type_=time,
            )
        }
        if session_delta:
            delta = self.as_json("v_state")
            values["state"] = delta if replace else _merged(sessions.c.state, delta)
        session = (
            update(sessions)
            .where(self._is_session, current)
            .values(values)
            .returning(
                *(sessions.c.app_name, sessions.c.user_id, sessions.c.id, sessions.c.update_time),
                before.label("before"),
            )
            .cte("s")
        )
        source: FromClause = session
        columns: dict[str, Any] = {
            "app_name": session.c.app_name,
            "user_id": session.c.user_id,
            "session_id": session.c.id,
        }
        if batch:
            new = (
                func.unnest(*(bindparam(name, type_=ARRAY(Text())) for name in _BATCH_COLUMNS))
                .table_valued(*_BATCH_COLUMNS, with_ordinality="n")
                .render_derived("new")
            )
            source = session.join(new, true())
            # evaluated once: the clock of a batch starts where the session was
            start = select(
                func.greatest(session.c.before, self._newest_time.scalar_subquery(), type_=time)
            )
            columns |= {
                "id": new.c.k_event,
                "invocation_id": new.c.v_invocation,
                "timestamp": func.greatest(
                    cast(new.c.v_times, time), start.scalar_subquery() + new.c.n * _TICK
                ),
                "event_data": cast(new.c.v_data, JSONB()),
                "event_exact": new.c.v_exact,
            }
        else:
            columns |= {
                "id": bindparam("k_event", type_=String()),
                "invocation_id": bindparam("v_invocation", type_=String()),
                "timestamp": session.c.update_time,
                "event_data": self.as_json("v_data"),
                "event_exact": bindparam("v_exact", type_=Text()),
            }
        rows = select(*columns.values()).select_from(source)
        event = insert(events).from_select(list(columns), rows).cte("e")
        writes = [event]
        if app_delta:
            writes.append(self._upsert(self.tables.app_states, "a", session, "v_app", merge=True))
        if user_delta:
            after = writes[-1] if app_delta else None
            writes.append(
                self._upsert(
                    self.tables.user_states, "u", session, "v_user", merge=True, after=after
                )
            )
        revisions = select(session.c.before, session.c.update_time)
        if self.channel is not None:
            notice = bindparam("v_notice", type_=Text())
            channel = literal_column(f"'{self.channel}'", Text())
            revisions = revisions.add_columns(func.pg_notify(channel, notice))
        return revisions.add_cte(*writes)

    def _upsert(
        self,
        table: Table,
        name: str,
        session: CTE,
        parameter: str,
        *,
        merge: bool,
        after: CTE | None = None,
    ) -> CTE:
        """Writes a scope's row once the session's is held, and the scope's in ``after``."""
        keys = [column.name for column in table.primary_key]
        source = select(
            *(session.c[column] for column in keys),
            self.as_json(parameter),
            session.c.update_time,
        )
        if after is not None:
            held = select(func.count()).select_from(after).scalar_subquery()
            source = source.where(held >= literal_column("0"))
        statement = upsert(table).from_select([*keys, "state", "update_time"], source)
        if merge:
            new = statement.excluded
            statement = statement.on_conflict_do_update(
                index_elements=keys,
                set_={
                    "state": _merged(table.c.state, new.state),
                    "update_time": func.greatest(table.c.update_time, new.update_time),
                },
            )
        else:
            statement = statement.on_conflict_do_nothing(index_elements=keys)
        return statement.returning(table.c.state).cte(name)

    def _change(
        self, conn: Connection, table: Table, key: Key, change: Change, now: datetime
    ) -> Changed | None:
        statements = self._changes.get(table)
        if statements is None:
            statements = self._changes[table] = self._changing(table)
        hold, write = statements
        wanted, deleted = (
            [codec.stored_key(key) for key in keys] for keys in (change.adds, change.deletes)
        )
        row = conn.execute(hold, {**key.parameters(), "v_keys": wanted}).first()
        if row is None:
            return None
        text = encode(change, codec.load_state(row[0]))
        parameters = {"v_state": text, "v_keys": deleted, "v_now": now}
        parameters["v_deleted"] = removed(change)
        self._update(conn, write, {**key.parameters(), **parameters})
        return Changed(text)

    def _changing(self, table: Table) -> tuple[Any, Any]:
        """Locks a state's row and reads some keys of it; sets and deletes others.

        Only keys go over the wire: a state may be large.
        """
        is_session = table is self.tables.sessions
        where = self._is_session if is_session else self.is_scope(table)
        keys = bindparam("v_keys", type_=ARRAY(Text()))
        each = func.jsonb_each(_object(table.c.state)).table_valued("key", "value")
        some = select(cast(func.jsonb_object_agg(each.c.key, each.c.value), Text())).where(
            each.c.key == func.any(keys)
        )
        # deleted first: to the parser "-" comes before "||"
        kept = _object(table.c.state).op("-")(cast(keys, ARRAY(Text())))
        values: dict[str, Any] = {
            "state": type_coerce(kept, JSONB()).concat(self.as_json("v_state"))
        }
        if not is_session:
            now = bindparam("v_now", type_=Timestamp())
            values["update_time"] = func.greatest(table.c.update_time, now)
        write: Any = update(table).where(where).values(values)
        if is_session:
            write = self._recording(write)
        return select(some.scalar_subquery()).where(where).with_for_update(of=table), write

    def _recording(self, write: Any) -> Any:
        """Notes what changes a session's own state, in the statement that does so."""
        sessions, changes = self.tables.sessions.c, self.tables.state_changes
        ids = (sessions.app_name, sessions.user_id, sessions.id)
        session = write.returning(*ids, sessions.update_time).cte("s")
        # an event is past update_time only where google-adk once moved that back
        revision: ColumnElement[Any] = func.greatest(
            session.c.update_time, self._newest_time.scalar_subquery(), type_=Timestamp()
        )
        last = select(func.max(changes.c.number)).where(
            self._is_change, changes.c.revision == revision
        )
        columns: dict[str, ColumnElement[Any]] = {
            "app_name": session.c.app_name,
            "user_id": session.c.user_id,
            "session_id": session.c.id,
            "revision": revision,
            "number": func.coalesce(last.scalar_subquery(), literal_column("0"))
            + literal_column("1"),
            "change_time": bindparam("v_now", type_=Timestamp()),
            "delta": self.as_json("v_state"),
            "deleted": self.as_json("v_deleted"),
        }
        return insert(changes).from_select(list(columns), select(*columns.values()))

    def delete(self, conn: Connection, key: Key) -> None:
        self.write(conn, self._delete, key.parameters())


def _columns(key: Key, events: Sequence[NewEvent]) -> dict[str, Any]:
    """A batch's parameters: an array for each column."""
    return {
        **key.parameters(),
        "k_event": [event.id for event in events],
        "v_invocation": [event.invocation_id for event in events],
        "v_times": [event.timestamp.isoformat() for event in events],
        "v_data": [event.text.data for event in events],
        "v_exact": [event.text.exact for event in events],
        "v_count": len(events),
    }


def _merged(state: ColumnElement[Any], delta: ColumnElement[Any]) -> ColumnElement[Any]:
    """A state with a delta's top-level keys set, whole values replaced."""
    return type_coerce(_object(state), JSONB()).concat(type_coerce(delta, JSONB()))


def _object(state: ColumnElement[Any]) -> ColumnElement[Any]:
    # a JSON null is an empty state; concatenated as it is, it would make an array
    return func.coalesce(func.nullif(type_coerce(state, JSONB()), _JSON_NULL), _EMPTY)
