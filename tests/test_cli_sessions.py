"""The commands that show sessions, and file them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import (
    PATIENCE,
    environment,
    fill,
    next_line,
    objects,
    ok,
    on_terminal,
    process,
    refused,
    run,
    said,
    start,
    talk,
)
from engines import engine_for
from servers import free_port, run_sync
from sqlalchemy import text

from adk_sessions import Event, SessionService
from adk_sessions.cli import main

NewDatabase = Callable[[str], str]
SECRET = "top-secret"

CONVERSATION = """\
2023-11-14 22:13:27  user
  What does tea cost?

2023-11-14 22:13:34  clerk
  price(of="tea") → 3.5

2023-11-14 22:13:41  clerk
  state: price = 3.5, user:seen = ["tea"]

2023-11-14 22:13:48  clerk
  It costs 3.50.
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, migrated_file: Path) -> str:
    """A database that no test changes."""
    path = tmp_path_factory.mktemp("shop") / "shop.db"
    shutil.copy(migrated_file, path)
    run_sync(fill(f"sqlite:///{path}"))
    return f"sqlite:///{path}"


async def serve(url: str, work: Callable[[SessionService], Any]) -> Any:
    async with SessionService(url) as service:
        return await work(service)


def stored(
    url: str, events: list[dict[str, Any]], ids: tuple[str, str, str] = ("a", "u", "s")
) -> None:
    """A session with these events."""
    run_sync(serve(url, lambda service: talk(service, *ids, events)))


# --- as processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_every_command_is_a_process(kind: str, migrated_database: NewDatabase) -> None:
    url = migrated_database(kind)
    run_sync(fill(url))
    listed = process("list", "--app", "shop", "--counts", url=url)
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert [line[:2] for line in lines[2:]] == [
        *(["bob", "b2"], ["bob", "b1"], ["bob", "b0"]),
        ["ann", "s"],
    ]
    assert lines[-1][-1] == "4"
    assert listed.stderr == ""
    shown = process("show", "shop", "ann", "s", url=url).stdout
    assert CONVERSATION in shown
    assert re.search(r"  state\n  paid = true, topic deleted\n", shown)
    assert shown.endswith('\nstate\n  paid = true\n  price = 3.5\n  user:seen = ["tea"]\n')
    *apps, size = objects(process("stats", "--json", url=url).stdout)
    assert [list(line["app"].values())[:5] for line in apps] == [
        ["other", 1, 0, 1, 1],
        ["shop", 4, 0, 2, 4],
    ]
    assert size["bytes"] > 40_000
    assert process("archive", "shop", "bob", "b0", url=url).stdout == "Archived.\n"
    labelled = process("label", "shop", "bob", "b1", "--set", "team=a", "--title", "Tea", url=url)
    assert "Tea\n" in labelled.stdout
    assert "team=a\n" in labelled.stdout
    assert process("fork", "shop", "ann", "s", "--at", "e1", "--as", "f", url=url).stdout == "f\n"
    left = objects(ok("list", "--app", "shop", "--counts", "--json", url=url))
    assert [(line["session"]["id"], line["session"]["event_count"]) for line in left] == [
        *(("f", 1), ("b2", 0), ("b1", 0), ("s", 4))
    ]
    assert process("restore", "shop", "bob", "b0", url=url).stdout == "Restored.\n"
    assert "b0" in ok("list", "--app", "shop", url=url)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_conversation_is_followed(kind: str, migrated_database: NewDatabase) -> None:
    url = migrated_database(kind)
    stored(url, [{"content": said(f"line {number}")} for number in range(3)])
    tail = start(*("tail", "a", "u", "s", "--last", "1", "--interval", "0.1", "--json"), url=url)
    try:
        first = json.loads(next_line(tail))
        assert first["event"]["id"] == "e3"

        async def append(service: SessionService) -> None:
            session = await service.get_session(app_name="a", user_id="u", session_id="s")
            assert session is not None
            for name in ("new", "newer"):
                await service.append_event(session, Event(id=name, author="u", content="now"))

        run_sync(serve(url, append))
        # each line is there as soon as it is printed
        assert json.loads(next_line(tail))["event"]["id"] == "new"
        assert json.loads(next_line(tail))["event"]["content"] == "now"
        tail.send_signal(signal.SIGINT)
        rest, complaints = tail.communicate(timeout=PATIENCE)
        assert (tail.returncode, rest, complaints) == (130, "", "")
    finally:
        tail.kill()
        tail.communicate()


def test_following_ends_with_the_session(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    stored(url, [{"content": said("one")}, {"content": said("two")}])
    tail = start("tail", "a", "u", "s", "--after", "e1", "--interval", "0.05", "--ids", url=url)
    try:
        assert next_line(tail) == "2023-11-14 22:13:34  clerk  e2\n"
        assert next_line(tail) == "  two\n"
        run_sync(serve(url, lambda service: service.delete_session("a", "u", "s")))
        _, complaint = tail.communicate(timeout=PATIENCE)
        assert tail.returncode == 1
        assert complaint == "Error: The session has been deleted.\n"
    finally:
        tail.kill()
        tail.communicate()
    assert "Session 's' not found." in refused("tail", "a", "u", "s", url=url)
    refused("tail", "a", "u", "s", "--after", "e", "--last", "1", url=url, status=2)


def test_whoever_has_read_enough_ends_it_quietly(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    stored(url, [{"content": said(f"{number} " * 3000)} for number in range(60)])
    shell = f"{sys.executable} -m adk_sessions show a u s | head -1"
    done = subprocess.run(
        shell, shell=True, env=environment(url), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "a / u / s\n"
    assert done.stderr == ""


# --- list --------------------------------------------------------------------------------------


def ids(printed: str) -> list[str]:
    return [line["session"]["id"] for line in objects(printed) if "session" in line]


def test_a_list_goes_on_where_it_stopped(shop: str) -> None:
    first = run("list", "--app", "shop", "--limit", "3", url=shop)
    assert first.exit_code == 0
    assert len(first.stdout.splitlines()) == 2 + 3
    found = re.fullmatch(r"There is more: --cursor (\S+), or --all\.\n", first.stderr)
    assert found
    rest = ok("list", "--app", "shop", "--limit", "3", "--cursor", found[1], "--json", url=shop)
    assert ids(rest) == ["s"]
    *sessions, last = objects(ok("list", "--app", "shop", "--limit", "3", "--json", url=shop))
    assert [line["session"]["id"] for line in sessions] == ["b2", "b1", "b0"]
    assert last == {"next_cursor": found[1]}
    assert "cursor" in refused("list", "--app", "shop", "--cursor", "nonsense", url=shop)


def test_a_list_to_the_end(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adk_sessions.cli.sessions._PAGE", 2)
    whole = ("list", "--app", "shop", "--all")
    assert ids(ok(*whole, "--json", url=shop)) == ["b2", "b1", "b0", "s"]
    printed = ok(*whole, url=shop)
    # one table, whatever it was read in
    assert printed.count("user") == 1
    assert len(printed.splitlines()) == 2 + 4


def test_a_list_is_narrowed(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")

    async def make(service: SessionService) -> None:
        for name in ("one", "two", "three"):
            await talk(service, "a", "u", name, [], time=1_600_000_000)
        await service.update_session("a", "u", "one", title="First", labels={"x": "1", "y": "2"})
        await service.update_session("a", "u", "two", labels={"x": "1", "y": "=3"})
        await service.archive_session("a", "u", "three")
        session = await service.get_session(app_name="a", user_id="u", session_id="one")
        assert session is not None
        await service.append_event(session, Event(author="u", content="later"))

    run_sync(serve(url, make))
    options: dict[tuple[str, ...], list[str]] = {
        (): ["two", "one"],
        ("--order", "updated"): ["one", "two"],
        ("--label", "x=1"): ["two", "one"],
        ("--label", "x=1", "--label", "y=2"): ["one"],
        ("--label", "y==3"): ["two"],
        ("--archived",): ["three"],
        ("--with-archived",): ["three", "two", "one"],
        ("--user", "nobody"): [],
    }
    for given, expected in options.items():
        assert ids(ok("list", "--app", "a", *given, "--json", url=url)) == expected, given
    printed = ok("list", "--app", "a", "--with-archived", url=url)
    assert re.search(r" one +.* First +x=1 y=2\n", printed)
    assert re.search(r" three +.* \(archived\)\n", printed)


def test_a_list_of_nothing(shop: str) -> None:
    assert ok("list", "--app", "nobody", url=shop) == ""
    assert ok("list", "--app", "nobody", "--json", url=shop) == ""


def test_without_an_app_the_apps_are_listed(shop: str) -> None:
    lines = [line.split()[:2] for line in ok("list", url=shop).splitlines()]
    assert (lines[0], lines[2:]) == (["app", "sessions"], [["other", "1"], ["shop", "4"]])
    apps = objects(ok("list", "--json", url=shop))
    assert [line["app"]["app_name"] for line in apps] == ["other", "shop"]
    for option in (("--user", "ann"), ("--label", "a=b"), ("--archived",), ("--cursor", "x")):
        assert "--app" in refused("list", *option, url=shop, status=2)


@pytest.mark.parametrize(
    "options",
    [
        ("--label", "novalue"),
        ("--label", "=x"),
        ("--limit", "0"),
        ("--order", "size"),
        ("--archived", "--with-archived"),
        ("extra",),
    ],
)
def test_a_list_asked_wrongly(options: tuple[str, ...], shop: str) -> None:
    refused("list", "--app", "shop", *options, url=shop, status=2)


def test_ids_are_whole_unless_a_terminal_is_too_narrow(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    long = ("application", "u" * 70, "s" * 120)
    stored(url, [], long)
    assert f"{long[1]}  {long[2]}" in ok("list", "--app", "application", url=url)
    status, shown = on_terminal("list", "--app", "application", url=url, columns=80)
    assert status == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) <= 80
    assert re.search(r"u{8,}…  s{8,}…  20\d\d-\S+ \d\d:\d\d", plain)


# --- stats -------------------------------------------------------------------------------------


def test_stats_of_one_app(shop: str) -> None:
    printed = ok("stats", "--app", "shop", url=shop).splitlines()
    assert printed[0].split() == [
        *("app", "sessions", "archived", "users", "events", "oldest", "newest")
    ]
    assert printed[2].split()[:5] == ["shop", "4", "0", "2", "4"]
    assert "nothing of the application 'nobody'" in refused("stats", "--app", "nobody", url=shop)
    whole = ok("stats", url=shop)
    assert re.search(r"Tables and indexes: \d\.\d MB\n", whole)


def test_stats_count_events_that_have_no_session(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    assert ok("stats", "--json", url=url).count("\n") == 1
    stored(url, [{"content": "x"}])

    async def lose() -> None:
        async with engine_for(url) as engine, engine.begin() as conn:
            await conn.execute(text("PRAGMA foreign_keys = OFF"))
            await conn.execute(text("DELETE FROM sessions"))

    run_sync(lose())
    [app, _] = objects(ok("stats", "--json", url=url))
    assert (app["app"]["sessions"], app["app"]["events"], app["app"]["oldest"]) == (0, 1, None)


# --- show --------------------------------------------------------------------------------------


def shown(url: str, *options: str) -> str:
    return ok("show", "a", "u", "s", *options, url=url)


def test_a_conversation_at_an_event(shop: str) -> None:
    there = ok("show", "shop", "ann", "s", "--at", "e2", url=shop)
    assert '  price(of="tea") …\n' in there
    assert "3.5" not in there
    assert there.endswith('\nstate there\n  topic = "tea"\n  user:seen = ["tea"]\n')
    lines = objects(ok("show", "shop", "ann", "s", "--at", "e2", "--json", url=shop))
    assert [event["event"]["id"] for event in lines[1:]] == ["e1", "e2"]
    # what has changed after the event has not happened there
    assert "paid" not in ok("show", "shop", "ann", "s", "--at", "e4", url=shop)
    assert "no such event" in refused("show", "shop", "ann", "s", "--at", "e9", url=shop)


def test_the_end_of_a_conversation(shop: str) -> None:
    last = ok("show", "shop", "ann", "s", "--last", "2", "--ids", url=shop)
    assert "tea cost" not in last
    # an answer whose call is not shown is an answer all the same
    assert "  price → 3.5\n  state: price = 3.5" in last
    assert "clerk  e4\n" in last
    assert "paid = true, topic deleted" in last
    none = ok("show", "shop", "ann", "s", "--last", "0", url=shop)
    assert "clerk" not in none
    assert "paid = true" in none
    both = ok("show", "shop", "ann", "s", "--last", "1", "--at", "e3", url=shop)
    assert ("e3" in both, "price → 3.5" in both, "tea cost" in both) == (False, True, False)


def test_a_conversation_as_json(shop: str) -> None:
    lines = objects(ok("show", "shop", "ann", "s", "--json", url=shop))
    assert [next(iter(line)) for line in lines] == [
        "session",
        "event",
        "event",
        "event",
        "event",
        "change",
    ]
    assert lines[0]["session"]["state"] == {"paid": True, "price": 3.5, "user:seen": ["tea"]}
    assert lines[0]["session"]["event_count"] == 4
    assert lines[1]["event"]["content"] == said("What does tea cost?")
    change = lines[-1]["change"]
    assert (change["after"], change["delta"], change["deleted"]) == (
        *("e4", {"paid": True}),
        ["topic"],
    )


def test_a_session_that_is_not_there(shop: str) -> None:
    assert "Session 'x' not found." in refused("show", "shop", "ann", "x", url=shop)
    assert "not found" in refused("show", "shop", "ann", "x" * 200, url=shop)
    refused("show", "shop", "ann", url=shop, status=2)


@pytest.mark.parametrize(
    "names", [("", "", ""), ("a b", " ", "\t"), ("-a", "--user", "-5"), ("a", "[b]x[/b]", ":tea:")]
)
def test_ids_may_be_anything(names: tuple[str, str, str], migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    stored(url, [{"content": "Hello"}], names)
    printed = ok("show", "--", *names, url=url)
    assert printed.endswith("  Hello\n")
    if names[0] == "a":
        assert printed.startswith("a / [b]x[/b] / :tea:\n")
    assert "Hello" in ok("show", "--json", "--", *names, url=url)
    assert len(objects(ok("list", f"--app={names[0]}", "--json", url=url))) == 1
    assert len(objects(ok("list", "--app", names[0], "--user", names[1], "--json", url=url))) == 1
    ok("archive", "--", *names, url=url)
    ok("restore", "--", *names, url=url)


NASTY = "\x1b]0;owned\x07\x1b[2Jred\x9b31m\u202etxet\u2028\x00\ud800 [bold]not[/bold] :smile:"
CLEAN = r"\x1b]0;owned\x07\x1b[2Jred\x9b31m\u202etxet\u2028\x00\ud800 [bold]not[/bold] :smile:"


def test_what_is_stored_is_no_command_to_a_terminal(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    field = NASTY.replace("\ud800", "")  # which no field of an event holds
    call = {"id": "c", "name": NASTY, "args": {NASTY: NASTY}}
    answer = {"id": "c", "name": NASTY, "response": {"result": NASTY}}
    stored(
        url,
        [
            {"author": field, "content": said(NASTY), "error_message": NASTY},
            {"content": {"parts": [{"function_call": call}, {NASTY: NASTY}]}},
            {"content": {"parts": [{"function_response": answer}]}},
            {"content": {NASTY: [NASTY]}, field: NASTY},
            {"content": "x", "delta": {"key": NASTY}},
        ],
    )

    async def name(service: SessionService) -> None:
        title = field.replace("\0", "")
        await service.update_session("a", "u", "s", title=title, labels={"l": title})

    run_sync(serve(url, name))
    printed = [shown(url), shown(url, "--width", "40"), shown(url, "--json")]
    printed += [ok("list", "--app", "a", url=url), ok("list", "--app", "a", "--json", url=url)]
    printed += [ok("label", "a", "u", "s", "--set", "k=v", url=url)]
    for output in printed:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800]", output)
    assert f"  {CLEAN}\n" in printed[0]
    assert "[bold]not[/bold] :smile:" in printed[3]
    status, terminal = on_terminal("show", "a", "u", "s", url=url, columns=200)
    assert status == 0
    assert CLEAN in terminal
    # nothing but colours
    assert set(re.findall(r"\x1b\[?[0-9;]*(.)", terminal)) <= {"m"}


def test_text_is_folded_to_a_width(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    words = "word " * 30
    args = {"q": "long " * 50}
    call = {"function_call": {"id": "c", "name": "f", "args": args}}
    answer = {"function_response": {"id": "c", "name": "f", "response": {"a": "b" * 500}}}
    stored(
        url,
        [
            {"content": {"parts": [{"text": f"{words}\n\nnext\r\nline"}, call]}},
            {"content": {"parts": [answer]}},
        ],
    )
    assert f"  {words.strip()}\n\n  next\n  line\n" in shown(url)
    folded = shown(url, "--width", "40")
    assert max(map(len, folded.splitlines())) <= 40
    assert f"  {'word ' * 7}".rstrip() + "\n" in folded
    [line] = [line for line in shown(url).splitlines() if "f(" in line]
    assert len(line) < 250
    assert "\n e" not in shown(url)
    refused("show", "a", "u", "s", "--width", "3", url=url, status=2)


def test_the_forms_of_events(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    deep: Any = {"unknown": {"thing": [1, None, float("nan")]}}
    call = {"functionCall": {"id": "1", "name": "camel", "args": {"x": 1}}}
    back = {"functionResponse": {"id": "1", "name": "camel", "response": {"error": "no such"}}}
    late = {"function_call": {"name": "wait"}}
    blob = {"inline_data": {"mime_type": "image/png", "data": "QUJD" * 100}}
    file = {"file_data": {"mime_type": "text/plain", "file_uri": "gs://bucket/a"}}
    code = [
        {"executable_code": {"language": "PYTHON", "code": "print(1)"}},
        {"code_execution_result": {"outcome": "OK", "output": "1"}},
    ]
    actions: dict[str, Any] = {
        "artifact_delta": {"a.png": 2},
        "transfer_to_agent": "boss",
        "rewind_before_invocation_id": "i0",
        "escalate": True,
    }
    stored(
        url,
        [
            {"content": "only text"},
            {"content": {"text": "in a field"}},
            {"content": ["one", {"text": "two"}, 3]},
            {"content": deep},
            {"content": {"parts": [{"text": "hm", "thought": True}, call, late]}},
            {"content": {"parts": [back]}},
            {"content": {"parts": [blob, file, *code]}},
            {"content": None, "actions": actions},
            {"content": None, "error_code": "SAFETY", "error_message": "refused"},
            {"content": said("cut"), "interrupted": True, "custom_metadata": {"k": 1}},
            {"content": None, "output_transcription": {"text": "heard", "finished": True}},
        ],
    )
    printed = shown(url)
    for expected in (
        "only text",
        "in a field",
        "one\n  two\n  3",
        'unknown: {"thing": [1, null, "nan"]}',
        "(thinking) hm\n  camel(x=1) → error: no such\n  wait() …",
        "[image/png, 300 bytes]\n  [text/plain] gs://bucket/a\n  print(1)\n  => 1",
        "saved: a.png version 2\n  goes on: boss",
        "taken back: everything from invocation i0 on\n  escalate: true",
        "error: SAFETY refused",
        'cut\n  interrupted\n  custom_metadata={"k": 1}',
        "(spoken) heard",
    ):
        assert f"\n  {expected}\n" in printed
    assert objects(shown(url, "--json"))[4]["event"]["content"]["unknown"]["thing"][2] == "nan"


def test_answers_that_come_late_stand_by_themselves(
    migrated_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adk_sessions.cli.conversation._AHEAD", 3)
    url = migrated_database("sqlite")
    call = {"function_call": {"id": "c", "name": "wait", "args": {}}}
    answer = {"function_response": {"id": "c", "name": "wait", "response": {"result": "done"}}}
    talk = [said(f"line {number}") for number in range(5)]
    contents = [{"parts": [call]}, *talk, {"parts": [answer]}]
    stored(url, [{"content": content} for content in contents])
    told = re.findall(r"^  (\S.*)$", shown(url), re.MULTILINE)
    assert told == ["wait() …", *(f"line {number}" for number in range(5)), "wait → done"]


def test_googles_events_are_shown(migrated_database: NewDatabase) -> None:
    pytest.importorskip("google.adk")
    from google.adk.events.event import Event as AdkEvent
    from google.genai import types

    from adk_sessions.adk import DatabaseSessionService

    url = migrated_database("sqlite")

    async def write() -> None:
        async with DatabaseSessionService(url) as service:
            session = await service.create_session(app_name="a", user_id="u", session_id="s")
            call = types.FunctionCall(id="c", name="roll", args={"sides": 6})
            answer = types.FunctionResponse(id="c", name="roll", response={"result": 4})
            parts = [
                [types.Part(text="Let me roll."), types.Part(function_call=call)],
                [types.Part(function_response=answer)],
                [types.Part(inline_data=types.Blob(mime_type="image/png", data=b"x" * 30))],
            ]
            for number, given in enumerate(parts):
                content = types.Content(role="model", parts=given)
                event = AdkEvent(author="dice", content=content, timestamp=1_700_000_000 + number)
                await service.append_event(session, event)

    run_sync(write())
    assert shown(url).endswith(
        "\n2023-11-14 22:13:20  dice\n  Let me roll.\n  roll(sides=6) → 4\n"
        "\n2023-11-14 22:13:22  dice\n  [image/png, 30 bytes]\n"
    )


def test_one_event_that_cannot_be_read_hides_no_other(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    stored(url, [{"content": said("before")}, {"content": "x"}, {"content": said("after")}])

    async def damage() -> None:
        async with engine_for(url) as engine, engine.begin() as conn:
            await conn.execute(text("UPDATE events SET event_data = '[]' WHERE id = 'e2'"))

    run_sync(damage())
    printed = shown(url)
    assert "  before\n" in printed
    assert "error: UNREADABLE_EVENT" in printed
    assert "  after\n" in printed
    assert len(objects(shown(url, "--json"))) == 4


def test_numbers_that_nobody_expects(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    stored(url, [{"content": {"n": 10**5000}, "delta": {"big": 10**5000, "inf": float("inf")}}])

    async def misplace() -> None:  # as software does that takes milliseconds for seconds
        async with engine_for(url) as engine, engine.begin() as conn:
            later = "UPDATE events SET event_data = json_set(event_data, '$.timestamp', 1.7e12)"
            await conn.execute(text(f"{later}, event_exact = NULL"))

    printed = shown(url)
    assert '  n: "0x' in printed
    assert '  inf = "inf"\n' in printed
    assert objects(shown(url, "--json"))[1]["event"]["actions"]["state_delta"]["inf"] == "inf"
    run_sync(misplace())
    assert "\n1700000000000.0  clerk\n" in shown(url)


def test_a_large_state_is_cut_short(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    state: dict[str, Any] = {f"k{number:03}": "v" * 1000 for number in range(60)}
    run_sync(serve(url, lambda service: talk(service, "a", "u", "s", [], state=state)))
    printed = shown(url)
    assert printed.endswith("\n  and 10 more\n")
    assert max(map(len, printed.splitlines())) < 200
    assert objects(shown(url, "--json"))[0]["session"]["state"] == state


# --- filing ------------------------------------------------------------------------------------


def test_labels_and_titles_go_and_come(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    stored(url, [])
    of = ("a", "u", "s")
    ok("label", *of, "--set", "a=1", "--set", "b=2", "--title", "First", url=url)
    ok("label", *of, "--remove", "a", "--title", "", url=url)
    [line] = objects(ok("list", "--app", "a", "--json", url=url))
    assert (line["session"]["title"], line["session"]["labels"]) == (None, {"b": "2"})
    refused("label", *of, url=url, status=2)
    refused("label", *of, "--set", "a=1", "--remove", "a", url=url)
    for command in ("label", "archive", "restore", "fork"):
        options = ("--title", "x") if command == "label" else ()
        assert "not found" in refused(command, "a", "u", "x", *options, url=url)


def test_a_copy_has_an_id_of_its_own(shop: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(shop.removeprefix("sqlite:///"), copy)
    url = f"sqlite:///{copy}"
    made = ok("fork", "shop", "ann", "s", url=url).strip()
    printed = ok("show", "shop", "ann", made, url=url)
    assert CONVERSATION in printed
    assert "already exists" in refused("fork", "shop", "ann", "s", "--as", made, url=url)
    assert "no such event" in refused("fork", "shop", "ann", "s", "--at", "e9", url=url)


# --- what holds for all ------------------------------------------------------------------------

# Each command that goes to a database, with what it cannot do without.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "list": (),
    "show": ("a", "u", "s"),
    "tail": ("a", "u", "s"),
    "stats": (),
    "archive": ("a", "u", "s"),
    "restore": ("a", "u", "s"),
    "label": ("a", "u", "s", "--title", "x"),
    "fork": ("a", "u", "s"),
    "prune": ("a", "--yes"),
    "erase": ("a", "u", "--yes"),
    "export": (),
    "import": ("-",),
}
SCHEMA = {"upgrade", "current", "check", "stamp", "sql", "finish-conversion"}


def test_no_command_is_left_out() -> None:
    assert {*ARGUMENTS, *SCHEMA, "doctor", "copy", "import-adk-sqlite"} == {*main.commands}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_a_passwords_never_shows(command: str, shop: str) -> None:
    given = ARGUMENTS[command]
    wrong = [
        f"postgresql://ann:{SECRET}@127.0.0.1:{free_port()}/db",
        f"postgresql://ann:{SECRET}@127.0.0.1:1/db?nonsense={SECRET}",
        f"{SECRET}://{SECRET}",
        f"sqlite://ann:{SECRET}@x",
    ]
    for url in wrong:
        for done in (run(command, *given, url=url), run(command, "--url", url, *given)):
            assert done.exit_code == 1, done.output
            assert isinstance(done.exception, SystemExit)
            assert done.stderr.startswith("Error: ")
            assert SECRET not in done.output
    for usage in (("--help",), ("--nonsense",)):
        assert SECRET not in run(command, *usage, url=wrong[0]).output


@pytest.mark.parametrize("command", ARGUMENTS)
def test_looking_makes_nothing(command: str, tmp_path: Path, fresh_database: NewDatabase) -> None:
    given = ARGUMENTS[command]
    missing = tmp_path / "folder" / "missing.db"
    assert "adk-sessions upgrade" in refused(command, *given, url=f"sqlite:///{missing}")
    assert not missing.parent.exists()
    empty = tmp_path / "empty.db"
    empty.touch()
    assert "adk-sessions upgrade" in refused(command, *given, url=f"sqlite:///{empty}")
    assert empty.stat().st_size == 0


def test_tables_elsewhere_are_found(fresh_database: NewDatabase) -> None:
    url = fresh_database("sqlite")
    ok("upgrade", "--table-prefix", "p_", url=url)
    assert ok("list", "--table-prefix", "p_", url=url) == ""
    assert "--table-prefix" in refused("list", "--table-prefix", "q_", url=url)


def test_an_old_locale_ends_nothing(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    stored(url, [{"content": said("naïve → 茶")}])
    done = run("show", "a", "u", "s", url=url, charset="ascii")
    assert r"na\xefve \u2192 \u8336" in done.stdout
    assert done.exit_code == 0


def test_the_help_says_what_holds_for_all() -> None:
    printed = " ".join(ok("--help").split())
    assert "Exit status: 0 done, 1" in printed
    assert "one object per line" in printed
    assert all(f" {name} " in printed for name in main.commands)
