"""Where alembic meets a database: one `run` for a connection, for SQL text and for the shell."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import sqlalchemy as sa
from alembic import context

from adk_sessions import adoption, migrate
from adk_sessions.errors import SessionStoreError
from adk_sessions.models import VERSION_TABLE, Names, models_of, names

ARGUMENTS = context.get_x_argument(as_dictionary=True)
ATTRIBUTES = context.config.attributes
NAMES: Names = ATTRIBUTES.get("names") or names(
    ARGUMENTS.get("schema"), ARGUMENTS.get("table_prefix", "")
)
MODELS = models_of(NAMES)
TABLES = {table.name for table in MODELS.metadata.tables.values()}


def own_tables_only(name: str | None, kind: str, parents: Any) -> bool:
    """A shared database holds the application's tables too; they are not looked at."""
    if kind == "schema":
        return name == NAMES.schema
    return kind != "table" or (name in TABLES and parents["schema_name"] == NAMES.schema)


def can_be_compared(
    _item: Any, _name: str | None, kind: str, _reflected: bool, compare_to: Any
) -> bool:
    """Only on PostgreSQL can alembic compare an index in which a column descends.

    The service's `validate_schema` compares them everywhere.
    """
    dialect = context.get_context().dialect.name
    if dialect == "sqlite" and kind == "index":
        return False  # it is skipped on one side
    return kind != "index" or compare_to is None or dialect == "postgresql"


def other_type(ctx: Any, _column: Any, _other: Any, _type: Any, wanted: Any) -> bool | None:
    """MySQL and MariaDB are not asked for collations by what alembic compares with.

    The service's `validate_schema` compares them.
    """
    return False if ctx.dialect.name in ("mysql", "mariadb") else None


def run(**where: Any) -> None:
    """Runs what alembic was asked for, on a connection or as SQL text."""
    context.configure(
        target_metadata=MODELS.metadata,
        version_table=NAMES.of(VERSION_TABLE),
        version_table_schema=NAMES.schema,
        transaction_per_migration=True,
        include_schemas=NAMES.schema is not None,
        include_name=own_tables_only,
        include_object=can_be_compared,
        compare_type=other_type,
        adk_sessions=NAMES,
        dont_mutate=not changes(),  # or `alembic check` would make its table
        **where,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_on(connection: sa.Connection) -> None:
    """Runs on a connection, whichever way it was opened."""
    ours = connection.in_transaction()
    found = sa.inspect(connection)
    if changes() and not found.has_table(NAMES.of(VERSION_TABLE), schema=NAMES.schema):
        adoption.check_adoptable(connection, NAMES)
        if NAMES.schema is not None and NAMES.schema not in found.get_schema_names():
            connection.execute(sa.schema.CreateSchema(NAMES.schema))
        if connection.dialect.name in ("mysql", "mariadb"):
            # alembic names its table's primary key; the server ignores that and logs a warning
            number = sa.Column("version_num", sa.String(32), primary_key=True)
            metadata = sa.MetaData(schema=NAMES.schema)
            sa.Table(NAMES.of(VERSION_TABLE), metadata, number).create(connection)
    if not ours:
        connection.commit()  # or alembic would think that somebody else is to commit its work
    run(connection=connection)


def changes() -> bool:
    """Whether the command goes to a revision; `current` and `check` make nothing."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    except Exception:
        return True  # there is one, if only a relative one
    return True


def run_as_text() -> None:
    """Prints the statements instead of running them."""
    dialect = ATTRIBUTES.get("dialect") or migrate.sync_url(url())
    context.configure(url=dialect)
    if NAMES.schema is not None:
        context.execute(sa.schema.CreateSchema(NAMES.schema, if_not_exists=True))
    run(url=dialect, literal_binds=True, dialect_opts={"paramstyle": "named"})


def url() -> str:
    """The database's URL as the shell gave it."""
    given = ARGUMENTS.get("url") or os.environ.get("ADK_SESSIONS_URL")
    if not given:
        raise SystemExit("Say which database: alembic -x url=… or ADK_SESSIONS_URL")
    return given


if context.is_offline_mode():
    run_as_text()
elif (connection := ATTRIBUTES.get("connection")) is not None:
    run_on(connection)
else:
    refusal = ""
    try:
        asyncio.run(migrate.with_connection(url(), run_on, NAMES, changes=changes()))
    except SessionStoreError as error:
        refusal = str(error)
    if refusal:
        raise SystemExit(refusal)
