"""A submit, a read or a wait may begin in the middle of any other: in a signal handler, a finalizer, a callback.

Here all of them begin, one after the other, at every line that the package runs for another one. With
REENTRY_AT_EACH_OPCODE in the environment they do so at every bytecode instruction, which takes minutes (Python 3.10 and
3.11; later ones do not trace all).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracing import traced

import strictflow_mp
from strictflow_mp import StrictFlow, StrictFlowError, read, write
from strictflow_mp.memory import gate

PACKAGE = str(Path(strictflow_mp.__file__).parent)
EVENT = "opcode" if "REENTRY_AT_EACH_OPCODE" in os.environ else "line"

pytestmark = pytest.mark.timeout(120, method="thread")


def entered(step: int, call: Callable[[], Any], within: Callable[[], Any]) -> bool:
    """Call, and at that step of the package call something else; whether there were so many steps."""
    left = step

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = EVENT == "opcode"
        if event == EVENT:
            left -= 1
            if not left:
                sys.settrace(None)
                within()
        return trace

    with traced(trace):
        call()
    return left <= 0


class House:
    """A flow, and what can be done with it; everything that is done is checked, there or at the end."""

    def __init__(self, flow: StrictFlow) -> None:
        self.flow = flow
        self.numbers = itertools.count(1)
        self.noted: list[int] = []
        self.due: list[Any] = []

        @write(flow)
        def note(number: int) -> int:
            flow.state["ids"].append(number)
            return number

        @read(flow)
        def look() -> int:
            return len(flow.state["ids"])

        self.note, self.look = note, look
        note(0).result()

    def submit(self) -> None:
        number = next(self.numbers)
        self.due.append((number, self.note(number)))

    def call(self) -> None:
        number = next(self.numbers)
        assert self.note(number).result(60) == number
        self.noted.append(number)
        assert number in self.flow.state["ids"]

    def call_anew(self) -> None:
        """A task that is new to the coordinator."""
        flow, number = self.flow, next(self.numbers)

        @write(flow)
        def note_anew() -> None:
            flow.state["ids"].append(number)

        note_anew().result(60)
        self.noted.append(number)
        assert number in flow.state["ids"]

    def map(self) -> None:
        numbers = [next(self.numbers) for _ in range(3)]
        self.due += zip(numbers, self.note.map(numbers), strict=True)

    def put(self) -> None:
        number = next(self.numbers)
        self.flow.state["last"] = number
        assert self.flow.state["last"] >= number

    def ask(self) -> None:
        known = len(self.noted)
        assert self.look().result(60) > known

    def stats(self) -> None:
        assert self.flow.stats().restarts == 0

    def get(self) -> None:
        known = len(self.noted)
        assert len(self.flow.state["ids"]) > known
        assert self.flow.state["fixed"] == "fixed"

    def get_behind(self) -> None:
        """A read that sleeps at the gate."""
        number = next(self.numbers)
        future = self.note(number)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate, "look_for", lambda look, nothing: nothing)
            assert number in self.flow.state["ids"]
        assert future.result(60) == number
        self.noted.append(number)

    def snapshot(self) -> None:
        known = len(self.noted)
        with self.flow.snapshot() as snapshot:
            assert len(snapshot["ids"]) > known
            assert snapshot["array"][0] == snapshot["array"][999]

    def array(self) -> None:
        array = self.flow.state["array"]
        assert array[0] == array[999]

    def wait(self) -> None:
        number, future = self.due.pop() if self.due else (next(self.numbers), None)
        future = future or self.note(number)
        assert future.result(60) == number
        self.noted.append(number)

    def reattach(self) -> None:
        self.settle()
        self.flow._client.close()
        self.get()

    def everything(self) -> None:
        self.call()
        self.wait()
        self.snapshot()

    def settle(self) -> None:
        while self.due:
            self.wait()

    def check(self) -> None:
        """All that was submitted has run once, in the order of its numbers; no flag is up, no answer is due."""
        self.settle()
        attachment = self.flow._client.attach()
        with self.flow.snapshot() as snapshot:
            ids = list(snapshot["ids"])
        assert len(ids) == len(set(ids))
        assert set(self.noted) <= set(ids)
        assert attachment.gate.is_open()
        self.noted.clear()
        self.flow.put("ids", [0]).result(60)
        assert not attachment.outgoing.pending
        assert attachment.outgoing.first_due() > attachment.outgoing.last.seq


@pytest.fixture
def house() -> Iterator[House]:
    state = {"ids": [], "last": 0, "fixed": "fixed", "array": np.zeros(1000)}
    with StrictFlow("reentry", state=state) as flow:
        yield House(flow)


OUTER = [
    *("submit", "call", "call_anew", "map", "put", "ask", "stats", "get", "get_behind"),
    *("snapshot", "array", "wait", "reattach"),
]


@pytest.mark.once
@pytest.mark.parametrize("outer", OUTER)
def test_whatever_begins_in_the_middle_of_whatever_else_both_are_right(house, outer):
    for step in itertools.count(1):
        house.flow.state["array"] = np.full(1000, float(step))
        was_there = entered(step, getattr(house, outer), house.everything)
        if step % 10 == 0 or not was_there:
            house.check()
        if not was_there:
            break
    assert step > 20


@pytest.mark.once
@pytest.mark.parametrize("outer", [outer for outer in OUTER if outer != "get_behind"])
def test_a_connection_may_be_closed_in_the_middle_of_whatever_else(house, outer, eventually):
    flow = house.flow
    segment = flow._client.attach().segment
    pids = segment.words[segment.pids : segment.pids + segment.slots]

    def call() -> None:
        try:
            getattr(house, outer)()
        except StrictFlowError as error:
            assert "closed" in str(error)  # noqa: PT017  it may come out or not
        house.due.clear()

    for step in itertools.count(1):
        was_there = entered(step, call, flow._client.close)
        house.get()
        if step % 10 == 0 or not was_there:
            # In the middle of taking a pin no goodbye can be said (docs/limits.md).
            eventually(lambda: sum(map(bool, pids.tolist())) == 1 or outer in ("snapshot", "array"))
            eventually(flow._client.attach().gate.is_open)
        if not was_there:
            break
    assert step > 10


# In SF-LOOP, where finalizers of what tasks have made run


def trace_once(step: int, functions: set[str], within: Callable[[], Any]) -> None:
    """Call something at that step of these functions, of all that this thread enters from now on."""
    left = step

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_name not in functions:
            return None
        if event == "line":
            left -= 1
            if not left:
                sys.settrace(None)
                within()
        return trace

    sys.settrace(trace)


@pytest.mark.parametrize(
    ("functions", "steps"),
    [({"_queue", "_take_in", "_settle", "raise_own"}, 40), ({"finish", "_take_in", "_settle"}, 40)],
    ids=["a submit", "the end of a burst"],
)
def test_a_finalizer_in_sf_loop_may_submit_in_the_middle_of_anything(functions, steps, eventually):
    with StrictFlow("finalizers", state={"ran": []}) as flow:

        @write(flow)
        def note(what: Any) -> None:
            flow.state["ran"].append(what)

        @write(flow)
        def trap(step: int) -> None:
            trace_once(step, functions, lambda: note(("nested", step)))
            note(("first", step))
            note(("second", step))

        @write(flow)
        def disarm() -> None:
            sys.settrace(None)

        for step in range(1, steps):
            trap(step).result(60)
            disarm().result(60)
            eventually(flow._client.attach().gate.is_open)
        ran = [tuple(what) for what in flow.state["ran"]]
        assert len(ran) == len(set(ran))
        for step in range(1, steps):
            assert ran.index(("first", step)) < ran.index(("second", step))
        assert sum(what == "nested" for what, _ in ran) > steps / 3
