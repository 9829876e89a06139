"""SF-LOOP: runs every task of a flow, one thread, one at a time.

It performs what `scheduler` decides: drains the pipes, runs P1 tasks in bursts, publishes a burst with one
commit, counts it in the gate, wakes, answers; then one P2 task, or a step of the async ones; then looks again.

Order of a burst: slot 0's flag is raised; the tasks run, each in its own transaction; one commit; finished[]
    is stored; readers are woken; answers leave. So an answer never speaks of a state that cannot be read yet.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from . import functions, wire
from .core import logger, priority
from .errors import (
    FlowNotRunning,
    IntegrityError,
    ProtocolError,
    ReadOnlyState,
    StateFull,
    StrictFlowError,
    TaskFailed,
    TaskTimeout,
)
from .failures import pack_failure
from .future import TaskFuture
from .gate import GateKeeper
from .scheduler import Job, Scheduler, State, Step
from .sessions import Session, Sessions
from .state import View
from .stats import Counters
from .stepper import Stepper, run_alone
from .store import StoreReader, StoreWriter, Version
from .transaction import Burst, Changes, Transaction
from .values import pack, unpack, unpack_key
from .wire import Frame

__all__ = ["SFLoop"]

HOUSEKEEPING = 0.25
"""Seconds between looks at what nobody tells us: owners and workers without a pidfd."""
LOOKS = 1000
"""How often a P2 task looks for the frame of a flag that is up before it runs all the same."""


class Function:
    """A function that a process has sent, and how to run it."""

    def __init__(self, target: Any, name: str, priority: int, key: bytes | None, timeout: float | None) -> None:
        self.function = functions.function_of(target)
        self.name = name
        self.priority = priority
        self.key = key
        self.timeout = timeout


class _Call(Job):
    """A call of a function, or a ready-made P1 (then `changes` is set)."""

    session: Session | None = None
    function: Function | None = None
    arguments: bytes = b""
    changes: Changes | None = None
    future: _LocalFuture | None = None
    arrived: int = 0
    answer: bytes = b""
    has_failed: bool = False

    @property
    def name(self) -> str:
        return self.function.name if self.function else "put"


class _Overrun(BaseException):
    """Raised inside a task that runs too long; not an Exception, so that the task does not catch it."""


class _Inside(View):
    """The committed state as P2 tasks in SF-LOOP see it: nothing moves while they run, so no pin is needed."""

    def __init__(self, writer: StoreWriter, reader: StoreReader) -> None:
        self._writer = writer
        self._reader = reader
        self._version = Version(-1, 0, 0)

    def _at(self) -> Version:
        if self._version.number != self._writer.version:
            root, count = self._writer.tree
            # Not exact: arrays are copied, for the tree may change while an async task sleeps.
            self._version = Version(self._writer.version, root, count, is_exact=False)
        return self._version


class _LoopState(MutableMapping[Any, Any]):
    """``flow.state`` inside SF-LOOP: the transaction of the P1 task that runs, else the committed state."""

    def __init__(self, loop: SFLoop) -> None:
        self._loop = loop

    def _for_change(self) -> Transaction:
        transaction = self._loop.transaction
        if transaction is None:
            raise ReadOnlyState(
                "the state was changed inside a P2 task; change it in a task decorated with @write",
                flow=self._loop.name,
            )
        return transaction

    @property
    def _now(self) -> Any:
        return self._loop.transaction if self._loop.transaction is not None else self._loop.committed

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
        return f"<state of flow {self._loop.name!r} inside SF-LOOP: {self._now!r}>"


class SFLoop:
    """The loop, and what it offers to the tasks that run in it."""

    def __init__(
        self,
        name: str,
        writer: StoreWriter,
        reader: StoreReader,
        gate: GateKeeper,
        sessions: Sessions,
        *,
        task_timeout: float | None,
    ) -> None:
        self.name = name
        self.writer = writer
        self.reader = reader
        self.gate = gate
        self.sessions = sessions
        self.task_timeout = task_timeout
        self.scheduler = Scheduler()
        self.stepper = Stepper(sessions.epoll.fileno())
        self.counters = {1: Counters(), 2: Counters()}
        self.transaction: Transaction | None = None
        self.committed = _Inside(writer, reader)
        self.state: MutableMapping[Any, Any] = _LoopState(self)
        self.report: Callable[[], dict[str, Any]] = dict
        self._thread = threading.get_ident()
        self._stopping: bool | None = None  # None: no; else whether queued tasks are still run
        self._stop_asked: list[tuple[Session, int]] = []
        self._next_local = 0
        self._async_jobs: dict[tuple[Any, int], Any] = {}
        self._may_interrupt = False
        self._interrupted = False
        signal.signal(signal.SIGALRM, self._on_alarm)

    # The loop

    def run(self) -> None:
        """Run until the flow is stopped or deserted."""
        scheduler = self.scheduler
        while True:
            idle = scheduler.next_step() is Step.IDLE
            if idle and self._stopping is not None:
                return
            self._drain(HOUSEKEEPING if idle else 0)
            if idle and self.sessions.is_deserted:
                logger.info("the owner is gone and nobody is attached: the flow ends")
                return
            step = scheduler.next_step()
            if step is Step.BURST:
                self._run_burst()
            elif step in (Step.READ, Step.ASYNC) and not self._look_for_writes():
                if step is Step.READ:
                    self._run_read()
                else:
                    # Alone, async tasks may have the thread until a pipe is readable.
                    self.stepper.run(0 if scheduler.reads > len(self.stepper) else HOUSEKEEPING)

    def stop(self, *, drain: bool = True) -> None:
        """Return from `run` soon: when all queued tasks have run (*drain*), or without running them."""
        self._stopping = drain
        if not drain:
            self._drop_all()

    def _drain(self, timeout: float) -> None:
        sessions = self.sessions
        for session, frames in sessions.poll(timeout):
            for frame in frames:
                try:
                    self._accept(session, frame)
                except ProtocolError as error:
                    sessions.expel(session, error)
                    break
        if sessions.has_leavers or (timeout and not sessions.epoll.closed):
            sessions.reclaim()

    def _look_for_writes(self) -> bool:
        """Before a P2 goes on: is a P1 queued? Its frame may still be in its pipe, but its flag is up."""
        if self.gate.is_open():
            return False
        for _ in range(LOOKS):
            if self.scheduler.writes:
                return True
            if not self.gate.is_up():
                return False
            self._drain(0.001)
        logger.warning("a flag is up and no frame comes; P2 tasks go on")
        return False

    # Frames

    def _accept(self, session: Session, frame: Frame) -> None:
        kind = frame[0]
        if kind == wire.CALL:
            wire.check_fields(frame, int, int, bytes)
            _, number, function_id, arguments = frame
            function = session.functions.get(function_id)
            if function is None:
                raise ProtocolError(f"a call names function {function_id}, which was not sent")
            call = _Call(session.slot, number, function.priority)
            call.function, call.arguments = function, arguments
            self._queue(session, call)
        elif kind == wire.PUT:
            wire.check_fields(frame, int, tuple)
            _, number, changes = frame
            call = _Call(session.slot, number, 1)
            try:
                call.changes = {bytes(key): payload for key, payload in changes}
            except (TypeError, ValueError) as error:
                raise ProtocolError("a put's changes are damaged") from error
            self._queue(session, call)
        elif kind == wire.FUNCTION:
            wire.check_fields(frame, int, bool, bytes, str, int, (bytes, type(None)), (float, int, type(None)))
            self._learn(session, *frame[1:])
        elif kind == wire.CANCEL:
            wire.check_fields(frame, int, int)
            job = self.scheduler.cancel(session.slot, frame[2])
            task = self._async_jobs.get((session.slot, frame[2]))
            if job is not None and job.priority == 2:
                session.queued -= 1
            if job is None and task is not None:
                task.cancel()
            self.sessions.send(session, wire.pack_frame(wire.RESULT, frame[1], pack(job is not None)))
            if job is not None:
                self.sessions.send(session, wire.pack_frame(wire.CANCELLED, frame[2]))
        elif kind == wire.STATS:
            wire.check_fields(frame, int)
            self.sessions.send(session, wire.pack_frame(wire.RESULT, frame[1], pack(self.report())))
        elif kind == wire.STOP:
            wire.check_fields(frame, int, bool)
            self._stop_asked.append((session, frame[1]))
            self.stop(drain=frame[2])
        elif kind == wire.GOODBYE:
            session.said_goodbye = True
            self.sessions.close(session)
        else:
            raise ProtocolError(f"frames of kind {kind!r} are not known")

    def _learn(
        self,
        session: Session,
        function_id: int,
        by_value: bool,
        code: bytes,
        name: str,
        level: int,
        key: bytes | None,
        timeout: float | None,
    ) -> None:
        if level not in (1, 2):
            raise ProtocolError(f"there is no priority {level}")
        try:
            target, _ = functions.decode(by_value, code)
            adopt = getattr(target, "__strictflow_adopt__", None)
            if adopt is not None:
                adopt(self)
        except BaseException as error:
            target = _Broken(name, error)
        session.functions[function_id] = Function(target, name, level, key, timeout)

    def _queue(self, session: Session, call: _Call) -> None:
        call.session = session
        call.arrived = time.perf_counter_ns()
        session.queued += 1
        self.scheduler.submit(call)
        if self._stopping is not None:
            self._drop_all()

    def _drop_all(self) -> None:
        """Refuse what is queued. P1 tasks are counted as finished: nobody may wait for them."""
        counts: dict[int, int] = {}
        while (job := self.scheduler.next_write(0, 0)) is not None:
            self._refuse(job)
            counts[job.owner] = counts.get(job.owner, 0) + 1  # type: ignore[index,call-overload]
        while self.scheduler.reads > len(self.stepper):
            self._refuse(self.scheduler.next_read())
        if counts:
            self.gate.finish(counts)

    def _refuse(self, job: Job) -> None:
        assert isinstance(job, _Call)
        if job.state is not State.CANCELLED:
            self._fail(job, FlowNotRunning("the flow was stopped before the task ran", flow=self.name))
            self._send(job)
        if job.session is not None:
            job.session.queued -= 1

    # P1

    def _run_burst(self) -> None:
        gate, scheduler = self.gate, self.scheduler
        gate.raise_own()
        burst = Burst(self.writer, self.reader)
        jobs: list[_Call] = []
        counts: dict[int, int] = {}
        limit = None if self.writer.roomy() else 1
        began = time.perf_counter()
        while limit is None or len(jobs) < limit:
            job = scheduler.next_write(len(jobs), time.perf_counter() - began)
            if job is None:
                break
            assert isinstance(job, _Call)
            jobs.append(job)
            slot: int = job.owner  # type: ignore[assignment]
            counts[slot] = counts.get(slot, 0) + 1
            if job.state is not State.CANCELLED:
                self._run_write(job, burst)
        try:
            burst.publish()
        except StateFull as full:
            for job in jobs:
                if not job.has_failed and job.state is not State.CANCELLED:
                    self._fail(job, full)
        counts.pop(0, None)  # tasks that tasks submitted: slot 0 counts bursts
        gate.finish(counts)
        now = time.perf_counter_ns()
        counters = self.counters[1]
        for job in jobs:
            if job.session is not None:
                job.session.queued -= 1
            if job.state is not State.CANCELLED:
                counters.ran(now - job.arrived, failed=job.has_failed)
                self._send(job)

    def _run_write(self, job: _Call, burst: Burst) -> None:
        token = priority.set(1)
        transaction = self.transaction = Transaction(burst)
        try:
            if job.changes is not None:
                for key, payload in job.changes.items():
                    if payload is None and burst.lookup(key) is None:
                        raise KeyError(unpack_key(key))
                result, changes = None, job.changes
            else:
                result = self._invoke(job, transaction)
                changes = transaction.changes()
            answer = wire.pack_frame(wire.RESULT, job.number, pack(result, f"result of {job.name}()"))
            if changes:
                burst.apply(changes)
            job.answer = answer
            if job.future is not None:
                job.future.outcome = result
        except BaseException as error:
            self._fail(job, error)
        finally:
            self.transaction = None
            priority.reset(token)

    def _invoke(self, job: _Call, transaction: Transaction) -> Any:
        function = job.function
        assert function is not None
        args, kwargs = unpack(job.arguments) if job.arguments else ((), {})
        debug = logger.isEnabledFor(10)
        if debug:
            logger.debug("%s starts", function.name)
        if function.key is None:
            result = self._within(function, lambda: function.function(*args, **kwargs))
        else:
            key = unpack_key(function.key)
            value = transaction.get(key)
            result = self._within(function, lambda: function.function(value, *args, **kwargs))
            if result is None:
                raise IntegrityError(
                    f"{function.name}() returned None for key {key!r}: nothing was committed; return the new value",
                    flow=self.name,
                    key=key,
                )
            transaction[key] = result
        if debug:
            logger.debug("%s ends", function.name)
        return result

    def _within(self, function: Function, call: Callable[[], Any]) -> Any:
        """Call within the task's time. A coroutine is run to its end, alone."""
        result = self._in_time(function, call)
        if not inspect.iscoroutine(result):
            return result
        timeout = self._timeout(function)
        try:
            return run_alone(result, timeout)
        except asyncio.TimeoutError:
            if timeout is None:
                raise
            raise self._overrun(function.name, timeout) from None

    def _timeout(self, function: Function) -> float | None:
        return function.timeout if function.timeout is not None else self.task_timeout

    def _overrun(self, name: str, timeout: float) -> TaskTimeout:
        return TaskTimeout(
            f"{name}() ran longer than its timeout of {timeout:g} s: stopped, nothing was committed; "
            "make it shorter, or give it a longer timeout=",
            flow=self.name,
        )

    def _in_time(self, function: Function, call: Callable[[], Any]) -> Any:
        timeout = self._timeout(function)
        if timeout is None:
            return call()
        with self._limit(timeout, function.name):
            return call()

    @contextmanager
    def _limit(self, timeout: float, name: str) -> Iterator[None]:
        self._interrupted = False
        self._may_interrupt = True
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, timeout)
                yield
            finally:
                self._may_interrupt = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _Overrun:
            pass
        if self._interrupted:
            raise self._overrun(name, timeout)

    def _on_alarm(self, number: int, frame: Any) -> None:
        if self._may_interrupt:
            self._may_interrupt = False
            self._interrupted = True
            raise _Overrun

    # P2

    def _run_read(self) -> None:
        job = self.scheduler.next_read()
        assert isinstance(job, _Call)
        assert job.function is not None
        function = job.function
        token = priority.set(2)
        try:
            args, kwargs = unpack(job.arguments) if job.arguments else ((), {})
            if function.key is not None:
                args = [self.committed.get(unpack_key(function.key)), *args]
            if inspect.iscoroutinefunction(function.function):
                self._start_async(job, function, function.function(*args, **kwargs))
                return
            result = self._in_time(function, lambda: function.function(*args, **kwargs))
            if inspect.iscoroutine(result):
                self._start_async(job, function, result)
                return
            self._succeed(job, result)
        except BaseException as error:
            self._fail(job, error)
        finally:
            priority.reset(token)
        self._finish_read(job)

    def _start_async(self, job: _Call, function: Function, coroutine: Any) -> None:
        timeout = self._timeout(function)

        async def within() -> Any:
            try:
                return await asyncio.wait_for(coroutine, timeout)
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would let these out of the loop, and end the coordinator.
                raise TaskFailed(f"{function.name}() raised {error!r}", flow=self.name) from error

        def done(task: asyncio.Task[Any]) -> None:
            self.scheduler.async_ended()
            del self._async_jobs[job.owner, job.number]
            if task.cancelled():
                self._fail(job, StrictFlowError(f"{function.name}() was cancelled", flow=self.name))
                job.answer = wire.pack_frame(wire.CANCELLED, job.number)
            else:
                error = task.exception()
                if isinstance(error, asyncio.TimeoutError) and timeout is not None:
                    error = self._overrun(function.name, timeout)
                if error is not None:
                    self._fail(job, error)
                else:
                    try:
                        self._succeed(job, task.result())
                    except StrictFlowError as unserialisable:
                        self._fail(job, unserialisable)
            self._finish_read(job)
            if len(self.stepper) == 0:
                self.stepper.stop_soon()

        self.scheduler.async_started()
        self._async_jobs[job.owner, job.number] = self.stepper.start(within(), done)

    def _finish_read(self, job: _Call) -> None:
        self.counters[2].ran(time.perf_counter_ns() - job.arrived, failed=job.has_failed)
        if job.session is not None:
            job.session.queued -= 1
        self._send(job)

    # Answers

    def _succeed(self, job: _Call, result: Any) -> None:
        job.answer = wire.pack_frame(wire.RESULT, job.number, pack(result, f"result of {job.name}()"))
        if job.future is not None:
            job.future.outcome = result

    def _fail(self, job: _Call, error: BaseException) -> None:
        job.has_failed = True
        if isinstance(error, StrictFlowError) and error.flow is None:
            error.flow = self.name
        if job.future is not None:
            job.future.failure = error
        if job.session is None:
            logger.error("%s failed: %r", job.name, error)
            return
        text, blob = pack_failure(error)
        job.answer = wire.pack_frame(wire.FAILURE, job.number, text, blob)
        token = priority.set(job.priority)
        logger.warning("%s failed, nothing was committed: %r", job.name, error)
        priority.reset(token)

    def _send(self, job: _Call) -> None:
        if job.session is not None:
            self.sessions.send(job.session, job.answer)
            if not job.session.is_open:
                self.sessions.has_leavers = True
        elif job.future is not None:
            job.future.settle_local()

    def answer_stops(self) -> None:
        """Tell those who asked for the stop that it is done."""
        for session, number in self._stop_asked:
            self.sessions.send(session, wire.pack_frame(wire.RESULT, number, pack(None)))

    # What tasks submit (`place.Inside`)

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Queue calls of a task from inside a task."""
        function = Function(task, task.name, task.priority, task.packed_key, task.timeout)
        queued = []
        for args, kwargs in calls:
            arguments = pack([list(args), kwargs], f"arguments of {task.name}()")
            queued.append(self._queue_local(task.priority, task.name, function=function, arguments=arguments))
        return queued

    def put(self, changes: Changes) -> Any:
        """Queue a ready-made P1 from inside a task."""
        return self._queue_local(1, "put", changes=changes)

    def _queue_local(self, level: int, name: str, **fields: Any) -> TaskFuture[Any]:
        self._next_local += 1
        job = _Call(0, self._next_local, level)
        for field, value in fields.items():
            setattr(job, field, value)
        job.arrived = time.perf_counter_ns()
        future = job.future = _LocalFuture(self, self._next_local, name)
        self.scheduler.submit(job)
        self.stepper.stop_soon()
        return future

    def stats(self) -> dict[str, Any]:
        """The statistics, at once."""
        return self.report()

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Waiting inside SF-LOOP can never end (`future.Port`)."""
        if timeout != 0:
            raise StrictFlowError(
                f"a task waits inside SF-LOOP for {future.label}(), which runs only after it: this can never "
                "end; await it in an async @read, or let the caller wait",
                flow=self.name,
            )

    def serve(self) -> None:
        """Nothing to do: SF-LOOP itself settles local futures (`future.Port`)."""

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Take back what a task has submitted (`future.Port`)."""
        job = self.scheduler.cancel(0, future.number)
        if job is not None:
            future.settle_cancelled()
        return job is not None

    def close(self) -> None:
        """Give up the asyncio loop."""
        self.stepper.close()


class _LocalFuture(TaskFuture[Any]):
    """The future of a task that a task submitted."""

    outcome: Any = None
    failure: BaseException | None = None

    def __await__(self) -> Any:
        if self._port.transaction is not None:  # type: ignore[attr-defined]
            self._port.wait(self, None)
        return super().__await__()

    def settle_local(self) -> None:
        """Hand on what SF-LOOP found."""
        self.settle(self.outcome, self.failure)


class _Broken:
    """Stands for a function that could not be loaded: every call of it fails with the reason."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.__strictflow_function__ = self._fail
        self._reason = (
            f"the function of {name}() could not be loaded in the coordinator: {type(error).__name__}: {error}; "
            "make its module importable there"
        )

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        raise StrictFlowError(self._reason)
