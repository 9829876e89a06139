"""The handshake: how a process and a coordinator connect, and each makes sure of the other.

Over an AF_UNIX socket in a directory of mode 0700. The steps, in this order; each waits for the one before::

    client                                coordinator
    connect                               accept
    looks at the other end's user         looks at the other end's user
    answers the challenge          <---   challenges: only a holder of the flow's key can answer
    challenges                     --->   answers
    greeting                       --->   (`accept_greeting` ends here; the session may refuse)
                                   <---   welcome, or why not
    or, where the first challenge would be:
                                   <---   a refusal: it is out of descriptors, or of threads (`refuse`)
    from here on a `wire.stream.Stream`   the same

The challenges are those of `multiprocessing.connection`, greeting and welcome two messages of the same form, each a
msgpack map. Where the kernel tells the pid and the user of the other end, nobody believes the other end about them.

Strings in them may hold surrogates: names of files that are no UTF-8.

Invariant: no single read or write waits longer than the given time; `coordinator.admission` limits them all together.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import os
import socket
import struct
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

import msgpack

from ..errors import ProtocolError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "MAX_PATHS",
    "MAX_PATH_BYTES",
    "Refused",
    "accept_greeting",
    "connect",
    "greet",
    "listen",
    "peer",
    "refuse",
    "welcome",
]

MAX_GREETING_BYTES = 1 << 20
"""What is announced is set aside before it comes."""
MAX_PATHS = 1 << 10
"""Entries of its `sys.path` of which a newcomer tells."""
MAX_PATH_BYTES = MAX_GREETING_BYTES >> 1
"""Bytes that they may have."""
MAX_REFUSAL_BYTES = 1 << 10
REFUSAL = b"#REFUSED#"
"""How a refusal begins, where a challenge would. Its length and this are what is looked at first."""


class Refused(ConnectionRefusedError):
    """The coordinator has not the means for a handshake just now; the text says what it has run out of."""


def listen(path: Path) -> socket.socket:
    """Listen at *path*."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o600)  # between `bind` and `listen` nobody can connect yet
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _pack(message: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(message, unicode_errors="surrogatepass")
    return packed


def _unpack(message: bytes) -> Any:
    return msgpack.unpackb(message, unicode_errors="surrogatepass")


def _block(sock: socket.socket, seconds: float) -> None:
    """Let calls on the socket block, with a deadline for each.

    `settimeout` would not do: a `Connection` reads the descriptor itself, past the socket object. `setblocking`
    alone would not do: gevent's sockets leave the descriptor as it is.
    """
    sock.setblocking(True)
    os.set_blocking(sock.fileno(), True)
    _limit_waits(sock, seconds)


def _limit_waits(sock: socket.socket, seconds: float) -> None:
    whole, part = divmod(seconds, 1)
    limit = struct.pack("ll", int(whole), int(part * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def connect(path: Path, authkey: bytes, timeout: float, opened: list[socket.socket] | None = None) -> socket.socket:
    """Connect to a coordinator and prove to each other that both know the key.

    Args:
        opened: takes the socket as soon as the other end exists.

    Raises:
        ConnectionRefusedError, FileNotFoundError: nobody listens there.
        Refused: somebody does, and has not the means to let us in.
        TimeoutError, BlockingIOError: nobody has accepted us in time, or the other end answers too late.
        ProtocolError: the other end does not know the key, or is another user.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
        if opened is not None:
            opened.append(sock)
        if peer(sock)[1] not in (os.getuid(), -1):
            raise ProtocolError(f"another user listens at {path}; remove it, or set STRICTFLOW_MP_DIR")
        # Both kinds of first message are sent in one piece.
        is_refused = sock.recv(4 + len(REFUSAL), socket.MSG_PEEK)[4:] == REFUSAL
        _block(sock, timeout)
        # Of a copy of the descriptor, because a `Connection` closes its own.
        with Connection(os.dup(sock.fileno())) as connection:
            if is_refused:
                raise Refused(connection.recv_bytes(MAX_REFUSAL_BYTES)[len(REFUSAL) :].decode(errors="replace"))
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


def greet(sock: socket.socket, greeting: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Send the client's greeting, return the coordinator's welcome.

    Args:
        timeout: seconds that are left for it; None: as `connect` was given.

    Raises:
        ProtocolError: the welcome is damaged.
        OSError, EOFError: the coordinator went away, or is too slow.
    """
    if timeout is not None:
        _limit_waits(sock, timeout)
    with Connection(os.dup(sock.fileno())) as connection:
        connection.send_bytes(_pack(greeting))
        welcome = _unpack(connection.recv_bytes(MAX_GREETING_BYTES))
    if not isinstance(welcome, dict):
        raise ProtocolError("the coordinator's welcome is damaged")
    return welcome


def accept_greeting(sock: socket.socket, authkey: bytes, timeout: float) -> dict[str, Any]:
    """The coordinator's side of `connect` and of the first half of `greet`.

    Raises:
        ProtocolError: the other end does not know the key, is another user, or speaks something else.
        OSError, EOFError: it went away or was too slow.
    """
    _block(sock, timeout)
    uid = peer(sock)[1]
    if uid not in (os.getuid(), -1):
        raise ProtocolError(f"a connection from user {uid} was refused: this flow is user {os.getuid()}'s")
    with Connection(os.dup(sock.fileno())) as connection:
        try:
            deliver_challenge(connection, authkey)
            answer_challenge(connection, authkey)
            greeting = _unpack(connection.recv_bytes(MAX_GREETING_BYTES))
        except (AuthenticationError, AssertionError, ValueError) as error:
            raise ProtocolError(f"a connection was refused: {str(error) or type(error).__name__}") from error
    if not isinstance(greeting, dict):
        raise ProtocolError("a connection was refused: its greeting is damaged")
    return greeting


def welcome(sock: socket.socket, answer: dict[str, Any]) -> None:
    """The second half of `greet`. Takes no descriptor."""
    sock.sendall(_message(_pack(answer)))


def refuse(sock: socket.socket, text: str) -> None:
    """Instead of a handshake: say why there is none. Never waits, and takes nothing that may have run out."""
    try:
        sock.send(_message(REFUSAL + text.encode()), socket.MSG_DONTWAIT)
    except OSError:
        pass  # it has gone


def _message(payload: bytes) -> bytes:
    """As a `Connection` would send it."""
    return struct.pack("!i", len(payload)) + payload


def peer(sock: socket.socket) -> tuple[int, int]:
    """The pid and the user of the other end, as the kernel knows them (0: a process that we cannot see)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid
