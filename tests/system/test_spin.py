"""Spinning: it finds what comes soon, and leaves the core to others who want it."""

from __future__ import annotations

import time

import pytest

from strictflow_mp.system import spin

SPIN_SECONDS, SHARED_SECONDS, CROWDED_SECONDS = spin.SPIN_SECONDS, spin.SHARED_SECONDS, spin.CROWDED_SECONDS


@pytest.fixture(autouse=True)
def rested(monkeypatch):
    """As in a process that has not spun yet, on a machine where nobody else wants the core."""
    monkeypatch.setattr(spin, "_quiet_until", 0.0)
    monkeypatch.setattr(spin, "_quiet", spin.QUIET_SECONDS)
    monkeypatch.setattr(spin, "SPIN_SECONDS", 60.0)
    monkeypatch.setattr(spin, "SHARED_SECONDS", 60.0)
    monkeypatch.setattr(spin, "CROWDED_SECONDS", 60.0)


def test_it_looks_until_it_finds():
    looks = iter([0, 0, 0, 7, 8])
    assert spin.look_for(lambda: next(looks), -1) == 7
    assert next(looks) == 8


def test_it_gives_up_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(spin, "SPIN_SECONDS", 0.001)
    looks = []
    began = time.perf_counter()
    assert spin.look_for(lambda: looks.append(0), "nothing") == "nothing"
    assert looks
    assert time.perf_counter() - began >= 0.001


def test_where_giving_way_takes_long_nobody_spins_for_a_while(monkeypatch):
    monkeypatch.setattr(spin, "CROWDED_SECONDS", -1.0)  # so it always takes too long
    monkeypatch.setattr(spin, "QUIET_SECONDS", 60.0)
    assert spin.look_for(lambda: 1, 0) == 1, "what it finds then counts all the same"
    looks = []
    assert spin.look_for(lambda: looks.append(0), 0) == 0
    assert not looks
    monkeypatch.setattr(spin, "_quiet_until", time.perf_counter())
    assert spin.look_for(lambda: 1, 0) == 1


class Clock:
    """A clock that passes only when it is told to, and a core that others want while `wanted` is set."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wanted = False
        self.slice = 0.001

    def give_way(self) -> None:
        self.now += self.slice if self.wanted else 1e-6


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(spin, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(spin, "sched_yield", clock.give_way)
    monkeypatch.setattr(spin, "SHARED_SECONDS", 1e-5)
    monkeypatch.setattr(spin, "CROWDED_SECONDS", 1e-4)
    return clock


def pause_of(clock):
    """Look once, while others want the core; how long nobody looks then."""
    clock.wanted = True
    assert spin.look_for(lambda: True, False), "it looked"
    clock.wanted = False
    began = clock.now
    while not spin.look_for(lambda: True, False):
        clock.now += spin.QUIET_SECONDS / 1000
    return clock.now - began


def test_each_time_that_others_want_the_core_again_soon_nobody_spins_for_twice_as_long(clock):
    pauses = []
    for _ in range(8):
        pauses.append(pause_of(clock))
        clock.now += spin.LONGEST_QUIET_SECONDS / 2
    factors = [min(2**n, round(spin.LONGEST_QUIET_SECONDS / spin.QUIET_SECONDS)) for n in range(8)]
    assert pauses == pytest.approx([factor * spin.QUIET_SECONDS for factor in factors], rel=0.01)


def test_one_hiccup_long_after_a_crowd_costs_as_little_as_the_first(clock):
    first = pause_of(clock)
    assert pause_of(clock) > 1.5 * first
    clock.now += 1.1 * spin.LONGEST_QUIET_SECONDS
    assert pause_of(clock) == pytest.approx(first, rel=0.01)


def test_what_stops_several_threads_at_a_time_counts_once(clock, monkeypatch):
    alone = pause_of(clock)
    clock.now += 2 * spin.LONGEST_QUIET_SECONDS
    threads = []

    def give_way() -> None:
        if len(threads) < 4:
            threads.append(len(threads))
            spin.look_for(lambda: True, False)  # as another thread, that waits already
            return
        clock.give_way()

    monkeypatch.setattr(spin, "sched_yield", give_way)
    assert pause_of(clock) == pytest.approx(alone, rel=0.01)


def test_the_times_are_in_order():
    assert spin.QUIET_SECONDS < spin.LONGEST_QUIET_SECONDS
    assert SPIN_SECONDS < SHARED_SECONDS < CROWDED_SECONDS


@pytest.mark.parametrize("cores", [1, 2])
def test_who_answers_us_on_our_own_core_is_a_crowd_only_if_there_is_no_other(clock, monkeypatch, cores):
    monkeypatch.setattr(spin.os, "sched_getaffinity", lambda pid: set(range(cores)))
    clock.slice = 5e-5
    assert (pause_of(clock) > spin.QUIET_SECONDS / 2) == (cores == 1)
