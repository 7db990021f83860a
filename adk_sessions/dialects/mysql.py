"""MySQL and MariaDB: FOR UPDATE, merge in Python, write, in one transaction.

Locking reads come before plain ones: the snapshot of REPEATABLE READ is taken by the first plain
read, and must not be older than the row that was waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Table, func, select, text
from sqlalchemy.dialects.mysql import insert as upsert

from ..errors import InvalidInputError
from .base import Generic
from .reads import Tables
from .rows import Key

# What a statement is long besides its payload: key columns, names, the packet's header.
_STATEMENT = 16_384


class MySQL(Generic):
    """Statements for MySQL 8 and later, and for MariaDB 10.11 and later."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self._largest_packet: int | None = None

    def lock_session(self, conn: Connection, key: Key, *, with_state: bool) -> Any:
        return conn.execute(
            self.session_row(with_state).with_for_update(), key.parameters()
        ).first()

    def scope_row(self, conn: Connection, table: Table, key: Key, *, lock: bool) -> Any:
        statement = select(self.as_text(table.c.state)).where(self.is_scope(table))
        if lock:
            statement = statement.with_for_update()
        return conn.execute(statement, key.parameters()).scalar()

    def insert_if_missing(self, conn: Connection, table: Table, parameters: dict[str, Any]) -> None:
        statement = self.insert_scope(upsert(table), table)
        conn.execute(statement.on_duplicate_key_update(app_name=table.c.app_name), parameters)

    def check_size(self, conn: Connection, field: str, *texts: str) -> None:
        """Refuses what is larger than the server's max_allowed_packet.

        The server answers an oversized packet by closing the connection, which cannot be told from
        a fault that is worth a retry. So it is asked, once, and the text measured as the driver
        will escape it.
        """
        if self._largest_packet is None:
            self._largest_packet = int(
                conn.execute(text("SELECT @@max_allowed_packet")).scalar_one()
            )
        size = sum(len(part.encode()) + sum(map(part.count, "\"'\\\n\r")) for part in texts)
        if size + _STATEMENT > self._largest_packet:
            raise InvalidInputError(
                f"{field} takes {size} bytes; the server's max_allowed_packet is"
                f" {self._largest_packet}",
                field=field,
            )

    def commits_each_statement(self, conn: Connection) -> bool:
        # the driver knows, however it was switched on
        return bool(conn.connection.driver_connection.get_autocommit())  # type: ignore[union-attr]

    @contextmanager
    def migrating(self, conn: Connection) -> Iterator[bool]:
        # such locks are the server's: the name says which database
        name = func.concat("adk_sessions.", func.sha1(func.database()))
        held = conn.execute(select(func.get_lock(name, 0))).scalar() == 1
        conn.commit()
        try:
            yield held
        finally:
            if held and not conn.invalidated:
                conn.rollback()
                conn.execute(select(func.release_lock(name)))
                conn.commit()
