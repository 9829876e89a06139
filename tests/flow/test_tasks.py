"""Tasks: what commits and what does not, in which order they run, and what they see."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy

import pytest
from holding import held

from strictflow_mp import IntegrityError, StrictFlow, StrictFlowError, read, write

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
def reset(flow):
    """Makes the state `FIRST` again."""

    @write(flow)
    def reset():
        flow.state.clear()
        flow.state.update(FIRST)

    return reset


@pytest.fixture
def append(flow):
    @write(flow)
    def append(item):
        flow.state["nested"]["list"].append(item)

    return append


def test_a_p1_changes_the_state_like_a_dict_when_it_returns_and_not_at_all_when_it_raises(flow, reset):
    def task(fails, change):
        change(flow.state)
        if fails:
            raise LookupError("no")
        return sorted(flow.state), len(flow.state), "new" in flow.state, "gone" in flow.state

    for name, change in CHANGES.items():
        run = write(flow)(lambda fails, change=change: task(fails, change))
        reset().result()
        with pytest.raises(LookupError, match="no"):
            run(fails=True).result()
        assert dict(flow.state) == FIRST, name
        expected = copy.deepcopy(FIRST)
        change(expected)
        answer = (sorted(expected), len(expected), "new" in expected, "gone" in expected)
        assert run(fails=False).result() == answer, name
        assert dict(flow.state) == expected, name


def test_a_failed_task_undoes_nothing_of_its_neighbours(flow):
    @write(flow)
    def append(item):
        flow.state["nested"]["list"].append(item)
        if item % 3 == 0:
            raise ValueError(item)

    with held(flow):  # so that all of them run in one burst
        futures = append.map(range(10, 20))
    assert [type(future.exception()) for future in futures] == [
        ValueError if n % 3 == 0 else type(None) for n in range(10, 20)
    ]
    assert flow.state["nested"]["list"][2:] == [10, 11, 13, 14, 16, 17, 19]


def test_what_a_keyed_task_had_done_to_its_value_when_it_failed_is_not_seen_by_the_next_of_its_burst(flow):
    @write(flow, key="nested")
    def append(value, item, *, fails=False):
        value["list"].append(item)
        if fails:
            raise LookupError(item)
        return value

    with held(flow):
        append("first"), append("failed", fails=True), append("last")
    assert flow.state["nested"]["list"][2:] == ["first", "last"]


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


def test_a_keyed_p1_maps_the_old_value_to_the_new_or_aborts(flow):
    @write(flow, key="nested")
    def append(value, item, *, twice=False):
        value["list"].extend([item] * (1 + twice))
        return value

    @write(flow, key="absent")
    def create(value):
        return [value]

    @write(flow, key="nested")
    def forget(value):
        value["list"].append(1)
        flow.state["number"] = 8

    with pytest.raises(IntegrityError, match="forget") as caught:
        forget().result()
    assert (caught.value.key, caught.value.flow) == ("nested", flow.name)
    assert dict(flow.state) == FIRST
    assert append("x", twice=True).result()["list"][2:] == ["x", "x"]
    assert create().result() == [None]
    assert (flow.state["nested"]["list"][2:], flow.state["absent"]) == (["x", "x"], [None])


def test_p1_tasks_of_one_process_run_in_the_order_of_their_submission(flow, append):
    @write(flow)
    async def append_async(item):
        await asyncio.sleep(0)
        flow.state["nested"]["list"].append(item)

    @write(flow, key="nested")
    def append_keyed(value, item):
        value["list"].append(item)
        return value

    with held(flow):
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
    "concurrent.futures.wait": lambda future: concurrent.futures.wait([future], timeout=2),
    "as_completed": lambda future: list(concurrent.futures.as_completed([future], timeout=2)),
}


def test_a_task_that_waits_for_another_inside_sf_loop_fails_at_once(flow):
    @write(flow)
    def child():
        pass

    @write(flow)
    async def awaits():
        await child()

    with pytest.raises(StrictFlowError, match=r"child.*never end"):
        awaits().result()
    for wait in WAITS.values():
        for decorate in (write, read):
            with pytest.raises(StrictFlowError, match=r"child.*never end"):
                decorate(flow)(lambda wait=wait: wait(child()))().result()


def test_a_keyed_p1_may_change_other_keys_too_and_for_its_own_its_return_value_counts(flow):
    @write(flow, key="nested")
    def change(value, item, *, fails=False):
        value["list"].append(item)
        flow.state["other"] = [flow.state["nested"] is value, item]
        del flow.state["gone"]
        flow.state["nested"] = "not this"
        if fails:
            raise LookupError(item)
        return value

    @write(flow, key="number")
    def change_the_other_alone(value):
        flow.state["other"].append(value)
        flow.state["number"] = "not this"
        return value

    with pytest.raises(LookupError):
        change(1, fails=True).result()
    assert dict(flow.state) == FIRST
    change(2).result()
    assert change_the_other_alone().result() == 7
    assert dict(flow.state) == {"nested": {"list": [1, {"deep": 2}, 2]}, "number": 7, "other": [True, 2, 7]}


def test_tasks_of_one_burst_see_what_those_before_them_changed_by_whatever_means(flow):
    @write(flow, key="number")
    def more(value):
        return [*value, 1] if isinstance(value, list) else value + 1

    @write(flow, key="number")
    def turn_into_a_list(value):
        return [value]

    @write(flow)
    def times_ten():
        flow.state["number"] *= 10
        flow.state["new"] = flow.state.pop("gone", "gone already")
        return sorted(flow.state), len(flow.state), "gone" in flow.state

    @write(flow)
    def keys():
        return sorted(flow.state)

    with held(flow):
        futures = [more(), times_ten(), more(), turn_into_a_list(), more(), flow.delete("new"), flow.put("number", 3)]
        futures += [keys(), more(), times_ten(), keys()]
    there = ["nested", "new", "number"]
    outcomes = [future.result() for future in futures]
    assert outcomes[:7] == [8, (there, 3, False), 81, [81], [81, 1], None, None]
    assert outcomes[7:] == [["nested", "number"], 4, (there, 3, False), there]
    assert dict(flow.state) == {"nested": FIRST["nested"], "number": 40, "new": "gone already"}


def test_a_burst_that_grows_heavy_is_committed_in_parts_whatever_makes_it_heavy(flow):
    @write(flow, key="number")
    def grow(value, size):
        return bytes(size)

    @write(flow)
    def look():
        with flow.snapshot() as committed:
            return len(flow.state["number"]), committed.version

    with held(flow):
        futures = [grow(100_000), look(), grow(200_000), look(), grow(1), look()]
    (first, before), (second, between), (last, after) = (future.result() for future in futures[1::2])
    assert (first, second, last) == (100_000, 200_000, 1)
    assert before < between <= after
    assert flow.state["number"] == bytes(1)


def test_in_a_p1_too_a_key_that_is_not_there_cannot_be_deleted(flow):
    @write(flow)
    def delete(key):
        del flow.state["number"]
        del flow.state[key]

    for key in ("absent", "number"):
        with pytest.raises(KeyError, match=key):
            delete(key).result()
    assert dict(flow.state) == FIRST


def test_a_task_may_take_back_what_it_has_submitted_and_nobody_waits_for_that(flow, append):
    @write(flow)
    def submit():
        kept, taken_back = append("kept"), append("taken back")
        before = flow._inside._scheduler.first_write(0).ticket
        outcome = taken_back.cancel(), taken_back.cancelled(), kept.cancelled()
        return (*outcome, before == flow._inside._scheduler.first_write(0).ticket == flow._inside._due - 1)

    assert submit().result() == (True, True, False, True)
    assert flow.state["nested"]["list"][2:] == ["kept"]
    assert flow._client.attach().gate.is_open()


def test_a_p2_may_take_a_snapshot_and_whoever_starts_the_flow_that_runs_it_starts_nothing(flow):
    @read(flow)
    def look():
        flow.start_loop()
        with flow.snapshot() as snapshot:
            return dict(snapshot), snapshot.version == flow.stats().version

    assert look().result() == (FIRST, True)


def test_an_async_read_in_the_calling_process_fails_and_is_cancelled_as_others_are(flow):
    @read(flow, where="worker")
    async def look(gate=None):
        if gate is None:
            raise LookupError("no")
        gate.set()
        await asyncio.sleep(3600)

    with pytest.raises(LookupError, match="no"):
        look().result()

    async def main():
        gate = asyncio.Event()
        failing, sleeping = look(), look(gate)
        with pytest.raises(LookupError, match="no"):
            await failing
        await gate.wait()
        assert not sleeping.cancel()
        sleeping.runner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        await asyncio.wait([sleeping.runner])
        assert sleeping.runner.cancelled()
        return sleeping

    assert asyncio.run(main()).cancelled()
