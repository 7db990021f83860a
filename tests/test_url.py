"""What a pasted URL becomes, as the driver receives it."""

from __future__ import annotations

import asyncio
import logging
import ssl
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import ArgumentError

from adk_sessions.errors import ConfigurationError
from adk_sessions.url import Target, create_engine, redact, resolve

SECRET = "s3cr3t-word"
PG = "postgresql://app:pw@db.example/shop"


def received(url: str | URL, **options: Any) -> dict[str, Any]:
    """The keyword arguments that the driver's connect function gets, recorded by a stand-in."""
    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    async def connect(*args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        raise Stop

    async def run() -> None:
        connect_args = {**options.pop("connect_args", {}), "async_creator_fn": connect}
        engine = create_engine(url, connect_args=connect_args, **options)
        with pytest.raises(Stop):
            await engine.connect()
        await engine.dispose()

    asyncio.run(run())
    return seen


def refused(url: Any) -> str:
    """The message of the refusal, which never quotes a secret, nor does anything chained to it."""
    with pytest.raises(ConfigurationError) as info:
        create_engine(url)
    assert isinstance(info.value, ValueError)
    assert SECRET not in "".join(traceback.format_exception(info.value))
    error: BaseException | None = info.value
    while error is not None:
        assert SECRET not in repr(error)
        error = error.__cause__ or error.__context__
    return str(info.value)


@pytest.fixture(autouse=True)
def no_libpq_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SSLMODE", "SSLROOTCERT", "SSLCERT", "SSLKEY", "SSLCRL"):
        monkeypatch.delenv(f"PG{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt signs itself; ca.key is its key, locked.key the same key under a password."""
    folder = tmp_path_factory.mktemp("certificates")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -keyout ca.key -out ca.crt",
        f"rsa -in ca.key -aes256 -passout pass:{SECRET} -out locked.key",
    ):
        try:
            subprocess.run(["openssl", *command.split()], cwd=folder, check=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("needs the openssl command")
    (folder / "junk.crt").write_text("not a certificate")
    return folder


# Drivers


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", "sqlite+aiosqlite"),
        ("sqlite:///x.db", "sqlite+aiosqlite"),
        ("postgres://h/d", "postgresql+asyncpg"),
        ("postgresql://h/d", "postgresql+asyncpg"),
        ("postgres+asyncpg://h/d", "postgresql+asyncpg"),
        ("mysql://h/d", "mysql+asyncmy"),
        ("mariadb://h/d", "mariadb+asyncmy"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg"),
        ("mysql+aiomysql://h/d", "mysql+aiomysql"),
        ("mariadb+aiomysql://h/d", "mariadb+aiomysql"),
        ("sqlite+aiosqlite://", "sqlite+aiosqlite"),
        ("mssql+aioodbc://h/d?driver=x", "mssql+aioodbc"),
    ],
)
def test_the_url_gets_an_async_driver(url: str, expected: str) -> None:
    assert resolve(url).url.drivername == expected
    assert resolve(make_url(url)).url.drivername == expected


@pytest.mark.parametrize("url", ["mssql+aioodbc://u:p@h/d?driver=x&y=1&y=2"])
def test_other_async_dialects_pass_unchanged(url: str) -> None:
    assert resolve(url) == Target(make_url(url), {})


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("sqlite+pysqlite:///x.db", "sqlite+aiosqlite"),
        ("postgresql+psycopg2://u:{}@h/d", "postgresql+asyncpg"),
        ("postgresql+pg8000://u:{}@h/d?a={}", "postgresql+asyncpg"),
        ("mysql+pymysql://u:{}@h/d", "mysql+asyncmy"),
        ("mysql+mysqldb://u:{}@h/d", "mysql+asyncmy"),
        ("mariadb+pymysql://u:{}@h/d", "mariadb+asyncmy"),
        ("mssql+pyodbc://u:{}@h/d", "mssql+aioodbc"),
        ("oracle+cx_oracle://u:{}@h/d", "oracle+oracledb_async"),
    ],
)
def test_a_synchronous_driver_is_refused_with_the_scheme_to_use(url: str, scheme: str) -> None:
    before = set(sys.modules)
    message = refused(url.replace("{}", SECRET))
    assert "synchronous" in message
    assert f"{scheme}://" in message
    imported = {"psycopg2", "pg8000", "pymysql", "MySQLdb", "pyodbc", "cx_Oracle"}
    assert not imported & (set(sys.modules) - before)


@pytest.mark.parametrize(
    ("url", "module", "advice"),
    [
        ("mysql://u:{}@h/d", "asyncmy", "pip install 'adk-sessions[mysql]'"),
        ("mysql+aiomysql://u:{}@h/d", "aiomysql", "pip install aiomysql"),
        ("postgresql+psycopg://u:{}@h/d", "psycopg", "pip install psycopg"),
        ("postgresql+psycopg_async://u:{}@h/d", "psycopg", "pip install psycopg"),
    ],
)
def test_a_missing_driver_package_says_what_to_install(
    url: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(url.replace("{}", SECRET))
    assert advice in message
    assert "u:***@h" in message


# SQLite


def test_a_relative_sqlite_path_is_fixed_where_the_url_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = resolve("sqlite:///sub/../x.db?timeout=3")
    assert target.url.database == str(tmp_path / "x.db")
    assert target.url.query == {"timeout": "3"}
    assert resolve("sqlite:////var/y.db").url.database == "/var/y.db"
    assert resolve("sqlite:////var/a@b.db").url.database == "/var/a@b.db"
    assert resolve("sqlite:///file:z.db").url.database == str(tmp_path / "file:z.db")


@pytest.mark.parametrize(
    "rest", ["", "/", "/:memory:", "/file:x.db?uri=true&mode=ro", "/file:m?mode=memory&uri=True"]
)
def test_sqlite_memory_and_file_uris_stay_as_they_are(rest: str) -> None:
    target = resolve(f"sqlite://{rest}")
    assert target.url == make_url(f"sqlite+aiosqlite://{rest}")


async def test_sqlite_data_stays_together_across_a_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = create_engine("sqlite:///x.db", poolclass=sqlalchemy.NullPool)
    async with engine.begin() as connection:
        await connection.execute(text("create table t (a int)"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    async with engine.begin() as connection:
        await connection.execute(text("insert into t values (1)"))
    await engine.dispose()


def test_two_slashes_before_a_sqlite_path_are_explained() -> None:
    message = refused("sqlite://x.db")
    assert "Invalid database URL format or argument" in message
    assert "three slashes" in message


# PostgreSQL: hosts and credentials


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("postgresql://u@h/d", "h", None),
        ("postgresql://u@h:6000/d", "h", 6000),
        ("postgresql://u@[::1]:5433/d", "::1", 5433),
        ("postgresql://u@/d?host=h", "h", None),
        ("postgresql://u@/d?host=h:6000", "h", 6000),
        ("postgresql://u@/d?host=[::1]:6000", "::1", 6000),
        ("postgresql://u@/d?host=[::1]", "::1", None),
        ("postgresql://u@/d?host=::1&port=6000", "::1", 6000),
        ("postgresql://u@a/d?host=h&port=6000", "h", 6000),
        ("postgresql://u@h/d?port=6000", "h", 6000),
        ("postgresql://u@/d?host=/var/run/postgresql", "/var/run/postgresql", None),
        ("postgresql://u@/d?host=/run/pg&port=6000", "/run/pg", 6000),
        ("postgresql://u@:6000/d?host=/run/pg", "/run/pg", 6000),
        ("postgresql://u@%2Frun%2Fpg:6000/d", "/run/pg", 6000),
        ("postgresql:///d?user=u", None, None),
        ("postgresql://u@h1:5432,h2:5433/d", ["h1", "h2"], [5432, 5433]),
        ("postgresql://u@h1,h2/d", ["h1", "h2"], [5432, 5432]),
        ("postgresql://u@h1,h2:5433/d", ["h1", "h2"], [5432, 5433]),
        ("postgresql://u@h1:5433,h2/d", ["h1", "h2"], [5433, 5432]),
        ("postgresql://u@h1:1,h2:2,h3/d", ["h1", "h2", "h3"], [1, 2, 5432]),
        ("postgres://u@[::1]:5433,[fe80::1],h:1/d", ["::1", "fe80::1", "h"], [5433, 5432, 1]),
        ("postgresql+asyncpg://u@h1:1,h2:2/d", ["h1", "h2"], [1, 2]),
        ("postgresql://u@/d?host=h1,h2&port=1,2", ["h1", "h2"], [1, 2]),
        ("postgresql://u@/d?host=h1,h2&port=7", ["h1", "h2"], [7, 7]),
        ("postgresql://u@h1,h2/d?port=7", ["h1", "h2"], [7, 7]),
        ("postgresql://u@/d?host=h1,h2", ["h1", "h2"], [5432, 5432]),
        ("postgresql://u@/d?host=h1:1&host=h2", ["h1", "h2"], [1, 5432]),
        ("postgresql://u@/d?host=[::1]:1&host=/run/pg", ["::1", "/run/pg"], [1, 5432]),
    ],
)
def test_hosts_reach_asyncpg(url: str, host: Any, port: Any) -> None:
    seen = received(url)
    assert (seen.get("host"), seen.get("port")) == (host, port)
    assert seen["user"] == "u"
    assert seen["database"] == "d"


def test_several_hosts_are_kept_for_psycopg_too() -> None:
    url = resolve("postgresql+psycopg://u:p%40w@h1:1,h2/d?sslmode=require").url
    _, args = url.get_dialect()().create_connect_args(url)
    assert (args["host"], args["port"]) == ("h1,h2", "1,5432")
    assert (args["password"], args["sslmode"]) == ("p@w", "require")


@pytest.mark.parametrize("hosts", ["h", "h1:5432,h2:5433", "h1,h2"])
def test_a_percent_encoded_password_survives(hosts: str) -> None:
    seen = received(f"postgresql://a%40b:p%40%2F%3A%3F%23%25,w@{hosts}/d%20b")
    assert seen["user"] == "a@b"
    assert seen["password"] == "p@/:?#%,w"
    assert seen["database"] == "d b"


def test_credentials_in_the_query_are_credentials() -> None:
    url = f"postgresql://h/?user=u&password={SECRET}&dbname=shop"
    assert received(url).items() >= {"user": "u", "password": SECRET, "database": "shop"}.items()
    assert SECRET not in repr(resolve(url)) + str(resolve(url).url)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("host=h1,h2&port=1,2,3", "port"),
        ("host=h1:1,h2:2&port=7", "port"),
        ("host=h1,h2&port=x", "port"),
        ("host=h1:x", "port"),
        ("port=0", "port"),
        ("host=h1,,h2", "host"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(query: str, parameter: str) -> None:
    assert f"parameter {parameter} " in refused(f"postgresql://u@/d?{query}")


# PostgreSQL: parameters


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("connect_timeout=7", {"timeout": 7}),
        ("connect_timeout=0", {"timeout": None}),
        ("connect_timeout=-1", {"timeout": None}),
        ("timeout=2.5&command_timeout=30", {"timeout": 2.5, "command_timeout": 30.0}),
        ("command_timeout=0", {"command_timeout": None}),
        ("statement_cache_size=0", {"statement_cache_size": 0}),
        ("max_cached_statement_lifetime=9", {"max_cached_statement_lifetime": 9}),
        ("max_cacheable_statement_size=9", {"max_cacheable_statement_size": 9}),
        ("pgbouncer=true", {"statement_cache_size": 0}),
        ("pgbouncer=true&statement_cache_size=50", {"statement_cache_size": 0}),
        ("pgbouncer=false&statement_cache_size=50", {"statement_cache_size": 50}),
        ("application_name=my%20app", {"server_settings": {"application_name": "my app"}}),
        ("options=-c%20search_path%3Dx", {"server_settings": {"options": "-c search_path=x"}}),
        ("options=endpoint%3Dep-1", {"server_settings": {"options": "endpoint=ep-1"}}),
        ("target_session_attrs=read-write", {"target_session_attrs": "read-write"}),
        ("sslnegotiation=direct", {"direct_tls": True}),
        ("sslnegotiation=postgres", {}),
        ("passfile=/x&krbsrvname=k", {"passfile": "/x", "krbsrvname": "k"}),
        ("application_name=a&application_name=b", {"server_settings": {"application_name": "b"}}),
        ("application_name=&sslmode=", {}),
        (
            "keepalives=1&keepalives_idle=5&keepalives_count=2&gssencmode=prefer&sslsni=1"
            "&sslcompression=0&fallback_application_name=f&tcp_user_timeout=5"
            "&channel_binding=prefer&client_encoding=utf8",
            {},
        ),
    ],
)
def test_parameters_reach_asyncpg(query: str, expected: dict[str, Any]) -> None:
    plain = {"host": "db.example", "user": "app", "password": "pw", "database": "shop"}
    seen = received(f"{PG}?{query}")
    assert seen == plain | expected
    for name, value in expected.items():
        assert type(seen[name]) is type(value)


def test_sqlalchemys_own_cache_size_reaches_sqlalchemy() -> None:
    # The dialect takes it for itself, so connect() does not see it.
    assert resolve(f"{PG}?prepared_statement_cache_size=0").connect_args == {
        "prepared_statement_cache_size": 0
    }
    assert "prepared_statement_cache_size" not in received(f"{PG}?prepared_statement_cache_size=0")


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("schema=X", "schema"),
        ("server_settings=X", "server_settings"),
        ("require_auth=X", "require_auth"),
        ("connect_timeout=X", "connect_timeout"),
        ("connect_timeout=1.5", "connect_timeout"),
        ("command_timeout=nan", "command_timeout"),
        ("command_timeout=inf", "command_timeout"),
        ("statement_cache_size=-1", "statement_cache_size"),
        ("statement_cache_size=X", "statement_cache_size"),
        ("pgbouncer=X", "pgbouncer"),
        ("target_session_attrs=X", "target_session_attrs"),
        ("sslmode=X", "sslmode"),
        ("sslrootcert=/X/X", "sslrootcert"),
        ("sslmode=require&sslcert=/X/X", "sslcert"),
        ("sslmode=require&sslkey=/X/X", "sslkey"),
        ("sslrootcert=system&sslmode=require", "sslmode"),
        ("sslrootcert=%00", "sslrootcert"),
        ("sslmode=verify-full&sslpassword=X", "sslrootcert"),
        ("gssencmode=require", "gssencmode"),
    ],
)
def test_a_parameter_that_is_not_acceptable_is_named(query: str, parameter: str) -> None:
    message = refused(f"postgresql://u:{SECRET}@h/d?{query.replace('X', SECRET)}")
    assert parameter in message


def test_required_channel_binding_is_mentioned_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "adk_sessions"):
        target = resolve(f"postgresql://u:{SECRET}@h/d?channel_binding=require&sslmode=require")
    assert target.connect_args == {"ssl": "require"}
    assert target.url.query == {}
    assert "channel_binding" in caplog.text
    assert SECRET not in caplog.text


# PostgreSQL: TLS


@pytest.mark.parametrize(
    "mode", ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
)
def test_sslmode_alone_is_asyncpgs_ssl(mode: str) -> None:
    assert received(f"{PG}?sslmode={mode}")["ssl"] == mode
    assert received(f"{PG}?ssl={mode}")["ssl"] == mode


def test_jdbcs_ssl_is_understood() -> None:
    assert received(f"{PG}?ssl=true")["ssl"] == "require"
    assert "ssl" not in received(PG)


@pytest.mark.parametrize(
    ("mode", "check_hostname"),
    [
        ("", False),
        ("prefer", False),
        ("require", False),
        ("verify-ca", False),
        ("verify-full", True),
    ],
)
def test_a_root_certificate_is_verified(
    mode: str, check_hostname: bool, certificates: Path
) -> None:
    context = received(f"{PG}?sslmode={mode}&sslrootcert={certificates}/ca.crt")["ssl"]
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname is check_hostname
    assert [c["subject"] for c in context.get_ca_certs()] == [((("commonName", "test"),),)]


def test_the_systems_authorities_mean_verify_full() -> None:
    for query in ("sslrootcert=system", "sslmode=verify-full&sslrootcert=system"):
        context = received(f"{PG}?{query}")["ssl"]
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname is True


def test_a_disabled_sslmode_reads_no_file() -> None:
    assert received(f"{PG}?sslmode=disable&sslrootcert=/nowhere")["ssl"] == "disable"


def test_a_client_certificate_without_authority_is_not_verified(certificates: Path) -> None:
    query = f"sslmode=require&sslcert={certificates}/ca.crt&sslkey={certificates}/ca.key"
    context = received(f"{PG}?{query}")["ssl"]
    assert context.verify_mode is ssl.CERT_NONE
    assert "sslrootcert" in refused(f"{PG}?{query}".replace("require", "verify-ca"))


def test_the_users_own_root_certificate_is_found(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    query = f"sslmode=require&sslcert={certificates}/ca.crt&sslkey={certificates}/ca.key"
    home = tmp_path / "home" / ".postgresql"
    home.mkdir(parents=True)
    (home / "root.crt").write_bytes((certificates / "ca.crt").read_bytes())
    assert received(f"{PG}?{query}")["ssl"].verify_mode is ssl.CERT_REQUIRED
    monkeypatch.setenv("PGSSLROOTCERT", "/nowhere")
    assert "sslrootcert" in refused(f"{PG}?{query}")


def test_a_locked_key_needs_its_password(certificates: Path) -> None:
    query = f"sslmode=require&sslcert={certificates}/ca.crt&sslkey={certificates}/locked.key"
    assert isinstance(received(f"{PG}?{query}&sslpassword={SECRET}")["ssl"], ssl.SSLContext)
    assert "sslcert" in refused(f"{PG}?{query}&sslpassword=wrong")
    assert "sslcert" in refused(f"{PG}?{query}")


def test_files_without_certificates_are_refused_by_name(certificates: Path) -> None:
    root = f"{PG}?sslrootcert={certificates}/"
    assert "sslrootcert" in refused(f"{root}junk.crt")
    assert "sslcrl" in refused(f"{root}ca.crt&sslcrl={certificates}/junk.crt")


def handshake(client: ssl.SSLContext, folder: Path, server_hostname: str) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "ca.crt", folder / "ca.key")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(incoming, outgoing, server_hostname=server_hostname)
    theirs = server.wrap_bio(outgoing, incoming, server_side=True)
    for side in (ours, theirs, ours):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_verification_is_what_was_asked_for(certificates: Path) -> None:
    root = f"sslrootcert={certificates}/ca.crt"
    other = resolve(f"{PG}?sslrootcert=system").connect_args["ssl"]
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(other, certificates, "test")
    for mode in ("require", "verify-ca"):
        context = resolve(f"{PG}?{root}&sslmode={mode}").connect_args["ssl"]
        handshake(context, certificates, "another.example")
    full = resolve(f"{PG}?{root}&sslmode=verify-full").connect_args["ssl"]
    with pytest.raises(ssl.SSLCertVerificationError, match=r"another\.example"):
        handshake(full, certificates, "another.example")


# MySQL and MariaDB


@pytest.mark.parametrize("scheme", ["mysql", "mariadb", "mysql+asyncmy"])
def test_asyncmy_gets_the_character_set_and_numbers(scheme: str) -> None:
    seen = received(f"{scheme}://u:p%40w@h:3307/d?connect_timeout=5")
    assert seen["charset"] == "utf8mb4"
    assert (seen["host"], seen["port"], seen["password"], seen["db"]) == ("h", 3307, "p@w", "d")
    assert seen["connect_timeout"] == 5
    assert "ssl" not in seen
    assert received(f"{scheme}://h/d?charset=latin1")["charset"] == "latin1"


@pytest.mark.parametrize(
    ("url", "hosts", "ports"),
    [
        ("mysql://u:p@h1:1,h2:2/d", "h1,h2", "1,2"),
        ("mariadb://u:p@h1,h2:3307/d", "h1,h2", "3306,3307"),
        ("mysql+asyncmy://u:p@/d?host=h1,h2&port=4", "h1,h2", "4,4"),
    ],
)
def test_several_hosts_are_kept_for_asyncmy(url: str, hosts: str, ports: str) -> None:
    seen = received(url)
    assert (seen["host"], seen["port"]) == (hosts, ports)
    assert (seen["user"], seen["password"], seen["db"]) == ("u", "p", "d")


def test_several_hosts_are_not_for_every_driver() -> None:
    assert "parameter host " in refused(f"mysql+aiomysql://u:{SECRET}@h1,h2/d")
    assert resolve("mysql+aiomysql://u@/d?host=h").url.query == {"host": "h"}


NONE, REQUIRED = ssl.CERT_NONE, ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("ssl-mode=DISABLED", None),
        ("ssl_mode=PREFERRED", None),
        ("ssl-mode=REQUIRED", (NONE, False)),
        ("ssl_mode=required", (NONE, False)),
        ("ssl_mode=VERIFY_CA", (REQUIRED, False)),
        ("ssl-mode=VERIFY_IDENTITY", (REQUIRED, True)),
        ("sslaccept=strict", (REQUIRED, True)),
        ("sslaccept=accept_invalid_certs", (NONE, False)),
        ("ssl=true", (NONE, False)),
        ("ssl=false", None),
        ("ssl=%7B%22rejectUnauthorized%22:true%7D", (REQUIRED, True)),
        ("ssl-mode=REQUIRED&ssl-ca={ca}", (REQUIRED, False)),
        ("ssl-mode=PREFERRED&ssl-ca={ca}", (REQUIRED, False)),
        ("ssl-mode=VERIFY_CA&ssl-ca={ca}", (REQUIRED, False)),
        ("ssl_ca={ca}", (REQUIRED, True)),
        ("ssl_ca={ca}&ssl_check_hostname=false", (REQUIRED, False)),
        ("ssl_ca={ca}&ssl_verify_cert=true&ssl_verify_identity=true", (REQUIRED, True)),
        ("sslaccept=strict&sslcert={ca}", (REQUIRED, True)),
        ("ssl_mode=REQUIRED&ssl_cert={ca}&ssl_key={key}", (NONE, False)),
        ("ssl_mode=DISABLED&ssl_ca={ca}", None),
    ],
)
def test_mysql_tls(query: str, expected: Any, certificates: Path) -> None:
    query = query.format(ca=certificates / "ca.crt", key=certificates / "ca.key")
    context = received(f"mysql://u:p@h/d?{query}").get("ssl")
    if expected is None:
        assert context is None
    else:
        assert isinstance(context, ssl.SSLContext)
        assert (context.verify_mode, context.check_hostname) == expected
        given = "ssl_ca" in query or "ssl-ca" in query or "sslcert" in query
        assert not given or len(context.get_ca_certs()) == 1


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("ssl-mode=X", "ssl_mode"),
        ("sslaccept=X", "sslaccept"),
        ("ssl-ca=/X/X", "ssl_ca"),
        ("ssl_mode=REQUIRED&ssl_key=/X/X", "ssl_key"),
        ("ssl_mode=REQUIRED&ssl_cipher=X", "ssl_cipher"),
        ("connect_timeout=X", "connect_timeout"),
        ("connect_timeout=0", "connect_timeout"),
    ],
)
def test_a_mysql_parameter_that_is_not_acceptable_is_named(query: str, parameter: str) -> None:
    message = refused(f"mysql://u:{SECRET}@h/d?{query.replace('X', SECRET)}")
    assert parameter in message


def test_other_mysql_parameters_are_left_to_sqlalchemy() -> None:
    seen = received("mysql://h/d?unix_socket=/run/m.sock&read_timeout=3&program_name=x")
    assert seen["unix_socket"] == "/run/m.sock"
    assert seen["read_timeout"] == 3
    assert seen["program_name"] == "x"
    assert resolve("mysql+aiomysql://h/d?ssl-mode=x").connect_args == {}


# Refusals and redaction

UNPARSEABLE = [
    SECRET,
    "",
    f"postgresql:/{SECRET}@h/d",
    f"postgresql://u:{SECRET}@h:port/d",
    f"postgresql://u:{SECRET}@h:5432:{SECRET}/d",
    f"mssql+aioodbc://u:{SECRET}@h1:1,h2:2/d",
    # A character of the password that is not percent-encoded moves the rest elsewhere.
    f"postgresql://u:p@{SECRET}@h/d",
    f"postgresql://u:p@x/{SECRET}@h/d",
    f"postgresql://{SECRET}/x:p@h/d",
    URL.create("postgresql", "u", "p", host=f"{SECRET}@h"),
    None,
    42,
]


@pytest.mark.parametrize("url", UNPARSEABLE)
def test_an_unparseable_url_appears_nowhere(url: Any) -> None:
    assert "Invalid database URL format or argument" in refused(url)
    with pytest.raises(ConfigurationError) as info:
        resolve(url)
    assert type(info.value.__cause__) is ArgumentError
    assert info.value.__context__ is None
    assert redact(url) == "<unparseable database URL>"


@pytest.mark.parametrize("url", ["nosuch://u:{}@h/d?a={}", "postgresql+nosuch://u:{}@h/d?a={}"])
def test_an_unknown_dialect_is_an_invalid_url(url: str) -> None:
    message = refused(url.replace("{}", SECRET))
    assert "Invalid database URL format or argument" in message
    assert url.replace("{}", "***") in message


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p%40w@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        (
            "postgresql://u:p@h/d?sslmode=require&password=x",
            "postgresql://u:***@h/d?sslmode=***&password=***",
        ),
        ("postgresql://u:p@h1:1,h2:2/d", "postgresql://u:***@/d?host=***"),
        ("mysql://h/d?a=1&a=2", "mysql://h/d?a=***"),
        ("sqlite:///sub/x.db?timeout=3", "sqlite:///sub/x.db?timeout=***"),
        (" postgresql://u:p@h/d\n", "postgresql://u:***@h/d"),
        ("postgresql+psycopg2://u:p/w@h/d", "postgresql+psycopg2://u:***@h/d"),
    ],
)
def test_redact(url: str, expected: str) -> None:
    assert redact(url) == expected


def test_whitespace_around_a_pasted_url_is_ignored() -> None:
    assert resolve(f" {PG}\n") == resolve(PG)


def test_a_target_shows_no_secret(certificates: Path) -> None:
    target = resolve(f"postgresql://u:{SECRET}@h/d?application_name={SECRET}&passfile={SECRET}")
    assert SECRET not in repr(target) + str(target)
    assert "server_settings" in repr(target)


# Engines


def test_the_callers_connect_args_win() -> None:
    connect_args = {"timeout": 1, "server_settings": {"application_name": "mine", "jit": "off"}}
    seen = received(
        f"{PG}?connect_timeout=9&application_name=url&options=-c%20x&sslmode=require",
        connect_args=connect_args,
    )
    assert seen["timeout"] == 1
    assert seen["ssl"] == "require"
    assert seen["server_settings"] == {"application_name": "mine", "jit": "off", "options": "-c x"}
    assert connect_args == {
        "timeout": 1,
        "server_settings": {"application_name": "mine", "jit": "off"},
    }


async def test_options_reach_the_engine() -> None:
    engine = create_engine(PG, pool_size=3, connect_args=None, pool_pre_ping=True)
    assert engine.pool.size() == 3  # type: ignore[attr-defined]
    await engine.dispose()


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no_such_option") as info:
        create_engine(f"postgresql://u:{SECRET}@h/d?application_name={SECRET}", no_such_option=1)
    assert isinstance(info.value.__cause__, TypeError)
    assert SECRET not in "".join(traceback.format_exception(info.value))


@pytest.mark.parametrize(
    "options",
    [{"poolclass": sqlalchemy.QueuePool}, {"connect_args": 5}, {"server_side_cursors": True}],
)
def test_any_other_failure_is_ours_too(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"Cannot create an engine for .*u:\*\*\*@h"):
        create_engine(f"postgresql://u:{SECRET}@h/d", **options)


async def test_a_pasted_url_connects(postgres_url: str) -> None:
    url = make_url(postgres_url)
    host = f"{url.host}:{url.port or 5432}"
    user = (url.username or "postgres") + (f":{url.password}" if url.password else "")
    pasted = (
        f"postgres://{user}@{host},{host}/{url.database}?sslmode=prefer&connect_timeout=0"
        "&application_name=my%20app&options=-c%20search_path%3Delsewhere&statement_cache_size=5"
        "&target_session_attrs=primary&channel_binding=prefer&pgbouncer=true&keepalives=1"
    )
    engine = create_engine(pasted)
    async with engine.connect() as connection:
        for setting, expected in {"application_name": "my app", "search_path": "elsewhere"}.items():
            value = await connection.scalar(text(f"select current_setting('{setting}')"))
            assert value == expected
        prepared = await connection.scalar(text("select count(*) from pg_prepared_statements"))
        assert prepared == 0
    await engine.dispose()
