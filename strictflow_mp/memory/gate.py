"""The gate: the P1 flag, and where readers wait for it.

Owns: SUBMITTED, WAITING, WAITS and WAITED of every slot but 0. FINISHED, all words of slot 0, REACH, EPOCH and the
    semaphores are `gatekeeper`'s.
Written by: the slot's process; between two tenants the coordinator.
Read by: everybody.
Order: **the flag is up while submitted[i] > finished[i] for some i.**
    P1 tasks of a slot are numbered; their frames carry the number, the ticket.
    Submit: the whole frame is in the pipe, then submitted[i] = ticket, then submit returns. So when it has
    returned, every process sees the flag; and whoever dies half-way leaves no flag up.
    Commit: the version is published, then finished[i] = ticket (store-store, free on x86-64).
    Wait: the reader stores waiting = 1, *fence*, looks at finished[] again, sleeps. The coordinator stores
    finished[], *fence*, looks at waiting[], posts. Each fence forbids that the store is seen after the
    load that follows it; so either the reader sees that it need not sleep, or the coordinator sees it waiting.
If we die here: a semaphore's count is only a hint. A lost post costs one slice of sleep, an extra one a
    look at the words; neither costs correctness.
Invariants: both arrays only grow while a slot has one tenant; but FINISHED falls back when a process comes back late
    after a coordinator's death, and nobody waited for it any more (`lift`, `raise_again`). A read waits for what was
    submitted before it began and never for anything later, so a steady stream of P1 tasks delays no read for ever.

The protocol: docs/protocols/gate.md.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from ..system import posix
from ..system.spin import look_for
from .fences import fence, raise_word, read_fence
from .segment import CONDEMNED, SERVING, W_REACH, W_STATUS, Segment
from .semaphores import sleep_on

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate"]

LEADER = "leader"
"""The one key of `Gate._leader`."""
NO_THREAD = -1
"""Who leads when the semaphore is closed: no thread has that number, so no thread sleeps any more."""

SLEEP_SECONDS = 0.05
"""Seconds of sleep after which a waiting reader looks whether the coordinator lives."""


class Gate:
    """The flag as a worker's process sees it.

    Attributes:
        submitted, finished: the two arrays, of all slots. Of these a process stores its own word of the first alone.
    """

    def __init__(self, segment: Segment, slot: int, semaphore: posix.Semaphore) -> None:
        words, slots = segment.words, segment.slots
        self.submitted = segment.array(segment.submitted, slots)
        self.finished = segment.array(segment.finished, slots)
        self._segment = segment
        self._words = words
        self._slot = slot
        # The words that this process stores. SUBMITTED under the submit lock of its client; WAITING by the leader
        # alone; WAITS and WAITED by any thread that has waited.
        self._mine = [segment.submitted + slot]  # empty once it may be another's
        self._waiting = segment.waiting + slot
        self._waits = segment.waits + slot
        self._waited = segment.waited + slot
        # Waited for by the leader alone; posted by the coordinator, or by whoever condemns a dead one's segment. Closed
        # by `release`, once nobody can lead.
        self._semaphore = semaphore
        # One thread of a process sleeps on its semaphore and wakes the others, so that no thread takes
        # the post that another needs. Empty: nobody leads.
        # By thread, so that one whose signal handler raised just then leads again when it comes back. Every
        # operation on it is one step: there is no instant at which an exception would leave it taken for good.
        self._leader: dict[str, int] = {}
        # How many of the leader's calls lead, one in the middle of the other: a signal handler may read while it waits.
        self._leads = 0
        # Locks that are taken, one for each thread that sleeps while another one leads. Appended by that thread; taken
        # out by it or by the leader, whichever comes first.
        self._followers: deque[threading.Lock] = deque()

    @property
    def last(self) -> int:
        """The ticket of the last P1 task that this slot's process has counted."""
        return int(self.submitted[self._slot])

    def raise_flag(self, ticket: int) -> None:
        """Count P1 tasks up to *ticket*, whose frames are wholly in the pipe. The caller holds the submit lock.

        A ticket that was drawn and never sent, since a signal handler raised, is passed over by the next. One that is
        behind what the word says already is of a submit in the middle of which another one began, and counts no more.
        """
        # S2. The frame is in the kernel (S1): the system call was a barrier of its own.
        raise_word(self._words, self._mine, ticket)
        # Store-load: nothing that follows from the return of submit (S3) may begin while SUBMITTED is in our store
        # buffer. No fence stands at the other end: a read that begins after S3 (R1) was told of it somehow, and that
        # is its barrier.
        fence()

    def retire(self) -> None:
        """Raise no flag any more: the slot may be another's from now on."""
        self._mine.clear()

    def within_reach(self) -> tuple[memoryview, memoryview]:
        """SUBMITTED and FINISHED of the slots that any process has had so far: all that a read need compare.

        Only for a caller that has loaded EPOCH before, and looks again whether it has moved (`GateKeeper.widen`).
        """
        # Load-load: REACH (L6) may not be loaded before the EPOCH (L4) that it is of. A REACH that is later than that
        # EPOCH does no harm. Pairs with the first fence of `memory.gatekeeper.GateKeeper.widen`.
        read_fence()
        segment, reach = self._segment, self._words[W_REACH]
        return segment.array(segment.submitted, reach), segment.array(segment.finished, reach)

    def is_open(self) -> bool:
        """Whether nothing that was submitted is unfinished."""
        # Between the two loads FINISHED can only have reached what SUBMITTED said later than the read began.
        if self.submitted != self.finished:
            return False
        # Load-load, as in `_reached`: VERSION (R3), and RESTARTS and STATUS, which a read looks at after the gate, may
        # not be loaded before the flag. Pairs with `memory.gatekeeper.GateKeeper.finish`.
        read_fence()
        return True

    def is_stopped(self) -> bool:
        """Whether the flow has ended: its coordinator stopped, or is dead and was given up."""
        return bool(self._words[W_STATUS] != SERVING)

    def is_condemned(self) -> bool:
        """Whether it ended because its coordinator died."""
        return bool(self._words[W_STATUS] == CONDEMNED)

    def unfinished(self) -> list[tuple[int, int]]:
        """What a read that begins now waits for (R1): the slots whose flag is up, with the tickets of their last P1."""
        both = zip(self.submitted.tolist(), self.finished.tolist(), strict=True)
        return [(slot, ticket) for slot, (ticket, done) in enumerate(both) if ticket > done]

    def wait(self, deadline: float | None, check: Callable[[], None]) -> bool:
        """Wait until every P1 task submitted by now is finished.

        Args:
            deadline: on `time.monotonic`'s clock, or None.
            check: called once a slice; raises when there is nobody left to wait for.

        Returns:
            False when the deadline has passed. True too when the flow was stopped: look at `is_stopped`.
        """
        finished = self.finished
        tickets = self.unfinished()
        if not tickets:
            read_fence()  # as in `is_open`
            return True
        began = time.monotonic()
        try:
            if look_for(lambda: _reached(finished, tickets), False):
                return True
            return self._wait_asleep(tickets, deadline, check)
        finally:
            # Statistics: threads of one process may lose an update to each other.
            self._words[self._waits] += 1
            self._words[self._waited] += int((time.monotonic() - began) * 1e9)

    def _wait_asleep(self, tickets: list[tuple[int, int]], deadline: float | None, check: Callable[[], None]) -> bool:
        me = threading.get_ident()
        while True:
            if self._leader.setdefault(LEADER, me) == me:
                leads = self._leads
                try:
                    self._leads = leads + 1
                    self._lead(tickets, deadline, check)
                finally:
                    self._leads = leads
                    # First the lead, then the wake-up: a follower looks whether anybody leads after it has queued, so
                    # either it sees that nobody does, or we see it in the queue.
                    if not leads:
                        self._leader.pop(LEADER, None)
                    self._wake_followers()
            else:
                self._follow(tickets, deadline)
            if _reached(self.finished, tickets) or self.is_stopped():
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            check()

    def _lead(self, tickets: list[tuple[int, int]], deadline: float | None, check: Callable[[], None]) -> None:
        words, waiting = self._words, self._waiting
        words[waiting] = 1  # W1
        try:
            # W2, store-load: the look at finished[] (W3) may not be done while WAITING is in our store buffer. Pairs
            # with `memory.gatekeeper.GateKeeper.wake`, and with `memory.leftovers.condemn` when the coordinator is
            # dead. Load-load: STATUS may not be loaded before the flag that brought us here. Pairs with the first
            # fence of `memory.gatekeeper.GateKeeper.stop`, and of `condemn`.
            fence()
            sys.audit("strictflow_mp.wait.marked")
            # W3 again before each sleep and after it: a post says only that it is worth while to look.
            while not _reached(self.finished, tickets) and not self.is_stopped():
                left = SLEEP_SECONDS if deadline is None else min(SLEEP_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    return
                sleep_on(self._semaphore, left)  # W4
                # W5: the look (W3) may not be done before the store that took the token. To take it is a full barrier
                # on x86-64, and only an acquire elsewhere. Pairs with `memory.gatekeeper.GateKeeper.wake`, which spares
                # a post where a token is left.
                read_fence()
                self._wake_followers()  # what woke us may be what they wait for
                if _reached(self.finished, tickets) or self.is_stopped():
                    return
                check()
        finally:
            words[waiting] = 1 if self._leads > 1 else 0  # whoever was interrupted waits on

    def _follow(self, tickets: list[tuple[int, int]], deadline: float | None) -> None:
        # A lock that is taken already, for the leader to give back: unlike a condition, it can be left by the
        # exception of a signal handler at any instant.
        bed = threading.Lock()
        bed.acquire()
        self._followers.append(bed)
        try:
            # The leader first goes, then wakes: it cannot miss a bed that stands here while it still leads.
            if self._leader and not _reached(self.finished, tickets):
                left = SLEEP_SECONDS if deadline is None else min(SLEEP_SECONDS, deadline - time.monotonic())
                bed.acquire(timeout=max(0.0, left))
        finally:
            try:
                self._followers.remove(bed)
            except ValueError:
                pass  # woken

    def _wake_followers(self) -> None:
        while self._followers:
            try:
                self._followers.popleft().release()
            except IndexError:
                return

    def release(self) -> None:
        """Close the semaphore, unless a thread sleeps on it."""
        # The lead stays taken: nobody may sleep on a closed semaphore.
        if self._leader.setdefault(LEADER, NO_THREAD) == NO_THREAD:
            try:
                self._semaphore.close()
            except posix.ExistentialError:
                pass  # another thread was here first

    def __repr__(self) -> str:
        return f"<Gate of slot {self._slot}, {'open' if self.is_open() else 'closed'}>"


def _reached(finished: memoryview, tickets: list[tuple[int, int]]) -> bool:
    """Whether FINISHED has reached each slot's ticket (R2)."""
    for slot, ticket in tickets:
        if finished[slot] < ticket:
            return False
    # Load-load: VERSION (R3) may not be loaded before the FINISHED word that speaks of it. Pairs with
    # `memory.gatekeeper.GateKeeper.finish`.
    read_fence()
    return True
