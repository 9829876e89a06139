"""The wire: frames on a connection that is made already (`handshake`).

A connection carries a stream of msgpack arrays in both directions. msgpack needs no length prefix.

Client to coordinator::

    [FUNCTION, id, by_value, code, name, priority, key, timeout]   once for each function and connection
    [CALL, seq, id, [arguments, ...], flag, ack]
                                       calls seq, seq + 1, ...; arguments: see `arguments`
    [PUT, seq, [[key, payload or nil]], flag, ack]  P1; nil deletes
    [COUNT, flag]                      count up to that number, in its turn: nobody sends those P1 tasks again
    [ACK, ack]                         the answers of P1 tasks up to that seq have arrived
    [CANCEL, seq, other]               asks whether task `other` is still to be had back
    [STATS, seq]
    [STOP, seq, drain]
    [WATCH, seq, version, [key, ...]]  asks to be told when one of the keys (none: any) has changed after that version
    [TRACE, seq, directory, on]        asks to record the run into that directory, or no more
    [GOODBYE]                          the client will not touch its slot again

`flag` is the number in its slot (`gate`) of a P1, or of the first of several; 0 for a P2. After the coordinator's
death a process sends its functions, and every frame that has no answer yet, once more to the next one.

Coordinator to client::

    [RESULT, seq, [payload, ...]]        of seq, seq + 1, ...
    [FAILURE, seq, text, pickled]        see `failures`
    [CANCELLED, seq]
    [REFUSED, kind, text]              in place of a welcome

A frame that breaks a limit or the form closes its own connection, and no other.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import msgpack

from .errors import FAULTS, ProtocolError
from .spin import look_for

__all__ = ["MAX_FRAME", "PROTOCOL", "Frame", "Stream", "check_fields", "pack_frame", "unpack_frame"]

PROTOCOL = 4
"""Version of everything in this module."""

MAX_FRAME = 1 << 30
"""Bytes in a frame, at most."""

MAX_FIELDS = 1 << 19
"""Fields in a frame, or changes in a put, at most: what is announced is set aside before it comes."""

FUNCTION, CALL, PUT, CANCEL, STATS, STOP, GOODBYE, ACK, COUNT, WATCH, TRACE = range(1, 12)
RESULT, FAILURE, CANCELLED, REFUSED = range(1, 5)

RECEIVE = 1 << 18

_pack = msgpack.Packer(autoreset=True, unicode_errors="surrogatepass").pack

Frame = tuple[Any, ...]


def pack_frame(*fields: Any) -> bytes:
    """One frame. Only for plain fields; thread-safe, since the GIL is held throughout."""
    packed: bytes = _pack(fields)
    return packed


def unpack_frame(data: bytes) -> Frame:
    """One frame that `pack_frame` made."""
    frame: Frame = msgpack.unpackb(
        data, raw=False, use_list=False, strict_map_key=False, unicode_errors="surrogatepass"
    )
    return frame


class Stream:
    """A connected socket that carries frames. Not thread-safe; its users lock."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._buffer = bytearray(RECEIVE)
        self._view = memoryview(self._buffer)
        self._unpacker = msgpack.Unpacker(
            raw=False,
            use_list=False,
            strict_map_key=False,
            max_buffer_size=MAX_FRAME,
            max_array_len=MAX_FIELDS,
            max_map_len=MAX_FIELDS,
            unicode_errors="surrogatepass",
        )
        self._count: dict[str, int] = {}
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self.inbox: deque[Frame] = deque()
        self._unsent = bytearray()
        self.is_drained = False  # whether the last portion was all that there was
        self.has_ended = False

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
        self.is_drained = count < RECEIVE
        if not count:
            self.has_ended = True
            return None
        try:
            self._unpacker.feed(view[:count])
            frames = list(self._unpacker)
        except (*FAULTS, msgpack.UnpackException) as error:
            raise _damaged(error) from error
        _check_frames(frames)
        return frames

    def wait(self, seconds: float) -> bool:
        """Wait up to that long until something has arrived, or the other end has closed; whether it has.

        Raises:
            ValueError, OSError: another thread has closed this end.
        """
        look = self._poll.poll
        if look(0):
            return True
        if seconds <= 0:
            return False
        return look_for(lambda: bool(look(0)), False) or bool(look(seconds * 1000))

    def fill(self) -> bool:
        """As `receive`, but leave the frames in `inbox`; False when the other end has closed.

        A signal handler may raise between any two bytecodes. So what is read goes from the socket into the unpacker,
        and from there into the inbox, in one C call each: nothing that has left the kernel can be lost.

        Raises:
            ProtocolError: what arrived is not a frame, or too long.
        """
        self.is_drained = True
        count, view = self._count, self._view
        count.clear()
        noted = map(count.setdefault, ("bytes",), map(self.socket.recv_into, (view,)))
        try:
            next(map(self._unpacker.feed, map(view.__getitem__, map(slice, noted))))
        except BlockingIOError:
            return True
        except (ConnectionResetError, BrokenPipeError):
            count["bytes"] = 0
        except (ValueError, msgpack.UnpackException) as error:
            raise _damaged(error) from error
        if not count["bytes"]:
            self.has_ended = True
            return False
        self.is_drained = count["bytes"] < RECEIVE
        self.unpack()
        return True

    def unpack(self) -> bool:
        """Move what has been read whole into `inbox`; whether anything is there."""
        first = len(self.inbox)
        try:
            self.inbox.extend(self._unpacker)
        except (*FAULTS, msgpack.UnpackException) as error:
            raise _damaged(error) from error
        _check_frames(islice(self.inbox, first, None))
        return bool(self.inbox)

    def send(self, data: bytes) -> bool:
        """Send, or keep for `flush` what the other end has no room for; False when some was kept.

        When the other end has closed, nothing is sent, and `has_ended` says so.
        """
        self._unsent += data
        return self.flush()

    def flush(self) -> bool:
        """Send what was kept; False when some is left.

        As in `fill`: what has gone into the socket is struck off in the same C call, so that no signal handler raises
        in between, and nothing is sent twice.
        """
        unsent = self._unsent
        try:
            while unsent:
                next(map(unsent.__delitem__, map(slice, map(self.socket.send, (unsent,), (socket.MSG_NOSIGNAL,)))))
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            self.has_ended = True
            unsent.clear()
        return True

    @property
    def unsent(self) -> int:
        """Bytes that the other end had no room for."""
        return len(self._unsent)

    def close(self) -> None:
        """Close this end."""
        self.socket.close()

    def __repr__(self) -> str:
        return f"<Stream fd={self.fileno()} unsent={self.unsent}>"


def _damaged(error: Exception) -> ProtocolError:
    what = "a frame is too long" if isinstance(error, msgpack.BufferFull) else "a damaged frame arrived"
    return ProtocolError(f"{what} ({str(error) or type(error).__name__})")


def _check_frames(frames: Iterable[Any]) -> None:
    for frame in frames:
        if type(frame) is not tuple or not frame:
            raise ProtocolError(f"a frame must be an array, not {type(frame).__name__}")


def check_fields(frame: Sequence[Any], *kinds: type | tuple[type, ...]) -> None:
    """Check a frame's fields behind the first; a bool is no int here.

    Raises:
        ProtocolError: wrong number, or wrong type.
    """
    if len(frame) != len(kinds) + 1 or not all(map(_is_of, frame[1:], kinds)):
        raise ProtocolError(f"frame {frame[0]!r} has the wrong fields")


def _is_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return type(value) in kind if type(kind) is tuple else type(value) is kind
