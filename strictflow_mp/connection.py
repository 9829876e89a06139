"""The connection: how a process reaches the coordinator of a flow, the first time or again after a restart."""

from __future__ import annotations

import socket
import sys
import time
from typing import Any

from . import errors, wire
from .errors import FlowNotRunning, ProtocolError
from .processes import Identity
from .rendezvous import Place
from .wire import Stream

__all__ = ["reach", "take_leave", "try_to_reach"]

BUSY = 60.0
"""Seconds that the handshake may take: SF-LOOP has no time for it while a P1 runs."""
RETRY = 0.005


def reach(name: str, timeout: float, opened: list[socket.socket]) -> tuple[Stream, dict[str, Any]]:
    """Connect to a flow's coordinator; return the connection and its welcome.

    Args:
        opened: takes what is connected, to `take_leave` of it when an exception comes before it is used.

    Raises:
        FlowNotRunning: none appeared within *timeout* seconds, or the one that is there runs a P1 task all the time.
        TooManyWorkers, ProtocolError: it does not take us.
    """
    deadline = time.monotonic() + timeout
    while True:
        reached = try_to_reach(name, opened=opened)
        if reached is not None:
            return reached
        if time.monotonic() >= deadline:
            raise FlowNotRunning(
                f"no coordinator serves it (waited {timeout:g} s); start it with `with flow:` or "
                f"`strictflow-mp serve {name}`, or check the name",
                flow=name,
            )
        time.sleep(RETRY)


def try_to_reach(
    name: str,
    resume: tuple[int, int, int] | None = None,
    patience: float = BUSY,
    opened: list[socket.socket] | None = None,
) -> tuple[Stream, dict[str, Any]] | None:
    """Try once; None when nobody is there, or it ended half-way.

    Args:
        resume: slot and tenant number that a former coordinator of the flow gave us, and the number of our first P1
            that it did not answer (0: none).
        patience: seconds that the handshake may take.
        opened: as in `reach`.

    Raises:
        TooManyWorkers, ProtocolError, CoordinatorLost: it does not take us.
        FlowNotRunning: it has no time for us, and this was the first time.
    """
    from . import handshake  # multiprocessing.connection takes 8 ms to import

    place = Place.of(name)
    began = time.monotonic()
    try:
        place.check()
        authkey = place.authkey()
        sock = handshake.connect(place.socket, authkey, patience)
        if opened is not None:
            opened.append(sock)
    except (FileNotFoundError, ConnectionError):
        return None
    except (BlockingIOError, TimeoutError):  # nobody has accepted us in time; or the backlog is full
        if resume is None and time.monotonic() - began >= patience:
            raise _kept_waiting(name, patience) from None
        return None
    except ProtocolError:
        try:
            if place.authkey() == authkey:
                raise
        except FileNotFoundError:
            pass
        return None  # the next coordinator was just moving in
    greeting = {
        "protocol": wire.PROTOCOL,
        "identity": Identity.mine(),
        "python": sys.version_info[:2],
        "path": [path for path in sys.path if path],
        "resume": resume,
    }
    leave = take_leave if resume is None else socket.socket.close  # who comes back keeps its slot
    try:
        welcome = handshake.greet(sock, greeting)
        if "refused" in welcome:
            kind = getattr(errors, str(welcome["refused"]), ProtocolError)
            raise kind(str(welcome.get("text")), flow=name)
        return Stream(sock), welcome
    except (OSError, EOFError) as error:
        leave(sock)
        if resume is None and isinstance(error, (BlockingIOError, TimeoutError)):
            raise _kept_waiting(name, patience) from None
        return None
    except BaseException:
        leave(sock)
        raise


def take_leave(sock: socket.socket) -> None:
    """Close a connection of which nothing is used.

    The coordinator may have let us in already, and would keep the slot for as long as this process lives, unless it
    hears that the slot is not touched.
    """
    try:
        sock.setblocking(False)
        sock.send(wire.pack_frame(wire.GOODBYE))
    except OSError:
        pass  # it has closed its end, and knows
    sock.close()


def _kept_waiting(name: str, seconds: float) -> FlowNotRunning:
    return FlowNotRunning(
        f"its coordinator has let nobody in for {seconds:g} s: a P1 task runs in it all the time; shorten the task, or "
        "give it a timeout=",
        flow=name,
    )
