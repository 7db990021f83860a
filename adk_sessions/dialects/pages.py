"""Lists page by page: of sessions, of events, of users. One statement for each page.

A page begins where the last one ended, at a row's place in the order of an index, and never at a
number of rows: what is written meanwhile moves no row from one page to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    Select,
    String,
    Table,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy.types import NullType

from .. import clock
from ..labels import label_pair, load_labels
from ..session import SessionSummary
from .reads import Reads
from .rows import Key, StoredEvent
from .types import MYSQL_FAMILY, Timestamp

Order = Literal["created", "updated"]

_LIMIT = bindparam("k_limit", type_=Integer())

#: where a row stands: its time, as the database has it, and then ids
Place = tuple[Any, ...]


class PlacedSession(NamedTuple):
    """A session of a page."""

    place: Place
    summary: SessionSummary


class PlacedEvent(NamedTuple):
    """An event of a page; ``after`` is the place that the caller named by an event's id."""

    place: Place
    row: StoredEvent
    after: Place | None
    #: whether the session has more beyond what was asked for; None if that was not asked
    more: bool | None = None


@dataclass(frozen=True)
class Wanted:
    """Which sessions, in which order."""

    order: Order = "created"
    archived: bool | None = False
    labels: Mapping[str, str] | None = None
    counts: bool = False


@dataclass(frozen=True)
class Window:
    """Which events of a session.

    Attributes:
        backward: whether the newest come first.
        beyond: the place that the page begins at, in its direction; None for the first page.
        after: a place that all must be newer than.
        after_id: the same as an event's id, that the statement looks up.
        author: theirs, None for any.
        invocation_id: theirs, None for any.
    """

    backward: bool = False
    beyond: Place | None = None
    after: Place | None = None
    after_id: str | None = None
    author: str | None = None
    invocation_id: str | None = None


class Pages(Reads):
    """The statements."""

    #: whether a time is kept, and put in order, as whatever was written
    raw_times: ClassVar[bool] = False
    #: whether a string that is taken out of JSON still has its quotes
    quotes_json: ClassVar[bool] = False

    @cached_property
    def _pages(self) -> dict[Any, Any]:
        """Statements by their shape."""
        return {}

    # --- sessions ------------------------------------------------------------------------------

    def sessions_page(
        self,
        conn: Connection,
        app_name: str,
        user_id: str | None,
        *,
        wanted: Wanted,
        limit: int,
        beyond: Place | None,
    ) -> list[PlacedSession]:
        """So many sessions of an app, or of one of its users, the newest first.

        Args:
            wanted: which, and in which order.
            limit: how many.
            beyond: the place of the one before; None for the first page.
        """
        one_user, labels = user_id is not None, wanted.labels or {}
        shape = (one_user, wanted.order, wanted.archived, len(labels), wanted.counts, not beyond)
        statement = self._pages.get(shape)
        if statement is None:
            statement = self._pages[shape] = self._sessions_statement(*shape)
        parameters = {"k_app": app_name, "k_user": user_id, "k_limit": limit}
        for number, (key, value) in enumerate(sorted(labels.items())):
            parameters[f"k_label_{number}"] = f",{label_pair(key, value)}"
        if beyond:
            parameters |= self._place_parameters("k_place", beyond)
        rows = self.rows(conn, statement, parameters)
        return [
            PlacedSession(
                (row[-1], row[1]) if one_user else (row[-1], row[0], row[1]),
                _summary(app_name, row),
            )
            for row in rows
        ]

    def _sessions_statement(
        self,
        one_user: bool,
        order: Order,
        archived: bool | None,
        labels: int,
        counts: bool,
        first: bool,
    ) -> Any:
        table = self.tables.sessions
        s = table.c
        time = s.create_time if order == "created" else s.update_time
        place: list[ColumnElement[Any]] = [time, s.id] if one_user else [time, s.user_id, s.id]
        where = [s.app_name == bindparam("k_app"), *self.is_archived(archived)]
        if one_user:
            where.append(s.user_id == bindparam("k_user"))
        where += [self.has_pair(f"k_label_{number}") for number in range(labels)]
        if not first:
            where.append(self._beyond("k_place", place, backward=True))
        # where the order is an index's, events are counted for the rows that come out of it alone
        *columns, events = self._summary_columns(table)
        if counts and order == "created":
            events = self._count(table).label("events")
        statement = (
            select(*columns, events, self._raw(time).label("place"))
            .where(*where)
            .order_by(*(column.desc() for column in place))
            .limit(_LIMIT)
        )
        if not counts or order == "created":
            return statement
        # else the page must be there before
        page = statement.subquery("page")
        *kept, _, raw = page.c
        ordered = [raw, page.c.id] if one_user else [raw, page.c.user_id, page.c.id]
        return select(*kept, self._count(page).label("events"), raw).order_by(
            *(column.desc() for column in ordered)
        )

    def summary(self, conn: Connection, key: Key, *, counts: bool = False) -> SessionSummary | None:
        """One session without state and events; None if there is no such one."""
        statement = self._pages.get(("summary", counts))
        if statement is None:
            table = self.tables.sessions
            *columns, events = self._summary_columns(table)
            if counts:
                events = self._count(table).label("events")
            statement = select(*columns, events).where(self._is_session)
            self._pages["summary", counts] = statement
        rows = self.rows(conn, statement, key.parameters())
        return _summary(key.app_name, rows[0]) if rows else None

    def _summary_columns(self, table: Table) -> list[ColumnElement[Any]]:
        s = table.c
        return [
            *(s.user_id, s.id, s.title, self.as_text(s.labels).label("labels")),
            *(s.create_time, s.update_time, s.archive_time, s.expire_time),
            null().label("events"),
        ]

    def _count(self, session: Any) -> ColumnElement[int]:
        e = self.tables.events.c
        app = session.c.app_name if "app_name" in session.c else bindparam("k_app")
        of = and_(e.app_name == app, e.user_id == session.c.user_id, e.session_id == session.c.id)
        return select(func.count()).select_from(self.tables.events).where(of).scalar_subquery()

    def has_pair(self, name: str) -> ColumnElement[bool]:
        """Whether a session has the label of a parameter: the pair with a comma before it."""
        pairs = literal_column("','", String()).concat(
            func.substr(self.tables.sessions.c.labels, 2, type_=String())
        )
        # as bytes: texts may compare without regard to case
        found = func.instr(
            cast(pairs, LargeBinary()), cast(bindparam(name, type_=String()), LargeBinary())
        )
        return found > literal_column("0")

    # --- events --------------------------------------------------------------------------------

    def events_page(
        self, conn: Connection, key: Key, *, window: Window, limit: int
    ) -> list[PlacedEvent]:
        """So many events, from where the window begins, in its direction."""
        shape = (
            *("events", window.backward, window.beyond is None, window.after is None),
            *(window.after_id is None, window.author is None, window.invocation_id is None),
        )
        statement = self._pages.get(shape)
        if statement is None:
            statement = self._pages[shape] = self._events_statement(window)
        parameters = self._window_parameters(key, window) | {"k_limit": limit}
        rows = self.rows(conn, statement, parameters)
        return [_placed(row, window.after_id) for row in rows]

    def events_until(
        self, conn: Connection, key: Key, *, window: Window, mentions: Sequence[str], ahead: int
    ) -> list[PlacedEvent]:
        """Events from where the window begins to the last one, in its direction, whose text has one
        of some pieces in it; none if there is no such one.

        Args:
            conn: a connection.
            key: the session.
            window: where from, and in which direction.
            mentions: the pieces: ids of calls whose responses are wanted, backward the calls.
            ahead: how many events are looked at.
        """
        e, backward = self.tables.events.c, window.backward
        text, place = self.as_text(e.event_data), self._raw(e.timestamp)
        names = [f"k_mention_{number}" for number in range(len(mentions))]
        has_one = and_(
            # what most have not
            text.like(literal("%function%all%" if backward else "%function%esponse%", String())),
            or_(*(text.like(bindparam(name, type_=String())) for name in names)),
        )
        # without the texts, as some databases keep all of it for a while
        columns = (e.id, place.label("place"), case((has_one, place)).label("mention"))
        looked_at = self._ordered(window, *columns, backward=backward).limit(_LIMIT).cte()
        last = self._ordered(window, e.id, backward=not backward).limit(1)
        end = last.correlate(None).scalar_subquery()
        outermost = func.min if backward else func.max
        furthest = select(outermost(looked_at.c.mention)).correlate(None).scalar_subquery()
        at, id_ = looked_at.c.place, looked_at.c.id
        statement = (
            select(*self._event_columns(window), end.label("end"))
            .select_from(
                looked_at.join(self.tables.events, and_(self._is_event, e.id == looked_at.c.id))
            )
            .where(at >= furthest if backward else at <= furthest)
            .order_by(*((at.desc(), id_.desc()) if backward else (at, id_)))
        )
        for dialect in MYSQL_FAMILY:
            # else it may begin with all events of the session
            statement = statement.prefix_with("STRAIGHT_JOIN", dialect=dialect)
        parameters = self._window_parameters(key, window) | {"k_limit": ahead}
        parameters |= {name: f"%{piece}%" for name, piece in zip(names, mentions, strict=True)}
        rows = conn.execute(statement, parameters).all()
        more = bool(rows) and rows[-1].end != rows[-1].id
        return [_placed(row[:-1], None)._replace(more=more) for row in rows]

    def has_event(self, conn: Connection, key: Key, event_id: str) -> bool:
        """Whether a session has an event."""
        statement = self._pages.get("has")
        if statement is None:
            e = self.tables.events.c
            statement = select(e.id).where(self._is_event, e.id == bindparam("k_event"))
            self._pages["has"] = statement
        return bool(self.rows(conn, statement, {**key.parameters(), "k_event": event_id}))

    def _events_statement(self, window: Window) -> Select[Any]:
        columns = self._event_columns(window)
        return self._ordered(window, *columns, backward=window.backward).limit(_LIMIT)

    def _event_columns(self, window: Window) -> list[ColumnElement[Any]]:
        e = self.tables.events.c
        after: ColumnElement[Any] = null()
        if window.after_id is not None:
            after = self._time_of_after()
        return [
            *(e.id, e.invocation_id, e.timestamp, self.as_text(e.event_data).label("data")),
            *(e.event_exact, self._raw(e.timestamp).label("place"), after.label("after")),
        ]

    def _ordered(self, window: Window, *columns: ColumnElement[Any], backward: bool) -> Select[Any]:
        """A window's events, read by an index in their order."""
        e = self.tables.events.c
        place: list[ColumnElement[Any]] = [e.timestamp, e.id]
        order = [column.desc() for column in place] if backward else place
        statement = select(*columns).where(*self._within(window)).order_by(*order)
        if not self.tables.host_owned:
            # else a session is read from its beginning to where the page begins
            hint = f"FORCE INDEX FOR ORDER BY ({self._events_index})"
            for dialect in MYSQL_FAMILY:
                statement = statement.with_hint(self.tables.events, hint, dialect)
        return statement

    @property
    def _events_index(self) -> str:
        """The name of the index in whose order events are read."""
        [name] = [str(index.name) for index in self.tables.events.indexes]
        return name

    def _within(self, window: Window) -> list[ColumnElement[bool]]:
        e = self.tables.events.c
        place: list[ColumnElement[Any]] = [e.timestamp, e.id]
        where: list[ColumnElement[bool]] = [self._is_event]
        if window.beyond is not None:
            where.append(self._beyond("k_place", place, backward=window.backward))
        if window.after is not None:
            where.append(self._beyond("k_after", place, backward=False))
        if window.after_id is not None:
            at = [self._time_of_after(), bindparam("k_after_id", type_=String())]
            where.append(self._compared(place, at, backward=False))
        if window.invocation_id is not None:
            where.append(e.invocation_id == bindparam("k_invocation", type_=String()))
        if window.author is not None:
            where.append(self.is_author("k_author"))
        return where

    def _time_of_after(self) -> ColumnElement[Any]:
        """The time of the event that the caller named."""
        after = self.tables.events.alias("after_that").c
        return (
            select(self._raw(after.timestamp))
            .where(
                after.app_name == bindparam("k_app"),
                after.user_id == bindparam("k_user"),
                after.session_id == bindparam("k_session"),
                after.id == bindparam("k_after_id", type_=String()),
            )
            .scalar_subquery()
        )

    def _window_parameters(self, key: Key, window: Window) -> dict[str, Any]:
        parameters: dict[str, Any] = key.parameters()
        if window.beyond is not None:
            parameters |= self._place_parameters("k_place", window.beyond)
        if window.after is not None:
            parameters |= self._place_parameters("k_after", window.after)
        given = {
            "k_after_id": window.after_id,
            "k_author": window.author,
            "k_invocation": window.invocation_id,
        }
        return parameters | {name: value for name, value in given.items() if value is not None}

    def is_author(self, name: str) -> ColumnElement[bool]:
        """Whether an event is of the author in a parameter; not if its text is damaged."""
        data = self.tables.events.c.event_data
        author = func.json_extract(data, literal_column("'$.author'"))
        if self.quotes_json:
            author = func.json_unquote(author)
        sound = func.json_valid(data) == literal_column("1")
        # as bytes: texts may compare without regard to case
        found = case((sound, cast(author, LargeBinary())))
        wanted: ColumnElement[bool] = found == cast(bindparam(name, type_=String()), LargeBinary())
        return wanted

    # --- users and apps ------------------------------------------------------------------------

    def users(self, conn: Connection, app_name: str, user_id: str | None = None) -> list[str]:
        """All users of an app; ``user_id`` is None: they are not one user's to see."""
        statement = self._pages.get("users")
        if statement is None:
            # each table by itself: to tell their rows apart together takes several times as long
            statement = self._pages["users"] = union_all(
                *(
                    select(table.c.user_id).where(table.c.app_name == bindparam("k_app")).distinct()
                    for table in (self.tables.user_states, self.tables.sessions)
                )
            )
        return sorted({row[0] for row in self.rows(conn, statement, {"k_app": app_name})})

    def apps(
        self, conn: Connection, app_name: str | None = None, user_id: str | None = None
    ) -> list[str]:
        """All apps; both ids are None: these are not one user's to see."""
        statement = self._pages.get("apps")
        if statement is None:
            tables = (self.tables.app_states, self.tables.user_states, self.tables.sessions)
            each = (select(table.c.app_name).distinct() for table in tables)
            statement = self._pages["apps"] = union_all(*each)
        return sorted({row[0] for row in self.rows(conn, statement, {})})

    # --- places --------------------------------------------------------------------------------

    def _raw(self, time: ColumnElement[Any]) -> ColumnElement[Any]:
        """A time as rows are put in order by it."""
        return type_coerce(time, NullType()) if self.raw_times else time

    def _beyond(
        self, name: str, place: Sequence[ColumnElement[Any]], *, backward: bool
    ) -> ColumnElement[bool]:
        """Whether a row lies beyond the place in parameters, before it where that is backward."""
        time = NullType() if self.raw_times else Timestamp()
        at = [
            bindparam(f"{name}_{number}", type_=String() if number else time)
            for number in range(len(place))
        ]
        return self._compared(place, at, backward=backward)

    def _place_parameters(self, name: str, place: Place) -> dict[str, Any]:
        return {f"{name}_{number}": value for number, value in enumerate(place)}

    def place_text(self, time: Any) -> Any:
        """A place's time as JSON can hold it."""
        return time.isoformat(" ", "microseconds") if isinstance(time, datetime) else time

    def place_time(self, text: Any) -> Any:
        """What `place_text` was made of.

        Raises:
            ValueError: it was made of nothing that this database holds.
        """
        if self.raw_times and isinstance(text, int | float):
            return text
        if not isinstance(text, str):
            raise ValueError("no time")
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            raise ValueError("no time of a table")
        return text if self.raw_times else moment


def _summary(app_name: str, row: Sequence[Any]) -> SessionSummary:
    user_id, id_, title, labels, created, updated, archived, expires, events = row[:9]
    return SessionSummary(
        app_name=app_name,
        user_id=user_id,
        id=id_,
        title=title,
        labels=load_labels(labels),
        create_time=clock.to_epoch(created),
        last_update_time=clock.to_epoch(updated),
        archive_time=None if archived is None else clock.to_epoch(archived),
        expire_time=None if expires is None else clock.to_epoch(expires),
        event_count=events,
    )


def _placed(row: Sequence[Any], after_id: str | None) -> PlacedEvent:
    *stored, place, after = row
    event = StoredEvent._make(stored)
    return PlacedEvent((place, event.id), event, None if after_id is None else (after, after_id))
