"""Mappings: shared memory that outlives its handle while somebody looks at it, and that no tracker removes.

Owns: this process's mapping of a segment, and its descriptor. Not the memory's name: that is the coordinator's.
If we die here: the kernel unmaps it. Nobody unlinks it for us, which is what the tracker would do.
Invariants: memory is unmapped only when no view on it is left, so no read of an array ever faults.

Loaded when the first segment is mapped: `multiprocessing.shared_memory` takes a quarter of the time that the import of
all the rest does.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import resource_tracker, shared_memory
from typing import TYPE_CHECKING

from ..system.descriptors import fill_standard
from ..system.forks import in_child
from ..system.machine import FREE_THREADED

if TYPE_CHECKING:
    from mmap import mmap

__all__ = ["Mapping"]


class Mapping(shared_memory.SharedMemory):
    """`SharedMemory` whose close leaves the mapping alone while somebody still looks at it.

    An array that a reader holds is a view on the mapping; it must outlive the handle.

    Attributes (the base class's):
        buf: all of the mapping, until `close`.
        size: bytes that are mapped; for an existing segment, what the system says.
    """

    @classmethod
    def of(cls, name: str, size: int = 0) -> Mapping:
        """Create (size > 0) or open a mapping that the resource tracker never hears of.

        The tracker would unlink the segment when the process that it watches dies, while others use it.
        """
        create = size > 0
        fill_standard()  # a stray print would write over the state
        if sys.version_info >= (3, 13):
            return cls(name, create=create, size=size, track=False)
        with _tracker_lock:
            register = resource_tracker.register

            def register_others(other: str, rtype: str) -> None:
                if other.lstrip("/") != name:
                    register(other, rtype)

            resource_tracker.register = register_others  # type: ignore[assignment]
            try:
                return cls(name, create=create, size=size)
            finally:
                resource_tracker.register = register

    @property
    def user(self) -> int:
        """Whose the memory is."""
        return os.fstat(getattr(self, "_fd")).st_uid  # noqa: B009  the base class does not declare it

    @property
    def memory(self) -> mmap:
        """All of the mapping, until `close`. A slice of it is a copy, no view that anybody would have to count."""
        mapped: mmap = getattr(self, "_mmap")  # noqa: B009  as above
        return mapped

    def close(self) -> None:
        if FREE_THREADED:
            # Another thread may be in the midst of a load: no lock of the interpreter's keeps us from it. So nothing is
            # unmapped here. Who drops the last reference does it, of those that `Segment` and its views have.
            self._buf = self._mmap = None
        try:
            super().close()
        except BufferError:
            descriptor: int = getattr(self, "_fd", -1)
            if descriptor >= 0:  # the mapping has one of its own, for as long as it lives
                os.close(descriptor)
                self._fd = -1

    def unlink(self) -> None:
        """Nothing: the base class unlinks when it cannot map, even what it has only opened."""


_tracker_lock = threading.RLock()
"""Held while the tracker's `register` is ours: two threads that put it back in the wrong order would leave it so."""


def _renew_lock() -> None:
    global _tracker_lock
    _tracker_lock = threading.RLock()


in_child(_renew_lock)
