"""The indexes in whose order sessions are shown page by page.

On PostgreSQL they are built CONCURRENTLY, outside a transaction, so that nobody who writes has to
wait; a build that was broken off leaves an invalid index, which is dropped first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from adk_sessions.models import Names

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INDEXES = {
    "idx_sessions_app_create_user_id": ["app_name", "create_time", "user_id", "id"],
    "idx_sessions_app_user_create_id": ["app_name", "user_id", "create_time", "id"],
}


def names() -> Names:
    """Where the tables are; an application's own env.py may pass it to context.configure."""
    found: Names = op.get_context().opts.get("adk_sessions") or Names()
    return found


def upgrade() -> None:
    postgresql = op.get_context().dialect.name == "postgresql"
    missing = [name for name in INDEXES if context.is_offline_mode() or is_missing(name)]
    if not missing:
        return
    if not postgresql or (context.is_offline_mode() and starts_empty()):
        for name in missing:
            create(name)
        return
    with op.get_context().autocommit_block():
        waits = None if context.is_offline_mode() else setting("lock_timeout")
        # the build waits for transactions that are older than it, however long they take
        op.execute("SET lock_timeout = 0")
        for name in missing:
            drop(name, postgresql_concurrently=True, if_exists=True)
            create(name, postgresql_concurrently=True)
        op.execute("RESET lock_timeout" if waits is None else f"SET lock_timeout = '{waits}'")


def starts_empty() -> bool:
    return context.get_starting_revision_argument() in (None, (), "base")


def is_missing(name: str) -> bool:
    """Whether there is no such index, or one that PostgreSQL does not use."""
    bind = op.get_bind()
    indexes = sa.inspect(bind).get_indexes(names().of("sessions"), names().schema)
    if names().of(name) not in {index["name"] for index in indexes}:
        return True
    if bind.dialect.name != "postgresql":
        return False
    valid = sa.text(
        "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relname = :name AND n.nspname = coalesce(:schema, current_schema())"
    )
    return (
        bind.execute(valid, {"name": names().of(name), "schema": names().schema}).scalar() is False
    )


def create(name: str, **options: object) -> None:
    op.create_index(
        names().of(name), names().of("sessions"), INDEXES[name], schema=names().schema, **options
    )


def drop(name: str, **options: object) -> None:
    op.drop_index(names().of(name), names().of("sessions"), schema=names().schema, **options)


def setting(name: str) -> str:
    return str(op.get_bind().execute(sa.text(f"SHOW {name}")).scalar())


def downgrade() -> None:
    for name in INDEXES:
        drop(name)
