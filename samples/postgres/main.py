"""A conversation that PostgreSQL keeps: run it twice. POSTGRES_URL may come from .env."""

import asyncio
import os
import sys
from pathlib import Path

from dotenv import load_dotenv
from google.adk.runners import Runner
from google.genai import types

from adk_sessions.adk import DatabaseSessionService

# Before the agent is imported: it looks for an API key.
load_dotenv(Path(__file__).with_name(".env"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # `adk run` finds agents by their folder too
from postgres.agent import root_agent  # noqa: E402

# The names that `adk web` uses, so it shows this session too.
APP, USER, SESSION = "postgres", "user", "trip"


async def main(url: str) -> None:
    sessions = DatabaseSessionService(
        url,
        pool_size=5,  # connections that are kept open
        max_overflow=10,  # more of them under load
        pool_timeout=30,  # seconds to wait for a free one
        pool_recycle=1800,  # seconds after which one is replaced
    )
    async with sessions:
        key = {"app_name": APP, "user_id": USER, "session_id": SESSION}
        session = await sessions.get_session(**key)
        if session:
            print(f"Continuing a session of {len(session.events)} events.")
            messages = ["Hello, I am back.", "Which trip did I plan?"]
        else:
            await sessions.create_session(**key)
            print("Starting a session.")
            messages = ["Hello! My name is Grace and my city is Lisbon.", "Is it noted?"]

        runner = Runner(app_name=APP, agent=root_agent, session_service=sessions)
        for text in messages:
            message = types.UserContent(text)
            turn = runner.run_async(user_id=USER, session_id=SESSION, new_message=message)
            async for _ in turn:
                pass  # everything is in the database, which is asked below

        session = await sessions.get_session(**key)
        print(f"Session {session.id!r} of user {session.user_id!r}, as PostgreSQL has it:")
        for event in session.events:
            for part in event.content.parts if event.content else []:
                print(f"  {event.author:>11}: {part.text or describe(part)}")
        print(f"  state: {session.state}")


def describe(part: types.Part) -> str:
    if call := part.function_call:
        return f"{call.name}({call.args})"
    return f"-> {part.function_response.response}" if part.function_response else "..."


if __name__ == "__main__":
    if "POSTGRES_URL" not in os.environ:
        sys.exit("POSTGRES_URL is not set. Copy .env.example to .env, or export it.")
    asyncio.run(main(os.environ["POSTGRES_URL"]))
