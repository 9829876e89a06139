"""The keyboard: keys of the terminal as they are pressed, without Enter and without being shown.

Ctrl-Z is a key like any other here: who reads it puts the screen in order first, and then calls `suspend`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from typing import Any

__all__ = ["CTRL_Z", "Keyboard"]

CTRL_Z = "\x1a"
SPECIAL = 6
"""Where `termios.tcgetattr` has the special characters."""


class Keyboard:
    """A context manager. Where standard input is no terminal, no key is ever pressed."""

    def __init__(self) -> None:
        self._descriptor = sys.stdin.fileno() if sys.stdin.isatty() else -1
        self._before: list[Any] = []

    def __enter__(self) -> Keyboard:
        if self._descriptor >= 0:
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)
            settings = termios.tcgetattr(self._descriptor)
            settings[SPECIAL][termios.VSUSP] = bytes([os.fpathconf(self._descriptor, "PC_VDISABLE") & 0xFF])
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, settings)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def wait(self, seconds: float, among: str) -> str:
        """The first key that is one of *among*; "" when none was pressed in that time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._descriptor < 0:
                time.sleep(left)
            elif select.select([self._descriptor], [], [], left)[0]:
                pressed = os.read(self._descriptor, 1).decode("latin-1")
                if not pressed:
                    raise EOFError("the terminal is gone")
                if pressed in among:
                    return pressed
        return ""

    def suspend(self) -> None:
        """Stop this process, and those that it shares a pipe with, as Ctrl-Z does; return when it goes on."""
        self.__exit__()
        os.killpg(0, signal.SIGTSTP)
        self.__enter__()
