"""The attachment: one connection of a process to a flow, and the answers that are due on it.

It outlives a coordinator: when the next one has taken over, it goes on with another stream, in the same slot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import posix_ipc

from . import wire
from .errors import StrictFlowError
from .failures import unpack_failure
from .future import Port, TaskFuture
from .gate import Gate
from .processes import Identity
from .segment import W_RESTARTS, W_TRACE, Segment
from .store import Pins, StoreReader
from .turn import Turn
from .values import unpack
from .wire import Frame, Stream

if TYPE_CHECKING:
    from .tracer import Tracer

__all__ = ["Attachment"]

LONG = 1 << 16
"""Bytes of an answer that is acknowledged at once, so that the coordinator need not keep it."""


class Attachment:
    """One connection: stream, slot, mapped segment, and the answers that are due."""

    def __init__(
        self, flow: str, stream: Stream, welcome: dict[str, Any], port: Callable[[Attachment], Port], reading: Turn
    ) -> None:
        self.flow = flow
        self.port = port(self)
        self.stream = stream
        self.slot: int = welcome["slot"]
        self.tenant: int = welcome["tenant"]
        self.max_pending: int = welcome["max_pending"]
        self.gate_timeout: float = welcome["gate_timeout"]
        self.segment = Segment.open(welcome["segment"])
        self.words = self.segment.words
        self.gate = Gate(self.segment, self.slot, posix_ipc.Semaphore(welcome["semaphore"]))
        self.pins = Pins(self.segment, self.slot)
        self.reader = StoreReader(self.segment, self.pins)
        self.pending: dict[int, TaskFuture[Any]] = {}
        self.watches: set[int] = set()  # those of `pending` that may be answered never
        self.functions: dict[Any, int] = {}
        self.function_frames: list[bytes] = []
        self.unread: deque[int] = deque()  # seqs of P1 tasks, from the oldest that has no answer
        self.acked = 0  # every P1 task up to this seq has its answer
        self.last = 0
        self.writes = self.gate.last
        self.reading = reading
        self.is_settling = False  # the reading thread runs callbacks
        self.server: threading.Thread | None = None
        self.is_lost = False
        self.dead_since: float | None = None
        self.is_served_by(welcome)

    @property
    def is_traced(self) -> bool:
        """Whether a run is recorded."""
        return bool(self.words[W_TRACE])

    @cached_property
    def tracer(self) -> Tracer:
        """What tells of us while a run is recorded (the word TRACE)."""
        from .tracer import Tracer  # most processes are never recorded

        return Tracer(self.flow, self.segment, self.slot, self.tenant)

    def is_served_by(self, welcome: dict[str, Any]) -> None:
        """A coordinator has taken us, or taken us back."""
        self.coordinator: int = welcome["pid"]
        owner = welcome["owner"]
        self.owner = Identity(*owner) if owner is not None else None  # who would restart it
        self.restarts: int = welcome["restarts"]  # by its own word: yet another one may have taken over since
        self.dead_since = None

    @property
    def first_unfinished(self) -> int:
        """The number of our first P1 that has no answer; 0 if there is none."""
        for seq in list(self.unread):
            future = self.pending.get(seq)
            sent = future.sent if future is not None else ()
            if sent:
                return int(sent[-2])
        return 0

    @property
    def is_outdated(self) -> bool:
        """Whether another coordinator serves by now, and waits for what we have no answer to."""
        return bool(self.segment.words[W_RESTARTS] != self.restarts and self.pending)

    @property
    def room(self) -> int:
        """How many more tasks may be submitted before answers come."""
        return self.max_pending - len(self.pending) + len(self.watches)

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these answers."""
        for number in numbers:
            self.pending.pop(number, None)
            self.watches.discard(number)

    def settle(self, frame: Frame) -> bool:
        """Settle the futures that a frame answers; whether that should be acknowledged at once.

        A signal handler may raise anywhere in it: doing it once more does no harm.
        """
        kind, number = frame[0], frame[1]
        pending, unread = self.pending, self.unread
        is_long = False
        if kind == wire.RESULT:
            for number, payload in enumerate(frame[2], number):  # noqa: B020  the last one's is needed
                future = pending.get(number)
                if future is None:
                    continue
                is_long = is_long or len(payload) > LONG
                try:
                    value = unpack(payload)
                except StrictFlowError as error:
                    future.settle(error=error)
                else:
                    future.settle(value)
                future.sent = ()
                pending.pop(number, None)
                if self.watches:
                    self.watches.discard(number)
        else:
            future = pending.get(number)
            if future is None:
                return False
            if kind == wire.FAILURE:
                future.settle(error=unpack_failure(frame[2], frame[3], flow=self.flow))
            elif kind == wire.CANCELLED:
                future.settle_cancelled()
            future.sent = ()
            self.forget((number,))
        while unread and unread[0] not in pending:
            self.acked = unread.popleft()
        return is_long and self.acked >= number

    def settle_traced(self, frame: Frame) -> bool:
        """As `settle`, while a run is recorded."""
        numbers = range(frame[1], frame[1] + len(frame[2])) if frame[0] == wire.RESULT else [frame[1]]
        pending = self.pending
        due = [(number, pending[number].label) for number in numbers if number in pending and pending[number].is_task]
        with self.tracer.reading(due):
            return self.settle(frame)

    def __repr__(self) -> str:
        return f"<Attachment to {self.flow!r} in slot {self.slot}, {len(self.pending)} answers due>"
