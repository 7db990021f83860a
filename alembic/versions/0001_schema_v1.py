"""google-adk's schema, version 1: made where it is missing, adopted where it is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql, postgresql

from adk_sessions import adoption
from adk_sessions.models import Names

revision = "0001"
down_revision = None
branch_labels = ("adk_sessions",)
depends_on = None

INDEX = "idx_events_app_user_session_ts_id"
VERSION = "schema_version"
TABLES = ("adk_internal_metadata", "sessions", "events", "app_states", "user_states")


def names() -> Names:
    """Where the tables are; an application's own env.py may pass it to context.configure."""
    found: Names = op.get_context().opts.get("adk_sessions") or Names()
    return found


def key(length: int) -> sa.types.TypeEngine[str]:
    # by bytes: case and trailing spaces tell keys apart
    collation = {"mysql": "utf8mb4_0900_bin", "mariadb": "utf8mb4_nopad_bin"}.get(flavour())
    if collation:
        return mysql.VARCHAR(length, charset="utf8mb4", collation=collation)
    return sa.String(length)


def flavour() -> str:
    dialect = op.get_context().dialect
    return "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name


def json() -> sa.types.TypeEngine[object]:
    if flavour() == "postgresql":
        return postgresql.JSONB()
    return mysql.LONGTEXT(charset="utf8mb4") if flavour() in ("mysql", "mariadb") else sa.Text()


def timestamp() -> sa.types.TypeEngine[object]:
    return mysql.DATETIME(fsp=6) if flavour() in ("mysql", "mariadb") else sa.DateTime()


def named(name: str) -> str:
    return names().of(name)


def qualified(table: str) -> str:
    return f"{names().schema}.{named(table)}" if names().schema else named(table)


def upgrade() -> None:
    if "adk_sessions" not in op.get_context().opts and not context.is_offline_mode():
        # an application's own env.py, which has not looked
        adoption.check_adoptable(op.get_bind(), names())
    present = existing()
    if "sessions" not in present:
        op.create_table(
            named("sessions"),
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("user_id", key(128), primary_key=True),
            sa.Column("id", key(128), primary_key=True),
            sa.Column("state", json(), nullable=False),
            sa.Column("create_time", timestamp(), nullable=False),
            sa.Column("update_time", timestamp(), nullable=False),
            schema=names().schema,
        )
    if "events" not in present:
        op.create_table(
            named("events"),
            sa.Column("id", key(128), primary_key=True),
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("user_id", key(128), primary_key=True),
            sa.Column("session_id", key(128), primary_key=True),
            sa.Column("invocation_id", key(256), nullable=False),
            sa.Column("timestamp", timestamp(), nullable=False),
            sa.Column("event_data", json(), nullable=True),
            sa.ForeignKeyConstraint(
                ["app_name", "user_id", "session_id"],
                [f"{qualified('sessions')}.{name}" for name in ("app_name", "user_id", "id")],
                ondelete="CASCADE",
            ),
            schema=names().schema,
        )
        # a table that is there already gets its index from revision 0004, without being locked
        op.create_index(
            named(INDEX),
            named("events"),
            ["app_name", "user_id", "session_id", sa.text("timestamp DESC"), sa.text("id DESC")],
            schema=names().schema,
        )
    if "app_states" not in present:
        op.create_table(
            named("app_states"),
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("state", json(), nullable=False),
            sa.Column("update_time", timestamp(), nullable=False),
            schema=names().schema,
        )
    if "user_states" not in present:
        op.create_table(
            named("user_states"),
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("user_id", key(128), primary_key=True),
            sa.Column("state", json(), nullable=False),
            sa.Column("update_time", timestamp(), nullable=False),
            schema=names().schema,
        )
    if "adk_internal_metadata" not in present:
        op.create_table(
            named("adk_internal_metadata"),
            sa.Column("key", key(128), primary_key=True),
            sa.Column("value", key(256), nullable=False),
            schema=names().schema,
        )
    if VERSION not in present:
        text = sa.String()
        metadata = sa.table(
            named("adk_internal_metadata"),
            sa.column("key", text),
            sa.column("value", text),
            schema=names().schema,
        )
        op.execute(metadata.insert().values(key="schema_version", value="1"))


def existing() -> set[str]:
    """What is there already: google-adk's tables, or what an earlier try got to.

    Where DDL is not transactional, a try that was broken off leaves tables without the rest.
    """
    if context.is_offline_mode():
        return set()
    bind = op.get_bind()
    inspector = sa.inspect(bind)
    found = {table for table in TABLES if inspector.has_table(named(table), schema=names().schema)}
    if "adk_internal_metadata" in found:
        metadata = sa.table(
            named("adk_internal_metadata"), sa.column("key", sa.String()), schema=names().schema
        )
        rows = bind.execute(sa.select(metadata.c.key)).scalars()
        found.update(rows)
    return found


def downgrade() -> None:
    """Nothing: what is left is google-adk's schema, perhaps made by google-adk, with its rows."""
