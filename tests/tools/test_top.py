"""`strictflow-mp top`, on a terminal as a person would use it, and the rates that it shows."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager
from io import StringIO
from threading import Thread

import pytest
from holding import held
from rich.console import Console

from strictflow_mp import StrictFlow
from strictflow_mp.tools.rates import Rates, rates
from strictflow_mp.tools.screen import screen
from strictflow_mp.wire.stats import FlowStats, Latency, WorkerStats

TOP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would ignore it
from strictflow_mp.tools.cli import main
sys.exit(main(["top", *sys.argv[1:]]))
"""


@pytest.fixture
def screen_of():
    """What `strictflow-mp top ...` shows on a terminal of its own, so far; its keyboard; and the process."""

    @contextmanager
    def screen_of(*given, columns=100):
        keyboard, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))
        command = [sys.executable, "-c", TOP, *given]
        env = {**os.environ, "TERM": "xterm"}
        process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True
        )
        os.close(terminal)
        shown = bytearray()

        def read():
            try:
                while select.select([keyboard], [], [], 0)[0]:
                    shown.extend(os.read(keyboard, 65536))
            except OSError:
                pass  # the process has gone, and the terminal with it
            return shown.decode(errors="replace")

        try:
            yield read, keyboard, process
        finally:
            process.kill()
            process.wait()
            os.close(keyboard)

    return screen_of


def test_top_shows_what_happens_until_q_is_pressed(screen_of, eventually):
    with StrictFlow("busy", state={"number": 0}) as flow:
        flow.state["number"]
        with screen_of("busy", "--interval", "0.1") as (read, keyboard, process):
            eventually(lambda: "version 1," in read())
            for number in range(10):
                flow.put("number", number + 1).result()
            eventually(lambda: "version 11," in read())
            assert str(os.getpid()) in read()
            assert str(process.pid) not in read().replace(f"busy  {process.pid}", "")
            os.write(keyboard, b"q")
            eventually(lambda: process.poll() is not None)
            assert process.returncode == 0
            assert "\x1b[?1049l" in read()  # the former screen is back


def test_top_says_when_a_long_task_holds_everything_up_and_when_the_flow_ends(screen_of, eventually):
    flow = StrictFlow("held", state={})
    with flow, screen_of("held", "--interval", "0.1", columns=50) as (read, _, process):
        eventually(lambda: "coordinator" in read())
        with held(flow):
            eventually(lambda: "has not answered" in read())
            reader = Thread(target=len, args=[flow.state])
            reader.start()
            eventually(lambda: "1 at the gate" in read())
            assert str(process.pid) not in read()
        reader.join()
        flow.stop_loop()
        eventually(lambda: process.poll() is not None)
        assert process.returncode == 1
        assert "it has ended" in read()


def test_top_goes_on_with_the_next_coordinator_and_is_interrupted_with_130(screen_of, eventually):
    flow = StrictFlow("restarted", state={})
    with flow, screen_of("restarted", "--interval", "0.1") as (read, _, process):
        eventually(lambda: "coordinator" in read())
        os.kill(flow.stats().coordinator_pid, signal.SIGKILL)
        eventually(lambda: "restarts: 1" in read(), timeout=30)
        process.send_signal(signal.SIGINT)
        eventually(lambda: process.poll() is not None)
        assert process.returncode == 130


def test_top_that_is_let_in_by_nobody_says_whose_task_runs(screen_of, eventually):
    with StrictFlow("shut", state={"a": 1}) as flow:
        flow.state["a"]
        with screen_of("shut", "--interval", "0.1") as (read, keyboard, process):
            with held(flow):
                eventually(lambda: f"runs a task of process {os.getpid()}" in read())
                assert "1 keys" in read()
            eventually(lambda: "commits/s" in read())
            os.write(keyboard, b"q")
            eventually(lambda: process.poll() is not None)


def test_top_that_is_let_in_by_nobody_ends_without_having_been_in(screen_of, eventually, run_python):
    with StrictFlow("shut", state={"a": 1}) as flow, held(flow):
        with screen_of("shut", "--interval", "0.1") as (read, keyboard, process):
            eventually(lambda: f"runs a task of process {os.getpid()}" in read())
            os.write(keyboard, b"q")
            eventually(lambda: process.poll() is not None)
            assert process.returncode == 0
        done = run_python("-m", "strictflow_mp", "top", "shut", "--once", timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"runs a task of process {os.getpid()}" in done.stdout


def test_top_leaves_the_screen_for_ctrl_z_and_comes_back(screen_of, eventually):
    with StrictFlow("left", state={}), screen_of("left", "--interval", "0.1") as (read, keyboard, process):
        eventually(lambda: "coordinator" in read())
        os.write(keyboard, b"?\x1a")  # a process whose parent is in another session is not stopped: it goes on at once
        eventually(lambda: read().count("\x1b[?1049h") == 2)
        assert read().count("\x1b[?1049l") == 1
        os.write(keyboard, b"q")
        eventually(lambda: process.poll() is not None)
        assert process.returncode == 0


def test_top_prints_lines_of_json_and_one_screen_without_a_terminal(run_python):
    with StrictFlow("quiet", state={"a": 1, "b": 2}):
        done = run_python("-m", "strictflow_mp", "top", "quiet", "--interval", "0.1", "--once", "--json")
        seen = json.loads(done.stdout)
        assert (seen["name"], seen["keys"], seen["workers"]) == ("quiet", 2, [])
        assert seen["rates"]["tasks"] == {"1": 0.0, "2": 0.0}
        done = run_python("-m", "strictflow_mp", "top", "quiet", "--interval", "0.1", "--once")
        assert done.stdout.startswith("quiet  version 1, 2 keys")
        assert "\x1b" not in done.stdout


def drawn(stats, width, height):
    console = Console(width=width, height=height, file=StringIO())
    still = rates(stats, stats, 1.0)
    console.print(screen(stats, still, {}, console=console, is_live=True))
    return console.file.getvalue()


def test_a_narrow_screen_leaves_columns_out_and_cuts_no_figure_off():
    wide, narrow = (drawn(seen(tasks_run={1: 123456789, 2: 0}), width, 30) for width in (100, 40))
    assert "123,456,789" in wide
    assert "p90" in wide
    assert "p99" in narrow
    assert "p90" not in narrow
    assert "…" not in narrow


def test_a_low_screen_shows_those_who_wait_and_how_many_more_there_are():
    workers = tuple(WorkerStats(100 + n, n, "attached", None, None, 0, 0.0, is_waiting=n == 9) for n in range(1, 10))
    text = drawn(seen(workers=workers), 100, 13)
    assert text.count("\n") <= 13
    assert "109" in text
    assert "at the gate" in text
    assert f"and {9 - text.count(' attached') - 1} more" in text
    assert "more" not in drawn(seen(workers=workers), 100, 30)


def seen(**changes):
    fields = {
        "name": "flow",
        "version": 10,
        "keys": 1,
        "coordinator_pid": 1,
        "restarts": 0,
        "uptime": 100.0,
        "tasks_run": {1: 100, 2: 50},
        "tasks_failed": {1: 10, 2: 0},
        "tasks_pending": {1: 0, 2: 0},
        "latency": {1: Latency(0, 0, 0, 0), 2: Latency(0, 0, 0, 0)},
        "readers_waited": 0.0,
        "bytes_used": 0,
        "bytes_free": 0,
        "bytes_pinned": 0,
        "workers": (WorkerStats(7, 1, "attached", None, None, 4, 1.0),),
    }
    return FlowStats(**{**fields, **changes})


def test_rates_are_what_happened_in_between():
    workers = (WorkerStats(7, 1, "attached", None, None, 8, 1.5), WorkerStats(8, 2, "attached", None, None, 4, 0.5))
    later = seen(version=30, tasks_run={1: 120, 2: 50}, tasks_failed={1: 12, 2: 0}, workers=workers)
    assert rates(seen(), later, 2.0) == Rates({1: 10.0, 2: 0.0}, {1: 1.0, 2: 0.0}, 10.0, 4.0, 0.125)
    assert rates(seen(), seen(), 2.0).wait is None


def test_rates_count_from_0_when_another_coordinator_has_taken_over():
    later = seen(
        coordinator_pid=2, restarts=1, uptime=1.0, version=12, tasks_run={1: 5, 2: 0}, tasks_failed={1: 0, 2: 0}
    )
    happened = rates(seen(), later, 10.0)
    assert (happened.tasks, happened.failed, happened.commits) == ({1: 5.0, 2: 0.0}, {1: 0.0, 2: 0.0}, 0.2)
