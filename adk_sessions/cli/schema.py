"""The schema's life in deploys: make, adopt, convert, check and stamp the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .. import migrate
from ..dialects import supported
from ..errors import SessionStoreError
from . import group, printing

if TYPE_CHECKING:
    from ..convert import Report


@group.command(
    *group.place,
    group.lock_timeout,
    group.dry_run,
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
    with printing.progress("events") as told:
        how = migrate.Conversion(source_timezone, refused, told)
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


@group.command(*group.place)
async def current(url: str, schema: str | None, table_prefix: str) -> None:
    """Print the revision that the tables are at."""
    found = await migrate.current(url, schema=schema, table_prefix=table_prefix)
    click.echo(f"{found or 'none'}{' (head)' if found == migrate.HEAD else ''}")


@group.command(*group.place)
async def check(url: str, schema: str | None, table_prefix: str) -> None:
    """Compare the live schema with what this release works on.

    Reads only. Prints every difference, by table and column, and exits with status 1 if there is
    one.
    """
    await migrate.check(url, schema=schema, table_prefix=table_prefix)
    click.echo(f"The schema is as revision {migrate.HEAD} wants it.")


@group.command(*group.place, group.lock_timeout, click.argument("revision", default="head"))
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


@group.command(
    click.option("--dialect", required=True, type=click.Choice(supported), help="The database."),
    *group.place[1:],
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


@group.command(*group.place, group.lock_timeout, group.yes)
async def finish_conversion(
    url: str, schema: str | None, table_prefix: str, lock_timeout: float, yes: bool
) -> None:
    """Drop the tables in which a conversion kept the originals."""
    printing.require_somebody(yes)
    if not yes:
        printing.confirm("Drop the tables with the originals?")
    dropped = await migrate.finish_conversion(
        url, schema=schema, table_prefix=table_prefix, lock_timeout=lock_timeout
    )
    click.echo(f"Dropped {', '.join(dropped)}.")


def _show_conversion(report: Report, zone: str, dry_run: bool) -> None:
    refused = len(report.refused) + report.refused_more
    printing.print_counts(
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
    printing.print_rows("refused", [tuple(vars(row).values()) for row in report.refused], refused)
    if not dry_run:
        click.echo("The originals are kept beside; adk-sessions finish-conversion drops them.")
