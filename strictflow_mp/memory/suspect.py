"""The suspect: the task that runs at this moment, written down where a crash leaves it to be read.

Owns: the words SUSPECT and DEADLINE.
Written by: the coordinator: SUSPECT before each task and 0 after it, DEADLINE around a task that has a time limit.
Read by: the next coordinator when it takes over; `tools.glance`, to tell people whose task runs.
Order: the mark, the task, 0, and only then the commit that has its effect. All four are the coordinator's own steps, so
    no fence stands between them: the next coordinator begins when this one is dead, and finds them in that order.
If we die here: that is the point. A task that was running is not tried again: it may be what killed us. It
    cannot be committed, since 0 is stored before the commit.
    A child that a task has forked stores nothing here: whatever would be stored ends it.
Invariants: while SUSPECT is 0 no task's function runs and none is loaded. DEADLINE is 0 whenever a task begins that has
    no time limit.

SUSPECT holds the slot (15 bits) and the task's seq (48 bits); its highest bit says that it is a function being
loaded, and the rest its number.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import os
import time
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..system.forks import new_mark
from .segment import W_DEADLINE, W_SUSPECT, Segment

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator

__all__ = ["Marker", "Suspect", "loading_seq", "suspect_of"]

SLOT_SHIFT = 48
"""Bits of SUSPECT for the seq; the slot lies above them."""
LOADING_BIT = 1 << 63
"""Set in SUSPECT when what runs is the loading of a function."""
_SEQ_MASK = (1 << SLOT_SHIFT) - 1


def _end() -> None:
    os._exit(1)


class Suspect(NamedTuple):
    """What a coordinator is doing, or was when it died."""

    slot: int
    """Whose task it is: never 0."""
    seq: int
    """The task's; while a function is loaded, that function's number."""
    is_loading: bool
    """Whether a function is being loaded."""
    is_overdue: bool
    """Whether its DEADLINE has passed."""


def loading_seq(number: int) -> int:
    """The seq of the receipt that says that loading function *number* was fatal. No task has one like it."""
    return 1 << 62 | number


def suspect_of(segment: Segment) -> Suspect | None:
    """What the coordinator of a segment is or was doing; None when that is no task of another process."""
    word, deadline = segment.words[W_SUSPECT], segment.words[W_DEADLINE]
    slot = (word & ~LOADING_BIT) >> SLOT_SHIFT
    if not 0 < slot < segment.slots:
        return None
    overdue = 0 < deadline <= time.monotonic_ns()
    return Suspect(slot, word & _SEQ_MASK, bool(word & LOADING_BIT), overdue)


class Marker:
    """Writes down what runs.

    Args:
        end_child: called in a child that a task has forked, when it comes back from the task; does not return.

    Attributes:
        home: its element is 1 in the process that made this, and 0 for good in all that it forks.
    """

    def __init__(self, segment: Segment, end_child: Callable[[], object] = _end) -> None:
        self._words = segment.words  # of which this stores SUSPECT and DEADLINE, and nobody else does
        self.home = new_mark()
        self._end_child = end_child

    def reset(self) -> None:
        """Nothing runs: what a dead coordinator was doing has been judged (`takeover`)."""
        self.clear()
        self.unlimit()

    def mark(self, slot: int, seq: int) -> None:
        """A task begins."""
        if not self.home[0]:
            self._end_child()
        self._words[W_SUSPECT] = slot << SLOT_SHIFT | seq

    def mark_loading(self, slot: int, number: int) -> None:
        """A function is about to be loaded."""
        if not self.home[0]:
            self._end_child()
        self._words[W_SUSPECT] = LOADING_BIT | slot << SLOT_SHIFT | number

    def limit(self, seconds: float) -> None:
        """The task that runs must have ended by then."""
        self._words[W_DEADLINE] = time.monotonic_ns() + int(seconds * 1e9)

    def unlimit(self) -> None:
        """It has ended in time."""
        if not self.home[0]:
            self._end_child()
        self._words[W_DEADLINE] = 0

    def clear(self) -> None:
        """It has ended."""
        if not self.home[0]:
            self._end_child()
        self._words[W_SUSPECT] = 0

    @contextmanager
    def marking(self, slot: int, seq: int) -> Iterator[None]:
        """A task is marked in here, whatever was before; after it that is marked again."""
        former = self._words[W_SUSPECT]
        self.mark(slot, seq)
        try:
            yield
        finally:
            self.stay()
            self._words[W_SUSPECT] = former

    def marked(self, coroutine: Coroutine[Any, Any, Any], slot: int, seq: int) -> Awaitable[Any]:
        """A coroutine that is marked whenever it runs, and not while it waits."""
        return _in_steps(coroutine, lambda: self.mark(slot, seq), self.clear)

    def kept(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        """A coroutine that is marked from its beginning to its end: it merely looks after each step whether to stay."""
        return _in_steps(coroutine, self.stay, self.stay)

    def staying(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A call that looks at its end whether to stay."""

        def calls() -> Any:
            try:
                return call()
            finally:
                self.stay()

        return calls

    def stay(self) -> None:
        """End here, if this is a child that comes back from a task."""
        if not self.home[0]:
            self._end_child()

    def __repr__(self) -> str:
        try:
            word = self._words[W_SUSPECT]
        except ValueError:
            return "<Marker in a segment that is closed>"
        return f"<Marker: {f'slot {word >> SLOT_SHIFT & 0x7FFF}' if word else 'nothing'}>"


@types.coroutine
def _in_steps(
    coroutine: Coroutine[Any, Any, Any], before: Callable[[], None], after: Callable[[], None]
) -> Generator[Any, Any, Any]:
    """A coroutine, with something to be done before and after each of its steps."""
    sent: Any = None
    error: BaseException | None = None
    while True:
        before()
        try:
            yielded = coroutine.send(sent) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            return stop.value
        finally:
            after()
        error = None
        try:
            sent = yield yielded
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as thrown:
            error = thrown
