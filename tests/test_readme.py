"""What README tells people to type works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert re.search(r"\b1\d\d passed", run(tmp_path, "-m", "pytest", "-q", "test_mine.py"))


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


def test_every_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ +)make ([a-z-]+)", README, re.MULTILINE))
    assert named <= targets
    assert {"demo", "test"} <= named
