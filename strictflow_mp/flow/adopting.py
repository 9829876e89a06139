"""Adopting: how a process becomes the owner of a flow whose owner has died, and whose coordinator lives.

The orphan is asked to leave, and the newcomer starts the next coordinator, as its own child, on the same state: what is
attached comes back to that as after a reload.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..errors import CoordinatorLost, FlowExists, FlowNotRunning, StrictFlowError
from ..memory.succession import owner_of
from ..system.identity import Identity
from ..system.place import Place
from ..wire.frames import ADOPT
from .owner import Owner
from .starting import END_SECONDS
from .supervisor import owns, segment_of

if TYPE_CHECKING:
    from ..client.client import Client

__all__ = ["start_or_adopt"]

LOOK_SECONDS = 0.01
"""Seconds between two looks whether the orphan has left."""


def start_or_adopt(name: str, options: dict[str, Any], client: Client) -> Owner:
    """Start a coordinator; where an orphan serves, start the next one in its place.

    Raises:
        FlowExists: one lives under that name, and so does its owner; or its state is to be discarded.
        StateFull: there is no room for the first state.
    """
    try:
        return Owner.start(name, options)
    except FlowExists:
        if not options["recover"] or not _adopted(name, options, client):
            raise
    place, deadline = Place.of(name), time.monotonic() + END_SECONDS
    while True:
        if place.is_inhabited() and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            continue
        try:
            return Owner.start(name, options)
        except FlowExists:
            if time.monotonic() >= deadline:
                raise


def _adopted(name: str, options: dict[str, Any], client: Client) -> bool:
    """Whether the coordinator that lives there takes us for its owner, and leaves for us."""
    if not _is_orphan(Place.of(name)):
        return False
    try:
        client.ask(ADOPT, options["restart"])
    except (FlowNotRunning, CoordinatorLost):
        pass  # it has ended in the meantime
    except StrictFlowError:
        return False  # another newcomer was faster, or it does not let us in
    return True


def _is_orphan(place: Place) -> bool:
    """Whether its owner is proved dead; or is a program that this process has replaced."""
    segment = segment_of(place)
    if segment is None:
        return False
    try:
        owner, _ = owner_of(segment)
    finally:
        segment.close()
    return owner is not None and (owner.is_dead() or (owner == Identity.mine() and not owns(place)))
