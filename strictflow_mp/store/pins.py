"""Pins: how a snapshot keeps its version alive, and how the writer finds out.

Owns: the slot's PINS words (a process's own) and, in the coordinator, HORIZON.
Written by: a pin word by the process that has the slot, HORIZON by the coordinator.
Read by: pins by the coordinator, HORIZON by every reader.
Order: a reader stores its pin, *fence*, loads HORIZON. The writer stores HORIZON, *fence*, loads the pins,
    and only then reuses memory. Each fence forbids that the store is seen after the load behind it, so
    at least one of the two sees the other: the reader lets go, or the writer spares the version.
If we die here: the coordinator clears the pins of a slot whose process is proved dead.
Invariants: a pinned version v keeps every block that was born at or before v and replaced after v.

A pin word holds its version + 1, so that 0 means no pin. Of a slot's 16 words, 15 are exact: each keeps
one version. The last is a floor: it keeps every version from its own on, which is coarse, but has room
for any number of snapshots at different versions in one process.
"""

from __future__ import annotations

import os
import sys
import threading
from bisect import bisect_left
from collections import deque

from ..segment import PINS, W_HORIZON, Segment
from ..words import fence

__all__ = ["PinnedVersions", "Pins", "clear_pins", "has_pins"]

FLOOR = PINS - 1


class Pins:
    """The pins of this process. Thread-safe, and safe against finalizers that release in the middle of anything."""

    def __init__(self, segment: Segment, slot: int) -> None:
        self._words = segment.words
        self._base = segment.pins + slot * PINS
        self._lock = threading.Lock()
        self.pid = os.getpid()
        self._holders: dict[int, list[int]] = {}  # version -> [index of its word, how many hold it]
        self._released: deque[int] = deque()  # a finalizer runs at any bytecode: it only appends here

    def acquire(self, version: int) -> bool:
        """Pin *version*; False when it may be gone already (take a newer one)."""
        return self._acquire_and_settle(version, exact=False)

    def acquire_exact(self, version: int) -> bool:
        """As `acquire`, but False also when only the floor is left."""
        return self._acquire_and_settle(version, exact=True)

    def _acquire_and_settle(self, version: int, *, exact: bool) -> bool:
        try:
            return self._acquire(version, exact=exact)
        finally:
            if self._released:
                self._settle()

    def _acquire(self, version: int, *, exact: bool) -> bool:
        with self._lock:
            held = self._holders.get(version)
            if held is not None:
                if exact and held[0] == FLOOR:
                    return False
                held[1] += 1
                return True
            index = self._place()
            if exact and index == FLOOR:
                return False
            word = self._base + index
            before = self._words[word]
            if index != FLOOR or not before or before > version + 1:
                self._words[word] = version + 1
            # The pin must be seen before HORIZON is looked at (store-load).
            fence()
            sys.audit("strictflow_mp.pin.stored")
            if self._words[W_HORIZON] > version:
                self._words[word] = before
                return False
            self._holders[version] = [index, 1]
            return True

    def release(self, version: int) -> None:
        """Let go of *version* once."""
        self._released.append(version)
        self._settle()

    def _settle(self) -> None:
        # The lock is taken when a finalizer interrupts one of us: then the next of us does it.
        while self._released and self.pid == os.getpid() and self._lock.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._lock.release()

    def _let_go(self) -> None:
        while self._released:
            version = self._released.popleft()
            held = self._holders.get(version)
            if held is None:
                continue
            held[1] -= 1
            if held[1]:
                continue
            del self._holders[version]
            word = self._base + held[0]
            if held[0] != FLOOR:
                self._words[word] = 0
            else:
                floor = min((v for v, (index, _) in self._holders.items() if index == FLOOR), default=None)
                self._words[word] = 0 if floor is None else floor + 1

    @property
    def are_held(self) -> bool:
        """Whether a snapshot, or an array that somebody holds, still needs a version."""
        return len(self._holders) > 0

    def is_exact(self, version: int) -> bool:
        """Whether a version that is pinned has a word of its own."""
        return self._holders[version][0] != FLOOR

    def _place(self) -> int:
        taken = {index for index, _ in self._holders.values()}
        for index in range(FLOOR):
            if index not in taken:
                return index
        return FLOOR

    def __repr__(self) -> str:
        return f"<Pins {sorted(self._holders)}>"


class PinnedVersions:
    """What all processes together have pinned, at one moment."""

    def __init__(self, segment: Segment) -> None:
        pins = segment.words[segment.pins : segment.pins + segment.slots * PINS].tolist()
        floors = [pin - 1 for pin in pins[FLOOR::PINS] if pin]
        self.floor: int | None = min(floors, default=None)
        self.exact = sorted({pin - 1 for index, pin in enumerate(pins) if pin and index % PINS != FLOOR})

    def needs(self, birth: int, replaced: int) -> bool:
        """Whether a pin can reach a block that lived from version *birth* until *replaced*."""
        if self.floor is not None and replaced > self.floor:
            return True
        position = bisect_left(self.exact, birth)
        return position < len(self.exact) and self.exact[position] < replaced

    @property
    def oldest(self) -> int | None:
        """The oldest pinned version, or None."""
        candidates = self.exact[:1] + ([] if self.floor is None else [self.floor])
        return min(candidates, default=None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PinnedVersions):
            return NotImplemented
        return self.exact == other.exact and self.floor == other.floor

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<PinnedVersions {self.exact} floor={self.floor}>"


def has_pins(segment: Segment, slot: int) -> bool:
    """Whether the slot's process has anything pinned."""
    base = segment.pins + slot * PINS
    return any(segment.words[base : base + PINS])


def clear_pins(segment: Segment, slot: int) -> None:
    """Drop the pins of a slot whose process is proved dead, or has said goodbye. Coordinator only."""
    base = segment.pins + slot * PINS
    for word in range(base, base + PINS):
        segment.words[word] = 0
