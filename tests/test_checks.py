"""What is refused before anything is written, by the name of its field."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adk_sessions import Event, EventActions, InvalidInputError, SessionService
from adk_sessions.checks import are_keys, check_event, check_key, check_state, check_timestamp

LAST = datetime(9000, 1, 1, tzinfo=UTC).timestamp()


def refused(check: Callable[..., None], *args: Any, **kwargs: Any) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        check(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize("key", ["", " ", "a\n", "x" * 128, "😀" * 128, "\ufffd", "\x01", "%'\"\\"])
def test_keys(key: str) -> None:
    check_key(key, "session_id")
    assert are_keys(key, key)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("x" * 129, "129 characters long; at most 128"),
        ("😀" * 129, "129 characters long"),
        ("a\0", "contains a NUL character"),
        ("a\ud800", "contains a lone surrogate"),
        (None, "must be a string"),
        (b"a", "must be a string"),
        (7, "must be a string"),
    ],
    ids=["long", "wide", "nul", "surrogate", "None", "bytes", "int"],
)
def test_keys_that_no_column_holds(key: Any, words: str) -> None:
    error = refused(check_key, key, "session_id")
    assert error.field == "session_id"
    assert words in str(error)
    assert str(error).startswith("session_id")


def test_the_limit_of_a_key_can_be_another() -> None:
    check_key("x" * 256, "event.invocation_id", limit=256)
    assert "at most 256" in str(refused(check_key, "x" * 257, "event.invocation_id", limit=256))


def test_a_reader_takes_an_impossible_key_for_unknown_but_not_another_type() -> None:
    assert are_keys("a", "b")
    for bad in ("x" * 129, "\0", "\ud800"):
        assert not are_keys("a", bad)
        assert not are_keys(bad, "a")
    for wrong in (None, 7, b"a"):
        assert refused(are_keys, "a", wrong).field == "id"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([("a", 1)], "state must be a dict"),
        (None, "state must be a dict"),
        ("a", "state must be a dict"),
        ({"a": 1, 2: "b"}, "state has a key that is not a string"),
        ({"a": 1, None: "b"}, "state has a key that is not a string"),
        ({"a": 1, "secret\0": "b"}, "a key of state contains a NUL character"),
        ({"a": 1, "app:secret\udfff": "b"}, "a key of state contains a lone surrogate"),
    ],
)
def test_states_that_cannot_be_stored(state: Any, words: str) -> None:
    error = refused(check_state, state, "state")
    assert error.field == "state"
    assert str(error) == words


def test_states_that_can() -> None:
    for state in ({}, {"": None}, {"app:": {1: 2}, "x" * 1000: "\0"}, {"user:é": math.nan}):
        check_state(state, "state")


@pytest.mark.parametrize("good", [0, 0.0, 1, 1e-9, 1.7e9, math.nextafter(LAST, 0)])
def test_timestamps(good: float) -> None:
    check_timestamp(good, "event.timestamp")


@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, -math.inf, -1, -1e-9, LAST, 10**400, -(10**400), True, None, "1", b"1"],
    ids=lambda bad: repr(bad)[:9],
)
def test_timestamps_that_no_table_holds(bad: Any) -> None:
    error = refused(check_timestamp, bad, "event.timestamp")
    assert error.field == "event.timestamp"
    assert "1970 to 9000" in str(error)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"id": "x" * 129}, "event.id"),
        ({"invocation_id": "x" * 257}, "event.invocation_id"),
        ({"timestamp": math.nan}, "event.timestamp"),
        ({"actions": EventActions(state_delta={"\0": 1})}, "event.actions.state_delta"),
    ],
)
def test_events_that_cannot_be_stored(fields: dict[str, Any], field: str) -> None:
    check_event(Event(author="", invocation_id="x" * 256, id="x" * 128))
    assert refused(check_event, Event(**fields)).field == field


def test_an_event_may_have_no_actions() -> None:
    for actions in (None, SimpleNamespace(state_delta=None)):
        event = SimpleNamespace(id="a", invocation_id="", timestamp=1.0, actions=actions)
        check_event(event)


@pytest.mark.parametrize("service_type", ["own", "adk"])
async def test_a_field_that_was_assigned_what_it_cannot_hold_is_refused(
    service_type: str, tmp_path: Path, app_name: str
) -> None:
    """Stored, it would make the session unreadable."""
    url = f"sqlite:///{tmp_path}/a.db"
    service: Any = SessionService(url)
    if service_type == "adk":
        pytest.importorskip("google.adk")
        from adk_sessions import adk

        service = adk.DatabaseSessionService(url)
    async with service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        event = service.event_type(author="ann")
        event.author = ["secret"]
        with pytest.raises(InvalidInputError) as raised:
            await service.append_event(session, event)
        assert raised.value.field == "event.author"
        assert "secret" not in str(raised.value)
        assert session.events == []
        # what can be read back is another matter
        event.author, event.content = "ann", {"parts": [{"text": "hello"}]}
        await service.append_event(session, event)
        again = await service.get_session(app_name=app_name, user_id="ann", session_id=session.id)
        assert len(again.events) == 1
