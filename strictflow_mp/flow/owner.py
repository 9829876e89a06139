"""The owner: the process that started a coordinator, that starts the next one when it dies, and that stops it.

What tells it of the death is in `supervisor`.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..errors import FlowExists, FlowNotRunning, ProtocolError, StrictFlowError, TaskTimeout
from ..memory import leftovers
from ..memory.segment import SERVING, W_STATUS
from ..system.lease import Lease
from ..system.place import Place
from .starting import END_SECONDS, start_coordinator
from .stopping import ask_to_stop, has_passed
from .supervisor import Supervisor

if TYPE_CHECKING:
    from ..client.client import Client
    from ..system.launch import Child

__all__ = ["Owner"]

LOOK_SECONDS = 0.005
"""Seconds between two looks whether the next coordinator serves."""


class Owner:
    """A coordinator process that this process started."""

    def __init__(self, name: str, place: Place, options: dict[str, Any], child: Child) -> None:
        self.name = name
        self.place = place  # never looked up again: user, environment and working directory may change
        self.pid = os.getpid()  # a forked child has a copy of this: it is no owner
        self._options = options  # of the next coordinator
        # The coordinator that was started last; it may have ended. Replaced by the watcher alone, while `_changing` is
        # held.
        self._child = child
        # In the names of all that the coordinator made; each next one that finds the state goes on under the same.
        resident = place.resident()
        self._token = resident.token if resident is not None else ""
        self._changing = threading.Lock()  # held while the next one is started, and while it is decided to end
        # The next one, from its start until it serves; set by the watcher. Who stops in haste kills it.
        self._newborn: Child | None = None
        # Set for good when a stop begins: the next one, which must be asked, is started without a pause.
        self._is_stopping = threading.Event()
        self._is_ending = False  # True for good: nobody starts another one
        self._watcher: Supervisor | None = None  # None until it has been started

    @classmethod
    def start(cls, name: str, options: dict[str, Any]) -> Owner:
        """Start a coordinator; return when it serves. It is restarted if `options` say so.

        Raises:
            FlowExists: one lives under that name.
            StateFull: there is no room for the first state.
        """
        place = Place.of(name)
        options = {**options, "place": str(place.directory)}
        is_new = not options["recover"] or place.resident() is None
        child = start_coordinator(name, options)
        watcher: Supervisor | None = None
        try:
            # The next coordinator finds the state in shared memory.
            owner = cls(name, place, {**options, "state": {}}, child)
            owner._watcher = watcher = Supervisor(owner)
            watcher.start()
        except BaseException:  # out of descriptors or threads: nobody would know that it runs
            if watcher is not None:
                watcher.forget()
            # Asked to stop, it removes all that is its own, which needs none of ours; a state that was there before
            # stays for the next start.
            child.send_signal(signal.SIGTERM if is_new else signal.SIGKILL)
            if child.wait(END_SECONDS) is None:
                child.kill()
                child.wait()
            raise
        return owner

    @property
    def is_alive(self) -> bool:
        """Whether the coordinator runs, or is about to run again."""
        if self.pid != os.getpid():
            return False
        return self._child.exitcode is None or (self._watcher is not None and self._watcher.is_watching)

    def wait(self, timeout: float) -> bool:
        """Wait up to *timeout* seconds for the coordinator's end; whether it has come, for good."""
        deadline = time.monotonic() + timeout
        while self._child.wait(max(0.0, deadline - time.monotonic())) is not None:
            if not self.is_alive:
                return True
            # The watcher has not seen it yet, or starts the next one.
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(LOOK_SECONDS, left))
        return False

    # For the watcher

    @property
    def child(self) -> Child:
        """The coordinator as it is now."""
        return self._child

    def replace(self, pause: float, has_left: bool = False) -> bool:
        """The coordinator has ended: start the next one, unless it was stopped. Whether there is one.

        Args:
            has_left: it ended for that.
        """
        if not (has_left or self._options["restart"]):
            return False
        with self._changing:
            if self._is_ending or (self._child.exitcode == 0 and self._has_moved_out()):
                return False
            about = {"flow": self.name, "peer": self._child.pid, "exit_code": self._child.exitcode}
            if not has_left:
                logger.warning("flow %r: its coordinator ended with %s", self.name, self._child.exitcode, extra=about)
            self._is_stopping.wait(pause)
            try:
                options = {**self._options, "recover": True, "is_restart": True, "token": self._token}
                self._child = start_coordinator(self.name, options, self._has_begun)
            except FlowExists:
                # Whoever only looks whether anybody lives here has the lock for an instant, which may be long on a busy
                # machine: then it still names the dead one, and we try again. Else somebody was faster: it is theirs.
                return self._is_dead_ones()
            except Exception as error:
                if isinstance(error, FlowNotRunning) and self._has_moved_out():
                    # It died while it stopped; what was left is removed. Or there is nobody to follow.
                    self._tell_that_it_has_ended(error)
                    return False
                about = {"flow": self.name, "error": type(error).__name__}
                logger.error("flow %r: its coordinator could not be restarted: %s", self.name, error, extra=about)
                if isinstance(error, ProtocolError):  # its place is not ours: that will not change
                    self.give_up("cannot be followed")
                    return False
            finally:
                self._newborn = None
        return True

    def _has_begun(self, child: Child) -> None:
        self._newborn = child
        if self._is_ending:
            child.kill()  # `_end` may have looked before this

    def _has_moved_out(self) -> bool:
        """Whether the coordinator stopped of its own will, and so removed all that was its own.

        Its exit code alone does not say so: where somebody else waits for any child of this process, as gunicorn's
        master does, or SIGCHLD is ignored, `subprocess` reports 0 for whatever end it had.
        """
        try:
            self.place.lock.lstat()
            resident = self.place.resident()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # we may not look there any more, or are out of descriptors: it is ours as far as we know
        return resident is None or resident.token != self._token

    def _is_dead_ones(self) -> bool:
        """Whether the lock's file names one that is dead, of our flow."""
        try:
            resident = self.place.resident()
        except OSError:
            return True  # out of descriptors
        return resident is not None and resident.token == self._token and resident.identity.is_dead()

    def _tell_that_it_has_ended(self, error: FlowNotRunning) -> None:
        """Nobody finds the state any more, but those who are attached: they may not read it for ever."""
        segment = self._watcher.segment if self._watcher is not None else None
        if segment is not None and segment.words[W_STATUS] == SERVING:
            logger.error("flow %r: its coordinator is not restarted: %s", self.name, error, extra={"flow": self.name})
            # No lock is held: what names this token is gone, so no other process can be at it.
            leftovers.condemn(segment, self._token)

    def give_up(self, why: str) -> None:
        """Start no other one: tell everybody, and leave the state for the next start."""
        logger.error("flow %r: its coordinator %s; given up", self.name, why, extra={"flow": self.name})
        try:
            leftovers.abandon(self.place, self.name)
        except (OSError, StrictFlowError) as error:  # we may not look there any more
            about = {"flow": self.name, "error": type(error).__name__}
            logger.error("flow %r: those who are attached could not be told: %s", self.name, error, extra=about)

    def stop(self, client: Client, *, drain: bool, timeout: float | None) -> None:
        """Stop the coordinator and see to it that nothing is left.

        Raises:
            TaskTimeout: tasks still ran after *timeout* seconds; they were killed and rolled back.
        """
        began = time.monotonic()
        deadline = None if timeout is None else began + timeout
        self._is_stopping.set()
        client.keep(self.place)
        has_begun = self._ask(client, drain=drain, deadline=deadline)
        self._end(deadline)
        left = END_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
        killed = self._child.wait(left) is None
        if killed:
            self._kill()
        client.is_stopped = True
        self._clean()  # before our end is closed: threads of ours that wait for the next one hear that there is none
        client.close()
        client.is_stopped = True
        if killed:
            what = "tasks still ran" if has_begun else "the coordinator had not answered"
            raise TaskTimeout(
                f"{what} {time.monotonic() - began:.3g} s after the stop; the coordinator was killed, and the tasks "
                "that it had not committed were rolled back",
                flow=self.name,
            )

    def _kill(self) -> None:
        try:
            self._child.kill()
        except PermissionError:
            raise StrictFlowError(
                f"its coordinator (pid {self._child.pid}) did not stop, and may not be killed by this process, which "
                "has become another user since it started it; stop the flow before that, or as the former user",
                flow=self.name,
            ) from None
        self._child.wait()

    def _terminate(self, child: Child) -> None:
        try:
            child.terminate()
        except PermissionError:
            pass  # `_kill` will say so

    def _ask(self, client: Client, *, drain: bool, deadline: float | None) -> bool:
        """Ask the coordinator to stop, and the next one when it dies before it has: what was queued is still finished.

        Returns, at the deadline at the latest, whether one was asked.
        """
        while True:
            child = self._child
            try:
                if ask_to_stop(client, drain=drain, deadline=deadline, token=self._token):
                    return True
            except (TimeoutError, concurrent.futures.TimeoutError):  # two classes before Python 3.11
                return client.is_attached
            except StrictFlowError:
                self._terminate(child)  # it does not take us: a signal says the same
                return True
            if child.exitcode is None and not has_passed(deadline) and self._newborn is None:
                # Our connection was gone, and it lets nobody in any more; it may be about to end.
                self._terminate(child)
                return True
            # It is dead. Is there a next one?
            while self._child is child and self._watcher is not None and self._watcher.is_watching:
                if has_passed(deadline):
                    return False
                time.sleep(LOOK_SECONDS)
            if self._child is child:
                return False

    def _end(self, deadline: float | None) -> None:
        """See to it that nobody starts the coordinator again; one that is just being started is given its time."""
        if not self._changing.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            self._is_ending = True
            newborn = self._newborn
            if newborn is not None:
                newborn.kill()
            self._changing.acquire()
        self._is_ending = True  # from now on nobody starts it again
        self._changing.release()
        if self._watcher is not None:
            self._watcher.end()

    def _clean(self) -> None:
        """Remove what a coordinator that was killed left behind."""
        try:
            if not self.place.directory.exists():
                return
            lease = Lease.take_place(self.place, self.name)
        except FlowExists:
            return  # somebody has started the next one
        except (OSError, StrictFlowError) as error:  # we may not look there any more
            about = {"flow": self.name, "error": type(error).__name__}
            logger.error("flow %r: what its dead coordinator left is not removed: %s", self.name, error, extra=about)
            return
        if lease.former is not None and lease.former.token == self._token:
            leftovers.remove(lease.former.token)
            lease.leave()
        elif lease.former is None:
            lease.leave()
        else:
            lease.release()

    def __repr__(self) -> str:
        return f"<Owner of {self.name!r}, coordinator {self._child!r}>"
