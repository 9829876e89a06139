"""Answers: what the P1 tasks of a burst are told, and the receipts that say so.

Tasks that follow each other in one process are answered, and written down, together: a *run*.

Order: tasks are added as they have run; `seal` writes the receipts of what was added since, before the commit that
    holds their effects; `send` comes when that can be read.
If we die here: what was not sealed before a commit has not happened; what was is answered from its receipt.
Invariants: a call is in `unsealed`, in `_sealing` of the commit under way, or in a frame of `_frames`, and it is
    answered once.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..wire import frames
from .calls import NOTHING, Call
from .notices import Notices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..errors import StateFull
    from ..store import Receipts
    from .sessions import Session, Sessions

__all__ = ["Answers"]


class Answers:
    """The answers of one burst after the other."""

    def __init__(self, receipts: Receipts, sessions: Sessions, fail: Callable[[Call, BaseException], None]) -> None:
        self._receipts = receipts
        self._sessions = sessions
        self._fail = fail
        # P1 calls that have run since the last `seal`, in their order; those that failed among them.
        self.unsealed: list[Call] = []
        # Those of the last `seal`: unsealed again if its commit fails.
        self._sealing: list[Call] = []
        # Answers to be sent when the burst can be read, in the order of the calls; each is in a receipt too, if its
        # process may still ask.
        self._frames: list[tuple[Session, bytes]] = []
        # How many of `_frames` were there before the last `seal`: what a failed commit leaves.
        self._sealed_frames = 0
        self.notices: Notices[Session] = Notices()

    @property
    def owes(self) -> bool:
        """Whether a process waits for what was added since `seal`: tasks that tasks submit die with us."""
        return any(call.session is not None for call in self.unsealed)

    def add(self, call: Call) -> None:
        """A P1 has run."""
        self.unsealed.append(call)

    def add_failed(self, call: Call) -> None:
        """A P1 has failed, perhaps since there was no room for what it had changed."""
        if not (self.unsealed and self.unsealed[-1] is call):
            self.unsealed.append(call)

    def seal(self) -> None:
        """Write receipts for what was added: they are in the next commit."""
        calls = self._sealing = self.unsealed
        self.unsealed = []
        self._sealed_frames = len(self._frames)
        position, end = 0, len(calls)
        while position < end:
            first = calls[position]
            start = position
            position += 1
            session = first.session
            if session is None:
                continue  # a task's own call: nobody asks the next coordinator for it
            if not first.answer:
                seq, ticket = first.seq, first.ticket
                payloads = [first.payload]
                size = len(first.payload)
                while position < end:
                    call = calls[position]
                    after = position - start
                    if call.session is not session or call.seq - seq != after or call.ticket - ticket != after:
                        break
                    size += len(call.payload)
                    if call.answer or size > frames.MAX_BODY_BYTES:
                        break
                    payloads.append(call.payload)
                    position += 1
                frame = frames.pack_frame(frames.RESULT, seq, payloads)
            else:
                frame = first.answer
            self._frames.append((session, frame))
            # A process that is dead will not ask.
            if not (session.is_dead or session.said_goodbye):
                self._receipts.add((session.tenant, first.ticket, first.seq, position - start, frame))

    def revoke(self, reason: StateFull) -> None:
        """The commit has failed: nothing that was sealed for it is so, and the tasks whose changes it held have failed.

        The receipts stay until the same tasks are sealed again: then others, of the same seqs, come in their place.
        """
        del self._frames[self._sealed_frames :]
        self.unsealed = self._sealing + self.unsealed
        for call in self.unsealed:
            if not call.answer and not call.has_failed:
                self._fail(call, reason)

    def committed(self, version: int, keys: Iterable[bytes]) -> None:
        """A version was committed that changed these keys."""
        self.notices.committed(version, keys)

    def send(self) -> list[bytes]:
        """Answer all; return what was sent, a portion for each process."""
        if self.unsealed:
            self.seal()  # there was nothing to commit; the next commit holds the receipts
        answers, self._frames = self._frames, []
        answers += [(session, frames.pack_frame(frames.RESULT, seq, (NOTHING,))) for session, seq in self.notices.due()]
        portions: dict[Session, bytes] = {}
        for session, frame in answers:
            portions[session] = portions[session] + frame if session in portions else frame
        for session, data in portions.items():
            self._sessions.send(session, data)
        return list(portions.values())

    def __repr__(self) -> str:
        return f"<Answers: {len(self.unsealed)} unsealed, {len(self._frames)} to be sent>"
