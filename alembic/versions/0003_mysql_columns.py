"""On MySQL and MariaDB: the columns of adopted tables become what new tables have.

google-adk makes them with the database's collation, in which ``bob`` is ``Bob``, and over
``mariadb://`` with TEXT and with DATETIME that has no microseconds. The rows are rewritten by the
server; tables that are right already are not touched.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from adk_sessions.errors import SchemaError

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# (kind, length, nullable) of each column
KEY, LONG, JSON, NULLABLE_JSON, TIME = (
    ("key", 128, False),
    ("key", 256, False),
    ("json", 0, False),
    ("json", 0, True),
    ("time", 0, False),
)
TABLES = {
    "sessions": {
        "app_name": KEY,
        "user_id": KEY,
        "id": KEY,
        "state": JSON,
        "create_time": TIME,
        "update_time": TIME,
    },
    "events": {
        "id": KEY,
        "app_name": KEY,
        "user_id": KEY,
        "session_id": KEY,
        "invocation_id": LONG,
        "timestamp": TIME,
        "event_data": NULLABLE_JSON,
        "event_exact": NULLABLE_JSON,
    },
    "app_states": {"app_name": KEY, "state": JSON, "update_time": TIME},
    "user_states": {"app_name": KEY, "user_id": KEY, "state": JSON, "update_time": TIME},
    "adk_internal_metadata": {"key": KEY, "value": LONG},
}


def upgrade() -> None:
    dialect = op.get_context().dialect
    if dialect.name not in ("mysql", "mariadb") or context.is_offline_mode():
        return
    collation = "utf8mb4_nopad_bin" if dialect.is_mariadb else "utf8mb4_0900_bin"
    alterations = [sql for table in TABLES if (sql := alteration(table, collation))]
    if not alterations:
        return
    # A foreign key stands in the way of its columns' collation. Ours is put back; a table that was
    # made without one stays without.
    inspector = sa.inspect(op.get_bind())
    for table in set(inspector.get_table_names()) - {"events"}:
        if any(key["referred_table"] == "sessions" for key in inspector.get_foreign_keys(table)):
            raise SchemaError(
                f"The table {table} has a foreign key to sessions, whose columns must change their"
                " collation. Drop it, upgrade, and add it again."
            )
    ours = [
        key for key in inspector.get_foreign_keys("events") if key["referred_table"] == "sessions"
    ]
    for key in ours:
        op.drop_constraint(key["name"], "events", type_="foreignkey")
    for sql in alterations:
        op.execute(sql)
    for key in ours:
        op.create_foreign_key(
            key["name"],
            "events",
            "sessions",
            key["constrained_columns"],
            key["referred_columns"],
            ondelete=key["options"].get("ondelete"),
        )


def alteration(table: str, collation: str) -> str | None:
    """The statement that mends a table's columns, None if they are right."""
    quote = op.get_context().dialect.identifier_preparer.quote
    columns = sa.text(
        "SELECT column_name, data_type, collation_name, datetime_precision"
        " FROM information_schema.columns"
        " WHERE table_schema = database() AND table_name = :name"
    )
    rows = op.get_bind().execute(columns, {"name": table})
    wanted = TABLES[table]
    changes = []
    for name, data_type, found, precision in rows:
        if name not in wanted:
            continue  # the application's own
        kind, length, nullable = wanted[name]
        if kind == "key":
            right = found == collation
            definition = f"VARCHAR({length}) CHARACTER SET utf8mb4 COLLATE {collation}"
        elif kind == "json":
            right = data_type == "longtext" and found.startswith("utf8mb4")
            definition = "LONGTEXT CHARACTER SET utf8mb4"
        else:
            right = precision == 6
            definition = "DATETIME(6)"
        if not right:
            null = "NULL" if nullable else "NOT NULL"
            changes.append(f"MODIFY {quote(name)} {definition} {null}")
    return f"ALTER TABLE {quote(table)} {', '.join(changes)}" if changes else None


def downgrade() -> None:
    """Nothing: what was widened stays wide."""
