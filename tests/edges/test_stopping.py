"""Stops that meet a takeover, a coordinator that stands still, or a task that does not end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from holding import held, is_inside

from strictflow_mp import StrictFlow, StrictFlowError, TaskTimeout
from strictflow_mp.flow import owner as owners
from strictflow_mp.flow import stopping, supervisor
from strictflow_mp.memory.leftovers import sweep
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

FULL = 1 << 21
"""Bytes that no pipe holds."""


@pytest.fixture
def flow() -> Iterator[StrictFlow]:
    """A flow that runs, and that its owner has not used."""
    flow = StrictFlow("ending", state={"n": 0})
    flow.start_loop()
    yield flow
    with suppress(StrictFlowError):
        flow.stop_loop(timeout=0.1)


def coordinator() -> int:
    resident = Place.of("ending").resident()
    assert resident is not None
    return resident.pid


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Stop(threading.Thread):
    """`stop_loop` in a thread; what it raised."""

    def __init__(self, flow: StrictFlow, timeout: float | None = None) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._stop_it: Callable[[], None] = lambda: flow.stop_loop(timeout=timeout)
        self.start()

    def run(self) -> None:
        try:
            self._stop_it()
        except BaseException as error:
            self.error = error


@contextmanager
def ends(flow: StrictFlow, eventually: Callable[..., object], timeout: float | None = None) -> Iterator[Stop]:
    """A stop begins, and has ended after the block; if it does not, its coordinator is killed."""
    pid = coordinator()
    stop = Stop(flow, timeout)
    try:
        yield stop
        eventually(lambda: not stop.is_alive(), timeout=14)
    finally:
        if stop.is_alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        stop.join()


def test_a_stop_with_a_timeout_keeps_it_though_the_coordinator_stands_still(flow, eventually):
    with standing_still(coordinator()), ends(flow, eventually, timeout=0.3) as stop:
        pass
    assert isinstance(stop.error, TaskTimeout)
    assert "had not answered" in str(stop.error)
    assert not flow.is_running


def test_a_stop_with_a_timeout_keeps_it_behind_a_long_task_of_another_process(flow, tmp_path, eventually):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = f"""
from strictflow_mp import StrictFlow, write

flow = StrictFlow("ending")

@write(flow)
def hold():
    open({str(fifo)!r}).read()

hold().exception()
"""
    worker = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    try:
        with suppress(BrokenPipeError), open(fifo, "w"):  # opens when the task has opened it
            with ends(flow, eventually, timeout=0.3) as stop:
                pass
            assert isinstance(stop.error, TaskTimeout)
            assert not flow.is_running
    finally:
        worker.wait(20)


def test_a_stop_with_a_timeout_keeps_it_while_a_thread_submits_into_a_full_pipe(flow, eventually):
    flow.state["n"] = 1
    attachment = flow._client.attach()
    with standing_still(coordinator()):
        submit = threading.Thread(target=flow.put, args=("n", bytes(FULL)))
        submit.start()
        eventually(lambda: attachment.outgoing.last.seq and is_inside(submit, "flush"))
        with ends(flow, eventually, timeout=0.3) as stop:
            pass
    submit.join()
    assert isinstance(stop.error, TaskTimeout)


def test_a_stop_of_another_process_with_a_timeout_says_that_it_has_not_ended(flow, run_python):
    code = """
        from strictflow_mp import StrictFlow, TaskTimeout
        try:
            StrictFlow("ending").stop_loop(timeout=0.2)
        except TaskTimeout as error:
            print(error)
    """
    with held(flow):
        said = run_python(code)
    assert "has not ended" in said.stdout
    assert not said.stderr


def test_a_stop_that_finds_a_dead_coordinator_asks_the_next_one(flow, monkeypatch, eventually):
    asked, begun, may_begin = [], threading.Event(), threading.Event()
    launch, ask = owners.start_coordinator, owners.ask_to_stop

    def late(*args):
        begun.set()
        may_begin.wait()
        return launch(*args)

    def noted(*args, **options):
        try:
            answer = ask(*args, **options)
        finally:
            asked.append(1)
        return answer

    monkeypatch.setattr(owners, "start_coordinator", late)
    monkeypatch.setattr(owners, "ask_to_stop", noted)
    os.kill(coordinator(), signal.SIGKILL)
    begun.wait()
    with ends(flow, eventually) as stop:
        eventually(lambda: asked)
        may_begin.set()
    assert stop.error is None
    assert not flow.is_running


STOP_AFTER_A_KILL = """
    import os, signal, sys
    from strictflow_mp import StrictFlow, TaskTimeout
    from strictflow_mp.system.place import Place

    flow = StrictFlow("ending")
    if sys.argv[1] == "closed again":
        flow.state["n"]
        flow.close()
    os.kill(Place.of("ending").resident().pid, signal.SIGKILL)
    try:
        flow.stop_loop(timeout=float(sys.argv[2]) or None)
    except TaskTimeout as error:
        print(error)
"""


@pytest.mark.parametrize("before", ["never attached", "closed again"])
def test_a_stop_of_a_process_that_is_not_attached_asks_the_next_coordinator_too(before, flow, eventually, run_python):
    said = run_python(STOP_AFTER_A_KILL, before, 0)
    assert (said.stdout, said.stderr) == ("", "")
    eventually(lambda: not flow.is_running)
    assert flow._owner.child.exitcode == 0  # the next one was asked, and has removed everything
    assert not Place.of("ending").directory.exists()


def test_a_stop_of_a_process_that_is_not_attached_keeps_its_timeout_when_no_coordinator_comes(
    flow, monkeypatch, run_python
):
    launch, may_begin = owners.start_coordinator, threading.Event()

    def late(*args):
        may_begin.wait()
        return launch(*args)

    monkeypatch.setattr(owners, "start_coordinator", late)
    try:
        said = run_python(STOP_AFTER_A_KILL, "never attached", 0.2)
    finally:
        may_begin.set()
    assert "has not ended" in said.stdout
    assert not said.stderr


@pytest.mark.parametrize("owner", ["has died", "starts nobody"])
def test_a_stop_waits_for_nobody_where_no_owner_would_start_the_next_coordinator(
    owner, eventually, run_python, monkeypatch
):
    class NoPauses:
        def sleep(self, deadline):
            pytest.fail("it waited")

    monkeypatch.setattr(stopping, "Pauses", NoPauses)
    if owner == "has died":
        code = """
            import os
            from strictflow_mp import StrictFlow

            flow = StrictFlow("ending", state={"n": 0})
            flow.start_loop()
            flow._owner._watcher.end()
            flow._owner.child.kill()
            flow._owner.child.wait()
            os._exit(0)
        """
        assert not run_python(code).stderr
        StrictFlow("ending").stop_loop()
        assert len(sweep()) == 1
    else:
        flow = StrictFlow("ending", state={"n": 0}, restart=False)
        flow.start_loop()
        os.kill(coordinator(), signal.SIGKILL)
        eventually(lambda: not flow.is_running)
        StrictFlow("ending").stop_loop()
        flow.stop_loop()


def test_a_stop_does_not_wait_for_the_pause_before_the_next_try(flow, monkeypatch, eventually, caplog):
    monkeypatch.setattr(supervisor, "AT_ONCE_SECONDS", 1e9)
    monkeypatch.setattr(supervisor, "COORDINATOR_PAUSE_SECONDS", 30.0)
    first = coordinator()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: flow.is_running and coordinator() != first and Place.of("ending").socket.exists())
    watcher = flow._owner._watcher
    eventually(lambda: flow._owner.child.pid == coordinator() and is_inside(watcher._thread, "wait_for_end"))
    os.kill(coordinator(), signal.SIGKILL)
    eventually(lambda: is_inside(watcher._thread, "replace"))
    with ends(flow, eventually) as stop:
        pass
    assert stop.error is None
    assert not flow.is_running


def test_a_stop_in_haste_ends_a_takeover_too(flow, monkeypatch, eventually):
    launch = owners.start_coordinator
    children = []

    def still(name, options, *began):
        def begin(child):
            children.append(child)
            os.kill(child.pid, signal.SIGSTOP)
            began[0](child)

        return launch(name, options, *([begin] if began else []))

    monkeypatch.setattr(owners, "start_coordinator", still)
    os.kill(coordinator(), signal.SIGKILL)
    eventually(lambda: children)
    with ends(flow, eventually, timeout=0.3):
        pass
    assert [child.exitcode for child in children] == [-signal.SIGKILL]
    assert not flow.is_running
