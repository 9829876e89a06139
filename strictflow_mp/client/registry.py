"""The registry: one client for each flow in a process, whatever handles there are of it.

Invariants: a client stays here until the process ends. In a forked child it is the child's, and has nothing of its
    parent's.
"""

from __future__ import annotations

import atexit
import threading

from ..system import forks
from .client import Client

__all__ = ["client_of"]

_clients: dict[str, Client] = {}
"""By the flow's name."""
_registering = threading.RLock()
"""Held while one is looked for, and made."""


def client_of(name: str, cache_bytes: int) -> Client:
    """The client of the flow of that name; there is one in each process."""
    forks.watch()
    import concurrent.futures.thread  # noqa: F401  before any fork (`flow.late`)

    with _registering:
        client = _clients.get(name)
        if client is None:
            client = _clients[name] = Client(name, cache_bytes)
        client.is_stopped = False  # a new handle may mean a new start
        client.forget_place()
        return client


def _after_fork() -> None:
    global _registering
    _registering = threading.RLock()
    for client in list(_clients.values()):
        client.after_fork()


@atexit.register
def _close_all() -> None:
    for client in list(_clients.values()):
        if not client.is_attaching:  # a daemon thread may wait for a minute until it is let in
            client.close()


forks.in_child(_after_fork)
