"""Many processes, many threads, many awaiting tasks: does the throughput hold, and does anybody starve?

Every process attaches when its turn has come, and stays. All that take part begin at one moment and stop at one; what
each did meanwhile is counted, and how long it waited for its slowest operation. On a machine with few cores a
throughput that stays level is all there is to be had.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle, islice, repeat
from multiprocessing.connection import Connection
from time import perf_counter, sleep

from strictflow_mp import StrictFlow, write

from .measure import Bound, Outcome, Size, child, compare, duration, figure, now
from .reads import VALUE
from .writes import increment

READS = 50
"""Reads between two looks at the clock."""
AHEAD = 0.05
"""Seconds after which a window begins that was just agreed."""

Did = tuple[int, float]
"""In a window: how many operations, and the seconds of the slowest look (`READS` reads, or one P1)."""


def taker(connection: Connection, flow: StrictFlow) -> None:
    """In a child: asked for ("read" or "write", begin, end), do so in that window; answer what it `Did`."""
    state = flow.state
    state["config"]
    add = write(flow, key="counter")(increment)
    add(0).result()
    connection.send(None)
    while True:
        try:
            what, begin, end = connection.recv()
        except EOFError:
            return
        while now() < begin:
            sleep(0.0005)
        count, slowest, at = 0, 0, now()
        while at < end:
            if what == "read":
                for _ in repeat(None, READS):
                    state["config"]
                count += READS
            else:
                add(1).result()
                count += 1
            looked = now()
            slowest = max(slowest, looked - at)
            at = looked
        connection.send((count, slowest / 1e9))


def window(takers: Sequence[tuple[Connection, str]], seconds: float) -> list[Did]:
    """Have them all do their work at the same time."""
    begin = now() + int((AHEAD + 0.002 * len(takers)) * 1e9)
    for connection, what in takers:
        connection.send((what, begin, begin + int(seconds * 1e9)))
    return [connection.recv() for connection, _ in takers]


def lasting(size: Size, processes: int) -> float:
    """Seconds of a window: long enough for the system to give each process its turn on few cores, several times."""
    return size.seconds * max(10, processes)


def by_processes(size: Size, *roles: str) -> Outcome:
    """With 1, 2, 4, … processes that take these roles in turn: operations of the first role a second, and the least
    share that one process had of the mean of its role.

    A value is the throughput with the most processes by the best throughput with fewer, of one repetition.
    """
    repetitions = min(size.repetitions, 5)
    rates: dict[int, list[float]] = {}
    shares: dict[int, list[float]] = {}
    longest: dict[int, list[float]] = {}
    with StrictFlow(state={"config": VALUE, "counter": 0}, max_workers=128) as flow, ExitStack() as stack:
        connections: list[Connection] = []
        for processes in size.processes:
            while len(connections) < processes:
                connections.append(stack.enter_context(child(taker, flow)))
                connections[-1].recv()
            seconds = lasting(size, processes)
            takers = list(zip(connections, islice(cycle(roles), processes), strict=True))
            window(takers, seconds / 10)
            for _ in range(repetitions):
                did = window(takers, seconds)
                fair = []
                for role in roles[:processes]:
                    counts = [count for (count, _), (_, its) in zip(did, takers, strict=True) if its == role]
                    fair.append(min(counts) / max(statistics.mean(counts), 1e-9))
                    if role == roles[0]:
                        rates.setdefault(processes, []).append(sum(counts) / seconds)
                shares.setdefault(processes, []).append(min(fair))
                longest.setdefault(processes, []).append(max(slowest for _, slowest in did))
    most = size.processes[-1]
    values = [
        at_most / max(before)
        for at_most, *before in zip(rates[most], *(rates[few] for few in size.processes[:-1]), strict=True)
    ]
    note = f"least share of one {min(shares[most]):.2f} of the mean; slowest {duration(max(longest[most]))}"
    series = {
        "processes": [float(processes) for processes in size.processes],
        "rate": [statistics.median(rates[processes]) for processes in size.processes],
        "lowest rate": [min(rates[processes]) for processes in size.processes],
        "highest rate": [max(rates[processes]) for processes in size.processes],
        "least share": [min(shares[processes]) for processes in size.processes],
        "slowest": [max(longest[processes]) for processes in size.processes],
    }
    typical = dict(zip(size.processes, series["rate"], strict=True))
    best = max(size.processes[:-1], key=typical.__getitem__)
    return Outcome(values, f"{most}: {typical[most]:,.0f}/s", f"{best}: {typical[best]:,.0f}/s", note, series)


@figure("gated reads a second by the most processes ÷ best with fewer", Bound("≥", 0.5))
def readers(size: Size) -> Outcome:
    """1 to 64 processes read an unchanged value, `by_processes`."""
    return by_processes(size, "read")


@figure("P1 a second by the most processes ÷ best with fewer", Bound("≥", 0.5))
def writers(size: Size) -> Outcome:
    """1 to 64 processes, each with one P1 after the other, waiting for each result, `by_processes`."""
    return by_processes(size, "write")


@figure("P1 a second by the most processes, half of which read ÷ best with fewer", Bound(">", 0))
def mixed(size: Size) -> Outcome:
    """1 to 64 processes; the first, third, … as `writers`, the others read another key. The P1 tasks are counted; the
    least share is of either. The readers take the cores from the writers: on few cores much is lost by that alone."""
    return by_processes(size, "write", "read")


@figure("least share of one of many processes, of the mean", Bound(">", 0))
def starved(size: Size) -> Outcome:
    """How many P1 the process with the fewest had done, of the mean of all, when most of them write at a time.

    The bound holds for each repetition: nobody may starve.
    """
    most = size.processes[-1]
    seconds = lasting(size, most)
    with StrictFlow(state={"config": VALUE, "counter": 0}, max_workers=128) as flow, ExitStack() as stack:
        connections = [stack.enter_context(child(taker, flow)) for _ in range(most)]
        for connection in connections:
            connection.recv()
        values, slowest = [], 0.0
        for _ in range(min(size.repetitions, 5)):
            did = window([(connection, "write") for connection in connections], seconds)
            counts = [count for count, _ in did]
            values.append(min(counts) / statistics.mean(counts))
            slowest = max(slowest, *(longest for _, longest in did))
    return Outcome(values, f"{most} processes", note=f"slowest P1 {duration(slowest)}")


THREADS = 16


def by_threads(flow: StrictFlow, operation: Callable[[], object]) -> Callable[[int, int], float]:
    """Seconds that so many operations take, done by that many threads at the same time."""

    def run(count: int, threads: int) -> float:
        each = -(-count // threads)
        start = threading.Barrier(threads + 1)

        def work() -> None:
            start.wait()
            for _ in repeat(None, each):
                operation()

        pool = [threading.Thread(target=work) for _ in range(threads)]
        for thread in pool:
            thread.start()
        start.wait()
        began = perf_counter()
        for thread in pool:
            thread.join()
        return (perf_counter() - began) * count / (each * threads)

    return run


@figure(f"gated reads a second by {THREADS} threads ÷ by 1", Bound("≥", 0.5))
def reading_threads(size: Size) -> Outcome:
    """Threads of one process read an unchanged value; they share one interpreter lock."""
    with StrictFlow(state={"config": VALUE}) as flow:
        state = flow.state
        run = by_threads(flow, lambda: state["config"])
        many, one = (lambda count: run(count, THREADS)), (lambda count: run(count, 1))
        return compare(many, one, size, peer_is="1 thread", inverse=True)


@figure(f"P1 a second by {THREADS} threads ÷ by 1", Bound("≥", 0.5))
def writing_threads(size: Size) -> Outcome:
    """Threads of one process, each with one P1 after the other, waiting for each result."""
    with StrictFlow(state={"counter": 0}) as flow:
        add = write(flow, key="counter")(increment)
        run = by_threads(flow, lambda: add(1).result())
        many, one = (lambda count: run(count, THREADS)), (lambda count: run(count, 1))
        return compare(many, one, size, peer_is="1 thread", inverse=True)


@figure("P1 a second, each awaited by an asyncio task of its own ÷ results of one map", Bound(">", 0))
def awaited(size: Size) -> Outcome:
    """1,000 asyncio tasks in one thread, each awaits a P1 that it has submitted; the slowest of them is told.

    Beside it, the same number of P1 submitted by one ``task.map``, their results taken in order.
    """
    waits: list[float] = []
    with StrictFlow(state={"counter": 0}) as flow:
        add = write(flow, key="counter")(increment)

        async def one() -> None:
            began = perf_counter()
            await add(1)
            waits.append(perf_counter() - began)

        async def all_of_them() -> None:
            await asyncio.gather(*(one() for _ in range(size.tasks)))

        def awaiting(count: int) -> float:
            began = perf_counter()
            for _ in repeat(None, count):
                asyncio.run(all_of_them())
            return (perf_counter() - began) / size.tasks

        def mapped(count: int) -> float:
            began = perf_counter()
            for _ in repeat(None, count):
                for future in add.map(repeat(1, size.tasks)):
                    future.result()
            return (perf_counter() - began) / size.tasks

        each = Size(size.repetitions, size.seconds / size.tasks, size.keys)
        outcome = compare(awaiting, mapped, each, peer_is="map", inverse=True)
    note = f"{size.tasks:,} tasks; slowest {duration(max(waits))}"
    return Outcome(outcome.values, outcome.ours, outcome.peer, note, outcome.series)
