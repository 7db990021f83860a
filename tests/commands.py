"""The command ``adk-sessions``: in this process, as one of its own, and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import forked
from click.testing import CliRunner, Result

from adk_sessions import Event, EventActions, SessionService
from adk_sessions.cli import main

# click before 8.2 puts both into one, unless it is told not to
SEPARATE: dict[str, Any] = (
    {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
)
# Seconds that a process may take; most of it is Python's start.
PATIENCE = 60


def run(
    *arguments: str,
    url: str | None = None,
    charset: str = "utf-8",
    variables: dict[str, str] | None = None,
) -> Result:
    """In this process: what it prints, and its exit status."""
    env: dict[str, str | None] = {"ADK_SESSIONS_URL": url, "COLUMNS": None, "TZ": "UTC"}
    runner = CliRunner(charset, {**env, **(variables or {})}, **SEPARATE)
    return runner.invoke(main, arguments)


def ok(*arguments: str, url: str | None = None) -> str:
    done = run(*arguments, url=url)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


def refused(*arguments: str, url: str | None = None, status: int = 1) -> str:
    """A command that fails with a message and no traceback."""
    done = run(*arguments, url=url)
    assert done.exit_code == status, done.output + repr(done.exception)
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    return done.stderr


def environment(url: str | None) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")
    }
    given = {} if url is None else {"ADK_SESSIONS_URL": url}
    return {**kept, **given, "TZ": "UTC", "PYTHONWARNINGS": "error"}


def start(*arguments: str, url: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """A process of its own that goes on."""
    ours = signal.getsignal(signal.SIGINT)
    if ours is signal.SIG_IGN:  # as in a shell's background, and processes inherit it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "adk_sessions", *arguments],
            env=environment(url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
    finally:
        signal.signal(signal.SIGINT, ours)


def next_line(running: subprocess.Popen[str]) -> str:
    """The next line that a process prints; one that prints none in time is killed."""
    assert running.stdout is not None
    assert running.stderr is not None
    limit = threading.Timer(PATIENCE, running.kill)
    limit.start()
    try:
        line = running.stdout.readline()
    finally:
        limit.cancel()
    assert line, f"no line in {PATIENCE} seconds, or no more at all: {running.stderr.read()}"
    return line


def process(
    *arguments: str, url: str | None = None, status: int = 0, input: str | Path = os.devnull
) -> subprocess.CompletedProcess[str]:
    """A process of its own, that reads a file and ends with a status."""
    with TemporaryFile() as output, TemporaryFile() as complaints, open(input) as given:
        files = (given.fileno(), output.fileno(), complaints.fileno())
        running = forked.start(arguments, environment(url), files)
        ended = forked.ended(running, PATIENCE)
        for file in (output, complaints):
            file.seek(0)
        done = subprocess.CompletedProcess(
            arguments, ended, output.read().decode(), complaints.read().decode()
        )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def on_terminal(
    *arguments: str, url: str | None = None, columns: int = 80, answers: str = ""
) -> tuple[int, str]:
    """A process on a terminal: its exit status and all that is shown, escape sequences too."""
    master, slave = pty.openpty()
    shown = b""
    try:
        os.write(master, answers.encode())
        given = {**environment(url), "COLUMNS": str(columns), "TERM": "xterm"}
        running = forked.start(arguments, given, (slave, slave, slave))
        os.close(slave)
        deadline = time.monotonic() + PATIENCE
        while select.select([master], [], [], max(deadline - time.monotonic(), 0))[0]:
            try:
                shown += os.read(master, 65_536)
            except OSError:  # what Linux says at the end
                break
        status = forked.ended(running, max(deadline - time.monotonic(), 1))
    finally:
        os.close(master)
    return status, shown.decode().replace("\r\n", "\n")


def objects(printed: str) -> list[dict[str, Any]]:
    """What ``--json`` prints: one object per line."""
    return [json.loads(line) for line in printed.splitlines()]


# --- what there is to look at ----------------------------------------------------------------


async def talk(
    service: Any,
    app: str,
    user: str,
    session_id: str,
    events: Iterable[dict[str, Any]],
    state: dict[str, Any] | None = None,
    time: float = 1_700_000_000.0,
) -> Any:
    """A session with events, seven seconds apart; their ids are e1, e2 … unless they say so."""
    session = await service.create_session(
        app_name=app, user_id=user, session_id=session_id, state=state
    )
    for number, fields in enumerate(events, 1):
        fields = {"id": f"e{number}", "invocation_id": "i", "author": "clerk", **fields}
        if "delta" in fields:
            fields["actions"] = EventActions(state_delta=fields.pop("delta"))
        await service.append_event(session, Event(timestamp=time + 7 * number, **fields))
    return session


def said(text: str) -> dict[str, Any]:
    return {"role": "model", "parts": [{"text": text}]}


async def fill(url: str) -> None:
    """An app with a conversation and a few empty sessions, and another app."""
    async with SessionService(url) as service:
        call = {"id": "c", "name": "price", "args": {"of": "tea"}}
        answer = {"id": "c", "name": "price", "response": {"result": 3.5}}
        await talk(
            service,
            "shop",
            "ann",
            "s",
            [
                {"author": "user", "content": said("What does tea cost?")},
                {"content": {"parts": [{"function_call": call}]}},
                {
                    "content": {"role": "user", "parts": [{"function_response": answer}]},
                    "delta": {"price": 3.5, "user:seen": ["tea"]},
                },
                {"content": said("It costs 3.50.")},
            ],
            state={"topic": "tea"},
        )
        await service.update_state(
            app_name="shop", user_id="ann", session_id="s", delta={"paid": True}, delete=["topic"]
        )
        for number in range(3):
            await talk(service, "shop", "bob", f"b{number}", [])
        await talk(service, "other", "ann", "s", [{"author": "user", "content": "Hello"}])
