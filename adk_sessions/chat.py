"""A chat history on two tables that the host application owns: messages, and sessions.

The application makes the tables, migrates them and lends its engine; nothing here issues DDL, opens
or closes a pool, or attaches anything to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Connection, Index, MetaData, Table
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, mapped_column

from . import checks
from .dialects import Backend
from .dialects import chat as rows
from .dialects import chat_columns as columns
from .dialects.connecting import Pooler, connect_engine
from .dialects.documents import short
from .errors import (
    AlreadyExistsError,
    ConfigurationError,
    DatabaseError,
    InvalidInputError,
    SchemaError,
    SessionStoreError,
)
from .retry import WINDOW, Retry
from .session import Page

__all__ = ["ChatMessage", "ChatModels", "ChatPersistence", "ChatSession", "chat_models"]

T = TypeVar("T")

#: characters of an id, a role or an SDK's version at most
LENGTH = 255

_TABLES = {"messages": "chat_messages", "sessions": "chat_sessions"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}")
_UNSENDABLE = re.compile("[\0\ud800-\udfff]")
_MOST = 1000  # messages of a page
_TICK = timedelta(microseconds=1)
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
# Where two insert the same row at once, one of them tries again.
_TRIES = 5
_UNREADABLE = (ValueError, TypeError, OverflowError, OSError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """A message of a thread.

    Attributes:
        thread_id: the conversation.
        message_id: unique in it.
        role: who speaks, such as ``user`` or ``assistant``.
        parts: what was said, a list of anything that JSON can hold; it reads back equal.
        session_id: the session it was said in, if any.
        user_id: whose it is, if that is to be known.
        created_at: with a time zone; None for the time at which it is saved. Read, it is in UTC.
    """

    thread_id: str
    message_id: str
    role: str
    parts: list[Any]
    session_id: str | None = None
    user_id: str | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ChatSession:
    """What an agent's SDK needs to go on with a thread.

    Attributes:
        session_id: unique in the table.
        thread_id: the conversation that it belongs to.
        sdk_version: what has written the state.
        state: a dict or list, or None.
        metadata: a dict, or None.
        created_at: with a time zone; None for the time at which it is first saved.
        updated_at: when it was last saved, archived or restored; set by that.
        archived_at: since when it is archived, None if it is live. A session that is not there yet
            is saved with it; of one that is, only `archive_session` and `restore_session` change
            it.
    """

    session_id: str
    thread_id: str
    sdk_version: str
    state: Any = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    archived_at: datetime | None = None


class ChatPersistence:
    """A chat history on two tables that the host application owns.

    Of a call either all happens or nothing, on PostgreSQL in one round trip. It may be repeated,
    and is, after a conflict with another transaction or a lost connection.

    Ids are compared by the database: exactly, unless the application's columns have a collation
    that says otherwise. The default of MariaDB and MySQL does; there rows are read by the exact id
    all the same, and one that could only be stored over another is refused.

    Times are written as moments, into a column without a time zone in UTC, and what is read of such
    a column is taken as UTC. Rows that other software inserts must keep to it: the default
    CURRENT_TIMESTAMP is in the time zone of the session, in a DATETIME of MySQL as in a TIMESTAMP
    WITHOUT TIME ZONE of PostgreSQL. Here it is never used. A column keeps what it can: MySQL's
    DATETIME and TIMESTAMP round to seconds where they are not given a precision, and TIMESTAMP is
    the same moment for sessions in one time zone only. In columns of text, and in SQLite, times are
    in the order of their texts: other software must write them in the same form.

    The tables may have further columns, as long as rows can be inserted without naming them. (On
    PostgreSQL none of a domain that is itself NOT NULL: put that on the column.)

    Args:
        engine: the application's, with an async driver. Behind a pooler in transaction mode it is
            to be made for that: with asyncpg ``connect_args={"statement_cache_size": 0}``.
        tables: other names for the tables ``messages`` and ``sessions``.
        schema: the database schema that holds them, None for the connection's own; the engine's
            ``schema_translate_map`` is followed.
        backend: ``generic`` takes the path that any SQL database can go; ``auto`` takes it for a
            database that has no statements of its own.
        pooler: ``transaction`` if the engine goes through a pooler in that mode and names its
            prepared statements, as SQLAlchemy's documentation has it: each call then is a
            transaction, three round trips. Better leave it, and give asyncpg
            ``statement_cache_size=0`` alone.
        statement_timeout: seconds that a call may take once it has a connection; None for no limit,
            as always on SQLite.
        retry_window: seconds in which a call is repeated after a conflict or a lost connection; 0
            never repeats.

    Raises:
        ConfigurationError: an argument is not acceptable.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        tables: Mapping[str, str] | None = None,
        schema: str | None = None,
        backend: Backend = "auto",
        pooler: Pooler | None = None,
        statement_timeout: float | None = None,
        retry_window: float = WINDOW,
    ) -> None:
        if not isinstance(engine, AsyncEngine):
            raise ConfigurationError("engine must be an AsyncEngine")
        if backend not in ("auto", "generic"):
            raise ConfigurationError("backend must be 'auto' or 'generic'")
        # SQLAlchemy itself looks there for Table objects alone
        schemas = engine.sync_engine.get_execution_options().get("schema_translate_map") or {}
        where: dict[str, Any] = {**_names(tables, schema), "schema": schemas.get(schema, schema)}
        how: dict[str, Any] = {"generic": backend == "generic", "pooled": pooler is not None}
        self._database, self._statements = connect_engine(
            engine,
            lambda dialect: rows.statements_for(dialect, **where, **how),
            pooler=pooler,
            statement_timeout=statement_timeout,
        )
        self._retry = Retry(retry_window, lambda: self._database.reached)
        self._latest = _FIRST

    # --- messages ------------------------------------------------------------------------------

    async def save_messages(self, messages: Iterable[ChatMessage]) -> None:
        """Saves a batch of messages, all of them or none.

        A message that is there already is replaced; its ``created_at`` stays. Those without one get
        the time of the call, each a microsecond after the one before, so a batch keeps its order
        where the column holds microseconds. However large it is, a batch is one statement on
        PostgreSQL; elsewhere it is one transaction: on SQLite of a statement that runs for each
        message, on MariaDB and MySQL of one for each few hundred, or for as many as the server's
        max_allowed_packet allows.

        Args:
            messages: of any threads; of two with the same ids the later one counts.

        Raises:
            InvalidInputError: a message cannot be stored; nothing was.
            AlreadyExistsError: the table's collation, or a further unique key, allows no such row
                beside one that is there; nothing was stored.
            SchemaError: a table or a column is missing.
            DatabaseError: the database failed.
        """
        if isinstance(messages, ChatMessage) or not isinstance(messages, Iterable):
            raise InvalidInputError("messages must be several ChatMessage", field="messages")
        given = list(messages)
        now = max(_now(), self._latest + _TICK)
        batch: dict[tuple[str, str], rows.Values] = {}
        for number, message in enumerate(given):
            row = _message_row(message, now + number * _TICK)
            key = (message.thread_id, message.message_id)
            if earlier := batch.get(key):
                row["created_at"] = earlier["created_at"]
            batch[key] = row
        if not batch:
            return
        self._latest = now + len(given) * _TICK
        # in one order, or two batches with some in common would wait for each other
        ordered = [batch[key] for key in sorted(batch)]
        await self._run(lambda conn: self._statements.save_messages(conn, ordered), write=True)

    async def list_messages(
        self,
        thread_id: str,
        session_id: str | None = None,
        *,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page[ChatMessage]:
        """Lists a thread's messages by (created_at, message_id), the oldest first.

        Messages of archived sessions are left out, unless the session is named; those without a
        session, or whose session has no row, are not. A page begins strictly behind the last
        message of the one before, whatever is written meanwhile: none is missed or shown twice, but
        for one that is saved with an earlier ``created_at`` than was shown already.

        Args:
            thread_id: the thread.
            session_id: only messages of this session, archived or not.
            limit: messages of a page at most, 1 to 1000; None for all at once.
            cursor: ``next_cursor`` of the page before, with the same thread and session; None for
                the first page.

        Returns:
            A page; empty if there is no such thread.

        Raises:
            InvalidInputError: an argument cannot be, or the cursor is another list's.
            SchemaError: a table or a column is missing.
            DatabaseError: the database failed, or a stored message is damaged.
        """
        for name, value in (("thread_id", thread_id), ("session_id", session_id)):
            if value is not None or name == "thread_id":
                checks.check_key(value, name, limit=LENGTH)
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and not (whole and 1 <= limit <= _MOST):
            raise InvalidInputError(f"limit must be from 1 to {_MOST}, or None", field="limit")
        scope = [thread_id, session_id]
        after = None if cursor is None else _place(cursor, scope)
        found = await self._run(
            lambda conn: self._statements.list_messages(
                conn, thread_id, session_id, limit=limit and limit + 1, after=after
            ),
            write=False,
        )
        page = found[:limit]
        more = len(found) > len(page)
        return Page([_message(row) for row in page], _cursor(page[-1], scope) if more else None)

    # --- sessions ------------------------------------------------------------------------------

    async def save_session(self, session: ChatSession) -> None:
        """Saves a session; one that is there keeps ``created_at``, and stays archived if it is.

        Args:
            session: as it is to be; its ``updated_at`` becomes the time of the call.

        Raises:
            InvalidInputError: it cannot be stored; nothing was.
            AlreadyExistsError: as `save_messages`.
            SchemaError: a table or a column is missing.
            DatabaseError: the database failed.
        """
        row = _session_row(session, _now())
        await self._run(lambda conn: self._statements.save_session(conn, row), write=True)

    async def load_session(self, session_id: str) -> ChatSession | None:
        """Loads a session, archived or not.

        Args:
            session_id: which one.

        Returns:
            The session, None if there is none.

        Raises:
            InvalidInputError: that cannot be an id.
            SchemaError: a table or a column is missing.
            DatabaseError: the database failed, or the stored session is damaged.
        """
        checks.check_key(session_id, "session_id", limit=LENGTH)
        row = await self._run(
            lambda conn: self._statements.load_session(conn, session_id), write=False
        )
        return None if row is None else _session(row)

    async def archive_session(
        self, session_id: str, *, thread_id: str = "", sdk_version: str = "unknown"
    ) -> None:
        """Archives a session: its messages are listed only where it is named.

        Archived again it stays archived since the first time.

        Args:
            session_id: which one; one that was never saved is saved as archived.
            thread_id, sdk_version: of one that was never saved.

        Raises:
            InvalidInputError: an argument cannot be stored; nothing was.
            SchemaError: a table or a column is missing.
            DatabaseError: the database failed.
        """
        session = ChatSession(session_id=session_id, thread_id=thread_id, sdk_version=sdk_version)
        now = _now()
        row = {**_session_row(session, now), "archived_at": now}
        await self._run(lambda conn: self._statements.archive_session(conn, row), write=True)

    async def restore_session(self, session_id: str) -> None:
        """Makes an archived session live; nothing happens to any other, or if there is none.

        Args:
            session_id: which one.

        Raises:
            InvalidInputError: that cannot be an id.
            SchemaError: a table or a column is missing.
            DatabaseError: the database failed.
        """
        checks.check_key(session_id, "session_id", limit=LENGTH)
        now = _now()
        await self._run(
            lambda conn: self._statements.restore_session(conn, session_id, now), write=True
        )

    # --- tables --------------------------------------------------------------------------------

    async def validate_schema(self) -> None:
        """Looks whether both tables have the columns that are needed; it need not be called.

        Types and further columns do not matter, and are not looked at.

        Raises:
            SchemaError: tables and columns that are missing, one on each line.
            DatabaseError: the database failed.
        """
        lines = await self._missing()
        if lines:
            raise _schema_error(lines)

    async def _missing(self) -> list[str]:
        found = await self._retry.run(self._database, self._statements.columns, write=False)
        lines = []
        for (table, there), wanted in zip(found.items(), (rows.MESSAGE, rows.SESSION), strict=True):
            if not there:
                lines.append(f"{table}: there is no such table")
            else:
                lines += [
                    f"{table}.{name}: there is no such column"
                    for name in wanted
                    if name not in there
                ]
        return lines

    async def _run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        failure: SessionStoreError = AlreadyExistsError(rows.TAKEN)
        for _ in range(_TRIES):
            try:
                return await self._retry.run(self._database, work, write=write)
            except IntegrityError:
                continue
            except DatabaseError as error:
                if error.retryable:
                    raise
                failure = error
            break
        # raised here, so no error of the driver is in its chain: its text quotes the row
        if isinstance(failure, DatabaseError) and (lines := await self._missing()):
            raise _schema_error(lines)
        raise failure


def _names(tables: Mapping[str, str] | None, schema: str | None) -> dict[str, str]:
    given = dict(tables or {})
    if unknown := given.keys() - _TABLES.keys():
        raise ConfigurationError(
            f"tables: there is no table {sorted(map(str, unknown))[0]!r} here, only"
            f" {' and '.join(_TABLES)}"
        )
    names = {**_TABLES, **given}
    for what, name in {**names, **({} if schema is None else {"schema": schema})}.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConfigurationError(
                f"{what}: not a name; letters, digits and _ $ -, at most 63, and no dot"
            )
    if names["messages"] == names["sessions"]:
        raise ConfigurationError("tables: both have the same name")
    return names


def _schema_error(lines: list[str]) -> SchemaError:
    found = "".join(f"\n  {line}" for line in lines)
    return SchemaError(f"The chat tables are not as this release needs them:{found}")


# --- rows ---------------------------------------------------------------------------------------


def _now() -> datetime:
    return datetime.now(UTC)


def _message_row(message: object, now: datetime) -> rows.Values:
    if not isinstance(message, ChatMessage):
        raise InvalidInputError("messages must be of ChatMessage", field="messages")
    if not isinstance(message.parts, list):
        raise InvalidInputError("parts must be a list", field="parts")
    row: rows.Values = {}
    for name in ("thread_id", "message_id", "session_id", "user_id", "role"):
        row[name] = value = getattr(message, name)
        if value is not None or name not in ("session_id", "user_id"):
            checks.check_key(value, name, limit=LENGTH)
    row["created_at"] = _time(message.created_at, "created_at", now)
    row["parts_json"] = columns.dump(message.parts, "parts")
    return row


def _session_row(session: object, now: datetime) -> rows.Values:
    if not isinstance(session, ChatSession):
        raise InvalidInputError("session must be a ChatSession", field="session")
    row: rows.Values = {}
    for name in ("session_id", "thread_id", "sdk_version"):
        row[name] = getattr(session, name)
        checks.check_key(row[name], name, limit=LENGTH)
    for name, kinds in (("state", (dict, list)), ("metadata", (dict,))):
        value = getattr(session, name)
        if value is not None and not isinstance(value, kinds):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidInputError(f"{name} must be a {allowed}, or None", field=name)
        row[f"{name}_json"] = None if value is None else columns.dump(value, name)
    row["created_at"] = _time(session.created_at, "created_at", now)
    row["updated_at"] = now
    row["archived_at"] = _time(session.archived_at, "archived_at", None)
    return row


def _time(value: object, field: str, default: T) -> datetime | T:
    if value is None:
        return default
    if not isinstance(value, datetime) or value.utcoffset() is None or not _FIRST <= value < _LAST:
        raise InvalidInputError(
            f"{field} must be a datetime with a time zone, in the years 1970 to 8999", field=field
        )
    return value.astimezone(UTC)


def _message(row: Any) -> ChatMessage:
    thread_id, message_id, session_id, user_id, role, created_at, parts = row
    try:
        return ChatMessage(
            thread_id=str(thread_id),
            message_id=str(message_id),
            session_id=None if session_id is None else str(session_id),
            user_id=None if user_id is None else str(user_id),
            role=str(role),
            created_at=columns.to_utc(created_at),
            parts=columns.load(parts),
        )
    except _UNREADABLE:
        pass
    raise DatabaseError(
        f"Message {str(message_id)!r} of thread {str(thread_id)!r} cannot be read: created_at is no"
        " time, or parts_json no JSON."
    )


def _session(row: Any) -> ChatSession:
    session_id, thread_id, sdk_version, state, metadata, *times = row
    try:
        created_at, updated_at, archived_at = (
            None if time is None else columns.to_utc(time) for time in times
        )
        return ChatSession(
            session_id=str(session_id),
            thread_id=str(thread_id),
            sdk_version=str(sdk_version),
            state=None if state is None else columns.load(state),
            metadata=None if metadata is None else columns.load(metadata),
            created_at=created_at,
            updated_at=updated_at,
            archived_at=archived_at,
        )
    except _UNREADABLE:
        pass
    raise DatabaseError(
        f"Session {str(session_id)!r} cannot be read: one of its times is none, or its state_json"
        " or metadata_json no JSON."
    )


# --- cursors ------------------------------------------------------------------------------------


def _cursor(row: Any, scope: list[Any]) -> str:
    """The place of a message: its time as the database has it, and its id."""
    at, message_id = row.created_at, str(row.message_id)
    plain = ["t", at.isoformat()] if isinstance(at, datetime) else ["", at]
    text = json.dumps([_digest(scope, plain, message_id), plain, message_id])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _place(cursor: str, scope: list[Any]) -> tuple[Any, str]:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        digest, (kind, at), message_id = json.loads(text)
        sound = isinstance(message_id, str) and _can_be_sent(message_id) and _can_be_sent(at)
        if sound and digest == _digest(scope, [kind, at], message_id):
            return datetime.fromisoformat(at) if kind else at, message_id
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise InvalidInputError(
        "cursor is not one of this list: pass next_cursor as it was, with the same thread and"
        " session, or None for the first page",
        field="cursor",
    )


def _can_be_sent(value: Any) -> bool:
    """Whether a driver can send it: whoever knows how may make a cursor up."""
    if isinstance(value, str):
        return not _UNSENDABLE.search(value)
    return type(value) in (int, float) and abs(value) < 2**63


def _digest(*parts: Any) -> str:
    """Tells a cursor that was changed, or is another list's."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()


# --- models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatModels:
    """The two tables, for the application's own migrations.

    Attributes:
        base: their declarative base.
        message, session: the mapped classes.
        messages, sessions: the tables behind them.
    """

    base: type[DeclarativeBase]
    message: type[Any]
    session: type[Any]
    messages: Table
    sessions: Table

    @property
    def metadata(self) -> MetaData:
        """The tables' MetaData, alembic's ``target_metadata``."""
        return self.base.metadata


def chat_models(
    base: type[DeclarativeBase] | MetaData | None = None,
    *,
    messages: str = _TABLES["messages"],
    sessions: str = _TABLES["sessions"],
    schema: str | None = None,
) -> ChatModels:
    """Makes models of the two tables, with indexes for what is listed here.

    They are plain columns of SQLAlchemy's types, which ``alembic revision --autogenerate`` can
    write down. The application may add columns, or write such tables by hand. JSON columns hold
    what `ChatPersistence` wrote: it reads them exactly, while a model shows JSON, or its text.

    Args:
        base: the application's declarative base or MetaData, to which the tables are added; None
            makes a base of their own. Call this once for each.
        messages, sessions: names of the tables.
        schema: the database schema that holds them, None for that of the MetaData.

    Returns:
        The models and their tables.

    Raises:
        ConfigurationError: a name cannot be one.
    """
    _names({"messages": messages, "sessions": sessions}, schema)
    if base is None or isinstance(base, MetaData):
        given = base or MetaData()

        class Base(DeclarativeBase):
            metadata = given

        base = Base
    root: Any = base

    def key(**options: Any) -> Any:
        return mapped_column(columns.id_text(LENGTH), **options)

    def time(**options: Any) -> Any:
        return mapped_column(columns.moment(), **options)

    class StoredChatMessage(root):  # type: ignore[misc]
        __tablename__ = messages
        __table_args__ = (
            Index(short(f"ix_{messages}_thread_created"), "thread_id", "created_at", "message_id"),
            Index(short(f"ix_{messages}_session"), "session_id"),
            {"schema": schema},
        )

        thread_id = key(primary_key=True)
        message_id = key(primary_key=True)
        session_id = key(nullable=True)
        user_id = key(nullable=True)
        role = key(nullable=False)
        created_at = time(nullable=False, server_default=columns.utc_now())
        parts_json = mapped_column(columns.json_text(), nullable=False)

    class StoredChatSession(root):  # type: ignore[misc]
        __tablename__ = sessions
        __table_args__ = (Index(short(f"ix_{sessions}_thread"), "thread_id"), {"schema": schema})

        session_id = key(primary_key=True)
        thread_id = key(nullable=False)
        sdk_version = key(nullable=False)
        state_json = mapped_column(columns.json_text(), nullable=True)
        metadata_json = mapped_column(columns.json_text(), nullable=True)
        created_at = time(nullable=False, server_default=columns.utc_now())
        updated_at = time(nullable=False, server_default=columns.utc_now())
        archived_at = time(nullable=True)

    message: Any = StoredChatMessage
    session: Any = StoredChatSession
    return ChatModels(base, message, session, message.__table__, session.__table__)
