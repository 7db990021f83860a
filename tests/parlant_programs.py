"""Programs that run a Parlant server in this process: what they declare, how they start and end.

Parlant looks at PARLANT_HOME when its server is imported, so this is imported by the fixture
`programs` of test_parlant_server.py and not at the top of a module.
"""

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import parlant.sdk as p
import uvicorn
from parlant.bin import server as parlant_server
from servers import LOOPBACK, free_port

from adk_sessions.parlant import ParlantStores, parlant_stores

SAMPLE = Path(__file__).parents[1] / "samples" / "parlant" / "offline_service.py"
AGENT = "guide"
PATIENCE = 30  # seconds


def _offline_service() -> Any:
    spec = importlib.util.spec_from_file_location("parlant_offline_service", SAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OfflineService


OfflineService = _offline_service()


# --- what a program declares at each start ------------------------------------------------------


@p.tool
async def look_up(context: p.ToolContext) -> p.ToolResult:
    """Looks for it on the shelf."""
    await context.emit_message("One moment.")
    return p.ToolResult({"found": ["é", 1]}, metadata={"source": "shelf"})


async def create_agent(server: p.Server) -> p.Agent:
    return await server.create_agent(
        id=AGENT,
        name="Guide",
        description="You are friendly.",
        perceived_performance_policy=p.NullPerceivedPerformancePolicy(),
    )


async def declare_all(server: p.Server) -> None:
    """A bit of everything that is stored; the ids are Parlant's own."""
    agent = await create_agent(server)
    red, blue = await server.create_tag("red"), await server.create_tag("blue")
    ann = await server.create_customer("Ann", metadata={"plan": "free"}, tags=[red.id, blue.id])
    await server.create_customer("Bo", tags=[blue.id])
    plan = await agent.create_variable("plan", description="What the customer has bought")
    await plan.set_value_for_customer(ann, {"name": "free", "seats": [1, 2]})
    await plan.set_value_for_tag(red.id, 3.5)
    await plan.set_global_value("none")
    weather = await agent.create_variable("weather")
    await weather.set_global_value("rain")
    await declare_tool(agent)


async def declare_tool(agent: p.Agent) -> None:
    await agent.create_guideline(
        condition="The customer says something",
        action="look it up",
        tools=[look_up],
        matcher=p.MATCH_ALWAYS,
    )


async def declare_agent(server: p.Server) -> None:
    await declare_tool(await create_agent(server))


# --- a program, from its start to its end -------------------------------------------------------


class Stoppable(uvicorn.Server):
    """Can be stopped as Ctrl-C does, but without a signal, which would stop the tests."""

    running: list["Stoppable"] = []  # noqa: RUF012

    async def serve(self, sockets: Any = None) -> None:
        self.running.append(self)
        await super().serve(sockets)
        self.running.remove(self)
        task = asyncio.current_task()
        assert task
        task.cancel()  # what the signal does once the server has ended


@dataclass
class Program:
    """A program whose server runs, and a client of its HTTP interface."""

    server: p.Server
    client: httpx.AsyncClient
    stores: ParlantStores
    turns: asyncio.Queue[None]

    async def get(self, path: str, **params: Any) -> Any:
        return (await self.client.get(path, params=params)).raise_for_status().json()

    async def post(self, path: str, **body: Any) -> Any:
        return (await self.client.post(path, json=body)).raise_for_status().json()

    async def say(self, session: str, text: str) -> list[dict[str, Any]]:
        """Says something as the customer; all events of the turn."""
        path = f"/sessions/{session}/events"
        events = [await self.post(path, kind="message", source="customer", message=text)]
        while not _ends_a_turn(events[-1]):
            after = events[-1]["offset"] + 1
            events += await self.get(path, min_offset=after, wait_for_data=PATIENCE)
        # the engine then notes what it has done, in the session
        await asyncio.wait_for(self.turns.get(), PATIENCE)
        return events

    async def everything(self) -> dict[str, Any]:
        """All that can be read of what is stored, and that a start leaves as it is."""
        customers = await self.get("/customers")
        # the guest is no document: the time of its creation is that of the request
        found = {"customers": [one for one in customers if one["id"] != "guest"]}
        for kind, details in (
            ("sessions", "/sessions/{id}/events?wait_for_data=0"),
            ("context-variables", "/context-variables/{id}?include_values=true"),
        ):
            found[kind] = await self.get(f"/{kind}")
            for one in found[kind]:
                path = details.format(id=one["id"])
                found[path] = await self.get(path)
        for session in found["sessions"]:
            # an agent's states are nowhere else to be seen
            key = f"session {session['id']}"
            found[key] = await self.stores.session_store.read_session(session["id"])
        for path in (path for path in found if path.startswith("/context-variables")):
            for value in found[path]["key_value_pairs"].values():
                del value["last_modified"]  # the program has set it once more
        return found


def _ends_a_turn(event: dict[str, Any]) -> bool:
    # an agent is ready after each of its messages, and once more at the end
    return event["kind"] == "status" and event["data"]["data"].get("stage") == "completed"


def texts(events: list[dict[str, Any]]) -> list[str]:
    return [event["data"]["message"] for event in events if event["kind"] == "message"]


@asynccontextmanager
async def running(
    url: str,
    declare: Callable[[p.Server], Awaitable[None]] = declare_agent,
    *,
    bind: Callable[[p.Container, ParlantStores], None] | None = None,
) -> AsyncIterator[Program]:
    """A program that keeps its stores in the database.

    Args:
        url: of the database.
        declare: what it does when the server has started.
        bind: what it puts into the container by `configure_container`.
    """
    port, turns = free_port(), asyncio.Queue[None]()

    async def serve(stores: ParlantStores, started: asyncio.Future[p.Server]) -> None:
        async def configure(container: p.Container) -> p.Container:
            assert bind
            bind(container, stores)
            return container

        async def configure_hooks(hooks: p.EngineHooks) -> p.EngineHooks:
            hooks.on_messages_emitted.append(note_turn)
            return hooks

        async def note_turn(*_: Any) -> p.EngineHookResult:
            turns.put_nowait(None)
            return p.EngineHookResult.CALL_NEXT

        async with p.Server(
            host=LOOPBACK,
            port=port,
            tool_service_port=free_port(),
            nlp_service=OfflineService.create,
            log_level=p.LogLevel.ERROR,
            configure_hooks=configure_hooks,
            configure_container=configure if bind else None,
            **stores._asdict(),
        ) as server:
            await declare(server)
            started.set_result(server)

    original = parlant_server.uvicorn
    parlant_server.uvicorn = SimpleNamespace(Server=Stoppable, Config=uvicorn.Config)
    try:
        async with parlant_stores(url) as stores:
            started: asyncio.Future[p.Server] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(serve(stores, started))
            await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            try:
                await asyncio.wait_for(started.result().ready.wait(), PATIENCE)
                async with httpx.AsyncClient(
                    base_url=f"http://{LOOPBACK}:{port}", timeout=PATIENCE
                ) as client:
                    yield Program(started.result(), client, stores, turns)
            finally:
                for server in Stoppable.running:
                    server.should_exit = True
                await task
    finally:
        parlant_server.uvicorn = original
