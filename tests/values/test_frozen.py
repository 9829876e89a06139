"""Read-only values: nothing changes them, and everything else works as with the plain types."""

from __future__ import annotations

import copy
import json
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import strictflow_mp
from strictflow_mp.errors import ReadOnlyState
from strictflow_mp.values.frozen import FrozenDict, FrozenList, FrozenSet, thaw

CHANGES: dict[type, dict[str, tuple[Any, ...]]] = {
    FrozenDict: {
        "__delitem__": ("a",),
        "__ior__": ({"b": 2},),
        "__setitem__": ("b", 2),
        "clear": (),
        "pop": ("a",),
        "popitem": (),
        "setdefault": ("b", 2),
        "update": ({"b": 2},),
    },
    FrozenList: {
        "__delitem__": (0,),
        "__iadd__": ([3],),
        "__imul__": (2,),
        "__setitem__": (0, 9),
        "append": (3,),
        "clear": (),
        "extend": ([3],),
        "insert": (0, 9),
        "pop": (),
        "remove": (1,),
        "reverse": (),
        "sort": (),
    },
    FrozenSet: {
        "__iand__": ({1},),
        "__ior__": ({3},),
        "__isub__": ({1},),
        "__ixor__": ({1},),
        "add": (3,),
        "clear": (),
        "difference_update": ({1},),
        "discard": (1,),
        "intersection_update": ({1},),
        "pop": (),
        "remove": (1,),
        "symmetric_difference_update": ({1},),
        "update": ({3},),
    },
}
"""Every method of dict, list and set that changes it, with arguments with which it does."""

PLAIN: dict[type, type] = {FrozenDict: dict, FrozenList: list, FrozenSet: set}
CONTENTS: dict[type, Any] = {FrozenDict: {"a": 1}, FrozenList: [2, 1], FrozenSet: {1, 2}}
EACH = pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)


@pytest.mark.parametrize(
    ("kind", "method", "arguments"),
    [(kind, *change) for kind, changes in CHANGES.items() for change in changes.items()],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else ""),
)
def test_every_change_is_refused(kind: type, method: str, arguments: tuple[Any, ...]) -> None:
    plain = PLAIN[kind](CONTENTS[kind])
    getattr(plain, method)(*arguments)  # the plain type takes it, so it is the read-only one that refuses

    frozen = kind(CONTENTS[kind])
    with pytest.raises(ReadOnlyState, match=rf"this {PLAIN[kind].__name__} is read-only") as caught:
        getattr(frozen, method)(*arguments)
    assert frozen == CONTENTS[kind]
    assert "@write" in str(caught.value)
    assert ".copy()" in str(caught.value)


@EACH
def test_no_change_was_forgotten(kind: type) -> None:
    """A method that a newer Python adds shows up here: it is refused, or it is known to change nothing."""
    harmless = {
        *dir(object),
        *{"__class_getitem__", "__contains__", "__iter__", "__len__", "__getitem__", "__reversed__"},
        *{"__add__", "__mul__", "__rmul__", "__or__", "__ror__", "__and__", "__rand__", "__sub__"},
        *{"__rsub__", "__xor__", "__rxor__", "copy", "count", "difference", "fromkeys", "get", "index"},
        *{"intersection", "isdisjoint", "issubset", "issuperset", "items", "keys", "union", "values"},
        "symmetric_difference",
    }
    assert set(dir(PLAIN[kind])) - harmless == set(CHANGES[kind])


@pytest.mark.parametrize(
    ("frozen", "change"),
    [
        (FrozenDict(a=1), lambda value: operator.ior(value, {"b": 2})),
        (FrozenList([1]), lambda value: operator.iadd(value, [2])),
        (FrozenList([1]), lambda value: operator.imul(value, 2)),
        (FrozenList([1]), lambda value: operator.setitem(value, slice(None), [])),
        (FrozenList([1]), lambda value: value.sort(key=str, reverse=True)),
        (FrozenSet({1}), lambda value: operator.ior(value, {2})),
        (FrozenDict(a=1), lambda value: value.update(b=2)),
        (FrozenDict(a=1), lambda value: value.pop("a", None)),
    ],
)
def test_statements_are_refused(frozen: Any, change: Callable[[Any], Any]) -> None:
    with pytest.raises(ReadOnlyState):
        change(frozen)


def test_a_refused_change_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        FrozenDict()["a"] = 1


@EACH
def test_no_attributes_and_no_hash(kind: type) -> None:
    with pytest.raises(AttributeError):
        kind().note = 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(kind())


@EACH
def test_it_is_the_plain_type_to_everybody(kind: type) -> None:
    plain = CONTENTS[kind]
    frozen = kind(plain)
    assert isinstance(frozen, PLAIN[kind])
    assert frozen == plain
    assert repr(frozen) == repr(plain)
    assert repr(kind()) == repr(PLAIN[kind]())
    if kind is not FrozenSet:
        assert json.dumps(frozen) == json.dumps(plain)


@pytest.mark.parametrize(
    "derived",
    [
        FrozenDict(a=1) | {"b": 2},
        {"b": 2} | FrozenDict(a=1),
        FrozenList([1, 2])[:1],
        FrozenList([1]) + [2],  # noqa: RUF005 (what is tested)
        FrozenList([1]) * 2,
        FrozenSet({1}) | {2},
        FrozenSet({1, 2}) - {2},
        FrozenSet({1}).union({2}),
    ],
)
def test_what_is_made_of_one_is_plain(derived: Any) -> None:
    assert type(derived) in {dict, list, set}


def nested() -> Any:
    return FrozenDict(
        {
            "list": FrozenList([1, FrozenDict({"deep": FrozenList([2])})]),
            "set": FrozenSet({1, "x"}),
            "tuple": (FrozenList([3]), FrozenSet(), 4),
            "frozenset": frozenset({5, (6, 7)}),
            "plain": {"a": [8]},
        }
    )


def types_in(value: Any) -> set[type]:
    found = {type(value)}
    children = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        for child in children:
            found |= types_in(child)
    return found


@pytest.mark.parametrize(
    "copied",
    [lambda value: value.copy(), copy.copy, copy.deepcopy, thaw],
    ids=["copy()", "copy", "deepcopy", "thaw"],
)
def test_a_copy_is_plain_deep_and_private(copied: Callable[[Any], Any]) -> None:
    frozen = nested()
    plain = copied(frozen)
    assert plain == frozen
    assert types_in(plain) == {dict, list, set, tuple, frozenset, int, str}
    plain["list"][1]["deep"].append("new")
    plain["tuple"][0].append("new")
    plain["plain"]["a"].append("new")
    plain["set"].add("new")
    assert frozen == nested()


@EACH
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_each_kind_is_copied_to_the_plain_one(kind: type, copied: Callable[[Any], Any]) -> None:
    for plain in (kind(CONTENTS[kind]).copy(), copied(kind(CONTENTS[kind]))):
        assert type(plain) is PLAIN[kind]
        assert plain == CONTENTS[kind]


def test_a_copy_within_a_deep_copy_is_made_once() -> None:
    shared = FrozenList([1])
    first, second = copy.deepcopy([shared, shared])
    assert type(first) is list
    assert first is second


def test_subclasses_are_copied_too() -> None:
    class Mine(FrozenDict[str, Any]):
        pass

    assert type(thaw(Mine(a=1))) is dict
    assert type(FrozenList([Mine(a=1)]).copy()[0]) is dict


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_read_only_again(protocol: int) -> None:
    frozen = nested()
    back = pickle.loads(pickle.dumps(frozen, protocol))
    assert back == frozen
    assert types_in(back) == types_in(frozen)
    assert {FrozenDict, FrozenList, FrozenSet} <= types_in(back)


def test_a_copy_has_its_own_arrays() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3))
    array.flags.writeable = False
    plain = FrozenDict(a=FrozenList([array]), t=(array,)).copy()
    for copied in (plain["a"][0], plain["t"][0]):
        assert copied.flags.writeable
        assert copied.flags.f_contiguous
        copied[0, 0] = 9
    assert array[0, 0] == 0


@EACH
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_names_the_package_and_no_module_in_it(kind, protocol):
    value = kind(CONTENTS[kind])
    data = pickle.dumps(value, protocol)
    assert b"strictflow_mp" in data
    assert b"strictflow_mp." not in data
    back = pickle.loads(data)
    assert (type(back), back) == (kind, value)
    assert getattr(strictflow_mp, kind.__name__) is kind
