"""Receipts: what became of P1 tasks whose answers are still on their way, committed in the same flip as their effect.

Owns: the blocks that BASE and DELTA of the last commit record name.
Written by: the coordinator alone.
Read by: the next coordinator when it takes over; a process whose coordinator is proved dead. Nobody else, so a
    block is free as soon as the next commit is published.
Order: a block is filled before the record that names it, and the record before VERSION (`commit`).
If we die here: the last record names whole blocks. A task is in them if and only if its effect is in the tree.
Invariants: a receipt stays until its process has said that it has the answer, or has gone. So a process that
    submits again all that it has no answer to is answered from the receipt, or runs the task for the first time.

A receipt names its process by *tenant*, a number drawn at each admission to a slot, so that a slot's next process
never meets the receipts of the former one. Most commits write only DELTA, into two blocks in turn; what
accumulates there (a process that is stopped, or reads late) moves to BASE, so that it is not copied each time.

A receipt speaks of a run of tasks: consecutive ones of one process that are answered by one frame.

Block: a word with the bytes that follow; then for each receipt the words TENANT, NUMBER (the ticket of the first task;
0 if it has none), SEQ (of the first), TASKS, LENGTH, and the answer's frame.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from ..errors import StateFull
from ..memory.fences import WORD
from ..memory.segment import R_BASE, R_DELTA, W_VERSION, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .arena import Arena

__all__ = ["Receipt", "Receipts", "read_receipts"]

DELTA_WORDS = 1 << 11
"""Words in a block for DELTA: a burst of 256 short answers fits."""
MANY_RECEIPTS = 24
"""Receipts in DELTA that are worth a new BASE; more, when BASE is large."""
KEPT_ANSWER_BYTES = 1 << 10
"""Bytes of an answer that is kept even when there is little room. A longer one is given up then; its task is not."""

_head = struct.Struct("=5Q")  # TENANT, NUMBER, SEQ, TASKS, LENGTH

Fields = tuple[int, int, int, int, bytes]
"""Those of a `Receipt`; a plain tuple is made in half the time."""


class Receipt(NamedTuple):
    """A run of tasks and their answer. An empty answer: they took effect, and the answer found no room."""

    tenant: int
    """Whose tasks: TENANCIES at the process's admission."""
    ticket: int
    """Of the first task; the others have the tickets that follow. 0 if they have none."""
    seq: int
    """Of the first task on its connection; the others have those that follow."""
    tasks: int
    """How many, at least one."""
    answer: bytes
    """The very frame that is sent, or that was."""

    @property
    def last(self) -> int:
        """The seq of the last task."""
        return self.seq + self.tasks - 1


def _unpack(entry: bytes) -> Receipt:
    tenant, ticket, seq, tasks, _ = _head.unpack_from(entry)
    return Receipt(tenant, ticket, seq, tasks, entry[_head.size :])


def read_receipts(segment: Segment) -> list[Receipt]:
    """The receipts of the last commit. Only while nobody commits.

    Raises:
        IndexError, struct.error: the segment is damaged.
    """
    words = segment.words
    record = segment.record(words[W_VERSION])
    found: list[Receipt] = []
    for index in (words[record + R_BASE], words[record + R_DELTA]):
        if index:
            found += _read_block(segment, index)
    return found


def _read_block(segment: Segment, index: int) -> Iterator[Receipt]:
    words, buffer = segment.claimed()
    position = (index + 1) * WORD
    end = position + words[index]
    if end > len(buffer):
        raise IndexError("a block of receipts ends behind the memory")
    while position < end:
        tenant, ticket, seq, tasks, length = _head.unpack_from(buffer, position)
        position += _head.size
        if position + length > end:
            raise IndexError("a receipt ends behind its block")
        yield Receipt(tenant, ticket, seq, tasks, bytes(buffer[position : position + length]))
        position += length


class Receipts:
    """The receipts as the coordinator keeps them.

    In memory of our own they lie packed, by tenant and by the seq of the last task of each.
    """

    def __init__(self, segment: Segment, arena: Arena) -> None:
        self._segment = segment
        self._words = segment.words
        self._buffer = segment.buffer
        self._arena = arena
        # What goes into DELTA with the next commit: all that is not acknowledged and not in BASE. No dict in it is
        # empty.
        self._recent: dict[int, dict[int, bytes]] = {}
        # What is in BASE, but for what was acknowledged since that was written.
        self._based: dict[int, dict[int, bytes]] = {}
        # The block (index, words) that the last commit's BASE names; index 0: none.
        self._base: tuple[int, int] = (0, 0)
        # The two blocks for DELTA. The first is written next; the last commit may name the other one.
        self._deltas: list[int] = []
        # What `write` has filled: block for BASE, index for DELTA. It counts from `committed` on.
        self._new: tuple[tuple[int, int], int] = ((0, 0), 0)
        # Whether `write` has moved all of `_recent` to a new BASE.
        self._moved = False
        # Blocks of a dead coordinator (index, words), which the next commit makes free.
        self._former: list[tuple[int, int]] = []

    def prepare(self) -> None:
        """Claim the two blocks for DELTA.

        Raises:
            StateFull: there is no room for them.
        """
        self._deltas = [self._arena.allocate(DELTA_WORDS) for _ in range(2)]

    def blocks(self) -> list[tuple[int, int]]:
        """Where the last commit's receipts lie: (start, words). They are used until the next one."""
        words = self._words
        record = self._segment.record(words[W_VERSION])
        base, delta = words[record + R_BASE], words[record + R_DELTA]
        used = [(base, _block_words(words[base]))] if base else []
        return [*used, (delta, DELTA_WORDS)] if delta else used

    def recover(self) -> None:
        """Take over what a dead coordinator committed. The arena knows already that `blocks` are used.

        Raises:
            StateFull: never in a segment whose coordinator had called `prepare`: its blocks are free again.
        """
        for receipt in read_receipts(self._segment):
            self.add(receipt)
        blocks = self.blocks()
        if blocks and blocks[-1][1] == DELTA_WORDS:
            self._deltas = [self._arena.allocate(DELTA_WORDS), blocks.pop()[0]]
        else:
            self.prepare()
        self._former = blocks

    def add(self, receipt: Fields) -> None:
        """Tasks have been answered; their receipt is in the next commit, in place of a former one of that last seq."""
        tenant, ticket, seq, tasks, answer = receipt
        due = self._recent.get(tenant)
        if due is None:
            due = self._recent[tenant] = {}
        due[seq + tasks - 1] = _head.pack(tenant, ticket, seq, tasks, len(answer)) + answer

    def acknowledge(self, tenant: int, seq: int) -> None:
        """A process has the answers of its P1 tasks up to *seq*."""
        for kept in (self._recent, self._based):
            due = kept.get(tenant)
            if due:
                for last in [last for last in due if last <= seq]:
                    del due[last]
                if not due:
                    del kept[tenant]

    def forget(self, tenant: int) -> None:
        """A process has gone."""
        self._based.pop(tenant, None)
        self._recent.pop(tenant, None)

    def of(self, tenant: int) -> list[Receipt]:
        """What a process may ask for again."""
        return [_unpack(entry) for kept in (self._based, self._recent) for entry in kept.get(tenant, {}).values()]

    # For `commit`

    def write(self) -> tuple[int, int]:
        """Fill the blocks of the next commit; return what its record says: BASE, DELTA (0 for none).

        Raises:
            StateFull: there is no room; nothing was changed.
        """
        if not self._recent:
            self._moved = False
            self._new = (self._base if self._based else (0, 0), 0)
            return self._new[0][0], 0
        entries = [entry for due in self._recent.values() for entry in due.values()]
        data = b"".join(entries)
        many = len(entries) > MANY_RECEIPTS and len(entries) > MANY_RECEIPTS + (
            sum(map(len, self._based.values())) >> 2
        )
        self._moved = many or len(data) > (DELTA_WORDS - 1) * WORD
        if self._moved:
            self._new = (self._new_base(), 0)
        else:
            self._new = (self._base if self._based else (0, 0), self._fill(self._deltas[0], data) if data else 0)
        return self._new[0][0], self._new[1]

    def _new_base(self) -> tuple[int, int]:
        entries = [entry for kept in (self._based, self._recent) for due in kept.values() for entry in due.values()]
        try:
            return self._store(b"".join(entries))
        except StateFull:
            return self._store(b"".join(map(_shortened, entries)))

    def _store(self, data: bytes) -> tuple[int, int]:
        size = _block_words(len(data))
        index = self._arena.allocate(size)
        self._fill(index, data)
        return index, size

    def _fill(self, index: int, data: bytes) -> int:
        self._words[index] = len(data)
        start = (index + 1) * WORD
        self._buffer[start : start + len(data)] = data
        return index

    def committed(self) -> None:
        """VERSION has passed: the former blocks are free."""
        base, delta = self._new
        if self._former:
            for index, size in self._former:
                self._arena.release(index, size)
            self._former = []
        if self._base[0] and base != self._base:
            self._arena.release(*self._base)
        self._base = base
        if delta:
            self._deltas.reverse()
        if self._moved:
            for tenant, due in self._recent.items():
                self._based.setdefault(tenant, {}).update(due)
            self._recent = {}
            self._moved = False

    def __repr__(self) -> str:
        recent, based = (sum(map(len, kept.values())) for kept in (self._recent, self._based))
        return f"<Receipts: {recent} recent, {based} in the base>"


def _block_words(length: int) -> int:
    return 1 + (length + WORD - 1) // WORD


def _shortened(entry: bytes) -> bytes:
    tenant, ticket, seq, tasks, length = _head.unpack_from(entry)
    return entry if length <= KEPT_ANSWER_BYTES * tasks else _head.pack(tenant, ticket, seq, tasks, 0)
