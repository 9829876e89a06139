"""Every object of ours that a person may meet in a debugger says what it is, in whatever state it is met."""

from __future__ import annotations

import gc
import re
import secrets

import pytest
from holding import held

from strictflow_mp import StrictFlow, read, write
from strictflow_mp.memory.gatekeeper import GateKeeper
from strictflow_mp.memory.segment import Segment
from strictflow_mp.memory.suspect import Marker
from strictflow_mp.store import StoreWriter
from strictflow_mp.system.identity import Identity
from strictflow_mp.system.machine import FREE_THREADED

PLAIN = re.compile(r"<\S+ object at 0x")


def ours():
    """The repr of each object of the package in this process, by class; of a class that has one of its own."""
    found = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, tuple):
            continue  # a named one shows its fields, whatever these hold
        if str(getattr(kind, "__module__", "")).startswith("strictflow_mp") and "__repr__" in vars(kind):
            found.setdefault(kind.__name__, set()).add(repr(thing))
    return found


@pytest.fixture
def flow():
    with StrictFlow("shown", state={"n": 0, "list": [1]}, max_pending=8) as flow:
        yield flow


def check(found, expected):
    assert expected <= set(found)
    for name, texts in found.items():
        for text in texts:
            assert not PLAIN.match(text), name
            assert "Traceback" not in text


def test_in_a_process_that_uses_a_flow(flow):
    @write(flow)
    def add(n):
        flow.state["n"] += n

    add(1).result()
    with flow.snapshot() as snapshot, flow.watch("n") as watch, held(flow):
        pending = add(2)
        assert snapshot["n"] == 1
        assert repr(watch) == "<Watch of 'n' of 'shown' at version 2>"
        assert repr(snapshot) == "<Snapshot of 'shown' at version 2, 2 keys>"
        assert repr(flow.snapshot()) == "<Snapshot of 'shown', not taken yet>"
        assert "pending" in repr(pending)
        group = flow.spawn(int, processes=2)
        found = ours()
    assert repr(snapshot) == "<Snapshot of 'shown', closed>"
    assert pending.result() is None
    assert "done" in repr(pending)
    group.join()
    assert repr(group) == "<WorkerGroup int: [0, 0]>"
    check(
        found,
        {"Attachment", "Client", "Gate", "Pins", "Snapshot", "StoreReader", "StrictFlow", "Task"}
        | ({"FlowState"} if not FREE_THREADED else set())  # there a state of each thread's, which inherits its own
        | {"TaskFuture", "Turn", "Watch", "Worker", "WorkerGroup", "Stream", "Child", "Owner", "Segment"},
    )


def test_in_the_coordinator(flow):
    @write(flow)
    def look():
        flow.state["list"].append(2)
        return ours(), repr(flow.state)

    @read(flow)
    async def look_while_async():
        return ours(), repr(flow.state)

    found, state = look().result()
    check(
        found,
        {"Arena", "Burst", "GateKeeper", "Inside", "Marker", "Receipts", "Runner", "Scheduler", "Session", "Sessions"}
        | {"Stepper", "StoreWriter", "TimeLimit", "Transaction"},
    )
    assert "Transaction" in state
    found, state = look_while_async().result()
    check(found, {"Runner"})
    assert "shown" in state


def test_when_the_segment_is_closed():
    segment = Segment.create(secrets.token_hex(6), "closed", capacity=1 << 20, slots=2, identity=Identity(1, 1, 0, 0))
    things = [Marker(segment), GateKeeper(segment, secrets.token_hex(6)), StoreWriter(segment, "closed"), segment]
    segment.close()
    segment.unlink()
    assert {type(thing).__name__ for thing in things if PLAIN.match(repr(thing))} == set()
