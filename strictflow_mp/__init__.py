"""StrictFlow across processes: one live state that many processes read and few change.

>>> flow = StrictFlow("prices", state={"BTC": 50_000})   # doctest: +SKIP
>>> with flow:                                           # doctest: +SKIP
...     flow.state["BTC"]
50000
"""

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
from .flow import StrictFlow
from .frozen import FrozenDict, FrozenList, FrozenSet
from .future import TaskFuture
from .keys import Key
from .state import Snapshot
from .tasks import Task, read, write
from .watch import Change, Watch

__version__ = "0.1.0"

__all__ = [
    "Change",
    "CoordinatorLost",
    "FlowExists",
    "FlowNotRunning",
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
    "Watch",
    "read",
    "setup_logging",
    "write",
]
