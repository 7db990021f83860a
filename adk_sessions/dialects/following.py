"""What a watcher asks: what has been appended since, and is it still the same session."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import Connection, Integer, bindparam, literal_column, null, select, union_all

from .reads import Reads
from .rows import Key, StoredEvent
from .types import MYSQL_FAMILY, Timestamp


class News(NamedTuple):
    """A session, and what has been appended to it since."""

    create_time: datetime
    update_time: datetime
    events: list[StoredEvent]


class Following(Reads):
    """The statements."""

    @cached_property
    def _news(self) -> Any:
        s, e = self.tables.sessions.c, self.tables.events.c
        head = select(
            literal_column("0").label("kind"),
            s.id,
            null().label("invocation_id"),
            s.update_time.label("time"),
            null().label("data"),
            null().label("exact"),
            s.create_time.label("create_time"),
        ).where(self._is_session)
        events = (
            select(
                e.id,
                e.invocation_id,
                e.timestamp,
                self.as_text(e.event_data).label("data"),
                e.event_exact,
            )
            .where(self._is_event, e.timestamp > bindparam("k_since", type_=Timestamp()))
            .order_by(e.timestamp, e.id)
            .limit(bindparam("k_limit", type_=Integer()))
        )
        if not self.tables.host_owned:
            # else a session is read from its beginning to what is new
            [index] = self.tables.events.indexes
            hint = f"FORCE INDEX FOR ORDER BY ({index.name})"
            for dialect in MYSQL_FAMILY:
                events = events.with_hint(self.tables.events, hint, dialect)
        new = events.subquery()
        return union_all(head, select(literal_column("1"), *new.c, null()))

    @cached_property
    def _event_time(self) -> Any:
        e = self.tables.events.c
        return select(e.timestamp).where(self._is_event, e.id == bindparam("k_event"))

    def news(self, conn: Connection, key: Key, since: datetime, *, limit: int) -> News | None:
        """A session's first ``limit`` events after revision ``since``; None without a session.

        One statement, which where there is nothing new looks into two indexes: what was made anew
        under the same id is told from what has gone on.
        """
        parameters = {**key.parameters(), "k_since": since, "k_limit": limit}
        head: Any = None
        events: list[StoredEvent] = []
        for row in self.rows(conn, self._news, parameters):
            if row[0] == 0:
                head = row
            else:
                events.append(StoredEvent._make(row[1:6]))
        if head is None:
            return None
        # a UNION promises no order
        events.sort(key=lambda event: (event.timestamp, event.id))
        return News(head[6], head[3], events)

    def event_time(self, conn: Connection, key: Key, event_id: str) -> datetime | None:
        """The revision that an event brought its session to, None if there is no such event."""
        rows = self.rows(conn, self._event_time, {**key.parameters(), "k_event": event_id})
        return rows[0][0] if rows else None
