"""PostgreSQL: one statement, one round trip, for every operation.

Writes are CTEs on an autocommit connection. The textual order of CTEs is not the order in which
they run, so each lock is made to depend on the one before: events, app and user select from what
the session's UPDATE returns, the user from what the app's upsert returns. Unchained, two such
statements lock in opposite orders and deadlock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Float,
    String,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert

from .base import Generic
from .reads import Tables
from .rows import Deltas, Key, NewEvent, States, event_parameters
from .types import Timestamp

# The advisory lock's key, in the database of the tables: "adksess1" as a number.
_MIGRATION = 0x61646B7365737331

_JSON_NULL: ColumnElement[Any] = literal_column("'null'::jsonb", JSONB())
_EMPTY: ColumnElement[Any] = literal_column("'{}'::jsonb", JSONB())
_TICK: ColumnElement[Any] = literal_column("interval '1 microsecond'")


class JsonbColumns(Generic):
    """The generic path over JSONB columns: for databases that speak PostgreSQL's dialect."""

    def as_text(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return cast(column, Text())

    def as_json(self, name: str) -> ColumnElement[Any]:
        return cast(bindparam(name, type_=Text()), JSONB())

    @contextmanager
    def migrating(self, conn: Connection) -> Iterator[bool]:
        # One transaction holds the lock and does the work, so a pooler in transaction mode does
        # not separate them, and a failed migration leaves nothing behind.
        # A waiting ALTER makes every reader of the table wait behind it: give up soon, try again.
        with conn.begin():
            conn.execute(text("SET LOCAL lock_timeout = '2s'"))
            yield bool(conn.execute(select(func.pg_try_advisory_xact_lock(_MIGRATION))).scalar())


class PostgreSQL(JsonbColumns):
    """Statements for PostgreSQL 13 and later, with asyncpg or psycopg."""

    autocommit: ClassVar[bool] = True

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self._creates: dict[tuple[bool, bool], Any] = {}
        self._appends: dict[tuple[bool, bool, bool], Any] = {}
        session = (
            delete(tables.sessions).where(self._is_session).returning(tables.sessions.c.id).cte("s")
        )
        self._delete = delete(tables.events).where(
            # the session first: whoever appends holds its row before writing an event
            self._is_event,
            tables.events.c.session_id.in_(select(session.c.id)),
        )

    def _since(self) -> list[ColumnElement[bool]]:
        event = self.tables.events.c
        own_time = type_coerce(event.event_data, JSONB())["timestamp"].astext
        return [
            *super()._since(),
            func.coalesce(cast(own_time, Float(53)), func.extract("epoch", event.timestamp))
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
        app, user = conn.execute(statement, parameters).one()
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
        left_over = (
            delete(self.tables.events)
            .where(self._is_event, self.tables.events.c.session_id.in_(select(session.c.id)))
            .cte("d")
        )
        return select(app_state, user_state).add_cte(left_over)

    def append(
        self, conn: Connection, key: Key, expected: datetime, event: NewEvent, deltas: Deltas
    ) -> datetime | None:
        shape = (deltas.session is not None, deltas.app is not None, deltas.user is not None)
        statement = self._appends.get(shape)
        if statement is None:
            statement = self._appends[shape] = self._append(*shape)
        parameters = {
            **event_parameters(key, event),
            "k_expected": expected,
            "v_time": event.timestamp,
            "v_state": deltas.session,
            "v_app": deltas.app,
            "v_user": deltas.user,
        }
        now: datetime | None = conn.execute(statement, parameters).scalar()
        return now

    def _append(self, session_delta: bool, app_delta: bool, user_delta: bool) -> Any:
        sessions, events = self.tables.sessions, self.tables.events
        time = Timestamp()
        values: dict[str, Any] = {
            "update_time": func.greatest(
                bindparam("v_time", type_=time),
                sessions.c.update_time + _TICK,
                self._newest_time.scalar_subquery() + _TICK,
                type_=time,
            )
        }
        if session_delta:
            values["state"] = _merged(sessions.c.state, self.as_json("v_state"))
        session = (
            update(sessions)
            .where(self._is_session, sessions.c.update_time == bindparam("k_expected", type_=time))
            .values(values)
            .returning(
                sessions.c.app_name, sessions.c.user_id, sessions.c.id, sessions.c.update_time
            )
            .cte("s")
        )
        event = (
            insert(events)
            .from_select(
                [
                    "id",
                    "app_name",
                    "user_id",
                    "session_id",
                    "invocation_id",
                    "timestamp",
                    "event_data",
                    "event_exact",
                ],
                select(
                    bindparam("k_event", type_=String()),
                    session.c.app_name,
                    session.c.user_id,
                    session.c.id,
                    bindparam("v_invocation", type_=String()),
                    session.c.update_time,
                    self.as_json("v_data"),
                    bindparam("v_exact", type_=Text()),
                ),
            )
            .cte("e")
        )
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
        return select(session.c.update_time).add_cte(*writes)

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

    def delete(self, conn: Connection, key: Key) -> None:
        conn.execute(self._delete, key.parameters())


def _merged(state: ColumnElement[Any], delta: ColumnElement[Any]) -> ColumnElement[Any]:
    """A state with a delta's top-level keys set, whole values replaced."""
    # a JSON null is an empty state; concatenated as it is, it would make an array
    stored = func.coalesce(func.nullif(type_coerce(state, JSONB()), _JSON_NULL), _EMPTY)
    return type_coerce(stored, JSONB()).concat(type_coerce(delta, JSONB()))
