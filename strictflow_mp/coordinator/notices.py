"""Notices: which process is to be told when which keys change. Decisions only: no clock, no I/O.

Events in: `wait`, `committed`, `drop`, `keep`. Out: `due`, what is to be told now.

A process says up to which version it has looked. A commit since then is found in a bounded memory of what changed
when; beyond that, the process is told to look again, which costs it a look, and loses no change.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Notices"]

REMEMBERED_KEYS = 1 << 12
"""Keys of which it is known when they changed last."""

Asker = TypeVar("Asker")


class Notices(Generic[Asker]):
    """Questions of processes, each answered once. A question is the session that asked, and the seq of its frame."""

    def __init__(self) -> None:
        # The keys of each question that waits; () is any key.
        self._waits: dict[tuple[Asker, int], tuple[bytes, ...]] = {}
        # The same the other way round: by key, the questions that wait for it; b"" stands for any. No key without one.
        self._by_key: dict[bytes, dict[tuple[Asker, int], None]] = {}
        # The last version after `_since` that changed each key: all that changed after `_since`, and nothing else.
        self._changed: dict[bytes, int] = {}
        # What changed up to this version is not remembered; -1: nobody has ever asked, and nothing is.
        self._since = -1
        # Questions that have their answer, which `due` has not handed out yet; none of them waits.
        self._due: list[tuple[Asker, int]] = []

    def wait(self, asker: Asker, seq: int, looked: int, keys: tuple[bytes, ...], version: int) -> None:
        """A process has looked at version *looked* and waits for a change of one of *keys*, or (none given) of any."""
        if self._since < 0:
            self._since = version
        question = asker, seq
        if looked < version and (looked < self._since or not keys or self._has_changed(looked, keys)):
            self._due.append(question)
            return
        self._waits[question] = keys
        for key in keys or (b"",):
            self._by_key.setdefault(key, {})[question] = None

    def _has_changed(self, looked: int, keys: tuple[bytes, ...]) -> bool:
        return any(self._changed.get(key, 0) > looked for key in keys)

    def committed(self, version: int, keys: Iterable[bytes]) -> None:
        """A version that changed *keys* can be read."""
        if self._since < 0:
            return
        if len(self._changed) >= REMEMBERED_KEYS:
            self._changed.clear()
            self._since = version - 1
        told: dict[tuple[Asker, int], None] = dict(self._by_key.get(b"", ()))
        for key in keys:
            self._changed[key] = version
            told |= self._by_key.get(key, {})
        for question in told:
            self._forget(question)
            self._due.append(question)

    def drop(self, asker: Asker, seq: int) -> bool:
        """A process waits no longer; whether it did."""
        question = asker, seq
        if question not in self._waits:
            return False
        self._forget(question)
        return True

    def keep(self, lives: Callable[[Asker], bool]) -> None:
        """Forget the questions of those that do not live."""
        for question in [question for question in self._waits if not lives(question[0])]:
            self._forget(question)

    def _forget(self, question: tuple[Asker, int]) -> None:
        for key in self._waits.pop(question) or (b"",):
            waiting = self._by_key[key]
            waiting.pop(question, None)
            if not waiting:
                del self._by_key[key]

    def due(self) -> list[tuple[Asker, int]]:
        """The questions to be answered now. Each comes out once."""
        if not self._due:
            return self._due
        due, self._due = self._due, []
        return due

    def __repr__(self) -> str:
        return f"<Notices: {len(self._waits)} wait, {len(self._due)} are due>"
