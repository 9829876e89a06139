"""A wall clock that steps, by hours and in both directions: no deadline follows it, and nobody is taken for another.

The clock of this machine is left alone: each test runs a program, and the flow of that program, under a library that
shows them another (`wallclock.c`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="the library is made with gcc, for Linux"
)

SOURCE = Path(__file__).with_name("wallclock.c")

BEGIN = """
import mmap, os, signal, sys, threading, time

from strictflow_mp.system import posix

from strictflow_mp import GateTimeout, StrictFlow, TaskTimeout, read, write
from strictflow_mp.flow import options
from strictflow_mp.system.identity import Identity

with open(os.environ["WALL_CLOCK"], "r+b") as file:
    ahead = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")

FOR_EVER = 1e6
STEPS = [5, -13, 2]


def step(hours):
    ahead[0] += hours * 3600 * 10**9


def until(predicate):
    while not predicate():
        time.sleep(0.002)


class Thread(threading.Thread):
    def __init__(self, function):
        super().__init__(daemon=True)
        self.function = function
        self.error = None
        self.start()

    def run(self):
        try:
            self.value = self.function()
        except Exception as error:
            self.error = error
        self.ended = time.monotonic()

    def outcome(self):
        self.join()
        return type(self.error) if self.error else self.value


def define_hold(flow):
    @write(flow)
    def hold(path):
        while not os.path.exists(path):
            time.sleep(0.001)
        flow.state["n"] += 1

    return hold


def sleeps(flow):
    gate = flow._client.attach().gate
    return gate._words[gate._waiting]
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("clock") / "wallclock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", SOURCE, "-o", made, "-ldl"], check=True)
    return made


@pytest.fixture
def run(run_python, library, tmp_path):
    """`run(code)` runs it, and whatever it starts, by a clock that `step(hours)` sets; nothing may go wrong."""

    def run(code):
        __tracebackhide__ = True
        file = tmp_path / "ahead"
        file.write_bytes(bytes(8))
        program = tmp_path / "program.py"
        program.write_text(BEGIN + "\n\n" + textwrap.dedent(code))
        ran = run_python(program, env={"LD_PRELOAD": str(library), "WALL_CLOCK": str(file)})
        assert (ran.returncode, ran.stderr) == (0, "")

    return run


def test_the_clock_steps_in_all_processes_and_for_whoever_sleeps_by_it(run):
    run("""
        with StrictFlow(state={}) as flow:
            there = read(flow)(lambda: (time.time(), time.monotonic()))
            wall, steady = there().result()
            step(5)
            assert there().result()[0] >= wall + 5 * 3600 <= time.time()
            step(-10)
            assert there().result()[0] < wall > time.time()
            assert steady <= there().result()[1] <= time.monotonic() < steady + 3600

        semaphore = posix.Semaphore(None, posix.O_CREX)
        semaphore.unlink()
        sleeper = Thread(lambda: semaphore.acquire(3600))
        while sleeper.is_alive():
            step(2)
            time.sleep(0.001)
        assert sleeper.outcome() is posix.BusyError
        for _ in range(100):  # until it slept already when the clock was set
            sleeper = Thread(lambda: semaphore.acquire(0.05))
            step(-2)
            sleeper.join(0.2)
            if sleeper.is_alive():
                break
        semaphore.release()
        assert sleeper.outcome() is None
    """)


def test_a_read_gives_up_when_its_time_has_passed_and_not_when_the_clock_says_so(run):
    run("""
        options.GATE_SECONDS = 0.3
        with StrictFlow(state={"n": 0}) as flow:
            held = define_hold(flow)("release")
            for hours in STEPS:
                began = time.monotonic()
                step(hours)
                reader = Thread(lambda: flow.state["n"])
                assert reader.outcome() is GateTimeout
                assert reader.ended >= began + 0.3
            began = time.monotonic()
            reader = Thread(lambda: flow.state["n"])
            while reader.is_alive():
                step(1)
                time.sleep(0.01)
            assert reader.outcome() is GateTimeout
            assert reader.ended >= began + 0.3
            open("release", "w").close()
            held.result()
            assert flow.state["n"] == 1
    """)


def test_a_clock_that_is_set_back_under_sleeping_readers_holds_up_only_whom_nobody_wakes(run):
    run("""
        options.GATE_SECONDS = FOR_EVER
        with StrictFlow(state={"n": 0}) as flow:
            hold = define_hold(flow)
            for number in range(1, 6):
                held = hold(f"release {number}")
                readers = [Thread(lambda: flow.state["n"])]
                until(lambda: sleeps(flow))
                readers.append(Thread(lambda: flow.state["n"]))
                step(-5)
                if sys.version_info >= (3, 11):  # before, a lock's timeout follows the wall clock
                    late = Thread(lambda: flow._client.pass_gate(0.2))
                    assert late.outcome() is GateTimeout
                assert all(reader.is_alive() for reader in readers)
                open(f"release {number}", "w").close()
                assert [reader.outcome() for reader in readers] == [number] * 2
                held.result()
    """)


def test_a_task_is_stopped_when_its_time_has_passed_and_not_when_the_clock_says_so(run):
    run("""
        with StrictFlow(state={"n": 0}) as flow:
            for hours in STEPS:
                for limit, error in (0.3, TaskTimeout), (FOR_EVER, None):
                    name = f"{hours} {limit}"

                    @write(flow, timeout=limit)
                    def work(name):
                        open(name, "w").close()
                        while not os.path.exists(name + " is over"):
                            time.sleep(0.001)
                        return name

                    began = time.monotonic()
                    waiting = Thread(work(name).result)
                    until(lambda: os.path.exists(name))
                    step(hours)
                    if error is None:
                        waiting.join(0.1)
                        assert waiting.is_alive()
                        open(name + " is over", "w").close()
                    assert waiting.outcome() == (error or name)
                    assert error is None or waiting.ended >= began + limit
            assert flow.stats().restarts == 0
    """)


def test_nobody_is_taken_for_dead_or_for_another_when_the_clock_steps(run):
    run("""
        def work(name):
            flow = StrictFlow(name)
            flow.put(os.getpid(), "began").result()
            while flow.state[os.getpid()] != "over":
                time.sleep(0.005)
            flow.put(os.getpid(), "ended").result()

        def is_watching():
            for change in flow.watch("n"):
                seen.append(change.value)
                if change.value == "end":
                    return

        seen = []
        with StrictFlow("stepping", state={"n": 0}, max_workers=6) as flow:
            watching = Thread(is_watching)
            workers = flow.spawn(work, flow.name, processes=3)
            pids = [worker.pid for worker in workers]
            until(lambda: all(flow.state.get(pid) == "began" for pid in pids))
            slots = {worker.pid: worker.slot for worker in flow.stats().workers}
            assert set(slots) == {os.getpid(), *pids}
            for round, hours in enumerate(STEPS):
                coordinator = flow.stats().coordinator_pid
                known = {pid: Identity.of(pid) for pid in (*slots, coordinator)}
                step(hours)
                assert {pid: Identity.of(pid) for pid in known} == known
                assert not any(identity.is_dead() for identity in known.values())
                flow.state["n"] = ("stepped", round)
                assert {worker.pid: worker.slot for worker in flow.stats().workers} == slots
                # The next coordinator starts by the new clock, and everybody comes back to the place that was his.
                os.kill(coordinator, signal.SIGKILL)
                flow.state["n"] = ("restarted", round)
                assert flow.stats().restarts == round + 1
                assert {worker.pid: worker.slot for worker in flow.stats().workers} == slots
                # Who dies is found to have died, and his place passes on.
                victim = pids.pop()
                os.kill(victim, signal.SIGKILL)
                until(lambda: victim not in {worker.pid for worker in flow.stats().workers})
                del slots[victim]
                with flow.spawn(lambda: flow.put("newcomer", os.getpid()).result()) as (newcomer,):
                    pass
                assert (newcomer.exitcode, flow.state["newcomer"]) == (0, newcomer.pid)
                if round == 1:
                    flow.put(pids[0], "over").result()
                    until(lambda: flow.state[pids[0]] == "ended")
                    until(lambda: pids[0] not in {worker.pid for worker in flow.stats().workers})
                    del slots[pids[0]], pids[0]
                    break
            flow.state["n"] = "end"
            watching.outcome()
            assert seen[-1] == "end"
            assert set(flow.state.keys()) >= {"n", "newcomer"}
    """)


def test_who_does_not_come_back_to_the_next_coordinator_is_not_waited_for_by_the_clock(run):
    run("""
        def work(name):
            flow = StrictFlow(name)
            flow.put("pid", os.getpid()).result()
            until(lambda: os.path.exists("stopped"))
            future = flow.put("late", 1)
            open("submitted", "w").close()
            future.result()

        with StrictFlow("patient", state={"n": 0}) as flow:
            with flow.spawn(work, flow.name) as (worker,):
                until(lambda: flow.state.get("pid") == worker.pid)
                coordinator = flow.stats().coordinator_pid
                os.kill(coordinator, signal.SIGSTOP)
                open("stopped", "w").close()
                until(lambda: os.path.exists("submitted"))
                os.kill(worker.pid, signal.SIGSTOP)
                os.kill(coordinator, signal.SIGKILL)
                assert flow.stats().restarts == 1
                step(-5)
                assert "late" not in flow.state
                os.kill(worker.pid, signal.SIGCONT)
            assert worker.exitcode == 0
            assert flow.state["late"] == 1
    """)
