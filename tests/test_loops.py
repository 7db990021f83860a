"""One service in several event loops, threads and forked processes: each has its own connections.

Processes are forked by a launcher, which is this file run as a script: it has imported everything
and has no threads.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import forked
import pytest
from engines import engine_for
from servers import run_sync
from sqlalchemy import NullPool, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine
from workers import Record, event, faults, fill, load, read_all, share

from adk_sessions import ConfigurationError, SessionService
from adk_sessions.url import create_engine

PATIENCE = 60.0
KINDS = ["sqlite", "postgresql", "mariadb"]
SERVERS = ["postgresql", "mariadb"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_server = pytest.mark.parametrize("kind", SERVERS)

# A connection's number on its server.
OWN = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT CONNECTION_ID()"}
OTHERS = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mariadb": "SELECT count(*) FROM information_schema.processlist"
    " WHERE db = database() AND id <> connection_id()",
}
NewDatabase = Callable[[str], str]


async def ask(engine: AsyncEngine, statement: str) -> int:
    async with engine.connect() as conn:
        return int((await conn.execute(text(statement))).scalar_one())


async def connected(url: str, number: int) -> None:
    """Waits until the database has so many connections besides the one that asks."""
    async with engine_for(url) as engine, asyncio.timeout(30):
        while await ask(engine, OTHERS[kind_of(url)]) != number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def kind_of(url: str) -> str:
    return {"mysql": "mariadb"}.get(name := make_url(url).get_backend_name(), name)


async def new_session(service: SessionService, app: str, user: str = "ann") -> str:
    return (await service.create_session(app_name=app, user_id=user)).id


async def append(service: SessionService, app: str, id: str, name: str) -> None:
    await service.append_event(await load(service, app, "ann", id), event(name, {name: name}))


async def judge(service: SessionService, app: str, record: Record) -> None:
    assert faults(record, await read_all(service, app)) == []


# --- event loops -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in KINDS] + [(kind, {"pool_size": 1}) for kind in SERVERS],
)
def test_threads_with_loops_of_their_own_append_to_the_same_sessions(
    kind: str, options: dict[str, Any], fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    service = SessionService(url, **options)
    ids = [asyncio.run(new_session(service, app_name)) for _ in range(2)]
    together = threading.Barrier(3)

    async def write(n: int) -> list[Record]:
        await service.ping()
        together.wait(30)
        job = {"app": app_name, "user": "ann", "appends": 10}
        return await asyncio.gather(
            share(service, **job, writer=f"t{n}-a", sessions=ids),
            share(service, **job, writer=f"t{n}-b", sessions=ids),
            fill(service, **job, writer=f"t{n}-c"),
        )

    with ThreadPoolExecutor(3) as threads:
        records = list(threads.map(lambda n: asyncio.run(write(n)), range(3)))
    record = Record.of(one for of_thread in records for one in of_thread)
    asyncio.run(judge(service, app_name, record))
    if kind in SERVERS:
        asyncio.run(connected(url, 0))


@every_kind
def test_a_service_lives_on_when_its_loop_has_ended(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    service = SessionService(url)
    id = asyncio.run(new_session(service, app_name))
    for n in range(3):
        asyncio.run(append(service, app_name, id, f"event-{n}"))
        if kind in SERVERS:  # nobody has closed it, and nothing is left open
            asyncio.run(connected(url, 0))
    session = asyncio.run(load(service, app_name, "ann", id))
    assert [one.id for one in session.events] == ["event-0", "event-1", "event-2"]
    asyncio.run(service.close())


@every_server
@pytest.mark.filterwarnings("ignore:unclosed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_was_closed_without_a_word_is_let_go(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    service = SessionService(url, pool_size=1)
    id = asyncio.run(new_session(service, app_name))
    for n in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(append(service, app_name, id, f"event-{n}"))
        loop.close()
    session = asyncio.run(load(service, app_name, "ann", id))
    assert len(session.events) == 3
    asyncio.run(service.close())
    gc.collect()
    asyncio.run(connected(url, 0))


@every_server
def test_closing_closes_what_other_threads_have_opened(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    service = SessionService(url)
    used, closed = threading.Event(), threading.Event()

    async def use() -> int:
        await new_session(service, app_name)
        used.set()
        await asyncio.to_thread(closed.wait, 60)
        await new_session(service, app_name)  # it may be used again
        return len((await service.list_sessions(app_name=app_name)).sessions)

    async def close() -> None:
        await asyncio.to_thread(used.wait, 60)
        await service.ping()
        await service.close()
        await connected(url, 0)
        closed.set()

    with ThreadPoolExecutor(1) as thread:
        using = thread.submit(asyncio.run, use())
        try:
            asyncio.run(close())
        finally:
            closed.set()
        assert using.result(60) == 2


@every_server
async def test_an_engine_is_the_one_of_the_running_loop(
    kind: str, fresh_database: NewDatabase
) -> None:
    async with SessionService(fresh_database(kind)) as service:
        mine = service._database.engine

        async def theirs() -> AsyncEngine:
            await service.ping()
            assert await ask(service._database.engine, "SELECT 1") == 1
            return service._database.engine

        await service.ping()
        assert service._database.engine is mine
        assert await asyncio.to_thread(asyncio.run, theirs()) is not mine
        assert await ask(service._database.engine, "SELECT 1") == 1
        assert service._database.engine is mine


@every_server
def test_a_dropped_service_closes_its_connections(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)

    async def use() -> None:
        service = SessionService(url)
        await service.ping()
        await connected(url, 1)
        there = weakref.ref(service)
        del service
        gc.collect()
        assert there() is None
        await connected(url, 0)

    asyncio.run(use())


# --- engines of the application's --------------------------------------------------------------


@every_server
async def test_a_dropped_service_leaves_an_engine_open(
    kind: str, fresh_database: NewDatabase
) -> None:
    async with engine_for(fresh_database(kind), pool_size=1) as engine:
        service = SessionService(engine=engine)
        await service.ping()
        before = await ask(engine, OWN[kind])
        there = weakref.ref(service)
        del service
        gc.collect()
        assert there() is None
        await asyncio.sleep(0.05)  # for what must not happen
        assert await ask(engine, OWN[kind]) == before


@every_server
def test_an_engine_with_connections_of_another_loop_is_refused(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    engine = create_engine(fresh_database(kind))
    service = SessionService(engine=engine)
    first = asyncio.new_event_loop()
    try:
        id = first.run_until_complete(new_session(service, app_name))
        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(append(service, app_name, id, "event-0"))
        first.run_until_complete(append(service, app_name, id, "event-0"))
        first.run_until_complete(engine.dispose())
    finally:
        first.close()

    async def go_on() -> None:
        await append(service, app_name, id, "event-1")
        assert len((await load(service, app_name, "ann", id)).events) == 2
        await engine.dispose()

    asyncio.run(go_on())


@every_server
def test_an_engine_that_keeps_no_connections_works_in_every_loop(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    service = SessionService(engine=create_engine(fresh_database(kind), poolclass=NullPool))
    id = asyncio.run(new_session(service, app_name))
    asyncio.run(append(service, app_name, id, "event-0"))
    assert len(asyncio.run(load(service, app_name, "ann", id)).events) == 1


# --- forks: the launcher -----------------------------------------------------------------------

CHILDREN = 3


def fork(job: Callable[[], Any]) -> tuple[int, int]:
    """A child that does a job and says what came of it; its number and a pipe to read from."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            said: Any = {"result": job()}
        except BaseException:
            said = {"error": traceback.format_exc()}
        os.write(write, json.dumps(said).encode())
    finally:
        os._exit(0)


def collect(pid: int, pipe: int) -> Any:
    with open(pipe) as said:
        answer = json.loads(said.read())
    os.waitpid(pid, 0)
    if "error" in answer:
        raise AssertionError(answer["error"])
    return answer["result"]


async def in_children(url: str, app: str, options: dict[str, Any]) -> dict[str, Any]:
    """The parent has connections; children use the same service, and then it goes on."""
    # nothing else refers to it, so a child may forget it
    held = [SessionService(url, **options)]
    id = await new_session(held[0], app)
    job = {"app": app, "user": "ann", "appends": 5}
    before = await share(held[0], **job, writer="before", sessions=[id])
    own = OWN.get(kind_of(url))
    numbers = [await ask(held[0]._database.engine, own)] if own else []

    async def child(n: int) -> dict[str, Any]:
        record = Record.of(
            [
                await fill(held[0], **job, writer=f"c{n}-a"),
                await share(held[0], **job, writer=f"c{n}-b", sessions=[id]),
            ]
        )
        if n == 0:  # one closes it, one forgets it, one just ends
            await held[0].close()
        elif n == 1:
            there = weakref.ref(held.pop())
            gc.collect()
            # a thread of the parent's may have held its last call at the fork: it never lets go
            assert there() is None or not own
        return asdict(record)

    children = [fork(lambda n=n: asyncio.run(child(n))) for n in range(CHILDREN)]
    record = Record.of(
        [
            before,
            await share(held[0], **job, writer="meanwhile", sessions=[id]),
            *[await asyncio.to_thread(collect, *one) for one in children],
            await share(held[0], **job, writer="after", sessions=[id]),
        ]
    )
    if own:
        numbers.append(await ask(held[0]._database.engine, own))
    await held[0].close()
    return {"record": asdict(record), "numbers": numbers}


async def lent_to_children(url: str, app: str) -> list[str]:
    """What a child is told that has an engine with connections of its parent's."""
    engine = create_engine(url)
    service = SessionService(engine=engine)
    id = await new_session(service, app)

    async def child() -> list[str]:
        said = []
        try:
            await append(service, app, id, "refused")
        except ConfigurationError as error:
            said.append(str(error))
        # the parent's engine is kept: to drop it would take its sockets out of the parent's loop
        own = create_engine(url)
        await append(SessionService(engine=own), app, id, "child")
        await own.dispose()
        return said

    said: list[str] = await asyncio.to_thread(collect, *fork(lambda: asyncio.run(child())))
    await append(service, app, id, "parent")
    said += [one.id for one in (await load(service, app, "ann", id)).events]
    await engine.dispose()
    return said


def launched(job: Callable[..., Any], *arguments: Any) -> Any:
    """What a job comes to in a process that has no threads."""
    done = forked.run(__file__, job.__name__, json.dumps(arguments), patience=2 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@every_kind
def test_forked_children_and_their_parent_each_go_on(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    url = fresh_database(kind)
    said = launched(in_children, url, app_name, {"pool_size": 1})
    if kind in SERVERS:
        before, after = said["numbers"]
        assert before == after, "the parent has lost its connection"
    record = Record.of([said["record"]])
    assert len(record.calls) == 15 + CHILDREN * 11
    assert faults(record, run_sync(stored(url, app_name))) == []


async def stored(url: str, app: str) -> list[Any]:
    async with SessionService(url) as service:
        return await read_all(service, app)


@every_server
def test_a_forked_child_is_told_about_its_parents_engine(
    kind: str, fresh_database: NewDatabase, app_name: str
) -> None:
    said = launched(lent_to_children, fresh_database(kind), app_name)
    assert "forked" in said.pop(0)
    assert said == ["child", "parent"]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(globals()[sys.argv[1]](*json.loads(sys.argv[2])))))
