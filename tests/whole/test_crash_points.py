"""The coordinator dies at each of its crash points: what was acknowledged has happened once, nobody waits for ever.

A crash point is a ``sys.audit`` event. `docs/crash-points.md` says what each of them leaves to the next coordinator.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from leaks import SHARED

from strictflow_mp import CoordinatorLost, FlowNotRunning, StrictFlow, StrictFlowError, TaskCrashed, TaskFuture, write
from strictflow_mp.client import comeback
from strictflow_mp.flow import supervisor
from strictflow_mp.memory.segment import FIRST_REACH_SLOTS, W_EPOCH, W_REACH, Segment
from strictflow_mp.store import PinnedVersions, Pins, StoreReader
from strictflow_mp.values.codec import unpack
from strictflow_mp.values.keys import pack_key

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PREFIX = "strictflow_mp."
T = TypeVar("T")
RESOLVED = 60.0
"""Seconds in which a future has to be resolved; so long only for machines that are very busy."""
ROUNDS = 60
"""Rounds of the load in which the coordinator must have died as it was told."""

EVENTS = {
    "loop.received": "coordinator.loop.SFLoop._drain",
    "function.marked": "coordinator.requests.Requests._learn",
    "task.marked": "coordinator.runner.Runner._run_write",
    "burst.ran": "coordinator.runner.Runner.run_burst",
    "commit.built": "store.commit.StoreWriter.commit",
    "commit.linked": "store.commit.StoreWriter.commit",
    "commit.horizon": "store.commit.StoreWriter.commit",
    "commit.recorded": "store.commit.StoreWriter.commit",
    "commit.flipped": "store.commit.StoreWriter.commit",
    "gate.finished": "memory.gatekeeper.GateKeeper.finish",
    "answer.sent": "coordinator.runner.Runner._answer_writes",
    "reclaim.horizon": "store.commit.StoreWriter._reclaim",
    "admit.widened": "memory.gatekeeper.GateKeeper.widen",
    "admit.semaphore": "memory.gatekeeper.GateKeeper.admit",
    "admit.slot": "memory.gatekeeper.GateKeeper.admit",
    "dismiss.slot": "memory.gatekeeper.GateKeeper.dismiss",
    "takeover.begun": "coordinator.takeover.take_over",
    "takeover.recovered": "coordinator.takeover.take_over",
    "takeover.convicted": "coordinator.takeover.take_over",
    "takeover.counted": "coordinator.takeover.take_over",
    "start.leased": "coordinator.main.Coordinator.__init__",
    "start.inscribed": "coordinator.main.Coordinator._take_segment",
    "start.created": "coordinator.main.Coordinator._take_segment",
    "start.listening": "coordinator.main.Coordinator._listen",
    "stop.stopped": "coordinator.main.Coordinator.run",
    "stop.closed": "coordinator.main.Coordinator._remove",
    "stop.unlinked": "coordinator.main.Coordinator._remove",
    "reload.left": "coordinator.main.Coordinator._leave",
    "adopt.stored": "coordinator.reloads.Reloads.adopt",
    "attach.welcomed": "client.client.Client.attach",
    "submit.begun": "client.submitting._dispatch",
    "submit.sent": "client.submitting._dispatch",
    "submit.counted": "client.submitting._dispatch",
    "wait.marked": "memory.gate.Gate._lead",
    "pin.stored": "store.pins.Pins._store",
    "clean.condemned": "memory.leftovers.remove",
    "clean.semaphore": "memory.leftovers.remove",
    "clean.unlinked": "memory.leftovers.remove",
}


def of(*groups: str) -> list[str]:
    return [event for event in EVENTS if event.partition(".")[0] in groups]


AT_WORK = of("loop", "function", "task", "burst", "commit", "gate", "answer", "reclaim", "admit", "dismiss")
AT_WORK.remove("admit.widened")  # it comes with the eighth process only
FIRST_START = [*of("start"), *of("commit")]
NEXT_START = [*of("start", "takeover"), *of("commit"), "gate.finished"]
NEXT_START.remove("start.created")
IN_A_WORKER = of("attach", "submit", "wait", "pin")
IN_A_CLEANER = of("clean")
AT_THE_END = [*of("burst", "commit", "gate", "answer", "stop"), "dismiss.slot"]
UNCOUNTED = ("start.leased", "start.inscribed")
"""Who dies there has not begun to take over."""


# The table


def events_in_the_package() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "strictflow_mp").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "strictflow_mp").with_suffix("").parts)
        yield from events_in(ast.parse(path.read_text()), module)


def events_in(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from events_in(child, f"{where}.{child.name}")
            continue
        match child:
            case ast.Call(func=ast.Name(id="audit") | ast.Attribute(attr="audit"), args=[ast.Constant(value=name)]):
                yield name.removeprefix(PREFIX), where
        yield from events_in(child, where)


def test_every_event_of_the_package_is_in_the_table():
    assert sorted(events_in_the_package()) == sorted(EVENTS.items())
    source = "".join(path.read_text() for path in (ROOT / "strictflow_mp").rglob("*.py"))
    assert len(re.findall(r'"strictflow_mp\.[a-z]+\.[a-z]+"', source)) == len(EVENTS)


def test_the_document_tells_of_every_event_where_it_is():
    text = (ROOT / "docs" / "crash-points.md").read_text()
    assert re.findall(r"^\| `([a-z.]+)` \| `([\w.]+)` \|", text, re.MULTILINE) == list(EVENTS.items())


# Dying

HOOK = """
import os, signal, sys

passed = 0

def die_as_planned(event, arguments, plan=os.environ["CRASH_PLAN"]):
    global passed
    if not event.startswith("strictflow_mp."):
        return
    with open(plan) as file:
        name, number, *rest = file.read().split() or ("", 0)
    if event != "strictflow_mp." + name:
        return
    passed += 1
    if passed < int(number):
        return
    with open(plan + ".next", "w") as file:
        file.write(" ".join(rest))
    os.replace(plan + ".next", plan)
    os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die_as_planned)
"""


class Plan:
    """Where coordinators die, one after the other: at the n-th of those events that come from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.make()

    def make(self, *deaths: tuple[str, int]) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(" ".join(f"{event} {number}" for event, number in deaths))
        new.replace(self._path)

    @property
    def left(self) -> str:
        return self._path.read_text()


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Every interpreter that is started imports the hook, and dies if it comes to the event; we do not."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CRASH_PLAN", str(tmp_path / "plan"))
    monkeypatch.setattr(comeback, "RESTART_SECONDS", RESOLVED)
    return Plan(tmp_path / "plan")


FIRST = {"ids": [], "last": 0, "large": b""}


def new_flow() -> StrictFlow:
    return StrictFlow("mortal", state=FIRST)


# The load

fork = multiprocessing.get_context("fork")


def outcome(future: TaskFuture[Any]) -> Any:
    error = future.exception(RESOLVED)
    if error is None:
        return future.result()
    # A function that could not be loaded says so in an error of its own.
    return TaskCrashed if "died while it loaded it" in str(error) else type(error)


class Load:
    """P1 tasks with a number each, from this process and from others; and reads in between."""

    def __init__(self, flow: StrictFlow) -> None:
        self.flow = flow
        self.numbers = 0
        self.tasks: dict[int, tuple[str, TaskFuture[Any]]] = {}
        self.visitors: dict[int, tuple[str, Any]] = {}
        self.abandoned: set[int] = set()
        """Submitted by a process that died then."""
        self.puts: dict[int, TaskFuture[None]] = {}
        self.reads: list[tuple[set[int], list[int]]] = []
        """What had been submitted, and what a read saw then."""

        @write(flow)
        def note(number):
            flow.state["ids"].append(number)
            return number

        @write(flow)
        def fail(number):
            flow.state["ids"].append(number)
            raise LookupError(number)

        @write(flow)
        def grow(number):
            flow.state["ids"].append(number)
            flow.state["large"] = bytes([number % 256]) * 1_000_000
            return "x" * 100_000

        self.note, self.fail, self.grow = note, fail, grow

    def next(self) -> int:
        self.numbers += 1
        return self.numbers

    def submit(self, task: Any) -> TaskFuture[Any]:
        number = self.next()
        future = task(number)
        self.tasks[number] = (task.name, future)
        return future

    def put(self) -> None:
        number = self.next()
        self.puts[number] = self.flow.update({("put", number): number, "last": number})

    def round(self) -> None:
        for _ in range(3):
            self.submit(self.note)
        self.submit(self.fail)
        self.put()
        self.submit(self.grow)
        self.submit(self.note)
        self.look()
        outcome(self.submit(self.note))
        self.put()
        self.look()

    def look(self) -> None:
        submitted = set(self.tasks)
        self.reads.append((submitted, list(self.flow.state["ids"])))
        assert self.flow.state["last"] == max(self.puts)

    def visit(self, *, dies: bool) -> None:
        """Another process comes, submits, reads, and leaves or dies."""
        numbers = [self.next() for _ in range(3)]
        last = [self.next() for _ in range(2)] if dies else []
        mine, theirs = fork.Pipe()
        visitor = fork.Process(target=self._visit, args=(numbers, last, theirs))
        visitor.start()
        theirs.close()
        self.submit(self.note)
        self.look()
        with mine:
            assert mine.poll(RESOLVED)
            outcomes, read = mine.recv()
        visitor.join()
        assert visitor.exitcode == (-signal.SIGKILL if dies else 0)
        self.visitors |= {number: (f"visitor {numbers[0]}", result) for number, result in outcomes.items()}
        self.abandoned |= set(last)
        self.reads.append((set(numbers), read))

    def _visit(self, numbers: list[int], last: list[int], box: Any) -> None:
        StrictFlow.attach(self.flow.name, timeout=RESOLVED)
        futures = {number: self.note(number) for number in numbers}
        read = list(self.flow.state["ids"])
        box.send(({number: outcome(future) for number, future in futures.items()}, read))
        if last:
            for number in last:
                self.note(number)
            os.kill(os.getpid(), signal.SIGKILL)
        self.flow.close()

    def run(self, plan: Plan) -> None:
        """Until everybody has died as planned, and a little longer."""
        for number in range(ROUNDS):
            if number % 4 == 0:
                self.visit(dies=number % 8 == 0)
            self.round()
            if not plan.left:
                break
        assert not plan.left
        self.round()

    def labels(self) -> list[tuple[int, str]]:
        """Each number with the function that got it; each visitor has a function of its own."""
        return [(number, label) for number, (label, _) in (self.tasks | self.visitors).items()]

    def check(self) -> dict[int, str]:
        """Each task that succeeded has happened once, the others never; return those that crashed, with their task."""
        ids = list(self.flow.state["ids"])
        results = {number: (task, outcome(future)) for number, (task, future) in self.tasks.items()} | self.visitors
        crashed = {number: task for number, (task, result) in results.items() if result is TaskCrashed}
        failed = {number for number, (task, _) in results.items() if task == self.fail.name} - set(crashed)
        done = set(results) - failed - set(crashed)
        for number in done | failed:
            task, result = results[number]
            assert result == {self.fail.name: LookupError, self.grow.name: "x" * 100_000}.get(task, number)
        assert sorted(set(ids) - self.abandoned) == sorted(done)
        assert len(ids) == len(set(ids))
        mine = [number for number in ids if number in self.tasks]
        assert mine == sorted(mine)
        for submitted, read in self.reads:
            assert submitted <= set(read) | failed | set(crashed)
        assert {number: outcome(future) for number, future in self.puts.items()} == dict.fromkeys(self.puts)
        assert {key[1]: value for key, value in self.flow.state.items() if key[0] == "put"} == {
            number: number for number in self.puts
        }
        return crashed


def semaphores(flow: StrictFlow) -> set[int]:
    """The slots that have one."""
    token = flow._client.attach().segment.name
    return {int(path.name.split(".")[2]) for path in SHARED.glob(f"sem.{token}.*")}


@contextmanager
def processes_attached(flow: StrictFlow, count: int) -> Iterator[None]:
    """So many other processes are attached to the flow."""
    pipes = [fork.Pipe() for _ in range(count)]
    visitors = [fork.Process(target=stay, args=(flow.name, theirs)) for _, theirs in pipes]
    for visitor, (_, theirs) in zip(visitors, pipes, strict=True):
        visitor.start()
        theirs.close()
    try:
        for mine, _ in pipes:
            assert mine.poll(RESOLVED)
            mine.recv()
        yield
    finally:
        for mine, _ in pipes:
            mine.send("go")
        for visitor in visitors:
            visitor.join()


def stay(flow: str, box: Any) -> None:
    attached = StrictFlow.attach(flow, timeout=RESOLVED)
    box.send(attached.state["last"])
    box.recv()
    attached.close()


# The tests


@pytest.mark.parametrize("event", AT_WORK)
def test_wherever_the_coordinator_dies_at_work_each_task_takes_effect_once_and_resolves(plan, event, eventually):
    with new_flow() as flow:
        load = Load(flow)
        load.put()
        load.look()
        plan.make((event, 1), (event, 3))
        load.run(plan)
        crashed = load.check()
        if event == "task.marked":
            unknown = load.abandoned - set(flow.state["ids"])
            assert len(crashed) <= 2 <= len(crashed) + len(unknown)
        elif event == "function.marked":
            # Two deaths in a row at the same function give it up; at two functions, neither.
            assert len(set(crashed.values())) <= 1
            assert [*crashed] == [number for number, task in load.labels() if task in crashed.values()]
        else:
            assert not crashed
        assert flow.stats().restarts == 2
        eventually(lambda: semaphores(flow) == {worker.slot for worker in flow.stats().workers})


def test_a_coordinator_that_dies_as_it_has_more_slots_looked_at_leaves_them_looked_at(plan, tmp_path):
    with new_flow() as flow, processes_attached(flow, FIRST_REACH_SLOTS - 2):
        load = Load(flow)
        load.put()
        load.look()
        plan.make(("admit.widened", 1))
        load.visit(dies=False)
        assert not plan.left
        assert flow.stats().restarts == 1
        load.round()
        assert not load.check()
        words = flow._client.attach().segment.words
        assert (words[W_REACH], words[W_EPOCH]) == (2 * FIRST_REACH_SLOTS, 2)


@pytest.mark.parametrize("fails", [True, False])
def test_a_task_that_changed_nothing_is_not_run_again_once_reads_have_passed_it(plan, fails, tmp_path):
    runs = tmp_path / "runs"
    with new_flow() as flow:

        @write(flow)
        def look(path):
            with open(path, "a") as file:
                file.write("x")
            if fails:
                raise LookupError
            return "seen"

        with pytest.raises(LookupError) if fails else nullcontext():
            look(str(runs)).result()
        plan.make(("gate.finished", 1))
        future = look(str(runs))
        assert flow.state["last"] == 0
        assert outcome(future) == (LookupError if fails else "seen")
        assert not plan.left
        assert flow.stats().restarts == 1
        assert runs.read_text() == "xx"


@pytest.mark.parametrize("restart", [True, False])
def test_a_result_that_there_was_no_room_to_keep_is_lost_and_what_its_task_did_is_not(plan, restart):
    with StrictFlow("mortal", state=FIRST, capacity=1 << 20, restart=restart) as flow:

        @write(flow)
        def answer_at_length(length):
            flow.state["last"] = length
            return "x" * length

        assert answer_at_length(3).result() == "xxx"
        plan.make(("commit.flipped", 1))
        future = answer_at_length(3_000_000)
        with pytest.raises(CoordinatorLost, match="was executed and committed, but its result is lost"):
            future.result(RESOLVED)
        assert not plan.left
        if restart:
            assert flow.state["last"] == 3_000_000


@pytest.mark.parametrize("event", NEXT_START)
def test_wherever_the_next_coordinator_dies_in_its_start_the_one_after_it_goes_on(plan, event):
    with new_flow() as flow:
        load = Load(flow)
        load.put()
        load.look()
        plan.make(("task.marked", 2), (event, 1))
        load.run(plan)
        load.visit(dies=False)
        assert len(load.check()) == 1
        assert flow.stats().restarts == (1 if event in UNCOUNTED else 2)


def test_when_one_after_the_other_dies_in_its_start_the_last_goes_on(plan, monkeypatch):
    monkeypatch.setattr(supervisor, "COORDINATOR_PAUSE_SECONDS", 0.0)
    with new_flow() as flow:
        load = Load(flow)
        load.put()
        load.look()
        plan.make(("task.marked", 2), *((event, 1) for event in of("takeover")), ("start.listening", 1))
        load.run(plan)
        assert len(load.check()) == 1
        assert flow.stats().restarts == 1 + len(of("takeover", "start.listening")) + 1


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("event", ["reload.left", "start.leased", "start.inscribed"])
def test_who_dies_while_it_leaves_and_who_dies_before_it_has_taken_over_are_both_followed(plan, event, restart):
    with StrictFlow("mortal", state=FIRST, restart=restart) as flow:
        load = Load(flow)
        load.put()
        load.look()
        plan.make((event, 1))
        load.round()
        assert flow.reload() > 0
        load.round()
        load.visit(dies=False)
        assert not plan.left
        assert len(load.check()) == 0
        assert (flow.stats().restarts, flow.stats().reloads) == (1, 1)


FOUNDER = """
from strictflow_mp import StrictFlow
StrictFlow("mortal", state={"ids": [], "last": 0, "large": b""}).start_loop()
print("serves", flush=True)
input()
"""


@pytest.mark.parametrize("event", ["adopt.stored", "reload.left"])
def test_an_orphan_that_dies_while_it_is_adopted_has_an_heir_all_the_same(plan, event, monkeypatch):
    monkeypatch.setattr(comeback, "RESTART_SECONDS", 1.0)
    command = [sys.executable, "-c", FOUNDER]
    plan.make((event, 1))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owned:
        assert any(line == "serves\n" for line in iter(owned.stdout.readline, ""))
        StrictFlow.attach("mortal").state["last"] = 5
        owned.kill()
    with StrictFlow("mortal") as flow:
        assert not plan.left
        assert flow.state["last"] == 5
        assert flow.stats().restarts == 1


@pytest.mark.parametrize("event", FIRST_START)
def test_wherever_the_first_coordinator_dies_in_its_start_the_next_start_has_the_first_state(plan, event):
    plan.make((event, 1))
    flow = new_flow()
    with pytest.raises(FlowNotRunning, match=r"did not start \(exit code -9\)"):
        flow.start_loop()
    assert not plan.left
    with flow:
        assert flow.state == FIRST
        load = Load(flow)
        load.put()
        load.run(plan)
        assert not load.check()


@contextmanager
def last_commit(flow: StrictFlow) -> Iterator[Callable[[Any], Any]]:
    """A function that reads what was committed last, also when the flow has been removed."""
    attachment = flow._client.attach()
    segment = Segment.open(attachment.segment.name)
    reader = StoreReader(segment, Pins(segment, attachment.slot))

    def read(key: Any) -> Any:
        packed = pack_key(key)
        return unpack(reader.get(reader.route(packed))[2])

    try:
        yield read
    finally:
        segment.close()


@pytest.fixture
def begin_to_stop(eventually) -> Callable[[StrictFlow, Callable[[], T]], tuple[T, threading.Thread]]:
    """Submit and stop, in a thread; the coordinator gets both at once."""

    def begin(flow: StrictFlow, submit: Callable[[], T]) -> tuple[T, threading.Thread]:
        pid, pending = flow.stats().coordinator_pid, flow._client._attachment.pending
        os.kill(pid, signal.SIGSTOP)
        try:
            submitted = submit()
            stop = threading.Thread(target=flow.stop_loop)
            stop.start()
            eventually(lambda: any(not future.is_task for future in list(pending.values())))
        finally:
            os.kill(pid, signal.SIGCONT)
        return submitted, stop

    return begin


@pytest.mark.parametrize("event", AT_THE_END)
def test_wherever_the_coordinator_dies_in_its_stop_nothing_is_left_and_each_future_is_right(
    plan, event, begin_to_stop, monkeypatch
):
    flow = new_flow()
    flow.start_loop()
    load = Load(flow)
    load.put()
    load.round()
    load.visit(dies=False)
    load.check()
    with last_commit(flow) as read:
        plan.make((event, 1))
        futures, stop = begin_to_stop(flow, lambda: {number: load.note(number) for number in range(1000, 1100)})
        stop.join()
        assert not plan.left
        errors = {number: future.exception(RESOLVED) for number, future in futures.items()}
        assert [number for number in errors if number in read("ids")] == [
            number for number, error in errors.items() if error is None
        ]
    for error in errors.values():
        assert error is None or isinstance(error, StrictFlowError)
    assert not flow.is_running


def test_a_stop_goes_on_with_another_coordinator_when_one_dies(plan, begin_to_stop, monkeypatch, eventually):
    flow = new_flow()
    flow.start_loop()
    load = Load(flow)
    load.put()
    load.look()
    monkeypatch.setattr(comeback, "RESTART_SECONDS", 30.0)
    plan.make(("task.marked", 1))
    _, stop = begin_to_stop(flow, lambda: load.note(load.next()))
    try:
        eventually(lambda: not stop.is_alive(), timeout=20)
    finally:
        stop.join()


WORKER = """
import itertools, sys, time
from strictflow_mp import StrictFlow, write

flow = StrictFlow("mortal")

@write(flow)
def note(number):
    time.sleep(0.001)  # longer than a reader looks before it sleeps
    flow.state["ids"].append(number)

for number in itertools.count(int(sys.argv[1])):
    note(number)
    print(number, flush=True)
    with flow.snapshot(gated=False) as snapshot:
        snapshot["last"]
    flow.state["last"]
    if number % 4 == 0:
        flow.close()
"""


@pytest.mark.parametrize("event", IN_A_WORKER)
def test_wherever_a_worker_dies_nobody_waits_for_it_and_nothing_of_it_stays(plan, event, eventually):
    with new_flow() as flow:
        load = Load(flow)
        load.put()
        load.look()
        attachment = flow._client.attach()
        for first, number in ((100_000, 1), (200_000, 3)):
            plan.make((event, number))
            worker = subprocess.run([sys.executable, "-c", WORKER, str(first)], check=False, stdout=subprocess.PIPE)
            assert worker.returncode == -signal.SIGKILL
            assert not plan.left
            load.abandoned |= set(range(first, first + 100))
            load.round()
            submitted = [*map(int, worker.stdout.split())]
            ran = [number for number in flow.state["ids"] if number >= first]
            # The last frame may be in the pipe though its submit has not returned.
            assert ran in (submitted, [*submitted, first + len(submitted)])
            assert submitted or event in ("attach.welcomed", "submit.begun", "submit.sent", "submit.counted")
            eventually(attachment.gate.is_open)
            eventually(lambda: semaphores(flow) == {attachment.slot})
            assert PinnedVersions(attachment.segment).oldest is None
        assert not load.check()
        assert flow.stats().restarts == 0


OWNER = """
import os, signal
from strictflow_mp import StrictFlow

flow = StrictFlow("mortal", state={"a": 1})
flow.start_loop()
flow.put("a", 2).result()
coordinator = flow.stats().coordinator_pid
os.kill(coordinator, signal.SIGSTOP)
os.waitid(os.P_PID, coordinator, os.WSTOPPED | os.WNOWAIT)
print(coordinator, flush=True)
signal.pause()
"""


def leave_a_dead_flow() -> None:
    """Owner and coordinator are killed, and neither has seen the other's end."""
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        coordinator = psutil.Process(int(owner.stdout.readline()))
        coordinator.suspend()  # or it may see that its owner is gone, and have begun to remove all when it is killed
        owner.kill()
    coordinator.kill()
    coordinator.wait(RESOLVED)


CLEAN = [sys.executable, "-m", "strictflow_mp", "clean"]


@pytest.mark.parametrize("event", IN_A_CLEANER)
def test_wherever_a_cleaner_dies_the_next_one_removes_the_rest(plan, event, runtime_dir):
    for _ in range(2):
        leave_a_dead_flow()
        plan.make((event, 1))
        assert subprocess.run(CLEAN, check=False, stdout=subprocess.PIPE).returncode == -signal.SIGKILL
        assert not plan.left
        assert subprocess.run(CLEAN, check=False, stdout=subprocess.PIPE).returncode == 0
        assert [*runtime_dir.rglob("lock")] == []
    with new_flow() as flow:
        assert flow.state == FIRST


@pytest.mark.parametrize("event", IN_A_CLEANER)
def test_wherever_a_start_that_discards_dies_the_next_one_has_nothing_of_the_former(plan, event):
    leave_a_dead_flow()
    flow = new_flow()
    plan.make((event, 1))
    with pytest.raises(FlowNotRunning, match=r"exit code -9"):
        flow.start_loop(recover=False)
    assert not plan.left
    flow.start_loop(recover=False)
    try:
        assert flow.state == FIRST
    finally:
        flow.stop_loop()
