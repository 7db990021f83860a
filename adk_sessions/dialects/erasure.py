"""A user's rows in the tables that a conversion of google-adk's old layout has left as backups."""

from __future__ import annotations

from sqlalchemy import (
    ColumnElement,
    String,
    TableClause,
    and_,
    column,
    delete,
    exists,
    func,
    or_,
    select,
    table,
)

from .v0 import KEYS, TABLES, Layout, comparable

__all__ = ["Layout", "count", "erase"]


def count(layout: Layout, app_name: str, user_id: str) -> int:
    """How many there are."""
    return sum(
        layout.conn.execute(select(func.count()).select_from(old).where(theirs)).scalar_one()
        for old, theirs in _rows(layout, app_name, user_id)
    )


def erase(layout: Layout, app_name: str, user_id: str) -> int:
    """Deletes them, in the connection's transaction; how many there were."""
    return sum(
        layout.conn.execute(delete(old).where(theirs)).rowcount
        for old, theirs in _rows(layout, app_name, user_id)
    )


def _rows(
    layout: Layout, app_name: str, user_id: str
) -> list[tuple[TableClause, ColumnElement[bool]]]:
    """Each table with the condition that its rows are the user's, children first."""
    there = layout.backups()
    old = {
        name: table(
            layout.backup(name),
            *(column(key, String()) for key in KEYS[name]),
            schema=layout.schema,
        )
        for name in TABLES
        if layout.backup(name) in there and "user_id" in KEYS[name]
    }

    def spelled(one: TableClause) -> ColumnElement[bool]:
        # an old collation may not tell users apart
        app, user = (comparable(layout.conn, one.c[key]) for key in ("app_name", "user_id"))
        return and_(app == app_name, user == user_id)

    found = {}
    for name, one in old.items():
        theirs = spelled(one)
        if name == "events" and "sessions" in old:
            # and may have let an event spell its session's user in another way
            s = old["sessions"]
            same = and_(
                s.c.app_name == one.c.app_name,
                s.c.user_id == one.c.user_id,
                s.c.id == one.c.session_id,
            )
            theirs = or_(theirs, exists().where(same, spelled(s)).correlate(one))
        # as the table itself compares, which an index can do
        coarse = and_(one.c.app_name == app_name, one.c.user_id == user_id)
        found[name] = (one, and_(coarse, theirs))
    return [found[name] for name in ("events", "sessions", "user_states") if name in found]
