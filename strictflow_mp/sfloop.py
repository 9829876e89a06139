"""SF-LOOP: runs every task of a flow, one thread, one at a time.

It performs what `scheduler` decides: drains the pipes, has a burst of P1 tasks run (`runner`), then one P2 task, or a
step of the async ones; then looks again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from . import functions, wire
from .core import logger
from .errors import CoordinatorLost, FlowNotRunning, ProtocolError, SerializationError, StrictFlowError, TaskCrashed
from .failures import pack_failure
from .gate import GateKeeper
from .inside import Inside
from .jobs import Broken, Call, Function
from .recorder import Recorder
from .runner import Runner
from .scheduler import ASYNC, BURST, CANCELLED, IDLE, READ, Scheduler
from .sessions import Session, Sessions
from .stepper import Stepper
from .store import StoreReader, StoreWriter
from .suspect import SLOT_SHIFT, Marker, loading_seq
from .transaction import Changes
from .values import pack, pack_key, unpack_frozen, unpack_key
from .wire import Frame

__all__ = ["SFLoop"]

HOUSEKEEPING = 0.25
"""Seconds between looks at what nobody tells us: owners and workers without a pidfd."""
DOOR = 1.0
"""Seconds that the frame of a flag that is up may take to arrive when the flow stops."""
SEQS = 1 << SLOT_SHIFT
"""Tasks that a process may number."""
LEAP = 1 << 24
"""How far the number of a P1 may lie ahead of the last one that was finished."""
FUNCTIONS = 1 << 16
"""Functions that a process may send."""
LOOKS = 1000
"""How often a P2 task looks for the frame of a flag that is up before it runs all the same."""


def _check_changes(changes: tuple[Any, ...]) -> None:
    """What a process packed itself goes into the state as it is: make sure that everybody can read it."""
    try:
        for key, payload in changes:
            if type(key) is not bytes or pack_key(unpack_key(key)) != key:
                raise ValueError("a key is not packed as keys are")
            if payload is not None:
                if type(payload) is not bytes:
                    raise TypeError("a value is not packed")
                unpack_frozen(payload)
    except SerializationError:
        pass  # sound, but of a type that is not known in this process
    except (Exception, SystemExit) as error:  # unpacking an Enum imports its module, which may do anything
        raise ProtocolError(f"a put's changes are damaged ({type(error).__name__}: {error!s:.200})") from error


class SFLoop:
    """The loop, and what it offers to the tasks that run in it."""

    def __init__(
        self,
        name: str,
        writer: StoreWriter,
        reader: StoreReader,
        gate: GateKeeper,
        sessions: Sessions,
        marker: Marker,
        recorder: Recorder,
        *,
        task_timeout: float | None,
        max_pending: int,
        report: Callable[[], dict[str, Any]],
    ) -> None:
        self.name = name
        self.gate = gate
        self.sessions = sessions
        self.scheduler: Scheduler[Call] = Scheduler()
        scheduler = self.scheduler
        self.stepper = stepper = Stepper(sessions.epoll.fileno())
        self.inside = inside = Inside(name, writer, reader, gate, scheduler, stepper, report, task_timeout)
        self.runner = Runner(name, writer, reader, gate, sessions, marker, scheduler, stepper, inside)
        self._recorder = recorder
        recorder.serve(self.runner)
        self._writer = writer
        self._receipts = writer.receipts
        self._max_pending = max_pending
        self._marker = marker
        self._stopping: bool | None = None  # None: no; else whether queued tasks are still run
        self._is_refusing = False
        self._stop_asked: list[tuple[Session, int]] = []

    # The loop

    def run(self) -> None:
        """Run until the flow is stopped or deserted."""
        scheduler = self.scheduler
        while True:
            idle = scheduler.next_step() is IDLE
            if idle and self._is_refusing:
                return
            self._drain(HOUSEKEEPING if idle else 0)
            if self._stopping is not None and not self._is_refusing:
                self._close_the_door(self._stopping)
            if idle:
                self.sessions.hurry()
            if idle and scheduler.is_idle and self.sessions.is_deserted:
                logger.info("the owner is gone and nobody is attached: the flow ends")
                return
            step = scheduler.next_step()
            if step is BURST:
                self.runner.run_burst()
            elif step in (READ, ASYNC) and not self._look_for_writes():
                if step is READ:
                    self.runner.run_read()
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
            sys.audit("strictflow_mp.loop.received")
            for frame in frames:
                try:
                    self._accept(session, frame)
                except Exception as error:
                    # Whatever a frame can bring about, it costs its own connection only.
                    sessions.expel(session, error)
                    break
        if sessions.has_newcomers:
            sessions.admit(self.scheduler.withdraw)
        if sessions.has_leavers:
            sessions.reclaim()
            self.runner.notices.keep(lambda session: session.is_open)
            self._recorder.look()

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
        if type(kind) is not int:
            raise ProtocolError("a frame's kind must be a number")
        if kind == wire.CALL:
            # As `check_fields`, spelled out: this comes with each task.
            if len(frame) != 6 or type(frame[3]) is not tuple:
                raise ProtocolError("a call has the wrong fields")
            _, number, function_id, batch, flag, ack = frame
            if not (type(number) is type(function_id) is type(flag) is type(ack) is int):
                raise ProtocolError("a call has the wrong fields")
            function = session.functions.get(function_id)
            if function is None:
                raise ProtocolError(f"a call names function {function_id}, which was not sent")
            self._receipts.acknowledge(session.tenant, ack)
            self._queue_calls(session, function, number, batch, flag)
        elif kind == wire.PUT:
            wire.check_fields(frame, int, tuple, int, int)
            _check_changes(frame[2])
            changes: Changes = dict(frame[2])
            self._receipts.acknowledge(session.tenant, frame[4])
            arrived = time.perf_counter_ns()
            self._queue(session, [Call(session.slot, frame[1], 1, session, None, b"", changes, frame[3], arrived)])
        elif kind == wire.FUNCTION:
            wire.check_fields(frame, int, bool, bytes, str, int, (bytes, type(None)), (float, int, type(None)))
            self._learn(session, *frame[1:])
        elif kind == wire.CANCEL:
            wire.check_fields(frame, int, int)
            job = self.scheduler.cancel(session.slot, frame[2])
            is_back = job is not None or self.runner.notices.drop(session, frame[2])
            if job is not None:
                if job.priority == 2:
                    session.queued -= 1
                self.runner.take_back(job)
            elif is_back:
                self.sessions.send(session, wire.pack_frame(wire.CANCELLED, frame[2]))
            else:
                self.runner.cancel_async(session.slot, frame[2])
            # Last: who has this believes it, and might submit the task again if it knew only that.
            self._reply(session, frame[1], is_back)
        elif kind == wire.STATS:
            wire.check_fields(frame, int)
            self._reply(session, frame[1], self.inside.stats())
        elif kind == wire.STOP:
            wire.check_fields(frame, int, bool)
            self._stop_asked.append((session, frame[1]))
            self.stop(drain=frame[2])
        elif kind == wire.COUNT:
            wire.check_fields(frame, int)
            self._queue(session, [Call(session.slot, 0, 1, session, None, b"", {}, frame[1], 0)], lowest=0)
        elif kind == wire.ACK:
            wire.check_fields(frame, int)
            self._receipts.acknowledge(session.tenant, frame[1])
        elif kind == wire.WATCH:
            wire.check_fields(frame, int, int, tuple)
            self._watch(session, *frame[1:])
        elif kind == wire.TRACE:
            wire.check_fields(frame, int, str, bool)
            self._trace(session, *frame[1:])
        elif kind == wire.GOODBYE:
            session.said_goodbye = True
            self.sessions.close(session)
        else:
            raise ProtocolError(f"frames of kind {kind} are not known")

    def _watch(self, session: Session, number: int, version: int, keys: tuple[Any, ...]) -> None:
        if not all(type(key) is bytes and key for key in keys):
            raise ProtocolError("the keys of a watch are not packed")
        notices = self.runner.notices
        notices.wait(session, number, version, keys, self._writer.version)
        for waiting, asked in notices.due():
            self._reply(waiting, asked, None)

    def _trace(self, session: Session, number: int, directory: str, on: bool) -> None:
        try:
            if on:
                self._recorder.start(session.tenant, directory)
            else:
                self._recorder.stop(directory)
        except (OSError, ValueError, StrictFlowError) as error:
            self.sessions.send(session, wire.pack_frame(wire.FAILURE, number, *pack_failure(error)))
        else:
            self._reply(session, number, None)

    def _reply(self, session: Session, number: int, value: Any) -> None:
        """Answer a question."""
        self.sessions.send(session, wire.pack_frame(wire.RESULT, number, (pack(value),)))

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
        if len(session.functions) >= FUNCTIONS:
            raise ProtocolError(f"more than {FUNCTIONS} functions were sent")
        if level not in (1, 2):
            raise ProtocolError(f"there is no priority {level}")
        target: Any
        try:
            if session.answered is not None and loading_seq(function_id) in session.answered:
                raise TaskCrashed("the coordinator died while it loaded it", flow=self.name)
            self._marker.mark_loading(session.slot, function_id)
            sys.audit("strictflow_mp.function.marked")
            target, _ = functions.decode(by_value, code)
            adopt = getattr(target, "__strictflow_adopt__", None)
            if adopt is not None:
                adopt(self.inside)
        except BaseException as error:
            target = Broken(name, error)
        finally:
            self._marker.clear()
        session.functions[function_id] = Function(target, name, level, key, self.inside.timeout_of(timeout))

    def _queue_calls(
        self, session: Session, function: Function, number: int, batch: tuple[Any, ...], flag: int
    ) -> None:
        for arguments in batch:
            if type(arguments) is not bytes:
                raise ProtocolError("the arguments of a call are not packed")
        arrived = time.perf_counter_ns()
        slot, priority = session.slot, function.priority
        step = 1 if priority == 1 else 0  # a P2 has no number
        self._queue(
            session,
            [
                Call(slot, number + index, priority, session, function, arguments, None, flag + index * step, arrived)
                for index, arguments in enumerate(batch)
            ],
        )

    def _queue(self, session: Session, calls: list[Call], lowest: int = 1) -> None:
        """Queue calls that came in one frame. Number 0 is that of no task: it is only counted."""
        if not calls:
            return
        first, last = calls[0], calls[-1]
        if first.number < lowest or last.number >= SEQS:
            raise ProtocolError(f"no task can be {first.number} in its connection")
        if first.flag < 0 or (first.number and (first.flag == 0) != (first.priority == 2)):
            raise ProtocolError(f"a P{first.priority} task cannot have number {first.flag}")
        if last.flag > self.gate.last_finished(first.owner) + LEAP:
            raise ProtocolError(f"number {last.flag} leaps ahead of all that went before")
        if session.queued + len(calls) > self._max_pending + 1:
            raise ProtocolError(f"more than {self._max_pending} of its tasks are queued")
        session.queued += len(calls)
        if first.number and session.answered is None and not self._is_refusing:
            self.scheduler.submit_all(calls)
        else:
            for call in calls:
                self.scheduler.submit(call)
                self._settle_at_once(session, call)

    def _settle_at_once(self, session: Session, call: Call) -> None:
        """Some calls are only counted, in their turn."""
        answer = None if session.answered is None else session.answered.get(call.number)
        if not call.number:
            self.scheduler.cancel(call.owner, call.number)
        elif answer is not None:
            self._answer_again(session, call, answer)
        elif self._is_refusing:
            # A refused P1 keeps its place in the queue, to be counted in its turn.
            self.scheduler.cancel(call.owner, call.number)
            if call.priority == 2:
                session.queued -= 1
            self.runner.fail(call, self._stopped())
            self.runner.send(call)

    def _answer_again(self, session: Session, call: Call, answer: bytes) -> None:
        """A former coordinator has run this task. A P1 keeps its place in the queue, to be counted in its turn."""
        self.scheduler.cancel(call.owner, call.number)
        if call.priority == 2:
            session.queued -= 1
        if not answer:
            error = CoordinatorLost(
                f"{call.name}() was executed and committed, but its result is lost: the coordinator died before it "
                "was answered, and shared memory had no room to keep it",
                flow=self.name,
            )
            self.runner.fail(call, error)
            answer = call.answer
        self.sessions.send(session, answer)

    def _drop_all(self) -> None:
        """Refuse what is queued. P1 tasks are counted as finished: nobody may wait for them."""
        numbers: dict[int, int] = {}
        while (job := self.scheduler.next_write(0, 0)) is not None:
            self._refuse(job)
            numbers[job.owner] = job.flag
        while self.scheduler.reads > len(self.stepper):
            self._refuse(self.scheduler.next_read())
        if numbers:
            self.gate.finish(numbers)

    def _stopped(self) -> FlowNotRunning:
        return FlowNotRunning("it was stopped before the task ran", flow=self.name)

    def _refuse(self, job: Call) -> None:
        if job.state is not CANCELLED:
            self.runner.fail(job, self._stopped())
            self.runner.send(job)
        if job.session is not None:
            job.session.queued -= 1

    # The end

    def answer_stops(self) -> None:
        """Tell those who asked for the stop that it is done."""
        for session, number in self._stop_asked:
            self._reply(session, number, None)

    def close(self) -> None:
        """Give up the asyncio loop."""
        self._recorder.close()
        self.stepper.close()
