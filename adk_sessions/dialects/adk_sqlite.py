"""Files of google-adk's SqliteSessionService: how they are told from others, and read.

Its four tables have the names of the store's, but times are REAL seconds since the epoch, in
columns that are declared so. That is how such a file is known.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from sqlalchemy import Connection

from ..errors import DatabaseError, InvalidInputError, SchemaError
from .reads import Tables
from .rows import Key
from .sqlite import BUSY_TIMEOUT, SQLiteDatabase

T = TypeVar("T")

_KEYS = {"app_name": "TEXT", "user_id": "TEXT"}
_TABLES = {
    "sessions": _KEYS | {"id": "TEXT", "state": "TEXT", "create_time": "REAL"},
    "events": _KEYS
    | {"id": "TEXT", "session_id": "TEXT", "invocation_id": "TEXT"}
    | {"timestamp": "REAL", "event_data": "TEXT"},
    "app_states": {"app_name": "TEXT", "state": "TEXT", "update_time": "REAL"},
    "user_states": _KEYS | {"state": "TEXT", "update_time": "REAL"},
}
_TABLES["sessions"]["update_time"] = "REAL"

_HALF_WRITTEN = (
    "was left in the middle of a write, or its folder cannot be written. Open it once with what"
    " wrote it, or copy it to another folder together with the files beside it that end in -wal or"
    " -journal, and open the copy"
)


def is_adk_sqlite(conn: Connection, tables: Tables | None = None) -> bool:
    """Whether a database is a file of SqliteSessionService.

    Args:
        conn: of any dialect.
        tables: the store's; with names of their own they are not in that file's way.
    """
    if conn.dialect.name != "sqlite":
        return False
    sessions, events = (
        ("sessions", "events") if tables is None else (tables.sessions.name, tables.events.name)
    )
    if (sessions, events) != ("sessions", "events"):
        return False
    return all(
        _has_columns(conn.exec_driver_sql(f"PRAGMA table_info({name})").all(), name)
        for name in ("sessions", "events")
    )


def _has_columns(found: Iterable[Any], table: str) -> bool:
    return _TABLES[table].items() <= {row[1]: row[2].upper() for row in found}.items()


def file_of(database: Any) -> Path | None:
    """The file behind a `Database`, None if there is none, or none that can be named."""
    url = database.url if isinstance(database, SQLiteDatabase) else database.engine.url
    if url.get_backend_name() != "sqlite" or url.query.get("mode") == "memory":
        return None
    name = url.database or ""
    if name.startswith("file:"):
        name = unquote(urlsplit(name).path)
    return Path(name) if name and name != ":memory:" else None


def refuse_itself(database: Any, file: Path) -> None:
    """Refuses to read from the file that is written to.

    Raises:
        InvalidInputError: the database is that file, perhaps by another name.
    """
    target = file_of(database)
    if target is not None and target.exists() and file.exists() and os.path.samefile(target, file):
        raise InvalidInputError(f"{file} cannot be imported into itself", field="file")


class Source:
    """One snapshot of a file, on a thread of its own; made by `open_source`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adk_sessions-import")
        self._conn: sqlite3.Connection | None = None

    async def counted(self) -> int:
        """How many sessions there are."""
        return int((await self._fetch("SELECT count(*) FROM sessions"))[0][0])

    def app_states(self) -> AsyncIterator[tuple[Any, ...]]:
        """app_name, state, update_time of each."""
        return self._rows("SELECT app_name, state, update_time FROM app_states ORDER BY 1")

    def user_states(self) -> AsyncIterator[tuple[Any, ...]]:
        """app_name, user_id, state, update_time of each."""
        return self._rows(
            "SELECT app_name, user_id, state, update_time FROM user_states ORDER BY 1, 2"
        )

    def sessions(self) -> AsyncIterator[tuple[Any, ...]]:
        """app_name, user_id, id, state, create_time, update_time of each."""
        return self._rows(
            "SELECT app_name, user_id, id, state, create_time, update_time FROM sessions"
            " ORDER BY 1, 2, 3"
        )

    async def events(self, key: Key) -> list[tuple[Any, ...]]:
        """id, invocation_id, timestamp, event_data of a session's events, as they are read there:
        by timestamp, and equal ones in the order of their append."""
        return await self._fetch(
            "SELECT id, invocation_id, timestamp, event_data FROM events"
            " WHERE app_name = ? AND user_id = ? AND session_id = ? ORDER BY timestamp, rowid",
            key,
        )

    async def connect(self) -> None:
        """Opens the file and starts the snapshot."""
        if not self.file.is_file():
            raise InvalidInputError(f"There is no file {self.file}", field="file")
        await self._call(self._connect)

    async def close(self) -> None:
        """Waits for what is being read, and closes the file."""
        await self._call(lambda: self._conn.close() if self._conn else None)
        self._thread.shutdown(wait=False)

    def _connect(self) -> None:
        conn = self._conn = sqlite3.connect(
            f"{self.file.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
        )
        # a text that is not UTF-8 is refused by whoever knows which row it is in
        conn.text_factory = lambda data: data.decode(errors="surrogateescape")
        conn.execute("PRAGMA trusted_schema = OFF")
        conn.execute("BEGIN")
        for table in _TABLES:
            if not _has_columns(conn.execute(f"PRAGMA table_info({table})").fetchall(), table):
                raise SchemaError(
                    f"{self.file} is not a file of google-adk's SqliteSessionService: it has no"
                    f" table {table} with the columns of one. A file of its DatabaseSessionService"
                    " needs no import: give it as the database."
                )

    async def _fetch(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        return await self._call(lambda: self._open.execute(sql, parameters).fetchall())

    async def _rows(self, sql: str) -> AsyncIterator[tuple[Any, ...]]:
        cursor = await self._call(lambda: self._open.execute(sql))
        while (row := await self._call(cursor.fetchone)) is not None:
            yield row

    @property
    def _open(self) -> sqlite3.Connection:
        assert self._conn is not None
        return self._conn

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            failure = self._failure(error)
        raise failure  # here, so the driver's error is not in its chain: it may quote a row

    def _failure(self, error: sqlite3.Error) -> SchemaError | DatabaseError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_NOTADB:
            return SchemaError(f"{self.file} is not an SQLite database.")
        what = {
            sqlite3.SQLITE_READONLY: _HALF_WRITTEN,
            sqlite3.SQLITE_CANTOPEN: _HALF_WRITTEN,
            sqlite3.SQLITE_BUSY: "is locked by another process",
            sqlite3.SQLITE_CORRUPT: "is damaged",
        }.get(code, "cannot be read")
        name = type(error).__name__
        return DatabaseError(f"{self.file} {what} ({name}, {code}).", code=code, driver_error=name)


@asynccontextmanager
async def open_source(file: Path) -> AsyncIterator[Source]:
    """Opens a file of SqliteSessionService to be read, and never written.

    Everything is read from one snapshot, what a killed process has left in a ``-wal`` file
    included. Until the end, a file without WAL cannot be written by others.

    Raises:
        InvalidInputError: there is no such file.
        SchemaError: it is not a file of that service.
        DatabaseError: it cannot be read.
    """
    source = Source(file)
    try:
        await source.connect()
        yield source
    finally:
        await source.close()
