"""What a session's own state was at an earlier event, told from what is recorded of it.

Pure functions. Only the session's scope is looked at: ``app:`` and ``user:`` keys belong to others
too, and are as they are now. The state right after an event is the recorded start, with the deltas
of the events up to it and the changes made between them. A change that is recorded at a revision
lies after the event that has this revision as its time, and before the next.

An event that rewinds brings back the state from before an earlier invocation, whole: keys that came
later are gone. Its delta says so as far as a delta can, with None. One that says anything else was
appended by software that does not know the start; there the delta is what was done.

Where the start is not recorded, keys that nothing has touched are as they are now. What a key was
before it was first touched is then not known. The same goes for keys that are now not what all of
the record makes of them: a process of an earlier release, or a hand, has changed them without one.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from . import codec
from . import state as states
from .errors import DatabaseError, StateUnknownError


class Step(NamedTuple):
    """An event, as far as it concerns the session's own state.

    Attributes:
        revision: the event's column ``timestamp``.
        invocation_id: the event's.
        delta: the keys that it set, without those of other scopes; None if it cannot be read.
        rewinds_to: the invocation that it goes back to before, None for almost every event.
    """

    revision: datetime
    invocation_id: str
    delta: dict[str, Any] | None
    rewinds_to: str | None = None


class Made(NamedTuple):
    """A change of the session's state that is no event's: a row of ``state_changes``."""

    revision: datetime
    number: int
    delta: dict[str, Any]
    deleted: Collection[str]


class Past(NamedTuple):
    """All that is stored of a session's own state.

    Attributes:
        initial: before the first of ``steps``, None if that is not known.
        steps: its events in order.
        changes: in any order; those of revisions before the first step come after ``initial``.
        current: as it is now; only needed where ``initial`` is None, by `rewound` and by
            `contradicted`.
    """

    initial: dict[str, Any] | None
    steps: Sequence[Step]
    changes: Sequence[Made]
    current: dict[str, Any]


class Rewound(NamedTuple):
    """What an append of events does, some of which rewind.

    Attributes:
        state: the session's own, after all of them.
        deltas: of each event that goes back the session's own part, as it is to be stored; None of
            the others.
        unknown: how many keys could not be brought back, since it is not known what they were.
    """

    state: dict[str, Any]
    deltas: list[dict[str, Any] | None]
    unknown: int


# what a key is that does not exist, where the others are not known
_GONE = object()


def step(revision: datetime, invocation_id: str, data: str | None, exact: str | None) -> Step:
    """The step of an event's row.

    Args:
        revision: the row's time.
        invocation_id: the row's.
        data: its JSON, or so much of it as has the deltas; None or empty if it has none.
        exact: its exact form, if it has one.
    """
    if not (exact or data):
        return Step(revision, invocation_id, {})
    try:
        event = codec.load_state(exact) if exact else codec.loads(data or "")
        actions = event.get("actions") or {}
        delta = actions.get("state_delta") or {}
        target = actions.get("rewind_before_invocation_id") or None
        own = states.split(delta).session
    except (DatabaseError, AttributeError, *codec.NO_EVENT):
        return Step(revision, invocation_id, None)
    return Step(revision, invocation_id, own, target if isinstance(target, str) else None)


def made(revision: datetime, number: int, delta: str | None, deleted: str | None) -> Made:
    """The change of a row of ``state_changes``."""
    return Made(revision, number, codec.load_state(delta), codec.load_state(deleted).keys())


def state_after(past: Past, count: int) -> dict[str, Any]:
    """The state right after the first ``count`` steps, before any change that followed.

    Raises:
        StateUnknownError: it is not recorded and cannot be told.
    """
    return _state(past, count, past.steps[count - 1].revision if count else datetime.min)


def state_before(past: Past, count: int) -> dict[str, Any]:
    """The state right before the step of index ``count``, with the changes that lie before it.

    Raises:
        StateUnknownError: it is not recorded and cannot be told.
    """
    return _state(past, count, _time_of(past, count))


def rewound(past: Past, new: Sequence[Step]) -> Rewound:
    """What appending events does to the state, where some of them rewind.

    A rewind to an invocation that is not there sets its delta like any other event. Where it is
    not known what a key was, it is set to None if it is there, as google-adk does.

    Args:
        past: as it is now.
        new: the events; their revisions are of no account.
    """
    state, unknown = past.current, 0
    before: list[dict[str, Any]] = []
    deltas: list[dict[str, Any] | None] = []
    steps = [*past.steps]
    for event in new:
        before.append(state)
        own = event.delta or {}
        at = _first(steps, event.rewinds_to)
        if at is None:
            state = {**state, **own}
            deltas.append(None)
        else:
            if at >= len(past.steps):
                state = before[at - len(past.steps)]
            else:
                state, lost = _brought_back(past, steps[at:], at, state, own)
                unknown += lost
            own = {key: state.get(key) for key in differing(before[-1], state)}
            deltas.append(own)
        steps.append(event._replace(delta=own))
    return Rewound(state, deltas, unknown)


def contradicted(past: Past) -> list[str]:
    """The keys that are not what is recorded of them: something has changed them without a record.

    A process of an earlier release does so. Nothing is contradicted where the start is not known,
    or an event cannot be read.
    """
    if past.initial is None:
        return []
    try:
        recorded = _play(past, len(past.steps), datetime.max)
    except StateUnknownError:
        return []
    return [
        key
        for key in differing(recorded, past.current)
        if not (key in recorded and key in past.current)
        or not _alike(recorded[key], past.current[key])
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two values of decoded JSON are the same; True is not 1, and NaN is NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other) if isinstance(one, float) else bool(one == other)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys that two states do not both have with the same value."""
    return [
        key
        for key in {**one, **other}
        if not (key in one and key in other and same(one[key], other[key]))
    ]


def _alike(recorded: Any, stored: Any) -> bool:
    """Whether an event's form of a value and a state's may be of one value.

    In an event bytes are base64, and a model has no fields that are None; in a state they are text,
    and it has.
    """
    if isinstance(recorded, dict) and isinstance(stored, dict):
        empty = stored.keys() - recorded.keys()
        return recorded.keys() <= stored.keys() and all(
            stored[key] is None if key in empty else _alike(recorded[key], stored[key])
            for key in stored
        )
    if isinstance(recorded, list) and isinstance(stored, list):
        return len(recorded) == len(stored) and all(map(_alike, recorded, stored))
    if isinstance(recorded, str) and isinstance(stored, str) and recorded != stored:
        encoded = base64.urlsafe_b64encode(stored.encode(errors="surrogatepass"))
        return recorded.encode(errors="surrogatepass") == encoded
    return same(recorded, stored)


def _time_of(past: Past, at: int) -> datetime:
    return past.steps[at].revision if at < len(past.steps) else datetime.max


def _first(steps: Sequence[Step], invocation_id: str | None) -> int | None:
    if invocation_id is None:
        return None
    return next((n for n, step in enumerate(steps) if step.invocation_id == invocation_id), None)


def _state(past: Past, count: int, end: datetime) -> dict[str, Any]:
    """The state after some steps and the changes of revisions before ``end``."""
    known = _play(past, count, end)
    if past.initial is not None:
        return known
    later = _touched(past.steps[count:], (c for c in past.changes if c.revision >= end))
    if not later <= known.keys():
        raise StateUnknownError
    return _over(past.current, known)


def _over(state: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**state, **known}.items() if value is not _GONE}


def _touched(steps: Iterable[Step], changes: Iterable[Made]) -> set[str]:
    touched: set[str] = set()
    for event in steps:
        if event.delta is None:
            raise StateUnknownError
        touched |= event.delta.keys()
    for change in changes:
        touched |= change.delta.keys() | change.deleted
    return touched


def _play(past: Past, count: int, end: datetime) -> dict[str, Any]:
    """What is known after some steps and the changes of revisions before ``end``.

    Where the start is not known, keys that nothing has touched are not in it, and those that do not
    exist are `_GONE`.
    """
    whole = past.initial is not None
    known = dict(past.initial or {})
    changes = sorted((c for c in past.changes if c.revision < end), key=lambda c: (c[0], c[1]))
    targets = {event.rewinds_to for event in past.steps[:count]} - {None}
    starts: dict[str, dict[str, Any]] = {}
    done = 0

    def change(until: datetime) -> int:
        at = done
        while at < len(changes) and changes[at].revision < until:
            known.update(changes[at].delta)
            for key in changes[at].deleted:
                if whole:
                    known.pop(key, None)
                else:
                    known[key] = _GONE
            at += 1
        return at

    for event in past.steps[:count]:
        done = change(event.revision)
        if event.delta is None:
            raise StateUnknownError
        there = None if event.rewinds_to is None else starts.get(event.rewinds_to)
        if event.invocation_id in targets:
            starts.setdefault(event.invocation_id, dict(known))
        if there is None or not _agrees(event.delta, there, whole):
            known.update(event.delta)
        elif whole:
            known = dict(there)
        else:
            known = {**known, **event.delta, **there}
    change(end)
    return known


def _agrees(delta: dict[str, Any], there: dict[str, Any], whole: bool) -> bool:
    """Whether a rewind's delta leads to a state, as far as that is known."""
    for key, value in delta.items():
        if whole or key in there:
            wanted = there.get(key)
            if not same(value, None if wanted is _GONE else wanted):
                return False
    return True


def _brought_back(
    past: Past, since: Sequence[Step], at: int, state: dict[str, Any], own: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """The state before a step of the past, and how many keys of it are not known.

    Args:
        past: as it is now, without the events that are being appended.
        since: the steps from that one on, with those being appended.
        at: that step's index.
        state: as it is now.
        own: what the event that goes back says; all that there is where an event is damaged.
    """
    end = _time_of(past, at)
    try:
        known = _play(past, at, end)
        doubtful = contradicted(past)
        if past.initial is not None and not doubtful:
            return known, 0
        told = _play(past._replace(initial=None), at, end) if doubtful else known
        touched = _touched(since, (c for c in past.changes if c.revision >= end))
    except StateUnknownError:
        return {**state, **own}, max(len(own), 1)
    lost = {key: None for key in touched - told.keys() if key in state}
    derived = _over({**state, **lost}, told)
    if not doubtful:
        return derived, len(lost)
    certain = {key: value for key, value in known.items() if key not in doubtful}
    return certain | {k: derived[k] for k in doubtful if k in derived}, len(doubtful)
