"""The client: a process's connection to a flow, shared by all handles of that flow in the process.

It attaches at first use, and passes the gate for those who read. What goes out is in `submitting`, what comes in in
`answers`; when the coordinator has died, `comeback` says how it goes on.

There is one client for each flow in a process, whatever handles there are of it (`registry.client_of`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import FlowNotRunning, GateTimeout, SerializationError, StrictFlowError
from ..memory.segment import W_EPOCH, W_TRACE
from ..memory.waiting_room import dismiss
from ..system import forks, posix
from ..system.machine import FREE_THREADED
from ..system.place import Place
from ..system.shortage import is_shortage
from ..wire import frames
from .answers import Port, reading_turn, wait_for_room
from .attachment import Attachment
from .comeback import come_back, finish, gone, lose, may_return
from .reaching import LET_IN_SECONDS, reach, take_leave
from .state import FlowState
from .submitting import call_batch, check_changes, operate, pack_call, put, question, question_in_time
from .threads import HomeState, Mine

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from ..store import StoreReader
    from ..wire.future import TaskFuture

__all__ = ["FIRST_USE_SECONDS", "Client"]

audit = sys.audit

FIRST_USE_SECONDS = 5.0
"""Seconds that a first use waits for a coordinator to appear."""


class Client:
    """This process's end of a flow."""

    def __init__(self, name: str, cache_bytes: int) -> None:
        self.name = name
        # Bound to the segment of `_attachment` while that is set and not lost; a moment later than it is set.
        self.state: FlowState = HomeState(self, cache_bytes) if FREE_THREADED else FlowState(self, cache_bytes)
        # What has as its `state` that through which the calling thread is to read.
        self.states: Any = Mine(self.state) if isinstance(self.state, HomeState) else self
        # The last one that was made, perhaps lost by now: then the next use makes another. None: closed, or never used.
        # Set while `_attaching` is held; read without.
        self._attachment: Attachment | None = None
        # Those that were made and live: more than one only while two attach, one in the middle of the other.
        self._made: list[Attachment] = []
        # Where the flow is, from the first use until it is closed: a user, an environment or a working directory that
        # changes meanwhile changes nothing, in forked children neither. None: looked up at the next use.
        self._place: Place | None = None
        self._user = os.getuid()  # when that was noted
        # We know that the flow was stopped: no use in waiting for it. False again when it is reached, or a handle is
        # made or started, for that may mean a new start.
        self.is_stopped = False
        # Held while a thread attaches, binds the state anew or closes: one attachment at a time. A thread that
        # holds it never takes `Attachment.submitting`: callbacks of users may attach while that is held.
        self._attaching = threading.RLock()

    # Attaching

    @property
    def place(self) -> Place:
        """Where the flow is."""
        return self._place or Place.of(self.name)

    @property
    def known_directory(self) -> str | None:
        """The directory of the place, if that is not to be looked up any more."""
        place = self._place  # looked at once: another thread may close the handle
        return str(place.directory) if place is not None else None

    def keep(self, place: Place) -> None:
        """From now on the flow is there, unless this process is attached."""
        if not self.is_attached:
            self._place, self._user = place, os.getuid()

    def forget_place(self) -> None:
        """Look for the flow anew at the next use; but who has become another user is told so by the former place."""
        if not self.is_attached and self._user == os.getuid():
            self._place = None

    def attach(self, timeout: float = FIRST_USE_SECONDS, patience: float | None = None) -> Attachment:
        """The connection; makes one if there is none.

        Args:
            patience: seconds that the one that is there may take to let us in (60), or another thread of ours to
                attach (as long as that takes).

        Raises:
            FlowNotRunning: no coordinator appeared within *timeout* seconds, or it let nobody in.
            TooManyWorkers, ProtocolError: it does not take us.
        """
        if not forks.mark[0]:
            forks.catch_up()
        attachment = self._attachment
        if attachment is not None and not attachment.is_lost:
            return attachment
        waited = 0.0  # for another thread, which may have waited for the same one in vain
        if not self._attaching.acquire(blocking=False):
            began = time.monotonic()
            if not self._attaching.acquire(timeout=-1 if patience is None else patience):
                raise FlowNotRunning(f"another thread of ours still attaches, after {patience:g} s", flow=self.name)
            waited = time.monotonic() - began
        try:
            attachment = self._attachment
            if attachment is not None and not attachment.is_lost:
                return attachment
            place = self.place
            opened: list[socket.socket] = []
            welcome = made = None
            try:
                left = LET_IN_SECONDS if patience is None else max(0.0, patience - waited)
                until = 0.0 if self.is_stopped else max(0.0, timeout - waited)
                stream, welcome = reach(self.name, until, opened, left, place, waited)
                made = Attachment(self.name, place, stream, welcome, Port, reading_turn(), self._unbind_from)
                self.is_stopped = False
                self._place, self._user = place, os.getuid()
                audit("strictflow_mp.attach.welcomed")
                self._attachment = attachment = self._first_of(made)
            except BaseException as error:
                if made is not None:
                    made.retire()
                # The coordinator may have given us a slot, and would keep it for as long as this process lives.
                for sock in opened:
                    take_leave(sock)
                if isinstance(error, StrictFlowError):
                    raise error.of(self.name) from error.__cause__
                is_ours = welcome is None or is_shortage(error)  # a fault at this end
                if not is_ours and isinstance(error, (OSError, KeyError, posix.Error)):
                    raise FlowNotRunning(f"it ended while this process attached ({error!r})", flow=self.name) from error
                raise
            # EPOCH before REACH and the flags (`memory.gate.Gate.within_reach` has the fence): if it moves after this,
            # reads see that, and have the state bound anew.
            self._bind(attachment, attachment.segment.words[W_EPOCH])
            return attachment
        finally:
            self._attaching.release()

    def _first_of(self, attachment: Attachment) -> Attachment:
        """The one that was made first, of those that live: a signal handler may have attached in the middle of us."""
        self._made.append(attachment)
        self._made = living = [made for made in self._made if not made.is_lost]
        first = living[0] if living else attachment
        if first is not attachment:
            self._leave(attachment)
        return first

    def _bind(self, attachment: Attachment, epoch: int) -> None:
        self.state.bind(attachment.segment, attachment.gate, attachment.reader, epoch)

    def _unbind_from(self, attachment: Attachment) -> None:
        """For `comeback.lose`: nobody reads there any more."""
        if self._attachment is attachment:
            self.state.unbind()

    def rebind(self, reader: StoreReader, epoch: int) -> None:
        """For `FlowState`: it has passed the gate in another epoch."""
        with self._attaching:
            attachment = self._attachment
            # Else it has been lost; if another thread has attached anew, the state is bound to that.
            if attachment is not None and not attachment.is_lost and attachment.reader is reader:
                self._bind(attachment, epoch)

    @property
    def is_attached(self) -> bool:
        """Whether a coordinator has let this process in, and has not been lost since."""
        attachment = self._attachment
        return attachment is not None and not attachment.is_lost

    def is_served(self, place: Place) -> bool:
        """Whether a coordinator is seen there, or this process is attached to one that is not proved dead."""
        attachment = self._attachment
        return place.is_inhabited() or (attachment is not None and attachment.may_serve)

    @property
    def is_attaching(self) -> bool:
        """Whether another thread attaches at this moment."""
        is_free = self._attaching.acquire(blocking=False)
        if is_free:
            self._attaching.release()
        return not is_free

    def close(self) -> None:
        """Detach. Futures that are still due are lost; a later use attaches again.

        Snapshots and arrays that are open stay valid. The slot is free when the last of them is gone.
        """
        forks.catch_up()
        if (attachment := self._attachment) is not None:  # looked at once: another thread may close it too
            finish(attachment)
        with self._attaching:
            attachment, self._attachment = self._attachment, None
            self._made = []
            self.state.unbind()
            self._place = None
        dismiss()  # the threads in which coroutines wait at the gate
        if attachment is not None:
            self._leave(attachment)

    def _leave(self, attachment: Attachment) -> None:
        with attachment.submitting:
            if attachment.is_lost:  # perhaps by a thread that held the lock just now
                return
            # Snapshots and arrays that somebody holds keep their pins: the coordinator gives the slot to another when
            # they have been let go.
            if attachment.pins.retire():
                attachment.stream.send(frames.pack_frame(frames.GOODBYE))
            attachment.retire()
        lose(
            attachment,
            lambda future: FlowNotRunning(f"{future.label}(): the handle was closed", flow=self.name),
        )

    def after_fork(self) -> None:
        """In a forked child: the connection, the slot and the pins are the parent's."""
        self._attaching = threading.RLock()  # a thread that is not here may have held the former one
        attachment, self._attachment = self._attachment, None
        self._made = []
        self.state.unbind()
        if attachment is not None:
            attachment.after_fork()

    # Reading

    def reader(self) -> StoreReader:
        """The reader, without waiting for the gate.

        Raises:
            FlowNotRunning, CoordinatorLost: the flow was stopped, or its coordinator died, and no other serves.
        """
        while True:
            attachment = self.attach()
            if not attachment.gate.is_stopped():
                return attachment.reader
            self._reattach(attachment)  # its memory would answer for ever; as at the gate: the next one, or an error

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
            # After the gate, not before it: when our flag has been lifted, RESTARTS has moved earlier.
            if not attachment.is_outdated:
                if gate.is_stopped():
                    self._reattach(attachment)
                    continue
                return attachment.reader
            come_back(attachment, attachment.stream, deadline)
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

    def leave_stopped(self) -> None:
        """Give up a connection whose flow was stopped, if nobody has noticed: the next use looks for another."""
        attachment = self._attachment
        if attachment is not None and not attachment.is_lost and attachment.gate.is_stopped():
            lose(attachment)

    def _reattach(self, attachment: Attachment) -> None:
        condemned = attachment.gate.is_condemned()
        lose(attachment)
        self.is_stopped = True
        try:
            self.attach()
        except FlowNotRunning:
            if condemned:
                raise gone(attachment) from None
            raise FlowNotRunning("it has been stopped", flow=self.name) from None

    def _check(self, attachment: Attachment, deadline: float) -> None:
        """Is there still somebody to wait for?"""
        restarts = attachment.restarts  # first: another thread may come back meanwhile
        # In this order: a coordinator that stops says so before it leaves.
        if attachment.is_outdated:
            come_back(attachment, attachment.stream, deadline)
        elif attachment.is_served() is not False or attachment.gate.is_stopped():
            attachment.dead = None
            return
        elif not attachment.is_lost and not may_return(attachment, restarts):
            lose(attachment)
        if attachment.is_lost and not attachment.gate.is_stopped():
            raise gone(attachment)

    # Submitting

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[TaskFuture[Any]]:
        """Submit calls of a task; return their futures, in order. The caller has looked whether this is a new child."""
        packed = [pack_call(self.name, task.name, args, kwargs) for args, kwargs in calls]
        futures: list[TaskFuture[Any]] = []
        while len(futures) < len(packed):
            attachment = self._attachment
            if attachment is None or attachment.is_lost:
                attachment = self.attach()
            batch = call_batch(attachment, task, packed, len(futures))
            if batch:
                futures += batch
            else:
                wait_for_room(attachment)
        return futures

    def put(self, changes: dict[bytes, bytes | None]) -> TaskFuture[Any]:
        """Submit a ready-made P1."""
        check_changes(changes, "put" if len(changes) == 1 else "update", self.name)
        while True:
            attachment = self.attach()
            wait_for_room(attachment)
            future = put(attachment, changes)
            if future is not None:
                return future

    def operate(self, what: str, asked: dict[bytes, bytes | None]) -> Any:
        """Submit a ready-made P1 that looks first, and wait for its result."""
        check_changes(asked, what, self.name)
        while True:
            attachment = self.attach()
            wait_for_room(attachment)
            future = operate(attachment, what, asked)
            if future is not None:
                return future.result()

    def write(self, changes: dict[bytes, bytes | None]) -> None:
        """Submit a ready-made P1 and wait until it is committed."""
        self.put(changes).result()

    def ask(self, kind: int, *fields: Any, attach: float = FIRST_USE_SECONDS) -> Any:
        """Send a question and wait for the answer."""
        return self._question(attach, kind, *fields).result()

    def _question(self, attach: float, kind: int, *fields: Any) -> TaskFuture[Any]:
        while True:
            asked = question(self.attach(attach), kind, *fields)
            if asked is not None:
                return asked

    def ask_in_time(self, deadline: float, kind: int, *fields: Any) -> Any:
        """As `ask`, of a coordinator that is there; whatever holds it up, return or raise at the deadline.

        Raises:
            TimeoutError: it has not answered by then. It may have been asked.
            FlowNotRunning: nobody is there, or nobody has let us in by then.
        """
        asked = None
        while asked is None:
            attachment = self.attach(0.0, max(0.0, deadline - time.monotonic()))
            asked = question_in_time(attachment, deadline, kind, *fields)
        return asked.result(max(0.0, deadline - time.monotonic()))

    def watch(self, version: int, keys: tuple[bytes, ...]) -> TaskFuture[Any]:
        """Ask to be told when one of the keys (none: any) has changed after *version*."""
        if len(keys) > frames.MAX_FIELDS:
            raise SerializationError(
                f"a watch of {len(keys):,} keys: it may have {frames.MAX_FIELDS:,}; watch all, and look at `key`",
                flow=self.name,
            )
        return self._question(FIRST_USE_SECONDS, frames.WATCH, version, keys)

    def __repr__(self) -> str:
        return f"<Client of {self.name!r}, {self._attachment or 'not attached'}>"
