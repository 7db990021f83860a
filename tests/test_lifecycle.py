"""Title, labels and expiry of a session, and the archive."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from everywhere import EVERY_DATABASE, place_of
from sqlalchemy import select
from workers import event, load

from adk_sessions import (
    Event,
    EventConflictError,
    InvalidInputError,
    Session,
    SessionArchivedError,
    SessionNotFoundError,
    SessionService,
    SessionSummary,
    StaleSessionError,
)
from adk_sessions.dialects.faults import Undecided
from adk_sessions.lifecycle import KEEP


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


@pytest.fixture
async def session(service: SessionService, app_name: str) -> Session:
    return await service.create_session(app_name=app_name, user_id="ann", session_id="s")


def ids(session: Session) -> tuple[str, str, str]:
    return session.app_name, session.user_id, session.id


async def again(service: SessionService, session: Session) -> Session:
    return await load(service, *ids(session))


async def row(service: SessionService, session: Session) -> dict[str, Any]:
    """What is stored of a session for people."""
    s = service.models.sessions.c
    columns = (s.title, s.labels, s.archive_time, s.expire_time, s.update_time)
    found = select(*columns).where(s.app_name == session.app_name, s.id == session.id)
    read = await service._run(lambda conn: conn.execute(found).mappings().one(), write=False)
    return dict(read)


# --- title, labels, expiry -----------------------------------------------------------------------


async def test_what_is_said_of_a_session_is_set_changed_and_removed(
    service: SessionService, session: Session
) -> None:
    plain = await service.update_session(*ids(session))
    assert plain == SessionSummary(
        *ids(session),
        title=None,
        labels={},
        create_time=session.last_update_time,
        last_update_time=session.last_update_time,
        archive_time=None,
        expire_time=None,
    )
    said = await service.update_session(
        *ids(session), title="Überfällig 🚲", labels={"a": "1", "ü": "ö,{}"}, expire_time=2e9 + 0.25
    )
    assert (said.title, said.labels, said.expire_time) == (
        "Überfällig 🚲",
        {"a": "1", "ü": "ö,{}"},
        2e9 + 0.25,
    )
    # what is not given stays; labels go one by one
    said = await service.update_session(*ids(session), labels={"a": None, "b": "", "none": None})
    assert (said.title, said.labels, said.expire_time) == (
        "Überfällig 🚲",
        {"ü": "ö,{}", "b": ""},
        2e9 + 0.25,
    )
    assert await service.update_session(*ids(session), title=KEEP, labels={}) == said
    said = await service.update_session(*ids(session), title="")
    assert said.title == ""
    assert await service.update_session(*ids(session), title=None, expire_time=None) == (
        SessionSummary(*ids(session), None, {"ü": "ö,{}", "b": ""}, *plain_times(plain))
    )
    assert await service.update_session(*ids(session), labels={"ü": None, "b": None}) == plain
    stored = await row(service, session)
    assert stored.pop("update_time") is not None
    assert set(stored.values()) == {None}


def plain_times(summary: SessionSummary) -> tuple[float, float, None, None]:
    return summary.create_time, summary.last_update_time, None, None


async def test_a_running_turn_does_not_become_stale(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, event("a", {"a": 1}))
    held = await again(service, session)
    summary = await service.update_session(
        *ids(session), title="t", labels={"a": "b"}, expire_time=2e9
    )
    assert summary.last_update_time == held.last_update_time
    await service.archive_session(*ids(session))
    await service.restore_session(*ids(session))
    await service.append_event(session, event("b", {"b": 1}))
    after = await again(service, session)
    assert [one.id for one in after.events] == ["a", "b"]
    assert after.state == {"a": 1, "b": 1}
    # and the turn has written over nothing of it
    kept = await service.update_session(*ids(session))
    assert (kept.title, kept.labels, kept.expire_time) == ("t", {"a": "b"}, 2e9)
    with pytest.raises(StaleSessionError):
        await service.append_event(held, event("c", {}))


async def test_two_who_label_at_once_lose_nothing(
    service: SessionService, session: Session
) -> None:
    names = [f"label-{n}" for n in range(12)]
    await asyncio.gather(
        *(service.update_session(*ids(session), labels={name: name}) for name in names),
        service.update_session(*ids(session), title="t"),
    )
    found = await service.update_session(*ids(session))
    assert (found.title, found.labels) == ("t", {name: name for name in names})


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("title", {"title": "t" * 257}),
    ("title", {"title": "a\0"}),
    ("title", {"title": "\ud800"}),
    ("title", {"title": 1}),
    ("labels", {"labels": {"a": 1}}),
    ("labels", {"labels": {1: "a"}}),
    ("labels", {"labels": {"": "a"}}),
    ("labels", {"labels": {"a": "\0"}}),
    ("labels", {"labels": ["a"]}),
    ("labels", {"labels": {str(n): "" for n in range(65)}}),
    ("expire_time", {"expire_time": -1}),
    ("expire_time", {"expire_time": math.nan}),
    ("expire_time", {"expire_time": math.inf}),
    ("expire_time", {"expire_time": True}),
    ("expire_time", {"expire_time": "tomorrow"}),
]


async def test_bad_input_stores_nothing(service: SessionService, session: Session) -> None:
    before = await service.update_session(
        *ids(session), title="t", labels={f"l{n}": "" for n in range(40)}, expire_time=2e9
    )
    for field, arguments in REFUSED:
        sound: dict[str, Any] = {"title": "new", "labels": {"a": "new"}, "expire_time": 1e9}
        with pytest.raises(InvalidInputError) as raised:
            await service.update_session(*ids(session), **{**sound, **arguments})
        assert raised.value.field == field, arguments
    # together with those that are there they are too many
    with pytest.raises(InvalidInputError, match="at most 64"):
        await service.update_session(*ids(session), labels={f"m{n}": "" for n in range(25)})
    with pytest.raises(InvalidInputError):
        await service.update_session("a" * 129, "ann", "s", title="new")
    assert await service.update_session(*ids(session)) == before


async def test_there_must_be_such_a_session(service: SessionService, session: Session) -> None:
    app, user, _ = ids(session)
    for key in ((app, user, "none"), (app, "bob", "s"), ("no-app", user, "s")):
        for call in (service.update_session, service.archive_session, service.restore_session):
            with pytest.raises(SessionNotFoundError):
                await call(*key)


async def test_a_commit_whose_answer_was_lost_is_repeated(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lost = service._database.run, 0

    async def broken(work: Any, **options: Any) -> Any:
        nonlocal lost
        result = await run(work, **options)
        if options.get("once") and not lost:
            lost += 1
            raise Undecided(ConnectionResetError())
        return result

    monkeypatch.setattr(service._database, "run", broken)
    summary = await service.update_session(*ids(session), title="t", labels={"a": "b"})
    assert (lost, summary.title, summary.labels) == (1, "t", {"a": "b"})


# --- the archive ---------------------------------------------------------------------------------


async def test_archive_and_restore_may_be_repeated(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_now", lambda: 1_800_000_000.5)
    first = await service.archive_session(*ids(session))
    monkeypatch.setattr(service, "_now", lambda: 1_900_000_000.5)
    assert first.archive_time == 1_800_000_000.5
    assert await service.archive_session(*ids(session)) == first
    back = await service.restore_session(*ids(session))
    assert back.archive_time is None
    assert await service.restore_session(*ids(session)) == back
    assert (await service.archive_session(*ids(session))).archive_time == 1_900_000_000.5


async def test_an_archived_session_is_read_by_its_id_and_listed_by_nobody(
    service: SessionService, session: Session
) -> None:
    app, user, _ = ids(session)
    await service.append_event(session, event("a", {"a": 1}))
    other = await service.create_session(app_name=app, user_id=user, session_id="other")
    await service.archive_session(*ids(session))

    async def listed(**options: Any) -> list[str]:
        one = await service.list_sessions(app_name=app, user_id=user, **options)
        every = await service.list_sessions(app_name=app, **options)
        assert [s.id for s in one.sessions] == [s.id for s in every.sessions]
        return sorted(s.id for s in one.sessions)

    async def paged(**options: Any) -> list[str]:
        page = await service.page_sessions(app, **options)
        return sorted(s.id for s in page.items)

    found = await again(service, session)
    assert ([one.id for one in found.events], found.state) == (["a"], {"a": 1})
    for shown in (listed, paged):
        assert await shown() == [other.id]
        assert await shown(archived=True) == [session.id]
        assert await shown(archived=None) == [other.id, session.id]
    await service.restore_session(*ids(session))
    assert await listed() == await paged() == [other.id, session.id]
    assert await listed(archived=True) == []


async def test_nothing_new_is_appended_to_an_archived_session(
    service: SessionService, session: Session
) -> None:
    first, second = event("a", {"a": 1}), event("b", {"b": 1})
    await service.append_event(session, first)
    await service.append_events(session, [second])
    stale = await again(service, session)
    await service.append_event(session, event("c", {}))
    await service.archive_session(*ids(session))
    before = await again(service, session)
    for held in (session, stale, before):
        was = held.model_copy(deep=True)
        for on_stale in ("raise", "refresh"):
            new = [event(f"n{n}", {"n": n, "app:n": n, "user:n": n}) for n in range(3)]
            if held is not stale or on_stale == "refresh":
                with pytest.raises(SessionArchivedError, match="restore_session"):
                    await service.append_event(held, new[0], on_stale=on_stale)
                with pytest.raises(SessionArchivedError):
                    await service.append_events(held, new[1:], on_stale=on_stale)
        assert held == was
    # what was stored before says so again, and changes nothing
    assert await service.append_event(before, first) is first
    assert await service.append_events(before, [first, second]) == [first, second]
    with pytest.raises(EventConflictError):
        await service.append_event(before, event("a", {"a": 2}))
    after = await again(service, session)
    assert after == before
    assert after.state == {"a": 1, "b": 1}
    await service.restore_session(*ids(session))
    await service.append_event(session, event("d", {"d": 1}))
    found = await again(service, session)
    assert [one.id for one in found.events] == ["a", "b", "c", "d"]


async def test_state_and_deletion_of_an_archived_session_are_as_of_any(
    service: SessionService, session: Session
) -> None:
    app, user, id = ids(session)
    await service.archive_session(*ids(session))
    await service.update_state(app_name=app, user_id=user, session_id=id, delta={"a": 1})
    await service.update_session(*ids(session), title="t")
    assert (await again(service, session)).state == {"a": 1}
    await service.delete_session(*ids(session))
    with pytest.raises(SessionNotFoundError):
        await service.append_event(session, Event(author="user"))


# --- google-adk's types, and its own service -----------------------------------------------------


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_with_google_adks_types(database_url: str, app_name: str) -> None:
    pytest.importorskip("google.adk")
    from google.adk.errors.session_not_found_error import SessionNotFoundError as AdkNotFound
    from google.adk.events import Event as AdkEvent
    from google.adk.sessions import DatabaseSessionService as Stock
    from sqlalchemy import make_url

    from adk_sessions.adk import DatabaseSessionService

    key = {"app_name": app_name, "user_id": "ann", "session_id": "s"}
    driver = "sqlite+aiosqlite" if database_url.startswith("sqlite") else "postgresql+asyncpg"
    stock_url = make_url(database_url).set(drivername=driver)
    async with DatabaseSessionService(database_url) as service:
        with pytest.raises(AdkNotFound):
            await service.archive_session(*key.values())
        session = await service.create_session(**key, state={"a": 1})
        await service.append_event(session, AdkEvent(author="user", id="a"))
        said = await service.update_session(*key.values(), title="t", labels={"a": "b"})
        await service.append_event(session, AdkEvent(author="user", id="b"))
        await service.archive_session(*key.values())
        for on_stale in ("raise", "refresh"):
            with pytest.raises(SessionArchivedError):
                await service.append_event(session, AdkEvent(author="user"), on_stale=on_stale)
        async with Stock(stock_url.render_as_string(hide_password=False)) as stock:
            # it knows of no archive, and leaves alone what it does not know
            read = await stock.get_session(**key)
            assert read is not None
            assert ([e.id for e in read.events], read.state) == (["a", "b"], {"a": 1})
            listed = await stock.list_sessions(app_name=app_name)
            assert [one.id for one in listed.sessions] == ["s"]
            await stock.append_event(read, AdkEvent(author="user", id="c"))
        after = await service.restore_session(*key.values())
        assert (after.title, after.labels) == (said.title, said.labels) == ("t", {"a": "b"})
        again = await service.get_session(**key)
        assert again is not None
        assert [e.id for e in again.events] == ["a", "b", "c"]
