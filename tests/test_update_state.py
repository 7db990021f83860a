"""update_state: state changes outside of a conversation, and two who count lose nothing."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from everywhere import EVERY_DATABASE, place_of
from rows import execute
from workers import event, in_each_scope, load

from adk_sessions import (
    InvalidInputError,
    OutcomeUnknownError,
    Session,
    SessionNotFoundError,
    SessionService,
)
from adk_sessions.dialects.faults import Undecided


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


@pytest.fixture
async def session(service: SessionService, app_name: str) -> Session:
    return await service.create_session(
        app_name=app_name, user_id="ann", session_id="s", state={"n": 1, "app:n": 1, "user:n": 1}
    )


def of(session: Session) -> dict[str, str]:
    return {"app_name": session.app_name, "user_id": session.user_id, "session_id": session.id}


async def state(service: SessionService, session: Session) -> dict[str, Any]:
    return (await load(service, session.app_name, session.user_id, session.id)).state


async def test_keys_of_all_scopes_are_set_added_to_and_deleted(
    service: SessionService, session: Session
) -> None:
    before = await load(service, session.app_name, "ann", "s")
    result = await service.update_state(
        **of(session),
        delta={"a": [1], "app:a": None, "user:a": {"b": 1.5}},
        add={"n": 2, "app:n": -3, "user:n": 0.5},
        delete=["never"],
    )
    changed = {"a": [1], "app:a": None, "user:a": {"b": 1.5}, "n": 3, "app:n": -2, "user:n": 1.5}
    assert result == changed
    after = await load(service, session.app_name, "ann", "s")
    assert after.state == changed
    assert await service.update_state(**of(session), delete=["a", "app:a", "user:n"]) == {}
    assert await state(service, session) == {
        "user:a": {"b": 1.5}, "n": 3, "app:n": -2,
    }  # fmt: skip
    # no event, and the revision is what it was
    assert after.events == []
    assert after._storage_update_marker == before._storage_update_marker


async def test_a_running_turn_does_not_become_stale(
    service: SessionService, session: Session
) -> None:
    await service.append_event(session, event("a", {"a": 1}))
    await service.update_state(**of(session), add={"n": 1, "app:n": 1, "user:n": 1}, delete=["a"])
    await service.append_event(session, event("b", in_each_scope("b")))
    assert await state(service, session) == in_each_scope("b") | {"n": 2, "app:n": 2, "user:n": 2}


async def test_wider_scopes_need_no_session(service: SessionService, app_name: str) -> None:
    assert await service.update_state(app_name=app_name, add={"app:n": 1}) == {"app:n": 1}
    assert await service.update_state(
        app_name=app_name, user_id="bob", delta={"user:a": 1}, add={"app:n": 1}
    ) == {"user:a": 1, "app:n": 2}
    assert await service.get_app_state(app_name=app_name) == {"n": 2}
    assert await service.get_user_state(app_name=app_name, user_id="bob") == {"a": 1}
    created = await service.create_session(app_name=app_name, user_id="bob")
    assert created.state == {"app:n": 2, "user:a": 1}


SUMS: list[tuple[Any, Any, Any]] = [
    (2**53, 1, 2**53 + 1),
    (10**40, -1, 10**40 - 1),
    (-(10**5000), 1, -(10**5000) + 1),
    (1, 0.5, 1.5),
    (0.1, 0.2, 0.1 + 0.2),
    (1.5, 1, 2.5),
    (1e16, 1.0, 1e16 + 1.0),
    (1.0, 1, 2.0),
    (-0.0, -0.0, -0.0),
    (1e308, 1e308, math.inf),
    (math.inf, -math.inf, math.nan),
    (0, 0, 0),
]


async def test_integers_are_added_exactly_and_others_as_doubles(
    service: SessionService, session: Session
) -> None:
    for stored, amount, total in SUMS:
        await service.update_state(**of(session), delta={"x": stored, "app:x": stored})
        result = await service.update_state(**of(session), add={"x": amount, "app:x": amount})
        kept = await state(service, session)
        for found in (result["x"], result["app:x"], kept["x"], kept["app:x"]):
            assert type(found) is type(total)
            assert found == total or (math.isnan(found) and math.isnan(total))
            if isinstance(total, float):
                assert math.copysign(1, found) == math.copysign(1, total) or math.isnan(total)


async def test_none_is_a_value_and_a_missing_key_is_zero(
    service: SessionService, session: Session
) -> None:
    await service.update_state(**of(session), delta={"none": None}, add={"new": 4, "half": 0.5})
    assert await state(service, session) == {
        "n": 1, "app:n": 1, "user:n": 1, "none": None, "new": 4, "half": 0.5,
    }  # fmt: skip


async def test_keys_that_are_escaped_are_keys_like_others(
    service: SessionService, session: Session
) -> None:
    key = "adk_sessions:n"
    for scope in ("", "app:", "user:"):
        await service.update_state(**of(session), delta={scope + key: 5})
        for total in (6, 7):
            result = await service.update_state(**of(session), add={scope + key: 1})
            assert result == {scope + key: total}
        await service.update_state(**of(session), delete=[scope + key])
    assert await state(service, session) == {"n": 1, "app:n": 1, "user:n": 1}


@pytest.mark.parametrize("scope", ["", "user:", "app:"])
async def test_those_who_count_at_once_lose_nothing(
    service: SessionService, session: Session, scope: str
) -> None:
    async def count() -> list[Any]:
        return [
            (await service.update_state(**of(session), add={f"{scope}n": 1}))[f"{scope}n"]
            for _ in range(8)
        ]

    async def append() -> None:
        for n in range(8):
            await service.append_event(session, event(f"e{n}", {f"{scope}e": n}))

    *counted, _ = await asyncio.gather(count(), count(), count(), append())
    found = await state(service, session)
    assert (found[f"{scope}n"], found[f"{scope}e"]) == (25, 7)
    # each call has a number of its own
    assert sorted(number for numbers in counted if numbers for number in numbers) == list(
        range(2, 26)
    )


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("add", {"add": {"text": 1}}),
    ("add", {"add": {"none": 1}}),
    ("add", {"add": {"flag": 1}}),
    ("add", {"add": {"huge": 0.5}}),
    ("add", {"add": {"n": "1"}}),
    ("add", {"add": {"n": True}}),
    ("add", {"add": {"n": None}}),
    ("add", {"add": ["n"]}),
    ("delta", {"delta": {"temp:a": 1}}),
    ("delta", {"delta": {1: 1}}),
    ("delta", {"delta": [("a", 1)]}),
    ("delta", {"delta": {"a\0": 1}}),
    ("add", {"delta": {"a": 1}, "add": {"a": 1}}),
    ("delete", {"add": {"n": 1}, "delete": ["n"]}),
    ("delete", {"delete": "n"}),
    ("delete", {"delete": [1]}),
    ("delete", {"delete": 1}),
    ("session_id", {"delta": {"a": 1}, "session_id": None}),
    ("user_id", {"delta": {"user:a": 1}, "session_id": None, "user_id": None}),
    ("user_id", {"delta": {"a": 1}, "user_id": None}),
    ("app_name", {"delta": {"app:a": 1}, "app_name": "a" * 129}),
]


async def test_bad_input_stores_nothing(service: SessionService, session: Session) -> None:
    await service.update_state(
        **of(session), delta={"text": "1", "none": None, "flag": True, "huge": 10**400}
    )
    before = await state(service, session)
    for field, arguments in REFUSED:
        call: dict[str, Any] = {**of(session), **arguments}
        # what is sound beside it is not stored either
        delta = call.get("delta", {})
        if isinstance(delta, dict):
            call["delta"] = {"app:fine": 1, **delta}
        with pytest.raises(InvalidInputError) as raised:
            await service.update_state(**call)
        assert raised.value.field == field, arguments
    assert await state(service, session) == before


async def test_there_must_be_such_a_session(service: SessionService, session: Session) -> None:
    for key in ({"session_id": "none"}, {"user_id": "bob"}):
        with pytest.raises(SessionNotFoundError):
            await service.update_state(
                **{**of(session), **key}, delta={"a": 1, "app:a": 1, "user:a": 1}
            )
    assert await state(service, session) == {"n": 1, "app:n": 1, "user:n": 1}
    assert await service.get_user_state(app_name=session.app_name, user_id="bob") == {}


async def test_nothing_to_change_is_nothing(service: SessionService, session: Session) -> None:
    assert await service.update_state(**of(session)) == {}
    assert await service.update_state(**of(session), delta={}, add={}, delete=[]) == {}
    assert await state(service, session) == {"n": 1, "app:n": 1, "user:n": 1}


@pytest.mark.parametrize("service", ["postgresql", "mariadb"], indirect=True)
async def test_an_unknown_outcome_is_never_repeated(
    service: SessionService, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = service._database.run
    calls = 0

    async def broken(work: Any, **options: Any) -> Any:
        nonlocal calls
        result = await run(work, **options)
        if options.get("once"):
            calls += 1
            raise Undecided(ConnectionResetError())
        return result

    monkeypatch.setattr(service._database, "run", broken)
    with pytest.raises(OutcomeUnknownError, match="read the state"):
        await service.update_state(**of(session), add={"n": 1})
    assert calls == 1
    assert (await state(service, session))["n"] == 2


async def test_a_state_that_changed_while_it_was_waited_for_is_no_error(
    mariadb_url: str, app_name: str
) -> None:
    """With the isolation that servers have by default; recent ones refuse such a row: 1020."""
    snapshots = {"init_command": "SET SESSION innodb_snapshot_isolation = ON"}
    async with (
        SessionService(mariadb_url) as other,
        SessionService(
            mariadb_url,
            connect_args=snapshots,
            isolation_level="REPEATABLE READ",
            retry_window=0,
        ) as service,
    ):
        session = await other.create_session(app_name=app_name, user_id="ann", session_id="s")
        lock, changed = service._statements.lock_scope, []

        async def change(key: str) -> None:
            async with SessionService(mariadb_url, migrate="off") as other:
                await other.update_state(app_name=app_name, user_id="ann", delta={key: 1})

        def change_first(conn: Any, table: Any, *args: Any) -> Any:
            changed.append("user:a" if table is service.models.user_states else "app:a")
            # these statements are in the thread of a loop
            thread = threading.Thread(target=asyncio.run, args=(change(changed[-1]),))
            thread.start()
            thread.join()
            return lock(conn, table, *args)

        service._statements.lock_scope = change_first  # type: ignore[method-assign]
        add = {"n": 1, "app:n": 1, "user:n": 1}
        result = await service.update_state(**of(session), add=add)
        assert changed == ["app:a", "user:a"]
        assert await state(other, session) == result | dict.fromkeys(changed, 1)


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql", "mariadb"], indirect=True)
async def test_a_change_lies_behind_an_event_whatever_google_adk_has_made_of_the_clock(
    database_url: str, app_name: str
) -> None:
    """Its own service may move update_time back."""
    async with SessionService(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann", session_id="s")
        await service.append_event(session, event("a", {"n": 0}))
        await execute(
            database_url,
            "UPDATE sessions SET update_time = '2020-01-01 00:00:00.000000' WHERE app_name = :app",
            app=app_name,
        )
        for n in ("first", "second"):
            await service.update_state(**of(session), delta={"n": n})
        again = await load(service, app_name, "ann", "s")
        await service.append_event(again, event("b", {"m": 1}))
        then = await service.get_session(**of(session), at="b")
        assert then is not None
        assert then.state == await state(service, session) == {"n": "second", "m": 1}
