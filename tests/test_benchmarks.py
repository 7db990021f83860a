"""The benchmark runs and writes what it found, and its arithmetic is right. Speed is no test."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import click
import pytest
from everywhere import SOAK
from servers import Postgres, run_sync

pytest.importorskip("google.adk")

from benchmarks import measure, notify, places, report
from benchmarks.growth import Series
from benchmarks.link import LOOPBACK, running_link
from benchmarks.measure import Timing

TESTS = Path(__file__).parent


def test_the_short_form_on_sqlite(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--short", "--backend", "sqlite"]
    if not SOAK:  # CI runs all of the short form
        command += ["--scenario", "append", "--no-growth", "--no-memory"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["short"], results["failures"]) == (True, [])
    (column,) = results["columns"]
    append = column["scenarios"]["append"]
    assert set(append["stores"]) == {"ours", "adk", "adk_sqlite"}
    assert append["stores"]["ours"]["median_ms"] > 0
    (versus_adk,) = [r for r in append["ratios"] if (r["store"], r["versus"]) == ("ours", "adk")]
    assert versus_adk["target"] == 8
    settings = results["databases"]["sqlite"]["stores"]
    assert {store["synchronous"] for store in settings.values()} == {2}
    assert "| append an event |" in (tmp_path / "table.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert ElementTree.parse(tmp_path / "chart.svg").getroot().tag.endswith("svg")


def timed(*calls: float, failure: str | None = None) -> Timing:
    return Timing(list(calls), failure)


def test_medians_and_ratios() -> None:
    assert timed(3.0, 1.0, 2.0).median == 2.0
    assert timed(1.0, 2.0).median == 1.5
    assert timed().median is None
    assert timed(1.0, failure="wrong").median is None
    assert measure.ratio(timed(6.0), timed(2.0)) == 3.0
    assert measure.ratio(timed(6.0), timed()) is None
    assert measure.ratio(None, timed(2.0)) is None


def test_targets() -> None:
    column = report.Column("sqlite", 0.0)
    column.rows["append"] = {"ours": timed(1.0), "adk": timed(8.0), "adk_sqlite": timed(0.9)}
    adk, adk_sqlite = report.compare(column, "append")
    assert (adk.ratio, adk.target, adk.met) == (8.0, 8, True)
    assert (adk_sqlite.ratio, adk_sqlite.target, adk_sqlite.met) == (0.9, 1.0, False)
    assert report.verdict(adk) == "8.00x (8x met)"
    assert report.verdict(adk_sqlite) == "0.90x (1x missed)"

    mariadb = report.Column("mariadb", 1.0)
    mariadb.rows["append"] = {"ours": timed(1.0), "adk": timed(8.0)}
    (unaimed,) = report.compare(mariadb, "append")
    assert (mariadb.name, unaimed.met, report.verdict(unaimed)) == ("mariadb+1ms", None, "8.00x")


def test_a_failed_store_is_no_figure_and_an_exit_status() -> None:
    column = report.Column("sqlite", 0.0)
    column.rows["append"] = {"ours": timed(1.0), "adk": timed(8.0, failure="events: 1 not 2")}
    results = report.Results(columns=[column])
    assert report.compare(column, "append") == []
    assert results.failures() == ["SQLite, append an event, google-adk: events: 1 not 2"]
    assert "failed" in report.as_markdown(results)


def test_growth() -> None:
    flat = Series("flat", {10: [2.0, 2.0], 1_000: [1.0], 100_000: [2.9, 2.9, 9.0]})
    assert flat.medians == {10: 2.0, 1_000: 1.0, 100_000: 2.9}
    assert (flat.growth, flat.flat) == (pytest.approx(1.45), True)
    assert not Series("grows", {10: [2.0], 100: [3.0]}).flat


def test_servers_that_lose_what_they_acknowledged_are_refused() -> None:
    places.check_postgres({"fsync": "on", "synchronous_commit": "on"})
    for settings in (
        {"fsync": "off", "synchronous_commit": "on"},
        {"fsync": "on", "synchronous_commit": "off"},
    ):
        with pytest.raises(places.Unfit, match="does not keep"):
            places.check_postgres(settings)
    places.check_mariadb({"innodb_flush_log_at_trx_commit": 1})
    with pytest.raises(places.Unfit, match="does not keep"):
        places.check_mariadb({"innodb_flush_log_at_trx_commit": 2})
    places.check_sqlite("ours", {"synchronous": 2})
    with pytest.raises(places.Unfit, match="not FULL"):
        places.check_sqlite("ours", {"synchronous": 1})


def _echo(listener: socket.socket) -> None:
    near, _ = listener.accept()
    with near:
        while piece := near.recv(65_536):
            near.sendall(piece)


def test_the_link_delays_each_round_trip_once_and_keeps_order() -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        with (
            running_link(*listener.getsockname(), delay_ms=200) as link,
            socket.create_connection((LOOPBACK, link.port)) as near,
        ):
            sent = b"".join(bytes([n]) * 1_000 for n in range(20))
            # all at once, not one after the other: 20 delays take four seconds on any machine,
            # and one that stands still now and then does not do so each time
            for _ in range(10):
                link.reset()
                start = time.perf_counter()
                for n in range(20):
                    near.sendall(sent[n * 1_000 : (n + 1) * 1_000])
                received = b""
                while len(received) < len(sent):
                    received += near.recv(65_536)
                took = time.perf_counter() - start
                assert took >= 0.2
                assert received == sent
                assert link.trips() >= 1
                if took < 3.9:
                    break
            assert took < 3.9

            link.reset()
            for _ in range(3):
                near.sendall(b"?")
                near.recv(1)
            assert link.trips() == 3


def test_pg_notify_is_measured_by_appends_that_are_stored(
    postgres: Postgres, tmp_path: Path
) -> None:
    pgbench = notify.find_pgbench()
    if pgbench is None:
        pytest.skip("pgbench not found: it comes with PostgreSQL")
    with postgres.scratch_database() as url:
        rates = notify.measure(pgbench, url, (2,), rounds=1, seconds=2)
        assert list(rates) == [2]
        assert all(rate > 0 for (rate,) in rates[2].values())
        for kind in notify.KINDS:
            stored = f"SELECT count(*) FROM events WHERE app_name = '{kind}'"
            sessions = f"SELECT count(DISTINCT session_id) FROM events WHERE app_name = '{kind}'"
            name = url.rpartition("/")[2]
            assert (postgres.value(stored, name) > 0, postgres.value(sessions, name)) == (True, 2)

        sql, parameters = run_sync(notify.append_of(url, True))
        assert "pg_notify" in sql
        assert "pg_notify" not in run_sync(notify.append_of(url, False))[0]
        # who writes nothing is no figure
        script, variables = notify.script_of(sql, parameters)
        (path := tmp_path / "append.sql").write_text(script)
        with pytest.raises(click.ClickException, match="pgbench failed"):
            notify.rate(pgbench, url, path, 1, 1, **variables, app="nobody", user="nobody")
    assert notify.ratio({"without": [1.0, 4.0, 2.0], "notify": [9.0, 1.0, 1.0]}) == 0.5
