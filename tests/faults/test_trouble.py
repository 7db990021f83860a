"""A database in trouble: a typed error, soon; nothing half-written; and when it is over, all works.

Each test has its trouble, sees what a caller is told, and ends the trouble. What a whole class of
errors becomes is in test_errors.py, what SQLite alone can have in test_sqlite.py.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import test_faults
from conftest import _or_skip
from servers import MariaDB, Postgres, run_mariadb, run_postgres, unique_name
from sqlalchemy import make_url, text
from test_faults import SECRET, Line, assert_clean
from workers import errors_of, event, in_each_scope, seen

from adk_sessions import DatabaseError, OutcomeUnknownError, Session, SessionService
from adk_sessions.url import create_engine

backend, behind, line = test_faults.backend, test_faults.behind, test_faults.line

T = TypeVar("T")

SOON = 20.0  # seconds: far more than any of these needs, far less than for ever
LARGE = 400_000  # characters that cannot be compressed, for an event that needs new pages

on_servers = pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
one_of_each = pytest.mark.parametrize("backend", ["postgresql", "mariadb"], indirect=True)


async def refused(
    call: Awaitable[Any], code: str | int | None, hint: str, *, retryable: bool = False
) -> None:
    """It fails soon, with an error that says why and quotes nothing."""
    began = time.monotonic()
    with pytest.raises(DatabaseError, match=hint) as raised:
        await call
    assert time.monotonic() - began < SOON
    assert type(raised.value) is DatabaseError  # the outcome is known
    assert (raised.value.code, raised.value.retryable) == (code, retryable)
    assert raised.value.driver_error
    assert_clean(raised.value)


async def stores_nothing(
    service: SessionService, session: Session, code: str | int, hint: str, **how: Any
) -> None:
    """A large append is refused, and neither storage nor the caller's session has any of it."""
    before = session.model_copy(deep=True)
    await refused(service.append_event(session, large("lost")), code, hint, **how)
    assert session == before
    assert await stored(service, session) == before


async def stored(service: SessionService, session: Session) -> Session | None:
    return await service.get_session(
        app_name=session.app_name, user_id=session.user_id, session_id=session.id
    )


async def works(service: SessionService, session: Session) -> None:
    """The same append as `stores_nothing` is done, and the session goes on."""
    await service.append_event(session, large("lost"))
    await service.append_event(session, event("next", in_each_scope("next")))
    assert seen(session).events[-2:] == ["lost", "next"]
    assert await stored(service, session) == session


def large(id: str) -> Any:
    one = event(id, in_each_scope(id))
    one.content = SECRET + secrets.token_hex(LARGE // 2)
    return one


# --- no room -----------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A file system of so many megabytes; the name of a file that can take all of the rest."""
    path.mkdir()
    owner = path.parent.stat()
    options = f"size={megabytes}m,mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: that takes root")
    try:
        yield path / "ballast"
    finally:
        (path / "ballast").unlink(missing_ok=True)
        if subprocess.run(["umount", str(path)], capture_output=True).returncode:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        path.rmdir()


def fill(ballast: Path) -> None:
    """Take all of the room that is left."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(ballast.parent).f_bavail == 0


@pytest.fixture
def on_small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a database with little room, and the file to fill the rest with."""
    if request.param == "sqlite":
        with small_disk(tmp_path / "small", 4) as ballast:
            yield f"sqlite:///{ballast.parent / 'chats.db'}", ballast
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    if postgres.child is None:
        pytest.skip("this server was not started by the tests: its files are out of reach")
    name = unique_name()
    with small_disk(postgres.child.directory / name, 24) as ballast:
        postgres.execute(f"CREATE TABLESPACE {name} LOCATION '{ballast.parent}'")
        try:
            postgres.execute(f"CREATE DATABASE {name} TEMPLATE template0 TABLESPACE {name}")
            yield postgres.url(name), ballast
        finally:
            ballast.unlink(missing_ok=True)
            postgres.drop_database(name)
            postgres.execute(f"DROP TABLESPACE {name}")


@pytest.mark.parametrize(
    ("on_small_disk", "code"),
    [("sqlite", sqlite3.SQLITE_FULL), ("postgresql", "53100")],
    indirect=["on_small_disk"],
)
async def test_a_full_disk(on_small_disk: tuple[str, Path], code: str | int, app_name: str) -> None:
    url, ballast = on_small_disk
    async with SessionService(url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        await service.append_event(session, event("first", in_each_scope("k")))
        fill(ballast)
        await stores_nothing(service, session, code, "disk is full")
        batch = [large(f"lost-{n}") for n in range(3)]
        await refused(service.append_events(session, batch), code, "disk is full")
        state = {**in_each_scope("never"), "large": secrets.token_hex(LARGE)}
        created = service.create_session(app_name=app_name, user_id="bob", state=state)
        await refused(created, code, "disk is full")
        assert await service.get_app_state(app_name=app_name) == {"k": "k"}
        listed = await service.list_sessions(app_name=app_name)
        assert [one.id for one in listed.sessions] == [session.id]
        ballast.unlink()
        await works(service, session)


# --- it may only be read -----------------------------------------------------------------------

Switch = Callable[[bool], None]


@pytest.fixture
def read_only(kind: str, request: pytest.FixtureRequest) -> Iterator[tuple[str, Switch]]:
    """The URL of a database, and what makes it read-only or not."""
    if kind == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = request.getfixturevalue("fresh_database")(kind)
        name = make_url(url).database
        end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"

        def switch(on: bool) -> None:
            change = "SET default_transaction_read_only = on" if on else "RESET ALL"
            postgres.execute(f'ALTER DATABASE "{name}" {change}', end if on else "SELECT 1")

        yield url, switch
        return
    with _or_skip() as stack:
        mariadb = stack.enter_context(run_mariadb(own=True))
        mariadb.execute(f"CREATE USER ann IDENTIFIED BY '{SECRET}'")
        mariadb.execute("GRANT ALL ON one.* TO ann")  # root may write all the same
        url = mariadb.create_database("one").replace("root@", f"ann:{SECRET}@")
        yield url, lambda on: mariadb.execute(f"SET GLOBAL read_only = {on:d}")


@on_servers
async def test_a_database_that_may_only_be_read(
    kind: str, read_only: tuple[str, Switch], app_name: str
) -> None:
    url, switch = read_only
    code, hint = {"postgresql": "25006", "mariadb": 1290}[kind], "read-only"
    async with SessionService(url, retry_window=1) as service, SessionService(url) as patient:
        session = await service.create_session(app_name=app_name, user_id="ann")
        await service.append_event(session, event("first", in_each_scope("k")))
        assert await stored(patient, session) == session
        switch(True)
        assert await stored(service, session) == session  # on a new connection, if need be
        await stores_nothing(service, session, code, hint, retryable=True)
        async with SessionService(url) as new:
            assert await stored(new, session) == session
        met = errors_of(patient)
        waits = asyncio.create_task(patient.create_session(app_name=app_name, user_id="bob"))
        async with asyncio.timeout(30):
            while not met:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not waits.done()
        switch(False)
        assert (await waits).user_id == "bob"
        await works(service, session)


# --- nobody may come in ------------------------------------------------------------------------

RIGHT = "another-hush-hush"


@dataclass
class Account:
    """A user of a server that asks for passwords.

    Attributes:
        url: of a database of its own, with the password SECRET.
        change: gives the user another password.
        end: ends its connections.
    """

    url: str
    change: Callable[[str], None]
    end: Callable[[], None]


@pytest.fixture
def account(kind: str, request: pytest.FixtureRequest) -> Iterator[Account]:
    name = unique_name()
    if kind == "postgresql":
        yield from _account_on_postgres(request.getfixturevalue("postgres"), name)
    else:
        yield from _account_on_mariadb(request.getfixturevalue("mariadb"), name)


def _with(url: str, name: str) -> str:
    own = make_url(url).set(username=name, password=SECRET)
    return own.render_as_string(hide_password=False)


def _account_on_postgres(postgres: Postgres, name: str) -> Iterator[Account]:
    if postgres.child is None:
        pytest.skip("this server was not started by the tests: how it lets in is out of reach")
    access = postgres.data / "pg_hba.conf"
    usual = access.read_text()
    postgres.execute(f"CREATE ROLE {name} LOGIN")
    url = postgres.create_database(name)
    try:
        # of the others it goes on to ask nothing
        access.write_text(f"host all {name} 127.0.0.1/32 scram-sha-256\n{usual}")
        postgres.execute(f"ALTER DATABASE {name} OWNER TO {name}", "SELECT pg_reload_conf()")
        yield Account(
            _with(url, name),
            lambda password: postgres.execute(f"ALTER ROLE {name} PASSWORD '{password}'"),
            lambda: postgres.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                f" WHERE usename = '{name}'"
            ),
        )
    finally:
        access.write_text(usual)
        postgres.execute("SELECT pg_reload_conf()")
        postgres.drop_database(name)
        postgres.execute(f"DROP ROLE {name}")


def _account_on_mariadb(mariadb: MariaDB, name: str) -> Iterator[Account]:
    mariadb.execute(f"CREATE USER {name}")
    url = mariadb.create_database(name)

    def end() -> None:
        mariadb.execute(f"KILL USER {name}")

    try:
        mariadb.execute(f"GRANT ALL ON {name}.* TO {name}")
        yield Account(
            _with(url, name),
            lambda password: mariadb.execute(f"ALTER USER {name} IDENTIFIED BY '{password}'"),
            end,
        )
    finally:
        mariadb.drop_database(name)
        mariadb.execute(f"DROP USER {name}")


WRONG_PASSWORD: dict[str, tuple[str | int, str]] = {
    "postgresql": ("28P01", "the password is wrong"),
    "mariadb": (1045, "the user or the password is wrong"),
}


@on_servers
async def test_a_wrong_password(kind: str, account: Account, app_name: str) -> None:
    code, hint = WRONG_PASSWORD[kind]
    account.change(RIGHT)
    async with SessionService(account.url) as service:
        for _ in range(2):
            call = service.create_session(app_name=app_name, user_id="ann")
            await refused(call, code, hint)
        account.change(SECRET)
        session = await service.create_session(app_name=app_name, user_id="ann")
        await works(service, session)


@on_servers
async def test_a_password_that_is_changed_under_a_service(
    kind: str, account: Account, app_name: str
) -> None:
    """Who is connected stays so; who comes again is refused, and not after the whole window."""
    code, hint = WRONG_PASSWORD[kind]
    account.change(SECRET)
    async with SessionService(account.url) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        account.change(RIGHT)
        await service.append_event(session, event("first", {}))
        account.end()
        await refused(stored(service, session), code, hint)
        account.change(SECRET)
        await works(service, session)


@on_servers
async def test_a_missing_database(kind: str, request: pytest.FixtureRequest, app_name: str) -> None:
    code: str | int = {"postgresql": "3D000", "mariadb": 1049}[kind]
    hint = "the database does not exist: create it first"
    server: Postgres | MariaDB = request.getfixturevalue(
        {"postgresql": "postgres", "mariadb": "mariadb"}[kind]
    )
    name = unique_name()
    async with SessionService(server.url(name)) as service:
        await refused(service.create_session(app_name=app_name, user_id="ann"), code, hint)
        await refused(service.list_sessions(app_name=app_name), code, hint)
        server.create_database(name)
        try:
            session = await service.create_session(app_name=app_name, user_id="ann")
            await works(service, session)
        finally:
            await service.close()
            server.drop_database(name)


# --- no way there ------------------------------------------------------------------------------

NOWHERE = """
import asyncio, sys, time
from adk_sessions import DatabaseError, SessionService

async def main(urls):
    for url in urls:
        async with SessionService(url) as service:
            began = time.monotonic()
            try:
                await service.create_session(app_name="a", user_id="ann")
            except DatabaseError as error:
                assert error.__cause__ is error.__context__ is None
                assert error.retryable
                assert time.monotonic() - began < 20
                print(type(error).__name__, error)

asyncio.run(main(sys.argv[1:]))
"""

NO_ROUTE = {
    f"postgresql://ann:{SECRET}@203.0.113.1/x": "there is no way to the server",
    f"mysql://ann:{SECRET}@203.0.113.1/x": "2003",
    f"postgresql://ann:{SECRET}@db.invalid/x": "the host's name has no address",
    f"mysql://ann:{SECRET}@db.invalid/x": "2003",
}


def test_no_route() -> None:
    """In a network of its own, which leads nowhere."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("no network of one's own can be made here")
    command = [*alone, sys.executable, "-W", "error", "-c", NOWHERE, *NO_ROUTE]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert SECRET not in printed.stdout
    lines = printed.stdout.splitlines()
    for line, hint in zip(lines, NO_ROUTE.values(), strict=True):
        assert line.startswith("DatabaseError The connection to the database failed (")
        assert hint in line
        assert "check" in line


# --- a server that is silent or slow -----------------------------------------------------------

LIMIT = 0.5  # seconds
LIMITS = {"connect_timeout": LIMIT, "statement_timeout": LIMIT, "retry_window": LIMIT}


async def eventually(call: Callable[[], Awaitable[T]]) -> T:
    """What a caller would do with `retryable`: on a slow machine the limits are short."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except DatabaseError as error:
                if not error.retryable:
                    raise
            await asyncio.sleep(0.05)


@one_of_each
async def test_a_server_that_lets_in_and_says_nothing(line: Line, app_name: str) -> None:
    url = make_url(line.url).set(host="127.0.0.1", port=line.proxy.port)
    async with SessionService(url, connect_timeout=LIMIT) as service:

        def create() -> Awaitable[Session]:
            return service.create_session(app_name=app_name, user_id="ann")

        line.proxy.hang()
        await refused(create(), None, "no answer in time", retryable=True)
        line.proxy.resume()
        await works(service, await eventually(create))


@one_of_each
async def test_a_server_that_falls_silent(line: Line) -> None:
    """It may have done what it was asked: the outcome is unknown, and looked up afterwards."""
    session = await line.session()
    url = make_url(line.url).set(host="127.0.0.1", port=line.proxy.port)
    async with SessionService(url, **LIMITS) as service:
        assert await eventually(lambda: stored(service, session)) == session
        before = session.model_copy(deep=True)
        one = event("lost", in_each_scope("k"))
        line.proxy.hang()
        began = time.monotonic()
        with pytest.raises(OutcomeUnknownError, match="may or may not be stored") as raised:
            await service.append_event(session, one)
        with pytest.raises(DatabaseError, match="no answer in time") as read:
            await stored(service, session)
        assert time.monotonic() - began < 2 * SOON
        assert raised.value.retryable
        assert read.value.retryable
        assert_clean(raised.value)
        assert_clean(read.value)
        assert session == before
        line.proxy.resume()
        await eventually(lambda: service.append_event(session, one))
        assert seen(session).events == ["event-0", "lost"]
        await line.assert_equal(session)


@asynccontextmanager
async def held(line: Line) -> AsyncIterator[None]:
    """Somebody holds the rows of sessions."""
    engine = create_engine(line.url)
    try:
        async with engine.begin() as holder:
            lock = text("SELECT 1 FROM sessions WHERE app_name = :app FOR UPDATE")
            await holder.execute(lock, {"app": line.app})
            yield
    finally:
        await engine.dispose()


@one_of_each
async def test_a_server_that_is_too_slow(line: Line) -> None:
    """It may do later what nobody waits for any more, but not twice and not by halves."""
    session = await line.session()
    before = session.model_copy(deep=True)
    one = event("slow", in_each_scope("k"))
    async with SessionService(line.url, **LIMITS) as service:
        assert await eventually(lambda: stored(service, session)) == session
        async with held(line):
            began = time.monotonic()
            with pytest.raises(OutcomeUnknownError) as raised:
                await service.append_event(session, one)
            assert time.monotonic() - began < SOON
            assert_clean(raised.value)
            assert session == before
            assert await stored(line.direct, session) == before
        await eventually(lambda: service.append_event(session, one))
        await eventually(lambda: service.append_event(session, event("next", {})))
        assert seen(session).events == ["event-0", "slow", "next"]
        assert session.state == in_each_scope("k0") | in_each_scope("k")
        await line.assert_equal(session)


@one_of_each
async def test_a_server_that_is_slow_for_a_while(line: Line) -> None:
    """Nobody notices, if it is over within the window."""
    session = await line.session()
    async with SessionService(line.url, statement_timeout=LIMIT / 2) as service:
        assert await stored(service, session) == session
        met = errors_of(service)
        async with held(line):
            append = asyncio.create_task(
                service.append_event(session, event("slow", in_each_scope("k")))
            )
            async with asyncio.timeout(30):
                while not met:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert not append.done()
        await append
        assert seen(session).events == ["event-0", "slow"]
        await line.assert_equal(session)


async def test_a_socket_that_is_gone_while_the_server_restarts(app_name: str) -> None:
    with _or_skip() as stack:
        server = stack.enter_context(run_postgres())
        assert server.child is not None
        place = f"host={server.child.directory}&port={server.port}"
        async with SessionService(f"postgresql://postgres@/postgres?{place}") as service:
            session = await service.create_session(app_name=app_name, user_id="ann")
            met = errors_of(service)
            server.stop()
            append = asyncio.create_task(service.append_event(session, event("e", {})))
            async with asyncio.timeout(30):
                while "FileNotFoundError" not in met:
                    assert not append.done()
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(server.start)
            await append
            assert await stored(service, session) == session
