"""The rendezvous: the directory where the processes of a flow find each other by its name.

Owns: ``<base>/<flow>/`` with three files: ``lock`` (held with flock by the living coordinator; says who it
    is), ``key`` (the authentication key) and ``socket``; and ``trace``, a link, while a run is recorded
    (`recorder`). The coordinator makes and removes them.
Read by: everybody who attaches.
If we die here: the kernel releases the lock, so the next start sees that nobody lives there, removes what
    the dead left (`Leftover`), and begins anew.
Invariants: whoever holds the lock owns the directory. A lock counts only if the locked file is still the
    one that the path names, since the owner removes it while it holds it.

The base is ``$STRICTFLOW_MP_DIR`` if set, else ``/dev/shm/sfmp-<uid>`` on Linux: the same lifetime, and the same
visibility from containers, as the shared memory itself. Its mode is 0700 and its owner must be us.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .errors import FlowExists, ProtocolError
from .processes import Identity

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Lease", "Place", "Resident", "base_directory", "places"]

SOCKET_PATH_MAX = 103


def base_directory() -> Path:
    """Where the flows of this user meet."""
    from pathlib import Path  # with what it imports, 3 ms that an import of ours does not need

    chosen = os.environ.get("STRICTFLOW_MP_DIR")
    if chosen:
        return Path(chosen)
    shared = Path("/dev/shm")
    parent = shared if shared.is_dir() else Path("/tmp")
    return parent / f"sfmp-{os.getuid()}"


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    _check_directory(path)


def _check_directory(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ProtocolError(
            f"{path} must be a directory of mode 0700 that belongs to user {os.getuid()}; "
            "remove it, or set STRICTFLOW_MP_DIR to another place"
        )


class Resident(NamedTuple):
    """Who serves a flow, as its lock file says."""

    name: str
    token: str
    pid: int
    start: int
    boot: int
    space: int

    @property
    def identity(self) -> Identity:
        """The coordinator's process."""
        return Identity(self.pid, self.start, self.boot, self.space)


class Place:
    """The directory of one flow."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lock = directory / "lock"
        self.key = directory / "key"
        self.socket = directory / "socket"
        self.trace = directory / "trace"

    @classmethod
    def of(cls, name: str) -> Place:
        """The place of the flow of that name."""
        from hashlib import blake2b  # 6 ms that an import does not need

        slug = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:20]
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        place = cls(base_directory() / f"{slug}-{digest}")
        if len(os.fsencode(place.socket)) > SOCKET_PATH_MAX:
            raise ProtocolError(
                f"the socket path {place.socket} is longer than {SOCKET_PATH_MAX} bytes; "
                "set STRICTFLOW_MP_DIR to a shorter directory",
                flow=name,
            )
        return place

    def resident(self) -> Resident | None:
        """Who is, or was last, at home here."""
        import json

        try:
            return Resident(**json.loads(self.lock.read_bytes().partition(b"\n")[0]))
        except (OSError, ValueError, TypeError):
            return None

    def is_inhabited(self) -> bool:
        """Whether a living coordinator holds the lock."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return True
            raise
        finally:
            os.close(descriptor)
        return False

    def check(self) -> None:
        """See to it that the place is ours: whoever owns it may make us run code.

        Raises:
            ProtocolError: it is not.
            FileNotFoundError: it does not exist.
        """
        _check_directory(self.directory.parent)
        _check_directory(self.directory)

    def authkey(self) -> bytes:
        """The key that both ends of a connection must know."""
        return self.key.read_bytes()

    def __repr__(self) -> str:
        return f"<Place {self.directory}>"


def places() -> Iterator[Place]:
    """Every place that exists, inhabited or not."""
    try:
        entries = sorted(base_directory().iterdir())
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir():
            yield Place(entry)


class Lease:
    """The lock of a place, held until `leave`."""

    def __init__(self, place: Place, descriptor: int, name: str, former: Resident | None) -> None:
        self.place = place
        self.name = name
        self.former = former
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
        while True:
            _private_directory(place.directory.parent)
            try:
                _private_directory(place.directory)
                descriptor = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # the former owner removed it this very moment
            lease = cls._try_lock(place, descriptor, name)
            if lease is not None:
                return lease
            os.close(descriptor)

    @classmethod
    def _try_lock(cls, place: Place, descriptor: int, name: str) -> Lease | None:
        for attempt in range(50):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                    os.close(descriptor)
                    raise
                resident = place.resident()
                # Somebody who only looks whether anyone is at home holds it for an instant.
                if attempt == 49 or (resident is not None and not resident.identity.is_dead()):
                    os.close(descriptor)
                    pid = resident.pid if resident else "?"
                    raise FlowExists(
                        f"a coordinator (pid {pid}) already lives under that name; use StrictFlow.attach() "
                        "to join it, or choose another name",
                        flow=name,
                    ) from None
                os.sched_yield()
        try:
            current = os.stat(place.lock)
        except FileNotFoundError:
            return None
        mine = os.fstat(descriptor)
        if (current.st_dev, current.st_ino) != (mine.st_dev, mine.st_ino):
            return None
        return cls(place, descriptor, name, place.resident())

    def inscribe(self, resident: Resident) -> None:
        """Write down who lives here, before it makes anything: so that whatever it leaves can be found."""
        import json

        line = json.dumps(resident._asdict()).encode() + b"\n"
        # One line over the former one, then the rest of that: at no instant is neither of them there.
        os.pwrite(self._descriptor, line, 0)
        os.ftruncate(self._descriptor, len(line))

    def new_key(self) -> bytes:
        """Write down a new authentication key; return it. Nobody is let in with the former one any more."""
        authkey = os.urandom(32)
        for path in (self.place.key, self.place.socket):
            path.unlink(missing_ok=True)
        descriptor = os.open(self.place.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(authkey)
        return authkey

    def fileno(self) -> int:
        """The descriptor that holds the lock. A forked child closes it, or it would hold the lock too."""
        return self._descriptor

    def leave(self) -> None:
        """Remove everything, then let go of the lock."""
        for path in (self.place.trace, self.place.socket, self.place.key, self.place.lock):
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
