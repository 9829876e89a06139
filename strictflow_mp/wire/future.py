"""Futures of tasks: `concurrent.futures.Future` that can be awaited, and that need no thread of their own.

The thread that waits for an answer reads it from the pipe itself. Only when somebody asks in a way that
cannot read (a callback, `concurrent.futures.wait`, `await`) a background reader is started, once.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from ..errors import StrictFlowError
from ..values.codec import unpack
from .failures import printable, unpack_failure, words_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator

__all__ = ["AnswerSource", "TaskFuture"]

# The base class's words.
_PENDING, _CANCELLED, _FINISHED = "PENDING", "CANCELLED_AND_NOTIFIED", "FINISHED"

T = TypeVar("T")


class AnswerSource(Protocol):
    """What brings the answer of a future."""

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Read answers until the future is done, or *timeout* seconds have passed."""

    def serve(self, *, is_to_sleep: bool = False) -> None:
        """From now on answers arrive without anybody waiting.

        Args:
            is_to_sleep: the calling thread is about to sleep, and not in `wait`; it may be in a callback.
        """

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Ask for the task to be taken back; whether it was (if *wait*)."""


class TaskFuture(Future[T]):
    """The result of a task, when it is there.

    A `concurrent.futures.Future`: works with `concurrent.futures.wait` and `as_completed`. Awaitable.
    ``cancel()`` succeeds until the task starts.
    """

    # One is made for each task, and most are only asked for their result. So what others need is made when they ask:
    # the condition and the list of callbacks of the base class, which take twice as long as all the rest. The class
    # holds what they are until then.
    #
    # Nothing is locked when it is settled. Whoever waits first writes that it does (`_lazy_condition`, `_callbacks`)
    # and then looks at `_state`; whoever settles it first writes `_state` and then looks for such traces. So at least
    # one of the two sees the other: `add_done_callback` and `wait_here` on one side, `_settle` on the other.

    # Written by `_settle` alone, once, and `_state` last: a thread that sees it finds the outcome.
    _state = _PENDING
    _result: Any = None
    _exception: BaseException | None = None
    # The answer as it came, until somebody asks for it: a payload, or what `unpack_failure` takes. It is opened by
    # whoever asks, in that thread: what goes wrong then, or whatever a class of the user's raises, is that future's
    # alone, and no other answer of the connection waits for it.
    _packed: bytes | tuple[str, bytes, str] | None = None
    # Made by the first that sleeps here, or that `concurrent.futures.wait` asks for; the same one from then on.
    _lazy_condition: threading.Condition | None = None
    # Those that have not been called yet: whoever takes one out calls it, so each is called once.
    _callbacks: deque[Callable[[Future[T]], object]] | None = None
    _has_told = False  # whether `_listeners` have been told; under the condition
    has_waiters = False  # whether a thread has slept here, and may have to be told to read on itself; never False again
    runner: object = None
    """Keeps alive what settles it."""
    is_task = True
    """Not so for what the library itself asks SF-LOOP, as `flow.stats` does."""
    sent: tuple[Any, ...] = ()
    """The fields of its frame, as long as it may have to be sent again."""

    def __init__(self, port: AnswerSource, seq: int, label: str) -> None:
        self._port = port
        self.seq = seq
        self.label = label

    def _made_condition(self) -> threading.Condition:
        condition = self._lazy_condition
        if condition is None:
            # One atomic step: when two threads come at a time, both get the condition of the first.
            condition = self.__dict__.setdefault("_lazy_condition", threading.Condition())
        return condition

    # concurrent.futures.wait() and as_completed() hang their waiters into this list: the sign that somebody
    # waits without calling us.

    def _heard_waiters(self) -> list[Any]:
        if not self.done_now():
            self._port.serve(is_to_sleep=True)
        return self._listeners

    # Annotated as in the base class: to a type checker as_completed() takes nothing else.
    _condition: threading.Condition = property(_made_condition)  # type: ignore[assignment]
    _waiters: list[Any] = property(_heard_waiters)  # type: ignore[assignment]

    @property
    def _listeners(self) -> list[Any]:
        listeners: list[Any] = self.__dict__.setdefault("_lazy_listeners", [])
        return listeners

    def done_now(self) -> bool:
        """Whether the answer has been read, without looking for it."""
        return self._state != _PENDING

    def done(self) -> bool:
        """Whether the task has ended."""
        if self._state == _PENDING:
            self._port.wait(self, 0)
        return self._state != _PENDING

    def running(self) -> bool:
        """Nobody knows: it runs in another process."""
        return False

    def cancelled(self) -> bool:
        """Whether it was taken back."""
        return self._state == _CANCELLED

    def result(self, timeout: float | None = None) -> T:
        """What the task returned.

        Args:
            timeout: seconds to wait.

        Raises:
            TimeoutError: it has not ended yet.
            concurrent.futures.CancelledError: it was cancelled.
            Exception: what the task raised, with the remote traceback as its cause.
        """
        if self._state == _PENDING:
            self._port.wait(self, timeout)
        if self._packed is not None:
            self._open()
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                self = None  # type: ignore[assignment]  # noqa: PLW0642  its traceback would hold it for ever
        self._check_outcome()
        return self._result  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the task raised, or None. Raises as `result` does when it has not ended or was cancelled."""
        if self._state == _PENDING:
            self._port.wait(self, timeout)
        if self._packed is not None:
            self._open()
        self._check_outcome()
        return self._exception

    def _open(self) -> None:
        """Unpack the answer. When something interrupts it, whoever asks next does it again."""
        packed = self._packed
        if packed is None:
            return  # another thread was faster
        result = exception = None
        if isinstance(packed, tuple):
            text, blob, flow = packed
            exception = unpack_failure(text, blob, flow=flow)
        else:
            try:
                result = unpack(packed)
            except StrictFlowError as error:
                exception = error
        # One step: two threads that open it at once return the same.
        self._result, self._exception = self.__dict__.setdefault("_opened", (result, exception))
        self._packed = None  # after that: who finds it gone finds the outcome

    def _check_outcome(self) -> None:
        if self._state == _CANCELLED:
            raise concurrent.futures.CancelledError
        if self._state == _PENDING:
            raise concurrent.futures.TimeoutError

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call ``fn(self)`` when the task has ended."""
        self._when_done(fn, is_to_sleep=False)

    def _when_done(self, fn: Callable[[Future[T]], object], *, is_to_sleep: bool) -> None:
        self.__dict__.setdefault("_callbacks", deque()).append(fn)
        # After that, see above: `_settle` looks at the callbacks when the state has changed.
        if self._state == _PENDING:
            self._port.serve(is_to_sleep=is_to_sleep)
        else:
            self._call_back()

    def _call_back(self) -> None:
        callbacks = self._callbacks
        while callbacks:
            try:
                fn = callbacks.popleft()
            except IndexError:
                return  # another thread was faster
            try:
                fn(self)
            except BaseException as error:
                # In the main thread a signal handler may have raised: SystemExit and its like are its user's, and pass.
                # In another there is nobody whom they could reach, and the thread that reads answers must go on.
                is_users = self._signals_are_users and threading.current_thread() is threading.main_thread()
                if is_users and not issubclass(type(error), Exception):
                    raise
                logger = logging.getLogger("concurrent.futures")
                logger.error("a callback of %r failed with %s", self, words_of(error), exc_info=printable(error))

    def cancel(self) -> bool:
        """Take the task back if it has not started; whether that succeeded. Asks SF-LOOP, and waits for it."""
        if self.done_now():
            return self.cancelled()
        return self._port.cancel(self, wait=True)

    _signals_are_users: ClassVar[bool] = True
    """Whether what a signal handler raises in the main thread is for somebody there."""

    # A coroutine to asyncio, so that `create_task(task())` and `asyncio.run(task())` work, and `asyncio.wait({task()})`
    # is refused at once, with what to write, where it would wait for ever: these three make it one (PEP 492).

    # By the task of asyncio that drives it: several may, one after the other or at a time, and each gets the answer.
    _awaited: dict[Any, Generator[Any, None, T]] | None = None

    def _step(self, go_on: Callable[[Generator[Any, None, T]], Any], error: Any = None) -> Any:
        import asyncio  # loaded already

        try:
            driver = asyncio.current_task()
        except RuntimeError:
            driver = None  # another library's loop
        awaited = self.__dict__.setdefault("_awaited", {})
        steps = awaited.get(driver)
        if steps is None:
            if error is not None and not self.done_now():
                self._port.cancel(self, wait=False)  # it was cancelled before its first step
            steps = awaited[driver] = self.__await__()
        try:
            return go_on(steps)
        except BaseException:
            awaited.pop(driver, None)  # it has ended
            raise
        finally:
            del self, steps  # as in `result`

    def send(self, value: Any) -> Any:
        """For the event loop: go on."""
        try:
            return self._step(lambda steps: steps.send(value))
        finally:
            del self

    def throw(self, *error: Any) -> Any:
        """For the event loop: go on with an exception."""
        try:
            return self._step(lambda steps: steps.throw(*error), error)
        finally:
            del self

    def close(self) -> None:
        """For the event loop: nobody awaits this any more. The task goes on."""
        for steps in list((self._awaited or {}).values()):
            try:
                steps.close()
            except ValueError:
                pass  # another thread drives it just now

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

            self._when_done(tell, is_to_sleep=True)
            try:
                yield from arrived
            except asyncio.CancelledError:
                self._port.cancel(self, wait=False)
                raise
        try:
            return self.result(0)
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError from None
        finally:
            del self  # as in `result`

    # For the port

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Record the answer; the first one counts."""
        self._settle(_FINISHED, value, error)

    def settle_packed(self, packed: bytes | tuple[str, bytes, str]) -> None:
        """Record the answer as it has come: a payload, or text, pickled exception and flow of a failure."""
        self._settle(_FINISHED, None, None, packed)

    def settle_cancelled(self) -> None:
        """Record that the task was taken back."""
        self._settle(_CANCELLED, None, None)

    def _settle(
        self,
        state: str,
        value: Any,
        error: BaseException | None,
        packed: bytes | tuple[str, bytes, str] | None = None,
    ) -> None:
        # One step decides which is first, for two may come: the answer, and the loss of the flow. Whoever comes again,
        # because a signal handler raised, only goes on where it was.
        outcome = self.__dict__.setdefault("_outcome", (state, value, error, packed))
        if self._state == _PENDING:
            state, self._result, self._exception, self._packed = outcome
            self._state = state
        # After that, see above: `wait_here` and `add_done_callback` look at the state when they have written.
        if self._lazy_condition is not None:
            self._tell()
        if self._callbacks:
            self._call_back()

    def _tell(self) -> None:
        with self._condition:
            if not self._has_told:
                self._has_told = True
                for waiter in self._listeners:
                    if self._state == _CANCELLED:
                        waiter.add_cancelled(self)
                    elif self._exception is None and type(self._packed) is not tuple:
                        waiter.add_result(self)
                    else:
                        waiter.add_exception(self)
            self._condition.notify_all()

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
        return f"<TaskFuture {self.label} #{self.seq} {state}>"
