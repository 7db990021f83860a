"""Does a call take longer because more is stored? Medians of this package's store, size by size."""

from __future__ import annotations

import gc
import random
import statistics
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from google.adk.sessions.base_session_service import GetSessionConfig
from google.adk.sessions.session import Session

from . import conversation
from .places import Place
from .scenarios import STATE, USER, expect
from .stores import Ours, Store

BACKENDS = ("postgresql", "sqlite")
EVENTS = (100, 10_000, 200_000)
SESSIONS = (1_000, 100_000, 1_000_000)
SHORT = (10, 40, 80)
ROUNDS, CALLS, WARM = 8, 10, 5
FLAT = 1.5  # the largest size's median over the smallest's, below which it counts as flat
PER_USER = 10  # sessions


@dataclass
class Series:
    """Medians in milliseconds by size."""

    title: str
    calls: dict[int, list[float]] = field(default_factory=dict)

    @property
    def medians(self) -> dict[int, float]:
        return {size: statistics.median(times) for size, times in self.calls.items()}

    @property
    def growth(self) -> float:
        medians = self.medians
        return medians[max(medians)] / medians[min(medians)]

    @property
    def flat(self) -> bool:
        return self.growth < FLAT


async def measure_growth(place: Place, *, short: bool) -> list[Series]:
    rounds, calls = (1, 2) if short else (ROUNDS, CALLS)
    return [
        *await _events(place, SHORT if short else EVENTS, rounds, calls),
        await _sessions(place, SHORT if short else SESSIONS, rounds, calls),
    ]


async def _append(store: Store, session: Session) -> float:
    event = conversation.said(delta={"step": 1})
    start = time.perf_counter()
    await store.service.append_event(session, event)
    return (time.perf_counter() - start) * 1000


async def _events(place: Place, sizes: tuple[int, ...], rounds: int, calls: int) -> list[Series]:
    """Sessions of different length, in one database."""
    append, recent = Series("append, by events in the session"), Series("last 20, by events")
    async with place.store(Ours) as store:
        app = f"growth-{uuid.uuid4().hex[:8]}"
        whose: dict[str, Any] = {"app_name": app, "user_id": USER}
        sessions: dict[int, Session] = {}
        for size in sizes:
            session = await store.service.create_session(**whose, state=dict(STATE))
            templates = conversation.history(40)
            start = time.time() - 60 - size / 1000
            await store.seeder.copies(app, USER, session.id, templates, size, start)
            # as a caller has it who has just read the last few: not 200,000 events in memory
            sessions[size] = session
        await store.seeder.settle()
        config = GetSessionConfig(num_recent_events=20)
        for turn in range(rounds + 1):
            for size, session in sessions.items():
                gc.collect()
                for _ in range(WARM if turn == 0 else calls):
                    took = await _append(store, session)
                    started = time.perf_counter()
                    found = await store.service.get_session(
                        **whose, session_id=session.id, config=config
                    )
                    read = (time.perf_counter() - started) * 1000
                    wanted = min(20, size + len(session.events))
                    expect("number of events", found and len(found.events), wanted)
                    expect("the last", found and found.events[-1].id, session.events[-1].id)
                    if turn:
                        append.calls.setdefault(size, []).append(took)
                        recent.calls.setdefault(size, []).append(read)
        for size, session in sessions.items():
            found = await store.service.get_session(**whose, session_id=session.id)
            expect("number of events", found and len(found.events), size + len(session.events))
    return [append, recent]


async def _sessions(place: Place, sizes: tuple[int, ...], rounds: int, calls: int) -> Series:
    """Tables of different size, each in a database of its own; appends to sessions all over it."""
    series = Series("append, by sessions in the table")
    dice = random.Random(20)
    async with AsyncExitStack() as stack:
        stores: dict[int, Store] = {}
        for size in sizes:
            store = stores[size] = await stack.enter_async_context(place.store(Ours))
            state = {key: value for key, value in STATE.items() if ":" not in key}
            start = time.time() - 60 - size / 1000
            users = (f"user-{n:07}" for n in range((size + PER_USER - 1) // PER_USER))
            await store.seeder.states("growth", users, {"name": "Ann"})
            await store.seeder.sessions(
                "growth",
                (
                    (f"user-{n // PER_USER:07}", f"session-{n:07}", start + n / 1000)
                    for n in range(size)
                ),
                state,
            )
            await store.seeder.settle()
        for turn in range(rounds + 1):
            for size, store in stores.items():
                sessions = []
                for _ in range(WARM if turn == 0 else calls):
                    n = dice.randrange(size)
                    session = await store.service.get_session(
                        app_name="growth",
                        user_id=f"user-{n // PER_USER:07}",
                        session_id=f"session-{n:07}",
                    )
                    assert session is not None
                    sessions.append(session)
                gc.collect()
                # two may be one session, and then the second of the two objects is stale
                times = [
                    await _append(store, session)
                    for session in {session.id: session for session in sessions}.values()
                ]
                if turn:
                    series.calls.setdefault(size, []).extend(times)
    return series
