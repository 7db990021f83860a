"""google-adk's schema, version 1: made where it is missing, adopted where it is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql, postgresql

revision = "0001"
down_revision = None
branch_labels = ("adk_sessions",)
depends_on = None

INDEX = "idx_events_app_user_session_ts_id"
VERSION = "schema_version"
TABLES = ("adk_internal_metadata", "sessions", "events", "app_states", "user_states")


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


def upgrade() -> None:
    present = existing()
    if "sessions" not in present:
        op.create_table(
            "sessions",
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("user_id", key(128), primary_key=True),
            sa.Column("id", key(128), primary_key=True),
            sa.Column("state", json(), nullable=False),
            sa.Column("create_time", timestamp(), nullable=False),
            sa.Column("update_time", timestamp(), nullable=False),
        )
    if "events" not in present:
        op.create_table(
            "events",
            sa.Column("id", key(128), primary_key=True),
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("user_id", key(128), primary_key=True),
            sa.Column("session_id", key(128), primary_key=True),
            sa.Column("invocation_id", key(256), nullable=False),
            sa.Column("timestamp", timestamp(), nullable=False),
            sa.Column("event_data", json(), nullable=True),
            sa.ForeignKeyConstraint(
                ["app_name", "user_id", "session_id"],
                ["sessions.app_name", "sessions.user_id", "sessions.id"],
                ondelete="CASCADE",
            ),
        )
    if INDEX not in present:
        op.create_index(
            INDEX,
            "events",
            ["app_name", "user_id", "session_id", sa.text("timestamp DESC"), sa.text("id DESC")],
        )
    if "app_states" not in present:
        op.create_table(
            "app_states",
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("state", json(), nullable=False),
            sa.Column("update_time", timestamp(), nullable=False),
        )
    if "user_states" not in present:
        op.create_table(
            "user_states",
            sa.Column("app_name", key(128), primary_key=True),
            sa.Column("user_id", key(128), primary_key=True),
            sa.Column("state", json(), nullable=False),
            sa.Column("update_time", timestamp(), nullable=False),
        )
    if "adk_internal_metadata" not in present:
        op.create_table(
            "adk_internal_metadata",
            sa.Column("key", key(128), primary_key=True),
            sa.Column("value", key(256), nullable=False),
        )
    if VERSION not in present:
        text = sa.String()
        metadata = sa.table(
            "adk_internal_metadata", sa.column("key", text), sa.column("value", text)
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
    found = {table for table in TABLES if inspector.has_table(table)}
    if "events" in found:
        found.update(str(index["name"]) for index in inspector.get_indexes("events"))
    if "adk_internal_metadata" in found:
        metadata = sa.table("adk_internal_metadata", sa.column("key", sa.String()))
        rows = bind.execute(sa.select(metadata.c.key)).scalars()
        found.update(rows)
    return found


def downgrade() -> None:
    """Nothing: what is left is google-adk's schema, perhaps made by google-adk, with its rows."""
