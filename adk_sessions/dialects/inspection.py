"""What a live database says of a table's columns and indexes.

SQLAlchemy's inspector does not tell collations that are the database's default, precisions, index
builds that were broken off, or columns of types that it does not know; catalogs do. To read them
takes no more than the right to select.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sqlalchemy import Column as Wanted
from sqlalchemy import Connection, Integer, Row, Table, inspect, text

from .types import MYSQL_FAMILY, Json, KeyText, Timestamp

_NAME = re.compile(r"""[`"]([^`"]+)[`"]""")  # the quotes are as sql_mode says
_FOREIGN_KEY = re.compile(
    r"^ +CONSTRAINT .+ FOREIGN KEY \((.+?)\) REFERENCES (.+?) \((.+?)\)"
    r"(?: ON DELETE (CASCADE|SET NULL|SET DEFAULT|RESTRICT|NO ACTION))?",
    re.MULTILINE,
)
# a default that is another for each row
_NEW = re.compile(
    r"\b(?:nextval|gen_random_uuid|uuid_generate_v[14](?:mc)?|uuid(?:v[47])?|random(?:blob)?)\("
    r"|auto_increment",
    re.IGNORECASE,
)
_NULL = re.compile(r"(?:NULL(?:::.*)?)?", re.IGNORECASE)
_NOT_SQL = re.compile(  # comments, strings and names in any quotes
    r"""--[^\n]*|/\*.*?\*/|'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*\]""", re.DOTALL
)
_ON_CONFLICT = re.compile(
    r"(?:PRIMARY\s+KEY|UNIQUE)\s*(?:\([^()]*\))?\s*(?:ASC|DESC)?\s*"
    r"ON\s+CONFLICT\s+(REPLACE|IGNORE)",
    re.IGNORECASE,
)


class Column(NamedTuple):
    """A column that is there.

    Attributes:
        nullable: whether it takes NULL.
        filled: whether the database fills it when an INSERT leaves it out.
        distinct: whether rows that leave it out never are equal in it.
        fault: why our values would not come back from it as they are, None if they would.
    """

    nullable: bool
    filled: bool
    distinct: bool
    fault: str | None


class Index(NamedTuple):
    """An index that is there, one behind a key included.

    Attributes:
        columns: their names in order, None for an expression.
        whole: whether every row is in it.
        valid: whether its build was finished.
    """

    name: str
    columns: tuple[str | None, ...]
    unique: bool
    whole: bool = True
    valid: bool = True


class ForeignKey(NamedTuple):
    """A foreign key that is there.

    Attributes:
        target: the other table, with its schema if that is not the connection's own.
        on_delete: as in SQL; empty or NO ACTION if nothing follows.
    """

    columns: list[str]
    target: str
    referred: list[str]
    on_delete: str


def columns(conn: Connection, table: Table) -> dict[str, Column]:
    """A table's columns by name, those of the application's own included.

    Args:
        conn: of any dialect.
        table: where, and the columns as they should be.
    """
    read, fault = _COLUMNS.get(conn.dialect.name, (_any_columns, _no_fault))
    found = {}
    for row in read(conn, table):
        wanted = table.columns.get(row.name)
        wrong = None
        if wanted is not None:
            wrong = "generated, must not be" if row.generated else fault(conn, row, wanted)
        default = str(row.source or "")
        null = row.nullable and _NULL.fullmatch(default)
        distinct = not row.generated and bool(null or _NEW.search(default))
        found[row.name] = Column(bool(row.nullable), bool(row.filled), distinct, wrong)
    return found


def faults(conn: Connection, table: Table) -> list[str]:
    """Why a table would lose rows, whatever its columns."""
    read = _FAULTS.get(conn.dialect.name)
    return read(conn, table) if read else []


def holders(conn: Connection, table: Table, but: Table) -> list[str]:
    """Tables, but for one, whose foreign keys would not let a table's rows be deleted."""
    return sorted({*_HOLDERS.get(conn.dialect.name, _any_holders)(conn, table, but)})


def indexes(conn: Connection, table: Table) -> list[Index]:
    """A table's indexes."""
    return _INDEXES.get(conn.dialect.name, _any_indexes)(conn, table)


def keys(conn: Connection, table: Table) -> tuple[list[str], list[ForeignKey]]:
    """A table's primary key and its foreign keys."""
    if conn.dialect.name in MYSQL_FAMILY:
        return _mysql_keys(conn, table)
    found = inspect(conn)
    return (
        found.get_pk_constraint(table.name, table.schema)["constrained_columns"],
        [
            ForeignKey(
                key["constrained_columns"],
                _full(key["referred_schema"], key["referred_table"]),
                key["referred_columns"],
                (key["options"].get("ondelete") or "").upper(),
            )
            for key in found.get_foreign_keys(table.name, table.schema)
        ],
    )


def _full(schema: str | None, table: str) -> str:
    return table if schema is None else f"{schema}.{table}"


# --- what a column is for ------------------------------------------------------------------------


def _length(wanted: Wanted[Any]) -> int | None:
    """Characters that a key or an id takes; None for another kind of column."""
    sized: Any = wanted.type.impl_instance if isinstance(wanted.type, KeyText) else None
    return sized and int(sized.length)


def _is_json(wanted: Wanted[Any]) -> bool:
    return isinstance(wanted.type, Json)


def _is_time(wanted: Wanted[Any]) -> bool:
    return isinstance(wanted.type, Timestamp)


def _is_count(wanted: Wanted[Any]) -> bool:
    return isinstance(wanted.type, Integer)


def _no_fault(conn: Connection, found: Any, wanted: Wanted[Any]) -> str | None:
    return None


# --- PostgreSQL ----------------------------------------------------------------------------------


def _postgresql_columns(conn: Connection, table: Table) -> list[Row[Any]]:
    return list(
        conn.execute(
            text(
                "SELECT a.attname AS name, NOT a.attnotnull AS nullable,"
                " a.atthasdef OR a.attidentity <> '' AS filled, a.attgenerated <> '' AS generated,"
                " CASE WHEN a.attidentity <> '' THEN 'nextval()' ELSE (SELECT"
                " pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d WHERE d.adrelid = a.attrelid"
                " AND d.adnum = a.attnum) END AS source, t.typname AS type,"
                " upper(format_type(a.atttypid, a.atttypmod)) AS spelled, a.atttypmod AS modifier,"
                " c.collname AS collation, c.collisdeterministic AS deterministic"
                " FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid"
                " LEFT JOIN pg_collation c ON c.oid = a.attcollation"
                " WHERE a.attrelid = to_regclass(:name) AND a.attnum > 0 AND NOT a.attisdropped"
            ),
            {"name": _quoted(conn, table)},
        )
    )


def _postgresql_fault(conn: Connection, found: Any, wanted: Wanted[Any]) -> str | None:
    length = _length(wanted)
    if _is_json(wanted):
        right, must = found.type == "jsonb", "JSONB"
    elif _is_time(wanted):
        right = found.type == "timestamp" and found.modifier in (-1, 6)
        must = "TIMESTAMP WITHOUT TIME ZONE"
    elif _is_count(wanted):
        right, must = found.type in ("int4", "int8"), "INTEGER"
    elif length is None:
        right, must = found.type in ("text", "varchar") and found.modifier == -1, "TEXT"
    else:
        # the modifier counts four bytes more than there are characters
        right = found.type in ("text", "varchar") and not -1 < found.modifier < length + 4
        must = f"VARCHAR({length})"
    if not right:
        return f"{found.spelled.replace('CHARACTER VARYING', 'VARCHAR')}, must be {must}"
    if length is not None and found.deterministic is False:
        return f"collation {found.collation} is not deterministic, must be one that is"
    return None


def _postgresql_indexes(conn: Connection, table: Table) -> list[Index]:
    rows = conn.execute(
        text(
            "SELECT c.relname, i.indisunique, i.indpred IS NULL, i.indisvalid,"
            " ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k (number, place)"
            " LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number"
            " AND k.number > 0 WHERE k.place <= i.indnkeyatts ORDER BY k.place)"
            " FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            " JOIN pg_am m ON m.oid = c.relam"
            " WHERE i.indrelid = to_regclass(:name) AND m.amname = 'btree'"
        ),
        {"name": _quoted(conn, table)},
    )
    return [
        Index(name, tuple(columns), unique, whole, valid)
        for name, unique, whole, valid, columns in rows
    ]


def _postgresql_faults(conn: Connection, table: Table) -> list[str]:
    persistence, deferrable = conn.execute(
        text(
            "SELECT c.relpersistence::text, EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid"
            " AND i.indisprimary AND NOT i.indimmediate)"
            " FROM pg_class c WHERE c.oid = to_regclass(:name)"
        ),
        {"name": _quoted(conn, table)},
    ).one()
    found = []
    if persistence != "p":
        kind = "UNLOGGED" if persistence == "u" else "temporary"
        found.append(f"{kind}, must be an ordinary table")
    if deferrable:
        found.append("primary key is DEFERRABLE, must not be")
    return found


def _postgresql_holders(conn: Connection, table: Table, but: Table) -> Iterable[str]:
    return conn.scalars(
        text(
            "SELECT conrelid::regclass::text FROM pg_constraint WHERE contype = 'f'"
            " AND confrelid = to_regclass(:name) AND confdeltype NOT IN ('c', 'n')"
            " AND conparentid = 0 AND conrelid IS DISTINCT FROM to_regclass(:but)"
        ),
        {"name": _quoted(conn, table), "but": _quoted(conn, but)},
    )


def _quoted(conn: Connection, table: Table) -> str:
    return conn.dialect.identifier_preparer.format_table(table)


# --- MySQL and MariaDB ---------------------------------------------------------------------------


def _mysql_columns(conn: Connection, table: Table) -> list[Row[Any]]:
    return list(
        conn.execute(
            text(
                "SELECT column_name AS name, is_nullable = 'YES' AS nullable,"
                " column_default IS NOT NULL OR extra LIKE '%auto_increment%'"
                " OR extra LIKE '%GENERATED%' AS filled, extra LIKE '% GENERATED%' AS generated,"
                " IF(extra LIKE '%auto_increment%', extra, column_default) AS source,"
                " data_type AS type,"
                " upper(column_type) AS spelled, character_maximum_length AS length,"
                " datetime_precision AS digits, collation_name AS collation"
                " FROM information_schema.columns"
                " WHERE table_schema = coalesce(:schema, database()) AND table_name = :name"
            ),
            {"schema": table.schema, "name": table.name},
        )
    )


def _mysql_fault(conn: Connection, found: Any, wanted: Wanted[Any]) -> str | None:
    length = _length(wanted)
    spelled = found.spelled
    if _is_time(wanted):
        right, must = found.type == "datetime" and found.digits == 6, "DATETIME(6)"
        if found.type == "datetime" and not right:
            spelled += " without microseconds"
    elif _is_count(wanted):
        right, must = found.type in ("int", "bigint"), "INTEGER"
    elif length is None:
        right, must = found.type == "longtext", "LONGTEXT"
    else:
        right, must = found.type == "varchar" and found.length >= length, f"VARCHAR({length})"
    if not right:
        return f"{spelled}, must be {must}"
    # by bytes: case, accents and trailing spaces tell keys apart
    exact = (
        "utf8mb4_nopad_bin" if getattr(conn.dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
    )
    if length is not None and wanted.primary_key and found.collation != exact:
        return f"collation {found.collation}, must be {exact}"
    if found.collation is not None and not found.collation.startswith("utf8mb4"):
        return f"collation {found.collation}, must be one of utf8mb4"
    return None


def _mysql_indexes(conn: Connection, table: Table) -> list[Index]:
    rows = conn.execute(
        text(
            "SELECT index_name, IF(sub_part IS NULL, column_name,"
            " concat(column_name, '(', sub_part, ')')), non_unique = 0, true"
            " FROM information_schema.statistics"
            " WHERE table_schema = coalesce(:schema, database()) AND table_name = :name"
            " ORDER BY index_name, seq_in_index"
        ),
        {"schema": table.schema, "name": table.name},
    )
    return _gathered(rows)


def _mysql_keys(conn: Connection, table: Table) -> tuple[list[str], list[ForeignKey]]:
    # the information schema keeps keys from who may only select, and SQLAlchemy's own look at this
    # text warns of types that it does not know, in columns that are not ours
    sql = conn.exec_driver_sql(f"SHOW CREATE TABLE {_quoted(conn, table)}").one()[1]
    primary = re.search(r"^ +PRIMARY KEY \((.+?)\)", sql, re.MULTILINE)
    found = []
    for match in _FOREIGN_KEY.finditer(sql):
        columns, target, referred = (_NAME.findall(part) for part in match.groups()[:3])
        schema = target[0] if len(target) > 1 else table.schema
        found.append(ForeignKey(columns, _full(schema, target[-1]), referred, match.group(4) or ""))
    return _NAME.findall(primary.group(1)) if primary else [], found


def _mysql_faults(conn: Connection, table: Table) -> list[str]:
    engines = conn.scalars(
        text(
            "SELECT engine FROM information_schema.tables WHERE engine <> 'InnoDB'"
            " AND table_schema = coalesce(:schema, database()) AND table_name = :name"
        ),
        {"schema": table.schema, "name": table.name},
    )
    return [f"engine {engine}, must be InnoDB" for engine in engines]


def _mysql_holders(conn: Connection, table: Table, but: Table) -> Iterable[str]:
    # not those of tables that may only be selected from; the rest is not worth a look at each
    rows = conn.scalars(
        text(
            "SELECT table_name FROM information_schema.referential_constraints"
            " WHERE constraint_schema = coalesce(:schema, database())"
            " AND unique_constraint_schema = constraint_schema AND referenced_table_name = :name"
            " AND delete_rule NOT IN ('CASCADE', 'SET NULL') AND table_name <> :but"
        ),
        {"schema": table.schema, "name": table.name, "but": but.name},
    )
    return [_full(table.schema, name) for name in rows]


def _gathered(rows: Iterable[Any]) -> list[Index]:
    """Indexes whose columns come one in a row: name, column, unique, whole."""
    found: dict[str, Index] = {}
    for name, column, unique, whole in rows:
        index = found.get(name, Index(name, (), bool(unique), bool(whole)))
        found[name] = index._replace(columns=(*index.columns, column))
    return list(found.values())


# --- SQLite --------------------------------------------------------------------------------------


def _sqlite_columns(conn: Connection, table: Table) -> list[Row[Any]]:
    return list(
        conn.execute(
            text(
                'SELECT name, NOT "notnull" AS nullable,'
                " dflt_value IS NOT NULL OR hidden AS filled, hidden IN (2, 3) AS generated,"
                " dflt_value AS source,"
                " upper(type) AS type, (SELECT x.coll FROM pragma_index_list(:name) l"
                " JOIN pragma_index_xinfo(l.name) x WHERE l.origin = 'pk' AND x.key"
                " AND x.name = c.name) AS collation FROM pragma_table_xinfo(:name) c"
            ),
            {"name": table.name},
        )
    )


def _sqlite_fault(conn: Connection, found: Any, wanted: Wanted[Any]) -> str | None:
    # A column keeps a text as it is, whatever its length, unless its type makes a number of it.
    is_text = "INT" not in found.type and any(t in found.type for t in ("CHAR", "CLOB", "TEXT"))
    if _is_json(wanted):
        right, must = is_text or found.type.startswith("JSON"), "TEXT"
    elif _is_time(wanted):
        right, must = is_text or found.type.startswith(("DATETIME", "TIMESTAMP")), "DATETIME"
    elif _is_count(wanted):
        right, must = "INT" in found.type, "INTEGER"
    else:
        length = _length(wanted)
        right, must = is_text, f"VARCHAR({length})" if length else "TEXT"
    if not right:
        return f"{found.type or 'no type'}, must be {must}"
    if found.collation not in (None, "BINARY"):
        return f"collation {found.collation}, must be BINARY"
    return None


def _sqlite_indexes(conn: Connection, table: Table) -> list[Index]:
    rows = conn.execute(
        text(
            'SELECT l.name, x.name, l."unique", NOT l.partial FROM pragma_index_list(:name) l'
            " JOIN pragma_index_xinfo(l.name) x WHERE x.key ORDER BY l.name, x.seqno"
        ),
        {"name": table.name},
    )
    return _gathered(rows)


def _sqlite_faults(conn: Connection, table: Table) -> list[str]:
    sql = conn.scalar(
        text("SELECT sql FROM sqlite_master WHERE type = 'table' AND lower(name) = lower(:name)"),
        {"name": table.name},
    )
    found = {match.upper() for match in _ON_CONFLICT.findall(_NOT_SQL.sub(" ", sql or ""))}
    return [
        f"ON CONFLICT {how} would lose rows and tell nobody, must not be there"
        for how in sorted(found)
    ]


def _sqlite_holders(conn: Connection, table: Table, but: Table) -> Iterable[str]:
    return conn.scalars(
        text(
            "SELECT m.name FROM sqlite_master m JOIN pragma_foreign_key_list(m.name) f"
            " WHERE m.type = 'table' AND lower(f.\"table\") = lower(:name)"
            " AND f.on_delete NOT IN ('CASCADE', 'SET NULL') AND lower(m.name) <> lower(:but)"
        ),
        {"name": table.name, "but": but.name},
    )


# --- any other -----------------------------------------------------------------------------------


class _Named(NamedTuple):
    name: str
    nullable: bool
    filled: bool
    generated: bool
    source: str | None


def _any_columns(conn: Connection, table: Table) -> list[_Named]:
    return [
        _Named(
            column["name"],
            column["nullable"],
            column.get("default") is not None
            or bool(column.get("autoincrement") is True or column.get("computed")),
            bool(column.get("computed")),
            "auto_increment" if column.get("autoincrement") is True else column.get("default"),
        )
        for column in inspect(conn).get_columns(table.name, table.schema)
    ]


def _any_indexes(conn: Connection, table: Table) -> list[Index]:
    return [
        Index(str(index["name"]), tuple(index["column_names"]), bool(index["unique"]))
        for index in inspect(conn).get_indexes(table.name, table.schema)
    ]


def _any_holders(conn: Connection, table: Table, but: Table) -> list[str]:
    return [
        _full(schema, name)
        for (schema, name), keys in inspect(conn).get_multi_foreign_keys(table.schema).items()
        for key in keys
        if (key["referred_table"], key["referred_schema"]) == (table.name, table.schema)
        and (key["options"].get("ondelete") or "").upper() not in ("CASCADE", "SET NULL")
        and name != but.name
    ]


_COLUMNS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "postgresql": (_postgresql_columns, _postgresql_fault),
    "sqlite": (_sqlite_columns, _sqlite_fault),
    **dict.fromkeys(MYSQL_FAMILY, (_mysql_columns, _mysql_fault)),
}
_INDEXES: dict[str, Callable[[Connection, Table], list[Index]]] = {
    "postgresql": _postgresql_indexes,
    "sqlite": _sqlite_indexes,
    **dict.fromkeys(MYSQL_FAMILY, _mysql_indexes),
}
_FAULTS: dict[str, Callable[[Connection, Table], list[str]]] = {
    "postgresql": _postgresql_faults,
    "sqlite": _sqlite_faults,
    **dict.fromkeys(MYSQL_FAMILY, _mysql_faults),
}
_HOLDERS: dict[str, Callable[[Connection, Table, Table], Iterable[str]]] = {
    "postgresql": _postgresql_holders,
    "sqlite": _sqlite_holders,
    **dict.fromkeys(MYSQL_FAMILY, _mysql_holders),
}
