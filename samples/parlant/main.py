"""A Parlant server whose conversation goes on after a restart: run it twice.

python main.py                   starts a server, talks to it, stops it
python main.py "What is new?"    says something of your own
python main.py --serve           leaves it running, until Ctrl-C
"""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Parlant writes its log and caches there, into the working directory unless it is told otherwise;
# it looks at the variable when it is imported.
os.environ.setdefault("PARLANT_HOME", str(HERE / "parlant-data"))

import parlant.sdk as p  # noqa: E402
from offline_service import OfflineService  # noqa: E402
from parlant.client import AsyncParlantClient  # noqa: E402

from adk_sessions.parlant import parlant_stores  # noqa: E402

DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite:///{HERE / 'parlant.db'}")
HOST = "127.0.0.1"
AGENT, CUSTOMER = "guide", "ada"
FIRST_RUN = ["Hello! My name is Ada and my topic is sailing.", "Did you get that?"]
LATER_RUN = ["Hello, it is me again.", "And do you know where we were?"]
PATIENCE = 60  # seconds that an answer may take


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


async def main(words: list[str]) -> None:
    serve = "--serve" in words
    port = int(os.environ.get("PORT", 8800 if serve else free_port()))
    keyed = "OPENAI_API_KEY" in os.environ
    stop_on_signals()
    async with (
        parlant_stores(DATABASE_URL) as stores,
        p.Server(
            host=HOST,
            port=port,
            tool_service_port=free_port(),
            nlp_service=p.NLPServices.openai if keyed else OfflineService.create,
            session_store=stores.session_store,
            customer_store=stores.customer_store,
            variable_store=stores.variable_store,
            log_level=p.LogLevel.WARNING,
        ) as server,
    ):
        await declare(server)
        beside = asyncio.create_task(announce(server, port) if serve else talk(server, port, words))
        # the server runs here, at the end of its block, until it is stopped
    await beside


def stop_on_signals() -> None:
    """Ctrl-C, and SIGTERM just as well, end the server, and then the stores are closed.

    Parlant's server catches both, ends, and raises them once more: what it waits for then is that
    its task is cancelled. Where nothing does that (SIGINT is ignored in a shell's background, and
    SIGTERM ends the process at once), it waits for ever, or the stores stay open.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(task.cancel))


async def declare(server: p.Server) -> None:
    """What every start says alike.

    Agents are in memory: a fixed id makes a stored session find its agent again. Customers and
    variables are in the database, where the first one of an id stays; a variable's id comes from
    its name.
    """
    agent = await server.create_agent(
        id=AGENT,
        name="Guide",
        description="You are friendly, and you remember what customers tell you.",
        perceived_performance_policy=p.NullPerceivedPerformancePolicy(),
    )
    friends = await server.create_tag("friends")
    customer = await server.find_customer(id=CUSTOMER) or await server.create_customer(
        id=CUSTOMER, name="Ada", tags=[friends.id]
    )
    starts = await agent.create_variable("number of starts")
    count = await starts.get_value_for_customer(customer)
    await starts.set_value_for_customer(customer, (count or 0) + 1)


async def announce(server: p.Server, port: int) -> None:
    await server.ready.wait()
    print(f"Serving at http://{HOST}:{port}, until Ctrl-C.", flush=True)


async def talk(server: p.Server, port: int, messages: list[str]) -> None:
    """A customer's side: all of it is Parlant's HTTP interface."""
    try:
        await server.ready.wait()
        client = AsyncParlantClient(base_url=f"http://{HOST}:{port}")
        found = await client.sessions.list(customer_id=CUSTOMER)
        if found:
            session, *_ = found
            events = await client.sessions.list_events(session.id, wait_for_data=0)
            print(f"Process {os.getpid()} finds the session of an earlier one:")
            for event in events:
                show(event)
            print("  and goes on:")
            messages = messages or LATER_RUN
        else:
            print(f"Process {os.getpid()} finds no session and begins one.")
            session = await client.sessions.create(agent_id=AGENT, customer_id=CUSTOMER)
            messages = messages or FIRST_RUN
        for text in messages:
            asked = await client.sessions.create_event(
                session.id, kind="message", source="customer", message=text
            )
            show(asked)
            answer = await client.sessions.list_events(
                session.id,
                min_offset=asked.offset + 1,
                source="ai_agent",
                kinds="message",
                wait_for_data=PATIENCE,
            )
            show(answer[0])
    finally:
        # what Ctrl-C does: the server ends, and the stores are closed after it
        signal.raise_signal(signal.SIGINT)


def show(event) -> None:
    if event.kind == "message":
        print(f"  {event.offset:>3} {event.data['participant']['display_name']}: ", end="")
        print(event.data["message"])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
