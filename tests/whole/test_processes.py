"""Processes: a handle works in whatever process it comes to; one that goes takes nothing with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from strictflow_mp import StrictFlow, StrictFlowError, TooManyWorkers, write

METHODS = ["fork", "spawn", "forkserver"]
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

shared = StrictFlow("processes", state={"n": 0, "log": []}, max_workers=4)


@write(shared)
def add(n):
    shared.state["n"] += n
    return shared.state["n"]


def add_by_global(n):
    add(n).result()
    assert shared.state["n"] >= n


def add_by_argument(flow, n):
    @write(flow, key="n")
    def more(value):
        return value + n

    more().result()
    assert flow.state["n"] >= n
    return os.getpid()


def read_by_argument(flow):
    return flow.state["n"]


@pytest.fixture
def flow():
    with shared:
        yield shared


def run(context, target, *args):
    process = context.Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("method", METHODS)
def test_a_process_uses_the_flow_as_a_global_and_as_an_argument_named_or_not(flow, method, eventually):
    context = multiprocessing.get_context(method)
    assert flow.state["n"] == 0  # attached before the fork
    with StrictFlow(state={"n": 0}) as unnamed:
        assert run(context, add_by_global, 1) == 0
        for handle in (flow, unnamed):
            assert run(context, add_by_argument, handle, 10) == 0
        assert (flow.state["n"], unnamed.state["n"]) == (11, 10)
    eventually(lambda: [worker.pid for worker in flow.stats().workers] == [os.getpid()])


@pytest.mark.parametrize("method", METHODS)
def test_pools_take_the_handle_as_an_argument_many_times_on_two_slots(flow, method):
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        pids = set(pool.starmap(add_by_argument, [(flow, 1)] * 30))
        assert len(flow.stats().workers) <= 1 + len(pids)
        pool.close()
        pool.join()
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        pids = set(executor.map(add_by_argument, [flow] * 30, [1] * 30))
        assert len(flow.stats().workers) <= 1 + len(pids)
    assert flow.state["n"] == 60


def test_a_forked_child_reads_and_writes_and_leaves_the_parent_alone(flow):
    futures = add.map([1] * 10)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            add(100).result()
            assert shared.state["n"] >= 100
            for use in (futures[-1].result, futures[-1].cancel, lambda: futures[-1].add_done_callback(print)):
                try:
                    use()
                except StrictFlowError as error:
                    assert "parent" in str(error), error  # noqa: PT017
                else:
                    raise AssertionError(use)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    assert [future.result() for future in futures][-1] >= 10
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (flow.state["n"], add(1).result()) == (110, 111)


def test_a_forked_child_takes_its_own_snapshot_and_cannot_use_its_parents(flow):
    with flow.snapshot() as snapshot:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with pytest.raises(StrictFlowError, match="parent"):
                    snapshot["n"]
                with shared.snapshot() as mine:
                    code = mine["n"]
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        flow.put("n", 1).result()
        assert snapshot["n"] == 0


def test_a_child_that_leaves_does_not_stop_the_flow_of_its_parent(flow):
    """Its handle came with the fork, `with` block and owner included."""
    context = multiprocessing.get_context("fork")
    assert run(context, sys.exit, 0) == 0
    assert run(context, flow.close) == 0
    assert flow.state["n"] == 0


SLEEPER = """
from strictflow_mp import StrictFlow
import sys
flow = StrictFlow("processes")
try:
    print(flow.state["n"], flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
sys.stdin.read()
"""


def attached(count):
    """Processes that have attached, or have not found a place; what they said; they end with their input."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    path = os.pathsep.join(filter(None, sys.path))
    pipes["env"] = os.environ | {"PYTHONPATH": path}
    processes = [subprocess.Popen([sys.executable, "-c", SLEEPER], **pipes) for _ in range(count)]
    return processes, [process.stdout.readline().strip() for process in processes]


def leave(processes):
    for process in processes:
        process.communicate()


def test_no_more_than_max_workers_attach_and_a_place_is_free_when_its_holder_dies(flow, eventually):
    assert flow.state["n"] == 0
    processes, said = attached(6)
    try:
        assert sorted(said) == ["0"] * 3 + ["TooManyWorkers"] * 3
        processes[said.index("0")].kill()
        processes[said.index("0")].wait()
        eventually(lambda: len(flow.stats().workers) == 3)
        more, said = attached(1)
        leave(more)
        assert said == ["0"]
    finally:
        leave(processes)


def test_sixteen_processes_use_one_flow_at_once():
    with StrictFlow("sixteen", state={"n": 0}, max_workers=17) as flow:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=add_by_argument, args=(flow, 1)) for _ in range(16)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 16
        assert flow.state["n"] == 16


def test_too_many_workers_is_said_in_the_process_that_is_too_many(flow):
    flow.close()
    processes, said = attached(4)
    try:
        assert said == ["0"] * 4
        with pytest.raises(TooManyWorkers, match="max_workers") as caught:
            flow.state["n"]
        assert caught.value.flow == "processes"
    finally:
        leave(processes)
    assert flow.state["n"] == 0


EARLY = """
import time
from strictflow_mp import StrictFlow
from strictflow_mp.client import reaching as connection

class Clock:
    monotonic = staticmethod(time.monotonic)
    @staticmethod
    def sleep(seconds):
        print("nobody there", flush=True)
        time.sleep(seconds)

connection.time = Clock
print(StrictFlow("late").state["n"])
"""


def test_a_named_handle_attaches_when_its_coordinator_appears():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    early = subprocess.Popen([sys.executable, "-c", EARLY], env=environment, **pipes)
    assert early.stdout.readline() == "nobody there\n"
    with StrictFlow("late", state={"n": 5}):
        assert early.communicate()[0].splitlines()[-1] == "5"


def test_what_a_process_submitted_before_it_was_killed_still_runs(flow, eventually):
    script = """
import os, signal
from strictflow_mp import StrictFlow
from strictflow_mp import write
flow = StrictFlow("processes")
@write(flow)
def log(n):
    flow.state["log"].append(n)
log.map(range(500))
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert flow.state["log"] == list(range(500))
    eventually(lambda: len(flow.stats().workers) == 1)
