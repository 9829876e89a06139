"""Lost: what the futures of a process are told when their flow is gone, and no other coordinator will come."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .attachment import Attachment
from .errors import CoordinatorLost, FlowNotRunning, StrictFlowError
from .future import TaskFuture
from .rendezvous import Place
from .store import read_receipts
from .wire import unpack_frame

__all__ = ["Reason", "gone", "settle_all"]

Reason = Callable[[TaskFuture[Any]], StrictFlowError]


def gone(attachment: Attachment) -> CoordinatorLost:
    """What a read is told, and whoever asked something."""
    return CoordinatorLost(
        f"the coordinator (pid {attachment.coordinator}) died, and no other has come; the last commit stands, and "
        "the next start under this name goes on from it",
        flow=attachment.flow,
    )


def settle_all(attachment: Attachment, reason: Reason | None = None) -> None:
    """Settle every future that is due: for *reason*, or by what can be known of its task."""
    if reason is None and attachment.pending:
        stopped = attachment.gate.is_stopped() and not attachment.gate.is_condemned()
        reason = _stopped if stopped else _unknown
        if not stopped and not Place.of(attachment.flow).is_inhabited():
            _settle_from_receipts(attachment)
            reason = _not_executed
    while attachment.pending:
        try:
            _, future = attachment.pending.popitem()
        except KeyError:
            return
        assert reason is not None
        is_question = reason is _not_executed and not future.is_task
        error = gone(attachment) if is_question else reason(future).of(attachment.flow)
        future.settle(error=error)


def _settle_from_receipts(attachment: Attachment) -> None:
    """Nobody commits any more, so the last commit's receipts say what became of our tasks."""
    try:
        receipts = read_receipts(attachment.segment)
    except (IndexError, struct.error):
        return
    for receipt in receipts:
        if receipt.tenant != attachment.tenant:
            continue
        if receipt.answer:
            attachment.settle(unpack_frame(receipt.answer))
            continue
        for number in range(receipt.seq, receipt.last + 1):
            future = attachment.pending.pop(number, None)
            if future is not None:
                future.settle(error=_executed(future).of(attachment.flow))


def _executed(future: TaskFuture[Any]) -> CoordinatorLost:
    return CoordinatorLost(
        f"{future.label}() was executed and committed, but its result is lost: the coordinator died, and no other "
        "has come"
    )


def _not_executed(future: TaskFuture[Any]) -> CoordinatorLost:
    return CoordinatorLost(
        f"{future.label}() was not executed: the coordinator died before it committed it, and no other has come; "
        "what it did outside the state may have happened"
    )


def _unknown(future: TaskFuture[Any]) -> CoordinatorLost:
    return CoordinatorLost(
        f"the coordinator closed the connection before it answered {future.label}(); whether that ran is unknown: "
        "look at the state before you submit it again"
    )


def _stopped(future: TaskFuture[Any]) -> FlowNotRunning:
    return FlowNotRunning(f"it was stopped before {future.label}() ran")
