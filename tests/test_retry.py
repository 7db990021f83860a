"""What is repeated, how often and for how long. Time does not pass here: it is counted."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    InvalidInputError,
    OutcomeUnknownError,
    SchemaError,
)
from adk_sessions.dialects.faults import Undecided
from adk_sessions.retry import Retry


class Clock:
    """A monotonic clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(asyncio, "sleep", clock.sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    return clock


class ServerError(Exception):
    """What a driver raises: a code, and a text that quotes a row."""

    def __init__(self, code: str) -> None:
        super().__init__("DETAIL: secret")
        self.sqlstate = code


def refused(code: str) -> DBAPIError:
    return DBAPIError("SELECT secret", {"p": "secret"}, ServerError(code))


CONFLICT, UNAVAILABLE, BROKEN, FATAL = "40P01", "57P03", "08006", "42601"


def failing(*codes: str, then: Any = "done") -> Callable[[], Awaitable[Any]]:
    """A call that fails with each of the codes in turn, then returns."""
    left = list(codes)

    async def call() -> Any:
        if left:
            raise refused(left.pop(0))
        return then

    return call


async def reached(window: float = 30.0) -> Retry:
    return Retry(window, lambda: True)


async def raised(retry: Retry, call: Callable[[], Awaitable[Any]], *, write: bool) -> DatabaseError:
    with pytest.raises(DatabaseError) as caught:
        await retry(call, write=write)
    error = caught.value
    assert "secret" not in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


async def test_a_good_call_is_made_once(clock: Clock) -> None:
    calls = 0

    async def call() -> int:
        nonlocal calls
        calls += 1
        return calls

    assert await Retry()(call, write=True) == 1
    assert clock.pauses == []


@pytest.mark.parametrize("code", [CONFLICT, UNAVAILABLE, BROKEN])
@pytest.mark.parametrize("write", [True, False])
async def test_a_passing_fault_is_repeated(clock: Clock, code: str, write: bool) -> None:
    retry = await reached()
    assert await retry(failing(code, code, code), write=write) == "done"
    assert len(clock.pauses) == 3


async def test_the_first_repetition_is_at_once_and_pauses_grow_to_a_limit(clock: Clock) -> None:
    retry = await reached()
    await retry(failing(*[CONFLICT] * 11), write=True)
    doubling = [0.0, *(0.02 * 2**n for n in range(7)), 2.0, 2.0, 2.0]
    assert clock.pauses == pytest.approx(doubling)


async def test_pauses_have_jitter(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda *bounds: asked.append(bounds) or bounds[0])
    retry = await reached()
    await retry(failing(CONFLICT, CONFLICT, CONFLICT), write=True)
    assert asked == [(0.5, 1.5)] * 3
    assert clock.pauses == pytest.approx([0.0, 0.01, 0.02])


@pytest.mark.parametrize("window", [0.5, 5.0, 30.0])
async def test_a_fault_that_stays_ends_within_the_window(clock: Clock, window: float) -> None:
    retry = await reached(window)
    start = clock.now
    error = await raised(retry, failing(*[CONFLICT] * 1000), write=True)
    assert error.retryable
    assert error.code == CONFLICT
    assert clock.now - start < window
    assert clock.now - start > window - 3.1  # no pause that would end in time was left out
    assert len(clock.pauses) > 3


async def test_the_time_that_calls_take_counts(clock: Clock) -> None:
    retry = await reached(10.0)
    calls = 0

    async def slow() -> None:
        nonlocal calls
        calls += 1
        clock.now += 4.0
        raise refused(CONFLICT)

    await raised(retry, slow, write=True)
    assert calls == 3


@pytest.mark.parametrize("code", [CONFLICT, UNAVAILABLE, BROKEN, FATAL])
async def test_a_window_of_nothing_never_repeats(clock: Clock, code: str) -> None:
    retry = await reached(0.0)
    error = await raised(retry, failing(code), write=False)
    assert error.retryable is (code != FATAL)
    assert clock.pauses == []


async def test_what_fails_for_good_fails_at_once(clock: Clock) -> None:
    retry = await reached()
    error = await raised(retry, failing(FATAL), write=True)
    assert not error.retryable
    assert (error.code, error.driver_error) == (FATAL, "ServerError")
    assert clock.pauses == []


@pytest.mark.parametrize("code", [UNAVAILABLE, BROKEN])
async def test_a_server_that_was_never_reached_fails_at_once(clock: Clock, code: str) -> None:
    error = await raised(Retry(), failing(code), write=True)
    assert error.retryable
    assert type(error) is DatabaseError  # nothing was sent, so nothing is unknown
    assert clock.pauses == []


async def test_a_conflict_shows_that_there_is_a_server(clock: Clock) -> None:
    assert await Retry()(failing(CONFLICT, CONFLICT), write=True) == "done"
    assert len(clock.pauses) == 2


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "x"), TimeoutError()])
async def test_errors_of_the_operating_system_are_lost_connections(
    clock: Clock, error: Exception
) -> None:
    async def call() -> None:
        raise error

    failure = await raised(Retry(), call, write=True)
    assert failure.retryable
    assert failure.code is None
    assert failure.driver_error == type(error).__name__
    assert clock.pauses == []


async def test_a_write_whose_connection_broke_is_unknown(clock: Clock) -> None:
    retry = await reached(0.0)
    error = await raised(retry, failing(BROKEN), write=True)
    assert isinstance(error, OutcomeUnknownError)
    assert "repeat it with the same id" in str(error)
    assert type(await raised(retry, failing(BROKEN), write=False)) is DatabaseError
    assert type(await raised(retry, failing(CONFLICT), write=True)) is DatabaseError
    assert type(await raised(retry, failing(UNAVAILABLE), write=True)) is DatabaseError


async def test_the_last_fault_is_the_one_reported(clock: Clock) -> None:
    retry = await reached()
    error = await raised(retry, failing(CONFLICT, BROKEN, FATAL), write=True)
    assert error.code == FATAL


@pytest.mark.parametrize("code", [CONFLICT, UNAVAILABLE, FATAL])
async def test_what_was_unknown_once_stays_so_whatever_comes_after(clock: Clock, code: str) -> None:
    retry = await reached(1.0)
    error = await raised(retry, failing(BROKEN, *[code] * 99), write=True)
    assert isinstance(error, OutcomeUnknownError)
    assert error.code == code
    assert error.retryable
    assert type(await raised(retry, failing(*[code] * 99), write=True)) is DatabaseError


async def test_what_must_not_happen_twice_is_not_repeated(clock: Clock) -> None:
    retry = await reached()
    calls = 0

    async def undecided() -> None:
        nonlocal calls
        calls += 1
        raise Undecided(refused(BROKEN))

    error = await raised(retry, undecided, write=False)
    assert isinstance(error, OutcomeUnknownError)
    assert not error.retryable
    assert "read the state" in str(error)
    assert calls == 1


async def test_a_full_pool_has_waited_already(clock: Clock) -> None:
    retry = await reached()

    async def call() -> None:
        raise PoolTimeoutError("QueuePool limit")

    error = await raised(retry, call, write=True)
    assert error.retryable
    assert "pool_size" in str(error)
    assert clock.pauses == []


@pytest.mark.parametrize(
    "error",
    [
        SchemaError(),
        InvalidInputError("x", field="f"),
        IntegrityError("INSERT", {}, ServerError("23505")),
        KeyError("a bug"),
        ValueError("a bug"),
    ],
)
async def test_what_is_not_the_databases_goes_through_as_it_is(
    clock: Clock, error: Exception
) -> None:
    retry = await reached()

    async def call() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await retry(call, write=True)
    assert caught.value is error
    assert clock.pauses == []


async def test_a_missing_package_is_a_configuration_error(clock: Clock) -> None:
    async def call() -> None:
        raise ModuleNotFoundError("No module", name="cryptography")

    with pytest.raises(ConfigurationError, match="cryptography"):
        await Retry()(call, write=False)


async def test_a_cancelled_call_is_not_repeated() -> None:
    retry = await reached()
    calls = 0
    started = asyncio.Event()

    async def call() -> None:
        nonlocal calls
        calls += 1
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(retry(call, write=True))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == 1
