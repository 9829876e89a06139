"""The parts: what the loop, its requests, its runner and the tasks' view of the flow share, made once by `main`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..memory.gatekeeper import GateKeeper
    from ..memory.segment import Segment
    from ..memory.suspect import Marker
    from ..store import StoreReader, StoreWriter
    from .admission import Admission
    from .calls import Call
    from .library import Library
    from .scheduler import Scheduler
    from .sessions import Sessions
    from .slots import Slots
    from .stepper import Stepper

__all__ = ["Parts"]


class Parts(NamedTuple):
    """One of each; all belong to SF-LOOP's thread."""

    flow: str
    """Its name."""
    segment: Segment
    writer: StoreWriter
    reader: StoreReader
    """Reads with the pins of slot 0. Nothing is committed while a task runs, so most reads need no pin."""
    gate: GateKeeper
    sessions: Sessions
    slots: Slots
    admission: Admission
    marker: Marker
    scheduler: Scheduler[Call]
    library: Library
    stepper: Stepper
    """Watches the epoll descriptor of `sessions`: whatever arrives stops the async tasks."""
