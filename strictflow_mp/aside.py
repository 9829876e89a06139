"""Threads in which the event loops of this process let others wait at the gate.

Not a loop's own executor: a few snapshots that wait for one long P1 would keep all its threads, and what else the
application does there (names that are looked up, files that are read) would wait for that P1 too.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

__all__ = ["waiting_room"]

THREADS = 4
"""All wait for the same gate, so more of them would see no earlier that it has opened."""

_room: ThreadPoolExecutor | None = None


def waiting_room() -> ThreadPoolExecutor:
    """The executor, made when it is first needed."""
    global _room
    room = _room
    if room is None:
        room = _room = ThreadPoolExecutor(THREADS, thread_name_prefix="strictflow-gate")
    return room


def _forget() -> None:
    global _room
    _room = None  # its threads are our parent's


os.register_at_fork(after_in_child=_forget)
