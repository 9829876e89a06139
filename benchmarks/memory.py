"""Memory: of the coordinator, and of a key."""

from __future__ import annotations

import statistics
from multiprocessing.connection import Connection

import psutil
from msgpack import packb

from strictflow_mp import StrictFlow

from .measure import Bound, Outcome, Size, child, figure
from .reads import VALUE


@figure("coordinator's memory, empty flow", Bound("≤", 30), "MB")
def empty(size: Size) -> Outcome:
    """Resident memory of the coordinator of a flow without a key, when it has answered a first P1.

    Seen from outside: `flow.stats` would make it import psutil.
    """
    values, unique = [], []
    for _ in range(min(size.repetitions, 5)):
        before = set(psutil.Process().children())
        with StrictFlow() as flow:
            flow.put("config", 1).result()
            (coordinator,) = set(psutil.Process().children()) - before
            memory = coordinator.memory_full_info()
            values.append(memory.rss / 1e6)
            unique.append(memory.uss / 1e6)
    return Outcome(values, f"{statistics.median(values):.1f} MB", note=f"{statistics.median(unique):.1f} MB its own")


def attached(connection: Connection, flow: StrictFlow | None) -> None:
    """In a child: read once, if there is a flow, and stay until the pipe is closed."""
    if flow is not None:
        flow.state["config"]
    connection.send(None)
    try:
        connection.recv()
    except EOFError:
        pass


@figure("memory of a worker beyond an interpreter that has imported the package", unit="MB")
def worker(size: Size) -> Outcome:
    """What is a process's own (USS) when it has attached and read one key, less the same of a process that has not.

    Both are fresh interpreters that have imported this module. The segment's pages are shared, and not counted.
    """
    values, resident = [], []
    with StrictFlow(state={"config": VALUE}) as flow:
        for _ in range(min(size.repetitions, 5)):
            found = []
            for handle in (flow, None):
                before = set(psutil.Process().children())
                with child(attached, handle) as connection:
                    connection.recv()
                    (process,) = (set(psutil.Process().children()) - before) - set(_trackers())
                    found.append(process.memory_full_info())
            with_flow, without = found
            values.append(max(1e-9, (with_flow.uss - without.uss) / 1e6))
            resident.append(with_flow.rss / 1e6)
    note = f"{statistics.median(resident):.1f} MB resident in all"
    return Outcome(values, f"{statistics.median(values):.2f} MB", note=note)


def _trackers() -> list[psutil.Process]:
    """The resource tracker, which the first child may bring along."""
    return [process for process in psutil.Process().children() if "resource_tracker" in " ".join(process.cmdline())]


@figure("memory of a small key beyond its payload", Bound("≤", 160), "bytes")
def per_key(size: Size) -> Outcome:
    """What `stats().bytes_used` grows by for each key, less its packed value: so the key itself counts.

    The share of the tree's nodes goes up and down with the number of keys, so that the worst of three sizes
    is taken.
    """
    total = min(size.keys, 100_000)
    values = []
    worst = 0
    for _ in range(min(size.repetitions, 3)):
        found = {keys: _overhead(keys) for keys in (total // 100, total * 6 // 10, total)}
        worst = max(found, key=found.__getitem__)
        values.append(found[worst])
    return Outcome(values, f"{statistics.median(values):.0f} bytes", note=f"at {worst:,} keys")


def _overhead(keys: int) -> float:
    with StrictFlow() as flow:
        before = flow.stats().bytes_used
        flow.update({f"key:{number}": VALUE for number in range(keys)}).result()
        return (flow.stats().bytes_used - before) / keys - len(packb(VALUE))
