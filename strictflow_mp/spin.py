"""Spinning: look for a while before sleeping, for what is waited for often comes sooner than an idle core wakes.

It pays only where a core is idle. So each time it gives way, and measures how long that took: when others wanted the
core, sleeping is better, since a wake-up takes the core back at once and a yield does not. Then nobody in this process
spins for a while, and for twice as long each time that others want it again: one hiccup of the machine costs little,
and on a crowded one hardly anybody spins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from os import sched_yield
from time import perf_counter
from typing import TypeVar

__all__ = ["look_for"]

SPIN = 50e-6
"""Seconds that it lasts at most: about as long as an idle core takes to wake."""
SHARED = 60e-6
"""Seconds after which, when giving way took that long, somebody else has had our core."""
CROWDED = 250e-6
"""Seconds after which it was more than who answers us: less than the slice that one gets who computes. Where there is
another core, who shares ours is moved there soon, if both of us stay awake."""
QUIET = 0.005
"""Seconds without spinning after that: the system has moved a process to an idle core by then, if there is one."""
LONGEST = 0.08
"""Seconds without spinning at most."""

T = TypeVar("T")

_quiet_until = 0.0
_quiet = QUIET


def _has_one_core() -> bool:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0)) == 1
    return os.cpu_count() == 1


def look_for(look: Callable[[], T], nothing: T) -> T:
    """What *look* returns, when that is something true within `SPIN` seconds; else *nothing*."""
    global _quiet, _quiet_until
    now = perf_counter()
    if now < _quiet_until:
        return nothing
    end = now + SPIN
    while now < end:
        sched_yield()
        found = look()
        before, now = now, perf_counter()
        if now - before > CROWDED or (now - before > SHARED and _has_one_core()):
            again = now < _quiet_until + _quiet
            _quiet = min(2 * _quiet, LONGEST) if again else QUIET
            _quiet_until = now + _quiet
        if found:
            return found
    return nothing
