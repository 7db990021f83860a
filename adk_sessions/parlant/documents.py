"""A ``DocumentDatabase`` of Parlant in any SQL database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from parlant.core.persistence.common import Cursor, SortDirection, Where
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
from sqlalchemy import URL, Connection, Table
from sqlalchemy.ext.asyncio import AsyncEngine

from ..retry import WINDOW

T = TypeVar("T")


class SQLDocumentDatabase(DocumentDatabase):
    """A ``DocumentDatabase`` of Parlant in any SQL database."""

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
        raise NotImplementedError

    def sharing(self, prefix: str) -> SQLDocumentDatabase:
        """Another prefix over the same engine, which stays open until this one is closed."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Lets go of the connections that are ours."""

    async def create_collection(
        self, name: str, schema: type[TDocument]
    ) -> SQLDocumentCollection[TDocument]:
        raise NotImplementedError

    async def get_collection(
        self,
        name: str,
        schema: type[TDocument],
        document_loader: Callable[[BaseDocument], Awaitable[TDocument | None]],
    ) -> SQLDocumentCollection[TDocument]:
        raise NotImplementedError

    async def get_or_create_collection(
        self,
        name: str,
        schema: type[TDocument],
        document_loader: Callable[[BaseDocument], Awaitable[TDocument | None]],
    ) -> SQLDocumentCollection[TDocument]:
        raise NotImplementedError

    async def delete_collection(self, name: str) -> None:
        raise NotImplementedError


class SQLDocumentCollection(DocumentCollection[TDocument]):
    """A table of documents.

    Attributes:
        table: ``seq`` (key), ``document`` (the whole document, ASCII JSON text) and a column for
            each scalar that the schema types.
    """

    table: Table

    async def find(
        self,
        filters: Where,
        limit: int | None = None,
        cursor: Cursor | None = None,
        sort_direction: SortDirection | None = None,
    ) -> FindResult[TDocument]:
        raise NotImplementedError

    async def find_one(
        self, filters: Where, sort: CollectionSort | None = None
    ) -> TDocument | None:
        raise NotImplementedError

    async def ensure_indexes(self, indexes: Sequence[CollectionIndex]) -> None:
        raise NotImplementedError

    async def insert_one(self, document: TDocument) -> InsertResult:
        raise NotImplementedError

    async def update_one(
        self, filters: Where, params: TDocument, upsert: bool = False
    ) -> UpdateResult[TDocument]:
        raise NotImplementedError

    async def delete_one(self, filters: Where) -> DeleteResult[TDocument]:
        raise NotImplementedError

    # --- for stores of our own -------------------------------------------------------------------

    async def modify(
        self, filters: Where, change: Callable[[dict[str, Any]], Mapping[str, Any]]
    ) -> TDocument | None:
        """Changes the first match, read and written under one lock; what it is now, or None.

        Args:
            filters: what to look for.
            change: is given a copy of the document and returns what it shall be; it may be called
                again after a conflict, and may raise.
        """
        raise NotImplementedError

    async def run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        """One operation, repeated as long as that is safe; on PostgreSQL it commits by itself."""
        raise NotImplementedError

    async def run_once(self, work: Callable[[Connection], T]) -> T:
        """One transaction that must not be committed twice."""
        raise NotImplementedError

    def row(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The columns' values of a document, all but ``seq``, ready to be bound."""
        raise NotImplementedError

    def value(self, field: str, value: Any) -> Any:
        """What a scalar is in its column: to compare with, ready to be bound."""
        raise NotImplementedError

    def load(self, text: str) -> TDocument:
        """The document of a stored text."""
        raise NotImplementedError
