"""StrictFlow: the handle that users hold."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, overload

from . import place
from .client import ATTACH, Client
from .clients import client_of
from .errors import StrictFlowError
from .future import TaskFuture
from .owner import Owner, ask_to_stop
from .rendezvous import Place
from .state import Snapshot, pack_changes, pack_deletes
from .watch import Watch
from .wire import STATS

if TYPE_CHECKING:
    from .keys import Key, PlainKey, TypedState
    from .stats import FlowStats
    from .trace import Trace
    from .workers import Restart, WorkerGroup

__all__ = ["StrictFlow"]

CAPACITY = 1 << 30
MAX_WORKERS = 64
MAX_PENDING = 4096
CACHE_BYTES = 1 << 26
GATE_TIMEOUT = 60.0

_MISSING: Any = object()

V = TypeVar("V")
D = TypeVar("D")


class StrictFlow:
    """A handle on a flow: one live state that many processes read and few change.

    It starts nothing and owns nothing until it is used. It can be pickled, and passed to a process, a pool or
    an executor under any start method; a named one finds its flow by name.

    Args:
        name: the flow's name on this machine, for this user. Without one the flow can only be reached through
            this handle and its copies.
        state: the first state, committed as version 1 by `start_loop`.
        capacity: bytes that the state may take (1 GiB). Claimed as they are needed.
        max_workers: processes that may be attached at a time (64).
        max_pending: tasks that a process may have outstanding (4,096); then its next submit waits.
        task_timeout: seconds that a task may run, unless it says otherwise. None: for ever.
        restart: whether this process starts the coordinator again when it has died, on the same state.
        cache_bytes: bytes of decoded values that each process keeps (64 MiB).
    """

    state: TypedState
    """In a P1 task a transaction, whose values may be changed in place; elsewhere the last committed state, behind the
    gate, whose values are read-only. Assigning to a key outside tasks is a P1 that is waited for."""

    def __init__(
        self,
        name: str | None = None,
        *,
        state: Mapping[Any, Any] | None = None,
        capacity: int = CAPACITY,
        max_workers: int = MAX_WORKERS,
        max_pending: int = MAX_PENDING,
        task_timeout: float | None = None,
        restart: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if name is not None and (type(name) is not str or not name or "\0" in name):
            raise ValueError(f"a flow's name must be a non-empty str, not {name!r}")
        for label, number, least in (
            ("capacity", capacity, 1),
            ("max_workers", max_workers, 1),
            ("max_pending", max_pending, 1),
            ("cache_bytes", cache_bytes, 0),
        ):
            if number < least:
                raise ValueError(f"{label} must be at least {least}, not {number}")
        if task_timeout is not None and task_timeout <= 0:
            raise ValueError(f"task_timeout must be more than 0 seconds, not {task_timeout}")
        self._is_named = name is not None
        self.name = name if name is not None else f"unnamed-{os.getpid()}-{os.urandom(4).hex()}"
        self._first_state = state
        self._options = {
            "capacity": capacity,
            "max_workers": max_workers,
            "max_pending": max_pending,
            "task_timeout": task_timeout,
            "gate_timeout": max(GATE_TIMEOUT, 2 * (task_timeout or 0)),
            "restart": restart,
        }
        self._cache_bytes = cache_bytes
        self._find_place()

    def _find_place(self) -> None:
        self._owner: Owner | None = None
        self._starting = threading.Lock()
        self._inside = place.inside(self.name)
        if self._inside is not None:
            self.state = self._inside.state
        else:
            self._client: Client = client_of(self.name, self._cache_bytes)
            self.state = self._client.state

    def adopt(self, loop: place.Inside) -> None:
        """Become a handle of *loop*'s flow, if this one has no name (the coordinator calls it)."""
        if not self._is_named and self.name != loop.name:
            self.name = loop.name
            self._find_place()

    @classmethod
    def attach(cls, name: str, timeout: float = ATTACH) -> StrictFlow:
        """A handle on a flow that is running.

        Args:
            timeout: seconds to wait for it to appear (5). While a P1 task runs in it nobody is let in: that is waited
                for, too, for a minute at most.

        Raises:
            FlowNotRunning: it did not appear, or let nobody in.
        """
        flow = cls(name)
        if flow._inside is None:
            flow._client.attach(timeout)
        return flow

    # Life

    def start_loop(self, recover: bool = True) -> None:
        """Start the coordinator process; return when it serves. Nothing happens if this handle has started it.

        Args:
            recover: what to do when the last coordinator of that name died and nobody restarted it: go on from
                the state that it had committed, whose capacity and `max_workers` stay as they were, or discard
                that and begin with the first state.

        Raises:
            FlowExists: a coordinator lives under that name already.
            SerializationError: the first state holds what cannot be stored.
            StateFull: shared memory has no room for it.
        """
        if self._inside is not None:
            return
        with self._starting:
            if self._owner is not None and self._owner.is_alive:
                return
            self._client.is_stopped = False
            first = pack_changes(self._first_state or {}, self.name)
            self._owner = Owner.start(
                self.name, {**self._options, "state": first, "recover": recover, "is_restart": False}
            )

    def stop_loop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop the flow and remove every named object. Nothing happens if it does not run.

        Args:
            drain: whether queued tasks are finished first; if not, they fail with `FlowNotRunning`.
            timeout: seconds that they may take.

        Raises:
            TaskTimeout: they took longer, were killed and rolled back.
        """
        if self._inside is not None:
            raise StrictFlowError("a task cannot stop its own flow; let the owner do it", flow=self.name)
        with self._starting:
            owner, self._owner = self._owner, None
        if owner is not None and owner.pid == os.getpid():
            owner.stop(self._client, drain=drain, timeout=timeout)
        elif owner is None:
            ask_to_stop(self._client, drain=drain, timeout=timeout)
            self._client.close()

    def run_loop(self) -> None:
        """Start the flow, then block until it is stopped, by `stop_loop` in another thread or process."""
        self.start_loop()
        owner = self._owner
        while owner is not None and not owner.wait(0.1) and self._owner is owner:
            pass

    def __enter__(self) -> StrictFlow:
        self.start_loop()
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        self.stop_loop(drain=kind is None)

    @property
    def is_running(self) -> bool:
        """Whether a coordinator serves this flow, or this process is about to start the next one."""
        if self._inside is not None or Place.of(self.name).is_inhabited():
            return True
        owner = self._owner
        return owner is not None and owner.is_alive

    def close(self) -> None:
        """Detach this process. The flow goes on; a later use attaches again."""
        if self._inside is None:
            self._client.close()

    # State

    def snapshot(self, gated: bool = True) -> Snapshot:
        """A read-only mapping of one version, with ``.version``; a context manager, sync and async.

        Args:
            gated: whether to wait for the P1 tasks that were submitted before.
        """
        if self._inside is not None:
            inside: Snapshot = self._inside.snapshot()
            return inside
        return self._client.state.snapshot(gated=gated)

    def reading(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """A context in which `flow.state` is the snapshot (a worker-side P2 runs in it)."""
        return nullcontext() if self._inside is not None else self._client.state.within(snapshot)

    @overload
    def peek(self, key: Key[V]) -> V: ...
    @overload
    def peek(self, key: Key[V], default: V) -> V: ...
    @overload
    def peek(self, key: Key[V], default: D) -> V | D: ...
    @overload
    def peek(self, key: PlainKey, default: Any = ...) -> Any: ...
    def peek(self, key: Any, default: Any = _MISSING) -> Any:
        """The last committed value of a key; never waits for a P1.

        Raises:
            KeyError: it is absent, and no default was given.
        """
        try:
            return self.state[key] if self._inside is not None else self._client.state.peek(key)
        except KeyError:
            if default is _MISSING:
                raise
            return default

    def watch(self, *keys: Key[Any] | PlainKey) -> Watch:
        """Iterate over the changes of these keys, or of all, from now on: ``for`` and ``async for``.

        Yields `Change(version, key, value)`. Nothing is polled, no wake-up is lost, and the latest value of a key is
        always yielded, however late one looks and whether or not the coordinator was restarted meanwhile. The
        iteration ends when the watch is closed; in the process that owns the flow, and in its descendants, also when
        the flow is stopped. In other processes it goes on when the flow is started again, and yields every watched key.
        Without keys, a watch keeps the keys of the state in memory, to find out which are deleted.

        Raises:
            FlowNotRunning: no coordinator serves the flow.
            CoordinatorLost: it died, and no other came (from the iteration, where that ends with the flow).
        """
        if self._inside is not None:
            raise StrictFlowError("a task cannot watch the state: it would wait inside SF-LOOP", flow=self.name)
        return Watch(self._client, keys)

    @overload
    def put(self, key: Key[V], value: V) -> TaskFuture[None]: ...
    @overload
    def put(self, key: PlainKey, value: Any) -> TaskFuture[None]: ...
    def put(self, key: Any, value: Any) -> TaskFuture[None]:
        """Submit a P1 that sets a key."""
        return self._put(pack_changes({key: value}, self.name))

    def update(self, mapping: Mapping[Any, Any]) -> TaskFuture[None]:
        """Submit a P1 that sets several keys."""
        return self._put(pack_changes(mapping, self.name))

    def delete(self, key: Key[Any] | PlainKey) -> TaskFuture[None]:
        """Submit a P1 that deletes a key; its future raises KeyError when the key is absent."""
        return self._put(pack_deletes([key], self.name))

    def _put(self, changes: dict[bytes, bytes | None]) -> TaskFuture[None]:
        if self._inside is not None:
            future: TaskFuture[None] = self._inside.put(changes)
            return future
        return self._client.put(changes)

    # Tasks and workers

    def submit(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[TaskFuture[Any]]:
        """Submit calls of a task of this flow (what calling a task does)."""
        if self._inside is not None:
            return self._inside.call(task, calls)
        return self._client.call(task, calls)

    def spawn(
        self, target: Callable[..., Any], *args: Any, processes: int = 1, restart: Restart = "never"
    ) -> WorkerGroup:
        """Start worker processes that call ``target(*args)``.

        Each is a fresh interpreter. The target may be any callable; functions of ``__main__`` travel by value.
        A target that takes one positional argument more than *args* has is given its number first, 1 and up.

        Args:
            processes: how many.
            restart: "never"; "on-failure", when the exit code is not 0; or "always".
        """
        from .workers import WorkerGroup  # only those who spawn need it

        return WorkerGroup(target, args, processes, restart)

    def trace(self, path: str | os.PathLike[str]) -> Trace:
        """Record the run into a file, for ui.perfetto.dev or chrome://tracing, until what is returned is closed.

        One track for each process: its submits, what it waited for at the gate and for how long, its answers; SF-LOOP's
        with bursts, P1 and P2 tasks and commits. Other processes need not do anything. The recording goes on when the
        coordinator is started again; the burst that was running when it died is missing. The file is written by
        ``close()``, or at the end of a ``with``. The format is Chrome's Trace Event Format.

        Raises:
            OSError: nothing can be written there.
            FlowNotRunning: no coordinator serves the flow.
            StrictFlowError: its run is being recorded already, or this is a task.
        """
        if self._inside is not None:
            raise StrictFlowError("a task cannot record its own flow; let another process do it", flow=self.name)
        from .trace import Trace  # only those who record need it

        return Trace(self._client, path)

    def stats(self) -> FlowStats:
        """The state of the flow, at this moment."""
        from .stats import FlowStats  # dataclasses take 8 ms to import

        fields = self._inside.stats() if self._inside is not None else self._client.ask(STATS)
        return FlowStats.from_dict(fields)

    def __reduce__(self) -> Any:
        options = {"cache_bytes": self._cache_bytes}
        return _restore, (self.name, self._is_named, options)

    def __repr__(self) -> str:
        return f"<StrictFlow {self.name!r}{' (inside SF-LOOP)' if self._inside else ''}>"


def _restore(name: str, is_named: bool, options: dict[str, Any]) -> StrictFlow:
    flow = StrictFlow(name, **options)
    flow._is_named = is_named
    return flow
