"""Stopping: how a process asks a coordinator to stop, and keeps its own time whatever that does.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import concurrent.futures
import time
from typing import TYPE_CHECKING

from ..client.comeback import RESTART_SECONDS
from ..client.reaching import Pauses
from ..errors import CoordinatorLost, FlowNotRunning, TaskTimeout
from ..memory.segment import PREFIX, SERVING, W_STATUS
from ..memory.succession import has_successor, owner_of
from ..system.identity import Identity
from ..wire import frames
from .supervisor import owns, segment_of

if TYPE_CHECKING:
    from ..client.client import Client
    from ..system.place import Place

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
    """Ask the coordinator of whatever flow has the name to stop, whoever has started it; the next one, if it is dead.

    Raises:
        TaskTimeout: it has not in that time.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        _ask_whoever_comes(client, drain=drain, deadline=deadline)
    except (TimeoutError, concurrent.futures.TimeoutError):  # two classes before Python 3.11
        raise TaskTimeout(
            f"it has not ended {timeout:g} s after the stop; if its coordinator was asked, it ends after its "
            "tasks; only the process that started it can kill it",
            flow=client.name,
        ) from None


def _ask_whoever_comes(client: Client, *, drain: bool, deadline: float | None) -> None:
    """As an attached process does, for as long as another coordinator may come; at once when none will.

    Raises:
        TimeoutError: none has stopped by the deadline.
    """
    pauses = Pauses()
    place = client.place  # a loss of the connection, or a close in another thread, leads to no other flow
    patience_ends = time.monotonic() + RESTART_SECONDS
    last = (0, 0)
    while not ask_to_stop(client, drain=drain, deadline=deadline) and _may_be_followed(place):
        resident = place.resident()
        sign = (resident.pid if resident is not None else 0, place.sign_of_life())
        if sign[0] == last[0] and sign != last:  # that takeover goes on; that another one has begun is no progress
            patience_ends = time.monotonic() + RESTART_SECONDS
        last = sign
        if has_passed(deadline):
            raise TimeoutError
        if has_passed(patience_ends):
            return
        pauses.sleep(deadline)


def _may_be_followed(place: Place) -> bool:
    """Nobody could be asked: whether one takes over there, or an owner lives who starts the next one."""
    segment = segment_of(place)
    if segment is None:
        return False
    try:
        if segment.words[W_STATUS] != SERVING:
            return False  # it was stopped or given up, or has never begun
        owner, _ = owner_of(segment)
        if owner == Identity.mine() and not owns(place):
            return False  # a program that this process has replaced
        # In this order: the next one takes the lock, then puts back the word that says that the last one left.
        if has_successor(segment):
            return True
        resident = place.resident() if place.is_inhabited() else None
        return resident is not None and not resident.identity.is_dead()  # a child of a dead one may have its lock
    finally:
        segment.close()


def has_passed(deadline: float | None) -> bool:
    """Whether a deadline is over; None never is."""
    return deadline is not None and time.monotonic() >= deadline
