"""The store's own session types, with google-adk's field names, for use without google-adk."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, alias_generators

__all__ = [
    "Event",
    "EventActions",
    "GetSessionConfig",
    "ListSessionsResponse",
    "Page",
    "Session",
    "SessionSummary",
]

T = TypeVar("T")

# Field names are snake_case as in storage; JSON in camelCase, as web clients send it, is read too.
_OPEN = ConfigDict(
    extra="allow",
    alias_generator=alias_generators.to_camel,
    populate_by_name=True,
    ser_json_bytes="base64",
    val_json_bytes="base64",
)


class EventActions(BaseModel):
    """What an event does besides being said. Unknown fields are kept.

    Attributes:
        state_delta: state keys to set, each with its scope's prefix (see ``adk_sessions.state``).
        artifact_delta: file name to version.
        rewind_before_invocation_id: takes back all events from that invocation's first on, in
            google-adk's way: the session's own state becomes what it was before it.
    """

    model_config = _OPEN

    state_delta: dict[str, Any] = Field(default_factory=dict)
    artifact_delta: dict[str, int] = Field(default_factory=dict)
    rewind_before_invocation_id: str | None = None


class Event(BaseModel):
    """One entry of a conversation. Unknown fields are kept, stored and given back.

    Attributes:
        id: unique in its session; made if none is given. Appending the same id with the same
            content again is harmless; the timestamp is part of it.
        invocation_id: groups the events of one run of the agent, at most 256 characters.
        author: ``user`` or the name of an agent.
        timestamp: seconds since the epoch.
        content: what was said, any JSON-able value.
        actions: see `EventActions`.
        partial: a fragment of a streamed answer; such an event is never stored.
    """

    model_config = _OPEN

    id: str = ""
    invocation_id: str = ""
    author: str = ""
    timestamp: float = Field(default_factory=time.time)
    content: Any = None
    actions: EventActions = Field(default_factory=EventActions)
    partial: bool | None = None

    def model_post_init(self, context: Any, /) -> None:
        if not self.id:
            self.id = str(uuid.uuid4())


class Session(BaseModel):
    """A conversation as the caller holds it.

    Attributes:
        id: unique for its app and user.
        app_name: the application that owns the session.
        user_id: the user that owns the session.
        state: the three scopes merged, keys with their prefixes.
        events: in the order in which they were appended, oldest first.
        last_update_time: seconds since the epoch.
    """

    model_config = ConfigDict(
        extra="forbid", alias_generator=alias_generators.to_camel, populate_by_name=True
    )

    id: str
    app_name: str
    user_id: str
    state: dict[str, Any] = Field(default_factory=dict)
    events: list[Event] = Field(default_factory=list)
    last_update_time: float = 0.0

    # The revision of the stored session that this object was read at; None if it was made by hand.
    _storage_update_marker: str | None = PrivateAttr(default=None)


class GetSessionConfig(BaseModel):
    """Which events `get_session` returns.

    Attributes:
        num_recent_events: at most so many, the newest; 0 gives none, None all.
        after_timestamp: only events whose own timestamp (seconds since the epoch) is this or later;
            None or 0 gives all. With both, time is filtered first.
    """

    num_recent_events: int | None = Field(default=None, ge=0)
    after_timestamp: float | None = None


class ListSessionsResponse(BaseModel):
    """Sessions without their events, the least recently updated first."""

    sessions: list[Session] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What a list of conversations shows of one: neither its state nor its events.

    Attributes:
        app_name, user_id, id: the session.
        title: None if it has none.
        labels: by name; empty if it has none.
        create_time, last_update_time: seconds since the epoch.
        archive_time: when it was archived, None if it is not.
        expire_time: from when on `prune` deletes it, None for never.
        event_count: how many events it has, None if they were not counted.
    """

    app_name: str
    user_id: str
    id: str
    title: str | None
    labels: dict[str, str]
    create_time: float
    last_update_time: float
    archive_time: float | None
    expire_time: float | None
    event_count: int | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a longer list.

    Attributes:
        items: what is on this page.
        next_cursor: asks for the next page, with the same arguments; None after the last one. It
            means nothing to anybody else, and may change its form with a release.
    """

    items: list[T]
    next_cursor: str | None
