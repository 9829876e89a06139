"""The gate: a read waits for what was submitted before it, for nothing else, and always wakes.

Most tests have a segment and its keeper, but no coordinator: they finish tasks themselves. A `Reader` that
goes on waiting shows it by looking, once a slice, whether the coordinator lives.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import secrets
import signal
import threading
import time

import posix_ipc
import pytest

from strictflow_mp import FlowNotRunning, StrictFlow
from strictflow_mp import gate as gate_module
from strictflow_mp.gate import Gate, GateKeeper, condemn, semaphore_name
from strictflow_mp.processes import Identity
from strictflow_mp.segment import Segment

SLOTS = 8
FOR_EVER = 1e6
"""Seconds. Nobody waits that long: a test that loses a wake-up does not end."""


class House:
    """A segment, its keeper, and a gate for each slot that a test uses."""

    def __init__(self):
        self.token = secrets.token_hex(6)
        self.segment = Segment.create(
            self.token, "house", capacity=1, slots=SLOTS, identity=Identity(os.getpid(), 0, 0, 0)
        )
        self.keeper = GateKeeper(self.segment, self.token)
        self.gates = {}
        self.readers = []

    def gate(self, slot):
        if slot not in self.gates:
            name = self.keeper.admit(slot, Identity(os.getpid(), 0, 0, 0))
            self.gates[slot] = Gate(self.segment, slot, posix_ipc.Semaphore(name))
        return self.gates[slot]

    def reader(self, slot, deadline=None):
        self.readers.append(Reader(self.gate(slot), deadline))
        return self.readers[-1]

    def word(self, array, slot):
        return self.segment.words[getattr(self.segment, array) + slot]

    def set_word(self, array, slot, value):
        self.segment.words[getattr(self.segment, array) + slot] = value

    def sleeps(self, slot):
        return bool(self.word("waiting", slot))

    def close(self):
        asleep = [reader for reader in self.readers if reader.is_alive()]
        for slot, gate in self.gates.items():
            self.keeper.dismiss(slot)
            if not asleep:
                gate.release()
        self.segment.close()
        self.segment.unlink()
        assert not asleep, "a reader was not woken"


@pytest.fixture
def house():
    house = House()
    yield house
    house.close()


@pytest.fixture
def asleep(monkeypatch):
    """Readers sleep at once."""
    monkeypatch.setattr(gate_module, "SPIN", 0)


@pytest.fixture
def sound_asleep(asleep, monkeypatch):
    """Readers sleep at once, and nothing but a post wakes them."""
    monkeypatch.setattr(gate_module, "SLICE", FOR_EVER)


class Reader(threading.Thread):
    """A thread that waits at a gate."""

    def __init__(self, gate, deadline=None):
        super().__init__(daemon=True)
        self._gate = gate
        self._deadline = deadline
        self.looks = 0
        self._outcome = None
        self.start()

    def run(self):
        try:
            self._outcome = self._gate.wait(self._deadline, self._look)
        except BaseException as error:
            self._outcome = error

    def _look(self):
        self.looks += 1

    def result(self):
        self.join(15)
        assert not self.is_alive(), "nobody woke the reader"
        return self._outcome

    def goes_on_waiting(self, eventually):
        before = self.looks
        eventually(lambda: self.looks >= before + 2 or not self.is_alive())
        return self.is_alive()


def followers(gate):
    return len(gate._followers)


def nothing():
    pass


# What a read waits for


def test_a_read_passes_at_once_when_nothing_is_unfinished(house, sound_asleep):
    house.gate(1).raise_flag(1)
    house.keeper.finish({1: 1})
    assert house.gate(2).is_open()
    assert house.reader(2, -math.inf).result() is True


def test_a_read_waits_for_every_task_submitted_before_it(house, asleep, eventually):
    house.gate(1).raise_flag(2)
    house.gate(2).raise_flag(1)
    reader = house.reader(3)
    for slot, number in ((1, 1), (1, 2), (2, 1)):
        assert reader.goes_on_waiting(eventually)
        house.keeper.finish({slot: number})
    assert reader.result() is True


def test_a_read_waits_for_the_tasks_of_its_own_process(house, asleep, eventually):
    house.gate(1).raise_flag(1)
    reader = house.reader(1)
    assert reader.goes_on_waiting(eventually)
    house.keeper.finish({1: 1})
    assert reader.result() is True


def test_a_read_waits_for_the_burst_that_runs(house, asleep, eventually):
    house.keeper.raise_own()
    reader = house.reader(1)
    assert reader.goes_on_waiting(eventually)
    house.keeper.finish({})
    assert reader.result() is True


def test_a_read_waits_for_nothing_submitted_after_it_began(house, asleep, eventually):
    house.gate(1).raise_flag(1)
    reader = house.reader(3)
    eventually(lambda: house.sleeps(3))
    for slot in (1, 2):
        house.gate(slot).raise_flag(5)
    house.keeper.finish({1: 1})
    assert reader.result() is True
    assert house.keeper.is_up()


def test_a_task_that_is_finished_before_it_is_counted_raises_no_flag(house):
    house.gate(1)
    house.keeper.finish({1: 1})
    assert not house.keeper.is_up()
    assert house.gate(2).wait(-math.inf, nothing) is True
    house.gate(1).raise_flag(1)
    assert house.gate(2).is_open()


# Deadlines, and who is asked whether the coordinator lives


def test_a_read_gives_up_when_its_deadline_has_passed(house, sound_asleep):
    house.gate(1).raise_flag(1)
    assert house.reader(2, time.monotonic() - 1).result() is False
    assert house.reader(2, time.monotonic() + 0.02).result() is False
    assert not house.sleeps(2)


def test_a_thread_that_follows_gives_up_at_its_own_deadline(house, sound_asleep, eventually):
    house.gate(1).raise_flag(1)
    leader = house.reader(2)
    eventually(lambda: house.sleeps(2))
    follower = house.reader(2, time.monotonic() + 0.02)
    assert follower.result() is False
    house.keeper.finish({1: 1})
    assert leader.result() is True


def test_a_read_ends_with_the_error_of_whoever_found_the_coordinator_dead(house, asleep):
    house.gate(1).raise_flag(1)

    def is_dead():
        raise FlowNotRunning("dead")

    with pytest.raises(FlowNotRunning):
        house.gate(2).wait(None, is_dead)
    assert not house.sleeps(2)


# Spin, sleep, wake


def test_a_short_wait_spins_and_touches_no_semaphore(house, monkeypatch):
    monkeypatch.setattr(gate_module, "SPIN", FOR_EVER)
    house.gate(1).raise_flag(1)
    reader = Reader(Gate(house.segment, 2, semaphore=None))
    house.keeper.finish({1: 1})
    assert reader.result() is True


def test_a_long_wait_sleeps_until_a_post(house, sound_asleep, eventually):
    house.gate(1).raise_flag(1)
    reader = house.reader(2)
    eventually(lambda: house.sleeps(2))
    assert house.reader(3, time.monotonic() + 0.02).result() is False
    assert reader.looks == 0, "it looked again though nobody had woken it"
    house.keeper.finish({1: 1})
    assert reader.result() is True
    assert not house.sleeps(2)


def test_waits_are_counted_and_timed(house, asleep):
    house.gate(2).wait(None, nothing)
    assert (house.word("waits", 2), house.word("waited", 2)) == (0, 0)
    house.gate(1).raise_flag(1)
    house.gate(2).wait(time.monotonic() + 0.01, nothing)
    assert house.word("waits", 2) == 1
    assert house.word("waited", 2) >= 5_000_000


def test_a_post_too_many_ends_no_wait(house, asleep, eventually):
    house.gate(1).raise_flag(1)
    name = semaphore_name(house.token, 2)
    house.gate(2)
    extra = posix_ipc.Semaphore(name)
    for _ in range(3):
        extra.release()
    extra.close()
    reader = house.reader(2)
    assert reader.goes_on_waiting(eventually)
    house.keeper.finish({1: 1})
    assert reader.result() is True


def test_a_lost_post_is_made_good_by_the_next_slice(house, asleep, eventually):
    house.gate(1).raise_flag(1)
    reader = house.reader(2)
    eventually(lambda: house.sleeps(2))
    house.set_word("finished", 1, 1)
    assert reader.result() is True


def at_the_fence(monkeypatch, action):
    """Do something at the next fence, where a store must have been made and a load must not."""
    actions = [action]

    def fence():
        if actions:
            actions.pop()()
        fence_itself()

    fence_itself = gate_module.fence
    monkeypatch.setattr(gate_module, "fence", fence)


def test_a_reader_says_that_it_sleeps_and_then_looks_once_more(house, sound_asleep, monkeypatch):
    house.gate(1).raise_flag(1)
    said = []

    def finish_too_late_to_see_it():
        said.append(house.sleeps(2))
        house.set_word("finished", 1, 1)

    at_the_fence(monkeypatch, finish_too_late_to_see_it)
    assert house.reader(2).result() is True
    assert said == [True]


def test_the_keeper_says_what_is_finished_and_then_looks_for_sleepers(house, monkeypatch):
    house.gate(1).raise_flag(1)
    house.gate(2)
    finished = []

    def sleep_just_now():
        finished.append(house.word("finished", 1))
        house.set_word("waiting", 2, 1)

    at_the_fence(monkeypatch, sleep_just_now)
    house.keeper.finish({1: 1})
    assert finished == [1]
    semaphore = posix_ipc.Semaphore(semaphore_name(house.token, 2))
    semaphore.acquire(0)
    semaphore.close()


def test_all_threads_of_a_process_wake(house, sound_asleep, eventually):
    house.gate(1).raise_flag(1)
    readers = [house.reader(2) for _ in range(8)]
    eventually(lambda: house.sleeps(2) and followers(house.gate(2)) == 7)
    house.keeper.finish({1: 1})
    assert [reader.result() for reader in readers] == [True] * 8


def test_a_thread_that_follows_takes_over_when_the_leader_leaves(house, sound_asleep, eventually):
    gate = house.gate(3)
    house.gate(1).raise_flag(1)
    leader = house.reader(3)
    eventually(lambda: house.sleeps(3))
    house.gate(2).raise_flag(1)
    follower = house.reader(3)
    eventually(lambda: followers(gate))
    house.keeper.finish({1: 1})
    assert leader.result() is True
    eventually(lambda: house.sleeps(3))
    house.keeper.finish({2: 1})
    assert follower.result() is True


def test_a_thread_takes_over_from_a_leader_that_leaves_while_it_makes_ready_to_follow(house, sound_asleep, eventually):
    gate = house.gate(3)
    house.gate(1).raise_flag(1)
    leader = house.reader(3)
    eventually(lambda: house.sleeps(3))
    house.gate(2).raise_flag(1)

    class Leadership(dict):
        """The leader leaves just when somebody has found that there is one."""

        def setdefault(self, key, thread):
            holder = super().setdefault(key, thread)
            if holder != thread and leader.is_alive():
                house.keeper.finish({1: 1})
                leader.join()
            return holder

    gate._leader = Leadership(gate._leader)
    follower = house.reader(3)
    assert leader.result() is True
    eventually(lambda: followers(gate) or house.sleeps(3))
    house.keeper.finish({2: 1})
    assert follower.result() is True


def submit_and_read(segment_name, slot, semaphore, threads, rounds):
    gate_module.SPIN, gate_module.SLICE = 0, FOR_EVER
    gate = Gate(Segment.open(segment_name), slot, posix_ipc.Semaphore(semaphore))
    submitting = threading.Lock()

    def run():
        for _ in range(rounds):
            with submitting:
                gate.raise_flag(gate.last + 1)
            gate.wait(None, nothing)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def test_no_wake_up_is_lost_among_many_threads_and_processes(house):
    slots, threads, rounds = (1, 2, 3), 4, 150
    context = multiprocessing.get_context("spawn")
    processes = []
    for slot in slots:
        name = house.keeper.admit(slot, Identity(os.getpid(), 0, 0, 0))
        arguments = (house.segment.name, slot, name, threads, rounds)
        processes.append(context.Process(target=submit_and_read, args=arguments, daemon=True))
        processes[-1].start()
    deadline = time.monotonic() + 60
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            for slot in slots:
                house.keeper.finish({slot: house.word("submitted", slot)})
            os.sched_yield()
        assert [process.exitcode for process in processes] == [0] * len(slots)
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
        for slot in slots:
            house.keeper.dismiss(slot)


# Signals


class Rung(Exception):
    pass


@pytest.fixture
def on_alarm():
    """Set a handler for SIGALRM. (pytest-timeout has one of its own; no timer is touched here.)"""
    former = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # forgets one that is pending
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("role", ["leader", "follower"])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGALRM, Rung), (signal.SIGINT, KeyboardInterrupt)])
def test_an_exception_of_a_signal_handler_ends_the_wait(house, asleep, eventually, on_alarm, role, number, error):
    def ring(*_):
        raise Rung

    on_alarm(ring)
    gate = house.gate(2)
    house.gate(1).raise_flag(1)
    others = []
    if role == "follower":
        others.append(house.reader(2))
        eventually(lambda: house.sleeps(2))

    def send():
        eventually(lambda: house.sleeps(2) if role == "leader" else followers(gate))
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(error):
        gate.wait(time.monotonic() + 15, nothing)
    sender.join()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert house.sleeps(2) == bool(others)
    house.keeper.finish({1: 1})
    assert gate.wait(time.monotonic() + 15, nothing) is True
    assert [reader.result() for reader in others] == [True] * len(others)


def test_a_signal_handler_runs_during_the_wait_which_then_goes_on(house, asleep, eventually, on_alarm):
    rung = []
    on_alarm(lambda *_: rung.append(True))
    house.gate(1).raise_flag(1)

    def send():
        eventually(lambda: house.sleeps(2))
        os.kill(os.getpid(), signal.SIGALRM)
        eventually(lambda: rung)
        house.keeper.finish({1: 1})

    sender = threading.Thread(target=send)
    sender.start()
    assert house.gate(2).wait(time.monotonic() + 60, nothing) is True
    sender.join()
    assert rung == [True]


def test_a_handler_that_raises_at_any_instant_leaves_no_signal_blocked_and_no_lock_held(run_python):
    script = """
        import os, random, secrets, signal, threading, time
        import posix_ipc
        from strictflow_mp import gate as gate_module
        from strictflow_mp.gate import Gate, GateKeeper
        from strictflow_mp.processes import Identity
        from strictflow_mp.segment import Segment

        class Rung(Exception):
            pass

        def ring(*_):
            raise Rung

        def storm(gate):
            blocked = raised = 0
            while raised < 3000:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-4))
                    gate.wait(time.monotonic() + 5e-5, lambda: None)
                    while True:
                        time.sleep(0.01)
                except Rung:
                    raised += 1
                if signal.pthread_sigmask(signal.SIG_SETMASK, []):
                    blocked += 1
            return blocked

        def finish():
            while not segment.words[segment.waiting + 1]:
                time.sleep(0.001)
            keeper.finish({1: 1})

        gate_module.SPIN = 0
        signal.signal(signal.SIGALRM, ring)
        token = secrets.token_hex(6)
        segment = Segment.create(token, "house", capacity=1, slots=2, identity=Identity(os.getpid(), 0, 0, 0))
        keeper = GateKeeper(segment, token)
        semaphore = keeper.admit(1, Identity(os.getpid(), 0, 0, 0))
        gate = Gate(segment, 1, posix_ipc.Semaphore(semaphore))
        segment.unlink()
        posix_ipc.unlink_semaphore(semaphore)
        gate.raise_flag(1)
        print("blocked after", storm(gate))
        print("sleeping", segment.words[segment.waiting + 1])
        gate_module.SLICE = 1e6
        threading.Thread(target=finish, daemon=True).start()
        print("wakes", gate.wait(None, lambda: None))
    """
    child = run_python(script, timeout=30)
    assert child.stdout.splitlines() == ["blocked after 0", "sleeping 0", "wakes True"], child.stderr


# Slots


@pytest.mark.parametrize(("submitted", "finished"), [(3, 1), (1, 3), (2, 2)])
def test_a_dismissed_slot_leaves_no_flag_up(house, submitted, finished):
    house.gate(1)
    house.set_word("submitted", 1, submitted)
    house.set_word("finished", 1, finished)
    house.set_word("waiting", 1, 1)
    house.keeper.dismiss(1)
    assert house.keeper.is_open()
    assert house.gate(2).is_open()
    assert not house.sleeps(1)


def test_the_dismissal_of_a_slot_ends_the_waits_for_it(house, sound_asleep, eventually):
    house.gate(1).raise_flag(3)
    reader = house.reader(2)
    eventually(lambda: house.sleeps(2))
    house.keeper.dismiss(1)
    house.keeper.wake()
    assert reader.result() is True


def test_a_dismissed_slot_serves_the_next_process(house, sound_asleep, eventually):
    house.gate(1).raise_flag(2)
    house.keeper.finish({1: 1})
    house.keeper.dismiss(1)
    house.gates.pop(1).release()
    house.gate(1).raise_flag(3)
    assert house.keeper.is_up()
    reader = house.reader(1)
    eventually(lambda: house.sleeps(1))
    house.keeper.finish({1: 3})
    assert reader.result() is True
    assert house.keeper.is_open()


def test_a_dismissed_slot_leaves_no_semaphore(house):
    names = [semaphore_name(house.token, slot) for slot in (1, 2)]
    for slot in (1, 2):
        house.gate(slot)
    house.keeper.dismiss(1)
    with pytest.raises(posix_ipc.ExistentialError):
        posix_ipc.Semaphore(names[0])
    posix_ipc.Semaphore(names[1]).close()


def test_a_process_that_is_killed_leaves_no_flag_up(eventually):
    with StrictFlow("killed", state={"a": 0}) as flow:

        def submit():
            for number in itertools.count():
                flow.put("a", number)

        gate = flow._client.attach().gate
        for _ in range(3):
            before = gate.submitted.tolist()
            with flow.spawn(submit, processes=2) as workers:
                eventually(lambda: sum(map(int.__gt__, gate.submitted.tolist()[1:], before[1:])) >= 2)  # noqa: B023
                for worker in workers:
                    worker.kill()
            flow.state["a"]
            eventually(gate.is_open)


def test_a_process_whose_connection_was_cut_leaves_no_flag_up(eventually, tmp_path):
    with StrictFlow("cut", state={"a": 0}) as flow:
        over, tried = tmp_path / "over", tmp_path / "tried"

        def outcast():
            flow._client.attach().stream.send(b"\xc1")
            flow.put("a", 1)
            tried.touch()
            while not over.exists():
                time.sleep(0.01)

        with flow.spawn(outcast):
            eventually(tried.exists)
            try:
                flow._client.pass_gate(timeout=15)
            finally:
                over.touch()
        eventually(flow._client.attach().gate.is_open)


# The end of a flow


@pytest.mark.parametrize("end", ["stopped by its coordinator", "condemned after its death"])
def test_a_reader_that_sleeps_learns_that_the_flow_has_ended(house, sound_asleep, eventually, end):
    house.gate(1).raise_flag(1)
    reader = house.reader(2)
    eventually(lambda: house.sleeps(2))
    if end.startswith("stopped"):
        house.keeper.stop()
    else:
        condemn(house.segment, house.token)
    assert reader.result() is True
    assert house.gate(2).is_stopped()
    assert not house.gate(2).is_open()
    house.keeper.dismiss(1)
    assert not house.gate(2).is_open(), "a read would take the fast path"


def test_a_stop_ends_the_waits_of_other_processes():
    flow = StrictFlow("stopped", state={"a": 0})

    def read():
        flow._client.attach().gate.raise_flag(1)  # a task that the coordinator has not read when it stops
        with pytest.raises(FlowNotRunning):
            flow.state["a"]

    wait_and_stop(flow, read)


def test_a_stop_ends_the_waits_that_begin_at_that_moment():
    flow = StrictFlow("stopped", state={"a": 0})

    def read():
        gate = flow._client.attach().gate
        gate.raise_flag(1)
        is_stopped = gate.is_stopped

        def look_and_be_stopped():
            gate.is_stopped = is_stopped
            gate._words[gate._waiting] = 1
            while not is_stopped():
                time.sleep(0.01)
            return False

        gate.is_stopped = look_and_be_stopped
        with pytest.raises(FlowNotRunning):
            flow.state["a"]

    wait_and_stop(flow, read)


def wait_and_stop(flow, read):
    """Stop the flow when *read*, in a worker, waits at the gate; it must end soon."""
    with flow:
        segment = flow._client.attach().segment
        waiting = segment.words[segment.waiting : segment.waiting + segment.slots]
        with flow.spawn(read) as workers:
            while not any(waiting) and None in workers.exitcodes:
                time.sleep(0.005)
            waiting.release()
            flow.stop_loop()
            assert workers.join(15), "still waits, 15 s after the stop"
            assert workers.exitcodes == [0]


@pytest.mark.parametrize("end", ["flow.close()", "flow.stop_loop(drain=False)"])
def test_a_thread_that_waits_while_another_ends_the_flow_gets_a_value_or_an_error(run_python, end):
    script = f"""
        import threading, time
        from strictflow_mp import FlowNotRunning, StrictFlow

        outcomes = []

        def read():
            try:
                outcomes.append(flow.state["a"])
            except FlowNotRunning as error:
                outcomes.append(error)

        flow = StrictFlow(state={{"a": 0}})
        with flow:
            attachment = flow._client.attach()
            attachment.gate.raise_flag(1)  # a task that the coordinator has not read when the flow ends
            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            while not attachment.segment.words[attachment.segment.waiting + attachment.slot]:
                time.sleep(0.001)
            {end}
            for thread in threads:
                thread.join()
        print(len(outcomes))
    """
    child = run_python(script)
    assert (child.returncode, child.stdout) == (0, "3\n"), child.stderr
