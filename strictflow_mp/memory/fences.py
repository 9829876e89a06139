"""Fences, and the shared words between which they stand: aligned 8-byte integers in shared memory.

Owns: nothing. It is the only module that turns shared bytes into words; who may write which word is
    said where the word is defined (`segment`), and every word has exactly one writer.
Order: a word is read and written whole, through ``memoryview.cast("Q")``: CPython moves it with one
    8-byte copy, which compilers turn into one aligned move, so no reader sees half of one (`struct`
    does the same for each word of a cell, in order). Between
    words, program order holds for load-load, store-store and load-store on x86-64 (TSO), where only
    a store followed by a load of another word may be seen in the other order; `fence()` forbids that.
    On weaker machines (ARM64) any pair may be swapped, unless an address or a branch depends on what was loaded: there
    each of these places calls `publish_fence()` or `read_fence()`, which are nothing on x86-64 and a full barrier
    elsewhere. Each has its litmus test: docs/memory-model.md, "Fences".
If we die here: a word holds its old or its new value, never a mixture.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["WEAK", "WORD", "fence", "publish_fence", "raise_word", "read_fence", "words_of"]

WORD = 8
"""Bytes in a word."""

TOTAL_STORE_ORDER = os.uname().machine.lower() in {"x86_64", "amd64"}
"""Whether the machine keeps load-load and store-store order (x86-64)."""

WEAK = not TOTAL_STORE_ORDER or bool(os.environ.get("STRICTFLOW_MP_WEAK"))
"""For the hottest paths, to spare a call: only where this is true do `publish_fence` and `read_fence` do anything.

STRICTFLOW_MP_WEAK is for tests: it has a process take the fences of weaker machines on any machine.
"""

SEQ_CST = 5
"""`memory_order_seq_cst`."""

# Each call takes a lock of its own: none can be found taken, be it by a fork or by a signal handler that raised.


def _tso_fence() -> None:
    allocate_lock().acquire(False)


def _fence_of_locks() -> None:
    # A store may sink into a locked section and a load may rise into it, so one section alone is no full barrier. A
    # release (end of the first) before an acquire (start of the second) is one: what is ahead comes before the release,
    # that before the acquire, and that before what is behind. models/litmus/fence-locks*.litmus.
    lock = allocate_lock()
    lock.acquire(False)
    lock.release()
    allocate_lock().acquire(False)


def _no_fence() -> None:
    pass


_weak_fence: Callable[[], None] = _fence_of_locks
if WEAK:
    # C's own full barrier, where libatomic has it for us: one instruction (DMB) and a call. PyDLL keeps the GIL.
    try:
        from ctypes import PyDLL, c_int  # here, for x86-64 does not need the 10 ms

        _barrier = PyDLL("libatomic.so.1").atomic_thread_fence
        _barrier.argtypes, _barrier.restype = (c_int,), None
        _weak_fence = partial(_barrier, SEQ_CST)
    except (ImportError, OSError, AttributeError):
        pass

fence: Callable[[], None] = _weak_fence if WEAK else _tso_fence
"""A full barrier: no load after it is done until every store before it is seen by all processes (store-load).

An uncontended lock operation is an atomic read-modify-write, which drains the store buffer on x86-64.
"""

publish_fence: Callable[[], None] = fence if WEAK else _no_fence
"""Between filling memory and the store that publishes it (store-store), or between the last look at memory and the
store that gives it back (load-store)."""

read_fence: Callable[[], None] = fence if WEAK else _no_fence
"""Between loading a word and loading what it speaks of (load-load)."""


def raise_word(words: memoryview, where: Sequence[int], value: int) -> None:
    """Store *value* in a word that says less.

    Look and store are one C call. So what a signal handler or a finalizer does just before it, in the same thread, is
    not undone: it may raise the word further, or take it away. The maps only take their arguments here, and `next` runs
    them.

    Args:
        where: its index; empty once it may not be stored any more.
    """
    next(map(words.__setitem__, where, map(max, map(words.__getitem__, where), (value,))), None)


def words_of(buffer: memoryview) -> memoryview:
    """View *buffer* (8-byte aligned, a whole number of words) as words."""
    return buffer.cast("Q")
