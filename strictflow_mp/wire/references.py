"""References: naming a function as ``module:qualname``, and whether a fresh interpreter would find it there."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAINS", "function_of", "is_importable", "reference_to", "resolve"]

FUNCTION_ATTRIBUTE = "__strictflow_function__"
"""The attribute of a task object that holds the function it wraps."""
MAINS = ("__main__", "__mp_main__")
"""The names of a main program, in its own process and in one that multiprocessing has spawned: nobody can import it."""


def resolve(reference: str) -> Any:
    """The object that ``module:qualname`` names."""
    module, _, qualname = reference.partition(":")
    return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))


def function_of(target: Any) -> Callable[..., Any]:
    """The function itself, when the name of a function leads to the task that wraps it."""
    function: Callable[..., Any] = getattr(target, FUNCTION_ATTRIBUTE, target)
    return function


def reference_to(target: Any, function: Callable[..., Any]) -> str | None:
    """``module:qualname`` if that leads back to *target* or to *function*, else None."""
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not module or not qualname or module in MAINS or "<" in qualname or not is_importable(module):
        return None
    reference = f"{module}:{qualname}"
    # The name may lead elsewhere: to a function that was defined later, or to what a decorator made of this one.
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
    # Only the top package is looked for: what is in it is found through it.
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
    return bool(found.origin == loaded.origin)  # else another module of that name comes first on the path
