"""Sessions and events page by page.

A cursor holds the place of a page's last row in the order of the list, so the next page begins
behind that row whatever was written meanwhile.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

from . import calls, checks, errors, telemetry
from .binding import E, S, uncollected
from .dialects.pages import Order, Place, PlacedEvent, Wanted, Window
from .dialects.rows import Key
from .labels import check_labels
from .operations import Operations
from .session import Page, SessionSummary

Direction = Literal["forward", "backward"]

# Of one page.
_MOST = 1000

# Events that are looked at for what an aligned page lacks: so many, or so many times its limit.
_AHEAD = 1000
_AHEAD_TIMES = 10

# An id that JSON writes as it is.
_PLAIN = re.compile(r"[\w.:-]+", re.ASCII)


class Pages(Operations[S, E]):
    """The part of a store that lists page by page."""

    # --- sessions ------------------------------------------------------------------------------

    async def page_sessions(
        self,
        app_name: str,
        user_id: str | None = None,
        *,
        limit: int = 50,
        cursor: str | None = None,
        order: Order = "created",
        archived: bool | None = False,
        labels: Mapping[str, str] | None = None,
        counts: bool = False,
    ) -> Page[SessionSummary]:
        """Lists sessions page by page, the newest first, without state and events; from a replica
        if there is one.

        By creation, no session that exists when the first page is read is missed or shown twice,
        whoever creates, appends or deletes meanwhile. By update, one that is touched between two
        pages moves to the front and may be missed; and as there is no index in this order, each
        page looks at all sessions of the application, or of the user.

        Args:
            app_name: the application.
            user_id: the user; None for all users of the application.
            limit: sessions of a page at most, 1 to 1000.
            cursor: ``next_cursor`` of the page before, with the same other arguments but
                ``limit`` and ``counts``; None for the first page.
            order: ``created`` or ``updated``: by which time.
            archived: False for sessions that are not archived, True for those that are, None for
                all. No index tells them apart: a page takes longer where few are what is asked for,
                or many that are not come before them.
            labels: only sessions that have all these labels; likewise.
            counts: whether to count the events of each.

        Returns:
            A page of summaries; empty if there is no such application or user.

        Raises:
            InvalidInputError: an argument cannot be, or the cursor is another list's; or all users
                are asked for, with ``row_level_security``.
            DatabaseError: the database failed.
        """
        _check_size(limit, "limit")
        checks.check_one_of(order, ("created", "updated"), "order")
        checks.check_one_of(archived, (False, True, None), "archived")
        if labels is not None:
            check_labels(labels)
        wanted = Wanted(order, archived, labels, bool(counts))
        scope = ["sessions", app_name, user_id, order, archived, sorted((labels or {}).items())]
        beyond = self._place(cursor, scope, 2 if user_id is None else 1)
        if not checks.are_keys(app_name, "" if user_id is None else user_id):
            return Page([], None)
        await self.prepare_tables()
        found = await self._consult(
            lambda statements, conn: statements.sessions_page(
                conn, app_name, user_id, wanted=wanted, limit=limit + 1, beyond=beyond
            ),
            replica=True,
        )
        last = found[limit - 1].place if len(found) > limit else None
        return Page([row.summary for row in found[:limit]], self._cursor(last, scope))

    async def describe_session(
        self, app_name: str, user_id: str, session_id: str, *, counts: bool = False
    ) -> SessionSummary | None:
        """Reads what a page shows of one session, archived or not.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session.
            counts: whether to count its events.

        Returns:
            Its summary, None if there is no such session.
        """
        key = Key(app_name, user_id, session_id)
        if not checks.are_keys(*key):
            return None
        await self.prepare_tables()
        return await self._run(
            lambda conn: self._statements.summary(conn, key, counts=bool(counts)), write=False
        )

    async def list_users(self, app_name: str) -> list[str]:
        """Lists the users of an application, sorted; from a replica if there is one.

        It reads the keys of all sessions of the application, and answers with all users at once.

        Args:
            app_name: the application.

        Returns:
            Ids of all who have a session or a state of their own.

        Raises:
            InvalidInputError: with ``row_level_security``: users are not to see each other.
            DatabaseError: the database failed.
        """
        if not checks.are_keys(app_name):
            return []
        await self.prepare_tables()
        return await self._consult(
            lambda statements, conn: statements.users(conn, app_name), replica=True
        )

    async def list_apps(self) -> list[str]:
        """Lists the names of all applications, sorted; from a replica if there is one.

        It reads the keys of all sessions, and is nothing to call for each request.

        Returns:
            Those that have a session or a state, of their own or of a user.

        Raises:
            InvalidInputError: with ``row_level_security``: applications are not to see each other.
            DatabaseError: the database failed.
        """
        await self.prepare_tables()
        return await self._consult(lambda statements, conn: statements.apps(conn), replica=True)

    # --- events --------------------------------------------------------------------------------

    async def page_events(
        self,
        app_name: str,
        user_id: str,
        session_id: str,
        *,
        limit: int = 100,
        cursor: str | None = None,
        direction: Direction = "forward",
        after: str | None = None,
        author: str | None = None,
        invocation_id: str | None = None,
        aligned: bool = False,
        replica: bool = False,
    ) -> Page[E]:
        """Reads a session's events page by page, in the order of their append.

        No event is missed or shown twice, whoever appends meanwhile: forward, what is appended is
        on later pages, and backward on none.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session; it may be archived.
            limit: events of a page at most, 1 to 1000.
            cursor: ``next_cursor`` of the page before, with the same other arguments but
                ``limit``, ``aligned`` and ``replica``; None for the first page.
            direction: ``forward`` begins with the oldest events, ``backward`` with the newest.
                Either way a page has its oldest event first.
            after: the id of an event; only those that were appended after it.
            author: only theirs.
            invocation_id: only events of this run of the agent.
            aligned: whether to keep function calls and their responses on one page. It ends before
                a call then whose response is not on it, with fewer events, whether there is one or
                not. It has more than ``limit`` only where it begins with a pair that is longer than
                that; to find its end takes a second statement, and another one for each further
                call that overlaps it. A response is looked for among the next 1,000 events, or 10
                times ``limit`` where that is more; one that is further away may be on another page.
                What a rewind has taken back is shown as it is stored.
            replica: whether it may be read from the replica, if there is one, which may lag behind.

        Returns:
            A page of events; empty if there is no such session and no ``after``.

        Raises:
            InvalidInputError: an argument cannot be, the cursor is another list's, or events of
                one author were to be aligned: calls and responses may have different ones.
            EventNotFoundError: the session has no event ``after``, or is not there itself.
            UnreadableEventError: a stored event cannot be read, and ``on_bad_event`` is ``raise``.
        """
        _check_size(limit, "limit")
        checks.check_one_of(direction, ("forward", "backward"), "direction")
        _check_filters(after, author, invocation_id)
        if aligned and author is not None:
            raise errors.InvalidInputError(
                "events of one author cannot be aligned: responses may have another one",
                field="aligned",
            )
        key, backward = Key(app_name, user_id, session_id), direction == "backward"
        scope = ["events", *key, direction, after, author, invocation_id]
        place = self._place(cursor, scope, 1, bounded=backward and after is not None)
        window = Window(backward, None, None, after, author, invocation_id)
        if place is not None:
            window = replace(window, beyond=place[:2], after=place[2:] or None, after_id=None)
        if not checks.are_keys(*key):
            if after is not None:
                raise _no_event(key, after)
            return Page([], None)
        await self.prepare_tables()
        rows = await self._rows(key, window, limit + 1, replica=replica)
        more = len(rows) > limit
        bound = window.after or (rows[0].after if rows and backward else None)
        if aligned and more:
            window = replace(window, after=bound, after_id=None) if backward else window
            rows, events, more = await self._aligned(key, window, rows, limit, replica=replica)
        else:
            rows = rows[:limit]
            events = self._in_order(key, rows, backward=backward)
        last = (*rows[-1].place, *(bound or ())) if more else None
        return Page(
            [event for event in events if author in (None, getattr(event, "author", None))],
            self._cursor(last, scope),
        )

    def iter_events(
        self,
        app_name: str,
        user_id: str,
        session_id: str,
        *,
        batch: int = 500,
        after: str | None = None,
        author: str | None = None,
        invocation_id: str | None = None,
    ) -> AsyncIterator[E]:
        """Reads a session's events one by one, the oldest first, with no more than a batch of them
        in memory.

        None comes twice, and what is appended before the last batch is read comes too. It ends
        early where the session is deleted meanwhile.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session; it may be archived.
            batch: events to read at once, 1 to 1000.
            after: the id of an event; only those that were appended after it.
            author: only theirs.
            invocation_id: only events of this run of the agent.

        Returns:
            An iterator; it has nothing if there is no such session and no ``after``.

        Raises:
            InvalidInputError: an argument cannot be.
            EventNotFoundError: the session has no event ``after``, or is not there itself.
            UnreadableEventError: a stored event cannot be read, and ``on_bad_event`` is ``raise``.
        """
        _check_size(batch, "batch")
        _check_filters(after, author, invocation_id)
        key = Key(app_name, user_id, session_id)
        there = checks.are_keys(*key)
        window = Window(after_id=after, author=author, invocation_id=invocation_id)

        async def each() -> AsyncIterator[E]:
            following = window
            if there:
                await self.prepare_tables()
            elif after is not None:
                raise _no_event(key, after)
            more = there
            while more:
                rows = await self._rows(key, following, batch)
                more = len(rows) == batch
                for event in self._in_order(key, rows, backward=False):
                    if author in (None, getattr(event, "author", None)):
                        yield event
                if more:
                    following = replace(following, beyond=rows[-1].place, after_id=None)

        return each()

    # --- pieces --------------------------------------------------------------------------------

    @telemetry.measured("iter_events")
    async def _rows(
        self, key: Key, window: Window, limit: int, *, replica: bool = False
    ) -> list[PlacedEvent]:
        if window.after_id is not None and not checks.are_keys(window.after_id):
            raise _no_event(key, window.after_id)
        rows = await self._consult(
            lambda statements, conn: statements.events_page(conn, key, window=window, limit=limit),
            replica=replica,
        )
        after_id = window.after_id
        if rows or after_id is None:
            return rows
        there = await self._consult(
            lambda statements, conn: statements.has_event(conn, key, after_id), replica=replica
        )
        if not there:
            raise _no_event(key, after_id)
        return rows

    async def _mentioning(
        self, key: Key, window: Window, call_ids: Set[str], ahead: int, *, replica: bool
    ) -> list[PlacedEvent]:
        """Events up to the last one that may have to do with one of the calls, of the next few."""
        pieces = [_piece(id_) for id_ in sorted(call_ids)]
        return await self._consult(
            lambda statements, conn: statements.events_until(
                conn, key, window=window, mentions=pieces, ahead=ahead
            ),
            replica=replica,
        )

    def _in_order(self, key: Key, rows: Sequence[PlacedEvent], *, backward: bool) -> list[E]:
        """Rows as events, the oldest first."""
        with uncollected(len(rows)):
            return [
                self._event(placed.row, key) for placed in (reversed(rows) if backward else rows)
            ]

    async def _aligned(
        self, key: Key, window: Window, rows: list[PlacedEvent], limit: int, *, replica: bool
    ) -> tuple[list[PlacedEvent], list[E], bool]:
        """A page that has no call without its response; whether there is more behind it."""
        settled: set[str] = set()
        backward, more, ahead = window.backward, True, max(_AHEAD, _AHEAD_TIMES * limit)
        events = self._in_order(key, rows, backward=backward)
        while True:
            size, missing = calls.cut_of_page(
                [calls.links(event) for event in events],
                limit,
                backward=backward,
                more=more,
                settled=settled,
            )
            if size:
                page = events[-size:] if backward else events[:size]
                return rows[:size], page, more or size < len(rows)
            beyond = replace(window, beyond=rows[-1].place, after_id=None)
            further = await self._mentioning(key, beyond, missing, ahead, replica=replica)
            settled |= missing
            rows += further
            found = self._in_order(key, further, backward=backward)
            events = [*found, *events] if backward else [*events, *found]
            if further:
                more = bool(further[-1].more)

    def _cursor(self, place: Place | None, scope: list[Any]) -> str | None:
        if place is None:
            return None
        plain = [self._statements.place_text(part) for part in place]
        text = json.dumps([_digest(scope, plain), *plain], separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    def _place(
        self, cursor: str | None, scope: list[Any], ids: int, *, bounded: bool = False
    ) -> Place | None:
        """The place in a cursor.

        Args:
            cursor: None for none.
            scope: what was asked for.
            ids: how many ids come after the time.
            bounded: whether another such place comes then.

        Raises:
            InvalidInputError: it is none, or that of another list.
        """
        if cursor is None:
            return None
        place: Place | None = None
        try:
            text = base64.b64decode(
                cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True
            )
            digest, *plain = json.loads(text)
            length = (1 + ids) * (1 + bounded)
            if digest == _digest(scope, plain) and len(plain) == length:
                place = tuple(
                    part if number % (1 + ids) else self._statements.place_time(part)
                    for number, part in enumerate(plain)
                )
                texts = [part for number, part in enumerate(plain) if number % (1 + ids)]
                place = place if checks.are_keys(*texts) else None
        except (ValueError, TypeError, AttributeError, RecursionError):
            place = None
        if place is None:
            raise errors.InvalidInputError(
                "cursor is not one of this list: pass next_cursor as it was, with the same other"
                " arguments, or None for the first page",
                field="cursor",
            )
        return place


def _no_event(key: Key, event_id: str) -> errors.EventNotFoundError:
    return errors.EventNotFoundError(f"Session {key.session_id!r} has no event {event_id!r}.")


def _digest(scope: list[Any], plain: Sequence[Any]) -> str:
    """Tells a cursor that was changed, or is another list's."""
    text = json.dumps([scope, [*plain]], default=repr)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _piece(call_id: str) -> str:
    """What is in any JSON that holds this id, whatever that escapes."""
    if _PLAIN.fullmatch(call_id):
        return f'"{call_id}"'
    return max(_PLAIN.findall(call_id), key=len, default="")


def _check_size(value: object, field: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= _MOST:  # type: ignore[operator]
        raise errors.InvalidInputError(
            f"{field} must be a whole number from 1 to {_MOST}", field=field
        )


def _check_filters(after: object, author: object, invocation_id: object) -> None:
    if after is not None and not isinstance(after, str):
        raise errors.InvalidInputError("after must be an event's id", field="after")
    if author is not None:
        checks.check_key(author, "author", limit=checks.TEXT_LENGTH)
    if invocation_id is not None:
        checks.check_key(invocation_id, "invocation_id", limit=checks.TEXT_LENGTH)
