"""The one JSON codec: what a database gives back is the same value and type on every database.

JSON columns differ. PostgreSQL's JSONB refuses NUL and lone surrogates, turns 1e16 into an integer
and -0.0 into 0.0; no JSON type holds NaN or infinity. So a value that one of them cannot hold is
written as a string that begins with `MARK`, on all of them alike, and becomes itself again on
reading:

    adk_sessions:float:nan      adk_sessions:int:0x1f…      adk_sessions:text:a%00b

A string that happens to begin with the mark is escaped likewise, so nothing is ever mistaken. In a
state this is done in place. An event stays readable for google-adk, whose fields are typed: its
``event_data`` has the offending character or number replaced, and the escaped form goes to a column
beside it, which is null for almost every event.

Fields that a newer version of an event's classes wrote are kept beside the event, each with the
object that it belongs to, and written back with it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import quote, unquote

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from .errors import DatabaseError, InvalidInputError
from .state import WIDER_PREFIXES

logger = logging.getLogger(__name__)

MARK = "adk_sessions:"
#: the ``error_code`` of an event that stands for one that cannot be read
UNREADABLE = "UNREADABLE_EVENT"
#: what `load_event` raises for a row that is no event
NO_EVENT = (ValidationError, ValueError, TypeError, RecursionError)

M = TypeVar("M", bound=BaseModel)

# What makes a second look necessary, searched in compact JSON text: anything that may have been
# lost (null where a NaN was) or that a JSONB would change. False alarms cost time, not truth.
_SUSPECTS = ("null", "NaN", "Infinity", "-0.0")
_AS_VALUE = re.compile(r"[:,\[](?:null|NaN|-?Infinity|-0\.0)[,}\]]")
# One for each first character: with a literal one the search jumps from place to place.
_EXPONENTS = [re.compile(first + r"-?\d+(?:\.\d+)?[eE]\+?\d") for first in (":", ",", r"\[")]
_LONG_INT = re.compile(r"\d{4300}")
_TEN_DIGITS = re.compile(r"\d{10}")
_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")
# Python converts no longer decimal than this by default; hexadecimal has no limit.
_LONG_INT_BITS = 14_000
_TOO_DEEP = "is nested too deeply, or contains itself"
# From pydantic 2.12 on validation can tell of fields that a model would ignore.
_TELLS = "extra" in inspect.signature(BaseModel.model_validate_json).parameters


class EventText(NamedTuple):
    """A stored event: ``data`` for every reader, ``exact`` where ``data`` had to differ."""

    data: str
    exact: str | None


def dumps(value: Any) -> str:
    """Compact JSON text; characters stay themselves."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def loads(text: str) -> Any:
    """The plain JSON value of a text, nothing unescaped."""
    return json.loads(text)


# --- states -------------------------------------------------------------------------------------


def dump_state(state: dict[str, Any], *, field: str = "state") -> str:
    """The JSON text of one scope's state or delta.

    Rich values take their JSON form (datetime as ISO text, sets and tuples as lists, bytes as
    text). A value with no JSON form becomes a string, with a warning that names its key.

    Args:
        state: keys without scope prefix.
        field: what to call the argument in an error.

    Raises:
        InvalidInputError: it is nested deeper than 255 levels, or contains itself.
    """
    try:
        try:
            plain = _jsonable(state)
        except (PydanticSerializationError, UnicodeDecodeError):
            plain = {key: _coerce(key, value) for key, value in state.items()}
        try:
            text = dumps(plain)
        except ValueError:  # an integer too long to be written in decimal
            text = dumps(_escape(plain))
    except (ValueError, RecursionError):
        raise InvalidInputError(f"{field} {_TOO_DEEP}", field=field) from None
    if _is_suspect(text) or not _is_unicode(text):
        text = dumps(_escape(plain))
    return text


def load_state(text: str | None) -> dict[str, Any]:
    """The state that `dump_state` or google-adk wrote; a missing one is empty."""
    if not text or text == "{}":
        return {}
    state = _object(text)
    return cast("dict[str, Any]", _unescape(state)) if MARK in text else state


def merge_state(text: str | None, delta: str, deletes: Iterable[str] = ()) -> str:
    """Stored state text with a delta's top-level keys set, both escaped as they are."""
    merged = {**(_object(text) if text else {}), **_object(delta)}
    for key in deletes:
        merged.pop(stored_key(key), None)
    try:
        return to_json(merged).decode()
    except ValueError:
        text = dumps(merged)
    # google-adk on SQLite writes a lone surrogate as JSON can, by its number
    return text if _is_unicode(text) else json.dumps(merged, separators=(",", ":"))


def stored_key(key: str) -> str:
    """A key of a state as it is in the stored text."""
    return cast(str, _escape_leaf(key))


def _object(text: str) -> dict[str, Any]:
    try:
        state = from_json(text)  # several times as fast as json, and the same
    except (ValueError, TypeError):
        try:
            state = json.loads(text)  # lone surrogates, deep nesting
        except ValueError:
            state = text  # the error itself would carry it
    if not isinstance(state or {}, dict):
        raise DatabaseError(
            "A stored state is not a JSON object; adk-sessions doctor lists all such states."
        )
    return state or {}


def _coerce(key: str, value: Any) -> Any:
    try:
        return _jsonable(value)
    except (PydanticSerializationError, UnicodeDecodeError):
        logger.warning("state key %r holds a value without a JSON form; a string is stored", key)
    try:
        return _jsonable(value, bytes_mode="base64", serialize_unknown=True)
    except PydanticSerializationError:
        return _text_of(value)


def _text_of(value: Any) -> str:
    try:
        return repr(value)
    except Exception:
        return object.__repr__(value)


def _jsonable(value: Any, **options: Any) -> Any:
    """A value in its JSON form, floats and strings kept even where JSON has no place for them."""
    try:
        return to_jsonable_python(value, inf_nan_mode="constants", **options)
    except UnicodeEncodeError:  # a lone surrogate in a nested key
        if isinstance(value, dict):
            return {
                key if isinstance(key, str) else next(iter(_jsonable({key: None}))): _jsonable(
                    item, **options
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [_jsonable(item, **options) for item in value]
        raise


# --- events -------------------------------------------------------------------------------------


def dump_event(event: BaseModel) -> EventText:
    """An event as google-adk would store it, and its exact form where that loses something.

    Raises:
        InvalidInputError: it is nested deeper than 255 levels, or contains itself; a field was
            assigned what it cannot hold; or it stands for an event that could not be read.
    """
    beside = event.__pydantic_extra__
    if event.__dict__.get("error_code", (beside or {}).get("error_code")) == UNREADABLE:
        raise InvalidInputError(
            "this event stands for a stored one that cannot be read, and cannot be stored itself",
            field="event",
        )
    newer = beside is not None and not _allows(event)
    doubtful = False
    try:
        text = event.model_dump_json(exclude_none=True, warnings="error")
    except (PydanticSerializationError, ValueError):
        doubtful = True  # a lone surrogate, a value without a JSON form or of another type
    else:
        # in a key a lone surrogate has been replaced without a word
        if not newer and "\ufffd" not in text and not _is_suspect(text):
            return EventText(text, None)
    odd: list[str] = []

    def as_string(value: Any) -> str:
        odd.append(type(value).__name__)
        return _text_of(value)

    try:
        plain = event.model_dump(exclude_none=True, fallback=_text_of, warnings=False)
        try:
            tree = event.model_dump(
                mode="json", exclude_none=True, fallback=as_string, warnings=False
            )
        except (UnicodeEncodeError, PydanticSerializationError):
            tree = _jsonable(plain, bytes_mode="base64", serialize_unknown=True)
        true = _restore(tree, plain)
        if newer:
            _put_back(event, true)
        data, exact = dumps(_clean(true)), dumps(_escape(true))
    except (PydanticSerializationError, ValueError, RecursionError):
        raise InvalidInputError(f"event {_TOO_DEEP}", field="event") from None
    if odd:
        name = getattr(event, "id", "")
        logger.warning("event %r: %s without a JSON form; strings are stored", name, odd)
    stored = EventText(data, None if data == exact else exact)
    if doubtful:
        _require_readable(type(event), stored)
    return stored


def _require_readable(event_type: type[BaseModel], stored: EventText) -> None:
    """Refuses what no reader could make an event of: pydantic does not look at assignments."""
    field = None
    try:
        load_event(event_type, *stored)
    except ValidationError as error:
        field = ".".join(["event", *map(str, error.errors(include_input=False)[0]["loc"])])
    if field is not None:
        raise InvalidInputError(f"{field} has been assigned what it cannot hold", field=field)


def load_event(
    event_type: type[M],
    data: str | None,
    exact: str | None,
    validate_json: Callable[..., M] | None = None,
) -> M:
    """The event of a stored row; fields that its classes do not know are kept beside.

    Args:
        event_type: the event's class.
        data: the row's JSON.
        exact: the row's exact form, if it has one.
        validate_json: makes the event of its JSON; the class itself if None.

    Raises:
        Those of `NO_EVENT`: the text is not such an event; `reason` tells why.
    """
    if exact is not None:
        return _load(event_type, _unescape(json.loads(exact)))
    if data is None:
        raise ValueError
    try:
        return (validate_json or event_type.model_validate_json)(data, **_telling(event_type))
    except ValidationError:
        pass
    # newer fields, or what strict JSON forbids but google-adk on SQLite writes: lone surrogates
    return _load(event_type, json.loads(data))


def reason(error: Exception, event_type: type[BaseModel]) -> str:
    """Why a row is no event, in a few words without anything that is stored in it."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = next(iter(first["loc"]), None)
        if field is None:
            return f"not an event ({first['type']})"
        known = any(field in (name, f.alias) for name, f in event_type.model_fields.items())
        return f"{field if known else 'a field'} is not valid ({first['type']})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "empty" if type(error) is ValueError else "not JSON"


def author_of(text: str | None) -> str | None:
    """The author of a stored event, though it is unreadable, if it can be told."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        author = json.loads(text or "")["author"]
        return author if isinstance(author, str) and author else None
    return None


def stand_in(event_type: type[M], author: str, why: str, **row: Any) -> M:
    """An event that stands for one that cannot be read; `dump_event` refuses it.

    Args:
        event_type: its class; fields that it does not know are attributes all the same.
        author: of the event, as far as it can be told.
        why: what `reason` says.
        row: the fields that are columns.
    """
    said = {"error_code": UNREADABLE, "error_message": f"The stored event cannot be read: {why}."}
    fields = {**row, "author": author, **said}
    known = fields.keys() if _allows(event_type) else event_type.model_fields.keys()
    given = {name: value for name, value in fields.items() if name in known}
    try:
        event = event_type.model_validate(given)
    except ValidationError:  # the class needs more than the store knows of
        event = event_type.model_construct(**given)
    if not said.keys() <= known:
        object.__setattr__(event, "__pydantic_extra__", said)
    return event


def same_event(one: EventText, other: EventText) -> bool:
    """Whether two stored forms are the same event; key order and JSONB's spelling do not matter.

    What a rewind sets in the session's own state is computed when it is stored, so it does not
    matter either.
    """
    try:
        first, second = (
            json.dumps(_without_rewound(json.loads(text.exact or text.data)), sort_keys=True)
            for text in (one, other)
        )
    except (ValueError, TypeError, RecursionError):
        return False  # what is stored is damaged
    return first == second


def _without_rewound(event: Any) -> Any:
    actions = event.get("actions") if isinstance(event, dict) else None
    if isinstance(actions, dict) and actions.get("rewind_before_invocation_id"):
        delta = actions.get("state_delta")
        if isinstance(delta, dict):
            wider = {key: value for key, value in delta.items() if key.startswith(WIDER_PREFIXES)}
            return {**event, "actions": {**actions, "state_delta": wider}}
    return event


# --- fields that a newer version wrote ----------------------------------------------------------
#
# pydantic has a slot for the fields that a class does not know, and uses it only where the class
# allows such fields. Elsewhere it is free: copies, deep copies and pickles take it along, dumps do
# not show it. The event's own slot is set, if only to an empty dict, where one inside it is.
# An event whose class allows unknown fields has no such sign, so nothing is taken out of it.


def _load(event_type: type[M], tree: Any) -> M:
    taken: list[tuple[tuple[Any, ...], Any]] = []
    while True:
        try:
            event = event_type.model_validate(tree, **_telling(event_type))
            break
        except ValidationError as error:
            unknown = [] if _allows(event_type) else _take_out(tree, error)
            if not unknown:
                raise
            taken += unknown
    for path, value in taken:
        _put_beside(event, path, value)
    return event


@functools.cache
def _telling(event_type: type[BaseModel]) -> dict[str, Any]:
    """Options of a validation that must not drop a field in silence."""
    return {} if _allows(event_type) or not _TELLS else {"extra": "forbid"}


def _allows(model: BaseModel | type[BaseModel]) -> bool:
    return model.model_config.get("extra") == "allow"


def _take_out(tree: Any, error: ValidationError) -> list[tuple[tuple[Any, ...], Any]]:
    """Takes out of a document what is wrong with it, if that is nothing but unknown fields."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if any(line["type"] != "extra_forbidden" for line in details):
        return []
    taken = []
    for path in {_find(tree, line["loc"]) for line in details}:
        if path is not None:
            owner = functools.reduce(lambda node, key: node[key], path[:-1], tree)
            taken.append((path, owner.pop(path[-1])))
    return taken


def _find(node: Any, location: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The keys of a location of pydantic's, which also names members of unions and validators."""
    if not location:
        return ()
    key, rest = location[0], location[1:]
    is_item = isinstance(node, list) and isinstance(key, int) and key < len(node) and rest
    if is_item or (isinstance(node, dict) and key in node):
        path = _find(node[key], rest)
        if path is not None:
            return (key, *path)
    return _find(node, rest) if rest else None


def _put_beside(event: BaseModel, path: tuple[Any, ...], value: Any) -> None:
    owner: Any = event
    for key in path[:-1]:
        if isinstance(owner, BaseModel):
            fields = type(owner).model_fields.items()
            key = next((name for name, f in fields if key in (name, f.alias)), key)
            owner = owner.__dict__
        owner = owner[key]
    if not isinstance(owner, BaseModel):
        raise TypeError
    if event.__pydantic_extra__ is None:
        object.__setattr__(event, "__pydantic_extra__", {})
    beside = {**(owner.__pydantic_extra__ or {}), path[-1]: value}
    object.__setattr__(owner, "__pydantic_extra__", beside)
    if _allows(owner):
        owner.model_fields_set.add(path[-1])


def _put_back(value: Any, tree: Any) -> None:
    """Adds what is kept beside objects to their JSON."""
    if isinstance(value, BaseModel) and isinstance(tree, dict):
        _put_back(value.__dict__, tree)
        for key, item in (value.__pydantic_extra__ or {}).items():
            tree.setdefault(key, item)
    elif isinstance(value, dict) and isinstance(tree, dict):
        for key, item in value.items():
            if key in tree:
                _put_back(item, tree[key])
    elif isinstance(value, list | tuple) and isinstance(tree, list) and len(value) == len(tree):
        for item, part in zip(value, tree, strict=True):
            _put_back(item, part)


def _restore(tree: Any, plain: Any) -> Any:
    """JSON mode turns NaN and infinity into null: puts back what the Python dump still has."""
    if tree is None and isinstance(plain, float):
        return plain
    if isinstance(tree, dict) and isinstance(plain, dict) and len(tree) == len(plain):
        # a string key is taken from the Python dump too: JSON mode replaces lone surrogates
        return {
            was if isinstance(was, str) else key: _restore(value, plain[was])
            for (key, value), was in zip(tree.items(), plain, strict=True)
        }
    if isinstance(tree, list) and isinstance(plain, list | tuple) and len(tree) == len(plain):
        return [_restore(value, was) for value, was in zip(tree, plain, strict=True)]
    return tree


# --- escaping -----------------------------------------------------------------------------------


def _walk(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {leaf(key): _walk(item, leaf) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, leaf) for item in value]
    return leaf(value)


def _escape(value: Any) -> Any:
    return _walk(value, _escape_leaf)


def _unescape(value: Any) -> Any:
    return _walk(value, _unescape_leaf)


def _clean(value: Any) -> Any:
    return _walk(value, _clean_leaf)


def _escape_leaf(leaf: Any) -> Any:
    if isinstance(leaf, str):
        if leaf.startswith(MARK) or "\0" in leaf or not _is_unicode(leaf):
            return f"{MARK}text:{quote(leaf, safe=' ', errors='surrogatepass')}"
    elif isinstance(leaf, float):
        if (
            not math.isfinite(leaf)
            or abs(leaf) >= 1e16
            or (not leaf and math.copysign(1, leaf) < 0)
        ):
            return f"{MARK}float:{leaf!r}"
    elif isinstance(leaf, int) and leaf.bit_length() > _LONG_INT_BITS:
        return f"{MARK}int:{leaf:#x}"
    return leaf


def _unescape_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, str) or not leaf.startswith(MARK):
        return leaf
    kind, _, rest = leaf.removeprefix(MARK).partition(":")
    try:
        match kind:
            case "text":
                return unquote(rest, errors="surrogatepass")
            case "float":
                return float(rest)
            case "int":
                return int(rest, 16)
    except ValueError:
        pass
    return leaf  # written by somebody else


def _clean_leaf(leaf: Any) -> Any:
    if isinstance(leaf, str) and ("\0" in leaf or not _is_unicode(leaf)):
        return _NOT_STORABLE.sub("\ufffd", leaf)
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return None
    if isinstance(leaf, int) and leaf.bit_length() > _LONG_INT_BITS:
        return hex(leaf)
    return leaf


def _is_suspect(text: str) -> bool:
    # plain searches first: as alternatives of one expression they take three times as long
    if "\\u0000" in text or MARK in text:
        return True
    for exponent in _EXPONENTS:
        if exponent.search(text):
            return True
    for suspect in _SUSPECTS:
        if suspect in text and _AS_VALUE.search(text):
            return True
    # a run of 4,300 digits covers ten of every 430th character: seldom in a long text
    return (
        len(text) >= 4300
        and _TEN_DIGITS.search(text[429::430]) is not None
        and _LONG_INT.search(text) is not None
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
