"""Processes that attach while their coordinator dies, or lets nobody in."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from holding import stand_at_the_door

from strictflow_mp import StrictFlow, write
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
