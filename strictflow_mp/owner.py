"""The owner: the process that started a coordinator, and that stops it."""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import select
import time
from typing import Any

from . import leftovers, wire
from .client import Client
from .core import configured_level
from .errors import CoordinatorLost, FlowExists, FlowNotRunning, StrictFlowError, TaskTimeout
from .processes import Child, Identity, launch
from .rendezvous import Lease, Place

__all__ = ["Owner"]

START = 30.0
"""Seconds that a coordinator may take to start."""
END = 15.0
"""Seconds that it may take to end after its last task."""


class Owner:
    """A coordinator process that this process started."""

    def __init__(self, name: str, child: Child) -> None:
        self.name = name
        self._child = child
        self.pid = os.getpid()

    @classmethod
    def start(cls, name: str, options: dict[str, Any], *, owned: bool = True) -> Owner:
        """Start a coordinator; return when it serves.

        Raises:
            FlowExists: one lives under that name.
            StateFull: there is no room for the first state.
        """
        readable, writable = os.pipe()
        try:
            me = Identity.mine()
            child = launch(
                "strictflow_mp.coordinator:main",
                {
                    **options,
                    "name": name,
                    "ready": writable,
                    "owner": (me.pid, me.start, me.boot) if owned else None,
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
        return cls(name, child)

    @property
    def is_alive(self) -> bool:
        """Whether the coordinator still runs."""
        return self.pid == os.getpid() and self._child.exitcode is None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the coordinator's end; whether it has come."""
        return self._child.wait(timeout) is not None

    def stop(self, client: Client, *, drain: bool, timeout: float | None) -> None:
        """Stop the coordinator and see to it that nothing is left.

        Raises:
            TaskTimeout: tasks still ran after *timeout* seconds; they were killed and rolled back.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            if not ask_to_stop(client, drain=drain, timeout=timeout) and not ask_to_stop(
                client, drain=drain, timeout=timeout
            ):
                self._child.terminate()  # our connection was gone, and so is the next: a signal says the same
        except (TimeoutError, concurrent.futures.TimeoutError):  # two classes before Python 3.11
            pass
        except StrictFlowError:
            self._child.terminate()  # it does not take us
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
        if lease.former is not None and lease.former.pid == self._child.pid:
            leftovers.remove(lease.former.token)
            lease.leave()
        elif lease.former is None:
            lease.leave()
        else:
            lease.release()

    def __repr__(self) -> str:
        return f"<Owner of {self.name!r}, coordinator {self._child!r}>"


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
