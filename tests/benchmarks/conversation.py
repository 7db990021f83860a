"""What is stored and read: events as google-adk's Runner writes them, the same for every store."""

from __future__ import annotations

import time
import uuid
from typing import Any

from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.genai import types

AGENT = "travel_desk"
WORDS = (
    "The ferry leaves at nine, the museum opens at ten, and the table by the window is booked for"
    " one o'clock; if it rains, we swap the garden for the gallery. "
)
KILOBYTE = 1_000


def prose(size: int) -> str:
    """So many characters of text."""
    return (WORDS * (size // len(WORDS) + 1))[:size]


def said(
    size: int = 200,
    *,
    author: str = "user",
    delta: dict[str, Any] | None = None,
    timestamp: float | None = None,
) -> Event:
    """Text of a user, or of the agent, which also counts tokens."""
    role = "user" if author == "user" else "model"
    usage = None
    if role == "model":
        usage = types.GenerateContentResponseUsageMetadata(
            prompt_token_count=812, candidates_token_count=64, total_token_count=876
        )
    return _event(
        author,
        types.Content(role=role, parts=[types.Part(text=prose(size))]),
        timestamp,
        actions=EventActions(state_delta=delta or {}),
        usage_metadata=usage,
    )


def called(timestamp: float | None = None) -> Event:
    call = types.FunctionCall(
        id=f"call-{uuid.uuid4()}", name="find_trips", args={"city": "Lisbon", "days": 3, "max": 5}
    )
    content = types.Content(role="model", parts=[types.Part(function_call=call)])
    return _event(AGENT, content, timestamp, long_running_tool_ids=set())


def answered(timestamp: float | None = None) -> Event:
    trips = [{"name": f"Trip {n}", "price": 40.5 + n, "open": n % 2 == 0} for n in range(5)]
    response = types.FunctionResponse(
        id=f"call-{uuid.uuid4()}", name="find_trips", response={"trips": trips, "status": "ok"}
    )
    content = types.Content(role="user", parts=[types.Part(function_response=response)])
    return _event(AGENT, content, timestamp)


def _event(author: str, content: types.Content, timestamp: float | None, **fields: Any) -> Event:
    if timestamp is not None:
        fields["timestamp"] = timestamp
    return Event(
        id=str(uuid.uuid4()),
        invocation_id="e-7c0e4f0a-5a0b-4b7e-9a51-2f6f4d8f3c11",
        author=author,
        content=content,
        **fields,
    )


def history(count: int, *, step: float = 0.001) -> list[Event]:
    """So many events of turns: a question, a call, its response, an answer; the last is recent."""
    first = time.time() - 60 - count * step
    events: list[Event] = []
    for n in range(count):
        at = first + n * step
        match n % 4:
            case 0:
                events.append(said(120, timestamp=at))
            case 1:
                events.append(called(at))
            case 2:
                events.append(answered(at))
            case _:
                events.append(said(400, author=AGENT, timestamp=at))
    return events


def kilobytes(count: int) -> list[Event]:
    """New events of 1 KB of text each."""
    return [said(KILOBYTE) for _ in range(count)]
