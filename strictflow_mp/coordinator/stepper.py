"""The stepper: an asyncio loop that SF-LOOP lets run a little at a time, in its own thread.

Async P2 tasks live on it. It runs while no P1 waits, and stops as soon as one of the coordinator's
descriptors is readable: an epoll descriptor is readable itself when something that it watches is. So a P1
pauses the tasks at their next await, and many of them overlap.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..wire.failures import let_go_of_frames, words_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

__all__ = ["Stepper", "let_go", "run_alone", "within_time"]

CLEAN_UP_SECONDS = 1.0
"""Seconds that a cancelled task may take to clean up before nobody waits for it any more."""


class Stepper:
    """Runs coroutines in steps. Everything happens in the thread that calls `run`."""

    def __init__(self, watched: int) -> None:
        # Runs only inside `run`; between its steps nothing on it moves.
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_log)
        self._watched = watched
        self._loop.add_reader(watched, self._loop.stop)
        # From then on nothing stops it before all has been cleaned up.
        self._is_closing = False
        # Those that have not ended. asyncio itself keeps weak references only.
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, Any], done: Callable[[asyncio.Task[Any]], None]) -> Any:
        """Add a coroutine; *done* is called with its task when it has ended."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        # Before *done*, which asks whether any are left.
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)
        return task

    def run(self, wait: float) -> None:
        """Let the tasks go on until a watched descriptor is readable, or for *wait* seconds (0: one round)."""
        if wait > 0:
            timer = self._loop.call_later(wait, self._loop.stop)
            self._go()
            timer.cancel()
        else:
            self._loop.call_soon(self._loop.stop)
            self._go()

    def _go(self) -> None:
        try:
            self._loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            # asyncio lets these out of its loop, whichever callback or task of its own a P2 has left on it.
            logger.error("what an async task had started raised %s", words_of(error))

    def stop_soon(self) -> None:
        """Make `run` return after this round."""
        if not self._is_closing:
            self._loop.stop()

    def close(self) -> None:
        """Cancel what is left and close the loop."""
        self._is_closing = True
        self._loop.remove_reader(self._watched)
        self.run(0)  # a stop that was asked for meanwhile would end the next round, which is for cleaning up
        _close(self._loop)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<Stepper of {len(self._tasks)} tasks>"


def run_alone(awaitable: Awaitable[Any]) -> Any:
    """Run a P1 coroutine to its end on a loop of its own, while the async P2 tasks stand still."""

    async def alone() -> tuple[Any, BaseException | None]:
        # asyncio looks what its loop's own task has raised, with `isinstance`; that may raise, and it would not stop.
        try:
            return await awaitable, None
        except BaseException as error:
            return None, error

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_log)
    try:
        result, error = loop.run_until_complete(alone())
    finally:
        _close(loop)
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback has this frame
    return result


async def within_time(awaitable: Awaitable[Any], timeout: float | None, late: Callable[[], None]) -> tuple[bool, Any]:
    """Await; return (whether it kept *timeout* seconds, what it returned).

    Args:
        late: called when its time is up, before it is cancelled and given a moment to clean up.

    `asyncio.wait_for` would leave open whose TimeoutError it was.
    """
    if timeout is None:
        return True, await awaitable
    began = asyncio.get_running_loop().time()
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task}, timeout=timeout)
        # One that blocks the loop is done before its time is seen to be over.
        if asyncio.get_running_loop().time() - began > timeout or not task.done():
            late()
            return False, None
        return True, task.result()
    finally:
        await _end({task})


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and let them clean up for a moment. One that swallows that is left to itself."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CLEAN_UP_SECONDS)
    for task in tasks:
        if not task.done():
            logger.error("%r swallows its cancellation: nobody waits for it any more", task)
            _abandoned.add(task)
            task.add_done_callback(_abandoned.discard)
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it has just been said
        else:
            let_go(task)


def let_go(task: asyncio.Task[Any]) -> None:
    """Nobody asks how a task has ended: neither may asyncio say so, nor may it keep what it had."""
    try:
        task.result()
    except BaseException as error:
        let_go_of_frames(error)  # the loop's are among them, which hold the task


_abandoned: set[asyncio.Task[Any]] = set()
"""They may still end; until then somebody must hold them, for asyncio does not."""


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on a loop, and close it."""
    try:
        loop.run_until_complete(_end(asyncio.all_tasks(loop)))
        loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), CLEAN_UP_SECONDS))
    except (SystemExit, KeyboardInterrupt, asyncio.TimeoutError) as error:
        logger.error("what an async task had left behind raised %s", words_of(error))
    finally:
        loop.close()


def _log(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio's own handler would print the exception, which may raise anything."""
    error = context.get("exception")
    logger.error("%s: %s", context.get("message"), "" if error is None else words_of(error))
