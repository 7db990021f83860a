"""One classification of what drivers raise: by SQLSTATE or error number, never by message text.

asyncpg's connection errors and time-outs are no SQLAlchemy errors, and most of its others are plain
DBAPIErrors, so class names of SQLAlchemy say little; the code says it all.
"""

from __future__ import annotations

import sqlite3
from enum import Enum

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ..errors import ConfigurationError, DatabaseError, OutcomeUnknownError


class Overtaken(Exception):
    """A row that this transaction has locked is not there to be written: its snapshot is older."""


class Undecided(Exception):
    """The answer to the COMMIT of what must not happen twice was lost.

    Args:
        error: the driver's.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Fault(Enum):
    """What an error says about the call that met it."""

    TAKEN = "a unique key is taken"
    CONFLICT = "another transaction was in the way: nothing happened, and again may work"
    UNAVAILABLE = "the server is not ready: nothing happened, and later may work"
    LOST = "the connection broke: it may or may not have happened"
    FATAL = "nothing happened, and the same again will fail"


_CONFLICT: set[str | int] = {
    # PostgreSQL: serialization failure, deadlock, lock not had in time
    *("40001", "40P01", "55P03"),
    # MySQL and MariaDB: deadlock (Galera: at COMMIT), lock wait time-out, row changed since the
    # snapshot
    *(1213, 1205, 1020),
}
_UNAVAILABLE: set[str | int] = {
    # PostgreSQL: starting up, too many connections, a standby (a pooled connection to what was
    # the primary)
    *("57P03", "53300", "25006"),
    # MySQL and MariaDB: node not ready, too many connections, cannot connect, a replica or a
    # server that is about to become one (a pooled connection to what was the primary)
    *(1047, 1040, 2002, 2003, 1290, 1836),
}
# Of those, what another connection may find better: to a host that has taken over meanwhile.
_ELSEWHERE: set[str | int] = {"25006", 1047, 1290, 1836}
_LOST: set[str | int] = {
    # PostgreSQL: shut down or terminated by an administrator, crashed, idle time-outs
    *("57P01", "57P02", "57P05", "25P03"),
    # MySQL and MariaDB: server gone, lost in the middle of a query, killed, shutting down,
    # Galera's replication stalled
    *(2006, 2013, 2055, 1927, 1053, 1180),
}
_TAKEN: set[str | int] = {
    *("23505", 1062, 1586),
    *(sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE),
}
_SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

# What asyncpg raises for an answer that it had not asked for: a server's farewell that crosses a
# request.
_CONFUSED = "InternalClientError"

_POOLER = "a pooler in transaction mode is in between: add ?pgbouncer=true to the URL"
_MISSING = (
    "a table or column is missing: run adk-sessions upgrade, or what else makes these tables; a"
    " service's validate_schema() says which"
)
_WHO = (
    "the user or the password is wrong; check both in the URL, where @ : / ? # % in them are"
    " percent-encoded"
)
_HINTS: dict[str | int, str] = {
    "42P05": _POOLER,
    "26000": _POOLER,
    "08P01": f"a pooler refuses this user, password or database (check the URL), or {_POOLER}",
    "28P01": _WHO,
    "28000": "this role may not connect, or does not exist; check the user in the URL",
    "3D000": "the database does not exist: create it first",
    "42P01": _MISSING,
    "42703": _MISSING,
    "42501": (
        "this role lacks a privilege on a table or schema, which its owner can GRANT, or a policy"
        " keeps the row from it"
    ),
    "53100": "the server's disk is full",
    "25006": "the server, the database or the role is read-only",
    1044: "this user may not use the database, or it does not exist; GRANT it, or check the name",
    **dict.fromkeys((1045, 1698), _WHO),
    1049: "the database does not exist: create it first",
    **dict.fromkeys((1021, 1114), "the server's disk is full"),
    **dict.fromkeys((1290, 1836), "the server is read-only"),
    **dict.fromkeys(
        (2002, 2003), "no server answers there; check host and port, and the way there"
    ),
    1142: "this user lacks a privilege on a table: GRANT it",
    **dict.fromkeys(
        ("42P22", 1267),
        "two columns that are compared have different ones: give them one collation",
    ),
    1146: _MISSING,
    1054: _MISSING,
    # the one code for all that a statement can get wrong, and ours are not wrong by themselves
    sqlite3.SQLITE_ERROR: f"perhaps {_MISSING}",
    sqlite3.SQLITE_BUSY: "another process held the file locked for too long",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "the file cannot be written",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened",
    sqlite3.SQLITE_NOTADB: "the file is not an SQLite database",
}

# Where it is open if something was written.
_REPEAT = "the call may or may not be stored; repeat it with the same id"
_LOOK = "the change may or may not be stored; read the state to find out"

# Where there is no code, the class of the error says it.
_NAME_HINTS = {
    "ConnectionRefusedError": (
        "nothing listens there; check host and port, and that the server runs"
    ),
    "gaierror": "the host's name has no address; check it",
    "ConnectionError": "the server refused TLS, which sslmode asks for, or is no PostgreSQL",
    "SSLError": "the server offers no TLS, or one that cannot be trusted",
    "SSLCertVerificationError": "the server's certificate cannot be trusted; check sslrootcert",
    "OSError": "there is no way to the server; check host and port",
    "TimeoutError": "no answer in time; check host and port, and the way there",
    "FileNotFoundError": "there is no such socket, as while a server restarts, or no such folder",
    "PermissionError": "the file or its folder may not be written",
    "NotADirectoryError": "the folder of the file cannot be made",
    "UnicodeEncodeError": "its character set lacks a character of this call; give it utf8mb4",
    "TargetServerAttributeNotMatched": (
        "no host can be written to, or is what target_session_attrs asks for"
    ),
}


def classify(error: BaseException) -> Fault:
    """What an error of a driver or of SQLAlchemy means for the call that met it."""
    if isinstance(error, Overtaken):
        return Fault.CONFLICT
    if isinstance(error, PoolTimeoutError):
        return Fault.FATAL  # has waited for pool_timeout already
    if isinstance(error, PermissionError | NotADirectoryError):
        return Fault.FATAL
    if isinstance(error, OSError | TimeoutError):
        return Fault.LOST
    code = code_of(error)
    name = type(_driver_error(error)).__name__
    if isinstance(error, IntegrityError):
        # a database that is not known here gives no code; a key is the likeliest reason
        return Fault.TAKEN if code is None or code in _TAKEN else Fault.FATAL
    if _is_sqlite(error):
        return Fault.CONFLICT if code in _SQLITE_BUSY else Fault.FATAL
    if code in _CONFLICT or name == "InvalidCachedStatementError":  # a table altered meanwhile
        return Fault.CONFLICT
    if code in _UNAVAILABLE:
        return Fault.UNAVAILABLE
    if (
        getattr(error, "connection_invalidated", False)
        or code in _LOST
        or (isinstance(code, str) and code.startswith("08"))
        or isinstance(_driver_error(error), OSError | TimeoutError)
        or name == _CONFUSED
    ):
        return Fault.LOST
    return Fault.FATAL


def is_lost(error: BaseException) -> bool:
    """Whether an error leaves it open if the statement that met it has happened."""
    return classify(error) is Fault.LOST


def must_invalidate(error: BaseException) -> bool:
    """Whether the connection is of no further use though the driver thinks it is."""
    if not isinstance(error, DBAPIError):
        return False
    return code_of(error) in _ELSEWHERE or type(_driver_error(error)).__name__ == _CONFUSED


def translate(
    error: Exception,
    *,
    unknown: bool,
    once: bool = False,
) -> DatabaseError | ConfigurationError:
    """The store's own error for one of a driver or of SQLAlchemy, with nothing of its text.

    Args:
        error: what was raised.
        unknown: whether it is open if something was written.
        once: whether that must not be written twice.
    """
    fault = classify(error)
    code = code_of(error)
    name = type(_driver_error(error)).__name__
    if isinstance(error, PoolTimeoutError):
        return DatabaseError(
            "No connection of the pool became free in time. Raise pool_size, max_overflow or"
            " pool_timeout.",
            retryable=True,
            driver_error=name,
        )
    if isinstance(error, ImportError):
        return ConfigurationError(f"A package of the database driver is missing: {error.name}.")
    what = name if code is None else f"{name}, {code}"
    advice = _NAME_HINTS.get(name) or (_HINTS.get(code) if code is not None else None)
    kind = DatabaseError
    message = f"The database refused the call ({what})"
    if fault is Fault.LOST or name in _NAME_HINTS or code in (2002, 2003):
        message = f"The connection to the database failed ({what})"
    retryable = fault not in (Fault.FATAL, Fault.TAKEN)
    if unknown:
        kind, retryable = OutcomeUnknownError, not once
        advice = _REPEAT if retryable else _LOOK
    message += f": {advice}." if advice else "."
    return kind(message, retryable=retryable, code=code, driver_error=name)


def is_database_error(error: BaseException) -> bool:
    """Whether `translate` is meant for this error; others are bugs and go through."""
    if isinstance(error, UnicodeEncodeError):  # which carries the whole statement
        return True
    # SQLAlchemy 2.0 lets asyncpg's own errors through when it connects
    return isinstance(
        error, Overtaken | SQLAlchemyError | OSError | TimeoutError | ImportError | sqlite3.Error
    ) or type(error).__module__.startswith(("asyncpg", "asyncmy"))


def code_of(error: BaseException) -> str | int | None:
    """The SQLSTATE, or the number of the error in MySQL, MariaDB and SQLite."""
    original = getattr(error, "orig", None) or error
    if isinstance(original, sqlite3.Error):
        number: int | None = getattr(original, "sqlite_errorcode", None)
        if number is None or isinstance(original, sqlite3.IntegrityError):
            return number  # only the extended code tells which constraint
        return number & 0xFF
    # MySQL's number first: many of its errors share the state HY000
    first = original.args[0] if getattr(original, "args", None) else None
    if isinstance(first, int) and not isinstance(original, OSError):
        return first
    state = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return state if isinstance(state, str) else None


def _driver_error(error: BaseException) -> BaseException:
    original = getattr(error, "orig", None)
    # asyncpg's own error is behind the one that SQLAlchemy makes of it
    return getattr(original, "__cause__", None) or original or error


def _is_sqlite(error: BaseException) -> bool:
    return isinstance(getattr(error, "orig", None), sqlite3.Error)
