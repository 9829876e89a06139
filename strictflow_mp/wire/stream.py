"""The stream: a connected socket that carries frames (`frames`), in both directions.

msgpack needs no length prefix. A frame that breaks a limit or the form closes its own connection, and no other.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from typing import TYPE_CHECKING, Any

import msgpack

from ..errors import ProtocolError
from ..system.spin import look_for
from ..system.unbroken import unbroken
from ..values.codec import FAULTS
from .frames import MAX_FIELDS, MAX_FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .frames import Frame

__all__ = ["Stream"]

RECEIVE_BYTES = 1 << 18
"""What is received at a time: a portion."""


class Stream:
    """A connected socket that carries frames. Not thread-safe; its users lock."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        os.set_blocking(sock.fileno(), False)  # gevent's sockets leave the descriptor as it is
        self.socket = sock
        # One portion; what is in it means nothing once the unpacker has been fed.
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        # Holds what has arrived and is in no frame yet: less than one whole frame, unless `fill` was interrupted.
        self._unpacker = msgpack.Unpacker(
            raw=False,
            use_list=False,
            strict_map_key=False,
            max_buffer_size=MAX_FRAME_BYTES,
            max_array_len=MAX_FIELDS,
            max_map_len=MAX_FIELDS,
            unicode_errors="surrogatepass",
        )
        # Whole frames that `fill` has read, in their order. Each is taken out when it has been dealt with, not before:
        # a signal handler may raise in between.
        self.inbox: deque[Frame] = deque()
        # What is to be sent, in its order; its first byte has not been. Whoever puts something here flushes after it.
        self.outbox = bytearray()
        self.is_drained = False  # whether the last portion was all that there was
        self.has_ended = False  # True once the other end has closed, for ever
        # Empty, or the one that took its place: whoever is first writes that (`client.comeback`).
        self.successors: dict[str, Stream] = {}

    def fileno(self) -> int:
        """The descriptor, for poll and epoll."""
        return self.socket.fileno()

    def receive(self) -> list[Frame] | None:
        """The frames that have arrived, up to a portion, perhaps none; None when the other end has closed.

        For a thread in which no signal handler raises: it would lose what has left the kernel. Others `fill`.

        Raises:
            ProtocolError: what arrived is not a frame, or too long.
        """
        view = self._view
        try:
            count = self.socket.recv_into(view)
        except BlockingIOError:
            self.is_drained = True
            return []
        except (ConnectionResetError, BrokenPipeError):
            count = 0
        self.is_drained = count < RECEIVE_BYTES
        if not count:
            self.has_ended = True
            return None
        try:
            self._unpacker.feed(view[:count])
            frames = list(self._unpacker)
        except FAULTS as error:
            raise _damaged(error) from error
        _check_frames(frames)
        return frames

    def wait(self, seconds: float) -> bool:
        """Wait up to that long until something has arrived, or the other end has closed; whether it has.

        Raises:
            ValueError, OSError: another thread has closed this end.
        """
        # One of this call's own: a signal handler may wait in the middle of it, and a poll object is not entered twice.
        poll = select.poll()
        poll.register(self.socket.fileno(), select.POLLIN)
        look = poll.poll  # no `recv`, which would take from the kernel what a signal handler could lose
        if look(0):
            return True
        if seconds <= 0:
            return False
        return look_for(lambda: bool(look(0)), False) or bool(look(seconds * 1000))

    def fill(self) -> bool:
        """As `receive`, but leave the frames in `inbox`; False when the other end has closed.

        A signal handler may raise between any two bytecodes, or read here itself. So what is read goes from the socket
        into the unpacker, and from there into the inbox, in one C call each: nothing that has left the kernel can be
        lost.

        Raises:
            ProtocolError: what arrived is not a frame, or too long.
        """
        self.is_drained = True
        view = self._view
        # How much came. A dict, because that can be written in the same C call; empty: nothing.
        count: dict[str, int] = {}
        # The maps only take their arguments here. `unbroken` runs them all: receive, note how much, cut, feed.
        noted = map(count.setdefault, ("bytes",), map(self.socket.recv_into, (view,)))
        try:
            unbroken(map(self._unpacker.feed, map(view.__getitem__, map(slice, noted))))
        except BlockingIOError:
            return True
        except (ConnectionResetError, BrokenPipeError):
            count["bytes"] = 0
        except (ValueError, msgpack.UnpackException) as error:
            raise _damaged(error) from error
        if not count["bytes"]:
            self.has_ended = True
            return False
        self.is_drained = count["bytes"] < RECEIVE_BYTES
        # If a handler raises before this, the bytes are in the unpacker, where the next `unpack` finds them.
        self.unpack()
        return True

    def unpack(self) -> bool:
        """Move what has been read whole into `inbox`; whether anything is there."""
        first = len(self.inbox)
        try:
            self.inbox.extend(self._unpacker)
        except FAULTS as error:
            raise _damaged(error) from error
        _check_frames(list(self.inbox)[first:])
        return bool(self.inbox)

    def send(self, data: bytes) -> bool:
        """Send, or keep for `flush` what the other end has no room for; False when some was kept.

        When the other end has closed, nothing is sent, and `has_ended` says so.
        """
        self.outbox.extend(data)  # after what was kept, so that the order stays
        return self.flush()

    def flush(self) -> bool:
        """Send what was kept; False when some is left.

        As in `fill`: what has gone into the socket is struck off in the same C call, so that no signal handler raises
        in between, and nothing is sent twice.
        """
        outbox = self.outbox
        try:
            while outbox:
                unbroken(map(outbox.__delitem__, map(slice, map(self.socket.send, (outbox,), (socket.MSG_NOSIGNAL,)))))
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            self.end()
        except OSError:
            if not self.has_ended:
                raise
            self.end()  # whoever came in between has closed it
        return True

    def end(self) -> None:
        """Send nothing any more. After a restart, frames that have no answer are packed anew."""
        self.has_ended = True
        try:
            self.outbox.clear()
        except BufferError:
            pass  # another thread is just sending it, or was when we were forked: nothing comes of it any more

    @property
    def unsent(self) -> int:
        """Bytes that the other end had no room for."""
        return len(self.outbox)

    def shut(self) -> None:
        """Take in nothing that is sent from now on: what has arrived already is received, and then the end."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended

    @property
    def is_closed(self) -> bool:
        """Whether this end is closed."""
        return self.socket.fileno() < 0

    def close(self) -> None:
        """Close this end."""
        self.end()
        self.socket.close()

    def __repr__(self) -> str:
        return f"<Stream fd={self.fileno()} unsent={self.unsent}>"


def _damaged(error: Exception) -> ProtocolError:
    what = "a frame is too long" if isinstance(error, msgpack.BufferFull) else "a damaged frame arrived"
    return ProtocolError(f"{what} ({str(error) or type(error).__name__})")


def _check_frames(frames: Iterable[Any]) -> None:
    """Arrays come as tuples, and every frame is one that says what it is."""
    for frame in frames:
        if type(frame) is not tuple or not frame:
            raise ProtocolError(f"a frame must be an array, not {type(frame).__name__}")
