"""A turn: what one thread at a time may do, taken and left without a lock.

A signal handler may raise between any two bytecodes, also between taking a lock and the ``try`` that gives it back;
then the lock is held by nobody, for good. A turn is a dict entry with the thread's number: taking it is one C call
(``setdefault``), and a thread that was thrown out and comes back finds that it has the turn still. If it does not come
back, another thread that waits sees from its stack that it has left (`revoke`).
"""

from __future__ import annotations

import sys
import threading
from types import CodeType

__all__ = ["Turn"]

_HOLDER = "holder"


class Turn:
    """One thread's turn at a time.

    Args:
        inside: the functions in which a thread that has the turn is, all the time.
    """

    def __init__(self, *inside: CodeType) -> None:
        self._inside = frozenset(inside)
        self._holder: dict[str, int] = {}

    def take(self) -> bool:
        """Take it, or have it still; False when another thread has it."""
        me = threading.get_ident()
        return self._holder.setdefault(_HOLDER, me) == me

    def is_mine(self) -> bool:
        """Whether the calling thread has it."""
        return self._holder.get(_HOLDER) == threading.get_ident()

    def leave(self) -> None:
        """Give it back."""
        self._holder.pop(_HOLDER, None)

    def revoke(self) -> None:
        """Take it from a thread that has left without giving it back."""
        holder = self._holder.get(_HOLDER)
        if holder is None:
            return
        frame = sys._current_frames().get(holder)
        while frame is not None:
            if frame.f_code in self._inside:
                return
            frame = frame.f_back
        self._holder.pop(_HOLDER, None)

    def __repr__(self) -> str:
        return f"<Turn of {self._holder.get(_HOLDER, 'nobody')}>"
