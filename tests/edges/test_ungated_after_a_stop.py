"""Reads that do not wait for the gate notice a clean stop too: they go on with the next flow of that name, or raise."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import contextmanager

import pytest

from strictflow_mp import FlowNotRunning, StrictFlow

pytestmark = pytest.mark.once

NAME = "stopped-and-started"

OWNER = f"""
import sys
from strictflow_mp import StrictFlow
with StrictFlow({NAME!r}, state={{"price": int(sys.argv[1])}}):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def served(price):
    """A flow that another process owns, until it is stopped in the order of things."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(price)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout.readline() == "ready\n"
        yield
        owner.stdin.close()
        assert owner.wait(30) == 0


async def take(flow):
    async with flow.snapshot(gated=False) as snapshot:
        return snapshot["price"]


READS = {
    "peek": lambda flow: flow.peek("price"),
    "snapshot": lambda flow: flow.snapshot(gated=False)["price"],
    "async snapshot": lambda flow: asyncio.run(take(flow)),
    "attach": lambda flow: StrictFlow.attach(NAME, timeout=0.1).peek("price"),
}


@pytest.mark.parametrize("name", READS)
def test_they_follow_the_next_flow(name):
    flow, look = StrictFlow(NAME), READS[name]
    for price in (1, 2, 3):
        with served(price):
            assert look(flow) == price
            assert look(flow) == price
    flow.close()


@pytest.mark.parametrize("name", READS)
def test_they_raise_when_there_is_none(name):
    flow, look = StrictFlow(NAME), READS[name]
    with served(1):
        assert look(flow) == 1
    for _ in range(2):
        with pytest.raises(FlowNotRunning, match=NAME):
            look(flow)
    flow.close()


def test_a_snapshot_that_was_taken_stays_what_it_is():
    flow = StrictFlow(NAME)
    with served(1):
        snapshot = flow.snapshot(gated=False)
        assert snapshot["price"] == 1
    with served(2):
        assert snapshot["price"] == 1
        assert flow.peek("price") == 2
    snapshot.close()
    flow.close()
