"""The wire: authenticated connections, and frames on them.

A connection is made with `multiprocessing.connection`'s mutual challenge over an AF_UNIX socket in a
directory of mode 0700. The client's greeting and the coordinator's welcome are its messages; from then on
the descriptor carries a stream of msgpack arrays in both directions. msgpack needs no length prefix.

Client to coordinator::

    [FUNCTION, id, by_value, code, name, priority, key, timeout]   once for each function and connection
    [CALL, seq, id, arguments]         arguments: packed [args, kwargs], or b"" for none
    [PUT, seq, [[key, payload or nil]]]  P1; nil deletes
    [CANCEL, seq, other]               asks whether task `other` is still to be had back
    [STATS, seq]
    [STOP, seq, drain]
    [GOODBYE]                          the client will not touch its slot again

Coordinator to client::

    [RESULT, seq, payload]
    [FAILURE, seq, kind, text, pickled]  see `failures`
    [CANCELLED, seq]
    [REFUSED, kind, text]              in place of a welcome

A frame that breaks a limit or the form closes its own connection, and no other.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import msgpack

from .errors import ProtocolError

__all__ = ["MAX_FRAME", "PROTOCOL", "Stream", "accept_greeting", "connect", "greet", "listen", "pack_frame"]

PROTOCOL = 1
"""Version of everything in this module."""

MAX_FRAME = 1 << 30
"""Bytes in a frame, at most."""
MAX_GREETING = 1 << 20

FUNCTION, CALL, PUT, CANCEL, STATS, STOP, GOODBYE = range(1, 8)
RESULT, FAILURE, CANCELLED, REFUSED = range(1, 5)

RECEIVE = 1 << 18

_pack = msgpack.Packer(autoreset=True).pack

Frame = tuple[Any, ...]


def pack_frame(*fields: Any) -> bytes:
    """One frame. Only for plain fields; thread-safe, since the GIL is held throughout."""
    packed: bytes = _pack(fields)
    return packed


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
            unicode_errors="surrogatepass",
        )
        self._unsent = bytearray()
        self.has_ended = False

    def fileno(self) -> int:
        """The descriptor, for poll and epoll."""
        return self.socket.fileno()

    def receive(self) -> list[Frame] | None:
        """The frames that have arrived, perhaps none; None when the other end has closed.

        Raises:
            ProtocolError: what arrived is not a frame, or too long.
        """
        frames: list[Frame] = []
        unpacker = self._unpacker
        while True:
            try:
                count = self.socket.recv_into(self._view)
            except BlockingIOError:
                return frames
            except (ConnectionResetError, BrokenPipeError):
                count = 0
            if not count:
                self.has_ended = True
                return frames or None
            try:
                unpacker.feed(self._view[:count])
                frames += unpacker
            except Exception as error:
                raise ProtocolError(f"a damaged frame arrived ({str(error) or type(error).__name__})") from error
            for frame in frames:
                if type(frame) is not tuple or not frame:
                    raise ProtocolError(f"a frame must be an array, not {type(frame).__name__}")
            if count < RECEIVE:
                return frames

    def send(self, data: bytes) -> bool:
        """Send, or keep for `flush` what the other end has no room for; False when some was kept."""
        if self._unsent:
            self._unsent += data
            return self.flush()
        try:
            sent = self.socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            return True  # nobody is there to read it; the next receive says so
        if sent == len(data):
            return True
        self._unsent += memoryview(data)[sent:]
        return False

    def flush(self) -> bool:
        """Send what was kept; False when some is left."""
        unsent = self._unsent
        while unsent:
            try:
                sent = self.socket.send(memoryview(unsent)[: 1 << 20], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                unsent.clear()
                return True
            del unsent[:sent]
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


def listen(path: Path) -> socket.socket:
    """Listen at *path*."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _limit_waits(sock: socket.socket, seconds: float) -> None:
    """Give blocking calls on the socket a deadline; the descriptor itself stays blocking."""
    whole, part = divmod(seconds, 1)
    limit = struct.pack("ll", int(whole), int(part * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def connect(path: Path, authkey: bytes, timeout: float) -> socket.socket:
    """Connect to a coordinator and prove to each other that both know the key.

    Raises:
        ConnectionRefusedError, FileNotFoundError: nobody listens there.
        ProtocolError: the other end does not know the key, or answers too late.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
        sock.setblocking(True)
        _limit_waits(sock, timeout)
        with Connection(os.dup(sock.fileno())) as connection:
            answer_challenge(connection, authkey)
            deliver_challenge(connection, authkey)
    except AuthenticationError as error:
        sock.close()
        raise ProtocolError(f"authentication failed at {path}: {error}") from error
    except EOFError as error:
        sock.close()
        raise ConnectionRefusedError(f"{path} hung up") from error
    except BaseException:
        sock.close()
        raise
    return sock


def greet(sock: socket.socket, greeting: dict[str, Any]) -> dict[str, Any]:
    """Send the client's greeting, return the coordinator's welcome."""
    with Connection(os.dup(sock.fileno())) as connection:
        connection.send_bytes(msgpack.packb(greeting))
        welcome = msgpack.unpackb(connection.recv_bytes(MAX_GREETING))
    if not isinstance(welcome, dict):
        raise ProtocolError("the coordinator's welcome is damaged")
    return welcome


def accept_greeting(sock: socket.socket, authkey: bytes, timeout: float) -> dict[str, Any]:
    """The coordinator's side of `connect` and of the first half of `greet`.

    Raises:
        ProtocolError: the other end does not know the key, is another user, or speaks something else.
        OSError, EOFError: it went away or was too slow.
    """
    sock.setblocking(True)
    _limit_waits(sock, timeout)
    uid = peer(sock)[1]
    if uid not in (os.getuid(), -1):
        raise ProtocolError(f"a connection from user {uid} was refused: this flow is user {os.getuid()}'s")
    with Connection(os.dup(sock.fileno())) as connection:
        try:
            deliver_challenge(connection, authkey)
            answer_challenge(connection, authkey)
            greeting = msgpack.unpackb(connection.recv_bytes(MAX_GREETING))
        except (AuthenticationError, AssertionError, ValueError) as error:
            raise ProtocolError(f"a connection was refused: {str(error) or type(error).__name__}") from error
    if not isinstance(greeting, dict):
        raise ProtocolError("a connection was refused: its greeting is damaged")
    return greeting


def welcome(sock: socket.socket, answer: dict[str, Any]) -> None:
    """The second half of `greet`."""
    with Connection(os.dup(sock.fileno())) as connection:
        connection.send_bytes(msgpack.packb(answer))


def peer(sock: socket.socket) -> tuple[int, int]:
    """The pid and the user of the other end, as the kernel knows them (0, -1 where it does not tell)."""
    if not hasattr(socket, "SO_PEERCRED"):  # macOS
        return 0, -1
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


def check_fields(frame: Sequence[Any], *kinds: type | tuple[type, ...]) -> None:
    """Check a frame's fields behind the first.

    Raises:
        ProtocolError: wrong number, or wrong type.
    """
    if len(frame) != len(kinds) + 1 or not all(map(isinstance, frame[1:], kinds)):
        raise ProtocolError(f"frame {frame[0]!r} has the wrong fields")
