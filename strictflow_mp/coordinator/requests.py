"""Requests: what the frames of processes ask for.

`accept` takes one frame and does it, or queues it as calls for the scheduler. Each kind of frame has its row in
`KINDS`: the fields that it must have, and the method that does it. CALL and PUT come with every task, and are handled
in line.

Invariants: a frame that breaks the form or a limit raises before anything of it is queued. A P1 is counted in its turn
    whatever becomes of it: one that is refused, cancelled or answered already stays in the queue, marked, until its
    burst stores its ticket in FINISHED.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..core import READ_PRIORITY, WRITE_PRIORITY
from ..errors import CoordinatorLost, FlowNotRunning, ProtocolError, SerializationError, TaskCrashed
from ..memory.suspect import SLOT_SHIFT, loading_seq
from ..system.paths import told_path
from ..values.codec import check, pack
from ..values.keys import pack_key, unpack_key
from ..wire import frames, functions
from ..wire.failures import words_of
from .admission import take_paths
from .calls import Broken, Call, Function
from .operations import KEYS_ASKED, OPERATIONS
from .reloads import Wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..values.changes import Changes
    from ..wire.frames import Frame
    from .inside import Inside
    from .parts import Parts
    from .recorder import Recorder
    from .reloads import Reloads
    from .runner import Runner
    from .sessions import Session

__all__ = ["Requests"]

SEQ_LIMIT = 1 << SLOT_SHIFT
"""The first seq that a process may not give: SUSPECT has no more bits for it."""
TICKET_LEAP = 1 << 24
"""How far the ticket of a P1 may lie beyond the last one that was finished."""
MAX_FUNCTIONS = 1 << 16
"""Functions of a process that are known at a time."""


class Request(NamedTuple):
    """What a frame of one kind must hold after its kind, and the method that does what it asks for."""

    fields: tuple[type | tuple[type, ...], ...] | None
    """As `frames.check_fields` wants them; None: they are not looked at."""
    handle: Callable[..., None]
    """Called with the requests, the session, and the fields."""


class Requests:
    """Does what frames ask for."""

    def __init__(
        self,
        parts: Parts,
        runner: Runner,
        inside: Inside,
        recorder: Recorder,
        reloads: Reloads,
        stop: Callable[..., None],
        max_pending: int,
    ) -> None:
        self._flow = parts.flow
        self._gate = parts.gate
        self._sessions = parts.sessions
        self._scheduler = parts.scheduler
        self._library = parts.library
        self._marker = parts.marker
        self._writer = parts.writer
        self._receipts = parts.writer.receipts
        self._runner = runner
        self._inside = inside
        self._recorder = recorder
        self.reloads = reloads
        self._stop = stop
        # One more: a process that comes back with as many as it may have sends a COUNT after them.
        self._max_queued = max_pending + 1
        # False until the loop has taken in what was submitted before a stop; then True for good.
        self.is_refusing = False
        # Sessions that asked for a stop, with the seq of the question: answered when the flow has stopped.
        self._stop_asked: list[tuple[Session, int]] = []

    def accept(self, session: Session, frame: Frame) -> None:
        """Do what a frame asks for.

        Raises:
            ProtocolError: it breaks the form, or a limit. (Or whatever else a hostile frame brings about.)
        """
        kind = frame[0]
        if type(kind) is not int:
            raise ProtocolError("a frame's kind must be a number")
        if kind == frames.CALL:
            # As `check_fields`, spelled out: this comes with each task.
            if len(frame) != 6 or type(frame[3]) is not tuple:
                raise ProtocolError("a call has the wrong fields")
            _, seq, function_id, batch, ticket, ack = frame
            if not (type(seq) is type(function_id) is type(ticket) is type(ack) is int):
                raise ProtocolError("a call has the wrong fields")
            function = session.functions.get(function_id)
            if function is None:
                raise ProtocolError(f"a call names function {function_id}, which was not sent")
            self._receipts.acknowledge(session.tenant, ack)
            self._queue_calls(session, function, seq, batch, ticket)
        elif kind == frames.PUT:
            frames.check_fields(frame, int, tuple, int, int)
            _check_changes(frame[2])
            changes: Changes = dict(frame[2])
            self._receipts.acknowledge(session.tenant, frame[4])
            arrived = time.perf_counter_ns()
            self._queue(session, [Call(session, frame[1], frame[3], None, b"", arrived, changes)])
        else:
            request = self.KINDS.get(kind)
            if request is None:
                raise ProtocolError(f"frames of kind {kind} are not known")
            if request.fields is not None:
                frames.check_fields(frame, *request.fields)
            request.handle(self, session, *frame[1:])

    # What each kind asks for

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
        origins: tuple[Any, ...],
    ) -> None:
        if len(session.functions) >= MAX_FUNCTIONS:
            raise ProtocolError(f"more than {MAX_FUNCTIONS} functions were sent")
        if level not in (WRITE_PRIORITY, READ_PRIORITY):
            raise ProtocolError(f"there is no priority {level}")
        if not all(type(entry) is tuple and tuple(map(type, entry)) == (str, str, bytes) for entry in origins):
            raise ProtocolError("the modules of a function are not told as they are")
        target: Any
        try:
            # `takeover` wrote this receipt: loading it has killed coordinators, and is not tried again.
            if session.answered is not None and loading_seq(function_id) in session.answered:
                raise TaskCrashed("the coordinator died while it loaded it", flow=self._flow)
            self._marker.mark_loading(session.slot, function_id)
            sys.audit("strictflow_mp.function.marked")
            with self._library.loading(origins, session.path):
                target, _ = functions.decode(by_value, code)
            adopt = getattr(target, "__strictflow_adopt__", None)
            if adopt is not None:
                adopt(self._inside)
        except BaseException as error:
            # Whatever it raises, it is the function's fault and not the connection's: its calls fail.
            target = Broken(
                f"the function of {name}() could not be loaded in the coordinator: {words_of(error)}; "
                "make its module importable there"
            )
        finally:
            self._marker.clear()
        target, is_same = self._library.vet(name, target, origins)
        if not is_same:
            self._sessions.send(session, frames.pack_frame(frames.DIFFERENT, function_id))
        session.functions[function_id] = Function(target, name, level, key, self._inside.timeout_of(timeout))

    def _reload(self, session: Session, seq: int, restarts: int) -> None:
        self._answer(session, seq, lambda: self.reloads.ask(session, seq, restarts, is_stopping=self.is_refusing))

    def _adopt(self, session: Session, seq: int, always: bool) -> None:
        self._answer(session, seq, lambda: self.reloads.adopt(session, always=always, is_stopping=self.is_refusing))

    def _take_paths(self, session: Session, paths: tuple[Any, ...]) -> None:
        if not all(type(path) is str for path in paths):
            raise ProtocolError("a path is no string")
        take_paths(list(paths), session.identity.pid)
        session.path = told_path(paths)

    def _forget(self, session: Session, numbers: tuple[Any, ...]) -> None:
        # Calls that are queued or run have their function; others will not name it.
        for number in numbers:
            if type(number) is not int:
                raise ProtocolError("the number of a function is no number")
            session.functions.pop(number, None)

    def _cancel(self, session: Session, seq: int, other: int) -> None:
        call = self._scheduler.cancel(session.slot, other)
        is_back = call is not None or self._runner.notices.drop(session, other)
        if call is not None:
            if call.priority == READ_PRIORITY:
                session.queued -= 1  # it has left the queue; a P1 stays there until it is counted
            self._runner.take_back(call)
        elif is_back:
            self._sessions.send(session, frames.pack_frame(frames.CANCELLED, other))
        else:
            self._runner.cancel_async(session.slot, other)
        # Last: a process that has this answer believes it, and might submit the task again if it knew only that.
        self.reply(session, seq, is_back)

    def _stats(self, session: Session, seq: int) -> None:
        self._answer(session, seq, self._inside.stats)

    def _stop_flow(self, session: Session, seq: int, drain: bool) -> None:
        self._stop_asked.append((session, seq))
        self._stop(drain=drain)

    def _count(self, session: Session, ticket: int) -> None:
        """P1 tasks up to that ticket will not be sent again: count them when those before them have been counted.

        It ends what a process sends when it has come back.
        """
        session.awaited_until = 0.0
        self._queue(session, [Call(session, 0, ticket, None, b"", 0, {})], lowest=0)

    def _operate(self, session: Session, seq: int, what: str, asked: tuple[Any, ...], ticket: int, ack: int) -> None:
        if what not in OPERATIONS:
            raise ProtocolError(f"there is no operation {what:.20}")
        _check_changes(asked)
        if len(asked) != KEYS_ASKED[what] or any((value is None) != (what == "pop") for _, value in asked):
            raise ProtocolError(f"that is not what {what} is asked with")
        self._receipts.acknowledge(session.tenant, ack)
        call = Call(session, seq, ticket, None, b"", time.perf_counter_ns(), dict(asked))
        call.operation = what
        self._queue(session, [call])

    def _acknowledge(self, session: Session, ack: int) -> None:
        self._receipts.acknowledge(session.tenant, ack)

    def _watch(self, session: Session, seq: int, version: int, keys: tuple[Any, ...]) -> None:
        if not all(type(key) is bytes and key for key in keys):
            raise ProtocolError("the keys of a watch are not packed")
        notices = self._runner.notices
        notices.wait(session, seq, version, keys, self._writer.version)
        for waiting, asked in notices.due():
            self.reply(waiting, asked, None)

    def _trace(self, session: Session, seq: int, directory: str, on: bool) -> None:
        recorder = self._recorder
        self._answer(
            session, seq, lambda: recorder.start(session.tenant, directory) if on else recorder.stop(directory)
        )

    def _goodbye(self, session: Session, *rest: Any) -> None:
        session.said_goodbye = True  # before `close`: its slot may then be given back although it lives
        self._sessions.close(session)

    KINDS: ClassVar[dict[int, Request]] = {
        frames.FUNCTION: Request(
            (int, bool, bytes, str, int, (bytes, type(None)), (float, int, type(None)), tuple), _learn
        ),
        frames.PATHS: Request((tuple,), _take_paths),
        frames.FORGET: Request((tuple,), _forget),
        frames.CANCEL: Request((int, int), _cancel),
        frames.STATS: Request((int,), _stats),
        frames.STOP: Request((int, bool), _stop_flow),
        frames.RELOAD: Request((int, int), _reload),
        frames.ADOPT: Request((int, bool), _adopt),
        frames.COUNT: Request((int,), _count),
        frames.OPERATE: Request((int, str, tuple, int, int), _operate),
        frames.ACK: Request((int,), _acknowledge),
        frames.WATCH: Request((int, int, tuple), _watch),
        frames.TRACE: Request((int, str, bool), _trace),
        frames.GOODBYE: Request(None, _goodbye),
    }
    """All kinds but CALL and PUT."""

    # Answers to questions

    def _answer(self, session: Session, seq: int, find: Callable[[], Any]) -> None:
        """Answer a question with what *find* returns, or raises, unless that is `Wait`."""
        try:
            answer = find()
        except Wait:
            pass
        except BaseException as error:
            # Whatever it raises, it is the question's matter alone: a statistic may need a module that is not here.
            self._sessions.fail(session, seq, error)
        else:
            self.reply(session, seq, answer)

    def reply(self, session: Session, seq: int, value: Any) -> None:
        """Answer a question."""
        self._sessions.send(session, frames.pack_frame(frames.RESULT, seq, (pack(value),)))

    def answer_stops(self) -> None:
        """Tell those who asked for the stop that it is done."""
        for session, seq in self._stop_asked:
            self.reply(session, seq, None)

    # Queueing

    def _queue_calls(self, session: Session, function: Function, seq: int, batch: tuple[Any, ...], ticket: int) -> None:
        for arguments in batch:
            if type(arguments) is not bytes:
                raise ProtocolError("the arguments of a call are not packed")
        arrived = time.perf_counter_ns()
        step = 1 if function.priority == WRITE_PRIORITY else 0  # a P2 has no ticket
        self._queue(
            session,
            [
                Call(session, seq + index, ticket + index * step, function, arguments, arrived)
                for index, arguments in enumerate(batch)
            ],
        )

    def _queue(self, session: Session, calls: list[Call], lowest: int = 1) -> None:
        """Queue calls that came in one frame. Seq 0 is that of no task: it is only counted."""
        if not calls:
            return
        # All are checked by these two: seqs and tickets of a frame follow each other.
        first, last = calls[0], calls[-1]
        if first.seq < lowest or last.seq >= SEQ_LIMIT:
            raise ProtocolError(f"no task can be {first.seq} in its connection")
        if first.ticket < 0 or (first.seq and (first.ticket == 0) != (first.priority == READ_PRIORITY)):
            raise ProtocolError(f"a P{first.priority} task cannot have ticket {first.ticket}")
        if last.ticket > self._gate.last_finished(first.slot) + TICKET_LEAP:
            raise ProtocolError(f"ticket {last.ticket} leaps ahead of all that went before")
        if session.queued + len(calls) > self._max_queued:
            raise ProtocolError(f"more than {self._max_queued - 1} of its tasks are queued")
        session.queued += len(calls)
        if first.seq and session.answered is None and not self.is_refusing:
            self._scheduler.submit_all(calls)
        else:
            for call in calls:
                self._scheduler.submit(call)
                self._settle_at_once(session, call)

    def _settle_at_once(self, session: Session, call: Call) -> None:
        """Some calls are only counted, in their turn."""
        answer = None if session.answered is None else session.answered.get(call.seq)
        if not call.seq:
            self._scheduler.cancel(call.slot, call.seq)
        elif answer is not None:
            self._answer_again(session, call, answer)
        elif self.is_refusing:
            # A refused P1 keeps its place in the queue, to be counted in its turn.
            self._scheduler.cancel(call.slot, call.seq)
            if call.priority == READ_PRIORITY:
                session.queued -= 1
            self.refuse(call)

    def _answer_again(self, session: Session, call: Call, answer: bytes) -> None:
        """A former coordinator has run this task. A P1 keeps its place in the queue, to be counted in its turn."""
        self._scheduler.cancel(call.slot, call.seq)
        if call.priority == READ_PRIORITY:
            session.queued -= 1
        if not answer:
            error = CoordinatorLost(
                f"{call.name}() was executed and committed, but its result is lost: the coordinator died before it "
                "was answered, and shared memory had no room to keep it",
                flow=self._flow,
            )
            self._runner.fail(call, error)
            answer = call.answer
        self._sessions.send(session, answer)

    def refuse(self, call: Call) -> None:
        """Answer a call that will not run: the flow has been stopped."""
        self._runner.fail(call, FlowNotRunning("it was stopped before the task ran", flow=self._flow))
        self._runner.send(call)

    def __repr__(self) -> str:
        return f"<Requests of flow {self._flow!r}{', refused' if self.is_refusing else ''}>"


def _check_changes(changes: tuple[Any, ...]) -> None:
    """What a process packed itself goes into the state as it is: make sure that everybody can read it."""
    try:
        for key, payload in changes:
            if type(key) is not bytes or pack_key(unpack_key(key)) != key:
                raise ValueError("a key is not packed as keys are")
            if payload is not None:
                if type(payload) is not bytes:
                    raise TypeError("a value is not packed")
                with suppress(SerializationError):  # sound, but of a type that is not known in this process
                    check(payload)
    except Exception as error:
        raise ProtocolError(f"a put's changes are damaged ({type(error).__name__}: {error!s:.200})") from error
