"""By value: pickling functions and classes that a fresh interpreter could not import (cloudpickle).

What a pickle does not bring along it names, and the other end imports that. Only the pickler comes past all of it: what
a partial binds, an object's attributes, a closure's cells, defaults, what a wrapper wraps. So it is the pickler that
says which modules are named (`pickled`), and `functions.encode` sees whether the other end has these as they are here.
"""

from __future__ import annotations

import functools
import io
import sys
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle

from .references import MAINS, function_of, is_importable, reference_to

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

__all__ = ["dumps", "pickled"]

BY_VALUE_METHOD = "__strictflow_by_value__"
"""The method of a task object that says how it pickles when it must travel by value."""
NAMED = (type, FunctionType, BuiltinFunctionType, functools._lru_cache_wrapper)
"""What a pickle may name; of other objects it may name the class."""
DISPATCHING = functools.singledispatch(abs).__code__  # type: ignore[attr-defined]
"""The code of all functions that `functools.singledispatch` makes, and of no others."""
MADE_ANEW = frozenset(
    {
        *functools.WRAPPER_ASSIGNMENTS,
        *vars(functools.lru_cache(abs)),
        *vars(functools.singledispatch(abs)),
    }
)
"""Attributes that `functools` gives to what it makes: they belong to that one object, and do not travel."""


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


def _module_of(obj: Any) -> str:
    """The name of the module that a pickle of *obj* may name, or ""."""
    # `type`, not `isinstance`: a proxy would be asked what it stands for.
    kind = type(obj)
    what = obj if issubclass(kind, NAMED) else kind
    name = obj.__name__ if issubclass(kind, ModuleType) else getattr(what, "__module__", None)
    return name if isinstance(name, str) else ""


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle that knows task objects: by reference if importable, else their function by value.

    And what `functools` makes around a function: a cache would travel by its name only, a registry not at all.
    """

    names: Collection[str] = ()
    """Modules of which all is to travel by value."""
    met: set[str]
    """Modules of whatever has been pickled so far, by value or not."""

    def reducer_override(self, obj: Any) -> Any:
        self.met.add(_module_of(obj))
        by_value = getattr(type(obj), BY_VALUE_METHOD, None)
        if by_value is not None:
            function = function_of(obj)
            self.met.add(_module_of(function))
            if self._must_travel(obj, function):
                return by_value(obj)
        elif (reduce := _reducer_of(obj)) is not None and self._must_travel(obj, obj):
            return reduce(obj)
        return super().reducer_override(obj)

    def _must_travel(self, obj: Any, function: Any) -> bool:
        return getattr(function, "__module__", None) in self.names or reference_to(obj, function) is None


# What `functools` makes

# Each is made anew of what it was made of, with the rest as its state: what is in there may lead back to it.


def _reducer_of(obj: Any) -> Callable[[Any], tuple[Any, ...]] | None:
    if type(obj) is FunctionType:
        return _reduce_dispatching if obj.__code__ is DISPATCHING else None
    return REDUCERS.get(type(obj))


def _reduce_cached(obj: Any) -> tuple[Any, ...]:
    how = obj.cache_parameters()
    return _cached, (obj.__wrapped__, how["maxsize"], how["typed"]), _added(obj) or None


def _cached(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    """With a cache of its own, and empty: what was kept at the other end stays there."""
    return functools.lru_cache(maxsize, typed)(function)


def _reduce_dispatching(obj: Any) -> tuple[Any, ...]:
    state = tuple(obj.registry.items()), _added(obj)
    return functools.singledispatch, (obj.__wrapped__,), state, None, None, _register


def _register(made: Any, state: tuple[Iterable[tuple[type, Callable[..., Any]]], dict[str, Any]]) -> None:
    functions, added = state
    for cls, function in functions:
        made.register(cls, function)
    vars(made).update(added)


def _added(obj: Any) -> dict[str, Any]:
    """Attributes that somebody has given to what `functools` has made."""
    return {name: value for name, value in vars(obj).items() if name not in MADE_ANEW}


def _reduce_dispatching_method(obj: Any) -> tuple[Any, ...]:
    return functools.singledispatchmethod, (obj.func,), {"dispatcher": obj.dispatcher}  # from 3.13 on without a cache


def _reduce_cached_property(obj: Any) -> tuple[Any, ...]:
    return functools.cached_property, (obj.func,), {"attrname": obj.attrname}  # until 3.11 without its lock


REDUCERS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    functools._lru_cache_wrapper: _reduce_cached,
    functools.singledispatchmethod: _reduce_dispatching_method,
    functools.cached_property: _reduce_cached_property,
}
"""By type; a function of `singledispatch` is one by its code."""


def dumps(obj: Any, others: Collection[str] = ()) -> bytes:
    """cloudpickle *obj*, functions of modules that a fresh interpreter cannot import by value.

    Args:
        others: modules of which the other end has others under these names.
    """
    return pickled(obj, others)[0]


def pickled(obj: Any, others: Collection[str] = ()) -> tuple[bytes, frozenset[str]]:
    """As `dumps`; and the modules that opening it may import, with those of what is in it."""
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
        pickler.met = set()
        pickler.dump(obj)
        return file.getvalue(), frozenset(pickler.met)
