"""Typed keys: when the program runs they are the plain keys. What type checkers make of them is in tests/typing."""

from __future__ import annotations

import pytest

from strictflow_mp import Change, Key, StrictFlow, read, write


@pytest.mark.parametrize("plain", ["price", b"price", 7, ("price", 1)])
def test_a_typed_key_is_the_plain_key_itself(plain):
    key: Key[float] = Key(plain)
    assert key is plain
    assert Key[float](plain) is plain


def test_a_typed_key_does_wherever_a_key_does():
    price: Key[float] = Key("price")
    with StrictFlow(state={price: 1.0}) as flow:
        double = write(flow, key=price)(lambda value: value * 2)
        look = read(flow, key=price, where="worker")(lambda value: value)

        @write(flow)
        def add() -> float:
            flow.state[price] += 0.5
            return flow.state[price]

        with flow.watch(price) as changes:
            assert double().result() == 2
            assert add().result() == look().result() == flow.state["price"] == flow.peek(price) == 2.5
            flow.put(price, 3.0).result()
            while (change := next(changes)).value != 3:
                pass
        with flow.snapshot() as snapshot:
            assert change == Change(snapshot.version, "price", 3.0)
            assert snapshot[price] == snapshot.get(price) == 3
            assert {type(key) for key in snapshot} == {str}
        flow.delete(price).result()
        assert price not in flow.state
