"""Sessions as lines of text that any other database can take: NDJSON, one JSON object in a line.

    {"type":"header","format":"adk-sessions","version":1,"app_name":"shop","user_id":null,
     "session_id":null,"sessions":1,"time":"2026-01-31T12:00:00.000000"}
    {"type":"app_state","app_name":"shop","update_time":"…","state":{…}}
    {"type":"user_state","app_name":"shop","user_id":"ann","update_time":"…","state":{…}}
    {"type":"session","app_name":"shop","user_id":"ann","id":"s1","create_time":"…",
     "update_time":"…","title":null,"archive_time":null,"expire_time":null,"events":1,
     "state_changes":1,"labels":null,"initial_state":{},"state":{…}}
    {"type":"event","id":"e1","invocation_id":"i1","timestamp":"…","event":{…}}
    {"type":"state_change","revision":"…","number":1,"change_time":"…","delta":{…},"deleted":null}
    {"type":"end","app_states":1,"user_states":1,"sessions":1,"events":1,"state_changes":1}

The header says what was asked for: null for everything; its number of sessions is for progress
only. A session's line says how many events and changes follow it, and the end how much there was,
so a file that was cut is noticed. Files may be joined: after an end there may be another header.
Empty states of apps and users are left out.

Times are naive UTC with six digits of a second. An event's ``timestamp`` is the session's revision
after it, its own time is in the event. Values are in the codec's reversible form (see
``adk_sessions.codec``) where plain JSON has none: ``"adk_sessions:float:nan"``. There is one form
of an event, the exact one; what a database holds of it is made anew by the one that it comes into.

What is damaged travels too. A document that is no JSON object is carried as it is, and one that is
no JSON at all as a string, with its name in the line's ``damaged``; it is stored likewise, and is
as unreadable there. An exact form of an event that is damaged gives way to the event's JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import IO, Any, NamedTuple, Self

from pydantic import RootModel

from . import checks, clock, codec
from .dialects.moving import Head, Scope, StoredChange
from .dialects.rows import Key, StoredEvent
from .errors import DatabaseError, InvalidInputError, SchemaError

FORMAT = "adk-sessions"
VERSION = 1
#: what the end calls the number of each type of line
COUNTED = {
    **{"app_state": "app_states", "user_state": "user_states", "session": "sessions"},
    **{"event": "events", "state_change": "state_changes"},
}

# What Python's own `splitlines` takes for the end of a line too.
_SEPARATORS = re.compile("[\x85\u2028\u2029]")
_LATEST = datetime(9000, 1, 1)
# Bytes of one session that are held in memory, before the rest goes to a file.
_IN_MEMORY = 4 * 1024 * 1024


class _Plain(RootModel[Any]):
    """A document as it is: the codec takes models, and no field may get lost or be added."""


# --- out ----------------------------------------------------------------------------------------


def header(app_name: str, user_id: str | None, session_id: str | None, sessions: int) -> str:
    """The first line; the time is now."""
    asked = {"app_name": app_name, "user_id": user_id, "session_id": session_id}
    now = time.time()
    return _line(
        {"type": "header", "format": FORMAT, "version": VERSION, **asked, "sessions": sessions}
        | {"time": clock.to_marker(clock.to_datetime(now))}
    )


def wider_state(app_name: str, user_id: str | None, scope: Scope) -> str:
    """The line of a user's state, or of the app's own."""
    fields = {"type": "app_state", "app_name": app_name}
    if user_id is not None:
        fields = {"type": "user_state", "app_name": app_name, "user_id": user_id}
    fields["update_time"] = clock.to_marker(scope.update_time)
    return _line(fields, state=_document(scope.state, state=True))


def session(key: Key, head: Head) -> str:
    """A session's line."""
    return _line(
        {
            **{"type": "session", "app_name": key.app_name, "user_id": key.user_id},
            **{"id": key.session_id, "create_time": clock.to_marker(head.create_time)},
            **{"update_time": clock.to_marker(head.update_time), "title": head.title},
            **{"archive_time": _marker(head.archive_time)},
            **{"expire_time": _marker(head.expire_time)},
            **{"events": head.events, "state_changes": head.state_changes},
        },
        labels=_document(head.labels),
        initial_state=_document(head.initial_state),
        state=_document(head.state, state=True),
    )


def event(row: StoredEvent) -> str:
    """An event's line."""
    document: _Document | None = None
    if row.exact is not None:
        with contextlib.suppress(DatabaseError, InvalidInputError):
            document = _Document(codec.dump_state(codec.load_state(row.exact)), False)
    if document is None:
        document = _document(row.data, escaped=False)
        document = document._replace(damaged=document.damaged or document.text == "null")
    fields = {"type": "event", "id": row.id, "invocation_id": row.invocation_id}
    return _line(fields | {"timestamp": clock.to_marker(row.timestamp)}, event=document)


def state_change(row: StoredChange) -> str:
    """A change's line."""
    fields: dict[str, Any] = {"type": "state_change", "revision": clock.to_marker(row.revision)}
    fields |= {"number": row.number, "change_time": clock.to_marker(row.change_time)}
    return _line(fields, delta=_document(row.delta, state=True), deleted=_document(row.deleted))


def state(text: str | None) -> str:
    """A stored state alone."""
    return _line({}, state=_document(text, state=True))


def end(counts: dict[str, int]) -> str:
    """The last line."""
    return _line({"type": "end", **counts})


class _Document(NamedTuple):
    text: str
    damaged: bool


def _document(text: str | None, *, escaped: bool = True, state: bool = False) -> _Document:
    """A stored document in the codec's form.

    Args:
        text: as it is stored.
        escaped: whether it is in that form already; an event's JSON is not.
        state: whether nothing at all is an empty object.
    """
    if text is None and not state:
        return _Document("null", False)
    with contextlib.suppress(DatabaseError, InvalidInputError, ValueError, RecursionError):
        value = codec.load_state(text) if escaped else _plain(text)
        if isinstance(value, dict):
            return _Document(codec.dump_state(value), False)
    try:
        value = codec.loads(text or "")
        if escaped:
            value = codec.load_state(f'{{"v":{text}}}')["v"]
        return _Document(_bare(value), value is not None or state)
    except (DatabaseError, InvalidInputError, ValueError, RecursionError):
        return _Document(_bare(text), True)


def _plain(text: str | None) -> Any:
    """A text's JSON, nothing in it unescaped."""
    # what is not marked is read the same, and faster, as a state
    if text and text.startswith("{") and codec.MARK not in text:
        return codec.load_state(text)
    return codec.loads(text or "")


def _bare(value: Any) -> str:
    """The codec's text of a value that is no object."""
    return codec.dump_state({"v": value})[len('{"v":') : -1]


def _line(fields: dict[str, Any], **documents: _Document) -> str:
    if damaged := [name for name, document in documents.items() if document.damaged]:
        fields["damaged"] = damaged
    parts = [codec.dump_state(fields)[1:-1]] if fields else []
    parts += [f'"{name}":{document.text}' for name, document in documents.items()]
    line = f"{{{','.join(parts)}}}"
    if not line.isascii() and _SEPARATORS.search(line):
        line = _SEPARATORS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
    return line


def _marker(moment: datetime | None) -> str | None:
    return None if moment is None else clock.to_marker(moment)


def contains(state: str | None, other: str | None) -> bool:
    """Whether a stored state has the keys of another one, with the same values."""
    one, two = (json.loads(_document(text, state=True).text) for text in (state, other))
    if not (isinstance(one, dict) and isinstance(two, dict)):
        return False
    return all(key in one and _sorted(one[key]) == _sorted(value) for key, value in two.items())


def canonical(line: str) -> str:
    """A line in a spelling that does not hang on the database it is from."""
    return _sorted(json.loads(line))


def _sorted(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


# --- in -----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line that was checked.

    Attributes:
        type: as in the line.
        fields: times as naive UTC, documents as the text that is stored.
    """

    type: str
    fields: dict[str, Any]


def read(text: str | bytes) -> Line:
    """Checks a line, and turns its documents into what is stored.

    Raises:
        SchemaError: it is no such line; without its number, and nothing of it in the message.
        InvalidInputError: an id or a time in it cannot be stored.
    """
    fields = _object(text)
    kind = fields.pop("type", None)
    if kind == "header" and (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
        raise SchemaError(
            "this is not a header of version 1 of this format: it was not exported by this software"
            " or by a newer release"
        )
    expected = _LINES.get(kind) if isinstance(kind, str) else None
    if expected is None:
        raise SchemaError("its type is none that version 1 has")
    damaged = fields.pop("damaged", [])
    if not isinstance(damaged, list):
        raise SchemaError("damaged is not a list")
    if missing := [name for name in expected if name not in fields]:
        raise SchemaError(f"its {missing[0]} is missing")
    if len(fields) > len(expected):
        raise SchemaError(f"a line of type {kind} has fewer fields in version 1")
    checked = {name: check(fields[name], name, name in damaged) for name, check in expected.items()}
    return Line(str(kind), checked)


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        if not isinstance(text, str):
            text = text.decode()
        return codec.load_state(text)
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except (DatabaseError, ValueError, RecursionError):
        reason = "it is not a JSON object"
    except AttributeError:
        reason = "it is neither text nor bytes"
    raise SchemaError(reason)  # here, so that what was caught is not chained: it would quote


_Check = Callable[[Any, str, bool], Any]


def _key(value: Any, name: str, _: bool) -> Any:
    checks.check_key(value, name)
    return value


def _text(value: Any, name: str, _: bool) -> Any:
    checks.check_key(value, name, limit=checks.TEXT_LENGTH)
    return value


def _count(value: Any, name: str, _: bool) -> Any:
    if type(value) is not int or not 0 <= value < 2**31:
        raise SchemaError(f"its {name} is not a count")
    return value


def _time(value: Any, name: str, _: bool) -> Any:
    if isinstance(value, str) and len(value) == 26 and value[10] == "T" and value[19] == ".":
        with contextlib.suppress(ValueError):
            moment = datetime.fromisoformat(value)
            if clock.EPOCH <= moment < _LATEST:
                return moment
    raise SchemaError(
        f"its {name} is not a time like 2026-01-31T12:00:00.000000, from 1970 to 9000"
    )


def _fixed(value: Any, name: str, _: bool) -> Any:
    return value


def _document_in(value: Any, name: str, damaged: bool) -> Any:
    if isinstance(value, dict):
        return codec.dump_state(value, field=name)
    if not damaged:
        raise SchemaError(f"its {name} is not an object")
    return _bare(value)


def _labels(value: Any, name: str, damaged: bool) -> Any:
    flat = isinstance(value, dict) and all(isinstance(label, str) for label in value.values())
    if not (flat or damaged):
        raise SchemaError(f"its {name} are not texts by name")
    return _document_in(value, name, damaged)


def _event_in(value: Any, name: str, damaged: bool) -> Any:
    if not (isinstance(value, dict) or damaged):
        raise SchemaError(f"its {name} is not an object")
    if value is None:
        return codec.EventText("null", None)
    return codec.dump_event(_Plain(value))


def _or_null(check: _Check) -> _Check:
    def checked(value: Any, name: str, damaged: bool) -> Any:
        return None if value is None else check(value, name, damaged)

    return checked


_COUNTS: dict[str, _Check] = {"sessions": _count, "events": _count, "state_changes": _count}
_WIDER: dict[str, _Check] = {"app_name": _key, "update_time": _time, "state": _document_in}
_LINES: dict[str, dict[str, _Check]] = {
    "header": {
        **{"format": _fixed, "version": _fixed, "app_name": _key, "user_id": _or_null(_key)},
        **{"session_id": _or_null(_key), "sessions": _count, "time": _time},
    },
    "app_state": _WIDER,
    "user_state": {**_WIDER, "user_id": _key},
    "session": {
        **{"app_name": _key, "user_id": _key, "id": _key},
        **{"create_time": _time, "update_time": _time, "title": _or_null(_text)},
        **{"archive_time": _or_null(_time), "expire_time": _or_null(_time)},
        **{"events": _count, "state_changes": _count, "labels": _or_null(_labels)},
        **{"initial_state": _or_null(_document_in), "state": _document_in},
    },
    "event": {"id": _key, "invocation_id": _text, "timestamp": _time, "event": _event_in},
    "state_change": {
        **{"revision": _time, "number": _count, "change_time": _time},
        **{"delta": _document_in, "deleted": _or_null(_document_in)},
    },
    "end": {"app_states": _count, "user_states": _count, **_COUNTS},
}


class Spool:
    """Rows of JSON values and times that are written once and read any number of times.

    A session may be longer than memory: from 4 MB on its rows are in a file without a name, which
    is gone with the process; times come back from there as text.
    """

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._size = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all rows, and lets go of the file."""
        self._rows, self._size = [], 0
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def put(self, row: Any) -> None:
        """Adds a line of text, or a row of several values."""
        if self._file is None:
            self._rows.append(row)
            parts = (row,) if isinstance(row, str) else row
            self._size += sum(len(part) for part in parts if isinstance(part, str))
            if self._size > _IN_MEMORY:
                rows, self._rows = self._rows, []
                self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
                for each in rows:
                    self.put(each)
        else:
            self._file.write(f"{json.dumps(row, default=clock.to_marker)}\n")

    def rows(self) -> Iterator[Any]:
        """What was put, from the first one on."""
        if self._file is None:
            return iter(self._rows)
        self._file.seek(0)
        return map(json.loads, self._file)


def moment_of(value: Any) -> datetime:
    """A time as a `Spool` gives it."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value
