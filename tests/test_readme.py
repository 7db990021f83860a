"""What README tells people to type works."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from everywhere import SOAK
from scripts import run_script

from adk_sessions import Event, EventActions, SessionService, migrate, moving

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block(containing: str, language: str = "python") -> str:
    """The one code block of README that contains a text."""
    (found,) = [code for name, code in BLOCKS if name == language and containing in code]
    return found


def run(folder: Path, *arguments: str) -> str:
    """Runs Python in a folder; its output, after a check that it went well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_session_without_google_adk(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(block("I am Ann."))
    assert run(tmp_path, "-W", "error", "main.py") == (
        "{'topic': 'greeting', 'user:name': 'Ann'} 1\n"
    )


def test_parlants_stores_over_two_starts(tmp_path: Path) -> None:
    pytest.importorskip("parlant")
    (tmp_path / "main.py").write_text(block("trace-1"))
    assert run(tmp_path, "main.py") == "0 Hello\n"
    # a real server takes them in test_parlant_server.py; without a key this one does not start
    fits = "inspect.signature(p.Server).bind(**dict.fromkeys(ParlantStores._fields))"
    imports = "import inspect\nfrom adk_sessions.parlant import ParlantStores\n"
    (tmp_path / "server.py").write_text(f"{block('def serve')}\n{imports}{fits}\n")
    run(tmp_path, "server.py")


def test_a_chat_history_on_tables_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(block("chat_models(Base)"))
    assert run(tmp_path, "-W", "error", "main.py") == (
        "[[{'text': 'Hello'}], [{'text': 'Hi!'}]]\n0\n"
    )


def test_the_kit_on_a_service_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(block("class TestMyService"))
    # a part is enough to see that the class works
    some = run(tmp_path, "-m", "pytest", "-q", "-k", "delete or order", "test_mine.py")
    counted = re.search(r"^(\d+) passed, (\d+) deselected", some, re.MULTILINE)
    assert counted
    assert 100 <= sum(map(int, counted.groups())) < 200


def test_the_import_that_is_swapped_and_the_services_that_google_adks_servers_load(
    tmp_path: Path,
) -> None:
    """In one process, since importing google-adk takes seconds."""
    pytest.importorskip("google.adk")
    was, now = block("was: from google.adk.sessions").splitlines()[:2]
    swapped = [was.removeprefix("# was: "), "Theirs = DatabaseSessionService"]
    swapped += [now, "print(DatabaseSessionService is Theirs, DatabaseSessionService.__name__)"]
    for suffix, code in {
        "yaml": block("services:", "yaml"),
        "py": block("register_session_service"),
    }.items():
        (tmp_path / suffix).mkdir()
        (tmp_path / suffix / f"services.{suffix}").write_text(code)
    ask = """
from google.adk.cli import service_registry

def ask(folder):
    service_registry._service_registry_instance = None
    service_registry.load_services_module(folder)
    registry = service_registry.get_service_registry()
    uri = "postgresql://ann@127.0.0.1/x"
    print(folder, type(registry.create_session_service(uri, agents_dir=".")).__module__)

try:
    ask("none")
except ValueError as error:
    print("none", error)
ask("yaml")
ask("py")
"""
    (tmp_path / "none").mkdir()
    (tmp_path / "main.py").write_text("\n".join([*swapped, ask]))
    first, without, *loaded = run(tmp_path, "main.py").splitlines()
    assert first == "False DatabaseSessionService"
    assert without.startswith("none Database related module not found")  # google-adk's own
    assert loaded == ["yaml adk_sessions.adk", "py adk_sessions.adk"]


def shell(script: str, url: str, folder: Path) -> str:
    """Runs the lines of a block, as someone would who has installed the package."""
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "ADK_SESSIONS_URL": url,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_deploying(kind: str, tmp_path: Path, fresh_database: Callable[[str], str]) -> None:
    url = fresh_database(kind)
    commands = block("adk-sessions current", "sh")
    before = [f"From no revision to {migrate.HEAD}.", f"At {migrate.HEAD} already."]
    for first_line in before[: 2 if SOAK and kind == "postgresql" else 1]:
        assert shell(commands, url, tmp_path).splitlines() == [
            first_line,
            f"The schema is as revision {migrate.HEAD} wants it.",
            f"{migrate.HEAD} (head)",
        ]


@pytest.mark.parametrize("kind", ["mariadb"])
def test_an_import(kind: str, tmp_path: Path, fresh_database: Callable[[str], str]) -> None:
    frozen = (ROOT / "tests" / "data" / "adk_sqlite" / "sessions.sql").read_text()
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as raw:
        raw.executescript(frozen)
    url = fresh_database(kind)
    command = block("import-adk-sqlite", "sh")
    assert re.search(r"Imported\s.*sessions +│ +5 │", shell(command, url, tmp_path), re.DOTALL)
    if SOAK:
        again = shell(command, url, tmp_path)
        assert re.search(r"sessions +│ +0 │.*there already +│ +5 │", again, re.DOTALL)


@pytest.mark.parametrize("kind", ["postgresql"])
async def test_a_conversion(
    kind: str, tmp_path: Path, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    await run_script(url, (ROOT / "tests" / "data" / "v0" / f"1.21.0-{kind}.sql").read_text())
    commands = block("--source-timezone", "sh").splitlines()
    outputs = [await asyncio.to_thread(shell, command, url, tmp_path) for command in commands]
    assert re.search(r"To convert\s.*refused +│ +0 │", outputs[0], re.DOTALL)
    assert re.search(r"Converted\s.*refused +│ +0 │", outputs[1], re.DOTALL)
    assert f"From no revision to {migrate.HEAD}." in outputs[1]
    assert outputs[2].startswith("Dropped ")


def test_every_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ +)make ([a-z-]+)", README, re.MULTILINE))
    assert named <= targets
    assert {"demo", "test"} <= named


def test_what_is_promised_names_tests_that_there_are() -> None:
    promised = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(promised) > 20
    missing = [
        f"{file}::{name}"
        for file, name in promised
        if f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert missing == []


async def run_block(code: str, names: dict[str, Any]) -> None:
    """Runs a block that stands in a coroutine."""
    compiled = compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if inspect.isawaitable(running := eval(compiled, names)):
        await running


async def test_several_writers(tmp_path: Path) -> None:
    names: dict[str, Any] = {"SessionService": SessionService}
    make, append = block('on_stale="refresh")\nawait').splitlines()
    await run_block(make.replace("postgresql://app@db/agents", f"sqlite:///{tmp_path}/a.db"), names)
    async with names["service"] as service:
        names["session"] = session = await service.create_session(app_name="shop", user_id="ann")
        names["event"] = Event(author="ann")
        await service.append_event(session.model_copy(deep=True), Event(id="between"))
        await run_block(append, names)
        assert [event.id for event in session.events] == ["between", names["event"].id]
        await run_block(block("await service.update_state("), names)
        again = await service.get_session(app_name="shop", user_id="ann", session_id=session.id)
        assert again.state == {
            "topic": "sailing", "user:name": "Ada", "app:visits": 1, "user:credit": -0.5,
        }  # fmt: skip


async def test_a_service_on_several_hosts() -> None:
    names: dict[str, Any] = {"SessionService": SessionService}
    await run_block(block("wsrep_sync_wait"), names)
    assert names["service"]._database.engine.dialect.driver == "asyncmy"
    await names["service"].close()


async def test_living_with_sessions(tmp_path: Path) -> None:
    seen: list[Event] = []
    names: dict[str, Any] = {"SessionService": SessionService, "show": seen.append}
    names |= {"contextlib": contextlib, "moving": moving, "time": time, "timedelta": timedelta}
    async with SessionService(f"sqlite:///{tmp_path}/chats.db") as service:
        labelled = await service.create_session(app_name="shop", user_id="bob")
        await service.update_session("shop", "bob", labelled.id, labels={"team": "red"})
        session = await service.create_session(app_name="shop", user_id="ann", state={"a": 1})
        names |= {"service": service, "session": session}
        reader = session.model_copy(deep=True)
        for number in range(60):
            actions = EventActions(state_delta={"a": number})
            await service.append_event(session, Event(id=f"{number}", actions=actions))

        read = block("service.page_sessions(").replace("    ...", "    show(event)")
        await run_block(read, names)
        assert len(seen) == 60
        assert [event.id for event in names["page"].items] == [f"{n}" for n in range(20, 60)]

        await run_block(block("service.archive_session("), names)
        summary = await service.describe_session("shop", "ann", session.id)
        assert summary is not None
        assert (summary.title, summary.labels) == ("A late parcel", {"team": "returns"})

        names["event"] = session.events[1]
        await run_block(block("service.fork_session("), names)
        assert names["then"].state == names["copy"].state == {"a": 1}
        assert len(names["copy"].events) == 2

        follow = block("service.watch(session))").replace("show(event)", "show(event); break")
        await run_block(follow, {**names, "session": reader})
        assert seen[-1].id == "0"

        folder = f"sqlite:///{tmp_path}"
        moved = block("moving.copy(").replace("postgresql://app@db/agents", f"{folder}/new.db")
        moved = moved.replace("sqlite:///chats.db", f"{folder}/chats.db")
        await run_block(moved.replace('"shop.ndjson"', f'"{tmp_path}/shop.ndjson"'), names)
        assert names["report"].differences == ()
        assert names["report"].verified == 3
        assert len((tmp_path / "shop.ndjson").read_text().splitlines()) > 60

        await run_block(block("idle_for=timedelta"), names)
        kept = await service.get_session(app_name="shop", user_id="ann", session_id=session.id)
        assert kept is not None
        assert len(kept.events) == 60  # nothing is that old
        await run_block(block("erase_user("), names)
        assert await service.list_users("shop") == ["bob"]
