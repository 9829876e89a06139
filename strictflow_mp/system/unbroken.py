"""Unbroken: one call of C, in the middle of which nothing of Python runs.

A signal handler comes in between two bytecodes, never in the middle of one call of C. Before Python 3.12 a collection
of garbage may, wherever that call makes a container (a slice, a view); and a collection runs finalizers, which may do
anything: so it is held off there. Where CPython holds a lock of its own (`sys._current_frames`), a finalizer in which
another thread gets the GIL, and asks the same, ends everything.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from itertools import filterfalse, starmap
from typing import TYPE_CHECKING, Any

from .forks import in_child

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["unbroken"]

# No lock: a finalizer may run up to where the collector is off, and need what a thread has that waits for the lock.

_inside: dict[object, None] = {}
"""The steps of each call that is under way. While there are any, the collector is off; but for an instant after they
have been put here, and before they are taken."""
_turned_off: deque[tuple[()]] = deque(maxlen=1)
"""Holds what `gc.enable` takes, when it is for us to turn it on again: not when the user had turned it off."""
_ALL = (_inside,)


def _without_collector(steps: Iterator[Any]) -> Any:
    try:
        _inside[steps] = None  # from here on nobody turns it on
        if gc.isenabled():
            _turned_off.append(())
            gc.disable()
        return next(steps)
    finally:
        _inside.pop(steps, None)
        # If nobody is inside. In one C call: a thread that came in between the look and that would find it off, and be
        # inside when it goes on.
        try:
            next(starmap(gc.enable, starmap(_turned_off.pop, filterfalse(None, _ALL))), None)
        except IndexError:
            pass  # it is not for us


def _forget_others() -> None:
    _inside.clear()
    if _turned_off:
        _turned_off.clear()
        gc.enable()


in_child(_forget_others)

unbroken = next if sys.version_info >= (3, 12) else _without_collector
"""As `next` of an iterator that is made of `map` and of functions in C."""
