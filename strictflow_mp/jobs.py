"""Jobs: the functions that processes have sent, and the calls of them that SF-LOOP runs."""

from __future__ import annotations

import time
from typing import Any

from .errors import StrictFlowError
from .future import TaskFuture
from .references import function_of
from .scheduler import Job
from .sessions import Session
from .transaction import Changes
from .values import pack

__all__ = ["Broken", "Call", "Function", "pack_result"]

_NONE = pack(None)


class Function:
    """A function that a process has sent, and how to run it."""

    def __init__(self, target: Any, name: str, priority: int, key: bytes | None, timeout: float | None) -> None:
        self.function = function_of(target)
        self.name = name
        self.priority = priority
        self.key = key
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"<P{self.priority} function {self.name}>"


class Broken:
    """Stands for a function that could not be loaded: every call of it fails with the reason."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.__strictflow_function__ = self._fail
        self._reason = (
            f"the function of {name}() could not be loaded in the coordinator: {type(error).__name__}: {error}; "
            "make its module importable there"
        )

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        raise StrictFlowError(self._reason)


class Call(Job):
    """A call of a function, or a ready-made P1 (then `function` is None)."""

    __slots__ = (
        "answer",
        "arguments",
        "arrived",
        "changes",
        "failure",
        "flag",
        "function",
        "future",
        "outcome",
        "session",
    )

    def __init__(
        self,
        owner: int,
        number: int,
        priority: int,
        session: Session | None,
        function: Function | None,
        arguments: bytes,
        changes: Changes,
        flag: int,
        future: TaskFuture[Any] | None = None,
    ) -> None:
        Job.__init__(self, owner, number, priority)
        self.session = session
        self.function = function
        self.arguments = arguments
        self.changes = changes
        self.flag = flag
        self.future = future
        self.arrived = time.perf_counter_ns()
        self.answer = b""
        self.outcome: Any = None
        self.failure: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it raised."""
        return self.failure is not None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.name if self.function else "put"


def pack_result(result: Any, call: Call) -> bytes:
    """What a task returned, packed.

    Raises:
        SerializationError: it cannot travel; names the task.
    """
    return _NONE if result is None else pack(result, f"result of {call.name}()")
