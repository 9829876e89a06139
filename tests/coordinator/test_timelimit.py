"""Time limits: a task that runs too long is stopped and rolled back, whatever it does against it."""

from __future__ import annotations

import asyncio
import inspect
import time

import pytest

from strictflow_mp import StrictFlow, TaskTimeout, read, write


def spin():
    while True:
        pass


def swallow():
    try:
        time.sleep(20)
    except:  # noqa: E722
        pass


def swallow_again_and_again():
    for _ in range(3):
        swallow()


def swallow_and_fail():
    swallow()
    raise LookupError("too late")


async def wait_long():
    await asyncio.sleep(60)


async def block():
    time.sleep(0.2)


def test_a_task_that_runs_too_long_is_stopped_and_rolled_back():
    with StrictFlow(state={"number": 7}) as flow:
        for body in (spin, swallow, swallow_again_and_again, swallow_and_fail, wait_long, block):

            def sync_write(body=body):
                flow.state["number"] = 8
                body()

            async def async_write(body=body):
                flow.state["number"] = 8
                await body()

            writes = async_write if inspect.iscoroutinefunction(body) else sync_write
            for task in (write(flow, timeout=0.1)(writes), read(flow, timeout=0.1)(body)):
                with pytest.raises(TaskTimeout, match="longer than its timeout") as caught:
                    task().result(timeout=30)  # who is stopped only once takes longer
                assert isinstance(caught.value, TimeoutError), body
                assert caught.value.flow == flow.name
                assert flow.state["number"] == 7, body
        flow.put("number", 9).result()
        assert flow.state["number"] == 9


def test_task_timeout_is_the_default_for_every_task():
    with StrictFlow(task_timeout=0.05) as flow:
        for decorate, body in ((write, spin), (write, wait_long), (read, spin), (read, wait_long)):
            assert type(decorate(flow)(body)().exception()) is TaskTimeout
        assert write(flow, timeout=60)(time.sleep)(0.1).result() is None


def test_a_timeout_error_of_the_task_itself_is_not_taken_for_ours():
    async def task():
        raise asyncio.TimeoutError("mine")

    with StrictFlow() as flow:
        for decorate in (write, read):
            with pytest.raises(asyncio.TimeoutError, match=r"^mine$"):
                decorate(flow, timeout=60)(task)().result()
