"""SemLock: what this library uses of posix_ipc, on the C modules of the standard library that `multiprocessing` uses.

For interpreters without the GIL (`posix`). The names, the arguments and the errors are those of posix_ipc; here what a
signal handler raises comes out of `Semaphore.acquire`.
"""

from __future__ import annotations

import _multiprocessing
import _posixshmem
import os

__all__ = ["O_CREX", "BusyError", "Error", "ExistentialError", "PermissionsError", "Semaphore"]
__all__ += ["SharedMemory", "SignalError", "unlink_semaphore", "unlink_shared_memory"]

O_CREX = os.O_CREAT | os.O_EXCL

_SEMAPHORE = 1
"""The kind of SemLock that any thread may release."""
_MAX = (1 << 31) - 1
"""What a semaphore counts up to."""


class Error(Exception):
    """Of this module."""


class ExistentialError(Error):
    """There is one of that name already, or there is none; or it has been closed."""


class PermissionsError(Error):
    """It is another user's."""


class BusyError(Error):
    """The time is over, and nobody has posted."""


class SignalError(Error):
    """A signal interrupted a wait. Never raised here: a wait goes on when the signal's handler has returned."""


class Semaphore:
    """A named semaphore.

    Args:
        name: None for one that is drawn.
        flags: 0 to open it, `O_CREX` to make it.
        mode: only 0600, its owner's alone.
    """

    def __init__(self, name: str | None, flags: int = 0, mode: int = 0o600, initial_value: int = 0) -> None:
        assert mode == 0o600, "SemLock makes no others"
        self.name = name or f"/{os.urandom(8).hex()}"
        # None when it is closed. A thread that waits keeps it until it has waited: it is closed when nobody uses it.
        self._lock: _multiprocessing.SemLock | None
        try:
            if flags & os.O_EXCL:
                self._lock = _multiprocessing.SemLock(_SEMAPHORE, initial_value, _MAX, self.name, False)
            else:
                self._lock = _multiprocessing.SemLock._rebuild(0, _SEMAPHORE, _MAX, self.name)
        except OSError as error:
            raise _translated(error) from None

    def _open(self) -> _multiprocessing.SemLock:
        if self._lock is None:
            raise ExistentialError(f"{self.name} is closed")
        return self._lock

    def acquire(self, timeout: float | None = None) -> None:
        """Take one post, or wait for it up to *timeout* seconds.

        Raises:
            BusyError: there was none.
        """
        if not self._open().acquire(True, timeout):
            raise BusyError(f"nobody has posted {self.name}")

    def release(self) -> None:
        """Post."""
        self._open().release()

    def close(self) -> None:
        """Use it no more."""
        self._open()
        self._lock = None

    def unlink(self) -> None:
        """Remove its name."""
        unlink_semaphore(self.name)

    @property
    def value(self) -> int:
        """How many posts nobody has taken."""
        return int(self._open()._get_value())

    def __repr__(self) -> str:
        return f"<Semaphore {self.name}>"


class SharedMemory:
    """A descriptor of shared memory, `fd`.

    Args:
        flags: 0 to open it, `O_CREX` to make it, empty.
    """

    def __init__(self, name: str, flags: int = 0) -> None:
        try:
            self.fd = _posixshmem.shm_open(name, os.O_RDWR | flags, mode=0o600)
        except OSError as error:
            raise _translated(error) from None

    def close_fd(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def unlink_semaphore(name: str) -> None:
    """Remove the name of a semaphore."""
    try:
        _multiprocessing.sem_unlink(name)
    except OSError as error:
        raise _translated(error) from None


def unlink_shared_memory(name: str) -> None:
    """Remove the name of shared memory."""
    try:
        _posixshmem.shm_unlink(name)
    except OSError as error:
        raise _translated(error) from None


def _translated(error: OSError) -> Exception:
    if isinstance(error, (FileExistsError, FileNotFoundError)):
        return ExistentialError(str(error))
    return PermissionsError(str(error)) if isinstance(error, PermissionError) else error
