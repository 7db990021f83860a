"""google-adk's old layout, made by its releases (tests/data/v0), becomes schema version 1."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import forked
import pytest
from engines import engine_for
from everywhere import SOAK
from scripts import run_script
from servers import unique_name
from sqlalchemy import Engine, event, inspect, make_url, text

from adk_sessions import SessionService, convert, migrate
from adk_sessions.dialects import open_url
from adk_sessions.errors import SchemaError
from adk_sessions.models import Names, models_of

DATA = Path(__file__).parent / "data" / "v0"
ZONES = {"0.1.0": "America/New_York", "0.4.0": "America/New_York"}
MADE = sorted(path.stem for path in DATA.glob("*.sql"))
KINDS = ("sqlite", "postgresql", "mariadb")
LAST = "1.21.0"
SWAP = re.compile(r"^RENAME TABLE|^ALTER TABLE .* RENAME TO")
CHANGE = re.compile(r"(INSERT|UPDATE|DELETE|CREATE|ALTER|RENAME|DROP|COMMIT)\b")
KILLS = 20 if SOAK else 4


def zone_of(release: str) -> ZoneInfo:
    return ZoneInfo(ZONES.get(release, "Europe/Berlin"))


BERLIN = zone_of(LAST)


async def load(url: str, release: str, kind: str, schema: str | None = None) -> None:
    script = (DATA / f"{release}-{kind}.sql").read_text()
    if kind == "postgresql":
        where = f'CREATE SCHEMA "{schema}"; SET search_path TO "{schema}";\n' if schema else ""
        database = make_url(url).database
        script = f"ALTER DATABASE \"{database}\" SET timezone TO 'UTC';\n{where}{script}"
    await run_script(url, script)


async def submit(url: str, work: Callable[..., Any], names: Names | None = None) -> Any:
    """Runs ``work(conn, statements, names)`` as the migration does."""
    where = names or Names()
    database, statements = open_url(url, models_of(where))

    def locked(conn: Any) -> Any:
        with statements.migration_lock(conn) as held:
            assert held
            return work(conn, statements, where)

    try:
        return await database.submit(locked, write=True)
    finally:
        await database.close()


async def converted(url: str, names: Names | None = None, **options: Any) -> convert.Report:
    options = {"zone": BERLIN, **options}
    report: convert.Report = await submit(
        url, lambda *place: convert.convert(*place, **options), names
    )
    return report


async def is_v0(url: str) -> bool:
    return bool(await submit(url, lambda conn, _, names: convert.is_v0(conn, names)))


async def everything(url: str, *, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """All tables with their columns, keys and rows."""

    def describe(conn: Any) -> dict[str, Any]:
        found = inspect(conn)
        return {
            name: (
                [f"{c['name']} {c['type']} {c['nullable']}" for c in found.get_columns(name)],
                found.get_pk_constraint(name),
                found.get_foreign_keys(name),
                sorted(
                    (str(index["name"]), str(index.get("column_names")))
                    for index in found.get_indexes(name)
                ),
                sorted(map(repr, conn.execute(text(f"SELECT * FROM {name}")))),
            )
            for name in found.get_table_names()
            if name not in but
        }

    async with engine_for(url) as engine, engine.connect() as conn:
        return await conn.run_sync(describe)


async def query(url: str, statement: str, **values: Any) -> list[Any]:
    async with engine_for(url) as engine, engine.begin() as conn:
        result = await conn.execute(text(statement), values)
        return [tuple(row) for row in result] if result.returns_rows else []


def elsewhere(url: str, *statements: str) -> None:
    """Another connection's work, done before this one goes on."""

    async def run() -> None:
        for statement in statements:
            await query(url, statement)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    thread.join()


def frozen(release: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{release}-{kind}.json").read_text())
    return found


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def as_adk_has_it(dumped: dict[str, Any]) -> dict[str, Any]:
    """An event's dump, written by google-adk's current release."""
    from google.adk.events import Event

    # the last release dumps what it has unpickled with every None, and pydantic takes that into
    # account when it chooses a scheme
    actions = dumped["actions"]
    for name in ("requested_auth_configs", "compaction"):
        if actions.get(name) is not None:
            actions[name] = without_none(actions[name])
    event: dict[str, Any] = Event.model_validate(dumped).model_dump(mode="json", exclude_none=True)
    event["long_running_tool_ids"] = sorted(event.get("long_running_tool_ids", []))
    return event


# --- what the release read is what is read now ------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of google-adk's own get_session
@pytest.mark.parametrize("made", MADE)
async def test_what_a_release_wrote_reads_the_same(
    made: str, fresh_database: Callable[[str], str]
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions import DatabaseSessionService as Stock

    release, _, kind = made.partition("-")
    url = fresh_database(kind)
    await load(url, release, kind)
    was = frozen(release, kind)
    report = await converted(url, zone=zone_of(release), batch_size=7)
    assert report.sessions == len(was["sessions"])
    assert report.events == sum(len(session["events"]) for session in was["sessions"])
    assert report.refused == ()
    assert report.orphans == 0
    assert not await is_v0(url)
    await migrate.upgrade(url)
    await migrate.check(url)
    driver = {"sqlite": "sqlite+aiosqlite", "mariadb": "mysql+asyncmy"}.get(kind)
    async_url = make_url(url).set(drivername=driver or "postgresql+asyncpg")
    stock = Stock(async_url.render_as_string(hide_password=False))
    async with SessionService(url) as ours, stock:
        for wanted in was["sessions"]:
            key = {
                "app_name": wanted.get("app_name"),
                "user_id": wanted.get("user_id"),
                "session_id": wanted["id"],
            }
            events = sorted(wanted["events"], key=lambda e: (e["timestamp"], e["id"]))
            for service in (stock, ours):
                session: Any = await service.get_session(**key)
                assert session.state == wanted["state"]
                got = [e.model_dump(mode="json", exclude_none=True) for e in session.events]
                assert [e["id"] for e in got] == [e["id"] for e in events]
                for one, other in zip(got, events, strict=True):
                    assert as_adk_has_it(one) == as_adk_has_it(other)
                if events:
                    newest = events[-1]["timestamp"]
                    assert newest - 1e-5 < session.last_update_time < newest + 1e-5 * len(events)
                elif kind != "mariadb" or await in_utc(url):
                    assert was["begun"] - 1 <= session.last_update_time <= was["done"] + 1


async def in_utc(url: str) -> bool:
    return await query(url, "SELECT TIMEDIFF(NOW(), UTC_TIMESTAMP()) = 0") == [(1,)]


@pytest.mark.parametrize("kind", KINDS)
async def test_both_services_go_on_with_a_converted_session(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    from adk_sessions.session import Event, EventActions

    url = fresh_database(kind)
    await load(url, LAST, kind)
    await converted(url)
    await migrate.upgrade(url)
    async with SessionService(url) as service:
        session = await service.get_session(app_name="shop", user_id="anna", session_id="s1")
        assert session is not None
        actions = EventActions(state_delta={"app:motto": "new", "x": 1})
        await service.append_event(session, Event(author="user", actions=actions))
        again = await service.get_session(app_name="shop", user_id="anna", session_id="s1")
        assert again is not None
        assert again.state["app:motto"] == "new"
        assert len(again.events) == 9
        await service.delete_session(app_name="shop", user_id="anna", session_id="s1")
    # the foreign keys lead from new to new and from old to old
    left = await query(url, "SELECT count(*) FROM events WHERE session_id = 's1'")
    kept = await query(url, "SELECT count(*) FROM adk_v0_events WHERE session_id = 's1'")
    assert (left, kept) == ([(1,)], [(9,)])


@pytest.mark.parametrize("kind", KINDS)
async def test_converted_tables_are_what_the_revisions_make(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    old, new = fresh_database(kind), fresh_database(kind)
    await load(old, LAST, kind)
    # google-adk 1.39 and later add it to the old layout too
    await query(
        old,
        "CREATE INDEX idx_events_app_user_session_ts_id ON events (app_name, user_id, session_id,"
        " timestamp DESC, id DESC)",
    )
    await converted(old)
    await migrate.upgrade(old)
    await migrate.upgrade(new)
    await submit(old, convert.finish)
    converted_tables, made = await everything(old), await everything(new)
    assert converted_tables.keys() == made.keys()
    for name, (columns, primary, foreign, indexes, _) in made.items():
        assert converted_tables[name][:4] == (columns, primary, foreign, indexes)


# --- time zones -------------------------------------------------------------------------------


async def test_the_zone_says_what_the_times_were(fresh_database: Callable[[str], str]) -> None:
    url = fresh_database("sqlite")
    await load(url, LAST, "sqlite")
    await converted(url)
    rows = await query(
        url, "SELECT id, timestamp, event_data FROM events WHERE session_id = 'fold' ORDER BY id"
    )
    # at 01:00 UTC the clock went back from 03:00 to 02:00: what came later is read as the first
    assert {id_: time for id_, time, _ in rows} == {
        "f0": "2023-10-29 00:10:00.500000",
        "f1": "2023-10-29 00:30:00.250000",
        "f2": "2023-10-29 00:00:00.000000",
        "f3": "2023-10-29 00:30:00.000000",
        "f4": "2023-10-29 02:00:00.000000",
        "f5": "2023-11-05 05:10:00.000000",
        "f6": "2023-11-05 06:10:00.000000",
    }
    assert json.loads(rows[0][2])["timestamp"] == 1698538200.5


async def test_a_conversion_with_another_zone_starts_over(
    fresh_database: Callable[[str], str],
) -> None:
    url, other = fresh_database("sqlite"), fresh_database("sqlite")

    def give_up(done: int, total: int) -> None:
        if done > 15:
            raise KeyboardInterrupt

    for place in (url, other):
        await load(place, LAST, "sqlite")
    with pytest.raises(KeyboardInterrupt):
        await converted(url, zone=ZoneInfo("UTC"), batch_size=2, progress=give_up)
    assert len(await query(url, "SELECT * FROM adk_v1_events")) > 0
    with pytest.raises(SchemaError, match="not complete"):
        await submit(url, convert.finish)
    await converted(url)
    await converted(other)
    assert await everything(url) == await everything(other)


async def test_equal_times_are_set_apart_and_stay_in_the_event(
    fresh_database: Callable[[str], str],
) -> None:
    url = fresh_database("sqlite")
    await load(url, LAST, "sqlite")
    await converted(url, batch_size=1)
    rows = await query(
        url, "SELECT id, timestamp, event_data FROM events WHERE session_id = 'equal' ORDER BY 2"
    )
    assert [(row[0], row[1][-6:]) for row in rows] == [
        ("q1", "123456"),
        ("q2", "123457"),
        ("q3", "123458"),
        ("q4", "123459"),
    ]
    assert [json.loads(row[2])["timestamp"] for row in rows] == [
        *[1_700_000_010.123456] * 3,
        1_700_000_010.123457,
    ]


# --- nothing is lost, and nothing done by halves ----------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_dry_run_writes_nothing(kind: str, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database(kind)
    await load(url, LAST, kind)
    before = await everything(url)
    seen: list[tuple[int, int]] = []
    report = await submit(
        url,
        lambda *place: convert.preview(*place, zone=BERLIN, progress=lambda *at: seen.append(at)),
    )
    assert await everything(url) == before
    assert seen[-1] == (33, 33)
    assert (report.sessions, report.events) == (6, 22)
    assert report == await converted(url)


@pytest.mark.parametrize("kind", KINDS)
async def test_finish_drops_the_backups(kind: str, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database(kind)
    await load(url, LAST, kind)
    before = await everything(url)
    with pytest.raises(SchemaError):
        await submit(url, convert.finish)
    await converted(url)
    backups = {name: rows for name, rows in (await everything(url)).items() if "_v0_" in name}
    for name, described in before.items():
        assert backups[f"adk_v0_{name}"][-1] == described[-1]
    dropped = await submit(url, convert.finish)
    assert sorted(dropped) == sorted(backups)
    assert (await everything(url)).keys() == before.keys()
    with pytest.raises(SchemaError, match="no backups"):
        await submit(url, convert.finish)
    await migrate.upgrade(url)


async def test_who_comes_second_finds_it_done(fresh_database: Callable[[str], str]) -> None:
    url = fresh_database("sqlite")
    await load(url, LAST, "sqlite")
    first, second = await asyncio.gather(
        converted(url, batch_size=1), converted(url, batch_size=2, zone=BERLIN)
    )
    assert first == second == await converted(url)


async def test_backups_of_another_conversion_are_not_overwritten(
    fresh_database: Callable[[str], str],
) -> None:
    url = fresh_database("sqlite")
    await load(url, LAST, "sqlite")
    await query(url, "CREATE TABLE adk_v0_events (id TEXT)")
    with pytest.raises(SchemaError, match="backups"):
        await converted(url)


LATE = (
    "UPDATE sessions SET state = '{\"late\": true}' WHERE id = 's1' AND app_name = 'shop'",
    "UPDATE app_states SET state = '{\"late\": true}' WHERE app_name = 'shop'",
    "DELETE FROM events WHERE session_id = 'blob'",
    "DELETE FROM sessions WHERE id = 'blob'",
    "INSERT INTO user_states SELECT app_name, 'late', state, update_time FROM user_states"
    " WHERE user_id = 'Bob ü'",
    "INSERT INTO sessions SELECT app_name, user_id, 'late', state, create_time, update_time"
    " FROM sessions WHERE id = 'empty'",
    "INSERT INTO events (id, app_name, user_id, session_id, invocation_id, author, actions,"
    " timestamp) SELECT '0late', app_name, user_id, session_id, invocation_id, author, actions,"
    " timestamp FROM events WHERE session_id = 's1' AND app_name = 'shop'"
    " AND id IN ('e03')",
    "INSERT INTO events (id, app_name, user_id, session_id, invocation_id, author, actions,"
    " timestamp) SELECT '0late', app_name, user_id, 'late', invocation_id, author, actions,"
    " timestamp FROM events WHERE id = 'e03'",
)


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("sqlite", "copied"), ("postgresql", "copied"), ("mariadb", "copied"), ("mariadb", "RENAME")],
)
async def test_what_is_written_meanwhile_is_not_lost(
    kind: str, moment: str, fresh_database: Callable[[str], str]
) -> None:
    url, other = fresh_database(kind), fresh_database(kind)
    await load(url, LAST, kind)
    await load(other, LAST, kind)
    written = threading.Event()

    def write() -> None:
        if not written.is_set():
            written.set()
            elsewhere(url, *LATE)

    def listen(_c: Any, _cu: Any, statement: str, *_: Any) -> None:
        if statement.startswith(moment):
            write()

    event.listen(Engine, "before_cursor_execute", listen)
    try:
        report = await converted(
            url,
            batch_size=4,
            progress=lambda done, total: write() if moment == "copied" and done == total else None,
        )
    finally:
        event.remove(Engine, "before_cursor_execute", listen)
    assert written.is_set()
    for statement in LATE:
        await query(other, statement)
    assert report == await converted(other)
    assert await everything(url) == await everything(other)
    ids = [
        id_
        for (id_,) in await query(
            url,
            "SELECT id FROM events WHERE session_id = 's1' AND app_name = 'shop' ORDER BY"
            " timestamp",
        )
    ]
    assert ids == ["e01", "e02", "0late", *(f"e0{n}" for n in range(3, 9))]


@pytest.mark.parametrize("kind", KINDS)
async def test_killed_at_any_change_it_goes_on_where_it_was(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    url, other = fresh_database(kind), fresh_database(kind)
    await load(url, LAST, kind)
    await load(other, LAST, kind)
    changes: list[str] = []
    with each_change(changes.append):
        await converted(other, batch_size=2)
    seed = str(random.randrange(10**9))
    done = await asyncio.to_thread(forked.run, __file__, url, str(KILLS), str(len(changes)), seed)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed at") == KILLS
    assert done.stdout.count("killed at the swap") == 1
    assert done.stdout.count("killed at its end") == 1
    assert await everything(url) == await everything(other)
    await migrate.upgrade(url)
    await migrate.check(url)


@contextmanager
def each_change(call: Callable[[str], Any]) -> Iterator[None]:
    """Calls back before every statement that changes something, and before every commit."""

    def before(_c: Any, _cu: Any, statement: str, *_: Any) -> None:
        if CHANGE.match(statement.lstrip()):
            call(" ".join(statement.split()))

    def commit(_: Any) -> None:
        call("COMMIT of the connection")

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "commit", commit)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "commit", commit)


def kill_some(url: str, times: int, changes: int, seed: int) -> None:
    """Converts in a process that kills itself at some change, and again, until it is done.

    The places are drawn from all before the swap, but for the last two: the swap itself, and what
    comes after a rename. Where renames are not transactional they are done then, and the notes are
    not yet forgotten.
    """
    chance = random.Random(seed)
    print("seed", seed, "changes", changes, flush=True)
    for attempt in range(times + 1):
        place = {1: "the swap", 2: "its end"}.get(attempt - times + 3, "")
        point = chance.randrange(1, max(2, changes))
        child = os.fork()
        if child == 0:
            convert_and_die(url, place, point if attempt < times else None)
        _, status = os.waitpid(child, 0)
        changes -= 0 if place else point
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return


def convert_and_die(url: str, place: str, point: int | None) -> None:
    """Converts up to a place, or to so many changes; the swap is as far as that goes."""
    seen = 0
    swaps = False

    def count(statement: str) -> None:
        nonlocal seen, swaps
        seen += 1
        swapping = bool(SWAP.match(statement))
        ends, swaps = swaps and not swapping, swaps or swapping
        at = ends if place == "its end" else swapping or (seen == point and not place)
        if at and point is not None:
            print(f"killed at {place or seen}:", statement[:60], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        with each_change(count):
            if asyncio.run(is_v0(url)):
                asyncio.run(converted(url, batch_size=2))
        code = 0
    finally:
        os._exit(code)


# --- what cannot be converted -----------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/adk_sessions_evil",)


BINARY = {"sqlite": "X'{}'", "postgresql": "'\\x{}'", "mariadb": "X'{}'"}


@pytest.mark.parametrize("kind", KINDS)
async def test_refused_pickles_are_named_by_row(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    await load(url, LAST, kind)
    evil = BINARY[kind].format(pickle.dumps(Evil()).hex())
    await query(
        url, f"UPDATE events SET actions = {evil} WHERE id IN ('e01', 'f3')".replace(":", r"\:")
    )
    before = await everything(url)
    report = await submit(url, lambda *place: convert.preview(*place, zone=BERLIN))
    with pytest.raises(convert.ConversionRefusedError) as refused:
        await converted(url, batch_size=4)
    assert refused.value.rows == report.refused
    assert {(r.app_name, r.user_id, r.session_id, r.event_id) for r in report.refused} == {
        ("shop", "anna", "s1", "e01"),
        ("second", "anna", "s1", "e01"),
        ("shop", "Bob ü", "fold", "f3"),
    }
    assert {r.reason for r in report.refused} == {"posix.system"}
    assert "'f3': posix.system" in str(refused.value)
    assert "adk_sessions_evil" not in str(refused.value)
    now = await everything(url)
    assert {name: now[name] for name in before} == before
    assert await is_v0(url)
    report = await converted(url, refused="empty")
    assert set(report.refused) == set(refused.value.rows)
    assert (report.sessions, report.events, report.refused_more) == (6, 22, 0)
    data = await query(url, "SELECT event_data FROM events WHERE id = 'f3'")
    found = data[0][0] if isinstance(data[0][0], dict) else json.loads(data[0][0])
    assert found["content"]["parts"] == [{"text": "3"}]
    assert found["actions"]["state_delta"] == {}
    assert not Path("/tmp/adk_sessions_evil").exists()


def test_a_long_list_of_refused_rows_is_cut() -> None:
    rows = tuple(convert.Refused("a", "u", "s", f"e{n}", "os.system") for n in range(30))
    message = str(convert.ConversionRefusedError(rows, 5))
    assert message.count("os.system") == 20
    assert "35 rows" in message
    assert "and 15 more" in message


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        *(("sqlite", "copied"), ("postgresql", "RENAME")),
        *(("mariadb", "copied"), ("mariadb", "RENAME")),
        *([("sqlite", "RENAME"), ("postgresql", "copied")] if SOAK else []),
    ],
)
async def test_what_was_emptied_stops_a_run_that_is_to_stop(
    kind: str, at: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    await load(url, LAST, kind)
    evil = BINARY[kind].format(pickle.dumps(Evil()).hex())
    good = await query(url, "SELECT actions FROM events WHERE id = 'f3'")
    await query(url, f"UPDATE events SET actions = {evil} WHERE id = 'f3'")

    def give_up(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    def listen(_c: Any, _cu: Any, statement: str, *_: Any) -> None:
        if SWAP.search(statement):
            raise ArithmeticError

    if at == "RENAME":
        event.listen(Engine, "before_cursor_execute", listen)
    try:
        with pytest.raises((KeyboardInterrupt, ArithmeticError)):
            await converted(url, refused="empty", progress=give_up if at == "copied" else None)
    finally:
        if at == "RENAME":
            event.remove(Engine, "before_cursor_execute", listen)
    copied = await query(url, "SELECT id FROM adk_v1_events WHERE id = 'f3'")
    assert copied == [("f3",)]
    for _ in range(2):
        with pytest.raises(convert.ConversionRefusedError) as refused:
            await converted(url)
        assert [row.event_id for row in refused.value.rows] == ["f3"]
    assert await is_v0(url)
    # mended, it is converted as it is now
    with pytest.raises(KeyboardInterrupt):
        await converted(url, refused="empty", progress=give_up)
    await query(url, "UPDATE events SET actions = :good WHERE id = 'f3'", good=good[0][0])
    report = await converted(url)
    assert report.refused == ()
    data = await query(url, "SELECT event_data FROM events WHERE id = 'f3'")
    found = data[0][0] if isinstance(data[0][0], dict) else json.loads(data[0][0])
    assert found["actions"]["state_delta"] != {}


@pytest.mark.parametrize("value", ["'sécret'", "1700000000.5", "X'00ff'", "NULL", "''"])
async def test_times_that_are_none_are_refused(
    value: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database("sqlite")
    await load(url, LAST, "sqlite")
    await run_script(
        url,
        "PRAGMA writable_schema = 1;"
        "UPDATE sqlite_master SET sql = replace(sql, 'DATETIME NOT NULL', 'DATETIME');"
        "PRAGMA writable_schema = RESET;",
    )
    created = "2026-11-21 10:04:16"
    await query(url, f"UPDATE sessions SET create_time = '{created}', update_time = '{created}'")
    for change in (
        f"UPDATE events SET timestamp = {value} WHERE id IN ('f3', 'b1')",
        f"UPDATE sessions SET create_time = {value}, update_time = {value} WHERE id = 'blob'",
        f"UPDATE sessions SET create_time = {value} WHERE id = 'empty'",
        f"UPDATE app_states SET update_time = {value} WHERE app_name = 'second'",
        f"UPDATE user_states SET update_time = {value} WHERE user_id = 'Bob ü'",
    ):
        await query(url, change)
    wanted = {
        ("shop", "Bob ü", "fold", "f3", "its timestamp is not a time"),
        ("shop", "anna", "blob", "b1", "its timestamp is not a time"),
        ("shop", "anna", "blob", "", "sessions.update_time is not a time"),
        ("shop", "anna", "empty", "", "sessions.create_time is not a time"),
        ("second", "", "", "", "app_states.update_time is not a time"),
        ("shop", "Bob ü", "", "", "user_states.update_time is not a time"),
    }
    await refuses(url, wanted)
    newest = await query(url, "SELECT max(timestamp) FROM events WHERE session_id = 'blob'")
    assert await query(url, "SELECT timestamp FROM events WHERE id = 'f3'") == [
        (f"{created}.000000",)
    ]
    assert await query(url, "SELECT timestamp FROM events WHERE id = 'b1'") == [
        ("1970-01-01 00:00:00.000000",)
    ]
    assert await query(
        url,
        "SELECT create_time, update_time FROM sessions WHERE id IN ('blob', 'empty') ORDER BY id",
    ) == [("1970-01-01 00:00:00.000000", newest[0][0]), (f"{created}.000000", f"{created}.000000")]
    assert await query(url, "SELECT update_time FROM app_states WHERE app_name = 'second'") == [
        ("1970-01-01 00:00:00.000000",)
    ]


async def test_texts_that_are_none_are_refused(fresh_database: Callable[[str], str]) -> None:
    url = fresh_database("sqlite")
    await load(url, LAST, "sqlite")
    await query(url, "UPDATE events SET author = X'00ff' WHERE id = 'f3'")
    await query(url, "UPDATE events SET invocation_id = X'00ff' WHERE id = 'f4'")
    await refuses(
        url,
        {
            ("shop", "Bob ü", "fold", "f3", "author is not text"),
            ("shop", "Bob ü", "fold", "f4", "invocation_id is not text"),
        },
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_states_that_are_no_objects_are_refused(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    await load(url, LAST, kind)
    broken = "[7]" if kind == "postgresql" else "{sécret"
    await query(url, f"UPDATE sessions SET state = '{broken}' WHERE id = 'fold'")
    await query(url, "UPDATE app_states SET state = '\"sécret\"' WHERE app_name = 'second'")
    await query(url, "UPDATE user_states SET state = '17' WHERE user_id = 'Bob ü'")
    await refuses(
        url,
        {
            ("shop", "Bob ü", "fold", "", "sessions.state is not a JSON object"),
            ("second", "", "", "", "app_states.state is not a JSON object"),
            ("shop", "Bob ü", "", "", "user_states.state is not a JSON object"),
        },
    )
    for table, where in (
        ("sessions", "id = 'fold'"),
        ("app_states", "app_name = 'second'"),
        ("user_states", "user_id = 'Bob ü'"),
    ):
        state = await query(url, f"SELECT state FROM {table} WHERE {where}")
        assert state[0][0] in ("{}", {})


async def refuses(url: str, wanted: set[Any]) -> None:
    """Rows are refused with these reasons by all that reads them, and converted with ``empty``."""
    before = await everything(url)
    report = await submit(
        url,
        lambda *place: convert.preview(
            *place,
            zone=BERLIN,
        ),
    )
    with pytest.raises(convert.ConversionRefusedError) as refused:
        await converted(url, batch_size=4)
    assert refused.value.rows == report.refused
    assert len(report.refused) == len(wanted)
    assert "cret" not in str(refused.value)
    now = await everything(url)
    assert {name: now[name] for name in before} == before
    done = await converted(url, batch_size=3, refused="empty")
    for found in (report, done):
        assert {tuple(asdict(row).values()) for row in found.refused} == wanted
        assert (found.sessions, found.events, found.refused_more) == (6, 22, 0)
    assert (done.app_states, done.user_states) == (report.app_states, report.user_states)
    await migrate.upgrade(url)
    await migrate.check(url)
    async with SessionService(url) as service:
        for user in ("anna", "Bob ü"):
            listed = await service.list_sessions(app_name="shop", user_id=user)
            for session in listed.sessions:
                assert await service.get_session(
                    app_name="shop", user_id=user, session_id=session.id
                )


async def test_values_that_not_every_database_holds(fresh_database: Callable[[str], str]) -> None:
    url = fresh_database("sqlite")
    await load(url, LAST, "sqlite")
    content = json.dumps({"parts": [{"text": "a\0b\ud800"}], "n": float("nan"), "big": 1e16})
    await query(url, "UPDATE events SET content = :c WHERE id = 'e07'", c=content)
    await query(url, "UPDATE events SET custom_metadata = 'no json' WHERE id = 'e06'")
    with pytest.raises(convert.ConversionRefusedError, match="custom_metadata is not JSON"):
        await converted(url)
    report = await converted(url, refused="empty")
    assert [row.event_id for row in report.refused] == ["e06"]
    await migrate.upgrade(url)
    async with SessionService(url) as service:
        session = await service.get_session(app_name="shop", user_id="anna", session_id="s1")
        assert session is not None
        assert session.events[6].content["parts"] == [{"text": "a\0b\ud800"}]
        assert str(session.events[6].content["n"]) == "nan"
        assert session.events[5].model_extra is not None
        assert "custom_metadata" not in session.events[5].model_extra
        assert session.events[5].model_extra["usage_metadata"]["total_token_count"] == 7


async def test_events_of_deleted_sessions_stay_in_the_backup(
    fresh_database: Callable[[str], str],
) -> None:
    url = fresh_database("sqlite")
    await load(url, "1.8.0", "sqlite")
    await query(url, "DELETE FROM sessions WHERE id = 's1' AND app_name = 'shop'")
    report = await migrate.upgrade(url, conversion=migrate.Conversion("Europe/Berlin"))
    assert report is not None
    assert (report.sessions, report.events, report.orphans) == (5, 14, 8)
    await migrate.check(url)
    assert await query(url, "SELECT count(*) FROM adk_v0_events") == [(22,)]


async def test_keys_that_an_old_collation_does_not_tell_apart(
    fresh_database: Callable[[str], str],
) -> None:
    url = fresh_database("mariadb")
    await load(url, LAST, "mariadb")
    await query(url, "UPDATE events SET session_id = 'S1', user_id = 'ANNA' WHERE id = 'e05'")
    report = await converted(url)
    assert (report.events, report.orphans) == (22, 0)
    assert await query(url, "SELECT user_id, session_id FROM events WHERE id = 'e05'") == [
        ("anna", "s1")
    ]


# --- other places -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", [Names(None, "p_"), Names("agents", "p_")])
async def test_a_schema_and_a_prefix(where: Names, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database("postgresql")
    await load(url, LAST, "postgresql", where.schema)
    place = f"{where.schema}." if where.schema else ""
    if where.table_prefix:
        for name in ("sessions", "events", "app_states", "user_states"):
            await query(url, f"ALTER TABLE {place}{name} RENAME TO {where.of(name)}")
    report = await converted(url, where)
    assert report.events == 22
    await migrate.upgrade(url, schema=where.schema, table_prefix=where.table_prefix)
    await migrate.check(url, schema=where.schema, table_prefix=where.table_prefix)
    dropped = await submit(url, convert.finish, where)
    assert dropped[0] == f"{where.table_prefix}adk_v0_events"


@pytest.mark.parametrize("kind", KINDS)
async def test_other_databases_are_not_v0(kind: str, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database(kind)
    assert not await is_v0(url)
    await migrate.upgrade(url)
    assert not await is_v0(url)


@pytest.mark.parametrize("kind", KINDS)
async def test_another_applications_events_are_not_v0(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    await query(url, "CREATE TABLE events (id INTEGER PRIMARY KEY, actions VARCHAR(10))")
    assert not await is_v0(url)
    await query(url, "DROP TABLE events")
    await load(url, LAST, kind)
    assert await is_v0(url)
    for table, column in (("user_states", "user_id"), ("sessions", "id"), ("events", "author")):
        await query(url, f"ALTER TABLE {table} RENAME COLUMN {column} TO mine")
        assert not await is_v0(url)
        await query(url, f"ALTER TABLE {table} RENAME COLUMN mine TO {column}")
    assert await is_v0(url)
    await query(url, "DROP TABLE app_states")
    assert not await is_v0(url)
    before = await everything(url)
    with pytest.raises(SchemaError, match="app_states is missing"):
        await submit(url, lambda *place: convert.preview(*place, zone=BERLIN))
    await query(url, "CREATE TABLE app_states (app_name VARCHAR(9) PRIMARY KEY)")
    with pytest.raises(SchemaError, match="app_states has no column state, update_time"):
        await converted(url)
    await query(url, "DROP TABLE app_states")
    assert await everything(url) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_what_refers_to_the_old_tables_is_in_the_way(
    kind: str, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    await load(url, LAST, kind)
    await query(
        url,
        "CREATE TABLE ratings (app VARCHAR(128), who VARCHAR(128), what VARCHAR(128),"
        " FOREIGN KEY (app, who, what) REFERENCES sessions (app_name, user_id, id))",
    )
    before = await everything(url)
    with pytest.raises(SchemaError, match="table ratings has a foreign key to sessions"):
        await converted(url)
    with pytest.raises(SchemaError, match="table ratings has a foreign key to sessions"):
        await submit(url, lambda *place: convert.preview(*place, zone=BERLIN))
    assert await everything(url) == before
    await query(url, "DROP TABLE ratings")
    await query(
        url,
        {
            "sqlite": "CREATE TRIGGER mine AFTER INSERT ON user_states BEGIN SELECT 1; END",
            "postgresql": "CREATE TRIGGER mine BEFORE UPDATE ON user_states FOR EACH ROW"
            " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "mariadb": "CREATE TRIGGER mine AFTER INSERT ON user_states FOR EACH ROW SET @a = 1",
        }[kind],
    )
    with pytest.raises(SchemaError, match="table user_states has a trigger"):
        await converted(url)
    on = " ON user_states" if kind == "postgresql" else ""
    await query(url, f"DROP TRIGGER mine{on}")
    if kind == "postgresql":
        await query(url, "ALTER TABLE app_states ENABLE ROW LEVEL SECURITY")
        with pytest.raises(SchemaError, match="table app_states has row level security"):
            await converted(url)
        await query(url, "ALTER TABLE app_states DISABLE ROW LEVEL SECURITY")
    await converted(url)
    await submit(url, convert.finish)


@pytest.mark.parametrize("schema", [None, "agents"])
async def test_new_tables_get_the_old_ones_owner_and_privileges(
    schema: str | None, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database("postgresql")
    await load(url, LAST, "postgresql", schema)
    place = f"{schema}." if schema else ""
    owner, reader = unique_name(), f'{unique_name()} "Ü: %'
    quoted = '"' + reader.replace('"', '""') + '"'

    async def run(*statements: str) -> None:
        async with engine_for(url) as engine, engine.begin() as conn:
            for statement in statements:
                await conn.exec_driver_sql(statement)

    async def privileges(prefix: str) -> list[Any]:
        found = await query(
            url,
            "SELECT replace(relname, :prefix, ''), pg_get_userbyid(relowner),"
            " CAST(relacl AS text) FROM pg_class WHERE relkind = 'r' AND relname IN"
            " (:prefix || 'sessions', :prefix || 'events', :prefix || 'app_states',"
            " :prefix || 'user_states') ORDER BY 1",
            prefix=prefix,
        )
        return found

    await run(f"CREATE ROLE {owner}", f"CREATE ROLE {quoted}")
    try:
        await run(
            f"GRANT CREATE, USAGE ON SCHEMA {schema or 'public'} TO {owner}",
            f"ALTER TABLE {place}sessions OWNER TO {owner}",
            f"GRANT SELECT, INSERT ON {place}sessions TO {quoted}",
            f"GRANT UPDATE ON {place}sessions TO {quoted} WITH GRANT OPTION",
            f"GRANT SELECT ON {place}events TO PUBLIC",
            f"GRANT DELETE ON {place}events TO {quoted}",
            f"GRANT ALL ON {place}user_states TO {quoted}",
        )
        before = await privileges("")
        await converted(url, Names(schema, ""))
        after = await privileges("")
        assert after == before
        assert after == await privileges("adk_v0_")
        assert [row[1] == owner for row in after] == [False, False, True, False]
        assert after[0][2] is None
        assert "r*" not in after[2][2]
        assert "w*" in after[2][2]
    finally:
        await run(f"DROP OWNED BY {owner}, {quoted} CASCADE", f"DROP ROLE {owner}, {quoted}")


if __name__ == "__main__":
    kill_some(sys.argv[1], *map(int, sys.argv[2:]))
