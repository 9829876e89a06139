"""Counters: how many tasks of a priority were run, how many failed, and how long they took."""

from __future__ import annotations

from collections import deque
from operator import attrgetter
from typing import Any

from ..wire.stats import Latency

__all__ = ["Counters"]

LATENCY_SAMPLES = 2048
"""Latencies kept for each priority."""


_arrived, _failure = attrgetter("arrived"), attrgetter("failure")


class Counters:
    """Of one priority."""

    def __init__(self) -> None:
        # Tasks that were run and answered since this coordinator began; those that were cancelled or refused are not.
        self.run = 0
        # Those of them that raised.
        self.failed = 0
        # Nanoseconds from arrival to answer, of the last of them.
        self._latencies: deque[int] = deque(maxlen=LATENCY_SAMPLES)

    def ran(self, nanoseconds: int, failed: bool) -> None:
        """A task was answered."""
        self.run += 1
        self.failed += failed
        self._latencies.append(nanoseconds)

    def ran_all(self, now: int, tasks: list[Any]) -> None:
        """Several tasks were answered at that time; each says when it `arrived` and whether it has a `failure`."""
        self._latencies.extend(map(now.__sub__, map(_arrived, tasks)))
        self.failed += sum(failure is not None for failure in map(_failure, tasks))
        self.run += len(tasks)

    def latency(self) -> Latency:
        """Percentiles over the last tasks."""
        ordered = sorted(self._latencies)
        if not ordered:
            return Latency(0.0, 0.0, 0.0, 0.0)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e9

        return Latency(at(0.5), at(0.9), at(0.99), ordered[-1] / 1e9)

    def __repr__(self) -> str:
        return f"<Counters: {self.run} run, {self.failed} failed>"
