"""Tasks: what commits and what does not, in which order they run, and what they see."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import os
import time
from contextlib import contextmanager

import numpy as np
import pytest

from strictflow_mp import IntegrityError, ReadOnlyState, StrictFlow, StrictFlowError, TaskTimeout, read, write

FIRST = {"nested": {"list": [1, {"deep": 2}]}, "number": 7, "gone": "soon"}

CHANGES = {
    "assignment": lambda state: state.__setitem__("new", [1]),
    "change in place": lambda state: state["nested"]["list"][1].update(deep=3),
    "assignment, then change in place": lambda state: (state.update(new=[]), state["new"].append(1)),
    "replacement of a changed value": lambda state: (state["nested"].clear(), state.update(nested={"a": 1})),
    "deletion": lambda state: state.__delitem__("gone"),
    "deletion and return": lambda state: (state.pop("number"), state.update(number=8)),
    "creation and deletion": lambda state: (state.update(new=1), state.pop("new")),
    "pop with a default": lambda state: state.update(new=state.pop("absent", "default")),
    "setdefault": lambda state: state.setdefault("new", []).append(1),
    "update": lambda state: state.update({"a": 1, "number": 2}),
    "clear": lambda state: state.clear(),
    "nothing": lambda state: state["nested"],
}


@pytest.fixture
def flow():
    with StrictFlow(state=FIRST) as flow:
        yield flow


@pytest.fixture
def held(flow, tmp_path):
    """`with held():` a P1 runs in SF-LOOP until the block ends."""
    fifo = tmp_path / "held"
    os.mkfifo(fifo)

    @write(flow)
    def run():
        flow.state["number"] = "changed"
        fifo.read_bytes()

    @contextmanager
    def held():
        future = run()
        with open(fifo, "wb"):  # opens when the task has opened it too
            yield future
        future.result()

    return held


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_p1_changes_is_committed_as_a_dict_would_be_changed(flow, change):
    @write(flow)
    def task():
        change(flow.state)
        return sorted(flow.state), len(flow.state), "new" in flow.state, "gone" in flow.state

    expected = copy.deepcopy(FIRST)
    change(expected)
    assert task().result() == (sorted(expected), len(expected), "new" in expected, "gone" in expected)
    assert dict(flow.state) == expected


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_exception_rolls_everything_back(flow, change):
    @write(flow)
    def task():
        change(flow.state)
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        task().result()
    assert dict(flow.state) == FIRST
    assert flow.stats().version == 1


def test_a_failed_task_undoes_nothing_of_its_neighbours(flow, held):
    @write(flow)
    def append(item):
        flow.state["nested"]["list"].append(item)
        if item % 3 == 0:
            raise ValueError(item)

    with held():  # so that all of them run in one burst
        futures = append.map(range(10, 20))
    assert [type(future.exception()) for future in futures] == [
        ValueError if n % 3 == 0 else type(None) for n in range(10, 20)
    ]
    assert flow.state["nested"]["list"][2:] == [10, 11, 13, 14, 16, 17, 19]


def test_what_a_task_kept_for_itself_changes_nothing_later(flow):
    kept = []

    @write(flow)
    def task():
        kept.append(flow.state["nested"])
        kept[0]["list"].append("late")
        return len(kept), flow.state["nested"]["list"]

    assert task().result() == (1, [1, {"deep": 2}, "late"])
    assert task().result() == (2, [1, {"deep": 2}, "late"])
    assert flow.state["nested"] == {"list": [1, {"deep": 2}, "late"]}


def test_a_keyed_p1_maps_the_old_value_to_the_new(flow):
    @write(flow, key="nested")
    def append(value, item, *, twice=False):
        value["list"].extend([item] * (1 + twice))
        return value

    @write(flow, key="absent")
    def create(value):
        return [value]

    assert append("x", twice=True).result()["list"][2:] == ["x", "x"]
    assert create().result() == [None]
    assert (flow.state["nested"]["list"][2:], flow.state["absent"]) == (["x", "x"], [None])


def test_a_keyed_p1_that_returns_none_aborts(flow):
    @write(flow, key="nested")
    def forget(value):
        value["list"].append(1)
        flow.state["number"] = 8

    with pytest.raises(IntegrityError, match="forget") as caught:
        forget().result()
    assert (caught.value.key, caught.value.flow) == ("nested", flow.name)
    assert dict(flow.state) == FIRST


def test_p1_tasks_of_one_process_run_in_the_order_of_their_submission(flow):
    @write(flow)
    def append(item):
        flow.state["nested"]["list"].append(item)

    @write(flow)
    async def append_async(item):
        await asyncio.sleep(0)
        flow.state["nested"]["list"].append(item)

    @write(flow, key="nested")
    def append_keyed(value, item):
        value["list"].append(item)
        return value

    for number in range(60):
        (append, append_async, append_keyed)[number % 3](number)
    assert flow.state["nested"]["list"][2:] == list(range(60))


def test_map_gives_futures_in_order_over_one_or_more_iterables(flow):
    @write(flow)
    def add(a, b=100):
        return a + b

    assert [future.result() for future in add.map(range(5))] == [100, 101, 102, 103, 104]
    assert [future.result() for future in add.map([1, 2, 3], (n for n in [10, 20]))] == [11, 22]
    assert add.map([]) == []


@pytest.mark.parametrize("where", ["loop", "worker"])
def test_a_p2_sees_every_p1_submitted_before_it_and_runs_where_it_is_told(flow, where):
    @read(flow, where=where)
    def plain():
        return flow.state["number"], os.getpid(), sorted(flow.state), len(flow.state), "gone" in flow.state

    @read(flow, where=where)
    async def coroutine(extra):
        await asyncio.sleep(0)
        return flow.state["number"] + extra

    @read(flow, key="nested", where=where)
    def keyed(value):
        return value["list"][0]

    @read(flow, key="absent", where=where)
    async def absent(value):
        return value

    flow.put("number", 8)
    pid = os.getpid() if where == "worker" else flow.stats().coordinator_pid
    assert plain().result() == (8, pid, sorted(FIRST), 3, True)
    assert coroutine(extra=1).result() == 9
    assert (keyed().result(), absent().result()) == (1, None)
    assert [future.result() for future in coroutine.map([1, 2])] == [9, 10]


def test_a_p2_in_the_worker_reads_one_version_throughout(flow):
    @read(flow, where="worker")
    def task():
        before = flow.state["number"]
        flow.put("number", 8).result()
        return before, flow.state["number"], dict(flow.state)["number"], flow.peek("number")

    @read(flow, where="worker")
    async def coroutine():
        before = flow.state["number"]
        await flow.put("number", 9)
        return before, flow.state["number"]

    async def main():
        return await coroutine()

    assert task().result()[:3] == (7, 7, 7)
    assert asyncio.run(main()) == (8, 8)
    assert flow.state["number"] == 9


def test_async_p2_tasks_overlap(flow):
    here = set()

    @read(flow)
    async def meet(name):
        here.add(name)
        while len(here) < 3:
            await asyncio.sleep(0.001)
        return name

    assert [future.result() for future in meet.map("abc")] == ["a", "b", "c"]


def test_a_p1_pauses_async_p2_tasks_even_while_it_awaits(flow, tmp_path, eventually):
    ticks = tmp_path / "ticks"

    @read(flow)
    async def tick():
        while flow.state["number"] != "end":
            with ticks.open("a") as file:
                file.write(".")
            await asyncio.sleep(0)

    @write(flow)
    async def pause():
        before = ticks.stat().st_size
        await asyncio.sleep(0.05)
        return before, ticks.stat().st_size

    ticking = tick()
    eventually(ticks.exists)
    before, after = pause().result()
    assert before == after
    eventually(lambda: ticks.stat().st_size > after)
    flow.state["number"] = "end"
    ticking.result()


def test_a_task_may_submit_others(flow):
    @write(flow)
    def child(number):
        flow.state["number"] += number
        return flow.state["number"]

    @write(flow)
    def parent():
        child(1)
        child.map([2, 3])
        flow.put("put", "by a task")

    @read(flow)
    async def reader():
        return await child(10), flow.state["number"]

    parent().result()
    assert reader().result() == (23, 23)
    assert flow.state["put"] == "by a task"


WAITS = {
    "result": lambda future: future.result(),
    "result with a timeout": lambda future: future.result(60),
    "exception": lambda future: future.exception(),
    "concurrent.futures.wait": lambda future: concurrent.futures.wait([future], timeout=5),
    "as_completed": lambda future: list(concurrent.futures.as_completed([future], timeout=5)),
}


@pytest.mark.parametrize("decorate", [write, read])
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_task_that_waits_for_another_inside_sf_loop_fails_at_once(flow, decorate, wait):
    @write(flow)
    def child():
        pass

    @decorate(flow)
    def parent():
        wait(child())

    with pytest.raises(StrictFlowError, match=r"child.*never end"):
        parent().result()


def test_an_async_p1_that_awaits_another_task_fails_at_once(flow):
    @write(flow)
    async def parent():
        await flow.put("number", 8)

    with pytest.raises(StrictFlowError, match="never end"):
        parent().result()


def spin():
    while True:
        pass


def swallow():
    try:
        time.sleep(60)
    except:  # noqa: E722
        pass


async def wait_long():
    await asyncio.sleep(60)


async def block():
    time.sleep(10)


@pytest.mark.parametrize("decorate", [write, read])
@pytest.mark.parametrize("body", [spin, swallow, wait_long, block])
@pytest.mark.parametrize("is_default", [False, True])
def test_a_task_that_runs_too_long_is_stopped_and_rolled_back(decorate, body, is_default):
    options = {} if is_default else {"timeout": 0.05}

    with StrictFlow(state=FIRST, task_timeout=0.05 if is_default else None) as flow:
        if asyncio.iscoroutinefunction(body):

            @decorate(flow, **options)
            async def task():
                if decorate is write:
                    flow.state["number"] = 8
                await body()
        else:

            @decorate(flow, **options)
            def task():
                if decorate is write:
                    flow.state["number"] = 8
                body()

        with pytest.raises(TimeoutError, match="longer than its timeout") as caught:
            task().result()
        assert type(caught.value) is TaskTimeout
        assert dict(flow.state) == FIRST
        flow.put("number", 9).result()
        assert flow.state["number"] == 9


@pytest.mark.parametrize("decorate", [write, read])
def test_a_timeout_error_of_the_task_itself_is_not_taken_for_ours(flow, decorate):
    @decorate(flow, timeout=60)
    async def task():
        raise asyncio.TimeoutError("mine")

    with pytest.raises(asyncio.TimeoutError, match="^mine$"):
        task().result()


READY_MADE = {
    "put": (lambda flow: flow.put("number", [1]).result(), {**FIRST, "number": [1]}),
    "update": (lambda flow: flow.update({"a": 1, 2: "b"}).result(), {**FIRST, "a": 1, 2: "b"}),
    "delete": (lambda flow: flow.delete("gone").result(), {k: FIRST[k] for k in ("nested", "number")}),
    "assignment": (lambda flow: flow.state.__setitem__("a", 1), {**FIRST, "a": 1}),
    "del": (lambda flow: flow.state.__delitem__("gone"), {k: FIRST[k] for k in ("nested", "number")}),
    "state.update": (lambda flow: flow.state.update({"a": 1}, b=2), {**FIRST, "a": 1, "b": 2}),
    "pop": (lambda flow: flow.state.pop("gone"), {k: FIRST[k] for k in ("nested", "number")}),
    "setdefault": (lambda flow: flow.state.setdefault("a", 1), {**FIRST, "a": 1}),
    "clear": (lambda flow: flow.state.clear(), {}),
}


@pytest.mark.parametrize(("change", "expected"), READY_MADE.values(), ids=READY_MADE)
def test_changes_outside_a_task_are_one_commit(flow, change, expected):
    change(flow)
    with flow.snapshot() as snapshot:
        assert (dict(snapshot), snapshot.version) == (expected, 2)


@pytest.mark.parametrize("delete", [lambda flow: flow.delete("no").result(), lambda flow: flow.state.pop("no")])
def test_deleting_an_absent_key_raises_key_error(flow, delete):
    with pytest.raises(KeyError, match="no"):
        delete(flow)


def test_peek_and_an_ungated_snapshot_do_not_wait_for_a_p1(flow, held):
    with held():
        assert flow.peek("number") == 7
        assert flow.peek("absent", default=None) is None
        with pytest.raises(KeyError, match="absent"):
            flow.peek("absent")
        with flow.snapshot(gated=False) as snapshot:
            assert (snapshot["number"], snapshot.version) == (7, 1)
    assert flow.state["number"] == flow.peek("number") == "changed"


CHANGES_OF_A_READER = {
    "assignment": lambda flow: flow.state.__setitem__("a", 1),
    "deletion": lambda flow: flow.state.__delitem__("gone"),
    "update": lambda flow: flow.state.update(a=1),
    "clear": lambda flow: flow.state.clear(),
    "change in place": lambda flow: flow.state["nested"]["list"].append(1),
    "change deep inside": lambda flow: flow.state["nested"]["list"][1].pop("deep"),
}


@pytest.mark.parametrize("where", ["loop", "worker"])
@pytest.mark.parametrize("change", CHANGES_OF_A_READER.values(), ids=CHANGES_OF_A_READER)
def test_a_p2_cannot_change_the_state(flow, where, change):
    @read(flow, where=where)
    def task():
        change(flow)

    with pytest.raises(ReadOnlyState) as caught:
        task().result()
    assert isinstance(caught.value, TypeError)
    assert dict(flow.state) == FIRST


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


def test_an_async_snapshot_waits_for_the_gate_without_blocking_the_loop(flow, held):
    async def main():
        async def read_later():
            async with flow.snapshot() as snapshot:
                return snapshot["number"]

        with held():
            reading = asyncio.create_task(read_later())
            await asyncio.sleep(0)
            await asyncio.sleep(0.01)  # a blocked loop would never come here
            assert not reading.done()
        return await reading

    assert asyncio.run(main()) == "changed"


def test_stats_count_what_happened(flow, held):
    @write(flow)
    def fail():
        raise ValueError

    @read(flow)
    def look():
        pass

    assert fail().exception() is not None
    flow.put("number", 8).result()
    look().result()
    stats = flow.stats()
    assert (stats.name, stats.version, stats.keys, stats.restarts) == (flow.name, 2, 3, 0)
    assert (stats.tasks_run, stats.tasks_failed) == ({1: 2, 2: 1}, {1: 1, 2: 0})
    assert stats.tasks_pending == {1: 0, 2: 0}
    assert 0 < stats.latency[1].p50 <= stats.latency[1].p90 <= stats.latency[1].p99 <= stats.latency[1].max
    assert min(stats.bytes_used, stats.bytes_free) > 0
    assert [(worker.pid, worker.slot) for worker in stats.workers] == [(os.getpid(), 1)]
    assert stats.workers[0].rss > 0
    with held():
        reading = concurrent.futures.ThreadPoolExecutor(1)
        waits = reading.submit(lambda: flow.state["number"])
        time.sleep(0.01)
    assert waits.result() == "changed"
    reading.shutdown()
    assert flow.stats().readers_waited > 0


def test_arrays_are_views_on_shared_memory_that_outlive_later_writes(flow):
    flow.put("array", {"x": np.arange(100_000.0)}).result()

    def is_shared(array):
        start = array.__array_interface__["data"][0]
        for line in open("/proc/self/maps"):
            low, high = (int(bound, 16) for bound in line.split()[0].split("-"))
            if low <= start < high:
                return "/dev/shm/" in line
        raise AssertionError(hex(start))

    array = flow.state["array"]["x"]
    with flow.snapshot() as snapshot:
        arrays = [array, snapshot["array"]["x"], flow.peek("array")["x"]]
    assert all(map(is_shared, arrays))
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
