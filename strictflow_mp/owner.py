"""The owner: the process that started a coordinator, that starts the next one when it dies, and that stops it.

A thread sleeps until the coordinator ends. It stands aside while the process forks, so that no fork finds it at work.
"""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import select
import threading
import time
import weakref
from typing import Any

from . import leftovers, wire
from .client import Client
from .core import configured_level, logger
from .errors import CoordinatorLost, FlowExists, FlowNotRunning, ProtocolError, StrictFlowError, TaskTimeout
from .processes import Child, Identity, launch, wait_for_end
from .rendezvous import Lease, Place
from .segment import PREFIX, W_EPOCH, W_VERSION, Segment

__all__ = ["Owner"]

START = 30.0
"""Seconds that a coordinator may take to start."""
END = 15.0
"""Seconds that it may take to end after its last task."""
SHORT = 1.0
"""Seconds: a coordinator that lived no longer, and finished nothing, has failed at once."""
FAILURES = 10
"""How often in a row it may fail at once before the owner gives up."""
PAUSE = 0.05
"""Seconds before it is tried again when it has failed at once twice; doubled each time."""


class Owner:
    """A coordinator process that this process started."""

    def __init__(self, name: str, options: dict[str, Any], child: Child) -> None:
        self.name = name
        self.pid = os.getpid()
        self._options = options
        self._child = child
        resident = Place.of(name).resident()
        self._token = resident.token if resident is not None else ""
        self._changing = threading.Lock()  # held while the child is replaced or stopped
        self._is_ending = False
        self._watcher: _Watcher | None = None

    @classmethod
    def start(cls, name: str, options: dict[str, Any]) -> Owner:
        """Start a coordinator; return when it serves. It is restarted if `options` say so.

        Raises:
            FlowExists: one lives under that name.
            StateFull: there is no room for the first state.
        """
        child = cls._launch(name, options)
        owner = cls(name, {**options, "state": {}}, child)  # the next coordinator finds the state in shared memory
        if options["restart"]:
            owner._watcher = _Watcher(owner)
            owner._watcher.start()
        return owner

    @staticmethod
    def _launch(name: str, options: dict[str, Any]) -> Child:
        readable, writable = os.pipe()
        try:
            me = Identity.mine()
            child = launch(
                "strictflow_mp.coordinator:main",
                {
                    **options,
                    "name": name,
                    "ready": writable,
                    "owner": tuple(me),
                    "log_level": configured_level(),
                },
                pass_fds=(writable,),
            )
            os.close(writable)
            writable = -1
            answer = _read_answer(readable, time.monotonic() + START)
        finally:
            os.close(readable)
            if writable >= 0:
                os.close(writable)
        if answer == b"":
            code = child.wait(END)
            if code is None:
                child.kill()
                child.wait()
            raise FlowNotRunning(
                f"its coordinator did not start (exit code {code}); its standard error says why", flow=name
            )
        error = pickle.loads(answer)
        if error is not None:
            child.wait(END)
            raise error.of(name)
        return child

    @property
    def is_alive(self) -> bool:
        """Whether the coordinator runs, or is about to run again."""
        if self.pid != os.getpid():
            return False
        return self._child.exitcode is None or (self._watcher is not None and self._watcher.is_watching)

    def wait(self, timeout: float) -> bool:
        """Wait up to *timeout* seconds for the coordinator's end; whether it has come, for good."""
        return self._child.wait(timeout) is not None and not self.is_alive

    # For the watcher

    @property
    def child(self) -> Child:
        """The coordinator as it is now."""
        return self._child

    def replace(self, pause: float) -> bool:
        """The coordinator has ended: start the next one, unless it was stopped. Whether there is one."""
        with self._changing:
            if self._is_ending or (self._child.exitcode == 0 and self._has_moved_out()):
                return False
            about = {"flow": self.name, "peer": self._child.pid, "exit_code": self._child.exitcode}
            logger.warning("flow %r: its coordinator ended with %s", self.name, self._child.exitcode, extra=about)
            time.sleep(pause)
            try:
                self._child = self._launch(self.name, {**self._options, "recover": True, "is_restart": True})
            except FlowExists:
                return False  # somebody was faster: it is theirs now
            except Exception as error:
                if isinstance(error, FlowNotRunning) and Place.of(self.name).resident() is None:
                    return False  # it died while it stopped; what was left is removed
                about = {"flow": self.name, "error": type(error).__name__}
                logger.error("flow %r: its coordinator could not be restarted: %s", self.name, error, extra=about)
        return True

    def _has_moved_out(self) -> bool:
        """Whether the coordinator stopped of its own will, and so removed all that was its own.

        Its exit code alone does not say so: where somebody else waits for any child of this process, as gunicorn's
        master does, or SIGCHLD is ignored, `subprocess` reports 0 for whatever end it had.
        """
        resident = Place.of(self.name).resident()
        return resident is None or resident.token != self._token

    def give_up(self) -> None:
        """It fails again and again: tell everybody, and leave the state for the next start."""
        about = {"flow": self.name}
        logger.error("flow %r: its coordinator failed %d times in a row; given up", self.name, FAILURES, extra=about)
        leftovers.abandon(self.name)

    def stop(self, client: Client, *, drain: bool, timeout: float | None) -> None:
        """Stop the coordinator and see to it that nothing is left.

        Raises:
            TaskTimeout: tasks still ran after *timeout* seconds; they were killed and rolled back.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            # If it dies on the way, the next one is asked once more, so that what was queued is still finished.
            if not ask_to_stop(client, drain=drain, timeout=timeout) and not ask_to_stop(
                client, drain=drain, timeout=timeout
            ):
                self._child.terminate()  # our connection was gone, and so is the next: a signal says the same
        except (TimeoutError, concurrent.futures.TimeoutError):  # two classes before Python 3.11
            pass
        except StrictFlowError:
            self._child.terminate()  # it does not take us
        with self._changing:
            self._is_ending = True  # from now on nobody starts it again
        if self._watcher is not None:
            self._watcher.end()
        left = END if deadline is None else max(0.0, deadline - time.monotonic())
        killed = self._child.wait(left) is None
        if killed:
            self._child.kill()
            self._child.wait()
        client.close()
        client.is_stopped = True
        self._clean()
        if killed:
            raise TaskTimeout(
                f"tasks still ran {timeout if timeout is not None else END:g} s after the stop; the coordinator was "
                "killed and they were rolled back",
                flow=self.name,
            )

    def _clean(self) -> None:
        """Remove what a coordinator that was killed left behind."""
        place = Place.of(self.name)
        if not place.directory.exists():
            return
        try:
            lease = Lease.take(self.name)
        except FlowExists:
            return  # somebody has started the next one
        if lease.former is not None and lease.former.token == self._token:
            leftovers.remove(lease.former.token)
            lease.leave()
        elif lease.former is None:
            lease.leave()
        else:
            lease.release()

    def __repr__(self) -> str:
        return f"<Owner of {self.name!r}, coordinator {self._child!r}>"


class _Watcher:
    """The thread that waits for the coordinator's end."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._wakeup, self._wake = os.pipe()
        self._thread: threading.Thread | None = None
        self.is_watching = True
        self._failures = 0
        self._segment = _segment_of(owner.name)
        _watchers.add(self)

    def start(self) -> None:
        """Begin to watch, or go on after a fork."""
        if self.is_watching:
            self._thread = threading.Thread(target=self._run, name="strictflow-owner", daemon=True)
            self._thread.start()

    def stand_aside(self) -> None:
        """End the thread for a moment. One that is starting a coordinator is left alone."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            os.write(self._wake, b"\0")
            thread.join()

    def end(self) -> None:
        """Watch no more."""
        self.is_watching = False
        self.stand_aside()
        self.forget()

    def forget(self) -> None:
        """Close the pipe; in a forked child, all there is to do."""
        self.is_watching = False
        _watchers.discard(self)
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        if self._wake >= 0:
            os.close(self._wake)
            os.close(self._wakeup)
            self._wake = self._wakeup = -1

    def _work_done(self) -> int:
        """Grows with each commit and each P1 task, but not with what merely moves EPOCH, by one for a version."""
        if self._segment is None:
            return 0
        words, first = self._segment.words, self._segment.finished
        finished = sum(words[first : first + self._segment.slots].tolist())
        return int(words[W_VERSION] - words[W_EPOCH] + finished)

    def _run(self) -> None:
        owner = self._owner
        while True:
            began, before = time.monotonic(), self._work_done()
            child = owner.child
            if not wait_for_end([child], self._wakeup):
                os.read(self._wakeup, 64)
                return
            failed_at_once = time.monotonic() - began < SHORT and self._work_done() <= before
            self._failures = self._failures + 1 if failed_at_once else 0
            if self._failures >= FAILURES:
                self.is_watching = False
                owner.give_up()
                return
            if not owner.replace(PAUSE * 2**self._failures if self._failures > 1 else 0.0):
                self.is_watching = False
                return


def _segment_of(name: str) -> Segment | None:
    resident = Place.of(name).resident()
    try:
        return Segment.open(PREFIX + resident.token) if resident is not None else None
    except (FileNotFoundError, ProtocolError):
        return None  # it has ended already


_watchers: weakref.WeakSet[_Watcher] = weakref.WeakSet()


def _before_fork() -> None:
    for watcher in list(_watchers):
        watcher.stand_aside()


def _after_fork_in_parent() -> None:
    for watcher in list(_watchers):
        watcher.start()


def _after_fork_in_child() -> None:
    for watcher in list(_watchers):
        watcher.forget()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def ask_to_stop(client: Client, *, drain: bool, timeout: float | None) -> bool:
    """Ask a coordinator to stop, and wait until it says that it has; False when there was nobody to say it.

    Raises:
        TimeoutError: it took longer than *timeout* seconds.
    """
    try:
        client.ask(wire.STOP, drain, timeout=timeout, attach=0.0)
    except (FlowNotRunning, CoordinatorLost):
        return False
    return True


def _read_answer(descriptor: int, deadline: float) -> bytes:
    received: list[bytes] = []
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return b""
        block = os.read(descriptor, 1 << 16)
        if not block:
            return b"".join(received)
        received.append(block)
