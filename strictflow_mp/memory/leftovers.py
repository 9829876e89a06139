"""Leftovers: what a coordinator that was killed could not remove, and who removes it.

Owns: the segment, the semaphores and the words of a coordinator that is proved dead.
Written by: the holder of the lock of its place, and nobody else: so there is one cleaner, and none at all while a
    coordinator lives. It stores STATUS, SUBMITTED of slot 0 and SEMAPHORES, no
    other word.
Read by: whoever is still attached to that flow.
Order: the flow is condemned first, so that nobody reads a state for ever that nobody changes any more; then the
    semaphores go, then the segment, then the directory. STATUS, *fence*, the flag, *fence*, look at WAITING, post.
If we die here: the lock's file still names the dead one, so the next cleaner, or the next start, does it all again;
    what is gone already is no error.
Invariants: while the lock's file names a token, whatever has that token in its name can be found.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import glob
import os
import sys
from typing import NamedTuple

from ..errors import FlowExists
from ..system import posix
from ..system.lease import Lease
from ..system.place import Place, Resident, places
from .fences import fence, publish_fence
from .segment import CONDEMNED, PREFIX, SERVING, W_STATUS, Segment, unlink_segment
from .semaphores import semaphore_name, unlink_semaphore

__all__ = ["Swept", "abandon", "condemn", "remove", "sweep"]


class Swept(NamedTuple):
    """What was removed of one dead flow."""

    directory: str
    resident: Resident | None
    """Who lived there last; None when the lock's file does not say."""
    objects: list[str]
    """The names of its shared objects."""


def condemn(segment: Segment, token: str) -> None:
    """End the flow of a coordinator that is proved dead: whoever is still attached finds out at its next read.

    The caller holds the lock of the place, and is thereby the one writer of the dead coordinator's words.
    """
    words = segment.words
    if words[W_STATUS] == SERVING:
        words[W_STATUS] = CONDEMNED
    # Store-store: the flag that never falls may not be seen before the STATUS that says why. Pairs with
    # `memory.gate.Gate._lead`, which looks at STATUS after it has seen the flag.
    publish_fence()
    own = segment.slot(0)
    own.submitted = own.finished + 1
    # Store-load: the look at WAITING may not be done while the two are in our store buffer. Pairs with
    # `memory.gate.Gate._lead`, as the fence of `memory.gatekeeper.GateKeeper.wake` does.
    fence()
    for slot, waiting in enumerate(words[segment.waiting : segment.waiting + segment.slots].tolist()):
        if waiting:
            try:
                semaphore = posix.Semaphore(semaphore_name(token, slot, segment.slot(slot).semaphore))
            except (posix.ExistentialError, posix.PermissionsError):
                continue
            semaphore.release()
            semaphore.close()


def abandon(place: Place, name: str) -> None:
    """Tell everybody who is attached that a dead coordinator does not come back; the state stays for the next start."""
    if not place.directory.exists():
        return
    try:
        lease = Lease.take_place(place, name)
    except FlowExists:
        return
    try:
        if lease.former is not None:
            segment = Segment.open(PREFIX + lease.former.token)
            condemn(segment, lease.former.token)
            segment.close()
    finally:
        lease.release()


def remove(token: str) -> list[str]:
    """Remove the shared objects of the coordinator that had *token*; return their names.

    The caller holds the lock of the place where that coordinator lived.
    """
    removed = []
    name = PREFIX + token
    try:
        segment = Segment.open(name)
        # Whoever is still attached must not go on reading a state that nobody changes any more.
        condemn(segment, token)
        sys.audit("strictflow_mp.clean.condemned")
    except Exception:
        removed += _remove_by_name(token)  # it is damaged, or was never there
    else:
        for slot in range(segment.slots):
            semaphore = unlink_semaphore(token, segment.slot(slot))
            if semaphore is not None:
                removed.append(semaphore)
                sys.audit("strictflow_mp.clean.semaphore")
        segment.close()
    if os.path.exists(f"/dev/shm/{name}"):
        removed.append("/" + name)
    unlink_segment(name)
    sys.audit("strictflow_mp.clean.unlinked")
    return removed


def _remove_by_name(token: str) -> list[str]:
    """Remove the semaphores that have *token* in their names, where the names can be listed."""
    removed = []
    for path in glob.glob(f"/dev/shm/sem.{PREFIX}{glob.escape(token)}.*"):
        name = "/" + os.path.basename(path).removeprefix("sem.")
        try:
            posix.unlink_semaphore(name)
            removed.append(name)
        except posix.Error:
            pass  # it is gone, or another user's
    return removed


def sweep() -> list[Swept]:
    """Remove what dead flows of this user left; return what was removed of each.

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
        swept.append(Swept(str(place.directory), resident, removed))
    return swept
