"""Statistics: what `StrictFlow.stats` returns, and how the coordinator counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

__all__ = ["Counters", "FlowStats", "Latency", "WorkerStats"]

SAMPLES = 2048
"""Latencies kept for each priority."""


@dataclass(frozen=True)
class Latency:
    """Percentiles in seconds, from the arrival of a task to its answer, over the last tasks."""

    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class WorkerStats:
    """One attached process. `cpu` is a percentage of one core since its start, `rss` bytes.

    `state` is "attached"; "away" when it was attached to a coordinator that died, and has had no reason yet to come to
    the next; or "leaving" while its end is not proved yet. `cpu` and `rss` are None when the
    process cannot be seen. `waits` and `waited` (seconds) are those of its gated reads; `is_waiting` says whether one
    sleeps at the gate now.
    """

    pid: int
    slot: int
    state: str
    cpu: float | None
    rss: int | None
    waits: int
    waited: float
    is_waiting: bool = False


@dataclass(frozen=True)
class FlowStats:
    """The state of a flow, at one moment. Counts and latencies by priority: ``{1: ..., 2: ...}``.

    P2 counts are those of tasks that SF-LOOP ran; reads of ``flow.state`` in other processes cost nothing and
    are not counted. Times are seconds, sizes bytes. *version* counts commits: a task that failed or changed nothing
    makes one too, which says so; so do a takeover, and the eighth process, the sixteenth, and so on.
    """

    name: str
    version: int
    keys: int
    coordinator_pid: int
    restarts: int
    uptime: float
    tasks_run: Mapping[int, int]
    tasks_failed: Mapping[int, int]
    tasks_pending: Mapping[int, int]
    latency: Mapping[int, Latency]
    readers_waited: float
    bytes_used: int
    bytes_free: int
    bytes_pinned: int
    workers: tuple[WorkerStats, ...] = field(default=())

    @property
    def readers_waiting(self) -> int:
        """Processes of which a read sleeps at the gate now."""
        return sum(worker.is_waiting for worker in self.workers)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FlowStats:
        """The inverse of `as_dict`."""
        plain = dict(fields)
        plain["latency"] = {key: Latency(**value) for key, value in plain["latency"].items()}
        plain["workers"] = tuple(WorkerStats(**worker) for worker in plain["workers"])
        return cls(**plain)


_arrived, _failure = attrgetter("arrived"), attrgetter("failure")


class Counters:
    """What the coordinator counts for one priority."""

    def __init__(self) -> None:
        self.run = 0
        self.failed = 0
        self._latencies: deque[int] = deque(maxlen=SAMPLES)

    def ran(self, nanoseconds: int, failed: bool) -> None:
        """A task was answered."""
        self.run += 1
        self.failed += failed
        self._latencies.append(nanoseconds)

    def ran_all(self, now: int, tasks: list[Any]) -> None:
        """Several tasks were answered at that time; each says when it `arrived` and whether it has a `failure`."""
        self._latencies.extend(map(now.__sub__, map(_arrived, tasks)))
        self.failed += sum(failure is not None for failure in map(_failure, tasks))
        self.run += len(tasks)

    def latency(self) -> Latency:
        """Percentiles over the last tasks."""
        ordered = sorted(self._latencies)
        if not ordered:
            return Latency(0.0, 0.0, 0.0, 0.0)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e9

        return Latency(at(0.5), at(0.9), at(0.99), ordered[-1] / 1e9)

    def __repr__(self) -> str:
        return f"<Counters: {self.run} run, {self.failed} failed>"
