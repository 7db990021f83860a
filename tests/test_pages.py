"""Sessions and events page by page: nothing missed, nothing twice, whoever writes meanwhile."""

from __future__ import annotations

import asyncio
import base64
import gc
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import wire
from everywhere import EVERY_DATABASE, place_of
from sqlalchemy import bindparam, make_url, text, update
from workers import Crew

from adk_sessions import (
    Event,
    EventNotFoundError,
    InvalidInputError,
    Page,
    SessionService,
    UnreadableEventError,
)
from adk_sessions.dialects.pages import Wanted
from adk_sessions.dialects.rls import ContainedPostgreSQL
from adk_sessions.dialects.types import Timestamp
from adk_sessions.labels import labels_text
from adk_sessions.models import models

EPOCH = 1_700_000_000.0
HERE = Path(__file__).parent


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


async def create(service: Any, app: str, ids: Iterable[tuple[str, str]], step: float = 1.0) -> None:
    """Sessions, by user and id, each created so many seconds after the one before."""
    for number, (user, id_) in enumerate(ids):
        service._now = lambda number=number: EPOCH + number * step
        await service.create_session(app_name=app, user_id=user, session_id=id_)
    del service._now


async def change(service: Any, app: str, session_id: str, **values: Any) -> None:
    """Sets columns of a session past the service."""
    sessions = service.models.sessions
    columns: dict[str, Any] = {}
    parameters: dict[str, Any] = {"k_app": app, "k_id": session_id}
    for name, value in values.items():
        parameters[f"v_{name}"] = labels_text(value) if name == "labels" else value
        columns[name] = (
            service._statements.as_json("v_labels")
            if name == "labels"
            else bindparam(f"v_{name}", type_=Timestamp() if "time" in name else None)
        )
    statement = update(sessions).values(columns)
    of = statement.where(
        sessions.c.app_name == bindparam("k_app"), sessions.c.id == bindparam("k_id")
    )
    await service._run(lambda conn: conn.execute(of, parameters), write=True)


async def walk(page: Callable[..., Any], **arguments: Any) -> list[list[Any]]:
    """The items of all pages."""
    pages: list[list[Any]] = []
    cursor: str | None = None
    while True:
        found = await page(**arguments, cursor=cursor)
        assert isinstance(found, Page)
        pages.append(found.items)
        cursor = found.next_cursor
        if cursor is None:
            return pages
        assert found.items
        assert len(pages) < 1000


def ids(pages: list[list[Any]]) -> list[str]:
    return [item.id for item in itertools.chain.from_iterable(pages)]


# --- sessions ----------------------------------------------------------------------------------


async def test_sessions_come_newest_first(service: SessionService, app_name: str) -> None:
    made = [(("ann", "bob", "Bob", "bob ")[n % 4], f"s{n}") for n in range(11)]
    await create(service, app_name, made)
    newest = [id_ for _, id_ in reversed(made)]
    for limit in (1, 2, 3, 10, 11, 12):
        pages = await walk(service.page_sessions, app_name=app_name, limit=limit)
        assert ids(pages) == newest
        assert [len(page) for page in pages[:-1]] == [limit] * (len(pages) - 1)
        assert 0 < len(pages[-1]) <= limit
    for user in ("ann", "bob", "Bob", "bob "):
        pages = await walk(service.page_sessions, app_name=app_name, user_id=user, limit=2)
        assert ids(pages) == [id_ for id_ in newest if (user, id_) in made]
        assert {item.user_id for item in itertools.chain(*pages)} == {user}


async def test_sessions_of_one_moment_are_all_shown(service: SessionService, app_name: str) -> None:
    made = {(f"user-{n % 3}", f"s{n % 7}-{n}") for n in range(20)}
    await create(service, app_name, sorted(made), step=0.0)
    for limit in (1, 3):
        pages = await walk(service.page_sessions, app_name=app_name, limit=limit)
        shown = [(item.user_id, item.id) for item in itertools.chain(*pages)]
        assert len(shown) == len(made)
        assert set(shown) == made
    pages = await walk(service.page_sessions, app_name=app_name, user_id="user-1", limit=2)
    assert sorted(ids(pages)) == sorted(id_ for user, id_ in made if user == "user-1")


async def test_a_summary_says_what_is_stored(service: SessionService, app_name: str) -> None:
    await create(service, app_name, [("ann", "plain"), ("ann", "full")])
    labels = {"topic": "ships, {boats}", 'a"b\\': "é", "": ""} | {"k": ",'%_"}
    del labels[""]
    await change(
        service,
        app_name,
        "full",
        title="Über Schiffe",
        labels=labels,
        archive_time=datetime(2030, 1, 1, 0, 0, 0, 5),
        expire_time=datetime(2031, 1, 1),
    )
    session = await service.get_session(app_name=app_name, user_id="ann", session_id="plain")
    assert session is not None
    for number in range(3):
        await service.append_event(session, Event(author="ann", timestamp=EPOCH + 100 + number))
    page = await service.page_sessions(app_name, counts=True, archived=None)
    full, plain = page.items
    assert (full.app_name, full.user_id, full.id) == (app_name, "ann", "full")
    assert (full.title, full.labels) == ("Über Schiffe", labels)
    assert full.archive_time == pytest.approx(1893456000.000005, abs=1e-7)
    assert full.expire_time == 1924992000.0
    assert (full.create_time, full.last_update_time, full.event_count) == (EPOCH + 1,) * 2 + (0,)
    assert (plain.title, plain.labels, plain.archive_time, plain.expire_time) == (
        None, {}, None, None,
    )  # fmt: skip
    assert (plain.create_time, plain.event_count) == (EPOCH, 3)
    assert plain.last_update_time == session.last_update_time
    for summary in page.items:
        described = await service.describe_session(app_name, "ann", summary.id, counts=True)
        assert described == summary
        uncounted = await service.describe_session(app_name, "ann", summary.id)
        assert uncounted is not None
        assert uncounted.event_count is None


async def test_counts_change_nothing_else(service: SessionService, app_name: str) -> None:
    made = [(f"user-{n % 2}", f"s{n}") for n in range(7)]
    await create(service, app_name, made)
    for number, (user, id_) in enumerate(made):
        session = await service.get_session(app_name=app_name, user_id=user, session_id=id_)
        assert session is not None
        for _ in range(number % 3):
            await service.append_event(session, Event(author="ann"))
    whose: list[dict[str, Any]] = [{}, {"user_id": "user-1"}, {"order": "updated"}]
    for arguments in whose:
        call: dict[str, Any] = {"app_name": app_name, "limit": 3, **arguments}
        plain = await walk(service.page_sessions, **call)
        counted = await walk(service.page_sessions, **call, counts=True)
        assert ids(counted) == ids(plain)
        events = {item.id: item.event_count for item in itertools.chain(*counted)}
        assert events == {id_: n % 3 for n, (_, id_) in enumerate(made) if id_ in events}


async def test_by_update_the_one_touched_last_is_first(
    service: SessionService, app_name: str
) -> None:
    await create(service, app_name, [("ann", "a"), ("bob", "b"), ("ann", "c"), ("ann", "d")])
    for user, id_ in (("ann", "c"), ("ann", "a"), ("bob", "b")):
        session = await service.get_session(app_name=app_name, user_id=user, session_id=id_)
        assert session is not None
        await service.append_event(session, Event(author="ann"))
    for limit in (1, 3, 10):
        pages = await walk(service.page_sessions, app_name=app_name, order="updated", limit=limit)
        assert ids(pages) == ["b", "a", "c", "d"]
    pages = await walk(
        service.page_sessions, app_name=app_name, user_id="ann", order="updated", limit=2
    )
    assert ids(pages) == ["a", "c", "d"]


async def test_archived_sessions_are_shown_when_asked_for(
    service: SessionService, app_name: str
) -> None:
    await create(service, app_name, [("ann", f"s{n}") for n in range(6)])
    for id_ in ("s1", "s4"):
        await change(service, app_name, id_, archive_time=datetime(2026, 1, 1))
    expected: dict[Any, list[str]] = {
        False: ["s5", "s3", "s2", "s0"],
        True: ["s4", "s1"],
        None: ["s5", "s4", "s3", "s2", "s1", "s0"],
    }
    for archived, wanted in expected.items():
        for user in (None, "ann"):
            pages = await walk(
                service.page_sessions, app_name=app_name, user_id=user, archived=archived, limit=1
            )
            assert ids(pages) == wanted
    assert ids(await walk(service.page_sessions, app_name=app_name)) == expected[False]


async def test_labels_filter_when_all_pairs_are_there(
    service: SessionService, app_name: str
) -> None:
    stored: dict[str, dict[str, str]] = {
        "both": {"team": "red", "area": "north"},
        "red": {"team": "red"},
        "Red": {"team": "Red"},
        "other": {"x{": ":", "y": "z"},
        "like": {'x"team': "red"},
        "quoted": {"x": ',"team":"red"'},
        "odd": {"a,b{": '"\\é%_', "team": "red "},
    }
    await create(service, app_name, [("ann", id_) for id_ in [*stored, "none"]])
    for id_, labels in stored.items():
        await change(service, app_name, id_, labels=labels)
    wanted: list[tuple[Mapping[str, str], set[str]]] = [
        ({"team": "red"}, {"both", "red"}),
        ({"area": "north", "team": "red"}, {"both"}),
        ({"team": "Red"}, {"Red"}),
        ({"team": "re"}, set()),
        ({":": ","}, set()),
        ({"team": "red", "area": "south"}, set()),
        ({"a,b{": '"\\é%_'}, {"odd"}),
        ({"y": "z", "x{": ":"}, {"other"}),
        (MappingProxyType({"area": "north", "team": "red"}), {"both"}),
        ({}, {*stored, "none"}),
    ]
    for labels, expected in wanted:
        for user in (None, "ann"):
            pages = await walk(
                service.page_sessions, app_name=app_name, user_id=user, labels=labels, limit=1
            )
            assert sorted(ids(pages)) == sorted(expected), labels


async def test_a_list_of_what_cannot_be_is_empty(service: SessionService, app_name: str) -> None:
    for app, user in ((app_name, None), (app_name, "x" * 129), ("a\0", None), (app_name, "\ud800")):
        assert await service.page_sessions(app, user) == Page([], None)
    assert await service.describe_session(app_name, "ann", "no such") is None
    assert await service.describe_session(app_name, "ann", "a\0") is None
    assert await service.list_users("a\0") == await service.list_users(app_name) == []
    assert await service.page_events(app_name, "ann", "no such") == Page([], None)
    assert await service.page_events(app_name, "ann", "a\0") == Page([], None)
    assert [event async for event in service.iter_events(app_name, "ann", "no such")] == []
    assert [event async for event in service.iter_events(app_name, "ann", "\0")] == []


async def test_users_and_apps_are_listed_once(service: SessionService, app_name: str) -> None:
    await create(service, app_name, [("bob", "1"), ("ann", "1"), ("ann", "2"), ("Ann", "1")])
    await create(service, f"{app_name}-2", [("eve", "1")])
    await service.update_state(app_name=app_name, user_id="stateful", delta={"user:a": 1})
    assert await service.list_users(app_name) == ["Ann", "ann", "bob", "stateful"]
    await service.delete_session(app_name, "bob", "1")
    assert await service.list_users(app_name) == ["Ann", "ann", "bob", "stateful"]
    apps = await service.list_apps()
    assert apps == sorted(apps)
    assert [app for app in apps if app.startswith(app_name)] == [app_name, f"{app_name}-2"]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *(("limit", {"limit": limit}) for limit in (0, -1, 1001, True, 1.0, "1", None)),
    ("order", {"order": "title"}),
    ("order", {"order": None}),
    ("archived", {"archived": "yes"}),
    ("archived", {"archived": 0}),
    ("labels", {"labels": ["a"]}),
    ("labels", {"labels": {"a": 1}}),
    *(
        ("cursor", {"cursor": cursor})
        for cursor in ("", "x", "e30", "\u00e9", "a" * 500, 7, b"e30")
    ),
]
REFUSED_OF_EVENTS: list[tuple[str, dict[str, Any]]] = [
    *REFUSED[:7],
    *REFUSED[-7:],
    ("direction", {"direction": "up"}),
    ("after", {"after": 1}),
    ("author", {"author": "a\0"}),
    ("author", {"author": 1}),
    ("invocation_id", {"invocation_id": "\ud800"}),
    ("aligned", {"aligned": True, "author": "ann"}),
]


async def test_bad_arguments_are_refused(app_name: str) -> None:
    async with SessionService("sqlite://") as service:
        for field, arguments in REFUSED:
            with pytest.raises(InvalidInputError) as refused:
                await service.page_sessions(app_name, **arguments)
            assert refused.value.field == field, arguments
            if field == "archived":
                with pytest.raises(InvalidInputError) as refused:
                    await service.list_sessions(app_name=app_name, **arguments)
                assert refused.value.field == field
        for field, arguments in REFUSED_OF_EVENTS:
            with pytest.raises(InvalidInputError) as refused:
                await service.page_events(app_name, "ann", "s", **arguments)
            assert refused.value.field == field, arguments
        for field, arguments in (("batch", {"batch": 0}), ("after", {"after": 1})):
            with pytest.raises(InvalidInputError) as refused:
                service.iter_events(app_name, "ann", "s", **arguments)  # type: ignore[arg-type]
            assert refused.value.field == field


async def test_a_cursor_is_of_its_own_list_only(app_name: str) -> None:
    async with SessionService("sqlite://") as service:
        await create(service, app_name, [("ann", f"s{n}") for n in range(4)])
        first = await service.page_sessions(app_name, "ann", limit=1)
        cursor = first.next_cursor
        assert cursor is not None
        assert not set(cursor) - set(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        )
        # another size of page is the same list
        assert ids([(await service.page_sessions(app_name, "ann", limit=2, cursor=cursor)).items])
        others: list[dict[str, Any]] = [
            {"user_id": None},
            {"user_id": "bob"},
            {"order": "updated"},
            {"archived": True},
            {"labels": {"a": "b"}},
            {"app_name": "another"},
        ]
        for other in others:
            arguments: dict[str, Any] = {"app_name": app_name, "user_id": "ann", **other}
            with pytest.raises(InvalidInputError) as refused:
                await service.page_sessions(**arguments, cursor=cursor)
            assert refused.value.field == "cursor"
        with pytest.raises(InvalidInputError):
            await service.page_events(app_name, "ann", "s1", cursor=cursor)
        # what was changed in it shows
        plain = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        plain[-1] = "s0"
        forged = base64.urlsafe_b64encode(json.dumps(plain).encode()).decode()
        with pytest.raises(InvalidInputError):
            await service.page_sessions(app_name, "ann", cursor=forged)


async def test_a_cursor_serves_another_process(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str], app_name: str
) -> None:
    url, options = place_of("sqlite", request, fresh_database)
    async with SessionService(url, **options) as one, SessionService(url, **options) as other:
        await create(one, app_name, [("ann", f"s{n}") for n in range(4)])
        first = await one.page_sessions(app_name, limit=2)
        second = await other.page_sessions(app_name, limit=2, cursor=first.next_cursor)
        assert ids([first.items, second.items]) == ["s3", "s2", "s1", "s0"]


async def test_raw_times_that_google_adk_has_left_on_sqlite_are_paged_too(
    fresh_database: Callable[[str], str], app_name: str
) -> None:
    async with SessionService(fresh_database("sqlite")) as service:
        await create(service, app_name, [("ann", f"s{n}") for n in range(6)])
        session = await service.get_session(app_name=app_name, user_id="ann", session_id="s0")
        assert session is not None
        for n in range(6):
            await service.append_event(session, Event(id=f"e{n}", author="ann"))
        async with service._database.engine.begin() as conn:
            for n in (1, 3, 4):
                await conn.execute(
                    text(f"UPDATE sessions SET create_time = {EPOCH + n} WHERE id = 's{n}'")
                )
                await conn.execute(
                    text(f"UPDATE events SET timestamp = {EPOCH + n} WHERE id = 'e{n}'")
                )
        for limit in (1, 2, 4):
            pages = await walk(service.page_sessions, app_name=app_name, limit=limit)
            assert sorted(ids(pages)) == [f"s{n}" for n in range(6)]
            whose: dict[str, Any] = {"app_name": app_name, "user_id": "ann", "session_id": "s0"}
            for direction in ("forward", "backward"):
                pages = await walk(service.page_events, **whose, limit=limit, direction=direction)
                assert sorted(ids(pages)) == [f"e{n}" for n in range(6)]


# --- events ------------------------------------------------------------------------------------


def said(number: int, **fields: Any) -> Event:
    return Event(
        **{
            "id": f"e{number:03}",
            "author": ("user", "agent")[number % 2],
            "invocation_id": str(number // 4),
            "content": f"{number} \0 \ud800" if number % 5 == 4 else number,
            **fields,
        }
    )


async def conversation(service: Any, app: str, events: list[Any], session_id: str = "s") -> Any:
    session = await service.create_session(app_name=app, user_id="ann", session_id=session_id)
    if events:
        await service.append_events(session, events)
    return session


async def pages_of(service: Any, app: str, **arguments: Any) -> list[list[Any]]:
    whose = {"app_name": app, "user_id": "ann", "session_id": "s"}
    pages = await walk(service.page_events, **whose, **arguments)
    # backward the last page is the oldest
    return pages[::-1] if arguments.get("direction") == "backward" else pages


async def test_events_come_in_order_in_either_direction(
    service: SessionService, app_name: str
) -> None:
    events = [said(n) for n in range(11)]
    # of all clocks: the order is that of the appends
    for n, one in enumerate(events):
        one.timestamp = EPOCH + (n * 37 % 11)
    await conversation(service, app_name, events)
    for limit in (1, 3, 10, 11, 12):
        for direction in ("forward", "backward"):
            pages = await pages_of(service, app_name, limit=limit, direction=direction)
            assert list(itertools.chain(*pages)) == events
            assert all(0 < len(page) <= limit for page in pages)
            short = pages[0] if direction == "backward" else pages[-1]
            assert all(len(page) == limit for page in pages if page is not short)
        batch = [e async for e in service.iter_events(app_name, "ann", "s", batch=limit)]
        assert batch == events


FILTERS: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
    ({"after": "e004"}, lambda n: n > 4),
    ({"author": "agent"}, lambda n: n % 2 == 1),
    ({"author": "Agent"}, lambda n: False),
    ({"invocation_id": "1"}, lambda n: n // 4 == 1),
    ({"invocation_id": "no"}, lambda n: False),
    ({"after": "e005", "author": "user", "invocation_id": "1"}, lambda n: n == 6),
    ({"after": "e012"}, lambda n: False),
]


async def test_events_are_filtered(service: SessionService, app_name: str) -> None:
    events = [said(n) for n in range(13)]
    await conversation(service, app_name, events)
    await conversation(service, app_name, [said(n, author="eve") for n in range(3)], "other")
    for filters, wanted in FILTERS:
        expected = [one for n, one in enumerate(events) if wanted(n)]
        for limit, direction in itertools.product((1, 2, 20), ("forward", "backward")):
            pages = await pages_of(service, app_name, limit=limit, direction=direction, **filters)
            assert list(itertools.chain(*pages)) == expected, filters
        found = [e async for e in service.iter_events(app_name, "ann", "s", batch=2, **filters)]
        assert found == expected


async def test_after_an_event_that_is_not_there(service: SessionService, app_name: str) -> None:
    await conversation(service, app_name, [said(1)])
    await conversation(service, app_name, [said(2)], "other")
    for missing in ("e002", "no such", "a\0", "x" * 200):
        with pytest.raises(EventNotFoundError):
            await service.page_events(app_name, "ann", "s", after=missing)
        with pytest.raises(EventNotFoundError):
            async for _ in service.iter_events(app_name, "ann", "s", after=missing):
                pass
    for no_session in ("no such", "a\0", "x" * 200):
        with pytest.raises(EventNotFoundError):
            await service.page_events(app_name, "ann", no_session, after="e001")
        with pytest.raises(EventNotFoundError):
            await anext(service.iter_events(app_name, "ann", no_session, after="e001"))


async def test_the_limit_after_stays_when_its_event_goes(
    service: SessionService, app_name: str
) -> None:
    await conversation(service, app_name, [said(n) for n in range(6)])
    events = service.models.events
    gone = events.delete().where(events.c.app_name == app_name, events.c.id == "e001")
    for direction in ("forward", "backward"):
        page = await service.page_events(
            app_name, "ann", "s", limit=3, after="e001", direction=direction
        )
        arguments: dict[str, Any] = {"after": "e001", "direction": direction}
        if direction == "backward":
            await service._run(lambda conn: conn.execute(gone), write=True)
        rest = await service.page_events(app_name, "ann", "s", **arguments, cursor=page.next_cursor)
        assert sorted(ids([page.items, rest.items])) == ["e002", "e003", "e004", "e005"]
        assert rest.next_cursor is None


async def test_events_of_one_moment_are_all_shown(service: SessionService, app_name: str) -> None:
    """google-adk has given several events of a session the same time."""
    await conversation(service, app_name, [said(n) for n in range(9)])
    events = service.models.events
    same = (
        update(events)
        .where(events.c.app_name == app_name, events.c.id > "e002")
        .values(timestamp=datetime(2030, 1, 1))
    )
    await service._run(lambda conn: conn.execute(same), write=True)
    for limit, direction in itertools.product((1, 2, 5), ("forward", "backward")):
        pages = await pages_of(service, app_name, limit=limit, direction=direction)
        assert ids(pages) == [f"e{n:03}" for n in range(9)]
        pages = await pages_of(service, app_name, limit=limit, direction=direction, after="e005")
        assert ids(pages) == ["e006", "e007", "e008"]


async def test_what_is_appended_meanwhile_is_on_later_pages(
    service: SessionService, app_name: str
) -> None:
    session = await conversation(service, app_name, [said(n) for n in range(4)])
    forward = await service.page_events(app_name, "ann", "s", limit=2)
    backward = await service.page_events(app_name, "ann", "s", limit=2, direction="backward")
    iterator = service.iter_events(app_name, "ann", "s", batch=2)
    seen = [(await anext(iterator)).id]
    await service.append_event(session, said(4))
    rest = await service.page_events(app_name, "ann", "s", cursor=forward.next_cursor)
    assert ids([rest.items]) == ["e002", "e003", "e004"]
    rest = await service.page_events(
        app_name, "ann", "s", cursor=backward.next_cursor, direction="backward"
    )
    assert ids([rest.items]) == ["e000", "e001"]
    seen += [one.id async for one in iterator]
    assert seen == [f"e{n:03}" for n in range(5)]


async def test_an_iterator_holds_no_more_than_a_batch(app_name: str) -> None:
    def alive() -> int:
        return sum(type(one) is Event for one in gc.get_objects())

    async with SessionService("sqlite://") as service:
        await conversation(service, app_name, [said(n) for n in range(900)])
        gc.collect()
        before, most, count = alive(), 0, 0
        async for _ in service.iter_events(app_name, "ann", "s", batch=20):
            count += 1
            if count % 50 == 0:
                most = max(most, alive() - before)
        assert count == 900
        assert 0 < most <= 2 * 20


async def test_damaged_events_are_treated_as_by_get_session(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str], app_name: str
) -> None:
    url, options = place_of("sqlite", request, fresh_database)
    async with (
        SessionService(url, **options) as strict,
        SessionService(url, **options, on_bad_event="placeholder") as lenient,
    ):
        await conversation(strict, app_name, [said(n) for n in range(4)])
        async with strict._database.engine.begin() as conn:
            await conn.execute(text("UPDATE events SET event_data = '{no' WHERE id = 'e001'"))
        with pytest.raises(UnreadableEventError):
            await strict.page_events(app_name, "ann", "s")
        page = await lenient.page_events(app_name, "ann", "s", limit=2, aligned=True)
        assert ids([page.items]) == ["e000", "e001"]
        assert page.items[1].error_code  # type: ignore[attr-defined]
        # it is nobody's, and keeps no other from being found
        page = await strict.page_events(app_name, "ann", "s", author="agent")
        assert ids([page.items]) == ["e003"]


# --- function calls and their responses --------------------------------------------------------


def calling(number: int, *call_ids: str, lasting: bool = False) -> Event:
    parts = [{"function_call": {"id": id_, "name": "f"}} for id_ in call_ids]
    more = {"long_running_tool_ids": list(call_ids)} if lasting else {}
    return said(number, content={"parts": parts}, **more)


def answering(number: int, *call_ids: str) -> Event:
    parts = [{"function_response": {"id": id_, "name": "f"}} for id_ in call_ids]
    return said(number, content={"parts": parts})


def split(pages: list[list[Any]], pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs that are on two pages."""
    page_of = {one.id: n for n, page in enumerate(pages) for one in page}
    return [
        (one, other) for one, other in pairs if page_of[f"e{one:03}"] != page_of[f"e{other:03}"]
    ]


async def test_an_aligned_page_never_separates_a_call_from_its_response(
    service: SessionService, app_name: str
) -> None:
    events = [
        said(0),
        calling(1, "call-1"), answering(2, "call-1"),
        said(3),
        calling(4, "odd \"id\" é", "call-3"), said(5), answering(6, "call-3"),
        answering(7, "odd \"id\" é"),
        calling(8, "never answered"),
        said(9),
        # they overlap, and one is answered twice
        calling(10, "long", lasting=True), calling(11, "b"), answering(12, "long"),
        calling(13, "c"), answering(14, "b"), answering(15, "c"), said(16),
        answering(17, "long"),
        answering(18, "never called"),
        said(19),
    ]  # fmt: skip
    pairs = [(1, 2), (4, 6), (4, 7), (11, 14), (13, 15), (10, 12), (10, 17)]
    longest = {1: 8, 2: 8, 5: 8, 8: 8, 19: 19}
    await conversation(service, app_name, events)
    plain = await pages_of(service, app_name, limit=2)
    assert split(plain, pairs)
    for limit, direction in itertools.product(longest, ("forward", "backward")):
        pages = await pages_of(service, app_name, limit=limit, direction=direction, aligned=True)
        assert ids(pages) == [one.id for one in events], (limit, direction)
        assert split(pages, pairs) == [], (limit, direction)
        assert max(map(len, pages)) <= longest[limit], (limit, direction)
    one_run = await pages_of(service, app_name, limit=1, aligned=True, invocation_id="1")
    assert ids(one_run) == ["e004", "e005", "e006", "e007"]
    assert split(one_run, [(4, 6), (4, 7)]) == []


async def test_a_call_without_response_makes_no_page_longer(
    service: SessionService, app_name: str
) -> None:
    events = [calling(n, f"c{n}") if n % 3 == 0 else said(n) for n in range(30)]
    await conversation(service, app_name, events)
    for direction in ("forward", "backward"):
        pages = await pages_of(service, app_name, limit=4, direction=direction, aligned=True)
        assert ids(pages) == [one.id for one in events]
        assert max(map(len, pages)) <= 4


async def test_a_response_is_not_looked_for_through_a_whole_session(
    service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a page would take the longer the longer the session is."""
    monkeypatch.setattr("adk_sessions.pages._AHEAD", 12)
    events = [said(n) for n in range(40)]
    near, far = (2, 13), (14, 35)
    for number, (made, answered) in enumerate((near, far)):
        events[made] = calling(made, f"call-{number}")
        events[answered] = answering(answered, f"call-{number}")
    await conversation(service, app_name, events)
    for direction in ("forward", "backward"):
        pages = await pages_of(service, app_name, limit=1, direction=direction, aligned=True)
        assert ids(pages) == [one.id for one in events]
        assert sorted(map(len, pages)) == [1] * 28 + [12]
        assert split(pages, [near, far]) == [far]
        # of many events that a page should have, ten times as many are looked at
        pages = await pages_of(service, app_name, limit=3, direction=direction, aligned=True)
        assert ids(pages) == [one.id for one in events]
        assert split(pages, [near, far]) == []


async def test_a_thousand_events_are_looked_at_for_a_response(app_name: str) -> None:
    async with SessionService("sqlite://") as service:
        events = [
            calling(0, "a"),
            *(said(n) for n in range(1, 900)),
            answering(900, "a"),
            said(901),
        ]
        await conversation(service, app_name, events)
        page = await service.page_events(app_name, "ann", "s", limit=1, aligned=True)
        assert ids([page.items]) == [one.id for one in events[:-1]]


@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_aligned_pages_of_events_of_one_moment(
    direction: str, service: SessionService, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adk_sessions.pages._AHEAD", 10)
    events = [calling(0, "a"), *(said(n) for n in range(1, 20)), answering(4, "a")]
    events[4], events[15] = events.pop(), calling(15, "b")
    events += [said(20), answering(21, "b"), said(22)]
    await conversation(service, app_name, events)
    same = (
        update(service.models.events)
        .where(service.models.events.c.app_name == app_name)
        .values(timestamp=datetime(2030, 1, 1))
    )
    await service._run(lambda conn: conn.execute(same), write=True)
    pages = await pages_of(service, app_name, limit=1, direction=direction, aligned=True)
    assert ids(pages) == [one.id for one in events]
    assert split(pages, [(0, 4), (15, 21)]) == []


async def test_aligned_pages_of_any_history(app_name: str) -> None:
    dice = random.Random(11)
    async with SessionService("sqlite://") as service:
        for turn in range(8):
            open_calls: list[tuple[int, str]] = []
            pairs: list[tuple[int, int]] = []
            events: list[Event] = []
            for n in range(40):
                what = dice.random()
                if what < 0.3:
                    events.append(calling(n, f"{turn}-{n}"))
                    open_calls.append((n, f"{turn}-{n}"))
                elif what < 0.55 and open_calls:
                    made, id_ = open_calls.pop(dice.randrange(len(open_calls)))
                    events.append(answering(n, id_))
                    pairs.append((made, n))
                else:
                    events.append(said(n))
            app = f"{app_name}-{turn}"
            await conversation(service, app, events)
            for limit, direction in itertools.product((1, 3, 7), ("forward", "backward")):
                pages = await pages_of(service, app, limit=limit, direction=direction, aligned=True)
                assert ids(pages) == [one.id for one in events]
                assert split(pages, pairs) == []
                # no page is longer than it must be
                for page in pages:
                    if len(page) > limit:
                        first, last = int(page[0].id[1:]), int(page[-1].id[1:])
                        assert all(
                            any(one < cut <= other for one, other in pairs)
                            for cut in range(first + 1, last + 1)
                        )


# --- the binding of google-adk -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_pages_of_google_adk(
    kind: str,
    request: pytest.FixtureRequest,
    fresh_database: Callable[[str], str],
    app_name: str,
) -> None:
    pytest.importorskip("google.adk")
    from google.adk.events import Event as AdkEvent
    from google.genai import types

    from adk_sessions.adk import DatabaseSessionService

    def made(number: int, *parts: types.Part) -> AdkEvent:
        content = types.Content(role="model", parts=[types.Part(text=str(number)), *parts])
        return AdkEvent(id=f"e{number:03}", author="agent", invocation_id="1", content=content)

    one = types.Part(function_call=types.FunctionCall(id="adk-1", name="f", args={}))
    two = types.Part(
        function_response=types.FunctionResponse(id="adk-1", name="f", response={"a": 1})
    )
    events = [made(0), made(1, one), made(2), made(3, two), made(4)]
    url, options = place_of(kind, request, fresh_database)
    async with DatabaseSessionService(url, **options) as service:
        await conversation(service, app_name, events)
        for limit, direction in itertools.product((1, 2, 5), ("forward", "backward")):
            pages = await pages_of(
                service, app_name, limit=limit, direction=direction, aligned=True
            )
            assert list(itertools.chain(*pages)) == events
            assert split(pages, [(1, 3)]) == []
            assert all(isinstance(item, AdkEvent) for item in itertools.chain(*pages))
        assert [e async for e in service.iter_events(app_name, "ann", "s")] == events
        page = await service.page_sessions(app_name, counts=True)
        assert [(s.user_id, s.id, s.event_count) for s in page.items] == [("ann", "s", 5)]
        assert await service.list_users(app_name) == ["ann"]


# --- row level security ------------------------------------------------------------------------


def test_what_is_of_all_users_is_refused_where_policies_keep_them_apart() -> None:
    statements = ContainedPostgreSQL(models())
    nobody: Any = None  # nothing is sent
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("app_name", lambda: statements.apps(nobody)),
        ("user_id", lambda: statements.users(nobody, "app")),
        (
            "user_id",
            lambda: statements.sessions_page(
                nobody, "app", None, wanted=Wanted(), limit=1, beyond=None
            ),
        ),
    ]
    for field, call in calls:
        with pytest.raises(InvalidInputError) as refused:
            call()
        assert refused.value.field == field


# --- round trips -------------------------------------------------------------------------------


async def test_a_page_takes_one_round_trip_and_never_more_than_two(
    postgres_url: str, app_name: str
) -> None:
    target = make_url(postgres_url)
    with wire.proxy(target.host or wire.LOOPBACK, target.port or 5432) as line:
        async with SessionService(line.url(postgres_url)) as service:
            await create(service, app_name, [("ann", f"s{n}") for n in range(5)])
            events = [said(0), calling(1, "a"), said(2), said(3), answering(4, "a"), said(5)]
            await conversation(service, app_name, events)
            first = await service.page_sessions(app_name, limit=2)
            one = await service.page_events(app_name, "ann", "s", limit=1)
            last = await service.page_events(app_name, "ann", "s", limit=1, direction="backward")
            labels = {"a": "b", "c": "d"}
            calls: dict[str, tuple[int, Callable[[], Any]]] = {
                "first": (1, lambda: service.page_sessions(app_name)),
                "counted": (1, lambda: service.page_sessions(app_name, "ann", counts=True)),
                "updated": (1, lambda: service.page_sessions(app_name, order="updated")),
                "labels": (1, lambda: service.page_sessions(app_name, labels=labels)),
                "next": (
                    1,
                    lambda: service.page_sessions(app_name, limit=2, cursor=first.next_cursor),
                ),
                "described": (1, lambda: service.describe_session(app_name, "ann", "s1")),
                "users": (1, lambda: service.list_users(app_name)),
                "apps": (1, service.list_apps),
                "events": (1, lambda: service.page_events(app_name, "ann", "s")),
                "next events": (
                    1,
                    lambda: service.page_events(
                        app_name, "ann", "s", limit=1, cursor=one.next_cursor
                    ),
                ),
                "after": (1, lambda: service.page_events(app_name, "ann", "s", after="e002")),
                "after the last": (
                    2,
                    lambda: service.page_events(app_name, "ann", "s", after="e005"),
                ),
                "filtered": (
                    1,
                    lambda: service.page_events(
                        app_name, "ann", "s", author="user", invocation_id="1"
                    ),
                ),
                "cut back": (
                    1,
                    lambda: service.page_events(app_name, "ann", "s", limit=3, aligned=True),
                ),
                "extended": (
                    2,
                    lambda: service.page_events(
                        app_name, "ann", "s", limit=1, aligned=True, cursor=one.next_cursor
                    ),
                ),
                "extended backward": (
                    2,
                    lambda: service.page_events(
                        app_name, "ann", "s", limit=1, aligned=True, direction="backward",
                        cursor=last.next_cursor,
                    ),
                ),
            }  # fmt: skip
            trips: dict[str, int] = {}
            for name, (_, call) in calls.items():
                for _ in range(2):  # the driver prepares a statement
                    await call()
                await line.settled()
                line.reset()
                await call()
                await line.settled()
                trips[name] = line.trips
            assert trips == {name: most for name, (most, _) in calls.items()}


# --- beside writers in other processes ---------------------------------------------------------

KINDS = [kind for kind in EVERY_DATABASE if kind != "sqlite-memory"]


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2, script=str(HERE / "paging.py")) as crew:
        yield crew


@pytest.mark.parametrize("kind", KINDS)
async def test_no_session_is_missed_or_shown_twice_beside_writers(
    kind: str,
    crew: Crew,
    request: pytest.FixtureRequest,
    fresh_database: Callable[[str], str],
    app_name: str,
    tmp_path: Path,
) -> None:
    url, options = place_of(kind, request, fresh_database)
    stop = tmp_path / "stop"
    async with SessionService(url, **options) as service:
        now = time.time() - 100
        service._now = lambda: now  # type: ignore[method-assign]
        stays = [f"stays-{n}" for n in range(25)]
        goes = [f"goes-{n}" for n in range(25)]
        for id_ in (id_ for pair in zip(stays, goes, strict=True) for id_ in pair):
            now += 1
            await service.create_session(
                app_name=app_name, user_id=f"user-{id_[-1]}", session_id=id_
            )
        crew.open(url, **options)
        writing = asyncio.create_task(
            asyncio.to_thread(
                crew.run_all,
                [
                    ("disturb", {"app": app_name, "ids": ids_, "stop": str(stop)})
                    for ids_ in (goes[::2] + stays[::2], goes[1::2] + stays[1::2])
                ],
            )
        )
        walks: list[list[str]] = []
        try:
            # until the writers are seen to have done so much, of each kind
            while len(walks) < 6 or sum(id_.startswith("new") for id_ in walks[-1]) < 12:
                walks.append(ids(await walk(service.page_sessions, app_name=app_name, limit=4)))
                assert not writing.done()
        finally:
            stop.touch()
            done = await writing
            crew.close()
        for shown in walks:
            assert len(set(shown)) == len(shown)
            assert [id_ for id_ in shown if id_ in stays] == stays[::-1]
        assert all(each["created"] and each["appended"] for each in done)
        assert sum(each["deleted"] for each in done) == len(goes)
