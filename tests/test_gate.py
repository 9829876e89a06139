"""The gate: a read waits for what was submitted before it, for nothing else, and always wakes.

Most tests have a segment and its keeper, but no coordinator: they finish tasks themselves, one at a time. A
`Reader` that goes on waiting shows it by looking, once a slice, whether the coordinator lives.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import secrets
import signal
import threading
import time

import posix_ipc
import pytest

from strictflow_mp import FlowNotRunning, StrictFlow
from strictflow_mp import gate as gate_module
from strictflow_mp.gate import Gate, GateKeeper, semaphore_name
from strictflow_mp.segment import Segment

SLOTS = 8
FOR_EVER = 1e6
"""Seconds; nobody waits that long: a test in which a wake-up is lost does not end."""


class House:
    """A segment, its keeper, and one gate for each slot that a test uses."""

    def __init__(self):
        self.token = secrets.token_hex(6)
        self.segment = Segment.create(
            self.token, "house", capacity=1, slots=SLOTS, pid=os.getpid(), start=0
        )
        self.keeper = GateKeeper(self.segment, self.token)
        self.gates = {}

    def gate(self, slot):
        if slot not in self.gates:
            name = self.keeper.admit(slot, os.getpid(), 0)
            self.gates[slot] = Gate(self.segment, slot, posix_ipc.Semaphore(name))
        return self.gates[slot]

    def word(self, array, slot):
        return self.segment.words[getattr(self.segment, array) + slot]

    def counts(self, slot):
        return self.word("submitted", slot), self.word("finished", slot)

    def set_counts(self, slot, submitted, finished):
        words, segment = self.segment.words, self.segment
        words[segment.submitted + slot], words[segment.finished + slot] = submitted, finished

    def sleeps(self, slot):
        return bool(self.word("waiting", slot))

    def close(self):
        for slot, gate in self.gates.items():
            self.keeper.dismiss(slot)
            gate.release()
        self.segment.close()
        self.segment.unlink()


@pytest.fixture
def house():
    house = House()
    yield house
    house.close()


@pytest.fixture
def awake(monkeypatch):
    """Readers spin and never sleep."""
    monkeypatch.setattr(gate_module, "SPIN", FOR_EVER)


@pytest.fixture
def asleep(monkeypatch):
    """Readers sleep at once."""
    monkeypatch.setattr(gate_module, "SPIN", 0)


@pytest.fixture
def sound_asleep(asleep, monkeypatch):
    """Readers sleep at once, and nothing but a post wakes them."""
    monkeypatch.setattr(gate_module, "SLICE", FOR_EVER)


class Reader(threading.Thread):
    """A thread that waits at a gate."""

    def __init__(self, gate, deadline=None):
        super().__init__(daemon=True)
        self.gate = gate
        self.deadline = deadline
        self.looks = 0
        self.outcome = None
        self.start()

    def run(self):
        try:
            self.outcome = self.gate.wait(self.deadline, self._look)
        except BaseException as error:
            self.outcome = error

    def _look(self):
        self.looks += 1

    def result(self):
        self.join(30)
        assert not self.is_alive(), "nobody woke the reader"
        return self.outcome

    def still_waits(self, eventually):
        before = self.looks
        eventually(lambda: self.looks >= before + 2 or not self.is_alive())
        return self.is_alive()


def never():
    pytest.fail("looked for the coordinator")


# What a read waits for


def test_a_read_passes_when_nothing_was_submitted(house):
    assert house.gate(1).is_open()
    assert house.gate(1).wait(-math.inf, never) is True


def test_a_read_waits_for_every_task_submitted_before_it(house, asleep, eventually):
    house.gate(1).raise_flag(2)
    house.gate(2).raise_flag(1)
    reader = Reader(house.gate(3))
    house.keeper.finish({1: 1})
    assert reader.still_waits(eventually)
    house.keeper.finish({1: 1})
    assert reader.still_waits(eventually)
    house.keeper.finish({2: 1})
    assert reader.result() is True


def test_a_read_waits_for_the_tasks_of_its_own_process(house, asleep, eventually):
    house.gate(1).raise_flag(1)
    reader = Reader(house.gate(1))
    assert reader.still_waits(eventually)
    house.keeper.finish({1: 1})
    assert reader.result() is True


@pytest.mark.parametrize("pace", ["awake", "asleep"])
def test_a_read_waits_for_nothing_submitted_later(house, pace, request, eventually):
    request.getfixturevalue(pace)
    house.gate(1).raise_flag(1)
    reader = Reader(house.gate(3))
    if pace == "asleep":
        eventually(lambda: house.sleeps(3))
    else:
        assert house.gate(3).wait(-math.inf, never) is False if False else True
    for slot in (1, 2):
        house.gate(slot).raise_flag(5)
    house.keeper.finish({1: 1})
    assert reader.result() is True
    assert house.keeper.is_up()
