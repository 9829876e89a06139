"""State: the mappings that users see.

`Snapshot` is pinned at one version. `FlowState` is ``flow.state`` outside tasks: every read is gated, and costs one
compare when nothing has changed. Both hand out read-only values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from .aside import waits
from .errors import ReadOnlyState, StrictFlowError
from .gate import Gate
from .keys import TypedMapping, TypedState
from .segment import SERVING, W_EPOCH, W_HORIZON, W_STATUS, W_VERSION, Segment
from .store import ARRAYS, GONE, NEXT, STRAYED, Cell, Found, Route, StoreReader, Take, Version, shape
from .values import has_arrays, pack, pack_key, unpack_frozen, unpack_key
from .words import WEAK, WORD

if TYPE_CHECKING:
    from .keys import Key, PlainKey

__all__ = ["FlowState", "Snapshot", "View", "decode", "pack_changes", "pack_deletes", "scope"]

V = TypeVar("V")

_MISSING: Any = object()


def decode(reader: StoreReader, version: Version, cell: Cell) -> Any:
    """A cell's read-only value. Arrays in it look at shared memory, and keep the version pinned while they live."""
    payload = cell.payload
    if not has_arrays(payload):
        return unpack_frozen(bytes(payload))
    if not version.is_exact:
        # The floor pin would hold back everything; a copy holds back nothing.
        return unpack_frozen(bytes(payload))

    def hold(array: Any) -> None:
        reader.hold(version)
        weakref.finalize(array, reader.unpin, version).atexit = False

    return unpack_frozen(payload, hold)


class View(TypedMapping):
    """A read-only mapping of one pinned version. Subclasses say how the version is had."""

    _flow: str
    _reader: StoreReader

    def _at(self) -> Version:
        raise NotImplementedError

    def _find(self, key: Any) -> tuple[Version, Cell | None]:
        packed = _packed_key(key, self._flow)
        version = self._at()
        return version, self._reader.find(version, self._reader.route(packed))

    def __getitem__(self, key: Any) -> Any:
        version, cell = self._find(key)
        if cell is None:
            raise KeyError(key)
        return decode(self._reader, version, cell)

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
        self._enter = enter
        self._look = look
        self._pinned: Version | None = None
        self._is_closed = False
        self._values: dict[Any, Any] = {}

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
        except TypeError:
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
            # One look: a P1 that is submitted behind it need not be seen, and must not be waited for in this thread.
            reader = self._look()
            if reader is not None:
                self._take(reader)
            else:
                import asyncio  # loaded already: somebody awaits us

                await waits(asyncio.get_running_loop(), self._at)
        self._at()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed or self._pinned is None:
            return f"<Snapshot of {self._flow!r}, {'closed' if self._is_closed else 'not taken yet'}>"
        return f"<Snapshot of {self._flow!r} at version {self._pinned.number}, {self._pinned.count} keys>"


scope: ContextVar[dict[str, Snapshot] | None] = ContextVar("strictflow_mp.scope", default=None)
"""By flow, the snapshot that a worker-side P2 task reads: its `flow.state` is one version throughout."""


class Host(Protocol):
    """What `FlowState` needs from the client that it belongs to."""

    name: str

    def pass_gate(self) -> StoreReader:
        """Attach if need be, wait for the gate, return the reader."""

    def reader(self) -> StoreReader:
        """Attach if need be, return the reader."""

    def rebind(self, reader: StoreReader, epoch: int) -> None:
        """Have the state bound anew, if that is still our reader."""

    def write(self, changes: dict[bytes, bytes | None]) -> None:
        """Commit a ready-made P1 and wait for it."""


Entry = tuple[int, Any, int, int, Route, int, int, Take]
"""What is known of a key: the version at which it was last looked up, its value, the version that wrote that, the bytes
that it takes here, its route, and its cell: place, word of lengths, shape. Replaced whole, never changed: a slower
thread's entry is merely looked up again."""


class _Cache:
    """Decoded values, by key, bounded in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self.entries: dict[Any, Entry] = {}

    def put(self, key: Any, entry: Entry, former: Entry | None) -> None:
        """Keep a value in place of its former one; at the cost of those that are here longest."""
        size = entry[3] if former is None else entry[3] - former[3]
        if self._size + size > self._limit:
            self.entries.pop(key, None)
            if former is not None:
                self._size -= former[3]
            if entry[3] > self._limit:
                return
            size = entry[3]
            self._make_room(size)
        self.entries[key] = entry
        self._size += size

    def _make_room(self, size: int) -> None:
        while self._size + size > self._limit:
            try:
                oldest = next(iter(self.entries))
            except StopIteration:
                self._size = 0  # threads that counted at the same time have left it wrong
                return
            except RuntimeError:
                return  # another thread is at it
            dropped = self.entries.pop(oldest, None)
            if dropped is not None:
                self._size -= dropped[3]


Bound = tuple[Any, Any, Any, dict[Any, Entry], _Cache, Any, int]
"""What a read looks at: SUBMITTED and FINISHED within reach, all words, the values that are kept (as they are, and as a
cache), the reader, and the EPOCH in which it is so. Unbound: a flag that is up, and nothing."""


def _unbound(reader: StoreReader | None) -> Bound:
    cache = _Cache(0)
    return 0, 1, None, cache.entries, cache, reader, 0


OVERHEAD = 512
"""Bytes that a cached value takes beside its payload, about."""


class FlowState(TypedState):
    """``flow.state`` outside tasks: the committed state, behind the gate.

    A read waits for every P1 task that was submitted, by any process, before it began. Values are read-only.
    Assigning to a key submits a P1 task and waits until it is committed; so do ``del``, ``update`` and the
    like. To read several keys of one version, use ``flow.snapshot()``. Keys come in no particular order.
    """

    def __init__(self, host: Host, cache_bytes: int) -> None:
        self._host = host
        self._cache_bytes = cache_bytes
        self._scopes: dict[int, None] = {}  # one for each worker-side P2 under way, in any thread
        self.unbind()

    def bind(self, segment: Segment, gate: Gate, reader: StoreReader, epoch: int) -> None:
        """Look at a segment from now on, as long as EPOCH, which was loaded before, stands at *epoch*."""
        submitted, finished = gate.within_reach()
        cache = _Cache(self._cache_bytes)
        # One tuple, so that no thread looks at one flow's gate and at another's versions.
        self._bound: Bound = (submitted, finished, segment.words, cache.entries, cache, reader, epoch)

    def unbind(self) -> None:
        """Look at nothing: the next read attaches first."""
        self._bound = _unbound(None)

    def __getitem__(self, key: Any) -> Any:
        submitted, finished, words, entries, _, reader, epoch = bound = self._bound
        # The flag first: what was submitted before is finished, so its commit is in the version seen.
        if submitted == finished and not self._scopes:
            try:
                entry = entries[key]
            except (KeyError, TypeError):
                return self._read(key)
            # A flag that is out of reach is of a process that came in later than this version.
            version = words[W_VERSION]
            if entry[0] == version:
                return entry[1]
            if words[W_EPOCH] == epoch:
                since, value, birth, size, route, place, lengths, take = entry
                if WEAK:
                    return self._follow(bound, key, version, entry, lengths)
                # As `StoreReader.follow`, spelled out for what happens most: the cell is still the last, or one of the
                # same lengths is. A call, and what it returns, would take a fifth of the time.
                following = words[place + NEXT]
                if following > GONE:
                    try:
                        birth, found, beyond, payload = take(reader.buffer, (following >> 1) * WORD)
                    except STRAYED:
                        return self._follow(bound, key, version, entry, lengths)
                    if (
                        found != lengths
                        or birth > version
                        or (beyond and birth != version)
                        or payload[0] == ARRAYS
                        or words[W_HORIZON] > since
                    ):
                        return self._follow(bound, key, version, entry, found)
                    value = unpack_frozen(payload)
                    place = following >> 1
                elif following or words[W_HORIZON] > since:
                    return self._look_up(bound, key, route, entry)
                entries[key] = (version, value, birth, size, route, place, lengths, take)
                return value
        return self._read(key)

    def _read(self, key: Any) -> Any:
        """As `__getitem__`, without its short cuts."""
        scoped = scope.get()
        if scoped is not None and self._host.name in scoped:
            return scoped[self._host.name][key]
        reader = self._pass_gate()
        bound = self._bound
        if bound[5] is not reader:
            bound = _unbound(reader)  # another thread is about to bind or has unbound
        try:
            entry = bound[3].get(key)
        except TypeError:
            entry = None  # unhashable: pack_key says what is wrong with it
        route = reader.route(_packed_key(key, self._host.name)) if entry is None else entry[4]
        return self._look_up(bound, key, route, entry)

    def _pass_gate(self) -> StoreReader:
        """Pass the gate at length; look at what there is to be looked at now, if that has changed."""
        _, _, words, _, _, bound_reader, epoch = self._bound
        seen = epoch if words is None else words[W_EPOCH]
        reader = self._host.pass_gate()
        if seen != epoch and reader is bound_reader:
            # Another coordinator serves, and knows all that this process had submitted; or there are more slots.
            self._host.rebind(reader, seen)
        return reader

    def _follow(self, bound: Bound, key: Any, version: int, former: Entry, lengths: int) -> Any:
        """The value of a key, from what was known of it; the gate has been passed, then VERSION and EPOCH loaded."""
        _, _, _, entries, cache, reader, _ = bound
        found = reader.follow(version, former[5], former[0], lengths)
        if found is None:
            return self._look_up(bound, key, former[4], former)
        _, birth, payload, _, _ = found
        if payload is not None:
            return self._renew(cache, key, former[4], former, found)
        if birth:
            return self._read_arrays(reader, key, former[4])
        entries[key] = (version, *former[1:])
        return former[1]

    def _look_up(self, bound: Bound, key: Any, route: Route, former: Entry | None) -> Any:
        """The value of a key, by a walk; the gate has been passed."""
        _, _, words, _, cache, reader, epoch = bound
        known = -1 if former is None else former[2]
        found = reader.get(route, known)
        if found is None:
            raise KeyError(key)
        if words is None or words[W_EPOCH] != epoch:
            cache = _Cache(0)  # none of what is bound may seem to be of the version that we have found
        version, birth, payload, place, lengths = found
        if payload is not None:
            return self._renew(cache, key, route, former, found)
        if former is None or birth != known:
            return self._read_arrays(reader, key, route)
        cache.entries[key] = (version, former[1], birth, former[3], route, place, lengths, former[7])
        return former[1]

    def _renew(self, cache: _Cache, key: Any, route: Route, former: Entry | None, found: Found) -> Any:
        """Keep a value, in place of one that was known."""
        version, birth, payload, place, lengths = found
        assert payload is not None
        value = unpack_frozen(payload)
        size = len(payload) + OVERHEAD
        cache.put(key, (version, value, birth, size, route, place, lengths, shape(lengths)), former)
        return value

    def _read_arrays(self, reader: StoreReader, key: Any, route: Route) -> Any:
        # Not cached: the cache would keep the version pinned.
        version = reader.pin_exact() or reader.pin()
        try:
            cell = reader.find(version, route)
            if cell is None:
                raise KeyError(key)
            return decode(reader, version, cell)
        finally:
            reader.unpin(version)

    @contextmanager
    def within(self, snapshot: Snapshot) -> Iterator[None]:
        """In this context, `flow.state` is the snapshot."""
        token = scope.set({**(scope.get() or {}), self._host.name: snapshot})
        self._scopes[id(token)] = None
        try:
            yield
        finally:
            del self._scopes[id(token)]
            scope.reset(token)

    def peek(self, key: Any) -> Any:
        """The committed value without the gate; KeyError when absent."""
        reader = self._host.reader()
        route = reader.route(_packed_key(key, self._host.name))
        found = reader.get(route)
        if found is None:
            raise KeyError(key)
        return self._read_arrays(reader, key, route) if found[2] is None else unpack_frozen(found[2])

    def snapshot(self, *, gated: bool = True) -> Snapshot:
        """A view of one version, behind the gate or not."""
        enter = self._pass_gate if gated else self._host.reader
        return Snapshot(self._host.name, enter, lambda: self._reader_at_once(gated))

    def _reader_at_once(self, gated: bool) -> StoreReader | None:
        """The reader, if it can be had without waiting for anything."""
        submitted, finished, words, _, _, reader, epoch = self._bound
        if words is None or (gated and submitted != finished):
            return None
        # Behind the gate, as in `Client.pass_gate`. A version that is pinned from here on has all that was finished.
        is_served = words[W_STATUS] == SERVING and (words[W_EPOCH] == epoch or not gated)
        return reader if is_served else None

    def _snapshot(self) -> Snapshot:
        scoped = scope.get()
        if scoped is not None and self._host.name in scoped:
            return scoped[self._host.name]
        return self.snapshot()

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._snapshot()))

    def __len__(self) -> int:
        return len(self._snapshot())

    def keys(self) -> Any:
        """The keys of one version."""
        return self._all().keys()

    def values(self) -> Any:
        """The values of one version."""
        return self._all().values()

    def items(self) -> Any:
        """The items of one version."""
        return self._all().items()

    def _all(self) -> dict[Any, Any]:
        return dict(self._snapshot())

    def _write(self, changes: dict[bytes, bytes | None]) -> None:
        if self._host.name in (scope.get() or ()):
            raise ReadOnlyState(
                "the state was changed inside a P2 task; change it in a task decorated with @write",
                flow=self._host.name,
            )
        self._host.write(changes)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write(pack_changes({key: value}, self._host.name))

    def __delitem__(self, key: Any) -> None:
        self._write(pack_deletes([key], self._host.name))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Change several keys in one commit."""
        self._write(pack_changes(dict(*args, **kwargs), self._host.name))

    def clear(self) -> None:
        """Delete all keys that are there now, in one commit."""
        self._write(pack_deletes(self, self._host.name))

    def __repr__(self) -> str:
        return f"<state of flow {self._host.name!r}>"


def _packed_key(key: Any, flow: str) -> bytes:
    try:
        return pack_key(key)
    except StrictFlowError as error:
        raise error.of(flow) from None


def pack_deletes(keys: Iterable[Any], flow: str) -> dict[bytes, bytes | None]:
    """Keys to delete, packed, as a ready-made P1 takes them."""
    return {_packed_key(key, flow): None for key in keys}


def pack_changes(changes: Mapping[Any, Any], flow: str) -> dict[bytes, bytes | None]:
    """Keys and values, packed, as a ready-made P1 takes them.

    Raises:
        SerializationError: one of them cannot be stored; says where.
    """
    packed: dict[bytes, bytes | None] = {}
    for key, value in changes.items():
        try:
            packed[pack_key(key)] = pack(value, key if isinstance(key, str) else f"state[{key!r}]")
        except StrictFlowError as error:
            error.key = key
            raise error.of(flow) from None
    return packed
