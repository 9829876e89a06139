"""A handle that is closed while something of it is still open: its place is free when the last of that is gone."""

from __future__ import annotations

import gc
import os
import signal
import threading

import pytest

from strictflow_mp import FlowNotRunning, StrictFlow
from strictflow_mp.store import pins
from strictflow_mp.system.machine import FREE_THREADED

np = pytest.importorskip("numpy")


@pytest.fixture
def flow():
    with StrictFlow(state={"n": 1, "row": np.arange(10)}, max_workers=3) as flow:
        yield flow


def places(flow):
    """How many places are taken, this process's own included."""
    return len(flow.stats().workers)


def open_snapshot(flow):
    snapshot = flow.snapshot()
    assert snapshot["n"] == 1
    return snapshot


def open_array(flow):
    return flow.state["row"]


def several(flow):
    return [open_snapshot(flow), open_array(flow), open_snapshot(flow)]


@pytest.mark.parametrize("opened", [open_snapshot, open_array, several])
def test_a_place_is_free_when_the_last_that_was_open_is_gone(flow, opened, eventually):
    for _ in range(5):  # there are three
        held = opened(flow)
        flow.close()
        del held
        gc.collect()
        eventually(lambda: places(flow) == 1)


@pytest.mark.parametrize("opened", [open_snapshot, *([] if FREE_THREADED else [open_array])])  # there it is a copy
def test_a_place_stays_taken_while_something_is_open_also_when_the_process_attaches_anew(flow, opened, eventually):
    held = opened(flow)
    former = flow._client.attach()
    flow.close()
    for n in range(2, 20):
        flow.state["n"] = n  # attaches anew
        flow.state["row"] = np.arange(10) + n
    assert flow._client.attach().slot != former.slot
    assert places(flow) == 2
    if opened is open_snapshot:
        assert held["n"] == 1, "what it has pinned is there"
        assert held["row"].tolist() == list(range(10)), "and may be looked at for the first time"
        held.close()
    else:
        assert held.tolist() == list(range(10))
    del held
    gc.collect()
    eventually(lambda: places(flow) == 1)


def test_a_slot_that_was_given_to_another_is_not_touched_any_more(flow, eventually):
    snapshot = open_snapshot(flow)
    former = flow._client.attach()
    flow.close()
    flow.put("n", 2).result()  # now there is a version that the former slot does not hold
    with pytest.raises(FlowNotRunning, match="closed while"):
        former.reader.pin()
    snapshot.close()
    eventually(lambda: places(flow) == 1)


def test_a_handle_that_is_closed_in_the_midst_of_a_pin_keeps_its_place(flow, monkeypatch, eventually):
    # As a signal handler that closes the flow over its own thread: nobody can say what that will still store.
    fence = pins.fence

    def close_and_fence():
        monkeypatch.setattr(pins, "fence", fence)
        flow.close()
        fence()

    monkeypatch.setattr(pins, "fence", close_and_fence)
    with open_snapshot(flow) as snapshot:
        assert places(flow) == 2
        assert snapshot["n"] == 1
    assert places(flow) == 2


def test_another_process_may_have_the_place_while_this_one_lives(flow, eventually):
    kept = [open_snapshot(flow)]
    flow.close()
    kept.append(open_snapshot(flow))
    flow.close()
    assert places(flow) == 3
    for snapshot in kept:
        snapshot.close()
    eventually(lambda: places(flow) == 1)
    assert flow.spawn(use, flow).join(60)


def use(flow):
    threading.Thread(target=flow.close).start()
    assert flow.state["n"] == 1


def test_a_process_that_attaches_anew_after_a_takeover_loses_the_former_place_when_its_pins_go(flow, eventually):
    snapshot = open_snapshot(flow)
    restarts, pid = flow.stats().restarts, flow.stats().coordinator_pid
    os.kill(pid, signal.SIGKILL)
    flow.close()
    eventually(lambda: flow.stats().restarts == restarts + 1)
    assert places(flow) == 2
    assert snapshot["n"] == 1
    snapshot.close()
    eventually(lambda: places(flow) == 1)


def test_a_process_may_end_with_everything_open(flow, eventually, run_python):
    program = """
        import sys
        from strictflow_mp import StrictFlow
        flow = StrictFlow(sys.argv[1])
        snapshot, row = flow.snapshot(), flow.state["row"]
        assert snapshot["n"] == 1
    """
    ended = run_python(program, flow.name)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")
    flow.state["n"] = 2
    eventually(lambda: places(flow) == 1)
