"""A turn: what one thread at a time may do, taken and left without a lock.

A signal handler may raise between any two bytecodes, also between taking a lock and the ``try`` that gives it back;
then the lock is held by nobody, for good. A turn is a dict entry with a taking in it: to take the turn is one C call
(``setdefault``), and to close a taking, which ends it, is another. Of all who would close one it is closed by the
first, so that whoever has looked at a taking that has ended meanwhile does nothing to the next.

A thread that was thrown out and comes back finds its taking, and changes it for a new one. If it does not come back,
another thread that waits sees from its stack that it has left (`revoke`).

Without the GIL nobody can look at the stack of a thread that runs. There the turn is left in a ``finally``, by one call
of C that was made ready before (`leaver`). In CPython 3.13, and there is no such interpreter before it, signal handlers
come in behind a call, at the start of a function and where a loop goes back: so none can come in ahead of that.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from itertools import islice, starmap
from operator import eq, itemgetter
from typing import TYPE_CHECKING

from ..system.machine import FREE_THREADED
from ..system.unbroken import unbroken

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

__all__ = ["Turn"]

_HOLDER = "holder"

_Taking = tuple[int, list[str]]
"""The number of a thread, and the key of its entry: whoever removes that closes the taking."""


class Turn:
    """One thread's turn at a time.

    Args:
        inside: the functions in which a thread that has the turn is, all the time.
    """

    def __init__(self, *inside: CodeType) -> None:
        self._inside = frozenset(inside)
        # Empty, or under `_HOLDER` the taking of the thread that has the turn; it still has its key. That thread is
        # inside one of `_inside`, unless an exception has thrown it out; only then may another one close it.
        self._holder: dict[str, _Taking] = {}

    def take(self) -> bool:
        """Take it, or have it still; False when another thread has it."""
        me = threading.get_ident()
        mine = me, [_HOLDER]
        holder = self._holder.setdefault(_HOLDER, mine)
        if holder is mine:
            return True
        if holder[0] != me:
            return False
        # An exception has thrown us out. Somebody may have seen that and be about to close that taking.
        try:
            next(map(self._holder.__setitem__, map(list.pop, (holder[1],)), (mine,)))
        except IndexError:
            return self.take()
        return True

    def is_nested(self) -> bool:
        """Whether the calling function, one of *inside*, was called in the middle of another one that has the turn."""
        if not self.is_mine():
            return False
        # Unless an exception has thrown that out: then the caller has the turn for itself.
        return self._is_inside(sys._getframe(1).f_back)

    def is_mine(self) -> bool:
        """Whether the calling thread has it."""
        return self._thread() == threading.get_ident()

    def leave(self) -> None:
        """Give it back, if the calling thread has it."""
        holder = self._holder.get(_HOLDER)
        if holder is not None and holder[0] == threading.get_ident():
            self._close(holder)

    def leaver(self) -> Callable[[], object]:
        """As `leave`, without the GIL: for one ``finally``, to be called once, in the thread that has asked for it."""
        holder, me = self._holder, threading.get_ident()
        # The thread that has it, if anybody has; nobody is looked for before `next` runs.
        thread = map(itemgetter(0), islice(iter(partial(holder.get, _HOLDER), None), 1))
        return partial(next, map(partial(holder.pop, _HOLDER), filter(partial(eq, me), thread)), None)

    def _close(self, taking: _Taking) -> None:
        try:
            next(map(self._holder.__delitem__, map(list.pop, (taking[1],))))
        except IndexError:
            pass  # it has ended

    def _thread(self) -> int | None:
        holder = self._holder.get(_HOLDER)
        return holder and holder[0]

    def revoke(self) -> None:
        """Take it from a thread that has left without giving it back."""
        holder = self._holder.get(_HOLDER)
        if holder is None:
            return
        # Unbroken: CPython holds a lock of its own meanwhile. A finalizer in the middle of that lets other threads run,
        # and one that asks the same waits for it with the GIL.
        frames = unbroken(starmap(sys._current_frames, ((),)))
        if FREE_THREADED:
            if holder[0] not in frames:
                self._close(holder)  # its thread has ended
            return
        if threading.get_ident() not in frames:
            # We are a greenlet, and of others that sleep nothing can be seen. Nothing is thrown out of one but where it
            # waits, and there it leaves the turn.
            return
        if not self._is_inside(frames.get(holder[0])):  # None when the thread has ended
            self._close(holder)

    def _is_inside(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code in self._inside:
                return True
            frame = frame.f_back
        return False

    def __repr__(self) -> str:
        return f"<Turn of {self._thread() or 'nobody'}>"
