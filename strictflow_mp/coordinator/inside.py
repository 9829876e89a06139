"""Inside: what tasks find in the coordinator's process, where ``flow.state`` and calling a task mean something else.

``flow.state`` is the transaction of the P1 task that runs, else the committed state. A task that a task calls is
queued like any other; waiting for it inside SF-LOOP could never end, so it raises.

Invariant: a transaction is its task's alone. Tasks run in SF-LOOP's thread; any other thread of this process, whether a
task has started it or left it behind, finds the committed state, one version for each look, and can change nothing.

In a child that a task has forked, all this is its parent's. There the state stands for that of a handle outside.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing import current_process
from threading import get_ident
from typing import TYPE_CHECKING, Any

from ..core import WRITE_PRIORITY
from ..errors import ReadOnlyState, StrictFlowError
from ..store import Version
from ..store.views import Snapshot, View
from ..system import forks
from ..values.annotations import TypedState
from ..wire.arguments import pack_arguments
from ..wire.future import TaskFuture
from .calls import Function, TaskCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..store import StoreReader, StoreWriter
    from ..values.changes import Changes
    from .parts import Parts
    from .transaction import Transaction

__all__ = ["Inside"]


class _Committed(View):
    """The committed state. Nothing moves while a task runs, so no pin is needed."""

    def __init__(self, flow: str, writer: StoreWriter, reader: StoreReader) -> None:
        self._flow = flow
        self._writer = writer
        self._reader = reader
        # The tree of the last commit as of the last look; -1 is no commit's.
        self._version = Version(-1, 0, 0)

    def _at(self) -> Version:
        if self._version.number != self._writer.version:
            # Not exact: arrays are copied, for the tree may change while an async task sleeps.
            self._version = Version(self._writer.version, *self._writer.tree, is_exact=False)
        return self._version


class _Elsewhere(Mapping[Any, Any]):
    """The committed state for other threads: commits go on while they look, so each look pins a version."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def __getitem__(self, key: Any) -> Any:
        with self._take() as now:
            return now[key]

    def __contains__(self, key: object) -> bool:
        with self._take() as now:
            return key in now

    def __iter__(self) -> Iterator[Any]:
        with self._take() as now:
            return iter(list(now))

    def __len__(self) -> int:
        with self._take() as now:
            return len(now)

    def __repr__(self) -> str:
        return "<the committed state, in another thread than SF-LOOP's>"


class _State(TypedState):
    """``flow.state`` in tasks."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside

    @property
    def _now(self) -> Any:
        inside = self._inside
        if not forks.mark[0]:
            forks.catch_up()
        if inside.outside is not None:
            return inside.outside
        if get_ident() != inside.thread:
            return inside.elsewhere
        return inside.committed if inside.transaction is None else inside.transaction

    def _for_change(self) -> Any:
        inside = self._inside
        outside = inside.in_child()
        if outside is not None:
            if current_process() is inside.process:
                # It is in the task's function still, where the state means the parent's transaction.
                raise ReadOnlyState(
                    "the state was changed in a child that a task forked, where that is no part of the task's "
                    "transaction; let the parent change it, or submit the change with flow.put() or a @write task",
                    flow=inside.name,
                )
            return outside
        if get_ident() != inside.thread:
            raise ReadOnlyState(
                "the state was changed in a thread that a task has started: its transaction is the task's alone; give "
                "the value back to the task, or submit a task from here",
                flow=inside.name,
            )
        transaction = inside.transaction
        if transaction is None:
            raise ReadOnlyState(
                "the state was changed inside a P2 task; change it in a task decorated with @write",
                flow=inside.name,
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

    def clear(self) -> None:
        """Delete all keys."""
        self._for_change().clear()

    def __repr__(self) -> str:
        return f"<state of flow {self._inside.name!r} inside SF-LOOP: {self._now!r}>"


class Inside:
    """The flow as its tasks see it (`wire.inside.Loop`), and the port of the futures of what they submit."""

    def __init__(self, parts: Parts, report: Callable[[], dict[str, Any]], task_timeout: float | None) -> None:
        self.name = parts.flow
        self.committed = _Committed(parts.flow, parts.writer, parts.reader)
        # Set by the runner while a P1 task runs, and only then: so this says which of the two `flow.state` is.
        # Looked at by SF-LOOP's thread alone.
        self.transaction: Transaction | None = None
        # SF-LOOP's: that of the process's start, which runs every task.
        self.thread = get_ident()
        self.elsewhere = _Elsewhere(self._last_committed)
        # Commits what the burst has so far (`Runner`).
        self.publish: Callable[[], None] = _nothing
        # Held while slot 0's flag is lowered, and for what must fit to it: `_due`, `_drawn`, the queue. Threads that
        # tasks have started submit too, and finalizers in the middle of anything: also of what holds the lock.
        self._queueing = threading.RLock()
        # How many calls of the thread that holds it are under way, one in the middle of the other. Only the first of
        # them takes calls in, so that they are queued in the order of tickets.
        self._depth = 0
        # Calls that have their tickets, and are not queued yet.
        self._drawn: deque[TaskCall] = deque()
        self._wakeup_fd = parts.sessions.wakeup_fd
        self.reader = parts.reader
        self.state: TypedState = _State(self)
        # Set in a forked child, by the first handle that moves out.
        self.outside: TypedState | None = None
        self.process = current_process()  # a child that `multiprocessing` has forked is another
        self.stats = report
        self._gate = parts.gate
        self._scheduler = parts.scheduler
        self._stepper = parts.stepper
        self._task_timeout = task_timeout
        # Calls of tasks are numbered from 1, as if slot 0 were a process.
        self._seqs = itertools.count(1)
        # The ticket of the last P1 that a task submitted; 0 when none is queued.
        self._due = 0

    def snapshot(self) -> Snapshot:
        """A view of the last committed version; in a P1 task, of what the P1 tasks before it have left.

        These may be in its burst: they are committed first. What the task itself has changed is not in it.
        """
        if self.transaction is not None and get_ident() == self.thread:
            self.publish()
        return self._last_committed()

    def _last_committed(self) -> Snapshot:
        return Snapshot(self.name, self._enter, self._enter)

    def _enter(self) -> StoreReader:
        self._refuse_child("this snapshot belongs to the parent process; in a forked child, take a new one")
        return self.reader

    def in_child(self) -> TypedState | None:
        """In a child that a task has forked, the state as it is seen from outside; None in the coordinator."""
        if not forks.mark[0]:
            forks.catch_up()
        return self.outside

    def _refuse_child(self, why: str) -> None:
        if self.in_child() is not None:
            raise StrictFlowError(why, flow=self.name)

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[TaskFuture[Any]]:
        """Queue calls of a task."""
        function = Function(task, task.name, task.priority, task.packed_key, self.timeout_of(task.timeout))
        packed = [pack_arguments(args, kwargs, f"arguments of {task.name}()") for args, kwargs in calls]
        return [self._queue(task.name, function, arguments) for arguments in packed]

    def timeout_of(self, timeout: float | None) -> float | None:
        """The seconds that a task may take: its own, or else those of all tasks of the flow."""
        return self._task_timeout if timeout is None else timeout

    def put(self, changes: Changes) -> TaskFuture[Any]:
        """Queue a ready-made P1."""
        return self._queue("put", None, b"", changes)

    def _queue(
        self, name: str, function: Function | None, arguments: bytes, changes: Changes | None = None
    ) -> TaskFuture[Any]:
        with self._queueing:
            depth = self._depth
            try:
                self._depth = depth + 1
                future: TaskFuture[Any] = _LocalFuture(self, next(self._seqs), name)
                is_write = function is None or function.priority == WRITE_PRIORITY
                ticket = self._gate.raise_own() if is_write else 0
                self._drawn.append(TaskCall(future, ticket, function, arguments, time.perf_counter_ns(), changes))
                if not depth:
                    self._take_in()
            finally:
                self._depth = depth
        if not depth:
            self._settle()
        if get_ident() == self.thread:
            self._stepper.stop_soon()  # an async task may have made the call: the loop must see that it is queued
        else:
            self._wake_up()
        return future

    def _wake_up(self) -> None:
        """The loop may sleep, or step async tasks: it looks at its queue when something has arrived."""
        try:
            os.write(self._wakeup_fd, b"\0")
        except BlockingIOError:
            pass  # it is about to look

    def _take_in(self) -> None:
        """Queue what has its ticket, in the order of tickets. The caller holds the lock, and is in nobody's middle."""
        drawn = self._drawn
        while drawn:
            for call in sorted(drawn, key=lambda call: call.ticket):
                drawn.remove(call)
                self._scheduler.submit(call)
                if call.ticket:
                    self._due = call.ticket

    def _settle(self) -> None:
        """Queue what a finalizer has submitted in the middle of something that was just about to end."""
        while self._drawn and self._queueing.acquire(blocking=False):
            try:
                if self._depth:
                    return
                try:
                    self._depth = 1
                    self._take_in()
                finally:
                    self._depth = 0
            finally:
                self._queueing.release()

    def finish(self, tickets: dict[int, int]) -> None:
        """A burst is committed: lower the flags, but that of a P1 that a task has submitted and that is queued."""
        with self._queueing:
            try:
                self._depth = 1
                # First this: a ticket that is drawn after it is beyond what is lowered.
                up_to = self._gate.raised
                self._take_in()
                if self._due:
                    first = self._scheduler.first_write(0)
                    if first is None:
                        self._due = 0
                    else:
                        up_to = first.ticket - 1
                self._gate.finish(tickets, up_to)
            finally:
                self._depth = 0
        if self._drawn:
            self._settle()

    # wire.future.AnswerSource

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Raise: this can never end."""
        self._refuse_child("this future belongs to the parent process; in a forked child, submit the task again")
        if timeout != 0:
            raise StrictFlowError(
                f"a task waits inside SF-LOOP for {future.label}(), which runs only after it: this can never "
                "end; await it in an async @read, or let the caller wait",
                flow=self.name,
            )

    def serve(self, *, is_to_sleep: bool = False) -> None:
        """Nothing to do: SF-LOOP itself settles these futures."""

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Take back what a task has submitted."""
        self._refuse_child("this future belongs to the parent process; in a forked child, submit the task again")
        call = self._scheduler.cancel(0, future.seq)
        if call is not None:
            future.settle_cancelled()
        return call is not None

    def __repr__(self) -> str:
        return f"<Inside of flow {self.name!r}>"


def _nothing() -> None:
    """In place of a runner, where there is none."""


class _LocalFuture(TaskFuture[Any]):
    """The future of a task that a task submitted."""

    # SF-LOOP's thread is the main one here, and settles it.
    _signals_are_users = False

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
