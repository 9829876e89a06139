"""Tasks that are made anew at each call are forgotten when nobody has them any more; what they have submitted runs."""

from __future__ import annotations

import gc
import os
import signal

import pytest

from strictflow_mp import StrictFlow, StrictFlowError, write
from strictflow_mp.client import introducing
from strictflow_mp.coordinator import requests

COUNT = 300
KNOWN = 150


def fleeting(flow, number):
    """Submit a task of which nobody keeps anything but the future."""

    @write(flow)
    def add():
        flow.state["n"] += number
        return number

    return add()


def functions(flow):
    """How many functions this process may have to send again."""
    return len(flow._client.attach().function_frames)


@pytest.fixture
def flow():
    with StrictFlow(state={"n": 0}) as flow:

        @write(flow)
        def know_few():
            from strictflow_mp.coordinator import requests

            requests.MAX_FUNCTIONS = KNOWN

        know_few().result(30)
        yield flow


def test_more_than_the_coordinator_would_keep(flow):
    assert requests.MAX_FUNCTIONS > COUNT  # here it is another one
    for number in range(COUNT):
        assert fleeting(flow, number).result(30) == number
    assert functions(flow) < KNOWN
    assert flow.state["n"] == sum(range(COUNT))


def test_tasks_that_are_kept_are_not_forgotten(flow):
    kept = [write(flow)(lambda number=number: number) for number in range(5)]
    for _ in range(3):
        assert [task().result(30) for task in kept] == list(range(5))
        for number in range(KNOWN):
            fleeting(flow, number).result(30)
    assert [task().result(30) for task in kept] == list(range(5))


def test_what_is_still_to_run_runs_under_the_next_coordinator(eventually):
    with StrictFlow(state={"n": 0}) as flow:
        first = fleeting(flow, 0).result(30)
        flow._client.attach().unused_limit = 4  # few enough for their frames to find room in the pipe
        coordinator = flow.stats().coordinator_pid
        os.kill(coordinator, signal.SIGSTOP)
        futures = [fleeting(flow, number) for number in range(1, 21)]
        gc.collect()
        assert functions(flow) >= 20  # their calls are pending
        os.kill(coordinator, signal.SIGKILL)
        assert [first, *[future.result(30) for future in futures]] == list(range(21))
        assert flow.state["n"] == sum(range(21))
        for number in range(COUNT):
            fleeting(flow, number).result(30)
        assert functions(flow) < KNOWN


def test_too_many_at_a_time_are_refused_here(flow, monkeypatch):
    monkeypatch.setattr(introducing, "MAX_FUNCTIONS", 20)
    kept = [write(flow)(lambda number=number: number) for number in range(25)]
    with pytest.raises(StrictFlowError, match="more than 20 tasks that this process keeps"):
        [task() for task in kept]
    assert kept[0]().result(30) == 0
