"""Reloading: how a process has the coordinator leave for the next one, and waits until that serves.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..memory.segment import W_RESTARTS
from ..wire.frames import RELOAD

if TYPE_CHECKING:
    from ..client.client import Client

__all__ = ["reload"]


def reload(client: Client) -> float:
    """Ask for a coordinator later than the one that serves now; return the seconds in which nobody ran tasks."""
    restarts = client.attach().segment.words[W_RESTARTS]
    began = time.monotonic()
    # It is asked again of the next one, as whatever has no answer: that answers.
    pause = client.ask(RELOAD, restarts)
    # It did not leave, but died in the meantime: it has not said when.
    return float(pause) if pause is not None else time.monotonic() - began
