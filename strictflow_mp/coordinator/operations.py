"""Operations: ready-made P1 tasks that look at the state before they change it.

A process that read, and then put, would decide by what another may have changed meanwhile. Here it is one step, alone
in its turn. Values are moved as they lie, packed: nothing is decoded, so what this process cannot decode does no harm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.changes import path_of
from ..values.codec import check_size
from ..values.keys import unpack_key
from ..wire import frames
from .calls import NOTHING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..values.changes import Changes
    from .burst import Burst

__all__ = ["KEYS_ASKED", "OPERATIONS"]


def _clear(burst: Burst, asked: Changes) -> tuple[Changes, bytes]:
    return dict.fromkeys(burst), NOTHING


def _pop(burst: Burst, asked: Changes) -> tuple[Changes, bytes]:
    (key,) = asked
    value = burst.lookup(key)
    if value is None:
        raise KeyError(unpack_key(key))
    _check_answer(key, value)
    return {key: None}, value


def _set_default(burst: Burst, asked: Changes) -> tuple[Changes, bytes]:
    ((key, default),) = asked.items()
    value = burst.lookup(key)
    if value is None:
        return {key: default}, default or NOTHING
    _check_answer(key, value)
    return {}, value


def _check_answer(key: bytes, value: bytes) -> None:
    # A task may have set what is longer than any answer can be.
    check_size(len(value), path_of(unpack_key(key)), frames.MAX_BODY_BYTES)


if TYPE_CHECKING:
    Operation = Callable[[Burst, Changes], tuple[Changes, bytes]]
"""Takes the burst, and the keys and values that it was asked with; gives what it changes, and its result, packed."""

OPERATIONS: dict[str, Operation] = {"clear": _clear, "pop": _pop, "setdefault": _set_default}
"""By the name that a frame has for it, which is what users call it."""
KEYS_ASKED = {"clear": 0, "pop": 1, "setdefault": 1}
"""How many keys each is asked with; `setdefault` with a value too."""
