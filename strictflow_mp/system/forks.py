"""Forks: how a process finds out that it is a forked child, whoever has forked it.

Python calls what was registered with it for its own forks only. A fork that C makes (uWSGI's by default, ctypes, a
library's) goes past that, and the child would go on with its parent's connection, slot and pins. So a process has a
mark: a page of its own that the kernel empties in every child. What is about to use things that belong to one process
looks at it first, and has `catch_up` do then what Python would have had done at the fork.

Owns: the marks, a page each. Nothing of it is shared with another process.
Order: all that was registered is called before the mark stands again.
If we die here: nothing is left.
Invariants: `mark[0]` is 0 only in a child that has not caught up.

Where the kernel cannot empty a page (before Linux 4.14, and elsewhere than on Linux), a mark compares pids: a system
call each time, and a child in another pid namespace that has its parent's pid is not found out.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Mark", "catch_up", "in_child", "is_watched", "new_mark", "watch"]

MADV_WIPEONFORK = 18
"""Of `madvise`; Python has no name for it."""
PAGE_BYTES = 4096
CATCHING_SECONDS = 0.001
"""Seconds between looks whether another thread has caught up."""


class Mark(Protocol):
    """Its only element is 1 in the process that has set it, and 0 in every child of that."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class _PidMark:
    """A mark for systems that empty no page."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, index: int) -> int:
        return int(os.getpid() == self._pid)

    def __setitem__(self, index: int, value: int) -> None:
        self._pid = os.getpid()


def new_mark() -> Mark:
    """A mark of this process: from now on its element is 1 here, and 0 in every child."""
    import mmap  # a process that has no flow needs none

    page = mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(MADV_WIPEONFORK)
    except (OSError, ValueError):
        return _PidMark()
    page[0] = 1
    return page


mark: Mark = bytearray(b"\1")
"""This process's; it tells of no fork before somebody has called `watch`: there is nothing to give up then."""
_in_child: list[Callable[[], None]] = []
"""What is to be done in a child, in order: each may be called more than once."""
_catching: dict[int, int] = {}
"""By pid, the thread that catches up. A child inherits its parent's entry, which does not count."""


def watch() -> None:
    """From now on every fork is noticed."""
    global mark
    if type(mark) is bytearray:
        mark = new_mark()


def is_watched() -> bool:
    """Whether there may be something that a child must not use."""
    return type(mark) is not bytearray


def in_child(function: Callable[[], None]) -> None:
    """Have a function called in each forked child: at the fork, or when the child finds out."""
    _in_child.append(function)


def _become_child() -> None:
    for function in _in_child:
        function()
    mark[0] = 1


def catch_up() -> None:
    """If `mark[0]` is 0, we are a child, and Python was not told: do what it would have had done.

    Where it costs something to call this, the caller looks at the mark itself.
    """
    me = threading.get_ident()
    while not mark[0]:
        # Without a lock: a lock might be found taken by a thread that is not here.
        if _catching.setdefault(os.getpid(), me) != me:
            time.sleep(CATCHING_SECONDS)
            continue
        try:
            _become_child()
        finally:
            _catching.pop(os.getpid(), None)


os.register_at_fork(after_in_child=_become_child)
