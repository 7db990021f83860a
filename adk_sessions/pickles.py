"""Pickled EventActions, read without running anything of what the pickle names.

google-adk's old layout keeps an event's actions as a pickle, which is a program. Here it is looked
through before it runs, and every class that it names is replaced by a stand-in that records what it
was given; what the records mean is decided afterwards. Classes outside a short list are refused.
"""

from __future__ import annotations

import base64
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, ClassVar
from uuid import UUID

from pydantic_core import PydanticSerializationError, to_jsonable_python

from .errors import SchemaError

__all__ = ["PickleRefusedError", "load_actions"]

ACTIONS = ("google.adk.events.event_actions", "EventActions")

# Modules whose classes, models and enums, are fields and values of actions.
_MODELS = {
    "google.adk.auth.auth_credential",
    "google.adk.auth.auth_schemes",
    "google.adk.auth.auth_tool",
    "google.adk.events.event_actions",
    "google.adk.events.ui_widget",
    "google.adk.tools.tool_confirmation",
    "google.genai.types",
    "fastapi.openapi.models",
}
_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{0,99}")
# A field that no google-adk has would make the whole session unreadable for it.
_FIELDS = {
    *("skip_summarization", "state_delta", "artifact_delta", "transfer_to_agent", "escalate"),
    *("transfer_reason", "requested_auth_configs", "requested_tool_confirmations", "compaction"),
    *("end_of_agent", "agent_state", "rewind_before_invocation_id", "route", "render_ui_widgets"),
    "set_model_response",
}
# Always in what google-adk stores, empty or not.
_DICTS = ("state_delta", "artifact_delta", "requested_auth_configs", "requested_tool_confirmations")
# Enums that a pickle of some Python releases names by member: the values that differ from it.
_MEMBERS = {
    "AuthCredentialTypes": {
        "API_KEY": "apiKey",
        "HTTP": "http",
        "OAUTH2": "oauth2",
        "OPEN_ID_CONNECT": "openIdConnect",
        "SERVICE_ACCOUNT": "serviceAccount",
    },
    "OAuthGrantType": {
        name.upper(): name
        for name in ("client_credentials", "authorization_code", "implicit", "password")
    },
}

# What pickles of protocol 4 and 5, which all releases wrote, are made of. Not among it: persistent
# ids, the extension registry, buffers from elsewhere, and the numbered memo of older protocols,
# with which a few bytes allocate gigabytes (BINPUT has one byte for the number).
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES"),
    *("BINBYTES8", "BYTEARRAY8", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "EMPTY_LIST"),
    *("APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT"),
    *("DICT", "LIST", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET", "BINGET"),
    *("LONG_BINGET", "BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ"),
    "NEWOBJ_EX",
}
# One shared list can stand in many places: what a pickle may grow to when they are written out, in
# characters and per value, and for each of its bytes.
_ROOM = 4 * 2**20
_GROWTH = 16
# Bits: to write a number in decimal takes the square of its length.
_LONGEST_INT = 2**16

# What makes an object of many bytes of one byte, and how many of these there may be.
_MAKES = {"EMPTY_SET", "EMPTY_DICT", "EMPTY_LIST", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "FROZENSET"} | {
    *("DICT", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "STACK_GLOBAL", "GLOBAL"),
}
_OBJECTS = 250_000
_CLASSES = 10_000


class PickleRefusedError(SchemaError):
    """A pickle holds what actions do not hold.

    Attributes:
        name: ``module.name`` of the class that was asked for, or what else is wrong with it.
    """

    def __init__(self, name: str) -> None:
        self.name = re.sub(r"[^ -~]", "?", name)[:120]
        super().__init__(f"A pickle of event actions was refused: {self.name}")


def load_actions(data: bytes) -> dict[str, Any]:
    """The JSON form of pickled EventActions, as google-adk's schema version 1 has it.

    Floats may be NaN or infinite, and texts may hold what not every database stores; the codec
    takes care of that.

    Args:
        data: protocol 4 or 5, as SQLAlchemy's PickleType or google-adk's own type wrote it.

    Raises:
        PickleRefusedError: it names another class than actions hold, or is no pickle of actions.
    """
    failure = "it is not a pickle, or a damaged one"
    try:
        _look_through(data)
        loaded = _Unpickler(io.BytesIO(data)).load()
        return _actions(loaded, _Writer(_ROOM + _GROWTH * len(data)))
    except PickleRefusedError:
        raise
    except RecursionError:
        failure = "it is nested too deeply"
    except MemoryError:
        failure = "it takes too much memory"
    except Exception:
        pass  # hostile bytes fail in any way, and the error may quote them
    raise PickleRefusedError(failure)


def _look_through(data: bytes) -> None:
    objects = classes = 0
    for opcode, argument, _ in pickletools.genops(data):
        objects += opcode.name in _MAKES
        classes += opcode.name in ("GLOBAL", "STACK_GLOBAL")
        if objects > _OBJECTS or classes > _CLASSES:
            raise PickleRefusedError("too many objects")
        if opcode.name not in _OPCODES:
            raise PickleRefusedError(f"the opcode {opcode.name}")
        if opcode.name == "GLOBAL":
            _stand_in(*str(argument).split(" ", 1))


class _Pairs(list[Any]):
    """A dict as its items: to hash a key that a pickle has made can take forever, or the stack."""

    __slots__ = ()


class _Members(list[Any]):
    """A set as its members, for the same reason."""

    __slots__ = ()


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


class _Unpickler(pickle._Unpickler):
    """The interpreter that is written in Python, so that nothing it loads is ever hashed."""

    stack: list[Any]
    append: Any
    pop_mark: Any

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        return _stand_in(module, name)

    def _on_top(self, kind: type[Any]) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise PickleRefusedError("what is put into something else than it is for")
        return self.stack[-1]

    def load_empty_dictionary(self) -> None:
        self.append(_Pairs())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_Pairs(_pairs(items)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._on_top(_Pairs).append((key, value))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._on_top(_Pairs).extend(_pairs(items))

    def load_empty_set(self) -> None:
        self.append(_Members())

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._on_top(_Members).extend(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # first: it puts another stack in place
        self.append(_Members(items))

    def load_build(self) -> None:
        state = self.stack.pop()
        self._on_top(_Record).__setstate__(state)

    def load_newobj_ex(self) -> None:
        keywords, arguments, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if len(keywords) > len(_FIELDS):
            raise PickleRefusedError("too many keywords")
        self.append(cls.__new__(cls, *arguments, **_mapping(keywords)))

    for _opcode, _load in (
        (pickle.EMPTY_DICT, load_empty_dictionary),
        (pickle.DICT, load_dict),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.EMPTY_SET, load_empty_set),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.BUILD, load_build),
        (pickle.NEWOBJ_EX, load_newobj_ex),
    ):
        dispatch[_opcode[0]] = _load
    del _opcode, _load


# --- stand-ins --------------------------------------------------------------------------------


class _Record:
    """What a pickle made of a class: the arguments and the state that were for it."""

    __slots__ = ("arguments", "keywords", "state")
    module = name = ""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    state: Any

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Record:
        self = object.__new__(cls)
        self.arguments, self.keywords, self.state = arguments, keywords, None
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict(_Pairs):
    """An OrderedDict or defaultdict: the factory of the latter is of no use here."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> _Dict:
        return list.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


@lru_cache(1024)
def _stand_in(module: str, name: str) -> type:
    if (module, name) in (("collections", "OrderedDict"), ("collections", "defaultdict")):
        return _Dict
    if (module in _MODELS and _CLASS.fullmatch(name)) or (module, name) in _VALUES:
        return type("StandIn", (_Record,), {"__slots__": (), "module": module, "name": name})
    raise PickleRefusedError(f"{module}.{name}")


def _zone(offset: timedelta, name: str | None = None) -> timezone:
    return timezone(offset) if name is None else timezone(offset, name)


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, _Record) and kind.module in _MODELS):
        raise PickleRefusedError("builtins.getattr")
    return _MEMBERS.get(kind.name, {}).get(name, name)


# Values of the standard library: how each is made of plain arguments, and the types of these.
_VALUES: dict[tuple[str, str], tuple[Callable[..., Any], tuple[type, ...]]] = {
    ("builtins", "set"): (list, (list, tuple)),
    ("builtins", "frozenset"): (list, (list, tuple)),
    ("builtins", "list"): (list, (list, tuple)),
    ("builtins", "tuple"): (list, (list, tuple)),
    ("builtins", "dict"): (_Pairs, (_Pairs,)),
    ("builtins", "bytearray"): (bytes, (bytes,)),
    ("builtins", "bytes"): (bytes, (bytes,)),
    ("builtins", "str"): (str, (str,)),
    ("builtins", "int"): (int, (int,)),
    ("builtins", "float"): (float, (float,)),
    ("builtins", "bool"): (bool, (int,)),
    ("builtins", "complex"): (complex, (float,)),
    ("builtins", "getattr"): (_member, (type, str)),
    ("datetime", "date"): (date, (bytes,)),
    ("datetime", "datetime"): (datetime, (bytes, timezone)),
    ("datetime", "time"): (time, (bytes, timezone)),
    ("datetime", "timedelta"): (timedelta, (int,)),
    ("datetime", "timezone"): (_zone, (timedelta, str)),
    ("decimal", "Decimal"): (Decimal, (str,)),
    **{
        (module, name): (_path if "Posix" in name else _windows_path, (str,))
        for module in ("pathlib", "pathlib._local")
        for name in ("PurePosixPath", "PosixPath", "PureWindowsPath", "WindowsPath")
    },
    ("uuid", "UUID"): (UUID, ()),
}


# --- what the records mean --------------------------------------------------------------------


def _actions(loaded: Any, writer: _Writer) -> dict[str, Any]:
    if not isinstance(loaded, _Record) or (loaded.module, loaded.name) != ACTIONS:
        raise PickleRefusedError("it holds no EventActions")
    actions = writer.write(loaded)
    if not actions.keys() <= _FIELDS:
        raise PickleRefusedError("it has a field that EventActions does not have")
    if not all(isinstance(actions.setdefault(name, {}), dict) for name in _DICTS):
        raise PickleRefusedError("it has a field of EventActions with another type")
    return dict(actions)


class _Writer:
    """Writes records and plain values out as JSON, as far as the room goes."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._inside: set[int] = set()

    def write(self, value: Any, *, binary: bool = False) -> Any:
        """JSON of a value.

        Args:
            value: what was loaded.
            binary: whether bytes are those of a model that writes them as base64.
        """
        self._take(_GROWTH)
        if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
            raise PickleRefusedError("a number of too many digits")
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            self._take(len(value))
            return value
        if isinstance(value, bytes | bytearray):
            self._take(2 * len(value))
            return _text(bytes(value), binary)
        if id(value) in self._inside:
            raise PickleRefusedError("it contains itself")
        self._inside.add(id(value))
        try:
            if isinstance(value, _Pairs):
                return self._items(value, binary)
            if isinstance(value, list | tuple):
                return [self.write(item, binary=binary) for item in value]
            if isinstance(value, _Record):
                return self._record(value, binary)
        finally:
            self._inside.discard(id(value))
        raise PickleRefusedError("a class itself, not a value")

    def _record(self, record: _Record, binary: bool) -> Any:
        if record.module not in _MODELS:
            made = _value(record)
            return self.write(made if isinstance(made, _PLAIN) else _jsonable(made), binary=binary)
        if record.keywords:
            raise PickleRefusedError(f"{record.module}.{record.name} with keywords")
        if record.state is None and len(record.arguments) == 1:
            return self.write(record.arguments[0])  # an enum's member, by value
        state = record.state
        if record.arguments or not isinstance(state, _Pairs):
            raise PickleRefusedError(f"{record.module}.{record.name} in an unknown form")
        state = _mapping(state)
        fields = {**_mapping(state.get("__dict__")), **_mapping(state.get("__pydantic_extra__"))}
        binary = record.module == "google.genai.types"
        return self._items(((k, v) for k, v in fields.items() if v is not None), binary)

    def _items(self, items: Iterable[tuple[Any, Any]], binary: bool) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for key, value in items:
            if isinstance(key, _Record):
                key = self.write(key)
            if isinstance(key, tuple):
                key = ",".join(str(self.write(part)) for part in key) if len(key) < 100 else None
            if not isinstance(key, str):
                self.write(key)  # not too long a number
                key = str(next(iter(_jsonable({key: None}))))
            self._take(len(key))
            written[key] = self.write(value, binary=binary)
        return written

    def _take(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise PickleRefusedError("it grows too large when it is written out")


_PLAIN = (type(None), bool, int, float, str, bytes, list, dict)


def _value(record: _Record) -> Any:
    """The value of the standard library that a record describes; its arguments are looked at."""
    make, types = _VALUES[record.module, record.name]
    if record.name == "UUID":
        number = _mapping(record.state).get("int")
        if record.arguments or type(number) is not int:
            raise PickleRefusedError("uuid.UUID in an unknown form")
        return UUID(int=number)
    arguments = [_value(a) if _is_value(a) else a for a in record.arguments]
    if record.keywords or not all(isinstance(argument, types) for argument in arguments):
        raise PickleRefusedError(f"{record.module}.{record.name} in an unknown form")
    return make(*arguments)


def _is_value(argument: Any) -> bool:
    return isinstance(argument, _Record) and argument.module not in _MODELS


def _mapping(value: Any) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, _Pairs):
        raise PickleRefusedError("a state in an unknown form")
    if not all(isinstance(key, str) for key, _ in value):
        raise PickleRefusedError("a state in an unknown form")
    return dict(value)


def _jsonable(value: Any) -> Any:
    return to_jsonable_python(value, inf_nan_mode="constants")


def _text(data: bytes, binary: bool) -> str:
    if not binary:
        try:
            return str(to_jsonable_python(data))
        except (PydanticSerializationError, UnicodeDecodeError):
            pass
    return base64.urlsafe_b64encode(data).decode()
