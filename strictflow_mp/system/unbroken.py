"""Unbroken: one call of C, in the middle of which nothing of Python runs.

A signal handler comes in between two bytecodes, never in the middle of one call of C. Before Python 3.12 a collection
of garbage may, wherever that call makes a container (a slice, a view); and a collection runs finalizers, which may do
anything: so it is held off there.
"""

from __future__ import annotations

import gc
import sys
import threading
from typing import TYPE_CHECKING, Any

from .forks import in_child

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["unbroken"]

_off = threading.RLock()
"""Held while the collector is off: so that no other thread finds it off, and leaves it so."""


def _without_collector(steps: Iterator[Any]) -> Any:
    with _off:
        was_on = gc.isenabled()
        try:
            gc.disable()
            return next(steps)
        finally:
            if was_on:
                gc.enable()


def _renew() -> None:
    global _off
    _off = threading.RLock()


in_child(_renew)

unbroken = next if sys.version_info >= (3, 12) else _without_collector
"""As `next` of an iterator that is made of `map` and of functions in C."""
