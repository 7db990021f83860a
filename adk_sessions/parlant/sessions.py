"""A session store of Parlant for several processes: offsets are unique and have no gaps.

Parlant's own store reads, changes and writes back under a lock of its process. Here each operation
is one of the database's, so that nothing is lost or numbered twice when others write the same
session. What documents look like stays Parlant's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, NoReturn, Self, TypeVar, cast

from parlant.core.agents import AgentId
from parlant.core.async_utils import ReaderWriterLock
from parlant.core.common import ItemNotFoundError, JSONSerializable, UniqueId, Version, generate_id
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import BaseDocument
from parlant.core.sessions import (
    Event,
    EventId,
    EventKind,
    EventSource,
    EventUpdateParams,
    Session,
    SessionDocumentStore,
    SessionId,
    SessionListing,
    SessionUpdateParams,
)
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from ..dialects.offsets import Offsets, Placed, offsets_for
from ..errors import DatabaseError, InvalidInputError, OutcomeUnknownError, SchemaError
from ..turns import Turns
from .columns import UNFIT
from .documents import SQLDocumentCollection, SQLDocumentDatabase

T = TypeVar("T")

# Each time that an event is overtaken another one is stored, so this many are never met by chance.
_TRIES = 200
_HIGHEST = 2**63 - 1
_TWICE = (
    "Sessions have several events with the same offset, as other software leaves them when several"
    " processes write a session. Open the store once with migrate=True (SQLSessionStore:"
    " allow_migration=True): they are numbered anew, in their order. The first such session is {}."
)
_UNGUARDED = (
    "The table {} has no unique index on (session_id, offset), and none may be made. Open it once"
    " with create=True, or make the index."
)


class _NoLock:
    """What stands in for the process's lock: operations are the database's."""

    reader_lock: nullcontext[None] = nullcontext()
    writer_lock: nullcontext[None] = nullcontext()


class _Before:
    """What Parlant's loader asks of a store: how far it is to go."""

    VERSION = Version.from_string("0.8.0")


class SQLSessionStore(SessionDocumentStore):
    """Sessions and events of Parlant, for any number of processes.

    It behaves as Parlant's own store does, and besides: an event's offset is its session's next
    one whoever writes, events are listed in the order of their offsets, a filter by labels goes
    with a limit and a cursor, and what several processes change of one session all stays.

    Args:
        database: where the documents are; it is entered and closed by the caller.
        allow_migration: whether documents of older versions may be changed when it is entered, and
            offsets that occur twice.
    """

    def __init__(self, database: SQLDocumentDatabase, allow_migration: bool = False) -> None:
        super().__init__(database, allow_migration)
        self._lock = cast(ReaderWriterLock, _NoLock())
        # tasks of one process need not overtake each other
        self._turns = Turns()
        self._offsets: Offsets

    async def __aenter__(self) -> Self:
        """Opens the collections.

        Raises:
            MigrationRequired: documents are of an older version, and may not be changed.
            ServerOutdated: documents are of a newer version.
            SchemaError: offsets occur twice, and may not be changed; or a table is not as it must.
        """
        await super().__aenter__()
        sessions, events = self._sessions.table, self._events.table
        self._offsets = await self._read(lambda conn: offsets_for(conn, sessions, events))
        if not await self._read(self._offsets.are_unique):
            await self._make_unique()
        return self

    @property
    def _sessions(self) -> SQLDocumentCollection[Any]:
        return cast("SQLDocumentCollection[Any]", self._session_collection)

    @property
    def _events(self) -> SQLDocumentCollection[Any]:
        return cast("SQLDocumentCollection[Any]", self._event_collection)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._events.run(work, write=False)

    def _value(self, field: str, value: Any) -> Any:
        """What an argument is in the events' column.

        Raises:
            InvalidInputError: it is of another type.
        """
        bound = self._events.value(field, value)
        if bound is UNFIT:
            raise InvalidInputError(f"{field} is of another type", field=field)
        return bound

    async def _event_document_loader(self, doc: BaseDocument) -> Any:
        try:
            return await super()._event_document_loader(doc)
        except KeyError as step:
            if step.args != (_Before.VERSION.to_string(),):
                raise
        # Parlant 3.3 lacks the step at which sessions got labels and nothing of an event changed:
        # every event of before it would be rejected
        known = await SessionDocumentStore._event_document_loader(cast(Any, _Before), doc)
        return known and await super()._event_document_loader(
            cast(BaseDocument, {**known, "version": "0.9.0"})
        )

    # --- offsets that other software has left ----------------------------------------------------

    async def _make_unique(self) -> None:
        place, table = self._events._place, self._events.table
        for _ in range(_TRIES):
            await self._renumber()
            if not place.create:
                raise SchemaError(_UNGUARDED.format(table.fullname))
            with suppress(IntegrityError):  # a writer came between
                return await place.transact(self._offsets.make_unique, lock=table)
        raise DatabaseError("Other writers keep numbering events twice.", retryable=True)

    async def _renumber(self) -> None:
        doubled = await self._read(self._offsets.doubled)
        if doubled and not self._allow_migration:
            raise SchemaError(_TWICE.format(repr(doubled[0])))
        for session_id in doubled:

            def work(conn: Connection, session_id: Any = session_id) -> None:
                self._offsets.renumber(conn, session_id, self._moved)

            await self._events._place.transact(work)

    def _moved(self, text: str, offset: int) -> Mapping[str, Any]:
        return self._events.row({**self._events.load(text), "offset": offset})

    # --- sessions --------------------------------------------------------------------------------

    async def delete_session(self, session_id: SessionId) -> None:
        """Deletes a session with its events, those too that others are creating."""
        id = self._value("session_id", session_id)
        await self._events._place.transact(lambda conn: self._offsets.delete(conn, id))

    async def update_session(self, session_id: SessionId, params: SessionUpdateParams) -> Session:
        """Sets what ``params`` names."""
        changed = self._serialize_session_update_params(params)
        return await self._changed(session_id, lambda _: changed, "Session not found")

    async def list_sessions(
        self,
        agent_id: AgentId | None = None,
        customer_id: CustomerId | None = None,
        limit: int | None = None,
        cursor: Cursor | None = None,
        sort_direction: SortDirection | None = None,
        labels: Set[str] | None = None,
    ) -> SessionListing:
        """Lists sessions by creation; with ``labels`` those that have all of them."""
        if not labels:
            return await super().list_sessions(agent_id, customer_id, limit, cursor, sort_direction)
        filters = {
            **({"agent_id": {"$eq": agent_id}} if agent_id else {}),
            **({"customer_id": {"$eq": customer_id}} if customer_id else {}),
        }
        found = await self._sessions.find(
            cast(Where, filters), cursor=cursor, sort_direction=sort_direction
        )
        matching = [one for one in found if set(labels).issubset(one.get("labels", ()))]
        items = matching[:limit]
        more = len(items) < len(matching)
        return SessionListing(
            items=[self._deserialize_session(one) for one in items],
            total_count=len(matching),
            has_more=more,
            next_cursor=_after(items[-1]) if more and items else None,
        )

    async def set_metadata(
        self, session_id: SessionId, key: str, value: JSONSerializable
    ) -> Session:
        """Sets one key; others keep what anybody gives them meanwhile."""
        return await self._changed(
            session_id, lambda now: {"metadata": {**now.get("metadata", {}), key: value}}
        )

    async def unset_metadata(self, session_id: SessionId, key: str) -> Session:
        """Removes one key, if it is there."""

        def without(now: dict[str, Any]) -> dict[str, Any]:
            return {"metadata": {k: v for k, v in now.get("metadata", {}).items() if k != key}}

        return await self._changed(session_id, without)

    async def upsert_labels(self, session_id: SessionId, labels: Set[str]) -> Session:
        """Adds labels."""
        return await self._changed(
            session_id, lambda now: {"labels": sorted({*now.get("labels", ()), *labels})}
        )

    async def remove_labels(self, session_id: SessionId, labels: Set[str]) -> Session:
        """Removes labels."""
        return await self._changed(
            session_id, lambda now: {"labels": sorted({*now.get("labels", ())} - {*labels})}
        )

    async def _changed(
        self,
        session_id: SessionId,
        change: Callable[[dict[str, Any]], Mapping[str, Any]],
        message: str | None = None,
    ) -> Session:
        document = await modified(self._sessions, {"id": {"$eq": session_id}}, change)
        if document is None:
            _not_found(session_id, message)
        return self._deserialize_session(document)

    # --- events ----------------------------------------------------------------------------------

    async def create_event(
        self,
        session_id: SessionId,
        source: EventSource,
        kind: EventKind,
        trace_id: str,
        data: JSONSerializable,
        metadata: Mapping[str, JSONSerializable] = {},
        creation_utc: datetime | None = None,
    ) -> Event:
        """Stores an event under its session's next offset.

        Raises:
            ItemNotFoundError: there is no such session.
            InvalidInputError: the event cannot be stored; nothing was.
        """
        event = Event(
            id=EventId(generate_id()),
            source=source,
            kind=kind,
            creation_utc=creation_utc or datetime.now(UTC),
            offset=0,
            trace_id=trace_id,
            data=data,
            metadata=metadata,
            deleted=False,
        )
        document = cast("dict[str, Any]", self._serialize_event(event, session_id))
        del document["offset"]
        row = self._events.row(document)
        async with self._turns.of(session_id):
            for _ in range(_TRIES):
                placed = await self._place(row)
                if not placed.known:
                    _not_found(session_id, "Session not found")
                if placed.offset is not None:
                    return replace(event, offset=placed.offset)
        raise DatabaseError("Others took each offset before this event could.", retryable=True)

    async def _place(self, row: Mapping[str, Any]) -> Placed:
        def work(conn: Connection) -> Placed:
            self._events._place.statements.check_size(conn, "document", row["document"])
            return self._offsets.place(conn, row)

        try:
            return await self._events.run(work, write=True)
        except IntegrityError:
            return Placed(True, None)

    async def read_event(self, session_id: SessionId, event_id: EventId) -> Event:
        """Reads an event.

        Raises:
            ItemNotFoundError: there is no such session, or no such event.
        """
        found = await self._documents(session_id, {"id": event_id})
        if not found:
            _not_found(event_id, "Event not found")
        return self._deserialize_event(found[0])

    async def delete_event(self, event_id: EventId) -> None:
        """Marks an event as deleted."""
        document = await modified(
            self._events, {"id": {"$eq": event_id}}, lambda _: {"deleted": True}
        )
        if document is None:
            _not_found(event_id, "Event not found")

    async def list_events(
        self,
        session_id: SessionId,
        source: EventSource | None = None,
        trace_id: str | None = None,
        kinds: Sequence[EventKind] = [],
        min_offset: int | None = None,
        exclude_deleted: bool = True,
    ) -> Sequence[Event]:
        """Lists a session's events by their offsets.

        Raises:
            ItemNotFoundError: there is no such session.
        """
        equal: dict[str, Any] = {"session_id": session_id}
        if source:
            equal["source"] = source.value
        if trace_id:
            equal["trace_id"] = trace_id
        if kinds:
            equal["kind"] = [kind.value for kind in kinds]
        if exclude_deleted:
            equal["deleted"] = False
        found = await self._documents(session_id, equal, min_offset)
        # quicker here than on the server, which would carry each document along
        found.sort(key=itemgetter("offset"))
        return [self._deserialize_event(document) for document in found]

    async def _documents(
        self, session_id: SessionId, equal: Mapping[str, Any], min_offset: int | None = None
    ) -> list[Any]:
        id = self._value("session_id", session_id)
        bound = {
            name: value if isinstance(value, list) else self._value(name, value)
            for name, value in equal.items()
        }
        lowest = self._value("offset", min(min_offset, _HIGHEST)) if min_offset else None
        texts = await self._read(
            lambda conn: self._offsets.documents(conn, id, bound, min_offset=lowest)
        )
        if texts is None:
            _not_found(session_id, "Session not found")
        return [self._events.load(text) for text in texts]

    async def update_event(
        self, session_id: SessionId, event_id: EventId, params: EventUpdateParams
    ) -> Event:
        """Sets the data and the metadata of an event that is not deleted."""
        changed: dict[str, Any] = dict(params)
        if "metadata" in changed:
            changed["metadata"] = changed["metadata"] or None
        changed = {key: changed[key] for key in ("metadata", "data") if key in changed}
        filters = {
            "id": {"$eq": ObjectId(event_id)},
            "session_id": {"$eq": session_id},
            "deleted": {"$ne": True},
        }
        document = await modified(self._events, filters, lambda _: changed)
        if document is None:
            _not_found(event_id, "Event not found")
        return self._deserialize_event(document)


async def modified(
    documents: SQLDocumentCollection[Any],
    filters: Mapping[str, Any],
    change: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> Any:
    """Sets keys of the first match, read and written under one lock; None if there is none.

    Args:
        documents: where it is.
        filters: what to look for.
        change: makes the keys, with what they are to be, of what the document is now; they may be
            set twice.
    """

    def changed(now: dict[str, Any]) -> dict[str, Any]:
        return {**now, **change(now)}

    with suppress(OutcomeUnknownError):  # what is set may be set again
        return await documents.modify(cast(Where, filters), changed)
    return await documents.modify(cast(Where, filters), changed)


def _not_found(id: str, message: str | None) -> NoReturn:
    raise ItemNotFoundError(item_id=UniqueId(id), message=message)


def _after(document: Mapping[str, Any]) -> Cursor:
    return Cursor(creation_utc=document["creation_utc"], id=document["id"])
