"""By value: pickling functions and classes that a fresh interpreter could not import (cloudpickle)."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import cloudpickle

from .references import MAINS, function_of, is_importable, reference_to

__all__ = ["dumps"]

BY_VALUE = "__strictflow_by_value__"
"""The method of a task object that says how it pickles when it must travel by value."""


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
    if name and name not in MAINS and not is_importable(name):
        module = sys.modules.get(name)
    with _by_value(module), io.BytesIO() as file:
        _Pickler(file).dump(obj)
        return file.getvalue()
