"""The codec: everything comes back as it was, or is refused with its path; damage is told, never believed."""

from __future__ import annotations

import collections
import dataclasses
import enum
import gc
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import types
import uuid
import weakref
import zoneinfo
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from strictflow_mp.errors import ProtocolError, ReadOnlyState, SerializationError
from strictflow_mp.tools.plain import describe
from strictflow_mp.values import codec as values
from strictflow_mp.values import types as extensions
from strictflow_mp.values.codec import has_arrays, pack, unpack, unpack_frozen
from strictflow_mp.values.frozen import FrozenDict, FrozenList, FrozenSet
from strictflow_mp.values.keys import pack_key, unpack_key


class Color(enum.Enum):
    RED = "red"
    CRIMSON = RED
    BLUE = ("b", 2)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 1 << 70


class Perm(enum.Flag):
    R = enum.auto()
    W = enum.auto()
    RW = R | W
    X = 1 << 80


class Outer:
    class Inner(enum.Enum):
        ONE = 1


class Open(enum.Enum):
    """Makes up members as they are asked for."""

    NONE = 0

    @classmethod
    def _missing_(cls, value: object) -> Open:
        member = object.__new__(cls)
        member._name_ = f"made_{value}"
        member._value_ = value
        return member


MEMBERS = [
    Color.RED,
    Color.BLUE,
    Level.LOW,
    Level.HIGH,
    Perm.R,
    Perm.RW,
    Perm.R | Perm.X,
    Perm(0),
    Outer.Inner.ONE,
]


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Table(dict[Any, Any]):
    pass


class Zone(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta(hours=1)

    def dst(self, _: datetime | None) -> timedelta:
        return timedelta(0)


Point = collections.namedtuple("Point", "x y")


class Probe:
    """Lets a test run code amid packing: it registers an encoder."""


@dataclasses.dataclass
class Record:
    a: int = 1


# Values

zones = st.one_of(
    st.none(),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]).map(zoneinfo.ZoneInfo),
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone),
    st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)), st.text()),
)
texts = st.text(st.characters(exclude_categories=()))  # surrogates included
hashable_atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 200), 1 << 200),
    st.floats(),
    st.complex_numbers(),
    texts,
    st.binary(),
    st.datetimes(timezones=zones),
    st.builds(lambda when: when.replace(fold=1), st.datetimes(timezones=zones)),
    st.dates(),
    st.times(timezones=zones),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.sampled_from(MEMBERS),
)
atoms = hashable_atoms | st.decimals()
hashables = st.recursive(
    hashable_atoms,
    lambda inner: st.one_of(st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)),
    max_leaves=5,
)
anything = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(texts | hashables, inner, max_size=5),
        st.sets(hashables, max_size=5),
        st.frozensets(hashables, max_size=5),
    ),
    max_leaves=20,
)


def form(value: Any) -> Any:
    """*value* with the types of all that is in it: two are the same to a user if their forms are equal."""
    kind = type(value)
    if isinstance(value, dict):
        return kind, [(form(key), form(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [form(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted((form(item) for item in value), key=repr)
    if kind is float:
        return kind, struct.pack("<d", value)
    if kind is complex:
        return kind, struct.pack("<dd", value.real, value.imag)
    if kind is Decimal:
        return kind, value.as_tuple()
    if kind in {datetime, time}:
        zone = value.tzinfo
        return kind, value.replace(tzinfo=None), value.fold, type(zone), repr(zone)
    return kind, value


FROZEN: dict[type, type] = {dict: FrozenDict, list: FrozenList, set: FrozenSet}


def freeze(value: Any) -> Any:
    """What `unpack_frozen` has to give for *value*."""
    if type(value) is dict:
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if type(value) is tuple:
        return tuple(freeze(item) for item in value)
    if type(value) is list:
        return FrozenList(map(freeze, value))
    return FrozenSet(value) if type(value) is set else value


@given(anything)
@example({"a": [Decimal("sNaN123"), Decimal("-0"), Decimal("1E+99999")]})
@example([float("nan"), -0.0, 1 << 64, -(1 << 63) - 1, "\ud800", "\ud83d\ude00"])
@example({1: {2.5: {None: {(): {b"": []}}}}})
def test_what_goes_in_comes_out(value: Any) -> None:
    packed = pack(value)
    assert form(unpack(packed)) == form(value)
    frozen = unpack_frozen(packed)
    assert form(frozen) == form(freeze(value))
    # This is how a change in place is found, and how what was read can be stored again.
    assert pack(unpack(packed)) == packed
    assert pack(frozen) == packed


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [0, -1, 127, 128, 1 << 63, (1 << 64) - 1, -(1 << 63), 1 << 64, -(1 << 64)],
        *MEMBERS,
        datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        datetime.max.replace(tzinfo=timezone.utc),
        time(1, 2, 3, 4, tzinfo=timezone(timedelta(seconds=1, microseconds=1), "odd")),
        timedelta.min,
        timedelta.max,
        date.min,
        uuid.UUID(int=5),
        {frozenset({(1, "a")}): {Level.LOW: Perm.RW}},
        [{}, [], (), set(), frozenset(), "", b""],
        {str(number) for number in range(20)},
        list(range(70000)),
    ],
    ids=lambda value: f"{type(value).__name__} of {len(value)}" if isinstance(value, set) else repr(value)[:40],
)
def test_examples(value: Any) -> None:
    back = unpack(pack(value))
    assert form(back) == form(value)
    assert form(unpack_frozen(pack(value))) == form(freeze(value))


def test_singletons_stay_singletons() -> None:
    assert unpack(pack(Color.CRIMSON)) is Color.RED
    assert unpack(pack(datetime(2020, 1, 1, tzinfo=timezone.utc))).tzinfo is timezone.utc
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    assert unpack(pack(time(tzinfo=berlin))).tzinfo is berlin


def test_what_msgpack_knows_is_msgpack() -> None:
    value = {"version": 1, "status": ["stable", None, True, 2.5, b"x"]}
    assert pack(value) == msgpack.packb(value)


def test_bytes_like_values_come_back_as_bytes() -> None:
    assert form(unpack(pack([bytearray(b"a"), memoryview(b"b")]))) == form([b"a", b"b"])


def test_extensions_of_the_user_are_not_taken_for_ours() -> None:
    value = [msgpack.ExtType(code, b"\x93\x01\x02\x03") for code in range(128)]
    assert unpack(pack(value)) == value
    stamp = msgpack.Timestamp(1, 2)
    assert unpack(pack(stamp)) == stamp


def test_a_value_that_was_read_can_be_stored_again() -> None:
    packed = pack({"a": [1, {2}, ({3: [4]},)]})
    assert form(unpack(pack({"new": unpack_frozen(packed)}))) == form({"new": unpack(packed)})


def test_what_is_unpacked_is_private_or_read_only() -> None:
    packed = pack({"a": [1]})
    mine = unpack(packed)
    mine["a"].append(2)
    assert unpack(packed) == {"a": [1]}
    with pytest.raises(ReadOnlyState):
        unpack_frozen(packed)["a"].append(2)


def test_equal_sets_pack_equally() -> None:
    names = [f"name{number}" for number in range(50)]
    forth, back = set(), set()
    for name in names:
        forth.add(name)
    for name in reversed(names):
        back.add(name)
    back |= {f"other{number}" for number in range(1000)}
    back -= {f"other{number}" for number in range(1000)}
    assert list(forth) != list(back)
    assert pack(forth) == pack(back)
    assert pack(frozenset(forth)) == pack(frozenset(back))
    assert pack(forth) != pack(frozenset(forth))


def test_the_order_of_a_dict_is_kept() -> None:
    assert list(unpack(pack({"b": 1, "a": 2}))) == ["b", "a"]


def extension(code: int, payload: bytes) -> bytes:
    return b"\xc7" + bytes([len(payload), code & 0xFF]) + payload


# Enum members


def test_the_main_module_of_a_spawned_child_is_the_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("__mp_main__")
    exec("import enum\nclass Mode(enum.Enum):\n    ON = 1", module.__dict__)
    packed = pack(module.Mode.ON)  # type: ignore[attr-defined]
    assert b"__main__" in packed
    monkeypatch.setitem(sys.modules, "__main__", module)
    assert unpack(packed) is module.Mode.ON  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("__main__", "Gone.RED", r"__main__\.Gone\.RED is not found .* not in the main program"),
        ("no_such_module", "Color.RED", r"no_such_module\.Color\.RED is not found .* same version"),
        (__name__, "Color.GREEN", r"Color\.GREEN is not found"),
        (__name__, "Record.a", r"Record\.a is not found"),
        (__name__, "Color.5", r"Color\.5 is not found"),
        ("builtins", "int.5", r"int is not an Enum"),
    ],
)
def test_a_member_that_is_not_found_is_named(module: str, name: str, message: str) -> None:
    qualname, member = name.split(".")
    packed = extension(-9, pack([module, qualname, int(member) if member.isdigit() else member]))
    for read in (unpack, unpack_frozen):
        with pytest.raises(SerializationError, match=message):
            read(packed)


def test_a_class_in_a_function_is_refused() -> None:
    class Local(enum.Enum):
        A = 1

    with pytest.raises(SerializationError, match="defined in a function: define it in a module"):
        pack([Local.A])


def test_a_member_that_its_class_does_not_list_is_refused() -> None:
    with pytest.raises(SerializationError, match="does not list it: store its value"):
        pack(Open(5))


def test_a_time_zone_that_is_not_found_is_named() -> None:
    packed = pack(datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")))
    with pytest.raises(SerializationError, match=r"'Europe/Borlin' is not found .* tzdata"):
        unpack(packed.replace(b"Berlin", b"Borlin"))


# What cannot be stored


SHARED = [1, (2,)]
CYCLE: dict[str, Any] = {}
CYCLE["me"] = [CYCLE]
TUPLE_CYCLE: Any = ([],)
TUPLE_CYCLE[0].append(TUPLE_CYCLE)


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        (object(), "config", "type object cannot be stored: store what it consists of"),
        ({"handlers": [1, 2, 3, pathlib.Path()]}, "config.handlers[3]", r"Path cannot .* with str\(\)"),
        ({"no name": {5: {b"x": object()}}}, "config['no name'][5][b'x']", "object"),
        ({"": object()}, "config['']", "object"),
        ([(1, [2, Table()])], "config[0][1][1]", r"Table cannot be stored: convert it with dict\(\)"),
        ({"tags": {("a", Text("b"))}}, "config.tags{…}[1]", r"Text .* with str\(\)"),
        ([frozenset({Number(1)})], "config[0]{…}", r"Number .* with int\(\)"),
        (FrozenDict(a=FrozenList([object()])), "config.a[0]", "object"),
        ({(1, Text("b")): 1}, "config[(1, 'b')][1]", "Text"),
        ({Color: 1}, "config[<enum 'Color'>]", "EnumType|EnumMeta"),
        (collections.OrderedDict(), "config", r"OrderedDict .* with dict\(\)"),
        ({"p": Point(1, 2)}, "config.p", r"Point .* with tuple\(\)"),
        ([Record()], "config[0]", r"Record .* with dataclasses\.asdict\(\)"),
        ({"r": range(3)}, "config.r", r"range .* with list\(\)"),
        ([lambda: 1], "config[0]", "function"),
        ([memoryview(b"abcd")[::2]], "config[0]", "memoryview cannot be stored: .*contiguous"),
        ([datetime(2020, 1, 1, tzinfo=Zone())], "config[0]", r"Zone cannot .* zoneinfo\.ZoneInfo"),
        (["\ud800", {"x": object()}], "config[1].x", "object"),
        ([SHARED, {"x": SHARED}, object()], "config[2]", "object"),
        (CYCLE, "config.me[0]", "part of itself"),
        (TUPLE_CYCLE, "config[0][0]", "part of itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_named_with_its_path(value: Any, path: str, message: str) -> None:
    with pytest.raises(SerializationError, match=message) as caught:
        pack(value, "config")
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    assert isinstance(caught.value, TypeError)


def test_a_zone_without_a_key_is_refused() -> None:
    with open(zoneinfo.TZPATH[0] + "/Europe/Berlin", "rb") as file:
        nameless = zoneinfo.ZoneInfo.from_file(file)
    with pytest.raises(SerializationError, match="has a key"):
        pack(time(tzinfo=nameless))


def test_a_lack_of_memory_is_no_fault_of_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setitem(extensions._ENCODERS, Probe, fail)
    with pytest.raises(MemoryError):
        pack([Probe()])


def test_after_a_refusal_packing_goes_on() -> None:
    """Nothing of a value that was refused half-way gets into the next one."""
    good = {"a": (1, {2}), "b": [1, 2, 3]}
    packed = pack(good)
    for bad in ([1, (2, object())], {"a": {1, "\ud800", b"x"}, "b": (object(),)}):
        with pytest.raises(SerializationError):
            pack(bad)
        assert pack(good) == packed


def nest(depth: int, *wraps: Any, core: str = "core") -> Any:
    value: Any = core
    for level in range(depth):
        value = wraps[level % len(wraps)](value)
    return value


def as_list(value: Any) -> Any:
    return [value]


def as_tuple(value: Any) -> Any:
    return (value,)


def as_dict(value: Any) -> Any:
    return {"k": value}


@pytest.mark.parametrize(
    ("depth", "wraps"),
    [
        (400, [as_list]),
        (400, [as_dict]),
        (64, [as_tuple]),
        (128, [as_tuple, as_list]),
        (64, [frozenset, as_tuple]),
    ],
)
def test_deep_values_come_back(depth: int, wraps: list[Any]) -> None:
    if wraps[0] is frozenset:
        wraps = [lambda value: frozenset({value}), as_tuple]
    value = nest(depth, *wraps)
    assert unpack(pack(value)) == value
    assert unpack_frozen(pack(value)) == value


@pytest.mark.parametrize(
    ("depth", "wraps"),
    [
        (5000, [as_list]),
        (5000, [as_dict]),
        (65, [as_tuple]),
        (5000, [as_tuple]),
        (60_000, [*[as_list] * 999, as_tuple]),
    ],
)
def test_values_too_deep_are_refused(depth: int, wraps: list[Any]) -> None:
    # With a stack of 4 MB, half of the usual one: running out of it would kill the process.
    value = nest(depth, *wraps)
    errors = []

    def run() -> None:
        with pytest.raises(SerializationError, match="too deeply") as caught:
            pack(value)
        errors.append(caught.value)

    in_thread(run)
    assert len(errors[0].path) < 200
    while len(value) and type(value) is not str:  # else its deallocation may take the stack of the next test
        value = value["k"] if type(value) is dict else value[0]


def in_thread(run: Any) -> None:
    former = threading.stack_size(4 << 20)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
    finally:
        threading.stack_size(former)


@pytest.mark.parametrize("code", [-2, -3, -4, -9, -15])
@pytest.mark.parametrize("read", [unpack, unpack_frozen])
def test_data_too_deep_is_damaged(code: int, read: Any) -> None:
    data = b"\x90"
    for _ in range(300):
        data = b"\x91\xc9" + len(data).to_bytes(4, "big") + bytes([code & 0xFF]) + data

    def run() -> None:
        with pytest.raises(ProtocolError):
            read(data)

    in_thread(run)


def test_a_value_that_is_shared_often_is_found_in_no_time() -> None:
    """Levels of the same list twice: 2 ** 40 paths lead to the bottom."""
    value: Any = []
    for _ in range(40):
        value = [value, value]
    for _ in range(6):
        value = (value,)
    assert not values.culprit.too_deep(value)
    value[0][0][0][0][0][0].insert(0, object())
    with pytest.raises(SerializationError) as caught:
        pack(value)
    assert caught.value.path == "value[0][0][0][0][0][0][0]"


# Damage


@given(st.binary())
@example(b"")
@example(b"\xc1")
@example(b"\xc1" * 30)
@example(b"\x01\x02")  # more than one value
@example(b"\xdd\xff\xff\xff\xff")  # a list of 4 G items
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xdd\x7f\xff\xff\xff" * 1000)
@example(b"\x81\x90\x01")  # a list as a key
@example(b"\xc7\x00\x80")  # extension -128
@example(b"\xd4\xfe\x01")  # a tuple that is an int
@example(b"\xd4\xfd\x91")  # a set cut off
@example(b"\xc7\x03\xfd\x91\x91\x01")  # a set of a list
@example(b"\xd4\xff\x00")  # a timestamp of one byte
@example(b"\xc1\0\0\0\x02\0\0\0\xd4\xf2\x90")  # an array without fields
def test_damage_is_told(data: bytes) -> None:
    for read in (unpack, unpack_frozen, unpack_key):
        try:
            read(data)
        except ProtocolError:
            pass
        except SerializationError:  # by chance an Enum member, or a time zone
            assert read is not unpack_key
    assert isinstance(describe(data), str)


@given(anything, st.data())
def test_a_damaged_value_is_told(value: Any, data: st.DataObject) -> None:
    packed = bytearray(pack(value))
    where = data.draw(st.integers(0, len(packed) - 1))
    packed[where] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(1, len(packed)))
    for damaged in (bytes(packed), bytes(packed[:end])):
        for read in (unpack, unpack_frozen):
            try:
                read(damaged)
            except (ProtocolError, SerializationError):
                pass


def test_damage_takes_no_memory() -> None:
    """A thousand lists in each other, each of which says that it has as many items as there are bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProtocolError):
        unpack(b"\xdd\x00\x0f\x00\x00" * 200_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; they say 8 GB


@pytest.mark.parametrize(
    ("code", "payload"),
    [
        *[(code, pack(5)) for code in (-2, -3, -4, -6, -9, -10, -11, -12, -13, -15)],
        *[(code, pack({})) for code in (-2, -3, -4, -6, -9, -10, -11, -12, -13, -15)],
        *[(code, pack([None] * size)) for code in (-9, -10, -11, -12, -15) for size in range(10)],
        (-3, pack([[]])),
        (-6, pack(["x"])),
        (-7, b"1.x"),
        (-7, b"\xff"),
        (-8, bytes(15)),
        (-9, pack(["enum", "Enum", None])),
        (-9, pack([b"enum", "Enum", "A"])),
        (-10, pack([2020, 13, 1, 0, 0, 0, 0, 0])),
        (-10, pack([2020, 1, 1, 0, 0, 0, 0, 2])),
        (-10, pack([2020, 1, 1, 0, 0, 0, 0, 0, b"UTC"])),
        (-10, pack([2020, 1, 1, 0, 0, 0, 0, 0, "UTC", "UTC"])),
        (-10, pack([2020, 1, 1, 0, 0, 0, 0, 0, 1 << 60])),
        (-12, pack([1, 2, 3, 4, 0, 0, 5])),
        (-13, pack([1 << 40, 0, 0])),
        (-15, pack(["<f8", bytes(7)])),
        (-15, pack(["<f8", "text"])),
        (-15, pack(["U", b"a"])),
        (-15, pack(["S99999999999", b"a"])),
        (-16, b""),
        (-128, b""),
    ],
)
def test_damaged_extensions_are_told(code: int, payload: bytes) -> None:
    for read in (unpack, unpack_frozen):
        with pytest.raises(ProtocolError):
            read(extension(code, payload))


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_part_of_a_value_is_damaged(cut: int) -> None:
    with pytest.raises(ProtocolError, match="damaged, or foreign"):
        unpack(pack({"a": ["some", "words"]})[:cut])


# Keys

keys = st.recursive(
    texts | st.binary() | st.booleans() | st.integers() | st.integers(-(1 << 100), 1 << 100),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(keys, keys)
@example("", "\ud800")
@example(True, 1)
@example((True, ("a",)), (1, ("a",)))
@example("a" * 31, "a" * 32)
def test_keys_come_back_and_equal_keys_pack_equally(key: Any, other: Any) -> None:
    packed = pack_key(key)
    back = unpack_key(packed)
    assert back == key
    assert hash(back) == hash(key)
    assert pack_key(back) == packed
    assert (packed == pack_key(other)) is (key == other)


@given(st.text())
def test_a_key_is_packed_as_a_value_is(key: str) -> None:
    assert pack_key(key) == pack(key)


def test_a_bool_as_a_key_is_an_int() -> None:
    assert type(unpack_key(pack_key(True))) is int
    assert [type(part) for part in unpack_key(pack_key((False, "a")))] == [int, str]


@pytest.mark.parametrize(
    "key",
    [
        None,
        1.5,
        ("a", 1.5),
        ["a"],
        {"a"},
        bytearray(b"a"),
        nest(2000, as_tuple),
    ],
    ids=lambda key: type(key).__name__,
)
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(SerializationError, match="a str, bytes, an int, or a tuple of these") as caught:
        pack_key(key)
    assert caught.value.key is key


@pytest.mark.parametrize(("key", "plain"), [(1.0, 1), (("a", 1.0), ("a", 1)), (Text("a"), "a"), (Number(1), 1)])
def test_what_equals_a_key_is_that_key(key: Any, plain: Any) -> None:
    assert pack_key(key) == pack_key(plain)


@pytest.mark.parametrize("value", [None, 1.5, 1.0, ["a"], ("a", None), {"a": 1}, Color.RED])
def test_what_is_no_key_is_damaged(value: Any) -> None:
    with pytest.raises(ProtocolError, match="no key is of type"):
        unpack_key(pack(value))


# At the same time


def test_threads_pack_at_the_same_time() -> None:
    """Tuples and sets run Python code amid packing, so that threads do meet there."""
    jobs = [{f"k{job}": [(job, {job, str(job)}, Color.RED)] * 50} for job in range(8)]
    expected = [pack(job) for job in jobs]
    start = threading.Barrier(8)
    former = sys.getswitchinterval()

    def run(number: int) -> bool:
        start.wait()
        return all(pack(jobs[number]) == expected[number] for _ in range(100))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, range(8)))
    finally:
        sys.setswitchinterval(former)


def test_a_signal_handler_may_pack() -> None:
    value = [(number, {str(number)}) for number in range(200)]
    packed = pack(value)
    caught: list[bytes] = []
    former = signal.signal(signal.SIGALRM, lambda *_: caught.append(pack(value)))
    try:
        for shots in range(1, 21):
            signal.setitimer(signal.ITIMER_REAL, 0.0005)  # one shot, so that handlers do not pile up
            while len(caught) < shots:
                assert pack(value) == packed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert set(caught) == {packed}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_child_forked_amid_packing_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    value = [(number, {str(number)}) for number in range(10)]
    packed = pack(value)
    ended: list[int] = []

    def fork(*_: Any) -> None:
        child = os.fork()
        if child == 0:
            os._exit(int(pack(value) != packed))
        ended.append(os.waitpid(child, 0)[1])

    monkeypatch.setitem(extensions._ENCODERS, Probe, fork)
    assert unpack(pack([value, (1, Probe()), value])) == [value, (1, None), value]
    assert ended == [0]


def test_the_memory_of_a_large_value_is_given_back() -> None:
    pack("x" * (2 << 20))
    idle = len(values._idle)
    pack((b"x" * (2 << 20),))
    assert len(values._idle) == max(idle - 1, 0)
    pack("x")
    assert len(values._idle) == max(idle - 1, 1)


def test_numpy_is_not_imported_for_nothing() -> None:
    code = (
        "import sys; from strictflow_mp.values.codec import *\n"
        "unpack_frozen(pack({'a': (1, {2})}))\n"
        "try: pack(object())\n"
        "except TypeError: pass\n"
        "print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The names of types


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *[(value, type(value).__name__) for value in (True, 0, -5, 300, -300, 1 << 70, 1.5, "", "a" * 50)],
        *[(value, type(value).__name__) for value in ("a" * 300, "a" * 70000, b"", b"a" * 300, b"a" * 70000)],
        *[(kind(range(size)), kind.__name__) for kind in (list, tuple, set) for size in (0, 1, 20, 300, 70000)],
        *[(dict.fromkeys(range(size)), "dict") for size in (0, 1, 20, 70000)],
        *[(value, type(value).__name__) for value in (1j, Decimal(1), uuid.UUID(int=1), date.min, time.min)],
        *[(value, type(value).__name__) for value in (datetime.min, timedelta(1), frozenset())],
        (None, "None"),
        (Color.RED, "Enum"),
        (msgpack.ExtType(5, b"a"), "ExtType"),
        (msgpack.Timestamp(1), "Timestamp"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_packed_value_tells_its_type(value: Any, name: str) -> None:
    packed = pack(value)
    assert describe(packed) == name
    assert describe(memoryview(packed)) == name


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\xc1\0\0\0\xff\0\0\0", b"\xd4", b"\xd4\x80\x00", b"\xc9\0"])
def test_what_makes_no_sense_has_no_type(data: bytes) -> None:
    assert describe(data) == "damaged"


# NumPy


@pytest.fixture(scope="module")
def np() -> Any:
    return pytest.importorskip("numpy")


DTYPES = [
    *["?", "i1", "<i2", ">i4", "u8", "f2", "<f4", ">f8", "g", "c8", ">c16", "S5", "<U3", ">U3", "V7"],
    *["<M8[ns]", ">M8[D]", "m8[25us]", "M8", "V0"],
    [("a", "<i4"), ("b", ">f8")],
    [("a", "u1", (2, 3)), ("b", [("x", "S3"), ("y", "M8[s]")])],
    [(("title", "a"), "u1")],
    {"names": ["a", "b"], "formats": ["u1", "<f8"], "offsets": [9, 0], "itemsize": 20},
    [],
]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 3, 4), (1, 1, 1, 1)]


def make(np: Any, dtype: Any, shape: tuple[int, ...], order: str = "C") -> Any:
    """An array full of random bytes (but for strings, in which not every one is valid)."""
    dtype = np.dtype(dtype)
    array = np.zeros(shape, dtype, order=order)
    if dtype.kind not in "?Ubg" and array.nbytes:
        elements(array)[...] = np.random.default_rng(1).integers(0, 256, array.nbytes)
    return array


def elements(array: Any) -> Any:
    """The memory of an array, what lies between fields included."""
    return (array if array.flags.c_contiguous else array.T).reshape(-1).view("u1")


def assert_same(np: Any, one: Any, other: Any) -> None:
    assert type(one) is type(other) is np.ndarray
    assert one.dtype == other.dtype
    assert one.dtype.isalignedstruct == other.dtype.isalignedstruct
    assert one.shape == other.shape
    assert one.flags.c_contiguous == other.flags.c_contiguous
    assert one.flags.f_contiguous == other.flags.f_contiguous
    assert one.nbytes == other.nbytes
    assert not one.nbytes or bytes(elements(one)) == bytes(elements(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back(np: Any, dtype: Any, order: str) -> None:
    for shape in SHAPES:
        array = make(np, dtype, shape, order)
        packed = pack(array)
        assert has_arrays(packed)
        assert describe(packed) == "ndarray"
        frozen, mine = unpack_frozen(packed), unpack(packed)
        assert_same(np, frozen, array)
        assert_same(np, mine, array)
        assert mine.flags.writeable
        assert mine.flags.aligned
        assert not frozen.flags.writeable
        assert pack(mine) == packed
        assert pack(frozen) == packed


def test_an_aligned_dtype_stays_aligned(np: Any) -> None:
    array = make(np, np.dtype([("a", "u1"), ("b", "f8")], align=True), (3,))
    assert_same(np, unpack(pack(array)), array)
    assert_same(np, unpack_frozen(pack(array)), array)


def test_an_array_with_gaps_is_packed_in_c_order(np: Any) -> None:
    whole = np.arange(24).reshape(4, 6)
    for array in (whole[::2, ::3], whole[::-1], whole.T[1:3], np.broadcast_to(np.int64(3), (2, 2))):
        back = unpack_frozen(pack(array))
        assert back.flags.c_contiguous or back.flags.f_contiguous
        assert back.tolist() == array.tolist()


def test_arrays_within_a_value(np: Any) -> None:
    value = {
        "first": np.arange(3, dtype="u1"),
        "nested": [(np.ones((2, 2)), {"deep": (np.array(5), "text")})],
        "same": [np.zeros(0)] * 2,
        "last": np.array(["a", "bc"]),
    }
    packed = pack(value)
    assert has_arrays(packed)
    assert describe(packed) == "dict"
    back = unpack_frozen(packed)
    assert type(back) is FrozenDict
    assert type(back["nested"]) is FrozenList
    assert_same(np, back["first"], value["first"])
    assert_same(np, back["nested"][0][0], value["nested"][0][0])
    assert_same(np, back["nested"][0][1]["deep"][0], np.array(5))
    assert_same(np, back["last"], value["last"])
    assert pack(back) == packed
    assert pack(unpack(packed)) == packed


def test_a_value_without_arrays_has_no_frame(np: Any) -> None:
    assert not has_arrays(pack([np.float64(1), np.void(b"abc")]))
    assert not has_arrays(b"")


def test_the_elements_are_where_the_layout_says(np: Any) -> None:
    packed = pack(["padding", np.arange(3, dtype="<u2"), np.arange(2, dtype="<u4")])
    length = int.from_bytes(packed[4:8], "little")
    area = -(-(8 + length) // 16) * 16
    assert packed[:4] == b"\xc1\0\0\0"
    assert packed[8 + length : area] == bytes(area - 8 - length)
    assert packed[area : area + 6] == struct.pack("<3H", 0, 1, 2)
    assert packed[area + 16 :] == struct.pack("<2I", 0, 1)


def buffer(np: Any, packed: bytes, shift: int = 0) -> memoryview:
    """A writable copy of *packed* at an address that is *shift* bytes off a multiple of 64."""
    block = np.zeros(len(packed) + 128, "u1")
    start = -block.ctypes.data % 64 + shift
    block[start : start + len(packed)] = np.frombuffer(packed, "u1")
    return memoryview(block)[start : start + len(packed)]


def test_a_read_only_array_is_a_view(np: Any) -> None:
    memory = buffer(np, pack({"a": np.arange(4.0)}))
    array = unpack_frozen(memory)["a"]
    memory[-8:] = struct.pack("<d", 9.0)
    assert array.tolist() == [0, 1, 2, 9]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


def test_a_private_array_is_a_copy(np: Any) -> None:
    memory = buffer(np, pack({"a": np.arange(4.0)}))
    array = unpack(memory)["a"]
    memory[-8:] = struct.pack("<d", 9.0)
    array[0] = 5
    assert array.tolist() == [5, 1, 2, 3]
    assert unpack_frozen(memory)["a"][0] == 0


def test_hold_is_told_of_each_view(np: Any) -> None:
    packed = pack({"a": np.arange(4.0), "t": (np.ones(2), 1)})
    held: list[Any] = []
    back = unpack_frozen(buffer(np, packed), held.append)
    assert [id(array) for array in held] == [id(back["a"]), id(back["t"][0])]
    assert unpack_frozen(pack([1]), held.append) == [1]
    assert len(held) == 2


def test_what_is_derived_keeps_the_array_that_hold_was_told_of(np: Any) -> None:
    gone: list[int] = []
    memory = buffer(np, pack(np.arange(6.0).reshape(2, 3)))
    array = unpack_frozen(memory, lambda array: weakref.finalize(array, gone.append, 1))
    derived = memoryview(array.T[1:].reshape(-1)[1:])
    derived_array = array[0].view("u8")[:2]
    del array
    gc.collect()
    assert not gone
    del derived, derived_array
    gc.collect()
    assert gone == [1]


def test_nothing_keeps_the_memory_when_the_array_is_gone(np: Any) -> None:
    """Without the help of the garbage collector: shared memory is closed then."""
    memory = memoryview(bytearray(buffer(np, pack({"a": (np.arange(4.0),)}))))
    gc.collect()
    gc.disable()
    try:
        for read in (unpack, unpack_frozen):
            read(memory)
        memory.release()  # BufferError if there are views on it
    finally:
        gc.enable()


@pytest.mark.parametrize("shift", [1, 4])
def test_an_array_at_an_odd_address_is_copied(np: Any, shift: int) -> None:
    memory = buffer(np, pack([np.arange(4.0), np.arange(3, dtype="u1")]), shift)
    held: list[Any] = []
    odd, fine = unpack_frozen(memory, held.append)
    assert odd.flags.aligned
    assert not odd.flags.writeable
    assert odd.tolist() == [0, 1, 2, 3]
    assert [id(array) for array in held] == [id(fine)]
    memory[:] = bytes(len(memory))
    assert odd.tolist() == [0, 1, 2, 3]


SCALARS = [
    *["bool_(True)", "int8(-5)", "uint64(2**64 - 1)", "float16(1.5)", "float32('nan')", "float64(2.5)"],
    *[
        "longdouble(1) / 3",
        "complex64(1 + 2j)",
        "str_('a\\0')",
        "str_('')",
        "str_('\\ud800')",
        "bytes_(b'a\\0')",
    ],
    *[
        "datetime64('2020-01-01T00', 'h')",
        "datetime64('NaT', 's')",
        "timedelta64(5, 'm')",
        "void(b'abc')",
        "void(b'')",
    ],
    *["zeros(1, [('a', '>i4'), ('b', 'S2')])[0]", "zeros(1, [('a', 'u1', (2,))])[0]"],
]


@pytest.mark.parametrize("source", SCALARS)
def test_scalars_come_back(np: Any, source: str) -> None:
    scalar = eval(f"np.{source}", {"np": np})
    packed = pack({"s": (scalar,)})
    for read in (unpack, unpack_frozen):
        back = read(packed)["s"][0]
        assert type(back) is type(scalar)
        assert back.dtype == scalar.dtype
        assert back.tobytes() == scalar.tobytes()
    assert pack(unpack(packed)) == packed
    assert describe(pack(scalar)) == "numpy.generic"


def test_a_structured_scalar_is_private_or_read_only(np: Any) -> None:
    scalar = np.zeros(1, [("a", "i4")])[0]
    packed = pack(scalar)
    mine = unpack(packed)
    mine["a"] = 5
    assert mine["a"] == 5
    with pytest.raises(ValueError, match="read-only"):
        unpack_frozen(packed)["a"] = 5


def test_scalars_are_keys_and_members(np: Any) -> None:
    value = {np.int64(5): {np.str_("a")}, np.float32(0.1): 1}
    assert form(unpack(pack(value))) == form(value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("np.array([object()])", r"dtype object cannot be stored: convert it with \.astype\(\)"),
        ("np.zeros(2, [('a', 'i4'), ('b', 'O')])", "dtype .* cannot be stored"),
        ("np.zeros(2, [('a', 'O')])[0]", "dtype .* cannot be stored"),
        ("np.zeros(2, np.dtype((np.record, [('a', 'i4')])))", "dtype .*record.* cannot be stored"),
        ("np.ma.zeros(3)", r"MaskedArray cannot be stored: convert it with numpy\.asarray\(\)"),
        ("np.matrix([1])", r"matrix cannot be stored: convert it with numpy\.asarray\(\)"),
        ("np.rec.array([(1, 2)])", r"recarray cannot be stored: convert it with numpy\.asarray\(\)"),
        ("np.rec.array([(1, 2)])[0]", "dtype .*record.* cannot be stored"),
        ("type('Mine', (np.float64,), {})(1)", r"Mine cannot be stored: convert it with float\(\)"),
        ("np.dtype('i4')", "cannot be stored"),
    ],
)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_other_arrays_are_refused(np: Any, source: str, message: str) -> None:
    value = {"fine": np.arange(3), "list": [1, eval(source, {"np": np})]}
    with pytest.raises(SerializationError, match=message) as caught:
        pack(value)
    assert caught.value.path == "value.list[1]"
    assert unpack(pack([np.arange(3)]))[0].tolist() == [0, 1, 2]


def test_an_array_where_numpy_is_missing(np: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack([np.arange(3)])
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(SerializationError, match="pip install"):
        unpack(packed)
    assert unpack(pack([1])) == [1]


@given(st.data())
def test_damaged_arrays_are_told(data: st.DataObject) -> None:
    np = pytest.importorskip("numpy")
    value = [np.arange(5.0), make(np, DTYPES[-3], (2, 2)), make(np, DTYPES[-4], (3,), "F"), np.void(b"abc")]
    packed = bytearray(pack(value))
    length = int.from_bytes(packed[4:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, length + 7))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(packed)))
    for damaged in (bytes(packed), bytes(packed[:end])):
        for read in (unpack, unpack_frozen):
            try:
                read(damaged)
            except (ProtocolError, SerializationError):
                pass
        assert isinstance(describe(damaged), str)


@pytest.mark.parametrize(
    "fields",
    [
        ["<f8", 0, 0, 5],  # an element too many
        ["<f8", 0, 8, 4],
        ["<f8", 0, -8, 1],
        ["<f8", 0, 1 << 70, 0],
        ["<f8", 0, 0, -1, -4],
        ["<f8", 0, 0, 1 << 62, 4],
        ["<f8", 0, 0, 1.0],
        ["<f8", 0, 0, True],
        ["<f8", 0, 0, *[1] * 100],
        ["O", 0, 0, 1],
        ["|O", 0, 0, 1],
        ["<f8, <f8", 0, 0, 1],
        ["<f7", 0, 0, 1],
        [5, 0, 0, 1],
        [["<f8"], 0, 0, 1],
        [{"names": ["a"]}, 0, 0, 1],
        [{"names": ["a"], "formats": ["<f8"], "offsets": [-8], "itemsize": 8}, 0, 0, 1],
        [{"names": ["a"], "formats": ["<f8"], "offsets": [8], "itemsize": 8}, 0, 0, 1],
        [nest(40, lambda inner: {"names": ["a"], "formats": [inner]}, core="<f8"), 0, 0, 1],
        ["<f8", 0],
        [],
    ],
    ids=lambda fields: repr(fields)[:50],
)
def test_damaged_fields_are_told(np: Any, fields: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack(frame(fields))
    with pytest.raises(ProtocolError):
        unpack_frozen(frame(fields))


def frame(fields: list[Any]) -> bytes:
    """An array with these fields, and four floats behind it."""
    body = b"\xc8" + len(pack(fields)).to_bytes(2, "big") + b"\xf2" + pack(fields)
    head = b"\xc1\0\0\0" + len(body).to_bytes(4, "little") + body
    return head + bytes(-len(head) % 16) + struct.pack("<4d", 0, 1, 2, 3)


def test_undamaged_fields_are_read(np: Any) -> None:
    assert unpack(frame(["<f8", 0, 8, 3])).tolist() == [1, 2, 3]


def test_an_array_outside_of_a_frame_is_damaged(np: Any) -> None:
    packed = pack(np.arange(3))
    body = packed[8 : 8 + int.from_bytes(packed[4:8], "little")]
    with pytest.raises(ProtocolError):
        unpack(body)
    with pytest.raises(ProtocolError):
        unpack(packed[:1] + b"\x01" + packed[2:])
