"""Processes with collections of documents."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from parlant.core.persistence.document_database import BaseDocument, identity_loader_for
from workers import Worker, work

from adk_sessions.parlant import SQLDocumentCollection, SQLDocumentDatabase
from adk_sessions.testing.documents import Thing, thing


class Renamed(Thing, total=False):
    """What the next version of the documents has in addition."""

    label: str


async def renamed(document: BaseDocument) -> Any:
    """The next version's loader: documents get a label, and those with a negative number go."""
    found: dict[str, Any] = dict(document)
    if found["number"] < 0:
        raise ValueError("a secret")
    return {**found, "version": "0.2.0", "label": f"label {found['number']}"}


class DocumentWorker(Worker):
    """One process's database; each method is a job."""

    database: SQLDocumentDatabase
    things: SQLDocumentCollection[Any]

    async def open(self, url: str, **options: Any) -> None:
        self.database = SQLDocumentDatabase(url, **options)

    async def close(self) -> None:
        await self.database.close()

    async def start(self, names: list[str], next_version: bool = False) -> str:
        """Opens collections as a store does when it starts; the id of its metadata."""
        schema, loader = (Renamed, renamed) if next_version else (Thing, identity_loader_for(Thing))
        metadata = await self.database.get_or_create_collection(
            "metadata", BaseDocument, identity_loader_for(BaseDocument)
        )
        mine: Any = {"id": str(os.getpid()), "creation_utc": "2026", "version": "0.1.0"}
        if not await metadata.find_one({}):
            await metadata.insert_one(mine)
        for name in names:
            self.things = await self.database.get_or_create_collection(name, schema, loader)
            await self.things.ensure_indexes([])
        found: Any = await metadata.find_one({})
        return str(found["id"])

    async def insert(self, ids: list[str], name: str) -> None:
        for id in ids:
            await self.things.insert_one(thing(id, name=name))

    async def change(self, id: str, writer: str, times: int) -> None:
        """Sets keys of one's own, and adds to a counter of all."""
        where: Any = {"id": {"$eq": id}}

        async def one(n: int) -> None:
            key: Any = {f"{writer}-{n}": n}
            assert (await self.things.update_one(where, key)).matched_count == 1
            assert await self.things.modify(where, lambda now: {**now, "number": now["number"] + 1})

        await asyncio.gather(*(one(n) for n in range(times)))

    async def upsert(self, writer: str, keys: int) -> int:
        """Sets what others set as well, under another id each time; how often it was new."""
        new = 0
        for n in range(keys):
            result = await self.things.update_one(
                {"name": {"$eq": f"key-{n}"}},
                thing(f"{writer}-{n}", name=f"key-{n}", data=writer),
                upsert=True,
            )
            assert result.updated_document is not None
            new += result.matched_count == 0
        return new

    async def delete(self, times: int) -> list[str]:
        """Deletes whatever is first; the ids."""
        deleted = [await self.things.delete_one({}) for _ in range(times)]
        return [one.deleted_document["id"] for one in deleted if one.deleted_document]


if __name__ == "__main__":
    asyncio.run(work(DocumentWorker()))
