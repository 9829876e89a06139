"""Out of descriptors or of threads: a newcomer is told which limit that is, and everybody else goes on."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import resource
import signal
import socket
import statistics
import threading
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace

import pytest

from strictflow_mp import StrictFlow, read, write
from strictflow_mp.coordinator import admission
from strictflow_mp.coordinator.admission import SHORTAGE_SECONDS, Admission, Door
from strictflow_mp.flow.supervisor import Supervisor
from strictflow_mp.system.descriptors import fill_standard
from strictflow_mp.system.place import Place
from strictflow_mp.system.shortage import limit_of, open_spare

pytestmark = pytest.mark.once

NEWCOMER = """
    import sys
    from strictflow_mp import StrictFlow
    flow = StrictFlow.attach(sys.argv[1], timeout=float(sys.argv[2]))
    print(flow.state["n"])
"""


@pytest.fixture
def descriptors():
    """What this process has open, as often as it is called."""
    return lambda: sorted(os.listdir("/proc/self/fd"))


@contextmanager
def no_descriptors(pid: int, limit: int | None = None):
    """In there, a process can open nothing that it does not close something for; at a lower *limit* not even that."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
    free = min(set(range(len(used) + 1)) - used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free if limit is None else limit, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_a_coordinator_without_descriptors_is_at_home_though_it_cannot_put_its_lock_back_yet(eventually):
    with StrictFlow("full", state={"n": 1}) as flow:

        @write(flow)
        def count_looks():
            from strictflow_mp.system.lease import Lease

            put_back = Lease.put_back
            Lease.tries = 0

            def counted(lease):
                Lease.tries += 1
                return put_back(lease)

            Lease.put_back = counted

        @read(flow)
        def looks():
            from strictflow_mp.system.lease import Lease

            return Lease.tries

        count_looks().result()
        assert looks().result() == 0
        place = Place.of("full")
        before = place.resident()
        with no_descriptors(before.pid):
            place.lock.unlink()
            eventually(lambda: looks().result() > 1)
        eventually(lambda: place.is_inhabited() and place.resident() == before)
        assert flow.stats().restarts == 0


def test_a_coordinator_without_descriptors_refuses_newcomers_and_serves_the_others(run_python):
    with StrictFlow("full", state={"n": 1}) as flow:
        coordinator = flow.stats().coordinator_pid
        with no_descriptors(coordinator):
            newcomer = run_python(NEWCOMER, "full", 0.3)
            assert "TooManyWorkers" in newcomer.stderr
            assert "RLIMIT_NOFILE is " in newcomer.stderr
            flow.put("n", 2).result()
            assert flow.state["n"] == 2
        assert run_python(NEWCOMER, "full", 5).stdout == "2\n"
        assert (flow.stats().coordinator_pid, flow.stats().restarts) == (coordinator, 0)


def test_a_coordinator_that_cannot_even_refuse_sleeps_between_two_looks_at_its_door(run_python, tmp_path, eventually):
    turns = tmp_path / "turns"
    with StrictFlow("full", state={"n": 1}) as flow:

        @write(flow)
        def write_down():
            from strictflow_mp.coordinator.sessions import Sessions

            file = os.open(turns, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

            def poll(self, timeout, kept=Sessions.poll):
                os.write(file, b".")
                return kept(self, timeout)

            def accept(self, kept=Door.accept):
                os.write(file, b"L")
                return kept(self)

            Sessions.poll, Door.accept = poll, accept

        write_down().result()
        coordinator = flow.stats().coordinator_pid
        with closing(socket.socket(socket.AF_UNIX)) as newcomer, no_descriptors(coordinator, limit=3):
            newcomer.connect(str(Place.of("full").socket))
            eventually(lambda: turns.read_bytes().count(b"L") > 4)
            # The turns of the loop between two looks: in one, nothing happens until its time is over.
            between = [len(gap) for gap in turns.read_bytes().split(b"L")[1:-1]]
            assert 2 <= statistics.median(between) <= 5, between
            flow.put("n", 2).result()
        assert run_python(NEWCOMER, "full", 5).stdout == "2\n"
        assert (flow.stats().coordinator_pid, flow.stats().restarts) == (coordinator, 0)


def test_an_owner_that_has_not_attached_can_stop_a_coordinator_without_descriptors():
    flow = StrictFlow("full")
    flow.start_loop()
    resident = Place.of("full").resident()
    assert resident is not None
    with suppress(ProcessLookupError), no_descriptors(resident.pid):  # afterwards there is no limit to be set back
        flow.stop_loop(timeout=30)
    assert not Place.of("full").is_inhabited()


def test_a_coordinator_without_threads_refuses_newcomers_and_serves_the_others(run_python):
    with StrictFlow("full", state={"n": 1}) as flow:

        @write(flow, timeout=20)
        def no_more_threads():
            def fail(self):
                raise RuntimeError("can't start new thread")

            threading.Thread.keep = threading.Thread.start
            threading.Thread.start = fail

        @write(flow, timeout=20)
        def threads_again():
            threading.Thread.start = threading.Thread.keep

        no_more_threads().result()
        newcomer = run_python(NEWCOMER, "full", 0.3)
        assert "TooManyWorkers" in newcomer.stderr
        assert "pids.max" in newcomer.stderr
        flow.put("n", 2).result()
        threads_again().result()
        assert run_python(NEWCOMER, "full", 5).stdout == "2\n"
        assert flow.stats().restarts == 0


def test_the_coordinator_may_open_as_much_as_it_may_allow_itself():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        with StrictFlow() as flow:
            assert resource.prlimit(flow.stats().coordinator_pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SHORT_CLIENT = """
    import errno, gc, os, resource
    from contextlib import closing
    from strictflow_mp import StrictFlow

    with closing(StrictFlow.attach("roomy")) as flow:  # what is loaded at first use is loaded
        assert flow.state["n"] == 1
    gc.collect()  # a handle that was closed leaves its mapping to the collector
    before = sorted(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes = []
    for room in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + room, hard))
        try:
            with closing(StrictFlow.attach("roomy", timeout=0.5)) as flow:
                outcomes.append(flow.state["n"])
        except OSError as error:
            outcomes.append(errno.errorcode[error.errno])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        gc.collect()
        assert sorted(os.listdir("/proc/self/fd")) == before
    print(*outcomes)
    print(sum(worker.state != "attached" for worker in StrictFlow.attach("roomy").stats().workers))
"""


def test_a_client_without_descriptors_gets_the_error_and_leaves_nothing(run_python):
    with StrictFlow("roomy", state={"n": 1}):
        ran = run_python(SHORT_CLIENT)
    assert ran.stderr == ""
    outcomes, left = ran.stdout.splitlines()
    assert set(outcomes.split()) == {"EMFILE", "1"}
    assert outcomes.split()[0] == "EMFILE"
    assert left == "0"


@pytest.fixture
def no_more_threads(monkeypatch):
    """No owner can watch its coordinator."""

    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Supervisor, "start", start)


def test_an_owner_that_cannot_watch_its_coordinator_leaves_nothing_behind(no_more_threads, descriptors):
    gc.collect()
    before = descriptors()
    with pytest.raises(RuntimeError):
        StrictFlow("unwatched").start_loop()
    assert not Place.of("unwatched").directory.exists()
    gc.collect()
    assert descriptors() == before


def test_an_owner_that_cannot_watch_a_coordinator_leaves_the_state_that_it_found(monkeypatch):
    """It is the former flow's: the next start goes on from it."""
    flow = StrictFlow("found", restart=False, state={"n": 1})
    flow.start_loop()
    flow.put("n", 2).result()
    os.kill(flow.stats().coordinator_pid, signal.SIGKILL)
    assert flow._owner.wait(30)
    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "start", lambda self: os.open("/nowhere", os.O_RDONLY))
        with pytest.raises(FileNotFoundError):
            StrictFlow("found").start_loop()
    with StrictFlow("found") as flow:
        assert flow.state["n"] == 2


def test_who_is_out_of_descriptors_has_no_standard_stream_to_fill():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        fill_standard()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Listener:
    """Nobody can be accepted there."""

    def accept(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def fileno(self):
        return 99

    def close(self):
        pass


class Watched:
    """What `Admission` needs of `Sessions`: who is called when a descriptor is ready, and all are, all the time."""

    def __init__(self):
        self.reactions = {}
        self.is_woken = False

    def watch(self, descriptor, react):
        self.reactions[descriptor] = react

    def unwatch(self, descriptor):
        del self.reactions[descriptor]

    def wake(self):
        self.is_woken = True


def test_a_door_that_cannot_even_refuse_says_so():
    door = Door(Listener(), b"", lambda: None, open_spare())
    assert not door.accept()
    assert door.is_short
    door.close()


def test_a_listener_of_whom_nobody_can_be_accepted_is_looked_at_again_after_a_while(monkeypatch):
    now = 0.0
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now))
    sessions = Watched()
    admits = Admission(sessions, None, Listener(), b"", {}, -1)
    looks = []
    for turn in range(100):
        now = turn * SHORTAGE_SECONDS / 10
        for react in list(sessions.reactions.values()):
            react()
            looks.append(turn)
        if sessions.is_woken:
            admits.admit()
    admits.door.close()
    assert len(looks) > 5
    assert {later - earlier for earlier, later in itertools.pairwise(looks)} <= {11, 12}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_each_limit_has_a_name(number):
    assert "out of" in limit_of(OSError(number, ""))
    assert "out of memory" in limit_of(MemoryError())
