"""Parlant's session store for several processes: it does what Parlant's own does, and loses nothing
where that one does.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("parlant")

import wire
from engines import engine_for
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.agents import AgentId
from parlant.core.common import ItemNotFoundError
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import Cursor, SortDirection
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.sessions import (
    AgentState,
    Event,
    EventId,
    EventKind,
    EventSource,
    PollingSessionListener,
    Session,
    SessionDocumentStore,
    SessionId,
    SessionStore,
    Timeout,
    _EventDocument,
)
from parlant_workers import say, session_store
from proxy import Proxy
from servers import MariaDB, Postgres, run_sync
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection
from test_plans import (
    Statement,
    assert_indexed_by_mariadb,
    assert_indexed_by_sqlite,
    both_modes,
    explained_by_mariadb,
    explained_by_sqlite,
    plan,
    statements,
    transaction,
)
from workers import Crew

from adk_sessions import InvalidInputError, SchemaError
from adk_sessions.parlant import SQLDocumentDatabase, SQLSessionStore

HERE = Path(__file__).parent
KINDS = ["sqlite", "postgresql", "mariadb"]
SERVERS = {"postgresql": 5432, "mysql": 3306}
# not what begins a transaction that is READ COMMITTED
COMMITS = {"postgresql": "COMMIT;", "mysql": "COMMIT"}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ANN, BOT = CustomerId("ann"), AgentId("bot")
NOWHERE = SessionId("nowhere")

on_each = pytest.mark.parametrize("database_url", KINDS, indirect=True)
on_servers = pytest.mark.parametrize("database_url", KINDS[1:], indirect=True)


@pytest.fixture
def prefix() -> str:
    """Tables of the test's own, in a database that tests share."""
    return f"p{uuid.uuid4().hex[:12]}_"


@pytest.fixture
async def store(database_url: str, prefix: str) -> AsyncIterator[SQLSessionStore]:
    async with session_store(database_url, prefix) as store:
        yield store


def later(seconds: int) -> datetime:
    return NOON + timedelta(seconds=seconds)


async def new_session(store: SessionStore, **more: Any) -> SessionId:
    return (await store.create_session(ANN, BOT, **more)).id


async def said(store: SessionStore, session: SessionId, **filters: Any) -> list[tuple[int, str]]:
    """The offsets of a session's events, and what was said."""
    events = await store.list_events(session, **filters)
    return [(event.offset, cast(Any, event.data)["message"]) for event in events]


async def count(url: str, query: str) -> int:
    async with engine_for(url) as engine, engine.connect() as conn:
        return int((await conn.execute(text(query))).scalar_one())


# --- what Parlant's own store does ---------------------------------------------------------------

# A script does things to a store and notes what comes of them, errors too.
Note = Callable[[Awaitable[Any]], Awaitable[Any]]
Script = Callable[[SessionStore, Note], Awaitable[None]]


async def sessions_are_kept(store: SessionStore, note: Note) -> None:
    session: Session = await note(
        store.create_session(
            ANN, BOT, NOON, "A title", "manual", {"a": {"b": [1, 2.5, None, "ü"]}}, {"x", "y"}
        )
    )
    await note(store.read_session(session.id))
    bare: Session = await note(store.create_session(ANN, BOT, later(1), title=""))
    await note(store.read_session(bare.id))
    await note(store.read_session(NOWHERE))
    state = AgentState("trace", [], {cast(Any, "journey"): ["1", None]})
    await note(store.update_session(session.id, {"title": None, "agent_states": [state]}))
    await note(store.update_session(session.id, {"consumption_offsets": {"client": 7}}))
    await note(store.update_session(session.id, {"mode": "auto", "metadata": {"only": 1}}))
    await note(store.update_session(session.id, {"customer_id": CustomerId("guest")}))
    await note(store.update_session(session.id, {}))
    await note(store.update_session(NOWHERE, {"title": "x"}))
    await note(store.read_session(session.id))
    await note(store.delete_session(session.id))
    await note(store.delete_session(session.id))
    await note(store.read_session(session.id))
    await note(store.list_sessions())


async def metadata_and_labels_change(store: SessionStore, note: Note) -> None:
    session: Session = await note(store.create_session(ANN, BOT, NOON, metadata={"a": 1}))
    for id in (session.id, NOWHERE):
        await note(store.set_metadata(id, "b", {"c": [None, "\0", "\ud800"]}))
        await note(store.set_metadata(id, "a", 2))
        await note(store.unset_metadata(id, "a"))
        await note(store.unset_metadata(id, "never"))
        await note(store.upsert_labels(id, {"x", 'quoted "y"'}))
        await note(store.upsert_labels(id, {"x", "z"}))
        await note(store.remove_labels(id, {"x", "never"}))
    await note(store.read_session(session.id))


async def sessions_are_listed(store: SessionStore, note: Note) -> None:
    for n in range(5):
        customer, agent = CustomerId(f"c{n % 2}"), AgentId(f"a{n % 3}")
        await note(store.create_session(customer, agent, later(n), labels={"all", f"n{n}"}))
    await note(store.list_sessions())
    await note(store.list_sessions(AgentId("a0")))
    await note(store.list_sessions(AgentId("a0"), CustomerId("c1")))
    await note(store.list_sessions(customer_id=CustomerId("c0")))
    await note(store.list_sessions(labels={"all"}))
    await note(store.list_sessions(labels={"all", "n3"}))
    await note(store.list_sessions(labels={"none"}))
    await note(store.list_sessions(limit=0))
    for direction in (None, SortDirection.ASC, SortDirection.DESC):
        cursor: Cursor | None = None
        for _ in range(3):
            page = await note(store.list_sessions(limit=2, cursor=cursor, sort_direction=direction))
            cursor = page.next_cursor


async def events_are_kept(store: SessionStore, note: Note) -> None:
    ids = [(await note(store.create_session(ANN, BOT, later(n), metadata={}))).id for n in range(2)]
    data = {"message": "Grüße 🙂\0\ud800", "nested": [1e300, 1.0, -0.0, True, None, {"": []}]}
    for n, session in enumerate([ids[0], ids[1], ids[0], ids[0], NOWHERE]):
        source = list(EventSource)[n]
        kind = list(EventKind)[n % 4]
        more: dict[str, Any] = {"metadata": {"key": n}} if n % 2 else {}
        await note(
            store.create_event(
                session, source, kind, f"trace-{n % 2}", data, creation_utc=later(n), **more
            )
        )
    for session in (*ids, NOWHERE):
        await note(store.list_events(session))
        await note(store.list_events(session, min_offset=0))
        await note(store.list_events(session, min_offset=1))
        await note(store.list_events(session, min_offset=-3))
        await note(store.list_events(session, min_offset=9))
        await note(store.list_events(session, source=EventSource.CUSTOMER))
        await note(store.list_events(session, trace_id="trace-0"))
        await note(store.list_events(session, trace_id=""))
        await note(store.list_events(session, trace_id="t" * 300))
        await note(store.list_events(session, kinds=[EventKind.MESSAGE, EventKind.STATUS]))
        await note(
            store.list_events(
                session, EventSource.CUSTOMER, "trace-0", [EventKind.MESSAGE], 0, False
            )
        )


async def events_change(store: SessionStore, note: Note) -> None:
    ids = [(await note(store.create_session(ANN, BOT, later(n)))).id for n in range(2)]
    created: list[Event] = [
        await note(
            store.create_event(
                ids[0],
                EventSource.AI_AGENT,
                EventKind.MESSAGE,
                "t",
                {"chunks": []},
                {"a": 1},
                later(n),
            )
        )
        for n in range(2)
    ]
    changed, deleted = (event.id for event in created)
    await note(store.update_event(ids[0], changed, {"data": {"chunks": ["Hel", "lo", None]}}))
    await note(store.update_event(ids[0], changed, {"metadata": {"b": 2}}))
    await note(store.update_event(ids[0], changed, {"metadata": {}}))
    await note(store.update_event(ids[0], changed, {}))
    await note(store.update_event(ids[1], changed, {"data": "of another session"}))
    await note(store.delete_event(deleted))
    await note(store.delete_event(deleted))
    await note(store.delete_event(EventId("never")))
    await note(store.update_event(ids[0], deleted, {"data": "too late"}))
    for session in (*ids, NOWHERE):
        for event in (changed, deleted, EventId("never")):
            await note(store.read_event(session, event))
    await note(store.list_events(ids[0]))
    await note(store.list_events(ids[0], exclude_deleted=False))
    await note(store.list_events(ids[0], min_offset=1, exclude_deleted=False))
    # a deleted event keeps its offset
    await note(
        store.create_event(ids[0], EventSource.SYSTEM, EventKind.STATUS, "t", {}, {}, later(9))
    )
    await note(store.delete_session(ids[0]))
    await note(store.list_events(ids[0]))
    await note(store.read_event(ids[1], changed))


async def run_script(store: SessionStore, script: Script) -> list[Any]:
    """What a script notes, with ids replaced by the order in which they were first seen."""
    noted: list[Any] = []
    names: dict[str, str] = {}

    def named(value: Any) -> Any:
        if isinstance(value, Session | Event):
            id = names.setdefault(value.id, f"#{len(names)}")
            return replace(value, id=cast(Any, id))
        if isinstance(value, Cursor):
            return replace(value, id=cast(Any, names[value.id]))
        if isinstance(value, list):
            return [named(one) for one in value]
        if hasattr(value, "items"):
            page = replace(value, items=named(list(value.items)))
            return replace(page, next_cursor=named(value.next_cursor))
        return value

    async def note(doing: Awaitable[Any]) -> Any:
        try:
            result = await doing
        except ItemNotFoundError as error:
            message = str(error)
            for id, name in names.items():
                message = message.replace(id, name)
            noted.append(message)
            return None
        noted.append(named(result))
        return result

    await script(store, note)
    return noted


@on_each
@pytest.mark.parametrize(
    "script",
    [
        sessions_are_kept,
        metadata_and_labels_change,
        sessions_are_listed,
        events_are_kept,
        events_change,
    ],
)
async def test_it_does_what_parlants_own_store_does(store: SQLSessionStore, script: Script) -> None:
    async with SessionDocumentStore(TransientDocumentDatabase()) as own:
        expected = await run_script(own, script)
    assert await run_script(store, script) == expected


@on_each
async def test_parlants_own_store_reads_what_it_wrote(
    store: SQLSessionStore, database_url: str, prefix: str
) -> None:
    session = await new_session(store, metadata={"a": 1}, labels={"x"})
    await say(store, session, "hello", metadata={"m": 1})
    deleted = await say(store, session, "oh no")
    await store.delete_event(deleted.id)
    async with (
        SQLDocumentDatabase(database_url, prefix=prefix) as database,
        SessionDocumentStore(database) as own,
    ):
        assert await own.read_session(session) == await store.read_session(session)
        for exclude in (True, False):
            events = await own.list_events(session, exclude_deleted=exclude)
            assert events == await store.list_events(session, exclude_deleted=exclude)
        assert (await say(own, session, "from Parlant's own")).offset == 2
    assert (await say(store, session, "and on")).offset == 3


# --- what it does better -------------------------------------------------------------------------


@on_each
async def test_labels_are_a_filter_with_limit_and_cursor(store: SQLSessionStore) -> None:
    """Parlant's own store filters the page, so it may be empty though more would follow."""
    ids = [
        await new_session(store, creation_utc=later(n), labels={"odd", "n"} if n % 2 else {"n"})
        for n in range(7)
    ]
    for direction, expected in ((None, ids[1::2]), (SortDirection.DESC, ids[1::2][::-1])):
        found, cursor = [], None
        for left in (3, 1):
            page = await store.list_sessions(
                labels={"odd", "n"}, limit=2, cursor=cursor, sort_direction=direction
            )
            cursor = page.next_cursor
            assert (page.total_count, page.has_more) == (left, left == 3)
            found += [session.id for session in page.items]
        assert cursor is None
        assert found == expected
    nothing = await store.list_sessions(labels={"odd"}, limit=0)
    assert (list(nothing.items), nothing.has_more, nothing.total_count) == ([], True, 3)


@on_each
async def test_events_are_listed_by_their_offsets(store: SQLSessionStore) -> None:
    """Clocks of several processes differ, so the time of an event is no order."""
    session = await new_session(store)
    for n in range(3):
        await say(store, session, f"{n}", creation_utc=later(-n))
    assert await said(store, session) == [(0, "0"), (1, "1"), (2, "2")]


@on_each
async def test_a_refused_event_takes_no_offset(store: SQLSessionStore) -> None:
    session = await new_session(store)
    with pytest.raises(InvalidInputError):
        await say(store, session, "", data={"an object": object()})
    assert (await say(store, session, "fine")).offset == 0


@on_each
async def test_a_long_poll_returns_when_another_store_adds_an_event(
    store: SQLSessionStore, database_url: str, prefix: str
) -> None:
    session = await new_session(store)
    await say(store, session, "first")
    listener = PollingSessionListener(store)
    async with session_store(database_url, prefix) as other:
        waiting = asyncio.create_task(
            listener.wait_for_more_events(
                session, [EventKind.MESSAGE], 1, EventSource.CUSTOMER, timeout=Timeout(30)
            )
        )
        await say(other, session, "second")
        assert await waiting


# --- several processes ---------------------------------------------------------------------------

PROCESSES, TASKS, EVENTS = 3, 8, 5


@pytest.fixture(scope="module")
def processes() -> Iterator[Crew]:
    with Crew(PROCESSES, script=str(HERE / "parlant_workers.py")) as crew:
        yield crew


@pytest.fixture
def crew(processes: Crew, store: SQLSessionStore, database_url: str, prefix: str) -> Iterator[Crew]:
    processes.open(database_url, prefix=prefix)
    yield processes
    processes.close()


@pytest.fixture
def crew_behind_pooler(
    processes: Crew, store: SQLSessionStore, pgbouncer_url: str, prefix: str
) -> Iterator[Crew]:
    processes.open(f"{pgbouncer_url}?pgbouncer=true", prefix=prefix)
    yield processes
    processes.close()


async def write_at_once(crew: Crew, store: SessionStore) -> None:
    """Three processes with eight tasks each write one session."""
    session = await new_session(store)
    jobs = [
        {"session": session, "writer": f"p{n}", "tasks": TASKS, "events": EVENTS}
        for n in range(PROCESSES)
    ]
    told: dict[str, int] = {}
    for reply in await asyncio.to_thread(crew.run, "write", jobs):
        told |= reply
    assert len(told) == PROCESSES * TASKS * EVENTS
    stored = await said(store, session)
    assert [offset for offset, _ in stored] == list(range(len(told)))
    assert {message: offset for offset, message in stored} == told
    for writer in range(PROCESSES):
        for task in range(TASKS):
            mine = [told[f"p{writer}-{task}-{n}"] for n in range(EVENTS)]
            assert mine == sorted(mine), "an earlier event of a task has a higher offset"


@on_each
async def test_processes_that_write_one_session_leave_no_gap_and_no_double(
    crew: Crew, store: SQLSessionStore
) -> None:
    await write_at_once(crew, store)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_processes_behind_a_pooler_leave_no_gap_and_no_double(
    crew_behind_pooler: Crew, store: SQLSessionStore
) -> None:
    await write_at_once(crew_behind_pooler, store)


@on_each
async def test_what_processes_change_of_a_session_all_stays(
    crew: Crew, store: SQLSessionStore
) -> None:
    each, names = 6, [f"p{n}" for n in range(PROCESSES)]
    old = {f"old-{name}-{n}" for name in names for n in range(each)}
    session = await new_session(store, metadata=dict.fromkeys(old, 0), labels=old)
    jobs = [{"session": session, "writer": name, "count": each} for name in names]
    await asyncio.to_thread(crew.run, "note", jobs)
    found = await store.read_session(session)
    assert found.metadata == {f"{name}-{n}": n for name in names for n in range(each)}
    assert found.labels == {f"{name}-{n}" for name in names for n in range(each)}
    assert found.title in names


@on_each
async def test_a_session_deleted_under_its_writers_leaves_no_event(
    crew: Crew, store: SQLSessionStore, database_url: str, prefix: str
) -> None:
    sessions = [await new_session(store) for _ in range(12)]
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("talk_until_deleted", {"sessions": sessions}),
        ("talk_until_deleted", {"sessions": sessions}),
        ("delete", {"sessions": sessions, "after": 3}),
    ]
    created = sum(await asyncio.to_thread(crew.run_all, jobs))
    assert created >= 3 * len(sessions)
    assert await count(database_url, f"SELECT count(*) FROM {prefix}events") == 0


# --- lost connections ----------------------------------------------------------------------------


@asynccontextmanager
async def by_proxy(
    database_url: str, prefix: str
) -> AsyncIterator[tuple[str, Proxy, SQLSessionStore]]:
    """The kind of a database, a proxy to it, and a store that goes through that."""
    target = make_url(database_url)
    kind = target.get_backend_name()
    async with Proxy(target.host or "", target.port or SERVERS[kind]) as proxy:
        through = target.set(host="127.0.0.1", port=proxy.port)
        async with session_store(through, prefix) as store:
            yield kind, proxy, store


@on_servers
@pytest.mark.parametrize("lose", ["request", "reply"])
async def test_an_event_whose_connection_is_cut_is_stored_once(
    database_url: str, prefix: str, lose: Any
) -> None:
    async with by_proxy(database_url, prefix) as (kind, proxy, store):
        session = await new_session(store)
        markers = ["the event"] if kind == "postgresql" else []
        for n, marker in enumerate(markers or ["the event", "COMMIT"]):
            proxy.cut(marker, lose=lose)
            event = await say(store, session, f"the event {n}")
            assert proxy.fired == n + 1
            assert event.offset == n
        assert (await say(store, session, "and on")).offset == proxy.fired
        stored = await said(store, session)
    assert stored == [*((n, f"the event {n}") for n in range(proxy.fired)), (proxy.fired, "and on")]


@on_servers
@pytest.mark.parametrize("lose", ["request", "reply"])
async def test_a_change_whose_commit_is_cut_off_is_made(
    database_url: str, prefix: str, lose: Any
) -> None:
    async with by_proxy(database_url, prefix) as (kind, proxy, store):
        session = await new_session(store, metadata={"a": 1})
        proxy.cut(COMMITS[kind], lose=lose)
        changed = await store.set_metadata(session, "b", 2)
        assert proxy.fired == 1
        assert changed.metadata == {"a": 1, "b": 2}
        assert await store.read_session(session) == changed


@on_servers
async def test_a_session_whose_deletion_is_cut_off_is_deleted(
    database_url: str, prefix: str
) -> None:
    async with by_proxy(database_url, prefix) as (kind, proxy, store):
        session = await new_session(store)
        await say(store, session, "hello")
        proxy.cut(COMMITS[kind], lose="reply")
        await store.delete_session(session)
        assert proxy.fired == 1
        assert await count(database_url, f"SELECT count(*) FROM {prefix}events") == 0


# --- what it costs -------------------------------------------------------------------------------


@on_servers
async def test_reads_and_events_are_few_round_trips(database_url: str, prefix: str) -> None:
    target = make_url(database_url)
    port = target.port or SERVERS[target.get_backend_name()]
    with wire.proxy(target.host or "", port) as line:
        async with session_store(line.url(database_url), prefix) as store:
            session = await new_session(store)
            event = await say(store, session, "hello")
            calls: dict[str, Callable[[], Awaitable[Any]]] = {
                "list": lambda: store.list_events(session, min_offset=1),
                "empty": lambda: store.list_events(session, kinds=[EventKind.CUSTOM]),
                "read": lambda: store.read_event(session, event.id),
                "create": lambda: say(store, session, "again"),
            }
            trips: dict[str, int] = {}
            for name, call in calls.items():
                for _ in range(3):  # a driver prepares what it has not met
                    await line.settled()
                    line.reset()
                    await call()
                    await line.settled()
                trips[name] = line.trips
    if target.get_backend_name() == "postgresql":
        expected = {"list": 1, "empty": 1, "read": 1, "create": 1}
    else:  # a read ends its transaction; an event is a lock, a look, an INSERT and a COMMIT
        expected = {"list": 2, "empty": 2, "read": 2, "create": 4}
    assert trips == expected


LONG, OTHERS, FEW = 1_500, 150, 10


async def fill(url: str) -> str:
    """Tables without a prefix: one long session among many short ones."""
    async with (
        SQLDocumentDatabase(url) as database,
        SQLSessionStore(database) as store,
        engine_for(url) as engine,
    ):
        events = await database.get_collection(
            "events", _EventDocument, identity_loader_for(_EventDocument)
        )
        sessions = {"long": LONG, **{f"short-{n}": FEW for n in range(OTHERS)}}
        rows = []
        for session, length in sessions.items():
            created = await store.create_session(ANN, BOT)
            rows += [
                events.row(
                    {
                        "id": f"{session}-{n}",
                        "version": store.VERSION.to_string(),
                        "creation_utc": later(n).isoformat(),
                        "session_id": created.id,
                        "source": "customer",
                        "kind": "message",
                        "offset": n,
                        "trace_id": f"trace-{n // 4}",
                        "data": {"message": "words " * 20},
                        "metadata": None,
                        "deleted": False,
                    }
                )
                for n in range(length)
            ]
        async with engine.begin() as conn:
            await conn.execute(events.table.insert(), rows)
        analyze = {"postgresql": "ANALYZE", "mysql": "ANALYZE TABLE sessions, events"}
        if statement := analyze.get(engine.dialect.name):
            alone = engine.execution_options(isolation_level="AUTOCOMMIT")
            async with alone.connect() as conn:
                await conn.exec_driver_sql(statement)
    return url


@dataclass(frozen=True)
class Caught:
    """What calls on the long session execute."""

    poll: list[Statement]
    create: list[Statement]


async def caught(url: str) -> Caught:
    with statements(url) as found:
        async with session_store(url, "") as store:
            sessions = (await store.list_sessions(limit=1)).items
            session = sessions[0].id
            await store.list_events(session, EventSource.CUSTOMER, "trace-374", [EventKind.MESSAGE])
            found.clear()
            polled = await store.list_events(
                session, EventSource.CUSTOMER, kinds=[EventKind.MESSAGE], min_offset=LONG - 5
            )
            poll = list(found)
            assert len(polled) == 5
            found.clear()
            event = await say(store, session, "hello")
            create = list(found)
            assert event.offset == LONG
    async with engine_for(url) as engine, engine.begin() as conn:
        await conn.execute(text("DELETE FROM events WHERE id = :id"), {"id": event.id})
    return Caught(poll, create)


@pytest.fixture(scope="module")
def on_postgres(postgres: Postgres) -> Iterator[str]:
    with postgres.scratch_database() as url:
        yield run_sync(fill(url))


@both_modes
async def test_a_long_poll_and_an_event_on_postgresql_look_at_new_events_alone(
    on_postgres: str, mode: str
) -> None:
    found = await caught(on_postgres)
    assert len(found.poll) == len(found.create) == 1
    async with transaction(on_postgres) as conn:
        polled = await plan(conn, found.poll[0], mode)
    polled.assert_indexed()
    assert polled.events == 5
    async with transaction(on_postgres) as conn:
        created = await plan(conn, found.create[0], mode)
    created.assert_indexed()
    assert created.events <= 1


async def test_a_long_poll_and_an_event_on_mariadb_look_at_new_events_alone(
    mariadb: MariaDB,
) -> None:
    with mariadb.scratch_database() as url:
        await fill(url)
        found = await caught(url)
        assert len(found.poll) == 1
        assert_indexed_by_mariadb(await explained_by_mariadb(url, found.poll), 6)
        assert_indexed_by_mariadb(await explained_by_mariadb(url, found.create), 1)


async def test_a_long_poll_and_an_event_on_sqlite_look_at_new_events_alone(tmp_path: Path) -> None:
    url = await fill(f"sqlite:///{tmp_path}/plans.db")
    found = await caught(url)
    lines, steps = explained_by_sqlite(url, found.poll)
    assert_indexed_by_sqlite(lines)
    assert steps < 1_000
    lines, steps = explained_by_sqlite(url, found.create)
    assert_indexed_by_sqlite(lines)
    assert steps < 1_000


# --- offsets that other software has left --------------------------------------------------------


async def leave_doubles(url: str, prefix: str) -> tuple[SessionId, SessionId]:
    """What Parlant's own store leaves when several processes write one session.

    Offsets 0, 1, 1, 1, 2, 5 in one session, and 0, 1 in another.
    """
    async with (
        SQLDocumentDatabase(url, prefix=prefix) as database,
        SessionDocumentStore(database) as own,
    ):
        events = await database.get_collection(
            "events", _EventDocument, identity_loader_for(_EventDocument)
        )
        doubled, sound = [await new_session(own) for _ in range(2)]
        # the order among equals is that of the time, and then of the id
        for n, (offset, seconds) in enumerate([(0, 9), (1, 3), (1, 1), (1, 2), (2, 0), (5, 0)]):
            event = await say(own, doubled, f"{offset}.{seconds}", creation_utc=later(seconds))
            assert event.offset == n if n < 2 else True
            await events.update_one({"id": {"$eq": event.id}}, cast(Any, {"offset": offset}))
        for _ in range(2):
            await say(own, sound, "sound")
    return doubled, sound


@on_each
async def test_offsets_that_occur_twice_are_numbered_anew(database_url: str, prefix: str) -> None:
    doubled, sound = await leave_doubles(database_url, prefix)
    with pytest.raises(SchemaError, match=r"(?s)same offset.*migrate=True.*" + doubled):
        async with session_store(database_url, prefix, migrate=False):
            pass
    # several processes that start at once
    async with AsyncExitStack() as stack:
        stores = await asyncio.gather(
            *(
                stack.enter_async_context(session_store(database_url, prefix))
                for _ in range(1 if database_url.startswith("sqlite") else 3)
            )
        )
        messages = ["0.9", "1.1", "1.2", "1.3", "2.0", "5.0"]
        offsets = [0, 1, 2, 3, 4, 5]
        expected = list(zip(offsets, messages, strict=True))
        assert await said(stores[0], doubled) == expected
        # in the documents, and where they are looked for
        assert await said(stores[0], doubled, min_offset=3) == expected[3:]
        assert [offset for offset, _ in await said(stores[0], sound)] == [0, 1]
        assert (await say(stores[0], doubled, "next")).offset == 6
    async with session_store(database_url, prefix, migrate=False) as store:
        assert len(await said(store, doubled)) == 7


@on_each
async def test_a_table_without_the_index_is_not_written_where_none_may_be_made(
    database_url: str, prefix: str
) -> None:
    async with (
        SQLDocumentDatabase(database_url, prefix=prefix) as database,
        SessionDocumentStore(database) as own,
    ):
        await new_session(own)
    with pytest.raises(SchemaError, match="no unique index on"):
        async with session_store(database_url, prefix, create=False):
            pass
    async with session_store(database_url, prefix):
        pass
    async with session_store(database_url, prefix, create=False) as store:
        assert (await say(store, await new_session(store), "hello")).offset == 0


@on_servers
async def test_an_engine_of_the_applications_own_does_as_well(
    database_url: str, prefix: str
) -> None:
    """It may be in REPEATABLE READ, where a snapshot is older than the row that was waited for."""
    async with (
        engine_for(database_url, isolation_level="REPEATABLE READ") as engine,
        session_store(engine, prefix) as one,
        session_store(database_url, prefix) as another,
    ):
        session = await new_session(one)
        created = await asyncio.gather(
            *(say(store, session, f"{n}") for n in range(10) for store in (one, another))
        )
        assert sorted(event.offset for event in created) == list(range(20))
        assert [offset for offset, _ in await said(one, session)] == list(range(20))


@on_each
async def test_a_documents_offset_is_its_last_key_and_its_column(
    store: SQLSessionStore, database_url: str, prefix: str
) -> None:
    """Other software reads documents, and filters by columns."""
    session = await new_session(store)
    for n in range(2):
        await say(store, session, f"{n}")
    async with engine_for(database_url) as engine, engine.connect() as conn:
        rows = await documents(conn, f"{prefix}events")
    assert [json.loads(document)["offset"] for _, document in rows] == [0, 1]
    assert [offset for offset, _ in rows] == [0, 1]


async def documents(conn: AsyncConnection, table: str) -> Sequence[Any]:
    quoted = conn.dialect.identifier_preparer.quote("offset")
    return (await conn.execute(text(f"SELECT {quoted}, document FROM {table} ORDER BY 1"))).all()
