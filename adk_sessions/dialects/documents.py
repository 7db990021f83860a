"""Tables of documents, and what databases do differently about them: locks, transactions, limits.

Text columns are compared by code point, with case and trailing spaces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Table
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import IntegrityError, NoSuchTableError
from sqlalchemy.schema import CreateColumn, CreateSchema
from sqlalchemy.types import TypeEngine

from ..errors import ConfigurationError
from .faults import Overtaken
from .lanes import transaction
from .manner import Manner
from .packets import MySQLManner
from .types import MYSQL_FAMILY, KeyText

#: characters that a text column holds, and the bytes of which four fit an index of PostgreSQL's
LENGTH, LARGEST = 255, 600
#: bytes of a name that every database takes
LONGEST_NAME = 63

# A document is written back if it is still the same, so compared by bytes as well.
_DOCUMENT = sa.Text().with_variant(
    mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), *MYSQL_FAMILY
)
_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = KeyText(LENGTH).with_variant(sa.String(LENGTH, collation="C"), "postgresql")
_TYPES: dict[type, TypeEngine[Any]] = {
    str: _TEXT,
    int: sa.BigInteger(),
    float: sa.Double(),
    bool: sa.Boolean(),
}
# What they are when they are read from a table.
_KINDS: dict[type, type[TypeEngine[Any]]] = {
    str: sa.String,
    int: sa.Integer,
    float: sa.Float,
    bool: sa.Boolean,
}
# Text columns that fit whole into an index of InnoDB.
_WHOLE = 3
# Seconds to wait for a lock of ours, and for one of a table. An ALTER that waits makes every reader
# of the table wait behind it: it gives up soon, and is tried again.
_WAIT, _TABLE_WAIT = 10, 2
# Characters from which on a document may be too much for a server.
_LARGE = 250_000


def short(name: str) -> str:
    """A name that every database takes: one that is too long ends in its digest."""
    encoded = name.encode()
    if len(encoded) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode(errors='ignore')}_{digest}"


def table_of(name: str, schema: str | None, kinds: Mapping[str, type]) -> Table:
    """The table of a collection.

    Args:
        name: of the table.
        schema: where it is, None for the connection's own.
        kinds: the columns for scalars, each with its Python type.
    """
    return Table(
        name,
        sa.MetaData(schema=schema),
        sa.Column("seq", _SEQ, sa.Identity(), primary_key=True),
        *(sa.Column(key, _TYPES[kind]) for key, kind in kinds.items()),
        sa.Column("document", _DOCUMENT, nullable=False),
    )


def index_on(table: Table, fields: Mapping[str, bool], *, unique: bool = False) -> sa.Index:
    """An index of a table, with a name that follows from what it is.

    Args:
        table: which is given it.
        fields: its columns, each with whether it is descending.
        unique: whether no two rows may be equal there.
    """
    texts = [key for key in fields if isinstance(table.c[key].type, KeyText)]
    length = dict.fromkeys(texts, _WHOLE * LENGTH // len(texts)) if len(texts) > _WHOLE else None
    if length or len(set(fields.values())) == 1:  # of parts, or it can be read from either end
        fields = dict.fromkeys(fields, False)
    parts = [f"{key}_desc" if down else key for key, down in fields.items()]
    unique = unique or parts == ["id"]
    last = ["unique"] if unique and parts != ["id"] else []
    # some databases name tables and indexes alike, and a collection may be called x_id
    name = short("_".join(["ix", table.name, *parts, *last]))
    known = next((index for index in table.indexes if index.name == name), None)
    columns = [table.c[key].desc() if down else table.c[key] for key, down in fields.items()]
    options = {"unique": unique, "mysql_length": length, "mariadb_length": length}
    return known if known is not None else sa.Index(name, *columns, **options)  # type: ignore[arg-type]


class Shape(NamedTuple):
    """What a table is like: its columns with their types, and the names of its indexes."""

    columns: dict[str, TypeEngine[Any]]
    indexes: set[str | None]


def shape_of(conn: Connection, table: Table) -> Shape | None:
    """What a table is like in the database; None if there is none of its name."""
    inspector, where = sa.inspect(conn), {"schema": table.schema}
    try:
        columns = inspector.get_columns(table.name, **where)
    except NoSuchTableError:
        return None
    indexes = inspector.get_indexes(table.name, **where)
    return Shape({c["name"]: c["type"] for c in columns}, {index["name"] for index in indexes})


def holds(column: TypeEngine[Any], kind: type) -> bool:
    """Whether a column of a table is for this kind of scalar."""
    if isinstance(column, mysql.TINYINT):  # what MySQL makes of a boolean
        return kind is bool
    return isinstance(column, _KINDS[kind])


def make(conn: Connection, table: Table) -> None:
    """Makes a table with its indexes, and its schema, unless they are there."""
    if table.schema is not None and not sa.inspect(conn).has_schema(table.schema):
        try:
            conn.execute(CreateSchema(table.schema, if_not_exists=True))
        except IntegrityError:  # two do that at once, which PostgreSQL does not foresee
            raise Overtaken from None
    table.create(conn, checkfirst=True)


def add_column(conn: Connection, table: Table, name: str, kind: type) -> None:
    """Adds a column to a table that has rows."""
    column = CreateColumn(sa.Column(name, _TYPES[kind])).compile(dialect=conn.dialect)
    _alter(conn, table, f"ADD COLUMN {column}")


def rename_column(conn: Connection, table: Table, old: str, new: str) -> None:
    """Gives a column another name."""
    quote = conn.dialect.identifier_preparer.quote
    _alter(conn, table, f"RENAME COLUMN {quote(old)} TO {quote(new)}")


def _alter(conn: Connection, table: Table, change: str) -> None:
    name = conn.dialect.identifier_preparer.format_table(table)
    conn.exec_driver_sql(f"ALTER TABLE {name} {change}")


class Documents(Manner):
    """Any dialect."""

    autocommit: ClassVar[bool] = False

    def transaction(self, conn: Connection) -> AbstractContextManager[Any]:
        """A transaction on a connection that we control ourselves."""
        return conn.begin()

    def locked(self, conn: Connection, table: Table) -> AbstractContextManager[Any]:
        """A transaction beside which no other one of this method runs for the same table."""
        return self.transaction(conn)

    def check_size(self, conn: Connection, field: str, *texts: str) -> None:
        """Refuses what the server would answer by closing the connection.

        Raises:
            InvalidInputError: it is too large.
        """


class SQLiteDocuments(Documents):
    """BEGIN IMMEDIATE is the lock."""

    says_begin = True

    def transaction(self, conn: Connection) -> AbstractContextManager[Any]:
        return transaction(conn)


class PostgreSQLDocuments(Documents):
    """One statement is one round trip. A lock is a transaction's, so a pooler may be between."""

    needs_version = True
    autocommit = True

    @contextmanager
    def locked(self, conn: Connection, table: Table) -> Iterator[None]:
        # the connection's own schema may also be the one that somebody names
        own = sa.func.coalesce(sa.func.current_schema(type_=sa.Text), "")
        schema = own if table.schema is None else sa.literal(table.schema, sa.Text())
        name = schema + f".{table.name} of adk_sessions"
        key = sa.func.hashtextextended(name, sa.literal_column("0"))
        with self.transaction(conn):
            conn.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
            conn.exec_driver_sql(f"SET LOCAL lock_timeout = '{_TABLE_WAIT}s'")
            yield


class MySQLDocuments(MySQLManner, Documents):
    """MySQL and MariaDB: a lock is a connection's, and held until after the COMMIT."""

    @contextmanager
    def transaction(self, conn: Connection) -> Iterator[None]:
        # with autocommit SQLAlchemy begins nothing, and commits what we begin
        begins = self.commits_each_statement(conn)
        with conn.begin():
            if begins:
                conn.exec_driver_sql("START TRANSACTION")
            yield

    @contextmanager
    def locked(self, conn: Connection, table: Table) -> Iterator[None]:
        database = sa.func.coalesce(table.schema, sa.func.database())
        name = sa.func.concat(
            "adk_sessions.", sa.func.sha1(sa.func.concat(database, ".", table.name))
        )
        timeout = sa.literal_column("@@lock_wait_timeout", sa.Integer())
        held, usual = conn.execute(sa.select(sa.func.get_lock(name, _WAIT), timeout)).one()
        conn.rollback()
        if held != 1:
            raise Overtaken
        try:
            conn.exec_driver_sql(f"SET SESSION lock_wait_timeout = {_TABLE_WAIT}")
            conn.rollback()
            with self.transaction(conn):
                yield
        finally:
            if not conn.invalidated:
                conn.exec_driver_sql(f"SET SESSION lock_wait_timeout = {usual}")
                conn.execute(sa.select(sa.func.release_lock(name)))
                conn.rollback()

    def check_size(self, conn: Connection, field: str, *texts: str) -> None:
        # the server need not be asked about what any takes
        if sum(map(len, texts)) > _LARGE:
            super().check_size(conn, field, *texts)


_DOCUMENTS: dict[str, type[Documents]] = {
    "sqlite": SQLiteDocuments,
    "postgresql": PostgreSQLDocuments,
    **dict.fromkeys(MYSQL_FAMILY, MySQLDocuments),
}


def documents_for(name: str, schema: str | None = None) -> Documents:
    """What a dialect does about documents.

    Raises:
        ConfigurationError: the database has no schemas, or none can be called so.
    """
    if schema is not None and (not isinstance(schema, str) or not schema or "\0" in schema):
        raise ConfigurationError("schema must be a name, or None")
    if name == "sqlite" and schema is not None:
        raise ConfigurationError("SQLite has no schemas: prefix= keeps collections apart")
    return _DOCUMENTS.get(name, Documents)()
