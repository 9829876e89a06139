"""What is too long for a message is its own caller's error, before it is sent: nobody else notices."""

from __future__ import annotations

import pytest

from strictflow_mp import SerializationError, StrictFlow, TaskFailed, read, write
from strictflow_mp.wire import frames, stream

pytestmark = pytest.mark.once

LIMIT = 3 << 20
FIELDS = 1000
SOME = 2 << 20
"""Bytes of which one goes into a message, and two do not."""
TOO_LONG = bytes(LIMIT + 1)


def limit():
    """As in real life, with smaller numbers. What the other end sends beyond the limit costs the connection."""
    for module in (frames, stream):
        module.MAX_FRAME_BYTES = LIMIT + (1 << 20)
        module.MAX_FIELDS = FIELDS
    frames.MAX_BODY_BYTES = LIMIT


@pytest.fixture
def flow(monkeypatch):
    for name in ("MAX_FRAME_BYTES", "MAX_FIELDS", "MAX_BODY_BYTES"):
        for module in (frames, stream):
            monkeypatch.setattr(module, name, getattr(module, name, 0), raising=False)
    with StrictFlow(state={"n": 0}) as flow:
        write(flow)(limit)().result(30)
        flow.close()
        limit()  # for the connection that comes now
        innocent = write(flow)(lambda: None)
        pid = flow.stats().coordinator_pid
        futures = [innocent()]
        yield flow
        futures.append(innocent())
        assert [future.result(30) for future in futures] == [None, None]
        assert flow.stats().coordinator_pid == pid
        assert flow.state["n"] == 0


def refused(call, match="3,145,728"):
    with pytest.raises(SerializationError, match=match) as caught:
        call()
    return caught.value


def test_a_put_and_an_update(flow):
    error = refused(lambda: flow.put("big", TOO_LONG))
    assert flow.name == error.flow
    refused(lambda: flow.update({"a": bytes(SOME), "b": bytes(SOME)}))
    refused(lambda: flow.state.update(a=bytes(SOME), b=bytes(SOME)))
    refused(lambda: flow.state.setdefault("big", TOO_LONG))
    refused(lambda: flow.update(dict.fromkeys(range(FIELDS + 1))), match="1,000")
    flow.update(dict.fromkeys(range(FIELDS))).result(30)
    flow.put("big", bytes(SOME)).result(30)
    assert "a" not in flow.state


def test_arguments(flow):
    size = write(flow)(lambda *values, **named: sum(map(len, values)))
    refused(lambda: size(TOO_LONG))
    refused(lambda: size(bytes(SOME), bytes(SOME)))
    refused(lambda: size(key=TOO_LONG))
    refused(lambda: size.map([b"", TOO_LONG]))
    assert [future.result(30) for future in size.map([bytes(SOME)] * 20)] == [SOME] * 20


def test_a_function(flow):
    carried = TOO_LONG
    refused(write(flow)(lambda: carried))


def test_results(flow):
    @write(flow)
    def change(size):
        flow.state["n"] += 1
        return bytes(size)

    refused(change(LIMIT + 1).result)
    refused(write(flow, key="n")(lambda n: bytes(LIMIT + 1))().result)
    refused(read(flow)(lambda: bytes(LIMIT + 1))().result)

    @read(flow)
    async def later():
        return bytes(LIMIT + 1)

    refused(later().result)
    large = write(flow)(bytes)
    assert [len(future.result(30)) for future in large.map([SOME] * 20)] == [SOME] * 20


def test_failures(flow):
    @write(flow)
    def fail(size):
        raise ValueError("why" * size)

    with pytest.raises(TaskFailed, match="why"):
        fail(LIMIT).result(30)
    with pytest.raises(ValueError, match=r"^why$"):
        fail(1).result(30)


def test_what_a_task_has_set_is_read_and_deleted(flow):
    @write(flow)
    def grow():
        flow.state["big"] = bytes(LIMIT + 1)

    grow().result(30)
    assert len(flow.state["big"]) == len(flow.peek("big")) == LIMIT + 1
    refused(lambda: flow.state.pop("big"))
    assert "big" in flow.state
    flow.delete("big").result(30)
    assert "big" not in flow.state


def test_clear_sends_no_keys(flow):
    write(flow)(lambda: flow.state.update(dict.fromkeys(range(3 * FIELDS), 1)))().result(30)
    assert len(flow.state) == 3 * FIELDS + 1
    flow.state.clear()
    assert len(flow.state) == 0
    flow.put("n", 0).result(30)
