"""On MySQL and MariaDB: the columns of adopted tables become what new tables have.

google-adk makes them with the database's collation, in which ``bob`` is ``Bob``, and over
``mariadb://`` with TEXT and with DATETIME that has no microseconds. The rows are rewritten by the
server; tables that are right already are not touched.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import context, op

from adk_sessions.errors import SchemaError
from adk_sessions.models import Names

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


# Begins the comment of the events table while its foreign key is away: where DDL is not
# transactional, whoever goes on after a try that was broken off has to know of it.
MARK = "adk_sessions 0003 "

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


def names() -> Names:
    """Where the tables are; an application's own env.py may pass it to context.configure."""
    found: Names = op.get_context().opts.get("adk_sessions") or Names()
    return found


def upgrade() -> None:
    dialect = op.get_context().dialect
    if dialect.name not in ("mysql", "mariadb") or context.is_offline_mode():
        return
    collation = "utf8mb4_nopad_bin" if dialect.is_mariadb else "utf8mb4_0900_bin"
    alterations = [sql for table in TABLES if (sql := alteration(table, collation))]
    inspector = sa.inspect(op.get_bind())
    events, sessions, schema = names().of("events"), names().of("sessions"), names().schema
    comment = inspector.get_table_comment(events, schema)["text"] or ""
    if not alterations and not comment.startswith(MARK):
        return
    # A foreign key stands in the way of its columns' collation. Ours is put back; a table that was
    # made without one stays without.
    for table in set(inspector.get_table_names(schema)) - {events}:
        keys = inspector.get_foreign_keys(table, schema)
        if any(key["referred_table"] == sessions for key in keys):
            raise SchemaError(
                f"The table {table} has a foreign key to {sessions}, whose columns must change"
                " their collation. Drop it, upgrade, and add it again."
            )
    if not comment.startswith(MARK):
        ours = [
            (key["name"], *columns_of(key), key["options"].get("ondelete"))
            for key in inspector.get_foreign_keys(events, schema)
            if key["referred_table"] == sessions
        ]
        if ours:
            comment = MARK + json.dumps([ours, comment])
            # one statement, so that the note is there if and only if the key is not
            drops = [f"DROP FOREIGN KEY {quoted(name)}" for name, *_ in ours]
            execute(f"ALTER TABLE {place('events')} {', '.join(drops)}, COMMENT = :note", comment)
    for sql in alterations:
        op.execute(sql)
    if comment.startswith(MARK):
        put_back(comment)


def put_back(note: str) -> None:
    """The foreign keys that were dropped, and the comment that the table had."""
    ours, comment = json.loads(note.removeprefix(MARK))
    adds = []
    for name, columns, referred, ondelete in ours:
        # a session that was deleted meanwhile has left its events
        same = " AND ".join(
            f"s.{quoted(there)} = e.{quoted(here)}"
            for here, there in zip(columns, referred, strict=True)
        )
        op.execute(
            f"DELETE e FROM {place('events')} e LEFT JOIN {place('sessions')} s ON {same}"
            f" WHERE s.{quoted(referred[0])} IS NULL"
        )
        adds.append(
            f"ADD CONSTRAINT {quoted(name)} FOREIGN KEY ({', '.join(map(quoted, columns))})"
            f" REFERENCES {place('sessions')} ({', '.join(map(quoted, referred))})"
            + (f" ON DELETE {ondelete}" if ondelete else "")
        )
    execute(f"ALTER TABLE {place('events')} {', '.join(adds)}, COMMENT = :note", comment)


def columns_of(key: Any) -> tuple[list[str], list[str]]:
    return key["constrained_columns"], key["referred_columns"]


def execute(statement: str, note: str) -> None:
    op.get_bind().execute(sa.text(statement), {"note": note})


def quoted(name: str) -> str:
    return op.get_context().dialect.identifier_preparer.quote(name)


def place(table: str) -> str:
    preparer = op.get_context().dialect.identifier_preparer
    return preparer.format_table(sa.table(names().of(table), schema=names().schema))


def alteration(table: str, collation: str) -> str | None:
    """The statement that mends a table's columns, None if they are right."""
    columns = sa.text(
        "SELECT column_name, data_type, collation_name, datetime_precision"
        " FROM information_schema.columns"
        " WHERE table_schema = coalesce(:schema, database()) AND table_name = :name"
    )
    where = {"schema": names().schema, "name": names().of(table)}
    rows = op.get_bind().execute(columns, where)
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
            changes.append(f"MODIFY {quoted(name)} {definition} {null}")
    return f"ALTER TABLE {place(table)} {', '.join(changes)}" if changes else None


def downgrade() -> None:
    """Nothing: what was widened stays wide."""
