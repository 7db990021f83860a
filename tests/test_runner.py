"""google-adk's Runner on the store: what it does with its own service, it does with ours."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from everywhere import SOAK

pytest.importorskip("google.adk")

from google.adk.agents import LlmAgent, SequentialAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.apps import App
from google.adk.apps.app import EventsCompactionConfig
from google.adk.apps.base_events_summarizer import BaseEventsSummarizer
from google.adk.events import Event, EventActions
from google.adk.events.event_actions import EventCompaction
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.platform import time as platform_time
from google.adk.platform import uuid as platform_uuid
from google.adk.runners import Runner
from google.adk.sessions import BaseSessionService, Session
from google.adk.sessions.database_session_service import DatabaseSessionService as Stock
from google.adk.tools import FunctionTool, LongRunningFunctionTool, ToolContext
from google.genai import types
from sqlalchemy import make_url

from adk_sessions.adk import DatabaseSessionService as Ours

pytestmark = [
    # google-adk warns of every feature of its own that is not final yet, and of its own use of
    # agents that it has deprecated.
    pytest.mark.filterwarnings(r"ignore:.*\[EXPERIMENTAL\]:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*SequentialAgent is deprecated:DeprecationWarning"),
]

KINDS = ["sqlite", "postgresql", "mariadb"]
EVERY_DATABASE = pytest.mark.parametrize("database_url", KINDS, indirect=True)
DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
SID = "the session"


class Scripted(BaseLlm):
    """Answers with what it was asked and how much it has seen; does the calls it is told to."""

    model: str = "scripted"

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        seen, last = llm_request.contents, llm_request.contents[-1].parts[-1]
        if last.function_response:
            answer = json.dumps(last.function_response.response, sort_keys=True, default=str)
            reply = f"{last.function_response.name} says {answer}"
        elif last.text and last.text.startswith("call "):
            _, name, args = last.text.split(" ", 2)
            part = types.Part.from_function_call(name=name, args=json.loads(args))
            yield LlmResponse(content=types.Content(role="model", parts=[part]))
            return
        else:
            reply = f"{len(seen)} seen, {llm_request.config.system_instruction}: {last.text}"
        for word in reply.split() if stream else []:
            content = types.Content(role="model", parts=[types.Part(text=word)])
            yield LlmResponse(content=content, partial=True)
        usage = types.GenerateContentResponseUsageMetadata(total_token_count=len(reply))
        yield LlmResponse(
            content=types.Content(role="model", parts=[types.Part(text=reply)]),
            usage_metadata=usage,
            turn_complete=True,
        )


def remember(values: dict[str, Any], tool_context: ToolContext) -> dict[str, Any]:
    """Sets keys of the state."""
    tool_context.state.update(values)
    return {"remembered": sorted(values)}


def order(item: str) -> dict[str, Any]:
    """Orders an item, which takes long."""
    return {"status": "pending", "item": item}


def pay(amount: int, tool_context: ToolContext) -> dict[str, Any]:
    """Pays an amount."""
    tool_context.state["paid"] = amount
    return {"paid": amount}


def clerk() -> LlmAgent:
    return LlmAgent(
        name="clerk",
        model=Scripted(),
        output_key="last_reply",
        tools=[
            FunctionTool(remember),
            LongRunningFunctionTool(order),
            FunctionTool(pay, require_confirmation=True),
        ],
    )


def desk() -> SequentialAgent:
    writer = LlmAgent(name="writer", model=Scripted(), output_key="temp:draft")
    editor = LlmAgent(
        name="editor",
        model=Scripted(),
        instruction="Edit <{temp:draft}> for {user:name?} of {app:firm?}",
        output_key="text",
    )
    return SequentialAgent(name="desk", sub_agents=[writer, editor])


class Talk:
    """A Runner in one session, and every event that it gave."""

    def __init__(self, service: BaseSessionService, app: App, user_id: str = "ann") -> None:
        self.service = service
        self.runner = Runner(app=app, session_service=service)
        self.user_id = user_id
        self.given: list[Event] = []

    async def start(self, **fields: Any) -> Session:
        return await self.service.create_session(
            app_name=self.runner.app_name, user_id=self.user_id, session_id=SID, **fields
        )

    async def say(self, message: Any, **options: Any) -> list[Event]:
        part = types.Part(text=message) if isinstance(message, str) else message
        given = [
            event
            async for event in self.runner.run_async(
                user_id=self.user_id,
                session_id=SID,
                new_message=types.Content(role="user", parts=[part]),
                **options,
            )
        ]
        self.given += given
        return given

    async def stored(self) -> Session:
        session = await self.service.get_session(
            app_name=self.runner.app_name, user_id=self.user_id, session_id=SID
        )
        assert session is not None
        return session


def answer_to(events: list[Event], name: str, response: dict[str, Any]) -> types.Part:
    """The user's answer to the call of a long-running function."""
    (call,) = [call for e in events for call in e.get_function_calls() if call.name == name]
    assert any(call.id in (event.long_running_tool_ids or ()) for event in events)
    answer = types.FunctionResponse(id=call.id, name=name, response=response)
    return types.Part(function_response=answer)


def remembering(values: dict[str, Any]) -> str:
    return f"call remember {json.dumps({'values': values})}"


VALUES = {"a": [1, None], "user:name": "Ann", "app:firm": "Shop", "temp:secret": 1, "float": 0.1}


# One script after another, each run on google-adk's own service and on ours


async def converse(talk: Talk) -> None:
    await talk.start(state={"app:firm": "?", "user:first": True, "own": {"deep": 1}})
    for message in ("hello", remembering(VALUES), "ünd 😀"):
        await talk.say(message)
    session = await talk.stored()
    assert session.state["app:firm"] == "Shop"
    assert "temp:secret" not in session.state
    assert session.events[-1].content.parts[0].text.startswith("7 seen")


async def stream(talk: Talk) -> None:
    await talk.start()
    config = RunConfig(streaming_mode=StreamingMode.SSE)
    given = await talk.say("a few words", run_config=config)
    assert [event.partial for event in given].count(True) > 3
    await talk.say(remembering(VALUES), run_config=config)
    await talk.say("goodbye", run_config=config, state_delta={"by the caller": 1})
    session = await talk.stored()
    assert [event for event in session.events if event.partial] == []
    assert session.state["by the caller"] == 1


async def wait(talk: Talk) -> None:
    await talk.start()
    given = await talk.say('call order {"item": "tea"}')
    await talk.say("what about the tea?")
    await talk.say(answer_to(given, "order", {"status": "done"}))
    session = await talk.stored()
    assert session.events[-1].content.parts[0].text.startswith("order says")
    kept = [event.long_running_tool_ids for event in session.events]
    (call,) = [call.id for event in given for call in event.get_function_calls()]
    assert kept.count({call}) == 1


async def confirm(talk: Talk) -> None:
    await talk.start()
    name = "adk_request_confirmation"
    for confirmed in (False, True):
        given = await talk.say(f'call pay {{"amount": {7 + confirmed}}}')
        assert any(event.actions.requested_tool_confirmations for event in given)
        assert "paid" not in (await talk.stored()).state
        await talk.say(answer_to(given, name, {"confirmed": confirmed}))
    session = await talk.stored()
    assert session.state["paid"] == 8
    kept = [e.actions.requested_tool_confirmations for e in session.events]
    assert sum(map(bool, kept)) == 2


async def write(talk: Talk) -> None:
    await talk.start(state={"user:name": "Ann", "app:firm": "Shop"})
    for message in ("a letter", "another one"):
        await talk.say(message)
        session = await talk.stored()
        # the second agent has read what the first one wrote for this turn only
        assert f"{message}> for Ann of Shop" in session.state["text"]
        assert "temp:draft" not in session.state
        assert not any("temp:draft" in e.actions.state_delta for e in session.events)


async def rewind(talk: Talk) -> None:
    await talk.start(state={"own": 0})
    for n in range(3):
        await talk.say(remembering({"n": n, f"n{n}": n, "user:n": n}))
    turns = list(dict.fromkeys(event.invocation_id for event in talk.given))
    await talk.runner.rewind_async(
        user_id="ann", session_id=SID, rewind_before_invocation_id=turns[1]
    )
    session = await talk.stored()
    assert (session.state["n"], session.state.get("n2"), session.state["user:n"]) == (0, None, 2)
    (reply,) = await talk.say("where are we?")
    assert reply.content.parts[0].text.startswith("5 seen")


class Summary(BaseEventsSummarizer):
    """Sums events up; whoever is ``meanwhile`` has the time to do something."""

    def __init__(self, meanwhile: Callable[[], Awaitable[Any]] | None = None) -> None:
        self.meanwhile = meanwhile

    async def maybe_summarize_events(self, *, events: list[Event]) -> Event | None:
        if self.meanwhile:
            await self.meanwhile()
        compaction = EventCompaction(
            start_timestamp=events[0].timestamp,
            end_timestamp=events[-1].timestamp,
            compacted_content=types.Content(
                role="model", parts=[types.Part(text=f"{len(events)} events in short")]
            ),
        )
        return Event(
            author="user",
            invocation_id=Event.new_id(),
            actions=EventActions(compaction=compaction),
        )


async def compact(talk: Talk) -> None:
    await talk.start()
    for n in range(3):
        await talk.say(f"{n}")
    session = await talk.stored()
    kept = [event.actions.compaction for event in session.events if event.actions.compaction]
    assert len(kept) == 3
    assert kept[0].compacted_content.parts[0].text == "2 events in short"


async def compact_too_late(talk: Talk) -> None:
    await talk.start()
    assert talk.runner.app is not None
    summarizer = talk.runner.app.events_compaction_config.summarizer

    async def newer_turn() -> None:
        summarizer.meanwhile = None
        note = Event(author="user", invocation_id="newer", actions={"stateDelta": {"newer": 1}})
        await talk.service.append_event(await talk.stored(), note)

    summarizer.meanwhile = newer_turn
    (reply,) = await talk.say("hello")
    assert reply.content.parts[0].text.endswith("hello")
    session = await talk.stored()
    assert session.state["newer"] == 1
    assert [event.invocation_id for event in session.events][-1] == "newer"
    assert not any(event.actions.compaction for event in session.events)
    await talk.say("and again")
    assert (await talk.stored()).events[-1].actions.compaction


def compacting() -> EventsCompactionConfig:
    return EventsCompactionConfig(summarizer=Summary(), compaction_interval=1, overlap_size=0)


SCRIPTS: dict[Callable[[Talk], Awaitable[None]], Callable[[], dict[str, Any]]] = {
    converse: lambda: {"root_agent": clerk()},
    stream: lambda: {"root_agent": clerk()},
    wait: lambda: {"root_agent": clerk()},
    confirm: lambda: {"root_agent": clerk()},
    write: lambda: {"root_agent": desk()},
    rewind: lambda: {"root_agent": clerk()},
    compact: lambda: {"root_agent": clerk(), "events_compaction_config": compacting()},
    compact_too_late: lambda: {"root_agent": clerk(), "events_compaction_config": compacting()},
}


@pytest.fixture
def counted() -> Any:
    """Ids and times that are the same in each run."""

    def restart() -> None:
        ids, times = itertools.count(), itertools.count()
        platform_uuid.set_id_provider(lambda: f"00000000-{next(ids):04}")
        platform_time.set_time_provider(lambda: 1_700_000_000.25 + next(times))

    yield restart
    platform_uuid.reset_id_provider()
    platform_time.reset_time_provider()


@pytest.fixture
async def services(database_url: str) -> AsyncIterator[dict[str, BaseSessionService]]:
    url = make_url(database_url)
    driver = DRIVERS.get(url.get_backend_name(), "mysql+asyncmy")
    stock_url = url.set(drivername=driver).render_as_string(hide_password=False)
    async with Ours(database_url) as ours:
        await ours.prepare_tables()
        async with Stock(stock_url) as stock:
            yield {"stock": stock, "ours": ours}


def exactly(ends: dict[str, Any], kept: dict[str, list[Event]]) -> None:
    """Takes out what google-adk's service leaves as None, and what it does not bring back."""
    (back,) = [e for e in kept["stock"] if e.actions.rewind_before_invocation_id]
    for name in ("own", "n1", "n2"):
        assert ends["stock"]["state"].pop(name) is None
    assert back.actions.state_delta.pop("own") is None
    assert ends["ours"]["state"].pop("own") == 0
    assert not {"n1", "n2"} & ends["ours"]["state"].keys()


@pytest.mark.parametrize(
    ("script", "database_url"),
    [
        pytest.param(script, kind, id=f"{script.__name__}-{kind}")
        for number, script in enumerate(SCRIPTS)
        for kind in (KINDS if SOAK else ["sqlite", KINDS[1 + number % 2]])
    ],
    indirect=["database_url"],
)
async def test_a_script_ends_as_on_adks_own_service(
    services: dict[str, BaseSessionService],
    script: Callable[[Talk], Awaitable[None]],
    counted: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = uuid.uuid4().hex[:12]
    ends, kept, given, logged = {}, {}, {}, {}
    for who, service in services.items():
        counted()
        caplog.clear()
        with caplog.at_level(logging.INFO, "google_adk"):
            talk = Talk(service, App(name=f"{who}_{run}", **SCRIPTS[script]()))
            await script(talk)
        session = await talk.stored()
        ends[who] = session.model_dump(exclude={"app_name", "events"})
        # google-adk's service sorts by time; a request for confirmation is appended before the
        # function response that was made earlier
        kept[who] = sorted(session.events, key=lambda event: event.timestamp)
        given[who] = talk.given
        order = [event.id for event in talk.given if not event.partial]
        if who == "ours":
            assert [event.id for event in session.events if event.id in order] == order
        logged[who] = [entry.getMessage() for entry in caplog.records if "stale" in entry.msg]
        # and each reads what the other one keeps
        for other in services.values():
            ids = {"app_name": session.app_name, "user_id": "ann", "session_id": SID}
            assert await other.get_session(**ids) == session
    if script is rewind:
        exactly(ends, kept)
    assert ends["ours"] == ends["stock"]
    assert kept["ours"] == kept["stock"]
    assert len(kept["ours"]) > 1
    assert given["ours"] == given["stock"]
    assert logged["ours"] == logged["stock"]
    assert len(logged["ours"]) == (script is compact_too_late)


# A process ends, another one goes on


async def first_process(app_name: str, *urls: str) -> None:
    for url in urls:
        talk = Talk(Ours(url), App(name=app_name, root_agent=clerk()))
        await talk.start(state={"own": 1})
        await talk.say("hello")
        await talk.say(remembering(VALUES))
        print(json.dumps((await talk.stored()).model_dump(mode="json")), flush=True)
    os._exit(0)  # without a goodbye: what was acknowledged is stored


async def test_a_new_process_goes_on(
    fresh_database: Callable[[str], str], postgres_url: str, mariadb_url: str
) -> None:
    """One for all databases, since importing google-adk takes seconds."""
    app_name = f"app_{uuid.uuid4().hex[:16]}"
    urls = [fresh_database("sqlite"), postgres_url, mariadb_url]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, str(Path(__file__)), app_name, *urls],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    for url, stored in zip(urls, output.decode().splitlines(), strict=True):
        await go_on(url, app_name, json.loads(stored))


async def go_on(database_url: str, app_name: str, stored: dict[str, Any]) -> None:
    async with Ours(database_url) as service:
        talk = Talk(service, App(name=app_name, root_agent=clerk()))
        found = await talk.stored()
        assert found.model_dump(mode="json") == stored
        kept = {key: value for key, value in VALUES.items() if not key.startswith("temp:")}
        said = (
            'remember says {"remembered": ["a", "app:firm", "float", "temp:secret", "user:name"]}'
        )
        assert found.state == {"own": 1, "last_reply": said} | kept
        (event,) = await talk.say("still there?")
        # two messages, two replies, a call and its result, and the question
        assert event.content.parts[0].text.startswith("7 seen")
        assert len((await talk.stored()).events) == len(found.events) + 2
        for user, wider in (
            ("ann", {"user:name": "Ann", "app:firm": "Shop"}),
            ("ben", {"app:firm": "Shop"}),
        ):
            session = await service.create_session(app_name=app_name, user_id=user)
            assert session.state == wider


@EVERY_DATABASE
async def test_many_turns_at_once_keep_every_key(database_url: str) -> None:
    app_name = f"app_{uuid.uuid4().hex[:16]}"
    async with Ours(database_url) as service:
        talks = [Talk(service, App(name=app_name, root_agent=clerk()), f"{n}") for n in range(6)]

        async def work(n: int) -> None:
            await talks[n].start(state={f"app:start {n}": n})
            for i in range(2):
                await talks[n].say(remembering({f"app:{n} {i}": i, f"user:{i}": n, f"{i}": n}))

        await asyncio.gather(*map(work, range(6)))
        everyones = {f"app:start {n}": n for n in range(6)}
        everyones |= {f"app:{n} {i}": i for n in range(6) for i in range(2)}
        for n, talk in enumerate(talks):
            session = await talk.stored()
            own = {"0": n, "1": n, "user:0": n, "user:1": n}
            assert session.state.pop("last_reply")
            assert session.state == everyones | own
            assert len(session.events) == 8


if __name__ == "__main__":
    asyncio.run(first_process(*sys.argv[1:]))
