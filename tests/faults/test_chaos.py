"""A database that is restarted, killed and cut off under its writers: nothing is lost, none fails.

Faults and appends take turns: the next fault comes when a number of events have been stored since
the last one, and the writers go on until the last fault is behind them. So each fault meets
writers at work, however slow the machine is.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import _or_skip
from everywhere import SOAK
from servers import (
    MariaDB,
    Postgres,
    run_mariadb,
    run_pgbouncer,
    run_postgres,
    unique_name,
)
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from test_sqlite_groups import storm
from workers import BACKENDS, Crew, Record, faults, read_all

from adk_sessions import SessionService, migrate
from adk_sessions.url import create_engine

PROCESSES = 3
OWN_SESSIONS = 3  # tasks of each process that append to a session of their own
SHARED_SESSIONS = 2  # which one task of each process appends to
APPENDS = 1_000 if SOAK else 200  # of one season: the state of an app that has more grows slow
SEASONS = 5 if SOAK else 1
BETWEEN = 150 if SOAK else 25
PATIENCE = 60.0  # seconds in which so many must be stored
LONGEST = 800.0 if SOAK else 150.0  # seconds of one test


@dataclass
class Victim:
    """A database, the server that it is on, and what can happen to that.

    Attributes:
        url: the database, past any pooler.
        writers_url: where the writers find it.
        seasons: how often it is all done, each time with another app.
        rounds: how often each fault has to happen.
        between: events from one fault to the next.
        happened: how often each did.
    """

    server: Postgres | MariaDB
    url: str
    writers_url: str
    options: dict[str, Any]
    seasons: int = SEASONS
    rounds: int = 2
    between: int = BETWEEN
    happened: Counter[str] = field(default_factory=Counter)

    @property
    def faults(self) -> dict[str, Callable[[], Awaitable[None]]]:
        found = {"restart": self.restart, "terminate": self.terminate, "kill": self.kill}
        return found | ({"crash": self.crash} if isinstance(self.server, Postgres) else {})

    async def run(self, statement: str) -> list[Any]:
        """Runs a statement on a connection of its own, and reads its first column."""
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        try:
            async with engine.connect() as connection:
                result = await connection.execute(text(statement))
                return list(result.scalars()) if result.returns_rows else []
        finally:
            await engine.dispose()

    async def restart(self) -> None:
        await asyncio.to_thread(self.server.restart)

    async def kill(self) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)

    async def connections(self) -> list[int]:
        """The server's ids of the writers' connections."""
        if isinstance(self.server, Postgres):
            others = "pid FROM pg_stat_activity WHERE datname = current_database()"
            statement = f"SELECT {others} AND pid <> pg_backend_pid()"
        else:
            others = "id FROM information_schema.processlist WHERE db = database()"
            statement = f"SELECT {others} AND id <> connection_id()"
        async with asyncio.timeout(PATIENCE):
            while not (found := await self.run(statement)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return found

    async def terminate(self) -> None:
        """End every connection, as an administrator does."""
        for id in await self.connections():
            if isinstance(self.server, Postgres):
                await self.run(f"SELECT pg_terminate_backend({id})")
            else:
                with suppress(DBAPIError):  # it has ended meanwhile
                    await self.run(f"KILL {id}")

    async def crash(self) -> None:
        """Kill one back end; PostgreSQL then ends the others and recovers."""
        while True:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                return os.kill((await self.connections())[0], signal.SIGKILL)

    async def progress(self, since: int, more: int, writers: asyncio.Future[Any]) -> int:
        """Waits until so many events more are stored; how many there are."""
        deadline = time.monotonic() + PATIENCE
        stored = since
        while stored < since + more:
            if writers.done():
                await writers  # they have failed, or would still be at it
                raise AssertionError("the writers have ended before they were told to")
            assert time.monotonic() < deadline, f"{stored - since} of {more} events were stored"
            await asyncio.sleep(0.02)
            try:
                [stored] = await self.run("SELECT count(*) FROM events")
            except Exception:
                if time.monotonic() > deadline:
                    raise
        return stored

    async def suffer(self, writers: asyncio.Future[Any]) -> None:
        """One fault after the other, until there were enough of them and of events."""
        [before] = await self.run("SELECT count(*) FROM events")
        stored = await self.progress(before, self.between, writers)
        while stored < before + APPENDS or self.happened[self.least()[0]] < self.rounds:
            due = random.choice(self.least())
            await self.faults[due]()
            self.happened[due] += 1
            stored = await self.progress(stored, self.between, writers)

    def least(self) -> list[str]:
        """The faults that have happened least often."""
        fewest = min(self.happened[name] for name in self.faults)
        return [name for name in self.faults if self.happened[name] == fewest]


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(PROCESSES) as crew:
        yield crew


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Postgres]:
    with _or_skip() as stack:
        postgres = stack.enter_context(run_postgres(durable=True))
        if postgres.child is None:
            pytest.skip("this server was not started by the tests: they do not stop it")
        yield postgres


@pytest.fixture(scope="module")
def own_mariadb() -> Iterator[MariaDB]:
    with _or_skip() as stack:
        yield stack.enter_context(run_mariadb(durable=True, own=True))


@pytest.fixture
def victim(request: pytest.FixtureRequest) -> Iterator[Victim]:
    name: str = request.param
    if "pgbouncer" not in name:
        fixture = "own_mariadb" if name == "mariadb" else "own_postgres"
        server: Postgres | MariaDB = request.getfixturevalue(fixture)
        url = server.create_database(unique_name())
        yield Victim(server, url, url, BACKENDS[name][1])
        return
    postgres: Postgres = request.getfixturevalue("own_postgres")
    url = postgres.create_database(unique_name())
    settings, how = {"server_login_retry": 1}, {"rounds": 2 if SOAK else 1}
    options: dict[str, Any] = {}
    if name == "pgbouncer-as-it-comes":  # it refuses everybody for 15 seconds after each fault
        options["retry_window"] = 90  # and the next one may come before that is over
        settings, how = {}, {"rounds": 1, "between": APPENDS // 4, "seasons": 1}
    with _or_skip() as stack:
        pooler = stack.enter_context(run_pgbouncer(postgres, **settings))
        through = pooler.url(make_url(url).database or "") + "?pgbouncer=true"
        yield Victim(postgres, url, through, options, **how)


NAMES = ["postgresql", "mariadb", "pgbouncer"]
NAMES += ["generic", "pgbouncer-as-it-comes"] if SOAK else []


@pytest.mark.timeout(LONGEST + 60)
@pytest.mark.parametrize("victim", NAMES, indirect=True)
async def test_no_caller_notices_what_happens_to_the_server(
    victim: Victim, crew: Crew, app_name: str, tmp_path: Path
) -> None:
    await migrate.upgrade(victim.url)
    for n in range(victim.seasons):
        await season(victim, crew, f"{app_name}-{n}", tmp_path / f"stop-{n}")
    assert {"restart", "terminate", "kill"} <= victim.happened.keys()
    assert min(victim.happened.values()) >= victim.rounds


async def season(victim: Victim, crew: Crew, app: str, stop: Path) -> None:
    """Writers and faults, and what is left by them."""
    async with SessionService(victim.url) as service:
        shared = [
            (await service.create_session(app_name=app, user_id="ann")).id
            for _ in range(SHARED_SESSIONS)
        ]
    every = {"app": app, "appends": 0, "stop": str(stop)}
    jobs = []
    for process in range(PROCESSES):
        own = [
            ("fill", {**every, "user": f"user-{n}", "writer": f"p{process}t{n}"})
            for n in range(OWN_SESSIONS)
        ]
        among = {**every, "user": "ann", "writer": f"p{process}", "sessions": shared}
        jobs.append(("together", {"jobs": [*own, ("share", among)]}))
    crew.open(victim.writers_url, **victim.options)
    # who has never reached a server fails at once
    crew.run("hold", [{"app": app, "user": "ann", "ids": shared}] * PROCESSES)
    before = victim.happened.total()
    writers = asyncio.ensure_future(
        asyncio.to_thread(crew.run_all, jobs, patience=LONGEST)  # raises what a caller saw
    )
    try:
        await victim.suffer(writers)
    finally:
        stop.touch()
        await asyncio.wait([writers])
    replies = await writers
    crew.close()
    record = Record.of(one for reply in replies for one in reply["records"])
    assert len([call for call in record.calls if call.event]) >= APPENDS
    met = [len(reply["met"]) for reply in replies]
    assert sum(met) > 0
    if victim.writers_url == victim.url:  # every connection was lost with each fault
        assert min(met) > 0
        assert sum(met) >= victim.happened.total() - before
    async with SessionService(victim.url, **victim.options) as service:
        final = await read_all(service, app)
    assert len(final) == SHARED_SESSIONS + PROCESSES * OWN_SESSIONS
    assert faults(record, final) == []


# --- SQLite: it is the writers that are killed ---------------------------------------------------

KILLED = 20 if SOAK else 3
TASKS = 4  # of each that is killed
LINES = 20  # acknowledged appends of each before that


async def test_writers_that_are_killed_lose_nothing_and_hold_nobody_up(
    crew: Crew, tmp_path: Path, migrated_file: Path, app_name: str
) -> None:
    path, stop = tmp_path / "chats.db", tmp_path / "stop"
    shutil.copy(migrated_file, path)
    url = f"sqlite:///{path}"
    acknowledged: set[str] = set()
    crew.open(url)
    every = {"app": app_name, "user": "ann", "appends": 1, "stop": str(stop)}
    jobs = [("fill", {**every, "writer": f"p{n}"}) for n in range(PROCESSES)]
    others = asyncio.ensure_future(asyncio.to_thread(crew.run_all, jobs, patience=LONGEST))
    try:
        for n in range(KILLED):
            lines = await asyncio.to_thread(killed, path, f"killed{n}")
            assert len(lines) >= LINES
            acknowledged |= lines
    finally:
        stop.touch()
        await asyncio.wait([others])
    record = Record.of(await others)
    crew.close()
    async with SessionService(url) as service:
        # those that went on
        assert faults(record, await read_all(service, app_name)) == []
        stored = await read_all(service, "a")
        shared = await service.get_app_state(app_name="a")
    events = [id for read in stored for id in read.events]
    assert acknowledged <= set(events)
    assert len(set(events)) == len(events) <= len(acknowledged) + KILLED * TASKS
    assert shared.keys() == set(events)
    for read in stored:  # appended one by one, each with a key of its own and one that all set
        own = {key: n for key, n in read.state.items() if ":" not in key}
        assert list(own.items()) == [(id, n) for n, id in enumerate(read.events)]
        assert [int(id.split()[-1]) for id in read.events] == list(range(len(read.events)))
        assert read.state.get("user:last") == (len(read.events) - 1 if read.events else None)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def killed(path: Path, name: str) -> set[str]:
    """What a process has said it has stored when it is killed in the middle of more."""
    with storm(path, name, TASKS, 10_000) as process:
        try:
            lines = [process.stdout.readline() for _ in range(LINES)]
        finally:
            process.kill()
        lines += process.stdout.readlines()
    return {line.rstrip("\n") for line in lines if line.endswith("\n")}
