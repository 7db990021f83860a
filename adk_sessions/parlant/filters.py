"""Parlant's filters: SQL narrows as far as it can say the same, `matches_filters` decides.

A missing key counts as None, and a comparison that Python refuses, such as ``None > 3``, does not
match.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from parlant.core.persistence.common import Where, matches_filters

from ..errors import InvalidInputError
from .columns import UNFIT, Columns, holds_digest, is_digest

_LOGIC = {"$and": all, "$or": any}
_RANGES: dict[str, Callable[[Any, Any], Any]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_LISTS = ("$in", "$nin")
_TESTS = {"$eq", "$ne", *_LISTS, *_RANGES}
# SQLite refuses expressions that are nested deeper than 1000, parentheses from 40 on, and drivers
# 32,767 parameters. What is deeper is left to Python, which gives up at some hundreds.
_MOST_TESTS, _MOST_VALUES, _DEEP, _DEEPEST = 250, 20_000, 20, 100


class Narrowed(NamedTuple):
    """What SQL can say.

    Attributes:
        condition: true for every row that matches.
        exact: and for no other.
        equal: columns that are compared with given values, so that an index may find the rows.
    """

    condition: sa.ColumnElement[bool]
    exact: bool
    equal: frozenset[str] = frozenset()


_TRUE = sa.true()
_UNSAID = Narrowed(_TRUE, False)


class Filter:
    """A filter on a collection, narrowed as `Narrowed` says.

    Args:
        columns: of the collection.
        where: in Parlant's form.

    Raises:
        InvalidInputError: it has not that form.
    """

    def __init__(self, columns: Columns, where: Where) -> None:
        self._columns = columns
        self._where = cast("Mapping[str, Any]", where)
        self._tests_left, self._values_left = _MOST_TESTS, _MOST_VALUES
        _check(self._where)
        self.condition, self.exact, self.equal = self._narrow(self._where)

    def matches(self, document: Mapping[str, Any]) -> bool:
        """Whether a document is one that is looked for."""
        return self.exact or _matches(self._where, document)

    def _narrow(self, where: Mapping[str, Any], depth: int = 0) -> Narrowed:
        parts = []
        for key, value in where.items():
            if key in _LOGIC and depth == _DEEP:
                parts.append(_UNSAID)
            elif key == "$and":
                inner = _joined(value, "$ne", "$nin")
                parts.append(_all([self._narrow(each, depth + 1) for each in inner]))
            elif key == "$or":
                inner = _joined(value, "$eq", "$in")
                parts.append(_any([self._narrow(each, depth + 1) for each in inner]))
            else:
                parts += [self._test(key, *test) for test in value.items()]
        return _all(parts)

    def _test(self, field: str, test: str, operand: Any) -> Narrowed:
        kind = self._columns.kinds.get(field)
        values = list(operand) if test in _LISTS else [operand]
        if kind is None or not self._tests_left or len(values) > self._values_left:
            return _UNSAID
        self._tests_left -= 1
        self._values_left -= len(values)
        stored = [self._columns.value(field, value) for value in values]
        if any(value is UNFIT for value in stored):
            return _UNSAID
        column: sa.ColumnElement[Any] = self._columns.table.c[field]
        known = [value for value in stored if value is not None]
        if test in _RANGES:
            if kind is bool or not known or is_digest(known[0]):
                return _UNSAID
            found = _RANGES[test](column, known[0])
            if kind is str:
                return Narrowed(sa.or_(found, holds_digest(column)), False)
        elif test in ("$eq", "$in"):
            found = column.in_(known)
            found = found if len(known) == len(stored) else sa.or_(found, column.is_(None))
        elif len(known) == len(stored):
            found = sa.or_(column.is_(None), column.not_in(known))
        else:
            found = sa.and_(column.is_not(None), column.not_in(known))
        if kind is float:  # null also stands for numbers that the column cannot hold
            return Narrowed(sa.or_(found, column.is_(None)), False)
        return Narrowed(found, True, frozenset([field] if test in ("$eq", "$in") else []))


def _all(parts: Sequence[Narrowed]) -> Narrowed:
    said = [part.condition for part in parts if part.condition is not _TRUE]
    return Narrowed(
        sa.and_(*said) if said else _TRUE,
        all(part.exact for part in parts),
        frozenset[str]().union(*(part.equal for part in parts)),
    )


def _any(parts: Sequence[Narrowed]) -> Narrowed:
    if len(parts) == 1:
        return parts[0]
    said = [part.condition for part in parts]
    everything = any(condition is _TRUE for condition in said)
    condition = _TRUE if everything else sa.or_(sa.false(), *said)
    return Narrowed(condition, all(part.exact for part in parts))


def _joined(operands: Sequence[Mapping[str, Any]], one: str, many: str) -> list[Mapping[str, Any]]:
    """Operands that test one field for one value each, as one test for all of them.

    Parlant writes lists of ids so, and chains of them are too deep for SQLite.
    """
    values: dict[str, list[Any]] = {}
    others: list[Mapping[str, Any]] = []
    for operand in operands:
        field, tests = cast("tuple[str, Any]", next(iter(operand.items()), ("$and", ())))
        if len(operand) == 1 and field not in _LOGIC and list(tests) == [one]:
            values.setdefault(field, []).append(tests[one])
        else:
            others.append(operand)
    return [*({field: {many: found}} for field, found in values.items()), *others]


def _matches(where: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    return all(_holds(key, value, document) for key, value in where.items())


def _holds(key: str, value: Any, document: Mapping[str, Any]) -> bool:
    if key in _LOGIC:
        return _LOGIC[key](_matches(operand, document) for operand in value)
    try:
        return matches_filters(cast(Where, {key: value}), {key: document.get(key)})
    except TypeError:
        return False


def _check(where: Any, depth: int = 0) -> None:
    if not isinstance(where, Mapping) or depth > _DEEPEST:
        raise InvalidInputError("a filter is a mapping, of at most 100 levels", field="filters")
    for key, value in where.items():
        if key in _LOGIC and isinstance(value, list | tuple):
            for operand in value:
                _check(operand, depth + 1)
        elif key in _LOGIC or not isinstance(value, Mapping) or not value.keys() <= _TESTS:
            raise InvalidInputError(f"{key!r} is not followed by what it takes", field="filters")
        elif not all(isinstance(value.get(test, ()), list | tuple | set) for test in _LISTS):
            raise InvalidInputError(f"$in and $nin of {key!r} take a list", field="filters")
