"""What every document database of Parlant must do, as tests: subclass, run pytest.

    class TestMine(DocumentDatabaseContract):
        @pytest.fixture
        def new_database(self, tmp_path):
            return lambda: MyDatabase(tmp_path / "documents")

What a database is not made for it names in ``lacks``; those tests are skipped, and say so.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypedDict, cast
from uuid import uuid4

import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection
from parlant.core.persistence.document_database import (
    BaseDocument,
    CollectionIndex,
    DocumentCollection,
    DocumentDatabase,
    identity_loader_for,
)

__all__ = ["DocumentDatabaseContract"]

#: what some databases do not promise, and why
GUARANTEES = {
    "copies": "a document that was given or returned may be changed, and the stored one stays",
    "loader": "documents of older versions go through the loader when a collection is opened",
    "lenient filters": "a missing key counts as None, and what cannot be compared does not match",
    "unique ids": "no two documents of a collection have one id",
    "typed": "a value of another type than the schema's is refused",
}

ODD = 'it\'s an "odd" key: %s :x `y` [z] ;--'


class Thing(TypedDict, total=False):
    """The documents of the tests."""

    id: ObjectId
    creation_utc: str
    version: Version.String
    name: str
    number: int
    ratio: float
    flag: bool
    note: str | None
    data: Any


def thing(id: str, **values: Any) -> Any:
    """A document with every key of the schema."""
    return {
        "id": id,
        "creation_utc": "2026-01-01T00:00:00+00:00",
        "version": "0.1.0",
        "name": "",
        "number": 0,
        "ratio": 0.0,
        "flag": False,
        "note": None,
        "data": None,
        **values,
    }


THINGS = [
    thing("a", name="Ann", number=1, ratio=0.5, flag=True, **{ODD: 1, "extra": "x"}),
    thing("b", name="ann", number=2, ratio=2.0, note="n", **{ODD: 2, "extra": "y"}),
    thing("c", name="Ann ", number=10, ratio=-1.5, flag=True, **{ODD: 3, "extra": None}),
    thing("d", name="", number=-5, ratio=1e300, note="", **{ODD: 2.5, "extra": "é"}),
    thing("e", name="Änn", number=2**62, ratio=10.0, note="n", **{ODD: 0, "extra": "x"}),
]

# A filter, and the documents that match it.
FILTERS: list[tuple[Any, str]] = [
    ({}, "abcde"),
    ({"$and": []}, "abcde"),
    ({"$or": []}, ""),
    ({"$or": [{}]}, "abcde"),
    ({"id": {}}, "abcde"),
    ({"id": {"$eq": "a"}}, "a"),
    ({"id": {"$eq": "A"}}, ""),
    ({"name": {"$eq": "Ann"}}, "a"),
    ({"name": {"$eq": ""}}, "d"),
    ({"name": {"$ne": "Ann"}}, "bcde"),
    ({"name": {"$gt": "Ann"}}, "bce"),
    ({"name": {"$gte": "Ann", "$lt": "ann"}}, "ac"),
    ({"name": {"$lte": "Ann"}}, "ad"),
    ({"name": {"$in": ["Ann", "Änn", "nobody"]}}, "ae"),
    ({"name": {"$in": []}}, ""),
    ({"name": {"$nin": ["Ann", "Änn"]}}, "bcd"),
    ({"name": {"$nin": []}}, "abcde"),
    ({"number": {"$eq": 10}}, "c"),
    ({"number": {"$eq": 10.0}}, "c"),
    ({"number": {"$eq": 10.5}}, ""),
    ({"number": {"$eq": "10"}}, ""),
    ({"number": {"$ne": "10"}}, "abcde"),
    ({"number": {"$eq": True}}, "a"),
    ({"number": {"$eq": 2**62}}, "e"),
    ({"number": {"$eq": 2**62 + 1}}, ""),
    ({"number": {"$lt": 2**80}}, "abcde"),
    ({"number": {"$gt": 1.5}}, "bce"),
    ({"number": {"$gte": 2, "$lte": 10}}, "bc"),
    ({"number": {"$in": [1, 2.0, "10", None]}}, "ab"),
    ({"number": {"$nin": [1, 2.0, "10", None]}}, "cde"),
    ({"ratio": {"$eq": 2}}, "b"),
    ({"ratio": {"$gt": 1e299}}, "d"),
    ({"ratio": {"$lte": 0.5}}, "ac"),
    ({"ratio": {"$in": [0.5, 10, math.nan, math.inf]}}, "ae"),
    ({"ratio": {"$lt": math.inf}}, "abcde"),
    ({"flag": {"$eq": True}}, "ac"),
    ({"flag": {"$ne": True}}, "bde"),
    ({"flag": {"$eq": 1}}, "ac"),
    ({"flag": {"$lt": True}}, "bde"),
    ({"note": {"$eq": None}}, "ac"),
    ({"note": {"$ne": None}}, "bde"),
    ({"note": {"$ne": "n"}}, "acd"),
    ({"note": {"$in": [None, ""]}}, "acd"),
    ({"note": {"$nin": [None, ""]}}, "be"),
    ({"note": {"$nin": ["n"]}}, "acd"),
    ({"data": {"$eq": None}}, "abcde"),
    ({"extra": {"$eq": "x"}}, "ae"),
    ({"extra": {"$ne": "x"}}, "bcd"),
    ({ODD: {"$gte": 2}}, "bcd"),
    ({ODD: {"$eq": 2.5}, "extra": {"$eq": "é"}}, "d"),
    ({"name": {"$eq": "Ann"}, "number": {"$eq": 1}}, "a"),
    ({"name": {"$eq": "Ann"}, "number": {"$eq": 2}}, ""),
    ({"$and": [{"flag": {"$eq": True}}, {"number": {"$gt": 1}}]}, "c"),
    ({"$or": [{"id": {"$eq": "a"}}, {"id": {"$eq": "d"}}, {"id": {"$eq": "a"}}]}, "ad"),
    ({"$or": [{"id": {"$eq": "a"}}, {"extra": {"$eq": "é"}}]}, "ad"),
    ({"$and": [{"id": {"$ne": "a"}}, {"id": {"$ne": "b"}}, {"flag": {"$eq": True}}]}, "c"),
    ({"$or": [{"$and": [{"id": {"$eq": "a"}}, {"number": {"$eq": 1}}]}, {"number": {"$lt": 0}}]}, "ad"),  # noqa: E501
    ({"$and": [{"$or": [{"id": {"$in": ["a", "b"]}}, {"flag": {"$eq": True}}]}, {"$or": [{"note": {"$eq": "n"}}, {"number": {"$eq": 10}}]}]}, "bc"),  # noqa: E501
    ({"$or": [{"id": {"$eq": str(n)}} for n in range(3000)] + [{"id": {"$eq": "b"}}]}, "b"),
    ({"$and": [{"id": {"$ne": str(n)}} for n in range(3000)] + [{"id": {"$ne": "b"}}]}, "acde"),
    ({"$or": [{"number": {"$gt": 10 + n}} for n in range(1200)]}, "e"),
    ({"$and": [{"number": {"$lt": 10 + n}} for n in range(1200)]}, "abd"),
    ({"id": {"$in": [str(n) for n in range(40_000)] + ["c"]}}, "c"),
]  # fmt: skip

# What only some databases take: missing keys, comparisons that Python refuses, mixed forms.
LENIENT: list[tuple[Any, str]] = [
    ({"unknown": {"$eq": None}}, "abcde"),
    ({"unknown": {"$ne": 1}}, "abcde"),
    ({"unknown": {"$gt": 1}}, ""),
    ({"note": {"$gte": "a"}}, "be"),
    ({"note": {"$lt": None}}, ""),
    ({"number": {"$gt": "1"}}, ""),
    ({"name": {"$lt": 5}}, ""),
    ({"extra": {"$gt": "w"}}, "abde"),
    ({"$or": [{"note": {"$gt": 3}}, {"id": {"$eq": "a"}}]}, "a"),
    ({"$or": [{"id": {"$eq": "a"}}, {"id": {"$eq": "b"}}], "flag": {"$eq": True}}, "a"),
    ({"flag": {"$eq": True}, "$or": [{"id": {"$eq": "a"}}, {"id": {"$eq": "b"}}]}, "a"),
    ({"$and": [{"flag": {"$eq": True}}], "$or": [{"id": {"$eq": "c"}}]}, "c"),
]

# Texts that a case-blind, trimming, normalising, cutting or escaping column takes for one another.
PLAIN = [
    *("bob", "Bob", "bob ", " bob", "bob\n", "b\u00f6b", "bo\u0308b", "", " ", "%", "b_b", "😀"),
    *("it's", 'say "a"', "`", "\\", "\\'", "--", ";", "$1", ":a", "?", "%s", "null", "NULL"),
    *("x" * 254, "x" * 255, "😀" * 150, "\\u0000", "\\ud800", "\ufffd", "\x01", "\t"),
]
# Some of them no column may be able to hold.
ALIKE = [
    *(*PLAIN, "x" * 256, "x" * 257, "x" * 70_000, "😀" * 151, "😀" * 255, "😀" * 256),
    *("\0", "a\0b", "\ud800", "\udfff", "a\ud800"),
    *("adk_sessions:", "adk_sessions:text:%00", "adk_sessions:sha256:" + "0" * 64),
]

# Ascending by code point, whatever a database's language says.
ORDERED = ["", " ", "-", "0", "10", "9", "A", "B", "Z", "_", "a", "b", "z", "ä", "\uffff", "😀"]

MISTYPED: list[tuple[str, Any]] = [
    *[("number", bad) for bad in ("1", 1.5, 2**63, math.nan, math.inf, [1])],
    *[("ratio", "1"), ("flag", "yes"), ("flag", 2), ("name", 1), ("name", ["a"])],
    *[("id", None), ("id", 1), ("data", {1, 2}), ("data", object())],
]

# Values of one kind, each of which comes back equal and of its type.
VALUES: dict[str, list[Any]] = {
    "numbers": [0, 1, 1.0, -0.0, 2**53 + 1, 2**64, 10**40, -(10**40), 10**5000],
    "floats": [0.1 + 0.2, 1e15, 1e16, -1e16, 1e300, 5e-324, 1.7976931348623157e308],
    "nan and infinities": [math.nan, math.inf, -math.inf],
    "not numbers": [None, True, False, "1", "true", "null", "NaN", "-0.0", "1e16"],
    "containers": [{}, [], "", {"a": {}, "b": []}, {"1": [1, [1.0, [True]]]}, {"b": 1, "a": 2}],
    "50 deep": [json.loads('{"k":[' * 25 + "]}" * 25)],
    "keys": [{"": 1, " ": 2, "a.b": 3, "$": 4, '"': 5, "😀": 6, "A": 7, "a": 8, "$eq": 9}],
    "unicode": ["👩‍👩‍👧", "e\u0301", "é", "\u2028\ufeff", "\uffff\ufffd", "\ue000", "\x01"],
    "longer than 64 KiB": ["ü" * 70_000],
    "NUL and surrogates": ["\0", "a\0b", "\ud800", "a\udfffb", "\udc00\ud800", "\ud83d\ude00"],
    "in keys": [{"\0": 1, "\\u0000": 2, "\ud800": 3, "\ud83d\ude00": 4, "😀": 5}],
    "text like an escape": ["\\u0000", "\\\\u0000", "\\ud83d\\ude00", "\\"],
    "text like a tag": ["adk_sessions:", "adk_sessions:float:nan", "adk_sessions:text:%00"],
    "dicts like a tag": [{"$float": "nan"}, {"adk_sessions:text:%00": "a"}],
}  # fmt: skip


@pytest.mark.asyncio
class DocumentDatabaseContract:
    """The contract of Parlant's ``DocumentDatabase``.

    Attributes:
        lacks: names of `GUARANTEES` that this database does not give.
    """

    lacks: ClassVar[frozenset[str]] = frozenset()

    @pytest.fixture
    def new_database(self) -> Callable[[], DocumentDatabase]:
        """Makes databases on one storage, each as it comes from its constructor."""
        raise NotImplementedError("give a fixture new_database that returns a function")

    @pytest_asyncio.fixture
    async def database(
        self, new_database: Callable[[], DocumentDatabase]
    ) -> AsyncIterator[DocumentDatabase]:
        async with _entered(new_database()) as database:
            yield database

    @pytest.fixture
    def name(self) -> str:
        """A collection's name, so that tests can share a storage."""
        return f"things_{uuid4().hex[:12]}"

    @pytest_asyncio.fixture
    async def things(
        self, database: DocumentDatabase, name: str
    ) -> AsyncIterator[DocumentCollection[Thing]]:
        """An empty collection, which is deleted at the end."""
        yield await _open(database, name)
        await database.delete_collection(name)

    def needs(self, guarantee: str) -> None:
        """Skips the test if the database lacks a guarantee, and says which."""
        if guarantee in self.lacks:
            pytest.skip(f"lacks {guarantee!r}: {GUARANTEES[guarantee]}")

    async def test_what_it_lacks_has_a_name(self) -> None:
        assert self.lacks <= GUARANTEES.keys()

    # --- collections -----------------------------------------------------------------------------

    async def test_an_unknown_collection_is_an_error(
        self, database: DocumentDatabase, name: str
    ) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            await database.get_collection(name, Thing, identity_loader_for(Thing))
        with pytest.raises(ValueError, match=r"\w"):
            await database.delete_collection(name)

    async def test_a_collection_can_be_created_got_and_deleted(
        self, database: DocumentDatabase, name: str
    ) -> None:
        created = await database.create_collection(name, Thing)
        await created.insert_one(thing("a"))
        got = await database.get_collection(name, Thing, identity_loader_for(Thing))
        again = await _open(database, name)
        assert await _ids(got) == await _ids(again) == ["a"]
        await database.delete_collection(name)
        assert await _ids(await _open(database, name)) == []
        await database.delete_collection(name)

    async def test_another_database_on_the_storage_sees_the_same(
        self,
        new_database: Callable[[], DocumentDatabase],
        things: DocumentCollection[Thing],
        name: str,
    ) -> None:
        await things.insert_one(thing("a", data={"k": [1, None]}))
        async with _entered(new_database()) as other:
            same = await _open(other, name)
            assert await same.find_one({}) == thing("a", data={"k": [1, None]})
            await same.update_one({}, cast(Thing, {"name": "Bob"}))
        assert (await things.find_one({}) or {}).get("name") == "Bob"

    async def test_collections_are_apart(self, database: DocumentDatabase, name: str) -> None:
        names = [name, name + "_failed_migrations", name + "_" + "x" * 60, name + "_" + "x" * 61]
        opened = [await _open(database, each) for each in names]
        for each, collection in zip(names, opened, strict=True):
            await collection.insert_one(thing(each))
        assert [await _ids(collection) for collection in opened] == [[each] for each in names]
        for each in names:
            await database.delete_collection(each)

    async def test_indexes_can_be_asked_for_again(self, things: DocumentCollection[Thing]) -> None:
        up, down = SortDirection.ASC, SortDirection.DESC
        indexes = [
            CollectionIndex((("id", up),)),
            CollectionIndex((("creation_utc", up), ("id", up))),
            CollectionIndex((("name", up), ("number", down))),
            CollectionIndex((("name", up), ("note", up), ("creation_utc", up), ("id", up))),
            CollectionIndex((("unknown", up),)),
        ]
        for _ in range(2):
            await things.ensure_indexes(indexes)
        await _fill(things)
        assert await _ids(things, {"name": {"$eq": "Ann"}}) == ["a"]

    async def test_documents_go_through_the_loader(
        self, new_database: Callable[[], DocumentDatabase], things: Any, name: str
    ) -> None:
        self.needs("loader")
        for n, version in enumerate(["0.1.0", "0.2.0", "0.1.0", "0.3.0", "0.1.0"]):
            await things.insert_one(thing(f"t{n}", version=version, number=n))

        async def load(document: BaseDocument) -> Thing | None:
            found: Any = dict(document)
            if found["number"] == 2:
                return None
            if found["number"] == 3:
                raise KeyError("a version of the future")
            return cast(Thing, {**found, "version": "0.2.0", "name": f"n{found['number']}"})

        async with _entered(new_database()) as other:
            loaded = await other.get_or_create_collection(name, Thing, load)
            assert await _ids(loaded) == ["t0", "t1", "t4"]
            for document in await loaded.find({}):
                assert document["name"] == f"n{document['number']}"
                assert document["version"] == "0.2.0"
            assert await _ids(loaded, {"name": {"$eq": "n4"}, "version": {"$eq": "0.2.0"}}) == [
                "t4"
            ]
            assert await _ids(loaded, {"version": {"$eq": "0.1.0"}}) == []

    # --- inserting -------------------------------------------------------------------------------

    async def test_a_document_needs_every_key_of_the_schema(
        self, things: DocumentCollection[Thing]
    ) -> None:
        for key in thing("a"):
            incomplete = thing("a")
            del incomplete[key]
            with pytest.raises(TypeError):
                await things.insert_one(incomplete)
        assert await _ids(things) == []

    async def test_other_keys_are_kept(self, things: DocumentCollection[Thing]) -> None:
        document = thing("a", **{"extra": [1], ODD: {"a": 1}})
        assert (await things.insert_one(copy.deepcopy(document))).acknowledged
        assert await things.find_one({"id": {"$eq": "a"}}) == document

    async def test_the_first_document_of_an_id_stays(
        self, things: DocumentCollection[Thing]
    ) -> None:
        self.needs("unique ids")
        for name in ("first", "second"):
            assert (await things.insert_one(thing("a", name=name))).acknowledged
        assert [each["name"] for each in await things.find({})] == ["first"]

    @pytest.mark.parametrize("group", VALUES)
    async def test_values_come_back_as_they_are(
        self, things: DocumentCollection[Thing], group: str
    ) -> None:
        values = VALUES[group]
        for n, value in enumerate([*values, values]):
            await things.insert_one(thing(str(n), data=value))
            found: Any = await things.find_one({"id": {"$eq": str(n)}})
            assert _exact(found["data"]) == _exact(value)
            await things.update_one({"id": {"$eq": str(n)}}, cast(Thing, {"data": [value]}))
            found = await things.find_one({"id": {"$eq": str(n)}})
            assert _exact(found["data"]) == _exact([value])

    @pytest.mark.parametrize("field", ["name", "id", "extra"])
    async def test_texts_are_told_apart(
        self, things: DocumentCollection[Thing], field: str
    ) -> None:
        texts = PLAIN if field == "id" else ALIKE
        for n, text in enumerate(texts):
            values: Any = {"id": f"i{n}", "number": n, "extra": "", field: text}
            await things.insert_one(thing(**values))

        async def found(test: str, operand: Any) -> list[int]:
            documents = await things.find({field: cast(Any, {test: operand})})
            return sorted(document["number"] for document in documents)

        for n, text in enumerate(texts):
            assert await found("$eq", text) == [n], text[:40]
        some = list(range(len(texts)))[::3]
        assert await found("$in", texts[::3]) == some
        assert await found("$nin", texts[::3]) == sorted({*range(len(texts))} - {*some})
        for bound in ("bob", "\0", "x" * 256, "\ud800"):
            assert await found("$gt", bound) == [n for n, t in enumerate(texts) if t > bound]

    async def test_documents_are_copies(self, things: DocumentCollection[Thing]) -> None:
        self.needs("copies")
        given = thing("a", data={"list": [1]})
        await things.insert_one(given)
        given["data"]["list"].append(2)
        params: Any = {"note": "n", "data": {"list": [3]}}
        for _ in range(2):
            found: Any = await things.find_one({})
            found["data"]["list"].append(4)
            [found] = (await things.find({})).items
            found["data"]["list"].append(4)
            assert cast(Any, await things.find_one({}))["data"]["list"] in ([1], [3])
            updated: Any = (await things.update_one({}, params)).updated_document
            updated["data"]["list"].append(5)
            params["data"]["list"] = [3]
        assert cast(Any, await things.find_one({}))["data"]["list"] == [3]

    async def test_a_value_of_another_type_is_refused(
        self, things: DocumentCollection[Thing]
    ) -> None:
        self.needs("typed")
        await things.insert_one(thing("a", name="before"))
        for key, value in MISTYPED:
            values: Any = {"id": "b", key: value}
            with pytest.raises(ValueError, match=r"\w"):
                await things.insert_one(thing(**values))
            with pytest.raises(ValueError, match=r"\w"):
                await things.update_one({}, cast(Thing, {"note": "n", key: value}))
            assert (await things.find({})).items == [thing("a", name="before")]

    async def test_numbers_at_their_limits(self, things: DocumentCollection[Thing]) -> None:
        numbers = [2**63 - 1, -(2**63), 10.0, True]
        ratios = [math.inf, -math.inf, 2**53 + 1, 10**30, 5e-324, 1.7976931348623157e308, 10**400]
        for n, number in enumerate(numbers):
            await things.insert_one(thing(f"n{n}", number=number))
            assert await _ids(things, {"number": {"$eq": number}}) == [f"n{n}"]
        for n, ratio in enumerate(ratios):
            await things.insert_one(thing(f"r{n}", ratio=ratio))
            assert await _ids(things, {"ratio": {"$eq": ratio}}) == [f"r{n}"]
        await things.insert_one(thing("nan", ratio=math.nan))
        for bound in (1e29, 10**29):
            assert await _ids(things, {"ratio": {"$gt": bound}}) == ["r0", "r3", "r5", "r6"]
        assert "nan" in await _ids(things, {"ratio": {"$ne": 1}})
        assert "nan" not in await _ids(things, {"ratio": {"$lte": math.inf}})

    # --- filters ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("limit", [None, 100], ids=["all", "a page"])
    async def test_filters_say_what_they_say(
        self, things: DocumentCollection[Thing], limit: int | None
    ) -> None:
        await _fill(things)
        for where, expected in FILTERS:
            found = await things.find(where, limit=limit)
            assert [each["id"] for each in found] == [*expected], str(where)[:200]
            assert found.total_count == len(expected)
            first = await things.find_one(where)
            assert (first and first["id"]) == (expected[0] if expected else None), str(where)[:200]

    async def test_filters_are_lenient(self, things: DocumentCollection[Thing]) -> None:
        self.needs("lenient filters")
        await _fill(things)
        for where, expected in LENIENT:
            assert await _ids(things, where) == [*expected], where

    async def test_what_is_no_filter_is_refused(self, things: DocumentCollection[Thing]) -> None:
        self.needs("lenient filters")
        await _fill(things)
        bad: list[Any] = [
            *({"id": "a"}, {"id": {"$like": "a"}}, {"$or": {"id": {"$eq": "a"}}}, {"$not": [{}]}),
            *({"$and": ["a"]}, {"id": {"$in": "abc"}}, ["id"], {"id": {"$eq": "a", "x": 1}}),
        ]
        for where in bad:
            for call in (things.find(where), things.find_one(where), things.delete_one(where)):
                with pytest.raises(ValueError, match=r"\w"):
                    await call
        assert len(await _ids(things)) == len(THINGS)

    # --- order and pages -------------------------------------------------------------------------

    @pytest.mark.parametrize("limit", [None, 100], ids=["all", "a page"])
    @pytest.mark.parametrize("key", ["id", "creation_utc"])
    async def test_order_is_by_code_point(
        self, things: DocumentCollection[Thing], key: str, limit: int | None
    ) -> None:
        for n, text in enumerate(ORDERED[::-1]):
            await things.insert_one(thing(**{"id": f"i{n}", key: text}))
        found: Any = await things.find({}, limit=limit)
        assert [each[key] for each in found] == ORDERED
        found = await things.find({}, limit=limit, sort_direction=SortDirection.DESC)
        assert [each[key] for each in found] == ORDERED[::-1]

    async def test_time_comes_before_id(self, things: DocumentCollection[Thing]) -> None:
        for id, moment in (("a", "2"), ("b", "1"), ("c", "2"), ("d", "1")):
            await things.insert_one(thing(id, creation_utc=moment))
        for limit in (None, 10):
            assert [each["id"] for each in await things.find({}, limit=limit)] == [*"bdac"]

    @pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
    async def test_pages_give_each_document_once(
        self, things: DocumentCollection[Thing], down: bool
    ) -> None:
        documents = [
            thing(f"t{n * 7 % 23:02}", creation_utc=str(n // 6), flag=n % 3 > 0) for n in range(23)
        ]
        for document in documents:
            await things.insert_one(document)
        documents.sort(key=_key, reverse=down)
        for where in ({}, {"flag": {"$eq": True}}, {"name": {"$gte": ""}}):
            wanted = [d["id"] for d in documents if d["flag"] or "flag" not in where]
            for limit in (1, 3, len(wanted) - 1, len(wanted), len(wanted) + 1, 2**70):
                await _walk(things, where, limit, down, wanted)

    async def test_a_cursor_need_not_name_a_document(
        self, things: DocumentCollection[Thing]
    ) -> None:
        for id in "bdf":
            await things.insert_one(thing(id, creation_utc="5"))
        for moment, id, after, before in [
            *(
                ("5", "c", "df", "b"),
                ("5", "d", "f", "b"),
                ("5", "", "bdf", ""),
                ("4", "z", "bdf", ""),
            ),
            *(("6", "a", "", "fdb"), ("5", "\U0010ffff" * 70, "", "fdb"), ("5\0", "a", "", "fdb")),
        ]:
            for limit in (None, 10):
                cursor = Cursor(moment, ObjectId(id))
                found = await things.find({}, limit, cursor)
                assert ([*after], len(after)) == ([d["id"] for d in found], found.total_count)
                found = await things.find({}, limit, cursor, SortDirection.DESC)
                assert ([*before], len(before)) == ([d["id"] for d in found], found.total_count)

    async def test_no_documents_may_be_asked_for(self, things: DocumentCollection[Thing]) -> None:
        empty = await things.find({}, limit=0)
        assert (empty.total_count, empty.has_more, empty.next_cursor) == (0, False, None)
        await _fill(things)
        for where in ({}, {"extra": {"$ne": 5}}):
            none = await things.find(cast(Any, where), limit=0)
            assert (list(none), none.total_count, none.has_more) == ([], 5, True)
            assert none.next_cursor is None

    # --- the first match -------------------------------------------------------------------------

    async def test_the_first_match_is_the_oldest(self, things: DocumentCollection[Thing]) -> None:
        for id, moment in (("z", "9"), ("m", "1"), ("a", "5")):
            await things.insert_one(thing(id, creation_utc=moment, data=1))
        for where in ({}, {"name": {"$eq": ""}}, {"data": {"$eq": 1}}):
            first = await things.find_one(cast(Any, where))
            assert first is not None
            assert first["id"] == "z"
        updated = await things.update_one({"data": {"$eq": 1}}, cast(Thing, {"note": "first"}))
        assert updated.updated_document is not None
        assert updated.updated_document["id"] == "z"
        deleted = [await things.delete_one({}) for _ in range(4)]
        assert [each.deleted_count for each in deleted] == [1, 1, 1, 0]
        ids = [each.deleted_document and each.deleted_document["id"] for each in deleted]
        assert ids == ["z", "m", "a", None]

    async def test_the_first_match_of_a_sort(self, things: DocumentCollection[Thing]) -> None:
        await _fill(things)
        up, down = SortDirection.ASC, SortDirection.DESC
        sorts: list[tuple[Any, Any, str]] = [
            ({}, [("number", up)], "d"),
            ({}, [("number", down)], "e"),
            ({"number": {"$lt": 10}}, [("number", down)], "b"),
            ({}, [("name", up)], "d"),
            ({}, [("name", down)], "e"),
            ({}, [("flag", up), ("number", down)], "e"),
            ({}, [("flag", down), ("ratio", up)], "c"),
            ({}, [("flag", down)], "a"),
            ({}, [("flag", up)], "b"),
            ({}, [(ODD, down)], "c"),
            ({"extra": {"$eq": "x"}}, [("number", down)], "e"),
            ({"id": {"$eq": "?"}}, [("number", down)], ""),
        ]
        for where, sort, expected in sorts:
            found = await things.find_one(where, sort)
            assert (found["id"] if found else "") == expected, (where, sort)

    # --- updating --------------------------------------------------------------------------------

    async def test_an_update_merges_the_top_level(self, things: DocumentCollection[Thing]) -> None:
        await things.insert_one(thing("a", data={"x": 1, "y": 2}, **{"extra": 1}))
        params: Any = {"data": {"z": 3}, "number": 5, "new": None}
        result = await things.update_one({"id": {"$eq": "a"}}, params)
        expected = thing("a", data={"z": 3}, number=5, extra=1, new=None)
        assert result.updated_document == expected == await things.find_one({})
        assert (result.acknowledged, result.matched_count, result.modified_count) == (True, 1, 1)
        assert await _ids(things, {"number": {"$eq": 5}}) == ["a"]
        assert await _ids(things, {"number": {"$eq": 0}}) == []

    async def test_an_update_of_nothing(self, things: DocumentCollection[Thing]) -> None:
        await things.insert_one(thing("a"))
        result = await things.update_one({"id": {"$eq": "b"}}, thing("b"))
        assert (result.matched_count, result.updated_document) == (0, None)
        assert await _ids(things) == ["a"]

    async def test_an_update_may_change_the_id(self, things: DocumentCollection[Thing]) -> None:
        for id in ("a", "b"):
            await things.insert_one(thing(id, name="same"))
        for id in ("x", "y", "x"):
            result = await things.update_one(
                {"name": {"$eq": "same"}}, thing(id, name="same"), upsert=True
            )
            assert (result.matched_count, result.updated_document) == (1, thing(id, name="same"))
            first = await things.find_one({})
            assert first is not None
            assert first["id"] == id
            assert await _ids(things) == ["b", id]
        assert await _ids(things, {"id": {"$eq": "a"}}) == []

    async def test_an_upsert_adds_what_is_not_there(
        self, things: DocumentCollection[Thing]
    ) -> None:
        where: Any = {"name": {"$eq": "key"}}
        with pytest.raises(TypeError):
            await things.update_one(where, cast(Thing, {"id": "a"}), upsert=True)
        assert await _ids(things) == []
        result = await things.update_one(where, thing("a", name="key"), upsert=True)
        assert (result.matched_count, result.modified_count) == (0, 0)
        assert result.updated_document == thing("a", name="key") == await things.find_one({})
        result = await things.update_one(where, cast(Thing, {"number": 2}), upsert=True)
        assert result.matched_count == 1
        assert await _ids(things) == ["a"]

    @pytest.mark.parametrize("upsert", [False, True], ids=["update", "upsert"])
    async def test_an_id_that_is_taken_loses_nothing(
        self, things: DocumentCollection[Thing], upsert: bool
    ) -> None:
        await things.insert_one(thing("a", name="taken"))
        if not upsert:
            await things.insert_one(thing("b", name="mine"))
        where: Any = {"name": {"$eq": "mine"}}
        result = await things.update_one(where, thing("a", name="mine", number=7), upsert=upsert)
        assert result.updated_document is not None
        found = {each["name"]: each for each in await things.find({})}
        assert found.keys() == {"taken", "mine"}
        assert found["mine"]["number"] == 7
        if "unique ids" not in self.lacks:
            assert found["mine"]["id"] != found["taken"]["id"] == "a"
            assert found["mine"]["id"] == result.updated_document["id"]

    # --- at once ---------------------------------------------------------------------------------

    async def test_updates_at_once_lose_nothing(
        self, things: DocumentCollection[Thing], new_database: Any, name: str
    ) -> None:
        await things.insert_one(thing("a"))
        async with _entered(new_database()) as other:
            both = [things, await _open(other, name)]
            await asyncio.gather(
                *(
                    both[n % 2].update_one({"id": {"$eq": "a"}}, cast(Any, {f"k{n}": n}))
                    for n in range(20)
                )
            )
        found = await things.find_one({})
        assert found == thing("a", **{f"k{n}": n for n in range(20)})

    async def test_upserts_at_once_add_one(
        self, things: DocumentCollection[Thing], new_database: Any, name: str
    ) -> None:
        async with _entered(new_database()) as other:
            both = [things, await _open(other, name)]
            results = await asyncio.gather(
                *(
                    both[n % 2].update_one(
                        {"name": {"$eq": "key"}}, thing(f"i{n}", name="key", number=n), upsert=True
                    )
                    for n in range(12)
                )
            )
        assert sorted(result.matched_count for result in results) == [0] + [1] * 11
        assert len(await _ids(things)) == 1

    async def test_each_document_is_claimed_once(
        self, things: DocumentCollection[Thing], new_database: Any, name: str
    ) -> None:
        for n in range(8):
            await things.insert_one(thing(f"i{n}"))
        unclaimed: Any = {"note": {"$eq": None}}
        async with _entered(new_database()) as other:
            both = [things, await _open(other, name)]
            results = await asyncio.gather(
                *(both[n % 2].update_one(unclaimed, cast(Any, {"note": str(n)})) for n in range(12))
            )
        assert sum(result.matched_count for result in results) == 8
        claimed = {
            r.updated_document["id"]: r.updated_document for r in results if r.updated_document
        }
        assert [claimed[id] for id in sorted(claimed)] == (await things.find({})).items

    async def test_deletes_at_once_delete_each_once(
        self, things: DocumentCollection[Thing], new_database: Any, name: str
    ) -> None:
        for n in range(10):
            await things.insert_one(thing(f"i{n}"))
        async with _entered(new_database()) as other:
            both = [things, await _open(other, name)]
            deleted = await asyncio.gather(*(both[n % 2].delete_one({}) for n in range(14)))
        ids = [each.deleted_document["id"] for each in deleted if each.deleted_document]
        assert sorted(ids) == [f"i{n}" for n in range(10)]
        assert await _ids(things) == []

    async def test_collections_are_opened_at_once(
        self, new_database: Callable[[], DocumentDatabase], name: str
    ) -> None:
        async with AsyncExitStack() as stack:
            databases = [
                await stack.enter_async_context(_entered(new_database())) for _ in range(4)
            ]
            opened = await asyncio.gather(*(_open(database, name) for database in databases))
            for n, collection in enumerate(opened):
                await collection.insert_one(thing(str(n)))
            assert await _ids(opened[0]) == ["0", "1", "2", "3"]
            await databases[0].delete_collection(name)


def _entered(database: Any) -> Any:
    """A database as a context manager; some have no need to be one."""
    if hasattr(database, "__aenter__"):
        return database
    stack = AsyncExitStack()

    class Plain:
        async def __aenter__(self) -> Any:
            return database

        async def __aexit__(self, *exc_info: object) -> None:
            await stack.aclose()

    return Plain()


async def _open(database: DocumentDatabase, name: str) -> DocumentCollection[Thing]:
    return await database.get_or_create_collection(name, Thing, identity_loader_for(Thing))


async def _fill(things: DocumentCollection[Thing]) -> None:
    for document in THINGS:
        await things.insert_one(copy.deepcopy(document))


async def _ids(collection: DocumentCollection[Thing], where: Any = None) -> list[str]:
    return [document["id"] for document in await collection.find(where or {})]


async def _walk(
    things: DocumentCollection[Thing], where: Any, limit: int, down: bool, wanted: list[str]
) -> None:
    """Goes from page to page, and finds what is wanted."""
    seen: list[str] = []
    cursor = None
    while True:
        direction = SortDirection.DESC if down else SortDirection.ASC
        page = await things.find(where, limit, cursor, direction)
        assert page.total_count == len(wanted) - len(seen)
        seen += [document["id"] for document in page]
        assert page.has_more == (len(seen) < len(wanted)) == (page.next_cursor is not None)
        if page.next_cursor is None:
            break
        assert len(page.items) == limit
        last = page.items[-1]
        assert page.next_cursor == Cursor(last["creation_utc"], last["id"])
        cursor = page.next_cursor
    assert seen == wanted


def _key(document: Mapping[str, Any]) -> tuple[str, str]:
    return document["creation_utc"], document["id"]


def _exact(value: Any) -> Any:
    """What is equal only for values of the same types, and for NaN as well."""
    if isinstance(value, Mapping):
        return [(key, _exact(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return ["list", *map(_exact, value)]
    if isinstance(value, int | float):
        return type(value).__name__, value.hex() if isinstance(value, float) else hex(value)
    return value
