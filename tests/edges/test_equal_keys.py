"""Keys that equal a legal key are that key, as in a dict: cached or not, in every place where a key is taken."""

from __future__ import annotations

import decimal
import enum
import fractions

import pytest

from strictflow_mp import SerializationError, StrictFlow, read, write


class Color(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    pass


class Shouted(str):
    def __eq__(self, other):
        return str(self).upper() == other

    def __hash__(self):
        return hash(str(self).upper())


class Pair(tuple):
    pass


class Octets(bytes):
    pass


class Later:
    """Stands for a text that is made when it is needed, as translations are."""

    def __str__(self):
        return "red"

    def __eq__(self, other):
        return str(self) == other

    def __hash__(self):
        return hash(str(self))


class Odd:
    """Cannot even say what it is."""

    def __repr__(self):
        raise OSError("no repr")


EQUAL = [
    (1.0, 1),
    (True, 1),
    (decimal.Decimal(1), 1),
    (fractions.Fraction(1), 1),
    (1 + 0j, 1),
    (Number.ONE, 1),
    (-0.0, 0),
    (1e300, int(1e300)),
    (Color.RED, "red"),
    (Text("red"), "red"),
    ((1.0, Text("a")), (1, "a")),
    (Pair((1, "a")), (1, "a")),
    (Octets(b"k"), b"k"),
    (memoryview(b"k"), b"k"),
    (Later(), "red"),
]
OTHER = [
    1.5,
    float("nan"),
    float("inf"),
    decimal.Decimal("0.5"),
    1 + 1j,
    Shouted("red"),
    (1.5, "a"),
    frozenset(),
    None,
    "red".join,
    Odd(),
]
UNHASHABLE = [bytearray(b"k"), memoryview(bytearray(b"k")), [1], {}, (1, [])]
STATE = {1: "one", 0: "zero", int(1e300): "large", "red": "r", (1, "a"): "t", b"k": "octets"}


def ways(flow):
    """Each way in which a key is given, for a key that is there."""

    @write(flow)
    def inside(index):
        return flow.state[EQUAL[index][0]]

    return {
        "state": flow.state.__getitem__,
        "get": flow.state.get,
        "peek": flow.peek,
        "snapshot": lambda key: flow.snapshot()[key],
        "in": lambda key: key in flow.state,
    }, inside


@pytest.mark.parametrize("warm", [False, True])
def test_a_key_that_equals_a_legal_one_is_that_one(warm):
    with StrictFlow(state=STATE) as flow:
        given, inside = ways(flow)
        for index, (key, legal) in enumerate(EQUAL):
            if warm:
                assert flow.state[legal] == STATE[legal]
            for name, way in given.items():
                assert way(key) == (True if name == "in" else STATE[legal]), (name, key)
            assert inside(index).result(30) == STATE[legal]
            flow.put(key, STATE[legal]).result(30)
        assert dict(flow.state) == STATE
        assert {type(key) for key in flow.state} == {int, str, tuple, bytes}


@pytest.mark.parametrize("where", ["loop", "worker"])
def test_tasks_with_a_key_and_watches_take_it_too(where):
    with StrictFlow(state={1: "one", "red": "r"}) as flow, flow.watch(1.0, Color.RED) as changes:
        assert read(flow, key=1.0, where=where)(lambda value: value)().result(30) == "one"
        assert read(flow, where=where)(lambda: flow.state[Number(1)])().result(30) == "one"
        assert write(flow, key=Text("red"))(lambda value: value + "!")().result(30) == "r!"
        change = next(changes)
        assert (change.key, type(change.key), change.value) == ("red", str, "r!")
        flow.delete(True).result(30)
        change = next(changes)
        assert (change.key, type(change.key), change.is_deleted) == (1, int, True)
        assert dict(flow.state) == {"red": "r!"}


@pytest.mark.parametrize("key", [*OTHER, *UNHASHABLE], ids=lambda key: type(key).__name__)
def test_any_other_key_is_refused_also_when_its_like_is_cached(key):
    with StrictFlow(state=STATE) as flow:
        for legal in STATE:
            assert flow.state[legal] == STATE[legal]
        with flow.snapshot() as snapshot:
            for legal in STATE:
                assert snapshot[legal] == STATE[legal]
            for way in [*ways(flow)[0].values(), snapshot.get, snapshot.__contains__, flow.watch]:
                with pytest.raises(SerializationError, match="cannot be a key"):
                    way(key)
        with pytest.raises(SerializationError):
            flow.put(key, 1)


def test_keys_of_numpy():
    numpy = pytest.importorskip("numpy")
    with StrictFlow(state=STATE) as flow:
        assert flow.state[numpy.int64(1)] == "one"
        assert flow.state[numpy.str_("red")] == "r"
        assert flow.state[1] == "one"
        assert flow.state[numpy.int64(1)] == "one"


@pytest.mark.parametrize(
    "key",
    ["k" * (1 << 20), b"k" * (1 << 20), ("a", "k" * (1 << 20))],
    ids=["str", "bytes", "tuple"],
)
def test_a_key_that_is_too_long_is_refused_wherever_it_is_named(key):
    with StrictFlow(state={"n": 0}) as flow:

        @write(flow)
        def task():
            flow.state["n"] = 7
            flow.state[key] = 1

        for use in (
            lambda: flow.update({key: 1, "n": 5}),
            lambda: flow.put(key, 1),
            lambda: flow.state.setdefault(key, 3),
            lambda: flow.state[key],
            lambda: flow.snapshot()[key],
            lambda: flow.peek(key),
            lambda: flow.watch(key),
            lambda: task().result(60),
            lambda: StrictFlow(state={key: 1}).start_loop(),
        ):
            with pytest.raises(SerializationError, match="a key of 1,0"):
                use()
        assert dict(flow.state) == {"n": 0}
        longest = "k" * ((1 << 20) - 1 - 5)
        flow.put(longest, 1).result(30)
        assert flow.state[longest] == 1
