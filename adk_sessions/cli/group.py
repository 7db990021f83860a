"""The group of commands, and what each of them has: a database, one-line errors, an exit status."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from io import TextIOWrapper
from typing import Any

import click

from .. import errors, migrate
from ..service import SessionService
from .printing import clean

# What is said when a user ends a command: 128 and the number of the signal.
_INTERRUPTED = 130

place = (
    click.option(
        "--url",
        envvar="ADK_SESSIONS_URL",
        required=True,
        show_envvar=True,
        help="The database, as people paste it. A direct connection, not one"
        " through a pooler in transaction mode.",
    ),
    click.option("--schema", help="The database schema of the tables."),
    click.option("--table-prefix", default="", help="What the tables' names begin with."),
)
lock_timeout = click.option(
    "--lock-timeout",
    type=click.FloatRange(min=0),
    default=migrate.LOCK_TIMEOUT,
    show_default=True,
    help="Seconds to wait for another process that migrates.",
)
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
yes = click.option("--yes", is_flag=True, help="Do it without asking.")
app = click.option("--app", "app_name", help="Of one application only.")
user = click.option("--user", "user_id", help="Of one user of the application only.")


def pairs(*names: str, help: str) -> Callable[[Any], Any]:
    """An option that takes labels as NAME=VALUE, any number of times."""

    def split(ctx: click.Context, option: click.Parameter, given: Iterable[str]) -> dict[str, str]:
        found = {}
        for text in given:
            name, equals, value = text.partition("=")
            if not equals or not name:
                raise click.BadParameter(f"{text!r} is not NAME=VALUE.", ctx, option)
            found[name] = value
        return found

    return click.option(*names, multiple=True, metavar="NAME=VALUE", callback=split, help=help)


#: which session: what a command cannot do without is an argument, what narrows it an option
session = (
    click.argument("app_name", metavar="APP"),
    click.argument("user_id", metavar="USER"),
    click.argument("session_id", metavar="SESSION"),
)


# The commands by what they are for, in the order of the help; those that import what other software
# has stored are not listed, and go with what moves.
_SECTIONS = {
    "Sessions": ("list", "show", "tail", "stats", "archive", "restore", "label", "fork"),
    "Looking after": ("prune", "erase", "doctor"),
    "Moving": ("export", "import", "copy"),
    "Schema": ("upgrade", "current", "check", "stamp", "sql", "finish-conversion"),
}


class _Sections(click.Group):
    """A group whose help has its commands by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        longest = max(map(len, self.commands))
        listed = {name for names in _SECTIONS.values() for name in names}
        others = sorted(self.commands.keys() - listed)
        for title, given in _SECTIONS.items():
            names = [*given, *(others if title == "Moving" else ())]
            rows = [
                (
                    name.ljust(longest),
                    self.commands[name].get_short_help_str(formatter.width - longest - 6),
                )
                for name in names
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(cls=_Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="adk-sessions")
def main() -> None:
    """Shows, looks after and moves stored sessions, and makes, adopts and checks their tables.

    An id may be any text; one that begins with a dash goes after "--". With --json a command prints
    JSON, one object per line, and nothing else on standard output; its times are seconds since the
    epoch. Looking never makes or changes a table: upgrade does.

    Exit status: 0 done, 1 what was asked for is not so or failed, 2 wrong usage, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an old locale must not end a command half-way
            stream.reconfigure(errors="backslashreplace")


def command(*options: Callable[[Any], Any], name: str | None = None) -> Callable[[Any], Any]:
    """A command of `main` with options, whose typed errors are one line and exit status 1.

    It is called as the function is, unless it has a name.
    """

    def register(function: Callable[..., Coroutine[Any, Any, None] | None]) -> Any:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            try:
                result = function(**arguments)
                if result is not None:
                    asyncio.run(result)
            except errors.SessionStoreError as error:
                message = clean(str(error))
            except BrokenPipeError:
                raise  # whoever reads has read enough: click ends quietly
            except OSError as error:
                message = clean(f"{error.strerror or error}: {error.filename or 'a file'}")
            except KeyboardInterrupt:
                raise click.exceptions.Exit(_INTERRUPTED) from None
            else:
                return
            # out of the except clause: the driver's error is in nobody's chain
            raise click.ClickException(message)

        for option in reversed(options):
            run = option(run)
        return main.command(name)(run)

    return register


@asynccontextmanager
async def opened(
    *, url: str, schema: str | None = None, table_prefix: str = ""
) -> AsyncIterator[SessionService]:
    """A service on tables that are there: a command that looks makes none, and no file.

    It reads events of any framework: its own type takes every JSON object, and loses nothing.
    """
    async with SessionService(
        url,
        schema=schema,
        table_prefix=table_prefix,
        migrate="check",
        on_bad_event="placeholder",
    ) as service:
        await service.prepare_tables()
        yield service


def unknown(session_id: str) -> errors.SessionNotFoundError:
    return errors.SessionNotFoundError(f"Session {session_id!r} not found.")
