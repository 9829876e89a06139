"""Workers: `flow.spawn` starts them, watches them, starts them again, and ends them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil
import pytest

from strictflow_mp import StrictFlow, write
from strictflow_mp.flow import workers


@pytest.fixture
def flow():
    with StrictFlow(state={"log": [], "starts": 0}) as flow:
        yield flow


@pytest.fixture
def log(flow):
    @write(flow)
    def log(item):
        flow.state["log"].append(item)

    return log


@pytest.fixture
def start(flow):
    @write(flow)
    def start():
        flow.state["starts"] += 1
        return flow.state["starts"]

    return start


def fail():
    raise LookupError("on purpose")


ENDS = {
    "return": (lambda: 5, 0),
    "sys.exit": (lambda: sys.exit(3), 3),
    "sys.exit without a code": (sys.exit, 0),
    "exception": (fail, 1),
    "os._exit": (lambda: os._exit(7), 7),
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM),
}


def test_a_worker_ends_with_the_exit_code_of_what_it_did(flow):
    groups = {name: flow.spawn(target) for name, (target, _) in ENDS.items()}
    assert all(group.join() for group in groups.values())
    codes = {name: group.exitcodes for name, group in groups.items()}
    assert codes == {name: [code] for name, (_, code) in ENDS.items()}


def test_an_exception_is_printed_with_its_traceback(flow, capfd):
    flow.spawn(fail).join()
    error = capfd.readouterr().err
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.endswith("LookupError: on purpose\n")


def test_workers_are_numbered_when_the_target_takes_a_number(flow, log):
    def numbered(number, text):
        log((number, text)).result()

    def plain(text):
        log(text).result()

    flow.spawn(numbered, "a", processes=3).join()
    flow.spawn(plain, "b", processes=2).join()
    assert sorted(map(str, flow.state["log"])) == ["(1, 'a')", "(2, 'a')", "(3, 'a')", "b", "b"]


def test_a_group_tells_its_workers_and_their_pids(flow, log):
    def wait(number):
        log((number, os.getpid())).result()
        while flow.state["starts"] == 0:
            time.sleep(0.005)

    group = flow.spawn(wait, processes=2)
    assert not group.join(timeout=0)
    assert group.exitcodes == [None, None]
    assert len(group) == 2
    assert [worker.number for worker in group] == [1, 2]
    assert all(worker.is_alive() and psutil.pid_exists(worker.pid) for worker in group)
    flow.state["starts"] = 1
    assert group.join()
    assert {worker.number: worker.pid for worker in group} == dict(flow.state["log"])
    assert [worker.is_alive() for worker in group] == [False, False]
    assert group.join(timeout=0)


def test_a_worker_that_fails_is_started_again_when_the_policy_says_so(flow, start):
    def target():
        sys.exit(start().result() < 4)

    for policy, code, starts in (("never", 1, 1), ("on-failure", 0, 4)):
        group = flow.spawn(target, restart=policy)
        group.join()
        assert (group.exitcodes, flow.state["starts"]) == ([code], starts)
    assert [worker.restarts for worker in group] == [2]


def test_a_worker_that_succeeds_is_started_again_under_always_until_it_is_terminated(flow, start, eventually):
    group = flow.spawn(lambda: start().result(), restart="always")
    eventually(lambda: flow.state["starts"] >= 3)
    assert not group.join(timeout=0)
    group.terminate()
    starts = flow.state["starts"]
    assert not any(worker.is_alive() for worker in group)
    assert group.join(timeout=0)
    assert flow.state["starts"] == starts


def test_a_worker_that_a_signal_killed_is_started_again(flow, start, eventually):
    def target():
        if start().result() == 1:
            time.sleep(60)

    group = flow.spawn(target, restart="on-failure")
    (worker,) = group
    eventually(lambda: flow.state["starts"] == 1)
    worker.kill()
    assert group.join()
    assert (group.exitcodes, flow.state["starts"], worker.restarts) == ([0], 2, 1)


def sleep(start, ignoring=None):
    if ignoring is not None:
        signal.signal(ignoring, signal.SIG_IGN)
    start().result()
    while True:
        time.sleep(60)


def test_terminate_ends_all_and_restarts_none(flow, start, eventually):
    group = flow.spawn(sleep, start, processes=2, restart="always")
    eventually(lambda: flow.state["starts"] == 2)
    group.terminate()
    assert group.exitcodes == [-signal.SIGTERM] * 2
    group.terminate()
    assert (flow.state["starts"], group.join(timeout=0)) == (2, True)


def test_a_worker_that_ignores_sigterm_is_killed(flow, start, eventually, monkeypatch):
    monkeypatch.setattr(workers, "TERMINATE_SECONDS", 0.05)
    group = flow.spawn(sleep, start, signal.SIGTERM)
    eventually(lambda: flow.state["starts"] == 1)
    group.terminate()
    assert group.exitcodes == [-signal.SIGKILL]


def test_a_group_is_a_context_that_joins_and_on_an_exception_terminates(flow, start):
    with flow.spawn(lambda: start().result()) as group:
        pass
    assert (group.exitcodes, flow.state["starts"]) == ([0], 1)
    with pytest.raises(LookupError), flow.spawn(sleep, start) as group:
        raise LookupError
    assert group.exitcodes == [-signal.SIGTERM]


def test_a_worker_may_spawn_and_use_multiprocessing_and_threads(flow, log):
    def inner(name):
        log(name).result()

    def outer():
        import multiprocessing

        process = multiprocessing.get_context("fork").Process(target=inner, args=("process",))
        process.start()
        process.join()
        thread = threading.Thread(target=inner, args=("thread",))
        thread.start()
        thread.join()
        with flow.spawn(inner, "spawned") as group:
            pass
        sys.exit(sum(group.exitcodes) + process.exitcode)

    group = flow.spawn(outer)
    group.join()
    assert group.exitcodes == [0]
    assert flow.state["log"] == ["process", "thread", "spawned"]
