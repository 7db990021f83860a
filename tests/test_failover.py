"""Servers that hang, fail over to a standby or lag behind: nothing is lost, nobody waits forever.

ADK_SESSIONS_SOAK=1 fails over several times, with more events before and after.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from everywhere import SOAK
from proxy import Lose, Proxy
from servers import LOOPBACK, Postgres, find_postgres, free_port, run_postgres, run_standby
from sqlalchemy import Connection, make_url, text
from workers import (
    BACKENDS,
    SHARED,
    Crew,
    Record,
    errors_of,
    event,
    faults,
    in_each_scope,
    load,
    read_all,
)

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    OutcomeUnknownError,
    SessionService,
    migrate,
)
from adk_sessions.dialects.hosts import CONNECT_TIMEOUT, Connector
from adk_sessions.url import create_engine

PROCESSES = 2
ROUNDS = 5 if SOAK else 1
EVENTS = 500 if SOAK else 30  # before the fault, and as many after it
PATIENCE = 60.0
SERVERS = ["postgresql", "mariadb"]
every_server = pytest.mark.parametrize("kind", SERVERS)
SECRET = "s3cr3t-word"
SMALL, LARGE = 10, 12_000_000


async def silence() -> None:
    """Nothing more is said on a connection, until the client has left it."""
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


def place(url: str, *addresses: tuple[str, int | None], query: str = "") -> str:
    """The URL with other hosts, as people write several."""
    parts = make_url(url)
    user = (parts.username or "") + (f":{parts.password}" if parts.password else "")
    hosts = ",".join(f"{host}:{port}" for host, port in addresses)
    return f"{parts.drivername}://{user}@{hosts}/{parts.database}{query}"


def address(url: str) -> tuple[str, int]:
    parts = make_url(url)
    assert parts.host
    default = {"postgresql": 5432}.get(parts.get_backend_name(), 3306)
    return parts.host, parts.port or default


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(SHARED[BACKENDS[kind][0]]))


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """Where connections are taken, and nothing is ever said."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(100)
        yield LOOPBACK, listener.getsockname()[1]


# --- a silent server ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lose", "size"),
    [
        *((kind, "reply", SMALL) for kind in ("postgresql", "generic", "mariadb")),
        # what does not fit into the buffers on the way cannot even be sent
        *((kind, "request", size) for kind in SERVERS for size in (SMALL, LARGE)),
    ],
)
async def test_an_append_that_nobody_answers_is_repeated_and_stored_once(
    kind: str, url: str, size: int, lose: Lose, app_name: str
) -> None:
    options = BACKENDS[kind][1]
    async with (
        Proxy(*address(url)) as proxy,
        SessionService(
            place(url, (LOOPBACK, proxy.port)),
            statement_timeout=0.7 if size == SMALL else 2,
            pool_size=3,
            **options,
        ) as service,
        asyncio.timeout(PATIENCE),
    ):
        session = await service.create_session(app_name=app_name, user_id="ann")
        await asyncio.gather(*(service.ping() for _ in range(3)))
        met = errors_of(service)

        async def silent() -> None:
            with suppress(asyncio.CancelledError):  # the client has left
                while not met:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        proxy.cut("event-1", lose=lose, meanwhile=silent)
        one = event("event-1", in_each_scope("k"))
        one.content = "x" * size
        await service.append_event(session, one)
        assert proxy.fired == 1
        assert met[0] == "TimeoutError"
        stored = await load(service, app_name, "ann", session.id)
        assert stored == session
        assert [one.id for one in stored.events] == ["event-1"]
        assert service._database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@every_server
async def test_a_call_that_takes_too_long_says_so(kind: str, url: str, app_name: str) -> None:
    async with (
        SessionService(url) as other,
        SessionService(url, statement_timeout=0.5, retry_window=0) as service,
    ):
        session = await other.create_session(app_name=app_name, user_id="ann")
        before = session.model_dump()
        one = event("event-1", {})
        locked, done = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        async def hold() -> None:
            async with other._database.engine.begin() as conn:
                lock = "SELECT 1 FROM sessions WHERE app_name = :app FOR UPDATE"
                await conn.execute(text(lock), {"app": app_name})
                locked.set()
                await done.wait()

        holding = loop.create_task(hold())
        try:
            await locked.wait()
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(OutcomeUnknownError) as raised:
                    await service.append_event(session, one)
        finally:
            done.set()
            await holding
        assert raised.value.retryable
        assert raised.value.driver_error == "TimeoutError"
        assert session.model_dump() == before
        assert service._database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await other.append_event(session, one)


@every_server
async def test_migrations_take_as_long_as_they_take(kind: str, url: str) -> None:
    sleep = {"postgresql": "SELECT pg_sleep(1)", "mariadb": "SELECT SLEEP(1)"}[kind]

    def work(conn: Connection) -> None:
        conn.execute(text(sleep))

    async with SessionService(url, statement_timeout=0.3, retry_window=0) as service:
        migrating = asyncio.ensure_future(service._database.submit(work, write=True))
        # nor does a call beside it that takes too long end it
        with pytest.raises(DatabaseError):
            await service._run(work, write=False)
        await migrating


@every_server
@pytest.mark.parametrize("given", ["option", "url"])
async def test_a_host_that_hangs_is_given_up(
    kind: str, url: str, given: str, silent: tuple[str, int]
) -> None:
    option = {"connect_timeout": 0.5} if given == "option" else {}
    query = "?connect_timeout=1" if given == "url" else ""
    async with SessionService(place(url, silent, query=query), **option) as service:
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(DatabaseError, match="no answer in time"):
                await service.prepare_tables()


@pytest.mark.parametrize(
    ("kind", "question"),
    [("postgresql", "pg_catalog.version"), ("mariadb", "SET SESSION TRANSACTION")],
)
async def test_a_host_that_hangs_once_it_is_connected_is_given_up(
    kind: str, url: str, question: str
) -> None:
    async with (
        Proxy(*address(url)) as proxy,
        SessionService(place(url, (LOOPBACK, proxy.port)), connect_timeout=3) as service,
        asyncio.timeout(PATIENCE),
    ):
        proxy.cut(question, lose="reply", meanwhile=silence)
        with pytest.raises(DatabaseError) as raised:
            await service.prepare_tables()
        assert raised.value.retryable
        assert proxy.fired == 1
        await service.prepare_tables()


# --- several hosts -----------------------------------------------------------------------------


@every_server
async def test_hosts_that_hang_or_refuse_are_passed_over(
    kind: str, url: str, silent: tuple[str, int], app_name: str
) -> None:
    hosts = place(url, silent, (LOOPBACK, free_port()), address(url))
    async with (
        SessionService(hosts, connect_timeout=2) as service,
        asyncio.timeout(PATIENCE),
    ):
        session = await service.create_session(app_name=app_name, user_id="ann")
        await service.append_event(session, event("event-1", {}))
        assert await load(service, app_name, "ann", session.id) == session


async def tried(driver: str, answers: dict[str, Any], **arguments: Any) -> tuple[Any, list[Any]]:
    """What a connector comes to, and the hosts it asked; an answer is an error or a value."""
    asked = []

    class Driver:
        def __init__(self, host: str) -> None:
            self.host = host

        def terminate(self) -> None:
            asked.append(f"{self.host} left")

        def cursor(self) -> Any:
            return self

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def execute(self, _query: str) -> None:
            if isinstance(answers[self.host], Exception):
                raise answers[self.host]

        async def fetchone(self) -> tuple[Any]:
            return (answers[self.host],)

    async def connect(**given: Any) -> Driver:
        asked.append(given["host"])
        if driver == "asyncpg" and isinstance(answers[given["host"]], Exception):
            raise answers[given["host"]]
        return Driver(given["host"])

    writes = arguments.pop("writes", True)
    connector = Connector(driver, writes=writes, connect=connect)
    try:
        connected = await connector(host=",".join(answers), port="1", **arguments)
        return connected.host, asked
    except Exception as error:
        return error, asked


async def test_a_cluster_node_that_is_not_ready_or_only_reads_is_passed_over() -> None:
    from asyncmy.errors import OperationalError

    not_ready = OperationalError(1047, "WSREP has not yet prepared node for application use")
    nodes: dict[str, Any] = {"a": not_ready, "b": 1, "c": 0}
    found, asked = await tried("asyncmy", nodes)
    assert (found, asked) == ("c", ["a", "a left", "b", "b left", "c"])
    found, asked = await tried("asyncmy", nodes, writes=False)
    assert (found, asked) == ("b", ["a", "a left", "b"])
    # newer servers say it in words
    nodes = {"a": "ON", "b": "NO_LOCK", "c": "OFF"}
    found, asked = await tried("asyncmy", nodes)
    assert (found, asked) == ("c", ["a", "a left", "b", "b left", "c"])


async def test_a_wrong_password_is_wrong_everywhere() -> None:
    import asyncpg

    wrong = asyncpg.InvalidPasswordError("no")
    found, asked = await tried("asyncpg", {"a": OSError("no route"), "b": wrong, "c": 0})
    assert (found, asked) == (wrong, ["a", "b"])


async def test_a_host_that_answers_as_another_one_says_more_than_one_that_does_not() -> None:
    import asyncpg

    standby = asyncpg.TargetServerAttributeNotMatched("a standby")
    found, asked = await tried("asyncpg", {"a": standby, "b": OSError("no route")})
    assert type(found).__name__ == "TargetServerAttributeNotMatched"
    assert asked == ["a", "b"]


# --- fail-over ---------------------------------------------------------------------------------


@pytest.fixture
def own_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that stops a server must not be given somebody else's."""
    monkeypatch.delenv("ADK_SESSIONS_TEST_POSTGRES_URL", raising=False)
    if find_postgres() is None:
        pytest.skip("PostgreSQL's programs not found")


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(PROCESSES) as processes:
        yield processes


async def grown(server: Postgres, database: str, more: int) -> None:
    """Waits until so many more events are stored."""
    target = None
    async with asyncio.timeout(PATIENCE):
        while True:
            query = "SELECT count(*) FROM events"
            count = await asyncio.to_thread(server.value, query, database)
            target = count + more if target is None else target
            if count >= target:
                return
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("own_postgres")
@pytest.mark.parametrize("fault", ["kill", "hang"])
@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_what_was_acknowledged_is_on_the_standby_when_it_is_promoted(
    fault: str, turn: int, crew: Crew, app_name: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        primary = stack.enter_context(run_postgres(durable=True))
        url = primary.create_database("shop")
        await migrate.upgrade(url)
        standby = stack.enter_context(run_standby(primary))
        # the standby first: it is passed over for as long as it is one
        hosts = place(url, *((LOOPBACK, one.port) for one in (standby, primary)))
        crew.open(hosts, connect_timeout=1, statement_timeout=1.5, pool_size=3, migrate="off")
        stop = tmp_path / "stop"
        jobs = []
        for n in range(PROCESSES):
            names = [f"p{n}-{task}" for task in range(3)]
            own = {"app": app_name, "user": "ann", "appends": 0, "stop": str(stop)}
            jobs.append({"jobs": [("fill", own | {"writer": name}) for name in names]})
        working = asyncio.ensure_future(asyncio.to_thread(crew.run, "together", jobs))
        try:
            await grown(primary, "shop", EVENTS)
            if fault == "kill":
                primary.kill()
            else:
                stack.enter_context(primary.hanging())
                stack.callback(primary.kill)
            standby.execute("SELECT pg_promote()")
            await grown(standby, "shop", EVENTS)
        finally:
            stop.touch()
            replies = await working
        record = Record.of(one for reply in replies for one in reply["records"])
        assert any(reply["met"] for reply in replies), "nobody has noticed"
        await asyncio.to_thread(crew.close)
        async with SessionService(hosts, connect_timeout=1, migrate="off") as service:
            assert len(record.calls) >= 2 * EVENTS
            assert faults(record, await read_all(service, app_name)) == []


# --- a replica ---------------------------------------------------------------------------------


@pytest.fixture
def two_databases(kind: str, fresh_database: Callable[[str], str]) -> tuple[str, str]:
    """A database, and another one in place of its replica: which one was read can be seen."""
    return fresh_database(kind), fresh_database(kind)


@asynccontextmanager
async def filled(url: str, app: str, *ids: str) -> AsyncIterator[SessionService]:
    async with SessionService(url) as service:
        for id in ids:
            await service.create_session(app_name=app, user_id="ann", session_id=id)
        yield service


def ids_of(listed: Any) -> set[str]:
    return {one.id for one in listed.sessions}


async def where_calls_go(service: SessionService, app: str) -> None:
    """The primary has "both" and "new", the replica "both" and "old"."""
    assert ids_of(await service.list_sessions(app_name=app)) == {"both", "old"}
    old = {"app_name": app, "user_id": "ann", "session_id": "old"}
    assert await service.get_session(**old) is None
    found = await service.get_session(**old, replica=True)
    assert found is not None
    assert found.id == "old"
    session = await load(service, app, "ann", "new")
    await service.append_event(session, event("event-1", {"user:a": 1}))
    await service.create_session(app_name=app, user_id="ann", session_id="another")
    await service.delete_session(app, "ann", "both")
    assert await service.get_user_state(app_name=app, user_id="ann") == {"a": 1}
    assert ids_of(await service.list_sessions(app_name=app)) == {"both", "old"}


@every_server
@pytest.mark.parametrize("given", ["read_url", "read_engine"])
async def test_lists_come_from_the_replica_and_sessions_only_when_asked(
    kind: str, given: str, two_databases: tuple[str, str], app_name: str
) -> None:
    primary, replica = two_databases
    async with (
        filled(primary, app_name, "both", "new") as there,
        filled(replica, app_name, "both", "old") as copy,
    ):
        engine = create_engine(replica)
        read = {"read_url": replica} if given == "read_url" else {"read_engine": engine}
        async with SessionService(primary, **read) as service:  # type: ignore[arg-type]
            await where_calls_go(service, app_name)
        assert ids_of(await copy.list_sessions(app_name=app_name)) == {"both", "old"}
        assert ids_of(await there.list_sessions(app_name=app_name)) == {"new", "another"}
        await engine.dispose()


@every_server
async def test_google_adks_class_reads_from_the_replica_too(
    kind: str, two_databases: tuple[str, str], app_name: str
) -> None:
    pytest.importorskip("google.adk")
    from adk_sessions.adk import DatabaseSessionService

    primary, replica = two_databases
    async with filled(primary, app_name, "new"), filled(replica, app_name, "old"):
        engine, read_engine = create_engine(primary), create_engine(replica)
        for service in (
            DatabaseSessionService(primary, read_url=replica, statement_timeout=20),
            DatabaseSessionService(db_engine=engine, read_engine=read_engine, pool_size=3),
        ):
            async with service:
                assert ids_of(await service.list_sessions(app_name=app_name)) == {"old"}
                await load(service, app_name, "ann", "new")  # type: ignore[arg-type]
        await engine.dispose()
        await read_engine.dispose()


@every_server
async def test_without_its_replica_a_service_reads_from_the_primary(
    kind: str,
    two_databases: tuple[str, str],
    app_name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    primary, replica = two_databases
    async with filled(replica, app_name, "old"), Proxy(*address(replica)) as proxy:
        through = make_url(replica).set(host=LOOPBACK, port=proxy.port)
        if make_url(replica).password is None:
            through = through.set(password=SECRET)
        async with SessionService(primary, read_url=through) as service:
            await service.create_session(app_name=app_name, user_id="ann", session_id="new")
            if kind == "postgresql":  # MariaDB sees that the password is wrong
                assert ids_of(await service.list_sessions(app_name=app_name)) == {"old"}
            await proxy.__aexit__(None, None, None)
            with caplog.at_level(logging.WARNING):
                async with asyncio.timeout(PATIENCE):
                    for _ in range(3):
                        assert ids_of(await service.list_sessions(app_name=app_name)) == {"new"}
            (warning,) = caplog.records
            assert "read replica" in warning.getMessage()
            assert SECRET not in caplog.text


async def test_a_standby_is_read_but_never_written_to(own_postgres: None, app_name: str) -> None:
    with run_postgres() as primary, run_standby(primary) as standby:
        url = primary.create_database("shop")
        await migrate.upgrade(url)
        read = standby.url("shop")
        databases = "SELECT count(*) FROM pg_database WHERE datname = 'shop'"
        async with asyncio.timeout(PATIENCE):
            while not await asyncio.to_thread(standby.value, databases):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        async with SessionService(url, read_url=read, lean_validation=True) as service:
            session = await service.create_session(app_name=app_name, user_id="ann")
            async with asyncio.timeout(PATIENCE):
                while not ids_of(await service.list_sessions(app_name=app_name)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'shop'"
            assert standby.value(query) > 0
            assert service._replica is not None
            assert not service._replica._warned
            await service.append_event(session, event("event-1", {}))
        only = place(url, (LOOPBACK, standby.port), (LOOPBACK, standby.port))
        async with SessionService(only, retry_window=0, migrate="off") as service:
            with pytest.raises(DatabaseError, match="target_session_attrs") as raised:
                await service.list_sessions(app_name=app_name)
            assert raised.value.retryable


def test_what_is_no_replica_is_refused(tmp_path: Path) -> None:
    url = "postgresql://u@127.0.0.1/d"
    file = f"sqlite:///{tmp_path}/a.db"
    engine = create_engine(url)
    for primary, read in [
        (url, {"read_url": url, "read_engine": engine}),
        (url, {"read_url": "mysql://u@127.0.0.1/d"}),
        (url, {"read_url": 5}),
        (url, {"read_engine": url}),
        (file, {"read_url": f"sqlite:///{tmp_path}/b.db"}),
        ("sqlite://", {"read_url": "sqlite://"}),
        (file, {"read_url": url}),
    ]:
        with pytest.raises(ConfigurationError, match="read"):
            SessionService(primary, **read)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["connect_timeout", "statement_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_timeout_is_a_number_of_seconds(name: str, value: Any, tmp_path: Path) -> None:
    for url in ("postgresql://u@127.0.0.1/d", f"sqlite:///{tmp_path}/a.db"):
        with pytest.raises(ConfigurationError, match=name):
            SessionService(url, **{name: value})


def test_timeouts_are_for_drivers_that_are_known(tmp_path: Path) -> None:
    SessionService(f"sqlite:///{tmp_path}/a.db", connect_timeout=1, statement_timeout=1)
    with pytest.raises(ConfigurationError, match="statement_timeout are for asyncpg"):
        SessionService("mysql+aiomysql://u@h/d", statement_timeout=1)
    engine = create_engine("postgresql://u@127.0.0.1/d")
    SessionService(engine=engine, statement_timeout=1)
    with pytest.raises(ConfigurationError, match="connect_timeout"):
        SessionService(engine=engine, connect_timeout=1)
    assert 0 < CONNECT_TIMEOUT <= 10
