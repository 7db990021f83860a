"""What goes into statements and what comes out of them: rows, encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any, NamedTuple

from ..codec import EventText


class Key(NamedTuple):
    """Which session."""

    app_name: str
    user_id: str
    session_id: str

    def parameters(self) -> dict[str, Any]:
        """As parameters of a statement. They must not be named like a column: SQLAlchemy would
        take them for values to set."""
        return {"k_app": self.app_name, "k_user": self.user_id, "k_session": self.session_id}


class NewEvent(NamedTuple):
    """An event's row but for its column ``timestamp``, which the session's clock decides.

    ``timestamp`` is the event's own time as naive UTC. In a batch it is later than that of the
    event before, so the column is the greater of it and the database's own next tick.
    """

    id: str
    invocation_id: str
    timestamp: datetime
    text: EventText


class Revisions(NamedTuple):
    """A session's revision before an append and after it."""

    before: datetime
    after: datetime


class Deltas(NamedTuple):
    """Encoded state of each scope, None where there is nothing to write."""

    app: str | None
    user: str | None
    session: str | None


class States(NamedTuple):
    """Encoded state of each scope as stored, None for a missing row."""

    app: str | None
    user: str | None
    session: str | None


class StoredEvent(NamedTuple):
    """One row of events; ``timestamp`` is the column, the session's revision after this event."""

    id: str
    invocation_id: str
    timestamp: datetime
    data: str | None
    exact: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session and some of its events at one moment, events in the order of their append."""

    create_time: datetime
    update_time: datetime
    states: States
    events: list[StoredEvent]
    archived: bool = False


class Listed(NamedTuple):
    """One session of a listing."""

    user_id: str
    id: str
    update_time: datetime
    state: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """Sessions of an app, or of one of its users, with the wider scopes' states."""

    app_state: str | None
    user_states: dict[str, str]
    sessions: list[Listed]


def event_parameters(key: Key, event: NewEvent) -> dict[str, Any]:
    """The parameters of an event's INSERT but for its time."""
    return {
        **key.parameters(),
        "k_event": event.id,
        "v_invocation": event.invocation_id,
        "v_data": event.text.data,
        "v_exact": event.text.exact,
    }


def snapshot(rows: Iterable[Any]) -> Snapshot | None:
    """What the statements of `Generic.read` return: one head row, told by its kind, and events."""
    head: Any = None
    events: list[StoredEvent] = []
    for row in rows:
        if row[0] == 0:
            head = row
        else:
            events.append(StoredEvent._make(row[1:6]))
    if head is None:
        return None
    _, _, archived, update_time, state, _, create_time, app_state, user_state = head
    events.sort(key=itemgetter(2, 0))
    states = States(app_state, user_state, state)
    return Snapshot(create_time, update_time, states, events, archived is not None)
