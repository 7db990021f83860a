"""What is measured: each scenario as a case per store, and what must be true afterwards.

A case's `call` is the only part that is timed. `before` makes what the call takes (a caller has its
events already), `after` and `check` see to it that what was measured did happen: the number of
events, their ids in order, the state.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from typing import Any, ClassVar

from google.adk.events.event import Event
from google.adk.sessions.base_session_service import GetSessionConfig
from google.adk.sessions.session import Session

from . import conversation
from .stores import Store

TASKS = 16
USER = "ann"
STATE: dict[str, Any] = {
    "app:currency": "EUR",
    "user:name": "Ann",
    "user:home": "Bergen",
    "city": "Lisbon",
    "days": 3,
    "plan": {"hotel": "at the river", "budget": 400.5, "done": False},
}


class WrongResult(Exception):
    """A store did something else than what was measured."""


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise WrongResult(f"{what}: {str(found)[:200]} instead of {str(wanted)[:200]}")


class Case:
    """One scenario on one store.

    Args:
        store: the store.
        calls: how many calls there will be at the most, those for warming up among them.
        size: the scenario's size: events, or sessions.
    """

    divisor = 1  # a call's time is divided by it

    def __init__(self, store: Store, calls: int, size: int) -> None:
        self.store, self.calls, self.size = store, calls, size
        self.service = store.service
        self.app = f"{type(self).__name__}-{uuid.uuid4().hex[:8]}"
        self.made = 0

    async def prepare(self) -> None: ...

    async def before(self) -> None: ...

    async def call(self) -> None:
        raise NotImplementedError

    async def after(self) -> None: ...

    async def check(self) -> None: ...

    async def create(self, state: dict[str, Any] | None = None, user: str = USER) -> Session:
        return await self.service.create_session(
            app_name=self.app, user_id=user, state=dict(STATE if state is None else state)
        )

    async def read(
        self, session_id: str, user: str = USER, config: GetSessionConfig | None = None
    ) -> Session:
        found = await self.service.get_session(
            app_name=self.app, user_id=user, session_id=session_id, config=config
        )
        if found is None:
            raise WrongResult(f"session {session_id} is not there")
        return found

    async def expect_events(self, session: Session, ids: list[str]) -> Session:
        found = await self.read(session.id, session.user_id)
        expect("events", [event.id for event in found.events], ids)
        return found


class Create(Case):
    async def prepare(self) -> None:
        self.created: list[str] = []

    async def call(self) -> None:
        self.session = await self.create()

    async def after(self) -> None:
        self.created.append(self.session.id)

    async def check(self) -> None:
        listed = await self.service.list_sessions(app_name=self.app, user_id=USER)
        expect("sessions", {session.id for session in listed.sessions}, set(self.created))
        expect("state", (await self.read(self.created[-1])).state, STATE)


class Append(Case):
    initial: ClassVar[dict[str, Any]] = STATE

    async def prepare(self) -> None:
        self.session = await self.create(self.initial)
        self.ids: list[str] = []
        self.delta: dict[str, Any] = {}

    def _delta(self) -> dict[str, Any]:
        return {}

    async def before(self) -> None:
        self.delta = self._delta()
        self.event = conversation.said(delta=dict(self.delta))

    async def call(self) -> None:
        await self.service.append_event(self.session, self.event)

    async def after(self) -> None:
        self.ids.append(self.event.id)

    async def check(self) -> None:
        found = await self.expect_events(self.session, self.ids)
        expect("state", found.state, self.initial | self.delta)
        expect("the caller's state", self.session.state, found.state)


class AppendDeltas(Append):
    def _delta(self) -> dict[str, Any]:
        n = len(self.ids)
        return {"app:currency": f"EUR {n}", "user:last": n, "plan": {"step": n, "done": False}}


class AppendBigState(Append):
    """The state is 200 KB in the session's own scope; the delta is one small key."""

    initial: ClassVar[dict[str, Any]] = {
        f"page-{n:03}": conversation.prose(conversation.KILOBYTE - 15) for n in range(200)
    }

    def _delta(self) -> dict[str, Any]:
        return {"step": len(self.ids)}


class Concurrent(Case):
    """Tasks side by side, each appending to a session of its own: the time of all, per append."""

    users: ClassVar[list[str]] = [f"user-{n}" for n in range(TASKS)]

    async def prepare(self) -> None:
        self.divisor = TASKS * self.size
        self.sessions = [await self.create(user=user) for user in self.users]
        self.ids: list[list[str]] = [[] for _ in self.users]

    def _event(self, n: int) -> Event:
        return conversation.said()

    async def before(self) -> None:
        self.events = [[self._event(n) for _ in range(self.size)] for n in range(TASKS)]

    async def call(self) -> None:
        async def one(session: Session, events: list[Event]) -> None:
            for event in events:
                await self.service.append_event(session, event)

        await asyncio.gather(*map(one, self.sessions, self.events))

    async def after(self) -> None:
        for ids, events in zip(self.ids, self.events, strict=True):
            ids += [event.id for event in events]

    async def check(self) -> None:
        for session, ids in zip(self.sessions, self.ids, strict=True):
            await self.expect_events(session, ids)


class HotKey(Concurrent):
    """The same, and all of them set one key that all users share."""

    def _event(self, n: int) -> Event:
        return conversation.said(delta={"app:hot": n})

    async def check(self) -> None:
        await super().check()
        hot = (await self.read(self.sessions[0].id, self.users[0])).state.get("app:hot")
        expect("app:hot is one of those written", hot in range(TASKS), True)


class Get(Case):
    recent: int | None = None

    async def prepare(self) -> None:
        self.session = await self.create()
        events = conversation.history(self.size)
        self.ids = [event.id for event in events]
        await self.store.seeder.events(self.app, USER, self.session.id, events)
        await self.store.seeder.settle()
        if self.recent is not None:
            self.ids = self.ids[-self.recent :]

    async def call(self) -> None:
        config = GetSessionConfig(num_recent_events=self.recent) if self.recent else None
        self.found = await self.read(self.session.id, config=config)

    async def after(self) -> None:
        expect("number of events", len(self.found.events), len(self.ids))
        expect("state", self.found.state, STATE)
        del self.found  # what one store has read must not burden the next one's garbage collector

    async def check(self) -> None:
        await self.call()
        found = [event.id for event in self.found.events]
        if not (self.recent and "last_20" in self.store.deviations):
            expect("events", found, self.ids)
        contents = [event.content for event in self.found.events if event.content]
        parts = [part for content in contents for part in content.parts or []]
        expect("parts", len(parts), len(self.ids))
        expect("calls", sum(1 for part in parts if part.function_call), (len(self.ids) + 2) // 4)
        del self.found


class Recent(Get):
    recent = 20


class Listing(Case):
    async def prepare(self) -> None:
        first = await self.create()
        state = {key: value for key, value in STATE.items() if ":" not in key}
        start = first.last_update_time - self.size
        rows = [(USER, f"session-{n:06}", start + n) for n in range(self.size - 1)]
        await self.store.seeder.sessions(self.app, rows, state)
        await self.store.seeder.settle()
        self.ids = {id for _, id, _ in rows} | {first.id}

    async def call(self) -> None:
        listed = await self.service.list_sessions(app_name=self.app, user_id=USER)
        self.found = listed.sessions

    async def after(self) -> None:
        expect("number of sessions", len(self.found), self.size)
        del self.found

    async def check(self) -> None:
        await self.call()
        expect("sessions", {session.id for session in self.found}, self.ids)
        expect("states", all(session.state == STATE for session in self.found), True)
        del self.found


class Turn(Case):
    """What google-adk's Runner asks of a store for one message: a read, then four appends."""

    async def prepare(self) -> None:
        self.sessions = [await self.create() for _ in range(self.calls)]
        self.old: list[list[str]] = []
        for session in self.sessions:
            events = conversation.history(self.size)
            await self.store.seeder.events(self.app, USER, session.id, events)
            self.old.append([event.id for event in events])
        await self.store.seeder.settle()

    async def before(self) -> None:
        delta = {"city": f"Porto {self.made}"}
        self.events = [
            conversation.said(),
            conversation.called(),
            conversation.answered(),
            conversation.said(400, author=conversation.AGENT, delta=delta),
        ]

    async def call(self) -> None:
        session = await self.read(self.sessions[self.made].id)
        for event in self.events:
            await self.service.append_event(session, event)

    async def after(self) -> None:
        n, self.made = self.made, self.made + 1
        ids = self.old[n] + [event.id for event in self.events]
        found = await self.expect_events(self.sessions[n], ids)
        expect("state", found.state, STATE | {"city": f"Porto {n}"})


class Batch(Case):
    """Events of 1 KB, appended at once where the store can, else one by one."""

    async def before(self) -> None:
        self.session = await self.create()
        self.events = conversation.kilobytes(self.size)

    async def call(self) -> None:
        await self.store.append_all(self.session, self.events)

    async def after(self) -> None:
        await self.expect_events(self.session, [event.id for event in self.events])


# Ratios that are aimed at: by store, by what it is compared with, by column.
Targets = dict[str, dict[str, dict[str, float]]]

LOOPBACK, DELAYED, FILE = "postgresql", "postgresql+1ms", "sqlite"


def aims(
    loopback: float,
    delayed: float,
    file: float,
    *,
    peer: float = 1.0,
    lean: dict[str, float] | None = None,
    more: dict[str, dict[str, float]] | None = None,
) -> Targets:
    """Against google-adk's service the three given; no slower than any peer in any case."""
    ours = {
        "adk": {LOOPBACK: loopback, DELAYED: delayed, FILE: file},
        "sqlspec": {LOOPBACK: peer, DELAYED: peer},
        "adk_sqlite": {FILE: 1.0},
        **(more or {}),
    }
    return {"ours": ours} | ({"ours_lean": {"adk": lean}} if lean else {})


NO_SLOWER: Targets = {
    "ours": {
        "adk": {LOOPBACK: 1.0, DELAYED: 1.0, FILE: 1.0},
        "sqlspec": {LOOPBACK: 1.0, DELAYED: 1.0},
        "adk_sqlite": {FILE: 1.0},
    }
}
LONG_READ = aims(2.5, 2.2, 2.4, lean={LOOPBACK: 3.0, FILE: 5.0})


@dataclass(frozen=True)
class Scenario:
    """A row of the report.

    Attributes:
        name: how options and results call it; `title` is for people.
        case: what is done on each store.
        size: the case's size, and in the short form.
        calls: timed calls on each store in each round; `warm` before the first round.
        rounds: at most so many rounds, since a call is long.
        fill: seconds; a store that needs less for its calls of a round makes more of them.
        targets: ratios that are aimed at.
    """

    name: str
    title: str
    case: type[Case]
    size: int = 1
    short: int = 1
    calls: int = 10
    warm: int = 5
    rounds: int = 1_000
    fill: float = 0.0
    targets: Targets = field(default_factory=dict)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("create", "create a session", Create, targets=aims(5, 7, 6, peer=2)),
    Scenario("append", "append an event", Append, targets=aims(6, 8, 8, peer=2)),
    Scenario(
        "append_deltas",
        "append, deltas in three scopes",
        AppendDeltas,
        targets=aims(6, 8, 8, peer=2),
    ),
    Scenario("append_200kb", "append, 200 KB state", AppendBigState, targets=aims(4, 6, 6)),
    Scenario(
        "concurrent_16",
        "16 sessions at once",
        Concurrent,
        size=5,
        short=2,
        calls=1,
        warm=1,
        targets=aims(5, 5, 15),
    ),
    Scenario(
        "hot_key_16",
        "16 writers, one app key",
        HotKey,
        size=5,
        short=2,
        calls=1,
        warm=1,
        targets=NO_SLOWER,
    ),
    Scenario(
        "get_10",
        "get, 10 events",
        Get,
        size=10,
        short=10,
        targets=aims(4.5, 6, 8, peer=2),
    ),
    Scenario(
        "get_1000",
        "get, 1,000 events",
        Get,
        size=1_000,
        short=40,
        calls=2,
        warm=2,
        targets=LONG_READ,
    ),
    Scenario(
        "get_10000",
        "get, 10,000 events",
        Get,
        size=10_000,
        short=80,
        calls=1,
        warm=1,
        rounds=3,
        targets=LONG_READ,
    ),
    Scenario(
        "last_20",
        "the last 20 of 10,000",
        Recent,
        size=10_000,
        short=80,
        targets=aims(4.5, 6, 6),
    ),
    Scenario(
        "list_1000",
        "list 1,000 sessions",
        Listing,
        size=1_000,
        short=20,
        calls=2,
        warm=2,
        targets=aims(4, 4, 4),
    ),
    Scenario(
        "turn",
        "a turn: get 40 events, 4 appends",
        Turn,
        size=40,
        short=8,
        calls=3,
        warm=2,
        targets=aims(3.5, 6, 5),
    ),
    Scenario(
        "batch_500",
        "500 events of 1 KB",
        Batch,
        size=500,
        short=8,
        calls=1,
        warm=0,
        rounds=2,
        fill=0.5,
        targets=aims(1, 1, 1, more={"ours_loop": {LOOPBACK: 10.0, DELAYED: 50.0}}),
    ),
)
