"""The benchmark of Parlant's sessions runs, and finds what it measures. Speed is no test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from servers import Postgres, run_sync

pytest.importorskip("google.adk")
if importlib.util.find_spec("parlant") is None:
    pytest.skip("needs the extra parlant", allow_module_level=True)

from benchmarks import parlant, report
from benchmarks.measure import Timing
from benchmarks.places import Place


def test_the_short_form(postgres: Postgres, tmp_path: Path) -> None:
    place = Place("postgresql", postgres, tmp_path)
    found = run_sync(parlant.measure_parlant(place, short=True))
    results = report.Results(short=True, parlant={"postgresql": found})
    written = json.loads(json.dumps(report.as_json(results)))["parlant"]["postgresql"]
    assert written["events"] == parlant.SHORT
    assert set(written["operations"]) == set(parlant.CALLS_OF)
    for by_store in written["operations"].values():
        assert set(by_store) == {"ours", "raw"}
        assert all(0 < t["median_ms"] <= t["within_ms_95_percent"] for t in by_store.values())
    for series in written["growth"]:
        assert [int(size) for size in series["median_ms"]] == [*parlant.SHORT_SIZES]
    assert "| create_event |" in report.as_markdown(results)


def test_what_most_calls_are_within() -> None:
    assert Timing([float(n) for n in range(100, 0, -1)]).within(0.95) == 95.0
    assert Timing([3.0]).within(0.95) == 3.0
    assert Timing([], None).within(0.95) is None


def test_the_peer_filters_as_it_is_documented() -> None:
    both = {"session_id": {"$eq": "a"}, "deleted": {"$eq": False}}
    found = parlant.Filter({"$or": [both, {"offset": {"$gte": 3}}]})
    assert found.text == (
        "((data->>'session_id' = $1 AND data->>'deleted' = $2)"
        " or ((data->>'offset')::numeric >= $3))"
    )
    assert found.values == ["a", "false", 3]
