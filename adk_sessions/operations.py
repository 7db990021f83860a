"""What every operation of a store is made of: ids that are checked, and a run on the database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection

from . import checks, clock, errors
from .binding import Binding, E, S
from .dialects import Database, Generic, Replica
from .dialects.rows import Key, Snapshot
from .models import Models
from .retry import Attempt, Retry
from .turns import Turns

T = TypeVar("T")


class Operations(Binding[S, E]):
    """What the parts of a store share; `adk_sessions.Store` sets it.

    Attributes:
        models: the tables.
    """

    models: Models
    _database: Database
    _statements: Generic
    _replica: Replica | None
    _retry: Retry
    _turns: Turns
    # row level security: each call is for one user of one app
    _isolated: bool

    async def prepare_tables(self) -> None:
        """Sees to the tables."""
        raise NotImplementedError

    def _checked(self, app_name: str, user_id: str, session_id: str) -> Key:
        checks.check_key(app_name, "app_name")
        checks.check_key(user_id, "user_id")
        checks.check_key(session_id, "session_id")
        return Key(app_name, user_id, session_id)

    def _missing(self, session_id: str) -> errors.SessionNotFoundError:
        return self.not_found(f"Session {session_id!r} not found.")

    async def _run(
        self, work: Callable[[Connection], T], *, write: bool, attempt: Attempt | None = None
    ) -> T:
        """One operation, repeated as long as that is safe and of use."""
        return await self._retry.run(self._database, work, write=write, attempt=attempt)

    async def _run_once(self, work: Callable[[Connection], T]) -> T:
        """One transaction that must not be committed twice.

        Raises:
            OutcomeUnknownError: the connection broke at the commit.
        """
        return await self._retry.run_once(self._database, work)

    async def _consult(self, work: Callable[[Generic, Connection], T], *, replica: bool) -> T:
        """One operation that reads, from the replica if it may and there is one."""
        if replica and self._replica is not None:
            return await self._replica.read(work, lambda: self._consult(work, replica=False))
        return await self._run(lambda conn: work(self._statements, conn), write=False)

    async def _read(
        self, key: Key, *, limit: int | None, after: float | None = None, replica: bool = False
    ) -> Snapshot | None:
        limit = None if limit is None else min(limit, 2**31 - 1)
        moment: datetime | None = None
        if after is not None:
            moment = clock.just_before(clock.to_datetime(after))
        return await self._consult(
            lambda statements, conn: statements.read(
                conn, key, limit=limit, after=moment, epoch=after or 0.0
            ),
            replica=replica,
        )
