"""Outgoing: what a process sends is numbered and leaves in one order, whatever begins in the middle of it.

Owns: the numbers of tasks and questions (seq) and of P1 tasks (ticket), and the futures that are due.
Written by: the thread that holds the submit lock of the attachment; futures are taken out by whoever settles them.
Order: a parcel is made with the numbers that come next, then *numbered*: hung behind the last one. What is numbered
    goes into the pipe in that order; the caller raises the flag after that.
If we die here: nothing of it is shared. What is in the pipe runs, and half a frame is dropped.
Invariants: a submit, a read or a wait may begin inside any other one of the same thread, at any instant: in a signal
    handler, a finalizer or a callback. The lock lets that in, and whoever was interrupted goes on only after it.

    - To number a parcel is one C call, which succeeds for who is first. Who finds that somebody came in between has
      packed numbers that are another's by now, and makes the parcel anew.
    - Who is about to number, first finishes what is numbered already, in order. Each step of that may be done again,
      or is done once: one C call takes out of a list of one what it puts elsewhere.
    - What only grows is found by walking; what is stored of it may fall back, and is true then too.

    So would several threads share a queue without locks (M. M. Michael and M. L. Scott, 1996).

The protocol: docs/protocols/gate.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..wire.future import TaskFuture
    from ..wire.stream import Stream

__all__ = ["NEXT", "Outgoing", "Parcel"]

NEXT = "next"
"""The one key of `Parcel.following`, and of `wire.stream.Stream.successors`: `setdefault` succeeds for who is first."""
_take_out = list.pop


class Parcel:
    """What leaves together: frames, the last numbers that were drawn with them, and the futures that wait for answers.

    Args:
        due: the first seq of its P1 tasks; more than *seq* if it has none.
    """

    __slots__ = ("data", "due", "following", "futures", "is_watch", "seq", "ticket")

    def __init__(
        self,
        seq: int,
        ticket: int,
        data: bytes,
        futures: dict[int, TaskFuture[Any]],
        due: int,
        is_watch: bool = False,
    ) -> None:
        self.seq = seq
        self.ticket = ticket
        # In the stream, and its futures pending, once this is empty.
        self.data = [data]
        # By seq. Empty once they are pending, for the last parcel is kept: whoever holds a future keeps it alive.
        self.futures = futures
        # All of its P1 tasks before this one have answers. Falls back when who was interrupted stores it: then they
        # are looked at once more.
        self.due = due
        self.is_watch = is_watch
        # Empty, or under `NEXT` what was numbered after this: `setdefault` there is how a parcel is numbered.
        self.following: dict[str, Parcel] = {}


class Outgoing:
    """What has been numbered, and what is due.

    Args:
        ticket: the last one that was drawn in our slot.

    Attributes:
        pending: by seq, every future that has no answer: put here before its frame is sent, and taken out when it is
            settled. In the order of seq, in which the next coordinator is sent them again.
        watches: those of `pending` that may be answered never: they take up no room.
        known: all up to this parcel are in a stream. The last one is found from here; who was interrupted may put this
            back, and nothing is lost by that.
        acked: every P1 task up to this seq has its answer, or nobody waits for it; the same is true of what it falls
            back to. The coordinator is told with the next task, and keeps the receipts of later ones.
    """

    def __init__(self, ticket: int) -> None:
        self.pending: dict[int, TaskFuture[Any]] = {}
        self.watches: set[int] = set()
        self.known = self._answered = Parcel(0, ticket, b"", {}, 1)  # all up to `_answered` has been
        self.acked = 0

    @property
    def last(self) -> Parcel:
        """What was numbered last."""
        parcel = self.known
        while parcel.following:
            parcel = parcel.following[NEXT]
        return parcel

    def catch_up(self, stream: Stream) -> Parcel:
        """Put all that is numbered, and in no stream yet, behind what is to be sent there; return the last of it.

        With a stream that has ended it is left for the next one.
        """
        if stream.has_ended:
            return self.last
        parcel = self.known
        while parcel.following:
            parcel = parcel.following[NEXT]
            self.put(parcel, stream)
        return parcel

    def put(self, parcel: Parcel, stream: Stream) -> None:
        """Put a parcel behind what is to be sent; all before it is there already."""
        pending, futures = self.pending, parcel.futures
        if parcel.is_watch:
            # Before it is pending: it must not take up room for a moment.
            self.watches.update(futures)
        # Before it is sent: its answer may be read by another thread at once, and must find the future.
        pending.update(futures)
        try:
            # The inner map only takes its argument here; `next` runs both, take out and put in.
            next(map(stream.outbox.extend, map(_take_out, (parcel.data,))))
        except IndexError:
            # Who came in between has done it, and may have read answers: those are not pending again.
            self.forget([seq for seq, future in futures.items() if future.done_now()])
        parcel.futures = {}
        self.known = parcel

    def take_back(self, parcel: Parcel, seqs: list[int]) -> None:
        """Send a parcel no more, if it is in no stream yet; nobody waits for its answers."""
        parcel.data.clear()
        parcel.futures.clear()
        self.forget(seqs)

    def forget(self, seqs: list[int]) -> None:
        """Nobody waits for these answers."""
        for seq in seqs:
            self.pending.pop(seq, None)
            self.watches.discard(seq)

    # What has been answered

    def first_due(self) -> int:
        """The seq of the first P1 task that has no answer, or one that is beyond all that have been sent."""
        pending, parcel = self.pending, self._answered
        while parcel.following:
            following = parcel.following[NEXT]
            if following.data:
                break  # not pending yet
            due = following.due
            while due <= following.seq:
                if due in pending:
                    following.due = due
                    return due
                due += 1
            following.due = due
            self._answered = parcel = following
        return parcel.seq + 1

    def acknowledge(self) -> None:
        """Note what has been answered."""
        self.acked = self.first_due() - 1

    def __repr__(self) -> str:
        return f"<Outgoing: {len(self.pending)} answers due, up to #{self.last.seq}>"
