"""What may be repeated, and how often.

Every operation of the store but one may be: a read has no effect, an append and a create are told
from their repetition by their id, a delete twice is a delete. (A change of a state may be as long
as its COMMIT has not been sent.) So a call is repeated after a conflict
with another transaction, and after a lost connection, which is also how a dead pooled connection
is noticed: there is no ping before use.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy import Connection

from . import telemetry
from .dialects import Database
from .dialects.faults import Fault, Undecided, classify, is_database_error, translate
from .errors import ConfigurationError, SessionStoreError

T = TypeVar("T")

# A pooler refuses logins for 15 seconds after its server came back.
WINDOW = 30.0

_FIRST_DELAY = 0.02
_LONGEST_DELAY = 2.0


class Attempt:
    """What the tries of one call have met.

    Attributes:
        lost: whether a connection broke under one of them, so that it may have happened.
    """

    def __init__(self) -> None:
        self.lost = False


class Retry:
    """Repeats calls that met a passing fault, with exponential backoff and jitter.

    Until there was a connection, only conflicts are repeated: a server that was never reached is
    more likely misconfigured than restarting.

    Args:
        window: seconds in which a call may be repeated; 0 never repeats.
        reached: says whether there was a connection.

    Raises:
        ConfigurationError: that is no window; a service passes on its ``retry_window`` as it came.
    """

    def __init__(self, window: float = WINDOW, reached: Callable[[], bool] = lambda: False) -> None:
        if not isinstance(window, int | float) or not window >= 0:
            raise ConfigurationError("retry_window must be seconds, 0 or more")
        self.window = window
        self._reached = reached

    async def __call__(
        self,
        call: Callable[[], Awaitable[T]],
        *,
        write: bool,
        attempt: Attempt | None = None,
    ) -> T:
        """Awaits ``call()`` until it succeeds, fails for good or the window is over.

        Args:
            call: makes the awaitable, anew for each try.
            write: whether a lost connection leaves it open if something was written.
            attempt: takes note of that, for who has to know though a later try succeeds.

        Raises:
            DatabaseError: of the last try.
            IntegrityError: a unique key is taken; what that means only the caller knows.
        """
        deadline = time.monotonic() + self.window
        delay = 0.0
        attempt = attempt or Attempt()
        while True:
            try:
                result = await call()
            except SessionStoreError:
                raise
            except Undecided as undecided:
                fault, reached = Fault.FATAL, True
                failure = translate(undecided.error, unknown=True, once=True)
            except Exception as error:
                fault = classify(error)
                if fault is Fault.TAKEN or not is_database_error(error):
                    raise
                # an earlier try may have written though this one never got as far
                attempt.lost = attempt.lost or fault is Fault.LOST
                reached = self._reached()
                failure = translate(error, unknown=write and reached and attempt.lost)
            else:
                return result
            # raised here and not where it was caught, so the driver's error is not in its chain
            pause = delay * random.uniform(0.5, 1.5)
            if (
                fault is Fault.FATAL
                or not (reached or fault is Fault.CONFLICT)
                or time.monotonic() + pause >= deadline
            ):
                raise failure
            telemetry.retried()
            await asyncio.sleep(pause)
            delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)

    async def run(
        self,
        database: Database,
        work: Callable[[Connection], T],
        *,
        write: bool,
        attempt: Attempt | None = None,
    ) -> T:
        """One operation on a database, repeated as long as that is safe and of use."""
        return await self(lambda: database.run(work, write=write), write=write, attempt=attempt)

    async def run_once(self, database: Database, work: Callable[[Connection], T]) -> T:
        """One transaction that must not be committed twice.

        Raises:
            OutcomeUnknownError: the connection broke at the commit.
        """
        return await self(lambda: database.run(work, write=True, once=True), write=False)
