"""Rows written past a store, in bulk: histories too long to be appended one by one.

All stores here keep the same columns under names of their own, so one writer serves them all; each
case that reads such rows checks through the store's own service that all of them arrived.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import asyncpg
from google.adk.events.event import Event
from sqlalchemy import URL, make_url

SESSION = ("app_name", "user_id", "id", "state", "create_time", "update_time")
EVENT = (
    *("id", "app_name", "user_id", "session_id"),
    *("invocation_id", "timestamp", "event_data"),
)
APP = ("app_name", "state", "update_time")
USER = ("app_name", "user_id", "state", "update_time")
CHUNK = 5_000
MANY = 1_000  # rows after which a database has something to tidy


@dataclass(frozen=True)
class Layout:
    """A store's tables, and what a time is in them."""

    moment: Callable[[float], Any]
    sessions: str = "sessions"
    events: str = "events"
    app_states: str = "app_states"
    user_states: str = "user_states"


def naive(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC).replace(tzinfo=None)


def naive_text(timestamp: float) -> str:
    return naive(timestamp).strftime("%Y-%m-%d %H:%M:%S.%f")


def aware(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)


def payload(event: Event) -> str:
    return json.dumps(event.model_dump(exclude_none=True, mode="json"), separators=(",", ":"))


class Seeder:
    """Writes rows of one store's tables in one database."""

    def __init__(self, url: str, layout: Layout) -> None:
        self._url = make_url(url)
        self._layout = layout
        self._written = 0

    async def states(self, app: str, users: Iterable[str], state: dict[str, Any]) -> None:
        """The rows of an app and of users, which google-adk wants to be there."""
        now = self._layout.moment(0.0)
        text = json.dumps(state)
        await self.rows(self._layout.app_states, APP, [(app, text, now)])
        await self.rows(self._layout.user_states, USER, ((app, user, text, now) for user in users))

    async def sessions(
        self, app: str, rows: Iterable[tuple[str, str, float]], state: dict[str, Any]
    ) -> None:
        """Sessions, given as user, id and time of the last update."""
        text, moment = json.dumps(state), self._layout.moment
        await self.rows(
            self._layout.sessions,
            SESSION,
            ((app, user, id, text, moment(time), moment(time)) for user, id, time in rows),
        )

    async def events(self, app: str, user: str, session: str, events: Iterable[Event]) -> None:
        moment = self._layout.moment
        await self.rows(
            self._layout.events,
            EVENT,
            (
                (e.id, app, user, session, e.invocation_id, moment(e.timestamp), payload(e))
                for e in events
            ),
        )

    async def copies(
        self, app: str, user: str, session: str, events: Sequence[Event], count: int, start: float
    ) -> None:
        """So many events, a millisecond apart: copies of a few with ids and times of their own."""
        moment = self._layout.moment
        templates = [
            (event.invocation_id, payload(event).replace(event.id, "{id}", 1), event.timestamp)
            for event in events
        ]
        # a time's text is in the payload exactly as JSON writes a float
        cut = [
            (invocation, text.partition("{id}"), json.dumps(time))
            for invocation, text, time in templates
        ]

        def rows() -> Iterator[tuple[Any, ...]]:
            for n in range(count):
                invocation, (head, _, tail), time = cut[n % len(cut)]
                id, at = f"{session}-{n:08}", start + n / 1000
                text = f"{head}{id}{tail}".replace(time, json.dumps(at), 1)
                yield id, app, user, session, invocation, moment(at), text

        await self.rows(self._layout.events, EVENT, rows())

    async def rows(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        def counted() -> Iterator[Sequence[Any]]:
            for row in rows:
                self._written += 1
                yield row

        await self._write(table, columns, counted())

    async def _write(
        self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
    ) -> None:
        match self._url.get_backend_name():
            case "postgresql":
                await _copy(self._url, table, columns, rows)
            case "sqlite":
                _insert(self._url, table, columns, rows)
            case _:
                await _insert_many(self._url, table, columns, rows)

    async def settle(self) -> None:
        """What a database does in its own time after many writes, done before anything is timed."""
        if self._written < MANY:
            return
        self._written = 0
        if self._url.get_backend_name() == "postgresql":
            connection = await asyncpg.connect(_plain(self._url))
            try:
                await connection.execute("VACUUM ANALYZE")
                await connection.execute("CHECKPOINT")
            finally:
                await connection.close()
        elif self._url.get_backend_name() == "sqlite":
            with closing(sqlite3.connect(str(self._url.database))) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _plain(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


async def _copy(
    url: URL, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    connection = await asyncpg.connect(_plain(url))
    try:
        await connection.copy_records_to_table(table, records=rows, columns=list(columns))
    finally:
        await connection.close()


def _insert(url: URL, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    marks = ", ".join("?" * len(columns))
    with closing(sqlite3.connect(str(url.database), timeout=30)) as connection, connection:
        statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        connection.executemany(statement, rows)


async def _insert_many(
    url: URL, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    import asyncmy

    marks = ", ".join(["%s"] * len(columns))
    statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
    connection = await asyncmy.connect(
        **url.translate_connect_args(username="user", database="db"), charset="utf8mb4"
    )
    try:
        async with connection.cursor() as cursor:
            left = iter(rows)
            while chunk := list(islice(left, CHUNK)):
                await cursor.executemany(statement, chunk)
        await connection.commit()
    finally:
        connection.close()
