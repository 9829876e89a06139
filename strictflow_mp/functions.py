"""Functions: how a task's function reaches the coordinator.

By reference, ``module:qualname``, when a fresh interpreter with the same ``sys.path`` can import it; else
by value (`byvalue`): functions of ``__main__``, of ``python -c``, of a notebook, nested ones, lambdas. A spawned
child's ``__main__`` is called ``__mp_main__``; its functions travel by value too.

By value means that the globals that the function uses are copied when it travels, once for each connection.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from .references import function_of, reference_to, resolve

__all__ = ["decode", "encode"]


def encode(target: Any) -> tuple[bool, bytes]:
    """(by value?, code) for the function of a task, or for a plain callable.

    Raises:
        TypeError, pickle.PicklingError: it holds something that cannot travel.
    """
    function = function_of(target)
    reference = reference_to(target, function)
    if reference is not None:
        return False, reference.encode()
    from .byvalue import dumps  # cloudpickle takes 8 ms to import

    return True, dumps(function)


def decode(by_value: bool, code: bytes) -> tuple[Any, Callable[..., Any]]:
    """The object that was found or rebuilt, and the function in it."""
    target = pickle.loads(code) if by_value else resolve(code.decode())
    return target, function_of(target)
