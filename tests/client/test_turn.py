"""The turn to read: one thread at a time, whatever throws it out, and nobody takes it from who has it."""

from __future__ import annotations

import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from strictflow_mp.client import turn as turns
from strictflow_mp.client.turn import Turn
from strictflow_mp.system.machine import FREE_THREADED

WAIT_SECONDS = 10


class Reader:
    """A thread that takes the turn, and goes on when it is told: it leaves, or is thrown out and stays alive."""

    def __init__(self, turn):
        self.turn = turn
        self._orders, self._is_done = [], threading.Semaphore(0)
        self._is_told = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            self._is_told.acquire()
            order = self._orders.pop()
            if order == "end":
                return
            try:
                read(self, order)
            except KeyboardInterrupt:
                self._is_done.release()

    def step(self):
        """Said from inside the turn: wait for the next order."""
        self._is_done.release()
        self._is_told.acquire()
        return self._orders.pop()

    def tell(self, order):
        self._orders.append(order)
        self._is_told.release()
        assert self._is_done.acquire(timeout=WAIT_SECONDS)

    def end(self):
        self._orders.append("end")
        self._is_told.release()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


def read(reader, order):
    assert order == "take"
    assert reader.turn.take()
    if reader.step() == "raise":
        raise KeyboardInterrupt
    reader.turn.leave()
    reader._is_done.release()


@pytest.fixture
def turn():
    return Turn(read.__code__)


@pytest.fixture
def readers(turn):
    readers = [Reader(turn), Reader(turn)]
    yield readers
    for reader in readers:
        reader.end()


@pytest.fixture
def meanwhile(monkeypatch):
    """`meanwhile(function)`: it is called while a revoker looks at the threads, before or after it has seen them."""

    def meanwhile(before=lambda: None, after=lambda: None):
        def frames():
            before()
            seen = sys._current_frames()
            after()
            return seen

        monkeypatch.setattr(turns, "sys", SimpleNamespace(_current_frames=frames, _getframe=sys._getframe))

    return meanwhile


def test_the_turn_is_of_one_thread_until_that_leaves(turn, readers):
    first, second = readers
    first.tell("take")
    assert not turn.take()
    turn.leave()  # of a thread that does not have it
    turn.revoke()
    assert not turn.take()
    first.tell("leave")
    second.tell("take")
    assert not turn.take()
    second.tell("leave")
    assert turn.take()
    turn.leave()


@pytest.mark.skipif(FREE_THREADED, reason="nobody looks at the stack of another thread there")
def test_the_turn_of_a_thread_that_was_thrown_out_is_taken_by_another(turn, readers):
    first, second = readers
    first.tell("take")
    first.tell("raise")
    assert not turn.take()
    turn.revoke()
    second.tell("take")
    assert not turn.take()
    second.tell("leave")


def test_a_thread_that_was_thrown_out_comes_back_to_its_turn(turn, readers):
    first, _ = readers
    first.tell("take")
    first.tell("raise")
    first.tell("take")
    turn.revoke()
    assert not turn.take()
    first.tell("leave")
    assert turn.take()
    turn.leave()


def test_nobody_revokes_the_turn_of_the_next(turn, readers, meanwhile):
    first, second = readers

    def change():
        first.tell("leave")
        second.tell("take")

    first.tell("take")
    meanwhile(before=change)
    turn.revoke()
    assert not turn.take()
    second.tell("leave")


def test_nobody_revokes_the_turn_of_one_that_has_just_come_back(turn, readers, meanwhile):
    first, _ = readers
    first.tell("take")
    first.tell("raise")
    meanwhile(after=lambda: first.tell("take"))
    turn.revoke()
    assert not turn.take()
    first.tell("leave")


def test_one_that_comes_back_while_its_turn_is_revoked_takes_it_anew(turn, readers):
    class Holder(dict):
        def setdefault(self, key, taking):
            held = super().setdefault(key, taking)
            if held is not taking and held[0] == taking[0]:
                turn._close(held)  # by somebody who has looked before
            return held

    first, _ = readers
    turn._holder = Holder()
    first.tell("take")
    first.tell("raise")
    first.tell("take")
    assert not turn.take()
    first.tell("leave")
    assert not turn._holder


# Without the GIL


def test_a_leaver_leaves_what_its_thread_has_and_nothing_else(turn, readers):
    first, _ = readers
    leave = turn.leaver()
    leave()  # nobody has it
    assert turn.take()
    leave = turn.leaver()
    leave()
    first.tell("take")  # it is free
    turn.leaver()()  # of a thread that does not have it
    assert not turn.take()
    first.tell("leave")
    assert turn.take()
    turn.leave()


def test_no_signal_handler_comes_in_ahead_of_a_leaver(turn):
    """Between any two bytecodes of who has the turn: it is left, whatever was raised."""
    if sys.version_info < (3, 13):
        pytest.skip("before, signal handlers come in anywhere")

    class Raised(Exception):
        pass

    def handle(*_):
        raise Raised

    def inside():
        leave = turn.leaver()
        try:
            turn.take()
            sum(range(50))
        finally:
            leave()

    former = signal.signal(signal.SIGALRM, handle)
    raised = 0
    try:
        for number in range(3000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 30))
                inside()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Raised:
                raised += 1
            assert turn._thread() is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert raised > 100


def test_only_a_thread_that_has_ended_is_thrown_out(turn, monkeypatch):
    monkeypatch.setattr(turns, "FREE_THREADED", True)
    thread = threading.Thread(target=turn.take)
    thread.start()
    thread.join()
    assert turn.take() is False or turn._thread() != thread.ident
    turn.revoke()
    assert turn.take()
    turn.revoke()
    assert turn._thread() == threading.get_ident()
    turn.leave()
