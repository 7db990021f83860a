"""The databases of earlier revisions in tests/data/revisions, on this release.

Each is loaded, upgraded and read. Of the contract kit the tests that `REPRESENTATIVE` names run on
the oldest and the newest of each database; ADK_SESSIONS_SOAK=1 (`make soak`) runs all of it on all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import forked
import pytest
from everywhere import PART, REPRESENTATIVE, SOAK
from freeze import (
    FOLDER,
    KINDS,
    OLDER_INDEX,
    ROOT,
    TABLES,
    VERSION_TABLE,
    adk_tables,
    file_of,
    load,
    query,
    reading_of,
    revisions,
    schema_of,
)
from scripts import run_all
from servers import run_sync
from sqlalchemy.exc import OperationalError

from adk_sessions import Event, Session, SessionService, migrate
from adk_sessions.testing import SessionServiceContract

OLDEST, NEWEST = revisions()[0], revisions()[-1]
FILES = [(revision, kind) for revision in revisions() for kind in KINDS]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_file = pytest.mark.parametrize(
    ("revision", "kind"), FILES, ids=[f"{revision}-{kind}" for revision, kind in FILES]
)

NewDatabase = Callable[[str], str]

DEADLOCK = 1213

# A test for each thing that tables are for.


def read(revision: str) -> list[dict[str, Any]]:
    """What must be read from a frozen database."""
    found: list[dict[str, Any]] = json.loads(reading_of(revision).read_text(encoding="utf-8"))
    return found


def plain(session: Session) -> str:
    """A session as text: NaN is NaN there, and 1 is not 1.0."""
    return json.dumps(session.model_dump(), sort_keys=True)


@asynccontextmanager
async def thawed(revision: str, kind: str, url: str) -> AsyncIterator[SessionService]:
    """A service on a frozen database, which it has upgraded."""
    await load(revision, kind, url)
    assert await version_of(url) == [(revision,)]
    async with SessionService(url) as service:
        await service.prepare_tables()
        assert await version_of(url) == [(migrate.HEAD,)]
        yield service


async def version_of(url: str) -> list[tuple[Any, ...]]:
    return await query(url, f"SELECT version_num FROM {VERSION_TABLE}")


async def read_all(service: SessionService) -> dict[tuple[str, str, str], Session]:
    """Every session of the two apps that are in a file."""
    found = {}
    for app in ("shop", "notes"):
        listed = await service.list_sessions(app_name=app)
        for one in listed.sessions:
            session = await service.get_session(
                app_name=app, user_id=one.user_id, session_id=one.id
            )
            assert session is not None
            assert session.state.keys() == one.state.keys()
            found[app, one.user_id, one.id] = session
    return found


def alembic(*arguments: str, url: str) -> None:
    done = forked.run("-m", "alembic", "-x", f"url={url}", *arguments, folder=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_revision_is_frozen() -> None:
    """Whoever adds a revision runs `python tests/freeze.py`."""
    wanted = {file_of(revision, kind) for revision, kind in FILES}
    wanted |= {reading_of(revision) for revision in revisions()}
    assert {path for path in FOLDER.iterdir() if path.name != "README.md"} == wanted
    assert migrate.HEAD == NEWEST


@pytest.fixture(scope="module")
def _fresh_schemas() -> dict[str, Any]:
    return {}


@pytest.fixture
async def fresh_schema(
    _fresh_schemas: dict[str, Any], fresh_database: NewDatabase
) -> Callable[[str], Any]:
    """`await fresh_schema(kind)`: what a service makes of an empty database."""

    async def schema(kind: str) -> Any:
        if kind not in _fresh_schemas:
            url = fresh_database(kind)
            async with SessionService(url) as service:
                await service.prepare_tables()
                await service.validate_schema()
            _fresh_schemas[kind] = await schema_of(url)
        return _fresh_schemas[kind]

    return schema


# Fresh = migrated = adopted, and what was stored is read


@every_file
async def test_an_earlier_revision_is_upgraded_and_read(
    revision: str, kind: str, fresh_schema: Callable[[str], Any], fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    expected = {
        (one["app_name"], one["user_id"], one["id"]): Session.model_validate(one)
        for one in read(revision)
    }
    async with thawed(revision, kind, url) as service:
        assert await schema_of(url) == await fresh_schema(kind)
        await service.validate_schema()
        found = await read_all(service)
        assert found.keys() == expected.keys()
        for key, session in found.items():
            assert plain(session) == plain(expected[key])
        for app, user, _ in expected:
            state = await service.get_user_state(app_name=app, user_id=user)
            whole = expected[app, user, _].state
            assert {f"user:{name}": value for name, value in state.items()} == {
                name: value for name, value in whole.items() if name.startswith("user:")
            }
        # what was read is current: it takes another event
        for session in found.values():
            await service.append_event(session, Event(content=float("inf")))
        again = await read_all(service)
        assert {key: plain(one) for key, one in again.items()} == {
            key: plain(one) for key, one in found.items()
        }


# How google-adk was connected, and which index its release made.
ADOPTED = [
    pytest.param(kind, scheme, older, id=f"{scheme}-{'4 columns' if older else 'no index'}")
    for kind, scheme in [
        ("sqlite", "sqlite"),
        ("postgresql", "postgresql"),
        ("mariadb", "mysql"),
        ("mariadb", "mariadb"),
    ]
    for older in (False, True)
]


@pytest.mark.parametrize(("kind", "scheme", "older"), ADOPTED)
async def test_the_adopted_schema_is_the_fresh_one(
    kind: str,
    scheme: str,
    older: bool,
    fresh_schema: Callable[[str], Any],
    fresh_database: NewDatabase,
) -> None:
    url = fresh_database(kind)
    await run_all(url, adk_tables(kind, older_index=older, narrow=scheme == "mariadb"))
    await check_adopted(url.replace("mysql:", f"{scheme}:"), await fresh_schema(kind))
    index = await query(
        url,
        {
            "sqlite": "SELECT name FROM sqlite_master WHERE type = 'index'",
            "postgresql": "SELECT indexname FROM pg_indexes",
            "mariadb": "SELECT DISTINCT index_name FROM information_schema.statistics"
            " WHERE table_schema = database()",
        }[kind],
    )
    assert ((OLDER_INDEX,) in index) == older, "the older index is google-adk's to drop"


@pytest.mark.parametrize(
    ("kind", "driver"),
    [
        ("sqlite", "sqlite+aiosqlite"),
        ("postgresql", "postgresql+asyncpg"),
        ("mariadb", "mysql+asyncmy"),
        ("mariadb", "mariadb+asyncmy"),
    ],
)
async def test_the_schema_adopted_from_the_installed_google_adk_is_the_fresh_one(
    kind: str, driver: str, fresh_schema: Callable[[str], Any], fresh_database: NewDatabase
) -> None:
    stock = pytest.importorskip("google.adk.sessions.database_session_service")
    url = fresh_database(kind)
    theirs = f"{driver}{url[url.index(':') :]}"
    async with stock.DatabaseSessionService(theirs) as service:
        await service.create_session(app_name="stock", user_id="ann", session_id="s")
    ours = url.replace("mysql:", f"{driver.partition('+')[0]}:")
    await check_adopted(ours, await fresh_schema(kind))
    async with SessionService(ours) as us:
        session = await us.get_session(app_name="stock", user_id="ann", session_id="s")
        assert session is not None
        await us.append_event(session, Event(content="x"))


async def check_adopted(url: str, expected: Any) -> None:
    async with SessionService(url) as service:
        await service.prepare_tables()
        await service.validate_schema()
    assert await schema_of(url) == expected


# Contract: back and forth with what is stored


@every_kind
async def test_a_downgrade_and_an_upgrade_keep_every_row(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    await load(NEWEST, kind, url)
    before, schema = await rows(url), await schema_of(url)
    await asyncio.to_thread(alembic, "downgrade", "base", url=url)
    assert await rows(url) == before
    await migrate.upgrade(url)
    assert await rows(url) == before
    assert await schema_of(url) == schema


async def rows(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """All rows that google-adk knows of: a column of ours is gone after a downgrade."""
    columns = {
        "sessions": "id, app_name, user_id, state, create_time, update_time",
        "events": "id, app_name, user_id, session_id, invocation_id, timestamp, event_data",
    }
    return {
        table: sorted(await query(url, f"SELECT {columns.get(table, '*')} FROM {table}"), key=str)
        for table in TABLES
        if table not in (VERSION_TABLE, "state_changes")
    }


# The released code goes on


@every_kind
async def test_this_release_works_on_what_a_later_one_has_expanded(
    kind: str, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    async with thawed(NEWEST, kind, url) as service:
        before = await read_all(service)
        for statement in (
            "ALTER TABLE sessions ADD COLUMN later VARCHAR(20)",
            "ALTER TABLE events ADD COLUMN later VARCHAR(20)",
            "ALTER TABLE app_states ADD COLUMN later INTEGER",
            "ALTER TABLE user_states ADD COLUMN later INTEGER",
            "CREATE TABLE later_things (id INTEGER PRIMARY KEY)",
            f"UPDATE {VERSION_TABLE} SET version_num = '9999'",
        ):
            await query(url, statement)
        # one that runs already, and one that starts now
        async with SessionService(url) as started:
            for one in (service, started):
                found = await read_all(one)
                assert {key: plain(session) for key, session in found.items()} == {
                    key: plain(session) for key, session in before.items()
                }
                session = await one.create_session(app_name="new", user_id="u", state={"app:a": 1})
                await one.append_event(session, Event(content="x"))
                assert (
                    await one.get_session(app_name="new", user_id="u", session_id=session.id)
                    == session
                )
                await one.delete_session("new", "u", session.id)
                await one.validate_schema()
    assert await version_of(url) == [("9999",)]


@pytest.mark.parametrize(
    ("revision", "kind"), [file for file in FILES if SOAK or file[0] in (OLDEST, NEWEST)]
)
async def test_google_adk_reads_and_appends_on_an_upgraded_database(
    revision: str, kind: str, fresh_database: NewDatabase
) -> None:
    stock = pytest.importorskip("google.adk.sessions.database_session_service")
    events = pytest.importorskip("google.adk.events")
    url = fresh_database(kind)
    driver = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mariadb": "asyncmy"}[kind]
    async with (
        thawed(revision, kind, url) as service,
        stock.DatabaseSessionService(url.replace(":", f"+{driver}:", 1)) as theirs,
    ):
        for one in read(revision):
            if one["app_name"] != "shop":
                continue  # those events have content of other shapes
            ids = {"app_name": "shop", "user_id": one["user_id"], "session_id": one["id"]}
            session = await theirs.get_session(**ids)
            assert [event.id for event in session.events] == [each["id"] for each in one["events"]]
            assert session.state.keys() == one["state"].keys()
            actions = events.EventActions(state_delta={"user:by": "google-adk"})
            new = events.Event(author="user", invocation_id="i", actions=actions)
            await theirs.append_event(session, new)
            ours = await service.get_session(**ids)
            assert ours is not None
            assert [event.id for event in ours.events][-1] == new.id
            assert ours.state["user:by"] == "google-adk"
            await service.append_event(ours, Event(author="agent", invocation_id="i"))


@every_kind
async def test_google_adk_goes_on_while_its_tables_are_upgraded(
    kind: str, fresh_database: NewDatabase
) -> None:
    """Every revision, with the service that has made the tables at work all the time.

    On MariaDB an append may be the victim of a deadlock with an ALTER, which google-adk does not
    repeat: it fails, and nothing of it is stored.
    """
    stock = pytest.importorskip("google.adk.sessions.database_session_service")
    events = pytest.importorskip("google.adk.events")
    url = fresh_database(kind)
    await run_all(url, adk_tables(kind))
    driver = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mariadb": "asyncmy"}[kind]
    async with stock.DatabaseSessionService(url.replace(":", f"+{driver}:", 1)) as theirs:
        ids = {"app_name": "stock", "user_id": "ann", "session_id": "s"}
        session = await theirs.create_session(**ids)
        upgrade = asyncio.create_task(migrate.upgrade(url))
        kept = []
        while not upgrade.done() or len(kept) < 5:
            event = events.Event(author="user", invocation_id="i")
            try:
                await theirs.append_event(session, event)
            except OperationalError as error:
                if kind != "mariadb" or error.orig is None or error.orig.args[0] != DEADLOCK:
                    raise
                session = await theirs.get_session(**ids)
            else:
                kept.append(event.id)
        await upgrade
    async with SessionService(url) as service:
        found = await service.get_session(**ids)
        assert found is not None
        assert [event.id for event in found.events] == kept


# The contract kit


def loaded_once(files: list[tuple[str, str]]) -> Any:
    """A fixture: the URL of each file's database, loaded for all tests that use it."""
    names = [f"{kind}-{revision}" for revision, kind in files]

    @pytest.fixture(scope="module", params=files, ids=names)
    def loaded(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[str]:
        revision, kind = request.param
        if kind == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('frozen')}/{revision}.db"
            run_sync(load(revision, kind, url))
            yield url
            return
        server = request.getfixturevalue("postgres" if kind == "postgresql" else kind)
        with server.scratch_database() as url:
            run_sync(load(revision, kind, url))
            yield url

    return loaded


kit_url = loaded_once(
    [file for file in FILES if SOAK or file[0] == migrate.HEAD or file == (OLDEST, "mariadb")]
)


class TestTheKit(SessionServiceContract):
    """The kit, with two services on a frozen database: a part, with ADK_SESSIONS_SOAK=1 all of it.

    What stands for the rest runs on the newest revision and, where columns are altered one by one,
    on the oldest.
    """

    locals().update(PART)

    @pytest.fixture
    async def service(self, kit_url: str) -> AsyncIterator[SessionService]:
        # what a power loss would do to the file is not in question
        async with SessionService(kit_url, sqlite_synchronous="NORMAL") as service:
            yield service

    @pytest.fixture
    async def other_service(self, kit_url: str) -> AsyncIterator[SessionService]:
        async with SessionService(kit_url, sqlite_synchronous="NORMAL") as service:
            yield service


def test_the_representative_tests_are_in_the_kit() -> None:
    assert [name for name in REPRESENTATIVE if not hasattr(SessionServiceContract, name)] == []
