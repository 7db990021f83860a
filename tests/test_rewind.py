"""An event that rewinds: the session's own state is again what it was, whole."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from everywhere import EVERY_DATABASE, place_of
from rows import execute, overwrite
from sqlalchemy import make_url
from workers import load

from adk_sessions import (
    Event,
    EventConflictError,
    OutcomeUnknownError,
    Session,
    SessionArchivedError,
    SessionNotFoundError,
    SessionService,
    StaleSessionError,
    doctor,
)
from adk_sessions.dialects.faults import Undecided

START = {"start": 1, "kept": {"deep": [None]}, "app:n": 1, "user:n": 1}


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
        app_name=app_name, user_id="ann", session_id="s", state=START
    )


def of(session: Session) -> dict[str, str]:
    return {"app_name": session.app_name, "user_id": session.user_id, "session_id": session.id}


async def again(service: SessionService, session: Session) -> Session:
    return await load(service, session.app_name, "ann", session.id)


def said(invocation_id: str, **delta: Any) -> Event:
    return Event(author="agent", invocation_id=invocation_id, actions={"state_delta": delta})


def back(target: str, **delta: Any) -> Event:
    """What google-adk appends; its delta knows of no beginning."""
    event = said(f"before {target}", **delta)
    event.actions.rewind_before_invocation_id = target  # type: ignore[attr-defined]
    return event


def own(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(("app:", "user:"))}


OWN = own(START)


async def test_the_state_is_what_it_was_in_storage_and_in_hand(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, said("1", a=1, kept=2))
    await service.append_event(session, said("1", b=math.nan))
    await service.update_state(**of(session), delta={"outside": 1}, delete=["start"])
    await service.append_event(session, said("2", a=None, c="a\0b", start=2))
    await service.update_state(**of(session), delta={"later": 1})
    event = back("2", a=1, outside=None, start=None, **{"app:n": 5, "user:n": 6, "temp:t": 7})
    assert await service.append_event(session, event) is event
    then = {"a": 1, "kept": 2, "b": math.nan, "outside": 1}
    wider = {"app:n": 5, "user:n": 6}
    assert repr(sorted(own(session.state).items())) == repr(sorted((then | {"temp:t": 7}).items()))
    stored = await again(service, session)
    assert repr(sorted(stored.state.items())) == repr(sorted((then | wider).items()))
    # the delta says what has changed, for whoever only reads events
    delta = {"a": 1, "start": None, "c": None, "later": None} | wider
    assert event.actions.state_delta == delta
    assert stored.events[-1].actions.state_delta == delta
    assert session._storage_update_marker == stored._storage_update_marker
    await service.append_event(session, said("3", d=1))
    assert (await again(service, session)).state["d"] == 1


async def test_the_first_invocation_goes_back_to_the_beginning(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, said("1", start=2, a=1))
    await service.append_event(session, back("1", start=None, a=None, kept=None))
    assert own(session.state) == own((await again(service, session)).state) == OWN
    # and it can be done again, from further on
    await service.append_event(session, said("2", start=3, b=1))
    await service.append_event(session, said("3", start=4))
    await service.append_event(session, back("3"))
    assert own((await again(service, session)).state) == OWN | {"start": 3, "b": 1}
    await service.append_event(session, back("2"))
    assert own((await again(service, session)).state) == OWN
    await service.append_event(session, back("3"))
    assert own(session.state) == own((await again(service, session)).state)
    assert own(session.state) == OWN | {"start": 3, "b": 1}


async def test_a_batch_may_go_back_over_itself(service: SessionService, session: Session) -> None:
    await service.append_event(session, said("1", a=1))
    await service.update_state(**of(session), delta={"outside": 1})
    batch = [
        said("2", a=2, b=2),
        back("1", b=None),
        said("3", c=3, **{"app:n": 3}),
        said("4", c=4),
        back("4"),
        said("5", d=5),
    ]
    await service.append_events(session, batch)
    expected = OWN | {"c": 3, "d": 5}
    stored = await again(service, session)
    assert own(session.state) == own(stored.state) == expected
    assert stored.state["app:n"] == 3
    assert [event.actions.state_delta for event in stored.events][1:] == [
        *({"a": 2, "b": 2}, {"a": None, "b": None, "outside": None}),
        *({"c": 3, "app:n": 3}, {"c": 4}, {"c": 3}, {"d": 5}),
    ]
    # before the third, at the second: back to before the first
    then = await service.get_session(**of(session), at=batch[1].id)
    assert then is not None
    assert own(then.state) == OWN
    copies = [event.model_copy(deep=True) for event in batch]
    assert await service.append_events(session, copies) == copies
    assert len((await again(service, session)).events) == 7


async def test_an_invocation_that_is_not_there_is_like_any_other_event(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, said("1", a=1))
    event = back("never", a=None, b=2)
    await service.append_event(session, event)
    expected = OWN | {"a": None, "b": 2}
    assert own(session.state) == own((await again(service, session)).state) == expected
    assert event.actions.state_delta == {"a": None, "b": 2}
    then = await service.get_session(**of(session), at=event.id)
    assert then is not None
    assert own(then.state) == expected


async def test_a_repeated_rewind_changes_nothing(service: SessionService, session: Session) -> None:
    await service.append_event(session, said("1", a=1))
    stale = session.model_copy(deep=True)
    given = back("1", start=None, **{"temp:t": 1})
    untouched = given.model_copy(deep=True)
    await service.append_event(session, given)
    await service.update_state(**of(session), delta={"outside": 1})
    # the reply was lost: the caller has the event as it was, and the session too
    for caller, event in (
        (stale, untouched.model_copy(deep=True)),
        (session, untouched.model_copy(deep=True)),
        (session, given),
    ):
        await service.append_event(caller, event)
        assert event.actions.state_delta == {"a": None}
        assert [event.invocation_id for event in caller.events] == ["1", "before 1"]
        assert "a" not in caller.state
        assert caller.state["temp:t"] == 1
    stored = await again(service, session)
    assert own(stored.state) == OWN | {"outside": 1}
    assert own(stale.state) == OWN | {"outside": 1, "temp:t": 1}
    assert len(stored.events) == 2
    # what it says of other scopes is its content
    other = untouched.model_copy(deep=True)
    other.actions.state_delta["app:n"] = 2
    with pytest.raises(EventConflictError):
        await service.append_event(session, other)
    other = untouched.model_copy(deep=True)
    other.actions.rewind_before_invocation_id = "2"  # type: ignore[attr-defined]
    with pytest.raises(EventConflictError):
        await service.append_event(session, other)


async def test_a_rewind_takes_back_only_what_its_writer_has_seen(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, said("1", a=1))
    stale = await again(service, session)
    await service.append_event(session, said("2", b=1))
    event = back("1", start=None)
    for how in ("raise", "refresh"):
        with pytest.raises(StaleSessionError):
            await service.append_event(stale, event, on_stale=how)  # type: ignore[arg-type]
    assert event.actions.state_delta == {"start": None}
    assert own(stale.state) == OWN | {"a": 1}
    assert own((await again(service, session)).state) == OWN | {"a": 1, "b": 1}
    await service.archive_session(**of(session))
    with pytest.raises(SessionArchivedError):
        await service.append_event(session, event)
    await service.delete_session(**of(session))
    with pytest.raises(SessionNotFoundError):
        await service.append_event(session, event)


@one_of_each_kind
async def test_a_session_without_a_marker_may_go_back(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, said("1", a=1))
    by_hand = Session.model_validate(session.model_dump())
    assert by_hand._storage_update_marker is None
    await service.append_event(by_hand, back("1"))
    assert own(by_hand.state) == own((await again(service, session)).state) == OWN


@one_of_each_kind
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
async def test_a_commit_without_an_answer_is_looked_up(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    await service.append_event(session, said("1", a=1))
    real, lost = service._database.run, []

    async def run(work: Any, *, write: bool, once: bool = False) -> Any:
        if once and not lost:
            lost.append(await real(work, write=write, once=once) if stored else None)
            raise Undecided(OSError("the connection is gone"))
        return await real(work, write=write, once=once)

    monkeypatch.setattr(service._database, "run", run)
    event = back("1", start=None)
    await service.append_event(session, event)
    assert lost
    assert own(session.state) == own((await again(service, session)).state) == OWN
    assert event.actions.state_delta == {"a": None}
    assert len(session.events) == 2


@one_of_each_kind
async def test_a_commit_that_is_never_answered_is_of_unknown_outcome(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.append_event(session, said("1", a=1))
    real = service._database.run

    async def run(work: Any, *, write: bool, once: bool = False) -> Any:
        raise Undecided(OSError("the connection is gone"))

    monkeypatch.setattr(service._database, "run", run)
    event = back("1", start=None)
    with pytest.raises(OutcomeUnknownError):
        await service.append_event(session, event)
    assert event.actions.state_delta == {"start": None}
    assert own(session.state) == OWN | {"a": 1}
    monkeypatch.setattr(service._database, "run", real)
    await service.append_event(session, event)
    assert own((await again(service, session)).state) == OWN


async def test_changes_from_outside_come_before_it_or_after_it(
    service: SessionService, session: Session
) -> None:
    """None is half taken back, and none that comes later is lost."""
    await service.append_event(session, said("1", a=1))
    for n in range(4):
        await asyncio.gather(
            service.append_event(session, back("1")),
            service.update_state(**of(session), delta={"x": n, "y": n}),
        )
        stored = await again(service, session)
        assert own(stored.state) in (OWN, OWN | {"x": n, "y": n})
        then = await service.get_session(**of(session), at=stored.events[-1].id)
        assert then is not None
        assert own(then.state) == OWN


# --- what is not recorded ----------------------------------------------------------------------


async def forget_the_beginning(place: tuple[str, dict[str, Any]], session: Session) -> str:
    url = place[0]
    await execute(
        url,
        "UPDATE sessions SET initial_state = NULL WHERE app_name = :app AND id = :id",
        app=session.app_name,
        id=session.id,
    )
    return url


@reachable
async def test_without_a_recorded_beginning_what_is_known_comes_back(
    place: tuple[str, dict[str, Any]],
    service: SessionService,
    session: Session,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await service.append_event(session, said("1", a=1, gone=1))
    await service.update_state(**of(session), delete=["gone"])
    await service.append_event(session, said("2", a=2, secret="payload", gone=2))
    await service.update_state(**of(session), delta={"a": 3})
    await forget_the_beginning(place, session)
    # google-adk takes away what the events do not say
    event = back("2", a=1, secret=None, start=None, kept=None)
    with caplog.at_level(logging.WARNING, "adk_sessions"):
        await service.append_event(session, event)
    # `start` and `kept` were never touched; what `secret` was before is not known
    expected = OWN | {"a": 1, "secret": None}
    assert own(session.state) == own((await again(service, session)).state) == expected
    assert event.actions.state_delta == {"a": 1, "secret": None, "gone": None}
    (warning,) = caplog.records
    assert "1 keys" in warning.getMessage()
    assert "secret" not in warning.getMessage()
    assert "payload" not in warning.getMessage()
    then = await service.get_session(**of(session), at=event.id)
    assert then is not None
    assert own(then.state) == expected


@reachable
async def test_what_an_earlier_release_has_changed_is_not_taken_back_wrongly(
    place: tuple[str, dict[str, Any]],
    service: SessionService,
    session: Session,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its `update_state` leaves no record."""
    await service.append_event(session, said("1", a=1, b=1, kept=2))
    stored = '{"start": 5, "kept": 2, "a": 1, "b": 7, "secret": "payload"}'
    await execute(
        place[0],
        f"UPDATE sessions SET state = '{stored}' WHERE app_name = :app",
        app=session.app_name,
    )
    event = back("1", a=None, b=None, kept=None)
    with caplog.at_level(logging.WARNING, "adk_sessions"):
        await service.append_event(session, event)
    # `start` and `secret` no event has touched; `b` was something that the event has replaced
    expected = {"start": 5, "secret": "payload", "b": None, "kept": OWN["kept"]}
    assert own(session.state) == own((await again(service, session)).state) == expected
    (warning,) = caplog.records
    assert "3 keys" in warning.getMessage()
    assert "payload" not in warning.getMessage()


@reachable
async def test_a_damaged_event_does_not_keep_a_session_from_going_back(
    place: tuple[str, dict[str, Any]],
    service: SessionService,
    session: Session,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = said("1", a=1)
    await service.append_events(session, [first, said("2", b=1)])
    url = place[0]
    await overwrite(url, session.app_name, first.id, '"not an event"')
    event = back("2", b=None, start=None)
    with caplog.at_level(logging.WARNING, "adk_sessions"):
        await service.append_event(session, event)
    # as google-adk says
    assert own(session.state) == OWN | {"a": 1, "b": None, "start": None}
    assert len(caplog.records) == 1


@reachable
async def test_a_rewind_of_other_software_is_what_it_says(
    place: tuple[str, dict[str, Any]], service: SessionService, session: Session
) -> None:
    """google-adk's own service sets its delta like any other, the beginning taken away."""
    await service.append_event(session, said("1", a=1))
    event = said("before 1", a=None, start=None, kept=None)
    await service.append_event(session, event)
    url = place[0]
    event.actions.rewind_before_invocation_id = "1"  # type: ignore[attr-defined]
    await overwrite(url, session.app_name, event.id, event.model_dump_json(exclude_none=True))
    await service.append_event(session, said("2", b=1))
    then = await service.get_session(**of(session), at=event.id)
    assert then is not None
    assert own(then.state) == {"a": None, "start": None, "kept": None}


@reachable
async def test_the_doctor_knows_what_was_taken_back(
    place: tuple[str, dict[str, Any]], service: SessionService, session: Session
) -> None:
    await service.append_event(session, said("1", a=1, b=1))
    await service.append_event(session, said("2", a=2, c=1))
    await service.update_state(**of(session), delta={"a": 3}, delete=["b"])
    await service.append_event(session, back("2"))
    await service.update_state(**of(session), delta={"c": 2}, delete=["a"])
    report = await doctor.examine(service, app_name=session.app_name)
    assert report.found["state_differs"].rows == []
    url = place[0]
    await execute(
        url,
        'UPDATE sessions SET state = \'{"b": 1, "c": 5}\' WHERE app_name = :app',
        app=session.app_name,
    )
    report = await doctor.examine(service, app_name=session.app_name)
    (row,) = report.found["state_differs"].rows
    assert row.detail == "'c', 'kept', 'start'"


# --- google-adk's Runner -----------------------------------------------------------------------


@pytest.mark.filterwarnings(r"ignore:.*\[EXPERIMENTAL\]:UserWarning")
@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_adks_runner_goes_back_exactly(database_url: str, app_name: str) -> None:
    pytest.importorskip("google.adk")
    from google.adk.apps import App
    from google.adk.sessions.database_session_service import DatabaseSessionService as Stock
    from test_runner import DRIVERS, Talk, clerk, remembering

    from adk_sessions.adk import DatabaseSessionService

    async with DatabaseSessionService(database_url) as service:
        talk = Talk(service, App(name=app_name.replace("-", "_"), root_agent=clerk()))
        session = await talk.start(state={"start": 1, "over": 1, "app:n": 0, "user:n": 0})
        before: dict[str, dict[str, Any]] = {}

        async def say(**values: Any) -> str:
            state = (await talk.stored()).state
            invocation = (await talk.say(remembering(values)))[0].invocation_id
            before[invocation] = own(state)
            return invocation

        async def go_back(invocation: str) -> None:
            await talk.runner.rewind_async(
                user_id="ann", session_id=session.id, rewind_before_invocation_id=invocation
            )
            assert own((await talk.stored()).state) == before[invocation]

        first = await say(over=2, a=[1], **{"app:n": 1})
        await service.update_state(**of(session), delta={"outside": 1}, delete=["start"])
        second = await say(over=None, a=None, outside=2, **{"user:n": 1})
        await service.update_state(**of(session), add={"outside": 1})
        third = await say(start=3, c={"deep": 1.5})
        await go_back(second)
        # other scopes are not taken back
        state = (await talk.stored()).state
        assert (state["app:n"], state["user:n"]) == (1, 1)
        fourth = await say(d=1)
        await go_back(third)
        await go_back(fourth)
        await go_back(first)
        assert own((await talk.stored()).state) == {"start": 1, "over": 1}
        await say(e=1)
        end = await talk.stored()
        assert {"start", "over", "e"} <= end.state.keys()

        # what the agent is told is what google-adk makes of the same events
        url = make_url(database_url)
        driver = DRIVERS.get(url.get_backend_name(), "mysql+asyncmy")
        async with Stock(url.set(drivername=driver).render_as_string(hide_password=False)) as stock:
            read = await stock.get_session(**of(session))
            assert read is not None
            assert (read.state, read.events) == (end.state, end.events)
            await stock.append_event(read, end.events[-1].model_copy(update={"id": "stock's"}))
        fork = await service.fork_session(session, at=end.events[0].id)
        assert own(fork.state) == {"start": 1, "over": 1}
        assert (await talk.stored()).events[-1].id == "stock's"
