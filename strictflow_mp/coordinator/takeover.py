"""The takeover: how a coordinator begins where a dead one ended, on the same segment.

The caller holds the lock of the place, so the former coordinator is dead and this is the one writer of its words.

Order: what is in use is found by walking the trees; a task that may have killed the former coordinator is given its
    receipt, committed, before its mark is removed; then the tickets of the tasks that have receipts are counted as
    finished; then processes may come back.
    Until then the time of the lock's file moves, so that nobody gives us up while we go on.
If we die here: every step can be done again by the next one.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from ..core import logger
from ..errors import TaskCrashed, TaskTimeout
from ..memory.fences import publish_fence
from ..memory.segment import (
    SERVING,
    W_EPOCH,
    W_LOADING,
    W_LOADINGS,
    W_PID,
    W_RESTARTS,
    W_START,
    W_STATUS,
    W_SUSPECT,
    Segment,
)
from ..memory.succession import take_back
from ..memory.suspect import Suspect, loading_seq, suspect_of
from ..store import Receipt, StoreWriter, read_receipts
from ..wire import frames
from ..wire.failures import pack_failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..memory.gatekeeper import GateKeeper, Tenancy
    from ..system.identity import Identity

__all__ = ["take_over"]

audit = sys.audit

FATAL_LOADINGS = 4
"""How many coordinators in a row must die while they load a function before that is taken to be its fault."""


def take_over(
    segment: Segment,
    writer: StoreWriter,
    gate: GateKeeper,
    flow: str,
    me: Identity,
    go_on: Callable[[], object] = lambda: None,
) -> list[Tenancy]:
    """Recover the committed state; return which processes had a slot.

    Args:
        go_on: called again and again, to tell those who wait that it goes on.

    Raises:
        StateFull: there is no room for the one receipt that has to be committed.
    """
    words = segment.words
    has_left = take_back(segment) > 0
    # Processes that wait for a new coordinator look at this word.
    words[W_RESTARTS] += 1
    # Store-store: EPOCH may not be seen before RESTARTS. Who binds what it looks at for this EPOCH (L6) has looked,
    # after the gate, whether it must come back first. Pairs with the gate's fence (`memory.gate.Gate.is_open`), which
    # stands between L4 and that look. Between RESTARTS and a flag that is lifted later are those of the commit, too.
    publish_fence()
    words[W_EPOCH] += 1
    words[W_PID], words[W_START] = me.pid, me.start
    audit("strictflow_mp.takeover.begun")
    writer.recover(go_on)  # before anything is allocated: what is free is found by what is not reached
    audit("strictflow_mp.takeover.recovered")
    tenancies = gate.take_over()
    # The caller resets the word when we return (`Marker.reset`): the verdict is committed before the evidence goes.
    suspect = suspect_of(segment)
    if suspect is None or not suspect.is_loading:
        words[W_LOADING] = 0
    elif _count_loading(words) < FATAL_LOADINGS:
        words[W_SUSPECT] = 0  # counted: if we die now, that is no more of its fault
        suspect = None
    if suspect is not None:
        _convict(suspect, writer, gate, flow)
    # A new version in any case: a process that reads next finds its copies outdated, looks closer, and comes back to us
    # with what it had submitted, before it can read a state without that.
    writer.publish({})
    audit("strictflow_mp.takeover.convicted")
    slots = {tenancy.tenant: tenancy.slot for tenancy in tenancies}
    # By slot. What has no receipt is not finished: its process sends it again, and its flag stays up until then.
    tickets: dict[int, int] = {}
    for receipt in read_receipts(segment):
        slot = slots.get(receipt.tenant)
        if slot is None:
            writer.receipts.forget(receipt.tenant)  # its process has left, and no commit since has said so
        elif receipt.ticket:
            tickets[slot] = max(receipt.ticket + receipt.tasks - 1, tickets.get(slot, 0))
    gate.finish(tickets)
    words[W_STATUS] = SERVING  # it may say that the flow was given up
    audit("strictflow_mp.takeover.counted")
    logger.log(
        logging.INFO if has_left else logging.WARNING,
        "flow %r: the former coordinator %s; pid %d goes on from version %d (restart %d)",
        flow,
        "has left" if has_left else "died",
        me.pid,
        writer.version,
        words[W_RESTARTS],
        extra={"version": writer.version, "restarts": words[W_RESTARTS]},
    )
    return tenancies


def _count_loading(words: memoryview) -> int:
    """Count how many coordinators in a row died while they loaded the function that SUSPECT names.

    Loading changes nothing, and every process that comes back has its functions loaded anew, so a kill from outside
    often meets it.
    """
    if words[W_LOADING] != words[W_SUSPECT]:
        words[W_LOADINGS] = 0
        words[W_LOADING] = words[W_SUSPECT]
    words[W_LOADINGS] += 1
    return int(words[W_LOADINGS])


def _convict(suspect: Suspect, writer: StoreWriter, gate: GateKeeper, flow: str) -> None:
    """Write down that the task that was running has failed, and is not to be tried again."""
    tenancy = gate.tenancy(suspect.slot)
    if not tenancy.pid:
        return
    if suspect.is_loading:
        seq, answer = loading_seq(suspect.seq), b""
    else:
        error = _verdict(suspect, flow)
        text, blob = pack_failure(error)
        seq, answer = suspect.seq, frames.pack_frame(frames.FAILURE, suspect.seq, text, blob)
    writer.receipts.add(Receipt(tenancy.tenant, 0, seq, 1, answer))


def _verdict(suspect: Suspect, flow: str) -> Exception:
    if suspect.is_overdue:
        return TaskTimeout(
            "the task ran longer than its timeout, and could only be stopped by ending the coordinator: rolled back; "
            "make it shorter, or give it a longer timeout=",
            flow=flow,
        )
    return TaskCrashed(
        "the coordinator died while it ran this task: rolled back, and not tried again; look for what in the task "
        "may end a process (a crash in C code, os._exit, too much memory)",
        flow=flow,
    )
