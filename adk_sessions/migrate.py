"""The schema's history, run from code: alembic with the revisions that the package carries.

Any number of processes may start at once on an empty database. Each first looks if there is
something to do, which costs one query; who finds work takes the database's own lock for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, column, inspect, select, table
from sqlalchemy.exc import DBAPIError

from . import url as urls
from .dialects import Database, Generic, open_url
from .dialects.faults import Fault, classify
from .errors import MigrationLockError, SchemaError
from .models import models

logger = logging.getLogger(__name__)

HEAD = "0003"
VERSION_TABLE = "adk_sessions_version"

# Seconds to wait for another process's migration.
LOCK_TIMEOUT = 60.0
_POLL = 0.05

# alembic's context is global to the process: one migration at a time, whatever the database.
_alembic = threading.Lock()

_version = table(VERSION_TABLE, column("version_num"))
_metadata = table("adk_internal_metadata", column("key"), column("value"))


async def upgrade(
    database: Database, statements: Generic, *, lock_timeout: float = LOCK_TIMEOUT
) -> None:
    """Brings a database's tables to this release's revision; at head it costs one query.

    Args:
        database: where.
        statements: knows the database's lock.
        lock_timeout: seconds to wait for another process that migrates.

    Raises:
        MigrationLockError: another process migrates for longer than that.
        SchemaError: there are tables that cannot be adopted.
        DatabaseError: the database refused.
    """
    if await is_ready(database):
        return
    await _locked(database, statements, _run_alembic, lock_timeout)


async def is_ready(database: Database) -> bool:
    """Whether the tables are at this release's revision, or at one that it does not know yet.

    A newer release only adds what an older one may ignore, so during a rolling deploy the older
    one goes on working.
    """
    try:
        versions = await database.run(_current, write=False)
    except DBAPIError as error:
        if classify(error) is not Fault.FATAL:
            raise
        return False  # most likely there is no such table yet; if not, the upgrade will say
    return any(version >= HEAD for version in versions)


def _current(conn: Connection) -> list[str]:
    return list(conn.execute(select(_version.c.version_num)).scalars())


async def with_connection(
    url: str, work: Callable[[Connection], None], *, lock_timeout: float = LOCK_TIMEOUT
) -> None:
    """Runs alembic's ``work`` on a connection to a URL, under the same lock as `upgrade`."""
    database, statements = open_url(url, models())
    try:
        await _locked(database, statements, work, lock_timeout, alembic_runs=True)
    finally:
        await database.close()


def sync_url(url: str) -> str:
    """A URL that alembic can write SQL for: no driver, no credentials."""
    return f"{urls.resolve(url).url.get_backend_name()}://"


async def _locked(
    database: Database,
    statements: Generic,
    work: Callable[[Connection], None],
    lock_timeout: float,
    *,
    alembic_runs: bool = False,
) -> None:
    deadline = time.monotonic() + lock_timeout

    def attempt(conn: Connection) -> bool:
        with statements.migrating(conn) as held:
            if held:
                work(conn)
            return held

    while True:
        if alembic_runs or _alembic.acquire(blocking=False):
            try:
                if await database.submit(attempt, write=True):
                    return
            except DBAPIError as error:
                # without a lock, another process may have made what this one was about to make
                if classify(error) is not Fault.CONFLICT and not await is_ready(database):
                    raise
            finally:
                if not alembic_runs:
                    _alembic.release()
        if time.monotonic() > deadline:
            raise MigrationLockError
        await asyncio.sleep(_POLL)


def _run_alembic(conn: Connection) -> None:
    # only who has something to do pays for the import
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.attributes["connection"] = conn
    chatty = logging.getLogger("alembic")
    level = chatty.level
    if level == logging.NOTSET:
        chatty.setLevel(logging.WARNING)  # an application's own level stays
    try:
        command.upgrade(config, "head")
    finally:
        chatty.setLevel(level)
    logger.info("the tables were brought to revision %s", HEAD)


def check_adoptable(conn: Connection) -> None:
    """Refuses a database whose tables are not google-adk's schema version 1, before any change.

    Raises:
        SchemaError: what is there instead, and what to do.
    """
    found = inspect(conn)
    if found.has_table("adk_internal_metadata"):
        version = conn.execute(
            select(_metadata.c.value).where(_metadata.c.key == "schema_version")
        ).scalar()
        if version != "1":
            raise SchemaError(
                f"adk_internal_metadata says schema_version {version!r}; only '1' can be adopted"
            )
    if found.has_table("events"):
        columns = {column["name"] for column in found.get_columns("events")}
        if "actions" in columns and "event_data" not in columns:
            raise SchemaError(
                "This database has google-adk's old layout, with pickled actions. Move it with"
                " 'adk migrate session' first, or use another database."
            )
    for name, wanted in models().metadata.tables.items():
        if found.has_table(name):
            columns = {column["name"] for column in found.get_columns(name)}
            # what this package adds may be missing: that is what the migration is for
            missing = {column.name for column in wanted.columns} - {"event_exact"} - columns
            if missing:
                raise SchemaError(
                    f"The table {name} belongs to another application: it has no column"
                    f" {', '.join(sorted(missing))}. Use another database."
                )


def scripts() -> Path:
    """The folder with the revisions: inside the installed package, or in a checkout beside it."""
    package = Path(__file__).parent
    carried = package / "_migrations"
    return carried if carried.is_dir() else package.parent / "alembic"
