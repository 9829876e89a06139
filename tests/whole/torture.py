"""Torture: workers and coordinator are killed at random moments, again and again, and everything is checked.

    python tests/whole/torture.py --coordinator-deaths 1000 --worker-deaths 5000 --seed 1

Each life of a worker is an *incarnation*, and numbers its P1 tasks. A task writes a pair of keys, and counts itself
in the ledger of its incarnation, which says up to which number its tasks ran, which were left out, and which ran
twice. What a worker is told it appends to a file; what it has submitted it says on a board, in shared memory that
the flow knows nothing of. So at the end, and at every read, the following can be told, and must not be:

- *lost*: a task was acknowledged, and has no effect.
- *twice*: a task took effect twice, or behind a later one of its worker; acknowledged or not.
- *undead*: a task took effect that failed, or that its worker was told had crashed.
- *vanished*: a task has no effect, though later ones of its worker have, and no coordinator's death explains it.
- *stale*: a gated read missed a task whose submit had returned before, in any process, and that ran later.
- *torn*: a value contradicts itself, a pair differs, or a snapshot holds what its ledgers do not know.
- *back*: a process saw a version older than one that it had seen.
- *wrong*: an answer is another task's, or an error that nobody may see here.
- *unresolved*: a future had no answer though a coordinator had been serving for `--patience` seconds.
- *barred*: a process can no longer call a task, since a coordinator was killed while it loaded its function.
- *left*: a process, a shared object or a file is left at the end.

A read that misses a task is judged at the end: it was stale if the task has run after all. By design it was not if
the task's process had not come back to the coordinator when 1 s had passed; such reads are counted as "excused".
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import logging
import mmap
import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

from leaks import VARIABLE, Watch, wait_for

from strictflow_mp import StrictFlow, TaskCrashed, read, setup_logging, write
from strictflow_mp.coordinator.answers import Answers
from strictflow_mp.coordinator.runner import Runner
from strictflow_mp.coordinator.transaction import Transaction
from strictflow_mp.memory.gate import Gate
from strictflow_mp.memory.segment import W_RESTARTS
from strictflow_mp.memory.suspect import Marker
from strictflow_mp.store import Receipts
from strictflow_mp.system.place import Place

WORKERS = 4
MOST = 64
GRACE = 1.0
"""Seconds after a coordinator's death within which nobody may miss what a process that is away has submitted."""
FAILING = 13
"""Each such task writes like the others, then raises."""
HUGE = 97
LOW = (1 << 32) - 1
AT_ONCE = 3
"""Coordinators killed in a row while they start; the owner gives up after ten."""
ENOUGH = 30
"""Violations after which the run ends."""


class Violation(Exception):
    """What must not be."""


class Board:
    """Words in a file that all processes map, each with one writer; and files to which all append."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "board"
        if not path.exists():
            path.write_bytes(bytes(4 * mmap.PAGESIZE))
        with path.open("r+b") as file:
            words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.submitted = words[:MOST]
        """By worker: incarnation << 32 | number of the last task whose submit has returned."""
        self.back = words[MOST : 2 * MOST]
        """By worker: incarnation << 32 | restarts of the coordinator to which it is connected."""
        self.reads = words[2 * MOST : 3 * MOST]
        """By worker: reads checked, by all of its incarnations."""
        self._words = words[3 * MOST : 3 * MOST + 8]

    def __reduce__(self) -> Any:
        return Board, (self.directory,)

    @staticmethod
    def _word(index: int) -> Any:
        def get(self: Board) -> int:
            return int(self._words[index])

        def put(self: Board, value: int) -> None:
            self._words[index] = value

        return property(get, put)

    # Written by the killer of coordinators
    is_over = _word(0)
    serving_since = _word(1)
    """When the last coordinator answered its first P1 (ns); 0 while none is known to serve."""
    coordinator_deaths = _word(2)
    volleys = _word(3)
    """Grows when a worker shall die together with the coordinator."""
    # Written by the killer of workers
    worker_deaths = _word(4)

    def append(self, name: str, *lines: str) -> None:
        """One write: a SIGKILL loses all of it or nothing."""
        descriptor = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, "".join(f"{line}\n" for line in lines).encode())
        finally:
            os.close(descriptor)

    def lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    def report(self, violation: str) -> None:
        self.append("violations", violation.replace("\n", " | "))


def kind_of(violation: str) -> str:
    return violation.partition(":")[0]


# What a task writes


def pair(number: int) -> tuple[str, str]:
    return f"left-{number}", f"right-{number}"


def ledger(worker: int, incarnation: int) -> str:
    return f"ledger-{worker}-{incarnation}"


def make_value(by: list[int], count: int) -> dict[str, Any]:
    number = by[2]
    length = 2000 if number % HUGE == 1 else number * 7 % 60
    return {"by": by, "count": count, "text": f"{by}{count};" * length}


def first_state(keys: int) -> dict[str, Any]:
    return {key: make_value([0, 0, 0], 0) for number in range(keys // 2) for key in pair(number)}


def check_value(key: str, value: Any) -> tuple[list[int], int]:
    try:
        by, count = list(value["by"]), value["count"]
        if value == make_value(by, count):
            return by, count
    except Exception as error:
        raise Violation(f"torn: {key} holds {value!r:.200} ({error!r})") from error
    raise Violation(f"torn: {key} holds {value!r:.200}")


def check_pair(number: int, left: Any, right: Any) -> tuple[list[int], int]:
    mine, other = (check_value(key, value) for key, value in zip(pair(number), (left, right), strict=True))
    if mine != other:
        raise Violation(f"torn: pair {number} holds {mine} and {other}")
    return mine


def answer_of(number: int) -> list[Any]:
    return [number, "!" * (3000 if number % 31 == 0 else number % 5)]


def tasks_of(flow: StrictFlow, sabotage: str) -> tuple[Any, Any]:
    @write(flow)
    def work(worker, incarnation, number, target):
        if sabotage in IN_COORDINATOR:
            IN_COORDINATOR[sabotage]()
        state = flow.state
        key = ledger(worker, incarnation)
        entry = state.get(key, {"last": 0, "count": 0, "skipped": [], "twice": []})
        if number <= entry["last"]:
            entry["twice"].append(number)
        else:
            entry["skipped"] += [left for left in range(entry["last"] + 1, number) if left % FAILING]
            entry["last"] = number
        entry["count"] += 1
        state[key] = entry
        left, right = pair(target)
        state[left] = state[right] = make_value([worker, incarnation, number], state[left]["count"] + 1)
        if number % FAILING == 0:
            raise ZeroDivisionError(number)
        return answer_of(number)

    @read(flow)
    def look(keys):
        return {key: flow.state.get(key) for key in keys}

    return work, look


# A worker


class Worker:
    """One incarnation."""

    def __init__(self, options: argparse.Namespace, board: Board, number: int, incarnation: int) -> None:
        if options.sabotage in IN_WORKER:
            IN_WORKER[options.sabotage]()
        self.board = board
        self.number = number
        self.incarnation = incarnation
        self.patience = options.patience
        self.pairs = options.keys // 2
        self.random = random.Random(f"{options.seed} {number} {incarnation}")
        self.flow = StrictFlow(options.name)
        self.task, self.look = tasks_of(self.flow, options.sabotage)
        self.last = 0
        self.barred: set[str] = set()
        self.version = 0
        self.due: deque[tuple[int, int, Any]] = deque()  # number, when it was submitted, future
        self.held: Any = None
        self.flow._client.attach(60.0)  # on a busy machine several coordinators in a row may die before one serves
        self.come_back()

    def run(self) -> None:
        turns = [self.submit, self.snapshot, self.read, self.settle, self.hold, self.ask]
        try:
            while not self.board.is_over:
                (turn,) = self.random.choices(turns, (40, 30, 15, 12, 2, 2))
                self.guard(turn)
                self.come_back()
                if len(self.due) > 100:
                    self.guard(self.settle)
            self.guard(self.settle)
            self.guard(self.let_go)
            self.board.append("ended", f"{self.number} {self.incarnation} {self.last}")
        finally:
            self.flow.close()

    def guard(self, turn: Callable[[], None]) -> None:
        try:
            turn()
        except Violation as violation:
            self.board.report(f"{violation} (worker {self.number}, incarnation {self.incarnation})")
        except Exception as error:
            self.board.report(f"wrong: {turn.__name__}: {type(error).__name__}: {error}")
            time.sleep(0.1)

    def come_back(self) -> None:
        attachment = self.flow._client._attachment
        if attachment is not None:
            self.board.back[self.number] = self.incarnation << 32 | attachment.restarts

    # Writing

    def is_barred(self, task: str, error: BaseException) -> bool:
        if "died while it loaded it" not in str(error):
            return False
        if task not in self.barred:
            self.barred.add(task)
            self.board.report(f"barred: worker {self.number}.{self.incarnation}: {error}")
        return True

    def submit(self) -> None:
        if "work" in self.barred:
            return
        count = self.random.choice((1, 1, 1, 2, 5, 20))
        first = self.last + 1
        calls = [
            ((self.number, self.incarnation, number, self.random.randrange(self.pairs)), {})
            for number in range(first, first + count)
        ]
        self.last += count  # whatever happens, no number is given out twice
        futures = self.flow.submit(self.task, calls)
        self.board.submitted[self.number] = self.incarnation << 32 | self.last
        now = time.monotonic_ns()
        self.due += [(first + index, now, future) for index, future in enumerate(futures)]

    def settle(self) -> None:
        lines: list[str] = []
        try:
            while self.due:
                number, since, future = self.due.popleft()
                lines.append(f"{self.incarnation} {number} {self.outcome(number, since, future)}")
                if len(lines) == 5:
                    self.board.append(f"told-{self.number}", *lines)
                    lines = []
        finally:
            self.board.append(f"told-{self.number}", *lines)

    def outcome(self, number: int, since: int, future: Any) -> str:
        if (error := self.answer(since, future)) is None:
            if list(future.result()) != answer_of(number):
                self.board.report(f"wrong: task {number} was answered {future.result()!r:.100}")
            return "done"
        if isinstance(error, TaskCrashed):
            return "crashed"
        if isinstance(error, ZeroDivisionError) and error.args == (number,) and number % FAILING == 0:
            return "failed"
        if self.is_barred("work", error):
            return "barred"
        self.board.report(f"wrong: task {number} ended with {type(error).__name__}: {error}")
        return "wrong"

    def answer(self, since: int, future: Any) -> BaseException | None:
        began = time.monotonic()
        while True:
            try:
                error: BaseException | None = future.exception(0.25)
                return error
            except concurrent.futures.TimeoutError:
                serving = self.board.serving_since
                late = serving and time.monotonic_ns() - max(since, serving) > self.patience * 1e9
                if late or time.monotonic() - began > 12 * self.patience:
                    raise Violation(f"unresolved: {future!r}") from None

    # Reading

    def expected(self) -> list[dict[str, Any]]:
        """What has been submitted up to now, by whom: to be called before a read begins."""
        restarts = self.flow._client.attach().segment.words[W_RESTARTS]
        found = []
        for worker in range(MOST):
            submitted, back = self.board.submitted[worker], self.board.back[worker]
            # If not of one incarnation, the former has died this very moment.
            if submitted and submitted >> 32 == back >> 32:
                found.append(
                    {
                        "worker": worker,
                        "incarnation": submitted >> 32,
                        "number": submitted & LOW,
                        "own": worker == self.number,
                        "back": back & LOW,
                        "restarts": restarts,
                    }
                )
        return found

    def compare(self, expected: dict[str, Any], entry: Any) -> None:
        """Note what a read has missed."""
        last = entry["last"] if entry is not None else 0
        if entry is not None and entry["twice"]:
            raise Violation(f"twice: {dict(entry)} of worker {expected['worker']}.{expected['incarnation']}")
        missed = [number for number in range(last + 1, expected["number"] + 1) if number % FAILING]
        if missed:
            self.board.append("missed", json.dumps({**expected, "missed": missed, "at": time.monotonic()}))

    def snapshot(self) -> None:
        expected = self.expected()
        with self.flow.snapshot() as snapshot:
            if snapshot.version < self.version:
                raise Violation(f"back: version {snapshot.version} after {self.version}")
            self.version = snapshot.version
            for each in expected:
                self.compare(each, snapshot.get(ledger(each["worker"], each["incarnation"])))
            self.look_at_pairs(snapshot)

    def look_at_pairs(self, snapshot: Any) -> None:
        for number in self.random.sample(range(self.pairs), 5):
            (worker, incarnation, last), _ = check_pair(number, *(snapshot[key] for key in pair(number)))
            entry = snapshot.get(ledger(worker, incarnation)) if worker else None
            if worker and (entry is None or entry["last"] < last):
                raise Violation(f"torn: pair {number} knows task {last} of {worker}.{incarnation}, its ledger {entry}")
        self.board.reads[self.number] += 1

    def read(self) -> None:
        for each in self.random.sample(expected := self.expected(), len(expected)):
            self.compare(each, self.flow.state.get(ledger(each["worker"], each["incarnation"])))
        self.board.reads[self.number] += 1

    def hold(self) -> None:
        """Keep a snapshot over several turns, and maybe several coordinators."""
        if self.held is None:
            self.held = self.flow.snapshot()
            self.version = max(self.version, self.held.version)
        else:
            self.let_go()

    def let_go(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            with held:
                self.look_at_pairs(held)

    def ask(self) -> None:
        """A P2 in SF-LOOP: one state throughout."""
        if "look" in self.barred:
            return
        expected = self.expected()
        number = self.random.randrange(self.pairs)
        keys = [ledger(each["worker"], each["incarnation"]) for each in expected]
        future = self.look([*pair(number), *keys])
        if (error := self.answer(time.monotonic_ns(), future)) is None:
            found = future.result()
            check_pair(number, *(found[key] for key in pair(number)))
            for each, key in zip(expected, keys, strict=True):
                self.compare(each, found[key])
            self.board.reads[self.number] += 1
        elif isinstance(error, TaskCrashed):
            self.board.append("reads-crashed", str(self.number))
        elif not self.is_barred("look", error):
            raise error


# The killer of workers


def nursery(options: argparse.Namespace, board: Board) -> None:
    """Forks workers and kills them; it is attached to nothing itself, and has no threads."""
    fork = multiprocessing.get_context("fork")
    parent = os.getppid()
    chance = random.Random(f"{options.seed} nursery")
    incarnations = [0] * (options.workers + 1)
    living: dict[int, Any] = {}

    def bear(number: int) -> None:
        incarnations[number] += 1
        living[number] = fork.Process(target=live, args=(options, board, number, incarnations[number]))
        living[number].start()

    for number in range(1, options.workers + 1):
        bear(number)
    each = options.worker_deaths / max(1, options.coordinator_deaths)
    volleys = 0
    while not board.is_over and os.getppid() == parent:
        wait = time.monotonic() + chance.expovariate(1 / options.pause)
        while time.monotonic() < wait and board.volleys == volleys:
            time.sleep(0.002)
        allowed = options.worker_deaths
        if board.coordinator_deaths < options.coordinator_deaths:
            allowed = min(allowed, int(each * (board.coordinator_deaths + 1)))
        if board.volleys == volleys and board.worker_deaths >= allowed:
            continue
        volleys = board.volleys
        number = chance.choice(list(living))
        living[number].kill()
        living[number].join()
        if living[number].exitcode != -signal.SIGKILL:
            if board.is_over:
                break  # it was ending just then
            board.report(f"wrong: worker {number} ended with {living[number].exitcode}")
        board.worker_deaths += 1
        bear(number)
    for number, process in living.items():
        process.join(40)
        if process.exitcode != 0:
            board.report(f"wrong: at the end worker {number} had exit code {process.exitcode}")
            process.kill()
            process.join()


def live(options: argparse.Namespace, board: Board, number: int, incarnation: int) -> None:
    Worker(options, board, number, incarnation).run()


# The killer of coordinators


class Killer:
    """Owns the flow; kills its coordinator, and measures how long it takes until the next one answers."""

    def __init__(self, options: argparse.Namespace, flow: StrictFlow, board: Board) -> None:
        self.options = options
        self.flow = flow
        self.board = board
        self.place = Place.of(flow.name)
        self.random = random.Random(f"{options.seed} killer")
        self.kills: list[tuple[int, float]] = []  # restarts just before, when
        self.recoveries: list[float] = []

        self.pid = 0
        flow.put("probe", 0).result()
        self.words = flow._client.attach().segment.words
        board.serving_since = time.monotonic_ns()

    def kill(self) -> None:
        """Kill who is at home, if it lives."""
        resident = self.place.resident()
        assert resident is not None
        self.pid = resident.pid
        try:
            descriptor = os.pidfd_open(resident.pid)
        except ProcessLookupError:
            return
        try:
            if resident.identity.is_dead():
                return
            self.board.serving_since = 0
            self.kills.append((self.words[W_RESTARTS], time.monotonic()))
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(5000)
            self.board.coordinator_deaths += 1
        finally:
            os.close(descriptor)

    def unknown(self) -> list[str]:
        return [line for line in self.board.lines("violations") if kind_of(line) not in self.options.known]

    def is_another(self) -> bool:
        resident = self.place.resident()
        return resident is not None and resident.pid != self.pid

    def volley(self) -> None:
        if self.random.random() < 0.3:
            self.board.volleys += 1
        self.kill()
        for _ in range(AT_ONCE):
            if self.random.random() > 0.2 or len(self.kills) >= self.options.coordinator_deaths:
                break
            wait_for(self.is_another, 5, 0.001)
            time.sleep(self.random.uniform(0, 0.06))
            self.kill()
        killed = self.kills[-1][1]
        # The killed one is proved dead, so this is answered by another.
        self.flow.put("probe", len(self.kills)).result(60)
        self.recoveries.append(time.monotonic() - killed)
        self.board.serving_since = time.monotonic_ns()

    def run(self) -> None:
        options, board = self.options, self.board
        deadline = time.monotonic() + options.seconds
        while time.monotonic() < deadline and len(self.unknown()) < ENOUGH:
            if len(self.kills) < options.coordinator_deaths:
                time.sleep(self.random.expovariate(1 / options.pause))
                self.volley()
            elif board.worker_deaths < options.worker_deaths:
                time.sleep(0.01)
            else:
                break


# Judgement


def was_away(read: dict[str, Any], kills: Iterable[tuple[int, float]]) -> bool:
    """Whether the process whose task a read has missed had been away for longer than its grace.

    Args:
        kills: of coordinators, in order: the restarts just before, and when.
    """
    if read["own"] or read["back"] == read["restarts"]:
        return False
    died = next((when for restarts, when in kills if restarts >= read["back"]), None)
    return died is not None and read["at"] >= died + GRACE


class Judge:
    """Compares what the workers were told with what is in the state."""

    def __init__(self, state: dict[str, Any], board: Board, kills: list[tuple[int, float]], pairs: int) -> None:
        self.state = state
        self.board = board
        self.kills = kills
        self.pairs = pairs
        self.count: Counter[str] = Counter()
        self.told: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
        for worker in range(MOST):
            for line in board.lines(f"told-{worker}"):
                incarnation, number, outcome = line.split()
                self.told[worker, int(incarnation)][int(number)] = outcome
                self.count[outcome] += 1

    def violations(self) -> Iterator[str]:
        yield from self.of_ledgers()
        yield from self.of_pairs()
        yield from self.of_reads()

    def ledgers(self) -> Iterable[tuple[tuple[int, int], Any]]:
        for key, entry in self.state.items():
            if key.startswith("ledger-"):
                _, worker, incarnation = key.split("-")
                yield (int(worker), int(incarnation)), entry

    def has_run(self, worker: int, incarnation: int, number: int) -> bool:
        entry = self.state.get(ledger(worker, incarnation))
        return entry is not None and 0 < number <= entry["last"] and number % FAILING and number not in entry["skipped"]

    def of_ledgers(self) -> Iterator[str]:
        crashed = set()
        for who, told in self.told.items():
            for number, outcome in told.items():
                has_run = self.has_run(*who, number)
                if outcome == "done" and not has_run:
                    yield f"lost: task {number} of {who} was acknowledged"
                if outcome == "crashed":
                    crashed.add((*who, number))
                if outcome in ("crashed", "failed", "barred") and has_run:
                    yield f"undead: task {number} of {who} {outcome}, and took effect"
        for line in self.board.lines("ended"):
            worker, incarnation, last = map(int, line.split())
            if silent := set(range(1, last + 1)) - self.told[worker, incarnation].keys():
                yield f"unresolved: worker {worker}.{incarnation} was never told of {sorted(silent)}"
        for who, entry in self.ledgers():
            if entry["twice"]:
                yield f"twice: {entry['twice']} of {who}"
            ran = entry["last"] - entry["last"] // FAILING - len(entry["skipped"])
            if not entry["twice"] and entry["count"] != ran:
                yield f"torn: ledger of {who}: {entry}"
            crashed |= {(*who, number) for number in entry["skipped"]}
            self.count["applied"] += entry["count"]
        self.count["crashed"] = len(crashed)
        self.count["crashed reads"] = len(self.board.lines("reads-crashed"))
        if self.count["crashed"] + self.count["crashed reads"] > len(self.kills):
            yield f"vanished: {len(crashed)} tasks were left out in {len(self.kills)} deaths: {sorted(crashed)[:20]}"

    def of_pairs(self) -> Iterator[str]:
        total = 0
        for number in range(self.pairs):
            try:
                by, count = check_pair(number, *(self.state[key] for key in pair(number)))
            except Violation as violation:
                yield f"{violation}, at the end"
                continue
            total += count
            if by[0] and not self.has_run(*by):
                yield f"undead: pair {number} is by task {by}"
        if total != self.count["applied"]:
            yield f"lost or twice: the pairs were written {total} times, the ledgers {self.count['applied']}"

    def of_reads(self) -> Iterator[str]:
        for line in self.board.lines("missed"):
            read = json.loads(line)
            late = [number for number in read["missed"] if self.has_run(read["worker"], read["incarnation"], number)]
            if late and was_away(read, self.kills):
                self.count["excused"] += 1
            elif late:
                yield f"stale: {read} misses {late}"


# Sabotage, to see that the checks can fail


def drop_receipts() -> None:
    Receipts.add = lambda self, receipt: None  # type: ignore[method-assign]
    answer_late()


def keep_the_mark() -> None:
    Marker.clear = lambda self: None  # type: ignore[method-assign]
    answer_late()


def answer_late() -> None:
    """Breaks nothing; but many die between a commit and its answers."""

    def answer_writes(self: Runner, calls: list[Any]) -> None:
        time.sleep(0.02)
        answer(self, calls)

    if not hasattr(Runner, "whole"):
        Runner.whole = answer = Runner._answer_writes
        Runner._answer_writes = answer_writes


def write_half() -> None:
    if not hasattr(Transaction, "whole"):
        Transaction.whole = changes = Transaction.changes
        Transaction.changes = lambda self: {
            key: value for key, value in changes(self).items() if hash(value) % 50 or b"right" not in key
        }


def write_nothing() -> None:
    if not hasattr(Transaction, "whole"):
        Transaction.whole = changes = Transaction.changes
        Transaction.changes = lambda self: {} if random.random() < 0.02 else changes(self)


def lose_answers() -> None:
    def send_some(self: Answers) -> list[bytes]:
        self.seal()
        self._frames = [frame for frame in self._frames if random.random() < 0.5]
        return send(self)

    if not hasattr(Answers, "whole"):
        Answers.whole = send = Answers.send
        Answers.send = send_some


def raise_no_flag() -> None:
    Gate.raise_flag = lambda self, number: None  # type: ignore[method-assign]


IN_COORDINATOR = {
    each.__name__: each for each in (drop_receipts, keep_the_mark, write_half, write_nothing, lose_answers)
}
IN_WORKER = {each.__name__: each for each in (raise_no_flag,)}


# The whole


def torture(options: argparse.Namespace, directory: Path) -> int:
    began = time.monotonic()
    board = Board(directory)
    watch = Watch(Path(os.environ[VARIABLE]))
    flow = StrictFlow(options.name, state=first_state(options.keys))
    with flow:
        token = Place.of(flow.name).resident().token
        killer = Killer(options, flow, board)
        group = flow.spawn(nursery, options, board)
        try:
            killer.run()
        except Exception as error:
            board.report(f"wrong: the killer: {type(error).__name__}: {error}")
        board.is_over = 1
        if not group.join(60):
            board.report("unresolved: the workers did not end")
            end_by_force(group.workers[0].pid)
            group.join(10)
        if group.exitcodes != [0]:
            board.report(f"wrong: the nursery ended with {group.exitcodes}")
        seconds = time.monotonic() - began
        with flow.snapshot() as snapshot:
            judge = Judge(dict(snapshot), board, killer.kills, options.keys // 2)
        violations = [*judge.violations(), *board.lines("violations")]
        restarts = killer.words[W_RESTARTS]
        if restarts > len(killer.kills):
            violations.append(f"wrong: {restarts} takeovers after {len(killer.kills)} deaths")
    left = wait_for(lambda: not leftovers(watch, token), 10, 0.05) or leftovers(watch, token)
    violations += [f"left: {each}" for each in ([] if left is True else left)]

    count = judge.count
    print(f"seed {options.seed}, {seconds:.0f} s, {len(judge.state)} keys, {options.workers} workers at a time")
    print(f"deaths: coordinator {board.coordinator_deaths} ({restarts} takeovers), workers {board.worker_deaths}")
    print(
        f"P1: applied {count['applied']}, acknowledged {count['done']}, failed {count['failed']}, "
        f"crashed {count['crashed']} (+ {count['crashed reads']} P2)"
    )
    print(
        f"reads checked: {sum(board.reads)}; missed a task: {len(board.lines('missed'))}, "
        f"which ran later, its worker being away: {count['excused']}"
    )
    if killer.recoveries:
        times = sorted(1000 * each for each in killer.recoveries)
        at = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        shown = (f"{name} {times[min(len(times) - 1, int(len(times) * share))]:.0f}" for name, share in at.items())
        print(f"recovery, ms, from a kill to the next coordinator's first P1 ({len(times)}): {', '.join(shown)}")
    kinds = Counter(map(kind_of, violations))
    print(f"violations: {dict(kinds) or 0}")
    for violation in violations[:ENOUGH]:
        print(f"  {violation:.400}")
    return 1 if kinds.keys() - set(options.known) else 0


def leftovers(watch: Watch, token: str) -> list[str]:
    shared = [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if token in name]
    return [*map(str, watch.processes()), *map(str, watch.files()), *shared]


def end_by_force(pid: int) -> None:
    """End a process that we started, and its children."""
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            process.kill()
    except psutil.NoSuchProcess:
        pass


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--coordinator-deaths", type=int, default=1000)
    parser.add_argument("--worker-deaths", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--seconds", type=float, default=3600.0, help="end after that time, however many have died")
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--pause", type=float, default=0.1, help="mean seconds between deaths")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds in which a future must be resolved")
    parser.add_argument("--known", action="append", default=[], help="a kind of violation that is shown, no more")
    parser.add_argument("--sabotage", choices=["", *IN_COORDINATOR, *IN_WORKER], default="")
    options = parser.parse_args(arguments)
    options.name = "torture"
    setup_logging(logging.CRITICAL)
    runtime = None
    if VARIABLE not in os.environ:
        runtime = os.environ[VARIABLE] = tempfile.mkdtemp(prefix="sf-", dir="/tmp")
    try:
        with tempfile.TemporaryDirectory() as directory:
            return torture(options, Path(directory))
    finally:
        if runtime is not None:
            shutil.rmtree(runtime, ignore_errors=True)


if __name__ == "__main__":
    import torture as importable  # so that other processes find its functions by name

    sys.exit(importable.main())
