"""Where alembic meets a database: one `run` for a connection, for SQL text and for the shell."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import sqlalchemy as sa
from alembic import context

from adk_sessions import migrate
from adk_sessions.models import models

MODELS = models()
TABLES = {table.name for table in MODELS.metadata.tables.values()}


def own_tables_only(name: str | None, kind: str, parents: Any) -> bool:
    """A shared database holds the application's tables too; they are not looked at."""
    return kind != "table" or name in TABLES


def run(**where: Any) -> None:
    """Runs what alembic was asked for, on a connection or as SQL text."""
    context.configure(
        target_metadata=MODELS.metadata,
        version_table=migrate.VERSION_TABLE,
        transaction_per_migration=True,
        include_name=own_tables_only,
        **where,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_on(connection: sa.Connection) -> None:
    """Runs on a connection, whichever way it was opened."""
    ours = connection.in_transaction()
    if not sa.inspect(connection).has_table(migrate.VERSION_TABLE):
        migrate.check_adoptable(connection)
        if connection.dialect.name in ("mysql", "mariadb"):
            # alembic names its table's primary key; the server ignores that and logs a warning
            number = sa.Column("version_num", sa.String(32), primary_key=True)
            sa.Table(migrate.VERSION_TABLE, sa.MetaData(), number).create(connection)
    if not ours:
        connection.commit()  # or alembic would think that somebody else is to commit its work
    run(connection=connection)


def url() -> str:
    """The database's URL as the shell gave it."""
    given = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get(
        "ADK_SESSIONS_URL"
    )
    if not given:
        raise SystemExit("Say which database: alembic -x url=… or ADK_SESSIONS_URL")
    return given


if context.is_offline_mode():
    run(url=migrate.sync_url(url()), literal_binds=True, dialect_opts={"paramstyle": "named"})
elif (connection := context.config.attributes.get("connection")) is not None:
    run_on(connection)
else:
    asyncio.run(migrate.with_connection(url(), run_on))
