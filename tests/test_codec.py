"""The JSON codec: any value goes in, the same value and type comes out, on every database."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from everywhere import SOAK
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from adk_sessions import DatabaseError, Event, EventActions, InvalidInputError
from adk_sessions.codec import (
    MARK,
    EventText,
    dump_event,
    dump_state,
    dumps,
    load_event,
    load_state,
    merge_state,
    same_event,
)

ODD_TEXTS = [
    *(
        "\0",
        "a\0b",
        "\ud800",
        "\udfffx",
        "\ud83d\ude00",
        "\\u0000",
        "\\ud800",
        "%00",
        "null",
        "NaN",
    ),
    *(MARK, MARK + "text:%00", MARK + "float:nan", MARK + "int:0x1", MARK + "unknown:x", "1e5"),
    *('"', "\\", "\x7f", "\u2028", "😀", "é", "e\u0301", "\uffff", "a:1e5", "[-0.0]"),
]
ODD_NUMBERS = [
    *(-0.0, 0.0, 0, 1, 1.0, math.nan, math.inf, -math.inf, 1e15, 1e16, -1e16, 1e22, 1e300),
    *(1e-7, -0.05, 5e-324, 0.1 + 0.2, 2**53 + 1, -(2**64), 1.7976931348623157e308),
]
# Python refuses to print those with more than 4300 digits: no list of them for hypothesis to show.
DIGITS = [4213, 4214, 4298, 4299, 4300, 5999]
HUGE = [sign * 10**digits for digits in DIGITS for sign in (1, -1)]
TEXTS = st.text(st.characters(exclude_categories=()), max_size=6) | st.sampled_from(ODD_TEXTS)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from(ODD_NUMBERS)
    | (st.integers(0, 5999) | st.sampled_from(DIGITS)).map(lambda digits: 7 - 10**digits)
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
STATES = st.dictionaries(TEXTS, VALUES, max_size=4)
# Keys of a state delta are checked before they get here.
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
DELTAS = st.dictionaries(KEYS | st.just(MARK + "float:1"), VALUES, max_size=4)
# What neither JSONB nor google-adk's fields change: an event made of it needs no second column.
EASY_TEXTS = KEYS
EASY_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(0.001, 1e15) | EASY_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(EASY_TEXTS, inner, max_size=3),
    max_leaves=8,
)
# A top-level None is left out, as google-adk leaves it out.
FIELDS = st.dictionaries(
    st.from_regex("x_[a-z0-9_]{1,4}", fullmatch=True), VALUES.filter(lambda v: v is not None)
)
EVENTS = st.builds(
    lambda content, delta, fields: Event(
        id="1", timestamp=1.5, content=content, actions=EventActions(state_delta=delta), **fields
    ),
    VALUES,
    DELTAS,
    FIELDS,
)

quick = settings(
    max_examples=100 if SOAK else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)


def identical(one: Any, other: Any) -> bool:
    """Equal in value and in type, all the way down; NaN is NaN, and -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(v, other[k]) for k, v in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, float):
        if math.isnan(one):
            return math.isnan(other)
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def event(**fields: Any) -> Event:
    return Event(**{"id": "1", "timestamp": 1.5, "invocation_id": "i", "author": "user"} | fields)


def nested(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return {"a": value}


def test_identical_can_tell() -> None:
    for one, other in ((1, True), (1, 1.0), (0.0, -0.0), ([1], [True]), ({"a": 1}, {"a": 1.0})):
        assert not identical(one, other)
    assert identical({"a": [math.nan, -0.0]}, {"a": [math.nan, -0.0]})


class Rich(BaseModel):
    one: tuple[int, None]


# States


@quick
@given(STATES)
def test_a_state_comes_back_the_same(state: dict[str, Any]) -> None:
    text = dump_state(state)
    assert identical(load_state(text), state)


@quick
@given(STATES)
def test_a_states_text_is_what_every_database_takes(state: dict[str, Any]) -> None:
    text = dump_state(state)
    assert text.encode().decode() == text
    assert "\0" not in text
    json.loads(text, parse_constant=pytest.fail)
    # and it holds nothing that a JSON parser turns into NUL or half a character
    dumps(json.loads(text)).encode()
    assert "\\u0000" not in dumps(json.loads(text)).replace("\\\\", "")


@quick
@given(st.dictionaries(EASY_TEXTS.filter(lambda key: MARK not in key), EASY_VALUES, max_size=4))
def test_a_state_that_needs_no_escape_is_plain_json(state: dict[str, Any]) -> None:
    assert identical(json.loads(dump_state(state)), state)


@quick
@given(STATES, STATES)
def test_merging_texts_is_merging_dicts(state: dict[str, Any], delta: dict[str, Any]) -> None:
    merged = merge_state(dump_state(state), dump_state(delta))
    assert identical(load_state(merged), {**state, **delta})


def test_a_missing_state_is_empty() -> None:
    assert load_state(None) == load_state("") == load_state("null") == {}
    assert merge_state(None, '{"a":1}') == merge_state("null", '{"a":1}') == '{"a":1}'


def test_a_state_that_is_no_object_is_refused_without_its_text() -> None:
    with pytest.raises(DatabaseError) as caught:
        load_state('["secret"]')
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [MARK + "unknown:x", MARK + "float:x", MARK + "int:x", MARK + "int:", MARK, MARK + "x"]
)
def test_what_somebody_else_wrote_with_the_mark_stays(text: str) -> None:
    assert load_state(dumps({text: [text]})) == {text: [text]}
    # and survives our own writing
    assert load_state(dump_state({text: [text]})) == {text: [text]}


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), "2026-01-02T03:04:05.000006Z"),
        ((1, (2,)), [1, [2]]),
        ({3}, [3]),
        (b"text \xc3\xa9", "text é"),
        ({1: {2: math.inf}}, {"1": {"2": math.inf}}),
        ({"\ud800": (math.nan, {1: b"x"})}, {"\ud800": [math.nan, {"1": "x"}]}),
        (Rich(one=(1, None)), {"one": [1, None]}),
    ],
)
def test_rich_values_take_their_json_form(value: Any, stored: Any) -> None:
    assert identical(load_state(dump_state({"a": value, "b": 1})), {"a": stored, "b": 1})


@pytest.mark.parametrize("value", [lambda: "secret", b"\xff\xfesecret", [object(), "secret"]])
def test_a_value_without_json_form_becomes_text_with_a_warning(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        loaded = load_state(dump_state({"good": 1.5, "the key": value, "other": "secret"}))
    assert loaded["good"] == 1.5
    assert loaded["other"] == "secret"
    stored = loaded["the key"]
    assert isinstance(stored[0] if isinstance(value, list) else stored, str)
    [record] = [record for record in caplog.records if record.name.startswith("adk_sessions")]
    assert record.levelno == logging.WARNING
    assert "'the key'" in record.getMessage()
    assert "secret" not in caplog.text
    assert "object at" not in caplog.text


def test_depth_has_a_limit_that_says_so() -> None:
    assert load_state(dump_state(nested(200))) == nested(200)
    for levels in (256, 2_000, 200_000):
        with pytest.raises(InvalidInputError, match="delta is nested too deeply") as caught:
            dump_state(nested(levels), field="delta")
        assert caught.value.field == "delta"
        assert caught.value.__suppress_context__


def test_depth_is_the_same_with_values_that_need_escapes() -> None:
    deepest = [0, 0]
    for n, leaf in enumerate((1, math.nan)):
        for levels in range(200, 300):
            state = json.loads(dumps(nested(levels)).replace("1", dumps(leaf)))
            try:
                assert identical(load_state(dump_state(state)), state)
            except InvalidInputError:
                break
            deepest[n] = levels
    assert deepest[0] == deepest[1] >= 250


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {"a": 1}
    state["self"] = [state]
    with pytest.raises(InvalidInputError, match="contains itself"):
        dump_state(state)
    around: dict[str, Any] = {"nan": math.nan, "\ud800": {}}
    around["\ud800"]["\ud800"] = around
    with pytest.raises(InvalidInputError, match="contains itself"):
        dump_state({"a": around})


# Events


@quick
@given(EVENTS)
def test_an_event_comes_back_the_same(event: Event) -> None:
    text = dump_event(event)
    loaded = load_event(Event, text.data, text.exact)
    assert identical(loaded.model_dump(), event.model_dump())


@quick
@given(EVENTS)
def test_both_columns_are_what_every_database_takes(event: Event) -> None:
    data, exact = dump_event(event)
    for text in (data, exact or ""):
        assert text.encode().decode() == text
        assert "\0" not in text
    json.loads(data, parse_constant=pytest.fail)
    dumps(json.loads(data)).encode()


@quick
@given(EVENTS)
def test_the_readable_column_is_an_event_by_itself(event: Event) -> None:
    data, _ = dump_event(event)
    readable = Event.model_validate(json.loads(data))
    assert (readable.id, readable.timestamp) == (event.id, event.timestamp)
    assert set(json.loads(data)) == set(event.model_dump(exclude_none=True))


ORDINARY: dict[str, dict[str, Any]] = {
    "nothing": {},
    "None inside dicts and lists": {"custom": {"a": None, "b": [None]}},
    "negative fractions": {"custom": [-0.05, -0.001, 0.0, -1.0]},
    "hexadecimal like an exponent": {"id": "1e5", "custom": ["12e45678", "a:1e5", "[2e7"]},
    "a uuid": {"id": "3b0f4a1e-1e10-4e55-9e99-1e5000000000"},
    "emoji": {"content": {"parts": [{"text": "👩‍👩‍👧 \u2028 é e\u0301"}]}},
    "words": {"content": 'null, NaN, "Infinity", -0.0,'},
    "backslashes": {"content": "\\u0000 \\ud800 \\"},
    "the package's name": {"content": "pip install adk-sessions: adk_sessions"},
    "small numbers": {"custom": [1e-7, 5e-324, 1e15, 2**70]},
    "state": {"actions": EventActions(state_delta={"a": None, "b": {"c": None}})},
}


@pytest.mark.parametrize("fields", ORDINARY.values(), ids=ORDINARY)
def test_an_ordinary_event_needs_no_exact_column(fields: dict[str, Any]) -> None:
    one = event(**fields)
    data, exact = dump_event(one)
    assert exact is None
    assert identical(json.loads(data), one.model_dump(mode="json", exclude_none=True))
    assert load_event(Event, data, exact) == one


@quick
@given(EASY_VALUES, st.dictionaries(EASY_TEXTS, EASY_VALUES, max_size=3))
def test_an_event_of_ordinary_values_is_stored_once(content: Any, delta: dict[str, Any]) -> None:
    one = event(content=content, actions=EventActions(state_delta=delta))
    data, exact = dump_event(one)
    if MARK not in str(one):
        assert exact is None
    assert identical(json.loads(data), one.model_dump(mode="json", exclude_none=True))


@pytest.mark.parametrize(
    ("value", "readable"),
    [
        (math.nan, None),
        ([math.inf, 1], [None, 1]),
        ("a\0b", "a\ufffdb"),
        ({"k\ud800": "\udfff"}, {"k\ufffd": "\ufffd"}),
        (1e16, 1e16),
        (-0.0, -0.0),
        (10**5000, hex(10**5000)),
        (MARK + "float:nan", MARK + "float:nan"),
    ],
    ids=["nan", "inf", "nul", "surrogates", "1e16", "-0.0", "5000 digits", "the mark"],
)
def test_what_cannot_be_stored_stays_readable_and_is_exact_beside_it(
    value: Any, readable: Any
) -> None:
    one = event(custom=value)
    data, exact = dump_event(one)
    assert exact is not None
    assert json.loads(data)["custom"] == readable
    loaded = load_event(Event, data, exact)
    assert identical(loaded.model_dump(), one.model_dump())


def test_bytes_take_the_form_that_google_adk_gives_them() -> None:
    adk = pytest.importorskip("google.adk.events")
    types = pytest.importorskip("google.genai.types")
    part = types.Part(inline_data=types.Blob(data=b"\0\xff\x10", mime_type="a/b"))
    one = adk.Event(
        author="model",
        content=types.Content(role="model", parts=[part]),
        custom_metadata={"a": [None, {"b": None}], "c": -0.05},
        actions=adk.EventActions(state_delta={"k": {"x": None}}, artifact_delta={"f": 1}),
        long_running_tool_ids={"one"},
    )
    data, exact = dump_event(one)
    assert exact is None
    # the very expression of google-adk's StorageEvent.from_event
    assert json.loads(data) == one.model_dump(exclude_none=True, mode="json")
    assert load_event(adk.Event, data, exact) == one


@quick
@given(EASY_VALUES, st.dictionaries(EASY_TEXTS, EASY_VALUES, max_size=3))
def test_google_adks_events_are_stored_as_google_adk_stores_them(
    metadata: Any, delta: dict[str, Any]
) -> None:
    adk = pytest.importorskip("google.adk.events")
    one = adk.Event(
        author="a",
        custom_metadata={"m": metadata},
        actions=adk.EventActions(state_delta=delta),
    )
    data, exact = dump_event(one)
    assert identical(json.loads(data), one.model_dump(exclude_none=True, mode="json"))
    assert load_event(adk.Event, data, exact) == one


@quick
@given(DELTAS)
def test_google_adks_events_hold_anything_too(delta: dict[str, Any]) -> None:
    adk = pytest.importorskip("google.adk.events")
    one = adk.Event(author="a", actions=adk.EventActions(state_delta=delta))
    data, exact = dump_event(one)
    loaded = load_event(adk.Event, data, exact)
    assert identical(loaded.actions.state_delta, delta)
    adk.Event.model_validate(json.loads(data))  # stock google-adk reads the row


@pytest.mark.parametrize("delta", [{"a": {"\ud800": 1}}, {"a": [{"\ud800": {"\udfff": None}}]}])
def test_google_adks_events_keep_odd_nested_keys(delta: dict[str, Any]) -> None:
    adk = pytest.importorskip("google.adk.events")
    loud = adk.Event(author="a", custom_metadata=delta)
    assert load_event(adk.Event, *dump_event(loud)).custom_metadata == delta
    # here google-adk's serializer catches the error, and fails again in another way
    one = adk.Event(author="a", actions=adk.EventActions(state_delta=delta))
    assert load_event(adk.Event, *dump_event(one)).actions.state_delta == delta


def test_odd_keys_of_a_typed_dict_are_kept() -> None:
    class Typed(Event):
        metadata: dict[str, Any]

    one = Typed(id="1", timestamp=1.5, metadata={"\ud800": 1, "\ud83d\ude00": 2, "\0": 3})
    data, exact = dump_event(one)
    assert "\ufffd" in data
    assert load_event(Typed, data, exact) == one


def test_what_google_adk_wrote_on_sqlite_is_read() -> None:
    text = json.dumps(event(content="x").model_dump(mode="json")).replace('"x"', '"\\ud800"')
    assert load_event(Event, text, None).content == "\ud800"
    assert load_event(Event, '{"id": "1", "x": NaN}', None).model_extra != {}


def test_an_event_that_cannot_be_read_raises_value_error() -> None:
    for data, exact in (("{", None), ('["a"]', None), ("{}", "{"), ('{"timestamp": "x"}', None)):
        with pytest.raises(ValueError):
            load_event(Event, data, exact)


def test_a_value_without_json_form_does_not_stop_an_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = event(custom={"call": lambda: "secret", "good": math.nan, "last": 1})
    data, exact = dump_event(one)
    custom = load_event(Event, data, exact).model_extra["custom"]  # type: ignore[index]
    assert isinstance(custom["call"], str)
    assert math.isnan(custom["good"])
    assert custom["last"] == 1
    assert "function" in caplog.text
    assert "secret" not in caplog.text
    assert "0x" not in caplog.text


def test_an_event_too_deep_or_around_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for custom in (loop, nested(300), {"nan": math.nan, "deep": nested(300)}):
        with pytest.raises(InvalidInputError, match="event is nested too deeply") as caught:
            dump_event(event(custom=custom))
        assert caught.value.field == "event"
    deep = event(custom=nested(200))
    assert load_event(Event, *dump_event(deep)) == deep


def test_nan_inside_models_tuples_and_lists_is_kept() -> None:
    class Inner(BaseModel):
        score: float
        none: int | None = None
        scores: tuple[float, ...] = ()

    class Outer(Event):
        inner: Inner
        many: list[Inner] = []  # noqa: RUF012

    one = Outer(
        inner=Inner(score=math.nan, scores=(math.inf, 1.0)), many=[Inner(score=-math.inf)], x=[None]
    )
    loaded = load_event(Outer, *dump_event(one))
    assert identical(loaded.model_dump(mode="python"), one.model_dump(mode="python")) or (
        math.isnan(loaded.inner.score) and loaded.inner.scores == (math.inf, 1.0)
    )
    assert loaded.many == one.many


# same_event


SAME: dict[str, tuple[str, str]] = {
    "key order": ('{"a":1,"b":{"c":1,"d":2}}', '{"b":{"d":2,"c":1},"a":1}'),
    "spaces": ('{"a": [1, 2]}', '{"a":[1,2]}'),
    "the spelling of a number": ('{"a":1e-7}', '{"a":0.0000001}'),
    "the spelling of text": ('{"a":"\\u00e9"}', '{"a":"é"}'),
}
OTHER: dict[str, tuple[str, str]] = {
    "True and 1": ('{"a":true}', '{"a":1}'),
    "False and 0": ('{"a":[false]}', '{"a":[0]}'),
    "null and missing": ('{"a":null}', "{}"),
    "one key more": ('{"a":1}', '{"a":1,"b":2}'),
    "one key less": ('{"a":1,"b":2}', '{"a":1}'),
    "the order of a list": ('{"a":[1,2]}', '{"a":[2,1]}'),
    "the length of a list": ('{"a":[1]}', '{"a":[1,1]}'),
    "text and number": ('{"a":"1"}', '{"a":1}'),
    "list and dict": ('{"a":[]}', '{"a":{}}'),
    "the case of a key": ('{"a":1}', '{"A":1}'),
    "deep inside": ('{"a":[{"b":[1,true]}]}', '{"a":[{"b":[1,1]}]}'),
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_the_same_event_spelled_otherwise(one: str, other: str) -> None:
    assert same_event(EventText(one, None), EventText(other, None))


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_another_event(one: str, other: str) -> None:
    assert not same_event(EventText(one, None), EventText(other, None))
    assert not same_event(EventText(other, None), EventText(one, None))


def test_the_exact_form_decides() -> None:
    nul, other = dump_event(event(content="a\0")), dump_event(event(content="a\x01"))
    replaced = dump_event(event(content="a\ufffd"))
    assert nul.data == replaced.data
    assert same_event(nul, dump_event(event(content="a\0")))
    assert not same_event(nul, replaced)
    assert not same_event(nul, other)
    nan = dump_event(event(content=math.nan))
    assert same_event(nan, dump_event(event(content=math.nan)))
    assert not same_event(nan, dump_event(event(content=math.inf)))


@quick
@given(EVENTS)
def test_an_event_is_the_same_as_itself_reloaded(event: Event) -> None:
    text = dump_event(event)
    assert same_event(text, dump_event(load_event(Event, text.data, text.exact)))


# What a real JSONB says

SAMPLE = 300 if SOAK else 100


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    found: list[Any] = []

    @settings(quick, max_examples=count, phases=[Phase.generate])
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


async def through_jsonb(url: str, texts: list[str]) -> list[str]:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        rows = await connection.fetch(
            "SELECT v::jsonb::text FROM unnest($1::text[]) WITH ORDINALITY AS t(v, n) ORDER BY n",
            texts,
        )
    finally:
        await connection.close()
    return [row[0] for row in rows]


async def test_jsonb_gives_back_every_state(postgres_url: str) -> None:
    odd: list[Callable[[Any], Any]] = [lambda v: v, lambda v: [v], lambda v: {"k": v}]
    states = [{"a": wrap(v)} for v in ODD_NUMBERS + HUGE + ODD_TEXTS for wrap in odd]
    states += [{"a": {text: [{text: text}]}} for text in ODD_TEXTS]
    states += examples(STATES, SAMPLE)
    back = await through_jsonb(postgres_url, [dump_state(state) for state in states])
    assert [
        s for s, text in zip(states, back, strict=True) if not identical(s, load_state(text))
    ] == []


async def test_jsonb_gives_back_every_event(postgres_url: str) -> None:
    odd = [event(content=[v], custom={"k": v}) for v in ODD_NUMBERS + HUGE + ODD_TEXTS]
    events = odd + examples(EVENTS, SAMPLE)
    texts = [dump_event(event) for event in events]
    back = await through_jsonb(postgres_url, [text.data for text in texts])
    for one, text, data in zip(events, texts, back, strict=True):
        loaded = load_event(Event, data, text.exact)
        assert identical(loaded.model_dump(), one.model_dump())
        assert same_event(text, EventText(data, text.exact))


def test_a_delta_meets_a_state_with_a_lone_surrogate() -> None:
    """google-adk's own writing of one, which UTF-8 cannot hold."""
    stored = json.dumps({"a": "\ud800", "b": [1.0]})
    merged = merge_state(stored, dump_state({"k": "ü"}))
    merged.encode()
    assert load_state(merged) == {"a": "\ud800", "b": [1.0], "k": "ü"}


def test_google_adks_events_keep_odd_keys_that_its_serializer_replaces() -> None:
    adk = pytest.importorskip("google.adk.events")
    for metadata in ({"\ud800": []}, {"a\ud800": {"b": 1}}, {"\ufffd": 1}):
        one = adk.Event(author="a", custom_metadata=metadata)
        assert load_event(adk.Event, *dump_event(one)).custom_metadata == metadata
