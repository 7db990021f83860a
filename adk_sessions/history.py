"""A session as it was at an earlier event: read, forked."""

from __future__ import annotations

from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError

from . import checks, clock, errors
from .binding import E, S
from .dialects.rows import Key, Snapshot
from .operations import Operations

# Tries of a fork whose COMMIT had no answer, and that is not there.
_TRIES = 4


class History(Operations[S, E]):
    """The part of a store for that."""

    async def fork_session(
        self, session: S, *, at: str | None = None, session_id: str | None = None
    ) -> S:
        """Copies a session's history up to an event into a new session, and goes on from there.

        The copy has the events as they are, ids and times included, the state exactly as it was
        right after the last of them, the title and the labels. Both go on independently. State of
        wider scopes is no part of it: ``app:`` and ``user:`` keys are as they are now. A fork of an
        archived session is not archived, and none expires.

        Args:
            session: of which; only its ids matter, it need not be up to date.
            at: id of the last event to copy; None for all of them, and the state as it is now,
                with what `update_state` has changed since the last.
                Exact as `get_session` with the same.
            session_id: the copy's, taken as it is; one is made if None.

        Returns:
            The copy, as a following `get_session` would return it.

        Raises:
            SessionNotFoundError: there is no such session.
            EventNotFoundError: the session has no event ``at``.
            StateUnknownError: what the state was at that event is not recorded.
            AlreadyExistsError: the user has a session with the copy's id.
            UnreadableEventError: an event cannot be read; the copy is made.
            OutcomeUnknownError: it may be stored; repeat it with the same ``session_id``.
            InvalidInputError: an argument cannot be; nothing was written.
        """
        if not isinstance(session, BaseModel):
            raise errors.InvalidInputError(
                f"fork_session takes a {self.session_type.__name__}", field="session"
            )
        key = self._checked(session.app_name, session.user_id, session.id)
        session_id = self._new_id() if session_id is None else session_id
        checks.check_key(session_id, "session_id")
        self._check_at(at)
        copy = key._replace(session_id=session_id)
        await self.prepare_tables()
        found = await self._forked(key, copy, at)
        return self._session(copy, found.states, found.update_time, self._events(found, None, copy))

    async def _forked(self, key: Key, copy: Key, at: str | None) -> Snapshot:
        now = clock.to_datetime(self._now())
        unanswered: errors.OutcomeUnknownError | None = None
        for _ in range(_TRIES):
            found: Snapshot | None = None
            try:
                found = await self._run_once(
                    lambda conn: self._statements.fork(conn, key, copy.session_id, at, now)
                )
                if found is None:
                    raise self._missing(key.session_id)
                return found
            except IntegrityError:
                taken = True
            except errors.OutcomeUnknownError as error:
                unanswered, taken = error, False
            if unanswered is not None:
                try:
                    found = await self._read(copy, limit=None)
                except errors.DatabaseError:
                    raise unanswered from None
                if found is not None and found.create_time == now:  # it is the first try's
                    return found
            if taken or found is not None:
                raise self.already_exists(
                    f"Session with id {copy.session_id!r} already exists. Choose another id."
                )
        assert unanswered is not None
        raise unanswered

    async def _read_at(
        self,
        key: Key,
        *,
        at: str | None,
        limit: int | None,
        after: float | None,
        replica: bool = False,
    ) -> Snapshot | None:
        """A session as it was right after an event, or as it is now."""
        if at is None:
            return await self._read(key, limit=limit, after=after, replica=replica)
        event_id = at
        limit = None if limit is None else min(limit, 2**31 - 1)
        moment = None if after is None else clock.just_before(clock.to_datetime(after))
        return await self._consult(
            lambda statements, conn: statements.read_at(
                conn, key, event_id, limit=limit, after=moment, epoch=after or 0.0
            ),
            replica=replica,
        )

    def _check_at(self, at: object) -> None:
        if not isinstance(at, str | None):
            raise errors.InvalidInputError("at is the id of an event", field="at")
        if at is not None and not checks.are_keys(at):
            raise errors.EventNotFoundError
