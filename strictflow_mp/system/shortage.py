"""Shortages: what a process can run out of, and the words that name the limit.

None of them is the fault of what was just asked for, and each may be over soon: who has no more descriptors refuses a
newcomer, and goes on with everybody else.
"""

from __future__ import annotations

import errno
import fcntl
import os

__all__ = ["is_shortage", "limit_of", "open_spare", "raise_descriptor_limit"]

_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that something has run out: of us, or of the machine."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _ERRNOS)


def limit_of(error: BaseException) -> str:
    """What has run out, and which limit that is. A RuntimeError is what a thread raises that cannot be started."""
    if isinstance(error, RuntimeError):
        return (
            "it cannot start a thread: it has reached the limit of its user (RLIMIT_NPROC) or of its container "
            "(pids.max; TasksMax= of systemd), or has no memory for a stack"
        )
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    if number == errno.EMFILE:
        import resource  # few processes ever need it

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"it is out of file descriptors: RLIMIT_NOFILE is {limit} (`ulimit -n`; LimitNOFILE= of systemd)"
    if number == errno.ENFILE:
        return "the machine is out of file descriptors (fs.file-max)"
    return "it is out of memory"


def open_spare() -> int:
    """A descriptor to be closed when one is needed; -1 when there is none.

    The earlier it is opened, the lower is its number: a limit that is lowered later still leaves room for it. It is
    none of the standard ones, though they may be closed.
    """
    try:
        first = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        if first > 2:
            return first
        try:
            return fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(first)
    except OSError:
        return -1


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may allow itself: each process that attaches takes two."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # the kernel's own limit has been lowered since (fs.nr_open)
