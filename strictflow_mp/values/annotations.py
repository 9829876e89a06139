"""Keys that carry the type of their value, for those who want it checked. When the program runs they are plain keys.

So nothing else knows of them but annotations: what is cached, packed and sent is the str, bytes, int or tuple itself.
The idea is that of `typing.NewType`: a type for the checker, and the identity when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    from abc import abstractmethod
    from typing import TypeAlias

    PlainKey: TypeAlias = str | bytes | int | tuple[Any, ...]

__all__ = ["Key", "TypedMapping", "TypedState"]

V = TypeVar("V")
D = TypeVar("D")


class Key(Generic[V]):
    """A key of the state (a str, bytes, an int, or a tuple of these) whose value is a *V*, for type checkers only.

    With ``PRICE: Key[float] = Key("price")``, ``flow.state[PRICE]`` is a float to them, and ``flow.put(PRICE, "much")``
    an error; also in `get`, `peek`, snapshots, and in the first parameter and the result of a task with ``key=PRICE``.
    When the program runs, ``Key("price")`` is the str ``"price"`` itself: it costs nothing, nothing is checked, and
    `isinstance` does not know it.

    That the key is there is not part of the type. If it may be absent, give the first parameter of such a task the
    type ``V | None``.
    """

    def __new__(cls, key: PlainKey) -> Key[V]:
        return key  # type: ignore[return-value]


class TypedMapping(Mapping[Any, Any]):
    """A mapping from keys of the state, typed or not."""

    if TYPE_CHECKING:

        @overload
        @abstractmethod
        def __getitem__(self, key: Key[V], /) -> V: ...
        @overload
        @abstractmethod
        def __getitem__(self, key: PlainKey, /) -> Any: ...

        @overload
        def get(self, key: Key[V], /) -> V | None: ...
        @overload
        def get(self, key: PlainKey, /) -> Any | None: ...
        @overload
        def get(self, key: Key[V], /, default: V) -> V: ...
        @overload
        def get(self, key: Key[V], /, default: D) -> V | D: ...
        @overload
        def get(self, key: PlainKey, /, default: D) -> Any | D: ...
        def get(self, key: Any, /, default: Any = None) -> Any: ...


class TypedState(TypedMapping, MutableMapping[Any, Any]):
    """``flow.state``, wherever one is."""

    if TYPE_CHECKING:

        @overload
        @abstractmethod
        def __setitem__(self, key: Key[V], value: V, /) -> None: ...
        @overload
        @abstractmethod
        def __setitem__(self, key: PlainKey, value: Any, /) -> None: ...

        @abstractmethod
        def __delitem__(self, key: Key[Any] | PlainKey, /) -> None: ...
