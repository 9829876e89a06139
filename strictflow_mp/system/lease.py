"""The lease: the lock of a place, held while somebody lives there.

Owns: the place's directory, from `Lease.take` to `Lease.leave` or `Lease.release`.
Written by: the coordinator; for a moment, whoever condemns or removes what a dead one left (`memory.leftovers`).
Read by: whoever looks whether anybody lives there (`Place.is_inhabited`).
Order: the lock, then the inscription, then all that it names; at the end `lock` is the last file that goes, while it is
    still locked.
If we die here: the kernel releases the lock. Its file stays, with the name of what we made; it has that before it has
    its own name when it is put back.
Invariants: at most one process holds a lock that counts. One on a file that is no longer at its path does not count,
    and is taken anew.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING

from ..errors import FlowExists
from .descriptors import fill_standard
from .place import Place, Resident, check_directory
from .shortage import is_shortage

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Lease"]

LOCK_TRIES = 50
"""Looks at a lock that is taken though its file names nobody, or a dead process; then its holder counts as alive."""
LOCK_PAUSE_SECONDS = 0.004
"""Between two of them: on a busy machine whoever holds it for an instant may not run for some time."""


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    check_directory(path)


def _file_at(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to; None when there is none.

    Raises:
        OSError: we may not look.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path leads to the file that is open."""
    try:
        current = os.stat(path)
    except OSError:
        return False
    mine = os.fstat(descriptor)
    return (current.st_dev, current.st_ino) == (mine.st_dev, mine.st_ino)


def _write(descriptor: int, resident: Resident) -> None:
    import json

    line = json.dumps(resident._asdict()).encode() + b"\n"
    # One line over the former one, then the rest of that: at no instant is neither of them there.
    os.pwrite(descriptor, line, 0)
    os.ftruncate(descriptor, len(line))


def _put_in_place(fresh: Path, place: Place) -> bool:
    """Give a lock file that we hold its name; False when another process has one there."""
    try:
        os.link(fresh, place.lock)
        return True
    except FileExistsError:
        pass
    # Of a process that looked whether anybody lives here: nobody else may take it while it is replaced.
    descriptor = os.open(place.lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _leads_to(place.lock, descriptor) or place.resident() is not None:
            return False
        os.replace(fresh, place.lock)
        return True
    finally:
        os.close(descriptor)


class Lease:
    """The lock of a place, held until `leave` or `release`.

    Attributes:
        place: the directory that it is of.
        name: the flow's name, as whoever took the lease has called it.
        former: who lived here before, and may have left something; None when the lock's file says nothing.
    """

    def __init__(self, place: Place, descriptor: int, name: str, former: Resident | None) -> None:
        self.place = place
        self.name = name
        self.former = former
        self._resident: Resident | None = None  # what we have written into it
        # Which files key and socket were when the door was opened; empty until then. By them whoever attaches finds us.
        # None: removed before we had noted it.
        self._door: dict[Path, tuple[int, int] | None] = {}
        # The lock is held as long as this is open, here or in a child that has inherited it.
        self._descriptor = descriptor

    @classmethod
    def take(cls, name: str) -> Lease:
        """Move in.

        Raises:
            FlowExists: a living coordinator is at home.
            ProtocolError: the directory is not safe.
        """
        return cls.take_place(Place.of(name), name)

    @classmethod
    def take_place(cls, place: Place, name: str) -> Lease:
        """As `take`, in a place that is known already."""
        fill_standard()  # the lock's file must not become anybody's standard output
        while True:
            _private_directory(place.directory.parent)
            try:
                _private_directory(place.directory)
                descriptor = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # the former resident removed it this very moment
            lease = None
            try:
                lease = cls._try_lock(place, descriptor, name)
            finally:
                if lease is None:
                    os.close(descriptor)
            if lease is not None:
                return lease

    @classmethod
    def _try_lock(cls, place: Place, descriptor: int, name: str) -> Lease | None:
        for attempt in range(LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                    raise
                resident = place.resident()
                # A process that only looks whether anyone is at home holds it for an instant.
                if attempt == LOCK_TRIES - 1 or (resident is not None and not resident.identity.is_dead()):
                    pid = resident.pid if resident else "?"
                    raise FlowExists(
                        f"a coordinator (pid {pid}) already lives under that name; use StrictFlow.attach() "
                        "to join it, or choose another name",
                        flow=name,
                    ) from None
                time.sleep(LOCK_PAUSE_SECONDS)
        if not _leads_to(place.lock, descriptor):
            return None
        former = place.resident()
        if former is None and place.answers():
            # Its lock file was removed, and it has not put it back yet.
            raise FlowExists(
                "a coordinator whose lock file was removed still lives under that name; try again in a second",
                flow=name,
            )
        return cls(place, descriptor, name, former)

    def is_held(self) -> bool:
        """Whether the lock that we hold is the one that others find: one that was removed counts for nothing."""
        return _leads_to(self.place.lock, self._descriptor)

    def note_door(self) -> None:
        """Key and socket are ours, and stay as they are now."""
        self._door = {path: _file_at(path) for path in (self.place.key, self.place.socket)}

    def has_door(self) -> bool:
        """Whether key and socket are still ours, as far as we can see; to look takes no descriptor."""
        try:
            return all(file is not None and _file_at(path) == file for path, file in self._door.items())
        except OSError:
            return True  # we may not look there any more, which proves nothing

    def put_back(self) -> bool:
        """Make the lock anew after somebody has removed it; False when another process has the place by now.

        Raises:
            OSError: this process has run out of what that takes, or may not write there any more.
        """
        if self._resident is None:
            return False
        fresh = self.place.lock.with_name("lock.new")
        descriptor, is_ours = -1, False
        try:
            descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(descriptor, self._resident)  # before anybody finds it
            is_ours = _put_in_place(fresh, self.place)
        except OSError as error:
            if is_shortage(error) or isinstance(error, PermissionError):
                raise
        finally:
            fresh.unlink(missing_ok=True)
            if is_ours:
                self._descriptor, descriptor = descriptor, self._descriptor
            if descriptor >= 0:
                os.close(descriptor)
        return is_ours

    def inscribe(self, resident: Resident) -> None:
        """Write down who lives here, before it makes anything: so that whatever it leaves can be found."""
        self._resident = resident
        _write(self._descriptor, resident)

    def new_key(self) -> bytes:
        """Write down a new authentication key; return it. Nobody is let in with the former one any more."""
        authkey = os.urandom(32)
        for path in (self.place.key, self.place.socket, self.place.code):
            path.unlink(missing_ok=True)
        descriptor = os.open(self.place.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(authkey)
        return authkey

    def go_on(self) -> None:
        """Say that a takeover goes on: `Place.sign_of_life` moves."""
        try:
            os.utime(self._descriptor)
        except OSError:
            pass  # then those who wait know of nothing, and wait their time

    def fileno(self) -> int:
        """The descriptor that holds the lock. A forked child closes it, or it would hold the lock too."""
        return self._descriptor

    def leave(self) -> None:
        """Remove everything, then let go of the lock. What is another's by now stays."""
        if not self.is_held():
            self.release()
            return
        place = self.place
        half_made = (place.lock.with_name("lock.new"), place.code.with_name("code.new"))  # by one that died meanwhile
        for path in (*half_made, place.trace, place.code, place.socket, place.key, place.lock):
            path.unlink(missing_ok=True)
        for directory in (self.place.directory, self.place.directory.parent):
            try:
                directory.rmdir()
            except OSError:
                break  # somebody is moving in, or other flows live here
        self.release()

    def release(self) -> None:
        """Let go of the lock and leave everything as it is."""
        os.close(self._descriptor)

    def __repr__(self) -> str:
        return f"<Lease of {self.name!r} at {self.place.directory}>"
