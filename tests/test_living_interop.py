"""All that ours does to sessions, and then google-adk's own service on the same database."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

pytest.importorskip("google.adk")

from google.adk.events import Event, EventActions
from google.adk.sessions import Session
from google.genai import types
from test_interop import DRIVERS, Ours, Place, content, everything, reload, said
from test_migrate import shell

CALL = types.Part(function_call=types.FunctionCall(id="c", name="f", args={"x": [1, None]}))
RESPONSE = types.Part(
    function_response=types.FunctionResponse(id="c", name="f", response={"r": 2.5})
)


@pytest.fixture(params=DRIVERS)
async def place(
    request: pytest.FixtureRequest, migrated_database: Callable[[str], str]
) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        place = Place(request.param, migrated_database(request.param), stack)
        yield place
    await place.engine.dispose()


def of(session: Session) -> dict[str, str]:
    return {"app_name": session.app_name, "user_id": session.user_id, "session_id": session.id}


def own(session: Session) -> dict[str, Any]:
    return {k: v for k, v in session.state.items() if not k.startswith(("app:", "user:"))}


def turn(name: str, **delta: Any) -> list[Event]:
    """A question, a call, its response with a change of the state, and an answer."""
    fields = {"invocation_id": name, "author": "agent"}
    return [
        said(f"{name}?", id=f"{name} question").model_copy(update={"invocation_id": name}),
        Event(id=f"{name} call", **fields, **content(CALL)),
        Event(
            id=f"{name} response",
            **fields,
            **content(RESPONSE, role="user"),
            actions=EventActions(state_delta=delta),
        ),
        Event(id=f"{name} answer", **fields, **content(types.Part(text="so"))),
    ]


async def live(ours: Any, app: str) -> None:
    """Each operation that there is, once: ann has the sessions "talk" and "fork"."""
    start = {"start": 1, "gone": 1, "user:n": 1, "app:n": 1}
    talk = await ours.create_session(
        app_name=app, user_id="ann", session_id="talk", state=dict(start)
    )
    await ours.append_events(talk, turn("one", a=1, start=2, **{"user:n": 2}))
    await ours.update_state(**of(talk), delta={"outside": 1}, add={"count": 1}, delete=["gone"])
    await ours.append_events(talk, turn("two", a=2, b={"deep": None}))
    await ours.update_session(
        **of(talk), title="Tea", labels={"kind": "test"}, expire_time=time.time() + 1e6
    )
    await ours.archive_session(**of(talk))
    await ours.restore_session(**of(talk))

    fork = await ours.fork_session(talk, at="two question", session_id="fork")
    await ours.append_events(fork, turn("three", c=3))
    await ours.update_state(**of(fork), delta={"outside": 2}, add={"user:n": 1})
    back = Event(id="back", invocation_id="back", author="user")
    back.actions.rewind_before_invocation_id = "three"
    fork = await ours.get_session(**of(fork))
    await ours.append_event(fork, back)
    assert own(fork) == {"start": 2, "a": 1, "outside": 1, "count": 1}
    await ours.append_events(fork, turn("four", d=4))

    report = await ours.prune(app, keep_last=6)
    assert (report.sessions, report.trimmed) == (0, 2)
    ben = await ours.create_session(app_name=app, user_id="ben", state=dict(start))
    await ours.append_events(ben, turn("one", a=1))
    await ours.update_state(**of(ben), delta={"a": 2})
    assert (await ours.erase_user(app, "ben")).left == 0
    async with Ours("sqlite://") as elsewhere:
        moved = await elsewhere.create_session(
            app_name=app, user_id="cid", session_id="moved", state={"start": 1, "user:n": 5}
        )
        await elsewhere.append_events(moved, turn("one", a=1))
        await elsewhere.update_state(**of(moved), delta={"outside": 1})
        lines = [line async for line in elsewhere.export_sessions(app, "cid")]
    assert (await ours.import_sessions(lines)).sessions == 1


async def test_a_database_that_is_used_by_all_of_it_is_still_google_adks(
    place: Place, app_name: str
) -> None:
    ours = await place.open("ours")
    await live(ours, app_name)
    await ours.validate_schema()
    url = place.url.render_as_string(hide_password=False)
    assert "No new upgrade operations" in await shell("check", url=url)

    stock = await place.open("stock")
    expected = await everything(ours, app_name)
    assert {session.id for session in expected["listed"]} == {"talk", "fork", "moved"}
    assert await everything(stock, app_name) == expected

    for session in expected["read"]:
        ids, state = of(session), own(session)
        last = session.events[-1].id
        then = dict(state)
        if session.id == "moved":  # where it was set after the last event
            del then["outside"]
        assert own(await ours.get_session(**ids, at=last)) == then
        held = await stock.get_session(**ids)
        await stock.append_event(held, said("stock's", id="stock's", delta={"late": 1}))
        read = await ours.get_session(**ids)
        assert own(read) == state | {"late": 1}
        assert own(await ours.get_session(**ids, at="stock's")) == own(read)
        await ours.append_event(read, said("ours", id="ours", delta={"late": 2}))
        assert await reload(ours, read) == await reload(stock, read)
        changed = f"SELECT count(*) FROM state_changes WHERE session_id = '{session.id}'"
        assert (await place.query(changed))[0][0] > 0
        await stock.delete_session(**ids)
        assert await ours.get_session(**ids) is None
        assert await place.query(changed) == [(0,)]
    assert await place.query("SELECT count(*) FROM events") == [(0,)]
