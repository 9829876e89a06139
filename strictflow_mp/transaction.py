"""Transactions: what a P1 task sees and changes, and how the tasks of one burst build on each other.

Owns: nothing shared. A `Burst` collects the changes of its tasks; `StoreWriter.publish` commits them.
Invariants: a task's changes enter the burst whole or not at all; what a task takes out is its own copy.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from .store import BURST_BYTES, Receipt, StoreReader, StoreWriter, Version
from .values import pack, pack_key, unpack, unpack_key

__all__ = ["Burst", "Transaction"]

_GONE: Any = type("_Gone", (), {"__repr__": lambda self: "<deleted>"})()
_PLAIN = frozenset({int, str, float, bool, bytes, type(None)})
"""Types that cannot change in place."""

CELL_OVERHEAD = 512
"""Bytes that a change may take in the tree beside its key and value: a cell's head and a copied path's share."""

Changes = dict[bytes, bytes | None]
"""Packed key -> packed value, or None to delete."""


class Burst:
    """The changes of the P1 tasks that are published together."""

    def __init__(self, writer: StoreWriter, reader: StoreReader) -> None:
        self._writer = writer
        self._reader = reader
        self.commits = 0
        self._begin()

    def _begin(self) -> None:
        self._version = Version(self._writer.version, *self._writer.tree)
        self._changes: Changes = {}
        self._weight = 0

    def lookup(self, key: bytes) -> bytes | None:
        """The packed value as of now, changes of earlier tasks included; None when absent."""
        if key in self._changes:
            return self._changes[key]
        return self._committed(key)

    def _committed(self, key: bytes) -> bytes | None:
        cell = self._reader.find(self._version, self._reader.route(key))
        return None if cell is None else bytes(cell.payload)

    def __iter__(self) -> Iterator[bytes]:
        """Every packed key, as of now."""
        changed = self._changes
        for cell in self._reader.cells(self._version):
            if cell.key not in changed:
                yield cell.key
        for key, payload in changed.items():
            if payload is not None:
                yield key

    def apply(self, changes: Changes, receipt: Receipt | None = None) -> None:
        """Take over a task's changes, and its receipt: they are committed together.

        Raises:
            StateFull: there is no room; none was taken over.
        """
        if not changes:
            self._note(receipt)
            return
        weight = sum([len(key) + len(payload or b"") + CELL_OVERHEAD for key, payload in changes.items()])
        if self._weight + weight > BURST_BYTES:
            # Too heavy to be sure of its room: what is there is committed first, so that it can only harm itself.
            self.publish()
            self._note(receipt)
            self._changes = dict(changes)
            try:
                self.publish()
            finally:
                self._begin()
            return
        self._note(receipt)
        self._weight += weight
        self._changes.update(changes)

    def _note(self, receipt: Receipt | None) -> None:
        if receipt is not None:
            self._writer.receipts.add(receipt)

    def publish(self) -> None:
        """Commit what was applied, if it amounts to anything.

        Raises:
            StateFull: there is no room; nothing is committed.
        """
        changes = self._changes
        if None in changes.values():
            # Made and deleted within the burst: the committed tree has never heard of it.
            changes = {
                key: payload
                for key, payload in changes.items()
                if payload is not None or self._committed(key) is not None
            }
        if changes:
            self._writer.publish(changes)
            self.commits += 1
            self._begin()

    def __repr__(self) -> str:
        return f"<Burst on version {self._version.number}, {len(self._changes)} changes>"


class _Entry:
    """One key in a transaction: the value that the task has, and its packed form before and at hand-out."""

    __slots__ = ("before", "packed", "value")

    def __init__(self, value: Any, before: bytes | None, packed: bytes | None) -> None:
        self.value = value
        self.before = before
        self.packed = packed


class Transaction(MutableMapping[Any, Any]):
    """``flow.state`` in a P1 task: a private, mutable view that is committed when the task returns."""

    def __init__(self, burst: Burst) -> None:
        self._burst = burst
        self._entries: dict[bytes, _Entry] = {}

    def __getitem__(self, key: Any) -> Any:
        value = self._load(pack_key(key)).value
        if value is _GONE:
            raise KeyError(key)
        return value

    def _load(self, packed_key: bytes) -> _Entry:
        entry = self._entries.get(packed_key)
        if entry is None:
            before = self._burst.lookup(packed_key)
            entry = _Entry(_GONE if before is None else unpack(before), before, before)
            self._entries[packed_key] = entry
        return entry

    def __setitem__(self, key: Any, value: Any) -> None:
        packed_key = pack_key(key)
        packed = pack(value, _path(key))
        entry = self._entries.get(packed_key)
        if entry is None:
            self._entries[packed_key] = _Entry(value, self._burst.lookup(packed_key), packed)
        else:
            entry.value = value
            entry.packed = packed

    def __delitem__(self, key: Any) -> None:
        entry = self._load(pack_key(key))
        if entry.value is _GONE:
            raise KeyError(key)
        entry.value = _GONE

    def __contains__(self, key: object) -> bool:
        return self._load(pack_key(key)).value is not _GONE

    def _keys(self) -> list[bytes]:
        entries = self._entries
        keys = [key for key in self._burst if key not in entries]
        return keys + [key for key, entry in entries.items() if entry.value is not _GONE]

    def __iter__(self) -> Iterator[Any]:
        return map(unpack_key, self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def changes(self) -> Changes:
        """What the task has changed, in place or by assignment.

        Raises:
            SerializationError: a value that it changed in place can no longer be stored.
        """
        found: Changes = {}
        for key, entry in self._entries.items():
            value = entry.value
            if value is _GONE:
                if entry.before is not None:
                    found[key] = None
                continue
            packed = entry.packed if type(value) in _PLAIN else pack(value, _path(unpack_key(key)))
            if packed != entry.before:
                found[key] = packed
        return found

    def __repr__(self) -> str:
        return f"<Transaction, {len(self._entries)} keys taken>"


def _path(key: Any) -> str:
    return key if isinstance(key, str) else f"state[{key!r}]"
