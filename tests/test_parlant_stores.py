"""The three stores that ``p.Server`` takes: everything is there again after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict, cast

import pytest

pytest.importorskip("parlant")

from engines import engine_for
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.agents import AgentId
from parlant.core.common import IdGenerator, ItemNotFoundError, Version
from parlant.core.context_variables import (
    ContextVariableDocumentStore,
    ContextVariableId,
    ContextVariableStore,
    ContextVariableValue,
)
from parlant.core.customers import Customer, CustomerDocumentStore, CustomerId, CustomerStore
from parlant.core.persistence.common import MigrationRequired, ObjectId, ServerOutdated
from parlant.core.persistence.document_database import identity_loader_for
from parlant.core.persistence.document_database_helper import (
    MetadataDocument,
    load_metadata_document,
)
from parlant.core.sessions import EventKind, SessionDocumentStore, SessionId
from parlant.core.tags import TagId
from parlant.core.tools import ToolId
from parlant_workers import say
from sqlalchemy import inspect, make_url
from workers import Crew

from adk_sessions import ConfigurationError, SchemaError
from adk_sessions.parlant import ParlantStores, SQLDocumentDatabase, parlant_stores

HERE = Path(__file__).parent
KINDS = ["sqlite", "postgresql", "mariadb"]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NEVER: Any = "never"
TABLES = {
    "parlant_sessions_metadata",
    "parlant_sessions_sessions",
    "parlant_sessions_events",
    "parlant_customers_metadata",
    "parlant_customers_customers",
    "parlant_customers_customer_tag_associations",
    "parlant_context_variables_metadata",
    "parlant_context_variables_variables",
    "parlant_context_variables_variable_tag_associations",
    "parlant_context_variables_values",
}

on_each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def url(kind: str, fresh_database: Callable[[str], str]) -> str:
    """A database of the test's own: the tables' names are fixed."""
    return fresh_database(kind)


# --- restarts ------------------------------------------------------------------------------------


async def everything(stores: ParlantStores) -> dict[str, Any]:
    """All that Parlant can read of the stores."""
    sessions, customers, variables = stores
    found = await sessions.list_sessions()
    known = await variables.list_variables()
    return {
        "sessions": list(found),
        "events": {
            session.id: await sessions.list_events(session.id, exclude_deleted=False)
            for session in found
        },
        "customers": [one for one in await customers.list_customers() if one.id != "guest"],
        "variables": known,
        "values": {variable.id: await variables.list_values(variable.id) for variable in known},
    }


async def introduce(stores: ParlantStores) -> tuple[list[Customer], ContextVariableId]:
    """What an application does at each of its starts."""
    ann = await stores.customer_store.create_customer(
        "Ann", {"plan": "gold"}, tags=[TagId("vip"), TagId("eu")]
    )
    bob = await stores.customer_store.create_customer("Bob", id=None)
    plan = await stores.variable_store.create_variable(
        "plan", "What they pay for", NOON, ToolId("service", "plan"), "* * * * *", [TagId("vip")]
    )
    await stores.variable_store.create_variable("bare")
    return [ann, bob], plan.id


async def converse(stores: ParlantStores, customer: CustomerId) -> None:
    session = await stores.session_store.create_session(
        customer, AgentId("bot"), title="Hello", metadata={"a": [1]}, labels={"x"}
    )
    for n in range(3):
        await say(stores.session_store, session.id, f"message {n}", metadata={"n": n})
    gone = await say(stores.session_store, session.id, "oops")
    await stores.session_store.delete_event(gone.id)


@pytest.mark.parametrize("kind", [*KINDS, "pgbouncer"])
async def test_everything_is_there_after_two_restarts(
    kind: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database("postgresql" if kind == "pgbouncer" else kind)
    if kind == "pgbouncer":
        pooler = make_url(request.getfixturevalue("pgbouncer_url"))
        database = make_url(url).database
        url = (
            f"{pooler.set(database=database).render_as_string(hide_password=False)}?pgbouncer=true"
        )
    async with parlant_stores(url) as stores:
        (ann, bob), plan = await introduce(stores)
        for customer in (ann, ann, bob):
            await converse(stores, customer.id)
        await stores.customer_store.upsert_extra(ann.id, {"note": "likes tea"})
        await stores.customer_store.upsert_tag(bob.id, TagId("new"))
        for key, value in {ann.id: "gold", bob.id: {"of": ["nothing"]}, "tag:eu": None}.items():
            await stores.variable_store.update_value(plan, key, cast(Any, value))
        before = await everything(stores)
    assert [len(before[name]) for name in before] == [3, 3, 2, 2, 2]
    assert {len(events) for events in before["events"].values()} == {4}
    assert [set(one.tags) for one in before["customers"]] == [{"vip", "eu"}, {"new"}]
    assert [dict(one.extra) for one in before["customers"]] == [
        {"plan": "gold", "note": "likes tea"},
        {},
    ]
    for _ in range(2):
        async with parlant_stores(url) as stores:
            assert await everything(stores) == before
            # ids begin anew with each process: the same calls find what they made
            again, same = await introduce(stores)
            assert ([one.id for one in again], same) == ([ann.id, bob.id], plan)
            assert await everything(stores) == before
            # the conversation goes on
            session = before["sessions"][0].id
            await say(stores.session_store, session, "and on")
            before = await everything(stores)
    assert [event.offset for event in before["events"][session]] == [0, 1, 2, 3, 4, 5]
    if kind != "pgbouncer":
        assert await tables_of(url) == TABLES


@on_each
async def test_values_survive_restarts_though_ids_repeat(url: str) -> None:
    """A value's id is made of its variable, key and data, and counted anew in each process."""
    steps: list[dict[str, Any]] = [
        # "a" + "b1" and "ab" + "1" are one text, and so one id in the next process
        {"a": "b1", "x": "same", "y": "same"},
        {"ab": "1", "x": "other"},
        {"a": "b1", "x": "same"},
        {"ab": "1", "a": "b1", "y": "same"},
    ]
    expected: dict[str, Any] = {}
    for step in steps:
        async with parlant_stores(url) as stores:
            variable = (await stores.variable_store.create_variable("v")).id
            for key, value in step.items():
                expected[key] = value
                await stores.variable_store.update_value(variable, key, value)
                read = await stores.variable_store.read_value(variable, key)
                assert read is not None
                assert read.data == value
            values = await stores.variable_store.list_values(variable)
            assert len(values) == len(expected)
            assert {key: value.data for key, value in values} == expected
            assert len({value.id for _, value in values}) == len(values)
    async with parlant_stores(url) as stores:
        await stores.variable_store.delete_value(variable, "a")
        del expected["a"]
        values = await stores.variable_store.list_values(variable)
        assert {key: value.data for key, value in values} == expected
        await stores.variable_store.delete_variable(variable)
        assert not await stores.variable_store.list_values(variable)


# --- several processes ---------------------------------------------------------------------------

PROCESSES = 3


@pytest.fixture
def crew(url: str) -> Iterator[Crew]:
    with Crew(PROCESSES, script=str(HERE / "parlant_workers.py")) as crew:
        # the first start is everybody's
        crew.open(url)
        yield crew
        crew.close()


@on_each
async def test_what_processes_give_a_customer_all_stays(crew: Crew, url: str) -> None:
    each, names = 5, [f"p{n}" for n in range(PROCESSES)]
    async with parlant_stores(url) as stores:
        old = {f"old-{name}-{n}": "x" for name in names for n in range(each)}
        ann = await stores.customer_store.create_customer("Ann", old)
        jobs = [{"customer": ann.id, "writer": name, "count": each} for name in names]
        new = await asyncio.to_thread(crew.run, "tag", jobs)
        assert sum(new) == each, "each tag is new to one of them"
        found = await stores.customer_store.read_customer(ann.id)
        assert sorted(found.tags) == [f"tag-{n}" for n in range(each)]
        assert found.extra == {f"{name}-{n}": str(n) for name in names for n in range(each)}
        variable = (await stores.variable_store.create_variable("v")).id
        jobs = [{"variable": variable, "writer": name, "count": each} for name in names]
        await asyncio.to_thread(crew.run, "value", jobs)
        values = await stores.variable_store.list_values(variable)
        assert sorted(key for key, _ in values) == [f"key-{n}" for n in range(each)]
        assert {value.data for _, value in values} <= set(names)


# --- what Parlant's own stores do ----------------------------------------------------------------

Note = Callable[[Awaitable[Any]], Awaitable[Any]]


async def customers_change(store: CustomerStore, note: Note) -> None:
    ann, vip = CustomerId("ann"), TagId("vip")
    await note(store.create_customer("Ann", {"a": "1"}, NOON, [vip], ann))
    bob = await note(store.create_customer("Bob", creation_utc=NOON + timedelta(1)))
    await note(store.create_customer("Bob", creation_utc=NOON + timedelta(2)))
    for id in (ann, bob.id, NEVER):
        await note(store.upsert_extra(id, {"b": "2", "a": "3"}))
        await note(store.remove_extra(id, ["a", "never"]))
        await note(store.upsert_tag(id, vip))
        await note(store.upsert_tag(id, vip, NOON))
        await note(store.upsert_tag(id, TagId("eu")))
        await note(store.remove_tag(id, vip))
        await note(store.remove_tag(id, vip))
        await note(store.upsert_tag(id, vip))
        await note(store.update_customer(id, {"name": "Renamed"}))
        await note(store.read_customer(id))
    await note(store.list_customers())
    await note(store.list_customers([vip]))
    await note(store.list_customers([]))
    await note(store.list_customers(limit=1))
    await note(store.delete_customer(ann))
    await note(store.delete_customer(ann))
    await note(store.read_customer(ann))


async def variables_change(store: ContextVariableStore, note: Note) -> None:
    vip = TagId("vip")
    plan = await note(store.create_variable("plan", "text", NOON, ToolId("s", "t"), "0 0 * * *"))
    bare = await note(store.create_variable("bare", creation_utc=NOON, tags=[vip]))
    for id in (plan.id, bare.id, NEVER):
        await note(store.add_variable_tag(id, vip))
        await note(store.add_variable_tag(id, vip, NOON))
        await note(store.add_variable_tag(id, TagId("eu")))
        await note(store.remove_variable_tag(id, TagId("eu")))
        await note(store.remove_variable_tag(id, TagId("eu")))
        await note(store.update_variable(id, {"name": "renamed", "description": None}))
        await note(store.read_variable(id))
        for data in ("x", {"y": [1, None]}, "x", "\0"):
            await note(store.update_value(id, "key", data))
            await note(store.update_value(id, "other", data))
        await note(store.read_value(id, "key"))
        await note(store.read_value(id, "never"))
        await note(store.delete_value(id, "key"))
        await note(store.delete_value(id, "key"))
        await note(store.list_values(id))
    await note(store.list_variables())
    await note(store.list_variables([vip]))
    await note(store.list_variables([]))
    await note(store.delete_variable(bare.id))
    await note(store.delete_variable(bare.id))
    await note(store.list_variables())


async def noted(store: Any, script: Callable[[Any, Note], Awaitable[None]]) -> list[Any]:
    """What a script notes, without the times that are now; ids follow from what they name."""
    found: list[Any] = []

    def timeless(value: Any) -> Any:
        if isinstance(value, Customer):
            tags = sorted(value.tags)
            guest = value.id == CustomerStore.GUEST_ID
            return replace(value, tags=tags, creation_utc=NOON if guest else value.creation_utc)
        if isinstance(value, ContextVariableValue):
            return replace(value, last_modified=NOON)
        if isinstance(value, list | tuple):
            return [timeless(one) for one in value]
        return [timeless(list(value)), value.total_count] if hasattr(value, "items") else value

    async def note(doing: Awaitable[Any]) -> Any:
        try:
            result = await doing
        except ItemNotFoundError as error:
            return found.append(str(error))
        found.append(timeless(result))
        return result

    await script(store, note)
    return found


@on_each
async def test_they_do_what_parlants_own_stores_do(url: str) -> None:
    async with (
        CustomerDocumentStore(IdGenerator(), TransientDocumentDatabase()) as customers,
        ContextVariableDocumentStore(IdGenerator(), TransientDocumentDatabase()) as variables,
    ):
        expected = (
            await noted(customers, customers_change),
            await noted(variables, variables_change),
        )
    async with parlant_stores(url) as stores:
        assert await noted(stores.customer_store, customers_change) == expected[0]
        assert await noted(stores.variable_store, variables_change) == expected[1]


# --- versions ------------------------------------------------------------------------------------


async def set_version(url: str, prefix: str, version: str) -> None:
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        collection = await database.get_collection(
            "metadata", MetadataDocument, load_metadata_document
        )
        await collection.update_one({}, {"version": Version.String(version)})


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_another_version_is_not_opened_by_chance(url: str) -> None:
    async with parlant_stores(url):
        pass
    for prefix in ("parlant_sessions_", "parlant_customers_", "parlant_context_variables_"):
        await set_version(url, prefix, "0.0.1")
        with pytest.raises(MigrationRequired):
            async with parlant_stores(url, migrate=False):
                pass
        async with parlant_stores(url):
            pass
        await set_version(url, prefix, "99.0.0")
        with pytest.raises(ServerOutdated):
            async with parlant_stores(url):
                pass
        await set_version(url, prefix, "0.0.1")


class OldSession(TypedDict, total=False):
    id: ObjectId
    version: str
    creation_utc: str
    customer_id: str
    agent_id: str
    mode: str
    title: str | None
    consumption_offsets: dict[str, int]


class OldEvent(TypedDict, total=False):
    id: ObjectId
    version: str
    creation_utc: str
    session_id: str
    source: str
    kind: str
    offset: int
    correlation_id: str
    data: Any
    deleted: bool


@on_each
async def test_a_conversation_of_an_older_parlant_goes_on(url: str) -> None:
    async with SQLDocumentDatabase(url, prefix="parlant_sessions_") as database:
        metadata = await database.create_collection("metadata", MetadataDocument)
        await metadata.insert_one(
            {"id": ObjectId("m"), "version": Version.String("0.4.0"), "creation_utc": "2025"}
        )
        sessions = await database.create_collection("sessions", cast(Any, OldSession))
        await sessions.insert_one(
            {
                "id": "old",
                "version": "0.4.0",
                "creation_utc": NOON.isoformat(),
                "customer_id": "ann",
                "agent_id": "bot",
                "mode": "auto",
                "title": None,
                "consumption_offsets": {"client": 1},
            }
        )
        events = await database.create_collection("events", cast(Any, OldEvent))
        for n in range(3):
            await events.insert_one(
                {
                    "id": f"event-{n}",
                    "version": "0.4.0",
                    "creation_utc": NOON.isoformat(),
                    "session_id": "old",
                    "source": "customer",
                    "kind": "message",
                    "offset": n,
                    "correlation_id": f"trace-{n}",
                    "data": {"message": f"{n}", "participant": {}, "utterances": [["id", "u"]]},
                    "deleted": False,
                }
            )
    with pytest.raises(MigrationRequired):
        async with parlant_stores(url, migrate=False):
            pass
    async with parlant_stores(url) as stores:
        store, session = stores.session_store, SessionId("old")
        assert (await store.read_session(session)).labels == set()
        (event,) = await store.list_events(session, trace_id="trace-1")
        assert cast(Any, event.data)["canned_responses"] == [["id", "u"]]
        assert (await say(store, session, "and on")).offset == 3
        found = await store.list_events(session, kinds=[EventKind.MESSAGE], min_offset=2)
        assert [event.offset for event in found] == [2, 3]


# --- where they are ------------------------------------------------------------------------------


async def tables_of(url: str, schema: str | None = None) -> set[str]:
    async with engine_for(url) as engine, engine.connect() as conn:
        return set(await conn.run_sync(lambda sync: inspect(sync).get_table_names(schema=schema)))


@pytest.mark.parametrize("kind", ["postgresql"])
async def test_tables_may_be_in_a_schema_of_their_own(url: str) -> None:
    async with parlant_stores(url, schema="bots") as stores:
        await introduce(stores)
        await converse(stores, CustomerId("ann"))
    assert await tables_of(url, "bots") == TABLES
    assert await tables_of(url) == set()
    async with parlant_stores(url, schema="bots", create=False) as stores:
        found = await everything(stores)
    assert [len(found[name]) for name in found] == [1, 1, 2, 2, 2]


@on_each
async def test_they_share_the_applications_engine_and_leave_it_open(url: str) -> None:
    sizes = {} if url.startswith("sqlite") else {"pool_size": 1, "max_overflow": 0}
    async with engine_for(url, **sizes) as engine:
        async with parlant_stores(engine) as stores:
            await introduce(stores)
            await asyncio.gather(*(converse(stores, CustomerId("ann")) for _ in range(3)))
        async with parlant_stores(engine, migrate=False) as stores:
            assert len(await stores.session_store.list_sessions()) == 3
            assert len(await stores.customer_store.list_customers()) == 3
            assert len(await stores.variable_store.list_variables()) == 2
        assert cast(Any, engine.pool).checkedout() == 0


@on_each
async def test_nothing_is_made_where_nothing_may_be(url: str) -> None:
    with pytest.raises(SchemaError, match="parlant_sessions_metadata is missing"):
        async with parlant_stores(url, create=False):
            pass
    if not url.startswith("sqlite"):
        assert await tables_of(url) == set()


MEMORY = ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite:///file:x?mode=memory&uri=true"]


@pytest.mark.parametrize("place", [None, "", *MEMORY, make_url("sqlite://")])
async def test_a_place_that_forgets_is_refused(place: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"sqlite:///parlant\.db .* postgresql://"):
        async with parlant_stores(place):
            pass


async def test_an_engine_that_forgets_is_refused() -> None:
    async with engine_for("sqlite://") as engine:
        with pytest.raises(ConfigurationError, match="gone when the process ends"):
            async with parlant_stores(engine):
                pass


async def test_a_bad_url_or_option_is_refused_without_its_password() -> None:
    for place, options in (
        ("nonsense", {}),
        ("postgresql+psycopg2://ann:secret@host/db", {}),
        *(
            ("postgresql://ann:secret@host/db", {option: value})
            for option, value in (
                ("pooler", "session"),
                ("migrate", "off"),
                ("create", "no"),
                ("retry_window", "soon"),
                ("schema", 5),
                ("schema", ""),
                ("prefix", "x"),
            )
        ),
    ):
        with pytest.raises(ConfigurationError) as caught:
            async with parlant_stores(place, **cast(Any, options)):
                pass
        assert "secret" not in str(caught.value)


@on_each
async def test_parlants_own_stores_use_the_same_tables(url: str) -> None:
    """Who comes from Parlant's own stores over `SQLDocumentDatabase`, or goes, loses nothing."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(
            SQLDocumentDatabase(url, prefix="parlant_sessions_")
        )
        own = ParlantStores(
            await stack.enter_async_context(SessionDocumentStore(database)),
            await stack.enter_async_context(
                CustomerDocumentStore(IdGenerator(), database.sharing("parlant_customers_"))
            ),
            await stack.enter_async_context(
                ContextVariableDocumentStore(
                    IdGenerator(), database.sharing("parlant_context_variables_")
                )
            ),
        )
        await introduce(own)
        await converse(own, CustomerId("ann"))
        expected = await everything(own)
    async with parlant_stores(url, migrate=False) as stores:
        assert await everything(stores) == expected
        await introduce(stores)
        assert await everything(stores) == expected
    async with SQLDocumentDatabase(url, prefix="parlant_sessions_") as database:
        metadata = await database.get_collection(
            "metadata", MetadataDocument, identity_loader_for(MetadataDocument)
        )
        assert (await metadata.find({})).total_count == 1
