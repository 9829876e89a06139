"""Sessions: the processes that are connected to a coordinator.

Owns: the listening socket, one connection and one slot for each process, and who has which slot.
Written by: SF-LOOP's thread alone; a short-lived thread for each newcomer does the handshake, so that a
    slow or hostile one holds nobody up.
Invariants: a slot is given to another process only when its former process is proved dead or has said
    goodbye, and when none of its tasks is queued any more.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from . import handshake, wire
from .core import logger
from .errors import ProtocolError
from .gate import GateKeeper
from .processes import Identity, open_pidfd
from .segment import Segment
from .store import clear_pins
from .wire import Frame, Stream

__all__ = ["Session", "Sessions"]

HANDSHAKE = 5.0
"""Seconds that a newcomer has for its handshake."""
HANDSHAKES = 32
"""Newcomers at a time; more wait in the socket's backlog."""


class Session:
    """One connected process, as the coordinator sees it."""

    def __init__(self, stream: Stream, slot: int, identity: Identity) -> None:
        self.stream = stream
        self.slot = slot
        self.identity = identity
        self.functions: dict[int, Any] = {}
        self.queued = 0
        self.is_open = True
        self.said_goodbye = False
        self.is_dead = False
        self.pidfd = open_pidfd(identity.pid)

    def __repr__(self) -> str:
        return f"<Session slot={self.slot} pid={self.identity.pid} {'open' if self.is_open else 'closed'}>"


class Sessions:
    """All connected processes, and the slots."""

    def __init__(
        self,
        listener: socket.socket,
        authkey: bytes,
        segment: Segment,
        gate: GateKeeper,
        welcome: dict[str, Any],
        owner: Identity | None,
    ) -> None:
        self._listener = listener
        self._authkey = authkey
        self._segment = segment
        self._gate = gate
        self._welcome = welcome
        self._owner = owner
        self._owner_pidfd = open_pidfd(owner.pid) if owner else -1
        self.epoll = select.epoll()
        self._by_slot: dict[int, Session] = {}
        self._watched: dict[int, Session] = {}
        self._ready: deque[tuple[socket.socket, dict[str, Any]]] = deque()
        self._handshakes = threading.BoundedSemaphore(HANDSHAKES)
        self.has_leavers = False
        self._wakeup, self._wake = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wake.setblocking(False)
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

        Newcomers and leavers are dealt with on the way.
        """
        arrived: list[tuple[Session, list[Frame]]] = []
        for descriptor, event in self.epoll.poll(timeout):
            session = self._watched.get(descriptor)
            if session is not None:
                if descriptor == session.pidfd:
                    self._unwatch_pid(session)
                    session.is_dead = True
                    # All that it sent is in the pipe: read it first.
                    self._receive(session, arrived)
                    self.close(session)
                    continue
                if event & select.EPOLLOUT and session.stream.flush():
                    self._watch(session, select.EPOLLIN)
                if event & ~select.EPOLLOUT:
                    self._receive(session, arrived)
            elif descriptor == self._listener.fileno():
                self._accept()
            elif descriptor == self._wakeup.fileno():
                self._admit_all()
            elif descriptor == self._owner_pidfd:
                self.epoll.unregister(descriptor)
        return arrived

    def _receive(self, session: Session, arrived: list[tuple[Session, list[Frame]]]) -> None:
        if not session.is_open:
            return
        try:
            frames = session.stream.receive()
        except ProtocolError as error:
            self.expel(session, error)
            return
        if frames:
            arrived.append((session, frames))
        if session.stream.has_ended:
            self.close(session)

    def expel(self, session: Session, error: Exception) -> None:
        """Close the connection of a process that broke the rules."""
        logger.warning("connection of pid %d closed: %s", session.identity.pid, error)
        self.close(session)

    # Newcomers

    def _accept(self) -> None:
        if not self._handshakes.acquire(blocking=False):
            return
        try:
            newcomer, _ = self._listener.accept()
        except OSError:
            self._handshakes.release()
            return
        threading.Thread(target=self._shake_hands, args=(newcomer,), name="handshake", daemon=True).start()

    def _shake_hands(self, newcomer: socket.socket) -> None:
        try:
            greeting = handshake.accept_greeting(newcomer, self._authkey, HANDSHAKE)
        except (OSError, EOFError):
            newcomer.close()
        except ProtocolError as error:
            logger.warning("%s", error)
            newcomer.close()
        else:
            self._ready.append((newcomer, greeting))
            try:
                self._wake.send(b"\0")
            except OSError:
                pass  # full: a wake-up is under way; or closed: we are stopping
        finally:
            self._handshakes.release()

    def _admit_all(self) -> None:
        try:
            while self._wakeup.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._ready:
            newcomer, greeting = self._ready.popleft()
            try:
                answer = self._admit(newcomer, greeting)
            except _Refused as refusal:
                answer = {"refused": refusal.args[0], "text": refusal.args[1]}
            except Exception as error:  # a damaged greeting, or no room for the semaphore
                answer = {"refused": "ProtocolError", "text": f"it cannot be admitted: {error!r}"}
            try:
                handshake.welcome(newcomer, answer)
            except OSError:
                pass  # it has gone; the poll will notice
            if "refused" in answer:
                newcomer.close()
                continue
            session = self._by_slot[answer["slot"]]
            session.stream = Stream(newcomer)
            self._watch(session, select.EPOLLIN, new=True)
            if session.pidfd >= 0:
                self._watched[session.pidfd] = session
                self.epoll.register(session.pidfd, select.EPOLLIN)
            logger.debug("pid %d attached in slot %d", session.identity.pid, session.slot)

    def _admit(self, newcomer: socket.socket, greeting: dict[str, Any]) -> dict[str, Any]:
        if greeting.get("protocol") != wire.PROTOCOL:
            raise _Refused(
                "ProtocolError",
                f"it speaks protocol {greeting.get('protocol')!r}, the coordinator {wire.PROTOCOL}; "
                "use the same version of strictflow-mp in all processes of a flow",
            )
        python = sys.version_info[:2]
        if tuple(greeting.get("python", ())) != python:
            raise _Refused(
                "ProtocolError",
                f"it runs Python {'.'.join(map(str, greeting.get('python', '?')))}, the coordinator "
                f"{'.'.join(map(str, python))}; functions travel between them, so they must be the same",
            )
        pid = handshake.peer(newcomer)[0] or int(greeting.get("pid", 0))
        identity = Identity.of(pid)
        slot = self._free_slot(identity)
        if slot is None:
            raise _Refused(
                "TooManyWorkers",
                f"all {self._segment.slots - 1} places are taken by live processes; "
                "start the flow with a larger max_workers=",
            )
        paths = greeting.get("path")
        if type(paths) is not list or not all(type(path) is str for path in paths):
            raise _Refused("ProtocolError", "its greeting is damaged")
        sys.path += [path for path in paths if path not in sys.path]
        semaphore = self._gate.admit(slot, identity.pid, identity.start)
        self._by_slot[slot] = Session(None, slot, identity)  # type: ignore[arg-type]
        return {**self._welcome, "slot": slot, "semaphore": semaphore}

    def _free_slot(self, newcomer: Identity) -> int | None:
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
        if session.is_open:
            session.is_open = False
            descriptor = session.stream.fileno()
            self.epoll.unregister(descriptor)
            del self._watched[descriptor]
            session.stream.close()

    def reclaim(self) -> None:
        """Take back the slots of processes that are proved dead or have said goodbye."""
        self.has_leavers = False
        for session in self:
            if session.is_open:
                continue
            if not session.queued:
                self._gate.lift(session.slot)
            if session.queued:
                self.has_leavers = True
            elif session.said_goodbye or session.is_dead or (session.pidfd < 0 and session.identity.is_dead()):
                self._release(session)
            else:
                # It lives, and may still raise its flag: look again and again.
                self.has_leavers = True

    def _release(self, session: Session) -> None:
        self._unwatch_pid(session)
        clear_pins(self._segment, session.slot)
        self._gate.dismiss(session.slot)
        del self._by_slot[session.slot]
        # A read may have waited for a flag that is no longer up.
        self._gate.wake()
        logger.debug("pid %d left slot %d", session.identity.pid, session.slot)

    @property
    def is_deserted(self) -> bool:
        """Whether the owner is proved dead and nobody is attached: time to end."""
        if self._owner is None or self._ready or any(session.is_open for session in self._by_slot.values()):
            return False
        return self._owner.is_dead()

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
        for newcomer, _ in self._ready:
            newcomer.close()
        for sock in (self._listener, self._wakeup, self._wake):
            sock.close()

    def __repr__(self) -> str:
        return f"<Sessions {list(self._by_slot.values())}>"


class _Refused(Exception):
    """(class name of the error, text)"""
