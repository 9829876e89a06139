"""The place: whether code runs inside a flow's SF-LOOP or outside it.

``flow.state`` and calling a task mean different things inside. The coordinator, which lies above this module,
says here what they mean; the handles, which lie above the coordinator, ask here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .keys import TypedState

__all__ = ["Inside", "enter", "inside", "leave"]


class Inside(Protocol):
    """What SF-LOOP offers to the handles in its own process."""

    name: str
    state: TypedState

    def call(self, task: Any, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Queue calls of a task; return their futures."""

    def put(self, changes: dict[bytes, bytes | None]) -> Any:
        """Queue a ready-made P1; return its future."""

    def snapshot(self) -> Any:
        """A view of the last committed version."""

    def stats(self) -> Any:
        """The statistics, at once."""


_inside: Inside | None = None


def enter(loop: Inside) -> None:
    """From now on this process is the coordinator of *loop*'s flow."""
    global _inside
    _inside = loop


def leave() -> None:
    """This process runs no flow: it was forked by one that does."""
    global _inside
    _inside = None


def inside(name: str | None) -> Inside | None:
    """The loop of the flow of that name, if this process runs it. None as the name asks for whatever runs here."""
    if _inside is not None and (name is None or _inside.name == name):
        return _inside
    return None
