"""A session as it was: read at an earlier event, and forked there."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from engines import engine_for
from everywhere import EVERY_DATABASE, place_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from rows import execute, query
from sqlalchemy import make_url, text
from sqlalchemy.util import await_only
from workers import event as event_of
from workers import in_each_scope, load

from adk_sessions import (
    AlreadyExistsError,
    Event,
    EventNotFoundError,
    GetSessionConfig,
    InvalidInputError,
    OutcomeUnknownError,
    Session,
    SessionArchivedError,
    SessionNotFoundError,
    SessionService,
    StaleSessionError,
    StateUnknownError,
)
from adk_sessions.dialects.faults import Undecided

HARD = {"nan": float("nan"), "big": 1e16, "zero": -0.0, "nul": "a\0b", "deep": [{"x": None}], "": 1}


# For what is done to rows behind the service's back: nobody else can reach a database in memory.
REACHABLE = ["sqlite", "postgresql", "mariadb", "generic"]
reachable = pytest.mark.parametrize("place", REACHABLE, indirect=True)
# For what the service does by itself.
one_of_each_kind = pytest.mark.parametrize("place", ["sqlite-memory", "postgresql"], indirect=True)


@pytest.fixture(params=EVERY_DATABASE)
def place(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> tuple[str, dict[str, Any]]:
    url, options = place_of(request.param, request, fresh_database)
    if request.param == "sqlite":  # a file for each test, but migrated only once
        shutil.copy(request.getfixturevalue("migrated_file"), make_url(url).database or "")
    return url, options


@pytest.fixture
async def service(place: tuple[str, dict[str, Any]]) -> AsyncIterator[SessionService]:
    url, options = place
    async with SessionService(url, **options) as service:
        yield service


@pytest.fixture
async def session(service: SessionService, app_name: str) -> Session:
    return await service.create_session(
        app_name=app_name,
        user_id="ann",
        session_id="s",
        state={"start": 1, "gone": 1, "app:n": 1, "user:n": 1},
    )


def event(id: str, delta: dict[str, Any] | None = None) -> Event:
    return event_of(id, delta or {})


def of(session: Session) -> dict[str, str]:
    return {"app_name": session.app_name, "user_id": session.user_id, "session_id": session.id}


def own(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(("app:", "user:"))}


def ids(session: Session) -> list[str]:
    return [event.id for event in session.events]


async def at(service: SessionService, session: Session, event_id: str, **filters: Any) -> Session:
    found = await service.get_session(**of(session), at=event_id, **filters)
    assert found is not None
    return found


async def talk(service: SessionService, session: Session) -> dict[str, dict[str, Any]]:
    """Events a, b and c with changes between them; the own state right after each."""
    seen = {}
    for name, delta in (("a", {"x": 1, **HARD}), ("b", {"x": 2, "gone": None}), ("c", {"y": {}})):
        await service.append_event(session, event(name, {**delta, "app:n": name}))
        seen[name] = own((await load(service, *of(session).values())).state)
        await service.update_state(
            **of(session), delta={"x": f"after {name}", "z": name}, add={"n": 1}, delete=["start"]
        )
        await service.update_state(**of(session), delta={"twice": 1}, delete=["z"])
    return seen


def same(one: Any, other: Any) -> bool:
    return repr(sorted(one.items())) == repr(sorted(other.items()))


# --- reading -----------------------------------------------------------------------------------


async def test_a_session_is_read_as_it_was_right_after_an_event(
    service: SessionService, session: Session
) -> None:
    seen = await talk(service, session)
    assert seen["a"]["start"] == 1
    assert "start" not in seen["b"]
    assert seen["b"]["n"] == 1
    for name in "abc":
        then = await at(service, session, name)
        assert same(own(then.state), seen[name])
        assert ids(then) == list("abc"[: "abc".index(name) + 1])
        # wider scopes belong to others too
        assert (then.state["app:n"], then.state["user:n"]) == ("c", 1)


async def test_filters_leave_out_events_and_not_what_they_did(
    service: SessionService, session: Session
) -> None:
    seen = await talk(service, session)
    for filters, expected in (
        ({"num_recent_events": 1}, ["b"]),
        ({"num_recent_events": 0}, []),
        ({"config": GetSessionConfig(num_recent_events=2)}, ["a", "b"]),
        ({"after_timestamp": session.events[1].timestamp}, ["b"]),
        ({"after_timestamp": session.events[0].timestamp, "num_recent_events": 5}, ["a", "b"]),
        ({"after_timestamp": session.events[2].timestamp}, []),
    ):
        then = await at(service, session, "b", **filters)
        assert ids(then) == expected
        assert same(own(then.state), seen["b"])


@one_of_each_kind
async def test_an_append_to_what_was_is_refused_as_stale(
    service: SessionService, session: Session
) -> None:
    await talk(service, session)
    then = await at(service, session, "b")
    with pytest.raises(StaleSessionError):
        await service.append_event(then, event("d"))
    assert ids(then) == ["a", "b"]
    newest = await at(service, session, "c")
    assert newest._storage_update_marker == session._storage_update_marker
    assert newest.last_update_time == session.last_update_time
    await service.append_event(newest, event("d"))
    assert ids(await load(service, *of(session).values())) == ["a", "b", "c", "d"]


async def test_what_is_not_there_is_said(service: SessionService, session: Session) -> None:
    await service.append_event(session, event("a"))
    other = await service.create_session(app_name=session.app_name, user_id="ann")
    await service.append_event(other, event("elsewhere"))
    for unknown in ("elsewhere", "", "x" * 200, "nul\0"):
        with pytest.raises(EventNotFoundError):
            await service.get_session(**of(session), at=unknown)
        with pytest.raises(EventNotFoundError):
            await service.fork_session(session, at=unknown)
    with pytest.raises(InvalidInputError) as refused:
        await service.get_session(**of(session), at=1)  # type: ignore[arg-type]
    assert refused.value.field == "at"
    assert await service.get_session(**of(session) | {"session_id": "none"}, at="a") is None


async def forget_the_beginning(url: str, session: Session) -> None:
    await execute(
        url,
        "UPDATE sessions SET initial_state = NULL WHERE app_name = :app AND id = :id",
        app=session.app_name,
        id=session.id,
    )


@reachable
async def test_without_a_recorded_beginning_what_can_be_told_is_told(
    place: tuple[str, dict[str, Any]], service: SessionService, session: Session
) -> None:
    url = place[0]
    await service.append_event(session, event("a", {"x": 1, "y": 1}))
    await service.append_event(session, event("b", {"x": 2}))
    await service.append_event(session, event("c", {"x": 3, "later": 1}))
    await service.update_state(**of(session), delta={"y": 2}, delete=["x"])
    await service.append_event(session, event("d", {"later": 2}))
    await forget_the_beginning(url, session)
    # `start` and `gone` were never touched, so they are as they are now
    untouched = {"start": 1, "gone": 1}
    for filters in ({}, {"num_recent_events": 1}):
        then = await at(service, session, "c", **filters)
        assert own(then.state) == untouched | {"x": 3, "y": 1, "later": 1}
        then = await at(service, session, "d", **filters)
        assert own(then.state) == untouched | {"y": 2, "later": 2}
        # what `later` was before the event c is not known
        for early in ("a", "b"):
            with pytest.raises(StateUnknownError):
                await at(service, session, early, **filters)
    with pytest.raises(StateUnknownError):
        await service.fork_session(session, at="a")
    fork = await service.fork_session(session, at="c")
    assert own(fork.state) == untouched | {"x": 3, "y": 1, "later": 1}
    whole = await service.fork_session(session)
    assert own(whole.state) == untouched | {"y": 2, "later": 2}


@reachable
async def test_what_an_earlier_release_has_changed_is_no_wrong_answer(
    place: tuple[str, dict[str, Any]], service: SessionService, session: Session
) -> None:
    """Its `update_state` leaves no record, and so nobody knows when it was."""
    await service.append_event(session, event("a", {"x": 1}))
    await service.update_state(**of(session), delta={"start": 2})
    assert own((await at(service, session, "a")).state) == {"start": 1, "gone": 1, "x": 1}
    stored = '{"start": 2, "gone": 1, "x": 1, "old": 1}'
    await execute(
        place[0],
        f"UPDATE sessions SET state = '{stored}' WHERE app_name = :app",
        app=session.app_name,
    )
    for name in "ab":
        if name == "b":
            await service.append_event(session, event(name, {"y": 1}))
        for filters in ({}, {"num_recent_events": 0}):
            with pytest.raises(StateUnknownError):
                await at(service, session, name, **filters)
        with pytest.raises(StateUnknownError):
            await service.fork_session(session, at=name)
    expected = {"start": 2, "gone": 1, "x": 1, "y": 1, "old": 1}
    assert own((await service.fork_session(session)).state) == expected
    # once an event has set what was changed, all is known from there on
    await service.append_event(session, event("c", {"old": 2}))
    assert own((await at(service, session, "c")).state) == expected | {"old": 2}


class Choice(BaseModel):
    name: str = "tea"
    sugar: int | None = None


@one_of_each_kind
async def test_a_value_of_two_forms_is_no_change_without_a_record(
    service: SessionService, session: Session
) -> None:
    """google-adk's events and states do not store bytes and models alike."""
    delta = {"bytes": "ü?>".encode(), "models": [Choice(), {"deep": Choice()}]}
    await service.append_event(session, event("a", delta))
    then = await at(service, session, "a")
    assert then.state.keys() == (await load(service, *of(session).values())).state.keys()
    assert then.state["models"][0]["name"] == "tea"


async def test_a_change_before_the_first_event_is_part_of_every_later_state(
    service: SessionService, session: Session
) -> None:
    await service.update_state(**of(session), delta={"early": 1}, delete=["gone"])
    await service.append_event(session, event("a", {"gone": 2}))
    await service.update_state(**of(session), delta={"late": 1})
    assert own((await at(service, session, "a")).state) == {"start": 1, "early": 1, "gone": 2}
    fork = await service.fork_session(session)
    assert own(fork.state) == {"start": 1, "early": 1, "gone": 2, "late": 1}
    assert own((await at(service, fork, "a")).state) == {"start": 1, "early": 1, "gone": 2}


async def test_events_of_a_batch_each_have_a_state(
    service: SessionService, session: Session
) -> None:
    events = [event(str(n), {"n": n, f"k{n}": n}) for n in range(5)]
    await service.append_events(session, events)
    for n in range(5):
        then = await at(service, session, str(n))
        keys = {f"k{i}": i for i in range(n + 1)}
        assert own(then.state) == {"start": 1, "gone": 1, "n": n} | keys


@reachable
async def test_events_of_one_time_are_taken_in_the_order_of_reading(
    place: tuple[str, dict[str, Any]], service: SessionService, session: Session
) -> None:
    """google-adk's own service may leave such."""
    url = place[0]
    for name in "abc":
        await service.append_event(session, event(name, {"x": name}))
    where = "WHERE app_name = :app AND session_id = 's'"
    [(time,)] = await query(
        url, f"SELECT timestamp FROM events {where} AND id = 'a'", app=session.app_name
    )
    move = f"UPDATE events SET timestamp = :time {where} AND id = 'b'"
    await execute(url, move, app=session.app_name, time=time)
    for known in (True, False):
        for name, expected in (("a", ["a"]), ("b", ["a", "b"]), ("c", ["a", "b", "c"])):
            for filters in ({}, {"num_recent_events": 9}):
                then = await at(service, session, name, **filters)
                assert ids(then) == expected
                assert own(then.state) == {"start": 1, "gone": 1, "x": name}
            assert ids(await service.fork_session(session, at=name)) == expected
        if known:
            await forget_the_beginning(url, session)


# --- forking -----------------------------------------------------------------------------------


async def test_a_fork_is_what_was_and_goes_on_by_itself(
    service: SessionService, session: Session
) -> None:
    seen = await talk(service, session)
    before = await load(service, *of(session).values())
    fork = await service.fork_session(session, at="b", session_id="the fork")
    assert (fork.app_name, fork.user_id, fork.id) == (session.app_name, "ann", "the fork")
    assert same(own(fork.state), seen["b"])
    assert repr(fork.events) == repr(before.events[:2])
    assert repr(fork) == repr(await load(service, session.app_name, "ann", "the fork"))
    # both go on
    await service.append_event(fork, event("c", {"x": "of the fork", "only": 1}))
    await service.append_event(session, event("d", {"x": "of the first"}))
    first = await load(service, *of(session).values())
    second = await load(service, *of(fork).values())
    assert (ids(first), first.state["x"]) == (["a", "b", "c", "d"], "of the first")
    assert (ids(second), second.state["x"]) == (["a", "b", "c"], "of the fork")
    assert "only" not in first.state
    assert same(own((await at(service, first, "c")).state), seen["c"])
    assert same(own((await at(service, second, "a")).state), seen["a"])
    assert same(own((await at(service, second, "c")).state), own(second.state))
    # a fork of the fork, and one of the three goes
    third = await service.fork_session(second, at="a")
    assert same(own(third.state), seen["a"])
    await service.delete_session(session.app_name, "ann", "s")
    assert ids(await load(service, session.app_name, "ann", fork.id)) == ["a", "b", "c"]
    await service.delete_session(session.app_name, "ann", fork.id)
    assert ids(await load(service, session.app_name, "ann", third.id)) == ["a"]


async def test_a_fork_of_all_has_the_state_of_now(
    service: SessionService, session: Session
) -> None:
    seen = await talk(service, session)
    now = await load(service, *of(session).values())
    # the session in hand need not be fresh: only its ids matter
    fork = await service.fork_session(Session(app_name=now.app_name, user_id="ann", id="s"))
    assert same(fork.state, now.state)
    assert repr(fork.events) == repr(now.events)
    assert fork.last_update_time >= now.last_update_time
    await service.append_event(fork, event("d", {"x": "d"}))
    assert same(own((await at(service, fork, "c")).state), seen["c"])
    assert same(own((await at(service, fork, "d")).state), own(now.state) | {"x": "d"})
    empty = await service.create_session(app_name=now.app_name, user_id="ann", state={"k": 1})
    await service.update_state(**of(empty), delta={"k": 2})
    copy = await service.fork_session(empty)
    assert (own(copy.state), copy.events) == ({"k": 2}, [])


async def test_a_fork_takes_the_title_and_not_the_archive(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, event("a"))
    name = of(session).values()
    await service.update_session(
        *name, title="Tea", labels={"topic": "tea"}, expire_time=session.last_update_time + 1e6
    )
    await service.archive_session(*name)
    with pytest.raises(SessionArchivedError):
        await service.append_event(session, event("b"))
    fork = await service.fork_session(session, at="a")
    said = await service.describe_session(fork.app_name, "ann", fork.id)
    assert said is not None
    assert (said.title, said.labels) == ("Tea", {"topic": "tea"})
    assert (said.archive_time, said.expire_time) == (None, None)
    assert said.create_time > session.last_update_time
    await service.append_event(fork, event("b"))


@one_of_each_kind
async def test_a_fork_does_not_take_a_place_that_is_taken(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, event("a", {"k": 1}))
    with pytest.raises(AlreadyExistsError):
        await service.fork_session(session, session_id="s")
    await service.fork_session(session, session_id="other")
    with pytest.raises(AlreadyExistsError):
        await service.fork_session(session, at="a", session_id="other")
    with pytest.raises(SessionNotFoundError):
        await service.fork_session(session.model_copy(update={"id": "none"}))
    with pytest.raises(InvalidInputError) as refused:
        await service.fork_session(session, session_id="x" * 200)
    assert refused.value.field == "session_id"
    with pytest.raises(InvalidInputError) as refused:
        await service.fork_session("s")  # type: ignore[type-var]
    assert refused.value.field == "session"


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
async def test_a_fork_finds_nothing_of_a_session_that_had_its_id(
    place: tuple[str, dict[str, Any]], service: SessionService, session: Session
) -> None:
    await service.append_event(session, event("1"))
    old = await service.create_session(app_name=session.app_name, user_id="ann", session_id="old")
    for id_ in ("1", "2"):
        await service.append_event(old, event(id_, {"old": True}))
    # where nobody enforces the foreign keys
    await execute(place[0], "DELETE FROM sessions WHERE id = 'old'")
    copy = await service.fork_session(session, session_id="old")
    assert ids(copy) == ["1"]
    assert await load(service, copy.app_name, copy.user_id, copy.id) == copy


async def test_a_fork_has_what_is_exact_of_an_event(
    service: SessionService, session: Session
) -> None:
    said = Event(id="a", invocation_id="1", author="user", content=HARD | {"t": "\ud800"})
    await service.append_event(session, said)
    fork = await service.fork_session(session, at="a")
    assert repr(fork.events[0].content) == repr(said.content)


@one_of_each_kind
async def test_a_fork_whose_reply_was_lost_is_found_again(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.append_event(session, event("a", {"k": 1}))
    real, lost = service._database.run, [0]

    async def run(work: Any, *, write: bool, once: bool = False) -> Any:
        result = await real(work, write=write, once=once)
        if write and not lost[0]:
            lost[0] += 1
            raise Undecided(OSError("the connection is gone"))
        return result

    monkeypatch.setattr(service._database, "run", run)
    fork = await service.fork_session(session, at="a", session_id="fork")
    assert lost == [1]
    assert own(fork.state) == {"start": 1, "gone": 1, "k": 1}
    lost[0] = 0
    with pytest.raises(AlreadyExistsError):  # somebody else's
        await service.fork_session(session, session_id="fork")


@one_of_each_kind
async def test_a_fork_that_never_came_to_be_is_made_again(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = service._database.run, [0]

    async def run(work: Any, *, write: bool, once: bool = False) -> Any:
        if write and lost[0] < 2:
            lost[0] += 1
            raise Undecided(OSError("the connection is gone"))
        return await real(work, write=write, once=once)

    monkeypatch.setattr(service._database, "run", run)
    fork = await service.fork_session(session)
    assert lost == [2]
    assert own(fork.state) == {"start": 1, "gone": 1}
    lost[0] = 0
    with pytest.raises(AlreadyExistsError):  # what is there is not this call's
        await service.fork_session(session, session_id="s")
    lost[0] = -10
    with pytest.raises(OutcomeUnknownError):
        await service.fork_session(session)


async def test_forks_beside_writers_are_whole(service: SessionService, session: Session) -> None:
    """Each event counts in the state: what a fork has of one it has of the other."""

    async def write() -> None:
        for n in range(1, 13):
            await service.append_event(session, event(str(n), {"n": n}))
            await service.update_state(**of(session), delta={"seen": n})

    async def fork() -> None:
        for _ in range(4):
            copy = await service.fork_session(session)
            assert copy.state.get("n", 0) == len(copy.events)
            assert copy.state.get("seen", 0) in (len(copy.events), len(copy.events) - 1)
            if copy.events:
                then = await at(service, copy, copy.events[-1].id)
                assert then.state["n"] == len(copy.events)
                assert then.state.get("seen", 0) == len(copy.events) - 1

    await asyncio.gather(write(), fork(), fork())


def pause() -> None:
    """Lets others go on in the middle of a transaction, which may be in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        time.sleep(0.05)
    else:
        await_only(asyncio.sleep(0.05))


async def test_a_fork_that_holds_the_session_is_whole_whoever_deletes_it(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.append_events(session, [event(str(i), {"n": i}) for i in range(20)])
    loop, held, real = asyncio.get_running_loop(), asyncio.Event(), service._statements._copy_rows

    def copy_rows(*args: Any) -> None:
        loop.call_soon_threadsafe(held.set)
        pause()
        real(*args)

    monkeypatch.setattr(service._statements, "_copy_rows", copy_rows)

    async def delete() -> None:
        await held.wait()
        await service.delete_session(*of(session).values())

    copy, _ = await asyncio.gather(service.fork_session(session, at="19"), delete())
    assert [event.id for event in copy.events] == [str(i) for i in range(20)]
    assert copy.state["n"] == 19
    assert repr(await load(service, *of(copy).values())) == repr(copy)
    assert await service.get_session(**of(session)) is None


@reachable
async def test_a_fork_that_waits_for_a_delete_is_refused(
    place: tuple[str, dict[str, Any]], service: SessionService, session: Session
) -> None:
    await service.append_event(session, event("a"))
    async with engine_for(place[0]) as engine:
        async with engine.begin() as conn:
            gone = text("DELETE FROM sessions WHERE app_name = :app")
            await conn.execute(gone, {"app": session.app_name})
            fork = asyncio.create_task(service.fork_session(session))
            await asyncio.sleep(0.1)
            assert not fork.done()
        with pytest.raises(SessionNotFoundError):
            await fork
    listed = await service.list_sessions(app_name=session.app_name)
    assert listed.sessions == []


# --- whatever happens --------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "c", "d"])
VALUES = st.sampled_from([None, 0, True, 1, 1.0, "text", [], {"a": [None]}, float("nan"), "\0"])
STATE = st.dictionaries(KEYS, VALUES, max_size=3)
STEP = st.one_of(
    st.tuples(st.just("append"), STATE),
    st.tuples(st.just("batch"), st.lists(STATE, min_size=1, max_size=3)),
    st.tuples(st.just("set"), STATE),
    st.tuples(st.just("delete"), st.lists(KEYS, min_size=1, max_size=2, unique=True)),
    st.tuples(st.just("rewind"), st.integers(0, 6)),
)


async def live(
    service: SessionService, app_name: str, initial: dict[str, Any], steps: list[tuple[str, Any]]
) -> None:
    """Does what the steps say, and looks back at all of it."""
    session = await service.create_session(app_name=app_name, user_id="ann", state=initial)
    after: dict[str, dict[str, Any]] = {}  # the state after each event
    before: dict[str, dict[str, Any]] = {}  # and before each invocation
    state = own(session.state)
    for kind, value in steps:
        if kind in ("set", "delete"):
            await service.update_state(
                **of(session), **({"delta": value} if kind == "set" else {"delete": value})
            )
            state = own((await load(service, *of(session).values())).state)
            continue
        events = [Event(author="user", invocation_id=str(len(after)))]
        if kind == "rewind":
            if not before:
                continue
            target = list(before)[value % len(before)]
            events[0].actions.rewind_before_invocation_id = target  # type: ignore[attr-defined]
            # google-adk's way, which knows of no beginning
            events[0].actions.state_delta = dict.fromkeys(state)
        elif kind == "append":
            events[0].actions.state_delta = value
        else:
            events = [
                Event(author="user", invocation_id=f"{len(after)}.{n}", actions={"state_delta": d})
                for n, d in enumerate(value)
            ]
        await service.append_events(session, events)
        for each in events:
            before[each.invocation_id] = state
            state = dict(before[target]) if kind == "rewind" else state | each.actions.state_delta
            after[each.id] = state
        stored = await load(service, *of(session).values())
        assert same(own(stored.state), state)
        if kind == "rewind":
            assert same(session.state, stored.state)
    for n, (event_id, then) in enumerate(after.items()):
        found = await at(service, session, event_id)
        assert same(own(found.state), then), (n, steps)
        assert len(found.events) == n + 1
        found = await at(service, session, event_id, num_recent_events=1)
        assert same(own(found.state), then)


@one_of_each_kind
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(initial=STATE, steps=st.lists(STEP, max_size=8))
async def test_every_state_that_was_is_found_again(
    service: SessionService, app_name: str, initial: dict[str, Any], steps: list[tuple[str, Any]]
) -> None:
    await live(service, app_name, initial, steps)


FIXED: list[tuple[str, Any]] = [
    ("set", {"a": 1}),
    ("append", {"a": 2, "b": None}),
    ("delete", ["a"]),
    ("batch", [{"c": 1}, {"a": 3, "d": float("nan")}, {"b": 5}]),
    ("set", {"b": [], "e": "\0"}),
    ("rewind", 1),
    ("append", {"c": 2}),
    ("rewind", 0),
    ("set", {"d": 4}),
    ("append", {"e": {}}),
    ("rewind", 4),
    ("rewind", 6),
    ("append", {"a": 1}),
    ("rewind", 2),
]


async def test_every_state_that_was_is_found_on_every_database(
    service: SessionService, app_name: str
) -> None:
    await live(service, app_name, {"a": 0, "z": {"deep": None}}, FIXED)


async def test_wider_scopes_come_with_a_fork(service: SessionService, session: Session) -> None:
    await service.append_event(session, event("a", in_each_scope("a")))
    fork = await service.fork_session(session, at="a")
    await service.append_event(fork, event("b", {"app:n": 2, "user:n": 3}))
    first = await load(service, *of(session).values())
    assert (first.state["app:n"], first.state["user:n"]) == (2, 3)
