"""Spans, as the OpenTelemetry SDK collects them."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from strictflow_mp import StrictFlow, read, write

pytest.importorskip("opentelemetry.sdk", reason="tox runs this in the environment `extras`")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from strictflow_mp.otel import spans

exporter = InMemorySpanExporter()


@pytest.fixture(autouse=True, scope="module")
def provider():
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


@pytest.fixture
def flow():
    exporter.clear()
    with StrictFlow("spanned", state={"n": 0}) as flow:
        yield flow


@pytest.fixture
def finished(eventually):
    """The spans that have ended in this process; as many as expected."""

    def finished(count: int) -> list:
        return eventually(lambda: len(found := exporter.get_finished_spans()) == count and list(found))

    return finished


def provide(path: str) -> None:
    """In the coordinator: write each span that ends there into a file."""

    class ToFile(SimpleSpanProcessor):
        def on_end(self, span) -> None:
            with open(path, "a") as file:
                parent = span.parent
                said = (span.name, span.kind.name, span.status.status_code.name)
                print(*said, format(span.context.trace_id, "x"), format(parent.span_id, "x"), file=file)

    provider = TracerProvider()
    provider.add_span_processor(ToFile(InMemorySpanExporter()))
    trace.set_tracer_provider(provider)


def test_a_call_is_a_span_from_submit_to_answer(flow, finished):
    @spans
    @write(flow, key="n")
    def add(n, step):
        return n + step

    with trace.get_tracer("test").start_as_current_span("outer"):
        future = add(2)
    assert future.result() == 2
    outer, span = finished(2)
    assert outer.name == "outer"
    assert (span.name, span.kind, span.status.status_code) == ("add", SpanKind.PRODUCER, StatusCode.UNSET)
    assert span.parent.span_id == outer.context.span_id
    assert span.attributes["strictflow.flow"] == "spanned"
    assert span.attributes["strictflow.priority"] == 1
    assert span.attributes["code.function.name"].endswith("add")
    assert span.end_time >= outer.end_time
    assert flow.state["n"] == 2


def test_the_error_of_a_task_is_that_of_its_span(flow, finished):
    @spans
    @read(flow)
    def fail():
        raise ValueError("no")

    assert type(fail().exception()) is ValueError
    [span] = finished(1)
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "ValueError: no"
    assert [event.name for event in span.events] == ["exception"]
    assert span.attributes["strictflow.priority"] == 2


def test_the_run_is_a_child_where_the_coordinator_has_a_provider(flow, finished, tmp_path):
    path = tmp_path / "spans"
    path.touch()

    @spans
    @write(flow)
    async def set_to(n):
        await asyncio.sleep(0)
        flow.state["n"] = n

    @spans
    @read(flow)
    async def look():
        await asyncio.sleep(0)
        return flow.state["n"], trace.get_current_span().is_recording()

    @spans
    @write(flow)
    def fail():
        raise ValueError("no")

    write(flow)(provide)(str(path)).result()
    set_to(3).result()
    assert look().result() == (3, True)
    fail().exception()
    mine = [(span.name, format(span.context.trace_id, "x"), format(span.context.span_id, "x")) for span in finished(3)]
    theirs = [line.split() for line in path.read_text().splitlines()]
    assert [(name, *rest) for _, name, _, _, *rest in theirs] == mine
    assert {(run, kind) for run, _, kind, *_ in theirs} == {("run", "CONSUMER")}
    assert [status for _, _, _, status, *_ in theirs] == ["UNSET", "UNSET", "ERROR"]


def test_calls_in_one_go_are_one_span(flow, finished, tmp_path):
    gate = tmp_path / "open"

    @spans
    @write(flow)
    def set_to(n):
        flow.state["n"] = n
        time.sleep(0.001)  # so that they are several bursts, and the first is answered ahead of the last
        while n == 19 and not gate.exists():
            time.sleep(0.001)

    futures = set_to.map(range(20))
    futures[0].result()
    early = exporter.get_finished_spans()
    gate.touch()
    assert not early
    assert [future.result() for future in futures] == [None] * 20
    assert set_to.map([]) == []
    empty, span = sorted(finished(2), key=lambda span: span.attributes["strictflow.calls"])
    assert (empty.attributes["strictflow.calls"], span.attributes["strictflow.calls"]) == (0, 20)


def test_a_p2_in_the_calling_process_is_one_span(flow, finished):
    @spans
    @read(flow, where="worker", key="n")
    def look(n):
        assert trace.get_current_span().is_recording()
        return n

    @spans
    @read(flow, where="worker")
    async def look_async():
        await asyncio.sleep(0)
        return flow.state["n"]

    assert look().result() == look_async().result() == 0
    assert look.map([]) == []
    assert [future.result() for future in look_async.map()] == []
    found = finished(4)
    assert [span.name for span in found] == ["look", "look_async", "look", "look_async"]
    assert {span.kind for span in found} == {SpanKind.INTERNAL}


def test_a_call_that_cannot_be_submitted_ends_its_span(flow, finished):
    @spans
    @write(flow)
    def take(value):
        pass

    with pytest.raises(TypeError):
        take(object())
    [span] = finished(1)
    assert span.status.status_code is StatusCode.ERROR


def test_it_goes_above_a_task_only():
    with pytest.raises(TypeError, match="goes above"):
        spans(len)


def test_a_spawned_worker_makes_spans_too(flow, tmp_path, eventually):
    path = tmp_path / "spans"

    @spans
    @write(flow)
    def set_to(n):
        flow.state["n"] = n

    def worker():
        provide_all(str(path))
        set_to(5).result()
        # The span ends in the thread that reads the answer, which ends with us.
        while not os.path.exists(path) or not os.path.getsize(path):
            time.sleep(0.001)

    def provide_all(path):
        class ToFile(SimpleSpanProcessor):
            def on_end(self, span):
                with open(path, "a") as file:
                    print(span.name, span.kind.name, file=file)

        provider = TracerProvider()
        provider.add_span_processor(ToFile(InMemorySpanExporter()))
        trace.set_tracer_provider(provider)

    flow.spawn(worker).join()
    assert eventually(path.exists)
    eventually(lambda: path.read_text() == "set_to PRODUCER\n")
