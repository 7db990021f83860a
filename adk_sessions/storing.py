"""Storing whole sessions that come from elsewhere, each in one transaction, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.exc import IntegrityError

from . import clock, codec, portable
from .dialects.adk_sqlite import file_of
from .dialects.moving import Head, InOrder, StoredChange
from .dialects.rows import Key, StoredEvent
from .errors import SchemaError
from .operations import Operations

T = TypeVar("T")

# The columns of an event and of a change, as their tuples have them.
_EVENT = ("id", "invocation_id", "timestamp", "event_data", "event_exact")
_CHANGE = StoredChange._fields


@dataclass(frozen=True)
class ImportReport:
    """What an import did, or with ``dry_run`` would do.

    Attributes:
        sessions: stored, each with all of its events.
        already_there: sessions that the database has already, with these events.
        events: stored.
        app_states, user_states: those to which keys were added.
        state_changes: stored.
        conflicts: sessions that the database has with other content; they were left alone.
    """

    sessions: int = 0
    already_there: int = 0
    events: int = 0
    app_states: int = 0
    user_states: int = 0
    state_changes: int = 0
    conflicts: tuple[Key, ...] = ()


class Incoming(NamedTuple):
    """A session as it will be stored.

    Attributes:
        key: which.
        row: the other columns of its row; documents as text.
        events, changes: make an iterator, anew for each try.
        counts: how many events and changes there are.
        exact: whether times of revisions count when it is compared with what is there.
    """

    key: Key
    row: dict[str, Any]
    events: Callable[[], Iterable[StoredEvent]]
    changes: Callable[[], Iterable[StoredChange]]
    counts: tuple[int, int]
    exact: bool


class Target:
    """Where sessions go.

    Args:
        service: the store.
        compare: for a dry run, whether there are tables to compare with; None to write.
    """

    def __init__(self, service: Operations[Any, Any], compare: bool | None) -> None:
        self._service = service
        self._statements = service._statements
        self._empty = compare is False
        self._write = compare is None
        # whose row of a scope was last found
        self._seen: dict[Table, tuple[str, ...]] = {}

    @classmethod
    async def of(cls, service: Operations[Any, Any], *, dry_run: bool) -> Target:
        """Of a store, its tables prepared; a dry run must make nothing, not even a file."""
        if dry_run:
            return cls(service, await _has_tables(service))
        await service.prepare_tables()
        return cls(service, None)

    async def add_state(
        self, app_name: str, user_id: str | None, text: str, moment: datetime
    ) -> bool:
        """Adds the keys that a wider state lacks; whether there were any.

        Args:
            app_name: the app.
            user_id: None for the app's own state.
            text: the state as it is stored.
            moment: when it was changed, if there is none yet.
        """
        if self._empty:
            return text != "{}"
        return await self._run(lambda conn: self._merge(conn, app_name, user_id, text, moment))

    def _merge(
        self, conn: Connection, app_name: str, user_id: str | None, text: str, moment: datetime
    ) -> bool:
        statements, state = self._statements, codec.load_state(text)
        tables, key = statements.tables, Key(app_name, user_id or "", "")
        table = tables.app_states if user_id is None else tables.user_states
        stored = None
        if not self._write or self._service._isolated:  # which tells the policies whose row it is
            if user_id is None:
                stored = statements.app_state(conn, app_name)
            else:
                stored = statements.user_state(conn, app_name, user_id)
        if self._write:
            # before anything is read: a snapshot would be older than the row that is waited for
            stored = statements.scope_row(conn, table, key, lock=True)
        missing = state.keys() - codec.load_state(stored).keys()
        if not self._write or (stored is not None and not missing):
            return bool(missing)
        statements.check_size(conn, "state", text)
        if stored is None:
            values = {**key.parameters(), "v_state": text, "v_now": moment}
            statements.insert_if_missing(conn, table, values)
            stored = statements.scope_row(conn, table, key, lock=True)
        known = codec.load_state(stored)
        if lacking := {name: value for name, value in state.items() if name not in known}:
            now = clock.to_datetime(self._service._now())
            statements._merge_scope(conn, table, key, codec.dump_state(lacking), now)
        return bool(missing)

    async def add(self, session: Incoming, report: ImportReport) -> ImportReport:
        """Stores a session unless there is one; the report with it."""
        same = None if self._empty else await self._run(lambda conn: self._store(conn, session))
        if same is None:
            events, changes = session.counts
            return replace(
                report,
                sessions=report.sessions + 1,
                events=report.events + events,
                state_changes=report.state_changes + changes,
            )
        if same:
            return replace(report, already_there=report.already_there + 1)
        return replace(report, conflicts=(*report.conflicts, session.key))

    def _store(self, conn: Connection, session: Incoming) -> bool | None:
        """None if it was stored, else whether what is there is the same."""
        statements, tables, key = self._statements, self._statements.tables, session.key
        head = statements.session_head(conn, key)
        if head is not None:
            return self._is_in(conn, session, head)
        if not self._write:
            return None
        start: str | None = session.row.get("initial_state")
        statements.check_size(conn, "state", session.row["state"])
        statements.check_size(conn, "initial_state", start or "")
        statements.clear_leftovers(conn, key)
        row = {"app_name": key.app_name, "user_id": key.user_id, "id": key.session_id}
        # the start by itself: both together may be more than a server takes at once
        rows = [row | session.row | {"initial_state": None}]
        statements.insert_rows(conn, tables.sessions, None, rows)
        if start is not None:
            statements.set_start(conn, key, start)
        now = {"v_state": "{}", "v_now": session.row["create_time"]}
        for scope in (tables.app_states, tables.user_states):
            place = key[: len(scope.primary_key.columns)]
            if self._seen.get(scope) == place:
                continue  # sessions come user by user
            if statements.scope_row(conn, scope, key, lock=False) is None:
                statements.insert_if_missing(conn, scope, {**key.parameters(), **now})
            else:
                self._seen[scope] = place
        statements.insert_rows(conn, tables.events, key, self._event_rows(conn, session))
        changes = (dict(zip(_CHANGE, change, strict=True)) for change in session.changes())
        statements.insert_rows(conn, tables.state_changes, key, changes)
        return None

    def _event_rows(self, conn: Connection, session: Incoming) -> Iterator[dict[str, Any]]:
        for event in session.events():
            self._statements.check_size(conn, "event", event.data or "", event.exact or "")
            yield dict(zip(_EVENT, tuple[Any, ...](event), strict=True))

    def _is_in(self, conn: Connection, session: Incoming, head: Head) -> bool:
        """Whether a stored session begins as the given one, and has gone on from there or not."""
        events, changes = session.counts
        if head.events < events or head.state_changes < changes:
            return False
        if head.create_time != session.row["create_time"] and (
            session.exact or head.events > events
        ):
            return False
        gone_on = head.events > events or head.state_changes > changes
        if not gone_on and not _alike(portable.state, session.row["state"], head.state):
            return False
        given, stored = session.events(), self._stored_events(conn, session.key, head)
        if not all(_same_event(*pair, session.exact) for pair in zip_longest(given, stored)):
            return False
        pairs = zip_longest(session.changes(), self._stored_changes(conn, session.key, head))
        return all(_same_change(*pair) for pair in pairs)

    def _stored_events(self, conn: Connection, key: Key, head: Head) -> Iterator[StoredEvent]:
        order, last, left = InOrder(), None, head.events
        while left > 0:
            batch = self._statements.session_events(conn, key, head, last)
            if not batch:
                break
            last, left = batch[-1], left - len(batch)
            yield from order.of(batch)
        yield from order.all()

    def _stored_changes(self, conn: Connection, key: Key, head: Head) -> Iterator[StoredChange]:
        last, left = None, head.state_changes
        while left > 0:
            batch = self._statements.session_changes(conn, key, head, last)
            if not batch:
                break
            last, left = batch[-1], left - len(batch)
            yield from batch

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
        with contextlib.suppress(IntegrityError):
            return await self._service._retry(once, write=self._write)
        raise SchemaError("two of its rows have one id")


def _same_event(one: StoredEvent | None, two: StoredEvent | None, exact: bool) -> bool:
    """Whether two events are the same, the second one as it is stored; one that is not given is."""
    if one is None:
        return True
    if two is None or one[:2] != two[:2] or (exact and one.timestamp != two.timestamp):
        return False
    two = two._replace(timestamp=one.timestamp)
    # google-adk spells some values in another way, and JSONB does
    texts = [codec.EventText(event.data or "null", event.exact) for event in (one, two)]
    return one == two or codec.same_event(*texts) or _alike(portable.event, one, two)


def _same_change(one: StoredChange | None, two: StoredChange | None) -> bool:
    return (
        one is None or one == two or (two is not None and _alike(portable.state_change, one, two))
    )


def _alike(spell: Callable[[Any], str], *both: Any) -> bool:
    one, two = (portable.canonical(spell(row)) for row in both)
    return one == two


async def _has_tables(service: Operations[Any, Any]) -> bool:
    """Whether there is anything to compare with; a file that is missing must not be made."""
    file = file_of(service._database)
    table = service.models.sessions
    return (file is None or file.exists()) and await service._run(
        lambda conn: inspect(conn).has_table(table.name, schema=table.schema), write=False
    )
