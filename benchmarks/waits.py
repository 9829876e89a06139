"""Waiting: how soon a gated read goes on when its P1 has ended, and what is read while others write."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter

from strictflow_mp import StrictFlow, write

from .measure import Bound, Outcome, Size, bound_figures, child, compare, duration, figure, now
from .peers import semaphore_poster, spin
from .writes import increment

WORK = 0.001
"""Seconds that the P1 lasts: longer than a reader spins, so it sleeps."""


def work(value: int, seconds: float) -> int:
    """The P1 task: keep the core busy for that long, return when that ended."""
    return spin(seconds)


@figure("P1's end to the value in a gated read that waits ÷ semaphore wake", Bound("≤", 2))
def woken(size: Size) -> Outcome:
    """A process submits a P1 of 1 ms and reads at once what it writes: the time at which its function ended.

    Ours: from then until the read has returned the value, so commit, wake-up and read. The floor: a process
    that works for 1 ms, notes the time and posts a named semaphore, until the one that sleeps on it runs.
    Both are medians, for a wake-up is shorter than one interruption.
    """
    return bound_woken(size, lambda: None)


@bound_figures("P1's end to the value in a gated read that waits ÷ semaphore wake")
def bound_woken(size: Size, go: Callable[[], None]) -> Outcome:
    """`woken`. On one core a semaphore takes a switch, and commit and read are the rest; on two, one is woken."""
    with StrictFlow(state={"ended": 0}) as flow, semaphore_poster(WORK) as (semaphore, poster):
        go()
        task = write(flow, key="ended")(work)

        def ours(count: int) -> float:
            times = []
            for _ in range(count):
                future = task(WORK)
                ended = flow.state["ended"]
                times.append(now() - ended)
                future.result()
            return statistics.median(times) * count / 1e9

        def floor(count: int) -> float:
            times = []
            for _ in range(count):
                poster.send(None)
                semaphore.acquire()
                woken = now()
                times.append(woken - poster.recv())
            return statistics.median(times) * count / 1e9

        return compare(ours, floor, Size(size.repetitions, size.seconds / 30, size.keys), peer_is="semaphore")


@figure("gated reads a second while two workers write ÷ while nobody does", Bound(">", 0))
def under_writes(size: Size) -> Outcome:
    """One process reads the key that two others change with one P1 after the other, each waiting for its result.

    The value of a repetition comes from a window with the writers and one without; the bound holds for each.
    On fewer than four cores the reader shares its core with writers and coordinator.
    """
    seconds = size.seconds * 4
    latencies: list[float] = []
    rates = []
    ratios = []
    with StrictFlow(state={"counter": 0}) as flow, child(writer, flow) as one, child(writer, flow) as two:
        writers = (one, two)
        _read_for(flow, seconds)
        for _ in range(size.repetitions):
            quiet = _read_for(flow, seconds)
            for connection in writers:
                connection.send(None)
            for connection in writers:
                connection.recv()
            began = perf_counter()
            busy = _read_for(flow, seconds)
            lasted = perf_counter() - began
            for connection in writers:
                connection.send(None)
            rates.append(sum(connection.recv() for connection in writers) / lasted)
            latencies += busy
            ratios.append(len(busy) / len(quiet))
    latencies.sort()
    p99 = duration(latencies[int(0.99 * (len(latencies) - 1))])
    note = f"p99 {p99}, slowest {duration(latencies[-1])}; {statistics.median(rates):,.0f} P1/s meanwhile"
    reads = len(latencies) / (seconds * size.repetitions)
    return Outcome(ratios, f"{reads:,.0f}/s", note=note)


def _read_for(flow: StrictFlow, seconds: float) -> list[float]:
    """Read for that long; how long each read took."""
    state = flow.state
    times = []
    now = perf_counter()
    end = now + seconds
    while now < end:
        began = now
        state["counter"]
        now = perf_counter()
        times.append(now - began)
    return times


def writer(connection: Connection, flow: StrictFlow) -> None:
    """In a child: between one message and the next, one P1 after the other; answer when the first is done, and
    at the end how many it were."""
    add = write(flow, key="counter")(increment)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        add(1).result()
        connection.send(None)
        count = 0
        while count % 20 or not connection.poll():
            add(1).result()
            count += 1
        connection.recv()
        connection.send(count)
