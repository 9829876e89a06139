"""The supervisor: a thread of the owner that sleeps until the coordinator ends, and has the next one started.

It stands aside while the process forks, so that no fork finds it at work.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol

from ..errors import ProtocolError
from ..memory import succession
from ..memory.segment import PREFIX, W_EPOCH, W_VERSION, Segment
from ..system import forks
from ..system.launch import Child, wait_for_end

if TYPE_CHECKING:
    from ..system.place import Place

__all__ = ["Supervisor", "owns", "segment_of"]

AT_ONCE_SECONDS = 1.0
"""A coordinator that lived no longer than these, and finished nothing, has failed at once."""
MAX_FAILURES = 10
"""How often in a row it may fail at once before the owner gives up."""
COORDINATOR_PAUSE_SECONDS = 0.05
"""Seconds before it is tried again when it has failed at once twice; doubled each time."""


class Supervised(Protocol):
    """What it needs of the owner."""

    place: Place

    @property
    def child(self) -> Child:
        """The coordinator that was started last."""

    def replace(self, pause: float, has_left: bool) -> bool:
        """Start the next one, after a pause in seconds or because this one has left for that; whether there is one."""

    def give_up(self, why: str) -> None:
        """Start no other one, and tell everybody."""


class Supervisor:
    """The thread that waits for the coordinator's end, and starts the next one."""

    def __init__(self, owner: Supervised) -> None:
        self._owner = owner
        # Looked into for nothing but whether a coordinator has done anything; all of them work in this one.
        self.segment = segment_of(owner.place)
        # A byte in this pipe ends the thread, also one that has not begun to wait. Both are -1 when it is closed.
        self._wakeup, self._wake = os.pipe()
        self._thread: threading.Thread | None = None  # None before `start`, and while the process forks
        # False for good: the flow was stopped or given up, or this is a forked child.
        self.is_watching = True
        self._failures = 0  # in a row: how often the coordinator has failed at once
        _watchers.add(self)

    def start(self) -> None:
        """Begin to watch, or go on after a fork."""
        # Two threads may fork at a time: the first to come here has started it for both.
        if self.is_watching and self._thread is None:
            thread = threading.Thread(target=self._run, name="strictflow-owner", daemon=True)
            thread.start()
            self._thread = thread  # not before: one that could not be started is not waited for

    def stand_aside(self) -> None:
        """End the thread for a moment. One that is starting a coordinator is left alone."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            os.write(self._wake, b"\0")
            thread.join()

    def end(self) -> None:
        """Watch no more."""
        self.is_watching = False
        self.stand_aside()
        self.forget()

    def forget(self) -> None:
        """Close the pipe; in a forked child, all there is to do."""
        self.is_watching = False
        _watchers.discard(self)
        if self.segment is not None:
            self.segment.close()
            self.segment = None
        if self._wake >= 0:
            os.close(self._wake)
            os.close(self._wakeup)
            self._wake = self._wakeup = -1

    def watches(self, place: Place) -> bool:
        """Whether it is the coordinator of that place."""
        return self._owner.place.directory == place.directory

    def _work_done(self) -> int:
        """Grows with each commit and each P1 task, but not with what merely moves EPOCH, by one for a version."""
        if self.segment is None:
            return 0
        words, first = self.segment.words, self.segment.finished
        finished = sum(words[first : first + self.segment.slots].tolist())
        return int(words[W_VERSION] - words[W_EPOCH] + finished)

    def _run(self) -> None:
        owner = self._owner
        while True:
            began, before = time.monotonic(), self._work_done()
            child = owner.child
            if not wait_for_end([child], self._wakeup):
                os.read(self._wakeup, 64)
                return
            has_left = self.segment is not None and succession.has_left(self.segment)
            failed_at_once = not has_left and time.monotonic() - began < AT_ONCE_SECONDS and self._work_done() <= before
            self._failures = self._failures + 1 if failed_at_once else 0
            if self._failures >= MAX_FAILURES:
                self.is_watching = False
                owner.give_up(f"failed {MAX_FAILURES} times in a row")
                return
            pause = COORDINATOR_PAUSE_SECONDS * 2**self._failures if self._failures > 1 else 0.0
            if not owner.replace(pause, has_left):
                self.is_watching = False
                return


def segment_of(place: Place) -> Segment | None:
    """The shared memory of whatever flow is there; None when there is none, or it is of another version."""
    resident = place.resident()
    try:
        return Segment.open(PREFIX + resident.token) if resident is not None else None
    except (FileNotFoundError, ProtocolError):
        return None  # it has ended already


_watchers: weakref.WeakSet[Supervisor] = weakref.WeakSet()


def owns(place: Place) -> bool:
    """Whether this program owns the flow of a place."""
    return any(watcher.is_watching and watcher.watches(place) for watcher in list(_watchers))


def _before_fork() -> None:
    forks.catch_up()  # the watchers are our parent's, and so are the pipes by which they are woken
    for watcher in list(_watchers):
        watcher.stand_aside()


def _after_fork_in_parent() -> None:
    for watcher in list(_watchers):
        watcher.start()


def _after_fork_in_child() -> None:
    for watcher in list(_watchers):
        watcher.forget()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
forks.in_child(_after_fork_in_child)
