"""The contract kit on the store's own types, on every database."""

from __future__ import annotations

from typing import Any

from everywhere import OnEveryDatabase

from adk_sessions import SessionService


class TestSessionService(OnEveryDatabase):
    def make(self, url: str, **options: Any) -> Any:
        return SessionService(url, **options)
