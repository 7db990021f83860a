"""How the store meets its caller's types: what it needs of them, and how rows become objects.

No object is converted into another: an append changes the very session that it was given.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

from pydantic import BaseModel

from . import clock, codec, errors
from . import state as states
from .dialects.rows import Deltas, Key, NewEvent, Snapshot, States, StoredEvent
from .lean import Rules


class EventLike(Protocol):
    """What the store needs of an event, a pydantic model."""

    id: str
    invocation_id: str
    timestamp: float

    @property
    def partial(self) -> bool | None: ...
    @property
    def actions(self) -> Any: ...


class SessionLike(Protocol):
    """What the store needs of a session, a pydantic model."""

    id: str
    app_name: str
    user_id: str
    state: dict[str, Any]
    last_update_time: float
    _storage_update_marker: str | None

    @property
    def events(self) -> list[Any]: ...


class ConfigLike(Protocol):
    """What the store needs of a reader's filter."""

    @property
    def num_recent_events(self) -> int | None: ...
    @property
    def after_timestamp(self) -> float | None: ...


logger = logging.getLogger(__name__)

OnBadEvent = Literal["raise", "placeholder"]

# Rows that one service names in its log.
_WARNINGS = 1000
# Events or sessions that are worth a pause of the garbage collector.
_MANY = 20

S = TypeVar("S", bound=SessionLike)
E = TypeVar("E", bound=EventLike)


class Binding(Generic[S, E]):
    """The types of one agent framework; a subclass names them.

    Attributes:
        session_type: a pydantic model with the fields of `SessionLike`, its private attribute
            ``_storage_update_marker`` among them; made with app_name, user_id, id, state and
            last_update_time.
        event_type: a pydantic model with the fields of `EventLike`.
        list_type: what `list_sessions` returns, made with sessions.
        already_exists, not_found, stale: the errors to raise, subclasses of this package's.
        lean_rules: what ``lean_validation`` leaves out when an event is read.
    """

    session_type: ClassVar[type[Any]]
    event_type: ClassVar[type[Any]]
    list_type: ClassVar[type[Any]]
    already_exists: ClassVar[type[errors.AlreadyExistsError]] = errors.AlreadyExistsError
    not_found: ClassVar[type[errors.SessionNotFoundError]] = errors.SessionNotFoundError
    stale: ClassVar[type[errors.StaleSessionError]] = errors.StaleSessionError
    lean_rules: ClassVar[Rules | None] = None

    _validate_json: Callable[..., Any] | None = None
    _on_bad_event: OnBadEvent = "raise"
    # rows that a warning has named
    _warned: set[tuple[str, ...]]

    def _new_id(self) -> str:
        return str(uuid.uuid4())

    def _now(self) -> float:
        return time.time()

    def _catch_up(self, session: S, events: Sequence[E], found: Snapshot, since: datetime) -> None:
        """Brings what a session has missed into it: events after its revision, and the state."""
        anew = found.create_time > since  # deleted, and made again
        known = set() if anew else {event.id for event in session.events}
        after = [row for row in found.events if row.timestamp > since]
        own = {event.id: event for event in events}
        if (
            not anew
            and [row.id for row in after] == list(own)
            and found.update_time == after[-1].timestamp
            and known.isdisjoint(own)
        ):
            for event in events:  # the reply to this very append was lost
                self._commit(session, event)
        else:
            moved = found.update_time != since
            # all of it is made before any of it shows: a row may be unreadable
            between = [
                own.get(row.id) or self._event(row, _key(session))
                for row in after
                if moved and row.id not in known
            ]
            brought = {event.id for event in between}
            state = states.merge(_scopes(found.states))
            if anew:
                session.events.clear()
            for event in between:
                if event.id in own:
                    self._commit(session, event)
                else:
                    session.events.append(event)
            for event in events:
                if event.id not in brought and (delta := _delta(event)):
                    session.state.update(states.only_temp(delta))
                    event.actions.state_delta = states.without_temp(delta)
            if moved:
                state |= states.only_temp(session.state)
                session.state.clear()
                session.state.update(state)
        self._remember(session, found.update_time)

    def _commit(self, session: S, event: E) -> None:
        """Does to the caller's objects what was done to storage."""
        delta = _delta(event)
        session.state.update(delta)
        if delta:
            event.actions.state_delta = states.without_temp(delta)
        session.events.append(event)

    def _remember(self, session: S, revision: datetime) -> None:
        session.last_update_time = clock.to_epoch(revision)
        session._storage_update_marker = clock.to_marker(revision)

    def _events(self, found: Snapshot, after: float | None, key: Key) -> list[E]:
        with uncollected(len(found.events)):
            events = [self._event(row, key) for row in found.events]
        if after is None:
            return events
        return [event for event in events if event.timestamp >= after]

    def _event(self, row: StoredEvent, key: Key) -> E:
        event: E
        why: str | None = None
        try:
            event = codec.load_event(self.event_type, row.data, row.exact, self._validate_json)
        except codec.NO_EVENT as error:
            why = codec.reason(error, self.event_type)
        if why is not None:  # here, so the error is in nobody's chain: it would quote the row
            return self._stand_in(row, key, why)
        # the row's own columns win, as in google-adk; a payload may lack them
        if event.id != row.id:
            event.id = row.id
        if event.invocation_id != row.invocation_id:
            event.invocation_id = row.invocation_id
        if "timestamp" not in cast(BaseModel, event).model_fields_set:
            event.timestamp = clock.to_epoch(row.timestamp)
        return event

    def _stand_in(self, row: StoredEvent, key: Key, why: str) -> E:
        """What `on_bad_event` says of a row that cannot be read."""
        if self._on_bad_event == "raise":
            raise errors.UnreadableEventError(
                f"The stored event {row.id!r} of session {key.session_id!r} of app"
                f" {key.app_name!r} and user {key.user_id!r} cannot be read: {why}. A service with"
                " on_bad_event='placeholder' reads the session without it; adk-sessions doctor"
                " lists all such events.",
                **key._asdict(),
                event_id=row.id,
            )
        if (*key, row.id) not in self._warned and len(self._warned) < _WARNINGS:
            self._warned.add((*key, row.id))
            logger.warning(
                "the stored event %r of session %r of app %r and user %r cannot be read: %s",
                *(row.id, key.session_id, key.app_name, key.user_id, why),
            )
        event: E = codec.stand_in(
            self.event_type,
            codec.author_of(row.exact or row.data) or "user",
            why,
            id=row.id,
            invocation_id=row.invocation_id,
            timestamp=clock.to_epoch(row.timestamp),
        )
        return event

    def _session(
        self, key: Key, stored: States, revision: datetime, events: list[E] | None = None
    ) -> S:
        session = self._bare_session(key, states.merge(_scopes(stored)), revision)
        if events:
            session.events.extend(events)
        return session

    def _bare_session(self, key: Key, state: dict[str, Any], revision: datetime) -> S:
        session = cast(
            S,
            self.session_type(
                app_name=key.app_name,
                user_id=key.user_id,
                id=key.session_id,
                state=state,
                last_update_time=clock.to_epoch(revision),
            ),
        )
        session._storage_update_marker = clock.to_marker(revision)
        return session


@contextlib.contextmanager
def uncollected(objects: int) -> Iterator[None]:
    """Keeps the garbage collector from looking, again and again, at a long result half made.

    All of it is alive, and the looking takes as long as the making. Nothing is awaited meanwhile.
    """
    pause = objects > _MANY and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def _key(session: SessionLike) -> Key:
    return Key(session.app_name, session.user_id, session.id)


def _scopes(stored: States) -> states.Scopes:
    return states.Scopes(*map(codec.load_state, stored))


def _delta(event: EventLike) -> dict[str, Any]:
    delta: dict[str, Any] | None = event.actions.state_delta if event.actions else None
    return delta or {}


def encode_deltas(state: dict[str, Any], field: str) -> Deltas:
    """A state's scopes as they are stored; ``field`` names it in an error."""
    return Deltas(
        *(codec.dump_state(part, field=field) if part else None for part in states.split(state))
    )


def encode_events(events: Sequence[EventLike]) -> tuple[list[NewEvent], Deltas]:
    """Rows of events, and what all of them together set in the three scopes.

    ``temp:`` keys are left out, the events themselves as they are.
    """
    rows: list[NewEvent] = []
    together: dict[str, Any] = {}
    for event in events:
        delta = _delta(event)
        together |= delta
        model = cast(BaseModel, event)
        if states.only_temp(delta):
            trimmed = event.actions.model_copy(update={"state_delta": states.without_temp(delta)})
            model = model.model_copy(update={"actions": trimmed})
        time = clock.to_datetime(event.timestamp)
        if rows:
            time = max(time, clock.just_after(rows[-1].timestamp))
        rows.append(NewEvent(event.id, event.invocation_id, time, codec.dump_event(model)))
    return rows, encode_deltas(together, "event.actions.state_delta")
