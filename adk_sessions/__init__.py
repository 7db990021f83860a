"""Sessions, events and state of conversational agents in any SQL database."""

from .errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConversionRefusedError,
    DatabaseError,
    EventConflictError,
    EventNotFoundError,
    InvalidInputError,
    MigrationLockError,
    OutcomeUnknownError,
    SchemaError,
    SessionArchivedError,
    SessionNotFoundError,
    SessionStoreError,
    StaleSessionError,
    StateUnknownError,
    UnreadableEventError,
)
from .lifecycle import ErasureReport
from .retention import PruneReport
from .service import SessionService, Store
from .session import (
    Event,
    EventActions,
    GetSessionConfig,
    ListSessionsResponse,
    Page,
    Session,
    SessionSummary,
)

__all__ = [
    "AlreadyExistsError",
    "ConfigurationError",
    "ConversionRefusedError",
    "DatabaseError",
    "ErasureReport",
    "Event",
    "EventActions",
    "EventConflictError",
    "EventNotFoundError",
    "GetSessionConfig",
    "InvalidInputError",
    "ListSessionsResponse",
    "MigrationLockError",
    "OutcomeUnknownError",
    "Page",
    "PruneReport",
    "SchemaError",
    "Session",
    "SessionArchivedError",
    "SessionNotFoundError",
    "SessionService",
    "SessionStoreError",
    "SessionSummary",
    "StaleSessionError",
    "StateUnknownError",
    "Store",
    "UnreadableEventError",
]
