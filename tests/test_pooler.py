"""``pooler="transaction"``, behind a pgbouncer that gives each transaction another connection.

The contract kit goes through one as well (test_contract.py and its like).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from servers import Postgres, run_pgbouncer, run_sync
from workers import Crew, Record, event, faults, in_each_scope, load, read_all

from adk_sessions import ConfigurationError, SchemaError, SessionService, migrate
from adk_sessions.url import create_engine

PROCESSES = 3

# What a call could leave behind on a connection that the next client gets.
LEFT = {
    "prepared statements": "SELECT count(*) FROM pg_prepared_statements",
    "settings": "SELECT array_agg(name || setting ORDER BY name) FROM pg_settings"
    " WHERE source = 'session'",
    "locks": "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    "channels": "SELECT count(*) FROM pg_listening_channels()",
    "cursors": "SELECT count(*) FROM pg_cursors WHERE is_holdable",
    "temporary tables": "SELECT count(*) FROM pg_class WHERE relpersistence = 't'",
}


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(PROCESSES) as processes:
        yield processes


@pytest.fixture
def single_url(postgres: Postgres) -> Iterator[str]:
    """A database with tables, through a pooler with one connection, which every client gets."""
    with postgres.scratch_database() as url:
        run_sync(migrate.upgrade(url))
        with run_pgbouncer(postgres, default_pool_size=1) as pgbouncer:
            yield pgbouncer.url(url.rpartition("/")[2])


async def left_behind(url: str) -> dict[str, Any]:
    """What is found on the pooler's one connection."""
    connection = await asyncpg.connect(url, statement_cache_size=0)
    try:
        return {what: await connection.fetchval(query) for what, query in LEFT.items()}
    finally:
        await connection.close()


async def use(service: SessionService, app: str) -> None:
    """Every kind of call."""
    session = await service.create_session(app_name=app, user_id="ann", state=in_each_scope("a"))
    one = event("event-1", in_each_scope("b"))
    for _ in range(2):
        await service.append_event(session, one)
    await service.append_events(session, [event(f"event-{n}", {"c": n}) for n in (2, 3)])
    await service.update_state(app_name=app, user_id="ann", add={"user:n": 1})
    assert await load(service, app, "ann", session.id) is not None
    await service.get_session(
        app_name=app, user_id="ann", session_id=session.id, num_recent_events=1
    )
    await service.list_sessions(app_name=app)
    await service.get_user_state(app_name=app, user_id="ann")
    await service.get_app_state(app_name=app)
    await service.delete_session(app, "ann", session.id)
    await service.validate_schema()
    await service.ping()


def jobs(app: str, ids: list[str]) -> list[dict[str, Any]]:
    """For each process several tasks, each with its own statements at the same time."""
    where = {"app": app, "user": "ann", "appends": 8}
    return [
        {
            "jobs": [
                ("fill", {**where, "writer": f"p{n}-a"}),
                ("share", {**where, "writer": f"p{n}-b", "sessions": ids}),
                ("share", {**where, "writer": f"p{n}-c", "sessions": ids}),
            ]
        }
        for n in range(PROCESSES)
    ]


async def sessions(service: SessionService, app: str) -> list[str]:
    return [(await service.create_session(app_name=app, user_id="ann")).id for _ in range(3)]


async def test_processes_behind_a_pooler_lose_nothing(
    crew: Crew, pgbouncer_url: str, app_name: str
) -> None:
    async with SessionService(pgbouncer_url, pooler="transaction") as service:
        ids = await sessions(service, app_name)
        crew.open(pgbouncer_url, pooler="transaction", statement_timeout=20)
        replies = await asyncio.to_thread(crew.run, "together", jobs(app_name, ids))
        crew.close()
        record = Record.of(one for reply in replies for one in reply["records"])
        assert len(record.calls) == PROCESSES * 25
        assert faults(record, await read_all(service, app_name)) == []
        assert [error for reply in replies for error in reply["met"]] == []


async def test_the_same_fails_where_nobody_has_said_it(
    crew: Crew, postgres: Postgres, postgres_url: str, app_name: str
) -> None:
    # a pooler of its own: what this leaves on connections is not for other tests
    with run_pgbouncer(postgres) as pgbouncer:
        async with SessionService(postgres_url) as service:
            ids = await sessions(service, app_name)
        crew.open(pgbouncer.url(postgres_url.rpartition("/")[2]), migrate="off")
        with pytest.raises(AssertionError, match="a pooler in transaction mode is in between"):
            await asyncio.to_thread(crew.run, "together", jobs(app_name, ids))
        crew.close()


async def test_nothing_is_left_on_the_connections_of_a_pooler(
    single_url: str, app_name: str
) -> None:
    before = await left_behind(single_url)  # the pooler has settings of its own
    async with SessionService(single_url, pooler="transaction", pool_size=1) as service:
        await use(service, app_name)
    assert await left_behind(single_url) == before
    async with SessionService(single_url, migrate="off", pool_size=1) as service:
        await use(service, app_name)
        after = await left_behind(single_url)
    assert after.pop("prepared statements") > before.pop("prepared statements") == 0
    assert after == before


async def test_nothing_is_migrated_through_a_pooler(postgres: Postgres) -> None:
    with postgres.scratch_database() as url, run_pgbouncer(postgres) as pgbouncer:
        pooled = pgbouncer.url(url.rpartition("/")[2])
        async with SessionService(pooled, pooler="transaction") as service:
            with pytest.raises(SchemaError, match="adk-sessions upgrade"):
                await service.prepare_tables()
        engine = create_engine(pooled + "?pgbouncer=true")
        service = SessionService(engine=engine, pooler="transaction")
        with pytest.raises(SchemaError, match="adk-sessions upgrade"):
            await service.prepare_tables()
        await migrate.upgrade(url)
        await service.prepare_tables()
        await engine.dispose()


def test_a_pooler_is_one_that_is_known(tmp_path: Path) -> None:
    for url, pooler in [
        ("postgresql://u@127.0.0.1/d", "session"),
        ("postgresql://u@127.0.0.1/d", True),
        (f"sqlite:///{tmp_path}/a.db", "statement"),
        ("mysql://u@127.0.0.1/d", "transaction"),
        ("mysql+aiomysql://u@127.0.0.1/d", "transaction"),
    ]:
        with pytest.raises(ConfigurationError, match="pooler"):
            SessionService(url, pooler=pooler)  # type: ignore[arg-type]
    # a laptop's file, with the options of the deployment
    SessionService(f"sqlite:///{tmp_path}/a.db", pooler="transaction")
    engine = create_engine("mysql://u@127.0.0.1/d")
    with pytest.raises(ConfigurationError, match="pooler"):
        SessionService(engine=engine, pooler="transaction")
