"""MariaDB and MySQL: few round trips, rows locked in one order, connections given back clean."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import forked
import pytest
import sqlalchemy
import wire
from engines import engine_for
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from workers import event, load, seen

from adk_sessions import InvalidInputError, Session, SessionService, StaleSessionError
from adk_sessions.dialects.mysql import MySQL
from adk_sessions.dialects.rows import Key
from adk_sessions.models import models

SCOPES = ("", "app:", "user:")
MIXES = [frozenset(mix) for size in range(4) for mix in itertools.combinations(SCOPES, size)]
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]
HELD = {1205, 3572}  # a lock that is not had at once: MariaDB, MySQL

# A row of each table, by the parameters that `Held` and `is_held` give.
ROWS = {
    "": "sessions WHERE app_name = :app AND user_id = 'ann' AND id = :id",
    "app:": "app_states WHERE app_name = :app",
    "user:": "user_states WHERE app_name = :app AND user_id = 'ann'",
    "events": "events WHERE app_name = :app AND user_id = 'ann' AND session_id = :id",
}

each_mix = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "".join(sorted(mix)) or "none")


def delta(mix: frozenset[str], name: str) -> dict[str, str]:
    return {scope + name: name for scope in mix}


@pytest.fixture
async def service(mariadb_url: str) -> AsyncIterator[SessionService]:
    async with SessionService(mariadb_url, pool_size=1, max_overflow=0) as service:
        yield service


@pytest.fixture
async def session(service: SessionService, app_name: str) -> Session:
    session = await service.create_session(app_name=app_name, user_id="ann")
    await service.append_event(session, event("first", {}))
    return session


@pytest.fixture
async def other(mariadb_url: str) -> AsyncIterator[AsyncConnection]:
    """Somebody else's connection, at READ COMMITTED."""
    async with (
        engine_for(mariadb_url, isolation_level="READ COMMITTED") as engine,
        engine.connect() as connection,
    ):
        yield connection


async def is_held(other: AsyncConnection, session: Session, what: str) -> bool:
    """Whether somebody holds a lock on the row, or on one of the events."""
    try:
        await lock(other, session, what)
    except DBAPIError as error:
        if error.orig and error.orig.args[0] in HELD:
            return True
        raise
    finally:
        await other.rollback()
    return False


async def lock(other: AsyncConnection, session: Session, what: str) -> None:
    parameters = {"app": session.app_name, "id": session.id}
    found = await other.execute(
        text(f"SELECT * FROM {ROWS[what]} FOR UPDATE NOWAIT"),
        parameters if what in ("", "events") else {"app": session.app_name},
    )
    assert found.all()


async def held(other: AsyncConnection, session: Session) -> list[str]:
    return [what for what in ROWS if await is_held(other, session, what)]


# --- round trips -------------------------------------------------------------------------------


@asynccontextmanager
async def counted(url: str, own: bool) -> AsyncIterator[tuple[wire.Line, SessionService]]:
    """A service that has one warm connection, with its own engine or with the application's."""
    target = make_url(url)
    assert target.host
    with wire.proxy(target.host, target.port or 3306) as line:
        through = line.url(url)
        async with engine_for(through) as engine:
            service = SessionService(through) if own else SessionService(engine=engine)
            async with service:
                session = await service.create_session(app_name=through, user_id="ann")
                await service.append_event(session, event("first", {}))
                yield line, service


async def trips(line: wire.Line, call: Any) -> int:
    await line.settled()
    line.reset()
    await call
    await line.settled()
    assert line.connections == 0
    return line.trips


@pytest.mark.parametrize("own", [True, False])
async def test_round_trips_on_a_warm_connection(mariadb_url: str, app_name: str, own: bool) -> None:
    """An engine of the application's costs one more for each write: its ROLLBACK on return."""
    given = 0 if own else 1
    async with counted(mariadb_url, own) as (line, service):
        ann: dict[str, Any] = {"app_name": app_name, "user_id": "ann"}
        session = await service.create_session(**ann)
        for mix in MIXES:
            name = "-".join(["k", *sorted(mix)])
            appended = service.append_event(session, event(name, delta(mix, name)))
            assert await trips(line, appended) == 4 + given, mix
            created = service.create_session(**ann, state=delta(mix, "c"))
            assert await trips(line, created) == 3 + bool(mix - {""}) + given, mix
        batch = [event(f"b{n}", {"k": f"{n:1000}"}) for n in range(500)]
        assert await trips(line, service.append_events(session, batch)) == 4 + given
        reads = [
            service.get_session(**ann, session_id=session.id),
            service.list_sessions(**ann),
            service.get_user_state(**ann),
            service.get_app_state(app_name=app_name),
        ]
        for read in reads:
            assert await trips(line, read) == 2
        stored = await load(service, app_name, "ann", session.id)
        assert stored.events == session.events
        assert len(stored.events) == len(MIXES) + 500
        assert await trips(line, service.delete_session(app_name, "ann", session.id)) == 4 + given


# --- locks -------------------------------------------------------------------------------------


@asynccontextmanager
async def waiting(
    other: AsyncConnection, another: AsyncConnection, session: Session, what: str, call: Any
) -> AsyncIterator[list[str]]:
    """A call that waits for a row, which is let go at the end: what is held so far.

    That is given a while to become all that comes before the row, and then a moment to be more.
    """
    await lock(other, session, what)
    task = asyncio.create_task(call)
    try:
        before = {*SCOPES[: SCOPES.index(what)], what}
        async with asyncio.timeout(40):  # less than InnoDB waits for a lock
            while not before <= {*await held(another, session)}:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert not task.done()
        yield await held(another, session)
    finally:
        await other.rollback()
        await task


@pytest.mark.parametrize("level", LEVELS)
async def test_rows_are_locked_in_the_order_session_app_user(
    mariadb_url: str, other: AsyncConnection, session: Session, level: str
) -> None:
    async with (
        engine_for(mariadb_url, isolation_level=level) as engine,
        engine_for(mariadb_url) as another_engine,
        another_engine.connect() as another,
    ):
        service = SessionService(engine=engine)
        appended = service.append_event(session, event("1", delta(frozenset(SCOPES), "k")))
        async with waiting(other, another, session, "app:", appended) as so_far:
            assert so_far == ["", "app:"]
        appended = service.append_event(session, event("2", delta(frozenset(SCOPES), "k")))
        async with waiting(other, another, session, "user:", appended) as so_far:
            assert so_far == ["", "app:", "user:"]
        assert await held(another, session) == []
    assert seen(session).events == ["first", "1", "2"]


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_the_read_that_locks_does_not_lock_events(
    mariadb_url: str, other: AsyncConnection, session: Session, level: str
) -> None:
    """Else appends to sessions beside it would be held up."""
    key = Key(session.app_name, "ann", session.id)
    async with engine_for(mariadb_url, isolation_level=level) as engine, engine.connect() as conn:
        row = await conn.run_sync(MySQL(models())._hold, key, frozenset({"app", "user"}))
        assert row.newest == row.update_time
        assert await held(other, session) == ["", "app:", "user:"]


@each_mix
async def test_only_what_a_delta_names_is_locked(
    service: SessionService, other: AsyncConnection, session: Session, mix: frozenset[str]
) -> None:
    for scope in ("app:", "user:"):
        if scope not in mix:
            await lock(other, session, scope)
    async with asyncio.timeout(40):  # less than InnoDB waits for a lock
        await service.append_event(session, event("1", delta(mix, "k")))
        await service.create_session(
            app_name=session.app_name, user_id="ann", state=delta(mix, "c")
        )
    await other.rollback()
    stored = await load(service, session.app_name, "ann", session.id)
    assert stored.state == delta(mix, "k") | delta(mix - {""}, "c")


async def test_a_stale_append_changes_nothing_and_leaves_no_lock(
    service: SessionService, other: AsyncConnection, session: Session
) -> None:
    stale = session.model_copy(deep=True)
    await service.append_event(session, event("1", delta(frozenset(SCOPES), "k")))
    before = await rows(other)
    with pytest.raises(StaleSessionError):
        await service.append_event(stale, event("2", delta(frozenset(SCOPES), "late")))
    assert await rows(other) == before
    assert await held(other, session) == []


async def rows(other: AsyncConnection) -> list[Any]:
    tables = ("sessions", "events", "app_states", "user_states")
    found = [(await other.execute(text(f"SELECT * FROM {table}"))).all() for table in tables]
    await other.rollback()
    return [sorted(map(tuple, table)) for table in found]


# --- many writers ------------------------------------------------------------------------------

WRITERS, APPENDS = 3, 20


async def write(url: str, app: str, writer: str) -> None:
    """Tasks with every mix of deltas on one app and two users; nothing is repeated."""
    async with SessionService(url, retry_window=0) as service:

        async def task(number: int) -> None:
            choose = random.Random(f"{writer}{number}")
            user = f"user-{number % 2}"
            for n in range(APPENDS):
                name = f"{writer}-{number}-{n}"
                if n % 10 == 0:
                    state = delta(choose.choice(MIXES), "c")
                    session = await service.create_session(app_name=app, user_id=user, state=state)
                mix = choose.choice(MIXES) | {"app:"}
                await service.append_event(session, event(name, delta(mix, name)))

        await asyncio.gather(*map(task, range(4)))


async def test_no_deadlock_among_processes_with_every_mix_of_deltas(
    mariadb_url: str, service: SessionService, app_name: str
) -> None:
    """A deadlock (1213) would end its process, since a conflict is not repeated there."""
    # the first creates insert the scopes' rows, which is not what this is about
    for user in ("user-0", "user-1"):
        await service.create_session(app_name=app_name, user_id=user)
    jobs = [(__file__, mariadb_url, app_name, f"w{n}") for n in range(WRITERS)]
    ends = await asyncio.gather(*(asyncio.to_thread(forked.run, *job) for job in jobs))
    assert [(one.returncode, one.stderr) for one in ends] == [(0, "")] * WRITERS
    written = {f"w{w}-{t}-{n}" for w in range(WRITERS) for t in range(4) for n in range(APPENDS)}
    state = await service.get_app_state(app_name=app_name)
    assert state.keys() - {"c"} == written
    listed = (await service.list_sessions(app_name=app_name)).sessions
    events = [await load(service, app_name, one.user_id, one.id) for one in listed]
    assert sorted(id for one in events for id in seen(one).events) == sorted(written)


@pytest.mark.parametrize("level", LEVELS)
async def test_an_applications_engine_loses_nothing(
    mariadb_url: str, service: SessionService, app_name: str, level: str
) -> None:
    sessions = [await service.create_session(app_name=app_name, user_id="ann") for _ in range(4)]

    async def task(given: SessionService, number: int) -> None:
        for n, mix in enumerate(MIXES):
            name = f"{number}-{n}"
            await given.append_event(sessions[number], event(name, delta(mix, name)))

    async with engine_for(mariadb_url, isolation_level=level) as engine:
        given = SessionService(engine=engine)
        await asyncio.gather(*(task(given, number) for number in range(4)))
    everything = [delta(mix, f"{number}-{n}") for number in range(4) for n, mix in enumerate(MIXES)]
    wide = {key for one in everything for key in one if ":" in key}
    for number, session in enumerate(sessions):
        stored = await load(service, app_name, "ann", session.id)
        own = {f"{number}-{n}" for n, mix in enumerate(MIXES) if "" in mix}
        assert stored.state.keys() == wide | own
        assert seen(stored).events == [f"{number}-{n}" for n in range(len(MIXES))]


@pytest.mark.parametrize("level", LEVELS)
async def test_an_event_comes_last_where_the_update_time_was_moved_back(
    mariadb_url: str, other: AsyncConnection, session: Session, level: str
) -> None:
    """As google-adk does with an event of an earlier time."""
    await other.execute(
        text("UPDATE sessions SET update_time = update_time - INTERVAL 1 HOUR WHERE id = :id"),
        {"id": session.id},
    )
    await other.commit()
    async with engine_for(mariadb_url, isolation_level=level) as engine:
        given = SessionService(engine=engine)
        moved = await load(given, session.app_name, "ann", session.id)
        await given.append_event(moved, event("late", {}, timestamp=1.0))
        assert seen(moved).events == ["first", "late"]
        assert await load(given, session.app_name, "ann", session.id) == moved


# --- rows that are missing, states that are large ----------------------------------------------


@each_mix
@pytest.mark.parametrize("missing", [["app:"], ["user:"], ["app:", "user:"]])
async def test_a_missing_scope_row_is_made(
    service: SessionService,
    other: AsyncConnection,
    session: Session,
    mix: frozenset[str],
    missing: list[str],
) -> None:
    async def remove() -> None:
        for scope in missing:
            await other.execute(text(f"DELETE FROM {ROWS[scope]}"), {"app": session.app_name})
        await other.commit()

    for scope in ("app:", "user:"):
        await service.append_event(session, event(f"old {scope}", {f"{scope}old": 1}))
    old = {f"{scope}old": 1 for scope in {"app:", "user:"} - {*missing}}
    await remove()
    await service.append_event(session, event("1", delta(mix, "k")))
    stored = await load(service, session.app_name, "ann", session.id)
    assert stored.state == old | delta(mix, "k")
    await remove()
    created = await service.create_session(
        app_name=session.app_name, user_id="ann", state=delta(mix, "c")
    )
    kept = delta(frozenset(mix - {"", *missing}), "k")
    assert created.state == old | kept | delta(mix, "c")
    assert await load(service, session.app_name, "ann", created.id) == created
    for scope in ("app:", "user:"):
        await lock(other, session, scope)  # there it is


async def test_states_that_fit_a_packet_one_by_one(
    service: SessionService, session: Session
) -> None:
    assert isinstance(service._statements, MySQL)
    service._statements._largest_packet = limit = 150_000
    sizes: list[int] = []
    sqlalchemy.event.listen(
        service._database.engine.sync_engine,
        "before_cursor_execute",
        lambda *args: sizes.append(len(str(args[3]))),
    )
    for n in range(3):  # kilobytes: 40, 80, 120 for each scope
        large = {f"{scope}{n}": "x" * 40_000 for scope in SCOPES}
        await service.append_event(session, event(f"{n}", large | delta(frozenset(SCOPES), "k")))
    stored = await load(service, session.app_name, "ann", session.id)
    assert stored == session
    assert 120_000 < max(sizes) < limit
    for scope in SCOPES:
        with pytest.raises(InvalidInputError):
            await service.append_event(session, event("4", {scope + "large": "x" * 40_000}))
    assert await load(service, session.app_name, "ann", session.id) == stored


# --- connections that go back to the pool ------------------------------------------------------


async def leave_open(engine: AsyncEngine, statement: str) -> None:
    """Gives a connection back in the middle of a transaction that SQLAlchemy does not know of."""
    async with engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        async with raw.cursor() as cursor:
            assert await cursor.execute(statement) == 1


@pytest.mark.parametrize("before", ["append", "get", "stale"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sessions SET state = '{{\"lost\": 1}}' WHERE id = '{}'",
        "SELECT id FROM sessions WHERE id = '{}' FOR UPDATE",
    ],
    ids=["update", "select"],
)
async def test_an_open_transaction_of_the_application_is_rolled_back(
    service: SessionService, other: AsyncConnection, session: Session, before: str, statement: str
) -> None:
    """On the service's own engine, whatever its one connection did before."""
    stale = session.model_copy(deep=True)
    if before in ("append", "stale"):
        await service.append_event(session, event("1", {}))
    if before == "stale":
        with pytest.raises(StaleSessionError):
            await service.append_event(stale, event("2", {}))
    if before == "get":
        await load(service, session.app_name, "ann", session.id)
    engine = service._database.engine
    for _ in range(2):
        await leave_open(engine, statement.format(session.id))
        assert await held(other, session) == []
    stored = await load(service, session.app_name, "ann", session.id)
    assert stored == session


async def test_how_an_engine_gives_connections_back_can_be_chosen(
    mariadb_url: str, app_name: str
) -> None:
    async with SessionService(mariadb_url, pool_reset_on_return="rollback") as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        await service.append_event(session, event("1", delta(frozenset(SCOPES), "k")))
        assert await load(service, app_name, "ann", session.id) == session


if __name__ == "__main__":
    asyncio.run(write(*sys.argv[1:]))
