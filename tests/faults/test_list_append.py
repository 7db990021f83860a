"""Lists that several processes append to at once: every value once, in one order, for everybody.

Each session is a list of events. Processes with writers of both kinds, those that are refreshed and
those that reload when they are stale, append values of their own, set keys of their own in each
scope and count in shared keys; readers look on. The judge is in workers.py, and is itself tested:
here with what these writers add to it, the rest in test_concurrency.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import checker
import pytest
from everywhere import SOAK, place_of
from test_chaos import Victim
from workers import Call, Count, Crew, Read, Record, faults, in_each_scope, read_all

from adk_sessions import SessionService

PROCESSES = 3
SESSIONS = 2
APPENDS = 12  # of each writer, in one round
ROUNDS = 2 if SOAK else 1
# More rounds follow for so many seconds on each database.
SECONDS = 30.0 if SOAK else 0.0
DAY = 86_400.0
# Of each process, by name: what to do when stale, and how far off the clock is.
WRITERS = [
    {"p0-a": ("refresh", 0.0), "p0-b": ("refresh", -DAY)},
    {"p1-a": ("refresh", DAY), "p1-b": ("raise", 0.0)},
    {"p2-a": ("refresh", 0.0), "p2-b": ("raise", DAY)},
]


@pytest.fixture(scope="module")
def processes() -> Iterator[Crew]:
    with Crew(PROCESSES, script=checker.__file__) as crew:
        yield crew


@pytest.fixture
def database_of(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """`database_of(backend)`: the URL of a database, and the service's options."""

    return lambda backend: place_of(backend, request, fresh_database)


async def _round(
    crew: Crew, service: SessionService, app: str
) -> tuple[Record, list[Read], list[str]]:
    """What all writers did and saw, what is stored in the end, and the drivers' errors."""
    made = [await service.create_session(app_name=app, user_id="ann") for _ in range(SESSIONS)]
    jobs = [
        {
            "app": app,
            "user": "ann",
            "writers": {
                name: {"on_stale": on_stale, "offset": offset}
                for name, (on_stale, offset) in writers.items()
            },
            "sessions": [session.id for session in made],
            "appends": APPENDS,
        }
        for writers in WRITERS
    ]
    together = [("together", {"jobs": [("lists", job)]}) for job in jobs]
    replies = await asyncio.to_thread(crew.run_all, together)
    record = Record.of(record for reply in replies for record in reply["records"])
    met = [error for reply in replies for error in reply["met"]]
    writers = sum(map(len, WRITERS))
    events = APPENDS + APPENDS // checker.BATCHES
    assert len(record.calls) + len(record.unknown) == writers * events
    assert len(record.counts) == writers * APPENDS * len(checker.COUNTERS)
    return record, await read_all(service, app), met


def _unknown_counts(record: Record) -> int:
    return sum(one.value is None for one in record.counts)


@pytest.mark.parametrize(
    "backend", ["sqlite", "postgresql", "mariadb", *(["pgbouncer"] if SOAK else [])]
)
async def test_lists_that_processes_append_to_lose_nothing(
    processes: Crew,
    backend: str,
    database_of: Callable[[str], tuple[str, dict[str, Any]]],
    app_name: str,
) -> None:
    url, options = database_of(backend)
    async with SessionService(url, **options) as service:
        await service.prepare_tables()
        processes.open(url, **options)
        try:
            refused = 0
            started, rounds = time.monotonic(), 0
            while rounds < ROUNDS or time.monotonic() < started + SECONDS:
                record, final, _ = await _round(processes, service, f"{app_name}-{rounds}")
                assert faults(record, final) == []
                # nothing is broken off here, so nothing may be left unknown
                assert record.unknown == []
                assert not _unknown_counts(record)
                refused += len(record.failed)
                rounds += 1
            assert refused, "nobody was ever stale"
        finally:
            processes.close()


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_lists_lose_nothing_while_connections_are_cut(
    processes: Crew,
    kind: str,
    request: pytest.FixtureRequest,
    fresh_database: Callable[[str], str],
    app_name: str,
) -> None:
    """An append of which nobody knows is looked up by its id; only a count may stay unknown."""
    url = fresh_database(kind)
    server = request.getfixturevalue("postgres" if kind == "postgresql" else "mariadb")
    victim = Victim(server, url, url, {})

    async def cut() -> None:
        while True:
            await victim.terminate()
            await asyncio.sleep(0.1)

    async with SessionService(url) as service:
        await service.prepare_tables()
        processes.open(url)
        cutting = asyncio.create_task(cut())
        try:
            met = 0
            started, rounds = time.monotonic(), 0
            while not met or time.monotonic() < started + SECONDS:
                assert not cutting.done(), "nothing is cut any more"
                record, final, errors = await _round(processes, service, f"{app_name}-{rounds}")
                assert faults(record, final) == []
                assert record.unknown == []
                met = len(errors)
                rounds += 1
        finally:
            cutting.cancel()
            await asyncio.wait([cutting])
            processes.close()


@pytest.mark.parametrize("backend", ["sqlite", *(["postgresql"] if SOAK else [])])
async def test_the_check_fails_for_a_service_without_locks(
    processes: Crew,
    backend: str,
    database_of: Callable[[str], tuple[str, dict[str, Any]]],
    app_name: str,
) -> None:
    url, options = database_of(backend)
    async with SessionService(url, **options) as service:
        await service.create_session(app_name=app_name, user_id="ann", session_id="unused")
        processes.open(url, **options, locks=False)
        try:
            record, final, _ = await _round(processes, service, app_name)
        finally:
            processes.close()
    found = faults(record, final)
    for scope in ("app", "user"):
        assert any(fault.startswith(f"{scope}:p") and " is lost from " in fault for fault in found)
        assert any(fault.startswith(f"{scope}:n is ") for fault in found)
        assert any(f" additions to {scope}:n came to " in fault for fault in found)
    assert any(" is no prefix" in fault or " misses " in fault for fault in found)


# --- the judge ---------------------------------------------------------------------------------


def _call(event: str | None, began: float, ended: float, session: str = "s") -> Call:
    return Call("ann", session, event, in_each_scope(event or f"new {session}"), began, ended)


def _state(*names: str, **counters: int) -> dict[str, Any]:
    """What a session sees when these calls were made in it, and others elsewhere."""
    state = {key: value for name in names for key, value in in_each_scope(name).items()}
    for wider in ("new t", "t1"):
        state |= {key: wider for key in in_each_scope(wider) if ":" in key}
    return state | {key.replace("_", ":"): value for key, value in counters.items()}


def _count(value: int | None, began: float, ended: float, key: str = "user:n") -> Count:
    return Count("ann", "s", key, value, began, ended)


# Two appends and one elsewhere are acknowledged, of one nobody knows, one is refused; three
# additions are acknowledged and one is unknown.
RECORD = Record(
    calls=[
        *(_call(None, 0, 1), _call(None, 0, 1, "t")),
        *(_call("a", 2, 3), _call("t1", 2, 3, "t"), _call("b", 6, 7)),
    ],
    unknown=[_call("u", 4, math.inf)],
    failed=[_call("x", 4, 5)],
    counts=[_count(1, 2, 3), _count(2, 4, 6), _count(3, 4, 6), _count(None, 4, math.inf)],
    reads=[
        Read("ann", "s", ["a"], _state("new s", "a", user_n=1), 3.5, 3.7),
        Read("ann", "s", ["a"], _state("new s", "a"), 2, 3, fresh=False),
    ],
)
OTHER = Read("ann", "t", ["t1"], _state("new t", "t1", user_n=3), 9)


def _final(*events: str, **counters: int) -> list[Read]:
    state = _state("new s", *events, **{"user_n": 3, **counters})
    other = {key: value for key, value in state.items() if ":" in key}
    return [Read("ann", "s", list(events), state, 9), replace(OTHER, state=OTHER.state | other)]


def _with_read(read: int, **changes: Any) -> Record:
    reads = list(RECORD.reads)
    reads[read] = replace(reads[read], **changes)
    return replace(RECORD, reads=reads)


def _with_state(final: list[Read], **changes: Any) -> list[Read]:
    """The state of the first session changed: a key without a value is taken out."""
    state = {**final[0].state, **{key.replace("_", ":"): v for key, v in changes.items()}}
    state = {key: value for key, value in state.items() if value is not None}
    return [replace(final[0], state=state), *final[1:]]


RIGHT = {
    "the unknown append is not stored": _final("a", "b"),
    "it is stored": _final("a", "u", "b"),
    "it is stored after all others": _final("a", "b", "u"),
    "the unknown addition is stored": _final("a", "b", user_n=4),
}


@pytest.mark.parametrize("case", RIGHT)
def test_the_judge_accepts(case: str) -> None:
    assert faults(RECORD, RIGHT[case]) == []


WRONG: dict[str, tuple[Record, list[Read], str]] = {
    "lost": (RECORD, _final("a", "u"), "event b is lost"),
    "twice": (RECORD, _final("a", "b", "b"), "event b is there 2 times"),
    "the unknown one twice": (RECORD, _final("a", "u", "u", "b"), "event u is there 2 times"),
    "refused, and there": (RECORD, _final("a", "x", "b"), "event x was refused and is there"),
    "nobody's": (RECORD, _final("a", "y", "b"), "event y is nobody's"),
    "in another order": (
        RECORD,
        _final("b", "a"),
        "event a comes after b, which began after its end",
    ),
    "the unknown one too early": (
        RECORD,
        _final("u", "a", "b"),
        "event a comes after u, which began after its end",
    ),
    "an event without its delta": (
        RECORD,
        _with_state(_final("a", "b"), user_b=None),
        "user:b is lost from the state of s",
    ),
    "the unknown event without its delta": (
        RECORD,
        _with_state(_final("a", "u", "b"), u=None),
        "u is lost from the state of s",
    ),
    "a delta without its event": (
        RECORD,
        _with_state(_final("a", "b"), app_u="u"),
        "app:u is nobody's in the state of s",
    ),
    "the delta of what was refused": (
        RECORD,
        _with_state(_final("a", "b"), x="x"),
        "x is nobody's in the state of s",
    ),
    "a read in another order": (
        _with_read(0, events=["b", "a"], state=_state("new s", "a", "b", user_n=1)),
        _final("a", "b"),
        "a read of s is no prefix: ['b', 'a']",
    ),
    "a read that misses what was acknowledged": (
        _with_read(0, events=[], state=_state("new s", user_n=1)),
        _final("a", "b"),
        "a read of s misses a",
    ),
    "a read that misses what was acknowledged elsewhere": (
        _with_read(0, state={k: v for k, v in RECORD.reads[0].state.items() if k != "app:t1"}),
        _final("a", "b"),
        "a read of s misses ['app:t1']",
    ),
    "a read with a part of what was set elsewhere": (
        replace(
            _with_read(0, state={**RECORD.reads[0].state, "user:u2": "u2"}),
            calls=[*RECORD.calls, _call("u2", 3, 8, "t")],
        ),
        _final("a", "b"),
        "a read of s misses ['app:u2']",
    ),
    "a read with an event before its delta": (
        _with_read(0, events=["a", "b"]),
        _final("a", "b"),
        "in a read of s b and ['app:b', 'user:b', 'b'] do not match",
    ),
    # an append that began when another had ended leaves a session that holds both
    "a caller's session that misses an event between": (
        _with_read(1, events=["b"], state=_state("new s", "b"), began=6, ended=7),
        _final("a", "b"),
        "a read of s misses a",
    ),
    "a counter too low": (
        RECORD,
        _final("a", "b", user_n=2),
        "user:n is 2 and not 3 to 4 in the state of s",
    ),
    "a counter too high": (
        RECORD,
        _final("a", "b", user_n=5),
        "user:n is 5 and not 3 to 4 in the state of s",
    ),
    "a counter that is no integer": (
        RECORD,
        _with_state(_final("a", "b"), user_n=3.0),
        "user:n is 3.0 and not 3 to 4 in the state of s",
    ),
    "a counter too low in a read": (
        _with_read(0, state=_state("new s", "a")),
        _final("a", "b"),
        "user:n is 0 and not 1 to 1 in a read of s",
    ),
    "a counter too high in a read": (
        _with_read(0, state=_state("new s", "a", user_n=2)),
        _final("a", "b"),
        "user:n is 2 and not 1 to 1 in a read of s",
    ),
    "two additions that came to one value": (
        replace(RECORD, counts=[*RECORD.counts[:2], _count(2, 4, 6)]),
        _final("a", "b"),
        "2 additions to user:n came to 2",
    ),
    "an addition that came to too little": (
        replace(RECORD, counts=[*RECORD.counts, _count(2, 7, 8)]),
        _final("a", "b", user_n=4),
        "an addition to user:n came to 2, not 4 to 5",
    ),
    "an addition that came to too much": (
        replace(RECORD, counts=[_count(2, 2, 3), *RECORD.counts[1:]]),
        _final("a", "b"),
        "an addition to user:n came to 2, not 1 to 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_judge_sees(case: str) -> None:
    record, final, fault = WRONG[case]
    assert fault in faults(record, final)
