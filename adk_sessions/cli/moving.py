"""Moving house: export, import, copies between databases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click

from .. import moving, transfer
from ..service import SessionService
from . import group, printing

# How lines of an export begin that are counted.
_HEADER, _SESSION, _END = (f'{{"type":"{kind}"' for kind in ("header", "session", "end"))


@contextlib.contextmanager
def _written(output: str) -> Iterator[IO[bytes]]:
    """Where an export goes: standard output, or a file that has its name only once it is whole."""
    if output == "-":
        with click.open_file("-", "wb") as stream:
            yield stream
        return
    part = Path(f"{output}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


@group.command(
    *group.place,
    group.app,
    group.user,
    click.option("--session", "session_id", help="Of one session of the user only."),
    click.option(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        type=click.Path(dir_okay=False, allow_dash=True),
        help="Where to; else, and with -, standard output.",
    ),
)
async def export(
    app_name: str | None,
    user_id: str | None,
    session_id: str | None,
    output: str,
    **place: Any,
) -> None:
    """Write sessions and states as JSON, one object per line.

    Import reads them again, into a database of any kind. A FILE is there only once it is whole.
    """
    if user_id is not None and app_name is None:
        raise click.UsageError("--user is a user of an application: say --app too.")
    if session_id is not None and user_id is None:
        raise click.UsageError("--session is a session of a user: say --app and --user too.")
    done = total = stored = 0
    async with group.opened(**place) as service:
        apps = await service.list_apps() if app_name is None else [app_name]
        with _written(output) as file, printing.progress("sessions") as told:
            for app in apps:
                async for line in service.export_sessions(app, user_id, session_id=session_id):
                    file.write(line.encode() + b"\n")
                    if line.startswith(_SESSION):
                        done += 1
                        told(done, max(done, total))
                    elif line.startswith(_HEADER):
                        total += json.loads(line)["sessions"]
                    elif line.startswith(_END):
                        stored += sum(
                            count for count in json.loads(line).values() if isinstance(count, int)
                        )
            if app_name is not None and not stored:
                raise _nothing()


@group.command(
    *group.place,
    click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True)),
    group.dry_run,
    group.as_json,
    name="import",
)
async def import_sessions(file: str, dry_run: bool, as_json: bool, **place: Any) -> None:
    """Store what export has written.

    FILE may be -, standard input. It may be repeated: sessions that are there already, with the
    same content, are left as they are. One that is there with other content is named, and the exit
    status is 1.
    """
    with click.open_file(file, "rb") as source:
        async with group.opened(**place) as service:
            with printing.progress("sessions") as told:
                report = await service.import_sessions(source, dry_run=dry_run, progress=told)
    _tell("To import" if dry_run else "Imported", report, as_json)
    if report.conflicts:
        raise click.exceptions.Exit(1)


def _side(name: str, what: str) -> tuple[Callable[[Any], Any], ...]:
    """The options that say where one of two databases is."""
    return (
        click.option(
            f"--{name}",
            f"{name}_url",
            envvar=f"ADK_SESSIONS_{name.upper()}_URL",
            required=True,
            show_envvar=True,
            metavar="URL",
            help=f"The database {what}.",
        ),
        click.option(f"--{name}-schema", help="The database schema of its tables."),
        click.option(
            f"--{name}-table-prefix", default="", help="What its tables' names begin with."
        ),
    )


@group.command(
    *_side("from", "to copy from"),
    *_side("to", "to copy to"),
    group.app,
    group.user,
    group.as_json,
)
async def copy(
    app_name: str | None,
    user_id: str | None,
    as_json: bool,
    from_url: str,
    from_schema: str | None,
    from_table_prefix: str,
    to_url: str,
    to_schema: str | None,
    to_table_prefix: str,
) -> None:
    """Copy sessions into another database, and compare.

    The two may be of any kind; the tables of both have to be there. It may be repeated. Exits with
    status 1 if a session is there with other content, or is not the same after it was copied.
    """
    if user_id is not None and app_name is None:
        raise click.UsageError("--user is a user of an application: say --app too.")
    start: dict[str, Any] = {
        "url": from_url,
        "schema": from_schema,
        "table_prefix": from_table_prefix,
    }
    end: dict[str, Any] = {"url": to_url, "schema": to_schema, "table_prefix": to_table_prefix}
    async with group.opened(**start) as source, group.opened(**end) as target:
        with printing.progress("sessions") as told:
            report = await moving.copy(
                source, target, app_name=app_name, user_id=user_id, progress=told
            )
    if app_name is not None and report == type(report)():
        raise _nothing()
    _tell("Copied", report, as_json)
    if report.conflicts or report.differences:
        raise click.exceptions.Exit(1)


def _nothing() -> click.ClickException:
    """What has been spelled wrong must not look like a success."""
    return click.ClickException("There is nothing of that: no session and no state.")


def _tell(title: str, report: Any, as_json: bool) -> None:
    found = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    if as_json:
        printing.print_json(found)
        return
    printing.print_counts(
        title,
        {
            name.replace("_", " "): len(value) if isinstance(value, tuple) else value
            for name, value in found.items()
        },
    )
    printing.print_rows("there already with other content", report.conflicts)
    others = [key for key in found.get("differences", ()) if key not in report.conflicts]
    printing.print_rows("not the same", others)


@group.command(
    *group.place,
    group.dry_run,
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
        with printing.progress("sessions") as told:
            report = await transfer.import_adk_sqlite(service, file, dry_run=dry_run, progress=told)
    printing.print_counts(
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
        printing.print_rows("there already with other content", report.conflicts)
        raise click.exceptions.Exit(1)
