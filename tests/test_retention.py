"""prune: what is old goes, what is new stays whole, whoever writes meanwhile."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from everywhere import EVERY_DATABASE, place_of
from sqlalchemy import Connection, func, make_url, null, select, update
from sqlalchemy.event import listen, remove
from workers import Crew, Record, event, load, read_all

from adk_sessions import (
    ConfigurationError,
    Event,
    EventActions,
    InvalidInputError,
    Session,
    SessionNotFoundError,
    SessionService,
    StateUnknownError,
    clock,
    codec,
    replay,
    retention,
)
from adk_sessions.dialects.faults import Undecided
from adk_sessions.dialects.retention import Criteria
from adk_sessions.dialects.rows import Key
from adk_sessions.retention import PruneReport

DAY = 86_400.0
NOW = 1_800_000_000.0
NOW_TIME = clock.to_datetime(NOW)


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


def set_clock(service: SessionService, now: float) -> None:
    service._now = lambda: now  # type: ignore[method-assign]


async def make(
    service: SessionService,
    app: str,
    id: str,
    *,
    user: str = "ann",
    created: float = NOW,
    updated: float | None = None,
    events: int = 1,
    state: dict[str, Any] | None = None,
) -> Session:
    """A session of so many events, all at the time of the last; event n sets ``n`` and ``last``."""
    set_clock(service, created)
    session = await service.create_session(app_name=app, user_id=user, session_id=id, state=state)
    time = created if updated is None else updated
    await service.append_events(
        session,
        [event(f"{id}-{n}", {f"k{n}": n, "last": n}, timestamp=time) for n in range(events)],
    )
    set_clock(service, NOW)
    return session


async def left(service: SessionService, app: str) -> list[str]:
    found = await service.list_sessions(app_name=app, archived=None)
    return sorted(session.id for session in found.sessions)


async def counts(service: SessionService, app: str) -> tuple[int, int, int]:
    """Rows of sessions, events and state changes."""
    m = service.models

    def count(conn: Any) -> tuple[int, ...]:
        return tuple(
            conn.execute(
                select(func.count()).select_from(table).where(table.c.app_name == app)
            ).scalar_one()
            for table in (m.sessions, m.events, m.state_changes)
        )

    sessions, events, changes = await service._run(count, write=False)
    return sessions, events, changes


async def past(service: SessionService, session: Session) -> replay.Past:
    """What is recorded of a session's state."""
    key = Key(session.app_name, session.user_id, session.id)

    def read(conn: Any) -> replay.Past:
        statements = service._statements
        found = statements.read(conn, key, limit=None, after=None, epoch=0.0)
        begin = statements.beginning(conn, key, lock=False)
        assert found is not None
        return replay.Past(
            None if begin.initial_state is None else codec.load_state(begin.initial_state),
            [replay.step(e.timestamp, e.invocation_id, e.data, e.exact) for e in found.events],
            [replay.made(*change) for change in statements.recorded_changes(conn, key)],
            codec.load_state(found.states.session),
        )

    return await service._run(read, write=False)


async def history(service: SessionService, session: Session) -> dict[str, dict[str, Any] | None]:
    """The state right after each of its events, None where it cannot be told."""
    whole = await load(service, session.app_name, session.user_id, session.id)
    recorded = await past(service, session)
    found: dict[str, dict[str, Any] | None] = {}
    for n, one in enumerate(whole.events, 1):
        try:
            found[one.id] = replay.state_after(recorded, n)
        except StateUnknownError:
            found[one.id] = None
    return found


# --- what goes -----------------------------------------------------------------------------------


async def test_each_criterion_and_all_of_them(service: SessionService, app_name: str) -> None:
    # the number of events says which went
    bits = {"old": 1, "old-and-busy": 2, "young": 4, "archived": 8, "new": 16}
    born = {"old": 30, "old-and-busy": 30, "young": 2, "archived": 2, "new": 0}
    for id, bit in bits.items():
        created = NOW - born[id] * DAY
        updated = NOW - 60 if id == "old-and-busy" else None
        await make(service, app_name, id, created=created, updated=updated, events=bit)
    await service.archive_session(app_name, "ann", "archived")
    every = await left(service, app_name)

    async def gone(**criteria: Any) -> list[str]:
        report = await service.prune(app_name, dry_run=True, **criteria)
        found = sorted(id for id, bit in bits.items() if report.events & bit)
        assert report == PruneReport(len(found), sum(bits[id] for id in found))
        return found

    assert await gone() == []
    assert await gone(archived_only=True) == []
    assert await gone(idle_for=DAY) == ["archived", "old", "young"]
    assert await gone(older_than=10 * DAY) == ["old", "old-and-busy"]
    assert await gone(older_than=10 * DAY, idle_for=DAY) == ["old"]
    assert await gone(idle_for=DAY, archived_only=True) == ["archived"]
    assert await gone(older_than=10 * DAY, archived_only=True) == []
    # events of one time lie microseconds apart
    assert await gone(older_than=0) == ["archived", "new", "old", "old-and-busy", "young"]
    assert await left(service, app_name) == every

    report = await service.prune(app_name, idle_for=timedelta(days=1), archived_only=True)
    assert report == PruneReport(sessions=1, events=8)
    report = await service.prune(app_name, older_than=10 * DAY, idle_for=timedelta(hours=24))
    assert report == PruneReport(sessions=1, events=1)
    assert await left(service, app_name) == ["new", "old-and-busy", "young"]
    assert await service.prune(app_name, idle_for=10**12) == PruneReport()
    assert await service.prune(app_name, older_than=0) == PruneReport(sessions=3, events=22)
    assert await counts(service, app_name) == (0, 0, 0)


async def test_the_limits_are_exact(service: SessionService, app_name: str) -> None:
    await make(service, app_name, "s", created=NOW - 100.25)
    assert (await service.prune(app_name, idle_for=100.250002)).sessions == 0
    assert (await service.prune(app_name, older_than=100.250002)).sessions == 0
    # the event that came at the same time has moved the session on by a microsecond
    assert (await service.prune(app_name, idle_for=100.249, older_than=100.25)).sessions == 1


async def test_no_other_app_is_touched(service: SessionService, app_name: str) -> None:
    others = (app_name + "x", app_name.upper(), app_name + " ")
    for app in (app_name, *others):
        await make(service, app, "s", created=NOW - DAY, events=3, state={"app:a": 1, "user:b": 2})
        await service.update_session(app, "ann", "s", expire_time=NOW - 1)
    assert await service.prune(app_name, idle_for=0) == PruneReport(1, 3)
    assert await service.prune(app_name, keep_last=1) == PruneReport()
    for app in others:
        assert await counts(service, app) == (1, 3, 0)
    # what sessions share stays
    assert await service.get_app_state(app_name=app_name) == {"a": 1}
    assert await service.get_user_state(app_name=app_name, user_id="ann") == {"b": 2}


async def test_what_has_expired_goes_with_any_call(service: SessionService, app_name: str) -> None:
    for id in ("past", "now", "later", "never", "changed"):
        await make(service, app_name, id, events=4)
    for id, time in (("past", 1.0), ("now", NOW), ("later", NOW + 0.000_01), ("changed", 1.0)):
        await service.update_session(app_name, "ann", id, expire_time=time)
    await service.update_session(app_name, "ann", "changed", expire_time=None)
    whole = PruneReport(sessions=2, events=8)
    for criteria in ({}, {"archived_only": True}, {"idle_for": DAY}, {"older_than": DAY}):
        assert await service.prune(app_name, **criteria, dry_run=True) == whole
    cut = await service.prune(app_name, keep_last=3, dry_run=True)
    assert cut == PruneReport(sessions=2, events=11, trimmed=3)
    assert await service.prune(app_name) == whole
    assert await left(service, app_name) == ["changed", "later", "never"]
    assert await service.prune(app_name) == PruneReport()


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *(("idle_for", {"idle_for": value}) for value in (-1, math.nan, math.inf, "1", True)),
    *(("older_than", {"older_than": value}) for value in (timedelta(-1), [], math.inf)),
    *(("keep_last", {"keep_last": value}) for value in (0, -1, 1.0, True, "1")),
    ("app_name", {"app_name": "a" * 129}),
    ("app_name", {"app_name": None}),
]


async def test_bad_input_removes_nothing(service: SessionService, app_name: str) -> None:
    await make(service, app_name, "s", created=NOW - DAY, events=3)
    for field, arguments in REFUSED:
        with pytest.raises(InvalidInputError) as raised:
            await service.prune(**{"app_name": app_name, "older_than": 0, **arguments})
        assert raised.value.field == field, arguments
    assert await counts(service, app_name) == (1, 3, 0)


# --- batches -------------------------------------------------------------------------------------


async def test_many_sessions_go_in_batches_and_a_broken_off_call_is_repeated(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 4)
    for n in range(10):
        # ids sort otherwise than they were made, and several users have the same
        await make(service, app_name, f"s{n % 5}", user=f"u{n // 5}", created=NOW - DAY, events=2)
    await service.update_state(app_name=app_name, user_id="u0", session_id="s0", delta={"a": 1})
    await make(service, app_name, "new", user="u0")
    seen: list[tuple[int, int]] = []

    def give_up(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 4:
            raise KeyboardInterrupt

    expected = await service.prune(app_name, idle_for=60, dry_run=True)
    assert expected == PruneReport(sessions=10, events=20, state_changes=1)
    with pytest.raises(KeyboardInterrupt):
        await service.prune(app_name, idle_for=60, progress=give_up)
    assert seen == [(4, 10), (8, 10)]
    assert await counts(service, app_name) == (3, 5, 0)
    assert await service.prune(app_name, idle_for=60) == PruneReport(sessions=2, events=4)
    assert await left(service, app_name) == ["new"]


async def test_sessions_are_looked_for_a_few_at_a_time(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users with fewer sessions than a statement looks at, as many, and more; most must stay."""
    monkeypatch.setattr(retention, "LOOK", 3)
    monkeypatch.setattr(retention, "BATCH", 2)
    set_clock(service, NOW - DAY)
    for user, number in (("a", 1), ("b", 3), ("c", 7), ("d", 2)):
        for n in range(number):
            await service.create_session(app_name=app_name, user_id=user, session_id=f"{user}{n}")
    await service.create_session(app_name=app_name + "x", user_id="b", session_id="b0")
    set_clock(service, NOW)
    for id in ("b0", "c2", "c5", "c6"):
        await service.update_session(app_name, id[0], id, expire_time=NOW)
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    assert await service.prune(app_name, dry_run=True) == PruneReport(sessions=4)
    assert await service.prune(app_name, idle_for=60, dry_run=True) == PruneReport(sessions=13)
    assert await service.prune(app_name, progress=note) == PruneReport(sessions=4)
    assert (seen[-1], len(await left(service, app_name))) == ((4, 4), 9)
    assert await service.prune(app_name, older_than=60) == PruneReport(sessions=9)
    assert await left(service, app_name + "x") == ["b0"]


@SQLITE
async def test_no_statement_looks_at_more_than_that(service: SessionService, app_name: str) -> None:
    await service.create_session(app_name=app_name, user_id="ann")
    for criteria in (
        Criteria(NOW_TIME),
        Criteria(NOW_TIME, NOW_TIME),
        Criteria(NOW_TIME, keep_last=5),
    ):
        for after in ((), ("ann",), ("ann", "s")):
            lines = await service._run(partial(explained, service, criteria, after), write=False)
            assert not [line for line in lines if "TEMP B-TREE" in line], lines
            assert not [line for line in lines if line.startswith("SCAN sessions")], lines
            searches = [line for line in lines if "SEARCH sessions" in line]
            columns = ["app_name=?", "user_id=?" if len(after) == 2 else "user_id>?", "id>?"]
            wanted = " AND ".join(columns[: len(after) + 1])
            assert len(searches) == 2
            assert all(line.endswith(f"({wanted})") for line in searches), searches


def explained(
    service: SessionService, criteria: Criteria, after: tuple[str, ...], conn: Connection
) -> list[str]:
    """The plan of looking for sessions, as SQLite tells it."""
    found: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, sql: str, parameters: Any, *___: Any) -> None:
        found.append((sql, parameters))

    listen(conn, "before_cursor_execute", note)
    service._statements.prunable(conn, "a", None, criteria, after, 10)
    remove(conn, "before_cursor_execute", note)
    (sql, parameters), *_ = found
    return [row[-1] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", parameters)]


async def test_events_go_where_no_foreign_key_takes_them(
    service: SessionService, app_name: str
) -> None:
    """With thousands of ids, more than a statement takes at once."""
    session = await make(service, app_name, "s", events=1_300)
    assert await service.prune(app_name, keep_last=1) == PruneReport(events=1_299, trimmed=1)
    found = await load(service, app_name, "ann", "s")
    assert [one.id for one in found.events] == ["s-1299"]
    await service.append_event(session, event("next", {}))
    assert await service.prune(app_name, older_than=0) == PruneReport(sessions=1, events=2)


async def test_a_session_that_somebody_appends_to_meanwhile_is_left_alone(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [await make(service, app_name, f"s{n}", created=NOW - DAY) for n in range(3)]
    removed = service._removed

    async def append_first(*args: Any, **options: Any) -> Any:
        await service.append_event(held[1], event("meanwhile", {}, timestamp=NOW))
        return await removed(*args, **options)

    monkeypatch.setattr(service, "_removed", append_first)
    assert await service.prune(app_name, idle_for=60) == PruneReport(sessions=2, events=2)
    assert await left(service, app_name) == ["s1"]
    await service.append_event(held[1], event("after", {}, timestamp=NOW))
    with pytest.raises(SessionNotFoundError):
        await service.append_event(held[0], event("after", {}, timestamp=NOW))


async def test_a_commit_whose_answer_was_lost_is_repeated(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(2):
        await make(service, app_name, f"s{n}", created=NOW - DAY, events=3)
    run, lost = service._database.run, 0

    async def broken(work: Any, **options: Any) -> Any:
        nonlocal lost
        result = await run(work, **options)
        if options.get("once"):
            lost += 1
            if lost % 2:
                raise Undecided(ConnectionResetError())
        return result

    monkeypatch.setattr(service._database, "run", broken)
    await service.prune(app_name, keep_last=2)
    assert await counts(service, app_name) == (2, 4, 0)
    await service.prune(app_name, idle_for=0)
    assert await counts(service, app_name) == (0, 0, 0)


async def test_row_level_security_refuses_it(postgres_url: str, app_name: str) -> None:
    async with SessionService(postgres_url) as owner:
        await make(owner, app_name, "s", created=NOW - DAY)
        bound = SessionService(postgres_url, row_level_security=True, migrate="off")
        async with bound:
            with pytest.raises(ConfigurationError, match="row_level_security"):
                await bound.prune(app_name, idle_for=0)
        assert await left(owner, app_name) == ["s"]


# --- keep_last -----------------------------------------------------------------------------------


async def test_a_session_is_cut_to_its_newest_events(
    service: SessionService, app_name: str
) -> None:
    long = await make(service, app_name, "long", created=NOW - DAY, events=8, state={"a": 1})
    short = await make(service, app_name, "short", created=NOW - DAY, events=3)
    await make(service, app_name, "busy", created=NOW - DAY, updated=NOW - 1, events=5)
    before = await load(service, app_name, "ann", "long")
    was = await history(service, long)
    expected = PruneReport(events=5, trimmed=1)
    assert await service.prune(app_name, idle_for=60, keep_last=3, dry_run=True) == expected
    assert (await counts(service, app_name))[1] == 16
    assert await service.prune(app_name, idle_for=60, keep_last=3) == expected
    assert await service.prune(app_name, idle_for=60, keep_last=3) == PruneReport()
    after = await load(service, app_name, "ann", "long")
    assert after.events == before.events[5:]
    # all of its state and its revision are what they were
    assert (after.state, after.last_update_time) == (before.state, before.last_update_time)
    # and so is what is told of its past
    kept = await history(service, long)
    assert list(kept) == ["long-5", "long-6", "long-7"]
    assert kept == {id: was[id] for id in kept}
    assert kept["long-5"] == {"a": 1, **{f"k{n}": n for n in range(6)}, "last": 5}
    # those who held it go on
    for session in (long, short):
        await service.append_event(session, event("next", {"next": 1}, timestamp=NOW))
    assert len((await load(service, app_name, "ann", "long")).events) == 4
    assert await service.prune(app_name, keep_last=3) == PruneReport(events=4, trimmed=3)


async def test_only_archived_sessions_are_cut(service: SessionService, app_name: str) -> None:
    for id in ("a", "b"):
        await make(service, app_name, id, events=4)
    await service.archive_session(app_name, "ann", "b")
    report = await service.prune(app_name, keep_last=1, archived_only=True)
    assert report == PruneReport(events=3, trimmed=1)
    assert len((await load(service, app_name, "ann", "a")).events) == 4


async def test_changes_without_an_event_are_folded_in(
    service: SessionService, app_name: str
) -> None:
    set_clock(service, NOW)
    session = await service.create_session(
        app_name=app_name, user_id="ann", session_id="s", state={"start": "Ü\0", "gone": 1}
    )
    key = {"app_name": app_name, "user_id": "ann", "session_id": "s"}
    await service.update_state(**key, delta={"early": math.inf})
    for n in range(4):
        await service.append_event(session, event(f"e{n}", {"n": n, f"e{n}": [n]}))
        await service.update_state(**key, add={"sum": 1}, delta={"n": -n}, delete=["gone"])
    was, state = await history(service, session), (await load(service, *key.values())).state
    assert was["e2"] == {
        "start": "Ü\0", "early": math.inf, "n": 2, "e0": [0], "e1": [1], "e2": [2], "sum": 2,
    }  # fmt: skip
    report = await service.prune(app_name, keep_last=2)
    # before the first event, after e0 and after e1
    assert report == PruneReport(events=2, trimmed=1, state_changes=3)
    kept = await history(service, session)
    assert kept == {id: was[id] for id in ("e2", "e3")}
    assert (await past(service, session)).initial == {
        "start": "Ü\0", "early": math.inf, "n": -1, "e0": [0], "e1": [1], "sum": 2,
    }  # fmt: skip
    assert (await load(service, *key.values())).state == state
    # a second time on top of the first
    assert await service.prune(app_name, keep_last=1) == PruneReport(0, 1, 1, 1)
    assert await history(service, session) == {"e3": was["e3"]}


def said(id: str, *parts: dict[str, Any], **actions: Any) -> Event:
    return Event(
        id=id,
        author="agent",
        invocation_id=id[0],
        content={"parts": list(parts)},
        actions=EventActions(**actions),
    )


def call(id: str) -> dict[str, Any]:
    return {"function_call": {"id": id, "name": "f", "args": {}}}


def response(id: str) -> dict[str, Any]:
    return {"function_response": {"id": id, "name": "f", "response": {}}}


HISTORIES: dict[str, tuple[list[Event], int, int]] = {
    # events, keep_last, how many are kept
    "a response keeps its call": (
        [said("a1"), said("a2", call("x")), said("b1"), said("b2", response("x")), said("c1")],
        2, 4,
    ),
    "and what belongs to what lies between": (
        [
            said("a0"), said("a1", call("y")), said("a2", call("x")), said("b1", response("y")),
            said("b2", response("x")), said("c1"),
        ],
        2, 5,
    ),
    "a call that waits for its response is an event like others": (
        [said("a1", call("x")), said("b1"), said("c1")], 1, 1,
    ),
    "a response without a call too": ([said("a1"), said("b1", response("x")), said("c1")], 2, 2),
    "a pair goes together": (
        [said("a1", call("x")), said("a2", response("x")), said("b1")], 1, 1,
    ),
    "one between the two of a pair is kept with both": (
        [said("a1", call("x")), said("a2", response("x")), said("b1")], 2, 3,
    ),
    "a rewind keeps all that it takes back": (
        [
            said("a1"), said("b1"), said("b2"), said("c1"),
            said("d1", rewind_before_invocation_id="b"), said("e1"),
        ],
        2, 5,
    ),
    "after a rewind it may be cut": (
        [said("a1"), said("b1"), said("c1", rewind_before_invocation_id="b"), said("d1")], 1, 1,
    ),
}  # fmt: skip


async def test_what_belongs_together_is_kept_together(
    service: SessionService, app_name: str
) -> None:
    set_clock(service, NOW)
    for id, (events, _, _) in HISTORIES.items():
        session = await service.create_session(app_name=app_name, user_id="ann", session_id=id)
        await service.append_events(session, [one.model_copy(deep=True) for one in events])
    for id, (events, keep, kept) in HISTORIES.items():
        app = f"{app_name}-{len(id)}"
        session = await service.create_session(app_name=app, user_id="ann", session_id=id)
        await service.append_events(session, [one.model_copy(deep=True) for one in events])
        gone = len(events) - kept
        expected = PruneReport(events=gone, trimmed=min(gone, 1))
        assert await service.prune(app, keep_last=keep, dry_run=True) == expected, id
        assert await service.prune(app, keep_last=keep) == expected, id
        found = await load(service, app, "ann", id)
        assert [one.id for one in found.events] == [one.id for one in events[gone:]], id


async def test_a_cut_goes_step_by_step_and_each_is_sound(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after any step: what belongs together is, and the past is told as before."""
    monkeypatch.setattr(retention, "STEP", 3)
    set_clock(service, NOW)
    session = await service.create_session(
        app_name=app_name, user_id="ann", session_id="s", state={"start": 1}
    )
    parts: dict[int, list[dict[str, Any]]] = {4: [call("x")], 9: [response("x")], 14: [call("y")]}
    for n in range(20):
        one = said(f"e{n}", *parts.get(n, []), state_delta={"n": n, f"k{n % 5}": n})
        one.invocation_id = f"i{n // 2}"
        if n == 17:  # takes back what came with 16
            one.actions = EventActions.model_validate(
                {"rewind_before_invocation_id": "i8", "state_delta": {"n": 15, "k1": 11}}
            )
        await service.append_event(session, one)
        if n in (2, 9):
            await service.update_state(
                app_name=app_name, user_id="ann", session_id="s", add={"c": 1}, delete=["k1"]
            )
    whole = await load(service, app_name, "ann", "s")
    was = await history(service, session)
    repeated, steps = service._repeated, 0

    async def break_off(work: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps % 2 == 0:
            raise KeyboardInterrupt
        return await repeated(work)

    monkeypatch.setattr(service, "_repeated", break_off)
    kept = []
    total = await service.prune(app_name, keep_last=2, dry_run=True)
    for _ in range(7):
        with suppress(KeyboardInterrupt):
            await service.prune(app_name, keep_last=2)
        told = await history(service, session)
        assert told == {id: was[id] for id in told}
        found = await load(service, app_name, "ann", "s")
        assert (found.events, found.state) == (whole.events[-len(told) :], whole.state)
        kept.append(len(told))
    # 4 goes with 9, and 16 with 17
    assert kept == [17, 16, 10, 7, 4, 2, 2]
    assert total == PruneReport(events=18, trimmed=1, state_changes=2)
    assert (await counts(service, app_name))[1:] == (2, 0)


async def test_a_cut_is_found_out_again_when_somebody_appends(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await make(service, app_name, "s", events=5)
    cutting, met = service._cutting, 0
    repeated = service._repeated

    def meet(*args: Any) -> Any:
        nonlocal met
        met += 1
        return cutting(*args)

    async def append_first(work: Any) -> Any:
        if met == 1:
            # a response to a call that was about to go
            await service.append_event(session, event("meanwhile", {"m": 1}))
        return await repeated(work)

    monkeypatch.setattr(service, "_cutting", meet)
    monkeypatch.setattr(service, "_repeated", append_first)
    assert await service.prune(app_name, keep_last=2) == PruneReport(events=4, trimmed=1)
    assert met == 2
    assert list(await history(service, session)) == ["s-4", "meanwhile"]


async def test_what_another_cut_has_taken_is_not_folded_again(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the session begins as before: what is read at last is not what was read at first."""
    set_clock(service, NOW)
    session = await service.create_session(
        app_name=app_name, user_id="ann", session_id="s", state={"k": 1}
    )
    await service.append_event(session, event("e0", {"k": 2}))
    await service.update_state(app_name=app_name, user_id="ann", session_id="s", delta={"k": 1})
    for n in range(1, 4):
        await service.append_event(session, event(f"e{n}", {}))
    key, read = Key(app_name, "ann", "s"), service._statements.read
    old = await service._run(
        lambda conn: read(conn, key, limit=None, after=None, epoch=0.0), write=False
    )
    assert await service.prune(app_name, keep_last=2) == PruneReport(0, 2, 1, 1)
    found = [old]
    monkeypatch.setattr(
        service._statements,
        "read",
        lambda *args, **options: found.pop() if found else read(*args, **options),
    )
    assert await service.prune(app_name, keep_last=1) == PruneReport(events=1, trimmed=1)
    assert (await past(service, session)).initial == {"k": 1}
    assert await history(service, session) == {"e3": {"k": 1}}


async def test_two_who_cut_at_once_fold_each_event_once(
    service: SessionService, app_name: str
) -> None:
    sessions = [await make(service, app_name, f"s{n}", events=12) for n in range(3)]
    was = [await history(service, session) for session in sessions]
    await asyncio.gather(*(service.prune(app_name, keep_last=keep) for keep in (9, 6, 3, 3)))
    await service.prune(app_name, keep_last=3)
    for session, told in zip(sessions, was, strict=True):
        kept = await history(service, session)
        assert len(kept) == 3
        assert kept == {id: told[id] for id in kept}


# --- what other software has left ----------------------------------------------------------------


async def forget_the_start(service: SessionService, session: Session) -> None:
    """As if another kind of software had made the session."""
    s = service.models.sessions
    start = update(s).where(s.c.app_name == session.app_name, s.c.id == session.id)
    await service._run_once(lambda conn: conn.execute(start.values(initial_state=null())))


async def test_an_unknown_start_is_recorded_where_it_can_be_told(
    service: SessionService, app_name: str
) -> None:
    set_clock(service, NOW)
    session = await service.create_session(
        app_name=app_name, user_id="ann", session_id="s", state={"a": 0, "never": 1}
    )
    await service.append_event(session, event("e0", {"a": 1}))
    await service.append_event(session, event("e1", {"a": 2}))
    await service.append_event(session, event("e2", {"a": 3, "b": 1}))
    await service.append_event(session, event("e3", {"a": 4}))
    was = await history(service, session)
    await forget_the_start(service, session)
    # what b was before e2 nobody knows
    assert await service.prune(app_name, keep_last=3) == PruneReport(events=1, trimmed=1)
    assert (await past(service, session)).initial is None
    told = await history(service, session)
    assert told == {"e1": None, "e2": was["e2"], "e3": was["e3"]}
    assert await service.prune(app_name, keep_last=1) == PruneReport(events=2, trimmed=1)
    assert (await past(service, session)).initial == {"a": 3, "b": 1, "never": 1}
    assert await history(service, session) == {"e3": was["e3"]}


async def test_a_start_that_cannot_be_folded_into_is_no_longer_told(
    service: SessionService, app_name: str
) -> None:
    session = await make(service, app_name, "s", events=4, state={"a": 1})
    e = service.models.events
    damaged = update(e).where(e.c.app_name == app_name, e.c.id == "s-1")
    broken = service._statements.as_json("v_text")
    await service._run_once(
        lambda conn: conn.execute(damaged.values(event_data=broken), {"v_text": '{"actions":1}'})
    )
    assert await service.prune(app_name, keep_last=2) == PruneReport(events=2, trimmed=1)
    assert (await past(service, session)).initial is None
    assert len((await load(service, app_name, "ann", "s")).events) == 2


async def test_a_session_whose_time_was_moved_back(service: SessionService, app_name: str) -> None:
    """As google-adk's own service does on a host whose clock is behind."""
    session = await make(service, app_name, "s", events=4)
    s = service.models.sessions
    back = update(s).where(s.c.app_name == app_name).values(update_time=clock.to_datetime(NOW - 90))
    await service._run_once(lambda conn: conn.execute(back))
    assert await service.prune(app_name, idle_for=100) == PruneReport()
    assert await service.prune(app_name, idle_for=80, keep_last=2) == PruneReport(0, 2, 1)
    found = await load(service, app_name, "ann", "s")
    assert [one.id for one in found.events] == ["s-2", "s-3"]
    assert clock.to_epoch(await revision(service, app_name)) == NOW - 90
    await service.append_event(found, event("next", {}, timestamp=NOW))
    assert [*await history(service, session)][-1] == "next"


async def revision(service: SessionService, app: str) -> Any:
    s = service.models.sessions.c
    found = select(s.update_time).where(s.app_name == app)
    return await service._run(lambda conn: conn.execute(found).scalar_one(), write=False)


@SQLITE
async def test_numbers_in_columns_of_times_are_times(
    service: SessionService, app_name: str
) -> None:
    """google-adk has left such; SQLite sorts them before any text."""
    for id in ("idle", "busy"):
        await make(service, app_name, id, events=4)
    file = make_url(str(service._database.engine.url)).database or ""
    with closing(sqlite3.connect(file)) as conn:
        for id, time in (("idle", NOW - DAY), ("busy", NOW)):
            conn.execute("UPDATE sessions SET update_time = ? WHERE id = ?", (time, id))
        conn.execute("UPDATE events SET timestamp = ? WHERE id = 'busy-2'", (NOW + 0.000_003,))
        conn.commit()
    read = [one.id for one in (await load(service, app_name, "ann", "busy")).events]
    assert await service.prune(app_name, idle_for=60, dry_run=True) == PruneReport(1, 4)
    assert await service.prune(app_name, keep_last=2) == PruneReport(events=4, trimmed=2)
    assert [one.id for one in (await load(service, app_name, "ann", "busy")).events] == read[2:]
    assert await service.prune(app_name, idle_for=60) == PruneReport(1, 2)
    assert await left(service, app_name) == ["busy"]


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_with_google_adks_types(database_url: str, app_name: str) -> None:
    pytest.importorskip("google.adk")
    from google.adk.events import Event as AdkEvent
    from google.adk.events import EventActions as AdkActions
    from google.adk.sessions import DatabaseSessionService as Stock
    from google.genai import types

    from adk_sessions.adk import DatabaseSessionService

    driver = "sqlite+aiosqlite" if database_url.startswith("sqlite") else "postgresql+asyncpg"
    stock_url = make_url(database_url).set(drivername=driver)
    key = {"app_name": app_name, "user_id": "ann", "session_id": "s"}
    asks = types.Part(function_call=types.FunctionCall(id="c", name="f", args={}))
    answers = types.Part(function_response=types.FunctionResponse(id="c", name="f", response={}))
    async with (
        DatabaseSessionService(database_url) as ours,
        Stock(stock_url.render_as_string(hide_password=False)) as stock,
    ):
        await ours.prepare_tables()
        session = await stock.create_session(**key, state={"a": 0})
        for n, part in enumerate((None, None, asks, None, answers, None)):
            await stock.append_event(
                session,
                AdkEvent(
                    author="agent",
                    id=f"e{n}",
                    content=types.Content(role="model", parts=[part]) if part else None,
                    actions=AdkActions(state_delta={"a": n}),
                ),
            )
        report = await ours.prune(app_name, keep_last=2)
        assert (report.events, report.trimmed) == (2, 1)
        # who runs a turn on either service goes on
        await stock.append_event(session, AdkEvent(author="user", id="next"))
        found = await ours.get_session(**key)
        assert found is not None
        assert [e.id for e in found.events] == ["e2", "e3", "e4", "e5", "next"]
        await ours.append_event(found, AdkEvent(author="user", id="last"))
        read = await stock.get_session(**key)
        assert read is not None
        assert (len(read.events), read.state) == (6, {"a": 5})
        assert (await ours.prune(app_name, idle_for=0)).sessions == 1
        assert await stock.get_session(**key) is None


# --- beside writers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb", "generic"])
async def test_beside_writers_in_other_processes_nothing_that_lives_is_lost(
    kind: str,
    processes: Crew,
    request: pytest.FixtureRequest,
    fresh_database: Callable[[str], str],
    app_name: str,
    tmp_path: Path,
) -> None:
    """Two processes append, one cuts their sessions, and the idle ones beside them go."""
    url, options = place_of(kind, request, fresh_database)
    async with SessionService(url, **options) as service:
        shared = [
            (await service.create_session(app_name=app_name, user_id="ann")).id for _ in range(3)
        ]
        set_clock(service, NOW)
        for n in range(30):
            await make(service, app_name, f"idle-{n}", created=1e9 + n, events=2)
        service._now = type(service)._now.__get__(service)  # type: ignore[method-assign]
        stop = str(tmp_path / "stop")
        jobs = [
            {"app": app_name, "user": "ann", "writer": f"p{n}", "sessions": shared, "appends": 15}
            | {"stop": stop, "offset": n * 3600.0}
            for n in range(2)
        ]
        processes.open(url, **options)
        writing = asyncio.get_running_loop().run_in_executor(None, processes.run, "share", jobs)
        # the writers' clocks are an hour apart; nobody is idle for a day
        reports: list[PruneReport] = []
        while sum(report.trimmed for report in reports) < 8:
            reports.append(await service.prune(app_name, idle_for=DAY))
            reports.append(await service.prune(app_name, keep_last=4))
        Path(stop).touch()
        record = Record.of(await writing)
        processes.close()
        total = PruneReport(*(sum(getattr(r, name) for r in reports) for name in FIELDS))
        assert (total.sessions, len(await left(service, app_name))) == (30, 3)
        appended = {call.event: call for call in record.calls}
        kept = {read.session: read.events for read in await read_all(service, app_name)}
        # every event is there, but those that were cut off, which were counted
        assert sum(map(len, kept.values())) == len(appended) + 60 - total.events
        assert total.events > 60, "nothing was cut meanwhile"
        for id, events in kept.items():
            assert all(appended[one].session == id for one in events)
            session = await load(service, app_name, "ann", id)
            sets = [call for call in record.calls if call.session == id]
            # the keys of all its events are in its state, and told of its past
            own = {
                key for call in sets for key in call.delta if not key.startswith(("app", "user"))
            }
            assert own == {key for key in session.state if not key.startswith(("app", "user"))}
            told = await history(service, session)
            assert told[events[-1]] == {key: session.state[key] for key in own}


FIELDS = ("sessions", "events", "trimmed", "state_changes")
