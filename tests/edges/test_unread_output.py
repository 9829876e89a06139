"""Nobody reads what is printed and logged: the flow goes on, and stops when it is told to."""

from __future__ import annotations

import io
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from contextlib import closing

import pytest

from strictflow_mp import StrictFlow, write
from strictflow_mp.core import logger, setup_logging
from strictflow_mp.system import outlet
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

LINE = "x" * 200
MANY = 2000
"""Lines: more than any pipe, socket or terminal takes unread."""


def full_pipe():
    return os.pipe()


def full_socket():
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def pipe_without_reader():
    readable, writable = os.pipe()
    os.close(readable)
    return -1, writable


def stopped_terminal():
    ours, theirs = pty.openpty()
    termios.tcflow(theirs, termios.TCOOFF)  # Ctrl-S
    return ours, theirs


@pytest.fixture(params=[full_pipe, full_socket, pipe_without_reader, stopped_terminal])
def unread(request):
    """A descriptor that takes little or nothing; the first one is its other end, which nobody reads."""
    ours, theirs = request.param()
    yield theirs
    for descriptor in (ours, theirs):
        if descriptor >= 0:
            os.close(descriptor)


@pytest.fixture
def served(unread, eventually):
    """The process of `strictflow-mp serve unread`, whose output nobody reads."""
    command = [sys.executable, "-m", "strictflow_mp", "serve", "unread", "--log", "debug"]
    with subprocess.Popen(command, stdout=unread, stderr=unread) as process:
        try:
            eventually(lambda: StrictFlow("unread").is_running)
            yield process
        finally:
            process.kill()


def test_a_log_that_nobody_reads_holds_up_neither_tasks_nor_the_next_coordinator_nor_the_end(served, eventually):
    with closing(StrictFlow.attach("unread")) as flow:

        @write(flow)
        def fails():
            print(LINE)
            print(LINE, file=sys.stderr)
            flow.state["never"] = 1
            raise ValueError(LINE)

        @write(flow)
        def prints():
            for _ in range(MANY):
                print(LINE)
            return "printed"

        assert prints().result(timeout=30) == "printed"
        failing = [fails() for _ in range(500)]
        assert {type(task.exception(timeout=30)) for task in failing} == {ValueError}

        former = Place.of("unread").resident().pid
        os.kill(former, signal.SIGKILL)
        flow.put("after", 1).result(timeout=30)
        assert Place.of("unread").resident().pid != former
        assert prints().result(timeout=30) == "printed"
        assert "never" not in flow.state
    served.terminate()
    assert served.wait(timeout=30) == 0


def test_an_owner_whose_log_nobody_reads_still_starts_the_next_coordinator(unread, tmp_path, eventually):
    program = """if True:
        import sys
        from strictflow_mp import StrictFlow, setup_logging
        from strictflow_mp.core import logger
        setup_logging("INFO")
        with StrictFlow("unread") as flow:
            for _ in range(int(sys.argv[1])):
                logger.info(sys.argv[2])
            flow.put("logged", True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", program, str(MANY), LINE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=unread, stderr=unread) as owner:
        try:
            eventually(lambda: StrictFlow("unread").is_running)
            with closing(StrictFlow.attach("unread")) as flow:
                eventually(lambda: flow.state.get("logged"), timeout=30)
                for number in range(3):
                    os.kill(Place.of("unread").resident().pid, signal.SIGKILL)
                    flow.put("number", number).result(timeout=30)
            assert owner.stdin is not None
            owner.stdin.close()
            owner.wait(timeout=30)
        finally:
            owner.kill()


def test_what_a_slow_reader_gets_is_whole_in_order_and_says_what_is_missing(monkeypatch):
    readable, writable = os.pipe()
    monkeypatch.setattr(outlet, "QUEUE_BYTES", 1 << 17)
    with open(readable, "rb") as reader:
        stream = io.BufferedWriter(outlet.Outlet(writable))
        for number in range(MANY):
            stream.write(b"%06d %s\n" % (number, LINE.encode()))
            stream.flush()
        lost = stream.raw.lost
        assert lost > 0
        lines = []
        while not lines or b"dropped" not in lines[-1]:
            lines.append(reader.readline())
        assert lines[-1] == outlet.DROPPED % (lost, os.getpid())
        assert [int(line[:6]) for line in lines[:-1]] == list(range(MANY - lost))
        stream.raw.join(10)
        stream.write(b"next\n")
        stream.flush()
        assert reader.readline() == b"next\n"
        os.close(writable)


def test_what_is_read_is_written_before_print_returns():
    readable, writable = os.pipe()
    with io.TextIOWrapper(io.BufferedWriter(outlet.Outlet(writable)), line_buffering=True) as stream:
        print("before the end", file=stream)
        os.set_blocking(readable, False)
        assert os.read(readable, 100) == b"before the end\n"
    os.close(readable)
    os.close(writable)


def test_a_printed_log_line_finds_no_room_and_is_counted(monkeypatch):
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    try:
        with open(writable, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            setup_logging("INFO")
            for _ in range(MANY):
                logger.info(LINE)
            while len(os.read(readable, 1 << 16)) == 1 << 16:
                pass
            logger.info("there is room")
            said = os.read(readable, 1 << 16).decode()
        assert "lines were dropped here: nobody read them" in said
        assert said.endswith("there is room\n")
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate
        os.close(readable)
