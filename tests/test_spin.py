"""Spinning: it finds what comes soon, and leaves the core to others who want it."""

from __future__ import annotations

import time

import pytest

from strictflow_mp import spin


@pytest.fixture(autouse=True)
def rested(monkeypatch):
    """As in a process that has not spun yet, on a machine where nobody else wants the core."""
    monkeypatch.setattr(spin, "_quiet_until", 0.0)
    monkeypatch.setattr(spin, "SPIN", 60.0)
    monkeypatch.setattr(spin, "CROWDED", 60.0)


def test_it_looks_until_it_finds():
    looks = iter([0, 0, 0, 7, 8])
    assert spin.look_for(lambda: next(looks), -1) == 7
    assert next(looks) == 8


def test_it_gives_up_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(spin, "SPIN", 0.001)
    looks = []
    began = time.perf_counter()
    assert spin.look_for(lambda: looks.append(0), "nothing") == "nothing"
    assert looks
    assert time.perf_counter() - began >= 0.001


def test_where_giving_way_takes_long_nobody_spins_for_a_while(monkeypatch):
    monkeypatch.setattr(spin, "CROWDED", -1.0)  # so it always takes too long
    monkeypatch.setattr(spin, "QUIET", 60.0)
    assert spin.look_for(lambda: 1, 0) == 1, "what it finds then counts all the same"
    looks = []
    assert spin.look_for(lambda: looks.append(0), 0) == 0
    assert not looks
    monkeypatch.setattr(spin, "_quiet_until", time.perf_counter())
    assert spin.look_for(lambda: 1, 0) == 1
