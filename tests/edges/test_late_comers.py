"""Processes that attach while their coordinator dies, or lets nobody in."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from holding import stand_at_the_door

from strictflow_mp import FlowNotRunning, StrictFlow, TooManyWorkers, write
from strictflow_mp.client import reaching
from strictflow_mp.client.reaching import Refusal, reach
from strictflow_mp.system.lease import Lease
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once


@pytest.fixture
def lease() -> Iterator[Lease]:
    lease = Lease.take("late")
    yield lease
    lease.leave()


def test_one_who_stands_behind_a_task_when_its_coordinator_dies_is_let_in_by_the_next_one(
    run_python, tmp_path, monkeypatch, eventually
):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with StrictFlow("late", state={"n": 7}) as flow:

        @write(flow)
        def hold():
            with open(fifo, "rb") as file:
                file.read()

        running = hold()
        with open(fifo, "wb"):
            seen = []
            # It has waited for longer than a first use waits for somebody to appear.
            code = """
                from strictflow_mp import StrictFlow
                flow = StrictFlow.attach("late", timeout=0.001)
                print("let in", flow.state["n"])
            """
            newcomer = threading.Thread(target=lambda: seen.append(run_python(code)))
            newcomer.start()
            resident = Place.of("late").resident()
            eventually(lambda: stand_at_the_door("late") > 1, timeout=20)
            os.kill(resident.pid, signal.SIGKILL)
            newcomer.join()
        assert (seen[0].stdout, seen[0].stderr) == ("let in 7\n", "")
        assert running.exception(20) is not None


class Clock:
    """Time that passes only when somebody sleeps, or stands at a door."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reaching, "time", clock)
    return clock


@pytest.fixture
def doors(clock, monkeypatch):
    """`doors(*seconds)`: so many coordinators come, each lets us stand at its door for so long, and dies."""

    def doors(*seconds: float) -> None:
        coming = list(seconds)

        def stand(name, patience, opened, place):
            if coming:
                opened.append(None)
                clock.sleep(coming.pop(0))

        monkeypatch.setattr(reaching, "try_to_reach", stand)

    return doors


@pytest.mark.parametrize(
    ("stood", "timeout", "words"),
    [
        ([], 3, "no coordinator serves it (waited 3 s)"),
        ([7], 3, "no coordinator serves it (waited 17 s)"),
        ([7, 8], 3, "no coordinator serves it (waited 25 s)"),
        ([7], 25, "no coordinator serves it (waited 32 s)"),
        ([7, 55], 3, "its coordinator has let nobody in for 62 s"),
    ],
)
def test_the_error_says_how_long_one_has_waited_in_all_which_may_be_longer_than_its_timeout(
    stood, timeout, words, doors
):
    """What it has for the next one, 10 s or its timeout, begins when the one at whose door it stood has gone."""
    doors(*stood)
    with pytest.raises(FlowNotRunning) as caught:
        reach("late", timeout, [])
    assert words in str(caught.value)


def test_the_error_of_one_who_was_refused_says_how_long_it_has_waited(clock, monkeypatch):
    def refuse(*args, **options):
        raise Refusal("its coordinator cannot let anybody in: it is out of memory")

    monkeypatch.setattr(reaching, "try_to_reach", refuse)
    with pytest.raises(TooManyWorkers, match=r"out of memory \(waited 3 s\)"):
        reach("late", 3, [])


def test_threads_that_wait_for_the_same_coordinator_wait_at_the_same_time(monkeypatch):
    """Each says how long it has waited, in all."""
    patience, said = 1.0, []

    def wait():
        with pytest.raises(FlowNotRunning) as caught:
            flow._client.attach(patience)
        said.append(str(caught.value))

    flow = StrictFlow("nobody-is-there")
    threads = [threading.Thread(target=wait) for _ in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < patience * len(threads) / 2
    assert len(said) == len(threads)
    waited = [float(text.split("(waited ")[1].split(" s)")[0]) for text in said]
    assert min(waited) >= patience * 0.99
