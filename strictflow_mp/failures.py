"""Failures: how a task's exception crosses to the process that waits for it.

The exception travels pickled, with the text of its traceback as its cause. One that does not survive
pickling arrives as `TaskFailed` with that text.
"""

from __future__ import annotations

import pickle
import traceback

from .errors import TaskFailed

__all__ = ["RemoteTraceback", "pack_failure", "unpack_failure"]


class RemoteTraceback(Exception):
    """The traceback of a task, as text; the ``__cause__`` of what its future raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def pack_failure(error: BaseException) -> tuple[str, bytes]:
    """The text and the pickled form of an exception; the latter is empty when it cannot be pickled."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if not isinstance(error, Exception):
        return text, b""  # SystemExit and its like must not end the process that asks for the result
    import cloudpickle  # 8 ms that a process without failures does not need

    try:
        blob: bytes = cloudpickle.dumps(error)
        pickle.loads(blob)
    except Exception:
        return text, b""
    return text, blob


def unpack_failure(text: str, blob: bytes, *, flow: str) -> BaseException:
    """The exception to raise for what `pack_failure` made."""
    error: BaseException | None = None
    if blob:
        try:
            error = pickle.loads(blob)
        except Exception as trouble:
            text += f"\n(and it could not be rebuilt here: {trouble!r})"
    if not isinstance(error, BaseException):
        last = text.strip().splitlines()[-1] if text.strip() else "no text"
        error = TaskFailed(f"the task failed with what cannot be carried over: {last}", flow=flow)
    error.__cause__ = RemoteTraceback(text)
    return error
