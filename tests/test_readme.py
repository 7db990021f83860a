"""What README tells people to type works."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from scripts import run_script

from adk_sessions import migrate

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
    (tmp_path / "main.py").write_text(block("async def main"))
    assert run(tmp_path, "-W", "error", "main.py") == (
        "{'topic': 'greeting', 'user:name': 'Ann'} 1\n"
    )


def test_the_kit_on_a_service_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(block("class TestMyService"))
    listed = run(tmp_path, "-m", "pytest", "-q", "--collect-only", "test_mine.py")
    assert re.search(r"\b1\d\d tests collected", listed)
    # a part is enough to see that the class works
    some = run(tmp_path, "-m", "pytest", "-q", "-k", "delete or order", "test_mine.py")
    assert re.search(r"^\d+ passed", some, re.MULTILINE)


@pytest.mark.parametrize("language", ["yaml", "python"])
def test_the_services_that_google_adks_servers_load(tmp_path: Path, language: str) -> None:
    pytest.importorskip("google.adk")
    suffix = {"yaml": "yaml", "python": "py"}[language]
    code = block("register_session_service" if suffix == "py" else "services:", language)
    (tmp_path / f"services.{suffix}").write_text(code)
    (tmp_path / "ask.py").write_text(
        "import sys\n"
        "from google.adk.cli.service_registry import get_service_registry, load_services_module\n"
        "load_services_module(sys.argv[1])\n"
        "uri = 'postgresql://ann@127.0.0.1/x'\n"
        "service = get_service_registry().create_session_service(uri, agents_dir='.')\n"
        "print(type(service).__module__)\n"
    )
    assert run(tmp_path, "ask.py", str(tmp_path)) == "adk_sessions.adk\n"


def test_the_import_that_is_swapped(tmp_path: Path) -> None:
    pytest.importorskip("google.adk")
    was, now = block("was: from google.adk.sessions").splitlines()[:2]
    code = [was.removeprefix("# was: "), "Theirs = DatabaseSessionService"]
    code += [now, "print(DatabaseSessionService is Theirs, DatabaseSessionService.__name__)"]
    (tmp_path / "main.py").write_text("\n".join(code))
    assert run(tmp_path, "main.py") == "False DatabaseSessionService\n"


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
    for _ in range(2):
        lines = shell(commands, url, tmp_path).splitlines()
        assert lines[1] == f"The schema is as revision {migrate.HEAD} wants it."
        assert lines[2] == f"{migrate.HEAD} (head)"
    assert lines[0] == f"At {migrate.HEAD} already."


@pytest.mark.parametrize("kind", ["mariadb"])
def test_an_import(kind: str, tmp_path: Path, fresh_database: Callable[[str], str]) -> None:
    frozen = (ROOT / "tests" / "data" / "adk_sqlite" / "sessions.sql").read_text()
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as raw:
        raw.executescript(frozen)
    url = fresh_database(kind)
    command = block("import-adk-sqlite", "sh")
    assert re.search(r"Imported\s.*sessions +│ +5 │", shell(command, url, tmp_path), re.DOTALL)
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
