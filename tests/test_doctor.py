"""Looking after the data: what is wrong is named, what can be mended safely is mended."""

from __future__ import annotations

import asyncio
import copy
import gc
import hashlib
import importlib.util
import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from engines import engine_for
from everywhere import SOAK
from rows import execute, query
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import DBAPIError

from adk_sessions import (
    ConfigurationError,
    Event,
    EventActions,
    SchemaError,
    SessionService,
    doctor,
    migrate,
)
from adk_sessions.clock import EPOCH
from adk_sessions.dialects.checkup import PAGE, unchanging
from adk_sessions.dialects.rows import Key
from adk_sessions.doctor import Report, Row, examine, repair
from adk_sessions.models import INDEX

NewDatabase = Callable[[str], str]
every_database = pytest.mark.parametrize(
    "database_url", ["sqlite", "postgresql", "mariadb"], indirect=True
)
every_kind = pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
HAS_ADK = importlib.util.find_spec("google") and importlib.util.find_spec("google.adk")
needs_adk = pytest.mark.skipif(not HAS_ADK, reason="needs google-adk")
HOURS_AGO = time.time() - 3 * 3600


class Past(SessionService):
    """A service that lives some hours ago."""

    offset = -3 * 3600.0

    def _now(self) -> float:
        return time.time() + self.offset


def call(id: str, *calls: str, long: tuple[str, ...] = (), **fields: Any) -> Event:
    """An event of the agent's with function calls, as google-adk stores it."""
    parts: list[Any] = [{"text": "well"}]
    parts += [{"function_call": {"id": c, "name": f"f_{c}", "args": {}}} for c in calls]
    content = {"role": "model", "parts": parts}
    if long:
        fields["long_running_tool_ids"] = list(long)
    fields = {"invocation_id": "i", "timestamp": HOURS_AGO, **fields}
    return Event(id=id, author="clerk", content=content, **fields)


def answer(id: str, *calls: str, **fields: Any) -> Event:
    parts = [{"function_response": {"id": c, "name": f"f_{c}", "response": {}}} for c in calls]
    content = {"role": "user", "parts": parts}
    fields = {"invocation_id": "i", "timestamp": HOURS_AGO, **fields}
    return Event(id=id, author="clerk", content=content, **fields)


def plain(id: str, **fields: Any) -> Event:
    fields = {"invocation_id": "i", "timestamp": HOURS_AGO, **fields}
    return Event(id=id, author="clerk", content={"parts": [{"text": "hello"}]}, **fields)


async def fill(service: Any, app: str, id: str, *events: Event, **fields: Any) -> Any:
    session = await service.create_session(app_name=app, user_id="ann", session_id=id, **fields)
    for event in events:
        await service.append_event(session, event)
    return session


def found(report: Report) -> dict[str, set[str]]:
    """Which sessions, and where it matters which events, are named, by kind."""
    return {
        kind: {"/".join(filter(None, (row.session_id, row.event_id))) for row in item.rows}
        for kind, item in report.found.items()
        if item.count
    }


async def make_ill(service: Any, url: str, app: str) -> None:
    """Sessions with one thing wrong with each, and some with nothing."""
    await fill(service, app, "well", call("1", "a", "b"), answer("2", "a"), answer("3", "b"))
    await fill(service, app, "empty")
    state = {"actions": EventActions(state_delta={"x": 1, "y": {"z": [1, None]}, "user:u": 1})}
    await fill(service, app, "counts", plain("1", **state))
    await fill(service, app, "lost", plain("1"), plain("2"))
    await fill(service, app, "bad", plain("1"), plain("2"), plain("3"))
    await fill(service, app, "ties", plain("1"), plain("2"), plain("3"))
    await fill(service, app, "behind", plain("1"), plain("2"))
    await fill(service, app, "open", call("1", "a", "b", "c"), answer("2", "b"), plain("3"))
    await fill(service, app, "long", call("1", "a", long=("a",)), plain("2"))
    differs = {"actions": EventActions(state_delta={"kept": 1, "changed": 1, "gone": 1})}
    await fill(service, app, "differs", plain("1", **differs))
    where = f"app_name = '{app}' AND"
    enforced = {
        "sqlite": "PRAGMA foreign_keys = OFF",
        "postgresql": "SET session_replication_role = replica",
        "mysql": "SET foreign_key_checks = 0",
    }[make_url(url).get_backend_name()]
    await execute(url, enforced, f"DELETE FROM sessions WHERE {where} id = 'lost'")
    times = dict(
        await query(
            url, f"SELECT id, timestamp FROM events WHERE {where} session_id = 'ties' ORDER BY id"
        )
    )
    tie = f"UPDATE events SET timestamp = :time WHERE {where} session_id = 'ties' AND id = '2'"
    await execute(url, tie, time=times["1"])
    [(first,)] = await query(
        url, f"SELECT timestamp FROM events WHERE {where} session_id = 'behind' AND id = '1'"
    )
    back = f"UPDATE sessions SET update_time = :time WHERE {where} id = 'behind'"
    await execute(url, back, time=first)
    await execute(
        url,
        f"UPDATE sessions SET state = :state WHERE {where} id = 'differs'"
        if not url.startswith("postgresql")
        else f"UPDATE sessions SET state = CAST(:state AS JSONB) WHERE {where} id = 'differs'",
        state='{"kept": 1, "changed": 2, "new": 3}',
    )
    await _damage(url, app, "bad", "2")
    await service.create_session(app_name=f"{app}-2", user_id="ben", session_id="scopes")
    await execute(url, f"DELETE FROM app_states WHERE app_name = '{app}-2'")
    await execute(url, f"DELETE FROM user_states WHERE app_name = '{app}-2'")


async def _damage(url: str, app: str, session: str, event: str) -> None:
    await execute(
        url,
        "UPDATE events SET event_data = NULL"
        f" WHERE app_name = '{app}' AND session_id = '{session}' AND id = '{event}'",
    )


ILL = {
    "orphans": {"lost/1", "lost/2"},
    "unreadable": {"bad/2"},
    "ties": {"ties/1"},
    "behind": {"behind"},
    "open_calls": {"open/1"},
    "long_running_calls": {"long/1"},
    "state_differs": {"differs"},
}


@every_database
async def test_everything_that_is_wrong_is_named(database_url: str, app_name: str) -> None:
    async with Past(database_url) as past:
        await make_ill(past, database_url, app_name)
    async with SessionService(database_url, migrate="off") as service:
        calls: list[tuple[int, int]] = []
        report = await examine(
            service, app_name, progress=lambda done, total: calls.append((done, total))
        )
        assert found(report) == ILL
        assert not report.healthy
        assert report.examined
        assert (report.schema, report.sessions, report.events) == ([], 9, 20)
        assert calls[-1] == (20, 20)
        rows = report.found
        assert rows["unreadable"].rows == [Row(app_name, "ann", "bad", "2", "empty")]
        assert [row.detail for row in rows["open_calls"].rows] == ["f_a a", "f_c c"]
        assert [row.detail for row in rows["state_differs"].rows] == ["'changed', 'gone', 'new'"]
        other = await examine(service, f"{app_name}-2")
        assert other.found["no_app_state"].rows == [Row(f"{app_name}-2")]
        assert other.found["no_user_state"].rows == [Row(f"{app_name}-2", "ben")]
        # all are counted, though only some are named
        few = await examine(service, app_name, rows=1)
        assert few.found["orphans"].count == 2
        assert len(few.found["orphans"].rows) == 1


@every_kind
async def test_all_apps_at_once_by_a_role_that_may_only_read(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    async with Past(url) as past:
        await make_ill(past, url, app_name)
    reading = make_url(url)
    if kind == "sqlite":
        before = hashlib.sha256(Path(reading.database or "").read_bytes()).hexdigest()
    else:
        name = f"r_{app_name.replace('-', '_')}"
        database = reading.database
        await execute(
            url,
            *{
                "postgresql": (
                    f"CREATE ROLE {name} LOGIN",
                    f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}",
                ),
                "mariadb": (
                    f"CREATE USER {name}@'%' IDENTIFIED BY 'x'",
                    f"GRANT SELECT ON {database}.* TO {name}@'%'",
                ),
            }[kind],
        )
        reading = reading.set(username=name, password="x")
    async with SessionService(reading, migrate="off") as service:
        report = await examine(service)
    assert found(report) == {**ILL, "no_app_state": {""}, "no_user_state": {""}}
    assert (report.schema, report.sessions) == ([], 10)
    if kind == "sqlite":
        assert hashlib.sha256(Path(reading.database or "").read_bytes()).hexdigest() == before
    elif kind == "postgresql":
        await execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")
    else:
        await execute(url, f"DROP USER {name}@'%'")


@every_database
async def test_examining_cannot_write(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service:
        await fill(service, app_name, "s")

        def write(conn: Connection) -> None:
            with unchanging(conn, service._statements):
                conn.execute(text("DELETE FROM sessions"))

        with pytest.raises(DBAPIError, match=r"(?i)read.?only"):
            await service._database.submit(write, write=False)
        # the connection is as it was
        await fill(service, app_name, "another")


@every_database
@pytest.mark.parametrize("how", ["error", "cancelled"])
# older releases of asyncmy say so of a result that was not read to its end
@pytest.mark.filterwarnings("ignore:coroutine 'MySQLResult._finish_unbuffered_query' was never")
async def test_an_examination_that_is_broken_off(
    how: str, database_url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Past(database_url) as past:
        session = await fill(past, app_name, "s")
        # more than is under way between the server and us
        padding = "x" * 5_000
        await past.append_events(session, [plain(str(n), padding=padding) for n in range(1_200)])
        loop = asyncio.get_running_loop()

        def stop(done: int, total: int) -> None:
            assert (done, total) == (PAGE, 1_200) or how == "cancelled"
            if how == "error":
                raise RuntimeError("stop")
            loop.call_soon_threadsafe(examining.cancel)

        examining = asyncio.create_task(examine(past, app_name, progress=stop))
        with pytest.raises(RuntimeError if how == "error" else asyncio.CancelledError):
            await examining
        await past.append_event(session, plain("last"))
        assert (await examine(past, app_name)).events == 1_201
        if not database_url.startswith("sqlite"):
            assert past._database.engine.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert caplog.text == ""
    gc.collect()


async def events_of(url: str, app: str) -> dict[tuple[str, str], Any]:
    rows = await query(
        url,
        "SELECT session_id, id, invocation_id, timestamp, event_data, event_exact FROM events"
        " WHERE app_name = :app",
        app=app,
    )
    return {(row[0], row[1]): row[2:] for row in rows}


@every_database
async def test_what_can_be_mended_is_mended_once(database_url: str, app_name: str) -> None:
    async with Past(database_url) as past:
        await make_ill(past, database_url, app_name)
    before = await events_of(database_url, app_name)
    async with SessionService(database_url, on_stale="refresh") as service:
        report = await examine(service, app_name)
        done = await repair(service, report)
        assert (done.update_times, done.calls, done.left) == (1, 2, [])
        again = await examine(service, app_name)
        left = {"orphans", "unreadable", "ties", "long_running_calls", "state_differs"}
        assert found(again) == {kind: ILL[kind] for kind in left}
        # an older report is no danger: its sessions have moved on
        stale = await repair(service, report)
        assert (stale.update_times, stale.calls) == (1, 0)
        assert [row.session_id for row in stale.left] == ["open"]
        after = await events_of(database_url, app_name)
        assert {key: after[key] for key in before} == before
        [new] = after.keys() - before.keys()
        session = await service.get_session(app_name=app_name, user_id="ann", session_id="open")
        assert session is not None
        response = session.events[-1]
        assert new == ("open", response.id)
        assert (response.author, response.invocation_id) == ("clerk", "i")
        assert response.content["role"] == "user"
        answers = [part["function_response"] for part in response.content["parts"]]
        assert [(a["id"], a["name"]) for a in answers] == [("a", "f_a"), ("c", "f_c")]
        assert all(list(a["response"]) == ["error"] for a in answers)

        other = await examine(service, f"{app_name}-2")
        done = await repair(service, other)
        assert (done.app_states, done.user_states) == (1, 1)
        done = await repair(service, other)
        assert (done.app_states, done.user_states) == (0, 0)
        assert (await examine(service, f"{app_name}-2")).healthy


async def test_two_repairs_give_one_response(database_url: str, app_name: str) -> None:
    async with Past(database_url) as past:
        session = await fill(past, app_name, "open", call("1", "a"), call("2", "b"))
    async with SessionService(database_url) as one, SessionService(database_url) as two:
        reports = [await examine(one, app_name), await examine(two, app_name)]
        done = await repair(one, reports[0])
        late = await repair(two, reports[1])
        assert (done.calls, late.calls) == (2, 0)
        # also where one of them cannot see that the session has moved on
        found = await one.get_session(app_name=app_name, user_id="ann", session_id=session.id)
        assert found is not None
        assert len(found.events) == 4
        ids = {event.id for event in found.events}
        for old in reports[1].calls:
            assert doctor._response(two, old).id in ids


# Sessions that somebody works on


async def test_a_session_in_use_is_left_alone(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service:
        session = await fill(service, app_name, "s", call("1", "a", timestamp=time.time()))
        report = await examine(service, app_name)
        assert found(report) == {"recent_calls": {"s/1"}}
        assert report.healthy
        assert (await repair(service, report)).calls == 0
        # it goes on, unharmed
        await service.append_event(session, answer("2", "a", timestamp=time.time()))
        assert found(await examine(service, app_name)) == {}


async def test_a_session_that_comes_to_life_is_left_alone(database_url: str, app_name: str) -> None:
    async with Past(database_url) as past:
        session = await fill(past, app_name, "s", call("1", "a"))
        behind = await fill(past, app_name, "behind", plain("1"), plain("2"))
        await execute(
            database_url,
            "UPDATE sessions SET update_time = create_time"
            f" WHERE app_name = '{app_name}' AND id = 'behind'",
        )
    async with SessionService(database_url) as service:
        report = await examine(service, app_name)
        assert found(report) == {"open_calls": {"s/1"}, "behind": {"behind"}}
        await service.append_event(session, answer("2", "a", timestamp=time.time()))
        behind._storage_update_marker = None
        behind.last_update_time = time.time()
        await service.append_event(behind, plain("3", timestamp=time.time()))
        done = await repair(service, report)
        assert (done.calls, done.update_times) == (0, 0)
        assert [row.session_id for row in done.left] == ["s", "behind"]
        await service.append_event(session, plain("3"))  # nobody has made it stale
        await service.append_event(behind, plain("4"))


async def test_who_appends_in_between_is_not_overtaken(
    database_url: str, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Past(database_url) as past:
        running = await fill(past, app_name, "s", call("1", "a"))
    async with SessionService(database_url, on_stale="refresh") as service:
        report = await examine(service, app_name)
        get_session = service.get_session

        async def overtaken(**which: Any) -> Any:
            session = await get_session(**which)
            await service.append_event(running, plain("2"))
            return session

        monkeypatch.setattr(service, "get_session", overtaken)
        done = await repair(service, report)
        assert (done.calls, [row.session_id for row in done.left]) == (0, ["s"])
        await service.append_event(running, answer("3", "a"), on_stale="raise")


async def test_how_old_is_for_the_caller_to_say(database_url: str, app_name: str) -> None:
    async with SessionService(database_url) as service:
        await fill(service, app_name, "s", call("1", "a", timestamp=time.time() - 1))
        report = await examine(service, app_name, idle=0)
        assert found(report) == {"open_calls": {"s/1"}}
        assert (await repair(service, report)).calls == 1


# Calls


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([call("1", "a"), answer("2", "a")], {}),
        ([answer("1", "a"), call("2", "a")], {"open_calls": {"s/2"}}),
        ([call("1", "a"), call("2", "a"), answer("3", "a")], {}),
        ([call("1", "a"), answer("2", "b")], {"open_calls": {"s/1"}}),
        (
            [call("1", "a", "b", long=("b",))],
            {"open_calls": {"s/1"}, "long_running_calls": {"s/1"}},
        ),
        ([call("1", "a", long=("a",)), answer("2", "a")], {}),
        ([call("1", "")], {}),
        ([Event(id="1", author="a", content="text", timestamp=1.0)], {}),
        ([Event(id="1", author="a", content={"parts": [None, "x", {"function_call": 1}]})], {}),
    ],
)
async def test_which_calls_are_open(
    events: list[Event], expected: dict[str, Any], database_url: str, app_name: str
) -> None:
    async with Past(database_url) as past:
        copies = [e.model_copy(update={"timestamp": HOURS_AGO}, deep=True) for e in events]
        await fill(past, app_name, "s", *copies)
        assert found(await examine(past, app_name, idle=0)) == expected


async def test_what_was_taken_back_is_not_open(database_url: str, app_name: str) -> None:
    back = EventActions.model_validate({"rewind_before_invocation_id": "two"})
    async with Past(database_url) as past:
        await fill(
            past,
            app_name,
            "s",
            call("1", "a", invocation_id="one"),
            plain("2", invocation_id="two"),
            call("3", "b", invocation_id="two"),
            call("4", "c", invocation_id="three"),
            plain("5", invocation_id="four", actions=back),
            call("6", "d", invocation_id="five"),
        )
        report = await examine(past, app_name, idle=0)
        assert found(report) == {"open_calls": {"s/1", "s/6"}}


async def test_an_unreadable_event_may_have_been_the_response(
    database_url: str, app_name: str
) -> None:
    async with Past(database_url) as past:
        delta = EventActions(state_delta={"k": 2})
        for id in ("broken", "newer"):
            events = [call("1", "a", actions=delta), answer("2", "a"), call("3", "b")]
            await fill(past, app_name, id, *(copy.deepcopy(event) for event in events))
        set_data = "UPDATE events SET event_data = :data WHERE app_name = :app AND id = '2'"
        where = {"app": app_name}
        newer = {
            **json.loads(answer("2", "a").model_dump_json()),
            "author": ["of", "another", "type"],
        }
        await execute(database_url, f"{set_data} AND session_id = 'broken'", data="{", **where)
        await execute(
            database_url, f"{set_data} AND session_id = 'newer'", data=json.dumps(newer), **where
        )
        report = await examine(past, app_name, idle=0)
        assert found(report) == {
            "unreadable": {"broken/2", "newer/2"},
            "open_calls": {"broken/3", "newer/3"},
        }


@needs_adk
@pytest.mark.filterwarnings(r"ignore:.*\[EXPERIMENTAL\]:UserWarning")
async def test_an_agent_goes_on_after_the_repair(
    database_url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from google.adk.apps import App
    from google.adk.events import Event as AdkEvent
    from google.genai import types
    from test_runner import Talk, clerk

    from adk_sessions.adk import DatabaseSessionService

    async with DatabaseSessionService(database_url) as service:
        app = App(name=app_name.replace("-", "_"), root_agent=clerk())
        talk = Talk(service, app)
        session = await talk.start()
        await talk.say("hello")
        part = types.Part(function_call=types.FunctionCall(id="c1", name="remember", args={}))
        content = types.Content(role="model", parts=[part])
        session = await _read(service, session)
        broken = AdkEvent(invocation_id="x", author="clerk", branch="b", content=content)
        await service.append_event(session, broken)
        report = await examine(service, app.name, idle=0)
        assert found(report) == {"open_calls": {f"{session.id}/{broken.id}"}}
        assert (await repair(service, report)).calls == 1
        session = await _read(service, session)
        response = session.events[-1]
        assert response.branch == "b"
        assert response.get_function_responses()[0].id == "c1"
        reply = (await talk.say("and now"))[-1]
        assert str(reply.content.parts[0].text).startswith(
            "5 seen"
        )  # the call and its response too
        assert "no matching function response" not in caplog.text
        assert (await examine(service, app.name)).healthy


async def _read(service: Any, session: Any) -> Any:
    return await service.get_session(
        app_name=session.app_name, user_id=session.user_id, session_id=session.id
    )


@needs_adk
async def test_whose_events_they_are_decides_what_can_be_read(
    database_url: str, app_name: str
) -> None:
    from adk_sessions.adk import DatabaseSessionService

    async with Past(database_url) as past, DatabaseSessionService(database_url) as adk:
        await fill(past, app_name, "s", Event(id="1", author="a", content="a text"))
        assert (await examine(past, app_name)).healthy
        assert found(await examine(adk, app_name)) == {"unreadable": {"s/1"}}
        [row] = (await examine(adk, app_name)).found["unreadable"].rows
        assert "content" in row.detail
        assert "a text" not in row.detail


# State


async def test_states_that_are_no_objects(database_url: str, app_name: str) -> None:
    async with Past(database_url) as past:
        await fill(past, app_name, "s", plain("1"))
        for table in ("sessions", "app_states", "user_states"):
            await execute(
                database_url, f"UPDATE {table} SET state = '[1]' WHERE app_name = '{app_name}'"
            )
        report = await examine(past, app_name)
        named = {tuple(row[:3]) for row in report.found["unreadable"].rows}
        assert named == {(app_name, "", ""), (app_name, "ann", ""), (app_name, "ann", "s")}


async def test_a_state_is_compared_with_the_last_that_was_set(
    database_url: str, app_name: str
) -> None:
    odd = {"nan": float("nan"), "big": 10**5000, "text": "a\0b", "user:u": 1, "temp:t": 2}
    async with Past(database_url) as past:
        first = plain("1", actions=EventActions(state_delta={"k": 1, "given": 2, **odd}))
        last = plain("2", actions=EventActions(state_delta={"k": {"a": 1, "b": 2}}))
        await fill(past, app_name, "s", first, last, state={"given": 1, "other": 1})
        assert found(await examine(past, app_name)) == {}
        # outside of the events, but recorded
        await past.update_state(
            app_name=app_name, user_id="ann", session_id="s", delta={"k": 3}, delete=["given"]
        )
        assert found(await examine(past, app_name)) == {}
        # where it is not known what a session began with: told, but nothing is wrong
        forget = f"UPDATE sessions SET initial_state = NULL WHERE app_name = '{app_name}'"
        await execute(database_url, forget)
        report = await examine(past, app_name)
        assert [row.detail for row in report.found["state_differs"].rows] == ["'given', 'k'"]
        assert report.healthy


# What surrounds the rows


@every_kind
async def test_an_index_that_is_missing(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await migrate.upgrade(url)
    drop = f"DROP INDEX {INDEX}" + (" ON events" if kind == "mariadb" else "")
    if kind == "mariadb":  # the foreign key needs one
        await execute(url, "CREATE INDEX other ON events (app_name, user_id, session_id)")
    await execute(url, drop)
    async with SessionService(url, migrate="off") as service:
        await fill(service, "a", "s", call("1", "a"))
        report = await examine(service, idle=0)
        assert report.examined
        assert found(report) == {"open_calls": {"s/1"}}
        [line] = report.schema
        assert "no index" in line
        assert not report.healthy
        with pytest.raises(SchemaError):
            await repair(service, report)
        # what the command tells people to do
        await migrate.stamp(url, "base")
        await migrate.upgrade(url)
        assert (await examine(service)).schema == []


async def test_tables_that_cannot_be_looked_at(fresh_database: NewDatabase, tmp_path: Path) -> None:
    async with SessionService(f"sqlite:///{tmp_path}/none.db", migrate="off") as service:
        assert (await examine(service)).schema == ["there is no such file: check the URL"]
    assert not (tmp_path / "none.db").exists()
    url = fresh_database("sqlite")
    async with SessionService(url, migrate="off") as service:
        await execute(url, "CREATE TABLE other (id TEXT)")
        report = await examine(service)
        assert len(report.schema) == 6
        await migrate.upgrade(url)
        await execute(url, "ALTER TABLE events DROP COLUMN event_exact")
        report = await examine(service)
        assert not report.examined
        assert not report.healthy


async def test_a_schema_and_a_prefix_of_ones_own(fresh_database: NewDatabase) -> None:
    url, place = fresh_database("postgresql"), {"schema": "agents", "table_prefix": "p_"}
    async with Past(url, **place) as past:
        await fill(past, "a", "s", call("1", "a"))
        report = await examine(past, idle=0)
        assert (report.schema, found(report)) == ([], {"open_calls": {"s/1"}})
        assert (await repair(past, report)).calls == 1


async def test_row_level_security_would_hide_rows(fresh_database: NewDatabase) -> None:
    async with SessionService(fresh_database("postgresql"), row_level_security=True) as service:
        with pytest.raises(ConfigurationError, match="row_level_security"):
            await examine(service)


@every_database
async def test_memory_does_not_grow_with_the_table(database_url: str, app_name: str) -> None:
    number = 10_000 if SOAK else 3_000
    size = 20_000
    async with Past(database_url) as past:
        await fill(past, app_name, "s", plain("0"))
    start, end = json.dumps({"author": "a", "timestamp": 1, "content": "…"}).split("\\u2026")
    numbers, id, data = {
        "sqlite": (
            "(WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c"
            f" WHERE n < {number}) SELECT n FROM c)",
            "CAST(n AS TEXT)",
            f"'{start}' || hex(zeroblob({size // 2})) || '{end}'",
        ),
        "postgresql": (
            f"(SELECT n FROM generate_series(1, {number}) AS g(n))",
            "CAST(n AS TEXT)",
            f"CAST(concat('{start}', repeat('x', {size}), '{end}') AS JSONB)",
        ),
        "mysql": (
            f"(SELECT seq AS n FROM seq_1_to_{number})",
            "CAST(n AS CHAR)",
            f"concat('{start}', repeat('x', {size}), '{end}')",
        ),
    }[make_url(database_url).get_backend_name()]
    async with engine_for(database_url) as engine, engine.begin() as conn:
        await conn.exec_driver_sql(
            "INSERT INTO events"
            " (id, app_name, user_id, session_id, invocation_id, timestamp, event_data)"
            f" SELECT {id}, '{app_name}', 'ann', 's', 'i', '2020-01-01 00:00:00.000000', {data}"
            f" FROM {numbers} AS numbers"
        )
    async with SessionService(database_url, migrate="off") as service:
        tracemalloc.start()
        try:
            report = await examine(service, app_name, rows=10)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert report.events == number + 1
    assert report.found["ties"].count == number - 1
    assert peak < 50e6 < number * size


def test_sessions_to_be_looked_at_again_are_not_kept_in_memory() -> None:
    key = Key("a" * 100, "u" * 100, "s" * 100)
    tracemalloc.start()
    try:
        look = doctor._Look(SessionService("sqlite://"), EPOCH, 10)
        with closing(look.doubtful):
            for _ in range(10_000):
                look.doubt(key, ["a key\ud800"])
            _, peak = tracemalloc.get_traced_memory()
            look.doubtful.seek(0)
            assert (
                sum(json.loads(line) == [*key, ["a key\ud800"]] for line in look.doubtful) == 10_000
            )
    finally:
        tracemalloc.stop()
    assert peak < 3e6
