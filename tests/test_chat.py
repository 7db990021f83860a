"""A chat history on tables of the application's own, as applications make them."""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from pprint import saferepr
from typing import Any

import forked
import pytest
import wire
from everywhere import SOAK, without
from proxy import Lose, Proxy
from servers import Postgres, run_sync, unique_name
from sqlalchemy import MetaData, NullPool, event, inspect, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase

from adk_sessions import (
    AlreadyExistsError,
    ConfigurationError,
    DatabaseError,
    InvalidInputError,
    SchemaError,
)
from adk_sessions import chat as chat_module
from adk_sessions.chat import ChatMessage, ChatPersistence, ChatSession, chat_models
from adk_sessions.dialects import chat_columns
from adk_sessions.testing import ChatPersistenceContract
from adk_sessions.testing.sessions import ALIKE, VALUES
from adk_sessions.url import create_engine

ROOT = Path(__file__).parent.parent
START = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
SECOND = timedelta(seconds=1)
DATABASES = ["sqlite", "postgresql", "mariadb"]
NEW_YORK = {"connect_args": {"server_settings": {"timezone": "America/New_York"}}}
INDIA = {"connect_args": {"init_command": "SET time_zone = '+05:30'"}}

# As the contract's documentation gives them, with other types for what varies.
TABLES = """
create table {messages} (
    thread_id {id} not null,
    message_id {id} not null,
    session_id {id},
    user_id {id},
    role {id} not null,
    created_at {time} not null default {now},
    parts_json {json} not null,
    primary key (thread_id, message_id)
);
create table {sessions} (
    session_id {id} primary key,
    thread_id {id} not null,
    sdk_version {id} not null,
    state_json {json},
    metadata_json {json},
    created_at {time} not null default {now},
    updated_at {time} not null default {now},
    archived_at {time} {null}
)
"""
GIVEN = {"id": "text", "json": "text", "time": "text", "now": "current_timestamp", "null": ""}
LATIN = "longtext character set latin1"
# collations of this server look at no spaces at the end
PADDED = tuple(id_ for id_ in ALIKE if not id_.endswith(" "))
BLIND = "varchar(255) character set utf8mb4 collate utf8mb4_general_ci"


@dataclass(frozen=True)
class Place:
    """Tables in a database, and how they are reached."""

    kind: str
    types: dict[str, str] | None = None  # None: those of the models
    schema: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    capabilities: dict[str, Any] = field(default_factory=dict)


PLACES = {
    "sqlite": Place("sqlite"),
    "sqlite text": Place("sqlite", {}),
    "sqlite declared": Place("sqlite", {"id": "varchar(9)", "json": "json", "time": "timestamp"}),
    "sqlite generic": Place("sqlite", options={"backend": "generic"}),
    "postgresql": Place("postgresql"),
    "postgresql documented": Place(
        "postgresql",
        {"json": "jsonb", "time": "timestamptz", "now": "now()"},
        schema="app",
        engine=NEW_YORK,
    ),
    "postgresql naive": Place("postgresql", {"json": "json", "time": "timestamp"}, engine=NEW_YORK),
    "postgresql text": Place("postgresql", {"id": "varchar"}, engine=NEW_YORK),
    "postgresql serializable": Place("postgresql", engine={"isolation_level": "SERIALIZABLE"}),
    "postgresql generic": Place("postgresql", options={"backend": "generic"}),
    "pgbouncer": Place("pgbouncer", engine={"connect_args": {"statement_cache_size": 0}}),
    "mariadb": Place("mariadb", capabilities={"ids": PADDED}),
    "mariadb json": Place(
        "mariadb",
        {"id": "varchar(255) collate utf8mb4_bin", "json": "json", "time": "datetime(6)"},
        engine=INDIA,
        capabilities={"ids": PADDED, "values": {k: v for k, v in VALUES.items() if k != "50 deep"}},
    ),
    "mariadb default": Place(
        "mariadb",
        {"id": BLIND, "json": LATIN, "time": "datetime", "null": "null"},
        engine={**INDIA, "isolation_level": "AUTOCOMMIT"},
        capabilities={"step": SECOND, "ids": ("b", "c")},
    ),
    "mariadb generic": Place(
        "mariadb", options={"backend": "generic"}, capabilities={"ids": PADDED}
    ),
}
# What the types of columns and the statements have a part in; the whole kit runs on the models'
# tables alone, and with ADK_SESSIONS_SOAK=1 everywhere.
PART = {
    "test_a_saved_message_reads_back_equal",
    "test_parts_come_back_with_value_and_type",
    "test_a_message_saved_again_is_replaced_and_keeps_its_time",
    "test_ids_that_look_alike_are_different",
    "test_times_come_back_as_the_same_moments_in_utc",
    "test_times_are_kept_as_exactly_as_the_column_can",
    "test_pages_cut_a_list_in_pieces",
    "test_a_saved_session_reads_back_equal",
    "test_a_sessions_values_come_back_with_value_and_type",
    "test_messages_of_an_archived_session_are_left_out",
    "test_a_session_that_was_never_saved_can_be_archived",
    "test_archived_twice_it_keeps_the_first_time",
    "test_a_session_can_be_archived_again_once_it_is_restored",
    "test_one_message_from_many_at_once_is_there_once_and_whole",
    "test_the_tables_are_found_good",
}
CASES = {name for name in dir(ChatPersistenceContract) if name.startswith("test_")}
assert CASES > PART


@dataclass(frozen=True)
class Tables:
    """Tables that are there: `chat()` makes an engine and a chat history on them."""

    url: str
    names: dict[str, str]
    place: Place

    @asynccontextmanager
    async def engine(self, **options: Any) -> AsyncIterator[AsyncEngine]:
        async with engine_for(self.url, **{**self.place.engine, **options}) as engine:
            yield engine

    def on(self, engine: AsyncEngine, **options: Any) -> ChatPersistence:
        more = {**self.place.options, **options}
        return ChatPersistence(engine, tables=self.names, schema=self.place.schema, **more)

    @asynccontextmanager
    async def chat(self, **options: Any) -> AsyncIterator[ChatPersistence]:
        async with self.engine() as engine:
            yield self.on(engine, **options)


@asynccontextmanager
async def engine_for(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(url, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


async def execute(url: str, script: str) -> None:
    async with engine_for(url) as engine, engine.begin() as conn:
        for statement in script.split(";"):
            await conn.exec_driver_sql(statement)


async def make_tables(url: str, place: Place, names: dict[str, str]) -> None:
    if place.types is not None:
        prefix = f"{place.schema}." if place.schema else ""
        if place.schema:
            await execute(url, f"create schema if not exists {place.schema}")
        full = {what: prefix + name for what, name in names.items()}
        return await execute(url, TABLES.format(**{**GIVEN, **place.types, **full}))
    models = chat_models(**names, schema=place.schema)
    async with engine_for(url) as engine, engine.begin() as conn:
        await conn.run_sync(models.metadata.create_all)
    return None


@pytest.fixture(scope="session")
def new_tables(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Place], Tables]:
    """Makes tables, with names of their own."""

    def make(place: Place) -> Tables:
        name = unique_name()
        names = {"messages": f"{name}_messages", "sessions": f"{name}_sessions"}
        if place.kind == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('chat') / name}.db"
        elif place.kind == "pgbouncer":
            run_sync(make_tables(request.getfixturevalue("postgres_url"), place, names))
            return Tables(request.getfixturevalue("pgbouncer_url"), names, place)
        else:
            url = request.getfixturevalue(f"{place.kind.replace('ql', '')}_url")
        run_sync(make_tables(url, place, names))
        return Tables(url, names, place)

    return make


@pytest.fixture(scope="session")
def shared(new_tables: Callable[[Place], Tables]) -> Callable[[str], Tables]:
    """The tables of one of `PLACES`, made once."""
    made: dict[str, Tables] = {}

    def get(name: str) -> Tables:
        if name not in made:
            made[name] = new_tables(PLACES[name])
        return made[name]

    return get


@pytest.fixture(params=DATABASES)
def tables(request: pytest.FixtureRequest, shared: Callable[[str], Tables]) -> Tables:
    """The tables of the models, on each database."""
    return shared(request.param)


@pytest.fixture
async def chat(tables: Tables) -> AsyncIterator[ChatPersistence]:
    async with tables.chat() as chat:
        yield chat


@pytest.fixture
def thread() -> str:
    return unique_name()


def message(thread: str, message_id: str = "m", **fields: Any) -> ChatMessage:
    defaults = {"role": "user", "parts": [message_id], "created_at": START}
    return ChatMessage(thread_id=thread, message_id=message_id, **{**defaults, **fields})


class TestChat(ChatPersistenceContract):
    """The kit with two engines on each place."""

    @pytest.fixture(params=DATABASES)
    def tables(self, request: pytest.FixtureRequest, shared: Callable[[str], Tables]) -> Tables:
        return self.at(request.param, shared)

    def at(self, name: str, shared: Callable[[str], Tables]) -> Tables:
        found = shared(name)
        for name, value in found.place.capabilities.items():
            setattr(self, name, value)
        return found

    @pytest.fixture
    async def chat(self, tables: Tables) -> AsyncIterator[ChatPersistence]:
        async with tables.chat() as chat:
            yield chat

    @pytest.fixture
    async def other_chat(self, tables: Tables) -> AsyncIterator[ChatPersistence]:
        async with tables.chat() as chat:
            yield chat


class TestChatElsewhere(TestChat):
    """A part of the kit on the other places; ADK_SESSIONS_SOAK=1 runs all of it."""

    locals().update(without(CASES - PART))

    @pytest.fixture(params=[name for name in PLACES if name not in DATABASES])
    def tables(self, request: pytest.FixtureRequest, shared: Callable[[str], Tables]) -> Tables:
        return self.at(request.param, shared)


# --- what other software has written --------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PLACES if "default" not in name])
async def test_plain_json_of_other_software_reads_as_it_is(
    shared: Callable[[str], Tables], thread: str, name: str
) -> None:
    tables = shared(name)
    parts = '[{"type": "text", "text": "Gr\\u00fc\\u00dfe \\ud83d\\udc4b"}, 1.5, [null, true]]'
    prefix = f"{tables.place.schema}." if tables.place.schema else ""
    values = f"'{thread}', 'm', 'user', '{parts}'".replace(
        "\\", "\\\\" * (tables.place.kind == "mariadb") or "\\"
    )
    async with tables.engine() as engine:
        async with engine.begin() as conn:
            await conn.exec_driver_sql(
                f"insert into {prefix}{tables.names['messages']} (thread_id, message_id, role,"
                f" parts_json) values ({values})"
            )
            await conn.exec_driver_sql(
                f"insert into {prefix}{tables.names['sessions']} (session_id, thread_id,"
                f" sdk_version, state_json) values ('{thread}', 'a', '1', '[{{}}]')"
            )
        (stored,) = (await tables.on(engine).list_messages(thread)).items
        session = await tables.on(engine).load_session(thread)
    assert stored.parts == [{"type": "text", "text": "Grüße 👋"}, 1.5, [None, True]]
    assert session is not None
    assert (session.state, session.metadata) == ([{}], None)
    # the table's own default, read as UTC; of some it is not, see below
    assert stored.created_at is not None
    assert stored.created_at.utcoffset() == timedelta()


@pytest.mark.parametrize("options", [{}, NEW_YORK, INDIA])
async def test_the_default_times_of_the_models_are_the_present(
    tables: Tables, thread: str, options: dict[str, Any]
) -> None:
    """Whatever the time zone of the session that inserts."""
    zoned = {"postgresql": NEW_YORK, "mariadb": INDIA}.get(tables.place.kind, {})
    if options not in ({}, zoned):
        pytest.skip("that is how another database is told")
    async with tables.engine(**options) as engine:
        async with engine.begin() as conn:
            await conn.exec_driver_sql(
                f"insert into {tables.names['messages']} (thread_id, message_id, role, parts_json)"
                f" values ('{thread}', 'm', 'user', '[]')"
            )
        (stored,) = (await tables.on(engine).list_messages(thread)).items
    assert stored.created_at is not None
    assert abs(datetime.now(UTC) - stored.created_at) < 60 * SECOND


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("'2026-03-04 05:06:07'", START),
        ("'2026-03-04T05:06:07Z'", START),
        ("'2026-03-04T05:06:07.250Z'", START + timedelta(milliseconds=250)),
        ("'2026-03-04T06:06:07+01:00'", START),
        ("'2026-03-04'", datetime(2026, 3, 4, tzinfo=UTC)),
        (f"{int(START.timestamp())}", START),
        (f"{START.timestamp() + 0.5}", START + timedelta(milliseconds=500)),
    ],
)
@pytest.mark.parametrize("name", ["sqlite", "sqlite text", "sqlite declared"])
async def test_times_that_others_wrote_to_sqlite_are_read_and_paged(
    shared: Callable[[str], Tables], thread: str, name: str, written: str, moment: datetime
) -> None:
    tables = shared(name)
    if name == "sqlite text" and "'" not in written:
        pytest.skip("a column of text makes text of a number")
    insert = (
        f"insert into {tables.names['messages']} (thread_id, message_id, role, parts_json,"
        f" created_at) values "
    )
    rows = ", ".join(f"('{thread}', 'm{n}', 'user', '[{n}]', {written})" for n in range(3))
    async with tables.engine() as engine:
        async with engine.begin() as conn:
            await conn.exec_driver_sql(insert + rows)
        chat = tables.on(engine)
        page = await chat.list_messages(thread, limit=2)
        rest = await chat.list_messages(thread, limit=2, cursor=page.next_cursor)
    found = [*page.items, *rest.items]
    assert [m.created_at for m in found] == [moment] * 3
    assert [m.parts for m in found] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ("parts_json", "'[secret'"),
        ("parts_json", "'[1], \"a\": 2'"),
        ("parts_json", "''"),
        ("parts_json, created_at", "'[]', 'secret'"),
    ],
)
async def test_a_damaged_row_is_told_by_its_ids(
    shared: Callable[[str], Tables], thread: str, columns: str, values: str
) -> None:
    tables = shared("sqlite text")
    async with tables.engine() as engine:
        chat = tables.on(engine)
        await chat.save_messages([message(thread, session_id=thread)])
        async with engine.begin() as conn:
            await conn.exec_driver_sql(
                f"insert into {tables.names['messages']} (thread_id, message_id, role, {columns})"
                f" values ('{thread}', 'broken', 'user', {values})"
            )
            await conn.exec_driver_sql(
                f"insert into {tables.names['sessions']} (session_id, thread_id, sdk_version,"
                f" state_json) values ('{thread}', 't', '1', '[secret')"
            )
        with pytest.raises(DatabaseError, match="'broken'") as caught:
            await chat.list_messages(thread)
        assert "secret" not in str(caught.value)
        with pytest.raises(DatabaseError, match=thread) as caught:
            await chat.load_session(thread)
        assert "secret" not in str(caught.value)
        assert len((await chat.list_messages(thread, thread)).items) == 1  # reads no such row


async def test_ids_may_be_of_another_type(
    fresh_database: Callable[[str], str],
) -> None:
    """UUID columns on PostgreSQL."""
    url = fresh_database("postgresql")
    place = Place("postgresql", {"id": "uuid", "json": "jsonb", "time": "timestamptz"})
    names = {"messages": "m", "sessions": "s"}
    script = TABLES.format(**{**GIVEN, **(place.types or {}), **names})
    script = re.sub("(role|sdk_version) uuid", r"\1 text", script)
    await execute(url, script)
    ids = [f"00000000-0000-0000-0000-00000000000{n}" for n in range(4)]
    async with Tables(url, names, place).chat() as chat:
        batch = [message(ids[0], id_, session_id=ids[3]) for id_ in ids]
        await chat.save_messages(batch)
        page = await chat.list_messages(ids[0], limit=2)
        rest = await chat.list_messages(ids[0], limit=2, cursor=page.next_cursor)
        assert [*page.items, *rest.items] == batch
        await chat.archive_session(ids[3], thread_id=ids[0])
        assert (await chat.list_messages(ids[0])).items == []
        await chat.restore_session(ids[3])
        assert len((await chat.list_messages(ids[0], ids[3])).items) == 4


async def test_a_cursor_that_somebody_made_up_is_refused(
    chat: ChatPersistence, thread: str
) -> None:
    """Its digest is no secret."""
    await chat.save_messages([message(thread, n) for n in ("a", "b")])

    def made_up(kind: str, at: Any, message_id: Any) -> str:
        plain = [kind, at]
        digest = chat_module._digest([thread, None], plain, message_id)
        text = json.dumps([digest, plain, message_id])
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    given = (await chat.list_messages(thread, limit=1)).next_cursor or ""
    _, (kind, at), _ = json.loads(base64.urlsafe_b64decode(given + "=="))
    assert made_up(kind, at, "a") == given
    bad: tuple[Any, ...] = ({"a": 1}, [1], True, None, float("nan"), 10**400, "\ud800", "x\0")
    cursors = [made_up(kind, value, "a") for value in bad]
    cursors += [made_up(kind, at, value) for value in (*bad, 1)]
    for cursor in cursors:
        with pytest.raises(InvalidInputError) as caught:
            await chat.list_messages(thread, cursor=cursor)
        assert caught.value.field == "cursor"


# --- what the tables are -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "generic"])
@pytest.mark.parametrize("kind", DATABASES)
async def test_every_missing_column_is_told_by_its_table(
    fresh_database: Callable[[str], str], kind: str, backend: Any
) -> None:
    url = fresh_database(kind)
    names = {"messages": "their_messages", "sessions": "their-sessions"}
    async with engine_for(url) as engine:
        chat = ChatPersistence(engine, tables=names, backend=backend)
        with pytest.raises(SchemaError) as caught:
            await chat.validate_schema()
        assert str(caught.value).splitlines()[1:] == [
            "  their_messages: there is no such table",
            "  their-sessions: there is no such table",
        ]
        quote = '"' if kind != "mariadb" else "`"
        script = f"""
            create table their_messages (thread_id int, Message_Id int, more int, role int,
                created_at int);
            create table {quote}their-sessions{quote} (session_id int, thread_id int,
                sdk_version int, state_json int, metadata_json int, created_at int,
                updated_at int)
        """
        await execute(url, script)
        with pytest.raises(SchemaError) as caught:
            await chat.validate_schema()
        assert str(caught.value).splitlines()[1:] == [
            "  their_messages.session_id: there is no such column",
            "  their_messages.user_id: there is no such column",
            "  their_messages.parts_json: there is no such column",
            "  their-sessions.archived_at: there is no such column",
        ]


@pytest.mark.parametrize("backend", ["auto", "generic"])
async def test_what_is_missing_is_told_without_asking_for_it(
    fresh_database: Callable[[str], str], thread: str, backend: Any
) -> None:
    for kind in DATABASES:
        async with engine_for(fresh_database(kind)) as engine:
            chat = ChatPersistence(engine, backend=backend)
            for call in (
                lambda chat=chat: chat.save_messages([message(thread)]),
                lambda chat=chat: chat.list_messages(thread),
                lambda chat=chat: chat.archive_session(thread),
                lambda chat=chat: chat.restore_session(thread),
                lambda chat=chat: chat.load_session(thread),
            ):
                with pytest.raises(SchemaError) as caught:
                    await call()
                assert "chat_messages: there is no such table" in str(caught.value)
                assert caught.value.__cause__ is caught.value.__context__ is None


async def test_a_search_path_and_a_schema_say_where_the_tables_are(
    fresh_database: Callable[[str], str], thread: str
) -> None:
    url = fresh_database("postgresql")
    script = TABLES.format(**GIVEN, messages="a.chat_messages", sessions="a.chat_sessions")
    await execute(url, f"create schema a; create schema b; {script}")
    path = {"connect_args": {"server_settings": {"search_path": "b, a"}}}
    async with engine_for(url, **path) as found, engine_for(url) as lost:
        await ChatPersistence(found).validate_schema()
        await ChatPersistence(found).save_messages([message(thread)])
        assert len((await ChatPersistence(lost, schema="a").list_messages(thread)).items) == 1
        await ChatPersistence(lost, schema="a").validate_schema()
        for chat in (ChatPersistence(lost), ChatPersistence(lost, schema="b")):
            with pytest.raises(SchemaError):
                await chat.validate_schema()


@pytest.mark.parametrize("backend", ["auto", "generic"])
async def test_an_engine_of_one_tenant_reaches_its_tables_alone(
    fresh_database: Callable[[str], str], thread: str, backend: Any
) -> None:
    """SQLAlchemy's schema_translate_map, by which one engine serves a schema for each tenant."""
    url = fresh_database("postgresql")
    await execute(url, "create schema ann; create schema bob")
    async with engine_for(url) as engine:
        chats = {}
        for tenant in ("ann", "bob"):
            own = engine.execution_options(schema_translate_map={None: tenant, "app": tenant})
            async with own.begin() as conn:
                await conn.run_sync(chat_models().metadata.create_all)
            chats[tenant] = ChatPersistence(own, backend=backend)
            await chats[tenant].validate_schema()
            await chats[tenant].save_messages([message(thread, parts=[tenant])])
            await chats[tenant].archive_session(f"{tenant}'s")
            named = ChatPersistence(own, schema="app", backend=backend)
            (stored,) = (await named.list_messages(thread)).items
            assert stored.parts == [tenant]
        assert await chats["ann"].load_session("bob's") is None
        with pytest.raises(SchemaError):
            await ChatPersistence(engine, backend=backend).validate_schema()


async def test_on_mariadb_a_schema_is_a_database(
    fresh_database: Callable[[str], str], thread: str
) -> None:
    here, there = fresh_database("mariadb"), fresh_database("mariadb")
    models = chat_models(schema=make_url(there).database)
    async with engine_for(here) as engine:
        async with engine.begin() as conn:
            await conn.run_sync(models.metadata.create_all)
        for backend in ("auto", "generic"):
            chat = ChatPersistence(engine, schema=make_url(there).database, backend=backend)
            await chat.validate_schema()
            for _ in range(2):
                await chat.save_messages([message(thread, f"{backend}{n}") for n in range(2)])
                await chat.archive_session(thread)
                await chat.restore_session(thread)
        assert len((await chat.list_messages(thread)).items) == 4


async def test_arguments_that_cannot_be_are_refused(fresh_database: Callable[[str], str]) -> None:
    async with engine_for(fresh_database("sqlite")) as engine:
        bad: list[dict[str, Any]] = [
            {"tables": {"message": "a"}},
            {"tables": {"messages": "a.b"}},
            {"tables": {"messages": 'a"; drop table b; --'}},
            {"tables": {"messages": None}},
            {"tables": {"messages": "a", "sessions": "a"}},
            {"tables": {"messages": "chat_sessions"}},
            {"schema": "a.b"},
            {"backend": "other"},
            {"retry_window": -1},
            {"statement_timeout": 0},
            {"pooler": "session"},
            {"pooler": "transaction", "backend": "other"},
        ]
        for options in bad:
            with pytest.raises(ConfigurationError):
                ChatPersistence(engine, **options)
    for other in (engine.sync_engine, "sqlite://", None):
        with pytest.raises(ConfigurationError):
            ChatPersistence(other)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        chat_models(messages="a b")


# --- models ---------------------------------------------------------------------------------------

ENV = """
import asyncio
from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine
from app import Base, url

def run(connection):
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()

asyncio.run(main())
"""
APP = """
from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from adk_sessions.chat import chat_models

url = {url!r}

class Base(DeclarativeBase):
    metadata = MetaData(naming_convention={{"pk": "pk_%(table_name)s"}})

class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)

chat = chat_models(Base, messages="app_messages")
"""


@pytest.mark.parametrize("kind", DATABASES)
async def test_alembic_makes_the_tables_for_an_application(
    fresh_database: Callable[[str], str], tmp_path: Path, thread: str, kind: str
) -> None:
    """As applications do it: init, revision --autogenerate, upgrade, and check finds no more."""
    url = fresh_database(kind)
    async with engine_for(url) as engine:
        plain = engine.url.render_as_string(hide_password=False)

    def alembic(*commands: str) -> str:
        """Runs commands as from a shell, but in one process."""
        script = f"from alembic.config import main\nfor c in {[*commands]}: main(c.split())"
        done = forked.run("-c", script, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "app.py").write_text(APP.format(url=plain))
    await asyncio.to_thread(alembic, "init migrations")
    (tmp_path / "migrations" / "env.py").write_text(ENV)
    commands = ("revision --autogenerate -m chat", "upgrade head", "check")
    assert "No new upgrade operations" in await asyncio.to_thread(alembic, *commands)
    (revision,) = (tmp_path / "migrations" / "versions").glob("*.py")
    written = revision.read_text()
    assert "adk_sessions" not in written  # it works without this package
    assert written.count("op.create_index(") == 3

    async with engine_for(url) as engine:
        chat = ChatPersistence(engine, tables={"messages": "app_messages"})
        await chat.validate_schema()
        await chat.save_messages([message(thread, session_id=thread)])
        await chat.archive_session(thread)
        assert (await chat.list_messages(thread)).items == []
        assert len((await chat.list_messages(thread, thread)).items) == 1
        async with engine.connect() as conn:
            found = await conn.run_sync(
                lambda c: inspect(c).get_indexes("app_messages")  # PostgreSQL: without its key's
            )
    assert {tuple(index["column_names"]) for index in found} == {
        ("thread_id", "created_at", "message_id"),
        ("session_id",),
    }


def test_models_are_added_to_a_base_or_to_metadata() -> None:
    class Base(DeclarativeBase):
        pass

    models = chat_models(Base, messages="a", sessions="b", schema="c")
    assert models.base is Base
    assert models.metadata is Base.metadata
    assert set(Base.metadata.tables) == {"c.a", "c.b"}
    assert models.message.__table__ is models.messages
    assert models.session.__table__ is models.sessions
    metadata = MetaData(schema="d")
    assert chat_models(metadata).metadata is metadata
    assert set(metadata.tables) == {"d.chat_messages", "d.chat_sessions"}
    assert chat_models().metadata is not chat_models().metadata


async def test_tables_may_have_the_longest_names(tables: Tables, thread: str) -> None:
    """Those of their indexes are shortened."""
    names = {what: f"{thread}_{what}".ljust(63, "x") for what in ("messages", "sessions")}
    models = chat_models(**names)
    async with tables.engine() as engine:
        async with engine.begin() as conn:
            await conn.run_sync(models.metadata.create_all)
        chat = ChatPersistence(engine, tables=names)
        await chat.validate_schema()
        await chat.save_messages([message(thread, session_id=thread)])
        await chat.archive_session(thread)
        assert (await chat.list_messages(thread)).items == []


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("thread", "thread_created"),
        ("session", "session"),
    ],
)
async def test_a_page_of_a_long_thread_is_read_by_the_index(
    fresh_database: Callable[[str], str], query: str, index: str
) -> None:
    """PostgreSQL's plan, of the statement as it is sent."""
    url = fresh_database("postgresql")
    models = chat_models()
    async with engine_for(url) as engine:
        async with engine.begin() as conn:
            await conn.run_sync(models.metadata.create_all)
            await conn.exec_driver_sql(
                "insert into chat_messages select 't' || n % 3, 'm' || n, 's' || n / 10, null,"
                " 'user', now() + n * interval '1 second', '[]' from generate_series(1, 20000) n"
            )
            await conn.exec_driver_sql("analyze chat_messages")
        asked: list[tuple[str, Any]] = []

        def note(_conn: Any, _cursor: Any, sql: str, parameters: Any, *_rest: Any) -> None:
            asked.append((sql, parameters))

        chat = ChatPersistence(engine)
        page = await chat.list_messages("t1", limit=20)
        event.listen(engine.sync_engine, "before_cursor_execute", note)
        if query == "thread":
            await chat.list_messages("t1", limit=20, cursor=page.next_cursor)
        else:
            await chat.list_messages("t1", "s500")
        event.remove(engine.sync_engine, "before_cursor_execute", note)
        ((sql, parameters),) = asked
        async with engine.connect() as conn:
            plan = (await conn.exec_driver_sql(f"explain {sql}", parameters)).scalars().all()
    read = "\n".join(plan)
    assert f"ix_chat_messages_{index}" in read, read
    assert "Seq Scan on chat_messages" not in read, read
    assert "Sort" not in read or query == "session", read


# --- the engine is the application's --------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "SERIALIZABLE"},
        {"isolation_level": "REPEATABLE READ"},
        {"poolclass": NullPool},
        {"pool_size": 1, "max_overflow": 0, "pool_timeout": 20},
        {"pool_reset_on_return": None},
    ],
    ids=str,
)
async def test_it_works_on_any_engine_and_leaves_it_as_it_was(
    tables: Tables, thread: str, options: dict[str, Any]
) -> None:
    if tables.place.kind == "sqlite" and "REPEATABLE READ" in options.values():
        pytest.skip("SQLite has no such level")
    async with tables.engine(**options) as engine:
        level = (await _level(engine)) if "poolclass" not in options else None
        chat = tables.on(engine)
        others = [tables.on(engine) for _ in range(3)]
        await asyncio.gather(
            *(
                one.save_messages([message(thread, f"m{n}{i}") for i in range(5)])
                for n, one in enumerate([chat, *others] * 2)
            ),
            *(one.archive_session(thread) for one in others),
            *(one.list_messages(thread) for one in others),
        )
        assert len((await chat.list_messages(thread)).items) == 40
        await chat.restore_session(thread)
        await chat.save_session(ChatSession(session_id=thread, thread_id="t", sdk_version="1"))
        await chat.validate_schema()
        with pytest.raises(InvalidInputError):
            await chat.save_messages([message(thread, "\0")])
        if "poolclass" not in options:
            pool: Any = engine.pool
            assert pool.checkedout() == 0
            assert pool.checkedin() > 0  # nobody has closed it
            assert await _level(engine) == level
        if options or tables.place.kind == "sqlite":
            return
        # its transactions are its own: a call neither commits nor joins them
        async with engine.connect() as conn:
            await conn.execute(
                text(f"delete from {tables.names['sessions']} where session_id = :id"),
                {"id": thread},
            )
            assert await chat.load_session(thread) is not None
            await conn.rollback()


async def _level(engine: AsyncEngine) -> str:
    async with engine.connect() as conn:
        return await conn.get_isolation_level()


async def test_the_applications_own_codec_for_json_is_no_obstacle(
    shared: Callable[[str], Tables], thread: str
) -> None:
    def decode(connection: Any, _record: Any) -> None:
        for kind in ("json", "jsonb"):
            connection.run_async(
                lambda driver, kind=kind: driver.set_type_codec(
                    kind, encoder=json.dumps, decoder=json.loads, schema="pg_catalog"
                )
            )

    batch = [message(thread, str(n), parts=part) for n, part in enumerate(VALUES.values())]
    for name in ("postgresql", "postgresql naive", "postgresql text"):
        async with shared(name).engine() as engine:
            event.listen(engine.sync_engine, "connect", decode)
            chat = shared(name).on(engine)
            await chat.save_messages(batch)
            stored = {m.message_id: m.parts for m in (await chat.list_messages(thread)).items}
            assert [saferepr(stored[m.message_id]) for m in batch] == [
                saferepr(m.parts) for m in batch
            ]


async def test_batches_in_opposite_orders_do_not_deadlock(
    shared: Callable[[str], Tables], thread: str
) -> None:
    async with shared("postgresql").chat(retry_window=0) as chat:
        batch = [message(thread, f"m{n:03}") for n in range(300)]
        for _ in range(5):
            orders = [batch, batch[::-1]] * 3
            await asyncio.gather(*(chat.save_messages(one) for one in orders))
        assert len((await chat.list_messages(thread)).items) == 300


async def test_messages_keep_their_order_when_the_clock_is_set_back(
    chat: ChatPersistence, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["d", "c", "b", "a"]
    for number, id_ in enumerate(ids):
        at = START - number * SECOND
        monkeypatch.setattr("adk_sessions.chat._now", lambda at=at: at)
        await chat.save_messages([message(thread, id_, created_at=None)])
    assert [m.message_id for m in (await chat.list_messages(thread)).items] == ids


async def test_an_engine_in_memory_is_shared_by_tasks(thread: str) -> None:
    async with engine_for("sqlite://") as engine:
        async with engine.begin() as conn:
            await conn.run_sync(chat_models().metadata.create_all)
        chat, other = ChatPersistence(engine), ChatPersistence(engine)
        batch = [message(thread, f"m{n:02}") for n in range(20)]
        await asyncio.gather(
            *((chat, other)[n % 2].save_messages([m]) for n, m in enumerate(batch))
        )
        assert (await chat.list_messages(thread)).items == batch


async def test_an_engine_with_names_for_statements_goes_through_a_pooler(
    shared: Callable[[str], Tables], thread: str
) -> None:
    """As SQLAlchemy's documentation has it; a call outside of transactions loses its statement."""
    tables = shared("pgbouncer")
    names = {"prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__"}
    options = {"statement_cache_size": 0, "prepared_statement_cache_size": 0, **names}

    async def use(engine: AsyncEngine, number: int) -> None:
        chat = tables.on(engine, pooler="transaction", retry_window=0)
        for n in range(10):
            await chat.save_messages([message(thread, f"{number}-{n}")])
            await chat.list_messages(thread, limit=1)

    async with AsyncExitStack() as stack:
        made = [tables.engine(connect_args=options, poolclass=NullPool) for _ in range(2)]
        engines = [await stack.enter_async_context(engine) for engine in made]
        await asyncio.gather(*(use(engine, n) for n, engine in enumerate(engines * 4)))
        assert len((await tables.on(engines[0]).list_messages(thread)).items) == 80


async def test_each_call_is_one_round_trip_on_postgresql(
    postgres: Postgres, shared: Callable[[str], Tables], thread: str
) -> None:
    tables = shared("postgresql")
    at = make_url(tables.url)
    with wire.proxy(at.host or "", at.port or 5432) as line:
        through = replace(tables, url=line.url(tables.url))
        async with through.chat() as chat:
            session = ChatSession(session_id=thread, thread_id=thread, sdk_version="1", state=[1])
            cursor = None

            async def page() -> None:
                await chat.list_messages(thread, limit=1, cursor=cursor)

            batch = [message(thread, f"m{n}") for n in range(3)]
            large = [message(f"{thread}-2", f"m{n}") for n in range(500)]
            calls: dict[str, Callable[[], Any]] = {
                "save_messages of one": lambda: chat.save_messages(batch[:1]),
                "save_messages of three": lambda: chat.save_messages(batch),
                "save_messages of 500": lambda: chat.save_messages(large),
                "list_messages": lambda: chat.list_messages(thread),
                "list_messages of a session": lambda: chat.list_messages(thread, thread),
                "list_messages by page": page,
                "save_session": lambda: chat.save_session(session),
                "load_session": lambda: chat.load_session(thread),
                "archive_session": lambda: chat.archive_session(thread),
                "restore_session": lambda: chat.restore_session(thread),
                "validate_schema": chat.validate_schema,
            }
            trips = {}
            for name, call in calls.items():
                if name == "list_messages by page":
                    cursor = (await chat.list_messages(thread, limit=1)).next_cursor
                    assert cursor
                for _ in range(2):  # the driver prepares what is new
                    await call()
                await line.settled()
                line.reset()
                await call()
                await line.settled()
                trips[name] = line.trips
            assert trips == dict.fromkeys(calls, 1)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_a_lost_connection_is_not_noticed(
    shared: Callable[[str], Tables], thread: str, kind: str
) -> None:
    tables = shared(kind)
    at = make_url(tables.url)
    ports = {"postgresql": 5432, "mariadb": 3306}
    with wire.proxy(at.host or "", at.port or ports[kind]) as line:
        async with replace(tables, url=line.url(tables.url)).chat() as chat:
            session = ChatSession(session_id=thread, thread_id=thread, sdk_version="1")
            calls: list[Callable[[], Any]] = [
                lambda: chat.save_messages([message(thread, session_id=thread)]),
                lambda: chat.save_session(session),
                lambda: chat.archive_session(thread),
                lambda: chat.restore_session(thread),
                lambda: chat.list_messages(thread),
                lambda: chat.load_session(thread),
            ]
            for call in calls:
                await call()
                assert line.cut(silently=True) == 1
                await call()
            assert len((await chat.list_messages(thread)).items) == 1


@pytest.mark.parametrize("lose", ["request", "reply"])
@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_a_lost_answer_is_not_noticed_either(
    shared: Callable[[str], Tables], thread: str, kind: str, lose: Lose
) -> None:
    """What was done already is done again, and makes no difference."""
    tables = shared(kind)
    at = make_url(tables.url)
    # where there is no COMMIT, the statement itself
    marker = "COMMIT" if kind == "mariadb" else thread
    async with Proxy(at.host or "", at.port or {"postgresql": 5432}.get(kind, 3306)) as proxy:
        behind = at.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        async with replace(tables, url=behind).chat() as chat:
            session = ChatSession(session_id=thread, thread_id=thread, sdk_version="1")
            batch = [message(thread, f"m{n}", session_id=thread) for n in range(3)]
            calls: list[Callable[[], Any]] = [
                lambda: chat.save_messages(batch),
                lambda: chat.save_session(session),
                lambda: chat.archive_session(thread),
                lambda: chat.archive_session(f"{thread}-2"),
                lambda: chat.restore_session(thread),
            ]
            for number, call in enumerate(calls):
                await chat.load_session("none")
                proxy.cut(marker, lose=lose)
                await call()
                assert proxy.fired == number + 1
            assert (await chat.list_messages(thread)).items == batch
            unsaved = await chat.load_session(f"{thread}-2")
            assert unsaved is not None
            assert unsaved.created_at == unsaved.updated_at == unsaved.archived_at


async def test_nothing_is_repeated_where_that_is_not_wanted(
    shared: Callable[[str], Tables], thread: str
) -> None:
    tables = shared("postgresql")
    at = make_url(tables.url)
    with wire.proxy(at.host or "", at.port or 5432) as line:
        async with replace(tables, url=line.url(tables.url)).chat(retry_window=0) as chat:
            await chat.list_messages(thread)
            line.cut(silently=True)
            with pytest.raises(DatabaseError) as caught:
                await chat.save_messages([message(thread, parts=["secret"])])
            assert caught.value.retryable
            assert "secret" not in str(caught.value)


# --- what a table's own rules refuse -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "generic"])
@pytest.mark.parametrize("kind", DATABASES)
async def test_another_unique_key_of_the_application_is_kept(
    new_tables: Callable[[Place], Tables], thread: str, kind: str, backend: Any
) -> None:
    """MySQL's upsert would take whichever key is taken, and write over another thread's row."""
    tables = new_tables(Place(kind))
    name = tables.names["messages"]
    await execute(tables.url, f"create unique index {name}_more on {name} (message_id)")
    async with tables.chat(backend=backend) as chat:
        first = message(thread, parts=["first"])
        await chat.save_messages([first])
        for batch in (
            [message("other", parts=["secret"])],
            [message(thread, "a"), message("other", parts=["secret"]), message("z", "b")],
        ):
            with pytest.raises(AlreadyExistsError) as caught:
                await chat.save_messages(batch)
            assert "secret" not in str(caught.value)
            assert caught.value.__cause__ is caught.value.__context__ is None
        assert (await chat.list_messages(thread)).items == [first]
        assert (await chat.list_messages("z")).items == []
        changed = replace(first, parts=["changed"])
        await chat.save_messages([changed])
        assert (await chat.list_messages(thread)).items == [changed]


@pytest.mark.parametrize("mode", ["STRICT_TRANS_TABLES", "", "TRADITIONAL"])
async def test_ids_that_a_collation_takes_for_the_same_do_not_meet(
    shared: Callable[[str], Tables], thread: str, mode: str
) -> None:
    """MySQL's and MariaDB's default collations do not look at case and accents."""
    tables = shared("mariadb default")
    options = {"connect_args": {"init_command": f"SET sql_mode = '{mode}'"}}
    async with tables.engine(**options) as engine:
        chat = tables.on(engine)
        thread = f"é{thread}"
        first = message(thread, session_id=f"s{thread}")
        await chat.save_messages([first])
        for other in (thread.upper(), thread.replace("é", "e"), f"{thread} "):
            assert (await chat.list_messages(other)).items == []
            assert (await chat.list_messages(thread, f"S{thread}")).items == []
            with pytest.raises(AlreadyExistsError):
                await chat.save_messages([message(other)])
        with pytest.raises(AlreadyExistsError):
            await chat.save_messages([message(thread, "M")])
        assert (await chat.list_messages(thread)).items == [first]

        session = ChatSession(session_id=thread, thread_id="t", sdk_version="1")
        await chat.save_session(session)
        assert await chat.load_session(thread.upper()) is None
        for call in (
            chat.save_session(replace(session, session_id=thread.upper())),
            chat.archive_session(thread.upper()),
        ):
            with pytest.raises(AlreadyExistsError):
                await call
        await chat.archive_session(thread)
        await chat.restore_session(thread.upper())
        loaded = await chat.load_session(thread)
        assert loaded is not None
        assert loaded.archived_at
        # another session, which has no row
        await chat.save_messages([message("t", thread, session_id=thread.upper())])
        assert len((await chat.list_messages("t")).items) == 1
        await chat.save_messages([message("t", thread, session_id=thread)])
        assert (await chat.list_messages("t")).items == []


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_tables_of_two_collations_are_told_what_to_do(
    new_tables: Callable[[Place], Tables], thread: str, kind: str
) -> None:
    if kind == "mariadb":
        tables = new_tables(PLACES["mariadb default"])
        change = "modify session_id varchar(100) collate {}"
        collations = ("utf8mb4_unicode_ci", "utf8mb4_general_ci")
    else:
        tables = new_tables(PLACES["postgresql text"])
        change = 'alter session_id type text collate "{}"'
        collations = ("C", "POSIX")
    for name, collation in zip(tables.names.values(), collations, strict=True):
        await execute(tables.url, f"alter table {name} {change.format(collation)}")
    async with tables.chat() as chat:
        await chat.save_messages([message(thread, session_id=thread)])
        assert len((await chat.list_messages(thread, thread)).items) == 1
        with pytest.raises(DatabaseError, match="one collation"):
            await chat.list_messages(thread)


async def test_what_a_column_cannot_hold_is_refused_whole(
    new_tables: Callable[[Place], Tables], thread: str
) -> None:
    for kind, json_type in (("postgresql", "varchar(20)"), ("mariadb", "varchar(20)")):
        id_type = "varchar(100)"
        tables = new_tables(Place(kind, {"id": id_type, "json": json_type, "time": "timestamp"}))
        async with tables.chat() as chat:
            with pytest.raises(DatabaseError) as caught:
                await chat.save_messages(
                    [message(thread, "a"), message(thread, "b", parts=["secret" * 20])]
                )
            assert "secret" not in str(caught.value)
            assert not caught.value.retryable
            assert (await chat.list_messages(thread)).items == []


async def test_what_the_connection_cannot_say_is_refused(
    shared: Callable[[str], Tables], thread: str
) -> None:
    """The driver's own error would carry the statement with all that is in it."""
    tables = shared("mariadb")
    async with tables.engine(connect_args={"charset": "latin1"}) as engine:
        chat = tables.on(engine)
        await chat.save_messages([message(thread, "é", parts=["日"])])
        with pytest.raises(DatabaseError, match="character set") as caught:
            await chat.save_messages([message(thread, "日", parts=["secret"])])
        assert caught.value.__cause__ is caught.value.__context__ is None
        assert [m.parts for m in (await chat.list_messages(thread)).items] == [["日"]]


async def test_a_batch_in_several_statements_is_one_transaction_though_the_server_commits_each(
    shared: Callable[[str], Tables], thread: str
) -> None:
    batch = [message(thread, f"m{n:03}") for n in range(300)]
    too_long = message(thread, "m999", role="r" * 255)
    tables = shared("mariadb")
    async with tables.engine(connect_args={"autocommit": True}) as engine:
        async with engine.begin() as conn:
            await conn.exec_driver_sql(f"CREATE TABLE {thread} LIKE {tables.names['messages']}")
            await conn.exec_driver_sql(f"ALTER TABLE {thread} MODIFY role VARCHAR(20) NOT NULL")
        chat = ChatPersistence(engine, tables={**tables.names, "messages": thread})
        with pytest.raises(DatabaseError):
            await chat.save_messages([*batch, too_long])
        assert (await chat.list_messages(thread)).items == []
        await chat.save_messages(batch)
        assert len((await chat.list_messages(thread)).items) == 300


async def test_more_than_a_packet_is_sent_in_several_and_one_too_large_is_refused(
    shared: Callable[[str], Tables], thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shared("mariadb").engine() as engine:
        chat = shared("mariadb").on(engine)
        await chat.load_session(thread)
        made: Any = chat._statements
        made._largest_packet = 100_000  # nobody may change the server's for this
        sent: list[str] = []

        def note(_conn: Any, _cursor: Any, sql: str, *_rest: Any) -> None:
            sent.append(sql)

        event.listen(engine.sync_engine, "before_cursor_execute", note)
        batch = [message(thread, f"m{n}", parts=["ü" * 3000, "'\\\"\n"]) for n in range(20)]
        await chat.save_messages(batch)
        assert 5 < len(sent) < 10
        stored = (await chat.list_messages(thread)).items
        assert {m.message_id: m for m in stored} == {m.message_id: m for m in batch}
        with pytest.raises(InvalidInputError, match="max_allowed_packet") as caught:
            await chat.save_messages(
                [message(thread, "x"), message(thread, "y", parts=["'" * 50_000])]
            )
        assert caught.value.field == "parts"
        session = ChatSession(session_id=thread, thread_id=thread, sdk_version="1")
        with pytest.raises(InvalidInputError) as caught:
            await chat.save_session(replace(session, state=["x" * 100_000]))
        assert caught.value.field == "state"
        assert len((await chat.list_messages(thread)).items) == 20


def test_numbers_beyond_64_bits_are_no_numbers_in_the_stored_json() -> None:
    """MySQL's JSON would make floats of them."""
    value = [2**63 - 1, -(2**63) + 1, 2**63, -(10**30), {"n": 10**40}, 12345678901234567890.0]
    written = chat_columns.dump(value, "parts")
    assert chat_columns.load(written) == value
    assert [type(item) for item in chat_columns.load(written)] == [type(item) for item in value]
    numbers = [n for n in json.loads(written) if isinstance(n, int)]
    assert numbers == value[:2]


async def test_a_mysql_timestamp_is_a_moment_for_sessions_in_one_time_zone(
    new_tables: Callable[[Place], Tables], thread: str
) -> None:
    types = {"id": "varchar(100)", "json": "longtext", "time": "timestamp(6) null"}
    tables = new_tables(Place("mariadb", types, engine=INDIA))
    at = START + timedelta(microseconds=123)
    async with tables.chat() as chat:
        await chat.save_messages([message(thread, created_at=at)])
        assert [m.created_at for m in (await chat.list_messages(thread)).items] == [at]


# --- several processes --------------------------------------------------------------------------


def work(tables: Tables, thread: str, number: int) -> None:
    """What one of several processes does at once with the others."""

    async def main() -> None:
        async with tables.chat() as chat:
            for turn in range(15):
                own = [message(thread, f"{turn:02}-{number}-{n}", parts=[number]) for n in range(3)]
                common = [message(thread, f"{turn:02}-{n}", parts=[number] * 3) for n in range(5)]
                batch = [*own, *common]
                await chat.save_messages(batch if number % 2 else batch[::-1])
                session = ChatSession(
                    session_id=f"{thread}-{turn}", thread_id=thread, sdk_version=f"{number}"
                )
                await chat.archive_session(session.session_id, thread_id=thread)
                await chat.save_session(replace(session, state=[number] * 3))
                first = await chat.load_session(session.session_id)
                await chat.archive_session(session.session_id)
                again = await chat.load_session(session.session_id)
                assert first is not None
                assert again is not None
                assert first.archived_at == again.archived_at is not None

    asyncio.run(main())


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        yield pool


@pytest.mark.parametrize(
    "name",
    [*DATABASES, "postgresql generic", *(["mariadb generic", "pgbouncer"] if SOAK else [])],
)
async def test_several_processes_lose_nothing(
    processes: ProcessPoolExecutor, shared: Callable[[str], Tables], thread: str, name: str
) -> None:
    tables = shared(name)
    running = [processes.submit(work, tables, thread, number) for number in range(3)]
    await asyncio.gather(*map(asyncio.wrap_future, running))
    async with tables.chat() as chat:
        stored = {m.message_id: m for m in (await chat.list_messages(thread)).items}
    expected = {f"{turn:02}-{of}-{n}" for turn in range(15) for of in range(3) for n in range(3)}
    expected |= {f"{turn:02}-{n}" for turn in range(15) for n in range(5)}
    assert stored.keys() == expected
    assert all(len(set(m.parts)) == 1 for m in stored.values())


async def test_pages_miss_nothing_while_others_write(tables: Tables, thread: str) -> None:
    async with AsyncExitStack() as stack:
        reader, *writers = [await stack.enter_async_context(tables.chat()) for _ in range(3)]
        before = [message(thread, f"m{n:03}", created_at=START + n * SECOND) for n in range(60)]
        await reader.save_messages(before)
        done = asyncio.Event()

        async def write(chat: ChatPersistence, name: str) -> None:
            for n in range(40):
                at = START + n * 2 * SECOND
                await chat.save_messages([message(thread, f"{name}{n}", created_at=at)])

        async def writing() -> None:
            await asyncio.gather(*(write(w, f"w{n}-") for n, w in enumerate(writers)))
            done.set()

        task = asyncio.create_task(writing())
        rounds = 0
        while not done.is_set() or not rounds:
            seen: list[str] = []
            cursor = None
            while True:
                page = await reader.list_messages(thread, limit=7, cursor=cursor)
                seen += [m.message_id for m in page.items]
                cursor = page.next_cursor
                if cursor is None:
                    break
            assert len(seen) == len(set(seen))
            assert [id_ for id_ in seen if id_.startswith("m")] == [m.message_id for m in before]
            rounds += 1
        await task
