"""Times of callers and times of tables."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adk_sessions.clock import EPOCH, from_marker, just_before, to_datetime, to_epoch, to_marker

LATEST = datetime(9000, 1, 1)
MOMENTS = st.datetimes(EPOCH, LATEST)


@given(MOMENTS)
def test_a_moment_survives_as_seconds_to_the_microsecond(moment: datetime) -> None:
    # a float has no more than that at the year 9000
    assert abs(to_datetime(to_epoch(moment)) - moment) <= timedelta(microseconds=32)
    if moment.year < 2100:
        assert abs(to_datetime(to_epoch(moment)) - moment) <= timedelta(microseconds=1)


@given(MOMENTS)
def test_a_moment_survives_as_marker(moment: datetime) -> None:
    assert from_marker(to_marker(moment)) == moment


def test_a_marker_always_has_its_microseconds() -> None:
    assert to_marker(datetime(2026, 1, 2, 3, 4, 5)) == "2026-01-02T03:04:05.000000"
    assert to_marker(datetime(2026, 1, 2, 3, 4, 5, 6)) == "2026-01-02T03:04:05.000006"


@pytest.mark.parametrize("marker", ["", "7", "no time", "2026-01-02T03:04:05+00:00", "12:00"])
def test_another_stores_marker_is_none(marker: str) -> None:
    assert from_marker(marker) is None


def test_times_are_utc_whatever_the_local_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = 1_761_438_600.25  # within the hour that Europe passed twice
    expected = datetime(2025, 10, 26, 0, 30, 0, 250_000)
    try:
        for zone in ("Europe/Berlin", "America/New_York", "UTC"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert to_datetime(twice) == expected
            assert to_epoch(expected) == twice
            assert to_epoch(expected + timedelta(hours=1)) == twice + 3600
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_no_table_holds_becomes_the_nearest_that_it_does() -> None:
    assert to_datetime(0.0) == to_datetime(-1.0) == to_datetime(-math.inf) == EPOCH
    last = datetime(9000, 1, 1, tzinfo=UTC).timestamp()
    assert to_datetime(last) == to_datetime(last + 1) == to_datetime(math.inf) == LATEST
    assert to_datetime(last - 1) == LATEST - timedelta(seconds=1)


def test_just_before_stays_in_range() -> None:
    assert just_before(datetime(2026, 1, 1)) == datetime(2025, 12, 31, 23, 59, 59, 999_999)
    assert just_before(EPOCH + timedelta(microseconds=1)) == EPOCH
    assert just_before(EPOCH) == EPOCH


@given(st.floats(0, 4e9))
def test_the_column_is_less_than_a_microsecond_off(timestamp: float) -> None:
    assert just_before(to_datetime(timestamp)) <= to_datetime(timestamp)
    assert to_epoch(just_before(to_datetime(timestamp))) <= timestamp
    assert abs(to_epoch(to_datetime(timestamp)) - timestamp) <= 1e-6
