"""Reload: the next coordinator is a fresh interpreter on the same state, and nobody loses anything by it."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager, suppress

import pytest
from holding import held

from strictflow_mp import CoordinatorLost, StrictFlow, StrictFlowError, TaskTimeout, read, write
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

NAME = "renewed"
RESOLVED = 30.0
"""Seconds in which a future has to be resolved; so long only for machines that are very busy."""

by_name = StrictFlow(NAME)


@write(by_name)
def note(number):
    by_name.state["seen"] = [*by_name.state.get("seen", ()), (number, os.getpid())]


@write(by_name)
def note_later(number):
    """Submits one more, of which nobody but the coordinator knows."""
    note(number + 1)
    note(number)


@read(by_name)
async def pid_after(key):
    import asyncio

    while key not in by_name.state:
        await asyncio.sleep(0.01)
    return os.getpid()


@pytest.fixture(params=[True, False], ids=["restart", "no-restart"])
def flow(request):
    with StrictFlow(NAME, state={"n": 0}, restart=request.param) as flow:
        yield flow


def test_it_is_another_process_on_the_same_state_and_the_pause_is_told(flow):
    flow.state["n"] = 42
    before = flow.stats()
    pause = flow.reload()
    assert 0 < pause < 60
    after = flow.stats()
    assert after.coordinator_pid != before.coordinator_pid
    assert (after.restarts, after.reloads) == (1, 1)
    assert flow.state["n"] == 42
    flow.state["n"] += 1
    assert flow.state["n"] == 43


def test_it_may_be_done_many_times_in_a_row_and_is_no_failure(flow):
    for number in range(12):  # more often than a coordinator may fail at once
        assert flow.reload() > 0
        flow.state["n"] = number
    assert flow.stats().reloads == 12
    assert flow._owner.is_alive


def test_queued_tasks_run_in_the_next_one_in_order_and_once(flow):
    with held(flow):
        before = Place.of(NAME).resident().pid
        futures = [note(number) for number in range(100)]
        reloading = in_thread(flow.reload)
    assert [future.result(RESOLVED) for future in futures] == [None] * 100
    assert reloading() > 0
    seen = flow.state["seen"]
    assert [number for number, _ in seen] == list(range(100))
    assert seen[-1][1] != before or len({pid for _, pid in seen}) == 1  # in 0.1 s all may have run


def in_thread(function):
    """Starts it; what is returned waits for what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()

    def result():
        thread.join(RESOLVED)
        return results[0]

    return result


def test_what_takes_long_and_is_queued_behind_it_runs_in_the_next_one(flow, monkeypatch):
    slow = write(flow)(_slowly)
    futures = [slow(number) for number in range(12)]
    flow.reload()
    pids = [future.result(RESOLVED) for future in futures]
    assert len(set(pids)) == 2
    assert pids == sorted(pids, key=pids.index)  # first all of the one, then all of the other
    assert pids[-1] == flow.stats().coordinator_pid
    assert flow.state["order"] == tuple(range(12))


def _slowly(number):
    import time

    time.sleep(0.1)
    by_name.state["order"] = (*by_name.state.get("order", ()), number)
    return os.getpid()


def test_what_tasks_have_submitted_is_not_lost(flow):
    with held(flow):
        futures = [note_later(number * 10) for number in range(50)]
        reloading = in_thread(flow.reload)
    for future in futures:
        future.result(RESOLVED)
    reloading()
    numbers = sorted(number for number, _ in flow.state["seen"])
    assert numbers == sorted([*range(0, 500, 10), *range(1, 500, 10)])


@contextmanager
def submitter(then):
    """A process that is attached, and submits 100 P1 tasks when it is told to; *then* is what it does after that."""
    code = f"""
        import os, time
        from strictflow_mp import StrictFlow
        flow = StrictFlow("renewed")
        words = flow._client.attach().segment.words
        print("attached", flush=True)
        input()
        for number in range(100):
            flow.put(("from", number), number)
        {then}
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "attached\n"

        def go():
            process.stdin.write("\n")
            process.stdin.flush()

        yield process, go


def test_what_a_process_that_has_ended_had_submitted_is_not_lost(flow, eventually):
    with submitter("os._exit(0)") as (process, go):
        with held(flow):
            go()
            assert process.wait(RESOLVED) == 0
            reloading = in_thread(flow.reload)
        reloading()
    eventually(lambda: len(flow.state) == 101)
    assert flow.stats().reloads == 1


def test_a_process_that_ends_in_order_sends_what_the_last_one_did_not_run(flow, monkeypatch, eventually):
    waits = "\n        while words[10] == 0: time.sleep(0.01)  # it looks at nothing else meanwhile"
    with submitter(waits) as (process, go):
        slow = [write(flow)(_slowly)(number) for number in range(5)]
        go()
        reloading = in_thread(flow.reload)
        reloading()
        assert process.wait(RESOLVED) == 0
    for future in slow:
        future.result(RESOLVED)
    eventually(lambda: len(flow.state) == 102)


def test_async_reads_that_are_under_way_begin_anew_and_answer(flow):
    future = pid_after("there")
    flow.put("n", 1).result(RESOLVED)
    flow.reload()
    flow.put("there", 1).result(RESOLVED)
    assert future.result(RESOLVED) == flow.stats().coordinator_pid


def test_readers_do_not_notice(flow):
    flow.state["n"] = 7
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(flow.state["n"])

    looking = in_thread(look)
    for _ in range(3):
        flow.reload()
    stop.set()
    looking()
    assert set(seen) == {7}


def test_a_watch_goes_on(flow):
    with flow.watch("n") as changes:
        flow.reload()
        flow.state["n"] = "after"
        assert next(iter(changes)).value == "after"


def test_two_that_ask_at_a_time_get_one_reload_or_two(flow, run_python):
    code = "from strictflow_mp import StrictFlow; print(StrictFlow('renewed').reload() > 0)"
    other = in_thread(lambda: run_python(code))
    flow.reload()
    assert other().stdout == "True\n"
    assert flow.stats().reloads in (1, 2)


def test_new_code_is_loaded(flow, tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text("def word(): return 'old'\n")
    monkeypatch.syspath_prepend(tmp_path)
    code = "import told, sys\nfrom strictflow_mp import StrictFlow, read\n"
    code += "print(read(StrictFlow('renewed'))(told.word)().result(30))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True) == "old\n"
    (tmp_path / "told.py").write_text("def word(): return 'new, and longer'\n")
    flow.reload()
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True) == "new, and longer\n"
    told = importlib.import_module("told")
    monkeypatch.delitem(sys.modules, "told")
    assert told.word() == "new, and longer"


def test_who_has_no_owner_is_told_so_and_what_to_do(run_python, eventually):
    code = """
        import os
        from strictflow_mp import StrictFlow
        StrictFlow("renewed", state={"n": 5}).start_loop()
        print("serves", flush=True)
        input()
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert any("serves" in line for line in iter(owner.stdout.readline, ""))
        flow = StrictFlow.attach(NAME)
        assert flow.state["n"] == 5
        owner.stdin.write("\n")
        owner.stdin.flush()
        owner.wait(RESOLVED)
    with pytest.raises(StrictFlowError, match=r"no process owns it .* `strictflow-mp serve renewed`"):
        flow.reload()
    assert flow.state["n"] == 5  # it goes on
    flow.stop_loop()


def test_a_task_cannot_reload_its_own_flow(flow):
    with pytest.raises(StrictFlowError, match="a task cannot reload"):
        write(flow)(flow.reload)().result(RESOLVED)


@write(by_name)
def again_and_again():
    if "enough" not in by_name.state:
        again_and_again()


def test_tasks_that_submit_tasks_without_end_hold_it_up_for_a_while_and_then_it_says_so(flow):
    @read(flow)
    def shorten():
        from strictflow_mp.coordinator import reloads

        reloads.PATIENCE_SECONDS = 0.2

    shorten().result(RESOLVED)
    pid = flow.stats().coordinator_pid
    again_and_again()
    with pytest.raises(TaskTimeout, match="not reloaded"):
        flow.reload()
    flow.put("enough", True).result(RESOLVED)
    assert flow.stats().coordinator_pid == pid
    flow.reload()


def test_a_coordinator_that_is_killed_while_it_is_asked_answers_all_the_same(flow):
    if not flow._options["restart"]:
        pytest.skip("then nobody starts the next one")
    pid = flow.stats().coordinator_pid
    os.kill(pid, signal.SIGSTOP)
    reloading = in_thread(flow.reload)
    os.kill(pid, signal.SIGKILL)
    assert reloading() > 0
    assert flow.stats().coordinator_pid != pid


def test_without_restart_a_death_is_still_a_death():
    with StrictFlow(NAME, state={"n": 0}, restart=False) as flow:
        flow.reload()
        pid = flow.stats().coordinator_pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(CoordinatorLost):
            flow.put("n", 1).result(RESOLVED)
        with suppress(StrictFlowError):
            flow.stop_loop()
