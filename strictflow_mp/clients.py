"""The clients of this process: one for each flow, whatever handles there are of it."""

from __future__ import annotations

import atexit
import os
import threading

from .client import Client

__all__ = ["client_of"]

_clients: dict[str, Client] = {}
_registering = threading.Lock()


def client_of(name: str, cache_bytes: int) -> Client:
    """The client of the flow of that name; there is one in each process."""
    with _registering:
        client = _clients.get(name)
        if client is None:
            client = _clients[name] = Client(name, cache_bytes)
        client.is_stopped = False  # a new handle may mean a new start
        return client


def _after_fork() -> None:
    global _registering
    _registering = threading.Lock()
    for client in list(_clients.values()):
        client.after_fork()


@atexit.register
def _close_all() -> None:
    for client in list(_clients.values()):
        if not client.is_attaching:  # a daemon thread may wait for a minute until it is let in
            client.close()


os.register_at_fork(after_in_child=_after_fork)
