"""Commits: the writer of the state.

Owns: VERSION, HORIZON, the ring of commit records, and (through `trie` and `arena`) all blocks.
Written by: the coordinator alone.
Read by: everybody (`reader`).
Order of a commit, each step seen by others before the next (store-store; free on x86-64)::

    1  cells and nodes of the new version, and its receipts (`receipts`); private so far
    2  each cell that is replaced names the one that comes in its place; who follows it sees that this is not yet born
    3  HORIZON raised past the version whose record the ring slot still holds
    4  the commit record
    5  VERSION, one store: the commit

If we die here: before step 5 nothing has happened, after it everything. Step 3 alone makes readers of a
    version 256 commits old look again. `StoreWriter.recover` finds what is free, and takes step 2 back.
Invariants: a block is reused only after HORIZON has passed the last version that reaches it, and when no
    pin needs it.

What a commit replaces rests before it is reused, so that a read almost never meets the horizon.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from ..errors import StateFull
from ..segment import (
    R_BASE,
    R_COUNT,
    R_DELTA,
    R_ROOT,
    R_TIME,
    R_VERSION,
    RECORD,
    RING,
    W_HORIZON,
    W_RING,
    W_VERSION,
    Segment,
)
from ..words import WORD, fence, publish_fence
from .arena import Arena, block_size
from .pins import PinnedVersions, clear_pins
from .receipts import Receipts
from .trie import NEXT, NODE, Hash, Trie, cell_size, walk

__all__ = ["BURST_BYTES", "StoreWriter"]

Rest = tuple[int, list[int], list[tuple[int, int]], int]
"""What a version has replaced: the version, nodes by block, cells by block and size, all words together."""

audit = sys.audit

REST_WORDS = 1 << 17
"""Replaced memory that rests before it is reused: 1 MiB, about a thousand commits, and no more than a cache holds."""

HEADROOM = 1 << 16
"""Words that `is_roomy` promises."""

BURST_BYTES = 1 << 18
"""Payload that a burst may have in all: the other half of the headroom is for nodes."""


class StoreWriter:
    """Makes new versions of the state.

    A burst of tasks makes one version: `publish` builds its tree beside the last one, then flips VERSION.
    """

    def __init__(self, segment: Segment, flow: str) -> None:
        self._segment = segment
        self._flow = flow
        self._words = segment.words
        self.hash = Hash(segment.hash_key)
        self.arena = Arena(segment, flow, NODE)
        self.trie = Trie(segment.words, segment.buffer, self.arena, self.hash)
        self.receipts = Receipts(segment, self.arena)
        self._resting: deque[Rest] = deque()
        self._resting_words = 0
        self._held: list[tuple[int, int]] = []  # (replaced at, pointer): spared for a pin
        self._held_for: PinnedVersions | None = None
        self.version = 0
        self.latest: Mapping[bytes, bytes | None] = {}
        """What the last commit changed."""
        self._root = 0
        self._count = 0

    def create(self) -> None:
        """Begin with an empty state, version 0."""
        self.arena.prepare()
        self.receipts.prepare()
        self._begin()

    def recover(self) -> None:
        """Take over a segment whose writer died: whatever no version that anybody needs reaches is free.

        Stores HORIZON, the coordinator's own pins, and `next` in cells that are the last, nothing else: dying here
        changes nothing.
        """
        words = self._words
        clear_pins(self._segment, 0)  # the dead writer's own
        self.version = words[W_VERSION]
        _, self._root, self._count = self._record(self.version)
        # Readers of older versions without a pin look again.
        words[W_HORIZON] = self.version
        fence()
        used = dict(self._blocks(self._root))
        for pointer in used:
            if pointer & 1 and words[(pointer >> 1) + NEXT]:
                words[(pointer >> 1) + NEXT] = 0  # what the dead writer was about to put in its place is free
        pinned = PinnedVersions(self._segment)
        reach = self.version
        for version in range(max(0, self.version - RING + 1), self.version):
            number, root, _ = self._record(version)
            if number != version:
                continue  # the dead writer was about to overwrite it
            reach = min(reach, version)
            if pinned.needs(version, version + 1):
                for pointer, block in self._blocks(root):
                    if pointer not in used:
                        used[pointer] = block
                        self._held.append((self.version, pointer))
        self._held_for = pinned
        # A snapshot older than all records: nobody can say what it reaches, so nothing that may be its is reused,
        # until the flow is stopped or taken over once more.
        is_known = pinned.oldest is None or pinned.oldest >= reach
        self.arena.rebuild([*used.values(), *self.receipts.blocks()], keep_gaps=not is_known)
        self.receipts.recover()
        self.arena.refill_reserve()
        self._begin()

    def _record(self, version: int) -> tuple[int, int, int]:
        record = W_RING + version % RING * RECORD
        words = self._words
        return words[record + R_VERSION], words[record + R_ROOT], words[record + R_COUNT]

    def _blocks(self, root: int) -> Iterable[tuple[int, tuple[int, int]]]:
        """Pointer -> (start, words) of everything below *root*."""
        words = self._words
        for pointer in walk(words, root):
            index = pointer >> 1
            if pointer & 1:
                yield pointer, (index, cell_size(words, index))
            else:
                yield pointer, (index - 1, NODE)

    def _begin(self) -> None:
        self.trie.begin(self.version + 1, self._root, self._count)

    # Committing

    def is_roomy(self) -> bool:
        """Whether a burst of up to `BURST_BYTES` of payload surely has room; if not, publish each task alone."""
        return self.arena.has_room(HEADROOM)

    def publish(self, changes: Mapping[bytes, bytes | None]) -> int:
        """`commit`, then `tidy`. Return the new version."""
        self.commit(changes)
        self.tidy()
        return self.version

    def commit(self, changes: Mapping[bytes, bytes | None]) -> None:
        """Commit: packed key -> packed value, None to delete (the key must be there). `tidy` comes before the next one.

        Raises:
            StateFull: there is no room, even with all that rests; nothing was changed.
        """
        base, delta = self._build(changes)
        audit("strictflow_mp.commit.built")
        trie, words = self.trie, self._words
        # The new cells before what leads to them (store-store).
        publish_fence()
        for old, new in trie.heirs:
            words[(old >> 1) + NEXT] = new
        audit("strictflow_mp.commit.linked")
        version = self.version + 1
        floor = version - RING + 1
        if floor > words[W_HORIZON]:
            words[W_HORIZON] = floor
            # HORIZON before the record that overwrites version - 256's (store-store).
            publish_fence()
        audit("strictflow_mp.commit.horizon")
        record = W_RING + version % RING * RECORD
        words[record + R_VERSION] = version
        words[record + R_ROOT] = trie.root
        words[record + R_COUNT] = trie.count
        words[record + R_TIME] = time.time_ns()
        words[record + R_BASE] = base
        words[record + R_DELTA] = delta
        audit("strictflow_mp.commit.recorded")
        # All that the version reaches before the version itself (store-store).
        publish_fence()
        words[W_VERSION] = version
        audit("strictflow_mp.commit.flipped")
        self.version, self._root, self._count = version, trie.root, trie.count
        self.latest = changes

    def tidy(self) -> None:
        """Put to rest what the last commit has replaced: what is left to do when readers can see it."""
        trie, version = self.trie, self.version
        self.receipts.committed()
        if trie.worn or trie.heirs:
            self._rest(version)
        if not self.arena.is_reserve_full:
            self._reclaim(version)
            self.arena.refill_reserve()
        trie.begin(version + 1, trie.root, trie.count)

    def _build(self, changes: Mapping[bytes, bytes | None]) -> tuple[int, int]:
        """Build the next version's tree, if need be with what rests, and (only to delete) with the reserve.

        Return the blocks of its receipts.
        """
        means: list[Callable[[], bool]] | None = None
        while True:
            try:
                self._apply(changes)
                return self.receipts.write()
            except StateFull:
                self._undo()
                if means is None:
                    means = [self._reclaim_all]
                    if not any(payload is not None for payload in changes.values()):
                        means.append(self.arena.open_reserve)
                while means and not means[0]():
                    del means[0]
                if not means:
                    raise
                del means[0]
            except BaseException:
                self._undo()
                raise

    def _undo(self) -> None:
        self.trie.rollback()
        self._begin()

    def _apply(self, changes: Mapping[bytes, bytes | None]) -> None:
        trie, hashing = self.trie, self.hash
        for key, payload in changes.items():
            digest = hashing(key)
            if payload is None:
                trie.delete(key, digest)
            else:
                trie.put(key, digest, trie.new_cell(key, digest, payload))

    # Rest and reuse

    def _rest(self, version: int) -> None:
        memory, nodes = self._words, self.trie.worn
        words = NODE * len(nodes)
        cells = []
        for pointer, _ in self.trie.heirs:
            index = pointer >> 1
            size = cell_size(memory, index)
            cells.append((index, size))
            words += size
        self._resting.append((version, nodes, cells, words))
        self._resting_words += words
        if self._resting_words > REST_WORDS:
            # Half of it, so that the pins are looked at once for many commits.
            rest = self._resting_words >> 1
            for replaced_at, _, _, size in self._resting:
                rest -= size
                if rest <= 0:
                    self._reclaim(min(replaced_at, version - 1))
                    break
            self.arena.refill_reserve()

    def _reclaim_all(self) -> bool:
        return self._reclaim(self.version)

    def _reclaim(self, horizon: int) -> bool:
        """Free what was replaced up to version *horizon* and no pin needs; False if there was nothing."""
        words = self._words
        if not self._resting and not self._held:
            return False
        if horizon > words[W_HORIZON]:
            words[W_HORIZON] = horizon
        audit("strictflow_mp.reclaim.horizon")
        # HORIZON must be seen before the pins are looked at (store-load).
        fence()
        pinned = PinnedVersions(self._segment)
        trie, arena = self.trie, self.arena
        freed = False
        if self._held and pinned != self._held_for:
            held = self._held
            self._held = []
            for version, pointer in held:
                if pinned.needs(trie.birth(pointer), version):
                    self._held.append((version, pointer))
                else:
                    trie.free(pointer)
                    freed = True
        self._held_for = pinned
        unpinned = pinned.oldest is None
        resting = self._resting
        while resting and resting[0][0] <= horizon:
            version, nodes, cells, size = resting.popleft()
            self._resting_words -= size
            if unpinned:
                arena.release_all(nodes, NODE)
                for index, words_taken in cells:
                    arena.release(index, words_taken)
                freed = True
                continue
            for pointer in (*(node + 1 << 1 for node in nodes), *(index << 1 | 1 for index, _ in cells)):
                if pinned.needs(trie.birth(pointer), version):
                    self._held.append((version, pointer))
                else:
                    trie.free(pointer)
                    freed = True
        return freed

    @property
    def tree(self) -> tuple[int, int]:
        """Root and number of keys of the last version."""
        return self._root, self._count

    # For the statistics

    @property
    def bytes_used(self) -> int:
        """Bytes of the arena that are not free, memory at rest included."""
        return self.arena.used * WORD

    @property
    def bytes_free(self) -> int:
        """Bytes of the capacity that are left."""
        return self.arena.free * WORD

    @property
    def bytes_pinned(self) -> int:
        """Bytes kept for snapshots only."""
        total = 0
        for _, pointer in self._held:
            index = pointer >> 1
            if pointer & 1:
                total += block_size(cell_size(self._words, index))
            else:
                total += NODE
        return total * WORD

    def __repr__(self) -> str:
        return f"<StoreWriter of {self._flow!r} at version {self.version}, {self._count} keys>"
