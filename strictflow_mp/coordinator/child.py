"""The child: the end of a process that a task has forked, and that comes back from the task.

A task may fork: a pool, a daemon, a child that runs one function. There the flow is used from outside, as in any other
process (`coordinator.main.Coordinator`). But when the child returns from the task's function, or an exception takes it
out of it, it stands in the midst of its parent's work, with its parent's segment and connections. There it ends.

Written by: nobody: a child stores nothing in its parent's segment.
Order: it is ended at the first of these that it comes to: what marks that a task has ended or that one begins
    (`memory.suspect.Marker`), an answer, another round of the loop. All that is shared is stored after one of them.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

__all__ = ["end_child"]

STDERR_FD = 2
SUCCESS, FAILURE = 0, 1
_ADVICE = "a child that a task forked came back from the task, and was ended; let it end in the task, by os._exit()\n"


def end_child() -> NoReturn:
    """End this process, as an exception under way says: `SystemExit` by its code, any other by its traceback."""
    error = sys.exc_info()[1]
    code = FAILURE
    with suppress(BaseException):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    with suppress(BaseException):
        if error is None:
            code, text = SUCCESS, _ADVICE
        elif not isinstance(error, SystemExit):
            text = "".join(traceback.format_exception(error))
        elif error.code is None or isinstance(error.code, int):
            code, text = (error.code or SUCCESS) & 0xFF, ""
        else:
            text = f"{error.code}\n"
        os.write(STDERR_FD, text.encode(errors="backslashreplace"))
    os._exit(code)
