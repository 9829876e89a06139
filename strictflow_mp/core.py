"""The library's logger, and the priority that its lines carry.

The names are those of the thread library StrictFlow, so that ``from strictflow_mp.core import logger`` and
``setup_logging`` work as they did there.

Every record carries fields for handlers that write them apart (JSON, OpenTelemetry): see `FIELDS`.
"""

from __future__ import annotations

import contextvars
import logging
import select
import sys
import threading
from typing import Any

__all__ = [
    "FIELDS",
    "READ_PRIORITY",
    "WRITE_PRIORITY",
    "configured_level",
    "logger",
    "priority",
    "serve",
    "setup_logging",
]

WRITE_PRIORITY = 1
"""P1: a task that may change the state. It runs alone, before every P2 that has not begun."""
READ_PRIORITY = 2
"""P2: a task that only reads."""

logger = logging.getLogger("strictflow_mp")
logger.addHandler(logging.NullHandler())

priority: contextvars.ContextVar[int | None] = contextvars.ContextVar("strictflow_mp.priority", default=None)
"""The priority of the task that runs here: 1, 2, or None outside tasks."""

FIELDS = ("flow", "priority", "task", "version", "error", "peer", "slot", "restarts", "exit_code")
"""Attributes of each record of `logger`; None where they say nothing.

flow: its name. In SF-LOOP always, elsewhere where a line speaks of one.
priority: 1 or 2 in a task, None outside.
task: the name of the task that the line speaks of.
version: the committed version.
error: the type of the exception.
peer, slot: the pid and the slot of the process that the line speaks of.
restarts: how often the coordinator, or a worker, has been started again.
exit_code: that of a process that has ended; negative for a signal.
"""

_flow: str | None = None  # set once, in the coordinator's process


def serve(flow: str) -> None:
    """From now on this process's lines are those of that flow."""
    global _flow
    _flow = flow


def _complete(record: logging.LogRecord) -> bool:
    fields = record.__dict__
    fields.setdefault("flow", _flow)
    fields.setdefault("priority", priority.get())
    for name in FIELDS:
        fields.setdefault(name, None)
    return True


logger.addFilter(_complete)

_FORMAT = "[%(asctime)s.%(msecs)03d] %(levelname)-8s %(place)-12s (P%(flow_priority)s) %(message)s"

_level: int | None = None  # what `setup_logging` was given last; None before that


def _annotate(record: logging.LogRecord) -> bool:
    record.flow_priority = priority.get() or "-"
    from multiprocessing import current_process  # loading it takes 15 ms, and only log lines need it

    thread = threading.current_thread()
    is_main = thread is threading.main_thread()
    record.place = current_process().name if is_main else thread.name
    return True


FULL_MS = 100
"""Milliseconds that a log line waits for room where it is printed; when there is none, it and the next are dropped."""


class _Printer(logging.StreamHandler):  # type: ignore[type-arg]  # no [TextIO] at runtime before 3.11
    """Prints lines, and holds nobody up when nobody reads them: they are dropped, and counted."""

    is_strictflow = True

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        # Lines since the last one that found room.
        self._dropped = 0
        # None: the stream is no file, or takes whatever it is given (`system.outlet`).
        self._poll: select.poll | None = None
        if not getattr(getattr(getattr(stream, "buffer", None), "raw", None), "never_waits", False):
            try:
                descriptor = stream.fileno()
            except (AttributeError, OSError, ValueError):
                return
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line if there is room."""
        if self._poll is not None and not self._poll.poll(0 if self._dropped else FULL_MS):
            self._dropped += 1
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            try:
                self.stream.write(f"strictflow-mp: {dropped} lines were dropped here: nobody read them\n")
            except Exception:
                self.handleError(record)
        super().emit(record)


def setup_logging(level: int | str = logging.INFO) -> None:
    """Print the library's log lines to standard output, from *level* on.

    Each line carries the time, the level, the process or thread (``SF-LOOP`` is the coordinator) and the
    priority, ``(P1)`` or ``(P2)``. Call it before the flow starts: the coordinator and the workers that the
    flow spawns take the level over. Calling it again changes the level.
    """
    global _level
    logger.setLevel(level)
    _level = logger.level
    for handler in logger.handlers:
        if getattr(handler, "is_strictflow", False):
            return
    handler = _Printer(sys.stdout)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(_annotate)
    logger.addHandler(handler)
    logger.propagate = False


def configured_level() -> int | None:
    """The level that `setup_logging` set, or None: what a process started from here takes over."""
    return _level
