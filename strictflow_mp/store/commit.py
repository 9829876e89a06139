"""Commits: the writer of the state.

Owns: VERSION, HORIZON, the ring of commit records, and (through `trie` and `arena`) all blocks.
Written by: the coordinator alone.
Read by: everybody (`reader`).
Order of a commit, each step seen by others before the next (store-store; free on x86-64)::

    C1  cells and nodes of the new version, and its receipts (`receipts`); private so far
    C2  each cell that is replaced names the one that comes in its place; a reader that follows it sees that this one
        is not born yet
    C3  HORIZON raised past the version whose record the ring slot still holds
    C4  the commit record
    C5  VERSION, one store: the commit

If we die here: before C5 nothing has happened, after it everything. C3 alone makes readers of a
    version 256 commits old look again. `StoreWriter.recover` finds what is free, and takes C2 back.
Invariants: a block is reused only after HORIZON has passed the last version that reaches it, and when no
    pin needs it.

What a commit replaces rests before it is reused, so that a read almost never meets the horizon.

The protocol: docs/protocols/commit.md.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from ..errors import StateFull
from ..memory.fences import WORD, fence, publish_fence
from ..memory.segment import (
    R_BASE,
    R_COUNT,
    R_DELTA,
    R_ROOT,
    R_TIME,
    R_VERSION,
    RECORD_WORDS,
    RING_RECORDS,
    W_HORIZON,
    W_RING,
    W_VERSION,
    Segment,
)
from .arena import SPAN_BITS, Arena, block_size, span
from .pins import PinnedVersions, clear_pins
from .receipts import Receipts
from .steps import in_parts
from .survey import survey
from .trie import LENGTHS, NEXT, NODE_WORDS, Hash, Trie, cell_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["BURST_BYTES", "StoreWriter"]

Rest = tuple[int, list[int], list[tuple[int, int]], int]
"""What a version has replaced: the version, nodes by block, cells by block and size, all words together."""

audit = sys.audit

REST_WORDS = 1 << 17
"""Replaced memory that rests before it is reused: 1 MiB, about a thousand commits, and no more than a cache holds."""

HEADROOM_WORDS = 1 << 16
"""Words that `is_roomy` promises."""

BURST_BYTES = 1 << 18
"""Payload that a burst may have in all: the other half of the headroom is for nodes."""


class StoreWriter:
    """Makes new versions of the state.

    A burst of tasks makes one version: `commit` builds its tree beside the last one, then flips VERSION.
    """

    def __init__(self, segment: Segment, flow: str) -> None:
        self._segment = segment
        self._flow = flow
        self._words = segment.words
        self.hash = Hash(segment.hash_key)
        self.arena = Arena(segment, flow, NODE_WORDS)
        self.trie = Trie(segment.words, segment.buffer, self.arena, self.hash)
        self.receipts = Receipts(segment, self.arena)
        # What versions have replaced, the oldest first. Appended by `tidy`, taken out by `_reclaim`.
        self._resting: deque[Rest] = deque()
        # The sum of its sizes.
        self._resting_words = 0
        # (replaced at, pointer) of what rests no more, and is spared for a pin. Looked at again when the pins have
        # changed: since it was put here, no pin that needs it can have come, for HORIZON has passed its last version.
        self._held: list[tuple[int, int]] = []
        # The pins at the last look; `_held` is what these need.
        self._held_for: PinnedVersions | None = None
        # VERSION, and ROOT and COUNT of its record: nobody else stores those, so they need not be loaded.
        self.version = 0
        self._root = 0
        self._count = 0
        self.latest: Mapping[bytes, bytes | None] = {}
        """What the last commit changed."""

    def create(self) -> None:
        """Begin with an empty state, version 0."""
        self.arena.prepare()
        self.receipts.prepare()
        self._begin()

    def recover(self, go_on: Callable[[], object] = lambda: None) -> None:
        """Take over a segment whose writer died: whatever no version that anybody needs reaches is free.

        It takes 2 to 3 us a key; *go_on* is called again and again meanwhile.

        Stores HORIZON, the coordinator's own pins, and `next` in cells that are the last, nothing else: dying here
        changes nothing.
        """
        words = self._words
        clear_pins(self._segment, 0)  # the dead writer's own
        self.version = words[W_VERSION]
        _, self._root, self._count = self._record(self.version)
        # Readers of older versions without a pin look again.
        words[W_HORIZON] = self.version
        # Store-load: the pins may not be loaded while HORIZON is in our store buffer. Pairs with
        # `store.pins.Pins._store`. Store-store: NEXT = 0, and whatever is written to memory that was given out
        # before, may not be seen before HORIZON. Pairs with the fence of `store.reader.StoreReader.follow`, and of
        # `get`.
        fence()
        nodes, cells = survey(words, self._root, go_on)
        blocks = self._spans(nodes, cells, go_on, is_newest=True)
        known: set[int] = set()  # of the last version and of pinned ones; empty while nobody has pinned any
        pinned = PinnedVersions(self._segment)
        reach = self.version
        for version in range(max(0, self.version - RING_RECORDS + 1), self.version):
            number, root, _ = self._record(version)
            if number != version:
                continue  # the dead writer was about to overwrite it
            reach = min(reach, version)
            if pinned.needs(version, version + 1):
                for part in in_parts([] if known else nodes + cells, go_on):
                    known.update(part)
                older: list[list[int]] = [[], []]
                for kind, found in zip(older, survey(words, root, go_on), strict=True):
                    for part in in_parts(found, go_on):
                        kind += [pointer for pointer in part if pointer not in known]
                blocks += self._spans(older[0], older[1], go_on)
                for part in in_parts(older[0] + older[1], go_on):
                    known.update(part)
                    self._held += [(self.version, pointer) for pointer in part]
        self._held_for = pinned
        # A snapshot older than all records: nobody can say what it reaches, so nothing that may be its is reused,
        # until the flow is stopped or taken over once more.
        is_known = pinned.oldest is None or pinned.oldest >= reach
        blocks += [span(index, size) for index, size in self.receipts.blocks()]
        self.arena.rebuild(blocks, keep_gaps=not is_known, go_on=go_on)
        self.receipts.recover()
        self.arena.refill_reserve()
        self._begin()

    def _record(self, version: int) -> tuple[int, int, int]:
        """VERSION, ROOT and COUNT of a version's record; another VERSION when the ring has moved on."""
        record, words = self._segment.record(version), self._words
        return words[record + R_VERSION], words[record + R_ROOT], words[record + R_COUNT]

    def _spans(
        self, nodes: list[int], cells: list[int], go_on: Callable[[], object], *, is_newest: bool = False
    ) -> list[int]:
        """What nodes and cells take up. In the newest version no cell has one that comes in its place."""
        words = self._words
        spans: list[int] = []
        for part in in_parts(nodes, go_on):
            spans += [span((pointer >> 1) - 1, NODE_WORDS) for pointer in part]
        sizes: dict[int, int] = {}  # by the word of lengths, of which there are few
        for part in in_parts(cells, go_on):
            for pointer in part:
                index = pointer >> 1
                if is_newest and words[index + NEXT]:
                    words[index + NEXT] = 0  # what the dead writer was about to put in its place is free
                lengths = words[index + LENGTHS]
                if lengths not in sizes:
                    sizes[lengths] = cell_size(words, index)
                spans.append(index << SPAN_BITS | sizes[lengths])
        return spans

    def _begin(self) -> None:
        self.trie.begin(self.version + 1, self._root, self._count)

    # Committing

    def is_roomy(self) -> bool:
        """Whether a burst of up to `BURST_BYTES` of payload surely has room; if not, publish each task alone."""
        return self.arena.has_room(HEADROOM_WORDS)

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
        # Store-store: no NEXT (C2) may be seen before the cell (C1) that it leads to, whose birth says that it is not
        # of this version yet. At the other end, `store.reader.StoreReader.follow`, the address depends on NEXT.
        publish_fence()
        for old, new in trie.heirs:
            words[(old >> 1) + NEXT] = new
        audit("strictflow_mp.commit.linked")
        version = self.version + 1
        floor = version - RING_RECORDS + 1
        if floor > words[W_HORIZON]:
            words[W_HORIZON] = floor
            # Store-store: the record (C4) that overwrites that of version - 256 may not be seen before the HORIZON (C3)
            # that says so. Pairs with the fence of `store.reader.StoreReader.get`, and with that of `_pin`.
            publish_fence()
        audit("strictflow_mp.commit.horizon")
        # As `Segment.record`, spelled out: a commit is counted in instructions.
        record = W_RING + version % RING_RECORDS * RECORD_WORDS
        words[record + R_VERSION] = version
        words[record + R_ROOT] = trie.root
        words[record + R_COUNT] = trie.count
        words[record + R_TIME] = time.time_ns()
        words[record + R_BASE] = base
        words[record + R_DELTA] = delta
        audit("strictflow_mp.commit.recorded")
        # Store-store: VERSION (C5) may not be seen before anything that it reaches: blocks (C1), NEXT (C2), the record
        # (C4). At the other end, in `store.reader.StoreReader.get`, addresses depend on VERSION; for NEXT it pairs with
        # the second fence of `client.state.FlowState._get_fenced`.
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
        words = NODE_WORDS * len(nodes)
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
            words[W_HORIZON] = horizon  # U1
        audit("strictflow_mp.reclaim.horizon")
        # U2, store-load: the pins may not be loaded while HORIZON is in our store buffer. Pairs with
        # `store.pins.Pins._store`: the reader sees HORIZON and lets go, or we see its pin. Store-store: what is
        # written to memory that is given out from here on (U3) may not be seen before HORIZON. Pairs with the
        # fence of `store.reader.StoreReader.get`, and of `follow`.
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
                arena.release_all(nodes, NODE_WORDS)
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
                total += NODE_WORDS
        return total * WORD

    def __repr__(self) -> str:
        return f"<StoreWriter of {self._flow!r} at version {self.version}, {self._count} keys>"
