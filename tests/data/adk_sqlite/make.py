"""Makes sessions.sql anew, with google-adk as it is installed. See README.md."""

from __future__ import annotations

import asyncio
import itertools
import math
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from google.adk.events import Event, EventActions
from google.adk.platform.time import set_time_provider
from google.adk.sessions.sqlite_session_service import SqliteSessionService
from google.genai import types

T0 = 1_700_000_000.25

# Values that one database or another cannot hold as they are.
ODD: dict[str, Any] = {
    "nan": math.nan,
    "inf": -math.inf,
    "nul": "a\0b",
    "surrogate": "a\ud800b",
    "big": 10**30,
    "float": 1e16,
    "zero": -0.0,
    "marked": "adk_sessions:text:x",
    "nul\0key": 1,
}


def said(id: str, at: float, text: str = "hello", delta: Any = None, **fields: Any) -> Event:
    return Event(
        id=id,
        timestamp=T0 + at,
        invocation_id="invocation",
        author="user",
        content=types.Content(role="user", parts=[types.Part(text=text)]),
        actions=EventActions(state_delta=delta or {}),
        **fields,
    )


async def fill(file: Path) -> None:
    clock = itertools.count(1)
    set_time_provider(lambda: T0 - 100 + next(clock))
    service = SqliteSessionService(str(file))
    shop = {"app_name": "shop", "user_id": "ann"}

    talk = await service.create_session(
        **shop, session_id="talk", state={"a": [1, None], "user:name": "Ann", "app:motd": "hi"}
    )
    for event in (
        said("e1", 1, "¿Qué? 😀", {"b": 0.1 + 0.2, "user:seen": 1, "temp:x": 1, "app:n": {"k": 1}}),
        said("e2", 2.000001, "NUL \0 inside", {"a": None}),
        said("z", 3.123456, delta={"big": 10**30, "float": 1e16}),
        said("y", 3.123456, "at the same time, and appended later"),
        said("x", 3.123456, "the same once more"),
        said("e3", 4, custom_metadata={"k": [1.5, None, {}]}, long_running_tool_ids={"t"}),
        Event(
            id="e4",
            timestamp=T0 + 5,
            author="agent",
            content=types.Content(
                role="model",
                parts=[
                    types.Part(inline_data=types.Blob(data=bytes(range(256)), mime_type="a/b")),
                    types.Part(function_call=types.FunctionCall(id="t", name="f", args={"x": 1})),
                ],
            ),
        ),
    ):
        await service.append_event(talk, event)

    back = await service.create_session(**shop, session_id="back in time")
    for event in (said("first", 50), said("second", 10), said("third", 10.5)):
        await service.append_event(back, event)

    await service.create_session(**shop, session_id="odd", state=ODD)
    await service.create_session(app_name="shop", user_id="Ann", session_id="talk")
    await service.create_session(app_name="quiet", user_id="ü" * 128, session_id="💬" * 128)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sessions.db"
        await fill(file)
        with closing(sqlite3.connect(file)) as conn:
            text = "\n".join(conn.iterdump())
    (Path(__file__).parent / "sessions.sql").write_text(text + "\n")


if __name__ == "__main__":
    asyncio.run(main())
