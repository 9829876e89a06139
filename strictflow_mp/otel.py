"""OpenTelemetry: spans around tasks. Needs opentelemetry-api: the extra `otel`.

>>> @spans                                                        # doctest: +SKIP
... @write(flow)
... def update_config(version): ...

A call makes a span of kind PRODUCER, from its submit to its answer, in the process that submits; the run in SF-LOOP is
its child, of kind CONSUMER, when the coordinator has a tracer provider: a module that a task lives in is imported
there, and may set one. The context travels with the arguments, as the W3C's `traceparent` and whatever else the
propagator carries. Where spans go is the application's choice; without an SDK nothing happens, and little is paid. A
task with ``where="worker"`` has one span, in the process that runs it.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

try:
    from opentelemetry import propagate, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
except ImportError as error:
    raise ImportError("strictflow_mp.otel needs opentelemetry-api: pip install 'strictflow-mp[otel]'") from error

from .flow.tasks import NO_KEY, Task, is_async

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .wire.future import TaskFuture

__all__ = ["SpannedTask", "spans"]

P = ParamSpec("P")
R = TypeVar("R")

CARRIER = "__strictflow_otel__"
"""The keyword under which the context travels."""

tracer = trace.get_tracer("strictflow_mp")


def spans(task: Task[P, R]) -> SpannedTask[P, R]:
    """Make a task whose calls are spans: ``@spans`` above ``@read(flow)`` or ``@write(flow)``.

    So that its span ends in time, an answer is read in the background, by a thread of the process that submits.
    """
    if not isinstance(task, Task):
        raise TypeError(f"@spans goes above @read(flow) or @write(flow), not on {task!r}")
    return SpannedTask(task)


class SpannedTask(Task[P, R]):
    """A task whose calls are spans."""

    def __init__(self, task: Task[P, R]) -> None:
        function: Any = task.__strictflow_function__
        self._task = task
        self._here = task.where == "worker"
        super().__init__(
            task.flow,
            function if self._here else _InSpan(function, task.flow.name, task.priority),
            task.priority,
            key=NO_KEY if task.packed_key is None else task.key,
            where=task.where,
            timeout=task.timeout,
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[R]:
        with _span(self, SpanKind.INTERNAL if self._here else SpanKind.PRODUCER) as span:
            future = super().__call__(*args, **kwargs) if self._here else self._submit([(args, kwargs)])[0]
        _end_with([future], span)
        return future

    def map(self, *iterables: Iterable[Any]) -> list[TaskFuture[R]]:
        """As `Task.map`. The calls are one span, which ends with the last answer; each run is a child of it."""
        with _span(self, SpanKind.INTERNAL if self._here else SpanKind.PRODUCER) as span:
            if self._here:
                futures = super().map(*iterables)
            else:
                futures = self._submit([(args, {}) for args in zip(*iterables, strict=False)])
            span.set_attribute("strictflow.calls", len(futures))
        _end_with(futures, span)
        return futures

    def _submit(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[TaskFuture[R]]:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return self.flow.submit(self, [(args, {**kwargs, CARRIER: carrier}) for args, kwargs in calls])

    def __strictflow_by_value__(self) -> Any:
        return spans, (self._task,)


class _InSpan:
    """A task's function, as the coordinator runs it: in a span that is the child of the one that submitted it."""

    def __init__(self, function: Callable[..., Any], flow: str, priority: int) -> None:
        self.function = function
        self._flow = flow
        self._priority = priority
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parent = propagate.extract(kwargs.pop(CARRIER, {}))
        begin = functools.partial(
            tracer.start_as_current_span,
            f"run {getattr(self, '__name__', 'task')}",
            parent,
            SpanKind.CONSUMER,
            {"strictflow.flow": self._flow, "strictflow.priority": self._priority},
        )
        if is_async(self.function):
            return self._run_async(begin, args, kwargs)
        with begin():
            return self.function(*args, **kwargs)

    async def _run_async(self, begin: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        with begin():
            return await self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.function!r} in a span>"


@contextmanager
def _span(task: SpannedTask[..., Any], kind: SpanKind) -> Iterator[Span]:
    """A span that goes on when the context is left, unless that is for an exception."""
    attributes: dict[str, str | int] = {
        "code.function.name": f"{task.__module__}.{task.__qualname__}",
        "strictflow.flow": task.flow.name,
        "strictflow.priority": task.priority,
    }
    span = tracer.start_span(task.name, kind=kind, attributes=attributes)
    try:
        with trace.use_span(span):
            yield span
    except BaseException:
        span.end()
        raise


def _end_with(futures: list[TaskFuture[Any]], span: Span) -> None:
    """End a span with the last of the futures."""
    if not span.is_recording():
        return
    left = len(futures)

    def ended(future: Any) -> None:
        nonlocal left
        if future.cancelled():
            span.add_event("cancelled")
        elif (error := future.exception()) is not None:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        left -= 1  # the thread that reads the answers is alone here
        if not left:
            span.end()

    for future in futures:
        future.add_done_callback(ended)
    if not futures:
        span.end()
