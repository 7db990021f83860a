"""Where an agent would be: an answer made by rules, without a network."""

import re
from typing import Any

from adk_sessions.chat import ChatMessage


def reply(
    text: str, history: list[ChatMessage], state: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Answers a message.

    Args:
        text: what the user says.
        history: the session's messages before it, the oldest first.
        state: what the session knows of the user.

    Returns:
        The answer, and what the session knows now.
    """
    number = 1 + sum(message.role == "user" for message in history)
    if told := re.search(r"my name is (\w+)", text, re.IGNORECASE):
        return f"Nice to meet you, {told[1]}. This is message {number}.", {"name": told[1]}
    name = state.get("name", "stranger")
    return f"Yes, {name}. This is message {number}.", state
