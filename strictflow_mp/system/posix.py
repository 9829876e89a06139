"""POSIX: named semaphores and shared memory, from posix_ipc, or where there is no GIL from the standard library.

The import of posix_ipc turns the GIL on for the whole process, for its C code does not say that it can do without. What
`semlock` stands on does. Which of the two it is depends on how the interpreter was built, not on whether its GIL is off
now: so all processes of a program do alike. The objects are the system's own; both ends of one need not use the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .machine import FREE_THREADED

__all__ = [
    "KEEPS_EXCEPTIONS",
    "O_CREX",
    "BusyError",
    "Error",
    "ExistentialError",
    "PermissionsError",
    "Semaphore",
    "SharedMemory",
    "SignalError",
    "unlink_semaphore",
    "unlink_shared_memory",
]

KEEPS_EXCEPTIONS = FREE_THREADED
"""Whether what a signal handler raises comes out of `Semaphore.acquire`; posix_ipc drops it."""

if TYPE_CHECKING or FREE_THREADED:
    from . import semlock as _provider
else:
    import posix_ipc as _provider

O_CREX = _provider.O_CREX
Error = _provider.Error
BusyError = _provider.BusyError
ExistentialError = _provider.ExistentialError
PermissionsError = _provider.PermissionsError
SignalError = _provider.SignalError
Semaphore = _provider.Semaphore
SharedMemory = _provider.SharedMemory
unlink_semaphore = _provider.unlink_semaphore
unlink_shared_memory = _provider.unlink_shared_memory
