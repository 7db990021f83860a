"""The contract kit, on every service and every database."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from adk_sessions import SessionService
from adk_sessions.testing import SessionServiceContract

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sqlite": ("sqlite", {}),
    "sqlite-memory": ("sqlite-memory", {}),
    "postgresql": ("postgresql", {}),
    "mariadb": ("mariadb", {}),
    "generic": ("postgresql", {"backend": "generic"}),
}
SHARED = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}


class OnEveryDatabase(SessionServiceContract):
    """The kit with two services on one database, once for each kind."""

    def make(self, url: str, **options: Any) -> Any:
        raise NotImplementedError

    @pytest.fixture(params=BACKENDS)
    def backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def new_service(
        self,
        backend: str,
        request: pytest.FixtureRequest,
        fresh_database: Callable[[str], str],
    ) -> Callable[[], Any]:
        kind, options = BACKENDS[backend]
        shared = SHARED.get(kind)
        url = request.getfixturevalue(shared) if shared else fresh_database(kind)
        return lambda: self.make(url, **options)

    @pytest.fixture
    async def service(self, new_service: Callable[[], Any]) -> AsyncIterator[Any]:
        async with new_service() as service:
            yield service

    @pytest.fixture
    async def other_service(
        self, backend: str, service: Any, new_service: Callable[[], Any]
    ) -> AsyncIterator[Any]:
        if backend == "sqlite-memory":  # nobody else can reach it
            yield service
        else:
            async with new_service() as other:
                yield other


class TestSessionService(OnEveryDatabase):
    def make(self, url: str, **options: Any) -> Any:
        return SessionService(url, **options)


if importlib.util.find_spec("google.adk"):
    from google.adk.events import Event, EventActions
    from google.adk.sessions.base_session_service import GetSessionConfig
    from google.adk.tools.tool_confirmation import ToolConfirmation
    from google.genai import types

    from adk_sessions.adk import DatabaseSessionService

    class TestAdkDatabaseSessionService(OnEveryDatabase):
        event_type = Event
        actions_type = EventActions
        config_type = GetSessionConfig
        event_fields = {
            **SessionServiceContract.event_fields,
            "content": types.Content(
                role="model",
                parts=[
                    types.Part(inline_data=types.Blob(data=b"\x00\xff\x10", mime_type="a/b")),
                    types.Part(
                        function_call=types.FunctionCall(id="c", name="f", args={"x": [1, None]})
                    ),
                ],
            ),
            "grounding_metadata": types.GroundingMetadata(
                search_entry_point=types.SearchEntryPoint(sdk_blob=b"\xfe\x00")
            ),
            "usage_metadata": types.GenerateContentResponseUsageMetadata(total_token_count=7),
            "citation_metadata": types.CitationMetadata(citations=[types.Citation(uri="u")]),
            "input_transcription": types.Transcription(text="heard", finished=True),
            "output_transcription": types.Transcription(text="said"),
            "long_running_tool_ids": {"b", "a"},
            "interrupted": True,
            "actions": EventActions(
                skip_summarization=True,
                artifact_delta={"a.txt": 3},
                requested_tool_confirmations={"c": ToolConfirmation(hint="sure?")},
            ),
        }

        def make(self, url: str, **options: Any) -> Any:
            return DatabaseSessionService(url, **options)
