"""The store's own session types."""

from __future__ import annotations

import copy
import json
import math
import time

import pytest
from pydantic import ValidationError

from adk_sessions import Event, EventActions, GetSessionConfig, ListSessionsResponse, Session


def test_json_in_camel_case_is_read() -> None:
    text = json.dumps(
        {
            "id": "1",
            "invocationId": "i",
            "author": "user",
            "timestamp": 1.5,
            "actions": {"stateDelta": {"keyOne": 1}, "artifactDelta": {"a.txt": 2}},
        }
    )
    event = Event.model_validate_json(text)
    assert (event.id, event.invocation_id, event.timestamp) == ("1", "i", 1.5)
    assert event.actions.state_delta == {"keyOne": 1}
    assert event.actions.artifact_delta == {"a.txt": 2}
    assert event == Event.model_validate_json(event.model_dump_json())
    assert event == Event.model_validate_json(event.model_dump_json(by_alias=True))
    session = Session.model_validate(
        {"id": "1", "appName": "a", "userId": "u", "lastUpdateTime": 2}
    )
    assert session == Session(id="1", app_name="a", user_id="u", last_update_time=2.0)


def test_fields_are_written_in_snake_case() -> None:
    dumped = Event(id="1", invocation_id="i", timestamp=1.5).model_dump(exclude_none=True)
    assert list(dumped) == ["id", "invocation_id", "author", "timestamp", "actions"]
    assert list(dumped["actions"]) == ["state_delta", "artifact_delta"]


def test_unknown_fields_are_kept_and_written() -> None:
    fields = {"turnComplete": True, "custom_metadata": {"a": None}, "nonsense": [1]}
    event = Event(id="1", actions=EventActions(escalate=True), **fields)
    assert event.nonsense == [1]
    for again in (
        Event.model_validate(event.model_dump()),
        Event.model_validate_json(event.model_dump_json(by_alias=True)),
        event.model_copy(deep=True),
        copy.deepcopy(event),
    ):
        assert again == event
        assert again.model_extra == fields
        assert again.actions.escalate is True


def test_an_event_gets_an_id_and_a_time() -> None:
    before = time.time()
    one, two = Event(), Event(id="")
    assert one.id
    assert two.id
    assert one.id != two.id
    assert len(one.id) == 36
    assert before <= one.timestamp <= time.time()
    assert Event(id="mine").id == "mine"
    # an id that was made is not made again by a round trip
    assert Event.model_validate(one.model_dump()).id == one.id


def test_two_events_share_nothing() -> None:
    one, two = Event(), Event()
    one.actions.state_delta["a"] = 1
    assert two.actions.state_delta == {}
    first, second = (Session(id=i, app_name="a", user_id="u") for i in "12")
    first.state["a"] = 1
    first.events.append(one)
    assert (second.state, second.events) == ({}, [])


def test_bytes_are_base64_in_json() -> None:
    event = Event(id="1", timestamp=1.0, data=b"\x00\xff")
    assert json.loads(event.model_dump_json())["data"] == "AP8="


def test_a_session_has_no_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        Session(id="1", app_name="a", user_id="u", stat={})  # type: ignore[call-arg]


def test_the_marker_is_private_and_survives_copies() -> None:
    session = Session(id="1", app_name="a", user_id="u")
    assert session._storage_update_marker is None
    session._storage_update_marker = "marker"
    assert "marker" not in session.model_dump_json()
    for copied in (session.model_copy(), session.model_copy(deep=True), copy.deepcopy(session)):
        assert copied._storage_update_marker == "marker"


def test_filters() -> None:
    assert GetSessionConfig() == GetSessionConfig(num_recent_events=None, after_timestamp=None)
    assert GetSessionConfig(num_recent_events=0).num_recent_events == 0
    with pytest.raises(ValidationError):
        GetSessionConfig(num_recent_events=-1)
    assert math.isnan(GetSessionConfig(after_timestamp=math.nan).after_timestamp or 0)
    assert ListSessionsResponse().sessions == []
