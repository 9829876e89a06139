"""The scheduler: which task SF-LOOP runs next. Decisions only: no clock, no I/O, no functions called.

Events in: `submit`, `submit_all`, `cancel`, `async_started`, `async_ran`,
`async_ended`. Next step out: `next_step`. The loop performs it.

The rules:

1. While a P1 task is queued, no P2 task starts and no async P2 task goes on.
2. P1 tasks run in the order in which they were queued, in bursts; a burst ends when it has run `BURST_TASKS`
   tasks or `BURST_TIME` seconds, so that answers leave and late cancellations are seen.
3. Sync P2 tasks run one at a time, in order, and take turns with the async ones, so that neither starves.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Generic, TypeVar

__all__ = [
    "ASYNC",
    "BURST",
    "BURST_TASKS",
    "BURST_TIME",
    "CANCELLED",
    "IDLE",
    "READ",
    "Job",
    "Scheduler",
    "State",
    "Step",
]

BURST_TASKS = 256
BURST_TIME = 0.002
"""Seconds after which no further task joins a burst."""


class Step(enum.Enum):
    """What SF-LOOP does next."""

    BURST = "run P1 tasks"
    READ = "run one P2 task"
    ASYNC = "let async P2 tasks go on"
    IDLE = "wait"


class State(enum.Enum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLED = "cancelled"


# For the hot paths: an Enum's attribute takes 60 ns on 3.10 and 3.11, a name of a module 2.
QUEUED, RUNNING, CANCELLED = State
BURST, READ, ASYNC, IDLE = Step


class Job:
    """A task as the policy sees it: whose it is, its number there, its priority."""

    state: State = QUEUED
    is_void = False
    """It comes once more: it is not even counted."""

    def __init__(self, owner: int, number: int, priority: int) -> None:
        self.owner = owner
        self.number = number
        self.priority = priority

    def __repr__(self) -> str:
        return f"<P{self.priority} #{self.number} of {self.owner}, {self.state.value}>"


J = TypeVar("J", bound=Job)


class Scheduler(Generic[J]):
    """Two queues, and whose turn it is."""

    def __init__(self) -> None:
        self._writes: deque[J] = deque()
        self._reads: deque[J] = deque()
        self._async = 0
        self._async_turn = False

    # Events in

    def submit(self, job: J) -> None:
        """A task has arrived."""
        (self._writes if job.priority == 1 else self._reads).append(job)

    def submit_all(self, jobs: list[J]) -> None:
        """Several tasks of one priority have arrived."""
        (self._writes if jobs[0].priority == 1 else self._reads).extend(jobs)

    def cancel(self, owner: int, number: int) -> J | None:
        """Take a task back; None when it has started already, or is unknown.

        A cancelled P1 keeps its place in the queue: its owner's P1 tasks are counted in their order.
        """
        # Looked for, the last first: an index would cost every task what few need.
        for queue in (self._writes, self._reads):
            for job in reversed(queue):
                if job.number == number and job.owner == owner and job.state is QUEUED:
                    self._take_back(job)
                    return job
        return None

    def _take_back(self, job: J) -> None:
        job.state = CANCELLED
        if job.priority == 2:
            self._reads.remove(job)

    def withdraw(self, owner: int) -> None:
        """Take back all that an owner has queued; nothing of it counts."""
        for job in [*self._writes, *self._reads]:
            if job.owner == owner and job.state is QUEUED:
                self._take_back(job)
                job.is_void = True

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

    def next_write(self, done: int, elapsed: float) -> J | None:
        """The next P1 task of a burst that has run *done* tasks for *elapsed* seconds; None ends it.

        A job that was cancelled comes out too, marked, to be counted but not run.
        """
        if not self._writes or done >= BURST_TASKS or (done and elapsed >= BURST_TIME):
            return None
        job = self._writes.popleft()
        if job.state is QUEUED:
            job.state = RUNNING
        return job

    def next_read(self) -> J:
        """The P2 task to run."""
        self._async_turn = True
        job = self._reads.popleft()
        job.state = RUNNING
        return job

    def first_write(self, owner: int) -> J | None:
        """The first queued P1 task of an owner."""
        return next((job for job in self._writes if job.owner == owner), None)

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
