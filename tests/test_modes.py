"""What a service does about the schema: auto, check, off; and with how few rights."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import forked
import pytest
from engines import engine_for
from everywhere import NO_TABLES, PART
from servers import MariaDB, Pgbouncer, Postgres, run_pgbouncer, run_sync, unique_name
from sqlalchemy import event, inspect, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    Event,
    SchemaError,
    SessionService,
    migrate,
)
from adk_sessions.models import TABLES, VERSION_TABLE
from adk_sessions.testing import SessionServiceContract

NewDatabase = Callable[[str], str]

KINDS = ["sqlite", "postgresql", "mariadb"]
every_kind = pytest.mark.parametrize("kind", KINDS)

README = (Path(__file__).parent.parent / "README.md").read_text()
(POSTGRESQL_GRANTS,) = re.findall(r"```sql\n(GRANT USAGE.*?)```", README, re.DOTALL)
(MARIADB_GRANT,) = re.findall(r"`(GRANT [^`]*) ON agents\.\* TO app`", README)


async def execute(url: str, *statements: str) -> None:
    async with engine_for(url) as engine, engine.begin() as conn:
        for statement in statements:
            await conn.execute(text(statement))


async def tables_of(url: str) -> set[str]:
    async with engine_for(url) as engine, engine.connect() as conn:
        return set(await conn.run_sync(lambda conn: inspect(conn).get_table_names()))


async def use(service: SessionService) -> None:
    session = await service.create_session(app_name="a", user_id="u", state={"app:a": 1})
    await service.append_event(session, Event(content="x"))
    again = await service.get_session(app_name="a", user_id="u", session_id=session.id)
    assert again == session


def statements_of(engine: AsyncEngine) -> list[str]:
    """What is sent from now on, transactions aside."""
    seen: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.split()[0] not in ("BEGIN", "COMMIT", "ROLLBACK", "START"):
            seen.append(statement)

    return seen


# check


@every_kind
async def test_check_changes_nothing_and_says_what_to_run(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    async with SessionService(url, migrate="check") as service:
        for _ in range(2):
            with pytest.raises(SchemaError, match="Run: adk-sessions upgrade --url"):
                await service.create_session(app_name="a", user_id="u")
        assert await tables_of(url) == set()
        await migrate.upgrade(url)
        await use(service)  # it looks again until it has found what it needs


@every_kind
async def test_check_refuses_an_older_revision(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await migrate.upgrade(url)
    await execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '0002'")
    async with SessionService(url, migrate="check") as service:
        with pytest.raises(SchemaError) as caught:
            await service.prepare_tables()
    assert "at revision 0002" in str(caught.value)
    assert f"needs revision {migrate.HEAD}" in str(caught.value)
    assert "adk-sessions upgrade" in str(caught.value)


@every_kind
async def test_check_says_that_the_library_is_too_old(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    await migrate.upgrade(url)
    await execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    async with SessionService(url, migrate="check") as service:
        with pytest.raises(SchemaError, match="the library is older than the database"):
            await service.prepare_tables()
    async with SessionService(url, migrate="off") as service:
        await use(service)
    async with SessionService(url) as service:  # a rolling deploy: the old ones go on
        await use(service)


@every_kind
async def test_check_costs_one_query(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await migrate.upgrade(url)
    async with engine_for(url) as engine:
        async with engine.connect() as conn:
            await conn.execute(text("SELECT 1"))
        seen = statements_of(engine)
        await SessionService(engine=engine, migrate="check").prepare_tables()
        assert len(seen) == 1
        assert VERSION_TABLE in seen[0]


async def test_check_does_not_import_alembic(fresh_database: NewDatabase) -> None:
    code = """
import asyncio, sys
from adk_sessions import SessionService

async def main():
    async with SessionService(sys.argv[1], migrate="check") as service:
        await service.create_session(app_name="a", user_id="u")
        await service.validate_schema()

asyncio.run(main())
assert "alembic" not in sys.modules
"""
    url = fresh_database("sqlite")
    await migrate.upgrade(url)
    command = [sys.executable, "-W", "error", "-c", code, url]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr


async def test_who_asks_makes_no_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/folder/chats.db"
    assert await migrate.current(url) is None
    assert await migrate.preview(url) is None
    with pytest.raises(SchemaError):
        await migrate.check(url)
    async with SessionService(url, migrate="check") as service:
        with pytest.raises(SchemaError):
            await service.create_session(app_name="a", user_id="u")
    assert list(tmp_path.iterdir()) == []


async def test_who_asks_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE products (id INTEGER)")
    before = path.read_bytes()
    url = f"sqlite:///{path}"
    assert await migrate.current(url) is None
    assert await migrate.preview(url) is None
    with pytest.raises(SchemaError):
        await migrate.check(url)
    async with SessionService(url, migrate="check") as service:
        with pytest.raises(SchemaError):
            await service.prepare_tables()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# off


@every_kind
async def test_off_asks_nothing(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await migrate.upgrade(url)
    async with engine_for(url) as engine:
        seen = statements_of(engine)
        service = SessionService(engine=engine, migrate="off")
        await service.prepare_tables()
        assert seen == []
        await use(service)
        assert not any(VERSION_TABLE in statement for statement in seen)


@every_kind
async def test_off_on_an_empty_database_makes_no_tables(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    async with SessionService(url, migrate="off") as service:
        with pytest.raises(DatabaseError):
            await use(service)
    assert await tables_of(url) == set()


# A role that may not alter tables


@contextmanager
def limited(postgres: Postgres | None, mariadb: MariaDB | None, kind: str) -> Iterator[str]:
    """A database at head, and the URL of a role that may only read and write rows."""
    role = unique_name()
    server: Any = postgres if kind == "postgresql" else mariadb
    with server.scratch_database() as url:
        run_sync(migrate.upgrade(url))
        address = make_url(url)
        if kind == "postgresql":
            run_sync(execute(url, f"CREATE ROLE {role} LOGIN PASSWORD 'p'"))
            grants = POSTGRESQL_GRANTS.replace("TO app;", f"TO {role};").splitlines()
            run_sync(execute(url, *grants))
            yield address.set(username=role, password="p").render_as_string(False)
            run_sync(execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}"))
        else:
            account = f"'{role}'@'%'"
            run_sync(execute(url, f"CREATE USER {account} IDENTIFIED BY 'p'"))
            run_sync(execute(url, f"{MARIADB_GRANT} ON {address.database}.* TO {account}"))
            yield address.set(username=role, password="p").render_as_string(False)
            run_sync(execute(url, f"DROP USER {account}"))


@pytest.fixture(scope="module")
def postgresql_role(postgres: Postgres) -> Iterator[str]:
    with limited(postgres, None, "postgresql") as url:
        yield url


@pytest.fixture(scope="module")
def mariadb_role(mariadb: MariaDB) -> Iterator[str]:
    with limited(None, mariadb, "mariadb") as url:
        yield url


@pytest.fixture(params=["postgresql", "mariadb"])
def role_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_role"))


async def test_the_role_may_not_alter_tables(role_url: str) -> None:
    for statement in ("CREATE TABLE mine (i INTEGER)", "ALTER TABLE events ADD more INTEGER"):
        with pytest.raises(Exception, match=r"denied|must be owner"):
            await execute(role_url, statement)


@pytest.mark.parametrize("mode", ["auto", "check"])
async def test_a_limited_role_needs_nothing_else_for_modes(role_url: str, mode: Any) -> None:
    # at head, auto has nothing to alter either
    async with SessionService(role_url, migrate=mode) as service:
        await use(service)
        await service.validate_schema()


class ForALimitedRole(SessionServiceContract):
    """The contract with SELECT, INSERT, UPDATE and DELETE alone."""

    @pytest.fixture
    async def service(self, new_service: Callable[[], Any]) -> AsyncIterator[Any]:
        async with new_service() as service:
            yield service

    @pytest.fixture
    async def other_service(self, new_service: Callable[[], Any]) -> AsyncIterator[Any]:
        async with new_service() as service:
            yield service


class TestTheKitForALimitedRole(ForALimitedRole):
    """All but the tables of values: no right depends on those."""

    locals().update(NO_TABLES)

    @pytest.fixture
    def new_service(self, postgresql_role: str) -> Callable[[], Any]:
        return lambda: SessionService(postgresql_role, migrate="check")


class TestTheKitForALimitedRoleOnMariaDB(ForALimitedRole):
    """A part; ADK_SESSIONS_SOAK=1 runs all of it."""

    locals().update(PART)

    @pytest.fixture
    def new_service(self, mariadb_role: str) -> Callable[[], Any]:
        return lambda: SessionService(mariadb_role, migrate="off")


# Behind a pooler


@pytest.fixture(scope="module")
def pooler(postgres: Postgres) -> Iterator[Pgbouncer]:
    from conftest import _or_skip

    with _or_skip() as stack:
        yield stack.enter_context(run_pgbouncer(postgres))


async def test_behind_a_pooler_the_default_is_check(
    pooler: Pgbouncer, fresh_database: NewDatabase
) -> None:
    direct = fresh_database("postgresql")
    url = pooler.url(direct.rpartition("/")[2]) + "?pgbouncer=true"
    async with SessionService(url) as service:
        with pytest.raises(SchemaError, match="Run: adk-sessions upgrade"):
            await service.prepare_tables()
        await migrate.upgrade(direct)
        await use(service)


@pytest.mark.parametrize("flag", ["?pgbouncer=true", "?statement_cache_size=0"])
async def test_a_migration_through_a_pooler_is_refused(
    pooler: Pgbouncer, fresh_database: NewDatabase, flag: str
) -> None:
    direct = fresh_database("postgresql")
    url = pooler.url(direct.rpartition("/")[2]) + flag
    with pytest.raises(SchemaError, match="pooler stands between"):
        await migrate.upgrade(url)
    async with SessionService(url, migrate="auto") as service:
        with pytest.raises(SchemaError, match="pooler stands between"):
            await service.prepare_tables()
        assert await tables_of(direct) == set()
        await migrate.upgrade(direct)
        await use(service)
    async with engine_for(direct) as engine, engine.connect() as conn:
        locks = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        assert (await conn.execute(locks)).scalar_one() == 0


# From code


@every_kind
async def test_an_engine_can_be_upgraded(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    async with engine_for(url) as engine:
        assert await migrate.current(engine) is None
        await migrate.upgrade(engine)
        assert await migrate.current(engine) == migrate.HEAD
        await migrate.check(engine)
        await migrate.upgrade(engine)
        async with engine.connect() as conn:  # it is still open
            assert (await conn.execute(text("SELECT count(*) FROM sessions"))).scalar() == 0
        await use(SessionService(engine=engine, migrate="check"))
    assert await tables_of(url) == {*TABLES, VERSION_TABLE}


async def test_a_lock_timeout_of_the_application_stays(fresh_database: NewDatabase) -> None:
    url = fresh_database("postgresql")
    async with engine_for(url, pool_size=1, max_overflow=0) as engine:
        async with engine.connect() as conn:
            await conn.execute(text("SET lock_timeout = '17s'"))
            await conn.commit()
        await migrate.upgrade(engine)
        async with engine.connect() as conn:
            assert (await conn.execute(text("SHOW lock_timeout"))).scalar() == "17s"


@every_kind
async def test_a_version_table_that_makes_no_sense(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await migrate.upgrade(url)
    await execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '0002'")
    await execute(url, f"INSERT INTO {VERSION_TABLE} VALUES ('0001')")
    with pytest.raises(SchemaError, match="cannot go on from what the table adk_sessions_version"):
        await migrate.upgrade(url)
    await execute(url, f"DELETE FROM {VERSION_TABLE} WHERE version_num = '0001'")
    await execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '0000x'")
    for call in (migrate.upgrade, migrate.check, migrate.stamp):
        with pytest.raises(SchemaError, match="at revision 0000x"):
            await call(url)


@pytest.mark.parametrize("revision", ["", "0", "9999", "nonsense", "-1", "heads"])
async def test_a_revision_that_does_not_exist(revision: str, fresh_database: NewDatabase) -> None:
    with pytest.raises(ConfigurationError, match="There is no revision"):
        await migrate.stamp(fresh_database("sqlite"), revision)


@pytest.mark.parametrize("options", [{"refused": "Stop"}, {"source_timezone": "Mars/Base"}])
def test_a_conversion_that_cannot_be(options: Any) -> None:
    with pytest.raises(ConfigurationError):
        migrate.Conversion(**options)


async def test_sql_beside_an_upgrade(fresh_database: NewDatabase) -> None:
    url = fresh_database("postgresql")
    async with asyncio.timeout(60):
        _, script = await asyncio.gather(migrate.upgrade(url), migrate.sql("postgresql"))
    assert "CREATE TABLE sessions" in script


@pytest.mark.parametrize("scheme", ["mysql", "mariadb"])
def test_a_url_that_names_no_database(scheme: str) -> None:
    with pytest.raises(ConfigurationError, match="names no database"):
        SessionService(f"{scheme}://root@127.0.0.1")
    SessionService(f"{scheme}://root@127.0.0.1", schema="agents")


async def test_a_start_that_is_cancelled_twice_disturbs_no_other(
    fresh_database: NewDatabase,
) -> None:
    # alembic's context is global: the thread of the first must be done before the second begins
    cut = 0
    for _ in range(8):
        one, other = (
            SessionService(fresh_database("sqlite")),
            SessionService(fresh_database("sqlite")),
        )
        task = asyncio.create_task(one.prepare_tables())
        await asyncio.sleep(0.01)
        in_time = task.cancel()  # on a slow machine this one may be late
        cut += in_time
        await asyncio.sleep(0.001)
        task.cancel()
        await other.prepare_tables()
        await other.validate_schema()
        with pytest.raises(asyncio.CancelledError) if in_time else nullcontext():
            await task
        await one.prepare_tables()
        await one.validate_schema()
        await one.close()
        await other.close()
    assert cut


async def test_processes_on_the_generic_path_start_at_once(fresh_database: NewDatabase) -> None:
    url = fresh_database("mariadb")
    code = """
import asyncio, sys
from adk_sessions import SessionService

async def main():
    async with SessionService(sys.argv[1], backend="generic") as service:
        await service.create_session(app_name="a", user_id="u")

asyncio.run(main())
"""
    ends = await asyncio.gather(*(asyncio.to_thread(forked.run, "-c", code, url) for _ in range(6)))
    assert [(one.returncode, one.stderr) for one in ends] == [(0, "")] * 6


async def test_what_was_orphaned_before_stops_no_upgrade(fresh_database: NewDatabase) -> None:
    url = fresh_database("sqlite")
    await migrate.upgrade(url)
    async with SessionService(url) as service:
        await use(service)
    with closing(sqlite3.connect(make_url(url).database or "")) as raw:
        raw.executescript(
            "DELETE FROM sessions; CREATE TABLE a (id INTEGER PRIMARY KEY);"
            "CREATE TABLE b (a INTEGER REFERENCES a (id)); INSERT INTO b VALUES (5);"
            f"UPDATE {VERSION_TABLE} SET version_num = '0001'"
        )
    await migrate.upgrade(url)
    await migrate.check(url)


@every_kind
async def test_a_stamp_runs_nothing(kind: str, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    await migrate.stamp(url)
    assert await migrate.current(url) == migrate.HEAD
    assert await tables_of(url) == {VERSION_TABLE}
    with pytest.raises(SchemaError, match="sessions"):
        await migrate.check(url)
    await migrate.stamp(url, "base")
    assert await migrate.current(url) is None
    await migrate.upgrade(url)
    await migrate.check(url)
