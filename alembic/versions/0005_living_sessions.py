"""What sessions live with: title, labels, archive, expiry, and what their state has come from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql, postgresql

from adk_sessions.models import Names

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def names() -> Names:
    """Where the tables are; an application's own env.py may pass it to context.configure."""
    found: Names = op.get_context().opts.get("adk_sessions") or Names()
    return found


def flavour() -> str:
    dialect = op.get_context().dialect
    return "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name


def key(length: int) -> sa.types.TypeEngine[str]:
    # by bytes: case and trailing spaces tell keys apart
    collation = {"mysql": "utf8mb4_0900_bin", "mariadb": "utf8mb4_nopad_bin"}.get(flavour())
    if collation:
        return mysql.VARCHAR(length, charset="utf8mb4", collation=collation)
    return sa.String(length)


def json() -> sa.types.TypeEngine[object]:
    if flavour() == "postgresql":
        return postgresql.JSONB()
    return mysql.LONGTEXT(charset="utf8mb4") if flavour() in ("mysql", "mariadb") else sa.Text()


def timestamp() -> sa.types.TypeEngine[object]:
    return mysql.DATETIME(fsp=6) if flavour() in ("mysql", "mariadb") else sa.DateTime()


def columns() -> list[sa.Column[object]]:
    """Those of sessions."""
    return [
        sa.Column("title", key(256), nullable=True),
        sa.Column("labels", json(), nullable=True),
        sa.Column("archive_time", timestamp(), nullable=True),
        sa.Column("expire_time", timestamp(), nullable=True),
        sa.Column("initial_state", json(), nullable=True),
    ]


def upgrade() -> None:
    here, sessions = names(), names().of("sessions")
    there: set[str] = set()
    made = False
    if not context.is_offline_mode():
        # where DDL is not transactional, a try that was broken off leaves some of it
        inspector = sa.inspect(op.get_bind())
        there = {column["name"] for column in inspector.get_columns(sessions, here.schema)}
        made = inspector.has_table(here.of("state_changes"), schema=here.schema)
    for column in columns():
        if column.name not in there:
            op.add_column(sessions, column, schema=here.schema)
    if made:
        return
    referred = f"{here.schema}.{sessions}" if here.schema else sessions
    op.create_table(
        here.of("state_changes"),
        sa.Column("app_name", key(128), primary_key=True),
        sa.Column("user_id", key(128), primary_key=True),
        sa.Column("session_id", key(128), primary_key=True),
        sa.Column("revision", timestamp(), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("change_time", timestamp(), nullable=False),
        sa.Column("delta", json(), nullable=False),
        sa.Column("deleted", json(), nullable=True),
        sa.ForeignKeyConstraint(
            ["app_name", "user_id", "session_id"],
            [f"{referred}.{name}" for name in ("app_name", "user_id", "id")],
            ondelete="CASCADE",
        ),
        schema=here.schema,
    )


def downgrade() -> None:
    here = names()
    op.drop_table(here.of("state_changes"), schema=here.schema)
    for column in columns():
        op.drop_column(here.of("sessions"), column.name, schema=here.schema)
