"""Coming back: what a process does when its coordinator has died, and what it tells when no other comes.

Whoever notices (a submit, a wait for an answer or at the gate) waits for the next coordinator, comes back to the same
slot, and sends again every frame that has no answer. The coordinator knows from its receipts which of them have taken
effect. If none comes, we read the receipts ourselves, and each future that is due is told what became of its task.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import select
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..errors import CoordinatorLost, FlowNotRunning, StrictFlowError
from ..memory.segment import PREFIX, W_RESTARTS
from ..memory.succession import has_successor
from ..store import read_receipts
from ..wire import frames
from ..wire.future import TaskFuture
from .introducing import again as introduce_again
from .outgoing import NEXT
from .reaching import LEAST_PATIENCE_SECONDS, Pauses, Refusal, try_to_reach

if TYPE_CHECKING:
    from ..wire.stream import Stream
    from .attachment import Attachment

__all__ = ["Reason", "come_back", "finish", "flush", "gone", "lose", "may_return"]

RESTART_SECONDS = 10.0
"""Seconds that the next coordinator may take to appear when one has died, and its owner lives."""
EXPELLED_SECONDS = 0.5
"""Seconds after which a coordinator that closed the connection, and lives, is taken to have meant it."""
LOOK_SECONDS = 0.2
"""Between two looks, while a coordinator is awaited, whether one may still come."""
WRITABLE_MS = 1000
"""Milliseconds that a full pipe is waited for between two looks whether anybody serves still."""

Reason = Callable[[TaskFuture[Any]], StrictFlowError]
"""The error that a future is told when its flow is lost."""


# Waiting for the next one


def flush(attachment: Attachment, stream: Stream) -> None:
    """Send what the other end had no room for; when nobody serves any more, `stream.has_ended` says so.

    Raises:
        TimeoutError: it is sent in haste (`Attachment.in_haste_until`), and the time has passed.
    """
    poll = select.poll()
    until = attachment.in_haste_until
    while not stream.flush():
        try:
            poll.register(stream.fileno(), select.POLLOUT)
        except ValueError:
            continue  # whoever came in between has closed it: `flush` finds that
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            poll.poll(min(left * 1000, WRITABLE_MS))
        elif not poll.poll(WRITABLE_MS) and attachment.is_served() is False:
            stream.has_ended = True
            return


def may_return(attachment: Attachment, restarts: int) -> bool:
    """Nobody serves us: may there be another coordinator soon?

    Args:
        restarts: `Attachment.restarts` from before the caller found that nobody does. Another thread may come back at
            any moment, and what is noted here must not be taken for the death of the one that has taken us then.
    """
    if attachment.gate.is_stopped():
        return False
    now = time.monotonic()
    dead = attachment.dead
    if dead is None or dead[0] != restarts:
        attachment.dead = dead = (restarts, now)  # until that one is seen to serve still
    if attachment.is_served():
        resident = attachment.place.resident()
        if resident is not None and PREFIX + resident.token != attachment.segment.name:
            return False  # it serves another flow of this name
        is_same = resident is None or resident.pid == attachment.coordinator
        if is_same and not attachment.server_identity.is_ending():
            # If it is not ours by now, another thread has come back to it.
            return attachment.restarts != restarts or now - dead[1] < EXPELLED_SECONDS
        if resident is not None:
            # It takes over: as long as that goes on it is waited for. That another one has begun is no progress.
            sign = (resident.pid, attachment.place.sign_of_life())
            if sign[0] == attachment.last_sign[0] and sign != attachment.last_sign:
                attachment.dead = dead = (restarts, now)
            attachment.last_sign = sign
    elif not has_successor(attachment.segment) and not attachment.is_served():
        # Nobody is left who would start one. Looked at in this order: the next one takes the lock, then LEFT back.
        return False
    return now - dead[1] < RESTART_SECONDS


def come_back(attachment: Attachment, stream: Stream, deadline: float | None) -> None:
    """The connection has ended: wait for the next coordinator and go on with it, or lose the flow.

    Returns also when the deadline has passed; then the next call goes on waiting.

    Args:
        stream: the one that has ended. If it is not the attachment's any more, another thread has come back already.
    """
    pauses = Pauses()
    next_look = 0.0  # for what costs system calls; the one word that moves when somebody comes is looked at each time
    # No other thread submits meanwhile. In this one a signal handler may, and may even come back before us.
    with attachment.submitting:
        stream.end()  # nothing that is numbered from here on goes there
        restarts = attachment.restarts  # before it is looked at whose stream this is
        while attachment.stream is stream and not attachment.is_lost:
            if stream.successors:
                attachment.stream = stream.successors[NEXT]  # who was interrupted has put back a former one
                return
            if time.monotonic() >= next_look:
                if not may_return(attachment, restarts):
                    lose(attachment)
                    return
                next_look = time.monotonic() + LOOK_SECONDS
            # The next coordinator moves RESTARTS before it lets anybody in.
            if attachment.segment.words[W_RESTARTS] != attachment.restarts and _rejoin(attachment, stream, deadline):
                stream.close()
            elif deadline is not None and time.monotonic() >= deadline:
                return
            else:
                pauses.sleep(deadline)


def finish(attachment: Attachment) -> None:
    """Before the connection is given up: P1 tasks that a coordinator has left to the next one are sent to that."""
    outgoing = attachment.outgoing
    if attachment.is_lost or outgoing.first_due() > outgoing.last.seq:
        return
    if attachment.is_outdated or attachment.is_served() is False:
        come_back(attachment, attachment.stream, time.monotonic() + RESTART_SECONDS)


def _rejoin(attachment: Attachment, former: Stream, deadline: float | None) -> bool:
    """Connect to the next coordinator, and send it all that has no answer; whether that has worked."""
    flow, outgoing = attachment.flow, attachment.outgoing
    try:
        resume = (attachment.slot, attachment.tenant, attachment.first_unfinished)
        patience = RESTART_SECONDS if deadline is None else min(RESTART_SECONDS, deadline - time.monotonic())
        reached = try_to_reach(flow, resume, max(patience, LEAST_PATIENCE_SECONDS), place=attachment.place)
    except Refusal:
        return False  # it is out of descriptors or threads: our slot is kept
    except StrictFlowError as error:
        why = {"flow": flow, "error": type(error).__name__}
        logger.error("flow %r: the next coordinator does not take us: %s", flow, error, extra=why)
        lose(attachment)
        return False
    if reached is None:
        return False
    stream, welcome = reached
    try:
        last = outgoing.catch_up(stream)
        stream.outbox.clear()  # it is sent with the rest
        # In the order of seq. Another thread may settle some meanwhile: the list is made in one step. What a signal
        # handler adds is sent after it.
        due = [future for future in list(attachment.pending.values()) if future.seq <= last.seq]
        again = [frames.pack_frame(*sent) for sent in (future.sent for future in due) if sent]
        # The last frame counts what nobody sends again: tasks that were taken back.
        count = frames.pack_frame(frames.COUNT, last.ticket)
        if not stream.send(b"".join([*introduce_again(attachment), *again, count])):
            flush(attachment, stream)
        # Only now: if a signal handler raised before this, the former stream is still ours, and all is tried once more.
        if former.successors.setdefault(NEXT, stream) is not stream:
            stream.close()  # a handler came back in the middle of this: it has sent all
            return True
    except BaseException:
        stream.close()
        raise
    attachment.stream = stream
    attachment.is_served_by(welcome)
    about = {"flow": flow, "peer": attachment.coordinator, "restarts": attachment.restarts}
    logger.info("flow %r: came back to pid %d with %d tasks", flow, attachment.coordinator, len(again), extra=about)
    outgoing.catch_up(stream)
    if not stream.flush():
        flush(attachment, stream)
    return True


# When none comes


def lose(attachment: Attachment, reason: Reason | None = None) -> None:
    """Give the connection up, for good: settle all futures that are due, close what can be closed."""
    attachment.retire()  # first, so that nobody adds to what is settled here
    attachment.on_loss(attachment)
    settle_all(attachment, reason)
    # After `is_lost` is set: a thread whose read fails by this finds that out.
    attachment.stream.close()
    attachment.gate.release()


def gone(attachment: Attachment) -> CoordinatorLost:
    """What a read is told, and whoever asked something."""
    if attachment.is_served() is not False:
        return CoordinatorLost(
            f"the coordinator (pid {attachment.coordinator}) does not answer, and no other has taken us; whether it "
            f"lives cannot be told from here: is {attachment.place.directory} still there, and this process's user's?",
            flow=attachment.flow,
        )
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
        # Only when nobody serves: a coordinator that lives may commit some of our tasks after we have looked.
        if not stopped and attachment.is_served() is False:
            _settle_from_receipts(attachment)
            reason = _not_executed
    # One by one: a signal handler may raise, other threads settle too, and callbacks may add to it.
    while attachment.pending:
        try:
            _, future = attachment.pending.popitem()
        except KeyError:
            return  # another thread has settled the last one
        assert reason is not None
        is_question = reason is _not_executed and not future.is_task
        error = gone(attachment) if is_question else reason(future).of(attachment.flow)
        future.settle(error=error)


def _settle_from_receipts(attachment: Attachment) -> None:
    """Nobody commits any more, so the last commit's receipts say what became of our tasks."""
    try:
        receipts = read_receipts(attachment.segment)
    except (IndexError, struct.error):
        return  # the segment is damaged
    for receipt in receipts:
        if receipt.tenant != attachment.tenant:
            continue
        # Without an answer, the tasks have taken effect, and the receipt had no room for it.
        if receipt.answer:
            attachment.settle(frames.unpack_frame(receipt.answer))
            continue
        for seq in range(receipt.seq, receipt.last + 1):
            future = attachment.pending.pop(seq, None)
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
