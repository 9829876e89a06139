"""Readiness: telling a service manager that a flow is served.

The protocol is that of systemd's ``sd_notify(3)``: a datagram to the socket that ``$NOTIFY_SOCKET`` names.
"""

from __future__ import annotations

import os
import socket

__all__ = ["tell"]


def tell(state: str) -> None:
    """Send *state*, such as ``READY=1``; without a service manager that listens, nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto(state.encode(), address)
    except OSError:
        pass  # who does not hear us will say so
