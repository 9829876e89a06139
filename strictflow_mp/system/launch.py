"""Launching: fresh interpreters, and waiting for their end.

A launched interpreter never imports the user's ``__main__``, so it needs no ``if __name__`` guard and starts from
daemonic processes, gunicorn, Celery and notebooks alike. It shares no lock with us, and no descriptor but the standard
ones and those that it is given.

It runs under our interpreter's flags (``-I``, ``-O``, ...), and looks for modules where we do, in our order. What it
runs first imports only what is built in until that is so: ``python -c`` would look in the current directory, where
anybody may have put a ``pickle.py``.
"""

from __future__ import annotations

import marshal
import os
import pickle
import signal
import sys
from typing import TYPE_CHECKING, Any

from ..errors import StrictFlowError
from .descriptors import fill_standard
from .forks import in_child
from .identity import Identity, open_pidfd
from .paths import own_path

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

__all__ = ["Child", "boot", "launch", "let_interrupts_in", "wait_for_end"]

_BOOT = """\
def boot():
    import sys
    sys.path[:] = filter(None, sys.path)
    import marshal, posix
    received = []
    while block := posix.read(0, 1 << 16):
        received.append(block)
    sys.path[:], root, entry, parcel = marshal.loads(b"".join(received))
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    spec = PathFinder.find_spec("strictflow_mp", [root])
    if spec is not None and spec.loader is not None:
        sys.modules["strictflow_mp"] = package = module_from_spec(spec)
        spec.loader.exec_module(package)
    from strictflow_mp.system.launch import boot
    boot(entry, parcel)
boot()
"""
"""What a launched interpreter runs first. It imports only what is built in until `sys.path` is ours; then this very
library, wherever that is, without putting the packages beside it before the standard library."""

_MARSHAL_VERSION = 2
"""Of the first message to a child: every Python reads that."""

_FLAGS = {
    "debug": "d",
    "optimize": "O",
    "dont_write_bytecode": "B",
    "no_site": "S",
    "verbose": "v",
    "bytes_warning": "b",
    "quiet": "q",
}
"""By attribute of `sys.flags`, the option that sets it; given as often as its number says."""
_ISOLATION = {"ignore_environment": "E", "no_user_site": "s"}
"""The same, of those that ``-I`` sets together."""

_is_launched = False
"""Whether this process, or the one that it was forked from, began in `boot`."""


class Child:
    """A process that this process started, and will wait for.

    Attributes:
        identity: which process it is, as we saw it just after its start; that does not change when it ends.
    """

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        # Its `returncode` is None until somebody has waited for the child; 0 at once when it is not ours to wait for
        # (`abandon`).
        self._popen = popen
        self.identity = Identity.of(popen.pid)
        _children.append(self)
        for child in list(_children):
            if child.exitcode is not None:
                try:
                    _children.remove(child)
                except ValueError:
                    pass  # another thread was faster

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
        """Stop caring: somebody else waits for it (after a fork), or nobody needs to."""
        if self._popen.returncode is None:
            self._popen.returncode = 0

    def __repr__(self) -> str:
        return f"<Child pid={self.pid} exitcode={self.exitcode}>"


LOOK_SECONDS = 0.1
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
        timeout = LOOK_SECONDS * 1000 if -1 in descriptors else None
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
"""All that this process has started, in order; who had ended is dropped when the next one was started. Emptied in a
forked child."""


def _abandon_children() -> None:
    # They are our parent's. Without this, Popen's finalizer would warn of processes still running.
    for child in _children:
        child.abandon()
    _children.clear()


in_child(_abandon_children)


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

    Raises:
        StrictFlowError: there is no interpreter that could be started.
    """
    import subprocess  # not needed by a process that starts none

    interpreter = _interpreter()
    fill_standard()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parcel = pickler({"argv": getattr(sys, "argv", []), "message": pickler(message)})
    blob = marshal.dumps((own_path(), root, entry, parcel), _MARSHAL_VERSION)
    # The child starts with SIGINT blocked, and lets it in (`let_interrupts_in`) when it can deal with it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        popen = subprocess.Popen(
            [interpreter, *_options(), "-c", _BOOT],
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


def _interpreter() -> str:
    """The interpreter's path."""
    import subprocess  # not needed by a process that starts none
    from multiprocessing import spawn

    version = ".".join(map(str, sys.version_info[:2]))
    if getattr(sys, "frozen", False):
        raise StrictFlowError(
            "this is a frozen program: it has no Python interpreter of its own to start a coordinator or workers in; "
            f"start the flow from an installed Python {version} (`strictflow-mp serve NAME`), and attach to it here"
        )
    # Its Popen forks as os.fork does, in the greenlet that watches the coordinator: that would stand aside for itself.
    if subprocess.Popen.__module__.partition(".")[0] == "gevent":
        raise StrictFlowError(
            "gevent has patched this process, and starts others in a way of its own, in which nobody looks after them; "
            "start the flow from a process that is not patched (`strictflow-mp serve NAME`), and attach to it here"
        )
    executable = os.fsdecode(spawn.get_executable() or "")
    if not executable:
        raise StrictFlowError(
            "sys.executable names no Python interpreter to start a coordinator or workers in; "
            f"name one of Python {version} with multiprocessing.set_executable()"
        )
    # Else the program that is no interpreter would start itself, again and again.
    if not _is_launched and _BOOT in (*getattr(sys, "argv", ()), *sys.orig_argv):
        raise StrictFlowError(
            f"{executable} was started as a Python interpreter, and is this program instead; "
            f"name an interpreter of Python {version} with multiprocessing.set_executable()"
        )
    return executable


def _options() -> list[str]:
    """The options under which a child's interpreter is like ours."""
    options = [f"-{letter * int(getattr(sys.flags, flag))}" for flag, letter in _FLAGS.items()]
    if sys.flags.isolated:
        options.append("-I")
    else:
        options += [f"-{letter * int(getattr(sys.flags, flag))}" for flag, letter in _ISOLATION.items()]
        # From 3.13 on `-c` itself imports linecache, before a line of ours runs.
        options.append("-P" if sys.version_info >= (3, 11) else "-")
    options = [option for option in options if option != "-"]
    options += [f"-W{option}" for option in sys.warnoptions]
    options += [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]
    return options


def let_interrupts_in() -> None:
    """In a launched interpreter: from now on Ctrl-C reaches it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def boot(entry: str, parcel: bytes) -> None:
    """Where a launched interpreter begins, once it looks for modules where its parent does."""
    global _is_launched
    _is_launched = True
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    fill_standard()  # our parent has filled its own, but may not have left them to us
    content = pickle.loads(parcel)
    sys.argv[:] = content["argv"]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, write_through=False)
    module, _, name = entry.partition(":")
    __import__(module)
    getattr(sys.modules[module], name)(pickle.loads(content["message"]))
