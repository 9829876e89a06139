"""P2 tasks: what they see, where they run, and how they make way for P1 tasks."""

from __future__ import annotations

import asyncio
import os

import pytest
from holding import held

from strictflow_mp import ReadOnlyState, StrictFlow, read, write

FIRST = {"nested": {"list": [1, {"deep": 2}]}, "number": 7, "gone": "soon"}


@pytest.fixture
def flow():
    with StrictFlow(state=FIRST) as flow:
        yield flow


def test_a_p2_sees_every_p1_submitted_before_it_and_runs_where_it_is_told(flow):
    for number, where in enumerate(["loop", "worker"]):

        @read(flow, where=where)
        def plain():
            state = flow.state
            return state["number"], os.getpid(), sorted(state), len(state), "gone" in state

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

        pid = os.getpid() if where == "worker" else flow.stats().coordinator_pid
        flow.put("number", number)
        assert plain().result() == (number, pid, sorted(FIRST), 3, True)
        assert coroutine(extra=1).result() == number + 1
        assert (keyed().result(), absent().result()) == (1, None)
        assert [future.result() for future in coroutine.map([1, 2])] == [number + 1, number + 2]


def test_a_p2_in_the_worker_reads_one_version_throughout(flow):
    @read(flow, where="worker")
    def task():
        before = flow.state["number"]
        flow.put("number", 8).result()
        return before, flow.state["number"], dict(flow.state)["number"]

    @read(flow, where="worker")
    async def coroutine():
        before = flow.state["number"]
        await flow.put("number", 9)
        return before, flow.state["number"]

    async def main():
        return await coroutine()

    assert task().result() == (7, 7, 7)
    assert asyncio.run(main()) == (8, 8)
    assert flow.state["number"] == 9


CHANGES_OF_A_READER = {
    "assignment": lambda flow: flow.state.__setitem__("a", 1),
    "deletion": lambda flow: flow.state.__delitem__("gone"),
    "update": lambda flow: flow.state.update(a=1),
    "clear": lambda flow: flow.state.clear(),
    "change in place": lambda flow: flow.state["nested"]["list"].append(1),
    "change deep inside": lambda flow: flow.state["nested"]["list"][1].pop("deep"),
}


def test_a_p2_cannot_change_the_state(flow):
    for name, change in CHANGES_OF_A_READER.items():
        for where in ("loop", "worker"):
            error = read(flow, where=where)(lambda change=change: change(flow))().exception()
            assert isinstance(error, ReadOnlyState), (name, where)
            assert isinstance(error, TypeError)
    assert dict(flow.state) == FIRST


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
        for _ in range(100):
            await asyncio.sleep(0)
        return before, ticks.stat().st_size

    ticking = tick()
    try:
        eventually(ticks.exists)
        before, after = pause().result()
        assert before == after
        eventually(lambda: ticks.stat().st_size > after)
    finally:
        flow.state["number"] = "end"
    ticking.result()


def test_queued_p1_tasks_go_before_queued_p2_tasks(flow):
    @write(flow)
    def append(item):
        flow.state["nested"]["list"].append(item)

    @read(flow)
    def look():
        return len(flow.state["nested"]["list"])

    @read(flow)
    async def look_async():
        return len(flow.state["nested"]["list"])

    with held(flow):
        looks = [look(), look_async()]
        append.map(range(10))
        looks += [look_async(), look()]
    assert [future.result() for future in looks] == [12] * 4
