"""What every session service must do, as tests: subclass `SessionServiceContract`, run pytest."""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import json
import math
import re
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pprint import saferepr
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from ..errors import (
    AlreadyExistsError,
    EventConflictError,
    InvalidInputError,
    SessionNotFoundError,
    StaleSessionError,
)
from ..session import Event, EventActions, GetSessionConfig, ListSessionsResponse

__all__ = ["SessionServiceContract"]

SCOPES = ("", "user:", "app:")

# Texts that a case-blind, trimming, normalising or escaping storage takes for one another.
ALIKE = ("bob", "Bob", "bob ", " bob", "bob\n", "b\u00f6b", "bo\u0308b", "", " ", "%", "b_b", "😀")

# Values of one kind, each of which is stored by itself and in a list with its like.
VALUES: dict[str, list[Any]] = {
    "numbers": [0, 1, 1.0, -0.0, 2**53 + 1, 2**64, 10**40, -(10**40)],
    "floats": [0.1 + 0.2, 1e15, 1e16, -1e16, 1e300, 5e-324, 1.7976931348623157e308],
    "nan and infinities": [math.nan, math.inf, -math.inf],
    "not numbers": [None, True, False, "1", "true", "null", "NaN", "-0.0", "1e16", str(10**40)],
    "containers": [{}, [], "", {"a": {}, "b": []}, {"1": [1, [1.0, [True]]]}],
    "50 deep": [json.loads('{"k":[' * 25 + "]}" * 25)],
    "keys": [{"": 1, " ": 2, "a.b": 3, "$": 4, '"': 5, "😀": 6, "A": 7, "a": 8, "null": None}],
    "unicode": ["👩‍👩‍👧", "e\u0301", "é", "\u2028\ufeff", "\uffff\ufffd", "\ue000", "\x01"],
    "longer than 64 KiB": ["ü" * 70_000],
    "NUL": ["\0", "a\0b", "\0\0", "\0\\u0000"],
    "lone surrogates": ["\ud800", "a\udfffb", "\udc00\ud800", "\0\\ud800\ud800\\"],
    "surrogates side by side": ["\ud83d\ude00"],
    "NUL in keys": [{"\0": {"a\0": [{"\0": 1}]}}, {"\0": 1, "\\u0000": 2, "\\\\u0000": 3}],
    "surrogates in keys": [{"\ud800": {"\udfff": [{"a\udfff": 1}]}}, {"\ud800": 1, "\\ud800": 2}],
    "text like an escape": ["\\u0000", "\\\\u0000", "\\ud800", "\\", "\\x00", "%00", "%ED%A0%80"],
    "text like JSON": ['{"a": 1}', '"\\u0000"', '"a"', "[NaN]", '"', "[]", "{}"],
    "text like a tag": ["adk_sessions:", "adk_sessions:text:%00", "adk_sessions:float:nan"],
    "dicts like a tag": [{"$float": "nan"}, {"__type__": "str"}, {"adk_sessions:text:%00": "a"}],
}  # fmt: skip

# A value, and the JSON form in which it is stored.
COERCED: dict[str, tuple[Any, Any]] = {
    "datetime": (datetime(2026, 1, 2, 3, 4, 5, 678, UTC), "2026-01-02T03:04:05.000678Z"),
    "naive datetime": (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),
    "date": (date(2026, 1, 2), "2026-01-02"),
    "set": ({"a"}, ["a"]),
    "tuple": ((1, (2, "b")), [1, [2, "b"]]),
    "bytes": (b"text \xc3\xa9", "text é"),
    "integer keys": ({1: {2: "a"}}, {"1": {"2": "a"}}),
    "model": (ListSessionsResponse(), {"sessions": []}),
}

TIMESTAMPS = (
    *(0.0, 1e-06, 0.1, 1.0000005, 1e9 / 3, 1_700_000_000.0, 1_700_000_000.1234567),
    *(math.nextafter(1_700_000_000.1, math.inf), 1_700_000_000.9999998, 1_234_567_890.123456),
    # Within the hour that Europe and North America pass twice when summer time ends.
    *(1_761_438_600.25, 1_761_442_200.25, 1_762_061_400.5, 1_762_065_000.5),
    datetime(8999, 12, 31, tzinfo=UTC).timestamp(),
)

# Offsets in seconds between the events of one session.
CLOCKS: dict[str, tuple[float, ...]] = {
    "a right clock": (1, 2, 3, 4),
    "equal timestamps": (5, 5, 5, 5),
    "a clock a day back": (1, -86_400, -86_399, 2),
    "a clock a day ahead": (86_400, 1, 2, 86_400),
    "a clock that runs backwards": (4, 3, 2, 1),
    "steps below a microsecond": (1.0000002, 1.0000007, 1.0000004, 1.0),
}

CHANGES: dict[str, dict[str, Any]] = {
    "content": {"text": "other"},
    "a value in the delta": {"state_delta": {"a": 2}},
    "the type of a value": {"state_delta": {"a": True}},
    "one more key in the delta": {"state_delta": {"a": 1, "app:b": 1}},
    "timestamp": {"timestamp": 1_700_000_000.5},
    "author": {"author": "agent"},
    "one more field": {"custom_metadata": {"a": 1}},
}

BAD_IDS = {"too long": "x" * 129, "too wide": "😀" * 129, "NUL": "a\0b", "lone surrogate": "\ud800"}
BAD_STATES: dict[str, Any] = {
    "a list": ["a"],
    "text": "text",
    "an integer key": {"good": 1, 1: "bad"},
    "NUL in a key": {"good": 1, "a\0b": "bad"},
    "NUL in a key of the app": {"good": 1, "app:a\0b": "bad"},
    "a lone surrogate in a key": {"good": 1, "user:a\ud800b": "bad"},
}
BAD_TIMES = (math.nan, math.inf, -math.inf, -1.0, datetime(9001, 1, 2, tzinfo=UTC).timestamp())
BAD_EVENTS: dict[str, dict[str, Any]] = {
    "event.id": BAD_IDS,
    "event.invocation_id": BAD_IDS | {"too long": "x" * 257, "too wide": "😀" * 257},
    "event.timestamp": {str(bad): bad for bad in BAD_TIMES},
    "event.actions.state_delta": BAD_STATES,
}


def _by_id(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(case, id=name) for name, case in cases.items()]


def _in_each_scope(values: dict[str, Any]) -> dict[str, Any]:
    return {scope + key: value for scope in SCOPES for key, value in values.items()}


def _only_winner(results: list[Any], error: type[Exception]) -> Any:
    """The one result of a race that is no error; all others must be ``error``."""
    won = [result for result in results if not isinstance(result, BaseException)]
    lost = [result for result in results if isinstance(result, BaseException)]
    assert [type(result) for result in lost if not isinstance(result, error)] == []
    assert len(won) == 1
    return won[0]


def _ids(session: Any) -> list[str]:
    return [event.id for event in session.events]


@pytest.mark.asyncio
class SessionServiceContract:
    """Tests for any session service; subclass it and override the ``service`` fixture.

    Needs pytest and pytest-asyncio, in either of its modes. Every test works in an app of a random
    name and cleans nothing up, so it is safe on a database that is in use::

        import pytest_asyncio
        from adk_sessions.testing import SessionServiceContract

        class TestMyService(SessionServiceContract):
            @pytest_asyncio.fixture
            async def service(self, tmp_path):
                async with MyService(tmp_path / "sessions.db") as service:
                    yield service

    The service's methods are those of `adk_sessions.SessionService`, and so are the errors that it
    has to raise, or subclasses of them; its sessions keep a revision, any string, in the attribute
    ``_storage_update_marker``.

    For readable failures put ``pytest.register_assert_rewrite("adk_sessions.testing")`` into
    conftest.py. Override as well, where the service calls for it:

    * ``other_service``, a fixture: a second service on the same storage, for the tests of two
      processes. By default it is ``service`` itself.
    * ``event_type``, ``actions_type``, ``config_type``: the classes that the service works with.
    * ``content(text)``: what its events carry as content.
    * ``event_fields``: more fields of an event, each of which must come back equal.
    """

    event_type: type[Any] = Event
    actions_type: type[Any] = EventActions
    config_type: type[Any] = GetSessionConfig
    event_fields: ClassVar[dict[str, Any]] = {
        "branch": "root.leaf",
        "turn_complete": True,
        "error_code": "E1",
        "error_message": "it\nfailed",
        "avg_logprobs": -0.25,
        "custom_metadata": {"labels": ["a", None, {"weight": 0.1}], "none": None},
    }

    @pytest.fixture
    def service(self) -> Any:
        """The service under test, on storage that is ready for use."""
        raise NotImplementedError("Override the fixture `service` to return your session service.")

    @pytest.fixture
    def other_service(self, service: Any) -> Any:
        """Another service on the storage of ``service``."""
        return service

    @pytest.fixture
    def app_name(self) -> str:
        """An app that no other test uses."""
        return f"app-{uuid.uuid4().hex}"

    @pytest_asyncio.fixture
    async def session(self, service: Any, app_name: str) -> Any:
        """A stored session without state and events."""
        return await self.create(service, app_name)

    def content(self, text: str) -> Any:
        """The content of an event that says ``text``."""
        return {"role": "user", "parts": [{"text": text}]}

    def event(
        self, text: str = "hello", *, state_delta: dict[str, Any] | None = None, **fields: Any
    ) -> Any:
        """An event that says ``text``; ``fields`` are passed on to ``event_type``."""
        defaults = {
            "author": "user",
            "invocation_id": "invocation",
            "content": self.content(text),
            "actions": self.actions_type(state_delta=state_delta or {}),
        }
        return self.event_type(**defaults | fields)

    async def create(self, service: Any, app_name: str, user_id: str = "ann", **fields: Any) -> Any:
        """A new session of the app; ``fields`` are passed on to ``create_session``."""
        return await service.create_session(app_name=app_name, user_id=user_id, **fields)

    async def reload(self, service: Any, session: Any, **config: Any) -> Any:
        """What is stored of ``session`` now; ``config`` are the fields of a ``config_type``."""
        return await service.get_session(
            app_name=session.app_name,
            user_id=session.user_id,
            session_id=session.id,
            config=self.config_type(**config) if config else None,
        )

    async def append_all(self, service: Any, session: Any, offsets: Iterable[float]) -> list[Any]:
        """Appends an event for each offset, in seconds from the session's update time."""
        start = session.last_update_time
        events = [self.event(f"at {offset}", timestamp=start + offset) for offset in offsets]
        for event in events:
            await service.append_event(session, event)
        return events

    async def refused(self, service: Any, error: type[Exception], session: Any, event: Any) -> Any:
        """The error of an append, after a check that it changed neither objects nor storage."""
        before, stored = copy.deepcopy((session, event)), await self.reload(service, session)
        with pytest.raises(error) as caught:
            await service.append_event(session, event)
        assert (session, event) == before
        assert await self.reload(service, session) == stored
        return caught.value

    # Sessions: create, get, list, delete

    async def test_a_created_session_reads_back_equal(self, service: Any, app_name: str) -> None:
        state = {"a": 1, "user:b": [2], "app:c": {"d": None}}
        created = await self.create(service, app_name, session_id="s", state=state)
        assert (created.app_name, created.user_id, created.id) == (app_name, "ann", "s")
        assert (created.state, created.events) == (state, [])
        assert 0 < created.last_update_time <= time.time()
        assert isinstance(created._storage_update_marker, str)
        assert await self.reload(service, created) == created

    async def test_without_an_id_a_session_gets_one(self, service: Any, session: Any) -> None:
        other = await self.create(service, session.app_name, state={})
        assert session.id
        assert other.id
        assert session.id != other.id
        assert await self.reload(service, other) == other

    @pytest.mark.parametrize("field", ["session_id", "user_id", "app_name"])
    async def test_ids_are_kept_verbatim(self, service: Any, app_name: str, field: str) -> None:
        base = {"app_name": app_name, "user_id": "ann", "session_id": "s"}
        every = [base | {field: app_name + i if field == "app_name" else i} for i in ALIKE]
        for ids in every:
            created = await service.create_session(**ids, state={"own": ids, "user:x": ids})
            assert (created.app_name, created.user_id, created.id) == tuple(ids.values())
        for ids in every:
            stored = await service.get_session(**ids)
            assert (stored.app_name, stored.user_id, stored.id) == tuple(ids.values())
            assert stored.state["own"] == ids
            assert field == "session_id" or stored.state["user:x"] == ids
        for ids in every[::2]:
            await service.delete_session(**ids)
        left = [ids for ids in every if await service.get_session(**ids) is not None]
        assert left == every[1::2]

    @pytest.mark.parametrize("letter", ["x", "ü", "😀"])
    async def test_ids_may_have_128_characters(
        self, service: Any, app_name: str, letter: str
    ) -> None:
        session = await service.create_session(
            app_name=app_name.ljust(128, letter), user_id=letter * 128, session_id=letter * 128
        )
        event = self.event(id=letter * 128, invocation_id=letter * 256)
        await service.append_event(session, event)
        assert await self.reload(service, session) == session
        assert session.events == [event]

    async def test_ids_belong_to_their_user_and_session(self, service: Any, app_name: str) -> None:
        apps, users, sessions = (app_name, f"{app_name}-2"), ("ann", "ben"), ("1", "2")
        made = []
        for app, user, session_id in itertools.product(apps, users, sessions):
            session = await self.create(service, app, user, session_id=session_id)
            delta = {"own": [app, user, session_id]}
            await service.append_event(session, self.event(id="same", state_delta=delta))
            made.append(session)
        assert len(made) == 8
        assert [await self.reload(service, session) for session in made] == made

    async def test_a_taken_id_is_refused(self, service: Any, app_name: str) -> None:
        ids = {"app_name": app_name, "user_id": "ann", "session_id": "taken"}
        first = await service.create_session(**ids, state={"a": 1, "app:b": 1})
        with pytest.raises(AlreadyExistsError, match="taken") as caught:
            await service.create_session(**ids, state={"a": 2, "app:b": 2, "user:c": 2})
        assert not isinstance(caught.value, ValueError)
        assert await self.reload(service, first) == first
        await service.append_event(first, self.event())

    async def test_one_of_many_creates_of_an_id_wins(
        self, service: Any, other_service: Any, app_name: str
    ) -> None:
        ids = {"app_name": app_name, "user_id": "ann", "session_id": "wanted"}
        calls = (
            (service, other_service)[n % 2].create_session(**ids, state={"n": n, f"app:{n}": n})
            for n in range(8)
        )
        results = await asyncio.gather(*calls, return_exceptions=True)
        won = _only_winner(results, AlreadyExistsError)
        assert all("wanted" in str(result) for result in results if result is not won)
        assert await service.get_session(**ids) == won
        assert won.state == {"n": won.state["n"], f"app:{won.state['n']}": won.state["n"]}

    async def test_an_unknown_session_is_none(self, service: Any, session: Any) -> None:
        known = {"app_name": session.app_name, "user_id": "ann", "session_id": session.id}
        for other in ({"app_name": "no such app"}, {"user_id": "ben"}, {"session_id": "other"}):
            assert await service.get_session(**known | other) is None
            await service.delete_session(**known | other)
        assert await self.reload(service, session) == session

    async def test_sessions_are_listed_by_user_or_app(self, service: Any, app_name: str) -> None:
        for user in ("ann", "", "ben"):
            state = {"a": user, "user:b": user, "app:c": user}
            session = await self.create(service, app_name, user, state=state)
            await service.append_event(session, self.event(state_delta={"d": user}))
        for user in ("ann", "", "ben"):
            (listed,) = (await service.list_sessions(app_name=app_name, user_id=user)).sessions
            assert listed.user_id == user
        every = (await service.list_sessions(app_name=app_name)).sessions
        assert [listed.user_id for listed in every] == ["ann", "", "ben"]
        for listed in every:
            user = listed.user_id
            assert listed.state == {"a": user, "user:b": user, "app:c": "ben", "d": user}
            assert listed.events == []
        assert (await service.list_sessions(app_name=app_name, user_id="no one")).sessions == []
        assert (await service.list_sessions(app_name=f"no {app_name}")).sessions == []

    async def test_lists_go_by_update_time_user_and_id(self, service: Any, app_name: str) -> None:
        names = [("ben", "1"), ("ann", "2"), ("ann", "1"), ("ben", "0"), ("cid", "9")]
        made = [await self.create(service, app_name, user, session_id=i) for user, i in names]
        same = made[-1].last_update_time + 10
        for session in made[1:]:
            await service.append_event(session, self.event(timestamp=same))
        await service.append_event(made[2], self.event(timestamp=same + 1))
        listed = (await service.list_sessions(app_name=app_name)).sessions
        order = [("ben", "1"), ("ann", "2"), ("ben", "0"), ("cid", "9"), ("ann", "1")]
        assert [(session.user_id, session.id) for session in listed] == order

    async def test_delete_keeps_the_wider_scopes(self, service: Any, app_name: str) -> None:
        state = {"a": 1, "user:b": 2, "app:c": 3}
        ids = {"app_name": app_name, "session_id": "s"}
        for user in ("ann", "ben"):
            session = await service.create_session(**ids, user_id=user, state=state)
            await service.append_event(session, self.event())
        await service.delete_session(app_name, "ann", "s")
        assert await service.get_session(**ids, user_id="ann") is None
        assert (await service.list_sessions(app_name=app_name, user_id="ann")).sessions == []
        assert await self.reload(service, session) == session
        assert await service.get_user_state(app_name=app_name, user_id="ann") == {"b": 2}
        again = await service.create_session(**ids, user_id="ann")
        assert (again.state, again.events) == ({"user:b": 2, "app:c": 3}, [])
        assert await self.reload(service, again) == again

    # State

    async def test_state_is_seen_in_its_scope_only(self, service: Any, app_name: str) -> None:
        state = {"own": 1, "user:theirs": 2, "app:all": 3}
        first = await self.create(service, app_name, state=state)
        delta = {"own 2": 1, "user:theirs 2": 2, "app:all 2": 3}
        await service.append_event(first, self.event(state_delta=delta))
        theirs, everyones = {"user:theirs": 2, "user:theirs 2": 2}, {"app:all": 3, "app:all 2": 3}
        assert first.state == state | delta
        for app, user, expected in (
            (app_name, "ann", theirs | everyones),
            (app_name, "ben", everyones),
            (f"{app_name}-2", "ann", {}),
        ):
            created = await service.create_session(app_name=app, user_id=user)
            assert created.state == expected
            assert await self.reload(service, created) == created

    async def test_wider_scopes_need_no_session(self, service: Any, app_name: str) -> None:
        assert await service.get_user_state(app_name=app_name, user_id="ann") == {}
        assert await service.get_app_state(app_name=app_name) == {}
        state = {"own": 0, "user:a": 1, "user:b": 1, "app:a": 2, "app:b": 2}
        session = await self.create(service, app_name, state=state)
        await service.append_event(session, self.event(state_delta={"user:a": [3], "app:a": [4]}))
        await service.delete_session(app_name, "ann", session.id)
        user_state = await service.get_user_state(app_name=app_name, user_id="ann")
        app_state = await service.get_app_state(app_name=app_name)
        assert (user_state, app_state) == ({"a": [3], "b": 1}, {"a": [4], "b": 2})
        assert await service.get_user_state(app_name=app_name, user_id="ben") == {}
        assert await service.get_user_state(app_name=f"{app_name}-2", user_id="ann") == {}
        assert await service.get_app_state(app_name=f"{app_name}-2") == {}

    async def test_a_delta_replaces_whole_values(self, service: Any, app_name: str) -> None:
        kept = _in_each_scope({"true": True, "float": 0.1 + 0.2, "one": 1.0})
        state = _in_each_scope({"dict": {"a": 1}, "none": 1})
        session = await self.create(service, app_name, state=state | kept)
        delta = _in_each_scope({"dict": {"b": 2}, "none": None})
        await service.append_event(session, self.event(state_delta=delta))
        stored = await self.reload(service, session)
        assert saferepr(stored.state) == saferepr(session.state) == saferepr(kept | delta)

    async def test_any_text_may_be_a_state_key(self, service: Any, session: Any) -> None:
        names = [*ALIKE, "app", "temp", "App:a", "a.b", "$.a", "[0]", '"', "'", "{a}", "\\u0000"]
        delta = _in_each_scope({name: n for n, name in enumerate([*names, "user:a", "app:a"])})
        await service.append_event(session, self.event(state_delta=delta))
        assert session.state == delta
        assert await self.reload(service, session) == session

    async def test_temp_state_lives_in_memory_only(self, service: Any, session: Any) -> None:
        event = self.event(state_delta={"temp:a": 1, "b": 2, "user:c": 3})
        await service.append_event(session, event)
        assert event.actions.state_delta == {"b": 2, "user:c": 3}
        await service.append_event(session, self.event())
        assert session.state == {"temp:a": 1, "b": 2, "user:c": 3}
        stored = await self.reload(service, session)
        assert stored.state == {"b": 2, "user:c": 3}
        assert stored.events == session.events

    async def test_create_drops_temp_state(self, service: Any, app_name: str) -> None:
        state = {"temp:a": 1, "b": 2}
        session = await self.create(service, app_name, state=state)
        assert session.state == {"b": 2}
        assert await self.reload(service, session) == session
        assert state == {"temp:a": 1, "b": 2}

    async def test_storage_shares_no_objects(self, service: Any, app_name: str) -> None:
        state = _in_each_scope({"deep": {"list": [1]}})
        given = copy.deepcopy(state)
        created = await self.create(service, app_name, state=given)
        event = self.event(state_delta={"delta": {"list": [1]}})
        await service.append_event(created, event)
        loaded = await self.reload(service, created)
        (listed,) = (await service.list_sessions(app_name=app_name)).sessions
        user_state = await service.get_user_state(app_name=app_name, user_id="ann")
        for key in state:
            for held in (created.state, loaded.state, listed.state, given):
                held[key]["list"].append(2)
        user_state["deep"]["list"].append(2)
        event.actions.state_delta["delta"]["list"].append(2)
        loaded.events[0].actions.state_delta["delta"]["list"].append(2)
        loaded.events.append(self.event())
        stored = await self.reload(service, created)
        assert stored.state == state | {"delta": {"list": [1]}}
        assert [e.actions.state_delta for e in stored.events] == [{"delta": {"list": [1]}}]

    # Values

    @pytest.mark.parametrize("values", _by_id(VALUES))
    async def test_values_in_state_stay_the_same(
        self, service: Any, app_name: str, values: list[Any]
    ) -> None:
        plain = {"all": values} | {f"{n}": value for n, value in enumerate(values)}
        state = saferepr(_in_each_scope(plain))
        created = await self.create(service, app_name, state=_in_each_scope(plain))
        (listed,) = (await service.list_sessions(app_name=app_name)).sessions
        user_state = await service.get_user_state(app_name=app_name, user_id="ann")
        app_state = await service.get_app_state(app_name=app_name)
        stored = await self.reload(service, created)
        assert saferepr(created.state) == state
        assert saferepr(stored.state) == state
        assert saferepr(listed.state) == state
        assert saferepr(user_state) == saferepr(app_state) == saferepr(plain)

    @pytest.mark.parametrize("values", _by_id(VALUES))
    async def test_values_in_an_event_stay_the_same(
        self, service: Any, session: Any, values: list[Any]
    ) -> None:
        plain = {"all": values} | {f"{n}": value for n, value in enumerate(values)}
        event = self.event(state_delta=_in_each_scope(plain), custom_metadata=plain)
        await service.append_event(session, event)
        stored = await self.reload(service, session)
        delta = saferepr(_in_each_scope(plain))
        assert saferepr(stored.state) == saferepr(session.state) == delta
        assert saferepr(stored.events[0].actions.state_delta) == delta
        assert saferepr(stored.events[0].custom_metadata) == saferepr(plain)

    async def test_rich_values_are_stored_as_json(self, service: Any, app_name: str) -> None:
        state = _in_each_scope({name: value for name, (value, _) in COERCED.items()})
        forms = _in_each_scope({name: form for name, (_, form) in COERCED.items()})
        created = await self.create(service, app_name, state=state)
        assert created.state == forms
        assert await self.reload(service, created) == created
        session = await self.create(service, f"{app_name}-2")
        await service.append_event(session, self.event(state_delta=state))
        assert session.state == state
        assert (await self.reload(service, session)).state == forms

    @pytest.mark.parametrize("value", [len, object(), b"\xff\xfe"], ids=["def", "object", "bytes"])
    async def test_a_value_without_json_form_becomes_text(
        self, service: Any, app_name: str, value: Any
    ) -> None:
        state = {"odd": value, "user:odd": [value], "good": 1}
        created = await self.create(service, app_name, state=state)
        session = await self.create(service, app_name, "ben")
        await service.append_event(session, self.event(state_delta=state))
        assert session.state == state
        for stored in (created, await self.reload(service, session)):
            assert isinstance(stored.state["odd"], str)
            assert isinstance(stored.state["user:odd"][0], str)
            assert stored.state["good"] == 1

    async def test_a_warning_names_the_key_of_such_a_value(
        self, service: Any, session: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        delta = {"handler of clicks": len, "a good key": "a good value"}
        await service.append_event(session, self.event(state_delta=delta))
        warnings = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
        assert any("handler of clicks" in message for message in warnings)
        assert not any("good" in message for message in warnings)

    # Events and their order

    async def test_append_updates_the_callers_session(self, service: Any, session: Any) -> None:
        event = self.event(state_delta={"a": 1}, timestamp=session.last_update_time + 5.25)
        before = event.model_copy(deep=True)
        assert await service.append_event(session, event) is event
        assert event == before
        assert session.events == [event]
        assert session.state == {"a": 1}
        assert session.last_update_time == pytest.approx(event.timestamp, rel=0, abs=1e-6)
        assert await self.reload(service, session) == session

    async def test_every_field_of_an_event_comes_back(self, service: Any, session: Any) -> None:
        events = [self.event("ä\n"), self.event(**self.event_fields), self.event(partial=False)]
        for event in events:
            await service.append_event(session, event)
        assert (await self.reload(service, session)).events == events
        for name, value in self.event_fields.items():
            assert getattr(session.events[1], name) == value

    async def test_nul_in_a_text_field_comes_back(self, service: Any, session: Any) -> None:
        event = self.event("a\0b", author="\0", error_message="\0\\u0000")
        await service.append_event(session, event)
        assert (await self.reload(service, session)).events == [event]

    async def test_a_partial_event_changes_nothing(self, service: Any, session: Any) -> None:
        unknown = session.model_copy(update={"id": "unknown"}, deep=True)
        for target in (session, unknown):
            event = self.event(partial=True, state_delta={"a": 1, "temp:b": 2})
            before = copy.deepcopy((target, event))
            assert await service.append_event(target, event) is event
            assert (target, event) == before
        assert await self.reload(service, session) == session
        assert await self.reload(service, unknown) is None

    async def test_append_needs_a_stored_session(self, service: Any, session: Any) -> None:
        unknown = session.model_copy(update={"id": "unknown"}, deep=True)
        await service.delete_session(session.app_name, session.user_id, session.id)
        for missing in (session, unknown):
            delta = {"a": 1, "app:b": 2}
            event = self.event(state_delta=delta)
            error = await self.refused(service, SessionNotFoundError, missing, event)
            assert isinstance(error, ValueError)
        assert await service.get_app_state(app_name=session.app_name) == {}

    @pytest.mark.parametrize("offsets", _by_id(CLOCKS))
    async def test_events_keep_the_order_of_appends(
        self, service: Any, session: Any, offsets: tuple[float, ...]
    ) -> None:
        events, times = [], [session.last_update_time]
        # Descending ids, so that no tie is broken in the right order by chance.
        for n, offset in enumerate(offsets):
            event = self.event(id=f"{9 - n}", timestamp=times[0] + offset)
            await service.append_event(session, event)
            events.append(event)
            times.append(session.last_update_time)
        stored = await self.reload(service, session)
        assert stored == session
        assert stored.events == events
        assert times == sorted(set(times))
        assert (await self.reload(service, session, num_recent_events=2)).events == events[2:]

    async def test_event_timestamps_are_exact(self, service: Any, session: Any) -> None:
        events = [self.event(timestamp=timestamp) for timestamp in TIMESTAMPS]
        for event in events:
            await service.append_event(session, event)
        stored = await self.reload(service, session)
        assert {e.id: e.timestamp for e in stored.events} == {e.id: e.timestamp for e in events}
        assert tuple(event.timestamp for event in events) == TIMESTAMPS

    async def test_event_ids_are_kept_verbatim(self, service: Any, session: Any) -> None:
        for n, event_id in enumerate(text for text in ALIKE if text):
            delta = {event_id: n}
            await service.append_event(session, self.event(id=event_id, state_delta=delta))
        assert await self.reload(service, session) == session
        assert len(session.events) == len(session.state) == len(ALIKE) - 1

    # Reading a part of the events

    async def test_a_filter_leaves_state_complete(self, service: Any, session: Any) -> None:
        start = session.last_update_time
        for n in range(4):
            event = self.event(state_delta={f"{n}": n}, timestamp=start + n)
            await service.append_event(session, event)
        for recent, after, expected in (
            (None, None, [0, 1, 2, 3]),
            (0, None, []),
            (1, None, [3]),
            (3, None, [1, 2, 3]),
            (9, None, [0, 1, 2, 3]),
            (None, 0.0, [0, 1, 2, 3]),
            (None, start + 1, [1, 2, 3]),
            (None, start + 1.5, [2, 3]),
            (None, start + 9, []),
            (2, start + 1, [2, 3]),
            (9, start + 2, [2, 3]),
            (0, start + 1, []),
        ):
            config = {"num_recent_events": recent, "after_timestamp": after}
            stored = await self.reload(service, session, **config)
            assert (config, stored.events) == (config, [session.events[n] for n in expected])
            assert stored.state == session.state
            assert stored.last_update_time == session.last_update_time

    async def test_a_time_filter_goes_by_event_times(self, service: Any, session: Any) -> None:
        start = session.last_update_time
        events = await self.append_all(service, session, (100, 1, 50, 2))
        for recent, after, expected in (
            (None, 50, [0, 2]),
            (None, 51, [0]),
            (None, 1, [0, 1, 2, 3]),
            (1, 50, [2]),
            (1, 100, [0]),
        ):
            config = {"num_recent_events": recent, "after_timestamp": start + after}
            stored = await self.reload(service, session, **config)
            assert (config, stored.events) == (config, [events[n] for n in expected])

    async def test_a_time_filter_is_exact(self, service: Any, session: Any) -> None:
        # Neighbouring floats: several of them share one microsecond.
        times = [session.last_update_time + 1]
        for _ in range(3):
            times.append(math.nextafter(times[-1], math.inf))
        for timestamp in times:
            await service.append_event(session, self.event(timestamp=timestamp))
        for n, timestamp in enumerate(times):
            stored = await self.reload(service, session, after_timestamp=timestamp)
            assert stored.events == session.events[n:]

    async def test_a_negative_number_of_events_is_refused(self) -> None:
        with pytest.raises(ValueError, match="num_recent_events"):
            self.config_type(num_recent_events=-1)

    async def test_a_partly_read_session_may_grow(self, service: Any, session: Any) -> None:
        await self.append_all(service, session, (1, 2, 3))
        for config, seen in (({"num_recent_events": 1}, 1), ({"num_recent_events": 0}, 0)):
            part = await self.reload(service, session, **config)
            await service.append_event(part, self.event())
            assert len(part.events) == seen + 1
        (listed,) = (await service.list_sessions(app_name=session.app_name)).sessions
        await service.append_event(listed, self.event(state_delta={"last": True}))
        stored = await self.reload(service, session)
        assert (len(stored.events), len(listed.events)) == (6, 1)
        assert stored.state == listed.state == {"last": True}

    # Stale sessions

    @pytest.mark.parametrize("offsets", _by_id(CLOCKS))
    async def test_a_stale_session_is_refused(
        self, service: Any, session: Any, offsets: tuple[float, ...]
    ) -> None:
        start, outdated = session.last_update_time, []
        for offset in offsets:
            outdated.append(await self.reload(service, session))
            await service.append_event(session, self.event(timestamp=start + offset))
            event = self.event("late", state_delta={"a": 1, "app:b": 2}, timestamp=start + offset)
            for old in outdated:
                error = await self.refused(service, StaleSessionError, old, event)
                assert "modified in storage" in str(error)
        await service.append_event(session, event)

    @pytest.mark.parametrize("services", [1, 2])
    async def test_one_of_two_concurrent_copies_wins(
        self, service: Any, other_service: Any, session: Any, services: int
    ) -> None:
        pair = (service, other_service if services == 2 else service)
        won = []
        for n in range(8):
            copies = [await self.reload(one, session) for one in pair]
            events = [self.event(id=f"{n} {i}", state_delta={f"{n} {i}": i}) for i in (0, 1)]
            calls = map(lambda s, c, e: s.append_event(c, e), pair, copies, events)
            results = await asyncio.gather(*calls, return_exceptions=True)
            won.append(_only_winner(results, StaleSessionError).id)
        stored = await self.reload(service, session)
        assert _ids(stored) == won
        assert set(stored.state) == set(won)

    async def test_tasks_may_share_a_session_object(self, service: Any, session: Any) -> None:
        events = [self.event(state_delta={f"{n}": n, "temp:last": n}) for n in range(8)]
        await asyncio.gather(*(service.append_event(session, event) for event in events))
        assert sorted(_ids(session)) == sorted(event.id for event in events)
        assert session.state.pop("temp:last") in range(8)
        assert session.state == {f"{n}": n for n in range(8)}
        assert await self.reload(service, session) == session
        await service.append_event(session, self.event())

    async def test_the_marker_outranks_the_update_time(self, service: Any, session: Any) -> None:
        for off in (-0.001, -86_400.0, 0.001):
            session = session.model_copy(deep=off < 0)
            session.last_update_time += off
            await service.append_event(session, self.event())
            assert await self.reload(service, session) == session
        session._storage_update_marker = "7"
        await self.refused(service, StaleSessionError, session, self.event())

    async def test_a_session_without_marker_is_checked(self, service: Any, session: Any) -> None:
        ids = {"app_name": session.app_name, "user_id": session.user_id, "id": session.id}
        start, _ = session.last_update_time, await self.append_all(service, session, (1, 2))

        last_event = await self.reload(service, session, num_recent_events=1)
        last_event._storage_update_marker, last_event.last_update_time = None, 0.0
        await service.append_event(last_event, self.event(timestamp=start + 3))
        assert isinstance(last_event._storage_update_marker, str)

        update_time = type(session)(**ids, last_update_time=last_event.last_update_time)
        await service.append_event(update_time, self.event(timestamp=start + 4))

        session._storage_update_marker = None
        for old in (session, type(session)(**ids)):
            await self.refused(service, StaleSessionError, old, self.event())

        unused = await self.create(service, session.app_name)
        hand_made = type(session)(**ids | {"id": unused.id})
        await service.append_event(hand_made, self.event())
        assert await self.reload(service, unused) == hand_made

    async def test_a_refusal_leaves_temp_state_alone(self, service: Any, session: Any) -> None:
        old = await self.reload(service, session)
        old.state["temp:a"] = "before"
        taken = self.event("one", id="taken")
        await service.append_event(session, taken)
        delta = {"temp:a": 1, "temp:new": 2, "b": 3}
        unknown = old.model_copy(update={"id": "unknown"}, deep=True)
        event = self.event(state_delta=delta)
        await self.refused(service, StaleSessionError, old, event)
        await self.refused(service, SessionNotFoundError, unknown, event)
        conflict = self.event("two", id="taken", state_delta=delta)
        await self.refused(service, EventConflictError, session, conflict)
        await service.append_event(session, event)
        assert session.state == delta

    # Repeated events

    async def test_an_event_is_stored_once(self, service: Any, session: Any) -> None:
        hard: dict[str, Any] = dict(VALUES)
        event = self.event(state_delta=hard | {"temp:a": 1, "f": len}, custom_metadata=hard)
        before = event.model_copy(deep=True)
        await service.append_event(session, event)
        stored = await self.reload(service, session)
        for repeat in (event, event.model_copy(deep=True), before, stored.events[0]):
            again = await service.append_event(session, repeat)
            assert saferepr(again.custom_metadata) == saferepr(hard)
            assert (again.id, again.timestamp) == (event.id, event.timestamp)
            assert _ids(session) == [event.id]
        assert saferepr(await self.reload(service, session)) == saferepr(stored)
        await service.append_event(session, self.event())

    async def test_a_repeat_brings_what_was_missed(
        self, service: Any, other_service: Any, session: Any
    ) -> None:
        old = await self.reload(service, session)
        event = self.event(state_delta=_in_each_scope({"key": "first", "a": 1}))
        await service.append_event(session, event)
        other = await self.reload(other_service, session)
        delta = _in_each_scope({"key": "second", "b": 2})
        await other_service.append_event(other, self.event(state_delta=delta))
        for missed in (session, old):
            assert await service.append_event(missed, event.model_copy(deep=True)) == event
            assert missed.state == _in_each_scope({"a": 1}) | delta
            assert missed == other == await self.reload(service, session)
        await service.append_event(old, self.event())

    async def test_a_repeat_leaves_a_filtered_session_one(self, service: Any, session: Any) -> None:
        first, _, third = await self.append_all(service, session, (1, 2, 3))
        part = await self.reload(service, session, num_recent_events=1)
        for repeat in (third, first):
            assert await service.append_event(part, repeat.model_copy(deep=True)) == repeat
            assert part.events == [third]
        fourth = self.event(state_delta={"a": 1})
        await service.append_event(session, fourth)
        assert await service.append_event(part, first.model_copy(deep=True)) == first
        assert part.events == [third, fourth]
        assert part.state == session.state
        await service.append_event(part, self.event())

    async def test_concurrent_repeats_are_stored_once(
        self, service: Any, other_service: Any, session: Any
    ) -> None:
        event = self.event(state_delta={"a": 1, "app:b": 2})
        copies = [await self.reload(service, session) for _ in range(4)]
        calls = (
            (service, other_service)[n % 2].append_event(copies[n], event.model_copy(deep=True))
            for n in range(4)
        )
        assert await asyncio.gather(*calls) == [event] * 4
        stored = await self.reload(service, session)
        assert stored.events == [event]
        assert copies == [stored] * 4

    @pytest.mark.parametrize("change", _by_id(CHANGES))
    async def test_other_content_is_a_conflict(
        self, service: Any, session: Any, change: dict[str, Any]
    ) -> None:
        fields: dict[str, Any] = {"id": "taken", "timestamp": 1.7e9, "state_delta": {"a": 1}}
        old = await self.reload(service, session)
        await service.append_event(session, self.event(**fields))
        for target in (session, old):
            event = self.event(**fields | change)
            await self.refused(service, EventConflictError, target, event)
        await service.append_event(session, self.event())

    # Concurrency

    @pytest.mark.parametrize("services", [1, 2])
    async def test_concurrent_writes_keep_every_key(
        self, service: Any, other_service: Any, app_name: str, services: int
    ) -> None:
        async def work(n: int) -> Any:
            one = other_service if n % services else service
            state = _in_each_scope({f"create {n}": n})
            session = await self.create(one, app_name, state=state)
            for i in range(2):
                delta = _in_each_scope({f"append {n} {i}": n})
                await one.append_event(session, self.event(state_delta=delta))
            return session

        sessions = await asyncio.gather(*(work(n) for n in range(16)))
        expected = {f"create {n}": n for n in range(16)}
        expected |= {f"append {n} {i}": n for n in range(16) for i in (0, 1)}
        assert await service.get_app_state(app_name=app_name) == expected
        assert await service.get_user_state(app_name=app_name, user_id="ann") == expected
        for n, session in enumerate(sessions):
            own = {f"create {n}": n, f"append {n} 0": n, f"append {n} 1": n}
            stored = await self.reload(service, session)
            assert {k: v for k, v in stored.state.items() if ":" not in k} == own
            assert stored.events == session.events

    async def test_a_read_is_one_snapshot(self, service: Any, session: Any) -> None:
        reading = True

        async def write() -> None:
            count = 0
            while reading:
                count += 1
                delta = _in_each_scope({"count": count})
                await service.append_event(session, self.event(state_delta=delta))
                await asyncio.sleep(0)  # a service in memory may never give the loop back

        async def read() -> None:
            nonlocal reading
            try:
                reads = 0
                while reads < 300 or len(session.events) < 2:
                    reads += 1
                    seen = await self.reload(service, session)
                    counts = [seen.state.get(f"{scope}count", 0) for scope in SCOPES]
                    assert counts == [len(seen.events)] * 3
            finally:
                reading = False

        await asyncio.gather(write(), read())
        assert len(session.events) > 1

    async def test_housekeeping_may_be_repeated(
        self, service: Any, other_service: Any, session: Any
    ) -> None:
        await asyncio.gather(*(s.prepare_tables() for s in (service, other_service) * 2))
        for _ in range(2):
            assert await service.flush() is None
            await service.ping()
        assert await self.reload(service, session) == session

    # Bad input

    @pytest.mark.parametrize("bad", _by_id(BAD_IDS))
    @pytest.mark.parametrize("field", ["app_name", "user_id", "session_id"])
    async def test_create_refuses_a_bad_id(
        self, service: Any, app_name: str, field: str, bad: str
    ) -> None:
        ids = {"app_name": app_name, "user_id": "ann", "session_id": "s", field: bad}
        with pytest.raises(InvalidInputError, match=re.escape(field)) as caught:
            await service.create_session(**ids, state={"app:a": 1, "user:b": 2})
        assert caught.value.field == field
        assert (await service.list_sessions(app_name=app_name)).sessions == []
        assert await service.get_app_state(app_name=app_name) == {}
        assert await service.get_user_state(app_name=app_name, user_id="ann") == {}

    @pytest.mark.parametrize("bad", _by_id(BAD_STATES))
    async def test_create_refuses_a_bad_state(self, service: Any, app_name: str, bad: Any) -> None:
        before = copy.deepcopy(bad)
        with pytest.raises(InvalidInputError) as caught:
            await self.create(service, app_name, state=bad)
        assert caught.value.field == "state"
        assert bad == before
        assert (await service.list_sessions(app_name=app_name)).sessions == []
        assert await service.get_app_state(app_name=app_name) == {}

    @pytest.mark.parametrize(
        ("field", "name"), [(field, name) for field in BAD_EVENTS for name in BAD_EVENTS[field]]
    )
    async def test_append_refuses_a_bad_event(
        self, service: Any, session: Any, field: str, name: str
    ) -> None:
        event = self.event(state_delta={"app:a": 1, "temp:b": 2})
        _, *parents, attribute = field.split(".")
        # Assigned, since the types refuse some of these at construction.
        setattr(functools.reduce(getattr, parents, event), attribute, BAD_EVENTS[field][name])
        error = await self.refused(service, InvalidInputError, session, event)
        assert error.field == field
        assert await service.get_app_state(app_name=session.app_name) == {}
        await service.append_event(session, self.event())
