"""gunicorn -k gevent: sockets, locks and threads are greenlets', whether the library came before that or after it."""

from __future__ import annotations

import os
import re
import signal
import threading

import pytest
from holding import held, stand_at_the_door
from servers import EXAMPLES, PATIENCE, at_once, pids_that_answer, slots

from strictflow_mp import StrictFlow
from strictflow_mp.system.place import Place

WORKERS = 2
GEVENT = ["--worker-class", "gevent", "--worker-connections", 100]


@pytest.fixture
def flow():
    flow = StrictFlow("flags")
    yield flow
    flow.close()


@pytest.fixture(params=[[], ["--preload"]], ids=["import after the patch", "before it"])
def server(request, serve, gunicorn, flow, eventually):
    """One worker."""
    serve("flags")
    server = gunicorn("probe:app", "--workers", 1, *GEVENT, *request.param)
    yield server
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


@pytest.mark.parametrize("used", [{}, {"USE_IN_MASTER": "1"}], ids=["at first use", "used before the fork"])
def test_every_request_of_many_at_once_is_answered_and_right(used, serve, gunicorn, flow, eventually):
    serve("flags")
    server = gunicorn("probe:app", "--workers", WORKERS, *GEVENT, *["--preload"] * len(used), **used)
    at_once(server, "/count/", 200)  # the first ones attach, all at once
    assert flow.state["count"] == 200
    workers = pids_that_answer(server, "/count/", WORKERS, eventually)
    assert slots(flow) == workers | ({server.pid} if used else set())
    assert [answer["value"] for answer in at_once(server, "/read-own/10", 30)] == [0] * 30
    for number in range(30):
        server.ask(f"/set/n={number}")
        assert [answer["value"] for answer in at_once(server, "/get/n", 8)] == [number] * 8
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


def test_a_worker_that_first_uses_the_flow_while_a_p1_runs_is_let_in_after_it(server, flow, eventually):
    with held(flow, n=7) as task:
        before = stand_at_the_door("flags")
        asking = threading.Thread(target=at_once, args=(server, "/count/", 5))
        asking.start()
        eventually(lambda: stand_at_the_door("flags") > before)
        assert server.ask("/pid")  # it waits there as any greenlet waits
        assert not task.done()
    asking.join(PATIENCE)
    assert flow.state["count"] == 5
    assert len(slots(flow)) == 1


def test_a_worker_answers_others_while_requests_wait_for_a_result(server, flow, eventually):
    worker = server.ask("/count/")["pid"]
    answers = []
    with held(flow):
        waiting = [threading.Thread(target=lambda: answers.append(server.ask("/count/"))) for _ in range(8)]
        for thread in waiting:
            thread.start()
        attachment = flow._client.attach()
        eventually(lambda: any(slot != attachment.slot for slot, _ in attachment.gate.unfinished()))  # they have called
        assert server.ask("/pid")["pid"] == worker
        assert not answers
    for thread in waiting:
        thread.join(PATIENCE)
    assert {answer["value"] for answer in answers} == set(range(2, 10))


def test_a_watch_and_callbacks_are_told(server, flow, eventually):
    assert sorted(answer["value"] for answer in at_once(server, "/call-back", 20)) == list(range(1, 21))
    server.ask("/follow")
    flow.state["news"] = 7
    eventually(lambda: server.ask("/told")["value"] == 7, PATIENCE)
    assert server.ask("/count/")["value"] == 21


def test_when_the_coordinator_is_killed_every_request_is_answered_and_counted_once(server, flow, eventually):
    assert server.ask("/call-back")["value"] == 1
    for _ in range(2):
        before = flow.state["count"]
        killer = threading.Timer(0.05, os.kill, (flow.stats().coordinator_pid, signal.SIGKILL))
        killer.start()
        at_once(server, "/count/", 100)
        killer.join()
        assert flow.state["count"] == before + 100


def test_the_master_which_is_not_patched_may_own_the_flow(gunicorn, flow, eventually):
    server = gunicorn(
        "gunicorn_flags:app", "--config", EXAMPLES / "gunicorn_owner.py", "--workers", WORKERS, *GEVENT, path="/x"
    )
    for number in range(2):
        coordinator = Place.of("flags").resident().pid
        os.kill(coordinator, signal.SIGKILL)
        eventually(lambda: Place.of("flags").resident().pid != coordinator)  # noqa: B023
        assert {answer["on"] for answer in at_once(server, "/x", 20)} == {number == 1}
        assert server.ask("/x", "PUT")["on"] is True
    flow.state["log-level"] = "ERROR"
    flow.close()
    assert server.stop() == 0
    assert not Place.of("flags").directory.exists()


def test_a_patched_process_is_told_that_it_owns_no_flow_and_may_attach(serve, run_python):
    serve("flags")
    code = """
        from gevent import monkey
        monkey.patch_all()
        from strictflow_mp import StrictFlow

        for begin in (StrictFlow("own").start_loop, lambda: StrictFlow("flags").spawn(print)):
            try:
                begin()
            except Exception as error:
                print(type(error).__name__, error)
        flow = StrictFlow("flags")
        flow.state["n"] = 1
        print(flow.reload() > 0, flow.state["n"])
    """
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
    own, spawn, works = done.stdout.splitlines()
    assert re.fullmatch(r"StrictFlowError flow 'own': gevent has patched this process, .* attach to it here", own)
    assert re.fullmatch(r"StrictFlowError flow 'flags': gevent has patched this process, .*", spawn)
    assert works == "True 1"
