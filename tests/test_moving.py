"""Export, import and copies: what goes from one database into another of any kind is the same."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import signal
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from engines import engine_for
from everywhere import EVERY_DATABASE, place_of
from rows import execute, overwrite, query
from servers import Postgres
from test_rls import Place, new_place
from workers import event, load

from adk_sessions import (
    ConfigurationError,
    Event,
    EventActions,
    InvalidInputError,
    SchemaError,
    SessionService,
)
from adk_sessions.dialects.rows import Key
from adk_sessions.moving import ImportReport, copy

NewDatabase = Callable[[str], str]

ODD = {
    "nan": math.nan,
    "inf": -math.inf,
    "nul": "a\0b",
    "surrogate": "a\ud800b",
    "big": 10**30,
    "huge": 7**6000,
    "float": 1e16,
    "large": 1e300,
    "zero": -0.0,
    "one": 1.0,
    "tiny": 5e-324,
    "marked": "adk_sessions:text:x",
    "nested": [None, True, {"nul\0key\ud800": "ü\u2028\x85💬\n"}],
}


async def fill(service: SessionService, app: str) -> None:
    """Sessions with everything that a session can have."""
    odd = await service.create_session(
        app_name=app,
        user_id="ann",
        session_id="odd",
        state=ODD | {"app:" + key: value for key, value in ODD.items()} | {"user:n": math.nan},
    )
    for number in range(3):
        await service.append_event(
            odd,
            Event(
                id=f"e{number}",
                invocation_id="i",
                author="adk_sessions:float:nan",
                content=[number, ODD],
                actions=EventActions(state_delta={"n": number, **ODD}),
            ),
        )
        await service.update_state(
            app_name=app, user_id="ann", session_id="odd", delta={"c": number}, delete=["one"]
        )
        await service.update_state(
            app_name=app, user_id="ann", session_id="odd", add={"sum": number}
        )
    await service.create_session(app_name=app, user_id="ann", session_id="empty")
    await service.create_session(app_name=app, user_id="ü" * 128, session_id="💬" * 128)
    kept = await service.create_session(app_name=app, user_id="Ann", session_id="odd")
    await service.append_event(kept, event("e0", {"user:a": 1}))
    await service.update_session(
        app, "Ann", "odd", title="adk_sessions:text:t", labels={"a": "b"}, expire_time=4e9
    )
    await service.archive_session(app, "Ann", "odd")


async def exported(service: Any, app: str, user: str | None = None, **options: Any) -> list[str]:
    return [line async for line in service.export_sessions(app, user, **options)]


def parsed(lines: list[str]) -> list[Any]:
    """What lines say, in no order of sessions: that is the database's own. Without the header."""
    assert json.loads(lines[0])["type"] == "header"
    blocks: list[list[str]] = []
    for line in lines[1:]:
        found = json.loads(line)
        if found["type"] not in ("event", "state_change"):
            blocks.append([])
        blocks[-1].append(json.dumps(found, sort_keys=True))
    return sorted(blocks)


async def spelled(service: Any, app: str) -> list[str]:
    """All sessions as they are read; repr, as NaN is not equal to itself."""
    found = (await service.list_sessions(app_name=app)).sessions
    ids = {(one.user_id, one.id) for one in found} | {("Ann", "odd")}
    read = [
        await service.get_session(app_name=app, user_id=user, session_id=id_)
        for user, id_ in sorted(ids)
    ]
    sys.set_int_max_str_digits(0)
    spelled = [
        repr((sorted(s.state.items()), s.events, s.last_update_time, s._storage_update_marker))
        for s in read
    ]
    sys.set_int_max_str_digits(4300)
    return spelled


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: NewDatabase
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


@pytest.fixture
async def other() -> AsyncIterator[SessionService]:
    async with SessionService("sqlite://") as service:
        yield service


# From one to another


async def test_round_the_databases(
    request: pytest.FixtureRequest, fresh_database: NewDatabase, app_name: str
) -> None:
    """Through all kinds and back: nothing changes."""
    first = SessionService(fresh_database("sqlite"))
    await fill(first, app_name)
    expected, read = parsed(await exported(first, app_name)), await spelled(first, app_name)
    text = (await exported(first, app_name))[1:]
    report = ImportReport(sessions=4, events=4, app_states=1, user_states=2, state_changes=6)
    last = first
    for backend in ("postgresql", "mariadb", "generic", "sqlite", "pgbouncer", "sqlite-memory"):
        shared = backend in ("generic", "pgbouncer")
        url, options = place_of(backend, request, fresh_database)
        if shared:  # these are the same database
            async with SessionService(url, **options) as before:
                for found in (await before.list_sessions(app_name=app_name)).sessions:
                    await before.delete_session(app_name, found.user_id, found.id)
                await before.delete_session(app_name, "Ann", "odd")
                assert len(await exported(before, app_name)) == 5  # the wider states stay
        service = SessionService(url, **options)
        done = await service.import_sessions(last.export_sessions(app_name))
        wider = {"app_states": 0, "user_states": 0} if shared else {}
        assert vars(done) == vars(report) | wider
        assert parsed(await exported(service, app_name)) == expected
        assert await spelled(service, app_name) == read
        again = await service.import_sessions(last.export_sessions(app_name))
        assert again == ImportReport(already_there=4)
        await last.close() if backend != "sqlite-memory" else None
        last = service
    assert text[0].count("adk_sessions:") > 5
    await last.close()


async def test_what_is_imported_goes_on(
    service: SessionService, other: SessionService, app_name: str
) -> None:
    await fill(other, app_name)
    await service.import_sessions(await exported(other, app_name))
    session = await service.get_session(app_name=app_name, user_id="ann", session_id="odd")
    assert session is not None
    await service.append_event(session, event("new", {"new": 1}))
    found = await service.get_session(app_name=app_name, user_id="ann", session_id="odd")
    assert found is not None
    assert [e.id for e in found.events] == ["e0", "e1", "e2", "new"]
    assert found.state["sum"] == 3
    assert (await service.list_sessions(app_name=app_name, user_id="Ann")).sessions == []
    # one that has gone on holds all that there is to import, whatever it is called
    await service.update_session(app_name, "ann", "odd", title="mine")
    report = await service.import_sessions(await exported(other, app_name))
    assert report == ImportReport(already_there=4)


async def test_one_user_or_session(service: SessionService, app_name: str) -> None:
    await fill(service, app_name)

    async def sessions(user: str, **options: Any) -> list[str]:
        lines = [json.loads(line) for line in await exported(service, app_name, user, **options)]
        assert {line.get("user_id", user) for line in lines[1:]} == {user}
        return sorted(line["id"] for line in lines if line["type"] == "session")

    assert await sessions("ann") == ["empty", "odd"]
    assert await sessions("ann", session_id="odd") == ["odd"]
    assert await sessions("ann", session_id="none") == []
    assert await sessions("nobody") == []
    for user in ("a\0", "x" * 200):
        assert await sessions(user) == []
    with pytest.raises(InvalidInputError) as caught:
        await exported(service, app_name, session_id="odd")
    assert caught.value.field == "user_id"


async def test_many_sessions_and_long_ones(
    service: SessionService, other: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages and batches have ends: nothing falls between them, and files take what is long."""
    monkeypatch.setattr("adk_sessions.dialects.moving.BATCH", 3)
    monkeypatch.setattr("adk_sessions.portable._IN_MEMORY", 1000)
    for user in ("a", "b", "c", "d"):
        for number in range(4 if user in "bd" else 1):
            session = await service.create_session(
                app_name=app_name, user_id=user, session_id=str(number), state={"user:u": user}
            )
            events = [event(f"{number}-{n}", {"n": n}, timestamp=5.0) for n in range(3 * number)]
            await service.append_events(session, events)
            for n in range(7 * (user == "d")):
                await service.update_state(
                    app_name=app_name, user_id=user, session_id=str(number), add={f"c{n % 2}": 1}
                )
    lines = await exported(service, app_name)
    assert [json.loads(line).get("id") for line in lines].count("0") == 4
    done = await other.import_sessions(lines)
    counts = {"sessions": 10, "events": 36, "state_changes": 28, "user_states": 4}
    assert vars(done) == vars(ImportReport()) | counts
    assert parsed(await exported(other, app_name)) == parsed(lines)
    assert await other.import_sessions(lines) == ImportReport(already_there=10)
    assert await service.import_sessions(lines) == ImportReport(already_there=10)
    assert (await copy(service, other, app_name=app_name)).verified == 10


# What is there already


async def test_conflicts_are_left_alone(
    service: SessionService, other: SessionService, app_name: str
) -> None:
    async def both(id_: str, name: str = "e") -> None:
        for one in (service, other):
            session = await one.create_session(app_name=app_name, user_id="u", session_id=id_)
            await one.append_event(session, event(name, {"a": 1}, timestamp=5.0))

    await both("other times")
    longer = await other.create_session(app_name=app_name, user_id="u", session_id="longer")
    await other.append_event(longer, event("1", {"a": 1}))
    lines = await exported(other, app_name, "u", session_id="longer")
    await service.import_sessions(lines)
    await other.append_event(longer, event("2", {"a": 2}))
    changed = await other.create_session(app_name=app_name, user_id="u", session_id="changed")
    await service.import_sessions(await exported(other, app_name, "u", session_id="changed"))
    await other.update_state(app_name=app_name, user_id="u", session_id=changed.id, delta={"x": 1})
    await other.update_state(app_name=app_name, delta={"app:a": "theirs", "app:b": 1})
    await service.update_state(app_name=app_name, delta={"app:a": "mine"})
    before = parsed(await exported(service, app_name))
    lines = await exported(other, app_name)
    told = await service.import_sessions(lines, dry_run=True)
    assert parsed(await exported(service, app_name)) == before
    done = await service.import_sessions(lines)
    assert done == told
    keys = {Key(app_name, "u", id_) for id_ in ("other times", "longer", "changed")}
    assert set(done.conflicts) == keys
    assert (done.sessions, done.already_there, done.app_states) == (0, 0, 1)
    assert await service.get_app_state(app_name=app_name) == {"a": "mine", "b": 1}
    # and a copy says what is not the same
    report = await copy(other, service, app_name=app_name)
    assert set(report.differences) == keys | {Key(app_name, "", "")}
    assert (set(report.conflicts), report.verified) == (keys, 0)


async def test_a_dry_run_makes_nothing(tmp_path: Path, other: SessionService) -> None:
    await fill(other, "shop")
    async with SessionService(f"sqlite:///{tmp_path / 'new.db'}") as service:
        told = await service.import_sessions(other.export_sessions("shop"), dry_run=True)
    assert (told.sessions, told.app_states, told.user_states) == (4, 1, 2)
    assert not (tmp_path / "new.db").exists()


async def test_two_imports_at_once(
    service: SessionService, other: SessionService, app_name: str
) -> None:
    await fill(other, app_name)
    lines = await exported(other, app_name)
    reports = await asyncio.gather(*(service.import_sessions(lines) for _ in range(3)))
    assert sum(report.sessions + report.already_there for report in reports) == 12
    assert [report.conflicts for report in reports] == [()] * 3
    assert parsed(await exported(service, app_name)) == parsed(lines)


# Files that are not whole, or not as they should be


async def test_a_cut_file(service: SessionService, other: SessionService, app_name: str) -> None:
    await fill(other, app_name)
    lines = await exported(other, app_name)
    for cut in range(0, len(lines), 3):
        with pytest.raises(SchemaError, match=f"after line {cut}|import all"):
            await service.import_sessions(lines[:cut])
    for number, line in enumerate(lines):  # one is missing in the middle
        if '"event"' in line[:20] or '"session"' in line[:20]:
            with pytest.raises(SchemaError, match="line "):
                await service.import_sessions(lines[:number] + lines[number + 1 :])
    # what came whole is there, and the rest comes when it is repeated
    done = await service.import_sessions(lines)
    assert done.conflicts == ()
    assert done.sessions + done.already_there == 4
    assert parsed(await exported(service, app_name)) == parsed(lines)


SECRET = "s3cret"


def change(kind: str, **fields: Any) -> Callable[[list[Any]], None]:
    def changed(lines: list[Any]) -> None:
        of_kind = [line for line in lines if line["type"] == kind and line.get("id") != "empty"]
        of_kind[0].update(fields)

    return changed


BAD: dict[str, tuple[Callable[[list[Any]], None], str]] = {
    "no header": (lambda lines: lines.pop(0), "line 1: a header is to come first"),
    "two headers": (lambda lines: lines.insert(1, lines[0]), "line 2: a header"),
    "version": (change("header", version=2), "line 1: this is not a header of version 1"),
    "type": (change("event", type=SECRET), "its type is none"),
    "no type": (change("event", type=None), "its type is none"),
    "field": (change("event", **{SECRET: 1}), "fewer fields"),
    "event": (change("event", event=SECRET), "its event is not an object"),
    "state": (change("session", state=[SECRET]), "its state is not an object"),
    "labels": (change("session", labels={"a": 1}), "its labels are not texts"),
    "time": (change("event", timestamp=SECRET), "its timestamp is not a time"),
    "far time": (change("session", create_time="9999-01-01T00:00:00.000000"), "create_time"),
    "number": (change("state_change", number=1.5), "its number is not a count"),
    "fewer": (change("session", events=2), "no session that it belongs to"),
    "more": (change("session", events=9), "are missing"),
    "other app": (change("session", app_name=SECRET), "another app_name than the header"),
    "order": (change("event", timestamp="2099-01-01T00:00:00.000000"), "out of order"),
    "counts": (change("end", events=9), "lines are missing"),
}


@pytest.mark.parametrize("what", BAD)
async def test_lines_that_are_wrong(what: str, other: SessionService, app_name: str) -> None:
    async with SessionService("sqlite://") as service:
        await fill(other, app_name)
        lines = [json.loads(line) for line in await exported(other, app_name, "ann")]
        alter, expected = BAD[what]
        alter(lines)
        with pytest.raises(SchemaError, match=expected) as caught:
            await service.import_sessions(map(json.dumps, lines))
        assert str(caught.value).startswith("line ")
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "line", [SECRET, f'{{"type":"{SECRET}', "[1]", f"[{SECRET!r}", '"x"', b"\xff", 5, None, "{}"]
)
async def test_lines_that_are_none(line: Any, other: SessionService) -> None:
    lines = await exported(other, "shop")
    with pytest.raises(SchemaError, match="line 2: ") as caught:
        await other.import_sessions([lines[0], line, lines[1]])
    assert SECRET not in str(caught.value)


async def test_ids_that_cannot_be_stored(other: SessionService) -> None:
    await fill(other, "shop")
    lines = await exported(other, "shop", "ann", session_id="odd")
    wrong = [line.replace('"id":"e1"', '"id":"' + "x" * 129 + '"') for line in lines]
    async with SessionService("sqlite://") as service:
        with pytest.raises(InvalidInputError, match="line 6: id is 129"):
            await service.import_sessions(wrong)
        twice = [line.replace('"id":"e1"', '"id":"e0"') for line in lines]
        with pytest.raises(SchemaError, match="one id"):
            await service.import_sessions(twice)
        assert (await service.list_sessions(app_name="shop")).sessions == []
        for nothing in ("text", None):
            with pytest.raises(InvalidInputError):
                await service.import_sessions(nothing)  # type: ignore[arg-type]


async def test_files_in_other_clothes(other: SessionService, tmp_path: Path) -> None:
    await fill(other, "a")
    await fill(other, "b")
    lines = [*await exported(other, "a"), "", *await exported(other, "b")]
    file = tmp_path / "both.ndjson"
    file.write_bytes("\r\n".join(lines).encode())
    expected = ImportReport(sessions=8, events=8, app_states=2, user_states=4, state_changes=12)
    for text in (file.read_bytes().splitlines(), file.read_text().splitlines()):
        seen: list[tuple[int, int]] = []

        def told(done: int, total: int, seen: Any = seen) -> None:
            seen.append((done, total))

        async with SessionService("sqlite://") as service:
            assert await service.import_sessions(text, progress=told) == expected
        assert seen[:4] == [(n, 4) for n in (1, 2, 3, 4)]
        assert seen[4:] == [(n, 8) for n in (5, 6, 7, 8)]
    with file.open("rb") as opened:
        async with SessionService("sqlite://") as service:
            assert await service.import_sessions(opened) == expected


# What is damaged


@pytest.mark.parametrize("backend", ["sqlite", "postgresql", "mariadb"])
async def test_unreadable_rows_travel(
    backend: str, request: pytest.FixtureRequest, fresh_database: NewDatabase, app_name: str
) -> None:
    url, _ = place_of(backend, request, fresh_database)
    texts = ['{"actions":"x"}', "[1]", '"x"', None, "null"]
    if backend != "postgresql":
        texts += ['{"cut', "", '{"a":NaN}']
    exact = ['{"cut', '"x"', '{"id":"x","actions":"adk_sessions:text:a%00"}']
    async with SessionService(url) as service:
        session = await service.create_session(app_name=app_name, user_id="u", session_id="s")
        for number in range(len(texts) + len(exact)):
            await service.append_event(session, event(f"e{number}", {"n": number}))
        for number, text in enumerate(texts):
            await overwrite(url, app_name, f"e{number}", text)
        for number, text in enumerate(exact, len(texts)):
            await overwrite(url, app_name, f"e{number}", '{"author":"user"}', text)
        lines = await exported(service, app_name)
    # the lines of all are of one form: one database's go into each kind, the others' into one
    for kind in ("sqlite", "postgresql", "mariadb") if backend == "sqlite" else ("sqlite",):
        async with SessionService(fresh_database(kind), on_bad_event="placeholder") as target:
            assert (await target.import_sessions(lines)).sessions == 1
            assert parsed(await exported(target, app_name)) == parsed(lines)
            assert (await target.import_sessions(lines)).already_there == 1
            found = await target.get_session(app_name=app_name, user_id="u", session_id="s")
            assert found is not None
            assert [e.id for e in found.events] == [f"e{n}" for n in range(len(texts) + 3)]
    async with SessionService(url) as service, SessionService("sqlite://") as target:
        report = await copy(service, target, app_name=app_name)
        assert (report.verified, report.differences) == (1, ())


async def test_a_damaged_state_travels(fresh_database: NewDatabase) -> None:
    url = fresh_database("sqlite")
    async with SessionService(url) as service, SessionService("sqlite://") as target:
        await service.create_session(app_name="a", user_id="u", session_id="s", state={"app:a": 1})
        await execute(url, "UPDATE sessions SET state = '{\"cut'", "UPDATE app_states SET state=''")
        await execute(url, "UPDATE user_states SET state = '[]'")
        lines = await exported(service, "a")
        assert json.loads(lines[-2])["damaged"] == ["state"]
        assert (await target.import_sessions(lines)).sessions == 1
        [line] = [line for line in await exported(target, "a") if '"session"' in line[:20]]
        assert line == lines[-2]
        assert (await copy(service, target)).verified == 1


async def test_raw_numbers_as_times(fresh_database: NewDatabase, app_name: str) -> None:
    """google-adk has left epoch numbers in SQLite's time columns."""
    url = fresh_database("sqlite")
    async with SessionService(url) as service, SessionService("sqlite://") as target:
        session = await service.create_session(app_name=app_name, user_id="u", session_id="s")
        for n in range(4):
            await service.append_event(session, event(f"e{n}", {"n": n}))
        await execute(
            url,
            "UPDATE events SET timestamp = 1700000000.25 WHERE id = 'e0'",
            "UPDATE sessions SET create_time = 1700000000",
        )
        assert (await copy(service, target)).verified == 1
        found = await target.get_session(app_name=app_name, user_id="u", session_id="s")
        assert found is not None
        assert [e.id for e in found.events] == ["e0", "e1", "e2", "e3"]


# Others write meanwhile


async def test_each_session_is_of_one_moment(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adk_sessions.dialects.moving.BATCH", 5)
    stop = asyncio.Event()

    async def write(user: str) -> None:
        session = await service.create_session(app_name=app_name, user_id=user, session_id="s")
        for number in itertools.count():
            await service.append_event(session, event(f"e{number}", {"n": number}))
            for _ in range(3):
                await service.update_state(
                    app_name=app_name, user_id=user, session_id="s", add={"c": 1}
                )
            if stop.is_set():
                return

    writers = [asyncio.create_task(write(user)) for user in ("a", "b")]
    exports: dict[int, list[str]] = {}  # by how much there was
    while len(exports) < 3:
        lines = await exported(service, app_name)
        exports[len(lines)] = lines
        assert not any(writer.done() for writer in writers)
    stop.set()
    await asyncio.gather(*writers)
    for lines in exports.values():
        made = 0
        async with SessionService("sqlite://") as target:
            await target.import_sessions(lines)
            for found in (await target.list_sessions(app_name=app_name)).sessions:
                session = await target.get_session(
                    app_name=app_name, user_id=found.user_id, session_id="s"
                )
                assert session is not None
                ids = [e.id for e in session.events]
                assert ids == [f"e{n}" for n in range(len(ids))]
                assert session.state.get("n", -1) == len(ids) - 1
                assert 3 * len(ids) - 3 <= session.state.get("c", 0) <= 3 * len(ids)
                made += session.state.get("c", 0)
        assert sum('"state_change"' in line[:24] for line in lines) == made
    # what was exported is the beginning of what there is now
    report = await service.import_sessions(exports[max(exports)])
    assert report.conflicts == ()


async def test_a_session_that_is_cut_or_made_anew_meanwhile(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adk_sessions.dialects.moving.BATCH", 2)
    key = {"app_name": app_name, "user_id": "u", "session_id": "s"}

    async def make(count: int, state: int) -> None:
        session = await service.create_session(**key, state={"made": state})
        await service.append_events(session, [event(f"{state}-{n}", {}) for n in range(count)])

    await make(5, 1)
    tables, read = service._statements, type(service._statements).session_events
    met = 0

    def meddle(*args: Any) -> Any:
        nonlocal met
        met += 1
        return read(tables, *args)

    monkeypatch.setattr(tables, "session_events", meddle, raising=False)
    look_up = service._look_up

    async def between(operation: Any, *args: Any) -> Any:
        found = await look_up(operation, *args)
        if met == 1 and operation is meddle:
            await service.delete_session(*key.values())
            await make(5, 2)
        return found

    monkeypatch.setattr(service, "_look_up", between)
    lines = [json.loads(line) for line in await exported(service, app_name)]
    assert [line["state"] for line in lines if line["type"] == "session"] == [{"made": 2}]
    assert [line["id"] for line in lines if line["type"] == "event"] == [f"2-{n}" for n in range(5)]
    assert met == 2  # and the second time all at once


# Killed, and large


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_a_killed_import_is_repeated(
    kind: str, other: SessionService, fresh_database: NewDatabase, tmp_path: Path
) -> None:
    await fill(other, "shop")
    lines = await exported(other, "shop")
    file = tmp_path / "shop.ndjson"
    file.write_text("\n".join(lines), encoding="utf-8")
    program = f"""
        import asyncio, os, sys
        from adk_sessions import SessionService, storing

        store, stored = storing.Target._store, 0

        def storing_(self, conn, session):
            # dies in the middle of the third session's transaction
            global stored
            stored += 1
            found = store(self, conn, session)
            if stored == 3:
                os.kill(os.getpid(), {signal.SIGKILL.value})
            return found

        storing.Target._store = storing_
        service = SessionService(sys.argv[1])
        asyncio.run(service.import_sessions(open(sys.argv[2], encoding="utf-8")))
    """
    url = fresh_database(kind)
    child = await asyncio.to_thread(forked.run, "-c", textwrap.dedent(program), url, str(file))
    assert child.returncode == -signal.SIGKILL
    async with SessionService(url) as service:
        report = await service.import_sessions(lines)
        assert (report.sessions, report.already_there, report.conflicts) == (2, 2, ())
        assert parsed(await exported(service, "shop")) == parsed(lines)


async def test_memory_does_not_grow_with_a_session(
    fresh_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adk_sessions.dialects.moving.BATCH", 100)
    monkeypatch.setattr("adk_sessions.portable._IN_MEMORY", 200_000)
    source, target = fresh_database("sqlite"), fresh_database("sqlite")
    async with SessionService(source) as service, SessionService(target) as other:
        session = await service.create_session(app_name="a", user_id="u", session_id="s")
        for batch in range(4):
            events = [
                Event(id=f"{batch}-{n}", author="user", content="x" * 1000) for n in range(500)
            ]
            await service.append_events(session, events)
        del events, session.events[:]
        tracemalloc.start()
        try:
            done = await other.import_sessions(service.export_sessions("a"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert done.events == 2000
        assert peak < 2_000_000  # the events are 2.5 MB as text alone, and 6 MB if all are held
        assert (await copy(service, other)).verified == 1


# Copies


async def test_copy(service: SessionService, other: SessionService, app_name: str) -> None:
    await fill(service, app_name)
    await fill(service, f"{app_name}-too")
    seen: list[tuple[int, int]] = []
    report = await copy(service, other, app_name=app_name, progress=lambda *n: seen.append(n))
    assert seen == [(n, 8) for n in range(1, 9)]
    assert (report.sessions, report.events, report.state_changes) == (4, 4, 6)
    assert (report.app_states, report.user_states) == (1, 2)
    assert (report.verified, report.differences, report.conflicts) == (4, (), ())
    again = await copy(service, other, app_name=app_name)
    assert (again.sessions, again.already_there, again.verified) == (0, 4, 4)
    one = await copy(service, other, app_name=f"{app_name}-too", user_id="Ann")
    assert (one.sessions, one.verified) == (1, 1)
    assert parsed(await exported(service, app_name)) == parsed(await exported(other, app_name))


async def test_copy_of_what_has_an_empty_name(other: SessionService) -> None:
    async with SessionService("sqlite://") as service:
        for app, user in (("", ""), ("", "u"), ("b", "")):
            await service.create_session(app_name=app, user_id=user, session_id="s")
        assert (await copy(service, other, app_name="", user_id="")).sessions == 1
        assert [one.user_id for one in (await other.list_sessions(app_name="")).sessions] == [""]
        report = await copy(service, other, app_name="")
        assert (report.sessions, report.already_there, report.verified) == (1, 1, 2)
        assert (await other.list_sessions(app_name="b")).sessions == []


async def test_copy_of_everything_and_what_changed_since(
    fresh_database: NewDatabase, other: SessionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SessionService(fresh_database("sqlite")) as service:
        await service.update_state(app_name="only state", delta={"app:a": 1})
        for app in ("a", "b"):
            await fill(service, app)

        async def change() -> None:
            session = await service.get_session(app_name="a", user_id="ann", session_id="empty")
            assert session is not None
            await service.append_event(session, event("late", {}))
            await service.create_session(app_name="a", user_id="ann", session_id="late")
            await service.delete_session("b", "ann", "odd")
            await service.update_state(app_name="b", delta={"app:late": 1})

        loop, tasks = asyncio.get_running_loop(), []

        def told(done: int, total: int) -> None:
            assert total == 16
            if done == 8:
                tasks.append(loop.create_task(change()))

        look_up = service._look_up

        async def waiting(*args: Any) -> Any:
            await asyncio.gather(*tasks)
            return await look_up(*args)

        monkeypatch.setattr(service, "_look_up", waiting)
        report = await copy(service, other, progress=told)
        assert report.sessions == 8
        assert set(report.differences) == {
            Key("a", "ann", "empty"),
            Key("a", "ann", "late"),
            Key("b", "", ""),
        }
        assert report.verified == 6
        assert await other.get_app_state(app_name="only state") == {"a": 1}
        again = await copy(service, other)
        assert (again.sessions, again.conflicts) == (1, (Key("a", "ann", "empty"),))


async def test_what_is_no_copy(
    request: pytest.FixtureRequest, fresh_database: NewDatabase, tmp_path: Path
) -> None:
    for backend in ("sqlite", "sqlite-memory", "postgresql", "mariadb"):
        url, options = place_of(backend, request, fresh_database)
        one = SessionService(url, **options)
        two = one if backend == "sqlite-memory" else SessionService(url, **options)
        await one.prepare_tables()
        with pytest.raises(InvalidInputError, match="into itself"):
            await copy(one, two)
        with pytest.raises(InvalidInputError, match="app_name"):
            await copy(one, two, user_id="u")
        await one.close()
        await two.close()
    missing = tmp_path / "missing.db"
    async with SessionService(f"sqlite:///{missing}") as one, SessionService("sqlite://") as two:
        with pytest.raises(InvalidInputError, match="no such file"):
            await copy(one, two)
        assert not missing.exists()
        # another prefix is another place in the same file
        async with SessionService(f"sqlite:///{missing}", table_prefix="chat_") as three:
            await fill(one, "a")
            assert (await copy(one, three)).verified == 4


# google-adk


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
async def test_google_adk_reads_what_was_imported(kind: str, fresh_database: NewDatabase) -> None:
    pytest.importorskip("google.adk")
    from google.adk.events import Event as AdkEvent
    from google.adk.events import EventActions as AdkActions
    from google.adk.sessions.database_session_service import DatabaseSessionService as Stock
    from google.genai import types
    from test_interop import DRIVERS  # google-adk takes an async driver's URL only

    from adk_sessions.adk import DatabaseSessionService as Ours

    source, url = fresh_database("sqlite"), fresh_database(kind)
    stock_url = url.replace(url.partition(":")[0], DRIVERS[kind], 1)
    async with Stock(source.replace("sqlite", DRIVERS["sqlite"], 1)) as stock:
        session = await stock.create_session(
            app_name="a", user_id="u", session_id="s", state={"app:a": 1, "user:b": 2, "c": 3}
        )
        for text in ("hello", "adk_sessions:float:nan", "1e16"):
            content = types.Content(role="user", parts=[types.Part(text=text)])
            delta = AdkActions(state_delta={"t": text, "f": 1e16, "n": None})
            await stock.append_event(
                session, AdkEvent(author="user", content=content, actions=delta)
            )
        expected = await stock.get_session(app_name="a", user_id="u", session_id="s")
    async with Ours(source) as service, Ours(url) as target:
        report = await copy(service, target)
        assert (report.verified, report.differences) == (1, ())
        read = await service.get_session(app_name="a", user_id="u", session_id="s")
        found = await target.get_session(app_name="a", user_id="u", session_id="s")
        assert found == read
        # as a type of ours too: the lines are of no framework
        async with SessionService("sqlite://") as other:
            assert (await other.import_sessions(target.export_sessions("a"))).sessions == 1
    async with Stock(stock_url) as stock:
        moved = await stock.get_session(app_name="a", user_id="u", session_id="s")
        assert moved is not None
        assert expected is not None
        assert [e.content for e in moved.events] == [e.content for e in expected.events]
        assert moved.state | {"f": 1e16} == expected.state | {"f": 1e16}
        await stock.append_event(moved, AdkEvent(author="user"))


# Row level security


@pytest.fixture(scope="module")
def bound(postgres: Postgres) -> Iterator[Place]:
    with new_place(postgres) as place:
        yield place


@pytest.mark.parametrize("backend", ["auto", "generic"])
async def test_with_policies_one_user_moves_at_a_time(
    backend: str, bound: Place, other: SessionService, app_name: str
) -> None:
    await fill(other, app_name)
    async with bound.service(backend=backend) as service:
        with pytest.raises(ConfigurationError, match="one user is exported"):
            await exported(service, app_name)
        with pytest.raises(ConfigurationError, match="one user is imported"):
            await service.import_sessions(await exported(other, app_name))
        asked: list[dict[str, Any]] = [{}, {"app_name": app_name}]
        for both in asked:
            for pair in ((other, service), (service, other)):
                with pytest.raises(ConfigurationError, match="one user is copied"):
                    await copy(*pair, **both)
        done = await service.import_sessions(await exported(other, app_name, "ann"))
        assert (done.sessions, done.app_states, done.user_states) == (2, 1, 1)
        expected = parsed(await exported(other, app_name, "ann"))
        assert parsed(await exported(service, app_name, "ann")) == expected
        assert len(await exported(service, app_name, "Ann")) == 3  # the app's state
        report = await copy(other, service, app_name=app_name, user_id="Ann")
        assert (report.sessions, report.verified, report.differences) == (1, 1, ())
        again = await copy(service, other, app_name=app_name, user_id="ann")
        assert (again.already_there, again.verified, again.differences) == (2, 2, ())


def change_elsewhere(url: str, app: str, delta: dict[str, Any]) -> None:
    """A change by somebody else, while statements of this thread's loop are under way."""

    async def update() -> None:
        async with SessionService(url, migrate="off") as service:
            await service.update_state(app_name=app, user_id="u", delta=delta)

    thread = threading.Thread(target=asyncio.run, args=(update(),))
    thread.start()
    thread.join()


async def test_a_change_that_was_acknowledged_meanwhile_is_kept(
    mariadb_url: str, app_name: str
) -> None:
    """On the application's own engine: what it reads is of the moment of its first read."""
    async with (
        SessionService(mariadb_url) as other,
        engine_for(mariadb_url, isolation_level="REPEATABLE READ") as engine,
        SessionService(engine=engine) as service,
    ):
        await other.update_state(
            app_name=app_name, user_id="u", delta={"app:old": 1, "user:old": 1}
        )
        lines = await exported(other, app_name)
        await other.update_state(
            app_name=app_name, user_id="u", delete=["app:old", "user:old"], delta={"app:x": 1}
        )
        lock, changed = service._statements.lock, set[str]()

        def change_first(conn: Any, table: Any, *args: Any) -> bool:
            scope = "app" if table is service.models.app_states else "user"
            if scope not in changed:
                changed.add(scope)
                change_elsewhere(mariadb_url, app_name, {f"{scope}:acknowledged": 1})
            return lock(conn, table, *args)

        service._statements.lock = change_first  # type: ignore[method-assign, assignment]
        report = await service.import_sessions(lines)
        assert (report.app_states, report.user_states, changed) == (1, 1, {"app", "user"})
        state = await other.get_app_state(app_name=app_name)
        assert state == {"x": 1, "acknowledged": 1, "old": 1}
        state = await other.get_user_state(app_name=app_name, user_id="u")
        assert state == {"acknowledged": 1, "old": 1}


async def test_a_state_and_a_beginning_that_fill_a_packet_each(
    mariadb_url: str, app_name: str
) -> None:
    """Both were sent once when the session was made."""
    async with SessionService(mariadb_url) as service:
        [(most,)] = await query(mariadb_url, "SELECT @@max_allowed_packet")
        state = {"a": "x" * int(most * 0.6)}
        session = await service.create_session(app_name=app_name, user_id="u", state=state)
        lines = await exported(service, app_name)
        await service.delete_session(app_name, "u", session.id)
        assert (await service.import_sessions(lines)).sessions == 1
        assert await load(service, app_name, "u", session.id) == session
