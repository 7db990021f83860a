"""The class that takes the place of google-adk's own, where the contract kit does not reach."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import pickle
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from everywhere import PART, SOAK

pytest.importorskip("google.adk")

from google.adk.cli.service_registry import (
    ServiceRegistry,
    _register_services_from_yaml_config,
)
from google.adk.errors import StaleSessionError as AdkStaleSessionError
from google.adk.errors.already_exists_error import AlreadyExistsError as AdkAlreadyExistsError
from google.adk.errors.session_not_found_error import (
    SessionNotFoundError as AdkSessionNotFoundError,
)
from google.adk.events import Event, EventActions
from google.adk.events.event_actions import EventCompaction
from google.adk.platform import time as platform_time
from google.adk.platform import uuid as platform_uuid
from google.adk.sessions import BaseSessionService, Session
from google.adk.sessions.base_session_service import GetSessionConfig, ListSessionsResponse
from google.genai import types
from sqlalchemy import make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool
from test_contract_adk import TestAdkDatabaseSessionService as _OnURLs

import adk_sessions
from adk_sessions import adk
from adk_sessions.adk import DatabaseSessionService
from adk_sessions.errors import (
    ConfigurationError,
    DatabaseError,
    EventConflictError,
    InvalidInputError,
)

EVERY_DATABASE = pytest.mark.parametrize(
    "database_url",
    ["sqlite", "postgresql", "mariadb", *(["sqlite-memory"] if SOAK else [])],
    indirect=True,
)
EXACTLY_ONE = "Exactly one of 'db_url' or 'db_engine' must be provided"
SCOPES = ("", "user:", "app:")


def said(text: str = "hello", *, delta: dict[str, Any] | None = None, **fields: Any) -> Event:
    return Event(
        author="user",
        invocation_id="invocation",
        content=types.Content(role="user", parts=[types.Part(text=text)]),
        actions=EventActions(state_delta=delta or {}),
        **fields,
    )


def whole_report(error: BaseException) -> str:
    """All that a log would show of an error, and what its chain holds beyond that."""
    seen, chain = [error], "".join(traceback.format_exception(error))
    for link in seen:
        seen += [e for e in (link.__cause__, link.__context__) if e is not None and e not in seen]
    return chain + " ".join(f"{link!r} {link} {vars(link)}" for link in seen)


@pytest.fixture
async def service(database_url: str) -> AsyncIterator[DatabaseSessionService]:
    async with DatabaseSessionService(database_url) as service:
        yield service


@pytest.fixture
async def session(service: DatabaseSessionService, app_name: str) -> Session:
    return await service.create_session(app_name=app_name, user_id="ann")


async def reload(service: BaseSessionService, session: Session) -> Session | None:
    return await service.get_session(
        app_name=session.app_name, user_id=session.user_id, session_id=session.id
    )


# Construction


def test_it_is_a_session_service_of_adk() -> None:
    assert issubclass(DatabaseSessionService, BaseSessionService)
    assert not DatabaseSessionService.__abstractmethods__


def test_exactly_one_place_is_given(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    engine = create_async_engine("sqlite+aiosqlite://")
    for arguments in (
        {},
        {"db_url": None, "db_engine": None},
        {"db_url": url, "db_engine": engine},
        {"db_url": url, "uri": url},
        {"db_engine": engine, "uri": url},
        {"agents_dir": str(tmp_path)},
    ):
        with pytest.raises(ValueError, match=EXACTLY_ONE) as caught:
            DatabaseSessionService(**arguments)
        assert isinstance(caught.value, ConfigurationError)


async def test_one_place_is_enough(
    make_engine: Callable[..., AsyncEngine], tmp_path: Any, app_name: str
) -> None:
    engine = make_engine("aiosqlite")
    url = engine.url.set(drivername="sqlite").render_as_string()
    services = [
        DatabaseSessionService(url),
        DatabaseSessionService(db_url=url),
        DatabaseSessionService(make_url(url)),
        DatabaseSessionService(uri=url, agents_dir=str(tmp_path)),
        DatabaseSessionService(db_url=url, agents_dir=str(tmp_path)),
        DatabaseSessionService(db_engine=engine),
        DatabaseSessionService(None, engine),
    ]
    for service in services:
        assert isinstance(service, BaseSessionService)
        async with service:
            await service.create_session(app_name=app_name, user_id="ann")
    async with DatabaseSessionService(url) as service:
        assert len((await service.list_sessions(app_name=app_name)).sessions) == len(services)


@pytest.mark.parametrize(
    ("url", "messages"),
    [
        ("nonsense s3cr3t", ["Invalid database URL format or argument"]),
        ("", ["Invalid database URL format or argument"]),
        ("nosuch://ann:s3cr3t@host/db", ["Invalid database URL format or argument", "nosuch"]),
        ("postgresql://ann:s3cr3t@host:port/db", ["Invalid database URL format or argument"]),
        ("postgresql://ann:p@s3cr3t@host/db", ["Invalid database URL format or argument"]),
        ("sqlite+pysqlite:///a.db?k=s3cr3t", ["synchronous", "sqlite+aiosqlite"]),
        ("postgresql+psycopg2://a:s3cr3t@h/d", ["synchronous", "postgresql+asyncpg", "***"]),
        ("mysql+pymysql://a:s3cr3t@h/d?k=s3cr3t", ["synchronous", "mysql+asyncmy", "k=***"]),
        ("mariadb+pymysql://a:s3cr3t@h/d", ["synchronous", "mariadb+asyncmy", "***"]),
        ("mssql+aioodbc://a:s3cr3t@h/d", ["not installed", "pip install", "***"]),
        ("postgresql://a:s3cr3t@h/d?nosuch=s3cr3t", ["nosuch", "***"]),
    ],
)
def test_a_bad_url_is_a_value_error_without_secrets(url: str, messages: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        DatabaseSessionService(url)
    for message in messages:
        assert message in str(caught.value)
    assert "s3cr3t" not in whole_report(caught.value)


@pytest.mark.parametrize("url", ["not a url", "postgresql//ann:s3cr3t@host/db"])
def test_an_unparseable_url_is_chained_to_the_parsers_error(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        DatabaseSessionService(db_url=url)
    assert isinstance(caught.value.__cause__, ArgumentError)
    assert url not in whole_report(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///a.db", "postgresql://a:s3cr3t@127.0.0.1:1/d"])
def test_an_unknown_option_is_a_value_error(
    url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no_such_option") as caught:
        DatabaseSessionService(url, no_such_option=1)
    assert "s3cr3t" not in whole_report(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
async def test_a_failing_connection_keeps_the_secret(scheme: str, app_name: str) -> None:
    async with DatabaseSessionService(f"{scheme}://ann:s3cr3t@127.0.0.1:1/db") as service:
        with pytest.raises(DatabaseError) as caught:
            await service.list_sessions(app_name=app_name)
    assert "s3cr3t" not in whole_report(caught.value)


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
async def test_options_reach_an_engine_made_from_a_url(database_url: str, app_name: str) -> None:
    async with DatabaseSessionService(database_url, pool_size=3, max_overflow=4) as service:
        assert service.db_engine.pool.size() == 3
        assert service.db_engine.pool._max_overflow == 4
        await service.create_session(app_name=app_name, user_id="ann")


def test_options_are_ignored_with_an_engine() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    service = DatabaseSessionService(db_engine=engine, pool_size=3, echo=True, no_such_option=1)
    assert service.db_engine is engine
    assert not engine.echo


async def test_the_registry_makes_it(fresh_database: Callable[[str], str], app_name: str) -> None:
    url = fresh_database("sqlite")
    registry = ServiceRegistry()
    registry.register_session_service("sqlite", DatabaseSessionService)
    options = {"agents_dir": "/agents", "connect_args": {"timeout": 1}}
    async with registry.create_session_service(url, **options) as service:
        assert type(service) is DatabaseSessionService
        made = await service.create_session(app_name=app_name, user_id="ann")
    path = "adk_sessions.adk.DatabaseSessionService"
    config = {"services": [{"scheme": "sqlite", "type": "session", "class": path}]}
    _register_services_from_yaml_config(config, registry)
    async with registry.create_session_service(url, **options) as service:
        assert type(service) is DatabaseSessionService
        assert await reload(service, made) == made


async def test_adks_own_ids_and_clock_are_used(service: Any, app_name: str) -> None:
    platform_uuid.set_id_provider(lambda: "the next id")
    platform_time.set_time_provider(lambda: 1_700_000_000.25)
    try:
        session = await service.create_session(app_name=app_name, user_id="ann")
    finally:
        platform_uuid.reset_id_provider()
        platform_time.reset_time_provider()
    assert (session.id, session.last_update_time) == ("the next id", 1_700_000_000.25)
    assert await reload(service, session) == session


# Life cycle


async def test_the_service_is_its_own_context(database_url: str, app_name: str) -> None:
    service = DatabaseSessionService(database_url)
    async with service as entered:
        assert entered is service
        session = await service.create_session(app_name=app_name, user_id="ann")
    await service.close()
    assert await reload(service, session) == session
    await service.close()
    await service.close()


@pytest.mark.parametrize("database_url", ["sqlite-memory"], indirect=True)
async def test_memory_is_empty_after_close(service: Any, session: Session) -> None:
    await service.close()
    assert await reload(service, session) is None
    assert await service.create_session(app_name=session.app_name, user_id="ann")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite:///:memory:"])
async def test_memory_is_one_database_for_all_tasks(url: str, app_name: str) -> None:
    async with DatabaseSessionService(url) as service, DatabaseSessionService(url) as other:
        calls = (service.create_session(app_name=app_name, user_id="ann") for _ in range(8))
        await asyncio.gather(*calls)
        assert len((await service.list_sessions(app_name=app_name)).sessions) == 8
        assert (await other.list_sessions(app_name=app_name)).sessions == []


# What comes back


@EVERY_DATABASE
async def test_objects_are_adks_own(service: Any, session: Session) -> None:
    await service.append_event(session, said())
    stored = await reload(service, session)
    listed = await service.list_sessions(app_name=session.app_name)
    assert [type(session), type(stored), type(listed.sessions[0])] == [Session] * 3
    assert type(listed) is ListSessionsResponse
    assert [type(event) for event in stored.events] == [Event]
    assert type(stored.events[0].content) is types.Content
    assert type(stored.events[0].actions) is EventActions


@EVERY_DATABASE
async def test_arguments_are_taken_as_adk_takes_them(service: Any, session: Session) -> None:
    for n in range(3):
        await service.append_event(session=session, event=said(timestamp=100.0 + n))
    ids = {"app_name": session.app_name, "user_id": "ann", "session_id": session.id}
    for config, expected in (
        (GetSessionConfig(), [100.0, 101.0, 102.0]),
        (GetSessionConfig(num_recent_events=2), [101.0, 102.0]),
        (GetSessionConfig(after_timestamp=101.0), [101.0, 102.0]),
        (GetSessionConfig(num_recent_events=1, after_timestamp=101.0), [102.0]),
        (GetSessionConfig(num_recent_events=0), []),
    ):
        stored = await service.get_session(**ids, config=config)
        assert [event.timestamp for event in stored.events] == expected
    await service.delete_session(**ids)
    assert await reload(service, session) is None


@EVERY_DATABASE
async def test_empty_ids_are_ids(service: Any, app_name: str) -> None:
    empty = await service.create_session(
        app_name=app_name, user_id="", session_id="", state={"user:a": 1}
    )
    other = await service.create_session(app_name=app_name, user_id=" ", session_id="")
    assert (empty.user_id, empty.id, other.state) == ("", "", {})
    await service.append_event(empty, said())
    assert await reload(service, empty) == empty
    assert (await service.list_sessions(app_name=app_name, user_id="")).sessions[0].id == ""
    assert await service.get_user_state(app_name=app_name, user_id="") == {"a": 1}
    await service.delete_session(app_name=app_name, user_id="", session_id="")
    assert await reload(service, empty) is None
    assert await reload(service, other) == other


@EVERY_DATABASE
async def test_the_local_zone_does_not_matter(
    service: Any, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        # The hour that is passed twice: 1:30 in summer time, then 1:30 in winter time.
        for timestamp in (1_762_061_400.5, 1_762_065_000.5):
            await service.append_event(session, said(timestamp=timestamp))
        created = await service.create_session(app_name=session.app_name, user_id="ben")
        assert abs(created.last_update_time - time.time()) < 60
        stored = await reload(service, session)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert [e.timestamp for e in stored.events] == [1_762_061_400.5, 1_762_065_000.5]
    assert stored == session == await reload(service, session)


class Remark(Event):
    stars: int = 0


@EVERY_DATABASE
async def test_an_event_may_be_of_a_subclass(service: Any, session: Session) -> None:
    remark = Remark(stars=5, author="user", invocation_id="1", actions={"stateDelta": {"a": 1}})
    assert await service.append_event(session, remark) is remark
    assert session.events == [remark]
    (stored,) = (await reload(service, session)).events
    assert type(stored) is Event
    assert stored.model_dump() == Event(**remark.model_dump(exclude={"stars"})).model_dump()


class Chat(Session):
    pass


@EVERY_DATABASE
async def test_a_session_may_be_of_a_subclass(service: Any, session: Session) -> None:
    chat = Chat(**session.model_dump())
    await service.append_event(chat, said(delta={"a": 1}))
    assert (await reload(service, session)).model_dump() == chat.model_dump()


# Errors are those of both


@EVERY_DATABASE
async def test_a_taken_id_is_both_errors(service: Any, session: Session) -> None:
    ids = {"app_name": session.app_name, "user_id": "ann", "session_id": session.id}
    for error in (AdkAlreadyExistsError, adk_sessions.AlreadyExistsError, adk.AlreadyExistsError):
        with pytest.raises(error, match=session.id) as caught:
            await service.create_session(**ids)
        assert not isinstance(caught.value, ValueError)
        assert caught.value.message == str(caught.value)


@EVERY_DATABASE
async def test_a_missing_session_is_both_errors(service: Any, session: Session) -> None:
    await service.delete_session(session.app_name, "ann", session.id)
    for error in (
        AdkSessionNotFoundError,
        adk_sessions.SessionNotFoundError,
        adk.SessionNotFoundError,
        ValueError,
    ):
        with pytest.raises(error):
            await service.append_event(session, said())


@EVERY_DATABASE
async def test_a_stale_session_is_both_errors(service: Any, session: Session) -> None:
    old = await reload(service, session)
    await service.append_event(session, said())
    for error in (
        AdkStaleSessionError,
        adk_sessions.StaleSessionError,
        adk.StaleSessionError,
        ValueError,
    ):
        with pytest.raises(error, match="modified in storage"):
            await service.append_event(old, said())


@EVERY_DATABASE
async def test_a_compaction_of_a_stale_session_is_refused_as_stale(
    service: Any, session: Session
) -> None:
    await service.append_event(session, said(timestamp=100.0))
    old = await reload(service, session)
    await service.append_event(session, said(timestamp=101.0))
    compaction = EventCompaction(
        start_timestamp=100.0,
        end_timestamp=100.0,
        compacted_content=types.Content(role="model", parts=[types.Part(text="in short")]),
    )
    event = Event(
        author="user", invocation_id="2", id="c", actions=EventActions(compaction=compaction)
    )
    before = copy.deepcopy((old, event))
    with pytest.raises(AdkStaleSessionError) as caught:
        await service.append_event(session=old, event=event)
    assert type(caught.value) is adk.StaleSessionError
    assert (old, event) == before
    assert await reload(service, session) == session
    await service.append_event(session, event)
    assert (await reload(service, session)).events[-1].actions.compaction == compaction


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_a_second_writer_that_is_allowed_to_be_one(database_url: str, app_name: str) -> None:
    async with DatabaseSessionService(database_url, on_stale="refresh") as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        old = await reload(service, session)
        await service.append_event(session, said("first", delta={"a": 1, "app:a": 1}))
        await service.append_event(session=old, event=said("second", delta={"temp:t": 1}))
        assert [event.content.parts[0].text for event in old.events] == ["first", "second"]
        assert old.state == {"a": 1, "app:a": 1, "temp:t": 1}
        assert (await reload(service, session)).events == old.events
        # a runner relies on the refusal of a compaction that has been overtaken
        compaction = EventCompaction(
            start_timestamp=1.0, end_timestamp=2.0, compacted_content=types.Content(parts=[])
        )
        event = Event(author="user", invocation_id="2", actions=EventActions(compaction=compaction))
        with pytest.raises(AdkStaleSessionError):
            await service.append_event(session, event)
        await service.append_event(old, event)
        with pytest.raises(AdkStaleSessionError):
            await service.append_event(session, said(), on_stale="raise")


async def test_state_changes_outside_a_run_leave_it_alone(database_url: str, app_name: str) -> None:
    async with DatabaseSessionService(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        await service.append_event(session, said(delta={"n": 1}))
        assert await service.update_state(
            app_name=app_name, user_id="ann", session_id=session.id, add={"n": 1, "app:n": 1}
        ) == {"n": 2, "app:n": 1}
        await service.append_event(session, said())
        assert (await reload(service, session)).state == {"n": 2, "app:n": 1}
        with pytest.raises(AdkSessionNotFoundError):
            await service.update_state(
                app_name=app_name, user_id="ann", session_id="none", delta={"n": 1}
            )


# The base class's hooks


class Counting(DatabaseSessionService):
    """Writes down which of the base class's steps ran."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[str] = []

    def _apply_temp_state(self, session: Session, event: Event) -> None:
        self.steps.append("apply temp")
        super()._apply_temp_state(session, event)

    def _trim_temp_delta_state(self, event: Event) -> Event:
        self.steps.append("trim temp")
        return super()._trim_temp_delta_state(event)

    def _commit_event_to_session(self, session: Session, event: Event) -> Event:
        self.steps.append("commit")
        return super()._commit_event_to_session(session, event)


@EVERY_DATABASE
async def test_the_base_classs_steps_run_once(database_url: str, app_name: str) -> None:
    async with Counting(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        for event in (said(delta={"temp:a": 1, "b": 2}), said()):
            await service.append_event(session, event)
            assert service.steps == ["apply temp", "trim temp", "commit"]
            service.steps.clear()
        assert session.state == {"temp:a": 1, "b": 2}
        assert (await reload(service, session)).state == {"b": 2}


@EVERY_DATABASE
async def test_a_batch_runs_the_steps_of_each_event(database_url: str, app_name: str) -> None:
    async with Counting(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        old = await reload(service, session)
        batch = [said("one", delta={"temp:a": 1, "b": 2}), said("two", delta={"app:c": 3})]
        assert await service.append_events(session, batch) == batch
        assert service.steps == ["apply temp", "trim temp", "commit"] * 2
        assert session.state == {"temp:a": 1, "b": 2, "app:c": 3}
        assert batch[0].actions.state_delta == {"b": 2}
        found = await reload(service, session)
        assert found.events == session.events == batch
        assert found.state == {"b": 2, "app:c": 3}
        with pytest.raises(AdkStaleSessionError):
            await service.append_events(old, [said("three"), said("four")])
        assert old.events == []


@EVERY_DATABASE
async def test_a_refused_append_runs_no_step(database_url: str, app_name: str) -> None:
    async with Counting(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        old = await reload(service, session)
        await service.append_event(session, said(id="taken"))
        service.steps.clear()
        delta = {"temp:a": 1, "b": 2}
        unknown = session.model_copy(update={"id": "unknown"})
        for target, event, error in (
            (old, said(delta=delta), AdkStaleSessionError),
            (unknown, said(delta=delta), AdkSessionNotFoundError),
            (session, said("other", id="taken", delta=delta), EventConflictError),
            (session, said(delta={"a\0": 1, **delta}), InvalidInputError),
            (session, said(timestamp=-1.0, delta=delta), InvalidInputError),
        ):
            with pytest.raises(error):
                await service.append_event(target, event)
            assert event.actions.state_delta["temp:a"] == 1
        partial = said(partial=True, delta=delta)
        assert await service.append_event(unknown, partial) is partial
        assert service.steps == []


# Copies of a session


COPIES: dict[str, Callable[[Session], Session]] = {
    "model_copy": Session.model_copy,
    "deep model_copy": lambda session: session.model_copy(deep=True),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda session: pickle.loads(pickle.dumps(session)),
}


@EVERY_DATABASE
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
async def test_a_copy_keeps_the_marker(
    service: Any, session: Session, copied: Callable[[Session], Session]
) -> None:
    await service.append_event(session, said())
    marker = session._storage_update_marker
    old, twin = copied(session), copied(session)
    assert old._storage_update_marker == twin._storage_update_marker == marker
    await service.append_event(twin, said("from the copy"))
    assert session._storage_update_marker == marker
    with pytest.raises(AdkStaleSessionError):
        await service.append_event(old, said())


@EVERY_DATABASE
async def test_a_session_from_json_may_grow(service: Any, session: Session) -> None:
    for n in range(2):
        await service.append_event(session, said(delta={f"{n}": n, "user:n": n}))
        parsed = Session.model_validate_json(session.model_dump_json())
        assert parsed._storage_update_marker is None
        assert parsed.model_dump() == session.model_dump()
        await service.append_event(parsed, said())
        assert await reload(service, session) == parsed
        outdated = Session.model_validate_json(session.model_dump_json())
        with pytest.raises(AdkStaleSessionError):
            await service.append_event(outdated, said())
        session = parsed


# Many tasks


@EVERY_DATABASE
async def test_services_may_start_and_work_at_once(
    database_url: str, app_name: str, request: pytest.FixtureRequest
) -> None:
    in_memory = request.node.callspec.params["database_url"] == "sqlite-memory"
    async with AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(DatabaseSessionService(database_url))
            for _ in range(1 if in_memory else 4)
        ]
        await work_together(services, app_name)


async def work_together(services: list[DatabaseSessionService], app_name: str) -> None:
    async def work(n: int) -> Session:
        one = services[n % len(services)]
        first = {f"{scope}create {n}": n for scope in SCOPES}
        session = await one.create_session(app_name=app_name, user_id="ann", state=first)
        other = services[(n + 1) % len(services)]
        second = {f"{scope}append {n}": n for scope in SCOPES} | {"temp:n": n}
        await other.append_event(session, said(delta=second))
        assert (await reload(one, session)).events == session.events
        if n % 2:
            await other.delete_session(app_name=app_name, user_id="ann", session_id=session.id)
        return session

    sessions = await asyncio.gather(*map(work, range(12)))
    expected = {f"{what} {n}": n for n in range(12) for what in ("create", "append")}
    assert await services[0].get_user_state(app_name=app_name, user_id="ann") == expected
    assert await services[-1].get_app_state(app_name=app_name) == expected
    listed = (await services[0].list_sessions(app_name=app_name, user_id="ann")).sessions
    assert {one.id for one in listed} == {one.id for one in sessions[::2]}


# An engine of the application's own

ENGINES = {
    "aiosqlite": ("sqlite", "sqlite+aiosqlite"),
    "aiosqlite-memory": ("sqlite-memory", "sqlite+aiosqlite"),
    "asyncpg": ("postgresql", "postgresql+asyncpg"),
    "psycopg": ("postgresql", "postgresql+psycopg"),
    "asyncmy": ("mariadb", "mysql+asyncmy"),
    "asyncmy-mariadb": ("mariadb", "mariadb+asyncmy"),
}
if importlib.util.find_spec("psycopg") is None:  # no driver of the project's: as a user may have it
    del ENGINES["psycopg"]
PRAGMAS = ("foreign_keys", "journal_mode", "synchronous", "busy_timeout", "defer_foreign_keys")


@pytest.fixture
async def make_engine(
    fresh_database: Callable[[str], str],
) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Makes engines on new databases; the test's end disposes them."""
    made: list[AsyncEngine] = []

    def make(kind: str, **options: Any) -> AsyncEngine:
        database, driver = ENGINES[kind]
        url = make_url(fresh_database(database)).set(drivername=driver)
        if kind == "aiosqlite-memory":
            shared = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
            made.append(create_async_engine(url, **shared))
        else:
            made.append(create_async_engine(url, **{"pool_size": 1, "max_overflow": 0, **options}))
        return made[-1]

    yield make
    for engine in made:
        await engine.dispose()


@pytest.fixture(params=ENGINES)
def engine_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(engine_kind: str, make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
    """An engine with one connection, so that whatever is left on it can be seen."""
    return make_engine(engine_kind)


def listeners(engine: AsyncEngine) -> dict[tuple[str, str], list[Any]]:
    """What is attached to an engine, to its pool and to its dialect."""
    sync_engine = engine.sync_engine
    return {
        (type(target).__name__, name): list(getattr(target.dispatch, name))
        for target in (sync_engine, sync_engine.pool, sync_engine.dialect)
        for name in type(target.dispatch)._event_names
    }


async def settings(engine: AsyncEngine) -> dict[str, Any]:
    """The state of the engine's only connection, and which one it is."""
    async with engine.connect() as conn:
        raw = await conn.get_raw_connection()
        found: dict[str, Any] = {
            "connection": id(raw.driver_connection),
            "isolation": await conn.get_isolation_level(),
            "default": conn.sync_connection.default_isolation_level,
        }
        if engine.dialect.name == "sqlite":
            for name in PRAGMAS:
                found[name] = (await conn.exec_driver_sql(f"PRAGMA {name}")).scalar()
            found["driver"] = raw.driver_connection.isolation_level
            found["in transaction"] = raw.driver_connection.in_transaction
        elif engine.dialect.name in ("mysql", "mariadb"):
            names = "autocommit", "foreign_key_checks", "sql_mode", "time_zone"
            query = f"SELECT {', '.join(f'@@SESSION.{name}' for name in names)}"
            found |= zip(names, (await conn.exec_driver_sql(query)).one(), strict=True)
        else:
            query = (
                "SELECT name, setting FROM pg_settings"
                # asyncpg switches jit off and on again while it looks at types
                " WHERE source = 'session' AND name NOT IN ('transaction_isolation', 'jit')"
            )
            found["settings"] = (await conn.exec_driver_sql(query)).all()
        return found


async def converse(service: DatabaseSessionService, app_name: str) -> Session:
    """Uses every operation, refusals included."""
    session = await service.create_session(
        app_name=app_name, user_id="ann", state={"a": 1, "user:b": 2, "app:c": 3}
    )
    old = await reload(service, session)
    await service.append_event(session, said(delta={"a": 2, "user:b": 3, "app:c": 4}))
    with pytest.raises(AdkStaleSessionError):
        await service.append_event(old, said())
    with pytest.raises(AdkAlreadyExistsError):
        await service.create_session(app_name=app_name, user_id="ann", session_id=session.id)
    assert await reload(service, session) == session
    assert len((await service.list_sessions(app_name=app_name)).sessions) == 1
    assert await service.get_user_state(app_name=app_name, user_id="ann") == {"b": 3}
    await service.delete_session(app_name, "ann", "unknown")
    return session


async def test_a_passed_engine_stays_as_it_was(engine: AsyncEngine, app_name: str) -> None:
    # The isolation level is compared as what it is: once set, asyncpg names it in each BEGIN.
    before, attached = await settings(engine), listeners(engine)
    options = dict(engine.sync_engine.get_execution_options())
    service = DatabaseSessionService(db_engine=engine)
    assert service.db_engine is engine
    await converse(service, app_name)
    assert await settings(engine) == before
    assert listeners(engine) == attached
    assert dict(engine.sync_engine.get_execution_options()) == options
    await service.close()
    assert await settings(engine) == before
    assert listeners(engine) == attached


async def test_a_passed_engine_is_not_disposed(engine: AsyncEngine, app_name: str) -> None:
    pool, connection = engine.pool, (await settings(engine))["connection"]
    async with DatabaseSessionService(db_engine=engine) as service:
        session = await converse(service, app_name)
    await service.close()
    assert engine.pool is pool
    # a disposed engine would have opened another one; in memory, another database
    assert (await settings(engine))["connection"] == connection
    assert await reload(service, session) == session
    assert await reload(DatabaseSessionService(db_engine=engine), session) == session


async def test_the_applications_transactions_stay_transactions(
    engine: AsyncEngine, app_name: str
) -> None:
    async with engine.begin() as conn:
        await conn.execute(text("CREATE TABLE notes (id INTEGER PRIMARY KEY)"))

    async def count() -> int:
        async with engine.connect() as conn:
            return int((await conn.execute(text("SELECT count(*) FROM notes"))).scalar_one())

    service = DatabaseSessionService(db_engine=engine)
    session = await service.create_session(app_name=app_name, user_id="ann")
    for n in range(2):
        async with engine.connect() as conn:
            await conn.execute(text("INSERT INTO notes VALUES (:id)"), {"id": n})
            await conn.rollback()
        assert await count() == n
        await service.append_event(session, said())
        async with engine.begin() as conn:
            await conn.execute(text("INSERT INTO notes VALUES (:id)"), {"id": n})
        await service.append_event(session, said())
        assert await count() == n + 1
    assert await reload(service, session) == session


@pytest.mark.parametrize("engine_kind", [kind for kind in ENGINES if "sqlite" not in kind])
async def test_an_open_transaction_of_the_application_is_no_matter(
    engine_kind: str, make_engine: Callable[..., AsyncEngine], app_name: str
) -> None:
    engine = make_engine(engine_kind, pool_size=2)
    async with engine.begin() as conn:
        await conn.execute(text("CREATE TABLE notes (id INTEGER PRIMARY KEY)"))
    service = DatabaseSessionService(db_engine=engine)
    session = await service.create_session(app_name=app_name, user_id="ann")
    async with engine.connect() as conn:
        await conn.execute(text("INSERT INTO notes VALUES (1)"))
        await service.append_event(session, said(delta={"a": 1, "app:b": 2}))
        await conn.rollback()
    assert await reload(service, session) == session
    async with engine.connect() as conn:
        assert (await conn.execute(text("SELECT count(*) FROM notes"))).scalar_one() == 0


LEVELS = {
    "aiosqlite": ("SERIALIZABLE", "READ UNCOMMITTED", "AUTOCOMMIT"),
    "aiosqlite-memory": ("SERIALIZABLE",),
} | dict.fromkeys(
    ("asyncpg", "psycopg", "asyncmy"),
    ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"),
)


@pytest.mark.parametrize(
    ("engine_kind", "level"),
    [(kind, level) for kind in LEVELS for level in LEVELS[kind] if kind in ENGINES],
)
async def test_services_on_one_engine_keep_every_key(
    engine_kind: str, level: str, make_engine: Callable[..., AsyncEngine], app_name: str
) -> None:
    engine = make_engine(engine_kind, pool_size=4, isolation_level=level)
    services = [DatabaseSessionService(db_engine=engine) for _ in range(2)]

    async def work(n: int) -> None:
        service = services[n % 2]
        state = {f"{scope}create {n}": n for scope in SCOPES}
        session = await service.create_session(app_name=app_name, user_id="ann", state=state)
        delta = {f"{scope}append {n}": n for scope in SCOPES}
        await service.append_event(session, said(delta=delta))

    await asyncio.gather(*map(work, range(12)))
    expected = {f"{what} {n}": n for n in range(12) for what in ("create", "append")}
    assert await services[0].get_user_state(app_name=app_name, user_id="ann") == expected
    assert await services[1].get_app_state(app_name=app_name) == expected


class TestOnAPassedEngine(_OnURLs):
    """A part of the kit where a file is not reached by a URL but by an engine.

    ADK_SESSIONS_SOAK=1 runs all of it.
    """

    locals().update(PART)

    @pytest.fixture
    def backend(self) -> str:
        return "aiosqlite"

    @pytest.fixture
    def new_service(
        self, backend: str, make_engine: Callable[..., AsyncEngine]
    ) -> Callable[[], Any]:
        engine = make_engine(backend, pool_size=4)
        return lambda: DatabaseSessionService(db_engine=engine)


del _OnURLs  # or its tests would run once more
