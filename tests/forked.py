"""The command ``adk-sessions``, and other Python, in a process of its own without Python's start.

That is two thirds of what such a process costs. Here it is forked by a server, which has imported
the command and the drivers and done nothing else: it has its own files, environment and exit
status all the same. What is tested by what it imports is started as ever.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from multiprocessing import get_context, reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import Any

_context = get_context("forkserver")
_context.set_forkserver_preload(
    [
        "adk_sessions.cli",
        "adk_sessions.dialects",
        "sqlalchemy.dialects.sqlite",
        "sqlalchemy.dialects.postgresql.asyncpg",
        "sqlalchemy.dialects.mysql.asyncmy",
        "aiosqlite",
        "asyncpg",
        "asyncmy",
    ]
)


class _File:
    """A file's descriptor, which is another one in the other process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (reduction.DupFd(self.number),)


def _received(sent: Any) -> _File:
    return _File(sent.detach())


def start(
    arguments: tuple[str, ...], environment: dict[str, str], files: tuple[int, int, int]
) -> ForkServerProcess:
    """Begins a command whose standard input, output and errors are these files."""
    process = _context.Process(
        target=_main, args=(arguments, environment, [_File(number) for number in files])
    )
    process.start()
    return process


def ended(process: ForkServerProcess, patience: float) -> int:
    """The exit status; what does not end in time is killed, and has none."""
    process.join(patience)
    status = process.exitcode
    process.kill()
    process.join()
    process.close()
    assert status is not None, f"it goes on after {patience} seconds"
    return status


def _main(arguments: tuple[str, ...], environment: dict[str, str], files: list[_File]) -> None:
    _become(environment, files)
    from adk_sessions.cli import main

    main(arguments, prog_name="adk-sessions")


def _become(environment: dict[str, str], files: list[_File]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    warnings.simplefilter("error")
    for number, file in enumerate(files):
        os.dup2(file.number, number)
        os.close(file.number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115


# --- any Python -------------------------------------------------------------------------------


class Python:
    """``python`` with a file, ``-c`` and code, or ``-m`` and a module; a warning is an error.

    It is used like a `subprocess.Popen` with pipes to its input and from its output, as text.
    """

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        given, self._input = os.pipe()
        self._output, printed = os.pipe()
        try:
            self._process = _begin(arguments, environment, os.getcwd(), (given, printed, 2))
        finally:
            os.close(given)
            os.close(printed)
        self.stdin = open(self._input, "w", 1, encoding="utf-8")  # noqa: SIM115
        self.stdout = open(self._output, encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Python:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(60)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def end(self, patience: float) -> None:
        """Ends its input, which is the end of its work; what goes on after that is killed."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join()
        self.stdout.close()


def run(
    *arguments: str,
    environment: dict[str, str] | None = None,
    folder: str | Path = ".",
    input: bytes = b"",
    patience: float = 150,
) -> subprocess.CompletedProcess[str]:
    """`Python` to its end: what it has printed, and its exit status."""
    with TemporaryFile() as given, TemporaryFile() as output, TemporaryFile() as complaints:
        given.write(input)
        given.seek(0)
        files = (given.fileno(), output.fileno(), complaints.fileno())
        status = ended(_begin(arguments, environment, folder, files), patience)
        for file in (output, complaints):
            file.seek(0)
        return subprocess.CompletedProcess(
            arguments, status, output.read().decode(), complaints.read().decode()
        )


def _begin(
    arguments: tuple[str, ...],
    environment: dict[str, str] | None,
    folder: str | Path,
    files: tuple[int, int, int],
) -> ForkServerProcess:
    where = str(Path(folder).resolve())
    given = (arguments, dict(environment or os.environ), where, [_File(number) for number in files])
    process = _context.Process(target=_python, args=given)
    process.start()
    return process


def _python(
    arguments: tuple[str, ...], environment: dict[str, str], folder: str, files: list[_File]
) -> None:
    _become(environment, files)
    os.chdir(folder)
    what, *more = arguments
    if what == "-c":
        code, *more = more
        sys.argv = ["-c", *more]
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(module))
    elif what == "-m":
        name, *more = more
        sys.argv = [name, *more]
        sys.path.insert(0, folder)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *more]
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")
