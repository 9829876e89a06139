"""Many wait for the next coordinator: they sleep, and look for it in a way that costs next to nothing."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from strictflow_mp import FlowExists, StrictFlow
from strictflow_mp.client import comeback, reaching
from strictflow_mp.flow import owner as owners
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

OWNER = """
import sys
from strictflow_mp import StrictFlow
with StrictFlow("herd", state={"n": 0}):
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner():
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"up\n"
        yield process
        process.send_signal(signal.SIGCONT)
        process.stdin.close()


class Clock:
    """`time`, and how long somebody has slept in all."""

    monotonic = time.monotonic

    def __init__(self):
        self.slept = []

    def sleep(self, seconds):
        self.slept.append(seconds)
        time.sleep(seconds)


def test_a_process_that_waits_for_the_next_coordinator_looks_seldom(owner, monkeypatch):
    clock, looks = Clock(), []
    monkeypatch.setattr(reaching, "time", clock)
    may_return = comeback.may_return
    monkeypatch.setattr(comeback, "may_return", lambda *args: looks.append(1) or may_return(*args))
    with closing(StrictFlow.attach("herd")) as flow:
        assert flow.state["n"] == 0
        owner.send_signal(signal.SIGSTOP)
        coordinator = Place.of("herd").resident().pid
        os.kill(coordinator, signal.SIGSTOP)
        future = flow.put("n", 1)  # before it is dead: a submit would wait for the next one, however long that takes
        os.kill(coordinator, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(concurrent.futures.TimeoutError):  # another class before Python 3.11
            future.result(timeout=1.5)
        # However slow the machine is, there is a least time between two of them.
        waited = time.monotonic() - began
        assert len(looks) <= 3 + waited / comeback.LOOK_SECONDS
        assert len(clock.slept) <= 12 + waited / (reaching.LONGEST_PAUSE_SECONDS / 2)
        owner.send_signal(signal.SIGCONT)
        future.result(timeout=30)
        assert flow.state["n"] == 1


def test_no_two_processes_look_at_the_same_times(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(reaching, "time", clock)
    one, other = reaching.Pauses(), reaching.Pauses()
    for _ in range(5):
        one.sleep()
        other.sleep()
    assert clock.slept[::2] != clock.slept[1::2]
    assert max(clock.slept) <= 1.5 * reaching.LONGEST_PAUSE_SECONDS


def test_a_pause_ends_with_the_deadline(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(reaching, "time", clock)
    reaching.Pauses().sleep(time.monotonic() - 1)
    assert clock.slept == [0.0]


def test_one_that_only_looks_whether_anybody_lives_there_does_not_end_the_flow(monkeypatch):
    """Each that waits holds the lock when it looks; on a busy machine it may not run for long just then."""
    start, met = owners.start_coordinator, []

    def start_it(*args):
        try:
            return start(*args)
        except FlowExists as error:
            met.append(error)
            fcntl.flock(looker, fcntl.LOCK_UN)
            raise

    monkeypatch.setattr(owners, "start_coordinator", start_it)
    with StrictFlow("looked at", state={"n": 0}) as flow:
        coordinator = flow.stats().coordinator_pid
        looker = os.open(Place.of("looked at").lock, os.O_RDWR)
        os.kill(coordinator, signal.SIGKILL)
        fcntl.flock(looker, fcntl.LOCK_SH)  # as soon as it is free
        flow.put("n", 1).result(timeout=60)
        os.close(looker)
        assert flow.state["n"] == 1
    assert met


def test_an_owner_that_waits_for_the_end_sleeps_while_the_next_one_starts(monkeypatch):
    has_begun, may_go_on = threading.Event(), threading.Event()
    start = owners.start_coordinator

    def start_late(*args):
        has_begun.set()
        may_go_on.wait(60)
        return start(*args)

    with StrictFlow(state={"n": 0}) as flow:
        monkeypatch.setattr(owners, "start_coordinator", start_late)
        os.kill(flow.stats().coordinator_pid, signal.SIGKILL)
        try:
            assert has_begun.wait(60)
            clock = Clock()
            with monkeypatch.context() as patch:
                patch.setattr(owners, "time", clock)
                assert not flow._owner.wait(0.3)
            assert sum(clock.slept) > 0.15  # of a machine that is busy, the rest is its own
        finally:
            may_go_on.set()
        assert flow.put("n", 1).result(60) is None
