"""Writers that run at once, and the judge of what they leave behind.

    with Crew(6) as crew:                                    # processes, each with its own service
        crew.open(url)
        replies = crew.run("fill", [{"writer": "a", ...}, {"writer": "b", ...}])

A writer keeps a record of every acknowledged call and of every read; `faults` compares them with
what is stored at the end. Tasks of a test call the same writers as the processes do.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoReply
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import forked

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
    """A create (without an event) or an append. Times are of the machine's clock.

    One of which nobody knows whether it is stored may still come to be: it ends at infinity.
    """

    user: str
    session: str
    event: str | None
    delta: dict[str, Any]
    began: float
    ended: float


@dataclass(frozen=True)
class Count:
    """An addition of 1 to a counter.

    Attributes:
        key: with its scope's prefix; the user and the session are its place where that counts.
        value: what it came to; None if nobody knows whether it is stored.
    """

    user: str
    session: str
    key: str
    value: int | None
    began: float
    ended: float


@dataclass(frozen=True)
class Read:
    """What one read of a session returned.

    Attributes:
        fresh: whether storage was asked for everything. The session that an append has left in
            its caller's hands is not: what others do to wider state is not known to it.
    """

    user: str
    session: str
    events: list[str]
    state: dict[str, Any]
    began: float
    ended: float = math.inf
    fresh: bool = True


@dataclass
class Record:
    """What one writer, or all of them, did and saw.

    Attributes:
        calls: those that were acknowledged.
        unknown: those that may or may not be stored.
        failed: those that were refused, and must not be stored.
        counts: additions, those of unknown outcome among them.
    """

    calls: list[Call] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    unknown: list[Call] = field(default_factory=list)
    failed: list[Call] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    @classmethod
    def of(cls, replies: Iterable[Record | dict[str, Any]]) -> Record:
        """All of them as one; those of processes come as JSON."""
        whole = cls()
        for reply in replies:
            done = asdict(reply) if isinstance(reply, Record) else reply
            whole.calls += [Call(**call) for call in done["calls"]]
            whole.unknown += [Call(**call) for call in done["unknown"]]
            whole.failed += [Call(**call) for call in done["failed"]]
            whole.counts += [Count(**count) for count in done["counts"]]
            whole.reads += [Read(**read) for read in done["reads"]]
        return whole


def faults(record: Record, final: Iterable[Read]) -> list[str]:
    """Everything in which storage does not match the record; no two calls may set the same key.

    Args:
        record: every call that may have left anything.
        final: every session, read when all writers had ended.
    """
    stored = {read.session: read for read in final}
    found = [f"{call.session} is lost" for call in record.calls if call.session not in stored]
    found += _faults_of_answers(record.counts)
    # what is unknown counts as done where its event is there, with all that belongs to it
    done = record.calls + [call for call in record.unknown if _is_there(call, stored)]
    for read in stored.values():
        calls = [call for call in done if call.session == read.session]
        refused = {call.event for call in record.failed if call.session == read.session}
        found += _faults_of_events(calls, refused, read)
        found += _faults_of_state(done, {count.key for count in record.counts}, read)
        found += _faults_of_counters(record.counts, read, final=True)
        for earlier in record.reads:
            if earlier.session == read.session:
                found += _faults_of_read(calls, earlier, read)
                if earlier.fresh:
                    found += _faults_of_wider_state(done, earlier)
                    found += _faults_of_counters(record.counts, earlier)
    return found


def _is_there(call: Call, stored: dict[str, Read]) -> bool:
    read = stored.get(call.session)
    return read is not None and (call.event is None or call.event in read.events)


def _reaches(key: str, one: Call | Count, read: Read) -> bool:
    """Whether a key that was set or counted by ``one`` is in what was read."""
    if key.startswith("app:"):
        return True
    return one.user == read.user and (key.startswith("user:") or one.session == read.session)


def _faults_of_events(calls: list[Call], refused: set[str | None], final: Read) -> list[str]:
    acknowledged = {call.event: call for call in calls if call.event is not None}
    times = Counter(final.events)
    found = [f"event {event} is lost" for event in acknowledged if event not in times]
    found += [f"event {event} is there {n} times" for event, n in times.items() if n > 1]
    found += [f"event {event} was refused and is there" for event in times if event in refused]
    found += [
        f"event {event} is nobody's"
        for event in times
        if event not in acknowledged and event not in refused
    ]
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


def _faults_of_state(calls: list[Call], counters: set[str], final: Read) -> list[str]:
    expected: dict[str, Any] = {}
    for call in calls:
        for key, value in call.delta.items():
            if _reaches(key, call, final):
                expected[key] = value
    state = final.state
    where = f"the state of {final.session}"
    found = [f"{key} is lost from {where}" for key in expected if key not in state]
    found += [
        f"{key} is nobody's in {where}"
        for key in state
        if key not in expected and key not in counters
    ]
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
    events = set(read.events)
    for call in calls:
        if call.event is None:
            continue
        if call.event not in events:
            if call.ended < read.began:
                found.append(f"a read of {read.session} misses {call.event}")
            held = [key for key in call.delta if key in read.state]
        else:
            held = [key for key in call.delta if key not in read.state]
        if held:
            found.append(f"in a read of {read.session} {call.event} and {held} do not match")
    return found


def _faults_of_wider_state(calls: list[Call], read: Read) -> list[str]:
    """What a read has of other sessions' calls: all that reaches it, or nothing yet."""
    found = []
    for call in calls:
        if call.session == read.session:
            continue
        keys = [key for key in call.delta if _reaches(key, call, read)]
        missing = [key for key in keys if key not in read.state]
        if missing and (call.ended < read.began or len(missing) < len(keys)):
            found.append(f"a read of {read.session} misses {missing}")
    return found


def _faults_of_counters(counts: list[Count], read: Read, *, final: bool = False) -> list[str]:
    """Counters that miss an acknowledged addition, or hold more than there can have been."""
    found = []
    for key in sorted({count.key for count in counts}):
        own = [count for count in counts if count.key == key and _reaches(key, count, read)]
        least = sum(one.value is not None and (final or one.ended < read.began) for one in own)
        most = sum(final or one.began < read.ended for one in own)
        value = read.state.get(key, 0)
        if type(value) is not int or not least <= value <= most:
            what = f"the state of {read.session}" if final else f"a read of {read.session}"
            found.append(f"{key} is {value!r} and not {least} to {most} in {what}")
    return found


def _faults_of_answers(counts: list[Count]) -> list[str]:
    """Additions that came to a value which another came to, or which there cannot have been yet."""
    places: dict[tuple[str, ...], list[Count]] = {}
    for one in counts:
        place = {"app:": (), "user:": (one.user,)}.get(
            one.key.partition(":")[0] + ":", (one.user, one.session)
        )
        places.setdefault((one.key, *place), []).append(one)
    found = []
    for own in places.values():
        key, known = own[0].key, [one for one in own if one.value is not None]
        values = Counter(one.value for one in known)
        found += [f"{n} additions to {key} came to {v!r}" for v, n in values.items() if n > 1]
        for one in known:
            least = 1 + sum(before.ended < one.began for before in known)
            most = sum(before.began < one.ended for before in own)
            if type(one.value) is not int or not least <= one.value <= most:
                found.append(f"an addition to {key} came to {one.value!r}, not {least} to {most}")
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


def numbers(appends: int, stop: str | None) -> Iterator[int]:
    """So many numbers, and with ``stop`` more of them until there is a file of that name."""
    for n in itertools.count():
        if n >= appends and (stop is None or Path(stop).exists()):
            return
        yield n


async def fill(
    service: SessionService,
    *,
    app: str,
    user: str,
    writer: str,
    appends: int,
    stop: str | None = None,
) -> Record:
    """Create a session and append to it, each time with a new key in each scope."""
    record = Record()
    delta = in_each_scope(writer)
    began = time.monotonic()
    session = await service.create_session(app_name=app, user_id=user, state=delta)
    record.calls.append(Call(user, session.id, None, delta, began, time.monotonic()))
    for n in numbers(appends, stop):
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
    stop: str | None = None,
) -> Record:
    """Append to sessions that others append to as well; reload and repeat when one is stale."""
    record = Record()
    held: dict[str, Session] = {}
    choose = random.Random(writer)
    for n in numbers(appends, stop):
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


def seen(
    session: Session, began: float = 0.0, ended: float = math.inf, *, fresh: bool = True
) -> Read:
    ids = [event.id for event in session.events]
    return Read(session.user_id, session.id, ids, dict(session.state), began, ended, fresh)


async def read_all(service: SessionService, app: str) -> list[Read]:
    """Every session of an app, as it is stored."""
    listed = await service.list_sessions(app_name=app)
    return [seen(await load(service, app, one.user_id, one.id)) for one in listed.sessions]


def errors_of(service: SessionService) -> list[str]:
    """The drivers' errors, by the names of their classes, that the service will meet."""
    met: list[str] = []
    run = service._database.run

    async def watched(*args: Any, **options: Any) -> Any:
        try:
            return await run(*args, **options)
        except Exception as error:
            original = getattr(error, "orig", None)
            met.append(type(getattr(original, "__cause__", None) or original or error).__name__)
            raise

    service._database.run = watched  # type: ignore[method-assign]
    return met


# --- a process ---------------------------------------------------------------------------------


class Worker:
    """One process's service; each method is a job."""

    service: SessionService
    held: dict[str, Session]
    met: list[str]

    async def open(self, url: str, **options: Any) -> None:
        self.service = SessionService(url, **options)
        self.met = errors_of(self.service)

    async def close(self) -> None:
        await self.service.close()

    async def fill(self, **arguments: Any) -> dict[str, Any]:
        return asdict(await fill(self.service, **arguments))

    async def share(
        self, offset: float = 0.0, frozen: float | None = None, **arguments: Any
    ) -> dict[str, Any]:
        return asdict(await share(self.service, **arguments, now=clock(offset, frozen)))

    async def together(self, jobs: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """Several jobs that keep records, at once; and the driver's errors that were met."""
        records = await asyncio.gather(*(getattr(self, do)(**args) for do, args in jobs))
        return {"records": records, "met": self.met}

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

    async def watch(
        self, app: str, user: str, id: str, reads: int, least: int, stop: str
    ) -> dict[str, Any]:
        """Read what `count` writes; the reads that were torn, and how many moments were seen.

        It reads so many times, and then on until it has seen at least so many moments.
        """
        torn: list[Any] = []
        moments = 0
        last: Any = None
        try:
            while reads > 0 or moments < least:
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


async def work(worker: Worker) -> None:
    """Do the jobs that come as lines of JSON; one line answers each."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = json.loads(line)
        try:
            reply = {"result": await getattr(worker, job["do"])(**job["with"])}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


class Crew:
    """Processes that work at once. They are started once: what races is their services.

    Args:
        size: how many.
        script: a module that calls `work` with a worker of its own, for more jobs than `Worker`
            does.
    """

    def __init__(self, size: int, *, script: str = __file__) -> None:
        self._processes = [forked.Python(script) for _ in range(size)]
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
            process.end(10)
        self._readers.shutdown()

    def run(self, job: str, arguments: list[dict[str, Any]]) -> list[Any]:
        """One job for each of so many processes, all at once; what they return."""
        return self.run_all([(job, one) for one in arguments])

    def run_all(
        self, jobs: list[tuple[str, dict[str, Any]]], *, patience: float = PATIENCE
    ) -> list[Any]:
        working = self._processes[: len(jobs)]
        lines = [json.dumps({"do": job, "with": arguments}) + "\n" for job, arguments in jobs]
        for process, line in zip(working, lines, strict=True):
            process.stdin.write(line)
        replies = [self._readers.submit(process.stdout.readline) for process in working]
        deadline = time.monotonic() + patience
        try:
            lines = [reply.result(max(deadline - time.monotonic(), 0)) for reply in replies]
        except NoReply:
            self._kill()
            raise AssertionError(f"no reply in {patience:g} seconds: {jobs}") from None
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
    asyncio.run(work(Worker()))
