"""Events of a Parlant session, numbered without gaps by any number of writers.

The next number is one more than the highest that is stored, and a unique index refuses a second
event with it. Whoever makes an event holds the session's row, so a session that is being deleted
gets no event that outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Index,
    MetaData,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    inspect,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as insert_or_not
from sqlalchemy.schema import CreateIndex, DropIndex

#: what makes an event's place its own
UNIQUE = ("session_id", "offset")


class Placed(NamedTuple):
    """What became of an event.

    Attributes:
        known: whether its session is there.
        offset: the one that it has; None if another event took that meanwhile.
    """

    known: bool
    offset: int | None


class Offsets:
    """Any dialect: a lock on the session's row lets one writer after the other find its number.

    Args:
        sessions: the table of sessions, with the column ``id``.
        events: the table of events: ``seq``, ``document`` and a column for each scalar.
    """

    def __init__(self, sessions: Table, events: Table) -> None:
        self.sessions = sessions
        self.events = events

    # --- one event -------------------------------------------------------------------------------

    def place(self, conn: Connection, row: Mapping[str, Any]) -> Placed:
        """Stores an event under the next offset; one that is stored already keeps its own.

        Args:
            conn: in a transaction, or where one statement is one.
            row: values of all columns but ``seq``; the document is without its offset.

        Raises:
            IntegrityError: another writer, who holds no lock, took the offset meanwhile.
        """
        if conn.execute(self._hold, {"session_id": row["session_id"]}).first() is None:
            return Placed(False, None)
        # not before the lock is had: what a snapshot shows must not be older than it
        stored, latest = conn.execute(self._find, self._named(row)).one()
        if stored is not None:
            return Placed(True, stored)
        offset = 0 if latest is None else latest + 1
        document = f"{_open(row['document'])}{offset}}}"
        conn.execute(self.events.insert(), {**row, "offset": offset, "document": document})
        return Placed(True, offset)

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in ("id", "session_id", "creation_utc")}

    @cached_property
    def _hold(self) -> Select[Any]:
        """A lock on a session's row."""
        return self._session().with_for_update()

    @cached_property
    def _find(self) -> Select[Any]:
        return select(
            self._stored(), self._latest(func.max(self.events.c.offset)).scalar_subquery()
        )

    def _session(self) -> Select[Any]:
        id = self.sessions.c.id
        return select(id).where(id == bindparam("session_id", type_=id.type))

    def _stored(self) -> Any:
        """The offset of an event that an earlier try has stored.

        Ids are short and drawn by lot: one that somebody else has drawn is not taken for ours.
        """
        c = self.events.c
        same = [c[name] == bindparam(name, type_=c[name].type) for name in _IDENTITY]
        return select(c.offset).where(*same).scalar_subquery()

    def _latest(self, column: Any) -> Select[Any]:
        """Something of a session's highest offset."""
        session_id = self.events.c.session_id
        return select(column).where(session_id == bindparam("session_id", type_=session_id.type))

    # --- all of a session ------------------------------------------------------------------------

    def documents(
        self,
        conn: Connection,
        session_id: Any,
        equal: Mapping[str, Any],
        *,
        min_offset: int | None = None,
    ) -> list[str] | None:
        """The documents of events, in no order; None if there is no such session.

        Args:
            conn: any.
            session_id: the session that is to be there.
            equal: what an event has in its columns; a list for one of several.
            min_offset: the lowest offset.
        """
        s, e = self.sessions.c, self.events.c
        wanted = [
            e[name].in_(value) if isinstance(value, list) else e[name] == value
            for name, value in equal.items()
        ]
        if min_offset is not None:
            wanted.append(e.offset >= min_offset)
        joined = self.sessions.outerjoin(self.events, and_(*wanted))
        found = select(e.document).select_from(joined).where(s.id == session_id)
        texts = conn.scalars(found).all()
        # a session without such events is one row that has none
        return [text for text in texts if text is not None] if texts else None

    def delete(self, conn: Connection, session_id: Any) -> None:
        """Deletes a session, and then what writers stored who had its row before."""
        s, e = self.sessions.c, self.events.c
        conn.execute(delete(self.sessions).where(s.id == session_id))
        conn.execute(delete(self.events).where(e.session_id == session_id))

    # --- offsets that other software has left ----------------------------------------------------

    def are_unique(self, conn: Connection) -> bool:
        """Whether the database sees to it that a session has each offset once."""
        return any(unique for _, unique in self._indexes(conn))

    def make_unique(self, conn: Connection) -> None:
        """Puts a unique index in the place of one that is none.

        Args:
            conn: where no other process does the same.

        Raises:
            IntegrityError: an offset occurs twice.
        """
        found = self._indexes(conn)
        if any(unique for _, unique in found):
            return
        table = self.events.to_metadata(MetaData())
        for name, _ in found:
            conn.execute(DropIndex(Index(name, *(table.c[key] for key in UNIQUE))))
        name = found[0][0] if found else f"ix_{table.name}_offset"
        conn.execute(CreateIndex(Index(name, *(table.c[key] for key in UNIQUE), unique=True)))

    def _indexes(self, conn: Connection) -> Sequence[tuple[str, bool]]:
        """The indexes on sessions and offsets, each with whether it is unique."""
        # SQLite tells indexes from memory until a statement shows that somebody has made others
        conn.execute(select(self.events.c.seq).limit(1)).first()
        found = inspect(conn).get_indexes(self.events.name, schema=self.events.schema)
        return [
            (str(one["name"]), bool(one["unique"]))
            for one in found
            if tuple(one["column_names"]) == UNIQUE
        ]

    def doubled(self, conn: Connection) -> list[Any]:
        """The sessions in which an offset stands twice."""
        c = self.events.c
        twice = (
            select(c.session_id)
            .where(c.session_id.is_not(None), c.offset.is_not(None))
            .group_by(c.session_id, c.offset)
            .having(func.count() > 1)
            .distinct()
        )
        return list(conn.execute(twice).scalars())

    def renumber(
        self, conn: Connection, session_id: Any, change: Callable[[str, int], Mapping[str, Any]]
    ) -> None:
        """Gives each event of a session an offset of its own: the lowest that keeps their order.

        Args:
            conn: in a transaction.
            session_id: the session.
            change: the row of a document with another offset.
        """
        c = self.events.c
        conn.execute(self._hold, {"session_id": session_id})
        mine = c.session_id == session_id, c.offset.is_not(None)
        order = c.offset, c.creation_utc, c.id
        changed, free = [], None
        for seq, offset, text in conn.execute(
            select(c.seq, c.offset, c.document).where(*mine).order_by(*order)
        ).all():
            place = offset if free is None else max(offset, free)
            if place != offset:
                changed.append((seq, change(text, place)))
            free = place + 1
        # They only go up: from the last one on none meets another
        for seq, row in reversed(changed):
            conn.execute(update(self.events).where(c.seq == seq).values(**row))


class PostgreSQLOffsets(Offsets):
    """One statement that locks, counts and inserts; where it comes too late, again."""

    def place(self, conn: Connection, row: Mapping[str, Any]) -> Placed:
        values = {**row, "document": _open(row["document"])}
        offset, stored, known = conn.execute(self._place, values).one()
        return Placed(known, stored if offset is None else offset)

    @cached_property
    def _place(self) -> Select[Any]:
        # A lock that a DELETE waits for, and no other writer
        session = self._session().with_for_update(read=True, key_share=True).cte("session")
        highest = func.coalesce(func.max(self.events.c.offset), literal_column("-1"))
        following = self._latest((highest + literal_column("1")).label("offset")).cte("following")
        offset = following.c.offset
        values: dict[str, Any] = {
            c.name: bindparam(c.name, type_=c.type) for c in self.events.c if c.name != "seq"
        }
        values["offset"] = offset
        values["document"] = cast(values["document"], Text) + cast(offset, Text) + _CLOSED
        row = select(*values.values()).select_from(session.join(following, true()))
        created = (
            insert_or_not(self.events)
            .from_select(list(values), row)
            .on_conflict_do_nothing()
            .returning(self.events.c.offset)
            .cte("created")
        )
        return select(
            select(created.c.offset).scalar_subquery(),
            self._stored(),
            exists(select(session.c.id)),
        )


_CLOSED = literal_column("'}'", Text)
# What tells an event from another one with its id
_IDENTITY = ("id", "session_id", "creation_utc")
_OFFSETS: dict[str, type[Offsets]] = {"postgresql": PostgreSQLOffsets}


def offsets_for(conn: Connection, sessions: Table, events: Table) -> Offsets:
    """The statements for a connection's dialect."""
    return _OFFSETS.get(conn.dialect.name, Offsets)(sessions, events)


def _open(document: str) -> str:
    """The text of a JSON object, up to where its offset goes."""
    return f'{document.rstrip()[:-1]}, "offset": '
