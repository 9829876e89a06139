"""Orphans: a flow whose owner was killed is adopted by the next one, with its state and all who are attached."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager

import pytest
from holding import held

from strictflow_mp import CoordinatorLost, FlowExists, StrictFlow, write
from strictflow_mp.memory.succession import owner_of
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

NAME = "orphan"
RESOLVED = 30.0
"""Seconds in which a future has to be resolved; so long only for machines that are very busy."""
OWNER = """
import sys, threading
from strictflow_mp import StrictFlow
flow = StrictFlow("orphan", state={"n": 0}, restart=RESTART)
flow.start_loop(linger=LINGER)
print("serves", flush=True)
threading.Event().wait()
"""


@contextmanager
def owned(linger=0.0, restart=True):
    """Another process owns the flow; it is killed if it has not been."""
    code = OWNER.replace("LINGER", str(linger)).replace("RESTART", str(restart))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert any(line == "serves\n" for line in iter(owner.stdout.readline, ""))
            yield owner
        finally:
            owner.kill()


@contextmanager
def serving():
    command = [sys.executable, "-m", "strictflow_mp", "serve", NAME, "--log", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"flow {NAME!r} is ready\n"
            yield process
        finally:
            process.kill()


def kill(process):
    process.kill()
    process.wait()


def coordinator():
    resident = Place.of(NAME).resident()
    assert resident is not None
    return resident


def test_serve_that_was_killed_is_started_again_while_processes_are_attached():
    with serving() as first:
        flow = StrictFlow.attach(NAME)
        flow.state["n"] = 42
        kill(first)
        assert flow.state["n"] == 42
        with serving() as second:
            assert flow.state["n"] == 42
            flow.state["n"] += 1
            # From now on it is the second that starts the next one.
            os.kill(coordinator().pid, signal.SIGKILL)
            assert flow.put("m", 1).result(RESOLVED) is None
            assert dict(flow.snapshot()) == {"n": 43, "m": 1}
            flow.close()
            second.terminate()
            assert second.wait(RESOLVED) == 0
    assert not Place.of(NAME).directory.exists()


def test_serve_that_was_killed_with_nobody_attached_finds_its_state():
    with serving() as first:
        with_state = StrictFlow.attach(NAME)
        with_state.state["n"] = 42
        with_state.close()
        kill(first)
        with serving() as second:
            assert StrictFlow.attach(NAME).state["n"] == 42
            StrictFlow(NAME).close()
            second.terminate()
            assert second.wait(RESOLVED) == 0
    assert not Place.of(NAME).directory.exists()


@pytest.mark.parametrize("restart", [True, False])
def test_a_program_that_starts_the_flow_adopts_it(restart):
    with owned(restart=restart) as owner:
        other = StrictFlow.attach(NAME)
        other.state["n"] = 7
        former = coordinator()
        kill(owner)
        with StrictFlow(NAME, state={"n": "a first state that does not count"}) as flow:
            assert flow.state["n"] == 7
            assert coordinator().token == former.token
            assert coordinator().pid != former.pid
            segment = flow._client.attach().segment
            assert owner_of(segment)[0].pid == os.getpid()
            assert flow.stats().workers


def test_what_is_queued_and_what_waits_is_not_lost():
    with owned() as owner:
        flow = StrictFlow(NAME)
        owner_thread_started = threading.Event()

        def adopt():
            owner_thread_started.set()
            flow.start_loop()

        with held(flow):
            futures = [flow.put(number, number) for number in range(50)]
            kill(owner)
            adopting = threading.Thread(target=adopt)
            adopting.start()
            owner_thread_started.wait()
        assert [future.result(RESOLVED) for future in futures] == [None] * 50
        adopting.join(RESOLVED)
        assert len(flow.state) == 51
        flow.stop_loop()


def test_a_flow_whose_owner_lives_is_adopted_by_nobody():
    with owned() as owner:
        flow = StrictFlow(NAME)
        pid = coordinator().pid
        with pytest.raises(FlowExists):
            flow.start_loop()
        assert coordinator().pid == pid
        assert flow.state["n"] == 0
        flow.stop_loop()
        owner.kill()


def test_a_living_orphans_state_is_not_discarded():
    with owned() as owner:
        flow = StrictFlow.attach(NAME)
        flow.state["n"] = 1
        kill(owner)
        with pytest.raises(FlowExists):
            StrictFlow(NAME).start_loop(recover=False)
        assert flow.state["n"] == 1
        flow.stop_loop()


def test_of_two_that_would_adopt_it_one_does():
    with owned() as owner:
        flow = StrictFlow.attach(NAME)
        flow.state["n"] = 3
        kill(owner)
        code = """
            from strictflow_mp import FlowExists, StrictFlow
            try:
                StrictFlow("orphan").start_loop()
                print("adopted", flush=True)
                input()
            except FlowExists:
                print("exists", flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        two = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = [
            next(line for line in iter(one.stdout.readline, "") if line in ("adopted\n", "exists\n")) for one in two
        ]
        try:
            assert sorted(said) == ["adopted\n", "exists\n"]
            assert flow.state["n"] == 3
            flow.stop_loop()
        finally:
            for one in two:
                one.kill()
                one.communicate()


def test_without_linger_nobody_waits_and_a_crashed_program_leaves_nothing(eventually):
    with owned() as owner:
        kill(owner)
        eventually(lambda: not Place.of(NAME).directory.exists())


def test_an_orphan_that_lingers_ends_when_nobody_has_come(eventually):
    with owned(linger=1.0) as owner:
        kill(owner)
        eventually(lambda: not Place.of(NAME).directory.exists())


def test_who_adopts_and_dies_before_it_has_started_the_next_one_leaves_the_state_to_the_next_start(eventually):
    with owned() as owner:
        flow = StrictFlow.attach(NAME)
        flow.state["n"] = 9
        kill(owner)
        code = """
            import os, sys
            from strictflow_mp import StrictFlow
            from strictflow_mp.wire.frames import ADOPT
            flow = StrictFlow("orphan")
            flow._client.ask(ADOPT, True)
            os.kill(os.getpid(), 9)
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
        eventually(lambda: not Place.of(NAME).is_inhabited())
        with pytest.raises(CoordinatorLost):
            flow.put("n", 10).result(RESOLVED)
        with StrictFlow(NAME) as heir:
            assert heir.state["n"] == 9
            assert write(heir)(len)([1]).result(RESOLVED) == 1
