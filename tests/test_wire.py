"""What a call costs on the wire: round trips and bytes, counted by a proxy and not by statements.

Every call is made twice before it is counted: the first use of a statement on a connection is a
second trip, for the driver prepares it. Then several in a row are counted, each by itself, with
whatever the call leaves behind it (a ROLLBACK when its connection goes back to the pool).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import asyncpg
import pytest
import wire
from engines import engine_for
from servers import run_sync
from sqlalchemy import make_url
from workers import SHARED

from adk_sessions import Event, EventActions, SessionService, migrate

WARM, TIMES = 2, 3
PORTS = {"postgresql": 5432, "mariadb": 3306}
SCOPES = ("", "user:", "app:")
MIXES = [mix for n in range(4) for mix in itertools.combinations(SCOPES, n)]
MEGABYTE = 1_000_000
KILOBYTES = 4_000  # for names, keys and the protocol's own words; payloads here are far larger

Call = Callable[[], Awaitable[Any]]
Trips = dict[str, list[int]]


@dataclass(frozen=True)
class Cost:
    """What one call put on the wire."""

    trips: int
    sent: int
    received: int
    connections: int


@dataclass
class Client:
    """A service that reaches its database by way of the counting proxy."""

    line: wire.Line
    service: Any
    new_event: Callable[[dict[str, Any], float, Any], Any]
    app: str

    async def create(self, state: dict[str, Any] | None = None, user: str = "ann") -> Any:
        return await self.service.create_session(app_name=self.app, user_id=user, state=state)

    async def get(self, session: Any, **filters: Any) -> Any:
        key = {"app_name": self.app, "user_id": session.user_id, "session_id": session.id}
        return await self.service.get_session(**key, **filters)

    async def append(
        self,
        session: Any,
        delta: dict[str, Any] | None = None,
        *,
        timestamp: float | None = None,
        said: Any = "hello",
    ) -> Any:
        event = self.event(delta, timestamp=timestamp, said=said)
        return await self.service.append_event(session, event)

    def event(
        self,
        delta: dict[str, Any] | None = None,
        *,
        timestamp: float | None = None,
        said: Any = "hello",
    ) -> Any:
        return self.new_event(delta or {}, time.time() if timestamp is None else timestamp, said)

    async def cost(self, call: Call) -> Cost:
        """One call by itself, up to the last byte that it causes."""
        await self.line.settled()
        self.line.reset()
        await call()
        await self.line.settled()
        return Cost(self.line.trips, self.line.sent, self.line.received, self.line.connections)

    async def trips(self, call: Call) -> list[int]:
        """The trips of each of several calls in a row, once the statement is known."""
        for _ in range(WARM):
            await call()
        return [(await self.cost(call)).trips for _ in range(TIMES)]


def own_event(delta: dict[str, Any], timestamp: float, said: Any) -> Event:
    actions = EventActions(state_delta=delta)
    return Event(author="ann", content=said, timestamp=timestamp, actions=actions)


def own_service(url: str | None, engine: Any, **options: Any) -> Any:
    return SessionService(url, engine=engine, **options)


def adk_types() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same two for google-adk's service."""
    pytest.importorskip("google.adk")
    from google.adk.events import Event, EventActions
    from google.genai import types

    from adk_sessions.adk import DatabaseSessionService

    def event(delta: dict[str, Any], timestamp: float, said: Any) -> Any:
        content = types.Content(role="user", parts=[types.Part(text=str(said))])
        actions = EventActions(state_delta=delta)
        return Event(
            author="ann", invocation_id="1", content=content, timestamp=timestamp, actions=actions
        )

    def service(url: str | None, engine: Any, **options: Any) -> Any:
        return DatabaseSessionService(url, engine, **options)

    return event, service


@asynccontextmanager
async def client_of(
    url: str, app: str, *, binding: str = "own", via: str = "url", query: str = "", **options: Any
) -> AsyncIterator[Client]:
    new_event, new_service = adk_types() if binding == "adk" else (own_event, own_service)
    target = make_url(url)
    port = target.port or PORTS.get(target.get_backend_name(), 3306)
    async with AsyncExitStack() as stack:
        line = stack.enter_context(wire.proxy(target.host or wire.LOOPBACK, port))
        engine = None
        if via == "engine":
            engine = await stack.enter_async_context(engine_for(line.url(url)))
        through = line.url(url) + query if engine is None else None
        service = await stack.enter_async_context(new_service(through, engine, **options))
        yield Client(line, service, new_event, app)


def all_of(measured: Trips, trips: int) -> Trips:
    """What `measured` should be if each call took so many trips."""
    return {name: [trips] * TIMES for name in measured}


def too_many(measured: Trips, most: int) -> Trips:
    return {name: counted for name, counted in measured.items() if max(counted) > most}


def delta_of(mix: tuple[str, ...], value: Any = 1) -> dict[str, Any]:
    return {f"{scope}key": value for scope in mix}


def name_of(mix: tuple[str, ...]) -> str:
    return "+".join(scope or "session" for scope in mix) or "none"


# --- what is counted ---------------------------------------------------------------------------


async def creates(client: Client) -> Trips:
    measured: Trips = {}
    for mix in MIXES:
        measured[name_of(mix)] = await client.trips(partial(client.create, delta_of(mix)))
    return measured


async def appends(client: Client) -> Trips:
    """Each mix of deltas, whose rows are there."""
    session = await client.create(delta_of(SCOPES))
    measured: Trips = {}
    values = itertools.count()

    async def append(mix: tuple[str, ...]) -> None:
        await client.append(session, delta_of(mix, next(values)))

    for mix in MIXES:
        measured[name_of(mix)] = await client.trips(partial(append, mix))
    assert len((await client.get(session)).events) == len(MIXES) * (WARM + TIMES)
    return measured


async def batches(client: Client) -> Trips:
    session = await client.create(delta_of(SCOPES))
    measured: Trips = {}
    sizes = itertools.cycle((2, 3, 40))  # a size that was not seen before is no new statement

    async def append(mix: tuple[str, ...]) -> None:
        events = [client.event(delta_of(mix, n)) for n in range(next(sizes))]
        await client.service.append_events(session, events)

    for mix in MIXES:
        measured[name_of(mix)] = await client.trips(partial(append, mix))
    return measured


async def gets(client: Client, times: list[float]) -> Trips:
    """Each filter, on a session whose events say these times, seconds after it was made."""
    session = await client.create(delta_of(SCOPES))
    times = [session.last_update_time + 1 + seconds for seconds in times]
    for timestamp in times:
        await client.append(session, timestamp=timestamp)
    some, none = times[len(times) // 2], max(times) + 1
    filters: list[dict[str, Any]] = [
        {},
        {"num_recent_events": 0},
        {"num_recent_events": 3},
        {"after_timestamp": some},
        {"after_timestamp": none},
        {"num_recent_events": 3, "after_timestamp": some},
        {"num_recent_events": 3, "after_timestamp": none},
    ]
    measured: Trips = {}
    for given in filters:
        measured[str(given)] = await client.trips(partial(client.get, session, **given))
        after = [at for at in times if at >= given.get("after_timestamp", 0.0)]
        limit = given.get("num_recent_events", len(times))
        got = [event.timestamp for event in (await client.get(session, **given)).events]
        assert got == after[len(after) - min(limit, len(after)) :]
    session.id = "nobody's"
    measured["missing"] = await client.trips(lambda: client.get(session))
    return measured


async def others(client: Client) -> Trips:
    sessions = [await client.create({"key": n}, user=f"user-{n % 3}") for n in range(12)]
    app, service = {"app_name": client.app}, client.service
    doomed = [session for session in sessions if session.user_id == "user-0"] + [sessions[1]]
    return {
        "list": await client.trips(lambda: service.list_sessions(**app)),
        "list of a user": await client.trips(
            lambda: service.list_sessions(**app, user_id="user-1")
        ),
        "user state": await client.trips(lambda: service.get_user_state(**app, user_id="user-1")),
        "app state": await client.trips(lambda: service.get_app_state(**app)),
        "delete": await client.trips(
            lambda: service.delete_session(
                **app, user_id=doomed[-1].user_id, session_id=doomed.pop().id
            )
        ),
    }


# The events' own times, the session having been made at 0.
IN_ORDER = [0.0, 1, 2, 3, 4, 5, 6, 7, 8]
# Events are appended later than the ones before them, whatever their clocks say.
IN_DISORDER = [5, 3, 8, -8, 1, 7.5, -1e8, 9, 4]

every_way = pytest.mark.parametrize(
    ("binding", "via"), [("own", "url"), ("own", "engine"), ("adk", "url")]
)
on_mariadb = pytest.mark.parametrize(
    ("kind", "binding", "via"),
    [("mariadb", "own", "url"), ("mariadb", "own", "engine"), ("mariadb", "adk", "url")],
)


# --- PostgreSQL --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """The URL of the session's database of that kind; the tables are there."""

    @cache
    def prepared(kind: str) -> str:
        url: str = request.getfixturevalue(SHARED[kind])
        run_sync(migrate.upgrade(url))
        return url

    return prepared


@pytest.fixture
def kind() -> str:
    return "postgresql"


@pytest.fixture
async def client(
    database: Callable[[str], str], kind: str, binding: str, via: str, app_name: str
) -> AsyncIterator[Client]:
    async with client_of(database(kind), app_name, binding=binding, via=via) as client:
        yield client


@every_way
async def test_a_create_is_one_trip(client: Client) -> None:
    measured = await creates(client)
    assert measured == all_of(measured, 1)


@every_way
async def test_an_append_is_one_trip_whatever_it_sets(client: Client) -> None:
    measured = await appends(client)
    assert measured == all_of(measured, 1)


@every_way
async def test_a_batch_is_one_trip_whatever_its_size(client: Client) -> None:
    measured = await batches(client)
    assert measured == all_of(measured, 1)


@every_way
async def test_a_read_is_one_trip_whatever_its_filter(client: Client) -> None:
    measured = await gets(client, IN_DISORDER)
    assert measured == all_of(measured, 1)


@every_way
async def test_every_other_call_is_one_trip(client: Client) -> None:
    measured = await others(client)
    assert measured == all_of(measured, 1)


@pytest.mark.parametrize(("binding", "via"), [("own", "url"), ("adk", "url")])
async def test_a_second_writer_takes_one_trip_or_two(client: Client) -> None:
    session = await client.create(delta_of(SCOPES))
    other = await client.get(session)

    async def append(view: Any) -> None:
        event = client.event(delta_of(SCOPES))
        await client.service.append_event(view, event, on_stale="refresh")

    assert await client.trips(lambda: append(session)) == [1] * TIMES
    await append(other)  # what lies between is read in another trip
    views = [session, other]

    async def in_turn() -> None:
        views.reverse()
        await append(views[0])

    assert await client.trips(in_turn) == [2] * TIMES
    assert views[0].events[:-1] == views[1].events


@pytest.mark.parametrize(("binding", "via"), [("own", "url")])
async def test_a_change_of_a_large_state_is_four_trips_and_a_few_bytes(client: Client) -> None:
    session = await client.create({"large": "x" * 1_000_000, "n": 1})
    key = {"app_name": client.app, "user_id": "ann", "session_id": session.id}

    async def change() -> None:
        await client.service.update_state(**key, add={"n": 1}, delta={"a": 1}, delete=["b"])

    assert await client.trips(change) == [4] * TIMES  # BEGIN, a locked read, a write, COMMIT
    cost = await client.cost(change)
    assert cost.sent + cost.received < 10_000


async def test_concurrent_calls_are_one_trip_each(
    database: Callable[[str], str], app_name: str
) -> None:
    async with client_of(database("postgresql"), app_name, pool_size=3, max_overflow=0) as client:
        session = await client.create()

        async def together() -> None:
            await asyncio.gather(*(client.get(session) for _ in range(10)))

        for _ in range(3):
            await together()
        cost = await client.cost(together)
        assert (cost.trips, cost.connections) == (10, 0)


async def test_a_call_is_one_trip_for_a_pooler_too(
    database: Callable[[str], str], app_name: str
) -> None:
    """No statement is prepared ahead; its text goes along with each call, in the same trip."""
    async with client_of(database("postgresql"), app_name, query="?pgbouncer=true") as client:
        for count in (creates, appends, batches, others):
            measured = await count(client)
            assert measured == all_of(measured, 1), count.__name__
        measured = await gets(client, IN_DISORDER)
        assert measured == all_of(measured, 1)


async def test_a_big_state_stays_where_it_is(database: Callable[[str], str], app_name: str) -> None:
    """A delta of one key sends one key, and brings nothing back."""
    async with client_of(database("postgresql"), app_name) as client:
        big = os.urandom(MEGABYTE // 6).hex()
        session = await client.create({f"{scope}big": big for scope in SCOPES})
        measured: dict[str, int] = {}
        for mix in MIXES:
            for n in range(WARM):
                await client.append(session, delta_of(mix, n))
            cost = await client.cost(partial(client.append, session, delta_of(mix)))
            measured[name_of(mix)] = max(cost.sent, cost.received)
        assert {mix: size for mix, size in measured.items() if size > KILOBYTES} == {}
        assert (await client.get(session)).state == session.state


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_an_event_is_sent_once(
    kind: str, database: Callable[[str], str], app_name: str
) -> None:
    async with client_of(database(kind), app_name) as client:
        session = await client.create()
        said = os.urandom(MEGABYTE // 2).hex()
        for _ in range(WARM):
            await client.append(session)
        cost = await client.cost(lambda: client.append(session, said=said))
        assert MEGABYTE < cost.sent < MEGABYTE + KILOBYTES
        assert cost.received < KILOBYTES


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_a_list_brings_a_shared_state_once(
    kind: str, database: Callable[[str], str], app_name: str
) -> None:
    async with client_of(database(kind), app_name) as client:
        size = 100_000
        big = {f"{scope}big": os.urandom(size // 2).hex() for scope in ("app:", "user:")}
        await client.create(big)
        for _ in range(9):
            await client.create()
        cost = await client.cost(lambda: client.service.list_sessions(app_name=app_name))
        assert cost.received < 2 * size + 10 * KILOBYTES


# --- a dead connection in the pool -------------------------------------------------------------

CALLS: dict[str, Callable[[Client, Any], Awaitable[Any]]] = {
    "create": lambda client, _: client.create({"user:key": 1}),
    "append": lambda client, session: client.append(session, delta_of(SCOPES)),
    "get": lambda client, session: client.get(session, num_recent_events=2),
    "list": lambda client, _: client.service.list_sessions(app_name=client.app),
    "user state": lambda client, _: client.service.get_user_state(
        app_name=client.app, user_id="ann"
    ),
    "app state": lambda client, _: client.service.get_app_state(app_name=client.app),
    "delete": lambda client, session: client.service.delete_session(client.app, "ann", session.id),
}


@pytest.mark.parametrize("silently", [False, True], ids=["said", "silently"])
@pytest.mark.parametrize("call", CALLS)
async def test_a_dead_connection_costs_a_new_one_and_no_more(
    database: Callable[[str], str], app_name: str, call: str, silently: bool
) -> None:
    """Several are dead; the call that meets the first of them is repeated once."""
    async with client_of(database("postgresql"), app_name, migrate="off") as client:
        session = await client.create(delta_of(SCOPES))

        async def run() -> None:
            await CALLS[call](client, session)

        async def connect() -> None:
            async with client.service._database.engine.connect():
                pass

        await run()
        await client.service.close()
        connecting = await client.cost(connect)
        assert connecting.connections == 1
        await asyncio.gather(*(client.get(session) for _ in range(4)))
        await client.line.settled()
        assert client.line.cut(silently=silently) >= 2
        cost = await client.cost(run)
        assert cost.connections == 1
        # on the new connection: the statement is prepared, and executed
        assert cost.trips == connecting.trips + 2


# --- MariaDB -----------------------------------------------------------------------------------


@on_mariadb
async def test_an_append_is_at_most_four_trips_on_mariadb(client: Client, via: str) -> None:
    # the pool of an application's engine says ROLLBACK to what comes back, and is left alone
    assert too_many(await appends(client), 5 if via == "engine" else 4) == {}


@on_mariadb
async def test_a_read_is_at_most_two_trips_on_mariadb(client: Client) -> None:
    assert too_many(await gets(client, IN_ORDER), 2) == {}


@pytest.mark.parametrize(("kind", "binding", "via"), [("mariadb", "own", "url")])
async def test_clocks_that_lag_cost_a_second_look_at_most_on_mariadb(client: Client) -> None:
    """With both filters, where the newest by their place are not the newest by their clocks."""
    measured = await gets(client, IN_DISORDER)
    assert too_many(measured, 4) == {}
    assert len(too_many(measured, 2)) <= 1


@pytest.mark.parametrize(("kind", "binding", "via"), [("mariadb", "own", "url")])
async def test_every_other_read_is_at_most_two_trips_on_mariadb(client: Client) -> None:
    measured = await others(client)
    del measured["delete"]
    assert too_many(measured, 2) == {}


async def test_a_big_state_that_nobody_changes_stays_where_it_is_on_mariadb(
    database: Callable[[str], str], app_name: str
) -> None:
    async with client_of(database("mariadb"), app_name) as client:
        session = await client.create({"big": os.urandom(MEGABYTE // 2).hex()})
        for mix in MIXES:
            if "" in mix:
                continue
            await client.append(session, delta_of(mix))
            cost = await client.cost(partial(client.append, session, delta_of(mix)))
            assert max(cost.sent, cost.received) < KILOBYTES, name_of(mix)


# --- the proxy itself --------------------------------------------------------------------------


async def test_the_proxy_counts_what_a_client_waits_for(postgres_url: str) -> None:
    """Statements that are sent together are one trip; a BEGIN and a COMMIT are two more."""
    target = make_url(postgres_url)
    with wire.proxy(target.host or wire.LOOPBACK, target.port or 5432) as line:
        connection = await asyncpg.connect(line.url(postgres_url))
        line.reset()
        await connection.execute("SELECT 1; SELECT 2")
        await line.settled()
        assert (line.trips, line.connections) == (1, 0)
        line.reset()
        async with connection.transaction():
            await connection.execute("SELECT 3")
        await line.settled()
        assert line.trips == 3
        assert 0 < line.sent < line.received + 100
        await connection.close()
