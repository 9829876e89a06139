"""Functions: how a task's function reaches the coordinator.

By reference, ``module:qualname``, when a fresh interpreter with the same ``sys.path`` can import it; else
by value (cloudpickle): functions of ``__main__``, of ``python -c``, of a notebook, nested ones, lambdas. A spawned
child's ``__main__`` is called ``__mp_main__``; its functions travel by value too.

By value means that the globals that the function uses are copied when it travels, once for each connection.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import cloudpickle

__all__ = ["dumps", "encode", "function_of", "resolve"]

FUNCTION = "__strictflow_function__"
"""The attribute of a task object that holds the function it wraps."""
BY_VALUE = "__strictflow_by_value__"
"""The method of a task object that says how it pickles when it must travel by value."""

_MAINS = ("__main__", "__mp_main__")


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
    if not module or not qualname or module in _MAINS or "<" in qualname or not _is_importable(module):
        return None
    reference = f"{module}:{qualname}"
    try:
        found = resolve(reference)
    except (ImportError, AttributeError):
        return None
    return reference if found is target or function_of(found) is function else None


@functools.cache
def _is_importable(name: str) -> bool:
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


@contextmanager
def _by_value(module: ModuleType | None) -> Iterator[None]:
    """Let cloudpickle pickle the functions and classes of a module by value."""
    if module is None or module.__name__ == "__main__" or module.__name__ not in sys.modules:
        yield
        return
    registered = module.__name__ in cloudpickle.list_registry_pickle_by_value()
    if not registered:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        if not registered:
            cloudpickle.unregister_pickle_by_value(module)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle that knows task objects: by reference if importable, else their function by value."""

    def reducer_override(self, obj: Any) -> Any:
        by_value = getattr(type(obj), BY_VALUE, None)
        if by_value is not None:
            function = function_of(obj)
            if reference_to(obj, function) is None:
                return by_value(obj)
        return super().reducer_override(obj)


def dumps(obj: Any) -> bytes:
    """cloudpickle *obj*, functions of modules that a fresh interpreter cannot import by value."""
    function = function_of(obj)
    name = getattr(function, "__module__", None) or ""
    module = sys.modules.get("__mp_main__") if "__mp_main__" in sys.modules else None
    if name and name not in _MAINS and not _is_importable(name):
        module = sys.modules.get(name)
    with _by_value(module), io.BytesIO() as file:
        _Pickler(file).dump(obj)
        return file.getvalue()


def encode(target: Any) -> tuple[bool, bytes]:
    """(by value?, code) for the function of a task, or for a plain callable.

    Raises:
        TypeError, pickle.PicklingError: it holds something that cannot travel.
    """
    function = function_of(target)
    reference = reference_to(target, function)
    if reference is not None:
        return False, reference.encode()
    return True, dumps(function)


def decode(by_value: bool, code: bytes) -> tuple[Any, Callable[..., Any]]:
    """The object that was found or rebuilt, and the function in it."""
    target = cloudpickle.loads(code) if by_value else resolve(code.decode())
    return target, function_of(target)
