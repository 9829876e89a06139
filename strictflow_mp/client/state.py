"""State: the mappings that users see.

`Snapshot` (`store.views`) is pinned at one version. `FlowState` is ``flow.state`` outside tasks: every read is gated,
and costs one compare when nothing has changed. Both hand out read-only values.

The protocol: docs/protocols/gate.md.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ..errors import ReadOnlyState, SerializationError, StrictFlowError
from ..memory.fences import WEAK, WORD, read_fence
from ..memory.segment import SERVING, W_EPOCH, W_HORIZON, W_STATUS, W_VERSION, Segment
from ..store import ARRAYS, GONE, NEXT, STRAYED, Found, Route, StoreReader, shape
from ..store.views import Snapshot, decode, unreadable
from ..system import forks
from ..values.annotations import TypedState
from ..values.changes import pack_change, pack_changes, pack_deletes
from ..values.codec import pack, unpack_frozen
from ..values.keys import packed_key, plain_key
from .cache import OVERHEAD_BYTES, Bound, Cache, Entry, unbound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from ..memory.gate import Gate
    from .host import Host

__all__ = ["FlowState", "scope"]

_MISSING: Any = object()
"""In place of a default that was not given: None is one."""

scope: ContextVar[dict[str, Snapshot] | None] = ContextVar("strictflow_mp.scope", default=None)
"""By flow, the snapshot that a worker-side P2 task reads: its `flow.state` is one version throughout."""


class FlowState(TypedState):
    """``flow.state`` outside tasks: the committed state, read after the gate.

    A read waits for every P1 task that was submitted, by any process, before it began. Values are read-only.
    Assigning to a key submits a P1 task and waits until it is committed; so do ``del``, ``update`` and the
    like. To read several keys of one version, use ``flow.snapshot()``. Keys come in no particular order.
    """

    def __init__(self, host: Host, cache_bytes: int) -> None:
        self._host = host
        self._cache_bytes = cache_bytes  # of each cache; there is a new one with each `bind`
        # One for each worker-side P2 under way, in any thread: while there is one, every read asks whether it is in it.
        self._scopes: dict[int, None] = {}
        # `Bound`: set by the client when it attaches (`bind`) and when it is lost or closed (`unbind`).
        self.unbind()

    def bind(self, segment: Segment, gate: Gate, reader: StoreReader, epoch: int) -> None:
        """Look at a segment from now on, as long as EPOCH, which was loaded before, stands at *epoch*."""
        submitted, finished = gate.within_reach()
        cache = Cache(self._cache_bytes)
        self._bound: Bound = (submitted, finished, reader.words, cache.entries, cache, reader, epoch)

    def unbind(self) -> None:
        """Look at nothing: the next read attaches first."""
        self._bound = unbound(None)

    def __getitem__(self, key: Any) -> Any:
        submitted, finished, words, entries, _, reader, epoch = bound = self._bound
        # The flag first: what was submitted before is finished, so its commit is in the version seen.
        if submitted == finished and not self._scopes:
            try:
                entry = entries[key]
            except (KeyError, TypeError, ValueError):  # it is not known; or no hash is to be had of it
                return self._read(key)
            # A flag out of reach is of a process that was let in when EPOCH had moved, and then a version had been
            # committed (`memory.gatekeeper.GateKeeper.widen`). So there is none at the version that we know; at a later
            # one EPOCH tells.
            version = words[W_VERSION]
            if entry[0] == version:
                return entry[1]
            if words[W_EPOCH] == epoch:
                since, value, birth, size, route, cell, lengths, take = entry
                # As `StoreReader.follow`, spelled out for what happens most: the cell is still the last, or one of the
                # same lengths is. A call, and what it returns, would take a fifth of the time.
                following = words[cell + NEXT]
                if following > GONE:
                    try:
                        birth, found, beyond, payload = take(reader.buffer, (following >> 1) * WORD)
                        if (
                            found != lengths
                            or birth > version
                            or (beyond and birth != version)
                            or payload[0] == ARRAYS
                            or words[W_HORIZON] > since
                        ):
                            return self._follow(bound, key, version, entry, found)
                        value = unpack_frozen(payload)
                    except STRAYED:
                        return self._follow(bound, key, version, entry, lengths)
                    except StrictFlowError as error:
                        raise unreadable(error, key, self._host.name) from error.__cause__
                    cell = following >> 1
                elif following or words[W_HORIZON] > since:
                    return self._look_up(bound, key, route, entry)
                entries[key] = (version, value, birth, size, route, cell, lengths, take)
                return value
        return self._read(key)

    def _get_fenced(self, key: Any) -> Any:
        """`__getitem__` where loads may overtake each other, and a fence costs more than the calls that it spares."""
        submitted, finished, words, entries, _, _, epoch = bound = self._bound
        if submitted == finished and not self._scopes:
            # Load-load: the flag (L1) before VERSION (L2). Pairs with `memory.gatekeeper.GateKeeper.finish`.
            read_fence()
            try:
                entry = entries[key]
            except (KeyError, TypeError, ValueError):
                return self._read(key)
            version = words[W_VERSION]
            if entry[0] == version:
                return entry[1]
            # Load-load: VERSION (L2, N1) before EPOCH (L3) and NEXT (N2). Pairs with the second fence of
            # `memory.gatekeeper.GateKeeper.widen`, and the last one of `store.commit.StoreWriter.commit`.
            read_fence()
            if words[W_EPOCH] == epoch:
                return self._follow(bound, key, version, entry, entry[6])
        return self._read(key)

    if WEAK:
        __getitem__ = _get_fenced

    def _read(self, key: Any) -> Any:
        """As `__getitem__`, without its short cuts."""
        scoped = self._scoped()
        if scoped is not None:
            return scoped[key]
        reader = self._pass_gate()
        bound = self._bound
        _, _, _, entries, _, bound_reader, _ = bound
        if bound_reader is not reader:  # another thread is about to bind or has unbound
            _, _, _, entries, *_ = bound = unbound(reader)
        try:
            entry = entries.get(key)
        except (TypeError, ValueError):
            entry = None  # unhashable: pack_key says what is wrong with it
        if entry is None:
            packed = packed_key(key, self._host.name)
            if type(key) is not str:
                key = plain_key(key)  # the cache keeps no key that merely equals one
            route = reader.route(packed)
        else:
            route = entry[4]
        return self._look_up(bound, key, route, entry)

    def _pass_gate(self) -> StoreReader:
        """Pass the gate at length; look at what there is to be looked at now, if that has changed."""
        _, _, words, _, _, bound_reader, epoch = self._bound
        # EPOCH (L4) before the gate: what moves it after this is found at the next read. Between it and RESTARTS stands
        # the gate's fence: who sees the one moved by a takeover sees the other.
        seen = epoch if words is None else words[W_EPOCH]
        reader = self._host.pass_gate()
        if seen != epoch and reader is bound_reader:
            # Another coordinator serves, and knows all that this process had submitted; or there are more slots.
            self._host.rebind(reader, seen)
        return reader

    def _follow(self, bound: Bound, key: Any, version: int, former: Entry, lengths: int) -> Any:
        """The value of a key, from what was known of it; the gate has been passed, then VERSION and EPOCH loaded."""
        _, _, _, entries, cache, reader, _ = bound
        since, value, _, _, route, cell, _, _ = former
        found = reader.follow(version, cell, since, lengths)
        if found is None:
            return self._look_up(bound, key, route, former)
        _, birth, payload, _, _ = found
        if payload is not None:
            return self._renew(cache, key, route, former, found)
        if birth:
            return self._read_arrays(reader, key, route)
        entries[key] = (version, *former[1:])
        return value

    def _look_up(self, bound: Bound, key: Any, route: Route, former: Entry | None) -> Any:
        """The value of a key, by a walk; the gate has been passed."""
        if not forks.mark[0]:
            # What a child reads on the way to here is true in it too: the flags of all, and the committed state. But
            # from here on there may be pins, and these are its parent's.
            return self._read(key)
        _, _, words, _, cache, reader, epoch = bound
        known = -1 if former is None else former[2]  # its birth
        found = reader.get(route, known)
        if found is None:
            raise KeyError(key)
        if words is None or words[W_EPOCH] != epoch:
            cache = Cache(0)  # none of what is bound may seem to be of the version that we have found
        version, birth, payload, cell, lengths = found
        if payload is not None:
            return self._renew(cache, key, route, former, found)
        if former is None or birth != known:
            return self._read_arrays(reader, key, route)
        _, value, _, size, _, _, _, take = former  # the same version wrote it: all this still holds
        cache.entries[key] = (version, value, birth, size, route, cell, lengths, take)
        return value

    def _renew(self, cache: Cache, key: Any, route: Route, former: Entry | None, found: Found) -> Any:
        """Keep a value, in place of one that was known."""
        version, birth, payload, cell, lengths = found
        assert payload is not None
        value = self._decode(payload, key)
        size = len(payload) + OVERHEAD_BYTES
        cache.put(key, (version, value, birth, size, route, cell, lengths, shape(lengths)), former)
        return value

    def _read_arrays(self, reader: StoreReader, key: Any, route: Route) -> Any:
        if not forks.mark[0]:
            return self._read(key)  # as in `_look_up`
        # Not cached: the cache would keep the version pinned.
        version = reader.pin_exact() or reader.pin()
        try:
            cell = reader.find(version, route)
            if cell is None:
                raise KeyError(key)
            return decode(reader, version, cell)
        except StrictFlowError as error:
            raise unreadable(error, key, self._host.name) from error.__cause__
        finally:
            reader.unpin(version)

    def _decode(self, payload: bytes, key: Any) -> Any:
        try:
            return unpack_frozen(payload)
        except StrictFlowError as error:
            raise unreadable(error, key, self._host.name) from error.__cause__

    def within(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """In this context, `flow.state` is the snapshot."""
        return self._within(snapshot)

    @contextmanager
    def _within(self, snapshot: Snapshot) -> Iterator[None]:
        token = scope.set({**(scope.get() or {}), self._host.name: snapshot})
        self._scopes[id(token)] = None
        try:
            yield
        finally:
            del self._scopes[id(token)]
            scope.reset(token)

    def _reader(self) -> StoreReader:
        """The reader, whatever the gate says."""
        return self._host.reader()

    def peek(self, key: Any) -> Any:
        """The committed value without the gate; KeyError when absent."""
        reader = self._reader()
        route = reader.route(packed_key(key, self._host.name))
        found = reader.get(route)
        if found is None:
            raise KeyError(key)
        return self._read_arrays(reader, key, route) if found[2] is None else self._decode(found[2], key)

    def snapshot(self, *, gated: bool = True) -> Snapshot:
        """A view of one version, taken after the gate or not."""
        enter = self._pass_gate if gated else self._reader
        return Snapshot(self._host.name, enter, lambda: self._reader_at_once(gated))

    def _reader_at_once(self, gated: bool) -> StoreReader | None:
        """The reader, if it can be had without waiting for anything."""
        if not forks.mark[0]:
            return None
        submitted, finished, words, _, _, reader, epoch = self._bound
        if words is None or (gated and submitted != finished):
            return None
        if WEAK:
            read_fence()  # as the first one of `_get_fenced`
        # After the gate, as in `Client.pass_gate`. A version that is pinned from here on has all that was finished.
        is_served = words[W_STATUS] == SERVING and (words[W_EPOCH] == epoch or not gated)
        return reader if is_served else None

    def _snapshot(self) -> Snapshot:
        scoped = self._scoped()
        return self.snapshot() if scoped is None else scoped

    def _scoped(self) -> Snapshot | None:
        """The snapshot of the worker-side P2 that this is in. What it started has its context, but outlives it."""
        scoped = scope.get()
        snapshot = None if scoped is None else scoped.get(self._host.name)
        return None if snapshot is None or snapshot.is_closed else snapshot

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        except SerializationError:  # it is there, and cannot be decoded here; or it cannot be a key
            return key in self._snapshot()
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._snapshot()))

    def __len__(self) -> int:
        return len(self._snapshot())

    def keys(self) -> Any:
        """The keys of one version."""
        return dict(self._snapshot()).keys()

    def values(self) -> Any:
        """The values of one version."""
        return dict(self._snapshot()).values()

    def items(self) -> Any:
        """The items of one version."""
        return dict(self._snapshot()).items()

    def _check_write(self) -> None:
        if self._scoped() is not None:
            raise ReadOnlyState(
                "the state was changed inside a P2 task; change it in a task decorated with @write",
                flow=self._host.name,
            )

    def _write(self, changes: dict[bytes, bytes | None]) -> None:
        self._check_write()
        self._host.write(changes)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write(pack_change(key, value, self._host.name))

    def __delitem__(self, key: Any) -> None:
        self._write(pack_deletes([key], self._host.name))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Change several keys in one commit."""
        self._write(pack_changes(dict(*args, **kwargs), self._host.name))

    def clear(self) -> None:
        """Delete all keys, in one commit: those that are there when it is this P1's turn."""
        self._check_write()
        self._host.operate("clear", {})

    # One P1 each. The mixins of `MutableMapping` would read, and then write by what another may have changed meanwhile.

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value of a key, read-only. If it is absent it is *default* from now on, for all: one P1."""
        try:
            return self[key]  # by far most often it is there, and no P1 is needed to see that
        except KeyError:
            self._check_write()
        value = self._host.operate("setdefault", pack_change(key, default, self._host.name))
        return unpack_frozen(pack(value))

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        """Delete a key and return its value: one P1, so nobody else has it.

        Raises:
            KeyError: it is absent, and no default was given.
            SerializationError: it cannot be decoded in this process, and stays. ``del`` needs not decode it.
        """
        self._check_write()
        try:
            self[key]  # a value that nobody could be given is not taken out
            return self._host.operate("pop", pack_deletes([key], self._host.name))
        except KeyError:
            if default is _MISSING:
                raise KeyError(key) from None
            return default

    def popitem(self) -> tuple[Any, Any]:
        """Delete any key and return it with its value: one P1, so nobody else has it.

        Raises:
            KeyError: there is none.
        """
        self._check_write()
        while True:
            with self.snapshot() as snapshot:
                for key in snapshot:
                    value = self.pop(key, _MISSING)
                    if value is not _MISSING:  # else another was faster
                        return key, value
                if not snapshot:
                    raise KeyError("popitem(): the state is empty")

    def __repr__(self) -> str:
        return f"<state of flow {self._host.name!r}>"
