"""The gate: a read waits for what was submitted before it, for nothing else, and always wakes.

Most tests have a segment and its keeper, but no coordinator: they finish tasks themselves. A `Reader` that
goes on waiting shows it by looking, once a slice, whether the coordinator lives.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import os
import secrets
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from holding import held

from strictflow_mp import FlowNotRunning, StateFull, StrictFlow
from strictflow_mp.client.client import Client
from strictflow_mp.client.comeback import lose
from strictflow_mp.memory import gate as gate_module
from strictflow_mp.memory import gatekeeper, leftovers
from strictflow_mp.memory.gate import Gate
from strictflow_mp.memory.gatekeeper import GateKeeper
from strictflow_mp.memory.leftovers import condemn
from strictflow_mp.memory.segment import (
    CONDEMNED,
    FIRST_REACH_SLOTS,
    SERVING,
    STARTING,
    STOPPED,
    W_EPOCH,
    W_REACH,
    W_STATUS,
    Segment,
)
from strictflow_mp.memory.semaphores import make_semaphore
from strictflow_mp.store import views
from strictflow_mp.system import posix, spin
from strictflow_mp.system.identity import Identity
from strictflow_mp.system.place import Place

SLOTS = 8
FOR_EVER = 1e6
"""Seconds. Nobody waits that long: a test that loses a wake-up does not end."""


class House:
    """A segment, its keeper, and a gate for each slot that a test uses."""

    def __init__(self, slots=SLOTS):
        self.token = secrets.token_hex(6)
        self.segment = Segment.create(
            self.token, "house", capacity=1, slots=slots, identity=Identity(os.getpid(), 0, 0, 0)
        )
        self.keeper = GateKeeper(self.segment, self.token)
        self.gates = {}
        self.readers = []

    def gate(self, slot):
        if slot not in self.gates:
            name = self.keeper.admit(slot, Identity(os.getpid(), 0, 0, 0))
            self.gates[slot] = Gate(self.segment, slot, posix.Semaphore(name))
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
    monkeypatch.setattr(spin, "SPIN_SECONDS", 0)


@pytest.fixture
def sound_asleep(asleep, monkeypatch):
    """Readers sleep at once, and nothing but a post wakes them."""
    monkeypatch.setattr(gate_module, "SLEEP_SECONDS", FOR_EVER)


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
    assert house.word("waits", 2) == 0
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
    assert followers(house.gate(2)) == 0
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
    monkeypatch.setattr(spin, "SPIN_SECONDS", FOR_EVER)
    monkeypatch.setattr(spin, "_quiet_until", 0.0)
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


def test_a_long_wait_of_the_main_thread_sleeps_too(house, sound_asleep):
    house.gate(1).raise_flag(1)
    looks = []
    assert house.gate(2).wait(time.monotonic() + 0.05, lambda: looks.append(True)) is False
    assert len(looks) <= 2


def test_waits_are_counted_and_timed(house, asleep):
    house.gate(2).wait(None, nothing)
    assert (house.word("waits", 2), house.word("waited", 2)) == (0, 0)
    house.gate(1).raise_flag(1)
    house.gate(2).wait(time.monotonic() + 0.01, nothing)
    assert house.word("waits", 2) == 1
    assert house.word("waited", 2) >= 5_000_000


def test_a_post_too_many_ends_no_wait(house, asleep, eventually):
    house.gate(1).raise_flag(1)
    house.gate(2)
    name = house.keeper.semaphore_of(2)
    extra = posix.Semaphore(name)
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
    for module in (gate_module, gatekeeper):
        monkeypatch.setattr(module, "fence", fence)


def test_a_reader_says_that_it_sleeps_and_then_looks_once_more(house, sound_asleep, monkeypatch):
    house.gate(1).raise_flag(1)
    said = []

    def finish_too_late_to_see_it():
        said.append(house.sleeps(2))
        house.set_word("finished", 1, 1)

    at_the_fence(monkeypatch, finish_too_late_to_see_it)
    assert house.reader(2).result() is True
    assert said == [True]


def test_a_reader_that_has_taken_a_token_looks_at_the_flag_behind_a_fence(house, asleep, monkeypatch):
    """Another post is spared while the coordinator sees the token: models/litmus/gate-token.litmus."""
    house.gate(1).raise_flag(1)
    sleeps = []
    monkeypatch.setattr(gate_module, "sleep_on", lambda *args: sleeps.append(args))
    monkeypatch.setattr(gate_module, "read_fence", lambda: house.set_word("finished", 1, 1) if sleeps else None)
    assert house.gate(2).wait(time.monotonic() + 1, nothing) is True
    assert len(sleeps) == 1


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
    semaphore = posix.Semaphore(house.keeper.semaphore_of(2))
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


def test_a_thread_that_follows_takes_over_from_a_leader_that_leaves_with_an_error(house, sound_asleep, eventually):
    gate = house.gate(3)
    house.gate(1).raise_flag(1)

    def leave():
        eventually(lambda: followers(gate))  # woken with the leader, it follows once more
        raise Rung

    def lead():
        with pytest.raises(Rung):
            gate.wait(None, leave)

    leader = threading.Thread(target=lead)
    leader.start()
    eventually(lambda: house.sleeps(3))
    follower = house.reader(3)
    eventually(lambda: followers(gate))
    gate._semaphore.release()
    leader.join()
    eventually(lambda: house.sleeps(3))
    house.keeper.finish({1: 1})
    assert follower.result() is True


def test_the_leader_wakes_those_of_its_process_who_wait_for_less(house, sound_asleep, eventually):
    gate = house.gate(3)
    house.gate(1).raise_flag(1)
    gate._leader[gate_module.LEADER] = gate_module.NO_THREAD  # somebody who is about to leave
    follower = house.reader(3)
    eventually(lambda: followers(gate))
    house.gate(2).raise_flag(1)
    leader = threading.Thread(target=gate._lead, args=([(1, 1), (2, 1)], None, nothing))
    leader.start()
    eventually(lambda: house.sleeps(3))
    house.keeper.finish({1: 1})
    assert follower.result() is True
    house.keeper.finish({2: 1})
    leader.join()
    gate._leader.clear()


@pytest.mark.parametrize("number", [1, 300])
def test_a_read_is_content_with_more_than_it_waited_for(house, asleep, eventually, number):
    house.gate(1).raise_flag(number)
    reader = house.reader(2)
    assert reader.goes_on_waiting(eventually)
    house.keeper.finish({1: number + 300})
    assert reader.result() is True


def submit_and_read(segment_name, slot, semaphore, threads, rounds):
    spin.SPIN_SECONDS, gate_module.SLEEP_SECONDS = 0, FOR_EVER
    gate = Gate(Segment.open(segment_name), slot, posix.Semaphore(semaphore))
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
        from strictflow_mp.system import posix
        from strictflow_mp.memory import gate as gate_module
        from strictflow_mp.system import spin
        from strictflow_mp.memory.gate import Gate
        from strictflow_mp.memory.gatekeeper import GateKeeper
        from strictflow_mp.system.identity import Identity
        from strictflow_mp.memory.segment import CONDEMNED, SERVING, STARTING, STOPPED, W_STATUS, Segment

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

        spin.SPIN_SECONDS = 0
        signal.signal(signal.SIGALRM, ring)
        token = secrets.token_hex(6)
        segment = Segment.create(token, "house", capacity=1, slots=2, identity=Identity(os.getpid(), 0, 0, 0))
        keeper = GateKeeper(segment, token)
        semaphore = keeper.admit(1, Identity(os.getpid(), 0, 0, 0))
        gate = Gate(segment, 1, posix.Semaphore(semaphore))
        segment.unlink()
        posix.unlink_semaphore(semaphore)
        gate.raise_flag(1)
        print("blocked after", storm(gate))
        print("sleeping", segment.words[segment.waiting + 1])
        gate_module.SLEEP_SECONDS = 1e6
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
    assert house.word("finished", 1) == max(submitted, finished)


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
    for slot in (1, 2):
        house.gate(slot)
    names = [house.keeper.semaphore_of(slot) for slot in (1, 2)]
    mine = house.keeper._semaphores[1]
    house.keeper.dismiss(1)
    with pytest.raises(posix.ExistentialError):
        mine.release()  # it is closed, too
    with pytest.raises(posix.ExistentialError):
        posix.Semaphore(names[0])
    posix.Semaphore(names[1]).close()


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


def read_async_snapshot(flow):
    async def look():
        async with flow.snapshot() as snapshot:
            return snapshot["newcomer"]

    return asyncio.run(look())


READS = {"read": lambda flow: flow.state["newcomer"], "async read": read_async_snapshot}


class Visitor:
    """Another process that is attached to a flow, and does what it is told."""

    def __init__(self, flow):
        fork = multiprocessing.get_context("fork")
        self.box, theirs = fork.Pipe()
        self.process = fork.Process(target=self._obey, args=(flow, theirs))
        self.process.start()
        theirs.close()
        assert self.box.recv() == "attached"

    @staticmethod
    def _obey(flow, box):
        attached = StrictFlow.attach(flow, timeout=60)
        assert attached.state["newcomer"] is not None
        box.send("attached")
        while command := box.recv():
            if command in READS:
                box.send(READS[command](attached))
            elif command == "reach":
                box.send(len(attached.state._bound[0]))
            else:
                attached.put("newcomer", command)
                box.send("submitted")
        attached.close()

    def ask(self, command):
        self.box.send(command)
        return self.box.recv()

    def leave(self):
        self.box.send(None)
        self.process.join()


@pytest.fixture
def visit():
    """Let one more process come; none is left."""
    visitors = []

    def visit(flow):
        visitors.append(Visitor(flow))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.process.kill()
        visitor.process.join()


@contextmanager
def standing_still(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def somebody_sleeps(flow):
    segment = flow._client.attach().segment
    return any(segment.words[segment.waiting : segment.waiting + segment.slots].tolist())


@pytest.mark.parametrize("read", READS)
def test_a_read_waits_for_what_any_of_many_processes_has_submitted_before(visit, eventually, read):
    """Readers look at the flags of the slots that somebody has had; here those become more, twice."""
    with StrictFlow(state={"newcomer": 0}) as flow:
        reader = visit(flow.name)
        coordinator = flow.stats().coordinator_pid
        for number in range(1, 2 * FIRST_REACH_SLOTS + 1):
            visitor = visit(flow.name)
            if number % 4 != 3:  # else nobody looks between one newcomer and the next
                assert reader.ask(read) == number - 1
            with standing_still(coordinator):
                assert visitor.ask(number) == "submitted"
                reader.box.send(read)
                eventually(lambda: reader.box.poll() or somebody_sleeps(flow))
            assert reader.box.recv() == number
        assert reader.ask("read") == number
        assert reader.ask("reach") == 4 * FIRST_REACH_SLOTS
        assert flow.stats().version == 2 * FIRST_REACH_SLOTS + 3  # the first state, and two versions for more slots


def test_a_process_that_goes_on_with_the_next_flow_of_a_name_looks_at_the_slots_of_that_one(visit, eventually):
    name = f"next-{os.getpid()}"
    first = StrictFlow(name, state={"newcomer": 1})
    first.start_loop()
    reader = visit(name)
    for visitor in [visit(name) for _ in range(FIRST_REACH_SLOTS - 1)]:  # the last one has slot 8: EPOCH moves
        visitor.leave()
    first.stop_loop()
    with StrictFlow(name, state={"newcomer": 2}) as flow:
        assert reader.ask("read") == 2
        others = [visit(name) for _ in range(FIRST_REACH_SLOTS - 1)]
        assert reader.ask("read") == 2
        flow._client.attach()
        with standing_still(Place.of(name).resident().pid):
            assert others[-1].ask(3) == "submitted"
            reader.box.send("read")
            eventually(lambda: reader.box.poll() or somebody_sleeps(flow))
        assert reader.box.recv() == 3


def test_a_read_that_goes_on_with_the_next_flow_of_a_name_passes_its_gate(monkeypatch, eventually):
    name = f"next-{os.getpid()}"
    reader, beside = Client(name, 1 << 20), Client(name, 1 << 20)

    def reattach(attachment):
        lose(attachment)
        reader._attachment = beside.attach()  # it is busy, and lets nobody in just now

    with StrictFlow(name, state={"newcomer": 1}):
        assert reader.state["newcomer"] == 1
    with StrictFlow(name, state={"newcomer": 2}) as flow, ThreadPoolExecutor(1) as pool:
        assert beside.state["newcomer"] == 2
        monkeypatch.setattr(reader, "_reattach", reattach)
        with held(flow, newcomer=3):
            reading = pool.submit(lambda: reader.state["newcomer"])
            eventually(lambda: reading.done() or somebody_sleeps(flow))
        assert reading.result() == 3
        beside.close()


def test_async_snapshots_need_no_other_thread_for_long_when_there_are_more_slots(visit, monkeypatch):
    asked = []

    async def counted(*args):
        asked.append(args)
        return await waits(*args)

    waits = views.wait_in_thread
    monkeypatch.setattr(views, "wait_in_thread", counted)
    with StrictFlow(state={"newcomer": 1}) as flow:
        assert flow.state["newcomer"] == 1
        for _ in range(FIRST_REACH_SLOTS - 1):
            visit(flow.name)
        for _ in range(3):
            assert read_async_snapshot(flow) == 1
        assert len(asked) == 1


def test_slots_that_there_is_no_room_to_tell_of_are_not_looked_at():
    house = House(slots=FIRST_REACH_SLOTS + 2)
    keeper, words = house.keeper, house.segment.words

    def no_room():
        raise StateFull("no room")

    with pytest.raises(StateFull):
        keeper.widen(FIRST_REACH_SLOTS, no_room)
    assert words[W_REACH] == FIRST_REACH_SLOTS
    assert not keeper.is_within_reach(FIRST_REACH_SLOTS)
    seen = []
    keeper.widen(FIRST_REACH_SLOTS, lambda: seen.append((words[W_REACH], words[W_EPOCH])))
    assert seen == [(FIRST_REACH_SLOTS + 2, 2)]
    assert keeper.is_within_reach(FIRST_REACH_SLOTS + 1)
    house.segment.unlink()
    house.segment.close()


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


def visitor(number):
    """No two words of it are equal."""
    return Identity(1000 + number, 2000 + number, 3000 + number, 4000 + number)


def sleeping(house, slot):
    """Say that a reader sleeps in that slot; return a function that says how often it was woken since."""
    house.set_word("waiting", slot, 1)
    semaphore = posix.Semaphore(house.keeper.semaphore_of(slot))

    def posts():
        count = 0
        try:
            while True:
                semaphore.acquire(0)
                count += 1
        except posix.BusyError:
            return count

    return posts


@pytest.fixture
def admitted(house):
    """Admit visitors to these slots; they are dismissed at the end."""
    slots = []

    def admit(*numbers):
        slots.extend(numbers)
        return [house.keeper.admit(slot, visitor(slot)) for slot in numbers]

    yield admit
    for slot in slots:
        house.keeper.dismiss(slot)


def test_a_slot_says_who_has_it_and_each_admission_has_a_number_of_its_own(house, admitted):
    admitted(1, 3, 7)
    assert [house.keeper.tenancy(slot) for slot in (1, 2, 3, 7)] == [
        (1, 1001, 2001, 4001, 1),
        (2, 0, 0, 0, 0),
        (3, 1003, 2003, 4003, 2),
        (7, 1007, 2007, 4007, 3),
    ]
    house.keeper.dismiss(3)
    assert house.keeper.tenancy(3) == (3, 0, 0, 0, 0)
    admitted(3)
    assert house.keeper.tenancy(3).tenant == 4
    assert house.keeper.tenancy(7) == (7, 1007, 2007, 4007, 3)


def test_a_newcomer_finds_its_slot_as_if_nobody_had_been_there(house, admitted):
    for array in ("waiting", "waits", "waited"):
        for slot in (2, 3, 4):
            house.set_word(array, slot, 9)
    left_behind = make_semaphore(house.token, house.segment.slot(3))
    former = house.keeper.semaphore_of(3)
    left_behind.release()
    left_behind.close()
    [name] = admitted(3)
    assert name == house.keeper.semaphore_of(3) != former
    with pytest.raises(posix.ExistentialError):
        posix.Semaphore(former)
    for array in ("waiting", "waits", "waited"):
        assert [house.word(array, slot) for slot in (2, 3, 4)] == [9, 0, 9]
        for slot in (2, 4):
            house.set_word(array, slot, 0)
    assert sleeping(house, 3)() == 0
    house.set_word("waiting", 3, 0)


def test_each_slot_has_words_of_its_own_however_many_there_are():
    count = 150
    house, slots = House(slots=count), range(1, count)
    keeper, segment = house.keeper, house.segment
    keeper.widen(count - 1, lambda: None)

    def words(array):
        begin = getattr(segment, array)
        return segment.words[begin : begin + count].tolist()

    try:
        names = [keeper.admit(slot, visitor(slot)) for slot in slots]
        assert [keeper.tenancy(slot) for slot in slots] == [
            (slot, 1000 + slot, 2000 + slot, 4000 + slot, slot) for slot in slots
        ]
        gates = [Gate(segment, slot, posix.Semaphore(name)) for slot, name in zip(slots, names, strict=True)]
        for slot, gate in zip(slots, gates, strict=True):
            gate.raise_flag(slot)
            assert gate.last == slot
        assert words("submitted") == [*range(count)]
        for slot in slots:
            keeper.lift(slot)
            assert words("finished") == [number if number <= slot else 0 for number in range(count)]
        for slot in slots:
            keeper.raise_again(slot, 1)
            assert words("finished") == [number if number > slot else 0 for number in range(count)]
        heir = GateKeeper(segment, house.token)
        assert heir.take_over() == [keeper.tenancy(slot) for slot in slots]
        for slot, gate in zip(slots, gates, strict=True):
            assert gate.wait(time.monotonic() - 1, nothing) is False
            posts = sleeping(house, slot)
            heir.finish({slot: slot})
            house.set_word("waiting", slot, 0)
            assert (posts(), words("finished")) == (1, [n if n <= slot else 0 for n in range(count)])
        assert words("waits") == [0] + [1] * (count - 1)
        assert gates[0].wait(None, nothing) is True
        for slot, gate in zip(slots, gates, strict=True):
            gate.raise_flag(slot + 1)
            house.set_word("waiting", slot, 1)
            keeper.dismiss(slot)
            gate.release()
            assert words("finished") == words("submitted")
            assert not any(words("waiting"))
            for array in ("pids", "starts", "spaces", "tenants"):
                assert [bool(word) for word in words(array)] == [number > slot for number in range(count)]
    finally:
        for slot in slots:
            keeper.dismiss(slot)
        house.close()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="semaphores are no files here")
def test_only_the_user_may_touch_a_semaphore(house, admitted):
    admitted(1)

    def mode():
        return os.stat(f"/dev/shm/sem.{house.keeper.semaphore_of(1)[1:]}").st_mode & 0o777

    assert mode() == 0o600
    posix.unlink_semaphore(house.keeper.semaphore_of(1))
    GateKeeper(house.segment, house.token).take_over()
    assert mode() == 0o600


def test_a_flag_is_lifted_up_to_what_was_submitted_and_the_sleepers_wake(house, admitted):
    admitted(1, 2, 3)
    for slot in (2, 3):
        house.set_word("submitted", slot, 8)
        house.set_word("finished", slot, 5)
    posts = sleeping(house, 1)
    house.keeper.lift(2)
    assert [house.word("finished", slot) for slot in range(SLOTS)] == [0, 0, 8, 5, 0, 0, 0, 0]
    assert posts() == 1
    for submitted in (8, 7):  # it never falls
        house.set_word("submitted", 2, submitted)
        house.keeper.lift(2)
        assert (house.word("finished", 2), posts()) == (8, 0)


@pytest.mark.parametrize(("first", "finished"), [(1, 0), (3, 2), (6, 5), (7, 5), (100, 5)])
def test_a_flag_is_raised_again_from_the_first_task_that_has_no_answer(house, admitted, first, finished):
    admitted(2)
    for slot in (1, 2, 3):
        house.set_word("finished", slot, 5)
        house.set_word("submitted", slot, 5)
    house.keeper.raise_again(2, first)
    assert [house.keeper.last_finished(slot) for slot in (1, 2, 3)] == [5, finished, 5]
    assert house.keeper.is_up() == (finished < 5)
    house.keeper.finish(dict.fromkeys((1, 2, 3), 5))


def test_what_is_finished_only_grows_and_slot_0_goes_up_to_the_first_of_its_own_that_is_queued(house):
    assert [house.keeper.raise_own() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert (house.word("submitted", 0), house.keeper.is_up()) == (5, True)
    house.keeper.finish({0: 77, 1: 9, 3: 4}, own=2)
    assert [house.word("finished", slot) for slot in range(5)] == [2, 9, 0, 4, 0]
    house.keeper.finish({1: 8, 3: 5}, own=4)
    assert [house.word("finished", slot) for slot in range(5)] == [4, 9, 0, 5, 0]
    house.keeper.finish({})
    assert [house.word("finished", slot) for slot in range(5)] == [5, 9, 0, 5, 0]
    assert not house.keeper.is_up()


def test_who_sleeps_gets_one_post_and_who_does_not_sleep_none(house, admitted):
    admitted(1, 2, 3)
    posts = {slot: sleeping(house, slot) for slot in (1, 2, 3)}
    house.set_word("waiting", 2, 0)
    house.set_word("waiting", 5, 1)  # a slot without a semaphore
    for _ in range(3):
        house.keeper.wake()
    assert {slot: count() for slot, count in posts.items()} == {1: 1, 2: 0, 3: 1}
    house.keeper.wake()
    assert {slot: count() for slot, count in posts.items()} == {1: 1, 2: 0, 3: 1}


def test_the_keeper_who_takes_over_knows_who_has_a_slot_and_can_wake_them(house, admitted):
    admitted(1, 4, 7)
    house.keeper.raise_own()
    house.set_word("submitted", 4, 3)
    posts = sleeping(house, 1)
    posix.unlink_semaphore(house.keeper.semaphore_of(4))
    stray = make_semaphore(house.token, house.segment.slot(5))
    strays_name = house.keeper.semaphore_of(5)
    stray.close()
    heir = GateKeeper(house.segment, house.token)
    assert heir.take_over() == [house.keeper.tenancy(slot) for slot in (1, 4, 7)]
    assert [house.word("finished", slot) for slot in (0, 1, 4)] == [1, 0, 0]
    assert heir.is_up()
    with pytest.raises(posix.ExistentialError):
        posix.Semaphore(strays_name)
    posts_of_4 = sleeping(house, 4)
    heir.finish({4: 3})
    assert (posts(), posts_of_4()) == (1, 1)
    assert heir.raise_own() == 2
    heir.finish({})


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


def test_a_stop_wakes_every_slot_and_says_that_nobody_has_died(house, admitted):
    admitted(1, 2)
    posts = [sleeping(house, slot) for slot in (1, 2)]
    house.set_word("waiting", 2, 0)  # it is about to sleep
    gate = house.gate(3)
    assert not gate.is_stopped()
    house.keeper.stop()
    assert (gate.is_stopped(), gate.is_condemned()) == (True, False)
    assert [count() for count in posts] == [1, 1]
    assert house.keeper.is_up()


@pytest.mark.parametrize("status", [SERVING, STOPPED, CONDEMNED, STARTING])
def test_only_a_flow_that_is_served_is_condemned_and_whoever_sleeps_wakes(house, admitted, status):
    admitted(1, 2, 3, 4)
    posts = [sleeping(house, slot) for slot in (1, 2, 3, 4)]
    house.set_word("waiting", 3, 0)
    posix.unlink_semaphore(house.keeper.semaphore_of(2))
    house.set_word("finished", 0, 6)
    gate = house.gate(5)
    house.segment.words[W_STATUS] = status
    assert (gate.is_stopped(), gate.is_condemned()) == (status != SERVING, status == CONDEMNED)
    condemn(house.segment, house.token)
    assert house.segment.words[W_STATUS] == (CONDEMNED if status == SERVING else status)
    assert (gate.is_stopped(), gate.is_condemned()) == (True, status in (SERVING, CONDEMNED))
    assert house.word("submitted", 0) == 7
    assert [count() for count in posts] == [1, 0, 0, 1]


def test_whoever_sleeps_in_the_last_of_many_slots_learns_of_a_condemned_flow_too():
    house = House(slots=150)
    house.keeper.admit(149, visitor(149))
    try:
        posts = sleeping(house, 149)
        condemn(house.segment, house.token)
        assert posts() == 1
    finally:
        house.keeper.dismiss(149)
        house.close()


def words_at(name, house, monkeypatch):
    """What the segment looked like at each call of that fence."""
    seen = []

    def note():
        words = ("submitted", "finished", "waiting", "starts", "spaces", "tenants", "pids")
        seen.append({word: [house.word(word, slot) for slot in range(3)] for word in words})
        seen[-1]["status"] = house.segment.words[W_STATUS]

    for module in (gate_module, gatekeeper, leftovers):
        monkeypatch.setattr(module, name, note, raising=False)
    return seen


def test_each_store_stands_on_its_side_of_the_fence(house, monkeypatch):
    """The fences that do nothing on x86-64 are called where another machine needs them."""
    gate, keeper = house.gate(1), house.keeper
    published = words_at("publish_fence", house, monkeypatch)
    fenced = words_at("fence", house, monkeypatch)
    gate.raise_flag(4)
    assert fenced.pop()["submitted"] == [0, 4, 0]
    keeper.raise_own()
    keeper.finish({1: 4})
    assert published.pop()["finished"] == [0, 0, 0]
    assert fenced.pop()["finished"] == [1, 4, 0]
    keeper.admit(2, visitor(2))
    at = published.pop()
    assert [at[word][2] for word in ("starts", "spaces", "tenants", "pids")] == [2002, 4002, 2, 0]
    keeper.dismiss(2)
    keeper.stop()
    at = published.pop()
    assert (at["status"], at["submitted"]) == (STOPPED, [1, 4, 0])
    assert fenced.pop()["submitted"] == [2, 4, 0]
    house.segment.words[W_STATUS] = SERVING
    keeper.finish({})
    published.clear()
    fenced.clear()
    condemn(house.segment, house.token)
    at = published.pop()
    assert (at["status"], at["submitted"]) == (CONDEMNED, [2, 4, 0])
    assert fenced.pop()["submitted"] == [3, 4, 0]
    assert (published, fenced) == ([], [])


def test_what_a_read_waited_for_is_behind_a_fence(house, monkeypatch):
    looked = words_at("read_fence", house, monkeypatch)
    house.gate(1).raise_flag(1)
    assert house.gate(2).wait(time.monotonic(), nothing) is False
    assert looked == []
    house.keeper.finish({1: 1})
    assert gate_module._reached(house.gate(2).finished, [(1, 1)])
    assert [at["finished"][1] for at in looked] == [1]


def test_a_gate_that_is_found_open_is_so_ahead_of_a_fence(house, monkeypatch):
    """What a read looks at behind the gate may not be loaded before the flag."""
    looked = words_at("read_fence", house, monkeypatch)
    gate = house.gate(2)
    assert gate.is_open()
    assert len(looked) == 1
    assert gate.wait(time.monotonic(), nothing) is True
    assert len(looked) == 2
    house.gate(1).raise_flag(1)
    assert not gate.is_open()
    assert len(looked) == 2
    house.keeper.finish({1: 1})
    assert gate.is_open()
    assert [at["finished"][1] for at in looked] == [0, 0, 1]


def test_a_gate_that_is_released_while_a_thread_sleeps_keeps_its_semaphore(house, sound_asleep, eventually):
    gate = house.gate(2)
    house.gate(1).raise_flag(1)
    reader = house.reader(2)
    eventually(lambda: house.sleeps(2))
    gate.release()
    gate._semaphore.release()
    house.keeper.finish({1: 1})
    assert reader.result() is True
    for _ in range(2):
        gate.release()
        with pytest.raises(posix.ExistentialError):
            gate._semaphore.release()


def test_a_gate_counts_what_its_own_slot_has_submitted(house):
    for slot in (1, 2, 3):
        house.gate(slot).raise_flag(10 * slot)
    assert [house.gate(slot).last for slot in (1, 2, 3)] == [10, 20, 30]
    house.keeper.finish({1: 10, 2: 20, 3: 30})


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
