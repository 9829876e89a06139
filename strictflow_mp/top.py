"""`strictflow-mp top`: looks at a flow again and again, and shows what has happened meanwhile."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent import futures
from contextlib import closing
from dataclasses import asdict, replace
from threading import Thread
from typing import NamedTuple

import psutil
from rich.console import Console, RenderableType
from rich.live import Live

from .errors import CoordinatorLost, FlowNotRunning, StrictFlowError
from .flow import StrictFlow
from .glance import Glance, glance
from .keyboard import CTRL_Z, Keyboard
from .rates import Rates, rates
from .rendezvous import Place
from .screen import Usage, dark, screen
from .stats import FlowStats, WorkerStats

__all__ = ["as_json", "watch"]

ATTACH = 1.0
"""Seconds in which a flow that is served lets us in."""

PATIENCE = 0.5
"""Seconds in which SF-LOOP answers when no long task holds it up."""

MINUTE = 60.0


class Look(NamedTuple):
    """What was seen, and when."""

    stats: FlowStats
    at: float


class _Looks:
    """Looks at a flow, without what this process adds to it. One that is not answered in time stays under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._place = Place.of(name)
        self._flow: StrictFlow | None = None
        self._asked: futures.Future[Look] | None = None
        self._since = 0.0

    def next(self, timeout: float) -> Look | None:
        """The next look, or None when there is none in time."""
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
            while self._flow is None:
                try:
                    self._flow = StrictFlow.attach(self.name, timeout=ATTACH)
                except FlowNotRunning:
                    if not self._place.is_inhabited():
                        raise  # else nobody is let in, for a P1 runs
            stats, at = self._flow.stats(), time.monotonic()
            asked.set_result(Look(replace(stats, workers=_others(stats.workers)), at))
        except (CoordinatorLost, FlowNotRunning) as error:
            asked.set_exception(error if self._flow is None else FlowNotRunning("it has ended", flow=self.name))
        except BaseException as error:
            asked.set_exception(error)

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
        """Seconds since somebody has asked and has no answer."""
        return time.monotonic() - self._since if self._asked is not None else 0.0

    def close(self) -> None:
        """Leave the flow."""
        if self._flow is not None:
            self._flow.close()


def _others(workers: tuple[WorkerStats, ...]) -> tuple[WorkerStats, ...]:
    return tuple(worker for worker in workers if worker.pid != os.getpid())


class _Usage:
    """What the processes of a flow take, since the last time that it was asked."""

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}

    def of(self, coordinator: int, workers: tuple[WorkerStats, ...]) -> dict[int, Usage]:
        """By pid; who cannot be seen is left out."""
        pids = [coordinator, *(worker.pid for worker in workers)]
        self._processes = {pid: self._processes[pid] for pid in pids if pid in self._processes}
        found = {}
        for pid in pids:
            try:
                process = self._processes.setdefault(pid, psutil.Process(pid))
                found[pid] = Usage(process.cpu_percent(), process.memory_info().rss)
            except psutil.Error:
                self._processes.pop(pid, None)
        return found


def as_json(stats: FlowStats, now: Rates) -> str:
    """One line."""
    return json.dumps({**stats.as_dict(), "rates": asdict(now)})


def watch(name: str, *, interval: float, once: bool, json_lines: bool) -> None:
    """Show a flow until it ends, or somebody presses q.

    Args:
        interval: seconds between two looks.
        once: look twice, show what happened in between, and return.
        json_lines: print a line of JSON for each look, and no screen.

    Raises:
        StrictFlowError: the flow is not there, or has ended.
    """
    with closing(_Looks(name)) as looks:
        if json_lines:
            _print_lines(looks, interval, once)
            return
        console = Console(width=None if sys.stdout.isatty() else 120)
        is_live = console.is_terminal and not console.is_dumb_terminal and not once
        pictures = _Pictures(looks, console, is_live)
        if is_live:
            _show(pictures, console, interval)
        else:
            _print(pictures, console, interval, once)


def _print_lines(looks: _Looks, interval: float, once: bool) -> None:
    before = looks.next(MINUTE)
    if before is None:
        raise StrictFlowError("SF-LOOP has not answered for a minute: a P1 task runs all the time", flow=looks.name)
    while True:
        time.sleep(interval)
        look = looks.next(MINUTE)
        if look is not None:
            print(as_json(look.stats, rates(before.stats, look.stats, look.at - before.at)), flush=True)
            if once:
                return
            before = look


def _print(pictures: _Pictures, console: Console, interval: float, once: bool) -> None:
    picture = pictures.first()
    while True:
        if picture is not None:
            console.print(picture)
            if once:
                return
            console.print()
        time.sleep(interval)
        picture = pictures.next()


def _show(pictures: _Pictures, console: Console, interval: float) -> None:
    picture = pictures.first()
    with Keyboard() as keyboard, Live(picture, console=console, screen=True, auto_refresh=False) as live:
        while (key := keyboard.wait(interval, "qQ" + CTRL_Z)) not in ("q", "Q"):
            if key == CTRL_Z:
                live.stop()
                keyboard.suspend()
                live.start()
            live.update(pictures.next(), refresh=True)


class _Pictures:
    """What there is to be shown, one after the other."""

    def __init__(self, looks: _Looks, console: Console, is_live: bool) -> None:
        self._looks = looks
        self._usage = _Usage()
        self._console = console
        self._is_live = is_live
        self._before: Look | None = None

    def first(self) -> RenderableType | None:
        """Look for the first time: nothing has happened since, so there is only something to show if nobody answers."""
        # When nobody serves the flow, it is attaching that fails, and says so.
        self._before = look = self._looks.next(PATIENCE if self._looks.is_served else MINUTE)
        if look is None:
            return self._dark()
        self._usage.of(look.stats.coordinator_pid, look.stats.workers)
        return None

    def next(self) -> RenderableType:
        """What has happened since the last look."""
        look, before = self._looks.next(PATIENCE), self._before
        if look is None:
            return self._dark()
        self._before = look
        return self._screen(look.stats, (before or look).stats, look.at - (before or look).at)

    def _dark(self) -> RenderableType:
        seen = self._looks.glance()
        running = f": it runs a task of process {seen.busy}" if seen and seen.busy else ""
        note = f"SF-LOOP has not answered for {self._looks.silence:.0f} s{running}"
        before = self._before
        if before is None:
            usage = self._usage.of(seen.pid, seen.workers) if seen else {}
            return dark(self._looks.name, seen, usage, note, console=self._console, is_live=self._is_live)
        stats = seen.onto(before.stats) if seen else before.stats
        return self._screen(stats, before.stats, time.monotonic() - before.at, note)

    def _screen(self, stats: FlowStats, before: FlowStats, seconds: float, note: str = "") -> RenderableType:
        usage = self._usage.of(stats.coordinator_pid, stats.workers)
        happened = rates(before, stats, seconds)
        return screen(stats, happened, usage, note, console=self._console, is_live=self._is_live)
