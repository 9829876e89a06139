"""The history checker: what every process did, on one clock, and whether one order explains all that was seen.

What is promised, and the condition that is checked
    "A read sees every P1 whose submit had returned, in any process, before the read began", and a P1 takes effect
    alone, all or nothing, at one instant between its submit and its answer (docs/protocols/gate.md). A history is right
    if its operations can be put into *one order* in which each, carried out after those ahead of it, sees what it
    saw, and
    1. whatever had ended (a P1: been answered) comes ahead of whatever began later;
    2. a P1 comes ahead of a *gated* read that began after its **submit** had returned, answered or not;
    3. P1 tasks of one process come in the order in which that submitted them;
    4. of an *ungated* read (`peek`), 1 asks no more than that nothing goes back within its process, and that it sees
       no future: it may be old;
    5. a P1 with unknown outcome comes anywhere after its call, or nowhere; one that was refused by its own exception
       comes once and changes nothing; one that crashed, timed out or was cancelled comes nowhere.

    So the submit orders a P1 against gated reads and only these: two P1 tasks of two processes, both submitted and
    neither answered, may come in either order, or else reads would have to know of an order that nobody promised.
    With 1 alone it would be linearizability (of 4: sequential consistency for each process). The operations have
    their instants inside their intervals: an order that extends 1 always leaves room for them.

    When a coordinator died while a P1 was under way, 2 holds for the reads that ended within the grace that its
    process has for coming back, and no longer ("one that has not come back no longer raises the flag").

How `check` needs no search
    Every recorded P1 reads and writes *cells* ``[seq, value, trail]``: how often the cell was written, and by which
    operations lately. So the order of the writes of each cell is known, and who stands where even if nobody answered.
    What is left is a graph: who wrote what whom saw, who overwrote it, and time (1 to 4), which takes one helper node
    for each turn from ends to beginnings instead of an edge for each pair. A circle is a proof that no order exists.
    Without one, the order found is carried out and everything seen is compared: it is itself the proof.
    `search` tries all orders, and is for short histories only; it knows nothing of cells unless *carry_out* does.
"""

from __future__ import annotations

import copy
import json
import os
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any

from strictflow_mp import (
    IntegrityError,
    SerializationError,
    StateFull,
    StrictFlow,
    StrictFlowError,
    TaskCrashed,
    TaskFailed,
    TaskFuture,
    TaskTimeout,
    read,
    write,
)

TRAIL = 8
"""Writers that a cell remembers. More unanswered writes of one cell in a row, unread, could not be told apart."""
KEPT = 6
"""Items that `append` leaves in a list."""
GRACE = 1.0
"""Seconds that a process has for coming back to a new coordinator."""
MOST = 20
"""Faults that are reported."""

Cell = list[Any]
State = dict[str, Any]


class Refused(Exception):
    """A recorded task raises it to undo what it has done; it carries what the task saw."""


# The tasks, as functions of the values that they find


def _transfer(values: State, source: str, target: str, amount: int) -> State:
    if values[source] < amount:
        raise Refused
    return {source: values[source] - amount, target: values[target] + amount}


def _spoil(values: State, *keys: str) -> State:
    raise Refused


CHANGES: dict[str, Callable[..., State]] = {
    "increment": lambda values, key, by: {key: values[key] + by},
    "append": lambda values, key, item: {key: [*values[key], item][-KEPT:]},
    "compare_and_set": lambda values, key, old, new: {key: new} if values[key] == old else {},
    "transfer": _transfer,
    "spoil": _spoil,
}
ALWAYS = {"increment", "append"}
"""The tasks that change something whatever they find."""
GATED = ("read", "snapshot", "in_loop")
UNGATED = ("peek", "snapshot_of_now")


def keys_of(kind: str, args: Iterable[Any]) -> list[str]:
    """The keys that an operation looks at."""
    count = {"transfer": 2, "increment": 1, "append": 1, "compare_and_set": 1}
    return list(args)[: count.get(kind)]


def first_state(numbers: int = 4, lists: int = 1) -> State:
    """Cells for a flow's first state."""
    return {f"n{i}": [0, 100, []] for i in range(numbers)} | {f"l{i}": [0, [], []] for i in range(lists)}


def after(seen: Mapping[str, Cell], mark: str, kind: str, args: Iterable[Any]) -> State:
    """The cells that a task writes, given those that it sees. Raises Refused."""
    changes = CHANGES[kind]({key: value for key, (_, value, _) in seen.items()}, *args)
    return {key: [seen[key][0] + 1, value, [*seen[key][2], mark][-TRAIL:]] for key, value in changes.items()}


# Recording


class Recorder:
    """A file of this process's own, to which events are appended, a line each, unbuffered: a SIGKILL loses none.

    A read is one line, when it has ended. A P1 is three (call, submitted, end), for several may be under way.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.name = f"{os.getpid():x}"
        while True:
            try:
                path = directory / f"{self.name}.history"
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
                break
            except FileExistsError:
                self.name += "x"
        self._last = 0

    def mark(self) -> str:
        """A new operation's name, unique in the history."""
        self._last += 1
        return f"{self.name}.{self._last}"

    def note(self, *event: Any) -> None:
        """Append an event."""
        os.write(self._file, json.dumps(event, separators=(",", ":")).encode() + b"\n")

    @contextmanager
    def death(self) -> Iterator[None]:
        """A coordinator dies in this block, and when it ends the flow is served again."""
        began = time.monotonic_ns()
        yield
        self.note("death", began, time.monotonic_ns())

    def close(self) -> None:
        os.close(self._file)


class Session:
    """One thread's operations on a flow whose first state is `first_state(...)`, carried out and recorded.

    Args:
        ahead: P1 tasks that it submits before it waits for the first of them.
        timeout: seconds that it waits for an answer.
    """

    def __init__(self, flow: StrictFlow, directory: Path, cells: State, *, ahead: int = 4, timeout: float = 60) -> None:
        self.recorder = Recorder(directory)
        self._flow = flow
        self._ahead = ahead
        self._timeout = timeout
        self._numbers = [key for key, (_, value, _) in cells.items() if type(value) is int]
        self._lists = [key for key in cells if key not in self._numbers]
        self._known = {key: value for key, (_, value, _) in cells.items()}
        self._pending: deque[tuple[str, TaskFuture[Any]]] = deque()

        @write(flow)
        def change(mark: str, kind: str, *args: Any) -> State:
            seen = {key: copy.deepcopy(flow.state[key]) for key in keys_of(kind, args)}
            for key in seen:  # in place, and undone if the task is refused
                flow.state[key][0] += 1
                flow.state[key][2].append(mark)
            try:
                done = after(seen, mark, kind, args)
            except Refused:
                raise Refused(seen) from None
            for key in seen:
                flow.state[key][:] = done.get(key, seen[key])
            return seen

        @read(flow)
        def look(*keys: str) -> State:
            return {key: flow.state[key] for key in keys}

        self._change = change
        self._look = look

    def change(self, kind: str, *args: Any) -> None:
        """Submit a P1; take the oldest answers if too many are due."""
        mark = self.recorder.mark()
        self.recorder.note("call", mark, kind, args, time.monotonic_ns())
        future = self._change(mark, kind, *args)
        self.recorder.note("submitted", mark, time.monotonic_ns())
        self._pending.append((mark, future))
        self.settle(self._ahead)

    def settle(self, left: int = 0) -> None:
        """Wait for answers until no more than that many are due.

        Raises:
            StrictFlowError, TimeoutError: there is none; whether the task ran is unknown.
        """
        while len(self._pending) > left:
            mark, future = self._pending.popleft()
            try:
                outcome, seen = "ok", future.result(self._timeout)
            except Refused as refused:
                outcome, seen = "refused", refused.args[0]
            except Exception as error:
                if not has_no_effect(error):
                    raise
                outcome, seen = "void", type(error).__name__
            self.recorder.note("end", mark, time.monotonic_ns(), outcome, seen)

    def read(self, way: str, *keys: str) -> State:
        """Read in one of the `GATED` or `UNGATED` ways. "read" and "peek" take one key."""
        began = time.monotonic_ns()
        if way in ("snapshot", "snapshot_of_now"):
            with self._flow.snapshot(gated=way in GATED) as snapshot:
                seen = {key: snapshot[key] for key in keys}
        elif way == "in_loop":
            try:
                seen = self._look(*keys).result(self._timeout)
            except TaskCrashed:
                return {}  # it ran when the coordinator was killed, and says nothing
        else:
            [key] = keys
            seen = {key: self._flow.peek(key) if way == "peek" else self._flow.state[key]}
        ended = time.monotonic_ns()
        self.recorder.note("read", self.recorder.mark(), way, keys, began, ended, seen)
        self._known |= {key: cell[1] for key, cell in seen.items()}
        return seen

    def step(self, random: Random) -> None:
        """Do something."""
        some = [*random.sample(self._numbers, 2), random.choice(self._lists)]
        doings: list[tuple[int, Callable[[], object]]] = [
            (6, lambda: self.change("increment", some[0], random.randint(-9, 9))),
            (4, lambda: self.change("append", some[2], random.randint(0, 99))),
            (6, lambda: self.change("transfer", *some[:2], random.randint(0, 90))),
            (4, lambda: self.change("compare_and_set", some[0], self._known[some[0]], random.randint(0, 150))),
            (2, lambda: self.change("spoil", *some)),
            (8, lambda: self.read("read", some[0])),
            (6, lambda: self.read("snapshot", *some)),
            (2, lambda: self.read("in_loop", *some)),
            (4, lambda: self.read("peek", some[0])),
            (2, lambda: self.read("snapshot_of_now", *some)),
        ]
        weights, actions = zip(*doings, strict=True)
        random.choices(actions, weights)[0]()


def has_no_effect(error: BaseException) -> bool:
    """Whether what a future raised says that the task changed nothing: its own exception, or one of ours."""
    ours = (TaskCrashed, TaskTimeout, TaskFailed, IntegrityError, StateFull, SerializationError, CancelledError)
    late = type(error).__name__ == "TimeoutError"  # until Python 3.11 there were two of that name
    return isinstance(error, ours) or not (late or isinstance(error, StrictFlowError))


# Histories


@dataclass(slots=True, eq=False)
class Operation:
    """An operation. Times are of the machine-wide monotonic clock, in ns."""

    mark: str
    kind: str
    args: tuple[Any, ...]
    call: int
    submitted: int | None = None
    """When its submit had returned (P1)."""
    end: int | None = None
    """None: it never ended."""
    outcome: str = "unknown"
    """"ok", "refused" (by its own exception), "void" (by an exception that saw nothing) or "unknown"."""
    seen: Any = None
    """The cells that it saw, by key."""

    @property
    def session(self) -> str:
        return self.mark.rpartition(".")[0]

    @property
    def is_change(self) -> bool:
        return self.kind in CHANGES

    @property
    def is_gated(self) -> bool:
        return self.kind in GATED

    def __str__(self) -> str:
        return f"{self.mark} {self.kind}({', '.join(map(str, self.args))})"


@dataclass
class History:
    """What was recorded, and the state before."""

    first: State
    operations: list[Operation]
    deaths: list[tuple[int, int]] = field(default_factory=list)
    """From when to when a coordinator's death and the start of the next lie in."""

    def __repr__(self) -> str:
        return f"<History of {len(self.operations)} operations, {len(self.deaths)} deaths>"


def load(directory: Path, first: State) -> History:
    """What the recorders wrote into a directory."""
    history = History(first, [])
    for path in sorted(directory.glob("*.history")):
        found: dict[str, Operation] = {}
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # killed while it wrote
            event, *fields = json.loads(line)
            if event == "death":
                history.deaths.append((fields[0], fields[1]))
            elif event == "call":
                mark, kind, args, call = fields
                found[mark] = Operation(mark, kind, tuple(args), call)
            elif event == "submitted":
                found[fields[0]].submitted = fields[1]
            elif event == "end":
                operation = found[fields[0]]
                _, operation.end, operation.outcome, operation.seen = fields
                if operation.seen in ("TaskCrashed", "TaskTimeout"):
                    history.deaths.append((operation.call, operation.end))
            else:
                mark, kind, args, call, end, seen = fields
                found[mark] = Operation(mark, kind, tuple(args), call, None, end, "ok", seen)
        history.operations += found.values()
    return history


class _Deaths:
    """By when a gated read must have ended for a P1 that was under way while a coordinator died."""

    def __init__(self, history: History, grace: float) -> None:
        self._grace = int(grace * 1e9)
        self._deaths = sorted(history.deaths)
        self._over = list(accumulate((end for _, end in self._deaths), max))

    def deadline(self, change: Operation) -> int | None:
        """None: no coordinator died meanwhile."""
        index = bisect_left(self._over, change.call)
        if index == len(self._deaths):
            return None
        began = self._deaths[index][0]
        return None if change.end is not None and change.end < began else began + self._grace


def _takes_part(operation: Operation) -> bool:
    return operation.outcome in ("ok", "refused")


def _must_have_run(operation: Operation, lossless: bool) -> bool:
    return lossless and operation.outcome == "unknown" and operation.submitted is not None and operation.kind in ALWAYS


def carry_out(state: State, operation: Operation) -> State | str:
    """The state after an operation; or what contradicts what the operation saw."""
    for key, cell in (operation.seen or {}).items():
        if state.get(key) != cell:
            return f"it saw {key} = {cell}, where {state.get(key)} was"
    if not operation.is_change:
        return state
    try:
        seen = {key: state[key] for key in keys_of(operation.kind, operation.args)}
        done = after(seen, operation.mark, operation.kind, operation.args)
    except Refused:
        return "it cannot have had an effect" if operation.outcome != "refused" else state
    return "it was refused without reason" if operation.outcome == "refused" else {**state, **done}


# All orders


def search(
    history: History,
    *,
    grace: float = GRACE,
    lossless: bool = False,
    carry_out: Callable[[State, Operation], State | str] = carry_out,
) -> list[Operation] | None:
    """An order that explains a short history; None if there is none.

    The search of Wing and Gong, "Testing and Verifying Concurrent Objects" (1993), with the memory of Lowe, "Testing
    for Linearizability" (2017): what has been done, and the state that it led to, is tried once.
    """
    deaths = _Deaths(history, grace)
    operations = [
        each for each in history.operations if _takes_part(each) or (each.is_change and each.outcome != "void")
    ]
    count = len(operations)
    perhaps = sum(
        1 << i for i, each in enumerate(operations) if each.outcome == "unknown" and not _must_have_run(each, lossless)
    )
    ahead = [sum(1 << i for i in range(count) if _precedes(operations[i], each, deaths)) for each in operations]
    tried: set[tuple[int, int, str]] = set()

    def extend(done: int, state: State) -> list[Operation] | None:
        """*done*: those that are in the order, and those that can no longer be."""
        if (done | perhaps) == (1 << count) - 1:
            return []
        if (done, repr(sorted(state.items()))) in tried:
            return None
        tried.add((done, repr(sorted(state.items()))))
        for i, operation in enumerate(operations):
            missing = ahead[i] & ~done
            if done >> i & 1 or missing & ~perhaps:
                continue
            following = carry_out(state, operation)
            if not isinstance(following, str):
                rest = extend(done | missing | 1 << i, following)
                if rest is not None:
                    return [operation, *rest]
        return None

    return extend(0, history.first)


def _precedes(one: Operation, other: Operation, deaths: _Deaths) -> bool:
    """Whether *one*, if it happened, must come ahead of *other*: 1 to 4, for one pair."""
    if one.end is not None and one.end < other.call:
        return other.kind not in UNGATED or one.session == other.session
    if not one.is_change:
        return False
    if other.is_change:
        return one.session == other.session and one.call < other.call
    if not other.is_gated or one.submitted is None or one.submitted >= other.call:
        return False
    deadline = deaths.deadline(one)
    return deadline is None or other.end <= deadline


# The fast way


def check(history: History, *, grace: float = GRACE, lossless: bool = False) -> list[str]:
    """What is wrong with a history; nothing, if an order explains it. Time and memory are near linear.

    Known limit: let a gated snapshot of all cells end the history. An unanswered write that nobody saw counts as not
    done; if an unanswered transfer of which only the target was seen needed it, that is a false alarm ("wrong").

    Each fault is "kind: text". The kinds: *torn* (no cell, or a mixture of versions), *lost* (two wrote the same
    version of a cell), *twice*, *failed* (the effect of what had none), *unexplained* (nobody wrote it), *stale*,
    *future*, *back*, *order* (of P1 tasks), *wrong* (another value than the order gives).

    Args:
        grace: seconds that a process had for coming back after a coordinator's death.
        lossless: no coordinator died, so a P1 that was submitted must have run, whatever became of its process.
    """
    places = _Places(history)
    if places.faults:
        return places.faults[:MOST]
    graph = _Graph(history, places, _Deaths(history, grace), lossless)
    order = graph.order()
    if order is None:
        return [graph.circle()]
    faults = []
    state = dict(history.first)
    for operation in order:
        following = carry_out(state, operation)
        if isinstance(following, str):
            faults.append(f"wrong: {operation}: {following}")
        else:
            state = following
    return faults[:MOST]


class _Places:
    """Which version of which cells each P1 wrote, by what everybody saw; and what of that cannot be."""

    def __init__(self, history: History) -> None:
        self.faults: list[str] = []
        self.operations = {operation.mark: operation for operation in history.operations}
        self.of: dict[str, dict[str, int]] = defaultdict(dict)
        """By mark and key, the version."""
        self.writers: dict[str, dict[int, str]] = {key: {} for key in history.first}
        """By key and version, the mark."""
        self._trails: set[tuple[str, int, str]] = set()
        for operation in filter(_takes_part, history.operations):
            if not self._are_cells(operation):
                self.faults.append(f"torn: {operation} saw {operation.seen!s:.300}")
                continue
            for key, (version, _, trail) in operation.seen.items():
                if trail and (key, version, trail[-1]) not in self._trails:
                    self._trails.add((key, version, trail[-1]))
                    for back, mark in enumerate(reversed(trail)):
                        self._claim(key, version - back, mark)
            if operation.is_change and operation.outcome == "ok":
                for key in self._changed_by(operation):
                    self._claim(key, operation.seen[key][0] + 1, operation.mark)
        self._look_for_strangers()
        for key, writers in self.writers.items():
            for version in range(1, max(writers, default=0) + 1):
                if version not in writers:
                    self.faults.append(f"unexplained: {key}@{version}: nobody says who wrote it")

    def _are_cells(self, operation: Operation) -> bool:
        seen = operation.seen
        return (
            type(seen) is dict
            and list(seen) == keys_of(operation.kind, operation.args)
            and all(
                key in self.writers
                and type(cell) is list
                and [*map(type, cell)] in ([int, int, list], [int, list, list])
                and len(cell[2]) == min(cell[0], TRAIL)
                for key, cell in seen.items()
            )
        )

    @staticmethod
    def _changed_by(operation: Operation) -> State:
        try:
            return after(operation.seen, operation.mark, operation.kind, operation.args)
        except Refused:
            return {}

    def _claim(self, key: str, version: int, mark: str) -> None:
        former = self.writers[key].setdefault(version, mark)
        if former != mark:
            self.faults.append(f"lost: {key}@{version} was written by {former} and by {mark}")
        place = self.of[mark].setdefault(key, version)
        if place != version:
            self.faults.append(f"twice: {self.operations.get(mark, mark)} wrote {key}@{place} and {key}@{version}")

    def _look_for_strangers(self) -> None:
        for mark, places in self.of.items():
            operation = self.operations.get(mark)
            wrote = ", ".join(f"{key}@{version}" for key, version in places.items())
            if operation is None or not operation.is_change:
                self.faults.append(f"unexplained: {wrote} was written by {mark}, which did not")
            elif operation.outcome == "unknown":
                if not set(places) <= set(keys_of(operation.kind, operation.args)):
                    self.faults.append(f"unexplained: {operation} wrote {wrote}")
            elif operation.outcome != "ok":
                self.faults.append(
                    f"failed: {operation} ended {operation.outcome} ({operation.seen}), and wrote {wrote}"
                )
            elif not set(places) <= set(self._changed_by(operation)):
                self.faults.append(f"unexplained: {operation} saw {operation.seen}, and wrote {wrote}")


TIME = "ended before the next began"
SUBMIT = "its submit had returned before the next began"
SESSION = "ended earlier in the same process"
PROGRAM = "was submitted earlier by the same process"


class _Graph:
    """Who comes ahead of whom. The nodes are operations, then helpers that stand for a moment in time."""

    def __init__(self, history: History, places: _Places, deaths: _Deaths, lossless: bool) -> None:
        self._places = places
        self._nodes: list[Operation | str] = [
            each
            for each in history.operations
            if _takes_part(each) or each.mark in places.of or _must_have_run(each, lossless)
        ]
        self._next: list[list[int]] = [[] for _ in self._nodes]
        numbered: list[tuple[int, Any]] = list(enumerate(self._nodes))
        self._order_by_data(numbered)
        ended = [(each.end, node) for node, each in numbered if each.end is not None]
        self._order_by_time(ended, [(each.call, node) for node, each in numbered if each.kind not in UNGATED], TIME)
        self._order_by_submit([pair for pair in numbered if pair[1].is_change], numbered, deaths)
        sessions = defaultdict(list)
        for node, each in numbered:
            sessions[each.session].append((node, each))
        for mine in sessions.values():
            changes = sorted((each.call, node) for node, each in mine if each.is_change)
            for (_, one), (_, other) in pairwise(changes):
                self._next[one].append(self._helper(PROGRAM, other))
            if peeks := [(each.call, node) for node, each in mine if each.kind in UNGATED]:
                self._order_by_time([(each.end, node) for node, each in mine if each.end is not None], peeks, SESSION)

    def _helper(self, reason: str, *following: int) -> int:
        self._nodes.append(reason)
        self._next.append([*following])
        return len(self._nodes) - 1

    def _order_by_data(self, numbered: list[tuple[int, Any]]) -> None:
        """Who wrote a version comes ahead of who saw it, and those ahead of who wrote the next."""
        of, writers = self._places.of, self._places.writers
        node_of = {each.mark: node for node, each in numbered}
        last = {key: max(found, default=0) for key, found in writers.items()}
        # Those that wrote, and whose version nobody saw: behind everybody who saw another.
        behind: dict[str, list[int]] = defaultdict(list)
        for node, each in numbered:
            if each.outcome == "unknown":
                for key in keys_of(each.kind, each.args):
                    if key not in of[each.mark]:
                        behind[key].append(node)
        for key, found in writers.items():
            for version in range(1, last[key] + 1):
                following = [node_of[found[version + 1]]] if version < last[key] else behind[key]
                self._next[node_of[found[version]]] += following
        for node, each in numbered:
            for key, (version, _, _) in (each.seen or {}).items():
                if key in of[each.mark]:
                    continue  # it wrote the next version itself
                if version:
                    self._next[node_of[writers[key][version]]].append(node)
                self._next[node] += [node_of[writers[key][version + 1]]] if version < last[key] else behind[key]

    def _order_by_time(self, ends: list[tuple[int, int]], begins: list[tuple[int, int]], reason: str) -> None:
        """Each whose end is earlier than a beginning comes ahead of that one."""
        events = sorted([(at, 1, node) for at, node in ends] + [(at, 0, node) for at, node in begins])
        helper = -1
        fresh = False
        for _, is_end, node in events:
            if is_end:
                if not fresh:
                    following = self._helper(reason)
                    if helper >= 0:
                        self._next[helper].append(following)
                    helper, fresh = following, True
                self._next[node].append(helper)
            elif helper >= 0:
                self._next[helper].append(node)
                fresh = False

    def _order_by_submit(
        self, changes: list[tuple[int, Any]], numbered: list[tuple[int, Any]], deaths: _Deaths
    ) -> None:
        reads = sorted((each.call, node, each.end) for node, each in numbered if each.is_gated)
        by_deadline = defaultdict(list)
        for node, each in changes:
            if each.submitted is not None:
                by_deadline[deaths.deadline(each)].append((each.submitted, node))
        for deadline, submits in by_deadline.items():
            if deadline is None:
                bound = reads
            else:
                first = bisect_right(reads, (min(submits)[0], len(self._nodes), 0))
                some = reads[first : bisect_left(reads, (deadline, 0, 0))]
                bound = [each for each in some if each[2] <= deadline]
            self._order_by_time(submits, [(call, node) for call, node, _ in bound], SUBMIT)

    def order(self) -> list[Operation] | None:
        """The operations in an order that respects all this; None if there is a circle."""
        self._due = [0] * len(self._nodes)
        for following in self._next:
            for node in following:
                self._due[node] += 1
        ready = deque(node for node, due in enumerate(self._due) if not due)
        order = []
        while ready:
            node = ready.popleft()
            order.append(self._nodes[node])
            for other in self._next[node]:
                self._due[other] -= 1
                if not self._due[other]:
                    ready.append(other)
        return [each for each in order if isinstance(each, Operation)] if len(order) == len(self._nodes) else None

    def circle(self) -> str:
        """A short circle, in words. Call it when there is no order."""
        before = {other: node for node, due in enumerate(self._due) if due for other in self._next[node]}
        node = next(node for node, due in enumerate(self._due) if due)
        passed = set()
        while node not in passed:
            passed.add(node)
            node = before[node]
        some = [each for each in self._shortest(node) if isinstance(self._nodes[each], Operation)]
        circle = [self._nodes[each] for each in min((self._shortest(each) for each in some), key=len)]
        reasons = {each for each in circle if isinstance(each, str)}
        overtaken = False
        text = []
        for position, each in enumerate(circle):
            if isinstance(each, str):
                if circle[position - 1] != each:
                    text.append(each)
                continue
            text.append(str(each))
            following = circle[(position + 1) % len(circle)]
            if isinstance(following, Operation):
                why, overtakes = self._why(each, following)
                text.append(why)
                overtaken |= overtakes
        text.append(str(circle[0]))
        if not reasons:
            kind = "torn"
        elif SESSION in reasons:
            kind = "back"
        elif PROGRAM in reasons:
            kind = "order"
        else:
            kind = "stale" if overtaken else "future"
        return f"{kind}: " + " -> ".join(text)

    def _shortest(self, start: int) -> list[int]:
        """The shortest way from a node back to it, among those that are in no order."""
        came: dict[int, int] = {}
        ways = deque([start])
        while ways:
            node = ways.popleft()
            for other in self._next[node]:
                if self._due[other] and other not in came:
                    came[other] = node
                    if other == start:
                        way = [node]
                        while way[-1] != start:
                            way.append(came[way[-1]])
                        return way[::-1]
                    ways.append(other)
        raise AssertionError("no circle leads here")

    def _why(self, one: Operation, other: Operation) -> tuple[str, bool]:
        """Why one is ahead of another, and whether that is because the other overwrote what it saw."""
        mine, its = self._places.of[one.mark], self._places.of[other.mark]
        for key, version in mine.items():
            if key in (other.seen or {}) and other.seen[key][0] == version:
                return f"wrote {key}@{version}, which was seen by", False
            if its.get(key) == version + 1:
                return f"wrote {key}@{version}, and the next was written by", False
        for key, (version, _, _) in (one.seen or {}).items():
            if its.get(key) == version + 1:
                return f"saw {key}@{version}, and the next was written by", True
        return "saw or wrote what was not yet written by", True
