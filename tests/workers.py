"""Writers that run at once, and the judge of what they leave behind.

    with Crew(6) as crew:                                    # processes, each with its own service
        crew.open(url)
        replies = crew.run("fill", [{"writer": "a", ...}, {"writer": "b", ...}])

A writer keeps a record of every acknowledged call and of every read; `faults` compares them with
what is stored at the end. Tasks of a test call the same writers as the processes do.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoReply
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adk_sessions import (
    AlreadyExistsError,
    Event,
    EventActions,
    Session,
    SessionService,
    StaleSessionError,
)

PATIENCE = 60.0  # seconds that a process may take for one job

Clock = Callable[[], float]

# The kind of database, and the service's options.
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sqlite": ("sqlite", {}),
    "sqlite-memory": ("sqlite-memory", {}),
    "postgresql": ("postgresql", {}),
    "mariadb": ("mariadb", {}),
    "generic": ("postgresql", {"backend": "generic"}),
}
# The fixtures of databases that a test need not have for itself.
SHARED = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}


# --- the record, and the judge -----------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One acknowledged create (without an event) or append. Times are of the machine's clock."""

    user: str
    session: str
    event: str | None
    delta: dict[str, Any]
    began: float
    ended: float


@dataclass(frozen=True)
class Read:
    """What one read of a session returned."""

    user: str
    session: str
    events: list[str]
    state: dict[str, Any]
    began: float


@dataclass
class Record:
    """What one writer, or all of them, did and saw."""

    calls: list[Call] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)

    @classmethod
    def of(cls, replies: Iterable[Record | dict[str, Any]]) -> Record:
        """All of them as one; those of processes come as JSON."""
        whole = cls()
        for reply in replies:
            if isinstance(reply, Record):
                whole.calls += reply.calls
                whole.reads += reply.reads
            else:
                whole.calls += [Call(**call) for call in reply["calls"]]
                whole.reads += [Read(**read) for read in reply["reads"]]
        return whole


def faults(record: Record, final: Iterable[Read]) -> list[str]:
    """Everything in which storage does not match the record; no two calls may set the same key.

    Args:
        record: every call that was acknowledged, and no other may have left anything.
        final: every session, read when all writers had ended.
    """
    stored = {read.session: read for read in final}
    found = [f"{call.session} is lost" for call in record.calls if call.session not in stored]
    for read in stored.values():
        calls = [call for call in record.calls if call.session == read.session]
        found += _faults_of_events(calls, read)
        found += _faults_of_state(record.calls, read)
        for earlier in record.reads:
            if earlier.session == read.session:
                found += _faults_of_read(calls, earlier, read)
    return found


def _faults_of_events(calls: list[Call], final: Read) -> list[str]:
    acknowledged = {call.event: call for call in calls if call.event is not None}
    times = Counter(final.events)
    found = [f"event {event} is lost" for event in acknowledged if event not in times]
    found += [f"event {event} is there {n} times" for event, n in times.items() if n > 1]
    found += [f"event {event} is nobody's" for event in times if event not in acknowledged]
    latest: Call | None = None
    for event in final.events:
        call = acknowledged.get(event)
        if call is None:
            continue
        if latest is not None and call.ended < latest.began:
            found.append(f"event {event} comes after {latest.event}, which began after its end")
        if latest is None or call.began > latest.began:
            latest = call
    return found


def _faults_of_state(calls: list[Call], final: Read) -> list[str]:
    expected: dict[str, Any] = {}
    for call in calls:
        for key, value in call.delta.items():
            shared = key.startswith("app:") or (key.startswith("user:") and call.user == final.user)
            own = ":" not in key and call.session == final.session
            if shared or own:
                expected[key] = value
    state = final.state
    where = f"the state of {final.session}"
    found = [f"{key} is lost from {where}" for key in expected if key not in state]
    found += [f"{key} is nobody's in {where}" for key in state if key not in expected]
    found += [
        f"{key} is {state[key]!r} and not {value!r} in {where}"
        for key, value in expected.items()
        if key in state and state[key] != value
    ]
    return found


def _faults_of_read(calls: list[Call], read: Read, final: Read) -> list[str]:
    found = []
    if final.events[: len(read.events)] != read.events:
        found.append(f"a read of {read.session} is no prefix: {read.events}")
    for call in calls:
        if call.event is None:
            continue
        if call.event not in read.events:
            if call.ended < read.began:
                found.append(f"a read of {read.session} misses {call.event}")
            held = [key for key in call.delta if key in read.state]
        else:
            held = [key for key in call.delta if key not in read.state]
        if held:
            found.append(f"in a read of {read.session} {call.event} and {held} do not match")
    return found


# --- the writers -------------------------------------------------------------------------------


def event(id: str, delta: dict[str, Any], *, timestamp: float | None = None) -> Event:
    actions = EventActions(state_delta=dict(delta))
    if timestamp is None:
        timestamp = time.time()
    return Event(id=id, author="writer", invocation_id="1", timestamp=timestamp, actions=actions)


def clock(offset: float, frozen: float | None = None) -> Clock:
    """A clock that is so many seconds ahead, or stands still."""
    return lambda: (time.time() if frozen is None else frozen) + offset


def in_each_scope(name: str) -> dict[str, Any]:
    return {prefix + name: name for prefix in ("app:", "user:", "")}


async def fill(
    service: SessionService, *, app: str, user: str, writer: str, appends: int
) -> Record:
    """Create a session and append to it, each time with a new key in each scope."""
    record = Record()
    delta = in_each_scope(writer)
    began = time.monotonic()
    session = await service.create_session(app_name=app, user_id=user, state=delta)
    record.calls.append(Call(user, session.id, None, delta, began, time.monotonic()))
    for n in range(appends):
        name = f"{writer}-{n}"
        delta = in_each_scope(name)
        began = time.monotonic()
        await service.append_event(session, event(name, delta))
        record.calls.append(Call(user, session.id, name, delta, began, time.monotonic()))
    return record


async def share(
    service: SessionService,
    *,
    app: str,
    user: str,
    writer: str,
    sessions: list[str],
    appends: int,
    now: Clock = time.time,
) -> Record:
    """Append to sessions that others append to as well; reload and repeat when one is stale."""
    record = Record()
    held: dict[str, Session] = {}
    choose = random.Random(writer)
    for n in range(appends):
        id = choose.choice(sessions)
        name = f"{writer}-{n}"
        delta = in_each_scope(name) if n % 2 else {name: name}
        while True:
            if id not in held:
                began = time.monotonic()
                held[id] = await load(service, app, user, id)
                record.reads.append(seen(held[id], began))
            began = time.monotonic()
            try:
                await service.append_event(held[id], event(name, delta, timestamp=now()))
            except StaleSessionError:
                del held[id]
            else:
                record.calls.append(Call(user, id, name, delta, began, time.monotonic()))
                break
    return record


async def load(service: SessionService, app: str, user: str, id: str) -> Session:
    session = await service.get_session(app_name=app, user_id=user, session_id=id)
    assert session is not None
    return session


def seen(session: Session, began: float = 0.0) -> Read:
    ids = [event.id for event in session.events]
    return Read(session.user_id, session.id, ids, dict(session.state), began)


async def read_all(service: SessionService, app: str) -> list[Read]:
    """Every session of an app, as it is stored."""
    listed = await service.list_sessions(app_name=app)
    return [seen(await load(service, app, one.user_id, one.id)) for one in listed.sessions]


# --- a process ---------------------------------------------------------------------------------


class Worker:
    """One process's service; each method is a job."""

    service: SessionService
    held: dict[str, Session]

    async def open(self, url: str, **options: Any) -> None:
        self.service = SessionService(url, **options)

    async def close(self) -> None:
        await self.service.close()

    async def fill(self, **arguments: Any) -> dict[str, Any]:
        return asdict(await fill(self.service, **arguments))

    async def share(
        self, offset: float, frozen: float | None = None, **arguments: Any
    ) -> dict[str, Any]:
        return asdict(await share(self.service, **arguments, now=clock(offset, frozen)))

    async def create(self, app: str, user: str, ids: list[str], value: str) -> list[str]:
        """Create sessions; the ids of those that were not there yet."""
        won = []
        for id in ids:
            try:
                await self.service.create_session(
                    app_name=app, user_id=user, session_id=id, state={"by": value}
                )
            except AlreadyExistsError:
                continue
            won.append(id)
        return won

    async def hold(self, app: str, user: str, ids: list[str]) -> None:
        self.held = {id: await load(self.service, app, user, id) for id in ids}

    async def append(self, id: str, name: str, offset: float) -> bool:
        """Append to a session that is held; whether it was not stale."""
        session = self.held[id]
        before = session.model_dump()
        one = event(name, {name: name}, timestamp=time.time() + offset)
        try:
            await self.service.append_event(session, one)
        except StaleSessionError:
            assert session.model_dump() == before
            return False
        return True

    async def count(self, app: str, user: str, id: str, most: int, stop: str) -> int:
        """Keep three counters equal to the number of events until ``stop`` exists.

        At ``most`` events the session is deleted and made anew.
        """
        counters = ("n", "user:n", "app:n")
        appended = 0
        while not Path(stop).exists():
            session = await self.service.create_session(
                app_name=app, user_id=user, session_id=id, state=dict.fromkeys(counters, 0)
            )
            for n in range(1, most + 1):
                await self.service.append_event(session, event(f"e{n}", dict.fromkeys(counters, n)))
            appended += most
            await self.service.delete_session(app, user, id)
        return appended

    async def watch(self, app: str, user: str, id: str, reads: int, stop: str) -> dict[str, Any]:
        """Read what `count` writes; the reads that were torn, and how many moments were seen."""
        torn: list[Any] = []
        moments = 0
        last: Any = None
        try:
            while reads:
                session = await self.service.get_session(app_name=app, user_id=user, session_id=id)
                if session is None:
                    continue
                reads -= 1
                numbers = [session.state.get(key) for key in ("n", "user:n", "app:n")]
                if numbers != [len(session.events)] * 3:
                    torn.append([numbers, len(session.events)])
                moments += session.last_update_time != last
                last = session.last_update_time
        finally:
            Path(stop).touch()
        return {"torn": torn, "moments": moments}


async def work() -> None:
    """Do the jobs that come as lines of JSON; one line answers each."""
    worker = Worker()
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = json.loads(line)
        try:
            reply = {"result": await getattr(worker, job["do"])(**job["with"])}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


class Crew:
    """Processes that work at once. They are started once: what races is their services."""

    def __init__(self, size: int) -> None:
        command = [sys.executable, "-W", "error", __file__]
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            for _ in range(size)
        ]
        self._readers = ThreadPoolExecutor(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            try:
                process.communicate(timeout=10)  # the end of its input is the end of its work
            except (subprocess.TimeoutExpired, ValueError):
                process.kill()
                process.wait()
        self._readers.shutdown()

    def run(self, job: str, arguments: list[dict[str, Any]]) -> list[Any]:
        """One job for each of so many processes, all at once; what they return."""
        return self.run_all([(job, one) for one in arguments])

    def run_all(self, jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
        working = self._processes[: len(jobs)]
        lines = [json.dumps({"do": job, "with": arguments}) + "\n" for job, arguments in jobs]
        for process, line in zip(working, lines, strict=True):
            assert process.stdin
            process.stdin.write(line)
        replies = [self._readers.submit(process.stdout.readline) for process in working]  # type: ignore[union-attr]
        deadline = time.monotonic() + PATIENCE
        try:
            lines = [reply.result(max(deadline - time.monotonic(), 0)) for reply in replies]
        except NoReply:
            self._kill()
            raise AssertionError(f"no reply in {PATIENCE:g} seconds: {jobs}") from None
        decoded = [json.loads(line or '{"error": "the process has ended"}') for line in lines]
        errors = [reply["error"] for reply in decoded if "error" in reply]
        assert not errors, "\n".join(errors)
        return [reply["result"] for reply in decoded]

    def open(self, url: str, **options: Any) -> None:
        """A new service in every process; it connects with its first call."""
        self.run("open", [{"url": url, **options}] * len(self._processes))

    def close(self) -> None:
        self.run("close", [{}] * len(self._processes))

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


if __name__ == "__main__":
    asyncio.run(work())
