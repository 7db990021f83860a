"""Parlant's stores of customers and of context variables, for several processes.

Where Parlant's own read, change and write back under a lock of their process, these change a
document under one of the database's. A tag is had once, however many give it at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from parlant.core.common import IdGenerator, ItemNotFoundError, UniqueId, md5_checksum
from parlant.core.context_variables import (
    ContextVariable,
    ContextVariableDocumentStore,
    ContextVariableId,
)
from parlant.core.customers import Customer, CustomerDocumentStore, CustomerId
from parlant.core.persistence.document_database import DocumentCollection
from parlant.core.tags import TagId

from .documents import SQLDocumentCollection
from .sessions import modified


class SQLCustomerStore(CustomerDocumentStore):
    """Customers with their tags, for any number of processes."""

    async def upsert_tag(
        self, customer_id: CustomerId, tag_id: TagId, creation_utc: datetime | None = None
    ) -> bool:
        """Gives a customer a tag; whether it was new."""
        await _check(self._customers_collection, customer_id)
        return await _tag(
            self._tag_association_collection,
            {"customer_id": customer_id, "tag_id": tag_id},
            version=self.VERSION.to_string(),
            ids=self._id_generator,
            now=creation_utc,
        )

    async def upsert_extra(self, customer_id: CustomerId, extra: Mapping[str, str]) -> Customer:
        """Sets some keys; others keep what anybody gives them meanwhile."""
        return await self._changed(customer_id, lambda now: {**now, **extra})

    async def remove_extra(self, customer_id: CustomerId, keys: Sequence[str]) -> Customer:
        """Removes some keys, those of them that are there."""
        return await self._changed(
            customer_id, lambda now: {k: v for k, v in now.items() if k not in keys}
        )

    async def _changed(
        self, id: CustomerId, change: Callable[[dict[str, str]], dict[str, str]]
    ) -> Customer:
        customers = cast("SQLDocumentCollection[Any]", self._customers_collection)
        document = await modified(
            customers, {"id": {"$eq": id}}, lambda now: {"extra": change(now["extra"])}
        )
        if document is None:
            raise ItemNotFoundError(item_id=UniqueId(id))
        return await self._deserialize_customer(document)


class SQLContextVariableStore(ContextVariableDocumentStore):
    """Context variables with their tags and values, for any number of processes."""

    async def add_variable_tag(
        self, variable_id: ContextVariableId, tag_id: TagId, creation_utc: datetime | None = None
    ) -> ContextVariable:
        """Gives a variable a tag, if it has it not yet."""
        await _check(self._variable_collection, variable_id)
        await _tag(
            self._variable_tag_association_collection,
            {"variable_id": variable_id, "tag_id": tag_id},
            version=self.VERSION.to_string(),
            ids=self._id_generator,
            now=creation_utc,
        )
        return await self.read_variable(variable_id)


async def _check(owners: DocumentCollection[Any], id: str) -> None:
    if await owners.find_one({"id": {"$eq": id}}) is None:
        raise ItemNotFoundError(item_id=UniqueId(id))


async def _tag(
    tags: DocumentCollection[Any],
    pair: Mapping[str, str],
    *,
    version: str,
    ids: IdGenerator,
    now: datetime | None,
) -> bool:
    """Stores a pair of an owner and a tag, unless it is there; whether it was not."""
    filters: Any = {name: {"$eq": value} for name, value in pair.items()}
    if await tags.find_one(filters) is not None:
        return False
    document = {
        "id": ids.generate(md5_checksum("".join(pair.values()))),
        "version": version,
        "creation_utc": (now or datetime.now(UTC)).isoformat(),
        **pair,
    }
    # the first of several who come at once inserts it, under a lock; the others find it
    result = await tags.update_one(filters, document, upsert=True)
    return result.matched_count == 0
