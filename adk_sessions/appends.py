"""How events get into a session: in the database, and in the session that the caller holds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Literal

from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from . import checks, clock, codec, errors, rewind
from .binding import E, S, encode_events
from .dialects.faults import translate
from .dialects.rows import Deltas, Key, NewEvent, Revisions, Snapshot
from .operations import Operations
from .retry import Attempt
from .turns import settled

OnStale = Literal["raise", "refresh"]

# Tries of an append that is refused though nobody has moved the session: each needs another
# writer whose transaction was rolled back at the wrong moment.
_TRIES = 8
# Seconds that an append goes on for when its caller is cancelled, so that what the caller holds is
# what is stored. A server that is silent for longer is left alone.
_PATIENCE = 2.0


class Appends(Operations[S, E]):
    """The part of a store that appends."""

    _on_stale: OnStale

    def _gone(self, session: S) -> errors.SessionNotFoundError:
        return self.not_found(
            f"Session {session.id!r} not found. Create it before appending to it."
        )

    def _check_types(self, session: object, method: str, *events: object) -> None:
        wrong = None if all(isinstance(event, BaseModel) for event in events) else "event"
        if wrong or not isinstance(session, BaseModel):
            raise errors.InvalidInputError(
                f"{method} takes a {self.session_type.__name__} and an {self.event_type.__name__}",
                field=wrong or "session",
            )

    async def _append(self, session: S, events: list[E], on_stale: OnStale | None) -> None:
        if on_stale not in ("raise", "refresh", None):
            raise errors.InvalidInputError(
                "on_stale must be 'raise' or 'refresh'", field="on_stale"
            )
        refresh = (on_stale or self._on_stale) == "refresh"
        # what a compaction stands for are the events that its writer has seen, and what a rewind
        # takes back
        rewinds = any(map(rewind.target, events))
        strict = rewinds or any(rewind.action(event, "compaction") for event in events)
        key = self._checked(session.app_name, session.user_id, session.id)
        for event in events:
            checks.check_event(event)
        await self.prepare_tables()
        async with self._turns.of(key):
            await settled(
                self._append_next(
                    key, session, events, refresh=refresh and not strict, rewinds=rewinds
                ),
                patience=_PATIENCE,
            )

    async def _append_next(
        self, key: Key, session: S, events: list[E], *, refresh: bool, rewinds: bool
    ) -> None:
        new, deltas = encode_events(events)
        ids = [event.id for event in events]
        marker = session._storage_update_marker
        expected = None if marker is None else clock.from_marker(marker)
        for _ in range(_TRIES):
            if marker is None and not refresh:
                expected = await self._matching_revision(key, session)
            since = expected or clock.to_datetime(session.last_update_time)
            moved: Revisions | None = None
            done: rewind.Done | None = None
            attempt = Attempt()
            taken: IntegrityError | None = None
            if refresh or expected is not None:
                try:
                    if rewinds:
                        done = await self._rewound(key, expected, events, attempt)
                        moved = done and done.revisions
                    else:
                        moved = await self._run(
                            self._appending(key, None if refresh else expected, new, deltas),
                            write=True,
                            attempt=attempt,
                        )
                except IntegrityError as error:
                    taken = error
            if moved is not None and (
                moved.before == since or (not marker and moved.before < since)
            ):
                if done is not None:
                    rewind.set_deltas(events, done.rewound)
                for event in events:
                    self._commit(session, event)
                if done is not None:
                    rewind.set_own(session, done.rewound.state)
                self._remember(session, moved.after)
                return
            if moved is not None and moved.before < since:
                # made again, by a clock that was behind: nothing of it is known
                since = clock.EPOCH
            certain = moved is None and taken is None and not attempt.lost
            found = await self._look(key, since, ids, certain=certain)
            if found is None:
                raise self._gone(session)
            stored = {row.id: codec.EventText(row.data or "{}", row.exact) for row in found.events}
            same = [event.id in stored for event in new]
            if any(same):
                if not all(same):
                    raise errors.EventConflictError(
                        "Some events of the batch are stored already: append only the others."
                    )
                if not all(codec.same_event(event.text, stored[event.id]) for event in new):
                    raise errors.EventConflictError
                self._catch_up(session, events, found, since)
                if rewinds:
                    self._show_rewound(key, session, events, found, since)
                return
            if taken is not None:
                raise translate(taken, unknown=False) from None
            if moved is not None:  # deleted meanwhile, with the session; this is another one
                raise self._gone(session)
            if found.archived:
                raise errors.SessionArchivedError
            if refresh:
                continue
            if expected is None or (marker is not None and found.update_time != expected):
                raise self.stale
            # else the statement waited for a writer that gave up, or one came between the look at
            # a session without marker and the append: the next try tells which
        raise self.stale

    def _appending(
        self, key: Key, expected: datetime | None, new: list[NewEvent], deltas: Deltas
    ) -> Callable[[Connection], Revisions | None]:
        return lambda conn: self._statements.append(conn, key, expected, new, deltas)

    async def _rewound(
        self, key: Key, expected: datetime | None, events: list[E], attempt: Attempt
    ) -> rewind.Done | None:
        """Appends events of which some rewind: what is stored depends on what is read there."""
        try:
            return await self._run_once(
                lambda conn: rewind.append(self._statements, conn, key, expected, events)
            )
        except errors.OutcomeUnknownError:
            attempt.lost = True
            return None

    def _show_rewound(
        self, key: Key, session: S, events: list[E], found: Snapshot, since: datetime
    ) -> None:
        """Brings a caller that repeats an append of rewinds to what is stored of it."""
        rows = {row.id: row for row in found.events}
        for event in filter(rewind.target, events):
            event.actions.state_delta = self._event(rows[event.id], key).actions.state_delta
        if found.update_time != since:
            rewind.set_own(session, codec.load_state(found.states.session))

    async def _look(
        self, key: Key, since: datetime, ids: list[str], *, certain: bool
    ) -> Snapshot | None:
        """What lies after a revision; with an error of its own where the append may be stored."""
        try:
            return await self._run(
                lambda conn: self._statements.catch_up(conn, key, since, ids), write=False
            )
        except errors.DatabaseError as error:
            if certain:
                raise
            raise errors.OutcomeUnknownError.after(error) from None

    async def _matching_revision(self, key: Key, session: S) -> datetime | None:
        """The stored revision, if a session without a marker can be said to be at it.

        A session made by hand or by an older release has no marker. It counts as current if it is
        not older than storage, or if its newest event is the newest one stored.
        """
        found = await self._run(lambda conn: self._statements.revision(conn, key), write=False)
        if found is None:
            raise self._gone(session)
        revision, newest_id = found
        newest_known = session.events[-1].id if session.events else None
        if clock.to_epoch(revision) <= session.last_update_time or newest_id == newest_known:
            return revision
        return None
