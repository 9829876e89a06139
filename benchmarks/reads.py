"""Gated reads, beside LMDB's. LMDB has no gate, and hands out a mutable dict of which nothing is kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import repeat
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from msgpack import packb, unpackb

from strictflow_mp import StrictFlow

from .measure import Bound, Outcome, Size, child, compare, figure, now
from .peers import lmdb_environment, lmdb_writer

VALUE = {"version": 1, "status": "stable"}
LMDB = "LMDB read"


def read_each(environment: Any, keys: list[bytes]) -> float:
    """Read each key from LMDB in a transaction of its own; the seconds that it took."""
    begin, unpack = environment.begin, unpackb
    began = perf_counter()
    for key in keys:
        with begin() as transaction:
            unpack(transaction.get(key))
    return perf_counter() - began


def typical(read: Callable[[], object], change: Callable[[int], object], count: int) -> float:
    """Change, then time one read, *count* times; the median, times *count*.

    The median, for a read is shorter than one interruption. The clock's own share is taken off.
    """
    times, clock = [], []
    for number in range(count):
        change(number)
        began = perf_counter()
        read()
        ended = perf_counter()
        times.append(ended - began)
        clock.append(perf_counter() - ended)
    return count * (statistics.median(times) - statistics.median(clock))


@figure("gated read, value unchanged ÷ LMDB read", Bound("≤", 0.25))
def unchanged(size: Size) -> Outcome:
    """The same small dict, read again and again by one process while nobody writes.

    Ours: ``flow.state[key]``, the gate and the version looked at each time. LMDB: begin, get, decode.
    """
    with StrictFlow(state={"config": VALUE}) as flow, lmdb_environment() as environment:
        with environment.begin(write=True) as transaction:
            transaction.put(b"config", packb(VALUE))
        state = flow.state

        def ours(count: int) -> float:
            began = perf_counter()
            for _ in repeat(None, count):
                state["config"]
            return perf_counter() - began

        return compare(ours, lambda count: read_each(environment, [b"config"] * count), size, peer_is=LMDB)


@figure("gated read, value just changed ÷ LMDB read (1 key)", Bound("≤", 1.5))
def changed(size: Size) -> Outcome:
    """One read of the only key, just after another process has changed its value; each read timed alone.

    Ours: the coordinator commits a `put`. LMDB: a child process commits a put, asked over a pipe. Both
    readers have just been woken, so both find their caches as cold.
    """
    with (
        StrictFlow(state={"config": VALUE}) as flow,
        lmdb_environment() as environment,
        child(lmdb_writer, environment.path()) as writer,
    ):

        def change_lmdb(number: int) -> None:
            writer.send([(b"config", {"version": number, "status": "stable"})])
            writer.recv()

        def change_ours(number: int) -> None:
            flow.put("config", {"version": number, "status": "stable"}).result()

        def read_lmdb() -> None:
            with environment.begin() as transaction:
                unpackb(transaction.get(b"config"))

        def read_ours() -> None:
            flow.state["config"]

        return compare(
            lambda count: typical(read_ours, change_ours, count),
            lambda count: typical(read_lmdb, change_lmdb, count),
            Size(size.repetitions, size.seconds / 50, size.keys),  # most of the time goes into the changes
            peer_is=LMDB,
        )


@figure("gated read, value just changed ÷ LMDB read (many keys)", Bound("≤", 1.5))
def changed_many(size: Size) -> Outcome:
    """1,000 keys among many, read one after the other, after another process has changed them all in one commit.

    Ours: one P1 `update` by the coordinator. LMDB: one transaction of a child process. The reads are gated, each
    on its own; LMDB begins a transaction for each.
    """
    total = min(size.keys, 100_000)
    changing = range(0, total, max(1, total // 1000))
    names = [f"key:{number}" for number in changing]
    keys = [name.encode() for name in names]
    with (
        StrictFlow(state={f"key:{number}": VALUE for number in range(total)}) as flow,
        lmdb_environment() as environment,
        child(lmdb_writer, environment.path()) as writer,
    ):
        with environment.begin(write=True) as transaction:
            for number in range(total):
                transaction.put(f"key:{number}".encode(), packb(VALUE))
        state = flow.state

        def ours(count: int) -> float:
            seconds = 0.0
            for number in range(count):
                flow.update({name: {"version": number, "status": "stable"} for name in names}).result()
                began = perf_counter()
                for name in names:
                    state[name]
                seconds += perf_counter() - began
            return seconds / len(names)

        def lmdb(count: int) -> float:
            seconds = 0.0
            for number in range(count):
                writer.send([(key, {"version": number, "status": "stable"}) for key in keys])
                writer.recv()
                seconds += read_each(environment, keys)
            return seconds / len(keys)

        few = Size(size.repetitions, size.seconds / 20_000, size.keys)  # as above
        return compare(ours, lmdb, few, peer_is=LMDB, note=f"{len(keys):,} of {total:,} keys")


@figure("gated reads a second by 2 processes ÷ by 1", Bound("≥", 1.9))
def two_processes(size: Size) -> Outcome:
    """Unchanged values, read by one process alone, then by two at a time: all reads by the time from the first
    process's start to the last one's end.

    The floor is what the machine gives at this moment: the same two processes, the same loop on a dict of
    their own.
    """
    count = max(1, round(size.seconds * 5e6))
    with StrictFlow(state={"config": VALUE}) as flow, child(reader, flow) as one, child(reader, flow) as two:

        def rate(what: str, *readers: Connection) -> float:
            for connection in readers:
                connection.send((what, count))
            spans = [connection.recv() for connection in readers]
            return count * len(readers) * 1e9 / (max(end for _, end in spans) - min(start for start, _ in spans))

        for what in ("state", "dict"):
            rate(what, one, two)  # attached, and warm
        gains: dict[str, list[float]] = {"state": [], "dict": []}
        rates = []
        for repetition in range(size.repetitions):
            for what, found in gains.items():
                alone = rate(what, one if repetition % 2 else two)
                together = rate(what, one, two)
                found.append(together / alone)
                if what == "state":
                    rates.append(together)
    floor = statistics.median(gains["dict"])
    return Outcome(gains["state"], f"{statistics.median(rates) / 1e6:.3g} M/s", f"private dict {floor:.2f} ×")


def reader(connection: Connection, flow: StrictFlow) -> None:
    """In a child: asked for ("state" or "dict", count), read so often; answer when it began and ended."""
    private = {"config": VALUE}
    while True:
        try:
            what, count = connection.recv()
        except EOFError:
            return
        mapping = flow.state if what == "state" else private
        began = now()
        for _ in repeat(None, count):
            mapping["config"]
        connection.send((began, now()))
