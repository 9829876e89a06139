"""The attachment: one connection of a process to a flow, and the answers that are due on it.

It outlives a coordinator: when the next one has taken over, it goes on with another stream, in the same slot.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from ..memory.gate import Gate
from ..memory.segment import PREFIX, W_RESTARTS, W_TRACE, Segment
from ..memory.semaphores import open_semaphore
from ..store import Pins, StoreReader
from ..system.identity import Identity
from ..wire import frames
from .outgoing import Outgoing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..system.place import Place
    from ..wire.frames import Frame
    from ..wire.future import AnswerSource
    from ..wire.stream import Stream
    from .tracer import Tracer
    from .turn import Turn

__all__ = ["Attachment"]

LONG_ANSWER_BYTES = 1 << 16
"""Bytes of an answer that is acknowledged at once, so that the coordinator need not keep it."""


UNUSED_FUNCTIONS = 64
"""How many functions whose tasks are gone are forgotten together: all pending calls are looked through for them."""


class Attachment:
    """One connection: stream, slot, mapped segment, and the answers that are due.

    Args:
        place: where it was reached; the flow is never looked for elsewhere.
        welcome: the coordinator's answer to our greeting (`wire.handshake`).
        port: makes what the futures of this connection ask for their answers.
        reading: the turn to read answers.
        on_loss: called when the connection is lost, before the futures are told.
    """

    def __init__(
        self,
        flow: str,
        place: Place,
        stream: Stream,
        welcome: dict[str, Any],
        port: Callable[[Attachment], AnswerSource],
        reading: Turn,
        on_loss: Callable[[Attachment], None],
    ) -> None:
        self.flow = flow
        self.place = place
        self.port = port(self)
        self.on_loss = on_loss
        # Replaced by `comeback` while `submitting` is held. A thread that finds another one than it knew sees that
        # somebody has come back meanwhile.
        self.stream = stream
        # Both stay ours through restarts, until we say goodbye or die. The slot may be another's after that, under
        # another tenant number: receipts carry that number.
        self.slot: int = welcome["slot"]
        self.tenant: int = welcome["tenant"]
        self.max_pending: int = welcome["max_pending"]
        self.gate_timeout: float = welcome["gate_timeout"]  # seconds
        # Before the segment: a mapping that a failure leaves half in use is closed by the collector only.
        semaphore = open_semaphore(welcome["semaphore"])
        # The segment, and so all that looks into it, is the same under every coordinator of the flow.
        self.segment = Segment.open(welcome["segment"])
        self.words = self.segment.words
        self.gate = Gate(self.segment, self.slot, semaphore)
        self.pins = Pins(self.segment, self.slot)
        self.reader = StoreReader(self.segment, self.pins)
        # Sending

        # Held while numbers are drawn and their frames sent, so that frames are in the pipe in the order of their
        # numbers; while frames are sent again; and while a goodbye is said.
        self.submitting = threading.RLock()
        # Set while a question is sent that must not wait longer, by the thread that holds `submitting`; else None.
        self.in_haste_until: float | None = None
        # The numbers that were drawn, and what is due. Its parts are ours to read.
        self.outgoing = Outgoing(self.gate.last)
        self.pending, self.watches = self.outgoing.pending, self.outgoing.watches
        # By weak reference to a task, the number of its function: here only when the frame that tells of it has been
        # sent, and only while the task lives (`introduced`).
        self.functions: dict[weakref.ref[Any], int] = {}
        # By number, the frame that tells of the function; the next coordinator is sent all of them. Here from before it
        # is sent until the task is gone, no pending call names the function, and that is said (FORGET).
        self.function_frames: dict[int, bytes] = {}
        # By number, the modules that the frame names and does not hold.
        self.function_modules: dict[int, tuple[str, ...]] = {}
        # The numbers of functions whose tasks are gone. Their finalizers write it, in any thread and at any moment.
        self.unused: deque[int] = deque()
        # As many as are looked through for those that no pending call names.
        self.unused_limit = UNUSED_FUNCTIONS
        # Numbers for functions. It goes on through restarts: a number is never given twice.
        self.function_numbers = itertools.count()

        # Reading

        # The thread that has it, and no other, reads `stream` and settles.
        self.reading = reading
        # The thread that reads in the background, once it has been asked for; then no other takes the turn.
        self.server: threading.Thread | None = None
        self.starting_server = threading.RLock()

        # Its end

        # True for good when the flow has ended for us, or we have said goodbye: nothing more is sent. A future that a
        # thread was just adding to `pending` is settled when it is waited for.
        self.is_lost = False
        # Of a coordinator that was seen not to serve any more: its `restarts`, and when that was first seen, on
        # `time.monotonic`'s clock. It says nothing of one with other `restarts`. Each thread replaces it as a whole.
        self.dead: tuple[int, float] | None = None
        # While the next coordinator is awaited: the pid of the one that takes over, and its last sign of life.
        self.last_sign = (0, 0)
        self.is_served_by(welcome)

    _tracer: Tracer | None = None
    """Made when a run is first recorded, and the same one from then on."""

    @property
    def is_traced(self) -> bool:
        """Whether a run is recorded."""
        return bool(self.words[W_TRACE])

    @property
    def tracer(self) -> Tracer:
        """What tells of us while a run is recorded (the word TRACE)."""
        # No `cached_property`: before Python 3.12 that has a lock, for all attachments, which a fork may find taken.
        tracer = self._tracer
        if tracer is None:
            from .tracer import Tracer  # most processes are never recorded

            # One step: of two threads both get the first one's.
            made = Tracer(self.flow, self.place, self.segment, self.slot, self.tenant)
            tracer = self.__dict__.setdefault("_tracer", made)
        return tracer

    def is_served_by(self, welcome: dict[str, Any]) -> None:
        """A coordinator has taken us, or taken us back."""
        # RESTARTS as this coordinator has said it, not as the word is now: yet another one may have taken over since.
        # First: a thread that sees that this one serves sees also that it is not the one that it has seen die.
        self.restarts: int = welcome["restarts"]
        self.coordinator: int = welcome["pid"]
        # The same process, so that its death can be proved where the lock cannot be looked at.
        self.server_identity = Identity(*welcome["identity"])
        owner = welcome["owner"]
        # The process that would start the next one whatever ends this one, as it was then; None when nobody would.
        self.owner = Identity(*owner) if owner is not None else None
        # Our `sys.path`, as this coordinator has been told it.
        self.told_path: list[str] = welcome["told_path"]

    def is_served(self) -> bool | None:
        """Whether a coordinator serves this flow; False only when that is proved, None when it cannot be told.

        By the lock of the place where it was reached; where there is none, or we may not look at it any more (after
        setuid, chroot, a cleaner of files), by the process that had let us in.
        """
        seen = self.place.look()
        if seen is False:
            resident = self.place.resident()
            if resident is not None and PREFIX + resident.token == self.segment.name:
                return False
        elif seen:
            return True
        if self.server_identity.is_dead():
            # One that has taken over since may live.
            return False if self.segment.words[W_RESTARTS] == self.restarts else None
        return True if self.server_identity.is_here else None

    @property
    def may_serve(self) -> bool:
        """Whether what has let us in has neither been lost nor stopped, and is not proved dead."""
        return not self.is_lost and not self.gate.is_stopped() and self.is_served() is not False

    def introduced(self, task: Any, number: int) -> None:
        """The coordinator has been told of a task's function, and knows it as long as the task lives."""
        functions, unused = self.functions, self.unused
        if weakref.ref(task) in functions:
            unused.append(number)  # who came in between has told of it under another number
            return

        def forget(reference: weakref.ref[Any]) -> None:
            functions.pop(reference, None)
            unused.append(number)  # nothing more: a finalizer runs anywhere, also while `submitting` is held

        functions[weakref.ref(task, forget)] = number

    def take_unused(self) -> list[int]:
        """The functions whose tasks are gone and that no pending call names; they are taken off all lists here."""
        # Another thread may settle them meanwhile: each `sent` is looked at once.
        pending = [future.sent for future in list(self.pending.values())]
        named = {sent[2] for sent in pending if sent and sent[0] == frames.CALL}
        found = []
        for _ in range(len(self.unused)):
            number = self.unused.popleft()
            if number in named:
                self.unused.append(number)  # it may have to be sent again, to the next coordinator
            else:
                found.append(number)
                self.function_frames.pop(number, None)
                self.function_modules.pop(number, None)
        self.unused_limit = UNUSED_FUNCTIONS + 2 * len(self.unused)
        return found

    @property
    def first_unfinished(self) -> int:
        """The ticket of our first P1 that has no answer; 0 if there is none."""
        future = self.pending.get(self.outgoing.first_due())
        sent = future.sent if future is not None else ()
        return int(sent[-2]) if sent else 0  # of CALL, PUT and OPERATE: the ticket is followed by the ack alone

    @property
    def is_outdated(self) -> bool:
        """Whether another coordinator serves by now, and waits for what we have no answer to."""
        return bool(self.segment.words[W_RESTARTS] != self.restarts and self.pending)

    @property
    def room(self) -> int:
        """How many more tasks may be submitted before answers come."""
        return self.max_pending - len(self.pending) + len(self.watches)

    def retire(self) -> None:
        """It has ended for us: nothing more is sent, and no flag raised, for the slot may be another's from now on."""
        self.is_lost = True
        self.gate.retire()

    def after_fork(self) -> None:
        """In a forked child: the connection is the parent's."""
        self.is_lost = True
        # Threads that are not here may have held the former ones.
        self.submitting = threading.RLock()
        self.starting_server = threading.RLock()
        self.stream.close()

    def settle(self, frame: Frame) -> bool:
        """Settle the futures that a frame answers; whether that should be acknowledged at once.

        A signal handler may raise anywhere in it: doing it once more does no harm.
        """
        kind, seq = frame[0], frame[1]
        pending = self.pending
        is_long = False
        if kind == frames.RESULT:
            for seq, payload in enumerate(frame[2], seq):  # noqa: B020  the last one's is needed
                future = pending.get(seq)
                if future is None:
                    continue
                is_long = is_long or len(payload) > LONG_ANSWER_BYTES
                future.settle_packed(payload)
                future.sent = ()
                pending.pop(seq, None)  # when it is settled: if a handler raises before this, it is settled once more
                if self.watches:
                    self.watches.discard(seq)
        else:
            if kind == frames.DIFFERENT:
                # The next call introduces it anew.
                for task, number in list(self.functions.items()):
                    if number == seq:
                        self.functions.pop(task, None)
                        self.unused.append(number)
                return False
            future = pending.get(seq)
            if future is None:
                return False
            if kind == frames.FAILURE:
                future.settle_packed((frame[2], frame[3], self.flow))
            elif kind == frames.CANCELLED:
                future.settle_cancelled()
            future.sent = ()
            self.outgoing.forget([seq])
        self.outgoing.acknowledge()
        return is_long and self.outgoing.acked >= seq

    def settle_traced(self, frame: Frame) -> bool:
        """As `settle`, while a run is recorded."""
        seqs = range(frame[1], frame[1] + len(frame[2])) if frame[0] == frames.RESULT else [frame[1]]
        pending = self.pending
        due = [(seq, pending[seq].label) for seq in seqs if seq in pending and pending[seq].is_task]
        with self.tracer.reading(due):
            return self.settle(frame)

    def __repr__(self) -> str:
        return f"<Attachment to {self.flow!r} in slot {self.slot}, {len(self.pending)} answers due>"
