"""Bringing sessions in from elsewhere: files of google-adk's SqliteSessionService."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import RootModel, ValidationError
from sqlalchemy import Connection, Table, bindparam, delete, insert, inspect
from sqlalchemy.exc import IntegrityError

from . import checks, clock, codec
from .dialects.adk_sqlite import Source, file_of, open_source, refuse_itself
from .dialects.base import TICK
from .dialects.faults import translate
from .dialects.rows import Key, Snapshot, StoredEvent
from .dialects.types import Json
from .errors import ConfigurationError, InvalidInputError, SchemaError
from .service import Store

T = TypeVar("T")

# the columns of a `StoredEvent`
_EVENT = ("id", "invocation_id", "timestamp", "event_data", "event_exact")


@dataclass(frozen=True)
class Report:
    """What an import did, or with ``dry_run`` would do.

    Attributes:
        sessions: stored, each with all of its events.
        already_there: sessions that the database has already, with these events.
        events: stored.
        app_states, user_states: those to which keys were added.
        conflicts: sessions that the database has with other content; they were left alone.
    """

    sessions: int = 0
    already_there: int = 0
    events: int = 0
    app_states: int = 0
    user_states: int = 0
    conflicts: tuple[Key, ...] = ()


@dataclass(frozen=True)
class _Session:
    """A session as it will be stored."""

    key: Key
    state: str
    create_time: datetime
    update_time: datetime
    events: list[StoredEvent]


class _Plain(RootModel[dict[str, Any]]):
    """An event's JSON as it is: the codec takes models, and no field may get lost or be added."""


async def import_adk_sqlite(
    service: Store[Any, Any],
    file: Path,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Imports a file of google-adk's SqliteSessionService, which is not changed.

    Each session is stored in one transaction with all of its events, in the order in which that
    service reads them. An import that was broken off is repeated as it is: a session that the
    database has already, with all of these events at its beginning, is skipped. Keys of app and
    user states are added where the database lacks them; a key that it has keeps its value.

    Args:
        service: where to. Policies for ``row_level_security`` must not bind its role.
        file: the database file; stop what writes to it first, or later writes are missed.
        dry_run: reads and compares everything, and writes nothing.
        progress: called with the sessions done and all sessions.

    Raises:
        ConfigurationError: the service has ``row_level_security``.
        InvalidInputError: there is no such file, it is the service's own, or a row has an id or a
            time that cannot be stored. Nothing of the row's session is stored, and what came
            before it stays.
        SchemaError: it is not such a file, or a row is not JSON; likewise.
        DatabaseError: the file cannot be read, or the database failed.
    """
    if service._isolated:
        raise ConfigurationError(
            "Import without row_level_security, as a role that the policies do not bind."
        )
    refuse_itself(service._database, file)
    models = service.models
    async with open_source(file) as source:
        target = _Target(service, await _has_tables(service) if dry_run else None)
        if not dry_run:
            await service.prepare_tables()
        apps = users = done = 0
        async for app, state, time in source.app_states():
            apps += await target.add_state(models.app_states, Key(app, "", ""), state, time)
        async for app, user, state, time in source.user_states():
            users += await target.add_state(models.user_states, Key(app, user, ""), state, time)
        report, total = Report(app_states=apps, user_states=users), await source.counted()
        async for row in source.sessions():
            report = await target.add(await _read(service, source, row), report)
            done += 1
            if progress is not None:
                progress(done, total)
    return report


async def _has_tables(service: Store[Any, Any]) -> bool:
    """Whether there is anything to compare with; a file that is missing must not be made."""
    file = file_of(service._database)
    table = service.models.sessions
    return (file is None or file.exists()) and await service._run(
        lambda conn: inspect(conn).has_table(table.name, schema=table.schema), write=False
    )


class _Target:
    """Where sessions go.

    Args:
        service: the store.
        compare: for a dry run, whether there are tables to compare with; None to write.
    """

    def __init__(self, service: Store[Any, Any], compare: bool | None) -> None:
        self._service = service
        self._statements = service._statements
        self._empty = compare is False
        self._write = compare is None

    async def add_state(self, table: Table, key: Key, state: Any, time: Any) -> bool:
        """Adds the keys that a wider state lacks; whether there were any."""
        fields = dict(zip(table.primary_key.columns.keys(), key, strict=False))
        name = f"{table.name} {_short(*fields.values())}"
        with _naming(name):
            for field, value in fields.items():
                checks.check_key(value, field)
            checks.check_timestamp(time, "update_time")
            text = codec.dump_state(_object(state, name))
            if self._empty:
                return text != "{}"
            moment = clock.to_datetime(time)
            return await self._run(lambda conn: self._merge(conn, table, key, text, moment))

    def _merge(self, conn: Connection, table: Table, key: Key, text: str, moment: datetime) -> bool:
        statements, state, added = self._statements, codec.load_state(text), False
        self._statements.check_size(conn, "state", text)
        stored = statements.scope_row(conn, table, key, lock=self._write)
        if stored is None and self._write:
            values = {**key.parameters(), "v_state": text, "v_now": moment}
            statements.insert_if_missing(conn, table, values)
            stored = statements.scope_row(conn, table, key, lock=True)
            added = bool(state)
        there = codec.load_state(stored)
        missing = {name: value for name, value in state.items() if name not in there}
        if missing and self._write:
            now = clock.to_datetime(self._service._now())
            statements._merge_scope(conn, table, key, codec.dump_state(missing), now)
        return added or bool(missing)

    async def add(self, session: _Session, report: Report) -> Report:
        """Stores a session unless there is one; the report with it."""
        found: Snapshot | None = None
        if not self._empty:
            with _naming(f"session {_short(*session.key)}"):
                found = await self._run(lambda conn: self._store(conn, session))
        if found is None:
            return replace(
                report, sessions=report.sessions + 1, events=report.events + len(session.events)
            )
        if _is_in(session, found):
            return replace(report, already_there=report.already_there + 1)
        return replace(report, conflicts=(*report.conflicts, session.key))

    def _store(self, conn: Connection, session: _Session) -> Snapshot | None:
        statements, tables, key = self._statements, self._statements.tables, session.key
        found = statements.read(conn, key, limit=None, after=None, epoch=0.0)
        if found is not None or not self._write:
            return found
        statements.check_size(conn, "state", session.state)
        for event in session.events:
            statements.check_size(conn, "event", event.data or "", event.exact or "")
        # tables without a foreign key may still have events of a session that was deleted
        conn.execute(delete(tables.events).where(statements._is_event), key.parameters())
        times = {"create_time": session.create_time, "update_time": session.update_time}
        of = {"app_name": key.app_name, "user_id": key.user_id}
        row = {**of, "id": key.session_id, "state": session.state, **times}
        self._insert(conn, tables.sessions, [row])
        now = {"v_state": "{}", "v_now": session.create_time}
        for scope in (tables.app_states, tables.user_states):
            if statements.scope_row(conn, scope, key, lock=False) is None:
                statements.insert_if_missing(conn, scope, {**key.parameters(), **now})
        of["session_id"] = key.session_id
        rows = [
            of | dict(zip(_EVENT, tuple[Any, ...](event), strict=True)) for event in session.events
        ]
        self._insert(conn, tables.events, rows)
        return None

    def _insert(self, conn: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        """Inserts rows, their JSON as text."""
        values = {
            name: self._statements.as_json(f"v_{name}")
            if isinstance(column.type, Json)
            else bindparam(f"v_{name}", type_=column.type)
            for name, column in table.columns.items()
        }
        if rows:
            parameters = [{f"v_{name}": value for name, value in row.items()} for row in rows]
            conn.execute(insert(table).values(values), parameters)

    async def _run(self, work: Callable[[Connection], T]) -> T:
        """One transaction, once more if another writer was first."""
        database, statements = self._service._database, self._statements

        def transaction(conn: Connection) -> T:
            with statements.transaction(conn):
                return work(conn)

        async def once() -> T:
            if self._write and statements.autocommit:
                return await database.submit(transaction, write=True)
            return await database.run(work, write=self._write)

        with contextlib.suppress(IntegrityError):
            return await self._service._retry(once, write=self._write)
        try:
            return await self._service._retry(once, write=self._write)
        except IntegrityError as error:
            failure = translate(error, unknown=False)
        raise failure


async def _read(service: Store[Any, Any], source: Source, row: tuple[Any, ...]) -> _Session:
    """A session of the file in the form that it is stored in."""
    key = Key(*row[:3])
    state, created, updated = row[3:]
    name = f"session {_short(*key)}"
    with _naming(name):
        for value, field in zip(key, ("app_name", "user_id", "id"), strict=True):
            checks.check_key(value, field)
        checks.check_timestamp(created, "create_time")
        checks.check_timestamp(updated, "update_time")
        text = codec.dump_state(_object(state, name))
    update_time, events, latest = clock.to_datetime(updated), [], clock.EPOCH
    for event_id, invocation_id, time, data in await source.events(key):
        at = f"event {_short(event_id)} of {name}"
        with _naming(at):
            checks.check_key(event_id, "id")
            checks.check_key(invocation_id, "invocation_id", limit=checks.TEXT_LENGTH)
            plain = _object(data, at)
            for moment in (time, own := plain.get("timestamp", time)):
                checks.check_timestamp(moment, "timestamp")
            stored = codec.dump_event(_Plain(plain))
        _readable(
            functools.partial(codec.load_event, service.event_type, *stored),
            f"{at} cannot be read as {service.event_type.__name__}",
        )
        # the column may not be older than the event's own time, by which readers filter
        latest = max(clock.to_datetime(max(time, own)), latest + TICK)
        events.append(StoredEvent(event_id, invocation_id, latest, *stored))
    return _Session(key, text, clock.to_datetime(created), max(update_time, latest), events)


def _is_in(session: _Session, found: Snapshot) -> bool:
    """Whether a stored session begins as the given one, and has gone on from there or not."""
    given, stored = session.events, found.events[: len(session.events)]
    if [event[:2] for event in given] != [event[:2] for event in stored]:
        return False
    pairs = [
        (codec.EventText(one.data or "{}", one.exact), codec.EventText(two.data or "{}", two.exact))
        for one, two in zip(given, stored, strict=True)
    ]
    if len(found.events) > len(given):  # the state has moved on
        if found.create_time != session.create_time:
            return False
    else:
        state = codec.EventText(found.states.session or "{}", None)
        pairs.append((codec.EventText(session.state, None), state))
    with contextlib.suppress(ValueError):  # what is stored may be no JSON
        return all(codec.same_event(*pair) for pair in pairs)
    return False


def _object(text: Any, name: str) -> dict[str, Any]:
    value = None
    if isinstance(text, str):
        encoded = _readable(text.encode, f"{name} is not UTF-8")
        value = _readable(lambda: json.loads(encoded), f"{name} is not JSON")
    if not isinstance(value, dict):
        raise SchemaError(f"{name} is not a JSON object.")
    return value


def _readable(work: Callable[[], T], message: str) -> T:
    """A row's content, or what is wrong with it: the error itself would quote the row."""
    with contextlib.suppress(ValidationError, ValueError, RecursionError):
        return work()
    raise SchemaError(f"{message}.")


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of an error which row it is about."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}", field=error.field) from None


def _short(*key: Any) -> str:
    return ", ".join(repr(part if len(str(part)) <= 64 else f"{str(part)[:64]}…") for part in key)
