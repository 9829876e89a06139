"""SF-LOOP: runs every task of a flow, one thread, one at a time.

It performs what `scheduler` decides: drains the pipes, has a burst of P1 tasks run (`runner`), then one P2 task, or a
step of the async ones; then looks again. What a frame asks for is done by `requests`.

A stop goes in three steps: what was submitted before it is taken in; from then on frames are refused; the loop returns
when nothing is left to run.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from ..core import logger
from .child import end_child
from .inside import Inside
from .requests import Requests
from .runner import Runner
from .scheduler import ASYNC, BURST, CANCELLED, IDLE, READ
from .stepper import CLEAN_UP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .calls import Call
    from .parts import Parts
    from .recorder import Recorder
    from .reloads import Reloads

__all__ = ["SFLoop"]

HOUSEKEEPING_SECONDS = 0.25
"""Between looks at what nobody tells us: an owner and workers without a pidfd, handshakes that take too long."""
LAST_FRAME_SECONDS = 1.0
"""In which the frame of a flag that is up may arrive when the flow stops."""
FRAME_SECONDS = 0.001
"""One wait for the frame of a flag that is up."""
FLAG_SECONDS = 2.0
"""For which a P2 task waits for the frame of a flag that is up before it runs all the same: longer than a process that
is away has to come back, `slots.GRACE_SECONDS`."""


class SFLoop:
    """The loop, and what it offers to the tasks that run in it."""

    def __init__(
        self,
        parts: Parts,
        recorder: Recorder,
        *,
        task_timeout: float | None,
        max_pending: int,
        report: Callable[[], dict[str, Any]],
        is_at_home: Callable[[], bool],
        reloads: Reloads,
    ) -> None:
        self.gate = parts.gate
        self.sessions = parts.sessions
        self.scheduler = parts.scheduler
        self.stepper = parts.stepper
        self._slots = parts.slots
        self._admission = parts.admission
        self._home = parts.marker.home  # its element is 0 in a child that a task has forked
        self._recorder = recorder
        self._is_at_home = is_at_home
        self._next_look = 0.0  # at our own place, by `time.monotonic`
        self.inside = Inside(parts, report, task_timeout)
        self.runner = Runner(parts, self.inside)
        self.requests = Requests(parts, self.runner, self.inside, recorder, reloads, self.stop, max_pending)
        self._reloads = reloads
        # Set when `run` returns: the flow goes on, with the next coordinator.
        self.is_leaving = False
        # None until somebody, or a signal, asks for a stop; then whether queued tasks are still run.
        self._stopping: bool | None = None
        # When the loop ends though async tasks are under way, on `time.monotonic`'s clock: soon after a stop that
        # does not wait for what is queued, and else never.
        self._patience_ends = math.inf
        recorder.serve(self.runner)

    def run(self) -> None:
        """Run until the flow is stopped or deserted, or the next coordinator is to go on with it (`is_leaving`)."""
        scheduler, home = self.scheduler, self._home
        while True:
            if not home[0]:
                end_child()
            idle = scheduler.next_step() is IDLE
            if self.requests.is_refusing and (idle or time.monotonic() >= self._patience_ends):
                return
            reloads = self._reloads
            self._drain((FRAME_SECONDS if reloads.is_asked else HOUSEKEEPING_SECONDS) if idle else 0)
            if reloads.is_asked and self._stopping is None and reloads.may_leave():
                self._leave()
                return
            if self._stopping is not None and not self.requests.is_refusing:
                self._close_the_door(self._stopping)
            if idle:
                self._admission.door.hurry()
                if time.monotonic() >= self._next_look:
                    self._look_at_place()
            if idle and scheduler.is_idle and self.sessions.is_deserted and not self._admission.door:
                logger.info("the owner is gone and nobody is attached: the flow ends")
                return
            step = scheduler.next_step()
            if step is BURST:
                self.runner.run_burst()
            elif step in (READ, ASYNC) and not self._look_for_writes():
                if step is READ:
                    self.runner.run_read()
                else:
                    scheduler.async_ran()
                    # Alone, async tasks may have the thread until a pipe is readable.
                    self.stepper.run(0 if scheduler.reads > len(self.stepper) else HOUSEKEEPING_SECONDS)

    def _look_at_place(self) -> None:
        """A flow that nobody can find any more must end: else another one begins under its name beside it."""
        self._next_look = time.monotonic() + HOUSEKEEPING_SECONDS
        if self._stopping is None and not self._is_at_home():
            self.stop()

    def _leave(self) -> None:
        """Let what runs on its own come to its end; the next coordinator begins with what has no answer."""
        self.is_leaving = self.runner.is_leaving = True
        self.stepper.close()
        self._reloads.finish(self.runner.run_burst)

    # Draining

    def _drain(self, timeout: float) -> None:
        sessions, accept = self.sessions, self.requests.accept
        for session, arrived in sessions.poll(timeout):
            sys.audit("strictflow_mp.loop.received")
            for frame in arrived:
                try:
                    accept(session, frame)
                except Exception as error:
                    # Whatever a frame can bring about, it costs its own connection only.
                    sessions.expel(session, error)
                    break
        # After the frames: the last tasks of a process that has gone must be queued before its slot is taken back.
        if sessions.is_woken:
            self._admission.admit()
        if sessions.has_leavers:
            self._slots.reclaim()
            self.runner.notices.keep(lambda session: session.is_open)
            self._recorder.look()

    def _look_for_writes(self) -> bool:
        """Before a P2 goes on: is a P1 queued? Its frame may still be in its pipe, but its flag is up."""
        if self.gate.is_open():
            return False
        deadline = time.monotonic() + FLAG_SECONDS
        while time.monotonic() < deadline:
            if self.scheduler.writes:
                return True
            if not self.gate.is_up():
                return False
            self._drain(FRAME_SECONDS)
        logger.warning("a flag is up and no frame comes; P2 tasks go on")
        return False

    # Stopping

    def stop(self, *, drain: bool = True) -> None:
        """Return from `run` soon: when all queued tasks have run (*drain*), or without running them."""
        self._stopping = drain

    def _close_the_door(self, drain: bool) -> None:
        """Take in what was submitted before the stop, then refuse what comes."""
        self._drain(0)
        deadline = time.monotonic() + LAST_FRAME_SECONDS
        # A flag that is up says that a frame was sent: it is on its way, and was there before the stop.
        while self.gate.is_up() and not self.scheduler.writes and time.monotonic() < deadline:
            self._drain(FRAME_SECONDS)
        self.requests.is_refusing = True
        if not drain:
            self._drop_all()
            self.runner.cancel_all_async()
            self._patience_ends = time.monotonic() + CLEAN_UP_SECONDS

    def _drop_all(self) -> None:
        """Refuse what is queued. P1 tasks are counted as finished: nobody may wait for them."""
        tickets: dict[int, int] = {}
        while (call := self.scheduler.next_write(0, 0)) is not None:
            self._drop(call)
            tickets[call.slot] = call.ticket
        while self.scheduler.reads > len(self.stepper):
            self._drop(self.scheduler.next_read())
        if tickets:
            self.gate.finish(tickets)

    def _drop(self, call: Call) -> None:
        if call.state is not CANCELLED:  # else it has its answer
            self.requests.refuse(call)
        if call.session is not None:
            call.session.queued -= 1

    def close(self) -> None:
        """Give up the asyncio loop."""
        self._recorder.close()
        self.stepper.close()
