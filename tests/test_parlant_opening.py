"""Opening a collection: first starts at once, new keys, older documents, what is missing."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal, NewType, NotRequired, Optional, Required, TypedDict

import pytest

pytest.importorskip("parlant")

import document_workers
import sqlalchemy as sa
from document_workers import Renamed, renamed
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, SortDirection
from parlant.core.persistence.document_database import (
    BaseDocument,
    CollectionIndex,
    identity_loader_for,
)
from servers import unique_name
from sqlalchemy.ext.asyncio import AsyncEngine
from workers import Crew

from adk_sessions import SchemaError
from adk_sessions.parlant import SQLDocumentDatabase, opening
from adk_sessions.parlant.columns import kinds_of
from adk_sessions.testing.documents import Thing, thing
from adk_sessions.url import create_engine

PROCESSES = 4
KINDS = ["sqlite", "postgresql", "mariadb"]

same: Any = identity_loader_for(Thing)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(PROCESSES, script=document_workers.__file__) as crew:
        yield crew


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> str:
    """A server's database is shared by the session, so tables have prefixes of their own."""
    fixture = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}.get(request.param)
    return str(request.getfixturevalue(fixture) if fixture else fresh_database(request.param))


@pytest.fixture
def prefix() -> str:
    return f"{unique_name()}_"


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(url)
    yield engine
    await engine.dispose()


class Statements:
    """What goes to an engine's database while it is entered."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.sync_engine
        self.said: list[tuple[str, Any]] = []

    def __enter__(self) -> Statements:
        sa.event.listen(self._engine, "before_cursor_execute", self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sa.event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        self.said.append((statement, parameters))

    def starting(self, *words: str) -> list[str]:
        return [said for said, _ in self.said if said.lstrip().upper().startswith(words)]


async def filled(database: SQLDocumentDatabase, documents: list[Any]) -> Any:
    """A collection with documents, put there as fast as can be."""
    things: Any = await database.create_collection("things", Thing)
    rows = [things.row(document) for document in documents]
    await things.run_once(lambda conn: conn.execute(sa.insert(things.table), rows))
    return things


async def kept(things: Any) -> list[tuple[Any, ...]]:
    """What is in the table of rejected documents."""
    failed = sa.table(
        f"{things.table.name}_failed_migrations",
        *map(sa.column, ("id", "creation_utc", "version", "document", "seq")),
    )
    query = sa.select(failed.c.id, failed.c.version, failed.c.document).order_by(failed.c.seq)
    return [tuple(row) for row in await things.run(lambda c: c.execute(query).all(), write=False)]


# --- the first start -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_processes_may_start_at_once_on_nothing(
    crew: Crew, kind: str, fresh_database: Callable[[str], str]
) -> None:
    long = "variable_tag_associations_" + "x" * 40
    for _ in range(2):
        url = fresh_database(kind)
        crew.open(url, prefix="parlant_")
        first = crew.run("start", [{"names": ["one", "two", long]}] * PROCESSES)
        assert len(set(first)) == 1  # one metadata document, whoever was first
        crew.close()
        crew.open(url, prefix="parlant_")
        assert crew.run("start", [{"names": ["one", "two", long]}] * PROCESSES) == first
        crew.close()


async def test_a_store_has_one_metadata_document(url: str, prefix: str) -> None:
    async with AsyncExitStack() as stack:
        opened: list[Any] = []
        for _ in range(PROCESSES):
            database = await stack.enter_async_context(SQLDocumentDatabase(url, prefix=prefix))
            opened.append(
                await database.get_or_create_collection(
                    "metadata", BaseDocument, identity_loader_for(BaseDocument)
                )
            )
        # each has looked, and found none
        await asyncio.gather(
            *(
                one.insert_one({"id": str(n), "creation_utc": "2026", "version": "1"})
                for n, one in enumerate(opened)
            )
        )
        assert (await opened[0].find({})).total_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_processes_may_start_the_next_version_at_once(
    crew: Crew, kind: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)

    async def fill() -> None:
        async with SQLDocumentDatabase(url, prefix="p_") as database:
            await filled(database, [thing(f"i{n}", number=n - 5) for n in range(450)])

    async def check() -> None:
        async with SQLDocumentDatabase(url, prefix="p_", create=False) as database:
            things: Any = await database.get_collection("things", Renamed, renamed)
            found = await things.find({"label": {"$eq": "label 300"}, "version": {"$eq": "0.2.0"}})
            assert [one["id"] for one in found] == ["i305"]
            assert (await things.find({"label": {"$ne": None}})).total_count == 445
            assert {id for id, *_ in await kept(things)} == {f"i{n}" for n in range(5)}
            assert len(await kept(things)) == 5

    asyncio.run(fill())
    crew.open(url, prefix="p_")
    crew.run("start", [{"names": ["things"], "next_version": True}] * PROCESSES)
    crew.close()
    asyncio.run(check())


async def test_what_a_start_that_was_cut_off_has_left_is_completed(
    engine: AsyncEngine, prefix: str
) -> None:
    database = SQLDocumentDatabase(engine, prefix=prefix)
    things = await filled(database, [thing("a")])
    index = next(i for i in things.table.indexes if i.name.endswith("_creation_utc_id"))
    await things.run(lambda conn: index.drop(conn), write=True)
    again: Any = await database.get_or_create_collection("things", Thing, same)
    shape = await database._place.shape(again.table)
    assert shape is not None
    assert index.name in shape.indexes
    with Statements(engine) as statements:
        await database.get_or_create_collection("things", Thing, same)
        await again.ensure_indexes([CollectionIndex((("creation_utc", SortDirection.ASC),))])
        await again.ensure_indexes([CollectionIndex((("creation_utc", SortDirection.DESC),))])
    assert len(statements.starting("CREATE")) == 1
    await database.delete_collection("things")


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_names_are_verbatim_unless_they_are_too_long(url: str) -> None:
    name = "variable_tag_associations_failed_migrations"
    async with SQLDocumentDatabase(url, prefix="parlant_context_variables_") as database:
        for each in ("values", 'it\'s "odd" %s', name):
            things: Any = await database.create_collection(each, Thing)
            await things.insert_one(thing(each))
            assert (await things.find_one({}))["id"] == each
            table = f"parlant_context_variables_{each}"
            assert things.table.name == (table if len(table) < 64 else things.table.name)
    assert len(things.table.name) == 63
    assert things.table.name.startswith(f"parlant_context_variables_{name}"[:54] + "_")


Id = NewType("Id", ObjectId)


class Kinds(TypedDict):
    id: ObjectId
    nested: Id
    optional: Optional[int]  # noqa: UP045
    either: bool | None
    needed: Required[float]
    maybe: NotRequired[Version.String | None]
    choice: Literal["a", "b", None]
    several: int | str
    mixed: Literal["a", 1]
    items: list[str]
    anything: Any
    SEQ: int
    Either: str
    document: str


class Clashing(TypedDict):
    ID: int
    id: ObjectId
    a__filling: str


def test_a_key_has_a_column_if_it_is_one_scalar() -> None:
    assert kinds_of(Kinds) == {
        **{"id": str, "nested": str, "optional": int, "either": bool, "needed": float},
        **{"maybe": str, "choice": str},
    }
    assert kinds_of(Clashing) == {"id": str}
    odd = TypedDict("odd", {"a b": int, "x" * 50: int, "y" * 51: int, 'q"': int, "1a": int})  # type: ignore[misc]
    assert kinds_of(odd) == {"x" * 50: int}


# --- nothing is read that need not be ------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_opening_many_current_documents_reads_one_of_them(
    engine: AsyncEngine, prefix: str
) -> None:
    await assert_opening_reads_one_of_each_version(engine, prefix, 200_000)


@pytest.mark.parametrize("url", ["postgresql", "mariadb"], indirect=True)
async def test_opening_reads_one_document_of_each_version(engine: AsyncEngine, prefix: str) -> None:
    await assert_opening_reads_one_of_each_version(engine, prefix, 4000)


async def assert_opening_reads_one_of_each_version(
    engine: AsyncEngine, prefix: str, count: int
) -> None:
    database = SQLDocumentDatabase(engine, prefix=prefix)
    things = await filled(database, [thing("a", version="0.1.0"), thing("b", version="0.0.9")])
    table, c = things.table, things.table.c
    copied = [column for column in c if column.name not in ("seq", "id")]
    for n in range(count.bit_length()):
        rows = sa.select(sa.literal(f"{n}-") + c.id, *copied).where(c.version == "0.1.0")
        double = sa.insert(table).from_select(["id", *(column.name for column in copied)], rows)
        await things.run(lambda conn, double=double: conn.execute(double), write=True)
    if engine.dialect.name != "sqlite":
        analyze = "ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE TABLE"
        async with engine.connect() as connection:
            await connection.exec_driver_sql(f"{analyze} {table.name}")
            await connection.commit()
    asked: list[Any] = []

    async def load(document: BaseDocument) -> Any:
        asked.append(document["version"])
        return document

    with Statements(engine) as statements:
        again: Any = await database.get_or_create_collection("things", Thing, load)
    assert (await again.find({}, limit=1)).total_count > count
    assert asked == ["0.0.9", "0.1.0"]
    own = [(said, values) for said, values in statements.said if f"FROM {table.name}" in said]
    assert len(own) == 4  # none, the first version, the second, no other
    async with engine.connect() as connection:
        for said, values in own:
            how = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
            rows = await connection.exec_driver_sql(f"{how} {said}", values)
            plan = "\n".join(" ".join(map(str, row)) for row in rows)
            assert f"{table.name}_version" in plan, plan
            assert "filesort" not in plan, plan
            assert "TEMP B-TREE" not in plan, plan
            assert "Sort" not in plan, plan
    await database.delete_collection("things")


async def test_what_is_asked_often_is_one_statement(engine: AsyncEngine, prefix: str) -> None:
    database = SQLDocumentDatabase(engine, prefix=prefix)
    things = await filled(database, [thing(f"i{n}") for n in range(9)])
    with Statements(engine) as statements:
        for call in (
            lambda: things.find({"name": {"$eq": ""}}),
            lambda: things.find({"name": {"$eq": ""}}, limit=3),
            lambda: things.find({}, limit=0),
            lambda: things.find_one({"id": {"$eq": "i3"}}),
            lambda: things.insert_one(thing("new")),
        ):
            del statements.said[:]
            await call()
            assert len([s for s in statements.said if things.table.name in s[0]]) == 1
    await database.delete_collection("things")


# --- documents of older versions -----------------------------------------------------------------


async def test_rejected_documents_are_kept_as_they_were(
    url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    documents = [
        thing("good", number=1),
        thing("bad", number=-1, data={"card": "4111 1111", "odd": "\0\ud800"}),
        thing("none", number=2, name="forget"),
        thing("unfit", number=3, name="unfit"),
        thing("x" * 100, number=-4),
    ]

    async def load(document: Any) -> Any:
        if document["name"] == "forget":
            return None
        found = await renamed(document)
        return {**found, "flag": "maybe"} if document["name"] == "unfit" else found

    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        await filled(database, documents)
        with caplog.at_level(logging.WARNING, logger="adk_sessions"):
            things: Any = await database.get_or_create_collection("things", Renamed, load)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 4
        for id, why in [("bad", "ValueError"), ("none", "None"), ("unfit", "InvalidInputError")]:
            assert any(repr(id) in line and why in line for line in said)
        assert not any("4111" in line or "secret" in line for line in said)
        assert [one["id"] for one in await things.find({})] == ["good"]
        found = await kept(things)
        assert [json.loads(text) for *_, text in found] == documents[1:]
        assert [id for id, *_ in found] == [one["id"] for one in documents[1:]]
        # again, and once more, and with the same id
        for _ in range(2):
            await things.insert_one({**thing("bad", number=-7), "label": ""})
            await database.get_or_create_collection("things", Renamed, load)
        assert len(await kept(things)) == 6
        reader = SQLDocumentDatabase(url, prefix=prefix, create=False)
        failed: Any = await reader.get_collection(
            "things_failed_migrations", BaseDocument, identity_loader_for(BaseDocument)
        )
        assert (await failed.find({"id": {"$eq": "bad"}})).total_count == 3
        await reader.close()


async def test_a_document_that_is_damaged_is_kept_as_well(url: str, prefix: str) -> None:
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        things = await filled(database, [thing("a"), thing("b"), thing("c")])
        broken = things.table.update().where(things.table.c.id == "b").values(document='{"id": "')
        await things.run(lambda conn: conn.execute(broken), write=True)
        things = await database.get_or_create_collection("things", Renamed, renamed)
        assert [one["id"] for one in await things.find({})] == ["a", "c"]
        assert [text for *_, text in await kept(things)] == ['{"id": "']


async def test_what_others_write_meanwhile_stays(url: str, prefix: str) -> None:
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        things = await filled(database, [thing(f"i{n}", number=n, name="X") for n in range(5)])

        async def load(document: Any) -> Any:
            if document["id"] == "i1" and document["version"] == "0.1.0":
                await things.update_one({"id": {"$eq": "i1"}}, {"name": "x"})
            if document["id"] == "i2" and document["version"] == "0.1.0":
                await things.update_one({"id": {"$eq": "i2"}}, {"note": "meanwhile"})
            if document["id"] == "i3" and document["note"] is None:
                await things.update_one({"id": {"$eq": "i3"}}, {"note": "kept"})
                return None
            return {**document, "version": "0.2.0"}

        opened: Any = await database.get_or_create_collection("things", Thing, load)
        found = {one["id"]: one for one in await opened.find({})}
        assert found["i1"]["name"] == "x"
        assert found["i2"]["note"] == "meanwhile"
        assert found["i3"]["note"] == "kept"
        assert {one["version"] for one in found.values()} == {"0.2.0"}
        assert await kept(things) == []  # i3 was rejected as it was before


async def test_a_document_that_changes_all_the_time_does_not_stop_the_start(
    url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        things = await filled(database, [thing("a", data=0), thing("b")])

        async def load(document: Any) -> Any:
            if document["id"] == "a":
                change: Any = {"data": document["data"] + 1}
                await things.update_one({"id": {"$eq": "a"}}, change)
            return {**document, "version": "0.2.0"}

        await database.get_or_create_collection("things", Thing, load)
        assert "change all the time" in caplog.text
        assert [one["version"] for one in await things.find({})] == ["0.1.0", "0.2.0"]


async def test_a_loader_that_is_cut_off_goes_on_at_the_next_start(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_BATCH", 3)
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        things = await filled(database, [thing(f"i{n}", number=n) for n in range(10)])
        asked = []

        async def load(document: Any) -> Any:
            asked.append(document["id"])
            if len(asked) == 6:
                raise asyncio.CancelledError
            return {**document, "version": "0.2.0"}

        with pytest.raises(asyncio.CancelledError):
            await database.get_or_create_collection("things", Thing, load)
        assert (await things.find({"version": {"$eq": "0.2.0"}})).total_count == 3
        await database.get_or_create_collection("things", Thing, load)
        assert (await things.find({"version": {"$eq": "0.2.0"}})).total_count == 10
        del asked[:]
        await database.get_or_create_collection("things", Thing, load)
        assert len(asked) == 1


async def test_a_document_whose_new_id_is_taken_is_kept_apart(
    url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def load(document: Any) -> Any:
        id = document["id"] if document["id"] == "c" else "same"
        return {**document, "id": id, "version": "0.2.0"}

    documents = [thing(id, data="hunter2") for id in "abc"]
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        things = await filled(database, documents)
        await database.get_or_create_collection("things", Thing, load)
        found = await things.find({"version": {"$eq": "0.2.0"}})
        assert {one["id"] for one in found} == {"same", "c"}
        assert [json.loads(text) for *_, text in await kept(things)] == documents[1:2]
        assert "'b' is rejected" in caplog.text
        assert "hunter2" not in caplog.text


async def test_a_nan_does_not_make_a_document_old(url: str, prefix: str) -> None:
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        await filled(database, [thing(f"i{n}", data=float("nan")) for n in range(5)])
        asked = []

        async def load(document: Any) -> Any:
            asked.append(document)
            return document

        await database.get_or_create_collection("things", Thing, load)
        assert len(asked) == 1


async def test_without_a_version_one_document_shows_that_all_are_current(
    url: str, prefix: str
) -> None:
    class Plain(TypedDict):
        id: ObjectId
        name: str

    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        plain: Any = await database.create_collection("plain", Plain)  # type: ignore[type-var]
        for n in range(4):
            await plain.insert_one({"id": f"i{n}", "name": "old"})
        asked = []

        async def load(document: Any) -> Any:
            asked.append(document["id"])
            return {**document, "name": "new"}

        for expected in (5, 1):
            del asked[:]
            plain = await database.get_or_create_collection("plain", Plain, load)
            assert len(asked) == expected
        assert [one["name"] for one in (await plain.find({}, limit=9))] == ["new"] * 4


# --- new keys ------------------------------------------------------------------------------------


class More(Thing, total=False):
    """Keys that documents had before the schema knew them."""

    extra: str
    count: int
    since: float | None


async def test_a_new_key_gets_a_column_that_is_filled(url: str, prefix: str) -> None:
    documents = [
        thing(f"i{n}", extra=f"e{n}" * (1 + 100 * (n % 2)), count=n, since=n / 2) for n in range(9)
    ]
    del documents[4]["extra"]
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        old = await filled(database, documents)
        things: Any = await database.get_or_create_collection(
            "things", More, identity_loader_for(More)
        )
        assert set(things.table.columns.keys()) >= {"extra", "count", "since"}
        for where, expected in [
            ({"extra": {"$eq": "e2"}}, ["i2"]),
            ({"extra": {"$eq": "e3" * 101}}, ["i3"]),
            ({"extra": {"$eq": None}}, ["i4"]),
            ({"count": {"$gte": 7}}, ["i7", "i8"]),
            ({"since": {"$lt": 1}}, ["i0", "i1"]),
        ]:
            assert [one["id"] for one in await things.find(where, limit=5)] == expected
            assert [one["id"] for one in await old.find(where)] == expected
        # a process of the old version goes on, and its documents are found as well
        await old.insert_one(thing("new", extra="old process"))
        assert (await things.find_one({"id": {"$eq": "new"}}))["extra"] == "old process"
        # and the columns are no longer filled
        assert not any("filling" in key for key in await columns_of(things))


async def columns_of(things: Any) -> set[str]:
    def look(conn: sa.Connection) -> set[str]:
        return {column["name"] for column in sa.inspect(conn).get_columns(things.table.name)}

    found: set[str] = await things.run(look, write=False)
    return found


async def test_filling_that_is_cut_off_goes_on_at_the_next_start(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_BATCH", 3)
    fill, steps = opening._add, []

    def cut_off(*arguments: Any) -> Any:
        steps.append(arguments)
        if len(steps) == 3:
            raise ZeroDivisionError
        return fill(*arguments)

    monkeypatch.setattr(opening, "_add", cut_off)
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        things = await filled(database, [thing(f"i{n}", extra=f"e{n}") for n in range(10)])
        with pytest.raises(ZeroDivisionError):
            await database.get_or_create_collection("things", More, identity_loader_for(More))
        assert not {"extra", "count", "since"} <= await columns_of(things)
        # the old version still works on the table
        await things.insert_one(thing("late", extra="late"))
        things = await database.get_or_create_collection("things", More, identity_loader_for(More))
        for n in (0, 5, 9):
            assert (await things.find_one({"extra": {"$eq": f"e{n}"}}))["id"] == f"i{n}"
        assert (await things.find_one({"extra": {"$eq": "late"}}))["id"] == "late"


async def test_a_key_of_another_type_than_before_is_still_found(url: str, prefix: str) -> None:
    class Retyped(TypedDict, total=False):
        id: ObjectId
        creation_utc: str
        version: Version.String
        name: int
        number: str
        label: str

    async def load(document: Any) -> Any:
        name, number = len(document["name"]), str(document["number"])
        return {**document, "version": "2", "name": name, "number": number, "label": "x"}

    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        await filled(database, [thing(f"i{n}", number=n, name="n" * n) for n in range(5)])
        things: Any = await database.get_or_create_collection("things", Retyped, load)
        assert (await things.find_one({"number": {"$eq": "3"}}))["id"] == "i3"
        assert [one["id"] for one in await things.find({"name": {"$gt": 3}}, limit=3)] == ["i4"]
        assert (await things.find({"label": {"$eq": "x"}}, limit=2)).total_count == 5


async def test_a_number_of_another_kind_than_before_is_still_found(url: str, prefix: str) -> None:
    class Other(TypedDict, total=False):
        id: ObjectId
        creation_utc: str
        version: Version.String
        number: float
        ratio: int
        flag: int
        Name: str

    documents: list[Any] = [
        {**thing("a"), "number": 1.5, "ratio": 2**53 + 1, "flag": 7, "Name": "x"},
        {**thing("b"), "number": 2, "ratio": 2**53, "flag": 1, "Name": "y"},
    ]
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        await database.create_collection("things", Thing)
        other: Any = await database.get_or_create_collection("things", Other, same)
        for document in documents:
            await other.insert_one(document)
        for where in (
            {"number": {"$lt": 2}},
            {"ratio": {"$gt": 2**53}},
            {"flag": {"$eq": 7}},
            {"Name": {"$eq": "x"}},
        ):
            assert [one["id"] for one in await other.find(where, limit=5)] == ["a"]


async def test_documents_from_before_there_were_times_have_pages(url: str, prefix: str) -> None:
    class Bare(TypedDict, total=False):
        id: ObjectId
        number: int

    class Timed(Bare, total=False):
        creation_utc: str

    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        bare: Any = await database.create_collection("things", Bare)  # type: ignore[type-var]
        for n in range(3):
            await bare.insert_one({"id": f"i{n}", "number": n})
        timed: Any = await database.get_or_create_collection("things", Timed, same)
        seen, cursor = [], None
        while not seen or cursor:
            page = await timed.find({}, 1, cursor)
            seen += [one["id"] for one in page]
            cursor = page.next_cursor
        assert seen == ["i0", "i1", "i2"]


async def test_a_collection_may_be_called_as_an_index_of_another(url: str, prefix: str) -> None:
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        for name in ("agent", "agent_id", "agent_version", "agent_creation_utc_id"):
            agents: Any = await database.get_or_create_collection(name, Thing, same)
            await agents.insert_one(thing(name))
            assert (await agents.find({}, 1)).total_count == 1


async def test_stores_may_begin_in_a_new_schema_at_once(
    fresh_database: Callable[[str], str],
) -> None:
    url = fresh_database("postgresql")

    async def begin(prefix: str) -> None:
        async with SQLDocumentDatabase(url, prefix=prefix, schema="new") as database:
            await database.get_or_create_collection("things", Thing, same)

    await asyncio.gather(*(begin(f"p{n}_") for n in range(8)))


async def test_an_index_that_cannot_be_unique_is_told_of(url: str, prefix: str) -> None:
    async with SQLDocumentDatabase(url, prefix=prefix) as database:
        things = await filled(database, [thing("a"), thing("b")])
        with pytest.raises(SchemaError, match="unique"):
            await things.ensure_indexes([CollectionIndex((("name", SortDirection.ASC),), True)])


# --- create=False, and tables of others ----------------------------------------------------------


async def test_without_create_no_table_is_made_or_changed(engine: AsyncEngine, prefix: str) -> None:
    database = SQLDocumentDatabase(engine, prefix=prefix, create=False)
    with Statements(engine) as statements:
        for call in (
            lambda: database.get_or_create_collection("things", Thing, same),
            lambda: database.create_collection("things", Thing),
        ):
            with pytest.raises(SchemaError, match=f"{prefix}things is missing"):
                await call()
        with pytest.raises(ValueError, match="things"):
            await database.get_collection("things", Thing, same)
        maker = SQLDocumentDatabase(engine, prefix=prefix)
    await filled(maker, [thing("a", number=-1)])
    with statements:
        with pytest.raises(SchemaError, match="no column extra, count, since"):
            await database.get_collection("things", More, identity_loader_for(More))

        async def reject(document: Any) -> Any:
            return None

        with pytest.raises(SchemaError, match="_failed_migrations is missing"):
            await database.get_collection("things", Thing, reject)
        things: Any = await database.get_or_create_collection("things", Thing, same)
        await things.ensure_indexes([CollectionIndex((("name", SortDirection.ASC),))])
        assert await things.find_one({}) == thing("a", number=-1)
    assert statements.starting("CREATE", "ALTER", "DROP") == []
    await maker.delete_collection("things")


async def test_without_create_no_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.db"
    async with SQLDocumentDatabase(f"sqlite:///{path}", create=False) as database:
        with pytest.raises(SchemaError):
            await database.get_or_create_collection("things", Thing, same)
        with pytest.raises(ValueError, match="things"):
            await database.get_collection("things", Thing, same)
    assert not path.parent.exists()


async def test_a_table_of_others_is_left_alone(engine: AsyncEngine, prefix: str) -> None:
    table = sa.Table(f"{prefix}things", sa.MetaData(), sa.Column("id", sa.Integer))
    async with engine.begin() as connection:
        await connection.run_sync(table.create)
    database = SQLDocumentDatabase(engine, prefix=prefix)
    with pytest.raises(SchemaError, match="holds no documents"):
        await database.get_or_create_collection("things", Thing, same)
    async with engine.begin() as connection:
        await connection.run_sync(table.drop)
