"""The hot paths keep their length: bytecode instructions are counted, which no busy machine can change.

What waits is not counted (`Sessions._events`, `Stream.wait`), and of several rounds the shortest counts, so that a
look around in between costs nothing. The counts are then the same each time, but for those of a commit, where the mean
of many differs by one in a hundred. Each limit is about half as much again as the count; the Pythons from 3.10 to 3.13
differ by a tenth. Who makes a path longer with good reason raises its limit.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest

from strictflow_mp import StrictFlow, write
from strictflow_mp.client.client import Client
from strictflow_mp.client.state import FlowState
from strictflow_mp.coordinator.sessions import Sessions
from strictflow_mp.memory.gatekeeper import GateKeeper
from strictflow_mp.memory.segment import Segment
from strictflow_mp.store import StoreWriter
from strictflow_mp.system.identity import Identity
from strictflow_mp.values.codec import pack
from strictflow_mp.values.keys import pack_key
from strictflow_mp.wire.future import TaskFuture
from strictflow_mp.wire.stream import Stream

ROUNDS = 12
TOOL = 4  # of `sys.monitoring`: none that it names for a purpose
LIMITS = {
    "unchanged_read": 70,
    "changed_read": 210,
    "submit": 700,
    "result": 900,
    "p1": 3800,
    "commit": 1720,
}


class Count:
    """Counts the bytecode instructions of the calling thread while it is entered, but for those of *but*."""

    def __init__(self, *but: Callable[..., object]) -> None:
        self._but = {function.__code__ for function in (*but, Count.__enter__, Count.__exit__, Count.stop)}
        self.instructions = 0

    def __enter__(self) -> Count:
        if hasattr(sys, "monitoring"):  # tracing misses some there
            self._thread = threading.get_ident()
            sys.monitoring.use_tool_id(TOOL, "test_cost")
            sys.monitoring.register_callback(TOOL, sys.monitoring.events.INSTRUCTION, self._monitored)
            sys.monitoring.set_events(TOOL, sys.monitoring.events.INSTRUCTION)
        else:
            self._former = sys.gettrace()
            sys.settrace(self._called)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        if hasattr(sys, "monitoring"):
            sys.monitoring.set_events(TOOL, 0)
            sys.monitoring.register_callback(TOOL, sys.monitoring.events.INSTRUCTION, None)
            sys.monitoring.free_tool_id(TOOL)
        else:
            sys.settrace(self._former)

    def _monitored(self, code, offset):
        if code not in self._but and threading.get_ident() == self._thread:
            self.instructions += 1

    def _called(self, frame, event, argument):
        if frame.f_code in self._but:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._ran

    def _ran(self, frame, event, argument):
        if event == "opcode":
            self.instructions += 1
        return self._ran


def shortest(operation: Callable[[], object], *but: Callable[..., object], before=lambda: None) -> int:
    """The instructions of the shortest of several rounds. *before* each, something may be done that is not counted."""
    counts = []
    for _ in range(ROUNDS):
        before()
        with Count(*but) as count:
            operation()
        counts.append(count.instructions)
    return min(counts)


def increment(value: int, step: int) -> int:
    return value + step


def unchanged_read() -> int:
    """A gated read of a value that has not changed."""
    with StrictFlow(state={"config": {"version": 1}}) as flow:
        state = flow.state
        return shortest(lambda: state["config"])


def changed_read() -> int:
    """A gated read of a value that has just changed."""
    with StrictFlow(state={"config": {"version": 1}}) as flow:
        state = flow.state
        state["config"]
        return shortest(lambda: state["config"], before=lambda: flow.put("config", {"version": 2}).result())


def submit() -> int:
    """Submitting a P1, without its result."""
    with StrictFlow(state={"counter": 0}) as flow:
        add = write(flow, key="counter")(increment)
        futures = [add(1)]
        return shortest(lambda: futures.append(add(1)), before=lambda: futures.pop().result())


def result() -> int:
    """Taking the result of a P1, without the wait for it."""
    with StrictFlow(state={"counter": 0}) as flow:
        add = write(flow, key="counter")(increment)
        futures = []
        return shortest(lambda: futures.pop().result(), Stream.wait, before=lambda: futures.append(add(1)))


def p1(prepare: Callable[[], None] = lambda: None) -> int:
    """One P1 in the coordinator, from its frame to its answer, and once around the loop; *prepare* is run there."""

    def begin() -> None:
        prepare()
        sys.p1_count = Count(Sessions._events)
        sys.p1_count.__enter__()

    def so_far(_: object) -> int:
        return sys.p1_count.instructions

    with StrictFlow(state={"counter": 0}) as flow:
        write(flow)(begin)().result()
        look = write(flow, key="counter")(so_far)
        found = [look().result() for _ in range(ROUNDS)]
        return min(after - before for before, after in pairwise(found))


def commit() -> int:
    """One commit of one key among 1,000, on the average: how deep a key lies depends on the flow's hash."""
    identity = Identity.mine()
    segment = Segment.create(secrets.token_hex(6), "cost", capacity=1 << 24, slots=2, identity=identity)
    try:
        writer = StoreWriter(segment, "cost")
        writer.create()
        changes = [{pack_key(f"key:{number}"): pack(number)} for number in range(1000)]
        for change in changes:
            writer.publish(change)
        with Count() as count:
            for change in changes:
                writer.publish(change)
        return count.instructions // len(changes)
    finally:
        segment.unlink()
        segment.close()


PATHS = {path.__name__: path for path in (unchanged_read, changed_read, submit, result, p1, commit)}


@pytest.mark.parametrize("name", PATHS)
def test_a_hot_path_is_no_longer_than_its_limit(name):
    assert 0 < PATHS[name]() <= LIMITS[name]


def lengthen(owner: type, name: str, instructions: int) -> None:
    """Let a method take at least so many instructions more."""
    method = getattr(owner, name)

    def longer(*args, **kwargs):
        for _ in range(instructions // 2):
            pass
        return method(*args, **kwargs)

    setattr(owner, name, longer)


@pytest.mark.parametrize(
    ("name", "owner", "method"),
    [
        ("unchanged_read", FlowState, "__getitem__"),
        ("changed_read", FlowState, "__getitem__"),
        ("submit", Client, "call"),
        ("result", TaskFuture, "result"),
        ("commit", StoreWriter, "publish"),
    ],
)
def test_a_longer_path_is_noticed(monkeypatch, name, owner, method):
    monkeypatch.setattr(owner, method, getattr(owner, method))  # to be undone
    lengthen(owner, method, LIMITS[name] // 2)
    assert PATHS[name]() > LIMITS[name]


def test_a_longer_p1_is_noticed():
    assert p1(lambda: lengthen(GateKeeper, "finish", LIMITS["p1"] // 2)) > LIMITS["p1"]


HEAVY = ["asyncio", "cloudpickle", "hashlib", "json", "multiprocessing.shared_memory", "numpy", "psutil", "subprocess"]
"""Modules that take longer to load than all of ours; they come when they are first needed."""


def test_importing_the_package_loads_nothing_heavy(run_python):
    done = run_python(f"import sys, strictflow_mp; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr
