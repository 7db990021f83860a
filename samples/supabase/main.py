"""One user's conversation in a hosted PostgreSQL, through its pooler and with a role of the user's.

python main.py ann "Hello!"        says something, and shows all that was said
python main.py ann --peek bob      tries with ann's role to get at what is bob's
"""

import asyncio
import os
import sys

from sqlalchemy import literal_column, select, table, text

from adk_sessions import DatabaseError, Event, SessionService
from adk_sessions.url import create_engine

APP = "shop"
SCHEMA = "agents"


def open_service(url: str) -> SessionService:
    # migrate="check" is the default behind a pooler: this role could make no tables anyway
    return SessionService(url, schema=SCHEMA, pooler="transaction", row_level_security=True)


async def say(url: str, user: str, words: str) -> None:
    key = {"app_name": APP, "user_id": user, "session_id": "chat"}
    async with open_service(url) as service:
        session = await service.get_session(**key) or await service.create_session(**key)
        await service.append_event(session, Event(author=user, content=words))
        session = await service.get_session(**key)
        print(f"{user} has a session of {len(session.events)} events:")
        for event in session.events:
            print(f"  {event.author}: {event.content}")


async def peek(url: str, user: str, other: str) -> None:
    key = {"app_name": APP, "user_id": other, "session_id": "chat"}
    async with open_service(url) as service:
        found = await service.get_session(**key)
        listed = await service.list_sessions(app_name=APP, user_id=other)
        print(f"{user} asks for {other}'s session: {found}, and for a list: {listed.sessions}")
        try:
            await service.create_session(app_name=APP, user_id=other)
        except DatabaseError as error:
            print(f"{user} makes a session for {other}: {error}")

    # nothing keeps who has the role's password from statements of their own
    engine = create_engine(url, connect_args={"statement_cache_size": 0})
    settings = text(
        "SELECT set_config('adk_sessions.app_name', :app, true),"
        " set_config('adk_sessions.user_id', :user, true)"
    )
    async with engine.begin() as conn:
        await conn.execute(settings, {"app": APP, "user": other})
        for name in ("sessions", "events", "state_changes", "user_states"):
            found = await conn.execute(
                select(literal_column("*")).select_from(table(name, schema=SCHEMA))
            )
            print(f"{user} says SET user_id = {other}, and reads {name}: {len(found.all())} rows")
    await engine.dispose()


if __name__ == "__main__":
    if "DATABASE_URL" not in os.environ:
        sys.exit("DATABASE_URL is not set: the pooler's URL, with the role of the user.")
    match sys.argv[1:]:
        case [user, "--peek", other]:
            asyncio.run(peek(os.environ["DATABASE_URL"], user, other))
        case [user, words]:
            asyncio.run(say(os.environ["DATABASE_URL"], user, words))
        case _:
            sys.exit(__doc__)
