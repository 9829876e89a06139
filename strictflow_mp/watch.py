"""Watching: iterate over changes of the state as they are committed.

A watch looks at the state itself, and asks the coordinator to be told when there is something to look at. The question
is sent again to the next coordinator like any other frame without an answer, so no change is lost to a restart.

When the flow has ended, so does a watch in the process that owned it, and in those that descend from that. Others have
a life of their own (workers of a server, beside `strictflow-mp serve`): there a watch goes on when somebody starts the
flow again. What it saw last may be of another state then, so all that it watches is told anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from .client import Client
from .core import logger
from .errors import CoordinatorLost, FlowNotRunning, StrictFlowError
from .future import TaskFuture
from .state import decode
from .store import Route, StoreReader, Version
from .values import pack_key, unpack_key

if TYPE_CHECKING:
    from .attachment import Attachment

__all__ = ["Change", "Watch"]

AGAIN = 0.1
"""Seconds between looks whether a flow that has ended was started again."""
UNKNOWN = -1
"""In place of a version that wrote a key: in another state. (No version has that number.)"""


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


def _version_of(change: Change) -> int:
    return change.version


class Watch:
    """The changes of some keys, or of all, since the watch was made: ``for`` and ``async for``.

    The latest value of a key is always yielded, intermediate ones may be merged. A watch is one iterator: two loops
    over it share its changes.

    The iteration ends when the watch is closed. In the process that owns the flow, and in its descendants, it ends
    also when the flow is stopped, and raises `CoordinatorLost` when the coordinator died for good. In other processes
    it goes on when the flow is started again under its name, however late, and yields every key that it watches.
    """

    def __init__(self, client: Client, keys: tuple[Any, ...]) -> None:
        self._client = client
        self._closed = Event()
        self._asked: TaskFuture[Any] | None = None
        self._ready: deque[Change] = deque()
        try:
            packed = [pack_key(key) for key in keys]
        except StrictFlowError as error:
            raise error.of(client.name) from None
        self._keys = tuple(packed)
        self._seen: dict[bytes, int] = {}  # the version that wrote what was seen; 0 for a key that was absent
        self._version = -1  # up to which we have looked
        self._is_waiting = False  # until the flow is started again
        self._follow(client.attach())
        self._look()
        self._ready.clear()

    def _follow(self, attachment: Attachment) -> None:
        """This process is attached: for the first time, or again, perhaps to another state."""
        self._attachment = attachment
        self._is_ours = attachment.owner is None or attachment.owner.is_ours()
        self._routes = [attachment.reader.route(key) for key in self._keys]

    # Looking

    def _look(self) -> bool:
        """Collect what has changed; whether anything has."""
        attachment = self._client.attach()
        if attachment is not self._attachment:
            if attachment.segment.name != self._attachment.segment.name:
                self._seen = {key: UNKNOWN if birth else 0 for key, birth in self._seen.items()}
                self._version = -1
            self._follow(attachment)
        if self._is_waiting:
            self._is_waiting = False
            logger.info("flow %r: %r goes on", self._client.name, self, extra={"flow": self._client.name})
        reader = attachment.reader
        found: list[Change] = []
        version = reader.pin()
        try:
            if self._keys:
                for route in self._routes:
                    self._compare(found, reader, version, route)
            else:
                self._compare_all(found, reader, version)
        finally:
            reader.unpin(version)
        self._version = version.number
        self._ready.extend(sorted(found, key=_version_of))
        return bool(self._ready)

    def _compare(self, found: list[Change], reader: StoreReader, version: Version, route: Route) -> None:
        cell = reader.find(version, route)
        birth = 0 if cell is None else cell.birth
        if self._seen.get(route.key, UNKNOWN) == birth:
            return
        self._seen[route.key] = birth
        key = unpack_key(route.key)
        if cell is None:
            found.append(Change(version.number, key, None, True))
        else:
            found.append(Change(birth, key, decode(reader, version, cell)))

    def _compare_all(self, found: list[Change], reader: StoreReader, version: Version) -> None:
        seen = self._seen
        for cell in reader.cells_since(version, self._version):
            seen[cell.key] = cell.birth
            found.append(Change(cell.birth, unpack_key(cell.key), decode(reader, version, cell)))
        if len(seen) > version.count:
            there = {cell.key for cell in reader.cells(version)}
            for key in [key for key in seen if key not in there]:
                del seen[key]
                found.append(Change(version.number, unpack_key(key), None, True))

    # Waiting

    def _ask(self) -> TaskFuture[Any]:
        future = self._asked = self._client.watch(self._version, self._keys)
        # Behind that: whoever closes the watch looks for the question afterwards.
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
                self._closed.wait(AGAIN)
            except CancelledError:
                self._closed.set()
        if self._ready:
            return self._ready.popleft()
        raise StopIteration

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
                    await asyncio.sleep(AGAIN)
            except asyncio.CancelledError:
                if not self._closed.is_set():
                    raise  # we are cancelled, not the question
        if self._ready:
            return self._ready.popleft()
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
