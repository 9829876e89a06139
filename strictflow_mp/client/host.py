"""The host: what ``flow.state`` needs of the client that it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..store import StoreReader

__all__ = ["Host"]


class Host(Protocol):
    """The client, as `client.state.FlowState` sees it."""

    name: str

    def pass_gate(self) -> StoreReader:
        """Attach if need be, wait for the gate, return the reader."""

    def reader(self) -> StoreReader:
        """Attach if need be, return the reader."""

    def rebind(self, reader: StoreReader, epoch: int) -> None:
        """Have the state bound anew, if that is still our reader."""

    def write(self, changes: dict[bytes, bytes | None]) -> None:
        """Commit a ready-made P1 and wait for it."""

    def operate(self, what: str, asked: dict[bytes, bytes | None]) -> Any:
        """Commit a ready-made P1 that looks first, and wait for its result."""
