"""A database URL as people paste it becomes an async engine's URL and arguments.

Hosted databases hand out URLs for libpq or the MySQL client: without a driver, with `sslmode` and
the like. What the async driver cannot take as it stands is translated here, or refused by name.
No message and no log line carries a password or the value of a query parameter.
"""

from __future__ import annotations

import logging
import math
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from urllib.parse import quote_plus, unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from .errors import ConfigurationError

__all__ = ["Target", "create_engine", "is_in_memory", "redact", "resolve"]

logger = logging.getLogger(__name__)

_INVALID = "Invalid database URL format or argument"
_UNPARSEABLE = "<unparseable database URL>"
_SCHEMES = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+asyncmy", "mariadb": "mariadb+asyncmy"}
_SCHEMES |= dict.fromkeys(("postgres", "postgresql"), "postgresql+asyncpg")
_ASYNC_SCHEMES = _SCHEMES | {"oracle": "oracle+oracledb_async", "mssql": "mssql+aioodbc"}
_EXTRAS = {"asyncmy": "'adk-sessions[mysql]'"}
_FLAGS = {"true": True, "1": True, "yes": True, "on": True}
_FLAGS |= {"false": False, "0": False, "no": False, "off": False}
# asyncpg's arguments that are numbers: SQLAlchemy passes them as strings, which asyncpg refuses.
_NUMBERS = {"timeout": float, "command_timeout": float, "statement_cache_size": int}
_NUMBERS |= {"max_cached_statement_lifetime": int, "max_cacheable_statement_size": int}
_NUMBERS |= {"prepared_statement_cache_size": int}
# SQLAlchemy and asyncpg read these from the URL themselves.
_KEPT = {"host", "port", "plugin", "passfile", "krbsrvname", "gsslib"}
# These tune how libpq works; asyncpg has no equivalent and needs none.
_DROPPED = re.compile(
    "channel_binding|client_encoding|fallback_application_name|gss(delegation|encmode)"
    "|keepalives(_count|_idle|_interval)?|load_balance_hosts|ssl(compression|sni)|tcp_user_timeout"
)
# What asyncmy and SQLAlchemy's dialect for it read from the URL.
_ASYNCMY = {
    *("charset", "unix_socket", "sql_mode", "init_command", "program_name", "server_public_key"),
    *("read_default_file", "read_default_group", "client_flag", "use_unicode", "autocommit"),
    *("local_infile", "max_allowed_packet", "read_timeout", "binary_prefix", "stmt_cache_size"),
    *("user", "password", "database", "host", "port", "echo", "plugin", "isolation_level"),
}
_SESSION_ATTRS = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
# Each with the variable and the file in ~/.postgresql that stand in for it.
_LIBPQ_FILES = {
    "sslrootcert": ("PGSSLROOTCERT", "root.crt"),
    "sslcert": ("PGSSLCERT", "postgresql.crt"),
    "sslkey": ("PGSSLKEY", "postgresql.key"),
    "sslcrl": ("PGSSLCRL", "root.crl"),
}
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_MYSQL_FILES = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_crl")
# Whose URLs may list several hosts.
_SEVERAL = ("postgres", "mysql", "mariadb")
# The forms that hosted databases hand out; where there are several, the last one counts.
_MYSQL_TLS: dict[str, dict[str, str | None]] = {
    "ssl": {"true": "required", "false": "disabled", '{"rejectUnauthorized":true}': "identity"},
    "sslaccept": {"strict": "identity", "accept_invalid_certs": "required"},
    "ssl_mode": {"DISABLED": "disabled", "PREFERRED": None, "REQUIRED": "required"}
    | {"VERIFY_CA": "ca", "VERIFY_IDENTITY": "identity"},
}


@dataclass(frozen=True, slots=True, repr=False)
class Target:
    """Where and how to connect.

    Attributes:
        url: URL that names an async driver.
        connect_args: arguments for that driver which the URL does not carry.
    """

    url: URL
    connect_args: dict[str, Any]

    def __repr__(self) -> str:
        return f"Target({redact(self.url)!r}, connect_args={sorted(self.connect_args)})"


def resolve(db_url: str | URL) -> Target:
    """Translate a database URL for its async driver.

    `sqlite`, `postgres`, `postgresql`, `mysql` and `mariadb` get aiosqlite, asyncpg and asyncmy;
    a URL that names an async driver keeps it. A relative SQLite path becomes absolute. That there
    is no path, so that nothing will last, is said in the log, once.

    For asyncpg the parameters of libpq are understood: several hosts, unix sockets, `sslmode` and
    the certificate files, `application_name`, `options`, `connect_timeout` (seconds, 0 for no
    limit), `target_session_attrs`. asyncpg's own numbers are converted, and
    `pgbouncer=true` turns its statement cache off. Two things differ from libpq: asyncpg has no
    channel binding, so `channel_binding` is ignored; and `sslmode=allow` or `prefer` together
    with a certificate parameter means `require`, for asyncpg has no fallback to plain text then.

    For asyncmy several hosts, `connect_timeout`, `ssl_mode`, `ssl_ca`, `ssl_cert`, `ssl_key` (with
    `_` or `-`) and `sslaccept` are understood. A certificate authority that is given is always
    verified; PREFERRED without one connects without TLS. The character set is utf8mb4 unless the
    URL says otherwise.

    Args:
        db_url: URL as a string, or as SQLAlchemy's own.

    Returns:
        The URL with its async driver, and the arguments for that driver.

    Raises:
        ConfigurationError: the URL cannot be parsed, its dialect is unknown, its driver is
            synchronous, or a parameter is unknown or has a value that is not acceptable.
    """
    url = _parse(db_url)
    if url is None:
        # The cause is a fresh one: SQLAlchemy's own may quote the text, password and all.
        raise ConfigurationError(
            f"{_INVALID}: it cannot be parsed. Write dialect://user:password@host:port/database "
            "and percent-encode @ : / ? # % in the user and the password."
        ) from ArgumentError("Could not parse the database URL")
    shown = redact(url)
    backend, _, driver = url.drivername.partition("+")
    if not driver:
        url = url.set(drivername=_SCHEMES.get(backend, backend))
    elif backend == "postgres":
        url = url.set(drivername=f"postgresql+{driver}")
    try:
        dialect = url.get_dialect()
        dialect = dialect.get_async_dialect_cls(url)
    except NoSuchModuleError as error:
        raise ConfigurationError(
            f"{_INVALID}: SQLAlchemy has no dialect {url.drivername!r} ({shown})."
        ) from error
    except Exception as error:
        raise failure(error, url, driver or backend) from error
    if not dialect.is_async:
        scheme = _ASYNC_SCHEMES.get(backend)
        advice = f"{scheme}://" if scheme else "a URL that names an async driver"
        raise ConfigurationError(
            f"The driver {dialect.driver!r} is synchronous ({shown}). Use {advice} instead."
        )
    if url.get_backend_name() == "sqlite":
        return Target(_absolute(url, shown), {})
    if url.get_backend_name() == "postgresql":
        url = _place_hosts(url, 5432)
    elif url.get_backend_name() in _SEVERAL and "host" in url.query:
        if dialect.driver == "asyncmy":
            url = _place_hosts(url, 3306)
        elif not isinstance(url.query["host"], str):
            raise _bad("host", f"a single one: {dialect.driver} has no others to turn to")
    translate = {"asyncpg": _asyncpg, "asyncmy": _asyncmy}.get(dialect.driver)
    return translate(url) if translate else Target(url, {})


def redact(db_url: str | URL) -> str:
    """Render a database URL for messages and logs.

    Args:
        db_url: URL as a string, or as SQLAlchemy's own.

    Returns:
        The URL with `***` for the password and for every query value, or a fixed text if it
        cannot be parsed.
    """
    url = _parse(db_url)
    try:
        assert url is not None
        query = "&".join(f"{quote_plus(key)}=***" for key in url.query)
        bare = url.set(query={}).render_as_string(hide_password=True)
    except Exception:
        return _UNPARSEABLE
    return f"{bare}?{query}" if query else bare


def is_in_memory(url: URL) -> bool:
    """Whether an SQLite URL names no file, so that the data is gone when the connection is."""
    database = url.database or ""
    return not database or ":memory:" in database or url.query.get("mode") == "memory"


def create_engine(db_url: str | URL, **options: Any) -> AsyncEngine:
    """Make an async engine for a URL as people paste it.

    Args:
        db_url: URL as a string, or as SQLAlchemy's own; see `resolve`.
        **options: passed to SQLAlchemy's `create_async_engine`. `connect_args` win over what the
            URL says; `server_settings` among them are merged key by key.

    Returns:
        The engine; it has not connected yet.

    Raises:
        ConfigurationError: as for `resolve`; or the driver's package is not installed, or an
            option is not acceptable.
    """
    target = resolve(db_url)
    translated = target.connect_args
    try:
        args = {**translated, **(options.pop("connect_args", None) or {})}
        if "server_settings" in args and "server_settings" in translated:
            args["server_settings"] = translated["server_settings"] | (
                args["server_settings"] or {}
            )
        return create_async_engine(target.url, connect_args=args, **options)
    except Exception as error:
        failed = failure(error, db_url, target.url.get_driver_name())
        cause = error if isinstance(error, (ImportError, TypeError)) else None
    raise failed from cause


def failure(error: Exception, db_url: str | URL, driver: str = "") -> ConfigurationError:
    """What to raise for an error of SQLAlchemy's when it makes an engine for a URL."""
    shown = redact(db_url)
    if isinstance(error, ImportError):
        package = (error.name or driver).partition(".")[0].removesuffix("_async")
        return ConfigurationError(
            f"The driver package {package!r} is not installed or does not load ({shown}). "
            f"Run: pip install {_EXTRAS.get(package, package)}"
        )
    # A TypeError names the options that are wrong; the text of another error may quote values.
    detail = str(error) if isinstance(error, TypeError) else type(error).__name__
    return ConfigurationError(f"Cannot create an engine for {shown}: {detail}")


def _parse(db_url: str | URL) -> URL | None:
    """The URL, or None where an unescaped password would end up in the host or the database."""
    hosts: list[str] = []
    database = None
    try:
        if isinstance(db_url, str):
            db_url = db_url.strip()
            parts = re.match(r"(\w+(?:\+\w+)?://(?:[^:/]*(?::[^@]*)?@)?)([^/?]*)([^?]*)", db_url)
            if parts and not parts[1].startswith("sqlite"):
                if "@" in parts[2] + parts[3]:
                    return None
                database = unquote(parts[3][1:]) or None  # SQLAlchemy 2.0 does not decode it
                if parts[1].startswith(_SEVERAL) and "," in parts[2]:
                    hosts = parts[2].split(",")  # SQLAlchemy parses one host only
                    db_url = parts[1] + db_url[parts.end(2) :]
        url = make_url(db_url).set(database=database)
        if hosts and "host" not in url.query:
            url = url.update_query_dict({"host": hosts})
    except Exception:
        return None
    return None if "@" in (url.host or "") else url


def _absolute(url: URL, shown: str) -> URL:
    if url.host or url.port or url.username:
        raise ConfigurationError(
            f"{_INVALID}: a SQLite URL has three slashes before a relative path, four before an "
            f"absolute one ({shown})."
        )
    path = url.database
    is_uri = _query(url).get("uri", "no").lower() in ("true", "t", "yes", "y", "on", "1")
    if not path or path == ":memory:":
        _tell_of_memory()
        return url
    if is_uri and path.startswith("file:"):
        return url
    # Otherwise SQLAlchemy resolves it at each connect, and a chdir in between splits the data.
    absolute = os.path.abspath(path)
    if not os.path.isabs(path):
        logger.info("The URL's path is relative to the working directory: the file is %s", absolute)
    return url.set(database=absolute)


@cache
def _tell_of_memory() -> None:
    """Says once what people learn too late who have forgotten a file's name."""
    logger.warning(
        "This SQLite URL names no file: everything is kept in memory, and is gone when the service"
        " is closed or the process ends. To keep it name a file: sqlite:///chats.db"
    )


def _query(url: URL) -> dict[str, str]:
    """As in libpq, the last of repeated parameters counts and an empty one is not there."""
    pairs = ((k, v if isinstance(v, str) else v[-1]) for k, v in url.query.items() if v)
    return {key: value for key, value in pairs if value}


def _place_hosts(url: URL, port: int) -> URL:
    """One host goes into the URL; several, or a socket, into `host=a,b&port=1,2`."""
    given = {key: url.query.get(key, ()) for key in ("host", "port")}
    hosts, ports = (",".join([v] if isinstance(v, str) else v) for v in given.values())
    hosts = unquote(hosts or url.host or "")
    if not hosts and not ports:
        return url
    names, own = [], []
    for text in hosts.split(","):
        match = re.fullmatch(r"\[([^\]]*)\](?::(.*))?|([^:/]*):([^:]*)", text)
        names.append((match[1] or match[3] or "") if match else text)
        own.append((match[2] or match[4] or "") if match else "")
    if ports:
        listed = ports.split(",")
        if len(listed) not in (1, len(names)) or any(own):
            raise _bad("port", "one for all hosts, or as many as there are hosts")
        own = listed * len(names) if len(listed) == 1 else listed
    default = url.port or (port if len(names) > 1 else None)
    numbers = [_number("port", text, int, 1) if text else default for text in own]
    query = {key: value for key, value in url.query.items() if key not in given}
    if len(names) == 1 and "/" not in hosts:
        return url.set(host=names[0], port=numbers[0], query=query)
    if len(names) == 1:
        return url.set(port=numbers[0], query={**query, "host": hosts})
    if not all(names):
        raise _bad("host", "a name, an address or a directory in each place of the list")
    listed = [str(number) for number in numbers]
    return url.set(query={**query, "host": ",".join(names), "port": ",".join(listed)})


def _asyncpg(url: URL) -> Target:
    query = _query(url)
    args: dict[str, Any] = {}
    url = url.set(
        username=query.pop("user", None),
        password=query.pop("password", None),
        database=query.pop("dbname", query.pop("database", None)),
    )
    if query.get("channel_binding") == "require":
        logger.info("asyncpg has no channel binding; the parameter channel_binding is ignored")
    if query.get("gssencmode") == "require":
        raise _bad("gssencmode", "disable or prefer, for asyncpg has no GSSAPI encryption")
    for key in _NUMBERS.keys() & query.keys():
        args[key] = _number(key, query.pop(key), _NUMBERS[key])
    if "connect_timeout" in query:
        args["timeout"] = _number("connect_timeout", query.pop("connect_timeout"), int, -math.inf)
    for key in {"timeout", "command_timeout"} & args.keys():
        args[key] = args[key] if args[key] > 0 else None
    if _choice(query, "pgbouncer", _FLAGS):
        args["statement_cache_size"] = 0
    if settings := {"application_name", "options"} & query.keys():
        args["server_settings"] = {name: query.pop(name) for name in settings}
    attrs = _choice(query, "target_session_attrs", _SESSION_ATTRS)
    direct = _choice(query, "sslnegotiation", {"postgres": None, "direct": True})
    found = {"target_session_attrs": attrs, "direct_tls": direct, "ssl": _libpq_tls(query)}
    args |= {key: value for key, value in found.items() if value is not None}
    query = {key: value for key, value in query.items() if not _DROPPED.fullmatch(key)}
    if unknown := sorted(query.keys() - _KEPT):
        raise _unknown(unknown[0], url, "a search path goes into options=-csearch_path=name")
    return Target(url.set(query=query), args)


def _libpq_tls(query: dict[str, str]) -> str | ssl.SSLContext | None:
    """Take the TLS parameters out of the query: a mode for asyncpg, or a context with the files."""
    # libpq reads JDBC's ssl=true as well; asyncpg's own word for sslmode is ssl.
    modes = {mode: mode for mode in _SSL_MODES} | {"true": "require", "false": "disable"}
    alias = _choice(query, "ssl", modes)
    mode: str | None = _choice(query, "sslmode", _SSL_MODES) or alias
    given = {name: query.pop(name) for name in (*_LIBPQ_FILES, "sslpassword") if name in query}
    system = given.get("sslrootcert") == "system"
    if system and mode not in (None, "verify-full"):
        raise _bad("sslmode", "verify-full together with sslrootcert=system")
    if not given:
        return mode
    mode = mode or ("verify-full" if system else os.environ.get("PGSSLMODE", "prefer"))
    if mode == "disable":
        return mode
    files: dict[str, str | None] = {}
    for name, (variable, default) in _LIBPQ_FILES.items():
        path = os.path.expanduser(f"~/.postgresql/{default}")
        found = path if os.path.isfile(path) else None
        files[name] = given.get(name) or os.environ.get(variable) or found
    verify = files["sslrootcert"] is not None
    if mode.startswith("verify") and not verify:
        raise _bad("sslrootcert", "given with this sslmode: a file, or system")
    if files["sslrootcert"] == "system":
        files["sslrootcert"] = None
    names, password = tuple(_LIBPQ_FILES), given.get("sslpassword", "")
    context = _context(names, files, verify, mode == "verify-full", password)
    context.set_alpn_protocols(["postgresql"])
    return context


def _asyncmy(url: URL) -> Target:
    query = {key.replace("-", "_"): value for key, value in _query(url).items()}
    args: dict[str, Any] = {} if "charset" in query else {"charset": "utf8mb4"}
    if "connect_timeout" in query:
        args["connect_timeout"] = _number("connect_timeout", query.pop("connect_timeout"), int, 1)
    if "sslaccept" in query and "sslcert" in query:
        query["ssl_ca"] = query.pop("sslcert")  # these two come together, with this meaning
    files = {name: query.pop(name) for name in _MYSQL_FILES if name in query}
    spoken = _MYSQL_TLS.keys() & query.keys()
    mode = None
    for name, words in _MYSQL_TLS.items():
        mode = _choice(query, name, words) or mode
    flags = ("ssl_check_hostname", "ssl_verify_identity", "ssl_verify_cert")
    check, identity, verify = (_choice(query, flag, _FLAGS) for flag in flags)
    if not spoken and ("ssl_ca" in files or identity or verify):
        mode = "ca" if check is False or identity is False else "identity"
    if mode != "disabled" and (mode or files):
        verify = "ssl_ca" in files or mode in ("ca", "identity")
        args["ssl"] = _context(_MYSQL_FILES, files, verify, mode == "identity")
        # SQLAlchemy makes an `ssl` argument of what is left, and ours would hide it.
        if rest := [name for name in query if name.startswith("ssl")]:
            raise _bad(rest[0], "left out: pass an ssl.SSLContext in connect_args for it")
    if unknown := sorted(key for key in query.keys() - _ASYNCMY if not key.startswith("ssl_")):
        raise _unknown(unknown[0], url, "sslmode is spelled ssl-mode=REQUIRED here")
    return Target(url.set(query=query), args)


def _unknown(parameter: str, url: URL, advice: str) -> ConfigurationError:
    return ConfigurationError(
        f"Unknown parameter {parameter!r} in the database URL {redact(url)}. Take it out, or give"
        f" its equivalent in connect_args; {advice}."
    )


def _context(
    names: Sequence[str],
    files: Mapping[str, str | None],
    verify: bool,
    check_hostname: bool,
    password: str = "",
) -> ssl.SSLContext:
    """A client's context. Names are the URL's for authority, certificate, key, revocations."""
    ca, certificate, key, revoked = (files.get(name) for name in names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    context.check_hostname = check_hostname
    if ca:
        _load(names[0], ca, lambda: context.load_verify_locations(ca))
    elif verify:
        context.load_default_certs()
    if key:
        _load(names[2], key, lambda: None)
    if certificate:
        # Without a password function OpenSSL asks on the terminal.
        load = partial(context.load_cert_chain, certificate, key, lambda: password)
        _load(names[1], certificate, load)
    if revoked:
        _load(names[3], revoked, lambda: context.load_verify_locations(revoked))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    return context


def _load(parameter: str, path: str, load: Callable[[], None]) -> None:
    try:
        with open(path, "rb"):
            return load()
    except (OSError, ValueError) as error:
        # The path is a query value: an error is known by its reason alone.
        reason = getattr(error, "strerror", None) or type(error).__name__
    raise _bad(parameter, f"a file that can be used here ({reason})")


def _number(parameter: str, text: str, kind: type, minimum: float = 0) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not minimum <= number < math.inf:
        raise _bad(parameter, "a whole number" if kind is int else "a number")
    return number


def _choice(
    query: dict[str, str], parameter: str, choices: Mapping[str, Any] | tuple[str, ...]
) -> Any:
    """Take a parameter out of the query, if it is there; case, and `-` or `_`, do not matter."""
    if parameter not in query:
        return None
    text = query.pop(parameter).lower().replace("-", "_")
    for word in choices:
        if word.lower().replace("-", "_") == text:
            return choices[word] if isinstance(choices, Mapping) else word
    raise _bad(parameter, "one of " + ", ".join(choices))


def _bad(parameter: str, expected: str) -> ConfigurationError:
    return ConfigurationError(f"The database URL's parameter {parameter} must be {expected}.")
