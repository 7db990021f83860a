"""Lists of sessions and applications."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import click

from .. import survey
from ..session import SessionSummary
from . import group, printing

# Rows that are read at once where all are wanted.
_PAGE = 500
# Columns of a terminal that has room for both times of a session.
_BOTH_TIMES = 100


@group.command(
    *group.place,
    click.option("--app", "app_name", help="The application; without it, all of them by name."),
    group.user,
    group.pairs("--label", "labels", help="With this label too."),
    click.option("--archived", is_flag=True, help="Archived sessions only."),
    click.option("--with-archived", is_flag=True, help="Archived sessions too."),
    click.option(
        "--order",
        type=click.Choice(["created", "updated"]),
        default="created",
        show_default=True,
        help="The last created or updated first.",
    ),
    click.option("--counts", is_flag=True, help="Count events."),
    click.option(
        "--limit",
        type=click.IntRange(min=1, max=1000),
        default=50,
        show_default=True,
        help="Sessions at a time.",
    ),
    click.option("--cursor", help="Go on where an earlier list said."),
    click.option("--all", "everything", is_flag=True, help="Go on to the end."),
    group.as_json,
    name="list",
)
async def list_sessions(
    app_name: str | None,
    user_id: str | None,
    labels: dict[str, str],
    archived: bool,
    with_archived: bool,
    order: Any,
    counts: bool,
    limit: int,
    cursor: str | None,
    everything: bool,
    as_json: bool,
    **place: Any,
) -> None:
    """List sessions, or without --app the applications.

    Prints the newest sessions, and on standard error the cursor that goes on; with --json the
    cursor is the last line. On a terminal long ids are cut off, anywhere else they are whole.
    """
    if archived and with_archived:
        raise click.UsageError("--archived is for archived sessions only, --with-archived for all.")
    if app_name is None:
        if user_id is not None or labels or archived or with_archived or cursor is not None:
            raise click.UsageError("Say which application: --app.")
        async with group.opened(**place) as service:
            _print_applications(await survey.applications(service, events=counts), as_json)
        return
    wanted: dict[str, Any] = {
        "order": order,
        "archived": True if archived else None if with_archived else False,
        "labels": labels or None,
        "counts": counts,
        "limit": _PAGE if everything else limit,
    }
    async with group.opened(**place) as service:
        first = True
        while True:
            page = await service.page_sessions(app_name, user_id, cursor=cursor, **wanted)
            cursor = page.next_cursor
            if as_json:
                for session in page.items:
                    printing.print_json({"session": dataclasses.asdict(session)})
            elif page.items:
                _print_sessions(page.items, header=first, counts=counts)
            first = False
            if cursor is None or not everything:
                break
    if cursor is not None and as_json:
        printing.print_json({"next_cursor": cursor})
    elif cursor is not None:
        click.echo(f"There is more: --cursor {cursor}, or --all.", err=True)


def _print_sessions(sessions: Iterable[SessionSummary], *, header: bool, counts: bool) -> None:
    both = printing.console().width >= _BOTH_TIMES
    columns = {"user": "id", "session": "id"} | ({"created": "time"} if both else {})
    columns |= {"updated": "time"} | ({"events": "number"} if counts else {})
    columns |= {"title": "text", "labels": "text"}
    rows = []
    for session in sessions:
        row: list[Any] = [session.user_id, session.id]
        if both:
            row.append(printing.when(session.create_time, seconds=False))
        row.append(printing.when(session.last_update_time, seconds=False))
        if counts:
            row.append(session.event_count)
        notes = [f"{name}={value}" for name, value in sorted(session.labels.items())]
        if session.archive_time is not None:
            notes.insert(0, "(archived)")
        rows.append([*row, session.title, " ".join(notes)])
    printing.print_table(columns, rows, header=header)


def _print_applications(
    found: list[survey.Application], as_json: bool, size: int | None = None
) -> None:
    if as_json:
        for app in found:
            printing.print_json({"app": dataclasses.asdict(app)})
        if size is not None:
            printing.print_json({"bytes": size})
        return
    counted = any(app.events is not None for app in found)
    columns = {"app": "id", "sessions": "number", "archived": "number", "users": "number"}
    columns |= {"events": "number"} if counted else {}
    columns |= {"oldest": "time", "newest": "time"}
    rows = []
    for app in found:
        row: list[Any] = [app.app_name, app.sessions, app.archived, app.users]
        row += [app.events] if counted else []
        rows.append([*row, *(printing.when(t, seconds=False) for t in (app.oldest, app.newest))])
    if rows:
        printing.print_table(columns, rows)
    if size is not None:
        click.echo(f"Tables and indexes: {size / 1e6:,.1f} MB")


@group.command(*group.place, group.app, group.as_json)
async def stats(app_name: str | None, as_json: bool, **place: Any) -> None:
    """Count sessions, users and events of each application.

    Exits with status 1 if there is nothing of the application that is asked for.
    """
    async with group.opened(**place) as service:
        found = await survey.applications(service, app_name)
        size = await survey.size(service) if app_name is None else None
    if app_name is not None and not found:
        raise click.ClickException(f"There is nothing of the application {app_name!r}.")
    _print_applications(found, as_json, size)
