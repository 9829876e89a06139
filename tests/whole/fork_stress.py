"""Forks without end: by Python, by C, in tasks, beside threads and before an exec; and kills of all but the owner.

    python tests/whole/fork_stress.py --seconds 600 --seed 1 --pause 1

The owner and two forkers fork as fast as children end. One forker has threads that use the flow all the while. The
other has none, and has C fork too: beside threads that may leave the child a lock of Python's own. Every child uses the
flow at once, so that it meets whatever it has inherited, and some with threads of their own. Of the children many are
killed. With `--pause` a helper of the owner's kills the coordinator, after so many seconds on the average, and the
owner kills a forker now and then, whose children go on without it.

Each *life* (a thread of a process, from its first use on) numbers its P1 tasks. A task counts itself in the ledger of
its life, in the state; what a life is told of its tasks it appends to the record, a file of which SIGKILL leaves whole
lines. What must not be:

- *hung*: a child, or a forker, had not ended after `--patience` seconds, or an answer had not come. The stacks of what
  hangs are on standard error.
- *stale*: a read missed a task that its process, or its parent before the fork, had submitted before, and that ran;
  or the total was one that had been exceeded. By design it was not if the parent had not come back to the coordinator
  when 1 s had passed since a death (docs/protocols/takeover.md); such reads are counted as "excused".
- *torn*: a snapshot contradicts itself, or one that was open across forks, writes and deaths has changed.
- *lost*, *twice*, *undead*, *vanished*: a task was acknowledged, and has no effect; it took effect twice; it did though
  its life was told that it had failed or crashed; it did not, though later ones of its life did, and no death explains
  it.
- *failed*: a child ended in another way than it should have; its traceback is on standard error.
- *left*: a slot, a pin, a process, a shared object or a file when everybody has gone.
- *restarted*: the coordinator has died, and nobody had killed it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import faulthandler
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torture import IN_COORDINATOR, IN_WORKER, VARIABLE, Watch, leftovers, wait_for, was_away

from strictflow_mp import FlowNotRunning, StrictFlow, StrictFlowError, TaskCrashed, read, write
from strictflow_mp.memory.segment import W_RESTARTS
from strictflow_mp.store.pins import Pins
from strictflow_mp.system.place import Place

NAME = "fork-stress"
RECORD = "FORK_STRESS_RECORD"
ROUNDS = 5
"""Turns of each life of a child."""
MOST = 3
"""Children of one forker at a time."""
MAX_WORKERS = 60
FORKERS = {
    "threads": ["python", "multiprocessing", "task", "child of a child", "exec", "with threads"],
    "alone": ["c", "python", "child of a child of C", "exec", "exec by C", "task", "with threads", "with threads by C"],
}
OWNERS = ["python", "child of a child", "with threads"]
KILLED = 0.3
"""Of the children."""
THREADS = 2
PAUSE = 0.002
FAILING = 11
"""Each such task writes like the others, then raises."""
HELD = 1000
"""Tasks for which a snapshot is held at most: the memory of the last hundred or so rests before it is reused."""
ENOUGH = 10
"""Violations after which a forker ends."""
SHOWN = 10
"""Violations of a kind."""
AT_ONCE = 3
"""Coordinators killed in a row while they start; the owner gives up after ten."""
FORKER_PAUSES = 8
"""Times the pause: the mean seconds between deaths of forkers."""


class Violation(Exception):
    """What must not be."""


# What everybody notes


def note(kind: str, **fields: Any) -> None:
    """One line of the record, in one write."""
    line = json.dumps({"kind": kind, "pid": os.getpid(), "at": time.monotonic(), **fields})
    descriptor = os.open(os.environ[RECORD], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def report(violation: str) -> None:
    note("violation", text=violation)


def report_error(error: BaseException) -> None:
    tell("".join(traceback.format_exception(error)))
    report(str(error) if isinstance(error, Violation) else f"failed: {type(error).__name__}: {error}")


def tell(text: str) -> None:
    """Past `sys.stderr`: another thread may have held its lock at a fork."""
    os.write(2, f"pid {os.getpid()}: {text}\n".encode())


def fork(by_c: bool) -> int:
    if not by_c:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            return os.fork()
    # As `fork_in_c` of tests/edges/test_forks.py says: no other thread may have asked for the GIL.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    time.sleep(2 * interval)
    try:
        return int(ctypes.PyDLL(None).fork())
    finally:
        sys.setswitchinterval(interval)


def do(function: Callable[[], object], patience: float) -> None:
    """Call a function in a child, and note how it went."""
    note("began")
    signal.alarm(int(2 * patience) + 1)  # for those that no forker looks after any more; outlives an exec
    try:
        function()
    except BaseException as error:
        report_error(error)
        raise
    note("ended")


def in_child(function: Callable[[], object], patience: float) -> None:
    """Call a function in a forked child, and end it."""
    code = 1
    try:
        do(function, patience)
        code = 0
    finally:
        os._exit(code)


# What a task writes


def add_of(flow: StrictFlow, sabotage: str) -> Any:
    @write(flow)
    def add(life, number):
        state = flow.state
        if sabotage:
            import torture

            torture.IN_COORDINATOR[sabotage]()
        entry = state.get(("ledger", life), {"last": 0, "count": 0, "skipped": [], "twice": []})
        if number <= entry["last"]:
            entry["twice"].append(number)
        else:
            entry["skipped"] += [each for each in range(entry["last"] + 1, number) if each % FAILING]
            entry["last"] = number
        entry["count"] += 1
        state["ledger", life] = entry
        state["total"] += 1
        state["text"] = text_of(state["total"])
        if number % FAILING == 0:
            raise ZeroDivisionError(number)
        return [number, state["total"]]

    return add


def text_of(total: int) -> str:
    """Of many lengths, and sometimes long, so that what is freed is soon something else."""
    return f"{total};" * (1 + total * 37 % 500 * (40 if total % 7 == 0 else 1))


def check(snapshot: Any) -> None:
    try:
        total, text = snapshot["total"], snapshot["text"]
    except (KeyError, StrictFlowError) as error:
        raise Violation(f"torn: {error!r}") from error
    if text != text_of(total):
        raise Violation(f"torn: {total} and {text!r:.60}")


# A life

SUBMITTED: dict[str, tuple[int, int, int]] = {}
"""By life: the number of the last task whose submit has returned, its process, and the restarts that that knew of. Of
all lives of this process, and of its parents' before they forked."""


class Life:
    """One thread's use of the flow."""

    def __init__(self, flow: StrictFlow, options: argparse.Namespace) -> None:
        self.flow, self.options, self.patience = flow, options, options.patience
        self.add = add_of(flow, options.sabotage if options.sabotage in IN_COORDINATOR else "")
        self.name = f"{os.getpid()} {threading.get_ident()} {time.monotonic_ns()}"
        self.random = random.Random(f"{options.seed} {self.name}")
        self.last = self.seen = 0
        self.due: list[tuple[int, Any]] = []
        self.held: Any = None
        self.until = 0

    def run(self, turns: int) -> None:
        self.begin()
        for _ in range(turns):
            self.put()
            self.turn()
        self.end()

    def begin(self) -> None:
        try:
            self.read()
        except FlowNotRunning:
            if not self.options.pause:
                raise
            # By design after 5 s without a coordinator; on a busy machine several in a row may die before one serves.
            self.flow._client.attach(60.0)
            self.read()

    def turn(self) -> None:
        self.write(self.random.choice((1, 1, 2, 4)))
        for chosen in self.random.sample([self.read, self.look, self.hold, self.settle], 3):
            chosen()
        self.settle()

    def end(self) -> None:
        self.settle()
        self.let_go()
        self.flow.delete(("own", self.name)).exception(self.patience)

    def _restarts(self) -> int:
        attachment = self.flow._client.attach()
        return int(attachment.restarts)

    # Writing

    def put(self) -> None:
        number = self.random.random()
        future = self.flow.put(("own", self.name), number)
        if self.flow.state.get(("own", self.name)) != number and not isinstance(self.answer(future), TaskCrashed):
            raise Violation("stale: an own put")

    def write(self, count: int) -> None:
        first = self.last + 1
        self.last += count  # whatever happens, no number is given out twice
        restarts = self._restarts()
        futures = self.flow.submit(self.add, [((self.name, number), {}) for number in range(first, first + count)])
        SUBMITTED[self.name] = (self.last, os.getpid(), restarts)
        self.due += enumerate(futures, first)

    def settle(self) -> None:
        due, self.due = self.due, []
        for number, future in due:
            error = self.answer(future)
            outcome = "done"
            if isinstance(error, TaskCrashed):
                outcome = "crashed"
            elif isinstance(error, ZeroDivisionError) and number % FAILING == 0:
                outcome = "failed"
            elif error is not None:
                raise Violation(f"failed: task {number} of {self.name}: {type(error).__name__}: {error}")
            note("told", life=self.name, number=number, outcome=outcome)
            if error is None:
                answered, total = future.result()
                if answered != number or not self.seen < total <= self.flow.state["total"]:
                    raise Violation(f"stale: {answered} for {number}; {total} after {self.seen}")
                self.seen = total

    def answer(self, future: Any) -> BaseException | None:
        try:
            error: BaseException | None = future.exception(self.patience)
            return error
        except concurrent.futures.TimeoutError:
            raise Violation(f"hung: {future!r}") from None

    # Reading

    def expected(self) -> list[dict[str, Any]]:
        """What has been submitted up to now: to be called before a read begins."""
        restarts = self.flow._client.attach().segment.words[W_RESTARTS]
        lives = self.random.sample(found := list(SUBMITTED.items()), min(4, len(found)))
        return [
            {"life": life, "number": number, "own": pid == os.getpid(), "back": back, "restarts": restarts}
            for life, (number, pid, back) in lives
        ]

    def compare(self, expected: dict[str, Any], entry: Any) -> None:
        last = entry["last"] if entry is not None else 0
        missed = [number for number in range(last + 1, expected["number"] + 1) if number % FAILING]
        if missed:
            note("missed", **expected, missed=missed)

    def read(self) -> None:
        for each in self.expected():
            self.compare(each, self.flow.state.get(("ledger", each["life"])))
        if (total := self.flow.state["total"]) < self.seen:
            raise Violation(f"stale: {total} after {self.seen}")

    def look(self) -> None:
        expected = self.expected()
        with self.flow.snapshot() as snapshot:
            check(snapshot)
            for each in expected:
                self.compare(each, snapshot.get(("ledger", each["life"])))

    def hold(self) -> None:
        """Keep a snapshot while much is written, and maybe over several coordinators."""
        if self.held is None:
            self.held = self.flow.snapshot()
            self.until = self.held["total"] + self.random.randrange(HELD)  # it is taken now; the text is read later
        elif self.flow.state["total"] > self.until:
            self.let_go()

    def let_go(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            with held:
                check(held)


def use(flow: StrictFlow, options: argparse.Namespace) -> None:
    """Use the flow as a process that has just been forked."""
    Life(flow, options).run(ROUNDS)


def use_by_threads(flow: StrictFlow, options: argparse.Namespace) -> None:
    """Use it with several threads from the first moment on."""
    failures: list[BaseException] = []

    def use_it() -> None:
        try:
            use(flow, options)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use_it) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    use_it()
    for thread in threads:
        thread.join()
    for error in failures:
        raise error


def use_in_both(flow: StrictFlow, options: argparse.Namespace, by_c: bool) -> None:
    """Fork once more, and use the flow in both."""
    pid = fork(by_c)
    if pid == 0:
        in_child(lambda: use(flow, options), options.patience)
    use(flow, options)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise Violation(f"failed: a child's child, {code}")


def program(options: argparse.Namespace, *more: str) -> list[str]:
    names = ("seconds", "seed", "patience", "pause", "sabotage")
    given = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    return [sys.executable, "-W", "error", os.path.abspath(__file__), *given, *more]


def replace(options: argparse.Namespace) -> None:
    note("ended")  # as that program; the next one begins anew
    os.execv(sys.executable, program(options, "--role", "program"))


# Who forks


class Child:
    """One child, and how it is to end."""

    def __init__(self, kind: str, pid: int, poll: Callable[[], int | None], dies: float | None) -> None:
        self.kind, self.pid, self.poll = kind, pid, poll
        self.began = time.monotonic()
        self.dies = None if dies is None else self.began + dies
        self.is_killed = False


class Forker:
    """Forks, kills, and notes what it has seen."""

    def __init__(self, flow: StrictFlow, kinds: list[str], options: argparse.Namespace) -> None:
        self.flow, self.kinds, self.options, self.patience = flow, kinds, options, options.patience
        self.dice = random.Random(options.seed)
        self.children: list[Child] = []
        self.ended: set[str] = set()
        self.life = Life(flow, options)
        self._turns: list[str] = []
        self._forks_in_task, self._reaps = self._in_tasks()

    def step(self) -> None:
        """Fork once more if there is room, and look after those that are there."""
        if len(self.children) < MOST:
            if not self._turns:
                self._turns = self.dice.sample(self.kinds, len(self.kinds))
            self.life.settle()
            if self.dice.random() < 0.5:
                self.life.hold()
            self.life.write(1)  # what the child has to see, though nobody has waited for it
            if (child := self._begin(self._turns.pop())) is not None:
                self.children.append(child)
        self.look()

    def look(self) -> None:
        now = time.monotonic()
        for child in list(self.children):
            if child.dies is not None and now >= child.dies:
                child.dies, child.is_killed = None, True
                note("killing", whom=child.pid)
                with suppress(ProcessLookupError):  # multiprocessing reaps those that have ended, at each start
                    os.kill(child.pid, self.dice.choice([signal.SIGKILL, signal.SIGTERM]))
            code = child.poll()
            if code is not None:
                self.children.remove(child)
                self._judge(child, code)
            elif now - child.began > self.patience:
                self.children.remove(child)
                report(f"hung: {child.kind}, pid {child.pid}")
                end_hung(child.pid)
        time.sleep(PAUSE)

    def _judge(self, child: Child, code: int) -> None:
        self.ended.add(child.kind)
        is_killed = child.is_killed and code in (-signal.SIGKILL, -signal.SIGTERM)
        note("child", of=child.kind, is_killed=is_killed)
        if code and not is_killed:
            report(f"failed: {child.kind}, pid {child.pid}, {code}")

    def run(self, seconds: float, meanwhile: Callable[[], object] = bool) -> None:
        ends = time.monotonic() + seconds
        failures = 0
        while (time.monotonic() < ends or self.ended < set(self.kinds)) and failures < ENOUGH:
            failures += self._fails(lambda: (self.step(), meanwhile()))
        while self.children and failures < 2 * ENOUGH:
            failures += self._fails(self.look)
        self._fails(self.life.end)

    def _fails(self, function: Callable[[], object]) -> bool:
        try:
            function()
        except Exception as error:
            report_error(error)
            return True
        return False

    def _begin(self, kind: str) -> Child | None:
        dies = self.dice.random() * 0.2 if self.dice.random() < KILLED else None
        flow, options = self.flow, self.options
        if kind == "task":
            return self._begin_in_task(dies)
        if kind == "multiprocessing":
            uses: Callable[[], object] = lambda: use(flow, options)  # noqa: E731
            process = multiprocessing.get_context("fork").Process(target=do, args=(uses, self.patience))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            assert process.pid is not None
            return Child(kind, process.pid, lambda: process.exitcode, dies)
        by_c = kind.endswith(("c", "C"))
        uses = lambda: use(flow, options)  # noqa: E731
        if kind.startswith("exec"):
            uses = lambda: (use(flow, options), replace(options))  # noqa: E731
        elif kind.startswith("child"):
            uses = lambda: use_in_both(flow, options, by_c)  # noqa: E731
        elif kind.startswith("with"):
            uses = lambda: use_by_threads(flow, options)  # noqa: E731
        pid = fork(by_c and kind != "exec")
        if pid == 0:
            in_child(uses, self.patience)
        return Child(kind, pid, lambda: poll(pid), dies)

    def _begin_in_task(self, dies: float | None) -> Child | None:
        future = self._forks_in_task()
        if isinstance(self.life.answer(future), TaskCrashed):
            return None  # whatever it has forked goes on without anybody who looks after it
        pid, coordinator = future.result()
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return None  # the coordinator has died too, or it would be a zombie still

        def look() -> int | None:
            """Its parent tells how it has ended; when that has gone, nobody knows, but for what it has noted itself."""
            future = self._reaps(pid, coordinator)
            if not isinstance(self.life.answer(future), TaskCrashed):
                code = future.result()
                if code != "not mine":
                    if code is not None:
                        os.close(descriptor)
                    return code
            if not select.select([descriptor], [], [], 0)[0]:
                return None
            os.close(descriptor)
            return 0

        return Child("task", pid, look, dies)

    def _in_tasks(self) -> tuple[Any, Any]:
        flow, options = self.flow, self.options

        @read(flow)
        def forks_in_task():
            import os

            if flow.state["total"] % 5 == 0:  # this one comes back from the task, and is ended there
                pid = os.fork()
                if pid == 0:
                    raise SystemExit  # without a word; else it would say so
                os.waitpid(pid, 0)
            pid = os.fork()
            if pid == 0:
                in_child(lambda: use(flow, options), options.patience)
            return [pid, os.getpid()]

        @read(flow)
        def reaps(pid, coordinator):
            import os

            return poll(pid) if os.getpid() == coordinator else "not mine"

        return forks_in_task, reaps


def poll(pid: int) -> int | None:
    """The exit code of a child that has ended."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def end_hung(pid: int) -> None:
    """Kill a process that hangs, when it has said where."""
    tell(f"{pid} hangs")
    for number in (signal.SIGUSR1, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        time.sleep(1)


def run_forker(kind: str, options: argparse.Namespace) -> None:
    """In a process of its own: fork until the time is over."""
    flow = StrictFlow(NAME)
    forker = Forker(flow, FORKERS[kind], options)
    forker.life.begin()
    over = threading.Event()

    def go_on() -> None:
        try:
            life = Life(flow, options)
            while not over.is_set():
                life.put()
                life.turn()
            life.end()
        except BaseException as error:
            report_error(error)

    threads = [threading.Thread(target=go_on) for _ in range(THREADS if kind == "threads" else 0)]
    for thread in threads:
        thread.start()
    try:
        forker.run(options.seconds)
    finally:
        over.set()
        for thread in threads:
            thread.join()


class Forkers:
    """The processes that fork; one is killed now and then, and started again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dice = random.Random(f"{options.seed} forkers")
        self.ends = time.monotonic() + options.seconds
        self.count = 0
        self.deaths = 0
        self.processes = {kind: self._start(kind) for kind in FORKERS}
        self._plan()

    def _start(self, kind: str) -> subprocess.Popen[str]:
        self.count += 1
        left = argparse.Namespace(**vars(self.options))
        left.seed = self.options.seed * 1000 + self.count
        left.seconds = max(0.0, self.ends - time.monotonic())
        return subprocess.Popen(program(left, "--role", kind), text=True)

    def _plan(self) -> None:
        self.next_death = float("inf")
        if self.options.pause:
            self.next_death = time.monotonic() + self.dice.expovariate(1 / (FORKER_PAUSES * self.options.pause))

    def look(self) -> None:
        if self.next_death < min(time.monotonic(), self.ends):
            kind = self.dice.choice(list(self.processes))
            if self.processes[kind].poll() is None:
                self.processes[kind].kill()
                self.processes[kind].wait()
                self.deaths += 1
                self.processes[kind] = self._start(kind)
            self._plan()

    def finish(self) -> None:
        for kind, process in self.processes.items():
            try:
                code = process.wait(3 * self.options.patience)
                if code:
                    report(f"failed: forker {kind!r}, {code}")
            except subprocess.TimeoutExpired:
                report(f"hung: forker {kind!r}")
                end_hung(process.pid)
                process.wait()


# Who kills the coordinator


class Killer:
    """The owner's helper, until its standard input ends."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(f"{options.seed} killer")
        self.flow = StrictFlow(NAME)
        self.place = Place.of(NAME)
        self.words = self.flow._client.attach(60.0).segment.words
        self.pid = 0

    def run(self) -> None:
        while not select.select([sys.stdin], [], [], self.random.expovariate(1 / self.options.pause))[0]:
            self.kill()
            for _ in range(AT_ONCE):
                if self.random.random() > 0.2:
                    break
                wait_for(self._is_another, 5, 0.001)
                time.sleep(self.random.uniform(0, 0.06))
                self.kill()
            # The killed one is proved dead, so this is answered by another.
            self.flow.put("probe", self.pid).result(self.options.patience)
        self.flow.close()

    def kill(self) -> None:
        """Kill who is at home, if it lives."""
        resident = self.place.resident()
        assert resident is not None
        self.pid = resident.pid
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(resident.pid)
            try:
                if not resident.identity.is_dead():
                    note("kill", restarts=self.words[W_RESTARTS])
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    select.select([descriptor], [], [], 5)
            finally:
                os.close(descriptor)

    def _is_another(self) -> bool:
        resident = self.place.resident()
        return resident is not None and resident.pid != self.pid


# Judgement


class Judge:
    """Compares what was noted with what is in the state at the end."""

    def __init__(self, state: dict[Any, Any], record: list[dict[str, Any]]) -> None:
        self.state = state
        self.of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in record:
            self.of[line["kind"]].append(line)
        self.count: Counter[str] = Counter()
        self.ledgers = {key[1]: value for key, value in state.items() if key[0] == "ledger"}

    def has_run(self, life: str, number: int) -> bool:
        entry = self.ledgers.get(life)
        return bool(
            entry is not None and number <= entry["last"] and number % FAILING and number not in entry["skipped"]
        )

    def violations(self) -> Iterator[str]:
        yield from (line["text"] for line in self.of["violation"])
        yield from self._of_ledgers()
        yield from self._of_reads()
        yield from self._of_ends()

    def _of_ledgers(self) -> Iterator[str]:
        crashed = set()
        for line in self.of["told"]:
            life, number, outcome = line["life"], line["number"], line["outcome"]
            self.count[outcome] += 1
            has_run = self.has_run(life, number)
            if outcome == "done" and not has_run:
                yield f"lost: task {number} of {life} was acknowledged"
            if outcome != "done" and has_run:
                yield f"undead: task {number} of {life} {outcome}, and took effect"
            if outcome == "crashed":
                crashed.add((life, number))
        for life, entry in self.ledgers.items():
            if entry["twice"]:
                yield f"twice: {entry['twice']} of {life}"
            ran = entry["last"] - entry["last"] // FAILING - len(entry["skipped"])
            if not entry["twice"] and entry["count"] != ran:
                yield f"torn: ledger of {life}: {entry}"
            crashed |= {(life, number) for number in entry["skipped"]}
            self.count["applied"] += entry["count"]
        self.count["crashed"] = len(crashed)
        if len(crashed) > len(self.of["kill"]):
            yield f"vanished: {len(crashed)} tasks in {len(self.of['kill'])} deaths: {sorted(crashed)[:20]}"
        if self.state["total"] != self.count["applied"]:
            yield f"lost or twice: the total is {self.state['total']}, the ledgers say {self.count['applied']}"

    def _of_reads(self) -> Iterator[str]:
        kills = [(kill["restarts"], kill["at"]) for kill in self.of["kill"]]
        for missed in self.of["missed"]:
            late = [number for number in missed["missed"] if self.has_run(missed["life"], number)]
            if late and was_away(missed, kills):
                self.count["excused"] += 1
            elif late:
                yield f"stale: {missed} misses {late}"

    def _of_ends(self) -> Iterator[str]:
        """Also of those whose parent was killed; pids may come again."""
        left = Counter(line["pid"] for line in self.of["began"])
        left.subtract(line["pid"] for line in self.of["ended"])
        left.subtract(line["whom"] for line in self.of["killing"])
        for pid in +left:
            yield f"hung: pid {pid} has begun, and neither ended nor been killed"


def at_the_end(flow: StrictFlow, patience: float, kills: int) -> list[str]:
    """What is wrong when everybody else has gone."""
    violations = []
    deadline = time.monotonic() + 3 * patience
    stats = flow.stats()
    while (len(stats.workers) > 1 or stats.bytes_pinned) and time.monotonic() < deadline:
        time.sleep(PAUSE)
        flow.put("probe", 0).result()  # a commit finds out what is no longer pinned
        stats = flow.stats()
    if len(stats.workers) > 1 or stats.bytes_pinned:
        violations.append(f"left: {stats.workers}, {stats.bytes_pinned} bytes pinned")
    if stats.restarts > kills:
        violations.append(f"restarted: {stats.restarts} times after {kills} kills")
    return violations


# Sabotage, to see that the checks can fail


def store_no_pin() -> None:
    def store(self: Pins, kept: Any) -> bool:
        return True

    Pins._store = store  # type: ignore[method-assign]


IN_PROCESSES = {**IN_WORKER, "store_no_pin": store_no_pin}


# The whole


def stress(options: argparse.Namespace) -> int:
    """Run it all, and say what was seen."""
    watch = Watch(Path(os.environ[VARIABLE]))
    flow = StrictFlow(NAME, state={"total": 0, "text": text_of(0)}, max_workers=MAX_WORKERS)
    with flow:
        resident = Place.of(NAME).resident()
        assert resident is not None
        killer = None
        if options.pause:
            killer = subprocess.Popen(program(options, "--role", "killer"), stdin=subprocess.PIPE)
        forkers = Forkers(options)
        forker = Forker(flow, OWNERS, options)
        forker.run(options.seconds, forkers.look)
        forkers.finish()
        if killer is not None:
            with suppress(subprocess.TimeoutExpired):
                killer.communicate(timeout=3 * options.patience)
            if killer.poll() != 0:
                report(f"failed: the killer, {killer.returncode}")
                end_hung(killer.pid)
        kills = sum('"kind": "kill"' in line for line in Path(os.environ[RECORD]).read_text().splitlines())
        violations = at_the_end(flow, options.patience, kills)
        restarts = flow.stats().restarts
        with flow.snapshot() as snapshot:
            state = dict(snapshot)
    left = wait_for(lambda: not leftovers(watch, resident.token), 10, 0.05) or leftovers(watch, resident.token)
    violations += [f"left: {each}" for each in ([] if left is True else left)]

    judge = Judge(state, [json.loads(line) for line in Path(os.environ[RECORD]).read_text().splitlines()])
    violations = [*judge.violations(), *violations]
    ended = Counter(line["of"] for line in judge.of["child"])
    killed = sum(line["is_killed"] for line in judge.of["child"])
    print(f"children: {ended.total()}, killed: {killed}, forkers killed: {forkers.deaths}")
    print(f"deaths of the coordinator: {kills} ({restarts} takeovers)")
    print(
        f"tasks: {judge.count['applied']} applied, {judge.count['done']} acknowledged, {judge.count['failed']} failed, "
        f"{judge.count['crashed']} crashed; reads that missed one: {len(judge.of['missed'])}, "
        f"excused {judge.count['excused']}"
    )
    for kind, count in sorted(ended.items()):
        print(f"  {kind}: {count}")
    shown: Counter[str] = Counter()
    for text in violations:
        shown[of := text.partition(":")[0]] += 1
        if shown[of] <= SHOWN:
            print(f"  {text:.600}")
    print(f"broken: {len(violations)}" if violations else "nothing is wrong")
    return 1 if violations else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="forks without end; does any child hang, or read what is old?")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that a child may take")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="mean seconds between deaths of the coordinator; 0: none"
    )
    parser.add_argument("--sabotage", choices=["", *IN_COORDINATOR, *IN_PROCESSES], default="")
    parser.add_argument("--role", choices=[*FORKERS, "program", "killer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)
    if options.sabotage in IN_PROCESSES:
        IN_PROCESSES[options.sabotage]()
    if options.role == "program":
        do(lambda: use(StrictFlow(NAME), options), options.patience)
    elif options.role == "killer":
        Killer(options).run()
    elif options.role:
        run_forker(options.role, options)
    else:
        runtime = None
        if VARIABLE not in os.environ:
            runtime = os.environ[VARIABLE] = tempfile.mkdtemp(prefix="sf-", dir="/tmp")
        try:
            with tempfile.NamedTemporaryFile() as record:
                os.environ[RECORD] = record.name
                return stress(options)
        finally:
            if runtime is not None:
                shutil.rmtree(runtime, ignore_errors=True)
    return 0


if __name__ == "__main__":
    import fork_stress as importable  # so that other processes find its functions by name

    sys.exit(importable.main())
