"""Late: what is imported at its first use is imported before a fork, once there is a flow.

Many modules are imported when they are first needed, so that the import of the library stays short. A thread that
imports holds the module's lock; a child that another thread forks at that moment would wait for it for ever. So each of
them is imported before a fork: then no such lock is held, by anybody, for what the library needs in the child. That
takes the first fork some tens of milliseconds.

What is optional and takes long is waited for if its import has begun; it is not begun here. `concurrent.futures.thread`
is imported with the first client: it takes a lock before a fork and gives it back after it, and must not miss the one.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from importlib import import_module

from ..system import forks
from ..values import arrays

__all__ = ["LATE", "OPTIONAL", "OURS"]

PACKAGE = __name__.partition(".")[0]

LATE = (
    "asyncio",
    "cloudpickle",
    "decimal",
    "hashlib",
    "hmac",
    "json",
    "mmap",
    "multiprocessing.connection",
    "multiprocessing.resource_tracker",
    "multiprocessing.shared_memory",
    "multiprocessing.spawn",
    "pathlib",
    "psutil",
    "select",
    "socket",
    "subprocess",
    "uuid",
    "zoneinfo",
)
"""What the library imports within functions, and what that imports within its own."""
OURS = (
    "client.tracer",
    "flow.workers",
    "memory.mapping",
    "system.cgroup",
    "trace",
    "wire.byvalue",
    "wire.handshake",
    "wire.stats",
)
"""The same, of the library itself."""
OPTIONAL = ("numpy",)
"""The same, but for what need not be installed, or takes long and is mostly not needed."""


def _before_fork() -> None:
    if not forks.is_watched():
        return
    ours = [f"{PACKAGE}.{name}" for name in OURS]
    for name in (*LATE, *ours):
        with suppress(Exception):  # whoever needs it is told
            import_module(name)
    # NumPy's may begin at any moment; ours are waited for here, and none begins before the fork is over.
    arrays.importing.acquire()
    _holders.append(threading.get_ident())
    for name in OPTIONAL:  # the user's
        if name in sys.modules:
            with suppress(Exception):
                import_module(name)


def _after_fork_in_parent() -> None:
    me = threading.get_ident()
    if me in _holders:
        _holders.remove(me)
        arrays.importing.release()


def _after_fork_in_child() -> None:
    _holders.clear()
    arrays.importing = threading.RLock()


_holders: list[int] = []
"""The threads that fork, and hold the import of NumPy up meanwhile."""

os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
