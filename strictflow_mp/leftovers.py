"""Leftovers: what a coordinator that was killed could not remove, and who removes it.

Only the holder of a place's lock removes what its former resident left; so there is one cleaner, and none at
all while a coordinator lives.
"""

from __future__ import annotations

import os
import sys

from . import segment
from .errors import FlowExists
from .gate import condemn, semaphore_name
from .rendezvous import Lease, Place, Resident, places

__all__ = ["abandon", "remove", "sweep"]


def abandon(name: str) -> None:
    """Tell everybody who is attached that a dead coordinator does not come back; the state stays for the next start."""
    place = Place.of(name)
    if not place.directory.exists():
        return
    try:
        lease = Lease.take_place(place, name)
    except FlowExists:
        return
    try:
        if lease.former is not None:
            opened = segment.Segment.open(segment.PREFIX + lease.former.token)
            condemn(opened, lease.former.token)
            opened.close()
    finally:
        lease.release()


def remove(token: str) -> list[str]:
    """Remove the shared objects of the coordinator that had *token*; return their names.

    The caller holds the lock of the place where that coordinator lived.
    """
    import posix_ipc

    removed = []
    name = segment.PREFIX + token
    try:
        opened = segment.Segment.open(name)
        slots = opened.slots
        # Who is still attached must not go on reading a state that nobody changes any more.
        condemn(opened, token)
        opened.close()
        sys.audit("strictflow_mp.clean.condemned")
    except Exception:
        slots = 1 << 10  # damaged: its semaphores may have any number that we would give
    for slot in range(slots):
        try:
            posix_ipc.unlink_semaphore(semaphore_name(token, slot))
            removed.append(semaphore_name(token, slot))
            sys.audit("strictflow_mp.clean.semaphore")
        except posix_ipc.ExistentialError:
            pass
    if os.path.exists(f"/dev/shm/{name}"):
        removed.append("/" + name)
    segment.unlink(name)
    sys.audit("strictflow_mp.clean.unlinked")
    return removed


def sweep() -> list[tuple[str, Resident | None, list[str]]]:
    """Remove what dead flows of this user left; return (directory, resident, removed objects) for each.

    A flow that lives, or that somebody starts this very moment, is not touched.
    """
    swept = []
    for place in list(places()):
        resident = place.resident()
        if place.is_inhabited():
            continue
        name = resident.name if resident else None
        try:
            lease = Lease.take_place(place, name or place.directory.name)
        except FlowExists:
            continue
        removed = remove(lease.former.token) if lease.former else []
        lease.leave()
        swept.append((str(place.directory), resident, removed))
    return swept
