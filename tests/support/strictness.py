"""The strictness checker: writers and readers of one flow, each in a process of its own.

Every P1 task changes all of `KEYS` together. A value says in several places how many tasks of each writer it
knows of (its marks), so a reader finds out

- that it is *torn*: it contradicts itself, is another key's, or cannot be decoded;
- that a snapshot is *mixed*: its values have different marks;
- that a read is *stale*: a submit that it does not know of had returned, anywhere, before it began;
- that time went *back*: a read knows less than the one before it.

When a submit has returned, its writer says so on a notice board: shared memory that the flow knows nothing of.
"""

from __future__ import annotations

import itertools
import json
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from strictflow_mp import StrictFlow, read, write

WRITERS = 2
READERS = 3
KEYS = [f"key-{number}" for number in range(6)]
UNACKNOWLEDGED = 8
"""Tasks that a writer submits before it waits for one."""
AHEAD = 20
"""Tasks that the writers of a steady stream have submitted and that have not begun."""


class Fault(Exception):
    """What a reader or writer has found."""


class Board:
    """Words in a file of *directory* that all processes map, each with one writer, and a list of faults."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        path = directory / "board"
        if not path.exists():
            path.write_bytes(bytes(mmap.PAGESIZE))
        with open(path, "r+b") as file:
            words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.returned = words[:WRITERS]
        """Tasks whose submit has returned, by writer."""
        self.read = words[8 : 8 + READERS]
        """Reads done, by reader."""
        self.started = words[16:17]
        """Tasks of `write_without_pause` that have begun; the coordinator's."""
        self._over = words[17:18]

    @property
    def is_over(self) -> bool:
        return bool(self._over[0])

    def end(self) -> None:
        """Everybody may stop. (Many may write this word: it only ever becomes 1.)"""
        self._over[0] = 1

    def report(self, who: str, fault: Exception) -> None:
        (self.directory / f"fault-{who}").write_text(f"{who}: {fault}")
        self.end()

    def faults(self) -> list[str]:
        return [path.read_text() for path in sorted(self.directory.glob("fault-*"))]

    def keep(self, who: str, numbers: list[float]) -> None:
        (self.directory / f"kept-{who}").write_text(json.dumps(numbers))

    def kept(self) -> list[list[float]]:
        return [json.loads(path.read_text()) for path in sorted(self.directory.glob("kept-*"))]

    def __reduce__(self) -> Any:
        return Board, (self.directory,)


# Values


def make_value(key: str, marks: list[int]) -> dict[str, Any]:
    stamp = f"{key}:{marks};"
    return {"key": key, "marks": marks, "text": stamp * (1 + sum(marks) * 7 % 60), "again": list(marks)}


def first_state() -> dict[str, Any]:
    return {key: make_value(key, [0] * WRITERS) for key in KEYS}


def marks_of(key: str, value: Any) -> list[int]:
    try:
        if value == make_value(key, value["marks"]):
            return list(value["marks"])
    except Exception as error:
        raise Fault(f"torn: {key} holds {value!r:.200} ({error!r})") from error
    raise Fault(f"torn: {key} holds {value!r:.200}")


def common_marks(values: dict[str, Any]) -> list[int]:
    marks = {key: marks_of(key, values[key]) for key in KEYS}
    if any(other != marks[KEYS[0]] for other in marks.values()):
        raise Fault(f"mixed: {marks}")
    return marks[KEYS[0]]


# Roles


def write_until_over(number: int, flow: StrictFlow, board: Board, sabotage: Callable[[], None] | None) -> None:
    """Submit tasks; say so on the board when the submit has returned."""
    if sabotage:
        sabotage()
    writer = number - 1

    @write(flow)
    def advance(count: int) -> None:
        marks = common_marks(flow.state)
        if marks[writer] != count - 1:
            raise Fault(f"writer {writer} comes to its task {count} and finds {marks}")
        marks[writer] = count
        for key in KEYS:
            flow.state[key].update(make_value(key, marks))

    try:
        for count in itertools.count(1):
            if board.is_over:
                break
            future = advance(count)
            board.returned[writer] = count
            if count % UNACKNOWLEDGED == 0:
                future.result()
        future.exception()
    except Exception as error:
        board.report(f"writer-{number}", error)


class Reads:
    """Ways to read; each returns the marks that it saw, and takes a turn's number."""

    def __init__(self, flow: StrictFlow) -> None:
        self._flow = flow

        @read(flow)
        def read_in_loop() -> dict[str, Any]:
            return {key: flow.state[key] for key in KEYS}

        self._read_in_loop = read_in_loop

    def value(self, turn: int) -> list[int]:
        key = KEYS[turn % len(KEYS)]
        return marks_of(key, self._flow.state[key])

    def snapshot(self, turn: int) -> list[int]:
        with self._flow.snapshot() as snapshot:
            return common_marks(snapshot)

    def snapshot_of_now(self, turn: int) -> list[int]:
        with self._flow.snapshot(gated=False) as snapshot:
            return common_marks(snapshot)

    def peek(self, turn: int) -> list[int]:
        key = KEYS[turn % len(KEYS)]
        return marks_of(key, self._flow.peek(key))

    def in_loop(self, turn: int) -> list[int]:
        return common_marks(self._read_in_loop().result())


def read_and_check(
    number: int, flow: StrictFlow, board: Board, reads: int, sabotage: Callable[[], None] | None
) -> None:
    """Read in every way, *reads* times, or until the end of it all."""
    if sabotage:
        sabotage()
    ways = Reads(flow)
    gated = [ways.value, ways.snapshot, ways.value]
    ungated = [ways.peek, ways.snapshot_of_now]
    turns = [*gated, ungated[0], *gated, ungated[1]]
    before = [0] * WRITERS
    try:
        for turn in range(reads):
            if board.is_over:
                break
            way = ways.in_loop if turn % 500 == 499 else turns[turn % len(turns)]
            returned = board.returned.tolist()
            marks = way(turn)
            if way not in ungated and any(map(int.__lt__, marks, returned)):
                raise Fault(f"stale: {way.__name__} saw {marks}; submits {returned} had returned")
            if any(map(int.__lt__, marks, before)):
                raise Fault(f"back: {way.__name__} saw {marks}, the read before it {before}")
            before = marks
            board.read[number - 1] = turn + 1
    except Fault as fault:
        board.report(f"reader-{number}", fault)
    except Exception as error:
        board.report(f"reader-{number}", Fault(f"torn: {way.__name__} raised {error!r}"))


def write_without_pause(number: int, flow: StrictFlow, board: Board) -> None:
    """Keep the flag up: no task ends before the submit of a later one has returned."""

    @write(flow)
    def pass_on() -> None:
        board.started[0] += 1
        while sum(board.returned) <= board.started[0] and not board.is_over:
            time.sleep(0)
        flow.state[KEYS[0]] = board.started[0]

    while not board.is_over:
        if sum(board.returned) - board.started[0] < AHEAD:
            pass_on()
            board.returned[number - 1] += 1
        else:
            time.sleep(0)


def read_and_time(number: int, flow: StrictFlow, board: Board, reads: int) -> None:
    """Read *reads* times under the flag; keep how many seconds each read took."""
    while not board.started[0]:
        time.sleep(0.001)
    seconds: list[float] = []
    while len(seconds) < reads and not board.is_over:
        began = time.perf_counter()
        flow.state[KEYS[len(seconds) % len(KEYS)]]
        seconds.append(time.perf_counter() - began)
        board.read[number - 1] += 1
    board.keep(f"reader-{number}", seconds)


# The whole


def check(
    flow: StrictFlow,
    board: Board,
    reads: int,
    *,
    in_coordinator: Callable[[], None] | None = None,
    in_readers: Callable[[], None] | None = None,
    in_writers: Callable[[], None] | None = None,
) -> int:
    """Run writers, and readers that read *reads* times in all; return how often they did. See `Board.faults`."""
    with flow:
        if in_coordinator:

            @write(flow)
            def sabotage() -> None:
                in_coordinator()

            sabotage().result()
        with flow.spawn(write_until_over, flow, board, in_writers, processes=WRITERS) as writers:
            each = -(-reads // READERS)
            with flow.spawn(read_and_check, flow, board, each, in_readers, processes=READERS) as readers:
                ended = readers.join(60)
                board.end()
            writers.join()
        codes = readers.exitcodes + writers.exitcodes
        if not ended or any(codes):
            board.report("checker", Fault(f"exit codes {codes}, readers {'ended' if ended else 'hang'}"))
        if not board.faults() and (marks := common_marks(flow.snapshot())) != board.returned.tolist():
            board.report("checker", Fault(f"{marks} at the end, {board.returned.tolist()} were submitted"))
    return sum(board.read)
