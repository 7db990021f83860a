"""What MySQL and MariaDB ask of a connection: what commits there, and how much they take at once.

The server answers an oversized packet by closing the connection, which cannot be told from a fault
that is worth a retry. So it is asked, once, and texts are measured as the driver will send them.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from ..errors import InvalidInputError
from .manner import Manner

# What a statement is long besides its payload: key columns, names, the packet's header.
STATEMENT = 16_384


class MySQLManner(Manner):
    """How operations get their transactions on MySQL and MariaDB, and how large they may be."""

    needs_version = True

    _largest_packet: int | None = None

    def commits_each_statement(self, conn: Connection) -> bool:
        # the driver knows, however it was switched on
        return bool(conn.connection.driver_connection.get_autocommit())  # type: ignore[union-attr]

    def room(self, conn: Connection) -> int:
        """Bytes of texts that one statement may carry."""
        if self._largest_packet is None:
            asked = conn.execute(text("SELECT @@max_allowed_packet")).scalar_one()
            self._largest_packet = int(asked)
        return self._largest_packet - STATEMENT

    def check_size(self, conn: Connection, field: str, *texts: str) -> None:
        """Refuses what is larger than the server's max_allowed_packet."""
        size = escaped_size(*texts)
        if size > self.room(conn):
            raise self.too_large(field, size)

    def too_large(self, field: str, size: int) -> InvalidInputError:
        """The error for a value of ``size`` bytes."""
        return InvalidInputError(
            f"{field} takes {size} bytes; the server's max_allowed_packet is"
            f" {self._largest_packet}",
            field=field,
        )


def escaped_size(*texts: str) -> int:
    """Bytes of texts as the driver sends them."""
    return sum(len(part.encode()) + sum(map(part.count, "\"'\\\n\r")) for part in texts)
