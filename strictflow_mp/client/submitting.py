"""Submitting: tasks and questions are packed into frames, and sent in the order of their numbers.

It happens under one lock of the attachment: the frames go into the pipe, then the flag is raised, then submit returns.
A future is pending before its frame is sent, so that a coordinator that dies in between leaves nothing without an
answer: whoever notices it sends again all that is pending (`comeback`). A submit may begin in the middle of another one
of the same thread: numbers are given, and frames put into the stream, as `outgoing` says.
"""

from __future__ import annotations

import sys
import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import ref

from ..core import WRITE_PRIORITY
from ..errors import SerializationError
from ..memory.segment import W_TRACE
from ..values.codec import check_size, pack
from ..wire import frames
from ..wire.arguments import pack_arguments
from ..wire.future import TaskFuture
from .comeback import come_back, flush
from .introducing import introduce
from .outgoing import NEXT, Parcel

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..values.changes import Changes
    from .attachment import Attachment

__all__ = ["call_batch", "check_changes", "operate", "pack_call", "put", "question", "question_in_time"]

audit = sys.audit

FIRST_BATCH_CALLS, BATCH_CALLS = 16, 128
"""Calls in the first frame of several, and in the others: the coordinator begins while the rest is on its way."""
FRAMING_BYTES = 12
"""Bytes around a key and its value in a frame, at most."""
QUESTIONS = {
    frames.CANCEL: "cancel",
    frames.STATS: "stats",
    frames.STOP: "stop_loop",
    frames.RELOAD: "reload",
    frames.ADOPT: "start_loop",
    frames.WATCH: "watch",
    frames.TRACE: "trace",
}
"""What is no task, and what users call that asks it."""


# Tasks


def call_batch(attachment: Attachment, task: Any, packed: list[bytes], position: int) -> list[TaskFuture[Any]]:
    """Submit calls from *position* on, as many as one frame takes and there is room for; return their futures.

    Submits nothing when there is no room, or the connection is lost: another thread was faster.
    """
    with attachment.submitting:
        room = attachment.room
        if attachment.is_lost or room <= 0:
            return []
        batch = packed[position : position + min(room, BATCH_CALLS if position else FIRST_BATCH_CALLS)]
        if len(batch) > 1:
            batch = _portion(batch)
        began = time.monotonic_ns() if attachment.words[W_TRACE] else 0
        head = b""
        function = attachment.functions.get(ref(task))
        if function is None:
            function, head = introduce(attachment, task)
        is_write = task.priority == WRITE_PRIORITY
        outgoing, port, label = attachment.outgoing, attachment.port, task.name
        while True:
            former = outgoing.known
            if former.following or attachment.stream.has_ended:
                former = outgoing.catch_up(attachment.stream)
            first = seq = former.seq + 1
            ticket = former.ticket + 1 if is_write else 0
            frame = frames.pack_frame(frames.CALL, first, function, batch, ticket, outgoing.acked)
            futures: dict[int, TaskFuture[Any]] = {}
            for arguments in batch:
                future = futures[seq] = TaskFuture(port, seq, label)
                # To be sent again if the coordinator dies before it answers. Each alone, for some may have answers by
                # then.
                future.sent = (frames.CALL, seq, function, (arguments,), ticket, 0)
                seq += 1
                if is_write:
                    ticket += 1
            if is_write:
                parcel = Parcel(seq - 1, ticket - 1, head + frame, futures, first)
            else:
                parcel = Parcel(seq - 1, former.ticket, head + frame, futures, seq)
            if former.following.setdefault(NEXT, parcel) is parcel:
                break
        if not _dispatch(attachment, parcel, futures, is_write=is_write):
            return []
        if head:
            attachment.introduced(task, function)  # not before the frame that tells of it
        submitted = [*futures.values()]
        if began:
            attachment.tracer.submitted(label, task.priority, submitted, began)
        return submitted


def put(attachment: Attachment, changes: Changes) -> TaskFuture[Any] | None:
    """Submit a ready-made P1. None when there is no room, or the connection is lost: another thread was faster."""
    return _submit_ready_made(attachment, "put", (frames.PUT,), changes)


def operate(attachment: Attachment, what: str, asked: Changes) -> TaskFuture[Any] | None:
    """As `put`, of a P1 that looks first."""
    return _submit_ready_made(attachment, what, (frames.OPERATE, what), asked)


def _submit_ready_made(
    attachment: Attachment, label: str, head: tuple[Any, ...], changes: Changes
) -> TaskFuture[Any] | None:
    with attachment.submitting:
        if attachment.is_lost or attachment.room <= 0:
            return None
        began = time.monotonic_ns() if attachment.words[W_TRACE] else 0
        fields = list(changes.items())
        future = _dispatch_one(
            attachment, label, lambda seq, ticket, ack: (head[0], seq, *head[1:], fields, ticket, ack)
        )
        if began and future is not None:
            attachment.tracer.submitted(label, WRITE_PRIORITY, [future], began)
        return future


def question(attachment: Attachment, kind: int, *fields: Any) -> TaskFuture[Any] | None:
    """Ask what is no task (`QUESTIONS`); there is always room for it. None when the connection is lost."""
    with attachment.submitting:
        if attachment.is_lost:
            return None
        return _dispatch_one(attachment, QUESTIONS[kind], lambda seq, *_: (kind, seq, *fields), is_question=True)


def question_in_time(attachment: Attachment, deadline: float, kind: int, *fields: Any) -> TaskFuture[Any] | None:
    """As `question`, but wait no longer than that for other threads and for the pipe.

    Raises:
        TimeoutError: it could not be sent by then, or only in part.
    """
    # A thread that submits holds it for as long as the pipe is full.
    if not attachment.submitting.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    try:
        attachment.in_haste_until = deadline
        return question(attachment, kind, *fields)
    finally:
        attachment.in_haste_until = None
        attachment.submitting.release()


# Packing


def _portion(batch: list[bytes]) -> list[bytes]:
    """The first of them, as many as may be in one frame; one at least, which was measured when it was packed."""
    for count, size in enumerate(accumulate(map(len, batch))):
        if size > frames.MAX_BODY_BYTES:
            return batch[: count or 1]
    return batch


def check_changes(changes: Changes, what: str, flow: str) -> None:
    """Look at the size of a ready-made P1 before it is submitted.

    Raises:
        SerializationError: it is more than one frame may hold.
    """
    if len(changes) > frames.MAX_FIELDS:
        raise SerializationError(
            f"{what}() of {len(changes):,} keys: one P1 may have {frames.MAX_FIELDS:,}; let a task with @write make "
            "them in its own code, or submit several",
            flow=flow,
        )
    size = sum(map(len, changes)) + sum(map(len, filter(None, changes.values()))) + FRAMING_BYTES * len(changes)
    try:
        check_size(size, f"{what}()", frames.MAX_BODY_BYTES)
    except SerializationError as error:
        raise error.of(flow) from None


def pack_call(flow: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The arguments of a call; an error names the one that cannot travel."""
    try:
        return pack_arguments(args, kwargs)
    except SerializationError as error:
        _name_argument(flow, name, args, kwargs)
        raise error.of(flow) from None


def _name_argument(flow: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for the argument that cannot travel, by its name."""
    try:
        for index, value in enumerate(args):
            pack(value, f"{name}() argument {index}", frames.MAX_BODY_BYTES)
        for key, value in kwargs.items():
            pack(value, f"{name}() argument {key}", frames.MAX_BODY_BYTES)
        pack_arguments(args, kwargs, f"arguments of {name}()")
    except SerializationError as error:
        raise error.of(flow) from None


# Sending. The callers hold `submitting`.


def _dispatch_one(
    attachment: Attachment, label: str, make: Callable[[int, int, int], tuple[Any, ...]], *, is_question: bool = False
) -> TaskFuture[Any] | None:
    outgoing = attachment.outgoing
    while True:
        former = outgoing.catch_up(attachment.stream)
        seq, ticket = former.seq + 1, former.ticket
        if not is_question:
            ticket += 1
        future: TaskFuture[Any] = TaskFuture(attachment.port, seq, label)
        future.sent = sent = make(seq, ticket, outgoing.acked)
        future.is_task = not is_question
        futures = {seq: future}
        due = seq + 1 if is_question else seq
        parcel = Parcel(seq, ticket, frames.pack_frame(*sent), futures, due, sent[0] == frames.WATCH)
        if former.following.setdefault(NEXT, parcel) is parcel:
            return future if _dispatch(attachment, parcel, futures, is_write=not is_question) else None


def _dispatch(attachment: Attachment, parcel: Parcel, futures: dict[int, TaskFuture[Any]], *, is_write: bool) -> bool:
    """Send what has just been numbered; if there are P1 tasks in it, raise the flag after that.

    False when the connection was lost before anything of it was sent: then it is nobody's.

    When a signal handler raises in here, the tasks run once or not at all, and nobody holds their futures.
    """
    try:
        audit("strictflow_mp.submit.begun")
        stream = attachment.stream
        if not stream.has_ended:
            attachment.outgoing.put(parcel, stream)
            if not stream.flush():
                flush(attachment, stream)
        if stream.has_ended:
            # The next coordinator gets it with the rest.
            come_back(attachment, stream, attachment.in_haste_until)
            if attachment.is_lost and parcel.data:
                return False
        audit("strictflow_mp.submit.sent")
        # After the whole frame is in the pipe: a process that dies half-way leaves no flag up that nobody lowers.
        # If a signal handler raised before this, the frame of the next P1 says how far to count.
        if is_write:
            attachment.gate.raise_flag(parcel.ticket)
        audit("strictflow_mp.submit.counted")
        return True
    except BaseException:
        attachment.outgoing.take_back(parcel, list(futures))  # or they would take up room, and hold up what is acked
        raise
