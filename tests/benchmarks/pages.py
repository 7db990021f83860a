"""Pages of a million sessions on PostgreSQL, and what an index on update_time would cost.

In an environment with the extra `bench`: PYTHONPATH=tests python -m benchmarks.pages
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import click
from rich.console import Console
from rich.table import Table
from servers import Postgres, run_postgres

from adk_sessions import Event, EventActions, Session, SessionService

APP = "shop"
PER_USER = 10
LIMIT = 50
FAR = 10_000  # pages
UPDATE_INDEX = "CREATE INDEX update_order ON sessions (app_name, update_time, user_id, id)"

# Ten sessions of each user, a second apart, as appends leave them; every fourth has a label.
SESSIONS = """
    INSERT INTO sessions (app_name, user_id, id, state, create_time, update_time, labels)
    SELECT $1, 'user-' || lpad((n % ($2::int / $3::int))::text, 7, '0'),
           'session-' || lpad(n::text, 7, '0'), '{"topic": "ships", "step": 4}',
           timestamp '2025-01-01' + n * interval '1 second',
           timestamp '2025-01-01' + (n + n * 37 % 100000) * interval '1 second',
           CASE WHEN n % 4 = 0 THEN '{"team": "red"}'::jsonb END
    FROM generate_series(0, $2::int - 1) AS n
"""
STATES = (
    "INSERT INTO app_states SELECT DISTINCT app_name, '{}'::jsonb, now()::timestamp FROM sessions",
    "INSERT INTO user_states SELECT DISTINCT app_name, user_id, '{}'::jsonb, now()::timestamp"
    " FROM sessions",
)
UPDATES = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'sessions'"


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url.replace("postgresql+asyncpg", "postgresql"))
    try:
        yield connection
    finally:
        await connection.close()


async def fill(url: str, size: int) -> None:
    async with SessionService(url) as service:
        await service.prepare_tables()
    async with connected(url) as connection:
        await connection.execute(SESSIONS, APP, size, PER_USER)
        for statement in (*STATES, "VACUUM ANALYZE", "CHECKPOINT"):
            await connection.execute(statement)


async def milliseconds(call: Callable[[], Awaitable[Any]], times: int) -> list[float]:
    for _ in range(3):  # the driver prepares a statement, the server reads pages
        await call()
    gc.collect()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - start) * 1000)
    return taken


async def far_cursor(service: SessionService, rows: int, **arguments: Any) -> str:
    """The cursor behind so many rows: the size of a page is no part of it."""
    cursor: str | None = None
    while rows:
        size = min(rows, 1000)
        page = await service.page_sessions(APP, limit=size, cursor=cursor, **arguments)
        assert len(page.items) == size
        cursor = page.next_cursor
        rows -= size
    assert cursor
    return cursor


async def pages(url: str, size: int, times: int) -> dict[str, list[float]]:
    """Milliseconds of each kind of page."""
    behind = min(FAR - 1, size // LIMIT - 1) * LIMIT
    user = "user-0000007"
    measured: dict[str, list[float]] = {}
    async with SessionService(url) as service:
        await service.prepare_tables()
        far = await far_cursor(service, behind)
        seen = await service.page_sessions(APP, limit=LIMIT, cursor=far)
        assert seen.items[0].id == f"session-{size - 1 - behind:07}"
        labels = {"team": "red"}
        kinds: dict[str, dict[str, Any]] = {
            "first page": {},
            f"page {behind // LIMIT + 1:,}": {"cursor": far},
            "the same, events counted": {"cursor": far, "counts": True},
            "first page of a user": {"user_id": user},
            "first page with a label that every fourth has": {"labels": labels},
        }
        for name, arguments in kinds.items():
            measured[name] = await milliseconds(
                lambda arguments=arguments: service.page_sessions(  # type: ignore[misc]
                    APP, arguments.get("user_id"), limit=LIMIT,
                    **{k: v for k, v in arguments.items() if k != "user_id"},
                ),
                times,
            )  # fmt: skip
        slow: dict[str, Callable[[], Awaitable[Any]]] = {
            "first page by update, of a user": lambda: service.page_sessions(
                APP, user, order="updated", limit=LIMIT
            ),
            "first page by update": lambda: service.page_sessions(
                APP, order="updated", limit=LIMIT
            ),
            "list_users": lambda: service.list_users(APP),
            "list_apps": service.list_apps,
        }
        for name, call in slow.items():
            measured[name] = await milliseconds(call, max(times // 10, 3))
    return measured


async def appends(
    urls: dict[str, str], size: int, rounds: int, calls: int
) -> tuple[dict[str, list[float]], dict[str, tuple[int, int]], dict[str, float]]:
    """Milliseconds of appends in databases that take turns, updates of sessions (all, and those
    that are HOT), and bytes of the log for each append."""
    dice = random.Random(6)
    chosen = [dice.randrange(size) for _ in range(calls)]
    services = {name: SessionService(url) for name, url in urls.items()}
    taken: dict[str, list[float]] = {name: [] for name in urls}
    held: dict[str, list[Session]] = {}
    for name, service in services.items():
        held[name] = []
        for n in dict.fromkeys(chosen):
            session = await service.get_session(
                app_name=APP,
                user_id=f"user-{n % (size // PER_USER):07}",
                session_id=f"session-{n:07}",
            )
            assert session is not None
            held[name].append(session)
    before = {name: await updates(url) for name, url in urls.items()}
    names = list(urls)
    for turn in range(rounds + 1):
        gc.collect()
        for place in range(len(held[names[0]])):
            # one call each, and who comes first changes
            shift = (turn + place) % len(names)
            for name in names[shift:] + names[:shift]:
                event = Event(
                    author="user",
                    invocation_id="1",
                    content={"parts": [{"text": "words " * 20}]},
                    actions=EventActions(state_delta={"step": turn}),
                )
                start = time.perf_counter()
                await services[name].append_event(held[name][place], event)
                if turn:
                    taken[name].append((time.perf_counter() - start) * 1000)
    log = {name: await logged(urls[name], services[name], held[name]) for name in names}
    for service in services.values():
        await service.close()
    after = {name: await updates(url) for name, url in urls.items()}
    hot = {
        name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in urls
    }
    return taken, hot, log


async def logged(url: str, service: SessionService, sessions: list[Session]) -> float:
    """Bytes that an append writes to the server's log, while nobody else writes."""
    async with connected(url) as connection:
        await connection.execute("CHECKPOINT")
        # after it a page's first change writes all of the page
        for _ in range(2):
            start = await connection.fetchval("SELECT pg_current_wal_insert_lsn()::text")
            for session in sessions:
                await service.append_event(session, Event(author="user", content="words " * 20))
            size = await connection.fetchval(
                "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1::text::pg_lsn)", start
            )
    return float(size) / len(sessions)


async def updates(url: str) -> tuple[int, int]:
    await asyncio.sleep(1.5)  # what a connection has counted is reported with a delay
    async with connected(url) as connection:
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        row = await connection.fetchrow(UPDATES)
        return row[0], row[1]


def measure(server: Postgres, size: int, rounds: int, console: Console) -> None:
    with server.scratch_database() as url:
        start = time.perf_counter()
        asyncio.run(fill(url, size))
        console.print(f"{size:,} sessions in {time.perf_counter() - start:.0f} s")
        table = Table("PostgreSQL", "median ms", "95 % under")
        for name, times in asyncio.run(pages(url, size, 100)).items():
            ordered = sorted(times)
            table.add_row(
                name,
                f"{statistics.median(times):.2f}",
                f"{ordered[int(len(ordered) * 0.95)]:.2f}",
            )
        console.print(table)
        template = url.rpartition("/")[2]
        with (
            server.scratch_database(template) as again,
            server.scratch_database(template) as indexed,
        ):

            async def index() -> None:
                async with connected(indexed) as connection:
                    await connection.execute(UPDATE_INDEX)
                for each in (url, again, indexed):
                    async with connected(each) as connection:
                        await connection.execute("VACUUM ANALYZE")
                        await connection.execute("CHECKPOINT")

            asyncio.run(index())
            urls = {"without": url, "without, again": again, "index on update_time": indexed}
            taken, hot, log = asyncio.run(appends(urls, size, rounds, 200))
        table = Table(
            *("append", "median ms", "ratio, call by call", "sessions updated", "of them HOT"),
            "bytes of log",
        )
        for name, times in taken.items():
            # a busy machine disturbs calls that follow each other alike
            ratios = [one / other for one, other in zip(times, taken["without"], strict=True)]
            table.add_row(
                name,
                f"{statistics.median(times):.3f}",
                f"{statistics.median(ratios):.3f}",
                *(f"{n:,}" for n in hot[name]),
                f"{log[name]:,.0f}",
            )
        console.print(table)


@click.command()
@click.option("--sessions", default=1_000_000, show_default=True, type=click.IntRange(1000))
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1))
@click.option("--memory", is_flag=True, help="A server that need not keep what it acknowledges.")
def main(sessions: int, rounds: int, memory: bool) -> None:
    """Pages of many sessions, and appends with an index on update_time and without."""
    console = Console(highlight=False)
    with run_postgres(durable=not memory) as server:
        measure(server, sessions, rounds, console)


if __name__ == "__main__":
    main()
