"""Inside: what tasks find in the coordinator's process, where ``flow.state`` and calling a task mean something else.

``flow.state`` is the transaction of the P1 task that runs, else the committed state. A task that a task calls is
queued like any other; waiting for it inside SF-LOOP could never end, so it raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .arguments import pack_arguments
from .errors import ReadOnlyState, StrictFlowError
from .future import TaskFuture
from .gate import GateKeeper
from .jobs import Call, Function
from .keys import TypedState
from .scheduler import Scheduler
from .state import Snapshot, View
from .stepper import Stepper
from .store import StoreReader, StoreWriter, Version
from .transaction import Changes, Transaction

__all__ = ["Inside"]


class _Committed(View):
    """The committed state. Nothing moves while a task runs, so no pin is needed."""

    def __init__(self, flow: str, writer: StoreWriter, reader: StoreReader) -> None:
        self._flow = flow
        self._writer = writer
        self._reader = reader
        self._version = Version(-1, 0, 0)

    def _at(self) -> Version:
        if self._version.number != self._writer.version:
            # Not exact: arrays are copied, for the tree may change while an async task sleeps.
            self._version = Version(self._writer.version, *self._writer.tree, is_exact=False)
        return self._version


class _State(TypedState):
    """``flow.state`` in tasks."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside

    @property
    def _now(self) -> Any:
        transaction = self._inside.transaction
        return self._inside.committed if transaction is None else transaction

    def _for_change(self) -> Transaction:
        transaction = self._inside.transaction
        if transaction is None:
            raise ReadOnlyState(
                "the state was changed inside a P2 task; change it in a task decorated with @write",
                flow=self._inside.name,
            )
        return transaction

    def __getitem__(self, key: Any) -> Any:
        return self._now[key]

    def __contains__(self, key: object) -> bool:
        return key in self._now

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._now))

    def __len__(self) -> int:
        return len(self._now)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._for_change()[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._for_change()[key]

    def __repr__(self) -> str:
        return f"<state of flow {self._inside.name!r} inside SF-LOOP: {self._now!r}>"


class Inside:
    """The flow as its tasks see it (`place.Inside`), and the port of the futures of what they submit."""

    def __init__(
        self,
        name: str,
        writer: StoreWriter,
        reader: StoreReader,
        gate: GateKeeper,
        scheduler: Scheduler[Call],
        stepper: Stepper,
        report: Callable[[], dict[str, Any]],
        task_timeout: float | None,
    ) -> None:
        self.name = name
        self.committed = _Committed(name, writer, reader)
        self.transaction: Transaction | None = None
        self.reader = reader
        self.state: TypedState = _State(self)
        self.stats = report
        self._gate = gate
        self._scheduler = scheduler
        self._stepper = stepper
        self._task_timeout = task_timeout
        self._last = 0
        self._due = 0  # the number of the last P1 that a task submitted; 0 when none is queued

    def snapshot(self) -> Snapshot:
        """A view of the last committed version."""
        return Snapshot(self.name, lambda: self.reader, lambda: self.reader)

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[TaskFuture[Any]]:
        """Queue calls of a task."""
        function = Function(task, task.name, task.priority, task.packed_key, self.timeout_of(task.timeout))
        packed = [pack_arguments(args, kwargs, f"arguments of {task.name}()") for args, kwargs in calls]
        return [self._queue(task.priority, task.name, function, arguments, {}) for arguments in packed]

    def timeout_of(self, timeout: float | None) -> float | None:
        """The seconds that a task may take: its own, or else those of all tasks of the flow."""
        return self._task_timeout if timeout is None else timeout

    def put(self, changes: Changes) -> TaskFuture[Any]:
        """Queue a ready-made P1."""
        return self._queue(1, "put", None, b"", changes)

    def _queue(
        self, priority: int, name: str, function: Function | None, arguments: bytes, changes: Changes
    ) -> TaskFuture[Any]:
        self._last += 1
        future: TaskFuture[Any] = _LocalFuture(self, self._last, name)
        if priority == 1:
            self._due = self._gate.raise_own()
        flag = self._due if priority == 1 else 0
        arrived = time.perf_counter_ns()
        call = Call(0, self._last, priority, None, function, arguments, changes, flag, arrived)
        call.future = future
        self._scheduler.submit(call)
        self._stepper.stop_soon()
        return future

    def first_due(self) -> int | None:
        """The number of the first queued P1 that a task submitted."""
        if not self._due:
            return None
        job = self._scheduler.first_write(0)
        if job is not None:
            return job.flag
        self._due = 0
        return None

    # future.Port

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Raise: this can never end."""
        if timeout != 0:
            raise StrictFlowError(
                f"a task waits inside SF-LOOP for {future.label}(), which runs only after it: this can never "
                "end; await it in an async @read, or let the caller wait",
                flow=self.name,
            )

    def serve(self) -> None:
        """Nothing to do: SF-LOOP itself settles these futures."""

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Take back what a task has submitted."""
        job = self._scheduler.cancel(0, future.number)
        if job is not None:
            future.settle_cancelled()
        return job is not None

    def __repr__(self) -> str:
        return f"<Inside of flow {self.name!r}>"


class _LocalFuture(TaskFuture[Any]):
    """The future of a task that a task submitted."""

    def _refused_waiters(self) -> list[Any]:
        if not self.done_now():
            self._port.wait(self, None)  # concurrent.futures.wait() in a task: raise at once
        return self._listeners

    _waiters: list[Any] = property(_refused_waiters)  # type: ignore[assignment]

    def __await__(self) -> Any:
        port = self._port
        if isinstance(port, Inside) and port.transaction is not None and not self.done_now():
            port.wait(self, None)  # an async P1: what it waits for comes after it
        return super().__await__()
