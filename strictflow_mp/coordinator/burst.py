"""A burst: the changes of the P1 tasks that are committed together.

Each task sees what those before it have changed, as if they were committed already. Nothing of it is visible outside
until `publish`; then all of it is, at once.

Owns: nothing shared. The changes lie in memory of the coordinator's own until `StoreWriter.commit` has them.
Order: a task's changes are taken over when it has succeeded, and noted in the ledger in the same step; the ledger is
    sealed before each commit, so the receipts of a commit are those of the tasks whose changes it holds.
If we die here: the burst has not happened, unless its commit has: then it has happened whole.
Invariants: a task's changes are in the burst whole or not at all. What the burst holds weighs at most `BURST_BYTES`,
    and has room if the arena was roomy when it began (`StoreWriter.is_roomy`); else the runner commits each task alone,
    and so is a task that is heavier by itself.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import StateFull
from ..store import BURST_BYTES, StoreReader, StoreWriter, Version
from ..values.codec import unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..values.changes import Changes

__all__ = ["ABSENT", "PLAIN_TYPES", "Burst", "Ledger"]

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "<deleted>"})()
"""The value of a key that is absent."""
PLAIN_TYPES = frozenset({int, str, float, bool, bytes, type(None)})
"""Types that cannot change in place."""

CELL_OVERHEAD = 512
"""Bytes that a change may take in the tree beside its key and value: a cell's head and a copied path's share."""


class Ledger(Protocol):
    """Where it is written down which tasks a commit holds (`answers`)."""

    @property
    def owes(self) -> bool:
        """Whether a task has run that the next coordinator must hear of, though it may have changed nothing."""

    def add(self, call: Any) -> None:
        """A task has run."""

    def seal(self) -> None:
        """The next commit holds all that were added."""

    def revoke(self, reason: StateFull) -> None:
        """It does not: there was no room, and what they have changed is gone."""

    def committed(self, version: int, keys: Iterable[bytes]) -> None:
        """It is done, and changed these keys."""


class Burst:
    """The changes of the P1 tasks that are published together."""

    def __init__(self, writer: StoreWriter, reader: StoreReader, ledger: Ledger) -> None:
        self._writer = writer
        self._reader = reader
        self._ledger = ledger
        # False from a commit until `StoreWriter.tidy` has done what the commit left to be done.
        self._is_tidy = True
        self._begin()

    def _begin(self) -> None:
        # By packed key, what the tasks since the last commit made of it; None deletes.
        self._changes: Changes = {}
        # The values of some of these keys, unpacked: those of plain types, for which they stand exactly.
        self._plain: dict[bytes, Any] = {}
        # An upper bound of the bytes that committing `_changes` takes. At most BURST_BYTES.
        self._weight = 0

    def lookup(self, key: bytes) -> bytes | None:
        """The packed value as of now, changes of earlier tasks included; None when absent."""
        if key in self._changes:
            return self._changes[key]
        return self._committed(key)

    def _committed(self, key: bytes) -> bytes | None:
        latest = self._writer.latest
        if key in latest:  # often the last burst changed what this one does
            return latest[key]
        cell = self._reader.find(self._version, self._reader.route(key))
        return None if cell is None else bytes(cell.payload)

    @property
    def _version(self) -> Version:
        return Version(self._writer.version, *self._writer.tree)

    def take(self, key: bytes) -> tuple[bytes | None, Any]:
        """As `lookup`, and what that stands for, which is the caller's own copy; None, `ABSENT` when absent."""
        packed = self._changes[key] if key in self._changes else self._committed(key)
        if packed is None:
            return None, ABSENT
        # What cannot change in place needs no copy: a counter is unpacked once a burst.
        return packed, self._plain[key] if key in self._plain else unpack(packed)

    def put(self, key: bytes, packed: bytes, value: Any, call: Any) -> None:
        """As `apply`, for a task that has given one key the value *value*, and changed nothing else.

        Raises:
            StateFull: there is no room; it was not taken over.
        """
        weight = self._weight + len(key) + len(packed) + CELL_OVERHEAD
        if weight > BURST_BYTES:
            self.apply({key: packed}, call)
            return
        self._ledger.add(call)
        self._weight = weight
        self._changes[key] = packed
        if type(value) in PLAIN_TYPES:
            self._plain[key] = value
        elif self._plain:
            self._plain.pop(key, None)

    def __iter__(self) -> Iterator[bytes]:
        """Every packed key, as of now."""
        changed = self._changes
        for cell in self._reader.cells(self._version):
            if cell.key not in changed:
                yield cell.key
        for key, payload in changed.items():
            if payload is not None:
                yield key

    def apply(self, changes: Changes, call: Any) -> None:
        """Take over a task's changes, and that it has run: they are committed together.

        Raises:
            StateFull: there is no room; none was taken over.
        """
        weight = self._weight
        for key, payload in changes.items():
            weight += len(key) + CELL_OVERHEAD + (len(payload) if payload else 0)
        if weight > BURST_BYTES and changes:
            # Too heavy to be sure of its room. What was applied before is committed first: if there is no room for this
            # one, no other task fails with it.
            with suppress(StateFull):  # then those have failed
                self.publish()
            self._ledger.add(call)
            self._changes = dict(changes)
            self.publish()
            return
        self._ledger.add(call)
        self._weight = weight
        self._changes.update(changes)
        for key in self._plain.keys() & changes.keys():
            del self._plain[key]

    def publish(self) -> None:
        """Commit what was applied, and that its tasks have run.

        A task that failed or changed nothing is committed too: else the next coordinator would run it once more, though
        processes may have read a state in which it had been run.

        Raises:
            StateFull: there is no room; nothing is committed, and what was applied is gone.
        """
        changes = self._changes
        if None in changes.values():
            # Made and deleted within the burst: the committed tree has never heard of it.
            changes = {
                key: payload
                for key, payload in changes.items()
                if payload is not None or self._committed(key) is not None
            }
        self._begin()  # first: after a commit that failed, nothing is left of what it held
        if changes or self._ledger.owes:
            self.tidy()
            self._ledger.seal()
            try:
                self._writer.commit(changes)
            except StateFull as full:
                self._ledger.revoke(full)
                raise
            self._is_tidy = False
            if changes:
                self._ledger.committed(self._writer.version, changes)

    def tidy(self) -> None:
        """Do what a commit leaves to be done, when there is time."""
        if not self._is_tidy:
            self._is_tidy = True
            self._writer.tidy()

    def __repr__(self) -> str:
        return f"<Burst on version {self._writer.version}, {len(self._changes)} changes>"
