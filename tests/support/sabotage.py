"""Sabotage: each function breaks one rule of a protocol, in the process that calls it and in no other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

from strictflow_mp.client import state
from strictflow_mp.client.client import Client
from strictflow_mp.coordinator import burst
from strictflow_mp.memory import gate, gatekeeper
from strictflow_mp.memory.segment import W_TRACE
from strictflow_mp.store import commit, pins, reader, views

W_NEVER_WRITTEN = W_TRACE + 1


def reuse_memory_at_once() -> None:
    """In the coordinator; breaks nothing, but leaves it all to horizon and pins."""
    commit.REST_WORDS = 0


def dawdle() -> None:
    """In a reader; breaks nothing, but now and then it stops in the middle of a read."""

    def route(self, key):
        found = route_well(self, key)
        return found._replace(turns=Dawdling(found.turns))

    route_well, reader.StoreReader.route = reader.StoreReader.route, route
    reader.HOPS = Dawdling(reader.HOPS)


class Dawdling:
    """Turns or hops that take their time, once in a while."""

    walks = itertools.count()

    def __init__(self, turns: Iterable[int]) -> None:
        self._turns = turns

    def __iter__(self) -> Iterator[int]:
        pause = 0.002 if next(self.walks) % 20 == 0 else 0
        for turn in self._turns:
            yield turn
            if pause:
                time.sleep(pause)


def open_the_gate() -> None:
    """In a reader: it never waits."""

    def bind(self, *bound):
        bind_well(self, *bound)
        finished = self._bound[1]
        self._bound = (finished, *self._bound[1:])

    bind_well, state.FlowState.bind = state.FlowState.bind, bind
    Client.pass_gate = lambda self, timeout=None: self.attach().reader


def raise_no_flag() -> None:
    """In a writer: nobody learns what it has submitted."""
    gate.Gate.raise_flag = lambda self, tasks: None


def skip_the_horizon() -> None:
    """In a reader: it believes what it has read, reused or not."""
    dawdle()
    reader.W_HORIZON = state.W_HORIZON = W_NEVER_WRITTEN


def read_the_newest_for_each_key() -> None:
    """In a reader: a snapshot has no version of its own."""

    def _at(self):
        self._reader = self._enter()
        newest = self._reader.pin()
        self._reader.unpin(newest)
        return newest

    views.Snapshot._at = _at


def finish_before_publishing() -> None:
    """In the coordinator: finished[] grows, then the version is published."""
    ready = []

    def publish(self):
        ready.append(self)

    def finish(self, *numbers):
        finish_well(self, *numbers)
        while ready:
            publish_well(ready.pop())

    publish_well, burst.Burst.publish = burst.Burst.publish, publish
    finish_well, gatekeeper.GateKeeper.finish = gatekeeper.GateKeeper.finish, finish


def ignore_the_pins() -> None:
    """In the coordinator: it reuses what a snapshot still needs."""
    reuse_memory_at_once()
    pins.PinnedVersions.needs = lambda self, birth, replaced: False
