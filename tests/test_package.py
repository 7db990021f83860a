"""The wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from everywhere import SOAK

from adk_sessions import migrate

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adk_sessions"

USE = """
import asyncio, sys
from pathlib import Path
import adk_sessions
from adk_sessions import Event, SessionService, migrate

home, checkout = sys.argv[1:]
assert Path(adk_sessions.__file__).is_relative_to(home), adk_sessions.__file__
assert not any(Path(place) == Path(checkout) for place in sys.path), sys.path
assert migrate.scripts() == Path(adk_sessions.__file__).parent / "_migrations"

async def main():
    ids = {"app_name": "shop", "user_id": "ann", "session_id": "1"}
    async with SessionService("sqlite:///data/chats.db") as service:
        session = await service.get_session(**ids)
        if session is None:
            session = await service.create_session(**ids, state={"n": 1})
            await service.append_event(session, Event(author="user", content="hello"))
            print("new")
        else:
            print("known", session.state, [event.content for event in session.events])

asyncio.run(main())
"""


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=150, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # without isolation nothing is downloaded
    here = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", "--wheel", *here, "--outdir", folder, cwd=ROOT)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel, and else borrows what the tests have."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home)
    [python] = [*home.glob("bin/python"), *home.glob("Scripts/python.exe")]
    paths = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
    own = Path(paths.strip())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    # A path in a .pth file is searched, but the .pth files in it (an editable install's) are not
    # read; it comes after the environment's own.
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (own / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name for name in names if ".dist-info/" in name}
    expected = {
        f"adk_sessions/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")
    }
    expected |= {"adk_sessions/py.typed"}
    expected |= {"adk_sessions/_migrations/env.py", "adk_sessions/_migrations/script.py.mako"}
    expected |= {
        f"adk_sessions/_migrations/versions/{path.name}"
        for path in (ROOT / "alembic" / "versions").glob("*.py")
    }
    assert names - info == expected
    assert any("versions/0001" in name for name in names)
    parts = {name.partition(".dist-info/")[2] for name in info}
    assert parts == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_the_metadata_says_what_is_needed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "adk-sessions"
    needs = [need for need in metadata.get_all("Requires-Dist") or [] if "extra ==" not in need]
    names = {need.partition(">")[0].partition("[")[0] for need in needs}
    assert {"sqlalchemy", "greenlet", "alembic", "pydantic", "aiosqlite", "asyncpg"} <= names
    # google-adk is for those who use it
    assert not any("google" in need for need in needs)
    assert {"adk", "mysql"} <= set(metadata.get_all("Provides-Extra") or [])


def test_the_wheel_works_where_there_is_no_checkout(clean_python: Path, tmp_path: Path) -> None:
    script = tmp_path / "use.py"
    script.write_text(USE)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    home = clean_python.parent.parent
    outputs = [
        run(clean_python, "-I", script, home, ROOT, cwd=tmp_path, env=environment).stdout.strip()
        for _ in range(2)
    ]
    assert outputs == ["new", "known {'n': 1} ['hello']"]
    assert (tmp_path / "data" / "chats.db").is_file()


def test_alembic_finds_the_wheels_revisions(clean_python: Path, tmp_path: Path) -> None:
    (tmp_path / "alembic.ini").write_text(
        "[alembic]\nscript_location = adk_sessions:_migrations\npath_separator = os\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["ADK_SESSIONS_URL"] = f"sqlite:///{tmp_path}/a.db"
    command = [clean_python, "-I", "-m", "alembic"]
    run(*command, "upgrade", "head", cwd=tmp_path, env=environment)
    assert "(head)" in run(*command, "current", cwd=tmp_path, env=environment).stdout


def test_an_application_lists_the_wheels_revisions(clean_python: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "versions").mkdir(parents=True)
    (tmp_path / "own" / "env.py").write_text(
        "from alembic import context\n"
        "from sqlalchemy import create_engine\n"
        f"with create_engine('sqlite:///{tmp_path}/a.db').connect() as connection:\n"
        "    context.configure(connection=connection)\n"
        "    with context.begin_transaction():\n"
        "        context.run_migrations()\n"
    )
    (tmp_path / "alembic.ini").write_text(
        "[alembic]\nscript_location = %(here)s/own\npath_separator = newline\n"
        "version_locations = %(here)s/own/versions\n  adk_sessions:_migrations/versions\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [clean_python, "-I", "-m", "alembic"]
    run(*command, "upgrade", "adk_sessions@head", cwd=tmp_path, env=environment)
    assert migrate.HEAD in run(*command, "current", cwd=tmp_path, env=environment).stdout


@pytest.mark.parametrize("kind", ["sqlite", *(["postgresql"] if SOAK else [])])
def test_the_wheels_command_upgrades(
    kind: str, clean_python: Path, tmp_path: Path, fresh_database: Callable[[str], str]
) -> None:
    url = fresh_database(kind)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["ADK_SESSIONS_URL"] = url
    [command] = [*clean_python.parent.glob("adk-sessions"), *clean_python.parent.glob("*ns.exe")]
    calls: list[list[str | Path]] = [[command, "upgrade"], [command, "check"]]
    if kind == "sqlite":  # what depends on no database
        calls += [[command, "current"], [clean_python, "-I", "-m", "adk_sessions", "upgrade"]]
    head = migrate.HEAD
    expected = [
        f"From no revision to {head}.\n",
        f"The schema is as revision {head} wants it.\n",
        f"{head} (head)\n",
        f"At {head} already.\n",
    ]
    outputs = [run(*call, cwd=tmp_path, env=environment).stdout for call in calls]
    assert outputs == expected[: len(calls)]


def python(code: str, *arguments: str) -> str:
    return run(sys.executable, "-W", "error", "-c", code, *arguments, cwd=ROOT).stdout


def test_importing_the_package_imports_neither_google_nor_alembic() -> None:
    code = """
import sys
before = set(sys.modules)
import adk_sessions
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    loaded = set(python(code).split())
    assert "adk_sessions" in loaded
    assert "sqlalchemy" in loaded
    assert not loaded & {"google", "alembic", "asyncpg", "asyncmy", "pytest", "click", "rich"}


def test_the_core_works_without_google_adk(tmp_path: Path) -> None:
    code = """
import asyncio, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "google" or name.startswith("google."):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] == "google"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
from adk_sessions import Event, SessionService

async def main():
    async with SessionService(sys.argv[1]) as service:
        session = await service.create_session(app_name="a", user_id="u")
        await service.append_event(session, Event(content="hello"))
        print((await service.get_session(app_name="a", user_id="u", session_id=session.id))
              .events[0].content)

asyncio.run(main())
try:
    import adk_sessions.adk
except ImportError as error:
    print(error)
"""
    lines = python(code, f"sqlite:///{tmp_path}/a.db").splitlines()
    assert lines[0] == "hello"
    assert "pip install 'adk-sessions[adk]'" in lines[1]


def test_a_start_on_a_ready_database_does_not_import_alembic(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from adk_sessions import SessionService

async def main():
    async with SessionService(sys.argv[1]) as service:
        await service.prepare_tables()

asyncio.run(main())
print("alembic" in sys.modules)
"""
    url = f"sqlite:///{tmp_path}/a.db"
    assert [python(code, url).strip() for _ in range(2)] == ["True", "False"]
