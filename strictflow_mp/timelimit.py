"""The time limit: stops a task that runs too long, in the main thread of the coordinator.

A timer's signal raises an exception in the task. That interrupts Python code and waiting system calls. A call into C
that never returns, and a task that catches everything, are not stopped by it: `LAST` seconds later a thread of
faulthandler, which needs no GIL, writes the task's traceback to standard error and ends the process. The next
coordinator then knows from `suspect` whose time was up.
"""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable
from typing import Any

__all__ = ["TimeLimit"]

AGAIN = 0.05
"""Seconds after which a task that swallowed the stop is stopped again."""
LAST = 1.0
"""Seconds after which the process is ended, for nothing else helps."""
STDERR = 2


class _Overrun(BaseException):
    """Raised inside the task; no Exception, so that an ordinary handler in the task does not catch it."""


class TimeLimit:
    """Owns SIGALRM and the real-time timer of this process."""

    def __init__(self) -> None:
        self._is_armed = False
        self._has_struck = False
        signal.signal(signal.SIGALRM, self._strike)

    def call(self, seconds: float, function: Callable[[], Any]) -> tuple[bool, Any]:
        """Call; return (whether it kept the limit, what it returned). A task that swallows the stop has not."""
        self._has_struck = False
        result = None
        try:
            try:
                self._is_armed = True
                faulthandler.dump_traceback_later(seconds + LAST, exit=True, file=STDERR)
                signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
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
