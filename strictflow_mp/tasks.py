"""Tasks: the `write` and `read` decorators, and what they make of a function."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

from . import place
from .core import READ_PRIORITY, WRITE_PRIORITY, priority
from .errors import StrictFlowError
from .future import TaskFuture
from .references import reference_to
from .values import pack_key

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Concatenate, Protocol

    from .flow import StrictFlow
    from .keys import Key, PlainKey

__all__ = ["Task", "read", "write"]

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W")

Where = Literal["loop", "worker"]

NO_KEY: Any = object()
CO_COROUTINE = 0x80


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
        functools.update_wrapper(self, function)
        self.__qualname__: str = getattr(function, "__qualname__", "<callable>")
        self.__strictflow_function__ = function
        self.flow = flow
        self.priority = level
        self.key = key
        try:
            self.packed_key = None if key is NO_KEY else pack_key(key)
        except StrictFlowError as error:
            raise error.of(flow.name) from None
        self.where = where
        self.timeout = timeout
        self.name: str = getattr(function, "__name__", repr(function))

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
        future: TaskFuture[R] = TaskFuture(_Here(), 0, self.name)
        if is_async(self.__strictflow_function__):
            return self._run_here_async(args, kwargs)
        token = priority.set(READ_PRIORITY)
        try:
            with self.flow.snapshot() as snapshot, self.flow.reading(snapshot):
                future.settle(self._body(snapshot, args, kwargs))
        except Exception as error:
            future.settle(error=error)
        finally:
            priority.reset(token)
        return future

    def _body(self, snapshot: Any, args: Any, kwargs: Any) -> Any:
        function: Callable[..., Any] = self.__strictflow_function__
        if self.packed_key is None:
            return function(*args, **kwargs)
        return function(snapshot.get(self.key), *args, **kwargs)

    def _run_here_async(self, args: Any, kwargs: Any) -> TaskFuture[R]:
        import asyncio  # 16 ms that an import does not need

        future: TaskFuture[R] = TaskFuture(_Here(), 0, self.name)

        async def run() -> None:
            priority.set(READ_PRIORITY)
            try:
                async with self.flow.snapshot() as snapshot:
                    with self.flow.reading(snapshot):
                        future.settle(await self._body(snapshot, args, kwargs))
            except asyncio.CancelledError:
                future.settle_cancelled()
                raise
            except Exception as error:
                future.settle(error=error)

        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(run())
        else:
            future.runner = running.create_task(run())
        return future

    def __strictflow_adopt__(self, loop: place.Inside) -> None:
        # The coordinator imported the module that made this task's flow: without a name, that is another one.
        self.flow.adopt(loop)

    def __strictflow_by_value__(self) -> Any:
        options = {"key": self.key, "where": self.where, "timeout": self.timeout}
        if self.key is NO_KEY:
            del options["key"]
        return _rebuild, (self.flow, self.__strictflow_function__, self.priority, options)

    def __reduce__(self) -> Any:
        # The name leads back to this object in every process that can import the module, or that runs the
        # same script (as `__mp_main__`); what else there is, cloudpickle takes by value (`functions.dumps`).
        if reference_to(self, self.__strictflow_function__) or "<" not in self.__qualname__:
            return self.__qualname__
        from .byvalue import dumps

        return pickle.loads, (dumps(self),)

    def __repr__(self) -> str:
        return f"<P{self.priority} task {self.name} of flow {self.flow.name!r}>"


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function makes a coroutine. (`inspect` would cost the import 5 ms.)"""
    return bool(getattr(getattr(function, "__code__", None), "co_flags", 0) & CO_COROUTINE)


def _rebuild(flow: StrictFlow, function: Callable[..., Any], level: int, options: dict[str, Any]) -> Any:
    return Task(flow, function, level, **options)


class _Here:
    """The port of a future that is done when its maker returns."""

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        if timeout is None or timeout > 0:
            future.wait_here(3600 if timeout is None else timeout)

    def serve(self) -> None:
        pass

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
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
        where: "loop" runs it in SF-LOOP; "worker" in the calling process, behind the gate and on one version
            throughout, so it scales with cores.
        timeout: seconds after which it is stopped: `TaskTimeout`. Only in SF-LOOP.
    """
    if where not in ("loop", "worker"):
        raise ValueError(f'where must be "loop" or "worker", not {where!r}')

    _check(flow, timeout)

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        return Task(flow, function, READ_PRIORITY, key=key, where=where, timeout=timeout)

    return decorate
