"""Transactions: ``flow.state`` in one P1 task: what the task sees, and what it has changed when it returns.

It sees the committed state as the tasks before it in the burst have changed it (`burst`). Values are handed out as
copies, and compared with what they were when the task ends, so a task may change them in place. A task that has a key
is given that key's value as its first argument, and gives the new one back: a short cut, for most tasks do just that.

Owns: nothing shared.
Invariants: a task's changes enter the burst when it has succeeded, whole; what a task takes out is its own copy.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from ..values.changes import Changes, path_of
from ..values.codec import pack, unpack
from ..values.keys import pack_key, unpack_key
from .burst import ABSENT, PLAIN_TYPES, Burst

__all__ = ["Transaction"]


UNREAD = b""
"""Stands for a packed value that was there, and was not looked at. (No value is packed as that.)"""


class _Entry:
    """One key in a transaction."""

    __slots__ = ("before", "packed", "value")

    def __init__(self, value: Any, before: bytes | None, packed: bytes | None) -> None:
        # What the task has: a copy of its own, or what it has assigned; ABSENT when it is absent.
        self.value = value
        # Packed, as the burst had it when the task first touched the key; None when it was absent. Never changes.
        self.before = before
        # The value packed, as it was when handed out or assigned; one that cannot change in place still is so.
        self.packed = packed


class Transaction(MutableMapping[Any, Any]):
    """``flow.state`` in a P1 task: a private, mutable view that is committed when the task returns."""

    def __init__(self, burst: Burst) -> None:
        self._burst = burst
        # By packed key, what the task has touched through the mapping; empty when it begins.
        self._entries: dict[bytes, _Entry] = {}
        # The key whose value a keyed task was given; b"" is no key. It has an entry if the task touched it besides.
        self._taken = b""
        # That value, the task's own copy, and it packed, as it was before; only while `_taken` is a key.
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
            self._entries.pop(key, None)  # what the task returns counts, not what it did to its argument
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
        if value is ABSENT:
            raise KeyError(key)
        return value

    def _load(self, packed_key: bytes) -> _Entry:
        entry = self._entries.get(packed_key)
        if entry is None:
            if packed_key == self._taken:
                entry = _Entry(self._value, self._before, self._before)
            else:
                before = self._burst.lookup(packed_key)
                entry = _Entry(ABSENT if before is None else unpack(before), before, before)
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
        packed_key = pack_key(key)
        entry = self._entries.get(packed_key)
        if (self._burst.lookup(packed_key) is None) if entry is None else entry.value is ABSENT:
            raise KeyError(key)
        self._remove(packed_key, entry)

    def _remove(self, packed_key: bytes, entry: _Entry | None) -> None:
        # Without a look at the value: one that cannot be decoded in this process can be deleted all the same.
        if entry is None:
            self._entries[packed_key] = _Entry(ABSENT, UNREAD, None)
        else:
            entry.value = ABSENT

    def clear(self) -> None:
        """Delete all keys."""
        for packed_key in self._keys():
            self._remove(packed_key, self._entries.get(packed_key))

    def __contains__(self, key: object) -> bool:
        packed_key = pack_key(key)
        entry = self._entries.get(packed_key)
        return self._burst.lookup(packed_key) is not None if entry is None else entry.value is not ABSENT

    def _keys(self) -> list[bytes]:
        entries = self._entries
        keys = [key for key in self._burst if key not in entries]
        return keys + [key for key, entry in entries.items() if entry.value is not ABSENT]

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
            if value is ABSENT:
                if entry.before is not None:
                    found[key] = None
                continue
            packed = entry.packed if type(value) in PLAIN_TYPES else pack(value, path_of(unpack_key(key)))
            if packed != entry.before:
                found[key] = packed
        return found

    def __repr__(self) -> str:
        return f"<Transaction, {len(self._entries)} keys taken>"
