"""What was measured, as tables on the terminal, and as JSON, Markdown and SVG files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .growth import FLAT, Series
from .measure import Timing, ratio
from .scenarios import SCENARIOS, Scenario
from .stores import ALL

TITLES = {"postgresql": "PostgreSQL", "sqlite": "SQLite", "mariadb": "MariaDB"}
STORES = {store.name: store for store in ALL}
SCENARIO = {scenario.name: scenario for scenario in SCENARIOS}
BASELINE = "adk"
PACKAGES = (
    *("adk-sessions", "google-adk", "sqlspec", "sqlalchemy", "asyncpg", "aiosqlite", "asyncmy"),
    *("pydantic", "pydantic-core", "msgspec", "parlant"),
)
RESULTS, TABLE, CHART = "results.json", "table.md", "chart.svg"


@dataclass(frozen=True)
class Operation:
    """An operation of Parlant's session store, and what it may take at the median."""

    title: str
    limit_ms: float | None = None


PARLANT = {
    "create_event": Operation("create_event", 2.0),
    "list_100": Operation("list_events of 100", 3.0),
    "poll": Operation("list_events, nothing new"),
}
PARLANT_STORES = {"ours": "adk-sessions", "raw": "documents in JSONB"}


@dataclass
class Column:
    """One database system with one delay: by scenario, the timings by store."""

    backend: str
    delay_ms: float
    rows: dict[str, dict[str, Timing]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.backend + (f"+{self.delay_ms:g}ms" if self.delay_ms else "")

    @property
    def title(self) -> str:
        return TITLES[self.backend] + (f" + {self.delay_ms:g} ms" if self.delay_ms else "")


@dataclass(frozen=True)
class Comparison:
    """One of this package's stores against another store."""

    scenario: str
    store: str
    versus: str
    ratio: float
    target: float | None

    @property
    def met(self) -> bool | None:
        # as it is printed
        return None if self.target is None else round(self.ratio, 2) >= self.target


@dataclass
class Parlant:
    """Parlant's sessions: timings by operation and store at one size, and ours as they grow."""

    events: int
    timings: dict[str, dict[str, Timing]]
    growth: list[Series]


@dataclass
class Results:
    short: bool = False
    rounds: int = 1
    columns: list[Column] = field(default_factory=list)
    growth: dict[str, list[Series]] = field(default_factory=dict)
    parlant: dict[str, Parlant] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    trips: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        return self.errors + [
            f"{column.title}, {SCENARIO[name].title}, {STORES[store].label}: {timing.failure}"
            for column in self.columns
            for name, timings in column.rows.items()
            for store, timing in timings.items()
            if timing.failure
        ]


def compare(column: Column, name: str) -> list[Comparison]:
    """This package's stores against every other one that took part."""
    timings, targets = column.rows[name], SCENARIO[name].targets
    found = []
    for store in (mine for mine in timings if mine in ("ours", "ours_lean")):
        for versus in timings:
            wanted = targets.get(store, {}).get(versus, {}).get(column.name)
            if versus in ("ours", "ours_lean") or (store == "ours_lean" and versus != BASELINE):
                continue
            value = ratio(timings[versus], timings[store])
            if value is not None:
                found.append(Comparison(name, store, versus, value, wanted))
    return found


# --- text ---------------------------------------------------------------------------------------


def milliseconds(value: float | None) -> str:
    if value is None:
        return "failed"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def verdict(comparison: Comparison) -> str:
    if comparison.target is None:
        return times(comparison.ratio)
    met = "met" if comparison.met else "missed"
    return f"{times(comparison.ratio)} ({comparison.target:g}x {met})"


def line(column: Column, scenario: Scenario) -> str:
    """One line for the terminal while it runs."""
    timings = column.rows[scenario.name]
    medians = ", ".join(f"{name} {milliseconds(t.median)}" for name, t in timings.items())
    ratios = ", ".join(f"{c.store}:{c.versus} {verdict(c)}" for c in compare(column, scenario.name))
    return f"{column.title} | {scenario.title} | ms: {medians} | {ratios}"


@dataclass
class Grid:
    """A table, for the terminal and for Markdown alike."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for n, name in enumerate(self.head):
            table.add_column(name, justify="right" if n else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{rows}\n"


def column_grid(column: Column) -> Grid:
    stores = [name for name in STORES if any(name in row for row in column.rows.values())]
    others = [name for name in stores if name not in ("ours", "ours_lean")]
    lean = "ours_lean" in stores
    head = ["", *(STORES[name].label for name in stores)]
    head += [f"vs {STORES[name].label}" for name in others]
    head += [f"lean vs {STORES[BASELINE].label}"] if lean else []
    rows = []
    for name, timings in column.rows.items():
        medians = [
            milliseconds(timings[store].median) + ("*" if name in STORES[store].deviations else "")
            if store in timings
            else ""
            for store in stores
        ]
        ratios = {(c.store, c.versus): verdict(c) for c in compare(column, name)}
        cells = [ratios.get(("ours", versus), "") for versus in others]
        cells += [ratios.get(("ours_lean", BASELINE), "")] if lean else []
        rows.append([SCENARIO[name].title, *medians, *cells])
    return Grid(f"{column.title}: median milliseconds, and how many times faster", head, rows)


def growth_grid(title: str, series: list[Series]) -> Grid:
    """Sizes differ from series to series, so they are in the cells."""
    rows = []
    for one in series:
        cells = [f"{size:,}: {milliseconds(median)}" for size, median in one.medians.items()]
        rows.append([one.title, *cells, f"{one.growth:.2f}", "flat" if one.flat else "grows"])
    width = max((len(row) for row in rows), default=3) - 3
    head = ["", *["median ms"] * width, "largest / smallest", f"flat is below {FLAT}"]
    return Grid(title, head, rows)


def parlant_grid(backend: str, found: Parlant) -> Grid:
    """Medians, what 95 of 100 calls are within, and how many times as long the peer takes."""
    head = [""]
    for label in PARLANT_STORES.values():
        head += [label, "95 %"]
    rows = []
    for name, timings in found.timings.items():
        operation, row = PARLANT[name], [PARLANT[name].title]
        for store in PARLANT_STORES:
            row += [milliseconds(timings[store].median), milliseconds(timings[store].within(0.95))]
        ours, quotient = timings["ours"].median, ratio(timings["raw"], timings["ours"])
        assert ours is not None
        assert quotient is not None
        limit = operation.limit_ms
        verdict = f"{limit:g} ms {'met' if ours <= limit else 'missed'}" if limit else ""
        rows.append([*row, times(quotient), verdict])
    title = f"Parlant's sessions on {TITLES[backend]}, {found.events:,} events: milliseconds"
    return Grid(title, [*head, "times faster", "limit of the median"], rows)


def trips_grid(backend: str, counted: dict[str, dict[str, float]]) -> Grid:
    calls = next(iter(counted.values()), {})
    rows = [
        [STORES[store].label, *(f"{trips:g}" for trips in by_call.values())]
        for store, by_call in counted.items()
    ]
    return Grid(f"Round trips on {TITLES[backend]}", ["", *calls], rows)


def memory_grid(peaks: dict[str, dict[str, float]], *, short: bool) -> Grid:
    stores = [name for name in STORES if any(name in row for row in peaks.values())]
    rows = [
        [TITLES[backend], *(f"{row[s]:.0f}" if s in row else "" for s in stores)]
        for backend, row in peaks.items()
    ]
    title = f"Peak memory of reading {'a few' if short else '10,000'} events, MB"
    return Grid(title, ["", *(STORES[s].label for s in stores)], rows)


def grids(results: Results) -> list[Grid]:
    found = [column_grid(column) for column in results.columns]
    found += [trips_grid(backend, counted) for backend, counted in results.trips.items()]
    for backend, series in results.growth.items():
        found.append(growth_grid(f"Growth on {TITLES[backend]}", series))
    for backend, parlant in results.parlant.items():
        found.append(parlant_grid(backend, parlant))
        title = f"Growth of Parlant's sessions on {TITLES[backend]}"
        found.append(growth_grid(title, parlant.growth))
    if results.memory:
        found.append(memory_grid(results.memory, short=results.short))
    return found


def notes(results: Results) -> list[str]:
    shown = {
        (name, store)
        for column in results.columns
        for name, timings in column.rows.items()
        for store in timings
    }
    known = [store for store in STORES if any(store == other for _, other in shown)]
    return [
        *(f"{STORES[store].label}: `{STORES[store].title}`." for store in known),
        *_deviations(shown),
    ]


def _deviations(shown: set[tuple[str, str]]) -> list[str]:
    return [
        f"\\* {SCENARIO[name].title}: {STORES[store].label} {STORES[store].deviations[name]}."
        for name, store in sorted(shown)
        if name in STORES[store].deviations
    ]


# --- the outputs --------------------------------------------------------------------------------


def show(results: Results, console: Console) -> None:
    for grid in grids(results):
        console.print(grid.rich())
    for note in notes(results):
        console.print(note.lstrip("\\"))
    for failure in results.failures():
        console.print(f"[bold red]FAILED[/bold red] {failure}")


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that tells whose machine it is."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": sys.version.split()[0],
        "packages": packages,
    }


def as_json(results: Results) -> dict[str, Any]:
    return {
        "made_on": machine(),
        "short": results.short,
        "rounds": results.rounds,
        "databases": results.places,
        "left_out": results.left_out,
        "columns": [
            {
                "backend": column.backend,
                "added_delay_ms": column.delay_ms,
                "scenarios": {name: _scenario_json(column, name) for name in column.rows},
            }
            for column in results.columns
        ],
        "round_trips": results.trips,
        "growth": {
            backend: [_series_json(one) for one in series]
            for backend, series in results.growth.items()
        },
        "parlant": {
            backend: {
                "events": found.events,
                "operations": {
                    name: {store: _timing_json(timing) for store, timing in timings.items()}
                    for name, timings in found.timings.items()
                },
                "growth": [_series_json(one) for one in found.growth],
            }
            for backend, found in results.parlant.items()
        },
        "peak_memory_mb": {
            backend: {store: round(mb, 1) for store, mb in row.items()}
            for backend, row in results.memory.items()
        },
        "failures": results.failures(),
    }


def _series_json(one: Series) -> dict[str, Any]:
    return {
        "series": one.title,
        "median_ms": {str(size): round(ms, 4) for size, ms in one.medians.items()},
        "largest_to_smallest": round(one.growth, 3),
        "flat": one.flat,
    }


def _timing_json(timing: Timing) -> dict[str, Any]:
    within = timing.within(0.95)
    return {
        "median_ms": timing.median and round(timing.median, 4),
        "within_ms_95_percent": within and round(within, 4),
        "calls": len(timing.calls),
    }


def _scenario_json(column: Column, name: str) -> dict[str, Any]:
    return {
        "stores": {
            store: {
                "median_ms": timing.median and round(timing.median, 4),
                "least_ms": round(min(timing.calls), 4) if timing.calls else None,
                "most_ms": round(max(timing.calls), 4) if timing.calls else None,
                "median_cpu_ms": round(statistics.median(timing.cpu), 4) if timing.cpu else None,
                "calls": len(timing.calls),
                "deviates": STORES[store].deviations.get(name),
                "failure": timing.failure,
            }
            for store, timing in column.rows[name].items()
        },
        "ratios": [
            {
                "store": c.store,
                "versus": c.versus,
                "ratio": round(c.ratio, 3),
                "target": c.target,
                "met": c.met,
            }
            for c in compare(column, name)
        ],
    }


def as_markdown(results: Results) -> str:
    made = machine()
    head = ["# Benchmark: figures of one machine\n"]
    if results.short:
        head.append("The short form: sizes and numbers of calls are too small to mean anything.\n")
    versions = ", ".join(f"{name} {number}" for name, number in made["packages"].items())
    servers = ", ".join(
        f"{TITLES[backend]} {settings.get('server_version') or settings.get('version')}"
        for backend, settings in results.places.items()
    )
    head.append(
        f"Made by `make bench` on {made['date']}: {made['cpus']} CPUs, {made['system']}"
        f" {made['machine']}, Python {made['python']}, {versions}; {servers}. Milliseconds are this"
        ' machine\'s; ratios of the same run travel better. "+ 1 ms" is a round trip made longer in'
        " a proxy; without it there is no proxy. Every store flushes each commit to disk.\n"
    )
    tables = "\n".join(grid.markdown() for grid in grids(results))
    end = "".join(f"\n{note}\n" for note in notes(results))
    return "\n".join([*head, tables]) + end


def write(results: Results, folder: Path) -> list[str]:
    """Writes the files; their names. Without matplotlib there is no chart."""
    (folder / RESULTS).write_text(json.dumps(as_json(results), indent=1) + "\n")
    (folder / TABLE).write_text(as_markdown(results))
    if find_spec("matplotlib") is None:
        return [RESULTS, TABLE]
    from . import chart

    chart.draw(results, folder / CHART)
    return [RESULTS, TABLE, CHART]
