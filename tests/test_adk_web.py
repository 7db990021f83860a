"""The service inside google-adk's servers: by services.yaml, by services.py, over a restart."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from everywhere import SOAK
from servers import LOOPBACK, free_port, run_sync
from sqlalchemy import inspect

from adk_sessions import SessionService

pytest.importorskip("google.adk")

import httpx
from google.adk.cli import service_registry
from google.adk.cli.fast_api import get_fast_api_app
from test_samples import ADK, PATIENCE, copy_samples, environment

from adk_sessions.adk import DatabaseSessionService

pytestmark = [
    # google-adk announces its own unfinished features
    pytest.mark.filterwarnings(r"ignore:\[EXPERIMENTAL\]:UserWarning"),
]

SERVICES = {
    "services.yaml": """
services:
  - scheme: sqlite
    type: session
    class: adk_sessions.adk.DatabaseSessionService
  - scheme: postgresql
    type: session
    class: adk_sessions.adk.DatabaseSessionService
""",
    "services.py": """
from google.adk.cli.service_registry import get_service_registry

from adk_sessions.adk import DatabaseSessionService

for scheme in ("sqlite", "postgresql"):
    get_service_registry().register_session_service(scheme, DatabaseSessionService)
""",
}
CASES = [(services, kind) for services in SERVICES for kind in ("sqlite", "postgresql")]
# As a process, which takes seconds to start, one alone: what differs is seen in this one.
AS_PROCESS = CASES if SOAK else [("services.yaml", "postgresql")]

APP = "quickstart"
SESSIONS = f"/apps/{APP}/users/ann/sessions"


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """A folder as `adk web` takes it, with the quickstart's agent."""
    folder = copy_samples(tmp_path / "agents")
    shutil.rmtree(folder / "postgres")
    return folder


async def say(client: httpx.AsyncClient, text: str) -> str:
    """Runs one turn and returns the answer."""
    turn = {
        "appName": APP,
        "userId": "ann",
        "sessionId": "one",
        "newMessage": {"role": "user", "parts": [{"text": text}]},
    }
    response = await client.post("/run", json=turn)
    assert response.status_code == 200, response.text
    answer: str = response.json()[-1]["content"]["parts"][0]["text"]
    return answer


async def first_life(client: httpx.AsyncClient) -> dict[str, Any]:
    """Makes a session, runs a turn, and returns the session as the server gives it."""
    made = await client.post(SESSIONS, json={"sessionId": "one", "state": {"app:motto": "ahoy"}})
    assert made.status_code == 200, made.text
    answer = await say(client, "My name is Ann and my topic is tea.")
    assert answer == "Nice to meet you, Ann. Let us talk about tea."
    session: dict[str, Any] = (await client.get(f"{SESSIONS}/one")).json()
    assert len(session["events"]) == 4
    assert session["state"] == {
        "app:motto": "ahoy",
        "app:latest_topic": "tea",
        "user:name": "Ann",
        "topic": "tea",
    }
    return session


async def next_life(client: httpx.AsyncClient, before: dict[str, Any]) -> None:
    """A new server has the same session, and goes on with it."""
    assert (await client.get(f"{SESSIONS}/one")).json() == before
    assert [session["id"] for session in (await client.get(SESSIONS)).json()] == ["one"]
    answer = "Welcome back, Ann! I know your topic is tea; this is your message 2 here."
    assert await say(client, "Hello!") == answer
    assert len((await client.get(f"{SESSIONS}/one")).json()["events"]) == 6


def tables(url: str) -> set[str]:
    async def read() -> set[str]:
        async with DatabaseSessionService(url) as service, service.db_engine.connect() as conn:
            return set(await conn.run_sync(lambda sync: inspect(sync).get_table_names()))

    return run_sync(read())


def check_it_was_ours(url: str) -> None:
    """google-adk falls back to a service of its own, which makes no such table."""
    assert "adk_sessions_version" in tables(url)

    async def events() -> int:
        async with SessionService(url) as service:
            session = await service.get_session(app_name=APP, user_id="ann", session_id="one")
            return len(session.events) if session else 0

    assert run_sync(events()) == 6


# --- in a program of one's own ------------------------------------------------------------------


@pytest.fixture
def services_of_adk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The services that google-adk makes; what it does to the process by that is undone."""
    for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GOOGLE_GENAI_USE_ENTERPRISE", raising=False)
    monkeypatch.setenv("ADK_DISABLE_LOAD_DOTENV", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(service_registry, "_service_registry_instance", None)
    made: list[Any] = []
    init = DatabaseSessionService.__init__

    def recorded(self: DatabaseSessionService, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(DatabaseSessionService, "__init__", recorded)
    yield made
    for name in ("services", "offline_model", APP, f"{APP}.agent"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("services", "kind"), CASES)
async def test_fast_api_app(
    services: str,
    kind: str,
    agents: Path,
    services_of_adk: list[Any],
    fresh_database: Callable[[str], str],
) -> None:
    (agents / services).write_text(SERVICES[services])
    url = fresh_database(kind)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await services_of_adk[-1].close()  # google-adk does not

    @asynccontextmanager
    async def server() -> AsyncIterator[httpx.AsyncClient]:
        app = get_fast_api_app(
            agents_dir=str(agents), session_service_uri=url, web=False, lifespan=lifespan
        )
        direct = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=direct, base_url="http://testserver") as client,
        ):
            yield client

    async with server() as client:
        before = await first_life(client)
    async with server() as client:
        await next_life(client, before)
    assert len(services_of_adk) == 2
    check_it_was_ours(url)


# --- as a process -------------------------------------------------------------------------------


class AdkServer:
    """`adk api_server`, on a free port."""

    def __init__(self, folder: Path, uri: str, tmp_path: Path, command: str = "api_server") -> None:
        self.log = tmp_path / "server.log"
        port = free_port()
        words = [*ADK, command, "--host", LOOPBACK, "--port", str(port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*words, "--session_service_uri", uri, str(folder)],
                cwd=tmp_path,
                env=environment(tmp_path),
                stdout=log,
                stderr=log,
            )
        self.client = httpx.AsyncClient(base_url=f"http://{LOOPBACK}:{port}", timeout=PATIENCE)

    async def __aenter__(self) -> AdkServer:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if (await self.client.get("/health")).is_success:
                    return self
            except httpx.TransportError:
                await asyncio.sleep(0.05)
        await self.__aexit__()
        raise AssertionError(f"no answer from the server:\n{self.log.read_text()}")

    async def __aexit__(self, *exception: object) -> None:
        await self.client.aclose()
        self.process.kill()  # does nothing to a process that has ended
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        """Ends it as a supervisor does; it has to go by itself."""
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.mark.parametrize(("services", "kind"), AS_PROCESS)
async def test_api_server(
    services: str,
    kind: str,
    agents: Path,
    tmp_path: Path,
    fresh_database: Callable[[str], str],
) -> None:
    (agents / services).write_text(SERVICES[services])
    url = fresh_database(kind)

    # the end of this block kills the process: what it acknowledged is stored
    async with AdkServer(agents, url, tmp_path) as server:
        before = await first_life(server.client)
    async with AdkServer(agents, url, tmp_path) as server:
        await next_life(server.client, before)
        server.stop()
    check_it_was_ours(url)
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "Warning" not in log


async def test_adk_web_lists_what_a_program_stored(
    tmp_path: Path, fresh_database: Callable[[str], str]
) -> None:
    folder = copy_samples(tmp_path / "samples") / "postgres"
    (folder / ".env").write_text(f"POSTGRES_URL={fresh_database('postgresql')}\n")
    program = [sys.executable, str(folder / "main.py")]
    subprocess.run(program, env=environment(tmp_path), check=True, timeout=PATIENCE)

    async with AdkServer(folder, "env://POSTGRES_URL", tmp_path, "web") as server:
        assert (await server.client.get("/list-apps")).json() == ["postgres"]
        sessions = "/apps/postgres/users/user/sessions"
        assert [found["id"] for found in (await server.client.get(sessions)).json()] == ["trip"]
        assert len((await server.client.get(f"{sessions}/trip")).json()["events"]) == 6
        server.stop()
    assert "Traceback" not in server.log.read_text()
