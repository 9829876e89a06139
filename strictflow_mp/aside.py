"""Threads in which the event loops of this process let others wait at the gate.

Not a loop's own executor: a few snapshots that wait for one long P1 would keep all its threads, and what else the
application does there (names that are looked up, files that are read) would wait for that P1 too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["dismiss", "waits"]

R = TypeVar("R")

THREADS = 4
"""All wait for the same gate, so more of them would see no earlier that it has opened."""

_room: ThreadPoolExecutor | None = None


def waits(loop: asyncio.AbstractEventLoop, function: Callable[[], R]) -> asyncio.Future[R]:
    """Call a function that waits, in a thread of its own, for an event loop."""
    try:
        return loop.run_in_executor(_waiting_room(), function)
    except RuntimeError:  # dismissed at this very moment, by another thread
        return loop.run_in_executor(_waiting_room(), function)


def _waiting_room() -> ThreadPoolExecutor:
    """The executor, made when it is first needed."""
    global _room
    room = _room
    if room is None:
        from concurrent.futures import ThreadPoolExecutor  # with the module `queue`: few need it

        room = _room = ThreadPoolExecutor(THREADS, thread_name_prefix="strictflow-gate")
    return room


def dismiss() -> None:
    """Let the threads end that nobody needs: a flow was closed, and a fork with threads is a warning from 3.12 on.

    Who waits for another flow goes on; the next one who waits has new threads.
    """
    global _room
    room, _room = _room, None
    if room is not None:
        room.shutdown(wait=False)


def _forget() -> None:
    global _room
    _room = None  # its threads are our parent's


os.register_at_fork(after_in_child=_forget)
