"""Read-only dict, list and set: what a read of the state hands out.

They are real subclasses, so `json.dumps`, `isinstance` and `match` take them, and they are built straight
by msgpack's hooks: no `__init__`, no slots, nothing between the hook and the C constructor. That also
bounds what they promise: they catch mistakes, not malice (`dict.update(frozen, …)` and `heapq` still get through;
it would change this process's copy and never the state).
"""

from __future__ import annotations

import copy
from types import NoneType
from typing import Any, NoReturn, TypeVar

from ..errors import ReadOnlyState

__all__ = ["FrozenDict", "FrozenList", "FrozenSet", "thaw"]

PACKAGE = "strictflow_mp"
"""What pickles of these classes name: users keep them in files, and so they survive any move within the package."""

K = TypeVar("K")
V = TypeVar("V")


def _refuse(self: object, /, *args: object, **kwargs: object) -> NoReturn:
    """Stand in for every method that would change the value."""
    kind = next(base.__name__ for base in (dict, list, set) if isinstance(self, base))
    raise ReadOnlyState(
        f"this {kind} is read-only, because it was read from the state: change it inside a @write task, "
        "or take .copy() of it and change that"
    )


class FrozenDict(dict[K, V]):
    """A read-only `dict`; what is nested in it is read-only too. Its pickle is a `FrozenDict` again."""

    __module__ = PACKAGE
    __slots__ = ()

    __delitem__ = __ior__ = __setitem__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def copy(self) -> dict[K, V]:
        """A plain, mutable, deep copy. `copy.copy` and `copy.deepcopy` give the same."""
        return {key: thaw(value) for key, value in self.items()}

    def __copy__(self) -> dict[K, V]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[K, V]:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would create an empty one and then fill it item by item, which is refused.
        return type(self), (dict(self),)


class FrozenList(list[V]):
    """A read-only `list`; what is nested in it is read-only too. Its pickle is a `FrozenList` again."""

    __module__ = PACKAGE
    __slots__ = ()

    __delitem__ = __iadd__ = __imul__ = __setitem__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def copy(self) -> list[V]:
        """A plain, mutable, deep copy. `copy.copy` and `copy.deepcopy` give the same."""
        return [thaw(value) for value in self]

    def __copy__(self) -> list[V]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> list[V]:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)


class FrozenSet(set[V]):
    """A read-only `set` that, unlike `frozenset`, is a `set` to `isinstance`. Pickles as itself."""

    __module__ = PACKAGE
    __slots__ = ()

    __iand__ = __ior__ = __isub__ = __ixor__ = _refuse
    add = clear = discard = pop = remove = update = _refuse
    difference_update = intersection_update = symmetric_difference_update = _refuse

    def copy(self) -> set[V]:
        """A plain, mutable copy; its members cannot change anyway. `copy.copy` and `copy.deepcopy` give the same."""
        return set(self)

    def __copy__(self) -> set[V]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> set[V]:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (set(self),)

    def __repr__(self) -> str:
        # dict and list print subclasses as themselves, set does not.
        return repr(set(self))


_ATOMS = frozenset({NoneType, bool, bytes, complex, float, int, str})


def thaw(value: Any) -> Any:
    """A plain, mutable, deep copy of any value: nothing frozen in it, NumPy arrays private and writable.

    Unlike `copy.deepcopy` it keeps no memo: values that come out of the state are trees.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is dict or kind is FrozenDict:
        return {key: thaw(item) for key, item in value.items()}
    if kind is list or kind is FrozenList:
        return [thaw(item) for item in value]
    if kind is tuple:
        return tuple([thaw(item) for item in value])
    return copy.deepcopy(value)  # sets and subclasses of the above come back through `__deepcopy__`
