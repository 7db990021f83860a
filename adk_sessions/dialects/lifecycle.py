"""What becomes of sessions in time: title and labels, archive and expiry, retention, erasure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, select, update

from .retention import Retention
from .rows import Key


class Details(NamedTuple):
    """What a session's row holds for people, its labels as JSON text."""

    create_time: datetime
    update_time: datetime
    title: str | None
    labels: str | None
    archive_time: datetime | None
    expire_time: datetime | None


class Lifecycle(Retention):
    """The statements."""

    def details(self, conn: Connection, key: Key) -> Details | None:
        """Holds a session's row until the transaction ends, and reads what is said of it."""
        s = self.tables.sessions.c
        columns = [
            self.as_text(s.labels).label("labels") if name == "labels" else s[name]
            for name in Details._fields
        ]
        rows = select(*columns).where(self._is_session).with_for_update()
        row = conn.execute(rows, key.parameters()).first()
        return None if row is None else Details._make(row)

    def set_details(self, conn: Connection, key: Key, values: Mapping[str, Any]) -> None:
        """Writes some of what `details` reads, and so never what makes an append stale.

        Args:
            conn: in a transaction that holds the row.
            key: the session.
            values: by column, any of the last four of `Details`.
        """
        columns = self.tables.sessions.c
        written = {
            name: self.as_json("v_labels")
            if name == "labels"
            else bindparam(f"v_{name}", type_=columns[name].type)
            for name in values
        }
        parameters = {f"v_{name}": value for name, value in values.items()}
        conn.execute(
            update(self.tables.sessions).where(self._is_session).values(written),
            {**key.parameters(), **parameters},
        )
