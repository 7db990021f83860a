"""google-adk's own service and ours on one database, on each kind of it."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
from everywhere import SOAK

pytest.importorskip("google.adk")

from fastapi.openapi.models import HTTPBearer
from google.adk.auth.auth_tool import AuthConfig
from google.adk.errors import StaleSessionError as AdkStaleSessionError
from google.adk.errors.already_exists_error import AlreadyExistsError as AdkAlreadyExistsError
from google.adk.events import Event, EventActions
from google.adk.events.event import NodeInfo
from google.adk.events.event_actions import EventCompaction
from google.adk.sessions import BaseSessionService, Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.adk.sessions.database_session_service import DatabaseSessionService as Stock
from google.adk.tools.tool_confirmation import ToolConfirmation
from google.genai import types
from sqlalchemy import inspect, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from adk_sessions import migrate
from adk_sessions.adk import DatabaseSessionService as Ours
from adk_sessions.errors import SchemaError

DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mariadb": "mysql+asyncmy",
}
SCOPES = ("", "user:", "app:")
T0 = 1_700_000_000.25

# Services by name, so that a test can say who does what.
WHO = {"stock": Stock, "ours": Ours}
TURNS = [("stock", "ours"), ("ours", "stock")]


class Place:
    """One database, and the services that are open on it."""

    def __init__(self, kind: str, url: str, stack: AsyncExitStack) -> None:
        self.kind = kind
        self.url = make_url(url).set(drivername=DRIVERS[kind])
        self.engine: AsyncEngine = create_async_engine(self.url)
        self._stack = stack

    async def open(self, who: str) -> Any:
        url = self.url.render_as_string(hide_password=False)
        return await self._stack.enter_async_context(WHO[who](url))

    async def execute(self, *statements: str, **values: Any) -> None:
        async with self.engine.begin() as conn:
            for statement in statements:
                await conn.execute(text(statement), values)

    async def query(self, statement: str, **values: Any) -> list[Any]:
        async with self.engine.connect() as conn:
            return [tuple(row) for row in await conn.execute(text(statement), values)]

    async def tables(self) -> dict[str, tuple[list[str], list[Any]]]:
        """Every table with its columns and rows."""

        def columns(conn: Any) -> dict[str, list[str]]:
            inspector = inspect(conn)
            return {
                name: [
                    f"{column['name']} {column['type']}" for column in inspector.get_columns(name)
                ]
                for name in inspector.get_table_names()
            }

        async with self.engine.connect() as conn:
            found = await conn.run_sync(columns)
        return {name: (found[name], await self.query(f"SELECT * FROM {name}")) for name in found}


@pytest.fixture(params=DRIVERS)
async def place(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[Place]:
    url = fresh_database(request.param)
    async with AsyncExitStack() as stack:
        place = Place(request.param, url, stack)
        yield place
    await place.engine.dispose()


@pytest.fixture(params=DRIVERS)
async def shared(
    request: pytest.FixtureRequest,
    migrated_database: Callable[[str], str],
) -> AsyncIterator[Place]:
    """A database with tables: for what does not depend on who has made them."""
    fixture = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}.get(request.param)
    url = request.getfixturevalue(fixture) if fixture else migrated_database(request.param)
    await migrate.upgrade(url)
    async with AsyncExitStack() as stack:
        place = Place(request.param, url, stack)
        yield place
    await place.engine.dispose()


def said(text: str = "hello", *, delta: dict[str, Any] | None = None, **fields: Any) -> Event:
    return Event(
        author="user",
        invocation_id="invocation",
        content=types.Content(role="user", parts=[types.Part(text=text)]),
        actions=EventActions(state_delta=delta or {}),
        **fields,
    )


class Remark(Event):
    stars: int = 0


def actions(**fields: Any) -> dict[str, Any]:
    return {"actions": EventActions(**fields)}


def content(*parts: types.Part, role: str = "model") -> dict[str, Any]:
    return {"content": types.Content(role=role, parts=list(parts))}


# Events of many kinds, none of which needs an exact form beside event_data.
KINDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "text": content(types.Part(text="¿Qué? “ü” 😀 \u2028 \\ \" ' % {}\n\t")),
    "thought": content(types.Part(text="hm", thought=True, thought_signature=b"\x00\xff\xfe")),
    "blob": content(types.Part(inline_data=types.Blob(data=bytes(range(256)), mime_type="a/b"))),
    "file": content(types.Part(file_data=types.FileData(file_uri="gs://a/b", mime_type="a/b"))),
    "call": content(
        types.Part(function_call=types.FunctionCall(id="c", name="f", args={"x": [1, None, {}]}))
    )
    | {"long_running_tool_ids": {"c", "a", "b"}},
    "response": content(
        types.Part(
            function_response=types.FunctionResponse(id="c", name="f", response={"r": None})
        ),
        role="user",
    ),
    "code": content(
        types.Part(executable_code=types.ExecutableCode(code="1/0", language="PYTHON")),
        types.Part(code_execution_result=types.CodeExecutionResult(outcome="OUTCOME_OK")),
    ),
    "state": actions(
        state_delta={f"{scope}k{n}": n for n, scope in enumerate(SCOPES)}
        | {"none": None, "deep": {"a": [1, 2.5, True, None, {"b": {}}]}, "float": 0.1 + 0.2}
    ),
    "rich state": actions(
        state_delta={
            "when": datetime(2026, 1, 2, 3, 4, 5, 678, UTC),
            "tuple": (1, (2,)),
            "set": {"a"},
            "bytes": b"text",
            "model": types.Part(text="a"),
            "user:numbers": {1: 2},
        }
    ),
    "temp state": actions(state_delta={"temp:a": 1, "b": 2}),
    "artifacts": actions(artifact_delta={"a.txt": 3}, skip_summarization=True),
    "transfer": actions(transfer_to_agent="other", transfer_reason="why", escalate=True),
    "confirmation": actions(
        requested_tool_confirmations={
            "c": ToolConfirmation(hint="sure?", payload={"a": [1, None]}),
            "d": ToolConfirmation(confirmed=True),
        }
    ),
    "auth": actions(
        requested_auth_configs={"c": AuthConfig(auth_scheme=HTTPBearer(), credential_key="k")}
    ),
    "compaction": actions(
        compaction=EventCompaction(
            start_timestamp=1.5, end_timestamp=2.5, compacted_content=types.Content(role="model")
        )
    ),
    "checkpoint": actions(agent_state={"step": 2, "none": None}, end_of_agent=True),
    "rewind": actions(rewind_before_invocation_id="i"),
    "route": actions(route=["left", 1, True]),
    "metadata": {"custom_metadata": {"a": [1, None, {"b": 0.1}], "none": None}},
    "flags": {"partial": False, "turn_complete": True, "interrupted": False},
    "error": {"error_code": "E", "error_message": "it\nfailed", "branch": "a.b", "author": "x"},
    "usage": {
        "usage_metadata": types.GenerateContentResponseUsageMetadata(
            total_token_count=7, prompt_token_count=3
        ),
        "avg_logprobs": -0.25,
        "finish_reason": types.FinishReason.STOP,
        "model_version": "m",
    },
    "grounding": {
        "grounding_metadata": types.GroundingMetadata(
            web_search_queries=["q"],
            search_entry_point=types.SearchEntryPoint(sdk_blob=b"\xfe\x00"),
        ),
        "citation_metadata": types.CitationMetadata(citations=[types.Citation(uri="u")]),
    },
    "speech": {
        "input_transcription": types.Transcription(text="heard", finished=True),
        "output_transcription": types.Transcription(text="said"),
        "live_session_resumption_update": types.LiveServerSessionResumptionUpdate(
            new_handle="h", resumable=True
        ),
    },
    "node": {"output": {"a": [1, None]}, "node_info": NodeInfo(path="a/b", output_for=["a"])},
    "scope": {"isolation_scope": "fc"},
    "long text": content(types.Part(text="ü" * 70_000)),
}


def one_of_each(session: Session, prefix: str = "") -> list[Event]:
    """Events that are newer than the session, their times finer than a microsecond."""
    start = session.last_update_time + 1.0000004
    events = [
        Event(
            **{
                "id": f"{prefix}{name}",
                "invocation_id": f"i-{name}",
                "author": "agent",
                "timestamp": start + n,
                **copy.deepcopy(fields),
            }
        )
        for n, (name, fields) in enumerate(KINDS.items())
    ]
    return [*events, Remark(id=f"{prefix}remark", stars=5, timestamp=start + len(KINDS))]


def in_each_scope(key: str, value: Any) -> dict[str, Any]:
    return {scope + key: value for scope in SCOPES}


async def reload(service: BaseSessionService, session: Session, **config: Any) -> Session | None:
    """A session as it is stored, but for the fields that its events' class has not got: ours keeps
    them, google-adk's own service drops them."""
    found = await service.get_session(
        app_name=session.app_name,
        user_id=session.user_id,
        session_id=session.id,
        config=GetSessionConfig(**config) if config else None,
    )
    for event in found.events if found else []:
        object.__setattr__(event, "__pydantic_extra__", None)
    return found


async def everything(service: BaseSessionService, app_name: str) -> dict[str, Any]:
    """All that can be read of an app: listed, read, and the users' states."""
    listed = (await service.list_sessions(app_name=app_name)).sessions
    users = sorted({session.user_id for session in listed})
    return {
        "listed": listed,
        "read": [await reload(service, session) for session in listed],
        "newest": [await reload(service, session, num_recent_events=3) for session in listed],
        "later": [
            await reload(service, session, after_timestamp=session.last_update_time - 5.5)
            for session in listed
        ],
        "users": [await service.get_user_state(app_name=app_name, user_id=u) for u in users],
    }


async def fill(service: BaseSessionService, app_name: str, who: str) -> None:
    """Sessions of two users with events of every kind and state in all scopes."""
    for user in ("ann", "ben"):
        for n in range(2):
            session = await service.create_session(
                app_name=app_name,
                user_id=user,
                session_id=f"{who} {n}",
                state=in_each_scope(f"{who} {user} {n}", {"a": [n, None, 0.1]}),
            )
            events = one_of_each(session) if n else []
            for event in events if user == "ann" else events[-3:]:
                await service.append_event(session, event)


# A database that google-adk has made


async def test_ours_reads_what_stock_has_made(place: Place, app_name: str) -> None:
    stock = await place.open("stock")
    await fill(stock, app_name, "stock")
    expected = await everything(stock, app_name)
    assert await everything(await place.open("ours"), app_name) == expected
    assert len(expected["listed"]) == 4
    events = [*KINDS, "remark"]
    assert [[e.id for e in session.events] for session in expected["read"]].count(events) == 1
    assert await everything(await place.open("stock"), app_name) == expected


async def test_ours_goes_on_where_stock_stopped(place: Place, app_name: str) -> None:
    stock = await place.open("stock")
    await fill(stock, app_name, "stock")
    ours = await place.open("ours")
    await ours.delete_session(app_name, "ben", "stock 1")
    await fill(ours, app_name, "ours")
    session = await ours.get_session(app_name=app_name, user_id="ann", session_id="stock 1")
    for event in one_of_each(session, "ours "):
        await ours.append_event(session, event)
    with pytest.raises(AdkAlreadyExistsError):
        await ours.create_session(app_name=app_name, user_id="ann", session_id="stock 0")
    expected = await everything(ours, app_name)
    assert len(expected["listed"]) == 7
    assert len((await reload(ours, session)).events) == 2 * (len(KINDS) + 1)
    for service in (stock, await place.open("stock"), await place.open("ours")):
        assert await everything(service, app_name) == expected


@pytest.mark.parametrize("maker", ["stock", "ours"])
async def test_stock_goes_on_where_ours_stopped(place: Place, app_name: str, maker: str) -> None:
    await (await place.open(maker)).prepare_tables()
    ours = await place.open("ours")
    await fill(ours, app_name, "ours")
    stock = await place.open("stock")
    assert await everything(stock, app_name) == await everything(ours, app_name)
    for user in ("ann", "ben"):
        session = await stock.get_session(app_name=app_name, user_id=user, session_id="ours 1")
        for n in range(3):
            delta = in_each_scope("by stock", n)
            event = said(delta=delta, timestamp=session.last_update_time + 1)
            await stock.append_event(session, event)
        assert await reload(ours, session) == session == await reload(stock, session)
        assert session.state["app:by stock"] == 2
    await stock.delete_session(app_name, "ann", "ours 1")
    await fill(stock, app_name, "stock")
    with pytest.raises(AdkAlreadyExistsError):
        await stock.create_session(app_name=app_name, user_id="ann", session_id="ours 0")
    expected = await everything(stock, app_name)
    assert len(expected["listed"]) == 7
    assert await everything(ours, app_name) == expected


async def test_event_data_is_what_stock_would_write(place: Place, app_name: str) -> None:
    written = {}
    for who in WHO:
        service = await place.open(who)
        app = f"{app_name}-{who}"
        session = await service.create_session(app_name=app, user_id="ann", session_id="s")
        session.last_update_time = T0
        for event in one_of_each(session):
            await service.append_event(session, event)
        cast = "CAST(event_data AS TEXT)" if place.kind == "postgresql" else "event_data"
        rows = await place.query(
            f"SELECT id, invocation_id, {cast} FROM events WHERE app_name = :app", app=app
        )
        # As text once more: True is not 1, and 1.0 not 1.
        written[who] = {
            key: (invocation, json.dumps(json.loads(data), sort_keys=True))
            for key, invocation, data in rows
        }
        written[f"{who} states"] = [
            json.dumps(json.loads(state), sort_keys=True)
            for table in ("sessions", "app_states", "user_states")
            for (state,) in await place.query(
                f"SELECT {cast.replace('event_data', 'state')} FROM {table} WHERE app_name = :app",
                app=app,
            )
        ]
    assert len(written["ours"]) == len(KINDS) + 1
    for name, row in written["stock"].items():
        assert (name, written["ours"][name]) == (name, row)
    assert written["ours states"] == written["stock states"]
    assert await place.query("SELECT id FROM events WHERE event_exact IS NOT NULL") == []


HARD: dict[str, Any] = {
    "NUL": "a\0b",
    "surrogate": "\ud800",
    "nan": [float("nan"), float("inf")],
    "long": 10**40,
    "zero": -0.0,
    "large": 1e16,
    "tag": "adk_sessions:float:nan",
}


async def test_stock_reads_events_that_need_an_exact_form(shared: Place, app_name: str) -> None:
    ours, stock = await shared.open("ours"), await shared.open("stock")
    session = await ours.create_session(app_name=app_name, user_id="ann")
    for name, value in HARD.items():
        words = value if isinstance(value, str) else name
        event = said(words, id=name, custom_metadata={name: value}, delta={name: value})
        await ours.append_event(session, event)
    read = await reload(stock, session)
    assert [event.id for event in read.events] == list(HARD)
    assert [event.timestamp for event in read.events] == [e.timestamp for e in session.events]
    assert read.events[0].content.parts[0].text == "a\ufffdb"
    assert read.state.keys() == session.state.keys()
    await stock.append_event(read, said("by stock", delta={"more": 1}))
    stored = await reload(ours, session)
    assert [repr(event) for event in stored.events[:-1]] == [repr(e) for e in session.events]
    state = session.state | {"more": 1}
    assert sorted(map(repr, stored.state.items())) == sorted(map(repr, state.items()))


# One database, two services by turns


@pytest.mark.parametrize(("first", "second"), TURNS)
async def test_a_session_object_serves_both(
    shared: Place, app_name: str, first: str, second: str
) -> None:
    pair = await shared.open(first), await shared.open(second)
    session = await pair[0].create_session(app_name=app_name, user_id="ann")
    for n in range(8):
        delta = in_each_scope(f"{n}", n) | {"temp:n": n}
        event = said(f"{n}", delta=delta, timestamp=T0 + n + 1e9)
        await pair[n % 3 % 2].append_event(session, event)
        assert session.state["temp:n"] == n
    assert session.state.pop("temp:n") == 7
    for service in pair:
        assert await reload(service, session) == session
    (listed,) = (await pair[0].list_sessions(app_name=app_name)).sessions
    await pair[1].append_event(listed, said())
    with pytest.raises(AdkStaleSessionError):
        await pair[0].append_event(session, said())


@pytest.mark.parametrize(("first", "second"), TURNS)
@pytest.mark.parametrize("step", [1.0, 0.000_001, 0.0])
async def test_each_sees_what_the_other_has_appended(
    shared: Place, app_name: str, first: str, second: str, step: float
) -> None:
    pair = await shared.open(first), await shared.open(second)
    session = await pair[0].create_session(app_name=app_name, user_id="ann")
    await pair[0].append_event(session, said(timestamp=T0))
    for n in range(4):
        if step == 0.0 and (first, second)[n % 2] == "stock":
            continue  # its revision is the event's time, so that it can see nothing either
        copies = [await reload(service, session) for service in pair]
        await pair[n % 2].append_event(copies[n % 2], said(timestamp=T0 + step * (n + 1)))
        for service in pair:
            with pytest.raises(AdkStaleSessionError):
                await service.append_event(copies[1 - n % 2], said("too late"))
    stored = [await reload(service, session) for service in pair]
    assert stored[0] == stored[1]
    assert [e.content.parts[0].text for e in stored[0].events].count("too late") == 0


@pytest.mark.parametrize(("first", "second"), TURNS)
async def test_a_session_without_marker_serves_both(
    shared: Place, app_name: str, first: str, second: str
) -> None:
    pair = await shared.open(first), await shared.open(second)
    session = await pair[0].create_session(app_name=app_name, user_id="ann")
    for n in range(6):
        session = Session.model_validate_json(session.model_dump_json())
        await pair[n % 2].append_event(session, said(delta={f"{n}": n}))
    assert await reload(pair[0], session) == session == await reload(pair[1], session)


async def test_order_is_kept_after_stock_has_gone_back_in_time(
    shared: Place, app_name: str
) -> None:
    stock, ours = await shared.open("stock"), await shared.open("ours")
    session = await stock.create_session(app_name=app_name, user_id="ann")
    await stock.append_event(session, said(id="1", timestamp=T0 + 100))
    await stock.append_event(session, said(id="0", timestamp=T0 + 1))
    assert session.last_update_time == T0 + 1
    copies = [await reload(ours, session) for _ in range(2)]
    for n, timestamp in enumerate((T0 + 2, T0 - 86_400, T0 + 100, T0 + 50)):
        await ours.append_event(session, said(id=f"{9 - n}", timestamp=timestamp))
        assert session.last_update_time > T0 + 100
    with pytest.raises(AdkStaleSessionError):
        await ours.append_event(copies[0], said())
    with pytest.raises(AdkStaleSessionError):
        await stock.append_event(copies[1], said())
    read = [await reload(service, session) for service in (stock, ours)]
    assert [event.id for event in read[0].events] == ["0", "1", "9", "8", "7", "6"]
    assert read[0] == read[1]
    # and stock may go back once more
    await stock.append_event(read[0], said(id="5", timestamp=T0))
    await ours.append_event(read[0], said(id="4", timestamp=T0))
    for service in (stock, ours):
        stored = await reload(service, session)
        assert [event.id for event in stored.events] == ["5", "0", "1", "9", "8", "7", "6", "4"]
    await ours.append_event(stored, said(id="3", timestamp=T0))
    assert (await reload(ours, session)).events[-1].id == "3"


# google-adk's own service loses updates on SQLite
@pytest.mark.parametrize("shared", ["postgresql", "mariadb"], indirect=True)
async def test_many_tasks_of_both_keep_every_key(shared: Place, app_name: str) -> None:
    pair = [await shared.open(who) for who in WHO]
    for service in pair:
        await service.prepare_tables()
    first = await pair[1].create_session(app_name=app_name, user_id="ann")
    sessions = [await pair[1].create_session(app_name=app_name, user_id="ann") for _ in range(8)]

    async def work(n: int) -> None:
        for i in range(3):
            delta = in_each_scope(f"{n} {i}", n)
            await pair[n % 2].append_event(sessions[n], said(delta=delta))

    await asyncio.gather(*map(work, range(8)))
    expected = {f"{n} {i}": n for n in range(8) for i in range(3)}
    for service in pair:
        assert await service.get_user_state(app_name=app_name, user_id="ann") == expected
        assert (await reload(service, first)).state == {
            scope + key: value for scope in SCOPES[1:] for key, value in expected.items()
        }
        for session in sessions:
            assert (await reload(service, session)).events == session.events


# What cannot be adopted

V0 = [
    "CREATE TABLE sessions (app_name VARCHAR(128), user_id VARCHAR(128), id VARCHAR(128),"
    " state TEXT, create_time {time}, update_time {time}, PRIMARY KEY (app_name, user_id, id))",
    "CREATE TABLE events (id VARCHAR(128), app_name VARCHAR(128), user_id VARCHAR(128),"
    " session_id VARCHAR(128), invocation_id VARCHAR(256), author VARCHAR(256), actions {blob},"
    " timestamp {time}, content TEXT, PRIMARY KEY (id, app_name, user_id, session_id))",
    "CREATE TABLE app_states (app_name VARCHAR(128) PRIMARY KEY, state TEXT, update_time {time})",
    "CREATE TABLE user_states (app_name VARCHAR(128), user_id VARCHAR(128), state TEXT,"
    " update_time {time}, PRIMARY KEY (app_name, user_id))",
    "INSERT INTO app_states (app_name, state) VALUES ('app', '{{}}')",
    "INSERT INTO events (id, app_name, user_id, session_id) VALUES ('e', 'app', 'ann', 's')",
]
NAMES = {
    "sqlite": {"blob": "BLOB", "time": "DATETIME"},
    "postgresql": {"blob": "BYTEA", "time": "TIMESTAMP"},
    "mariadb": {"blob": "LONGBLOB", "time": "DATETIME(6)"},
}
METADATA = "CREATE TABLE adk_internal_metadata ({key} VARCHAR(128) PRIMARY KEY, value VARCHAR(256))"
FOREIGN = "CREATE TABLE events (id INTEGER PRIMARY KEY, starts VARCHAR(10), place VARCHAR(10))"
VERSION = "INSERT INTO adk_internal_metadata VALUES ('schema_version', '{}')"

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "pickled actions": (V0, ["adk-sessions upgrade --dry-run"]),
    "somebody's events": (
        [FOREIGN, "INSERT INTO events VALUES (1, 'today', 'here')"],
        ["events", "another application"],
    ),
    "no version": ([METADATA], ["adk_internal_metadata", "schema_version"]),
    "version 0": ([METADATA, VERSION.format("0")], ["adk_internal_metadata", "'0'"]),
    "version 2": ([METADATA, VERSION.format("2")], ["adk_internal_metadata", "'2'"]),
    "version 2 of pickles": ([*V0, METADATA, VERSION.format("2")], ["'2'"]),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_adopted_is_left_alone(place: Place, app_name: str, name: str) -> None:
    statements, messages = REFUSED[name]
    names = NAMES[place.kind] | {"key": "`key`" if place.kind == "mariadb" else '"key"'}
    await place.execute(*(statement.format(**names) for statement in statements))
    before = await place.tables()
    for _ in range(2):
        ours = await place.open("ours")
        with pytest.raises(SchemaError) as caught:
            await ours.prepare_tables()
        for message in messages:
            assert message in str(caught.value)
        with pytest.raises(SchemaError):
            await ours.create_session(app_name=app_name, user_id="ann")
        assert await place.tables() == before


async def test_a_database_without_its_version_row_is_refused(place: Place, app_name: str) -> None:
    stock = await place.open("stock")
    session = await stock.create_session(app_name=app_name, user_id="ann")
    await place.execute("DELETE FROM adk_internal_metadata")
    before = await place.tables()
    with pytest.raises(SchemaError, match="schema_version"):
        await reload(await place.open("ours"), session)
    assert await place.tables() == before


# Rows that only SQLite can hold

ON_SQLITE = pytest.mark.parametrize("place", ["sqlite"], indirect=True)


async def with_raw_times(place: Place, app_name: str) -> Session:
    """A session of stock's, whose times are numbers but for the newest event's."""
    stock = await place.open("stock")
    session = await stock.create_session(
        app_name=app_name, user_id="ann", state={"a": 1, "user:b": 2, "app:c": 3}
    )
    for n in range(3):
        await stock.append_event(session, said(f"{n}", id=f"{n}", timestamp=T0 + n))
    await place.execute(
        f"UPDATE sessions SET update_time = {T0 + 2}, create_time = {int(T0)}",
        f"UPDATE events SET timestamp = {T0} WHERE id = '0'",
        f"UPDATE events SET timestamp = {int(T0) + 1} WHERE id = '1'",
        f"UPDATE app_states SET update_time = {T0}",
        f"UPDATE user_states SET update_time = {T0}",
    )
    return session


@ON_SQLITE
async def test_raw_epoch_numbers_read_as_times(place: Place, app_name: str) -> None:
    session = await with_raw_times(place, app_name)
    ours = await place.open("ours")
    assert await reload(ours, session) == session
    assert session.last_update_time == T0 + 2
    (listed,) = (await ours.list_sessions(app_name=app_name)).sessions
    assert listed.last_update_time == T0 + 2
    assert listed._storage_update_marker == session._storage_update_marker
    for recent in range(4):
        read = await reload(ours, session, num_recent_events=recent)
        assert read.events == session.events[3 - recent :]


@ON_SQLITE
async def test_raw_epoch_numbers_can_be_filtered(place: Place, app_name: str) -> None:
    session = await with_raw_times(place, app_name)
    ours = await place.open("ours")
    for after, expected in ((T0 - 1, 3), (T0, 3), (T0 + 0.5, 2), (T0 + 2, 1), (T0 + 3, 0)):
        read = await reload(ours, session, after_timestamp=after)
        assert (after, read.events) == (after, session.events[3 - expected :])


@ON_SQLITE
@pytest.mark.parametrize("marked", [True, False])
async def test_a_session_with_raw_times_may_grow(place: Place, app_name: str, marked: bool) -> None:
    session = await with_raw_times(place, app_name)
    ours = await place.open("ours")
    await place.execute(f"UPDATE events SET timestamp = {T0 + 2} WHERE id = '2'")
    old = await reload(ours, session)
    if not marked:
        session = Session.model_validate_json(session.model_dump_json())
    for n in range(2):
        delta = {f"{n}": n, "user:d": n, "app:e": n}
        await ours.append_event(session, said(timestamp=T0, delta=delta))
        assert session.last_update_time > T0 + 2
        assert await reload(ours, session) == session
    with pytest.raises(AdkStaleSessionError):
        await ours.append_event(old, said())
    assert (await reload(await place.open("stock"), session)).events == session.events


@ON_SQLITE
async def test_the_payloads_time_wins_over_the_column(place: Place, app_name: str) -> None:
    stock = await place.open("stock")
    session = await stock.create_session(app_name=app_name, user_id="ann")
    await stock.append_event(session, said("kept", timestamp=T0))
    await stock.append_event(session, said("from the column", id="x", timestamp=T0 + 1))
    await place.execute(
        f"UPDATE events SET timestamp = {T0 - 7200.0} WHERE id != 'x'",
        "UPDATE events SET event_data = json_remove(event_data, '$.timestamp') WHERE id = 'x'",
    )
    read = await reload(await place.open("ours"), session)
    assert [event.timestamp for event in read.events] == [T0, T0 + 1]
    assert read.events == (await reload(stock, session)).events


@pytest.fixture(params=["mariadb+asyncmy", "mysql+asyncmy"])
def narrow_url(request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> str:
    """A MariaDB database through each of the dialects that reach it, with tables by stock."""
    url = make_url(fresh_database("mariadb")).set(drivername=request.param)
    return url.render_as_string(hide_password=False)


async def column_types(url: str) -> set[tuple[Any, ...]]:
    engine = create_async_engine(url)
    statement = text(
        "SELECT table_name, column_name, column_type, is_nullable, collation_name"
        " FROM information_schema.columns WHERE table_schema = database()"
    )
    async with engine.connect() as conn:
        found = {tuple(row) for row in await conn.execute(statement)}
    await engine.dispose()
    return found


async def foreign_keys(url: str) -> list[Any]:
    engine = create_async_engine(url)
    async with engine.connect() as conn:
        keys = await conn.run_sync(lambda conn: inspect(conn).get_foreign_keys("events"))
    await engine.dispose()
    return keys


async def test_adoption_mends_what_stock_makes_on_mariadb(
    narrow_url: str, app_name: str, fresh_database: Callable[[str], str]
) -> None:
    async with Stock(narrow_url) as stock:
        made = await stock.create_session(
            app_name=app_name, user_id="Bob", state={"k": 1, "user:u": "ü", "app:a": None}
        )
        made = await reload(stock, made)
        await stock.append_event(made, said("from stock", delta={"k": 2}))
    before = await column_types(narrow_url)

    async with Ours(narrow_url) as ours:
        session = await reload(ours, made)
        assert session is not None
        assert session.state == {"k": 2, "user:u": "ü", "app:a": None}
        assert [event.content for event in session.events] == [said("from stock").content]
        # another user to us, and the same one to the collation that the tables had
        assert await ours.get_user_state(app_name=app_name, user_id="bob") == {}
        long = "x" * 70_000
        for n in range(3):
            await ours.append_event(session, said(f"{n} {long}", delta={"k": long}))
        assert await reload(ours, session) == session
        assert await ours.create_session(app_name=app_name, user_id="bob", session_id=session.id)

    fresh = fresh_database("mariadb").replace("mysql:", "mysql+asyncmy:")
    async with Ours(fresh) as ours:
        await ours.prepare_tables()
    after = await column_types(narrow_url)
    assert before != after == await column_types(fresh)
    ours_made, adopted = await foreign_keys(fresh), await foreign_keys(narrow_url)
    assert [key | {"name": ""} for key in adopted] == [key | {"name": ""} for key in ours_made]

    async with Stock(narrow_url) as stock:
        again = await reload(stock, session)
        assert again is not None
        assert again.events == session.events
        await stock.append_event(again, said("stock goes on"))
        await stock.append_event(again, said("and on"))


async def test_a_foreign_key_of_the_applications_own_is_not_broken(narrow_url: str) -> None:
    async with Stock(narrow_url) as stock:
        await stock.create_session(app_name="a", user_id="u", session_id="s")
    engine = create_async_engine(narrow_url)
    async with engine.begin() as conn:
        columns = "app_name VARCHAR(128), user_id VARCHAR(128), session_id VARCHAR(128)"
        key = "(app_name, user_id, session_id) REFERENCES sessions (app_name, user_id, id)"
        await conn.execute(text(f"CREATE TABLE notes ({columns}, FOREIGN KEY {key})"))
    await engine.dispose()
    before = await foreign_keys(narrow_url), await column_types(narrow_url)
    async with Ours(narrow_url) as ours:
        with pytest.raises(SchemaError, match="notes has a foreign key to sessions"):
            await ours.prepare_tables()
    assert before[0] == await foreign_keys(narrow_url)
    assert before[1] <= await column_types(narrow_url)


# Where DDL is not transactional, what a killed process had made stays. Elsewhere nothing does, and
# ADK_SESSIONS_SOAK=1 alone tries every statement.
BROKEN_OFF = [
    (kind, statement)
    for kind in ("sqlite", "postgresql", "mariadb")
    for statement in range(1, 8, 1 if SOAK or kind == "mariadb" else 3)
]


@pytest.mark.parametrize(("place", "statement"), BROKEN_OFF, indirect=["place"])
async def test_a_first_start_that_was_broken_off_is_finished(
    place: Place, app_name: str, statement: int
) -> None:
    from sqlalchemy import event

    from adk_sessions import migrate
    from adk_sessions.dialects import open_engine
    from adk_sessions.models import Names, models

    database, statements = open_engine(place.engine, models())
    seen = []

    def stop(conn: Any, cursor: Any, sql: str, *_: Any) -> None:
        if sql.lstrip().startswith(("CREATE", "ALTER", "INSERT")):
            seen.append(sql)
            if len(seen) == statement:
                raise KeyError("killed")

    event.listen(place.engine.sync_engine, "before_cursor_execute", stop)
    with pytest.raises(KeyError):
        await migrate.bring_to_head(database, statements, Names())
    event.remove(place.engine.sync_engine, "before_cursor_execute", stop)

    ours = await place.open("ours")
    session = await ours.create_session(app_name=app_name, user_id="u")
    await ours.append_event(session, said())
    stock = await place.open("stock")
    assert await reload(stock, session) == session
    tables = await place.tables()
    assert tables["adk_internal_metadata"][1] == [("schema_version", "1")]
    async with place.engine.connect() as conn:
        indexes = await conn.run_sync(lambda conn: inspect(conn).get_indexes("events"))
    assert [index["name"] for index in indexes] == ["idx_events_app_user_session_ts_id"]
