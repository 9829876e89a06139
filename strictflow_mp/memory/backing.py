"""Backing: has the system give a segment the memory behind its addresses, or says why it does not.

Owns: the coordinator's descriptor of the segment, opened when it first claims memory. Not its name.
Written by: SF-LOOP's thread.
Order: memory is claimed before anything is stored there, and before CLAIMED says so (`segment`).
If we die here: what was claimed stays so, and the next coordinator claims it once more, which does nothing.
Invariants: what has been claimed can be touched: never SIGBUS, for it is allocated, and never the kernel's killer for
    want of room in the container, as far as its limits tell ahead (`system.cgroup`).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ..errors import StateFull
from ..system import posix

if TYPE_CHECKING:
    from ..system.cgroup import Headroom

__all__ = ["Backing"]


class Backing:
    """The memory of a segment, as the system has given it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._fd = -1  # opened by the first claim; -1 in a process that only reads
        self._headroom: Headroom | None = None  # as the descriptor

    def claim(self, start: int, end: int, flow: str, keys: int = 0) -> None:
        """Have the system give the bytes from *start* to *end*.

        Args:
            keys: how many the state has: the next coordinator needs memory of its own for each.

        Raises:
            StateFull: there is no room for them.
        """
        size = end - start
        if self._headroom is None:
            from ..system.cgroup import Headroom  # the coordinator alone needs it

            self._headroom = Headroom()
        limit = self._headroom.refuses(size, keys)
        if limit is not None:
            raise StateFull(
                f"the container has no room for {size:,} bytes more: of its {limit.bytes:,} bytes of memory "
                f"({limit.file}) {max(0, limit.left):,} are free, and the processes need some of them; delete keys, or "
                "raise the limit",
                flow=flow,
            )
        if self._fd < 0:
            self._fd = posix.SharedMemory("/" + self._name).fd
        try:
            os.posix_fallocate(self._fd, start, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            raise StateFull(
                f"/dev/shm has no room for {size:,} bytes more ({os.strerror(error.errno)}); "
                "delete keys, or enlarge /dev/shm (Docker: --shm-size)",
                flow=flow,
            ) from error

    def is_named(self) -> bool:
        """Whether the segment's name still leads to this memory: whoever attaches opens it by that.

        False only when that is seen. That we cannot look proves nothing: no descriptor is left, or we are another user
        by now.
        """
        try:
            other = posix.SharedMemory("/" + self._name)
        except posix.ExistentialError:
            return False
        except (posix.Error, OSError):
            return True
        try:
            return self._fd < 0 or os.path.sameopenfile(other.fd, self._fd)
        finally:
            other.close_fd()

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __repr__(self) -> str:
        return f"<Backing of {self._name}>"
