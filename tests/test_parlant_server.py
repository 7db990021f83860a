"""A Parlant server keeps everything through restarts: a real one, whose model alone is a stub."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rows import query

if importlib.util.find_spec("parlant") is None:
    pytest.skip("needs the extra parlant", allow_module_level=True)

TABLES = (
    *("parlant_sessions_sessions", "parlant_sessions_events", "parlant_customers_customers"),
    "parlant_customers_customer_tag_associations",
    *("parlant_context_variables_variables", "parlant_context_variables_values"),
    "parlant_context_variables_variable_tag_associations",
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """parlant_programs.py, with a folder for what Parlant writes beside its stores."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # much of what it imports is deprecated
        patch.setenv("PARLANT_HOME", str(tmp_path_factory.mktemp("parlant")))
        yield importlib.import_module("parlant_programs")


async def counts(url: str) -> dict[str, int]:
    return {name: (await query(url, f"SELECT count(*) FROM {name}"))[0][0] for name in TABLES}


async def stored_events(url: str, session_id: str) -> list[tuple[int, Any]]:
    """Offset and data, straight from the table."""
    statement = "SELECT document FROM parlant_sessions_events ORDER BY seq"
    found = [json.loads(text) for (text,) in await query(url, statement)]
    return [(e["offset"], e["data"]) for e in found if e["session_id"] == session_id]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_two_restarts_change_nothing(
    kind: str, fresh_database: Callable[[str], str], programs: Any
) -> None:
    url, declare = fresh_database(kind), programs.declare_all
    async with programs.running(url, declare) as program:
        ann = next(c for c in await program.get("/customers") if c["name"] == "Ann")
        await program.post("/customers", name="Cy", metadata={"plan": "gold"})
        whose = {"agent_id": programs.AGENT, "customer_id": ann["id"]}
        session = await program.post("/sessions", **whose, title="Sailing", labels=["blue"])
        other = await program.post("/sessions", agent_id=programs.AGENT)
        turn = await program.say(session["id"], "Hello, my name is Ann.")
        other_turn = await program.say(other["id"], "Hello.")
        assert {event["kind"] for event in turn} == {"message", "status", "tool"}
        asked, waited, answered = programs.texts(turn)
        assert (asked, waited) == ("Hello, my name is Ann.", "One moment.")
        assert answered.startswith("I know your name is Ann")
        assert answered.endswith("this is your message 1 here.")
        seen, stored = await program.everything(), await counts(url)
        assert len(seen[f"session {session['id']}"].agent_states) == 1
    events = len(turn) + len(other_turn)
    # what the agent and its tool have written is stored by us too, in the order of the offsets
    assert await stored_events(url, session["id"]) == [(e["offset"], e["data"]) for e in turn]
    assert list(stored.values()) == [2, events, 3, 3, 2, 4, 2]

    async with programs.running(url, declare) as program:
        assert await counts(url) == stored
        assert await program.everything() == seen
        turn = await program.say(session["id"], "And my topic is sailing.")
        # the engine has read the first start's message
        _, _, answered = programs.texts(turn)
        assert answered.startswith("I know your name is Ann and your topic is sailing")
        assert answered.endswith("this is your message 2 here.")
        offset = len(seen[f"/sessions/{session['id']}/events?wait_for_data=0"])
        assert [event["offset"] for event in turn] == [*range(offset, offset + len(turn))]
        seen, stored = await program.everything(), await counts(url)
    assert stored["parlant_sessions_events"] == events + len(turn)

    async with programs.running(url, declare) as program:
        assert await counts(url) == stored
        assert await program.everything() == seen


async def test_a_long_poll_sees_what_another_process_writes(
    fresh_database: Callable[[str], str], programs: Any
) -> None:
    from parlant.core.sessions import EventKind, EventSource

    async with programs.running(url := fresh_database("postgresql")) as program:
        session = await program.post("/sessions", agent_id=programs.AGENT)
        path = f"/sessions/{session['id']}/events"
        nobody = await program.client.get(path, params={"min_offset": 0, "wait_for_data": 1})
        assert nobody.status_code == 504
        waiting = asyncio.create_task(program.get(path, min_offset=0, wait_for_data=30))
        async with programs.parlant_stores(url) as others:
            written = await others.session_store.create_event(
                session_id=session["id"],
                source=EventSource.HUMAN_AGENT,
                kind=EventKind.CUSTOM,
                trace_id="elsewhere",
                data={"text": "from elsewhere"},
            )
        (found,) = await waiting
        assert (found["id"], found["offset"], found["trace_id"]) == (written.id, 0, "elsewhere")
        turn = await program.say(session["id"], "Hello.")
        assert [event["offset"] for event in turn] == [*range(1, len(turn) + 1)]


async def test_the_host_may_configure_the_container(
    fresh_database: Callable[[str], str], programs: Any
) -> None:
    """For something else: what the agent emits still goes to the stores that were given."""
    from parlant.core.engines.alpha.canned_response_generator import (
        BasicNoMatchResponseProvider,
        NoMatchResponseProvider,
    )

    class Own(BasicNoMatchResponseProvider):
        pass

    def bind(container: Any, stores: Any) -> None:
        container[NoMatchResponseProvider] = Own()

    async with programs.running(url := fresh_database("sqlite"), bind=bind) as program:
        assert isinstance(program.server.container[NoMatchResponseProvider], Own)
        session = await program.post("/sessions", agent_id=programs.AGENT)
        turn = await program.say(session["id"], "Hello.")
        assert programs.texts(turn)[1] == "One moment."  # the tool's, by way of its own service
        assert await stored_events(url, session["id"]) == [(e["offset"], e["data"]) for e in turn]
