"""The client: a process's connection to a flow, shared by all handles of that flow in the process.

It attaches at first use. Submitting happens under one lock: the frames go into the pipe, then the flag is
raised, then submit returns. Answers are read by whoever waits for one; one thread at a time.
"""

from __future__ import annotations

import atexit
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import posix_ipc

from . import errors, functions, wire
from .core import logger
from .errors import (
    CoordinatorLost,
    FlowNotRunning,
    GateTimeout,
    ProtocolError,
    SerializationError,
    StrictFlowError,
)
from .failures import unpack_failure
from .future import TaskFuture
from .gate import Gate
from .rendezvous import Place
from .segment import Segment
from .state import FlowState
from .store import Pins, StoreReader
from .values import pack, unpack
from .wire import Frame, Stream

__all__ = ["Client", "client_of"]

ATTACH = 5.0
"""Seconds that a first use waits for a coordinator to appear."""
BUSY = 60.0
"""Seconds that the handshake may take: SF-LOOP has no time for it while a P1 runs."""
RETRY = 0.01
SLICE = 0.05
"""Seconds after which a thread that waits for another thread's reading looks for itself."""


class Attachment:
    """One connection: stream, slot, mapped segment, and the answers that are due."""

    def __init__(self, client: Client, stream: Stream, welcome: dict[str, Any]) -> None:
        self.flow = client.name
        self.port = _Port(client, self)
        self.stream = stream
        self.slot: int = welcome["slot"]
        self.coordinator: int = welcome["pid"]
        self.max_pending: int = welcome["max_pending"]
        self.gate_timeout: float = welcome["gate_timeout"]
        self.segment = Segment.open(welcome["segment"])
        self.gate = Gate(self.segment, self.slot, posix_ipc.Semaphore(welcome["semaphore"]))
        self.pins = Pins(self.segment, self.slot)
        self.reader = StoreReader(self.segment, self.pins)
        self.pending: dict[int, TaskFuture[Any]] = {}
        self.functions: dict[Any, int] = {}
        self.last = 0
        self.writes = self.gate.last
        self.reading = threading.Lock()
        self.reading_thread = 0
        self.server: threading.Thread | None = None
        self.is_lost = False

    def __repr__(self) -> str:
        return f"<Attachment to {self.flow!r} in slot {self.slot}, {len(self.pending)} answers due>"


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
            try:
                attachment = self._connect(0.0 if self.is_stopped else timeout)
            except StrictFlowError as error:
                raise error.of(self.name) from error.__cause__
            self.is_stopped = False
            self._attachment = attachment
            self.state.bind(attachment.segment, attachment.gate)
            return attachment

    def _connect(self, timeout: float) -> Attachment:
        from . import handshake  # multiprocessing.connection takes 8 ms to import

        place = Place.of(self.name)
        deadline = time.monotonic() + timeout
        while True:
            try:
                place.check()
                sock = handshake.connect(place.socket, place.authkey(), BUSY)
                break
            except (FileNotFoundError, ConnectionError, BlockingIOError, TimeoutError):
                if time.monotonic() >= deadline:
                    raise FlowNotRunning(
                        f"no coordinator serves it (waited {timeout:g} s); start it with `with flow:` or "
                        f"`strictflow-mp serve {self.name}`, or check the name",
                        flow=self.name,
                    ) from None
            time.sleep(RETRY)
        try:
            greeting = {
                "protocol": wire.PROTOCOL,
                "pid": os.getpid(),
                "python": sys.version_info[:2],
                "path": [path for path in sys.path if path],
            }
            welcome = handshake.greet(sock, greeting)
            if "refused" in welcome:
                kind = getattr(errors, str(welcome["refused"]), ProtocolError)
                raise kind(str(welcome.get("text")), flow=self.name)
            return Attachment(self, Stream(sock), welcome)
        except (OSError, EOFError, KeyError) as error:
            sock.close()
            raise FlowNotRunning(f"the coordinator hung up during the handshake ({error!r})", flow=self.name) from error
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Detach. Futures that are still due are lost; a later use attaches again."""
        with self._attaching:
            attachment, self._attachment = self._attachment, None
            self.state.unbind()
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
        attachment = self.attach()
        gate = attachment.gate
        if gate.is_open():
            return attachment.reader
        if gate.is_stopped():
            return self._reattach(attachment).reader
        seconds = attachment.gate_timeout if timeout is None else timeout
        if not gate.wait(time.monotonic() + seconds, lambda: self._check(attachment)):
            raise GateTimeout(
                f"a read waited longer than {seconds:g} s for the P1 tasks before it; see flow.stats(), or give "
                "tasks a timeout=",
                flow=self.name,
            )
        if gate.is_stopped():
            return self._reattach(attachment).reader
        return attachment.reader

    def _reattach(self, attachment: Attachment) -> Attachment:
        self._lose(attachment, self._stopped)
        self.is_stopped = True
        try:
            return self.attach()
        except FlowNotRunning:
            raise FlowNotRunning("it has been stopped", flow=self.name) from None

    def _check(self, attachment: Attachment) -> None:
        """Is there still somebody to wait for?"""
        # In this order: a coordinator that stops says so before it leaves.
        if Place.of(self.name).is_inhabited() or attachment.gate.is_stopped():
            return
        self._lose(attachment, self._lost)
        raise CoordinatorLost(
            f"the coordinator (pid {attachment.coordinator}) died while a read waited; the last commit stands",
            flow=self.name,
        )

    # Submitting

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[TaskFuture[Any]]:
        """Submit calls of a task; return their futures, in order."""
        packed = [self._pack_arguments(task.name, args, kwargs) for args, kwargs in calls]
        futures: list[TaskFuture[Any]] = []
        position = 0
        while position < len(packed):
            attachment = self.attach()
            room = self._wait_for_room(attachment)
            with self._submitting:
                if attachment.is_lost:
                    continue
                frames = []
                function = attachment.functions.get(task)
                if function is None:
                    function = len(attachment.functions)
                    frames.append(self._function_frame(task, function))
                    attachment.functions[task] = function
                batch = packed[position : position + room]
                flag = 0
                for arguments in batch:
                    future = self._new_future(attachment, task.name)
                    futures.append(future)
                    if task.priority == 1:
                        flag = attachment.writes = attachment.writes + 1
                    frames.append(wire.pack_frame(wire.CALL, future.number, function, arguments, flag))
                data = b"".join(frames)
                if task.priority == 1:
                    self._submit(attachment, data)
                else:
                    self._send(attachment, data)
            position += len(batch)
        return futures

    def put(self, changes: dict[bytes, bytes | None]) -> TaskFuture[Any]:
        """Submit a ready-made P1."""
        while True:
            attachment = self.attach()
            self._wait_for_room(attachment)
            with self._submitting:
                if attachment.is_lost:
                    continue
                future = self._new_future(attachment, "put")
                flag = attachment.writes = attachment.writes + 1
                self._submit(attachment, wire.pack_frame(wire.PUT, future.number, list(changes.items()), flag))
                return future

    def write(self, changes: dict[bytes, bytes | None]) -> None:
        """Submit a ready-made P1 and wait until it is committed."""
        self.put(changes).result()

    def ask(self, kind: int, *fields: Any, timeout: float | None = None, attach: float = ATTACH) -> Any:
        """Send a question and wait for the answer."""
        attachment = self.attach(attach)
        with self._submitting:
            future = self._new_future(attachment, "question")
            self._send(attachment, wire.pack_frame(kind, future.number, *fields))
        return future.result(timeout)

    def _new_future(self, attachment: Attachment, label: str) -> TaskFuture[Any]:
        attachment.last = number = attachment.last + 1
        future: TaskFuture[Any] = TaskFuture(attachment.port, number, label)
        attachment.pending[number] = future
        return future

    def _function_frame(self, task: Any, number: int) -> bytes:
        try:
            by_value, code = functions.encode(task)
        except Exception as error:
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
        if not args and not kwargs:
            return b""
        try:
            return pack([list(args), kwargs])
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

    def _submit(self, attachment: Attachment, data: bytes) -> None:
        """Send frames, then raise the flag for the P1 tasks in them. The caller holds `_submitting`."""
        self._send(attachment, data)
        # If a signal handler raised before this, the frame of the next P1 says how far to count.
        if not attachment.stream.has_ended:
            attachment.gate.raise_flag(attachment.writes)

    def _send(self, attachment: Attachment, data: bytes) -> None:
        stream = attachment.stream
        if stream.send(data):
            return
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        while not stream.flush():
            if not poll.poll(1000) and not Place.of(self.name).is_inhabited():
                self._lose(attachment, self._lost)
                return

    def _wait_for_room(self, attachment: Attachment) -> int:
        """Backpressure: wait until fewer than `max_pending` answers are due; return how many more may be."""
        while len(attachment.pending) >= attachment.max_pending and not attachment.is_lost:
            try:
                oldest = next(iter(attachment.pending.values()))
            except (StopIteration, RuntimeError):
                continue
            self.wait(attachment, oldest, None)
        return attachment.max_pending - len(attachment.pending)

    # Answers

    def wait(self, attachment: Attachment, future: TaskFuture[Any], timeout: float | None) -> None:
        """Read answers until the future is done."""
        deadline = None if timeout is None else time.monotonic() + timeout
        me = threading.get_ident()
        while not future.done_now():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if attachment.is_lost:
                self._settle(attachment, self._lost)
                return
            if attachment.reading_thread == me:
                self._read(attachment, left)  # a callback that waits, inside _read
            elif attachment.reading.acquire(blocking=False):
                attachment.reading_thread = me
                try:
                    if not future.done_now():
                        self._read(attachment, left)
                finally:
                    attachment.reading_thread = 0
                    attachment.reading.release()
                    self._pass_on(attachment)
            else:
                future.wait_here(SLICE if left is None else min(SLICE, left))
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
        try:
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLIN)
            if not poll.poll(1000 if timeout is None else min(1000, timeout * 1000)):
                if timeout is None and not Place.of(self.name).is_inhabited():
                    self._lose(attachment, self._lost)
                return
            frames = stream.receive()
        except (ValueError, OSError):
            if attachment.is_lost:
                return  # closed by another thread
            raise
        if frames is None:
            stopped = attachment.gate.is_stopped()
            self._lose(attachment, self._stopped if stopped else self._lost)
            return
        for frame in frames:
            self._settle_one(attachment, frame)

    def _settle_one(self, attachment: Attachment, frame: Frame) -> None:
        kind, number = frame[0], frame[1]
        future = attachment.pending.pop(number, None)
        if future is None:
            return
        if kind == wire.RESULT:
            try:
                value = unpack(frame[2])
            except StrictFlowError as error:
                future.settle(error=error)
            else:
                future.settle(value)
        elif kind == wire.FAILURE:
            future.settle(error=unpack_failure(frame[2], frame[3], flow=self.name))
        elif kind == wire.CANCELLED:
            future.settle_cancelled()

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
            with attachment.reading:
                attachment.reading_thread = threading.get_ident()
                try:
                    self._read(attachment, None)
                except ProtocolError as error:
                    logger.error("flow %r: %s", self.name, error)
                    self._lose(attachment, self._lost)
                finally:
                    attachment.reading_thread = 0

    def cancel(self, attachment: Attachment, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Ask SF-LOOP to take a task back."""
        with self._submitting:
            if attachment.is_lost:
                return False
            question = self._new_future(attachment, "cancel")
            self._send(attachment, wire.pack_frame(wire.CANCEL, question.number, future.number))
        if not wait:
            return False
        taken_back = bool(question.result())
        if taken_back:
            future.settle_cancelled()
        return taken_back

    # Losing the coordinator

    def _lose(self, attachment: Attachment, reason: Callable[[TaskFuture[Any]], Exception]) -> None:
        attachment.is_lost = True
        if self._attachment is attachment:
            self.state.unbind()
        self._settle(attachment, reason)
        attachment.stream.close()
        attachment.gate.release()

    def _settle(self, attachment: Attachment, reason: Callable[[TaskFuture[Any]], Exception]) -> None:
        while attachment.pending:
            try:
                _, future = attachment.pending.popitem()
            except KeyError:
                return
            future.settle(error=reason(future))

    def _lost(self, future: TaskFuture[Any]) -> Exception:
        return CoordinatorLost(
            f"the coordinator died before it answered {future.label}(); whether that ran is unknown: look at the "
            "state before you submit it again",
            flow=self.name,
        )

    def _stopped(self, future: TaskFuture[Any]) -> Exception:
        return FlowNotRunning(f"it was stopped before {future.label}() ran", flow=self.name)

    def __repr__(self) -> str:
        return f"<Client of {self.name!r}, {self._attachment or 'not attached'}>"


class _Port:
    """What a future knows of its connection (`future.Port`)."""

    __slots__ = ("_attachment", "_client", "_pid")

    def __init__(self, client: Client, attachment: Attachment) -> None:
        self._client = client
        self._attachment = attachment
        self._pid = os.getpid()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StrictFlowError(
                "this future belongs to the parent process; in a forked child, submit the task again",
                flow=self._client.name,
            )

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        self._check_process()
        self._client.wait(self._attachment, future, timeout)

    def serve(self) -> None:
        self._check_process()
        self._client.serve(self._attachment)

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        self._check_process()
        return self._client.cancel(self._attachment, future, wait=wait)


_clients: dict[str, Client] = {}
_registering = threading.Lock()


def client_of(name: str, cache_bytes: int) -> Client:
    """The client of the flow of that name; there is one in each process."""
    with _registering:
        client = _clients.get(name)
        if client is None:
            client = _clients[name] = Client(name, cache_bytes)
        client.is_stopped = False  # a new handle may mean a new start
        return client


def _after_fork() -> None:
    global _registering
    _registering = threading.Lock()
    for client in list(_clients.values()):
        client.after_fork()


@atexit.register
def _close_all() -> None:
    for client in list(_clients.values()):
        client.close()


os.register_at_fork(after_in_child=_after_fork)
