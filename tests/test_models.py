"""The models are google-adk's tables, version 1, and one column more."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Column, Dialect, MetaData, Table, create_engine, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.schema import CreateIndex, CreateTable

from adk_sessions import SessionService
from adk_sessions.models import PAGE_INDEXES, TABLES, models
from adk_sessions.url import resolve

MARIADB = mysql.dialect()
MARIADB.name = "mariadb"
DIALECTS: dict[str, Dialect] = {
    "postgresql": postgresql.dialect(),
    "sqlite": sqlite.dialect(),
    "mysql": mysql.dialect(),
    "mariadb": MARIADB,
}
KEYS = {"id", "app_name", "user_id", "session_id", "invocation_id", "key", "value", "title"}
# What google-adk's sessions do not have.
ADDED = ("title", "labels", "archive_time", "expire_time", "initial_state")
STATE: dict[str, Any] = {
    "a": [1, 1.0, None, {"b": True}],
    "nul": "a\0b",
    "inf": math.inf,
    "é": "😀",
}


def ddl(column: Column[Any], dialect: Dialect) -> str:
    return str(column.type.compile(dialect=dialect))


def shape(table: Table, dialect: Dialect) -> dict[str, tuple[str, bool, bool]]:
    return {c.name: (ddl(c, dialect), bool(c.nullable), c.primary_key) for c in table.columns}


def references(table: Table) -> list[tuple[list[str], list[str], str | None]]:
    return [
        (
            [element.parent.name for element in key.elements],
            [element.target_fullname for element in key.elements],
            key.ondelete,
        )
        for key in table.foreign_key_constraints
    ]


def indexes(table: Table, dialect: Dialect) -> list[str]:
    return [str(CreateIndex(index).compile(dialect=dialect)) for index in table.indexes]


@pytest.mark.parametrize("name", ["postgresql", "sqlite", "mysql"])
def test_the_tables_are_google_adks(name: str) -> None:
    v1 = pytest.importorskip("google.adk.sessions.schemas.v1")
    dialect, theirs = DIALECTS[name], v1.Base.metadata
    ours = models().metadata
    assert set(ours.tables) == set(TABLES) == {*theirs.tables, "state_changes"}
    for table in theirs.tables:
        found, expected = shape(ours.tables[table], dialect), shape(theirs.tables[table], dialect)
        if table == "events":
            assert found.pop("event_exact") == (ddl_of_text(name), True, False)
        if table == "sessions":
            added = [found.pop(column) for column in ADDED]
            assert all(nullable and not primary for _, nullable, primary in added)
        if name == "mysql":
            # keys are compared by bytes here, otherwise "bob" reads the row of "Bob"
            bytewise = " CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin"
            found = {k: (v[0].removesuffix(bytewise), *v[1:]) for k, v in found.items()}
        assert found == expected
        assert references(ours.tables[table]) == references(theirs.tables[table])
        if table == "sessions":
            assert {str(index.name) for index in ours.tables[table].indexes} == set(PAGE_INDEXES)
        else:
            assert indexes(ours.tables[table], dialect) == indexes(theirs.tables[table], dialect)
        primary = [[c.name for c in m.tables[table].primary_key] for m in (ours, theirs)]
        assert sorted(primary[0]) == sorted(primary[1])


def ddl_of_text(name: str) -> str:
    return "LONGTEXT" if name in ("mysql", "mariadb") else "TEXT"


@pytest.mark.parametrize(
    ("name", "json", "timestamp"),
    [
        ("postgresql", "JSONB", "TIMESTAMP WITHOUT TIME ZONE"),
        ("sqlite", "TEXT", "DATETIME"),
        ("mysql", "LONGTEXT", "DATETIME(6)"),
        ("mariadb", "LONGTEXT", "DATETIME(6)"),
    ],
)
def test_types_for_each_database(name: str, json: str, timestamp: str) -> None:
    dialect = DIALECTS[name]
    tables = models()
    for table in (tables.sessions, tables.app_states, tables.user_states):
        assert ddl(table.c.state, dialect) == json
        assert ddl(table.c.update_time, dialect) == timestamp
    assert ddl(tables.events.c.event_data, dialect) == json
    assert ddl(tables.events.c.event_exact, dialect) == ddl_of_text(name)
    assert ddl(tables.events.c.timestamp, dialect) == timestamp
    assert ddl(tables.sessions.c.create_time, dialect) == timestamp


def test_keys_are_compared_by_bytes_on_mysql_and_mariadb() -> None:
    collation = {"mysql": "utf8mb4_0900_bin", "mariadb": "utf8mb4_nopad_bin"}
    seen = set()
    for table in models().metadata.tables.values():
        for column in (column for column in table.columns if column.name in KEYS):
            seen.add(column.name)
            length = 256 if column.name in ("invocation_id", "value", "title") else 128
            for name, dialect in DIALECTS.items():
                expected = f"VARCHAR({length})"
                if name in collation:
                    expected += f" CHARACTER SET utf8mb4 COLLATE {collation[name]}"
                assert ddl(column, dialect) == expected
    assert seen == KEYS


def test_a_prefix_goes_before_tables_and_index() -> None:
    found = models(table_prefix="chat_")
    assert set(found.metadata.tables) == {f"chat_{table}" for table in TABLES}
    [index] = found.events.indexes
    assert index.name == "chat_idx_events_app_user_session_ts_id"
    [(_, targets, ondelete)] = references(found.events)
    assert targets == ["chat_sessions.app_name", "chat_sessions.user_id", "chat_sessions.id"]
    assert ondelete == "CASCADE"
    text = str(CreateTable(found.events).compile(dialect=DIALECTS["postgresql"]))
    assert "CREATE TABLE chat_events" in text
    assert "REFERENCES chat_sessions" in text


def test_a_schema_holds_the_tables() -> None:
    found = models(schema="agents", table_prefix="p_")
    assert set(found.metadata.tables) == {f"agents.p_{table}" for table in TABLES}
    assert {table.schema for table in found.metadata.tables.values()} == {"agents"}
    [(_, targets, _)] = references(found.events)
    assert targets[0] == "agents.p_sessions.app_name"
    [index] = found.events.indexes
    assert "ON agents.p_events " in str(CreateIndex(index).compile(dialect=DIALECTS["postgresql"]))


def test_the_same_place_gives_the_same_models() -> None:
    assert models() is models()
    assert models("a", "b") is models("a", "b")
    others = [models(), models("a"), models("a", "b"), models(table_prefix="b")]
    assert len({id(found.metadata) for found in others}) == 4
    assert models().metadata.schema is None


def test_each_class_has_its_table_and_nothing_else_is_there() -> None:
    found = models()
    assert isinstance(found.metadata, MetaData)
    assert found.session.__table__ is found.sessions is found.metadata.tables["sessions"]
    assert found.event.__table__ is found.events is found.metadata.tables["events"]
    assert found.app_state.__table__ is found.app_states
    assert found.user_state.__table__ is found.user_states
    assert found.internal_metadata.__table__ is found.metadata.tables["adk_internal_metadata"]
    assert found.state_change.__table__ is found.state_changes
    assert len(found.metadata.tables) == 6


def stored(app_name: str) -> Any:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901)
    return models().session(
        app_name=app_name, user_id="u", id="1", state=STATE, create_time=moment, update_time=moment
    )


def check(row: Any) -> None:
    assert row.state == STATE
    assert [type(item) for item in row.state["a"]] == [int, float, type(None), dict]
    assert row.update_time == datetime(2026, 1, 2, 3, 4, 5, 678901)
    assert row.update_time.tzinfo is None


async def test_an_application_may_use_the_models_on_sqlite(
    fresh_database: Callable[[str], str], app_name: str
) -> None:
    url = fresh_database("sqlite")
    async with SessionService(url) as service:
        await service.prepare_tables()
        engine = create_engine(url)
        try:
            with OrmSession(engine) as orm:
                orm.add(stored(app_name))
                orm.commit()
            with OrmSession(engine) as orm:
                check(orm.scalars(select(models().session)).one())
        finally:
            engine.dispose()
        found = await service.get_session(app_name=app_name, user_id="u", session_id="1")
        assert found is not None
        assert found.state == STATE


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
async def test_an_application_may_use_the_models_on_a_server(
    database_url: str, app_name: str
) -> None:
    async with SessionService(database_url) as service:
        await service.prepare_tables()
        engine = create_async_engine(resolve(database_url).url)
        try:
            async with AsyncSession(engine) as orm:
                orm.add(stored(app_name))
                await orm.commit()
            async with AsyncSession(engine) as orm:
                query = select(models().session).where(models().session.app_name == app_name)
                check((await orm.scalars(query)).one())
        finally:
            await engine.dispose()
        found = await service.get_session(app_name=app_name, user_id="u", session_id="1")
        assert found is not None
        assert found.state == STATE
