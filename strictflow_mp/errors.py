"""The errors a user meets, split by who is to blame.

Every class derives from `StrictFlowError`, survives pickling with its attributes, and carries a
message of three parts: what happened, to which flow (and key), and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CoordinatorLost",
    "FlowExists",
    "FlowNotRunning",
    "GateTimeout",
    "IntegrityError",
    "ProtocolError",
    "ReadOnlyState",
    "SerializationError",
    "StateFull",
    "StrictFlowError",
    "TaskCrashed",
    "TaskFailed",
    "TaskTimeout",
    "TooManyWorkers",
]


class StrictFlowError(Exception):
    """Base of all errors of this library.

    Attributes:
        flow: name of the flow concerned, or None where no flow is involved.
        key: the state key concerned, or None.
    """

    def __init__(self, message: str = "", *, flow: str | None = None, key: object = None) -> None:
        super().__init__(message)
        self.flow = flow
        self.key = key

    def __str__(self) -> str:
        message = str(self.args[0]) if self.args else ""
        if self.flow is not None and repr(self.flow) not in message:
            return f"flow {self.flow!r}: {message}"
        return message

    def of(self, flow: str) -> StrictFlowError:
        """This error, naming the flow if it does not name one yet."""
        if self.flow is None:
            self.flow = flow
        return self


# The flow is not there, or there already.


class FlowNotRunning(StrictFlowError):
    """No coordinator serves under that name."""


class FlowExists(StrictFlowError):
    """A coordinator already lives under that name."""


class TooManyWorkers(StrictFlowError):
    """All `max_workers` places are taken by live processes."""


class CoordinatorLost(StrictFlowError):
    """The coordinator died and did not come back in time.

    The message says whether the task was executed, was not, or whether that is unknown.
    """


# The task went wrong.


class TaskCrashed(StrictFlowError):
    """The coordinator died while it ran this very task: rolled back, not retried."""


class TaskTimeout(StrictFlowError, TimeoutError):
    """A task ran longer than its `timeout`: stopped and rolled back."""


class GateTimeout(StrictFlowError, TimeoutError):
    """A read waited too long for the P1 tasks that were submitted before it."""


class TaskFailed(StrictFlowError):
    """The task's own exception could not be carried over; the message holds its text."""


class IntegrityError(StrictFlowError):
    """A keyed P1 task returned None: nothing was committed."""


# The state, and what goes into it.


class ReadOnlyState(StrictFlowError, TypeError):
    """A read-only value was changed, or the state was changed outside a P1 task."""


class StateFull(StrictFlowError):
    """Shared memory is full: the task was rolled back, the state is intact."""


class SerializationError(StrictFlowError, TypeError):
    """A value that cannot be stored; `path` says where in it (`config.handlers[3]`)."""

    def __init__(self, message: str = "", *, path: str = "", flow: str | None = None, key: object = None) -> None:
        super().__init__(message, flow=flow, key=key)
        self.path = path


class ProtocolError(StrictFlowError):
    """A damaged or foreign frame or segment."""
