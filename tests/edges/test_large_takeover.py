"""A takeover of a large state: short for each key, and everybody knows that it makes progress."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from tracing import traced

from strictflow_mp import StrictFlow
from strictflow_mp.client import comeback
from strictflow_mp.flow import starting
from strictflow_mp.flow.starting import _read_answer
from strictflow_mp.memory.segment import SERVING, Segment
from strictflow_mp.store import StoreWriter, steps, survey
from strictflow_mp.system.identity import Identity
from strictflow_mp.system.lease import Lease
from strictflow_mp.system.place import Place
from strictflow_mp.values.codec import pack

pytestmark = pytest.mark.once

KEYS = 3000


@pytest.fixture
def segment():
    segment = Segment.create(
        os.urandom(6).hex(), "large", capacity=1 << 24, slots=4, identity=Identity.mine(), status=SERVING
    )
    writer = StoreWriter(segment, "large")
    writer.create()
    writer.publish({pack(number): pack("x" * 20) for number in range(KEYS)})
    yield segment
    segment.unlink()
    segment.close()


def steps_of(function):
    """How many instructions of Python a call takes."""
    steps = 0

    def trace(frame, event, argument):
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    with traced(trace):
        function()
    return steps


def test_a_takeover_takes_few_steps_for_each_key(segment):
    heir = StoreWriter(segment, "large")
    assert steps_of(heir.recover) / KEYS < 125
    assert heir.tree[1] == KEYS
    heir.publish({pack("one more"): pack(True)})
    assert heir.tree[1] == KEYS + 1


def test_a_takeover_says_again_and_again_that_it_goes_on(segment, monkeypatch):
    """No step of it looks at more than so many: whichever it is, it is not taken for one that has stopped."""
    for module in (steps, survey):
        monkeypatch.setattr(module, "STEP", 100)
    heir = StoreWriter(segment, "large")
    lines = []

    def count(frame, event, arg):
        lines[-1] += 1
        return count

    def go_on():
        lines.append(0)

    go_on()
    sys.settrace(lambda frame, event, arg: count)
    try:
        heir.recover(go_on)
    finally:
        sys.settrace(None)
    assert len(lines) > 5 * KEYS / 100
    assert max(lines) < 2000


def test_the_sign_of_life_is_the_time_of_the_lock(eventually):
    place = Place.of("alive")
    assert place.sign_of_life() == 0
    lease = Lease.take("alive")
    try:
        before = place.sign_of_life()

        def moves():
            lease.go_on()
            return place.sign_of_life() != before

        eventually(moves)
    finally:
        lease.leave()


def test_an_owner_waits_while_there_are_signs_of_life():
    readable, writable = os.pipe()
    looks = []

    def sign_of_life():
        looks.append(1)
        if len(looks) == 20:
            os.write(writable, b"it serves")
            os.close(writable)
        return len(looks)

    assert _read_answer(readable, 0.05, sign_of_life) == b"it serves"
    os.close(readable)


def test_an_owner_does_not_wait_for_one_that_gives_no_sign():
    readable, writable = os.pipe()
    assert _read_answer(readable, 0.05, lambda: 7) == b""
    os.close(readable)
    os.close(writable)


SLOW = """
import sys, time
def slow(event, args):
    if event == "strictflow_mp.takeover.begun":
        for name in ("steps", "survey"):
            sys.modules["strictflow_mp.store." + name].STEP = 4
    elif event == "os.utime":
        time.sleep(0.1)
sys.addaudithook(slow)
"""
PATIENCE_SECONDS = 3.0


def test_a_takeover_that_takes_longer_than_anybody_waits_is_waited_for_while_it_goes_on(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    here = Path(comeback.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{here}")
    monkeypatch.setattr(comeback, "RESTART_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(starting, "END_SECONDS", 0.0)
    with StrictFlow("slow", state={number: number for number in range(300)}) as flow:
        monkeypatch.setattr(starting, "START_SECONDS", PATIENCE_SECONDS)
        os.kill(flow.stats().coordinator_pid, signal.SIGKILL)
        flow.put(1, "after").result()
        assert flow.stats().restarts == 1
        assert flow.state[1] == "after"
        monkeypatch.setattr(starting, "END_SECONDS", 15.0)
