"""What can go wrong, and what to do about it.

    SessionStoreError
    ├── ConfigurationError (ValueError)      a URL, an option or a driver package is wrong
    ├── InvalidInputError (ValueError)       an argument is refused, nothing was written: .field
    ├── AlreadyExistsError                   a session with this id is there already
    ├── SessionNotFoundError (ValueError)    append to a session that is not stored
    ├── SessionArchivedError                 append to a session that is archived: restore it first
    ├── StaleSessionError (ValueError)       somebody else appended meanwhile: reload, then repeat
    ├── EventConflictError                   this event id is stored with other content
    ├── EventNotFoundError (ValueError)      an event that was named is not in the session
    ├── StateUnknownError                    what the state was at an event is not recorded
    ├── SchemaError                          the tables are not what this release works with
    │   ├── MigrationLockError               another process held the migration lock for too long
    │   └── ConversionRefusedError           rows of an old layout are not sound: .rows .more
    └── DatabaseError                        the database or the way to it failed:
        │                                    .retryable .code .driver_error
        ├── UnreadableEventError             one stored event is damaged, or too new:
        │                                    .app_name .user_id .session_id .event_id
        └── OutcomeUnknownError              the connection broke while a commit was under way

A class's docstring is its default message. No message carries a password, a connection URL's query
values or anything that a user has stored, and a driver's own error is never chained: its text
quotes rows.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AlreadyExistsError",
    "ConfigurationError",
    "ConversionRefusedError",
    "DatabaseError",
    "EventConflictError",
    "EventNotFoundError",
    "InvalidInputError",
    "MigrationLockError",
    "OutcomeUnknownError",
    "SchemaError",
    "SessionArchivedError",
    "SessionNotFoundError",
    "SessionStoreError",
    "StaleSessionError",
    "StateUnknownError",
    "UnreadableEventError",
]


# Of the rows that a conversion refuses, so many are in the message.
_SHOWN = 20


class SessionStoreError(Exception):
    """The session store failed."""

    def __init__(self, message: str | None = None) -> None:
        if message is None:
            message, _, _ = (type(self).__doc__ or "").strip().partition("\n\n")
        super().__init__(message)


class ConfigurationError(SessionStoreError, ValueError):
    """The service cannot be built from these arguments."""


class InvalidInputError(SessionStoreError, ValueError):
    """An argument is not acceptable; nothing was written.

    Attributes:
        field: name of the argument or field that was refused, for example ``session_id``.
    """

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class AlreadyExistsError(SessionStoreError):
    """A session with this id already exists. Choose another id, or get the existing session."""


class SessionNotFoundError(SessionStoreError, ValueError):
    """Session not found. Create it before appending to it."""


class SessionArchivedError(SessionStoreError):
    """The session is archived: nothing is appended to it. Call restore_session first."""


class StaleSessionError(SessionStoreError, ValueError):
    """The session has been modified in storage since it was loaded, or was not loaded from there. Reload it with get_session and append again, or append with on_stale='refresh' where nothing hangs on what was missed."""  # noqa: E501


class EventConflictError(SessionStoreError):
    """An event with this id is already stored in the session, with other content (its timestamp counts). Give each event an id of its own."""  # noqa: E501


class EventNotFoundError(SessionStoreError, ValueError):
    """The session has no such event, or no longer has it."""


class StateUnknownError(SessionStoreError):
    """What the session's state was at this event is not recorded, and cannot be told from the events: other software or an older release has made the session, or changed its state. A later event may do."""  # noqa: E501


class SchemaError(SessionStoreError):
    """The tables in this database are not what this release works with."""


class MigrationLockError(SchemaError):
    """Another process has been migrating this database, or holding its tables, for too long. Look for a migration that hangs or a transaction that is idle, then try again."""  # noqa: E501


class ConversionRefusedError(SchemaError):
    """Rows cannot be converted as they are; nothing was replaced.

    Attributes:
        rows: the first thousand of them, each a `convert.Refused`.
        more: how many more there are.
    """

    def __init__(self, rows: tuple[Any, ...], more: int = 0) -> None:
        self.rows, self.more = rows, more
        lines = [
            f"  {r.app_name!r} {r.user_id!r} {r.session_id!r} {r.event_id!r}: {r.reason}"
            for r in rows[:_SHOWN]
        ]
        if (rest := len(rows) + more - _SHOWN) > 0:
            lines.append(f"  and {rest} more")
        super().__init__(
            f"{len(rows) + more} rows cannot be converted (app, user, session, event); nothing was"
            " replaced. Mend them, or convert them without what is refused in them:\n"
            + "\n".join(lines)
        )


class DatabaseError(SessionStoreError):
    """The database refused a statement or could not be reached.

    Attributes:
        retryable: whether the same call may be repeated as it is and has a chance to succeed.
        code: the SQLSTATE (five characters) or the server's error number, None if there is none.
        driver_error: class name of the driver's error, for example ``DeadlockDetectedError``.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        retryable: bool = False,
        code: str | int | None = None,
        driver_error: str | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.code = code
        self.driver_error = driver_error


class UnreadableEventError(DatabaseError):
    """A stored event is damaged, or was written by newer software. Read the session without it with on_bad_event='placeholder'; adk-sessions doctor lists all such events.

    Attributes:
        app_name, user_id, session_id, event_id: which one.
    """  # noqa: E501

    def __init__(
        self,
        message: str | None = None,
        *,
        app_name: str = "",
        user_id: str = "",
        session_id: str = "",
        event_id: str = "",
    ) -> None:
        super().__init__(message)
        self.app_name = app_name
        self.user_id = user_id
        self.session_id = session_id
        self.event_id = event_id


class OutcomeUnknownError(DatabaseError):
    """The connection broke while the call was being committed: it may or may not be stored. Repeat an append or a create with the same id, read a state that was to be changed."""  # noqa: E501

    @classmethod
    def after(cls, error: DatabaseError) -> OutcomeUnknownError:
        """For a call that may be stored, when an error keeps it from being looked up."""
        return cls(retryable=True, code=error.code, driver_error=error.driver_error)
