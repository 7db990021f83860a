"""Tables in a schema, under a prefix, or under names that the host application chose."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import engine_for
from everywhere import PART, OnEveryDatabase
from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.schema import CreateIndex, CreateTable

from adk_sessions import ConfigurationError, Event, SchemaError, SessionService, migrate
from adk_sessions.models import TABLES, VERSION_TABLE, models
from adk_sessions.url import resolve

NewDatabase = Callable[[str], str]

every_kind = pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
OWNED = {
    "sessions": "app_chat_sessions",
    "events": "app_chat_events",
    "app_states": "app_chat_shared",
    "user_states": "app_chat_users",
    "state_changes": "app_chat_changes",
}


async def tables_of(url: str, schema: str | None = None) -> set[str]:
    async with engine_for(url) as engine, engine.connect() as conn:
        return set(await conn.run_sync(lambda conn: inspect(conn).get_table_names(schema)))


async def execute(url: str, *statements: str) -> list[Any]:
    async with engine_for(url) as engine, engine.begin() as conn:
        for statement in statements:
            result = await conn.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


async def talk(service: SessionService, app_name: str, word: str) -> None:
    """A conversation of one event, every operation of a service, and its return."""
    ids = {"app_name": app_name, "user_id": "ann"}
    session = await service.create_session(
        **ids, session_id="same id", state={"k": word, "user:u": word, "app:a": word}
    )
    await service.append_event(session, Event(content=word, invocation_id="1"))
    assert await service.get_session(**ids, session_id="same id") == session
    assert [one.id for one in (await service.list_sessions(**ids)).sessions] == ["same id"]
    assert await service.get_user_state(**ids) == {"u": word}
    assert await service.get_app_state(app_name=app_name) == {"a": word}
    other = await service.create_session(**ids)
    await service.delete_session(app_name, "ann", other.id)


@every_kind
async def test_a_prefix(kind: str, fresh_database: NewDatabase, app_name: str) -> None:
    url = fresh_database(kind)
    async with SessionService(url, table_prefix="agent_") as service:
        await talk(service, app_name, "one")
        await service.validate_schema()
    expected = {"agent_" + name for name in (*TABLES, VERSION_TABLE)}
    assert await tables_of(url) == expected
    # a second service beside it shares nothing
    async with SessionService(url) as service:
        await talk(service, app_name, "two")
    assert await tables_of(url) == expected | {*TABLES, VERSION_TABLE}
    async with engine_for(url) as engine, engine.connect() as conn:
        indexes = await conn.run_sync(lambda conn: inspect(conn).get_indexes("agent_events"))
    assert [index["name"] for index in indexes] == ["agent_idx_events_app_user_session_ts_id"]


@pytest.mark.parametrize("backend", ["auto", "generic"])
async def test_two_schemas_on_one_engine(
    backend: Any, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database("postgresql")
    # the connection's own schema is one that nobody may use: nothing relies on search_path
    await execute(url, "CREATE SCHEMA nowhere")
    settings = {"server_settings": {"search_path": "nowhere"}}
    engine = create_async_engine(resolve(url).url, connect_args=settings)
    try:
        services = [
            SessionService(engine=engine, schema=schema, table_prefix=prefix, backend=backend)
            for schema, prefix in (("agents", ""), ("other-agents", "p_"), ("agents", "q_"))
        ]
        await asyncio.gather(
            *(talk(service, app_name, f"{n}") for n, service in enumerate(services))
        )
        for service in services:
            await service.validate_schema()
        for n, service in enumerate(services):
            session = await service.get_session(
                app_name=app_name, user_id="ann", session_id="same id"
            )
            assert session is not None
            assert [event.content for event in session.events] == [f"{n}"]
            assert session.state == {"k": f"{n}", "user:u": f"{n}", "app:a": f"{n}"}
    finally:
        await engine.dispose()
    everything = {*TABLES, VERSION_TABLE}
    assert await tables_of(url, "agents") == everything | {"q_" + name for name in everything}
    assert await tables_of(url, "other-agents") == {"p_" + name for name in everything}
    assert await tables_of(url, "nowhere") == await tables_of(url, "public") == set()


async def test_a_schema_on_mariadb_is_a_database(
    fresh_database: NewDatabase, app_name: str
) -> None:
    url, other = fresh_database("mariadb"), fresh_database("mariadb")
    name = other.rpartition("/")[2].partition("?")[0]
    async with SessionService(url, schema=name) as service:
        await talk(service, app_name, "one")
        await service.validate_schema()
    assert await tables_of(url) == set()
    assert await tables_of(other) == {*TABLES, VERSION_TABLE}


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_a_missing_schema_is_made(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    schema = f"made_{app_name.replace('-', '_')}"
    try:
        async with SessionService(url, schema=schema) as service:
            await talk(service, app_name, "one")
        assert await tables_of(url, schema) == {*TABLES, VERSION_TABLE}
    finally:
        if kind == "mariadb":  # it is not inside the database that the test's end drops
            await execute(url, f"DROP DATABASE IF EXISTS {schema}")


@every_kind
async def test_tables_that_the_host_owns(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    host = models(tables=OWNED)
    async with engine_for(url) as engine, engine.begin() as conn:
        for table in (
            *(host.sessions, host.events, host.app_states, host.user_states),
            host.state_changes,
        ):
            await conn.execute(CreateTable(table, include_foreign_key_constraints=[]))
            for index in table.indexes:
                await conn.execute(CreateIndex(index))
    before = await tables_of(url)
    async with SessionService(url, tables=OWNED) as service:
        await service.validate_schema()
        await talk(service, app_name, "one")
    assert await tables_of(url) == before == set(OWNED.values())


async def test_a_host_table_that_lacks_a_column_is_found(fresh_database: NewDatabase) -> None:
    url = fresh_database("postgresql")
    async with SessionService(url, tables=OWNED) as service:
        with pytest.raises(SchemaError, match="app_chat_sessions"):
            await service.validate_schema()


@every_kind
async def test_a_foreign_table_of_the_same_name(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    await execute(url, "CREATE TABLE agent_events (id INTEGER PRIMARY KEY, title VARCHAR(10))")
    async with SessionService(url, table_prefix="agent_") as service:
        with pytest.raises(SchemaError, match="agent_events belongs to another application"):
            await service.prepare_tables()
    async with SessionService(url) as service:
        await talk(service, app_name, "one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": ""}, "schema"),
        ({"schema": "a;b"}, "schema"),
        ({"schema": 'a"b'}, "schema"),
        ({"schema": 5}, "schema"),
        ({"schema": "s"}, "no schemas"),
        ({"table_prefix": "a-"}, "table_prefix"),
        ({"table_prefix": "a" * 31}, "table_prefix"),
        ({"table_prefix": 5}, "table_prefix"),
        ({"tables": {"messages": "m"}}, "no table 'messages'"),
        ({"tables": {"events": ""}}, "the name for events"),
        ({"tables": {"events": "sessions"}}, "same name"),
        ({"tables": {"events": "e"}, "migrate": "auto"}, "must be 'off'"),
        ({"tables": {"events": "e"}, "migrate": "check"}, "must be 'off'"),
        ({"migrate": "always"}, "migrate must be"),
        ({"migrate": True}, "migrate must be"),
    ],
)
def test_names_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SessionService("sqlite://", **options)


async def test_the_revision_of_each_place(fresh_database: NewDatabase) -> None:
    url = fresh_database("postgresql")
    place: dict[str, Any] = {"schema": "agents", "table_prefix": "p_"}
    await migrate.upgrade(url, **place)
    assert await migrate.current(url, **place) == migrate.HEAD
    assert await migrate.current(url) is None
    await migrate.check(url, **place)
    with pytest.raises(SchemaError, match=r"adk-sessions upgrade --url … --schema agents$"):
        await migrate.check(url, schema="agents")


@pytest.fixture(scope="module")
def schema_url(postgres: Any) -> Iterator[str]:
    with postgres.scratch_database() as url:
        yield url


class TestTheKitInASchema(OnEveryDatabase):
    """A part of the contract on tables that are not where a connection looks for them.

    ADK_SESSIONS_SOAK=1 runs all of it.
    """

    locals().update(PART)

    @pytest.fixture
    def backend(self) -> str:
        return "postgresql"

    @pytest.fixture
    def new_service(self, schema_url: str) -> Callable[[], Any]:
        return lambda: SessionService(schema_url, schema="agents", table_prefix="p_")


async def test_an_engines_map_of_schemas_is_heeded(
    fresh_database: NewDatabase, app_name: str
) -> None:
    """The statements that are kept as text name no tenant."""
    url = fresh_database("postgresql")
    await migrate.upgrade(url)
    await migrate.upgrade(url, schema="tenant")
    async with engine_for(url) as engine:
        mapped = engine.execution_options(schema_translate_map={None: "tenant"})
        async with SessionService(engine=mapped, migrate="off") as service:
            await talk(service, app_name, "theirs")
            await service.create_session(app_name=app_name, user_id="ann")
    for schema, sessions in (("tenant", 2), ("public", 0)):
        assert await execute(url, f"SELECT count(*) FROM {schema}.sessions") == [(sessions,)]
