"""uWSGI as it is by default: the application is loaded once, and C forks the workers, past all that Python is told."""

from __future__ import annotations

import os
import signal
import sys
from http.client import HTTPException

import pytest
from servers import PATIENCE, at_once, slots

from strictflow_mp import StrictFlow

WORKERS = 3
PROCESSES = ["--processes", WORKERS, "--disable-logging"]


@pytest.fixture
def flow():
    flow = StrictFlow("flags")
    yield flow
    flow.close()


def assert_that_nobody_shares_a_slot(flow, expected):
    workers = flow.stats().workers
    assert {worker.pid for worker in workers} == {*expected, os.getpid()}
    assert len({worker.slot for worker in workers}) == len(workers) == len(expected) + 1


def pids_of_all(server, other_than, eventually):
    """The pids of the workers, when all have answered."""
    seen = set()

    def ask():
        try:
            seen.update(answer["pid"] for answer in at_once(server, "/count/", 32))
        except (OSError, HTTPException):
            pass  # between two generations
        return len(seen - other_than) >= WORKERS

    eventually(ask, PATIENCE)
    return seen - other_than


@pytest.mark.parametrize("used", [{}, {"USE_IN_MASTER": "1"}], ids=["at first use", "used before the fork"])
@pytest.mark.parametrize("has_master", [False, True], ids=["defaults", "master"])
def test_workers_see_their_own_writes_at_once_and_each_has_a_slot(has_master, used, serve, uwsgi, flow, eventually):
    serve("flags")
    server = uwsgi("probe:app", *PROCESSES, *["--master"] * has_master, **used)
    workers = pids_of_all(server, set(), eventually)
    # Without a master the process that loaded the application is the first worker.
    assert (server.pid in workers) is not has_master
    assert [answer["value"] for answer in at_once(server, "/read-own/30", 30)] == [0] * 30
    before = flow.state["count"]
    at_once(server, "/count/", 60)
    assert flow.state["count"] == before + 60
    assert_that_nobody_shares_a_slot(flow, workers | ({server.pid} if used else set()))
    if has_master:
        assert server.stop() == 0
    else:
        for pid in workers:  # nobody else ends them
            os.kill(pid, signal.SIGTERM)
        server.popen.wait(PATIENCE)
    eventually(lambda: not slots(flow))


def test_what_one_worker_has_written_no_worker_reads_older(serve, uwsgi, eventually):
    serve("flags")
    server = uwsgi("probe:app", *PROCESSES, "--master", USE_IN_MASTER="1")
    pids_of_all(server, set(), eventually)
    wrote, read = set(), set()
    for number in range(60):
        wrote.add(server.ask(f"/set/n={number}")["pid"])
        for _ in range(3):
            answer = server.ask("/get/n")
            assert answer["value"] == number
            read.add(answer["pid"])
    assert len(wrote) > 1
    assert len(read) > 1
    assert server.stop() == 0


def test_after_a_reload_which_is_an_exec_nothing_is_left_of_the_former_ones(serve, uwsgi, flow, eventually):
    serve("flags")
    # Else uWSGI executes the interpreter behind the virtual environment's, which has none of its packages.
    again = ["--binary-path", sys.executable]
    server = uwsgi("probe:app", *PROCESSES, "--master", *again, USE_IN_MASTER="1")
    workers = pids_of_all(server, set(), eventually)
    for _ in range(2):
        server.send(signal.SIGHUP)
        workers = pids_of_all(server, workers, eventually)
        eventually(lambda: slots(flow) == {server.pid, *workers}, PATIENCE)  # noqa: B023
        assert_that_nobody_shares_a_slot(flow, {server.pid, *workers})
        assert [answer["value"] for answer in at_once(server, "/read-own/30", 9)] == [0] * 9
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


def test_with_threads_enabled_a_watch_and_a_callback_are_told(serve, uwsgi, flow, eventually):
    serve("flags")
    server = uwsgi("probe:app", "--processes", 1, "--master", "--enable-threads", "--disable-logging")
    assert server.ask("/call-back")["value"] == 1
    server.ask("/follow")
    flow.state["news"] = 7
    eventually(lambda: server.ask("/told")["value"] == 7, PATIENCE)
    assert server.stop() == 0
