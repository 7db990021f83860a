"""README's table of troubles: each is brought about, and what it prints is what README says."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import _or_skip
from engines import engine_for
from servers import (
    MariaDB,
    Postgres,
    free_port,
    run_pgbouncer,
    unique_name,
)
from sqlalchemy import make_url, text
from sqlalchemy.dialects import mysql

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    SchemaError,
    SessionService,
    SessionStoreError,
    url,
)
from adk_sessions.chat import ChatPersistence
from adk_sessions.dialects.servers import require_version

README = (Path(__file__).parent.parent / "README.md").read_text()
SECRET = "hush-hush"


def rows() -> dict[str, list[str]]:
    """What README says is printed, by trouble."""
    section = README.partition("\n## Troubleshooting\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    trouble = ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and (printed := re.fullmatch("`(.*)`", cells[1])):
            trouble = cells[0] or trouble
            found.setdefault(trouble, []).append(printed[1])
    return found


ROWS = rows()


# What tells the rows of a trouble from each other.
PARTS = {
    "connection refused": ("ConnectionRefusedError", "2003"),
    "wrong password": ("28P01", "1045", "28000", "08P01"),
    "permission denied": ("42501",),
    "database does not exist": ("3D000", "1049", "14"),
    "tables not found": ("revision", "42P01", "1146", " 1)", "chat tables", "create=False"),
    "data not persisting": ("SQLite", "A database in memory", "no database URL", "relative"),
    "too old a server": ("PostgreSQL 14", "MariaDB 10.2", "MySQL 8.0.17"),
}


def says(printed: str, trouble: str, part: str) -> None:
    """What is printed is the row of the trouble that has ``part`` in it."""
    assert part in PARTS[trouble]
    (row,) = [row for row in ROWS[trouble] if part in row]
    pattern = ".+".join(re.escape(piece) for piece in row.split("…"))
    assert re.fullmatch(pattern, printed, re.DOTALL), f"\n{printed}\nis not\n{row}"
    assert SECRET not in printed


# --- who meets it ------------------------------------------------------------------------------

Front = Callable[..., Awaitable[object]]


async def plain(url: str, **options: Any) -> None:
    async with SessionService(url, **options) as service:
        await service.create_session(app_name="a", user_id="ann")


async def adk(url: str, **options: Any) -> None:
    pytest.importorskip("google.adk")
    from adk_sessions.adk import DatabaseSessionService

    async with DatabaseSessionService(url, **options) as service:
        await service.create_session(app_name="a", user_id="ann")


async def chat(url: str, **_options: Any) -> None:
    async with engine_for(url) as engine:
        await ChatPersistence(engine).list_messages("thread")


async def parlant(url: Any, **options: Any) -> None:
    pytest.importorskip("parlant")
    from adk_sessions.parlant import parlant_stores

    async with parlant_stores(url, **options):
        pass


FRONTS: dict[str, Front] = {"plain": plain, "adk": adk, "chat": chat, "parlant": parlant}


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> Front:
    return FRONTS[request.param]


async def met(call: Awaitable[object], kind: type[SessionStoreError] = DatabaseError) -> str:
    """What a call's error says; it has none of a driver's behind it."""
    with pytest.raises(SessionStoreError) as raised:
        await call
    assert type(raised.value) is kind
    assert raised.value.__cause__ is raised.value.__context__ is None
    return str(raised.value)


# --- no way in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "part"), [("postgresql", "ConnectionRefusedError"), ("mysql", "2003")]
)
async def test_connection_refused(front: Front, scheme: str, part: str) -> None:
    port = free_port()
    url = f"{scheme}://ann:{SECRET}@127.0.0.1:{port}/agents"
    says(await met(front(url)), "connection refused", part)


@pytest.fixture(scope="module")
def role(postgres: Postgres) -> Iterator[str]:
    """A role that has to give a password, and owns a database of its name."""
    if postgres.child is None:
        pytest.skip("this server was not started by the tests: how it lets in is out of reach")
    name = unique_name()
    access = postgres.data / "pg_hba.conf"
    usual = access.read_text()
    postgres.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'right'")
    postgres.create_database(name)
    try:
        asks = f"host all {name} 127.0.0.1/32 scram-sha-256\nhost all stranger 127.0.0.1/32 reject"
        access.write_text(f"{asks}\n{usual}")
        postgres.execute("SELECT pg_reload_conf()", f"ALTER DATABASE {name} OWNER TO {name}")
        yield name
    finally:
        access.write_text(usual)
        postgres.execute("SELECT pg_reload_conf()")
        postgres.drop_database(name)
        postgres.execute(f"DROP ROLE {name}")


def logged_in(url: str, user: str, password: str = SECRET) -> str:
    own = make_url(url).set(username=user, password=password)
    return own.render_as_string(hide_password=False)


async def test_a_wrong_password_on_postgresql(front: Front, postgres: Postgres, role: str) -> None:
    url = postgres.url(role)
    says(await met(front(logged_in(url, role))), "wrong password", "28P01")
    says(await met(front(logged_in(url, unique_name()))), "wrong password", "28000")
    says(await met(front(logged_in(url, "stranger"))), "wrong password", "28000")
    await plain(logged_in(url, role, "right"))


async def test_a_wrong_password_at_a_pooler(postgres: Postgres, role: str) -> None:
    with _or_skip() as stack:
        users = stack.enter_context(file_for_all(f'"{role}" "right"\n'))
        how = {"auth_type": "scram-sha-256", "auth_file": users}
        pooled = stack.enter_context(run_pgbouncer(postgres, **how)).url(role)
        for user, password, database in (
            (role, SECRET, role),
            (unique_name(), "right", role),
            (role, "right", "nowhere"),
        ):
            wrong = make_url(logged_in(pooled, user, password)).set(database=database)
            shown = wrong.render_as_string(hide_password=False)
            printed = await met(plain(f"{shown}?pgbouncer=true"))
            says(printed, "wrong password", "08P01")


@contextmanager
def file_for_all(content: str) -> Iterator[Path]:
    """A file that a server may read, which is another user than the one who runs the tests."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(content)
        file.flush()
        path = Path(file.name)
        path.chmod(0o644)
        yield path


async def test_a_wrong_password_on_mariadb(front: Front, mariadb: MariaDB) -> None:
    name = unique_name()
    url = logged_in(mariadb.create_database(name), name)
    mariadb.execute(f"CREATE USER {name} IDENTIFIED BY 'right'")
    try:
        says(await met(front(url)), "wrong password", "1045")
    finally:
        mariadb.execute(f"DROP USER {name}")
        mariadb.drop_database(name)


async def test_a_role_without_rights(
    postgres: Postgres, migrated_database: Callable[[str], str]
) -> None:
    name = unique_name()
    place = migrated_database("postgresql")
    postgres.execute(f"CREATE ROLE {name} LOGIN")
    try:
        says(await met(plain(logged_in(place, name), migrate="off")), "permission denied", "42501")
    finally:
        postgres.execute(f"DROP ROLE {name}")


# --- nothing there -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "part"), [("postgres", "3D000"), ("mariadb", "1049")])
async def test_a_missing_database(
    front: Front, kind: str, part: str, request: pytest.FixtureRequest
) -> None:
    server: Postgres | MariaDB = request.getfixturevalue(kind)
    says(await met(front(server.url(unique_name()))), "database does not exist", part)


# not of a chat: the thread of an engine's connection that cannot be opened outlives the test
@pytest.mark.parametrize("front", [plain, adk, parlant])
@pytest.mark.parametrize("rest", ["", "/none.db?mode=rw&uri=true"])
async def test_a_missing_file(front: Front, rest: str, tmp_path: Path) -> None:
    url = f"sqlite:///{'file:' if rest else ''}{tmp_path}{rest}"
    says(await met(front(url)), "database does not exist", "14")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("front", [plain, adk])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_no_tables(front: Front, kind: str, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database(kind)
    part = {"sqlite": " 1)", "postgresql": "42P01", "mariadb": "1146"}[kind]
    says(await met(front(url, migrate="check"), SchemaError), "tables not found", "revision")
    says(await met(front(url, migrate="off")), "tables not found", part)
    await front(url)
    await front(url, migrate="check")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_no_tables_of_a_chat(kind: str, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database(kind)
    says(await met(chat(url), SchemaError), "tables not found", "chat tables")
    async with engine_for(url) as engine:
        printed = await met(ChatPersistence(engine).validate_schema(), SchemaError)
    says(printed, "tables not found", "chat tables")
    assert "chat_messages" in printed
    assert "chat_sessions" in printed


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_no_tables_of_parlants(kind: str, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database(kind)
    printed = await met(parlant(url, create=False), SchemaError)
    says(printed, "tables not found", "create=False")
    await parlant(url)
    await parlant(url, create=False)


# --- gone --------------------------------------------------------------------------------------


def log_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == url.__name__]


@pytest.mark.parametrize("front", [plain, adk])
@pytest.mark.parametrize("memory", ["sqlite://", "sqlite:///", "sqlite+aiosqlite:///:memory:"])
async def test_what_is_kept_in_memory_is_told_once(
    front: Front, memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    url._tell_of_memory.cache_clear()
    with caplog.at_level(logging.WARNING, "adk_sessions"):
        await front(memory)
        await front(memory)
    (printed,) = log_of(caplog)
    says(printed, "data not persisting", "SQLite")
    ids = {"app_name": "a", "user_id": "ann", "session_id": "1"}
    async with SessionService(memory) as service:
        await service.create_session(**ids)
        assert await service.get_session(**ids) is not None
        await service.close()
        assert await service.get_session(**ids) is None


async def test_parlants_stores_want_to_stay() -> None:
    for place, part in (
        ("sqlite://", "A database in memory"),
        ("sqlite:///:memory:", "A database in memory"),
        ("", "no database URL"),
        (None, "no database URL"),
    ):
        says(await met(parlant(place), ConfigurationError), "data not persisting", part)


async def test_a_relative_path_is_another_file_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"app_name": "a", "user_id": "ann", "session_id": "1"}
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        caplog.clear()
        with caplog.at_level(logging.INFO, "adk_sessions"):
            service = SessionService("sqlite:///chats.db")
        says(log_of(caplog)[0], "data not persisting", "relative")
        assert log_of(caplog)[0].endswith(f" {folder}/chats.db")
        async with service:
            found.append(await service.get_session(**ids))
            if folder.name == "one":
                await service.create_session(**ids)
    assert found == [None, None]
    caplog.clear()
    async with SessionService(f"sqlite:///{tmp_path}/one/chats.db") as service:
        assert await service.get_session(**ids) is not None
    assert log_of(caplog) == []


# --- too old -----------------------------------------------------------------------------------


class Disguised:
    """A client's socket to which a server's answers go as those of an older one.

    Whatever is replaced keeps its length, so messages stay whole.
    """

    def __init__(self, client: Any, disguise: Callable[[bytes], bytes]) -> None:
        self._client = client
        self._disguise = disguise

    def sendall(self, data: bytes) -> None:
        self._client.sendall(self._disguise(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def older_postgresql(data: bytes) -> bytes:
    data = re.sub(rb"(server_version\0)\d\d", rb"\g<1>13", data)
    return re.sub(rb"(PostgreSQL )\d\d", rb"\g<1>13", data)


def older_mariadb(data: bytes) -> bytes:
    return re.sub(rb"\d+\.\d+\.\d+(?=-MariaDB)", lambda m: b"10.1.".ljust(len(m[0]), b"9"), data)


def older_mysql(data: bytes) -> bytes:
    def version(found: re.Match[bytes]) -> bytes:
        return b"5.6.".ljust(len(found[0]) - len("-MariaDB"), b"4") + b"-MySQLDB"

    return re.sub(rb"(?:5\.5\.5-)?\d+\.\d+\.\d+-MariaDB", version, data)


@contextmanager
def aged(url: str, disguise: Callable[[bytes], bytes]) -> Iterator[tuple[str, wire.Line]]:
    """The URL of a database by way of a proxy to its server, and that proxy."""
    address = make_url(url)
    assert address.host
    assert address.port
    with wire.proxy(address.host, address.port) as line:
        carry = line.carry
        line.carry = lambda client: carry(Disguised(client, disguise))  # type: ignore
        yield line.url(url), line


@pytest.mark.parametrize(
    ("kind", "disguise", "name"),
    [
        ("postgresql", older_postgresql, "PostgreSQL 14"),
        ("mariadb", older_mariadb, "MariaDB 10.2"),
        ("mariadb", older_mysql, "MySQL 8.0.17"),
    ],
    ids=["PostgreSQL", "MariaDB", "MySQL"],
)
async def test_a_server_that_is_too_old(
    front: Front,
    kind: str,
    disguise: Callable[[bytes], bytes],
    name: str,
    fresh_database: Callable[[str], str],
) -> None:
    with aged(fresh_database(kind), disguise) as (place, _):
        says(await met(front(place)), "too old a server", name)


async def test_what_only_speaks_the_language_may_say_any_version(
    fresh_database: Callable[[str], str],
) -> None:
    with aged(fresh_database("postgresql"), older_postgresql) as (place, _):
        async with SessionService(place, backend="generic") as service:
            await service.create_session(app_name="a", user_id="ann", session_id="1")
            assert await service.get_session(app_name="a", user_id="ann", session_id="1")


@pytest.mark.parametrize(
    ("version", "too_old"),
    [
        *(("5.5.5-10.11.6-MariaDB-1:10.11.6+maria~deb12", False), ("12.0.2-MariaDB", False)),
        # Enterprise, of whose versions SQLAlchemy takes the last three numbers
        *(("10.5.9-6-MariaDB-enterprise", False), ("5.5.5-10.6.7-3-MariaDB-enterprise", False)),
        *(("5.5.68-MariaDB", True), ("5.5.5-10.1.48-MariaDB", True), ("10.0.38-MariaDB", True)),
        *(("8.0.17", False), ("8.0.36-28.1", False), ("9.1.0-commercial", False)),
        *(("8.0.16", True), ("5.7.44-log", True)),
    ],
)
def test_a_version_of_mariadb_or_mysql_is_read_as_it_is_meant(version: str, too_old: bool) -> None:
    dialect: Any = mysql.dialect()
    dialect._parse_server_version(version)
    with pytest.raises(DatabaseError) if too_old else nullcontext():
        require_version(dialect)


async def test_the_age_of_a_server_is_no_question_of_its_own(
    fresh_database: Callable[[str], str],
) -> None:
    url = fresh_database("postgresql")
    with aged(url, older_postgresql) as (place, line):
        async with SessionService(place) as service:
            await met(service.ping())
            line.reset()
            await met(service.ping())
            await met(service.create_session(app_name="a", user_id="ann"))
            await line.settled()
            assert (line.trips, line.connections) == (0, 0)
    with aged(url, lambda data: data) as (place, line):
        async with SessionService(place) as service, engine_for(place) as engine:
            await service.ping()
            await line.settled()
            ours = line.trips
            line.reset()
            async with engine.connect() as conn:
                await conn.execute(text("SELECT 1"))
            await line.settled()
            assert ours <= line.trips
            line.reset()
            await service.ping()
            await line.settled()
            assert line.trips == 1


async def test_an_engine_of_the_applications_is_looked_at_too(
    fresh_database: Callable[[str], str],
) -> None:
    with aged(fresh_database("postgresql"), older_postgresql) as (place, _):
        async with engine_for(place) as engine, SessionService(engine=engine) as service:
            says(await met(service.ping()), "too old a server", "PostgreSQL 14")


def test_every_row_is_brought_about() -> None:
    """By its part that tells it from the others; a test that asks for another one fails."""
    source = Path(__file__).read_text()
    for trouble, printed in ROWS.items():
        for row in printed:
            (part,) = [part for part in PARTS[trouble] if part in row]
            assert source.count(f'"{part}"') > 1, f"{trouble}: no test asks for {part}"
    assert {trouble: len(parts) for trouble, parts in PARTS.items()} == {
        trouble: len(printed) for trouble, printed in ROWS.items()
    }
