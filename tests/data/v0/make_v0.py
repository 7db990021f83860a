"""Makes the databases beside this file: run by hand, see README.md.

    TZ=Europe/Berlin python make_v0.py sqlite:///old.db 1.8.0-sqlite

writes what that release stores to the database, and what it then reads to ``1.8.0-sqlite.json``.
The release's own service does all of it, so it runs in an environment with that release.
"""

# ruff: noqa: E402

from __future__ import annotations

import asyncio
import inspect
import json
import sqlite3
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

from google.adk.auth.auth_credential import AuthCredential, AuthCredentialTypes, OAuth2Auth
from google.adk.auth.auth_tool import AuthConfig
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions.database_session_service import DatabaseSessionService
from google.adk.version import __version__
from google.genai import types

try:
    from google.adk.events.event_actions import EventCompaction
    from google.adk.tools.tool_confirmation import ToolConfirmation
except ImportError:
    EventCompaction = ToolConfirmation = None

from fastapi.openapi.models import APIKey, APIKeyIn, OAuth2, OAuthFlowAuthorizationCode, OAuthFlows

T0 = 1_700_000_000.123456  # 2023-11-14 22:13:20 UTC
OLDEST = __version__.startswith("0.")


def only(model, fields):
    """The fields that this release has."""
    return {name: value for name, value in fields.items() if name in model.model_fields}


def text(words, role="model"):
    return types.Content(role=role, parts=[types.Part(text=words)])


def auth():
    flows = OAuthFlows(
        authorizationCode=OAuthFlowAuthorizationCode(
            authorizationUrl="https://example.org/a", tokenUrl="https://example.org/t", scopes={}
        )
    )
    return {
        "call-1": AuthConfig(
            auth_scheme=OAuth2(flows=flows),
            raw_auth_credential=AuthCredential(
                auth_type=AuthCredentialTypes.OPEN_ID_CONNECT,
                oauth2=OAuth2Auth(client_id="id", client_secret="not a secret"),
            ),
        ),
        "call-2": AuthConfig(auth_scheme=APIKey(**{"in": APIKeyIn.header, "name": "X-Key"})),
    }


# Per session: id of the event, seconds after T0, fields, actions.
EVENTS = {
    ("shop", "anna", "s1"): [
        (
            "e01",
            0,
            {"author": "user", "content": text("¿Qué? “ü” 😀 \\ \" ' % {} ; -- \n\t", "user")},
            {},
        ),
        (
            "e02",
            1.5,
            {
                "branch": "root.buyer",
                "content": types.Content(
                    role="model",
                    parts=[
                        types.Part(
                            function_call=types.FunctionCall(
                                id="call-1", name="find", args={"x": [1, None, {"y": 0.1}]}
                            )
                        )
                    ],
                ),
                "long_running_tool_ids": {"call-1", "call-2"},
                "turn_complete": True,
                "interrupted": False,
                "partial": None if OLDEST else False,
            },
            {},
        ),
        (
            "e03",
            2.25,
            {
                "content": types.Content(
                    role="user",
                    parts=[
                        types.Part(
                            function_response=types.FunctionResponse(
                                id="call-1", name="find", response={"found": None, "n": 2}
                            )
                        )
                    ],
                ),
            },
            {
                "skip_summarization": True,
                "state_delta": {
                    "plain": {"deep": [1, 2.5, True, None, {"ü": "😀"}], "none": None},
                    "float": 0.1 + 0.2,
                    "long": 2**70,
                    "app:motto": "für alle",
                    "user:name": "Anna",
                },
                "artifact_delta": {"a.txt": 3},
            },
        ),
        ("e04", 3, {"content": text("auth")}, {"requested_auth_configs": auth()}),
        ("e05", 4, {"content": text("to")}, {"transfer_to_agent": "other", "escalate": True}),
        (
            "e06",
            5,
            {
                "content": text("facts"),
                "error_code": "SAFETY",
                "error_message": "it\nfailed",
                "grounding_metadata": None
                if OLDEST
                else types.GroundingMetadata(
                    web_search_queries=["q"],
                    grounding_chunks=[
                        types.GroundingChunk(web=types.GroundingChunkWeb(uri="u", title="t"))
                    ],
                ),
                "custom_metadata": {"a": [1, None, {"b": 0.1}], "none": None},
                "usage_metadata": types.GenerateContentResponseUsageMetadata(
                    prompt_token_count=3, total_token_count=7
                ),
                "citation_metadata": types.CitationMetadata(citations=[types.Citation(uri="u")]),
                "input_transcription": types.Transcription(text="heard", finished=True),
                "output_transcription": types.Transcription(text="said"),
            },
            {},
        ),
        ("e07", 6, {"content": text("last of them, and a long text: " + "ä" * 200)}, {}),
        (
            "e08",
            7,
            {"content": text("newer actions")},
            {
                "requested_tool_confirmations": {
                    "call-2": ToolConfirmation(hint="sure?", payload={"a": [1, None]})
                }
                if ToolConfirmation
                else {},
                "compaction": EventCompaction(
                    start_timestamp=1.5,
                    end_timestamp=2.5,
                    compacted_content=text("in short"),
                )
                if EventCompaction
                else None,
                "end_of_agent": True,
                "agent_state": {"step": 2, "none": None},
                "rewind_before_invocation_id": "i",
            },
        ),
    ],
    # two of one moment, the later id first
    ("shop", "anna", "equal"): [
        ("q2", 10, {"content": text("first")}, {}),
        ("q1", 10, {"content": text("second")}, {}),
        ("q3", 10, {"content": text("third")}, {}),
        ("q4", 10.000001, {"content": text("fourth")}, {}),
    ],
    # the hour that is there twice in Berlin (2023-10-29, until 01:00 UTC) and in New York
    ("shop", "Bob ü", "fold"): [
        (
            f"f{n}",
            moment - T0,
            {"author": "user", "content": text(str(n))},
            {"state_delta": {"n": n}},
        )
        for n, moment in enumerate(
            (
                1698538200.5,
                1698539400.25,
                1698541200,
                1698543000,
                1698544800,
                1699161000,
                1699164600,
            )
        )
    ],
    # the same id in another app, whose events the oldest releases would mix up
    ("second", "anna", "s2" if OLDEST else "s1"): [
        ("e01", 20, {"author": "user", "content": text("hi", "user")}, {})
    ],
}
if not OLDEST:  # the oldest release cannot store bytes, nor an event without content
    EVENTS["shop", "anna", "blob"] = [
        (
            "b1",
            30,
            {
                "content": types.Content(
                    role="user",
                    parts=[
                        types.Part(inline_data=types.Blob(data=bytes(range(256)), mime_type="a/b"))
                    ],
                )
            },
            {},
        ),
        ("b2", 31, {}, {"state_delta": {"app:motto": "for all", "user:old": [True]}}),
    ]


async def wait(value):
    return await value if inspect.isawaitable(value) else value


async def main(url: str, name: str) -> None:
    service = DatabaseSessionService(db_url=url)
    begun = time.time()
    where = [*EVENTS, ("shop", "anna", "empty")]
    for app_name, user_id, session_id in where:
        state = {"from": session_id, "app:a": {"b": [None]}, "user:u": 1.5, "temp:t": 1}
        key = {"app_name": app_name, "user_id": user_id, "session_id": session_id}
        await wait(service.create_session(**key, state=state))
        for event_id, after, fields, actions in EVENTS.get((app_name, user_id, session_id), ()):
            session = await wait(service.get_session(**key))
            session.last_update_time = 4e9  # events of the past are not stale
            event = Event(
                id=event_id,
                invocation_id=f"i-{event_id}",
                timestamp=T0 + after,
                actions=EventActions(**only(EventActions, actions)),
                **{"author": "buyer", **only(Event, fields)},
            )
            await wait(service.append_event(session=session, event=event))
    read = []
    for app_name, user_id, session_id in where:
        key = {"app_name": app_name, "user_id": user_id, "session_id": session_id}
        session = await wait(service.get_session(**key))
        read.append(session.model_dump(mode="json", exclude_none=True))
        for event in read[-1]["events"]:
            # a set, in any order
            event.get("long_running_tool_ids", []).sort()
    frozen = {"release": __version__, "begun": begun, "done": time.time(), "sessions": read}
    Path(f"{name}.json").write_text(json.dumps(frozen, indent=1, ensure_ascii=False) + "\n")
    if url.startswith("sqlite"):
        file = sqlite3.connect(url.partition("///")[2])
        Path(f"{name}.sql").write_text("\n".join(file.iterdump()) + "\n")


asyncio.run(main(*sys.argv[1:]))
