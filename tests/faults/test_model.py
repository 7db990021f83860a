"""Calls in any order, through two services on one database, against a model in plain Python.

Hypothesis makes up the calls. Sessions that were created, read or listed stay in the callers'
hands, of either service, and are appended to long after they have become stale, been deleted or
been made anew. What a call returns, what it does to its caller's objects and what is stored are
compared with the model after each call.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from everywhere import SOAK
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)
from test_codec import identical

from adk_sessions import (
    AlreadyExistsError,
    EventConflictError,
    InvalidInputError,
    SessionNotFoundError,
    SessionService,
    StaleSessionError,
)

# Seconds for which the machine runs in each case; `make test` runs a few examples, always the same.
SECONDS = 30.0 if SOAK else 0.0
EXAMPLES = 100 if SOAK else 20
STEPS = 30

T = TypeVar("T")

USERS = ("ann", "ben")
PLACES = (("ann", "s"), ("ann", "t"), ("ben", "s"))
SERVICES = st.integers(0, 1)
# What the two services do about stale sessions unless a call says so itself.
DEFAULTS = ("raise", "refresh")
ON_STALE = st.sampled_from([None, *DEFAULTS])
STORED_KEYS = ("a", "n", "user:a", "user:n", "app:a", "app:n")
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=2)
VALUES = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text(max_size=2), LEAVES)
AMOUNTS = st.integers(-(2**70), 2**70) | st.integers(-3, 3) | st.floats(-9, 9)
# keys that end in n are nearly always numbers, so that they can be added to
STATES = st.fixed_dictionaries(
    {},
    optional={key: AMOUNTS if key.endswith("n") else VALUES for key in STORED_KEYS}
    | {"temp:a": LEAVES},
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        key: st.tuples(st.just("add"), AMOUNTS)
        | st.tuples(st.sampled_from(["set", "delete"]), AMOUNTS if key.endswith("n") else VALUES)
        for key in STORED_KEYS
    },
)
EVENTS = st.fixed_dictionaries(
    {"delta": STATES, "at": st.integers(-3, 3), "text": st.text(max_size=3)},
    optional={"partial": st.sampled_from([False, False, True])},
)
COMPACTION = {
    "start_timestamp": 1.0,
    "end_timestamp": 2.0,
    "compacted_content": {"role": "model", "parts": [{"text": "in short"}]},
}


@dataclass
class Stored:
    """A session as it must be stored."""

    update_time: float
    state: dict[str, Any] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)


@dataclass
class Held:
    """A session in a caller's hands, and what must be in it.

    Attributes:
        of: what was stored when it was read; another object once it was deleted and made anew.
        seen: how many events were stored then.
    """

    place: tuple[str, str]
    session: Any
    of: Stored
    seen: int
    events: list[Any]
    state: dict[str, Any]


def _scope(key: str) -> str:
    prefix, found, _ = key.partition(":")
    return prefix if found else ""


def _of_scope(state: dict[str, Any], scope: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if _scope(key) == scope}


def _trimmed(event: Any) -> Any:
    """A copy of an event as it is stored."""
    event = event.model_copy(deep=True)
    delta = event.actions.state_delta
    event.actions.state_delta = {k: v for k, v in delta.items() if _scope(k) != "temp"}
    return event


class Sessions(RuleBasedStateMachine):
    """The rules. A subclass gives the services, their types and their event loop."""

    services: tuple[Any, Any]
    runner: asyncio.Runner

    held = Bundle("held")

    @initialize(target=held)
    def begin(self) -> Any:
        self.app_name = f"app-{uuid.uuid4().hex}"
        self.start = time.time()
        self.made = self.created = 0
        self.app: dict[str, Any] = {}
        self.users: dict[str, dict[str, Any]] = {user: {} for user in USERS}
        self.sessions: dict[tuple[str, str], Stored] = {}
        return multiple(*(self._create(0, place, {}) for place in PLACES))

    def teardown(self) -> None:
        if hasattr(self, "app_name"):
            for place in self.sessions:
                self.check(place)
            self.check_listing(0, None)

    # --- pieces ---------------------------------------------------------------------------------

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def ids(self, place: tuple[str, str]) -> dict[str, str]:
        return {"app_name": self.app_name, "user_id": place[0], "session_id": place[1]}

    def state(self, place: tuple[str, str]) -> dict[str, Any]:
        """What a reader of a session must find."""
        return {**self.sessions[place].state, **self.app, **self.users[place[0]]}

    def apply(self, place: tuple[str, str], delta: dict[str, Any]) -> None:
        self.app |= _of_scope(delta, "app")
        self.users[place[0]] |= _of_scope(delta, "user")
        self.sessions[place].state |= _of_scope(delta, "")

    def event(self, text: str, at: int, delta: dict[str, Any], **more: Any) -> Any:
        """A new event; within a session, timestamps may be equal or run backwards."""
        self.made += 1
        kind = self.services[0].event_type
        actions = kind.model_fields["actions"].annotation
        compaction = {"compaction": COMPACTION} if more.pop("compacts", False) else {}
        return kind(
            id=f"e{self.made}",
            author="user",
            invocation_id="i",
            # a session that is made anew must not come to the very revision that it had before
            timestamp=self.start + at * 1000 + self.created / 64,
            content={"role": "user", "parts": [{"text": text}]},
            actions=actions(state_delta=dict(delta), **compaction),
            **more,
        )

    def check(self, place: tuple[str, str]) -> None:
        """What is stored of a session, read through both services, is what the model says."""
        for service in self.services:
            found = self.run(service.get_session(**self.ids(place)))
            stored = self.sessions.get(place)
            if stored is None:
                assert found is None
            else:
                assert found is not None
                assert found.events == stored.events
                assert identical(found.state, self.state(place))
                assert found.last_update_time == stored.update_time

    def check_held(self, held: Held, *states: dict[str, Any]) -> None:
        """The caller's object after a call; ``states`` are those that it may be in."""
        assert held.session.events == held.events
        assert any(identical(held.session.state, state) for state in states)
        assert held.session.last_update_time == self.sessions[held.place].update_time
        held.state = dict(held.session.state)
        held.seen = len(held.of.events)

    def check_listing(self, which: int, user: str | None) -> list[Any]:
        listed = self.run(
            self.services[which].list_sessions(app_name=self.app_name, user_id=user)
        ).sessions
        places = [place for place in self.sessions if user in (None, place[0])]
        places.sort(key=lambda place: (self.sessions[place].update_time, *place))
        assert [(one.user_id, one.id) for one in listed] == places
        for one, place in zip(listed, places, strict=True):
            assert one.events == []
            assert identical(one.state, self.state(place))
            assert one.last_update_time == self.sessions[place].update_time
        return list(listed)

    def hold(self, session: Any, events: list[Any]) -> Held:
        place = (session.user_id, session.id)
        stored = self.sessions[place]
        return Held(place, session, stored, len(stored.events), list(events), dict(session.state))

    def refused(self, error: type[Exception], held: Held, events: list[Any], call: Any) -> None:
        """A call that must fail, and leave everything as it is."""
        before = [event.model_copy(deep=True) for event in events]
        marker = held.session._storage_update_marker
        with pytest.raises(error):
            self.run(call)
        assert events == before
        assert held.session.events == held.events
        assert identical(held.session.state, held.state)
        assert held.session._storage_update_marker == marker
        self.check(held.place)

    # --- rules ----------------------------------------------------------------------------------

    @rule(target=held, which=SERVICES, place=st.sampled_from(PLACES), state=STATES)
    def create(self, which: int, place: tuple[str, str], state: dict[str, Any]) -> Any:
        return self._create(which, place, state)

    def _create(self, which: int, place: tuple[str, str], state: dict[str, Any]) -> Any:
        call = self.services[which].create_session(**self.ids(place), state=dict(state))
        if place in self.sessions:
            with pytest.raises(AlreadyExistsError):
                self.run(call)
            self.check(place)
            return multiple()
        session = self.run(call)
        self.created += 1
        self.sessions[place] = Stored(session.last_update_time)
        self.apply(place, state)
        assert session.events == []
        assert identical(session.state, self.state(place))
        self.check(place)
        return self.hold(session, [])

    @rule(
        target=held,
        which=SERVICES,
        place=st.sampled_from(PLACES),
        recent=st.none() | st.integers(0, 4),
        after=st.none() | st.integers(-1, 9),
    )
    def get(self, which: int, place: tuple[str, str], recent: int | None, after: int | None) -> Any:
        stored = self.sessions.get(place)
        moment: float | None = after
        if after and after > 0 and stored and stored.events:
            moment = stored.events[after % len(stored.events)].timestamp
        config = {"num_recent_events": recent, "after_timestamp": moment}
        session = self.run(self.services[which].get_session(**self.ids(place), **config))
        if stored is None:
            assert session is None
            return multiple()
        events = [event for event in stored.events if not moment or event.timestamp >= moment]
        events = events[len(events) - min(recent, len(events)) :] if recent is not None else events
        assert session.events == events
        assert identical(session.state, self.state(place))
        assert session.last_update_time == stored.update_time
        return self.hold(session, events)

    @rule(target=held, which=SERVICES, user=st.none() | st.sampled_from(USERS))
    def listing(self, which: int, user: str | None) -> Any:
        return multiple(*(self.hold(one, []) for one in self.check_listing(which, user)))

    @rule(which=SERVICES, place=st.sampled_from(PLACES), wanted=st.integers(0, 3))
    def delete(self, which: int, place: tuple[str, str], wanted: int) -> None:
        if wanted < 3:  # an app in which little is deleted has more to tell
            return
        self.run(self.services[which].delete_session(*self.ids(place).values()))
        self.sessions.pop(place, None)
        self.check(place)

    @rule(which=SERVICES, user=st.sampled_from(USERS))
    def wider_state(self, which: int, user: str) -> None:
        service = self.services[which]
        of_user = self.run(service.get_user_state(app_name=self.app_name, user_id=user))
        of_app = self.run(service.get_app_state(app_name=self.app_name))
        assert identical({f"user:{key}": v for key, v in of_user.items()}, self.users[user])
        assert identical({f"app:{key}": v for key, v in of_app.items()}, self.app)

    @rule(which=SERVICES, held=held, new=EVENTS, on_stale=ON_STALE, compacts=st.booleans())
    def append(
        self, which: int, held: Held, new: dict[str, Any], on_stale: str | None, compacts: bool
    ) -> None:
        event = self.event(**new, compacts=compacts)
        call = self.services[which].append_event(held.session, event, on_stale=on_stale)
        strict = compacts or (on_stale or DEFAULTS[which]) == "raise"
        self._append(held, [event], call, strict=strict)

    @rule(which=SERVICES, held=held, new=EVENTS)
    def append_refreshed(self, which: int, held: Held, new: dict[str, Any]) -> None:
        event = self.event(**new)
        call = self.services[which].append_event(held.session, event, on_stale="refresh")
        self._append(held, [event], call, strict=False)

    @rule(which=SERVICES, held=held, new=st.lists(EVENTS, max_size=3), on_stale=ON_STALE)
    def append_batch(
        self, which: int, held: Held, new: list[dict[str, Any]], on_stale: str | None
    ) -> None:
        events = [self.event(**fields) for fields in new]
        call = self.services[which].append_events(held.session, events, on_stale=on_stale)
        self._append(held, events, call, strict=(on_stale or DEFAULTS[which]) == "raise")

    def _append(self, held: Held, events: list[Any], call: Any, *, strict: bool) -> None:
        session = held.session
        stored = [event for event in events if not event.partial]
        now = self.sessions.get(held.place)
        stale = now is not held.of or held.seen < len(held.of.events)
        if stored and now is None:
            self.refused(SessionNotFoundError, held, events, call)
            return
        if stored and stale and strict:
            self.refused(StaleSessionError, held, events, call)
            return
        given = [event.model_copy(deep=True) for event in events]
        result = self.run(call)
        assert result == events or result is events[0]
        if not stored or now is None:
            assert events == given
            assert session.events == held.events
            assert identical(session.state, held.state)
            return
        together: dict[str, Any] = {}
        for event in given:
            if not event.partial:
                together |= event.actions.state_delta
        own = [_trimmed(event) for event in given if not event.partial]
        assert stored == own  # temp: keys are taken out of the caller's events
        now.events += own
        self.apply(held.place, together)
        assert session.last_update_time > now.update_time
        assert session.last_update_time > own[-1].timestamp - 2e-6
        now.update_time = session.last_update_time
        self.check(held.place)
        if now is not held.of:
            # another one of the same name: what the caller holds is of two sessions now
            held.of, held.events, held.state = now, [*session.events], dict(session.state)
            held.seen = len(now.events)
            return
        temp = _of_scope(held.state, "temp") | _of_scope(together, "temp")
        held.events += now.events[held.seen :]
        self.check_held(held, self.state(held.place) | temp if stale else held.state | together)

    @rule(
        which=SERVICES,
        held=held,
        at=st.integers(0, 30),
        size=st.integers(1, 2),
        on_stale=st.sampled_from(["raise", "refresh"]),
        how=st.sampled_from(["same", "same", "same", "other", "one more"]),
    )
    def repeat(self, which: int, held: Held, at: int, size: int, on_stale: str, how: str) -> None:
        """Append events that are stored already."""
        now = self.sessions.get(held.place)
        if now is not held.of or not now.events:
            return
        at %= len(now.events)
        again = [event.model_copy(deep=True) for event in now.events[at : at + size]]
        if how == "other":
            again[-1].actions.state_delta["other"] = True
        if how == "one more":
            again.append(self.event("new", 0, {"a": "new", "app:a": "new"}))
        call = self.services[which].append_events(held.session, again, on_stale=on_stale)
        if how != "same":
            self.refused(EventConflictError, held, again, call)
            return
        again[0].actions.state_delta["temp:again"] = at
        self.run(call)
        self.check(held.place)
        assert "temp:again" not in again[0].actions.state_delta
        # whether storage was asked for all states, or these events were all that was missed
        delta = {key: v for event in again for key, v in event.actions.state_delta.items()}
        known = held.state | ({} if held.seen == len(now.events) else delta)
        fresh = self.state(held.place) | _of_scope(held.state, "temp")
        held.events += now.events[held.seen :]
        self.check_held(held, *(state | {"temp:again": at} for state in (known, fresh)))

    @rule(
        which=SERVICES,
        place=st.sampled_from(PLACES),
        changes=CHANGES,
        twice=st.sampled_from([False, False, False, True]),
    )
    def update_state(
        self, which: int, place: tuple[str, str], changes: dict[str, Any], twice: bool
    ) -> None:
        """Change states by themselves; what callers hold is no staler for it."""
        sets = {key: value for key, (how, value) in changes.items() if how == "set"}
        adds = {key: value for key, (how, value) in changes.items() if how == "add"}
        deletes = [key for key, (how, _) in changes.items() if how == "delete"]
        if twice:
            deletes += [*sets, *adds][:1]
        before = (
            self.state(place) if place in self.sessions else {**self.app, **self.users[place[0]]}
        )
        scopes = {_scope(key) for key in changes}
        ids: dict[str, Any] = self.ids(place)
        if "" not in scopes:
            del ids["session_id"]
            if "user" not in scopes:
                del ids["user_id"]
        call = self.services[which].update_state(**ids, delta=sets, add=adds, delete=deletes)
        numbers = [before.get(key, 0) for key in adds]
        error: type[Exception] | None = None
        if len(deletes) + len(sets) + len(adds) > len(changes):
            error = InvalidInputError
        elif "" in scopes and place not in self.sessions:
            error = SessionNotFoundError
        elif any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            error = InvalidInputError
        if error is not None:
            with pytest.raises(error):
                self.run(call)
            self.check(place)
            return
        expected = sets | {key: before.get(key, 0) + amount for key, amount in adds.items()}
        assert identical(self.run(call), expected)
        wider = (self.app, self.users[place[0]])
        for state in (*wider, self.sessions[place].state) if place in self.sessions else wider:
            for key in deletes:
                state.pop(key, None)
        self.app |= _of_scope(expected, "app")
        self.users[place[0]] |= _of_scope(expected, "user")
        if place in self.sessions:
            self.sessions[place].state |= _of_scope(expected, "")
        self.check(place)


def _run(make: Callable[..., Any]) -> None:
    """The machine, on two services."""
    with asyncio.Runner() as runner:
        services = tuple(make(on_stale=on_stale) for on_stale in DEFAULTS)
        machine = type("Machine", (Sessions,), {"services": services, "runner": runner})
        options = settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not SOAK,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        started = time.monotonic()
        try:
            while True:
                run_state_machine_as_test(machine, settings=options)
                if time.monotonic() >= started + SECONDS:
                    break
        finally:
            for service in services:
                runner.run(service.close())


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_calls_do_what_the_model_does(database_url: str) -> None:
    _run(lambda **options: SessionService(database_url, **options))


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_calls_with_google_adks_types_do_what_the_model_does(database_url: str) -> None:
    adk = pytest.importorskip("adk_sessions.adk", exc_type=ImportError)
    _run(lambda **options: adk.DatabaseSessionService(database_url, **options))
