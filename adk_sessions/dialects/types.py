"""Column types, each in the form that google-adk's own tables have on that database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import DateTime, Dialect, String, Text
from sqlalchemy.dialects import mssql, mysql, postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

from .. import codec
from ..clock import EPOCH

MYSQL_FAMILY = ("mysql", "mariadb")


class Json(TypeDecorator[Any]):
    """A JSON document: JSONB on PostgreSQL, LONGTEXT on MySQL and MariaDB, TEXT elsewhere.

    The store's own statements go past this conversion, with the codec's text. It is here for
    applications that use the models through the ORM: they see what the codec decodes.
    """

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.JSONB())
        if dialect.name in MYSQL_FAMILY:
            return dialect.type_descriptor(mysql.LONGTEXT())
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return None
        text = codec.dump_state(value)
        return codec.loads(text) if dialect.name == "postgresql" else text

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return None
        return codec.load_state(codec.dumps(value) if dialect.name == "postgresql" else value)


class Timestamp(TypeDecorator[datetime]):
    """A naive UTC time to the microsecond."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in MYSQL_FAMILY:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        if dialect.name == "mssql":
            return dialect.type_descriptor(mssql.DATETIME2(precision=6))  # type: ignore[no-untyped-call]
        return dialect.type_descriptor(DateTime())

    def result_processor(
        self, dialect: Dialect, coltype: object
    ) -> Callable[[Any], datetime | None] | None:
        if dialect.name == "sqlite":
            return moment_of
        convert = self.load_dialect_impl(dialect).result_processor(dialect, coltype)
        return cast("Callable[[Any], datetime | None] | None", convert)


def moment_of(value: Any) -> datetime | None:
    """What SQLite gives back for a time, whatever was written: nothing there may break reading.

    google-adk has left raw epoch numbers. What is no time at all is the earliest one.
    """
    try:
        if isinstance(value, str):
            return datetime.fromisoformat(value).replace(tzinfo=None)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):
        return EPOCH
    return None if value is None else EPOCH


class KeyText(TypeDecorator[str]):
    """A key column; on MySQL and MariaDB compared by bytes, trailing spaces and case included."""

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        length = cast(String, self.impl_instance).length
        if dialect.name in MYSQL_FAMILY:
            # MariaDB is reached through either dialect; which it is is known once connected
            mariadb = dialect.name == "mariadb" or getattr(dialect, "is_mariadb", False)
            flavour = "nopad" if mariadb else "0900"
            return dialect.type_descriptor(
                mysql.VARCHAR(length, charset="utf8mb4", collation=f"utf8mb4_{flavour}_bin")
            )
        return dialect.type_descriptor(String(length))


def long_text() -> Text:
    """Text without a length limit that a conversation could meet."""
    return Text().with_variant(mysql.LONGTEXT(), *MYSQL_FAMILY)
