"""Reads: how a process gets at a committed version without stopping anybody.

Owns: nothing in shared memory but, through `pins`, this process's pins.
Written by: nobody; a plain read stores nothing, so readers scale with cores.
Order of a read: load VERSION; load its record; walk; copy the payload; *then* load HORIZON and compare.
    Load-load order, free on x86-64, makes the comparison speak for all that was read before it.
If we die here: nothing is left but pins, which the coordinator clears.
Invariants: nothing read is decoded or returned before the horizon has been checked. Until then it may be
    anything: steps out of the claimed memory raise IndexError, depth is bounded, and either means "again".

The protocol: docs/protocols/commit.md.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ProtocolError
from ..memory.fences import WEAK, WORD, read_fence
from ..memory.segment import R_COUNT, R_ROOT, RECORD_WORDS, RING_RECORDS, W_HORIZON, W_RING, W_VERSION, Segment
from ..system.machine import FREE_THREADED
from .trie import CELL_HEAD_WORDS, FANOUT, GONE, KEY_SHIFT, LEVELS, NEXT, PAYLOAD_MASK, Hash, deep_find, shape, walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..values.codec import Packed
    from .pins import Pins

__all__ = ["ARRAYS", "STRAYED", "Cell", "Found", "Route", "StoreReader", "Version"]

PLAIN_TRIES = 16
"""Plain reads that the horizon may overtake before a read takes a pin."""

PIN_TRIES = 1_000
"""Pins that commits may overtake: each try has a newer version, so that never happens in a sound segment."""

ARRAYS = 0xC1
"""First byte of a payload with arrays (`values.arrays.MAGIC`)."""

ROUTE_TURNS = 6
"""Levels that a route knows its turns for: enough for a thousand million keys. Below, they are worked out."""

HOPS = range(8)
"""From cell to cell, until a walk from the root is as short."""

_LATER = range(ROUTE_TURNS, LEVELS)
"""Levels that the first hash chooses and a route has no turn for."""
_ROOTS = W_RING + R_ROOT
"""Where ROOT of the first record is."""
_IN_RING = RING_RECORDS - 1
"""What to leave of a version for its place in the ring, of which the size is a power of two."""


def _damaged(name: str) -> ProtocolError:
    return ProtocolError(f"shared memory {name!r} is damaged; stop the flow and start it anew")


class Cell:
    """A cell as a pinned version holds it: valid only while the version is pinned.

    Attributes:
        index: the cell's first word.
        birth: the version that wrote it.
        key: packed; a copy.
        payload: packed, where it lies in shared memory, read-only; without the GIL a copy.
    """

    __slots__ = ("birth", "index", "key", "payload")

    def __init__(self, index: int, birth: int, key: bytes, payload: Packed) -> None:
        self.index = index
        self.birth = birth
        self.key = key
        self.payload = payload


Found = tuple[int, int, "bytes | None", int, int]
"""Version read, version that wrote the cell, payload, index of the cell, its word of lengths."""

STRAYED = (IndexError, OverflowError, struct.error)
"""What is raised by a step out of the claimed memory: it was reused under the reader, or has grown since it looked."""


class Route(NamedTuple):
    """How a key is found: packed, its hash, and the turns that this takes at the first levels."""

    key: bytes
    digest: int
    turns: tuple[int, ...]


class Version:
    """A pinned version. Release it exactly once.

    Attributes:
        number: the version.
        root: pointer to the top of its tree, 0 when that is empty.
        count: its number of keys.
        is_exact: whether a pin word of its own keeps it, and not the floor, when it was pinned.
    """

    __slots__ = ("count", "is_exact", "number", "root")

    def __init__(self, number: int, root: int, count: int, *, is_exact: bool = True) -> None:
        self.number = number
        self.root = root
        self.count = count
        self.is_exact = is_exact

    def __repr__(self) -> str:
        return f"<Version {self.number}, {self.count} keys>"


class StoreReader:
    """Reads the state, from any process. Thread-safe."""

    def __init__(self, segment: Segment, pins: Pins, words: memoryview | None = None) -> None:
        self._segment = segment
        self._pins = pins
        # Every word of the segment.
        self.words = segment.words if words is None else words
        self.hash = Hash(segment.hash_key)
        # All that was claimed when we last looked. Renewed, never shortened, when a walk leads out of it or a version
        # is pinned; by any thread. The two may then be of two looks, which does no harm: each bounds its own loads.
        self._words, self.buffer = segment.claimed()
        self._memory = segment.memory

    def twin(self) -> StoreReader:
        """Another one that shares nothing with this one but the pins: for a thread that reads beside others."""
        segment = self._segment
        return StoreReader(segment, self._pins, segment.array(0, segment.size // WORD))

    def _look(self) -> None:
        """Look how much is claimed by now."""
        if self._segment.words_claimed != len(self._words):
            self._words, self.buffer = self._segment.claimed()

    def version(self) -> int:
        """The last committed version."""
        return int(self._words[W_VERSION])

    def route(self, key: bytes) -> Route:
        """How *key*, packed, is found in this flow."""
        digest = self.hash(key)
        bits = digest & 0x3FFFFFFF  # six times five bits, an int of one digit
        turns = (bits & 31, bits >> 5 & 31, bits >> 10 & 31, bits >> 15 & 31, bits >> 20 & 31, bits >> 25)
        return Route(key, digest, turns)

    def follow(self, version: int, cell: int, since: int, lengths: int) -> Found | None:
        """What came in the place of a key's cell in *version*. None: look the key up instead.

        Args:
            version: loaded just now (N1), with a fence behind it (load-load): or a cell that is replaced by then seems
                to be the last.
            cell: index of the key's cell in version *since*. If it is still that one, the birth that is found is 0 and
                the payload None. The payload is None too when a new one holds arrays: those are read under a pin.
            lengths: that the new one has, probably.
        """
        words, buffer = self._words, self.buffer
        take = shape(lengths)
        birth, payload = 0, None
        try:
            following = words[cell + NEXT]
            for _ in HOPS:
                if following <= GONE:
                    if following:
                        return None
                    break
                # No fence: the address of the next cell (N3) is computed from the NEXT that leads to it, which orders
                # the two on any machine. Pairs with the first fence of `store.commit.StoreWriter.commit`.
                start = (following >> 1) * WORD
                born, found, beyond, data = take(buffer, start)
                if born > version:
                    break  # not committed when we looked
                if found != lengths:
                    lengths, take = found, shape(found)
                    born, _, beyond, data = take(buffer, start)
                cell, birth, payload = following >> 1, born, data
                if born == version:
                    break  # what has replaced it is younger
                following = beyond
            else:
                return None
            if payload is not None and payload[0] == ARRAYS:
                payload = None
        except STRAYED:
            return None
        # Load-load: HORIZON (N4) may not be loaded before the cells: one of *since*, or a later one, is reused only
        # after HORIZON has passed *since*. Pairs with the fences of `store.commit.StoreWriter._reclaim` and
        # `recover`.
        if WEAK:
            read_fence()
        return (version, birth, payload, cell, lengths) if words[W_HORIZON] <= since else None

    def get(self, route: Route, known: int = -1) -> Found | None:
        """The committed cell of a key. None when absent.

        Args:
            known: the version that wrote the payload that the caller has already. If it is still that
                one, the payload is None. It is None too when it holds arrays: those are read under a pin.
        """
        # Every step here counts, for each read of a value that has changed. A slice of the mapping is a copy, and takes
        # two thirds of the time of a slice of a view that is copied then.
        key, digest, turns = route
        memory = self._memory
        tries = 0
        while True:
            words, buffer = self._words, self.buffer
            version = words[W_VERSION]  # G1
            # No fence: the address of the record (G2) is computed from VERSION, that of each block from the pointer to
            # it, which orders them on any machine. Pairs with the last fence of `store.commit.StoreWriter.commit`.
            try:
                # As `Segment.record`, spelled out.
                pointer = words[_ROOTS + (version & _IN_RING) * RECORD_WORDS]
                for turn in turns:
                    if pointer & 1 or not pointer:
                        break
                    pointer = words[(pointer >> 1) + turn]
                else:
                    pointer = self._find_deeper(words, pointer, route)
                found: Found | None = None
                if pointer:
                    index = pointer >> 1
                    if words[index + 1] == digest:
                        birth = words[index]
                        lengths = words[index + 2]
                        start = (index + CELL_HEAD_WORDS) * WORD
                        middle = start + (lengths >> KEY_SHIFT)
                        body = middle + 7 & -8
                        end = body + (lengths & PAYLOAD_MASK)
                        if end > len(buffer):
                            raise IndexError  # a slice would stop at the end without a word
                        if memory[start:middle] == key:
                            if birth == known or buffer[body] == ARRAYS:
                                found = (version, birth, None, index, lengths)
                            else:
                                found = (version, birth, memory[body:end], index, lengths)
                # Load-load: HORIZON (G3) may not be loaded before all that it is to speak for. Pairs with the fence
                # of `store.commit.StoreWriter._reclaim` and `recover` (blocks), and the second one of `commit` (the
                # record).
                if WEAK:
                    read_fence()
                if words[W_HORIZON] <= version:
                    return found
            except IndexError:
                # Strayed, or the memory has grown since we looked.
                self._words, self.buffer = self._segment.claimed()
            tries += 1
            if tries == PLAIN_TRIES:
                return self._get_pinned(route, known)

    def _get_pinned(self, route: Route, known: int) -> Found | None:
        """As `get`, when that is overtaken again and again (a huge value, a starved process)."""
        pinned = self.pin()
        try:
            cell = self.find(pinned, route)
            if cell is None:
                return None
            skip = cell.birth == known or cell.payload[0] == ARRAYS
            lengths = len(cell.key) << KEY_SHIFT | len(cell.payload)
            return pinned.number, cell.birth, None if skip else bytes(cell.payload), cell.index, lengths
        finally:
            self.unpin(pinned)

    def pin(self) -> Version:
        """Pin the last committed version.

        Raises:
            ProtocolError: the segment is damaged.
        """
        for _ in range(PIN_TRIES):
            version = self._pin(exact=False)
            if version is not None:
                return version
        raise _damaged(self._segment.name)

    def pin_exact(self) -> Version | None:
        """As `pin`, or None when this process has no exact pin left."""
        for _ in range(PLAIN_TRIES):
            version = self._pin(exact=True)
            if version is not None:
                return version
        return None

    def _pin(self, *, exact: bool) -> Version | None:
        words = self._words
        number = words[W_VERSION]
        if number >> 63:
            raise _damaged(self._segment.name)
        acquire = self._pins.acquire_exact if exact else self._pins.acquire
        if not acquire(number):
            return None
        record = self._segment.record(number)
        root, count = words[record + R_ROOT], words[record + R_COUNT]
        # Load-load: HORIZON, which speaks for the ring too, may not be loaded before the record: by then the record may
        # be that of version + 256. Pairs with the second fence of `store.commit.StoreWriter.commit`.
        read_fence()
        if words[W_HORIZON] > number:
            self._pins.release(number)
            return None
        self._look()  # what the version reaches was claimed before it was published
        return Version(number, root, count, is_exact=self._pins.is_exact(number))

    def hold(self, version: Version) -> None:
        """Pin a version that is pinned already once more."""
        self._pins.acquire(version.number)

    @property
    def is_foreign(self) -> bool:
        """Whether another process, our parent, owns the pins."""
        return self._pins.pid != os.getpid()

    def unpin(self, version: Version) -> None:
        """Let go of a version that `pin` returned."""
        self._pins.release(version.number)

    def find(self, version: Version, route: Route) -> Cell | None:
        """The cell of a key in a pinned version."""
        try:
            return self._find(version, route)
        except IndexError:
            # A pinned walk does not stray: the memory has grown since we looked.
            self._words, self.buffer = self._segment.claimed()
            try:
                return self._find(version, route)
            except IndexError:
                raise _damaged(self._segment.name) from None

    def _find(self, version: Version, route: Route) -> Cell | None:
        words = self._words
        pointer = version.root
        for turn in route.turns:
            if pointer & 1 or not pointer:
                break
            pointer = words[(pointer >> 1) + turn]
        else:
            pointer = self._find_deeper(words, pointer, route)
        if not pointer:
            return None
        cell = self._cell(pointer)
        return cell if cell.key == route.key else None

    def _find_deeper(self, words: memoryview, pointer: int, route: Route) -> int:
        bits = route.digest >> 5 * ROUTE_TURNS
        for _ in _LATER:
            if pointer & 1 or not pointer:
                return pointer
            pointer = words[(pointer >> 1) + (bits & 31)]
            bits >>= 5
        return deep_find(words, pointer, route.key, self.hash)

    def cells(self, version: Version) -> Iterator[Cell]:
        """Every cell of a pinned version, in the order of the hashes."""
        self._look()
        words, _ = self._segment.claimed()  # ours alone: a walk makes views of it
        try:
            for pointer in walk(words, version.root):
                if pointer & 1:
                    yield self._cell(pointer)
        except IndexError:
            raise _damaged(self._segment.name) from None

    def cells_since(self, version: Version, since: int) -> Iterator[Cell]:
        """Every cell of a pinned version that a version after *since* has written. Only their paths are walked."""
        self._look()
        words, _ = self._segment.claimed()  # as in `cells`
        stack = [version.root] if version.root else []
        try:
            while stack:
                pointer = stack.pop()
                index = pointer >> 1
                if pointer & 1:
                    if words[index] > since:
                        yield self._cell(pointer)
                elif words[index - 1] > since:
                    stack += filter(None, words[index : index + FANOUT].tolist())
        except IndexError:
            raise _damaged(self._segment.name) from None

    def _cell(self, pointer: int) -> Cell:
        words, buffer = self._words, self.buffer
        index = pointer >> 1
        lengths = words[index + 2]
        start = (index + CELL_HEAD_WORDS) * WORD
        middle = start + (lengths >> KEY_SHIFT)
        body = middle + 7 & ~7
        end = body + (lengths & PAYLOAD_MASK)
        if end > len(buffer):
            raise IndexError  # a slice would stop at the end without a word
        memory = self._memory
        payload: Packed = memory[body:end] if FREE_THREADED else buffer[body:end].toreadonly()
        return Cell(index, words[index], memory[start:middle], payload)

    def __repr__(self) -> str:
        return f"<StoreReader at version {self.version()}>"
