"""A copy of the database that may lag behind, for reads that do not mind."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection

from .base import Generic
from .faults import is_database_error, translate

if TYPE_CHECKING:
    from . import Database

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Seconds for which a replica that has failed is left alone: nobody is to wait for it in each call.
RESPITE = 10.0


class Replica:
    """Reads from the copy; from the original while the copy fails, at once.

    Args:
        database: the copy.
        statements: what it takes.
    """

    def __init__(self, database: Database, statements: Generic) -> None:
        self._database = database
        self._statements = statements
        self._until = -RESPITE
        self._warned = False

    async def read(
        self, work: Callable[[Generic, Connection], T], otherwise: Callable[[], Awaitable[T]]
    ) -> T:
        """The result of ``work``, or where that fails of ``otherwise()``."""
        if time.monotonic() < self._until:
            return await otherwise()
        try:
            found = await self._database.run(lambda conn: work(self._statements, conn), write=False)
        except Exception as error:
            if not is_database_error(error):
                raise
            self._until = time.monotonic() + RESPITE
            if not self._warned:
                self._warned = True
                logger.warning(
                    "The read replica failed, reads go to the primary: %s",
                    translate(error, unknown=False),
                )
        else:
            self._warned = False
            return found
        return await otherwise()

    async def close(self) -> None:
        """Lets go of the connections that are ours."""
        self._until = -RESPITE
        await self._database.close()
