"""What `notify=True` costs appends on PostgreSQL: pg_notify in each, by how many write at once.

In an environment with the extra `bench`: PYTHONPATH=tests python -m benchmarks.notify

The statement is the very one that a service executes, but pgbench executes it, prepared: a client
in Python would be the limit before the server is. Nobody listens; what costs is a lock of all
databases, which PostgreSQL gives to one transaction that notifies at a time until it is committed.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from servers import ServerNotFound, find_postgres
from sqlalchemy import URL, Engine, make_url, text
from sqlalchemy import event as hooks

from adk_sessions import Event, SessionService

from .places import Unfit, open_place

APP, USER, SESSION = "app-of-the-append", "user-of-the-append", "session-of-the-append"
WRITERS = (1, 8, 16)
KINDS = {"without": False, "notify": True}
BEGIN = datetime(2025, 1, 1)
PATIENCE = 60.0

SESSIONS = text("""
    INSERT INTO sessions (app_name, user_id, id, state, create_time, update_time)
    SELECT :app, :user, n::text, '{"topic": "ships", "step": 4}', :begin, :begin
    FROM generate_series(0, :writers - 1) AS n
""")

Rates = dict[int, dict[str, list[float]]]


def find_pgbench() -> Path | None:
    """pgbench, beside the server's programs or on the PATH."""
    programs = find_postgres()
    beside = [str(programs)] if programs else []
    found = (shutil.which("pgbench", path=path) for path in [*beside, None])
    return next((Path(program) for program in found if program), None)


async def append_of(url: str, notify: bool) -> tuple[str, Sequence[Any]]:
    """The statement of an append of some 300 bytes, and its parameters, as the driver gets them."""
    caught: list[tuple[str, Sequence[Any]]] = []

    def execute(_conn: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        if "INSERT INTO events" in sql:
            caught.append((sql, parameters))

    key: dict[str, Any] = {"app_name": APP, "user_id": USER, "session_id": SESSION}
    async with SessionService(url, notify=notify) as service:
        session = await service.create_session(**key)
        hooks.listen(Engine, "before_cursor_execute", execute)
        try:
            await service.append_event(session, Event(author="user", content="words " * 20))
        finally:
            hooks.remove(Engine, "before_cursor_execute", execute)
        await service.delete_session(**key)
    [append] = caught
    return append


def script_of(sql: str, parameters: Sequence[Any]) -> tuple[str, dict[str, str]]:
    """The statement for pgbench, and its variables.

    Each client writes to a session of its own, whose revision it knows from its last append: one
    that finds another there writes nothing, and then pgbench fails.
    """
    *_, expected = (value for value in parameters if isinstance(value, datetime))
    variables: dict[str, str] = {"update_time": str(BEGIN), "step": "0"}

    def named(found: re.Match[str]) -> str:
        number = int(found[1])
        value = parameters[number - 1]
        if value is None or value == "":  # which pgbench has no variables for
            return "NULL" if value is None else "''"
        own = {APP: "app", USER: "user", SESSION: "client_id", expected: "update_time"}
        if name := own.get(value):
            return f":{name}"
        if number == 1:
            return ":step"  # the event's id
        if isinstance(value, int):
            return str(value)
        variables[f"v{number}"] = str(value)
        return f":v{number}"

    return "\\set step :step + 1\n" + re.sub(r"\$(\d+)", named, sql) + "\n\\gset\n", variables


def rate(pgbench: Path, url: str, script: Path, writers: int, seconds: int, **given: str) -> float:
    """Appends per second of so many clients."""
    at = make_url(url)
    # a password is not for a command line, which every process may read
    secret = {"PGPASSWORD": at.password} if at.password else {}
    target = URL.create(
        "postgresql", at.username, None, at.host, at.port, at.database, at.query
    ).render_as_string()
    command = [str(pgbench), "-n", "-M", "prepared", "-f", str(script)]
    command += ["-c", str(writers), "-T", str(seconds)]
    for name, value in given.items():
        command += ["-D", f"{name}={value}"]
    done = subprocess.run(
        [*command, target],
        env={**os.environ, **secret},
        capture_output=True,
        text=True,
        timeout=seconds + PATIENCE,
    )
    found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise click.ClickException(f"pgbench failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return float(found[1])


async def prepare(url: str, rounds: int, writers: Sequence[int]) -> None:
    """Sessions for every run, which none has written to yet."""
    async with SessionService(url) as service:
        await service.prepare_tables()
        async with service._database.engine.begin() as conn:
            for turn in range(rounds):
                for count in writers:
                    for kind in KINDS:
                        whose = {"app": kind, "user": f"{turn}-{count}"}
                        more = {"writers": count, "begin": BEGIN}
                        await conn.execute(SESSIONS, {**whose, **more})


def measure(pgbench: Path, url: str, writers: Sequence[int], rounds: int, seconds: int) -> Rates:
    """Appends per second by number of writers: with pg_notify and without, taking turns."""
    asyncio.run(prepare(url, rounds, writers))
    rates: Rates = {count: {kind: [] for kind in KINDS} for count in writers}
    with tempfile.TemporaryDirectory() as folder:
        scripts: dict[str, tuple[Path, dict[str, str]]] = {}
        for kind, notify in KINDS.items():
            script, variables = script_of(*asyncio.run(append_of(url, notify)))
            path = Path(folder) / f"{kind}.sql"
            path.write_text(script)
            scripts[kind] = path, variables
        for turn in range(rounds):
            for count in writers:
                for kind in list(KINDS)[:: -1 if turn % 2 else 1]:
                    path, variables = scripts[kind]
                    more = {**variables, "app": kind, "user": f"{turn}-{count}"}
                    rates[count][kind].append(rate(pgbench, url, path, count, seconds, **more))
    return rates


def ratio(rates: dict[str, list[float]]) -> float:
    """What is left of the appends per second: a quotient of two medians."""
    return statistics.median(rates["notify"]) / statistics.median(rates["without"])


def table_of(rates: Rates) -> Table:
    table = Table("writers, each to its session", "appends/s", "with pg_notify", "ratio")
    for count, kinds in rates.items():
        medians = [f"{statistics.median(kinds[kind]):,.0f}" for kind in KINDS]
        table.add_row(str(count), *medians, f"{ratio(kinds):.2f}")
    return table


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=1, show_default=True, type=click.IntRange(1), help="Of a run.")
def main(rounds: int, seconds: int) -> None:
    """Appends per second with notify=True and without it, on a PostgreSQL that flushes to disk."""
    console = Console(highlight=False)
    pgbench = find_pgbench()
    if pgbench is None:
        raise click.ClickException("pgbench not found: it comes with PostgreSQL")
    try:
        with (
            open_place("postgresql", Path(tempfile.gettempdir())) as place,
            place.database("notify") as url,
        ):
            version = place.settings["server_version"]
            console.print(f"PostgreSQL {version}, fsync={place.settings['fsync']}")
            console.print(table_of(measure(pgbench, url, WRITERS, rounds, seconds)))
    except (ServerNotFound, Unfit) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
