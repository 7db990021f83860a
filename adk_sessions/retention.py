"""Retention: sessions that are old, idle or expired go, or are cut down to their newest events."""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection

from . import calls, checks, clock, codec, errors, replay
from .binding import E, S
from .dialects.retention import Criteria, Place, Removed, Window
from .dialects.rows import Key, StoredEvent
from .operations import Operations

T = TypeVar("T")

Progress = Callable[[int, int], None]

# Sessions that are deleted in one transaction.
BATCH = 100
# Rows that a statement looks at to find those: sessions, and events where these are counted.
LOOK = 5_000
# Events that are cut off in one transaction, or more if they belong together.
STEP = 500
# Tries to cut a session that somebody appends to just then: without getting on, and in all.
_TRIES, _ALL_TRIES = 3, 20


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
    """A step by which a session is cut.

    Attributes:
        ids: of the events that go.
        until: the column of the first one that stays.
        changes: how many recorded changes of the state go with them.
        begins: the state before that one as text, None if it cannot be told.
    """

    ids: list[str]
    until: datetime
    changes: int
    begins: str | None


class _Plan(NamedTuple):
    """How a session is to be cut.

    Attributes:
        revision, initial: what the session was at when this was found out.
        ids: of its events.
        past: what is recorded of its state.
        places: how many events are gone after each step.
    """

    revision: datetime
    initial: str | None
    ids: list[str]
    past: replay.Past
    places: list[int]

    def removes(self) -> Removed:
        """What all of it removes."""
        until = self.past.steps[self.places[-1]].revision
        changes = sum(change.revision < until for change in self.past.changes)
        return Removed(0, self.places[-1], changes)

    def steps(self) -> Iterator[_Cut]:
        """Each step, found out when it is asked for: a state may be large."""
        # what is left to tell from, and how many events it is without
        left, gone = self.past, 0
        changes = sorted(change.revision for change in self.past.changes)
        for start, place in pairwise((0, *self.places)):
            until, begins = self.past.steps[place].revision, None
            with contextlib.suppress(errors.StateUnknownError):
                state = replay.state_before(left, place - gone)
                begins = codec.dump_state(state, field="initial_state")
                later = [change for change in left.changes if change.revision >= until]
                left = replay.Past(state, self.past.steps[place:], later, self.past.current)
                gone = place
            cut = bisect_left(changes, until)
            yield _Cut(self.ids[start:place], until, cut, begins)
            del changes[:cut]


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
        waiting for longer than a batch takes: it deletes 100 sessions, or some 500 events of a
        session that is cut. An append to a session that was deleted before it is refused as to any
        that is not there; a session that was cut goes on as if nothing had happened, and the
        objects that callers hold stay good. A call that was broken off leaves every session as
        deleted, cut down or cut part of the way, all of which is sound, and is repeated as it is.

        An event that was cut off is not known any more: an append of the same event that is
        repeated after that stores it anew. What `update_state` has recorded of a session stays
        until the events before it are cut off.

        Every session of the application is looked at, in statements of a few thousand; a session
        that is cut is read whole, once and again when somebody appends to it meanwhile.

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
            progress: called with the sessions done and all that may have to go, which are then
                counted first.

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
        keep_last = None if keep_last is None else min(keep_last, 2**31 - 1)
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
        await self._run(self._statements.require_sight, write=False)
        total = 0
        if progress is not None:
            async for rows in self._batches(app_name, None, criteria, more=False):
                total += len(rows)
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
                progress(done, max(done, total))
        return report

    # --- pieces --------------------------------------------------------------------------------

    async def _batches(
        self,
        app_name: str,
        user_id: str | None,
        criteria: Criteria | None,
        *,
        more: bool = True,
    ) -> AsyncIterator[Sequence[Any]]:
        """Sessions that may have to go, each once; with ``more`` it is looked up if they have."""
        look, after = LOOK, tuple[str, ...]()
        if more and criteria is not None and criteria.keep_last is not None:
            look = max(BATCH, LOOK // criteria.keep_last)
        while True:
            page = self._page(app_name, user_id, criteria, after, look, more)
            found, last = await self._run(page, write=False)
            for start in range(0, len(found), BATCH):
                yield found[start : start + BATCH]
            if last is not None:
                after = last
            elif len(after) > 1 and user_id is None:
                after = after[:1]  # with those of the next users
            else:
                return

    def _page(
        self,
        app_name: str,
        user_id: str | None,
        criteria: Criteria | None,
        after: tuple[str, ...],
        look: int,
        more: bool,
    ) -> Callable[[Connection], Window]:
        return lambda conn: self._statements.prunable(
            conn, app_name, user_id, criteria, after, look, more=more
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
        keep, done, in_vain = criteria.keep_last or 1, Removed(), 0
        for _ in range(_ALL_TRIES):
            plan = await self._run(lambda conn: self._planned(conn, key, keep), write=False)
            if plan is None:
                break
            if dry_run:
                return plan.removes()
            initial, in_vain = plan.initial, in_vain + 1
            try:
                for step in plan.steps():
                    work = self._cutting(key, criteria, plan.revision, initial, step)
                    cut = await self._repeated(work)
                    if cut is None:
                        break
                    removed, initial = cut
                    done, in_vain = done.plus(removed), 0
                break
            except _Overtaken:
                if in_vain == _TRIES:
                    break
        return done if done.events else None

    def _planned(self, conn: Connection, key: Key, keep: int) -> _Plan | None:
        """How a session can be cut, from what is stored of it; nothing is locked."""
        begin = self._statements.beginning(conn, key, lock=False)
        found = self._statements.read(conn, key, limit=None, after=None, epoch=0.0)
        if begin is None or found is None or begin.update_time != found.update_time:
            return None
        recorded = self._statements.recorded_changes(conn, key)
        history = list(map(_links, found.events))
        count = calls.cut_at_most(history, len(history) - keep)
        if count < 1:
            return None
        past = replay.Past(
            None if begin.initial_state is None else codec.load_state(begin.initial_state),
            [
                replay.step(event.timestamp, event.invocation_id, event.data, event.exact)
                for event in found.events
            ],
            [replay.made(*row) for row in recorded],
            codec.load_state(found.states.session),
        )
        ids = [event.id for event in found.events[:count]]
        places = _places(history, count)
        return _Plan(found.update_time, begin.initial_state, ids, past, places)

    def _cutting(
        self, key: Key, criteria: Criteria, revision: datetime, initial: str | None, step: _Cut
    ) -> Callable[[Connection], tuple[Removed, str | None] | None]:
        """Cuts a session that is still what it was; with what it begins with as it is stored."""

        def work(conn: Connection) -> tuple[Removed, str | None] | None:
            row = self._statements.beginning(conn, key, lock=True)
            if row is None or not criteria.cuts(row):
                return None
            if (row.update_time, row.initial_state) != (revision, initial):
                raise _Overtaken
            removed = self._statements.cut_beginning(conn, key, step.ids, step.until, step.begins)
            if (removed.events, removed.state_changes) != (len(step.ids), step.changes):
                raise _Overtaken  # the transaction ends with it
            return removed, self._statements.beginning(conn, key, lock=False).initial_state

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


def _places(history: Sequence[calls.Links], count: int) -> list[int]:
    """Where to stop on the way to a cut of so many events: nothing is separated there either."""
    inside = [0] * (len(history) + 1)
    for first, second in calls.spans(history):
        inside[first + 1] += 1
        inside[second + 1] -= 1
    whole = [n for n, spans in enumerate(accumulate(inside)) if not spans and 0 < n <= count]
    places = [0]
    for place, following in pairwise((*whole, math.inf)):
        if following - places[-1] > STEP:
            places.append(int(place))
    return places[1:]
