"""Any JSON-able value and any text, through every database: the same comes back, value and type.

test_codec.py does this with the codec alone. Here values go the whole way: through create, a state
delta, an event's content and its other fields, and `update_state`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from everywhere import SHARED, SOAK
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_codec import KEYS, TEXTS, VALUES, identical

from adk_sessions import InvalidInputError, SessionService

DATABASES = ("sqlite", "postgresql", "mariadb")
# Seconds for each property; `make test` runs a few examples, always the same.
SECONDS = 15.0 if SOAK else 0.0

options = settings(
    max_examples=100 if SOAK else 20,
    deadline=None,
    derandomize=not SOAK,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

# What a key column holds: no NUL, and no half characters.
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=128)
STATE_KEYS = st.builds(str.__add__, st.sampled_from(["", "user:", "app:"]), KEYS)
STATES = st.dictionaries(STATE_KEYS.filter(lambda key: key[:5] != "temp:"), VALUES, max_size=4)
INTEGERS = st.integers() | st.integers(-(2**200), 2**200) | st.sampled_from([2**53, -(2**63)])
NUMBERS = INTEGERS | st.floats(allow_nan=False) | st.sampled_from([0.1, 0.2, 10**400])

# Runs an async function with the service of each database, at once; what they return.
OnEach = Callable[[Any], list[Any]]


@pytest.fixture
def urls(request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> list[str]:
    return [
        request.getfixturevalue(SHARED[kind]) if kind in SHARED else fresh_database(kind)
        for kind in DATABASES
    ]


@contextmanager
def _on_each(make: Callable[[str], Any], urls: list[str]) -> Iterator[OnEach]:
    with asyncio.Runner() as runner:
        services = [make(url) for url in urls]

        async def all_of(call: Any) -> list[Any]:
            return await asyncio.gather(*map(call, services))

        try:
            yield lambda call: runner.run(all_of(call))
        finally:
            for service in services:
                runner.run(service.close())


def _for_a_while(test: Callable[[], None]) -> None:
    started = time.monotonic()
    while True:
        test()
        if time.monotonic() >= started + SECONDS:
            break


def _state_comes_back(make: Callable[[str], Any], urls: list[str]) -> None:
    with _on_each(make, urls) as on_each:

        @options
        @given(
            names=st.tuples(NAMES, NAMES, NAMES),
            initial=STATES,
            delta=STATES,
            changed=STATES,
            content=TEXTS,
            message=TEXTS,
            metadata=st.dictionaries(TEXTS, VALUES, max_size=3),
        )
        def test(
            names: tuple[str, str, str],
            initial: dict[str, Any],
            delta: dict[str, Any],
            changed: dict[str, Any],
            content: str,
            message: str,
            metadata: dict[str, Any],
        ) -> None:
            ids = {"app_name": uuid.uuid4().hex, "user_id": names[0], "session_id": names[1]}

            async def trip(service: Any) -> None:
                types = service.event_type
                event = types(
                    id=names[2],
                    author="user",
                    invocation_id="i",
                    content={"role": "user", "parts": [{"text": content}]},
                    error_message=message,
                    custom_metadata=metadata,
                    actions=types.model_fields["actions"].annotation(state_delta=dict(delta)),
                )
                same = event.model_copy(deep=True)
                created = await service.create_session(**ids, state=dict(initial))
                assert identical(created.state, initial)
                held = created.model_copy(deep=True)
                await service.append_event(held, event)
                await service.append_event(held, same)
                written = await service.update_state(**ids, delta=dict(changed))
                assert identical(written, changed)
                stored = await service.get_session(**ids)
                assert identical(stored.state, initial | delta | changed)
                assert (stored.user_id, stored.id) == names[:2]
                (one,) = stored.events
                assert one.id == event.id
                assert identical(one.model_dump(), event.model_dump())
                assert identical(one.actions.state_delta, delta)
                assert identical(one.custom_metadata, metadata)
                assert one.error_message == message

            on_each(trip)

        _for_a_while(test)


def test_any_value_comes_back_from_each_database(urls: list[str]) -> None:
    _state_comes_back(SessionService, urls)


def test_any_value_comes_back_in_google_adks_types(urls: list[str]) -> None:
    adk = pytest.importorskip("adk_sessions.adk", exc_type=ImportError)
    _state_comes_back(adk.DatabaseSessionService, urls)


def test_any_numbers_are_added_as_python_adds_them(urls: list[str]) -> None:
    with _on_each(SessionService, urls) as on_each:

        @options
        @given(start=st.none() | NUMBERS, amounts=st.lists(NUMBERS, min_size=1, max_size=3))
        def test(start: float | None, amounts: list[float]) -> None:
            where = {"app_name": uuid.uuid4().hex}

            async def trip(service: Any) -> None:
                total: Any = 0
                if start is not None:
                    total = start
                    await service.update_state(**where, delta={"app:n": start})
                for amount in amounts:
                    try:
                        total += amount
                    except OverflowError:  # an integer that no double can hold
                        with pytest.raises(InvalidInputError):
                            await service.update_state(**where, add={"app:n": amount})
                    else:
                        written = await service.update_state(**where, add={"app:n": amount})
                        assert identical(written, {"app:n": total})
                stored = await service.get_app_state(**where)
                assert identical(stored.get("n", 0), total)

            on_each(trip)

        _for_a_while(test)
