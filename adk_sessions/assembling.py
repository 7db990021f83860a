"""Lines of an export become sessions again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from . import errors, portable
from .dialects.moving import StoredChange
from .dialects.rows import Key, StoredEvent
from .storing import Incoming

# The columns by which events and changes are in order.
_PLACES = {"event": ("timestamp", "id"), "state_change": ("revision", "number")}


class WiderState(NamedTuple):
    """A state of an app, or of one of its users."""

    app_name: str
    user_id: str | None
    text: str
    update_time: datetime


class Assembler:
    """Makes sessions and states of lines, one after the other.

    A session that was made is good until the next line.

    Args:
        one_user: refuse the lines of an export of all users.

    Attributes:
        total: sessions that the headers told of.
    """

    def __init__(self, one_user: bool) -> None:
        self.total = 0
        self._one_user = one_user
        self._any = False
        self._header: dict[str, Any] | None = None
        self._seen: dict[str, int] = {}
        self._session: dict[str, Any] | None = None
        self._counts = (0, 0)
        self._left: dict[str, int] = {}
        self._last: dict[str, tuple[Any, ...]] = {}
        self._parts = {kind: portable.Spool() for kind in _PLACES}

    def next(self, text: str | bytes) -> Incoming | WiderState | None:
        """What a line completes; None if that is nothing yet.

        Raises:
            SchemaError, InvalidInputError: what is wrong with the line, without its number.
        """
        if isinstance(text, str | bytes) and not text.strip():
            return None
        kind, fields = portable.read(text)
        if kind == "header":
            self._begin(fields)
            return None
        if self._header is None:
            raise errors.SchemaError("a header is to come first")
        if kind == "end":
            self._end(fields)
            return None
        self._seen[portable.COUNTED[kind]] += 1
        if kind in _PLACES:
            return self._part(kind, fields)
        self._need_whole()
        for name in ("app_name", "user_id"):
            asked = self._header[name]
            if name in fields and asked is not None and fields[name] != asked:
                raise errors.SchemaError(f"it has another {name} than the header")
        if kind == "session":
            return self._open(fields)
        if not fields["state"].startswith("{"):
            return None  # damaged: there are no keys to be added
        return WiderState(
            fields["app_name"], fields.get("user_id"), fields["state"], fields["update_time"]
        )

    def finish(self, number: int) -> None:
        """Sees that nothing is missing after the last line, which had this number.

        Raises:
            SchemaError: something is.
        """
        if self._header is not None or not self._any:
            raise errors.SchemaError(
                f"The end is missing after line {number}, so this is not all of an export. What"
                " came whole is stored; import all of it to go on."
            )

    def close(self) -> None:
        """Lets go of what is held."""
        for spool in self._parts.values():
            spool.clear()

    def _begin(self, fields: dict[str, Any]) -> None:
        if self._header is not None:
            raise errors.SchemaError("a header, but the end of the lines before has not come")
        if self._one_user and fields["user_id"] is None:
            raise errors.ConfigurationError(
                "With row_level_security the export of one user is imported at a time. To import"
                " that of all users, log in as a role that the policies do not bind, without it."
            )
        self._header, self._any = fields, True
        self._seen = dict.fromkeys(portable.COUNTED.values(), 0)
        self.total += fields["sessions"]

    def _end(self, fields: dict[str, Any]) -> None:
        self._need_whole()
        for name, count in self._seen.items():
            if fields[name] != count:
                raise errors.SchemaError(
                    f"there were {count} {name} and it says {fields[name]}: lines are missing, or"
                    " there twice. What came whole is stored."
                )
        self._header = None

    def _open(self, fields: dict[str, Any]) -> Incoming | None:
        self._session = fields
        self._left = {name: fields.pop(name) for name in ("events", "state_changes")}
        self._counts = (self._left["events"], self._left["state_changes"])
        self._last = {}
        for spool in self._parts.values():
            spool.clear()
        return self._completed()

    def _part(self, kind: str, fields: dict[str, Any]) -> Incoming | None:
        if self._session is None or not self._left[portable.COUNTED[kind]]:
            raise errors.SchemaError("there is no session that it belongs to")
        place = tuple(fields[name] for name in _PLACES[kind])
        if kind in self._last and place <= self._last[kind]:
            raise errors.SchemaError("it is out of order")
        self._last[kind] = place
        self._left[portable.COUNTED[kind]] -= 1
        event = fields.pop("event", ())
        self._parts[kind].put((*fields.values(), *event))
        return self._completed()

    def _need_whole(self) -> None:
        if self._session is not None:
            raise errors.SchemaError("events or state changes of the session before are missing")

    def _completed(self) -> Incoming | None:
        if self._session is None or any(self._left.values()):
            return None
        row, self._session = self._session, None
        key = Key(row.pop("app_name"), row.pop("user_id"), row.pop("id"))
        return Incoming(key, row, self._events, self._changes, self._counts, exact=True)

    def _events(self) -> Iterator[StoredEvent]:
        for id_, invocation_id, time, *texts in self._parts["event"].rows():
            yield StoredEvent(id_, invocation_id, portable.moment_of(time), *texts)

    def _changes(self) -> Iterator[StoredChange]:
        for revision, number, time, *texts in self._parts["state_change"].rows():
            times = [portable.moment_of(moment) for moment in (revision, time)]
            yield StoredChange(times[0], number, times[1], *texts)
