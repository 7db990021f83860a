"""The chart: how many times faster than google-adk's service, on a log axis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .measure import ratio
from .scenarios import SCENARIOS

if TYPE_CHECKING:
    from .report import Column, Results

# told apart with any colour vision, and in grey
COLORS = {
    "postgresql": "#0072b2",
    "postgresql+1ms": "#56b4e9",
    "sqlite": "#e69f00",
    "mariadb": "#009e73",
    "mariadb+1ms": "#8fd6bf",
}
IN_CHART = ("postgresql", "postgresql+1ms", "sqlite")
TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000)
INK, GRID = "#24292f", "#d0d7de"


def draw(results: Results, path: Path) -> None:
    """Writes the chart; an extension other than .svg gives another format."""
    shown = [column for column in results.columns if column.name in IN_CHART]
    columns: list[Column] = shown or results.columns
    scenarios = [s for s in SCENARIOS if any(s.name in column.rows for column in columns)]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "adk-sessions"}):
        figure = Figure(figsize=(9, 1.4 + 0.52 * len(scenarios)), facecolor="white")
        axes = figure.add_subplot()
        height = 0.8 / max(len(columns), 1)
        largest, least = 1.0, 1.0
        for n, column in enumerate(columns):
            places, values = [], []
            for row, scenario in enumerate(scenarios):
                timings = column.rows.get(scenario.name, {})
                value = ratio(timings.get("adk"), timings.get("ours"))
                if value is not None:
                    places.append(row - 0.4 + (n + 0.5) * height)
                    values.append(value)
            largest, least = max([largest, *values]), min([least, *values])
            axes.barh(
                places,
                [value - 1 for value in values],
                left=1,
                height=height * 0.9,
                color=COLORS.get(column.name, GRID),
                label=column.title,
                zorder=2,
            )
            for place, value in zip(places, values, strict=True):
                text = f"{value:.0f}" if value >= 20 else f"{value:.1f}"
                axes.text(max(value, 1) * 1.03, place, text, va="center", fontsize=7.5, color=INK)
        axes.set_xscale("log")
        axes.set_xlim(min(0.8, least * 0.8), largest * 1.35)
        ticks = [tick for tick in TICKS if least * 0.8 <= tick <= largest * 1.3]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.set_yticks(range(len(scenarios)), [s.title for s in scenarios], color=INK)
        axes.set_ylim(len(scenarios) - 0.5, -0.5)
        axes.tick_params(axis="both", length=0, labelsize=9, labelcolor=INK)
        axes.grid(axis="x", color=GRID, linewidth=0.7, zorder=0)
        axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        figure.suptitle(
            "How many times faster than google-adk's DatabaseSessionService",
            x=0.01,
            y=1 - 0.1 / figure.get_figheight(),
            ha="left",
            va="top",
            fontsize=11.5,
            fontweight="bold",
            color=INK,
        )
        axes.set_xlabel(
            "ratio of median times in one run, log axis; right of 1x is faster",
            fontsize=8.5,
            color=INK,
        )
        figure.legend(
            loc="upper left",
            bbox_to_anchor=(0.004, 1 - 0.33 / figure.get_figheight()),
            ncols=len(columns),
            fontsize=9,
            frameon=False,
            labelcolor=INK,
        )
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
        figure.savefig(
            path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None
        )
