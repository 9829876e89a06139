"""Functions: how a task's function reaches the coordinator.

By reference, ``module:qualname``, when a fresh interpreter with the same ``sys.path`` can import it; else
by value (`byvalue`): functions of ``__main__``, of ``python -c``, of a notebook, nested ones, lambdas. A spawned
child's ``__main__`` is called ``__mp_main__``; its functions travel by value too.

By value means that the globals that the function uses are copied when it travels, once for each connection.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import pickle
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["decode", "encode", "function_of", "is_importable", "reference_to", "resolve"]

FUNCTION = "__strictflow_function__"
"""The attribute of a task object that holds the function it wraps."""
MAINS = ("__main__", "__mp_main__")


def resolve(reference: str) -> Any:
    """The object that ``module:qualname`` names."""
    module, _, qualname = reference.partition(":")
    return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))


def function_of(target: Any) -> Callable[..., Any]:
    """The function itself, when the name of a function leads to the task that wraps it."""
    function: Callable[..., Any] = getattr(target, FUNCTION, target)
    return function


def reference_to(target: Any, function: Callable[..., Any]) -> str | None:
    """``module:qualname`` if that leads back to *target* or to *function*, else None."""
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not module or not qualname or module in MAINS or "<" in qualname or not is_importable(module):
        return None
    reference = f"{module}:{qualname}"
    try:
        found = resolve(reference)
    except (ImportError, AttributeError):
        return None
    return reference if found is target or function_of(found) is function else None


@functools.cache
def is_importable(name: str) -> bool:
    """Whether a fresh interpreter would find the very module that is loaded here."""
    module = sys.modules.get(name)
    if module is None:
        return False
    top = name.partition(".")[0]
    if top in sys.builtin_module_names or top in getattr(sys, "stdlib_module_names", ()):
        return True
    loaded = getattr(sys.modules.get(top), "__spec__", None)
    if loaded is None or getattr(module, "__spec__", None) is None:
        return False
    try:
        found = importlib.machinery.PathFinder.find_spec(top)
    except (ImportError, ValueError):
        return False
    if found is None:
        # Editable installs and the like bring finders of their own, which a fresh interpreter has too.
        return str(getattr(loaded.loader, "__module__", "")).startswith("__editable__")
    return bool(found.origin == loaded.origin)


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
