"""Calls: the functions that processes have sent, and the calls of them that SF-LOOP runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core import WRITE_PRIORITY
from ..errors import StrictFlowError
from ..values.changes import Changes, path_of
from ..values.codec import pack
from ..values.keys import unpack_key
from ..wire import frames
from ..wire.references import function_of
from .scheduler import Schedulable

if TYPE_CHECKING:
    from ..wire.future import TaskFuture
    from .sessions import Session

__all__ = ["NOTHING", "Broken", "Call", "Function", "TaskCall", "pack_result"]

NOTHING = pack(None)
"""What most P1 tasks return, packed."""


class Function:
    """A function that a process has sent, and how to run it."""

    def __init__(self, target: Any, name: str, priority: int, key: bytes | None, timeout: float | None) -> None:
        self.function = function_of(target)
        self.name = name
        self.priority = priority
        # The packed key that a keyed task is given the value of; None: the task takes what it needs from `flow.state`.
        self.key = key
        self.plain_key: Any = None if key is None else unpack_key(key)
        self.path = path_of(self.plain_key)
        self.timeout = timeout  # seconds; None: it may take as long as it likes
        self.fields = {"task": name}  # of log lines

    def __repr__(self) -> str:
        return f"<P{self.priority} function {self.name}>"


class Broken:
    """Stands for a function that could not be loaded, or must not be: every call of it fails with the reason."""

    def __init__(self, reason: str) -> None:
        self.__strictflow_function__ = self._fail
        self._reason = reason

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        raise StrictFlowError(self._reason)


class Call(Schedulable):
    """A process's call of a function, or its ready-made P1 (then `function` is None)."""

    # Set in the few that need them: a call is made for each task.
    payload = NOTHING
    """What it returned, packed."""
    answer = b""
    """The frame that answers it, if it is no run's: it failed, was cancelled, or is a P2."""
    outcome: Any = None
    """What it returned, for the future of a task's own call."""
    failure: BaseException | None = None
    """Why it failed; None while it has not."""
    future: TaskFuture[Any] | None = None
    """Of a task's own call."""
    operation = ""
    """Of a ready-made P1 that looks first: which one it is (`operations`); "" when it just makes its changes."""
    session: Session | None
    """Of the process that sent it; None for a task's own call."""

    def __init__(
        self,
        session: Session,
        seq: int,
        ticket: int,
        function: Function | None,
        arguments: bytes,
        arrived: int,
        changes: Changes | None = None,
    ) -> None:
        self.session = session
        self.slot = session.slot
        self.seq = seq
        # 0: it has none, for it is a P2. FINISHED of its slot reaches it when its burst is over, whatever became of it.
        self.ticket = ticket
        self.function = function
        self.priority = WRITE_PRIORITY if function is None else function.priority
        self.arguments = arguments
        self.arrived = arrived  # time.perf_counter_ns()
        # Those of a ready-made P1; None with a function. With an operation, what it was asked with.
        self.changes = changes

    @property
    def has_failed(self) -> bool:
        """Whether it raised."""
        return self.failure is not None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.name if self.function else self.operation or "put"


class TaskCall(Call):
    """A call that a task makes in SF-LOOP: it has slot 0 and no session, and its future is settled here."""

    def __init__(
        self,
        future: TaskFuture[Any],
        ticket: int,
        function: Function | None,
        arguments: bytes,
        arrived: int,
        changes: Changes | None = None,
    ) -> None:
        self.session = None
        self.slot = 0
        self.seq = future.seq
        # That of slot 0 when it was submitted; bursts take tickets of that slot too.
        self.ticket = ticket
        self.function = function
        self.priority = WRITE_PRIORITY if function is None else function.priority
        self.arguments = arguments
        self.arrived = arrived
        self.changes = changes
        self.future = future


def pack_result(result: Any, call: Call) -> bytes:
    """What a task returned, packed.

    Raises:
        SerializationError: it cannot travel, or is too long; names the task.
    """
    return NOTHING if result is None else pack(result, f"result of {call.name}()", frames.MAX_BODY_BYTES)
