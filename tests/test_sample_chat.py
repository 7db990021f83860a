"""The sample samples/chat_history is run as its README says: as a server, and again as another."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import LOOPBACK, free_port

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

SAMPLE = Path(__file__).parents[1] / "samples" / "chat_history"
README = (SAMPLE / "README.md").read_text()
PATIENCE = 60  # seconds a server may take to start or to stop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("*.db*", "__pycache__")
    return shutil.copytree(SAMPLE, tmp_path / "chat_history", ignore=ignored)


@contextmanager
def served(folder: Path, **variables: str) -> Iterator[Any]:
    """The server that README starts, on a free port; it ends as by Ctrl-C."""
    (command,) = re.findall(r"^    (uvicorn .*)$", README, re.MULTILINE)
    port = free_port()
    words = command.replace("8000", str(port)).split()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", *words, "--host", LOOPBACK],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"http://{LOOPBACK}:{port}", timeout=PATIENCE) as client:
            deadline = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None, process.communicate()[0]
                try:
                    client.get("/openapi.json")
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        output = process.communicate(timeout=PATIENCE)[0]
    assert "Error" not in output, output
    assert "Application shutdown complete." in output, output


def texts(page: dict[str, Any]) -> list[str]:
    return [part["text"] for message in page["messages"] for part in message["parts"]]


def say(client: Any, text: str, **fields: str) -> str:
    body = {"session_id": "monday", "text": text, **fields}
    answered = client.post("/threads/shop/messages", json=body)
    assert answered.status_code == 200, answered.text
    reply: str = answered.json()["reply"]
    return reply


def listed(client: Any, **query: Any) -> dict[str, Any]:
    answered = client.get("/threads/shop/messages", params=query)
    assert answered.status_code == 200, answered.text
    page: dict[str, Any] = answered.json()
    return page


@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_a_conversation_goes_on_in_the_next_process(
    folder: Path, fresh_database: Callable[[str], str], kind: str
) -> None:
    variables = {} if kind == "file" else {"DATABASE_URL": fresh_database(kind)}
    with served(folder, **variables) as client:
        assert say(client, "Hello, my name is Ada.") == "Nice to meet you, Ada. This is message 1."
        for _ in range(2):  # a client that got no answer asks again
            answer = say(client, "Are you there?", message_id="two")
            assert answer == "Yes, Ada. This is message 2."
        assert say(client, "Hi.", session_id="tuesday") == "Yes, stranger. This is message 1."
        everything = texts(listed(client))
        assert len(everything) == 6
        pages, cursor = [], None
        while True:
            query = {"limit": 4} if cursor is None else {"limit": 4, "cursor": cursor}
            page = listed(client, **query)
            pages.append(texts(page))
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert [len(page) for page in pages] == [4, 2]
        assert [text for page in pages for text in page] == everything

        assert client.post("/sessions/monday/archive").status_code == 204
        before = listed(client)
        assert texts(before) == ["Hi.", "Yes, stranger. This is message 1."]

    with served(folder, **variables) as client:
        assert listed(client) == before
        assert texts(listed(client, session_id="monday")) == everything[:4]
        assert client.post("/sessions/monday/restore").status_code == 204
        assert texts(listed(client)) == everything
        assert say(client, "And now?") == "Yes, Ada. This is message 3."

        for path, field in (("?limit=0", "limit"), ("?cursor=x", "cursor")):
            refused = client.get(f"/threads/shop/messages{path}")
            assert (refused.status_code, refused.json()["field"]) == (422, field)
        assert say(client, "Again?", message_id="9") == "Yes, Ada. This is message 4."
    assert (folder / "chat_history.db").exists() == (kind == "file")


def test_a_session_is_of_one_thread(folder: Path) -> None:
    """Ids of sessions are unique in the table: what one knows is not for another thread."""
    with served(folder) as client:
        say(client, "Hello, my name is Ada.")
        body = {"session_id": "monday", "text": "Who am I?"}
        refused = client.post("/threads/other/messages", json=body)
        assert (refused.status_code, "Ada" in refused.text) == (409, False)
        assert texts(client.get("/threads/other/messages").json()) == []
        assert client.post("/sessions/tuesday/archive").status_code == 204
        say(client, "Hi.", session_id="tuesday")  # one that was archived before it was saved
        assert client.post(
            "/threads/other/messages", json={**body, "session_id": "tuesday"}
        ).is_error


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not there")
def test_what_the_readme_types_works(folder: Path) -> None:
    commands = re.findall(r"^    (curl .*)$", README, re.MULTILINE)
    with served(folder) as client:
        port = client.base_url.port
        answers = []
        for command in commands:
            # older versions of curl have no --json
            plain = command.replace("--json", "-H content-type:application/json -d")
            done = subprocess.run(
                ["bash", "-c", plain.replace("localhost:8000", f"{LOOPBACK}:{port}")],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert done.returncode == 0, done.stderr
            answers.append(json.loads(done.stdout) if done.stdout else None)
    assert answers[0]["reply"] == "Nice to meet you, Ada. This is message 1."
    assert answers[1]["reply"] == "Yes, Ada. This is message 2."
    assert len(answers[2]["messages"]) == 3
    assert answers[2]["next_cursor"]
    assert answers[3] is answers[6] is None
    assert answers[4]["messages"] == []
    assert len(answers[5]["messages"]) == 4
