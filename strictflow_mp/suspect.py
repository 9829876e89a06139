"""The suspect: the task that runs at this moment, written down where a crash leaves it to be read.

Owns: the words SUSPECT and DEADLINE.
Written by: the coordinator: SUSPECT ahead of each task and 0 behind it, DEADLINE around a task that has a time limit.
Read by: the next coordinator when it takes over; `glance`, to tell people whose task runs.
If we die here: that is the point. A task that was running is not tried again: it may be what killed us. It
    cannot be committed: the store of 0 comes ahead of the commit (both are ours, so their order is the program's).

SUSPECT holds the slot (15 bits) and the task's seq (48 bits); its highest bit says that it is a function being
loaded, and the rest its number.
"""

from __future__ import annotations

import time
import types
from collections.abc import Coroutine, Generator
from typing import Any, NamedTuple

from .segment import W_DEADLINE, W_SUSPECT, Segment

__all__ = ["Marker", "Suspect", "loading_seq", "suspect_of"]

SLOT_SHIFT = 48
LOADING = 1 << 63
_SEQ = (1 << SLOT_SHIFT) - 1


class Suspect(NamedTuple):
    """What a coordinator is doing, or was when it died."""

    slot: int
    seq: int
    is_loading: bool
    is_overdue: bool


def loading_seq(number: int) -> int:
    """The seq of the receipt that says that loading function *number* was fatal. No task has one like it."""
    return 1 << 62 | number


def suspect_of(segment: Segment) -> Suspect | None:
    """What the coordinator of a segment is or was doing; None when that is no task of another process."""
    word, deadline = segment.words[W_SUSPECT], segment.words[W_DEADLINE]
    slot = (word & ~LOADING) >> SLOT_SHIFT
    if not 0 < slot < segment.slots:
        return None
    overdue = 0 < deadline <= time.monotonic_ns()
    return Suspect(slot, word & _SEQ, bool(word & LOADING), overdue)


class Marker:
    """Writes down what runs."""

    def __init__(self, segment: Segment) -> None:
        self._words = segment.words
        self.clear()
        self.unlimit()

    def mark(self, slot: int, seq: int) -> None:
        """A task begins."""
        self._words[W_SUSPECT] = slot << SLOT_SHIFT | seq

    def mark_loading(self, slot: int, number: int) -> None:
        """A function is about to be loaded."""
        self._words[W_SUSPECT] = LOADING | slot << SLOT_SHIFT | number

    def limit(self, seconds: float) -> None:
        """The task that runs must have ended by then."""
        self._words[W_DEADLINE] = time.monotonic_ns() + int(seconds * 1e9)

    def unlimit(self) -> None:
        """It has ended in time."""
        self._words[W_DEADLINE] = 0

    def clear(self) -> None:
        """It has ended."""
        self._words[W_SUSPECT] = 0

    @types.coroutine
    def marked(self, coroutine: Coroutine[Any, Any, Any], slot: int, seq: int) -> Generator[Any, Any, Any]:
        """A coroutine that is marked whenever it runs, and not while it waits."""
        sent: Any = None
        error: BaseException | None = None
        while True:
            self.mark(slot, seq)
            try:
                yielded = coroutine.send(sent) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            finally:
                self.clear()
            error = None
            try:
                sent = yield yielded
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as thrown:
                error = thrown

    def __repr__(self) -> str:
        try:
            word = self._words[W_SUSPECT]
        except ValueError:
            return "<Marker in a segment that is closed>"
        return f"<Marker: {f'slot {word >> SLOT_SHIFT & 0x7FFF}' if word else 'nothing'}>"
