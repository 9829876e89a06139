"""Unbroken: one call of C, in the middle of which nothing of Python runs.

A signal handler comes in between two bytecodes, never in the middle of one call of C. Before Python 3.12 a collection
of garbage may, wherever that call makes a container (a slice, a view); and a collection runs finalizers, which may do
anything: so it is held off there.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

from .forks import in_child

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["unbroken"]

# No lock: a finalizer may run up to where the collector is off, and need what a thread has that waits for the lock.

_inside: list[None] = []
"""One for each call that is under way."""
_was_on = False
"""Whether the last of them turns the collector on again: not when the user has turned it off."""


def _without_collector(steps: Iterator[Any]) -> Any:
    global _was_on
    try:
        _inside.append(None)
        if gc.isenabled():
            _was_on = True
            gc.disable()
        return next(steps)
    finally:
        if _inside:
            _inside.pop()
        if not _inside and _was_on:
            # In this order: who comes in between finds it off, and leaves that to us; who comes later turns it off.
            _was_on = False
            gc.enable()


def _forget_others() -> None:
    global _was_on
    _inside.clear()
    if _was_on:
        _was_on = False
        gc.enable()


in_child(_forget_others)

unbroken = next if sys.version_info >= (3, 12) else _without_collector
"""As `next` of an iterator that is made of `map` and of functions in C."""
