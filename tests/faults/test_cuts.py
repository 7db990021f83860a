"""The connection is cut at each exchange of a call in turn: it happens once, whatever was lost.

`cut_exchange` counts, so nothing here knows which statements a call is made of: the first
exchange is cut, then the second, until a call ends before the cut is due.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import test_faults
from everywhere import SOAK
from proxy import Lose
from sqlalchemy import make_url, text
from test_faults import Line
from workers import BACKENDS, event, in_each_scope, load, seen

from adk_sessions import OutcomeUnknownError, Session, StaleSessionError

backend, behind, line = test_faults.backend, test_faults.behind, test_faults.line

Arm = Callable[[], None]
Operation = Callable[[Line, Arm], Awaitable[None]]


def is_commit(line: Line) -> bool:
    """Whether the last cut was at one."""
    return re.search(rb"COMMIT\b", line.proxy.lost) is not None


async def another_append(line: Line, session: Session) -> None:
    """Somebody else's, which the session does not know of."""
    await line.direct.append_event(
        await line.stored(session), event("other", {"other": 1, "app:k0": "other"})
    )


async def create(line: Line, arm: Arm) -> None:
    before = await line.direct.list_sessions(app_name=line.app)
    arm()
    created = await line.service.create_session(
        app_name=line.app, user_id="ann", state=in_each_scope("c")
    )
    assert created.state.items() >= in_each_scope("c").items()
    await line.assert_equal(created)
    after = await line.direct.list_sessions(app_name=line.app)
    assert {one.id for one in after.sessions} - {one.id for one in before.sessions} == {created.id}
    assert len(after.sessions) == len(before.sessions) + 1


async def append(line: Line, arm: Arm) -> None:
    session = await line.session()
    arm()
    await line.service.append_event(session, event("event-1", in_each_scope("k1")))
    assert seen(session).events == ["event-0", "event-1"]
    assert session.state.items() >= in_each_scope("k1").items()
    await line.assert_equal(session)


async def append_on_a_new_connection(line: Line, arm: Arm) -> None:
    session = await line.session()
    await line.engine.dispose()
    await line.proxy.deserted()
    arm()
    await line.service.append_event(session, event("event-1", in_each_scope("k1")))
    assert seen(session).events == ["event-0", "event-1"]
    await line.assert_equal(session)


async def append_a_batch(line: Line, arm: Arm) -> None:
    session = await line.session()
    arm()
    await line.service.append_events(
        session, [event(f"event-{n}", in_each_scope(f"k{n}")) for n in (1, 2, 3)]
    )
    assert seen(session).events == ["event-0", "event-1", "event-2", "event-3"]
    assert session.state.items() >= in_each_scope("k3").items()
    await line.assert_equal(session)


async def append_the_same_again(line: Line, arm: Arm) -> None:
    session = await line.session()
    again = session.model_copy(deep=True)
    one = event("event-1", in_each_scope("k1"))
    await line.service.append_event(session, one)
    arm()
    await line.service.append_event(again, one)
    assert again == session
    await line.assert_equal(again)


async def append_though_stale(line: Line, arm: Arm) -> None:
    session = await line.session()
    await another_append(line, session)
    before = session.model_dump()
    arm()
    with pytest.raises(StaleSessionError):
        await line.service.append_event(session, event("event-1", in_each_scope("k1")))
    assert session.model_dump() == before
    stored = await line.stored(session)
    assert seen(stored).events == ["event-0", "other"]
    assert "k1" not in stored.state


async def append_and_refresh(line: Line, arm: Arm) -> None:
    session = await line.session()
    await another_append(line, session)
    arm()
    await line.service.append_event(
        session, event("event-1", in_each_scope("k1")), on_stale="refresh"
    )
    assert seen(session).events == ["event-0", "other", "event-1"]
    assert session.state == {
        **in_each_scope("k0"),
        **in_each_scope("k1"),
        "other": 1,
        "app:k0": "other",
    }
    await line.assert_equal(session)


async def update_state(line: Line, arm: Arm) -> None:
    """Added once, or not known and added once or not at all: but to all scopes or to none."""
    session = await line.session()
    keys = ("n", "user:n", "app:n")
    where = {"app_name": line.app, "user_id": "ann", "session_id": session.id}
    before = (await line.stored(session)).state
    expected = {key: before.get(key, 0) + 1 for key in keys}
    fired = line.proxy.fired
    arm()
    try:
        result = await line.service.update_state(
            **where, add=dict.fromkeys(keys, 1), delta={"new": None}, delete=["k0"]
        )
    except OutcomeUnknownError:
        assert line.proxy.fired == fired + 1
        assert is_commit(line)
        unknown = True
    else:
        assert not is_commit(line)
        assert result == {**expected, "new": None}
        unknown = False
    stored = await line.stored(session)
    done = {**before, **expected, "new": None}
    del done["k0"]
    assert stored.state == done or (unknown and stored.state == before)
    # and what was read before is not stale
    await line.service.append_event(session, event("event-1", {}))
    assert seen(await line.stored(session)).events == ["event-0", "event-1"]


async def delete(line: Line, arm: Arm) -> None:
    gone, other = await line.session(), await line.session()
    arm()
    await line.service.delete_session(line.app, "ann", gone.id)
    left = await line.direct.get_session(app_name=line.app, user_id="ann", session_id=gone.id)
    assert left is None
    # its events are gone with it: one of a new session with this id would show them
    again = await line.direct.create_session(app_name=line.app, user_id="ann", session_id=gone.id)
    await line.assert_equal(again)
    assert seen(await load(line.direct, line.app, "ann", other.id)).events == ["event-0"]


async def get(line: Line, arm: Arm) -> None:
    session = await line.session()
    arm()
    assert await load(line.service, line.app, "ann", session.id) == session


EVERYWHERE: list[Operation] = [create, append, append_and_refresh, update_state]
# On PostgreSQL the generic path has the most exchanges, and MariaDB's is much the same.
REST: list[Operation] = [
    append_a_batch,
    append_the_same_again,
    append_though_stale,
    append_on_a_new_connection,
    delete,
    get,
]
CASES = [
    pytest.param(backend, operation, id=f"{backend}-{operation.__name__}")
    for backend in test_faults.SERVERS
    for operation in EVERYWHERE + REST * (SOAK or backend != "generic")
]


async def attempt(line: Line, operation: Operation, number: int, lose: Lose) -> bool:
    """One call with a cut at its so many-th exchange; whether it has so many."""
    fired = line.proxy.fired
    line.proxy.lost = b""
    await operation(line, lambda: None)  # what a connection prepares would be exchanges too
    await operation(line, lambda: line.proxy.cut_exchange(number, lose=lose))
    assert line.proxy.fired <= fired + 1
    return line.proxy.fired > fired


@pytest.mark.parametrize(("backend", "operation"), CASES, indirect=["backend"])
async def test_a_call_that_is_cut_anywhere_happens_once(
    line: Line, operation: Operation, backend: str
) -> None:
    """In a short run an exchange loses its request or its reply in turn, but COMMIT loses both."""
    commits: list[Lose] = []
    lose, other = cast(list[Lose], ["request", "reply"])
    for number in itertools.count(1):
        if not await attempt(line, operation, number, lose):
            break
        commits += [lose] * is_commit(line)
        if is_commit(line) or SOAK or backend == "postgresql":
            assert await attempt(line, operation, number, other)
            commits += [other] * (is_commit(line))
        lose, other = other, lose
    assert line.proxy.fired >= 2
    in_transaction = operation is update_state or (backend != "postgresql" and operation is not get)
    assert ({"request", "reply"} <= set(commits)) == in_transaction


@test_faults.at(test_faults.STORED)
async def test_a_lost_reply_is_not_forgotten_over_what_comes_after_it(
    behind: Callable[..., Awaitable[Line]],
    fresh_database: Callable[[str], str],
    backend: str,
    place: str,
) -> None:
    """It is stored; that each repetition is refused for good reason says nothing about it."""
    url = fresh_database(BACKENDS[backend][0])
    line = await behind(url, retry_window=0.5)
    session = await line.session()
    before = session.model_copy(deep=True)

    async def refuse() -> None:
        if backend == "mariadb":
            return line.proxy.refuse()
        async with line.direct._database.engine.begin() as connection:
            name = make_url(url).database
            change = f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'
            await connection.execute(text(change))

    line.proxy.cut(test_faults.marker(place, "event-1"), lose="reply", meanwhile=refuse)
    with pytest.raises(OutcomeUnknownError) as raised:
        await line.service.append_event(session, event("event-1", in_each_scope("k1")))
    assert raised.value.retryable
    assert line.proxy.fired == 1
    assert session == before
    assert seen(await line.stored(session)).events == ["event-0", "event-1"]


@pytest.mark.parametrize("operation", [create, append])
@test_faults.at([one for one in test_faults.STORED if SOAK or one[0] != "generic"])
async def test_a_lost_reply_is_not_forgotten_over_a_look_that_fails(
    behind: Callable[..., Awaitable[Line]], place: str, operation: Operation
) -> None:
    """It is stored, its repetition is refused for that, and nobody can be asked why."""
    line = await behind(retry_window=0.5)

    async def refuse() -> None:
        line.proxy.refuse()

    async def refuse_the_look() -> None:
        line.proxy.cut("UNION ALL", lose="request", meanwhile=refuse)

    def arm() -> None:
        text = test_faults.marker(place, '"app:k1"' if operation is append else '"c"')
        line.proxy.cut(text, lose="reply", meanwhile=refuse_the_look)

    with pytest.raises(OutcomeUnknownError) as raised:
        await operation(line, arm)
    assert raised.value.retryable
    assert line.proxy.fired == 2
