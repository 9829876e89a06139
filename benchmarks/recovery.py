"""``python -m benchmarks.recovery``: how long writes pause when the coordinator is killed, in the same run

- with many processes that wait for the next one, beside one that does;
- with many keys in the state, for each of them.

Times are from the kill to the answer: of all that waited, the last one.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from strictflow_mp import StrictFlow

from .measure import duration

BATCH_KEYS = 50_000
"""In one update."""
VALUE = b"x" * 20


class Writers:
    """Processes that wait for an answer each when their coordinator is killed."""

    def __init__(self, flow: StrictFlow, count: int) -> None:
        self._flow = flow
        self._count = count
        self._orders, self._orders_in = os.pipe()
        self._said_out, self._said = os.pipe()
        self._pids = [pid for number in range(count) if (pid := self._start(number))]
        self._hear()

    def _start(self, number: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.close(self._orders_in)
            assert self._flow.state["n"] is not None  # attached
            os.write(self._said, b".")
            while os.read(self._orders, 1):
                answer = self._flow.put(f"writer {number}", time.time())
                os.write(self._said, b".")
                answer.result()
                os.write(self._said, b".")
        finally:
            os._exit(0)

    def _hear(self) -> None:
        heard = 0
        while heard < self._count:
            heard += len(os.read(self._said_out, self._count - heard))

    def pause(self) -> float:
        """Kill the coordinator; seconds until all of them have their answer."""
        coordinator = self._flow.stats().coordinator_pid
        os.kill(coordinator, signal.SIGSTOP)  # so that it answers none of them
        os.write(self._orders_in, b"." * self._count)
        self._hear()
        began = time.perf_counter()
        os.kill(coordinator, signal.SIGKILL)
        self._hear()
        return time.perf_counter() - began

    def end(self) -> None:
        """Let them go."""
        os.close(self._orders_in)
        for pid in self._pids:
            os.waitpid(pid, 0)
        for descriptor in (self._orders, self._said, self._said_out):
            os.close(descriptor)


@contextmanager
def writers(count: int) -> Iterator[Writers]:
    """A flow of their own, and so many of them."""
    with StrictFlow(state={"n": 0}, max_workers=count + 4) as flow:
        waiting = Writers(flow, count)
        try:
            yield waiting
        finally:
            waiting.end()


def herd(count: int, repetitions: int) -> tuple[float, float]:
    """The median pauses of one writer, and of many; measured in turns."""
    with ExitStack() as stack:
        both = [stack.enter_context(writers(number)) for number in (1, count)]
        pauses = [[each.pause() for each in both] for _ in range(repetitions)]
    one, many = (statistics.median(each) for each in zip(*pauses, strict=True))
    return one, many


def large(keys: int, repetitions: int) -> float:
    """The median pause with so many keys; each takeover is waited for, and is the first one that was begun."""
    pauses = []
    with StrictFlow(state={}) as flow:
        for first in range(0, keys, BATCH_KEYS):
            flow.update(dict.fromkeys(range(first, min(keys, first + BATCH_KEYS)), VALUE)).result()
        for number in range(repetitions):
            coordinator = flow.stats().coordinator_pid
            began = time.perf_counter()
            os.kill(coordinator, signal.SIGKILL)
            flow.put("again", number).result()
            pauses.append(time.perf_counter() - began)
            restarts = flow.stats().restarts
            assert restarts == number + 1, f"{restarts} takeovers were begun for {number + 1} kills"
    return statistics.median(pauses)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.partition("\n")[0])
    parser.add_argument("--writers", type=int, default=60)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    one, many = herd(options.writers, options.repetitions)
    print(f"1 writer that waits: {duration(one)}; {options.writers}: {duration(many)}, {many / one:.2f} times as long")
    pause = large(options.keys, options.repetitions)
    each = duration(max(pause - one, 0.0) / options.keys)
    print(f"{options.keys:,} keys: {duration(pause)}, {each} for each")


if __name__ == "__main__":
    main()
