"""Deleting what is old: which sessions, in batches, each looked at again once its row is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from operator import add
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Table,
    and_,
    delete,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)

from .reads import Reads
from .rows import Key

# Ids in one list: databases limit the parameters of a statement.
_IDS = 500


@dataclass(frozen=True)
class Criteria:
    """Which sessions a `prune` is about; all that is given must hold.

    The database narrows by them and Python decides: what other software has left in a column of
    times need not compare as a time.

    Attributes:
        now: expired is what has an ``expire_time`` up to here.
        idle_since: not updated after this.
        created_until: not created after this.
        archived_only: archived.
        keep_last: such sessions are cut to that many events; None to delete them.
    """

    now: datetime
    idle_since: datetime | None = None
    created_until: datetime | None = None
    archived_only: bool = False
    keep_last: int | None = None

    @property
    def _limited(self) -> bool:
        given = (self.idle_since, self.created_until, self.keep_last)
        return any(one is not None for one in given)

    def deletes(self, row: Any) -> bool:
        """Whether a session is to be deleted."""
        if row.expire_time is not None and row.expire_time <= self.now:
            return True
        return self.keep_last is None and self._match(row)

    def cuts(self, row: Any) -> bool:
        """Whether a session is to be cut to its newest events."""
        return self.keep_last is not None and not self.deletes(row) and self._match(row)

    def _match(self, row: Any) -> bool:
        if self.archived_only and row.archive_time is None:
            return False
        return self._limited and all(
            limit is None or time <= limit
            for limit, time in (
                (self.idle_since, row.update_time),
                (self.created_until, row.create_time),
            )
        )

    def where(self, sessions: FromClause) -> ColumnElement[bool]:
        """What a session must be like to be deleted or cut, as far as the database can tell."""
        s = sessions.c
        expired = s.expire_time <= self.now
        if not self._limited:
            return expired
        matches = [
            s.update_time <= self.idle_since if self.idle_since is not None else None,
            s.create_time <= self.created_until if self.created_until is not None else None,
            s.archive_time.is_not(None) if self.archived_only else None,
        ]
        given = [match for match in matches if match is not None]
        return or_(expired, and_(*given)) if given else s.id.is_not(None)


class Removed(NamedTuple):
    """How many rows went, or would go."""

    sessions: int = 0
    events: int = 0
    state_changes: int = 0
    user_states: int = 0

    def plus(self, other: Removed) -> Removed:
        """The sums of both."""
        return Removed(*map(add, self, other))


#: (user_id, session_id)
Place = tuple[str, str]


class Window(NamedTuple):
    """What was found among some sessions that follow each other.

    Attributes:
        rows: with ``user_id``, ``id``, the four times, and whether there are ``more`` events than
            are to be kept.
        last: the last of those that were looked at, None if there are no others.
    """

    rows: list[Any]
    last: Place | None


class Retention(Reads):
    """The statements."""

    def prunable(
        self,
        conn: Connection,
        app_name: str,
        user_id: str | None,
        criteria: Criteria | None,
        after: tuple[str, ...],
        look: int,
        *,
        more: bool = True,
    ) -> Window:
        """Sessions that may have to go, of the next ones by the primary key; nothing is locked.

        Args:
            conn: the connection.
            app_name: of this app.
            user_id: of this user, None for all.
            criteria: None for all sessions.
            after: begins with all that there is if empty, behind a user, or behind one of a user's
                sessions, and then it goes no further than this user: two conditions in one are
                nothing that every database finds in an index.
            look: how many to look at.
            more: whether to look up if there are ``more`` events.
        """
        s = self.tables.sessions.c
        where = [s.app_name == app_name]
        if user_id is not None or len(after) > 1:
            where.append(s.user_id == (after[0] if after else user_id))
        elif after:
            where.append(s.user_id > after[0])
        if len(after) > 1:
            where.append(s.id > after[1])
        times = (s.create_time, s.update_time, s.archive_time, s.expire_time)
        by_key = (s.user_id, s.id)
        looked = select(*by_key, *times).where(*where).order_by(*by_key).limit(look).subquery()
        rows = select(
            literal_column("0").label("kind"),
            *looked.c,
            self._more(app_name, looked, criteria if more else None),
        )
        if criteria is not None:
            rows = rows.where(criteria.where(looked))
        place = select(*by_key).where(*where).order_by(*by_key).offset(look - 1).limit(1).subquery()
        nothing = [null() for _ in (*times, "more")]
        # in one statement, so that none slips through between the two
        last = select(literal_column("1"), *place.c, *nothing)
        found = conn.execute(union_all(rows, last)).all()
        ends = [(row.user_id, row.id) for row in found if row.kind]
        return Window([row for row in found if not row.kind], ends[0] if ends else None)

    def remove_sessions(
        self,
        conn: Connection,
        app_name: str,
        user_id: str | None,
        places: Sequence[Place],
        criteria: Criteria | None,
    ) -> Removed:
        """Deletes sessions with all that is theirs, but those that the criteria no longer mean.

        Args:
            conn: in a transaction.
            app_name: their app.
            user_id: their user, None if they are of several.
            places: which, in the order of their keys: that is the order of locks.
            criteria: asked again once the rows are held; None deletes them all.
        """
        s = self.tables.sessions.c
        times = (s.create_time, s.update_time, s.archive_time, s.expire_time)
        held = conn.execute(
            select(s.user_id, s.id, *times)
            .where(*_of(self.tables.sessions, app_name, *([] if user_id is None else [user_id])))
            .where(_are(places, s.user_id, s.id))
            .order_by(s.user_id, s.id)
            .with_for_update()
        ).all()
        gone = [(row.user_id, row.id) for row in held if criteria is None or criteria.deletes(row)]
        if not gone:
            return Removed()
        # events in so many words: the host's own tables may have no foreign key
        events, changes, sessions = (
            conn.execute(delete(table).where(where)).rowcount
            for table, where in self._theirs(app_name, gone)
        )
        return Removed(sessions, events, changes)

    def count_sessions(
        self, conn: Connection, app_name: str, user_id: str | None, places: Sequence[Place]
    ) -> Removed:
        """What `remove_sessions` would delete."""
        if not places:
            return Removed()
        events, changes, sessions = (
            conn.execute(select(func.count()).select_from(table).where(where)).scalar_one()
            for table, where in self._theirs(app_name, places)
        )
        return Removed(sessions, events, changes)

    def beginning(self, conn: Connection, key: Key, *, lock: bool) -> Any:
        """A session's times and initial state; with ``lock`` its row is held."""
        s = self.tables.sessions.c
        initial = self.as_text(s.initial_state).label("initial_state")
        rows = select(s.create_time, s.update_time, s.archive_time, s.expire_time, initial)
        rows = rows.where(self._is_session)
        return conn.execute(rows.with_for_update() if lock else rows, key.parameters()).first()

    def recorded_changes(self, conn: Connection, key: Key) -> Sequence[Any]:
        """What has changed a session's state without an event, in no order."""
        c = self.tables.state_changes.c
        texts = (self.as_text(column).label(column.name) for column in (c.delta, c.deleted))
        rows = select(c.revision, c.number, *texts).where(*_of(self.tables.state_changes, *key))
        return conn.execute(rows).all()

    def cut_beginning(
        self,
        conn: Connection,
        key: Key,
        event_ids: Iterable[str],
        until: datetime,
        initial_state: str | None,
    ) -> Removed:
        """Deletes a session's first events and state changes, and writes what it begins with.

        Args:
            conn: in a transaction that holds the session's row.
            key: the session.
            event_ids: which events.
            until: the column of the first event that is kept: changes before it go.
            initial_state: the state that it then begins with, None if that is not known.
        """
        e, c = self.tables.events, self.tables.state_changes
        parameters, events, ids = key.parameters(), 0, iter(event_ids)
        while some := list(islice(ids, _IDS)):
            deleted = delete(e).where(self._is_event, e.c.id.in_(some))
            events += conn.execute(deleted, parameters).rowcount
        earlier = delete(c).where(*_of(c, *key), c.c.revision < until)
        changes = conn.execute(earlier).rowcount
        begins = {"initial_state": self.as_json("v_state")}
        conn.execute(
            update(self.tables.sessions).where(self._is_session).values(begins),
            {**parameters, "v_state": initial_state},
        )
        return Removed(0, events, changes)

    def count_of_user(self, conn: Connection, app_name: str, user_id: str) -> Removed:
        """How many rows are a user's, orphans among them."""
        counts = [
            select(func.count()).select_from(table).where(*_of(table, app_name, user_id))
            for table in self._users()
        ]
        row = conn.execute(select(*(count.scalar_subquery() for count in counts))).one()
        return Removed(*row)

    def remove_rest_of_user(self, conn: Connection, app_name: str, user_id: str) -> Removed:
        """Deletes what a user has beside sessions: the shared state, events without a session."""
        sessions, events, changes, users = self._users()
        counts = {}
        for table in (events, changes):
            same = and_(
                sessions.c.app_name == table.c.app_name,
                sessions.c.user_id == table.c.user_id,
                sessions.c.id == table.c.session_id,
            )
            orphans = delete(table).where(
                *_of(table, app_name, user_id), ~exists().where(same).correlate(table)
            )
            counts[table] = conn.execute(orphans).rowcount
        states = conn.execute(delete(users).where(*_of(users, app_name, user_id))).rowcount
        return Removed(0, counts[events], counts[changes], states)

    # --- pieces --------------------------------------------------------------------------------

    def _users(self) -> tuple[Table, Table, Table, Table]:
        """The tables with rows of users, in the order of `Removed`."""
        t = self.tables
        return t.sessions, t.events, t.state_changes, t.user_states

    def _more(
        self, app_name: str, sessions: FromClause, criteria: Criteria | None
    ) -> ColumnElement[Any]:
        """Whether a session has more events than are to be kept."""
        more: ColumnElement[Any] = literal_column("NULL")
        if criteria is not None and criteria.keep_last is not None:
            s, e = sessions.c, self.tables.events.c
            more = (
                select(literal_column("1"))
                .where(e.app_name == app_name, e.user_id == s.user_id, e.session_id == s.id)
                .order_by(e.timestamp.desc(), e.id.desc())
                .offset(criteria.keep_last)
                .limit(1)
                .correlate(sessions)
                .scalar_subquery()
            )
        return more.label("more")

    def _theirs(
        self, app_name: str, places: Sequence[Place]
    ) -> Iterator[tuple[Table, ColumnElement[bool]]]:
        """The rows of sessions, those that refer to others first."""
        t = self.tables
        for table in (t.events, t.state_changes, t.sessions):
            session = table.c.id if table is t.sessions else table.c.session_id
            theirs = _are(places, table.c.user_id, session)
            yield table, and_(table.c.app_name == app_name, theirs)


def _of(table: Table, *ids: str) -> list[ColumnElement[bool]]:
    """The rows of a user, or of a session."""
    columns = ("app_name", "user_id", "session_id")
    return [table.c[name] == value for name, value in zip(columns, ids, strict=False)]


def _are(
    places: Sequence[Place], user: ColumnElement[Any], session: ColumnElement[Any]
) -> ColumnElement[bool]:
    # not a list of pairs: for that some databases would read all of the table
    return or_(*(and_(user == user_id, session == id) for user_id, id in places))
