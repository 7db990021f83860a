"""A B A B: the stores take turns, in small batches of calls, and each call is timed by itself."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from .scenarios import Case, Scenario, WrongResult
from .stores import Store


@dataclass
class Timing:
    """The calls of one store in one scenario, in milliseconds, divided by the case's divisor.

    `cpu` is what this process alone has computed for them, which a busy machine disturbs less.
    """

    calls: list[float] = field(default_factory=list)
    failure: str | None = None
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.calls) if self.calls and not self.failure else None

    def within(self, share: float) -> float | None:
        """What so many of the calls took at the most."""
        if not self.calls or self.failure:
            return None
        return sorted(self.calls)[math.ceil(len(self.calls) * share) - 1]


def ratio(theirs: Timing | None, ours: Timing | None) -> float | None:
    """How many times as long theirs takes; None unless both have been measured."""
    if theirs is None or ours is None or not theirs.median or not ours.median:
        return None
    return theirs.median / ours.median


async def _timed(case: Case) -> tuple[float, float]:
    await case.before()
    computed, start = time.process_time(), time.perf_counter()
    await case.call()
    seconds, computed = time.perf_counter() - start, time.process_time() - computed
    await case.after()
    return seconds * 1000 / case.divisor, computed * 1000 / case.divisor


async def run_scenario(
    scenario: Scenario,
    stores: list[Store],
    *,
    rounds: int,
    short: bool,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Times the scenario on every store; a store that fails is named and left out from there on."""
    rounds = min(rounds, scenario.rounds)
    calls, warm = (1, 0) if short else (scenario.calls, scenario.warm)
    if short:
        rounds = 1
    timings = {store.name: Timing() for store in stores}
    cases: dict[str, Case] = {}

    async def attempt(store: Store, step: str) -> None:
        timing = timings[store.name]
        if timing.failure is not None:
            return
        try:
            match step:
                case "prepare":
                    size = scenario.short if short else scenario.size
                    cases[store.name] = scenario.case(store, warm + rounds * calls, size)
                    await cases[store.name].prepare()
                    for _ in range(warm):
                        await _timed(cases[store.name])
                case "round":
                    gc.collect()
                    spent, fill = 0.0, 0.0 if short else scenario.fill * 1000
                    for n in count():
                        if n >= calls and spent >= fill:
                            break
                        took, computed = await _timed(cases[store.name])
                        spent += took * cases[store.name].divisor
                        timing.calls.append(took)
                        timing.cpu.append(computed)
                case _:
                    await cases[store.name].check()
        except Exception as error:
            # the run goes on for the others, and ends with an exit status of 1
            kind = "" if isinstance(error, WrongResult) else f"{type(error).__name__}: "
            timing.failure = f"{kind}{str(error)[:300]}"
            say(f"{scenario.name}: {store.name} failed: {timing.failure}")

    for store in stores:
        await attempt(store, "prepare")
    for turn in range(rounds):
        # who comes first changes from round to round
        for store in stores[turn % len(stores) :] + stores[: turn % len(stores)]:
            await attempt(store, "round")
    for store in stores:
        await attempt(store, "check")
    return timings
