"""Spinning: look for a while before sleeping, for what is waited for often comes sooner than an idle core wakes.

It pays only where a core is idle. So each time it gives way, and measures how long that took: when others wanted the
core, sleeping is better, since a wake-up takes the core back at once and a yield does not. Then nobody in this process
spins for a while, and for twice as long when others want it again soon: one hiccup of the machine costs little, and on
a crowded one a process gives the core away at most once in `LONGEST_QUIET_SECONDS`.

The protocol: docs/protocols/gate.md.
"""

from __future__ import annotations

import os
from os import sched_yield
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["look_for"]

SPIN_SECONDS = 50e-6
"""Seconds that it lasts at most: about as long as an idle core takes to wake."""
SHARED_SECONDS = 60e-6
"""Seconds after which, when giving way took that long, somebody else has had our core."""
CROWDED_SECONDS = 250e-6
"""Seconds after which it was somebody who computes: more than the other end needs to answer us, less than a slice. The
other end, if it is on our core, is moved to an idle one soon, as long as both stay awake."""
QUIET_SECONDS = 0.005
"""Seconds without spinning after that: the system has moved a process to an idle core by then, if there is one."""
LONGEST_QUIET_SECONDS = 0.08
"""Seconds without spinning at most."""

T = TypeVar("T")

_quiet_until = 0.0
"""Nobody in this process spins before that, by `perf_counter`. Any thread may set it."""
_quiet = QUIET_SECONDS
"""How long the last pause was: the next one is twice as long, if it comes soon."""


def _has_one_core() -> bool:
    return len(os.sched_getaffinity(0)) == 1


def look_for(look: Callable[[], T], nothing: T) -> T:
    """What *look* returns, when that is something true within `SPIN_SECONDS`; else *nothing*."""
    global _quiet, _quiet_until
    now = perf_counter()
    if now < _quiet_until:
        return nothing
    end = now + SPIN_SECONDS
    while now < end:
        sched_yield()
        found = look()
        before, now = now, perf_counter()
        taken = now - before
        # What stops several threads at a time counts once: for the others it began before the pause.
        if before >= _quiet_until and (taken > CROWDED_SECONDS or (taken > SHARED_SECONDS and _has_one_core())):
            again = before < _quiet_until + LONGEST_QUIET_SECONDS
            _quiet = min(2 * _quiet, LONGEST_QUIET_SECONDS) if again else QUIET_SECONDS
            _quiet_until = now + _quiet
        if found:
            return found
    return nothing
