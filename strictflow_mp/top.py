"""`strictflow-mp top`: looks at a flow again and again, and shows what has happened meanwhile."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import asdict, replace
from threading import Thread
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.live import Live

from .errors import StrictFlowError
from .flow import StrictFlow
from .rates import Rates, rates
from .screen import Usage, screen
from .stats import FlowStats

__all__ = ["as_json", "watch"]


class Look(NamedTuple):
    """What was seen, and when."""

    stats: FlowStats
    at: float


class _Looks:
    """Looks at a flow, without what this process adds to it. One that is not answered in time stays under way."""

    def __init__(self, flow: StrictFlow) -> None:
        self._flow = flow
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
            stats, at = self._flow.stats(), time.monotonic()
            others = tuple(worker for worker in stats.workers if worker.pid != os.getpid())
            asked.set_result(Look(replace(stats, workers=others), at))
        except BaseException as error:
            asked.set_exception(error)

    @property
    def silence(self) -> float:
        """Seconds since somebody has asked and has no answer."""
        return time.monotonic() - self._since if self._asked is not None else 0.0


class _Usage:
    """What the processes of a flow take, since the last time that it was asked."""

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}

    def of(self, stats: FlowStats) -> dict[int, Usage]:
        """By pid; who cannot be seen is left out."""
        pids = [stats.coordinator_pid, *(worker.pid for worker in stats.workers)]
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


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits for a key for some seconds; "" when none was pressed, or there is no keyboard."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:

        def wait(seconds: float) -> str:
            return sys.stdin.read(1) if select.select([descriptor], [], [], seconds)[0] else ""

        yield wait
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def watch(flow: StrictFlow, *, interval: float, once: bool, json_lines: bool) -> None:
    """Show the flow until it ends, or somebody presses q.

    Args:
        interval: seconds between two looks.
        once: look twice, show what happened in between, and return.
        json_lines: print a line of JSON for each look, and no screen.

    Raises:
        StrictFlowError: the flow is not there, or has ended.
    """
    looks, usage = _Looks(flow), _Usage()
    console = Console(width=None if sys.stdout.isatty() else 120)
    is_live = not (once or json_lines) and console.is_terminal

    def first() -> Look:
        look = looks.next(60.0)
        if look is None:
            raise StrictFlowError("SF-LOOP has not answered for a minute: a P1 task runs all the time", flow=flow.name)
        usage.of(look.stats)
        return look

    def show(print_out: Callable[[Any], object], wait: Callable[[float], str]) -> None:
        before = now = first()
        while wait(interval) not in ("q", "Q"):
            look = looks.next(interval)
            note = "" if look else f"SF-LOOP has not answered for {looks.silence:.0f} s: a long P1 task?"
            if look:
                before, now = now, look
            happened = rates(before.stats, now.stats, now.at - before.at)
            if not json_lines:
                print_out(screen(now.stats, happened, usage.of(now.stats), note))
            elif look:
                print(as_json(now.stats, happened), flush=True)
            if once and look:
                return

    if not is_live:
        show(console.print, _no_key)
        return
    with _keys() as wait, Live(console=console, screen=True, auto_refresh=False) as live:
        show(lambda what: live.update(what, refresh=True), wait)
