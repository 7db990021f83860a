"""The schema's history, run from code: alembic with the revisions that the package carries.

    await migrate.upgrade(engine)        # what `adk-sessions upgrade` does

Any number of processes may start at once on an empty database. Each first looks if there is
something to do, which costs one query; who finds work takes the database's own lock for it.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from zoneinfo import ZoneInfo

from sqlalchemy import URL, Connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from . import adoption, convert, validate
from . import url as urls
from .dialects import (
    Database,
    Generic,
    open_engine,
    open_url,
    policies,
    statements_for,
)
from .dialects.faults import Fault, classify, translate
from .errors import ConfigurationError, MigrationLockError, SchemaError, SessionStoreError
from .models import VERSION_TABLE, Names, models_of, names
from .retry import Retry

logger = logging.getLogger(__name__)

HEAD = adoption.HEAD

# Seconds to wait for another process's migration.
LOCK_TIMEOUT = 60.0
_POLL = 0.05
_LONGEST_POLL = 0.5
# Seconds that no single wait for a lock takes.
_WORKED = 15.0

# alembic's context is global to the process: one migration at a time, whatever the database.
_alembic = threading.Lock()


def _forked() -> None:
    global _alembic
    _alembic = threading.Lock()  # a thread of the parent's may hold the other one for ever


os.register_at_fork(after_in_child=_forked)

Target = AsyncEngine | URL | str


T = TypeVar("T")


@dataclass(frozen=True)
class Conversion:
    """How google-adk's old layout, with pickled actions, is to be read.

    Attributes:
        source_timezone: IANA name of the zone that the processes which wrote it ran in; that
            layout holds their local times.
        refused: what to do when a pickle names a class that is not on the list: ``stop`` before
            anything is replaced, or keep the event with ``empty`` actions.
        progress: called with the rows done and all rows.

    Raises:
        ConfigurationError: there is no such zone, or nothing to do of this name.
    """

    source_timezone: str = "UTC"
    refused: Literal["stop", "empty"] = "stop"
    progress: convert.Progress | None = None

    def __post_init__(self) -> None:
        if self.refused not in ("stop", "empty"):
            raise ConfigurationError("refused must be 'stop' or 'empty'")
        try:
            ZoneInfo(self.source_timezone)
        except (KeyError, ValueError, OSError, TypeError):
            known = False
        else:
            known = True
        if not known:
            raise ConfigurationError(
                f"There is no time zone {self.source_timezone!r}; try UTC or Europe/Berlin."
            )

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.source_timezone)


# --- for deploys -----------------------------------------------------------------------------


async def upgrade(
    target: Target,
    *,
    schema: str | None = None,
    table_prefix: str = "",
    conversion: Conversion | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
) -> convert.Report | None:
    """Brings a database's tables to this release's revision: makes, adopts or converts them.

    Args:
        target: an engine, which stays open, or a URL as people paste it. A direct connection, not
            one through a pooler in transaction mode.
        schema: the database schema of the tables; it is made if it is missing.
        table_prefix: of the tables' and indexes' names.
        conversion: how google-adk's old layout is read; None is `Conversion()`.
        lock_timeout: seconds to wait for another process that migrates, and for tables that
            others hold.

    Returns:
        What was converted, None if the database had not the old layout.

    Raises:
        MigrationLockError: another process migrates, or holds a table, for longer than that.
        SchemaError: there are tables that cannot be adopted.
        DatabaseError: the database refused.
    """
    how = conversion or Conversion()

    async def run(place: _Place) -> convert.Report | None:
        if await _is_ready(place.database, place.names):
            return None
        return await _locked(place, lambda conn: _upgrade(conn, place, how), lock_timeout)

    return await _on(target, names(schema, table_prefix), run)


async def current(
    target: Target, *, schema: str | None = None, table_prefix: str = ""
) -> str | None:
    """The revision that a database's tables are at, None if it has none.

    Args:
        target, schema, table_prefix: as for `upgrade`.
    """
    return await _on(target, names(schema, table_prefix), lambda place: place.revision())


async def check(target: Target, *, schema: str | None = None, table_prefix: str = "") -> None:
    """Compares revision, tables, columns, types, keys and indexes with this release's.

    Args:
        target, schema, table_prefix: as for `upgrade`.

    Raises:
        SchemaError: every difference, in one message.
    """

    async def run(place: _Place) -> None:
        await require_head(place.database, place.names)
        try:
            await validate.validate_schema(place.database, models_of(place.names))
        except SchemaError as error:
            differences = str(error)
        else:
            return
        raise SchemaError(
            f"{differences}\nIf the revision was only stamped, go back with:"
            f" {adoption.command('stamp base', place.names)}, and upgrade."
        )

    await _on(target, names(schema, table_prefix), run)


async def stamp(
    target: Target,
    revision: str = "head",
    *,
    schema: str | None = None,
    table_prefix: str = "",
    lock_timeout: float = LOCK_TIMEOUT,
) -> None:
    """Notes that the tables are at a revision, without running anything.

    Args:
        target, schema, table_prefix, lock_timeout: as for `upgrade`.
        revision: four digits, ``head`` or ``base``.

    Raises:
        ConfigurationError: there is no such revision.
    """

    if revision not in ("head", "base", *adoption.REVISIONS):
        raise ConfigurationError(f"There is no revision {revision!r}; the newest is {HEAD}.")

    async def run(place: _Place) -> None:
        await _locked(
            place, lambda conn: _run_alembic(conn, place, "stamp", revision), lock_timeout
        )

    await _on(target, names(schema, table_prefix), run)


async def sql(
    dialect: str,
    *,
    schema: str | None = None,
    table_prefix: str = "",
    row_level_security: bool = False,
) -> str:
    """The statements that make the tables, to paste where nothing can be run.

    Args:
        dialect: the database, as a URL begins: its name.
        schema, table_prefix: as for `upgrade`.
        row_level_security: with the policies that `SessionService(row_level_security=True)` needs.

    Raises:
        ConfigurationError: there is no such database, or it has no such policies.
    """
    from alembic import command

    where = names(schema, table_prefix)
    policy = policies(dialect, models_of(where)) if row_level_security else ""
    text = io.StringIO()
    config = _config(where, output_buffer=text)
    backend = sync_url(f"{dialect}://")
    statements_for(backend.removesuffix("://"), models_of(where), "auto")
    config.attributes["dialect"] = backend
    deadline = time.monotonic() + LOCK_TIMEOUT
    while not _alembic.acquire(blocking=False):
        if time.monotonic() > deadline:
            raise MigrationLockError
        await asyncio.sleep(_POLL)
    try:
        command.upgrade(config, "head", sql=True)
    finally:
        _alembic.release()
    return f"-- For an empty database. Stop at the first error.\n\n{text.getvalue()}{policy}"


async def preview(
    target: Target,
    *,
    schema: str | None = None,
    table_prefix: str = "",
    conversion: Conversion | None = None,
) -> convert.Report | None:
    """What a conversion of google-adk's old layout would do; nothing is written.

    Args:
        target, schema, table_prefix, conversion: as for `upgrade`.

    Returns:
        The counts and the rows that would be refused, None if there is nothing to convert.

    Raises:
        SchemaError: there are tables that cannot be adopted.
    """
    how = conversion or Conversion()
    zone = how.zone

    async def run(place: _Place) -> convert.Report | None:
        def look(conn: Connection) -> convert.Report | None:
            if adoption.revision(conn, place.names) is not None:
                return None
            if not convert.is_v0(conn, place.names):
                adoption.check_adoptable(conn, place.names)
                return None
            return convert.preview(
                conn, place.statements, place.names, zone=zone, progress=how.progress
            )

        return None if place.database.is_missing() else await place.submit(look)

    return await _on(target, names(schema, table_prefix), run)


async def finish_conversion(
    target: Target,
    *,
    schema: str | None = None,
    table_prefix: str = "",
    lock_timeout: float = LOCK_TIMEOUT,
) -> list[str]:
    """Drops the tables in which a conversion kept the originals.

    Args:
        target, schema, table_prefix, lock_timeout: as for `upgrade`.

    Returns:
        Their names.

    Raises:
        SchemaError: no conversion was done, or one is not complete.
    """

    async def run(place: _Place) -> list[str]:
        return await _locked(
            place, lambda conn: convert.finish(conn, place.statements, place.names), lock_timeout
        )

    return await _on(target, names(schema, table_prefix), run)


# --- for the service -------------------------------------------------------------------------


async def bring_to_head(
    database: Database,
    statements: Generic,
    where: Names,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
) -> None:
    """Brings the tables to this release's revision; at head it costs one query.

    A revision that this release does not know is taken as it is: a newer release only adds what an
    older one may ignore, so during a rolling deploy the older one goes on working.

    Args:
        database: where.
        statements: knows the database's lock.
        where: the tables' names.
        lock_timeout: seconds to wait for another process that migrates.

    Raises:
        MigrationLockError: another process migrates for longer than that.
        SchemaError: there are tables that cannot be adopted, or that only a command converts.
        DatabaseError: the database refused.
    """
    if not await _is_ready(database, where):
        place = _Place(database, statements, where)
        await _locked(place, lambda conn: _upgrade(conn, place, None), lock_timeout)


async def require_head(database: Database, where: Names) -> None:
    """Compares the revision with this release's, in one query when they are equal.

    Raises:
        SchemaError: they differ; the message says what to do.
    """
    if database.is_missing():
        adoption.require_head(None, where)
    try:
        found = await database.run(lambda conn: adoption.current(conn, where), write=False)
    except DBAPIError as error:
        if classify(error) is not Fault.FATAL:
            raise
        # is there no such table, or is something else wrong?
        found = await database.submit(lambda conn: adoption.revision(conn, where), write=False)
    if found is None:
        await database.submit(lambda conn: adoption.check_adoptable(conn, where), write=False)
    adoption.require_head(found, where)


# --- for alembic/env.py ----------------------------------------------------------------------


async def with_connection(
    url: str,
    work: Callable[[Connection], None],
    where: Names | None = None,
    *,
    changes: bool = True,
    lock_timeout: float = LOCK_TIMEOUT,
) -> None:
    """Runs alembic's ``work`` on a connection to a URL.

    Args:
        url: the database.
        work: what to run.
        where: the tables' names.
        changes: whether it changes the schema, and so needs the lock of `upgrade`.
        lock_timeout: seconds to wait for that.
    """

    async def run(place: _Place) -> None:
        def rebuild(conn: Connection) -> None:
            with place.statements.rebuilding(conn):
                work(conn)

        if changes:
            await _locked(place, rebuild, lock_timeout, alembic_runs=True)
        else:
            await place.submit(work)

    await _on(url, where or Names(), run)


def sync_url(url: str) -> str:
    """A URL that alembic can write SQL for: no driver, no credentials."""
    return f"{urls.resolve(url).url.get_backend_name()}://"


def scripts() -> Path:
    """The folder with the revisions: inside the installed package, or in a checkout beside it."""
    package = Path(__file__).parent
    carried = package / "_migrations"
    return carried if carried.is_dir() else package.parent / "alembic"


# --- pieces ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Tables in a database."""

    database: Database
    statements: Generic
    names: Names

    async def submit(self, work: Callable[[Connection], T]) -> T:
        return await self.database.submit(work, write=False)

    async def revision(self) -> str | None:
        if self.database.is_missing():
            return None  # who only asks makes no file
        return await self.submit(lambda conn: adoption.revision(conn, self.names))


async def _on(target: Target, where: Names, call: Callable[[_Place], Awaitable[T]]) -> T:
    """Awaits ``call`` on a place in a database, and translates the driver's errors."""
    once = Retry(0)
    if isinstance(target, AsyncEngine):
        place = _Place(*open_engine(target, models_of(where)), where)
        return await once(lambda: call(place), write=False)
    database, statements = open_url(target, models_of(where))
    try:
        return await once(lambda: call(_Place(database, statements, where)), write=False)
    finally:
        await database.close()


async def _is_ready(database: Database, where: Names) -> bool:
    try:
        found = await database.run(lambda conn: adoption.current(conn, where), write=False)
    except DBAPIError as error:
        if classify(error) not in (Fault.FATAL, Fault.CONFLICT):
            raise
        # most likely there is no such table yet, or somebody is about to make it; if it is
        # something else, the upgrade will say
        return False
    return adoption.is_at_head(found)


async def _locked(
    place: _Place,
    work: Callable[[Connection], T],
    lock_timeout: float,
    *,
    alembic_runs: bool = False,
) -> T:
    deadline = time.monotonic() + lock_timeout
    pause = _POLL
    done: list[T] = []

    def attempt(conn: Connection) -> None:
        # Taken where alembic runs: a task that is cancelled may be gone before its thread is.
        lock = _alembic
        if alembic_runs or lock.acquire(blocking=False):
            try:
                with place.statements.migration_lock(conn) as held:
                    if held:
                        done.append(work(conn))
            finally:
                if not alembic_runs:
                    lock.release()

    while True:
        failure: SessionStoreError | None = None
        began = time.monotonic()
        try:
            await place.database.submit(attempt, write=True)
        except DBAPIError as error:
            # without a lock, another process may have made what this one was about to make
            passing = classify(error) is Fault.CONFLICT or (
                not place.statements.locks_migrations
                and await _is_ready(place.database, place.names)
            )
            if isinstance(error, IntegrityError) and not passing:
                failure = translate(error, unknown=False)  # its text quotes rows
            elif not passing:
                raise
        if failure is not None:
            raise failure
        if done:
            return done[0]
        if time.monotonic() - began > _WORKED:
            deadline = time.monotonic() + lock_timeout  # that was work, and no waiting
        left = deadline - time.monotonic()
        if left < 0:
            raise MigrationLockError
        # many that ask often take the machine away from the one that works
        await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), left + 0.01))
        pause = min(2 * pause, _LONGEST_POLL)


def _upgrade(conn: Connection, place: _Place, how: Conversion | None) -> convert.Report | None:
    report: convert.Report | None = None
    found = adoption.revision(conn, place.names)
    if adoption.is_at_head(found):
        conn.rollback()
        return report  # somebody else was faster
    if how is not None and found is None and convert.is_v0(conn, place.names):
        adoption.require_version_1(conn, place.names)
        conn.rollback()
        report = convert.convert(
            conn,
            place.statements,
            place.names,
            zone=how.zone,
            refused=how.refused,
            progress=how.progress,
        )
    conn.rollback()
    _run_alembic(conn, place, "upgrade", "head")
    return report


def _run_alembic(
    conn: Connection, place: _Place, command: Literal["upgrade", "stamp"], revision: str
) -> None:
    # only who has something to do pays for the import
    from alembic import command as commands
    from alembic.util import CommandError

    config = _config(place.names, connection=conn)
    chatty = logging.getLogger("alembic")
    level = chatty.level
    if level == logging.NOTSET:
        chatty.setLevel(logging.WARNING)  # an application's own level stays
    refused = False
    try:
        with place.statements.rebuilding(conn):
            # where the lock is a transaction, and only now held, somebody else may have been faster
            found = adoption.revision(conn, place.names)
            if not place.statements.rebuilds_in_transaction:
                conn.rollback()  # or alembic would leave its work to be committed by somebody else
            if command == "stamp" or not adoption.is_at_head(found):
                if found is not None and found not in adoption.REVISIONS:
                    adoption.require_head(found, place.names)
                # by name: an application may have put a revision of its own into the folder
                getattr(commands, command)(config, HEAD if revision == "head" else revision)
                logger.info("%s from revision %s to %s", command, found, revision)
    except CommandError:
        refused = True
    finally:
        chatty.setLevel(level)
    if refused:
        raise SchemaError(
            f"alembic cannot go on from what the table {place.names.of(VERSION_TABLE)} says."
            " It must have one row, with a revision of this package."
        )


def _config(where: Names, output_buffer: io.StringIO | None = None, **attributes: Any) -> Any:
    from alembic.config import Config

    config = Config(output_buffer=output_buffer)
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.attributes.update(attributes, names=where)
    return config
