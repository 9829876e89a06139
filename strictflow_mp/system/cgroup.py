"""Cgroups: how much memory the limits of this process's container leave.

The kernel counts shared memory in the cgroup of who touched it first, and kills somebody when the limit is reached. It
can be asked before: both versions of cgroups say the limit and the use of each level, from that of the process up to
the root (cgroups(7); the kernel's ``admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``). What files are cached
in memory counts as use there, and is given up first: so here it counts as free, and so does free swap.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["Headroom", "Limit", "tightest"]

ROOT = Path("/sys/fs/cgroup")
"""Where cgroups are mounted, on every system that systemd or a container's runtime has set up."""
NO_LIMIT_BYTES = 1 << 60
"""Version 1 has no word for it: any number beyond this."""

RESERVE_BYTES = 8 << 20
"""What is left to the processes themselves."""
SURVEY_BYTES = 160
"""And for each key: the next coordinator looks at all blocks of the tree before it serves, and needs 135 for each."""
SHARE = 4
"""One part in so many of what is free is claimed before anybody looks again: a look costs some 100 us."""
UNLIMITED_BYTES = 256 << 20
"""What is claimed before the next look, where there is no limit: one may be set at any time."""
LOOK_SECONDS = 1.0
"""When the last look is too old: others in the container need memory too."""


class Limit(NamedTuple):
    """A limit, and what it leaves."""

    file: Path
    """What says it."""
    bytes: int
    left: int
    """Bytes; may be negative."""


class _Version(NamedTuple):
    """What the files are called."""

    limit: str
    use: str
    total: str
    """Ahead of the names in ``memory.stat`` that count the levels below too."""


_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = _Version("memory.max", "memory.current", "")


def tightest(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> Limit | None:
    """The limit that leaves this process the least; None where there is none, or none can be seen."""
    limits = [limit for version, level in _levels(root, membership) if (limit := _look(version, level)) is not None]
    return min(limits, key=lambda limit: limit.left, default=None)


def _levels(root: Path, membership: Path) -> list[tuple[_Version, Path]]:
    found = []
    try:
        lines = membership.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, top = (_V1, root / "memory") if controllers else (_V2, root)
        level = top / path.lstrip("/")
        if not level.is_dir():
            level = top  # in a container whose own cgroup is mounted as the root
        while True:
            found.append((version, level))
            if level == top:
                break
            level = level.parent
    return found


def _look(version: _Version, level: Path) -> Limit | None:
    file = level / version.limit
    try:
        limit = file.read_text().strip()
        if limit == "max" or int(limit) >= NO_LIMIT_BYTES:
            return None
        use = int((level / version.use).read_text())
        cached = _cached(version, level)
        return Limit(file, int(limit), int(limit) - use + cached + _free_swap(level))
    except (OSError, ValueError):
        return None  # the root has no such files


def _cached(version: _Version, level: Path) -> int:
    names = {f"{version.total}active_file", f"{version.total}inactive_file"}
    pairs = (line.split() for line in (level / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in pairs if name in names)


def _free_swap(level: Path) -> int:
    pairs = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = next((int(rest[0]) << 10 for name, *rest in pairs if name == "SwapFree:"), 0)
    try:
        limit = (level / "memory.swap.max").read_text().strip()
        if limit == "max":
            return free
        return min(free, max(0, int(limit) - int((level / "memory.swap.current").read_text())))
    except (OSError, ValueError):
        return free


class Headroom:
    """What the limits leave, looked at as often as need be."""

    def __init__(self) -> None:
        # Of the last look: bytes that may be claimed before the next one, and when that is due at the latest, on
        # `time.monotonic`'s clock.
        self._allowed = 0
        self._next_look = 0.0

    def refuses(self, size: int, keys: int = 0) -> Limit | None:
        """The limit that stands against *size* bytes more; None, and then they count as claimed.

        Args:
            keys: how many the state has.
        """
        now = time.monotonic()
        reserve = RESERVE_BYTES + keys * SURVEY_BYTES
        if size > self._allowed or now >= self._next_look:
            limit = tightest()
            if limit is None:
                self._allowed, self._next_look = max(size, UNLIMITED_BYTES), now + LOOK_SECONDS
            elif size > limit.left - reserve:
                return limit
            else:
                self._allowed = max(size, (limit.left - reserve) // SHARE)
                self._next_look = now + LOOK_SECONDS
        self._allowed -= size
        return None

    def __repr__(self) -> str:
        return f"<Headroom of {self._allowed:,} bytes before the next look>"
