"""Sessions: the processes that are connected to a coordinator.

Owns: one connection and one slot for each process, and who has which slot.
Written by: SF-LOOP's thread alone. Newcomers shake hands at the door (`door`) before they come here.
Invariants: a slot is given to another process only when its former process is proved dead or has said
    goodbye, and when none of its tasks is queued any more.

After a coordinator's death, the next one finds in the segment who had which slot. These are *away*: they keep
their slot, and for `GRACE` seconds their flag too; they come back when they notice, and may take their time.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

from . import handshake, wire
from .core import logger
from .door import Door
from .errors import ProtocolError
from .gate import GateKeeper, Tenancy
from .processes import Identity, open_pidfd
from .segment import Segment
from .spin import look_for
from .store import Receipt, Receipts, clear_pins, has_pins
from .wire import Frame, Stream

__all__ = ["Session", "Sessions"]

PATHS = 1 << 10
"""Entries that a newcomer's `sys.path` may have."""
ALL_PATHS = 1 << 13
"""Entries of all of them together; what comes later is not looked for there."""
GRACE = 1.0
"""Seconds that readers still wait, after a takeover, for what processes that are away had submitted."""
BUSY = 200e-6
"""Seconds within which the next frames must come for it to be worth to look for them before sleeping."""
AGAIN = 0.05
"""Seconds between looks at slots whose process still lives, though its connection is closed."""


class Session:
    """One connected process, as the coordinator sees it; `stream` is None while it is away."""

    def __init__(self, stream: Stream | None, slot: int, tenant: int, identity: Identity) -> None:
        self._stream = stream
        self.slot = slot
        self.tenant = tenant
        self.identity = identity
        self.functions: dict[int, Any] = {}
        self.answered: dict[int, bytes] | None = None
        """Answers of a former coordinator, by seq, that this process may ask for once more."""
        self.queued = 0
        self.is_open = stream is not None
        self.is_away = stream is None
        self.said_goodbye = False
        self.pidfd = open_pidfd(identity)
        self.is_dead = identity.is_dead()  # behind the descriptor, which may be that of the pid's next process

    @property
    def stream(self) -> Stream:
        """Its connection."""
        assert self._stream is not None
        return self._stream

    def __repr__(self) -> str:
        return f"<Session slot={self.slot} pid={self.identity.pid} {self.state}>"

    @property
    def state(self) -> str:
        """How it stands, in a word for people."""
        return "attached" if self.is_open else "away" if self.is_away else "leaving"


class Sessions:
    """All connected processes, and the slots."""

    def __init__(
        self,
        listener: socket.socket,
        authkey: bytes,
        segment: Segment,
        gate: GateKeeper,
        receipts: Receipts,
        renew: Callable[[], object],
        welcome: dict[str, Any],
        owner: Identity | None,
    ) -> None:
        self._segment = segment
        self._gate = gate
        self._receipts = receipts
        self._renew = renew
        self._welcome = welcome
        self._owner = owner
        self._me = Identity.mine()
        self._owner_pidfd = open_pidfd(owner) if owner else -1
        self.epoll = select.epoll()
        self._by_slot: dict[int, Session] = {}
        self._watched: dict[int, Session] = {}
        self._is_crowded = False
        self.has_leavers = False
        self.has_newcomers = False
        self._look_again = 0.0
        self._grace = 0.0
        self._is_busy = False
        self._wakeup, self._wake = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wake.setblocking(False)
        self._door = Door(listener, authkey, self._wake_up)
        for watched in (listener, self._wakeup):
            self.epoll.register(watched, select.EPOLLIN)
        if self._owner_pidfd >= 0:
            self.epoll.register(self._owner_pidfd, select.EPOLLIN)

    @property
    def wakeup_fd(self) -> int:
        """For `signal.set_wakeup_fd`: a signal makes `poll` return."""
        return self._wake.fileno()

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_slot.values()))

    def __len__(self) -> int:
        return len(self._by_slot)

    # What has happened

    def poll(self, timeout: float) -> list[tuple[Session, list[Frame]]]:
        """Wait up to *timeout* seconds (0: just look); return the frames that arrived.

        Newcomers and leavers are left to `admit` and `reclaim`: frames that have arrived must be queued first, or
        the slot of a process that is gone could be taken back ahead of its last tasks.
        """
        arrived: list[tuple[Session, list[Frame]]] = []
        for descriptor, event in self._events(timeout):
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
                    self._watch(session, select.EPOLLIN)
                if event & ~select.EPOLLOUT:
                    self._receive(session, arrived)
            elif descriptor == self._door.listener.fileno():
                if not self._door.accept():
                    self.epoll.unregister(descriptor)  # it would be ready all the time
                    self._is_crowded = True
            elif descriptor == self._wakeup.fileno():
                self.has_newcomers = True
            elif descriptor == self._owner_pidfd:
                self.epoll.unregister(descriptor)
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
        self._is_busy = perf_counter() - began < BUSY
        return events

    def _receive(self, session: Session, arrived: list[tuple[Session, list[Frame]]]) -> None:
        if not session.is_open:
            return
        try:
            frames = session.stream.receive()
        except ProtocolError as error:
            self.expel(session, error)
            return
        if frames is None:
            self.close(session)
        elif frames:
            arrived.append((session, frames))

    def expel(self, session: Session, error: Exception) -> None:
        """Close the connection of a process that broke the rules."""
        about = {**_about(session), "error": type(error).__name__}
        logger.warning("connection of pid %d closed: %s", session.identity.pid, error, extra=about)
        self.close(session)

    # Newcomers

    def hurry(self) -> None:
        """Cut off handshakes that take too long."""
        self._door.hurry()

    def _wake_up(self) -> None:
        try:
            self._wake.send(b"\0")
        except OSError:
            pass  # full: a wake-up is under way; or closed: we are stopping

    def admit(self, has_returned: Callable[[int], None]) -> None:
        """Give slots to those who have shaken hands.

        Args:
            has_returned: called with the slot of a process that comes back for the second time: what is queued of it
                comes once more.
        """
        self.has_newcomers = False
        self._has_returned = has_returned
        if self._is_crowded:
            self._is_crowded = False
            self.epoll.register(self._door.listener, select.EPOLLIN)
        try:
            while self._wakeup.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._door:
            newcomer, greeting = self._door.next_one()
            try:
                answer = self._admit(newcomer, greeting)
            except _Refused as refusal:
                answer = {"refused": refusal.args[0], "text": refusal.args[1]}
            except Exception as error:  # a damaged greeting, or no room for the semaphore
                answer = {"refused": "ProtocolError", "text": f"it cannot be admitted: {error!r}"}
            try:
                newcomer.setblocking(False)  # one that does not read must not hold us up; a welcome is short
                handshake.welcome(newcomer, answer)
            except OSError:
                pass  # it has gone; the poll will notice
            if "refused" in answer:
                newcomer.close()
                continue
            session = self._session(Stream(newcomer), self._gate.tenancy(answer["slot"]))
            session.answered = _answers_of(self._receipts.of(session.tenant)) or None
            self._enter(session)
            self._watch(session, select.EPOLLIN, new=True)
            logger.debug("pid %d attached in slot %d", session.identity.pid, session.slot, extra=_about(session))

    def _session(self, stream: Stream | None, tenancy: Tenancy) -> Session:
        identity = Identity(tenancy.pid, tenancy.start, self._me.boot, tenancy.space)
        return Session(stream, tenancy.slot, tenancy.tenant, identity)

    def _enter(self, session: Session) -> None:
        former = self._by_slot.get(session.slot)
        if former is not None:
            self._unwatch_pid(former)
        self._by_slot[session.slot] = session
        if session.pidfd >= 0:
            self._watched[session.pidfd] = session
            self.epoll.register(session.pidfd, select.EPOLLIN)

    def expect(self, tenancies: list[Tenancy]) -> None:
        """After a takeover: these had a slot, and may come back to it."""
        self._grace = time.monotonic() + GRACE
        for tenancy in tenancies:
            self._enter(self._session(None, tenancy))
        self.has_leavers = True
        self.reclaim()

    def _admit(self, newcomer: socket.socket, greeting: dict[str, Any]) -> dict[str, Any]:
        if greeting.get("protocol") != wire.PROTOCOL:
            raise _Refused(
                "ProtocolError",
                f"it speaks protocol {greeting.get('protocol')!s:.20}, the coordinator {wire.PROTOCOL}; "
                "use the same version of strictflow-mp in all processes of a flow",
            )
        python = sys.version_info[:2]
        if tuple(greeting.get("python", ())) != python:
            raise _Refused(
                "ProtocolError",
                f"it runs Python {'.'.join(map(str, greeting.get('python', '?')))}, the coordinator "
                f"{'.'.join(map(str, python))}; functions travel between them, so they must be the same",
            )
        paths = greeting.get("path")
        if type(paths) is not list or len(paths) > PATHS or not all(type(path) is str for path in paths):
            raise _Refused("ProtocolError", "its greeting is damaged")
        known = set(sys.path)
        # A path with a NUL would end every import that comes to it, with a ValueError.
        if len(known) + len(paths) <= ALL_PATHS:
            sys.path += [path for path in dict.fromkeys(paths) if path not in known and "\0" not in path]
        # The kernel does not tell the pid of a process that we cannot see: one of another pid namespace, or on macOS.
        pid = handshake.peer(newcomer)[0]
        identity = Identity.of(pid) if pid else _claimed(greeting)
        if greeting.get("resume") is not None:
            slot, tenant = self._let_back(identity, *greeting["resume"])
            return {**self._welcome, "slot": slot, "tenant": tenant, "semaphore": self._gate.semaphore_of(slot)}
        self._forget_tries(identity)
        free = self._free_slot()
        if free is None:
            raise _Refused(
                "TooManyWorkers",
                f"all {self._segment.slots - 1} places are taken by live processes; "
                "start the flow with a larger max_workers=",
            )
        if not self._gate.is_within_reach(free):
            self._gate.widen(free, self._renew)
        semaphore = self._gate.admit(free, identity)
        tenant = self._gate.tenancy(free).tenant
        return {**self._welcome, "slot": free, "tenant": tenant, "semaphore": semaphore}

    def _let_back(self, newcomer: Identity, slot: int, tenant: int, first: int) -> tuple[int, int]:
        """Somebody comes back to the slot that it had; its first P1 without an answer has number *first*."""
        session = self._by_slot.get(slot)
        if session is None or session.said_goodbye or session.tenant != tenant or not session.identity.may_be(newcomer):
            raise _Refused("CoordinatorLost", f"slot {slot} is no longer kept for tenant {tenant}")
        if not session.is_away:
            # It was here already, and a signal handler raised before it knew. It sends everything once more.
            self.close(session)
            self._has_returned(slot)
        if first > 0:
            self._gate.raise_again(slot, first)
        return slot, tenant

    def _forget_tries(self, newcomer: Identity) -> None:
        """A process that attaches anew has given up what it had from a dead coordinator, unless it reads there."""
        for session in self:
            mine = session.is_away and session.identity == newcomer
            if mine and not has_pins(self._segment, session.slot):
                self._release(session)

    def _free_slot(self) -> int | None:
        self._look_again = 0.0
        self.reclaim()
        for slot in range(1, self._segment.slots):
            if slot not in self._by_slot:
                return slot
        return None

    # Sending

    def send(self, session: Session, data: bytes) -> None:
        """Send, or keep until the process reads."""
        if session.is_open and not session.stream.send(data):
            self._watch(session, select.EPOLLIN | select.EPOLLOUT)

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

    def _watch(self, session: Session, events: int, *, new: bool = False) -> None:
        descriptor = session.stream.fileno()
        if new:
            self._watched[descriptor] = session
            self.epoll.register(descriptor, events)
        else:
            self.epoll.modify(descriptor, events)

    def _unwatch_pid(self, session: Session) -> None:
        if session.pidfd >= 0:
            self.epoll.unregister(session.pidfd)
            del self._watched[session.pidfd]
            os.close(session.pidfd)
            session.pidfd = -1

    # Leavers

    def close(self, session: Session) -> None:
        """Close a connection; its slot stays taken until `reclaim` may have it."""
        self.has_leavers = True
        self._look_again = 0.0
        if session.is_open:
            session.is_open = False
            descriptor = session.stream.fileno()
            self.epoll.unregister(descriptor)
            del self._watched[descriptor]
            session.stream.close()

    def reclaim(self) -> None:
        """Take back the slots of processes that are proved dead or have said goodbye."""
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = 0.0
        self.has_leavers = False
        for session in self:
            if session.is_open:
                continue
            if not session.queued and not (session.is_away and now < self._grace):
                self._gate.lift(session.slot)
            if session.queued:
                self.has_leavers = True
            elif session.said_goodbye or session.is_dead or (session.pidfd < 0 and session.identity.is_dead()):
                self._release(session)
            else:
                # It lives, and may still raise its flag: look again and again.
                self.has_leavers = True
                self._look_again = now + AGAIN

    def _release(self, session: Session) -> None:
        self._unwatch_pid(session)
        self._receipts.forget(session.tenant)
        clear_pins(self._segment, session.slot)
        self._gate.dismiss(session.slot)
        del self._by_slot[session.slot]
        # A read may have waited for a flag that is no longer up.
        self._gate.wake()
        logger.debug("pid %d left slot %d", session.identity.pid, session.slot, extra=_about(session))

    @property
    def is_deserted(self) -> bool:
        """Whether the owner is proved dead and nobody is attached: time to end."""
        if self._owner is None or self._door:
            return False
        if any(session.is_open or session.is_away for session in self._by_slot.values()):
            return False
        return self._owner.is_dead()

    def descriptors(self) -> list[int]:
        """Every descriptor that a forked child must close."""
        streams = [session.stream.fileno() for session in self if session.is_open]
        others = (self._door.listener.fileno(), self._wakeup.fileno(), self._wake.fileno(), self.epoll.fileno())
        return [*streams, *others]

    def close_all(self, before: Callable[[Session], None] = lambda session: None) -> None:
        """Close everything."""
        for session in self:
            before(session)
            if session.is_open:
                session.is_open = False
                session.stream.close()
            if session.pidfd >= 0:
                os.close(session.pidfd)
                session.pidfd = -1
            self._gate.dismiss(session.slot)
        self._by_slot.clear()
        self._watched.clear()
        self.epoll.close()
        if self._owner_pidfd >= 0:
            os.close(self._owner_pidfd)
        self._door.close()
        for sock in (self._wakeup, self._wake):
            sock.close()

    def __repr__(self) -> str:
        return f"<Sessions {list(self._by_slot.values())}>"


def _about(session: Session) -> dict[str, int]:
    """For log lines: whom they speak of."""
    return {"peer": session.identity.pid, "slot": session.slot}


def _answers_of(receipts: list[Receipt]) -> dict[int, bytes]:
    """The answer to each task, by seq; empty for one that is lost."""
    answers: dict[int, bytes] = {}
    for receipt in receipts:
        frame = wire.unpack_frame(receipt.answer) if receipt.answer else ()
        if frame and frame[0] == wire.RESULT:
            for seq, payload in enumerate(frame[2], receipt.seq):
                answers[seq] = wire.pack_frame(wire.RESULT, seq, (payload,))
        else:
            answers |= dict.fromkeys(range(receipt.seq, receipt.seq + receipt.tasks), receipt.answer)
    return answers


def _claimed(greeting: dict[str, Any]) -> Identity:
    fields = greeting.get("identity")
    if type(fields) is not list or len(fields) != 4 or not all(type(field) is int for field in fields):
        raise _Refused("ProtocolError", "its greeting is damaged")
    return Identity(*fields)


class _Refused(Exception):
    """(class name of the error, text)"""
