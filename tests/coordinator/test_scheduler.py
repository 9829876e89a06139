"""The scheduler: its policy as transcripts to be read, and what must hold whatever happens.

A transcript (`transcripts/*.txt`) is a list of blocks: commands, ``----``, what they answered. After a change of
policy, run with REWRITE_TRANSCRIPTS=1 and review the difference. The commands:

- ``submit a1:P1 b1..b9:P2 c1:async``: owner, number, kind (async is a P2 that turns out to be a coroutine).
- ``cancel a1``; ``end c1``: an async task has ended.
- ``during a1: COMMAND``: do it while that task runs.
- ``each P1 takes 0.001``: seconds.
- ``turn``, or ``turn 3``: what SF-LOOP does next, that many times.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from strictflow_mp import StrictFlow, read
from strictflow_mp.coordinator import scheduler
from strictflow_mp.coordinator.scheduler import BURST_SECONDS, Schedulable, Scheduler, State, Step

TRANSCRIPTS = sorted(Path(__file__).with_name("transcripts").glob("*.txt"))


class Loop:
    """SF-LOOP without tasks: performs what the scheduler decides, and says so."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.takes = 0.0
        self._coroutines: set[str] = set()
        self._during: defaultdict[str, list[str]] = defaultdict(list)

    def obey(self, command: str) -> Iterator[str]:
        """What a command answers, line by line."""
        verb, _, rest = command.partition(" ")
        if verb == "submit":
            for token in rest.split():
                self._submit(*token.split(":"))
        elif verb == "cancel":
            for name in rest.split():
                call = self.scheduler.cancel(*_parse(name))
                yield f"{name} {call.state.value if call else 'is not queued'}"
        elif verb == "end":
            self.scheduler.async_ended()
        elif verb == "during":
            name, _, what = rest.partition(": ")
            self._during[name].append(what)
        elif command.startswith("each P1 takes "):
            self.takes = float(command.split()[-1])
        elif verb == "turn":
            for _ in range(int(rest or 1)):
                yield from self._turn()
        else:
            raise ValueError(command)

    def _submit(self, names: str, kind: str) -> None:
        first, _, last = names.partition("..")
        owner, number = _parse(first)
        for one in range(number, _parse(last or first)[1] + 1):
            call = Schedulable(owner, one, 1 if kind == "P1" else 2)
            if kind == "async":
                self._coroutines.add(_name(call))
            self.scheduler.submit(call)

    def _turn(self) -> Iterator[str]:
        step = self.scheduler.next_step()
        if step is Step.BURST:
            ran: list[str] = []
            answers: list[str] = []
            while (call := self.scheduler.next_write(len(ran), len(ran) * self.takes)) is not None:
                ran.append(_name(call) + " (cancelled)" * (call.state is State.CANCELLED))
                answers += self._run(call)
            yield f"P1: {_shortened(ran)}"
            yield from answers
        elif step is Step.READ:
            call = self.scheduler.next_read()
            starts = _name(call) in self._coroutines
            yield f"P2: {_name(call)}" + " starts" * starts
            yield from self._run(call)
            if starts:
                self.scheduler.async_started()
        else:
            yield step.value
            if step is Step.ASYNC:
                self.scheduler.async_ran()

    def _run(self, call: Schedulable) -> Iterator[str]:
        for command in self._during.pop(_name(call), ()):
            yield from self.obey(command)


def _parse(name: str) -> tuple[int, int]:
    return ord(name[0]), int(name[1:])


def _name(call: Schedulable) -> str:
    return f"{chr(call.slot)}{call.seq}"


def _shortened(names: list[str]) -> str:
    """a1, a2, a3, a4 as a1..a4."""
    runs: list[list[str]] = []
    for name in names:
        follows = re.sub(r"\d+$", lambda number: str(int(number[0]) - 1), name)
        if runs and runs[-1][-1] == follows != name:
            runs[-1].append(name)
        else:
            runs.append([name])
    return " ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else " ".join(run) for run in runs)


def play(script: str) -> str:
    """The script with the answers that its commands give now."""
    loop = Loop()
    blocks = []
    for block in script.strip().split("\n\n"):
        commands = block.partition("\n----")[0]
        if not commands.startswith("#"):
            answers = [line for command in commands.split("\n") for line in loop.obey(command)]
            commands = "\n".join([commands, "----", *(answers or [repr(loop.scheduler)])])
        blocks.append(commands)
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_policy_is_as_the_transcripts_say(path):
    script = path.read_text()
    played = play(script)
    if os.environ.get("REWRITE_TRANSCRIPTS"):
        path.write_text(played)
    else:
        assert played == script


def test_there_are_transcripts():
    assert len(TRANSCRIPTS) >= 4


BURST = 5
OWNERS = st.sampled_from([0, 1, 2])


class SchedulerMachine(RuleBasedStateMachine):
    """Every call is in one place: queued, under way, over, or cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.last_number = dict.fromkeys((0, 1, 2), 0)
        self.queued: list[Schedulable] = []
        self.cancelled: list[Schedulable] = []
        self.over: list[Schedulable] = []
        self.coroutines: set[Schedulable] = set()
        self.under_way: list[Schedulable] = []
        self.due: Step | None = None

    def _queued(self, priority: int) -> list[Schedulable]:
        return [call for call in self.queued if call.priority == priority]

    @rule(owner=OWNERS, priority=st.sampled_from([1, 2]), is_coroutine=st.booleans())
    def submit(self, owner: int, priority: int, is_coroutine: bool) -> None:
        self.last_number[owner] += 1
        call = Schedulable(owner, self.last_number[owner], priority)
        if is_coroutine and priority == 2:
            self.coroutines.add(call)
        self.queued.append(call)
        self.scheduler.submit(call)

    @rule(owner=OWNERS, priority=st.sampled_from([1, 2]), count=st.integers(1, 4))
    def submit_several(self, owner: int, priority: int, count: int) -> None:
        first = self.last_number[owner] + 1
        self.last_number[owner] += count
        calls = [Schedulable(owner, number, priority) for number in range(first, first + count)]
        self.queued += calls
        self.scheduler.submit_all(calls)

    @rule(owner=OWNERS, number=st.integers(1, 30))
    def cancel(self, owner: int, number: int) -> None:
        expected = next((call for call in self.queued if (call.slot, call.seq) == (owner, number)), None)
        assert self.scheduler.cancel(owner, number) is expected
        if expected is not None:
            assert expected.state is State.CANCELLED
            self.queued.remove(expected)
            self.cancelled.append(expected)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def an_async_task_ends(self, data: st.DataObject) -> None:
        self.over.append(self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1))))
        self.scheduler.async_ended()

    @rule(takes=st.sampled_from([0, BURST_SECONDS / 3, BURST_SECONDS]), cancel=st.none() | st.integers(1, 30))
    def turn(self, takes: float, cancel: int | None) -> None:
        step = self.scheduler.next_step()
        if step is Step.BURST:
            self._burst(takes, cancel)
            return
        assert not self._queued(1)
        if step is Step.READ:
            self._start_read()
        elif step is Step.ASYNC:
            assert self.under_way
            self.scheduler.async_ran()
        else:
            assert not self.queued
            assert not self.under_way
        assert self.due in (None, step), "the other kind of P2 had its turn"
        others = {Step.READ: self.under_way and Step.ASYNC, Step.ASYNC: self._queued(2) and Step.READ}
        self.due = others.get(step) or None

    def _burst(self, takes: float, cancel: int | None) -> None:
        done = 0
        while (call := self.scheduler.next_write(done, done * takes)) is not None:
            done += 1
            if call.state is State.CANCELLED:
                assert call in self.cancelled
                continue
            assert call is self._queued(1)[0], "P1 tasks run in the order in which they were queued"
            assert call.state is State.RUNNING
            self.queued.remove(call)
            self.over.append(call)
            if cancel is not None:
                self.cancel(call.slot, cancel)
        assert done
        assert done <= BURST
        assert not takes or done <= BURST_SECONDS / takes + 1
        if not takes and done < BURST:
            assert not self._queued(1)

    def _start_read(self) -> None:
        call = self.scheduler.next_read()
        assert call is self._queued(2)[0], "P2 tasks start in order"
        assert call.state is State.RUNNING
        self.queued.remove(call)
        if call in self.coroutines:
            self.under_way.append(call)
            self.scheduler.async_started()
        else:
            self.over.append(call)

    @invariant()
    def the_scheduler_knows_how_many_are_queued(self) -> None:
        policy = self.scheduler
        assert policy.reads == len(self._queued(2)) + len(self.under_way)
        live = len(self._queued(1))
        assert live <= policy.writes <= live + sum(call.priority == 1 for call in self.cancelled)
        assert policy.is_idle == (policy.writes == policy.reads == 0)
        assert policy.next_step() is policy.next_step(), "asking changes nothing"
        waiting = {Step.ASYNC: self.under_way, Step.READ: self._queued(2)}
        if self.due and not waiting[self.due]:
            self.due = None

    def teardown(self) -> None:
        while not self.scheduler.is_idle:
            self.turn(0, None)
            self.the_scheduler_knows_how_many_are_queued()
            if self.under_way and not self.queued:
                self.over.append(self.under_way.pop())
                self.scheduler.async_ended()
        assert not self.queued
        calls = [(call.slot, call.seq) for call in self.over + self.cancelled]
        assert len(calls) == len(set(calls)) == sum(self.last_number.values())
        assert all(call.state is State.RUNNING for call in self.over)


def test_order_and_priority_are_kept_and_no_task_is_lost_or_run_twice(monkeypatch):
    monkeypatch.setattr(scheduler, "BURST_TASKS", BURST)
    run_state_machine_as_test(SchedulerMachine, settings=settings(settings(), stateful_step_count=40))


# What is asked by owner

SMALL, MINE, LARGE = 1, 700, 70_000
"""Owners; beyond 256, equal numbers are not the same object."""


def with_tasks_of_three_owners() -> tuple[Scheduler, list[Schedulable]]:
    policy = Scheduler()
    owners = (SMALL, MINE, LARGE) * 3
    calls = [Schedulable(int(str(owner)), number, 1 + number % 2) for number, owner in enumerate(owners)]
    for call in calls:
        policy.submit(call)
    return policy, calls


def test_what_an_owner_has_queued_is_taken_back_and_does_not_count_and_all_else_stays():
    policy, calls = with_tasks_of_three_owners()
    mine = [call for call in calls if call.slot == MINE]
    assert not any(call.is_void for call in calls)
    policy.withdraw(MINE)
    assert [call for call in calls if call.is_void] == mine
    assert [call for call in calls if call.state is State.CANCELLED] == mine
    assert [policy.next_write(done, 0) for done in range(5)] == [call for call in calls if call.priority == 1]
    reads = [call for call in calls if call.priority == 2]
    assert [policy.next_read() for _ in range(policy.reads)] == [call for call in reads if call.slot != MINE]
    assert policy.is_idle


def test_what_has_begun_is_not_taken_back():
    policy, calls = with_tasks_of_three_owners()
    begun = [policy.next_write(done, 0) for done in range(3)] + [policy.next_read() for _ in range(2)]
    assert [call.seq for call in begun if call.slot == MINE] == [4, 1]
    policy.withdraw(MINE)
    assert all(call.state is State.RUNNING and not call.is_void for call in begun)
    assert [call.seq for call in calls if call.is_void] == [7]


def test_the_first_write_of_an_owner_is_its_own_and_the_one_that_runs_next():
    policy, calls = with_tasks_of_three_owners()
    for owner in (LARGE, MINE, SMALL):
        assert policy.first_write(owner) is next(call for call in calls if call.slot == owner and call.priority == 1)
    assert policy.first_write(MINE + 1) is None
    while policy.next_write(0, 0):
        pass
    assert policy.first_write(MINE) is None


# The same in a running flow


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(("rounds", "reads"), [(3, 100), (300, 3)], ids=["async is short", "async is long"])
def test_in_a_flow_sync_and_async_reads_take_turns(tmp_path, ahead, rounds, reads):
    """All are queued before the first runs; whichever kind has less to do ends first."""
    flow = StrictFlow("turns")
    go = str(tmp_path / "go")

    @read(flow)
    def hold() -> None:
        while not os.path.exists(go):
            time.sleep(0.001)

    @read(flow)
    def sync_read() -> float:
        return time.monotonic()

    @read(flow)
    async def async_read() -> float:
        for _ in range(rounds):
            await asyncio.sleep(0)
        return time.monotonic()

    with flow:
        futures: list[Any] = [hold()]
        futures += [sync_read() for _ in range(ahead)]
        task = async_read()
        futures += [sync_read() for _ in range(reads)]
        Path(go).touch()
        async_end, last_sync_end = task.result(), futures[-1].result()
    assert (async_end < last_sync_end) == (rounds < reads)
