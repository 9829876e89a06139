"""A glance: what shared memory says about a flow, alive or dead, to somebody who is not attached.

Owns: nothing.
Written by: nobody; nothing is stored and nobody is asked, so a glance disturbs no flow and waits for no task.
Read by: `ls`, also for flows that are dead, and `top` (`looks`), while SF-LOOP does not answer.
Order: none. These are figures for people: each is true at some moment of the glance, not all at the same one, and
    the number of keys may be that of a version which came meanwhile.
If we die here: nothing is left.
Invariants: the segment that is opened here is closed here, and no slot is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..memory.fences import WORD
from ..memory.segment import PREFIX, R_COUNT, W_VERSION, Segment
from ..memory.suspect import suspect_of
from ..wire.stats import FlowStats, WorkerStats

if TYPE_CHECKING:
    from ..system.place import Place

__all__ = ["Glance", "glance"]


@dataclass(frozen=True)
class Glance:
    """What was seen.

    `bytes` is all shared memory that the flow takes, `busy` the pid of the process whose task runs in SF-LOOP (None:
    none does, or its process is gone). Of the workers, `cpu` and `rss` are None.
    """

    pid: int
    version: int
    keys: int
    bytes: int
    busy: int | None
    workers: tuple[WorkerStats, ...]

    def onto(self, stats: FlowStats) -> FlowStats:
        """Older statistics, brought up to date as far as a glance goes."""
        known = {(worker.pid, worker.slot): worker.state for worker in stats.workers}
        workers = tuple(
            replace(worker, state=known.get((worker.pid, worker.slot), worker.state)) for worker in self.workers
        )
        return replace(stats, version=self.version, keys=self.keys, workers=workers)


def glance(place: Place) -> Glance | None:
    """Look at the flow of a place; None when there is nothing to see: it has just begun, or ended.

    Raises:
        ProtocolError: its shared memory is damaged, or of another version of this package.
    """
    resident = place.resident()
    if resident is None:
        return None
    try:
        segment = Segment.open(PREFIX + resident.token)
    except FileNotFoundError:
        return None
    try:
        return _of(segment, resident.pid)
    finally:
        segment.close()


def _of(segment: Segment, coordinator: int) -> Glance:
    workers = tuple(
        WorkerStats(
            pid=pid,
            slot=slot.number,
            state="attached",
            cpu=None,
            rss=None,
            waits=slot.waits,
            waited=slot.waited / 1e9,
            is_waiting=bool(slot.waiting),
        )
        for slot in map(segment.slot, range(1, segment.slots))
        if (pid := slot.pid)
    )
    running = suspect_of(segment)
    version = segment.words[W_VERSION]
    return Glance(
        pid=coordinator,
        version=version,
        keys=segment.words[segment.record(version) + R_COUNT],
        bytes=segment.words_claimed * WORD,
        busy=next((worker.pid for worker in workers if running and worker.slot == running.slot), None),
        workers=workers,
    )
