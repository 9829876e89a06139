"""gunicorn: flags that all workers see at once, and workers that come and go in every way that gunicorn has."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import threading

import psutil
import pytest
from console import is_shown, typed
from holding import held
from servers import EXAMPLES, PATIENCE, README, pids_that_answer, slots

from strictflow_mp import StrictFlow
from strictflow_mp.system.place import Place

WORKERS = 3
KINDS = {
    "sync": ["--workers", WORKERS],
    "threads": ["--workers", WORKERS, "--worker-class", "gthread", "--threads", 4],
    "preload": ["--workers", WORKERS, "--preload"],
}


@pytest.fixture
def flow():
    return StrictFlow("flags")


@pytest.fixture(autouse=True)
def _detached(flow):
    yield
    flow.close()


def test_the_readme_s_quick_start_shows_what_happens(serve, gunicorn, run_python, tmp_path):
    section = README.read_text().split("\n## Behind gunicorn\n")[1].split("\n## ")[0]
    [program] = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    [block] = re.findall(r"^```console\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    (tmp_path / "gunicorn_flags.py").write_text(program)
    asked = 0
    for command, shown in typed(block):
        match shlex.split(command.removesuffix("&")):
            case ["python", "-m", "pip", "install", *_]:
                pass  # it is here
            case ["strictflow-mp", "serve", *arguments]:
                assert is_shown(serve(*arguments).says(), shown)
            case ["gunicorn", *options, app]:
                server = gunicorn(app, *options)
                assert is_shown(server.says(), shown)
            case ["curl", *method, url]:
                printed = server.ask(url.removeprefix("localhost:8000"), *method[1:])
                assert is_shown(json.dumps(printed), shown)
                asked += 1
            case ["python", "-c", code]:
                assert is_shown(run_python(code).stdout, shown)
            case other:
                pytest.fail(f"what is {other}?")
    assert asked == 4
    assert server.stop() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_worker_has_written_no_worker_reads_older(kind, serve, gunicorn, eventually):
    serve("flags")
    server = gunicorn("gunicorn_flags:app", *KINDS[kind])
    pids_that_answer(server, "/pid", WORKERS, eventually)
    wrote, read = set(), set()
    for number in range(60):
        is_on = number % 2 == 0
        wrote.add(server.ask("/dark-mode", "PUT" if is_on else "DELETE")["pid"])
        for _ in range(3):
            answer = server.ask("/dark-mode")
            assert answer["on"] is is_on
            read.add(answer["pid"])
    assert len(wrote) > 1
    assert len(read) == WORKERS
    assert server.stop() == 0


def test_a_flag_that_is_set_from_outside_is_seen_by_every_worker_at_once(serve, gunicorn, flow, eventually):
    serve("flags")
    server = gunicorn("gunicorn_flags:app", *KINDS["threads"])
    workers = pids_that_answer(server, "/pid", WORKERS, eventually)
    for number in range(30):
        flow.state["beta"] = number % 2 == 1
        answers = [server.ask("/beta") for _ in range(4)]
        assert {answer["on"] for answer in answers} == {number % 2 == 1}
    assert slots(flow) == workers
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


def test_a_handle_that_the_master_used_before_the_fork_works_in_every_worker(serve, gunicorn, flow, eventually):
    serve("flags")
    server = gunicorn("probe:app", *KINDS["preload"], USE_IN_MASTER="1")
    assert flow.state["preloaded"] == server.pid
    workers = pids_that_answer(server, "/count/", WORKERS, eventually)
    before = flow.state["count"]
    for _ in range(30):
        server.ask("/count/")
    assert flow.state["count"] == before + 30
    assert slots(flow) == {server.pid, *workers}
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_after_a_reload_the_new_workers_have_the_slots_of_the_old(preload, serve, gunicorn, flow, eventually):
    serve("flags")
    server = gunicorn("probe:app", "--workers", WORKERS, *preload)
    workers = pids_that_answer(server, "/count/", WORKERS, eventually)
    for _ in range(3):
        server.send(signal.SIGHUP)
        eventually(lambda: not workers & slots(flow), PATIENCE)  # noqa: B023
        workers = pids_that_answer(server, "/count/", WORKERS, eventually)
        eventually(lambda: slots(flow) == workers, PATIENCE)  # noqa: B023
        taken = {worker.slot for worker in flow.stats().workers}
        assert max(taken) <= 2 * WORKERS + 2
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


def test_workers_that_are_replaced_after_a_few_requests_lose_no_count_and_no_slot(serve, gunicorn, flow, eventually):
    serve("flags")
    server = gunicorn("probe:app", "--workers", 2, "--max-requests", 5)
    answered = {server.ask("/count/")["pid"] for _ in range(40)}
    assert flow.state["count"] == 40
    assert len(answered) > 4
    eventually(lambda: len(slots(flow)) <= 2)
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


SHOP = """
import json, os
from strictflow_mp import StrictFlow, write

flow = StrictFlow("shop")
RELEASE = {release!r}

@write(flow)
def sell():
    flow.state["sold"] = flow.state.get("sold", 0) + 1
    return RELEASE

def app(environ, start_response):
    answer = {{"value": sell().result(), "code": RELEASE, "pid": os.getpid()}}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
"""


@pytest.mark.parametrize("first", ["the coordinator", "the workers"])
def test_after_a_deploy_each_worker_s_tasks_are_its_own_code_at_every_moment(
    first, serve, gunicorn, run_python, tmp_path, eventually
):
    def deploy(release):
        (tmp_path / "shop.py").write_text(SHOP.format(release=release))

    def hup():
        server.send(signal.SIGHUP)
        seen = set()
        eventually(lambda: seen.add(pid_of("a later one")) or len(seen - {None}) == 2, PATIENCE)
        eventually(lambda: not any(psutil.pid_exists(pid) for pid in old), PATIENCE)

    def reload():
        done = run_python("-m", "strictflow_mp", "reload", "shop")
        assert (done.returncode, done.stderr) == (0, "")

    def pid_of(release):
        answer = ask()
        return answer["pid"] if answer["code"] == release else None

    def ask():
        answer = server.tries()
        if answer is None:
            return {"code": None}  # between two generations
        assert answer["value"] == answer["code"]
        asked.append(answer)
        return answer

    deploy("one")
    serve("shop")
    server = gunicorn("shop:app", "--workers", 2, path="/")
    asked = []
    old = pids_that_answer(server, "/", 2, eventually)  # both have imported it, before the next is there
    assert {ask()["code"] for _ in range(10)} == {"one"}
    deploy("a later one")  # of another length: else Python may take the file for the one that it has compiled
    assert {ask()["code"] for _ in range(10)} == {"one"}
    for step in (reload, hup) if first == "the coordinator" else (hup, reload):
        step()
        for _ in range(10):
            ask()
    assert {answer["code"] for answer in asked[-10:]} == {"a later one"}
    flow = StrictFlow("shop")
    assert flow.state["sold"] >= len(asked)
    assert flow.stats().reloads == 1
    flow.close()
    assert server.stop() == 0


def begin(server, path):
    """A request that will not be answered."""
    thread = threading.Thread(target=server.tries, args=(path,), daemon=True)
    thread.start()
    return thread


def test_a_worker_that_is_killed_at_the_gate_keeps_no_slot(serve, gunicorn, flow, eventually):
    serve("flags")
    server = gunicorn("probe:app", "--workers", 1, "--timeout", 2)
    worker = server.ask("/count/")["pid"]
    with held(flow) as task:
        request = begin(server, "/hang-at-gate")
        eventually(lambda: "WORKER TIMEOUT" in server.says(), PATIENCE)
        request.join(PATIENCE)
        assert not task.done()
    eventually(lambda: worker not in slots(flow))
    assert server.ask("/set/after=1")
    assert flow.state["after"] == 1
    assert server.stop() == 0
    eventually(lambda: not slots(flow))


def test_a_worker_that_is_killed_while_its_p1_runs_leaves_no_flag_up(serve, gunicorn, flow, eventually, tmp_path):
    serve("flags")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    server = gunicorn("probe:app", "--workers", 1, "--timeout", 2, FIFO=str(fifo))
    worker = server.ask("/pid")["pid"]
    assert "held" not in flow.state  # attached by now: while the P1 runs nobody would let us in
    request = begin(server, "/hang-in-p1")
    with fifo.open("wb"):
        eventually(lambda: "WORKER TIMEOUT" in server.says(), PATIENCE)
        request.join(PATIENCE)
        eventually(lambda: server.tries("/pid"), PATIENCE)
        assert "held" not in flow.snapshot(gated=False)
    assert flow.state["held"] is True  # it had been submitted: it runs to its end
    eventually(lambda: worker not in slots(flow))
    assert server.ask("/get/held")["value"] is True
    assert server.stop() == 0


def test_a_worker_that_is_killed_amid_a_snapshot_leaves_no_pin(serve, gunicorn, flow, eventually):
    serve("flags")
    server = gunicorn("probe:app", "--workers", 1, "--timeout", 2)
    worker = server.ask("/count/")["pid"]
    request = begin(server, "/hang-with-snapshot")
    eventually(lambda: "WORKER TIMEOUT" in server.says(), PATIENCE)
    request.join(PATIENCE)
    eventually(lambda: worker not in slots(flow))
    segment = flow._client.attach().segment
    eventually(lambda: server.tries("/pid"), PATIENCE)  # a signal to a worker that is still being forked is lost
    assert not any(segment.words[segment.pins + 16 : segment.pins + 16 * segment.slots].tolist())
    assert server.stop() == 0


def test_the_master_may_own_the_flow_and_its_workers_follow_a_setting(gunicorn, flow, eventually):
    server = gunicorn("gunicorn_flags:app", "--config", EXAMPLES / "gunicorn_owner.py", "--workers", WORKERS)
    pids_that_answer(server, "/pid", WORKERS, eventually)
    assert server.ask("/x", "PUT")["on"] is True
    eventually(lambda: len(slots(flow)) == WORKERS)
    assert "tick" not in server.says()
    for number in range(5):  # the master waits for any child, the coordinator too: that must not hide its death
        coordinator = Place.of("flags").resident().pid
        os.kill(coordinator, signal.SIGKILL)
        eventually(lambda: Place.of("flags").resident().pid != coordinator)  # noqa: B023
        flow.state["tick"] = number
        assert server.ask("/x")["on"] is True
    server.send(signal.SIGHUP)
    eventually(lambda: server.says().count("Booting worker") >= 2 * WORKERS, PATIENCE)
    assert server.ask("/x")["on"] is True
    flow.close()
    assert server.stop() == 0
    assert not Place.of("flags").directory.exists()
