"""Times: seconds since the epoch for callers, naive UTC to the microsecond in tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1)
_LATEST = datetime(9000, 1, 1)
_LATEST_EPOCH = (_LATEST - EPOCH).total_seconds()


def to_datetime(timestamp: float) -> datetime:
    """A moment as tables hold it; one outside the years 1970 to 9000 becomes the nearest there."""
    if not timestamp > 0:  # NaN too
        return EPOCH
    if timestamp >= _LATEST_EPOCH:
        return _LATEST
    return datetime.fromtimestamp(timestamp, UTC).replace(tzinfo=None)


def to_epoch(moment: datetime) -> float:
    """Seconds since the epoch."""
    return (moment - EPOCH).total_seconds()


def to_marker(moment: datetime) -> str:
    """The revision that a session object remembers, spelled as google-adk spells it."""
    return moment.isoformat(timespec="microseconds")


def from_marker(marker: str) -> datetime | None:
    """The revision of a marker; None for one that another kind of store has set."""
    try:
        moment = datetime.fromisoformat(marker)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is None else None


def just_after(moment: datetime) -> datetime:
    """A microsecond later."""
    return moment + timedelta(microseconds=1)


def just_before(moment: datetime) -> datetime:
    """A microsecond earlier."""
    return moment - timedelta(microseconds=1) if moment > EPOCH else moment
