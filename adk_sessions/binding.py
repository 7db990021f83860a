"""How the store meets its caller's types: what it needs of them, and how rows become objects.

No object is converted into another: an append changes the very session that it was given.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from datetime import datetime
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from pydantic import BaseModel, ValidationError

from . import clock, codec, errors
from . import state as states
from .dialects.rows import Deltas, Key, NewEvent, Snapshot, States, StoredEvent


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


S = TypeVar("S", bound=SessionLike)
E = TypeVar("E", bound=EventLike)


class Binding(Generic[S, E]):
    """The types of one agent framework; a subclass names them.

    Attributes:
        session_type: a pydantic model with the fields of `SessionLike`, its private attribute
            ``_storage_update_marker`` among them; made with app_name, user_id, id and state.
        event_type: a pydantic model with the fields of `EventLike`.
        list_type: what `list_sessions` returns, made with sessions.
        already_exists, not_found, stale: the errors to raise, subclasses of this package's.
    """

    session_type: ClassVar[type[Any]]
    event_type: ClassVar[type[Any]]
    list_type: ClassVar[type[Any]]
    already_exists: ClassVar[type[errors.AlreadyExistsError]] = errors.AlreadyExistsError
    not_found: ClassVar[type[errors.SessionNotFoundError]] = errors.SessionNotFoundError
    stale: ClassVar[type[errors.StaleSessionError]] = errors.StaleSessionError

    def _new_id(self) -> str:
        return str(uuid.uuid4())

    def _now(self) -> float:
        return time.time()

    def _missing(self, session: S) -> errors.SessionNotFoundError:
        return self.not_found(
            f"Session {session.id!r} not found. Create it before appending to it."
        )

    def _catch_up(self, session: S, event: E, found: Snapshot, since: datetime) -> None:
        """Brings what a session has missed into it: events after its revision, and the state."""
        known = {known.id for known in session.events}
        missed = [row for row in found.events if row.timestamp > since and row.id not in known]
        if [row.id for row in missed] == [event.id] and found.update_time == missed[0].timestamp:
            self._commit(session, event)  # the reply to this very append was lost
        else:
            delta = _delta(event)
            if found.update_time != since:
                temp = states.only_temp(session.state)
                session.events.extend(
                    event if row.id == event.id else self._event(row) for row in missed
                )
                session.state.clear()
                session.state.update(states.merge(_scopes(found.states)) | temp)
            session.state.update(states.only_temp(delta))
            if delta:
                event.actions.state_delta = states.without_temp(delta)
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

    def _events(self, found: Snapshot, after: float | None) -> list[E]:
        events = [self._event(row) for row in found.events]
        if after is None:
            return events
        return [event for event in events if event.timestamp >= after]

    def _event(self, row: StoredEvent) -> E:
        event: E | None = None
        with contextlib.suppress(ValidationError, ValueError):
            event = cast(E, codec.load_event(self.event_type, row.data, row.exact))
        if event is None:  # the validation's own error would quote the row
            raise errors.DatabaseError(f"The stored event {row.id!r} cannot be read.")
        # the row's own columns win, as in google-adk; a payload may lack them
        if event.id != row.id:
            event.id = row.id
        if event.invocation_id != row.invocation_id:
            event.invocation_id = row.invocation_id
        if "timestamp" not in cast(BaseModel, event).model_fields_set:
            event.timestamp = clock.to_epoch(row.timestamp)
        return event

    def _session(
        self, key: Key, stored: States, revision: datetime, events: list[E] | None = None
    ) -> S:
        session = self._bare_session(key, _scopes(stored), revision)
        if events:
            session.events.extend(events)
        return session

    def _bare_session(self, key: Key, scopes: states.Scopes, revision: datetime) -> S:
        session = cast(
            S,
            self.session_type(
                app_name=key.app_name,
                user_id=key.user_id,
                id=key.session_id,
                state=states.merge(scopes),
            ),
        )
        self._remember(session, revision)
        return session


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


def encode_event(event: EventLike) -> tuple[NewEvent, Deltas]:
    """An event's row and deltas. ``temp:`` keys are left out, the event itself as it is."""
    delta = _delta(event)
    model = cast(BaseModel, event)
    if states.only_temp(delta):
        trimmed = event.actions.model_copy(update={"state_delta": states.without_temp(delta)})
        model = model.model_copy(update={"actions": trimmed})
    row = NewEvent(
        event.id,
        event.invocation_id,
        clock.to_datetime(event.timestamp),
        codec.dump_event(model),
    )
    return row, encode_deltas(delta, "event.actions.state_delta")
