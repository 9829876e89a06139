"""Identity: which process is which, and whether it is proved dead.

A process is a pid together with its start time, in a boot of the machine and a pid namespace of that: a pid alone
comes back, and in another container it is another's. What cannot be proved dead counts as alive, so nothing is taken
from a process that may still use it. A process that replaces its program by another (`os.execv`) is the same one, but
of what it had in memory, or had open, nothing is left: that is its *beginning*.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["PF_EXITING", "Identity", "beginning_of", "open_pidfd", "runs_another", "start_time"]

PROC = "/proc"
PF_EXITING = 0x4
"""The kernel's flag for a process that is ending: it runs nothing more of its program, and lets go of all it has."""


def _read(pid: int, name: str) -> bytes:
    """What the kernel says of a process in that file, and of this one too, as it says it to everybody else.

    Emulators (qemu-user) make up what a process sees of itself under its own name, with another start time than others
    see; under the name of its first thread the kernel answers.
    """
    if pid == os.getpid():
        try:
            with open(f"{PROC}/{pid}/task/{pid}/{name}", "rb") as file:
                return file.read()
        except FileNotFoundError:
            pass  # a sandbox without threads in /proc
    with open(f"{PROC}/{pid}/{name}", "rb") as file:
        return file.read()


def _stat(pid: int) -> list[bytes]:
    """The fields of a process's stat after its name: state, parent, and so on."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when we see no such process, 0 when we may not look.

    Ticks since boot do not move when the wall clock is set. A zombie has ended: it runs no more
    instructions.
    """
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return 0
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def beginning_of(pid: int) -> int:
    """A number for the program that a process runs: another one after an `exec`; 0 when we may not look.

    It is made of what the kernel tells each program at its start, addresses drawn at random among it. Where it draws
    none the number may stay the same, never the other way round.
    """
    try:
        told = _read(pid, "auxv")
    except OSError:
        return 0
    from hashlib import blake2b  # as in `place.Place.of`

    return int.from_bytes(blake2b(told, digest_size=7).digest(), "little") if told else 0


def runs_another(pid: int, beginning: int) -> bool:
    """Whether a process is proved to run another program than the one that has begun so (0: that is not known)."""
    return beginning != 0 and beginning_of(pid) not in (beginning, 0)


def _read_boot() -> int:
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return int(file.read().strip().replace(b"-", b"")[:15], 16)
    except (OSError, ValueError):
        return 0


def _read_space() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class Identity(NamedTuple):
    """A process, past or present. What is 0 is not known, and proves nothing."""

    pid: int
    """Its number in its own pid namespace."""
    start: int
    """When it started, in clock ticks since boot."""
    boot: int
    """Which boot of the machine that was: the first 60 bits of its random id."""
    space: int
    """Its pid namespace: the inode."""

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The identity of a living process that we see (start 0 when we do not see when that was)."""
        return cls(pid, start_time(pid) or 0, _read_boot(), _read_space())

    @classmethod
    def mine(cls) -> Identity:
        """The identity of this process."""
        return cls.of(os.getpid())

    @property
    def is_here(self) -> bool:
        """Whether its number means that process to us: in another pid namespace it is somebody else's, or nobody's."""
        return self.space in (0, _read_space())

    def may_be(self, other: Identity) -> bool:
        """Whether both may be one process: in another pid namespace it has another pid."""
        return self.space != other.space or self.pid == other.pid

    def is_ours(self) -> bool:
        """Whether it is this process or an ancestor of it (while those in between live)."""
        import psutil  # 15 ms that an import does not need

        us = psutil.Process()
        return self.is_here and any(Identity.of(process.pid) == self for process in (us, *us.parents()))

    def is_dead(self) -> bool:
        """True only when it is proved that the process has ended."""
        if self.pid <= 0:
            return False
        boot = _read_boot()
        if boot and self.boot and boot != self.boot:
            return True
        if not self.is_here:
            return False
        if not self.start:
            return _is_zombie_or_gone(self.pid)
        now = start_time(self.pid)
        if now is None:
            # hidepid= hides the directory of a process that lives, or there is no /proc; the kernel still knows it.
            return _is_zombie_or_gone(self.pid)
        return now not in (self.start, 0)

    def is_ending(self) -> bool:
        """Whether it is dead or about to be: what it has open is closed one by one, and may be half of it by now."""
        if self.is_dead():
            return True
        try:
            return self.is_here and bool(int(_stat(self.pid)[6]) & PF_EXITING)
        except OSError:
            return False


def _is_zombie_or_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return os.path.isdir(f"/proc/{pid}") and start_time(pid) is None


def open_pidfd(identity: Identity) -> int:
    """A descriptor that becomes readable when the process ends; -1 where there is no such thing, or it has ended.

    The pid may have passed to another process since: whoever must know looks at `Identity.is_dead` after this.
    """
    try:
        return os.pidfd_open(identity.pid) if identity.is_here else -1
    except (AttributeError, OSError):
        return -1
