"""Threads, at random: reads, writes, peeks, snapshots, watches, attaching and closing, while the coordinator is killed.

    python tests/whole/thread_stress.py --seconds 600 --threads 8 --kill-every 10

For interpreters without the GIL above all. Each writer owns a pair of keys that one P1 changes together, and counts
them up; so whoever looks knows what is wrong:

    torn    the two of a pair differ in a snapshot
    stale   a gated read finds less than a P1 that was submitted before it, or than it has found before
    error   anything is raised that a user would not expect; a lost or doubled P1 is one

Prints one line a kind of work, and what was wrong. Exit status: 0 nothing was, 1 something.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from strictflow_mp import StrictFlow

WRITERS = 2
PAUSE_SECONDS = 0.001
"""After each piece of work. Eight threads that never sleep would leave next to nothing of two cores to other processes:
there a fresh interpreter takes 50 s (Linux 6.18, Python 3.13t), and so does the next coordinator."""
NAME = f"threads-{os.getpid()}"


class Stress:
    """The flow, what its writers have submitted, and what went wrong."""

    def __init__(self, flow: StrictFlow, seed: int) -> None:
        self.flow = flow
        self.seed = seed
        self.is_over = threading.Event()
        self.submitted = [0] * WRITERS  # by each writer, once submit has returned
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def report(self, what: str) -> None:
        self.wrong.append(what)
        if len(self.wrong) < 20:
            print(what, file=sys.stderr, flush=True)

    def run(self, work: Callable[[Stress, random.Random], str], number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        done = 0
        what = work.__name__
        while not self.is_over.is_set():
            try:
                work(self, chance)
                done += 1
                time.sleep(PAUSE_SECONDS)
            except BaseException:
                self.report(f"error in {what}: {traceback.format_exc()}")
                time.sleep(0.1)
        self.done[what] += done  # each kind is added up by several threads, one after the other: see `main`


def read(stress: Stress, chance: random.Random) -> None:
    state = stress.flow.state
    writer = chance.randrange(WRITERS)
    last = 0
    for _ in range(1000):
        least = stress.submitted[writer]
        found = state[f"a{writer}"]
        if found < least or found < last:
            stress.report(f"stale: {found} of writer {writer}, after {least} and {last}")
        last = found


def peek(stress: Stress, chance: random.Random) -> None:
    writer = chance.randrange(WRITERS)
    last = 0
    for _ in range(100):
        found = stress.flow.peek(f"b{writer}")
        if found < last:
            stress.report(f"stale: a peek of {found}, after {last}")
        last = found


def snapshot(stress: Stress, chance: random.Random) -> None:
    writer = chance.randrange(WRITERS)
    least = stress.submitted[writer]
    with stress.flow.snapshot() as view:
        first, second = view[f"a{writer}"], view[f"b{writer}"]
        if chance.random() < 0.1:
            whole = dict(view)
            first, second = min(first, whole[f"a{writer}"]), max(second, whole[f"b{writer}"])
    if first != second:
        stress.report(f"torn: {first} and {second} of writer {writer}")
    if first < least:
        stress.report(f"stale: a snapshot of {first}, after {least}")


def watch(stress: Stress, chance: random.Random) -> None:
    writer = chance.randrange(WRITERS)
    last = 0
    with stress.flow.watch(f"a{writer}") as changes:
        for change in changes:
            if change.value < last:
                stress.report(f"stale: a change to {change.value}, after {last}")
            last = change.value
            if chance.random() < 0.1:
                return


def attach(stress: Stress, chance: random.Random) -> None:
    """A handle of another flow's client is another client: of the same name there is one in a process."""
    flow = stress.flow
    least = stress.submitted[0]
    found = StrictFlow(flow.name).state["a0"]
    if found < least:
        stress.report(f"stale: {found}, after {least}")
    if chance.random() < 0.05:
        other = StrictFlow(f"{flow.name}-other")
        other.state["n"] = other.state["n"] + 1
        other._client.close()


def write(stress: Stress, number: int) -> None:
    flow, counted = stress.flow, 0
    while not stress.is_over.is_set():
        try:
            futures = []
            for _ in range(20):
                counted += 1
                futures.append(flow.update({f"a{number}": counted, f"b{number}": counted}))
                stress.submitted[number] = counted
            for future in futures:
                future.result(120)
        except BaseException:
            stress.report(f"error in write: {traceback.format_exc()}")
        stress.done["write"] += 20 if number == 0 else 0
        time.sleep(0.001)


KINDS = [read, peek, snapshot, watch, attach, read, snapshot, peek]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8, help="beside the writers")
    parser.add_argument("--kill-every", type=float, default=10, help="seconds; 0: never")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    faulthandler.enable()
    state = {f"{key}{writer}": 0 for key in "ab" for writer in range(WRITERS)} | {f"k{n}": n for n in range(64)}
    with StrictFlow(NAME, state=state) as flow, StrictFlow(f"{NAME}-other", state={"n": 0}):
        stress = Stress(flow, options.seed)
        threads = [threading.Thread(target=write, args=(stress, number)) for number in range(WRITERS)]
        threads += [
            threading.Thread(target=stress.run, args=(KINDS[number % len(KINDS)], number))
            for number in range(options.threads)
        ]
        for thread in threads:
            thread.start()
        kills, end = 0, time.monotonic() + options.seconds
        while time.monotonic() < end:
            time.sleep(min(options.kill_every or options.seconds, max(0.0, end - time.monotonic())))
            if options.kill_every and time.monotonic() < end:
                os.kill(flow.stats().coordinator_pid, signal.SIGKILL)
                kills += 1
        stress.is_over.set()
        for number in range(WRITERS):  # a watch ends when something changes
            threads[number].join(180)
        while any(thread.is_alive() for thread in threads) and time.monotonic() < end + 180:
            for number in range(WRITERS):
                flow.put(f"a{number}", stress.submitted[number]).result(60)
                flow.put(f"b{number}", stress.submitted[number]).result(60)
            time.sleep(0.05)
        alive = [thread.name for thread in threads if thread.is_alive()]
        if alive:
            stress.report(f"error: {alive} did not end")
            faulthandler.dump_traceback()
        for number in range(WRITERS):
            if (flow.state[f"a{number}"], flow.state[f"b{number}"]) != (stress.submitted[number],) * 2:
                stress.report(f"error: writer {number} submitted {stress.submitted[number]}")
        is_on = getattr(sys, "_is_gil_enabled", lambda: True)()
        print(f"Python {sys.version.split()[0]}, the GIL is {'on' if is_on else 'off'}; {kills} coordinators killed")
        print(", ".join(f"{what} {number:,}" for what, number in sorted(stress.done.items())))
    print(f"wrong: {len(stress.wrong)}")
    return 1 if stress.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
