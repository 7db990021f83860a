"""Changes of a state outside of a conversation: keys that are set, added to and deleted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from . import checks, codec
from . import state as states
from .errors import InvalidInputError


class Change(NamedTuple):
    """What happens to the state of one scope, keys without their prefix."""

    sets: dict[str, Any]
    adds: dict[str, int | float]
    deletes: list[str]

    def values(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that are written, with their new values.

        Args:
            stored: the state, decoded; only the keys in ``adds`` are looked at.

        Raises:
            InvalidInputError: the value of a key in ``adds`` is not a number.
        """
        return self.sets | {key: _sum(stored, key, amount) for key, amount in self.adds.items()}


class Changes(NamedTuple):
    """The change of each scope, None where there is none."""

    app: Change | None
    user: Change | None
    session: Change | None


def changes(
    delta: dict[str, Any] | None,
    add: dict[str, int | float] | None,
    delete: Iterable[str] | None,
) -> Changes:
    """Sorts prefixed keys into the changes of their scopes.

    Raises:
        InvalidInputError: a key is not a string that can be stored, is a ``temp:`` one or there
            twice, or an amount is not a number.
    """
    if isinstance(delete, str | bytes) or not isinstance(delete or (), Iterable):
        raise InvalidInputError("delete must be a list of keys", field="delete")
    removed = list(delete or ())
    for key in removed:
        if not isinstance(key, str):
            raise InvalidInputError("delete has a key that is not a string", field="delete")
    given: dict[str, dict[str, Any]] = {
        "delta": {} if delta is None else delta,
        "add": {} if add is None else add,
        "delete": dict.fromkeys(removed),
    }
    seen: set[str] = set()
    for field, keys in given.items():
        checks.check_state(keys, field)
        if temporary := states.only_temp(keys):
            key = next(iter(temporary))
            raise InvalidInputError(f"{field} has the key {key!r}: it is never stored", field=field)
        if twice := seen & keys.keys():
            raise InvalidInputError(
                f"the key {min(twice)!r} is to be changed in two ways", field=field
            )
        seen |= keys.keys()
    for key, amount in given["add"].items():
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise InvalidInputError(f"the amount for {key!r} must be a number", field="add")
    scopes = zip(*(states.split(given[field]) for field in ("delta", "add", "delete")), strict=True)
    return Changes(
        *(
            Change(sets, adds, list(deletes)) if sets or adds or deletes else None
            for sets, adds, deletes in scopes
        )
    )


def encode(change: Change, stored: Mapping[str, Any]) -> str:
    """The JSON text of `Change.values`."""
    return codec.dump_state(change.values(stored), field="delta")


def removed(change: Change) -> str | None:
    """The JSON text of the keys that a change deletes; None if there are none."""
    if not change.deletes:
        return None
    return codec.dump_state(dict.fromkeys(change.deletes, True), field="delete")


def merged(written: Iterable[str | None]) -> dict[str, Any]:
    """What `encode` gave for app, user and session as one dict, keys with their prefixes."""
    return states.merge(states.Scopes(*map(codec.load_state, written)))


def _sum(stored: Mapping[str, Any], key: str, amount: int | float) -> int | float:
    value = stored.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(f"the state's key {key!r} is not a number", field="add")
    try:
        return value + amount
    except OverflowError:
        raise InvalidInputError(
            f"the state's key {key!r} is an integer too large to be added to as a double",
            field="add",
        ) from None
