"""The cache: decoded values by key, bounded in bytes, and what a read looks at.

Both are plain tuples, though of eight and of seven: a read takes them apart, and that takes longer of a named tuple.

The protocol: docs/protocols/commit.md.
"""

from __future__ import annotations

from typing import Any

from ..store import Route, StoreReader, Take

__all__ = ["OVERHEAD_BYTES", "Bound", "Cache", "Entry", "unbound"]

OVERHEAD_BYTES = 512
"""Bytes that a cached value takes beside its payload, about."""

Entry = tuple[int, Any, int, int, Route, int, int, Take]
"""What is known of a key::

    since    the version at which it was last looked up: from `birth` to this one the value was the same
    value    read-only, decoded
    birth    the version that wrote it
    size     bytes that it takes here, about
    route    how the key is found in the tree
    cell     the word at which its cell begins, to follow it to the next one
    lengths  that cell's word of lengths
    take     reads a cell of those lengths in one call

Replaced whole, never changed: a slower thread's entry is merely looked up again.
"""


class Cache:
    """Decoded values, by key, bounded in bytes. Threads share it without a lock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # bytes
        # The sizes of all entries together; wrong by a little when threads have counted at the same time, until the
        # cache is empty.
        self._size = 0
        # The key that has been here longest is first: a new value does not move it. A read that finds the value
        # unchanged, or of the same size, replaces its entry here itself.
        self.entries: dict[Any, Entry] = {}

    def put(self, key: Any, entry: Entry, former: Entry | None) -> None:
        """Keep a value in place of its former one; at the cost of those that are here longest."""
        size = entry[3] if former is None else entry[3] - former[3]
        if self._size + size > self._limit:
            self.entries.pop(key, None)
            if former is not None:
                self._size -= former[3]
            if entry[3] > self._limit:
                return
            size = entry[3]
            self._make_room(size)
        self.entries[key] = entry
        self._size += size

    def _make_room(self, size: int) -> None:
        while self._size + size > self._limit:
            try:
                oldest = next(iter(self.entries))
            except StopIteration:
                self._size = 0  # threads that counted at the same time have left it wrong
                return
            except RuntimeError:
                return  # another thread is at it
            dropped = self.entries.pop(oldest, None)
            if dropped is not None:
                self._size -= dropped[3]

    def __repr__(self) -> str:
        return f"<Cache of {len(self.entries)} values, {self._size} of {self._limit} bytes>"


Bound = tuple[Any, Any, Any, dict[Any, Entry], Cache, Any, int]
"""What a read looks at::

    submitted, finished  of the slots within reach: the flag is up where they differ
    words                all words of the segment; None when nothing is bound
    entries              of `cache`, without the step over it
    cache                the values that are kept, of this segment alone
    reader               of this segment
    epoch                EPOCH when all this was bound: when the word moves, more slots may have to be compared

One tuple, replaced whole: a thread never sees the flag of one flow with the versions of another.
"""


def unbound(reader: StoreReader | None) -> Bound:
    """Nothing to look at: a flag that is up, so that every read takes the long way, and a cache that keeps nothing."""
    cache = Cache(0)
    return 0, 1, None, cache.entries, cache, reader, 0
