"""Each sample is run as its README says: as a process, and again as another one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from everywhere import SOAK
from servers import run_sync
from sqlalchemy import inspect
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import create_async_engine

from adk_sessions import Session, SessionService

pytest.importorskip("google.adk")

SAMPLES = Path(__file__).parents[1] / "samples"
PATIENCE = 120  # seconds a process may take
ADK = [sys.executable, "-m", "google.adk.cli"]


def copy_samples(target: Path) -> Path:
    """A copy that has nothing of a developer's own: no .env with a key, no database."""
    private = shutil.ignore_patterns(".env", "*.db*", ".adk", "__pycache__")
    return shutil.copytree(SAMPLES, target, ignore=private)


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Variables for a process: no API key, and everything that it writes goes to the folder."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "ADK_SUPPRESS_EXPERIMENTAL_FEATURE_WARNINGS": "1",
        **variables,
    }


def run(
    *command: str | Path, folder: Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment(folder, **variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def output(*command: str | Path, folder: Path, **variables: str) -> str:
    """What a command prints; it succeeds, and it complains of nothing."""
    done = run(*command, folder=folder, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def stored(url: str, app_name: str, user_id: str, session_id: str) -> Session | None:
    async def read() -> Session | None:
        async with SessionService(url) as service:
            return await service.get_session(
                app_name=app_name, user_id=user_id, session_id=session_id
            )

    return run_sync(read())


def said(session: Session | None) -> list[str]:
    """The texts of a session, in order."""
    assert session is not None
    parts = [part for event in session.events for part in (event.content or {})["parts"]]
    return [part["text"] for part in parts if part.get("text")]


# --- quickstart ---------------------------------------------------------------------------------


def test_quickstart_goes_on_in_a_new_process(tmp_path: Path) -> None:
    main = copy_samples(tmp_path / "samples") / "quickstart" / "main.py"
    url = f"sqlite:///{tmp_path}/quickstart.db"

    first = output(sys.executable, main, folder=tmp_path, DATABASE_URL=url)
    assert "finds no session and begins one." in first
    assert "agent: Nice to meet you, Ada." in first

    second = output(sys.executable, main, folder=tmp_path, DATABASE_URL=url)
    assert "finds the session of an earlier one: 6 events." in second
    assert "My name is" not in second
    assert "agent: Welcome back, Ada!" in second
    assert "this is your message 4" in second
    assert "stored: 10 events" in second
    for line in ("app:latest_topic = 'sailing'", "user:name = 'Ada'", " topic = 'sailing'"):
        assert line in second

    session = stored(url, "quickstart", "ada", "first-chat")
    assert len(said(session)) == 8


def test_quickstart_has_a_file_of_its_own_and_takes_a_message(tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "samples") / "quickstart"

    message = "My name is Bo and my topic is chess."
    output(sys.executable, "main.py", message, folder=folder)
    session = stored(f"sqlite:///{folder}/quickstart.db", "quickstart", "ada", "first-chat")
    assert said(session) == [message, "Nice to meet you, Bo. Let us talk about chess."]


# --- postgres -----------------------------------------------------------------------------------


def test_postgres_goes_on_in_a_new_process(
    tmp_path: Path, fresh_database: Callable[[str], str]
) -> None:
    """The first one is told the URL by the environment, the second one by .env."""
    folder = copy_samples(tmp_path / "samples") / "postgres"
    url = fresh_database("postgresql")

    first = output(sys.executable, "main.py", folder=folder, POSTGRES_URL=url)
    assert "Starting a session." in first
    assert "plan_trip({'city': 'Lisbon', 'name': 'Grace'})" in first

    example = (folder / ".env.example").read_text()
    edited, lines = re.subn("(?m)^POSTGRES_URL=.*", f"POSTGRES_URL={url}", example)
    assert lines == 1
    (folder / ".env").write_text(edited)
    second = output(sys.executable, "main.py", folder=folder)
    assert "Continuing a session of 6 events." in second
    assert "Welcome back, Grace!" in second
    assert "this is your message 4" in second

    session = stored(url, "postgres", "user", "trip")
    assert session is not None
    assert len(session.events) == 10
    assert session.state == {"city": "Lisbon", "user:name": "Grace", "app:latest_city": "Lisbon"}


def test_postgres_says_what_it_needs(tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "samples") / "postgres"
    done = run(sys.executable, "main.py", folder=folder)
    assert done.returncode == 1
    assert done.stderr == "POSTGRES_URL is not set. Copy .env.example to .env, or export it.\n"


def test_adk_run_stores_in_postgres(tmp_path: Path, fresh_database: Callable[[str], str]) -> None:
    folder = copy_samples(tmp_path / "samples") / "postgres"
    url = fresh_database("postgresql")

    # each is a process; how a URL may be spelled is tested elsewhere too
    spelled = [f"postgresql+asyncpg:{url.partition(':')[2]}"] if SOAK else []
    uris = [url, *spelled, "env://POSTGRES_URL"]
    known = "Welcome back, Grace! I know your city is Lisbon; this is your message {} here."
    for number, uri in enumerate(uris, 1):
        first = number == 1
        message = "My name is Grace and my city is Lisbon." if first else "Hello!"
        answer = "A trip to Lisbon is noted, Grace." if first else known.format(number)
        command = [*ADK, "run", f"--session_service_uri={uri}", "--session_id=one", "."]
        done = run(*command, message, folder=folder, POSTGRES_URL=url)
        assert (done.returncode, done.stderr) == (0, "Session ID: one\n")
        assert re.search(rf"^\[travel_desk\]: .*{re.escape(answer)}", done.stdout, re.MULTILINE)

    assert "adk_sessions_version" in columns(url)  # google-adk's own service has no such table
    session = stored(url, "postgres", "test_user", "one")
    assert session is not None
    assert len(session.events) == 2 + 2 * len(uris)
    assert session.state == {"city": "Lisbon", "user:name": "Grace", "app:latest_city": "Lisbon"}


def test_adk_run_holds_a_dialogue(tmp_path: Path, fresh_database: Callable[[str], str]) -> None:
    folder = copy_samples(tmp_path / "samples") / "postgres"
    url = fresh_database("postgresql")
    dialogue = "My name is Grace and my city is Lisbon.\nHello!\nexit\n"
    done = run(*ADK, "run", f"--session_service_uri={url}", ".", folder=folder, stdin=dialogue)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[travel_desk]: Welcome back, Grace!" in done.stdout

    async def sessions() -> list[Session]:
        async with SessionService(url) as service:
            listed = await service.list_sessions(app_name="postgres", user_id="test_user")
            return list(listed.sessions)

    (session,) = run_sync(sessions())
    assert len(said(stored(url, "postgres", "test_user", session.id))) == 4


def columns(url: str) -> dict[str, dict[str, str]]:
    """The tables of a PostgreSQL database, each with its columns and their types."""

    async def read() -> dict[str, dict[str, str]]:
        engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
        async with engine.connect() as connection:
            listed = await connection.run_sync(
                lambda conn: inspect(conn).get_multi_columns().items()
            )
        await engine.dispose()
        dialect = postgresql.dialect()
        return {
            table: {column["name"]: column["type"].compile(dialect).split()[0] for column in found}
            for (_, table), found in listed
        }

    return run_sync(read())


def test_the_tables_in_the_readme_are_those_in_the_database(
    fresh_database: Callable[[str], str],
) -> None:
    url = fresh_database("postgresql")
    assert stored(url, "none", "none", "none") is None  # makes the tables
    text = (SAMPLES / "postgres" / "README.md").read_text()
    sections = re.findall(r"### (\w+)\n\n\| Column .*\n.*\n((?:\|.*\n)+)", text)
    told = {name: dict(re.findall(r"\| (\w+) \| (\S+) \|", rows)) for name, rows in sections}
    found = columns(url)
    assert len(told) == 6
    assert told == {
        table: {name: kind for name, kind in found[table].items() if name in told[table]}
        for table in told
    }
