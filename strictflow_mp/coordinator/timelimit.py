"""The time limit: stops a task that runs too long, in the main thread of the coordinator.

A timer's signal raises an exception in the task. That interrupts Python code and waiting system calls. A call into C
that never returns, and a task that catches everything, are not stopped by it: `LAST_RESORT_SECONDS` later a thread of
faulthandler, which needs no GIL, writes the task's traceback to standard error and ends the process. The next
coordinator then knows from `suspect` whose time was up.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import faulthandler
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TimeLimit"]

STRIKE_SECONDS = 0.05
"""After which a task that swallowed the stop is stopped again."""
LAST_RESORT_SECONDS = 1.0
"""After the limit, when the process is ended, for nothing else helps."""
STDERR_FD = 2


class _Overrun(BaseException):
    """Raised inside the task; no Exception, so that an ordinary handler in the task does not catch it."""


class TimeLimit:
    """Owns SIGALRM and the real-time timer of this process."""

    def __init__(self) -> None:
        # True only while a task runs in `call`: a signal that comes later strikes nobody.
        self._is_armed = False
        # Whether it struck the task of the last `call`: then the task has overrun, whatever it returned or raised.
        self._has_struck = False
        signal.signal(signal.SIGALRM, self._strike)

    def call(self, seconds: float, function: Callable[[], Any]) -> tuple[bool, Any]:
        """Call; return (whether it kept the limit, what it returned). A task that swallows the stop has not."""
        self._has_struck = False
        result = None
        try:
            try:
                # Before the timer: a signal that finds it False is lost.
                self._is_armed = True
                try:
                    faulthandler.dump_traceback_later(seconds + LAST_RESORT_SECONDS, exit=True, file=STDERR_FD)
                except (RuntimeError, MemoryError):
                    pass  # out of threads: the timer alone has to do
                signal.setitimer(signal.ITIMER_REAL, seconds, STRIKE_SECONDS)
                result = function()
            finally:
                self._disarm()
        except _Overrun:
            self._disarm()  # it may have struck before the first one was through
        except Exception:
            if not self._has_struck:
                raise
        return not self._has_struck, result

    def _disarm(self) -> None:
        # This first: a signal that is on its way then strikes nobody.
        self._is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()

    def _strike(self, number: int, frame: Any) -> None:
        if self._is_armed:
            self._has_struck = True
            raise _Overrun

    def __repr__(self) -> str:
        return f"<TimeLimit {'armed' if self._is_armed else 'idle'}>"
