"""Looking after what is stored: what is wrong with it, and mending what can be mended safely.

    report = await doctor.examine(service)
    await doctor.repair(service, report)

Examining reads everything once, in a transaction that cannot write, and keeps no more of it than a
few hundred rows. Repairing only adds: it never deletes a row, and never rewrites an event or a
value of a state.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any, Literal, NamedTuple

from sqlalchemy import Connection, inspect

from . import clock, codec, replay, validate
from . import state as states
from .calls import parts
from .dialects.checkup import PAGE, Checkup, unchanging
from .dialects.rows import Key
from .errors import (
    ConfigurationError,
    DatabaseError,
    EventConflictError,
    SchemaError,
    SessionNotFoundError,
    StaleSessionError,
    StateUnknownError,
)
from .service import Store

__all__ = ["Call", "Found", "Repairs", "Report", "Row", "examine", "repair"]

Kind = Literal[
    "orphans",
    "unreadable",
    "ties",
    "behind",
    "no_app_state",
    "no_user_state",
    "open_calls",
    "recent_calls",
    "long_running_calls",
    "state_differs",
]

#: what is wrong with rows, by its name in a `Report`
FAULTS: dict[Kind, str] = {
    "orphans": "events without a session",
    "unreadable": "events and states that cannot be read",
    "behind": "sessions with an update_time before their newest event",
    "no_app_state": "apps without a row for their state",
    "no_user_state": "users without a row for their state",
    "open_calls": "function calls without a response",
}
#: what need not be wrong
NOTES: dict[Kind, str] = {
    "ties": "events with the time of the one before, in the order of their ids",
    "recent_calls": "function calls without a response, that may still be running",
    "long_running_calls": "long-running function calls without a response",
    "state_differs": "sessions with a state of their own that differs from what is recorded of it",
}

#: seconds without a new event, after which nobody is taken to work on a session any more
IDLE = 3600.0

# What the text of the response to a call that nobody answers says, and google-adk's own code for
# an invocation that was broken off.
_NO_RESPONSE = "The call was broken off: no response was stored."
_ABORTED = "INVOCATION_ABORTED"
# The namespace of the ids of such events.
_REPAIRS = uuid.UUID("6e1f5f39-27c6-4c0e-8c39-3f0a8f0c2d11")
# Calls by which google-adk asks a person; older releases do not mark them as long-running.
_QUESTIONS = {"adk_request_input", "adk_request_credential"}


class Row(NamedTuple):
    """One finding: the row, as far as the kind of finding needs it, and what is to be said."""

    app_name: str
    user_id: str = ""
    session_id: str = ""
    event_id: str = ""
    detail: str = ""


class Call(NamedTuple):
    """An event with function calls that have no response.

    Attributes:
        key: the session.
        event_id, invocation_id, author, branch, isolation_scope: the event's.
        calls: id and name of each call.
        revision: the session's update_time when it was looked at.
    """

    key: Key
    event_id: str
    invocation_id: str
    author: str
    branch: str | None
    isolation_scope: str | None
    calls: tuple[tuple[str, str], ...]
    revision: datetime


@dataclass
class Found:
    """Findings of one kind.

    Attributes:
        count: how many there are.
        rows: the first of them.
    """

    count: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass
class Report:
    """What `examine` has found.

    Attributes:
        schema: how the tables differ from what this release works on, one line each.
        examined: whether the rows were looked at; not if a table or column is missing.
        sessions, events: how many were looked at.
        since: a session with a newer event may be in use; naive UTC.
        found: by kind, those of `FAULTS` and of `NOTES`.
        calls: the first of the open calls, as `repair` needs them; the oldest of a session last.
    """

    schema: list[str] = field(default_factory=list)
    examined: bool = False
    sessions: int = 0
    events: int = 0
    since: datetime = clock.EPOCH
    found: dict[Kind, Found] = field(
        default_factory=lambda: {kind: Found() for kind in (*FAULTS, *NOTES)}
    )
    calls: list[Call] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether there are no faults; there may be notes."""
        return not self.schema and not any(self.found[kind].count for kind in FAULTS)


@dataclass
class Repairs:
    """What `repair` did.

    Attributes:
        app_states, user_states: rows that were added, empty.
        update_times: sessions whose update_time was set to the time of their newest event.
        calls: function calls that were given a response.
        left: what was found and left as it is, each with the reason.
    """

    app_states: int = 0
    user_states: int = 0
    update_times: int = 0
    calls: int = 0
    left: list[Row] = field(default_factory=list)


async def examine(
    service: Store[Any, Any],
    app_name: str | None = None,
    *,
    idle: float = IDLE,
    rows: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads all sessions and events and says what is wrong with them; writes nothing.

    It takes minutes for a million events, and keeps one connection and one transaction so long. A
    service on an SQLite file has one connection to read: give it a service of its own.

    Args:
        service: where; its type of events decides which can be read. Policies for
            ``row_level_security`` must not bind its role.
        app_name: looks at the rows of one application only.
        idle: seconds without a new event, after which a call without response is a fault.
        rows: at most so many are named of each kind; all are counted.
        progress: called with the events done and all events, perhaps in another thread.

    Raises:
        ConfigurationError: the service has ``row_level_security``.
        DatabaseError: the database failed.
    """
    if service._isolated:
        raise ConfigurationError(
            "Examine without row_level_security, as a role that the policies do not bind."
        )
    if service._database.is_missing():  # and a connection would make it
        return Report(schema=["there is no such file: check the URL"])
    since = clock.to_datetime(service._now() - idle)

    def work(conn: Connection) -> Report:
        look = _Look(service, since, rows)
        with closing(look.doubtful), unchanging(conn, service._statements):
            look.at_everything(conn, Checkup(service._statements, app_name), progress)
        return look.report

    return await service._retry(lambda: service._database.submit(work, write=False), write=False)


class _Look:
    """One reading of everything.

    Args:
        service: whose tables and events.
        since: a session with a newer event may be in use.
        limit: findings of each kind that are named.
    """

    def __init__(self, service: Store[Any, Any], since: datetime, limit: int) -> None:
        self._service = service
        self._since = since
        self._limit = limit
        self.report = Report(since=since)
        # sessions whose recorded state is to be compared with that which they have, a line each:
        # there may be as many as there are, and who still reads the events can ask nothing else
        self.doubtful: IO[str] = tempfile.SpooledTemporaryFile(2**20, "w+")  # noqa: SIM115

    def at_everything(
        self, conn: Connection, rows: Checkup, progress: Callable[[int, int], None] | None
    ) -> None:
        report, models = self.report, self._service.models
        report.schema = validate.differences(conn, models)
        found = inspect(conn)
        for table in (models.sessions, models.events, models.app_states, models.user_states):
            if not found.has_table(table.name, schema=table.schema):
                return
            there = {column["name"] for column in found.get_columns(table.name, table.schema)}
            if not there >= {*table.columns.keys()}:
                return
        report.examined = True
        for (app,) in rows.without_app_state(conn):
            self.add("no_app_state", Row(app))
        for app, user in rows.without_user_state(conn):
            self.add("no_user_state", Row(app, user))
        for app, user, session_id, text in rows.states(conn):
            report.sessions += session_id is not None
            if _plain(text) is None:
                of = Row(app, user or "", session_id or "", detail="its state is no JSON object")
                self.add("unreadable", of)
        total = rows.counted(conn) if progress else 0
        session: _Session | None = None
        for row in rows.events(conn):
            key = Key(*row[:3])
            if session is None or session.key != key:
                self._end(session)
                session = _Session(self, key, row[5], row[8])
            session.event(*row[3:])
            report.events += 1
            if progress and report.events % PAGE == 0:
                progress(report.events, total)
        self._end(session)
        self.doubtful.seek(0)
        for line in self.doubtful:
            *ids, differing = json.loads(line)
            key = Key(*ids)
            self.differs(key, self._compared(rows.past(conn, key), differing))
        if progress:
            progress(report.events, total)

    def _end(self, session: _Session | None) -> None:
        if session is not None:
            session.end()

    def doubt(self, key: Key, differing: list[str]) -> None:
        """Notes a session to be looked at once more: changes are recorded, too."""
        self.doubtful.write(json.dumps([*key, differing]) + "\n")

    def _compared(self, past: replay.Past | None, differing: list[str]) -> list[str]:
        """The keys that are not what events and changes have set."""
        if past is None:
            return []
        with suppress(StateUnknownError):
            return replay.differing(replay.state_before(past, len(past.steps)), past.current)
        return differing

    def differs(self, key: Key, differing: list[str]) -> None:
        """Says which keys of a session's state are not what is recorded."""
        if differing:
            self.add("state_differs", Row(*key, detail=", ".join(map(repr, sorted(differing)))))

    def add(self, kind: Kind, row: Row) -> bool:
        """Counts a finding; whether it is one of those that are named."""
        found = self.report.found[kind]
        found.count += 1
        if found.count > self._limit:
            return False
        found.rows.append(row)
        return True

    def is_recent(self, moment: datetime) -> bool:
        return moment >= self._since

    def why_unreadable(self, data: Any, exact: Any) -> str | None:
        service = self._service
        try:
            codec.load_event(service.event_type, data, exact, service._validate_json)
        except codec.NO_EVENT as error:
            return codec.reason(error, service.event_type)
        return None


class _Session:
    """What is kept of a session while its events are read, the newest first.

    Args:
        look: where findings go.
        key: the session.
        newest: the time of its newest event.
        update_time: None if there is no such session.
    """

    def __init__(
        self, look: _Look, key: Key, newest: datetime, update_time: datetime | None
    ) -> None:
        self.key = key
        self._look = look
        self._revision = update_time
        self._recent = look.is_recent(newest)
        self._last_time: datetime | None = None
        self._answered: set[str] = set()
        # an event that is no JSON may have held any response, and may have set any key
        self._blind = False
        # going back to before this invocation: what lies between was taken back
        self._rewinding: str | None = None
        self._reached = False
        self._state: dict[str, Any] | None = None
        self._set: set[str] = set()
        self.differing: list[str] = []
        self._is_recorded = False
        if update_time is not None and update_time < newest:
            look.add("behind", Row(*key, detail=str(newest)))

    def event(
        self,
        event_id: str,
        invocation_id: str,
        time: datetime,
        data: Any,
        exact: Any,
        update_time: datetime | None,
        state: str | None,
        is_recorded: bool,
    ) -> None:
        """Looks at the next older event."""
        self._is_recorded = bool(is_recorded)
        row = Row(*self.key, event_id)
        if update_time is None:
            self._look.add("orphans", row)
            return
        if time == self._last_time:
            self._look.add("ties", row)
        if self._last_time is None and state is not None:
            self._state = _plain(state)
        self._last_time = time
        why = self._look.why_unreadable(data, exact)
        if why is not None:
            self._look.add("unreadable", row._replace(detail=why))
        plain = _plain(exact or data)
        if plain is None:
            self._blind = True
        elif not self._blind:
            self._deltas(plain)
            if not self._is_rewound(plain, invocation_id):
                self._calls(plain, row, invocation_id)

    def end(self) -> None:
        """Says what only the whole session shows."""
        if self.differing and self._is_recorded:
            self._look.doubt(self.key, self.differing)
        else:
            self._look.differs(self.key, self.differing)

    def _is_rewound(self, event: dict[str, Any], invocation_id: str) -> bool:
        if self._rewinding is not None:
            if invocation_id == self._rewinding:
                self._reached = True
                return True
            if not self._reached:
                return True
            self._rewinding = None
        self._rewinding = _dict(event.get("actions")).get("rewind_before_invocation_id") or None
        self._reached = False
        return self._rewinding is not None

    def _deltas(self, event: dict[str, Any]) -> None:
        delta = _dict(_dict(event.get("actions")).get("state_delta"))
        for key, value in states.split(delta).session.items():
            if key not in self._set:
                self._set.add(key)
                if self._state is not None and not _same(self._state, key, value):
                    self.differing.append(key)

    def _calls(self, event: dict[str, Any], row: Row, invocation_id: str) -> None:
        self._answered.update(id_ for id_, _ in parts(event, "function_response"))
        waiting = event.get("long_running_tool_ids")
        waiting = waiting if isinstance(waiting, list) else []
        open_calls: list[tuple[str, str]] = []
        for id_, name in parts(event, "function_call"):
            if id_ in self._answered:
                continue
            if id_ in waiting or name in _QUESTIONS:
                self._look.add("long_running_calls", row._replace(detail=f"{name} {id_}"))
            else:
                open_calls.append((id_, name))
        if not open_calls:
            return
        kind: Kind = "recent_calls" if self._recent else "open_calls"
        named = [
            self._look.add(kind, row._replace(detail=f"{name} {id_}")) for id_, name in open_calls
        ]
        if kind == "open_calls" and all(named) and self._revision is not None:
            self._look.report.calls.append(
                Call(
                    self.key,
                    row.event_id,
                    invocation_id,
                    str(event.get("author") or ""),
                    _text(event.get("branch")),
                    _text(event.get("isolation_scope")),
                    tuple(open_calls),
                    self._revision,
                )
            )


def _plain(text: Any) -> dict[str, Any] | None:
    """An event or a state as plain JSON, None if it is no object."""
    if not text or text == "null":
        return None
    try:
        return codec.load_state(text)
    except (DatabaseError, *codec.NO_EVENT):
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _same(state: dict[str, Any], key: str, value: Any) -> bool:
    # the texts, since NaN is not equal to itself
    return key in state and (state[key] == value or codec.dumps(state[key]) == codec.dumps(value))


# --- repairing ----------------------------------------------------------------------------------


async def repair(service: Store[Any, Any], report: Report) -> Repairs:
    """Mends what a report names, where that can be done by adding.

    Calls without response get one that says so, in the form that google-adk gives to an
    invocation that was broken off: appended as any event is, with an id that is always the same, so
    that another repair does nothing. A session that has moved on since the report, or was in use
    lately as `examine` was told, is left alone.

    Args:
        service: of the same database, and with the same type of events.
        report: of `examine`. What it counts but does not name is left for another time.

    Raises:
        SchemaError: the tables are not as this release needs them.
        DatabaseError: the database failed. What was done before stays, and may be done again.
    """
    if report.schema:
        raise SchemaError(
            "The schema must be mended first: run adk-sessions upgrade, and if that has nothing to"
            " do, adk-sessions stamp base before it."
        )
    done = Repairs()
    tables = service.models
    for row in report.found["no_app_state"].rows:
        done.app_states += await _add_scope(service, tables.app_states, row)
    for row in report.found["no_user_state"].rows:
        done.user_states += await _add_scope(service, tables.user_states, row)
    by_session: dict[Key, list[Call]] = {}
    for call in reversed(report.calls):  # the oldest first
        by_session.setdefault(call.key, []).append(call)
    for calls in by_session.values():
        await _close(service, calls, done)
    for row in report.found["behind"].rows:
        moved = await _move_on(service, row, report.since)
        done.update_times += moved
        if not moved:
            done.left.append(row._replace(detail="has moved on, or may be in use"))
    return done


async def _write(service: Store[Any, Any], work: Callable[[Connection], bool]) -> bool:
    def transaction(conn: Connection) -> bool:
        with service._statements.transaction(conn):
            return work(conn)

    return await service._retry(
        lambda: service._database.submit(transaction, write=True), write=True
    )


async def _add_scope(service: Store[Any, Any], table: Any, row: Row) -> bool:
    statements, key = service._statements, Key(row.app_name, row.user_id, "")
    now = clock.to_datetime(service._now())

    def work(conn: Connection) -> bool:
        if statements.scope_row(conn, table, key, lock=False) is not None:
            return False
        parameters = {**key.parameters(), "v_state": "{}", "v_now": now}
        statements.insert_if_missing(conn, table, parameters)
        return True

    return await _write(service, work)


async def _close(service: Store[Any, Any], calls: list[Call], done: Repairs) -> None:
    """Appends responses to the calls of one session, which must be as it was looked at."""
    app, user, session_id = calls[0].key
    session = await service.get_session(
        app_name=app, user_id=user, session_id=session_id, num_recent_events=0
    )
    marker = clock.to_marker(calls[0].revision)
    current = session is not None and session._storage_update_marker == marker
    for call in calls:
        if current:
            try:
                await service.append_event(session, _response(service, call), on_stale="raise")
                done.calls += len(call.calls)
                continue
            except (StaleSessionError, SessionNotFoundError, EventConflictError):
                current = False
        done.left.append(Row(*call.key, call.event_id, "has moved on, or may be in use"))


def _response(service: Store[Any, Any], call: Call) -> Any:
    ids = [id_ for id_, _ in call.calls]
    parts = [
        {"function_response": {"id": id_, "name": name, "response": {"error": _NO_RESPONSE}}}
        for id_, name in call.calls
    ]
    where = {"branch": call.branch, "isolation_scope": call.isolation_scope}
    return service.event_type.model_validate(
        {
            "id": str(uuid.uuid5(_REPAIRS, codec.dumps([*call.key, call.event_id, *sorted(ids)]))),
            "invocation_id": call.invocation_id,
            "author": call.author,
            "timestamp": service._now(),
            "error_code": _ABORTED,
            "error_message": _NO_RESPONSE,
            "content": {"role": "user", "parts": parts},
            **{name: value for name, value in where.items() if value is not None},
        }
    )


async def _move_on(service: Store[Any, Any], row: Row, since: datetime) -> bool:
    """Sets a session's update_time to its newest event's, if nobody may be using it."""
    statements, key = service._statements, Key(row.app_name, row.user_id, row.session_id)

    def work(conn: Connection) -> bool:
        session = statements.lock_session(conn, key, with_state=False)
        newest = conn.execute(statements._newest_time, key.parameters()).scalar()
        if session is None or newest is None or newest >= since:
            return False
        if session.update_time < newest:
            moved = {**key.parameters(), "v_now": newest}
            statements.write(conn, statements._set_session[False], moved)
        return True

    return await _write(service, work)
