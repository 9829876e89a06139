"""StrictFlow: the handle that users hold."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..client.client import FIRST_USE_SECONDS, Client
from ..client.registry import client_of
from ..errors import StrictFlowError
from ..system import forks
from ..system.machine import FREE_THREADED, check_machine
from ..system.place import Place
from ..values.changes import pack_change, pack_changes, pack_deletes
from ..wire import inside
from ..wire.frames import STATS
from . import late as late  # so that it takes care of forks
from .adopting import start_or_adopt
from .options import CACHE_BYTES, CAPACITY_BYTES, MAX_PENDING_TASKS, MAX_WORKERS, checked
from .reloading import reload
from .stopping import stop_anybodys
from .watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..client.state import FlowState
    from ..store.views import Snapshot
    from ..trace import Trace
    from ..values.annotations import Key, PlainKey, TypedState
    from ..wire.future import TaskFuture
    from ..wire.stats import FlowStats
    from .owner import Owner
    from .workers import Restart, WorkerGroup

__all__ = ["StrictFlow"]

_MISSING: Any = object()
"""In place of a default that was not given: None is one."""

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
    """In a P1 task a transaction, whose values may be changed in place; elsewhere the last committed state, read after
    the gate, whose values are read-only. Assigning to a key outside tasks is a P1 that is waited for."""

    def __init__(
        self,
        name: str | None = None,
        *,
        state: Mapping[Any, Any] | None = None,
        capacity: int = CAPACITY_BYTES,
        max_workers: int = MAX_WORKERS,
        max_pending: int = MAX_PENDING_TASKS,
        task_timeout: float | None = None,
        restart: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        check_machine()
        self._is_named = name is not None  # a handle without a name may become one of another flow (`adopt`)
        self.name = name if name is not None else f"unnamed-{os.getpid()}-{os.urandom(4).hex()}"
        # The first state and the options count for the handle that starts the coordinator; copies have none of them.
        self._first_state = state
        self._options = checked(name, capacity, max_workers, max_pending, task_timeout, restart, cache_bytes)
        self._cache_bytes = cache_bytes
        self._locate()

    def _locate(self) -> None:
        """Find out whether this is the coordinator's process: there the state, tasks and statistics are the loop's."""
        # Set when this handle has started the coordinator, until it stops it. In a forked child it is the parent's:
        # its `pid` says so.
        self._owner: Owner | None = None
        self._starting = threading.RLock()  # held while `_owner` is set or taken away
        # The loop, when its tasks hold this handle; None in every other process, and there alone is a `_client`.
        self._loop = inside.inside(self.name)
        self._states: Any  # has as its `state` what the calling thread is to use
        if self._loop is not None:
            self._states = self._loop
        else:
            self._client: Client = client_of(self.name, self._cache_bytes)
            self._states = self._client.states
        if not FREE_THREADED:
            self.state = self._states.state
        inside.remember(self)

    def move_out(self) -> None:
        """In a child that a task has forked: be a handle like those in any other process."""
        loop, self._loop = self._loop, None
        if loop is not None:
            self._client = client_of(self.name, self._cache_bytes)
            loop.outside = self._client.state  # `state` is the loop's still, and stands for that

    def after_fork(self) -> None:
        """In a forked child: a thread that is not here may have held the lock."""
        self._starting = threading.RLock()

    @property
    def _inside(self) -> inside.Loop | None:
        """`_loop`, when it is known whether this is a forked child."""
        if not forks.mark[0]:
            forks.catch_up()
        return self._loop

    def adopt(self, loop: inside.Loop) -> None:
        """Become a handle of *loop*'s flow, if this one has no name (the coordinator calls it)."""
        if not self._is_named and self.name != loop.name:
            self.name = loop.name
            self._locate()

    @classmethod
    def attach(cls, name: str, timeout: float = FIRST_USE_SECONDS) -> StrictFlow:
        """A handle on a flow that is running.

        Args:
            timeout: seconds to wait for it to appear (5). While a P1 task runs in it nobody is let in: that is waited
                for, too, for a minute at most.

        Raises:
            FlowNotRunning: it did not appear, or let nobody in.
        """
        flow = cls(name)
        if flow._inside is None:
            flow._client.leave_stopped()
            flow._client.attach(timeout)
        return flow

    # Life

    def start_loop(self, recover: bool = True, *, linger: float = 0.0) -> None:
        """Start the coordinator process; return when it serves. Nothing happens if this handle has started it.

        A coordinator whose owner has died while processes were attached is adopted: this process starts the next one in
        its place, on the same state.

        Args:
            recover: what to do when the last coordinator of that name died and nobody restarted it: go on from
                the state that it had committed, whose capacity and `max_workers` stay as they were, or discard
                that and begin with the first state.
            linger: seconds that the coordinator waits to be adopted when this process has died and nobody is attached.

        Raises:
            FlowExists: a coordinator lives under that name already, and so does its owner (or *recover* is false).
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
            options = {**self._options, "state": first, "recover": recover, "is_restart": False, "linger": linger}
            self._owner = start_or_adopt(self.name, options, self._client)
            self._client.keep(self._owner.place)

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
            stop_anybodys(self._client, drain=drain, timeout=timeout)
            self._client.close()

    def reload(self) -> float:
        """Have the next coordinator go on: a fresh interpreter, with the code of today, on the same state.

        Any process may ask. The coordinator ends between two tasks, and its owner starts the next one; no task is lost,
        those that are queued run there, async reads that are under way begin anew, and reads that need not wait go on
        all the time. Returns when the next one serves.

        Returns:
            The seconds in which nobody ran tasks.

        Raises:
            StrictFlowError: its owner has died, and nobody would start the next one; or this is a task.
            FlowNotRunning: no coordinator serves the flow, or it is being stopped.
            CoordinatorLost: the owner did not start the next one.
        """
        if self._inside is not None:
            raise StrictFlowError("a task cannot reload its own flow; let another process do it", flow=self.name)
        return reload(self._client)

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
        owner = self._owner
        if self._inside is not None or (owner is not None and owner.is_alive):
            return True
        return self._client.is_served(owner.place if owner is not None else self._client.place)

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
            snapshot: Snapshot = self._inside.snapshot()
            return snapshot
        state: FlowState = self._client.states.state
        return state.snapshot(gated=gated)

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
            return self.state[key] if self._inside is not None else self._client.states.state.peek(key)
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
        return self._put(pack_change(key, value, self.name))

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
        if not forks.mark[0]:  # as `_inside`, without the call
            forks.catch_up()
        if self._loop is not None:
            return self._loop.call(task, calls)
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

        try:
            return WorkerGroup(target, args, processes, restart)
        except StrictFlowError as refusal:
            raise refusal.of(self.name) from refusal.__cause__

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
        from ..trace import Trace  # only those who record need it

        return Trace(self._client, path)

    def stats(self) -> FlowStats:
        """The state of the flow, at this moment."""
        from ..wire.stats import FlowStats  # dataclasses take 8 ms to import

        fields = self._inside.stats() if self._inside is not None else self._client.ask(STATS)
        return FlowStats.from_dict(fields)

    def __reduce__(self) -> Any:
        options: dict[str, Any] = {"cache_bytes": self._cache_bytes}
        # Where it is used already: the process that unpacks it may have another environment, or working directory.
        if self._inside is None and (directory := self._client.known_directory) is not None:
            return _restore, (self.name, self._is_named, options, directory)
        return _restore, (self.name, self._is_named, options)

    def __repr__(self) -> str:
        return f"<StrictFlow {self.name!r}{' (inside SF-LOOP)' if self._inside else ''}>"


if FREE_THREADED:  # another one in each thread (`client.threads`)
    StrictFlow.state = property(lambda flow: flow._states.state)  # type: ignore[assignment]


def _restore(name: str, is_named: bool, options: dict[str, Any], directory: str | None = None) -> StrictFlow:
    flow = StrictFlow(name, **options)
    flow._is_named = is_named
    if flow._inside is None and directory is not None and flow._client.known_directory is None:
        from pathlib import Path

        flow._client.keep(Place(Path(directory)))
    return flow
