"""The commands that move sessions from one database to another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PATIENCE, environment, fill, objects, ok, process, refused, run, said, talk
from servers import free_port, run_sync
from sqlalchemy import make_url

from adk_sessions import SessionService

NewDatabase = Callable[[str], str]
SECRET = "top-secret"


def shown(url: str, app: str = "shop") -> str:
    return ok("show", app, "ann", "s", url=url)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_moving_as_processes(kind: str, migrated_database: NewDatabase, tmp_path: Path) -> None:
    url = migrated_database(kind)
    run_sync(fill(url))
    exported = process("export", url=url)
    lines = objects(exported.stdout)
    assert [line["type"] for line in lines].count("session") == 5
    assert exported.stderr == ""
    elsewhere = "sqlite" if kind == "postgresql" else "postgresql"
    target, other = migrated_database(elsewhere), migrated_database(elsewhere)
    file = tmp_path / "export.ndjson"
    file.write_text(exported.stdout)
    done = process("import", "-", "--json", url=target, input=file)
    [report] = objects(done.stdout)
    assert (report["sessions"], report["events"], report["conflicts"]) == (5, 5, [])
    assert shown(target) == shown(url)
    done = process("copy", "--from", url, "--to", other, "--json")
    [report] = objects(done.stdout)
    assert (report["sessions"], report["events"], report["differences"]) == (5, 5, [])
    assert shown(other) == shown(url)
    assert "already there │ 5 │" in ok("copy", "--from", url, "--to", other)


def test_a_part_is_exported(migrated_database: NewDatabase, tmp_path: Path) -> None:
    url = migrated_database("sqlite")
    run_sync(fill(url))

    def sessions(*options: str) -> list[tuple[str, str, str]]:
        lines = objects(ok("export", *options, url=url))
        return [
            (line["app_name"], line["user_id"], line["id"])
            for line in lines
            if line["type"] == "session"
        ]

    assert len(sessions("--app", "shop")) == 4
    assert len(sessions("--app", "shop", "--user", "bob")) == 3
    assert sessions("--app", "shop", "--user", "bob", "--session", "b1") == [("shop", "bob", "b1")]
    refused("export", "--user", "ann", url=url, status=2)
    refused("export", "--app", "shop", "--session", "s", url=url, status=2)
    # a typing error is not an empty file
    out = tmp_path / "out.ndjson"
    assert run("export", "--app", "Shop", "-o", str(out), url=url).exit_code == 1
    assert [*tmp_path.glob("*.ndjson*")] == []
    assert ok("export", "-o", str(out), url=url) == ""
    assert len(out.read_text()) == len(ok("export", url=url))
    assert "No such file" in refused("export", "-o", str(tmp_path / "no" / "x"), url=url)


def test_a_pipe_is_an_export_and_an_import(migrated_database: NewDatabase) -> None:
    url, target = migrated_database("sqlite"), migrated_database("sqlite")
    run_sync(fill(url))
    command = f"{sys.executable} -m adk_sessions"
    done = subprocess.run(
        f'{command} export | {command} import - --json --url "$TARGET"',
        shell=True,
        env={**environment(url), "TARGET": target},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert objects(done.stdout)[0]["sessions"] == 5
    assert shown(target) == shown(url)


def test_an_export_ends_with_its_reader(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    run_sync(talk_in(url, [{"content": said(f"{number} " * 3000)} for number in range(60)]))
    shell = f"{sys.executable} -m adk_sessions export | head -1 | cut -c1-16"
    done = subprocess.run(
        shell, shell=True, env=environment(url), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == '{"type":"header"\n'
    assert done.stderr == ""


async def talk_in(url: str, events: list[dict[str, object]]) -> None:
    async with SessionService(url) as service:
        await talk(service, "shop", "ann", "s", events)


def test_a_conflict_is_a_failure(migrated_database: NewDatabase, tmp_path: Path) -> None:
    source, target = migrated_database("sqlite"), migrated_database("sqlite")
    run_sync(fill(source))
    run_sync(talk_in(target, [{"content": said("something else")}]))
    file = tmp_path / "export.ndjson"
    ok("export", "-o", str(file), url=source)
    before = shown(target)
    planned = run("import", str(file), "--dry-run", url=target)
    assert planned.exit_code == 1
    assert "To import" in planned.stdout
    assert ok("list", "--app", "other", url=target) == ""
    done = run("import", str(file), url=target)
    assert done.exit_code == 1
    assert "there already with other content: 'shop' / 'ann' / 's'" in done.stdout
    copied = run("copy", "--from", source, "--to", target, "--json")
    assert copied.exit_code == 1
    [report] = objects(copied.stdout)
    assert report["conflicts"] == [{"app_name": "shop", "user_id": "ann", "session_id": "s"}]
    assert shown(target).startswith(before)  # but for keys of states that were not there
    # what could be moved is there
    assert "Hello" in shown(target, "other")


def test_a_file_that_is_no_export(migrated_database: NewDatabase, tmp_path: Path) -> None:
    url = migrated_database("sqlite")
    file = tmp_path / "file"
    for content in (b"no JSON\n", b"\xff\xfe\n", b'{"a": "top-secret"}\n', b"[]\n"):
        file.write_bytes(content)
        message = refused("import", str(file), url=url)
        assert message.startswith("Error: ")
        assert SECRET not in message
    refused("import", str(tmp_path / "none"), url=url, status=2)
    refused("import", str(tmp_path), url=url, status=2)


def test_a_part_is_copied(migrated_database: NewDatabase) -> None:
    source, target = migrated_database("sqlite"), migrated_database("sqlite")
    run_sync(fill(source))
    places = ("--from", source, "--to", target)
    ok("copy", *places, "--app", "shop", "--user", "bob")
    apps = objects(ok("list", "--json", url=target))
    assert [(line["app"]["app_name"], line["app"]["sessions"]) for line in apps] == [("shop", 3)]
    refused("copy", *places, "--user", "ann", status=2)
    assert "nothing of that" in refused("copy", *places, "--app", "Shop")


def test_each_side_has_a_place_of_its_own(fresh_database: NewDatabase) -> None:
    source, target = fresh_database("sqlite"), fresh_database("sqlite")
    ok("upgrade", "--table-prefix", "a_", url=source)
    ok("upgrade", "--table-prefix", "b_", url=target)

    async def make() -> None:
        async with SessionService(source, table_prefix="a_") as service:
            await talk(service, "shop", "ann", "s", [{"content": said("Hello")}])

    run_sync(make())
    prefixes = ("--from-table-prefix", "a_", "--to-table-prefix", "b_")
    ok("copy", "--from", source, "--to", target, *prefixes)
    assert "Hello" in ok("show", "shop", "ann", "s", "--table-prefix", "b_", url=target)


def test_a_copy_makes_no_database(migrated_database: NewDatabase, tmp_path: Path) -> None:
    url = migrated_database("sqlite")
    missing = tmp_path / "missing.db"
    for places in ((url, f"sqlite:///{missing}"), (f"sqlite:///{missing}", url)):
        message = refused("copy", "--from", places[0], "--to", places[1])
        assert "adk-sessions upgrade" in message
    assert not missing.exists()
    assert make_url(url).database


def test_no_password_shows(migrated_database: NewDatabase) -> None:
    url = migrated_database("sqlite")
    wrong = f"postgresql://ann:{SECRET}@127.0.0.1:{free_port()}/db"
    for places in ((url, wrong), (wrong, url), (wrong, wrong), (SECRET, url), (url, SECRET)):
        given = ("--from", places[0], "--to", places[1])
        done = run("copy", *given)
        assert done.exit_code == 1
        assert SECRET not in done.output
        assert SECRET not in run("copy", *given, "--help").output
        assert SECRET not in run("copy", *given, "--nonsense").output


def test_urls_come_from_the_environment(migrated_database: NewDatabase) -> None:
    source, target = migrated_database("sqlite"), migrated_database("sqlite")
    run_sync(fill(source))
    given = {"ADK_SESSIONS_FROM_URL": source, "ADK_SESSIONS_TO_URL": target}
    done = run("copy", "--json", variables=given)
    assert objects(done.stdout)[0]["sessions"] == 5
