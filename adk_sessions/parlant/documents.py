"""A ``DocumentDatabase`` of Parlant in any SQL database: a table for each collection.

A filter on a key with a column is a condition on that column, and an index may find it. What SQL
cannot say, and what a column cannot hold, is decided by the documents that are left.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self, TypeVar, cast, get_type_hints

import sqlalchemy as sa
from parlant.core.common import generate_id
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where, ensure_is_total
from parlant.core.persistence.document_database import (
    BaseDocument,
    CollectionIndex,
    CollectionSort,
    DeleteResult,
    DocumentCollection,
    DocumentDatabase,
    FindResult,
    InsertResult,
    TDocument,
    UpdateResult,
)
from sqlalchemy import URL, Connection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from ..dialects.connecting import connect_engine, connect_url
from ..dialects.documents import documents_for, short, table_of
from ..dialects.faults import Overtaken
from ..errors import AlreadyExistsError, ConfigurationError, InvalidInputError
from ..retry import WINDOW, Retry
from . import opening
from .columns import ORDER, Columns, is_digest, kinds_of, load
from .filters import Filter
from .opening import Opened, Place

T = TypeVar("T")
Loader = Callable[[BaseDocument], Awaitable[TDocument | None]]
Change = Callable[[dict[str, Any]], Mapping[str, Any]]

# How often what others do at the same moment may be in the way.
_TRIES = 5
# Documents that are looked through at a time.
_BATCH = 500
# The collection of which a store has one document, however many processes start at once.
_METADATA = "metadata"


class SQLDocumentDatabase(DocumentDatabase):
    """A ``DocumentDatabase`` of Parlant in any SQL database.

        async with SQLDocumentDatabase("postgresql://…", prefix="parlant_customers_") as database:
            async with CustomerDocumentStore(IdGenerator(), database) as customers: ...

    Args:
        place: a URL as people paste it, or the application's engine, which stays open.
        prefix: of the tables' names; each store needs one of its own.
        schema: the database schema of the tables, None for the connection's own.
        create: whether tables, columns and indexes are made where they are missing.
        retry_window: seconds in which an operation may be repeated after a lost connection.
        options: of ``adk_sessions.dialects.connecting.connect_url`` or ``connect_engine``.

    Raises:
        ConfigurationError: bad URL, missing driver, unknown option.
        InvalidInputError: no table can be called so.
    """

    def __init__(
        self,
        place: str | URL | AsyncEngine,
        *,
        prefix: str = "",
        schema: str | None = None,
        create: bool = True,
        retry_window: float = WINDOW,
        **options: Any,
    ) -> None:
        if not isinstance(create, bool):
            raise ConfigurationError("create must be True or False")
        if isinstance(place, AsyncEngine):
            database, statements = connect_engine(
                place, lambda name: documents_for(name, schema), **options
            )
        else:
            database, statements = connect_url(
                place, lambda name: documents_for(name, schema), schema=schema, **options
            )
        retry = Retry(retry_window, lambda: database.reached)
        self._place = Place(database, statements, retry, schema, create)
        self._prefix = _named(prefix, "prefix")
        self._shared = False

    def sharing(self, prefix: str) -> SQLDocumentDatabase:
        """Another prefix over the same engine, which stays open until this one is closed."""
        other = object.__new__(type(self))
        other._place, other._prefix, other._shared = self._place, _named(prefix, "prefix"), True
        return other

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Lets go of the connections that are ours."""
        if not self._shared:
            await self._place.database.close()

    async def create_collection(
        self, name: str, schema: type[TDocument]
    ) -> SQLDocumentCollection[TDocument]:
        """Makes a collection; one that is there is opened as it is.

        Raises:
            SchemaError: the table or a column is missing, with ``create=False``.
        """
        return await self._opened(name, schema, None)

    async def get_collection(
        self, name: str, schema: type[TDocument], document_loader: Loader[TDocument]
    ) -> SQLDocumentCollection[TDocument]:
        """Opens a collection: new columns are added, older documents go through the loader.

        Raises:
            InvalidInputError: there is none of this name.
            SchemaError: a column is missing, with ``create=False``.
        """
        await self._existing(name)
        return await self._opened(name, schema, document_loader)

    async def get_or_create_collection(
        self, name: str, schema: type[TDocument], document_loader: Loader[TDocument]
    ) -> SQLDocumentCollection[TDocument]:
        """Opens a collection, and makes it if it is missing; any number of processes may at once.

        Raises:
            SchemaError: the table or a column is missing, with ``create=False``.
        """
        return await self._opened(name, schema, document_loader)

    async def delete_collection(self, name: str) -> None:
        """Drops a collection with all its documents; those that were rejected stay.

        Raises:
            InvalidInputError: there is none of this name.
        """
        table = await self._existing(name)
        await self._place.transact(lambda conn: table.drop(conn, checkfirst=True), lock=table)

    async def _existing(self, name: str) -> sa.Table:
        table = table_of(self._table(name), self._place.schema, {})
        if await self._place.shape(table) is None:
            raise InvalidInputError(f"There is no collection {name!r}.", field="name")
        return table

    async def _opened(
        self, name: str, schema: type[TDocument], loader: Loader[TDocument] | None
    ) -> SQLDocumentCollection[TDocument]:
        if get_type_hints(schema).get("id") is not ObjectId:
            raise InvalidInputError("schema needs an id that is an ObjectId", field="schema")
        found = await opening.opened(self._place, self._table(name), kinds_of(schema), loader)
        return SQLDocumentCollection(self._place, found, schema, single=name == _METADATA)

    def _table(self, name: str) -> str:
        return short(self._prefix + _named(name, "name"))


def _named(name: object, field: str) -> str:
    if not isinstance(name, str) or "\0" in name or not (name or field == "prefix"):
        raise InvalidInputError(f"{field} must be text that a table can be called", field=field)
    return name


class _Found(NamedTuple):
    seq: int
    document: dict[str, Any]


class _NoneMatches(Exception):
    """There is nothing to be written."""


class SQLDocumentCollection(DocumentCollection[TDocument]):
    """A table of documents.

    Attributes:
        table: ``seq`` (key), ``document`` (the whole document, ASCII JSON text) and a column for
            each scalar that the schema types.
    """

    table: sa.Table

    def __init__(
        self, place: Place, opened: Opened, schema: type[TDocument], *, single: bool = False
    ) -> None:
        self._place = place
        self._opened = opened
        self._columns: Columns = opened.columns
        self._schema = schema
        self._single = single
        self.table = opened.columns.table

    # --- reading ---------------------------------------------------------------------------------

    async def find(
        self,
        filters: Where,
        limit: int | None = None,
        cursor: Cursor | None = None,
        sort_direction: SortDirection | None = None,
    ) -> FindResult[TDocument]:
        """The documents that match, by creation_utc and id.

        Args:
            filters: in Parlant's form.
            limit: how many at the most; all of them without it.
            cursor: where the page before ended.
            sort_direction: of creation_utc and id, ascending if it is not given.

        Raises:
            InvalidInputError: a filter has not that form, or the limit is negative.
        """
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise InvalidInputError("limit must be a number, and not negative", field="limit")
        wanted = Filter(self._columns, filters)
        down = sort_direction is SortDirection.DESC
        end = None if cursor is None else (str(cursor.creation_utc), str(cursor.id))
        if limit is not None and wanted.exact and self._is_ordered(end):
            return await self._page(wanted, limit, end, down)
        found = await self._all(wanted)
        found.sort(key=_rank, reverse=down)
        if end is not None:
            found = [one for one in found if (_rank(one) < end if down else _rank(one) > end)]
        return _result(cast("list[TDocument]", found[:limit]), len(found))

    def _is_ordered(self, end: tuple[str, str] | None) -> bool:
        """Whether columns tell the order, and what comes after a cursor."""
        return self._columns.kinds.keys() >= set(ORDER) and not (
            end and any(is_digest(self.value(*at)) for at in zip(ORDER, end, strict=True))
        )

    async def _page(
        self, wanted: Filter, limit: int, end: tuple[str, str] | None, down: bool
    ) -> FindResult[TDocument]:
        """One page, and the number of all that are left, in one statement."""
        table, (moment, id) = self.table, (self.table.c[key] for key in ORDER)
        where = wanted.condition
        if end is not None:
            early = sa.and_(moment <= end[0], sa.or_(moment < end[0], id < end[1]))
            late = sa.and_(moment >= end[0], sa.or_(moment > end[0], id > end[1]))
            where = sa.and_(where, early if down else late)
        count = sa.select(sa.func.count()).select_from(table).where(where).correlate(None)
        total = count.scalar_subquery()
        order = (moment.desc(), id.desc()) if down else (moment, id)
        # the number is needed though no document may be wanted
        most = min(max(limit, 1), sys.maxsize)
        page = sa.select(table.c.document, total).where(where).order_by(*order).limit(most)
        rows = await self.run(lambda conn: conn.execute(page).all(), write=False)
        items = [self.load(text) for text, _ in rows[:limit]]
        return _result(items, rows[0][1] if rows else 0)

    async def find_one(
        self, filters: Where, sort: CollectionSort | None = None
    ) -> TDocument | None:
        """The first document that matches, in the order of insertion or of ``sort``.

        None comes before all others.
        """
        wanted = Filter(self._columns, filters)
        if sort:
            found = await self._all(wanted)
            for field, way in reversed(sort):
                found.sort(
                    key=functools.partial(_sortable, field), reverse=way is SortDirection.DESC
                )
            return cast(TDocument, found[0]) if found else None
        first = await self.run(lambda conn: next(self._candidates(conn, wanted), None), write=False)
        return None if first is None else cast(TDocument, first.document)

    async def _all(self, wanted: Filter) -> list[dict[str, Any]]:
        every = sa.select(self.table.c.seq, self.table.c.document).where(wanted.condition)
        # an ORDER BY would tempt a planner to go along the key
        rows = sorted(await self.run(lambda conn: conn.execute(every).all(), write=False))
        documents = [load(text) for _, text in rows]
        return [document for document in documents if wanted.matches(document)]

    def _candidates(self, conn: Connection, wanted: Filter) -> Iterator[_Found]:
        """Documents that match, in the order of insertion."""
        seq = self.table.c.seq
        indexed = wanted.equal & {index.columns[0].name for index in self.table.indexes}
        # a planner that may would go along the key until something matches, for all of the table
        order = seq + 0 if indexed else seq
        rows = sa.select(seq, self.table.c.document).where(wanted.condition).order_by(order)
        rows = rows.limit(1 if wanted.exact else _BATCH)
        found = conn.execute(rows).all()
        while found:
            for number, text in found:
                document = load(text)
                if wanted.matches(document):
                    yield _Found(number, document)
            found = conn.execute(rows.where(seq > found[-1].seq)).all()

    # --- writing ---------------------------------------------------------------------------------

    async def insert_one(self, document: TDocument) -> InsertResult:
        """Adds a document; if its id is there, the document that is there stays.

        Raises:
            TypeError: a key of the schema is missing.
            InvalidInputError: a value is of another type than its column, or has no JSON form.
            AlreadyExistsError: a unique index other than the one on id has these values.
        """
        ensure_is_total(document, self._schema)
        row = self.row(document)
        there = sa.select(self.table.c.seq).limit(1)
        if self._single:
            await self._place.transact(
                lambda conn: None if conn.scalar(there) else self._insert(conn, row), self.table
            )
            return InsertResult(True)
        there = there.where(self.table.c.id == row["id"])

        async def insert() -> None:
            try:
                await self.run(lambda conn: self._insert(conn, row), write=True)
            except IntegrityError:
                if await self.run(lambda conn: conn.scalar(there), write=False) is None:
                    raise

        await self._unless_taken(insert)
        return InsertResult(True)

    async def update_one(
        self, filters: Where, params: TDocument, upsert: bool = False
    ) -> UpdateResult[TDocument]:
        """Sets keys of the first document that matches; with ``upsert`` it is added if none does.

        An id that another document has is not given twice: a new one is made.

        Raises:
            TypeError: a key of the schema is missing in a document that is to be added.
            InvalidInputError: a value is of another type than its column, or has no JSON form.
            AlreadyExistsError: a unique index other than the one on id has these values.
        """
        wanted = Filter(self._columns, filters)

        def add(conn: Connection) -> TDocument | None:
            if next(self._candidates(conn, wanted), None) is not None:
                return None  # somebody was quicker
            row = self._with_own_id(conn, params, self.row(params))
            self._insert(conn, row)
            return self.load(row["document"])

        while True:
            changed = await self.modify(filters, lambda document: {**document, **params})
            if changed is not None or not upsert:
                count = int(changed is not None)
                return UpdateResult(True, count, count, changed)
            ensure_is_total(params, self._schema)
            added = await self._unless_taken(lambda: self._place.transact(add, lock=self.table))
            if added is not None:
                return UpdateResult(True, 0, 0, added)

    async def delete_one(self, filters: Where) -> DeleteResult[TDocument]:
        """Deletes the first document that matches."""
        wanted = Filter(self._columns, filters)

        def work(conn: Connection) -> dict[str, Any]:
            found = self._hold(conn, wanted)
            conn.execute(sa.delete(self.table).where(self.table.c.seq == found.seq))
            return found.document

        deleted = None
        with suppress(_NoneMatches):
            deleted = await self.run_once(work)
        return DeleteResult(True, int(deleted is not None), cast("TDocument | None", deleted))

    async def ensure_indexes(self, indexes: Sequence[CollectionIndex]) -> None:
        """Makes the indexes that are missing; keys without a column are left to the documents."""
        wanted = [
            ({field: way is SortDirection.DESC for field, way in index.fields}, index.unique)
            for index in indexes
        ]
        await opening.ensure_indexes(self._place, self._opened, wanted)

    async def modify(self, filters: Where, change: Change) -> TDocument | None:
        """Changes the first match, read and written under one lock; what it is now, or None.

        Args:
            filters: what to look for.
            change: is given a copy of the document and returns what it shall be; it may be called
                again after a conflict, and may raise.
        """
        wanted = Filter(self._columns, filters)

        def work(conn: Connection) -> TDocument:
            found = self._hold(conn, wanted)
            id = found.document.get("id")
            document = change(found.document)
            row = self.row(document)
            if row["id"] != id:
                row = self._with_own_id(conn, document, row)
            self._place.statements.check_size(conn, "document", row["document"])
            conn.execute(sa.update(self.table).where(self.table.c.seq == found.seq).values(row))
            return self.load(row["document"])

        with suppress(_NoneMatches):
            return await self._unless_taken(lambda: self.run_once(work))
        return None

    def _hold(self, conn: Connection, wanted: Filter) -> _Found:
        """The first match, locked.

        Raises:
            _NoneMatches: so that nothing is committed, and no answer to a COMMIT can be lost.
            Overtaken: somebody has just changed or deleted what seemed to be it.
        """
        found = next(self._candidates(conn, wanted), None)
        if found is None:
            raise _NoneMatches
        same = sa.and_(wanted.condition, self.table.c.seq == found.seq)
        text = conn.scalar(sa.select(self.table.c.document).where(same).with_for_update())
        if text is None or not wanted.matches(document := load(text)):
            raise Overtaken
        return _Found(found.seq, document)

    def _insert(self, conn: Connection, row: dict[str, Any]) -> None:
        self._place.statements.check_size(conn, "document", row["document"])
        conn.execute(sa.insert(self.table), row)

    def _with_own_id(
        self, conn: Connection, document: Mapping[str, Any], row: dict[str, Any]
    ) -> dict[str, Any]:
        """The row as it is, or with a new id if another document has its."""
        same = sa.select(self.table.c.seq).where(self.table.c.id == row["id"])
        if conn.scalar(same) is None:
            return row
        return self.row({**document, "id": generate_id()})

    async def _unless_taken(self, call: Callable[[], Awaitable[T]]) -> T:
        for _ in range(_TRIES):
            try:
                return await call()
            except IntegrityError:
                continue  # somebody took the id meanwhile, or it is another index
        raise AlreadyExistsError(
            f"Another document of {self.table.fullname} has the values of a unique index."
        )

    # --- for stores of our own -------------------------------------------------------------------

    async def run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """One operation, repeated as long as that is safe; on PostgreSQL it commits by itself."""
        return await self._place.run(work, write=write)

    async def run_once(self, work: Callable[[Connection], T]) -> T:
        """One transaction that must not be committed twice."""
        return await self._place.retry.run_once(self._place.database, work)

    def row(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The columns' values of a document, all but ``seq``, ready to be bound.

        Raises:
            InvalidInputError: a value is of another type than its column, or has no JSON form.
        """
        return self._columns.row(document)

    def value(self, field: str, value: Any) -> Any:
        """What a scalar is in its column: to compare with, ready to be bound."""
        return self._columns.value(field, value)

    def load(self, text: str) -> TDocument:
        """The document of a stored text."""
        return cast(TDocument, load(text))


def _rank(document: Mapping[str, Any]) -> tuple[str, str]:
    return str(document.get("creation_utc") or ""), str(document.get("id") or "")


def _sortable(field: str, document: Mapping[str, Any]) -> tuple[bool, Any]:
    return document.get(field) is not None, document.get(field)


def _result(items: list[TDocument], total: int) -> FindResult[TDocument]:
    more = total > len(items)
    cursor = Cursor(_rank(items[-1])[0], ObjectId(_rank(items[-1])[1])) if more and items else None
    return FindResult(items=items, total_count=total, has_more=more, next_cursor=cursor)
