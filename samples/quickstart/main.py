"""A conversation that goes on in the next process.

python main.py                   run it twice
python main.py "Who am I?"       or say something of your own
"""

import asyncio
import os
import sys
from pathlib import Path

from google.adk.runners import Runner
from google.genai import types

from adk_sessions.adk import DatabaseSessionService

sys.path.insert(0, str(Path(__file__).parents[1]))  # `adk run` finds agents by their folder too
from quickstart.agent import root_agent

DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite:///{Path(__file__).parent}/quickstart.db")
SESSION = {"app_name": "quickstart", "user_id": "ada", "session_id": "first-chat"}

FIRST_RUN = ["Hello! My name is Ada and my topic is sailing.", "Did you get that?"]
LATER_RUN = ["Hello, it is me again.", "And do you know where we were?"]


async def main() -> None:
    async with DatabaseSessionService(DATABASE_URL) as sessions:
        session = await sessions.get_session(**SESSION)
        if session is None:
            print(f"Process {os.getpid()} finds no session and begins one.")
            session = await sessions.create_session(**SESSION)
            messages = FIRST_RUN
        else:
            found = len(session.events)
            print(f"Process {os.getpid()} finds the session of an earlier one: {found} events.")
            messages = LATER_RUN

        runner = Runner(app_name=SESSION["app_name"], agent=root_agent, session_service=sessions)
        for message in sys.argv[1:] or messages:
            await say(runner, message)

        session = await sessions.get_session(**SESSION)
        print(f"  stored: {len(session.events)} events, and state of app, session and user:")
        for key, value in sorted(session.state.items()):
            print(f"          {key} = {value!r}")


async def say(runner: Runner, text: str) -> None:
    print(f"  user:  {text}")
    async for event in runner.run_async(
        user_id=SESSION["user_id"],
        session_id=SESSION["session_id"],
        new_message=types.UserContent(text),
    ):
        if event.is_final_response() and event.content:
            print(f"  agent: {event.content.parts[0].text}")


if __name__ == "__main__":
    asyncio.run(main())
