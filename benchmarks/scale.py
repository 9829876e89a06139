"""Many processes, many threads, many awaiting tasks: does the throughput hold, and does anybody starve?

Every process attaches when its turn has come, and stays. All that take part begin at one moment and stop at one; what
each did meanwhile is counted, and how long it waited for its slowest operation. On a machine with few cores a
throughput that stays level is all there is to be had.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle, islice, repeat
from multiprocessing.connection import Connection
from time import perf_counter, sleep

from strictflow_mp import StrictFlow, write

from .measure import Bound, Outcome, Size, child, compare, duration, figure, now
from .peers import echoes
from .reads import VALUE
from .writes import increment

MESSAGE = 40
"""Bytes of an echo."""
READS = 50
"""Reads between two looks at the clock."""
AHEAD = 0.05
"""Seconds after which a window begins that was just agreed."""

Did = tuple[int, float]
"""In a window: how many operations, and the seconds of the slowest look (`READS` reads, or one P1)."""


def taker(connection: Connection, flow: StrictFlow, sock: socket.socket) -> None:
    """In a child: asked for (what, begin, end), do that in that window; answer what it `Did`.

    "read" and "write" are ours; their floors are "spin", reads of a dict of its own, and "echo".
    """
    state = flow.state
    state["config"]
    private = {"config": VALUE}
    add = write(flow, key="counter")(increment)
    add(0).result()
    answer = bytearray(MESSAGE)

    def read_each(mapping: Mapping[str, object]) -> None:
        for _ in repeat(None, READS):
            mapping["config"]

    def ask() -> None:
        sock.send(bytes(MESSAGE))
        sock.recv_into(answer)

    doing: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (READS, lambda: read_each(state)),
        "spin": (READS, lambda: read_each(private)),
        "write": (1, lambda: add(1).result()),
        "echo": (1, ask),
    }
    connection.send(None)
    while True:
        try:
            what, begin, end = connection.recv()
        except EOFError:
            return
        each, do = doing[what]
        while now() < begin:
            sleep(0.0005)
        count, slowest, at = 0, 0, now()
        while at < end:
            do()
            count += each
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


class Sweep:
    """What was found with 1, 2, 4, … processes: operations of the first role a second, and who had how much of them."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}
        self.shares: dict[int, list[float]] = {}
        self.longest: dict[int, float] = {}

    def add(self, roles: Sequence[str], did: list[Did], seconds: float) -> None:
        """Take in a window in which the processes had these roles in turn."""
        processes = len(did)
        fair = []
        for number in range(min(len(roles), processes)):
            counts = [count for count, _ in did[number :: len(roles)]]
            fair.append(min(counts) / max(statistics.mean(counts), 1e-9))
            if not number:
                self.rates.setdefault(processes, []).append(sum(counts) / seconds)
        self.shares.setdefault(processes, []).append(min(fair))
        slowest = max(slowest for _, slowest in did)
        self.longest[processes] = max(slowest, self.longest.get(processes, 0.0))

    def typical(self) -> dict[int, float]:
        return {processes: statistics.median(rates) for processes, rates in self.rates.items()}

    def series(self) -> dict[str, list[float]]:
        return {
            "processes": [float(processes) for processes in self.rates],
            "rate": list(self.typical().values()),
            "lowest rate": [min(rates) for rates in self.rates.values()],
            "highest rate": [max(rates) for rates in self.rates.values()],
            "least share": [min(shares) for shares in self.shares.values()],
            "slowest": list(self.longest.values()),
        }

    def note(self, processes: int) -> str:
        share, slowest = min(self.shares[processes]), duration(self.longest[processes])
        return f"least share of one {share:.2f} of the mean; slowest {slowest}"


def by_processes(size: Size, *sets: Sequence[str]) -> list[Sweep]:
    """A sweep for each set of roles; their windows take turns."""
    sweeps = [Sweep() for _ in sets]
    with (
        StrictFlow(state={"config": VALUE, "counter": 0}, max_workers=128) as flow,
        echoes(size.processes[-1]) as socks,
        ExitStack() as stack,
    ):
        connections: list[Connection] = []
        for processes in size.processes:
            while len(connections) < processes:
                connections.append(stack.enter_context(child(taker, flow, socks[len(connections)])))
                connections[-1].recv()
            seconds = lasting(size, processes)
            for repetition in range(-1, min(size.repetitions, 5)):
                for sweep, roles in zip(sweeps, sets, strict=True):
                    takers = list(zip(connections, islice(cycle(roles), processes), strict=True))
                    if repetition < 0:
                        window(takers, seconds / 10)  # attached, and warm
                    else:
                        sweep.add(roles, window(takers, seconds), seconds)
    return sweeps


def holds(sweep: Sweep, size: Size, floor: Sweep | None = None) -> Outcome:
    """The throughput with the most processes by the best with fewer, repetition by repetition."""
    *fewer, most = size.processes
    values = [
        at_most / max(before)
        for at_most, *before in zip(sweep.rates[most], *(sweep.rates[few] for few in fewer), strict=True)
    ]
    typical = sweep.typical()
    best = max(fewer, key=typical.__getitem__)
    beside = f"{best}: {typical[best]:,.0f}/s"
    note, series = sweep.note(most), sweep.series()
    if floor is not None:
        note += f"; {floor.typical()[most]:,.0f} echoes/s by as many"
        series |= {f"echo, {name}": points for name, points in floor.series().items()}
    return Outcome(values, f"{most}: {typical[most]:,.0f}/s", beside, note, series)


@figure("gated reads a second by the most processes ÷ best with fewer", Bound("≥", 0.5))
def readers(size: Size) -> Outcome:
    """1 to 64 processes read an unchanged value, each as fast as it can."""
    (sweep,) = by_processes(size, ["read"])
    return holds(sweep, size)


@figure("P1 a second by the most processes ÷ best with fewer", Bound("≥", 0.5))
def writers(size: Size) -> Outcome:
    """1 to 64 processes, each with one P1 after the other, waiting for each result.

    The note has the floor: as many processes that await echoes of one server.
    """
    sweep, floor = by_processes(size, ["write"], ["echo"])
    return holds(sweep, size, floor)


@figure("P1 a second by the most processes, half of which read ÷ echoes a second where half spin", Bound(">", 0))
def mixed(size: Size) -> Outcome:
    """1 to 64 processes; the first, third, … as `writers`, the others as `readers`, of another key.

    The readers keep the cores busy, and that alone costs much where there are few. So beside it: as many processes,
    half of which send and await an echo of one server, while the others read a dict of their own.
    """
    sweep, floor = by_processes(size, ["write", "read"], ["echo", "spin"])
    most = size.processes[-1]
    values = [ours / theirs for ours, theirs in zip(sweep.rates[most], floor.rates[most], strict=True)]
    series = sweep.series() | {f"echo, {name}": points for name, points in floor.series().items()}
    ours, theirs = sweep.typical()[most], floor.typical()[most]
    return Outcome(values, f"{most}: {ours:,.0f}/s", f"echo {theirs:,.0f}/s", sweep.note(most), series)


@figure("least share of one of many processes, of the mean", Bound(">", 0))
def starved(size: Size) -> Outcome:
    """How many P1 the process with the fewest had done, of the mean of all, when most of them write at a time.

    The bound holds for each repetition: nobody may starve.
    """
    most = size.processes[-1]
    seconds = lasting(size, most)
    with StrictFlow(state={"config": VALUE, "counter": 0}, max_workers=128) as flow, ExitStack() as stack:
        socks = stack.enter_context(echoes(most))  # not used here
        connections = [stack.enter_context(child(taker, flow, sock)) for sock in socks]
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
