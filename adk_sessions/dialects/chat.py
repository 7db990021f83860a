"""Statements on a chat history's two tables, which the host application owns.

Only the names of their columns are known, not the types: a time may be kept with or without its
zone or as text, JSON in a type of its own or as text. So no statement says a type where the
database can find it by itself, and no parameter is converted for one that it may not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    String,
    TableClause,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    exists,
    func,
    insert,
    inspect,
    literal_column,
    null,
    or_,
    select,
    table,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError, NoSuchTableError
from sqlalchemy.types import TypeEngine

from .. import codec
from ..errors import AlreadyExistsError
from .chat_columns import as_text, ascii_only, naive
from .faults import code_of
from .manner import Manner
from .packets import MySQLManner, escaped_size
from .types import MYSQL_FAMILY

MESSAGE = ("thread_id", "message_id", "session_id", "user_id", "role", "created_at", "parts_json")
SESSION = (
    *("session_id", "thread_id", "sdk_version", "state_json", "metadata_json"),
    *("created_at", "updated_at", "archived_at"),
)
_JSON = {"parts_json", "state_json", "metadata_json"}

#: a row by its columns: texts, aware times in UTC, JSON as text
Row = Mapping[str, Any]
Values = dict[str, Any]
Key = Sequence[str]
Columns = Mapping[str, ColumnElement[Any]]
#: what an upsert sets: columns, in this order, from those of the row that is there and the new one
Changes = Callable[[Any, Any], Columns]

TAKEN = (
    "A row cannot be stored beside one that is there: another unique key of the table is taken, or"
    " its collation takes two ids for the same (as by case)."
)

# What a row is long besides its texts.
_OTHER = 256
# Rows of one statement where each has parameters of its own: to compile it holds up the event loop.
_ROWS = 250
_OUT_OF_RANGE = 1690


# --- statements ---------------------------------------------------------------------------------


def _saved_message(_old: Any, new: Any) -> Columns:
    return {name: new[name] for name in ("session_id", "user_id", "role", "parts_json")}


def _saved_session(_old: Any, new: Any) -> Columns:
    changed = ("thread_id", "sdk_version", "state_json", "metadata_json", "updated_at")
    return {name: new[name] for name in changed}


def _archived(old: Any, new: Any) -> Columns:
    live = old["archived_at"].is_(None)
    return {  # MySQL assigns one after the other
        "updated_at": case((live, new["updated_at"]), else_=old["updated_at"]),
        "archived_at": func.coalesce(old["archived_at"], new["archived_at"]),
    }


class Chat(Manner):
    """Statements for any SQL database: UPDATE, then INSERT what was not there.

    Args:
        messages, sessions: names of the tables.
        schema: where they are; None for the connection's own.
    """

    def __init__(self, messages: str, sessions: str, schema: str | None) -> None:
        self.messages = table(messages, *map(column, MESSAGE), schema=schema)
        self.sessions = table(sessions, *map(column, SESSION), schema=schema)
        self._lists: dict[tuple[bool, bool, bool], Any] = {}
        self._types: dict[str, dict[str, TypeEngine[Any]]] = {}
        self._upserts: dict[Changes, Any] = {}

    def columns(self, conn: Connection) -> dict[str, set[str]]:
        """The columns of both tables, by the table's full name; none for one that is missing."""
        inspector, found = inspect(conn), {}
        for each in (self.messages, self.sessions):
            try:
                there = inspector.get_columns(each.name, schema=each.schema)
            except NoSuchTableError:
                there = []
            found[each.fullname] = {str(one["name"]).lower() for one in there}
        return found

    def save_messages(self, conn: Connection, rows: Sequence[Row]) -> None:
        """Inserts rows; of one that is there all is replaced but its ``created_at``."""
        self._upsert(conn, self.messages, ("thread_id", "message_id"), rows, _saved_message)

    def save_session(self, conn: Connection, row: Row) -> None:
        """Inserts a row; of one that is there ``created_at`` and ``archived_at`` stay."""
        self._upsert(conn, self.sessions, ("session_id",), [row], _saved_session)

    def archive_session(self, conn: Connection, row: Row) -> None:
        """Inserts an archived row, or archives the one that is there unless it is already."""
        self._upsert(conn, self.sessions, ("session_id",), [row], _archived)

    def restore_session(self, conn: Connection, session_id: str, now: datetime) -> None:
        """Makes a session live; nothing happens if it is, or has no row."""
        statement = (
            update(self.sessions)
            .where(
                self.is_(self.sessions.c.session_id, bindparam("k_session")),
                self.sessions.c.archived_at.is_not(None),
            )
            .values(archived_at=null(), updated_at=self.given(conn, self.sessions, "updated_at"))
        )
        given = self.parameters(conn, self.sessions, {"updated_at": now})
        conn.execute(statement, {"k_session": session_id, **given})

    def load_session(self, conn: Connection, session_id: str) -> Any:
        """A session's row, None if there is none."""
        columns = self.sessions.c
        statement = select(*(columns[name] for name in SESSION))
        key = {"k_session": session_id}
        return conn.execute(
            statement.where(self.is_(columns.session_id, bindparam("k_session"))), key
        ).first()

    def list_messages(
        self,
        conn: Connection,
        thread_id: str,
        session_id: str | None,
        *,
        limit: int | None,
        after: tuple[Any, str] | None,
    ) -> Sequence[Any]:
        """Rows of a thread by time and id.

        Args:
            thread_id: the thread.
            session_id: the session, archived or not; None for all that are not archived.
            limit: how many; None for all.
            after: ``created_at`` as the driver gave it, and ``message_id``; None to begin.
        """
        shape = (session_id is not None, limit is not None, after is not None)
        statement = self._lists.get(shape)
        if statement is None:
            statement = self._lists[shape] = self._list(*shape)
        given: Values = {"k_thread": thread_id, "k_session": session_id, "k_limit": limit}
        if after is not None:
            given["k_time"], given["k_message"] = after
        return conn.execute(statement, {k: v for k, v in given.items() if v is not None}).all()

    def _list(self, one_session: bool, limited: bool, beyond: bool) -> Any:
        message, session = self.messages.c, self.sessions.c
        statement = select(*(message[name] for name in MESSAGE))
        statement = statement.where(self.is_(message.thread_id, bindparam("k_thread")))
        if one_session:
            statement = statement.where(self.is_(message.session_id, bindparam("k_session")))
        else:
            archived = and_(
                self.is_(session.session_id, message.session_id), session.archived_at.is_not(None)
            )
            statement = statement.where(~exists().select_from(self.sessions).where(archived))
        if beyond:
            at: Any = bindparam("k_time")
            last: Any = bindparam("k_message")
            later = or_(message.created_at > at, message.message_id > last)
            statement = statement.where(message.created_at >= at, later)
        statement = statement.order_by(message.created_at, message.message_id)
        return statement.limit(bindparam("k_limit", type_=Integer())) if limited else statement

    # --- what dialects differ in ---------------------------------------------------------------

    def is_(self, key: ColumnElement[Any], value: ColumnElement[Any]) -> ColumnElement[bool]:
        """Whether a key column holds the id that a parameter or another column does."""
        return key == value

    def given(self, conn: Connection, of: TableClause, name: str) -> ColumnElement[Any]:
        """The parameter for a column."""
        return bindparam(f"v_{name}", type_=self._typed(conn, of).get(name))

    def parameters(self, conn: Connection, of: TableClause, row: Row) -> Values:
        """The parameters for columns that `given` named."""
        kinds, converted = self._typed(conn, of), {}
        for name, value in row.items():
            kind = kinds.get(name)
            if isinstance(value, datetime):
                if isinstance(kind, String):
                    value = as_text(value)
                elif not getattr(kind, "timezone", False):
                    value = naive(value)
            elif value is not None and isinstance(kind, JSON):
                value = codec.loads(value)
            converted[f"v_{name}"] = value
        return converted

    def _upsert(
        self, conn: Connection, into: TableClause, key: Key, rows: Sequence[Row], changes: Changes
    ) -> None:
        new = {name: self.given(conn, into, name) for name in rows[0]}
        there = and_(*(into.c[name] == new[name] for name in key))
        change = update(into).where(there).values(changes(into.c, new))
        # one that is in no expression would be taken for a column
        used = change.compile().params.keys()
        missing = []
        for row in rows:
            given = self.parameters(conn, into, row)
            if not conn.execute(change, {k: v for k, v in given.items() if k in used}).rowcount:
                missing.append(given)
        if missing:
            conn.execute(insert(into).values(new), missing)

    def _typed(self, conn: Connection, of: TableClause) -> dict[str, TypeEngine[Any]]:
        """The types of a table's columns, asked for once."""
        if of.name not in self._types:
            there = inspect(conn).get_columns(of.name, schema=of.schema)
            kinds = {str(one["name"]).lower(): one["type"] for one in there}
            for kind in kinds.values():
                if isinstance(kind, JSON):
                    kind.none_as_null = True
            self._types[of.name] = kinds
        return self._types[of.name]


# Found as the statements find the tables, by the search path.
_COLUMNS = text(
    "SELECT attrelid = to_regclass(CAST(:messages AS text)), CAST(attname AS text)"
    " FROM pg_catalog.pg_attribute WHERE attnum > 0 AND NOT attisdropped AND attrelid IN"
    " (to_regclass(CAST(:messages AS text)), to_regclass(CAST(:sessions AS text)))"
)


class ChatOnPostgreSQL(Chat):
    """PostgreSQL: one statement, one round trip; rows go as one JSON parameter.

    The server makes the host's own row type of it: a batch of any size is one statement, each value
    is read as its column's type reads text, and a time as the moment it is, whatever the session's
    time zone.
    """

    needs_version = True
    autocommit: ClassVar[bool] = True

    def columns(self, conn: Connection) -> dict[str, set[str]]:
        tables = (self.messages, self.sessions)
        messages, sessions = map(_POSTGRESQL.format_table, tables)
        rows = conn.execute(_COLUMNS, {"messages": messages, "sessions": sessions}).all()
        return {
            each.fullname: {name for of_messages, name in rows if bool(of_messages) == wanted}
            for each, wanted in zip(tables, (True, False), strict=True)
        }

    def given(self, conn: Connection, of: TableClause, name: str) -> ColumnElement[Any]:
        return select(_records(of, (name,)).c[name]).scalar_subquery()

    def parameters(self, conn: Connection, of: TableClause, row: Row) -> Values:
        return {"v_rows": _document([row])}

    def _upsert(
        self, conn: Connection, into: TableClause, key: Key, rows: Sequence[Row], changes: Changes
    ) -> None:
        statement = self._upserts.get(changes)
        if statement is None:
            names = tuple(rows[0])
            new = _records(into, names)
            upsert = postgresql.insert(into).from_select(names, select(*new.c))
            statement = self._upserts[changes] = upsert.on_conflict_do_update(
                index_elements=key, set_=changes(into.c, upsert.excluded)
            )
        conn.execute(statement, {"v_rows": _document(rows)})


class ChatBehindPooler(ChatOnPostgreSQL):
    """PostgreSQL through a pooler: what prepares a statement must be a transaction with it."""

    autocommit: ClassVar[bool] = False


class ChatOnSQLite(Chat):
    """SQLite: each statement for all rows, in a transaction that has locked everything."""

    says_begin: ClassVar[bool] = True

    def given(self, conn: Connection, of: TableClause, name: str) -> ColumnElement[Any]:
        return bindparam(f"v_{name}")

    def parameters(self, conn: Connection, of: TableClause, row: Row) -> Values:
        return {f"v_{name}": as_text(value) for name, value in row.items()}

    def _upsert(
        self, conn: Connection, into: TableClause, key: Key, rows: Sequence[Row], changes: Changes
    ) -> None:
        statement = self._upserts.get(changes)
        if statement is None:
            new = {name: self.given(conn, into, name) for name in rows[0]}
            upsert = sqlite.insert(into).values(new)
            statement = self._upserts[changes] = upsert.on_conflict_do_update(
                index_elements=key, set_=changes(into.c, upsert.excluded)
            )
        conn.execute(statement, [self.parameters(conn, into, row) for row in rows])


class ChatOnMySQL(MySQLManner, Chat):
    """MySQL and MariaDB: as many rows in a statement as the server takes in a packet."""

    def is_(self, key: ColumnElement[Any], value: ColumnElement[Any]) -> ColumnElement[bool]:
        # the first finds it by the index, but perhaps in another case, or without accents
        return and_(key == value, _bytes(key) == _bytes(value))

    def given(self, conn: Connection, of: TableClause, name: str) -> ColumnElement[Any]:
        return bindparam(f"v_{name}")

    def parameters(self, conn: Connection, of: TableClause, row: Row) -> Values:
        return {f"v_{name}": value for name, value in _plain(row).items()}

    def _upsert(
        self, conn: Connection, into: TableClause, key: Key, rows: Sequence[Row], changes: Changes
    ) -> None:
        refused = False
        for part in self._parts(conn, [_plain(row) for row in rows]):
            upsert = mysql.insert(into).values(part)
            same = and_(*(_bytes(into.c[name]) == _bytes(upsert.inserted[name]) for name in key))
            # Whichever unique key is taken, by whatever the collation takes for equal: the row that
            # is there would be overwritten. No mode of the server lets this sum pass.
            last = into.c[key[-1]]
            beyond: Any = literal_column(str(2**63 - 1)) + (
                func.char_length(last) + literal_column("1")
            )
            values = [*changes(into.c, upsert.inserted).items()]
            values.append((key[-1], case((same, last), else_=beyond)))
            try:
                conn.execute(upsert.on_duplicate_key_update(values))
            except DBAPIError as error:
                if code_of(error) != _OUT_OF_RANGE:
                    raise
                refused = True
            if refused:
                raise AlreadyExistsError(TAKEN)

    def _parts(self, conn: Connection, rows: list[Values]) -> Iterator[list[Values]]:
        """Rows in statements that the server takes."""
        limit = self.room(conn)
        part: list[Values] = []
        total = 0
        for row in rows:
            sizes = {
                name: escaped_size(value) for name, value in row.items() if isinstance(value, str)
            }
            size = sum(sizes.values()) + _OTHER
            if size > limit:
                field = max(sizes, key=lambda name: sizes[name]).removesuffix("_json")
                raise self.too_large(field, size)
            if part and (total + size > limit or len(part) == _ROWS):
                yield part
                part, total = [], 0
            part.append(row)
            total += size
        yield part


_STATEMENTS: dict[str, type[Chat]] = {
    "postgresql": ChatOnPostgreSQL,
    "sqlite": ChatOnSQLite,
    **dict.fromkeys(MYSQL_FAMILY, ChatOnMySQL),
}


def statements_for(
    dialect: str, messages: str, sessions: str, schema: str | None, *, generic: bool, pooled: bool
) -> Chat:
    """The statements of a dialect; the generic ones for one that has none of its own."""
    kind = Chat if generic else _STATEMENTS.get(dialect, Chat)
    if pooled and kind is ChatOnPostgreSQL:
        kind = ChatBehindPooler
    return kind(messages, sessions, schema)


_POSTGRESQL = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]


def _records(of: TableClause, names: Sequence[str]) -> Any:
    """The rows of a JSON document, as a table makes them of its columns' types."""
    row: Any = literal_column(f"NULL::{_POSTGRESQL.format_table(of)}")
    # as text first: the driver may have an encoder of the application's for JSON
    rows = cast(bindparam("v_rows", type_=Text()), postgresql.JSON())
    return func.json_populate_recordset(row, rows).table_valued(*names, name="new")


def _document(rows: Sequence[Row]) -> str:
    records = (
        ",".join(f'"{name}":{_member(name, value)}' for name, value in row.items()) for row in rows
    )
    return "[" + ",".join(f"{{{record}}}" for record in records) + "]"


def _member(name: str, value: Any) -> str:
    if name in _JSON:
        return value or "null"
    if isinstance(value, datetime):
        value = value.isoformat(" ", "microseconds")
    return codec.dumps(value)


def _bytes(key: ColumnElement[Any]) -> ColumnElement[Any]:
    """What tells two keys apart whatever the collation, in one character set."""
    return cast(cast(key, mysql.CHAR(charset="utf8mb4")), LargeBinary())


def _plain(row: Row) -> Values:
    """A row for MySQL and MariaDB: times in UTC, JSON for a column of any character set."""
    return {
        name: ascii_only(value) if name in _JSON and value else naive(value)
        for name, value in row.items()
    }
