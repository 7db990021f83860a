"""Importing files of google-adk's SqliteSessionService, on each kind of database."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sqlite3
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import pytest
from engines import engine_for
from sqlalchemy import URL, Connection, create_engine, text

from adk_sessions import (
    ConfigurationError,
    DatabaseError,
    Event,
    InvalidInputError,
    SchemaError,
    SessionService,
)
from adk_sessions.dialects.adk_sqlite import is_adk_sqlite
from adk_sessions.dialects.rows import Key
from adk_sessions.models import models
from adk_sessions.transfer import Report, import_adk_sqlite

FROZEN = Path(__file__).parent / "data" / "adk_sqlite" / "sessions.sql"
KINDS = ["sqlite", "postgresql", "mariadb"]
every_kind = pytest.mark.parametrize("kind", KINDS)

ANN = {"app_name": "shop", "user_id": "ann"}
KEYS = [
    Key("shop", "ann", "talk"),
    Key("shop", "ann", "back in time"),
    Key("shop", "ann", "odd"),
    Key("shop", "Ann", "talk"),
    Key("quiet", "ü" * 128, "💬" * 128),
]
ALL = Report(sessions=5, events=10, app_states=1, user_states=1)
AGAIN = Report(already_there=5)

NewDatabase = Callable[[str], str]


def write(file: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(file)) as conn:
        for statement in statements:
            conn.executescript(statement)
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "it's 100% mine?.db", FROZEN.read_text())


@pytest.fixture
async def service(
    request: pytest.FixtureRequest, fresh_database: NewDatabase
) -> AsyncIterator[SessionService]:
    parameters = getattr(request.node, "callspec", None)
    kind = parameters.params.get("kind", "sqlite") if parameters else "sqlite"
    async with SessionService(fresh_database(kind)) as service:
        yield service


async def rows(url: str) -> dict[str, list[Any]]:
    """Everything that is stored, JSON decoded."""

    def plain(value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else value

    found = {}
    async with engine_for(url) as engine, engine.connect() as conn:
        for table in models().metadata.sorted_tables:
            result = await conn.execute(text(f"SELECT * FROM {table.fullname}"))
            found[table.name] = sorted(
                (tuple(map(plain, row)) for row in result), key=lambda row: str(row)
            )
    return found


async def read(service: Any, key: Key) -> Any:
    return await service.get_session(
        app_name=key.app_name, user_id=key.user_id, session_id=key.session_id
    )


# What comes out of it


@every_kind
async def test_sessions_are_what_their_service_reads(
    kind: str, source: Path, fresh_database: NewDatabase
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions.database_session_service import DatabaseSessionService as Stock
    from google.adk.sessions.sqlite_session_service import SqliteSessionService

    from adk_sessions.adk import DatabaseSessionService as Ours

    url = fresh_database(kind)
    theirs = SqliteSessionService(str(source))
    async with Ours(url) as ours:
        assert await import_adk_sqlite(ours, source) == ALL
        for key in KEYS:
            expected, found = await read(theirs, key), await read(ours, key)
            assert found.events == expected.events
            # NaN is not equal to itself
            values = [{k: repr(v) for k, v in s.state.items()} for s in (found, expected)]
            assert values[0] == values[1]
            # theirs moves back with an event's time
            newest = max([e.timestamp for e in expected.events] or [0])
            assert found.last_update_time == pytest.approx(
                max(expected.last_update_time, newest), abs=2e-6
            )
        users = [(await s.get_user_state(**ANN)) for s in (ours, theirs)]
        assert users[0] == users[1] == {"name": "Ann", "seen": 1}

    from test_interop import DRIVERS  # google-adk takes an async driver's URL only

    async with Stock(url.replace(url.partition(":")[0], DRIVERS[kind], 1)) as stock:
        for key in KEYS:
            if key.session_id == "odd":
                continue  # its values are escaped, so that every database holds them
            expected, found = await read(theirs, key), await read(stock, key)
            assert found.state | {"float": 1e16} == expected.state | {"float": 1e16}
            exact = [event for event in found.events if event.id != "e2"]  # holds a NUL
            assert exact == [event for event in expected.events if event.id != "e2"]
        session = await read(stock, KEYS[4])  # an app without state
        from google.adk.events import Event as AdkEvent

        await stock.append_event(session, AdkEvent(author="user"))


@every_kind
async def test_it_is_a_session_like_any_other(
    kind: str, source: Path, service: SessionService
) -> None:
    assert await import_adk_sqlite(service, source) == ALL
    talk = await read(service, KEYS[0])
    assert [event.id for event in talk.events] == ["e1", "e2", "z", "y", "x", "e3", "e4"]
    assert talk.events[1].content["parts"] == [{"text": "NUL \0 inside"}]
    later = await service.get_session(**ANN, session_id="talk", num_recent_events=3)
    assert later is not None
    assert [event.id for event in later.events] == ["x", "e3", "e4"]
    since = await service.get_session(
        **ANN, session_id="talk", after_timestamp=talk.events[4].timestamp
    )
    assert since is not None
    assert [event.id for event in since.events] == ["z", "y", "x", "e3", "e4"]
    odd = (await read(service, KEYS[2])).state
    assert math.isnan(odd["nan"])
    assert (odd["inf"], odd["nul"], odd["surrogate"]) == (-math.inf, "a\0b", "a\ud800b")
    assert (odd["big"], odd["float"], str(odd["zero"])) == (10**30, 1e16, "-0.0")
    assert (odd["marked"], odd["nul\0key"]) == ("adk_sessions:text:x", 1)
    for key in KEYS:
        session = await read(service, key)
        await service.append_event(session, Event(id="new", author="user"))
        assert (await read(service, key)).events[-1].id == "new"
    # a session that has gone on holds all that there is to import
    assert await import_adk_sqlite(service, source) == AGAIN


@every_kind
async def test_the_column_is_the_clock(
    kind: str, source: Path, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    async with SessionService(url) as service:
        await import_adk_sqlite(service, source)
    async with engine_for(url) as engine, engine.connect() as conn:
        events, sessions = models().events.c, models().sessions.c
        for key in KEYS[:2]:
            times = list(
                await conn.scalars(
                    events.timestamp.table.select()
                    .with_only_columns(events.timestamp)
                    .where(events.user_id == "ann", events.session_id == key.session_id)
                    .order_by(events.timestamp)
                )
            )
            assert len(set(times)) == len(times) > 0
            updated = await conn.scalar(
                sessions.id.table.select()
                .with_only_columns(sessions.update_time)
                .where(sessions.user_id == "ann", sessions.id == key.session_id)
            )
            assert updated == times[-1]


# Again, and beside what is there


@every_kind
async def test_again_nothing_changes(kind: str, source: Path, fresh_database: NewDatabase) -> None:
    url = fresh_database(kind)
    async with SessionService(url) as service:
        seen: list[tuple[int, int]] = []
        assert await import_adk_sqlite(service, source, progress=lambda *n: seen.append(n)) == ALL
        assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
        before = await rows(url)
        assert await import_adk_sqlite(service, source) == AGAIN
        assert await rows(url) == before


@every_kind
async def test_a_conflict_is_left_alone_and_the_rest_goes_on(
    kind: str, source: Path, service: SessionService
) -> None:
    mine = await service.create_session(**ANN, session_id="talk", state={"mine": 1})
    await service.append_event(mine, Event(id="e1", author="user"))
    await service.create_session(app_name="shop", user_id="Ann", session_id="talk", state={"b": 1})
    report = await import_adk_sqlite(service, source)
    assert report.conflicts == (Key("shop", "Ann", "talk"), Key("shop", "ann", "talk"))
    assert (report.sessions, report.events) == (3, 3)
    found = await read(service, KEYS[0])
    assert found.state == {"mine": 1, "user:name": "Ann", "user:seen": 1} | {
        "app:motd": "hi",
        "app:n": {"k": 1},
    }
    assert [event.id for event in found.events] == ["e1"]


@every_kind
async def test_a_session_that_went_on_in_the_file_is_a_conflict(
    kind: str, source: Path, service: SessionService
) -> None:
    await import_adk_sqlite(service, source)
    write(
        source,
        "INSERT INTO events SELECT 'more', app_name, user_id, session_id, invocation_id,"
        " timestamp + 100, event_data FROM events WHERE id = 'third'",
    )
    report = await import_adk_sqlite(service, source)
    assert report == Report(already_there=4, conflicts=(KEYS[1],))


async def test_an_empty_session_is_not_mistaken_for_another(
    source: Path, service: SessionService
) -> None:
    other = await service.create_session(app_name="shop", user_id="Ann", session_id="talk")
    await service.append_event(other, Event(author="user"))
    assert (await import_adk_sqlite(service, source)).conflicts == (KEYS[3],)


@every_kind
async def test_wider_state_that_is_there_stays(
    kind: str, source: Path, service: SessionService
) -> None:
    state = {"app:motd": "mine", "app:other": math.inf, "user:seen": None}
    await service.create_session(**ANN, session_id="mine", state=state)
    report = await import_adk_sqlite(service, source)
    assert (report.app_states, report.user_states) == (1, 1)
    assert await service.get_app_state(app_name="shop") == {
        "motd": "mine",
        "other": math.inf,
        "n": {"k": 1},
    }
    assert await service.get_user_state(**ANN) == {"seen": None, "name": "Ann"}
    assert await import_adk_sqlite(service, source) == Report(already_there=5)


@every_kind
async def test_two_imports_at_once(kind: str, source: Path, fresh_database: NewDatabase) -> None:
    url, alone = fresh_database(kind), fresh_database(kind)
    async with SessionService(alone) as service:
        await import_adk_sqlite(service, source)
    async with SessionService(url) as one, SessionService(url) as two:
        reports = await asyncio.gather(*(import_adk_sqlite(s, source) for s in (one, two)))
    assert sum(report.sessions for report in reports) >= 5
    assert [report.conflicts for report in reports] == [(), ()]
    found, expected = await rows(url), await rows(alone)
    assert {**found, "app_states": 0} == {**expected, "app_states": 0}


@every_kind
async def test_a_killed_import_is_repeated(
    kind: str, source: Path, fresh_database: NewDatabase
) -> None:
    url, alone = fresh_database(kind), fresh_database(kind)
    async with SessionService(alone) as service:
        await import_adk_sqlite(service, source)
    program = f"""
        import asyncio, os, signal, sys
        from pathlib import Path
        from adk_sessions import SessionService, transfer

        store, stored = transfer._Target._store, 0

        def storing(self, conn, session):
            # dies in the middle of the third session's transaction
            global stored
            stored += 1
            found = store(self, conn, session)
            if stored == 3:
                os.kill(os.getpid(), {signal.SIGKILL.value})
            return found

        transfer._Target._store = storing
        service = SessionService(sys.argv[1])
        asyncio.run(transfer.import_adk_sqlite(service, Path(sys.argv[2])))
    """
    child = await asyncio.to_thread(forked.run, "-c", textwrap.dedent(program), url, str(source))
    assert child.returncode == -signal.SIGKILL
    async with SessionService(url) as service:
        report = await import_adk_sqlite(service, source)
    assert report == Report(sessions=3, already_there=2, events=10)
    assert await rows(url) == await rows(alone)


# A dry run


@every_kind
async def test_a_dry_run_on_an_empty_database_makes_nothing(
    kind: str, source: Path, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    async with SessionService(url) as service:
        assert await import_adk_sqlite(service, source, dry_run=True) == ALL
    if kind == "sqlite":
        assert not Path(url.removeprefix("sqlite:///")).exists()
        return
    async with engine_for(url) as engine, engine.connect() as conn:
        found = await conn.run_sync(lambda c: engine.dialect.get_table_names(c))
    assert found == []


@every_kind
async def test_a_dry_run_tells_what_would_happen(
    kind: str, source: Path, fresh_database: NewDatabase
) -> None:
    url = fresh_database(kind)
    async with SessionService(url) as service:
        await service.create_session(**ANN, session_id="talk", state={"user:name": "Ann"})
        before = await rows(url)
        told = await import_adk_sqlite(service, source, dry_run=True)
        assert await rows(url) == before
        assert told == await import_adk_sqlite(service, source)
        assert told == Report(
            sessions=4, events=3, app_states=1, user_states=1, conflicts=(KEYS[0],)
        )
        assert await import_adk_sqlite(service, source, dry_run=True) == Report(
            already_there=4, conflicts=(KEYS[0],)
        )


async def test_in_memory(source: Path) -> None:
    async with SessionService("sqlite://") as service:
        assert await import_adk_sqlite(service, source, dry_run=True) == ALL
        assert await import_adk_sqlite(service, source) == ALL


# The file


async def test_the_file_is_not_changed(source: Path, service: SessionService) -> None:
    os.chmod(source, 0o444)
    before = source.read_bytes()
    await import_adk_sqlite(service, source)
    assert source.read_bytes() == before
    assert list(source.parent.glob("it's*")) == [source]


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
async def test_a_file_that_a_killed_process_left(
    mode: str, source: Path, service: SessionService
) -> None:
    program = """
        import os, signal, sqlite3, sys
        conn = sqlite3.connect(sys.argv[1], isolation_level=None)
        conn.execute("PRAGMA journal_mode = " + sys.argv[2])
        conn.execute("PRAGMA cache_size = 1")
        def row(app): conn.execute(
            "INSERT INTO app_states VALUES (?, ?, 1)", (app, '{"a":"' + "x" * 100_000 + '"}'))
        row("committed")
        conn.execute("BEGIN")
        row("not committed")
        for n in range(50): conn.execute("UPDATE app_states SET update_time = ?", (n,))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    child = await asyncio.to_thread(forked.run, "-c", textwrap.dedent(program), str(source), mode)
    assert child.returncode == -signal.SIGKILL
    if mode == "WAL":
        assert Path(f"{source}-wal").stat().st_size > 100_000
        assert (await import_adk_sqlite(service, source)).app_states == 2
        Path(f"{source}-shm").unlink()
        assert await service.get_app_state(app_name="committed") == {"a": "x" * 100_000}
        assert (await import_adk_sqlite(service, source)) == AGAIN
    else:
        assert Path(f"{source}-journal").stat().st_size > 0
        with pytest.raises(DatabaseError, match="middle of a write"):
            await import_adk_sqlite(service, source)
        write(source, "SELECT 1 FROM sessions")
        assert (await import_adk_sqlite(service, source)).app_states == 2


async def test_what_is_written_meanwhile_is_not_half_read(
    source: Path, service: SessionService
) -> None:
    write(source, "PRAGMA journal_mode = WAL")

    def more(done: int, total: int) -> None:
        if done == 1:
            write(source, "UPDATE sessions SET state = '{\"late\":1}'", "DELETE FROM events")

    assert await import_adk_sqlite(service, source, progress=more) == ALL
    assert (await read(service, KEYS[0])).state["b"] == 0.1 + 0.2


# What is refused


async def refused(service: SessionService, file: Path, error: type[Exception] = SchemaError) -> str:
    with pytest.raises(error) as caught:
        await import_adk_sqlite(service, file)
    # nothing that is chained quotes the file
    assert caught.value.__cause__ is None
    assert isinstance(caught.value.__context__, InvalidInputError | None)
    return str(caught.value)


async def test_files_that_are_none(tmp_path: Path, service: SessionService) -> None:
    missing = tmp_path / "missing.db"
    assert "There is no file" in await refused(service, missing, InvalidInputError)
    assert not missing.exists()
    assert "There is no file" in await refused(service, tmp_path, InvalidInputError)
    text_file = tmp_path / "text.db"
    text_file.write_text("secret " * 1000)
    message = await refused(service, text_file)
    assert "not an SQLite database" in message
    assert "secret" not in message
    empty = tmp_path / "empty.db"
    empty.touch()
    assert "no table sessions" in await refused(service, empty)
    assert empty.stat().st_size == 0
    other = write(tmp_path / "other.db", "CREATE TABLE sessions (id INTEGER, data BLOB)")
    assert "no table sessions" in await refused(service, other)


async def test_a_damaged_file(source: Path, service: SessionService) -> None:
    data = bytearray(source.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    source.write_bytes(data)
    assert "is damaged" in await refused(service, source, DatabaseError)


async def test_the_stores_own_files(tmp_path: Path, service: SessionService) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    async with SessionService(url) as own:
        await own.create_session(**ANN)
    assert "DatabaseSessionService" in await refused(service, tmp_path / "own.db")


@pytest.mark.parametrize("spelling", ["sqlite:///{}", "sqlite:///file:{}?uri=true"])
async def test_into_itself(spelling: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.db", FROZEN.read_text())
    before = file.read_bytes()
    link = tmp_path / "link.db"
    link.symlink_to(file)
    async with SessionService(spelling.format(file)) as service:
        for name in (file, link):
            assert "into itself" in await refused(service, name, InvalidInputError)
    assert file.read_bytes() == before


async def test_policies_would_be_in_the_way(source: Path) -> None:
    async with SessionService("postgresql://nowhere/x", row_level_security=True) as service:
        with pytest.raises(ConfigurationError, match="row_level_security"):
            await import_adk_sqlite(service, source)


async def test_a_stored_session_that_is_damaged_is_a_conflict(
    source: Path, fresh_database: NewDatabase
) -> None:
    url = fresh_database("sqlite")
    async with SessionService(url) as service:
        await import_adk_sqlite(service, source)
        async with engine_for(url) as engine, engine.begin() as conn:
            await conn.execute(text("UPDATE events SET event_data = '{' WHERE id = 'third'"))
        assert await import_adk_sqlite(service, source) == Report(
            already_there=4, conflicts=(KEYS[1],)
        )


SECRET = "hush-hush"
BAD = {
    "state": (
        f"UPDATE sessions SET state = '{{{SECRET}' WHERE id = 'odd'",
        SchemaError,
        "session 'shop', 'ann', 'odd' is not JSON",
    ),
    "list": (
        "UPDATE sessions SET state = '[1]' WHERE id = 'odd'",
        SchemaError,
        "session 'shop', 'ann', 'odd' is not a JSON object",
    ),
    "blob": (
        "UPDATE sessions SET state = x'7b7d' WHERE id = 'odd'",
        SchemaError,
        "session 'shop', 'ann', 'odd' is not a JSON object",
    ),
    "encoding": (
        "UPDATE sessions SET state = CAST(x'7b2261223a22ff227d' AS TEXT) WHERE id = 'odd'",
        SchemaError,
        "session 'shop', 'ann', 'odd' is not UTF-8",
    ),
    "deep": (
        "UPDATE sessions SET state = '{\"a\":' || replace(hex(zeroblob(500)), '00', '[')"
        " || replace(hex(zeroblob(500)), '00', ']') || '}' WHERE id = 'odd'",
        InvalidInputError,
        "session 'shop', 'ann', 'odd': state is nested too deeply",
    ),
    "time": (
        "UPDATE sessions SET update_time = 9e999 WHERE id = 'odd'",
        InvalidInputError,
        "session 'shop', 'ann', 'odd': update_time must be seconds",
    ),
    "time as text": (
        "UPDATE sessions SET create_time = 'yesterday' WHERE id = 'odd'",
        InvalidInputError,
        "session 'shop', 'ann', 'odd': create_time must be seconds",
    ),
    "event": (
        f"UPDATE events SET event_data = '{SECRET}' WHERE id = 'third'",
        SchemaError,
        "event 'third' of session 'shop', 'ann', 'back in time' is not JSON",
    ),
    "no event": (
        f"UPDATE events SET event_data = '{{\"actions\":\"{SECRET}\"}}' WHERE id = 'third'",
        SchemaError,
        "event 'third' of session 'shop', 'ann', 'back in time' cannot be read as Event",
    ),
    "event's time": (
        "UPDATE events SET timestamp = -1 WHERE id = 'third'",
        InvalidInputError,
        "event 'third' of session 'shop', 'ann', 'back in time': timestamp must be seconds",
    ),
    "event's own time": (
        "UPDATE events SET event_data = '{\"timestamp\":\"now\"}' WHERE id = 'third'",
        InvalidInputError,
        "event 'third' of session 'shop', 'ann', 'back in time': timestamp must be seconds",
    ),
    "invocation": (
        "UPDATE events SET invocation_id = hex(zeroblob(200)) WHERE id = 'third'",
        InvalidInputError,
        "event 'third' of session 'shop', 'ann', 'back in time': invocation_id is 400",
    ),
    "event id": (
        "UPDATE events SET id = 'third' || hex(zeroblob(200)) WHERE id = 'third'",
        InvalidInputError,
        f"event '{'third'.ljust(64, '0')}…' of session 'shop', 'ann', 'back in time': id is 405",
    ),
    "session id": (
        "INSERT INTO sessions SELECT app_name, user_id, char(0) || 'nul', state, 1, 1"
        " FROM sessions WHERE id = 'odd'",
        InvalidInputError,
        "session 'shop', 'ann', '\\x00nul': id contains a NUL",
    ),
    "app state": (
        f"UPDATE app_states SET state = '{SECRET}'",
        SchemaError,
        "app_states 'shop' is not JSON",
    ),
    "user state": (
        "UPDATE user_states SET user_id = hex(zeroblob(100))",
        InvalidInputError,
        f"user_states 'shop', '{'0' * 64}…': user_id is 200",
    ),
}


@pytest.mark.parametrize("what", BAD)
async def test_rows_that_cannot_be_stored(what: str, source: Path, service: SessionService) -> None:
    statement, error, expected = BAD[what]
    write(source, statement)
    message = await refused(service, source, error)
    assert message.startswith(expected)
    assert SECRET not in message
    with pytest.raises(error, match="'shop'"):
        await import_adk_sqlite(service, source, dry_run=True)
    bad = "back in time" if "event" in what or what == "invocation" else "odd"
    assert await service.get_session(**ANN, session_id=bad) is None
    # mended, the rest follows
    mended = write(source.parent / "mended.db", FROZEN.read_text())
    report = await import_adk_sqlite(service, mended)
    assert report.sessions + report.already_there == 5
    assert not report.conflicts


# How such a file is known


def known(file: str) -> bool:
    engine = create_engine(URL.create("sqlite", database=file))
    try:
        with engine.connect() as conn:
            return is_adk_sqlite(conn)
    finally:
        engine.dispose()


async def test_is_adk_sqlite(source: Path, tmp_path: Path) -> None:
    assert known(str(source))
    assert not known(":memory:")
    own = tmp_path / "own.db"
    async with SessionService(f"sqlite:///{own}") as service:
        await service.create_session(**ANN)
    assert not known(str(own))
    engine = create_engine(URL.create("sqlite", database=str(source)))
    with engine.connect() as conn:
        assert is_adk_sqlite(conn, models())
        assert not is_adk_sqlite(conn, models(table_prefix="chat_"))
    engine.dispose()


async def test_is_adk_sqlite_asks_the_services_themselves(tmp_path: Path) -> None:
    pytest.importorskip("google.adk")
    from google.adk.sessions.database_session_service import DatabaseSessionService
    from google.adk.sessions.sqlite_session_service import SqliteSessionService

    file, other = tmp_path / "a.db", tmp_path / "b.db"
    await SqliteSessionService(str(file)).create_session(**ANN)
    async with DatabaseSessionService(f"sqlite+aiosqlite:///{other}") as stock:
        await stock.create_session(**ANN)
    assert known(str(file))
    assert not known(str(other))


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_servers_are_no_such_file(kind: str, fresh_database: NewDatabase) -> None:
    def look(conn: Connection) -> bool:
        return is_adk_sqlite(conn)

    async with engine_for(fresh_database(kind)) as engine, engine.connect() as conn:
        assert await conn.run_sync(look) is False
