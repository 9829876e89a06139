"""Readiness: telling a service manager that a flow is served, and what a hang-up means.

The protocol is that of systemd's ``sd_notify(3)``: a datagram to the socket that ``$NOTIFY_SOCKET`` names.
"""

from __future__ import annotations

import os
import socket

__all__ = ["has_terminal", "tell"]


def tell(state: str) -> None:
    """Send *state*, such as ``READY=1``; without a service manager that listens, nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # in Linux's abstract namespace
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto(state.encode(), address)
    except OSError:
        pass  # a manager that does not hear us will say so


def has_terminal() -> bool:
    """Whether this process has a terminal that is still there: its end is told by SIGHUP."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
