"""Life and death of a flow: start, stop, signals, owners that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager, suppress

import psutil
import pytest
from holding import held, is_inside

from strictflow_mp import FlowNotRunning, StrictFlow, StrictFlowError, TaskTimeout, read, write
from strictflow_mp.client import reaching
from strictflow_mp.memory.segment import STOPPED, W_STATUS


@contextmanager
def script(code, *args):
    """A script that runs in a process group of its own; it is killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # also what it has started, which holds its standard output open
        raise
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_start_and_stop_are_idempotent_and_every_start_begins_anew():
    flow = StrictFlow("again", state={"n": 0})
    flow.stop_loop()
    for _ in range(2):
        flow.start_loop()
        flow.start_loop()
        assert (flow.state["n"], flow.stats().version) == (0, 1)
        flow.state["n"] = 1
        flow.stop_loop()
        flow.stop_loop()
    with flow, pytest.raises(LookupError), flow:
        raise LookupError
    assert flow.stop_loop() is None


def test_run_loop_blocks_a_thread_until_the_flow_is_stopped():
    flow = StrictFlow("seed", state={"n": 0})
    thread = threading.Thread(target=flow.run_loop)
    thread.start()
    flow.state["n"] = 1
    assert thread.is_alive()
    flow.stop_loop()
    thread.join()
    with pytest.raises(FlowNotRunning):
        StrictFlow.attach("seed", timeout=0)


def test_run_loop_returns_when_another_process_stops_the_flow(run_python):
    flow = StrictFlow("seed", state={"n": 0})
    thread = threading.Thread(target=flow.run_loop)
    thread.start()
    assert flow.state["n"] == 0
    stop = "from strictflow_mp import StrictFlow; StrictFlow.attach('seed').stop_loop()"
    assert run_python(stop).stderr == ""
    thread.join()
    flow.stop_loop()


def test_stopping_runs_what_is_queued(eventually):
    with StrictFlow(state={"log": []}) as flow:

        @write(flow)
        def log(n):
            flow.state["log"].append(n)
            return len(flow.state["log"])

        with held(flow):
            futures = log.map(range(50))
            stopping = threading.Thread(target=flow.stop_loop)
            stopping.start()
            eventually(lambda: is_inside(stopping, "result"))  # it has asked
        stopping.join()
    assert [future.result() for future in futures] == list(range(1, 51))


def test_stopping_without_draining_refuses_what_is_queued(eventually):
    flow = StrictFlow("refuse", state={"n": None})
    flow.start_loop()
    with held(flow) as running:
        futures = [flow.put("n", n) for n in range(100)]
        stopping = threading.Thread(target=flow.stop_loop, kwargs={"drain": False})
        stopping.start()
        eventually(lambda: is_inside(stopping, "result"))  # it has asked
    stopping.join()
    assert running.exception() is None
    errors = [future.exception() for future in futures]
    assert {(type(error), error.flow) for error in errors} == {(FlowNotRunning, "refuse")}


def test_a_read_after_the_own_stop_fails_at_once(monkeypatch):
    flow = StrictFlow("over", state={"n": 1})
    with flow:
        assert flow.state["n"] == 1
    # To sleep for so long is an error: a use that waits is found out.
    monkeypatch.setattr(reaching, "FIRST_PAUSE_SECONDS", -1)
    for use in (lambda: flow.state["n"], lambda: flow.put("n", 2), flow.snapshot().__enter__, flow.stats):
        with pytest.raises(FlowNotRunning) as caught:
            use()
        assert caught.value.flow == "over"


def test_a_stop_that_takes_too_long_kills_the_task_and_leaves_nothing():
    flow = StrictFlow("stuck", state={"n": 0})
    flow.start_loop()
    with suppress(BrokenPipeError), held(flow) as running:
        queued = flow.put("n", 1)
        with pytest.raises(TaskTimeout, match="killed") as caught:
            flow.stop_loop(timeout=0.05)
        assert caught.value.flow == "stuck"
        for future in (running, queued):
            assert isinstance(future.exception(), StrictFlowError)


def test_a_process_ends_while_a_thread_of_it_waits_until_it_is_let_in(run_python):
    code = """
        import threading
        from strictflow_mp import StrictFlow
        flow = StrictFlow("shut")
        threading.Thread(target=flow.stats, daemon=True).start()
        while not flow._client.is_attaching:
            pass
    """
    with StrictFlow("shut", state={}) as flow, held(flow):
        done = run_python(code, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_task_cannot_stop_its_own_flow():
    with StrictFlow(state={"n": 0}) as flow:
        with pytest.raises(StrictFlowError, match="own flow"):
            write(flow)(flow.stop_loop)().result()
        assert flow.state["n"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_to_all_that_run_in_it_is_not_the_coordinators_business(number):
    with StrictFlow("foreground", state={"n": 0}) as flow:
        pid = flow.stats().coordinator_pid
        os.kill(pid, number)
        flow.put("n", 1).result()
        assert (flow.stats().coordinator_pid, flow.stats().restarts) == (pid, 0)


def test_sigterm_makes_the_coordinator_finish_what_is_queued_and_leave(eventually):
    with StrictFlow("drained", state={"n": 0}) as flow:
        pid = flow.stats().coordinator_pid
        with held(flow):
            futures = [flow.put("n", n) for n in range(50)]
            os.kill(pid, signal.SIGTERM)
        assert [future.exception() for future in futures] == [None] * 50
        eventually(lambda: has_ended(pid))
        with pytest.raises(FlowNotRunning, match="stopped"):
            flow.state["n"]


WORKERS_AT_WORK = """
    import signal, sys, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would ignore it
    from strictflow_mp import StrictFlow, read, write
    flow = StrictFlow("interrupted", state={"n": 0})

    @write(flow)
    def add():
        flow.state["n"] += 1
        time.sleep(0.001)

    @read(flow)
    async def look():
        return flow.state["n"]

    def worker():
        while True:
            add()
            look()
            flow.state["n"]

    if __name__ == "__main__":
        try:
            with flow:
                group = flow.spawn(worker, processes=2, restart=sys.argv[1])
                while flow.state["n"] < 20:
                    pass
                print("ready", flush=True)
                group.join()
        except KeyboardInterrupt:
            print("interrupted")
"""


@pytest.mark.parametrize("restart", ["never", "always"])
def test_ctrl_c_ends_everybody_without_noise(restart):
    with script(WORKERS_AT_WORK, restart) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate()
    assert (output, errors, process.returncode) == ("interrupted\n", "", 0)


OWNER = """
    from strictflow_mp import StrictFlow
    with StrictFlow("orphan", state={"n": 0}) as flow:
        print(flow.stats().coordinator_pid, flush=True)
        input()
"""


def test_a_coordinator_whose_owner_is_killed_cleans_up_and_ends(runtime_dir, eventually):
    with script(OWNER) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
        eventually(lambda: has_ended(pid))
        eventually(lambda: not list(runtime_dir.rglob("*")))


def test_a_flow_whose_owner_is_killed_goes_on_until_the_last_worker_leaves(runtime_dir, eventually):
    with script(OWNER) as owner:
        pid = int(owner.stdout.readline())
        flow = StrictFlow.attach("orphan")
        owner.kill()
        owner.wait()
        eventually(lambda: [worker.pid for worker in flow.stats().workers] == [os.getpid()])
        for n in range(20):
            flow.state["n"] = n
        assert (flow.state["n"], flow.stats().coordinator_pid) == (19, pid)
        flow.close()
        eventually(lambda: has_ended(pid))
    assert not list(runtime_dir.rglob("*"))


def test_a_coordinator_whose_loop_breaks_says_so_and_the_next_one_goes_on(capfd):
    with StrictFlow("broken", state={"n": 0}) as flow:
        flow.put("n", 1).result()

        @read(flow)
        def break_the_loop():
            from strictflow_mp.coordinator.loop import SFLoop

            def fail(self, *args):
                raise ZeroDivisionError("a fault of ours")

            SFLoop._drain = fail

        break_the_loop().result(60)
        assert flow.put("n", 2).result(60) is None
        assert (flow.state["n"], flow.stats().restarts) == (2, 1)
    assert "ZeroDivisionError: a fault of ours" in capfd.readouterr().err


def test_answers_that_are_read_late_are_waited_for_when_the_flow_stops(eventually):
    code = """
        import sys
        from strictflow_mp import StrictFlow, write
        flow = StrictFlow("patient")
        answer = write(flow)(lambda number: bytes([number]) * 200_000)
        flow.put("attached", True).result()
        futures = [answer(number) for number in range(50)]
        flow.state["attached"]
        print("submitted", flush=True)
        sys.stdin.readline()
        assert [future.result() for future in futures] == [bytes([number]) * 200_000 for number in range(50)]
        print("done", flush=True)
    """
    with StrictFlow("patient", state={}) as flow, script(code) as process:
        assert process.stdout.readline() == "submitted\n"
        segment = flow._client.attach().segment
        stopping = threading.Thread(target=flow.stop_loop)
        stopping.start()
        eventually(lambda: segment.words[W_STATUS] == STOPPED)
        process.stdin.write("read\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n", process.stderr.read()
        stopping.join()
