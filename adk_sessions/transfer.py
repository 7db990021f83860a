"""Bringing sessions in from elsewhere: files of google-adk's SqliteSessionService."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import RootModel, ValidationError

from . import checks, clock, codec
from .dialects.adk_sqlite import Source, open_source, refuse_itself
from .dialects.base import TICK
from .dialects.rows import Key, StoredEvent
from .errors import ConfigurationError, InvalidInputError, SchemaError
from .service import Store
from .storing import ImportReport, Incoming
from .storing import Target as _Target

T = TypeVar("T")

#: what such an import did
Report = ImportReport


class _Plain(RootModel[dict[str, Any]]):
    """An event's JSON as it is: the codec takes models, and no field may get lost or be added."""


async def import_adk_sqlite(
    service: Store[Any, Any],
    file: Path,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Imports a file of google-adk's SqliteSessionService, which is not changed.

    Each session is stored in one transaction with all of its events, in the order in which that
    service reads them. An import that was broken off is repeated as it is: a session that the
    database has already, with all of these events at its beginning, is skipped. Keys of app and
    user states are added where the database lacks them; a key that it has keeps its value.

    Args:
        service: where to. Policies for ``row_level_security`` must not bind its role.
        file: the database file; stop what writes to it first, or later writes are missed.
        dry_run: reads and compares everything, and writes nothing.
        progress: called with the sessions done and all sessions.

    Raises:
        ConfigurationError: the service has ``row_level_security``.
        InvalidInputError: there is no such file, it is the service's own, or a row has an id or a
            time that cannot be stored. Nothing of the row's session is stored, and what came
            before it stays.
        SchemaError: it is not such a file, or a row is not JSON; likewise.
        DatabaseError: the file cannot be read, or the database failed.
    """
    if service._isolated:
        raise ConfigurationError(
            "Import without row_level_security, as a role that the policies do not bind."
        )
    refuse_itself(service._database, file)
    async with open_source(file) as source:
        target = await _Target.of(service, dry_run=dry_run)
        apps = users = done = 0
        async for app, state, time in source.app_states():
            with _naming(f"app_states {_short(app)}"):
                apps += await target.add_state(app, None, *_wider(state, time, app_name=app))
        async for app, user, state, time in source.user_states():
            with _naming(f"user_states {_short(app, user)}"):
                text, moment = _wider(state, time, app_name=app, user_id=user)
                users += await target.add_state(app, user, text, moment)
        report, total = Report(app_states=apps, user_states=users), await source.counted()
        async for row in source.sessions():
            session = await _read(service, source, row)
            with _naming(f"session {_short(*session.key)}"):
                report = await target.add(session, report)
            done += 1
            if progress is not None:
                progress(done, total)
    return report


def _wider(state: Any, time: Any, **key: Any) -> tuple[str, datetime]:
    """A wider state's text and time, in the form that they are stored in."""
    name = f"{'user' if len(key) > 1 else 'app'}_states {_short(*key.values())}"
    for field, value in key.items():
        checks.check_key(value, field)
    checks.check_timestamp(time, "update_time")
    return codec.dump_state(_object(state, name)), clock.to_datetime(time)


async def _read(service: Store[Any, Any], source: Source, row: tuple[Any, ...]) -> Incoming:
    """A session of the file in the form that it is stored in."""
    key = Key(*row[:3])
    state, created, updated = row[3:]
    name = f"session {_short(*key)}"
    with _naming(name):
        for value, field in zip(key, ("app_name", "user_id", "id"), strict=True):
            checks.check_key(value, field)
        checks.check_timestamp(created, "create_time")
        checks.check_timestamp(updated, "update_time")
        text = codec.dump_state(_object(state, name))
    update_time, events, latest = clock.to_datetime(updated), [], clock.EPOCH
    for event_id, invocation_id, time, data in await source.events(key):
        at = f"event {_short(event_id)} of {name}"
        with _naming(at):
            checks.check_key(event_id, "id")
            checks.check_key(invocation_id, "invocation_id", limit=checks.TEXT_LENGTH)
            plain = _object(data, at)
            for moment in (time, own := plain.get("timestamp", time)):
                checks.check_timestamp(moment, "timestamp")
            stored = codec.dump_event(_Plain(plain))
        _readable(
            functools.partial(codec.load_event, service.event_type, *stored),
            f"{at} cannot be read as {service.event_type.__name__}",
        )
        # the column may not be older than the event's own time, by which readers filter
        latest = max(clock.to_datetime(max(time, own)), latest + TICK)
        events.append(StoredEvent(event_id, invocation_id, latest, *stored))
    times = {"create_time": clock.to_datetime(created), "update_time": max(update_time, latest)}
    count = (len(events), 0)
    return Incoming(key, {"state": text, **times}, lambda: events, tuple, count, exact=False)


def _object(text: Any, name: str) -> dict[str, Any]:
    value = None
    if isinstance(text, str):
        encoded = _readable(text.encode, f"{name} is not UTF-8")
        value = _readable(lambda: json.loads(encoded), f"{name} is not JSON")
    if not isinstance(value, dict):
        raise SchemaError(f"{name} is not a JSON object.")
    return value


def _readable(work: Callable[[], T], message: str) -> T:
    """A row's content, or what is wrong with it: the error itself would quote the row."""
    with contextlib.suppress(ValidationError, ValueError, RecursionError):
        return work()
    raise SchemaError(f"{message}.")


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of an error which row it is about."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}", field=error.field) from None


def _short(*key: Any) -> str:
    return ", ".join(repr(part if len(str(part)) <= 64 else f"{str(part)[:64]}…") for part in key)
