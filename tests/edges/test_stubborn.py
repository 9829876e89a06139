"""A task that swallows its cancellation is settled at its deadline all the same, and a stop does not wait for it."""

from __future__ import annotations

import asyncio
import time

import pytest

from strictflow_mp import StrictFlow, TaskTimeout, read, write


async def stubborn():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


@pytest.fixture
def flow():
    flow = StrictFlow(state={"n": 0})
    flow.start_loop()
    yield flow
    flow.stop_loop(timeout=30)


def test_an_async_p2_that_swallows_its_cancellation_is_settled_at_its_deadline(flow):
    @read(flow, timeout=0.3)
    async def p2():
        await stubborn()

    with pytest.raises(TaskTimeout):
        p2().result(30)
    flow.put("n", 1).result(30)
    assert flow.state["n"] == 1
    assert flow.stats().restarts == 0


def test_an_async_p2_that_answers_its_cancellation_late_is_not_heard(flow):
    @read(flow, timeout=0.3)
    async def p2():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)
            return "late"

    with pytest.raises(TaskTimeout):
        p2().result(30)


def test_an_async_p1_whose_child_swallows_its_cancellation_ends(flow):
    @write(flow)
    async def p1():
        child = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        flow.state["n"] = 7
        return child is not None

    assert p1().result(30) is True
    assert flow.state["n"] == 7


def test_a_flow_stops_though_a_p2_swallows_its_cancellation():
    flow = StrictFlow(state={"n": 0})
    flow.start_loop()

    @read(flow)
    async def p2():
        await stubborn()

    running = p2()
    flow.put("n", 1).result(30)
    began = time.monotonic()
    flow.stop_loop(drain=False, timeout=20)
    assert time.monotonic() - began < 20
    assert running.exception(1) is not None


def test_a_p1_that_swallows_everything_is_stopped_with_the_coordinator(flow):
    @write(flow, timeout=0.3)
    def p1():
        while True:
            try:
                time.sleep(10)
            except BaseException:
                pass

    with pytest.raises(TaskTimeout):
        p1().result(60)
    assert flow.put("n", 1).result(30) is None
