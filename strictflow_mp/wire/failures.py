"""Failures: how a task's exception crosses to the process that waits for it; the last resort of whatever is raised.

The exception travels pickled, with the text of its traceback as its cause. One that does not survive pickling, or that
is no `Exception`, arrives as `TaskFailed` with its type and message.

Invariant: nothing here fails, whatever the exception is. It may refuse to be printed, compared, pickled, rebuilt or
given an attribute, and may exit or interrupt in each of these; so each of them is asked for in a ``try`` that takes
whatever comes, and what cannot be had is left out. What ends the process in here, as a crash in C code does, happens
under the mark of its task (`memory.suspect`): the next coordinator does not run that task again.
"""

from __future__ import annotations

import pickle
import signal
import traceback
from typing import Any

from ..errors import StrictFlowError, TaskFailed
from . import frames

__all__ = ["RemoteTraceback", "let_go_of_frames", "pack_failure", "printable", "type_of", "unpack_failure", "words_of"]

TEXT_CHARS = 1 << 16
"""Characters of a traceback's text, at most: of a longer one the beginning and the end."""
MESSAGE_CHARS = 2000
"""Characters of a message that is quoted in a line."""
PICKLE_BYTES = 1 << 24
"""Bytes of an exception that is carried over as it is, at most."""


MAX_LED = 1000
"""Exceptions that led to one of which the frames are let go, at most."""

# Past whatever a class makes of its attributes: these are the base's own.
_slots: Any = BaseException.__dict__
_set_traceback, _traceback_from = _slots["__traceback__"].__set__, _slots["__traceback__"].__get__
_set_cause, _cause_of = _slots["__cause__"].__set__, _slots["__cause__"].__get__
_context_of = _slots["__context__"].__get__


def _is_a(thing: object, kind: type) -> bool:
    """As `isinstance`, by the type alone: that asks for ``__class__`` too, which may raise, or say what is not so."""
    return issubclass(type(thing), kind)


class RemoteTraceback(Exception):
    """The traceback of a task, as text; the ``__cause__`` of what its future raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def type_of(error: BaseException) -> str:
    """The name of an exception's type."""
    try:
        return str(type.__dict__["__name__"].__get__(type(error)))  # not what a metaclass makes of it
    except BaseException:
        return "an exception"


def words_of(error: BaseException) -> str:
    """An exception in a line: its type and message, or its type alone when it will not say."""
    name = type_of(error)
    try:
        text = str(error)
        return f"{name}: {_cut(text, MESSAGE_CHARS)}" if text else name
    except BaseException:
        return f"{name} (its message cannot be printed)"


def printable(error: BaseException) -> BaseException | None:
    """The exception for a log line's traceback; None when it cannot be printed, and would fail the handler."""
    try:
        traceback.format_exception(type(error), error, error.__traceback__)
    except BaseException:
        return None
    return error


def pack_failure(error: BaseException, flow: str | None = None) -> tuple[str, bytes]:
    """The text of an exception's traceback, and what its future is to raise, pickled.

    Args:
        flow: named in errors of ours that do not name one yet.
    """
    if flow is not None and _is_a(error, StrictFlowError):
        try:
            error.of(flow)  # type: ignore[attr-defined]
        except BaseException:
            pass  # a class of the user's that refuses
    # SystemExit and its like must not end the process that asks for the result.
    blob = _pickled(error) if _is_a(error, Exception) else b""
    if not blob:
        blob = pickle.dumps(TaskFailed(f"the task failed with what cannot be carried over: {words_of(error)}"))
    return _cut(_traceback_of(error), min(TEXT_CHARS, frames.MAX_BODY_BYTES // 8)), blob


def _pickled(error: BaseException) -> bytes:
    """Empty when it does not survive it."""
    try:
        import cloudpickle  # 8 ms that a process without failures does not need

        blob: bytes = cloudpickle.dumps(error)
        survives = len(blob) <= min(PICKLE_BYTES, frames.MAX_BODY_BYTES // 2) and _is_a(
            pickle.loads(blob), BaseException
        )
    except BaseException:
        return b""
    return blob if survives else b""


def _traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except BaseException:
        pass
    try:
        where = "".join(traceback.format_tb(_traceback_from(error)))
    except BaseException:
        where = ""
    return f"Traceback (most recent call last):\n{where}{words_of(error)}\n"


def let_go_of_frames(error: BaseException) -> None:
    """Take the tracebacks off an exception, and off those that led to it: their frames keep all that was in them."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left and len(seen) < MAX_LED:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        _set_traceback(one, None)
        left += [_cause_of(one), _context_of(one)]


def _cut(text: str, chars: int) -> str:
    if len(text) <= chars:
        return text
    half = chars // 2
    return f"{text[:half]} ... {text[-half:]}"


def unpack_failure(text: str, blob: bytes, *, flow: str) -> BaseException:
    """The exception to raise for what `pack_failure` made."""
    error: Any = None
    last = text.strip().rpartition("\n")[2] or "no text"
    try:
        error = pickle.loads(blob)
    except (Exception, SystemExit) as trouble:
        if _is_a(trouble, SystemExit) and _comes_from_a_signal(trouble):
            raise
        text += f"\n(and it could not be rebuilt here: {words_of(trouble)})"
    if not _is_a(error, BaseException):
        error = TaskFailed(f"the task failed with what cannot be carried over: {last}", flow=flow)
    if _is_a(error, TaskFailed) and error.flow is None:
        error.flow = flow
    # Past a `__setattr__` that refuses: a frozen dataclass may be an exception too.
    _set_cause(error, RemoteTraceback(text))
    exception: BaseException = error
    return exception


def _comes_from_a_signal(error: BaseException) -> bool:
    """Whether a signal handler of the user's has raised it: then it is for the user, whatever it came into."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(handler, "__func__", handler), "__code__", None) for handler in handlers}
    step = _traceback_from(error)
    while step is not None:
        if step.tb_frame.f_code in codes:
            return True
        step = step.tb_next
    return False
