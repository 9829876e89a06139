"""Pins: how a snapshot keeps its version alive, and how the writer finds out.

Owns: the PINS words of every slot. HORIZON, which readers compare them with, is `commit`'s.
Written by: the process that has the slot. When that is proved to be gone, or has said goodbye and holds no pin any
    more, the coordinator.
Read by: the coordinator.
Order: a reader stores its pin, *fence*, loads HORIZON. The writer stores HORIZON, *fence*, loads the pins,
    and only then reuses memory. Each fence forbids that the store is seen after the load that follows it, so
    at least one of the two sees the other: the reader lets go, or the writer spares the version. A pin goes after
    the last load of what it kept.
If we die here: the coordinator clears the pins of a slot whose process is proved dead.
Invariants: a pinned version v keeps every block that was born at or before v and replaced after v. A process that has
    said goodbye (`Pins.retire`) stores no pin but zeros, and nothing once all of its pins are 0: so the coordinator,
    which waits for that, may give the slot to another.

A pin word holds its version + 1, so that 0 means no pin. Of a slot's 16 words, 15 are exact: each keeps
one version. The last is a floor: it keeps every version from its own on, which is coarse, but has room
for any number of snapshots at different versions in one process.

The protocol: docs/protocols/commit.md.
"""

from __future__ import annotations

import os
import sys
import threading
from bisect import bisect_left
from collections import deque
from functools import partial

from ..errors import FlowNotRunning
from ..memory.fences import fence, publish_fence
from ..memory.segment import W_HORIZON, Segment
from ..memory.slot import PIN_WORDS

__all__ = ["PinnedVersions", "Pins", "clear_pins", "has_pins"]

FLOOR_INDEX = PIN_WORDS - 1
"""Which of a slot's pin words is the floor."""
RETIRE_SECONDS = 1.0
"""Seconds that a handle which is closed waits for a thread that takes a pin: that takes microseconds."""
_lowest = partial(min, default=0)


class Hold:
    """A version that is kept, by one of the slot's pin words."""

    __slots__ = ("holds", "index", "version")

    def __init__(self, version: int) -> None:
        self.version = version
        self.index = FLOOR_INDEX
        # An entry for each that holds it.
        self.holds: list[None] = [None]


class Pins:
    """The pins of this process. Thread-safe, and safe against whatever begins in the middle of anything.

    A signal handler or a finalizer may take a pin while its own thread is about to, or let go of one: so every step on
    what they share is one C call, and who finds that another one was first goes on with that one's.

    Attributes:
        pid: the process that the slot is of. A forked child has a copy of all this, and must store nothing.
    """

    def __init__(self, segment: Segment, slot: int) -> None:
        self._segment = segment
        self._words = segment.words
        # The slot's first pin word. This object alone stores these words, while the process has the slot.
        self._base = segment.slot(slot).first_pin
        # Keeps other threads out. Never waited for in a finalizer.
        self._lock = threading.RLock()
        # Both are of the thread that holds the lock: how many of its calls are about to take a pin, one in the middle
        # of the other; and whether one lets go, in the middle of which no other one does.
        self._depth = 0
        self._is_letting_go = False
        self.pid = os.getpid()
        # Each version that is kept. Only `_let_go` takes one out.
        self._kept: dict[int, Hold] = {}
        # By index, what has each pin word but the floor.
        self._words_taken: dict[int, Hold] = {}
        # What the floor keeps: for each of its versions, and for each that it is about to keep, the pin. The word is
        # the lowest of them.
        self._floor_pins: list[int] = []
        # Versions to let go of, one entry for each hold that has ended. A finalizer runs at any bytecode, perhaps
        # while its thread holds a lock: it only appends here, and `_settle` takes out.
        self._released: deque[int] = deque()
        # True for good once the handle is closed: the versions that are held may be held once more, no other one is.
        self._is_retired = False

    def acquire(self, version: int) -> bool:
        """Pin *version*; False when it may be gone already (take a newer one).

        Raises:
            FlowNotRunning: another thread has closed the handle meanwhile.
        """
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
            depth = self._depth
            try:
                self._depth = depth + 1
                while True:
                    kept = self._kept.get(version)
                    if kept is None:
                        taken = self._pin(version, exact=exact)
                        if taken is not None:
                            return taken
                    elif exact and kept.index == FLOOR_INDEX:
                        return False
                    else:
                        kept.holds.append(None)
                        if self._kept.get(version) is kept:  # else it was let go of just before that
                            return True
            finally:
                self._depth = depth

    def _pin(self, version: int, *, exact: bool) -> bool | None:
        """Pin a version that is not kept yet; None when somebody who came in between has done it."""
        if self._is_retired:
            raise FlowNotRunning(
                "the handle was closed while this thread was about to read; read again", flow=self._segment.flow
            )
        kept = self._take_word(version)
        if exact and kept.index == FLOOR_INDEX:
            return False
        try:
            if not self._store(kept):
                return False
        except BaseException:
            self._free(kept)
            raise
        if self._kept.setdefault(version, kept) is kept:
            return True
        self._free(kept)
        return None

    def _take_word(self, version: int) -> Hold:
        """Take an exact word that is free, or else the floor."""
        kept = Hold(version)
        for index in range(FLOOR_INDEX):
            if self._words_taken.setdefault(index, kept) is kept:
                kept.index = index
                break
        return kept

    def _store(self, kept: Hold) -> bool:
        """Store a pin; False when its version may be gone already, and then the word is free again."""
        pin = kept.version + 1
        if kept.index != FLOOR_INDEX:
            self._words[self._base + kept.index] = pin  # step H1
        else:
            self._floor_pins.append(pin)
            self._store_floor()
        # Step H2, store-load: HORIZON (H3) may not be loaded while the pin is in our store buffer. Pairs with
        # `store.commit.StoreWriter._reclaim` and `recover`: we see the new HORIZON and let go, or the writer sees
        # the pin and spares the version.
        fence()
        sys.audit("strictflow_mp.pin.stored")
        if self._words[W_HORIZON] > kept.version:
            self._free(kept)
            return False
        return True

    def _store_floor(self) -> None:
        # Look and store are one C call: the floor is never above what somebody who came in between has pinned.
        word = self._base + FLOOR_INDEX
        next(map(self._words.__setitem__, (word,), map(_lowest, (self._floor_pins,))))

    def _free(self, kept: Hold) -> None:
        """Give a pin word back; what it kept may be reused from here on."""
        # Load-store: no load of what it kept may be done after this store (H4). Another thread's are behind us: it has
        # handed the version over by then. At the other end is a branch: `store.commit.StoreWriter._reclaim` writes only
        # to what no pin that it has loaded needs.
        publish_fence()
        if kept.index != FLOOR_INDEX:
            self._words[self._base + kept.index] = 0
            self._words_taken.pop(kept.index, None)
        else:
            try:
                self._floor_pins.remove(kept.version + 1)
            except ValueError:
                pass  # an exception of a signal handler came before it was there
            self._store_floor()

    def release(self, version: int) -> None:
        """Let go of *version* once."""
        self._released.append(version)
        self._settle()

    def _settle(self) -> None:
        # The lock is taken when another thread is here: then that one does it.
        while self._released and self.pid == os.getpid() and self._lock.acquire(blocking=False):
            try:
                if self._is_letting_go:
                    return  # the one in the middle of which we are does it
                try:
                    self._is_letting_go = True
                    self._let_go()
                finally:
                    self._is_letting_go = False
            finally:
                self._lock.release()

    def _let_go(self) -> None:
        # What may come in between takes pins only.
        while self._released:
            version = self._released.popleft()
            kept = self._kept.get(version)
            if kept is None:
                continue
            kept.holds.pop()
            if kept.holds:
                continue
            self._kept.pop(version)  # nobody finds it from here on
            if kept.holds:  # somebody had found it just before that
                again = self._kept.setdefault(version, kept)
                if again is kept:
                    continue
                again.holds.extend(kept.holds)  # or has pinned it once more since
            self._free(kept)

    @property
    def are_held(self) -> bool:
        """Whether a snapshot, or an array that somebody holds, still needs a version."""
        return len(self._kept) > 0

    def retire(self) -> bool:
        """Take no new pin from now on; those that there are stay until they are let go. Whether that is sure.

        Not when another thread is in the midst of pinning for `RETIRE_SECONDS`, or this one: a signal handler closes.
        """
        self._is_retired = True
        # A thread that holds the lock may have looked before that, and is about to store a pin.
        if not self._lock.acquire(timeout=RETIRE_SECONDS):
            return False
        try:
            if self._depth:
                return False
            self._settle()
            for kept in [*self._words_taken.values()]:
                if self._kept.get(kept.version) is not kept:
                    self._free(kept)  # an exception of a signal handler has left it there
            self._floor_pins[:] = [kept.version + 1 for kept in self._kept.values() if kept.index == FLOOR_INDEX]
            self._store_floor()
        finally:
            self._lock.release()
        return True

    def is_exact(self, version: int) -> bool:
        """Whether a version that is pinned has a word of its own."""
        return self._kept[version].index != FLOOR_INDEX

    def __repr__(self) -> str:
        return f"<Pins {sorted(self._kept)}>"


class PinnedVersions:
    """What all processes together have pinned, as it was when this was made.

    Attributes:
        floor: the oldest version that a floor keeps, and with it every later one; None when there is no floor.
        exact: the versions that are pinned by a word of their own, sorted, each of them once.
    """

    def __init__(self, segment: Segment) -> None:
        pins = segment.words[segment.pins : segment.pins + segment.slots * PIN_WORDS].tolist()
        floors = [pin - 1 for pin in pins[FLOOR_INDEX::PIN_WORDS] if pin]
        self.floor: int | None = min(floors, default=None)
        self.exact = sorted({pin - 1 for index, pin in enumerate(pins) if pin and index % PIN_WORDS != FLOOR_INDEX})

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
    return any(segment.slot(slot).pins)


def clear_pins(segment: Segment, slot: int) -> None:
    """Drop the pins of a slot whose process is proved dead, or has let go of them. Coordinator only."""
    pins = segment.slot(slot).pins
    for index in range(PIN_WORDS):
        pins[index] = 0
