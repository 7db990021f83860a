"""README's table of comparisons: each claim has a proof, and what google-adk's services do is run.

Those are the services that are installed. When one of these tests fails after an upgrade of
google-adk, that has become better, and its cell in the table is to be mended.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from click import Command, Group
from proxy import Proxy
from rows import query
from scripts import run_script
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from adk_sessions import Event, SessionService, StaleSessionError

ROOT = Path(__file__).parent.parent
SECTION = (
    (ROOT / "README.md").read_text().partition("\n## Compared with\n")[2].partition("\n## ")[0]
)
NONE = "—"
SECRET = "the-payload-of-ann"


# --- the table ---------------------------------------------------------------------------------


def table() -> list[list[str]]:
    """The rows, without the head: claim, ours, proofs, two of google-adk's, proofs, three more."""
    lines = [line for line in SECTION.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def proofs() -> dict[int, str]:
    return {int(n): text for n, text in re.findall(r"^(\d+)\. `(.+)`$", SECTION, re.MULTILINE)}


def numbers(cell: str) -> list[int]:
    return [] if cell == NONE else [int(number) for number in cell.split(",")]


def test_every_claim_has_a_proof_and_every_proof_a_claim() -> None:
    rows = table()
    assert len(rows) > 20
    assert {len(row) for row in rows} == {9}
    assert all(cell for row in rows for cell in row)
    used = set()
    for claim, ours, here, *google, there, _, _, _ in rows:
        assert numbers(here), f"{claim}: {ours!r} has no proof"
        assert bool(numbers(there)) is (google != [NONE, NONE]), f"{claim}: {google}"
        used |= {*numbers(here), *numbers(there)}
    assert list(proofs()) == sorted(used)
    assert len(set(proofs().values())) == len(proofs())


def test_every_test_that_is_named_exists() -> None:
    named = [text for text in proofs().values() if "::" in text]
    named += re.findall(r"`(tests/[\w/]+\.py::\w+)`", SECTION)
    assert len(named) > 40
    assert [text for text in named if not exists(text)] == []
    assert not exists("tests/test_comparison.py::test_of_nothing")


def exists(test: str) -> bool:
    file, *names = test.split("::")
    if not (ROOT / file).is_file():
        return False
    body: list[ast.stmt] = ast.parse((ROOT / file).read_text()).body
    for name in names:
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        found = [node for node in body if isinstance(node, kinds) and node.name == name]
        if not found or not re.match(r"test_|Test|\w+Contract$", name):
            return False
        body = found[0].body
    return True


def test_every_command_that_is_named_exists() -> None:
    commands = [text for text in proofs().values() if "::" not in text]
    assert commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        program, *words = command.split()
        if program == "make":
            assert words[0] in targets
            continue
        assert program == "adk"
        pytest.importorskip("google.adk")
        from google.adk.cli.cli_tools_click import main

        found: Command = main
        for word in words:
            if word.startswith("--"):
                assert word in {option for each in found.params for option in each.opts}, word
            elif word != "…":
                assert isinstance(found, Group)
                found = found.commands[word]


def test_the_documented_adapters_are_in_no_parlant_that_is_installed() -> None:
    found = importlib.util.find_spec("parlant")
    if found is None:
        pytest.skip("needs the extra parlant")
    folder = Path(next(iter(found.submodule_search_locations or ())))
    names = {path.stem for path in (folder / "adapters" / "db").glob("*.py")}
    assert {"transient", "json_file"} <= names
    assert [name for name in names if re.match("postgres|supabase|pocketbase", name)] == []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_a_document_that_a_migration_refuses_is_kept(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    pytest.importorskip("parlant")
    from parlant.core.common import Version
    from parlant.core.persistence.common import ObjectId
    from parlant.core.persistence.document_database import BaseDocument

    from adk_sessions.parlant import SQLDocumentDatabase

    url = fresh_database(kind)

    async def refuse(_document: BaseDocument) -> None:
        return None

    old = BaseDocument(
        id=ObjectId("a"),
        creation_utc="2026-01-01T00:00:00+00:00",
        version=Version.String("0.1.0"),
    )
    async with SQLDocumentDatabase(url, prefix="p_") as database:
        things = await database.create_collection("things", BaseDocument)
        await things.insert_one(old)
    async with SQLDocumentDatabase(url, prefix="p_") as database:
        things = await database.get_collection("things", BaseDocument, refuse)
        assert list((await things.find({})).items) == []
    kept = await query(url, "SELECT id, document FROM p_things_failed_migrations")
    assert [(id, json.loads(text)) for id, text in kept] == [("a", old)]


# --- google-adk's services ---------------------------------------------------------------------

Make = Callable[[], Any]
KINDS = ("database on SQLite", "database on PostgreSQL", "sqlite")
DATABASES = KINDS[:2]


def url_of(url: str) -> str:
    """In google-adk's form, which names the driver."""
    drivers = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+asyncmy"}
    drivers["postgresql"] = "postgresql+asyncpg"
    address = make_url(url)
    address = address.set(drivername=drivers[address.drivername])
    return address.render_as_string(hide_password=False)


@pytest.fixture
async def make(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[Make]:
    """Makes services of google-adk's, all on one new database."""
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService
    from google.adk.sessions.sqlite_session_service import SqliteSessionService

    kind: str = request.param
    url = fresh_database("postgresql" if "PostgreSQL" in kind else "sqlite")
    async with AsyncExitStack() as stack:

        def one() -> Any:
            if kind == "sqlite":
                return SqliteSessionService(make_url(url).database or "")
            service = DatabaseSessionService(url_of(url))
            stack.push_async_callback(service.close)
            return service

        yield one


def on(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", kinds, indirect=True)


def event(id: str | None = None, time: float | None = None, **delta: Any) -> Any:
    from google.adk.events import Event as AdkEvent
    from google.adk.events import EventActions

    given = {"id": id, "timestamp": time}
    given = {name: value for name, value in given.items() if value is not None}
    return AdkEvent(author="user", actions=EventActions(state_delta=delta), **given)


WHO = {"app_name": "shop", "user_id": "ann"}
KEY = {**WHO, "session_id": "1"}


def raised_by(results: list[Any]) -> list[BaseException]:
    return [result for result in results if isinstance(result, BaseException)]


def test_google_adk_has_these_calls_and_no_others() -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService
    from google.adk.sessions.sqlite_session_service import SqliteSessionService

    from adk_sessions.adk import DatabaseSessionService as Ours

    calls = {"create_session", "get_session", "list_sessions", "delete_session", "append_event"}
    calls |= {"get_user_state", "flush", "close"}
    for service, more in ((DatabaseSessionService, {"prepare_tables"}), (SqliteSessionService, {})):
        public = {name for name in vars(service) if not name.startswith("_")}
        inherited = {name for name in dir(service) if not name.startswith("_")}
        assert public <= inherited == calls | set(more)
        assert inherited < set(dir(Ours))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_google_adk_works_on_these_databases(
    kind: str, fresh_database: Callable[[str], str], tmp_path: Path
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService
    from google.adk.sessions.sqlite_session_service import SqliteSessionService

    async with DatabaseSessionService(url_of(fresh_database(kind))) as service:
        session = await service.create_session(**KEY)
        await service.append_event(session, event("a"))
        found = await service.get_session(**KEY)
        assert found is not None
        assert [one.id for one in found.events] == ["a"]
    if kind == "sqlite":
        small = SqliteSessionService(str(tmp_path / "small.db"))
        await small.create_session(**KEY)
        assert await small.get_session(**KEY) is not None


async def test_google_adk_wants_a_url_of_its_own_form(postgres_url: str) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService

    from adk_sessions.adk import DatabaseSessionService as Ours

    pasted = f"{postgres_url}?sslmode=prefer"
    for url in (pasted, pasted.replace("postgresql:", "postgres:"), "sqlite:///a.db"):
        with pytest.raises(ValueError, match="URL"):
            DatabaseSessionService(url)
    async with DatabaseSessionService(url_of(pasted)) as service:
        with pytest.raises(TypeError, match="sslmode"):
            await service.list_sessions(app_name="none")
    for url in (pasted, url_of(pasted)):
        async with Ours(url) as ours:
            assert (await ours.list_sessions(app_name="none")).sessions == []


async def test_google_adk_uses_its_older_layout_as_it_is(
    fresh_database: Callable[[str], str],
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService

    url = fresh_database("sqlite")
    await run_script(url, (ROOT / "tests" / "data" / "v0" / "1.21.0-sqlite.sql").read_text())
    async with DatabaseSessionService(url_of(url)) as service:
        listed = (await service.list_sessions(app_name="shop", user_id="anna")).sessions
        ids = {"app_name": "shop", "user_id": "anna", "session_id": listed[0].id}
        session = await service.get_session(**ids)
        assert session is not None
        await service.append_event(session, event("new"))
        again = await service.get_session(**ids)
        assert again is not None
        assert "new" in [one.id for one in again.events]


@on(*DATABASES)
async def test_some_of_google_adks_services_fail_that_start_at_once(make: Make) -> None:
    started = [make().prepare_tables() for _ in range(8)]
    assert raised_by(await asyncio.gather(*started, return_exceptions=True))


@on(*KINDS)
async def test_google_adk_sorts_events_by_their_timestamps(make: Make) -> None:
    service = make()
    session = await service.create_session(**KEY)
    await service.append_event(session, event("first", 2000.0))
    await service.append_event(session, event("second", 1000.0))
    found = await service.get_session(**KEY)
    assert [one.id for one in found.events] == ["second", "first"]


@on(*KINDS)
async def test_google_adk_refuses_an_event_that_is_there(make: Make) -> None:
    service = make()
    session = await service.create_session(**KEY)
    one = event("a")
    await service.append_event(session, one)
    with pytest.raises(Exception, match=r"(?i)unique") as raised:
        await service.append_event(await service.get_session(**KEY), one)
    assert type(raised.value).__name__ == "IntegrityError"


@on(*KINDS)
async def test_google_adk_takes_a_stale_session_for_a_fresh_one_if_events_have_one_time(
    make: Make,
) -> None:
    service = make()
    session = await service.create_session(**KEY)
    await service.append_event(session, event("a", 5000.0))
    stale = await service.get_session(**KEY)
    await service.append_event(session, event("b", 5000.0))
    await service.append_event(stale, event("c", 6000.0))  # it has not seen b
    other = await service.get_session(**KEY)
    await service.append_event(stale, event("d", 7000.0))
    with pytest.raises(ValueError, match=r"storage"):
        await service.append_event(other, event("e", 8000.0))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_here_a_stale_session_is_refused_whatever_the_times(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    async with SessionService(fresh_database(kind)) as service:
        session = await service.create_session(**KEY)
        await service.append_event(session, Event(id="a", timestamp=5000.0))
        stale = await service.get_session(**KEY)
        assert stale is not None
        await service.append_event(session, Event(id="b", timestamp=5000.0))
        with pytest.raises(StaleSessionError):
            await service.append_event(stale, Event(id="c", timestamp=6000.0))


async def keys_that_stay(setting: list[Awaitable[Any]], look: Callable[[], Any]) -> int:
    assert raised_by(await asyncio.gather(*setting, return_exceptions=True)) == []
    return len((await look()).state)


@on(*DATABASES)
async def test_google_adk_loses_state_that_is_set_at_once(make: Make) -> None:
    """By creates; which of them lose depends on time, so there are rounds."""
    service = make()
    await service.create_session(**KEY)
    kept = []
    for number in range(20):
        ids = {"app_name": f"app-{number}", "user_id": "ann"}
        await service.create_session(**ids, session_id="0")
        creates = [service.create_session(**ids, state={f"app:{n}": n}) for n in range(12)]

        async def look(ids: dict[str, str] = ids) -> Any:
            return await service.get_session(**ids, session_id="0")

        kept.append(await keys_that_stay(creates, look))
        if kept[-1] < 12:
            return
    pytest.fail(f"all keys are kept: {kept}")


@on("database on SQLite")
async def test_google_adk_loses_state_that_services_append_at_once(make: Make) -> None:
    service = make()
    kept = []
    for number in range(20):
        ids = {"app_name": f"app-{number}", "user_id": "ann"}
        sessions = [await service.create_session(**ids, session_id=f"{n}") for n in range(6)]
        appends = [
            make().append_event(one, event(**{f"app:{n}": n})) for n, one in enumerate(sessions)
        ]

        async def look(ids: dict[str, str] = ids) -> Any:
            return await service.get_session(**ids, session_id="0")

        kept.append(await keys_that_stay(appends, look))
        if kept[-1] < 6:
            return
    pytest.fail(f"all keys are kept: {kept}")


@on("sqlite")
async def test_google_adks_sqlite_service_keeps_every_key(make: Make) -> None:
    """From a first start at once of several services on."""
    services = [make() for _ in range(8)]
    sessions = await asyncio.gather(
        *(
            one.create_session(**WHO, session_id=f"{n}", state={f"app:{n}": n})
            for n, one in enumerate(services)
        )
    )
    await asyncio.gather(
        *(
            one.append_event(session, event(**{f"app:appended {n}": n, f"user:{n}": n}))
            for n, (one, session) in enumerate(zip(services, sessions, strict=True))
        )
    )
    found = await services[0].get_session(**WHO, session_id="0")
    assert len(found.state) == 3 * 8


@on(*KINDS)
async def test_values_that_google_adk_keeps_on_sqlite_alone(
    make: Make, request: pytest.FixtureRequest
) -> None:
    service = make()
    postgresql = "PostgreSQL" in request.node.callspec.id
    for number, value in enumerate((math.nan, "\ud800", "\0", 1e16, -0.0)):
        ids = {**WHO, "session_id": f"{number}"}
        if (postgresql and not isinstance(value, float | int)) or (postgresql and value != value):
            with pytest.raises(DBAPIError):
                await service.create_session(**ids, state={"k": value})
            continue
        await service.create_session(**ids, state={"k": value})
        found = (await service.get_session(**ids)).state["k"]
        kept = (type(found), repr(found)) == (type(value), repr(value))
        assert kept is not postgresql


@on(*KINDS)
async def test_a_refused_append_leaves_temp_state_in_google_adks_session(make: Make) -> None:
    service = make()
    session = await service.create_session(**KEY)
    stale = await service.get_session(**KEY)
    await service.append_event(session, event("a"))
    with pytest.raises(ValueError, match="storage"):
        await service.append_event(stale, event("b", **{"temp:k": 1}))
    assert stale.state == {"temp:k": 1}


async def test_google_adk_passes_on_that_a_connection_broke(
    fresh_database: Callable[[str], str],
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService

    from adk_sessions.adk import DatabaseSessionService as Ours

    url = make_url(fresh_database("postgresql"))
    async with Proxy(url.host or "", url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.port)
        text = url_of(through.render_as_string(hide_password=False))
        async with DatabaseSessionService(text) as theirs, Ours(text) as ours:
            session = await theirs.create_session(**KEY)
            proxy.cut("INSERT INTO events", lose="request")
            with pytest.raises((DBAPIError, OSError)):
                await theirs.append_event(session, event("a"))
            session = await ours.get_session(**KEY)
            assert session is not None
            assert session.events == []
            proxy.cut("lost-and-found", lose="request")
            await ours.append_event(session, event("lost-and-found"))
            again = await ours.get_session(**KEY)
            assert again is not None
            assert [one.id for one in again.events] == ["lost-and-found"]
            assert proxy.fired == 2


@on(*DATABASES)
async def test_google_adk_quotes_what_was_to_be_stored(make: Make) -> None:
    service = make()
    session = await service.create_session(**KEY)
    await service.append_event(session, event("a", k=SECRET))
    with pytest.raises(IntegrityError, match=SECRET):
        await service.append_event(session, event("a", k=SECRET))


@pytest.mark.filterwarnings(r"ignore:.*\[EXPERIMENTAL\]:UserWarning")
@on(*KINDS)
async def test_a_rewind_of_google_adks_wipes_the_initial_state(make: Make) -> None:
    from google.adk.agents import BaseAgent
    from google.adk.runners import Runner

    service = make()
    session = await service.create_session(**KEY, state={"begin": 1})
    one = event("a", begin=2, later=3)
    one.invocation_id = "i"
    await service.append_event(session, one)
    runner = Runner(app_name="shop", agent=BaseAgent(name="clerk"), session_service=service)
    await runner.rewind_async(user_id="ann", session_id="1", rewind_before_invocation_id="i")
    found = await service.get_session(**KEY)
    assert found.state == {"begin": None, "later": None}


async def test_google_adk_works_behind_a_pooler_if_told_how(
    pgbouncer_url: str, app_name: str
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService

    how = {"connect_args": {"statement_cache_size": 0}}
    async with DatabaseSessionService(url_of(pgbouncer_url), **how) as service:
        ids = {"app_name": app_name, "user_id": "ann", "session_id": "1"}
        session = await service.create_session(**ids)
        for number in range(5):
            await service.append_event(session, event(f"{number}"))
        found = await service.get_session(**ids)
        assert found is not None
        assert len(found.events) == 5


def test_google_adk_has_no_options_for_where_tables_are() -> None:
    """Nor for the rest of what is an option here: what it does not know, it gives to the engine."""
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService
    from google.adk.sessions.sqlite_session_service import SqliteSessionService

    for name, value in {
        "schema": "agents",
        "table_prefix": "agent_",
        "row_level_security": True,
        "pooler": "transaction",
        "read_url": "postgresql+asyncpg://127.0.0.1/x",
    }.items():
        with pytest.raises(ValueError, match="postgresql"):
            DatabaseSessionService("postgresql+asyncpg://127.0.0.1/x", **{name: value})
    assert list(inspect.signature(SqliteSessionService).parameters) == ["db_path"]
