"""The gatekeeper: the flag as the coordinator moves it, and the slots that it gives out (`gate` has the protocol).

Owns: FINISHED, REACH, TENANCIES, EPOCH (with `takeover`), the words that say whose a slot is, and all of slot 0; the
    semaphores, which it makes and unlinks.
Written by: the coordinator alone. WAITING, WAITS, WAITED and SUBMITTED of another slot it stores only between two
    tenants.
Read by: every process (the flag); the next coordinator (whose the slots are).
Order: *finish*: VERSION, FINISHED, *fence*, look at WAITING, post. *admit*: the semaphore, the words of the newcomer,
    its pid last. *dismiss*: the flag is lowered, then the slot is nobody's, then the semaphore goes. *widen*: REACH,
    EPOCH, VERSION, and only then a newcomer is told its slot.
If we die here: a slot is somebody's exactly if PIDS says so. A free one may have a semaphore, then its word SEMAPHORES
    is not 0, and `take_over` removes it; a FINISHED that was not stored is counted from the receipts
    (`coordinator.takeover`); readers look again after one sleep.
Invariants: FINISHED[i] <= SUBMITTED[i] but for a submit that has not counted yet; it only grows while a slot has one
    tenant, but for `raise_again`. A slot beyond REACH has never been anybody's.

The protocol: docs/protocols/gate.md.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, NamedTuple

from ..system import posix
from .fences import fence, publish_fence, raise_word
from .segment import STOPPED, W_EPOCH, W_REACH, W_STATUS, W_TENANCIES, Segment
from .semaphores import make_semaphore, open_semaphore, semaphore_name, unlink_semaphore, value_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..system.identity import Identity

__all__ = ["GateKeeper", "Tenancy"]


class Tenancy(NamedTuple):
    """Whose a slot is, and since which admission. A slot that is free has pid 0."""

    slot: int
    pid: int
    start: int
    """Its start time, so that another process of that pid is not taken for it."""
    space: int
    """Its pid namespace; 0 when that is not known."""
    tenant: int
    """The value of TENANCIES at its admission: never the same for two processes of a flow."""


class GateKeeper:
    """The flag as the coordinator moves it."""

    def __init__(self, segment: Segment, token: str) -> None:
        words, slots = segment.words, segment.slots
        self._token = token
        self._segment = segment
        self._words = words
        self._submitted = words[segment.submitted : segment.submitted + slots]
        self._finished = words[segment.finished : segment.finished + slots]
        self._waiting = words[segment.waiting : segment.waiting + slots]
        # As many zeros, to compare WAITING with in one step.
        self._nobody = memoryview(bytes(8 * slots)).cast("Q")
        self._look_within(words[W_REACH])
        # Of each slot that is somebody's. Posted by us, waited for by the slot's process.
        self._semaphores: dict[int, posix.Semaphore] = {}
        # Tickets of slot 0, whose SUBMITTED nobody else stores while we live.
        self._tickets = itertools.count(self._submitted[0] + 1)

    def take_over(self) -> list[Tenancy]:
        """Begin where a dead coordinator ended; return whose the slots are."""
        # Nothing of slot 0 is queued any more: what tasks had submitted died with the coordinator.
        self._finished[0] = self.raised
        found = []
        for slot in range(1, self._segment.slots):
            tenancy = self.tenancy(slot)
            words = self._segment.slot(slot)
            if not tenancy.pid:
                unlink_semaphore(self._token, words)  # it died between the semaphore and the slot's words
                continue
            try:
                self._semaphores[slot] = open_semaphore(self.semaphore_of(slot))
            except (posix.ExistentialError, posix.PermissionsError):
                # Somebody has removed it, and may have taken its name. The slot's process sleeps on the former one, a
                # slice at a time.
                self._semaphores[slot] = make_semaphore(self._token, words)
            found.append(tenancy)
        return found

    # Slots

    def _look_within(self, reach: int) -> None:
        # The same arrays as far as REACH: the others are 0 all through, for nobody has had those slots.
        self._up, self._down = self._submitted[:reach], self._finished[:reach]
        self._asleep, self._awake = self._waiting[:reach], self._nobody[:reach]

    def is_within_reach(self, slot: int) -> bool:
        """Whether readers look at the flag of a slot."""
        return slot < len(self._up)

    def widen(self, slot: int, renew: Callable[[], object]) -> None:
        """Have readers look at the flag of a slot that no process has had yet; then one may be let in.

        Most flows never have more than a few processes at a time, and to compare the flags of all slots would take more
        than the rest of a read.

        Args:
            renew: commits a version, so that readers find what they know outdated, and look at EPOCH.
        """
        words = self._words
        former = reach = words[W_REACH]
        while reach <= slot:
            reach *= 2
        words[W_REACH] = min(reach, self._segment.slots)  # A1
        # Store-store: EPOCH (A2) may not be seen before the REACH that it tells of. Pairs with
        # `memory.gate.Gate.within_reach`.
        publish_fence()
        words[W_EPOCH] += 1
        sys.audit("strictflow_mp.admit.widened")
        # Store-store: VERSION (A3) may not be seen before EPOCH: a read looks at EPOCH because VERSION has moved. Pairs
        # with the second fence of `client.state.FlowState._get_fenced`.
        publish_fence()
        try:
            renew()
        except BaseException:
            words[W_REACH] = former  # readers may not know of it: whoever needs the slot next must do it again
            raise
        self._look_within(words[W_REACH])

    def tenancy(self, slot: int) -> Tenancy:
        """Whose a slot is."""
        words = self._segment.slot(slot)
        return Tenancy(slot, words.pid, words.start, words.space, words.tenant)

    def admit(self, slot: int, newcomer: Identity) -> str:
        """Give a slot to a process; return the name of its semaphore."""
        words = self._segment.slot(slot)
        unlink_semaphore(self._token, words)
        self._semaphores[slot] = make_semaphore(self._token, words)
        sys.audit("strictflow_mp.admit.semaphore")
        words.waiting = words.waits = words.waited = 0
        self._words[W_TENANCIES] += 1
        words.tenant = self._words[W_TENANCIES]
        words.start, words.space = newcomer.start, newcomer.space
        # Store-store: PIDS, which says that the slot is taken, may not be seen before the words that say by whom. At
        # the other end is `take_over` in the next coordinator, which reads them after the lock of the place has
        # passed to it.
        publish_fence()
        words.pid = newcomer.pid
        sys.audit("strictflow_mp.admit.slot")
        return self.semaphore_of(slot)

    def semaphore_of(self, slot: int) -> str:
        """The name of a slot's semaphore, for a process that comes back to it."""
        return semaphore_name(self._token, slot, self._segment.slot(slot).semaphore)

    def lift(self, slot: int) -> None:
        """Lower the flag of a slot whose connection is closed: nothing more of it will come, so nobody may wait."""
        words = self._segment.slot(slot)
        submitted = words.submitted
        if submitted > words.finished:
            words.finished = submitted
            self.wake()

    def raise_again(self, slot: int, first: int) -> None:
        """A process comes back after its flag was lifted, and brings its tasks from ticket *first* on."""
        words = self._segment.slot(slot)
        # The one store that lets FINISHED fall. It comes before the process is welcomed, so that it reads nothing older
        # than its own submits; `lift` has let everybody else go.
        words.finished = min(words.finished, first - 1)

    def dismiss(self, slot: int) -> None:
        """Take a slot back from a process that is dead, or has said goodbye and holds no pin."""
        words = self._segment.slot(slot)
        # It may have died between its last frame and counting it. Neither word goes back to 0: for readers they only
        # grow.
        words.finished = words.submitted = max(words.submitted, words.finished)
        words.waiting = 0
        words.pid = words.start = words.space = words.tenant = 0
        sys.audit("strictflow_mp.dismiss.slot")
        semaphore = self._semaphores.pop(slot, None)
        if semaphore is not None:
            semaphore.close()
        unlink_semaphore(self._token, words)

    # The flag

    def is_open(self) -> bool:
        """Whether every P1 task that anybody submitted is finished."""
        return self._up == self._down

    def last_finished(self, slot: int) -> int:
        """The ticket up to which a slot's P1 tasks are finished."""
        return int(self._finished[slot])

    def is_up(self) -> bool:
        """Whether some process has counted a P1 task that is not finished."""
        return any(map(int.__gt__, self._submitted.tolist(), self._finished.tolist()))

    def raise_own(self) -> int:
        """Raise slot 0, for a burst that begins or a P1 that a task submits; return the ticket."""
        # A finalizer may do so in the middle of this, and a thread that a task has started at any time: a ticket is
        # drawn in one C call, and stored in another one.
        ticket = next(self._tickets)
        raise_word(self._submitted, (0,), ticket)
        return ticket

    @property
    def raised(self) -> int:
        """The last ticket of slot 0 that was drawn and stored."""
        return int(self._submitted[0])

    def finish(self, tickets: dict[int, int], own: int | None = None) -> None:
        """Tasks are finished, by slot up to that ticket; wake the readers that wait.

        Args:
            own: up to which ticket those of slot 0 are; None: all.
        """
        finished = self._finished
        # Store-store: FINISHED (F2) may not be seen before the VERSION (F1) that it speaks of. Pairs with
        # `memory.gate._reached`, and wherever else a reader finds the flag down: `memory.gate.Gate.is_open` and `wait`,
        # `client.state.FlowState`.
        publish_fence()
        for slot, ticket in tickets.items():
            if slot and ticket > finished[slot]:
                finished[slot] = ticket
        finished[0] = self.raised if own is None else own
        sys.audit("strictflow_mp.gate.finished")
        self.wake()

    def wake(self) -> None:
        """Post for every slot in which a reader sleeps."""
        # K2, store-load: the look at waiting[] (K3) may not be done while FINISHED (K1) is in our store buffer. Pairs
        # with `memory.gate.Gate._lead`: at least one of the two sees what the other has stored.
        fence()
        if self._asleep == self._awake:
            return
        for slot, waiting in enumerate(self._asleep.tolist()):
            semaphore = self._semaphores.get(slot) if waiting else None
            # One post is enough for its leader, however often we come by before it wakes. The fence above is for this
            # look too: who takes the token that we see looks at FINISHED after that (W5).
            if semaphore is not None and not value_of(semaphore):
                semaphore.release()

    def stop(self) -> None:
        """Raise the flag for good, so that no read takes the fast path any more; wake everybody."""
        self._words[W_STATUS] = STOPPED
        # Store-store: the flag that never falls may not be seen before the STATUS that says why. Pairs with
        # `memory.gate.Gate._lead`, which looks at STATUS after it has seen the flag.
        publish_fence()
        self.raise_own()
        # Store-load, and so any order: no post may be seen before either of them. Pairs with the look at STATUS in
        # `memory.gate.Gate._lead` after its sleep.
        fence()
        for semaphore in self._semaphores.values():
            semaphore.release()

    def __repr__(self) -> str:
        return f"<GateKeeper with {len(self._semaphores)} slots, {'open' if self.is_open() else 'closed'}>"
