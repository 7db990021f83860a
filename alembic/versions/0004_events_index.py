"""The index of google-adk's newer releases, on events that were adopted without it.

On PostgreSQL it is built CONCURRENTLY, outside a transaction, so that nobody who writes has to
wait; a build that was broken off leaves an invalid index, which is dropped first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from adk_sessions.models import Names

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

INDEX = "idx_events_app_user_session_ts_id"


def names() -> Names:
    """Where the tables are; an application's own env.py may pass it to context.configure."""
    found: Names = op.get_context().opts.get("adk_sessions") or Names()
    return found


def upgrade() -> None:
    postgresql = op.get_context().dialect.name == "postgresql"
    if context.is_offline_mode():
        if not postgresql or starts_empty():
            return  # revision 0001 has made it with the table
    elif not is_missing(postgresql):
        return
    if not postgresql:
        create()
        return
    with op.get_context().autocommit_block():
        waits = None if context.is_offline_mode() else setting("lock_timeout")
        # the build waits for transactions that are older than it, however long they take
        op.execute("SET lock_timeout = 0")
        op.drop_index(
            names().of(INDEX),
            names().of("events"),
            schema=names().schema,
            postgresql_concurrently=True,
            if_exists=True,
        )
        create(postgresql_concurrently=True)
        op.execute("RESET lock_timeout" if waits is None else f"SET lock_timeout = '{waits}'")


def starts_empty() -> bool:
    return context.get_starting_revision_argument() in (None, (), "base")


def is_missing(postgresql: bool) -> bool:
    """Whether there is no such index, or one that PostgreSQL does not use."""
    bind = op.get_bind()
    indexes = sa.inspect(bind).get_indexes(names().of("events"), names().schema)
    if names().of(INDEX) not in {index["name"] for index in indexes}:
        return True
    if not postgresql:
        return False
    valid = sa.text(
        "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relname = :name AND n.nspname = coalesce(:schema, current_schema())"
    )
    return (
        bind.execute(valid, {"name": names().of(INDEX), "schema": names().schema}).scalar() is False
    )


def create(**options: object) -> None:
    op.create_index(
        names().of(INDEX),
        names().of("events"),
        ["app_name", "user_id", "session_id", sa.text("timestamp DESC"), sa.text("id DESC")],
        schema=names().schema,
        **options,
    )


def setting(name: str) -> str:
    return str(op.get_bind().execute(sa.text(f"SHOW {name}")).scalar())


def downgrade() -> None:
    """Nothing: google-adk's newer releases make this index themselves."""
