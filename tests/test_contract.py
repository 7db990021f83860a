"""The contract kit on the store's own types, on every database.

All of it on each kind of database. What else leads there has the same tables, so values are not
repeated on the generic path; a pooler passes on the same statements and SQLite takes the same ones
in memory, so they take a part. ADK_SESSIONS_SOAK=1 runs all of it on all.
"""

from __future__ import annotations

from typing import Any

import pytest
from everywhere import NO_TABLES, PART, OnEveryDatabase

from adk_sessions import SessionService


class OwnTypes(OnEveryDatabase):
    def make(self, url: str, **options: Any) -> Any:
        return SessionService(url, **options)


class TestSessionService(OwnTypes):
    @pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
    def backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


class TestTheGenericPath(OwnTypes):
    locals().update(NO_TABLES)

    @pytest.fixture
    def backend(self) -> str:
        return "generic"


class TestOtherWays(OwnTypes):
    locals().update(PART)

    @pytest.fixture(params=["sqlite-memory", "pgbouncer"])
    def backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)
