"""A signal handler that raises, at any moment of any call: its exception comes out, and nothing is lost or left up."""

from __future__ import annotations

import itertools
import linecache
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tracing import traced

import strictflow_mp
from strictflow_mp import StrictFlow, read, write
from strictflow_mp.system.place import Place
from strictflow_mp.wire.stream import Stream

pytestmark = [
    pytest.mark.timeout(60, method="thread"),  # the other method needs SIGALRM itself
    # A handler can raise between open() and the `with` around it.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Rung(Exception):
    pass


@pytest.fixture
def bell() -> Iterator[Callable[[], None]]:
    """Makes SIGALRM raise after a moment, which is another one each time."""
    dice = random.Random(5)

    def strike(number: int, frame: Any) -> None:
        raise Rung

    def wind() -> None:
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 2e-3))

    former = signal.signal(signal.SIGALRM, strike)
    yield wind
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def flow() -> Iterator[StrictFlow]:
    with StrictFlow("signals", state={"ids": []}) as flow:
        yield flow


def interrupted(bell: Callable[[], None], call: Callable[[], Any]) -> bool:
    """Call until it was interrupted once or came through; whether it was interrupted."""
    try:
        try:
            bell()
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0)  # one that was on its way strikes here
    except Rung:  # it strikes once; perhaps just ahead of the line above
        return True
    return False


def struck(line: int, call: Callable[[], Any]) -> bool:
    """Call, and raise at that line (of all that are run in the package), as a handler may; whether there was one."""
    package, left = str(Path(strictflow_mp.__file__).parent), line

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        file = frame.f_code.co_filename
        if not file.startswith(package):
            return None
        # No signal is handled between the end of a block and the exit that its `with` calls, nor at a `try:`, which is
        # nothing, and not guarded by the block around it; though a line is traced.
        if event == "line" and not linecache.getline(file, frame.f_lineno).strip().startswith(("with", "try:")):
            left -= 1
            if not left:
                raise Rung
        return trace

    with suppress(Rung), traced(trace):
        call()
    return left <= 0  # the interpreter itself catches what is raised in a __del__


def note_in(flow: StrictFlow) -> Any:
    @write(flow)
    def note(number):
        flow.state["ids"].append(number)
        return number

    return note


def test_no_answer_is_lost_when_a_wait_for_answers_is_interrupted(flow, bell):
    note = note_in(flow)
    times = 0
    for first in range(0, 6_000, 60):
        futures = [note(number) for number in range(first, first + 60)]
        for future in futures:
            while not future.done_now():
                times += interrupted(bell, future.result)
        assert [future.result(0) for future in futures] == list(range(first, first + 60))
    assert flow.state["ids"] == list(range(6_000))
    assert times > 20


def test_an_interrupted_submit_runs_once_or_not_at_all_and_leaves_no_flag_up(flow, bell, eventually):
    note = note_in(flow)
    futures = {}
    times = 0

    def submit(number: int) -> None:
        futures[number] = note(number)

    for number in range(1_500):
        times += interrupted(bell, lambda number=number: submit(number))
    assert note(9_999).result(60) == 9_999
    assert [future.result(60) for future in futures.values()] == list(futures)
    ids = flow.state["ids"]
    assert len(set(ids)) == len(ids)
    assert set(futures) <= set(ids)
    assert ids == sorted(ids)
    eventually(flow._client._attachment.gate.is_open)
    assert times > 5


SUBMITS: dict[str, Callable[[StrictFlow, int], Any]] = {
    "a P1": lambda flow, number: note_in(flow)(number),
    "P1 in one go": lambda flow, number: note_in(flow).map([number] * 3),
    "a P2": lambda flow, number: read(flow)(lambda: number)(),
    "a put": lambda flow, number: flow.put("put", number),
    "a watch": lambda flow, number: flow._client.watch(1 << 40, ()),
}


@pytest.mark.parametrize("kind", SUBMITS)
def test_a_submit_that_is_interrupted_at_any_line_leaves_the_connection_as_it_was(flow, kind, eventually):
    """The function of the task is new each time, and goes along."""
    note = note_in(flow)
    attachment = flow._client.attach()
    room = attachment.room
    for line in itertools.count(1):
        was_struck = struck(line, lambda line=line: SUBMITS[kind](flow, line))
        assert note(-line).result(60) == -line
        assert flow._client.attach() is attachment
        eventually(lambda: flow.stats() and attachment.room == room)  # the answer to a P2 may come late
        assert attachment.outgoing.first_due() > attachment.outgoing.last.seq
        if not was_struck:
            break
    assert line > 20
    ids = flow.state["ids"]
    assert [number for number in ids if number < 0] == [*range(-1, -line - 1, -1)]
    eventually(attachment.gate.is_open)


def test_an_attach_that_is_interrupted_at_any_line_costs_no_place(eventually):
    with StrictFlow("signals", state={"number": 7}, max_workers=4) as flow:
        for line in itertools.count(1):
            flow._client.close()
            was_struck = struck(line, lambda: flow.state["number"])
            assert flow.state["number"] == 7
            segment = flow._client.attach().segment
            pids = segment.words[segment.pids : segment.pids + segment.slots]
            eventually(lambda pids=pids: sum(map(bool, pids.tolist())) == 1)
            if not was_struck:
                break
        assert line > 100


def test_an_interrupted_gated_read_raises_what_the_handler_raised_and_the_next_one_is_right(flow, bell):
    note = note_in(flow)
    times = 0
    for number in range(1_000):
        note(number)
        while True:
            seen: list[int] = []
            if not interrupted(bell, lambda seen=seen: seen.append(flow.state["ids"][-1])):
                assert seen == [number]
                break
            times += 1
    assert times > 20


def test_a_wait_for_the_next_coordinator_can_be_interrupted_and_goes_on(flow, bell):
    note = note_in(flow)
    note(0).result(60)
    for number in range(1, 4):
        pid = Place.of(flow.name).resident().pid
        os.kill(pid, signal.SIGSTOP)
        future = note(number)
        os.kill(pid, signal.SIGKILL)
        times = 0
        deadline = time.monotonic() + 60
        while not future.done_now() and time.monotonic() < deadline:
            times += interrupted(bell, future.result)
        assert times > 3
        assert future.result(0) == number
    assert flow.state["ids"] == [0, 1, 2, 3]


def test_a_frame_for_which_there_is_no_room_is_sent_once_wherever_its_sending_is_interrupted():
    data = os.urandom(1 << 20)  # several times what a socket holds
    for line in itertools.count(1):
        ours, theirs = socket.socketpair()
        stream, received = Stream(ours), bytearray()
        was_struck = struck(line, lambda stream=stream: stream.send(data))
        with theirs:
            while not stream.flush():
                received += theirs.recv(1 << 16)
            stream.close()
            while portion := theirs.recv(1 << 16):
                received += portion
        assert received in (data, b"")
        if not was_struck:
            break
    assert line > 3
