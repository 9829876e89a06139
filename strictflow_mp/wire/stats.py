"""Statistics: what `StrictFlow.stats` returns. They cross as plain containers, `as_dict` there and `from_dict` here.

The coordinator counts (`coordinator.counters`); what readers waited, each of them counts itself, in shared memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FlowStats", "Latency", "WorkerStats"]


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
    *reloads* are those of *restarts* that were asked for.
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
    reloads: int = 0

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
