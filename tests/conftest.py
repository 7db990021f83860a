"""Fixtures that give databases: what to use, and when a test is skipped for want of a server.

ADK_SESSIONS_REQUIRE_SERVERS=1 makes a missing server a failure. The servers' own environment
variables are in servers.py.
"""

from __future__ import annotations

import gc
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from servers import (
    MariaDB,
    Postgres,
    Server,
    ServerNotFound,
    run_mariadb,
    run_pgbouncer,
    run_postgres,
    run_sync,
    unique_name,
)
from sqlalchemy import make_url

from adk_sessions import migrate

pytest.register_assert_rewrite("adk_sessions.testing")


def pytest_collection_finish() -> None:
    """Thousands of tests and google-adk's modules stay: looking through them took a tenth of the
    processors' time. What the tests leave is still collected, less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def _missing(reason: str) -> BaseException:
    if os.environ.get("ADK_SESSIONS_REQUIRE_SERVERS") == "1":
        return pytest.fail.Exception(f"ADK_SESSIONS_REQUIRE_SERVERS=1: {reason}", pytrace=False)
    return pytest.skip.Exception(reason)


@contextmanager
def _or_skip() -> Iterator[ExitStack]:
    """A stack to enter a server on; one that does not exist skips the test."""
    with ExitStack() as stack:
        try:
            yield stack
        except ServerNotFound as not_found:
            raise _missing(str(not_found)) from None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's PostgreSQL server. A test that stops it uses `run_postgres()` instead."""
    with _or_skip() as stack:
        yield stack.enter_context(run_postgres())


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    with _or_skip() as stack:
        yield stack.enter_context(run_mariadb())


@pytest.fixture(scope="session")
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """One database for the whole session: tests tell their rows apart by `app_name`."""
    with postgres.scratch_database() as url:
        yield url


@pytest.fixture(scope="session")
def mariadb_url(mariadb: MariaDB) -> Iterator[str]:
    """One database for the whole session, as `postgres_url`."""
    with mariadb.scratch_database() as url:
        yield url


@pytest.fixture(scope="session")
def pgbouncer_url(postgres: Postgres, postgres_url: str) -> Iterator[str]:
    """The database of `postgres_url` through a pooler in transaction mode; the tables are there.

    They cannot be made through it.
    """
    run_sync(migrate.upgrade(postgres_url))
    with _or_skip() as stack:
        pgbouncer = stack.enter_context(run_pgbouncer(postgres))
        yield pgbouncer.url(postgres_url.rpartition("/")[2])


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the tables and no rows, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "empty.db"
    run_sync(migrate.upgrade(f"sqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def migrated_template(postgres: Postgres) -> Iterator[str]:
    """The name of a PostgreSQL database with the tables and no rows, to be copied."""
    with postgres.scratch_database() as url:
        run_sync(migrate.upgrade(url))
        yield url.rpartition("/")[2]


@pytest.fixture
def fresh_database(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[str], str]]:
    """`fresh_database(kind)` makes an empty database and returns its URL; the test's end drops it.

    Kinds: "sqlite" (a file), "sqlite-memory", "postgresql", "mariadb". It blocks, so an async
    test that must not be held up calls it before it starts anything.
    """
    with ExitStack() as stack:

        def create(kind: str) -> str:
            if kind == "sqlite":
                return f"sqlite:///{tmp_path / unique_name()}.db"
            if kind == "sqlite-memory":
                return "sqlite://"
            fixture = {"postgresql": "postgres", "mariadb": "mariadb"}[kind]
            server: Server = request.getfixturevalue(fixture)
            return stack.enter_context(server.scratch_database())

        yield create


@pytest.fixture
def migrated_database(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> Iterator[Callable[[str], str]]:
    """`fresh_database` with the tables in it, for tests that are not about how they got there."""
    with ExitStack() as stack:

        def create(kind: str) -> str:
            if kind == "postgresql":
                server: Postgres = request.getfixturevalue("postgres")
                template: str = request.getfixturevalue("migrated_template")
                return stack.enter_context(server.scratch_database(template))
            url = fresh_database(kind)
            if kind == "sqlite":
                shutil.copy(request.getfixturevalue("migrated_file"), make_url(url).database or "")
            else:
                run_sync(migrate.upgrade(url))
            return url

        yield create


@pytest.fixture
def database_url(request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> str:
    """The URL for one kind of database, "sqlite" unless the test is parametrized:

        @pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)

    The servers' databases are shared by the whole session, SQLite's are new.
    """
    kind: str = getattr(request, "param", "sqlite")
    shared = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}.get(kind)
    return request.getfixturevalue(shared) if shared else fresh_database(kind)


@pytest.fixture
def app_name() -> str:
    """A new name for each test, so that none needs to clean up and all can share a database."""
    return f"app-{uuid.uuid4().hex[:16]}"
