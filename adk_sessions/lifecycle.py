"""Title and labels, archive, erasure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

from sqlalchemy import Connection

from . import checks, clock
from .binding import E, S
from .dialects.lifecycle import Details
from .dialects.retention import Removed
from .dialects.rows import Key
from .labels import check_labels, labels_text, load_labels
from .models import INDEX
from .retention import Retention
from .session import SessionSummary


class Keep(Enum):
    """The type of `KEEP`."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return "KEEP"


#: for an argument that is to leave alone what is stored, where None removes it
KEEP: Final = Keep.KEEP


@dataclass(frozen=True)
class ErasureReport:
    """What an erasure removed, or with ``dry_run`` would remove, in rows.

    Attributes:
        sessions, events, state_changes: of the user; events whose session is gone are counted too.
        user_states: 1 if the user had state that sessions share.
        backups: rows in the tables that a conversion of google-adk's old layout has kept.
        left: what a scan of all these tables still finds; 0 says that nothing is left.
    """

    sessions: int
    events: int
    user_states: int
    state_changes: int
    backups: int
    left: int


class Lifecycle(Retention[S, E]):
    """The part of a store for that."""

    async def update_session(
        self,
        app_name: str,
        user_id: str,
        session_id: str,
        *,
        title: str | Literal[Keep.KEEP] | None = KEEP,
        labels: Mapping[str, str | None] | None = None,
        expire_time: float | Literal[Keep.KEEP] | None = KEEP,
    ) -> SessionSummary:
        """Changes what is said of a session: its title, its labels, when it expires.

        It is no turn of the conversation: ``last_update_time`` stays, and no session that somebody
        holds becomes stale. What is not given stays as it is.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session.
            title: at most 256 characters; None removes it.
            labels: strings by name, set in the database one by one, so that two who label at once
                lose nothing; None as a value removes a label. At most 64 of them, names of at most
                64 characters, values of 256.
            expire_time: seconds since the epoch, from when on any `prune` of the application
                deletes the session; None for never.

        Returns:
            The session as it is now.

        Raises:
            SessionNotFoundError: there is no such session.
            InvalidInputError: an argument cannot be stored; nothing was written.
            OutcomeUnknownError: the connection broke at the commit; repeat it.
        """
        key = self._checked(app_name, user_id, session_id)
        values: dict[str, Any] = {}
        if title is not KEEP:
            if title is not None:
                checks.check_key(title, "title", limit=checks.TEXT_LENGTH)
            values["title"] = title
        if expire_time is not KEEP:
            values["expire_time"] = None
            if expire_time is not None:
                checks.check_timestamp(expire_time, "expire_time")
                values["expire_time"] = clock.to_datetime(expire_time)
        if labels is not None:
            check_labels(labels, removing=True)

        def change(row: Details) -> dict[str, Any]:
            if not labels:
                return values
            merged = {**load_labels(row.labels), **labels}
            kept = {name: value for name, value in merged.items() if value is not None}
            check_labels(kept)
            return {**values, "labels": labels_text(kept) if kept else None}

        return await self._changed(key, change)

    async def archive_session(self, app_name: str, user_id: str, session_id: str) -> SessionSummary:
        """Archives a session: lists and pages leave it out, and nothing is appended to it.

        It is read by its id as before. Archived again it stays archived since the first time.
        google-adk's own service knows nothing of it.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session.

        Returns:
            The session as it is now.

        Raises:
            SessionNotFoundError: there is no such session.
            OutcomeUnknownError: the connection broke at the commit; repeat it.
        """
        now = clock.to_datetime(self._now())
        return await self._changed(
            self._checked(app_name, user_id, session_id),
            lambda row: {} if row.archive_time is not None else {"archive_time": now},
        )

    async def restore_session(self, app_name: str, user_id: str, session_id: str) -> SessionSummary:
        """Takes a session out of the archive; one that is not archived stays as it is.

        Args:
            app_name: the application.
            user_id: the user.
            session_id: the session.

        Returns:
            The session as it is now.

        Raises:
            SessionNotFoundError: there is no such session.
            OutcomeUnknownError: the connection broke at the commit; repeat it.
        """
        return await self._changed(
            self._checked(app_name, user_id, session_id),
            lambda row: {} if row.archive_time is None else {"archive_time": None},
        )

    async def erase_user(
        self, app_name: str, user_id: str, *, dry_run: bool = False
    ) -> ErasureReport:
        """Deletes everything that is stored of a user in an application, and looks for the rest.

        Sessions with their events and recorded state changes, the state that they share, and the
        user's rows in the backups that a conversion of google-adk's old layout has left. State of
        the application stays, whoever has set it. It is done in batches, and a call that was
        broken off is repeated as it is.

        Stop the user's writers first: sessions and state that somebody stores meanwhile may be
        there afterwards. The scan at the end then says so, and so does another call.

        What is deleted is gone for every reader of these tables. Logs, replicas that lag behind,
        copies, and what a database keeps of deleted rows on disk until it is vacuumed are for its
        operator to see to.

        Args:
            app_name: the application.
            user_id: the user, spelled exactly so.
            dry_run: only count.

        Returns:
            What was removed, and what is left of it: nothing, if ``left`` is 0.

        Raises:
            InvalidInputError: an id is none that can be stored.
            ConfigurationError: policies of row level security hide rows from this role.
            DatabaseError: it failed, and may be repeated; before anything is deleted if this role
                may not read one of the tables, or not delete from the backups.
        """
        checks.check_key(app_name, "app_name")
        checks.check_key(user_id, "user_id")
        await self.prepare_tables()
        await self._run(self._statements.require_sight, write=False)
        found, backups = await self._scanned(app_name, user_id)
        if dry_run:
            return _report(found, backups, left=sum(found) + backups)
        if backups:  # first: a role that may not do it has then deleted nothing
            backups = await self._repeated(
                lambda conn: self._backups(conn, app_name, user_id, erase=True)
            )
        removed = Removed()
        async for rows in self._batches(app_name, user_id, None):
            places = [(row.user_id, row.id) for row in rows]
            removed = removed.plus(await self._removed(app_name, user_id, places, None))
        # last: a session that was still there may have written to it meanwhile
        rest = await self._repeated(
            lambda conn: self._statements.remove_rest_of_user(conn, app_name, user_id)
        )
        removed = removed.plus(rest)
        left, backups_left = await self._scanned(app_name, user_id)
        return _report(removed, backups, left=sum(left) + backups_left)

    # --- pieces --------------------------------------------------------------------------------

    async def _changed(self, key: Key, change: Any) -> SessionSummary:
        """Writes what ``change`` makes of the held row; the session as it is then."""
        await self.prepare_tables()

        def work(conn: Connection) -> Details | None:
            row = self._statements.details(conn, key)
            if row is None:
                return None
            values = change(row)
            if values:
                self._statements.set_details(conn, key, values)
            return row._replace(**values)

        # none of it adds up, so a second time does no harm
        row = await self._repeated(work)
        if row is None:
            raise self._missing(key.session_id)
        return SessionSummary(
            *key,
            title=row.title,
            labels=load_labels(row.labels),
            create_time=clock.to_epoch(row.create_time),
            last_update_time=clock.to_epoch(row.update_time),
            archive_time=None if row.archive_time is None else clock.to_epoch(row.archive_time),
            expire_time=None if row.expire_time is None else clock.to_epoch(row.expire_time),
        )

    async def _scanned(self, app_name: str, user_id: str) -> tuple[Removed, int]:
        """How many rows are a user's, and how many in backups."""
        return await self._run(
            lambda conn: (
                self._statements.count_of_user(conn, app_name, user_id),
                self._backups(conn, app_name, user_id, erase=False),
            ),
            write=False,
        )

    def _backups(self, conn: Connection, app_name: str, user_id: str, *, erase: bool) -> int:
        from .dialects import erasure  # it brings the reader of the old layout

        names = self.models.names
        layout = erasure.Layout(conn, names.schema, names.of, names.of(INDEX))
        work = erasure.erase if erase else erasure.count
        return work(layout, app_name, user_id)


def _report(rows: Removed, backups: int, *, left: int) -> ErasureReport:
    return ErasureReport(
        rows.sessions, rows.events, rows.user_states, rows.state_changes, backups, left
    )
