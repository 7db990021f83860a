"""What every chat history must do, as tests: subclass `ChatPersistenceContract`, run pytest."""

from __future__ import annotations

import pytest

__all__ = ["ChatPersistenceContract"]


@pytest.mark.asyncio
class ChatPersistenceContract:
    """The contract of `adk_sessions.chat.ChatPersistence`."""
