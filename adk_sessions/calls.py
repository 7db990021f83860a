"""Function calls and their responses: where a history may be cut so that none is separated.

Events are google-adk's, this package's, or JSON as it is stored. A call without a response ties
nothing together, nor does a response without a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, alias_generators


class Links(NamedTuple):
    """What ties an event to others of its session.

    Attributes:
        called: ids of the function calls that it makes.
        answered: ids of the function calls that it has responses to.
        lasting: those of ``called`` that may be answered more than once.
        invocation_id: its own.
        rewinds: the invocation before which it goes back: google-adk looks for that one's first
            event, and without it shows again what was taken back.
    """

    called: frozenset[str]
    answered: frozenset[str]
    lasting: frozenset[str] = frozenset()
    invocation_id: str = ""
    rewinds: str | None = None


def links(event: Any) -> Links:
    """All that ties an event to others."""
    rewinds = _field(_field(event, "actions"), "rewind_before_invocation_id")
    invocation_id = _field(event, "invocation_id")
    called, answered = (
        frozenset(id_ for id_, _ in parts(event, kind))
        for kind in ("function_call", "function_response")
    )
    lasting = _field(event, "long_running_tool_ids")
    return Links(
        called,
        answered,
        called.intersection(lasting) if isinstance(lasting, list | set) else frozenset(),
        invocation_id if isinstance(invocation_id, str) else "",
        rewinds if isinstance(rewinds, str) and rewinds else None,
    )


def parts(event: Any, kind: str) -> Iterator[tuple[str, str]]:
    """Id and name of each of an event's function calls or responses; those without id are left out.

    Args:
        event: an object or its JSON.
        kind: ``function_call`` or ``function_response``.
    """
    found = _field(_field(event, "content"), "parts")
    for part in found if isinstance(found, list) else []:
        one = _field(part, kind)
        id_ = _field(one, "id")
        if isinstance(id_, str) and id_:
            yield id_, str(_field(one, "name") or "")


def spans(history: Sequence[Links]) -> Iterator[tuple[int, int]]:
    """Places of two events, the first before the second, that belong together."""
    calls: dict[str, int] = {}
    invocations: dict[str, int] = {}
    for place, event in enumerate(history):
        for id_ in event.answered:
            if id_ in calls and id_ not in event.called:
                yield calls[id_], place
        for id_ in event.called:
            calls[id_] = place
        if event.rewinds in invocations:
            yield invocations[event.rewinds], place
        if event.invocation_id:
            invocations.setdefault(event.invocation_id, place)


def cut_at_most(history: Sequence[Links], most: int) -> int:
    """The largest number of first events, not more than ``most``, that can be cut off.

    Nothing that belongs together is then on both sides; 0 if there is no other way.
    """
    cut = min(most, len(history))
    for first, second in sorted(spans(history), key=lambda span: span[1], reverse=True):
        if first < cut <= second:
            cut = first
    return cut


def cut_of_page(
    history: Sequence[Links],
    limit: int,
    *,
    backward: bool = False,
    more: bool = True,
    settled: Set[str] = frozenset(),
) -> tuple[int, set[str]]:
    """Where a page may end, so that no function call is on another page than its response.

    Args:
        history: the page's events and further ones, the oldest first. What a rewind needs does not
            count here.
        limit: events that the page should have at most.
        backward: whether the page begins with the newest one.
        more: whether there are events beyond these, that may have what is missing here.
        settled: ids of calls of which nothing lies beyond.

    Returns:
        How many events the page has, from where it begins: at most ``limit`` if there is a way,
        else as few as can be. 0 if that hangs on what lies beyond: then the ids of the calls too
        that need to be looked for there.
    """
    last = len(history)
    pairs = list(spans([event._replace(rewinds=None) for event in history]))
    loose = list(_loose(history, backward=backward))
    if backward:
        pairs = [(last - 1 - second, last - 1 - first) for first, second in pairs]
        loose = [(last - 1 - place, id_) for place, id_ in loose]
    missing = [(place, id_) for place, id_ in loose if more and id_ not in settled]
    furthest = min((place for place, _ in missing), default=last)
    whole = set(range(1, furthest + 1))
    for first, second in pairs:
        whole.difference_update(range(first + 1, second + 1))
    cut = max((place for place in whole if place <= limit), default=0) or min(whole, default=0)
    return cut, set() if cut else {id_ for _, id_ in missing}


def _loose(history: Sequence[Links], *, backward: bool) -> Iterator[tuple[int, str]]:
    """Places and ids of calls without their last response, or of responses without their call."""
    partners: set[str] = set()
    for place, event in enumerate(history) if backward else reversed([*enumerate(history)]):
        if backward:
            yield from ((place, id_) for id_ in event.answered - event.called - partners)
            partners |= event.called
        else:
            yield from (
                (place, id_) for id_ in event.called - event.answered - (partners - event.lasting)
            )
            partners = (partners - event.called) | event.answered


def _field(value: Any, name: str) -> Any:
    """A field as it is spelled in Python, or as web clients send it."""
    camel = _camel(name)
    if isinstance(value, dict):
        return value[name] if name in value else value.get(camel)
    if not isinstance(value, BaseModel):
        return None
    found = getattr(value, name, None)
    return getattr(value, camel, None) if found is None else found


_camel = cache(alias_generators.to_camel)
