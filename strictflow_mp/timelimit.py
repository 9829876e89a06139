"""The time limit: stops a task that runs too long, in the main thread of the coordinator.

A timer's signal raises an exception in the task. That interrupts Python code and waiting system calls, but not
a call into C that never returns.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

__all__ = ["TimeLimit"]

AGAIN = 0.05
"""Seconds after which a task that swallowed the stop is stopped again."""


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

    def _strike(self, number: int, frame: Any) -> None:
        if self._is_armed:
            self._has_struck = True
            raise _Overrun

    def __repr__(self) -> str:
        return f"<TimeLimit {'armed' if self._is_armed else 'idle'}>"
