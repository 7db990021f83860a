"""`SQLDocumentDatabase` on every database: Parlant's contract, and what it promises beyond."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.persistence.common import Cursor, SortDirection
from parlant.core.persistence.document_database import DocumentDatabase
from servers import unique_name

from adk_sessions.parlant import SQLDocumentDatabase
from adk_sessions.testing import DocumentDatabaseContract
from adk_sessions.testing.documents import ODD, Thing, thing

KINDS = ["sqlite", "sqlite-memory", "postgresql", "mariadb"]


class TestContract(DocumentDatabaseContract):
    @pytest.fixture(params=KINDS)
    def kind(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def new_database(
        self, kind: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
    ) -> Callable[[], DocumentDatabase]:
        fixture = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}.get(kind)
        url = request.getfixturevalue(fixture) if fixture else fresh_database(kind)
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
            ratio=choose.choice(RATIOS),
        )
        | {"flag": n % 3 == 0}
        for n in range(12)
    ]


class Pair:
    """A collection of ours and one of Parlant's, with the loop that they live in."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self.url, self.run = url, runner.run

    async def fill(self, documents: list[Any]) -> None:
        self.database = SQLDocumentDatabase(self.url, prefix=f"{unique_name()}_")
        self.ours: Any = await self.database.create_collection("things", Thing)
        self.parlants: Any = await TransientDocumentDatabase().create_collection("things", Thing)
        for document in documents:
            await self.ours.insert_one(document)
            await self.parlants.insert_one(dict(document))

    async def both(self, call: Callable[[Any], Any]) -> None:
        """The same call of both has the same result."""
        assert await call(self.ours) == await call(self.parlants)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def pair(request: pytest.FixtureRequest, fresh_database: Callable[[str], str]) -> Iterator[Pair]:
    fixture = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}.get(request.param)
    url = request.getfixturevalue(fixture) if fixture else fresh_database(request.param)
    with asyncio.Runner() as runner:
        pair = Pair(url, runner)
        runner.run(pair.fill(population()))
        yield pair
        runner.run(pair.database.close())


EXAMPLES = settings(
    deadline=None,
    max_examples=2000 if os.environ.get("ADK_SESSIONS_SOAK") == "1" else 120,
    derandomize=os.environ.get("ADK_SESSIONS_SOAK") != "1",
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


@settings(EXAMPLES, max_examples=EXAMPLES.max_examples // 4)
@given(made=st.lists(calls, max_size=12))
def test_changes_leave_what_they_leave_in_parlants_own_database(
    pair: Pair, made: list[tuple[str, Any, Any]]
) -> None:
    async def change() -> None:
        await pair.both(clear)
        for what, where, value in made:
            taken = {document["id"] for document in await pair.parlants.find({})}
            new = thing(f"i{value}", number=value) if isinstance(value, int) else None
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

    async def clear(things: Any) -> None:
        while (await things.delete_one({})).deleted_count:
            pass
        for document in population()[:5]:
            await things.insert_one(dict(document))

    pair.run(change())
