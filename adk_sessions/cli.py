"""The command ``adk-sessions``: the schema's life in deploys, and looking after the data.

Exit status: 0 done, 1 what was asked for is not so or failed (the message says why), 2 wrong usage.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable, Coroutine, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import adoption, doctor, migrate, transfer
from .dialects import supported
from .errors import ConfigurationError, SessionStoreError
from .models import names
from .service import SessionService, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .convert import Report

# Rows that are named one by one, when they cannot be converted or imported.
_SHOWN = 20
# Findings of each kind that one repair mends.
_REPAIRED = 100_000

_place = (
    click.option(
        "--url",
        envvar="ADK_SESSIONS_URL",
        required=True,
        show_envvar=True,
        help="The database, as people paste it. A direct connection, not one"
        " through a pooler in transaction mode.",
    ),
    click.option("--schema", help="The database schema of the tables."),
    click.option("--table-prefix", default="", help="What the tables' names begin with."),
)
_lock_timeout = click.option(
    "--lock-timeout",
    type=click.FloatRange(min=0),
    default=migrate.LOCK_TIMEOUT,
    show_default=True,
    help="Seconds to wait for another process that migrates.",
)
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")


def _command(*options: Callable[[Any], Any], name: str | None = None) -> Callable[[Any], Any]:
    """A command of `main` with options, whose typed errors are one line and exit status 1.

    It is called as the function is, unless it has a name.
    """

    def register(function: Callable[..., Coroutine[Any, Any, None] | None]) -> Any:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            try:
                result = function(**arguments)
                if result is not None:
                    asyncio.run(result)
            except SessionStoreError as error:
                message = str(error)
            else:
                return
            # out of the except clause: the driver's error is in nobody's chain
            raise click.ClickException(message)

        for option in reversed(options):
            run = option(run)
        return main.command(name)(run)

    return register


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="adk-sessions")
def main() -> None:
    """Makes, adopts, checks and converts the tables of adk-sessions, and looks after the data."""


@_command(
    *_place,
    _lock_timeout,
    _dry_run,
    click.option(
        "--source-timezone",
        default="UTC",
        show_default=True,
        help="google-adk's old layout only: the zone in which the processes ran that wrote it.",
    ),
    click.option(
        "--refused",
        type=click.Choice(["stop", "empty"]),
        default="stop",
        show_default=True,
        help="google-adk's old layout only: what to do when a pickle names a class that no event"
        " has: stop, or keep the event with empty actions.",
    ),
)
async def upgrade(
    url: str,
    schema: str | None,
    table_prefix: str,
    lock_timeout: float,
    dry_run: bool,
    source_timezone: str,
    refused: Any,
) -> None:
    """Bring the tables to this release's revision.

    Makes them in an empty database, adopts what google-adk 1.x and 2.x made, and converts its old
    layout with pickled actions; stop what writes to that before. The originals stay in tables
    beside, until finish-conversion.
    """
    place: dict[str, Any] = {"schema": schema, "table_prefix": table_prefix}
    before = await migrate.current(url, **place)
    with _progress("events") as progress:
        how = migrate.Conversion(source_timezone, refused, progress)
        if dry_run:
            report = await migrate.preview(url, **place, conversion=how)
        else:
            report = await migrate.upgrade(url, **place, conversion=how, lock_timeout=lock_timeout)
    if report is not None:
        _show_conversion(report, source_timezone, dry_run)
    after = before if dry_run else await migrate.current(url, **place)
    if dry_run and (before is None or before < migrate.HEAD):
        click.echo(f"Now at {before or 'no revision'}; upgrade would bring it to {migrate.HEAD}.")
    elif before == after:
        click.echo(f"At {after} already.")
    else:
        click.echo(f"From {before or 'no revision'} to {after}.")
    if dry_run and report is not None and report.refused and refused == "stop":
        raise click.exceptions.Exit(1)


@_command(*_place)
async def current(url: str, schema: str | None, table_prefix: str) -> None:
    """Print the revision that the tables are at."""
    found = await migrate.current(url, schema=schema, table_prefix=table_prefix)
    click.echo(f"{found or 'none'}{' (head)' if found == migrate.HEAD else ''}")


@_command(*_place)
async def check(url: str, schema: str | None, table_prefix: str) -> None:
    """Compare the live schema with what this release works on.

    Reads only. Prints every difference, by table and column, and exits with status 1 if there is
    one.
    """
    await migrate.check(url, schema=schema, table_prefix=table_prefix)
    click.echo(f"The schema is as revision {migrate.HEAD} wants it.")


@_command(*_place, _lock_timeout, click.argument("revision", default="head"))
async def stamp(
    url: str, schema: str | None, table_prefix: str, lock_timeout: float, revision: str
) -> None:
    """Note that the tables are at REVISION (default: head), without running anything."""
    place: dict[str, Any] = {"schema": schema, "table_prefix": table_prefix}
    await migrate.stamp(url, revision, **place, lock_timeout=lock_timeout)
    click.echo(f"Stamped {await migrate.current(url, **place) or 'none'}.")
    if revision == "head":
        try:
            await migrate.check(url, **place)
        except SessionStoreError as error:
            click.echo(f"Warning: {error}", err=True)


@_command(
    click.option("--dialect", required=True, type=click.Choice(supported), help="The database."),
    *_place[1:],
    click.option("--rls", is_flag=True, help="Row level security too, for a database that has it."),
)
async def sql(dialect: str, schema: str | None, table_prefix: str, rls: bool) -> None:
    """Print the statements that make the tables, to paste into an SQL editor."""
    click.echo(
        await migrate.sql(
            dialect, schema=schema, table_prefix=table_prefix, row_level_security=rls
        ),
        nl=False,
    )


@_command(
    *_place, _lock_timeout, click.confirmation_option(prompt="Drop the tables with the originals?")
)
async def finish_conversion(
    url: str, schema: str | None, table_prefix: str, lock_timeout: float
) -> None:
    """Drop the tables in which a conversion kept the originals."""
    dropped = await migrate.finish_conversion(
        url, schema=schema, table_prefix=table_prefix, lock_timeout=lock_timeout
    )
    click.echo(f"Dropped {', '.join(dropped)}.")


@_command(
    *_place,
    _dry_run,
    click.argument("file", type=click.Path(path_type=Path)),
)
async def import_adk_sqlite(
    url: str, schema: str | None, table_prefix: str, dry_run: bool, file: Path
) -> None:
    """Import FILE, a database of google-adk's SqliteSessionService.

    Sessions that are there already, with the same events, are left as they are, so it can be
    repeated.
    """
    async with SessionService(url, schema=schema, table_prefix=table_prefix) as service:
        with _progress("sessions") as progress:
            report = await transfer.import_adk_sqlite(
                service, file, dry_run=dry_run, progress=progress
            )
    _show(
        "To import" if dry_run else "Imported",
        {
            "sessions": report.sessions,
            "events": report.events,
            "app states": report.app_states,
            "user states": report.user_states,
            "there already": report.already_there,
            "conflicts": len(report.conflicts),
        },
    )
    if report.conflicts:
        _show_rows("there already with other content", report.conflicts)
        raise click.exceptions.Exit(1)


@_command(
    *_place,
    click.option("--app", "app_name", help="Look at one application only."),
    click.option(
        "--events",
        type=click.Choice(["auto", "adk", "plain"]),
        default="auto",
        show_default=True,
        help="Who reads the events: google-adk, which auto means where it is installed, or anybody"
        " who reads JSON.",
    ),
    click.option(
        "--older-than",
        type=click.FloatRange(min=0),
        default=doctor.IDLE / 60,
        show_default=True,
        help="Minutes without a new event, after which nobody works on a session any more.",
    ),
    click.option(
        "--repair",
        is_flag=True,
        help="Add rows of states that are missing, responses to calls that have none, and set"
        " update times forward. Deletes and rewrites nothing.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    name="doctor",
)
async def examine(
    url: str,
    schema: str | None,
    table_prefix: str,
    app_name: str | None,
    events: str,
    older_than: float,
    repair: bool,
    as_json: bool,
) -> None:
    """Look for what is wrong with the stored sessions.

    Reads everything, in a transaction that cannot write, and names what is damaged, lost, out of
    order or without an answer. Exits with status 1 if something is wrong and was not repaired.
    """
    place: dict[str, Any] = {"schema": schema, "table_prefix": table_prefix}
    look: dict[str, Any] = {"idle": older_than * 60, "rows": _REPAIRED if repair else 1000}
    done: doctor.Repairs | None = None
    async with _reader(events)(url, **place, migrate="off") as service:
        with _progress("events") as progress:
            report = await doctor.examine(service, app_name, **look, progress=progress)
        if repair and report.examined and not report.schema:
            done = await doctor.repair(service, report)
            with _progress("events") as progress:
                report = await doctor.examine(service, app_name, **look, progress=progress)
    if as_json:
        click.echo(_as_json(report, done))
    else:
        _show_examination(report, done)
        if report.schema:
            where = names(**place)
            click.echo(
                f"Mend the schema with: {adoption.command('upgrade', where)}. If that has nothing"
                f" to do, run {adoption.command('stamp base', where)} first, and then it again."
                + (" Only then is anything repaired." if repair else "")
            )
    if not report.healthy:
        raise click.exceptions.Exit(1)


def _reader(events: str) -> type[Store[Any, Any]]:
    """The service whose events are to be read."""
    if events == "plain":
        return SessionService
    failure: str | None = None
    try:
        from .adk import DatabaseSessionService
    except ImportError as error:
        failure = str(error)
    else:
        return DatabaseSessionService
    if events == "adk":
        raise ConfigurationError(failure)
    return SessionService


def _show_examination(report: doctor.Report, done: doctor.Repairs | None) -> None:
    for line in report.schema:
        click.echo(f"schema: {line}")
    if not report.examined:
        click.echo("The rows were not looked at.")
        return
    if done is not None:
        _show(
            "Repaired",
            {
                "rows for states": done.app_states + done.user_states,
                "update times": done.update_times,
                "function calls": done.calls,
            },
        )
        _show_rows("left alone", [_words(row) for row in done.left])
    counts = {"sessions": report.sessions, "events": report.events}
    for kinds in (doctor.FAULTS, doctor.NOTES):
        for kind, name in kinds.items():
            if count := report.found[kind].count:
                counts[name] = count
    _show("Examined", counts)
    for kind, found in report.found.items():
        what = kind.replace("_", " ")
        _show_rows(what, [_words(row) for row in found.rows], found.count)
    click.echo("Nothing is wrong." if report.healthy else "Something is wrong, see above.")


def _words(row: doctor.Row) -> tuple[str, ...]:
    return tuple(word for word in row if word)


def _as_json(report: doctor.Report, done: doctor.Repairs | None) -> str:
    return json.dumps(
        {
            "healthy": report.healthy,
            "schema": report.schema,
            "examined": report.examined,
            "sessions": report.sessions,
            "events": report.events,
            "found": {
                kind: {"count": found.count, "rows": [row._asdict() for row in found.rows]}
                for kind, found in report.found.items()
            },
            "repaired": None
            if done is None
            else {**dataclasses.asdict(done), "left": [row._asdict() for row in done.left]},
        },
        indent=2,
    )


def _show_conversion(report: Report, zone: str, dry_run: bool) -> None:
    refused = len(report.refused) + report.refused_more
    _show(
        "To convert" if dry_run else "Converted",
        {
            "sessions": report.sessions,
            "events": report.events,
            "app states": report.app_states,
            "user states": report.user_states,
            "events without session": report.orphans,
            "refused": refused,
        },
    )
    click.echo(f"Times were read as those of {zone} (--source-timezone).")
    _show_rows("refused", [tuple(vars(row).values()) for row in report.refused], refused)
    if not dry_run:
        click.echo("The originals are kept beside; adk-sessions finish-conversion drops them.")


def _show(title: str, counts: dict[str, int]) -> None:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in counts.items():
        table.add_row(name, str(count))
    Console().print(table)


def _show_rows(what: str, rows: Sequence[tuple[str, ...]], total: int | None = None) -> None:
    for row in rows[:_SHOWN]:
        click.echo(f"{what}: {' / '.join(map(repr, row))}")
    if (more := (total or len(rows)) - _SHOWN) > 0:
        click.echo(f"and {more} more")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, once there is something to show."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
