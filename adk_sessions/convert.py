"""google-adk's old layout, with pickled actions, becomes schema version 1 in the same database.

The old tables stay as they are until the end. New ones are filled beside them, a batch in each
transaction, in an order in which what is there already says where a run that was broken off has to
go on. At last the tables change names, and the old ones are kept as backups until `finish`.

Stop what writes to the database first. What is written meanwhile all the same is looked for once
more under a lock before the change of names (on MySQL and MariaDB right after it).

Times. The column ``timestamp`` of old events holds the local time of the process that wrote it,
whatever the database: ``zone`` says which that was. The hour that a clock shows twice is taken for
the first of the two, as google-adk itself reads it. ``create_time``, and ``update_time`` of states,
are the database's clock: UTC on SQLite, the server's session zone elsewhere. A session's
``update_time`` becomes that of its newest event, if it has one. google-adk 2.7 and later write UTC
to the old layout too: a database that only these have written to is converted with UTC, and where
both have written no zone is right for all rows.

What is no time (SQLite keeps anything) or no state is refused, as actions are that hold what they
do not hold. Converted all the same, such an event gets its session's ``create_time``; a session's
time gets the other of its two; what has no time at all gets the year 1970; a state becomes empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

from sqlalchemy import (
    ColumnElement,
    Connection,
    MetaData,
    String,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from . import codec
from .dialects import Generic, v0
from .dialects.types import Timestamp
from .errors import ConversionRefusedError, SchemaError
from .models import INDEX, Names

__all__ = ["ConversionRefusedError", "Refused", "Report", "convert", "finish", "is_v0", "preview"]

BATCH = 500
# Of what is refused, so many rows are named; there may be as many as there are events.
NAMED = 1_000

# What a changed meaning of the conversion would change, so that no two are mixed.
_FORM = "1"
_TICK = timedelta(microseconds=1)

Progress = Callable[[int, int], None]
Step = Callable[[], AbstractContextManager[None]]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A row that cannot be converted as it is, by its ids (empty where it has none), and why."""

    app_name: str
    user_id: str
    session_id: str
    event_id: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was converted, or would be.

    Attributes:
        sessions, events, app_states, user_states: how many rows.
        refused: rows without what was refused in them, or that would stop the conversion; the
            first thousand.
        refused_more: how many more there are.
        orphans: events of sessions that were deleted, as early releases (1.8 is one) left them on
            SQLite; they stay in the backup.
    """

    sessions: int = 0
    events: int = 0
    app_states: int = 0
    user_states: int = 0
    refused: tuple[Refused, ...] = ()
    refused_more: int = 0
    orphans: int = 0


def is_v0(conn: Connection, names: Names) -> bool:
    """Whether a database has the old layout, or a conversion of it that is not complete."""
    notes = v0.notes_table(names.schema, names.of).name
    return v0.has_table(conn, names.schema, notes) or v0.is_old(conn, names.schema, names.of)


def preview(
    conn: Connection,
    statements: Generic,
    names: Names,
    *,
    zone: ZoneInfo,
    progress: Progress | None = None,
) -> Report:
    """Reads everything as `convert` would, and writes nothing.

    Args:
        conn: of `Database.submit`.
        statements: of the database.
        names: where the tables are.
        zone: in which the processes ran that wrote the events.
        progress: called with the rows read and all rows.

    Raises:
        SchemaError: `convert` would raise it for these tables.
    """
    return _Conversion(conn, statements, names, zone, BATCH, False, progress).preview()


def convert(
    conn: Connection,
    statements: Generic,
    names: Names,
    *,
    zone: ZoneInfo,
    batch_size: int = BATCH,
    refused: Literal["stop", "empty"] = "stop",
    progress: Progress | None = None,
) -> Report:
    """Converts the tables in place, or goes on with a conversion that was broken off.

    One that was begun with another zone is begun anew, and so is one that has left out what is to
    ``stop`` now. What is left to be done afterwards is what adopting google-adk's own tables takes.

    Args:
        conn: of `Database.submit`; transactions are begun and committed here.
        statements: of the database.
        names: where the tables are.
        zone: in which the processes ran that wrote the events.
        batch_size: rows in a transaction, and in memory.
        refused: what to do with rows that cannot be converted as they are: ``stop`` before
            anything is replaced, or leave out what is refused, actions above all.
        progress: called with the rows done and all rows.

    Raises:
        ConversionRefusedError: there are such rows. A run with ``empty`` goes on from here.
        SchemaError: a table or column is missing; backups of an earlier conversion are in the way;
            the old tables have something of the application's own that new ones would not have;
            or another process converts with another zone.
    """
    stop = refused == "stop"
    return _Conversion(conn, statements, names, zone, batch_size, stop, progress).run()


def finish(conn: Connection, statements: Generic, names: Names) -> list[str]:
    """Drops the backups.

    Returns:
        Their names.

    Raises:
        SchemaError: no conversion was done, or one is not complete.
    """
    with _transaction(conn, statements):
        if is_v0(conn, names):
            raise SchemaError("The conversion is not complete: run it to its end first.")
        backups = v0.Layout(conn, names.schema, names.of, names.of(INDEX)).backups()
        if not backups:
            raise SchemaError("There are no backups of a conversion.")
        for name in backups:
            Table(name, MetaData(schema=names.schema)).drop(conn)
    return backups


@contextmanager
def _transaction(conn: Connection, statements: Generic) -> Iterator[None]:
    conn.rollback()  # what a look at the catalogue has begun
    with statements.transaction(conn):
        yield


class _Overtaken(Exception):
    """Another process has completed the conversion."""


class _Conversion:
    def __init__(
        self,
        conn: Connection,
        statements: Generic,
        names: Names,
        zone: ZoneInfo,
        batch_size: int,
        stop: bool,
        progress: Progress | None,
    ) -> None:
        self.conn, self.statements, self.names, self.zone = conn, statements, names, zone
        self.batch_size, self.stop, self.progress = batch_size, stop, progress
        self.layout = v0.Layout(conn, names.schema, names.of, names.of(INDEX))
        self.parameters = codec.dumps({"form": _FORM, "zone": str(zone)})
        self.report = Report()
        self.done = self.total = 0

    # --- the steps -----------------------------------------------------------------------------

    def preview(self) -> Report:
        self._look()
        self._count()
        for name in v0.TABLES:
            for keys in self._pages(name, nullcontext, write=False):
                rows = getattr(self.report, name) + len(keys)
                self.report = replace(self.report, **{name: rows})
        total = self._rows(self.layout.old["events"])
        self.conn.rollback()
        return replace(self.report, orphans=total - self.report.events)

    def run(self) -> Report:
        try:
            with _transaction(self.conn, self.statements):
                self._begin()
            self._count()
            self._copy(self._step)
            self._stop_if_refused()
            self._settle_all()
            with self._step():
                v0.lock(self.conn, self.layout.old.values())
                if self.stop and not self.layout.backups() and (noted := self._noted_refused())[0]:
                    raise ConversionRefusedError(*noted)
                self._catch_up()
                self.layout.swap()
                if v0.swaps_in_transaction(self.conn):
                    self._forget()
            if not v0.swaps_in_transaction(self.conn):
                with self._step():
                    self.layout.locate()
                    self._catch_up()
                with self._step():
                    self._forget()
        except _Overtaken:
            pass
        return self._counted()

    def _look(self) -> None:
        """Refuses what cannot be converted, or not without a loss."""
        self.layout.locate()
        if not self.layout.backups() and (why := self.layout.hindrance()):
            raise SchemaError(why)

    def _begin(self) -> None:
        """Makes the new tables, unless a run that was broken off has left them."""
        noted = self._noted()
        if noted is None and not is_v0(self.conn, self.names):
            raise _Overtaken
        anew, backups = noted != self.parameters, self.layout.backups()
        if not backups:
            self._look()
            if self.stop and not anew:
                anew = bool(self._noted_refused()[0])
        if anew:
            if backups:
                if noted is None:
                    what = "There are backups of an earlier conversion; drop them first"
                else:
                    what = f"A conversion is almost complete; run it again with {noted}"
                raise SchemaError(f"{what}: {', '.join(backups)}")
            made = [*self.layout.working.values(), self.layout.notes]
            for table in reversed(made):
                table.drop(self.conn, checkfirst=True)
            for table in made:
                table.create(self.conn)
            self._note("parameters", self.parameters)
        self.layout.locate()

    def _catch_up(self) -> None:
        """Copies what was written, and drops what was deleted, since the first copy."""
        touched = self._copy(nullcontext)
        self._stop_if_refused()
        for name in ("events", "sessions"):
            self._drop_gone(name)
        self._settle(touched)

    # --- copying -------------------------------------------------------------------------------

    def _copy(self, step: Step) -> set[Key]:
        """Copies what the new tables lack. Returns the sessions that were written to, unless each
        page has a transaction: then all are settled later."""
        touched: set[Key] = set()
        for name in v0.TABLES:
            for keys in self._pages(name, step, write=True):
                if step is nullcontext and name in ("sessions", "events"):
                    touched.update(key[-3:] for key in keys)
        return touched

    def _pages(self, name: str, step: Step, *, write: bool) -> Iterator[list[Key]]:
        """Goes through an old table by its key, a page at a time, and writes what is missing."""
        own = self.layout.keys[name]
        page = self.layout.page(self.statements, name, missing_only=write).limit(self.batch_size)
        last: Key | None = None
        while True:
            with step():
                past = page if last is None else page.where(_after(own, last))
                rows = self.conn.execute(past).mappings().all()
                keys = [tuple(row[f"t{n}"] for n in range(len(own))) for row in rows]
                if rows and name == "events":
                    self._events(keys, rows, write)
                elif rows:
                    self._states(name, keys, rows, write)
            if not rows:
                return
            last = tuple(rows[-1][f"k{n}"] for n in range(len(own)))
            self.done = min(self.done + len(rows), self.total)
            if self.progress is not None:
                self.progress(self.done, self.total)
            yield keys

    def _events(self, keys: list[Key], rows: Any, write: bool) -> None:
        parameters: list[dict[str, Any]] = []
        for key, row in zip(keys, rows, strict=True):
            event, reason = v0.event_of(key[0], row, self.zone)
            if reason is not None:
                self._refuse(Refused(key[1], key[2], key[3], key[0], reason), write)
            parameters.append(
                _named("events", key)
                | {"v_invocation": event.invocation_id, "v_time": event.timestamp}
                | {"v_data": event.text.data, "v_exact": event.text.exact}
            )
        if write and not self._stops():
            values = _parameters("events") | {
                "invocation_id": bindparam("v_invocation", type_=String()),
                "timestamp": bindparam("v_time", type_=Timestamp()),
                "event_data": self.statements.as_json("v_data"),
                "event_exact": bindparam("v_exact", type_=Text()),
            }
            self.conn.execute(insert(self.layout.new["events"]).values(values), parameters)

    def _states(self, name: str, keys: list[Key], rows: Any, write: bool) -> None:
        new = self.layout.new[name]
        parameters: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for key, row in zip(keys, rows, strict=True):
            found, reason = v0.state_of(name, row)
            if reason is not None:
                app, user, session = (*key, "", "")[:3]
                self._refuse(Refused(app, user, session, "", reason), write)
            named = {f"v_{column}": value for column, value in found.items()}
            parameters[bool(write and row["is_new"])].append(_named(name, key) | named)
        if not write or self._stops():
            return
        times = [time for time in ("create_time", "update_time") if time in new.c]
        values: dict[str, Any] = {time: bindparam(f"v_{time}", type_=Timestamp()) for time in times}
        values["state"] = self.statements.as_json("v_state")
        if parameters[True]:
            self.conn.execute(insert(new).values(_parameters(name) | values), parameters[True])
        if parameters[False]:
            change = update(new).where(*_is_row(new, name)).values(values)
            self.conn.execute(change, parameters[False])

    def _drop_gone(self, name: str) -> None:
        """Deletes rows whose originals are no more; there are none if the numbers are equal."""
        new, source = self.layout.new[name], self.layout.sources[name]
        if self._rows(new) <= self._rows(source):
            return
        own = [new.c[key] for key in v0.KEYS[name]]
        originals = select(*self.layout.true_keys[name]).select_from(source)

        def compare(page: list[Key]) -> None:
            found = originals.where(tuple_(*self.layout.keys[name]).in_(page))
            kept = {tuple(row) for row in self.conn.execute(found)}
            if gone := [_named(name, key) for key in page if key not in kept]:
                self.conn.execute(delete(new).where(*_is_row(new, name)), gone)

        self._each_page(select(*own).order_by(*own), own, nullcontext, compare)

    def _each_page(
        self, statement: Any, columns: list[Any], step: Step, work: Callable[[list[Key]], None]
    ) -> None:
        """Calls ``work`` with pages of the keys that a statement finds in their order."""
        last: Key | None = None
        while True:
            with step():
                past = statement if last is None else statement.where(_after(columns, last))
                page = [tuple(row) for row in self.conn.execute(past.limit(BATCH))]
                if not page:
                    return
                work(page)
            last = page[-1]

    # --- settling ------------------------------------------------------------------------------

    def _settle_all(self) -> None:
        """Sets apart events of equal times, and sets the update_time of all sessions."""
        e, s = self.layout.new["events"].c, self.layout.new["sessions"].c
        owner = [e.app_name, e.user_id, e.session_id]
        equal = func.count() > func.count(e.timestamp.distinct())
        ties = select(*owner).group_by(*owner).having(equal).order_by(*owner)
        self._each_page(ties, owner, self._step, self._settle)
        own = [e.app_name == s.app_name, e.user_id == s.user_id, e.session_id == s.id]
        newest = select(func.max(e.timestamp)).where(*own).scalar_subquery()
        with self._step():
            sessions = update(self.layout.new["sessions"])
            self.conn.execute(
                sessions.where(exists(select(e.id).where(*own))).values(update_time=newest)
            )

    def _settle(self, sessions: Iterable[Key]) -> None:
        """Makes the column strictly increase in sessions: by time, and by id where that is equal.

        google-adk orders by time and id, the store by the column: so both read the same.
        """
        e, s = self.layout.new["events"].c, self.layout.new["sessions"].c
        value = bindparam("v_time", type_=Timestamp())
        for key in sessions:
            where = [e.app_name == key[0], e.user_id == key[1], e.session_id == key[2]]
            rows = select(e.id, e.timestamp).where(*where).order_by(e.timestamp, e.id)
            now: datetime | None = None
            changed: list[dict[str, Any]] = []
            for event_id, time in self.conn.execute(rows).all():
                now = time if now is None else max(time, now + _TICK)
                if now != time:
                    changed.append({"p_id": event_id, "v_time": now})
            if changed:
                events = update(self.layout.new["events"]).where(*where, e.id == bindparam("p_id"))
                self.conn.execute(events.values(timestamp=value), changed)
            if now is not None:
                mine = and_(s.app_name == key[0], s.user_id == key[1], s.id == key[2])
                newest = update(self.layout.new["sessions"]).values(update_time=now)
                self.conn.execute(newest.where(mine))

    # --- what is remembered --------------------------------------------------------------------

    @contextmanager
    def _step(self) -> Iterator[None]:
        """A transaction of a conversion that is still this one."""
        with _transaction(self.conn, self.statements):
            noted = self._noted()
            if noted is None and not is_v0(self.conn, self.names):
                raise _Overtaken
            if noted != self.parameters:
                raise SchemaError("Another process has begun a conversion with another time zone.")
            yield

    def _noted(self) -> str | None:
        if not self.layout.exists(self.layout.notes.name):
            return None
        n = self.layout.notes.c
        return self.conn.execute(select(n.value).where(n.kind == "parameters")).scalar() or ""

    def _note(self, kind: str, value: str) -> None:
        self.conn.execute(insert(self.layout.notes).values(kind=kind, value=value))

    def _refuse(self, row: Refused, write: bool) -> None:
        if write and not self.stop:
            self._note("refused", codec.dumps(asdict(row)))
        if len(self.report.refused) < NAMED:
            self.report = replace(self.report, refused=(*self.report.refused, row))
        else:
            self.report = replace(self.report, refused_more=self.report.refused_more + 1)

    def _stops(self) -> bool:
        """Whether this run will not get to its end: it only reads on, for what else is refused."""
        return self.stop and bool(self.report.refused)

    def _stop_if_refused(self) -> None:
        if self._stops():
            raise ConversionRefusedError(self.report.refused, self.report.refused_more)

    def _noted_refused(self) -> tuple[tuple[Refused, ...], int]:
        """Of all runs; a state that is refused is read, and noted, more than once."""
        n = self.layout.notes.c
        rows = select(n.value).where(n.kind == "refused").distinct()
        found = [json.loads(value) for value in self.conn.execute(rows.limit(NAMED)).scalars()]
        return tuple(Refused(**row) for row in found), self._rows(rows.subquery()) - len(found)

    def _forget(self) -> None:
        """Drops the notes, also those of runs before this one: the conversion is complete."""
        rows, more = self._noted_refused()
        self.report = replace(self.report, refused=rows, refused_more=more)
        self.layout.notes.drop(self.conn)

    def _rows(self, source: Any) -> int:
        return int(self.conn.execute(select(func.count()).select_from(source)).scalar_one())

    def _count(self) -> None:
        self.total = sum(self._rows(self.layout.sources[name]) for name in v0.TABLES)
        for name, new in self.layout.new.items():
            if new is self.layout.working[name]:
                self.done += self._rows(new)

    def _counted(self) -> Report:
        counts: dict[str, Any] = {n: self._rows(new) for n, new in self.layout.final.items()}
        backup = self.layout.backup("events")
        if self.layout.exists(backup):
            old = self._rows(Table(backup, MetaData(schema=self.names.schema)))
            counts["orphans"] = max(old - counts["events"], 0)
        self.conn.rollback()
        return replace(self.report, **counts)


def _named(name: str, key: Key) -> dict[str, Any]:
    return {f"p_{column}": value for column, value in zip(v0.KEYS[name], key, strict=True)}


def _parameters(name: str) -> dict[str, Any]:
    return {column: bindparam(f"p_{column}", type_=String()) for column in v0.KEYS[name]}


def _is_row(table: Table, name: str) -> list[ColumnElement[bool]]:
    return [table.c[column] == parameter for column, parameter in _parameters(name).items()]


def _after(columns: list[Any], key: Key) -> ColumnElement[bool]:
    """Rows past a key in the order of its columns, spelled so that all databases use the index."""
    past = [
        and_(*(c == k for c, k in zip(columns[:n], key, strict=False)), columns[n] > key[n])
        for n in range(len(columns))
    ]
    return and_(columns[0] >= key[0], or_(*past))
