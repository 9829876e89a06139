"""Watching: iterate over changes of the state as they are committed.

A watch looks at the state itself, and asks the coordinator to be told when there is something to look at. The question
is sent again to the next coordinator like any other frame without an answer, so no change is lost to a restart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from .client import Client
from .errors import FlowNotRunning, StrictFlowError
from .future import TaskFuture
from .segment import Segment
from .state import decode
from .store import Route, StoreReader, Version
from .values import pack_key, unpack_key

__all__ = ["Change", "Watch"]


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

    The latest value of a key is always yielded, intermediate ones may be merged. The iteration ends when the flow is
    stopped or the watch is closed, and raises `CoordinatorLost` when the coordinator died for good. A watch is one
    iterator: two loops over it share its changes.
    """

    def __init__(self, client: Client, keys: tuple[Any, ...]) -> None:
        self._client = client
        self._is_closed = False
        self._asked: TaskFuture[Any] | None = None
        self._ready: deque[Change] = deque()
        self._segment: Segment | None = None
        try:
            packed = [pack_key(key) for key in keys]
        except StrictFlowError as error:
            raise error.of(client.name) from None
        self._keys = tuple(packed)
        self._seen: dict[bytes, int] = {}  # the version that wrote what was seen; 0 for a key that was absent
        self._look()
        self._ready.clear()

    # Looking

    def _look(self) -> bool:
        """Collect what has changed; whether anything has, or the flow is another one."""
        attachment = self._client.attach()
        if self._segment is None:
            self._segment = attachment.segment
            self._routes = [attachment.reader.route(key) for key in self._keys]
        if attachment.segment is not self._segment:
            raise FlowNotRunning("it was stopped, and started anew, while it was watched", flow=self._client.name)
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
        if self._seen.get(route.key, -1) == birth:
            return
        self._seen[route.key] = birth
        key = unpack_key(route.key)
        if cell is None:
            found.append(Change(version.number, key, None, True))
        else:
            found.append(Change(birth, key, decode(reader, version, cell)))

    def _compare_all(self, found: list[Change], reader: StoreReader, version: Version) -> None:
        seen = self._seen
        since = self._version if seen else -1
        for cell in reader.cells_since(version, since):
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
        if self._is_closed:
            future.cancel()
        return future

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        try:
            while not self._ready and not self._is_closed and not self._look():
                self._ask().result()
        except (FlowNotRunning, CancelledError):
            self._is_closed = True
        if self._ready:
            return self._ready.popleft()
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    async def __anext__(self) -> Change:
        import asyncio

        # In another thread: when the coordinator has just died, looking and asking wait for the next one.
        run = asyncio.get_running_loop().run_in_executor
        try:
            while not self._ready and not self._is_closed and not await run(None, self._look):
                await (await run(None, self._ask))
        except FlowNotRunning:
            self._is_closed = True
        except asyncio.CancelledError:
            if not self._is_closed:
                raise  # we are cancelled, not the question
        if self._ready:
            return self._ready.popleft()
        raise StopAsyncIteration

    def close(self) -> None:
        """End the iteration, also one that waits in another thread."""
        self._is_closed = True
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
