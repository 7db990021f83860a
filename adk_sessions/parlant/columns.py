"""What a document is in its row: the whole of it as text, and its scalars in columns.

A text that a column cannot hold stands there as a digest behind `codec.MARK`: equal texts have
equal ones, so only order has to be decided by the documents themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import sqlalchemy as sa

from .. import codec
from ..codec import MARK
from ..dialects.documents import LARGEST, LENGTH
from ..errors import DatabaseError, InvalidInputError

#: what `Columns.value` gives for a value that its column cannot hold
UNFIT: Any = object()
#: what pages are ordered by, so it is always in its column as it is
ORDER = ("creation_utc", "id")

_SCALARS = {str, int, float, bool}
# No other column is called like one of those that every table has, or that is being filled.
_NAME = re.compile(r"(?!(?:seq|document|.*__filling)$)[a-z_][a-z0-9_]{0,49}", re.IGNORECASE)
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
# The first text behind all that begin with the mark.
_BEHIND = MARK[:-1] + chr(ord(MARK[-1]) + 1)
_INT64 = range(-(2**63), 2**63)


def kinds_of(schema: type[Any]) -> dict[str, type]:
    """The keys of a TypedDict that get a column, each with its type."""
    kinds: dict[str, type] = {}
    hints = get_type_hints(schema)
    for key in sorted(hints, key=lambda key: key not in (*ORDER, "version")):
        kind = _kind(hints[key])
        taken = {known.lower() for known in kinds}
        if kind is not None and _NAME.fullmatch(key) and key.lower() not in taken:
            kinds[key] = kind
    return kinds


def _kind(hint: Any) -> type | None:
    """The scalar type behind a type hint, None if it is none or several."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    origin, members = get_origin(hint), get_args(hint)
    if origin is Required or origin is NotRequired:
        return _kind(members[0])
    kinds: set[type | None] = {kind for kind in _SCALARS if kind is hint}
    if origin is Literal:
        kinds = {type(value) for value in members if value is not None}
    elif origin is Union or origin is UnionType:
        kinds = {_kind(member) for member in members if member is not NoneType}
    return kinds.pop() if len(kinds) == 1 and kinds <= _SCALARS else None


class Columns:
    """The columns of a table of documents.

    Attributes:
        table: the table.
        kinds: its columns for scalars, each with its type.
    """

    def __init__(self, table: sa.Table, kinds: Mapping[str, type]) -> None:
        self.table = table
        self.kinds = kinds

    def value(self, field: str, value: Any) -> Any:
        """What a scalar is in its column, `UNFIT` if it cannot be there.

        Numbers are what they equal: 10.0 in a column of integers is 10.
        """
        kind = self.kinds[field]
        if value is None:
            return None
        if kind is str:
            return _text(value) if isinstance(value, str) else UNFIT
        if not isinstance(value, int | float):
            return UNFIT
        try:
            number = kind(value)
        except (ValueError, OverflowError):
            return UNFIT
        inside = math.isfinite(number) if kind is float else number in _INT64
        return number if inside and number == value else UNFIT

    def row(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The columns' values of a document, all but ``seq``.

        Raises:
            InvalidInputError: a value is of another type than its column, or has no JSON form.
        """
        row: dict[str, Any] = {}
        for key, kind in self.kinds.items():
            value = row[key] = self.value(key, document.get(key))
            if value is UNFIT and kind is float and isinstance(document[key], int | float):
                row[key] = None  # numbers that are no double are looked for in the documents
            elif value is UNFIT or (key in ORDER and (value is None or is_digest(value))):
                raise InvalidInputError(
                    f"{key} must be {kind.__name__}, and fit its column", field=key
                )
        return {**row, "document": dump(document)}


def dump(document: Mapping[str, Any]) -> str:
    """A document as JSON text in ASCII.

    Raises:
        InvalidInputError: something in it has no JSON form, or it contains itself.
    """
    try:
        try:
            text = json.dumps(document, separators=(",", ":"))
            # two halves side by side would be read as one character
            odd = "\\ud" in text and _PAIR.search(json.dumps(document, ensure_ascii=False))
        except ValueError:  # an integer too long to be written in decimal, or a circle
            text, odd = MARK, None
        if not odd and MARK not in text:
            return text
        return json.dumps(json.loads(codec.dump_state(dict(document), field="document")))
    except (TypeError, RecursionError):
        raise InvalidInputError(
            "document holds a value without a JSON form, or is nested too deeply", field="document"
        ) from None


def load(text: str) -> dict[str, Any]:
    """The document of a stored text.

    Raises:
        DatabaseError: it is no JSON object.
    """
    try:
        return codec.load_state(text)
    except DatabaseError:
        raise DatabaseError("A stored document is not a JSON object.") from None


def holds_digest(column: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Whether a column holds the digest of a text and not the text."""
    return sa.and_(column >= MARK, column < _BEHIND)


def is_digest(value: Any) -> bool:
    """Whether a column's value is the digest of a text."""
    return isinstance(value, str) and value.startswith(MARK)


def _text(value: str) -> str:
    plain = str.__str__(value)  # an enumeration's member is bound as what it is
    whole = len(plain) <= LENGTH and not is_digest(plain) and not _NOT_TEXT.search(plain)
    encoded = plain.encode(errors="surrogatepass")
    if whole and len(encoded) <= LARGEST:
        return plain
    return f"{MARK}sha256:{hashlib.sha256(encoded).hexdigest()}"
