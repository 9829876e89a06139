"""The waiting room: threads in which the event loops of this process let a function wait at the gate.

Owns: one executor for each process, made when it is first needed. Nothing of it is shared with other processes.
Invariants: what waits here waits for the gate and for nothing else, so a thread that is busy is free again when the
    gate opens. A forked child never uses its parent's threads.

Not a loop's own executor: a few snapshots that wait for one long P1 would keep all its threads, and what else the
application does there (names that are looked up, files that are read) would wait for that P1 too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ..system.forks import in_child

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["dismiss", "wait_in_thread"]

R = TypeVar("R")

WAITING_THREADS = 4
"""All wait for the same gate, so more of them would see no earlier that it has opened."""

_room: ThreadPoolExecutor | None = None
"""None until somebody waits, after `dismiss`, and in a forked child."""


def wait_in_thread(loop: asyncio.AbstractEventLoop, function: Callable[[], R]) -> asyncio.Future[R]:
    """Call a function that waits at the gate in a thread; the loop goes on meanwhile."""
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

        room = _room = ThreadPoolExecutor(WAITING_THREADS, thread_name_prefix="strictflow-gate")
    return room


def dismiss() -> None:
    """Let the threads end that nobody needs: a flow was closed, and a fork with threads is a warning from 3.12 on.

    A wait that is under way, for another flow, goes on; the next one is given new threads.
    """
    global _room
    room, _room = _room, None
    if room is not None:
        room.shutdown(wait=False)


def _forget() -> None:
    global _room
    _room = None  # its threads are our parent's


in_child(_forget)
