"""Answers: a thread that waits for an answer reads the connection itself, one thread at a time.

Others that wait meanwhile sleep at their future. The one that reads settles whatever arrives, theirs too, and when it
has its own answer it wakes one of them to go on. When somebody asks in a way that cannot read (a callback, an
``await``), a background thread takes the reading over, for as long as the connection lives (`serve`).
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..errors import StrictFlowError
from ..memory.segment import W_TRACE
from ..system.machine import FREE_THREADED
from ..wire import frames
from ..wire.failures import type_of, words_of
from .comeback import come_back, lose, settle_all
from .submitting import question
from .turn import Turn

if TYPE_CHECKING:
    from ..wire.future import TaskFuture
    from .attachment import Attachment

__all__ = ["Port", "reading_turn", "wait_for_room"]

FOLLOWER_SECONDS = 0.05
"""Seconds that a thread sleeps while another one reads, before it looks whether that one still does."""
TAKE_OVER_SECONDS = 0.005
"""Seconds between two attempts of the background thread to take the reading over."""
SILENCE_SECONDS = 1
"""Seconds that a connection is silent before it is asked whether anybody serves still."""


class Port:
    """What a future knows of the connection on which its answer comes (`wire.future.AnswerSource`)."""

    __slots__ = ("_attachment", "_pid")

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._pid = os.getpid()  # the process that submits here; a child that it forks inherits the futures

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StrictFlowError(
                "this future belongs to the parent process; in a forked child, submit the task again",
                flow=self._attachment.flow,
            )

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Read answers until the future is done, or *timeout* seconds have passed."""
        self._check_process()
        attachment = self._attachment
        if attachment.is_traced and timeout != 0:  # `done()` asks with 0, and does not wait
            with attachment.tracer.at_result(future):
                wait(attachment, future, timeout)
        else:
            wait(attachment, future, timeout)

    def serve(self, *, is_to_sleep: bool = False) -> None:
        """From now on answers arrive without anybody waiting."""
        self._check_process()
        serve(self._attachment, is_to_sleep=is_to_sleep)

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        """Ask for the task to be taken back; whether it was (if *wait*)."""
        self._check_process()
        return cancel(self._attachment, future, wait=wait)


def wait(attachment: Attachment, future: TaskFuture[Any], timeout: float | None) -> None:
    """Read answers until the future is done, or *timeout* seconds have passed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    reading = attachment.reading
    # A callback or a signal handler that waits, inside another wait: it reads on with the turn that its thread has, and
    # leaves it to that.
    nested = reading.is_nested()
    while not future.done_now():
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if attachment.is_lost:
            settle_all(attachment)
            return
        is_mine = nested
        leave = reading.leaver() if FREE_THREADED else reading.leave
        try:
            is_mine = nested or (attachment.server is None and reading.take())
            # Once more, with the turn: whoever had it before may have read our answer as the last thing it did.
            if is_mine and not future.done_now():
                _read(attachment, left)
        finally:
            if not nested:
                leave()
                if is_mine:
                    _pass_on(attachment)  # after that: the thread that is woken finds the turn free
        if not is_mine:
            future.wait_here(FOLLOWER_SECONDS if left is None else min(FOLLOWER_SECONDS, left))
            reading.revoke()  # a thread that a signal handler has thrown out may have it still, and not come back
        if left == 0:
            return


def _pass_on(attachment: Attachment) -> None:
    """Let a thread that waits for its answer take over the reading."""
    for future in list(attachment.pending.values()):
        if future.has_waiters:
            future.nudge()
            return


def _read(attachment: Attachment, timeout: float | None) -> None:
    """Wait for answers and settle their futures. The caller has the turn."""
    stream = attachment.stream
    is_open = True
    try:
        if stream.inbox or stream.unpack():
            pass  # a signal handler raised before these were settled
        elif not stream.wait(SILENCE_SECONDS if timeout is None else min(SILENCE_SECONDS, timeout)):
            # A wait with a timeout ends without that. The other might never: whatever holds a dead coordinator's end
            # open keeps the connection.
            if timeout is not None or attachment.is_served() is not False:
                return
            is_open = False
        else:
            is_open = stream.fill()
    except (ValueError, OSError):
        if attachment.is_lost or attachment.stream is not stream:
            return  # another thread has closed it, or come back with a new one
        if not stream.is_closed:
            raise
        # A signal handler raised when it was ours already, and `_rejoin` closed it: the coordinator is reached anew.
        is_open = False
    inbox = stream.inbox
    settle = attachment.settle_traced if attachment.words[W_TRACE] else attachment.settle
    while inbox:
        # A signal handler may raise anywhere, or wait and read on: a frame leaves the inbox when it is settled, and
        # settling twice does no harm.
        try:
            frame = inbox[0]
        except IndexError:
            break  # a handler has read on
        if settle(frame):
            _acknowledge(attachment)
        try:
            inbox.remove(frame)  # at once if it is still the first
        except ValueError:
            pass  # a callback or a handler has waited, and read on
    if not is_open:  # last: what the coordinator has still answered is settled, and not sent again
        come_back(attachment, stream, None if timeout is None else time.monotonic() + timeout)


def _acknowledge(attachment: Attachment) -> None:
    with attachment.submitting:  # a stream is not thread-safe
        if not attachment.is_lost:
            attachment.stream.send(frames.pack_frame(frames.ACK, attachment.outgoing.acked))


def wait_for_room(attachment: Attachment) -> None:
    """Backpressure: wait until fewer than `max_pending` answers are due."""
    while attachment.room <= 0 and not attachment.is_lost:
        try:
            oldest = next(future for seq, future in attachment.pending.items() if seq not in attachment.watches)
        except (StopIteration, RuntimeError):
            continue  # answers have arrived meanwhile
        wait(attachment, oldest, None)


def serve(attachment: Attachment, *, is_to_sleep: bool = False) -> None:
    """Read answers in the background from now on.

    Args:
        is_to_sleep: the calling thread sleeps next, in a way that does not read. If it has the turn it is in a
            callback: then another thread reads on, and the turn is that one's.
    """
    with attachment.starting_server:
        is_handed_over = is_to_sleep and attachment.reading.is_mine()
        if (attachment.server is not None and not is_handed_over) or attachment.is_lost:
            return
        former = attachment.server
        attachment.server = threading.Thread(target=_serve, args=(attachment,), name="strictflow-answers", daemon=True)
        try:
            attachment.server.start()
        except BaseException:  # out of threads: whoever waits reads, as before
            attachment.server = former
            raise
        if is_handed_over:
            attachment.reading.leave()


def _serve(attachment: Attachment) -> None:
    me = threading.current_thread()
    while not attachment.is_lost and attachment.server is me:
        if not attachment.reading.take():
            time.sleep(TAKE_OVER_SECONDS)  # the thread that reads now sees soon that there is no need any more
            attachment.reading.revoke()
            continue
        try:
            _read(attachment, None)
        except BaseException as error:
            # The last resort of all who wait here: futures that nobody settles any more would wait for ever.
            flow = attachment.flow
            logger.error("flow %r: %s", flow, words_of(error), extra={"flow": flow, "error": type_of(error)})
            lose(attachment)
    attachment.reading.leave()


def reading_turn() -> Turn:
    """The turn to read answers: a thread that has it is inside `wait` or `_serve`, all the time."""
    return Turn(wait.__code__, _serve.__code__)


def cancel(attachment: Attachment, future: TaskFuture[Any], *, wait: bool) -> bool:
    """Ask SF-LOOP to take a task back; whether it has (if *wait*)."""
    asked = question(attachment, frames.CANCEL, future.seq)
    if asked is None or not wait:
        return False
    taken_back = bool(asked.result())
    if taken_back:
        future.settle_cancelled()
    return taken_back or future.cancelled()
