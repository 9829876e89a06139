"""Sessions: the processes that are connected to a coordinator, and what arrives from them and goes to them.

Owns: one connection and one pidfd for each process; the epoll descriptor that watches them all.
Written by: SF-LOOP's thread alone, but for `wake`. Newcomers shake hands at the door (`admission`) before they come
    here; which process has which slot is decided in `slots`.
Order: a process's end is told by its pidfd or its connection; all that it sent is received before its session is
    closed, and queued before its slot is taken back.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..errors import ProtocolError
from ..system.identity import Identity, beginning_of, open_pidfd, runs_another
from ..system.spin import look_for
from ..wire import frames
from ..wire.failures import pack_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..wire.frames import Frame
    from ..wire.stream import Stream

__all__ = ["Session", "Sessions"]

BUSY_SECONDS = 200e-6
"""Within which the next frames must come for it to be worth to look for them before sleeping."""


class Session:
    """One connected process, as the coordinator sees it; `stream` is None while it is away."""

    def __init__(self, stream: Stream | None, slot: int, tenant: int, identity: Identity, beginning: int = 0) -> None:
        self._stream = stream
        self.slot = slot
        # Drawn at its admission to the slot; it keeps it when it comes back to the next coordinator.
        self.tenant = tenant
        self.identity = identity
        # Of the program that attached, as it has said; 0: unknown, as that of a process that is away.
        self.beginning = beginning
        # Whether we see the same: then another one tells that the process runs another program by now.
        self._is_in_sight = beginning != 0 and identity.is_here and beginning_of(identity.pid) == beginning
        # What FUNCTION frames of this connection brought, by id; a CALL names one of them.
        self.functions: dict[int, Any] = {}
        # Where it looks for modules, in its order.
        self.path: list[str] = []
        # Answers of a former coordinator, by seq, that this process may ask for once more. None if there are none:
        # then its calls are queued without a look.
        self.answered: dict[int, bytes] | None = None
        # Its calls that are queued or under way, COUNTs and cancelled P1 tasks included. While there are any its slot
        # is not taken back: their tickets are still to be stored.
        self.queued = 0
        # True from its admission until `Sessions.close`; never True again.
        self.is_open = stream is not None
        # Had its slot when the former coordinator died, and has not come back: if it does, another session replaces
        # this one. So it never changes.
        self.is_away = stream is None
        # By `time.monotonic`: what it had submitted is still to come from it, all over again, and until then its flag
        # stays up though it is not connected. 0.0: nothing is; so after its COUNT.
        self.awaited_until = 0.0
        # It will not touch its slot again, but to let go of the pins that it has: without these, the slot may be given
        # away while it lives. True for good: it has said so, or has attached anew.
        self.said_goodbye = False
        # Another program of the process has attached: the one that had the slot is gone, and all that it had mapped.
        self.is_replaced = False
        # Watched while the session is among the `Sessions`; -1 when there is none, and once it has told of the end.
        self.pidfd = open_pidfd(identity)
        # Proved, for good. Looked at after the descriptor was opened: that may be one of the pid's next process.
        self.is_dead = identity.is_dead()

    @property
    def stream(self) -> Stream:
        """Its connection."""
        assert self._stream is not None
        return self._stream

    def __repr__(self) -> str:
        return f"<Session slot={self.slot} pid={self.identity.pid} {self.state}>"

    def is_gone(self) -> bool:
        """Whether the program that had attached is proved to be gone: nobody touches the slot any more."""
        if self.is_replaced or self.is_dead or (self.pidfd < 0 and self.identity.is_dead()):
            return True
        return self.has_begun_anew()

    def has_begun_anew(self) -> bool:
        """Whether the process is proved to run another program than the one that attached, which is gone."""
        return self._is_in_sight and runs_another(self.identity.pid, self.beginning)

    @property
    def is_expected(self) -> bool:
        """Whether it is not connected, and may come back: it has not yet, or went again before it had sent all."""
        return not (self.is_open or self.said_goodbye) and (self.is_away or self.awaited_until > 0)

    @property
    def state(self) -> str:
        """How it stands, in a word for people."""
        return "attached" if self.is_open else "away" if self.is_expected else "leaving"

    @property
    def about(self) -> dict[str, int]:
        """For log lines: whom they speak of."""
        return {"peer": self.identity.pid, "slot": self.slot}


class Sessions:
    """All connected processes."""

    def __init__(self, owner: Identity | None, linger: float = 0.0) -> None:
        self._linger = linger  # seconds that an orphan waits to be adopted when nobody is attached
        self._deserted_since = math.inf  # by `time.monotonic`; infinite while it is not
        self.epoll = select.epoll()
        # By slot, each process that has one: attached, away or leaving. A slot that is not here is free.
        self._by_slot: dict[int, Session] = {}
        # By descriptor, the session that it tells of: its stream's while it is open, its pidfd unless that is -1.
        self._watched: dict[int, Session] = {}
        # By descriptor, what is called when any other one is ready. Each of these and of `_watched` is in the epoll,
        # and nothing else is.
        self._reactions: dict[int, Callable[[], None]] = {}
        # Whether a slot may have to be taken back: set whenever a connection closes or a task of a closed one is
        # over, cleared by `Slots.reclaim` when there is nothing left to wait for.
        self.has_leavers = False
        # By `time.monotonic`, when `Slots.reclaim` looks next; 0.0: at once. Set only for leavers that still live, and
        # taken back when another connection closes.
        self.next_look = 0.0
        # Somebody has called `wake`, or a signal came, since `Admission.admit` looked.
        self.is_woken = False
        # Whether the last frames came within BUSY_SECONDS: then it pays to look before sleeping.
        self._is_busy = False
        # A byte from any thread, or of a signal's number, makes `poll` return.
        self._wakeup, self._wake = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wake.setblocking(False)
        self.watch(self._wakeup.fileno(), self._take_wakeups)
        # The process that started the coordinator; None: nobody is missed, and the flow ends when it is stopped.
        self._owner = owner
        # Of the program that the owner runs: one that has been replaced (`os.execv`) starts nothing any more.
        self._owner_beginning = beginning_of(owner.pid) if owner and owner.is_here else 0
        # Wakes an idle loop when the owner ends, once; -1 if there is none. The proof is `Identity.is_dead`.
        self._owner_pidfd = open_pidfd(owner) if owner else -1
        if self._owner_pidfd >= 0:
            self.watch(self._owner_pidfd, partial(self.unwatch, self._owner_pidfd))

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_slot.values()))

    def __len__(self) -> int:
        return len(self._by_slot)

    def at(self, slot: int) -> Session | None:
        """The process that has a slot."""
        return self._by_slot.get(slot)

    # What has happened

    def poll(self, timeout: float) -> list[tuple[Session, list[Frame]]]:
        """Wait up to *timeout* seconds (0: just look); return the frames that arrived.

        Newcomers and leavers are left to `Admission.admit` and `Slots.reclaim`: frames that have arrived must be queued
        first, or the slot of a process that is gone could be taken back before its last tasks are in the queue.
        """
        arrived: list[tuple[Session, list[Frame]]] = []
        for descriptor, event in self._events(timeout):
            # Neither finds a descriptor that an earlier event of this round has closed.
            session = self._watched.get(descriptor)
            if session is not None:
                if descriptor == session.pidfd:
                    self._unwatch_pid(session)
                    session.is_dead = True
                    # All that it sent is in the pipe: read it first.
                    while session.is_open:
                        self._receive(session, arrived)
                        if session.stream.is_drained:
                            break
                    self.close(session)
                    continue
                if event & select.EPOLLOUT and session.stream.flush():
                    self.epoll.modify(descriptor, select.EPOLLIN)
                if event & ~select.EPOLLOUT:
                    self._receive(session, arrived)
            elif descriptor in self._reactions:
                self._reactions[descriptor]()
        return arrived

    def _events(self, timeout: float) -> list[tuple[int, int]]:
        """What epoll says. While frames come one soon after the other, it looks for a while before it sleeps."""
        look = self.epoll.poll
        if timeout <= 0:
            return look(0)
        began = perf_counter()
        events = (look(0) or look_for(partial(look, 0), [])) if self._is_busy else []
        if events:
            return events
        events = look(timeout)
        self._is_busy = perf_counter() - began < BUSY_SECONDS
        return events

    def _receive(self, session: Session, arrived: list[tuple[Session, list[Frame]]]) -> None:
        if not session.is_open:
            return
        try:
            received = session.stream.receive()
        except ProtocolError as error:
            self.expel(session, error)
            return
        if received is None:
            self.close(session)
        elif received:
            arrived.append((session, received))

    def watch(self, descriptor: int, react: Callable[[], None]) -> None:
        """Have *react* called by `poll` whenever a descriptor is readable."""
        self._reactions[descriptor] = react
        self.epoll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """No longer."""
        self.epoll.unregister(descriptor)
        del self._reactions[descriptor]

    # Being woken

    @property
    def wakeup_fd(self) -> int:
        """For `signal.set_wakeup_fd`: a signal makes `poll` return."""
        return self._wake.fileno()

    def wake(self) -> None:
        """Make `poll` return, and `is_woken` true. In any thread."""
        try:
            self._wake.send(b"\0")
        except OSError:
            pass  # full: a wake-up is under way; or closed: we are stopping

    def _take_wakeups(self) -> None:
        # Emptied before anybody looks for the reason: a byte that comes after that is for the next `poll`.
        try:
            while self._wakeup.recv(4096):
                pass
        except BlockingIOError:
            pass
        self.is_woken = True

    # Coming and going

    def enter(self, session: Session) -> None:
        """From now on this process has its slot, which was nobody's, or its own before it came back."""
        former = self._by_slot.get(session.slot)
        if former is not None:
            self._unwatch_pid(former)
        self._by_slot[session.slot] = session
        if session.pidfd >= 0:
            self._watched[session.pidfd] = session
            self.epoll.register(session.pidfd, select.EPOLLIN)
        if session.is_open:
            descriptor = session.stream.fileno()
            self._watched[descriptor] = session
            self.epoll.register(descriptor, select.EPOLLIN)

    def expel(self, session: Session, error: Exception) -> None:
        """Close the connection of a process that broke the rules."""
        about = {**session.about, "error": type(error).__name__}
        logger.warning("connection of pid %d closed: %s", session.identity.pid, error, extra=about)
        self.close(session)

    def close(self, session: Session) -> None:
        """Close a connection; its slot stays taken until `Slots.reclaim` may have it."""
        self.has_leavers = True
        self.next_look = 0.0
        if session.is_open:
            session.is_open = False
            # Unregistered before it is closed: the number may be that of the next connection.
            descriptor = session.stream.fileno()
            self.epoll.unregister(descriptor)
            del self._watched[descriptor]
            session.stream.close()

    def remove(self, session: Session) -> None:
        """A process whose connection is closed has its slot no longer."""
        self._unwatch_pid(session)
        del self._by_slot[session.slot]

    def _unwatch_pid(self, session: Session) -> None:
        if session.pidfd >= 0:
            self.epoll.unregister(session.pidfd)
            del self._watched[session.pidfd]
            os.close(session.pidfd)
            session.pidfd = -1

    @property
    def is_deserted(self) -> bool:
        """Whether, for as long as it lingers, the owner is proved dead and nobody is attached, or may come back."""
        if self._owner is None:
            return False
        is_used = any(session.is_open or session.is_expected for session in self._by_slot.values())
        if is_used or not self._owner.is_dead():
            self._deserted_since = math.inf
            return False
        now = time.monotonic()
        self._deserted_since = min(self._deserted_since, now)
        return now - self._deserted_since >= self._linger

    def has_owner(self) -> bool:
        """Whether there is an owner who may start the next coordinator: it is not proved that it cannot."""
        owner = self._owner
        if owner is None or owner.is_dead():
            return False
        return not runs_another(owner.pid, self._owner_beginning)

    def take_owner(self, owner: Identity) -> None:
        """The former one has died, and this process starts the next coordinator."""
        if self._owner_pidfd >= 0:
            if self._owner_pidfd in self._reactions:
                self.unwatch(self._owner_pidfd)
            os.close(self._owner_pidfd)
            self._owner_pidfd = -1
        self._owner = owner
        self._owner_beginning = beginning_of(owner.pid) if owner.is_here else 0

    # Sending

    def send(self, session: Session, data: bytes) -> None:
        """Send, or keep until the process reads."""
        if session.is_open and not session.stream.send(data):
            self.epoll.modify(session.stream.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def fail(self, session: Session, seq: int, error: BaseException) -> None:
        """Answer a question that is no task with an exception."""
        self.send(session, frames.pack_frame(frames.FAILURE, seq, *pack_failure(error)))

    def flush(self, timeout: float) -> None:
        """Before the end: give processes that long to read what is kept for them."""
        waiting = [session for session in self if session.is_open and session.stream.unsent]
        poll = select.poll()
        for session in waiting:
            poll.register(session.stream.fileno(), select.POLLOUT)
        while waiting and poll.poll(timeout * 1000):
            for session in list(waiting):
                if session.stream.flush():
                    poll.unregister(session.stream.fileno())
                    waiting.remove(session)

    # The end

    def descriptors(self) -> list[int]:
        """Every descriptor that a forked child must close."""
        streams = [session.stream.fileno() for session in self if session.is_open]
        return [*streams, self._wakeup.fileno(), self._wake.fileno(), self.epoll.fileno()]

    def shut(self) -> None:
        """Watch nothing any more, once no session is left."""
        self.epoll.close()
        if self._owner_pidfd >= 0:
            os.close(self._owner_pidfd)
        for sock in (self._wakeup, self._wake):
            sock.close()

    def __repr__(self) -> str:
        return f"<Sessions {list(self._by_slot.values())}>"
