"""The contract kit, prepared for a run on every database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import workers

from adk_sessions.testing import SessionServiceContract

# the kit also goes through a pooler
BACKENDS = {**workers.BACKENDS, "pgbouncer": ("pgbouncer", {})}
SHARED = {**workers.SHARED, "pgbouncer": "pgbouncer_url"}


class OnEveryDatabase(SessionServiceContract):
    """The kit with two services on one database, once for each kind."""

    def make(self, url: str, **options: Any) -> Any:
        raise NotImplementedError

    @pytest.fixture(params=BACKENDS)
    def backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def new_service(
        self,
        backend: str,
        request: pytest.FixtureRequest,
        fresh_database: Callable[[str], str],
    ) -> Callable[[], Any]:
        kind, options = BACKENDS[backend]
        shared = SHARED.get(kind)
        url = request.getfixturevalue(shared) if shared else fresh_database(kind)
        if kind == "pgbouncer":
            url += "?pgbouncer=true"
        return lambda: self.make(url, **options)

    @pytest.fixture
    async def service(self, new_service: Callable[[], Any]) -> AsyncIterator[Any]:
        async with new_service() as service:
            yield service

    @pytest.fixture
    async def other_service(
        self, backend: str, service: Any, new_service: Callable[[], Any]
    ) -> AsyncIterator[Any]:
        if backend == "sqlite-memory":  # nobody else can reach it
            yield service
        else:
            async with new_service() as other:
                yield other
