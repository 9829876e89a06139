"""Callbacks and awaits: whatever a done callback does, answers go on to arrive."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading

import pytest
from holding import held

from strictflow_mp import StrictFlow, write


@pytest.fixture
def flow():
    with StrictFlow(state={"n": 0}) as flow:
        yield flow


@pytest.fixture
def bump(flow):
    return write(flow, key="n")(lambda n: n + 1)


@pytest.mark.parametrize("raised", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_callback_that_raises_is_logged_and_answers_go_on_to_arrive(flow, bump, raised, caplog):
    called = threading.Event()

    def callback(_):
        called.set()
        raise raised("in a callback")

    bump().result(30)
    future = bump()
    future.add_done_callback(callback)
    assert called.wait(30)
    assert future.result(30) == 2
    assert bump().result(30) == 3
    assert concurrent.futures.wait([bump()], timeout=30).not_done == set()
    assert asyncio.run(asyncio.wait_for(bump_once(bump), 30)) == 5
    assert flow.state["n"] == 5
    assert any("callback" in record.message for record in caplog.records)


async def bump_once(bump):
    return await bump()


def test_a_callback_that_submits_and_waits_several_times(bump):
    heard = []
    ended = threading.Event()

    def callback(_):
        try:
            heard.extend(bump().result(30) for _ in range(3))
        finally:
            ended.set()

    bump().add_done_callback(callback)
    assert ended.wait(60)
    assert len(heard) == 3
    assert max({*heard, bump().result(30)}) == 5


def test_callbacks_within_callbacks(bump):
    heard, ended = [], threading.Event()

    def callback(depth):
        def call(future):
            heard.append(future.result(0))
            if depth:
                bump().add_done_callback(callback(depth - 1))
            else:
                ended.set()

        return call

    bump().add_done_callback(callback(20))
    assert ended.wait(60)
    assert heard == list(range(1, 22))


def test_asyncio_wait_takes_tasks_of_ours_in_futures_of_its_own(bump):
    async def wait():
        done, pending = await asyncio.wait({asyncio.ensure_future(bump()), asyncio.ensure_future(bump())}, timeout=30)
        return sorted(future.result() for future in done), pending

    assert asyncio.run(wait()) == ([1, 2], set())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.wait takes coroutines until 3.10")
def test_a_bare_future_is_refused_by_asyncio_wait_at_once(flow, bump):
    async def wait(future):
        await asyncio.wait({future}, timeout=1)  # who is not refused waits in vain

    with held(flow):
        future = bump()  # nobody answers it meanwhile
        with pytest.raises(TypeError, match="use tasks explicitly"):
            asyncio.run(wait(future))
    assert future.result(30) == 1


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="asyncio.wait refuses coroutines from 3.11 on")
def test_a_bare_future_is_awaited_by_asyncio_wait(bump):
    async def wait():
        with pytest.deprecated_call(match="coroutine objects to asyncio.wait"):
            done, pending = await asyncio.wait({bump(), bump()}, timeout=30)
        return sorted(task.result() for task in done), pending

    assert asyncio.run(wait()) == ([1, 2], set())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TaskGroup came with 3.11")
def test_a_task_group_takes_a_task_of_ours(bump):
    async def group():
        async with asyncio.TaskGroup() as tasks:
            mine = [tasks.create_task(bump()), tasks.create_task(bump())]
        return sorted(task.result() for task in mine)

    assert asyncio.run(group()) == [1, 2]
