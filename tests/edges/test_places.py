"""Whose flow it is: by its place and token, which are kept, and never by a name that is looked up again."""

from __future__ import annotations

import errno
import glob
import logging
import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from strictflow_mp import CoordinatorLost, FlowNotRunning, StrictFlow, StrictFlowError
from strictflow_mp.client import comeback
from strictflow_mp.memory.leftovers import sweep
from strictflow_mp.system import posix
from strictflow_mp.system.place import Place, Resident

pytestmark = pytest.mark.once

NAME = "homely"
RESOLVED = 20.0
"""Seconds in which a future has to be resolved; so long only for machines that are very busy."""


@pytest.fixture
def flow() -> Iterator[StrictFlow]:
    flow = StrictFlow(NAME, state={"n": 0})
    flow.start_loop()
    flow.state["n"] = 42
    yield flow
    with suppress(StrictFlowError):
        flow.stop_loop()


def resident(place: Place) -> Resident:
    found = place.resident()
    assert found is not None
    return found


def remove_all(place: Place) -> None:
    """What systemd-logind does with RemoveIPC=yes when the user logs out."""
    token = resident(place).token
    shutil.rmtree(place.directory)
    with suppress(posix.ExistentialError):
        posix.unlink_shared_memory(f"/sfmp-{token}")
    for path in glob.glob(f"/dev/shm/sem.sfmp-{token}.*"):
        os.unlink(path)


@pytest.mark.parametrize("what", ["environment", "working directory"])
def test_a_flow_is_where_it_was_whatever_changes_afterwards(what, runtime_dir, tmp_path, monkeypatch, eventually):
    if what == "working directory":
        monkeypatch.chdir(runtime_dir.parent)
        monkeypatch.setenv("STRICTFLOW_MP_DIR", runtime_dir.name)
    with StrictFlow(NAME, state={"n": 0}) as flow:
        flow.state["n"] = 42
        place = Place(runtime_dir / Place.of(NAME).directory.name)
        former = resident(place).pid
        if what == "working directory":
            monkeypatch.chdir(tmp_path)
        else:
            monkeypatch.setenv("STRICTFLOW_MP_DIR", str(tmp_path / "elsewhere"))
        assert flow.is_running
        os.kill(former, signal.SIGKILL)
        eventually(lambda: resident(place).pid != former)
        assert flow.put("m", 1).result(RESOLVED) is None
        assert dict(flow.snapshot()) == {"n": 42, "m": 1}
        flow._client.close()
        StrictFlow(NAME)  # looks for itself; the owner knows where its flow is
    assert not place.directory.exists()
    assert os.listdir(tmp_path) == []


def test_a_handle_that_travels_knows_where_its_flow_is(flow, run_python, tmp_path):
    packed = pickle.dumps(flow)
    code = f"import pickle; print(pickle.loads({packed!r}).state['n'])"
    seen = run_python(code, env={"STRICTFLOW_MP_DIR": str(tmp_path)})
    assert (seen.stdout, seen.stderr) == ("42\n", "")


def test_a_lock_that_was_removed_is_put_back_and_nobody_moves_in_meanwhile(flow, eventually, run_python):
    place = Place.of(NAME)
    before = resident(place)
    os.kill(before.pid, signal.SIGSTOP)
    try:
        place.lock.unlink()
        assert sweep() == []
        with pytest.raises(StrictFlowError, match="still lives"):
            StrictFlow(NAME, state={"n": "another"}).start_loop()
    finally:
        os.kill(before.pid, signal.SIGCONT)
    eventually(lambda: place.is_inhabited() and place.resident() == before)
    seen = run_python(f"from strictflow_mp import StrictFlow; print(StrictFlow({NAME!r}).state['n'])")
    assert (seen.stdout, seen.stderr) == ("42\n", "")


def test_a_flow_whose_files_were_removed_ends_and_leaves_the_next_of_its_name_alone(flow, eventually, run_python):
    place = Place.of(NAME)
    remove_all(place)
    eventually(lambda: flow._owner is not None and flow._owner.wait(0.01))
    with pytest.raises(FlowNotRunning):
        _ = flow.state["n"]
    other = StrictFlow(NAME, state={"n": "another"})
    other.start_loop()
    try:
        flow.stop_loop()
        seen = run_python(f"from strictflow_mp import StrictFlow; print(StrictFlow({NAME!r}).state['n'])")
        assert (seen.stdout, seen.stderr) == ("another\n", "")
    finally:
        other.stop_loop()


@pytest.mark.parametrize("what", ["segment", "socket", "key", "socket and key", "socket, for another one"])
def test_a_flow_that_no_newcomer_finds_any_more_ends_though_it_has_its_lock(what, flow, eventually, run_python):
    place = Place.of(NAME)
    if what == "segment":
        posix.unlink_shared_memory(f"/sfmp-{resident(place).token}")
    for path in (place.socket, place.key):
        if path.name in what:
            path.unlink()
    if "another" in what:
        place.socket.touch()
    eventually(lambda: flow._owner is not None and flow._owner.wait(0.01))
    assert flow._owner.child.exitcode == 0
    with pytest.raises(FlowNotRunning):
        _ = flow.state["n"]
    assert not place.directory.exists()
    with StrictFlow(NAME, state={"n": "another"}):
        seen = run_python(f"from strictflow_mp import StrictFlow; print(StrictFlow({NAME!r}).state['n'])")
    assert (seen.stdout, seen.stderr) == ("another\n", "")


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, ""), posix.PermissionsError("")])
def test_that_the_segments_name_cannot_be_looked_at_does_not_say_that_it_is_gone(error, flow, monkeypatch):
    def fail(*_):
        raise error

    segment = flow._client.attach().segment
    monkeypatch.setattr(posix, "SharedMemory", fail)
    assert segment.is_named()


def test_a_flow_whose_place_is_out_of_sight_runs_as_long_as_its_coordinator_is_not_proved_dead(flow):
    attachment = flow._client.attach()
    # As after chroot, or of a process that may not look there any more.
    attachment.place = flow._client._place = Place(attachment.place.directory / "out of sight")
    other = StrictFlow(NAME)  # which has not started it
    assert other.is_running
    flow.stop_loop()
    assert not other.is_running


def test_a_stop_of_a_flow_whose_place_is_another_flows_by_now_does_not_reach_that(flow, run_python):
    place = Place.of(NAME)
    former = resident(place).pid
    os.kill(former, signal.SIGSTOP)
    remove_all(place)
    other = StrictFlow(NAME, state={"n": "another"})
    other.start_loop()
    try:
        os.kill(former, signal.SIGCONT)
        flow._client.close()
        flow.stop_loop()
        seen = run_python(f"from strictflow_mp import StrictFlow; print(StrictFlow({NAME!r}).state['n'])")
        assert (seen.stdout, seen.stderr) == ("another\n", "")
    finally:
        other.stop_loop()


def test_a_restart_that_finds_nobody_to_follow_does_not_begin_with_an_empty_state(flow, eventually, caplog):
    place = Place.of(NAME)
    os.kill(resident(place).pid, signal.SIGSTOP)
    child = flow._owner.child
    remove_all(place)
    with caplog.at_level(logging.ERROR):
        child.kill()
        eventually(lambda: not flow.is_running)
        with pytest.raises(CoordinatorLost):
            _ = flow.state["n"]
    assert "nobody to follow" in caplog.text
    assert not place.directory.exists()


def test_a_death_that_is_not_proved_is_not_told_as_one(flow, monkeypatch, eventually):
    monkeypatch.setattr(comeback, "RESTART_SECONDS", 0.1)
    monkeypatch.setattr(comeback, "EXPELLED_SECONDS", 0.1)
    attachment = flow._client.attach()
    # Of another pid namespace, in a place that we may not look at any more.
    attachment.server_identity = attachment.server_identity._replace(space=1)
    attachment.place = Place(attachment.place.directory / "out of sight")
    pid = attachment.coordinator
    os.kill(pid, signal.SIGSTOP)
    future = flow.put("n", 43)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CoordinatorLost, match="unknown"):
        future.result(RESOLVED)


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_a_process_that_has_become_another_user_is_told_so(run_python):
    code = """
        import os
        from strictflow_mp import StrictFlow, StrictFlowError

        flow = StrictFlow("homely", state={"n": 0})
        flow.start_loop()
        flow.state["n"] = 42
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            try:
                flow.state["n"]
            except StrictFlowError as error:
                print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        flow.stop_loop()
    """
    said = run_python(code)
    assert "belongs to user 0, and this process runs as user 65534" in said.stdout
    assert said.stderr == ""


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A directory where another user may begin flows."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(directory, 65534, -1)
    yield directory
    shutil.rmtree(directory)


# The second one may still run the interpreter, wherever that is.
@pytest.mark.parametrize("become", ["os.setuid(65534)", "os.setreuid(65534, -1)"])
@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_an_owner_that_has_become_another_user_starts_no_other_coordinator(become, run_python, theirs):
    code = """
        import logging, os, subprocess, sys, time
        from strictflow_mp import CoordinatorLost, StrictFlow
        from strictflow_mp.client import comeback
        from strictflow_mp.flow import supervisor

        comeback.RESTART_SECONDS = supervisor.COORDINATOR_PAUSE_SECONDS = 0.001
        logging.basicConfig(stream=sys.stdout, level="ERROR")
        flow = StrictFlow("homely", state={"n": 0})
        flow.start_loop()
        command = f"read go; kill -KILL {flow.stats().coordinator_pid}"
        killer = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE)  # it stays what it is
        os.environ["STRICTFLOW_MP_DIR"] = sys.argv[1]
        BECOME
        flow.state["n"] = 42
        killer.communicate(b"go\\n")
        while flow.is_running:
            time.sleep(0.01)
        print("left", flow.state["n"])
        try:
            flow.put("n", 43).result()
        except CoordinatorLost as error:
            print("lost", error)
        flow.stop_loop()
    """
    said = run_python(code.replace("BECOME", become), theirs)
    assert said.stderr == ""
    assert "; given up" in said.stdout
    assert ("cannot be followed" in said.stdout) or become == "os.setuid(65534)"
    assert "left 42\n" in said.stdout
    assert "lost flow 'homely': put() was not executed" in said.stdout
    assert list(theirs.iterdir()) == []
    with StrictFlow(NAME, state={"n": "a first state that does not count"}) as flow:
        assert flow.state["n"] == 42
