"""Stopping: how a process asks a coordinator to stop, and keeps its own time whatever that does.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import concurrent.futures
import time
from typing import TYPE_CHECKING

from ..errors import CoordinatorLost, FlowNotRunning, TaskTimeout
from ..memory.segment import PREFIX
from ..wire import frames

if TYPE_CHECKING:
    from ..client.client import Client

__all__ = ["ask_to_stop", "has_passed", "stop_anybodys"]

FOREVER_SECONDS = 1e6
"""Seconds of a wait that has no limit, where a limit must be said."""


def ask_to_stop(client: Client, *, drain: bool, deadline: float | None, token: str | None = None) -> bool:
    """Ask a coordinator to stop, and wait until it says that it has; False when there was nobody to say it.

    Args:
        deadline: on `time.monotonic`'s clock.
        token: of the flow that is meant: another one of the same name is not stopped. None: whoever has the name.

    Raises:
        TimeoutError: it has not by then.
    """
    try:
        latest = time.monotonic() + FOREVER_SECONDS if deadline is None else deadline
        attachment = client.attach(0.0, max(0.0, latest - time.monotonic()))
        if token is not None and attachment.segment.name != PREFIX + token:
            return False
        client.ask_in_time(latest, frames.STOP, drain)
    except (FlowNotRunning, CoordinatorLost):
        if has_passed(deadline):
            raise TimeoutError from None  # somebody may have been there all the time
        return False
    return True


def stop_anybodys(client: Client, *, drain: bool, timeout: float | None) -> None:
    """Ask the coordinator of whatever flow has the name to stop, whoever has started it.

    Raises:
        TaskTimeout: it has not in that time.
    """
    try:
        ask_to_stop(client, drain=drain, deadline=None if timeout is None else time.monotonic() + timeout)
    except (TimeoutError, concurrent.futures.TimeoutError):  # two classes before Python 3.11
        raise TaskTimeout(
            f"it has not ended {timeout:g} s after the stop; if its coordinator was asked, it ends after its "
            "tasks; only the process that started it can kill it",
            flow=client.name,
        ) from None


def has_passed(deadline: float | None) -> bool:
    """Whether a deadline is over; None never is."""
    return deadline is not None and time.monotonic() >= deadline
