"""Services in processes of their own on one database: nothing acknowledged is lost or torn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everywhere import SOAK
from workers import BACKENDS, SHARED, Crew, Record, faults, load, read_all, seen

from adk_sessions import SessionService

DAY = 86_400.0
PROCESSES = 6
READS = 2000 if SOAK else 400


@pytest.fixture(scope="module")
def processes() -> Iterator[Crew]:
    with Crew(PROCESSES) as crew:
        yield crew


@pytest.fixture(params=[name for name in BACKENDS if name != "sqlite-memory"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_database(backend: str, fresh_database: Callable[[str], str]) -> tuple[str, Any]:
    """The URL of a database without tables, and the service's options."""
    kind, options = BACKENDS[backend]
    return fresh_database(kind), options


@pytest.fixture
def database(
    backend: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> tuple[str, Any]:
    """The URL of a database, and the service's options."""
    kind, options = BACKENDS[backend]
    shared = SHARED.get(kind)
    return (request.getfixturevalue(shared) if shared else fresh_database(kind)), options


@pytest.fixture
def crew(processes: Crew) -> Iterator[Callable[..., Crew]]:
    """`crew(url, **options)`: the processes, each with a service of its own."""

    def open_services(url: str, **options: Any) -> Crew:
        processes.open(url, **options)
        return processes

    yield open_services
    processes.close()


async def test_every_acknowledged_key_and_event_is_kept_from_the_first_start_on(
    crew: Callable[..., Crew], empty_database: tuple[str, Any], app_name: str
) -> None:
    url, options = empty_database
    jobs = [
        {"app": app_name, "user": f"user-{n % 2}", "writer": f"p{n}", "appends": 10}
        for n in range(PROCESSES)
    ]
    record = Record.of(crew(url, **options).run("fill", jobs))
    assert len(record.calls) == PROCESSES * 11
    async with SessionService(url, **options) as service:
        assert faults(record, await read_all(service, app_name)) == []


async def test_appended_lists_keep_every_value_in_one_order_whatever_the_clocks(
    crew: Callable[..., Crew], database: tuple[str, Any], app_name: str
) -> None:
    """Each event's value is appended once; every read is a prefix of the final order."""
    url, options = database
    async with SessionService(url, **options) as service:
        ids = [
            (await service.create_session(app_name=app_name, user_id="ann")).id for _ in range(3)
        ]
        now = time.time()
        clocks = [(0.0, None), (-DAY, None), (DAY, None), (0.0, now), (0.0, now)]
        jobs = [
            {
                "app": app_name,
                "user": "ann",
                "writer": f"p{n}",
                "sessions": ids,
                "appends": 16,
                "offset": offset,
                "frozen": frozen,
            }
            for n, (offset, frozen) in enumerate(clocks)
        ]
        record = Record.of(crew(url, **options).run("share", jobs))
        assert len(record.calls) == len(clocks) * 16
        assert len(record.reads) > len(clocks) * len(ids), "nobody was ever stale"
        assert faults(record, await read_all(service, app_name)) == []


async def test_of_two_writers_with_the_same_stale_copy_one_wins(
    crew: Callable[..., Crew], database: tuple[str, Any], app_name: str
) -> None:
    url, options = database
    async with SessionService(url, **options) as service:
        ids = [
            (await service.create_session(app_name=app_name, user_id="ann")).id for _ in range(20)
        ]
        open_crew = crew(url, **options)
        open_crew.run("hold", [{"app": app_name, "user": "ann", "ids": ids}] * 2)
        for id in ids:
            offsets = {"behind": -DAY, "ahead": DAY}
            jobs = [{"id": id, "name": name, "offset": by} for name, by in offsets.items()]
            won = [
                name
                for name, stored in zip(offsets, open_crew.run("append", jobs), strict=True)
                if stored
            ]
            assert len(won) == 1
            read = seen(await load(service, app_name, "ann", id))
            assert (read.events, read.state) == (won, {won[0]: won[0]})


async def test_of_concurrent_creates_of_one_id_one_wins(
    crew: Callable[..., Crew], database: tuple[str, Any], app_name: str
) -> None:
    url, options = database
    ids = [f"id-{n}" for n in range(20)]
    jobs = [
        {"app": app_name, "user": "ann", "ids": ids, "value": f"p{n}"} for n in range(PROCESSES)
    ]
    won = crew(url, **options).run("create", jobs)
    async with SessionService(url, **options) as service:
        stored = {read.session: read.state["by"] for read in await read_all(service, app_name)}
    assert stored == {id: f"p{n}" for n in range(PROCESSES) for id in won[n]}
    assert sorted(id for ids in won for id in ids) == sorted(ids)


async def test_a_read_is_one_moment(
    crew: Callable[..., Crew], database: tuple[str, Any], app_name: str, tmp_path: Path
) -> None:
    """The counters that every event sets in each scope equal the number of events."""
    url, options = database
    where = {"app": app_name, "user": "ann", "id": "counted", "stop": str(tmp_path / "stop")}
    writer, reader = (
        ("count", {**where, "most": 12}),
        ("watch", {**where, "reads": READS, "least": 20}),
    )
    appended, read = crew(url, **options).run_all([writer, reader])
    assert read["torn"] == []
    assert read["moments"] >= 20, f"{appended} events were appended meanwhile"
