"""Row level security of PostgreSQL: the policies, and statements that say whose rows they want.

The policies show the rows of the app and the user that two settings name. `SET LOCAL` gives the
settings to one transaction, so the next borrower of a connection finds nothing set, whichever pool
or pooler lends it; a setting that is missing or empty shows nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any, ClassVar, TypeVar

from sqlalchemy import Connection, String, bindparam, func, select, text, true
from sqlalchemy.dialects.postgresql import dialect
from sqlalchemy.ext.asyncio import AsyncEngine

from ..changes import Changes
from ..errors import InvalidInputError, SchemaError
from .jsonb import JsonbColumns, bound
from .postgresql import PostgreSQL
from .reads import Tables
from .rows import Key, States

T = TypeVar("T")

#: every operation that touches a session's, an event's or a state's row
OPERATIONS = (
    *("create", "append", "delete", "read", "catch_up", "revision"),
    *("listing", "app_state", "user_state"),
    *("session_count", "session_keys", "app_scope", "user_scopes"),
    *("session_head", "session_events", "session_changes"),
    *("news", "event_time"),
    *("read_at", "past", "fork"),
    *("sessions_page", "summary", "events_page", "events_until", "has_event", "users", "apps"),
    *("details", "set_details"),
    *("prunable", "remove_sessions", "count_sessions"),
    *("beginning", "recorded_changes", "cut_beginning"),
    *("count_of_user", "remove_rest_of_user"),
)

_POLICY = "adk_sessions"
_SETTINGS = {"app_name": "adk_sessions.app_name", "user_id": "adk_sessions.user_id"}
_SET_LOCAL = select(
    *(
        func.set_config(setting, bindparam(column, type_=String()), true())
        for column, setting in _SETTINGS.items()
    )
)


_POLICIES = text(
    "SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity,"
    " (SELECT count(*) FROM pg_policy p WHERE p.polrelid = c.oid)"
    " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = coalesce(:schema, current_schema()) AND c.relname = ANY (:names)"
)
_EXEMPT = text("SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user")


def policies(tables: Tables) -> str:
    """SQL that lets a role see and write only the rows of the app and the user that it has named.

    It is one transaction and may be run again. The tables' owner is bound too, a superuser and a
    role with BYPASSRLS are not.
    """
    quoted = dialect().identifier_preparer.format_table  # type: ignore[no-untyped-call]
    statements = ["BEGIN"]
    for table in bound(tables):
        name = quoted(table)
        rows = " AND ".join(
            f"{column} = nullif(current_setting('{setting}', true), '')"
            for column, setting in _SETTINGS.items()
            if column in table.columns
        )
        statements += [
            f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            f"DROP POLICY IF EXISTS {_POLICY} ON {name}",
            f"CREATE POLICY {_POLICY} ON {name} FOR ALL"
            f"\n    USING ({rows})\n    WITH CHECK ({rows})",
        ]
    return "".join(f"{statement};\n" for statement in (*statements, "COMMIT"))


def in_transactions(engine: AsyncEngine) -> AsyncEngine:
    """The engine, or where it is in autocommit a view of it that is not: on the same pool, with
    transactions for `SET LOCAL` to last in. The application's own stays as it is."""
    configured = engine.sync_engine.get_execution_options().get("isolation_level")
    at_connect = getattr(engine.dialect, "_on_connect_isolation_level", None)
    if (configured or at_connect) != "AUTOCOMMIT":
        return engine
    return engine.execution_options(isolation_level="READ COMMITTED")


def _contained(operation: Callable[..., T]) -> Callable[..., T]:
    """An operation that first tells the policies whose rows it is about."""
    signature = inspect.signature(operation)

    @wraps(operation)
    def contained(self: Contained, conn: Connection, *args: Any, **options: Any) -> T:
        bound = signature.bind(self, conn, *args, **options)
        bound.apply_defaults()
        given = bound.arguments
        if "key" in given:
            self.enter(conn, app_name=given["key"].app_name, user_id=given["key"].user_id)
        else:
            self.enter(conn, **{field: given[field] for field in _SETTINGS if field in given})
        return operation(self, conn, *args, **options)

    return contained


class Contained(JsonbColumns):
    """Statements whose every operation sees one user's rows, at the price of more round trips."""

    #: the settings last for a transaction
    autocommit: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in OPERATIONS:
            setattr(cls, name, _contained(getattr(cls, name)))

    def enter(self, conn: Connection, **ids: str | None) -> None:
        """Shows the rest of the transaction one user's rows, or with no user an app's state alone.

        Args:
            conn: in a transaction, or about to begin one.
            ids: ``app_name``, and ``user_id`` unless nothing of a user's is wanted.

        Raises:
            InvalidInputError: an id is None or empty; nothing was sent.
        """
        for field, value in ids.items():
            if not value:
                raise InvalidInputError(
                    f"{field} must be given and not be empty: with row level security each call is"
                    " for one user of one app",
                    field=field,
                )
        conn.execute(_SET_LOCAL, {"user_id": "", **ids})

    def update_state(
        self, conn: Connection, key: Key, changes: Changes, now: datetime
    ) -> States | None:
        """Changes states; those of an app need no user to be named."""
        ids = {"app_name": key.app_name}
        if changes.user is not None or changes.session is not None:
            ids["user_id"] = key.user_id
        self.enter(conn, **ids)
        return super().update_state(conn, key, changes, now)

    def require_sight(self, conn: Connection) -> None:
        """Nothing: each operation names whose rows it is about, and is refused without."""

    def require_policies(self, conn: Connection) -> None:
        """Sees that the policies are there and bind this role.

        Raises:
            SchemaError: rows of other users could be reached, and why.
        """
        names = {table.name: table.schema for table in bound(self.tables)}
        schema = next(iter(names.values()))
        found = {
            name: (enabled and forced, policies)
            for name, enabled, forced, policies in conn.execute(
                _POLICIES, {"schema": schema, "names": list(names)}
            )
        }
        lines = [
            f"{name} has no forced row level security or no policy"
            for name in names
            if not all(found.get(name, (False, 0)))
        ]
        if conn.execute(_EXEMPT).scalar():
            lines.append("this role is a superuser or has BYPASSRLS: log in as another one")
        if lines:
            raise SchemaError(
                "row_level_security=True would keep nobody apart: run what adk-sessions sql --rls"
                f" prints. {'; '.join(lines)}."
            )


class ContainedPostgreSQL(Contained, PostgreSQL):
    """The short statements, each in a transaction."""


class ContainedColumns(Contained):
    """The generic path."""
