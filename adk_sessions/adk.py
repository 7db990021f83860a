"""The store as google-adk's session service: change one import.

    from adk_sessions.adk import DatabaseSessionService

It works on the tables that google-adk's own DatabaseSessionService makes, with google-adk's
sessions and events, and raises errors that are google-adk's as well as this package's.
"""

from __future__ import annotations

from typing import Any

try:
    import google.adk  # noqa: F401
except ImportError as missing:
    raise ImportError(
        "adk_sessions.adk needs google-adk: pip install 'adk-sessions[adk]'"
    ) from missing
from google.adk.errors import already_exists_error, session_not_found_error
from google.adk.errors._stale_session_error import StaleSessionError as AdkStaleSessionError
from google.adk.events.event import Event
from google.adk.platform import time as platform_time
from google.adk.platform import uuid as platform_uuid
from google.adk.sessions.base_session_service import BaseSessionService, ListSessionsResponse
from google.adk.sessions.session import Session
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from . import errors
from .lean import Rules
from .service import Store

__all__ = [
    "AlreadyExistsError",
    "DatabaseSessionService",
    "SessionNotFoundError",
    "StaleSessionError",
]


# The options that a service has on an engine too.
_STORE = {
    *("backend", "lean_validation", "on_bad_event", "on_stale", "retry_window"),
    *("migrate", "notify", "row_level_security", "schema", "table_prefix", "tables"),
    *("pooler", "read_engine", "read_url", "statement_timeout"),
}


class AlreadyExistsError(errors.AlreadyExistsError, already_exists_error.AlreadyExistsError):
    __doc__ = errors.AlreadyExistsError.__doc__


class SessionNotFoundError(
    errors.SessionNotFoundError, session_not_found_error.SessionNotFoundError
):
    __doc__ = errors.SessionNotFoundError.__doc__


class StaleSessionError(errors.StaleSessionError, AdkStaleSessionError):
    __doc__ = errors.StaleSessionError.__doc__


class DatabaseSessionService(Store[Session, Event], BaseSessionService):
    """A drop-in for ``google.adk.sessions.DatabaseSessionService``.

    Args:
        db_url: a database URL as people paste it, see `adk_sessions.Store`.
        db_engine: an engine of the application's, which `close` leaves open. Exactly one of
            ``db_url``, ``db_engine`` and ``uri``.
        uri: another name for ``db_url``: google-adk's service registry passes it.
        agents_dir: ignored; google-adk's service registry passes it.
        options: those of `adk_sessions.Store`, and of
            ``sqlalchemy.ext.asyncio.create_async_engine``; the latter are ignored with an engine.

    Raises:
        ConfigurationError: as `adk_sessions.Store`; a ValueError.
    """

    session_type = Session
    event_type = Event
    list_type = ListSessionsResponse
    already_exists = AlreadyExistsError
    not_found = SessionNotFoundError
    stale = StaleSessionError
    lean_rules = Rules(
        validators=frozenset(
            {
                "google.genai._common.BaseModel._check_field_type_mismatches",
                "google.adk.events.event.Event._accept_convenience_kwargs",
            }
        ),
        initialisers=frozenset({"google.genai.types.Part"}),
        shorthand=frozenset({"message", "state", "route", "node_path"}),
    )

    def __init__(
        self,
        db_url: str | URL | None = None,
        db_engine: AsyncEngine | None = None,
        *,
        uri: str | None = None,
        agents_dir: str | None = None,
        **options: Any,
    ) -> None:
        if sum(given is not None for given in (db_url, db_engine, uri)) != 1:
            raise errors.ConfigurationError(
                "Exactly one of 'db_url' or 'db_engine' must be provided."
            )
        if db_engine is not None:
            # google-adk ignores options with an engine
            options = {name: options[name] for name in _STORE & options.keys()}
        super().__init__(db_url if uri is None else uri, engine=db_engine, **options)

    @property
    def db_engine(self) -> AsyncEngine:
        """The engine, for statements of the application's own on the same database."""
        return self._database.engine

    def _commit(self, session: Session, event: Event) -> None:
        # the base class's own steps, so that what a subclass makes of them still happens, once
        self._apply_temp_state(session, event)
        self._commit_event_to_session(session, self._trim_temp_delta_state(event))

    def _new_id(self) -> str:
        return platform_uuid.new_uuid()

    def _now(self) -> float:
        return platform_time.get_time()
