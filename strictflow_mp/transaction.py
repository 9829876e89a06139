"""Transactions: what a P1 task sees and changes, and how the tasks of one burst build on each other.

Owns: nothing shared. A `Burst` collects the changes of its tasks; `StoreWriter.publish` commits them.
Invariants: a task's changes enter the burst whole or not at all; what a task takes out is its own copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any, Protocol

from .errors import StateFull
from .store import BURST_BYTES, StoreReader, StoreWriter, Version
from .values import pack, pack_key, unpack, unpack_key

__all__ = ["Burst", "Changes", "Ledger", "Transaction", "path_of"]

_GONE: Any = type("_Gone", (), {"__repr__": lambda self: "<deleted>"})()
_PLAIN = frozenset({int, str, float, bool, bytes, type(None)})
"""Types that cannot change in place."""

CELL_OVERHEAD = 512
"""Bytes that a change may take in the tree beside its key and value: a cell's head and a copied path's share."""

Changes = dict[bytes, bytes | None]
"""Packed key -> packed value, or None to delete."""


class Ledger(Protocol):
    """Where it is written down whose tasks a commit holds (`answers`)."""

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
        self._is_tidy = True
        self._begin()

    def _begin(self) -> None:
        self._changes: Changes = {}
        self._plain: dict[bytes, Any] = {}
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
        return None if cell is None else cell.payload.tobytes()

    @property
    def _version(self) -> Version:
        return Version(self._writer.version, *self._writer.tree)

    def take(self, key: bytes) -> tuple[bytes | None, Any]:
        """As `lookup`, and what that stands for, which is the caller's own copy; None, `_GONE` when absent."""
        packed = self._changes[key] if key in self._changes else self._committed(key)
        if packed is None:
            return None, _GONE
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
        if type(value) in _PLAIN:
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
            # Too heavy to be sure of its room: what is there is committed first, so that it can only harm itself.
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

        A task that failed or changed nothing is committed too: else the next coordinator would run it once more, behind
        the back of whoever has read what it left.

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
        self._begin()
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
        self._taken = b""  # the key that a keyed task was given, its value, and that as it was before
        self._value: Any = None
        self._before: bytes | None = None

    def begin(self) -> None:
        """Another task of the burst begins."""
        self._taken = b""
        if self._entries:
            self._entries = {}

    def take_out(self, packed_key: bytes) -> Any:
        """A keyed task's first argument: the private copy of its key's value, None when absent."""
        # No entry of its own: most keyed tasks look at nothing else, and give back the new value themselves.
        self._taken = packed_key
        self._before, self._value = before, value = self._burst.take(packed_key)
        return None if before is None else value

    def put_back(self, packed: bytes, value: Any, call: Any) -> None:
        """Hand to the burst what a keyed task has changed, by its return value *value* and besides.

        Raises:
            SerializationError: a value that it changed in place besides can no longer be stored.
            StateFull: there is no room.
        """
        key = self._taken
        if self._entries:
            self._entries.pop(key, None)
            changes = self.changes()
            if packed != self._before:
                changes[key] = packed
            self._burst.apply(changes, call)
        elif packed == self._before:
            self._burst.apply({}, call)
        else:
            self._burst.put(key, packed, value, call)

    def __getitem__(self, key: Any) -> Any:
        value = self._load(pack_key(key)).value
        if value is _GONE:
            raise KeyError(key)
        return value

    def _load(self, packed_key: bytes) -> _Entry:
        entry = self._entries.get(packed_key)
        if entry is None:
            if packed_key == self._taken:
                entry = _Entry(self._value, self._before, self._before)
            else:
                before = self._burst.lookup(packed_key)
                entry = _Entry(_GONE if before is None else unpack(before), before, before)
            self._entries[packed_key] = entry
        return entry

    def __setitem__(self, key: Any, value: Any) -> None:
        packed_key = pack_key(key)
        packed = pack(value, path_of(key))
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
            packed = entry.packed if type(value) in _PLAIN else pack(value, path_of(unpack_key(key)))
            if packed != entry.before:
                found[key] = packed
        return found

    def __repr__(self) -> str:
        return f"<Transaction, {len(self._entries)} keys taken>"


def path_of(key: Any) -> str:
    """What the value of a key is called in an error."""
    return key if isinstance(key, str) else f"state[{key!r}]"
