"""The state outside of tasks: ready-made changes, peeks, snapshots, read-only values, arrays, statistics."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from holding import has_a_sleeping_reader, held

from strictflow_mp import ReadOnlyState, StrictFlow, StrictFlowError, TaskFailed, read, write
from strictflow_mp.system.machine import FREE_THREADED
from strictflow_mp.values.codec import pack

FIRST = {"nested": {"list": [1, {"deep": 2}]}, "number": 7, "gone": "soon"}


@pytest.fixture
def flow():
    with StrictFlow(state=FIRST) as flow:
        yield flow


WITHOUT = {key: FIRST[key] for key in ("nested", "number")}
READY_MADE = {
    "put": (lambda flow: flow.put("number", [1]).result(), {**FIRST, "number": [1]}),
    "update": (lambda flow: flow.update({"a": 1, 2: "b"}).result(), {**FIRST, "a": 1, 2: "b"}),
    "delete": (lambda flow: flow.delete("gone").result(), WITHOUT),
    "assignment": (lambda flow: flow.state.__setitem__("a", 1), {**FIRST, "a": 1}),
    "del": (lambda flow: flow.state.__delitem__("gone"), WITHOUT),
    "state.update": (lambda flow: flow.state.update({"a": 1}, b=2), {**FIRST, "a": 1, "b": 2}),
    "pop": (lambda flow: flow.state.pop("gone"), WITHOUT),
    "setdefault": (lambda flow: flow.state.setdefault("a", 1), {**FIRST, "a": 1}),
    "clear": (lambda flow: flow.state.clear(), {}),
}


def test_changes_outside_a_task_are_one_commit(flow):
    @write(flow)
    def reset():
        flow.state.clear()
        flow.state.update(FIRST)

    for name, (change, expected) in READY_MADE.items():
        reset().result()
        version = flow.stats().version
        change(flow)
        with flow.snapshot() as snapshot:
            assert (dict(snapshot), snapshot.version) == (expected, version + 1), name


def test_deleting_an_absent_key_raises_key_error(flow):
    for delete in (lambda: flow.delete("no").result(), lambda: flow.state.pop("no")):
        with pytest.raises(KeyError, match="no"):
            delete()
    assert dict(flow.state) == FIRST


def test_peek_and_an_ungated_snapshot_do_not_wait_for_a_p1(flow):
    with held(flow, number="changed"):
        assert flow.peek("number") == 7
        assert flow.peek("absent", default=None) is None
        with pytest.raises(KeyError, match="absent"):
            flow.peek("absent")
        with flow.snapshot(gated=False) as snapshot:
            assert (snapshot["number"], snapshot.version) == (7, 1)
    assert flow.state["number"] == flow.peek("number") == "changed"


def test_values_read_are_read_only_and_their_copies_are_not(flow):
    value = flow.state["nested"]
    with pytest.raises(ReadOnlyState):
        value["list"].append(3)
    mine = value.copy()
    mine["list"][1]["deep"] = "mine"
    assert (mine, flow.state["nested"]) == ({"list": [1, {"deep": "mine"}]}, FIRST["nested"])


def test_a_snapshot_stands_still_until_it_is_closed(flow):
    with flow.snapshot() as snapshot:
        for number in range(200):
            flow.put("number", number)
        assert flow.state["number"] == 199
        assert (snapshot.version, dict(snapshot), len(snapshot)) == (1, FIRST, 3)
        assert ("number" in snapshot, snapshot.get("absent", 0)) == (True, 0)
    for use in (lambda: snapshot["number"], lambda: snapshot.version, lambda: list(snapshot)):
        with pytest.raises(StrictFlowError, match="closed"):
            use()


def test_an_async_snapshot_waits_for_the_gate_without_blocking_the_loop(flow):
    async def main():
        async def read_later():
            async with flow.snapshot() as snapshot:
                return snapshot["number"]

        with held(flow, number="changed"):
            reading = asyncio.create_task(read_later())
            while not has_a_sleeping_reader(flow):
                await asyncio.sleep(0.001)
            assert not reading.done()
        return await reading

    assert asyncio.run(main()) == "changed"


def test_stats_count_what_happened(flow, eventually):
    @write(flow)
    def fail():
        raise ValueError

    assert fail().exception() is not None
    flow.put("number", 8).result()
    read(flow)(int)().result()
    stats = flow.stats()
    # The first state, that a task has failed, and the number.
    assert (stats.name, stats.version, stats.keys, stats.restarts) == (flow.name, 3, 3, 0)
    assert (stats.tasks_run, stats.tasks_failed) == ({1: 2, 2: 1}, {1: 1, 2: 0})
    assert stats.tasks_pending == {1: 0, 2: 0}
    assert 0 < stats.latency[1].p50 <= stats.latency[1].p90 <= stats.latency[1].p99 <= stats.latency[1].max
    assert min(stats.bytes_used, stats.bytes_free) > 0
    assert [(worker.pid, worker.slot) for worker in stats.workers] == [(os.getpid(), 1)]
    assert stats.workers[0].rss > 0
    assert stats.readers_waited == 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with held(flow, number="changed"):
            waits = pool.submit(lambda: flow.state["number"])
            eventually(lambda: has_a_sleeping_reader(flow))
        assert waits.result() == "changed"
    assert flow.stats().readers_waited > 0


@pytest.mark.parametrize(
    ("broken", "error"), [("module", ImportError), ("function", ZeroDivisionError), ("exit", TaskFailed)]
)
def test_statistics_that_cannot_be_had_are_the_matter_of_who_asks_alone(flow, broken, error):
    @write(flow)
    def set_psutil(how):
        import sys
        from types import SimpleNamespace

        if how == "module":
            sys.modules["psutil"] = None
        elif how == "whole":
            del sys.modules["psutil"]
        else:
            process = sys.exit if how == "exit" else lambda pid: pid // 0
            sys.modules["psutil"] = SimpleNamespace(Process=process, Error=OSError)

    pid = flow.stats().coordinator_pid
    attachment = flow._client.attach()
    set_psutil(broken).result()
    with pytest.raises(error):
        flow.stats()
    assert flow.state["number"] == 7
    set_psutil("whole").result()
    assert (flow.stats().coordinator_pid, flow.stats().restarts) == (pid, 0)
    assert flow._client.attach() is attachment  # and its connection goes on


def is_shared(array):
    start = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(bound, 16) for bound in line.split()[0].split("-"))
        if low <= start < high:
            return "/dev/shm/" in line
    raise AssertionError(hex(start))


def test_arrays_are_views_on_shared_memory_that_outlive_later_writes(flow):
    flow.put("array", {"x": np.arange(100_000.0)}).result()
    array = flow.state["array"]["x"]
    with flow.snapshot() as snapshot:
        arrays = [array, snapshot["array"]["x"], flow.peek("array")["x"]]
    assert all(is_shared(array) is not FREE_THREADED for array in arrays)
    assert not any(a.flags.writeable or a.flags.owndata for a in arrays)
    for number in range(50):
        flow.put("array", {"x": np.full(100_000, float(number))})
    assert flow.state["array"]["x"][0] == 49
    assert all(np.array_equal(a, np.arange(100_000.0)) for a in arrays)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_a_p1_changes_an_array_in_place(flow):
    @write(flow)
    def double():
        flow.state["array"] *= 2
        flow.state["array"][0] = -1
        return flow.state["array"]

    flow.put("array", np.arange(3)).result()
    assert double().result().tolist() == [-1, 2, 4] == flow.state["array"].tolist()


def test_an_array_in_the_place_of_bytes_that_took_as_much_room_is_read_where_it_lies():
    array = np.arange(1000)
    room = len(pack(array))
    value = next(bytes(size) for size in range(room) if len(pack(bytes(size))) == room)
    with StrictFlow(state={"key": value}) as flow:
        assert flow.state["key"] == value
        flow.put("key", array).result()
        found = flow.state["key"]
        assert np.array_equal(found, array)
        segment = np.frombuffer(flow._client._attachment.segment.buffer, np.uint8)
        assert np.shares_memory(found, segment) is not FREE_THREADED


def test_what_is_kept_of_values_that_were_read_is_bounded_and_always_the_latest():
    with StrictFlow(
        state={key: bytes(1000) for key in range(30)} | {"large": bytes(20_000)}, cache_bytes=10_000
    ) as flow:
        for _ in range(2):  # a state that is one thread's is bound by the second read
            assert flow.state[0] == bytes(1000)
        *_, cache, _, _ = flow.state._bound

        def kept():
            return sum(entry[3] for entry in cache.entries.values())

        for round in range(4):
            for key in range(30):
                assert len(flow.state[key]) == 1000 + (round if key % 3 == 0 else 0)
                assert flow.state["large"][:1] == bytes(1)
                assert 0 < kept() == cache._size <= 10_000
            assert "large" not in {key for key, entry in cache.entries.items() if entry[3] > 10_000}
            flow.update({key: bytes(1001 + round) for key in range(0, 30, 3)}).result()
        flow.put(29, bytes(20_000)).result()  # what was kept has grown too large to be kept
        assert len(flow.state[29]) == 20_000
        assert kept() == cache._size <= 10_000


def test_no_thread_is_left_when_a_flow_is_closed_that_an_async_snapshot_has_waited_for(eventually):
    before = {*threading.enumerate()}
    with StrictFlow("waited", state={"number": 1}) as flow:

        async def look():
            async with flow.snapshot() as now:
                return now["number"]

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with held(flow, number=2):
                looks = pool.submit(lambda: asyncio.run(look()))
                eventually(lambda: has_a_sleeping_reader(flow))
            assert looks.result() == 2
        assert {*threading.enumerate()} - before
    eventually(lambda: not {*threading.enumerate()} - before)
