"""Prometheus: `flow.stats()` as metrics, read anew at each scrape. Needs prometheus-client: the extra `prometheus`.

>>> from prometheus_client import REGISTRY, start_http_server     # doctest: +SKIP
>>> REGISTRY.register(FlowCollector(flow))                        # doctest: +SKIP
>>> start_http_server(9100)                                       # doctest: +SKIP

One process of the flow is enough. Names and units are those of Prometheus' best practices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "strictflow_mp.prometheus needs prometheus-client: pip install 'strictflow-mp[prometheus]'"
    ) from error

from .errors import CoordinatorLost, FlowNotRunning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .flow.handle import StrictFlow
    from .wire.stats import FlowStats

__all__ = ["FlowCollector"]

QUANTILES = {"p50": "0.5", "p90": "0.9", "p99": "0.99", "max": "1"}


class FlowCollector(Collector):
    """The metrics of one flow.

    A scrape asks the coordinator, so it waits for the P1 that runs. A flow that does not run has `strictflow_up` 0, and
    nothing else; it may be started and stopped while the collector is registered.
    """

    def __init__(self, flow: StrictFlow) -> None:
        self._flow = flow

    def describe(self) -> list[Metric]:
        """Nothing: or else it would be collected when it is registered, and the flow may not run yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics as of now."""
        name = self._flow.name
        stats = None
        if self._flow.is_running:
            try:
                stats = self._flow.stats()
            except (FlowNotRunning, CoordinatorLost):
                pass  # it has just ended
        yield _gauge("up", "Whether the flow runs.", name, stats is not None)
        if stats is not None:
            yield from _counters(stats)
            yield from _gauges(stats)
            yield _latency(stats)

    def __repr__(self) -> str:
        return f"<FlowCollector of {self._flow.name!r}>"


def _gauge(what: str, help: str, flow: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"strictflow_{what}", help, labels=["flow"])
    family.add_metric([flow], value)
    return family


def _counter(what: str, help: str, flow: str, value: float) -> Metric:
    family = CounterMetricFamily(f"strictflow_{what}", help, labels=["flow"])
    family.add_metric([flow], value)
    return family


def _counters(stats: FlowStats) -> Iterator[Metric]:
    flow = stats.name
    tasks = CounterMetricFamily(
        "strictflow_tasks", "Tasks that SF-LOOP has answered.", labels=["flow", "priority", "outcome"]
    )
    for level, run in stats.tasks_run.items():
        failed = stats.tasks_failed[level]
        tasks.add_metric([flow, f"P{level}", "succeeded"], run - failed)
        tasks.add_metric([flow, f"P{level}", "failed"], failed)
    yield tasks
    waits = sum(worker.waits for worker in stats.workers)
    yield _counter("readers_waited", "Gated reads that had to wait, of the processes that are attached.", flow, waits)
    yield _counter("wait_seconds", "How long they waited.", flow, stats.readers_waited)
    yield _counter("restarts", "Coordinators that took over from a dead one.", flow, stats.restarts)


def _gauges(stats: FlowStats) -> Iterator[Metric]:
    flow = stats.name
    pending = GaugeMetricFamily("strictflow_pending_tasks", "Tasks that are queued.", labels=["flow", "priority"])
    for level, count in stats.tasks_pending.items():
        pending.add_metric([flow, f"P{level}"], count)
    yield pending
    yield _gauge("version", "The last committed version.", flow, stats.version)
    yield _gauge("keys", "Keys in the state.", flow, stats.keys)
    yield _gauge("bytes_used", "Bytes of shared memory that the state takes.", flow, stats.bytes_used)
    yield _gauge("bytes_free", "Bytes of its capacity that are left.", flow, stats.bytes_free)
    yield _gauge("bytes_pinned", "Bytes that only snapshots still need.", flow, stats.bytes_pinned)
    yield _gauge("uptime_seconds", "Seconds since the coordinator was started.", flow, stats.uptime)
    workers = GaugeMetricFamily("strictflow_workers", "Processes that have a slot.", labels=["flow", "state"])
    states = [worker.state for worker in stats.workers]
    for state in sorted({"attached", *states}):
        workers.add_metric([flow, state], states.count(state))
    yield workers


def _latency(stats: FlowStats) -> Metric:
    family = SummaryMetricFamily(
        "strictflow_latency_seconds",
        "From a task's arrival to its answer, over the last tasks of each priority; quantile 1 is the slowest.",
    )
    for level, latency in stats.latency.items():
        for field, quantile in QUANTILES.items():
            labels = {"flow": stats.name, "priority": f"P{level}", "quantile": quantile}
            family.add_sample("strictflow_latency_seconds", labels, getattr(latency, field))
    return family
