"""Inside: whether code runs inside a flow's SF-LOOP, as part of a task, or outside it.

``flow.state`` and calling a task mean different things there. The coordinator says here what they mean, once in its
process; the handles ask here. So neither imports the other.

A child that a task has forked is outside: its handles are told to move out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from ..system import forks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..values.annotations import TypedState

__all__ = ["Handle", "Loop", "enter", "inside", "leave", "remember"]


class Loop(Protocol):
    """What SF-LOOP offers to the handles in its own process."""

    name: str
    state: TypedState
    outside: TypedState | None
    """What `state` stands for in a child that a task has forked; None in the coordinator."""

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Queue calls of a task; return their futures."""

    def put(self, changes: dict[bytes, bytes | None]) -> Any:
        """Queue a ready-made P1; return its future."""

    def snapshot(self) -> Any:
        """A view of the last committed version."""

    def stats(self) -> Any:
        """The statistics, at once."""


class Handle(Protocol):
    """What a handle offers, wherever it is."""

    def move_out(self) -> None:
        """It may have been inside: be a handle like those in any other process."""

    def after_fork(self) -> None:
        """This is a forked child."""


_inside: Loop | None = None
_handles: WeakSet[Handle] = WeakSet()
"""All of this process."""


def enter(loop: Loop) -> None:
    """From now on this process is the coordinator of *loop*'s flow."""
    global _inside
    _inside = loop


def leave() -> None:
    """This process runs no flow: it was forked by one that does."""
    global _inside
    _inside = None
    for handle in list(_handles):
        handle.move_out()


def remember(handle: Handle) -> None:
    """A handle has been made, and knows whether it is inside."""
    _handles.add(handle)


def inside(name: str | None) -> Loop | None:
    """The loop of the flow of that name, if this process runs it. None as the name asks for whatever runs here."""
    if _inside is not None and (name is None or _inside.name == name):
        return _inside
    return None


def _after_fork() -> None:
    for handle in list(_handles):
        handle.after_fork()


forks.in_child(_after_fork)
