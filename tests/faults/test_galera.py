"""Three MariaDB nodes that replicate to each other with Galera, and writers on all of them.

Galera knows no locks across nodes: of transactions on two nodes that write the same row one fails
at its COMMIT, as a deadlock. And a node may be behind: what another one has acknowledged is seen
by whoever makes it wait, with wsrep_sync_wait.

The nodes take seconds to start, so one test takes all the steps.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checker
import galera
import pytest
from conftest import _or_skip
from everywhere import SOAK
from galera import Galera, codes_of, run_galera
from sqlalchemy import text
from workers import Crew, Record, event, faults, in_each_scope, load, read_all, seen

from adk_sessions import DatabaseError, Session, SessionService, StaleSessionError, migrate
from adk_sessions.url import create_engine

DATABASE = "agents"
# What a cluster's services need; README says it.
WAITING: dict[str, Any] = {"connect_args": {"init_command": "SET SESSION wsrep_sync_wait = 1"}}
DEADLOCK, NOT_READY = 1213, 1047
NODES = 3
DAY = 86_400.0
SESSIONS = 3
# Of each process, with their clocks; see checker.py.
WRITERS = [
    {
        f"p{n}-a": {"on_stale": "refresh", "offset": offset},
        f"p{n}-b": {"on_stale": "raise", "offset": 0.0},
    }
    for n, offset in enumerate((0.0, -DAY, DAY))
]
APPENDS = 40 if SOAK else 8  # of each writer, where nothing fails
# Nodes fail again and again for so many seconds; once is enough for `make test`.
SECONDS = 400.0 if SOAK else 0.0
MORE = 10  # events that are stored after one fault and before the next
PATIENCE = 90.0  # seconds in which they must be
LONGEST = 200.0  # seconds of one step
# Seconds that a call is repeated for: failures may follow each other on a busy machine.
WINDOW = 90.0
# What a service with one node only gives up after: seconds.
IMPATIENT: dict[str, Any] = {"retry_window": 2, "statement_timeout": 2, "connect_timeout": 2}


@dataclass
class Cluster:
    """The nodes, one database on them, and the processes that write to it, one for each node."""

    nodes: Galera
    crew: Crew

    def url(self, number: int) -> str:
        return self.nodes.nodes[number].url(DATABASE)

    def urls(self, first: int) -> str:
        """One URL with all nodes, beginning with that one."""
        ports = [self.nodes.nodes[(first + n) % NODES].port for n in range(NODES)]
        return f"mysql://root@{','.join(f'127.0.0.1:{port}' for port in ports)}/{DATABASE}"

    @asynccontextmanager
    async def services(self, **options: Any) -> AsyncIterator[list[SessionService]]:
        """One on each node, connected."""
        async with AsyncExitStack() as stack:
            services = [
                await stack.enter_async_context(SessionService(self.url(n), **options))
                for n in range(NODES)
            ]
            for service in services:
                await service.prepare_tables()
            yield services

    async def sessions(self, app: str) -> list[str]:
        async with SessionService(self.url(0), **WAITING) as service:
            made = [
                await service.create_session(app_name=app, user_id="ann") for _ in range(SESSIONS)
            ]
        return [session.id for session in made]

    def jobs(
        self, job: str, app: str, sessions: list[str], **more: Any
    ) -> list[tuple[str, dict[str, Any]]]:
        """One for each process: writers of both kinds and a reader, on the same sessions."""
        place = {"app": app, "user": "ann", "sessions": sessions}
        return [(job, {**place, "writers": writers, **more}) for writers in WRITERS]

    def met(self) -> Counter[Any]:
        """The numbers of the errors that the processes have met since they were opened."""
        replies = self.crew.run("numbers", [{}] * NODES)
        return Counter(number for numbers in replies for number in numbers)

    async def check(self, record: Record, app: str) -> None:
        """Every node has everything, once and in one order."""
        async with self.services(**WAITING) as services:
            stored = [await read_all(service, app) for service in services]
        for final in stored:
            assert faults(record, final) == []
            assert final == stored[0]

    async def progress(self, number: int, writers: asyncio.Future[Any]) -> None:
        """Waits until more events are stored, as that node sees it."""
        count = f"SELECT count(*) FROM {DATABASE}.events"
        most: int | None = None
        deadline = time.monotonic() + PATIENCE
        while True:
            if writers.done():
                await writers  # they have failed, or would still be at it
                raise AssertionError("the writers have ended before they were told to")
            with suppress(Exception):  # the node is not ready
                [(stored,)] = await asyncio.to_thread(self.nodes.nodes[number].execute, count)
                most = stored + MORE if most is None else most
                if stored >= most:
                    return
            assert time.monotonic() < deadline, "nothing is stored any more"
            await asyncio.sleep(0.05)


@pytest.mark.timeout(850 if SOAK else 300)
async def test_nothing_that_any_node_has_acknowledged_is_lost(
    app_name: str, tmp_path: Path
) -> None:
    with _or_skip() as stack:
        crew = stack.enter_context(Crew(NODES, script=galera.__file__))
        cluster = Cluster(stack.enter_context(run_galera(NODES)), crew)
        cluster.nodes.nodes[0].create_database(DATABASE)
        await migrate.upgrade(cluster.url(0))
        await _a_node_that_is_behind_is_waited_for(cluster, app_name)
        await _writers_on_all_nodes_lose_nothing(cluster, f"{app_name}-w")
        started, rounds = time.monotonic(), 0
        while not rounds or time.monotonic() < started + SECONDS:
            stop = tmp_path / f"stop-{rounds}"
            await _nodes_fail_under_writers(cluster, f"{app_name}-f{rounds}", rounds % NODES, stop)
            rounds += 1


async def _a_node_that_is_behind_is_waited_for(cluster: Cluster, app: str) -> None:
    engine = create_engine(cluster.url(1))
    async with (
        # first these: they see the tables on every node
        cluster.services(**WAITING, migrate="check") as (here, careful, _),
        cluster.services(migrate="check") as (_, careless, _),
        engine.connect() as holder,
    ):
        session = await here.create_session(app_name=app, user_id="ann")
        await load(careful, app, "ann", session.id)
        # what comes from another node is applied after this lock is gone
        await holder.execute(text("LOCK TABLES events READ"))
        await here.append_event(session, event("e1", in_each_scope("k")))
        other = await here.create_session(app_name=app, user_id="ann")
        assert seen(await load(careless, app, "ann", session.id)).events == []
        assert await careless.get_session(app_name=app, user_id="ann", session_id=other.id) is None
        with pytest.raises(StaleSessionError):
            await careless.append_event(session, event("e2", {}))
        waiting = asyncio.gather(
            load(careful, app, "ann", session.id),
            careful.append_event(session, event("e2", {})),
            careful.delete_session(app, "ann", other.id),
        )
        await asyncio.wait([waiting], timeout=0.3)
        assert not waiting.done()
        await holder.execute(text("UNLOCK TABLES"))
        read, *_rest = await waiting
        assert seen(read).events in (["e1"], ["e1", "e2"])
        assert read.state == in_each_scope("k")
        assert seen(await load(here, app, "ann", session.id)).events == ["e1", "e2"]
        assert await here.get_session(app_name=app, user_id="ann", session_id=other.id) is None
    await engine.dispose()


async def _writers_on_all_nodes_lose_nothing(cluster: Cluster, app: str) -> None:
    sessions = await cluster.sessions(app)
    places = [{"url": cluster.url(n), **WAITING} for n in range(NODES)]
    cluster.crew.run("open", places)
    jobs = cluster.jobs("lists", app, sessions, appends=APPENDS)
    replies = await asyncio.to_thread(cluster.crew.run_all, jobs, patience=LONGEST)
    met = cluster.met()
    cluster.crew.close()
    record = Record.of(replies)
    await cluster.check(record, app)
    # each append was counted
    assert len(record.counts) == sum(map(len, WRITERS)) * APPENDS * len(checker.COUNTERS)
    assert record.failed, "nobody was ever stale"
    # what failed at its COMMIT has not happened, so nothing is left unknown
    assert (record.unknown, [one for one in record.counts if one.value is None]) == ([], [])
    assert met[DEADLOCK], met


async def _nodes_fail_under_writers(cluster: Cluster, app: str, dead: int, stop: Path) -> None:
    """One node hangs and comes back, and is killed; then one of the two that are left hangs.

    The last one may not go on alone: the other two may be the majority, for all it knows.
    """
    nodes = cluster.nodes.nodes
    last, hung = (dead + 1) % NODES, (dead + 2) % NODES
    sessions = await cluster.sessions(app)
    cluster.crew.run(
        "open",
        [{"url": cluster.urls(n), "retry_window": WINDOW, **WAITING} for n in range(NODES)],
    )
    cluster.crew.run("hold", [{"app": app, "user": "ann", "ids": sessions}] * NODES)
    async with (
        cluster.services(**IMPATIENT, **WAITING) as pinned,
        SessionService(cluster.url(last), retry_window=WINDOW, **WAITING) as waiting,
    ):
        one = await waiting.create_session(app_name=f"{app}-one", user_id="ann")
        calls = [_refused(service, one) for service in pinned]
        jobs = cluster.jobs("lists_until", app, sessions, stop=str(stop))
        # raises what a caller saw
        writing = asyncio.to_thread(cluster.crew.run_all, jobs, patience=LONGEST)
        writers = asyncio.ensure_future(writing)
        try:
            await cluster.progress(last, writers)
            nodes[dead].freeze()
            await asyncio.gather(calls[dead](), cluster.progress(last, writers))
            cluster.nodes.thaw()
            await cluster.progress(dead, writers)
            nodes[dead].kill()
            await asyncio.gather(calls[dead](), cluster.progress(last, writers))
            nodes[hung].freeze()
            met = codes_of(waiting)
            append = asyncio.create_task(waiting.append_event(one, event("e", in_each_scope("k"))))
            await asyncio.gather(calls[hung](), _until(lambda: met[NOT_READY] > 0))
            assert not append.done()
            cluster.nodes.thaw()
            await append
            await cluster.progress(last, writers)
            await asyncio.to_thread(nodes[dead].start)
            await cluster.progress(dead, writers)
            await load(pinned[dead], one.app_name, "ann", one.id)
        finally:
            cluster.nodes.thaw()
            stop.touch()
            await asyncio.wait([writers])
        replies = await writers
        cluster.crew.close()
    await asyncio.to_thread(cluster.nodes.wait_synced)
    record = Record.of(replies)
    assert record.unknown == []  # of an append: it is looked up
    await cluster.check(record, app)
    async with cluster.services(**WAITING) as services:
        for service in services:
            found = await load(service, f"{app}-one", "ann", one.id)
            assert (seen(found).events, found.state) == (["e"], in_each_scope("k"))


def _refused(service: SessionService, session: Session) -> Callable[[], Awaitable[None]]:
    """A call that fails, in bounded time and as it should, since the service's node is gone."""

    async def read_on() -> None:
        while True:  # for a moment the node may still answer
            await load(service, session.app_name, session.user_id, session.id)
            await asyncio.sleep(0.01)

    async def call() -> None:
        began = time.monotonic()
        with pytest.raises(DatabaseError) as raised:
            await read_on()
        assert raised.value.retryable
        assert time.monotonic() - began < 30

    return call


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)
