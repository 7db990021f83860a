"""Peak memory of one long read, each in a process of its own.

The peak of a process's own memory is VmHWM on Linux, set back before the read. ru_maxrss, which is
taken elsewhere, begins on Linux with the peak of the process that started this one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

from . import conversation
from .places import Place
from .scenarios import STATE, USER
from .stores import ALL, Store

EVENTS = 10_000
REPEATS = 2
_STATUS = Path("/proc/self/status")
_MEGABYTE = 1024 * 1024


def peak() -> int:
    """Bytes that this process held at the most, since `forget` where it works."""
    if _STATUS.exists():
        (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def forget() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


async def measure_memory(
    place: Place, kinds: list[type[Store]], *, short: bool
) -> dict[str, float]:
    """By store: megabytes that reading a long session adds to the peak; the least of a few."""
    count, repeats = (80, 1) if short else (EVENTS, REPEATS)
    peaks = {}
    for kind in kinds:
        if kind.only is not None and "get_10000" not in kind.only:
            continue
        async with place.store(kind) as store:
            app = f"memory-{uuid.uuid4().hex[:8]}"
            ids = [
                (await store.service.create_session(app_name=app, user_id=USER, state=STATE)).id
                for _ in range(2)
            ]
            events = conversation.history(count)
            await store.seeder.events(app, USER, ids[1], events)
            await store.seeder.settle()
            arguments = [kind.name, store._url, app, *ids, str(count)]
            found = [await asyncio.to_thread(_child, arguments) for _ in range(repeats)]
            peaks[kind.name] = min(found) / _MEGABYTE
    return peaks


def _child(arguments: list[str]) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"reading in a process of its own failed: {done.stderr[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


async def read(kind: type[Store], url: str, app: str, small: str, large: str, count: int) -> int:
    store = kind(url, url)
    await store.open()
    try:
        # imports, connections and statements are there before the peak is looked at
        await store.service.get_session(app_name=app, user_id=USER, session_id=small)
        gc.collect()
        forget()
        before = peak()
        found = await store.service.get_session(app_name=app, user_id=USER, session_id=large)
        after = peak()
    finally:
        await store.close()
    if found is None or len(found.events) != count:
        raise RuntimeError("not all events were read")
    return after - before


if __name__ == "__main__":
    name, url, app, small, large, count = sys.argv[1:]
    (kind,) = [kind for kind in ALL if kind.name == name]
    print(json.dumps(asyncio.run(read(kind, url, app, small, large, int(count)))))
