"""The scheduler: which task SF-LOOP runs next. Decisions only: no clock, no I/O, no functions called.

Events in: `submit`, `submit_all`, `cancel`, `withdraw`, `async_started`, `async_ran`, `async_ended`. Next step out:
`next_step`, and within it `next_write` or `next_read`. The loop performs it. `first_write`, `queued_writes` and
the properties only tell.

The rules:

1. While a P1 task is queued, no P2 task starts and no async P2 task goes on.
2. P1 tasks run in the order in which they were queued, in bursts; a burst ends when it has run `BURST_TASKS`
   tasks or `BURST_SECONDS` seconds, so that answers leave and late cancellations are seen.
3. Sync P2 tasks run one at a time, in order, and take turns with the async ones, so that neither starves.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from ..core import READ_PRIORITY, WRITE_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ASYNC",
    "BURST",
    "BURST_SECONDS",
    "BURST_TASKS",
    "CANCELLED",
    "IDLE",
    "READ",
    "Schedulable",
    "Scheduler",
    "State",
    "Step",
]

BURST_TASKS = 256
"""That a burst runs at most."""
BURST_SECONDS = 0.002
"""After which no further task joins a burst."""


class Step(enum.Enum):
    """What SF-LOOP does next."""

    BURST = "run P1 tasks"
    READ = "run one P2 task"
    ASYNC = "let async P2 tasks go on"
    IDLE = "wait"


class State(enum.Enum):
    """Where a call is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLED = "cancelled"


# For the hot paths: an Enum's attribute takes 60 ns on 3.10 and 3.11, a name of a module 2.
QUEUED, RUNNING, CANCELLED = State
BURST, READ, ASYNC, IDLE = Step


class Schedulable:
    """A call as the policy sees it: the slot of its process, its seq there, its priority."""

    # QUEUED, then either RUNNING or CANCELLED, for good. Only the scheduler sets it.
    state: State = QUEUED
    is_void = False
    """It comes once more: it is not even counted."""

    def __init__(self, slot: int, seq: int, priority: int) -> None:
        self.slot = slot
        self.seq = seq
        self.priority = priority

    def __repr__(self) -> str:
        return f"<P{self.priority} #{self.seq} of slot {self.slot}, {self.state.value}>"


C = TypeVar("C", bound=Schedulable)


class Scheduler(Generic[C]):
    """Two queues, and whose turn it is."""

    def __init__(self) -> None:
        # P1, in the order of arrival, which is that of tickets for each slot. Cancelled ones stay in their place.
        self._writes: deque[C] = deque()
        # P2, in the order of arrival. All are QUEUED.
        self._reads: deque[C] = deque()
        # How many async P2 tasks are under way; each was taken from `_reads` before.
        self._async = 0
        # Whether a P2 was started since the async ones had their turn: then they are next.
        self._async_turn = False

    # Events in

    def submit(self, call: C) -> None:
        """A call has arrived."""
        (self._writes if call.priority == WRITE_PRIORITY else self._reads).append(call)

    def submit_all(self, calls: list[C]) -> None:
        """Several calls of one priority have arrived, at least one."""
        (self._writes if calls[0].priority == WRITE_PRIORITY else self._reads).extend(calls)

    def cancel(self, slot: int, seq: int) -> C | None:
        """Take a task back; None when it has started already, or is unknown.

        A cancelled P1 stays in the queue: its process's P1 tasks are counted in their order.
        """
        # Looked for, the last first: an index would cost every task what few need.
        for queue in (self._writes, self._reads):
            for call in reversed(queue):
                if call.seq == seq and call.slot == slot and call.state is QUEUED:
                    self._take_back(call)
                    return call
        return None

    def _take_back(self, call: C) -> None:
        call.state = CANCELLED
        if call.priority == READ_PRIORITY:
            self._reads.remove(call)

    def withdraw(self, slot: int) -> None:
        """Take back all that a slot's process has queued; nothing of it counts."""
        for call in [*self._writes, *self._reads]:
            if call.slot == slot and call.state is QUEUED:
                self._take_back(call)
                call.is_void = True

    def async_started(self) -> None:
        """A P2 task that was run turned out to be a coroutine."""
        self._async += 1

    def async_ended(self) -> None:
        """One of these has ended."""
        self._async -= 1

    def async_ran(self) -> None:
        """The async P2 tasks have had their turn."""
        self._async_turn = False

    # Next step out

    def next_step(self) -> Step:
        """What to do now."""
        if self._writes:
            return BURST
        if self._async and (self._async_turn or not self._reads):
            return ASYNC
        return READ if self._reads else IDLE

    def next_write(self, done: int, elapsed: float) -> C | None:
        """The next P1 task of a burst that has run *done* tasks for *elapsed* seconds; None ends it.

        A call that was cancelled comes out too, marked, to be counted but not run.
        """
        if not self._writes or done >= BURST_TASKS or (done and elapsed >= BURST_SECONDS):
            return None
        call = self._writes.popleft()
        if call.state is QUEUED:
            call.state = RUNNING
        return call

    def next_read(self) -> C:
        """The P2 task to run."""
        self._async_turn = True
        call = self._reads.popleft()
        call.state = RUNNING
        return call

    def first_write(self, slot: int) -> C | None:
        """The first queued P1 task of a slot's process."""
        return next((call for call in self._writes if call.slot == slot), None)

    def queued_writes(self) -> Iterator[C]:
        """The queued P1 tasks, in order; cancelled ones too."""
        return iter(self._writes)

    @property
    def writes(self) -> int:
        """P1 tasks queued."""
        return len(self._writes)

    @property
    def reads(self) -> int:
        """P2 tasks queued, and async ones under way."""
        return len(self._reads) + self._async

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return not (self._writes or self._reads or self._async)

    def __repr__(self) -> str:
        return f"<Scheduler: {self.writes} P1, {len(self._reads)} P2, {self._async} async>"
