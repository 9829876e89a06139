"""The library's logger, and the priority that its lines carry.

The names are those of the thread library StrictFlow, so that ``from strictflow_mp.core import logger`` and
``setup_logging`` work as they did there.
"""

from __future__ import annotations

import contextvars
import logging
import sys
import threading

__all__ = ["READ_PRIORITY", "WRITE_PRIORITY", "logger", "priority", "setup_logging"]

WRITE_PRIORITY = 1
"""P1."""
READ_PRIORITY = 2
"""P2."""

logger = logging.getLogger("strictflow_mp")
logger.addHandler(logging.NullHandler())

priority: contextvars.ContextVar[int | None] = contextvars.ContextVar("strictflow_mp.priority", default=None)
"""The priority of the task that runs here: 1, 2, or None outside tasks."""

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
