"""Export, import, and copies between databases; the lines are described in `portable`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from . import checks, clock, errors, portable, telemetry
from .assembling import Assembler, WiderState
from .binding import E, S
from .dialects.adk_sqlite import file_of
from .dialects.moving import Head, InOrder, Scope
from .dialects.rows import Key
from .operations import Operations
from .storing import ImportReport, Incoming, Target

__all__ = ["CopyReport", "ImportReport", "Moving", "copy"]

T = TypeVar("T")

Lines = AsyncIterable[str | bytes] | AsyncIterable[str] | Iterable[str | bytes]
Progress = Callable[[int, int], None]

# Readings of a session that somebody cuts or makes anew meanwhile.
_TRIES = 8


class Moving(Operations[S, E]):
    """The part of a store that exports and imports."""

    async def export_sessions(
        self, app_name: str, user_id: str | None = None, *, session_id: str | None = None
    ) -> AsyncIterator[str]:
        """Exports an application, a user or one session as lines of JSON (NDJSON).

        With sessions, archived ones too, come their titles and labels, what `update_state` has
        changed, and the states of the app and its users. Events that cannot be read are exported as
        they are. All of it is what people said: keep a file of it as you keep the database.

        Memory does not grow with what there is: a session of more than 4 MB passes through a file
        without a name in the temporary folder. No connection is held while the caller works.
        Others may go on writing: each session is exported as it was at one moment, but not all of
        them at the same one; a session that is made meanwhile may be missing. All is read from the
        database itself, never from a replica, which may lag.

        Args:
            app_name: the application.
            user_id: the user; None for all of them.
            session_id: one session of that user's; None for all of them.

        Yields:
            Lines without their end; ``adk_sessions.portable`` describes them.

        Raises:
            InvalidInputError: ``session_id`` without ``user_id``.
            ConfigurationError: all users are asked for, with ``row_level_security``; or policies
                hide rows from this role without it.
            DatabaseError: the database failed, or a session never stood still.
        """
        if session_id is not None and user_id is None:
            raise errors.InvalidInputError("a session is its user's: give user_id", field="user_id")
        if self._isolated and user_id is None:
            raise errors.ConfigurationError(
                "With row_level_security one user is exported at a time: give user_id. To export"
                " all of them, log in as a role that the policies do not bind, without it."
            )
        there = checks.are_keys(app_name, user_id or "", session_id or "")
        await self.prepare_tables()
        await self._run(self._statements.require_sight, write=False)
        counts, total = dict.fromkeys(portable.COUNTED.values(), 0), int(session_id is not None)
        if there and session_id is None:
            total = await self._look_up(self._statements.session_count, app_name, user_id)
        yield portable.header(app_name, user_id, session_id, total)
        if there:
            async for user, scope in self._scopes(app_name, user_id):
                counts["app_states" if user is None else "user_states"] += 1
                yield portable.wider_state(app_name, user, scope)
            with portable.Spool() as spool:
                async for key in self._keys(app_name, user_id, session_id):
                    head = await self._whole(key, spool)
                    if head is None:
                        continue
                    for line in spool.rows():
                        yield line
                    counts["sessions"] += 1
                    counts["events"] += head.events
                    counts["state_changes"] += head.state_changes
        yield portable.end(counts)

    async def import_sessions(
        self, lines: Lines, *, dry_run: bool = False, progress: Progress | None = None
    ) -> ImportReport:
        """Imports what `export_sessions` gave, from this kind of database or any other.

        Each session is stored in one transaction with all of its events and state changes, in their
        order and with their revisions: it is there as a whole, or not at all. An import that was
        broken off is repeated as it is: a session that the database has already, with all of these
        events at its beginning, is skipped, whatever its title and labels are by now. One that has
        other events, or fewer, is a conflict and left alone. Keys of app and user states are added
        where the database lacks them; a key that it has keeps its value.

        What an event says is not looked at: an unreadable one stays what it is, and an event of
        other classes is for a service that has those.

        Args:
            lines: a file, or anything that gives text or bytes line by line; several exports may
                follow each other.
            dry_run: reads and compares everything, and writes nothing.
            progress: called with the sessions done, and all that the headers have told of.

        Raises:
            SchemaError: a line is not what it should be; the message has its number, and nothing of
                what is in it. Nothing of its session is stored, and what came before it stays. Or
                the end is missing: the file was cut.
            InvalidInputError: an id or a time in a line cannot be stored; likewise.
            ConfigurationError: an export of all users, with ``row_level_security``.
            DatabaseError: the database failed.
        """
        target = await Target.of(self, dry_run=dry_run)
        report, done, number = ImportReport(), 0, 0
        with contextlib.closing(Assembler(self._isolated)) as assembler:
            async for number, text in _numbered(lines):
                with _naming(number):
                    found = assembler.next(text)
                    if isinstance(found, Incoming):
                        report = await target.add(found, report)
                    elif isinstance(found, WiderState) and await target.add_state(*found):
                        name = "app_states" if found.user_id is None else "user_states"
                        report = replace(report, **{name: getattr(report, name) + 1})
                if isinstance(found, Incoming):
                    done += 1
                    if progress is not None:
                        progress(done, max(done, assembler.total))
            assembler.finish(number)
        return report

    # --- reading -------------------------------------------------------------------------------

    async def _look_up(self, operation: Callable[..., T], *args: Any) -> T:
        """One operation that reads from the database itself."""
        return await self._run(lambda conn: operation(conn, *args), write=False)

    async def _scopes(
        self, app_name: str, user_id: str | None
    ) -> AsyncIterator[tuple[str | None, Scope]]:
        """The states of an app and its users, or one of them, that are not empty; whose each is."""
        app = await self._look_up(self._statements.app_scope, app_name)
        if app is not None and not _is_empty(app):
            yield None, app
        after: str | None = None
        while page := await self._look_up(self._statements.user_scopes, app_name, user_id, after):
            for scope in page:
                if not _is_empty(scope):
                    yield scope.user_id, scope
            if user_id is not None:
                return
            after = page[-1].user_id

    async def _keys(
        self, app_name: str, user_id: str | None, session_id: str | None = None
    ) -> AsyncIterator[Key]:
        if session_id is not None:
            yield Key(app_name, user_id or "", session_id)
            return
        after: Key | None = None
        while page := await self._look_up(self._statements.session_keys, app_name, user_id, after):
            for key in page:
                yield key
            after = page[-1]

    @telemetry.measured("export_sessions")
    async def _whole(self, key: Key, spool: portable.Spool) -> Head | None:
        """Writes a session's lines, as it is at one moment, into a spool; None if there is none."""
        for attempt in range(_TRIES):
            head = await self._look_up(self._statements.session_head, key)
            spool.clear()
            if head is None:
                return None
            spool.put(portable.session(key, head))
            # in one go it is whole whatever the times in its rows are
            read_events = self._events_at_once if attempt % 2 else self._events_in_batches
            if await read_events(key, head, spool) and await self._read_changes(key, head, spool):
                return head
        raise errors.DatabaseError(
            f"Session {key.session_id!r} of app {key.app_name!r} and user {key.user_id!r} was"
            f" changed each of the {_TRIES} times that it was read. Try again.",
            retryable=True,
        )

    async def _events_in_batches(self, key: Key, head: Head, spool: portable.Spool) -> bool:
        """Writes a session's events; whether they are all that it had at its head's moment."""
        order, last, found, latest = InOrder(), None, 0, clock.EPOCH
        while found < head.events:
            batch = await self._look_up(self._statements.session_events, key, head, last)
            if not batch:
                return False
            last, found = batch[-1], found + len(batch)
            for event in order.of(batch) if found < head.events else order.all(batch):
                if event.timestamp < latest:
                    return False  # there is a raw number among the times
                latest = event.timestamp
                spool.put(portable.event(event))
        return found == head.events

    async def _events_at_once(self, key: Key, head: Head, spool: portable.Spool) -> bool:
        found = await self._read(key, limit=None)
        if found is None or found.create_time != head.create_time:
            return False
        for event in found.events:
            spool.put(portable.event(event))
        return len(found.events) == head.events

    async def _read_changes(self, key: Key, head: Head, spool: portable.Spool) -> bool:
        last, found = None, 0
        while found < head.state_changes:
            batch = await self._look_up(self._statements.session_changes, key, head, last)
            if not batch:
                return False
            last, found = batch[-1], found + len(batch)
            for change in batch:
                spool.put(portable.state_change(change))
        return found == head.state_changes

    async def _digest(self, key: Key) -> str | None:
        """What tells a session from any other content, on any database; None if there is none."""
        with portable.Spool() as spool:
            if await self._whole(key, spool) is None:
                return None
            digest = hashlib.sha256()
            for line in spool.rows():
                digest.update(portable.canonical(line).encode())
            return digest.hexdigest()


def _is_empty(scope: Scope) -> bool:
    return (scope.state or "{}").strip() == "{}"


async def _numbered(lines: Lines) -> AsyncIterator[tuple[int, str | bytes]]:
    number = 0
    if isinstance(lines, AsyncIterable):
        async for line in lines:
            number += 1
            yield number, line
    elif isinstance(lines, Iterable) and not isinstance(lines, str | bytes):
        for line in lines:
            number += 1
            yield number, line
    else:
        raise errors.InvalidInputError("lines must give lines one by one", field="lines")


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    """Says of an error which line it is about."""
    try:
        yield
    except errors.InvalidInputError as error:
        raise errors.InvalidInputError(f"line {number}: {error}", field=error.field) from None
    except errors.SchemaError as error:
        raise errors.SchemaError(f"line {number}: {error}") from None


# --- copy ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyReport:
    """What a copy did, and whether both sides are the same now.

    Attributes:
        sessions, events, state_changes: stored.
        app_states, user_states: those to which keys were added.
        already_there: sessions that the target had already, with these events.
        conflicts: sessions that the target has with other content; they were left alone.
        verified: sessions with the same digest on both sides: of ids, times, title, labels, states,
            and each event and state change with its revision.
        differences: sessions of the source for which that is not so: the conflicts, those that have
            gone on since on either side, those that were made too late. With an empty session_id
            the states of users, and with an empty user_id too of apps, that lack a key of the
            source's or have another value for it.
    """

    sessions: int = 0
    events: int = 0
    state_changes: int = 0
    app_states: int = 0
    user_states: int = 0
    already_there: int = 0
    conflicts: tuple[Key, ...] = ()
    verified: int = 0
    differences: tuple[Key, ...] = ()


async def copy(
    source: Moving[Any, Any],
    target: Moving[Any, Any],
    *,
    app_name: str | None = None,
    user_id: str | None = None,
    progress: Progress | None = None,
) -> CopyReport:
    """Copies sessions from one database into another, of any kind, and verifies them.

    It is an export into an import; then each session of the source is read once more, on both
    sides, and compared. It may be repeated: sessions that are there are skipped. What others write
    to the source meanwhile is reported, not copied: a session that has gone on since it was read is
    among the differences, and in a repetition among the conflicts, as the target has less of it.
    Stop who writes, delete it in the target and repeat. One that was deleted meanwhile stays in the
    target.

    Args:
        source: where from. Its tables are brought to this release's revision, as by any call.
        target: where to.
        app_name: the application; None for all of them.
        user_id: one user of it; None for all of them.
        progress: called with the steps done and all steps, two for each session.

    Raises:
        InvalidInputError: ``user_id`` without ``app_name``; the source is a file that is missing;
            or both are one database, as far as that can be told.
        ConfigurationError: all users are asked for, and one side has ``row_level_security``.
        SchemaError, DatabaseError: as `export_sessions` and `import_sessions`.
    """
    if user_id is not None and app_name is None:
        raise errors.InvalidInputError("a user is an app's: give app_name", field="app_name")
    if user_id is None and (source._isolated or target._isolated):
        raise errors.ConfigurationError(
            "With row_level_security one user is copied at a time: give app_name and user_id. To"
            " copy all of them, log in as a role that the policies do not bind, without it."
        )
    if source._database.is_missing():
        raise errors.InvalidInputError("there is no such file to copy from", field="source")
    await _refuse_itself(source, target)
    await source.prepare_tables()
    apps = [app_name] if app_name is not None else await source._look_up(source._statements.apps)
    look_up, count = source._look_up, source._statements.session_count
    steps = _Steps(progress, 2 * sum([await look_up(count, app, user_id) for app in apps]))
    report = CopyReport()
    for app in apps:
        steps.begin()
        lines = source.export_sessions(app, user_id)
        done = vars(await target.import_sessions(lines, progress=steps.told))
        report = replace(report, **{name: getattr(report, name) + done[name] for name in done})
    for app in apps:
        steps.begin()
        report = await _verify(source, target, app, user_id, report, steps)
    return report


async def _verify(
    source: Moving[Any, Any],
    target: Moving[Any, Any],
    app_name: str,
    user_id: str | None,
    report: CopyReport,
    steps: _Steps,
) -> CopyReport:
    verified, differences, done = report.verified, list(report.differences), 0
    statements = target._statements
    async for user, scope in source._scopes(app_name, user_id):
        if user is None:
            found = [await target._look_up(statements.app_scope, app_name)]
        else:
            found = [*await target._look_up(statements.user_scopes, app_name, user, None), None]
        if not portable.contains(found[0] and found[0].state, scope.state):
            differences.append(Key(app_name, user or "", ""))
    async for key in source._keys(app_name, user_id):
        one, two = await asyncio.gather(source._digest(key), target._digest(key))
        if one is not None and one == two:
            verified += 1
        elif one is not None:
            differences.append(key)
        done += 1
        steps.told(done, done)
    return replace(report, verified=verified, differences=tuple(differences))


class _Steps:
    """The progress of several parts as one."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._before = self._done = 0

    def begin(self) -> None:
        """Of the next part."""
        self._before = self._done

    def told(self, done: int, _: int) -> None:
        """So much of this part is done."""
        self._done = self._before + done
        if self._progress is not None:
            self._progress(self._done, max(self._done, self._total))


async def _refuse_itself(source: Moving[Any, Any], target: Moving[Any, Any]) -> None:
    """Refuses two names of one database's tables."""
    if source.models.names != target.models.names:
        return
    one, two = (file_of(store._database) for store in (source, target))
    same = source._database is target._database
    if one is not None and two is not None:
        same = same or _same_file(one, two)
    elif one is two and not same:
        places = [await s._look_up(s._statements.whereabouts) for s in (source, target)]
        same = places[0] is not None and places[0] == places[1]
    if same:
        raise errors.InvalidInputError("a database cannot be copied into itself", field="target")


def _same_file(one: Path, two: Path) -> bool:
    return two.exists() and os.path.samefile(one, two)
