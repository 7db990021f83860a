"""Comparing a live database's tables with those that this release works on.

What works is accepted, whoever made it: wider types, more columns and indexes, other names for
constraints. Everything else is told at once, by table and column.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Table, inspect

from .dialects import Database
from .dialects.inspection import Column, ForeignKey, Index, columns, faults, holders, indexes, keys
from .errors import SchemaError
from .models import INDEX, PAGE_INDEXES, Models

__all__ = ["differences", "validate_schema"]

_SESSION = ("app_name", "user_id", "session_id")


async def validate_schema(database: Database, models: Models) -> None:
    """Compares the tables with the models; reads catalogs, writes nothing.

    Args:
        database: where.
        models: the tables as they should be, by their names in that database.

    Raises:
        SchemaError: every difference, one on each line.
    """
    if database.is_missing():  # and a connection would make it
        found = ["there is no such file"]
    else:
        found = await database.run(lambda conn: differences(conn, models), write=False)
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise SchemaError(f"The tables are not as this release needs them:{lines}")


def differences(conn: Connection, models: Models) -> list[str]:
    """What keeps this release from working on a database's tables, by table and column."""
    inspector = inspect(conn)
    host_owned = models.names.host_owned
    tables = [
        *(models.sessions, models.events, models.app_states, models.user_states),
        models.state_changes,
    ]
    if not host_owned:  # google-adk looks there, and an application has no need of it
        tables.append(models.internal_metadata.__table__)
    found: list[str] = []
    for table in tables:
        if not inspector.has_table(table.name, schema=table.schema):
            found.append(f"{table.fullname}: there is no such table")
            continue
        there = indexes(conn, table)
        primary, foreign = keys(conn, table)
        found_columns = columns(conn, table)
        lines = [
            *(f": {fault}" for fault in faults(conn, table)),
            *_columns(table, found_columns, models),
            *_keys(table, primary, there, found_columns),
            *(_index(there, models) if table is models.events else ()),
            *(_page_indexes(there, models) if table is models.sessions else ()),
            *_foreign_keys(table, foreign, models),
        ]
        found += (f"{table.fullname}{line}" for line in lines)
    found += (
        f"{name}: its foreign key to {models.sessions.fullname} has no ON DELETE CASCADE:"
        " sessions could not be deleted"
        for name in holders(conn, models.sessions, models.events)
    )
    return found


def _columns(table: Table, there: dict[str, Column], models: Models) -> Iterator[str]:
    for wanted in table.columns:
        column = there.get(wanted.name)
        if column is None:
            yield f".{wanted.name}: there is no such column"
            continue
        if column.fault is not None:
            yield f".{wanted.name}: {column.fault}"
        if column.nullable and not wanted.nullable:
            yield f".{wanted.name}: nullable, must be NOT NULL"
        # event_data never is null, though google-adk's column may be
        if not column.nullable and wanted.nullable and wanted is not models.events.c.event_data:
            yield f".{wanted.name}: NOT NULL, must be nullable"
    for name, column in there.items():
        if name not in table.columns and not (column.nullable or column.filled):
            yield f".{name}: NOT NULL without a default, must have one or be nullable"


def _keys(
    table: Table, primary: list[str], there: list[Index], columns: dict[str, Column]
) -> Iterator[str]:
    wanted = {column.name for column in table.primary_key}
    if set(primary) != wanted:
        found = f"primary key is {_list(primary)}" if primary else "no primary key"
        yield f": {found}, must be {_list(column.name for column in table.primary_key)}"
    # of the application's columns, those in which our rows never are equal
    distinct = {name for name in columns.keys() - {*table.columns.keys()} if columns[name].distinct}
    for index in there:
        unique = set(index.columns)
        # which rows a part of an expression takes, cannot be told: it is left to who made it
        unknown = None in unique and not index.whole
        harmless = unique >= wanted or unique == set(primary) or unique & distinct or unknown
        # what is unique by less than the key refuses rows that must be stored
        if index.unique and not harmless:
            yield f": {index.name} is unique on {_list(index.columns)}, which rows may share"


def _index(there: list[Index], models: Models) -> Iterator[str]:
    wanted = (*_SESSION, "timestamp", "id")
    # equal keys are found in any order of their columns, and all are read in either direction
    right = [
        index
        for index in there
        if set(index.columns[:3]) == set(_SESSION)
        and index.columns[3:5] == wanted[3:]
        and index.whole
    ]
    name = models.names.of(INDEX)
    invalid = {index.name for index in there if index.name == name and not index.valid}
    if not any(index.valid for index in right):
        invalid |= {index.name for index in right}
        if not invalid:
            yield f": no index on {_list(wanted)}"
    for broken in sorted(invalid):
        yield (
            f": index {broken} is invalid (an index build was broken off): drop it and run"
            " adk-sessions upgrade"
        )


def _page_indexes(there: list[Index], models: Models) -> Iterator[str]:
    """An application may do without them: its pages are then slow."""
    if models.names.host_owned:
        return
    for name, wanted in PAGE_INDEXES.items():
        if not any(index.columns[: len(wanted)] == wanted and index.valid for index in there):
            yield f": no valid index {models.names.of(name)} on {_list(wanted)}"


def _foreign_keys(table: Table, there: list[ForeignKey], models: Models) -> Iterator[str]:
    sessions = models.sessions.fullname
    child = table in (models.events, models.state_changes)
    wanted = dict(zip(_SESSION, ("app_name", "user_id", "id"), strict=True))
    must = f"{_list(_SESSION)} to {sessions} {_list(wanted.values())} ON DELETE CASCADE"
    missing = child and not models.names.host_owned
    for key in there:
        if not set(key.columns) <= set(table.columns.keys()):
            continue  # the application's own
        found = f": foreign key {_list(key.columns)} to {key.target} {_list(key.referred)}"
        if not child:
            if not models.names.host_owned:
                yield f"{found}, must not be there"
            continue
        missing = False
        pairs = dict(zip(key.columns, key.referred, strict=True))
        if (key.target, pairs, key.on_delete) != (sessions, wanted, "CASCADE"):
            how = f"ON DELETE {key.on_delete}" if key.on_delete else "without ON DELETE CASCADE"
            yield f"{found} {how}, must be {must}"
    if missing:
        yield f": no foreign key {must}"


def _list(names: Any) -> str:
    return f"({', '.join(name or 'an expression' for name in names)})"
