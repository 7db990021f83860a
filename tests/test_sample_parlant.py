"""samples/parlant is run as its README says: as a process, and again as another one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from servers import LOOPBACK, free_port
from test_samples import PATIENCE, copy_samples, environment, run

if importlib.util.find_spec("parlant") is None:
    pytest.skip("needs the extra parlant", allow_module_level=True)


def said(done: subprocess.CompletedProcess[str]) -> list[tuple[int, str, str]]:
    """Offset, name and text of each message that a run has printed; it succeeded."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = re.findall(r"^ +(\d+) (Ada|Guide): (.*)$", done.stdout, re.MULTILINE)
    return [(int(offset), name, text) for offset, name, text in found]


def names(messages: list[tuple[int, str, str]]) -> list[str]:
    return [name for _, name, _ in messages]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_conversation_goes_on(
    kind: str, tmp_path: Path, fresh_database: Callable[[str], str]
) -> None:
    folder = copy_samples(tmp_path / "samples") / "parlant"
    # SQLite is what it takes without being told
    place = {} if kind == "sqlite" else {"DATABASE_URL": fresh_database(kind)}

    done = run(sys.executable, "main.py", folder=folder, **place)
    first = said(done)
    assert "finds no session and begins one." in done.stdout
    assert names(first) == ["Ada", "Guide"] * 2
    assert first[-1][2] == (
        "I know your name is Ada and your topic is sailing and your number of starts is 1;"
        " this is your message 2 here."
    )

    done = run(sys.executable, "main.py", folder=folder, **place)
    second = said(done)
    assert "finds the session of an earlier one" in done.stdout
    assert second[:4] == first
    assert names(second) == ["Ada", "Guide"] * 4
    offsets = [offset for offset, _, _ in second]
    assert offsets == sorted(set(offsets))
    assert second[-1][2] == (
        "I know your name is Ada and your topic is sailing and your number of starts is 2;"
        " this is your message 4 here."
    )
    assert (folder / "parlant.db").exists() == (kind == "sqlite")


def test_a_server_that_stays_is_ended_by_a_signal(tmp_path: Path) -> None:
    """By SIGTERM, and where a shell in the background has SIGINT ignored."""
    folder = copy_samples(tmp_path / "samples") / "parlant"
    port = free_port()
    command = ["sh", "-c", "trap '' INT; exec \"$0\" main.py --serve", sys.executable]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder, PORT=str(port)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        try:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if line.startswith("Serving at"):
                    break
            assert httpx.get(f"http://{LOOPBACK}:{port}/agents").json()[0]["id"] == "guide", printed
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()  # does nothing to a process that has ended
