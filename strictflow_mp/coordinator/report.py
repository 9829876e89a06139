"""The report: a flow's statistics as they are now, read from the coordinator's parts and the segment's words."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from ..core import READ_PRIORITY, WRITE_PRIORITY
from ..memory.segment import R_COUNT, W_RELOADS, W_RESTARTS, W_VERSION
from ..wire.stats import FlowStats, WorkerStats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..memory.segment import Segment
    from .counters import Counters
    from .parts import Parts
    from .sessions import Session

__all__ = ["report"]


def report(parts: Parts, counters: Mapping[int, Counters], began: float) -> FlowStats:
    """The statistics.

    Args:
        counters: of the runner, by priority.
        began: when the coordinator did, by `time.monotonic`.
    """
    segment, writer, scheduler = parts.segment, parts.writer, parts.scheduler
    words = segment.words
    workers = tuple(_worker(session, segment) for session in parts.sessions)
    version = words[W_VERSION]
    return FlowStats(
        name=parts.flow,
        version=version,
        keys=words[segment.record(version) + R_COUNT],
        coordinator_pid=os.getpid(),
        restarts=words[W_RESTARTS],
        reloads=words[W_RELOADS],
        uptime=time.monotonic() - began,
        tasks_run={level: counter.run for level, counter in counters.items()},
        tasks_failed={level: counter.failed for level, counter in counters.items()},
        tasks_pending={WRITE_PRIORITY: scheduler.writes, READ_PRIORITY: scheduler.reads},
        latency={level: counter.latency() for level, counter in counters.items()},
        readers_waited=sum(worker.waited for worker in workers),
        bytes_used=writer.bytes_used,
        bytes_free=writer.bytes_free,
        bytes_pinned=writer.bytes_pinned,
        workers=workers,
    )


def _worker(session: Session, segment: Segment) -> WorkerStats:
    cpu, rss = _usage(session.identity.pid)
    slot = segment.slot(session.slot)
    return WorkerStats(
        pid=session.identity.pid,
        slot=session.slot,
        state=session.state,
        cpu=cpu,
        rss=rss,
        waits=slot.waits,
        waited=slot.waited / 1e9,
        is_waiting=bool(slot.waiting),
    )


def _usage(pid: int) -> tuple[float | None, int | None]:
    """Percent of a core since its start, and bytes in memory; None when the process cannot be seen."""
    import psutil  # 15 ms that a start does not need

    cpu = rss = None
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            lifetime = time.time() - process.create_time()
            cpu = round(100 * (times.user + times.system) / max(lifetime, 0.01), 1)
            rss = process.memory_info().rss
    except psutil.Error:
        pass
    return cpu, rss
