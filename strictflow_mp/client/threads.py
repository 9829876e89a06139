"""Threads: where there is no GIL, each thread reads through a state of its own.

What two threads use at a time, they count references to at a time, in one cache line that goes to and fro: two threads
then read less than one. So ``flow.state`` is another object in each thread, with views, a reader and a cache of its
own; what it knows it knows of the same segment. The home state is what the client binds; the others bind themselves
anew at the next read, when home has another segment or EPOCH has moved.

Invariant: a state is bound by its own thread alone. Any thread may unbind it, which is one store.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from ..memory.segment import W_EPOCH
from .state import FlowState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from ..memory.gate import Gate
    from ..memory.segment import Segment
    from ..store import StoreReader
    from ..store.views import Snapshot
    from .host import Host

__all__ = ["HomeState", "Mine", "OwnState"]


class HomeState(FlowState):
    """The client's own, from which those of threads take what they look at."""

    def __init__(self, host: Host, cache_bytes: int) -> None:
        # What is bound, for others to bind it too: segment, gate, reader. None when nothing is.
        self.bound_to: tuple[Segment, Gate, StoreReader] | None = None
        # By id, the states of living threads. A dead thread's takes itself out.
        self._owns: dict[int, weakref.ref[OwnState]] = {}
        # Held while a state comes in, and while a scope begins: so none of the two is missed.
        self._coming = threading.RLock()
        super().__init__(host, cache_bytes)

    def bind(self, segment: Segment, gate: Gate, reader: StoreReader, epoch: int) -> None:
        super().bind(segment, gate, reader, epoch)
        self.bound_to = segment, gate, reader
        self._unbind_owns()

    def unbind(self) -> None:
        self.bound_to = None
        super().unbind()
        self._unbind_owns()

    def _unbind_owns(self) -> None:
        for own in self._each():
            own.unbind()

    def _each(self) -> Iterator[OwnState]:
        for reference in list(self._owns.values()):
            own = reference()
            if own is not None:
                yield own

    def own(self) -> OwnState:
        """A state for the calling thread."""
        own = OwnState(self)
        with self._coming:
            own.enter_scopes(self.scopes)
            key, owns = id(own), self._owns
            owns[key] = weakref.ref(own, lambda _: owns.pop(key, None))
        return own

    @property
    def scopes(self) -> dict[int, None]:
        """Of worker-side P2 tasks under way, in any thread."""
        return self._scopes

    def within(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        return _Scope(self, super().within(snapshot))

    def share_scopes(self) -> None:
        """Have all states know the scopes that there are."""
        with self._coming:
            for own in self._each():
                own.enter_scopes(self._scopes)


class _Scope:
    """A scope, of which all threads know: a context of one may go on in another."""

    def __init__(self, home: HomeState, scope: AbstractContextManager[None]) -> None:
        self._home = home
        self._scope = scope

    def __enter__(self) -> None:
        self._scope.__enter__()
        self._home.share_scopes()

    def __exit__(self, *exc_info: Any) -> None:
        self._scope.__exit__(*exc_info)
        self._home.share_scopes()


class OwnState(FlowState):
    """``flow.state`` of one thread. Others may use it too, only not as fast."""

    def __init__(self, home: HomeState) -> None:
        self._home = home
        # The reader of `home` that ours is the twin of.
        self._twin: tuple[StoreReader | None, StoreReader | None] = (None, None)
        super().__init__(home._host, home._cache_bytes)

    def enter_scopes(self, scopes: dict[int, None]) -> None:
        """Know these, and no others."""
        self._scopes = dict(scopes)

    def within(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        return self._home.within(snapshot)

    def _reader_of(self, reader: StoreReader) -> StoreReader:
        original, twin = self._twin
        if twin is None or original is not reader:
            twin = reader.twin()
            self._twin = reader, twin
        return twin

    def _reader(self) -> StoreReader:
        return self._reader_of(super()._reader())

    def _pass_gate(self) -> StoreReader:
        home = self._home.bound_to
        # EPOCH (L4) before the gate, as in `FlowState._pass_gate`.
        seen = None if home is None else home[0].words[W_EPOCH]
        reader = self._host.pass_gate()
        mine = self._reader_of(reader)
        if home is not None and seen is not None and home[2] is reader:
            _, _, _, _, _, bound_reader, epoch = self._bound
            if bound_reader is not mine or epoch != seen:
                self.bind(home[0], home[1], mine, seen)
                if self._home.bound_to is not home:
                    self.unbind()  # it may have looked for us before we were bound
        return mine


class Mine(threading.local):
    """The state of the calling thread, as the attribute `state`."""

    def __init__(self, home: HomeState) -> None:
        self.state = home.own()
