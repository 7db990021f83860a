"""Lean validation gives exactly what the model's own validation gives, or steps aside."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from everywhere import SOAK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from adk_sessions import Event as OwnEvent
from adk_sessions import SessionService, codec, lean
from adk_sessions.lean import Lean, Rules

pytest.importorskip("google.adk")
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.genai import types
from test_interop import KINDS

from adk_sessions.adk import DatabaseSessionService

RULES = DatabaseSessionService.lean_rules


def parts(value: Any) -> Iterator[Any]:
    """All that makes two objects the same: classes, fields, and which of them count as set."""
    yield type(value)
    if isinstance(value, BaseModel):
        yield value.model_fields_set
        yield sorted(value.__pydantic_extra__ or {})
        for item in value.__dict__.values():
            yield from parts(item)
    elif isinstance(value, dict):
        yield list(value)
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from parts(item)
    else:
        yield value


class OnlyLean(Event):
    """An event whose usual validation is not to be used."""

    allowed: ClassVar[bool] = True

    @classmethod
    def model_validate_json(cls, *args: Any, **options: Any) -> Any:
        assert cls.allowed, "validated in full"
        return super().model_validate_json(*args, **options)


@pytest.fixture
def proven() -> Iterator[Lean[Any]]:
    """Lean validation that is past its proofs, and may not fall back."""
    reader: Lean[Any] = Lean(OnlyLean, RULES)
    for n in range(60):
        reader(f'{{"id": "{n}", "timestamp": 1.0, "author": "a"}}')
    OnlyLean.allowed = False
    yield reader
    OnlyLean.allowed = True


def assert_same(text: str) -> None:
    reader: Lean[Any] = Lean(Event, RULES)
    reader._proofs = 0
    full = Event.model_validate_json(text)
    fast = reader(text)
    assert fast == full
    assert list(parts(fast)) == list(parts(full))
    assert fast.model_dump_json() == full.model_dump_json()


# The names of google-adk's and of google-genai's that the rules mention, or nothing is gained.
def test_an_event_is_read_without_its_own_validation(proven: Lean[Any]) -> None:
    for name, fields in KINDS.items():
        event = Event(id=name, **fields)
        text = codec.dump_event(event).data
        if "null" not in text:
            assert proven(text).id == name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_is_the_same(kind: str) -> None:
    text = codec.dump_event(Event(id=kind, timestamp=1.5, **KINDS[kind])).data
    assert_same(text)
    spaced = json.dumps(json.loads(text))  # as a JSONB column gives it back
    assert_same(spaced)


@pytest.mark.filterwarnings("ignore:SOMETHING_NEW")
@pytest.mark.parametrize(
    "fields",
    [
        {"message": "hello"},
        {"state": {"a": 1}},
        {"route": "left"},
        {"node_path": "a/b"},
        {"content": {"parts": [{"text": "a"}]}, "state": {"a": 1}, "actions": {"escalate": True}},
        {"content": {"parts": [{"text": "a", "thought": None}]}},
        {"content": {"parts": [{"text": "a", "inlineData": {"data": "AA==", "mimeType": "a/b"}}]}},
        {"citation_metadata": {"citationSources": [{"uri": "a"}]}},
        {"actions": {"stateDelta": {"message": 1, "state": {"route": None}}}},
        {"finish_reason": "SOMETHING_NEW"},
        {"a_field": "that nobody knows"},
    ],
    ids=str,
)
def test_what_only_the_full_validation_understands_is_left_to_it(fields: dict[str, Any]) -> None:
    assert_same(json.dumps({"id": "e", "timestamp": 2.0, "author": "a", **fields}))


def test_a_tools_own_keys_do_not_count_as_shorthand(proven: Lean[Any]) -> None:
    response = types.FunctionResponse(name="f", response={"message": "ok", "state": {"route": 1}})
    event = Event(
        id="e",
        author="a",
        content=types.Content(role="user", parts=[types.Part(function_response=response)]),
        actions=EventActions(state_delta={"message": "m"}),
    )
    read = proven(event.model_dump_json(exclude_none=True))
    assert read.content == event.content
    assert read.actions == event.actions


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 5}', '{"content": {"parts": 1}}'])
def test_what_is_no_event_is_refused_alike(text: str) -> None:
    with pytest.raises(ValidationError) as full:
        Event.model_validate_json(text)
    with pytest.raises(ValidationError) as fast:
        Lean(Event, RULES)(text)
    assert fast.value.errors() == full.value.errors()


SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
OBJECT = st.dictionaries(
    st.text() | st.sampled_from(["message", "state", "route", "null"]), JSON, max_size=4
)
PART = st.one_of(
    st.builds(lambda text: {"text": text}, st.text()),
    st.builds(lambda args: {"function_call": {"name": "f", "args": args}}, OBJECT),
    st.builds(lambda value: {"function_response": {"name": "f", "response": value}}, OBJECT),
    st.builds(lambda data: {"inline_data": types.Blob(data=data, mime_type="a/b")}, st.binary()),
    st.builds(lambda data: {"text": "x", "thought_signature": data}, st.binary()),
)


@settings(
    max_examples=200 if SOAK else 60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.lists(PART, max_size=3), OBJECT, OBJECT)
def test_any_event_is_the_same(made: list[Any], state: Any, metadata: Any) -> None:
    event = Event(
        id="e",
        author="a",
        content=types.Content(role="model", parts=[types.Part(**fields) for fields in made]),
        actions=EventActions(state_delta=state),
        custom_metadata=metadata,
    )
    stored = codec.dump_event(event)
    assert_same(stored.data)


async def test_a_service_reads_the_same_events(database_url: str, app_name: str) -> None:
    async with (
        DatabaseSessionService(database_url) as usual,
        DatabaseSessionService(database_url, lean_validation=True) as fast,
    ):
        session = await usual.create_session(app_name=app_name, user_id="ann", session_id="s")
        for n in range(3):
            await usual.append_events(
                session, [Event(id=f"{kind} {n}", **fields) for kind, fields in KINDS.items()]
            )
        which = {"app_name": app_name, "user_id": "ann", "session_id": "s"}
        expected = await usual.get_session(**which)
        assert expected is not None
        for _ in range(2):
            found = await fast.get_session(**which)
            assert found == expected
            assert list(parts(found)) == list(parts(expected))
        # nothing was odd: the private switch is there, and the results were equal
        assert isinstance(fast._validate_json, Lean)
        assert fast._validate_json._validator is not None
        assert fast._validate_json._proofs == 0


class Shouting(BaseModel):
    """A model with a validator that does change what was stored."""

    id: str
    timestamp: float
    text: str

    @model_validator(mode="before")
    @classmethod
    def shout(cls, data: Any) -> Any:
        return {**data, "text": data["text"].upper()}

    @field_validator("text")
    @classmethod
    def nothing(cls, value: str) -> str:
        return value


def test_a_difference_turns_it_off(caplog: pytest.LogCaptureFixture) -> None:
    rules = Rules(validators=frozenset({f"{__name__}.Shouting.shout"}))
    reader = Lean(Shouting, rules)
    text = '{"id": "a", "timestamp": 1, "text": "secret"}'
    with caplog.at_level(logging.WARNING):
        assert reader(text).text == "SECRET"
        assert reader(text).text == "SECRET"
    [record] = caplog.records
    assert "lean validation is off" in record.message
    assert "secret" not in record.message.lower().replace(__name__, "")
    reader._proofs = 0
    assert reader(text).text == "SECRET"


def test_without_pydantics_switch_it_is_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise TypeError

    monkeypatch.setattr(lean, "SchemaValidator", refuse)
    with caplog.at_level(logging.WARNING):
        reader = Lean(Event, RULES)
    assert "lean validation is off" in caplog.text
    event = Event(id="e", author="a", timestamp=1.0)
    assert reader(event.model_dump_json(exclude_none=True)) == event


async def test_types_without_such_validators_are_read_as_ever(app_name: str) -> None:
    async with SessionService("sqlite://", lean_validation=True) as service:
        session = await service.create_session(app_name=app_name, user_id="ann", session_id="s")
        await service.append_event(session, OwnEvent(author="a", content={"a": None}))
        found = await service.get_session(app_name=app_name, user_id="ann", session_id="s")
        assert found == session
