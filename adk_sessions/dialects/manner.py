"""What the way to a database must know of a dialect's statements: which transactions they need."""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy import Connection


class Manner:
    """How operations get their transactions."""

    #: one statement does an operation, so it needs no transaction around it
    autocommit: ClassVar[bool] = False
    #: BEGIN is a statement of ours: the driver would begin too late, or not at all
    says_begin: ClassVar[bool] = False
    #: they need a server of a certain age; what only speaks another one's language may say any
    needs_version: ClassVar[bool] = False

    def commits_each_statement(self, conn: Connection) -> bool:
        """Whether the application's engine is in autocommit, where a row lock would not last."""
        configured = conn.get_execution_options().get("isolation_level")
        at_connect = getattr(conn.dialect, "_on_connect_isolation_level", None)
        return (configured or at_connect) == "AUTOCOMMIT"
