"""`make bench`; in an environment with the extra `bench`: PYTHONPATH=tests python -m benchmarks"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from . import growth, memory, places, report, trips
from .measure import run_scenario
from .scenarios import SCENARIOS, Scenario
from .stores import ALL, Ours, Store, chosen

PROXIED = ("append", "get_10")
RESULTS = Path(__file__).parent / "results"


def disk() -> Path:
    """A folder for temporary files that usually is on a disk, which /tmp often is not."""
    kept = Path("/var/tmp")
    return kept if kept.is_dir() else Path(tempfile.gettempdir())


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    scenarios: list[Scenario]
    kinds: list[type[Store]]
    delays: tuple[float, ...]
    rounds: int
    short: bool
    growth: bool
    memory: bool
    trips: bool
    parlant: bool


async def measure_column(
    place: places.Place, delay_ms: float, plan: Plan, console: Console
) -> report.Column:
    """The scenarios on one database system, with one delay."""
    column = report.Column(place.backend, delay_ms)
    # the short form sees that the proxy works, not that every scenario does once more
    scenarios = [
        scenario
        for scenario in plan.scenarios
        if not (plan.short and delay_ms) or scenario.name in PROXIED
    ]
    wanted = [
        kind
        for kind in plan.kinds
        if any(kind.takes_part(scenario.name, place.backend) for scenario in scenarios)
    ]
    async with AsyncExitStack() as stack:
        link = stack.enter_context(place.link(delay_ms)) if delay_ms else None
        if link is not None:
            place.settings.setdefault("measured_delay_ms", {})[f"{delay_ms:g}"] = link.measure()
        stores = await stack.enter_async_context(place.stores(wanted, link))
        for scenario in scenarios:
            fitting = [s for s in stores if s.takes_part(scenario.name, place.backend)]
            if not fitting:
                continue
            start = time.perf_counter()
            column.rows[scenario.name] = await run_scenario(
                scenario, fitting, rounds=plan.rounds, short=plan.short, say=console.print
            )
            seconds = time.perf_counter() - start
            text = f"{report.line(column, scenario)} [dim]{seconds:.1f} s[/dim]"
            console.print(text, soft_wrap=True)
    return column


async def measure_parlant(place: places.Place, *, short: bool) -> report.Parlant:
    from . import parlant  # without it everything else can be measured all the same

    return await parlant.measure_parlant(place, short=short)


def measure_place(
    place: places.Place, plan: Plan, results: report.Results, console: Console
) -> None:
    """All that is asked for on one database system."""
    for delay_ms in plan.delays if place.server else (0.0,):
        results.columns.append(asyncio.run(measure_column(place, delay_ms, plan, console)))
    # once is enough for the short form
    once = place.backend == "sqlite" or not plan.short
    remembered = [kind for kind in plan.kinds if kind is Ours or not plan.short]
    further: list[tuple[bool, str, dict[str, Any], Callable[[], Any]]] = [
        (
            plan.trips and place.server is not None,
            "round trips",
            results.trips,
            partial(trips.count_trips, place, plan.kinds),
        ),
        (
            plan.memory and once,
            "memory",
            results.memory,
            partial(memory.measure_memory, place, remembered, short=plan.short),
        ),
        (
            plan.growth and once and Ours in plan.kinds and place.backend in growth.BACKENDS,
            "growth",
            results.growth,
            partial(growth.measure_growth, place, short=plan.short),
        ),
        (
            plan.parlant and Ours in plan.kinds and place.backend == "postgresql",
            "Parlant",
            results.parlant,
            partial(measure_parlant, place, short=plan.short),
        ),
    ]
    for wanted, what, into, measure in further:
        if not wanted:
            continue
        start = time.perf_counter()
        try:
            into[place.backend] = asyncio.run(measure())
        except Exception as error:
            # what else is asked for is measured all the same; the exit status is 1
            text = f"{place.backend}, {what}: {type(error).__name__}: {str(error)[:300]}"
            results.errors.append(text)
            console.print(f"[bold red]FAILED[/bold red] {text}", soft_wrap=True)
        seconds = time.perf_counter() - start
        console.print(f"{report.TITLES[place.backend]} | {what} [dim]{seconds:.1f} s[/dim]")
    results.places[place.backend] = place.settings


@click.command()
@click.option("--backend", "backends", multiple=True, type=click.Choice(places.BACKENDS))
@click.option("--scenario", "names", multiple=True, type=click.Choice([s.name for s in SCENARIOS]))
@click.option("--store", "stores", multiple=True, type=click.Choice([s.name for s in ALL]))
@click.option("--delay", "delays", multiple=True, type=float, help="Added milliseconds: 0 and 1.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1))
@click.option("--growth/--no-growth", "grow", default=True, help="Medians as tables grow.")
@click.option("--memory/--no-memory", "remember", default=True, help="Peak memory of a long read.")
@click.option("--trips/--no-trips", "count", default=True, help="Round trips of each call.")
@click.option("--parlant/--no-parlant", "agents", default=True, help="Parlant's sessions.")
@click.option("--short", is_flag=True, help="Small sizes, few calls: for its exit status alone.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the files; without it a whole run alone writes, to tests/benchmarks/results.",
)
@click.option(
    "--folder",
    default=disk,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where SQLite's files go; on a disk.",
)
def main(
    backends: tuple[str, ...],
    names: tuple[str, ...],
    stores: tuple[str, ...],
    delays: tuple[float, ...],
    rounds: int,
    grow: bool,
    remember: bool,
    count: bool,
    agents: bool,
    short: bool,
    output: Path | None,
    folder: Path,
) -> None:
    """Measures adk-sessions and other session services for google-adk side by side.

    Writes results.json, table.md and chart.svg (the last with matplotlib). The exit status is 1 if
    a store failed or gave a wrong result; no figure has an influence on it.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    # a run that is told to end stops the servers and proxies that it started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = report.Results(short=short, rounds=1 if short else rounds)
    for backend in backends or places.BACKENDS:
        plan = Plan(
            scenarios=[s for s in SCENARIOS if not names or s.name in names],
            kinds=[kind for kind in chosen(stores) if backend in kind.backends],
            delays=delays or (0.0, 1.0),
            rounds=rounds,
            short=short,
            growth=grow,
            memory=remember,
            trips=count,
            parlant=agents,
        )
        try:
            with places.open_place(backend, folder) as place:
                console.rule(report.TITLES[backend])
                measure_place(place, plan, results, console)
        except places.ServerNotFound as missing:
            console.print(f"[bold]{backend} left out:[/bold] {missing}")
            results.left_out[backend] = str(missing)
            if os.environ.get("ADK_SESSIONS_REQUIRE_SERVERS") == "1":
                results.errors.append(f"{backend}: {missing}")
        except places.Unfit as unfit:
            raise click.ClickException(str(unfit)) from None
    report.show(results, console)
    parts = grow and remember and count and agents
    whole = parts and not (short or backends or names or stores or delays)
    if output is None and whole and not results.left_out:
        output = RESULTS
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name in report.write(results, output):
            console.print(f"{output / name} is written.", soft_wrap=True)
    sys.exit(1 if results.failures() else 0)


if __name__ == "__main__":
    main()
