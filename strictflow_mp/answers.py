"""Answers: what the P1 tasks of a burst are told, and the receipts that say so.

Tasks that follow each other in one process are answered, and written down, together: a *run*.

Order: tasks are added as they have run; `seal` writes the receipts of what was added since, ahead of the commit that
    holds their effects; `send` comes when that can be read.
If we die here: what was not sealed ahead of a commit has not happened; what was is answered from its receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import wire
from .errors import StateFull
from .jobs import NOTHING, Call
from .notices import Notices
from .sessions import Session, Sessions
from .store import Receipts

__all__ = ["Answers"]


class Answers:
    """Those of one burst after the other."""

    def __init__(self, receipts: Receipts, sessions: Sessions, fail: Callable[[Call, BaseException], None]) -> None:
        self._receipts = receipts
        self._sessions = sessions
        self._fail = fail
        self.unsealed: list[Call] = []
        self._sealing: list[Call] = []
        self._frames: list[tuple[Session, bytes]] = []
        self.notices: Notices[Session] = Notices()
        self._sealed_frames = 0  # of `_frames`, those that were there before the last seal

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
                continue
            if not first.answer:
                number, flag = first.number, first.flag
                payloads = [first.payload]
                while position < end:
                    call = calls[position]
                    ahead = position - start
                    if call.session is not session or call.number - number != ahead or call.flag - flag != ahead:
                        break
                    if call.answer:
                        break
                    payloads.append(call.payload)
                    position += 1
                frame = wire.pack_frame(wire.RESULT, number, payloads)
            else:
                frame = first.answer
            self._frames.append((session, frame))
            # A process that is dead will not ask.
            if not (session.is_dead or session.said_goodbye):
                self._receipts.add((session.tenant, first.flag, first.number, position - start, frame))

    def revoke(self, reason: StateFull) -> None:
        """The commit has failed: nothing that was sealed for it is so, and whose changes it held has failed.

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
            self.seal()
        frames, self._frames = self._frames, []
        frames += [
            (session, wire.pack_frame(wire.RESULT, number, (NOTHING,))) for session, number in self.notices.due()
        ]
        portions: dict[Session, bytes] = {}
        for session, frame in frames:
            portions[session] = portions[session] + frame if session in portions else frame
        for session, data in portions.items():
            self._sessions.send(session, data)
        return list(portions.values())

    def __repr__(self) -> str:
        return f"<Answers: {len(self.unsealed)} unsealed, {len(self._frames)} to be sent>"
