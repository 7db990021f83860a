"""The commands that delete."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from commands import fill, objects, ok, on_terminal, process, refused, run, said, talk
from servers import run_sync

from adk_sessions import SessionService
from adk_sessions.lifecycle import ErasureReport

NewDatabase = Callable[[str], str]
TERMINAL = "There is no terminal to ask on: say --yes, or --dry-run to look."


def left(url: str) -> list[tuple[str, str, str]]:
    """The sessions that are there, but for those of the app that nobody touches."""

    async def look() -> list[tuple[str, str, str]]:
        async with SessionService(url) as service:
            found = [
                (session.app_name, session.user_id, session.id)
                for app in await service.list_apps()
                for session in (await service.page_sessions(app, archived=None)).items
            ]
        return sorted(found)

    return run_sync(look())


ALL = [("other", "ann", "s"), ("shop", "ann", "s"), *(("shop", "bob", f"b{n}") for n in range(3))]


async def expire(url: str, *sessions: str) -> None:
    async with SessionService(url) as service:
        for name in sessions:
            await service.update_session("shop", "bob", name, expire_time=1.0)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_destroying_as_processes(kind: str, migrated_database: NewDatabase) -> None:
    url = migrated_database(kind)
    run_sync(fill(url))
    run_sync(expire(url, "b0"))
    # nobody was asked, and nobody has said yes
    for command in (("prune", "shop"), ("erase", "shop", "ann")):
        assert TERMINAL in refused(*command, url=url, status=2)
    planned = ok("prune", "shop", "--dry-run", url=url)
    assert re.search(r"To prune *\n", planned)
    assert re.search(r"sessions +│ +1 │", planned)
    assert left(url) == ALL
    done = process("prune", "shop", "--yes", "--json", url=url)
    assert objects(done.stdout) == [{"sessions": 1, "events": 0, "trimmed": 0, "state_changes": 0}]
    assert left(url) == [row for row in ALL if row[2] != "b0"]
    planned = ok("erase", "shop", "ann", "--dry-run", "--json", url=url)
    report = {"sessions": 1, "events": 4, "user_states": 1, "state_changes": 1, "backups": 0}
    assert objects(planned) == [{**report, "left": 7}]
    assert len(left(url)) == 4
    done = process("erase", "shop", "ann", "--yes", url=url)
    assert re.search(r"Erased *\n", done.stdout)
    assert re.search(r"events +│ +4 │", done.stdout)
    assert re.search(r"left +│ +0 │", done.stdout)
    assert left(url) == [ALL[0], *ALL[3:]]
    # google-adk's classes would take a second to import
    done = process("doctor", "--events", "plain", "--json", url=url)
    assert objects(done.stdout)[0]["sessions"] == 3


def test_a_terminal_is_asked(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    run_sync(fill(url))
    status, shown = on_terminal("erase", "shop", "bob", url=url, answers="n\n")
    assert status == 1
    assert re.search(r"To erase[^?]*sessions +│ +3 │[^?]*Delete that for good\? \[y/N\]:", shown)
    assert "left" not in shown
    assert "Aborted!" in shown
    assert left(url) == ALL
    status, shown = on_terminal("erase", "shop", "bob", url=url, answers="y\n")
    assert status == 0
    assert re.search(r"Erased\s", shown)
    assert left(url) == ALL[:2]


def test_finishing_a_conversion_asks_too(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    assert TERMINAL in refused("finish-conversion", url=url, status=2)


# --- prune -------------------------------------------------------------------------------------


def pruned(url: str, *options: str) -> dict[str, Any]:
    [report] = objects(ok("prune", "shop", *options, "--yes", "--json", url=url))
    return report


def test_what_is_pruned_meets_each_condition(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")

    async def make() -> None:
        async with SessionService(url) as service:
            events = [{"author": "user", "content": said(str(number))} for number in range(6)]
            for name in ("old", "archived", "busy"):
                service._now = lambda: 1_700_000_000.0  # type: ignore[method-assign]
                await talk(service, "shop", "ann", name, events)
            await service.archive_session("shop", "ann", "archived")
            del service._now  # type: ignore[method-assign]
            await talk(service, "shop", "ann", "new", events)

    run_sync(make())
    assert pruned(url)["sessions"] == 0
    assert pruned(url, "--older-than", "90000d")["sessions"] == 0
    assert pruned(url, "--idle-for", "52w", "--archived-only")["sessions"] == 1
    assert pruned(url, "--older-than", "30d", "--keep-last", "2") == {
        "sessions": 0,
        "events": 8,
        "trimmed": 2,
        "state_changes": 0,
    }
    assert len(left(url)) == 3
    assert pruned(url, "--older-than", "1.5h") == {
        "sessions": 2,
        "events": 4,
        "trimmed": 0,
        "state_changes": 0,
    }
    assert left(url) == [("shop", "ann", "new")]


@pytest.mark.parametrize("time", ["90", "d", "-1d", "1y", "9999999999w", "999999999w", "1 d", "٣d"])
def test_a_time_that_is_none(time: str) -> None:
    message = refused("prune", "shop", f"--idle-for={time}", "--yes", url="sqlite://", status=2)
    assert "a number and s, m, h, d or w: 90d" in message


@pytest.mark.parametrize("options", [("--archived-only",), ("--keep-last", "0"), ("more",)])
def test_pruning_asked_wrongly(options: tuple[str, ...]) -> None:
    refused("prune", "shop", *options, "--yes", url="sqlite://", status=2)
    refused("prune", "--yes", url="sqlite://", status=2)


# --- erase -------------------------------------------------------------------------------------


def test_what_is_left_is_a_failure(
    migrated_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = migrated_database("sqlite")

    async def erase_user(*_: Any, dry_run: bool) -> ErasureReport:
        return ErasureReport(1, 2, 1, 0, 0, left=3)

    monkeypatch.setattr(SessionService, "erase_user", erase_user)
    done = run("erase", "shop", "ann", "--yes", "--json", url=url)
    assert done.exit_code == 1
    assert objects(done.stdout)[0]["left"] == 3
    assert "3 rows are left" in done.stderr
    assert ok("erase", "shop", "ann", "--dry-run", url=url)


def test_erasing_nobody(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    [report] = objects(ok("erase", "shop", "", "--yes", "--json", url=url))
    assert not any(report.values())
    refused("erase", "shop", url=url, status=2)
