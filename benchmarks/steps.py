"""``python -m benchmarks.steps``: where the time of a read, a commit and a P1 goes, in nanoseconds for each step.

The steps are the package's own functions, called alone in one process: no pipe, no other process, all caches warm. So
they add up to less than a whole operation does, and what is left is system calls, wake-ups and cold memory.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, cycle
from typing import Any

from strictflow_mp.coordinator.answers import Answers
from strictflow_mp.coordinator.burst import Burst
from strictflow_mp.coordinator.calls import Call, Function
from strictflow_mp.coordinator.transaction import Transaction
from strictflow_mp.memory.fences import WORD
from strictflow_mp.memory.gatekeeper import GateKeeper
from strictflow_mp.memory.segment import W_VERSION, Segment
from strictflow_mp.store import Pins, StoreReader, StoreWriter, shape
from strictflow_mp.system.identity import Identity
from strictflow_mp.values.codec import pack, unpack, unpack_frozen
from strictflow_mp.values.keys import pack_key
from strictflow_mp.wire import frames
from strictflow_mp.wire.arguments import pack_arguments, unpack_arguments
from strictflow_mp.wire.future import TaskFuture

from .reads import VALUE
from .writes import increment

CALLS = 5_000
REPETITIONS = 7

Step = tuple[str, Callable[[], Any]]


def nanoseconds(step: Callable[[], Any]) -> float:
    """What one call takes, at best; the loop's own share is taken off."""
    best = empty = float("inf")
    for _ in range(REPETITIONS):
        began = time.perf_counter_ns()
        for _ in range(CALLS):
            step()
        best = min(best, time.perf_counter_ns() - began)
        began = time.perf_counter_ns()
        for _ in range(CALLS):
            _nothing()
        empty = min(empty, time.perf_counter_ns() - began)
    return (best - empty) / CALLS


def _nothing() -> None:
    pass


def _fail(call: Call, error: BaseException) -> None:
    raise error


class Session:
    """A process that is attached, and reads nothing."""

    slot = tenant = 1
    is_open, is_dead, said_goodbye = True, False, False


class Sessions:
    """Takes the answers."""

    def send(self, session: Session, data: bytes) -> None:
        pass


class Bench:
    """A coordinator's parts around one store."""

    def __init__(self, segment: Segment, keys: int) -> None:
        self.segment = segment
        self.writer = StoreWriter(segment, "steps")
        self.writer.create()
        self.names = [pack_key(f"key:{number}") for number in range(keys)]
        payload = pack(VALUE)
        for begin in range(0, keys, 10_000):
            self.writer.publish(dict.fromkeys(self.names[begin : begin + 10_000], payload))
        self.reader = StoreReader(segment, Pins(segment, 0))
        self.gate = GateKeeper(segment, segment.name.partition("-")[2])
        self.answers = Answers(self.writer.receipts, Sessions(), _fail)  # type: ignore[arg-type]
        self.burst = Burst(self.writer, self.reader, self.answers)
        self.transaction = Transaction(self.burst)

    def reading(self) -> Iterator[Step]:
        words, segment = self.segment.words, self.segment
        submitted = words[segment.submitted : segment.submitted + segment.slots]
        finished = words[segment.finished : segment.finished + segment.slots]
        route = self.reader.route(self.names[0])
        payload = pack(VALUE)
        yield "the flag: two arrays compared", lambda: submitted == finished
        yield "the version: one word loaded", lambda: words[W_VERSION]
        yield "hash and turns of a key (first read of it only)", lambda: self.reader.route(self.names[0])
        yield "walk, checks, copy, horizon", lambda: self.reader.get(route)
        found = self.reader.get(route)
        assert found is not None
        since, _, _, place, lengths = found
        version = since + 1
        self.writer.publish({self.names[0]: pack(VALUE)})
        found = self.reader.get(route)
        assert found is not None
        take, buffer, start = shape(lengths), self.reader.buffer, found[3] * WORD
        yield "a cell of known lengths, taken apart", lambda: take(buffer, start)
        yield (
            "from a cell that is known to the one in its place, whatever its lengths",
            lambda: self.reader.follow(version, place, since, lengths),
        )
        yield "decode, read-only", lambda: unpack_frozen(payload)
        yield "decode, plain (what LMDB's user does)", lambda: unpack(payload)

    def committing(self) -> Iterator[Step]:
        writer = self.writer
        changes = cycle([{name: pack(VALUE)} for name in self.names[:: max(1, len(self.names) // 1000)]])

        def commit() -> None:
            writer.commit(next(changes))
            writer.tidy()

        yield "hash of a key", lambda: writer.hash.again(self.names[0], 1)
        yield "commit one key: cells, path, receipts, record, flip; tidy up", commit

    def running(self) -> Iterator[Step]:
        session: Any = Session()
        function = Function(increment, "increment", 1, pack_key("counter"), None)
        arguments = pack_arguments((1,), {})
        numbers = count(1)
        self.writer.publish({pack_key("counter"): pack(1)})

        def call() -> Call:
            number = next(numbers)
            return Call(session, number, number, function, arguments, 0)

        def run() -> None:
            self.transaction.begin()
            args, _ = unpack_arguments(arguments)
            value = increment(self.transaction.take_out(pack_key("counter")), *args)
            self.transaction.put_back(pack(value), value, call())

        def run_and_forget() -> None:
            run()
            self.answers.unsealed.clear()
            self.burst._begin()

        def whole() -> None:
            run()
            self.burst.publish()
            self.gate.finish({1: next(numbers)})
            self.answers.send()
            self.burst.tidy()
            self.writer.receipts.acknowledge(1, next(numbers))

        frame = frames.pack_frame(frames.CALL, 1000, 0, [arguments], 1000, 999)
        yield (
            "client: pack the arguments and the frame",
            lambda: frames.pack_frame(frames.CALL, 1000, 0, [pack_arguments((1,), {})], 1000, 999),
        )
        yield "client: a future, settled", lambda: TaskFuture(None, 1, "f").settle(1)  # type: ignore[arg-type]
        yield "coordinator: unpack the frame", lambda: frames.unpack_frame(frame)
        yield "coordinator: the call as an object", call
        yield "coordinator: run it in its transaction", run_and_forget
        yield "coordinator: lower the flag, look who sleeps", lambda: self.gate.finish({1: next(numbers)})
        yield "coordinator: all of it, receipts and commit included", whole


@contextmanager
def bench(keys: int) -> Iterator[Bench]:
    segment = Segment.create(secrets.token_hex(6), "steps", capacity=1 << 30, slots=65, identity=Identity.mine())
    try:
        yield Bench(segment, keys)
    finally:
        segment.unlink()
        segment.close()


def main() -> None:
    """Print a Markdown table for each kind of operation."""
    for title, kind in (("read", Bench.reading), ("commit", Bench.committing), ("P1", Bench.running)):
        counts = (10, 100_000) if kind is not Bench.running else (10,)
        headings = " | ".join(f"{keys:,} keys, ns" for keys in counts)
        print(f"| step of a {title} | {headings} |\n| --- |{' ---: |' * len(counts)}")
        columns = []
        for keys in counts:
            with bench(keys) as parts:
                columns.append([(name, nanoseconds(step)) for name, step in kind(parts)])
        for row in zip(*columns, strict=True):
            print(f"| {row[0][0]} | {' | '.join(f'{taken:,.0f}' for _, taken in row)} |")
        print()


if __name__ == "__main__":
    main()
