"""What a session was at an earlier event, a copy of it, and all that is recorded of its state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    String,
    Table,
    and_,
    bindparam,
    case,
    exists,
    insert,
    literal_column,
    null,
    or_,
    select,
    union_all,
)

from .. import codec, replay
from ..errors import EventNotFoundError, StateUnknownError
from .reads import Reads
from .rows import Key, Snapshot, States, StoredEvent
from .types import Timestamp

# Kinds of rows, beside those of a snapshot.
_STEP, _LATER, _CHANGE = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Recorded:
    """A session's revision, and all that is recorded of its own state."""

    update_time: datetime
    past: replay.Past


class History(Reads):
    """The statements."""

    _at: dict[tuple[bool, bool], Any]

    def as_steps(self, event_data: ColumnElement[Any]) -> ColumnElement[Any]:
        """An event's JSON as text, or as much of it as tells what it does to the state."""
        return self.as_text(event_data)

    def read_at(
        self,
        conn: Connection,
        key: Key,
        event_id: str,
        *,
        limit: int | None,
        after: datetime | None,
        epoch: float,
    ) -> Snapshot | None:
        """A session as it was right after an event, with the wider scopes as they are now.

        The filters are `read`'s, and so is what they may let through.

        Where its beginning is not recorded, what happened later is read too.
        After its newest event the record is held against the state as it is now.

        Returns:
            None if there is no such session.

        Raises:
            EventNotFoundError: it has no such event.
            StateUnknownError: what its own state was then is not recorded, and cannot be told.
        """
        shape = (limit is not None, after is not None)
        statements = self.__dict__.setdefault("_at", {})
        statement = statements.get(shape)
        if statement is None:
            statement = statements[shape] = self._statement_at(*shape)
        parameters = {**key.parameters(), "k_at": event_id}
        if limit is not None:
            parameters["k_limit"] = limit
        if after is not None:
            parameters |= {"k_after": after, "k_epoch": epoch}
        return _snapshot_at(self.rows(conn, statement, parameters), whole=not any(shape))

    def past(self, conn: Connection, key: Key, *, hold: bool = False) -> Recorded | None:
        """All that is recorded of a session's own state.

        Args:
            conn: in a transaction, or what is read is not of one moment.
            key: the session.
            hold: whether the session's row is to be held until the transaction ends.
        """
        s, e = self.tables.sessions.c, self.tables.events.c
        columns = [s.update_time, *(self.as_text(column) for column in (s.state, s.initial_state))]
        session = select(*columns).where(self._is_session)
        row = conn.execute(session.with_for_update() if hold else session, key.parameters()).first()
        if row is None:
            return None
        steps = self._step_rows().order_by(e.timestamp, e.id)
        past = replay.Past(
            None if row[2] is None else codec.load_state(row[2]),
            [replay.step(*_parts(found)) for found in conn.execute(steps, key.parameters())],
            [_made(found) for found in conn.execute(self._change_rows(), key.parameters())],
            codec.load_state(row[1]),
        )
        return Recorded(row[0], past)

    def fork(
        self, conn: Connection, key: Key, session_id: str, event_id: str | None, now: datetime
    ) -> Snapshot | None:
        """Copies a session inside the database.

        Args:
            conn: in a transaction.
            key: the session.
            session_id: the copy's id.
            event_id: the last event to copy; None for all that there is.
            now: the copy's creation; its revision is this or that of its newest event.

        Returns:
            The copy, None if there is no such session.

        Raises:
            EventNotFoundError: it has no such event.
            StateUnknownError: what its state was then is not known.
            IntegrityError: there is a session with the copy's id.
        """
        t = self.tables
        s, e, c = t.sessions.c, t.events.c, t.state_changes.c
        new = bindparam("k_new", type_=String())
        hold = select(s.update_time, self._newest_time.scalar_subquery())
        row = conn.execute(hold.where(self._is_session).with_for_update(), key.parameters()).first()
        if row is None:
            return None
        ids = {**key.parameters(), "k_new": session_id}
        values: dict[str, ColumnElement[Any]] = {
            "app_name": s.app_name,
            "user_id": s.user_id,
            "id": new,
            "state": s.state,
            "create_time": bindparam("v_now", type_=Timestamp()),
            "update_time": bindparam("v_time", type_=Timestamp()),
            "title": s.title,
            "labels": s.labels,
            "initial_state": s.initial_state,
        }
        times = {"v_now": now, "v_time": max(now, *filter(None, row))}
        events, changes = [self._is_event], [self._is_change]
        if event_id is not None:
            then = self.read_at(conn, key, event_id, limit=0, after=None, epoch=0.0)
            if then is None:
                return None
            values["state"] = self.as_json("v_state")
            times |= {"v_time": max(now, then.update_time), "v_state": then.states.session}
            events.append(self._is_up_to_event())
            changes.append(c.revision < self._time_of_event())
        self._copy_rows(conn, t.sessions, values, [self._is_session], ids | times)
        copy = key._replace(session_id=session_id)
        self.clear_leftovers(conn, copy)
        if event_id is not None:
            ids["k_at"] = event_id
        for table, columns, where in ((t.events, e, events), (t.state_changes, c, changes)):
            copied = {column.name: column for column in columns} | {"session_id": new}
            self._copy_rows(conn, table, copied, where, ids)
        return self.read(conn, copy, limit=None, after=None, epoch=0.0)

    # --- pieces --------------------------------------------------------------------------------

    def _copy_rows(
        self,
        conn: Connection,
        table: Table,
        values: Mapping[str, ColumnElement[Any]],
        where: list[ColumnElement[bool]],
        parameters: dict[str, Any],
    ) -> None:
        rows = select(*values.values()).where(*where)
        conn.execute(insert(table).from_select(list(values), rows), parameters)

    def _time_of_event(self) -> Any:
        e = self.tables.events.alias("named").c
        return (
            select(e.timestamp)
            .where(
                e.app_name == bindparam("k_app"),
                e.user_id == bindparam("k_user"),
                e.session_id == bindparam("k_session"),
                e.id == bindparam("k_at", type_=String()),
            )
            .scalar_subquery()
        )

    def _is_up_to_event(self) -> ColumnElement[bool]:
        # other software may have given several events one time: the id decides, as in reading
        e, time = self.tables.events.c, self._time_of_event()
        at = bindparam("k_at", type_=String())
        return and_(e.timestamp <= time, or_(e.timestamp < time, e.id <= at))

    def _is_later(self) -> ColumnElement[bool]:
        e, time = self.tables.events.c, self._time_of_event()
        at = bindparam("k_at", type_=String())
        return and_(e.timestamp >= time, or_(e.timestamp > time, e.id > at))

    def _statement_at(self, limited: bool, timed: bool) -> Any:
        t = self.tables
        s = t.sessions.c
        # the state as it is now only tells something where the beginning is not known, and after
        # the newest event, where it is what all of the record must lead to
        e = t.events.c
        last = select(e.id).where(self._is_event).order_by(e.timestamp.desc(), e.id.desc()).limit(1)
        newest = last.scalar_subquery() == bindparam("k_at", type_=String())
        current = case((or_(s.initial_state.is_(None), newest), self.as_text(s.state)))
        head = select(
            literal_column("0").label("kind"),
            s.id,
            null().label("invocation_id"),
            self._time_of_event().label("time"),
            current.label("data"),
            self.as_text(s.initial_state).label("exact"),
            s.create_time.label("create_time"),
            self._app_state.scalar_subquery().label("app_state"),
            self._user_state.scalar_subquery().label("user_state"),
            literal_column("0").label("number"),
        ).where(self._is_session)
        up_to, since = self._is_up_to_event(), self._since() if timed else []
        events = self._event_rows(up_to, *since, limited=limited)
        unknown = exists(select(s.id).where(self._is_session, s.initial_state.is_(None)))
        changes = self._change_rows().where(
            or_(t.state_changes.c.revision < self._time_of_event(), unknown, newest)
        )
        parts = [
            head,
            events.add_columns(literal_column("0")),
            self._step_rows(_LATER).where(self._is_later(), unknown),
            changes,
        ]
        if limited or timed:
            parts.append(self._step_rows().where(up_to))
        return union_all(*parts)

    def _step_rows(self, kind: int = _STEP) -> Select[Any]:
        e = self.tables.events.c
        return select(
            literal_column(str(kind)),
            e.id,
            e.invocation_id,
            e.timestamp,
            self.as_steps(e.event_data),
            e.event_exact,
            *(null(), null(), null()),
            literal_column("0"),
        ).where(self._is_event)

    def _change_rows(self) -> Select[Any]:
        c = self.tables.state_changes.c
        return select(
            literal_column(str(_CHANGE)),
            null(),
            null(),
            c.revision,
            self.as_text(c.delta),
            self.as_text(c.deleted),
            *(null(), null(), null()),
            c.number,
        ).where(self._is_change)


def _made(row: Any) -> replay.Made:
    return replay.made(row[3], row[9], row[4], row[5])


def _snapshot_at(rows: Iterable[Any], *, whole: bool) -> Snapshot | None:
    """What `read_at`'s statement returns; with ``whole`` the events are the steps too."""
    kinds: dict[int, list[Any]] = {0: [], 1: [], _STEP: [], _LATER: [], _CHANGE: []}
    for row in rows:
        kinds[row[0]].append(row)
    if not kinds[0]:
        return None
    (head,) = kinds[0]
    _, _, _, revision, current, initial, create_time, app_state, user_state, _ = head
    if revision is None:
        raise EventNotFoundError
    events = sorted((StoredEvent._make(row[1:6]) for row in kinds[1]), key=itemgetter(2, 0))
    if whole:
        steps = [(row.timestamp, row.invocation_id, row.data, row.exact) for row in events]
    else:
        steps = [_parts(row) for row in sorted(kinds[_STEP], key=itemgetter(3, 1))]
    later = [_parts(row) for row in sorted(kinds[_LATER], key=itemgetter(3, 1))]
    past = replay.Past(
        None if initial is None else codec.load_state(initial),
        [replay.step(*parts) for parts in (*steps, *later)],
        [_made(row) for row in kinds[_CHANGE]],
        codec.load_state(current),
    )
    if current is not None and replay.contradicted(past):
        raise StateUnknownError
    state = codec.dump_state(replay.state_after(past, len(steps)))
    return Snapshot(create_time, revision, States(app_state, user_state, state), events)


def _parts(row: Any) -> tuple[datetime, str, str | None, str | None]:
    """The arguments of `replay.step`."""
    return row[3], row[2], row[4], row[5]
