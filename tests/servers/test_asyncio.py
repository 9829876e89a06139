"""The event loop goes on while we wait, asyncio's own and uvloop; what is cancelled is over, here and in SF-LOOP."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
import uvloop
from holding import held
from servers import PATIENCE

from strictflow_mp import StrictFlow, write

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def run(request):
    """Run a coroutine to its end on a loop of either kind."""

    def run(main):
        loop = LOOPS[request.param]()
        try:
            return loop.run_until_complete(asyncio.wait_for(main, PATIENCE))
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    return run


@pytest.fixture
def flow():
    with StrictFlow("async", state={"a": 0}) as flow:
        yield flow


async def turns(number=50):
    """The loop goes round that often: it could not if somebody blocked it."""
    for _ in range(number):
        await asyncio.sleep(0.001)


async def take(flow):
    async with flow.snapshot() as snapshot:
        return dict(snapshot)


async def cancelled_while_held(flow, begin):
    """Wait for something that a P1 holds up, and cancel that; the P1 goes on."""
    with held(flow) as task:
        waiting = asyncio.ensure_future(begin())
        await turns(5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not task.done()
    await task


async def first(watch):
    async for change in watch:
        return change.value
    return "ended"


def increment(flow):
    @write(flow, key="a")
    def increment(value):
        return value + 1

    return increment


def test_the_loop_goes_on_while_a_future_is_awaited(flow, run):
    async def main():
        with held(flow) as task:
            waiting = asyncio.ensure_future(increment(flow)())
            await turns()
            assert not waiting.done()
            assert not task.done()
        assert await waiting == 1
        await task

    run(main())
    assert flow.state["a"] == 1


def test_the_loop_goes_on_while_a_snapshot_waits_at_the_gate(flow, run):
    async def main():
        with held(flow, a=7) as task:
            waiting = asyncio.ensure_future(take(flow))
            await turns()
            assert not waiting.done()
            assert not task.done()
        assert await waiting == {"a": 7}

    run(main())


def test_a_gate_that_closes_after_the_look_does_not_block_the_loop(flow, run):
    """Another process may submit between the look whether a snapshot must wait and the taking of it."""

    async def main():
        assert flow.state["a"] == 0
        with held(flow, a=7) as task:
            snapshot = flow.snapshot()
            look, snapshot._look = snapshot._look, lambda: flow.state._reader_at_once(False)  # it was open
            assert look() is None
            async with snapshot:
                assert dict(snapshot) == {"a": 0}
                await turns()
                assert not task.done()

    blocked = threading.Timer(PATIENCE, os._exit, (1,))
    blocked.start()
    run(main())
    blocked.cancel()


def test_the_loop_goes_on_while_a_watch_has_nothing_to_tell(flow, run):
    async def main():
        with flow.watch("a") as watch:
            waiting = asyncio.ensure_future(first(watch))
            await turns()
            assert not waiting.done()
            await flow.put("a", 5)
            assert await waiting == 5

    run(main())


def test_more_snapshots_wait_than_the_loop_has_threads_and_its_other_work_goes_on(flow, run):
    async def main():
        with held(flow, a=7):
            waiting = [asyncio.ensure_future(take(flow)) for _ in range(40)]
            await turns()
            assert await asyncio.get_running_loop().run_in_executor(None, os.getpid) == os.getpid()
            assert not any(task.done() for task in waiting)
        assert await asyncio.gather(*waiting) == [{"a": 7}] * 40

    run(main())


def test_a_call_whose_awaiting_is_cancelled_is_taken_back(flow, run):
    run(cancelled_while_held(flow, increment(flow)))
    assert flow.state["a"] == 0


def test_a_snapshot_that_is_cancelled_at_the_gate_keeps_no_pin(flow, run, eventually):
    run(cancelled_while_held(flow, lambda: take(flow)))
    attachment = flow._client.attach()
    eventually(lambda: not attachment.pins.are_held)


def test_a_watch_whose_iteration_is_cancelled_can_be_gone_on_with(flow, run):
    async def main():
        with flow.watch("a") as watch:
            for number in range(1, 6):
                waiting = asyncio.ensure_future(first(watch))
                await turns(number)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                await flow.put("a", number)
                assert await first(watch) == number

    run(main())


def test_a_watch_that_is_closed_ends_its_iteration(flow, run):
    async def main():
        watch = flow.watch("a")
        waiting = asyncio.ensure_future(first(watch))
        await turns(5)
        watch.close()
        assert await waiting == "ended"

    run(main())
