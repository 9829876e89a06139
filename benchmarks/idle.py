"""What a flow costs that does nothing: wake-ups, and time on a core, of all its processes together.

From /proc, so on Linux only: the context switches of every thread, and the nanoseconds that it ran.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from strictflow_mp import StrictFlow

from .measure import Bound, Missing, Outcome, Size, duration, figure

WORKERS = 16
"""Or twice the most processes of the run, if that is less."""


@dataclass(frozen=True)
class Effort:
    """What a process has done so far, all its threads together."""

    switches: int
    seconds: float

    def __sub__(self, before: Effort) -> Effort:
        return Effort(self.switches - before.switches, self.seconds - before.seconds)


def effort(pid: int, *, but: int = 0) -> Effort:
    """Of a process, without the thread *but*."""
    switches = nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int(task.name) != but:
            for line in (task / "status").read_text().splitlines():
                if line.startswith(("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")):
                    switches += int(line.split()[1])
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return Effort(switches, nanoseconds / 1e9)


def wait(flow: StrictFlow) -> None:
    """The worker: read once, then sleep until it is stopped."""
    flow.state["config"]
    flow.put(f"worker:{os.getpid()}", True).result()
    while True:
        time.sleep(3600)


@contextmanager
def sleeping(workers: int) -> Iterator[tuple[int, list[int]]]:
    """A flow whose workers have read and sleep; the pids of the coordinator and of the workers.

    They are started to be started anew when they fail, for a supervisor must cost nothing either.
    """
    if not Path("/proc/self/schedstat").exists():
        raise Missing("this system has no /proc/PID/schedstat")
    with StrictFlow(state={"config": 1}) as flow:
        coordinator = flow.stats().coordinator_pid
        group = flow.spawn(wait, flow, processes=workers, restart="on-failure")
        try:
            pids = [worker.pid for worker in group]
            while not all(f"worker:{pid}" in flow.state for pid in pids):
                time.sleep(0.05)
            time.sleep(0.5)
            yield coordinator, pids
        finally:
            group.terminate()
            group.join()


def _idle(size: Size) -> tuple[float, list[dict[str, Effort]]]:
    """Seconds of a window, and for each window what the coordinator, the workers and the owner did in it.

    The owner is this process, without the thread that measures.
    """
    seconds = size.seconds * 100
    windows = []
    with sleeping(min(WORKERS, 2 * size.processes[-1])) as (coordinator, pids):
        me = os.getpid()

        def look() -> dict[str, Effort]:
            workers = [effort(pid) for pid in pids]
            total = Effort(sum(each.switches for each in workers), sum(each.seconds for each in workers))
            return {"coordinator": effort(coordinator), "workers": total, "owner": effort(me, but=me)}

        for _ in range(min(size.repetitions, 5)):
            before = look()
            time.sleep(seconds)
            after = look()
            windows.append({who: after[who] - before[who] for who in after})
    return seconds, windows


@figure(f"wake-ups a second of an idle flow with {WORKERS} idle workers", unit="/s")
def wakeups(size: Size) -> Outcome:
    """Context switches a second of coordinator, workers and the owner's own threads, when nobody submits or reads."""
    seconds, windows = _idle(size)
    rates = {who: sum(each[who].switches for each in windows) / seconds / len(windows) for who in windows[0]}
    values = [max(1e-9, sum(each.switches for each in one.values()) / seconds) for one in windows]
    note = ", ".join(f"{who} {rate:.2g}/s" for who, rate in rates.items())
    return Outcome(values, f"{statistics.median(values):.3g}/s", note=f"{note}; in {seconds:g} s")


@figure(f"time on a core of an idle flow with {WORKERS} idle workers", Bound("≤", 0.5), "%")
def cpu(size: Size) -> Outcome:
    """The share of one core that all processes of the flow take together, when nobody submits or reads."""
    seconds, windows = _idle(size)
    values = [max(1e-9, 100 * sum(each.seconds for each in one.values()) / seconds) for one in windows]
    worst = {who: max(each[who].seconds for each in windows) / seconds for who in windows[0]}
    note = ", ".join(f"{who} {duration(share)}" for who, share in worst.items())
    return Outcome(values, f"{statistics.median(values):.2g} %", note=f"{note} each second, at most")
