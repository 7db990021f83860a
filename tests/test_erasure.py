"""erase_user: nothing of a user is left in any table, and everybody else's is untouched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from engines import engine_for
from everywhere import EVERY_DATABASE, place_of
from rows import execute
from servers import Postgres
from sqlalchemy import inspect, make_url, text
from test_convert import BERLIN, LAST, converted
from test_convert import load as load_v0
from test_rls import connected, grants, roles
from workers import event, load

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    Event,
    EventActions,
    InvalidInputError,
    SessionNotFoundError,
    SessionService,
    migrate,
    retention,
)
from adk_sessions.dialects.rls import policies
from adk_sessions.lifecycle import ErasureReport
from adk_sessions.models import Names

MARK = "xyzzy"
NOTHING = ErasureReport(0, 0, 0, 0, 0, 0)


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


async def live(service: SessionService, app: str, user: str, *, sessions: int = 2) -> None:
    """Everything that can be stored of a user, each piece with the user's own mark in it."""
    mark = f"{MARK}-{user}"
    for n in range(sessions):
        session = await service.create_session(
            app_name=app, user_id=user, session_id=f"s{n}", state={"a": mark, "user:b": mark}
        )
        key = (app, user, f"s{n}")
        await service.append_events(
            session,
            [
                Event(
                    id=f"e{i}",
                    author="user",
                    content=f"{mark}\0",
                    actions=EventActions(state_delta={"c": mark}),
                )
                for i in range(3)
            ],
        )
        await service.update_state(
            app_name=app, user_id=user, session_id=f"s{n}", delta={"d": mark}
        )
        await service.update_session(*key, title=mark, labels={"l": mark})
    await service.archive_session(app, user, "s0")


async def seen(service: SessionService, app: str, user: str) -> Any:
    """All that a user has, as it is read."""
    listed = await service.list_sessions(app_name=app, user_id=user, archived=None)
    return (
        [await load(service, app, user, one.id) for one in listed.sessions],
        await service.get_user_state(app_name=app, user_id=user),
        await service.erase_user(app, user, dry_run=True),
    )


async def dump(url: str) -> list[str]:
    """Every row of every table of a database."""

    def read(conn: Any) -> list[str]:
        return [
            f"{name} {row}"
            for name in inspect(conn).get_table_names()
            for row in conn.execute(text(f"SELECT * FROM {name}"))
        ]

    async with engine_for(url) as engine, engine.connect() as conn:
        return await conn.run_sync(read)


# --- the tables of the store ---------------------------------------------------------------------


async def test_everything_of_a_user_goes_and_nothing_of_others(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    other = app_name + "-2"
    others = [(app_name, "bob"), (app_name, "ANN"), (app_name, "ann "), (other, "ann")]
    for app, user in [(app_name, "ann"), *others]:
        await live(service, app, user, sessions=5 if (app, user) == (app_name, "ann") else 1)
    await service.update_state(app_name=app_name, delta={"app:a": 1})
    before = [await seen(service, *who) for who in others]

    expected = ErasureReport(5, 15, 1, 5, 0, left=26)
    assert await service.erase_user(app_name, "ann", dry_run=True) == expected
    assert len((await service.list_sessions(app_name=app_name, user_id="ann")).sessions) == 4
    assert await service.erase_user(app_name, "ann") == ErasureReport(5, 15, 1, 5, 0, left=0)
    assert await service.erase_user(app_name, "ann", dry_run=True) == NOTHING
    assert await service.erase_user(app_name, "ann") == NOTHING
    assert [await seen(service, *who) for who in others] == before
    assert await service.get_app_state(app_name=app_name) == {"a": 1}
    # the user may come back
    session = await service.create_session(app_name=app_name, user_id="ann", session_id="s0")
    assert session.state == {"app:a": 1}
    assert (await load(service, app_name, "ann", "s0")).events == []


async def test_a_user_that_nobody_knows_is_erased_too(
    service: SessionService, app_name: str
) -> None:
    assert await service.erase_user(app_name, "nobody") == NOTHING
    for key in ((app_name, "u" * 129), ("a\0", "u"), (app_name, None)):
        with pytest.raises(InvalidInputError):
            await service.erase_user(*key)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_events_without_a_session_go_too(
    kind: str, migrated_database: Callable[[str], str], app_name: str
) -> None:
    """google-adk's own delete has left such where foreign keys are off."""
    url = migrated_database(kind)
    async with SessionService(url) as service:
        for user in ("ann", "bob"):
            await live(service, app_name, user)
        off = "SET FOREIGN_KEY_CHECKS = 0" if kind == "mariadb" else None
        if kind == "sqlite":
            off = "PRAGMA foreign_keys = OFF"
        if kind == "postgresql":
            off = "SET session_replication_role = replica"
        async with engine_for(url) as engine, engine.connect() as conn:
            assert off is not None
            await conn.execute(text(off))
            await conn.commit()
            await conn.execute(text("DELETE FROM sessions WHERE id = 's0'"))
            await conn.commit()
        report = await service.erase_user(app_name, "ann")
        assert report == ErasureReport(1, 6, 1, 2, 0, left=0)
        assert (await service.erase_user(app_name, "bob", dry_run=True)).events == 6
    rows = await dump(url)
    assert [row for row in rows if f"{MARK}-ann" in row] == []
    assert [row for row in rows if f"{MARK}-bob" in row] != []


async def test_what_somebody_stores_meanwhile_is_counted_as_left(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await live(service, app_name, "ann")
    held = await load(service, app_name, "ann", "s1")
    removed = service._removed

    async def write_on(*args: Any, **options: Any) -> Any:
        result = await removed(*args, **options)
        with pytest.raises(SessionNotFoundError):
            await service.append_event(held, event("late", {"user:late": 1}))
        session = await service.create_session(app_name=app_name, user_id="ann")
        await service.append_event(session, event("late", {}))
        return result

    monkeypatch.setattr(service, "_removed", write_on)
    report = await service.erase_user(app_name, "ann")
    # a session and its event; the state that sessions share goes last
    assert report == ErasureReport(2, 6, 1, 2, 0, left=2)
    monkeypatch.undo()
    assert await service.erase_user(app_name, "ann") == ErasureReport(1, 1, 0, 0, 0, left=0)


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
async def test_with_google_adks_types(database_url: str, app_name: str) -> None:
    pytest.importorskip("google.adk")
    from google.adk.events import Event as AdkEvent

    from adk_sessions.adk import DatabaseSessionService

    async with DatabaseSessionService(database_url) as service:
        for user in ("ann", "bob"):
            session = await service.create_session(app_name=app_name, user_id=user)
            await service.append_event(session, AdkEvent(author="user"))
        assert await service.erase_user(app_name, "ann") == ErasureReport(1, 1, 1, 0, 0, 0)
        assert (await service.erase_user(app_name, "bob", dry_run=True)).left == 3


# --- the backups of a conversion -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_the_backups_of_a_conversion_are_erased_too(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    await load_v0(url, LAST, kind)
    # the user and the app are marked, so that a row of theirs shows wherever it is
    for table in ("sessions", "events", "user_states"):
        columns = "app_name, user_id"
        rows = await fetch(url, f"SELECT DISTINCT {columns} FROM {table}")
        assert ("shop", "anna") in [tuple(row) for row in rows]
    await converted(url, zone=BERLIN)
    await migrate.upgrade(url)
    [(sessions,), (events,), (states,)] = [
        (await fetch(url, f"SELECT count(*) FROM adk_v0_{t} WHERE {WHO}"))[0]
        for t in ("sessions", "events", "user_states")
    ]
    assert min(sessions, events, states) > 0
    others = [row for row in await dump(url) if not is_annas(row)]
    async with SessionService(url) as service:
        backups = sessions + events + states
        expected = ErasureReport(sessions, events, states, 0, backups, left=2 * backups)
        assert await service.erase_user("shop", "anna", dry_run=True) == expected
        report = await service.erase_user("shop", "anna")
        assert report == ErasureReport(sessions, events, states, 0, backups, left=0)
    after = await dump(url)
    assert [row for row in after if is_annas(row)] == []
    # every other row of every table is there as it was
    assert sorted(after) == sorted(others)
    await migrate.check(url)


WHO = "app_name = 'shop' AND user_id = 'anna'"


def is_annas(row: str) -> bool:
    return "'shop'" in row and "'anna'" in row


async def fetch(url: str, statement: str) -> list[tuple[Any, ...]]:
    async with engine_for(url) as engine, engine.connect() as conn:
        return [tuple(row) for row in await conn.execute(text(statement))]


async def test_an_old_collation_that_takes_a_capital_for_a_small_letter(
    fresh_database: Callable[[str], str],
) -> None:
    """There an event's user may be spelled otherwise than its session's, and both are one."""
    url = fresh_database("mariadb")
    await load_v0(url, LAST, "mariadb")
    now = "'2024-01-01 00:00:00'"
    await execute(
        url,
        *(
            "INSERT INTO sessions (app_name, user_id, id, state, create_time, update_time)"
            f" VALUES ('shop', '{user}', '{id}', '{{}}', {now}, {now})"
            for user, id in (("zoe", "z1"), ("ZOE", "z2"))
        ),
        *(
            "INSERT INTO events (id, app_name, user_id, session_id, invocation_id, author,"
            f" actions, timestamp) SELECT '{id}', 'shop', '{user}', '{session}', 'i', 'user',"
            f" actions, {now} FROM events LIMIT 1"
            for id, user, session in (("x1", "zoe", "z1"), ("x2", "Zoe", "z1"), ("x3", "ZOE", "z2"))
        ),
    )
    await converted(url, zone=BERLIN)
    async with SessionService(url) as service:
        report = await service.erase_user("shop", "zoe")
        assert report == ErasureReport(1, 2, 0, 0, 3, left=0)
        left = await fetch(url, "SELECT id FROM adk_v0_events WHERE user_id = 'zoe'")
        assert left == [("x3",)]
        assert [one.id for one in (await load(service, "shop", "ZOE", "z2")).events] == ["x3"]
        assert await service.erase_user("shop", "ZOE") == ErasureReport(1, 1, 0, 0, 2, left=0)


@pytest.mark.parametrize("schema", [None, "chats"])
async def test_backups_under_another_name(
    schema: str | None, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database("postgresql")
    place = "" if schema is None else f'"{schema}".'
    await load_v0(url, LAST, "postgresql", schema)
    tables = ("sessions", "events", "app_states", "user_states")
    await execute(url, *(f"ALTER TABLE {place}{t} RENAME TO my_{t}" for t in tables))
    names = Names(schema, "my_")
    await converted(url, names, zone=BERLIN)
    async with SessionService(url, schema=schema, table_prefix="my_") as service:
        report = await service.erase_user("shop", "anna")
        assert report.backups == report.sessions + report.events + report.user_states > 3
        assert report.left == 0
        assert await service.erase_user("shop", "anna") == NOTHING
    assert await fetch(url, f"SELECT * FROM {place}my_adk_v0_events WHERE {WHO}") == []


# --- row level security --------------------------------------------------------------------------


async def test_with_row_level_security(
    postgres: Postgres, fresh_database: Callable[[str], str]
) -> None:
    """Policies show the user's rows alone; backups have none, and need the role's privileges."""
    with roles(postgres, "app") as (role,), postgres.scratch_database() as url:
        await load_v0(url, LAST, "postgresql")
        await converted(url, zone=BERLIN)
        as_role = make_url(url).set(username=role, password=role)
        async with SessionService(url) as owner:
            await owner.prepare_tables()
            for user in ("anna", "eve"):
                await live(owner, "store", user)
            async with connected(url) as conn:
                for statement in (policies(owner.models), *grants(role)):
                    await conn.execute(statement)
                await conn.execute(f'REVOKE DELETE ON adk_v0_sessions FROM "{role}"')
            bound_url = as_role.render_as_string(hide_password=False)
            bound = SessionService(bound_url, row_level_security=True, migrate="off")
            async with bound:
                assert await bound.erase_user("store", "anna") == ErasureReport(2, 6, 1, 2, 0, 0)
                # who does not say whose rows are wanted sees none, and must not call that nothing
                async with SessionService(bound_url, migrate="off") as blind:
                    for call in (
                        lambda: blind.erase_user("shop", "anna"),
                        lambda: blind.prune("shop"),
                        lambda: anext(aiter(blind.export_sessions("shop", "anna"))),
                    ):
                        with pytest.raises(ConfigurationError, match="hides rows"):
                            await call()
                before = await owner.erase_user("shop", "anna", dry_run=True)
                assert await bound.erase_user("shop", "anna", dry_run=True) == before
                # nothing is erased by a role that could not erase all of it
                with pytest.raises(DatabaseError) as raised:
                    await bound.erase_user("shop", "anna")
                assert raised.value.code == "42501"
                assert await owner.erase_user("shop", "anna", dry_run=True) == before
                async with connected(url) as conn:
                    await conn.execute(f'GRANT DELETE ON adk_v0_sessions TO "{role}"')
                report = await bound.erase_user("shop", "anna")
                assert (report.backups, report.left) == (before.backups, 0)
            assert (await owner.erase_user("shop", "anna", dry_run=True)).left == 0
            assert (await owner.erase_user("store", "eve", dry_run=True)).left == 11
