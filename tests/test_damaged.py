"""Events that are damaged, or that newer software wrote: one of them does not cost the session."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import logging
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from engines import engine_for
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rows import overwrite, stored

from adk_sessions import (
    ConfigurationError,
    Event,
    EventActions,
    EventConflictError,
    InvalidInputError,
    ListSessionsResponse,
    Session,
    SessionService,
    Store,
    UnreadableEventError,
    codec,
)
from adk_sessions.lean import Lean

every_database = pytest.mark.parametrize(
    "database_url", ["sqlite", "postgresql", "mariadb"], indirect=True
)
HAS_ADK = importlib.util.find_spec("google") and importlib.util.find_spec("google.adk")
needs_adk = pytest.mark.skipif(not HAS_ADK, reason="needs google-adk")
KINDS = [pytest.param("core"), pytest.param("adk", marks=needs_adk)]
SECRET = "the-payload-of-ann"
# What may be in a row in the place of an event; broken JSON only where a column takes it.
DAMAGE: dict[str, str | None] = {
    "null": None,
    "broken": f'{{"author": "clerk", "content": "{SECRET}',
    "no object": f'["{SECRET}"]',
    "no author": json.dumps({"timestamp": SECRET}),
    "wrong type": json.dumps({"author": "clerk", "timestamp": SECRET, "actions": {}}),
    "wrong type inside": json.dumps({"author": "clerk", "actions": {"state_delta": [SECRET]}}),
}


def service_of(kind: str, url: str, **options: Any) -> Any:
    if kind == "core":
        return SessionService(url, **options)
    from adk_sessions.adk import DatabaseSessionService

    return DatabaseSessionService(url, **options)


def event_of(kind: str, id: str, **fields: Any) -> Any:
    if kind == "core":
        return Event(id=id, invocation_id="i", author="clerk", **fields)
    from google.adk.events.event import Event as AdkEvent

    return AdkEvent(id=id, invocation_id="i", author="clerk", **fields)


async def three(service: Any, kind: str, app: str, id: str = "s", first: str = "1") -> Any:
    """A session with three events, of which tests damage the second."""
    session = await service.create_session(app_name=app, user_id="ann", session_id=id)
    for n in range(int(first), int(first) + 3):
        delta = {"actions": {"state_delta": {f"k{n}": n}}}
        await service.append_event(session, event_of(kind, str(n), timestamp=float(n), **delta))
    return session


def of(app: str, id: str = "s") -> dict[str, str]:
    return {"app_name": app, "user_id": "ann", "session_id": id}


# An event that cannot be read


@every_database
@pytest.mark.parametrize("kind", KINDS)
async def test_an_unreadable_event_is_named_or_stood_in_for(
    kind: str, database_url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with service_of(kind, database_url) as strict:
        session = await three(strict, kind, app_name)
        started = session.last_update_time - 60
        for what, data in DAMAGE.items():
            if what == "broken" and database_url.startswith("postgresql"):
                continue  # JSONB takes none
            await overwrite(database_url, app_name, "2", data)
            with pytest.raises(UnreadableEventError) as caught:
                await strict.get_session(**of(app_name))
            error = caught.value
            named = (error.app_name, error.user_id, error.session_id, error.event_id)
            assert named == (app_name, "ann", "s", "2"), what
            for part in (*named, "placeholder", "adk-sessions doctor"):
                assert part in str(error)
            assert SECRET not in str(error)
            assert error.__context__ is None
            assert not error.retryable

            caplog.clear()
            lenient = service_of(kind, database_url, on_bad_event="placeholder")
            async with lenient:
                found = await lenient.get_session(**of(app_name))
                assert [event.id for event in found.events] == ["1", "2", "3"]
                assert found.state == {"k1": 1, "k2": 2, "k3": 3}
                bad = found.events[1]
                assert type(bad) is lenient.event_type
                assert bad.invocation_id == "i"
                assert started <= bad.timestamp <= found.last_update_time  # the column's
                assert bad.author == ("clerk" if "type" in what else "user")
                assert bad.error_code == "UNREADABLE_EVENT"
                assert "cannot be read" in bad.error_message
                assert not bad.content
                assert not bad.actions.state_delta
                again = await lenient.get_session(**of(app_name), num_recent_events=2)
                assert again.events[0] == bad
                later = await lenient.get_session(**of(app_name), after_timestamp=2.5)
                assert [event.id for event in later.events] == ["2", "3"]
            [warning] = [r for r in caplog.records if r.name.startswith("adk_sessions")]
            assert warning.levelno == logging.WARNING
            for part in (app_name, "'s'", "'2'"):
                assert part in warning.getMessage()
            assert SECRET not in caplog.text + str(bad)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_placeholder_is_no_event_to_append(
    kind: str, database_url: str, app_name: str
) -> None:
    async with service_of(kind, database_url, on_bad_event="placeholder") as service:
        await three(service, kind, app_name)
        await overwrite(database_url, app_name, "2", DAMAGE["wrong type"])
        session = await service.get_session(**of(app_name))
        other = await service.create_session(app_name=app_name, user_id="ann", session_id="other")
        bad = session.events[1]
        copies = [bad, bad.model_copy(), copy.deepcopy(bad), pickle.loads(pickle.dumps(bad))]
        copies.append(service.event_type.model_validate_json(bad.model_dump_json()))
        for event in copies:
            for target in (session, other):
                with pytest.raises(InvalidInputError, match="cannot be stored"):
                    await service.append_event(target, event)
        with pytest.raises(InvalidInputError):
            await service.append_events(other, [session.events[0], bad])
        # the session goes on, and the row is as it was
        await service.append_event(session, event_of(kind, "4"))
        data, _ = await stored(database_url, app_name, "s", "2")
        assert data == json.loads(DAMAGE["wrong type"] or "")
        assert (await service.get_session(**of(app_name, "other"))).events == []
        found = await service.get_session(**of(app_name))
        assert [event.id for event in found.events] == ["1", "2", "3", "4"]


@every_database
@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_missed_may_be_unreadable(
    kind: str, database_url: str, app_name: str
) -> None:
    async with service_of(kind, database_url, on_bad_event="placeholder") as service:
        session = await service.create_session(app_name=app_name, user_id="ann", session_id="s")
        late = copy.deepcopy(session)
        for id in ("1", "2", "3"):
            await service.append_event(session, event_of(kind, id))
        await overwrite(database_url, app_name, "2", DAMAGE["wrong type inside"])
        await service.append_event(late, session.events[2])  # once more, by somebody who is behind
        assert [event.id for event in late.events] == ["1", "2", "3"]
        assert late.events[1].error_code == "UNREADABLE_EVENT"
        await service.append_event(late, event_of(kind, "4"))
        # the damaged one itself is another event than what is stored
        with pytest.raises(EventConflictError):
            await service.append_event(late, event_of(kind, "2"))
        for what in ("null", "no object", "broken"):
            if what != "broken" or not database_url.startswith("postgresql"):
                await overwrite(database_url, app_name, "2", DAMAGE[what])
                with pytest.raises(EventConflictError):
                    await service.append_event(late, event_of(kind, "2"))


@needs_adk
async def test_lean_validation_stands_in_too(database_url: str, app_name: str) -> None:
    options: dict[str, Any] = {"on_bad_event": "placeholder", "lean_validation": True}
    async with service_of("adk", database_url, **options) as service:
        await three(service, "adk", app_name)
        await overwrite(database_url, app_name, "2", DAMAGE["broken"])
        found = await service.get_session(**of(app_name))
        assert [event.error_code for event in found.events] == [None, "UNREADABLE_EVENT", None]


@needs_adk
@pytest.mark.parametrize(
    "fields",
    [
        {"content": {"role": "user", "parts": [{"text": ["a", "list"]}]}},
        {"content": "text", "newer": 1},
        {"actions": {"artifact_delta": {"a": "no number"}}, "newer": 1},
        {"long_running_tool_ids": {"not": "a set"}},
    ],
    ids=str,
)
async def test_a_field_whose_type_has_changed(
    fields: dict[str, Any], database_url: str, app_name: str
) -> None:
    async with service_of("adk", database_url, on_bad_event="placeholder") as service:
        await three(service, "adk", app_name)
        row = {"author": "clerk", "timestamp": 2.0, **fields}
        await overwrite(database_url, app_name, "2", json.dumps(row))
        found = await service.get_session(**of(app_name))
        assert found.events[1].error_code == "UNREADABLE_EVENT"


@pytest.mark.parametrize("kind", KINDS)
async def test_the_option_is_checked_and_works_on_an_engine(
    kind: str, database_url: str, app_name: str
) -> None:
    with pytest.raises(ConfigurationError, match="on_bad_event"):
        service_of(kind, database_url, on_bad_event="ignore")
    async with engine_for(database_url) as engine:
        name = "engine" if kind == "core" else "db_engine"
        service = service_of(kind, None, **{name: engine}, on_bad_event="placeholder")
        await three(service, kind, app_name)
        await overwrite(database_url, app_name, "2", None)
        assert (await service.get_session(**of(app_name))).events[1].error_code


class Narrow(BaseModel):
    """An event of another framework, with a field that it needs and without one for errors."""

    id: str
    invocation_id: str = ""
    timestamp: float
    text: str
    actions: EventActions = Field(default_factory=EventActions)
    partial: bool | None = None


class NarrowSession(Session):
    events: list[Narrow] = Field(default_factory=list)  # type: ignore[assignment]


class NarrowService(Store[Any, Any]):
    session_type = NarrowSession
    event_type = Narrow
    list_type = ListSessionsResponse


async def test_a_class_without_the_fields_of_a_placeholder(
    database_url: str, app_name: str
) -> None:
    async with NarrowService(database_url, on_bad_event="placeholder") as service:
        session = await service.create_session(app_name=app_name, user_id="ann", session_id="s")
        for n in (1, 2):
            event = Narrow(id=str(n), timestamp=n, text="hello")
            await service.append_event(session, event)
        await overwrite(database_url, app_name, "2", DAMAGE["wrong type"])
        found = await service.get_session(**of(app_name))
        bad = found.events[1]
        assert bad.id == "2"
        assert bad.error_code == "UNREADABLE_EVENT"
        with pytest.raises(InvalidInputError):
            await service.append_event(found, copy.deepcopy(bad))


# Fields that newer software wrote


def newer(event: dict[str, Any]) -> dict[str, Any]:
    """An event's JSON with fields that its classes do not know, wherever there may be some."""
    new = {"newer": {"a": [1, None, {"b": "c"}]}}
    event = copy.deepcopy(event) | new | {"another": "top"}
    event["actions"] |= new
    event["actions"]["compaction"] |= new
    event["actions"]["requested_tool_confirmations"]["call"] |= new
    event["node_info"] |= new
    content = event["content"]
    content |= new
    for part in content["parts"]:
        part |= new
    content["parts"][1]["inline_data"] |= new
    content["parts"][2]["function_call"] |= new
    content["parts"][2]["function_call"]["args"] |= new
    event["grounding_metadata"]["grounding_chunks"][0]["web"] |= new
    return event


def rich(id: str) -> Any:
    text = {"role": "model", "parts": [{"text": "hello"}]}
    compaction = {"start_timestamp": 1.0, "end_timestamp": 2.0, "compacted_content": text}
    confirmations = {"call": {"hint": "sure?"}}
    parts: list[Any] = [
        {"text": "hello"},
        {"inline_data": {"data": b"\0\xff", "mime_type": "a/b"}},
        {"function_call": {"id": "call", "name": "f", "args": {"q": 1}}},
    ]
    return event_of(
        "adk",
        id,
        timestamp=12.25,
        content={"role": "model", "parts": parts},
        long_running_tool_ids={"b", "a"},
        actions={
            "state_delta": {"k": {"x": 1}},
            "compaction": compaction,
            "requested_tool_confirmations": confirmations,
        },
        grounding_metadata={"grounding_chunks": [{"web": {"uri": "a"}}]},
    )


Written = tuple[dict[str, Any], Any]


async def write_newer(
    service: Any, url: str, app: str, change: Callable[[dict[str, Any]], dict[str, Any]] = newer
) -> dict[str, Any]:
    """A session whose one event a newer release wrote; the event's JSON."""
    session = await service.create_session(app_name=app, user_id="ann", session_id="s")
    await service.append_event(session, rich("e"))
    data, _ = await stored(url, app, "s", "e")
    written = change(data)
    await overwrite(url, app, "e", json.dumps(written))
    return written


@needs_adk
@every_database
@pytest.mark.parametrize("lean", [False, True], ids=["usual", "lean"])
async def test_newer_fields_survive_a_rewrite(lean: bool, database_url: str, app_name: str) -> None:
    async with service_of("adk", database_url, lean_validation=lean) as service:
        written = await write_newer(service, database_url, app_name)
        session = await service.get_session(**of(app_name))
        [event] = session.events
        # as an older google-adk should see it
        assert event.content.parts[0].text == "hello"
        assert event.content.parts[1].inline_data.data == b"\0\xff"
        assert event.actions.state_delta == {"k": {"x": 1}}
        assert "newer" not in type(event).model_fields
        assert "another" not in event.model_dump_json()
        target = await service.create_session(app_name=app_name, user_id="ann", session_id="copy")
        await service.append_event(target, event)
        assert await stored(database_url, app_name, "copy", "e") == (written, None)
        # read and appended, it is the event that is stored: nothing happens
        await service.append_event(session, event)
        assert len((await service.get_session(**of(app_name))).events) == 1


@needs_adk
async def test_newer_fields_stay_with_copies_and_changes(database_url: str, app_name: str) -> None:
    async with service_of("adk", database_url) as service:
        written = await write_newer(service, database_url, app_name)
        [event] = (await service.get_session(**of(app_name))).events
        changes: dict[str, Callable[[Any], Any]] = {
            "shallow": lambda e: e.model_copy(),
            "deep": lambda e: e.model_copy(deep=True),
            "deepcopy": copy.deepcopy,
            "pickle": lambda e: pickle.loads(pickle.dumps(e)),
            "update": lambda e: e.model_copy(update={"branch": "left"}),
        }
        for name, change in changes.items():
            target = await service.create_session(app_name=app_name, user_id="ann", session_id=name)
            copied = change(event)
            copied.actions = copied.actions.model_copy(update={"state_delta": {"temp:t": 1}})
            await service.append_event(target, copied)
            expected = copy.deepcopy(written)
            expected["actions"]["state_delta"] = {}
            if name == "update":
                expected["branch"] = "left"
            assert (await stored(database_url, app_name, name, "e"))[0] == expected, name
        # a part that is taken away takes what belongs to it along, and no other part gets it
        del event.content.parts[1:]
        event.content.parts.append(event.content.parts[0].model_copy(update={"text": "two"}))
        object.__setattr__(event.content.parts[1], "__pydantic_extra__", None)
        parts = json.loads(codec.dump_event(event).data)["content"]["parts"]
        assert parts == [written["content"]["parts"][0], {"text": "two"}]


@needs_adk
@pytest.mark.parametrize("lean", [False, True], ids=["usual", "lean"])
@pytest.mark.parametrize("where", ["event", "node_info"])
def test_newer_fields_that_google_adk_would_ignore(where: str, lean: bool) -> None:
    from adk_sessions.adk import DatabaseSessionService as Ours

    reader = None
    if lean:
        reader = Lean(Ours.event_type, Ours.lean_rules)
        reader._proofs = 0
    row = json.loads(codec.dump_event(rich("e")).data)
    (row if where == "event" else row[where])["newer"] = 1
    event = codec.load_event(Ours.event_type, json.dumps(row), None, reader)
    assert json.loads(codec.dump_event(event).data) == row


@needs_adk
@every_database
async def test_newer_fields_in_the_exact_form(database_url: str, app_name: str) -> None:
    odd = {"newer": [float("inf"), -0.0, "a\0b", "\ud800", 10**5000], "n": {"also\0": 1e16}}
    async with service_of("adk", database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann", session_id="s")
        await service.append_event(session, rich("e"))
        data, _ = await stored(database_url, app_name, "s", "e")
        data["content"]["parts"][0] |= odd
        data |= odd
        row = codec.dump_event(codec.load_event(service.event_type, None, _exact(data)))
        assert row.exact is not None
        await overwrite(database_url, app_name, "e", row.data, row.exact)
        [event] = (await service.get_session(**of(app_name))).events
        target = await service.create_session(app_name=app_name, user_id="ann", session_id="copy")
        await service.append_event(target, event)
        _, exact = await stored(database_url, app_name, "copy", "e")
        assert json.loads(exact or "") == json.loads(_exact(data))


def _exact(data: dict[str, Any]) -> str:
    return json.dumps(codec._escape(data))


@needs_adk
@pytest.mark.parametrize("deep", [False, True])
async def test_a_newer_field_beside_a_wrong_one_is_no_excuse(
    deep: bool, database_url: str, app_name: str
) -> None:
    def change(event: dict[str, Any]) -> dict[str, Any]:
        event = newer(event)
        if deep:
            event["content"]["parts"][0]["text"] = 5
        else:
            event["author"] = ["not", "text"]
        return event

    async with service_of("adk", database_url) as service:
        await write_newer(service, database_url, app_name, change)
        with pytest.raises(UnreadableEventError):
            await service.get_session(**of(app_name))


class Strict(BaseModel):
    """Nothing but what it knows, under two names."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    known_name: int = Field(default=0, alias="knownName")


class Either(BaseModel):
    id: str = "e"
    one: int | Strict | list[Strict] = 0
    many: dict[str, tuple[Strict, ...]] = Field(default_factory=dict)
    open: Event = Field(default_factory=Event)


@pytest.mark.parametrize(
    "row",
    [
        {"id": "e", "new": 1},
        {"one": {"known_name": 1}, "many": {"a": [{"known_name": 2, "new": {"b": None}}]}},
        {"open": {"id": "o", "author": "a", "unknown": 1}, "new": 2},
        {"id": "e", "__class__": 1, "model_config": 2, "_private": 3, "": 4},
    ],
    ids=str,
)
def test_any_class_keeps_what_it_does_not_know(row: dict[str, Any]) -> None:
    if not codec._TELLS and {"new", "__class__"} & row.keys():
        pytest.skip("pydantic before 2.12 ignores in silence what a class ignores")
    event = codec.load_event(Either, json.dumps(row), None)
    again = json.loads(codec.dump_event(event).data)
    assert _within(row, again)
    assert codec.dump_event(codec.load_event(Either, json.dumps(again), None)).data


def test_what_is_read_by_an_alias_keeps_its_fields() -> None:
    row = {"many": {"a": [{"knownName": 2, "new": 1}]}}
    event = codec.load_event(Either, json.dumps(row), None)
    again = json.loads(codec.dump_event(event).data)
    assert again["many"] == {"a": [{"known_name": 2, "new": 1}]}


def test_a_class_that_takes_unknown_fields_has_them_as_ever() -> None:
    row = {"new": 1, "open": {"id": "o", "timestamp": 1.0, "author": "a", "unknown": 1}}
    event = codec.load_event(Either, json.dumps(row), None)
    assert event.open == Event.model_validate(row["open"])
    assert event.open.model_fields_set == {"id", "timestamp", "author", "unknown"}


class Open(Either):
    model_config = ConfigDict(extra="allow")


def test_what_could_not_be_written_back_is_not_taken_out() -> None:
    assert codec.load_event(Open, '{"new": 1}', None).model_extra == {"new": 1}
    with pytest.raises(ValidationError):
        codec.load_event(Open, '{"many": {"a": [{"known_name": 1, "new": 1}]}}', None)


def test_an_ordinary_event_carries_nothing() -> None:
    event = codec.load_event(Either, '{"id": "e", "open": {"id": "o"}}', None)
    assert event.__pydantic_extra__ is None


def _within(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return all(key in whole and _within(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return all(map(_within, part, whole))
    return bool(part == whole)


@needs_adk
@pytest.mark.filterwarnings(r"ignore:.*\[EXPERIMENTAL\]:UserWarning")
async def test_an_agent_goes_on_past_a_placeholder(
    database_url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from google.adk.apps import App
    from google.genai import types
    from test_runner import Talk, clerk

    async with service_of("adk", database_url, on_bad_event="placeholder") as service:
        app = App(name=app_name.replace("-", "_"), root_agent=clerk())
        talk = Talk(service, app)
        session = await talk.start()
        await talk.say("one")
        await talk.say("two")
        stored_ids = [event.id for event in (await _read(service, session)).events]
        await overwrite(database_url, app.name, stored_ids[1], DAMAGE["broken"])
        reply = (await talk.say("three"))[-1]
        # the two first turns' other three events and the new message
        assert reply.content is not None
        [part] = reply.content.parts or [types.Part()]
        assert str(part.text).startswith("4 seen")
        assert "unknown agent" not in caplog.text
        await asyncio.sleep(0)


async def _read(service: Any, session: Any) -> Any:
    return await service.get_session(
        app_name=session.app_name, user_id=session.user_id, session_id=session.id
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_a_time_that_is_none_does_not_cost_the_session(
    kind: str, tmp_path: Path, app_name: str
) -> None:
    """SQLite's columns take anything."""
    url = f"sqlite:///{tmp_path}/a.db"
    async with service_of(kind, url) as service:
        await three(service, kind, app_name)
        for damage in ("yesterday", b"\xff", 1e300, "2026-01-01 00:00:00+00:00"):
            with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
                connection.execute("UPDATE events SET timestamp = ? WHERE id = '2'", (damage,))
            session = await service.get_session(**of(app_name))
            assert {event.id for event in session.events} == {"1", "2", "3"}
            assert session.events[[e.id for e in session.events].index("2")].timestamp == 2.0
