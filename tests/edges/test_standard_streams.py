"""Descriptors 0 to 2 are the standard streams, also where they were closed: nothing of ours has these numbers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap

import pytest

from strictflow_mp import StrictFlow, read, write
from strictflow_mp.system.place import Place

OWNER = """
import os, signal, sys
from strictflow_mp import StrictFlow, read, write

report = int(sys.argv[1])
for number in map(int, sys.argv[2]):
    os.close(number)
{spoil}
flow = StrictFlow("silent", state={{"n": 0}})

def shout():
    for number in (0, 1, 2):
        try:
            os.write(number, b"x" * 4096)
        except OSError:
            pass  # standard input is for reading
    print("hello", flush=True)
    sys.stderr and sys.stderr.write("hello")

@write(flow)
def noisy():
    shout()
    flow.state["n"] += 1
    return os.getpid()

@read(flow)
def streams():
    return [os.readlink(f"/proc/self/fd/{{number}}") for number in (0, 1, 2)]

flow.start_loop()
shout()
noisy().result(30)
assert not any(name.startswith(("socket", "anon")) for name in streams().result(30)), streams().result(30)
with flow.spawn(shout, processes=2) as workers:
    pass
assert workers.exitcodes == [0, 0], workers.exitcodes
os.kill(noisy().result(30), signal.SIGKILL)  # the lock's file still says whose the state is: it is not lost
noisy().result(30)
assert flow.state["n"] == 3, flow.state["n"]
flow.stop_loop()
os.write(report, b"done")
"""

CLOSED = ["".join(numbers) for size in (1, 2, 3) for numbers in itertools.combinations("012", size)]


def run_closed(closed, spoil=""):
    readable, writable = os.pipe()
    high = os.dup(writable)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OWNER).format(spoil=spoil), str(high), closed],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[high],
        )
        os.close(high)
        os.close(writable)
        writable = high = -1
        _, said = process.communicate(timeout=60)
        return os.read(readable, 100), process.returncode, said.decode(errors="replace")
    finally:
        os.close(readable)
        for descriptor in (writable, high):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.mark.parametrize("closed", CLOSED)
def test_with_closed_streams_tasks_and_workers_print_and_break_nothing(closed):
    told, code, said = run_closed(closed)
    assert (told, code) == (b"done", 0), said


def test_streams_that_children_do_not_inherit_are_filled_in_them():
    # As PEP 446 has it for a descriptor that was opened under the number of a closed one.
    told, code, said = run_closed("", "os.set_inheritable(1, False); os.set_inheritable(0, False)")
    assert (told, code) == (b"done", 0), said


def test_a_task_that_closes_a_stream_does_not_give_its_number_to_a_newcomer(run_python):
    with StrictFlow("closing", state={"n": 0}) as flow:

        @write(flow)
        def close():
            os.close(0)
            sys.stdout.flush()
            os.close(1)

        @read(flow)
        def streams():
            for number in (0, 1):
                os.write(number, b"x")
            return [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1)]

        close().result(30)
        newcomer = run_python("from strictflow_mp import StrictFlow; print(StrictFlow('closing').state['n'])")
        assert (newcomer.returncode, newcomer.stdout) == (0, "0\n"), newcomer.stderr
        assert streams().result(30) == [os.devnull, os.devnull]


def test_a_client_with_closed_streams_prints_into_nothing_of_ours():
    code = """
    import os, sys
    from strictflow_mp import StrictFlow
    os.close(0), os.close(1)
    flow = StrictFlow("client")
    flow.state["n"] += 1
    for number in (0, 1):
        assert os.readlink(f"/proc/self/fd/{number}") == os.devnull
        os.write(number, b"x" * 10_000)
    assert flow.state["n"] == 1
    """
    with StrictFlow("client", state={"n": 0}) as flow:
        inscribed = Place.of("client").lock.read_bytes()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert Place.of("client").lock.read_bytes() == inscribed
        assert flow.state["n"] == 1


def test_a_look_whether_anybody_lives_there_is_nobodys_standard_output(run_python):
    """It opens the lock's file to write, which says who lives there."""
    looked = run_python(
        """
        import fcntl, os
        from strictflow_mp import StrictFlow
        from strictflow_mp.system.place import Place

        with StrictFlow("looked at"):
            place = Place.of("looked at")
            flock, opened = fcntl.flock, []
            fcntl.flock = lambda descriptor, how: opened.append(descriptor) or flock(descriptor, how)
            kept = os.dup(1)
            os.close(1)
            try:
                assert place.is_inhabited()
                assert opened and min(opened) > 2, opened
            finally:
                os.dup2(kept, 1)
                os.close(kept)
        """
    )
    assert (looked.returncode, looked.stderr) == (0, "")
