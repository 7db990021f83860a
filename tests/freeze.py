"""Databases as earlier revisions left them, kept as SQL text in tests/data/revisions.

    python tests/freeze.py            # writes all of them anew; by hand, when a revision is added

Each is made by `alembic upgrade <revision>` on an empty database and filled with plain INSERTs:
what is stored, and what must be read from it, is written out below, so that neither depends on the
code that is tested. The rest of this module is for the tests: loading such a file, and saying what
the schema of a database is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from engines import engine_for
from scripts import run_all, run_script
from servers import find_postgres, run_mariadb, run_postgres, run_sync
from sqlalchemy import Connection, inspect

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "data" / "revisions"
KINDS = ("sqlite", "postgresql", "mariadb")
VERSION_TABLE = "adk_sessions_version"
TABLES = (
    "adk_internal_metadata",
    "sessions",
    "events",
    "app_states",
    "user_states",
    "state_changes",
    VERSION_TABLE,
)
# The index of google-adk's earlier releases, which is nobody's business but google-adk's.
OLDER_INDEX = "idx_events_app_user_session_ts"


# --- what is stored, and what is read -----------------------------------------------------------

START = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
REPLACED = "\ufffd"


@dataclass(frozen=True)
class Stored:
    """An event's two columns, and the event that is read from them."""

    data: dict[str, Any]
    exact: dict[str, Any] | None = None
    read: dict[str, Any] | None = None

    @property
    def event(self) -> dict[str, Any]:
        return self.data if self.read is None else self.read


@dataclass(frozen=True)
class Conversation:
    app: str
    user: str
    id: str
    state: dict[str, Any] = field(default_factory=dict)
    events: tuple[Stored, ...] = ()
    read_state: dict[str, Any] | None = None


def said(id: str, seconds: float, content: Any, **more: Any) -> dict[str, Any]:
    """An event as it is written to event_data."""
    return {
        "id": id,
        "invocation_id": f"call-{id}",
        "author": more.pop("author", "user"),
        "timestamp": START.timestamp() + seconds,
        "content": content,
        "actions": {"state_delta": more.pop("delta", {}), "artifact_delta": {}},
        **more,
    }


def text(*parts: Any, role: str = "user") -> dict[str, Any]:
    """Content as google-adk shapes it."""
    return {
        "role": role,
        "parts": [{"text": part} if isinstance(part, str) else part for part in parts],
    }


UNICODE = "¿Qué? “ü” e\u0301 👩‍👩‍👧 \u2028 \\ \" ' %s {} ;\n\t"

# How a state's values are stored that not every database can hold, and what they are.
ESCAPED: dict[str, tuple[str, Any]] = {
    "nan": ("adk_sessions:float:nan", float("nan")),
    "infinity": ("adk_sessions:float:-inf", float("-inf")),
    "minus zero": ("adk_sessions:float:-0.0", -0.0),
    "large": ("adk_sessions:float:1e+16", 1e16),
    "NUL": ("adk_sessions:text:a%00b", "a\0b"),
    "surrogate": ("adk_sessions:text:%ED%A0%80", "\ud800"),
    "mark": ("adk_sessions:text:adk_sessions%3A", "adk_sessions:"),
}
PLAIN: dict[str, Any] = {
    "unicode": UNICODE,
    "": "empty key",
    "numbers": [0, -1, 0.1, 1e15, 2**53 + 1, 10**40, 5e-324],
    "others": [None, True, False, "1", "null", {}, [], {"a": {"b": [[]]}}],
}
APP_STATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shop": ({"currency": "€", "limit": ESCAPED["infinity"][0]}, {"limit": float("-inf")}),
    "notes": ({}, {}),
}
USER_STATES: dict[tuple[str, str], dict[str, Any]] = {
    ("shop", "ann"): {"name": "Ann"},
    ("shop", "Ann"): {"name": "another Ann", "seen": [1, 2]},
    ("shop", "bøb 😀"): {},
    ("notes", "ann"): {"name": "Ann at notes"},
}

# Readable by google-adk too.
SHOP = (
    Stored(said("e1", 0.25, text("hello", UNICODE), delta={"app:currency": "€", "cart": ["tea"]})),
    Stored(
        said(
            "e2",
            1.5,
            text(
                {"function_call": {"id": "c", "name": "find", "args": {"x": [1, None, {}]}}},
                role="model",
            ),
            author="agent",
            long_running_tool_ids=["c"],
            branch="root.leaf",
        )
    ),
    Stored(
        said("e3", 2.0, text({"inline_data": {"data": "AP_-", "mime_type": "a/b"}}), author="agent")
    ),
    # the clock went back an hour: the column did not
    Stored(said("e4", -3600.0, text("earlier"), turn_complete=True)),
)
NOTES = (
    Stored(said("n1", 0.0, "a string")),
    Stored(said("n2", 1.0, [1, 0.5, None, True, {"k": ["v"]}], custom={"any": "field"})),
    Stored(said("n3", 2.0, None, custom_metadata={"labels": ["a", None]})),
    Stored(said("n4", 3.0, "adk_sessions:", delta={"plain": "text"})),
)
# What event_data cannot hold is beside it; before that column was there, it was not written.
EXACT = (
    Stored(
        said("x1", 10.0, text(f"a{REPLACED}b"), delta={"app:limit": None}),
        said(
            "x1",
            10.0,
            text("adk_sessions:text:a%00b"),
            delta={"app:limit": "adk_sessions:float:-inf"},
        ),
        said("x1", 10.0, text("a\0b"), delta={"app:limit": float("-inf")}),
    ),
    Stored(
        said("x2", 11.0, text(f"half{REPLACED}"), author="agent"),
        said("x2", 11.0, text("adk_sessions:text:half%ED%A0%80"), author="agent"),
        said("x2", 11.0, text("half\ud800"), author="agent"),
    ),
)


def conversations(revision: str) -> list[Conversation]:
    exact = EXACT if revision >= "0002" else ()
    escaped = {key: stored for key, (stored, _) in ESCAPED.items()}
    values = {key: value for key, (_, value) in ESCAPED.items()}
    return [
        Conversation("shop", "ann", "s1", {"cart": ["tea"]}, SHOP + exact),
        Conversation("shop", "Ann", "s1", PLAIN | escaped, SHOP[:1], PLAIN | values),
        Conversation("shop", "bøb 😀", "s 2 ", {}, ()),
        Conversation("notes", "ann", "s1", {"plain": "text"}, NOTES),
    ]


def rows(revision: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    """What the code of that revision has stored: table, and texts by column."""
    for app, (state, _) in APP_STATES.items():
        yield "app_states", {"app_name": app, "state": dumps(state), "update_time": moment(0)}
    for (app, user), state in USER_STATES.items():
        yield (
            "user_states",
            {
                "app_name": app,
                "user_id": user,
                "state": dumps(state),
                "update_time": moment(0),
            },
        )
    for one in conversations(revision):
        key = {"app_name": one.app, "user_id": one.user}
        times = column_times(one)
        session: dict[str, str | None] = {
            **key,
            "id": one.id,
            "state": dumps(one.state),
            "create_time": moment(0),
            "update_time": times[-1],
        }
        if revision >= "0005" and one.app == "notes":
            session |= {
                "title": "Notes, “ü” 😀",
                "labels": dumps({"team": "a b", "ü": "😀"}),
                "expire_time": "2999-01-02 03:04:05.000006",
                "initial_state": "{}",
            }
        yield "sessions", session
        for event, time in zip(one.events, times[1:], strict=True):
            row: dict[str, str | None] = {
                "id": event.data["id"],
                **key,
                "session_id": one.id,
                "invocation_id": event.data["invocation_id"],
                "timestamp": time,
                "event_data": dumps(event.data),
            }
            if revision >= "0002":
                row["event_exact"] = None if event.exact is None else dumps(event.exact)
            yield "events", row
        if revision >= "0005" and one.app == "notes":
            yield (
                "state_changes",
                {
                    **key,
                    "session_id": one.id,
                    "revision": times[1],
                    "number": "1",
                    "change_time": times[1],
                    "delta": dumps({"nan": ESCAPED["nan"][0]}),
                    "deleted": dumps({"draft": True}),
                },
            )


def tables(revision: str) -> Iterator[str]:
    """Those that a database at that revision has."""
    return (table for table in TABLES if table != "state_changes" or revision >= "0005")


def column_times(one: Conversation) -> list[str]:
    """The session's creation and its events' places, which rise whatever the clocks say."""
    times = [START]
    for event in one.events:
        own = datetime.fromtimestamp(event.data["timestamp"], UTC)
        times.append(max(own, times[-1] + timedelta(microseconds=1)))
    return [written(time) for time in times]


def moment(seconds: float) -> str:
    return written(START + timedelta(seconds=seconds))


def written(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S.%f")


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def expected(revision: str) -> list[dict[str, Any]]:
    """The sessions that must be read."""
    found = []
    for one in conversations(revision):
        app, app_read = APP_STATES[one.app]
        scopes = {f"app:{key}": value for key, value in (app | app_read).items()}
        scopes |= {f"user:{k}": v for k, v in USER_STATES[one.app, one.user].items()}
        updated = datetime.strptime(column_times(one)[-1], "%Y-%m-%d %H:%M:%S.%f")
        found.append(
            {
                "app_name": one.app,
                "user_id": one.user,
                "id": one.id,
                "state": scopes | (one.state if one.read_state is None else one.read_state),
                "last_update_time": updated.replace(tzinfo=UTC).timestamp(),
                "events": [event.event for event in one.events],
            }
        )
    return found


# --- writing ------------------------------------------------------------------------------------


def file_of(revision: str, kind: str) -> Path:
    return FOLDER / f"{revision}.{kind}.sql"


def reading_of(revision: str) -> Path:
    return FOLDER / f"{revision}.json"


def revisions() -> list[str]:
    """All that there are, oldest first."""
    found = (ROOT / "alembic" / "versions").glob("*.py")
    return sorted(path.name[:4] for path in found)


def freeze(revision: str, kind: str, url: str) -> None:
    """Writes the file of one revision and database."""
    subprocess.run(
        [sys.executable, "-m", "alembic", "-x", f"url={url}", "upgrade", revision],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "ADK_SESSIONS_URL"},
        check=True,
    )
    statements = [insert(kind, table, row) for table, row in rows(revision)]
    # a session stands before its events, and everything else where it likes
    run_sync(run_all(url, statements))
    dumped = [*ddl(url, kind, revision), *run_sync(dump_rows(url, kind, revision))]
    file_of(revision, kind).write_text("".join(f"{one};\n" for one in dumped), encoding="utf-8")


def ddl(url: str, kind: str, revision: str) -> list[str]:
    """The statements that make the tables, as the database itself tells them."""
    if kind == "postgresql":
        programs = find_postgres()
        assert programs is not None
        dumped = subprocess.run(
            [programs / "pg_dump", "--schema-only", "--no-owner", "--no-privileges", url],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        # neither what this server has for a version nor how a session of psql is to be set up
        noise = ("--", "SET ", "SELECT pg_catalog.set_config", "\\")
        lines = [line for line in dumped.splitlines() if line and not line.startswith(noise)]
        return "\n".join(lines).removesuffix(";").split(";\n")
    if kind == "mariadb":
        made = [f"SHOW CREATE TABLE {table}" for table in tables(revision)]
        return [str(run_sync(query(url, one))[0][1]) for one in made]
    found = run_sync(
        query(
            url, "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type DESC, rootpage"
        )
    )
    return [str(sql) for (sql,) in found]


async def dump_rows(url: str, kind: str, revision: str) -> list[str]:
    statements = []
    text_type = "CHAR" if kind == "mariadb" else "TEXT"
    async with engine_for(url) as engine, engine.connect() as conn:
        for table in tables(revision):
            columns, keys = await conn.run_sync(lambda sync, t=table: columns_of(sync, t))
            quoted = [identifier(kind, name) for name in columns]
            selected = ", ".join(f"CAST({name} AS {text_type})" for name in quoted)
            order = ", ".join(str(1 + columns.index(key)) for key in keys)
            found = await conn.exec_driver_sql(f"SELECT {selected} FROM {table} ORDER BY {order}")
            for row in found:
                statements.append(insert(kind, table, dict(zip(columns, row, strict=True))))
    return statements


def columns_of(conn: Connection, table: str) -> tuple[list[str], list[str]]:
    found = inspect(conn)
    key = found.get_pk_constraint(table)["constrained_columns"]
    return [str(column["name"]) for column in found.get_columns(table)], key


def identifier(kind: str, name: str) -> str:
    return f"`{name}`" if kind == "mariadb" else f'"{name}"'


def insert(kind: str, table: str, row: dict[str, str | None]) -> str:
    columns = ", ".join(identifier(kind, name) for name in row)
    values = ", ".join(literal(kind, value) for value in row.values())
    return f"INSERT INTO {table} ({columns}) VALUES ({values})"


def literal(kind: str, value: str | None) -> str:
    if value is None:
        return "NULL"
    assert "\n" not in value, "a line's end is the end of a statement"
    if kind == "mariadb":
        value = value.replace("\\", "\\\\")
    return "'" + value.replace("'", "''") + "'"


# --- for the tests ------------------------------------------------------------------------------


async def load(revision: str, kind: str, url: str) -> None:
    """Fills an empty database with what a file holds."""
    await run_script(url, file_of(revision, kind).read_text(encoding="utf-8"))


async def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """The rows of a statement, which is committed."""
    async with engine_for(url) as engine, engine.begin() as conn:
        result = await conn.exec_driver_sql(statement)
        return [tuple(row) for row in result] if result.returns_rows else []


async def schema_of(url: str) -> dict[str, Any]:
    """A database's tables, with what matters to a release: which column is the first does not, nor
    what a constraint is called, nor the index of google-adk's earlier releases."""
    async with engine_for(url) as engine, engine.connect() as conn:
        return await conn.run_sync(_schema)


def _schema(conn: Connection) -> dict[str, Any]:
    found = inspect(conn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLite's inspector skips what is an expression
        return {table: _table(conn, found, table) for table in sorted(found.get_table_names())}


def _table(conn: Connection, found: Any, table: str) -> dict[str, Any]:
    return {
        "columns": {
            column["name"]: (
                str(column["type"].compile(conn.dialect)),
                column["nullable"],
                column["default"],
            )
            for column in found.get_columns(table)
        },
        "primary key": found.get_pk_constraint(table)["constrained_columns"],
        "foreign keys": [
            (
                key["constrained_columns"],
                key["referred_table"],
                key["referred_columns"],
                key["options"],
            )
            for key in found.get_foreign_keys(table)
        ],
        "unique": sorted(one["column_names"] for one in found.get_unique_constraints(table)),
        "indexes": {
            name: columns for name, columns in _indexes(conn, table).items() if name != OLDER_INDEX
        },
    }


def _indexes(conn: Connection, table: str) -> dict[str, Any]:
    """Indexes with the direction of their columns, which an inspector does not tell everywhere."""
    dialect = conn.dialect.name
    if dialect == "postgresql":
        rows = conn.exec_driver_sql(
            "SELECT c.relname, pg_get_indexdef(c.oid), i.indisvalid FROM pg_index i"
            " JOIN pg_class c ON c.oid = i.indexrelid"
            f" WHERE i.indrelid = '{table}'::regclass AND NOT i.indisprimary"
        )
        return {name: (definition, valid) for name, definition, valid in rows}
    if dialect in ("mysql", "mariadb"):
        rows = conn.exec_driver_sql(
            "SELECT index_name, column_name, collation, non_unique FROM information_schema"
            f".statistics WHERE table_schema = database() AND table_name = '{table}'"
            " AND index_name <> 'PRIMARY' ORDER BY index_name, seq_in_index"
        )
        listed: dict[str, Any] = {}
        for name, *about in rows:
            listed.setdefault(name, []).append(tuple(about))
        return listed
    made = conn.exec_driver_sql(f"SELECT name FROM pragma_index_list('{table}') WHERE origin = 'c'")
    return {
        name: [
            tuple(row)
            for row in conn.exec_driver_sql(
                f"SELECT name, \"desc\" FROM pragma_index_xinfo('{name}') WHERE key"
            )
        ]
        for (name,) in made.all()
    }


def adk_tables(kind: str, *, older_index: bool = False, narrow: bool = False) -> list[str]:
    """google-adk's schema, version 1, as its releases before the newer index made it.

    Args:
        kind: of database.
        older_index: with the index of four columns.
        narrow: as google-adk makes them over ``mariadb://``, without microseconds.
    """
    key, long = "VARCHAR(128) NOT NULL", "VARCHAR(256) NOT NULL"
    document, time = {
        "sqlite": ("TEXT", "DATETIME NOT NULL"),
        "postgresql": ("JSONB", "TIMESTAMP WITHOUT TIME ZONE NOT NULL"),
        "mariadb": ("LONGTEXT", "DATETIME(6) NOT NULL"),
    }[kind]
    if narrow:
        document, time = "TEXT", "DATETIME NOT NULL"
    name, value = identifier(kind, "key"), identifier(kind, "value")
    tables = [
        f"CREATE TABLE adk_internal_metadata ({name} {key}, {value} {long}, PRIMARY KEY ({name}))",
        f"CREATE TABLE sessions (app_name {key}, user_id {key}, id {key},"
        f" state {document} NOT NULL, create_time {time}, update_time {time},"
        " PRIMARY KEY (app_name, user_id, id))",
        f"CREATE TABLE app_states (app_name {key}, state {document} NOT NULL, update_time {time},"
        " PRIMARY KEY (app_name))",
        f"CREATE TABLE user_states (app_name {key}, user_id {key}, state {document} NOT NULL,"
        f" update_time {time}, PRIMARY KEY (app_name, user_id))",
        f"CREATE TABLE events (id {key}, app_name {key}, user_id {key}, session_id {key},"
        f" invocation_id {long}, timestamp {time}, event_data {document},"
        " PRIMARY KEY (id, app_name, user_id, session_id),"
        " FOREIGN KEY(app_name, user_id, session_id)"
        " REFERENCES sessions (app_name, user_id, id) ON DELETE CASCADE)",
        f"INSERT INTO adk_internal_metadata ({name}, {value}) VALUES ('schema_version', '1')",
    ]
    if older_index:
        columns = "app_name, user_id, session_id, timestamp DESC"
        tables.append(f"CREATE INDEX {OLDER_INDEX} ON events ({columns})")
    return tables


@contextmanager
def _scratch() -> Iterator[Any]:
    with ExitStack() as stack:
        servers = {
            "postgresql": stack.enter_context(run_postgres()),
            "mariadb": stack.enter_context(run_mariadb()),
        }
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def new(kind: str, name: str) -> str:
            if kind == "sqlite":
                return f"sqlite:///{folder / name}.db"
            return str(stack.enter_context(servers[kind].scratch_database()))

        yield new


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with _scratch() as new:
        for revision in revisions():
            reading = json.dumps(expected(revision), indent=1)
            reading_of(revision).write_text(reading + "\n", encoding="utf-8")
            for kind in KINDS:
                url = new(kind, revision)
                freeze(revision, kind, url)
                print(file_of(revision, kind).relative_to(ROOT))


if __name__ == "__main__":
    main()
