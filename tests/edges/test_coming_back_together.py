"""Several threads of a process notice a death; one comes back while the others still find out that somebody died."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest

from strictflow_mp import StrictFlow
from strictflow_mp.client import client, comeback
from strictflow_mp.client.attachment import Attachment
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

MOMENTS = {
    "before it is noted that somebody has died": (client, "may_return", 1),
    "before it is looked at who serves": (Attachment, "is_served", 2),
    "after that": (comeback, "has_successor", 1),
}
"""Where, and at which call of that."""


@pytest.fixture
def flow():
    with StrictFlow("together", state={"n": 0}) as flow:
        assert flow.state["n"] == 0
        yield flow


def submit_and_kill(flow, number):
    """The P1 is on its way when the coordinator dies, so that a read has to wait for the next one."""
    coordinator = Place.of(flow.name).resident().pid
    os.kill(coordinator, signal.SIGSTOP)
    future = flow.put("n", number)
    os.kill(coordinator, signal.SIGKILL)
    return future


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_thread_that_waits_at_the_gate_goes_on_when_another_one_has_come_back(flow, monkeypatch, moment):
    monkeypatch.setattr(comeback, "EXPELLED_SECONDS", 0)  # it has taken longer to come back
    where, name, last = MOMENTS[moment]
    whole = getattr(where, name)
    came_back, calls = [], []

    def come_back_first(*args):
        calls.append(args)
        if len(calls) < last:
            return whole(*args)
        monkeypatch.setattr(where, name, whole)
        attachment = flow._client._attachment
        restarts = attachment.restarts
        comeback.come_back(attachment, attachment.stream, None)  # as another thread does, which has its answer too
        came_back.append((attachment.restarts - restarts, future.result(30)))
        return whole(*args)

    monkeypatch.setattr(where, name, come_back_first)
    future = submit_and_kill(flow, 1)
    assert flow.state["n"] == 1
    assert came_back == [(1, None)]

    # A death long after that has its own time until it is taken for the end.
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    monkeypatch.setattr(comeback, "time", later)
    assert submit_and_kill(flow, 2).result() is None
    assert flow.state["n"] == 2
    assert flow.stats().restarts == 2
