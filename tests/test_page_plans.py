"""What pages, and those who follow a session, look at: rows in the order of an index, as many as
are shown, and nothing is sorted.

The tables are as the service's own calls find them, only larger. The statements are the very ones
that it executes, see `test_plans`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import pytest
from engines import engine_for
from servers import MariaDB, Postgres, run_sync
from sqlalchemy import insert
from test_plans import (
    ANALYZE,
    APP,
    END,
    Call,
    assert_indexed_by_sqlite,
    before_end,
    both_modes,
    caught,
    explained_by_mariadb,
    explained_by_sqlite,
    plan,
    transaction,
)

from adk_sessions import Session, SessionService
from adk_sessions.dialects.rows import Key
from adk_sessions.models import INDEX, PAGE_INDEXES

SESSIONS, USERS, APPS, EVENTS = 12_000, 20, 3, 800
LIMIT = 20
OF_APP, OF_USER = PAGE_INDEXES


async def fill(url: str) -> str:
    """Many sessions, one with many events."""
    async with SessionService(url) as service, engine_for(url) as engine:
        await service.prepare_tables()
        models = service.models
        sessions = [
            {
                "app_name": APP if n % APPS == 0 else f"app-{n % APPS}",
                "user_id": f"user-{n // APPS % USERS}",
                "id": f"session-{n:06}",
                "state": {"topic": "t" * 50},
                # two at a time
                "create_time": END - timedelta(seconds=n // (2 * APPS)),
                "update_time": END - timedelta(seconds=n * 37 % SESSIONS),
            }
            for n in range(SESSIONS)
        ]
        events = [
            {
                "app_name": APP,
                "user_id": "user-0",
                "session_id": session,
                "id": f"event-{n:04}",
                "invocation_id": f"run-{n // 4}",
                "timestamp": END - timedelta(seconds=EVENTS - n),
                "event_data": {
                    "id": f"event-{n:04}",
                    "author": "user" if n % 2 else "agent",
                    "timestamp": 1.0,
                    "content": "words " * 20,
                },
            }
            for session in ("session-000000", f"session-{APPS * USERS:06}")
            for n in range(EVENTS)
        ]
        async with engine.begin() as conn:
            await conn.execute(insert(models.sessions), sessions)
            await conn.execute(insert(models.events), events)
        if analyze := ANALYZE.get(engine.dialect.name):
            alone = engine.execution_options(isolation_level="AUTOCOMMIT")
            async with alone.connect() as conn:
                if engine.dialect.name == "mysql":  # look at all pages, not at a few by chance
                    for table in (models.sessions, models.events):
                        sample = f"ALTER TABLE {table.name} STATS_SAMPLE_PAGES = 10000"
                        await conn.exec_driver_sql(sample)
                await conn.exec_driver_sql(analyze)
    return url


@pytest.fixture(scope="module")
def on_postgres(postgres: Postgres) -> Iterator[str]:
    with postgres.scratch_database() as url:
        yield run_sync(fill(url))


@pytest.fixture(scope="module")
def on_mariadb(mariadb: MariaDB) -> Iterator[str]:
    with mariadb.scratch_database() as url:
        yield run_sync(fill(url))


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_sync(fill(f"sqlite:///{tmp_path_factory.mktemp('plans')}/pages.db"))


def sessions(user: str | None = None, *, page: int = 1, **arguments: Any) -> Call:
    """The call for a page, and for those before it."""

    async def call(service: SessionService) -> Any:
        found = await service.page_sessions(APP, user, limit=LIMIT, **arguments)
        for _ in range(page - 1):
            cursor = found.next_cursor
            assert cursor
            found = await service.page_sessions(APP, user, limit=LIMIT, cursor=cursor, **arguments)
        assert len(found.items) == LIMIT
        return found

    return call


def events(*, page: int = 1, **arguments: Any) -> Call:
    async def call(service: SessionService) -> Any:
        key = (APP, "user-0", "session-000000")
        found = await service.page_events(*key, limit=LIMIT, **arguments)
        for _ in range(page - 1):
            found = await service.page_events(
                *key, limit=LIMIT, cursor=found.next_cursor, **arguments
            )
        assert len(found.items) == LIMIT
        return found

    return call


WATCHED = Key(APP, "user-0", "session-000000")
BEHIND = 300


async def nothing_new(service: SessionService) -> Any:
    """What a watcher does again and again."""
    found = await service._news(WATCHED, END, replica=False)
    assert found is not None
    assert found.events == []


async def catching_up(service: SessionService) -> Any:
    """The first look of a watcher who begins in the middle."""
    since = before_end(EVENTS - BEHIND)  # the time of an event
    session = Session(
        app_name=APP, user_id=WATCHED.user_id, id=WATCHED.session_id, last_update_time=since
    )
    async with aclosing(service.watch(session)) as watching:
        assert (await anext(watching)).id == f"event-{BEHIND + 1:04}"


async def place_of_an_event(service: SessionService) -> Any:
    """Where a watcher begins who names an event."""
    found = await service._place_behind(WATCHED, "event-0300")
    assert found == END - timedelta(seconds=EVENTS - 300)


#: the call, the index for its events, and how many of them it may look at
WATCHERS: dict[str, tuple[Call, str, int]] = {
    "nothing new": (nothing_new, INDEX, 0),
    "catching up": (catching_up, INDEX, 100),
    "behind an event": (place_of_an_event, "events_pkey", 1),
}
#: the call, its index, and how many rows of that it may look at
SESSION_PAGES: dict[str, tuple[Call, str, int]] = {
    "first": (sessions(), OF_APP, LIMIT + 1),
    "next": (sessions(page=3), OF_APP, LIMIT + 3),
    "far": (sessions(page=50), OF_APP, LIMIT + 3),
    "archived too": (sessions(archived=None, page=3), OF_APP, LIMIT + 3),
    "counted": (sessions(counts=True, page=3), OF_APP, LIMIT + 3),
    "of a user": (sessions("user-3"), OF_USER, LIMIT + 1),
    "of a user, next": (sessions("user-3", page=3), OF_USER, LIMIT + 3),
    "of a user, counted": (sessions("user-3", counts=True), OF_USER, LIMIT + 1),
}
EVENT_PAGES: dict[str, tuple[Call, int]] = {
    "forward": (events(), LIMIT + 1),
    "forward, next": (events(page=3), LIMIT + 3),
    "backward": (events(direction="backward"), LIMIT + 1),
    "backward, next": (events(direction="backward", page=3), LIMIT + 3),
    "after": (events(after="event-0300"), LIMIT + 3),
    "after, backward": (events(after="event-0300", direction="backward"), LIMIT + 3),
    "of an author": (events(author="user", page=3), 2 * LIMIT + 4),
}
of_sessions = pytest.mark.parametrize("name", SESSION_PAGES)
of_events = pytest.mark.parametrize("name", EVENT_PAGES)
of_watchers = pytest.mark.parametrize("name", WATCHERS)


# --- PostgreSQL --------------------------------------------------------------------------------


@both_modes
@of_sessions
async def test_a_page_of_sessions_on_postgresql_is_read_in_order(
    on_postgres: str, name: str, mode: str
) -> None:
    call, index, most = SESSION_PAGES[name]
    *_, statement = await caught(on_postgres, call)
    async with transaction(on_postgres) as conn:
        found = await plan(conn, statement, mode)
    found.assert_indexed()
    assert {place for kind, place in found.nodes if "Index" in kind} - {INDEX, None} == {index}
    assert not {kind for kind, _ in found.nodes if "Bitmap" in kind}
    assert found.sessions <= most


@both_modes
@of_events
async def test_a_page_of_events_on_postgresql_is_read_in_order(
    on_postgres: str, name: str, mode: str
) -> None:
    call, most = EVENT_PAGES[name]
    *_, statement = await caught(on_postgres, call)
    async with transaction(on_postgres) as conn:
        found = await plan(conn, statement, mode)
    found.assert_indexed()
    assert INDEX in {place for _, place in found.nodes}
    assert found.events <= most


@both_modes
@of_watchers
async def test_a_watcher_on_postgresql_reads_what_is_new(
    on_postgres: str, name: str, mode: str
) -> None:
    call, index, most = WATCHERS[name]
    (statement,) = await caught(on_postgres, call)
    async with transaction(on_postgres) as conn:
        found = await plan(conn, statement, mode)
    found.assert_indexed()
    assert not {kind for kind, _ in found.nodes if "Bitmap" in kind}
    assert index in {place for _, place in found.nodes}
    assert found.events <= most
    assert found.sessions <= 1


# --- MariaDB and SQLite ------------------------------------------------------------------------


def assert_in_order(rows: list[dict[str, Any]], index: str) -> None:
    # a page that is counted is put in order once more, by itself
    tables = [row for row in rows if row["table"] in ("sessions", "events")]
    assert tables
    assert [row for row in tables if "filesort" in (row["Extra"] or "")] == []
    assert [row for row in tables if row["type"] in ("ALL", "index") or not row["key"]] == []
    assert index in {row["key"] for row in tables}


@of_sessions
async def test_a_page_of_sessions_on_mariadb_is_read_in_order(on_mariadb: str, name: str) -> None:
    call, index, most = SESSION_PAGES[name]
    *_, statement = await caught(on_mariadb, call)
    rows = await explained_by_mariadb(on_mariadb, [statement])
    assert_in_order(rows, index)
    assert sum(float(row["r_rows"]) for row in rows if row["table"] == "sessions") <= most


@of_events
async def test_a_page_of_events_on_mariadb_is_read_in_order(on_mariadb: str, name: str) -> None:
    call, most = EVENT_PAGES[name]
    *_, statement = await caught(on_mariadb, call)
    rows = await explained_by_mariadb(on_mariadb, [statement])
    assert_in_order(rows, INDEX)
    assert sum(float(row["r_rows"]) for row in rows if row["key"] == INDEX) <= most


@of_watchers
async def test_a_watcher_on_mariadb_reads_what_is_new(on_mariadb: str, name: str) -> None:
    call, index, most = WATCHERS[name]
    (statement,) = await caught(on_mariadb, call)
    rows = await explained_by_mariadb(on_mariadb, [statement])
    assert_in_order(rows, index if index == INDEX else "PRIMARY")
    read = [float(row["r_rows"] or 0) for row in rows if row["table"] == "events"]
    assert sum(read) <= most


@of_watchers
async def test_a_watcher_on_sqlite_reads_what_is_new(on_sqlite: str, name: str) -> None:
    call, index, most = WATCHERS[name]
    (statement,) = await caught(on_sqlite, call)
    lines, steps = explained_by_sqlite(on_sqlite, [statement])
    assert_indexed_by_sqlite(lines)
    names = index if index == INDEX else "sqlite_autoindex_events_1"
    assert [line for line in lines if line.startswith("SEARCH events") and names in line]
    assert steps <= 40 * (most + 10)


@pytest.mark.parametrize("name", [*SESSION_PAGES, *EVENT_PAGES])
async def test_a_page_on_sqlite_is_read_in_order(on_sqlite: str, name: str) -> None:
    call, index, most = SESSION_PAGES[name] if name in SESSION_PAGES else (
        *EVENT_PAGES[name][:1], INDEX, EVENT_PAGES[name][1],
    )  # fmt: skip
    *_, statement = await caught(on_sqlite, call)
    lines, steps = explained_by_sqlite(on_sqlite, [statement])
    assert any(index in line for line in lines), lines
    assert [line for line in lines if "TEMP B-TREE" in line or line.startswith("SCAN")] == []
    assert steps <= 40 * (most + 10)
