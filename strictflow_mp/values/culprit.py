"""What cannot be stored: where it is in a value, why, and what to do instead.

Nothing here runs before packing has failed, except `too_deep`, which keeps it from failing badly.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Final

from ..errors import SerializationError
from .frozen import FrozenDict, FrozenList, FrozenSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MAX_DEPTH", "MAX_NESTED", "TOO_DEEP", "advice", "find", "name_of", "too_deep"]

MAX_DEPTH: Final = 1024
"""How deep containers may nest: what msgpack allows."""

MAX_NESTED: Final = 64
"""How deep tuples and sets may nest: each is unpacked by a decoder of its own, on 40 KB of C stack."""

TOO_DEEP = (
    f"it nests too deeply, at most {MAX_DEPTH} containers or {MAX_NESTED} tuples and sets in each other: "
    "store it flat, for example as a list in which items refer to each other by index"
)

PART_OF_ITSELF = "it is part of itself: store it flat, for example as a dict in which items refer to each other by key"

_CONTAINERS = frozenset({dict, FrozenDict, list, FrozenList, tuple, set, FrozenSet, frozenset})
_PLAIN = (dict, list, tuple, frozenset, set, str, bytes, int, float, complex)

_END: Final = object()


def find(value: Any, path: str, error: Exception, judge: Callable[[Any], object]) -> tuple[str, str]:
    """Path and fault of the first thing in *value* that cannot be packed, else *path* and *error*.

    It goes through *value* in the order in which it is packed, without recursion.

    Args:
        path: what *value* itself is called.
        error: what packing *value* raised.
        judge: packs what is not a container, and raises if it cannot.
    """
    inside: list[Any] = []
    left = [iter([(value, path)])]
    while left:
        item, here = next(left[-1], (_END, ""))
        if item is _END:
            left.pop()
            del inside[-1:]
        elif type(item) not in _CONTAINERS:
            try:
                judge(item)
            except Exception as fault:
                return _shortened(here), _reason(item, fault)
        elif any(item is container for container in inside):
            return _shortened(here), PART_OF_ITSELF
        elif len(inside) >= MAX_DEPTH:
            return _shortened(here), TOO_DEEP
        else:
            inside.append(item)
            left.append(_children(item, here))
    return path, _reason(value, error)


def _reason(item: Any, fault: Exception) -> str:
    if isinstance(fault, SerializationError):
        return str(fault)
    return f"a value of type {name_of(type(item))} cannot be stored: {fault}"


def _children(container: Any, path: str = "") -> Iterator[tuple[Any, str]]:
    """What is in *container*, each with its path."""
    if isinstance(container, dict):
        for key, value in list(container.items()):
            named = type(key) is str and key.isidentifier()
            here = f"{path}.{key}" if named else f"{path}[{reprlib.repr(key)}]"
            yield key, here
            yield value, here
    elif isinstance(container, (set, frozenset)):
        yield from ((member, f"{path}{{…}}") for member in list(container))
    else:
        yield from ((item, f"{path}[{index}]") for index, item in enumerate(list(container)))


def _shortened(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:120]}…{path[-60:]}"


def too_deep(value: Any) -> bool:
    """Whether *value* nests deeper than `MAX_DEPTH`; level by level, each object once in a level."""
    level = {id(value): value}
    for _ in range(MAX_DEPTH):
        level = {
            id(child): child
            for container in level.values()
            if type(container) in _CONTAINERS
            for child, _ in _children(container)
        }
        if not level:
            return False
    return True


def name_of(kind: type) -> str:
    """The name of a class as a person would import it."""
    module = getattr(kind, "__module__", "builtins")  # it may be missing where code is made at runtime
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def advice(value: Any) -> str:
    """Why a value of this type cannot be stored, and what can be instead."""
    kind = type(value)
    base = next((plain.__name__ for plain in _PLAIN if isinstance(value, plain)), None)
    if any(name_of(parent) == "numpy.ndarray" for parent in kind.__mro__):
        instead = "convert it with numpy.asarray()"
    elif base:
        instead = f"convert it with {base}(), because a subclass of {base} would come back as {base}"
    elif hasattr(kind, "__dataclass_fields__"):
        instead = "convert it with dataclasses.asdict()"
    elif hasattr(kind, "__fspath__"):
        instead = "convert it with str()"
    elif hasattr(kind, "__iter__"):
        instead = "convert it with list()"
    else:
        instead = "store what it consists of, as dict, list, str, numbers and the like"
    return f"a value of type {name_of(kind)} cannot be stored: {instead}"
