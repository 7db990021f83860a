"""Conversations: read, and followed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Any

import click
from rich.text import Text

from .. import survey
from ..service import SessionService
from ..session import Event, SessionSummary
from . import conversation, group, printing
from .conversation import Entry

# Rows that are read at once where all are wanted, and keys of a state that are shown.
_PAGE = 500
_KEYS = 50

_ids = click.option("--ids", is_flag=True, help="Print each event's id, for --at and --after.")
_width = click.option(
    "--width",
    type=click.IntRange(min=20),
    help="Columns to fold text at; else those of the terminal, or COLUMNS; into a file it is not"
    " folded.",
)


@group.command(
    *group.place,
    *group.session,
    click.option("--at", metavar="EVENT", help="As it was after the event with this id."),
    click.option("--last", type=click.IntRange(min=0), help="So many of its newest events only."),
    _ids,
    _width,
    group.as_json,
)
async def show(
    app_name: str,
    user_id: str,
    session_id: str,
    at: str | None,
    last: int | None,
    ids: bool,
    width: int | None,
    as_json: bool,
    **place: Any,
) -> None:
    """Print a conversation as people read it.

    Who, when and what was said; calls of tools on one line with their answers; what changed the
    state. Times are those of this machine's zone. Control characters in what is stored are shown,
    not sent to the terminal.
    """
    async with group.opened(**place) as service:
        summary = await _described(service, app_name, user_id, session_id)
        key = (app_name, user_id, session_id)
        if at is None:
            whole = await service.get_session(
                app_name=app_name, user_id=user_id, session_id=session_id, num_recent_events=0
            )
            events = _events(service, key, last)
        else:
            whole = await service.get_session(
                app_name=app_name, user_id=user_id, session_id=session_id, at=at
            )
            events = _given(whole.events if whole and last != 0 else [], last)
        if whole is None:
            raise group.unknown(session_id)
        changes = await survey.state_changes(service, *key)
        if as_json:
            printing.print_json(
                {"session": {**dataclasses.asdict(summary), "state": whole.state, "at": at}}
            )
            await _print_lines(events, changes, at, last)
            return
        to = printing.console(width)
        for line in conversation.heading(summary):
            conversation.print_text(to, line, indent="")
        entries = _entries(events, changes, at, last)
        async for entry in conversation.folded(entries):
            to.print()
            conversation.print_entry(to, entry, ids=ids)
        if whole.state:
            to.print()
            to.print(Text("state" if at is None else "state there", "bold yellow"))
            for text in conversation.of_state(whole.state, _KEYS):
                conversation.print_text(to, Text(text, "yellow"))


async def _described(
    service: SessionService, app_name: str, user_id: str, session_id: str
) -> SessionSummary:
    found = await service.describe_session(app_name, user_id, session_id, counts=True)
    if found is None:
        raise group.unknown(session_id)
    return found


async def _given(events: list[Event], last: int | None) -> AsyncIterator[Event]:
    for event in events if last is None else events[-last:]:
        yield event


async def _events(
    service: SessionService, key: tuple[str, str, str], last: int | None
) -> AsyncIterator[Event]:
    """All events, or the newest ones, in order."""
    if last is None:
        async for event in service.iter_events(*key):
            yield event
        return
    pages: list[list[Event]] = []
    cursor, missing = None, last
    while missing > 0:
        page = await service.page_events(
            *key, limit=min(missing, _PAGE), cursor=cursor, direction="backward"
        )
        pages.append(page.items)
        cursor, missing = page.next_cursor, missing - len(page.items)
        if cursor is None:
            break
    for items in reversed(pages):
        for event in items:
            yield event


async def _merged(
    events: AsyncIterator[Event],
    changes: list[survey.StateChange],
    at: str | None,
    last: int | None,
) -> AsyncIterator[dict[str, Any] | survey.StateChange]:
    """Events as JSON, and after each the changes of the state that came after it."""
    of: dict[str | None, list[survey.StateChange]] = {}
    for change in changes:
        of.setdefault(change.after, []).append(change)
    if last is None:
        for change in of.get(None, ()):
            yield change
    async for event in events:
        yield event.model_dump(exclude_none=True)
        if event.id != at:
            for change in of.get(event.id, ()):
                yield change


async def _entries(
    events: AsyncIterator[Event],
    changes: list[survey.StateChange],
    at: str | None,
    last: int | None,
) -> AsyncIterator[Entry]:
    async for one in _merged(events, changes, at, last):
        if isinstance(one, survey.StateChange):
            yield conversation.of_change(one)
        else:
            yield conversation.of_event(one)


async def _print_lines(
    events: AsyncIterator[Event],
    changes: list[survey.StateChange],
    at: str | None,
    last: int | None,
) -> None:
    async for one in _merged(events, changes, at, last):
        if isinstance(one, survey.StateChange):
            printing.print_json({"change": dataclasses.asdict(one)})
        else:
            printing.print_json({"event": one})


@group.command(
    *group.place,
    *group.session,
    click.option("--last", type=click.IntRange(min=0), help="Begin with so many events. [10]"),
    click.option("--after", metavar="EVENT", help="Begin after the event with this id."),
    click.option(
        "--interval",
        type=click.FloatRange(min=0.05),
        default=1.0,
        show_default=True,
        help="Seconds between two looks.",
    ),
    _ids,
    _width,
    group.as_json,
)
async def tail(
    app_name: str,
    user_id: str,
    session_id: str,
    last: int | None,
    after: str | None,
    interval: float,
    ids: bool,
    width: int | None,
    as_json: bool,
    **place: Any,
) -> None:
    """Follow a conversation, and print its events as they come.

    Whatever process appends them.
    Goes on over a restart of the database, until it is interrupted (exit status 130), or the
    session is deleted (1).
    """
    if last is not None and after is not None:
        raise click.UsageError("--last and --after each say where to begin: one of them.")
    to = printing.console(width)

    def tell(event: Event) -> None:
        told: Mapping[str, Any] = event.model_dump(exclude_none=True)
        if as_json:
            printing.print_json({"event": told})
        else:
            conversation.print_entry(to, conversation.of_event(told), ids=ids)

    async with group.opened(**place) as service:
        session = await service.get_session(
            app_name=app_name,
            user_id=user_id,
            session_id=session_id,
            num_recent_events=0 if after is not None else 10 if last is None else last,
        )
        if session is None:
            raise group.unknown(session_id)
        for event in session.events:
            tell(event)
        news = service.watch(session, after=after, poll_interval=interval)
        async with contextlib.aclosing(news):
            async for event in news:
                tell(event)
    raise click.ClickException("The session has been deleted.")
