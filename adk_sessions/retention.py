"""Retention: sessions that are old, idle or expired go, or are cut down to their newest events."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection

from . import calls, checks, clock, codec, errors, replay
from .binding import E, S
from .dialects.retention import Criteria, Place, Removed
from .dialects.rows import Key, StoredEvent
from .operations import Operations

T = TypeVar("T")

Progress = Callable[[int, int | None], None]

# Sessions that are looked at, and deleted, in one transaction.
BATCH = 100
# Tries to cut a session that somebody appends to just then.
_TRIES = 3


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did, or with ``dry_run`` would do.

    Attributes:
        sessions: deleted, with all that is theirs.
        events: deleted, those of deleted sessions and those that were cut off.
        trimmed: sessions that were cut down to their newest events.
        state_changes: recorded changes of state that were deleted with the events around them.
    """

    sessions: int = 0
    events: int = 0
    trimmed: int = 0
    state_changes: int = 0

    def plus(self, removed: Removed, *, trimmed: int = 0) -> PruneReport:
        """The report with what else was removed."""
        return replace(
            self,
            sessions=self.sessions + removed.sessions,
            events=self.events + removed.events,
            trimmed=self.trimmed + trimmed,
            state_changes=self.state_changes + removed.state_changes,
        )


class _Cut(NamedTuple):
    """How a session is to be cut.

    Attributes:
        revision, initial: what the session was at when this was found out.
        ids: of the events that go.
        until: the column of the first one that stays.
        changes: how many recorded changes of the state go with them.
        begins: the state before that one as text, None if it cannot be told.
    """

    revision: datetime
    initial: str | None
    ids: list[str]
    until: datetime
    changes: int
    begins: str | None


class _Overtaken(Exception):
    """Somebody else has changed the session since its cut was found out."""


class Retention(Operations[S, E]):
    """The part of a store for that."""

    async def prune(
        self,
        app_name: str,
        *,
        idle_for: float | timedelta | None = None,
        older_than: float | timedelta | None = None,
        keep_last: int | None = None,
        archived_only: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> PruneReport:
        """Deletes an application's sessions that are old, or cuts them down to what is new.

        Sessions whose ``expire_time`` has passed are deleted by any call. Others must meet every
        criterion that is given; with none only the expired go. The states that sessions share stay.

        It works in batches, one short transaction each, and every session is looked at again once
        its row is held: one that somebody has appended to meanwhile is left alone. Nobody is kept
        waiting for longer than a batch takes. An append to a session that was deleted before it is
        refused as to any that is not there; a session that was cut goes on as if nothing had
        happened, and the objects that callers hold stay good. A call that was broken off leaves
        whole sessions and is repeated as it is.

        Args:
            app_name: the application; no other one is touched.
            idle_for: seconds, or a timedelta: sessions that nobody has appended to for so long.
            older_than: seconds, or a timedelta: sessions that were created so long ago.
            keep_last: do not delete such sessions (with no other criterion all of them) but cut
                each down to its newest events, so many, 1 or more. More are kept where a function
                response would lose its call, or an event that rewinds the invocation that it goes
                back to. What the removed events did to the session's state becomes part of the
                state that it is recorded to begin with, so that earlier states are told as before.
            archived_only: a further condition and no criterion of its own: only sessions that are
                archived. Those that have expired go in any case.
            dry_run: count, and write nothing.
            progress: called with the sessions done and all that are to be looked at.

        Returns:
            Counts of what was removed. A batch whose answer was lost with the connection may be
            missing from them.

        Raises:
            InvalidInputError: an argument is not acceptable; nothing was written.
            ConfigurationError: the service has ``row_level_security``.
            DatabaseError: it failed; batches that were done stay done.
        """
        checks.check_key(app_name, "app_name")
        if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
            raise errors.InvalidInputError(
                "keep_last must be a whole number, 1 or more", field="keep_last"
            )
        now = self._now()
        criteria = Criteria(
            clock.to_datetime(now),
            _before(now, idle_for, "idle_for"),
            _before(now, older_than, "older_than"),
            archived_only,
            keep_last,
        )
        if self._isolated:
            raise errors.ConfigurationError(
                "Prune without row_level_security, as a role that the policies do not bind."
            )
        await self.prepare_tables()
        total: int | None = None
        if progress is not None:
            total = await self._run(
                lambda conn: self._statements.count_prunable(conn, app_name, None, criteria),
                write=False,
            )
        report, done = PruneReport(), 0
        async for rows in self._batches(app_name, None, criteria):
            old = [(row.user_id, row.id) for row in rows if criteria.deletes(row)]
            removed = await self._removed(app_name, None, old, criteria, dry_run=dry_run)
            report = report.plus(removed)
            for row in rows:
                if row.more and criteria.cuts(row):
                    key = Key(app_name, row.user_id, row.id)
                    if (cut := await self._cut(key, criteria, dry_run=dry_run)) is not None:
                        report = report.plus(cut, trimmed=1)
            done += len(rows)
            if progress is not None:
                progress(done, total)
        return report

    # --- pieces --------------------------------------------------------------------------------

    async def _batches(
        self, app_name: str, user_id: str | None, criteria: Criteria | None
    ) -> AsyncIterator[Sequence[Any]]:
        """Sessions that may have to go, each once, in the order of their keys."""
        after: Place | None = None
        while True:
            found = await self._run(self._page(app_name, user_id, criteria, after), write=False)
            if found:
                yield found
            if len(found) < BATCH:
                return
            after = (found[-1].user_id, found[-1].id)

    def _page(
        self, app_name: str, user_id: str | None, criteria: Criteria | None, after: Place | None
    ) -> Callable[[Connection], Sequence[Any]]:
        return lambda conn: self._statements.prunable(
            conn, app_name, user_id, criteria, after, BATCH
        )

    async def _removed(
        self,
        app_name: str,
        user_id: str | None,
        places: Sequence[Place],
        criteria: Criteria | None,
        *,
        dry_run: bool = False,
    ) -> Removed:
        """Deletes sessions, or counts what that would delete."""
        if not places:
            return Removed()
        if dry_run:
            return await self._run(
                lambda conn: self._statements.count_sessions(conn, app_name, user_id, places),
                write=False,
            )
        return await self._repeated(
            lambda conn: self._statements.remove_sessions(conn, app_name, user_id, places, criteria)
        )

    async def _cut(self, key: Key, criteria: Criteria, *, dry_run: bool) -> Removed | None:
        """Cuts a session; None if there is nothing to cut, or it never stands still."""
        keep = criteria.keep_last or 1
        for _ in range(_TRIES):
            cut = await self._run(lambda conn: self._planned(conn, key, keep), write=False)
            if cut is None:
                return None
            if dry_run:
                return Removed(0, len(cut.ids), cut.changes)
            with contextlib.suppress(_Overtaken):
                return await self._repeated(self._cutting(key, criteria, cut))
        return None

    def _planned(self, conn: Connection, key: Key, keep: int) -> _Cut | None:
        """How a session can be cut, from what is stored of it; nothing is locked."""
        begin = self._statements.beginning(conn, key, lock=False)
        found = self._statements.read(conn, key, limit=None, after=None, epoch=0.0)
        if begin is None or found is None or begin.update_time != found.update_time:
            return None
        recorded = self._statements.recorded_changes(conn, key)
        count = calls.cut_at_most(list(map(_links, found.events)), len(found.events) - keep)
        if count < 1:
            return None
        until = found.events[count].timestamp
        past = replay.Past(
            None if begin.initial_state is None else codec.load_state(begin.initial_state),
            [
                replay.step(event.timestamp, event.invocation_id, event.data, event.exact)
                for event in found.events
            ],
            [replay.made(*row) for row in recorded],
            codec.load_state(found.states.session),
        )
        begins: str | None = None
        with contextlib.suppress(errors.StateUnknownError):
            begins = codec.dump_state(replay.state_before(past, count), field="initial_state")
        return _Cut(
            found.update_time,
            begin.initial_state,
            [event.id for event in found.events[:count]],
            until,
            sum(change.revision < until for change in past.changes),
            begins,
        )

    def _cutting(
        self, key: Key, criteria: Criteria, cut: _Cut
    ) -> Callable[[Connection], Removed | None]:
        """Cuts a session that is still what it was when the cut was found out."""

        def work(conn: Connection) -> Removed | None:
            row = self._statements.beginning(conn, key, lock=True)
            if row is None or not criteria.cuts(row):
                return None
            if (row.update_time, row.initial_state) != (cut.revision, cut.initial):
                raise _Overtaken
            removed = self._statements.cut_beginning(conn, key, cut.ids, cut.until, cut.begins)
            if (removed.events, removed.state_changes) != (len(cut.ids), cut.changes):
                raise _Overtaken  # the transaction ends with it
            return removed

        return work

    async def _repeated(self, work: Callable[[Connection], T]) -> T:
        """One transaction that may be committed twice without harm."""
        with contextlib.suppress(errors.OutcomeUnknownError):
            return await self._run_once(work)
        return await self._run_once(work)


def _before(now: float, value: float | timedelta | None, field: str) -> datetime | None:
    """The moment that lies so far back."""
    if value is None:
        return None
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds < math.inf:
        raise errors.InvalidInputError(
            f"{field} must be seconds or a timedelta, not negative", field=field
        )
    return clock.to_datetime(now - seconds)


def _links(event: StoredEvent) -> calls.Links:
    """What ties a stored event to others; nothing does if it cannot be read."""
    content: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        content = codec.loads(event.data or "{}")
    return calls.links(content)._replace(invocation_id=event.invocation_id)
