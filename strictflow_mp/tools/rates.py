"""Rates: what happened between two looks at a flow. Decisions only, for `top`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..wire.stats import FlowStats

__all__ = ["Rates", "rates"]


@dataclass(frozen=True)
class Rates:
    """Per second, but for `wait`: the mean time, in seconds, that a read took that had to wait.

    `tasks` and `failed` by priority: ``{1: ..., 2: ...}``. `wait` is None when no read had to.
    """

    tasks: dict[int, float]
    failed: dict[int, float]
    commits: float
    waits: float
    wait: float | None


def rates(before: FlowStats, now: FlowStats, seconds: float) -> Rates:
    """What happened in the *seconds* from one look to the next.

    A coordinator that has taken over counts its tasks from 0; commits and waits are counted in shared memory.
    """
    is_new = before.coordinator_pid != now.coordinator_pid or before.restarts != now.restarts
    seconds = max(seconds, 1e-3)
    counted = max(min(seconds, now.uptime), 1e-3) if is_new else seconds

    def rise(former: int, latter: int) -> float:
        return max(latter - (0 if is_new else former), 0) / counted

    known = {(worker.pid, worker.slot): worker for worker in before.workers}
    waits, waited = 0, 0.0
    for worker in now.workers:
        former = known.get((worker.pid, worker.slot))
        waits += worker.waits - (former.waits if former else 0)
        waited += worker.waited - (former.waited if former else 0.0)
    return Rates(
        tasks={level: rise(before.tasks_run[level], run) for level, run in now.tasks_run.items()},
        failed={level: rise(before.tasks_failed[level], failed) for level, failed in now.tasks_failed.items()},
        commits=max(now.version - before.version, 0) / seconds,
        waits=max(waits, 0) / seconds,
        wait=waited / waits if waits > 0 else None,
    )
