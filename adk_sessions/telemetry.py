"""What a store's operations tell OpenTelemetry, and a debug line of the log about each.

Spans and metrics say how long an operation took, how many rows and retries, and what kind of error
it met. They carry no ids and nothing that is stored; an error's message, which may name ids, stays
out of them too.

Nothing here needs opentelemetry-api. It is looked for among the modules that the process has
imported: while nobody has imported it, nobody has told it where spans and metrics are to go.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from weakref import WeakSet

from .errors import StaleSessionError
from .session import Page

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, TracerProvider

logger = logging.getLogger("adk_sessions")

NAME = "adk_sessions"
READS = (
    *("get_session", "list_sessions", "get_user_state", "get_app_state"),
    *("page_sessions", "describe_session", "page_events", "list_users", "list_apps"),
)
WRITES = (
    *("create_session", "append_event", "append_events", "update_state", "delete_session"),
    *("update_session", "archive_session", "restore_session", "prune", "erase_user"),
    *("fork_session", "import_sessions"),
)

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")

# Seconds, as OpenTelemetry's conventions for databases have them.
_BOUNDARIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
_ROW_BOUNDARIES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Measured(Protocol):
    """What is asked of a store's database."""

    @property
    def system(self) -> str:
        """What OpenTelemetry calls it."""
        ...

    def connections(self) -> tuple[int, int] | None:
        """How many connections are in use, and how many are idle; None without a pool."""
        ...


class _Operation:
    """One call that is under way.

    Attributes:
        store: None when it is done, for tasks that it has left behind.
        retries: how often a statement of it was repeated.
    """

    __slots__ = ("retries", "store")

    def __init__(self, store: Any) -> None:
        self.store = store
        self.retries = 0


_current: ContextVar[_Operation | None] = ContextVar("adk_sessions_operation", default=None)
_stores: WeakSet[Any] = WeakSet()
_lock = threading.Lock()


def retried() -> None:
    """Counts a repetition for the operation that is under way."""
    operation = _current.get()
    if operation is not None:
        operation.retries += 1


class Instruments:
    """OpenTelemetry's side.

    Args:
        tracers, meters: the providers; None for those that the application has set.

    Raises:
        ImportError, TypeError: opentelemetry-api is not there, or is older than 1.30.
    """

    def __init__(
        self, tracers: TracerProvider | None = None, meters: MeterProvider | None = None
    ) -> None:
        from opentelemetry import metrics, trace

        self._trace = trace
        self._metrics = metrics
        nobody = metrics.get_meter_provider() if tracers is None and meters is None else None
        # another name of that class would only cost a few microseconds of each call
        self._nobody = nobody if type(nobody).__name__ == "_ProxyMeterProvider" else None
        self._observation = metrics.Observation
        self._tracer = trace.get_tracer(NAME, tracer_provider=tracers)
        meter = metrics.get_meter(NAME, meter_provider=meters)
        self._duration = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of an operation of the session store.",
            explicit_bucket_boundaries_advisory=_BOUNDARIES,
        )
        self._returned, self._written = (
            meter.create_histogram(
                name,
                unit="{row}",
                description=f"Sessions and events that an operation has {what}.",
                explicit_bucket_boundaries_advisory=_ROW_BOUNDARIES,
            )
            for name, what in (
                ("db.client.response.returned_rows", "read"),
                ("adk_sessions.written_rows", "written"),
            )
        )
        self._retries = meter.create_counter(
            "adk_sessions.retries", unit="{retry}", description="Statements that were repeated."
        )
        self._stale = meter.create_counter(
            "adk_sessions.stale",
            unit="{refusal}",
            description="Appends that were refused because somebody else had appended.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.count",
            callbacks=[self._connections],
            unit="{connection}",
            description="Connections of the pools of all services in this process.",
        )

    @property
    def silent(self) -> bool:
        """Whether nobody has said yet where spans and metrics are to go."""
        if self._nobody is not None and (
            self._metrics.get_meter_provider() is not self._nobody
            or not isinstance(self._trace.get_tracer_provider(), self._trace.ProxyTracerProvider)
        ):
            self._nobody = None
        return self._nobody is not None

    def start(self, name: str, system: str) -> Span:
        return self._tracer.start_span(
            f"{NAME}.{name}",
            kind=self._trace.SpanKind.CLIENT,
            attributes={"db.system.name": system, "db.operation.name": name},
        )

    def inside(self, span: Span) -> Any:
        """Makes it the parent of what a driver's instrumentation may have to say."""
        return self._trace.use_span(span, record_exception=False, set_status_on_exception=False)

    def end(
        self,
        span: Span | None,
        name: str,
        system: str,
        seconds: float,
        rows: int | None,
        retries: int,
        error: BaseException | None,
    ) -> None:
        labels = {"db.system.name": system, "db.operation.name": name}
        if rows is not None:
            (self._written if name in WRITES else self._returned).record(rows, labels)
        if retries:
            self._retries.add(retries, labels)
        if isinstance(error, StaleSessionError):
            self._stale.add(1, labels)
        kind = type(error).__name__
        failed = {} if error is None else {"error.type": kind}
        self._duration.record(seconds, {**labels, **failed})
        if span is None:
            return
        if span.is_recording():
            span.set_attribute("db.system.name", system)  # now that it has been connected to
            if rows is not None:
                written = name in WRITES
                span.set_attribute(
                    "adk_sessions.written_rows" if written else "db.response.returned_rows", rows
                )
            span.set_attribute("adk_sessions.retries", retries)
            if error is not None:
                span.set_attribute("error.type", kind)
                if (code := getattr(error, "code", None)) is not None:
                    span.set_attribute("db.response.status_code", str(code))
                span.set_status(self._trace.StatusCode.ERROR, kind)
        span.end()

    def _connections(self, _options: CallbackOptions) -> Iterable[Observation]:
        counts: dict[tuple[str, str], int] = {}
        with _lock:
            stores = list(_stores)
        for store in stores:
            database: Measured = store._database
            found = database.connections()
            if found is not None:
                for state, number in zip(("used", "idle"), found, strict=True):
                    at = database.system, state
                    counts[at] = counts.get(at, 0) + number
        for (system, state), number in counts.items():
            labels = {
                "db.system.name": system,
                "db.client.connection.state": state,
                "db.client.connection.pool.name": NAME,
            }
            yield self._observation(number, labels)


_instruments: Instruments | None = None
_unusable = False


def _found() -> Instruments | None:
    global _instruments, _unusable
    if _instruments is None and not _unusable and "opentelemetry" in sys.modules:
        try:
            _instruments = Instruments()
        except (ImportError, TypeError):
            _unusable = True
    return None if _instruments is None or _instruments.silent else _instruments


def measured(name: str, *, span: bool = False) -> Callable[[F], F]:
    """Makes a store's coroutine method an operation that is measured, with or without a span.

    What it calls of the same store is part of it. Without a span are the steps of iterators: a span
    would be of the loop that the iterator is in.
    """

    def decorate(method: F) -> F:
        @functools.wraps(method)
        async def call(self: Any, *args: Any, **options: Any) -> Any:
            instruments = _found()
            if instruments is None and not logger.isEnabledFor(logging.DEBUG):
                return await method(self, *args, **options)
            current = _current.get()
            if current is not None and current.store is self:
                return await method(self, *args, **options)
            return await _observe(
                instruments, self, name, span, lambda: method(self, *args, **options)
            )

        return cast(F, call)

    return decorate


async def _observe(
    instruments: Instruments | None,
    store: Any,
    name: str,
    spanned: bool,
    call: Callable[[], Coroutine[Any, Any, Any]],
) -> Any:
    database: Measured = store._database
    span: Span | None = None
    if instruments is not None:
        if store not in _stores:
            with _lock:
                _stores.add(store)
        if spanned:
            span = instruments.start(name, database.system)
    operation = _Operation(store)
    token = _current.set(operation)
    rows: int | None = None
    failure: BaseException | None = None
    began = time.perf_counter()
    try:
        if span is not None and instruments is not None and span.is_recording():
            with instruments.inside(span):
                result = await call()
        else:
            result = await call()
        rows = _rows(name, result)
        return result
    except BaseException as error:
        failure = error
        raise
    finally:
        seconds = time.perf_counter() - began
        operation.store = None
        _reset(token)
        if instruments is not None:
            instruments.end(span, name, database.system, seconds, rows, operation.retries, failure)
        logger.debug(
            "%s: %.1f ms, %s rows, %d retries, %s",
            *(name, seconds * 1000, "no" if rows is None else rows, operation.retries),
            "done" if failure is None else type(failure).__name__,
        )
        del failure


def _reset(token: Token[_Operation | None]) -> None:
    with contextlib.suppress(ValueError):  # whoever finds a call that was dropped ends it
        _current.reset(token)


def _rows(name: str, result: Any) -> int | None:
    """How many sessions and events were read or written, as far as the result tells."""
    if name == "append_event":
        return int(not result.partial)
    if result is None:
        return 0 if name in READS else None
    if isinstance(result, Page):
        return len(result.items)
    if isinstance(result, list):
        return len(result)
    sessions, events = (getattr(result, part, None) for part in ("sessions", "events"))
    if isinstance(sessions, int):
        return sessions + (events if isinstance(events, int) else 0)
    if isinstance(sessions, list):
        return len(sessions)
    if isinstance(events, int):
        return 1 + events
    return 1 + (len(events) if isinstance(events, list) else 0)


def instrument(store: type[C]) -> type[C]:
    """A class decorator: each call of `READS` and `WRITES` is measured, and gets a span."""
    for name in READS + WRITES:
        if hasattr(store, name):
            setattr(store, name, measured(name, span=True)(getattr(store, name)))
    return store
