"""Reloads: when this coordinator leaves, so that the next one, a fresh interpreter, goes on with the same state.

Owns: the list of who has asked. What is stored in shared memory is `memory.succession`'s.
Order: a process asks for a coordinator later than the one that serves, by its RESTARTS. This one does not answer; it
    ends, between two bursts. The process comes back to the next one as after a death, and asks again: that one answers
    with the pause that it has seen. So a question is never lost, and never reloads twice.
If we die here: that is a takeover like any other, and the next one's answer is the same.
Invariants: it leaves only while an owner is not proved dead, who starts the next one. It runs first what nobody would
    send to the next one: P1 tasks that tasks have submitted, and those of processes that are gone.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING

from ..core import logger
from ..errors import FlowExists, FlowNotRunning, StrictFlowError, TaskTimeout
from ..memory.segment import W_RESTARTS
from ..memory.succession import store_owner

if TYPE_CHECKING:
    from collections.abc import Callable

    from .parts import Parts
    from .sessions import Session

__all__ = ["Reloads"]

QUIET_SECONDS = 0.1
"""In which it leaves only when no flag is up: then nothing that was submitted has to be sent again."""
PATIENCE_SECONDS = 10.0
"""In which what nobody would send again must have run; else the reload is given up."""
LAST_BURSTS_SECONDS = 1.0
"""For what async tasks submit while they clean up."""


class Reloads:
    """Of one coordinator.

    Args:
        pause: seconds between the last one's leaving and our serving; None if it died, or there was none.
    """

    def __init__(self, parts: Parts, pause: Callable[[], float | None]) -> None:
        self._parts = parts
        self._pause = pause
        self._asked: list[tuple[Session, int]] = []
        # Whether somebody has asked: the loop looks at it in each turn.
        self.is_asked = False
        self._since = 0.0  # by `time.monotonic`

    def ask(self, session: Session, seq: int, restarts: int, *, is_stopping: bool) -> float | None:
        """A process wants a coordinator after the one with that number; when that is not us, the pause before us.

        Raises:
            StrictFlowError: there can be no next one.
            Wait: it is answered by the next one.
        """
        if self._parts.segment.words[W_RESTARTS] != restarts:
            return self._pause()
        if is_stopping:
            raise FlowNotRunning("it is being stopped, and is not reloaded", flow=self._parts.flow)
        if not self._parts.sessions.has_owner():
            name = self._parts.flow
            raise StrictFlowError(
                "it cannot be reloaded: no process owns it that would start the next coordinator; "
                f"`strictflow-mp serve {shlex.quote(name)}` adopts it, then reload it again",
                flow=name,
            )
        if not self.is_asked:
            self._since = time.monotonic()
        self._asked.append((session, seq))
        self.is_asked = True
        raise Wait

    def adopt(self, session: Session, *, always: bool, is_stopping: bool) -> None:
        """A process wants to be the owner: leave, for the next coordinator, which it starts.

        Raises:
            StrictFlowError: there is an owner, or the flow is being stopped.
        """
        flow, sessions = self._parts.flow, self._parts.sessions
        if is_stopping:
            raise FlowNotRunning("it is being stopped, and is not adopted", flow=flow)
        if sessions.has_owner():
            raise FlowExists("its owner lives; use StrictFlow.attach() to join it, or choose another name", flow=flow)
        sessions.take_owner(session.identity)
        # Before it is answered: who waits for the next coordinator from then on finds who starts it.
        store_owner(self._parts.segment, session.identity, always=always)
        sys.audit("strictflow_mp.adopt.stored")
        logger.info("flow %r: its owner has died; pid %d adopts it", flow, session.identity.pid, extra=session.about)
        self._since = time.monotonic()
        self.is_asked = True

    def may_leave(self) -> bool:
        """Between two bursts: whether now is the moment."""
        waited = time.monotonic() - self._since
        if self._has_orphans():
            if waited > PATIENCE_SECONDS:
                self._give_up()
            return False
        return waited > QUIET_SECONDS or not self._parts.gate.is_up()

    def _has_orphans(self) -> bool:
        """Whether a P1 is queued that nobody would send to the next coordinator."""
        return any(
            call.session is None or not (call.session.is_open or call.is_void)
            for call in self._parts.scheduler.queued_writes()
        )

    def _give_up(self) -> None:
        error = TaskTimeout(
            f"it is not reloaded: for {PATIENCE_SECONDS:g} s tasks have submitted tasks without an end, and those "
            "would be lost",
            flow=self._parts.flow,
        )
        for session, seq in self._asked:
            self._parts.sessions.fail(session, seq, error)
        self._asked.clear()
        self.is_asked = False

    def finish(self, run_burst: Callable[[], None]) -> None:
        """The async tasks have been cancelled: run what they have still submitted."""
        deadline = time.monotonic() + LAST_BURSTS_SECONDS
        while self._has_orphans() and time.monotonic() < deadline:
            run_burst()

    def __repr__(self) -> str:
        return f"<Reloads: {len(self._asked)} asked>"


class Wait(Exception):
    """There is no answer yet."""
