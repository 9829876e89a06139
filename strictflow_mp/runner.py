"""The runner: runs the tasks that SF-LOOP chooses, and answers them.

Order of a burst: slot 0's flag is raised; the tasks run, each in its own transaction; one commit, with the receipts
    of its tasks; finished[] is stored; readers are woken; answers leave. So an answer never speaks of a state that
    cannot be read yet.
If we die here: ahead of the commit no task of the burst has happened, behind it each has, and its receipt says so.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import CoroutineType
from typing import Any

from . import wire
from .answers import Answers
from .arguments import unpack_arguments
from .core import logger, priority
from .errors import IntegrityError, StateFull, StrictFlowError, TaskFailed, TaskTimeout
from .failures import pack_failure
from .gate import GateKeeper
from .inside import Inside
from .jobs import Call, Function, pack_result
from .scheduler import CANCELLED, Scheduler
from .sessions import Sessions
from .stats import Counters
from .stepper import Stepper, run_alone, within_time
from .store import StoreReader, StoreWriter
from .suspect import Marker
from .timelimit import TimeLimit
from .transaction import Burst, Transaction
from .values import pack, unpack_key

__all__ = ["Runner"]

audit = sys.audit


class Runner:
    """Runs tasks, one at a time."""

    def __init__(
        self,
        name: str,
        writer: StoreWriter,
        reader: StoreReader,
        gate: GateKeeper,
        sessions: Sessions,
        marker: Marker,
        scheduler: Scheduler[Call],
        stepper: Stepper,
        inside: Inside,
    ) -> None:
        self.name = name
        self._writer = writer
        self._reader = reader
        self._gate = gate
        self._sessions = sessions
        self._marker = marker
        self._scheduler = scheduler
        self._stepper = stepper
        self._inside = inside
        self._time_limit = TimeLimit()
        self._answers = Answers(writer.receipts, sessions, self.fail)
        self.notices = self._answers.notices
        self._burst = Burst(writer, reader, self._answers)
        self._transaction = Transaction(self._burst)
        self._is_debugging = False
        self._async_tasks: dict[tuple[int, int], asyncio.Task[Any]] = {}
        self.counters = {1: Counters(), 2: Counters()}

    # P1

    def run_burst(self) -> None:
        """Run the queued P1 tasks, as many as belong to a burst."""
        gate, scheduler = self._gate, self._scheduler
        gate.raise_own()
        burst = self._burst
        token = priority.set(1)
        jobs: list[Call] = []
        numbers: dict[int, int] = {}
        writer = self._writer
        tight, version = not writer.is_roomy(), writer.version
        self._is_debugging = logger.isEnabledFor(logging.DEBUG)
        clock = time.perf_counter
        began = clock()
        while job := scheduler.next_write(len(jobs), clock() - began):
            jobs.append(job)
            if not job.is_void:
                numbers[job.owner] = job.flag
            if job.state is not CANCELLED:
                self._run_write(job, burst)
            if tight or writer.version != version:
                break  # alone, or the last ahead of another look: so that it can only be itself that finds no room
        audit("strictflow_mp.burst.ran")
        try:
            burst.publish()
        except StateFull:
            with suppress(StateFull):
                burst.publish()  # that they have failed: it takes the room of their receipts only
        priority.reset(token)
        gate.finish(numbers, self._inside.first_due())
        self._answer_writes(jobs)

    def _answer_writes(self, jobs: list[Call]) -> None:
        for _ in self._answers.send():
            audit("strictflow_mp.answer.sent")
        # The rest while they are read.
        self._burst.tidy()
        now = time.perf_counter_ns()
        ran = [job for job in jobs if job.state is not CANCELLED]
        for job in jobs:
            session = job.session
            if session is not None:
                session.queued -= 1
                if not session.is_open:
                    self._sessions.has_leavers = True
            elif job.future is not None and job.state is not CANCELLED:
                job.future.settle(job.outcome, job.failure)
        self.counters[1].ran_all(now, ran)

    def _run_write(self, job: Call, burst: Burst) -> None:
        function = job.function
        try:
            if function is None:
                assert job.changes is not None
                for packed_key, packed in job.changes.items():
                    if packed is None and burst.lookup(packed_key) is None:
                        raise KeyError(unpack_key(packed_key))
                burst.apply(job.changes, job)
                return
            transaction = self._inside.transaction = self._transaction
            transaction.begin()
            try:
                self._marker.mark(job.owner, job.number)
                audit("strictflow_mp.task.marked")
                if self._is_debugging:
                    logger.debug("%s starts", function.name, extra=function.fields)
                args, kwargs = unpack_arguments(job.arguments)
                key = function.key
                if key is not None:
                    args = (transaction.take_out(key), *args)
                if function.timeout is None:
                    result = function.function(*args, **kwargs)
                    if type(result) is CoroutineType:
                        result = run_alone(result)  # to its end
                else:
                    result = self._call_in_time(function, args, kwargs)
                if key is None:
                    changes = transaction.changes()
                    job.payload = pack_result(result, job)
                else:
                    if result is None:
                        raise self._aborted(function)
                    job.payload = pack(result, function.path)
                if self._is_debugging:
                    logger.debug("%s ends", function.name, extra=function.fields)
            finally:
                self._marker.clear()
                self._inside.transaction = None
            job.outcome = result
            if key is None:
                burst.apply(changes, job)
            else:
                transaction.put_back(job.payload, result, job)
        except BaseException as error:
            if job.failure is not error:  # else the burst has said so
                self.fail(job, error)
            # If only later tasks of its process had receipts, the next coordinator would run this one again.
            self._answers.add_failed(job)

    def _aborted(self, function: Function) -> IntegrityError:
        return IntegrityError(
            f"{function.name}() returned None for key {function.plain_key!r}: nothing was committed; return the new "
            "value",
            flow=self.name,
            key=function.plain_key,
        )

    def _call_in_time(self, function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        assert function.timeout is not None

        def call() -> Any:
            result = function.function(*args, **kwargs)
            return run_alone(result) if type(result) is CoroutineType else result

        return self._in_time(function, function.timeout, call)

    def _overrun(self, name: str, timeout: float) -> TaskTimeout:
        return TaskTimeout(
            f"{name}() ran longer than its timeout of {timeout:g} s: stopped, nothing was committed; "
            "make it shorter, or give it a longer timeout=",
            flow=self.name,
        )

    def _in_time(self, function: Function, timeout: float, call: Callable[[], Any]) -> Any:
        self._marker.limit(timeout)
        try:
            kept, result = self._time_limit.call(timeout, call)
        finally:
            self._marker.unlimit()
        if not kept:
            raise self._overrun(function.name, timeout)
        return result

    # P2

    def run_read(self) -> None:
        """Run the P2 task whose turn it is; start it, if it is async."""
        job = self._scheduler.next_read()
        assert job.function is not None
        function = job.function
        token = priority.set(2)
        try:
            args, kwargs = unpack_arguments(job.arguments)
            if function.key is not None:
                args = [self._inside.committed.get(function.plain_key), *args]
            logger.debug("%s starts", function.name, extra=function.fields)
            self._marker.mark(job.owner, job.number)
            try:
                if function.timeout is None:
                    result = function.function(*args, **kwargs)
                else:
                    result = self._in_time(function, function.timeout, lambda: function.function(*args, **kwargs))
            finally:
                self._marker.clear()
            if isinstance(result, CoroutineType):
                self._start_async(job, function, result)
                return
            logger.debug("%s ends", function.name, extra=function.fields)
            self.succeed(job, result)
        except BaseException as error:
            self.fail(job, error)
        finally:
            priority.reset(token)
        self._finish_read(job)

    def _start_async(self, job: Call, function: Function, coroutine: Any) -> None:
        timeout = function.timeout

        async def within() -> Any:
            try:
                kept, result = await within_time(coroutine, timeout)
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would let these out of the loop, and end the coordinator.
                raise TaskFailed(f"{function.name}() raised {error!r}", flow=self.name) from error
            if not kept:
                assert timeout is not None
                raise self._overrun(function.name, timeout)
            logger.debug("%s ends", function.name, extra=function.fields)
            return result

        async def marked() -> Any:
            return await self._marker.marked(within(), job.owner, job.number)

        def done(task: asyncio.Task[Any]) -> None:
            self._scheduler.async_ended()
            self._async_tasks.pop((job.owner, job.number), None)
            if task.cancelled():
                self.fail(job, StrictFlowError(f"{function.name}() was cancelled", flow=self.name))
                job.answer = wire.pack_frame(wire.CANCELLED, job.number)
            else:
                try:
                    self.succeed(job, task.result())
                except BaseException as error:
                    self.fail(job, error)
            self._finish_read(job)
            if len(self._stepper) == 0:
                self._stepper.stop_soon()

        self._scheduler.async_started()
        self._async_tasks[job.owner, job.number] = self._stepper.start(marked(), done)

    def cancel_async(self, owner: int, number: int) -> None:
        """Cancel an async P2 task that runs already, if there is such a one."""
        task = self._async_tasks.get((owner, number))
        if task is not None:
            task.cancel()

    def _finish_read(self, job: Call) -> None:
        self.counters[2].ran(time.perf_counter_ns() - job.arrived, job.has_failed)
        if job.session is not None:
            job.session.queued -= 1
        self.send(job)

    # Answers

    def succeed(self, job: Call, result: Any) -> None:
        """A task has returned: prepare its answer."""
        job.answer = wire.pack_frame(wire.RESULT, job.number, (pack_result(result, job),))
        job.outcome = result

    def fail(self, job: Call, error: BaseException) -> None:
        """A task has failed, or is refused: prepare its answer."""
        if isinstance(error, StrictFlowError) and error.flow is None:
            error.flow = self.name
        job.failure = error
        if job.session is None:
            logger.error("%s failed: %r", job.name, error, extra=_about(job, error))
            return
        text, blob = pack_failure(error)
        job.answer = wire.pack_frame(wire.FAILURE, job.number, text, blob)
        token = priority.set(job.priority)
        logger.warning("%s failed, nothing was committed: %r", job.name, error, extra=_about(job, error))
        priority.reset(token)

    def take_back(self, job: Call) -> None:
        """A task that waits was cancelled: tell its process."""
        job.answer = wire.pack_frame(wire.CANCELLED, job.number)
        if job.priority == 1:
            # Not to be run by the next coordinator either, when it is sent there again.
            self._answers.add(job)
        self.send(job)

    def send(self, job: Call) -> None:
        """Send a prepared answer."""
        if job.session is not None:
            self._sessions.send(job.session, job.answer)
            if not job.session.is_open:
                self._sessions.has_leavers = True
        elif job.future is not None:
            job.future.settle(job.outcome, job.failure)

    def __repr__(self) -> str:
        return f"<Runner of flow {self.name!r}>"


def _about(job: Call, error: BaseException) -> dict[str, Any]:
    """For log lines: which task failed, and how."""
    about = {"task": job.name, "priority": job.priority, "error": type(error).__name__}
    if job.session is not None:
        about |= {"peer": job.session.identity.pid, "slot": job.session.slot}
    return about
