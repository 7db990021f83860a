"""Parlant's store of customers for several processes.

Where Parlant's own reads, changes and writes back under a lock of its process, this one changes a
document under one of the database's. A tag is had once, however many give it at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from parlant.core.common import ItemNotFoundError, UniqueId, md5_checksum
from parlant.core.customers import Customer, CustomerDocumentStore, CustomerId
from parlant.core.tags import TagId

from .documents import SQLDocumentCollection
from .sessions import modified


class SQLCustomerStore(CustomerDocumentStore):
    """Customers with their tags, for any number of processes."""

    async def upsert_tag(
        self, customer_id: CustomerId, tag_id: TagId, creation_utc: datetime | None = None
    ) -> bool:
        """Gives a customer a tag; whether it was new."""
        if await self._customers_collection.find_one({"id": {"$eq": customer_id}}) is None:
            raise ItemNotFoundError(item_id=UniqueId(customer_id))
        tags = cast("SQLDocumentCollection[Any]", self._tag_association_collection)
        filters: Any = {"customer_id": {"$eq": customer_id}, "tag_id": {"$eq": tag_id}}
        if await tags.find_one(filters) is not None:
            return False
        document = {
            "id": self._id_generator.generate(md5_checksum(f"{customer_id}{tag_id}")),
            "version": self.VERSION.to_string(),
            "creation_utc": (creation_utc or datetime.now(UTC)).isoformat(),
            "customer_id": customer_id,
            "tag_id": tag_id,
        }
        # the first of several who come at once inserts it, under a lock; the others find it
        return (await tags.update_one(filters, document, upsert=True)).matched_count == 0

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
