"""The reads of a machine whose loads overtake each other, on any machine: each load stands on its side of a fence.

What is done at a fence stands for what others did before it: a load that is done ahead of it would not see that.
"""

from __future__ import annotations

import pytest

from strictflow_mp import StrictFlow
from strictflow_mp.client import state as state_module
from strictflow_mp.client.state import FlowState
from strictflow_mp.memory.segment import W_EPOCH, W_STATUS, W_VERSION
from strictflow_mp.store import reader as reader_module
from strictflow_mp.system.machine import FREE_THREADED


@pytest.fixture(autouse=True)
def fenced(monkeypatch):
    for module in (state_module, reader_module):
        monkeypatch.setattr(module, "WEAK", True)
    monkeypatch.setattr(FlowState, "__getitem__", FlowState._get_fenced)


@pytest.fixture
def flow():
    with StrictFlow(state={"config": {"version": 1}, "other": 1}) as flow:
        for _ in range(2):  # a state that is one thread's is bound by the second read
            assert flow.state["config"] == {"version": 1}
        yield flow


def at_each_fence(monkeypatch, *actions):
    """Do these at the next fences of `client.state`; the list of those that are left."""
    left = list(actions)
    monkeypatch.setattr(state_module, "read_fence", lambda: left.pop(0)() if left else None)
    return left


def nothing():
    pass


def test_reads_are_right(flow):
    state = flow.state
    for number in range(2, 40):
        state["config"] = {"version": number, "more": "x" * (number % 3)}
        assert state["config"]["version"] == number
        assert state["other"] == 1
    del state["config"]
    for key in ("config", "absent"):
        with pytest.raises(KeyError, match=key):
            state[key]
    state["config"] = 1
    assert (state["config"], dict(state)) == (1, {"config": 1, "other": 1})


def test_a_read_loads_version_behind_the_flag(flow, monkeypatch):
    left = at_each_fence(monkeypatch, lambda: flow.put("config", {"version": 2}).result())
    assert flow.state["config"] == {"version": 2}
    assert left == []


def test_a_read_loads_epoch_and_next_behind_version(flow, monkeypatch):
    # The second commit is behind the fence, and its cell is not of the version that was loaded.
    flow.put("config", {"version": 2}).result()
    left = at_each_fence(monkeypatch, nothing, lambda: flow.put("config", {"version": 3}).result())
    assert flow.state["config"] == {"version": 2}
    assert left == []
    assert flow.state["config"] == {"version": 3}
    words = flow.state._bound[2]
    flow.put("config", {"version": 4}).result()

    def moves():
        words[W_EPOCH] += 1

    at_each_fence(monkeypatch, nothing, moves)
    passed = []
    rebind = type(flow.state._host).rebind
    monkeypatch.setattr(type(flow.state._host), "rebind", lambda *args: passed.append(args[2]) or rebind(*args))
    assert flow.state["config"] == {"version": 4}
    if not FREE_THREADED:  # there it binds itself
        assert passed == [words[W_EPOCH]]


def test_a_snapshot_looks_at_epoch_and_status_behind_the_flag(flow, monkeypatch):
    words = flow.state._bound[2]
    for word in (W_EPOCH, W_STATUS):
        former = words[word]
        at_each_fence(monkeypatch, lambda word=word: words.__setitem__(word, words[word] + 1))
        assert flow.state._reader_at_once(True) is None
        words[word] = former
        assert flow.state._reader_at_once(True) is not None
    version = words[W_VERSION]
    at_each_fence(monkeypatch, lambda: flow.put("other", 2).result())
    reader = flow.state._reader_at_once(True)
    pinned = reader.pin()
    try:
        assert pinned.number == version + 1
    finally:
        reader.unpin(pinned)
