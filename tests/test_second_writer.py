"""on_stale="refresh": an append that others have overtaken is stored, and brings them along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import pytest
from everywhere import BACKENDS, EVERY_DATABASE, place_of
from workers import event, in_each_scope, load, seen

from adk_sessions import (
    ConfigurationError,
    Event,
    EventActions,
    EventConflictError,
    InvalidInputError,
    Session,
    SessionNotFoundError,
    SessionService,
    StaleSessionError,
)

WRITERS = 8


@pytest.fixture(params=EVERY_DATABASE)
def make(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> Callable[[], SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    return lambda: SessionService(url, on_stale="refresh", **options)


@pytest.fixture
async def service(make: Callable[[], SessionService]) -> AsyncIterator[SessionService]:
    async with make() as service:
        yield service


@pytest.fixture
async def session(service: SessionService, app_name: str) -> Session:
    return await service.create_session(
        app_name=app_name, user_id="ann", session_id="s", state={"kept": 0, "app:kept": 0}
    )


async def stored(service: SessionService, session: Session) -> Session:
    return await load(service, session.app_name, session.user_id, session.id)


async def equal(service: SessionService, session: Session) -> None:
    again = await stored(service, session)
    assert session == again
    assert session._storage_update_marker == again._storage_update_marker


def ids(session: Session) -> list[str]:
    return [event.id for event in session.events]


async def test_what_lies_between_comes_along_in_order(
    service: SessionService, session: Session
) -> None:
    mine, other = await stored(service, session), await stored(service, session)
    await service.append_event(other, event("a", in_each_scope("a")))
    await service.append_event(other, event("b", {"kept": 1, "app:kept": 1}))
    given = event("c", in_each_scope("c"))
    assert await service.append_event(mine, given) is given
    assert ids(mine) == ["a", "b", "c"]
    assert mine.events[-1] is given
    assert mine.state == in_each_scope("a") | in_each_scope("c") | {"kept": 1, "app:kept": 1}
    await equal(service, mine)
    # and the other way round, from where it is now
    await service.append_event(other, event("d", {}))
    assert ids(other) == ["a", "b", "c", "d"]
    await equal(service, other)


async def test_of_many_writers_on_one_session_none_fails_and_none_is_lost(
    service: SessionService, session: Session
) -> None:
    views = [await stored(service, session) for _ in range(WRITERS)]

    async def write(number: int) -> None:
        for n in range(6):
            name = f"{number}-{n}"
            await service.append_event(views[number], event(name, in_each_scope(name)))

    await asyncio.gather(*(write(number) for number in range(WRITERS)))
    final = await stored(service, session)
    expected = {f"{number}-{n}" for number in range(WRITERS) for n in range(6)}
    assert sorted(ids(final)) == sorted(expected)
    assert seen(final).state.keys() >= {key for name in expected for key in in_each_scope(name)}
    for view in views:
        assert ids(view) == ids(final)[: len(view.events)]


@pytest.mark.parametrize("make", sorted(set(BACKENDS) - {"sqlite-memory"}), indirect=True)
async def test_writers_with_services_of_their_own_wait_for_each_other_in_the_database(
    make: Callable[[], SessionService], service: SessionService, session: Session
) -> None:
    services = [make() for _ in range(WRITERS)]
    views = [await stored(service, session) for _ in services]

    async def write(number: int) -> None:
        for n in range(6):
            delta = {f"app:{number}": n}
            await services[number].append_event(views[number], event(f"{number}-{n}", delta))

    try:
        await asyncio.gather(*(write(number) for number in range(WRITERS)))
    finally:
        for other in services:
            await other.close()
    final = await stored(service, session)
    assert len(set(ids(final))) == len(final.events) == 6 * WRITERS
    assert {key: value for key, value in final.state.items() if "kept" not in key} == {
        f"app:{number}": 5 for number in range(WRITERS)
    }
    for view in views:
        assert ids(view) == ids(final)[: len(view.events)]


async def test_temporary_state_stays(service: SessionService, session: Session) -> None:
    mine, other = await stored(service, session), await stored(service, session)
    await service.append_event(mine, event("a", {"temp:old": 1}))
    await service.append_event(other, event("b", {"app:b": 1}))
    await service.append_event(mine, event("c", {"temp:new": 2}))
    assert mine.state == {"kept": 0, "app:kept": 0, "app:b": 1, "temp:old": 1, "temp:new": 2}
    assert mine.events[-1].actions.state_delta == {}


async def test_a_batch_is_appended_behind_what_lies_between(
    service: SessionService, session: Session
) -> None:
    mine, other = await stored(service, session), await stored(service, session)
    # from a clock that is ahead
    await service.append_event(other, event("a", {"a": 1}, timestamp=4e9))
    await service.append_events(mine, [event(name, {name: 1}) for name in ("b", "c", "d")])
    await service.append_event(other, event("e", {}))
    assert ids(other) == ids(await stored(service, session)) == ["a", "b", "c", "d", "e"]
    assert ids(mine) == ["a", "b", "c", "d"]


async def test_the_revision_goes_on_from_the_stored_one(
    service: SessionService, session: Session
) -> None:
    mine, other = await stored(service, session), await stored(service, session)
    revisions = []
    for view in (mine, other, mine, other):
        await service.append_event(view, event(f"e{len(revisions)}", {}, timestamp=1.0))
        revisions.append(view._storage_update_marker or "")
    assert all(before < after for before, after in pairwise(revisions))


async def test_the_same_event_again_changes_nothing_and_brings_what_was_missed(
    service: SessionService, session: Session
) -> None:
    mine, other = await stored(service, session), await stored(service, session)
    copy = mine.model_copy(deep=True)
    again = event("a", {"n": 1}, timestamp=5.0)
    await service.append_event(mine, again.model_copy(deep=True))
    await service.append_event(other, event("b", {"n": 2}))
    await service.append_event(copy, again)
    assert ids(copy) == ["a", "b"]
    assert copy.state["n"] == 2
    await equal(service, copy)
    with pytest.raises(EventConflictError):
        await service.append_event(copy, event("a", {"n": 3}))
    await equal(service, copy)


async def test_a_filtered_view_stays_one(service: SessionService, session: Session) -> None:
    for name in "abc":
        await service.append_event(session, event(name, {}))
    mine = await service.get_session(
        app_name=session.app_name, user_id="ann", session_id="s", num_recent_events=1
    )
    assert mine is not None
    await service.append_event(session, event("d", {}))
    await service.append_event(mine, event("e", {}))
    assert ids(mine) == ["c", "d", "e"]


async def test_a_session_made_by_hand_gets_what_is_stored(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, event("a", {"n": 1}))
    by_hand = Session(id="s", app_name=session.app_name, user_id="ann")
    await service.append_event(by_hand, event("b", {}))
    assert ids(by_hand) == ["a", "b"]
    await equal(service, by_hand)
    # one that claims to be newer than anything stored is taken at its word
    ahead = Session(id="s", app_name=session.app_name, user_id="ann", last_update_time=5e9)
    await service.append_event(ahead, event("c", {}))
    assert ids(ahead) == ["c"]
    await service.append_event(ahead, event("d", {}))
    assert ids(await stored(service, session)) == ["a", "b", "c", "d"]


async def test_each_append_may_say_it_otherwise(service: SessionService, session: Session) -> None:
    mine, other = await stored(service, session), await stored(service, session)
    await service.append_event(other, event("a", {}))
    before = mine.model_dump()
    for append in (
        service.append_event(mine, event("b", in_each_scope("b")), on_stale="raise"),
        service.append_events(mine, [event("b", {}), event("c", {})], on_stale="raise"),
    ):
        with pytest.raises(StaleSessionError):
            await append
    assert mine.model_dump() == before
    assert ids(await stored(service, session)) == ["a"]


@pytest.mark.parametrize("batch", [False, True])
async def test_a_compaction_of_what_is_no_longer_all_is_refused(
    service: SessionService, session: Session, batch: bool
) -> None:
    mine, other = await stored(service, session), await stored(service, session)
    compacting = Event(
        id="c",
        actions=EventActions(state_delta={"n": 1}, compaction={"start_timestamp": 1.0}),  # type: ignore[call-arg]
    )
    await service.append_event(other, event("a", {}))
    before = mine.model_dump()
    append = (
        service.append_events(mine, [event("b", {}), compacting])
        if batch
        else service.append_event(mine, compacting)
    )
    with pytest.raises(StaleSessionError):
        await append
    assert mine.model_dump() == before
    assert ids(await stored(service, session)) == ["a"]
    await service.append_event(other, compacting)
    assert ids(await stored(service, session)) == ["a", "c"]


async def test_a_deleted_session_is_not_found(service: SessionService, session: Session) -> None:
    mine = await stored(service, session)
    await service.append_event(session, event("a", {}))
    await service.delete_session(session.app_name, "ann", "s")
    with pytest.raises(SessionNotFoundError):
        await service.append_event(mine, event("b", in_each_scope("b")))
    assert await service.get_user_state(app_name=session.app_name, user_id="ann") == {}
    assert mine.events == []


async def test_a_session_that_was_deleted_and_made_anew(
    service: SessionService, session: Session
) -> None:
    old = await stored(service, session)
    await service.append_event(old, event("a", {"gone": 1}))
    await service.delete_session(session.app_name, "ann", "s")
    new = await service.create_session(app_name=session.app_name, user_id="ann", session_id="s")
    await service.append_event(new, event("b", {"n": 1}))
    await service.append_event(old, event("c", {}))
    assert ids(old) == ["b", "c"]
    await equal(service, old)


async def test_a_session_that_was_made_anew_by_a_clock_that_is_behind(
    service: SessionService, session: Session
) -> None:
    old = await stored(service, session)
    await service.append_event(old, event("a", {"gone": 1}, timestamp=4e9))
    await service.delete_session(session.app_name, "ann", "s")
    await service.create_session(app_name=session.app_name, user_id="ann", session_id="s")
    await service.append_event(old, event("b", {"n": 1, "temp:t": 1}))
    assert ids(old) == ["b"]
    assert old.state.pop("temp:t") == 1
    await equal(service, old)


async def test_copies_that_share_their_list_of_events_have_the_whole_state(
    service: SessionService, session: Session
) -> None:
    one, other = session, session.model_copy(update={"state": dict(session.state)})
    other._storage_update_marker = one._storage_update_marker
    await service.append_event(one, event("a", {"k": 1}))
    await service.append_event(other, event("b", {"j": 1}))
    assert other.state == (await stored(service, session)).state


async def test_other_words_are_refused(tmp_path: Any, app_name: str) -> None:
    with pytest.raises(ConfigurationError, match="on_stale"):
        SessionService("sqlite://", on_stale="ignore")  # type: ignore[arg-type]
    async with SessionService(f"sqlite:///{tmp_path}/a.db") as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        with pytest.raises(InvalidInputError) as raised:
            await service.append_event(session, event("a", {}), on_stale="ignore")  # type: ignore[arg-type]
        assert raised.value.field == "on_stale"
        other = await stored(service, session)
        await service.append_event(other, event("a", {}))
        with pytest.raises(StaleSessionError):  # the default
            await service.append_event(session, event("b", {}))
