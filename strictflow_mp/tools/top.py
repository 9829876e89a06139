"""`strictflow-mp top`: shows what happened between two looks at a flow, on a screen, as text or as lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

import psutil
from rich.console import Console, RenderableType
from rich.live import Live

from ..errors import StrictFlowError
from .keyboard import CTRL_Z, Keyboard
from .looks import Look, Looks
from .rates import Rates, rates
from .screen import Usage, dark, screen

if TYPE_CHECKING:
    from ..wire.stats import FlowStats, WorkerStats

__all__ = ["as_json", "watch"]

ANSWER_SECONDS = 0.5
"""In these SF-LOOP answers when no long task holds it up."""

LONGEST_SECONDS = 60.0
"""In these it answers even so, or a script is told that it does not."""


class _Usage:
    """What the processes of a flow take, since the last time that it was asked."""

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}  # by pid; psutil counts from one call to the next

    def of(self, coordinator: int, workers: tuple[WorkerStats, ...]) -> dict[int, Usage]:
        """By pid; a process that cannot be seen is left out."""
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
    with closing(Looks(name)) as looks:
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


def _print_lines(looks: Looks, interval: float, once: bool) -> None:
    before = looks.next(LONGEST_SECONDS)
    if before is None:
        raise StrictFlowError("SF-LOOP has not answered for a minute: a P1 task runs all the time", flow=looks.name)
    while True:
        time.sleep(interval)
        look = looks.next(LONGEST_SECONDS)
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

    def __init__(self, looks: Looks, console: Console, is_live: bool) -> None:
        self._looks = looks
        self._usage = _Usage()
        self._console = console
        self._is_live = is_live
        self._before: Look | None = None  # what happened since is shown; None until SF-LOOP has answered once

    def first(self) -> RenderableType | None:
        """Look for the first time: nothing has happened since, so there is only something to show if nobody answers."""
        # When nobody serves the flow, it is attaching that fails, and says so.
        self._before = look = self._looks.next(ANSWER_SECONDS if self._looks.is_served else LONGEST_SECONDS)
        if look is None:
            return self._dark()
        self._usage.of(look.stats.coordinator_pid, look.stats.workers)
        return None

    def next(self) -> RenderableType:
        """What has happened since the last look."""
        look, before = self._looks.next(ANSWER_SECONDS), self._before
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
