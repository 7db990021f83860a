"""The command ``adk-sessions``."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest
from commands import ok, process, refused, run
from engines import engine_for
from scripts import run_script
from servers import free_port, run_sync
from sqlalchemy import inspect, text

from adk_sessions import Event, SessionService, migrate
from adk_sessions.cli import main
from adk_sessions.models import TABLES, VERSION_TABLE

NewDatabase = Callable[[str], str]
every_kind = pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])


async def tables_of(url: str, schema: str | None = None) -> set[str]:
    async with engine_for(url) as engine, engine.connect() as conn:
        return set(await conn.run_sync(lambda conn: inspect(conn).get_table_names(schema)))


async def execute(url: str, *statements: str) -> None:
    async with engine_for(url) as engine, engine.begin() as conn:
        for statement in statements:
            await conn.execute(text(statement))


async def use(url: str, **options: str) -> None:
    async with SessionService(url, migrate="check", **options) as service:
        await service.validate_schema()
        await service.create_session(app_name="a", user_id="u")


@every_kind
def test_the_schemas_life(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    assert ok("current", "--url", url) == "none\n"
    assert "Run: adk-sessions upgrade --url …" in refused("check", "--url", url)
    assert ok("upgrade", "--dry-run", "--url", url) == (
        f"Now at no revision; upgrade would bring it to {migrate.HEAD}.\n"
    )
    assert run_sync(tables_of(url)) == set()
    assert ok("upgrade", "--url", url) == f"From no revision to {migrate.HEAD}.\n"
    assert ok("upgrade", url=url) == f"At {migrate.HEAD} already.\n"
    assert ok("current", url=url) == f"{migrate.HEAD} (head)\n"
    assert migrate.HEAD in ok("check", url=url)
    run_sync(use(url))
    assert ok("stamp", "0003", url=url) == "Stamped 0003.\n"
    assert ok("current", url=url) == "0003\n"
    assert "at revision 0003" in refused("check", url=url)
    assert ok("stamp", url=url) == f"Stamped {migrate.HEAD}.\n"
    assert ok("stamp", "base", url=url) == "Stamped none.\n"
    assert "no revision 'nonsense'" in refused("stamp", "nonsense", url=url)


@every_kind
def test_check_prints_every_difference(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    ok("upgrade", url=url)
    run_sync(
        execute(
            url,
            "ALTER TABLE events DROP COLUMN event_exact",
            "ALTER TABLE user_states DROP COLUMN update_time",
        )
    )
    message = refused("check", url=url)
    assert "events.event_exact" in message
    assert "user_states.update_time" in message


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_place_of_ones_own(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    place = ["--table-prefix", "p_", *(["--schema", "agents"] if kind == "postgresql" else [])]
    ok("upgrade", *place, url=url)
    assert ok("current", *place, url=url) == f"{migrate.HEAD} (head)\n"
    assert ok("current", url=url) == "none\n"
    ok("check", *place, url=url)
    schema = "agents" if kind == "postgresql" else None
    assert run_sync(tables_of(url, schema)) == {"p_" + name for name in (*TABLES, VERSION_TABLE)}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_schemas_life_as_processes(
    kind: str, fresh_database: NewDatabase, tmp_path: Path
) -> None:
    url = fresh_database(kind)
    made = process("upgrade", url=url)
    assert made.stdout == f"From no revision to {migrate.HEAD}.\n"
    assert process("current", url=url).stdout == f"{migrate.HEAD} (head)\n"
    assert migrate.HEAD in process("check", url=url).stdout
    assert "CREATE TABLE" in process("sql", "--dialect", kind).stdout
    file = tmp_path / "google.db"
    frozen = (Path(__file__).parent / "data" / "adk_sqlite" / "sessions.sql").read_text()
    with closing(sqlite3.connect(file)) as raw:
        raw.executescript(frozen)
    imported = process("import-adk-sqlite", str(file), url=url)
    assert re.search(r"Imported\s.*sessions +│ +5 │", imported.stdout, re.DOTALL)
    run_sync(execute(url, "CREATE TABLE adk_v0_events (id INTEGER)"))
    finished = process("finish-conversion", "--yes", url=url)
    assert finished.stdout.startswith("Dropped ")
    assert run_sync(tables_of(url)) == {*TABLES, VERSION_TABLE}
    assert "no backups" in process("finish-conversion", "--yes", url=url, status=1).stderr
    assert process("stamp", "0003", url=url).stdout == "Stamped 0003.\n"


# SQL to paste


@every_kind
@pytest.mark.parametrize("place", [(), ("--schema", "agents", "--table-prefix", "p_")])
def test_the_sql_makes_what_the_upgrade_makes(
    kind: str, place: tuple[str, ...], fresh_database: NewDatabase
) -> None:
    if place and kind != "postgresql":
        place = place[2:]
    url = fresh_database(kind)
    script = ok("sql", "--dialect", kind, *place)
    run_sync(run_script(url, script))
    assert ok("current", *place, url=url) == f"{migrate.HEAD} (head)\n"
    ok("check", *place, url=url)
    names = dict(zip(("schema", "table_prefix"), ("agents", "p_"), strict=True)) if place else {}
    if kind != "postgresql":
        names.pop("schema", None)
    run_sync(use(url, **names))


def test_sql_for_a_database_that_does_not_exist() -> None:
    done = run("sql", "--dialect", "informix")
    assert done.exit_code == 2
    assert "'postgresql', 'mysql', 'mariadb'" in done.stderr


@pytest.mark.parametrize("dialect", ["sqlite", "mysql", "mariadb"])
def test_row_level_security_is_for_postgresql(dialect: str) -> None:
    assert "row_level_security" in refused("sql", "--dialect", dialect, "--rls")


def test_row_level_security_is_printed_with_the_tables() -> None:
    assert "no schemas" in refused("sql", "--dialect", "sqlite", "--schema", "agents")
    script = ok("sql", "--dialect", "postgresql", "--rls", "--schema", "agents")
    assert script.startswith(ok("sql", "--dialect", "postgresql", "--schema", "agents"))
    assert script.count("FORCE ROW LEVEL SECURITY") == 5


# When it goes wrong


def test_a_url_is_needed() -> None:
    done = run("upgrade", url=None)
    assert done.exit_code == 2
    assert "--url" in done.stderr


@pytest.mark.parametrize("command", ["upgrade", "current", "check", "stamp"])
def test_a_server_that_is_not_there(command: str) -> None:
    message = refused(command, url=f"postgresql://ann:top-secret@127.0.0.1:{free_port()}/db")
    assert "top-secret" not in message
    assert message.startswith("Error: ")


def test_a_url_that_is_none() -> None:
    message = refused("current", "--url", "top-secret")
    assert "top-secret" not in message


def test_a_time_zone_that_is_none(fresh_database: NewDatabase) -> None:
    message = refused("upgrade", "--source-timezone", "Mars/Base", url=fresh_database("sqlite"))
    assert "Mars/Base" in message


def test_a_lock_that_cannot_be_had(fresh_database: NewDatabase) -> None:
    url = fresh_database("postgresql")

    async def refuse() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute("SELECT pg_advisory_lock(x'61646B7365737331'::bigint)")
            import asyncio

            message = await asyncio.to_thread(refused, "upgrade", "--lock-timeout", "0.2", url=url)
            assert "Look for a migration that hangs" in message
        finally:
            await connection.close()

    run_sync(refuse())


# Looking after the data


async def break_off(url: str) -> None:
    """Two apps, in each a session whose agent stopped in the middle of a call."""
    call = {"function_call": {"id": "c", "name": "look_up", "args": {"q": "top-secret"}}}
    content = {"role": "model", "parts": [call]}
    async with SessionService(url) as service:
        for app in ("one", "two"):
            session = await service.create_session(app_name=app, user_id="ann", session_id="s")
            event = Event(id="e", invocation_id="i", author="clerk", content=content)
            await service.append_event(session, event)


@every_kind
def test_the_doctor(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    unmade = run("doctor", "--repair", url=url)
    assert unmade.exit_code == 1
    assert "adk-sessions upgrade --url …" in unmade.stdout
    assert "Only then is anything repaired" in unmade.stdout
    assert run_sync(tables_of(url)) == set()
    ok("upgrade", url=url)
    assert "Nothing is wrong." in ok("doctor", url=url)
    run_sync(break_off(url))
    # that was a moment ago: somebody may be at it
    assert "may still be running" in ok("doctor", url=url)
    at_once = ("doctor", "--older-than", "0")
    found = run(*at_once, url=url)
    assert found.exit_code == 1
    assert "open calls: 'one' / 'ann' / 's' / 'e' / 'look_up c'" in found.stdout
    assert "top-secret" not in found.output
    [row] = json.loads(run(*at_once, "--app", "two", "--json", url=url).stdout)["found"][
        "open_calls"
    ]["rows"]
    assert (row["app_name"], row["event_id"]) == ("two", "e")
    assert "Nothing is wrong." in ok(*at_once, "--app", "two", "--repair", url=url)
    assert run(*at_once, "--app", "one", url=url).exit_code == 1
    told = json.loads(ok(*at_once, "--repair", "--json", url=url))
    assert told["healthy"]
    assert told["repaired"]["calls"] == 1
    assert json.loads(ok(*at_once, "--repair", "--json", url=url))["repaired"]["calls"] == 0


def test_the_doctor_without_google_adk(
    fresh_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = fresh_database("sqlite")
    run_sync(break_off(url))
    monkeypatch.delitem(sys.modules, "adk_sessions.adk", raising=False)
    monkeypatch.setitem(sys.modules, "google.adk", None)
    for events in ("auto", "plain"):
        assert "Nothing is wrong." in ok("doctor", "--events", events, url=url)
    assert "pip install" in refused("doctor", "--events", "adk", url=url)
    assert "Nothing is wrong." in ok("doctor", "--older-than", "0", "--repair", url=url)


def test_the_doctor_reads_as_google_adk_where_it_can(fresh_database: NewDatabase) -> None:
    pytest.importorskip("google.adk")
    url = fresh_database("sqlite")

    async def write() -> None:
        async with SessionService(url) as service:
            session = await service.create_session(app_name="a", user_id="u", session_id="s")
            await service.append_event(session, Event(id="e", author="a", content="plain text"))

    run_sync(write())
    done = run("doctor", url=url)
    assert done.exit_code == 1
    assert "unreadable: 'a' / 'u' / 's' / 'e'" in done.stdout
    assert "plain text" not in done.stdout
    ok("doctor", "--events", "plain", url=url)


@pytest.mark.parametrize("option", [("--events", "nonsense"), ("--older-than", "-1"), ("--fix",)])
def test_the_doctor_asked_wrongly(option: tuple[str, ...]) -> None:
    assert run("doctor", *option, url="sqlite://").exit_code == 2


def test_the_doctor_at_a_server_that_is_not_there() -> None:
    message = refused("doctor", url=f"postgresql://ann:top-secret@127.0.0.1:{free_port()}/db")
    assert "top-secret" not in message


def test_every_command_is_documented() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert set(re.findall(r"adk-sessions ([a-z-]+)", readme)) >= set(main.commands)
    for command in main.commands.values():
        assert command.help
