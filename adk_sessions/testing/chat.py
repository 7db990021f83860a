"""What every chat history must do, as tests: subclass `ChatPersistenceContract`, run pytest."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from pprint import saferepr
from typing import Any, ClassVar

import pytest

from ..chat import ChatMessage, ChatSession
from ..errors import InvalidInputError
from .sessions import ALIKE, VALUES

__all__ = ["ChatPersistenceContract"]

START = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
SECOND = timedelta(seconds=1)

TIMES = (
    *(datetime(1970, 1, 1, tzinfo=UTC), datetime(2000, 2, 29, 23, 59, 59, tzinfo=UTC)),
    # within the hour that Europe and North America pass twice, and the one that they leave out
    *(datetime(2025, 10, 26, hour, 30, tzinfo=UTC) for hour in (0, 1, 2)),
    *(datetime(2025, 11, 2, hour, 30, tzinfo=UTC) for hour in (5, 6, 7)),
    *(datetime(2026, 3, 29, hour, 30, tzinfo=UTC) for hour in (1, 2)),
    *(datetime(2026, 3, 8, hour, 30, tzinfo=UTC) for hour in (2, 7)),
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=5, minutes=45))),
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=-9))),
)

# A value, and the JSON form in which it is stored.
COERCED: tuple[tuple[Any, Any], ...] = (
    (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05Z"),
    (date(2026, 1, 2), "2026-01-02"),
    ((1, (2, "b")), [1, [2, "b"]]),
    ({"a"}, ["a"]),
    (b"text \xc3\xa9", "text é"),
    ({1: {2: "a"}}, {"1": {"2": "a"}}),
)

_CIRCLE: list[Any] = []
_CIRCLE.append(_CIRCLE)

BAD_IDS = {
    "too long": "x" * 256,
    "NUL": "a\0b",
    "lone surrogate": "a\ud800",
    "a number": 1,
    "bytes": b"a",
}


class _Nowhere(tzinfo):
    """A time zone that does not know its offset, which leaves a time without one."""

    def utcoffset(self, _at: datetime | None) -> None:
        return None

    dst = tzname = utcoffset


BAD_TIMES = {
    "without a time zone": datetime(2026, 1, 2),
    "in no time zone": datetime(2026, 1, 2, tzinfo=_Nowhere()),
    "too early": datetime(1969, 12, 31, tzinfo=UTC),
    "too late": datetime(9000, 1, 1, tzinfo=UTC),
    "text": "2026-01-02T03:04:05Z",
    "a number": 1.0,
}
BAD_JSON = {
    "an object": [{"a": object()}],
    "bytes that are no text": [b"\xff"],
    "a circle": _CIRCLE,
}
BAD_MESSAGES: dict[str, dict[str, Any]] = {
    "thread_id": {**BAD_IDS, "none": None},
    "message_id": {**BAD_IDS, "none": None},
    "role": {**BAD_IDS, "none": None},
    "session_id": BAD_IDS,
    "user_id": BAD_IDS,
    "created_at": BAD_TIMES,
    "parts": {**BAD_JSON, "text": "text", "a dict": {}, "none": None},
}
BAD_SESSIONS: dict[str, dict[str, Any]] = {
    "session_id": {**BAD_IDS, "none": None},
    "thread_id": {**BAD_IDS, "none": None},
    "sdk_version": {**BAD_IDS, "none": None},
    "state": {**BAD_JSON, "text": "text", "a number": 1.5},
    "metadata": {**BAD_JSON, "a list": [1]},
    "created_at": BAD_TIMES,
    "archived_at": BAD_TIMES,
}


@pytest.mark.asyncio
class ChatPersistenceContract:
    """Tests for any chat history; subclass it and override the ``chat`` fixture.

    Needs pytest and pytest-asyncio, in either of its modes. Every test works on threads and
    sessions of random names and cleans nothing up, so it is safe on tables that are in use::

        import pytest_asyncio
        from adk_sessions.testing import ChatPersistenceContract

        class TestMyChat(ChatPersistenceContract):
            @pytest_asyncio.fixture
            async def chat(self):
                yield MyChat(...)

    The methods are those of `adk_sessions.chat.ChatPersistence`, and they take its `ChatMessage`
    and `ChatSession`. Override as well, where the tables call for it:

    * ``other_chat``, a fixture: a second one on the same tables. By default ``chat`` itself.
    * ``step``: the shortest time that the columns tell apart.
    * ``ids``: texts that are different ids, unless the columns' collation takes some for the same.
    * ``values``: what is to read back equal, by kind; some types of columns hold less.
    """

    step: ClassVar[timedelta] = timedelta(microseconds=1)
    ids: ClassVar[tuple[str, ...]] = ALIKE
    values: ClassVar[dict[str, list[Any]]] = VALUES

    @pytest.fixture
    def chat(self) -> Any:
        """The chat history under test, on tables that are ready for use."""
        raise NotImplementedError("Override the fixture `chat` to return your chat history.")

    @pytest.fixture
    def other_chat(self, chat: Any) -> Any:
        """Another one on the tables of ``chat``."""
        return chat

    @pytest.fixture
    def thread(self) -> str:
        """A thread that no other test uses."""
        return f"thread-{uuid.uuid4().hex}"

    def message(self, thread: str, message_id: str = "m", **fields: Any) -> ChatMessage:
        """A message of a thread; ``fields`` are further ones of `ChatMessage`."""
        defaults = {"role": "user", "parts": [{"type": "text", "text": message_id}]}
        return ChatMessage(thread_id=thread, message_id=message_id, **{**defaults, **fields})

    def series(self, thread: str, ids: Sequence[str], **fields: Any) -> list[ChatMessage]:
        """Messages a second apart."""
        return [
            self.message(thread, id_, created_at=START + number * SECOND, **fields)
            for number, id_ in enumerate(ids)
        ]

    async def listed(self, chat: Any, *arguments: Any) -> list[str]:
        """The ids of all messages of a list."""
        return [message.message_id for message in (await chat.list_messages(*arguments)).items]

    async def paged(self, chat: Any, *arguments: Any, limit: int) -> list[list[str]]:
        """The ids of a list, page by page."""
        pages, cursor = [], None
        while True:
            page = await chat.list_messages(*arguments, limit=limit, cursor=cursor)
            pages.append([message.message_id for message in page.items])
            cursor = page.next_cursor
            if cursor is None:
                return pages

    # Messages: save, list

    async def test_a_saved_message_reads_back_equal(self, chat: Any, thread: str) -> None:
        parts = [{"type": "text", "text": "Grüße 👋"}, {"tool": {"input": {"n": [1, 1.5, None]}}}]
        message = self.message(
            thread,
            parts=parts,
            role="assistant",
            session_id=f"s-{thread}",
            user_id="ann",
            created_at=START,
        )
        assert await chat.save_messages([message]) is None
        page = await chat.list_messages(thread)
        assert (page.items, page.next_cursor) == ([message], None)

    async def test_a_message_without_a_time_gets_the_present_one(
        self, chat: Any, thread: str
    ) -> None:
        before = datetime.now(UTC)
        await chat.save_messages([self.message(thread)])
        (stored,) = (await chat.list_messages(thread)).items
        assert before - self.step <= stored.created_at <= datetime.now(UTC) + self.step
        assert stored.created_at.utcoffset() == timedelta()
        assert (stored.session_id, stored.user_id) == (None, None)

    async def test_messages_without_times_keep_the_order_of_their_saves(
        self, chat: Any, thread: str
    ) -> None:
        if self.step > timedelta(microseconds=1):
            pytest.skip("the column does not tell such times apart")
        ids = ["c", "a", "b", "e", "d"]
        await chat.save_messages([self.message(thread, id_) for id_ in ids[:3]])
        for id_ in ids[3:]:
            await chat.save_messages([self.message(thread, id_)])
        assert await self.listed(chat, thread) == ids

    async def test_parts_come_back_with_value_and_type(self, chat: Any, thread: str) -> None:
        batch = [
            self.message(thread, name.replace(" ", "_"), parts=values)
            for name, values in self.values.items()
        ]
        await chat.save_messages(batch)
        stored = {m.message_id: m.parts for m in (await chat.list_messages(thread)).items}
        for message in batch:
            assert saferepr(stored[message.message_id]) == saferepr(message.parts)

    async def test_rich_values_take_their_json_form(self, chat: Any, thread: str) -> None:
        values, forms = ([pair[at] for pair in COERCED] for at in (0, 1))
        await chat.save_messages([self.message(thread, parts=values)])
        (stored,) = (await chat.list_messages(thread)).items
        assert stored.parts == forms

    async def test_what_cannot_be_stored_is_refused_with_its_batch(
        self, chat: Any, thread: str
    ) -> None:
        good = self.message(thread, "good")
        for field, values in BAD_MESSAGES.items():
            for what, bad in values.items():
                batch = [good, replace(good, **{"message_id": "bad", field: bad}), good]
                with pytest.raises(InvalidInputError) as caught:
                    await chat.save_messages(batch)
                assert caught.value.field == field, what
        assert await self.listed(chat, thread) == []

    async def test_what_is_no_message_is_refused(self, chat: Any, thread: str) -> None:
        good = self.message(thread)
        for bad in (good, None, [good, None], [{"thread_id": thread}], "text"):
            with pytest.raises(InvalidInputError) as caught:
                await chat.save_messages(bad)
            assert caught.value.field == "messages"
        assert await self.listed(chat, thread) == []

    async def test_nothing_is_a_batch_too(self, chat: Any) -> None:
        await chat.save_messages([])
        await chat.save_messages(iter(()))

    async def test_a_large_batch_is_saved(self, chat: Any, thread: str) -> None:
        ids = [f"{number:05}" for number in range(5000)]
        await chat.save_messages(
            self.message(thread, id_, created_at=START, parts=[int(id_)]) for id_ in ids
        )
        stored = (await chat.list_messages(thread)).items
        assert [message.message_id for message in stored] == ids
        assert [message.parts for message in stored] == [[number] for number in range(5000)]

    async def test_a_message_saved_again_is_replaced_and_keeps_its_time(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        first, second = self.series(thread, ["a", "b"])
        await chat.save_messages([first, second])
        changed = replace(first, parts=["new"], role="tool", session_id="s", user_id="ann")
        await other_chat.save_messages([replace(changed, created_at=START + 60 * SECOND)])
        assert (await chat.list_messages(thread)).items == [changed, second]
        await chat.save_messages([replace(first, created_at=None)])
        assert (await chat.list_messages(thread)).items == [first, second]

    async def test_a_batch_may_be_saved_twice(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        batch = self.series(thread, ["a", "b", "c"])
        await chat.save_messages(batch)
        await other_chat.save_messages(batch[::-1])
        assert (await chat.list_messages(thread)).items == batch

    async def test_of_two_with_the_same_ids_in_a_batch_the_later_counts(
        self, chat: Any, thread: str
    ) -> None:
        first, other, again = self.series(thread, ["a", "b", "a"])
        again = replace(again, parts=["again"])
        await chat.save_messages([first, other, again])
        expected = [replace(again, created_at=first.created_at), other]
        assert (await chat.list_messages(thread)).items == expected

    async def test_ids_belong_to_their_thread(self, chat: Any, thread: str) -> None:
        one, two = self.message(thread, created_at=START), self.message(f"{thread}-2", parts=[2])
        await chat.save_messages([one, two])
        assert (await chat.list_messages(thread)).items == [one]
        assert await self.listed(chat, f"{thread}-3") == []

    async def test_ids_that_look_alike_are_different(self, chat: Any, thread: str) -> None:
        threads = [f"{thread}-{id_}" for id_ in self.ids]
        batch = [self.message(of, id_, parts=[of, id_]) for of in threads for id_ in self.ids]
        await chat.save_messages(batch)
        for of in threads:
            stored = (await chat.list_messages(of)).items
            assert sorted(m.parts for m in stored) == sorted([of, id_] for id_ in self.ids)
        for number, id_ in enumerate(threads):
            session = ChatSession(session_id=id_, thread_id=thread, sdk_version=str(number))
            await chat.save_session(session)
        loaded = [await chat.load_session(id_) for id_ in threads]
        assert [session.sdk_version for session in loaded] == [*map(str, range(len(threads)))]

    async def test_long_ids_are_stored(self, chat: Any, thread: str) -> None:
        long = thread + "x" * (255 - len(thread))
        message = self.message(long, long, role="r" * 255, session_id=long, user_id=long)
        await chat.save_messages([replace(message, created_at=START)])
        assert await self.listed(chat, long, long) == [long]

    async def test_times_come_back_as_the_same_moments_in_utc(self, chat: Any, thread: str) -> None:
        ids = [f"{number:02}" for number in range(len(TIMES))]
        pairs = zip(ids, TIMES, strict=True)
        await chat.save_messages([self.message(thread, id_, created_at=at) for id_, at in pairs])
        stored = (await chat.list_messages(thread)).items
        assert [(m.created_at, m.message_id) for m in stored] == sorted(
            zip(TIMES, ids, strict=True)
        )
        assert {m.created_at.utcoffset() for m in stored} == {timedelta()}

    async def test_times_are_kept_as_exactly_as_the_column_can(
        self, chat: Any, thread: str
    ) -> None:
        ats = [START + number * self.step for number in range(5)]
        await chat.save_messages(
            [self.message(thread, f"m{-number}", created_at=at) for number, at in enumerate(ats)]
        )
        assert [m.created_at for m in (await chat.list_messages(thread)).items] == ats

    # Pages

    async def test_messages_come_by_time_and_then_by_id(self, chat: Any, thread: str) -> None:
        batch = [
            self.message(thread, id_, created_at=START + seconds * SECOND)
            for id_, seconds in (("b", 2), ("a", 1), ("d", 0), ("c", 1), ("a2", 1))
        ]
        for message in batch:
            await chat.save_messages([message])
        assert await self.listed(chat, thread) == ["d", "a", "a2", "c", "b"]

    async def test_pages_cut_a_list_in_pieces(self, chat: Any, thread: str) -> None:
        ids = [f"m{number}" for number in range(7)]
        # the times of two are equal, and those of four
        batch = [
            self.message(thread, id_, created_at=START + at * SECOND, session_id=f"s-{thread}")
            for id_, at in zip(ids, (0, 1, 1, 2, 2, 2, 2), strict=True)
        ]
        await chat.save_messages(batch[::-1])
        for limit in (1, 2, 3, 7, 8):
            expected = [ids[at : at + limit] for at in range(0, len(ids), limit)]
            assert await self.paged(chat, thread, limit=limit) == expected
            assert await self.paged(chat, thread, f"s-{thread}", limit=limit) == expected

    async def test_pages_hold_while_others_write(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        b, d, f, h = self.series(thread, ["b", "d", "f", "h"])
        await chat.save_messages([b, d, f, h])
        page = await chat.list_messages(thread, limit=2)
        assert page.items == [b, d]
        await other_chat.save_messages(
            [
                self.message(thread, "a", created_at=START - SECOND),
                self.message(thread, "c", created_at=d.created_at),
                self.message(thread, "e", created_at=d.created_at),
                self.message(thread, "g", created_at=START + 4 * SECOND),
                replace(d, parts=["changed"]),
                replace(f, parts=["changed"]),
            ]
        )
        page = await other_chat.list_messages(thread, limit=3, cursor=page.next_cursor)
        assert [message.message_id for message in page.items] == ["e", "f", "h"]
        assert page.items[1].parts == ["changed"]
        page = await chat.list_messages(thread, limit=3, cursor=page.next_cursor)
        assert [message.message_id for message in page.items] == ["g"]
        assert page.next_cursor is None

    async def test_a_cursor_is_for_its_list_alone(self, chat: Any, thread: str) -> None:
        batch = self.series(thread, ["a", "b", "c"], session_id=f"s-{thread}")
        await chat.save_messages(batch)
        cursor = (await chat.list_messages(thread, limit=1)).next_cursor
        assert cursor
        first, last = ("A" if cursor[0] != "A" else "B"), ("A" if cursor[-5] != "A" else "B")
        for other in (first + cursor[1:], cursor[:-5] + last + cursor[-4:], "", "?", "e30", 5, "ü"):
            with pytest.raises(InvalidInputError) as caught:
                await chat.list_messages(thread, cursor=other)
            assert caught.value.field == "cursor"
        for arguments in ((f"{thread}-2",), (thread, f"s-{thread}")):
            with pytest.raises(InvalidInputError) as caught:
                await chat.list_messages(*arguments, cursor=cursor)
            assert caught.value.field == "cursor"
        page = await chat.list_messages(thread, limit=5, cursor=cursor)
        assert page.items == batch[1:]

    async def test_a_lists_arguments_are_checked(self, chat: Any, thread: str) -> None:
        for limit in (0, -1, 1001, 1.0, True, "1"):
            with pytest.raises(InvalidInputError) as caught:
                await chat.list_messages(thread, limit=limit)
            assert caught.value.field == "limit"
        for bad in BAD_IDS.values():
            for field, arguments in {"thread_id": (bad,), "session_id": (thread, bad)}.items():
                with pytest.raises(InvalidInputError) as caught:
                    await chat.list_messages(*arguments)
                assert caught.value.field == field

    # Sessions: save, load, archive, restore

    def session(self, thread: str, **fields: Any) -> ChatSession:
        """A session of a thread; ``fields`` are further ones of `ChatSession`."""
        named = {"session_id": f"s-{thread}", "thread_id": thread, "sdk_version": "1.2.3"}
        return ChatSession(**{**named, **fields})

    async def test_a_saved_session_reads_back_equal(self, chat: Any, thread: str) -> None:
        session = self.session(
            thread, state={"a": [1, 1.0]}, metadata={"é": None}, created_at=START
        )
        before = datetime.now(UTC)
        assert await chat.save_session(session) is None
        loaded = await chat.load_session(session.session_id)
        assert before - self.step <= loaded.updated_at <= datetime.now(UTC) + self.step
        assert loaded == replace(session, updated_at=loaded.updated_at)
        assert {t.utcoffset() for t in (loaded.created_at, loaded.updated_at)} == {timedelta()}

    async def test_state_and_metadata_may_be_missing_or_empty(self, chat: Any, thread: str) -> None:
        for state, metadata in ((None, None), ({}, {}), ([], None), ([{"a": 1}], {"b": []})):
            await chat.save_session(self.session(thread, state=state, metadata=metadata))
            loaded = await chat.load_session(f"s-{thread}")
            assert (loaded.state, loaded.metadata) == (state, metadata)

    async def test_a_sessions_values_come_back_with_value_and_type(
        self, chat: Any, thread: str
    ) -> None:
        await chat.save_session(
            self.session(thread, state=self.values, metadata={"all": [self.values]})
        )
        loaded = await chat.load_session(f"s-{thread}")
        assert saferepr(loaded.state) == saferepr(self.values)
        assert saferepr(loaded.metadata) == saferepr({"all": [self.values]})

    async def test_there_is_no_unknown_session(self, chat: Any, thread: str) -> None:
        assert await chat.load_session(thread) is None

    async def test_a_session_saved_again_is_replaced_and_keeps_its_time(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        await chat.save_session(self.session(thread, state={"n": 1}, created_at=START))
        first = await chat.load_session(f"s-{thread}")
        changed = replace(
            first, thread_id=f"{thread}-2", sdk_version="2", state={"n": 2}, metadata={"b": 1}
        )
        await other_chat.save_session(replace(changed, created_at=START + SECOND))
        second = await chat.load_session(f"s-{thread}")
        assert second == replace(changed, updated_at=second.updated_at)
        assert second.updated_at >= first.updated_at

    async def test_a_session_that_cannot_be_stored_is_refused(self, chat: Any, thread: str) -> None:
        await chat.save_session(self.session(thread, state={"n": 1}))
        stored = await chat.load_session(f"s-{thread}")
        for field, values in BAD_SESSIONS.items():
            for what, bad in values.items():
                changed = replace(self.session(thread, state=[]), **{field: bad})
                with pytest.raises(InvalidInputError) as caught:
                    await chat.save_session(changed)
                assert caught.value.field == field, what
        assert await chat.load_session(f"s-{thread}") == stored

    async def test_an_id_that_cannot_be_is_refused(self, chat: Any) -> None:
        for call in (chat.load_session, chat.archive_session, chat.restore_session):
            for bad in BAD_IDS.values():
                with pytest.raises(InvalidInputError) as caught:
                    await call(bad)
                assert caught.value.field == "session_id"

    async def test_messages_of_an_archived_session_are_left_out(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        one, two, three, four = self.series(thread, ["a", "b", "c", "d"])
        archived, live = f"s-{thread}", f"s-{thread}-2"
        await chat.save_session(self.session(thread))
        await chat.save_session(self.session(thread, session_id=live))
        one, two = replace(one, session_id=archived), replace(two, session_id=live)
        three = replace(three, session_id=f"s-{thread}-3")  # which has no row
        await chat.save_messages([one, two, three, four])
        assert await self.listed(chat, thread) == ["a", "b", "c", "d"]

        await other_chat.archive_session(archived)
        assert await self.listed(chat, thread) == ["b", "c", "d"]
        assert await self.paged(chat, thread, limit=1) == [["b"], ["c"], ["d"]]
        assert await self.listed(chat, thread, archived) == ["a"]
        assert await self.listed(chat, thread, live) == ["b"]
        assert await self.listed(chat, thread, f"s-{thread}-3") == ["c"]

        await chat.restore_session(archived)
        assert await self.listed(other_chat, thread) == ["a", "b", "c", "d"]

    async def test_a_session_that_was_never_saved_can_be_archived(
        self, chat: Any, thread: str
    ) -> None:
        await chat.save_messages(self.series(thread, ["a"], session_id=f"s-{thread}"))
        before = datetime.now(UTC)
        await chat.archive_session(f"s-{thread}")
        assert await self.listed(chat, thread) == []
        loaded = await chat.load_session(f"s-{thread}")
        assert (loaded.thread_id, loaded.sdk_version) == ("", "unknown")
        assert (loaded.state, loaded.metadata) == (None, None)
        assert loaded.created_at == loaded.updated_at == loaded.archived_at
        assert before - self.step <= loaded.archived_at <= datetime.now(UTC) + self.step

        await chat.archive_session(f"s-{thread}-2", thread_id=thread, sdk_version="9")
        loaded = await chat.load_session(f"s-{thread}-2")
        assert (loaded.thread_id, loaded.sdk_version) == (thread, "9")

    async def test_archived_twice_it_keeps_the_first_time(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        await chat.save_session(self.session(thread, state={"n": 1}, archived_at=START))
        first = await chat.load_session(f"s-{thread}")
        assert first.archived_at == START
        await other_chat.archive_session(f"s-{thread}", thread_id="other", sdk_version="other")
        assert await chat.load_session(f"s-{thread}") == first

    async def test_saving_leaves_an_archived_session_archived_and_a_live_one_live(
        self, chat: Any, thread: str
    ) -> None:
        await chat.save_session(self.session(thread))
        live = await chat.load_session(f"s-{thread}")
        await chat.archive_session(f"s-{thread}")
        archived = await chat.load_session(f"s-{thread}")
        assert archived == replace(
            live, updated_at=archived.updated_at, archived_at=archived.archived_at
        )
        await chat.save_session(replace(live, state={"n": 1}))
        again = await chat.load_session(f"s-{thread}")
        assert (again.archived_at, again.state) == (archived.archived_at, {"n": 1})

        await chat.restore_session(f"s-{thread}")
        assert (await chat.load_session(f"s-{thread}")).archived_at is None
        await chat.save_session(archived)
        assert (await chat.load_session(f"s-{thread}")).archived_at is None

    async def test_a_session_can_be_archived_again_once_it_is_restored(
        self, chat: Any, thread: str
    ) -> None:
        await chat.save_session(self.session(thread, created_at=START, archived_at=START))
        await chat.restore_session(f"s-{thread}")
        await chat.archive_session(f"s-{thread}")
        loaded = await chat.load_session(f"s-{thread}")
        assert loaded.archived_at > START
        assert loaded.archived_at == loaded.updated_at
        assert loaded.created_at == START

    async def test_to_restore_what_is_live_or_unknown_changes_nothing(
        self, chat: Any, thread: str
    ) -> None:
        await chat.restore_session(f"s-{thread}")
        assert await chat.load_session(f"s-{thread}") is None
        await chat.save_session(self.session(thread))
        stored = await chat.load_session(f"s-{thread}")
        await chat.restore_session(f"s-{thread}")
        assert await chat.load_session(f"s-{thread}") == stored

    # Several at once

    async def test_one_message_from_many_at_once_is_there_once_and_whole(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        versions = [self.message(thread, role=f"r{n}", parts=[n] * 10) for n in range(12)]
        await asyncio.gather(
            *((chat, other_chat)[n % 2].save_messages([m]) for n, m in enumerate(versions))
        )
        (stored,) = (await chat.list_messages(thread)).items
        number = stored.parts[0]
        assert (stored.role, stored.parts) == (f"r{number}", [number] * 10)

    async def test_batches_with_messages_in_common_do_not_stop_each_other(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        ids = [f"m{number:02}" for number in range(40)]
        batches = [self.series(thread, ids), self.series(thread, ids)[::-1]] * 3
        await asyncio.gather(
            *((chat, other_chat)[n % 2].save_messages(batch) for n, batch in enumerate(batches))
        )
        assert sorted(await self.listed(chat, thread)) == ids

    async def test_many_archive_a_session_at_once(
        self, chat: Any, other_chat: Any, thread: str
    ) -> None:
        await asyncio.gather(
            *((chat, other_chat)[n % 2].archive_session(f"s-{thread}") for n in range(12))
        )
        first = await chat.load_session(f"s-{thread}")
        assert first.archived_at == first.updated_at == first.created_at

    # Tables

    async def test_the_tables_are_found_good(self, chat: Any) -> None:
        await chat.validate_schema()
