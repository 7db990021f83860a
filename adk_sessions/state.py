"""State of three scopes, as pure functions on dicts.

A key with the prefix ``app:`` is shared by every user of the app, ``user:`` by every session of
the user, ``temp:`` lives in memory for one run and is never stored; any other key belongs to the
session. Storage holds the keys of a scope without its prefix, callers see them with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

APP_PREFIX = "app:"
USER_PREFIX = "user:"
TEMP_PREFIX = "temp:"
#: of every key that is not the session's own
WIDER_PREFIXES = (APP_PREFIX, USER_PREFIX, TEMP_PREFIX)


class Scopes(NamedTuple):
    """One dict for each stored scope, keys without prefix."""

    app: dict[str, Any]
    user: dict[str, Any]
    session: dict[str, Any]


def split(state: Mapping[str, Any]) -> Scopes:
    """Sorts prefixed keys into their scopes; ``temp:`` keys are dropped."""
    scopes = Scopes({}, {}, {})
    for key, value in state.items():
        if key.startswith(APP_PREFIX):
            scopes.app[key.removeprefix(APP_PREFIX)] = value
        elif key.startswith(USER_PREFIX):
            scopes.user[key.removeprefix(USER_PREFIX)] = value
        elif not key.startswith(TEMP_PREFIX):
            scopes.session[key] = value
    return scopes


def merge(scopes: Scopes) -> dict[str, Any]:
    """The one dict a caller sees; a session key can never shadow one of the wider scopes."""
    merged = dict(scopes.session)
    for key, value in scopes.app.items():
        merged[APP_PREFIX + key] = value
    for key, value in scopes.user.items():
        merged[USER_PREFIX + key] = value
    return merged


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of decoded JSON, with nested dicts and lists of its own."""
    # several times as fast as copy.deepcopy, which looks for what cannot be in JSON
    return {
        key: _copied(value) if isinstance(value, dict | list) else value
        for key, value in state.items()
    }


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return copied(value)
    return [_copied(item) if isinstance(item, dict | list) else item for item in value]


def only_temp(state: Mapping[str, Any]) -> dict[str, Any]:
    """The ``temp:`` keys of a state."""
    return {key: value for key, value in state.items() if key.startswith(TEMP_PREFIX)}


def without_temp(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without its ``temp:`` keys."""
    return {key: value for key, value in state.items() if not key.startswith(TEMP_PREFIX)}
