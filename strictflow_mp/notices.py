"""Notices: who wants to be told when which keys change. Decisions only: no clock, no I/O.

Events in: `wait`, `committed`, `drop`, `keep`. Out: `due`, what is to be told now.

A process says up to which version it has looked. A commit since then is found in a bounded memory of what changed
when; beyond that, the process is told to look again, which costs it a look, and loses no change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

__all__ = ["Notices"]

REMEMBERED = 1 << 12
"""Keys of which it is known when they changed last."""

Owner = TypeVar("Owner")


class Notices(Generic[Owner]):
    """Questions of processes, each answered once."""

    def __init__(self) -> None:
        self._waits: dict[tuple[Owner, int], tuple[bytes, ...]] = {}
        self._by_key: dict[bytes, dict[tuple[Owner, int], None]] = {}
        self._changed: dict[bytes, int] = {}
        self._since = -1  # what changed up to this version is not remembered; -1: nobody has ever asked
        self._due: list[tuple[Owner, int]] = []

    def wait(self, owner: Owner, number: int, looked: int, keys: tuple[bytes, ...], version: int) -> None:
        """Somebody has looked at *looked* and waits for a change of one of *keys*, or (none given) of any."""
        if self._since < 0:
            self._since = version
        question = owner, number
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
        if len(self._changed) >= REMEMBERED:
            self._changed.clear()
            self._since = version - 1
        told: dict[tuple[Owner, int], None] = dict(self._by_key.get(b"", ()))
        for key in keys:
            self._changed[key] = version
            told |= self._by_key.get(key, {})
        for question in told:
            self._forget(question)
            self._due.append(question)

    def drop(self, owner: Owner, number: int) -> bool:
        """Somebody waits no longer; whether it did."""
        question = owner, number
        if question not in self._waits:
            return False
        self._forget(question)
        return True

    def keep(self, lives: Callable[[Owner], bool]) -> None:
        """Forget those who do not live."""
        for question in [question for question in self._waits if not lives(question[0])]:
            self._forget(question)

    def _forget(self, question: tuple[Owner, int]) -> None:
        for key in self._waits.pop(question) or (b"",):
            waiting = self._by_key[key]
            waiting.pop(question, None)
            if not waiting:
                del self._by_key[key]

    def due(self) -> list[tuple[Owner, int]]:
        """Who is to be told now, once."""
        if not self._due:
            return self._due
        due, self._due = self._due, []
        return due

    def __repr__(self) -> str:
        return f"<Notices: {len(self._waits)} wait, {len(self._due)} are due>"
