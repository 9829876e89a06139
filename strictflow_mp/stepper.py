"""The stepper: an asyncio loop that SF-LOOP lets run a little at a time, in its own thread.

Async P2 tasks live on it. It runs while no P1 waits, and stops as soon as one of the coordinator's
descriptors is readable: an epoll descriptor is readable itself when something that it watches is. So a P1
pauses the tasks at their next await, and many of them overlap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Stepper", "run_alone", "within_time"]


class Stepper:
    """Runs coroutines in steps. Everything happens in the thread that calls `run`."""

    def __init__(self, watched: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.add_reader(watched, self._loop.stop)
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, Any], done: Callable[[asyncio.Task[Any]], None]) -> Any:
        """Add a coroutine; *done* is called with its task when it has ended."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)
        return task

    def run(self, wait: float) -> None:
        """Let the tasks go on until a watched descriptor is readable, or for *wait* seconds (0: one round)."""
        if wait > 0:
            timer = self._loop.call_later(wait, self._loop.stop)
            self._loop.run_forever()
            timer.cancel()
        else:
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()

    def stop_soon(self) -> None:
        """Make `run` return after this round."""
        self._loop.stop()

    def close(self) -> None:
        """Cancel what is left and close the loop."""
        _close(self._loop)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<Stepper of {len(self._tasks)} tasks>"


def run_alone(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a P1 coroutine to its end on a loop of its own, while the async P2 tasks stand still."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        _close(loop)


async def within_time(coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> tuple[bool, Any]:
    """Await; return (whether it kept *timeout* seconds, what it returned).

    `asyncio.wait_for` would leave open whose TimeoutError it was.
    """
    if timeout is None:
        return True, await coroutine
    began = asyncio.get_running_loop().time()
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait({task}, timeout=timeout)
        # One that blocks the loop is done before its time is seen to be over.
        late = asyncio.get_running_loop().time() - began > timeout
        if late or not task.done():
            return False, None
        return True, task.result()
    finally:
        if not task.done():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on a loop, and close it."""
    try:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
