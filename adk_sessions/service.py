"""The session store: create, get, list, append, delete, state.

`Store` is generic over the types of sessions and events, so that callers keep their own objects:
an append changes the very session it was given. `SessionService` binds it to the types of this
package, ``adk_sessions.adk.DatabaseSessionService`` to google-adk's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from operator import itemgetter
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from sqlalchemy import URL
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from . import changes, checks, clock, codec, errors, telemetry
from . import state as states
from .appends import Appends, OnStale
from .binding import ConfigLike, E, OnBadEvent, S, encode_deltas, uncollected
from .dialects import (
    Backend,
    Pooler,
    Synchronous,
    open_bells,
    open_engine,
    open_replica,
    open_url,
)
from .dialects.rows import Key, Snapshot, States
from .history import History
from .lean import Lean
from .lifecycle import Lifecycle
from .models import models
from .moving import Moving
from .pages import Pages
from .retry import WINDOW, Attempt, Retry
from .session import Event, ListSessionsResponse, Session
from .turns import Turns
from .watch import Watching

__all__ = ["SessionService", "Store"]

T = TypeVar("T")

Mode = Literal["auto", "check", "off"]

# Events of one batch: databases limit the parameters of a statement.
_LARGEST_BATCH = 10_000


@telemetry.instrument
class Store(
    Appends[S, E], Pages[S, E], Lifecycle[S, E], History[S, E], Moving[S, E], Watching[S, E]
):
    """Sessions, events and state in any SQL database.

    Args:
        url: a database URL as people paste it: ``sqlite:///chats.db``, ``postgresql://…``,
            ``mysql://…``; its async driver is found. Exactly one of ``url`` and ``engine``.
        engine: an engine of the application's. Nothing is attached to it, and `close` leaves it
            open.
        backend: ``generic`` takes the path that any SQL database can go (lock the row, merge in
            Python, write, in one transaction) though the dialect has a shorter one, for databases
            that only speak another one's dialect.
        sqlite_synchronous: for an SQLite file given by URL. ``FULL`` keeps every acknowledged
            append over a power loss, ``NORMAL`` over a crash of the process, and is faster.
        retry_window: seconds in which each statement of a call is repeated after a conflict or a
            lost connection; 0 never repeats.
        migrate: what the first call does about the schema. ``auto`` brings it to this release's
            revision, at the cost of one query if it is there. ``check`` changes nothing and raises
            `SchemaError` if it is at any other revision. ``off`` asks nothing: the schema is
            promised to be as `validate_schema` wants it. None is ``auto``, but ``check`` where the
            URL says that a pooler in transaction mode stands between (``pgbouncer=true``), since a
            lock for the migration cannot be held there, and ``off`` with ``tables``.
        schema: the database schema (on MySQL and MariaDB: the database) that holds the tables;
            None for the connection's own.
        table_prefix: put before the names of tables and indexes: letters, digits and ``_``.
        tables: names of tables that the host application owns and migrates itself, by the names
            that they have here: ``{"sessions": "chat_sessions", "events": "chat_events", …}``.
        on_stale: what an append does when somebody else has appended since the session was read,
            unless it says so itself: ``raise`` refuses it, ``refresh`` appends it all the same and
            brings what lies between into the caller's session. See `append_event`.
        on_bad_event: what a read does about a stored event that is damaged, or that newer software
            wrote and these classes cannot hold: ``raise`` an `UnreadableEventError` that names it,
            or go on with a ``placeholder``: its id, invocation and time, its author if that can be
            told, and an ``error_code``. A placeholder cannot be appended.
        pooler: ``transaction`` says that a pooler stands between which may give each transaction
            another connection (pgbouncer, hosted poolers): no statement is then left prepared. The
            same as ``pgbouncer=true`` in the URL. An engine must be made for it; it is then only
            told what ``migrate`` is by default.
        connect_timeout: seconds for each host that a URL names, so that one which hangs is passed
            over. None for what the URL's ``connect_timeout`` says, else 10.
        statement_timeout: seconds that an operation may take once it has a connection; None for no
            limit. One that takes longer loses its connection, and is repeated like any that does
            within ``retry_window``. Migrations take as long as they take. It works through poolers,
            and on servers that hang.
        read_url: a replica of the database for `list_sessions`, and for `get_session` where it says
            so. While it fails they read from the database itself. It shares all options; of several
            hosts any will do.
        read_engine: the same, as an engine of the application's.
        row_level_security: sets ``adk_sessions.app_name`` and ``adk_sessions.user_id`` in each
            transaction, for the policies that ``adk-sessions sql --rls`` prints; for databases that
            have such policies; that they are there, and bind the role, is seen to by the first
            call. Empty ids, and listing the sessions of all users, are refused.
        lean_validation: reads events without the validators of their class that only warn or accept
            shorthand (for google-adk's a few times faster). It needs a private switch of pydantic.
            The first events are validated both ways: where the results are not equal, or the switch
            is gone, a warning is logged and validation is the usual one.
        notify: for PostgreSQL with asyncpg: appends tell the watchers of all services that have
            this too, so that `watch` need not wait for its next look. Each append then waits for
            those of all sessions at its commit: see README for what that costs. Watchers need one
            more connection for each service and event loop, with no pooler in transaction mode
            between.
        options: of ``sqlalchemy.ext.asyncio.create_async_engine``, such as ``pool_size``,
            ``max_overflow``, ``pool_timeout``, ``pool_recycle``, ``connect_args``. Those that shape
            a pool, ``pooler`` and the timeouts mean nothing to SQLite, where a file has one
            connection to read and one to write.

    Raises:
        ConfigurationError: bad URL, missing or synchronous driver, unknown option; a ValueError.
    """

    def __init__(
        self,
        url: str | URL | None = None,
        *,
        engine: AsyncEngine | None = None,
        backend: Backend = "auto",
        sqlite_synchronous: Synchronous = "FULL",
        retry_window: float = WINDOW,
        migrate: Mode | None = None,
        schema: str | None = None,
        table_prefix: str = "",
        tables: Mapping[str, str] | None = None,
        on_stale: OnStale = "raise",
        on_bad_event: OnBadEvent = "raise",
        pooler: Pooler | None = None,
        connect_timeout: float | None = None,
        statement_timeout: float | None = None,
        read_url: str | URL | None = None,
        read_engine: AsyncEngine | None = None,
        row_level_security: bool = False,
        lean_validation: bool = False,
        notify: bool = False,
        **options: Any,
    ) -> None:
        if not hasattr(self, "session_type"):
            raise errors.ConfigurationError(
                "Subclass Store and set session_type, event_type and list_type."
            )
        if backend not in ("auto", "generic"):
            raise errors.ConfigurationError("backend must be 'auto' or 'generic'")
        if not isinstance(url, str | URL | None) or not isinstance(engine, AsyncEngine | None):
            raise errors.ConfigurationError(
                "url must be a string or a URL, and an engine an AsyncEngine, passed as engine="
            )
        self.models = models(schema, table_prefix, tables)
        path: dict[str, Any] = {"backend": backend, "row_level_security": row_level_security}
        path |= {"pooler": pooler, "statement_timeout": statement_timeout}
        if connect_timeout is not None:
            options["connect_timeout"] = connect_timeout
        if engine is None and url is not None:
            self._database, self._statements = open_url(
                url, self.models, **path, sqlite_synchronous=sqlite_synchronous, **options
            )
        elif engine is not None and url is None:
            if sqlite_synchronous != "FULL":
                raise errors.ConfigurationError("Durability is for the engine to set, not for us.")
            if options:
                raise errors.ConfigurationError(
                    f"{', '.join(sorted(options))}: options are for an engine made from a URL"
                )
            self._database, self._statements = open_engine(engine, self.models, **path)
        else:
            raise errors.ConfigurationError("Exactly one of 'url' or 'engine' must be provided.")
        self._replica = open_replica(
            self._statements,
            url=read_url,
            engine=read_engine,
            tables=self.models,
            path=path,
            options=options,
        )
        self._bells = open_bells(self._database, self._statements, notify=notify)
        self._migrate = self._mode(migrate)
        if on_stale not in ("raise", "refresh"):
            raise errors.ConfigurationError("on_stale must be 'raise' or 'refresh'")
        self._on_stale = on_stale
        if on_bad_event not in ("raise", "placeholder"):
            raise errors.ConfigurationError("on_bad_event must be 'raise' or 'placeholder'")
        self._on_bad_event = on_bad_event
        self._warned = set()
        self._isolated = row_level_security
        self._retry = Retry(retry_window, lambda: self._database.reached)
        self._turns = Turns()
        if lean_validation:
            self._validate_json = Lean(self.event_type, self.lean_rules)
        self._prepared = False

    def _mode(self, given: Mode | None) -> Mode:
        if given not in ("auto", "check", "off", None):
            raise errors.ConfigurationError("migrate must be 'auto', 'check' or 'off'")
        if self.models.names.host_owned:
            if given not in ("off", None):
                raise errors.ConfigurationError(
                    "Tables that the host application owns are migrated by the host application:"
                    " migrate must be 'off'."
                )
            return "off"
        return given or ("check" if self._database.behind_pooler else "auto")

    # --- life cycle ----------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def prepare_tables(self) -> None:
        """Sees to the tables as ``migrate`` says; every operation calls it, so calling is optional.

        Any number of services and processes may do so at once. Later calls cost nothing.

        Raises:
            SchemaError: the tables are not at this release's revision, and may not or cannot be
                brought to it; the message says what to run.
            MigrationLockError: another process migrates for more than a minute.
            DatabaseError: the database refused or could not be reached.
        """
        if self._prepared:
            return
        async with self._turns.of("prepare"):
            if not self._prepared:
                if self._migrate != "off":
                    await self._retry(self._prepare, write=False)
                if self._isolated:
                    await self._run(self._statements.require_policies, write=False)
                self._prepared = True

    async def _prepare(self) -> None:
        # alembic is imported by whoever finds something to do, not by every start
        from . import migrate

        if self._migrate == "check":
            await migrate.require_head(self._database, self.models.names)
        else:
            await migrate.bring_to_head(self._database, self._statements, self.models.names)

    async def validate_schema(self) -> None:
        """Compares the live schema with what this release works on; reads catalogs, writes nothing.

        For a service's start, in any mode of ``migrate``: where the host application owns the
        tables, nothing else looks at them.

        Raises:
            SchemaError: every difference, by table and column, in one message.
            DatabaseError: the database could not be reached.
        """
        from . import validate

        await self._retry(
            lambda: validate.validate_schema(self._database, self.models), write=False
        )

    async def ping(self, *, timeout: float = 5.0) -> None:
        """Returns if the database answers: for readiness probes.

        Args:
            timeout: seconds to wait at the most.

        Raises:
            DatabaseError: it does not.
        """
        # not asyncio.timeout: a driver may take its time over being cancelled
        answer = asyncio.create_task(self._run(self._statements.ping, write=False))
        try:
            await asyncio.wait({answer}, timeout=timeout)
        finally:
            answer.cancel()
        if answer.done():
            return answer.result()
        raise errors.DatabaseError(
            f"The database did not answer in {timeout:g} seconds.", retryable=True
        )

    async def flush(self) -> None:
        """Does nothing: what was acknowledged is stored."""

    async def close(self) -> None:
        """Closes the connections that the service made; an engine that was passed stays open.

        The service may be used again afterwards; an in-memory database is then empty.
        """
        await self._bells.close()
        await self._database.close()
        if self._replica is not None:
            await self._replica.close()
        self._prepared = False

    # --- sessions ------------------------------------------------------------------------------

    async def create_session(
        self,
        *,
        app_name: str,
        user_id: str,
        state: dict[str, Any] | None = None,
        session_id: str | None = None,
    ) -> S:
        """Creates a session.

        Args:
            app_name: the application, at most 128 characters like the other ids.
            user_id: the user.
            state: initial state; ``app:`` and ``user:`` keys are set in their wider scope for
                everybody, ``temp:`` keys are dropped.
            session_id: taken as it is, spaces included; one is made if None.

        Returns:
            The session as a following `get_session` would return it.

        Raises:
            AlreadyExistsError: the user has a session with this id.
            OutcomeUnknownError: it may be stored; repeat it with the same id.
            InvalidInputError: an argument cannot be stored; nothing was written.
        """
        session_id = self._new_id() if session_id is None else session_id
        key = self._checked(app_name, user_id, session_id)
        initial: dict[str, Any] = {} if state is None else state
        checks.check_state(initial, "state")
        deltas = encode_deltas(initial, "state")
        now = clock.to_datetime(self._now())
        await self.prepare_tables()
        attempt = Attempt()
        stored: States | None = None
        with contextlib.suppress(IntegrityError):
            stored = await self._run(
                lambda conn: self._statements.create(conn, key, now, deltas),
                write=True,
                attempt=attempt,
            )
        if stored is None:
            # after a lost connection the session that is there may be the one of the first try
            found = await self._made(key) if attempt.lost else None
            if found is None or found.create_time != now:
                raise self.already_exists(
                    f"Session with id {session_id!r} already exists. Choose another id, or get the"
                    " existing session."
                )
            stored = found.states
        return self._session(key, stored, now)

    async def get_session(
        self,
        *,
        app_name: str,
        user_id: str,
        session_id: str,
        config: ConfigLike | None = None,
        num_recent_events: int | None = None,
        after_timestamp: float | None = None,
        at: str | None = None,
        replica: bool = False,
    ) -> S | None:
        """Reads a session: state and events of one moment, events in the order of their append.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session.
            config: the next two arguments as one object, as google-adk passes them.
            num_recent_events: at most so many events, the newest; 0 for none, None for all.
            after_timestamp: only events whose own timestamp (seconds since the epoch) is this or
                later; None or 0 for all. With both, time is filtered first.
            at: id of an event, for the session as it was right after it: the events up to it and
                the state of then, before any `update_state` that followed; ``app:`` and ``user:``
                keys are as they are now. An append to such a session is refused as stale, unless
                the event is the newest. A process of an earlier release changes states without
                a record: it is exact from when none writes any more.
            replica: whether it may be read from the replica, if there is one. That may lag behind:
                the session may be missing, and an append to it be refused as stale.

        Returns:
            The session, None if there is no such one.

        Raises:
            InvalidInputError: a filter is negative or not a number.
            EventNotFoundError: the session has no event ``at``.
            StateUnknownError: what the state was at that event is not recorded.
            UnreadableEventError: a stored event cannot be read, and ``on_bad_event`` is ``raise``.
        """
        if config is not None:
            num_recent_events = config.num_recent_events
            after_timestamp = config.after_timestamp
        checks.check_filters(num_recent_events, after_timestamp)
        after = after_timestamp or None
        key = Key(app_name, user_id, session_id)
        self._check_at(at)
        if not checks.are_keys(*key):
            return None
        await self.prepare_tables()
        found = await self._read_at(
            key, at=at, limit=num_recent_events, after=after, replica=replica
        )
        if found is None:
            return None
        events = self._events(found, after, key)
        if num_recent_events and len(events) < len(found.events) == num_recent_events:
            # some were newer by their place only: look further back for the others
            found = await self._read_at(key, at=at, limit=None, after=after, replica=replica)
            if found is None:
                return None
            events = self._events(found, after, key)[-num_recent_events:]
        return self._session(key, found.states, found.update_time, events)

    async def list_sessions(
        self, *, app_name: str, user_id: str | None = None, archived: bool | None = False
    ) -> Any:
        """Lists sessions with their merged state and no events, from a replica if there is one.

        Args:
            app_name: the application.
            user_id: the user; None for all users of the application.
            archived: False leaves out sessions that are archived, True lists only them, None both.

        Returns:
            A response with the list ``sessions``, the least recently updated first.

        Raises:
            InvalidInputError: ``archived`` is something else; or all users are asked for, with
                ``row_level_security``.
        """
        checks.check_one_of(archived, (False, True, None), "archived")
        if not checks.are_keys(app_name, "" if user_id is None else user_id):
            return self.list_type(sessions=[])
        await self.prepare_tables()
        found = await self._consult(
            lambda statements, conn: statements.listing(conn, app_name, user_id, archived),
            replica=True,
        )
        app = codec.load_state(found.app_state)
        wider = {
            user: states.merge(states.Scopes(app, codec.load_state(text), {}))
            for user, text in found.user_states.items()
        }
        alone = states.merge(states.Scopes(app, {}, {}))
        with uncollected(len(found.sessions)):
            sessions = [
                self._bare_session(
                    Key(app_name, row.user_id, row.id),
                    # what sessions share is each one's own in memory
                    codec.load_state(row.state) | states.copied(wider.get(row.user_id, alone)),
                    row.update_time,
                )
                for row in sorted(found.sessions, key=itemgetter(2, 0, 1))
            ]
            return self.list_type(sessions=sessions)

    async def delete_session(self, app_name: str, user_id: str, session_id: str) -> None:
        """Deletes a session and its events, if there is such a one; wider state stays.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session.
        """
        key = Key(app_name, user_id, session_id)
        if checks.are_keys(*key):
            await self.prepare_tables()
            await self._run(lambda conn: self._statements.delete(conn, key), write=True)

    async def get_user_state(self, *, app_name: str, user_id: str) -> dict[str, Any]:
        """Reads what every session of a user shares.

        Args:
            app_name: the application.
            user_id: the user.

        Returns:
            Keys without their prefix; empty if there is nothing.
        """
        if not checks.are_keys(app_name, user_id):
            return {}
        await self.prepare_tables()
        return codec.load_state(
            await self._run(
                lambda conn: self._statements.user_state(conn, app_name, user_id), write=False
            )
        )

    async def get_app_state(self, *, app_name: str) -> dict[str, Any]:
        """Reads what every user of an application shares.

        Args:
            app_name: the application.

        Returns:
            Keys without their prefix; empty if there is nothing.
        """
        if not checks.are_keys(app_name):
            return {}
        await self.prepare_tables()
        return codec.load_state(
            await self._run(lambda conn: self._statements.app_state(conn, app_name), write=False)
        )

    async def update_state(
        self,
        *,
        app_name: str,
        user_id: str | None = None,
        session_id: str | None = None,
        delta: dict[str, Any] | None = None,
        add: dict[str, int | float] | None = None,
        delete: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Changes state outside of a conversation: no event is written, no session becomes stale.

        All of it is stored or nothing. Keys carry their prefix, as in an event's state delta:
        ``app:`` for the application, ``user:`` for the user, none for the session. Sessions that
        were read before do not show the change.

        It is repeated only where it is certain that nothing was stored: a sum would show it.

        Args:
            app_name: the application.
            user_id: the user; needed for ``user:`` keys and for a session.
            session_id: the session; needed for keys without prefix.
            delta: keys to set; None is a value like any other.
            add: keys to add a number to, which may be negative; a missing one counts from 0.
                Integers are added exactly, and as doubles where either number is a float.
            delete: keys to remove.

        Returns:
            The keys of ``delta`` and ``add`` with their values as they are now stored.

        Raises:
            InvalidInputError: a key is ``temp:``, is there twice or lacks the id that it needs; an
                amount, or the value it is to be added to, is not a number. Nothing was written.
            SessionNotFoundError: there is no such session, and a key without prefix needs it.
            OutcomeUnknownError: the connection broke at the commit; read the state to find out.
        """
        wanted = changes.changes(delta, add, delete)
        if session_id is not None and user_id is None:
            raise errors.InvalidInputError("a session is its user's: give user_id", field="user_id")
        if wanted.session is not None and session_id is None:
            raise errors.InvalidInputError(
                "a key without a prefix is a session's: give session_id", field="session_id"
            )
        if wanted.user is not None and user_id is None:
            raise errors.InvalidInputError("a user: key needs user_id", field="user_id")
        key = self._checked(app_name, user_id or "", session_id or "")
        if not any(wanted):
            return {}
        await self.prepare_tables()
        now = clock.to_datetime(self._now())
        written = await self._run_once(
            lambda conn: self._statements.update_state(conn, key, wanted, now)
        )
        if written is None:
            raise self._missing(key.session_id)
        return changes.merged(written)

    # --- append --------------------------------------------------------------------------------

    async def append_event(self, session: S, event: E, *, on_stale: OnStale | None = None) -> E:
        """Appends an event to a session and sets its state delta, in storage and in ``session``.

        Appends of one service to one session take turns. The event's id makes a repetition
        harmless: the same event again changes nothing in storage, and brings into ``session`` what
        it has missed.

        A caller that is cancelled goes on when the append is done, so that ``session`` is what is
        stored; if the database is silent for 2 seconds the append is given up, and the same event
        again tells what became of it.

        Args:
            session: the session as it was created, read or listed; it is changed in place.
            event: a ``partial`` one is returned as it is; ``temp:`` keys of its state delta go to
                ``session.state`` only, and are taken out of the event.
            on_stale: ``refresh`` appends whoever else has done so, and then brings the events and
                the state that lie between into ``session``, in order. An event that carries a
                compaction is refused even so: it stands for events that its writer has seen.
                ``raise`` refuses any. None for what the service was made with.

        Returns:
            ``event``.

        Raises:
            SessionNotFoundError: there is no such session (any more).
            SessionArchivedError: it is archived; nothing was stored.
            StaleSessionError: somebody else has appended since ``session`` was read. Nothing was
                stored, ``session`` and ``event`` are as they were.
            UnreadableEventError: an event that lies between cannot be read; ``event`` is stored.
            OutcomeUnknownError: it may be stored; repeat it with the same event.
            EventConflictError: the session has an event with this id and other content; its
                timestamp counts.
            InvalidInputError: a field cannot be stored; nothing was written.
        """
        self._check_types(session, "append_event", event)
        if event.partial:
            return event
        await self._append(session, [event], on_stale)
        return event

    async def append_events(
        self, session: S, events: Iterable[E], *, on_stale: OnStale | None = None
    ) -> list[E]:
        """Appends a batch of events to a session in one transaction: all of them or none.

        Much faster than one by one: for importing a history, or for what an agent has produced
        while nobody needed to see it. In storage and in ``session`` it is as if each had been
        appended in turn; nobody reads a session with some of them. The same batch again changes
        nothing, as with `append_event`.

        Args:
            session: the session as it was created, read or listed; it is changed in place.
            events: in the order in which they are to be read; at most 10,000, each with an id of
                its own. Those that are ``partial`` are left out.
            on_stale: as `append_event`.

        Returns:
            The events as a list, the partial ones too.

        Raises:
            SessionNotFoundError, SessionArchivedError, StaleSessionError, OutcomeUnknownError: as
                `append_event`.
            EventConflictError: some of the events are stored already, or one of the ids with other
                content. Nothing was stored.
            InvalidInputError: a field cannot be stored, an id is there twice, or there are too many
                events; nothing was written.
        """
        if not isinstance(events, Iterable):
            raise errors.InvalidInputError(
                f"append_events takes a list of {self.event_type.__name__}", field="events"
            )
        given = list(events)
        self._check_types(session, "append_events", *given)
        new = [event for event in given if not event.partial]
        if len(new) > _LARGEST_BATCH:
            raise errors.InvalidInputError(
                f"append_events takes at most {_LARGEST_BATCH:,} events", field="events"
            )
        if len({event.id for event in new}) < len(new):
            raise errors.InvalidInputError("two events of a batch have one id", field="events")
        if new:
            await self._append(session, new, on_stale)
        return given

    # --- pieces --------------------------------------------------------------------------------

    async def _made(self, key: Key) -> Snapshot | None:
        """The session that a create may have made whose connection was lost."""
        try:
            return await self._read(key, limit=0)
        except errors.DatabaseError as error:
            raise errors.OutcomeUnknownError.after(error) from None


class SessionService(Store[Session, Event]):
    """The store on its own types, for any agent framework and without google-adk.

    A new process goes on where the last one stopped:

        async with SessionService("sqlite:///chats.db") as service:
            session = await service.create_session(app_name="shop", user_id="ann")
            await service.append_event(
                session, Event(author="user", content="Hello", invocation_id="1")
            )

    See `Store` for the arguments.
    """

    session_type = Session
    event_type = Event
    list_type = ListSessionsResponse
