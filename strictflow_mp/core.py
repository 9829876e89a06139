"""The library's logger, and the priority that its lines carry.

The names are those of the thread library StrictFlow, so that ``from strictflow_mp.core import logger`` and
``setup_logging`` work as they did there.

Every record carries fields for handlers that write them apart (JSON, OpenTelemetry): see `FIELDS`.
"""

from __future__ import annotations

import contextvars
import logging
import sys
import threading

__all__ = ["FIELDS", "READ_PRIORITY", "WRITE_PRIORITY", "logger", "priority", "setup_logging"]

WRITE_PRIORITY = 1
"""P1."""
READ_PRIORITY = 2
"""P2."""

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

_flow: str | None = None


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

_level: int | None = None


def _annotate(record: logging.LogRecord) -> bool:
    record.flow_priority = priority.get() or "-"
    from multiprocessing import current_process  # loading it takes 15 ms, which only log lines need

    thread = threading.current_thread()
    is_main = thread is threading.main_thread()
    record.place = current_process().name if is_main else thread.name
    return True


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
    handler = logging.StreamHandler(sys.stdout)
    handler.is_strictflow = True  # type: ignore[attr-defined]
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(_annotate)
    logger.addHandler(handler)
    logger.propagate = False


def configured_level() -> int | None:
    """The level that `setup_logging` set, or None: what a process started from here takes over."""
    return _level
