"""The trie: a persistent hash-array-mapped trie of 32-way nodes over a keyed 64-bit hash.

Owns: the layout of nodes and cells, and how to walk and to edit them. It knows nothing of versions that
    readers see (`commit`), nor which old ones are still needed (`pins`).
Written by: the coordinator; a block that a published root reaches is never written again, but for a cell's `next`,
    once, when it is replaced (`commit`).
Order: none here. A block is filled while nobody can reach it; `commit` says when others may see it.
If we die here: what was built is reached by no root, and is free for the next coordinator.
Read by: everybody, without any lock, so what is read may be memory that is being reused: a walk is
    bounded in depth, a step out of the claimed memory raises IndexError, and nothing that was read may be
    trusted before the horizon has been checked (`reader`).

A pointer is one word: 0 is empty; otherwise ``index << 1 | tag``, tag 0 for a node, 1 for a cell.

A node, 33 words::

    birth: the version that made it      <- pointer's index - 1
    32 pointers                          <- pointer's index

A cell::

    birth: the version that made it      <- pointer's index
    hash of the key
    key length << 44 | payload length, both in bytes
    next: the pointer of the cell that came in its place, 1 if the key was deleted; 0 while it is the last
    key, padded to 8 bytes
    payload (msgpack), padded to 8 bytes

Level n is chosen by bits 5n .. 5n+4 of the hash. Twelve levels use it up; keys that still agree go on
with the hash of the key under another salt (`Hash.again`), so that no collision is special.
Source of the idea: Bagwell, "Ideal Hash Trees" (2001), here with plain arrays instead of bitmaps.

The protocol: docs/protocols/commit.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from ..memory.fences import WORD

if TYPE_CHECKING:
    from .arena import Arena

__all__ = [
    "CELL_HEAD_WORDS",
    "FANOUT",
    "GONE",
    "LENGTHS",
    "LEVELS",
    "MAX_DEPTH",
    "NEXT",
    "NODE_WORDS",
    "Hash",
    "Take",
    "Trie",
    "cell_size",
    "cell_words",
    "deep_find",
    "shape",
    "walk",
]

FANOUT = 32
NODE_WORDS = FANOUT + 1
"""Words in a node: its birth, then its pointers."""
CELL_HEAD_WORDS = 4
"""Words before a cell's key."""
LENGTHS = 2
"""Which of them says how long key and payload are."""
NEXT = 3
"""Which of them names the cell that came in its place."""
GONE = 1
"""What stands there when none did."""
LEVELS = 12
"""Levels that one 64-bit hash can choose."""
MAX_DEPTH = 8 * LEVELS
"""Levels of any trie: two keys that agree in eight hashes of 60 bits each do not happen."""
KEY_SHIFT = 44
"""Bits of a cell's word of lengths for that of the payload; that of the key lies above them."""
PAYLOAD_MASK = (1 << KEY_SHIFT) - 1

_EMPTY = bytes(FANOUT * WORD)

KEPT_SHAPES = 1 << 12
"""Shapes of cells that are kept."""

KEPT_HASHES = 1 << 12
"""Keys whose hash is kept: the same few are written again and again, and hashing takes as long as a walk."""


class Hash:
    """The keyed hash: BLAKE2b, so that nobody can choose keys that collide."""

    def __init__(self, key: bytes) -> None:
        from hashlib import blake2b  # 6 ms that an import does not need

        self._blake2b = blake2b
        self._key = key
        # Hashes of keys that were asked for; thrown away all at once when there are too many. Threads may write to it
        # at the same time, since all would write the same.
        self._known: dict[bytes, int] = {}

    def __call__(self, key: bytes) -> int:
        known = self._known.get(key)
        if known is not None:
            return known
        # The key in front, not as BLAKE2b's own: that takes a block more. It is as hard to guess a collision.
        digest = int.from_bytes(self._blake2b(self._key + key, digest_size=8).digest(), "little")
        if len(self._known) >= KEPT_HASHES:
            self._known.clear()
        self._known[key] = digest
        return digest

    def again(self, key: bytes, block: int) -> int:
        """The hash for levels ``12 * block`` and below."""
        salt = block.to_bytes(8, "little")
        return int.from_bytes(self._blake2b(key, digest_size=8, key=self._key, salt=salt).digest(), "little")


Take = Callable[[memoryview, int], "tuple[int, int, int, bytes]"]
"""Takes the cell at a byte apart: birth, lengths, next, payload."""


@lru_cache(KEPT_SHAPES)
def shape(lengths: int) -> Take:
    """What takes a cell with that word of lengths apart, in one call, which costs half of loading its words one by one.

    A reader guesses that a key's next cell has the same lengths as the last one, and looks afterwards whether it has.
    If not, the payload is not to be used; the three words are right in any case.
    """
    key, payload = lengths >> KEY_SHIFT, lengths & PAYLOAD_MASK
    take: Take = struct.Struct(f"=Q8xQQ{key + 7 & -8}x{payload}s").unpack_from
    return take


Fill = Callable[[memoryview, int, int, int, int, int, bytes, bytes], None]
"""Fills the cell at a byte: birth, hash, lengths, next, key, payload."""


@lru_cache(KEPT_SHAPES)
def mould(lengths: int) -> Fill:
    """What fills a cell with that word of lengths, in one call."""
    key, payload = lengths >> KEY_SHIFT, lengths & PAYLOAD_MASK
    return struct.Struct(f"=4Q{key + 7 & -8}s{payload}s").pack_into


def cell_words(key_length: int, payload_length: int) -> int:
    """Words in a cell."""
    return CELL_HEAD_WORDS + (key_length + 7 >> 3) + (payload_length + 7 >> 3)


def cell_size(words: memoryview, index: int) -> int:
    """Words in the cell at that index."""
    lengths = words[index + LENGTHS]
    return cell_words(lengths >> KEY_SHIFT, lengths & PAYLOAD_MASK)


def deep_find(words: memoryview, pointer: int, key: bytes, hashing: Hash) -> int:
    """Go on below the levels that the first hash chose; return a cell's pointer or 0."""
    for block in range(1, MAX_DEPTH // LEVELS):
        digest = hashing.again(key, block)
        for _ in range(LEVELS):
            if pointer & 1 or not pointer:
                return pointer
            pointer = words[(pointer >> 1) + (digest & 31)]
            digest >>= 5
    raise IndexError("deeper than any trie")


def walk(words: memoryview, root: int) -> Iterator[int]:
    """Every pointer below *root*, nodes before what they hold. Safe under a pin only.

    Raises:
        IndexError: the memory is damaged: it leads out of itself, or round in a circle.
    """
    stack = [root] if root else []
    left = len(words) // NODE_WORDS  # there cannot be more nodes
    while stack:
        pointer = stack.pop()
        yield pointer
        if not pointer & 1:
            left -= 1
            if left < 0:
                raise IndexError
            node = pointer >> 1
            stack += filter(None, words[node : node + FANOUT].tolist())


class Trie:
    """The writer's hand on the trie: edits the tree of the version that is being made.

    Blocks born in `version` are private until it is published, so they are changed in place; older ones
    are copied first.

    Attributes:
        version: the one that is being made: VERSION + 1 until it is published. Every block in `made` has it for birth.
        root: pointer to the top of its tree, 0 when that is empty.
        count: number of its keys.
        made: pointers of the blocks that were made for it: what `rollback` frees.
        worn: nodes that it replaces, by the first word of each. A node of this very version is among them when it was
            emptied again.
        heirs: cells that it replaces, each with the pointer of the one that comes in its place, or `GONE`.
    """

    def __init__(self, words: memoryview, buffer: memoryview, arena: Arena, hashing: Hash) -> None:
        self._words = words
        self._buffer = buffer
        self._arena = arena
        self._hash = hashing
        self.version = 0
        self.root = 0
        self.count = 0
        self.made: list[int] = []
        self.worn: list[int] = []
        self.heirs: list[tuple[int, int]] = []

    def begin(self, version: int, root: int, count: int) -> None:
        """Start to make *version* out of the tree at *root*."""
        self.version, self.root, self.count = version, root, count
        self.made, self.worn, self.heirs = [], [], []

    def rollback(self) -> None:
        """Free everything that was made since `begin`."""
        for pointer in self.made:
            self.free(pointer)
        self.made, self.worn, self.heirs = [], [], []

    def free(self, pointer: int) -> None:
        """Give a block back to the arena."""
        index = pointer >> 1
        if pointer & 1:
            self._arena.release(index, cell_size(self._words, index))
        else:
            self._arena.release(index - 1, NODE_WORDS)

    def birth(self, pointer: int) -> int:
        """The version that made a block."""
        index = pointer >> 1
        return int(self._words[index if pointer & 1 else index - 1])

    def new_cell(self, key: bytes, digest: int, payload: bytes) -> int:
        """Write a cell; return its pointer.

        Raises:
            StateFull: there is no room; nothing was changed.
        """
        key_length, length = len(key), len(payload)
        lengths = key_length << KEY_SHIFT | length
        index = self._arena.allocate(CELL_HEAD_WORDS + (key_length + 7 >> 3) + (length + 7 >> 3))
        mould(lengths)(self._buffer, index * WORD, self.version, digest, lengths, 0, key, payload)
        pointer = index << 1 | 1
        self.made.append(pointer)
        return pointer

    def put(self, key: bytes, digest: int, cell: int) -> None:
        """Make *cell* the cell of *key*."""
        words = self._words
        version = self.version
        allocate, made, worn = self._arena.allocate, self.made, self.worn
        parent = -1  # the word that points to where we are; -1 is the root
        pointer = self.root
        bits = digest
        depth = 0
        while pointer and not pointer & 1:
            block = (pointer >> 1) - 1
            if words[block] != version:
                # As `_copy`, spelled out: it is most of a commit in a large state.
                copy = allocate(NODE_WORDS)
                words[copy + 1 : copy + NODE_WORDS] = words[block + 1 : block + NODE_WORDS]
                words[copy] = version
                worn.append(block)
                block = copy
                pointer = copy + 1 << 1
                made.append(pointer)
                if parent < 0:
                    self.root = pointer
                else:
                    words[parent] = pointer
            parent = block + 1 + (bits & 31)
            pointer = words[parent]
            bits >>= 5
            depth += 1
            if depth == LEVELS or (depth > LEVELS and depth % LEVELS == 0):
                bits = self._hash.again(key, depth // LEVELS)
        if not pointer:
            self.count += 1
        elif self.key_of(pointer) == key:
            self.heirs.append((pointer, cell))
        else:
            self.count += 1
            cell = self._split(pointer, cell, key, bits, depth)
        self._set(parent, cell)

    def _split(self, old: int, new: int, key: bytes, bits: int, depth: int) -> int:
        """Return a subtree that holds two cells whose hashes agree above *depth*."""
        words = self._words
        old_key = self.key_of(old)
        block, level = divmod(depth, LEVELS)
        old_bits = (self._hash.again(old_key, block) if block else words[(old >> 1) + 1]) >> 5 * level
        top = slot = -1
        while True:
            if depth >= MAX_DEPTH:
                raise AssertionError("two keys share 480 bits of hash")
            node = self._new_node()
            if top < 0:
                top = node
            else:
                words[slot] = node << 1
            mine, other = bits & 31, old_bits & 31
            if mine != other:
                words[node + mine] = new
                words[node + other] = old
                return top << 1
            slot = node + mine
            bits >>= 5
            old_bits >>= 5
            depth += 1
            if depth % LEVELS == 0:
                bits = self._hash.again(key, depth // LEVELS)
                old_bits = self._hash.again(old_key, depth // LEVELS)

    def delete(self, key: bytes, digest: int) -> None:
        """Remove the key, which must be there; a node left with a single cell gives way to it."""
        words = self._words
        version = self.version
        parents = [-1]
        pointer = self.root
        bits = digest
        while pointer and not pointer & 1:
            node = pointer >> 1
            if words[node - 1] != version:
                node = self._copy(node, parents[-1])
            parent = node + (bits & 31)
            parents.append(parent)
            pointer = words[parent]
            bits >>= 5
            if (len(parents) - 1) % LEVELS == 0:
                bits = self._hash.again(key, (len(parents) - 1) // LEVELS)
        self.heirs.append((pointer, GONE))
        self.count -= 1
        remains = 0
        for level in range(len(parents) - 1, -1, -1):
            self._set(parents[level], remains)
            if level == 0:
                break
            above = parents[level - 1]
            node = (self.root if above < 0 else words[above]) >> 1
            left = [child for child in words[node : node + FANOUT].tolist() if child]
            if len(left) > 1 or (left and not left[0] & 1):
                break
            self.worn.append(node - 1)
            remains = left[0] if left else 0

    def key_of(self, cell: int) -> bytes:
        """A cell's key."""
        index = cell >> 1
        start = (index + CELL_HEAD_WORDS) * WORD
        return self._buffer[start : start + (self._words[index + 2] >> KEY_SHIFT)].tobytes()

    def _set(self, parent: int, pointer: int) -> None:
        if parent < 0:
            self.root = pointer
        else:
            self._words[parent] = pointer

    def _copy(self, node: int, parent: int) -> int:
        """Copy an older node, hang the copy in its place, return its index."""
        words = self._words
        copy = self._arena.allocate(NODE_WORDS) + 1
        words[copy - 1] = self.version
        words[copy : copy + FANOUT] = words[node : node + FANOUT]
        self.made.append(copy << 1)
        self.worn.append(node - 1)
        self._set(parent, copy << 1)
        return copy

    def _new_node(self) -> int:
        node = self._arena.allocate(NODE_WORDS) + 1
        self._words[node - 1] = self.version
        start = node * WORD
        self._buffer[start : start + len(_EMPTY)] = _EMPTY
        self.made.append(node << 1)
        return node
