"""Opening a collection: its table, new columns, and the documents of older versions.

Any number of processes may start at once. Tables are made and altered under a lock of the
database's own; documents go through the loader without one, and are written back only where they
are still what was read. All of it may be cut off anywhere, and goes on at the next start.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import sqlalchemy as sa
from parlant.core.persistence.document_database import BaseDocument
from sqlalchemy import Connection, Table
from sqlalchemy.exc import IntegrityError

from ..dialects import Database
from ..dialects.documents import (
    Documents,
    Shape,
    add_column,
    holds,
    index_on,
    make,
    rename_column,
    shape_of,
    short,
    table_of,
)
from ..errors import AlreadyExistsError, DatabaseError, SchemaError
from ..retry import Retry
from .columns import ORDER, UNFIT, Columns, dump, load

T = TypeVar("T")
Loader = Callable[[BaseDocument], Awaitable[Any]]
#: the columns of an index, each with whether it descends, and whether it is unique
Wanted = tuple[Mapping[str, bool], bool]

logger = logging.getLogger(__name__)

# Documents that are read, loaded and written back at a time, and how often if others change them.
_BATCH, _ROUNDS = 500, 20
# Behind the name of a column that is not filled yet.
_FILLING = "__filling"
# What is kept of a document that its loader rejects, besides the document.
_FAILED: dict[str, type] = {"id": str, "creation_utc": str, "version": str}
_OWN_INDEXES: list[Wanted] = [
    ({"id": False}, True),
    (dict.fromkeys(ORDER, False), False),
    ({"version": False}, False),
]


@dataclass(frozen=True)
class Place:
    """A database, and where in it collections are.

    Attributes:
        schema: of the tables, None for the connection's own.
        create: whether tables, columns and indexes are made here.
    """

    database: Database
    statements: Documents
    retry: Retry
    schema: str | None
    create: bool

    async def run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """One operation; on PostgreSQL each statement commits by itself."""
        return await self.retry.run(self.database, work, write=write)

    async def transact(self, work: Callable[[Connection], T], lock: Table | None = None) -> T:
        """One transaction that may be repeated; with ``lock`` one at a time for that table."""
        how = self.statements

        def within(conn: Connection) -> T:
            with how.transaction(conn) if lock is None else how.locked(conn, lock):
                return work(conn)

        return await self.retry(lambda: self.database.submit(within, write=True), write=True)

    async def shape(self, table: Table) -> Shape | None:
        """What a table is like, None if it is not there; who only asks makes no file."""
        if self.database.is_missing():
            return None
        return await self.run(lambda conn: shape_of(conn, table), write=False)

    async def made(self, table: Table) -> Shape:
        """What a table is like, which is made if it is missing.

        Raises:
            SchemaError: nothing is to be made here, or it is no table of documents.
        """
        shape = await self.shape(table)
        if shape is None and self.create:
            await self.transact(lambda conn: make(conn, table), lock=table)
            shape = await self.shape(table)
        if shape is None:
            raise SchemaError(f"The table {table.fullname} is missing, and create=False is set.")
        if missing := {"seq", "document"} - shape.columns.keys():
            raise SchemaError(f"{table.fullname} holds no documents: it has no {missing}.")
        return shape


class Opened(NamedTuple):
    """A collection that is open, and the names of the indexes that its table has."""

    columns: Columns
    indexes: set[str | None]


async def opened(
    place: Place, name: str, kinds: Mapping[str, type], loader: Loader | None
) -> Opened:
    """Opens a collection, and makes it if it is missing.

    A column is filled once: what processes of another schema write afterwards under a key that has
    no column for them, or one of another type, is in the document only, and filters miss it here.

    Args:
        place: where.
        name: of the table.
        kinds: the columns that it is to have.
        loader: takes documents of older versions; None if there can be none.

    Raises:
        SchemaError: it is no such table, or with ``create=False`` something is missing.
    """
    table = table_of(name, place.schema, kinds)
    _indexes(table, _OWN_INDEXES)
    shape = await place.made(table)
    # a key that has changed its type, or only its case, is looked for in the documents
    there = {known.lower(): known for known in shape.columns}
    kinds = {
        key: kind
        for key, kind in kinds.items()
        if key.lower() not in there or (key in shape.columns and holds(shape.columns[key], kind))
    }
    new = {key: kind for key, kind in kinds.items() if key not in shape.columns}
    if new and not place.create:
        raise SchemaError(
            f"The table {name} has no column {', '.join(new)}, and create=False is set."
        )
    if loader is not None:
        old = {key: kind for key, kind in kinds.items() if key not in new}
        await _migrate(place, Columns(table_of(name, place.schema, old), old), loader)
    columns = Columns(table_of(name, place.schema, kinds), kinds)
    for key in new:
        last: int | None = 0
        while last is not None:
            step = functools.partial(_add, columns, key, last)
            last = await place.transact(step, lock=columns.table)
    result = Opened(columns, shape.indexes)
    await ensure_indexes(place, result, _OWN_INDEXES)
    return result


async def ensure_indexes(place: Place, opened: Opened, wanted: Sequence[Wanted]) -> None:
    """Makes indexes that are missing; none on keys without a column, none with ``create=False``.

    Raises:
        SchemaError: documents have equal values where they must not.
    """
    table = opened.columns.table
    missing = [i for i in _indexes(table, wanted) if i.name not in opened.indexes]

    def create(conn: Connection) -> None:
        for index in missing:
            index.create(conn, checkfirst=True)

    if missing and place.create:
        try:
            await place.transact(create, lock=table)
        except IntegrityError:
            raise SchemaError(f"An index of {table.fullname} is to be unique and is not.") from None
        opened.indexes.update(index.name for index in missing)


def _indexes(table: Table, wanted: Sequence[Wanted]) -> list[sa.Index]:
    possible = [one for one in wanted if one[0].keys() <= set(table.c.keys())]
    if len(possible) < len(wanted):
        logger.debug("%s has no columns for some of the indexes asked for", table.fullname)
    return [index_on(table, fields, unique=unique) for fields, unique in possible]


def _add(columns: Columns, key: str, last: int, conn: Connection) -> int | None:
    """Adds a column, or fills it for some rows; where it came to, None if all is done.

    Until it is filled it has another name, so nobody looks for anything in it.
    """
    table, kind, name = columns.table, columns.kinds[key], key + _FILLING
    shape = shape_of(conn, table)
    if shape is None or key in shape.columns:
        return None
    if name not in shape.columns:
        add_column(conn, table, name, kind)
    rows = _rows(conn, table, sa.true(), last, lock=True)
    target = table_of(table.name, table.schema, {name: kind})
    for seq, text in rows:
        value = _scalars(Columns(table, {key: kind}), text)[key]
        if value is None and key == ORDER[0]:  # a page is what comes after one
            value = ""
        if value is not None:
            conn.execute(sa.update(target).where(target.c.seq == seq).values({name: value}))
    if rows:
        return rows[-1][0]
    rename_column(conn, table, name, key)
    return None


def _rows(
    conn: Connection,
    table: Table,
    where: sa.ColumnElement[bool],
    last: int,
    *,
    lock: bool = False,
) -> list[tuple[int, str]]:
    """Some documents behind ``last``, in the order of their insertion."""
    seq = table.c.seq
    found = sa.select(seq, table.c.document).where(where, seq > last).order_by(seq).limit(_BATCH)
    rows = conn.execute(found.with_for_update() if lock else found)
    return [(row.seq, row.document) for row in rows]


# --- documents of older versions ----------------------------------------------------------------


async def _migrate(place: Place, columns: Columns, loader: Loader) -> None:
    """Takes the documents through the loader, unless one of their version shows that it need not.

    Opening a collection must not read all of it, so one document is asked for each version.
    """
    for condition, text in await place.run(lambda conn: _probes(conn, columns), write=False):
        if await _verdict(columns, loader, text) == Verdict():
            continue
        last = 0
        while rows := await place.run(
            functools.partial(_rows, table=columns.table, where=condition, last=last), write=False
        ):
            await _bring(place, columns, loader, rows)
            last = rows[-1][0]


def _probes(conn: Connection, columns: Columns) -> list[tuple[sa.ColumnElement[bool], str]]:
    """One document of each version, with what all documents of that version have in common."""
    one = sa.select(columns.table.c.document).limit(1)
    if "version" not in columns.kinds:
        return [(sa.true(), text) for text in conn.scalars(one)]
    version = columns.table.c.version
    probes: list[tuple[sa.ColumnElement[bool], str]] = []
    condition: sa.ColumnElement[bool] = version.is_(None)
    beyond: sa.ColumnElement[bool] = version.is_not(None)
    probes += [(condition, text) for text in conn.scalars(one.where(condition))]
    walk = one.add_columns(version).order_by(version)
    while (row := conn.execute(walk.where(beyond)).first()) is not None:
        probes.append((version == row.version, row.document))
        beyond = version > row.version
    return probes


class Verdict(NamedTuple):
    """What becomes of a document: another row, or rejection for a reason; or it stays."""

    row: dict[str, Any] | None = None
    reason: str = ""


async def _verdict(columns: Columns, loader: Loader, text: str) -> Verdict:
    try:
        loaded, before = await loader(cast(BaseDocument, load(text))), load(text)
        if not loaded:
            return Verdict(reason="None")
        if loaded == before or dump(loaded) == dump(before):  # NaN is not equal to itself
            return Verdict()
        return Verdict(columns.row(loaded))
    except Exception as error:
        return Verdict(reason=type(error).__name__)


async def _bring(
    place: Place, columns: Columns, loader: Loader, rows: Sequence[tuple[int, str]]
) -> None:
    """Takes documents through the loader, and writes them back, or to where rejected ones are.

    One that somebody changes meanwhile stays as it is then, and is loaded again.
    """
    table = columns.table
    for _ in range(_ROUNDS):
        brought = [(seq, text, await _verdict(columns, loader, text)) for seq, text in rows]
        try:
            late = await _write(place, table, brought)
        except IntegrityError:  # each by itself, to find those whose place is taken
            late = []
            for seq, text, verdict in brought:
                try:
                    late += await _write(place, table, [(seq, text, verdict)])
                except IntegrityError:
                    taken = Verdict(reason=AlreadyExistsError.__name__)
                    late += await _write(place, table, [(seq, text, taken)])
        if not late:
            return
        again = functools.partial(_rows, table=table, where=table.c.seq.in_(late), last=0)
        rows = await place.run(again, write=False)
    logger.warning("%s: documents that change all the time are left as they are", table.fullname)


async def _write(
    place: Place, table: Table, brought: Sequence[tuple[int, str, Verdict]]
) -> list[int]:
    """Writes documents that are still what was read; the keys of the others."""
    failed = table_of(short(f"{table.name}_failed_migrations"), place.schema, _FAILED)
    if any(verdict.reason for *_, verdict in brought):
        await place.made(failed)

    def write(conn: Connection) -> tuple[list[tuple[Any, str]], list[int]]:
        moved, late = [], []
        for seq, text, (row, reason) in brought:
            same = (table.c.seq == seq, table.c.document == text)
            if row is not None:
                done = conn.execute(sa.update(table).where(*same).values(row)).rowcount
            else:
                done = not reason or conn.execute(sa.delete(table).where(*same)).rowcount
            if not done:
                late.append(seq)
            elif reason:
                kept = _scalars(Columns(failed, _FAILED), text)
                conn.execute(sa.insert(failed), {**kept, "document": text})
                moved.append((kept["id"], reason))
        return moved, late

    moved, late = await place.transact(write)
    for id, reason in moved:
        logger.warning("document %r is rejected, and kept in %s: %s", id, failed.fullname, reason)
    return late


def _scalars(columns: Columns, text: str) -> dict[str, Any]:
    """What can be in columns of a document that need not be sound."""
    try:
        document = load(text)
    except DatabaseError:
        document = {}
    values = {key: columns.value(key, document.get(key)) for key in columns.kinds}
    for key in [key for key, value in values.items() if value is UNFIT]:
        logger.warning("%s of document %r does not fit its column", key, document.get("id"))
        values[key] = None
    return values
