"""Following a session: new events as they are appended, whoever appends them."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import TypeVar

from pydantic import BaseModel

from . import checks, clock, errors, telemetry
from .binding import E, S
from .dialects.following import News
from .dialects.notices import SAFETY, Bell, Bells
from .dialects.rows import Key
from .operations import Operations

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Events that are read at once.
_BATCH = 100
# Seconds between two looks at a database that does not answer, if not more are asked for.
_RESPITE = 1.0


class Watching(Operations[S, E]):
    """The part of a store for that."""

    _bells: Bells

    def watch(
        self, session: S, *, after: str | None = None, poll_interval: float = 1.0
    ) -> AsyncGenerator[E, None]:
        """Follows a session: yields each event that is appended, by any process, in order.

        It begins with what has been appended since ``session`` was read: nothing is missed between
        the two. ``session`` itself is not changed, and events that are appended through it are
        yielded as well. Each look at the session is one short statement, and nothing is held
        between two of them, so leave the loop whenever you like (``contextlib.aclosing`` says when
        it is over).

        Over a restart of the database it waits for as long as that takes, with a warning in the
        log. It ends when the session is deleted, also if one is then made with its id, and when the
        service is closed. To go on in another process, remember the id of the last event that was
        dealt with, and pass it as ``after``.

        Nothing missed and nothing twice is promised for what this library appends. google-adk's own
        service may store an event in the past, where nobody looks any more.

        With ``notify=True`` events of services that have it too come at once; ``poll_interval`` is
        then at least 5 seconds while notices come, for what other software appends. Without it, and
        with a ``read_url``, it reads from the replica, which may lag behind.

        Args:
            session: the session as it was created, read or listed.
            after: id of an event; only what was appended after it. None for what was appended since
                ``session`` was read.
            poll_interval: seconds between two looks at the session, more than 0.

        Returns:
            An async iterator of events, as `get_session` would have them.

        Raises:
            InvalidInputError: an argument is not acceptable. This one is raised by the call, the
                others by the iterator.
            SessionNotFoundError: there is no such session, or another one by now.
            EventNotFoundError: the session has no event ``after``, or no longer has it.
            UnreadableEventError: an event cannot be read, and ``on_bad_event`` is ``raise``.
            DatabaseError: the database refused, or was not reached to begin with.
        """
        if not isinstance(session, BaseModel):
            raise errors.InvalidInputError(
                f"watch takes a {self.session_type.__name__}", field="session"
            )
        if not isinstance(after, str | None):
            raise errors.InvalidInputError("after must be the id of an event", field="after")
        number = isinstance(poll_interval, int | float) and not isinstance(poll_interval, bool)
        if not number or not 0 < poll_interval < math.inf:
            raise errors.InvalidInputError(
                "poll_interval must be seconds, more than 0", field="poll_interval"
            )
        marker = session._storage_update_marker
        since = clock.from_marker(marker) if marker is not None else None
        return self._watch(
            Key(session.app_name, session.user_id, session.id),
            since or clock.to_datetime(session.last_update_time),
            after,
            poll_interval,
            known=since is not None,
        )

    async def _watch(
        self, key: Key, since: datetime, after: str | None, interval: float, *, known: bool
    ) -> AsyncGenerator[E, None]:
        if not checks.are_keys(*key):
            raise self._missing(key.session_id)
        await self.prepare_tables()
        # the session that is meant was made before this
        known_at = since if known else None
        async with self._bells.bell(key) as bell:
            if after is not None:
                place = await self._lasting(partial(self._place_behind, key, after), bell, interval)
                if bell.ended:
                    return
                if place is None:
                    raise errors.EventNotFoundError(
                        f"Session {key.session_id!r} has no event {after!r}, or no longer has it."
                    )
                since = place  # older than the session, if that is a fork
            made: datetime | None = None
            while not bell.ended:
                look = partial(self._look_for_news, key, since, made, bell)
                found = await self._lasting(look, bell, interval)
                if made is None:
                    if bell.ended:
                        return
                    if found is None or (known_at and _is_another(found, known_at)):
                        raise self._missing(key.session_id)
                if found is None:
                    return
                made = found.create_time
                for row in found.events:
                    since = row.timestamp
                    yield self._event(row, key)
                if len(found.events) < _BATCH:
                    await bell.wait(max(interval, SAFETY) if bell.listening else interval)

    async def _lasting(
        self, ask: Callable[[], Awaitable[T]], bell: Bell, interval: float
    ) -> T | None:
        """Asks until the database answers, or the service is closed."""
        warned = False
        while not bell.ended:
            try:
                return await ask()
            except errors.DatabaseError as error:
                if not (error.retryable and self._database.reached):
                    raise
                if not warned:
                    logger.warning("A session that is watched cannot be read for now: %s", error)
                warned = True
            await bell.wait(max(interval, _RESPITE))
        return None

    async def _place_behind(self, key: Key, event_id: str) -> datetime | None:
        """The revision right after an event."""
        if not checks.are_keys(event_id):
            return None
        return await self._run(
            lambda conn: self._statements.event_time(conn, key, event_id), write=False
        )

    @telemetry.measured("watch")
    async def _look_for_news(
        self, key: Key, since: datetime, made: datetime | None, bell: Bell
    ) -> News | None:
        """What is new; None when the session that was made then is not there."""
        # who has just been told of an event would not find it where it comes later
        replica = made is not None and not bell.listening
        found = await self._news(key, since, replica=replica)
        if made is None or (found is not None and found.create_time == made):
            return found
        # a copy that lags behind may not have it yet, or still have the one before
        found = await self._news(key, since, replica=False) if replica else found
        return found if found is not None and found.create_time == made else None

    async def _news(self, key: Key, since: datetime, *, replica: bool) -> News | None:
        return await self._consult(
            lambda statements, conn: statements.news(conn, key, since, limit=_BATCH),
            replica=replica,
        )


def _is_another(found: News, since: datetime) -> bool:
    """Whether a session was made after the revision that its watcher knows.

    One whose revision is older than itself has been written by a clock that was behind.
    """
    return since < found.create_time <= found.update_time
