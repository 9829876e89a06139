"""The arena: where the writer finds room for nodes and cells.

Owns: the memory after the segment's control words, and which of it is free. What is free is known only
    to the coordinator; after its death `StoreWriter.recover` finds it again by walking the tree.
Written by: the coordinator alone. Nothing is stored in shared memory but CLAIMED (`Segment.claim`): which block is free
    is in memory of our own.
Read by: nobody else.
Order: whoever gives a block back has stored HORIZON and looked at the pins before (`StoreWriter._reclaim`).
If we die here: nothing is lost; what no root reaches is free for the next one.
Invariants: each claimed word is in exactly one of these: a block that a root reaches, that the next commit builds, that
    rests or is held for a pin (`StoreWriter`), or that has receipts (`Receipts`); the reserve; a free block; an extent;
    the region from cursor to end. After `rebuild` with *keep_gaps* all that was not known counts as used.

Sizes are words. Small blocks have free lists by exact size; larger ones by classes an eighth apart, so
that at most an eighth of a block is lost. When nothing fits, neighbouring free blocks are joined.

The protocol: docs/protocols/commit.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import StateFull
from ..memory.fences import WORD
from .steps import in_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..memory.segment import Segment

__all__ = ["SPAN_BITS", "Arena", "block_size", "span"]

EXACT_WORDS = 64
"""Blocks of up to that many words take exactly their size."""
RESERVE_BLOCKS = 64
"""Blocks held back so that a delete can still commit when memory is full. It copies as many as it replaces, so
they can be set aside again when it is done."""


def block_size(words: int) -> int:
    """The size that a block of that many words really takes."""
    if words <= EXACT_WORDS:
        return words
    unit = 1 << (words - 1).bit_length() - 4
    return -(-words // unit) * unit


SPAN_BITS = 44
"""Of a span for its words; the index lies above them."""
SPAN_MASK = (1 << SPAN_BITS) - 1


def span(index: int, words: int) -> int:
    """A block in one number: a million of those are sorted in a third of the time of pairs, and no collector sees them.

    Spans sort as their indexes do.
    """
    return index << SPAN_BITS | words


class Arena:
    """Allocates blocks of words, from the coordinator's process only.

    Attributes:
        start: the first word of the arena.
        used: words in blocks that were allocated and not given back, those that rest included.
    """

    def __init__(self, segment: Segment, flow: str, reserved_size: int) -> None:
        self._segment = segment
        self._flow = flow
        self.start = segment.arena
        # By size (that of `block_size`), where free blocks begin.
        self._free: dict[int, list[int]] = {}
        # The region that allocations without a free block are cut from. All of it is claimed.
        self._cursor = self._end = self.start
        # Extents (start, size) that are free and claimed, the largest last.
        self._spare: list[tuple[int, int]] = []
        self._reserved_size = reserved_size
        # Blocks of that size, held back for a delete when memory is full; counted as used. Empty after `open_reserve`.
        self._reserve: list[int] = []
        self.used = 0

    def prepare(self) -> None:
        """Claim the first memory and set the reserve aside.

        Raises:
            StateFull: there is no room for it.
        """
        self._reserve = [self.allocate(self._reserved_size) for _ in range(RESERVE_BLOCKS)]

    @property
    def free(self) -> int:
        """Words that could still be allocated, unclaimed capacity included."""
        return self._segment.size // WORD - self.start - self.used

    def allocate(self, words: int) -> int:
        """Return the index of a free block of at least *words* words.

        Raises:
            StateFull: there is none; nothing was changed.
        """
        size = words if words <= EXACT_WORDS else block_size(words)
        blocks = self._free.get(size)
        if blocks:
            self.used += size
            return blocks.pop()
        if self._end - self._cursor < size:
            self._refill(size)
        index = self._cursor
        self._cursor = index + size
        self.used += size
        return index

    def release(self, index: int, words: int) -> None:
        """Give back a block that nobody can reach any more."""
        size = words if words <= EXACT_WORDS else block_size(words)
        self.used -= size
        blocks = self._free.get(size)
        if blocks is None:
            self._free[size] = [index]
        else:
            blocks.append(index)

    def release_all(self, indexes: list[int], words: int) -> None:
        """Give back several blocks of one size, which is at most `EXACT_WORDS`."""
        self.used -= words * len(indexes)
        self._free.setdefault(words, []).extend(indexes)

    def has_room(self, words: int) -> bool:
        """Whether blocks of *words* words in all, each of them small, can be allocated without failing."""
        if self._end - self._cursor >= words:
            return True
        return self._grow(words) is None

    @property
    def is_reserve_full(self) -> bool:
        """Whether all that should be held back is."""
        return len(self._reserve) == RESERVE_BLOCKS

    def open_reserve(self) -> bool:
        """Let the next allocations use what was held back; False when there is nothing."""
        blocks, self._reserve = self._reserve, []
        for index in blocks:
            self.release(index, self._reserved_size)
        return bool(blocks)

    def refill_reserve(self) -> None:
        """Set the reserve aside again, as far as there is room."""
        try:
            while len(self._reserve) < RESERVE_BLOCKS:
                self._reserve.append(self.allocate(self._reserved_size))
        except StateFull:
            pass

    def rebuild(self, used: list[int], *, keep_gaps: bool = False, go_on: Callable[[], object] = lambda: None) -> None:
        """Forget everything; what is not in *used* (spans) is free, unless *keep_gaps*.

        Args:
            go_on: called again and again meanwhile.
        """
        self._free.clear()
        self._spare.clear()
        total = 0
        position = self.start
        gaps = []
        for part in in_order(used, go_on):
            for block in part:
                index = block >> SPAN_BITS
                if index > position:
                    gaps.append((position, index - position))
                words = block & SPAN_MASK
                size = words if words <= EXACT_WORDS else block_size(words)
                total += size
                position = index + size
        self.used = total
        self._cursor, self._end = position, self._segment.words_claimed
        if keep_gaps:
            self._cursor = self._end
            self.used = self._end - self.start
        else:
            self._spare = sorted(gaps, key=_size_of)
            go_on()
        self._reserve = []

    def _refill(self, size: int) -> None:
        """Make the bump region at least *size* words long."""
        if self._grow(size) is not None:
            self._join()
            full = self._grow(size)
            if full is not None:
                raise full

    def _grow(self, size: int) -> StateFull | None:
        """Make the bump region that long from what lies spare or is not claimed yet; else say why not."""
        if self._end - self._cursor >= size:
            return None
        if self._spare and self._spare[-1][1] >= size:
            self._take_region(len(self._spare) - 1)
            return None
        claimed = self._segment.words_claimed
        if self._end != claimed:
            # What lies at the end of the claimed memory can grow in place.
            for position, (start, length) in enumerate(self._spare):
                if start + length == claimed:
                    self._take_region(position)
                    break
            else:
                self._retire_region()
                self._cursor = self._end = claimed
        try:
            self._end += self._segment.claim(size - (self._end - self._cursor), self._flow)
        except StateFull as full:
            return full
        return None

    def _take_region(self, position: int) -> None:
        start, size = self._spare.pop(position)
        self._retire_region()
        self._cursor, self._end = start, start + size

    def _retire_region(self) -> None:
        if self._end > self._cursor:
            self._spare.append((self._cursor, self._end - self._cursor))
            self._spare.sort(key=_size_of)

    def _join(self) -> None:
        """Join neighbouring free blocks into extents."""
        blocks = [(start, size) for size, starts in self._free.items() for start in starts]
        blocks += self._spare
        if self._end > self._cursor:
            blocks.append((self._cursor, self._end - self._cursor))
        self._free.clear()
        blocks.sort()
        joined: list[tuple[int, int]] = []
        for start, size in blocks:
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        joined.sort(key=_size_of)
        self._cursor = self._end = 0
        if joined:
            start, size = joined.pop()
            self._cursor, self._end = start, start + size
        self._spare = joined

    def __repr__(self) -> str:
        return f"<Arena {self.used * WORD:,} bytes used, {self.free * WORD:,} free>"


def _size_of(extent: tuple[int, int]) -> int:
    return extent[1]
