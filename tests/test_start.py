"""Processes that start at once on a database whose tables are not there, or not those of today.

A launcher, which is this file run as a script, has imported everything and forks them; they wait
until all are there. ADK_SESSIONS_SOAK=1 repeats each race 20 times.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from typing import Any

import asyncmy
import asyncpg
import pytest
from engines import engine_for
from freeze import adk_tables, query, schema_of
from scripts import run_all
from sqlalchemy import event, make_url, text
from sqlalchemy.engine import Engine

from adk_sessions import Event, EventActions, MigrationLockError, SessionService, migrate
from adk_sessions.models import INDEX, VERSION_TABLE

SOAK = os.environ.get("ADK_SESSIONS_SOAK") == "1"
ROUNDS = 20 if SOAK else 1
PROCESSES = 32
FEW = 8
PATIENCE = 90.0  # seconds that all of a round may take; nobody is to come near
BOUND = 50.0  # less than a migration waits for its lock

KINDS = ["sqlite", "postgresql", "mariadb"]
every_kind = pytest.mark.parametrize("kind", KINDS)
again_and_again = pytest.mark.parametrize("turn", range(ROUNDS))

NewDatabase = Callable[[str], str]

# What a migration does to a schema, statement by statement.
CHANGES = ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE")


# --- the launcher: no threads and no loop, it forks ---------------------------------------------


@dataclass
class Child:
    pid: int
    said: int  # a pipe's end to read from


def launch() -> None:
    """Forks the processes that lines of JSON ask for; one line answers each."""
    assert asyncmy
    assert asyncpg
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = {"result": globals()[job["do"]](**job["with"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


def race(url: str, processes: int) -> list[dict[str, Any]]:
    """Starts so many at the same moment; what each has to say."""
    with starting() as gate:
        children = [fork(n, url, gate) for n in range(processes)]
    return collect(children)


def overtake(url: str, processes: int, change: int) -> dict[str, Any]:
    """Starts one, which stops for good before a change to the schema, and others while it holds
    the lock; then kills it.

    Returns:
        The statement it stopped at, None if it came to an end without, and what the others said.
    """
    with starting() as gate:
        victim = fork(0, url, gate, stop_at=change)
    with open(victim.said) as said:
        first = json.loads(said.readline())
    statement = first.get("stopped")
    with starting() as gate:
        others = [fork(n, url, gate) for n in range(1, processes + 1)]
    early = []
    if statement is not None:
        # not even one of them gets through while the lock is held
        wait = 0.5 if processes > 1 else 0.0
        early, _, _ = select.select([child.said for child in others], [], [], wait)
        os.kill(victim.pid, signal.SIGKILL)
    os.waitpid(victim.pid, 0)
    return {
        "stopped": statement,
        "first": first,
        "early": len(early),
        "others": collect(others),
    }


class starting:
    """The gate that processes wait at; it opens when all were forked."""

    def __enter__(self) -> tuple[int, int]:
        self.ends = os.pipe()
        return self.ends

    def __exit__(self, *_: object) -> None:
        for end in self.ends:
            os.close(end)


def fork(n: int, url: str, gate: tuple[int, int], stop_at: int | None = None) -> Child:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Child(pid, read)
    try:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        os.close(gate[1])
        if stop_at is not None:
            stop_before_change(stop_at, write)
        os.read(gate[0], 1)  # the end of the file is the start
        began = time.monotonic()
        failed = None
        try:
            asyncio.run(work(url, f"user-{n}"))
        except BaseException:
            failed = traceback.format_exc()
        say(write, {"error": failed, "seconds": time.monotonic() - began})
    finally:
        os._exit(0)


def say(pipe: int, what: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(what).encode() + b"\n")


def collect(children: list[Child]) -> list[dict[str, Any]]:
    found = []
    for child in children:
        with open(child.said) as said:
            lines = said.readlines()
        os.waitpid(child.pid, 0)
        found.append(json.loads(lines[-1]) if lines else {"error": "it died", "seconds": 0.0})
    return found


def stop_before_change(number: int, pipe: int) -> None:
    """Makes this process stop before the migration's statement of that number, and say so."""
    seen = 0

    @event.listens_for(Engine, "before_cursor_execute")
    def stop(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal seen
        if is_change(statement):
            if seen == number:
                say(pipe, {"stopped": statement})
                signal.pause()
            seen += 1


def is_change(statement: str) -> bool:
    """Whether it is a migration's: create and append name their columns otherwise."""
    words = statement.split()
    if words[0] in ("INSERT", "UPDATE"):
        return VERSION_TABLE in statement or "adk_internal_metadata" in statement
    return words[0] in CHANGES


async def work(url: str, user: str) -> None:
    """What an application does first."""
    ids = {"app_name": "start", "user_id": user}
    async with SessionService(url, pool_size=1, max_overflow=0) as service:
        session = await service.create_session(**ids, state={f"app:{user}": 1, "user:a": 1, "b": 1})
        actions = EventActions(state_delta={"app:last": user, "c": 1})
        await service.append_event(session, Event(content="hello", actions=actions))
        found = await service.get_session(**ids, session_id=session.id)
        assert found is not None
        assert found.events == session.events
        assert {"user:a": 1, "b": 1, "c": 1, f"app:{user}": 1}.items() <= found.state.items()


# --- asking it ----------------------------------------------------------------------------------


class Launcher:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    async def __call__(self, job: str, **arguments: Any) -> Any:
        return await asyncio.to_thread(self.ask, job, arguments)

    def ask(self, job: str, arguments: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"do": job, "with": arguments}) + "\n")
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


# What a process that was alone has made, by kind of database and what was there before.
_alone: dict[tuple[str, bool], Any] = {}


async def schema_made_alone(kind: str, adopted: bool, fresh_database: NewDatabase) -> Any:
    if (kind, adopted) not in _alone:
        url = fresh_database(kind)
        if adopted:
            await adopt(url, kind)
        await migrate.upgrade(url)
        _alone[kind, adopted] = await schema_of(url)
    return _alone[kind, adopted]


async def adopt(url: str, kind: str) -> None:
    """Makes what an earlier release of google-adk has made, with a session in it."""
    moment = "'2026-01-02 03:04:05.000006'"
    rows = [
        "INSERT INTO sessions (app_name, user_id, id, state, create_time, update_time)"
        f" VALUES ('kept', 'ann', 's', '{{}}', {moment}, {moment})",
        "INSERT INTO events (id, app_name, user_id, session_id, invocation_id, timestamp,"
        f" event_data) VALUES ('e', 'kept', 'ann', 's', 'i', {moment}, '{{\"content\": \"old\"}}')",
    ]
    await run_all(url, [*adk_tables(kind), *rows])


async def check(url: str, kind: str, users: int, expected: Any) -> None:
    """That there is one history, and that nothing is lost or left."""
    assert await query(url, f"SELECT version_num FROM {VERSION_TABLE}") == [(migrate.HEAD,)]
    assert await query(url, "SELECT * FROM adk_internal_metadata") == [("schema_version", "1")]
    assert await schema_of(url) == expected
    async with SessionService(url, migrate="check") as service:
        listed = await service.list_sessions(app_name="start")
        assert len(listed.sessions) == len({one.user_id for one in listed.sessions}) == users
        states = await service.get_app_state(app_name="start")
        assert len(states) == users + 1
        await service.validate_schema()
    assert (await query(url, "SELECT count(*) FROM events WHERE app_name = 'start'")) == [(users,)]
    assert await locks(url, kind) == 0


async def locks(url: str, kind: str) -> int:
    """How many locks for a migration are held in the database."""
    if kind == "sqlite":
        with closing(sqlite3.connect(str(make_url(url).database), timeout=0)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            return 0
    statement = {
        "postgresql": "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())",
        "mariadb": "SELECT is_used_lock(concat('adk_sessions.', sha1(database()))) IS NOT NULL",
    }[kind]
    [(held,)] = await query(url, statement)
    return int(held)


def assert_all_well(said: list[dict[str, Any]]) -> None:
    errors = [one["error"] for one in said if one["error"] is not None]
    assert not errors, f"{len(errors)} of {len(said)} failed:\n" + "\n".join(sorted(set(errors)))
    assert max(one["seconds"] for one in said) < BOUND


# --- races --------------------------------------------------------------------------------------


@every_kind
@again_and_again
async def test_processes_start_at_once_on_an_empty_database(
    kind: str, turn: int, launcher: Launcher, fresh_database: NewDatabase
) -> None:
    expected = await schema_made_alone(kind, False, fresh_database)
    url = fresh_database(kind)
    assert_all_well(await launcher("race", url=url, processes=PROCESSES))
    await check(url, kind, PROCESSES, expected)


@every_kind
@again_and_again
async def test_processes_start_at_once_on_what_google_adk_has_made(
    kind: str, turn: int, launcher: Launcher, fresh_database: NewDatabase
) -> None:
    expected = await schema_made_alone(kind, True, fresh_database)
    url = fresh_database(kind)
    await adopt(url, kind)
    assert_all_well(await launcher("race", url=url, processes=FEW))
    await check(url, kind, FEW, expected)
    await check_kept(url)


async def check_kept(url: str) -> None:
    async with SessionService(url) as service:
        session = await service.get_session(app_name="kept", user_id="ann", session_id="s")
        assert session is not None
        assert [one.content for one in session.events] == ["old"]


@every_kind
async def test_the_others_finish_when_the_one_that_migrates_is_killed(
    kind: str, launcher: Launcher, fresh_database: NewDatabase
) -> None:
    expected = await schema_made_alone(kind, False, fresh_database)
    url = fresh_database(kind)
    done = await launcher("overtake", url=url, processes=FEW, change=3)
    assert done["stopped"]
    assert done["early"] == 0
    assert_all_well(done["others"])
    await check(url, kind, FEW, expected)


# Where DDL cannot be undone each statement is a place of its own to be killed at; every other one
# is tried, and with ADK_SESSIONS_SOAK all.
EVERYWHERE = [
    pytest.param(kind, adopted, id=f"{kind}-{'adopted' if adopted else 'empty'}")
    for kind in (KINDS if SOAK else ["mariadb"])
    for adopted in (False, True)
]


@pytest.mark.parametrize(("kind", "adopted"), EVERYWHERE)
async def test_a_kill_before_any_statement_is_made_good(
    kind: str, adopted: bool, launcher: Launcher, fresh_database: NewDatabase
) -> None:
    expected = await schema_made_alone(kind, adopted, fresh_database)
    stopped = []
    for change in range(0, 100, 1 if SOAK else 4):
        url = fresh_database(kind)
        if adopted:
            await adopt(url, kind)
        done = await launcher("overtake", url=url, processes=1, change=change)
        assert_all_well(done["others"])
        if done["stopped"] is None:
            assert done["first"]["error"] is None
            break
        stopped.append(done["stopped"])
        assert await schema_of(url) == expected, f"one was killed before {done['stopped']}"
        if adopted:
            await check_kept(url)
        assert await locks(url, kind) == 0
    assert len(stopped) > 2


# --- the lock -----------------------------------------------------------------------------------


@asynccontextmanager
async def held(kind: str, url: str) -> AsyncIterator[None]:
    """Somebody else migrates, and does not come to an end."""
    if kind == "sqlite":
        with closing(sqlite3.connect(str(make_url(url).database))) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # as whoever migrates has done
            connection.execute("BEGIN IMMEDIATE")
            yield
        return
    statement = {
        "postgresql": "SELECT pg_advisory_lock(x'61646B7365737331'::bigint)",
        "mariadb": "SELECT get_lock(concat('adk_sessions.', sha1(database())), 0)",
    }[kind]
    async with engine_for(url) as engine, engine.connect() as conn:
        await conn.execute(text(statement.replace(":", "\\:")))
        await conn.commit()
        yield


@every_kind
async def test_a_lock_that_cannot_be_had_in_time(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    async with held(kind, url):
        began = time.monotonic()
        with pytest.raises(MigrationLockError, match="has been migrating"):
            await migrate.upgrade(url, lock_timeout=0.5)
        assert 0.5 <= time.monotonic() - began < BOUND
        assert await schema_of(url) == {}
    await migrate.upgrade(url)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_a_table_that_cannot_be_had_in_time(kind: str, fresh_database: NewDatabase) -> None:
    """A transaction that somebody has left open, and the readers that would queue behind."""
    url = fresh_database(kind)
    await adopt(url, kind)
    async with engine_for(url) as engine, engine.connect() as idle:
        await idle.execute(text("SELECT * FROM events"))
        began = time.monotonic()
        with pytest.raises(MigrationLockError):
            await migrate.upgrade(url, lock_timeout=1)
        assert time.monotonic() - began < BOUND
        await idle.rollback()
        assert await locks(url, kind) == 0
    await migrate.upgrade(url)
    await check_kept(url)


# --- an index that is built beside the work -----------------------------------------------------


async def index_is_valid(url: str) -> list[tuple[Any, ...]]:
    return await query(
        url,
        "SELECT indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid"
        f" WHERE relname = '{INDEX}'",
    )


async def until(url: str, question: str) -> Any:
    """The first answer that is not nothing."""
    async with engine_for(url) as engine, asyncio.timeout(BOUND):
        while True:
            async with engine.connect() as conn:
                found = (await conn.exec_driver_sql(question)).scalar()
            if found:
                return found
            await asyncio.sleep(0.02)


BUILDING = (
    "SELECT pid FROM pg_stat_progress_create_index WHERE datname = current_database()"
    " AND phase LIKE 'waiting for %'"
)


@asynccontextmanager
async def transaction(url: str, *statements: str) -> AsyncIterator[Any]:
    """An application's transaction, which is open until the end."""
    async with (
        engine_for(url, isolation_level="REPEATABLE READ") as engine,
        engine.connect() as conn,
    ):
        for statement in statements:
            await conn.exec_driver_sql(statement)
        yield conn
        await conn.rollback()


async def test_an_index_whose_build_was_broken_off_is_replaced(
    fresh_database: NewDatabase,
) -> None:
    url = fresh_database("postgresql")
    await adopt(url, "postgresql")
    async with (
        transaction(url, "INSERT INTO user_states VALUES ('a', 'b', '{}', now())"),
        engine_for(url, isolation_level="AUTOCOMMIT") as engine,
        engine.connect() as conn,
    ):
        columns = "app_name, user_id, session_id, timestamp DESC, id DESC"
        concurrently = text(f"CREATE INDEX CONCURRENTLY {INDEX} ON events ({columns})")
        build = asyncio.create_task(conn.execute(concurrently))
        pid = await until(url, BUILDING)
        await query(url, f"SELECT pg_cancel_backend({pid})")
        with pytest.raises(Exception, match="cancel"):
            await build
    assert await index_is_valid(url) == [(False,)]
    await migrate.upgrade(url)
    assert await index_is_valid(url) == [(True,)]
    assert await schema_of(url) == await schema_made_alone("postgresql", True, fresh_database)


HOLDS = {
    "an old snapshot": "SELECT count(*) FROM user_states",
    "a row": "UPDATE events SET invocation_id = 'held' WHERE app_name = 'kept'",
}


@pytest.mark.parametrize("statement", HOLDS.values(), ids=HOLDS)
async def test_nobody_who_writes_waits_while_the_index_is_built(
    statement: str, fresh_database: NewDatabase
) -> None:
    """The build waits for a transaction that somebody has left open; appends do not."""
    url = fresh_database("postgresql")
    await adopt(url, "postgresql")
    async with SessionService(url) as service, SessionService(url) as another:
        await service.prepare_tables()
        session = await service.create_session(app_name="start", user_id="ann")
        # the release that is running has all but the index
        await query(url, f"DROP INDEX {INDEX}")
        await query(url, f"UPDATE {VERSION_TABLE} SET version_num = '0003'")
        async with transaction(url, statement) as idle:
            upgrade = asyncio.create_task(migrate.upgrade(url))
            try:
                await until(url, BUILDING)
                start = asyncio.create_task(another.prepare_tables())
                async with asyncio.timeout(BOUND):
                    for n in range(20):
                        await service.append_event(session, Event(content=n))
                    await service.create_session(app_name="start", user_id="ann")
                    await service.delete_session("start", "ann", session.id)
                assert not upgrade.done()
                assert not start.done()
                assert await index_is_valid(url) == [(False,)]
                await idle.rollback()
                async with asyncio.timeout(BOUND):
                    await upgrade
                    await start
            finally:
                upgrade.cancel()
                with suppress(asyncio.CancelledError):
                    await upgrade
    assert await index_is_valid(url) == [(True,)]
    assert await locks(url, "postgresql") == 0


if __name__ == "__main__":
    launch()
