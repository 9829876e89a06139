"""The handshake: how a process and a coordinator connect, and each makes sure of the other.

Over an AF_UNIX socket in a directory of mode 0700, with `multiprocessing.connection`'s mutual challenge; then
the client's greeting and the coordinator's welcome are two messages of the same kind, and from there on the
connection is a `wire.Stream`. The kernel's word on the peer's pid and user goes before the peer's own.
"""

from __future__ import annotations

import os
import socket
import struct
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import msgpack

from .errors import ProtocolError

__all__ = ["accept_greeting", "connect", "greet", "listen", "peer", "welcome"]

MAX_GREETING = 1 << 20


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
        if peer(sock)[1] not in (os.getuid(), -1):
            raise ProtocolError(f"another user listens at {path}; remove it, or set STRICTFLOW_MP_DIR")
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
