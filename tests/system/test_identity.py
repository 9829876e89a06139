"""Identity: a process is taken for dead only when that is proved, whatever pids come back and whoever is hidden."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

import strictflow_mp
from strictflow_mp import StrictFlow, read
from strictflow_mp.system import identity as processes_module
from strictflow_mp.system.identity import Identity, open_pidfd
from strictflow_mp.system.place import Place
from strictflow_mp.wire import handshake

ENTER = ["unshare", "--user", "--map-root-user"]
NO_PROC = [*ENTER, "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
NEW_SPACE = [*ENTER, "--pid", "--fork", "--kill-child", "--mount-proc"]
SLEEP = [sys.executable, "-c", "input()"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP, stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and leave the zombie."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_a_process_that_lives_is_not_dead(sleeper):
    assert not Identity.mine().is_dead()
    assert not Identity.of(sleeper.pid).is_dead()


def test_a_zombie_is_dead_and_so_is_who_has_no_pid_any_more(sleeper):
    identity = Identity.of(sleeper.pid)
    end(sleeper)
    assert identity.is_dead()
    sleeper.wait()
    assert identity.is_dead()


def test_a_pid_that_came_back_is_another_process(sleeper):
    now = Identity.of(sleeper.pid)
    assert now._replace(start=now.start - 1).is_dead()


def test_after_a_reboot_everybody_is_dead():
    mine = Identity.mine()
    assert mine._replace(boot=mine.boot + 1).is_dead()
    assert not mine._replace(boot=0).is_dead(), "an unknown boot proves nothing"
    assert not mine._replace(pid=0, boot=mine.boot + 1).is_dead(), "pid 0 is nobody's"


def test_who_is_not_seen_is_dead_only_when_the_kernel_knows_no_such_pid(sleeper):
    unseen = Identity.of(sleeper.pid)._replace(start=0)
    assert not unseen.is_dead()
    end(sleeper)
    sleeper.wait()
    assert unseen.is_dead()


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_whoever_hides_proc_from_us_makes_nobody_dead_and_nobody_another(sleeper, monkeypatch, error):
    seen = Identity.of(sleeper.pid)._replace(space=0)

    def refuse(*args):
        raise error(args)

    monkeypatch.setattr(processes_module, "open", refuse, raising=False)
    monkeypatch.setattr("os.path.isdir", lambda path: error is PermissionError)
    assert Identity.of(sleeper.pid).start == 0
    assert not seen.is_dead()
    with monkeypatch.context() as patch:
        patch.setattr("os.kill", lambda *_: (_ for _ in ()).throw(PermissionError))
        assert not seen.is_dead(), "it is another user's"
    end(sleeper)
    sleeper.wait()
    assert seen.is_dead() == (error is FileNotFoundError), "what we may not look at proves nothing"


@pytest.mark.parametrize("has_threads", [True, False])
def test_a_process_is_to_itself_who_it_is_to_others_though_an_emulator_makes_up_what_it_sees(monkeypatch, has_threads):
    """As qemu-user does it: under a process's own name, and that of `self`, and nowhere else."""
    mine, beginning = Identity.mine(), processes_module.beginning_of(os.getpid())
    others_see = subprocess.run(
        [*SLEEP[:2], f"from {Identity.__module__} import *; print(start_time({mine.pid}), beginning_of({mine.pid}))"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert others_see == [str(mine.start), str(beginning)]

    def emulated(path, *args):
        if "/task/" in path and not has_threads:
            raise FileNotFoundError(path)
        if has_threads and path in {f"/proc/{name}/{file}" for name in ("self", mine.pid) for file in ("stat", "auxv")}:
            return open("/proc/1/" + path.rpartition("/")[2], *args)
        return open(path, *args)

    monkeypatch.setattr(processes_module, "open", emulated, raising=False)
    assert (Identity.mine(), processes_module.beginning_of(mine.pid)) == (mine, beginning)
    assert not mine.is_dead()


def test_a_process_of_another_pid_namespace_is_never_proved_dead(sleeper):
    there = Identity.of(sleeper.pid)._replace(space=1)
    end(sleeper)
    sleeper.wait()
    assert not there.is_dead()
    assert open_pidfd(there) == -1
    assert there.may_be(Identity.mine())


def test_the_wall_clock_says_nothing_about_who_somebody_is(sleeper, monkeypatch):
    identity = Identity.of(sleeper.pid)
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert Identity.of(sleeper.pid) == identity
    assert not identity.is_dead()


def call_inside(flow: StrictFlow, function: Callable[..., Any], *args: Any) -> Any:
    @read(flow)
    def inside():
        return function(*args)

    return inside().result()


def kill_whoever_is_welcomed_next() -> None:
    welcome = handshake.welcome

    def welcome_and_kill(sock, answer):
        handshake.welcome = welcome
        welcome(sock, answer)
        pid = handshake.peer(sock)[0]
        os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{pid}"):  # until its parent has reaped it
            pass

    handshake.welcome = welcome_and_kill


ATTACH = """
    from strictflow_mp import StrictFlow
    flow = StrictFlow("early")
    while True:
        flow.put("n", 1)
"""


def test_a_process_that_is_killed_as_soon_as_it_is_let_in_leaves_its_slot(eventually):
    with StrictFlow("early", state={"n": 0}, max_workers=3) as flow:
        for _ in range(4):
            call_inside(flow, kill_whoever_is_welcomed_next)
            newcomer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(ATTACH)], env=environment())
            assert newcomer.wait(timeout=30) == -signal.SIGKILL
            eventually(lambda: [worker.pid for worker in flow.stats().workers] == [os.getpid()])
        assert flow._client.attach().gate.is_open()


def environment() -> dict[str, str]:
    root = os.path.dirname(os.path.dirname(strictflow_mp.__file__))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _turn(process: subprocess.Popen[str], said: str = "") -> str:
    """Say a line, unless it is empty; hear one."""
    if said:
        print(said, file=process.stdin, flush=True)
    return process.stdout.readline().strip()


@pytest.fixture
def within() -> Iterator[Callable[..., Any]]:
    """`within(how, code)`: a context with a process that runs *code* somewhere else, and whose lines are read."""
    made: list[subprocess.Popen[str]] = []

    @contextmanager
    def within(how: list[str], code: str) -> Iterator[Callable[..., str]]:
        program = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
        process = subprocess.Popen(
            [*how, *program], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        made.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield partial(_turn, process)
        finally:
            process.stdin.close()
            code = process.wait(timeout=30)
        assert code == 0

    if subprocess.run([*NEW_SPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces to be had here")
    yield within
    for process in made:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            stream.close()


def test_without_proc_a_flow_outlives_its_coordinator_and_takes_slots_back_from_the_dead(within):
    serve = """
        import os, signal, sys
        from strictflow_mp import StrictFlow

        def submit(parts):
            for number in range(parts):
                StrictFlow("blind").put(number, os.getpid()).result()

        with StrictFlow("blind", max_workers=3) as flow:
            for _ in range(3):
                flow.spawn(submit, 5, processes=2).join()
            os.kill(flow.stats().coordinator_pid, signal.SIGKILL)
            flow.put("n", 1).result()
            flow.spawn(submit, 5, processes=2).join()
            print(os.path.exists("/proc/self"), sorted(flow.state.keys(), key=str), flow.stats().restarts, flush=True)
    """
    with within(NO_PROC, serve) as turn:
        assert turn() == "False [0, 1, 2, 3, 4, 'n'] 1"


def test_a_process_in_a_container_of_ours_is_watched_like_any_other(within, eventually):
    attach = """
        import os, sys
        from strictflow_mp import StrictFlow
        flow = StrictFlow("outer")
        flow.put("pid", os.getpid()).result()
        print(flow.state["pid"], flush=True)
        sys.stdin.readline()
        os._exit(0)  # without a goodbye
    """
    with StrictFlow("outer", state={"pid": 0}) as flow:
        with within(NEW_SPACE, attach) as turn:
            assert turn() == "1"
            assert flow.state["pid"] == 1
            assert all(worker.pid != 1 for worker in flow.stats().workers)
        eventually(lambda: len(flow.stats().workers) == 1)


SERVE_INSIDE = """
    import os, sys
    from strictflow_mp import StrictFlow
    with StrictFlow("inner", state={"n": 0}, max_workers=4) as flow:
        print("ready", flush=True)
        while sys.stdin.readline():
            os.kill(flow.stats().coordinator_pid, 9)
            print(flow.state["n"], flow.stats().restarts, flush=True)
"""


def test_a_process_outside_of_the_coordinators_container_keeps_its_slot_though_nobody_there_can_see_it(
    within, run_python
):
    with within(NEW_SPACE, SERVE_INSIDE) as turn:
        assert turn() == "ready"
        flow = StrictFlow("inner")
        try:
            flow.put("n", 1).result()
            flow.state["n"] = 2
            killed = run_python("""
                import os
                from strictflow_mp import StrictFlow
                flow = StrictFlow("inner")
                flow.put("n", 3).result()
                flow.put("n", 4)
                os.kill(os.getpid(), 9)
            """)
            assert killed.returncode == -signal.SIGKILL
            assert flow.state["n"] == 4, "what it had submitted has run, and its flag holds up nobody"
            states = {worker.slot: worker.state for worker in flow.stats().workers}
            mine = flow._client.attach().slot
            assert states.pop(mine) == "attached"
            assert list(states.values()) == ["leaving"], "for all they know there, it may still live"
        finally:
            flow.close()


def test_a_process_outside_comes_back_to_the_next_coordinator_of_the_container(within):
    with within(NEW_SPACE, SERVE_INSIDE) as turn:
        assert turn() == "ready"
        flow = StrictFlow("inner")
        try:
            flow.put("n", 1).result()
            slot = flow._client.attach().slot
            assert turn("kill") == "1 1"
            flow.put("n", 2).result()
            assert flow._client.attach().slot == slot
        finally:
            flow.close()


def test_a_lock_that_is_held_says_that_somebody_lives_whatever_the_pid_in_it_means(within):
    with within(NEW_SPACE, SERVE_INSIDE) as turn:
        assert turn() == "ready"
        resident = Place.of("inner").resident()
        assert resident.identity.space != Identity.mine().space
        assert not resident.identity.is_dead()
        assert Place.of("inner").is_inhabited()
