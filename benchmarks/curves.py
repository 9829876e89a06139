"""Curves: how a cost grows with the size of the state, and with what others do meanwhile. The plots draw them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from strictflow_mp import StrictFlow

from .measure import Bound, Missing, Outcome, Size, child, duration, figure, quantiles
from .waits import writer
from .writes import commits, lmdb_commits, lmdb_store, store

WRITERS = (0, 1, 2, 4)
"""Processes that write while one reads."""


def powers(most: int) -> list[int]:
    """10, 100, … and the most."""
    return [*(10**digits for digits in range(1, 8) if 10**digits < most), most]


@contextmanager
def lmdb_or_none(keys: int) -> Iterator[Any]:
    """`lmdb_store`, or None where LMDB is not installed."""
    with ExitStack() as stack:
        try:
            environment = stack.enter_context(lmdb_store(keys))
        except Missing:
            environment = None
        yield environment


@figure("commit of one key: slowest number of keys ÷ fastest", Bound("≤", 3))
def commit_by_keys(size: Size) -> Outcome:
    """One commit of one random key among 10, 100, … 1,000,000: ours, and beside it LMDB's. Both have packed values.

    Ours is the coordinator's share alone, as in `writes.commit`; LMDB's is a whole write transaction of the caller.
    """
    found: dict[str, list[float]] = {"keys": [], "ours": [], "LMDB": []}
    table: list[list[float]] = []
    for keys in powers(size.keys):
        with store(keys) as ours, lmdb_or_none(keys) as environment:
            runs = [commits(ours, keys)]
            if environment is not None:
                runs.append(lmdb_commits(environment, keys))
            runs[0](round(size.seconds * 5e5))  # until memory is reused
            counts = [max(10, round(size.seconds / (run(200) / 200))) for run in runs]
            times: list[list[float]] = [[] for _ in runs]
            for _ in range(size.repetitions):
                for run, count, each in zip(runs, counts, times, strict=True):
                    each.append(run(count) / count)
        table.append(times[0])
        found["keys"].append(float(keys))
        for name, each in zip(("ours", "LMDB"), times, strict=False):
            found[name].append(statistics.median(each))
    values = [max(column) / min(column) for column in zip(*table, strict=True)]
    ours_text = f"{duration(found['ours'][0])} … {duration(found['ours'][-1])}"
    peer = f"LMDB {duration(found['LMDB'][0])} … {duration(found['LMDB'][-1])}" if found["LMDB"] else ""
    return Outcome(values, ours_text, peer, f"10 … {size.keys:,} keys", found)


@figure("gated read, 99.9 %, while 4 processes write ÷ while nobody does")
def read_under_load(size: Size) -> Outcome:
    """One process reads the key that 0, 1, 2 or 4 others change with one P1 after the other; each read is timed.

    What waits is in it: a read that begins while a P1 is submitted waits for its end.
    """
    seconds = size.seconds * 50
    series: dict[str, list[float]] = {}
    tails: dict[int, list[float]] = {}
    reads = []
    with StrictFlow(state={"counter": 0}) as flow, ExitStack() as stack:
        state = flow.state
        busy: list[Connection] = []
        for writers in WRITERS:
            while len(busy) < writers:
                busy.append(stack.enter_context(child(writer, flow)))
            times: list[float] = []
            parts = 3
            for _ in range(parts):
                for connection in busy:
                    connection.send(None)
                for connection in busy:
                    connection.recv()
                part: list[float] = []
                now = perf_counter()
                end = now + seconds / parts
                while now < end:
                    began = perf_counter()
                    state["counter"]
                    now = perf_counter()
                    part.append(now - began)
                for connection in busy:
                    connection.send(None)
                written = sum(connection.recv() for connection in busy)
                part.sort()
                tails.setdefault(writers, []).append(part[int(0.999 * (len(part) - 1))])
                times += part
            reads.append(len(times) / seconds)
            series[f"{writers} writers"] = quantiles(times)
        note = f"{written / (seconds / parts):,.0f} P1/s by {WRITERS[-1]}"
    values = [loaded / quiet for loaded, quiet in zip(tails[WRITERS[-1]], tails[0], strict=True)]
    return Outcome(values, f"{reads[-1]:,.0f} reads/s", f"quiet {reads[0]:,.0f} reads/s", note, series)
