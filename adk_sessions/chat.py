"""A chat history on tables that the host application owns."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["ChatPersistence"]


class ChatPersistence:
    """A chat history on tables that the host application owns."""

    def __init__(self, engine: AsyncEngine, *, tables: Mapping[str, str] | None = None) -> None:
        raise NotImplementedError
