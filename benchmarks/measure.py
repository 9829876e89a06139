"""Measuring: batches of ours and of a peer's in turns, so that the machine's noise hits both.

A `Run` does so many operations and returns the seconds that they took. A repetition is one batch of each side;
its ratio is one value of the figure, so the spread of the values is the noise that a single look would have.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

__all__ = [
    "FIGURES",
    "FULL",
    "QUICK",
    "SHARES",
    "Bound",
    "Figure",
    "Missing",
    "Outcome",
    "Run",
    "Size",
    "bound_figures",
    "child",
    "compare",
    "duration",
    "figure",
    "now",
    "quantiles",
]

Run = Callable[[int], float]


@dataclass(frozen=True)
class Size:
    """How much is measured: repetitions, seconds that a batch lasts (about), keys in a large state, bytes of a large
    value, processes that are attached at a time, tasks that await."""

    repetitions: int
    seconds: float
    keys: int
    large: int = 100_000_000
    processes: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    tasks: int = 1000


FULL = Size(repetitions=25, seconds=0.03, keys=1_000_000)
QUICK = Size(repetitions=3, seconds=0.02, keys=50_000, large=10_000_000, processes=(1, 2, 4, 8), tasks=200)


@dataclass(frozen=True)
class Bound:
    """What the median must reach: ``Bound("≤", 1.5)``."""

    sign: str
    limit: float

    def is_met(self, value: float) -> bool:
        return {"≤": value <= self.limit, "≥": value >= self.limit, ">": value > self.limit}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Outcome:
    """What a figure found: a value for each repetition, and in words both sides and what else was seen.

    In *series*, by name, what the plots and the table of the alternatives show.
    """

    values: list[float]
    ours: str
    peer: str = ""
    note: str = ""
    series: dict[str, list[float]] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Figure:
    """One row of the table, and how to measure it. Without a bound it is only reported."""

    name: str
    title: str
    bound: Bound | None
    unit: str
    measure: Callable[[Size], Outcome]

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


FIGURES: list[Figure] = []
"""Every figure, in the order of the table: each module adds its own when it is imported."""


class Missing(Exception):
    """A peer is not on this machine; says what to install."""


def figure(title: str, bound: Bound | None = None, unit: str = "×") -> Callable[[Any], Any]:
    """Make a function from `Size` to `Outcome` a row of the table, named ``module.function``."""

    def add(measure: Callable[[Size], Outcome]) -> Callable[[Size], Outcome]:
        FIGURES.append(Figure(_name(measure), title, bound, unit, measure))
        return measure

    return add


def _name(measure: Callable[..., Outcome]) -> str:
    return f"{measure.__module__.rpartition('.')[2]}.{measure.__name__}"


@contextmanager
def on_cores(mine: int, theirs: int) -> Iterator[Callable[[], None]]:
    """Run on the core *mine* meanwhile, and what is started before the call of what this yields on *theirs*.

    Left to itself, the system puts the ends of a pair now on one core and now on two, where an echo takes ten times as
    long; and on another for the next pair. Who is bound to one core gives up spinning sooner (`spin.SHARED_SECONDS`).
    """
    if not hasattr(os, "sched_setaffinity"):
        raise Missing("no process can be bound to a core here")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= max(mine, theirs):
        raise Missing("there is one core only")
    os.sched_setaffinity(0, {cores[theirs]})
    try:
        yield lambda: os.sched_setaffinity(0, {cores[mine]})
    finally:
        os.sched_setaffinity(0, set(cores))


def bound_figures(title: str) -> Callable[[Any], Any]:
    """As `figure`, two rows: with both ends on one core, and with each end on its own.

    The function takes also what it calls when all processes have been started, and before anything is measured.
    """

    def add(measure: Callable[[Size, Callable[[], None]], Outcome]) -> Callable[[Size, Callable[[], None]], Outcome]:
        def bound_to(core: int, size: Size) -> Outcome:
            with on_cores(0, core) as go:
                return measure(size, go)

        for core, where in enumerate(("both ends on one core", "each end on its core")):
            name = f"{_name(measure)}_{('on_one_core', 'on_two_cores')[core]}"
            FIGURES.append(Figure(name, f"{title}, {where}", None, "×", partial(bound_to, core)))
        return measure

    return add


def compare(ours: Run, peer: Run, size: Size, *, peer_is: str, inverse: bool = False, note: str = "") -> Outcome:
    """Time both in turns. The ratio is of the times for one operation, or (*inverse*) of operations a second.

    The series "ours" and "peer" are the seconds for one operation, by repetition.
    """
    runs = (ours, peer)
    counts = [_fit(run, size.seconds) for run in runs]
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(size.repetitions):
        for side in (0, 1) if repetition % 2 else (1, 0):
            times[side].append(runs[side](counts[side]) / counts[side])
    ratios = [theirs / mine if inverse else mine / theirs for mine, theirs in zip(*times, strict=True)]
    mine, theirs = map(statistics.median, times)
    series = {"ours": times[0], "peer": times[1]}
    return Outcome(ratios, duration(mine), f"{peer_is} {duration(theirs)}", note, series)


def _fit(run: Run, seconds: float) -> int:
    """How many operations last about that long."""
    run(1)  # whatever is done once: attaching, sending the function
    count = 1
    while (taken := run(count)) < seconds / 4:
        count *= 4
    return max(1, round(count * seconds / taken))


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: ``0.16 µs``."""
    for unit, scale in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


SHARES = (*(share / 100 for share in range(0, 100, 2)), *(1 - 10 ** (-2 - step / 10) for step in range(31)))
"""Of the operations: evenly up to 99 %, then more and more closely up to 99.999 %."""


def quantiles(times: list[float]) -> list[float]:
    """How long at most so many of the operations took, for each of `SHARES` that so few operations can tell."""
    times = sorted(times)
    return [times[int(share * len(times))] for share in SHARES if share <= 1 - 1 / len(times)]


@contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A fresh process that runs ``target(connection, *args)``, and our end of the pipe to it.

    When the pipe is closed the process must end: it sees EOFError.
    """
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=target, args=(there, *args), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def now() -> int:
    """Nanoseconds on a clock that all processes of the machine share (`time.perf_counter` promises less)."""
    return time.monotonic_ns()
