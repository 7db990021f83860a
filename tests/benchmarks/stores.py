"""The session services that are compared, each behind the same few attributes.

Each is given a database of its own and is otherwise left as its documentation sets it up. The one
thing set for all that have it is the size of the pool, so that 16 tasks find 16 connections.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any, ClassVar

from google.adk.events.event import Event
from google.adk.sessions import DatabaseSessionService as StockService
from google.adk.sessions.base_session_service import BaseSessionService
from google.adk.sessions.session import Session
from google.adk.sessions.sqlite_session_service import SqliteSessionService
from sqlalchemy import make_url, text

import adk_sessions
from adk_sessions.adk import DatabaseSessionService

from .seed import Layout, Seeder, aware, naive, naive_text

POOL = 16
POOLED: dict[str, Any] = {"pool_size": POOL, "max_overflow": 0}
PRAGMAS = ("journal_mode", "synchronous")


class Store:
    """One session service on one database.

    Attributes:
        name: how options and results call it; `label` and `title` are for people.
        backends: the databases that it works on.
        only: the only scenarios that it takes part in, if not all.
        deviations: by scenario, what it is known to do otherwise than google-adk's own.
        batch: takes a list of events in one call.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    title: ClassVar[str]
    backends: ClassVar[frozenset[str]]
    only: ClassVar[frozenset[str] | None] = None
    deviations: ClassVar[dict[str, str]] = {}
    batch: ClassVar[bool] = False

    service: BaseSessionService

    def __init__(self, url: str, direct: str) -> None:
        """
        Args:
            url: of the database, perhaps by way of a proxy.
            direct: of the same database without it, for seeding.
        """
        self.backend = make_url(url).get_backend_name()
        self.backend = "mariadb" if self.backend == "mysql" else self.backend
        self.seeder = Seeder(direct, self._layout())
        self._url = url

    def _layout(self) -> Layout:
        return Layout(naive_text if self.backend == "sqlite" else naive)

    async def open(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def pragmas(self) -> dict[str, str | int]:
        """On SQLite: what the connections that the store itself makes are set to."""
        raise NotImplementedError

    async def append_all(self, session: Session, events: list[Event]) -> None:
        for event in events:
            await self.service.append_event(session, event)

    @classmethod
    def takes_part(cls, scenario: str, backend: str) -> bool:
        return backend in cls.backends and (cls.only is None or scenario in cls.only)

    @classmethod
    def available(cls) -> bool:
        return True


class Ours(Store):
    name, label = "ours", "adk-sessions"
    title = "adk_sessions.adk.DatabaseSessionService"
    backends = frozenset({"postgresql", "sqlite", "mariadb"})
    options: ClassVar[dict[str, Any]] = {}
    batch = hasattr(DatabaseSessionService, "append_events")

    service: DatabaseSessionService

    async def open(self) -> None:
        options = self.options | ({} if self.backend == "sqlite" else POOLED)
        self.service = DatabaseSessionService(self._url, **options)
        await self.service.prepare_tables()

    async def close(self) -> None:
        await self.service.close()

    async def pragmas(self) -> dict[str, str | int]:
        def ask(connection: Any) -> dict[str, str | int]:
            return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in PRAGMAS}

        return await self.service._database.run(ask, write=True)

    async def append_all(self, session: Session, events: list[Event]) -> None:
        if self.batch:
            await self.service.append_events(session, events)
        else:
            await super().append_all(session, events)


class OursLean(Ours):
    """With the leaner validation of what is read, where the release has it."""

    name, label = "ours_lean", "lean"
    title = "adk_sessions.adk.DatabaseSessionService(lean_validation=True)"
    only = frozenset({"get_10", "get_1000", "get_10000", "last_20"})
    options: ClassVar[dict[str, Any]] = {"lean_validation": True}

    @classmethod
    def available(cls) -> bool:
        return "lean_validation" in inspect.signature(adk_sessions.Store.__init__).parameters


class OursLoop(Ours):
    """A batch as appends one by one: what `append_events` saves."""

    name, label = "ours_loop", "one by one"
    title = "adk_sessions.adk.DatabaseSessionService, append_event in a loop"
    only = frozenset({"batch_500"})
    batch = False


class Stock(Store):
    name, label = "adk", "google-adk"
    title = "google.adk.sessions.DatabaseSessionService"
    backends = frozenset({"postgresql", "sqlite", "mariadb"})
    drivers: ClassVar[dict[str, str]] = {
        "postgresql": "postgresql+asyncpg",
        "sqlite": "sqlite+aiosqlite",
        # over mariadb:// it makes columns that cannot hold 200 KB
        "mariadb": "mysql+asyncmy",
    }

    service: StockService

    async def open(self) -> None:
        url = make_url(self._url).set(drivername=self.drivers[self.backend])
        options = {} if self.backend == "sqlite" else POOLED
        self.service = StockService(url.render_as_string(hide_password=False), **options)
        await self.service.prepare_tables()

    async def close(self) -> None:
        await self.service.close()

    async def pragmas(self) -> dict[str, str | int]:
        async with self.service.db_engine.connect() as connection:
            return {
                name: (await connection.execute(text(f"PRAGMA {name}"))).scalar_one()
                for name in PRAGMAS
            }


class StockSqlite(Store):
    name, label = "adk_sqlite", "ADK's Sqlite"
    title = "google.adk.sessions.sqlite_session_service.SqliteSessionService"
    backends = frozenset({"sqlite"})

    service: SqliteSessionService

    def _layout(self) -> Layout:
        return Layout(float)

    async def open(self) -> None:
        self.service = SqliteSessionService(str(make_url(self._url).database))
        # it has no call for making its tables: the first one of any kind does it
        await self.service.list_sessions(app_name="nobody")

    async def close(self) -> None:
        await self.service.close()

    async def pragmas(self) -> dict[str, str | int]:
        settings: dict[str, str | int] = {}
        async with self.service._get_db_connection() as connection:
            for name in PRAGMAS:
                async with connection.execute(f"PRAGMA {name}") as cursor:
                    row = await cursor.fetchone()
                    assert row is not None
                    settings[name] = row[0]
        return settings


class Sqlspec(Store):
    name, label = "sqlspec", "sqlspec"
    title = "sqlspec's SQLSpecSessionService over its AsyncpgADKStore"
    backends = frozenset({"postgresql"})
    deviations: ClassVar[dict[str, str]] = {
        "last_20": "returns the oldest 20 events, not the last 20"
    }

    def _layout(self) -> Layout:
        tables = self._store(self._config("postgresql://"))
        return Layout(
            aware,
            sessions=tables._session_table,
            events=tables._events_table,
            app_states=tables._app_state_table,
            user_states=tables._user_state_table,
        )

    @classmethod
    def available(cls) -> bool:
        return find_spec("sqlspec") is not None

    @staticmethod
    def _config(url: str) -> Any:
        from sqlspec.adapters.asyncpg import AsyncpgConfig

        # all its connections are there before anything is timed
        pool = {"dsn": url, "min_size": POOL, "max_size": POOL}
        return AsyncpgConfig(connection_config=pool)

    @staticmethod
    def _store(config: Any) -> Any:
        from sqlspec.adapters.asyncpg.adk import AsyncpgADKStore

        return AsyncpgADKStore(config)

    async def open(self) -> None:
        from sqlspec.extensions.adk import SQLSpecSessionService

        self._pool = self._config(self._url)
        store = self._store(self._pool)
        await store.ensure_tables()
        self.service = SQLSpecSessionService(store)

    async def close(self) -> None:
        await self._pool.close_pool()


ALL: tuple[type[Store], ...] = (Ours, OursLean, OursLoop, Stock, Sqlspec, StockSqlite)


def chosen(names: tuple[str, ...] = ()) -> list[type[Store]]:
    """The stores of those names, all of them without names, that can be had here."""
    return [store for store in ALL if (not names or store.name in names) and store.available()]
