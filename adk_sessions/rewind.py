"""Appending events that rewind: the session's own state becomes what it was, whole.

google-adk computes such an event's delta from the events that its session holds, and does not know
what was there before the first of them. What is stored is computed anew from what is recorded,
while the session's row is held. In the delta a key that goes is None.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

from pydantic import BaseModel
from sqlalchemy import Connection

from . import clock, codec, replay
from . import state as states
from .binding import EventLike, SessionLike, encode_events
from .dialects import Generic
from .dialects.rows import Key, Revisions

logger = logging.getLogger(__name__)


class Done(NamedTuple):
    """What was stored: the session's revisions, its own state, and the deltas of the events."""

    revisions: Revisions
    rewound: replay.Rewound


def action(event: EventLike, name: str) -> Any:
    """One of an event's actions, which its class need not know of; None for almost every event."""
    actions = event.actions
    if actions is None:
        return None
    # looked up where pydantic keeps them: a missing attribute would cost ten times as much
    found = actions.__dict__.get(name)
    return found or (getattr(actions, "__pydantic_extra__", None) or {}).get(name)


def target(event: EventLike) -> str | None:
    """The invocation that an event goes back to before."""
    return action(event, "rewind_before_invocation_id") or None


def append(
    statements: Generic,
    conn: Connection,
    key: Key,
    expected: datetime | None,
    events: Sequence[EventLike],
) -> Done | None:
    """Appends events, some of which rewind, if the session is at revision ``expected``.

    Args:
        statements: of the database.
        conn: in a transaction.
        key: the session.
        expected: its revision as the caller knows it.
        events: as they are given; they are not changed.

    Returns:
        None when nothing was appended, as `Generic.append`.

    Raises:
        IntegrityError: the session has an event with one of the ids.
    """
    held = statements.past(conn, key, hold=True)
    if held is None or held.update_time != expected:
        return None
    rewound = replay.rewound(held.past, [_step(event) for event in events])
    rows, deltas = encode_events(
        [
            event if own is None else _with_delta(event, _with_wider(event, own))
            for event, own in zip(events, rewound.deltas, strict=True)
        ]
    )
    deltas = deltas._replace(session=codec.dump_state(rewound.state))
    revisions = statements.append(conn, key, expected, rows, deltas, replace=True)
    if revisions is None:
        return None
    if rewound.unknown:
        logger.warning(
            "session %r of app %r and user %r was rewound to a state that is not fully known: not"
            " all that it began with, or that has changed it, is recorded; %d keys are what can be"
            " told from the rest, or None",
            *(key.session_id, key.app_name, key.user_id, rewound.unknown),
        )
    return Done(revisions, rewound)


def set_deltas(events: Sequence[EventLike], rewound: replay.Rewound) -> None:
    """Gives the caller's events the deltas that were stored."""
    for event, own in zip(events, rewound.deltas, strict=True):
        if own is not None:
            event.actions.state_delta = _with_wider(event, own)


def set_own(session: SessionLike, own: dict[str, Any]) -> None:
    """Replaces the session's own state in the caller's; other scopes stay."""
    kept = {
        key: value for key, value in session.state.items() if key.startswith(states.WIDER_PREFIXES)
    }
    session.state.clear()
    session.state.update(states.copied(own) | kept)


def _given(event: EventLike) -> dict[str, Any]:
    delta: dict[str, Any] | None = getattr(event.actions, "state_delta", None)
    return delta or {}


def _step(event: EventLike) -> replay.Step:
    own = codec.dump_state(states.split(_given(event)).session, field="event.actions.state_delta")
    return replay.Step(clock.EPOCH, event.invocation_id, codec.load_state(own), target(event))


def _with_wider(event: EventLike, own: dict[str, Any]) -> dict[str, Any]:
    """A delta for the event: what it says of other scopes, and ``own``."""
    wider = {
        key: value for key, value in _given(event).items() if key.startswith(states.WIDER_PREFIXES)
    }
    return wider | states.copied(own)


def _with_delta(event: EventLike, delta: dict[str, Any]) -> EventLike:
    actions = event.actions.model_copy(update={"state_delta": delta})
    return cast(EventLike, cast(BaseModel, event).model_copy(update={"actions": actions}))
