"""Functions: how a task's function reaches the coordinator.

By reference, ``module:qualname`` (`references`), when a fresh interpreter with the same ``sys.path`` can import it;
else by value (`byvalue`): functions of ``__main__``, of ``python -c``, of a notebook, nested ones, lambdas. A spawned
child's ``__main__`` is called ``__mp_main__``; its functions travel by value too.

By value means that the globals that the function uses are copied when it travels, once for each connection. Later
changes of them here do not reach the coordinator.

A name may stand for other code in the other process: so with the function go the files of the modules that it leads to
(`origins`), and it travels by value, with what it needs of them, when the other end is known to have others. What a
pickle names, of all that the function is made of (what a `partial` binds, say), counts as much.

Invariant: a reference is only sent when it leads back, in this process, to the very object that is sent.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

from ..values.faults import FAULTS
from .origins import entries_of, modules_of, stale
from .references import function_of, reference_to, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .origins import Entry

__all__ = ["DifferentCode", "Encoded", "decode", "encode"]


class Encoded(NamedTuple):
    """A function, as it travels."""

    by_value: bool
    code: bytes
    """A reference, or a pickle."""
    origins: tuple[Entry, ...]
    """Of the modules that are named in it, and not in it."""
    stale: frozenset[str]
    """Modules that are in it, for the other end has others under these names."""


def encode(target: Any, known: Mapping[str, tuple[str, bytes]] | None = None) -> Encoded:
    """The function of a task, or a plain callable, for another process.

    Args:
        known: what that has loaded already (`origins.known_of`).

    Raises:
        TypeError, pickle.PicklingError: it holds something that cannot travel.
        DifferentCode: the other end has other code under one of its names, and it cannot travel by value.
    """
    function = function_of(target)
    known = known or {}
    modules = modules_of(function)
    others = stale(modules, known)
    reference = reference_to(target, function)
    if reference is not None and reference.partition(":")[0] not in others:
        return Encoded(False, reference.encode(), entries_of(modules.keys() - others), frozenset())
    from .byvalue import pickled  # cloudpickle takes 8 ms to import

    while True:
        try:
            code, named = pickled(function, others)
        except (*FAULTS, pickle.PicklingError) as error:
            if others:
                raise DifferentCode(others, error) from error
            raise
        modules = modules_of(function, named)
        more = stale(modules, known)
        if more <= others:
            break
        others |= more  # what is of these modules is pickled next, and may name further ones
    return Encoded(True, code, entries_of(modules.keys() - others), frozenset(others))


class DifferentCode(Exception):
    """A function must travel by value, for its module is another one at the other end, and cannot."""

    def __init__(self, modules: Iterable[str], error: BaseException) -> None:
        super().__init__(modules, error)
        self.modules = sorted(modules)
        self.error = error


def decode(by_value: bool, code: bytes) -> tuple[Any, Callable[..., Any]]:
    """The object that was found or rebuilt, and the function in it."""
    target = pickle.loads(code) if by_value else resolve(code.decode())
    return target, function_of(target)
