"""What is refused before anything is written, the same on every database.

The limits are those of google-adk's tables (128 characters for a key, 256 for an invocation id) and
of what every database can compare: no NUL, no lone surrogate in a key.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from .errors import InvalidInputError

KEY_LENGTH = 128
TEXT_LENGTH = 256

_LAST = datetime(9000, 1, 1, tzinfo=UTC).timestamp()


def check_key(value: object, field: str, *, limit: int = KEY_LENGTH) -> None:
    """Refuses what is not a text of at most ``limit`` characters that a key column can hold."""
    if not isinstance(value, str):
        raise InvalidInputError(f"{field} must be a string", field=field)
    if len(value) > limit:
        raise InvalidInputError(
            f"{field} is {len(value)} characters long; at most {limit} are stored", field=field
        )
    _check_characters(value, field, "")


def are_keys(*values: str) -> bool:
    """Whether rows with these keys can exist; a reader takes what cannot for unknown."""
    for value in values:
        if not isinstance(value, str):
            raise InvalidInputError("an id must be a string", field="id")
        try:
            check_key(value, "id")
        except InvalidInputError:
            return False
    return True


def check_state(state: object, field: str) -> None:
    """Refuses a state or delta that is not a dict with storable strings as its keys."""
    if not isinstance(state, dict):
        raise InvalidInputError(f"{field} must be a dict", field=field)
    for key in state:
        if not isinstance(key, str):
            raise InvalidInputError(f"{field} has a key that is not a string", field=field)
        _check_characters(key, field, "a key of ")


def check_timestamp(value: object, field: str) -> None:
    """Refuses an event time that is not finite or lies outside the years 1970 to 9000."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _LAST:
        raise InvalidInputError(
            f"{field} must be seconds since the epoch, in the years 1970 to 9000", field=field
        )


def check_filters(num_recent_events: object, after_timestamp: object) -> None:
    """Refuses a reader's filter that is not a number that can be counted or compared with."""
    if num_recent_events is not None and (
        not isinstance(num_recent_events, int) or num_recent_events < 0
    ):
        raise InvalidInputError(
            "num_recent_events must be a whole number, not negative", field="num_recent_events"
        )
    if after_timestamp is not None and (
        not isinstance(after_timestamp, int | float) or after_timestamp != after_timestamp
    ):
        raise InvalidInputError(
            "after_timestamp must be seconds since the epoch", field="after_timestamp"
        )


def check_one_of(value: object, known: tuple[object, ...], field: str) -> None:
    """Refuses what is not one of a few strings or constants; 0 is not False."""
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise InvalidInputError(f"{field} must be {' or '.join(map(repr, known))}", field=field)


def check_event(event: Any) -> None:
    """Refuses an event whose own fields cannot be stored."""
    check_key(event.id, "event.id")
    check_key(event.invocation_id, "event.invocation_id", limit=TEXT_LENGTH)
    check_timestamp(event.timestamp, "event.timestamp")
    if event.actions and event.actions.state_delta is not None:
        check_state(event.actions.state_delta, "event.actions.state_delta")


def _check_characters(text: str, field: str, part: str) -> None:
    if "\0" in text:
        raise InvalidInputError(f"{part}{field} contains a NUL character", field=field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{part}{field} contains a lone surrogate", field=field) from None
