"""events.event_exact: the exact JSON of an event that event_data cannot hold exactly."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql

from adk_sessions.models import Names

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def names() -> Names:
    """Where the tables are; an application's own env.py may pass it to context.configure."""
    found: Names = op.get_context().opts.get("adk_sessions") or Names()
    return found


def upgrade() -> None:
    if not context.is_offline_mode():
        columns = sa.inspect(op.get_bind()).get_columns(names().of("events"), names().schema)
        if any(column["name"] == "event_exact" for column in columns):
            return
    text: sa.types.TypeEngine[str] = sa.Text()
    if op.get_context().dialect.name in ("mysql", "mariadb"):
        text = mysql.LONGTEXT(charset="utf8mb4")
    op.add_column(
        names().of("events"), sa.Column("event_exact", text, nullable=True), schema=names().schema
    )


def downgrade() -> None:
    op.drop_column(names().of("events"), "event_exact", schema=names().schema)
