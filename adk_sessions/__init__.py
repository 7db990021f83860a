"""Sessions, events and state of conversational agents in any SQL database."""

from .errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConversionRefusedError,
    DatabaseError,
    EventConflictError,
    InvalidInputError,
    MigrationLockError,
    OutcomeUnknownError,
    SchemaError,
    SessionNotFoundError,
    SessionStoreError,
    StaleSessionError,
    UnreadableEventError,
)
from .service import SessionService, Store
from .session import Event, EventActions, GetSessionConfig, ListSessionsResponse, Session

__all__ = [
    "AlreadyExistsError",
    "ConfigurationError",
    "ConversionRefusedError",
    "DatabaseError",
    "Event",
    "EventActions",
    "EventConflictError",
    "GetSessionConfig",
    "InvalidInputError",
    "ListSessionsResponse",
    "MigrationLockError",
    "OutcomeUnknownError",
    "SchemaError",
    "Session",
    "SessionNotFoundError",
    "SessionService",
    "SessionStoreError",
    "StaleSessionError",
    "Store",
    "UnreadableEventError",
]
