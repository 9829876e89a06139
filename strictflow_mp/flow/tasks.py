"""Tasks: the `write` and `read` decorators, and what they make of a function."""

from __future__ import annotations

import functools
import pickle
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

from ..core import READ_PRIORITY, WRITE_PRIORITY, priority
from ..errors import StrictFlowError
from ..values.keys import pack_key
from ..wire.future import TaskFuture
from ..wire.origins import note
from ..wire.references import reference_to

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Iterable
    from typing import Concatenate, Protocol

    from ..values.annotations import Key, PlainKey
    from ..wire import inside
    from .handle import StrictFlow

__all__ = ["Task", "read", "write"]

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W")

Where = Literal["loop", "worker"]

NO_KEY: Any = object()
"""Says that no key was given. (None is refused by `pack_key`, like all that cannot be a key.)"""
CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR = 0x20, 0x80, 0x200
"""As in `inspect`."""
HERE_SECONDS = 3600
"""Seconds that `result()` waits, without a timeout of its own, for an async task that runs in this process."""


class Task(Generic[P, R]):
    """A function whose calls are tasks of a flow. Call it to submit one; the call returns a `TaskFuture`."""

    def __init__(
        self,
        flow: StrictFlow,
        function: Callable[P, R],
        level: int,
        *,
        key: Any = NO_KEY,
        where: str = "loop",
        timeout: float | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"a task is made of a callable, not of {function!r}")
        if code_flags(function) & (CO_GENERATOR | CO_ASYNC_GENERATOR):
            raise _no_generator(getattr(function, "__name__", repr(function)))
        if type(function) is staticmethod:
            function = function.__func__
        functools.update_wrapper(self, function)
        self.__qualname__: str = getattr(function, "__qualname__", "<callable>")
        self.__strictflow_function__ = function
        note(function)
        self.flow = flow
        self.priority = level
        self.key = key  # `NO_KEY` when none was given; then `packed_key` is None
        try:
            self.packed_key = None if key is NO_KEY else pack_key(key)
        except StrictFlowError as error:
            raise error.of(flow.name) from None
        self.where = where
        self.timeout = timeout  # seconds; None: as long as the flow's `task_timeout` says
        # What errors, logs and traces call it.
        self.name: str = getattr(function, "__name__", repr(function))

    def __get__(self, instance: Any, owner: Any = None) -> Task[P, R]:
        """A task is no method: in a class it is what it is elsewhere, and is not given the object."""
        if instance is not None:
            names = getattr(getattr(self.__strictflow_function__, "__code__", None), "co_varnames", ())
            if names[:1] in (("self",), ("cls",)):
                raise TypeError(
                    f"{self.__qualname__}() is a task and cannot be a method: its object would have to travel, and "
                    "what it changes there would be lost; make it a function, or a staticmethod, and pass what it needs"
                )
        return self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[R]:
        if self.where == "worker":
            return self._run_here(args, kwargs)
        return self.flow.submit(self, [(args, kwargs)])[0]

    def map(self, *iterables: Iterable[Any]) -> list[TaskFuture[R]]:
        """Submit a call for each item (for each tuple of items, given several iterables), in one go."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [(args, {}) for args in zip(*iterables, strict=False)]
        if self.where == "worker":
            return [self._run_here(args, {}) for args, _ in calls]
        return self.flow.submit(self, calls)

    def _run_here(self, args: Any, kwargs: Any) -> TaskFuture[R]:
        snapshot = self.flow.snapshot()
        if is_async(self.__strictflow_function__):
            return self._run_here_async(snapshot, lambda: self._body(snapshot, args, kwargs))
        future: TaskFuture[R] = TaskFuture(_Here(self.flow.name), 0, self.name)
        result: Any = None
        token = priority.set(READ_PRIORITY)
        try:
            snapshot.__enter__()
            with self.flow.reading(snapshot):
                result = self._body(snapshot, args, kwargs)
        except Exception as error:
            future.settle(error=error)
        else:
            if type(result) is not CoroutineType:
                future.settle(result)
        finally:
            priority.reset(token)
            if type(result) is not CoroutineType:
                snapshot.close()
        if type(result) is CoroutineType:  # a decorator, or the like, has hidden that it is async
            return self._run_here_async(snapshot, lambda: result)
        try:
            return future
        finally:
            del future  # what was raised holds this frame: the two would hold each other, and all that the task had

    def _body(self, snapshot: Any, args: Any, kwargs: Any) -> Any:
        function: Callable[..., Any] = self.__strictflow_function__
        if self.packed_key is not None:
            args = (snapshot.get(self.key), *args)
        result = function(*args, **kwargs)
        if type(result) in (GeneratorType, AsyncGeneratorType):
            raise _no_generator(self.name)  # it would run when the snapshot is closed
        return result

    def _run_here_async(self, snapshot: Any, begin: Callable[[], Any]) -> TaskFuture[R]:
        """Run to its end the coroutine that *begin* gives when the snapshot is entered."""
        import asyncio  # 16 ms that an import does not need

        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        future: TaskFuture[R] = TaskFuture(_Here(self.flow.name, running), 0, self.name)

        async def run(future: TaskFuture[R]) -> None:
            priority.set(READ_PRIORITY)
            try:
                async with snapshot:
                    with self.flow.reading(snapshot):
                        future.settle(await begin())
            except asyncio.CancelledError:
                future.settle_cancelled()
                raise
            except Exception as error:
                future.settle(error=error)
            finally:
                del future  # as in `_run_here`

        if running is None:
            asyncio.run(run(future))
        else:
            future.runner = running.create_task(run(future))
        return future

    def __strictflow_adopt__(self, loop: inside.Loop) -> None:
        # The coordinator imported the module that made this task's flow: without a name, that is another one.
        self.flow.adopt(loop)

    def __strictflow_by_value__(self) -> Any:
        options = {"key": self.key, "where": self.where, "timeout": self.timeout}
        if self.key is NO_KEY:
            del options["key"]
        return _rebuild, (self.flow, self.__strictflow_function__, self.priority, options)

    def __reduce__(self) -> Any:
        # The name leads back to this object in every process that can import the module, or that runs the
        # same script (as `__mp_main__`); what else there is, cloudpickle takes by value (`wire.byvalue.dumps`).
        if reference_to(self, self.__strictflow_function__) or "<" not in self.__qualname__:
            return self.__qualname__
        from ..wire.byvalue import dumps

        return pickle.loads, (dumps(self),)

    def __repr__(self) -> str:
        return f"<P{self.priority} task {self.name} of flow {self.flow.name!r}>"


def code_flags(function: Any) -> int:
    """The flags of the code that calling *function* runs; 0 when it has none. (`inspect` takes 5 ms to import.)"""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__func__"):  # a method, a staticmethod
            function = function.__func__
        else:
            break
    if not hasattr(function, "__code__"):
        function = getattr(type(function), "__call__", None)  # noqa: B004  an object that can be called
    return int(getattr(getattr(function, "__code__", None), "co_flags", 0))


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function makes a coroutine, as far as can be seen from outside."""
    return bool(code_flags(function) & CO_COROUTINE)


def _no_generator(name: str) -> TypeError:
    return TypeError(
        f"{name}() is a generator, and a task returns once: return a list, as in `return list(...)`, or let the caller "
        "submit a task for each part"
    )


def _rebuild(flow: StrictFlow, function: Callable[..., Any], level: int, options: dict[str, Any]) -> Any:
    return Task(flow, function, level, **options)


class _Here:
    """What the future of a task asks that runs in this process (`wire.future.AnswerSource`).

    Args:
        loop: the event loop that runs it; None when the future is settled before anybody has it.
    """

    def __init__(self, flow: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._flow = flow
        self._loop = loop

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Wait.

        Raises:
            StrictFlowError: the caller is in the event loop that is to run it, so this could never end.
        """
        if self._loop is not None and timeout != 0:
            from asyncio import _get_running_loop

            if _get_running_loop() is self._loop:
                raise StrictFlowError(
                    f"{future.label}() runs in this event loop, which would stand still until it has ended: await it",
                    flow=self._flow,
                )
        if timeout is None or timeout > 0:
            future.wait_here(HERE_SECONDS if timeout is None else timeout)

    def serve(self, *, is_to_sleep: bool = False) -> None:
        """Nothing to do: the task itself settles its future."""

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        """It has begun: it is not taken back."""
        return False


def _check(flow: Any, timeout: float | None) -> None:
    if not hasattr(flow, "submit"):
        raise TypeError(f"the decorator wants a StrictFlow, as in @write(flow), not {flow!r}")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout must be more than 0 seconds, not {timeout}")


if TYPE_CHECKING:
    V = TypeVar("V", covariant=True)

    class _Decorator(Protocol):
        """Keeps the parameters of a function. An async one gives what it returns, not a coroutine."""

        @overload
        def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
        @overload
        def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...

    class _Keyed(Protocol[V]):
        """Keeps the parameters of a function but for the first, which takes the key's value."""

        @overload
        def __call__(self, function: Callable[Concatenate[V, P], Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
        @overload
        def __call__(self, function: Callable[Concatenate[V, P], R], /) -> Task[P, R]: ...

    class _KeyedWrite(Protocol[W]):
        """As `_Keyed`, of a function that returns the key's next value."""

        @overload
        def __call__(self, function: Callable[Concatenate[W, P], Coroutine[Any, Any, W]], /) -> Task[P, W]: ...
        @overload
        def __call__(self, function: Callable[Concatenate[W, P], W], /) -> Task[P, W]: ...


@overload
def write(flow: StrictFlow, *, timeout: float | None = None) -> _Decorator: ...
@overload
def write(flow: StrictFlow, *, key: Key[W], timeout: float | None = None) -> _KeyedWrite[W]: ...
@overload
def write(flow: StrictFlow, *, key: PlainKey, timeout: float | None = None) -> _Keyed[Any]: ...
def write(flow: StrictFlow, *, key: Any = NO_KEY, timeout: float | None = None) -> Any:
    """Make a function a P1 task: it changes the state, alone, first in line, all or nothing.

    In the function, ``flow.state`` is a transaction: what it hands out are private mutable copies, and changes
    in place count. An exception rolls everything back. It runs in the coordinator's process.

    Args:
        key: the function's first argument is then a private copy of that key's value (None when absent), its
            return value the new value. Returning None aborts: `IntegrityError`.
        timeout: seconds after which it is stopped and rolled back: `TaskTimeout`.
    """

    _check(flow, timeout)

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        return Task(flow, function, WRITE_PRIORITY, key=key, timeout=timeout)

    return decorate


@overload
def read(flow: StrictFlow, *, where: Where = "loop", timeout: float | None = None) -> _Decorator: ...
@overload
def read(flow: StrictFlow, *, key: Key[W], where: Where = "loop", timeout: float | None = None) -> _Keyed[W]: ...
@overload
def read(flow: StrictFlow, *, key: PlainKey, where: Where = "loop", timeout: float | None = None) -> _Keyed[Any]: ...
def read(flow: StrictFlow, *, key: Any = NO_KEY, where: Where = "loop", timeout: float | None = None) -> Any:
    """Make a function a P2 task: it sees the state after every P1 that was submitted before it began.

    Async P2 tasks overlap with each other, and are paused at their next await while a P1 runs.

    Args:
        key: the function's first argument is then that key's read-only value (None when absent).
        where: "loop" runs it in SF-LOOP; "worker" in the calling process, after the gate and on one version
            throughout, so it scales with cores.
        timeout: seconds after which it is stopped: `TaskTimeout`. Only in SF-LOOP.
    """
    if where not in ("loop", "worker"):
        raise ValueError(f'where must be "loop" or "worker", not {where!r}')

    _check(flow, timeout)

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        return Task(flow, function, READ_PRIORITY, key=key, where=where, timeout=timeout)

    return decorate
