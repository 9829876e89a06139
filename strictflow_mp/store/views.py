"""Views: read-only mappings of one version: `Snapshot`, and what tasks see of the committed state.

Owns: nothing in shared memory but, through the reader, the pin of a snapshot's version and one for each array.
Order: a snapshot's version is pinned before its first value is decoded. Each array that is not copied holds the version
    once more, for as long as it lives.
If we die here: the coordinator clears the pins with the slot.
Invariants: all that a snapshot returns is of one version. Whatever is no such array is a copy, and stays valid.

The protocol: docs/protocols/commit.md.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..errors import SerializationError, StrictFlowError
from ..memory.waiting_room import wait_in_thread
from ..system.machine import FREE_THREADED
from ..values.annotations import TypedMapping
from ..values.codec import has_arrays, unpack_frozen
from ..values.keys import packed_key, unpack_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..values.annotations import Key, PlainKey
    from . import Cell, StoreReader, Version

__all__ = ["Snapshot", "View", "decode", "unreadable"]

V = TypeVar("V")

_MISSING: Any = object()


def decode(reader: StoreReader, version: Version, cell: Cell) -> Any:
    """A cell's read-only value. Arrays in it look at shared memory, and keep the version pinned while they live."""
    payload = cell.payload
    if not has_arrays(payload):
        return unpack_frozen(bytes(payload))
    if FREE_THREADED or not version.is_exact:
        # The floor pin would hold back everything; a copy holds back nothing.
        return unpack_frozen(bytes(payload))

    def hold(array: Any) -> None:
        reader.hold(version)
        weakref.finalize(array, reader.unpin, version).atexit = False

    return unpack_frozen(payload, hold)


def unreadable(error: StrictFlowError, key: Any, flow: str) -> StrictFlowError:
    """What a read raises when the key is there, and its value cannot be decoded."""
    if error.key is not None:
        return error  # it says so already
    if isinstance(error, SerializationError):
        text = (
            f"the value of key {key!r} cannot be decoded in this process: {error}; deleting the key needs not decode it"
        )
        return SerializationError(text, flow=flow, key=key)
    error.key = key
    return error.of(flow)


class View(TypedMapping):
    """A read-only mapping of one version, which nobody takes back. Subclasses say how it is had."""

    _flow: str
    """The flow's name, for errors."""
    _reader: StoreReader
    """The one that `_at` has pinned its version with; a snapshot has none before that."""

    def _at(self) -> Version:
        raise NotImplementedError

    def _find(self, key: Any) -> tuple[Version, Cell | None]:
        packed = packed_key(key, self._flow)
        version = self._at()
        return version, self._reader.find(version, self._reader.route(packed))

    def __getitem__(self, key: Any) -> Any:
        version, cell = self._find(key)
        if cell is None:
            raise KeyError(key)
        try:
            return decode(self._reader, version, cell)
        except StrictFlowError as error:
            raise unreadable(error, key, self._flow) from error.__cause__

    def __contains__(self, key: object) -> bool:
        return self._find(key)[1] is not None

    def __iter__(self) -> Iterator[Any]:
        return (unpack_key(cell.key) for cell in self.cells())

    def __len__(self) -> int:
        return self._at().count

    def cells(self) -> Iterator[Cell]:
        """The packed keys and values, for tools that need sizes rather than values."""
        version = self._at()
        return self._reader.cells(version)


class Snapshot(View):
    """The state at one version, for as long as it is open.

    A read-only mapping; keys come in no particular order. It is taken when it is entered or first looked at.
    A context manager, sync and async (which waits for the gate in another thread); ``close()`` or the garbage
    collector lets go of the version too. It belongs to the process that took it: a forked child takes its own.
    """

    def __init__(self, flow: str, enter: Callable[[], StoreReader], look: Callable[[], StoreReader | None]) -> None:
        self._flow = flow
        # Returns the reader once the gate has been passed; may wait for that.
        self._enter = enter
        # The same if nothing has to be waited for, else None.
        self._look = look
        # None until it is entered or first looked at, then one version for good; unpinned exactly once, by `close` or
        # by the finalizer, whichever comes first.
        self._pinned: Version | None = None
        self._is_closed = False
        # Decoded values that were asked for: a key has one value object in a snapshot.
        self._values: dict[Any, Any] = {}

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    def version(self) -> int:
        """The version's number."""
        return self._at().number

    def _take(self, reader: StoreReader) -> Version:
        self._reader = reader
        pinned = self._pinned = reader.pin()
        self._finalizer = weakref.finalize(self, reader.unpin, pinned)
        self._finalizer.atexit = False
        return pinned

    def _at(self) -> Version:
        if self._is_closed:
            raise StrictFlowError("the snapshot is closed; take a new one with flow.snapshot()", flow=self._flow)
        if self._pinned is None:
            return self._take(self._enter())
        if self._reader.is_foreign:
            raise StrictFlowError(
                "the snapshot belongs to the parent process; after a fork, take a new one", flow=self._flow
            )
        return self._pinned

    @overload
    def __getitem__(self, key: Key[V]) -> V: ...
    @overload
    def __getitem__(self, key: PlainKey) -> Any: ...
    def __getitem__(self, key: Any) -> Any:
        self._at()
        try:
            value = self._values.get(key, _MISSING)
        except (TypeError, ValueError):
            value = _MISSING  # unhashable: pack_key says what is wrong with it
        if value is _MISSING:
            value = self._values[key] = super().__getitem__(key)
        return value

    def close(self) -> None:
        """Let go of the version. Values that were read stay valid."""
        self._is_closed = True
        self._values.clear()
        if self._pinned is not None:
            self._finalizer()

    def __enter__(self) -> Snapshot:
        self._at()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Snapshot:
        if self._pinned is None and not self._is_closed:
            # One look: a P1 that is submitted after it need not be seen, and must not be waited for in this thread.
            reader = self._look()
            if reader is not None:
                self._take(reader)
            else:
                import asyncio  # loaded already: somebody awaits us

                await wait_in_thread(asyncio.get_running_loop(), self._at)
        self._at()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed or self._pinned is None:
            return f"<Snapshot of {self._flow!r}, {'closed' if self._is_closed else 'not taken yet'}>"
        return f"<Snapshot of {self._flow!r} at version {self._pinned.number}, {self._pinned.count} keys>"
