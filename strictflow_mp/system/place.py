"""The place: the directory where the processes of a flow find each other by its name.

Owns: ``<base>/<flow>/`` with three files: ``lock`` (held with flock by the living coordinator; says who it
    is), ``key`` (the authentication key) and ``socket``; ``code``, what modules it has loaded (`coordinator.library`);
    and ``trace``, a link, while a run is recorded (`coordinator.recorder`).
Written by: the coordinator, which makes and removes them, and holds the lock from before its first file to after its
    last (`lease`). Nothing is written here in this module.
Read by: every process that attaches, and one that only looks.
Order: the lock's file says who lives here before anything else of the flow is made.
If we die here: the kernel releases the lock, so the next start sees that nobody lives there, and takes over or removes
    what the dead one left (`memory.leftovers`).
Invariants: the directory belongs to whoever holds the lock. A lock counts only if the locked file is still the
    one that the path names, since its holder removes it while it holds it.

The base is ``$STRICTFLOW_MP_DIR`` if set, else ``/dev/shm/sfmp-<uid>``: the same lifetime, and the same visibility from
containers, as the shared memory itself. Its mode is 0700 and it must be ours. Anybody can guess that name, and take it
ahead of us: a base of another user's is passed over for ``sfmp-<uid>.1``, and so on.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ProtocolError
from .descriptors import fill_standard
from .identity import Identity
from .shortage import is_shortage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Place", "Resident", "base_directory", "check_directory", "places"]

MAX_TAKEN = 1000
"""Names for the base directory that are tried."""
SOCKET_PATH_BYTES = 103
"""Bytes that the path of a socket may have: what every system allows."""


def base_directory() -> Path:
    """Where the flows of this user meet."""
    from pathlib import Path  # with what it imports, 3 ms that an import of ours does not need

    chosen = os.environ.get("STRICTFLOW_MP_DIR")
    if chosen:
        return Path(chosen).absolute()  # whoever keeps it may change its working directory
    shared = Path("/dev/shm")
    return _ours(shared if shared.is_dir() else Path("/tmp"), os.getuid())


def _ours(parent: Path, user: int) -> Path:
    """The base directory of a user; where there is none, the first one that nobody has taken."""
    base = parent / f"sfmp-{user}"
    if _owner_of(base) == user:
        return base
    # All processes of a user must come to the same one, also when a name that was taken is free again.
    mine = [entry for entry in parent.glob(f"{base.name}.*") if _owner_of(entry) == user]
    names = [base, *(parent / f"{base.name}.{number}" for number in range(1, MAX_TAKEN))]
    free = (name for name in names if _owner_of(name) is None)
    return min(mine, default=None) or next(free, base)


def _owner_of(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except FileNotFoundError:
        return None


def check_directory(path: Path) -> None:
    """See to it that a directory is ours alone: whoever may write to it may make us run code.

    Raises:
        ProtocolError: it is not.
        FileNotFoundError: it does not exist.
    """
    status = path.lstat()
    if status.st_uid != os.getuid():
        raise ProtocolError(
            f"{path} belongs to user {status.st_uid}, and this process runs as user {os.getuid()}; a flow is one "
            "user's: change the user before the flow is started and used, or set STRICTFLOW_MP_DIR to another place"
        )
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
        raise ProtocolError(
            f"{path} must be a directory of mode 0700 that belongs to user {os.getuid()}; "
            "remove it, or set STRICTFLOW_MP_DIR to another place"
        )


class Resident(NamedTuple):
    """Who serves a flow, or was the last to, as its lock file says."""

    name: str
    """The flow's."""
    token: str
    """What the names of all its shared objects have in them: drawn at its first start, kept when it is taken over."""
    pid: int
    start: int
    boot: int
    space: int

    @property
    def identity(self) -> Identity:
        """The coordinator's process."""
        return Identity(self.pid, self.start, self.boot, self.space)


class Place:
    """The directory of one flow.

    Attributes:
        directory: a path, and nothing more: whether anything is there is asked each time.
        lock, key, socket, trace, code: the paths of what is in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lock = directory / "lock"
        self.key = directory / "key"
        self.socket = directory / "socket"
        self.trace = directory / "trace"
        self.code = directory / "code"

    @classmethod
    def of(cls, name: str) -> Place:
        """The place of the flow of that name."""
        from hashlib import blake2b  # 6 ms that an import does not need

        slug = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:20]
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        place = cls(base_directory() / f"{slug}-{digest}")
        if len(os.fsencode(place.socket)) > SOCKET_PATH_BYTES:
            raise ProtocolError(
                f"the socket path {place.socket} is longer than {SOCKET_PATH_BYTES} bytes; "
                "set STRICTFLOW_MP_DIR to a shorter directory",
                flow=name,
            )
        return place

    def resident(self) -> Resident | None:
        """Who is, or was last, at home here."""
        import json

        try:
            return Resident(**json.loads(self.lock.read_bytes().partition(b"\n")[0]))
        except (OSError, ValueError, TypeError) as error:
            if is_shortage(error):
                raise  # that we cannot look does not say that there is nobody
            return None

    def is_inhabited(self) -> bool:
        """Whether a living coordinator is seen to hold the lock. That it is not seen does not prove that none lives."""
        return self.look() is True

    def look(self) -> bool | None:
        """Whether a living coordinator holds the lock; None when there is no lock, or we may not look.

        False proves that whoever the lock's file names is dead, or has let go. To look is to hold the lock too, for an
        instant: see `Lease`.
        """
        try:
            fill_standard()  # a stray print would write over who lives here
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None  # after setuid or chroot it may well live
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return True
            return None
        finally:
            os.close(descriptor)
        return False

    def answers(self) -> bool:
        """Whether somebody listens at the socket: a coordinator, though its lock may have been removed."""
        import socket

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect(str(self.socket))
            except BlockingIOError:
                return True  # so many wait there already
            except OSError:
                return False
        return True

    def sign_of_life(self) -> int:
        """A number that moves while somebody who lives here takes over a state; 0 when nobody is seen to live here."""
        try:
            return os.stat(self.lock).st_mtime_ns
        except OSError:
            return 0

    def check(self) -> None:
        """See to it that the place is ours: whoever owns it may make us run code.

        Raises:
            ProtocolError: it is not.
            FileNotFoundError: it does not exist.
        """
        check_directory(self.directory.parent)
        check_directory(self.directory)

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
