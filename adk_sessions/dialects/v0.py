"""google-adk's old layout in each database: its tables, its rows, and how its place is taken.

Written out here is the schema that alembic's revisions 0001 and 0002 make: a later revision finds
tables that were converted in the same form as tables that it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from pydantic import ValidationError
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    ForeignKeyConstraint,
    Index,
    MetaData,
    Select,
    String,
    Table,
    TableClause,
    Text,
    and_,
    cast,
    column,
    exists,
    func,
    inspect,
    literal_column,
    or_,
    select,
    table,
    text,
    type_coerce,
)
from sqlalchemy.dialects import mysql, postgresql

from .. import clock, codec
from ..errors import InvalidInputError, SchemaError
from ..pickles import PickleRefusedError, load_actions
from ..session import Event
from .base import Generic
from .rows import NewEvent
from .types import MYSQL_FAMILY, KeyText, Timestamp

TABLES = ("sessions", "events", "app_states", "user_states")
KEYS: dict[str, tuple[str, ...]] = {
    "sessions": ("app_name", "user_id", "id"),
    "events": ("id", "app_name", "user_id", "session_id"),
    "app_states": ("app_name",),
    "user_states": ("app_name", "user_id"),
}
_JSON = (
    *("content", "grounding_metadata", "custom_metadata", "usage_metadata", "citation_metadata"),
    *("input_transcription", "output_transcription"),
)
_FLAGS = ("partial", "turn_complete", "interrupted")
_TEXTS = ("branch", "error_code", "error_message")
_CLOCK = ("create_time", "update_time")
# What a conversion reads of each table besides its key, at least.
_NEEDED: dict[str, tuple[str, ...]] = {
    "sessions": ("state", *_CLOCK),
    "events": ("author", "invocation_id", "timestamp", "actions"),
    "app_states": ("state", "update_time"),
    "user_states": ("state", "update_time"),
}


class Layout:
    """The tables of a conversion, by their names in `TABLES`.

    Args:
        schema: the database schema.
        name: what a table, or an index, is called in the database.
        index: the name of the index of events.

    Attributes:
        working: the new tables, by the names under which they are filled.
        final: the new tables, by the names that they get.
        notes: what a conversion must remember.
        old, new: where the old and the new tables are now; see `locate`.
        sources: what to read old rows from.
        keys: their primary keys; true_keys, as the new rows have them.
    """

    old: dict[str, TableClause]
    new: dict[str, Table]
    sources: dict[str, Any]
    keys: dict[str, list[ColumnElement[Any]]]
    true_keys: dict[str, list[ColumnElement[Any]]]

    def __init__(
        self, conn: Connection, schema: str | None, name: Callable[[str], str], index: str
    ) -> None:
        self.conn, self.schema, self._name = conn, schema, name
        # an index's name is its table's own on MySQL and MariaDB, the schema's elsewhere
        self._index = index if conn.dialect.name in MYSQL_FAMILY else name("adk_v1_idx")
        self.working = _new_tables(schema, lambda table: name(f"adk_v1_{table}"), self._index)
        self.final = _new_tables(schema, name, index)
        self.notes = notes_table(schema, name)

    def backup(self, table: str) -> str:
        """What an old table is called in the end."""
        return self._name(f"adk_v0_{table}")

    def backups(self) -> list[str]:
        """Old tables that are there by that name, children first."""
        found = map(self.backup, sorted(TABLES, key=lambda table: table != "events"))
        return [name for name in found if self.exists(name)]

    def exists(self, name: str) -> bool:
        return has_table(self.conn, self.schema, name)

    def locate(self) -> None:
        """Looks where the tables are now: a broken-off conversion may have renamed some.

        Raises:
            SchemaError: one of the old tables, or a column of it, is not there.
        """
        self.old, self.new = {}, dict(self.final)
        # SQLite keeps any value: what is a time is found out later
        time = String() if self.conn.dialect.name == "sqlite" else Timestamp()
        kinds: dict[str, Any] = dict.fromkeys(("timestamp", *_CLOCK), time)
        for name in TABLES:
            backup = self.backup(name)
            place = backup if self.exists(backup) else self._name(name)
            columns = _columns(self.conn, self.schema, place)
            if missing := {*KEYS[name], *_NEEDED[name]} - {*columns}:
                what = f"has no column {', '.join(sorted(missing))}" if columns else "is missing"
                raise SchemaError(f"google-adk's old layout is not complete: {place} {what}.")
            self.old[name] = table(
                place, *(column(c, kinds.get(c, String())) for c in columns), schema=self.schema
            )
            if self.exists(self.working[name].name):
                self.new[name] = self.working[name]
        # whose events they are, as the session spells it: an old collation may not tell apart
        e, s = self.old["events"].c, self.old["sessions"].c
        same = and_(e.app_name == s.app_name, e.user_id == s.user_id, e.session_id == s.id)
        self.sources = {**self.old, "events": self.old["events"].join(self.old["sessions"], same)}
        self.keys = {name: [self.old[name].c[key] for key in KEYS[name]] for name in TABLES}
        self.true_keys = {**self.keys, "events": [e.id, s.app_name, s.user_id, s.id]}

    def page(self, statements: Generic, name: str, *, missing_only: bool) -> Select[Any]:
        """Old rows in the order of their key: k0, k1, … is it, t0, t1, … its true form.

        With ``missing_only`` without rows that the new table has; a state that has changed since
        is missing too, and ``is_new`` tells the two apart.
        """
        columns: list[Any] = [key.label(f"k{n}") for n, key in enumerate(self.keys[name])]
        columns += [key.label(f"t{n}") for n, key in enumerate(self.true_keys[name])]
        if name == "events":
            created = self.old["sessions"].c.create_time
            columns.append(_utc(self.conn, created).label("create_time"))
        for found in self.old[name].c:
            if found.name in (*_JSON, "state"):
                columns.append(statements.as_text(found).label(found.name))
            elif found.name in _CLOCK:
                columns.append(_utc(self.conn, found).label(found.name))
            elif found.name not in KEYS[name]:
                columns.append(found)
        if not missing_only:
            return select(*columns).select_from(self.sources[name]).order_by(*self.keys[name])
        new = self.new[name].c
        known = and_(
            *(
                new[key] == comparable(self.conn, old)
                for key, old in zip(KEYS[name], self.true_keys[name], strict=True)
            )
        )
        if name == "events":
            rows = select(*columns).select_from(self.sources[name]).where(~exists().where(known))
        else:
            is_new = new.app_name.is_(None)
            changed = new.state != comparable(self.conn, self.old[name].c.state)
            rows = select(*columns, is_new.label("is_new")).where(or_(is_new, changed))
            rows = rows.select_from(self.old[name].outerjoin(self.new[name], known))
        return rows.order_by(*self.keys[name])

    def hindrance(self) -> str | None:
        """What of the application's own would stay with the backups; None if there is nothing."""
        own = {table.name for table in (*self.final.values(), *self.working.values())}
        for what, whose, other in _attached(self.conn, self.schema, [*self.final.values()]):
            if what == "key" and other not in own:
                why = f"The table {other} has a foreign key to {whose}, which is replaced."
                return f"{why} Drop it, convert, and add it again."
            if what != "key":
                why = f"The table {whose} has {what}, which the table that replaces it would lack."
                return f"{why} Take that away, convert, and put it back."
        return None

    def swap(self) -> None:
        """Renames the old tables, and then the new ones to what the old ones were called.

        On PostgreSQL the new tables get the old ones' owner and privileges, but for privileges on
        single columns. Elsewhere privileges go by a table's name.
        """
        if self.conn.dialect.name == "postgresql":
            for name in TABLES:
                _hand_over(self.conn, self.final[name], self.working[name])
        moves: list[tuple[Table, str]] = [
            (self.final[name], self.backup(name))
            for name in TABLES
            if not self.exists(self.backup(name))
        ]
        moves += [
            (self.working[name], self._name(name))
            for name in TABLES
            if self.exists(self.working[name].name)
        ]
        _rename(self.conn, moves, self.final, self._index, self._name("adk_v0_idx"))


def has_table(conn: Connection, schema: str | None, name: str) -> bool:
    return inspect(conn).has_table(name, schema=schema)


def is_old(conn: Connection, schema: str | None, name: Callable[[str], str]) -> bool:
    """Whether google-adk's old tables are there, and not others that are called so too."""
    events = _columns(conn, schema, name("events"))
    if "event_data" in events or not {*_NEEDED["events"]} <= {*events}:
        return False
    return all({*KEYS[table]} <= {*_columns(conn, schema, name(table))} for table in TABLES)


def _columns(conn: Connection, schema: str | None, name: str) -> list[str]:
    """A table's columns; none if there is no such table."""
    if not has_table(conn, schema, name):
        return []
    return [found["name"] for found in inspect(conn).get_columns(name, schema)]


def event_of(event_id: str, row: Any, zone: ZoneInfo) -> tuple[NewEvent, str | None]:
    """An old row as a new event, and why something had to be left out of it, if it had.

    Args:
        event_id: its id.
        row: a mapping, of `Layout.page`.
        zone: in which the column was written.
    """
    reason = None
    moment = _moment(row["timestamp"], zone)
    if moment is None:
        reason = "its timestamp is not a time"
        moment = _moment(row["create_time"], UTC) or clock.EPOCH
    fields: dict[str, Any] = {"id": event_id, "timestamp": clock.to_epoch(moment)}
    for name in ("invocation_id", "author"):
        fields[name] = row[name]
        if not isinstance(row[name], str):
            fields[name], reason = "", f"{name} is not text"
    fields |= {name: row[name] for name in _TEXTS if row.get(name) is not None}
    fields |= {name: bool(row[name]) for name in _FLAGS if row.get(name) is not None}
    for name in (*_JSON, "long_running_tool_ids_json"):
        try:
            value = codec.loads(row.get(name) or "null")
        except (ValueError, RecursionError):
            value, reason = None, f"{name} is not JSON"
        if isinstance(value, dict if name in _JSON else list):
            fields[name.removesuffix("_json")] = value
    try:
        pickled = row["actions"]
        actions = {} if pickled is None else load_actions(bytes(pickled))
        text = codec.dump_event(Event(**fields | {"actions": actions}))
    except PickleRefusedError as error:
        reason, text = error.name, None
    except (ValidationError, InvalidInputError, TypeError):
        reason, text = "its fields are not those of an event, or nested too deeply", None
    if text is None:
        try:
            text = codec.dump_event(Event(**fields))
        except InvalidInputError:
            known = {name: value for name, value in fields.items() if name not in _JSON}
            text = codec.dump_event(Event(**known))
    return NewEvent(event_id, fields["invocation_id"], max(moment, clock.EPOCH), text), reason


def state_of(name: str, row: Any) -> tuple[dict[str, Any], str | None]:
    """The values of a new session or state, and why an old one's could not be taken, if they
    could not.

    Args:
        name: of the table.
        row: a mapping, of `Layout.page`.
    """
    reason = None
    found = {time: _moment(row[time], UTC) for time in _CLOCK if time in row}
    any_of_them = next(filter(None, found.values()), clock.EPOCH)
    for time, moment in found.items():
        if moment is None:
            reason = f"{name}.{time} is not a time"
    values: dict[str, Any] = {time: moment or any_of_them for time, moment in found.items()}
    values["state"] = row["state"]
    try:
        is_state = isinstance(codec.loads(row["state"]), dict) and isinstance(row["state"], str)
    except (ValueError, TypeError, RecursionError):
        is_state = False
    if not is_state:
        values["state"], reason = "{}", f"{name}.state is not a JSON object"
    return values, reason


def _moment(value: Any, zone: tzinfo) -> datetime | None:
    """A time of a column as naive UTC, None if it is no time."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    try:
        moment = value if value.tzinfo else value.replace(tzinfo=zone)
        return moment.astimezone(UTC).replace(tzinfo=None)
    except OverflowError:  # in the first year or the last
        return value.replace(tzinfo=None)


def swaps_in_transaction(conn: Connection) -> bool:
    """Whether tables can be renamed in the transaction that has copied the last rows."""
    return conn.dialect.name not in MYSQL_FAMILY


def _new_tables(schema: str | None, name: Callable[[str], str], index: str) -> dict[str, Table]:
    """The tables of schema version 1.

    Args:
        schema: the database schema.
        name: what a table is called.
        index: the name of the index of events.
    """

    def key(name: str, length: int = 128) -> Column[Any]:
        return Column(name, KeyText(length), primary_key=length == 128, nullable=False)

    def times(*names: str) -> list[Column[Any]]:
        return [Column(name, Timestamp(), nullable=False) for name in names]

    def state() -> Column[Any]:
        return Column("state", _json(), nullable=False)

    metadata = MetaData(schema=schema)
    owner = [key("app_name"), key("user_id"), key("id")]
    sessions = Table(
        name("sessions"), metadata, *owner, state(), *times("create_time", "update_time")
    )
    events = Table(
        name("events"),
        metadata,
        *(key("id"), key("app_name"), key("user_id"), key("session_id")),
        key("invocation_id", 256),
        *times("timestamp"),
        Column("event_data", _json(), nullable=True),
        Column("event_exact", _long_text(), nullable=True),
        ForeignKeyConstraint(["app_name", "user_id", "session_id"], owner, ondelete="CASCADE"),
        Index(index, "app_name", "user_id", "session_id", text("timestamp DESC"), text("id DESC")),
    )
    apps = Table(name("app_states"), metadata, key("app_name"), state(), *times("update_time"))
    users = Table(
        name("user_states"),
        metadata,
        *(key("app_name"), key("user_id"), state(), *times("update_time")),
    )
    return dict(zip(TABLES, (sessions, events, apps, users), strict=True))


def notes_table(schema: str | None, name: Callable[[str], str]) -> Table:
    """A small table for what a conversion must remember."""
    return Table(
        name("adk_v1_conversion"),
        MetaData(schema=schema),
        Column("kind", String(16)),
        Column("value", _long_text()),
    )


def _long_text() -> Text:
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), *MYSQL_FAMILY)


def _json() -> Text:
    return _long_text().with_variant(postgresql.JSONB(), "postgresql")


def _utc(conn: Connection, column: ColumnElement[Any]) -> ColumnElement[Any]:
    """A time that the database's own clock wrote, as naive UTC.

    CURRENT_TIMESTAMP in a column without zone is UTC on SQLite and in the session's zone elsewhere;
    the session that reads is taken to have the one that wrote.
    """
    moment: ColumnElement[Any] = column
    if conn.dialect.name == "postgresql":
        moment = func.timezone("UTC", cast(column, postgresql.TIMESTAMP(timezone=True)))
    elif conn.dialect.name in MYSQL_FAMILY:
        zone: ColumnElement[Any] = literal_column("@@session.time_zone")
        moment = func.coalesce(func.convert_tz(column, zone, "+00:00"), column)
    return type_coerce(moment, column.type if conn.dialect.name == "sqlite" else Timestamp())


def comparable(conn: Connection, column: ColumnElement[Any]) -> ColumnElement[Any]:
    """An old text column, to be compared with a new one by bytes.

    Old columns may have any character set and a collation that takes a capital for a small letter.
    """
    if conn.dialect.name not in MYSQL_FAMILY:
        return column
    flavour = "nopad" if getattr(conn.dialect, "is_mariadb", False) else "0900"
    return cast(column, mysql.CHAR(charset="utf8mb4")).collate(f"utf8mb4_{flavour}_bin")


def lock(conn: Connection, tables: Iterable[Any]) -> None:
    """Keeps others from the tables until the transaction ends, where that is possible.

    SQLite's transaction has locked everything already. MySQL and MariaDB refuse to rename tables
    under LOCK TABLES: there the rename comes first, and what was written last is copied after it.
    """
    if conn.dialect.name == "postgresql":
        names = ", ".join(map(conn.dialect.identifier_preparer.format_table, tables))
        conn.execute(text(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE"))


def _attached(
    conn: Connection, schema: str | None, tables: list[Table]
) -> Iterator[tuple[str, str, str]]:
    """What hangs on tables: ("key", table, the table that refers to it) or (what, table, "").

    Triggers and policies are an application's own: google-adk makes none.
    """
    if conn.dialect.name == "sqlite":
        names = {each.name.lower(): each.name for each in tables}
        found = inspect(conn)
        for other in found.get_table_names(schema):
            for key in found.get_foreign_keys(other, schema):
                if (name := key["referred_table"].lower()) in names:
                    yield "key", names[name], other
        triggers = text("SELECT tbl_name FROM sqlite_master WHERE type = 'trigger'")
        for name in conn.execute(triggers).scalars().all():
            if name.lower() in names:
                yield "a trigger", name, ""
        return
    family = "mysql" if conn.dialect.name in MYSQL_FAMILY else conn.dialect.name
    for each in tables if family in _ATTACHED else ():
        place = conn.dialect.identifier_preparer.format_table(each)
        where = {"schema": schema, "name": each.name, "place": place}
        for what, other in conn.execute(text(_ATTACHED[family]), where).all():
            yield what, each.name, other


_ATTACHED = {
    "postgresql": """
WITH this AS (SELECT CAST(to_regclass(CAST(:place AS text)) AS oid) AS oid)
SELECT 'key', CASE WHEN n.nspname = coalesce(CAST(:schema AS text), current_schema())
    THEN c.relname ELSE n.nspname || '.' || c.relname END
FROM this JOIN pg_constraint k ON k.confrelid = this.oid AND k.contype = 'f'
JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
UNION ALL SELECT 'a trigger', ''
FROM this JOIN pg_trigger t ON t.tgrelid = this.oid AND NOT t.tgisinternal
UNION ALL SELECT 'row level security', ''
FROM this JOIN pg_class c ON c.oid = this.oid AND (c.relrowsecurity OR c.relforcerowsecurity)""",
    "mysql": """
SELECT 'key', CASE WHEN table_schema = coalesce(:schema, database())
    THEN table_name ELSE concat(table_schema, '.', table_name) END
FROM information_schema.key_column_usage
WHERE referenced_table_schema = coalesce(:schema, database()) AND referenced_table_name = :name
UNION ALL SELECT 'a trigger', '' FROM information_schema.triggers
WHERE event_object_schema = coalesce(:schema, database()) AND event_object_table = :name""",
}


def _hand_over(conn: Connection, old: Table, new: Table) -> None:
    """Gives a new table the owner and the privileges of the one that it replaces.

    Privileges on single columns are not copied.
    """
    quote = conn.dialect.identifier_preparer
    place, names = quote.format_table(new), {"old": quote.format_table(old)}
    of = text(
        "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = to_regclass(CAST(:old AS text))"
    )
    owner, had = conn.scalar(of, names), conn.scalar(of, {"old": place})
    if owner != had:
        conn.exec_driver_sql(f"ALTER TABLE {place} OWNER TO {quote.quote_identifier(str(owner))}")
    entries = text(
        "SELECT a.privilege_type, a.is_grantable,"
        " CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee) END"
        " FROM pg_class c, aclexplode(c.relacl) a"
        " WHERE c.oid = to_regclass(CAST(:old AS text)) AND a.grantee <> c.relowner"
    )
    for privilege, grantable, role in conn.execute(entries, names).all():
        to = "PUBLIC" if role is None else quote.quote_identifier(role)
        option = " WITH GRANT OPTION" if grantable else ""
        conn.exec_driver_sql(f"GRANT {privilege} ON {place} TO {to}{option}")


def _rename(
    conn: Connection, moves: list[tuple[Table, str]], new: dict[str, Table], index: str, spare: str
) -> None:
    """Renames tables, with what belongs to them.

    Foreign keys follow on every database: each goes on pointing to the table that it pointed to.

    Args:
        conn: in a transaction, but for MySQL and MariaDB, where one statement renames all of them.
        moves: tables and their new names, in an order in which no name is taken.
        new: the tables of schema version 1 under the names that they get.
        index: the name of the index of the table that becomes ``events``.
        spare: a name for what has that index's final name now.
    """
    quote = conn.dialect.identifier_preparer
    final = next(iter(new["events"].indexes))
    if conn.dialect.name in MYSQL_FAMILY:
        renames = [
            f"{quote.format_table(table)} TO {quote.format_table(_called(table, name))}"
            for table, name in moves
        ]
        if renames:
            conn.execute(text(f"RENAME TABLE {', '.join(renames)}"))
        return
    primary: dict[str, str] = {}
    foreign: dict[str, str] = {}
    for moved, name in moves:
        if conn.dialect.name == "postgresql":
            # names of keys are unique in a schema: a table takes that of the one it replaces
            key = inspect(conn).get_pk_constraint(moved.name, schema=moved.schema)["name"] or ""
            wanted = primary.get(name, f"{name}_pkey"[:63])
            primary[moved.name] = key
            _rename_index(conn, moved.schema, key, wanted)
            for constraint in inspect(conn).get_foreign_keys(moved.name, schema=moved.schema):
                foreign[moved.name] = was = str(constraint["name"])
                if (other := foreign.get(name)) is not None:
                    conn.execute(
                        text(
                            f"ALTER TABLE {quote.format_table(moved)} RENAME CONSTRAINT"
                            f" {quote.quote(was)} TO {quote.quote(other)}"
                        )
                    )
        conn.execute(text(f"ALTER TABLE {quote.format_table(moved)} RENAME TO {quote.quote(name)}"))
    if conn.dialect.name == "postgresql":
        _rename_index(conn, new["events"].schema, str(final.name), spare)
        _rename_index(conn, new["events"].schema, index, str(final.name))
    else:
        for name in (str(final.name), index):
            conn.execute(text(f"DROP INDEX IF EXISTS {quote.quote(name)}"))
        final.create(conn)


def _rename_index(conn: Connection, schema: str | None, name: str, to: str) -> None:
    quote = conn.dialect.identifier_preparer
    place = f"{quote.quote_schema(schema)}." if schema else ""
    conn.execute(
        text(f"ALTER INDEX IF EXISTS {place}{quote.quote(name)} RENAME TO {quote.quote(to)}")
    )


def _called(table: Table, name: str) -> Table:
    return Table(name, MetaData(schema=table.schema))
