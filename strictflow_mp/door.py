"""The door: where connections to a coordinator are made, and wait until they have shown who they are.

Owns: the listening socket, and each connection until it is taken from `next_one`.
Order: a thread of its own shakes hands with each newcomer, so that a slow or hostile one holds nobody up; the loop
    takes in those who are through.
If we die here: the kernel closes the connections; a newcomer tries again.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from . import handshake
from .core import logger
from .errors import ProtocolError

__all__ = ["Door"]

HANDSHAKE = 5.0
"""Seconds that a newcomer has for its handshake."""
HANDSHAKES = 32
"""Newcomers at a time; more wait in the socket's backlog."""


class Door:
    """A listening socket, and those who stand in front of it.

    Args:
        wake: called, in any thread, when somebody is through, or has been sent away.
    """

    def __init__(self, listener: socket.socket, authkey: bytes, wake: Callable[[], None]) -> None:
        self.listener = listener
        self._authkey = authkey
        self._wake = wake
        self._through: deque[tuple[socket.socket, dict[str, Any]]] = deque()
        self._places = threading.BoundedSemaphore(HANDSHAKES)
        self._shaking: dict[socket.socket, float] = {}

    def accept(self) -> bool:
        """Begin with a newcomer; False when there are too many, and nobody should look here until one is through."""
        if not self._places.acquire(blocking=False):
            return False
        try:
            newcomer, _ = self.listener.accept()
        except OSError:
            self._places.release()
            return True
        self._shaking[newcomer] = time.monotonic() + HANDSHAKE
        threading.Thread(target=self._shake_hands, args=(newcomer,), name="handshake", daemon=True).start()
        return True

    def _shake_hands(self, newcomer: socket.socket) -> None:
        try:
            greeting = handshake.accept_greeting(newcomer, self._authkey, HANDSHAKE)
        except (OSError, EOFError):
            newcomer.close()
        except ProtocolError as error:
            logger.warning("%s", error, extra={"error": type(error).__name__})
            newcomer.close()
        else:
            self._through.append((newcomer, greeting))
        finally:
            self._shaking.pop(newcomer, None)
            self._places.release()
            self._wake()

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
        """One who is through, and its greeting. Only while there is one (``bool(door)``)."""
        return self._through.popleft()

    def close(self) -> None:
        """Let nobody in any more."""
        for newcomer, _ in self._through:
            newcomer.close()
        self.listener.close()

    def __repr__(self) -> str:
        return f"<Door, {len(self._shaking)} shake hands, {len(self._through)} are through>"
