"""Looks: asking a flow for its statistics again and again, without being held up by a task that runs long.

A thread asks, and whoever looks waits for it only so long. A look that is not answered in time stays under way: the
next one waits for the same answer, so however long SF-LOOP is silent there is one thread and one question.
"""

from __future__ import annotations

import os
import time
from concurrent import futures
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from ..errors import CoordinatorLost, FlowNotRunning
from ..flow.handle import StrictFlow
from ..system.place import Place
from .glance import Glance, glance

if TYPE_CHECKING:
    from ..wire.stats import FlowStats, WorkerStats

__all__ = ["ATTACH_SECONDS", "Look", "Looks"]

ATTACH_SECONDS = 1.0
"""In these a flow that is served lets us in, unless a P1 holds it up."""


class Look(NamedTuple):
    """What was seen, and when."""

    stats: FlowStats
    at: float


class Looks:
    """Looks at a flow, without what this process adds to it. For one thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._place = Place.of(name)
        self._flow: StrictFlow | None = None  # set by the thread that asks, once; None until we have been let in
        self._asked: futures.Future[Look] | None = None  # the look that is under way
        self._since = 0.0  # when that was begun

    def next(self, timeout: float) -> Look | None:
        """The next look, or None when there is none in time.

        Raises:
            FlowNotRunning: the flow is not there, or has ended.
        """
        if self._asked is None:
            self._asked, self._since = futures.Future(), time.monotonic()
            Thread(target=self._ask, args=(self._asked,), daemon=True).start()
        asked = self._asked
        if not futures.wait([asked], timeout).done:
            return None
        self._asked = None
        return asked.result()

    def _ask(self, asked: futures.Future[Look]) -> None:
        try:
            if self._flow is None:
                self._flow = self._attach()
            stats, at = self._flow.stats(), time.monotonic()
            asked.set_result(Look(replace(stats, workers=_others(stats.workers)), at))
        except (CoordinatorLost, FlowNotRunning) as error:
            asked.set_exception(error if self._flow is None else FlowNotRunning("it has ended", flow=self.name))
        except BaseException as error:
            asked.set_exception(error)

    def _attach(self) -> StrictFlow:
        while True:
            try:
                return StrictFlow.attach(self.name, timeout=ATTACH_SECONDS)
            except FlowNotRunning:
                if not self._place.is_inhabited():
                    raise  # else nobody is let in, because a P1 runs

    def glance(self) -> Glance | None:
        """What can be seen while nobody answers."""
        seen = glance(self._place)
        return replace(seen, workers=_others(seen.workers)) if seen else None

    @property
    def is_served(self) -> bool:
        """Whether somebody is there to answer."""
        return self._place.is_inhabited()

    @property
    def silence(self) -> float:
        """Seconds for which the look that is under way has had no answer."""
        return time.monotonic() - self._since if self._asked is not None else 0.0

    def close(self) -> None:
        """Leave the flow."""
        if self._flow is not None:
            self._flow.close()

    def __repr__(self) -> str:
        return f"<Looks at {self.name!r}, silent for {self.silence:.1f} s>"


def _others(workers: tuple[WorkerStats, ...]) -> tuple[WorkerStats, ...]:
    return tuple(worker for worker in workers if worker.pid != os.getpid())
