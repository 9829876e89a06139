"""The outlet: standard output and error of a process that must not wait for whoever reads them.

A pipe that is full, a terminal that is stopped (Ctrl-S), a log driver that has stalled: whoever writes to them waits,
for ever if nobody reads. SF-LOOP logs, and prints what tasks print; so does the thread that starts the next
coordinator.

What the descriptor takes at once is written at once, so that it is out when the process is killed next. What it does
not take waits in a queue, and a thread writes it. What the queue has no room for is dropped, and a line says how many
lines that were. Where nobody will ever read (EPIPE, EIO) everything is dropped, without an error.

Files are left alone: they take what they are given. So is what is written past Python's `sys.stdout` and `sys.stderr`.
"""

from __future__ import annotations

import io
import os
import select
import socket
import stat
import sys
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, TextIO

from .forks import in_child

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

__all__ = ["Outlet", "drain", "install"]

QUEUE_BYTES = 1 << 23
"""That wait for a reader; what comes then is dropped."""
WRITABLE_MS = 1000
"""Milliseconds between two tries where the descriptor itself does not wait."""
DROPPED = b"strictflow-mp: %d lines of pid %d were dropped here: nobody read them\n"

_outlets: weakref.WeakSet[Outlet] = weakref.WeakSet()


def install() -> None:
    """Let `sys.stdout` and `sys.stderr` never wait. Once, before anybody has kept one of them."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, _relieved(getattr(sys, name)))


def drain(seconds: float) -> None:
    """Before the end: give whoever reads that long to read what waits."""
    deadline = time.monotonic() + seconds
    for outlet in list(_outlets):
        outlet.join(max(0.0, deadline - time.monotonic()))


def _relieved(stream: TextIO | None) -> TextIO | None:
    try:
        descriptor = stream.fileno() if stream is not None else -1
        kind = os.fstat(descriptor).st_mode
    except (OSError, ValueError):
        return stream  # closed, or no file
    assert stream is not None
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(descriptor)):
        return stream
    stream.flush()
    buffer = io.BufferedWriter(Outlet(descriptor))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


class Outlet(io.RawIOBase):
    """A descriptor that takes whatever it is given, at once.

    Attributes:
        lost: lines that were dropped, and nobody has been told of.
        never_waits: for `core.setup_logging`: there is no need to look whether there is room.
    """

    never_waits = True

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._write_now = _writer(descriptor)
        # Re-entrant: a finalizer, or a signal handler, may print while this thread prints.
        self._lock = threading.RLock()
        # What the descriptor did not take, in order; the first one stays here until all of it has been written. While
        # there is any, everything that comes is put after it. Changed while `_lock` is held.
        self._waiting: deque[bytes] = deque()
        # The sum of their lengths.
        self._bytes = 0
        # What writes them; None while there are none, and while no thread can be had.
        self._thread: threading.Thread | None = None
        self.lost = 0
        # In a forked child, for good: it is no SF-LOOP, may wait, and has no thread.
        self._may_wait = False
        _outlets.add(self)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or keep, or drop: all of it is dealt with."""
        block = bytes(data)
        if self._may_wait:
            return os.write(self._descriptor, block)
        with self._lock:
            if not self._waiting:
                taken = self._at_once(block)
                if taken == len(block):
                    return taken
                self._keep(block[taken:])
            else:
                self._keep(block)
            if self._thread is None:
                self._begin()
        return len(block)

    def _at_once(self, block: bytes) -> int:
        """Write what is taken without waiting; return how many bytes are dealt with."""
        done = 0
        try:
            while done < len(block):
                done += self._write_now(block[done:])
        except BlockingIOError:
            return done
        except OSError:
            self.lost += _lines(block[done:])  # there is no reader, and will be none
        return len(block)

    def _keep(self, block: bytes) -> None:
        if self._bytes + len(block) > QUEUE_BYTES:
            self.lost += _lines(block)
            return
        self._waiting.append(block)
        self._bytes += len(block)

    def _begin(self) -> None:
        thread = threading.Thread(target=self._pump, name="strictflow-outlet", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            self._thread = None  # out of threads: with the next line it is tried again

    def _pump(self) -> None:
        """In the thread: write what waits, until nothing does."""
        while (block := self._next()) is not None:
            try:
                written = os.write(self._descriptor, block)
            except BlockingIOError:  # somebody else has made the descriptor one that does not wait
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(WRITABLE_MS)
                continue
            except OSError:
                self._give_up()
                continue
            with self._lock:
                self._bytes -= written
                if written == len(block):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = block[written:]

    def _next(self) -> bytes | None:
        with self._lock:
            if not self._waiting and self.lost:
                self._keep(DROPPED % (self.lost, os.getpid()))
                self.lost = 0
            if self._waiting:
                return self._waiting[0]
            self._thread = None
            return None

    def _give_up(self) -> None:
        """There is no reader: nobody will ever know what was lost."""
        with self._lock:
            self._waiting.clear()
            self._bytes = self.lost = 0

    def join(self, seconds: float) -> None:
        """Wait until nothing waits, or *seconds* are over."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def after_fork(self) -> None:
        """In a forked child."""
        self._lock = threading.RLock()
        self._waiting.clear()
        self._bytes = self.lost = 0
        self._thread = None
        self._may_wait = True

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor itself: whoever writes there may wait."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether a person may read it."""
        return os.isatty(self._descriptor)

    def __repr__(self) -> str:
        return f"<Outlet to {self._descriptor}, {self._bytes} bytes wait, {self.lost} lines lost>"


def _writer(descriptor: int) -> Callable[[bytes], int]:
    """What writes to a descriptor without waiting; it raises BlockingIOError where it would have to."""
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        sock = socket.socket(fileno=os.dup(descriptor))
        return lambda block: sock.send(block, socket.MSG_DONTWAIT)
    try:
        # Opened anew, and not O_NONBLOCK on the descriptor: that would be so for all who have inherited it.
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return _never  # another user's terminal; a pipe without a reader; no /proc
    return lambda block: os.write(own, block)


def _never(block: bytes) -> int:
    raise BlockingIOError


def _lines(block: bytes) -> int:
    return block.count(b"\n") or 1


def _after_fork_in_child() -> None:
    for outlet in list(_outlets):
        outlet.after_fork()


in_child(_after_fork_in_child)
