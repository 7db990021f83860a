"""What a call costs where no wire shows it: in the server's plans and its log, and in this process.

The statements are the very ones that a service executes, with their parameters: they are caught on
their way to the driver, and then explained.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from json import JSONDecoder
from typing import Any, ClassVar, Self

import pytest
from engines import engine_for
from pydantic import BaseModel, model_validator
from servers import MariaDB, Postgres, run_sync
from sqlalchemy import Engine, insert, literal, make_url, select
from sqlalchemy import event as hooks
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from adk_sessions import (
    Event,
    EventActions,
    ListSessionsResponse,
    Session,
    SessionService,
    Store,
    codec,
)
from adk_sessions.models import INDEX, PAGE_INDEXES, models

APP, USER, LONG = "shop", "ann", "long"
USERS, SESSIONS, LENGTH, OTHER_APPS = 100, 300, 1_000, 9
# The long session's events are a second apart, the last at END.
END = datetime(2026, 1, 1)
LAST = 20
EXPLAINABLE = {"SELECT", "WITH", "INSERT", "UPDATE", "DELETE"}

Call = Callable[[SessionService], Awaitable[Any]]


@dataclass(frozen=True)
class Statement:
    """A statement as the driver gets it."""

    sql: str
    parameters: Any


@contextmanager
def statements(url: str) -> Iterator[list[Statement]]:
    """Catches what engines of this process execute, apart from what only begins or ends.

    On SQLite the driver itself is listened to, since not all goes through SQLAlchemy, on the
    connections that are made from now on; it tells statements with their parameters in place.
    """
    found: list[Statement] = []

    def keep(sql: str, parameters: Any = ()) -> None:
        if sql.split()[0].upper() in EXPLAINABLE:
            found.append(Statement(sql, parameters))

    def execute(_conn: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        keep(sql, parameters)

    def connect(connection: Any, _record: Any) -> None:
        connection.set_trace_callback(keep)

    hook = ("connect", connect) if url.startswith("sqlite") else ("before_cursor_execute", execute)
    hooks.listen(Engine, *hook)
    try:
        yield found
    finally:
        hooks.remove(Engine, *hook)


def before_end(seconds: float) -> float:
    """The epoch time of the long session's event so many seconds before its last."""
    return END.replace(tzinfo=UTC).timestamp() - seconds


# --- a database with a long session among many short ones --------------------------------------


async def fill(service: SessionService, engine: AsyncEngine) -> None:
    """Rows as appends leave them, but all at once."""
    models = service.models

    def event(user: str, session: str, number: int, at: datetime) -> dict[str, Any]:
        id_ = f"event-{number}"
        data = {
            "id": id_,
            "invocation_id": "1",
            "author": "user",
            "timestamp": at.replace(tzinfo=UTC).timestamp(),
            "content": f"{number} " + "words " * 30,
        }
        return {
            "app_name": APP,
            "user_id": user,
            "session_id": session,
            "id": id_,
            "invocation_id": "1",
            "timestamp": at,
            "event_data": data,
        }

    others = [(f"user-{n % USERS}", f"session-{n}") for n in range(SESSIONS)]
    times = {"create_time": END, "update_time": END}
    sessions = [
        {"app_name": APP, "user_id": user, "id": id_, "state": {"topic": "t" * 50}, **times}
        for user, id_ in [*others, (USER, LONG)]
    ]
    events = [
        event(user, id_, number, END - timedelta(seconds=2 - number))
        for user, id_ in others
        for number in range(3)
    ]
    events += [
        event(USER, LONG, number, END - timedelta(seconds=LENGTH - 1 - number))
        for number in range(LENGTH)
    ]
    users = [
        {"app_name": APP, "user_id": user, "state": {"name": user}, "update_time": END}
        for user in [USER, *(f"user-{n}" for n in range(USERS))]
    ]
    apps = [{"app_name": APP, "state": {"open": True}, "update_time": END}]
    async with engine.begin() as conn:
        rows: list[tuple[Any, list[dict[str, Any]]]] = [
            (models.sessions, sessions),
            (models.events, events),
            (models.app_states, apps),
            (models.user_states, users),
        ]
        for table, values in rows:
            await conn.execute(insert(table), values)
        # as many again for other apps: who asks for all of a table is best served without an index
        for table, n in itertools.product((models.sessions, models.events), range(OTHER_APPS)):
            given = [column.name for column in table.c]
            source = [
                literal(f"app-{n}") if name == "app_name" else table.c[name] for name in given
            ]
            rows_of_app = select(*source).where(table.c.app_name == APP)
            await conn.execute(insert(table).from_select(given, rows_of_app))


# What a server does by itself after a while; nobody does it to an SQLite file.
ANALYZE = {"postgresql": "VACUUM (ANALYZE)", "mysql": "ANALYZE TABLE sessions, events"}


async def prepare(url: str) -> str:
    """Makes the tables and fills them; the URL."""
    async with SessionService(url) as service, engine_for(url) as engine:
        await service.prepare_tables()
        await fill(service, engine)
        if analyze := ANALYZE.get(engine.dialect.name):
            alone = engine.execution_options(isolation_level="AUTOCOMMIT")
            async with alone.connect() as conn:
                await conn.exec_driver_sql(analyze)
    return url


@pytest.fixture(scope="module")
def on_postgres(postgres: Postgres) -> Iterator[str]:
    with postgres.scratch_database() as url:
        yield run_sync(prepare(url))


@pytest.fixture(scope="module")
def on_mariadb(mariadb: MariaDB) -> Iterator[str]:
    with mariadb.scratch_database() as url:
        yield run_sync(prepare(url))


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_sync(prepare(f"sqlite:///{tmp_path_factory.mktemp('plans')}/long.db"))


# --- calls, and how many events each needs to look at ------------------------------------------


def get(session: str = LONG, **filters: Any) -> Call:
    key: dict[str, Any] = {"app_name": APP, "user_id": USER, "session_id": session}
    return lambda service: service.get_session(**key, **filters)


READS: dict[str, tuple[Call, int]] = {
    "all": (get(), LENGTH),
    "no events": (get(num_recent_events=0), 0),
    "last": (get(num_recent_events=LAST), LAST),
    # the column may be a microsecond older than the event's own time, so one more is looked at
    "after": (get(after_timestamp=before_end(50)), 52),
    "last after": (get(num_recent_events=LAST, after_timestamp=before_end(LENGTH / 2)), LAST),
    "list": (lambda service: service.list_sessions(app_name=APP), 0),
    "list of a user": (lambda service: service.list_sessions(app_name=APP, user_id="user-1"), 0),
}


async def caught(url: str, call: Call) -> list[Statement]:
    """What one call of a service that is ready executes."""
    with statements(url) as found:
        async with SessionService(url) as service:
            await call(service)
            found.clear()
            await call(service)
    return found


async def caught_append(url: str, delta: dict[str, Any]) -> tuple[list[Statement], str, str]:
    """What an append to the long session executes, the event's id, and the revision before it."""
    event = Event(author="user", content="hello", actions=EventActions(state_delta=delta))
    with statements(url) as found:
        async with SessionService(url) as service:
            session = await get(num_recent_events=0)(service)
            await service.append_event(session, Event(author="user", content="warm"))
            revision = session._storage_update_marker
            found.clear()
            await service.append_event(session, event)
    return found, event.id, revision


DELTAS: dict[str, dict[str, Any]] = {
    "no delta": {},
    "deltas": {"key": 1, "user:key": 1, "app:key": 1},
}
with_deltas = pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)


# --- PostgreSQL --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What of a plan matters here.

    Attributes:
        nodes: kinds of nodes, each with the table or index that it reads.
        events, sessions: rows of these tables that were read.
    """

    nodes: set[tuple[str, str | None]]
    events: int
    sessions: int

    @classmethod
    def of(cls, root: dict[str, Any]) -> Plan:
        nodes: set[tuple[str, str | None]] = set()
        rows = {"events": 0, "sessions": 0}
        left = [root]
        while left:
            node = left.pop()
            left += node.get("Plans", [])
            place = node.get("Index Name") or node.get("Relation Name")
            nodes.add((node["Node Type"], place))
            if (table := node.get("Relation Name")) in rows and "Scan" in node["Node Type"]:
                refused = node.get("Rows Removed by Filter", 0)
                rows[table] += (node["Actual Rows"] + refused) * node["Actual Loops"]
        return cls(nodes, rows["events"], rows["sessions"])

    def assert_indexed(self) -> None:
        sorts = {node for node in self.nodes if "Sort" in node[0]}
        scans = {node for node in self.nodes if node[0] == "Seq Scan"}
        assert not sorts
        assert not scans & {("Seq Scan", "events"), ("Seq Scan", "sessions")}


async def plan(conn: AsyncConnection, statement: Statement, mode: str) -> Plan:
    """A statement's plan, with what it really read; the connection's transaction is for that.

    Args:
        conn: in a transaction that will be rolled back.
        statement: as caught.
        mode: whether the server plans for these parameters, or once for all, as it may do for a
            prepared statement from its sixth execution on.
    """
    values = ", ".join(
        "NULL" if value is None else "'" + str(value).replace("'", "''") + "'"
        for value in statement.parameters
    )
    await conn.exec_driver_sql(f"SET LOCAL plan_cache_mode = {mode}")
    await conn.exec_driver_sql(f"PREPARE caught AS {statement.sql}")
    explain = "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE caught"
    found = (await conn.exec_driver_sql(f"{explain}({values})")).scalar_one()
    await conn.exec_driver_sql("DEALLOCATE caught")
    return Plan.of((json.loads(found) if isinstance(found, str) else found)[0]["Plan"])


@asynccontextmanager
async def transaction(url: str) -> AsyncIterator[AsyncConnection]:
    """A transaction that leaves nothing."""
    async with engine_for(url) as engine, engine.connect() as conn:
        yield conn
        await conn.rollback()


both_modes = pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])


@both_modes
@pytest.mark.parametrize("name", READS)
async def test_a_read_on_postgresql_reads_what_it_returns(
    on_postgres: str, name: str, mode: str
) -> None:
    call, most = READS[name]
    (statement,) = await caught(on_postgres, call)
    async with transaction(on_postgres) as conn:
        found = await plan(conn, statement, mode)
    found.assert_indexed()
    assert found.events <= most
    # where it is told the values and finds few sessions of that user, the planner takes an index
    # of pages for as good as the key
    keys = {"sessions_pkey"}
    if mode == "force_custom_plan" or name.startswith("list"):
        keys |= set(PAGE_INDEXES)
    assert keys & {place for _, place in found.nodes}
    if most:
        assert any(place == INDEX for _, place in found.nodes)


@both_modes
@with_deltas
async def test_an_append_on_postgresql_looks_at_the_newest_event_alone(
    on_postgres: str, delta: dict[str, Any], mode: str
) -> None:
    (statement,), event_id, revision = await caught_append(on_postgres, delta)
    async with transaction(on_postgres) as conn:
        # as it was before the append, or the statement finds nothing to do
        await conn.exec_driver_sql(f"DELETE FROM events WHERE id = '{event_id}'")
        await conn.exec_driver_sql(
            f"UPDATE sessions SET update_time = '{revision}' WHERE id = '{LONG}'"
        )
        found = await plan(conn, statement, mode)
    found.assert_indexed()
    assert ("Index Only Scan", INDEX) in found.nodes or ("Index Scan", INDEX) in found.nodes
    assert found.events == 1


# --- MariaDB and SQLite ------------------------------------------------------------------------


async def explained_by_mariadb(url: str, found: Sequence[Statement]) -> list[dict[str, Any]]:
    """The plan of each, with ``r_rows``, the rows that were really read, where it only reads."""
    rows: list[dict[str, Any]] = []
    async with transaction(url) as conn:
        for each in found:
            how = "ANALYZE" if each.sql.startswith("SELECT") else "EXPLAIN"
            result = await conn.exec_driver_sql(f"{how} {each.sql}", each.parameters)
            # of an INSERT's own table it says ALL, and means nothing
            rows += [dict(row) for row in result.mappings() if row["select_type"] != "INSERT"]
    return rows


def assert_indexed_by_mariadb(rows: list[dict[str, Any]], most: int) -> None:
    tables = [row for row in rows if row["table"] in ("sessions", "events")]
    assert tables
    assert [row for row in rows if "filesort" in (row["Extra"] or "")] == []
    assert [row for row in tables if row["type"] in ("ALL", "index") or not row["key"]] == []
    read = [float(row.get("r_rows") or 0) for row in tables if row["table"] == "events"]
    assert sum(read) <= most


@pytest.mark.parametrize("name", READS)
async def test_a_read_on_mariadb_reads_what_it_returns(on_mariadb: str, name: str) -> None:
    call, most = READS[name]
    rows = await explained_by_mariadb(on_mariadb, await caught(on_mariadb, call))
    assert_indexed_by_mariadb(rows, most)
    if most:
        assert INDEX in {row["key"] for row in rows if row["table"] == "events"}


@with_deltas
async def test_an_append_on_mariadb_looks_at_the_newest_event_alone(
    on_mariadb: str, delta: dict[str, Any]
) -> None:
    found, _, _ = await caught_append(on_mariadb, delta)
    assert_indexed_by_mariadb(await explained_by_mariadb(on_mariadb, found), 1)


def explained_by_sqlite(url: str, found: Sequence[Statement]) -> tuple[list[str], int]:
    """The lines of the plans, and how many steps the engine took, to the next ten."""
    assert found
    lines: list[str] = []
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 10

    with closing(sqlite3.connect(make_url(url).database or "", isolation_level=None)) as conn:
        conn.execute("BEGIN")
        for each in found:
            lines += [
                row[-1] for row in conn.execute(f"EXPLAIN QUERY PLAN {each.sql}", each.parameters)
            ]
            if not each.sql.startswith("INSERT"):  # the event is there by now
                conn.set_progress_handler(step, 10)
                conn.execute(each.sql, each.parameters).fetchall()
                conn.set_progress_handler(None, 0)
        conn.execute("ROLLBACK")
    return lines, steps


def assert_indexed_by_sqlite(lines: list[str]) -> None:
    assert [line for line in lines if "TEMP B-TREE" in line] == []
    assert [line for line in lines if line.startswith(("SCAN events", "SCAN sessions"))] == []


@pytest.mark.parametrize("name", READS)
async def test_a_read_on_sqlite_reads_what_it_returns(on_sqlite: str, name: str) -> None:
    call, most = READS[name]
    lines, steps = explained_by_sqlite(on_sqlite, await caught(on_sqlite, call))
    assert_indexed_by_sqlite(lines)
    if most:
        assert [line for line in lines if line.startswith("SEARCH events") and INDEX in line]
        assert steps < 1_000 + 40 * most


@with_deltas
async def test_an_append_on_sqlite_looks_at_the_newest_event_alone(
    on_sqlite: str, delta: dict[str, Any]
) -> None:
    found, _, _ = await caught_append(on_sqlite, delta)
    lines, steps = explained_by_sqlite(on_sqlite, found)
    assert_indexed_by_sqlite(lines)
    assert steps < 2_000


# --- what a write leaves in the log of PostgreSQL ----------------------------------------------


async def test_a_state_that_no_delta_names_is_not_written(
    postgres: Postgres, postgres_url: str, app_name: str
) -> None:
    """Neither the session's nor a wider one, whatever their size."""
    big = os.urandom(500_000).hex()  # nothing to compress
    async with SessionService(postgres_url) as service, engine_for(postgres_url) as engine:

        async def logged(session: Session, delta: dict[str, Any]) -> int:
            """Bytes of one append: the fewest of some, for others write to this server too."""
            sizes: list[int] = []
            for n in range(7):
                actions = EventActions(
                    state_delta={name: value + n for name, value in delta.items()}
                )
                before = await position()
                await service.append_event(
                    session, Event(author="user", content="hello", actions=actions)
                )
                sizes.append(await position() - before)
            return min(sizes)

        async def position() -> int:
            async with engine.connect() as conn:
                found = await conn.exec_driver_sql(
                    "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"
                )
                return int(found.scalar_one())

        own = await service.create_session(app_name=app_name, user_id="own", state={"big": big})
        wide = await service.create_session(
            app_name=app_name, user_id="wide", state={"app:big": big, "user:big": big}
        )
        postgres.execute("CHECKPOINT")  # after it a page's first change writes all of the page
        measured = {
            "session": await logged(own, {}),
            "session, user delta": await logged(own, {"user:key": 1}),
            "user and app": await logged(wide, {}),
            "user and app, session delta": await logged(wide, {"key": 1}),
        }
        rewritten = await logged(own, {"key": 1})
    assert rewritten > 500_000  # so a rewriting would show
    # hundreds; after a checkpoint, which may come at any time, pages are logged whole
    assert {name: size for name, size in measured.items() if size > 50_000} == {}


# --- what a call does in this process ----------------------------------------------------------


class Checked(Event):
    """An event that counts how often one is validated."""

    validated: ClassVar[int] = 0

    @model_validator(mode="after")
    def count(self) -> Self:
        Checked.validated += 1
        return self


class CheckedService(Store[Session, Checked]):
    session_type = Session
    event_type = Checked
    list_type = ListSessionsResponse


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that a JSON decoder is given, the store's own or that of a driver's codec."""
    texts: list[str] = []
    decode = JSONDecoder.decode

    def counted(self: JSONDecoder, text: str, *rest: Any) -> Any:
        texts.append(text)
        return decode(self, text, *rest)

    def counted_by_pydantic(text: str) -> Any:
        texts.append(text)
        return from_json(text)

    from_json = codec.from_json
    monkeypatch.setattr(JSONDecoder, "decode", counted)
    monkeypatch.setattr(codec, "from_json", counted_by_pydantic)
    return texts


@pytest.fixture
def loaded() -> Iterator[list[object]]:
    """Every object that SQLAlchemy's ORM makes of a row."""
    objects: list[object] = []
    found = models()
    mapped = (found.session, found.event, found.app_state, found.user_state)

    def count(instance: object, _: Any) -> None:
        objects.append(instance)

    for each in mapped:
        hooks.listen(each, "load", count)
    yield objects
    for each in mapped:
        hooks.remove(each, "load", count)


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql", "mariadb"], indirect=True)
async def test_a_read_decodes_each_text_once_and_makes_no_rows_into_objects(
    database_url: str, app_name: str, decoded: list[str], loaded: list[object]
) -> None:
    async with CheckedService(database_url) as service:
        state = {"app:where": "state-a", "user:where": "state-u", "where": "state-s"}
        key: dict[str, Any] = {"app_name": app_name, "user_id": "ann"}
        session = await service.create_session(**key, state=state)
        for n in range(20):
            await service.append_event(session, Checked(author="user", content=f"said-{n}"))
        await service.get_session(**key, session_id=session.id)
        decoded.clear()
        Checked.validated = 0
        again = await service.get_session(**key, session_id=session.id)
        assert again == session
        assert Checked.validated == 20
        # an event's text goes to pydantic as it is, which decodes and validates in one pass
        assert [text for text in decoded if "said-" in text] == []
        for scope in ("state-a", "state-u", "state-s"):
            assert sum(scope in text for text in decoded) <= 1, scope
        decoded.clear()
        await service.list_sessions(app_name=app_name)
        for scope in ("state-a", "state-u", "state-s"):
            assert sum(scope in text for text in decoded) <= 1, scope
        assert loaded == []
        async with AsyncSession(service._database.engine) as orm:  # so they would have been seen
            row = select(service.models.event).where(service.models.event.app_name == app_name)
            assert len((await orm.scalars(row)).all()) == len(loaded) == 20


class Serializer:
    """A model's own serializer, counted."""

    def __init__(self, of: type[BaseModel]) -> None:
        self._own: Any = of.__pydantic_serializer__
        self.uses: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def to_json(self, *args: Any, **options: Any) -> Any:
        self.uses.append("to_json")
        return self._own.to_json(*args, **options)

    def to_python(self, *args: Any, **options: Any) -> Any:
        self.uses.append("to_python")
        return self._own.to_python(*args, **options)


def own_classes() -> tuple[Any, Any, Any]:
    return SessionService, Event, EventActions


def adk_classes() -> tuple[Any, Any, Any]:
    pytest.importorskip("google.adk")
    from google.adk.events import Event, EventActions

    from adk_sessions.adk import DatabaseSessionService

    return DatabaseSessionService, Event, EventActions


@pytest.mark.parametrize("classes", [own_classes, adk_classes], ids=["own", "adk"])
@pytest.mark.parametrize("database_url", ["sqlite", "postgresql", "mariadb"], indirect=True)
async def test_an_event_is_serialised_once(
    database_url: str, app_name: str, classes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service_type, event_type, actions_type = classes()
    serializer = Serializer(event_type)
    monkeypatch.setattr(event_type, "__pydantic_serializer__", serializer)

    def event(delta: dict[str, Any]) -> Any:
        return event_type(author="user", actions=actions_type(state_delta=delta))

    async with service_type(database_url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        for delta in ({}, {"key": 1, "user:key": 1, "app:key": 1}, {"key": 2, "temp:key": 2}):
            serializer.uses.clear()
            await service.append_event(session, event(delta))
            assert serializer.uses == ["to_json"], delta
        serializer.uses.clear()
        await service.append_events(session, [event({}), event({"key": 3}), event({})])
        assert serializer.uses == ["to_json"] * 3
