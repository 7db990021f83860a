"""The contract kit on google-adk's types, on each database.

What differs from a run on the store's own types is the objects, not the way to the database: all of
it is run on SQLite, parts on the others. The pooler, the generic path and databases in memory are
run on the store's own types (test_contract.py). ADK_SESSIONS_SOAK=1 runs all of it on each.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from everywhere import NO_TABLES, PART, OnEveryDatabase

pytest.importorskip("google.adk")

from google.adk.events import Event, EventActions
from google.adk.sessions.base_session_service import GetSessionConfig
from google.adk.tools.tool_confirmation import ToolConfirmation
from google.genai import types

from adk_sessions.adk import DatabaseSessionService


class WithAdkTypes(OnEveryDatabase):
    event_type = Event
    actions_type = EventActions
    config_type = GetSessionConfig
    event_fields: ClassVar[dict[str, Any]] = {
        **OnEveryDatabase.event_fields,
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


class TestAdkDatabaseSessionService(WithAdkTypes):
    @pytest.fixture
    def backend(self) -> str:
        return "sqlite"


class TestAdkDatabaseSessionServiceOnPostgreSQL(WithAdkTypes):
    locals().update(NO_TABLES)

    @pytest.fixture
    def backend(self) -> str:
        return "postgresql"


class TestAdkDatabaseSessionServiceOnMariaDB(WithAdkTypes):
    locals().update(PART)

    @pytest.fixture
    def backend(self) -> str:
        return "mariadb"
