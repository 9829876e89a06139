"""Shared memory on which a test can look, and act, ahead of each access."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any

from strictflow_mp.memory.fences import WORD
from strictflow_mp.memory.segment import W_VERSION, Segment
from strictflow_mp.store import Take, shape
from strictflow_mp.store.reader import CELL_HEAD_WORDS
from strictflow_mp.store.trie import KEY_SHIFT, PAYLOAD_MASK, Fill, mould


def nothing(where: object = None, stored: int = 0) -> None:
    pass


class Watched:
    """A view that tells of each access before it happens: where it is, and how many bytes it stores (0: a load)."""

    def __init__(self, view: memoryview, on_access: Callable[[Any, int], object]) -> None:
        self._view = view
        self._on_access = on_access

    def __getitem__(self, where: Any) -> Any:
        self._on_access(where, 0)
        return self._view[where]

    def __setitem__(self, where: Any, value: Any) -> None:
        self._on_access(where, self._view.itemsize * (len(value) if isinstance(where, slice) else 1))
        self._view[where] = value

    def __len__(self) -> int:
        return len(self._view)

    def release(self) -> None:
        self._view.release()


def watched_shape(lengths: int) -> Take:
    """As `shape`; but a watched view is taken apart word by word, with an access ahead of each."""
    padded, length = (lengths >> KEY_SHIFT) + 7 & -8, lengths & PAYLOAD_MASK

    def take(buffer: Any, start: int) -> tuple[int, int, int, bytes]:
        if not isinstance(buffer, Watched):
            return shape(lengths)(buffer, start)
        body = start + CELL_HEAD_WORDS * WORD + padded
        if body + length > len(buffer):
            raise struct.error("it ends behind the memory")
        birth, found, following = (
            int.from_bytes(buffer[start + WORD * word : start + WORD * (word + 1)], "little") for word in (0, 2, 3)
        )
        return birth, found, following, bytes(buffer[body : body + length])

    return take


def watched_mould(lengths: int) -> Fill:
    """As `mould`; a watched view is filled word by word."""
    padded = (lengths >> KEY_SHIFT) + 7 & -8

    def fill(buffer: Any, start: int, *words: Any) -> None:
        if not isinstance(buffer, Watched):
            mould(lengths)(buffer, start, *words)
            return
        *head, key, payload = words
        for word in (*(number.to_bytes(WORD, "little") for number in head), key.ljust(padded, b"\0"), payload):
            buffer[start : start + len(word)] = word
            start += len(word)

    return fill


class WatchedSegment(Segment):
    """A segment of which every access, through itself or through `claimed`, can be interrupted.

    Attributes:
        looks: how often VERSION was loaded: once for each try of a read.
        strayed: how often the claimed memory was asked for: once by each reader, then when one has strayed.
    """

    on_access: Callable[[], object] = staticmethod(nothing)
    looks = strayed = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plain = self.words
        self.words = Watched(self.words, self._access)  # type: ignore[assignment]
        self.buffer = Watched(self.buffer, self._access)  # type: ignore[assignment]
        self.memory = Watched(self.memory, self._access)  # type: ignore[arg-type, assignment]

    def claimed(self) -> Any:
        self.strayed += 1
        return tuple(Watched(view, self._access) for view in super().claimed())

    def _access(self, where: Any, stored: int) -> None:
        self.looks += where == W_VERSION and not stored
        self.on_access()

    def interrupt(self, moment: int, what: Callable[[], object]) -> None:
        """Do *what* ahead of the access of that number."""
        accesses = itertools.count(1)

        def on_access() -> None:
            if next(accesses) == moment:
                self.on_access = nothing
                what()

        self.on_access = on_access

    def has_been_interrupted(self) -> bool:
        """Whether that has happened; from now on, nothing does."""
        happened = self.on_access is nothing
        self.on_access = nothing
        return happened
