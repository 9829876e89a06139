"""By value: pickling functions and classes that a fresh interpreter could not import (cloudpickle)."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cloudpickle

from .references import MAINS, function_of, is_importable, reference_to

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

__all__ = ["dumps"]

BY_VALUE_METHOD = "__strictflow_by_value__"
"""The method of a task object that says how it pickles when it must travel by value."""


@contextmanager
def _by_value(names: Iterable[str]) -> Iterator[None]:
    """Let cloudpickle pickle the functions and classes of these modules by value."""
    # The registry is the whole process's, and the user may have registered a module: then it stays.
    registered = cloudpickle.list_registry_pickle_by_value()
    modules = [sys.modules[name] for name in names if name in sys.modules and name not in registered]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle that knows task objects: by reference if importable, else their function by value."""

    names: Collection[str] = ()
    """Modules of which all is to travel by value."""

    def reducer_override(self, obj: Any) -> Any:
        by_value = getattr(type(obj), BY_VALUE_METHOD, None)
        if by_value is not None:
            function = function_of(obj)
            if getattr(function, "__module__", None) in self.names or reference_to(obj, function) is None:
                return by_value(obj)
        return super().reducer_override(obj)


def dumps(obj: Any, others: Collection[str] = ()) -> bytes:
    """cloudpickle *obj*, functions of modules that a fresh interpreter cannot import by value.

    Args:
        others: modules of which the other end has others under these names.
    """
    function = function_of(obj)
    name = getattr(function, "__module__", None) or ""
    # In a spawned child what the main program defines says that it is of `__mp_main__`, which cloudpickle takes for
    # a module that can be imported.
    names = {"__mp_main__", *others}
    if name and name not in MAINS and not is_importable(name):
        names.add(name)
    with _by_value(names), io.BytesIO() as file:
        pickler = _Pickler(file)
        pickler.names = others
        pickler.dump(obj)
        return file.getvalue()
