"""The history checker tells right histories from wrong ones; and real processes make right ones, unless sabotaged."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
from collections import deque
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import sabotage
from history import (
    CHANGES,
    GATED,
    TRAIL,
    UNGATED,
    History,
    Operation,
    Refused,
    Session,
    carry_out,
    check,
    first_state,
    keys_of,
    load,
    search,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from strictflow_mp import StrictFlow, read
from strictflow_mp.system.place import Place

# Histories by hand. Times are small numbers; x and y begin as 0.

FIRST = {"x": [0, 0, []], "y": [0, 0, []]}
S = 10**9


def cell(value, *trail):
    return [len(trail), value, list(trail)]


def p1(mark, times, kind, *args, outcome="ok", **seen):
    """times: call, submitted, answered (as far as it came)"""
    call, submitted, end = (*times, None, None)[:3]
    if end is None:
        outcome = "unknown"
    return Operation(mark, kind, args, call, submitted, end, outcome, seen or None)


def saw(mark, times, kind, **seen):
    return Operation(mark, kind, tuple(seen), times[0], None, times[1], "ok", seen)


add = ("increment", "x", 1)
both = ("transfer", "x", "y", 0)
RIGHT = {
    "a read that began before the submit had returned may miss it, even when it ends after the answer": [
        p1("a.1", (1, 5, 8), *add, x=cell(0)),
        saw("b.1", (4, 9), "read", x=cell(0)),
    ],
    "a read may see a write whose submit has not returned": [
        p1("a.1", (1, 8, 9), *add, x=cell(0)),
        saw("b.1", (2, 3), "read", x=cell(1, "a.1")),
    ],
    "P1 tasks of two processes need not run in the order of their submits": [
        p1("a.1", (1, 2, 9), *add, x=cell(1, "b.1")),
        p1("b.1", (3, 4, 8), *add, x=cell(0)),
        saw("c.1", (5, 9), "read", x=cell(2, "b.1", "a.1")),
    ],
    "a read that began before may see the later of two submits without the earlier": [
        p1("a.1", (2, 3, 9), "increment", "x", 1, x=cell(0)),
        p1("b.1", (4, 5, 9), "increment", "y", 1, y=cell(0)),
        saw("c.1", (1, 7), "snapshot", x=cell(0), y=cell(1, "b.1")),
    ],
    "a peek may be old": [
        p1("a.1", (1, 2, 3), *add, x=cell(0)),
        saw("b.1", (4, 5), "peek", x=cell(0)),
        saw("b.2", (6, 7), "peek", x=cell(1, "a.1")),
    ],
    "an ungated snapshot may be old, but is one version": [
        p1("a.1", (1, 2, 3), *both, x=cell(0), y=cell(0)),
        saw("b.1", (4, 5), "snapshot_of_now", x=cell(0), y=cell(0)),
    ],
    "what was unanswered may have happened": [
        p1("a.1", (1, 2), *add),
        p1("a.2", (3,), *add),
        saw("b.1", (4, 5), "read", x=cell(2, "a.1", "a.2")),
    ],
    "what was unanswered may have happened much later": [
        p1("a.1", (1,), *add),
        saw("b.1", (4, 5), "read", x=cell(0)),
        saw("b.2", (6, 7), "read", x=cell(1, "a.1")),
    ],
    "what was unanswered may never have happened": [
        p1("a.1", (1, 2), *add),
        saw("b.1", (4, 5), "read", x=cell(0)),
    ],
    "an unanswered write of two cells of which one was read": [
        p1("a.1", (1, 2), *both),
        saw("b.1", (4, 5), "read", x=cell(0, "a.1")),
    ],
    "a refused task changes nothing": [
        p1("a.1", (1, 2, 6), "transfer", "x", "y", 5, outcome="refused", x=cell(1, "b.1"), y=cell(0)),
        p1("b.1", (3, 4, 7), *add, x=cell(0)),
        saw("c.1", (8, 9), "snapshot", x=cell(1, "b.1"), y=cell(0)),
    ],
    "a crashed task changes nothing": [
        Operation("a.1", "increment", ("x", 1), 1, 2, 3, "void", "TaskCrashed"),
        saw("b.1", (4, 5), "read", x=cell(0)),
    ],
    "a compare-and-set that found another value changes nothing": [
        p1("a.1", (1, 2, 3), "compare_and_set", "x", 7, 8, x=cell(0)),
        p1("a.2", (4, 5, 6), "compare_and_set", "x", 0, 8, x=cell(0)),
        saw("b.1", (7, 8), "read", x=cell(8, "a.2")),
    ],
}
WRONG = {
    "a lost write": (
        "lost: x@1 was written by a.1 and by b.1",
        [p1("a.1", (1, 2, 5), *add, x=cell(0)), p1("b.1", (3, 4, 6), *add, x=cell(0))],
    ),
    "a write that was lost later": (
        "lost: x@1 was written by a.1 and by b.1",
        [p1("a.1", (1, 2, 3), *add, x=cell(0)), p1("b.1", (4, 5, 6), *both, x=cell(0), y=cell(0))],
    ),
    "a write applied twice": (
        "twice: a.1 .* x@1 and x@2",
        [p1("a.1", (1, 2, 3), *add, x=cell(0)), saw("b.1", (4, 5), "read", x=cell(2, "a.1", "a.1"))],
    ),
    "an unanswered write applied twice": (
        "twice: a.1",
        [
            p1("a.1", (1,), *add),
            p1("b.1", (3, 4, 6), *add, x=cell(1, "a.1")),
            saw("b.1", (7, 8), "read", x=cell(3, "a.1", "b.1", "a.1")),
        ],
    ),
    "a read that misses what was submitted": (
        "stale: .*its submit had returned before the next began",
        [p1("a.1", (1, 2, 9), *add, x=cell(0)), saw("b.1", (3, 8), "read", x=cell(0))],
    ),
    "a read in SF-LOOP that misses what was submitted": (
        "stale",
        [p1("a.1", (1, 2, 9), *add, x=cell(0)), saw("b.1", (3, 8), "in_loop", x=cell(0), y=cell(0))],
    ),
    "a read that misses what another had seen": (
        "stale",
        [
            p1("a.1", (1, 8, 9), *add, x=cell(0)),
            saw("b.1", (2, 3), "read", x=cell(1, "a.1")),
            saw("c.1", (4, 5), "read", x=cell(0)),
        ],
    ),
    "a torn snapshot": (
        "torn: ",
        [
            p1("a.1", (1, 8, 9), *both, x=cell(0), y=cell(0)),
            saw("b.1", (2, 7), "snapshot", x=cell(0, "a.1"), y=cell(0)),
        ],
    ),
    "a torn ungated snapshot": (
        "torn: ",
        [
            p1("a.1", (1, 8, 9), *both, x=cell(0), y=cell(0)),
            saw("b.1", (2, 7), "snapshot_of_now", x=cell(0), y=cell(0, "a.1")),
        ],
    ),
    "two snapshots that disagree on the order": (
        "torn: ",
        [
            p1("a.1", (1, 8, 9), "increment", "x", 1, x=cell(0)),
            p1("b.1", (1, 8, 9), "increment", "y", 1, y=cell(0)),
            saw("c.1", (2, 7), "snapshot", x=cell(1, "a.1"), y=cell(0)),
            saw("d.1", (2, 7), "snapshot", x=cell(0), y=cell(1, "b.1")),
        ],
    ),
    "half of an unanswered transfer": (
        "torn: ",
        [
            p1("a.1", (1,), *both),
            saw("b.1", (2, 3), "snapshot", x=cell(0, "a.1"), y=cell(0)),
            p1("b.2", (4, 5, 6), "increment", "y", 1, y=cell(0)),
        ],
    ),
    "garbage": ("torn: b.1", [saw("b.1", (2, 3), "read", x=[0, b"?", []])]),
    "a cell that has forgotten who wrote it": ("torn: b.1", [saw("b.1", (2, 3), "read", x=[2, 0, ["a.1"]])]),
    "a read from the future": (
        "future: ",
        [saw("b.1", (1, 2), "read", x=cell(1, "a.1")), p1("a.1", (3, 4, 5), *add, x=cell(0))],
    ),
    "a peek into the future": (
        "future: ",
        [saw("b.1", (1, 2), "peek", x=cell(1, "a.1")), p1("a.1", (3,), *add)],
    ),
    "a peek that goes back": (
        "back: ",
        [
            p1("a.1", (1, 7, 8), *add, x=cell(0)),
            saw("b.1", (2, 3), "peek", x=cell(1, "a.1")),
            saw("b.2", (4, 5), "peek", x=cell(0)),
        ],
    ),
    "a peek that goes back in another cell": (
        "back: ",
        [
            p1("a.1", (1, 7, 8), *both, x=cell(0), y=cell(0)),
            saw("b.1", (2, 3), "peek", x=cell(0, "a.1")),
            saw("b.2", (4, 5), "peek", y=cell(0)),
        ],
    ),
    "a peek that misses its own process's write": (
        "back: ",
        [p1("a.1", (1, 2, 3), *add, x=cell(0)), saw("a.2", (4, 5), "peek", x=cell(0))],
    ),
    "a later gated read that misses what a peek saw": (
        "stale",
        [
            p1("a.1", (1, 7, 8), *add, x=cell(0)),
            saw("b.1", (2, 3), "peek", x=cell(1, "a.1")),
            saw("c.1", (4, 5), "read", x=cell(0)),
        ],
    ),
    "the effect of a refused task": (
        "failed: a.1",
        [
            p1("a.1", (1, 2, 3), "spoil", "x", outcome="refused", x=cell(0)),
            saw("b.1", (4, 5), "read", x=cell(0, "a.1")),
        ],
    ),
    "the effect of a crashed task": (
        "failed: a.1 .*TaskCrashed",
        [
            Operation("a.1", "increment", ("x", 1), 1, 2, 3, "void", "TaskCrashed"),
            saw("b.1", (4, 5), "read", x=cell(1, "a.1")),
        ],
    ),
    "an effect that nobody caused": ("unexplained: ", [saw("b.1", (4, 5), "read", x=cell(1, "a.1"))]),
    "an effect on another cell": (
        "unexplained: ",
        [p1("a.1", (1, 2, 3), *add, x=cell(0)), saw("b.1", (4, 5), "read", y=cell(1, "a.1"))],
    ),
    "a compare-and-set that found another value and changed it": (
        "unexplained: ",
        [
            p1("a.1", (1, 2, 3), "compare_and_set", "x", 7, 8, x=cell(0)),
            saw("b.1", (7, 8), "read", x=cell(8, "a.1")),
        ],
    ),
    "a task that was refused without reason": (
        "wrong: a.1 .*without reason",
        [p1("a.1", (1, 2, 3), *both, outcome="refused", x=cell(0), y=cell(0))],
    ),
    "a wrong sum": (
        "wrong: b.1 ",
        [p1("a.1", (1, 2, 3), *add, x=cell(0)), saw("b.1", (4, 5), "read", x=cell(2, "a.1"))],
    ),
    "P1 tasks of one process that changed places": (
        "order: ",
        [
            p1("a.1", (1, 2, 9), "increment", "x", 1, x=cell(1, "a.2")),
            p1("a.2", (3, 4, 8), "increment", "x", 1, x=cell(0)),
        ],
    ),
    "a P1 that ran before one that had been answered": (
        "future: ",
        [p1("a.1", (1, 2, 3), *add, x=cell(1, "b.1")), p1("b.1", (4, 5, 6), *add, x=cell(0))],
    ),
}


@pytest.mark.parametrize("operations", RIGHT.values(), ids=RIGHT)
def test_a_right_history_is_accepted(operations):
    history = History(FIRST, operations)
    assert check(history) == []
    assert search(history) is not None


@pytest.mark.parametrize(("fault", "operations"), WRONG.values(), ids=WRONG)
def test_a_wrong_history_is_found_and_named(fault, operations):
    history = History(FIRST, operations)
    assert any(re.match(fault, each) for each in check(history)), check(history)
    assert search(history) is None


def test_a_version_that_nobody_claims_is_a_fault():
    trail = [f"a.{number}" for number in range(2, TRAIL + 2)]
    history = History(FIRST, [p1(mark, (1,), *add) for mark in trail])
    history.operations.append(saw("b.1", (2, 3), "read", x=[TRAIL + 1, TRAIL + 1, trail]))
    assert check(history) == ["unexplained: x@1: nobody says who wrote it"]


MISSED = [p1("a.1", (1, 2), *add), saw("b.1", (4, 5), "read", x=cell(0))]


def test_without_a_death_whatever_was_submitted_has_run():
    history = History(FIRST, MISSED)
    assert check(history) == []
    assert search(history) is not None
    assert check(history, lossless=True)[0].startswith("stale: ")
    assert search(history, lossless=True) is None


@pytest.mark.parametrize(
    ("ended", "answered", "died", "is_right"),
    [
        (5 * S, 9 * S, (3 * S, 4 * S), True),
        (4 * S, 9 * S, (3 * S, 4 * S), False),  # within the grace
        (5 * S, 9 * S, (6 * S, 7 * S), False),  # the death came later
        (5 * S, 9 * S, (0, 1), False),  # before the submit
        (5 * S, 9 * S, (10 * S, 11 * S), False),  # behind the answer
    ],
)
def test_a_coordinators_death_excuses_a_stale_read_when_the_grace_is_over(ended, answered, died, is_right):
    stale = [p1("a.1", (S, 2 * S, answered), *add, x=cell(0)), saw("b.1", (2 * S + 1, ended), "read", x=cell(0))]
    history = History(FIRST, stale, [died])
    assert (check(history) == []) is is_right
    assert (search(history) is not None) is is_right


def test_no_death_excuses_a_read_behind_the_answer():
    stale = [p1("a.1", (S, 2 * S, 5 * S), *add, x=cell(0)), saw("b.1", (6 * S, 9 * S), "read", x=cell(0))]
    assert check(History(FIRST, stale, [(S, 8 * S)]))[0].startswith("stale: ")


# Both checkers


class Simulation:
    """A flow that keeps its promise, as far as its histories go. Its clock goes on by 1 with each event."""

    def __init__(self, random: Random, sessions: int = 3, *, lossless: bool) -> None:
        self.random = random
        self.lossless = lossless
        self.history = History(first_state(2), [])
        self.numbers = itertools.count()
        self.versions = [self.history.first]
        self.base = 0
        self.sessions = [self.new_session() for _ in range(sessions)]

    def new_session(self) -> SimpleNamespace:
        name = f"s{next(self.numbers)}"
        return SimpleNamespace(name=name, doing=None, phase=0, due=deque(), pipe=deque(), floor=0)

    def tick(self) -> int:
        return next(self.numbers)

    def run(self, count: int) -> History:
        operations = self.history.operations
        while len(operations) < count:
            session = self.random.choice(self.sessions)
            what = self.random.random()
            if what < 0.01:
                self.kill(session)
            elif what < 0.4:
                self.work(session)
            elif session.doing is not None:
                self.go_on(session)
            elif session.due and (len(session.due) > 2 or what < 0.6):
                self.answer(session)
            else:
                self.begin(session)
        self.history.operations = [each for each in operations if each.is_change or each.end is not None]
        return self.history

    def begin(self, session):
        random = self.random
        kind = random.choice([*CHANGES, *GATED, *UNGATED])
        keys = random.sample(["n0", "n1"], 2)
        args = {
            "increment": (keys[0], random.randint(-50, 50)),
            "append": ("l0", random.randint(0, 9)),
            "compare_and_set": (keys[0], self.versions[-1][keys[0]][1], random.randint(0, 150)),
            "transfer": (*keys, random.randint(0, 150)),
            "read": keys[:1],
            "peek": keys[:1],
        }.get(kind, [*keys, "l0"])
        operation = Operation(f"{session.name}.{self.tick()}", kind, tuple(args), self.tick())
        self.history.operations.append(operation)
        session.doing = operation
        session.phase = 0
        session.waits = [each for other in self.sessions for each in other.pipe if each.submitted is not None]

    def go_on(self, session):
        operation = session.doing
        session.phase += 1
        if operation.is_change and session.phase == 1:
            session.pipe.append(operation)
        elif operation.is_change:
            operation.submitted = self.tick()
            session.due.append(operation)
            session.doing = None
        elif session.phase == 1:
            for other in self.sessions:
                while operation.is_gated and any(each in session.waits for each in other.pipe):
                    self.work(other)
            newest = self.base + len(self.versions) - 1
            session.floor = newest if operation.is_gated else self.random.randint(max(self.base, session.floor), newest)
            state = self.versions[session.floor - self.base]
            operation.seen = {key: state[key] for key in keys_of(operation.kind, operation.args)}
        else:
            operation.end, operation.outcome = self.tick(), "ok"
            session.doing = None

    def work(self, session):
        if not session.pipe:
            return
        operation = session.pipe.popleft()
        state = self.versions[-1]
        operation.seen = {key: state[key] for key in keys_of(operation.kind, operation.args)}
        following = carry_out(state, operation)
        operation.outcome = "refused" if isinstance(following, str) else "ok"
        if operation.outcome == "ok":
            self.versions.append(following)
        if len(self.versions) > 50:
            del self.versions[0]
            self.base += 1

    def answer(self, session):
        operation = session.due[0]
        if operation not in session.pipe:
            operation.end = self.tick()
            session.due.popleft()
            session.floor = self.base + len(self.versions) - 1

    def kill(self, session):
        while session.pipe and (self.random.random() < 0.5 or (self.lossless and session.pipe[-1].submitted)):
            if self.lossless and session.pipe[-1].submitted:
                self.work(session)
            else:
                session.pipe.pop()
        while session.pipe:
            self.work(session)
        for operation in [*session.due, *filter(None, [session.doing])]:
            operation.outcome, operation.seen = "unknown", None
        self.sessions[self.sessions.index(session)] = self.new_session()

    def look_at_all(self) -> None:
        """Or nobody would know of some writes that others depended on, and `check` would call those impossible."""
        for session in self.sessions:
            while session.pipe:
                self.work(session)
        state, mark, began = self.versions[-1], f"s{self.tick()}.{self.tick()}", self.tick()
        self.history.operations.append(
            Operation(mark, "snapshot", tuple(state), began, None, self.tick(), "ok", dict(state))
        )

    def forget_the_unanswered(self) -> History:
        for operation in self.history.operations:
            if operation.is_change and operation.end is None:
                operation.outcome, operation.seen = "unknown", None
        return self.history


def simulate(random: Random, count: int, sessions: int = 3, *, lossless: bool = False) -> History:
    simulation = Simulation(random, sessions, lossless=lossless)
    simulation.run(count)
    simulation.look_at_all()
    return simulation.forget_the_unanswered()


def without_cells(state, operation):
    """`carry_out` for values alone, as if nobody had numbered them."""
    for key, (_, value, _) in (operation.seen or {}).items():
        if state[key] != value:
            return "another value"
    if not operation.is_change:
        return state
    try:
        done = {**state, **CHANGES[operation.kind](state, *operation.args)}
    except Refused:
        return state if operation.outcome == "refused" else "refused"
    return "not refused" if operation.outcome == "refused" else done


def mutate(random: Random, history: History) -> History:
    """The history with one thing changed: it may be wrong now."""
    operations = [replace(each) for each in history.operations]
    one, other = random.choices(operations, k=2)
    cells = [(key, cell) for each in operations if type(each.seen) is dict for key, cell in each.seen.items()]
    what = random.randrange(7)
    if what == 0:
        operations.remove(one)
    elif what == 1 and one.is_change:
        one.outcome, one.seen, one.end = "unknown", None, None
    elif what == 2 and one.is_change and one.end is not None:
        one.outcome, one.seen = "void", "TaskCrashed"
    elif what == 3:
        one.call = min(one.call, other.call)
    elif what == 4 and one.end is not None:
        one.end = max(one.call, one.submitted or 0, other.call)
    elif what == 5 and one.submitted is not None:
        one.submitted = one.call
    elif type(one.seen) is dict:
        for key in one.seen:
            alike = [cell for known, cell in cells if known == key]
            if random.random() < 0.7:
                one.seen = {**one.seen, key: random.choice(alike)}
    deaths = [(one.call, other.call)] if random.random() < 0.2 and one.call < other.call else []
    return History(history.first, operations, deaths)


SEEDS = st.integers(0, 2**32)


@settings(max_examples=150)
@given(SEEDS, st.integers(1, 9), st.booleans())
def test_both_checkers_accept_whatever_a_right_flow_may_do(seed, count, lossless):
    history = simulate(Random(seed), count, lossless=lossless)
    assert check(history, lossless=lossless) == []
    assert search(history, lossless=lossless) is not None
    values = {key: value for key, (_, value, _) in history.first.items()}
    assert search(replace(history, first=values), lossless=lossless, carry_out=without_cells) is not None


@settings(max_examples=400)
@given(SEEDS, st.integers(2, 8), st.integers(1, 2), st.booleans())
def test_both_checkers_agree_on_histories_with_something_changed(seed, count, mutations, lossless):
    random = Random(seed)
    history = simulate(random, count)
    for _ in range(mutations):
        if history.operations:
            history = mutate(random, history)
    faults = check(history, grace=5e-9, lossless=lossless)
    order = search(history, grace=5e-9, lossless=lossless)
    assert bool(faults) == (order is None), faults


# Real processes

CELLS = first_state()
STEPS = 250


def work(name, directory, seed, steps, broken):
    if broken is not None:
        getattr(sabotage, broken)()
    flow = StrictFlow(name)
    session = Session(flow, Path(directory), CELLS)
    random = Random(seed)
    for _ in range(steps):
        session.step(random)
    session.settle()
    session.recorder.close()
    flow.close()


def run_for_real(directory, *, kill_one=False, coordinator_deaths=0, broken=None, broken_in_coordinator=None):
    """Several processes work on one flow; return its history, which ends with a look at everything."""
    context = multiprocessing.get_context("spawn")
    flow = StrictFlow("history", state=CELLS)
    with flow:
        if broken_in_coordinator is not None:
            call_inside(flow, getattr(sabotage, broken_in_coordinator))
        own = Session(flow, directory, CELLS)
        workers = [
            context.Process(target=work, args=(flow.name, str(directory), seed, STEPS, broken)) for seed in range(3)
        ]
        if kill_one:
            workers.append(context.Process(target=work, args=(flow.name, str(directory), 9, 10**9, None)))
        for worker in workers:
            worker.start()
        random = Random(4)
        for _ in range(coordinator_deaths):
            for _ in range(60):
                own.step(random)
            with own.recorder.death():
                os.kill(Place.of(flow.name).resident().pid, signal.SIGKILL)
                flow.stats()
        if kill_one:
            for _ in range(60):
                own.step(random)
            workers[-1].kill()
        for worker in workers:
            worker.join()
        own.settle()
        own.read("snapshot", *CELLS)
        own.recorder.close()
    assert {worker.exitcode for worker in workers} <= {0, -signal.SIGKILL}
    return load(directory, CELLS)


def call_inside(flow, function):
    @read(flow)
    def inside():
        function()

    inside().result()


def test_what_real_processes_do_is_right_though_one_of_them_is_killed(tmp_path):
    history = run_for_real(tmp_path / "history", kill_one=True)
    assert len(history.operations) > 3 * STEPS
    assert check(history) == []


def test_what_real_processes_do_is_right_though_the_coordinator_is_killed(tmp_path):
    history = run_for_real(tmp_path / "history", coordinator_deaths=3)
    assert len(history.deaths) >= 3  # a task that a kill has met tells of it too
    assert check(history) == []


@pytest.mark.proof
@pytest.mark.parametrize(
    ("where", "broken"),
    [("broken", "open_the_gate"), ("broken", "raise_no_flag"), ("broken_in_coordinator", "finish_before_publishing")],
)
def test_a_real_history_under_sabotage_is_found_wrong(tmp_path, where, broken):
    for attempt in range(5):  # it takes luck to be in the way of a fault
        if check(run_for_real(tmp_path / f"history-{attempt}", **{where: broken})):
            return
    pytest.fail(f"nobody has noticed {broken}")
