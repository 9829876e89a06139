"""A process that replaces its program by another (`os.execv`) has given up what it had."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

from strictflow_mp import StrictFlow
from strictflow_mp.coordinator.sessions import Session
from strictflow_mp.system import identity
from strictflow_mp.system.identity import Identity, beginning_of
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

CLIENT = """
import os, sys, threading
from strictflow_mp import StrictFlow

how, left = sys.argv[1], int(sys.argv[2])
flow = StrictFlow("ex")
if how == "unused" and left == 0:
    print("begun", flush=True)
    input()
    raise SystemExit
flow.state["a"]
if how == "snapshot":
    held = flow.snapshot()
    held["a"]
if how == "closed":
    held = flow.snapshot()
    held["a"]
    flow.close()
if how == "in-flight":
    for _ in range(200):
        flow.put("n", left)
if how == "threads":
    for _ in range(4):
        threading.Thread(target=lambda: [flow.state["a"] for _ in range(10**9)], daemon=True).start()
if how == "inherited":
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            os.set_inheritable(number, True)
        except OSError:
            pass  # the one of the list
if left:
    os.execv(sys.executable, [sys.executable, __file__, how, str(left - 1)])
print("begun", flush=True)
input()
"""


@contextmanager
def client(tmp_path, how, times):
    """A process that replaces itself so often; it has said that the last program has begun."""
    program = tmp_path / "client.py"
    program.write_text(textwrap.dedent(CLIENT))
    process = subprocess.Popen(
        [sys.executable, str(program), how, str(times)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.communicate("\n")


@pytest.mark.parametrize("how", ["plain", "snapshot", "closed", "in-flight", "threads", "inherited"])
def test_a_process_that_replaces_itself_takes_up_one_place(tmp_path, how, eventually):
    with StrictFlow("ex", state={"a": b"x" * 1000, "n": 0}, max_workers=3) as flow:
        with client(tmp_path, how, 5) as process:
            eventually(lambda: [worker.pid for worker in flow.stats().workers].count(process.pid) == 1)
            for _ in range(3):  # what the former program had pinned is reused
                flow.state["a"] = os.urandom(1000)
            if how != "snapshot":
                eventually(lambda: flow.stats().bytes_pinned == 0)
        eventually(lambda: len(flow.stats().workers) == 1)


def test_the_place_of_a_program_that_was_replaced_is_free_though_the_next_one_uses_no_flow(tmp_path, eventually):
    with StrictFlow("ex", state={"a": b"x", "n": 0}) as flow, client(tmp_path, "unused", 1) as process:
        eventually(lambda: process.pid not in [worker.pid for worker in flow.stats().workers])


OWNER = """
import os, signal, sys
from strictflow_mp import FlowExists, StrictFlow

left = int(sys.argv[1])
flow = StrictFlow("ex", state={"begun": 0})
flow.start_loop()
flow.state["begun"] += 1
try:
    StrictFlow("ex").start_loop()
except FlowExists:
    print("owned by this program", flush=True)
if left:
    os.execv(sys.executable, [sys.executable, __file__, str(left - 1)])
stats = flow.stats()
os.kill(stats.coordinator_pid, signal.SIGKILL)
flow.state["begun"] += 1  # it waits for the next one, which this program starts
print(flow.state["begun"], flow.stats().restarts - stats.restarts, len(flow.stats().workers), flush=True)
flow.stop_loop()
"""


def test_an_owner_that_replaces_itself_adopts_its_own_flow(run_python, tmp_path):
    program = tmp_path / "owner.py"
    program.write_text(textwrap.dedent(OWNER))
    ran = run_python(program, 2)
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [*["owned by this program"] * 3, "4 1 1"]
    assert not Place.of("ex").directory.exists()


def test_a_program_that_goes_on_keeps_its_place_while_it_reads_there():
    with StrictFlow("ex", state={"a": 1}) as flow, flow.snapshot() as held:
        flow.close()  # `held` has pins
        flow.state["a"] = 2
        assert [worker.pid for worker in flow.stats().workers] == [os.getpid()] * 2
        assert held["a"] == 1


def test_a_beginning_is_the_programs_and_outlives_a_fork():
    mine = beginning_of(os.getpid())
    assert mine == beginning_of(os.getpid()) != 0
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.write(writable, str(beginning_of(os.getpid())).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(readable, 100)) == mine
    os.close(readable)
    os.close(writable)


def test_who_may_not_look_at_a_process_takes_nothing_from_it(monkeypatch):
    mine = Identity.mine()
    session = Session(None, 1, 1, mine, beginning_of(mine.pid))
    assert not session.has_begun_anew()
    with monkeypatch.context() as patch:
        patch.setattr(identity, "PROC", "/nowhere")
        assert beginning_of(mine.pid) == 0
        assert not session.has_begun_anew()
        unseen = Session(None, 1, 1, mine, 4711)
    told_otherwise = Session(None, 1, 1, mine, 4711)
    assert not unseen.has_begun_anew()
    assert not told_otherwise.has_begun_anew(), "it does not say what we see: no proof of anything"
    for each in (session, unseen, told_otherwise):
        os.close(each.pidfd)
