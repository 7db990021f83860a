"""Function calls and responses of any kind of event, and where a history may be cut."""

from __future__ import annotations

import random
from typing import Any

import pytest

from adk_sessions import Event
from adk_sessions.calls import (
    Links,
    cut_at_most,
    cut_of_page,
    links,
    spans,
)


def content(kind: str, *ids: Any) -> dict[str, Any]:
    return {"parts": [{"text": "so"}, *({kind: {"id": id_, "name": "f"}} for id_ in ids)]}


def test_calls_of_our_own_event_are_found_in_either_spelling() -> None:
    assert links(Event(content=content("function_call", "a", "b"))) == call("a", "b")
    assert links(Event(content=content("functionCall", "a"))) == call("a")
    assert links(Event(content=content("function_response", "a"))) == answer("a")
    assert links(Event(content=content("functionResponse", "a"))) == answer("a")


@pytest.mark.parametrize(
    "odd", [None, "text", 1, [], {}, {"parts": None}, {"parts": "x"}, {"parts": [1, None, "x", []]}]
)
def test_content_of_another_form_has_no_calls(odd: Any) -> None:
    assert links(Event(content=odd)) == Links(frozenset(), frozenset())


def test_calls_without_an_id_are_left_out() -> None:
    assert links(Event(content=content("function_call", None, "", 1, "a"))) == call("a")


def test_an_event_of_google_adk_and_its_stored_json_say_the_same() -> None:
    pytest.importorskip("google.adk")
    from google.adk.events import Event as AdkEvent
    from google.adk.events import EventActions
    from google.genai import types

    parts = [
        types.Part(function_call=types.FunctionCall(id="a", name="f")),
        types.Part(function_call=types.FunctionCall(name="without id")),
        types.Part(function_response=types.FunctionResponse(id="b", name="g", response={})),
    ]
    event = AdkEvent(
        author="agent",
        invocation_id="2",
        content=types.Content(role="model", parts=parts),
        long_running_tool_ids={"a", "z"},
        actions=EventActions(rewind_before_invocation_id="1"),
    )
    expected = Links(frozenset("a"), frozenset("b"), frozenset("a"), "2", "1")
    assert links(event) == expected
    for by_alias in (False, True):
        assert links(event.model_dump(mode="json", by_alias=by_alias)) == expected


def call(*ids: str) -> Links:
    return Links(frozenset(ids), frozenset())


def lasting(*ids: str) -> Links:
    return Links(frozenset(ids), frozenset(), frozenset(ids))


def answer(*ids: str) -> Links:
    return Links(frozenset(), frozenset(ids))


SAID = Links(frozenset(), frozenset())


def test_what_belongs_together() -> None:
    assert list(spans([call("a"), SAID, answer("a")])) == [(0, 2)]
    assert list(spans([answer("a"), call("a"), SAID])) == []
    # answered twice; and an id that is used again
    assert list(spans([call("a"), answer("a"), answer("a")])) == [(0, 1), (0, 2)]
    assert list(spans([call("a"), answer("a"), call("a"), answer("a")])) == [(0, 1), (2, 3)]
    # a rewind and the first event of the invocation that it names
    one, two = SAID._replace(invocation_id="1"), SAID._replace(invocation_id="2")
    back = SAID._replace(invocation_id="3", rewinds="2")
    assert list(spans([one, two, two, back])) == [(1, 3)]
    assert list(spans([one, back])) == []


def test_a_cut_goes_around_what_belongs_together() -> None:
    history = [SAID, call("a"), answer("a"), SAID, call("b", "c"), answer("b"), answer("c")]
    assert [cut_at_most(history, n) for n in range(9)] == [0, 1, 1, 3, 4, 4, 4, 7, 7]
    # pairs that overlap
    history = [call("a"), call("b"), answer("a"), call("c"), answer("b"), answer("c"), SAID]
    assert cut_at_most(history, 5) == 0
    # a call without response is in nobody's way
    assert cut_at_most([call("a"), SAID], 1) == 1


def test_cuts_are_the_best_there_are() -> None:
    dice = random.Random(6)
    for _ in range(300):
        ids = dice.choices("abcde", k=12)
        history = [dice.choice((call, answer, lambda _: SAID))(id_) for id_ in ids]
        pairs = list(spans(history))
        fit = [n for n in range(13) if not any(one < n <= other for one, other in pairs)]
        for n in range(13):
            assert cut_at_most(history, n) == max(cut for cut in fit if cut <= n)


def test_a_page_ends_before_a_pair_or_after_it() -> None:
    history = [SAID, call("a"), answer("a"), SAID]
    assert [cut_of_page(history, n)[0] for n in (1, 2, 3)] == [1, 1, 3]
    # from the newest one back
    assert [cut_of_page(history, n, backward=True)[0] for n in (1, 2, 3)] == [1, 1, 3]
    # longer only where there is no other way
    assert cut_of_page(history[1:], 1) == (2, set())
    assert cut_of_page(history[:3], 1, backward=True) == (2, set())


def test_a_page_that_hangs_on_what_lies_beyond_names_the_calls() -> None:
    assert cut_of_page([call("a"), SAID], 1) == (0, {"a"})
    assert cut_of_page([call("a"), SAID], 1, settled={"a"}) == (1, set())
    assert cut_of_page([call("a"), SAID], 2, more=False) == (2, set())
    assert cut_of_page([SAID, call("a"), SAID], 2) == (1, set())
    # a call that lasts may have another response
    assert cut_of_page([lasting("a"), answer("a"), SAID], 2) == (0, {"a"})
    assert cut_of_page([lasting("a"), answer("a"), SAID], 2, settled={"a"}) == (2, set())
    # backward it is a response whose call is missing
    assert cut_of_page([SAID, answer("a")], 1, backward=True) == (0, {"a"})
    assert cut_of_page([SAID, answer("a"), SAID], 2, backward=True) == (1, set())
    assert cut_of_page([call("a"), answer("a"), answer("a")], 2, backward=True) == (3, set())
    # the id was used before
    assert cut_of_page([call("a"), answer("a"), call("a"), SAID], 3) == (2, set())
