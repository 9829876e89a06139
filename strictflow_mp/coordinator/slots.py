"""Slots: which process has which slot, and how it comes back to it or loses it.

Written by: SF-LOOP's thread alone; the slot's words, through `gatekeeper`.
Order: a slot's receipts and pins are forgotten before its words say that it is nobody's (`GateKeeper.dismiss`), and
    only then may it be given to another process.
If we die here: the words say who has a slot. The next coordinator keeps it for that process.
Invariants: a slot is given to another process only when its former process is proved dead or to run another program by
    now, or has said goodbye and holds no pin any more, and when none of its tasks is queued any more.

After a coordinator's death, the next one finds in the segment who had which slot. These are *away*: they keep their
slot, and for `GRACE_SECONDS` their flag too; they come back when they notice, and may take their time.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from ..core import logger
from ..store import Receipt, StoreWriter, clear_pins, has_pins
from ..system.identity import Identity
from ..wire import frames
from .sessions import Session, Sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..memory.gatekeeper import GateKeeper, Tenancy
    from ..memory.segment import Segment
    from ..wire.stream import Stream

__all__ = ["Slots", "answers_of"]

GRACE_SECONDS = 1.0
"""In which readers still wait, after a takeover, for what processes that are away had submitted.

`loop.FLAG_SECONDS` is longer."""
LOOK_SECONDS = 0.05
"""Between looks at slots whose process still lives, though its connection is closed."""


class Slots:
    """Gives slots to processes and takes them back. Slot 0 is SF-LOOP's own.

    Args:
        withdraw: called with the slot of a process that comes back for the second time: what is queued of it comes
            once more.
    """

    def __init__(
        self,
        sessions: Sessions,
        segment: Segment,
        gate: GateKeeper,
        writer: StoreWriter,
        withdraw: Callable[[int], None],
    ) -> None:
        self._sessions = sessions
        self._segment = segment
        self._gate = gate
        self._receipts = writer.receipts
        # Commits a version that changes nothing: readers find what they know outdated, and look at EPOCH.
        self._renew = partial(writer.publish, {})
        self._withdraw = withdraw
        self._me = Identity.mine()

    @property
    def total(self) -> int:
        """How many there are for processes."""
        return self._segment.slots - 1

    # Coming

    def give(self, newcomer: Identity, beginning: int = 0) -> int | None:
        """Give a free slot to a process that attaches; None when all are taken by live processes.

        Raises:
            OSError: there is no room for its semaphore.
            StateFull: its flag is beyond what readers look at, and there is no room for the version that tells them.
        """
        self._forget_tries(newcomer, beginning)
        slot = self._free_slot()
        if slot is None:
            return None
        if not self._gate.is_within_reach(slot):
            self._gate.widen(slot, self._renew)
        self._gate.admit(slot, newcomer)
        return slot

    def _forget_tries(self, newcomer: Identity, beginning: int) -> None:
        """A process that attaches anew has given up what it had from a dead coordinator, but for the pins there.

        What another program has left to it, which it has replaced, it has given up whatever that was.
        """
        for session in self._sessions:
            if session.identity != newcomer:
                continue
            if session.beginning and beginning and session.beginning != beginning:
                session.said_goodbye = session.is_replaced = True
                if session.is_open:
                    session.stream.shut()  # all that is in the pipe is read, then its end
            elif session.is_expected:
                session.said_goodbye = True
                session.awaited_until = 0.0  # what it had submitted it will not send again
                self._sessions.has_leavers = True

    def _free_slot(self) -> int | None:
        self._sessions.next_look = 0.0
        self.reclaim()
        for slot in range(1, self._segment.slots):
            if self._sessions.at(slot) is None:
                return slot
        return None

    def enter(self, stream: Stream, slot: int, beginning: int = 0) -> Session:
        """The process that has been given a slot, or has been let back to it, is attached from now on."""
        session = self._session(stream, self._gate.tenancy(slot), beginning)
        session.answered = answers_of(self._receipts.of(session.tenant)) or None
        former = self._sessions.at(slot)
        if former is not None:
            # It may go again before it has sent what it came for.
            session.awaited_until = former.awaited_until
        self._sessions.enter(session)
        return session

    def terms_of(self, slot: int) -> dict[str, object]:
        """What a process must know of its slot."""
        return {
            "slot": slot,
            "tenant": self._gate.tenancy(slot).tenant,
            "semaphore": self._gate.semaphore_of(slot),
        }

    def _session(self, stream: Stream | None, tenancy: Tenancy, beginning: int = 0) -> Session:
        # Its words do not hold the boot: shared memory does not outlive that.
        identity = Identity(tenancy.pid, tenancy.start, self._me.boot, tenancy.space)
        return Session(stream, tenancy.slot, tenancy.tenant, identity, beginning)

    # Coming back

    def expect(self, tenancies: list[Tenancy]) -> None:
        """After a takeover: these had a slot, and may come back to it."""
        grace_ends = time.monotonic() + GRACE_SECONDS
        for tenancy in tenancies:
            session = self._session(None, tenancy)
            session.awaited_until = grace_ends
            self._sessions.enter(session)
        self._sessions.has_leavers = True
        self.reclaim()

    def let_back(self, newcomer: Identity, slot: int, tenant: int, first: int) -> bool:
        """Let a process back to the slot that it had; its first P1 without an answer has ticket *first* (0: none).

        False when the slot is no longer kept for it.
        """
        session = self._sessions.at(slot)
        if session is None or session.said_goodbye or session.tenant != tenant or not session.identity.may_be(newcomer):
            return False
        if not session.is_away:
            # It was here already, and a signal handler raised before it knew. It sends everything once more.
            self._sessions.close(session)
            self._withdraw(slot)
            session.awaited_until = time.monotonic() + GRACE_SECONDS
        if first > 0:
            self._gate.raise_again(slot, first)
        return True

    # Leaving

    def reclaim(self) -> None:
        """Take back the slots of processes that are proved dead, or have said goodbye and let go of their pins."""
        sessions, now = self._sessions, time.monotonic()
        if now < sessions.next_look:
            return
        sessions.next_look = 0.0
        sessions.has_leavers = False
        for session in sessions:
            if session.is_open:
                continue
            if not session.queued and now >= session.awaited_until:
                self._gate.lift(session.slot)
            if session.queued:
                sessions.has_leavers = True
            elif self._has_let_go(session):
                self._release(session)
            else:
                # It lives, and may still raise its flag, or reads what it has pinned: look again and again.
                sessions.has_leavers = True
                sessions.next_look = now + LOOK_SECONDS

    def _has_let_go(self, session: Session) -> bool:
        """Whether nobody touches the slot any more: that has been said, and is seen, or it is proved."""
        return (session.said_goodbye and not has_pins(self._segment, session.slot)) or session.is_gone()

    def _release(self, session: Session) -> None:
        self._sessions.remove(session)
        self._receipts.forget(session.tenant)
        clear_pins(self._segment, session.slot)
        self._gate.dismiss(session.slot)
        # A read may have waited for a flag that is no longer up.
        self._gate.wake()
        logger.debug("pid %d left slot %d", session.identity.pid, session.slot, extra=session.about)

    def close(self) -> None:
        """The flow ends: close every connection, and take every slot back."""
        for session in self._sessions:
            self._sessions.close(session)
            self._sessions.remove(session)
            self._gate.dismiss(session.slot)

    def __repr__(self) -> str:
        return f"<Slots: {len(self._sessions)} of {self.total} taken>"


def answers_of(receipts: list[Receipt]) -> dict[int, bytes]:
    """The answer to each task, by seq; empty for one that is lost."""
    answers: dict[int, bytes] = {}
    for receipt in receipts:
        frame = frames.unpack_frame(receipt.answer) if receipt.answer else ()
        if frame and frame[0] == frames.RESULT:
            for seq, payload in enumerate(frame[2], receipt.seq):
                answers[seq] = frames.pack_frame(frames.RESULT, seq, (payload,))
        else:
            answers |= dict.fromkeys(range(receipt.seq, receipt.seq + receipt.tasks), receipt.answer)
    return answers
