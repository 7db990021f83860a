"""Every difference from the schema that this release works on is told, on each database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import engine_for
from servers import Postgres
from sqlalchemy import Connection, text

from adk_sessions import SchemaError, SessionService
from adk_sessions.dialects import open_url
from adk_sessions.dialects.inspection import _mysql_fault
from adk_sessions.models import Models, models
from adk_sessions.validate import differences, validate_schema

KINDS = ["sqlite", "postgresql", "mariadb"]
every_kind = pytest.mark.parametrize("kind", KINDS)
INDEX = "idx_events_app_user_session_ts_id"
COLUMNS = "(app_name, user_id, session_id, timestamp, id)"
FOREIGN_KEY = (
    "(app_name, user_id, session_id) to sessions (app_name, user_id, id) ON DELETE CASCADE"
)
BINARY = "CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"

NewDatabase = Callable[[str], str]


async def execute(url: str, *statements: str | Callable[[Connection], None]) -> None:
    async with engine_for(url) as engine, engine.begin() as conn:
        for statement in statements:
            if isinstance(statement, str):
                await conn.exec_driver_sql(statement)
            else:
                await conn.run_sync(statement)


async def check(url: str, found: Models | None = None) -> list[str]:
    async with engine_for(url) as engine, engine.connect() as conn:
        return await conn.run_sync(lambda c: differences(c, found or models()))


async def made(url: str) -> str:
    async with SessionService(url) as service:
        await service.prepare_tables()
    return url


def rebuild(table: str, *changes: tuple[str, str]) -> Callable[[Connection], None]:
    """SQLite alters no column: the empty table is made again, with changes in its SQL."""

    def work(conn: Connection) -> None:
        found = "SELECT sql FROM sqlite_master WHERE tbl_name = :table AND sql IS NOT NULL"
        sql = list(conn.scalars(text(f"{found} ORDER BY type = 'index'"), {"table": table}))
        conn.exec_driver_sql(f"DROP TABLE {table}")
        for old, new in changes:
            assert old in sql[0], sql[0]
            sql[0] = sql[0].replace(old, new)
        for statement in sql:
            conn.exec_driver_sql(statement)

    return work


@dataclass
class Case:
    """A change to a schema that was right, and the lines that tell of it."""

    lines: list[str]
    on: dict[str, list[Any]] = field(default_factory=dict)


def case(*lines: str, **on: Any) -> Case:
    every = on.pop("every", None)
    on = dict.fromkeys(KINDS, every) if every is not None else on
    lists = {kind: how if isinstance(how, list) else [how] for kind, how in on.items()}
    return Case(list(lines), lists)


def modify(table: str, definition: str) -> str:
    return f"ALTER TABLE {table} MODIFY {definition}"


def alter(table: str, column: str, how: str) -> str:
    return f"ALTER TABLE {table} ALTER COLUMN {column} {how}"


DROP_KEY = {
    "postgresql": "ALTER TABLE events DROP CONSTRAINT events_app_name_user_id_session_id_fkey",
    "mariadb": "ALTER TABLE events DROP FOREIGN KEY events_ibfk_1",
}
ADD_KEY = (
    "ALTER TABLE events ADD CONSTRAINT another_name FOREIGN KEY"
    " (app_name, user_id, session_id) REFERENCES "
)
NO_KEY = (
    ", \n\tFOREIGN KEY(app_name, user_id, session_id)"
    " REFERENCES sessions (app_name, user_id, id) ON DELETE CASCADE"
)
KEY = "VARCHAR(128)"
TO_SESSIONS = "FOREIGN KEY (a, u, s) REFERENCES sessions (app_name, user_id, id)"

REFUSED: dict[str, Case] = {
    "no table": case(
        "user_states: there is no such table",
        every="DROP TABLE user_states",
    ),
    "no metadata": case(
        "adk_internal_metadata: there is no such table",
        every="DROP TABLE adk_internal_metadata",
    ),
    "no column": case(
        "events.event_exact: there is no such column",
        every="ALTER TABLE events DROP COLUMN event_exact",
    ),
    "extra column": case(
        "sessions.tenant: NOT NULL without a default, must have one or be nullable",
        sqlite=rebuild("sessions", ("\tstate TEXT", "\ttenant TEXT NOT NULL, state TEXT")),
        postgresql="ALTER TABLE sessions ADD tenant TEXT NOT NULL",
        mariadb="ALTER TABLE sessions ADD tenant INTEGER NOT NULL",
    ),
    "nullable": case(
        "sessions.update_time: nullable, must be NOT NULL",
        sqlite=rebuild("sessions", ("update_time DATETIME NOT NULL", "update_time DATETIME")),
        postgresql=alter("sessions", "update_time", "DROP NOT NULL"),
        mariadb=modify("sessions", "update_time DATETIME(6) NULL"),
    ),
    "not nullable": case(
        "events.event_exact: NOT NULL, must be nullable",
        sqlite=rebuild("events", ("event_exact TEXT", "event_exact TEXT NOT NULL")),
        postgresql=alter("events", "event_exact", "SET NOT NULL"),
        mariadb=modify("events", "event_exact LONGTEXT NOT NULL"),
    ),
    "short text": case(
        "events.event_data: TEXT, must be LONGTEXT",
        "events.event_exact: MEDIUMTEXT, must be LONGTEXT",
        mariadb="ALTER TABLE events MODIFY event_data TEXT, MODIFY event_exact MEDIUMTEXT",
    ),
    "short exact": case(
        "events.event_exact: VARCHAR(500), must be TEXT",
        postgresql=alter("events", "event_exact", "TYPE VARCHAR(500)"),
    ),
    "text of three bytes": case(
        "events.event_data: collation utf8mb3_general_ci, must be one of utf8mb4",
        "events.invocation_id: collation latin1_bin, must be one of utf8mb4",
        mariadb="ALTER TABLE events MODIFY event_data LONGTEXT CHARACTER SET utf8mb3,"
        " MODIFY invocation_id VARCHAR(256) CHARACTER SET latin1 COLLATE latin1_bin NOT NULL",
    ),
    "no microseconds": case(
        "sessions.update_time: DATETIME without microseconds, must be DATETIME(6)",
        mariadb=modify("sessions", "update_time DATETIME NOT NULL"),
    ),
    "milliseconds": case(
        "events.timestamp: DATETIME(3) without microseconds, must be DATETIME(6)",
        mariadb=modify("events", "timestamp DATETIME(3) NOT NULL"),
    ),
    "timestamp": case(
        "events.timestamp: TIMESTAMP(6), must be DATETIME(6)",
        mariadb=modify("events", "timestamp TIMESTAMP(6) NOT NULL"),
    ),
    "precision 0": case(
        "events.timestamp: TIMESTAMP(0) WITHOUT TIME ZONE, must be TIMESTAMP WITHOUT TIME ZONE",
        postgresql=alter("events", "timestamp", "TYPE TIMESTAMP(0)"),
    ),
    "precision 3": case(
        "app_states.update_time: TIMESTAMP(3) WITHOUT TIME ZONE, must be TIMESTAMP WITHOUT TIME"
        " ZONE",
        postgresql=alter("app_states", "update_time", "TYPE TIMESTAMP(3)"),
    ),
    "time zone": case(
        "sessions.create_time: TIMESTAMP WITH TIME ZONE, must be TIMESTAMP WITHOUT TIME ZONE",
        postgresql=alter("sessions", "create_time", "TYPE TIMESTAMPTZ"),
    ),
    "number": case(
        "sessions.update_time: REAL, must be DATETIME",
        sqlite=rebuild("sessions", ("update_time DATETIME", "update_time REAL")),
    ),
    "json": case(
        "user_states.state: JSON, must be JSONB",
        postgresql=alter("user_states", "state", "TYPE JSON"),
    ),
    "json as text": case(
        "events.event_data: TEXT, must be JSONB",
        postgresql=alter("events", "event_data", "TYPE TEXT"),
    ),
    "blob": case(
        "app_states.state: BLOB, must be TEXT",
        sqlite=rebuild("app_states", ("state TEXT", "state BLOB")),
    ),
    "short key": case(
        "app_states.app_name: VARCHAR(64), must be VARCHAR(128)",
        postgresql=alter("app_states", "app_name", "TYPE VARCHAR(64)"),
        mariadb=modify("app_states", f"app_name VARCHAR(64) {BINARY} NOT NULL"),
    ),
    "short invocation": case(
        "events.invocation_id: VARCHAR(128), must be VARCHAR(256)",
        postgresql=alter("events", "invocation_id", "TYPE VARCHAR(128)"),
        mariadb=modify("events", f"invocation_id VARCHAR(128) {BINARY} NOT NULL"),
    ),
    "padded key": case(
        "app_states.app_name: CHARACTER(128), must be VARCHAR(128)",
        postgresql=alter("app_states", "app_name", "TYPE CHARACTER(128)"),
    ),
    "padded": case(
        "app_states.app_name: CHAR(128), must be VARCHAR(128)",
        mariadb=modify("app_states", f"app_name CHAR(128) {BINARY} NOT NULL"),
    ),
    "integer key": case(
        "app_states.app_name: INTEGER, must be VARCHAR(128)",
        sqlite=rebuild("app_states", ("app_name VARCHAR(128)", "app_name INTEGER")),
        postgresql=alter("app_states", "app_name", "TYPE INTEGER USING 1"),
    ),
    "integer": case(
        "app_states.app_name: INT(11), must be VARCHAR(128)",
        mariadb=modify("app_states", "app_name INTEGER NOT NULL"),
    ),
    "uuid": case(
        "app_states.app_name: UUID, must be VARCHAR(128)",
        sqlite=rebuild("app_states", ("app_name VARCHAR(128)", "app_name UUID")),
        postgresql=alter("app_states", "app_name", "TYPE UUID USING NULL"),
        mariadb=modify("app_states", "app_name UUID NOT NULL"),
    ),
    "case": case(
        "app_states.app_name: collation utf8mb4_general_ci, must be utf8mb4_nopad_bin",
        mariadb=modify(
            "app_states",
            "app_name VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci NOT NULL",
        ),
    ),
    "padding": case(
        "app_states.app_name: collation utf8mb4_bin, must be utf8mb4_nopad_bin",
        mariadb=modify(
            "app_states", "app_name VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL"
        ),
    ),
    "citext": case(
        "app_states.app_name: CITEXT, must be VARCHAR(128)",
        postgresql=[
            "CREATE EXTENSION citext",
            alter("app_states", "app_name", "TYPE CITEXT"),
        ],
    ),
    "nondeterministic": case(
        "app_states.app_name: collation blind is not deterministic, must be one that is",
        postgresql=[
            "CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level2',"
            " deterministic = false)",
            alter("app_states", "app_name", "TYPE VARCHAR(128) COLLATE blind"),
        ],
    ),
    "nocase": case(
        "app_states.app_name: collation NOCASE, must be BINARY",
        sqlite=rebuild(
            "app_states", ("app_name VARCHAR(128)", "app_name VARCHAR(128) COLLATE NOCASE")
        ),
    ),
    "no index": case(
        f"events: no index on {COLUMNS}",
        sqlite=f"DROP INDEX {INDEX}",
        postgresql=f"DROP INDEX {INDEX}",
        mariadb=[
            DROP_KEY["mariadb"],
            f"DROP INDEX {INDEX} ON events",
            ADD_KEY + "sessions (app_name, user_id, id) ON DELETE CASCADE",
        ],
    ),
    "another index": case(
        f"events: no index on {COLUMNS}",
        sqlite=[
            f"DROP INDEX {INDEX}",
            "CREATE INDEX four ON events (app_name, user_id, session_id, timestamp DESC)",
            f"CREATE INDEX part ON events {COLUMNS} WHERE id > 'a'",
            "CREATE INDEX expression ON events (app_name, user_id, session_id, lower(id), id)",
        ],
        postgresql=[
            f"DROP INDEX {INDEX}",
            "CREATE INDEX four ON events (app_name, user_id, session_id, timestamp DESC)",
            f"CREATE INDEX part ON events {COLUMNS} WHERE id > 'a'",
            "CREATE INDEX expression ON events (app_name, user_id, session_id, lower(id), id)",
            "CREATE INDEX included ON events (app_name, user_id, session_id, timestamp)"
            " INCLUDE (id)",
        ],
    ),
    "invalid index": case(
        f"events: index {INDEX} is invalid (an index build was broken off): drop it and run"
        " adk-sessions upgrade",
        postgresql=f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{INDEX}'::regclass",
    ),
    "invalid and another name": case(
        "events: index theirs is invalid (an index build was broken off): drop it and run"
        " adk-sessions upgrade",
        postgresql=[
            f"ALTER INDEX {INDEX} RENAME TO theirs",
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'theirs'::regclass",
        ],
    ),
    "primary key": case(
        "sessions: primary key is (id), must be (app_name, user_id, id)",
        f"events: no foreign key {FOREIGN_KEY}",
        mariadb=[
            DROP_KEY["mariadb"],
            "ALTER TABLE sessions DROP PRIMARY KEY, ADD PRIMARY KEY (id)",
        ],
    ),
    "primary key, and with it the foreign keys": case(
        "sessions: primary key is (id), must be (app_name, user_id, id)",
        f"events: no foreign key {FOREIGN_KEY}",
        f"state_changes: no foreign key {FOREIGN_KEY}",
        postgresql=[
            "ALTER TABLE sessions DROP CONSTRAINT sessions_pkey CASCADE, ADD PRIMARY KEY (id)",
        ],
    ),
    "primary key of SQLite": case(
        "sessions: primary key is (id), must be (app_name, user_id, id)",
        sqlite=rebuild("sessions", ("PRIMARY KEY (app_name, user_id, id)", "PRIMARY KEY (id)")),
    ),
    "no primary key": case(
        "user_states: no primary key, must be (app_name, user_id)",
        sqlite=rebuild(
            "user_states", ("PRIMARY KEY (app_name, user_id)", "CHECK (user_id IS NOT NULL)")
        ),
        postgresql="ALTER TABLE user_states DROP CONSTRAINT user_states_pkey",
        mariadb="ALTER TABLE user_states DROP PRIMARY KEY",
    ),
    "unique": case(
        "sessions: one_id is unique on (id), which rows may share",
        every="CREATE UNIQUE INDEX one_id ON sessions (id)",
    ),
    "no foreign key": case(
        f"events: no foreign key {FOREIGN_KEY}",
        sqlite=rebuild("events", (NO_KEY, "")),
        postgresql=DROP_KEY["postgresql"],
        mariadb=DROP_KEY["mariadb"],
    ),
    "no cascade": case(
        "events: foreign key (app_name, user_id, session_id) to sessions (app_name, user_id, id)"
        f" without ON DELETE CASCADE, must be {FOREIGN_KEY}",
        sqlite=rebuild("events", (" ON DELETE CASCADE", "")),
        postgresql=[DROP_KEY["postgresql"], f"{ADD_KEY}sessions (app_name, user_id, id)"],
        mariadb=[DROP_KEY["mariadb"], f"{ADD_KEY}sessions (app_name, user_id, id)"],
    ),
    "to another table": case(
        "events: foreign key (app_name, user_id, session_id) to other (a, b, c) ON DELETE CASCADE,"
        f" must be {FOREIGN_KEY}",
        sqlite=[
            "CREATE TABLE other (a TEXT, b TEXT, c TEXT, PRIMARY KEY (a, b, c))",
            rebuild("events", ("sessions (app_name, user_id, id)", "other (a, b, c)")),
        ],
        postgresql=[
            "CREATE TABLE other (a TEXT, b TEXT, c TEXT, PRIMARY KEY (a, b, c))",
            DROP_KEY["postgresql"],
            f"{ADD_KEY}other (a, b, c) ON DELETE CASCADE",
        ],
        mariadb=[
            "CREATE TABLE other (a VARCHAR(128), b VARCHAR(128), c VARCHAR(128),"
            f" PRIMARY KEY (a, b, c)) {BINARY}",
            DROP_KEY["mariadb"],
            f"{ADD_KEY}other (a, b, c) ON DELETE CASCADE",
        ],
    ),
    "of sessions": case(
        "sessions: foreign key (app_name) to apps (name), must not be there",
        sqlite=[
            "CREATE TABLE apps (name TEXT PRIMARY KEY)",
            rebuild("sessions", ("app_name VARCHAR(128)", "app_name TEXT REFERENCES apps (name)")),
        ],
        postgresql=[
            "CREATE TABLE apps (name TEXT PRIMARY KEY)",
            "ALTER TABLE sessions ADD FOREIGN KEY (app_name) REFERENCES apps (name)",
        ],
        mariadb=[
            f"CREATE TABLE apps (name VARCHAR(128) PRIMARY KEY) {BINARY}",
            "ALTER TABLE sessions ADD FOREIGN KEY (app_name) REFERENCES apps (name)",
        ],
    ),
    "on conflict replace": case(
        "sessions: ON CONFLICT REPLACE would lose rows and tell nobody, must not be there",
        sqlite=rebuild(
            "sessions",
            (
                "PRIMARY KEY (app_name, user_id, id)",
                'PRIMARY KEY ("app_name", user_id, id) on /* ! */ conflict\n Replace',
            ),
        ),
    ),
    "on conflict ignore": case(
        "app_states: ON CONFLICT IGNORE would lose rows and tell nobody, must not be there",
        "app_states: sqlite_autoindex_app_states_1 is unique on (update_time), which rows may"
        " share",
        sqlite=rebuild(
            "app_states",
            (
                "update_time DATETIME NOT NULL",
                "update_time DATETIME NOT NULL UNIQUE ON CONFLICT IGNORE",
            ),
        ),
    ),
    "engine": case(
        "app_states: engine MyISAM, must be InnoDB",
        mariadb="ALTER TABLE app_states ENGINE MyISAM",
    ),
    "unlogged": case(
        "app_states: UNLOGGED, must be an ordinary table",
        postgresql="ALTER TABLE app_states SET UNLOGGED",
    ),
    "deferrable": case(
        "app_states: primary key is DEFERRABLE, must not be",
        postgresql="ALTER TABLE app_states DROP CONSTRAINT app_states_pkey,"
        " ADD PRIMARY KEY (app_name) DEFERRABLE",
    ),
    "unique expression": case(
        "sessions: folded is unique on (an expression), which rows may share",
        sqlite="CREATE UNIQUE INDEX folded ON sessions (lower(user_id))",
        postgresql="CREATE UNIQUE INDEX folded ON sessions (lower(user_id))",
    ),
    "unique prefix": case(
        "sessions: part is unique on (app_name, user_id, id(8)), which rows may share",
        mariadb="CREATE UNIQUE INDEX part ON sessions (app_name, user_id, id(8))",
    ),
    "unique on a column of the application": case(
        "sessions: one is unique on (app_name, kind), which rows may share",
        sqlite=[
            "ALTER TABLE sessions ADD kind INTEGER NOT NULL DEFAULT 1",
            "CREATE UNIQUE INDEX one ON sessions (app_name, kind)",
        ],
        postgresql=[
            "ALTER TABLE sessions ADD kind INTEGER NOT NULL DEFAULT 1",
            "CREATE UNIQUE INDEX one ON sessions (app_name, kind)",
        ],
        mariadb=[
            "ALTER TABLE sessions ADD kind INTEGER DEFAULT 1",
            "CREATE UNIQUE INDEX one ON sessions (app_name, kind)",
        ],
    ),
    "unique on a generated column": case(
        "sessions: one is unique on (whose), which rows may share",
        sqlite=[
            "ALTER TABLE sessions ADD whose TEXT AS (app_name || user_id)",
            "CREATE UNIQUE INDEX one ON sessions (whose)",
        ],
        postgresql=[
            "ALTER TABLE sessions ADD whose TEXT GENERATED ALWAYS AS (app_name || user_id) STORED",
            "CREATE UNIQUE INDEX one ON sessions (whose)",
        ],
        mariadb=[
            "ALTER TABLE sessions ADD whose VARCHAR(256) AS (concat(app_name, user_id)) STORED",
            "CREATE UNIQUE INDEX one ON sessions (whose)",
        ],
    ),
    "generated": case(
        "events.event_exact: generated, must not be",
        sqlite=rebuild("events", ("event_exact TEXT", "event_exact TEXT AS (lower(id)) STORED")),
        postgresql=[
            "ALTER TABLE events DROP COLUMN event_exact",
            "ALTER TABLE events ADD event_exact TEXT GENERATED ALWAYS AS (lower(id)) STORED",
        ],
        mariadb=modify("events", "event_exact LONGTEXT AS (lower(id)) STORED"),
    ),
    "referred to": case(
        "notes: its foreign key to sessions has no ON DELETE CASCADE: sessions could not be"
        " deleted",
        every=[
            f"CREATE TABLE notes (a {KEY}, u {KEY}, s {KEY}, {TO_SESSIONS})",
            f"CREATE TABLE good (a {KEY}, u {KEY}, s {KEY}, {TO_SESSIONS} ON DELETE CASCADE)",
            f"CREATE TABLE null_ (a {KEY}, u {KEY}, s {KEY}, {TO_SESSIONS} ON DELETE SET NULL)",
        ],
    ),
}
REFUSED["referred to"].on["mariadb"] = [
    f"{statement} {BINARY}" for statement in REFUSED["referred to"].on["mariadb"]
]

ACCEPTED: dict[str, Case] = {
    "nothing": case(every=[]),
    "longer keys": case(
        sqlite=rebuild("app_states", ("app_name VARCHAR(128)", "app_name VARCHAR(255)")),
        postgresql=alter("app_states", "app_name", "TYPE VARCHAR(255)"),
        mariadb=modify("app_states", f"app_name VARCHAR(255) {BINARY} NOT NULL"),
    ),
    "text keys": case(
        sqlite=rebuild("app_states", ("app_name VARCHAR(128)", "app_name TEXT")),
        postgresql=alter("app_states", "app_name", "TYPE TEXT"),
    ),
    "no length": case(
        sqlite=rebuild("app_states", ("app_name VARCHAR(128)", "app_name VARCHAR")),
        postgresql=alter("app_states", "app_name", "TYPE VARCHAR"),
    ),
    "spelled otherwise": case(
        sqlite=rebuild("app_states", ("update_time DATETIME", "update_time timestamp")),
        postgresql=alter("app_states", "update_time", "TYPE TIMESTAMP(6)"),
        mariadb=modify("app_states", "state JSON NOT NULL"),
    ),
    "JSON": case(sqlite=rebuild("app_states", ("state TEXT", "state JSON"))),
    "other collation": case(
        postgresql=alter("app_states", "app_name", 'TYPE TEXT COLLATE "C"'),
        mariadb=modify("events", "event_data LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"),
    ),
    "data that cannot be null": case(
        postgresql=alter("events", "event_data", "SET NOT NULL"),
        mariadb=modify("events", "event_data LONGTEXT CHARACTER SET utf8mb4 NOT NULL"),
    ),
    "more columns": case(
        sqlite=[
            "ALTER TABLE sessions ADD tenant TEXT",
            "ALTER TABLE sessions ADD kind INTEGER NOT NULL DEFAULT 1",
            "ALTER TABLE sessions ADD whose TEXT NOT NULL AS (app_name || user_id)",
        ],
        postgresql=[
            "CREATE TYPE mood AS ENUM ('fine')",
            "ALTER TABLE sessions ADD tenant mood, ADD kind INTEGER NOT NULL DEFAULT 1",
            "ALTER TABLE sessions ADD number SERIAL NOT NULL",
            "ALTER TABLE sessions ADD other BIGINT NOT NULL GENERATED BY DEFAULT AS IDENTITY",
            "ALTER TABLE sessions ADD whose TEXT NOT NULL"
            " GENERATED ALWAYS AS (app_name || user_id) STORED",
            "ALTER TABLE sessions DROP COLUMN tenant",
        ],
        mariadb=[
            "ALTER TABLE sessions ADD tenant INET6, ADD kind INTEGER NOT NULL DEFAULT 1",
            "ALTER TABLE sessions ADD number BIGINT NOT NULL AUTO_INCREMENT UNIQUE",
            "ALTER TABLE sessions ADD whose VARCHAR(256) AS (concat(app_name, user_id)) STORED",
        ],
    ),
    "more indexes": case(
        every=[
            "CREATE INDEX idx_events_app_user_session_ts"
            " ON events (app_name, user_id, session_id, timestamp DESC)",
            "CREATE INDEX recent ON sessions (update_time)",
        ],
    ),
    "unique and wider than the key": case(
        every="CREATE UNIQUE INDEX wide ON user_states (user_id, app_name, update_time)",
    ),
    "unique where rows never are equal": case(
        sqlite=[
            "ALTER TABLE sessions ADD tenant TEXT",
            "CREATE UNIQUE INDEX one ON sessions (tenant)",
            "CREATE UNIQUE INDEX two ON sessions (app_name, tenant)",
        ],
        postgresql=[
            "ALTER TABLE sessions ADD tenant TEXT UNIQUE, ADD number SERIAL UNIQUE",
            "ALTER TABLE sessions ADD other BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE",
            "ALTER TABLE sessions ADD public_id UUID NOT NULL UNIQUE DEFAULT gen_random_uuid()",
        ],
        mariadb=[
            "ALTER TABLE sessions ADD tenant INTEGER UNIQUE",
            "ALTER TABLE sessions ADD public_id VARCHAR(36) NOT NULL UNIQUE DEFAULT uuid()",
        ],
    ),
    "on conflict of the application's column, and in quotes": case(
        sqlite=rebuild(
            "sessions",
            (
                "\tstate TEXT",
                "\tkind TEXT NOT NULL ON CONFLICT REPLACE DEFAULT 'UNIQUE ON CONFLICT REPLACE',"
                " /* UNIQUE ON CONFLICT IGNORE */ state TEXT",
            ),
        ),
    ),
    "triggers": case(
        sqlite=[
            "CREATE TABLE audit (id TEXT)",
            "CREATE TRIGGER audited AFTER INSERT ON sessions"
            " BEGIN INSERT INTO audit VALUES (new.id); END",
        ],
        postgresql=[
            "CREATE FUNCTION audited() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'",
            "CREATE TRIGGER audited BEFORE INSERT ON sessions"
            " FOR EACH ROW EXECUTE FUNCTION audited()",
        ],
        mariadb=[
            "CREATE TABLE audit (id VARCHAR(128))",
            "CREATE TRIGGER audited AFTER INSERT ON sessions"
            " FOR EACH ROW INSERT INTO audit VALUES (new.id)",
        ],
    ),
    "an index of an expression": case(
        sqlite="CREATE INDEX folded ON sessions (lower(user_id))",
        postgresql="CREATE UNIQUE INDEX folded ON sessions (lower(user_id)) WHERE app_name = 'x'",
    ),
    "another name": case(
        postgresql=f"ALTER INDEX {INDEX} RENAME TO theirs",
        mariadb=f"ALTER TABLE events RENAME INDEX {INDEX} TO theirs",
    ),
    "ascending": case(
        sqlite=[f"DROP INDEX {INDEX}", f"CREATE INDEX theirs ON events {COLUMNS}"],
        postgresql=[
            f"DROP INDEX {INDEX}",
            "CREATE INDEX theirs ON events (user_id, app_name, session_id, timestamp, id)",
        ],
        mariadb=[f"CREATE INDEX theirs ON events {COLUMNS}", f"DROP INDEX {INDEX} ON events"],
    ),
    "another order of the key": case(
        sqlite=rebuild("user_states", ("KEY (app_name, user_id)", "KEY (user_id, app_name)")),
        postgresql="ALTER TABLE user_states DROP CONSTRAINT user_states_pkey,"
        " ADD CONSTRAINT theirs PRIMARY KEY (user_id, app_name)",
        mariadb="ALTER TABLE user_states DROP PRIMARY KEY, ADD PRIMARY KEY (user_id, app_name)",
    ),
    "another name of the foreign key": case(
        postgresql=[
            DROP_KEY["postgresql"],
            f"{ADD_KEY}sessions (app_name, user_id, id) ON DELETE CASCADE",
        ],
        mariadb=[
            DROP_KEY["mariadb"],
            f"{ADD_KEY}sessions (app_name, user_id, id) ON DELETE CASCADE",
        ],
    ),
    "a foreign key of another column": case(
        sqlite=[
            "CREATE TABLE tenants (id INTEGER PRIMARY KEY)",
            "ALTER TABLE sessions ADD tenant INTEGER REFERENCES tenants (id)",
        ],
        postgresql=[
            "CREATE TABLE tenants (id INTEGER PRIMARY KEY)",
            "ALTER TABLE sessions ADD tenant INTEGER REFERENCES tenants (id)",
        ],
        mariadb=[
            "CREATE TABLE tenants (id INTEGER PRIMARY KEY)",
            "ALTER TABLE sessions ADD tenant INTEGER REFERENCES tenants (id)",
        ],
    ),
}


def each(cases: dict[str, Case]) -> Any:
    found = [(name, kind) for name, case in cases.items() for kind in case.on]
    return pytest.mark.parametrize(("name", "kind"), found)


@pytest.fixture(scope="module")
def rolled_back(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    """A PostgreSQL database whose changes are looked at by the transaction that makes them."""
    with postgres.scratch_database(migrated_template) as url:
        yield url


@each(REFUSED)
async def test_what_is_refused(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    case = REFUSED[name]
    if kind == "postgresql":
        url = request.getfixturevalue("rolled_back")
        async with engine_for(url) as engine, engine.connect() as conn:
            for statement in case.on[kind]:
                await conn.exec_driver_sql(statement)
            found = await conn.run_sync(lambda c: differences(c, models()))
            await conn.rollback()
            assert await conn.run_sync(lambda c: differences(c, models())) == []
    else:
        url = request.getfixturevalue("migrated_database")(kind)
        await execute(url, *case.on[kind])
        found = await check(url)
    assert sorted(found) == sorted(case.lines)


@each(ACCEPTED)
async def test_what_is_accepted(name: str, kind: str, migrated_database: NewDatabase) -> None:
    url = migrated_database(kind)
    await execute(url, *ACCEPTED[name].on[kind])
    assert await check(url) == []
    # and it works
    async with SessionService(url, migrate="off") as service:
        session = await service.create_session(app_name="a", user_id="u", state={"app:k": 1})
        found = await service.get_session(app_name="a", user_id="u", session_id=session.id)
        assert found == session


@every_kind
async def test_all_differences_come_at_once(kind: str, fresh_database: NewDatabase) -> None:
    url = await made(fresh_database(kind))
    await execute(
        url,
        "ALTER TABLE events DROP COLUMN event_exact",
        "DROP TABLE user_states",
        "CREATE UNIQUE INDEX one ON app_states (update_time)",
    )
    database, _ = open_url(url, models())
    try:
        with pytest.raises(SchemaError) as caught:
            await validate_schema(database, models())
    finally:
        await database.close()
    assert str(caught.value).splitlines()[1:] == [
        "  events.event_exact: there is no such column",
        "  app_states: one is unique on (update_time), which rows may share",
        "  user_states: there is no such table",
    ]
    async with SessionService(url, migrate="off") as service:
        with pytest.raises(SchemaError, match="event_exact"):
            await service.validate_schema()


@every_kind
async def test_an_empty_database(kind: str, fresh_database: NewDatabase) -> None:
    assert await check(fresh_database(kind)) == [
        f"{table}: there is no such table"
        for table in (
            *("sessions", "events", "app_states", "user_states", "state_changes"),
            "adk_internal_metadata",
        )
    ]


async def test_a_missing_file_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    async with SessionService(f"sqlite:///{path}", migrate="off") as service:
        with pytest.raises(SchemaError, match="there is no such file"):
            await service.validate_schema()
    assert not path.exists()


@every_kind
async def test_nothing_is_written(kind: str, fresh_database: NewDatabase) -> None:
    url = await made(fresh_database(kind))
    async with SessionService(url, migrate="off") as service:
        await service.validate_schema()


# Names


PLACES = {
    "postgresql": {"schema": "chat", "table_prefix": "x_"},
    "mariadb": {"table_prefix": "x_"},
    "sqlite": {"table_prefix": "x_"},
}


@every_kind
async def test_a_prefix_and_a_schema(kind: str, fresh_database: NewDatabase) -> None:
    url, where = fresh_database(kind), PLACES[kind]
    full = "chat.x_" if "schema" in where else "x_"
    async with SessionService(url, **where) as service:  # type: ignore[arg-type]
        await service.prepare_tables()
        await service.validate_schema()
    place = models(**where)  # type: ignore[arg-type]
    assert await check(url, place) == []
    assert (await check(url))[0] == "sessions: there is no such table"
    notes = f"CREATE TABLE {full}notes (a {KEY}, u {KEY}, s {KEY}, {TO_SESSIONS})"
    await execute(
        url,
        f"DROP TABLE {full}events",
        f"ALTER TABLE {full}sessions ADD x INT",
        notes.replace("S sessions", f"S {full}sessions") + (BINARY if kind == "mariadb" else ""),
    )
    assert await check(url, place) == [
        f"{full}events: there is no such table",
        f"{full}notes: its foreign key to {full}sessions has no ON DELETE CASCADE: sessions could"
        " not be deleted",
    ]


async def test_a_database_as_schema(fresh_database: NewDatabase) -> None:
    url, other = fresh_database("mariadb"), fresh_database("mariadb")
    await made(other)
    schema = other.rpartition("/")[2]
    assert await check(url, models(schema=schema)) == []
    await execute(other, modify("events", "event_data TEXT"))
    assert await check(url, models(schema=schema)) == [
        f"{schema}.events.event_data: TEXT, must be LONGTEXT"
    ]


async def test_the_search_path_decides(fresh_database: NewDatabase) -> None:
    url = await made(fresh_database("postgresql"))
    role = url.rpartition("/")[2]
    await execute(
        url, "CREATE SCHEMA mine", f"ALTER DATABASE {role} SET search_path = mine, public"
    )
    assert await check(url) == []
    await execute(url, "CREATE TABLE mine.app_states (app_name text PRIMARY KEY)")
    found = await check(url)
    assert "app_states.state: there is no such column" in found
    # spelled out, it is the same
    assert await check(url, models(schema="public")) == []


OWNED = {
    "sessions": "chat_sessions",
    "events": "chat_events",
    "app_states": "chat_apps",
    "user_states": "chat_users",
}


@every_kind
async def test_tables_of_the_host(kind: str, fresh_database: NewDatabase) -> None:
    url = await made(fresh_database(kind))
    place = models(tables=OWNED)
    for ours, theirs in OWNED.items():
        await execute(url, f"ALTER TABLE {ours} RENAME TO {theirs}")
    await execute(url, "DROP TABLE adk_internal_metadata")
    assert await check(url, place) == []
    drop = {
        "sqlite": rebuild("chat_events", (NO_KEY.replace("sessions (", '"chat_sessions" ('), "")),
        "postgresql": DROP_KEY["postgresql"].replace("events ", "chat_events ", 1),
        "mariadb": DROP_KEY["mariadb"].replace("events", "chat_events"),
    }
    await execute(url, drop[kind])
    assert await check(url, place) == []  # without a foreign key
    await execute(url, "ALTER TABLE chat_events DROP COLUMN event_exact")
    assert await check(url, place) == ["chat_events.event_exact: there is no such column"]


# Who made it


@pytest.mark.parametrize("scheme", ["mariadb", "mysql"])
async def test_both_dialects_of_mariadb(scheme: str, fresh_database: NewDatabase) -> None:
    url = await made(fresh_database("mariadb"))
    url = f"{scheme}{url[url.index(':') :]}"
    assert await check(url) == []
    await execute(url, modify("sessions", "update_time DATETIME NOT NULL"))
    assert await check(url) == [
        "sessions.update_time: DATETIME without microseconds, must be DATETIME(6)"
    ]


@pytest.mark.parametrize(
    ("kind", "driver"),
    [
        ("sqlite", "sqlite+aiosqlite"),
        ("postgresql", "postgresql+asyncpg"),
        ("mariadb", "mysql+asyncmy"),
        ("mariadb", "mariadb+asyncmy"),
    ],
)
async def test_tables_that_google_adk_made(
    kind: str, driver: str, fresh_database: NewDatabase
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions.database_session_service import DatabaseSessionService

    url = fresh_database(kind)
    async with DatabaseSessionService(f"{driver}{url[url.index(':') :]}") as stock:
        await stock.create_session(app_name="a", user_id="u")
    found = await check(url)
    assert "events.event_exact: there is no such column" in found
    assert "state_changes: there is no such table" in found
    if kind != "mariadb":
        added = [line for line in found if line.startswith("sessions.")]
        assert all(line.endswith(": there is no such column") for line in added)
        indexes = [line for line in found if line.startswith("sessions: no valid index")]
        assert (len(added), len(indexes), len(found)) == (5, 2, 9)
    else:
        collations = [line for line in found if "must be utf8mb4_nopad_bin" in line]
        assert len(collations) == 3 + 4 + 1 + 2 + 1
    if driver.startswith("mariadb"):
        assert "events.event_data: TEXT, must be LONGTEXT" in found
        assert "sessions.update_time: DATETIME without microseconds, must be DATETIME(6)" in found
    await made(url)  # upgraded
    assert await check(url) == []


def test_mysql_has_a_collation_of_its_own() -> None:
    server = SimpleNamespace(dialect=SimpleNamespace(is_mariadb=False))
    key = models().sessions.c.id

    def fault(collation: str) -> str | None:
        found = {"type": "varchar", "spelled": "VARCHAR(128)", "length": 128, "digits": None}
        return _mysql_fault(server, SimpleNamespace(**found, collation=collation), key)  # type: ignore[arg-type]

    assert fault("utf8mb4_0900_bin") is None
    for other in ("utf8mb4_0900_ai_ci", "utf8mb4_bin"):
        assert fault(other) == f"collation {other}, must be utf8mb4_0900_bin"


@pytest.mark.parametrize("mode", ["", "ANSI_QUOTES"])
async def test_keys_are_read_however_names_are_quoted(
    mode: str, fresh_database: NewDatabase
) -> None:
    url = await made(fresh_database("mariadb"))
    async with engine_for(url) as engine, engine.connect() as conn:
        await conn.exec_driver_sql(f"SET sql_mode = '{mode}'")
        assert await conn.run_sync(lambda c: differences(c, models())) == []


# Rights


async def test_the_right_to_select_is_enough_on_postgresql(fresh_database: NewDatabase) -> None:
    url = await made(fresh_database("postgresql"))
    name = url.rpartition("/")[2]
    await execute(
        url,
        f"CREATE ROLE {name} LOGIN PASSWORD 'pw'",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}",
    )
    try:
        assert await check(as_user(url, name)) == []
        await execute(url, alter("user_states", "state", "TYPE JSON"))
        assert await check(as_user(url, name)) == ["user_states.state: JSON, must be JSONB"]
    finally:
        await execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


async def test_the_right_to_select_is_enough_on_mariadb(fresh_database: NewDatabase) -> None:
    url = await made(fresh_database("mariadb"))
    name = url.rpartition("/")[2]
    await execute(
        url,
        f"CREATE USER '{name}'@'%%' IDENTIFIED BY 'pw'",
        f"GRANT SELECT ON {name}.* TO '{name}'@'%%'",
    )
    try:
        assert await check(as_user(url, name)) == []
        await execute(url, DROP_KEY["mariadb"])
        assert await check(as_user(url, name)) == [f"events: no foreign key {FOREIGN_KEY}"]
    finally:
        await execute(url, f"DROP USER '{name}'@'%%'")


def as_user(url: str, name: str) -> str:
    from sqlalchemy import make_url

    return make_url(url).set(username=name, password="pw").render_as_string(hide_password=False)
