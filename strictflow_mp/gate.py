"""The gate: the P1 flag, and where readers wait for it.

Owns: SUBMITTED, FINISHED, WAITING, WAITS and WAITED of every slot, and one named semaphore for each slot; REACH,
    and with `takeover` EPOCH.
Written by: SUBMITTED, WAITING, WAITS, WAITED by the slot's process; FINISHED, all words of slot 0, REACH and EPOCH by
    the coordinator, which also makes and unlinks the semaphores.
Read by: everybody.
Order: **the flag is up while submitted[i] > finished[i] for some i.**
    P1 tasks of a slot are numbered; their frames carry the number.
    Submit: the whole frame is in the pipe, then submitted[i] = number, then submit returns. So when it has
    returned, every process sees the flag; and whoever dies half-way leaves no flag up.
    Commit: the version is published, then finished[i] = number (store-store, free on x86-64).
    Wait: the reader stores waiting = 1, *fence*, looks at finished[] again, sleeps. The coordinator stores
    finished[], *fence*, looks at waiting[], posts. Each fence forbids that the store is seen after the
    load behind it; so either the reader sees that it need not sleep, or the coordinator sees it waiting.
If we die here: a semaphore's count is only a hint. A lost post costs one slice of sleep, an extra one a
    look at the words; neither costs correctness.
Invariants: both arrays only grow while a slot has one owner; but FINISHED falls back when a process comes back late
    after a coordinator's death, and nobody waited for it any more (`lift`, `raise_again`). A read waits for what was
    submitted before it began and never for anything later, so a steady stream of P1 tasks delays no read for ever.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from _signal import pthread_sigmask  # signal's own wrapper makes enums of 64 signals, which takes 25 µs
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import posix_ipc

from .processes import Identity
from .segment import CONDEMNED, PREFIX, SERVING, STOPPED, W_EPOCH, W_REACH, W_STATUS, W_TENANCIES, Segment
from .spin import look_for
from .words import fence, publish_fence, read_fence

__all__ = ["Gate", "GateKeeper", "Tenancy", "condemn", "semaphore_name", "unlink_semaphore"]

LEADER = "leader"
NOBODY = -1

SLICE = 0.05
"""Seconds of sleep after which a waiting reader looks whether the coordinator lives."""


def semaphore_name(token: str, slot: int) -> str:
    """The name of a slot's semaphore; within the 30 characters that macOS allows."""
    return f"/{PREFIX}{token}.{slot}"


def unlink_semaphore(token: str, slot: int) -> None:
    """Remove a slot's semaphore, if it is there."""
    try:
        posix_ipc.unlink_semaphore(semaphore_name(token, slot))
    except posix_ipc.ExistentialError:
        pass


def _sleep(semaphore: posix_ipc.Semaphore, seconds: float) -> None:
    """Sleep until a post, or for about that long.

    posix_ipc drops the exception of a signal handler that runs during acquire, so signals wait until the
    slice is over. A handler's delay is therefore at most one slice.
    """
    if threading.current_thread() is not threading.main_thread():
        _acquire(semaphore, seconds)
        return
    # First the mask alone: a handler may raise out of the call that blocks, when it has blocked already.
    before = pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTING)
        _acquire(semaphore, seconds)
    finally:
        pthread_sigmask(signal.SIG_SETMASK, before)


def _acquire(semaphore: posix_ipc.Semaphore, seconds: float) -> None:
    try:
        semaphore.acquire(seconds)
    except posix_ipc.BusyError:
        pass
    except posix_ipc.SignalError:
        pass  # a signal that cannot be blocked


_INTERRUPTING = frozenset(map(int, signal.valid_signals())) - {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGSEGV,
    signal.SIGBUS,
}


class Gate:
    """The flag as a worker's process sees it."""

    def __init__(self, segment: Segment, slot: int, semaphore: posix_ipc.Semaphore) -> None:
        words, slots = segment.words, segment.slots
        self.submitted = words[segment.submitted : segment.submitted + slots]
        self.finished = words[segment.finished : segment.finished + slots]
        self._words = words
        self._slot = slot
        self._mine = segment.submitted + slot
        self._waiting = segment.waiting + slot
        self._waits = segment.waits + slot
        self._waited = segment.waited + slot
        self._semaphore = semaphore
        # One thread of a process sleeps on its semaphore and wakes the others, so that no thread takes
        # the post that another needs.
        # By thread, so that one whose signal handler raised just then leads again when it comes back. Every
        # operation on it is one step: there is no instant at which an exception would leave it taken for good.
        self._leader: dict[str, int] = {}
        self._followers: deque[threading.Lock] = deque()

    @property
    def last(self) -> int:
        """The number of the last P1 task that this slot's process has counted."""
        return int(self._words[self._mine])

    def raise_flag(self, number: int) -> None:
        """Count P1 tasks up to *number*, whose frames are wholly in the pipe. The caller holds the submit lock.

        A number that was drawn and never sent, since a signal handler raised, is passed over by the next.
        """
        # The frame is in the kernel: the system call was a barrier of its own.
        self._words[self._mine] = number
        # The flag is seen by all before submit returns, and whatever follows from that begins (store-load).
        fence()

    def within_reach(self) -> tuple[memoryview, memoryview]:
        """SUBMITTED and FINISHED of the slots that any process has had so far: all that a read need compare.

        Only for who has loaded EPOCH before, and looks again whether it has moved (`GateKeeper.widen`).
        """
        # REACH behind the EPOCH that it is of, or a later one (load-load).
        read_fence()
        reach = self._words[W_REACH]
        return self.submitted[:reach], self.finished[:reach]

    def is_open(self) -> bool:
        """Whether nothing that was submitted is unfinished."""
        return self.submitted == self.finished

    def is_stopped(self) -> bool:
        """Whether the flow has ended: its coordinator stopped, or is dead and was given up."""
        return bool(self._words[W_STATUS] != SERVING)

    def is_condemned(self) -> bool:
        """Whether it ended because its coordinator died."""
        return bool(self._words[W_STATUS] == CONDEMNED)

    def behind(self) -> list[tuple[int, int]]:
        """What a read that begins now waits for: the slots whose flag is up, each with the number of its last P1."""
        both = zip(self.submitted.tolist(), self.finished.tolist(), strict=True)
        return [(slot, target) for slot, (target, done) in enumerate(both) if target > done]

    def wait(self, deadline: float | None, check: Callable[[], None]) -> bool:
        """Wait until every P1 task submitted by now is finished.

        Args:
            deadline: on `time.monotonic`'s clock, or None.
            check: called once a slice; raises when there is nobody left to wait for.

        Returns:
            False when the deadline has passed. True too when the flow was stopped: look at `is_stopped`.
        """
        finished = self.finished
        behind = self.behind()
        if not behind:
            return True
        began = time.monotonic()
        try:
            if look_for(lambda: _reached(finished, behind), False):
                return True
            return self._wait_asleep(behind, deadline, check)
        finally:
            # Statistics: threads of one process may lose an update to each other.
            self._words[self._waits] += 1
            self._words[self._waited] += int((time.monotonic() - began) * 1e9)

    def _wait_asleep(self, behind: list[tuple[int, int]], deadline: float | None, check: Callable[[], None]) -> bool:
        me = threading.get_ident()
        while True:
            if self._leader.setdefault(LEADER, me) == me:
                try:
                    self._lead(behind, deadline, check)
                finally:
                    self._leader.pop(LEADER, None)
                    self._wake_followers()
            else:
                self._follow(behind, deadline)
            if _reached(self.finished, behind) or self.is_stopped():
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            check()

    def _lead(self, behind: list[tuple[int, int]], deadline: float | None, check: Callable[[], None]) -> None:
        words, waiting = self._words, self._waiting
        words[waiting] = 1
        try:
            # The waiting word before the second look at finished[] (store-load).
            fence()
            sys.audit("strictflow_mp.wait.marked")
            while not _reached(self.finished, behind) and not self.is_stopped():
                left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
                if left <= 0:
                    return
                _sleep(self._semaphore, left)
                self._wake_followers()
                if _reached(self.finished, behind) or self.is_stopped():
                    return
                check()
        finally:
            words[waiting] = 0

    def _follow(self, behind: list[tuple[int, int]], deadline: float | None) -> None:
        # A lock that is taken already, for the leader to give back: unlike a condition, it can be left by the
        # exception of a signal handler at any instant.
        bed = threading.Lock()
        bed.acquire()
        self._followers.append(bed)
        try:
            # The leader first goes, then wakes: it cannot miss a bed that stands here while it still leads.
            if self._leader and not _reached(self.finished, behind):
                left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
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
        # The leader's place stays taken: nobody may sleep on a closed semaphore.
        if self._leader.setdefault(LEADER, NOBODY) == NOBODY:
            try:
                self._semaphore.close()
            except posix_ipc.ExistentialError:
                pass  # another thread was here first

    def __repr__(self) -> str:
        return f"<Gate of slot {self._slot}, {'open' if self.is_open() else 'closed'}>"


def _reached(finished: memoryview, behind: list[tuple[int, int]]) -> bool:
    for slot, target in behind:
        if finished[slot] < target:
            return False
    # What the finished word speaks of is loaded behind it (load-load).
    read_fence()
    return True


class Tenancy(NamedTuple):
    """Who has a slot, since which admission. A slot that is free has pid 0."""

    slot: int
    pid: int
    start: int
    space: int
    tenant: int


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
        self._nobody = memoryview(bytes(8 * slots)).cast("Q")
        self._look_within(words[W_REACH])
        self._semaphores: dict[int, posix_ipc.Semaphore] = {}
        self._raised = self._submitted[0]  # how often slot 0 was

    def take_over(self) -> list[Tenancy]:
        """Begin where a dead coordinator ended; return who has a slot."""
        # Nothing of slot 0 is queued any more: what tasks had submitted died with the coordinator.
        self._finished[0] = self._raised
        found = []
        for slot in range(1, self._segment.slots):
            tenancy = self.tenancy(slot)
            if tenancy.pid:
                name = semaphore_name(self._token, slot)
                self._semaphores[slot] = posix_ipc.Semaphore(name, posix_ipc.O_CREAT, 0o600, 0)
                found.append(tenancy)
            else:
                unlink_semaphore(self._token, slot)  # it died between the semaphore and the slot's words
        return found

    # Slots

    def _look_within(self, reach: int) -> None:
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
        words[W_REACH] = min(reach, self._segment.slots)
        # REACH before the EPOCH that tells of it, and that before the version (store-store).
        publish_fence()
        words[W_EPOCH] += 1
        sys.audit("strictflow_mp.admit.widened")
        publish_fence()
        try:
            renew()
        except BaseException:
            words[W_REACH] = former  # the next one who needs the slot must do it again
            raise
        self._look_within(words[W_REACH])

    def tenancy(self, slot: int) -> Tenancy:
        """Who has a slot."""
        words, segment = self._words, self._segment
        arrays = (segment.pids, segment.starts, segment.spaces, segment.tenants)
        return Tenancy(slot, *(words[array + slot] for array in arrays))

    def admit(self, slot: int, newcomer: Identity) -> str:
        """Give a slot to a process; return the name of its semaphore."""
        words, segment = self._words, self._segment
        unlink_semaphore(self._token, slot)
        name = semaphore_name(self._token, slot)
        self._semaphores[slot] = posix_ipc.Semaphore(name, posix_ipc.O_CREX, 0o600, 0)
        sys.audit("strictflow_mp.admit.semaphore")
        for array in (segment.waiting, segment.waits, segment.waited):
            words[array + slot] = 0
        words[W_TENANCIES] += 1
        words[segment.tenants + slot] = words[W_TENANCIES]
        words[segment.starts + slot], words[segment.spaces + slot] = newcomer.start, newcomer.space
        # The pid last: it says that the slot is taken (store-store).
        publish_fence()
        words[segment.pids + slot] = newcomer.pid
        sys.audit("strictflow_mp.admit.slot")
        return name

    def semaphore_of(self, slot: int) -> str:
        """The name of a slot's semaphore, for a process that comes back to it."""
        return semaphore_name(self._token, slot)

    def lift(self, slot: int) -> None:
        """Lower the flag of a slot whose connection is closed: nothing more of it will come, so nobody may wait."""
        segment, words = self._segment, self._words
        submitted = words[segment.submitted + slot]
        if submitted > words[segment.finished + slot]:
            words[segment.finished + slot] = submitted
            self.wake()

    def raise_again(self, slot: int, first: int) -> None:
        """A process comes back after its flag was lifted, and brings its tasks from number *first* on."""
        finished = self._segment.finished + slot
        self._words[finished] = min(self._words[finished], first - 1)

    def dismiss(self, slot: int) -> None:
        """Take a slot back from a process that is dead, or has said goodbye."""
        segment, words = self._segment, self._words
        # It may have died between its last frame and counting it.
        high = max(words[segment.submitted + slot], words[segment.finished + slot])
        words[segment.finished + slot] = high
        words[segment.submitted + slot] = high
        words[segment.waiting + slot] = 0
        for array in (segment.pids, segment.starts, segment.spaces, segment.tenants):
            words[array + slot] = 0
        sys.audit("strictflow_mp.dismiss.slot")
        semaphore = self._semaphores.pop(slot, None)
        if semaphore is not None:
            semaphore.close()
        unlink_semaphore(self._token, slot)

    # The flag

    def is_open(self) -> bool:
        """Whether every P1 task that anybody submitted is finished."""
        return self._up == self._down

    def last_finished(self, slot: int) -> int:
        """The number up to which a slot's P1 tasks are finished."""
        return int(self._finished[slot])

    def is_up(self) -> bool:
        """Whether some process has counted a P1 task that is not finished."""
        return any(map(int.__gt__, self._submitted.tolist(), self._finished.tolist()))

    def raise_own(self) -> int:
        """Raise slot 0, for a burst that begins or a P1 that a task submits; return the number."""
        self._raised += 1
        self._submitted[0] = self._raised
        return self._raised

    def finish(self, numbers: dict[int, int], own: int | None = None) -> None:
        """Tasks are finished, by slot up to that number; wake the readers that wait.

        Args:
            own: the number of the first P1 of SF-LOOP's own that is still queued, if there is one.
        """
        finished = self._finished
        # The commit before the numbers that speak of it (store-store).
        publish_fence()
        for slot, number in numbers.items():
            if slot and number > finished[slot]:
                finished[slot] = number
        finished[0] = self._raised if own is None else own - 1
        sys.audit("strictflow_mp.gate.finished")
        self.wake()

    def wake(self) -> None:
        """Post for every slot in which a reader sleeps."""
        # finished[] before the look at waiting[] (store-load).
        fence()
        if self._asleep == self._awake:
            return
        for slot, waiting in enumerate(self._asleep.tolist()):
            semaphore = self._semaphores.get(slot) if waiting else None
            if semaphore is not None and not _value(semaphore):
                semaphore.release()

    def stop(self) -> None:
        """Raise the flag for good, so that no read takes the fast path any more; wake everybody."""
        self._words[W_STATUS] = STOPPED
        publish_fence()
        self.raise_own()
        fence()
        for semaphore in self._semaphores.values():
            semaphore.release()

    def __repr__(self) -> str:
        return f"<GateKeeper with {len(self._semaphores)} slots, {'open' if self.is_open() else 'closed'}>"


def condemn(segment: Segment, token: str) -> None:
    """End the flow of a coordinator that is proved dead: whoever is still attached finds out at its next read.

    The caller holds the lock of the place, and is thereby the one writer of the dead coordinator's words.
    """
    words = segment.words
    if words[W_STATUS] == SERVING:
        words[W_STATUS] = CONDEMNED
    publish_fence()
    words[segment.submitted] = words[segment.finished] + 1
    # The flag before the look at who sleeps (store-load).
    fence()
    for slot, waiting in enumerate(words[segment.waiting : segment.waiting + segment.slots].tolist()):
        if waiting:
            try:
                semaphore = posix_ipc.Semaphore(semaphore_name(token, slot))
            except posix_ipc.ExistentialError:
                continue
            semaphore.release()
            semaphore.close()


def _value(semaphore: posix_ipc.Semaphore) -> int:
    try:
        return int(semaphore.value)
    except AttributeError:  # macOS has no sem_getvalue
        return 0
