"""SF-LOOP: runs every task of a flow, one thread, one at a time.

It performs what `scheduler` decides: drains the pipes, runs P1 tasks in bursts, publishes a burst with one
commit, counts it in the gate, wakes, answers; then one P2 task, or a step of the async ones; then looks again.

Order of a burst: slot 0's flag is raised; the tasks run, each in its own transaction; one commit; finished[]
    is stored; readers are woken; answers leave. So an answer never speaks of a state that cannot be read yet.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from types import CoroutineType
from typing import Any

from . import functions, wire
from .core import logger, priority
from .errors import (
    FlowNotRunning,
    IntegrityError,
    ProtocolError,
    SerializationError,
    StateFull,
    StrictFlowError,
    TaskFailed,
    TaskTimeout,
)
from .failures import pack_failure
from .gate import GateKeeper
from .inside import Inside
from .jobs import Broken, Call, Function, pack_result
from .scheduler import Job, Scheduler, State, Step
from .sessions import Session, Sessions
from .stats import Counters
from .stepper import Stepper, run_alone, within_time
from .store import StoreReader, StoreWriter
from .timelimit import TimeLimit
from .transaction import Burst, Changes, Transaction
from .values import pack, unpack, unpack_frozen, unpack_key
from .wire import Frame

__all__ = ["SFLoop"]

HOUSEKEEPING = 0.25
"""Seconds between looks at what nobody tells us: owners and workers without a pidfd."""
DOOR = 1.0
"""Seconds that the frame of a flag that is up may take to arrive when the flow stops."""
LOOKS = 1000
"""How often a P2 task looks for the frame of a flag that is up before it runs all the same."""


_NO_ARGUMENTS: tuple[Sequence[Any], dict[str, Any]] = ((), {})


def _check_changes(changes: tuple[Any, ...]) -> None:
    """What a process packed itself goes into the state as it is: make sure that everybody can read it."""
    try:
        for key, payload in changes:
            unpack_key(key)
            if payload is not None:
                unpack_frozen(payload)
    except SerializationError:
        pass  # sound, but of a type that is not known in this process
    except (TypeError, ValueError, ProtocolError) as error:
        raise ProtocolError(f"a put's changes are damaged ({error})") from error


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
        report: Callable[[], dict[str, Any]],
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
        self.inside = Inside(name, writer, reader, gate, self.scheduler, self.stepper, report)
        self._time_limit = TimeLimit()
        self._stopping: bool | None = None  # None: no; else whether queued tasks are still run
        self._is_refusing = False
        self._stop_asked: list[tuple[Session, int]] = []
        self._async_tasks: dict[tuple[int, int], asyncio.Task[Any]] = {}

    # The loop

    def run(self) -> None:
        """Run until the flow is stopped or deserted."""
        scheduler = self.scheduler
        while True:
            idle = scheduler.next_step() is Step.IDLE
            if idle and self._is_refusing:
                return
            self._drain(HOUSEKEEPING if idle else 0)
            if self._stopping is not None and not self._is_refusing:
                self._close_the_door(self._stopping)
            if idle and scheduler.is_idle and self.sessions.is_deserted:
                logger.info("the owner is gone and nobody is attached: the flow ends")
                return
            step = scheduler.next_step()
            if step is Step.BURST:
                self._run_burst()
            elif step in (Step.READ, Step.ASYNC) and not self._look_for_writes():
                if step is Step.READ:
                    self._run_read()
                else:
                    scheduler.async_ran()
                    # Alone, async tasks may have the thread until a pipe is readable.
                    self.stepper.run(0 if scheduler.reads > len(self.stepper) else HOUSEKEEPING)

    def stop(self, *, drain: bool = True) -> None:
        """Return from `run` soon: when all queued tasks have run (*drain*), or without running them."""
        self._stopping = drain

    def _close_the_door(self, drain: bool) -> None:
        """Take in what was submitted before the stop, then refuse what comes."""
        self._drain(0)
        deadline = time.monotonic() + DOOR
        while self.gate.is_up() and not self.scheduler.writes and time.monotonic() < deadline:
            self._drain(0.001)
        self._is_refusing = True
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
        if sessions.has_leavers:
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
            wire.check_fields(frame, int, int, bytes, int)
            _, number, function_id, arguments, flag = frame
            function = session.functions.get(function_id)
            if function is None:
                raise ProtocolError(f"a call names function {function_id}, which was not sent")
            self._queue(session, Call(session.slot, number, function.priority, session, function, arguments, {}, flag))
        elif kind == wire.PUT:
            wire.check_fields(frame, int, tuple, int)
            _check_changes(frame[2])
            changes: Changes = dict(frame[2])
            self._queue(session, Call(session.slot, frame[1], 1, session, None, b"", changes, frame[3]))
        elif kind == wire.FUNCTION:
            wire.check_fields(frame, int, bool, bytes, str, int, (bytes, type(None)), (float, int, type(None)))
            self._learn(session, *frame[1:])
        elif kind == wire.CANCEL:
            wire.check_fields(frame, int, int)
            job = self.scheduler.cancel(session.slot, frame[2])
            task = self._async_tasks.get((session.slot, frame[2]))
            if job is not None and job.priority == 2:
                session.queued -= 1
            if job is None and task is not None:
                task.cancel()
            self.sessions.send(session, wire.pack_frame(wire.RESULT, frame[1], pack(job is not None)))
            if job is not None:
                self.sessions.send(session, wire.pack_frame(wire.CANCELLED, frame[2]))
        elif kind == wire.STATS:
            wire.check_fields(frame, int)
            self.sessions.send(session, wire.pack_frame(wire.RESULT, frame[1], pack(self.inside.stats())))
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
                adopt(self.inside)
        except BaseException as error:
            target = Broken(name, error)
        session.functions[function_id] = Function(target, name, level, key, timeout)

    def _queue(self, session: Session, call: Call) -> None:
        if call.flag < 0 or (call.flag == 0) != (call.priority == 2):
            raise ProtocolError(f"a P{call.priority} task cannot have number {call.flag}")
        session.queued += 1
        self.scheduler.submit(call)
        if self._is_refusing:
            # A refused P1 keeps its place in the queue, to be counted in its turn.
            self.scheduler.cancel(call.owner, call.number)
            if call.priority == 2:
                session.queued -= 1
            self._fail(call, self._stopped())
            self._send(call)

    def _drop_all(self) -> None:
        """Refuse what is queued. P1 tasks are counted as finished: nobody may wait for them."""
        numbers: dict[int, int] = {}
        while (job := self.scheduler.next_write(0, 0)) is not None:
            assert isinstance(job, Call)
            self._refuse(job)
            numbers[job.owner] = job.flag
        while self.scheduler.reads > len(self.stepper):
            self._refuse(self.scheduler.next_read())
        if numbers:
            self.gate.finish(numbers)

    def _stopped(self) -> FlowNotRunning:
        return FlowNotRunning("it was stopped before the task ran", flow=self.name)

    def _refuse(self, job: Job) -> None:
        assert isinstance(job, Call)
        if job.state is not State.CANCELLED:
            self._fail(job, self._stopped())
            self._send(job)
        if job.session is not None:
            job.session.queued -= 1

    # P1

    def _run_burst(self) -> None:
        gate, scheduler = self.gate, self.scheduler
        gate.raise_own()
        burst = Burst(self.writer, self.reader)
        jobs: list[Call] = []
        numbers: dict[int, int] = {}
        tight = not self.writer.is_roomy()
        committed = 0  # jobs ahead of this one are in a commit already
        began = time.perf_counter()
        while job := scheduler.next_write(len(jobs), time.perf_counter() - began):
            assert isinstance(job, Call)
            jobs.append(job)
            numbers[job.owner] = job.flag
            if job.state is not State.CANCELLED:
                commits = burst.commits
                self._run_write(job, burst)
                if burst.commits != commits:
                    committed = len(jobs)
            if tight:
                break  # alone, so that it can only be itself that finds no room
        try:
            burst.publish()
        except StateFull as full:
            for job in jobs[committed:]:
                if not job.has_failed and job.state is not State.CANCELLED:
                    self._fail(job, full)
        gate.finish(numbers, self.inside.first_due())
        self._answer_writes(jobs)

    def _answer_writes(self, jobs: list[Call]) -> None:
        now = time.perf_counter_ns()
        counters = self.counters[1]
        answers: dict[Session, list[bytes]] = {}
        for job in jobs:
            session = job.session
            if session is not None:
                session.queued -= 1
            if job.state is State.CANCELLED:
                continue
            counters.ran(now - job.arrived, failed=job.has_failed)
            if session is not None:
                answers.setdefault(session, []).append(job.answer)
            elif job.future is not None:
                job.future.settle(job.outcome, job.failure)
        for session, frames in answers.items():
            self.sessions.send(session, b"".join(frames))
            if not session.is_open:
                self.sessions.has_leavers = True

    def _run_write(self, job: Call, burst: Burst) -> None:
        token = priority.set(1)
        transaction = self.inside.transaction = Transaction(burst)
        try:
            if job.function is not None:
                result = self._invoke(job, job.function, transaction)
                changes = transaction.changes()
            else:
                result, changes = None, job.changes
                for key, value in changes.items():
                    if value is None and burst.lookup(key) is None:
                        raise KeyError(unpack_key(key))
            payload = pack_result(result, job)
            if changes:
                burst.apply(changes)
            job.answer = wire.pack_frame(wire.RESULT, job.number, payload)
            job.outcome = result
        except BaseException as error:
            self._fail(job, error)
        finally:
            self.inside.transaction = None
            priority.reset(token)

    def _invoke(self, job: Call, function: Function, transaction: Transaction) -> Any:
        args, kwargs = unpack(job.arguments) if job.arguments else _NO_ARGUMENTS
        debug = logger.isEnabledFor(logging.DEBUG)
        if debug:
            logger.debug("%s starts", function.name)
        if function.key is None:
            result = self._within(function, args, kwargs)
        else:
            key = unpack_key(function.key)
            result = self._within(function, (transaction.get(key), *args), kwargs)
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

    def _within(self, function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call within the task's time. A coroutine is run to its end, alone."""

        def call() -> Any:
            result = function.function(*args, **kwargs)
            return run_alone(result) if isinstance(result, CoroutineType) else result

        return self._in_time(function, call)

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
        kept, result = self._time_limit.call(timeout, call)
        if not kept:
            raise self._overrun(function.name, timeout)
        return result

    # P2

    def _run_read(self) -> None:
        job = self.scheduler.next_read()
        assert isinstance(job, Call)
        assert job.function is not None
        function = job.function
        token = priority.set(2)
        try:
            args, kwargs = unpack(job.arguments) if job.arguments else _NO_ARGUMENTS
            if function.key is not None:
                args = [self.inside.committed.get(unpack_key(function.key)), *args]
            logger.debug("%s starts", function.name)
            result = self._in_time(function, lambda: function.function(*args, **kwargs))
            if isinstance(result, CoroutineType):
                self._start_async(job, function, result)
                return
            logger.debug("%s ends", function.name)
            self._succeed(job, result)
        except BaseException as error:
            self._fail(job, error)
        finally:
            priority.reset(token)
        self._finish_read(job)

    def _start_async(self, job: Call, function: Function, coroutine: Any) -> None:
        timeout = self._timeout(function)

        async def within() -> Any:
            try:
                kept, result = await within_time(coroutine, timeout)
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would let these out of the loop, and end the coordinator.
                raise TaskFailed(f"{function.name}() raised {error!r}", flow=self.name) from error
            if not kept:
                assert timeout is not None
                raise self._overrun(function.name, timeout)
            logger.debug("%s ends", function.name)
            return result

        def done(task: asyncio.Task[Any]) -> None:
            self.scheduler.async_ended()
            self._async_tasks.pop((job.owner, job.number), None)
            if task.cancelled():
                self._fail(job, StrictFlowError(f"{function.name}() was cancelled", flow=self.name))
                job.answer = wire.pack_frame(wire.CANCELLED, job.number)
            else:
                try:
                    self._succeed(job, task.result())
                except BaseException as error:
                    self._fail(job, error)
            self._finish_read(job)
            if len(self.stepper) == 0:
                self.stepper.stop_soon()

        self.scheduler.async_started()
        self._async_tasks[job.owner, job.number] = self.stepper.start(within(), done)

    def _finish_read(self, job: Call) -> None:
        self.counters[2].ran(time.perf_counter_ns() - job.arrived, failed=job.has_failed)
        if job.session is not None:
            job.session.queued -= 1
        self._send(job)

    # Answers

    def _succeed(self, job: Call, result: Any) -> None:
        job.answer = wire.pack_frame(wire.RESULT, job.number, pack_result(result, job))
        job.outcome = result

    def _fail(self, job: Call, error: BaseException) -> None:
        if isinstance(error, StrictFlowError) and error.flow is None:
            error.flow = self.name
        job.failure = error
        if job.session is None:
            logger.error("%s failed: %r", job.name, error)
            return
        text, blob = pack_failure(error)
        job.answer = wire.pack_frame(wire.FAILURE, job.number, text, blob)
        token = priority.set(job.priority)
        logger.warning("%s failed, nothing was committed: %r", job.name, error)
        priority.reset(token)

    def _send(self, job: Call) -> None:
        if job.session is not None:
            self.sessions.send(job.session, job.answer)
            if not job.session.is_open:
                self.sessions.has_leavers = True
        elif job.future is not None:
            job.future.settle(job.outcome, job.failure)

    def answer_stops(self) -> None:
        """Tell those who asked for the stop that it is done."""
        for session, number in self._stop_asked:
            self.sessions.send(session, wire.pack_frame(wire.RESULT, number, pack(None)))

    def close(self) -> None:
        """Give up the asyncio loop."""
        self.stepper.close()
