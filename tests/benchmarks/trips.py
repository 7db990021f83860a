"""Round trips of each call, counted by the proxy: on a real network they decide."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from . import conversation
from .link import Link
from .places import Place
from .scenarios import STATE, USER
from .stores import Store

REPEATS = 5
WARM = 7  # SQLAlchemy's and asyncpg's statement caches are filled, and server-side plans are made
QUIET = 0.03  # seconds in which whatever a call leaves behind arrives at the proxy


async def count_trips(place: Place, kinds: list[type[Store]]) -> dict[str, dict[str, float]]:
    """By store and call: round trips of a warm call, whatever is sent for it and when."""
    counted: dict[str, dict[str, float]] = {}
    with place.link(0) as link:
        for kind in kinds:
            if kind.only is None:
                async with place.store(kind, link) as store:
                    counted[kind.name] = await _count(store, link)
    return counted


async def _count(store: Store, link: Link) -> dict[str, float]:
    service, app = store.service, "trips"
    session = await service.create_session(app_name=app, user_id=USER, state=dict(STATE))
    whose: dict[str, Any] = {"app_name": app, "user_id": USER}
    doomed = [(await service.create_session(**whose)).id for _ in range(WARM + REPEATS)]

    async def append(delta: dict[str, object]) -> None:
        await service.append_event(session, conversation.said(delta=dict(delta)))

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: service.create_session(**whose, state={"city": "Lisbon"}),
        "append": lambda: append({}),
        "append, 3 deltas": lambda: append({"app:a": 1, "user:b": 2, "c": 3}),
        "get": lambda: service.get_session(**whose, session_id=session.id),
        "list": lambda: service.list_sessions(**whose),
        "delete": lambda: service.delete_session(**whose, session_id=doomed.pop()),
    }
    counted = {}
    for name, call in calls.items():
        for _ in range(WARM):
            await call()
        await asyncio.sleep(QUIET)
        link.reset()
        for _ in range(REPEATS):
            await call()
        await asyncio.sleep(QUIET)
        counted[name] = link.trips() / REPEATS
    return counted
