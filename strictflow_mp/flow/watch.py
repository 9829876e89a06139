"""Watching: iterate over changes of the state as they are committed.

A watch looks at the state itself, and asks the coordinator to be told when there is something to look at. The question
is sent again to the next coordinator like any other frame without an answer, so no change is lost to a restart.

When the flow has ended, so does a watch in the process that owned it, and in those that descend from that. Others have
a life of their own (workers of a server, beside `strictflow-mp serve`): there a watch goes on when somebody starts the
flow again. What it saw last may be of another state then, so all that it watches is told anew.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import CancelledError
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core import logger
from ..errors import CoordinatorLost, FlowNotRunning, ProtocolError, SerializationError, StrictFlowError
from ..store.views import decode
from ..values.keys import pack_key, unpack_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from ..client.attachment import Attachment
    from ..client.client import Client
    from ..store import Cell, Route, StoreReader, Version
    from ..wire.future import TaskFuture

__all__ = ["Change", "Watch"]

NEW_START_SECONDS = 0.1
"""Seconds between looks whether a flow that has ended was started again."""
UNKNOWN_VERSION = -1
"""Stands for the version that wrote a key in another state, for it compares with none of this one. (No version has that
number.)"""


class Change(NamedTuple):
    """A key has changed.

    Attributes:
        version: the version that changed it; of a key that is gone, the version in which it was found missing.
        value: its read-only value; None when it is gone.
        is_deleted: whether it is gone.
    """

    version: int
    key: Any
    value: Any
    is_deleted: bool = False


class _Fault(NamedTuple):
    """A change whose value cannot be decoded in this process: raised in its turn, in the place of a `Change`."""

    version: int
    error: StrictFlowError
    is_deleted: bool = False


def _version_of(change: Change | _Fault) -> int:
    return change.version


class Watch:
    """The changes of some keys, or of all, since the watch was made: ``for`` and ``async for``.

    The latest value of a key is always yielded, intermediate ones may be merged. A watch is one iterator: two loops
    over it share its changes.

    A value that cannot be decoded in this process (an Enum whose module it cannot import, a time zone that it does not
    have) is raised in its turn, once: a `SerializationError` that has its `key`. The iterator goes on with the other
    changes when it is asked for the next one.

    The iteration ends when the watch is closed. In the process that owns the flow, and in its descendants, it ends
    also when the flow is stopped, and raises `CoordinatorLost` when the coordinator died for good. In other processes
    it goes on when the flow is started again under its name, however late, and yields every key that it watches.
    """

    def __init__(self, client: Client, keys: tuple[Any, ...]) -> None:
        self._client = client
        self._closed = Event()  # set for good: what is ready is still yielded, then the iteration ends
        # The last question. It may have its answer; if not, closing the watch cancels it.
        self._asked: TaskFuture[Any] | None = None
        self._ready: deque[Change | _Fault] = deque()  # found and not yielded yet, by version
        try:
            packed = [pack_key(key) for key in keys]
        except StrictFlowError as error:
            raise error.of(client.name) from None
        self._keys = tuple(packed)  # none: all keys are watched
        # By packed key, the version that wrote what was seen last; 0 for a key that was absent. Without keys: of every
        # key that is there.
        self._seen: dict[bytes, int] = {}
        # The version at which was looked last; what came later is not in `_seen`. -1 before the first look at a state.
        self._version = -1
        # The flow has ended and may be started again: a word about it is in the log, once.
        self._is_waiting = False
        self._follow(client.attach())
        self._look()
        self._ready.clear()

    def _follow(self, attachment: Attachment) -> None:
        """This process is attached: for the first time, or again, perhaps to another state."""
        self._attachment = attachment  # on which was looked last: another one may be to another state
        # Whether the watch ends with the flow: in the process that owns it and in its descendants, and everywhere when
        # nobody would start the coordinator again.
        owner = attachment.owner  # looked at once: another thread may come back to a coordinator that has another one
        self._is_ours = owner is None or owner.is_ours()
        self._routes = [attachment.reader.route(key) for key in self._keys]

    # Looking

    def _look(self) -> bool:
        """Collect what has changed; whether anything has."""
        attachment = self._client.attach()
        if attachment is not self._attachment:
            if attachment.segment.name != self._attachment.segment.name:
                self._seen = {key: UNKNOWN_VERSION if birth else 0 for key, birth in self._seen.items()}
                self._version = -1
            self._follow(attachment)
        if self._is_waiting:
            self._is_waiting = False
            logger.info("flow %r: %r goes on", self._client.name, self, extra={"flow": self._client.name})
        reader = attachment.reader
        found: dict[bytes, Change | _Fault] = {}
        version = reader.pin()
        try:
            if self._keys:
                for route in self._routes:
                    self._compare(found, reader, version, route)
            else:
                self._compare_all(found, reader, version)
        finally:
            reader.unpin(version)
        # Before they count as seen: when a signal handler raises in between they are told twice, and not never.
        self._ready.extend(sorted(found.values(), key=_version_of))
        for key, change in found.items():
            if not change.is_deleted:
                self._seen[key] = change.version
            elif self._keys:
                self._seen[key] = 0
            else:
                del self._seen[key]
        self._version = version.number
        return bool(self._ready)

    def _compare(
        self, found: dict[bytes, Change | _Fault], reader: StoreReader, version: Version, route: Route
    ) -> None:
        cell = reader.find(version, route)
        birth = 0 if cell is None else cell.birth
        if self._seen.get(route.key, UNKNOWN_VERSION) == birth:
            return
        if cell is None:
            found[route.key] = Change(version.number, unpack_key(route.key), None, True)
        else:
            found[route.key] = self._decoded(reader, version, cell)

    def _compare_all(self, found: dict[bytes, Change | _Fault], reader: StoreReader, version: Version) -> None:
        seen = self._seen
        for cell in reader.cells_since(version, self._version):
            found[cell.key] = self._decoded(reader, version, cell)
        if len(seen) + sum(key not in seen for key in found) > version.count:
            there = {cell.key for cell in reader.cells(version)}
            for key in [key for key in seen if key not in there]:
                found[key] = Change(version.number, unpack_key(key), None, True)

    def _decoded(self, reader: StoreReader, version: Version, cell: Cell) -> Change | _Fault:
        key = unpack_key(cell.key)
        try:
            return Change(cell.birth, key, decode(reader, version, cell))
        except (SerializationError, ProtocolError) as error:
            fault = SerializationError(
                f"a change of key {key!r} (version {cell.birth}) cannot be decoded in this process: {error}; the watch "
                "goes on with the others",
                flow=self._client.name,
                key=key,
            )
            fault.__cause__ = error
            return _Fault(cell.birth, fault)

    # Waiting

    def _ask(self) -> TaskFuture[Any]:
        future = self._asked = self._client.watch(self._version, self._keys)
        # After the question is known: `close` sets the event, and then looks for the question. So one of the two sees
        # the other, and the question is cancelled.
        if self._closed.is_set():
            future.cancel()
        return future

    def _part(self, error: StrictFlowError) -> None:
        """The flow has ended: end with it, or wait until it is started again."""
        if self._is_waiting:
            return
        is_lost = isinstance(error, CoordinatorLost)
        if not (is_lost or self._attachment.gate.is_stopped()):  # somebody has closed the handle
            self._closed.set()
        elif not self._is_ours:
            self._is_waiting = True
            name = self._client.name
            logger.warning("flow %r has ended; %r goes on when it is started again", name, self, extra={"flow": name})
        elif is_lost:
            raise error
        else:
            self._closed.set()

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        while not self._ready and not self._closed.is_set():
            try:
                if not self._look():
                    self._ask().result()
            except (FlowNotRunning, CoordinatorLost) as error:
                self._part(error)
                self._closed.wait(NEW_START_SECONDS)
            except CancelledError:
                self._closed.set()
        if self._ready:
            return self._next()
        raise StopIteration

    def _next(self) -> Change:
        change = self._ready.popleft()
        if type(change) is _Fault:
            raise change.error
        return change  # type: ignore[return-value]

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    async def __anext__(self) -> Change:
        import asyncio

        # In another thread: when the coordinator has just died, looking and asking wait for the next one.
        run = asyncio.get_running_loop().run_in_executor
        while not self._ready and not self._closed.is_set():
            try:
                if not await run(None, self._look):
                    await (await run(None, self._ask))
            except (FlowNotRunning, CoordinatorLost) as error:
                self._part(error)
                if not self._closed.is_set():
                    await asyncio.sleep(NEW_START_SECONDS)
            except asyncio.CancelledError:
                if not self._closed.is_set():
                    raise  # we are cancelled, not the question
        if self._ready:
            return self._next()
        raise StopAsyncIteration

    def close(self) -> None:
        """End the iteration, also one that waits in another thread."""
        self._closed.set()
        asked = self._asked
        if asked is not None and not asked.done_now():
            asked.cancel()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        keys = ", ".join(repr(unpack_key(key)) for key in self._keys) or "all keys"
        return f"<Watch of {keys} of {self._client.name!r} at version {self._version}>"
