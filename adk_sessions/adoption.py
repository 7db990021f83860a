"""What is in a database already: a revision of this package, google-adk's tables, or others'."""

from __future__ import annotations

from sqlalchemy import ColumnClause, Connection, column, inspect, select, table

from . import convert
from .dialects import unadoptable
from .errors import SchemaError
from .models import VERSION_TABLE, Names, models_of

HEAD = "0006"
REVISIONS = tuple(f"{n:04}" for n in range(1, int(HEAD) + 1))

# What a revision may add to tables that are adopted without it.
_ADDED = {
    *("event_exact", "title", "labels", "archive_time", "expire_time", "initial_state"),
}


def current(conn: Connection, where: Names) -> str | None:
    """The revision that the version table holds; the database's error if there is no such table."""
    version = table(where.of(VERSION_TABLE), column("version_num"), schema=where.schema)
    return max(conn.execute(select(version.c.version_num)).scalars(), default=None)


def revision(conn: Connection, where: Names) -> str | None:
    """The revision that a database is at, None if it has none."""
    if not inspect(conn).has_table(where.of(VERSION_TABLE), schema=where.schema):
        return None
    return current(conn, where)


def is_at_head(found: str | None) -> bool:
    """Whether there is nothing left to do: a newer release may have been here."""
    return found is not None and found >= HEAD


def require_head(found: str | None, where: Names) -> None:
    """Refuses every revision but this release's.

    Raises:
        SchemaError: what was found, and what to do.
    """
    if found == HEAD:
        return
    if found is not None and (found > HEAD or found not in REVISIONS):
        raise SchemaError(
            f"The database is at revision {found}, and this release of adk-sessions knows only up"
            f" to {HEAD}: the library is older than the database. Install a newer release."
        )
    what = "has no tables of this package yet" if found is None else f"is at revision {found}"
    raise SchemaError(
        f"The database {what}; this release needs revision {HEAD}. Run: {command('upgrade', where)}"
    )


def command(what: str, where: Names) -> str:
    """What to type for these tables."""
    words = [f"adk-sessions {what} --url …"]
    if where.schema:
        words.append(f"--schema {where.schema}")
    if where.table_prefix:
        words.append(f"--table-prefix {where.table_prefix}")
    return " ".join(words)


def check_adoptable(conn: Connection, where: Names) -> None:
    """Refuses a database whose tables are not google-adk's schema version 1, before any change.

    Raises:
        SchemaError: what is there instead, and what to do.
    """
    require_version_1(conn, where)
    if convert.is_v0(conn, where):
        raise SchemaError(
            "This database has google-adk's old layout, with pickled actions and local times. Stop"
            f" what writes to it and run: {command('upgrade --dry-run', where)} --source-timezone"
            " ZONE, then the same without --dry-run."
        )
    if why := unadoptable(conn, models_of(where)):
        raise SchemaError(why)
    found = inspect(conn)
    for wanted in models_of(where).metadata.tables.values():
        if not found.has_table(wanted.name, schema=where.schema):
            continue
        columns = {column["name"] for column in found.get_columns(wanted.name, where.schema)}
        missing = {column.name for column in wanted.columns} - _ADDED - columns
        if missing:
            raise SchemaError(
                f"The table {wanted.fullname} belongs to another application: it has no column"
                f" {', '.join(sorted(missing))}. Use another database, or keep apart with a schema"
                " or a table_prefix."
            )


def require_version_1(conn: Connection, where: Names) -> None:
    """Refuses a layout of google-adk's that says it is another one; the older one says nothing."""
    name = where.of("adk_internal_metadata")
    found = inspect(conn)
    if not found.has_table(name, schema=where.schema):
        return
    key: ColumnClause[str] = column("key")
    value: ColumnClause[str] = column("value")
    if not {"key", "value"} <= {column["name"] for column in found.get_columns(name, where.schema)}:
        return  # another application's: its columns are looked at later
    metadata = table(name, key, value, schema=where.schema)
    version = conn.execute(select(value).select_from(metadata).where(key == "schema_version"))
    if (says := version.scalar()) != "1":
        raise SchemaError(f"{name} says schema_version {says!r}; only '1' can be adopted")
