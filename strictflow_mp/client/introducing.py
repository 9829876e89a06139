"""Introducing: how the coordinator is told of a function, before the first call of it.

The caller holds `Attachment.submitting`. The frame precedes all calls that name its number; the next coordinator is
sent the frames of all functions again (`again`), some of which may have to say something else by then: a function that
travelled by reference travels by value when a fresh interpreter would not find its code any more.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from ..errors import SerializationError, StrictFlowError
from ..system.paths import fitting, own_path
from ..values.codec import check_size
from ..values.faults import FAULTS
from ..wire import frames, functions
from ..wire.origins import differs, is_current, known_of, look

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .attachment import Attachment

__all__ = ["again", "introduce"]

MAX_FUNCTIONS = 65_000
"""Functions that a process may have the coordinator know at a time; a little less than that takes."""


def introduce(attachment: Attachment, task: Any) -> tuple[int, bytes]:
    """A number for a function that is new to the coordinator, and the frames that tell of it."""
    if len(attachment.function_frames) >= MAX_FUNCTIONS:
        raise StrictFlowError(
            f"{task.name}() would be one of more than {MAX_FUNCTIONS:,} tasks that this process keeps: let go of some, "
            "or decorate a function once and pass it arguments",
            flow=attachment.flow,
        )
    # A number is never given twice, also when a signal handler submits or raises in between: the next coordinator is
    # sent all these frames, and would learn another function under it.
    number = next(attachment.function_numbers)
    frame = _pack(attachment, task, number, _known(attachment))
    from ..wire.handshake import MAX_PATH_BYTES, MAX_PATHS  # 8 ms; who has attached has it

    path = fitting(own_path(), MAX_PATHS, MAX_PATH_BYTES)
    if path != attachment.told_path:
        # A module may have been imported from a place that came on the path since.
        attachment.told_path = path
        frame = frames.pack_frame(frames.PATHS, path) + frame
    if len(attachment.unused) >= attachment.unused_limit:
        unused = attachment.take_unused()
        if unused:
            # It follows all calls that name them, for those have been sent.
            frame = frames.pack_frame(frames.FORGET, unused) + frame
    return number, frame


def _known(attachment: Attachment) -> Mapping[str, tuple[str, bytes]]:
    """Which modules the coordinator has loaded."""
    try:
        return known_of(attachment.place.code.read_bytes())
    except OSError:
        return {}  # none yet; or we may not look there any more


def _pack(attachment: Attachment, task: Any, number: int, known: Mapping[str, tuple[str, bytes]]) -> bytes:
    """The frame of a function; kept for the next coordinator."""
    flow = attachment.flow
    try:
        encoded = functions.encode(task, known)
    except functions.DifferentCode as different:
        raise SerializationError(_why(task, different, known), path=task.name, flow=flow) from different.error
    except (*FAULTS, pickle.PicklingError) as error:
        raise SerializationError(
            f"the function of {task.name}() cannot travel to the coordinator: {error}; do not let it use "
            "locks, sockets or open files of this process",
            path=task.name,
            flow=flow,
        ) from error
    try:
        check_size(len(encoded.code), f"the function of {task.name}()", frames.MAX_BODY_BYTES)
    except SerializationError as error:
        raise error.of(flow) from None
    frame = attachment.function_frames[number] = frames.pack_frame(
        frames.FUNCTION,
        number,
        encoded.by_value,
        encoded.code,
        task.name,
        task.priority,
        task.packed_key,
        task.timeout,
        encoded.origins,
    )
    attachment.function_modules[number] = tuple(name for name, _, _ in encoded.origins)
    return frame


def _why(task: Any, different: functions.DifferentCode, known: Mapping[str, tuple[str, bytes]]) -> str:
    text = f"the code of {task.name}() is not what its coordinator has, or would load: "
    for name in different.modules:
        seen, there = look(name), known.get(name)
        if seen is not None and (not is_current(seen) if there is None else differs(seen, *there)):
            file = seen.file if there is None else there[0]
            if file == seen.file:
                text += f"module {name!r} ({file}) has changed since it was loaded, or may have; "
            else:
                text += f"module {name!r} is {seen.file} here as this process has loaded it, and {file} there; "
            break
    return text + (
        f"and it cannot travel by value ({different.error}). After a deploy start this process anew, and let the "
        "coordinator load its modules anew (flow.reload(), `strictflow-mp reload NAME`); modules of different programs "
        "need different names"
    )


def again(attachment: Attachment) -> list[bytes]:
    """The frames of all functions, for the next coordinator, which has loaded nothing yet."""
    for reference, number in list(attachment.functions.items()):
        task, names = reference(), attachment.function_modules.get(number, ())
        if task is None or all(is_current(seen) for name in names if (seen := look(name)) is not None):
            continue  # a pickle keeps what it had of the globals
        try:
            _pack(attachment, task, number, {})
        except StrictFlowError:
            pass  # those who have called it are told there what is wrong
    return [*attachment.function_frames.values()]
