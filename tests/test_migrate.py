"""The schema's history: from code, from the shell, in company, and on what is there already."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import pytest
from alembic.config import CommandLine, Config
from alembic.script import ScriptDirectory
from engines import engine_for
from scripts import run_script
from sqlalchemy import Connection, event, inspect, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from adk_sessions import Event, MigrationLockError, SchemaError, SessionService, migrate
from adk_sessions.dialects import open_engine, open_url
from adk_sessions.models import PAGE_INDEXES, TABLES, VERSION_TABLE, Names, models

ROOT = Path(__file__).parent.parent
KINDS = ["sqlite", "postgresql", "mariadb"]
SERVERS = ["postgresql", "mariadb"]
# What sessions have besides what google-adk gives them.
ADDED = ("title", "labels", "archive_time", "expire_time", "initial_state")
every_kind = pytest.mark.parametrize("kind", KINDS)

NewDatabase = Callable[[str], str]


async def run(url: str, *statements: str) -> list[Any]:
    """Runs statements in one transaction; rows of the last."""
    async with engine_for(url) as engine, engine.begin() as conn:
        for statement in statements:
            result = await conn.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


async def reflect(url: str) -> dict[str, Any]:
    """Everything that an inspector sees of a database."""

    def look(conn: Connection) -> dict[str, Any]:
        found = inspect(conn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLite's inspector skips what is an expression
            return {table: look_at(found, table, conn) for table in sorted(found.get_table_names())}

    def look_at(found: Any, table: str, conn: Connection) -> dict[str, Any]:
        return {
            "columns": {
                column["name"]: (str(column["type"].compile(conn.dialect)), column["nullable"])
                for column in found.get_columns(table)
            },
            "primary key": sorted(found.get_pk_constraint(table)["constrained_columns"]),
            "foreign keys": [
                (
                    key["constrained_columns"],
                    key["referred_table"],
                    key["referred_columns"],
                    key["options"],
                )
                for key in found.get_foreign_keys(table)
            ],
            "indexes": sorted(
                (index["name"], index.get("expressions", index["column_names"]))
                for index in found.get_indexes(table)
            ),
        }

    async with engine_for(url) as engine, engine.connect() as conn:
        found: dict[str, Any] = await conn.run_sync(look)
    return found


async def use(url: str) -> None:
    """A session is stored and read back."""
    async with SessionService(url) as service:
        ids = {"app_name": "migrate", "user_id": "ann"}
        session = await service.create_session(**ids, state={"a": 1, "app:b": 2})
        await service.append_event(session, Event(content="hello"))
        assert await service.get_session(**ids, session_id=session.id) == session


def alembic(*arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command line, from the repository's root; ``url`` goes into the environment."""
    environment = {k: v for k, v in os.environ.items() if k != "ADK_SESSIONS_URL"}
    if url is not None:
        environment["ADK_SESSIONS_URL"] = url
    return forked.run("-m", "alembic", *arguments, environment=environment, folder=ROOT)


async def shell(*arguments: str, url: str | None = None) -> str:
    """The same in this process, in a thread without a loop; what it prints."""
    if url is not None:
        arguments = ("-x", f"url={url}", *arguments)

    def call() -> str:
        printed = io.StringIO()
        command = CommandLine(prog="alembic")
        options = command.parser.parse_args(arguments)
        config = Config(
            ROOT / "alembic.ini", cmd_opts=options, stdout=printed, output_buffer=printed
        )
        command.run_cmd(config, options)
        return printed.getvalue()

    return await asyncio.to_thread(call)


async def version_of(url: str) -> list[Any]:
    return await run(url, f"SELECT version_num FROM {VERSION_TABLE}")


# From code


@every_kind
async def test_the_first_use_makes_the_tables(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    assert await reflect(url) == {}
    await use(url)
    assert set(await reflect(url)) == {*TABLES, VERSION_TABLE}
    assert await version_of(url) == [(migrate.HEAD,)]
    found = await run(url, "SELECT * FROM adk_internal_metadata")
    assert found == [("schema_version", "1")]


def test_the_version_table_is_our_own() -> None:
    assert VERSION_TABLE == "adk_sessions_version"


@every_kind
async def test_the_tables_are_those_that_google_adk_makes(
    kind: str, fresh_database: NewDatabase
) -> None:
    v1 = pytest.importorskip("google.adk.sessions.schemas.v1")
    theirs, ours = fresh_database(kind), fresh_database(kind)
    async with engine_for(theirs) as engine, engine.begin() as conn:
        await conn.run_sync(v1.Base.metadata.create_all)
    await use(ours)
    found, expected = await reflect(ours), await reflect(theirs)
    assert found.pop(VERSION_TABLE)
    assert found.pop("state_changes")
    type_, nullable = found["events"]["columns"].pop("event_exact")
    assert type_.startswith("LONGTEXT" if kind == "mariadb" else "TEXT")
    assert nullable
    sessions = found["sessions"]
    added = [sessions["columns"].pop(column) for column in ADDED]
    assert all(nullable for _, nullable in added)
    assert {name for name, _ in sessions["indexes"]} == set(PAGE_INDEXES)
    sessions["indexes"] = []
    assert without_collation(found) == without_collation(expected)


def without_collation(found: dict[str, Any]) -> dict[str, Any]:
    """MariaDB's keys are compared by bytes here, google-adk's as the database likes."""
    columns = {
        table: {name: (type_.partition(" C")[0], null) for name, (type_, null) in of.items()}
        for table, of in ((table, about["columns"]) for table, about in found.items())
    }
    return {table: {**about, "columns": columns[table]} for table, about in found.items()}


async def test_keys_on_mariadb_are_compared_by_bytes(fresh_database: NewDatabase) -> None:
    url = fresh_database("mariadb")
    await use(url)
    rows = await run(
        url,
        "SELECT table_name, column_name, data_type, collation_name, datetime_precision"
        " FROM information_schema.columns WHERE table_schema = database()"
        f" AND table_name <> '{VERSION_TABLE}'",
    )
    assert {collation for *_, kind, collation, _ in rows if kind == "varchar"} == {
        "utf8mb4_nopad_bin"
    }
    assert {precision for *_, kind, _, precision in rows if kind == "datetime"} == {6}
    assert {kind for *_, kind, _, _ in rows} == {"varchar", "datetime", "longtext", "int"}


@every_kind
async def test_a_second_start_costs_one_query(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await use(url)
    statements: list[str] = []
    async with engine_for(url) as engine:
        await run_once(engine)  # the dialect's own first questions
        listen(engine, statements)
        service = SessionService(engine=engine)
        await service.prepare_tables()
        statements[:] = [one for one in statements if not is_transaction(one)]
        assert len(statements) == 1
        assert VERSION_TABLE in statements[0]
        await service.prepare_tables()
        assert len(statements) == 1
        other = SessionService(engine=engine)
        await asyncio.gather(*(other.prepare_tables() for _ in range(8)))
        assert len([one for one in statements if not is_transaction(one)]) == 2


async def run_once(engine: AsyncEngine) -> None:
    async with engine.connect() as conn:
        await conn.execute(text("SELECT 1"))


def listen(engine: AsyncEngine, statements: list[str]) -> None:
    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def count(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)


def is_transaction(statement: str) -> bool:
    return statement.split()[0] in ("BEGIN", "COMMIT", "ROLLBACK")


def test_head_is_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrate.scripts()))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [migrate.HEAD]
    revisions = [script.revision for script in scripts.walk_revisions()]
    # `is_ready` compares them as text
    assert revisions == sorted(revisions, reverse=True)
    assert all(len(revision) == 4 for revision in revisions)
    assert migrate.scripts() == ROOT / "alembic"


@pytest.mark.parametrize("kind", SERVERS)
async def test_upgrades_of_several_databases_in_one_loop(
    kind: str, fresh_database: NewDatabase
) -> None:
    urls = [fresh_database(each) for each in ("sqlite", "sqlite", kind, "sqlite")]
    await asyncio.gather(*map(use, urls))
    for url in urls:
        assert await version_of(url) == [(migrate.HEAD,)]
        assert set(await reflect(url)) == {*TABLES, VERSION_TABLE}


@every_kind
async def test_many_services_start_at_once(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await asyncio.gather(*(use(url) for _ in range(4)))
    assert await version_of(url) == [(migrate.HEAD,)]


@every_kind
async def test_a_newer_release_may_have_been_here(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await use(url)
    await run(url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    await use(url)
    assert await version_of(url) == [("9999",)]


@every_kind
async def test_an_older_revision_is_upgraded_and_keeps_its_rows(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    await shell("-x", f"url={url}", "upgrade", "0001")
    await fill(url)
    before = await reflect(url)
    assert "event_exact" not in before["events"]["columns"]
    async with SessionService(url) as service:
        session = await service.get_session(app_name="a", user_id="u", session_id="s")
        assert session is not None
        assert session.state == {"k": 1}
        assert [event.content for event in session.events] == ["kept"]
        await service.append_event(session, Event(content=float("inf")))
    assert await version_of(url) == [(migrate.HEAD,)]


async def fill(url: str) -> None:
    """A session with one event, as an application might have written them."""
    moment = "2026-01-02 03:04:05.000006"
    stamp = f"'{moment}'"
    data = '{"id": "e", "author": "user", "timestamp": 1767323045.0, "content": "kept"}'
    async with engine_for(url) as engine, engine.begin() as conn:
        await conn.exec_driver_sql(
            f"INSERT INTO sessions (app_name, user_id, id, state, create_time, update_time)"
            f" VALUES ('a', 'u', 's', '{{\"k\": 1}}', {stamp}, {stamp})"
        )
        await conn.exec_driver_sql(
            "INSERT INTO events"
            " (id, app_name, user_id, session_id, invocation_id, timestamp, event_data)"
            f" VALUES ('e', 'a', 'u', 's', 'i', {stamp}, '{data}')"
        )


@every_kind
async def test_another_applications_tables_are_not_touched(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    await run(
        url,
        "CREATE TABLE products (id INTEGER PRIMARY KEY, name VARCHAR(20))",
        "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)",
        "INSERT INTO products VALUES (1, 'chair')",
        "INSERT INTO alembic_version VALUES ('1a2b3c')",
    )
    theirs = await reflect(url)
    await use(url)
    assert "No new upgrade operations" in await shell("-x", f"url={url}", "check")
    found = await reflect(url)
    assert {table: found[table] for table in theirs} == theirs
    await shell("-x", f"url={url}", "downgrade", "base")
    found = await reflect(url)
    assert {table: found[table] for table in theirs} == theirs
    assert await run(url, "SELECT * FROM products") == [(1, "chair")]
    assert await run(url, "SELECT * FROM alembic_version") == [("1a2b3c",)]


@every_kind
@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE events DROP COLUMN event_exact",
        "DROP INDEX idx_events_app_user_session_ts_id{on}",
        "ALTER TABLE user_states ADD COLUMN more INTEGER",
    ],
)
async def test_alembic_check_sees_a_difference(
    kind: str,
    statement: str,
    migrated_database: NewDatabase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = migrated_database(kind)
    if kind == "sqlite" and "INDEX" in statement:
        return  # alembic skips indexes that descend there; validate_schema does not
    if kind == "mariadb" and "INDEX" in statement:  # its foreign key needs one
        await run(url, "ALTER TABLE events DROP FOREIGN KEY events_ibfk_1")
    await run(url, statement.format(on=" ON events" if kind == "mariadb" else ""))
    with pytest.raises(SystemExit) as ended:
        await shell("check", url=url)
    assert ended.value.code != 0
    assert "New upgrade operations detected" in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
async def test_a_place_of_ones_own_from_the_shell(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    place = ["-x", "table_prefix=p_"]
    schema = "agents" if kind == "postgresql" else None
    if schema:
        place += ["-x", f"schema={schema}"]
    await shell(*place, "upgrade", "head", url=url)
    async with SessionService(url, schema=schema, table_prefix="p_", migrate="check") as service:
        session = await service.create_session(app_name="a", user_id="u")
        await service.append_event(session, Event(content=float("nan")))
        await service.validate_schema()
    assert "No new upgrade operations" in await shell(*place, "check", url=url)
    await shell(*place, "downgrade", "base", url=url)
    await shell(*place, "upgrade", "head", url=url)
    async with SessionService(url, schema=schema, table_prefix="p_", migrate="check") as service:
        assert await service.get_session(app_name="a", user_id="u", session_id=session.id)
    assert (
        await reflect(url) == {}
        if schema
        else set(await reflect(url)) == {"p_" + name for name in (*TABLES, VERSION_TABLE)}
    )


# An application's own alembic

ENV = """
from alembic import context
from sqlalchemy import Column, Integer, MetaData, Table, create_engine

metadata = MetaData()
Table("products", metadata, Column("id", Integer, primary_key=True))
engine = create_engine(context.config.get_main_option("sqlalchemy.url"))
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
"""
OWN_REVISION = """
from alembic import op
import sqlalchemy as sa

revision, down_revision, branch_labels, depends_on = "aaaa", None, ("shop",), "0004"

def upgrade():
    op.create_table("products", sa.Column("id", sa.Integer, primary_key=True))

def downgrade():
    op.drop_table("products")
"""


async def test_an_application_can_list_our_history_in_its_own(
    tmp_path: Path, fresh_database: NewDatabase
) -> None:
    url = fresh_database("sqlite")
    (tmp_path / "own" / "versions").mkdir(parents=True)
    (tmp_path / "own" / "env.py").write_text(ENV)
    (tmp_path / "own" / "versions" / "first.py").write_text(OWN_REVISION)
    (tmp_path / "alembic.ini").write_text(
        "[alembic]\nscript_location = %(here)s/own\npath_separator = newline\n"
        f"version_locations = %(here)s/own/versions\n  {migrate.scripts() / 'versions'}\n"
        f"sqlalchemy.url = {url}\n"
    )

    def command(*arguments: str) -> str:
        done = forked.run("-m", "alembic", *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    await asyncio.to_thread(command, "upgrade", "adk_sessions@head")
    assert set(await reflect(url)) == {*TABLES, "alembic_version"}
    await asyncio.to_thread(command, "upgrade", "heads")
    assert set(await reflect(url)) == {*TABLES, "alembic_version", "products"}
    async with SessionService(url, migrate="off") as service:
        session = await service.create_session(app_name="a", user_id="u")
        await service.append_event(session, Event(content="x"))
        await service.validate_schema()
    # a service in its default mode finds the tables and adopts them into its own history
    await use(url)
    assert await version_of(url) == [(migrate.HEAD,)]


# SQLite and foreign keys


def rebuild_sessions(conn: Connection) -> None:
    """What alembic's batch mode does to a table: copy, drop, rename."""
    conn.exec_driver_sql("CREATE TABLE copied AS SELECT * FROM sessions")
    [(ddl,)] = conn.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'sessions'")
    conn.exec_driver_sql("DROP TABLE sessions")
    conn.exec_driver_sql(ddl)
    conn.exec_driver_sql("INSERT INTO sessions SELECT * FROM copied")
    conn.exec_driver_sql("DROP TABLE copied")


async def test_a_rebuilt_parent_table_on_sqlite_keeps_its_children(
    fresh_database: NewDatabase,
) -> None:
    url = fresh_database("sqlite")
    await use(url)
    await migrate.with_connection(url, rebuild_sessions)
    assert await run(url, "SELECT count(*) FROM sessions") == [(1,)]
    assert await run(url, "SELECT count(*) FROM events") == [(1,)]


async def test_a_migration_that_would_orphan_events_is_undone(fresh_database: NewDatabase) -> None:
    url = fresh_database("sqlite")
    await use(url)

    def lose(conn: Connection) -> None:
        conn.exec_driver_sql("DELETE FROM sessions")

    with pytest.raises(SchemaError, match="events without their session"):
        await migrate.with_connection(url, lose)
    assert await run(url, "SELECT count(*) FROM sessions") == [(1,)]


async def test_foreign_keys_are_on_again_after_a_migration(fresh_database: NewDatabase) -> None:
    database, statements = open_url(fresh_database("sqlite"), models())
    try:
        await migrate.bring_to_head(database, statements, Names())
        switch = await database.submit(
            lambda conn: conn.exec_driver_sql("PRAGMA foreign_keys").scalar(), write=True
        )
        assert switch == 1
    finally:
        await database.close()


@every_kind
async def test_a_migration_that_fails_leaves_nothing_behind(
    kind: str, fresh_database: NewDatabase
) -> None:
    if kind == "mariadb":
        pytest.skip("MariaDB commits at each DDL statement")
    url = fresh_database(kind)

    def fail(conn: Connection) -> None:
        conn.exec_driver_sql("CREATE TABLE half (i INTEGER)")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        await migrate.with_connection(url, fail)
    assert await reflect(url) == {}
    await use(url)  # and no lock either


# The lock


async def refused_for_the_lock(url: str) -> None:
    database, statements = open_url(url, models(), connect_args=busy(url))
    loop = asyncio.get_running_loop()
    try:
        start = loop.time()
        with pytest.raises(MigrationLockError, match="Look for a migration that hangs"):
            await migrate.bring_to_head(database, statements, Names(), lock_timeout=0.2)
        assert 0.2 <= loop.time() - start < migrate.LOCK_TIMEOUT / 2
    finally:
        await database.close()


def busy(url: str) -> dict[str, Any]:
    return {"timeout": 0.05} if url.startswith("sqlite") else {}


@pytest.mark.parametrize(
    ("kind", "take"),
    [
        ("postgresql", "SELECT pg_advisory_lock(x'61646B7365737331'::bigint)"),
        ("mariadb", "SELECT get_lock(concat('adk_sessions.', sha1(database())), 0)"),
        ("sqlite", "BEGIN IMMEDIATE"),
    ],
)
async def test_a_lock_that_is_held_for_too_long(
    kind: str, take: str, fresh_database: NewDatabase
) -> None:
    url, other = fresh_database(kind), fresh_database(kind)
    if kind == "sqlite":
        with closing(sqlite3.connect(make_url(url).database or "", isolation_level=None)) as raw:
            raw.execute("PRAGMA journal_mode = WAL")
            raw.execute(take)
            await refused_for_the_lock(url)
            await use(other)
    else:
        async with engine_for(url) as engine, engine.connect() as conn:
            await conn.execute(text(take))
            await conn.commit()
            await refused_for_the_lock(url)
            await use(other)  # the lock is for one database, not for the whole server
    assert await reflect(url) == {}
    await use(url)


async def test_who_waits_for_the_lock_goes_on_when_it_is_free(fresh_database: NewDatabase) -> None:
    url = fresh_database("postgresql")
    async with engine_for(url) as engine, engine.connect() as conn:
        await conn.execute(text("SELECT pg_advisory_lock(x'61646B7365737331'::bigint)"))
        await conn.commit()
        statements: list[str] = []
        async with engine_for(url) as waiting:
            tried = asyncio.Event()

            @event.listens_for(waiting.sync_engine, "before_cursor_execute")
            def watch(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
                statements.append(statement)
                if sum("pg_try_advisory" in one for one in statements) == 2:
                    tried.set()

            database, known = open_engine(waiting, models())
            task = asyncio.create_task(migrate.bring_to_head(database, known, Names()))
            async with asyncio.timeout(60):
                await tried.wait()
                assert not task.done()
                await conn.execute(text("SELECT pg_advisory_unlock_all()"))
                await conn.commit()
                await task
    await use(url)


# What is there already


FOREIGN: dict[str, tuple[str, ...]] = {
    "another application's events with actions": (
        "CREATE TABLE sessions (app_name VARCHAR(128), user_id VARCHAR(128), id VARCHAR(128),"
        " state TEXT, create_time TIMESTAMP NULL, update_time TIMESTAMP NULL,"
        " PRIMARY KEY (app_name, user_id, id))",
        "CREATE TABLE events (id VARCHAR(128) PRIMARY KEY, actions TEXT, content TEXT)",
    ),
    "another application's events": ("CREATE TABLE events (id INTEGER PRIMARY KEY, title TEXT)",),
    "another application's sessions": (
        "CREATE TABLE sessions (id VARCHAR(40) PRIMARY KEY, payload TEXT, last_activity INTEGER)",
    ),
    "another application's app_states": (
        "CREATE TABLE app_states (id INTEGER PRIMARY KEY, title TEXT)",
    ),
    "another application's user_states": (
        "CREATE TABLE user_states (id INTEGER PRIMARY KEY, title TEXT)",
    ),
    "a layout of the future": (
        'CREATE TABLE adk_internal_metadata ({key} VARCHAR(128) PRIMARY KEY, "value" VARCHAR(256))',
        "INSERT INTO adk_internal_metadata VALUES ('schema_version', '2')",
    ),
    "a layout without version": (
        'CREATE TABLE adk_internal_metadata ({key} VARCHAR(128) PRIMARY KEY, "value" VARCHAR(256))',
    ),
}


@every_kind
@pytest.mark.parametrize("statements", FOREIGN.values(), ids=FOREIGN)
async def test_tables_that_cannot_be_adopted(
    kind: str, statements: tuple[str, ...], fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    quote = "`" if kind == "mariadb" else '"'
    await run(url, *(s.format(key='"key"').replace('"', quote) for s in statements))
    before = await reflect(url)
    async with SessionService(url) as service:
        with pytest.raises(SchemaError) as caught:
            await service.create_session(app_name="a", user_id="u")
        assert type(caught.value) is SchemaError
        with pytest.raises(SchemaError):
            await service.prepare_tables()
    after = await reflect(url)
    if kind == "mariadb":  # alembic's own table is there: DDL commits
        after.pop(VERSION_TABLE, None)
    assert after == before


@every_kind
async def test_google_adks_old_layout_says_what_to_run(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    frozen = ROOT / "tests" / "data" / "v0" / f"1.21.0-{kind}.sql"
    await run_script(url, frozen.read_text())
    before = await reflect(url)
    for mode in ("auto", "check"):
        async with SessionService(url, migrate=mode) as service:
            with pytest.raises(SchemaError, match="adk-sessions upgrade --dry-run"):
                await service.prepare_tables()
    with pytest.raises(SchemaError, match="--source-timezone"):
        await migrate.check(url)
    assert await reflect(url) == before


# From the shell


@every_kind
async def test_upgrade_and_downgrade_from_the_shell(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await shell("-x", f"url={url}", "upgrade", "head")
    assert await version_of(url) == [(migrate.HEAD,)]
    assert set(await reflect(url)) == {*TABLES, VERSION_TABLE}
    await use(url)
    rows = await run(url, "SELECT id, event_data FROM events")
    await shell("downgrade", "base", url=url)
    # google-adk's own schema stays, with what is in it
    assert set(await reflect(url)) == {*TABLES, VERSION_TABLE} - {"state_changes"}
    assert "event_exact" not in (await reflect(url))["events"]["columns"]
    assert not set(ADDED) & set((await reflect(url))["sessions"]["columns"])
    assert await version_of(url) == []
    assert await run(url, "SELECT id, event_data FROM events") == rows != []
    await shell("upgrade", "head", url=url)
    assert migrate.HEAD in await shell("current", url=url)
    await use(url)


@every_kind
@pytest.mark.parametrize("command", ["current", "check", "history", "heads"])
async def test_a_command_that_asks_makes_nothing(
    kind: str, command: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    with contextlib.suppress(SystemExit):  # `check` finds that the database is not up to date
        await shell(command, url=url)
    assert await reflect(url) == {}


def test_the_shell_without_a_url_says_what_it_needs() -> None:
    done = alembic("upgrade", "head")
    assert done.returncode != 0
    assert "ADK_SESSIONS_URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_url_on_the_command_line_wins(tmp_path: Path) -> None:
    one, other = (f"sqlite:///{tmp_path / name}" for name in ("one.db", "other.db"))
    assert alembic("-x", f"url={one}", "upgrade", "head", url=other).returncode == 0
    assert [path.name for path in tmp_path.glob("*.db")] == ["one.db"]


def test_sql_for_postgresql_without_a_database() -> None:
    url = "postgresql://ann:secret@no.such.host/x"
    done = alembic("upgrade", "head", "--sql", url=url)
    assert done.returncode == 0, done.stderr
    for table in TABLES:
        assert f"CREATE TABLE {table} (" in done.stdout
    assert "CREATE TABLE adk_sessions_version (" in done.stdout
    assert "CREATE INDEX idx_events_app_user_session_ts_id ON events" in done.stdout
    assert "timestamp DESC, id DESC" in done.stdout
    assert "state JSONB NOT NULL" in done.stdout
    assert "ADD COLUMN event_exact TEXT" in done.stdout
    assert "'schema_version', '1'" in done.stdout
    assert "ON DELETE CASCADE" in done.stdout
    assert "secret" not in done.stdout + done.stderr


async def test_that_sql_makes_a_database_that_works(fresh_database: NewDatabase) -> None:
    import asyncpg

    url = fresh_database("postgresql")
    script = await shell("upgrade", "head", "--sql", url=url)
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(script)
    finally:
        await connection.close()
    assert await version_of(url) == [(migrate.HEAD,)]
    await use(url)


def test_the_folder_alembic_is_no_package() -> None:
    assert (ROOT / "alembic" / "env.py").is_file()
    # with one, `import alembic` from the repository's root would find the folder
    assert not list((ROOT / "alembic").rglob("__init__.py"))
    code = "import alembic, alembic.command; print(alembic.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


async def test_readers_do_not_wait_behind_a_migration_that_waits(
    fresh_database: NewDatabase,
) -> None:
    url = fresh_database("postgresql")
    async with SessionService(url) as service:
        session = await service.create_session(app_name="a", user_id="u")
        await service.append_event(session, Event(content="x"))
    await run(url, "ALTER TABLE events DROP COLUMN event_exact", "DROP TABLE adk_sessions_version")
    async with engine_for(url) as engine, SessionService(url) as service:
        async with engine.connect() as reader:
            await reader.execute(text("SELECT * FROM events"))
            upgrade = asyncio.create_task(service.prepare_tables())
            async with engine.connect() as watcher:
                waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
                while not (await watcher.execute(waiting)).scalar_one():
                    assert not upgrade.done()
                    await asyncio.sleep(0.01)
                async with asyncio.timeout(60):  # without an end, if the migration does not yield
                    await watcher.execute(text("SELECT * FROM events"))
            assert not upgrade.done()
        await upgrade
        again = await service.get_session(app_name="a", user_id="u", session_id=session.id)
        assert again == session
