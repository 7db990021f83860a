"""Connections that break at the worst moment: once is once, and errors are the store's own."""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from everywhere import SOAK
from proxy import Lose, Proxy
from servers import MariaDB, unique_name
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine
from workers import BACKENDS, SHARED, event, in_each_scope, load, seen

from adk_sessions import (
    AlreadyExistsError,
    DatabaseError,
    OutcomeUnknownError,
    Session,
    SessionService,
    SessionStoreError,
    StaleSessionError,
    appends,
)
from adk_sessions.url import create_engine

COMMIT = "COMMIT"
SERVERS = ["postgresql", "generic", "mariadb"]
# Where a call's reply can be lost: that of the statement that carries the data, or of the commit.
ANYWHERE = [
    ("postgresql", "statement"),
    ("generic", "statement"),
    ("generic", "commit"),
    ("mariadb", "statement"),
    ("mariadb", "commit"),
]
# Those after which the call has happened.
STORED = [("postgresql", "statement"), ("generic", "commit"), ("mariadb", "commit")]


def at(places: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("backend", "place"), places, indirect=["backend"])


both_ways = pytest.mark.parametrize("lose", ["request", "reply"])


@dataclass
class Line:
    """A service behind a proxy, and another one on the same database that is not."""

    proxy: Proxy
    service: SessionService
    direct: SessionService
    engine: AsyncEngine
    url: str
    app: str

    async def session(self) -> Session:
        """A session with one event; everything is prepared and connected after that."""
        session = await self.service.create_session(app_name=self.app, user_id="ann")
        await self.service.append_event(session, event("event-0", in_each_scope("k0")))
        return session

    async def stored(self, session: Session) -> Session:
        return await load(self.direct, session.app_name, session.user_id, session.id)

    async def assert_equal(self, session: Session) -> None:
        """The caller's session is what is stored."""
        stored = await self.stored(session)
        assert session == stored
        assert session._storage_update_marker == stored._storage_update_marker


@pytest.fixture(params=SERVERS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def behind(
    backend: str, request: pytest.FixtureRequest, app_name: str
) -> AsyncIterator[Callable[..., Awaitable[Line]]]:
    """`await behind(url, **options)` makes a line to a database, the session's if there is none."""
    kind, dialect = BACKENDS[backend]
    shared = request.getfixturevalue(SHARED[kind])
    async with AsyncExitStack() as stack:

        async def make(url: str = shared, **options: Any) -> Line:
            target = make_url(url)
            assert target.host
            port = target.port or {"postgresql": 5432, "mariadb": 3306}[kind]
            proxy = await stack.enter_async_context(Proxy(target.host, port))
            engine = create_engine(target.set(host="127.0.0.1", port=proxy.port))
            stack.push_async_callback(engine.dispose)
            service, direct = (
                SessionService(engine=engine, **dialect, **options),
                SessionService(url, **dialect),
            )
            for one in (service, direct):
                await stack.enter_async_context(one)
                await one.prepare_tables()
            if kind == "postgresql":
                # a connection that has built an index concurrently names its isolation level with
                # each BEGIN from then on, READ COMMITTED, which looks like a COMMIT
                await engine.dispose()
            return Line(proxy, service, direct, engine, url, app_name)

        yield make


@pytest.fixture
async def line(behind: Callable[..., Awaitable[Line]]) -> Line:
    return await behind()


def marker(place: str, text: str) -> str:
    return COMMIT if place == "commit" else text


# --- append ------------------------------------------------------------------------------------


@both_ways
@at(ANYWHERE)
async def test_an_append_that_is_cut_off_is_stored_once(line: Line, place: str, lose: Lose) -> None:
    session = await line.session()
    line.proxy.cut(marker(place, "event-1"), lose=lose)
    appended = event("event-1", {**in_each_scope("k1"), "temp:t": 1})
    assert await line.service.append_event(session, appended) is appended
    assert line.proxy.fired == 1
    assert session.state.pop("temp:t") == 1
    assert seen(session).events == ["event-0", "event-1"]
    assert session.state == in_each_scope("k0") | in_each_scope("k1")
    await line.assert_equal(session)
    await line.service.append_event(session, event("event-2", {}))
    await line.assert_equal(session)


@both_ways
@at(ANYWHERE)
async def test_a_batch_that_is_cut_off_is_stored_once(line: Line, place: str, lose: Lose) -> None:
    session = await line.session()
    line.proxy.cut(marker(place, "event-2"), lose=lose)
    batch = [event(f"event-{n}", in_each_scope(f"k{n}")) for n in (1, 2, 3)]
    assert await line.service.append_events(session, batch) == batch
    assert line.proxy.fired == 1
    assert seen(session).events == ["event-0", "event-1", "event-2", "event-3"]
    await line.assert_equal(session)


@at(STORED)
async def test_what_came_between_an_append_and_its_repetition_is_not_undone(
    line: Line, place: str
) -> None:
    """The repetition of a lost append must not set its delta again."""
    session = await line.session()
    newer = dict.fromkeys(in_each_scope("k1"), "newer")

    async def other_append() -> None:
        await line.direct.append_event(await line.stored(session), event("other", newer))

    line.proxy.cut(marker(place, "event-1"), lose="reply", meanwhile=other_append)
    await line.service.append_event(session, event("event-1", in_each_scope("k1")))
    assert line.proxy.fired == 1
    assert seen(session).events == ["event-0", "event-1", "other"]
    assert session.state == in_each_scope("k0") | newer
    await line.assert_equal(session)


@at([("postgresql", "event-1"), ("mariadb", "FOR UPDATE")])
async def test_an_append_that_never_arrived_is_stale_if_another_came_first(
    line: Line, place: str
) -> None:
    session = await line.session()
    before = session.model_dump()

    async def other_append() -> None:
        await line.direct.append_event(
            await line.stored(session), event("other", in_each_scope("k1"))
        )

    line.proxy.cut(place, lose="request", meanwhile=other_append)
    with pytest.raises(StaleSessionError):
        await line.service.append_event(session, event("event-1", in_each_scope("k2")))
    assert line.proxy.fired == 1
    assert session.model_dump() == before
    stored = await line.stored(session)
    assert seen(stored).events == ["event-0", "other"]
    assert stored.state == in_each_scope("k0") | in_each_scope("k1")


# --- create ------------------------------------------------------------------------------------


@pytest.mark.parametrize("session_id", [None, "given"])
@both_ways
@at(ANYWHERE)
async def test_a_create_that_is_cut_off_makes_one_session(
    line: Line, place: str, lose: Lose, session_id: str | None
) -> None:
    await line.session()
    state = {"m": "marker", "user:m": 1}
    line.proxy.cut(marker(place, "marker"), lose=lose)
    created = await line.service.create_session(
        app_name=line.app, user_id="bob", state=state, session_id=session_id
    )
    assert line.proxy.fired == 1
    listed = await line.direct.list_sessions(app_name=line.app, user_id="bob")
    assert [one.id for one in listed.sessions] == [created.id]
    assert session_id in (None, created.id)
    assert created.state == {**state, "app:k0": "k0"}
    await line.assert_equal(created)
    await line.service.append_event(created, event("event-1", {}))


async def test_a_create_that_never_arrived_fails_if_another_came_first(line: Line) -> None:
    await line.session()

    async def other_create() -> None:
        await line.direct.create_session(
            app_name=line.app, user_id="bob", session_id="one", state={"by": "other", "app:by": 1}
        )

    line.proxy.cut("marker", lose="request", meanwhile=other_create)
    with pytest.raises(AlreadyExistsError):
        await line.service.create_session(
            app_name=line.app,
            user_id="bob",
            session_id="one",
            state={"by": "marker", "app:by": 2},
        )
    assert line.proxy.fired == 1
    stored = await load(line.direct, line.app, "bob", "one")
    assert (stored.state["by"], stored.state["app:by"]) == ("other", 1)


@at(STORED)
async def test_a_create_whose_reply_was_lost_wins_over_a_later_one(line: Line, place: str) -> None:
    await line.session()

    async def other_create() -> None:
        with pytest.raises(AlreadyExistsError):
            await line.direct.create_session(
                app_name=line.app, user_id="bob", session_id="one", state={"by": "other"}
            )

    line.proxy.cut(marker(place, "marker"), lose="reply", meanwhile=other_create)
    created = await line.service.create_session(
        app_name=line.app, user_id="bob", session_id="one", state={"by": "marker"}
    )
    assert line.proxy.fired == 1
    assert created.state["by"] == "marker"
    await line.assert_equal(created)


@at(STORED)
async def test_a_create_whose_session_was_replaced_meanwhile_fails(line: Line, place: str) -> None:
    await line.session()

    async def replace() -> None:
        await line.direct.delete_session(line.app, "bob", "one")
        await line.direct.create_session(
            app_name=line.app, user_id="bob", session_id="one", state={"by": "other"}
        )

    line.proxy.cut(marker(place, "marker"), lose="reply", meanwhile=replace)
    with pytest.raises(AlreadyExistsError):
        await line.service.create_session(
            app_name=line.app, user_id="bob", session_id="one", state={"by": "marker"}
        )
    assert line.proxy.fired == 1
    assert (await load(line.direct, line.app, "bob", "one")).state["by"] == "other"


# --- dead connections in the pool --------------------------------------------------------------


async def end_connections(line: Line) -> int:
    """End the server's side of every pooled connection; how many there were."""
    if line.engine.dialect.name == "postgresql":
        own, end = "SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"
        alive = "SELECT pid FROM pg_stat_activity"
    else:
        own, end = "SELECT CONNECTION_ID()", "KILL {}"
        alive = "SELECT id FROM information_schema.processlist"
    connections = [await line.engine.connect() for _ in range(3)]
    pooled = {(await connection.execute(text(own))).scalar_one() for connection in connections}
    for connection in connections:
        await connection.close()
    others = create_engine(line.url, isolation_level="AUTOCOMMIT")
    try:
        async with others.connect() as connection, asyncio.timeout(30):
            for id in pooled:
                await connection.execute(text(end.format(id)))
            while True:
                if pooled.isdisjoint((await connection.execute(text(alive))).scalars()):
                    break
                await asyncio.sleep(0.005)
    finally:
        await others.dispose()
    return len(pooled)


CALLS: dict[str, Callable[[SessionService, Session], Awaitable[Any]]] = {
    "get": lambda service, session: service.get_session(
        app_name=session.app_name, user_id="ann", session_id=session.id
    ),
    "list": lambda service, session: service.list_sessions(app_name=session.app_name),
    "user state": lambda service, session: service.get_user_state(
        app_name=session.app_name, user_id="ann"
    ),
    "app state": lambda service, session: service.get_app_state(app_name=session.app_name),
    "append": lambda service, session: service.append_event(session, event("event-1", {"k": 1})),
    "create": lambda service, session: service.create_session(
        app_name=session.app_name, user_id="ann"
    ),
    "delete": lambda service, session: service.delete_session(session.app_name, "ann", session.id),
}


async def test_nobody_notices_that_pooled_connections_have_died(line: Line) -> None:
    session = await line.session()
    for name, call in CALLS.items():
        assert await end_connections(line) == 3
        result = await call(line.service, session)
        if name == "get":
            assert result == session
        elif name == "list":
            assert [one.id for one in result.sessions] == [session.id]
        elif name.endswith("state"):
            assert result == {"k0": "k0"}
        elif name == "append":
            await line.assert_equal(session)
        elif name == "create":
            await line.assert_equal(result)
    assert (
        await line.direct.get_session(app_name=line.app, user_id="ann", session_id=session.id)
        is None
    )


# asyncmy's first words on a connection hold the marker of a commit
@at([where for where in ANYWHERE if where != ("mariadb", "commit")])
async def test_the_first_call_of_a_service_is_repeated_too(
    behind: Callable[..., Awaitable[Line]], place: str
) -> None:
    line = await behind(migrate="off")  # so it has not said a word yet
    session = await line.direct.create_session(app_name=line.app, user_id="ann")
    line.proxy.cut(marker(place, "event-1"), lose="reply")
    await line.service.append_event(session, event("event-1", in_each_scope("k1")))
    assert line.proxy.fired == 1
    await line.assert_equal(session)


# --- errors ------------------------------------------------------------------------------------

SECRET = "hush-hush"


@pytest.fixture
def secret_url(
    backend: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> Iterator[str]:
    """The URL of a new database, with a password."""
    kind = BACKENDS[backend][0]
    url = make_url(fresh_database(kind))
    if kind == "postgresql":  # ours trusts everybody
        with_password = url if url.password else url.set(password=SECRET)
        yield with_password.render_as_string(hide_password=False)
        return
    server: MariaDB = request.getfixturevalue("mariadb")
    user = unique_name()
    server.execute(f"CREATE USER {user} IDENTIFIED BY '{SECRET}'")
    try:
        server.execute(f"GRANT ALL ON {url.database}.* TO {user}")
        yield url.set(username=user, password=SECRET).render_as_string(hide_password=False)
    finally:
        server.execute(f"DROP USER {user}")


def assert_clean(error: BaseException) -> None:
    """The store's own, by itself, without a word of a password or of what was to be stored."""
    assert isinstance(error, SessionStoreError)
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = [str(error), repr(error), repr(error.args), repr(vars(error))]
    assert [text for text in shown if SECRET in text] == []
    assert SECRET not in "".join(traceback.format_exception_only(error))


@both_ways
async def test_without_repetition_a_cut_off_call_is_a_typed_error(
    behind: Callable[..., Awaitable[Line]], backend: str, secret_url: str, lose: Lose
) -> None:
    line = await behind(secret_url, retry_window=0)
    places = [place for name, place in ANYWHERE if name == backend]
    for n, place in enumerate(places):
        session = await line.session()
        delta = dict.fromkeys(in_each_scope("k"), SECRET)
        appended = event("event-1", delta)
        line.proxy.cut(marker(place, "event-1"), lose=lose)
        with pytest.raises(OutcomeUnknownError) as raised:
            await line.service.append_event(session, appended)
        assert_clean(raised.value)
        assert raised.value.retryable
        assert raised.value.code == (2013 if backend == "mariadb" else "08003")
        assert raised.value.driver_error
        assert line.proxy.fired == 3 * n + 1
        happened = lose == "reply" and (backend, place) in STORED
        assert seen(await line.stored(session)).events == ["event-0", "event-1"][: 1 + happened]
        # as the error says: the same again
        await line.service.append_event(session, appended)
        await line.assert_equal(session)

        line.proxy.cut(marker(place, SECRET), lose=lose)
        with pytest.raises(OutcomeUnknownError) as raised:
            await line.service.create_session(app_name=line.app, user_id="ann", state={"k": SECRET})
        assert_clean(raised.value)
        assert raised.value.retryable
        assert line.proxy.fired == 3 * n + 2

        line.proxy.cut(session.id, lose=lose)
        with pytest.raises(DatabaseError) as read:
            await line.service.get_session(app_name=line.app, user_id="ann", session_id=session.id)
        assert not isinstance(read.value, OutcomeUnknownError)
        assert_clean(read.value)
        assert read.value.retryable
        assert read.value.code == (2013 if backend == "mariadb" else "08003")
        assert line.proxy.fired == 3 * n + 3


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name)
        for backend in SERVERS
        for name in (CALLS if SOAK or backend == "postgresql" else ("get", "append", "create"))
    ],
    indirect=["backend"],
)
async def test_without_repetition_a_dead_connection_is_a_typed_error(
    behind: Callable[..., Awaitable[Line]], secret_url: str, name: str
) -> None:
    line = await behind(secret_url, retry_window=0)
    session = await line.session()
    assert await end_connections(line) == 3
    with pytest.raises(DatabaseError) as raised:
        await CALLS[name](line.service, session)
    assert_clean(raised.value)
    assert raised.value.retryable
    assert isinstance(raised.value, OutcomeUnknownError) == (name in ("append", "create", "delete"))


@pytest.mark.parametrize("what", ["append", "create"])
async def test_a_refused_row_is_a_typed_error_that_does_not_quote_it(
    behind: Callable[..., Awaitable[Line]], backend: str, secret_url: str, what: str
) -> None:
    """The server's own message prints the whole row."""
    line = await behind(secret_url)
    session = await line.session()
    delta = dict.fromkeys(in_each_scope("k"), SECRET)
    table = "events" if what == "append" else "sessions"
    async with line.engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} ADD COLUMN hosts_own INT"))
        check = f"ALTER TABLE {table} ADD CONSTRAINT hosts_check CHECK (hosts_own IS NOT NULL)"
        if backend != "mariadb":
            check += " NOT VALID"
        else:
            await connection.execute(text(f"UPDATE {table} SET hosts_own = 1"))
        await connection.execute(text(check))
    call: Awaitable[Any]
    if what == "append":
        call = line.service.append_event(session, event("event-1", delta))
    else:
        call = line.service.create_session(app_name=line.app, user_id="ann", state=delta)
    with pytest.raises(DatabaseError) as raised:
        await call
    assert_clean(raised.value)
    assert not raised.value.retryable
    assert raised.value.code == (4025 if backend == "mariadb" else "23514")
    await line.assert_equal(session)


async def test_a_missing_table_is_a_typed_error(
    behind: Callable[..., Awaitable[Line]], backend: str, secret_url: str
) -> None:
    line = await behind(secret_url)
    session = await line.session()
    async with line.engine.begin() as connection:
        await connection.execute(text("DROP TABLE events"))
    for name, call in CALLS.items():
        if name in ("get", "append", "delete"):
            with pytest.raises(DatabaseError) as raised:
                await call(line.service, session)
            assert_clean(raised.value)
            assert not raised.value.retryable
            assert raised.value.code == (1146 if backend == "mariadb" else "42P01")


# --- cancellation ------------------------------------------------------------------------------


@both_ways
@at(ANYWHERE)
async def test_an_append_cancelled_at_the_worst_moment_is_stored_whole_or_not_at_all(
    line: Line, place: str, lose: Lose, backend: str
) -> None:
    session = await line.session()
    appending: asyncio.Task[Any]

    async def cancel() -> None:
        appending.cancel()

    line.proxy.cut(marker(place, "event-1"), lose=lose, meanwhile=cancel)
    appending = asyncio.create_task(
        line.service.append_event(session, event("event-1", in_each_scope("k1")))
    )
    with pytest.raises(asyncio.CancelledError):
        await appending
    assert line.proxy.fired == 1
    assert line.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    again = await load(line.service, line.app, "ann", session.id)
    happened = seen(again).events == ["event-0", "event-1"]
    assert happened or seen(again).events == ["event-0"]
    assert again.state == in_each_scope("k0") | (in_each_scope("k1") if happened else {})
    await line.assert_equal(session)
    await line.service.append_event(again, event("event-2", in_each_scope(uuid.uuid4().hex)))
    await line.assert_equal(again)
    assert line.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["postgresql", "mariadb"], indirect=True)
async def test_a_cancelled_append_to_a_silent_server_is_given_up(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appends, "_PATIENCE", 0.5)
    session = await line.session()
    before = session.model_dump()
    one = event("event-1", in_each_scope("k1"))
    line.proxy.hang()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await line.service.append_event(session, one)
    assert time.monotonic() - began < 20
    assert line.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert session.model_dump() == before
    line.proxy.resume()
    await line.service.append_event(session, one)  # which finds out
    await line.assert_equal(session)


@both_ways
async def test_a_count_is_not_added_again_for_what_comes_after_its_commit(
    mariadb_url: str, lose: Lose, app_name: str
) -> None:
    target = make_url(mariadb_url)
    assert target.host
    async with Proxy(target.host, target.port or 3306) as proxy:
        behind = target.set(host="127.0.0.1", port=proxy.port)
        engine = create_engine(behind, isolation_level="AUTOCOMMIT")
        try:
            service = SessionService(engine=engine)
            await service.update_state(app_name=app_name, add={"app:n": 1})
            proxy.cut("ROLLBACK", lose=lose)
            result = await service.update_state(app_name=app_name, add={"app:n": 1})
            assert result == {"app:n": 2}
            assert proxy.fired == 1
            assert await service.get_app_state(app_name=app_name) == {"n": 2}
        finally:
            await engine.dispose()
