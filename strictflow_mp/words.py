"""Shared words: aligned 8-byte integers in shared memory, and the fence between them.

Owns: nothing. It is the only module that turns shared bytes into words; who may write which word is
    said where the word is defined (`segment`), and every word has exactly one writer.
Order: a word is read and written whole, through ``memoryview.cast("Q")``: CPython moves it with one
    8-byte copy, which compilers turn into one aligned move, so no reader sees half of one (`struct`
    does the same for each word of a cell, in order). Between
    words, program order holds for load-load, store-store and load-store on x86-64 (TSO), where only
    a store followed by a load of another word may be seen in the other order; `fence()` forbids that.
    On weaker machines (ARM64) any pair may be swapped: there each of these places calls
    `publish_fence()` or `read_fence()`, which are nothing on x86-64 and a fence elsewhere.
If we die here: a word holds its old or its new value, never a mixture.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections.abc import Callable

__all__ = ["WEAK", "WORD", "fence", "publish_fence", "read_fence", "words_of"]

WORD = 8
"""Bytes in a word."""

TOTAL_STORE_ORDER = os.uname().machine.lower() in {"x86_64", "amd64"}
"""Whether the machine keeps load-load and store-store order (x86-64)."""

WEAK = not TOTAL_STORE_ORDER
"""For the hottest paths, to spare a call: only where this is true do `publish_fence` and `read_fence` do anything."""

# Each call takes a lock of its own: none can be found taken, be it by a fork or by a signal handler that raised.


def _tso_fence() -> None:
    allocate_lock().acquire(False)


def _weak_fence() -> None:
    # A store may sink into a locked section and a load may rise into it, so one section alone is no
    # full barrier. Release (end of the first) before acquire (start of the second) is.
    lock = allocate_lock()
    lock.acquire(False)
    lock.release()
    allocate_lock().acquire(False)


def _no_fence() -> None:
    pass


fence: Callable[[], None] = _tso_fence if TOTAL_STORE_ORDER else _weak_fence
"""A full barrier: no load behind it is done before every store ahead of it is seen by all processes.

An uncontended lock operation is an atomic read-modify-write, which drains the store buffer on x86-64.
"""

publish_fence: Callable[[], None] = _no_fence if TOTAL_STORE_ORDER else _weak_fence
"""Between filling memory and the store that publishes it (store-store)."""

read_fence: Callable[[], None] = _no_fence if TOTAL_STORE_ORDER else _weak_fence
"""Between loading a word and loading what it speaks of (load-load)."""


def words_of(buffer: memoryview) -> memoryview:
    """View *buffer* (8-byte aligned, a whole number of words) as words."""
    return buffer.cast("Q")
