"""What the commands print: tables, times, JSON, bars. Nothing stored reaches a terminal raw."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Rows that are named one by one, where there may be thousands.
_SHOWN = 20
# Columns between two of a table, and those that a name or a text has at the least.
_GAP, _NARROWEST = 2, 8
# Columns of what is not a terminal: no line of a table is longer.
_UNBOUNDED = 100_000

# Bits of an integer that Python writes in decimal whatever its limit is set to.
_LONGEST = 2000

# Control characters, those that turn the direction of writing or end a line unseen, and halves of
# characters: a terminal may take them for commands, or show something else than is there.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_NO_LINE = re.compile("[\t\n]")


def clean(text: str, *, line: bool = False) -> str:
    """Text with what is unsafe on a terminal as escapes that can be read; ``line``: of one line."""
    text = _UNSAFE.sub(_escape, text.replace("\r\n", "\n"))
    return _NO_LINE.sub(_escape, text) if line else text


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()


def short(value: Any, limit: int) -> str:
    """A value as JSON on one line, at most so many characters."""
    return cut(as_text(value), limit)


def cut(text: str, limit: int) -> str:
    text = clean(text, line=True)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def as_text(value: Any) -> str:
    """Any value as JSON that people read: not escaped where it need not be."""
    return json.dumps(_plain(value), ensure_ascii=False, default=str)


def when(time: float | None, *, seconds: bool = True) -> str:
    """A time in the zone of this machine (``TZ``)."""
    if time is None:
        return ""
    try:
        moment = datetime.fromtimestamp(time)
    except (ValueError, OverflowError, OSError):  # other software has taken milliseconds for it
        return str(time)
    return moment.strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


# --- JSON ------------------------------------------------------------------------------------


def print_json(value: Mapping[str, Any]) -> None:
    """One object on a line of its own, at once. It is ASCII: neither a terminal nor an encoding
    can take it for anything else."""
    click.echo(json.dumps(_plain(value), default=str))


def _plain(value: Any) -> Any:
    """What JSON or decimal has no form for, as a string; a row with names as an object."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and value.bit_length() > _LONGEST:
        return hex(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


# --- tables ----------------------------------------------------------------------------------


def console(width: int | None = None) -> Console:
    """Standard output. One that is no terminal is as wide as it takes, unless COLUMNS says so."""
    found = Console(highlight=False, markup=False, emoji=False, width=width)
    if width is None and not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = _UNBOUNDED
    return found


def is_bounded(of: Console) -> bool:
    """Whether there is a width that lines have to fit into."""
    return of.width < _UNBOUNDED


def print_table(
    columns: Mapping[str, str], rows: Sequence[Sequence[Any]], *, header: bool = True
) -> None:
    """A table that fits the terminal: ids and numbers stay on one line, text is folded.

    Args:
        columns: each header with its kind: ``id``, ``text``, ``number``, ``time``.
        rows: values; None is an empty cell.
        header: whether the headers are printed.
    """
    to = console()
    cells = [
        [Text("" if value is None else clean(str(value), line=True)) for value in row]
        for row in rows
    ]
    widths = [
        max(len(name), *(row[number].cell_len for row in cells))
        for number, name in enumerate(columns)
    ]
    room = to.width - _GAP * (len(columns) - 1)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_header=header,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for (name, kind), width in zip(
        columns.items(), _fitting(widths, [*columns.values()], room), strict=True
    ):
        table.add_column(
            name,
            justify="right" if kind == "number" else "left",
            no_wrap=kind != "text",
            # a terminal has room for so much; what goes into a file is whole
            overflow="fold" if kind == "text" else "ellipsis",
            width=width,
        )
    for row in cells:
        table.add_row(*row)
    if to.is_terminal:
        to.print(table)
        return
    with to.capture() as printed:
        to.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())


def _fitting(widths: list[int], kinds: list[str], room: int) -> list[int]:
    """Widths of columns for a line: those of ids and text give way, the widest first."""
    flexible = [number for number, kind in enumerate(kinds) if kind in ("id", "text")]
    given = [*widths]
    for most in range(max(widths), _NARROWEST - 1, -1):
        for number in flexible:
            given[number] = min(widths[number], most)
        if sum(given) <= room:
            break
    return given


def print_counts(title: str, counts: Mapping[str, int], *, err: bool = False) -> None:
    """What was done, or would be, one count a line."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in counts.items():
        table.add_row(name, str(count))
    Console(stderr=err).print(table)


def print_rows(what: str, rows: Sequence[Sequence[str]], total: int | None = None) -> None:
    """The first of many rows by their ids."""
    for row in rows[:_SHOWN]:
        click.echo(f"{what}: {' / '.join(map(repr, row))}")
    if (more := (total or len(rows)) - _SHOWN) > 0:
        click.echo(f"and {more} more")


# --- what takes long -------------------------------------------------------------------------


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error, once there is something to show."""
    to = Console(stderr=True)
    if not to.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=to, transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def require_somebody(yes: bool) -> None:
    """Refuses to destroy anything for a script that has not said so.

    Raises:
        UsageError: there is no terminal to ask on, and nobody has said yes.
    """
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on: say --yes, or --dry-run to look.")


def confirm(question: str) -> None:
    """Goes on if that is what the user wants, who is asked on standard error.

    Raises:
        Abort: it is not.
    """
    click.confirm(question, abort=True, err=True)
