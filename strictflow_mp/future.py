"""Futures of tasks: `concurrent.futures.Future` that can be awaited, and that need no thread of their own.

The thread that waits for an answer reads it from the pipe itself. Only when somebody asks in a way that
cannot read (a callback, `concurrent.futures.wait`, `await`) a background reader is started, once.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

__all__ = ["Port", "TaskFuture"]

T = TypeVar("T")


class Port(Protocol):
    """What brings the answer of a future."""

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Read answers until the future is done, or *timeout* seconds have passed."""

    def serve(self) -> None:
        """From now on answers arrive without anybody waiting."""

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Ask for the task to be taken back; whether it was (if *wait*)."""


class TaskFuture(Future[T]):
    """The result of a task, when it is there.

    A `concurrent.futures.Future`: works with `concurrent.futures.wait` and `as_completed`. Awaitable.
    ``cancel()`` succeeds until the task starts.
    """

    def __init__(self, port: Port, number: int, label: str) -> None:
        super().__init__()
        self._port = port
        self.number = number
        self.has_waiters = False
        self.runner: object = None  # keeps alive what settles it
        self.label = label
        self.frame = b""
        """What was sent, as long as it may have to be sent again."""

    # concurrent.futures.wait() and as_completed() hang their waiters into this list: the sign that somebody
    # waits without calling us.

    @property
    def _waiters(self) -> list[Any]:
        if not self.done_now():
            self._port.serve()
        return self._listeners

    @_waiters.setter
    def _waiters(self, value: list[Any]) -> None:
        self._listeners = value

    def done_now(self) -> bool:
        """Whether the answer has been read, without looking for it."""
        return self._state in ("FINISHED", "CANCELLED_AND_NOTIFIED", "CANCELLED")

    def done(self) -> bool:
        """Whether the task has ended."""
        if not self.done_now():
            self._port.wait(self, 0)
        return self.done_now()

    def result(self, timeout: float | None = None) -> T:
        """What the task returned.

        Args:
            timeout: seconds to wait.

        Raises:
            TimeoutError: it has not ended yet.
            concurrent.futures.CancelledError: it was cancelled.
            Exception: what the task raised, with the remote traceback as its cause.
        """
        if not self.done_now():
            self._port.wait(self, timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the task raised, or None. Raises as `result` does when it has not ended or was cancelled."""
        if not self.done_now():
            self._port.wait(self, timeout)
        return super().exception(0)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call ``fn(self)`` when the task has ended."""
        super().add_done_callback(fn)
        if not self.done_now():
            self._port.serve()

    def cancel(self) -> bool:
        """Take the task back if it has not started; whether that succeeded. Asks SF-LOOP, and waits for it."""
        if self.done_now():
            return self.cancelled()
        return self._port.cancel(self, wait=True)

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio  # it takes 16 ms; here it is loaded already, for somebody awaits us

        if not self.done():
            loop = asyncio.get_running_loop()
            arrived: asyncio.Future[None] = loop.create_future()

            def wake() -> None:
                if not arrived.done():
                    arrived.set_result(None)

            def tell(_: Future[T]) -> None:
                try:
                    loop.call_soon_threadsafe(wake)
                except RuntimeError:
                    pass  # the loop was closed; nobody waits any more

            self.add_done_callback(tell)
            try:
                yield from arrived
            except asyncio.CancelledError:
                self._port.cancel(self, wait=False)
                raise
        try:
            return super().result(0)
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError from None

    # For the port

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Record the answer. The base class would ask `_waiters`, which means something else here."""
        with self._condition:
            if self.done_now():
                return
            self._result = value
            self._exception = error
            self._state = "FINISHED"
            for waiter in self._listeners:
                if error is None:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]

    def settle_cancelled(self) -> None:
        """Record that the task was taken back."""
        with self._condition:
            if self.done_now():
                return
            self._state = "CANCELLED_AND_NOTIFIED"
            for waiter in self._listeners:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]

    def wait_here(self, seconds: float) -> None:
        """Sleep until somebody records the answer or calls `nudge`."""
        with self._condition:
            if not self.done_now():
                self.has_waiters = True
                self._condition.wait(seconds)

    def nudge(self) -> None:
        """Let a thread in `wait_here` look again."""
        with self._condition:
            self._condition.notify_all()

    def __repr__(self) -> str:
        state = "done" if self.done_now() else "pending"
        return f"<TaskFuture {self.label} #{self.number} {state}>"
