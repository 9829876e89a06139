"""Jobs: the functions that processes have sent, and the calls of them that SF-LOOP runs."""

from __future__ import annotations

from typing import Any

from .errors import StrictFlowError
from .future import TaskFuture
from .references import function_of
from .scheduler import Job
from .sessions import Session
from .transaction import Changes, path_of
from .values import pack, unpack_key

__all__ = ["NOTHING", "Broken", "Call", "Function", "pack_result"]

NOTHING = pack(None)
"""What most P1 tasks return, packed."""


class Function:
    """A function that a process has sent, and how to run it."""

    def __init__(self, target: Any, name: str, priority: int, key: bytes | None, timeout: float | None) -> None:
        self.function = function_of(target)
        self.name = name
        self.priority = priority
        self.key = key
        self.plain_key: Any = None if key is None else unpack_key(key)
        self.path = path_of(self.plain_key)
        self.timeout = timeout
        self.fields = {"task": name}  # of log lines

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

    # Set in the few that need them: a call is made for each task.
    payload = NOTHING
    """What it returned, packed."""
    answer = b""
    """The frame that answers it, if it is no run's."""
    outcome: Any = None
    failure: BaseException | None = None
    future: TaskFuture[Any] | None = None

    def __init__(
        self,
        owner: int,
        number: int,
        priority: int,
        session: Session | None,
        function: Function | None,
        arguments: bytes,
        changes: Changes | None,
        flag: int,
        arrived: int,
    ) -> None:
        self.owner = owner
        self.number = number
        self.priority = priority
        self.session = session
        self.function = function
        self.arguments = arguments
        self.changes = changes
        self.flag = flag
        self.arrived = arrived  # time.perf_counter_ns()

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
    return NOTHING if result is None else pack(result, f"result of {call.name}()")
