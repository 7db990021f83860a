"""What the columns of a chat history hold: JSON and times in columns of whichever type.

And the types themselves, for an application that lets alembic make the tables.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import UTC, date, datetime, time
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python
from sqlalchemy import DateTime, String, Text
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from .. import codec
from ..errors import DatabaseError, InvalidInputError
from .types import MYSQL_FAMILY, long_text

# Beyond 64 bits some JSON types keep a number as a float.
_BEYOND = re.compile(r"\d{19}")
_NOT_ASCII = re.compile(r"[^\0-\x7f]+")


def dump(value: Any, field: str) -> str:
    """The JSON text of a value, exact in any column.

    Raises:
        InvalidInputError: something in it has no JSON form, or it is nested too deeply.
    """
    plain, kind = value, ""
    try:
        plain = to_jsonable_python(value, inf_nan_mode="constants")
    except UnicodeEncodeError:
        pass  # a lone surrogate in a key, which the codec can write
    except (PydanticSerializationError, UnicodeDecodeError) as error:
        kind = type(error).__name__
    except ValueError:
        pass  # it contains itself, of which the codec says so
    if kind:
        raise InvalidInputError(f"{field} holds a value without a JSON form", field=field)
    # the codec's texts are those of objects
    written = codec.dump_state({"": plain}, field=field)[len('{"":') : -1]
    return codec.dumps(_within(json.loads(written))) if _BEYOND.search(written) else written


def load(stored: Any) -> Any:
    """The value of a JSON column, as the driver gives it.

    Raises:
        ValueError: it is no JSON.
    """
    if isinstance(stored, bytes | bytearray | memoryview):
        stored = bytes(stored).decode()
    # some drivers have decoded it
    written = stored if isinstance(stored, str) else codec.dumps(stored)
    loaded: dict[str, Any] = {}
    with suppress(DatabaseError):
        loaded = codec.load_state('{"":' + written + "}")
    if loaded.keys() != {""}:
        raise ValueError
    return loaded[""]


def _within(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_within(item) for item in value]
    if isinstance(value, int) and value.bit_length() > 63:
        return f"{codec.MARK}int:{value:#x}"
    return value


def to_utc(stored: Any) -> datetime:
    """The time in a column, as the driver gives it; one without a zone is taken as UTC.

    Raises:
        ValueError, TypeError, OverflowError, OSError: it is none.
    """
    if isinstance(stored, str):
        stored = datetime.fromisoformat(stored.strip())
    elif isinstance(stored, int | float):
        stored = datetime.fromtimestamp(stored, UTC)
    elif isinstance(stored, date) and not isinstance(stored, datetime):
        stored = datetime.combine(stored, time())
    if not isinstance(stored, datetime):
        raise TypeError
    return stored.replace(tzinfo=UTC) if stored.tzinfo is None else stored.astimezone(UTC)


def naive(value: Any) -> Any:
    """A time in UTC without saying so; anything else as it is."""
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


def as_text(value: Any) -> Any:
    """A time as SQLAlchemy writes it to SQLite, in order with what CURRENT_TIMESTAMP gives."""
    plain = naive(value)
    return plain.isoformat(" ", "microseconds") if isinstance(plain, datetime) else plain


def ascii_only(written: str) -> str:
    """JSON that a column of any character set can hold."""
    if written.isascii():
        return written
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], written)


# --- types of columns, for an application that makes the tables ---------------------------------
#
# SQLAlchemy's own, which alembic can write into a revision.


def id_text(length: int) -> String:
    """An id; on MySQL and MariaDB compared by its characters, but for spaces at its end."""
    exact = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return String(length).with_variant(exact, *MYSQL_FAMILY)


class _Jsonb(postgresql.JSONB):
    """JSONB that alembic can write down: of one that is a variant it forgets an import."""

    __module__ = postgresql.__name__

    def __repr__(self) -> str:
        return "JSONB()"


def json_text() -> Text:
    """JSON: JSONB on PostgreSQL, text elsewhere."""
    # JSON of MySQL and MariaDB has a limit of nesting; SQLite would make numbers of some texts
    return long_text().with_variant(_Jsonb(), "postgresql")


def moment() -> DateTime:
    """A time to the microsecond: with its zone where a column can have one, else in UTC."""
    return DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL_FAMILY)


class utc_now(FunctionElement[datetime]):
    """A column's default: the time of the server, in UTC where the column has no zone."""

    inherit_cache = True


@compiles(utc_now)
def _now(_element: Any, _compiler: Any, **_options: Any) -> str:
    return "CURRENT_TIMESTAMP"


@compiles(utc_now, *MYSQL_FAMILY)
def _now_on_mysql(_element: Any, _compiler: Any, **_options: Any) -> str:
    # CURRENT_TIMESTAMP is in the session's time zone
    return "(utc_timestamp(6))"
