"""`SQLDocumentDatabase` on every database: Parlant's contract, and what it promises beyond."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("parlant")

import document_workers
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection
from parlant.core.persistence.document_database import (
    CollectionIndex,
    DocumentDatabase,
    identity_loader_for,
)
from proxy import Proxy
from servers import unique_name
from sqlalchemy.ext.asyncio import AsyncEngine
from workers import Crew

from adk_sessions import AlreadyExistsError, ConfigurationError, InvalidInputError
from adk_sessions.parlant import SQLDocumentDatabase
from adk_sessions.parlant.filters import Filter
from adk_sessions.testing import DocumentDatabaseContract
from adk_sessions.testing.documents import ODD, Thing, thing
from adk_sessions.url import create_engine

SOAK = os.environ.get("ADK_SESSIONS_SOAK") == "1"
# a pooler passes on the same statements, and has a test of its own below
KINDS = ["sqlite", "sqlite-memory", "postgresql", "mariadb", *(["pgbouncer"] if SOAK else [])]
FIXTURES = {
    "postgresql": "postgres_url",
    "mariadb": "mariadb_url",
    "pgbouncer": "pgbouncer_url",
}


def url_of(kind: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> str:
    """A server's database is shared by the session: names in it are each test's own."""
    fixture = FIXTURES.get(kind)
    url = request.getfixturevalue(fixture) if fixture else fresh_database(kind)
    return f"{url}?pgbouncer=true" if kind == "pgbouncer" else str(url)


class TestContract(DocumentDatabaseContract):
    @pytest.fixture(params=KINDS)
    def kind(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def new_database(
        self, kind: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
    ) -> Callable[[], DocumentDatabase]:
        url = url_of(kind, request, fresh_database)
        if kind != "sqlite-memory":
            return lambda: SQLDocumentDatabase(url, prefix="p_")
        memory = SQLDocumentDatabase(url, prefix="p_")
        return lambda: memory.sharing("p_")


class TestTransient(DocumentDatabaseContract):
    """The kit asks for no more than Parlant's own database gives, but where it says so."""

    lacks = frozenset({"copies", "loader", "lenient filters", "unique ids", "typed"})

    @pytest.fixture
    def new_database(self) -> Callable[[], DocumentDatabase]:
        transient = TransientDocumentDatabase()
        return lambda: transient


# --- the same as Parlant's own database, whatever is asked ---------------------------------------

WORDS = ["", "Ann", "ann", "Ann ", "Änn", "x" * 300, "a\0b", "\ud800", "adk_sessions:", "😀"]
NUMBERS = [-1, 0, 1, 10, 2**62, 2**63 - 1]
RATIOS = [-1.5, 0.0, 1.0, 10.0, 1e300, 2**53 + 1, math.inf]
OPERANDS: dict[str, list[Any]] = {
    "id": ["i00", "i07", "i7", "zz", "", "x" * 300],
    "creation_utc": ["2026", "2027", "2027\0", ""],
    "name": WORDS,
    "number": [*NUMBERS, 10.0, 0.5, True, 2**70, -(2**70)],
    "ratio": [*RATIOS, 10, 0.5, -math.inf],
    "flag": [True, False, 0, 1],
    "note": [None, "", "n"],
    ODD: [1, 2.5, "a"],
}
ORDERED = ("name", "number", "ratio", "id", "creation_utc", "flag")
tests = st.sampled_from(sorted(OPERANDS)).flatmap(
    lambda field: (
        st.dictionaries(
            st.sampled_from(
                ["$eq", "$ne", *(["$gt", "$gte", "$lt", "$lte"] if field in ORDERED else [])]
            ),
            st.sampled_from(OPERANDS[field]),
            max_size=2,
        ).map(lambda found: {field: found})
        | st.dictionaries(
            st.sampled_from(["$in", "$nin"]), st.lists(st.sampled_from(OPERANDS[field]), max_size=4)
        ).map(lambda found: {field: found})
    )
)
filters: Any = st.recursive(
    tests,
    lambda inner: st.dictionaries(st.sampled_from(["$and", "$or"]), st.lists(inner, max_size=3)),
    max_leaves=6,
)
pages = st.tuples(
    st.none() | st.integers(0, 5),
    st.none()
    | st.builds(Cursor, st.sampled_from(["2026", "2027", "2026\0"]), st.sampled_from(["", "i07"])),
    st.sampled_from([None, SortDirection.ASC, SortDirection.DESC]),
)
sorts = st.none() | st.lists(
    st.tuples(st.sampled_from(["name", "number", "flag", "id"]), st.sampled_from(SortDirection)),
    max_size=2,
)


def population() -> list[Any]:
    choose = random.Random(7)
    return [
        thing(
            f"i{n * 5 % 12:02}",
            creation_utc=choose.choice(["2026", "2027"]),
            **{key: choose.choice(OPERANDS[key]) for key in ("name", "flag", "note", ODD)},
            number=choose.choice(NUMBERS),
            ratio=RATIOS[n % len(RATIOS)],
        )
        | {"flag": n % 3 == 0}
        for n in range(12)
    ]


def fast(url: str) -> dict[str, Any]:
    """Options for a database whose power will not fail."""
    return {"sqlite_synchronous": "NORMAL"} if url.startswith("sqlite") else {}


class Pair:
    """A collection of ours and one of Parlant's, with the loop that they live in."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self.url, self.run = url, runner.run

    async def fill(self, documents: list[Any]) -> None:
        self.database = SQLDocumentDatabase(self.url, prefix=f"{unique_name()}_", **fast(self.url))
        self.ours: Any = await self.database.create_collection("things", Thing)
        self.parlants: Any = await TransientDocumentDatabase().create_collection("things", Thing)
        for document in documents:
            await self.ours.insert_one(document)
            await self.parlants.insert_one(dict(document))

    async def empty(self) -> None:
        await self.ours.run(lambda conn: conn.execute(self.ours.table.delete()), write=True)
        self.parlants._documents.clear()

    async def both(self, call: Callable[[Any], Any]) -> None:
        """The same call of both has the same result."""
        assert await call(self.ours) == await call(self.parlants)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def pair(request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> Iterator[Pair]:
    url = url_of(request.param, request, fresh_database)
    with asyncio.Runner() as runner:
        pair = Pair(url, runner)
        runner.run(pair.fill(population()))
        yield pair
        runner.run(pair.database.close())


EXAMPLES = settings(
    deadline=None,
    phases=[phase for phase in Phase if phase is not Phase.shrink],  # a server makes it take hours
    max_examples=2000 if SOAK else 60,
    derandomize=not SOAK,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@EXAMPLES
@given(where=filters, page=pages, sort=sorts)
def test_filters_find_what_parlants_own_database_finds(
    pair: Pair, where: Any, page: Any, sort: Any
) -> None:
    async def compare() -> None:
        await pair.both(lambda things: things.find(where, *page))
        await pair.both(lambda things: things.find_one(where, sort))

    pair.run(compare())


calls = st.one_of(
    st.tuples(st.just("insert"), filters, st.integers(0, 30)),
    st.tuples(st.just("update"), filters, st.sampled_from(WORDS)),
    st.tuples(st.just("change id"), filters, st.integers(40, 90)),
    st.tuples(st.just("upsert"), st.sampled_from(WORDS), st.integers(100, 130)),
    st.tuples(st.just("delete"), filters, st.none()),
)


@settings(EXAMPLES, max_examples=EXAMPLES.max_examples // 6)
@given(made=st.lists(calls, max_size=8))
def test_changes_leave_what_they_leave_in_parlants_own_database(
    pair: Pair, made: list[tuple[str, Any, Any]]
) -> None:
    async def change() -> None:
        await pair.empty()
        for document in population()[:4]:
            await pair.both(lambda things, one=document: things.insert_one(dict(one)))
        for what, where, value in made:
            taken = {document["id"] for document in await pair.parlants.find({})}
            new = thing(f"i{value}", number=value, **{ODD: 1}) if isinstance(value, int) else None
            if new and new["id"] in taken:
                continue  # ids that repeat are the kit's
            if what == "insert":
                await pair.both(lambda things, new=new: things.insert_one(dict(new)))
            elif what == "delete":
                await pair.both(lambda things, where=where: things.delete_one(where))
            elif what == "upsert":
                new = {**new, "name": where}
                where = {"name": {"$eq": where}}
                await pair.both(lambda t, w=where, p=new: t.update_one(w, dict(p), upsert=True))
            else:
                params = {"name": value, "flag": True} if what == "update" else {"id": new["id"]}
                await pair.both(lambda t, w=where, p=params: t.update_one(w, p))
            await pair.both(lambda things: things.find({}))
            await pair.both(lambda things: things.find_one({"flag": {"$eq": True}}))

    pair.run(change())


# --- several processes ---------------------------------------------------------------------------

PROCESSES = 4
SERVERS = ["sqlite", "postgresql", "mariadb"]


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(PROCESSES, script=document_workers.__file__) as crew:
        yield crew


@pytest.fixture
def url(request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> str:
    """Of the kind that the test is parametrized with; a server's database is shared."""
    return url_of(request.param, request, fresh_database)


@pytest.mark.parametrize("url", SERVERS, indirect=True)
async def test_what_processes_change_at_once_all_stays(crew: Crew, url: str) -> None:
    prefix, writers = f"{unique_name()}_", [f"w{n}" for n in range(PROCESSES)]
    async with SQLDocumentDatabase(url, prefix=prefix, **fast(url)) as database:
        things = await database.create_collection("things", Thing)
        await things.insert_one(thing("a"))
        crew.run("open", [{"url": url, "prefix": prefix, **fast(url)}] * PROCESSES)
        crew.run("start", [{"names": ["things"]}] * PROCESSES)
        crew.run("change", [{"id": "a", "writer": w, "times": 25} for w in writers])
        keys = {f"{writer}-{n}": n for writer in writers for n in range(25)}
        assert await things.find_one({}) == thing("a", number=100, **keys)
        # what only some of them may do
        new = crew.run("upsert", [{"writer": w, "keys": 10} for w in writers])
        assert sum(new) == 10
        names = [each["name"] for each in await things.find({"id": {"$ne": "a"}})]
        assert sorted(names) == sorted(f"key-{n}" for n in range(10))
        crew.run("insert", [{"ids": ["x", "y"], "name": writer} for writer in writers])
        assert (await things.find({"id": {"$in": ["x", "y"]}})).total_count == 2
        gone = crew.run("delete", [{"times": 4}] * PROCESSES)
        assert len({id for ids in gone for id in ids}) == sum(map(len, gone)) == 13
        assert (await things.find({})).total_count == 0
        crew.close()


# --- engines of the host ------------------------------------------------------------------------

ENGINES: list[Any] = [
    pytest.param("sqlite", {}, id="sqlite"),
    *[
        pytest.param(kind, {"isolation_level": level}, id=f"{kind} {level.lower()}")
        for kind, levels in {
            "postgresql": ("AUTOCOMMIT", "SERIALIZABLE"),
            "mariadb": ("AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"),
        }.items()
        for level in levels
    ],
]


@pytest.fixture
async def engine(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[Any]:
    kind, options = request.param
    engine = create_engine(url_of(kind, request, fresh_database), **options)
    yield engine
    await engine.dispose()


@pytest.mark.parametrize(
    "engine", [one.values for one in ENGINES], indirect=True, ids=[one.id for one in ENGINES]
)
async def test_an_engine_of_the_host_does_as_well(engine: AsyncEngine) -> None:
    prefix = f"{unique_name()}_"
    databases = [SQLDocumentDatabase(engine, prefix=prefix) for _ in range(2)]
    both: list[Any] = [await d.create_collection("things", Thing) for d in databases]
    things = both[0]
    for document in population():
        await things.insert_one(document)
        await things.insert_one({**document, "name": "another"})
    assert (await things.find({}, limit=5)).total_count == 12
    key: Any = {"id": {"$eq": "i00"}}
    await asyncio.gather(
        *(both[n % 2].update_one(key, {f"k{n}": n}) for n in range(12)),
        *(
            both[n % 2].modify(key, lambda now: {**now, "data": (now["data"] or 0) + 1})
            for n in range(12)
        ),
    )
    first: Any = await things.find_one(key)
    assert first["data"] == 12
    assert first.keys() >= {f"k{n}" for n in range(12)}
    results = await asyncio.gather(
        *(
            both[n % 2].update_one(
                {"name": {"$eq": "new"}}, thing(f"n{n}", name="new"), upsert=True
            )
            for n in range(8)
        )
    )
    assert sum(result.matched_count for result in results) == 7
    taken = await things.update_one({"name": {"$eq": "new"}}, {"id": "i00", "note": "kept"})
    assert taken.updated_document["note"] == "kept"
    assert (await things.find({"id": {"$eq": "i00"}})).total_count == 1

    def half(conn: sa.Connection) -> None:
        conn.execute(sa.insert(things.table), things.row(thing("half")))
        raise ZeroDivisionError

    for lock in (None, things.table):
        with pytest.raises(ZeroDivisionError):
            await things._place.transact(half, lock=lock)
    assert await things.find_one({"id": {"$eq": "half"}}) is None
    await things.ensure_indexes([CollectionIndex((("name", SortDirection.ASC),))])
    for database in databases:
        await database.close()
    async with engine.connect() as connection:  # it is the host's, and open
        count = await connection.execute(sa.select(sa.func.count()).select_from(things.table))
        assert count.scalar() == 13


async def test_a_pooler_may_be_in_between(pgbouncer_url: str) -> None:
    url = f"{pgbouncer_url}?pgbouncer=true"
    for _ in range(2):
        async with SQLDocumentDatabase(url, prefix="pooled_") as database:
            things: Any = await database.get_or_create_collection(
                "things", Thing, identity_loader_for(Thing)
            )
            await things.ensure_indexes([CollectionIndex((("name", SortDirection.ASC),))])
            await asyncio.gather(
                *(
                    things.update_one({"name": {"$eq": "a"}}, thing("a", name="a"), upsert=True)
                    for _ in range(5)
                )
            )
            await asyncio.gather(
                *(things.update_one({"name": {"$eq": "a"}}, {f"k{n}": n}) for n in range(10))
            )
            assert [len(one) for one in await things.find({})] == [len(thing("a")) + 10]
    async with SQLDocumentDatabase(url, prefix="pooled_") as database:
        await database.delete_collection("things")


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_collections_may_be_in_a_schema_of_their_own(url: str) -> None:
    schema = unique_name()
    async with SQLDocumentDatabase(url, schema=schema) as database:
        things: Any = await database.create_collection("things", Thing)
        await things.insert_one(thing("a"))
        await things.ensure_indexes([CollectionIndex((("name", SortDirection.ASC),))])
        assert things.table.fullname == f"{schema}.things"
        assert await things.run(lambda conn: sa.inspect(conn).get_table_names(schema), write=False)
    async with SQLDocumentDatabase(url, schema=schema, create=False) as database:
        things = await database.get_collection("things", Thing, identity_loader_for(Thing))
        assert (await things.find_one({}))["id"] == "a"
        ordered = sa.text(
            "SELECT column_name FROM information_schema.columns"
            " WHERE table_schema = :schema AND collation_name = 'C'"
        )  # whatever the database's own order is
        found = await things.run(
            lambda conn: set(conn.scalars(ordered, {"schema": schema})), write=False
        )
        assert found == {"id", "creation_utc", "version", "name", "note"}
    with pytest.raises(ConfigurationError, match="prefix="):
        SQLDocumentDatabase("sqlite://", schema="x")


# --- indexes are used ----------------------------------------------------------------------------

HOT: list[tuple[Any, str]] = [
    ({"id": {"$eq": "i5"}}, "id"),
    ({"$or": [{"id": {"$eq": "i5"}}, {"id": {"$eq": "i6"}}]}, "id"),
    ({"name": {"$eq": "n7"}}, "name"),
    ({"name": {"$eq": "n7"}, "number": {"$gte": 3}}, "name_number"),
    ({"name": {"$eq": "n7"}, ODD: {"$ne": 3}}, "name"),
]


async def explained(engine: AsyncEngine, call: Callable[[], Any]) -> str:
    """What the database says of how it does the statements of a call."""
    said: list[tuple[str, Any]] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            said.append((statement, parameters))

    sa.event.listen(engine.sync_engine, "before_cursor_execute", note)
    await call()
    sa.event.remove(engine.sync_engine, "before_cursor_execute", note)
    kind = engine.dialect.name
    lines = []
    async with engine.connect() as connection:
        for statement, parameters in said:
            how = "EXPLAIN QUERY PLAN" if kind == "sqlite" else "EXPLAIN"
            rows = await connection.exec_driver_sql(f"{how} {statement}", parameters)
            lines += [" ".join(map(str, row)) for row in rows]
    return "\n".join(lines)


@pytest.mark.parametrize("engine", [(kind, {}) for kind in SERVERS], indirect=True, ids=SERVERS)
async def test_indexes_find_what_filters_ask_for(engine: AsyncEngine) -> None:
    database = SQLDocumentDatabase(engine, prefix=f"{unique_name()}_")
    things: Any = await database.create_collection("things", Thing)
    up = SortDirection.ASC
    await things.ensure_indexes(
        [CollectionIndex((("name", up),)), CollectionIndex((("name", up), ("number", up)))]
    )
    rows = [
        things.row(
            thing(
                f"i{n}", creation_utc=f"{n // 4:06}", name=f"n{n % 200}", number=n % 9, **{ODD: 1}
            )
        )
        for n in range(3000)
    ]
    await things.run(lambda conn: conn.execute(sa.insert(things.table), rows), write=True)
    async with engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            analyze = "ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE TABLE"
            await connection.exec_driver_sql(f"{analyze} {things.table.name}")
        await connection.commit()

    async def plan(call: Callable[[], Any]) -> str:
        said = await explained(engine, call)
        assert "Seq Scan" not in said, said
        assert "SCAN " not in said.replace("SCAN (", ""), said
        assert " ALL " not in said, said
        assert things.table.name in said
        return said

    for where, index in HOT:
        for call in (
            lambda w=where: things.find(w),
            lambda w=where: things.find_one(w),
            lambda w=where: things.find(w, limit=5),
            lambda w=where: things.update_one(w, {"note": "n"}),
        ):
            said = await plan(call)
            assert f"{things.table.name}_{index}" in said
    cursor = Cursor("000500", ObjectId("i2001"))
    for way in SortDirection:
        said = await explained(engine, lambda w=way: things.find({}, 5, cursor, w))
        assert f"{things.table.name}_creation_utc_id" in said
        assert "filesort" not in said
        assert "Sort" not in said
        assert "TEMP B-TREE" not in said
    await database.delete_collection("things")


async def test_a_list_of_ids_is_one_condition(things: Any) -> None:
    for where in (
        {"$or": [{"id": {"$eq": f"i{n}"}} for n in range(5000)]},
        {"$and": [{"id": {"$ne": f"i{n}"}} for n in range(5000)]},
    ):
        narrowed = Filter(things._columns, where)
        assert narrowed.exact
        assert len(str(narrowed.condition)) < 200


def nested(depth: int, width: int = 1) -> Any:
    """A filter that only a number of 1 matches."""
    where: Any = {"number": {"$eq": 1}}
    for n in range(depth):
        if n % 2:
            where = {"$or": [where, *({"number": {"$gt": 99 + m}} for m in range(width))]}
        else:
            where = {"$and": [where, *({"number": {"$lt": 99 + m}} for m in range(width))]}
    return where


@pytest.mark.parametrize("url", SERVERS, indirect=True)
async def test_a_filter_of_many_levels_is_answered_or_refused(url: str) -> None:
    async with SQLDocumentDatabase(url, prefix=f"{unique_name()}_") as database:
        things: Any = await database.create_collection("things", Thing)
        for n in range(3):
            await things.insert_one(thing(f"i{n}", number=n))
        for where in (nested(19), nested(21), nested(100), nested(6, 200)):
            assert (await things.find_one(where))["id"] == "i1"
            assert [one["id"] for one in await things.find(where, 5)] == ["i1"]
        for depth in (101, 5000):
            with pytest.raises(InvalidInputError) as refused:
                await things.find(nested(depth))
            assert refused.value.field == "filters"


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
async def things() -> AsyncIterator[Any]:
    async with SQLDocumentDatabase("sqlite://") as database:
        yield await database.create_collection("things", Thing)


@pytest.mark.parametrize("bad", ["x" * 256, "a\0", "\ud800", "adk_sessions:", "😀" * 151])
@pytest.mark.parametrize("key", ["id", "creation_utc"])
async def test_what_pages_are_ordered_by_must_fit_its_column(
    things: Any, key: str, bad: str
) -> None:
    await things.insert_one(thing("a"))
    for call in (
        things.insert_one({**thing("b"), key: bad}),
        things.update_one({}, {key: bad}),
        things.update_one({"id": {"$eq": "?"}}, {**thing("b"), key: bad}, upsert=True),
    ):
        with pytest.raises(InvalidInputError) as refused:
            await call
        assert refused.value.field == key
        assert bad not in str(refused.value)
    assert (await things.find({})).items == [thing("a")]


@pytest.mark.parametrize(
    ("schema", "name", "field"),
    [(Thing, "", "name"), (Thing, "a\0b", "name"), (Thing, None, "name"), (dict, "a", "schema")],
)
async def test_what_cannot_be_a_collection_is_refused(schema: Any, name: Any, field: str) -> None:
    async with SQLDocumentDatabase("sqlite://") as database:
        with pytest.raises(InvalidInputError) as refused:
            await database.get_or_create_collection(name, schema, identity_loader_for(schema))
        assert refused.value.field == field


@pytest.mark.parametrize("limit", [-1, "5", 1.0])
async def test_what_is_no_limit_is_refused(things: Any, limit: Any) -> None:
    with pytest.raises(InvalidInputError):
        await things.find({}, limit=limit)


async def test_what_contains_itself_is_refused(things: Any) -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(InvalidInputError):
        await things.insert_one(thing("a", data=circle))
    assert (await things.find({})).total_count == 0


@pytest.mark.parametrize("url", ["mariadb"], indirect=True)
async def test_a_document_larger_than_a_packet_is_refused(url: str) -> None:
    async with SQLDocumentDatabase(url, prefix=f"{unique_name()}_") as database:
        things: Any = await database.create_collection("things", Thing)
        most = await things.run(
            lambda conn: conn.scalar(sa.text("SELECT @@max_allowed_packet")), write=False
        )
        with pytest.raises(InvalidInputError, match="max_allowed_packet"):
            await things.insert_one(thing("a", data="x" * most))
        await things.insert_one(thing("a"))
        with pytest.raises(InvalidInputError, match="max_allowed_packet"):
            await things.update_one({}, {"data": "x" * most})
        assert await things.find_one({}) == thing("a")
        await database.delete_collection("things")


@pytest.mark.parametrize("url", ["postgresql", "mariadb"], indirect=True)
async def test_what_wrote_nothing_is_repeated_however_it_ended(url: str) -> None:
    address = sa.make_url(url)
    port = address.port or {"postgresql": 5432}.get(address.get_backend_name(), 3306)
    async with Proxy(address.host or "127.0.0.1", port) as way:
        through = address.set(host="127.0.0.1", port=way.port)
        async with SQLDocumentDatabase(
            through, prefix=f"{unique_name()}_", pool_size=1
        ) as database:
            things: Any = await database.create_collection("things", Thing)
            for n in range(1, 6):
                await things.find({})
                way.cut_exchange(n, lose="request")
                new = thing(f"i{n}", number=n)
                await things.update_one({"number": {"$eq": n}}, new, upsert=True)
            for n in range(1, 4):
                await things.find({})
                way.cut_exchange(n, lose="request")
                assert (await things.delete_one({"id": {"$eq": "?"}})).deleted_count == 0
            assert (await things.find({})).total_count == 5


async def test_an_upsert_leaves_a_hosts_connection_as_it_was(mariadb_url: str) -> None:
    engine = create_engine(
        mariadb_url,
        pool_size=1,
        max_overflow=0,
        connect_args={"init_command": "SET lock_wait_timeout = 77"},
    )
    async with SQLDocumentDatabase(engine, prefix=f"{unique_name()}_") as database:
        things: Any = await database.create_collection("things", Thing)
        assert (await things.update_one({}, thing("a"), upsert=True)).matched_count == 0
    async with engine.connect() as connection:
        assert await connection.scalar(sa.text("SELECT @@lock_wait_timeout")) == 77
    await engine.dispose()


async def test_a_schema_is_the_same_whether_it_is_named_or_not(postgres_url: str) -> None:
    prefix = f"{unique_name()}_"
    async with (
        SQLDocumentDatabase(postgres_url, prefix=prefix) as first,
        SQLDocumentDatabase(postgres_url, prefix=prefix, schema="public") as second,
    ):
        both: list[Any] = [await one.create_collection("things", Thing) for one in (first, second)]
        for n in range(5):
            key: Any = {"name": {"$eq": f"n{n}"}}
            added = [
                one.update_one(key, thing(f"{n}-{m}-{i}", name=f"n{n}"), upsert=True)
                for m, one in enumerate(both)
                for i in range(4)
            ]
            await asyncio.gather(*added)
        assert (await both[0].find({})).total_count == 5


async def test_a_change_that_raises_changes_nothing(things: Any) -> None:
    await things.insert_one(thing("a"))

    def change(now: dict[str, Any]) -> dict[str, Any]:
        now["name"] = "changed"
        raise KeyError("no")

    with pytest.raises(KeyError):
        await things.modify({}, change)
    assert await things.modify({"id": {"$eq": "?"}}, change) is None
    assert await things.find_one({}) == thing("a")


@pytest.mark.parametrize("url", SERVERS, indirect=True)
async def test_a_unique_index_is_kept(url: str) -> None:
    async with SQLDocumentDatabase(url, prefix=f"{unique_name()}_") as database:
        things: Any = await database.create_collection("things", Thing)
        up = SortDirection.ASC
        await things.ensure_indexes([CollectionIndex((("name", up), ("note", up)), unique=True)])
        long = "n" * 400
        await things.insert_one(thing("a", name=long, note="x"))
        await things.insert_one(thing("b", name=long, note="y"))
        other = thing("c", name=long, note="x")
        for call in (
            lambda: things.insert_one(other),
            lambda: things.update_one({"id": {"$eq": "b"}}, {"note": "x"}),
            lambda: things.update_one({"id": {"$eq": "c"}}, other, upsert=True),
        ):
            with pytest.raises(AlreadyExistsError):
                await call()
        assert [(one["id"], one["note"]) for one in await things.find({})] == [
            ("a", "x"),
            ("b", "y"),
        ]
        await database.delete_collection("things")


async def test_others_share_the_engine(fresh_database: Callable[[str], str]) -> None:
    async with SQLDocumentDatabase(fresh_database("sqlite"), prefix="a_") as one:
        async with one.sharing("b_") as other:
            collections = [await each.create_collection("things", Thing) for each in (one, other)]
            await collections[1].insert_one(thing("b"))
        assert await collections[0].find_one({}) is None
        assert await collections[1].find_one({}) == thing("b")
    assert [each.table.name for each in collections] == ["a_things", "b_things"]
