"""Row level security, as a role that neither owns the tables nor may bypass it."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from engines import engine_for
from everywhere import PART
from servers import Postgres, run_pgbouncer, run_sync, unique_name
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from adk_sessions import (
    AlreadyExistsError,
    ConfigurationError,
    DatabaseError,
    Event,
    EventActions,
    InvalidInputError,
    SchemaError,
    Session,
    SessionNotFoundError,
    SessionService,
    StaleSessionError,
    appends,
    dialects,
)
from adk_sessions.dialects.rls import (
    OPERATIONS,
    Contained,
    ContainedColumns,
    ContainedPostgreSQL,
    bound,
    policies,
)
from adk_sessions.models import models
from adk_sessions.testing import SessionServiceContract

TABLES = ("sessions", "events", "state_changes", "user_states", "app_states")
BACKENDS = ("auto", "generic")


# --- a database with policies, and roles that are bound by them ---------------------------------


@dataclass
class Place:
    """A database with tables, and the ways to it."""

    url: str  # as a superuser
    owner: str
    role: str  # may read and write the tables, does not own them
    pooler: str | None = None

    def as_role(self, role: str) -> str:
        url = make_url(self.url).set(username=role, password=role)
        return url.render_as_string(hide_password=False)

    def service(self, **options: Any) -> SessionService:
        options = {"migrate": "off", "row_level_security": True} | options
        if "engine" in options:
            return SessionService(**options)
        return SessionService(options.pop("url", None) or self.as_role(self.role), **options)


async def execute(url: str, *statements: str) -> None:
    async with connected(url) as conn:
        for statement in statements:
            await conn.execute(statement)


@asynccontextmanager
async def connected(url: str, **settings: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection, in a transaction with these settings if there are any; it is committed."""
    conn = await asyncpg.connect(url, timeout=10, statement_cache_size=0)
    try:
        if not settings:
            yield conn
            return
        async with conn.transaction():
            for name, value in settings.items():
                setting = f"adk_sessions.{name}"
                await conn.execute("SELECT set_config($1, $2, true)", setting, value)
            yield conn
    finally:
        await conn.close(timeout=10)


@contextmanager
def roles(postgres: Postgres, *names: str) -> Iterator[tuple[str, ...]]:
    """Roles that can log in and little else; their database must be dropped before they are."""
    made = tuple(f"{unique_name()}_{name}" for name in names)
    try:
        for role in made:
            postgres.execute(
                f"CREATE ROLE \"{role}\" LOGIN NOSUPERUSER NOBYPASSRLS PASSWORD '{role}'"
            )
        yield made
    finally:
        for role in made:
            postgres.execute(f'DROP ROLE IF EXISTS "{role}"')


def grants(role: str, schema: str = "public") -> list[str]:
    return [
        f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}"',
        f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{schema}" TO "{role}"',
    ]


@contextmanager
def new_place(postgres: Postgres) -> Iterator[Place]:
    with roles(postgres, "owner", "app") as (owner, role), postgres.scratch_database() as url:
        place = Place(url, owner, role)

        async def prepare() -> None:
            await execute(url, f'GRANT CREATE, USAGE ON SCHEMA public TO "{owner}"')
            async with SessionService(place.as_role(owner)) as service:
                await service.prepare_tables()
                # twice, as one does who does not remember
                await execute(place.as_role(owner), *[policies(service.models)] * 2)
            await execute(place.as_role(owner), *grants(role))

        run_sync(prepare())
        yield place


@pytest.fixture(scope="module")
def place(postgres: Postgres) -> Iterator[Place]:
    """Shared by the module: tests tell their rows apart by `app_name`."""
    with new_place(postgres) as place:
        yield place


@pytest.fixture(scope="module")
def pooler(postgres: Postgres, place: Place, pgbouncer_url: str) -> Iterator[str]:
    """The place through a pooler in transaction mode, which logs in as the role."""
    # `pgbouncer_url` skips where there is none; that one logs in as a superuser
    login = postgres.address.set(username=place.role, password=place.role)
    with run_pgbouncer(Postgres(login)) as pgbouncer:
        yield pgbouncer.url(make_url(place.url).database or "")


@dataclass
class Two:
    """Ann's and bob's sessions in one app."""

    app: str
    ann: Session
    bob: Session


@pytest.fixture
async def two(place: Place, app_name: str) -> Two:
    """Each with a session called "s", an event called "e" and state in all scopes."""
    async with place.service() as service:
        made = []
        for user in ("ann", "bob"):
            session = await service.create_session(
                app_name=app_name,
                user_id=user,
                session_id="s",
                state={"own": user, "user:own": user, "app:all": 1},
            )
            await service.append_event(session, Event(id="e", author=user, invocation_id="i"))
            session.state |= await service.update_state(
                app_name=app_name, user_id=user, session_id="s", delta={"changed": user}
            )
            made.append(session)
    before = await stored(place, app_name)
    assert [len(before[table]) for table in TABLES] == [2, 2, 2, 2, 1]
    return Two(app_name, *made)


async def stored(place: Place, app_name: str) -> dict[str, list[Any]]:
    """All rows of an app, as a superuser sees them."""
    async with connected(place.url) as conn:
        return {
            table: [
                tuple(row)
                for row in await conn.fetch(
                    f"SELECT * FROM {table} t WHERE app_name = $1 ORDER BY t::text", app_name
                )
            ]
            for table in TABLES
        }


# --- the contract ------------------------------------------------------------------------------

# Cases of the contract that list the sessions of all users.
ACROSS_USERS = (
    "test_sessions_are_listed_by_user_or_app",
    "test_lists_go_by_update_time_user_and_id",
    "test_storage_shares_no_objects",
    "test_values_in_state_stay_the_same",
    "test_a_partly_read_session_may_grow",
    "test_create_refuses_a_bad_id",
    "test_create_refuses_a_bad_state",
)


# Cases about values, to which policies are the same whatever they are: one of each will do.
VALUES = (
    "test_values_in_an_event_stay_the_same",
    "test_append_refuses_a_bad_event",
)

# Through a pooler not everything is worth its time.
POOLED = (
    "test_a_created_session_reads_back_equal",
    "test_ids_belong_to_their_user_and_session",
    "test_one_of_many_creates_of_an_id_wins",
    "test_one_of_two_concurrent_copies_wins",
    "test_tasks_may_share_a_session_object",
    "test_concurrent_repeats_are_stored_once",
    "test_concurrent_writes_keep_every_key",
)


class Bound(SessionServiceContract):
    """The contract kit, as a role that the policies bind."""

    @pytest.fixture
    def new_service(self, place: Place) -> Callable[[], Any]:
        raise NotImplementedError

    @pytest.fixture
    async def service(self, new_service: Callable[[], Any]) -> AsyncIterator[Any]:
        async with new_service() as service:
            yield service

    @pytest.fixture
    async def other_service(self, new_service: Callable[[], Any]) -> AsyncIterator[Any]:
        async with new_service() as service:
            yield service


class TestContract(Bound):
    @pytest.fixture
    def new_service(self, place: Place) -> Callable[[], Any]:
        return place.service


class TestContractGeneric(Bound):
    """A part; the generic path without policies is run in test_contract.py."""

    locals().update(PART)

    @pytest.fixture
    def new_service(self, place: Place) -> Callable[[], Any]:
        return lambda: place.service(backend="generic")


class TestContractPooled(Bound):
    @pytest.fixture
    def new_service(self, place: Place, pooler: str) -> Callable[[], Any]:
        return lambda: place.service(url=f"{pooler}?pgbouncer=true")


def refused(test: Any, when: Callable[[dict[str, Any]], bool] = lambda _: True) -> Any:
    """A case of the contract that must end with a refusal of its ``user_id``."""

    @wraps(test)
    async def run(self: Any, **given: Any) -> None:
        if not when(given):
            return await test(self, **given)
        with pytest.raises(InvalidInputError, match="row level security") as caught:
            await test(self, **given)
        assert caught.value.field == "user_id"

    return run


def once(test: Any) -> Any:
    """A case of the contract with the first of its parameters alone."""

    @wraps(test)
    async def run(self: Any, **given: Any) -> None:
        await test(self, **given)

    run.pytestmark = [  # type: ignore[attr-defined]
        pytest.mark.parametrize(mark.args[0], mark.args[1][:1]).mark
        for mark in getattr(test, "pytestmark", [])
    ]
    return run


_adapted = {name: once(refused(getattr(SessionServiceContract, name))) for name in ACROSS_USERS}
_adapted |= {name: once(getattr(SessionServiceContract, name)) for name in VALUES}
# one of its users has an empty id
_adapted["test_ids_are_kept_verbatim"] = refused(
    SessionServiceContract.test_ids_are_kept_verbatim, lambda given: given["field"] == "user_id"
)
for _name, _test in _adapted.items():
    setattr(TestContract, _name, _test)
    if getattr(TestContractGeneric, _name) is not None:
        setattr(TestContractGeneric, _name, _test)
for _name in dir(SessionServiceContract):
    if _name.startswith("test_") and _name not in POOLED:
        setattr(TestContractPooled, _name, None)


# --- what the service refuses ------------------------------------------------------------------


def marked(session: Session) -> Session:
    session._storage_update_marker = "2026-01-01T00:00:00.000000"
    return session


def new_event(**state_delta: Any) -> Event:
    return Event(author="a", invocation_id="i", actions=EventActions(state_delta=state_delta))


def back() -> Event:
    event = new_event()
    event.actions.rewind_before_invocation_id = "1"  # type: ignore[attr-defined]
    return event


CALLS: dict[str, Callable[[SessionService, str, str], Any]] = {
    "create_session": lambda s, app, user: s.create_session(app_name=app, user_id=user),
    "get_session": lambda s, app, user: s.get_session(app_name=app, user_id=user, session_id="s"),
    "list_sessions": lambda s, app, user: s.list_sessions(app_name=app, user_id=user),
    "append_event": lambda s, app, user: s.append_event(
        Session(app_name=app, user_id=user, id="s"), new_event()
    ),
    "append_event to what was read": lambda s, app, user: s.append_event(
        marked(Session(app_name=app, user_id=user, id="s")), new_event()
    ),
    "get_user_state": lambda s, app, user: s.get_user_state(app_name=app, user_id=user),
    "get_app_state": lambda s, app, user: s.get_app_state(app_name=app),
    "fork_session": lambda s, app, user: s.fork_session(
        Session(app_name=app, user_id=user, id="s")
    ),
    "rewind": lambda s, app, user: s.append_event(
        marked(Session(app_name=app, user_id=user, id="s")), back()
    ),
    "delete_session": lambda s, app, user: s.delete_session(app, user, "s"),
    "update_state": lambda s, app, user: s.update_state(
        app_name=app, user_id=user, add={"user:n": 1, "app:n": 1}
    ),
    "update_state of the app": lambda s, app, user: s.update_state(app_name=app, add={"app:n": 1}),
}
OF_AN_APP = {"get_app_state", "update_state of the app"}


@asynccontextmanager
async def noted(url: str, **options: Any) -> AsyncIterator[tuple[AsyncEngine, list[str]]]:
    """An application's engine, and what is sent through it."""
    async with engine_for(url, **options) as engine:
        statements: list[str] = []

        @sqlalchemy_event.listens_for(engine.sync_engine, "before_cursor_execute")
        def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        yield engine, statements


@pytest.mark.parametrize("isolation", [None, "AUTOCOMMIT"])
@pytest.mark.parametrize("backend", BACKENDS)
async def test_an_empty_id_is_refused_before_anything_is_sent(
    place: Place, backend: str, isolation: str | None
) -> None:
    options = {"isolation_level": isolation} if isolation else {}
    async with noted(place.as_role(place.role), **options) as (engine, statements):
        service = place.service(engine=engine, backend=backend)
        await service.prepare_tables()
        del statements[:]
        for name, call in CALLS.items():
            for app, user, field in (("", "ann", "app_name"), ("a", "", "user_id")):
                if name in OF_AN_APP and field == "user_id":
                    continue
                with pytest.raises(InvalidInputError, match=f"^{field} must be given") as caught:
                    await call(service, app, user)
                assert (name, caught.value.field) == (name, field)
        assert statements == []


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_listing_of_all_users_is_refused(place: Place, two: Two, backend: str) -> None:
    async with place.service(backend=backend) as service:
        with pytest.raises(InvalidInputError, match="for one user of one app") as caught:
            await service.list_sessions(app_name=two.app)
        assert caught.value.field == "user_id"
        (listed,) = (await service.list_sessions(app_name=two.app, user_id="ann")).sessions
        assert listed.state == two.ann.state


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///a.db", "mysql://root@127.0.0.1/a", "mariadb://root@127.0.0.1/a"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_databases_have_no_such_thing(url: str, backend: Any) -> None:
    with pytest.raises(ConfigurationError, match="row_level_security"):
        SessionService(url, backend=backend, row_level_security=True)
    with pytest.raises(ConfigurationError, match="row_level_security"):
        dialects.policies(make_url(url).get_backend_name(), models())


# --- statements --------------------------------------------------------------------------------

# What takes a connection and is no operation: it is a piece of one, or touches no user's rows.
PIECES = {
    *("rows", "write", "lock", "lock_session", "lock_scope", "scope_row", "insert_if_missing"),
    *("check_size", "ping", "transaction", "commits_each_statement", "enter"),
    *("migration_lock", "rebuilding", "require_policies", "require_sight"),
    *("whereabouts", "clear_leftovers", "insert_rows", "set_start"),
}
# What tells the policies whose rows it is about in a way of its own.
BY_ITSELF = {"update_state"}


@pytest.mark.parametrize("statements", [ContainedPostgreSQL, ContainedColumns])
def test_no_operation_is_forgotten(statements: type[Contained]) -> None:
    """Whoever adds one to the statements adds it to OPERATIONS, or here to what is none."""
    public = {
        name
        for name, member in inspect.getmembers(statements, inspect.isfunction)
        if not name.startswith("_") and "conn" in inspect.signature(member).parameters
    }
    assert public - PIECES - BY_ITSELF == set(OPERATIONS)
    assert not statements.autocommit
    for name in OPERATIONS:
        wrapped = vars(statements)[name].__wrapped__
        assert wrapped is getattr(super(statements, statements), name)
        parameters = inspect.signature(wrapped).parameters
        assert "key" in parameters or "app_name" in parameters, f"{name}: whose rows?"


@pytest.mark.parametrize("isolation", [None, "AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("backend", BACKENDS)
async def test_every_call_begins_with_the_settings(
    place: Place, two: Two, backend: str, isolation: str | None
) -> None:
    options = {"isolation_level": isolation} if isolation else {}
    async with noted(place.as_role(place.role), **options) as (engine, statements):
        service = place.service(engine=engine, backend=backend)
        await service.prepare_tables()
        for name, call in CALLS.items():
            del statements[:]
            with suppress(StaleSessionError):
                await call(service, two.app, "ann")
            assert "set_config" in statements[0], name
            assert len(statements) > 1
        assert (await stored(place, two.app))["sessions"]  # bob's, and the one that was made
        # the application's own connections are as it has set them
        async with engine.connect() as conn:
            ids = [await conn.scalar(text("SELECT pg_current_xact_id()::text")) for _ in range(2)]
            assert (ids[0] != ids[1]) == (isolation == "AUTOCOMMIT")
            level = await conn.scalar(text("SHOW transaction_isolation"))
            assert level == (isolation or "read committed").lower() or ids[0] != ids[1]


async def test_where_nothing_keeps_users_apart_nothing_is_served(
    postgres: Postgres, app_name: str
) -> None:
    with new_place(postgres) as place:
        role = place.as_role(place.role)
        async with place.service() as service:  # as it should be
            await service.create_session(app_name=app_name, user_id="ann")
        async with SessionService(place.url, row_level_security=True) as service:
            with pytest.raises(SchemaError, match="superuser or has BYPASSRLS"):
                await service.create_session(app_name=app_name, user_id="ann")
        for statement, back in (
            ("ALTER TABLE events NO FORCE ROW LEVEL SECURITY", "FORCE ROW LEVEL SECURITY"),
            ("ALTER TABLE events DISABLE ROW LEVEL SECURITY", "ENABLE ROW LEVEL SECURITY"),
            ("DROP POLICY adk_sessions ON events", ""),
        ):
            await execute(place.url, statement)
            async with SessionService(role, migrate="off", row_level_security=True) as service:
                with pytest.raises(SchemaError, match="events has no forced row level security"):
                    await service.create_session(app_name=app_name, user_id="ann")
            if back:
                await execute(place.url, f"ALTER TABLE events {back}")


# --- what raw statements reach -----------------------------------------------------------------

BOBS = "WHERE app_name = '{app}' AND user_id = 'bob'"

# Statements that must neither return nor change a row. `{app}` is the name of the app.
NOTHING = {
    **{f"select {table}": f"SELECT * FROM {table} {BOBS}" for table in TABLES[:4]},
    "join": "SELECT * FROM sessions s JOIN events e ON (s.app_name, s.user_id, s.id)"
    " = (e.app_name, e.user_id, e.session_id) WHERE e.user_id = 'bob'",
    "cte": "WITH a AS MATERIALIZED (SELECT * FROM events) SELECT * FROM a WHERE user_id = 'bob'",
    "union": f"SELECT id FROM sessions {BOBS} UNION ALL SELECT id FROM events {BOBS}",
    "exists": f"SELECT 1 WHERE EXISTS (SELECT FROM sessions {BOBS})",
    "exists through the key": "SELECT 1 WHERE EXISTS (SELECT FROM events e JOIN sessions s"
    " USING (app_name, user_id) WHERE s.id = e.session_id AND s.user_id = 'bob')",
    "lock": f"SELECT id FROM sessions {BOBS} FOR UPDATE",
    "lateral": "SELECT e.* FROM (VALUES ('bob')) u (id),"
    " LATERAL (SELECT * FROM events WHERE user_id = u.id) e",
    **{
        f"update {table}": f"UPDATE {table} SET app_name = app_name {BOBS} RETURNING *"
        for table in TABLES[:4]
    },
    **{f"delete {table}": f"DELETE FROM {table} {BOBS} RETURNING *" for table in TABLES[:4]},
    "take over": f"UPDATE sessions SET user_id = 'ann', id = 'mine' {BOBS} RETURNING *",
    "update from": "UPDATE sessions s SET state = 'null' FROM events e"
    " WHERE e.user_id = s.user_id AND s.user_id = 'bob' RETURNING *",
    "delete using": "DELETE FROM events e USING sessions s"
    " WHERE s.user_id = e.user_id AND s.user_id = 'bob' RETURNING *",
    "delete in a cte": f"WITH d AS (DELETE FROM sessions {BOBS} RETURNING *) SELECT * FROM d",
    "insert from": "INSERT INTO user_states SELECT app_name, 'x', state, update_time"
    f" FROM user_states {BOBS} RETURNING *",
    "merge": "MERGE INTO user_states u USING (VALUES ('bob')) v (id) ON u.user_id = v.id"
    " WHEN MATCHED THEN DELETE",
}

SESSION = "INSERT INTO sessions VALUES ('{app}', 'bob', 'new', 'null', now(), now())"
USER_STATE = "INSERT INTO user_states VALUES ('{app}', 'bob', 'null', now())"

# Statements that the policies must refuse.
REFUSED = {
    "insert session": SESSION,
    "returning": f"{SESSION} RETURNING *",
    "cte": f"WITH s AS ({SESSION} RETURNING *) SELECT * FROM s",
    # bob has this session, so the foreign key is met: its check sees every row
    "insert event": "INSERT INTO events"
    " (id, app_name, user_id, session_id, invocation_id, timestamp, event_data)"
    " VALUES ('new', '{app}', 'bob', 's', 'i', now(), 'null')",
    "insert change": "INSERT INTO state_changes"
    " VALUES ('{app}', 'bob', 's', now(), 9, now(), 'null', NULL)",
    "new user state": USER_STATE.replace("bob", "new"),
    "on conflict nothing": f"{USER_STATE} ON CONFLICT DO NOTHING",
    "on conflict update": f"{USER_STATE} ON CONFLICT (app_name, user_id)"
    " DO UPDATE SET state = excluded.state",
    "other app": "INSERT INTO app_states VALUES ('another {app}', 'null', now())",
}

# Statements on ann's own rows that the policies must refuse.
GIVEN_AWAY = {
    "user state": "UPDATE user_states SET user_id = 'cid' WHERE app_name = '{app}'",
    "event": "UPDATE events SET user_id = 'bob', id = 'gift' WHERE app_name = '{app}'",
    "session": "UPDATE sessions SET user_id = 'bob', id = 'gift' WHERE app_name = '{app}'",
    "app state": "UPDATE app_states SET app_name = 'other {app}' WHERE app_name = '{app}'",
    "upsert": "INSERT INTO user_states VALUES ('{app}', 'ann', 'null', now())"
    " ON CONFLICT (app_name, user_id) DO UPDATE SET user_id = 'cid'",
}

# Of a transaction that is not bob's.
SETTINGS: dict[str, dict[str, str]] = {
    "none": {},
    "empty": {"app_name": "", "user_id": ""},
    "app alone": {"app_name": "{app}"},
    "empty user": {"app_name": "{app}", "user_id": ""},
    "user alone": {"user_id": "bob"},
    "ann": {"app_name": "{app}", "user_id": "ann"},
    "other app": {"app_name": "other {app}", "user_id": "bob"},
    "case": {"app_name": "{app}", "user_id": "Bob"},
    "space": {"app_name": "{app}", "user_id": "bob "},
    "pattern": {"app_name": "{app}", "user_id": "%"},
}


async def reaches_nothing(conn: asyncpg.Connection, app: str) -> None:
    """Neither reads nor writes of bob's rows, or of anybody who is not there yet, succeed."""
    for name, statement in NOTHING.items():
        if name != "merge":
            assert await conn.fetch(statement.format(app=app)) == [], name
        elif conn.get_server_version().major >= 15:
            assert await conn.execute(statement) == "MERGE 0"
    for name, statement in REFUSED.items():
        assert "row-level security" in await denied(conn, statement.format(app=app)), name


async def denied(conn: asyncpg.Connection, statement: str) -> str:
    """What the server says to a statement that it must refuse; "" if it does not."""
    refusal = (asyncpg.InsufficientPrivilegeError, asyncpg.FeatureNotSupportedError)
    try:
        # a savepoint, or a transaction where there is none yet
        async with conn.transaction():
            await conn.execute(statement)
    except refusal as error:
        return str(error)
    return ""


async def copied(conn: asyncpg.Connection, table: str) -> set[str]:
    """Whose rows COPY TO writes."""
    target = bytearray()

    async def write(data: bytes) -> None:
        target.extend(data)

    await conn.copy_from_table(table, columns=["user_id"], output=write)
    return set(target.decode().split())


@pytest.mark.parametrize("settings", SETTINGS)
async def test_no_statement_reaches_another_users_rows(
    place: Place, two: Two, settings: str
) -> None:
    before = await stored(place, two.app)
    given = {name: value.format(app=two.app) for name, value in SETTINGS[settings].items()}
    async with connected(place.as_role(place.role), **given) as conn:
        await reaches_nothing(conn, two.app)
        for table in TABLES[:4]:
            assert await copied(conn, table) == ({"ann"} if settings == "ann" else set())
        for table in TABLES:
            assert "row-level security" in await denied(conn, f"COPY {table} FROM STDIN")
    assert await stored(place, two.app) == before


async def test_a_user_sees_and_writes_their_own(place: Place, two: Two) -> None:
    async with connected(place.as_role(place.role), app_name=two.app, user_id="ann") as conn:
        for table in TABLES[:4]:
            assert await conn.fetch(f"SELECT app_name, user_id FROM {table}") == [(two.app, "ann")]
            assert await conn.execute(f"UPDATE {table} SET app_name = app_name") == "UPDATE 1"
        assert await conn.fetch("SELECT app_name FROM app_states") == [(two.app,)]
    async with connected(place.as_role(place.role), app_name=two.app) as conn:
        seen = [len(await conn.fetch(f"SELECT * FROM {table}")) for table in TABLES]
        assert seen == [0, 0, 0, 0, 1]


async def test_a_user_gives_nothing_away(place: Place, two: Two) -> None:
    before = await stored(place, two.app)
    async with connected(place.as_role(place.role), app_name=two.app, user_id="ann") as conn:
        for name, statement in GIVEN_AWAY.items():
            refusal = await denied(conn, statement.format(app=two.app))
            assert "row-level security" in refusal, name
    assert await stored(place, two.app) == before


async def test_the_owner_is_bound_too(place: Place, two: Two) -> None:
    before = await stored(place, two.app)
    async with connected(place.as_role(place.owner)) as conn:
        await reaches_nothing(conn, two.app)
        for table in TABLES:
            assert await conn.execute(f"DELETE FROM {table}") == "DELETE 0"
    async with connected(place.as_role(place.owner), app_name=two.app, user_id="ann") as conn:
        assert await conn.fetch("SELECT user_id FROM sessions") == [("ann",)]
        await reaches_nothing(conn, two.app)
    assert await stored(place, two.app) == before


async def test_an_empty_setting_is_not_the_user_with_an_empty_id(place: Place, two: Two) -> None:
    """There may be such rows from a time without policies."""
    await execute(
        place.url,
        "INSERT INTO sessions SELECT app_name, '', id, state, now(), now() FROM sessions"
        f" WHERE app_name = '{two.app}' AND user_id = 'ann'",
    )
    async with connected(place.as_role(place.role), app_name=two.app, user_id="") as conn:
        assert await conn.fetch("SELECT * FROM sessions") == []
        assert await denied(conn, SESSION.format(app=two.app).replace("'bob'", "''"))


# --- the service -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
async def test_an_apps_state_needs_no_user(place: Place, two: Two, backend: str) -> None:
    async with place.service(backend=backend) as service:
        assert await service.get_app_state(app_name=two.app) == {"all": 1}
        assert await service.get_app_state(app_name=f"other {two.app}") == {}
        assert await service.get_user_state(app_name=two.app, user_id="bob") == {"own": "bob"}


async def test_a_service_that_sets_nothing_finds_nothing(place: Place, two: Two) -> None:
    ids = {"app_name": two.app, "user_id": "ann"}
    async with place.service(row_level_security=False) as service:
        assert await service.get_session(**ids, session_id="s") is None
        assert (await service.list_sessions(app_name=two.app)).sessions == []
        assert await service.get_app_state(app_name=two.app) == {}
        with pytest.raises(DatabaseError) as caught:
            await service.create_session(**ids)
        assert caught.value.code == "42501"


async def clean(engine: AsyncEngine) -> None:
    """The next borrower of a connection finds no settings and no rows."""
    async with engine.connect() as conn:
        found = await conn.execute(
            text(
                "SELECT nullif(current_setting('adk_sessions.app_name', true), ''),"
                " nullif(current_setting('adk_sessions.user_id', true), ''),"
                " (SELECT count(*) FROM sessions), (SELECT count(*) FROM app_states)"
            )
        )
        assert found.one() == (None, None, 0, 0)


@asynccontextmanager
async def one_connection(
    place: Place, isolation: str | None, **options: Any
) -> AsyncIterator[AsyncEngine]:
    if isolation:
        options["isolation_level"] = isolation
    url = place.as_role(place.role)
    async with engine_for(url, pool_size=1, max_overflow=0, pool_timeout=30, **options) as engine:
        yield engine
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("reset", ["rollback", None])
@pytest.mark.parametrize("isolation", [None, "AUTOCOMMIT"])
@pytest.mark.parametrize("backend", BACKENDS)
async def test_settings_do_not_reach_the_next_borrower(
    place: Place, two: Two, backend: str, isolation: str | None, reset: Any
) -> None:
    ids = {"app_name": two.app, "user_id": "ann"}
    async with one_connection(place, isolation, pool_reset_on_return=reset) as engine:
        service = place.service(engine=engine, backend=backend)

        async def pid() -> Any:
            async with engine.connect() as conn:
                return await conn.scalar(text("SELECT pg_backend_pid()"))

        first = await pid()
        old = two.ann.model_copy(deep=True)
        event = new_event(**{"a": 1, "user:b": 1, "app:c": 1})
        for call in (
            lambda: service.append_event(two.ann, event),
            lambda: service.append_event(two.ann, event),
            lambda: service.get_session(**ids, session_id="s"),
            lambda: service.list_sessions(**ids),
            lambda: service.get_app_state(app_name=two.app),
            lambda: service.get_user_state(**ids),
            lambda: service.create_session(**ids, session_id="new"),
            lambda: service.delete_session(two.app, "ann", "new"),
        ):
            await call()
            await clean(engine)
        for error, failing in (
            (AlreadyExistsError, lambda: service.create_session(**ids, session_id="s")),
            (StaleSessionError, lambda: service.append_event(old, new_event())),
            (InvalidInputError, lambda: service.delete_session(two.app, "", "s")),
        ):
            with pytest.raises(error):
                await failing()
            await clean(engine)
        assert await pid() == first


@pytest.mark.parametrize("isolation", [None, "AUTOCOMMIT"])
@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_cancelled_call_leaves_no_settings(
    place: Place,
    two: Two,
    backend: str,
    isolation: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # so long it waits for a server that does not answer
    monkeypatch.setattr(appends, "_PATIENCE", 0.3)
    async with one_connection(place, isolation) as engine:
        service = place.service(engine=engine, backend=backend)
        await service.ping()
        for n in range(12):
            # somewhere between before the first statement and after the last
            call = asyncio.create_task(
                service.create_session(app_name=two.app, user_id="ann", session_id=f"{n}")
            )
            await asyncio.sleep(n * 0.0005)
            call.cancel()
            await asyncio.wait([call])
            await clean(engine)
        async with connected(place.url) as holder:
            await holder.execute("BEGIN")
            await holder.execute(f"SELECT FROM sessions WHERE app_name = '{two.app}' FOR UPDATE")
            append = asyncio.create_task(service.append_event(two.ann, new_event()))
            await somebody_waits(place)
            append.cancel()
            with pytest.raises(asyncio.CancelledError):
                await append
        await clean(engine)
        await service.append_event(two.ann, new_event())
        await clean(engine)


async def somebody_waits(place: Place) -> None:
    async with connected(place.url) as conn:
        for _ in range(500):
            if await conn.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                f" WHERE usename = '{place.role}' AND wait_event_type = 'Lock'"
            ):
                return
            await asyncio.sleep(0.01)
    pytest.fail("nobody waits for a lock")


async def use(service: SessionService, app: str, user: str, tasks: int) -> None:
    """Many tasks of a user, each of which must see this user's rows alone."""

    async def work(n: int) -> None:
        session = await service.create_session(app_name=app, user_id=user, state={"whose": user})
        for i in range(3):
            event = new_event(**{f"user:{n} {i}": user, f"app:{user} {n} {i}": user})
            event.author = user
            await service.append_event(session, event)
            found = await service.get_session(app_name=app, user_id=user, session_id=session.id)
            assert found is not None
            assert {event.author for event in found.events} == {user}
            listed = (await service.list_sessions(app_name=app, user_id=user)).sessions
            assert {one.state["whose"] for one in listed} == {user}

    await asyncio.gather(*(work(n) for n in range(tasks)))
    state = await service.get_user_state(app_name=app, user_id=user)
    assert (len(state), set(state.values())) == (3 * tasks, {user})


@pytest.mark.parametrize("backend", BACKENDS)
async def test_two_users_at_once_stay_apart(place: Place, app_name: str, backend: str) -> None:
    async with place.service(backend=backend, pool_size=3, max_overflow=0) as service:
        await asyncio.gather(*(use(service, app_name, user, 6) for user in ("ann", "bob")))
        assert len(await service.get_app_state(app_name=app_name)) == 2 * 6 * 3
        # bob's session under ann's name is nobody's
        (bobs, *_) = (await service.list_sessions(app_name=app_name, user_id="bob")).sessions
        with pytest.raises(SessionNotFoundError):
            await service.append_event(bobs.model_copy(update={"user_id": "ann"}), new_event())


async def test_nothing_is_left_in_a_pooler(place: Place, pooler: str, app_name: str) -> None:
    async with connected(pooler) as conn:
        assert await conn.fetchval("SELECT current_user") == place.role
    async with (
        place.service(url=f"{pooler}?pgbouncer=true", pool_size=8) as service,
        engine_for(f"{pooler}?pgbouncer=true", pool_size=4) as engine,
    ):
        users = [asyncio.create_task(use(service, app_name, user, 4)) for user in ("ann", "bob")]
        rounds = 0
        while not all(user.done() for user in users):
            await asyncio.gather(*(clean(engine) for _ in range(4)))
            rounds += 1
        await asyncio.gather(*users)
        assert rounds > 3


# --- the policies ------------------------------------------------------------------------------


def test_the_policies_compare_with_the_settings() -> None:
    sql = dialects.policies("postgresql", models())
    app = "app_name = nullif(current_setting('adk_sessions.app_name', true), '')"
    user = "user_id = nullif(current_setting('adk_sessions.user_id', true), '')"
    assert sql.count(f"({app} AND {user})") == 2 * 4
    assert sql.count(f"({app})") == 2
    assert sql.count("ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;") == 5
    assert "metadata" not in sql
    assert "version" not in sql
    assert sql.startswith("BEGIN;\n")
    assert sql.endswith(";\nCOMMIT;\n")


@pytest.mark.parametrize(
    "where",
    [
        {"schema": "My-schema", "table_prefix": "Chat_"},
        {"tables": {"sessions": "Chats", "events": "order", "user_states": "a-b"}},
    ],
    ids=["schema and prefix", "the host's names"],
)
async def test_policies_go_where_the_tables_are(
    postgres: Postgres, where: dict[str, Any], app_name: str
) -> None:
    found = models(**where)
    schema = where.get("schema", "public")
    with roles(postgres, "app") as (role,), postgres.scratch_database() as url:
        place = Place(url, "", role)
        async with engine_for(url) as engine, engine.begin() as conn:
            await conn.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
            await conn.run_sync(found.metadata.create_all)
        await execute(url, policies(found), policies(found), *grants(role, schema))
        async with connected(url) as raw:
            bound = await raw.fetch(
                "SELECT relname, polname FROM pg_policy JOIN pg_class c ON c.oid = polrelid"
                " WHERE relrowsecurity AND relforcerowsecurity"
            )
        assert sorted(bound) == sorted((found.names.of(name), "adk_sessions") for name in TABLES)
        ids = {"app_name": app_name, "user_id": "ann", "session_id": "s"}
        async with place.service(**where) as service:
            session = await service.create_session(**ids)
            await service.append_event(session, new_event())
            assert await service.get_session(**ids) == session
        async with place.service(**where, row_level_security=False) as service:
            assert await service.get_session(**ids) is None


# As the README shows them.
README = (Path(__file__).parent.parent / "README.md").read_text()
((PER_ROLE, _example),) = re.findall(
    r"```sql\n(CREATE TABLE adk_role_users.*?)(INSERT.*?)```", README, re.DOTALL
)


async def test_only_a_policy_for_its_role_contains_who_runs_set(
    postgres: Postgres, app_name: str
) -> None:
    with roles(postgres, "ann", "bob") as (ann, bob), new_place(postgres) as place:
        users = {"ann": ann, "bob": bob}
        owner = place.as_role(place.owner)
        made = {}
        async with place.service() as service:
            for user, role in users.items():
                made[user] = await service.create_session(
                    app_name=app_name, user_id=user, session_id="s", state={"user:own": user}
                )
                await service.append_event(made[user], new_event())
                made[user].state |= await service.update_state(
                    app_name=app_name,
                    user_id=user,
                    session_id="s",
                    delta={"secret": user, "app:all": 1},
                )
                await execute(owner, *grants(role))

        async def seen_as_bob(role: str) -> dict[str, int]:
            async with connected(place.as_role(role), app_name=app_name, user_id="bob") as conn:
                return {
                    table.name: len(await conn.fetch(f"SELECT * FROM {table.name}"))
                    for table in bound(models())
                }

        everything = dict.fromkeys(TABLES, 1)
        assert [await seen_as_bob(role) for role in (ann, bob, place.role)] == [everything] * 3
        await execute(owner, PER_ROLE)
        for user, role in users.items():
            await execute(
                owner, f"INSERT INTO adk_role_users VALUES ('{role}', '{app_name}', '{user}')"
            )
        nothing = dict.fromkeys(TABLES, 0)
        # an app's state is every user's of the app
        of_the_app = nothing | {"app_states": 1}
        assert await seen_as_bob(ann) == of_the_app
        assert await seen_as_bob(bob) == everything
        assert await seen_as_bob(place.role) == nothing

        before = await stored(place, app_name)
        async with connected(place.as_role(ann), app_name=app_name, user_id="bob") as conn:
            await reaches_nothing(conn, app_name)
            assert await conn.fetch("SELECT * FROM adk_own_user") == [(app_name, "ann")]
            for statement in (
                "SELECT * FROM adk_role_users",
                "UPDATE adk_own_user SET user_id = 'bob'",
                f'SET ROLE "{bob}"',
                "TRUNCATE events",
                "ALTER TABLE events DISABLE ROW LEVEL SECURITY",
                "DROP POLICY own_role ON events",
            ):
                assert await denied(conn, statement), statement
        assert await stored(place, app_name) == before

        for user, role in users.items():
            async with place.service(url=place.as_role(role)) as service:
                event = new_event(**{"a": 1, "user:b": 2, "app:c": 3})
                await service.append_event(made[user], event)
                for other in users:
                    ids = {"app_name": app_name, "user_id": other, "session_id": "s"}
                    found = await service.get_session(**ids)
                    assert found == (made[user] if other == user else None)
                with pytest.raises(DatabaseError):
                    await service.create_session(app_name=f"other {app_name}", user_id=user)
