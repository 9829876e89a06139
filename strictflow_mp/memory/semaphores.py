"""The semaphores: one for each slot, on which the slot's process sleeps until something may have changed.

Owns: the names of the semaphores. Nobody else knows how they are made up.
Written by: made and unlinked by the coordinator (`gatekeeper`), or by whoever holds the lock of a dead one's place
    (`leftovers`). Posted by the same two, waited for by one thread of the slot's process (`gate`).
Order: none. A semaphore only wakes; the truth is in the words, and whoever was woken looks at them.
If we die here: a name stays, with a count that says nothing. Its next user takes a new semaphore, or unlinks it.
Invariants: a name has a random part that is drawn when the semaphore is made, and kept in the slot's word SEMAPHORES,
    which is stored first: so nobody can take the name ahead, and whoever cleans up finds it. A lost post costs one
    sleep, which is never longer than `gate.SLEEP_SECONDS`; an extra one costs a look.

The protocol: docs/protocols/gate.md.
"""

from __future__ import annotations

import errno
import os
import signal
import string
import threading
from _signal import pthread_sigmask
from typing import TYPE_CHECKING

from ..system import posix
from .segment import PREFIX

if TYPE_CHECKING:
    from .slot import SlotWords

__all__ = ["make_semaphore", "open_semaphore", "semaphore_name", "sleep_on", "unlink_semaphore", "value_of"]

LETTERS = string.digits + string.ascii_letters + "-_"
"""Of the random part of a name: six bits each."""
RANDOM_LETTERS = 5
"""In a name."""
NAME_TRIES = 100
"""Names that are drawn before a slot is given up: one is taken by accident once in 2**30 times."""

_HELD_BACK = frozenset(map(int, signal.valid_signals())) - {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGSEGV,
    signal.SIGBUS,
}
"""Signals that wait until a sleep is over: all but those that cannot, and those that say that the process is broken."""


def semaphore_name(token: str, slot: int, drawn: int) -> str:
    """The name of a slot's semaphore.

    Args:
        drawn: the slot's word SEMAPHORES.
    """
    letters = "".join(LETTERS[drawn >> 6 * place & 63] for place in range(RANDOM_LETTERS))
    return f"/{PREFIX}{token}.{slot}.{letters}"


def draw() -> int:
    """A number that nobody can guess: 6 bits a letter; never 0, which is none."""
    return int.from_bytes(os.urandom(4), "little") >> 2 or 1


def open_semaphore(name: str, flags: int = 0) -> posix.Semaphore:
    """Open, or make, a semaphore.

    Raises:
        OSError: this process (EMFILE), or the machine (ENFILE), is out of descriptors. posix_ipc says it in words only.
    """
    try:
        return posix.Semaphore(name, flags, 0o600, 0)
    except OSError as error:
        if error.errno is not None:
            raise
        number = errno.ENFILE if "system" in str(error) else errno.EMFILE
        raise OSError(number, os.strerror(number)) from None


def make_semaphore(token: str, words: SlotWords) -> posix.Semaphore:
    """Make the semaphore of a slot that has none.

    Raises:
        OSError: there is no room for it, or no descriptor to make it with.
    """
    for _ in range(NAME_TRIES):
        # Before it is made: so that it is found when we die here.
        words.semaphore = draw()
        try:
            return open_semaphore(semaphore_name(token, words.number, words.semaphore), posix.O_CREX)
        except (posix.ExistentialError, posix.PermissionsError):
            pass  # somebody's: pass it over
    raise OSError(errno.EEXIST, "every name for a semaphore that was tried is taken")


def unlink_semaphore(token: str, words: SlotWords) -> str | None:
    """Remove a slot's semaphore; return its name, if it was there."""
    if not words.semaphore:
        return None
    name = semaphore_name(token, words.number, words.semaphore)
    try:
        posix.unlink_semaphore(name)
    except (posix.ExistentialError, posix.PermissionsError):
        return None  # it is gone, or another user's by now
    finally:
        words.semaphore = 0
    return name


def sleep_on(semaphore: posix.Semaphore, seconds: float) -> None:
    """Sleep until a post, or for about that long.

    posix_ipc drops the exception of a signal handler that runs during acquire, so in the main thread signals wait until
    the sleep is over. A handler's delay is therefore at most one sleep.
    """
    if posix.KEEPS_EXCEPTIONS or threading.current_thread() is not threading.main_thread():
        _acquire(semaphore, seconds)
        return
    # First the mask alone: a handler may raise out of the call that blocks, when it has blocked already.
    before = pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        _acquire(semaphore, seconds)
    finally:
        pthread_sigmask(signal.SIG_SETMASK, before)


def _acquire(semaphore: posix.Semaphore, seconds: float) -> None:
    try:
        semaphore.acquire(seconds)
    except posix.BusyError:
        pass
    except posix.SignalError:
        pass  # a signal that cannot be blocked


def value_of(semaphore: posix.Semaphore) -> int:
    """How many posts nobody has taken yet."""
    return int(semaphore.value)
