"""Parlant's sessions in PostgreSQL: our store, and Parlant's own over documents in JSONB.

Part of `make bench`; by itself: PYTHONPATH=tests python -m benchmarks.parlant
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import click
from parlant.core.agents import AgentId
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import (
    DocumentCollection,
    DocumentDatabase,
    FindResult,
    InsertResult,
    UpdateResult,
)
from parlant.core.sessions import (
    Event,
    EventKind,
    EventSource,
    SessionDocumentStore,
    SessionId,
    SessionStore,
)
from rich.console import Console

from adk_sessions.parlant import parlant_stores

from . import places, report
from .growth import Series
from .measure import Timing
from .scenarios import expect
from .stores import POOL, POOLED

LENGTH = 100  # events of each session
EVENTS = 30_000
SIZES = (3_000, 30_000, 300_000)
SHORT = 400
SHORT_SIZES = (200, 400, 800)
ROUNDS, CALLS, WARM = 10, 10, 5
SESSIONS_TABLE, EVENTS_TABLE = "parlant_sessions_sessions", "parlant_sessions_events"
WORDS = "Could you tell me when the next boat leaves, and whether there is room for two of us? "


# --- the peer: a table of id, version, creation_utc and data JSONB, and a GIN index -------------

COLUMNS = ("id", "version", "creation_utc")
SIGNS = {
    **{"$eq": "=", "$ne": "IS DISTINCT FROM"},
    **{"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="},
}


class Filter:
    """A filter of Parlant's as the text of a condition, and the values of its parameters."""

    def __init__(self, where: Mapping[str, Any]) -> None:
        self.values: list[Any] = []
        self.text = self._all(where)

    def _all(self, where: Mapping[str, Any]) -> str:
        return " AND ".join(self._one(*item) for item in where.items()) or "TRUE"

    def _one(self, field: str, wanted: Any) -> str:
        if field in ("$and", "$or"):
            parts = [f"({self._all(each)})" for each in wanted]
            return f"({f' {field[1:]} '.join(parts)})"
        return " AND ".join(self._compare(field, *item) for item in wanted.items())

    def _compare(self, field: str, sign: str, value: Any) -> str:
        text = field if field in COLUMNS else f"data->>'{field}'"
        match value:
            case bool():
                value = json.dumps(value)
            case int() | float():
                text = f"({text})::numeric"
        self.values.append(value)
        return f"{text} {SIGNS[sign]} ${len(self.values)}"


class RawCollection(DocumentCollection[Any]):
    """As much as Parlant's session store needs for what is measured."""

    def __init__(self, pool: asyncpg.Pool, table: str) -> None:
        self._pool, self._table = pool, table

    async def find(
        self, filters: Any, limit: Any = None, cursor: Any = None, sort_direction: Any = None
    ) -> FindResult[Any]:
        where = Filter(filters)
        rows = await self._pool.fetch(
            f"SELECT data FROM {self._table} WHERE {where.text} ORDER BY creation_utc, id",
            *where.values,
        )
        items = [json.loads(row["data"]) for row in rows]
        return FindResult(items=items, total_count=len(items), has_more=False)

    async def find_one(self, filters: Any, sort: Any = None) -> Any:
        where = Filter(filters)
        order = ", ".join(
            f"data->'{field}' {'DESC' if direction is SortDirection.DESC else 'ASC'}"
            for field, direction in sort or ()
        )
        found = await self._pool.fetchval(
            f"SELECT data FROM {self._table} WHERE {where.text}"
            f" ORDER BY {order or 'creation_utc, id'} LIMIT 1",
            *where.values,
        )
        return found and json.loads(found)

    async def insert_one(self, document: Any) -> InsertResult:
        await self._pool.execute(
            f"INSERT INTO {self._table} (id, version, creation_utc, data) VALUES ($1, $2, $3, $4)",
            *(document[name] for name in COLUMNS),
            json.dumps(document),
        )
        return InsertResult(acknowledged=True)

    async def update_one(
        self, filters: Any, params: Any, upsert: bool = False
    ) -> UpdateResult[Any]:
        where = Filter(filters)
        await self._pool.execute(
            f"UPDATE {self._table} SET data = data || ${len(where.values) + 1} WHERE {where.text}",
            *where.values,
            json.dumps(params),
        )
        return UpdateResult(True, 1, 1, None)

    async def ensure_indexes(self, indexes: Any) -> None:
        """There is the one GIN index."""

    async def delete_one(self, filters: Any) -> Any:
        raise NotImplementedError


class RawDatabase(DocumentDatabase):
    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def get_or_create_collection(
        self, name: str, schema: Any, document_loader: Any
    ) -> RawCollection:
        table = f"parlant_sessions_{name}"
        await self._pool.execute(
            f"CREATE TABLE IF NOT EXISTS {table} (id text PRIMARY KEY, version text,"
            f" creation_utc text, data jsonb)"
        )
        await self._pool.execute(
            f"CREATE INDEX IF NOT EXISTS {table}_data ON {table} USING gin (data)"
        )
        return RawCollection(self._pool, table)

    async def get_collection(self, name: str, schema: Any, document_loader: Any) -> RawCollection:
        return await self.get_or_create_collection(name, schema, document_loader)

    async def create_collection(self, name: str, schema: Any) -> RawCollection:
        return await self.get_or_create_collection(name, schema, None)

    async def delete_collection(self, name: str) -> None:
        raise NotImplementedError


def plain(url: str) -> str:
    return url.replace("postgresql+asyncpg", "postgresql")


@asynccontextmanager
async def raw_store(url: str) -> AsyncIterator[SessionStore]:
    async with (
        asyncpg.create_pool(plain(url), min_size=POOL, max_size=POOL) as pool,
        SessionDocumentStore(RawDatabase(pool), allow_migration=True) as store,
    ):
        yield store


@asynccontextmanager
async def our_store(url: str) -> AsyncIterator[SessionStore]:
    async with parlant_stores(url, **POOLED) as stores:
        yield stores.session_store


STORES = {"ours": our_store, "raw": raw_store}


# --- what is stored before anything is timed ----------------------------------------------------


def identifier(n: int) -> str:
    return f"session-{n:07}"


async def write(store: SessionStore, session_id: str) -> Event:
    return await store.create_event(
        session_id=SessionId(session_id),
        source=EventSource.CUSTOMER,
        kind=EventKind.MESSAGE,
        trace_id="trace",
        data={"message": WORDS * 3, "participant": {"id": "ada", "display_name": "Ada"}},
    )


async def fill(store: SessionStore, url: str, events: int) -> None:
    """Sessions of `LENGTH` events: copies of one that the store itself has written."""
    session = await store.create_session(CustomerId("ada"), AgentId("guide"))
    await write(store, session.id)
    connection = await asyncpg.connect(plain(url))
    try:
        like = dict(await connection.fetchrow(f"SELECT * FROM {SESSIONS_TABLE}"))
        event = dict(await connection.fetchrow(f"SELECT * FROM {EVENTS_TABLE}"))
        sessions = range(events // LENGTH)
        for table, template, changes in (
            (SESSIONS_TABLE, like, ({"id": identifier(n)} for n in sessions)),
            (
                EVENTS_TABLE,
                event,
                (_place(n, offset) for offset in range(LENGTH) for n in sessions),
            ),
        ):
            template.pop("seq", None)
            await connection.copy_records_to_table(
                table,
                columns=list(template),
                records=(tuple(_changed(template, change).values()) for change in changes),
            )
        await connection.execute(f"DELETE FROM {EVENTS_TABLE} WHERE id = $1", event["id"])
        await connection.execute(f"DELETE FROM {SESSIONS_TABLE} WHERE id = $1", like["id"])
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def _place(n: int, offset: int) -> dict[str, Any]:
    time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=offset)
    return {
        "id": f"event-{n:07}-{offset:03}",
        "session_id": identifier(n),
        "offset": offset,
        "creation_utc": time.isoformat(),
    }


def _changed(row: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A row with other values, in its columns and in its document."""
    document = "document" if "document" in row else "data"
    new = {**row, **{name: value for name, value in change.items() if name in row}}
    return {**new, document: json.dumps({**json.loads(row[document]), **change})}


# --- what is timed ------------------------------------------------------------------------------


class Cases:
    """The calls, each on a session chosen by lot; reads from even ones, so that these stay."""

    def __init__(self, store: SessionStore, events: int) -> None:
        self._store, self._sessions = store, events // LENGTH
        self._dice = random.Random(7)
        self._next: dict[str, int] = {}

    def _session(self, odd: int) -> str:
        return identifier(self._dice.randrange(self._sessions // 2) * 2 + odd)

    async def create_event(self) -> float:
        session = self._session(1)
        start = time.perf_counter()
        event = await write(self._store, session)
        took = time.perf_counter() - start
        expect("the offset", event.offset, self._next.setdefault(session, LENGTH))
        self._next[session] += 1
        return took

    async def list_events(self) -> float:
        return await self._listed(LENGTH, None)

    async def poll(self) -> float:
        return await self._listed(0, LENGTH)

    async def _listed(self, wanted: int, min_offset: int | None) -> float:
        session = SessionId(self._session(0))
        start = time.perf_counter()
        events = await self._store.list_events(session, min_offset=min_offset)
        took = time.perf_counter() - start
        expect("number of events", len(events), wanted)
        expect("offsets", [event.offset for event in events], [*range(wanted)])
        return took


CALLS_OF: dict[str, Callable[[Cases], Awaitable[float]]] = {
    "create_event": Cases.create_event,
    "list_100": Cases.list_events,
    "poll": Cases.poll,
}


async def in_turns(cases: Mapping[Any, Cases], *, short: bool) -> dict[str, dict[Any, list[float]]]:
    """Milliseconds by operation and store; the stores take turns."""
    taken: dict[str, dict[Any, list[float]]] = {
        name: {who: [] for who in cases} for name in CALLS_OF
    }
    rounds, calls = (1, 2) if short else (ROUNDS, CALLS)
    order = list(cases)
    for turn in range(rounds + 1):
        for name, call in CALLS_OF.items():
            shift = turn % len(order)
            for who in order[shift:] + order[:shift]:
                gc.collect()
                for _ in range(calls if turn else WARM):
                    seconds = await call(cases[who])
                    if turn:
                        taken[name][who].append(seconds * 1000)
    return taken


@asynccontextmanager
async def filled(
    place: places.Place, wanted: Mapping[Any, tuple[str, int]]
) -> AsyncIterator[dict[Any, Cases]]:
    """By name: the cases on a store, with so many events, in a database of its own."""
    cases = {}
    async with AsyncExitStack() as stack:
        for name, (kind, events) in wanted.items():
            url = stack.enter_context(place.database(f"parlant-{name}"))
            store = await stack.enter_async_context(STORES[kind](url))
            await fill(store, url, events)
            cases[name] = Cases(store, events)
        yield cases


async def measure_parlant(place: places.Place, *, short: bool) -> report.Parlant:
    events, sizes = (SHORT, SHORT_SIZES) if short else (EVENTS, SIZES)
    async with filled(place, {name: (name, events) for name in STORES}) as cases:
        compared = await in_turns(cases, short=short)
    async with filled(place, {size: ("ours", size) for size in sizes}) as cases:
        grown = await in_turns(cases, short=short)
    return report.Parlant(
        events,
        {
            name: {who: Timing(calls) for who, calls in by_store.items()}
            for name, by_store in compared.items()
        },
        [Series(f"{report.PARLANT[name].title}, by events", grown[name]) for name in grown],
    )


@click.command()
@click.option("--short", is_flag=True, help="Small sizes, few calls: for its exit status alone.")
def main(short: bool) -> None:
    """Parlant's sessions in PostgreSQL."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    with places.open_place("postgresql", Path(tempfile.gettempdir())) as place:
        results = report.Results(short=short)
        results.parlant[place.backend] = asyncio.run(measure_parlant(place, short=short))
    report.show(results, console)


if __name__ == "__main__":
    main()
