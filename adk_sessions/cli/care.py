"""Looking after the data: retention, erasure, and what is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

import click

from .. import adoption, doctor
from ..errors import ConfigurationError
from ..lifecycle import ErasureReport
from ..models import names
from ..retention import PruneReport
from ..service import SessionService, Store
from . import group, printing

R = TypeVar("R", PruneReport, ErasureReport)

# Findings of each kind that one repair mends.
_REPAIRED = 100_000


# Seconds of each unit of a time that is typed.
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _span(ctx: click.Context, option: click.Parameter, text: str | None) -> timedelta | None:
    if text is None:
        return None
    if found := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)([smhdw])", text.strip()):
        with contextlib.suppress(OverflowError):
            return timedelta(seconds=float(found[1]) * _UNITS[found[2]])
    raise click.BadParameter(f"{text!r} is not a number and s, m, h, d or w: 90d.", ctx, option)


@group.command(
    *group.place,
    click.argument("app_name", metavar="APP"),
    click.option("--idle-for", metavar="TIME", callback=_span, help="Not appended to for so long."),
    click.option("--older-than", metavar="TIME", callback=_span, help="Created so long ago."),
    click.option(
        "--keep-last",
        type=click.IntRange(min=1),
        help="Do not delete such sessions: cut each to its newest events, so many.",
    ),
    click.option("--archived-only", is_flag=True, help="Of these the archived ones only."),
    group.dry_run,
    group.yes,
    group.as_json,
)
async def prune(
    app_name: str,
    idle_for: timedelta | None,
    older_than: timedelta | None,
    keep_last: int | None,
    archived_only: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **place: Any,
) -> None:
    """Delete an application's old sessions, or cut them short.

    A session has to meet each condition that is given; those whose own time has run out go in any
    case, and with no condition only they. A TIME is a number and a unit: 45s, 30m, 12h, 90d, 8w.
    What would go is shown first; it may be repeated, and be broken off.
    """
    given = (idle_for, older_than, keep_last)
    if archived_only and all(condition is None for condition in given):
        raise click.UsageError(
            "--archived-only is no condition of its own: say --idle-for, --older-than or"
            " --keep-last too."
        )
    conditions: dict[str, Any] = {
        "idle_for": idle_for,
        "older_than": older_than,
        "keep_last": keep_last,
        "archived_only": archived_only,
    }

    async def work(service: SessionService, dry_run: bool) -> PruneReport:
        with printing.progress("sessions") as told:
            return await service.prune(app_name, **conditions, dry_run=dry_run, progress=told)

    await _destroy(place, work, ("To prune", "Pruned"), dry_run=dry_run, yes=yes, as_json=as_json)


@group.command(
    *group.place,
    click.argument("app_name", metavar="APP"),
    click.argument("user_id", metavar="USER"),
    group.dry_run,
    group.yes,
    group.as_json,
)
async def erase(
    app_name: str, user_id: str, dry_run: bool, yes: bool, as_json: bool, **place: Any
) -> None:
    """Delete all that is stored of a user.

    In one application: sessions, events, the user's state, recorded changes, and rows that a
    conversion has kept. What would go is shown first. Exits with status 1 if something is left: a
    writer was not stopped.
    """

    async def work(service: SessionService, dry_run: bool) -> ErasureReport:
        return await service.erase_user(app_name, user_id, dry_run=dry_run)

    done = await _destroy(
        place, work, ("To erase", "Erased"), dry_run=dry_run, yes=yes, as_json=as_json
    )
    if done is not None and done.left:
        raise click.ClickException(
            f"{done.left} rows are left: stop what writes for this user, and erase again."
        )


async def _destroy(
    place: dict[str, Any],
    work: Callable[[SessionService, bool], Awaitable[R]],
    titles: tuple[str, str],
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> R | None:
    """Shows what would go, asks, does it, and shows what has gone: what was done, if anything."""
    if not dry_run:
        printing.require_somebody(yes)
    async with group.opened(**place) as service:
        if dry_run or not yes:
            planned = await work(service, True)
            # who is asked sees it; of a script's output it is a part only where it is all there is
            if dry_run and as_json:
                printing.print_json(dataclasses.asdict(planned))
            else:
                counts = _counts(planned)
                counts.pop("left", None)  # of an erasure: all of it, before
                printing.print_counts(titles[0], counts, err=not dry_run)
            if dry_run:
                return None
            if any(dataclasses.asdict(planned).values()):
                printing.confirm("Delete that for good?")
        done = await work(service, False)
    if as_json:
        printing.print_json(dataclasses.asdict(done))
    else:
        printing.print_counts(titles[1], _counts(done))
    return done


def _counts(report: PruneReport | ErasureReport) -> dict[str, int]:
    return {name.replace("_", " "): count for name, count in dataclasses.asdict(report).items()}


@group.command(
    *group.place,
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
    group.as_json,
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
        with printing.progress("events") as told:
            report = await doctor.examine(service, app_name, **look, progress=told)
        if repair and report.examined and not report.schema:
            done = await doctor.repair(service, report)
            with printing.progress("events") as told:
                report = await doctor.examine(service, app_name, **look, progress=told)
    if as_json:
        printing.print_json(_as_object(report, done))
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
        from ..adk import DatabaseSessionService
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
        printing.print_counts(
            "Repaired",
            {
                "rows for states": done.app_states + done.user_states,
                "update times": done.update_times,
                "function calls": done.calls,
            },
        )
        printing.print_rows("left alone", [_words(row) for row in done.left])
    counts = {"sessions": report.sessions, "events": report.events}
    for kinds in (doctor.FAULTS, doctor.NOTES):
        for kind, name in kinds.items():
            if count := report.found[kind].count:
                counts[name] = count
    printing.print_counts("Examined", counts)
    for kind, found in report.found.items():
        what = kind.replace("_", " ")
        printing.print_rows(what, [_words(row) for row in found.rows], found.count)
    click.echo("Nothing is wrong." if report.healthy else "Something is wrong, see above.")


def _words(row: doctor.Row) -> tuple[str, ...]:
    return tuple(word for word in row if word)


def _as_object(report: doctor.Report, done: doctor.Repairs | None) -> dict[str, Any]:
    return {
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
    }
