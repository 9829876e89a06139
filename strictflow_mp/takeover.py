"""The takeover: how a coordinator begins where a dead one ended, on the same segment.

The caller holds the lock of the place, so the former coordinator is dead and this is the one writer of its words.

Order: what is in use is found by walking the trees; a task that may have killed the former coordinator is given its
    receipt, committed, before its mark is removed; then the numbers of the tasks that have receipts are counted as
    finished; then processes may come back.
If we die here: every step can be done again by the next one.
"""

from __future__ import annotations

import sys

from . import wire
from .core import logger
from .errors import TaskCrashed, TaskTimeout
from .failures import pack_failure
from .gate import GateKeeper, Tenancy
from .processes import Identity
from .segment import SERVING, W_EPOCH, W_LOADING, W_LOADINGS, W_PID, W_RESTARTS, W_START, W_STATUS, W_SUSPECT, Segment
from .store import Receipt, StoreWriter, read_receipts
from .suspect import Suspect, loading_seq, suspect_of

__all__ = ["take_over"]

audit = sys.audit

LOADINGS = 4
"""How many coordinators in a row must die while they load a function before that is taken to be its fault."""


def take_over(segment: Segment, writer: StoreWriter, gate: GateKeeper, flow: str, me: Identity) -> list[Tenancy]:
    """Recover the committed state; return who had a slot.

    Raises:
        StateFull: there is no room for the one receipt that has to be committed.
    """
    words = segment.words
    # Processes that wait for a new coordinator look at this word.
    words[W_RESTARTS] += 1
    words[W_EPOCH] += 1
    words[W_PID], words[W_START] = me.pid, me.start
    audit("strictflow_mp.takeover.begun")
    writer.recover()
    audit("strictflow_mp.takeover.recovered")
    tenancies = gate.take_over()
    suspect = suspect_of(segment)
    if suspect is None or not suspect.is_loading:
        words[W_LOADING] = 0
    elif _count_loading(words) < LOADINGS:
        words[W_SUSPECT] = 0  # counted: if we die now, that is no more of its fault
        suspect = None
    if suspect is not None:
        _convict(suspect, writer, gate, flow)
    # A new version in any case: whoever reads next finds its own copies outdated, looks closer, and comes back to us
    # with what it had submitted, before it can read a state without that.
    writer.publish({})
    audit("strictflow_mp.takeover.convicted")
    slots = {tenancy.tenant: tenancy.slot for tenancy in tenancies}
    numbers: dict[int, int] = {}
    for receipt in read_receipts(segment):
        slot = slots.get(receipt.tenant)
        if slot is None:
            writer.receipts.forget(receipt.tenant)
        elif receipt.number:
            numbers[slot] = max(receipt.number + receipt.tasks - 1, numbers.get(slot, 0))
    gate.finish(numbers)
    words[W_STATUS] = SERVING
    audit("strictflow_mp.takeover.counted")
    logger.warning(
        "flow %r: the former coordinator died; pid %d goes on from version %d (restart %d)",
        flow,
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
        seq, answer = suspect.seq, wire.pack_frame(wire.FAILURE, suspect.seq, text, blob)
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
