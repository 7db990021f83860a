"""What there is in a database: counts by application, and what changed a state without an event.

    for app in await survey.applications(service): ...

For people who look at a database; each question is one query over all rows that it is about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection

from . import checks, clock, codec
from .dialects.rows import Key
from .dialects.survey import Survey
from .errors import ConfigurationError
from .service import Store

__all__ = ["Application", "StateChange", "applications", "size", "state_changes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Application:
    """How much there is of one application.

    Attributes:
        app_name: which.
        sessions: all of them, the archived ones too.
        archived: sessions that are archived.
        users: users with sessions.
        events: of all sessions; None if they were not counted.
        oldest: when its first session was created, seconds since the epoch.
        newest: when a session was last updated.
    """

    app_name: str
    sessions: int = 0
    archived: int = 0
    users: int = 0
    events: int | None = None
    oldest: float | None = None
    newest: float | None = None


@dataclass(frozen=True)
class StateChange:
    """A change of a session's own state by `update_state`.

    Attributes:
        after: id of the newest event before it; None if there is none, or none any more.
        time: seconds since the epoch.
        delta: keys that were set.
        deleted: keys that were removed.
    """

    after: str | None
    time: float
    delta: dict[str, Any]
    deleted: list[str]


async def applications(
    service: Store[Any, Any], app_name: str | None = None, *, events: bool = True
) -> list[Application]:
    """Counts what each application has.

    Args:
        service: where. Policies for ``row_level_security`` must not bind its role.
        app_name: counts one application only; empty if there is nothing of it.
        events: whether events are counted, which takes a second for some millions of them.

    Returns:
        The applications that have sessions or events, by name.

    Raises:
        ConfigurationError: the service has ``row_level_security``.
        DatabaseError: the database failed.
    """
    if app_name is not None and not checks.are_keys(app_name):
        return []
    found: dict[str, Application] = {}
    for app, sessions, archived, users, oldest, newest in await _ask(
        service, lambda survey, conn: survey.sessions(conn, app_name)
    ):
        times = clock.to_epoch(oldest), clock.to_epoch(newest)
        found[app] = Application(app, sessions, archived, users, 0 if events else None, *times)
    if events:
        for app, count in await _ask(service, lambda survey, conn: survey.events(conn, app_name)):
            counted = vars(found.get(app, Application(app))) | {"events": count}
            found[app] = Application(**counted)
    return [found[app] for app in sorted(found)]


async def size(service: Store[Any, Any]) -> int | None:
    """Bytes that the tables and their indexes take, of an SQLite file all of it; None if unknown.

    Raises:
        ConfigurationError: the service has ``row_level_security``.
        DatabaseError: the database failed.
    """
    return await _ask(service, lambda survey, conn: survey.size(conn))


async def state_changes(
    service: Store[Any, Any], app_name: str, user_id: str, session_id: str
) -> list[StateChange]:
    """Reads what has changed a session's own state without an event, in order.

    Raises:
        ConfigurationError: the service has ``row_level_security``.
        DatabaseError: the database failed.
    """
    key = Key(app_name, user_id, session_id)
    if not checks.are_keys(*key):
        return []
    return [
        StateChange(after, clock.to_epoch(time), codec.load_state(delta), [*codec.load_state(gone)])
        for after, time, delta, gone in await _ask(
            service, lambda survey, conn: survey.state_changes(conn, key)
        )
    ]


async def _ask(service: Store[Any, Any], question: Callable[[Survey, Connection], T]) -> T:
    if service._isolated:
        raise ConfigurationError(
            "Look around without row_level_security, as a role that the policies do not bind."
        )
    await service.prepare_tables()
    return await service._consult(
        lambda statements, conn: question(Survey(statements), conn), replica=True
    )
