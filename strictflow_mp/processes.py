"""Processes: who somebody is, whether they are proved dead, and how to start a fresh interpreter.

A process is a pid together with its start time, in a boot of the machine and a pid namespace of that: a pid alone
comes back, and in another container it is another's. What cannot be proved dead counts as alive, so nothing is taken
from a process that may still use it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import subprocess

__all__ = ["Child", "Identity", "launch", "let_interrupts_in", "open_pidfd", "wait_for_end"]


PROC = "/proc"
EXITING = 0x4
"""PF_EXITING among the flags in a process's stat: it runs nothing more of its program, and lets go of all it has."""


def _stat(pid: int) -> list[bytes]:
    """The fields of a process's stat behind its name: state, parent, and so on."""
    with open(f"{PROC}/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


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
    """A process, past or present: pid, start time (ticks since boot), boot of the machine, pid namespace or 0."""

    pid: int
    start: int
    boot: int
    space: int

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
            return self.is_here and bool(int(_stat(self.pid)[6]) & EXITING)
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

    The pid may have passed to another process since: whoever must know looks at `Identity.is_dead` behind this.
    """
    try:
        return os.pidfd_open(identity.pid) if identity.is_here else -1
    except (AttributeError, OSError):
        return -1


# A fresh interpreter. It never imports the user's __main__, so it needs no `if __name__` guard and starts
# from daemonic processes, gunicorn, Celery and notebooks alike.

_BOOT = "import sys; sys.path.insert(0, {root!r}); from strictflow_mp.processes import boot; boot({entry!r})"


class Child:
    """A process that this process started, and will wait for."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._parent = os.getpid()
        self.identity = Identity.of(popen.pid)
        _children.append(self)

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._popen.pid

    @property
    def exitcode(self) -> int | None:
        """None while it runs; as `multiprocessing.Process.exitcode` when it has ended."""
        return self._popen.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait up to *timeout* seconds; return the exit code, or None when it still runs."""
        import subprocess

        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens when it has ended."""
        self._popen.send_signal(number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def abandon(self) -> None:
        """Stop to care: somebody else waits for it (after a fork), or nobody needs to."""
        if self._popen.returncode is None:
            self._popen.returncode = 0

    def __repr__(self) -> str:
        return f"<Child pid={self.pid} exitcode={self.exitcode}>"


LOOK = 0.1
"""Seconds between looks at children, where there is no pidfd."""


def wait_for_end(children: list[Child], wakeup: int) -> bool:
    """Sleep until one of the children has ended; False when there is something to read from *wakeup* instead."""
    import select  # needed by those who have children

    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    descriptors = [open_pidfd(child.identity) for child in children]
    try:
        for descriptor in descriptors:
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
        timeout = LOOK * 1000 if -1 in descriptors else None
        while all(child.exitcode is None for child in children):
            for ready, _ in poll.poll(timeout):
                if ready == wakeup:
                    return False
        return True
    finally:
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


_children: list[Child] = []


def _abandon_children() -> None:
    # They are our parent's. Without this, Popen's finalizer would warn of processes still running.
    for child in _children:
        child.abandon()
    _children.clear()


os.register_at_fork(after_in_child=_abandon_children)


def launch(
    entry: str,
    message: dict[str, Any],
    *,
    pass_fds: tuple[int, ...] = (),
    pickler: Callable[[Any], bytes] = pickle.dumps,
) -> Child:
    """Start a fresh interpreter that calls ``entry(message)``.

    Args:
        entry: ``"package.module:function"``.
        message: what the function is given; it travels through the child's standard input.
        pass_fds: descriptors that the child keeps under their numbers.
    """
    import subprocess  # neither is needed by a process that starts none
    from multiprocessing import spawn

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    options = [f"-W{option}" for option in sys.warnoptions]
    options += [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]
    blob = pickler({"path": sys.path, "argv": sys.argv, "message": pickler(message)})
    # The child starts with SIGINT blocked, and lets it in (`let_interrupts_in`) when it can deal with it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        popen = subprocess.Popen(
            [os.fsdecode(spawn.get_executable()), *options, "-c", _BOOT.format(root=root, entry=entry)],
            stdin=subprocess.PIPE,
            pass_fds=pass_fds,
            close_fds=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    child = Child(popen)
    assert popen.stdin is not None
    try:
        with popen.stdin:
            popen.stdin.write(blob)
    except BrokenPipeError:
        pass  # it died at once; its exit code tells
    return child


def let_interrupts_in() -> None:
    """In a launched interpreter: from now on Ctrl-C reaches it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def boot(entry: str) -> None:
    """Where a launched interpreter begins."""
    # Raw reads: a buffered reader would hold standard input's lock while we are about to replace it.
    received = []
    while block := os.read(0, 1 << 16):
        received.append(block)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    parcel = pickle.loads(b"".join(received))
    sys.path[:] = parcel["path"]
    sys.argv[:] = parcel["argv"]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, write_through=False)
    module, _, name = entry.partition(":")
    __import__(module)
    getattr(sys.modules[module], name)(pickle.loads(parcel["message"]))
