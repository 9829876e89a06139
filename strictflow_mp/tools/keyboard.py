"""The keyboard: keys of the terminal as they are pressed, without Enter and without being shown.

Ctrl-Z is a key like any other here: whoever reads it puts the screen in order first, and then calls `suspend`.
"""

from __future__ import annotations

import os
import select
import signal
import termios
import time
import tty
from typing import Any

__all__ = ["CTRL_Z", "Keyboard"]

STDIN = 0
CTRL_Z = "\x1a"
SPECIAL = 6
"""Where `termios.tcgetattr` has the special characters."""


class Keyboard:
    """A context manager. Where standard input is no terminal, no key is ever pressed."""

    def __init__(self) -> None:
        self._has_keys = os.isatty(STDIN)
        self._before: list[Any] = []  # the terminal's settings, to be given back

    def __enter__(self) -> Keyboard:
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _take(self) -> None:
        if self._has_keys:
            self._before = termios.tcgetattr(STDIN)
            tty.setcbreak(STDIN)
            settings = termios.tcgetattr(STDIN)
            # No key suspends: the terminal would stop us at once, with the screen as it is.
            settings[SPECIAL][termios.VSUSP] = bytes([os.fpathconf(STDIN, "PC_VDISABLE") & 0xFF])
            termios.tcsetattr(STDIN, termios.TCSADRAIN, settings)

    def _give_back(self) -> None:
        if self._has_keys:
            termios.tcsetattr(STDIN, termios.TCSADRAIN, self._before)

    def wait(self, seconds: float, among: str) -> str:
        """The first key that is one of *among*; "" when none was pressed in that time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self._has_keys:
                time.sleep(left)
            elif select.select([STDIN], [], [], left)[0]:
                pressed = os.read(STDIN, 1).decode("latin-1")
                if not pressed:
                    raise EOFError("the terminal is gone")
                if pressed in among:
                    return pressed
        return ""

    def suspend(self) -> None:
        """Stop this process, and those that it shares a pipe with, as Ctrl-Z does; return when it goes on."""
        self._give_back()
        os.killpg(0, signal.SIGTSTP)
        self._take()
