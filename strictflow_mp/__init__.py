"""StrictFlow across processes: one live state that many processes read and few change.

>>> flow = StrictFlow("prices", state={"BTC": 50_000})   # doctest: +SKIP
>>> with flow:                                           # doctest: +SKIP
...     flow.state["BTC"]
50000
"""

from typing import TYPE_CHECKING, Any

from .core import setup_logging
from .errors import (
    CoordinatorLost,
    FlowExists,
    FlowNotRunning,
    GateTimeout,
    IntegrityError,
    ProtocolError,
    ReadOnlyState,
    SerializationError,
    StateFull,
    StrictFlowError,
    TaskCrashed,
    TaskFailed,
    TaskTimeout,
    TooManyWorkers,
)
from .flow.handle import StrictFlow
from .flow.tasks import Task, read, write
from .flow.watch import Change, Watch
from .store.views import Snapshot
from .values.annotations import Key
from .values.frozen import FrozenDict, FrozenList, FrozenSet
from .wire.future import TaskFuture

if TYPE_CHECKING:
    from .flow.workers import Worker, WorkerGroup
    from .trace import Trace
    from .wire.stats import FlowStats

__version__ = "0.1.0"

__all__ = [
    "Change",
    "CoordinatorLost",
    "FlowExists",
    "FlowNotRunning",
    "FlowStats",
    "FrozenDict",
    "FrozenList",
    "FrozenSet",
    "GateTimeout",
    "IntegrityError",
    "Key",
    "ProtocolError",
    "ReadOnlyState",
    "SerializationError",
    "Snapshot",
    "StateFull",
    "StrictFlow",
    "StrictFlowError",
    "Task",
    "TaskCrashed",
    "TaskFailed",
    "TaskFuture",
    "TaskTimeout",
    "TooManyWorkers",
    "Trace",
    "Watch",
    "Worker",
    "WorkerGroup",
    "read",
    "setup_logging",
    "write",
]

_LATE = {"FlowStats": "wire.stats", "Trace": "trace", "Worker": "flow.workers", "WorkerGroup": "flow.workers"}
"""The room of each class that is imported when somebody names it: hardly anybody does, and it takes some 10 ms."""

if not TYPE_CHECKING:  # a checker would believe that every name is here

    def __getattr__(name: str) -> Any:
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = globals()[name] = getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATE})
