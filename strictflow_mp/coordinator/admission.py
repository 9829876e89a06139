"""Admission: how a process comes in: it shakes hands at the door, its greeting is checked, and it gets a slot.

Owns: the listening socket, and each connection until its process is attached (`slots`) or sent away.
Order: a thread of its own shakes hands with each newcomer, so that a slow or hostile one holds nobody up; SF-LOOP
    takes in those who are through, one after the other.
If we die here: the kernel closes the connections; a newcomer tries again.
Invariants: a newcomer that finds no descriptor or no thread here is refused, in words. Nobody else notices; and a
    listener that stays ready because nobody can be accepted is not looked at for a while.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..errors import ProtocolError
from ..system.descriptors import fill_standard
from ..system.identity import Identity
from ..system.paths import told_path
from ..system.shortage import is_shortage, limit_of, open_spare
from ..wire import frames, handshake
from ..wire.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from .sessions import Sessions
    from .slots import Slots

__all__ = ["Admission", "Door", "take_paths"]

HANDSHAKE_SECONDS = 5.0
"""That a newcomer has for its handshake."""
MAX_HANDSHAKES = 32
"""Newcomers at a time; more wait in the socket's backlog."""
MAX_ALL_PATHS = 1 << 13
"""Entries of `sys.path` that newcomers may bring together; nothing is looked for in what comes later."""

RESERVE = 16
"""Descriptors that no newcomer gets: for what is opened for a moment, and for tasks."""
SHORTAGE_SECONDS = 0.25
"""For which the listener is not looked at when not even a refusal was possible."""
WARNING_SECONDS = 10.0
"""Between two lines about newcomers that were refused."""


class Admission:
    """Lets processes in.

    Args:
        welcome: what each is told, beside what it must know of its slot.
        spare: for the door.
    """

    def __init__(
        self,
        sessions: Sessions,
        slots: Slots,
        listener: socket.socket,
        authkey: bytes,
        welcome: dict[str, Any],
        spare: int,
    ) -> None:
        self._sessions = sessions
        self._slots = slots
        self._welcome = welcome
        self.door = Door(listener, authkey, sessions.wake, spare)
        # The door has no room for another handshake. Then the listener is not watched: it would be ready all the time.
        self._is_crowded = False
        # By `time.monotonic`: until then it is not watched in any case. Moved when nobody can be accepted.
        self._closed_until = 0.0
        sessions.watch(listener.fileno(), self._accept)

    def _accept(self) -> None:
        if not self.door.accept():
            self._sessions.unwatch(self.door.listener.fileno())
            self._is_crowded = True
            if self.door.is_short:
                self._closed_until = time.monotonic() + SHORTAGE_SECONDS
                self._sessions.is_woken = True

    def admit(self) -> None:
        """Give slots to those who have shaken hands."""
        # Before the look at the door: whoever comes through after that wakes us once more.
        self._sessions.is_woken = False
        if self._is_crowded:
            if time.monotonic() < self._closed_until:
                self._sessions.is_woken = True  # look here once more, in each turn: nobody else will wake us
            else:
                self._is_crowded = False
                self._sessions.watch(self.door.listener.fileno(), self._accept)
        while self.door:
            newcomer, greeting = self.door.next_one()
            try:
                answer = self._admit(newcomer, greeting)
            except _Refused as refusal:
                answer = {"refused": refusal.args[0], "text": refusal.args[1]}
            except Exception as error:  # a damaged greeting, or no room or descriptor for the semaphore
                kind = "TooManyWorkers" if is_shortage(error) else "ProtocolError"
                why = limit_of(error) if is_shortage(error) else repr(error)
                answer = {"refused": kind, "text": f"it cannot be admitted: {why}"}
            try:
                newcomer.setblocking(False)  # one that does not read must not hold us up; a welcome is short
                handshake.welcome(newcomer, answer)
            except OSError:
                pass  # it has gone; the poll will notice
            if "refused" in answer:
                newcomer.close()
                continue
            session = self._slots.enter(Stream(newcomer), answer["slot"], greeting.get("beginning", 0))
            session.path = told_path(greeting["path"])
            logger.debug("pid %d attached in slot %d", session.identity.pid, session.slot, extra=session.about)

    def _admit(self, newcomer: socket.socket, greeting: dict[str, Any]) -> dict[str, Any]:
        """Its welcome.

        Raises:
            _Refused: it is not let in.
        """
        _check_versions(greeting)
        # The kernel does not tell the pid of a process that we cannot see: one of another pid namespace.
        pid = handshake.peer(newcomer)[0]
        take_paths(greeting.get("path"), pid)
        identity = Identity.of(pid) if pid else _claimed(greeting)
        beginning = greeting.get("beginning", 0)
        if type(beginning) is not int:
            raise _Refused("ProtocolError", "its greeting is damaged")
        slot: int | None
        if greeting.get("resume") is not None:
            slot, tenant, first = greeting["resume"]
            if not self._slots.let_back(identity, slot, tenant, first):
                raise _Refused("CoordinatorLost", f"slot {slot} is no longer kept for tenant {tenant}")
        else:
            slot = self._slots.give(identity, beginning)
            if slot is None:
                raise _Refused(
                    "TooManyWorkers",
                    f"all {self._slots.total} places are taken by live processes; "
                    "start the flow with a larger max_workers=",
                )
        return {**self._welcome, **self._slots.terms_of(slot)}

    def __repr__(self) -> str:
        return f"<Admission: {self.door!r}>"


def _check_versions(greeting: dict[str, Any]) -> None:
    if greeting.get("protocol") != frames.PROTOCOL:
        raise _Refused(
            "ProtocolError",
            f"it speaks protocol {greeting.get('protocol')!s:.20}, the coordinator {frames.PROTOCOL}; "
            "use the same version of strictflow-mp in all processes of a flow",
        )
    python = sys.version_info[:2]
    if tuple(greeting.get("python", ())) != python:
        raise _Refused(
            "ProtocolError",
            f"it runs Python {'.'.join(map(str, greeting.get('python', '?')))}, the coordinator "
            f"{'.'.join(map(str, python))}; functions travel between them, so they must be the same",
        )


def take_paths(paths: Any, pid: int) -> None:
    """Look for modules where a newcomer looks for them too, after where we do."""
    if type(paths) is not list or not all(type(path) is str for path in paths):
        raise _Refused("ProtocolError", "its greeting is damaged")
    known = {path for path in sys.path if type(path) is str}
    news = [path for path in told_path(paths) if path not in known]
    room = min(handshake.MAX_PATHS, max(0, MAX_ALL_PATHS - len(known)))
    if len(news) > room:
        text = "of the sys.path of pid %d, the last %d entries are not looked at: there are too many"
        logger.warning(text, pid, len(news) - room, extra={"peer": pid})
    sys.path += news[:room]


def _claimed(greeting: dict[str, Any]) -> Identity:
    """Who a newcomer says that it is."""
    fields = greeting.get("identity")
    if type(fields) is not list or len(fields) != 4 or not all(type(field) is int for field in fields):
        raise _Refused("ProtocolError", "its greeting is damaged")
    return Identity(*fields)


class _Refused(Exception):
    """(class name of the error, text)"""


class Door:
    """A listening socket, and those who stand in front of it.

    Args:
        wake: called, in any thread, when somebody is through, or has been sent away.
        spare: a descriptor that is given up for the moment in which a newcomer is refused for want of one.
    """

    def __init__(self, listener: socket.socket, authkey: bytes, wake: Callable[[], None], spare: int) -> None:
        self.listener = listener
        self._authkey = authkey
        self._wake = wake
        # Appended to by the threads, taken from by SF-LOOP: with their greetings, which nobody has looked into yet.
        self._through: deque[tuple[socket.socket, dict[str, Any]]] = deque()
        # Taken by `accept`, given back by the thread when its handshake is over.
        self._places = threading.BoundedSemaphore(MAX_HANDSHAKES)
        # By connection, when its whole handshake must be over (`time.monotonic`); its thread takes it out.
        self._shaking: dict[socket.socket, float] = {}
        # -1 while it could not be had back.
        self._spare = spare
        # Whether the last `accept` found no means to even refuse somebody.
        self.is_short = False
        # By `time.monotonic`, when the next line about refusals may be written.
        self._next_warning = 0.0

    def accept(self) -> bool:
        """Begin with a newcomer; False when there are too many, and nobody should look here until one is through.

        False also when nobody can be accepted; then `is_short`.
        """
        self.is_short = False
        if not self._places.acquire(blocking=False):
            return False
        try:
            fill_standard()  # a task may have closed one: its next print is not for the newcomer
            newcomer, _ = self.listener.accept()
        except OSError as error:
            self._places.release()
            self.is_short = is_shortage(error) and not self._refuse_next(error)
            return not self.is_short
        if newcomer.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVE:
            self._refuse(newcomer, OSError(errno.EMFILE, ""))
            self._places.release()
            return True
        self._shaking[newcomer] = time.monotonic() + HANDSHAKE_SECONDS
        try:
            threading.Thread(target=self._shake_hands, args=(newcomer,), name="handshake", daemon=True).start()
        except (RuntimeError, MemoryError) as error:  # no thread; whoever is attached needs none
            del self._shaking[newcomer]
            self._refuse(newcomer, error)
            self._places.release()
        return True

    def _refuse_next(self, error: OSError) -> bool:
        """Accept with the spare descriptor, only to say why not; whether that has worked."""
        if self._spare >= 0:
            os.close(self._spare)
        try:
            newcomer, _ = self.listener.accept()
        except OSError as still:
            return not is_shortage(still)
        else:
            self._refuse(newcomer, error)
            return True
        finally:
            self._spare = open_spare()

    def _refuse(self, newcomer: socket.socket, error: BaseException) -> None:
        text = limit_of(error)
        handshake.refuse(newcomer, text)
        newcomer.close()
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + WARNING_SECONDS
            logger.warning("a process was not let in: %s", text, extra={"error": type(error).__name__})

    def _shake_hands(self, newcomer: socket.socket) -> None:
        try:
            greeting = handshake.accept_greeting(newcomer, self._authkey, HANDSHAKE_SECONDS)
        except (OSError, EOFError) as error:
            if is_shortage(error):  # it has taken no step yet: the first one takes a descriptor
                handshake.refuse(newcomer, limit_of(error))
            newcomer.close()
        except ProtocolError as error:
            logger.warning("%s", error, extra={"error": type(error).__name__})
            newcomer.close()
        else:
            self._through.append((newcomer, greeting))
        finally:
            self._shaking.pop(newcomer, None)
            self._places.release()
            self._wake()  # last: what it wakes for is there

    def hurry(self) -> None:
        """Cut off handshakes that have taken too long in all: each of their parts has a deadline of its own only."""
        now = time.monotonic()
        for newcomer, deadline in list(self._shaking.items()):
            if now >= deadline:
                try:
                    newcomer.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has gone already

    def __bool__(self) -> bool:
        return bool(self._through)

    def next_one(self) -> tuple[socket.socket, dict[str, Any]]:
        """One that is through, and its greeting. Only while there is one (``bool(door)``)."""
        return self._through.popleft()

    def close(self) -> None:
        """Let nobody in any more."""
        for newcomer, _ in self._through:
            newcomer.close()
        self.listener.close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def __repr__(self) -> str:
        return f"<Door, {len(self._shaking)} shake hands, {len(self._through)} are through>"
