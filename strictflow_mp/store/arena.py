"""The arena: where the writer finds room for nodes and cells.

Owns: the memory behind the segment's control words, and which of it is free. What is free is known only
    to the coordinator; after its death `StoreWriter.recover` finds it again by walking the tree.
Written by: the coordinator alone.
Invariants: a block is in exactly one place: reachable from a root, resting (`StoreWriter`), or free here.

Sizes are words. Small blocks have free lists by exact size; larger ones by classes an eighth apart, so
that at most an eighth of a block is lost. When nothing fits, neighbouring free blocks are joined.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import StateFull
from ..segment import Segment
from ..words import WORD

__all__ = ["Arena", "block_size"]

EXACT = 64
RESERVE = 2048
"""Words held back so that a delete can still commit when memory is full."""


def block_size(words: int) -> int:
    """The size that a block of that many words really takes."""
    if words <= EXACT:
        return words
    unit = 1 << (words - 1).bit_length() - 4
    return -(-words // unit) * unit


class Arena:
    """Allocates blocks of words, from the coordinator's process only."""

    def __init__(self, segment: Segment, flow: str) -> None:
        self._segment = segment
        self._flow = flow
        self.start = segment.arena
        self._free: dict[int, list[int]] = {}
        self._cursor = self._end = self.start
        self._spare: list[tuple[int, int]] = []  # extents (start, size), largest last
        self._reserve = 0
        self.used = 0

    def prepare(self) -> None:
        """Claim the first memory and set the reserve aside."""
        self._reserve = self.allocate(RESERVE)

    @property
    def free(self) -> int:
        """Words that could still be allocated, unclaimed capacity included."""
        return self._segment.size // WORD - self.start - self.used

    def allocate(self, words: int) -> int:
        """Return the index of a free block of at least *words* words.

        Raises:
            StateFull: there is none; nothing was changed.
        """
        size = block_size(words)
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
        size = block_size(words)
        self.used -= size
        blocks = self._free.get(size)
        if blocks is None:
            self._free[size] = [index]
        else:
            blocks.append(index)

    def has_room(self, words: int) -> bool:
        """Whether blocks of *words* words in all, each of them small, can be allocated without failing."""
        if self._end - self._cursor >= words:
            return True
        return self._grow(words) is None

    def open_reserve(self) -> bool:
        """Let the next allocations use what was held back; False when it is in use already."""
        if not self._reserve:
            return False
        self.release(self._reserve, RESERVE)
        self._reserve = 0
        self._join()
        return True

    def refill_reserve(self) -> None:
        """Set the reserve aside again, if there is room."""
        if not self._reserve:
            try:
                self._reserve = self.allocate(RESERVE)
            except StateFull:
                pass

    def rebuild(self, used: Iterable[tuple[int, int]]) -> None:
        """Forget everything; what is not in *used* (index, size in words) is free."""
        self._free.clear()
        self._spare.clear()
        self.used = 0
        position = self.start
        gaps = []
        for index, words in sorted(used):
            if index > position:
                gaps.append((position, index - position))
            size = block_size(words)
            self.used += size
            position = index + size
        self._cursor, self._end = position, self._segment.words_claimed
        self._spare = sorted(gaps, key=_size_of)
        self._reserve = 0
        self.refill_reserve()

    def _refill(self, size: int) -> None:
        """Make the bump region at least *size* words long."""
        full = self._grow(size)
        if full is None:
            return
        self._join()
        if self._end - self._cursor >= size:
            return
        if not self._spare or self._spare[-1][1] < size:
            raise full
        self._swap_region()

    def _grow(self, size: int) -> StateFull | None:
        """Make the bump region that long from what lies spare or is not claimed yet; else say why not."""
        if self._spare and self._spare[-1][1] >= size:
            self._swap_region()
            return None
        claimed = self._segment.words_claimed
        # The region at the end of the claimed memory can grow in place.
        grows = self._end == claimed
        missing = size - (self._end - self._cursor) if grows else size
        try:
            gained = self._segment.claim(missing, self._flow)
        except StateFull as full:
            return full
        if grows:
            self._end += gained
        else:
            self._retire_region()
            self._cursor, self._end = claimed, claimed + gained
        return None

    def _swap_region(self) -> None:
        start, size = self._spare.pop()
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
