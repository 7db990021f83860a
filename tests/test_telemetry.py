"""What OpenTelemetry and the log are told of operations, and what they are not told."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from everywhere import EVERY_DATABASE, place_of
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.exc import OperationalError
from workers import event, load

from adk_sessions import (
    AlreadyExistsError,
    DatabaseError,
    InvalidInputError,
    Session,
    SessionService,
    StaleSessionError,
    Store,
    telemetry,
)

# Coroutines that nobody counts: they are done once, or ask nothing of what is stored.
UNMEASURED = {"prepare_tables", "validate_schema", "ping", "flush", "close"}
SECRET = "s3cret"


class Exported:
    """What a service has told OpenTelemetry."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meters = MeterProvider([self._metrics])
        self.instruments = telemetry.Instruments(self.tracers, self.meters)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._spans.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        """The last span of an operation."""
        return [span for span in self.spans if span.name == f"adk_sessions.{name}"][-1]

    def points(self, name: str) -> dict[tuple[str, ...], Any]:
        """A metric's points by their attributes' values, in the order of the attributes' names."""
        data = json.loads(self.metrics())
        found = {}
        for resource in data["resource_metrics"]:
            for scope in resource["scope_metrics"]:
                for metric in scope["metrics"]:
                    if metric["name"] == name:
                        for point in metric["data"]["data_points"]:
                            labels = point["attributes"]
                            found[tuple(labels[key] for key in sorted(labels))] = point
        return found

    def metrics(self) -> str:
        data = self._metrics.get_metrics_data()
        return data.to_json() if data else '{"resource_metrics": []}'

    def everything(self) -> str:
        return "".join(span.to_json() for span in self.spans) + self.metrics()


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    exported = Exported()
    monkeypatch.setattr(telemetry, "_instruments", exported.instruments)
    monkeypatch.setattr(telemetry, "_stores", type(telemetry._stores)())
    return exported


@pytest.fixture(params=EVERY_DATABASE)
async def service(
    request: pytest.FixtureRequest, fresh_database: Callable[[str], str]
) -> AsyncIterator[SessionService]:
    url, options = place_of(request.param, request, fresh_database)
    async with SessionService(url, **options) as service:
        yield service


@pytest.fixture
async def memory() -> AsyncIterator[SessionService]:
    async with SessionService("sqlite://") as service:
        yield service


def test_every_operation_is_measured_or_known_not_to_be() -> None:
    public = {
        name
        for name, method in inspect.getmembers(Store, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    measured = set(telemetry.READS + telemetry.WRITES)
    assert len(measured) == len(telemetry.READS + telemetry.WRITES)
    assert public == measured | UNMEASURED
    assert not measured & UNMEASURED
    for name in measured:
        method = getattr(Store, name)
        assert method.__wrapped__.__doc__ == method.__doc__
        assert inspect.signature(method).parameters.keys() >= {"self"}
        assert method.__name__ == name


async def test_each_operation_has_a_span_and_metrics(
    exported: Exported, service: SessionService, app_name: str
) -> None:
    session = await service.create_session(app_name=app_name, user_id="ann", session_id="s")
    await service.append_event(session, event("a", {"a": 1}))
    await service.append_events(session, [event(id, {}) for id in "bcd"])
    found = await service.get_session(app_name=app_name, user_id="ann", session_id="s")
    assert found == session
    await service.get_session(app_name=app_name, user_id="ann", session_id="none")
    await service.list_sessions(app_name=app_name)
    await service.update_state(app_name=app_name, delta={"app:a": 1})
    await service.get_app_state(app_name=app_name)
    await service.get_user_state(app_name=app_name, user_id="ann")
    await service.delete_session(app_name, "ann", "s")
    names = [span.name.removeprefix("adk_sessions.") for span in exported.spans]
    assert names == [
        *("create_session", "append_event", "append_events", "get_session", "get_session"),
        *("list_sessions", "update_state", "get_app_state", "get_user_state", "delete_session"),
    ]
    system = service._database.system
    assert system in ("sqlite", "postgresql", "mariadb")
    for span in exported.spans:
        assert span.kind is trace.SpanKind.CLIENT
        assert span.status.is_unset
        assert span.events == ()
        attributes = dict(span.attributes or {})
        assert attributes.pop("db.system.name") == system
        assert f"adk_sessions.{attributes.pop('db.operation.name')}" == span.name
        assert attributes.pop("adk_sessions.retries") == 0
        assert attributes.keys() <= {"db.response.returned_rows", "adk_sessions.written_rows"}
    rows = [sum((span.attributes or {}).get(name, 0) for name in ROWS) for span in exported.spans]
    # a session is a row, and each of its events
    assert rows == [1, 1, 3, 5, 0, 1, 1, 1, 1, 0]
    durations = exported.points("db.client.operation.duration")
    assert durations.keys() == {(name, system) for name in names}
    for (name, _), point in durations.items():
        assert point["count"] == names.count(name)
        assert 0 < point["sum"] < 180  # seconds
        assert 0.001 in point["explicit_bounds"]
    returned = exported.points("db.client.response.returned_rows")
    assert returned["get_session", system]["sum"] == 5
    written = exported.points("adk_sessions.written_rows")
    assert written["append_events", system]["sum"] == 3
    assert exported.points("adk_sessions.retries") == {}
    assert exported.points("adk_sessions.stale") == {}


ROWS = ("db.response.returned_rows", "adk_sessions.written_rows")


async def test_a_refused_append_is_counted(exported: Exported, memory: SessionService) -> None:
    session = await memory.create_session(app_name="app", user_id="ann")
    stale = await load(memory, "app", "ann", session.id)
    await memory.append_event(session, event("a", {}))
    for _ in range(2):
        with pytest.raises(StaleSessionError):
            await memory.append_event(stale, event("b", {}))
    await memory.append_event(stale, event("b", {}), on_stale="refresh")
    assert [p["value"] for p in exported.points("adk_sessions.stale").values()] == [2]
    refused = [span for span in exported.spans if not span.status.is_unset]
    assert len(refused) == 2
    for span in refused:
        assert (span.attributes or {})["error.type"] == "StaleSessionError"
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.status.description == "StaleSessionError"
    durations = exported.points("db.client.operation.duration")
    assert durations["append_event", "sqlite", "StaleSessionError"]["count"] == 2


async def test_retries_are_counted_for_their_operation(
    exported: Exported, memory: SessionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await memory.create_session(app_name="app", user_id="ann")
    run, faults = memory._database.run, 3

    async def faulty(work: Any, **options: Any) -> Any:
        nonlocal faults
        if faults:
            faults -= 1
            raise OperationalError("", None, ConnectionResetError(), connection_invalidated=True)
        return await run(work, **options)

    monkeypatch.setattr(memory._database, "run", faulty)
    # in a task of its own, which an append is
    await memory.append_event(session, event("a", {}))
    await memory.append_event(session, event("b", {}))
    counted = exported.points("adk_sessions.retries")
    assert {labels: p["value"] for labels, p in counted.items()} == {("append_event", "sqlite"): 3}
    retries = [(span.attributes or {})["adk_sessions.retries"] for span in exported.spans]
    assert retries == [0, 3, 0]


async def test_a_cut_connection_shows_as_a_retry(
    exported: Exported, postgres_url: str, app_name: str
) -> None:
    async with SessionService(postgres_url, pool_size=1) as service:
        session = await service.create_session(app_name=app_name, user_id="ann")
        async with service._database.engine.connect() as conn:
            raw = await conn.get_raw_connection()
            driver: Any = raw.driver_connection
        driver.terminate()
        await service.append_event(session, event("a", {}))
    assert (exported.named("append_event").attributes or {})["adk_sessions.retries"] == 1


async def test_the_pools_connections_are_counted(
    exported: Exported, postgres_url: str, app_name: str
) -> None:
    async with SessionService(postgres_url) as service:
        await service.list_sessions(app_name=app_name)
        async with service._database.engine.connect(), service._database.engine.connect():
            points = exported.points("db.client.connection.count")
        assert {labels[1:]: point["value"] for labels, point in points.items()} == {
            ("used", "postgresql"): 2,
            ("idle", "postgresql"): 0,
        }
        points = exported.points("db.client.connection.count")
        assert {labels[1]: point["value"] for labels, point in points.items()} == {
            "used": 0,
            "idle": 2,
        }


async def test_nothing_of_what_is_stored_is_told(
    exported: Exported, service: SessionService, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "adk_sessions")
    app = f"{SECRET}-{app_name}"
    key = {"app_name": app, "user_id": SECRET, "session_id": f"{SECRET}-id"}
    session = await service.create_session(**key, state={SECRET: SECRET})
    await service.append_event(session, event(f"{SECRET}-event", {SECRET: SECRET}))
    with pytest.raises(AlreadyExistsError):
        await service.create_session(**key)
    with pytest.raises(InvalidInputError):
        await service.update_state(app_name=app, delta={f"temp:{SECRET}": 1})
    with pytest.raises(ValueError):  # its message names it
        await service.append_event(Session(app_name=app, user_id="x", id=SECRET), event("b", {}))
    with pytest.raises(InvalidInputError):
        await service.append_event(session, event("\0" + SECRET, {}))
    async with aclosing(service.watch(session, after=f"{SECRET}-event")) as watching:
        waiting = asyncio.ensure_future(anext(watching))
        await service.append_event(session, event(f"{SECRET}-next", {SECRET: SECRET}))
        await waiting
    await service.list_sessions(app_name=app)
    await service.delete_session(**key)
    everything = exported.everything()
    assert "InvalidInputError" in everything
    assert "watch" in everything
    assert SECRET not in everything
    lines = [record.getMessage() for record in caplog.records if record.name == "adk_sessions"]
    assert any(line.startswith("append_event: ") for line in lines)
    assert SECRET not in "".join(lines)


async def test_iterators_are_measured_without_spans(
    exported: Exported, memory: SessionService
) -> None:
    session = await memory.create_session(app_name="app", user_id="ann")
    watching = memory.watch(session, poll_interval=0.01)
    await memory.append_events(session, [event(id, {}) for id in "abc"])
    await anext(watching)
    await watching.aclose()
    assert len([e async for e in memory.iter_events("app", "ann", session.id, batch=2)]) == 3
    assert len([line async for line in memory.export_sessions("app")]) == 6
    durations = exported.points("db.client.operation.duration")
    assert [durations[name, "sqlite"]["count"] for name in ITERATORS] == [1, 2, 1]
    rows = exported.points("db.client.response.returned_rows")
    assert [rows[name, "sqlite"]["sum"] for name in ITERATORS] == [4, 3, 4]
    names = [span.name for span in exported.spans]
    assert names == ["adk_sessions.create_session", "adk_sessions.append_events"]


ITERATORS = ("watch", "iter_events", "export_sessions")


async def test_what_an_operation_calls_of_its_store_is_part_of_it(exported: Exported) -> None:
    class Counting(SessionService):
        async def get_app_state(self, *, app_name: str) -> dict[str, Any]:
            return await super().get_app_state(app_name=app_name)

        @telemetry.measured("both", span=True)
        async def both(self, other: SessionService) -> None:
            await self.get_app_state(app_name="app")
            await other.get_app_state(app_name="app")

    async with Counting("sqlite://") as service, SessionService("sqlite://") as other:
        await service.both(other)
        await service.get_app_state(app_name="app")
    names = [span.name.removeprefix("adk_sessions.") for span in exported.spans]
    assert names == ["get_app_state", "both", "get_app_state"]
    inner, outer, _ = exported.spans
    assert inner.parent is not None
    assert inner.parent.span_id == outer.get_span_context().span_id  # type: ignore[union-attr]


async def test_a_span_is_the_parent_of_what_happens_in_it(
    exported: Exported, memory: SessionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = memory._database.run

    async def watched(work: Any, **options: Any) -> Any:
        seen.append(trace.get_current_span().get_span_context().span_id)
        return await run(work, **options)

    monkeypatch.setattr(memory._database, "run", watched)
    with exported.tracers.get_tracer("test").start_as_current_span("turn") as turn:
        await memory.get_app_state(app_name="app")
    span = exported.named("get_app_state")
    assert set(seen) == {span.get_span_context().span_id}  # type: ignore[union-attr]
    assert span.parent is not None
    assert span.parent.span_id == turn.get_span_context().span_id


async def test_an_error_code_of_the_server_is_told(exported: Exported, postgres_url: str) -> None:
    async with SessionService(postgres_url, migrate="off", table_prefix="none_") as service:
        with pytest.raises(DatabaseError):
            await service.get_app_state(app_name=SECRET)
    attributes = exported.named("get_app_state").attributes or {}
    assert attributes["error.type"] == "DatabaseError"
    assert attributes["db.response.status_code"] == "42P01"
    assert SECRET not in exported.everything()


async def test_a_cancelled_call_is_an_error_and_ends_its_span(
    exported: Exported, memory: SessionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await memory.prepare_tables()
    began = asyncio.Event()

    async def silent(*_: Any, **__: Any) -> Any:
        began.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(memory._database, "run", silent)
    call = asyncio.ensure_future(memory.get_app_state(app_name="app"))
    await began.wait()
    call.cancel()
    await asyncio.wait([call])
    assert (exported.named("get_app_state").attributes or {})["error.type"] == "CancelledError"


async def test_the_log_tells_without_opentelemetry(
    memory: SessionService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "_instruments", None)
    monkeypatch.setattr(telemetry, "_unusable", True)
    session = await memory.create_session(app_name="app", user_id="ann")
    caplog.set_level(logging.DEBUG, "adk_sessions")
    await memory.append_event(session, event("a", {}))
    stale = session.model_copy()
    stale._storage_update_marker = "2020-01-01T00:00:00.000000"
    with pytest.raises(StaleSessionError):
        await memory.append_event(stale, event("b", {}))
    lines = [record.getMessage() for record in caplog.records if record.name == "adk_sessions"]
    assert len(lines) == 2
    assert lines[0].startswith("append_event: ")
    assert lines[0].endswith(" ms, 1 rows, 0 retries, done")
    assert lines[1].endswith(" ms, no rows, 0 retries, StaleSessionError")


SCRIPT = """
import asyncio, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ImportError(name)

if {blocked}:
    sys.meta_path.insert(0, Blocker())
from adk_sessions import Event, SessionService, telemetry

async def main():
    async with SessionService("sqlite://") as service:
        session = await service.create_session(app_name="app", user_id="ann")
        await service.append_event(session, Event(author="user", invocation_id="1"))
        found = await service.get_session(app_name="app", user_id="ann", session_id=session.id)
        assert len(found.events) == 1

{before}
asyncio.run(main())
{after}
"""


def run_script(blocked: bool, before: str = "", after: str = "") -> None:
    script = SCRIPT.format(blocked=blocked, before=before, after=after)
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


def test_it_works_where_opentelemetry_is_not_installed() -> None:
    run_script(True, after="assert not [m for m in sys.modules if 'opentelemetry' in m]")


def test_nobody_else_than_the_application_imports_opentelemetry() -> None:
    run_script(False, after="assert not [m for m in sys.modules if 'opentelemetry' in m]")


def test_the_applications_own_providers_are_used() -> None:
    run_script(
        False,
        before="""
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
asyncio.run(main())  # before there are any
spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
""",
        after="""
names = [span.name for span in spans.get_finished_spans()]
assert names == [f"adk_sessions.{n}" for n in ("create_session", "append_event", "get_session")]
assert "db.client.operation.duration" in reader.get_metrics_data().to_json()
""",
    )
