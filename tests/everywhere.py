"""The contract kit, prepared for a run on every database."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import workers
from sqlalchemy import make_url

from adk_sessions.testing import SessionServiceContract

# the kit also goes through a pooler
BACKENDS = {**workers.BACKENDS, "pgbouncer": ("pgbouncer", {})}
SHARED = {**workers.SHARED, "pgbouncer": "pgbouncer_url"}


SOAK = os.environ.get("ADK_SESSIONS_SOAK") == "1"
# For what has tests of its own besides the kit: a pooler passes on the same statements, and SQLite
# takes the same ones in memory, so ADK_SESSIONS_SOAK=1 alone takes those ways too.
EVERY_DATABASE = [name for name in BACKENDS if SOAK or name not in ("pgbouncer", "sqlite-memory")]
# What stands for the whole kit where another class runs all of it on the same database.
REPRESENTATIVE = {
    "test_a_created_session_reads_back_equal",
    "test_ids_belong_to_their_user_and_session",
    "test_delete_keeps_the_wider_scopes",
    "test_state_is_seen_in_its_scope_only",
    "test_wider_scopes_need_no_session",
    "test_sessions_are_listed_by_user_or_app",
    "test_a_filter_leaves_state_complete",
    "test_every_field_of_an_event_comes_back",
    "test_nul_in_a_text_field_comes_back",
    "test_events_keep_the_order_of_appends",
    "test_event_timestamps_are_exact",
    "test_an_event_is_stored_once",
}
# Tables of values: what is refused before there is a statement, and what becomes JSON text.
TABLES = {
    "test_append_refuses_a_bad_event",
    "test_create_refuses_a_bad_id",
    "test_create_refuses_a_bad_state",
    "test_a_value_without_json_form_becomes_text",
    "test_a_warning_names_the_key_of_such_a_value",
    "test_rich_values_are_stored_as_json",
    "test_values_in_an_event_stay_the_same",
    "test_values_in_state_stay_the_same",
}
CASES = {name for name in dir(SessionServiceContract) if name.startswith("test_")}
assert CASES > REPRESENTATIVE | TABLES


def without(cases: set[str]) -> dict[str, None]:
    """For the body of a class: takes these cases out of it; ADK_SESSIONS_SOAK=1 leaves them in."""
    return {} if SOAK else dict.fromkeys(cases)


PART = without(CASES - REPRESENTATIVE)
NO_TABLES = without(TABLES)


def place_of(
    backend: str, request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> tuple[str, dict[str, Any]]:
    """The URL of one of `BACKENDS` and the service's options; servers' databases are shared.

    A file is the test's own, but migrated only once.
    """
    kind, options = BACKENDS[backend]
    shared = SHARED.get(kind)
    url = request.getfixturevalue(shared) if shared else fresh_database(kind)
    if kind == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_file"), make_url(url).database or "")
    return (f"{url}?pgbouncer=true" if kind == "pgbouncer" else url), options


class OnEveryDatabase(SessionServiceContract):
    """The kit with two services on one database, once for each kind of ``backend``."""

    def make(self, url: str, **options: Any) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def backend(self, request: pytest.FixtureRequest) -> str:
        raise NotImplementedError

    @pytest.fixture
    def new_service(
        self,
        backend: str,
        request: pytest.FixtureRequest,
        fresh_database: Callable[[str], str],
    ) -> Callable[[], Any]:
        url, options = place_of(backend, request, fresh_database)
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
