"""The collector stays off for as long as anybody is inside, whoever else comes out meanwhile."""

from __future__ import annotations

import gc
import sys
import threading
from itertools import repeat

import pytest

from strictflow_mp.system import unbroken as module
from strictflow_mp.system.machine import FREE_THREADED

hold_off = module._without_collector

pytestmark = pytest.mark.skipif(FREE_THREADED, reason="it is for Pythons before 3.12, which have the GIL")


@pytest.fixture(autouse=True)
def on():
    gc.enable()
    yield
    gc.enable()


class Other:
    """A thread that is inside from `start` to `end`: it waits for a lock, and so lets others run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        hold_off(map(self._wait, repeat(None, 1)))

    def _wait(self, _: None) -> None:
        self._began.set()
        self._lock.acquire()

    def start(self) -> None:
        self._thread.start()
        assert self._began.wait(30)

    def end(self) -> None:
        self._lock.release()
        self._thread.join(30)
        assert not self._thread.is_alive()


def lines_of(run) -> int:
    """How many lines of the module *run* executes."""
    return stopped_at(run, -1, lambda: None)


def stopped_at(run, number, do) -> int:
    """Run it; at that line of the module's do something else. Return how many lines there were."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            if seen == number:
                do()
            seen += 1
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(former)
    return seen


def pass_through() -> None:
    assert hold_off(iter([7])) == 7


def test_a_thread_that_comes_in_at_any_line_of_another_one_is_never_inside_with_the_collector_on():
    total = lines_of(pass_through)
    assert total > 8
    for number in range(total):
        other = Other()
        stopped_at(pass_through, number, other.start)
        try:
            assert not gc.isenabled(), number
        finally:
            other.end()
        assert gc.isenabled(), number


def test_one_that_comes_in_at_any_line_and_ends_leaves_it_as_it_finds_it():
    inside = []

    def look():
        inside.append(gc.isenabled())
        return 7

    def run():
        assert hold_off(iter(look, None)) == 7

    for number in range(lines_of(run)):
        inside.clear()
        stopped_at(run, number, pass_through)
        assert inside == [False], number
        assert gc.isenabled(), number


def test_a_collector_that_the_user_has_turned_off_stays_off():
    pass_through()
    gc.disable()
    for number in range(lines_of(pass_through)):
        stopped_at(pass_through, number, pass_through)
        assert not gc.isenabled(), number


def test_a_call_that_fails_turns_it_on_again():
    with pytest.raises(StopIteration):
        hold_off(iter(()))
    assert gc.isenabled()
