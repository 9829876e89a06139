"""Succession: who would start the next coordinator, and when; and when the last one left for that.

Owns: the words OWNERS, OWNER_PID, OWNER_START, OWNER_SPACE, OWNER_STARTS, RELOADS and LEFT.
Written by: the coordinator: at its start, when another process adopts the flow, and LEFT as the last thing that it does
    before it ends so that the next one is started.
Read by: every attached process when nobody serves (is it worth to wait?); the owner when its coordinator has ended (was
    that a reload?); whoever would adopt the flow.
Order: OWNERS is odd while the words behind it change: odd, *fence*, the words, *fence*, even. A reader looks at OWNERS
    before and after. LEFT is stored when no task runs and nothing is to be committed any more.
If we die here: with OWNERS odd, who the owner is is not known, and it counts as alive; the next coordinator stores them
    anew. With LEFT stored, the owner starts the next one, which puts it back to 0 before anything else.
Invariants: LEFT is 0 while a coordinator serves.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..system.identity import Identity
from .fences import fence, publish_fence
from .segment import (
    W_LEFT,
    W_OWNER_PID,
    W_OWNER_SPACE,
    W_OWNER_START,
    W_OWNER_STARTS,
    W_OWNERS,
    W_RELOADS,
)

if TYPE_CHECKING:
    from .segment import Segment

__all__ = ["has_left", "has_successor", "leave", "owner_of", "store_owner", "take_back"]

ALWAYS, FOR_RELOADS = 2, 1
"""What OWNER_STARTS says: the owner starts the next coordinator whatever has ended this one, or only when it left for
that."""
TRIES = 100
"""Looks at words that change; then their writer has died half-way."""


def store_owner(segment: Segment, owner: Identity | None, *, always: bool) -> None:
    """For the coordinator: this process would start the next one."""
    words = segment.words
    if not words[W_OWNERS] & 1:  # else a former one died half-way
        words[W_OWNERS] += 1
    # Store-store: the words may not be seen changed before OWNERS is odd. Pairs with `owner_of`.
    publish_fence()
    words[W_OWNER_PID] = owner.pid if owner is not None else 0
    words[W_OWNER_START] = owner.start if owner is not None else 0
    words[W_OWNER_SPACE] = owner.space if owner is not None else 0
    words[W_OWNER_STARTS] = (ALWAYS if always else FOR_RELOADS) if owner is not None else 0
    # Store-store: OWNERS may not be even before they are all there. Pairs with `owner_of`.
    publish_fence()
    words[W_OWNERS] += 1


def owner_of(segment: Segment) -> tuple[Identity | None, int]:
    """Who would start the next coordinator, and when (0: never).

    Of one that cannot be told now the pid is 0: that is never proved dead.
    """
    words = segment.words
    for _ in range(TRIES):
        before = words[W_OWNERS]
        # Load-load, twice: what is between may be read neither before OWNERS nor after it. Pairs with `store_owner`.
        fence()
        pid, start, space = words[W_OWNER_PID], words[W_OWNER_START], words[W_OWNER_SPACE]
        starts = words[W_OWNER_STARTS]
        fence()
        if not before & 1 and words[W_OWNERS] == before:
            # The words do not hold the boot: shared memory does not outlive that.
            return (Identity(pid, start, Identity.mine().boot, space) if starts else None), starts
    return Identity(0, 0, 0, 0), ALWAYS


def has_successor(segment: Segment) -> bool:
    """The coordinator has ended: whether somebody may start the next one."""
    owner, starts = owner_of(segment)
    if owner is None or (starts == FOR_RELOADS and not has_left(segment)):
        return False
    return not owner.is_dead()


def leave(segment: Segment) -> None:
    """For the coordinator: it ends, for the next one to be started at once."""
    segment.words[W_LEFT] = time.monotonic_ns()


def has_left(segment: Segment) -> bool:
    """Whether the last coordinator ended for that."""
    return bool(segment.words[W_LEFT])


def take_back(segment: Segment) -> int:
    """For the next one, before all else: when the last one left (`time.monotonic_ns`); 0 if it died."""
    left = int(segment.words[W_LEFT])
    if left:
        segment.words[W_RELOADS] += 1
        segment.words[W_LEFT] = 0
    return left
