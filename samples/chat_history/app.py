"""A chat endpoint on tables of the application's own.

uvicorn app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from reply import reply
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from adk_sessions import DatabaseError, InvalidInputError
from adk_sessions.chat import ChatMessage, ChatPersistence, ChatSession, chat_models
from adk_sessions.url import create_engine

HERE = Path(__file__).parent
DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite:///{HERE}/chat_history.db")
SDK_VERSION = "offline 1"


class Base(DeclarativeBase):
    """The application's models; its alembic compares ``Base.metadata`` with the database."""


class Customer(Base):
    """A table that has nothing to do with chats."""

    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


TABLES = {"messages": "support_messages", "sessions": "support_sessions"}
chat_models(Base, **TABLES)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = create_engine(DATABASE_URL)  # any AsyncEngine does
    async with engine.begin() as conn:
        await conn.run_sync(Base.metadata.create_all)  # in production: alembic upgrade head
    app.state.chat = ChatPersistence(engine, tables=TABLES)
    await app.state.chat.validate_schema()
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


class Said(BaseModel):
    """What a user says. Sent again with the same message_id, it is answered and stored once."""

    text: str
    session_id: str
    user_id: str | None = None
    message_id: str = Field(default_factory=lambda: uuid4().hex)


@app.post("/threads/{thread_id}/messages")
async def post_message(thread_id: str, said: Said, request: Request) -> dict[str, Any]:
    """Answers, and stores what was said with the answer, both or neither."""
    chat: ChatPersistence = request.app.state.chat
    session = await chat.load_session(said.session_id)
    if session is None or not session.thread_id:  # archived before it was saved, it has none
        session = ChatSession(
            session_id=said.session_id, thread_id=thread_id, sdk_version=SDK_VERSION
        )
    elif session.thread_id != thread_id:
        raise HTTPException(409, "this session is of another thread")
    history = (await chat.list_messages(thread_id, said.session_id)).items
    own = (said.message_id, f"{said.message_id}-reply")  # there if this is a repetition
    earlier = [message for message in history if message.message_id not in own]
    text, state = reply(said.text, earlier, session.state or {})
    question = ChatMessage(
        thread_id=thread_id,
        message_id=said.message_id,
        role="user",
        parts=[{"type": "text", "text": said.text}],
        session_id=said.session_id,
        user_id=said.user_id,
    )
    answer = replace(
        question,
        message_id=own[1],
        role="assistant",
        parts=[{"type": "text", "text": text}],
        user_id=None,
    )
    await chat.save_messages([question, answer])
    await chat.save_session(replace(session, sdk_version=SDK_VERSION, state=state))
    return {"message_id": said.message_id, "reply": text}


@app.get("/threads/{thread_id}/messages")
async def get_messages(
    thread_id: str,
    request: Request,
    session_id: str | None = None,
    limit: int = 20,
    cursor: str | None = None,
) -> dict[str, Any]:
    """A page of a thread; ``next_cursor`` asks for the next one."""
    chat: ChatPersistence = request.app.state.chat
    page = await chat.list_messages(thread_id, session_id, limit=limit, cursor=cursor)
    messages = [asdict(message) for message in page.items]
    return {"messages": messages, "next_cursor": page.next_cursor}


@app.post("/sessions/{session_id}/archive", status_code=204)
async def archive(session_id: str, request: Request) -> None:
    """Takes a session's messages out of its thread's pages."""
    await request.app.state.chat.archive_session(session_id)


@app.post("/sessions/{session_id}/restore", status_code=204)
async def restore(session_id: str, request: Request) -> None:
    """Puts them back."""
    await request.app.state.chat.restore_session(session_id)


@app.exception_handler(InvalidInputError)
async def refused(_request: Request, error: InvalidInputError) -> JSONResponse:
    return JSONResponse({"field": error.field, "error": str(error)}, status_code=422)


@app.exception_handler(DatabaseError)
async def failed(_request: Request, error: DatabaseError) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=503 if error.retryable else 500)
