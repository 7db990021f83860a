"""The command ``adk-sessions`` in a process of its own, without the start of Python.

That is two thirds of what such a process costs. Here it is forked by a server, which has imported
the command and done nothing else: it has its own files, environment and exit status all the same.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from multiprocessing import get_context, reduction
from multiprocessing.context import ForkServerProcess
from typing import Any

_context = get_context("forkserver")
_context.set_forkserver_preload(["adk_sessions.cli"])


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
    from adk_sessions.cli import main

    main(arguments, prog_name="adk-sessions")
