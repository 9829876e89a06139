"""The metrics, as Prometheus would read them from a real flow."""

from __future__ import annotations

import multiprocessing

import pytest

from strictflow_mp import StrictFlow, read, write

pytest.importorskip("prometheus_client", reason="tox runs this in the environment `extras`")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from strictflow_mp.prometheus import FlowCollector

fork = multiprocessing.get_context("fork")
NAME = "measured"


def scraped(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """The samples of a scrape, by name and by the values of the labels in the order of their names, but the flow's."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels.pop("flow") == NAME
            found[(sample.name, *(sample.labels[label] for label in sorted(sample.labels)))] = sample.value
    return found


@pytest.fixture
def registry():
    registry = CollectorRegistry(auto_describe=True)
    registry.register(FlowCollector(StrictFlow(NAME)))  # before it runs
    return registry


def test_a_flow_that_does_not_run_is_down_and_nothing_else(registry):
    assert scraped(registry) == {("strictflow_up",): 0}
    with StrictFlow(NAME):
        assert scraped(registry)["strictflow_up",] == 1
    assert scraped(registry) == {("strictflow_up",): 0}


def test_registering_asks_nobody():
    class Unasked(FlowCollector):
        def collect(self):
            raise AssertionError

    CollectorRegistry(auto_describe=True).register(Unasked(StrictFlow(NAME)))


def test_a_scrape_says_what_stats_says(registry):
    with StrictFlow(NAME, state={"n": 0}) as flow:

        @write(flow, key="n")
        def add(n, step):
            return n + step

        @read(flow)
        def look():
            return flow.state["n"]

        for future in add.map([1] * 5 + ["no"]):
            future.exception()
        look().result()
        before = flow.stats()
        found = scraped(registry)
    assert before.tasks_run == {1: 6, 2: 1}
    assert found["strictflow_tasks_total", "succeeded", "P1"] == 5
    assert found["strictflow_tasks_total", "failed", "P1"] == 1
    assert found["strictflow_tasks_total", "succeeded", "P2"] == 1
    assert found["strictflow_tasks_total", "failed", "P2"] == 0
    assert found["strictflow_pending_tasks", "P1"] == found["strictflow_pending_tasks", "P2"] == 0
    assert found["strictflow_version",] == before.version
    assert found["strictflow_keys",] == 1
    assert found["strictflow_bytes_used",] == before.bytes_used > 0
    assert found["strictflow_bytes_free",] == before.bytes_free > 0
    assert found["strictflow_bytes_pinned",] == 0
    assert found["strictflow_workers", "attached"] == 1
    assert found["strictflow_restarts_total",] == 0
    assert found["strictflow_readers_waited_total",] == sum(worker.waits for worker in before.workers)
    assert found["strictflow_wait_seconds_total",] == pytest.approx(before.readers_waited)
    assert found["strictflow_uptime_seconds",] >= before.uptime
    latency = before.latency[1]
    for quantile, value in (("0.5", latency.p50), ("0.9", latency.p90), ("0.99", latency.p99), ("1", latency.max)):
        assert found["strictflow_latency_seconds", "P1", quantile] == pytest.approx(value)


def test_it_is_sound_as_openmetrics_too(registry):
    with StrictFlow(NAME):
        text = generate_openmetrics(registry).decode()
    assert text.endswith("# EOF\n")
    assert "strictflow_tasks_total{" in text
