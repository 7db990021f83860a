"""Counts by application, and changes of a state that no event has made, on every database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from everywhere import EVERY_DATABASE, place_of

from adk_sessions import ConfigurationError, Event, SessionService, survey


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


async def test_what_there_is(service: SessionService, app_name: str) -> None:
    of = {"app_name": app_name, "user_id": "ann"}
    assert await survey.applications(service, app_name) == []
    session = await service.create_session(**of, session_id="s", state={"topic": "tea"})
    await service.update_state(**of, session_id="s", delta={"early": 1})
    for name in ("e1", "e2"):
        await service.append_event(session, Event(id=name, author="u", invocation_id="i"))
    await service.update_state(**of, session_id="s", delta={"late": [1]}, delete=["topic"])
    await service.update_state(**of, session_id="s", add={"early": 1})
    await service.create_session(app_name=app_name, user_id="bob", session_id="s")
    await service.archive_session(app_name, "bob", "s")

    [found] = await survey.applications(service, app_name)
    assert (found.sessions, found.archived, found.users, found.events) == (2, 1, 2, 2)
    assert found.oldest is not None
    assert found.newest is not None
    assert found.oldest < found.newest
    [uncounted] = await survey.applications(service, app_name, events=False)
    assert uncounted.events is None
    assert found in await survey.applications(service)
    assert (await survey.size(service) or 0) > 10_000

    changes = await survey.state_changes(service, app_name, "ann", "s")
    assert [(change.after, change.delta, change.deleted) for change in changes] == [
        (None, {"early": 1}, []),
        ("e2", {"late": [1]}, ["topic"]),
        ("e2", {"early": 2}, []),
    ]
    assert await survey.state_changes(service, app_name, "bob", "s") == []


async def test_changes_of_a_fork_come_after_what_was_copied(
    service: SessionService, app_name: str
) -> None:
    of = {"app_name": app_name, "user_id": "ann"}
    session = await service.create_session(**of, session_id="s")
    for name in ("e1", "e2"):
        await service.append_event(session, Event(id=name, author="u"))
    fork = await service.fork_session(session, session_id="fork")
    await service.update_state(**of, session_id="fork", delta={"a": 1})
    await service.append_event(fork, Event(id="e3", author="u"))
    await service.update_state(**of, session_id="fork", delta={"a": 2})
    changes = await survey.state_changes(service, app_name, "ann", "fork")
    assert [(change.after, change.delta) for change in changes] == [
        ("e2", {"a": 1}),
        ("e3", {"a": 2}),
    ]


async def test_ids_that_cannot_be(service: SessionService) -> None:
    assert await survey.applications(service, "x" * 200) == []
    assert await survey.state_changes(service, "\0", "u", "s") == []


async def test_not_with_row_level_security() -> None:
    service = SessionService("postgresql://u@127.0.0.1:1/db", row_level_security=True)
    with pytest.raises(ConfigurationError, match="role that the policies do not bind"):
        await survey.applications(service)
