"""The servers that the other tests stand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest
from servers import (
    MariaDB,
    Pgbouncer,
    Postgres,
    ServerError,
    ServerNotFound,
    find_postgres,
    run_pgbouncer,
    run_postgres,
)
from sqlalchemy import make_url


async def select(url: str, statement: str = "select 1") -> object:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@pytest.fixture
def own_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that stops a server must not be given somebody else's."""
    monkeypatch.delenv("ADK_SESSIONS_TEST_POSTGRES_URL", raising=False)
    if find_postgres() is None:
        pytest.skip("PostgreSQL's programs not found")


async def test_postgres_answers(postgres_url: str) -> None:
    assert await select(postgres_url) == 1
    assert await select(postgres_url, "select inet_server_addr()::text") == "127.0.0.1/32"


def test_mariadb_answers(mariadb: MariaDB, mariadb_url: str) -> None:
    assert MariaDB(make_url(mariadb_url)).execute("SELECT 1") == [(1,)]
    name = make_url(mariadb_url).database
    assert MariaDB(make_url(mariadb_url)).execute("SELECT database()") == [(name,)]
    assert mariadb.address.host == make_url(mariadb_url).host


async def test_pgbouncer_pools_transactions(pgbouncer_url: str) -> None:
    first = await asyncpg.connect(pgbouncer_url, statement_cache_size=0)
    second = await asyncpg.connect(pgbouncer_url, statement_cache_size=0)
    try:
        # Both clients are connected and idle, so both get the same server connection.
        backend = "select pg_backend_pid()"
        assert await first.fetchval(backend) == await second.fetchval(backend)
    finally:
        await first.close()
        await second.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_fresh_database_is_another_each_time(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    one, two = fresh_database(kind), fresh_database(kind)
    assert one != two
    assert make_url(one).get_backend_name() == {"mariadb": "mysql"}.get(kind, kind)


async def test_fresh_database_is_dropped_under_an_open_transaction(
    postgres: Postgres, mariadb: MariaDB
) -> None:
    import asyncmy

    with postgres.scratch_database() as url:
        name = make_url(url).database
        held = await asyncpg.connect(url)
        await held.execute("begin; create table t (i int)")
    found = f"select count(*) from pg_database where datname = '{name}'"
    assert await select(postgres.url("postgres"), found) == 0
    held.terminate()

    with mariadb.scratch_database() as url:
        where = make_url(url)
        arguments = where.translate_connect_args(username="user", database="db")
        blocker = await asyncmy.connect(**arguments)
        async with blocker.cursor() as cursor:
            await cursor.execute("create table t (i int)")
            await cursor.execute("begin")
            await cursor.execute("select * from t")
    assert mariadb.execute("SHOW DATABASES LIKE %s", where.database) == []
    blocker.close()


@pytest.mark.parametrize(
    "database_url", ["sqlite", "sqlite-memory", "postgresql", "mariadb"], indirect=True
)
def test_database_url(database_url: str, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["database_url"]
    scheme = {"sqlite-memory": "sqlite", "mariadb": "mysql"}.get(kind, kind)
    assert database_url.startswith(f"{scheme}://")


def test_database_url_is_sqlite_by_default(database_url: str, tmp_path: Path) -> None:
    assert database_url.startswith(f"sqlite:///{tmp_path}/")


def test_app_name_is_random(app_name: str, request: pytest.FixtureRequest) -> None:
    assert app_name.startswith("app-")
    assert len(app_name) == 20


@pytest.mark.usefixtures("own_postgres")
async def test_a_server_survives_restart_and_kill_and_is_removed_at_the_end() -> None:
    with run_postgres() as postgres:
        url = postgres.create_database("kept")
        assert await select(url, "create table t (i int)") is None
        postgres.restart()
        assert await select(url, "select count(*) from t") == 0
        await select(url, "insert into t values (1)")
        connection = await asyncpg.connect(url)
        postgres.kill()
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await connection.fetchval("select 1")
        with pytest.raises(OSError):
            await select(url)
        postgres.start()
        assert await select(url, "select count(*) from t") == 1
        data = postgres.data
    assert not data.exists()
    assert not data.parent.exists()
    with pytest.raises(OSError):
        await select(url)


@pytest.mark.usefixtures("own_postgres")
async def test_pgbouncer_of_ones_own() -> None:
    try:
        with run_postgres() as postgres, run_pgbouncer(postgres) as pgbouncer:
            assert isinstance(pgbouncer, Pgbouncer)
            pgbouncer.stop()
            pgbouncer.start()
            connection = await asyncpg.connect(pgbouncer.url("postgres"), statement_cache_size=0)
            assert await connection.fetchval("select 1") == 1
            await connection.close()
    except ServerNotFound as not_found:
        pytest.skip(str(not_found))


def test_somebody_elses_server_is_used_and_never_stopped(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.url("postgres").replace("postgresql://", "postgresql+asyncpg://")
    monkeypatch.setenv("ADK_SESSIONS_TEST_POSTGRES_URL", url)
    with run_postgres() as same:
        assert (same.port, same.child) == (postgres.port, None)
        with same.scratch_database() as scratch:
            assert scratch.startswith("postgresql://")
        for method in (same.stop, same.kill, same.restart):
            with pytest.raises(ServerError, match="not started by the tests"):
                method()


def test_a_server_that_fails_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {
        "initdb": "exit 0",
        "postgres": "echo no disk >&2; test $1 = --version",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("ADK_SESSIONS_TEST_POSTGRES_URL", raising=False)
    monkeypatch.setenv("ADK_SESSIONS_PG_BIN", str(tmp_path))
    with pytest.raises(ServerError, match="ended with 1:\nno disk"), run_postgres():
        pass
