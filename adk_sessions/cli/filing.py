"""Filing sessions: archive, title and labels, copies."""

from __future__ import annotations

from typing import Any

import click

from ..errors import InvalidInputError
from . import conversation, group, printing


@group.command(*group.place, *group.session)
async def archive(app_name: str, user_id: str, session_id: str, **place: Any) -> None:
    """Archive a session: lists leave it out.

    Nothing is appended to it until it is restored; show reads it as before.
    """
    async with group.opened(**place) as service:
        await service.archive_session(app_name, user_id, session_id)
    click.echo("Archived.")


@group.command(*group.place, *group.session)
async def restore(app_name: str, user_id: str, session_id: str, **place: Any) -> None:
    """Take a session out of the archive."""
    async with group.opened(**place) as service:
        await service.restore_session(app_name, user_id, session_id)
    click.echo("Restored.")


@group.command(
    *group.place,
    *group.session,
    click.option("--title", help="What it is called; an empty one removes it."),
    group.pairs("--set", "pairs", help="Set this label."),
    click.option("--remove", "names", multiple=True, metavar="NAME", help="Remove this label."),
)
async def label(
    app_name: str,
    user_id: str,
    session_id: str,
    title: str | None,
    pairs: dict[str, str],
    names: tuple[str, ...],
    **place: Any,
) -> None:
    """Give a session a title and labels.

    It is no turn of the conversation: nobody who holds the session is disturbed.
    """
    labels: dict[str, str | None] = {**pairs, **dict.fromkeys(names)}
    changed: dict[str, Any] = {"labels": labels} if labels else {}
    if title is not None:
        changed["title"] = title or None
    if not changed:
        raise click.UsageError("Say what is to change: --title, --set or --remove.")
    if pairs.keys() & set(names):
        raise InvalidInputError("a label is both set and removed", field="labels")
    async with group.opened(**place) as service:
        summary = await service.update_session(app_name, user_id, session_id, **changed)
    for line in conversation.heading(summary):
        click.echo(line.plain)


@group.command(
    *group.place,
    *group.session,
    click.option("--at", metavar="EVENT", help="Up to the event with this id; else all of it."),
    click.option("--as", "name", metavar="SESSION", help="The new session's id; else one is made."),
)
async def fork(
    app_name: str, user_id: str, session_id: str, at: str | None, name: str | None, **place: Any
) -> None:
    """Copy a session up to an event, and print the copy's id.

    The copy has the state that was there, and goes on by itself.
    """
    async with group.opened(**place) as service:
        session = await service.get_session(
            app_name=app_name, user_id=user_id, session_id=session_id, num_recent_events=0
        )
        if session is None:
            raise group.unknown(session_id)
        copy = await service.fork_session(session, at=at, session_id=name)
    click.echo(printing.clean(copy.id, line=True))
