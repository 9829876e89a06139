"""The client: a process's connection to a flow, shared by all handles of that flow in the process.

It attaches at first use. Submitting happens under one lock: the frames go into the pipe, then the flag is
raised, then submit returns. Answers are read by whoever waits for one; one thread at a time.

When the coordinator has died, whoever notices (a submit, a wait for an answer or at the gate) waits for the next
one, comes back to the same slot, and sends again every frame that has no answer. The coordinator knows from its
receipts which of them have taken effect. If none comes, the receipts tell us instead.
"""

from __future__ import annotations

import pickle
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import posix_ipc

from . import functions, wire
from .arguments import pack_arguments
from .aside import dismiss
from .attachment import Attachment
from .connection import reach, take_leave, try_to_reach
from .core import logger
from .errors import (
    FAULTS,
    FlowNotRunning,
    GateTimeout,
    ProtocolError,
    SerializationError,
    StrictFlowError,
)
from .future import TaskFuture
from .lost import Reason, gone, settle_all
from .port import Port
from .rendezvous import Place
from .segment import PREFIX, W_EPOCH, W_RESTARTS, W_TRACE
from .state import FlowState
from .store import StoreReader
from .turn import Turn
from .values import pack
from .wire import Stream

__all__ = ["Client"]

audit = sys.audit

ATTACH = 5.0
"""Seconds that a first use waits for a coordinator to appear."""
RESTART = 10.0
"""Seconds that the next coordinator may take to appear when one has died, and its owner lives."""
EXPELLED = 0.5
"""Seconds after which a coordinator that closed the connection, and lives, is taken to have meant it."""
RETRY = 0.005
FIRST, BATCH = 16, 128
"""Calls in the first frame of several, and in the others: the coordinator begins while the rest is on its way."""
QUESTIONS = {
    wire.CANCEL: "cancel",
    wire.STATS: "stats",
    wire.STOP: "stop_loop",
    wire.WATCH: "watch",
    wire.TRACE: "trace",
}
"""What is no task, and what users call that asks it."""
SLICE = 0.05
"""Seconds after which a thread that waits for another thread's reading looks for itself."""


class Client:
    """This process's end of a flow."""

    def __init__(self, name: str, cache_bytes: int) -> None:
        self.name = name
        self.state = FlowState(self, cache_bytes)
        self._attachment: Attachment | None = None
        self.is_stopped = False  # we know that it was: no use in waiting for it
        self._renew_locks()

    def _renew_locks(self) -> None:
        self._attaching = threading.RLock()
        self._submitting = threading.RLock()

    # Attaching

    def attach(self, timeout: float = ATTACH) -> Attachment:
        """The connection; makes one if there is none.

        Raises:
            FlowNotRunning: no coordinator appeared within *timeout* seconds.
            TooManyWorkers, ProtocolError: it does not take us.
        """
        attachment = self._attachment
        if attachment is not None and not attachment.is_lost:
            return attachment
        with self._attaching:
            attachment = self._attachment
            if attachment is not None and not attachment.is_lost:
                return attachment
            opened: list[socket.socket] = []
            reading = Turn(Client.wait.__code__, Client._serve.__code__)
            welcome = None
            try:
                stream, welcome = reach(self.name, 0.0 if self.is_stopped else timeout, opened)
                attachment = Attachment(self.name, stream, welcome, partial(Port, self), reading)
                self.is_stopped = False
                audit("strictflow_mp.attach.welcomed")
                self._attachment = attachment
            except BaseException as error:
                for sock in opened:
                    take_leave(sock)
                if isinstance(error, StrictFlowError):
                    raise error.of(self.name) from error.__cause__
                if welcome is not None and isinstance(error, (OSError, KeyError, posix_ipc.Error)):
                    text = f"it ended while this process attached ({error!r})"
                    raise FlowNotRunning(text, flow=self.name) from error
                raise
            self._bind(attachment, attachment.segment.words[W_EPOCH])
            return attachment

    def _bind(self, attachment: Attachment, epoch: int) -> None:
        self.state.bind(attachment.segment, attachment.gate, attachment.reader, epoch)

    def rebind(self, reader: StoreReader, epoch: int) -> None:
        """For `FlowState`: it has passed the gate in another epoch."""
        with self._attaching:
            attachment = self._attachment
            if attachment is not None and not attachment.is_lost and attachment.reader is reader:
                self._bind(attachment, epoch)

    @property
    def is_attaching(self) -> bool:
        """Whether another thread attaches at this moment, or comes back."""
        is_free = self._attaching.acquire(blocking=False)
        if is_free:
            self._attaching.release()
        return not is_free

    def close(self) -> None:
        """Detach. Futures that are still due are lost; a later use attaches again."""
        with self._attaching:
            attachment, self._attachment = self._attachment, None
            self.state.unbind()
        dismiss()
        if attachment is None or attachment.is_lost:
            return
        with self._submitting:
            # After the goodbye the slot is another's. While a snapshot or an array needs its pins it stays ours.
            if not attachment.pins.are_held:
                attachment.stream.send(wire.pack_frame(wire.GOODBYE))
            attachment.is_lost = True
        self._lose(
            attachment,
            lambda future: FlowNotRunning(f"{future.label}(): the handle was closed", flow=self.name),
        )

    def after_fork(self) -> None:
        """In a forked child: the connection, the slot and the pins are the parent's."""
        self._renew_locks()
        attachment, self._attachment = self._attachment, None
        self.state.unbind()
        if attachment is not None:
            attachment.is_lost = True
            attachment.stream.close()

    # Reading

    def reader(self) -> StoreReader:
        """The reader, without waiting for the gate."""
        return self.attach().reader

    def pass_gate(self, timeout: float | None = None) -> StoreReader:
        """Wait for every P1 task that was submitted before now; return the reader.

        Raises:
            GateTimeout: that took longer than *timeout* seconds (default: the flow's own).
            FlowNotRunning, CoordinatorLost: the flow was stopped, or its coordinator died.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            attachment = self.attach()
            gate = attachment.gate
            if gate.is_open():
                pass
            elif gate.is_stopped():
                self._reattach(attachment)
                continue  # at the gate of that one
            else:
                if deadline is None:
                    deadline = time.monotonic() + attachment.gate_timeout
                self._wait_at_gate(attachment, deadline, timeout)
            # Behind the gate, not ahead of it: when our flag has been lifted, RESTARTS has moved before.
            if not attachment.is_outdated:
                if gate.is_stopped():
                    self._reattach(attachment)
                    continue
                return attachment.reader
            self._come_back(attachment, attachment.stream, deadline)
            if deadline is not None and time.monotonic() >= deadline:
                raise self._late(timeout)

    def _wait_at_gate(self, attachment: Attachment, deadline: float, timeout: float | None) -> None:
        with attachment.tracer.at_gate(attachment.gate) if attachment.words[W_TRACE] else nullcontext():
            is_open = attachment.gate.wait(deadline, lambda: self._check(attachment, deadline))
        if not is_open:
            raise self._late(attachment.gate_timeout if timeout is None else timeout)

    def _late(self, seconds: float | None) -> GateTimeout:
        return GateTimeout(
            f"a read waited longer than {seconds or 0:g} s for the P1 tasks before it; see flow.stats(), or give "
            "tasks a timeout=",
            flow=self.name,
        )

    def _reattach(self, attachment: Attachment) -> None:
        condemned = attachment.gate.is_condemned()
        self._lose(attachment)
        self.is_stopped = True
        try:
            self.attach()
        except FlowNotRunning:
            if condemned:
                raise gone(attachment) from None
            raise FlowNotRunning("it has been stopped", flow=self.name) from None

    def _check(self, attachment: Attachment, deadline: float) -> None:
        """Is there still somebody to wait for?"""
        # In this order: a coordinator that stops says so before it leaves.
        if attachment.is_outdated:
            self._come_back(attachment, attachment.stream, deadline)
        elif Place.of(self.name).is_inhabited() or attachment.gate.is_stopped():
            attachment.dead_since = None
            return
        elif not attachment.is_lost and not self._may_return(attachment):
            self._lose(attachment)
        if attachment.is_lost and not attachment.gate.is_stopped():
            raise gone(attachment)

    @staticmethod
    def _deadline(timeout: float | None) -> float | None:
        return None if timeout is None else time.monotonic() + timeout

    # Submitting

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[TaskFuture[Any]]:
        """Submit calls of a task; return their futures, in order."""
        packed = [self._pack_arguments(task.name, args, kwargs) for args, kwargs in calls]
        futures: list[TaskFuture[Any]] = []
        position = 0
        while position < len(packed):
            attachment = self._attachment
            if attachment is None or attachment.is_lost:
                attachment = self.attach()
            if attachment.room <= 0:
                self._wait_for_room(attachment)
            with self._submitting:
                room = attachment.room
                if attachment.is_lost or room <= 0:
                    continue
                batch = packed[position : position + min(room, BATCH if position else FIRST)]
                began = time.monotonic_ns() if attachment.words[W_TRACE] else 0
                futures += self._call_batch(attachment, task, batch)
                if began:
                    attachment.tracer.submitted(task.name, task.priority, futures[position:], began)
            position += len(batch)
        return futures

    def _call_batch(self, attachment: Attachment, task: Any, batch: list[bytes]) -> list[TaskFuture[Any]]:
        """Submit calls in one frame. The caller holds `_submitting`."""
        head = b""
        function = attachment.functions.get(task)
        if function is None:
            function = len(attachment.function_frames)
            head = self._function_frame(task, function)
            attachment.function_frames.append(head)
        is_write = task.priority == 1
        acked, port, label = attachment.acked, attachment.port, task.name
        number = first = attachment.last + 1
        attachment.last += len(batch)
        flag = 0
        if is_write:
            flag = attachment.writes + 1
            attachment.writes += len(batch)
        frame = wire.pack_frame(wire.CALL, first, function, batch, flag, acked)
        futures: dict[int, TaskFuture[Any]] = {}
        for arguments in batch:
            future = futures[number] = TaskFuture(port, number, label)
            # To be sent again if the coordinator dies before it answers.
            future.sent = (wire.CALL, number, function, (arguments,), flag, 0)
            number += 1
            if is_write:
                flag += 1
        self._dispatch(attachment, futures, head + frame, is_write=is_write)
        if head:
            attachment.functions[task] = function  # not ahead of the frame that tells of it
        return [*futures.values()]

    def put(self, changes: dict[bytes, bytes | None]) -> TaskFuture[Any]:
        """Submit a ready-made P1."""
        while True:
            attachment = self.attach()
            self._wait_for_room(attachment)
            with self._submitting:
                if attachment.is_lost or attachment.room <= 0:
                    continue
                number = attachment.last = attachment.last + 1
                flag = attachment.writes = attachment.writes + 1
                sent = (wire.PUT, number, list(changes.items()), flag, attachment.acked)
                began = time.monotonic_ns() if attachment.words[W_TRACE] else 0
                future = self._dispatch_one(attachment, "put", sent, is_write=True)
                if began:
                    attachment.tracer.submitted("put", 1, [future], began)
                return future

    def write(self, changes: dict[bytes, bytes | None]) -> None:
        """Submit a ready-made P1 and wait until it is committed."""
        self.put(changes).result()

    def ask(self, kind: int, *fields: Any, timeout: float | None = None, attach: float = ATTACH) -> Any:
        """Send a question and wait for the answer."""
        attachment = self.attach(attach)
        with self._submitting:
            future = self._question(attachment, kind, *fields)
        return future.result(timeout)

    def watch(self, version: int, keys: tuple[bytes, ...]) -> TaskFuture[Any]:
        """Ask to be told when one of the keys (none: any) has changed after *version*."""
        attachment = self.attach()
        with self._submitting:
            return self._question(attachment, wire.WATCH, version, keys)

    def _question(self, attachment: Attachment, kind: int, *fields: Any) -> TaskFuture[Any]:
        number = attachment.last = attachment.last + 1
        return self._dispatch_one(attachment, QUESTIONS[kind], (kind, number, *fields))

    def _dispatch_one(
        self, attachment: Attachment, label: str, sent: tuple[Any, ...], *, is_write: bool = False
    ) -> TaskFuture[Any]:
        future: TaskFuture[Any] = TaskFuture(attachment.port, sent[1], label)
        future.sent = sent
        future.is_task = sent[0] not in QUESTIONS
        futures = {future.number: future}
        self._dispatch(attachment, futures, wire.pack_frame(*sent), is_write=is_write, is_watch=sent[0] == wire.WATCH)
        return future

    def _function_frame(self, task: Any, number: int) -> bytes:
        try:
            by_value, code = functions.encode(task)
        except (*FAULTS, pickle.PicklingError) as error:
            raise SerializationError(
                f"the function of {task.name}() cannot travel to the coordinator: {error}; do not let it use "
                "locks, sockets or open files of this process",
                path=task.name,
                flow=self.name,
            ) from error
        return wire.pack_frame(
            wire.FUNCTION, number, by_value, code, task.name, task.priority, task.packed_key, task.timeout
        )

    def _pack_arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        try:
            return pack_arguments(args, kwargs)
        except SerializationError as error:
            self._name_argument(name, args, kwargs)
            raise error.of(self.name) from None

    def _name_argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise for the argument that cannot travel, by its name."""
        try:
            for index, value in enumerate(args):
                pack(value, f"{name}() argument {index}")
            for key, value in kwargs.items():
                pack(value, f"{name}() argument {key}")
        except SerializationError as error:
            raise error.of(self.name) from None

    def _dispatch(
        self,
        attachment: Attachment,
        futures: dict[int, TaskFuture[Any]],
        data: bytes,
        *,
        is_write: bool,
        is_watch: bool = False,
    ) -> None:
        """Send frames; if they are of P1 tasks, raise the flag behind that. The caller holds `_submitting`.

        When a signal handler raises in here, the tasks run once or not at all, and nobody holds their futures.
        """
        try:
            if is_watch:
                attachment.watches.update(futures)
            attachment.pending.update(futures)
            if not is_write:
                self._send(attachment, data)
                return
            attachment.unread.extend(futures)  # pending by now, or they would be taken as answered
            audit("strictflow_mp.submit.begun")
            self._send(attachment, data)
            audit("strictflow_mp.submit.sent")
            # If a signal handler raised before this, the frame of the next P1 says how far to count.
            if not attachment.is_lost:
                attachment.gate.raise_flag(attachment.writes)
            audit("strictflow_mp.submit.counted")
        except BaseException:
            attachment.forget(futures)  # or they would take up room, and hold up what is acknowledged
            raise

    def _send(self, attachment: Attachment, data: bytes) -> None:
        """Send frames that are pending already; if the coordinator has died, the next one gets them with the rest."""
        stream = attachment.stream
        if not stream.send(data):
            self._flush(stream)
        if stream.has_ended:
            self._come_back(attachment, stream, None)

    def _flush(self, stream: Stream) -> None:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        while not stream.flush():
            if not poll.poll(1000) and not Place.of(self.name).is_inhabited():
                stream.has_ended = True
                return

    def _wait_for_room(self, attachment: Attachment) -> None:
        """Backpressure: wait until fewer than `max_pending` answers are due."""
        while attachment.room <= 0 and not attachment.is_lost:
            try:
                oldest = next(future for seq, future in attachment.pending.items() if seq not in attachment.watches)
            except (StopIteration, RuntimeError):
                continue
            self.wait(attachment, oldest, None)

    # Answers

    def wait(self, attachment: Attachment, future: TaskFuture[Any], timeout: float | None) -> None:
        """Read answers until the future is done."""
        deadline = None if timeout is None else time.monotonic() + timeout
        reading = attachment.reading
        nested = attachment.is_settling and reading.is_mine()  # a callback that waits, inside _read
        while not future.done_now():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if attachment.is_lost:
                settle_all(attachment)
                return
            if nested or (attachment.server is None and reading.take()):
                try:
                    if not future.done_now():
                        self._read(attachment, left)
                finally:
                    if not nested:
                        reading.leave()
                        self._pass_on(attachment)
            else:
                future.wait_here(SLICE if left is None else min(SLICE, left))
                reading.revoke()
            if left == 0:
                return

    def _pass_on(self, attachment: Attachment) -> None:
        """Let a thread that waits for its answer take over the reading."""
        for future in list(attachment.pending.values()):
            if future.has_waiters:
                future.nudge()
                return

    def _read(self, attachment: Attachment, timeout: float | None) -> None:
        """Wait for answers and settle their futures."""
        stream = attachment.stream
        is_open = True
        try:
            if stream.inbox or stream.unpack():
                pass  # a signal handler raised before these were settled
            elif not stream.wait(1 if timeout is None else min(1, timeout)):
                if timeout is not None or Place.of(self.name).is_inhabited():
                    return
                is_open = False
            else:
                is_open = stream.fill()
        except (ValueError, OSError):
            if attachment.is_lost or attachment.stream is not stream:
                return  # another thread has closed it, or come back with a new one
            raise
        inbox = stream.inbox
        settle = attachment.settle_traced if attachment.words[W_TRACE] else attachment.settle
        while inbox:
            # A signal handler may raise anywhere: settling twice does no harm.
            frame = inbox[0]
            attachment.is_settling = True
            try:
                if settle(frame):
                    with self._submitting:
                        if not attachment.is_lost:
                            attachment.stream.send(wire.pack_frame(wire.ACK, attachment.acked))
            finally:
                attachment.is_settling = False
            if inbox and inbox[0] is frame:  # else a callback has waited, and read on
                inbox.popleft()
        if not is_open:
            self._come_back(attachment, stream, self._deadline(timeout))

    def serve(self, attachment: Attachment) -> None:
        """Read answers in the background from now on."""
        with self._attaching:
            if attachment.server is not None or attachment.is_lost:
                return
            attachment.server = threading.Thread(
                target=self._serve, args=(attachment,), name="strictflow-answers", daemon=True
            )
            attachment.server.start()

    def _serve(self, attachment: Attachment) -> None:
        while not attachment.is_lost:
            if not attachment.reading.take():
                time.sleep(RETRY)  # who reads now sees soon that there is no need any more
                attachment.reading.revoke()
                continue
            try:
                self._read(attachment, None)
            except ProtocolError as error:
                logger.error("flow %r: %s", self.name, error, extra={"flow": self.name, "error": "ProtocolError"})
                self._lose(attachment)
        attachment.reading.leave()

    def cancel(self, attachment: Attachment, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Ask SF-LOOP to take a task back."""
        with self._submitting:
            if attachment.is_lost:
                return False
            question = self._question(attachment, wire.CANCEL, future.number)
        if not wait:
            return False
        taken_back = bool(question.result())
        if taken_back:
            future.settle_cancelled()
        return taken_back or future.cancelled()

    # When the coordinator has died

    def _may_return(self, attachment: Attachment) -> bool:
        """Nobody serves: may there be another coordinator soon?"""
        if attachment.gate.is_stopped():
            return False
        now = time.monotonic()
        if attachment.dead_since is None:
            attachment.dead_since = now
        if Place.of(self.name).is_inhabited():
            resident = Place.of(self.name).resident()
            if resident is not None and PREFIX + resident.token != attachment.segment.name:
                return False  # it serves another flow of this name
            if resident is not None and resident.pid == attachment.coordinator and not resident.identity.is_ending():
                return now - attachment.dead_since < EXPELLED
        elif attachment.owner is None or attachment.owner.is_dead():
            return False
        return now - attachment.dead_since < RESTART

    def _come_back(self, attachment: Attachment, stream: Stream, deadline: float | None) -> None:
        """The connection has ended: wait for the next coordinator and go on with it, or lose the flow.

        Returns also when the deadline has passed; then the next call goes on waiting.
        """
        with self._submitting:
            while attachment.stream is stream and not attachment.is_lost:
                if not self._may_return(attachment):
                    self._lose(attachment)
                elif attachment.segment.words[W_RESTARTS] != attachment.restarts and self._rejoin(attachment):
                    stream.close()
                elif deadline is not None and time.monotonic() >= deadline:
                    return
                else:
                    time.sleep(RETRY)

    def _rejoin(self, attachment: Attachment) -> bool:
        """Connect to the next coordinator, and send it all that has no answer; whether that has worked."""
        try:
            resume = (attachment.slot, attachment.tenant, attachment.first_unfinished)
            reached = try_to_reach(self.name, resume, RESTART)
        except StrictFlowError as error:
            why = {"flow": self.name, "error": type(error).__name__}
            logger.error("flow %r: the next coordinator does not take us: %s", self.name, error, extra=why)
            self._lose(attachment)
            return False
        if reached is None:
            return False
        stream, welcome = reached
        try:
            again = [wire.pack_frame(*future.sent) for future in list(attachment.pending.values()) if future.sent]
            # The last frame counts what nobody sends again: tasks that were taken back.
            count = wire.pack_frame(wire.COUNT, attachment.writes)
            if not stream.send(b"".join([*attachment.function_frames, *again, count])):
                self._flush(stream)
        except BaseException:
            stream.close()
            raise
        attachment.stream = stream
        attachment.is_served_by(welcome)
        about = {"flow": self.name, "peer": attachment.coordinator, "restarts": attachment.restarts}
        logger.info(
            "flow %r: came back to pid %d with %d tasks", self.name, attachment.coordinator, len(again), extra=about
        )
        return True

    def _lose(self, attachment: Attachment, reason: Reason | None = None) -> None:
        attachment.is_lost = True
        if self._attachment is attachment:
            self.state.unbind()
        settle_all(attachment, reason)
        attachment.stream.close()
        attachment.gate.release()

    def __repr__(self) -> str:
        return f"<Client of {self.name!r}, {self._attachment or 'not attached'}>"
