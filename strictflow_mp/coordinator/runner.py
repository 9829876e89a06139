"""The runner: runs the tasks that SF-LOOP chooses, and answers them.

Order of a burst: slot 0's flag is raised; the tasks run, each in its own transaction; one commit, with the receipts
    of its tasks; finished[] is stored; readers are woken; answers leave. So an answer never speaks of a state that
    cannot be read yet.
If we die here: before the commit no task of the burst has happened; after it each has, and its receipt says so.
Invariants: SUSPECT names a task of a process while its function runs. Whatever a task raises is its own failure, and
    ends neither the burst nor the coordinator.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from inspect import CORO_CREATED, getcoroutinestate
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from ..core import READ_PRIORITY, WRITE_PRIORITY, logger, priority
from ..errors import IntegrityError, StateFull, StrictFlowError, TaskFailed, TaskTimeout
from ..values.codec import pack
from ..values.keys import unpack_key
from ..wire import frames
from ..wire.arguments import unpack_arguments
from ..wire.failures import let_go_of_frames, pack_failure, type_of, words_of
from .answers import Answers
from .burst import Burst
from .calls import Call, Function, pack_result
from .counters import Counters
from .operations import OPERATIONS
from .scheduler import CANCELLED
from .stepper import let_go, run_alone, within_time
from .timelimit import TimeLimit
from .transaction import Transaction

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from .inside import Inside
    from .parts import Parts

__all__ = ["Runner"]

audit = sys.audit


class Runner:
    """Runs tasks, one at a time."""

    def __init__(self, parts: Parts, inside: Inside) -> None:
        self.name = parts.flow
        self._writer = parts.writer
        self._gate = parts.gate
        self._sessions = parts.sessions
        self._marker = parts.marker
        self._scheduler = parts.scheduler
        self._stepper = parts.stepper
        self._inside = inside
        self._time_limit = TimeLimit()
        self._answers = Answers(parts.writer.receipts, parts.sessions, self.fail)
        inside.publish = self._publish
        self.notices = self._answers.notices
        # One for all bursts; between them it is empty.
        self._burst = Burst(parts.writer, parts.reader, self._answers)
        # One for all P1 tasks, begun anew for each: they never overlap.
        self._transaction = Transaction(self._burst)
        # Whether the burst that runs writes DEBUG lines: asked once a burst.
        self._is_debugging = False
        # Async P2 tasks under way, by slot and seq: to be cancelled.
        self._async_tasks: dict[tuple[int, int], asyncio.Task[Any]] = {}
        # From then on async tasks that are cancelled get no answer: the next coordinator runs them again.
        self.is_leaving = False
        # By priority; each task that has run counts once, as it is answered.
        self.counters = {WRITE_PRIORITY: Counters(), READ_PRIORITY: Counters()}

    # P1

    def run_burst(self) -> None:
        """Run the queued P1 tasks, as many as belong to a burst."""
        gate, scheduler = self._gate, self._scheduler
        inside = self._inside
        # The flag is up for the whole burst, whether or not its processes have counted their tasks yet.
        gate.raise_own()
        burst = self._burst
        token = priority.set(WRITE_PRIORITY)
        calls: list[Call] = []
        # By slot, up to which ticket P1 tasks are finished. A slot's calls come in their order, so the last one counts.
        tickets: dict[int, int] = {}
        writer = self._writer
        tight, version = not writer.is_roomy(), writer.version
        self._is_debugging = logger.isEnabledFor(logging.DEBUG)
        clock = time.perf_counter
        began = clock()
        while call := scheduler.next_write(len(calls), clock() - began):
            calls.append(call)
            if not call.is_void:
                tickets[call.slot] = call.ticket
            if call.state is not CANCELLED:
                self._run_write(call, burst)
            if tight or writer.version != version:
                # Little room is left, or a heavy task was committed apart from the burst. Then the burst ends here: if
                # the commit finds no room, this one task fails, and no other with it.
                break
        audit("strictflow_mp.burst.ran")
        self._publish()
        priority.reset(token)
        # After the commit: a read that the flag lets pass finds the burst's version.
        inside.finish(tickets)
        self._answer_writes(calls)

    def _publish(self) -> None:
        """Commit what the burst has so far."""
        try:
            self._burst.publish()
        except StateFull:
            with suppress(StateFull):
                self._burst.publish()  # that they have failed: it takes the room of their receipts only

    def _answer_writes(self, calls: list[Call]) -> None:
        # After `finish`: a process that has its answer reads what its task has written.
        for _ in self._answers.send():
            audit("strictflow_mp.answer.sent")
        # The rest while they are read.
        self._burst.tidy()
        now = time.perf_counter_ns()
        ran = [call for call in calls if call.state is not CANCELLED]
        for call in calls:
            session = call.session
            if session is not None:
                session.queued -= 1
                if not session.is_open:
                    self._sessions.has_leavers = True  # this may have been its last task
            elif call.future is not None and call.state is not CANCELLED:
                call.future.settle(call.outcome, call.failure)
        self.counters[WRITE_PRIORITY].ran_all(now, ran)

    def _run_write(self, call: Call, burst: Burst) -> None:
        function = call.function
        try:
            if function is None:
                asked = call.changes
                assert asked is not None
                if call.operation:
                    asked, call.payload = OPERATIONS[call.operation](burst, asked)
                else:
                    for packed_key, packed in asked.items():
                        if packed is None and burst.lookup(packed_key) is None:
                            raise KeyError(unpack_key(packed_key))
                burst.apply(asked, call)
                return
            transaction = self._inside.transaction = self._transaction
            transaction.begin()
            try:
                # Before anything of the task's is unpacked: that runs its code already.
                self._marker.mark(call.slot, call.seq)
                audit("strictflow_mp.task.marked")
                if self._is_debugging:
                    logger.debug("%s starts", function.name, extra=function.fields)
                args, kwargs = unpack_arguments(call.arguments)
                key = function.key
                if key is not None:
                    args = (transaction.take_out(key), *args)
                if function.timeout is None:
                    result = function.function(*args, **kwargs)
                    if type(result) is CoroutineType:
                        result = run_alone(self._marker.kept(result))  # to its end
                else:
                    result = self._call_in_time(function, args, kwargs)
                if key is None:
                    # Packed here, while it is marked: packing may run code of the values' classes.
                    changes = transaction.changes()
                    call.payload = pack_result(result, call)
                else:
                    if result is None:
                        raise self._aborted(function)
                    call.payload = pack(result, function.path, frames.MAX_BODY_BYTES)
                if self._is_debugging:
                    logger.debug("%s ends", function.name, extra=function.fields)
            finally:
                # Before the commit: a task whose receipt is committed is no suspect.
                self._marker.clear()
                self._inside.transaction = None
            call.outcome = result
            if key is None:
                burst.apply(changes, call)
            else:
                transaction.put_back(call.payload, result, call)
        except BaseException as error:
            if call.failure is not error:  # else the burst has said so
                self.fail(call, error)
            # If only later tasks of its process had receipts, the next coordinator would run this one again.
            self._answers.add_failed(call)

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
            return run_alone(self._marker.kept(result)) if type(result) is CoroutineType else result

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
            # A child that came back would wait for ever for the thread that watches the time.
            kept, result = self._time_limit.call(timeout, self._marker.staying(call))
        finally:
            self._marker.unlimit()
        if not kept:
            raise self._overrun(function.name, timeout)
        return result

    # P2

    def run_read(self) -> None:
        """Run the P2 task whose turn it is; start it, if it is async."""
        call = self._scheduler.next_read()
        assert call.function is not None
        function = call.function
        token = priority.set(READ_PRIORITY)
        try:
            # Before anything of the task's is unpacked, and until its answer is packed: both may run its code.
            self._marker.mark(call.slot, call.seq)
            try:
                args, kwargs = unpack_arguments(call.arguments)
                if function.key is not None:
                    args = [self._inside.committed.get(function.plain_key), *args]
                logger.debug("%s starts", function.name, extra=function.fields)
                if function.timeout is None:
                    result = function.function(*args, **kwargs)
                else:
                    result = self._in_time(function, function.timeout, lambda: function.function(*args, **kwargs))
                if not isinstance(result, CoroutineType):
                    logger.debug("%s ends", function.name, extra=function.fields)
                    self.succeed(call, result)
            finally:
                self._marker.clear()
            if isinstance(result, CoroutineType):
                self._start_async(call, function, result)
                return
        except BaseException as error:
            self.fail(call, error)
        finally:
            priority.reset(token)
        self._finish_read(call)

    def _start_async(self, call: Call, function: Function, coroutine: Any) -> None:
        timeout = function.timeout
        is_answered = False  # at its deadline, whatever it does with its cancellation

        def tell() -> None:
            nonlocal is_answered
            assert timeout is not None
            is_answered = True
            self.fail(call, self._overrun(function.name, timeout))
            self.send(call)

        async def within() -> Any:
            try:
                # Marked is what the user wrote, not what waits for it: with a time limit that is another asyncio task.
                _, result = await within_time(self._marker.marked(coroutine, call.slot, call.seq), timeout, tell)
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would let these out of the loop, and end the coordinator.
                raise TaskFailed(f"{function.name}() raised {words_of(error)}", flow=self.name) from error
            logger.debug("%s ends", function.name, extra=function.fields)
            return result

        def done(task: asyncio.Task[Any]) -> None:
            self._scheduler.async_ended()
            self._async_tasks.pop((call.slot, call.seq), None)
            if getcoroutinestate(coroutine) == CORO_CREATED:
                coroutine.close()  # cancelled before its first step: or Python would say that nobody has awaited it
            if self.is_leaving and task.cancelled():
                pass
            elif is_answered:
                let_go(task)
                self._count_read(call)
            else:
                self._take_outcome(call, function, task)
                self._finish_read(call)
            if len(self._stepper) == 0:
                self._stepper.stop_soon()

        # From here on `done` sends the answer, in a later step of the loop.
        self._scheduler.async_started()
        self._async_tasks[call.slot, call.seq] = self._stepper.start(within(), done)

    def _take_outcome(self, call: Call, function: Function, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            let_go(task)
            self.fail(call, StrictFlowError(f"{function.name}() was cancelled", flow=self.name))
            call.answer = frames.pack_frame(frames.CANCELLED, call.seq)
            return
        try:
            with self._marker.marking(call.slot, call.seq):
                self.succeed(call, task.result())
        except BaseException as error:
            self.fail(call, error)

    def cancel_async(self, slot: int, seq: int) -> None:
        """Cancel an async P2 task that runs already, if there is such a one."""
        task = self._async_tasks.get((slot, seq))
        if task is not None:
            task.cancel()

    def cancel_all_async(self) -> None:
        """The flow stops without them."""
        for task in list(self._async_tasks.values()):
            task.cancel()

    def _finish_read(self, call: Call) -> None:
        self._count_read(call)
        self.send(call)

    def _count_read(self, call: Call) -> None:
        self.counters[READ_PRIORITY].ran(time.perf_counter_ns() - call.arrived, call.has_failed)
        if call.session is not None:
            call.session.queued -= 1
            if not call.session.is_open:
                self._sessions.has_leavers = True  # this may have been its last task

    # Answers

    def succeed(self, call: Call, result: Any) -> None:
        """A task has returned: prepare its answer."""
        call.answer = frames.pack_frame(frames.RESULT, call.seq, (pack_result(result, call),))
        call.outcome = result

    def fail(self, call: Call, error: BaseException) -> None:
        """A task has failed, or is refused: prepare its answer.

        The last resort: whatever the exception is, this does not fail (`wire.failures`); and if it ends the process,
        the task is marked.
        """
        call.failure = error
        with self._marker.marking(call.slot, call.seq):
            text, blob = pack_failure(error, self.name)
            words = words_of(error)
        # Its frames hold what the task had in its hands, and would until the garbage collector comes by.
        let_go_of_frames(error)
        if call.session is None:
            logger.error("%s failed: %s", call.name, words, extra=_about(call, error))
            return
        call.answer = frames.pack_frame(frames.FAILURE, call.seq, text, blob)
        token = priority.set(call.priority)
        logger.warning("%s failed, nothing was committed: %s", call.name, words, extra=_about(call, error))
        priority.reset(token)

    def take_back(self, call: Call) -> None:
        """A task that waits was cancelled: tell its process."""
        call.answer = frames.pack_frame(frames.CANCELLED, call.seq)
        if call.priority == WRITE_PRIORITY:
            # Not to be run by the next coordinator either, when it is sent there again.
            self._answers.add(call)
        self.send(call)

    def send(self, call: Call) -> None:
        """Send a prepared answer."""
        if call.session is not None:
            self._sessions.send(call.session, call.answer)
            if not call.session.is_open:
                self._sessions.has_leavers = True
        elif call.future is not None:
            call.future.settle(call.outcome, call.failure)

    def __repr__(self) -> str:
        return f"<Runner of flow {self.name!r}>"


def _about(call: Call, error: BaseException) -> dict[str, Any]:
    """For log lines: which task failed, and how."""
    about = {"task": call.name, "priority": call.priority, "error": type_of(error)}
    if call.session is not None:
        about |= {"peer": call.session.identity.pid, "slot": call.session.slot}
    return about
