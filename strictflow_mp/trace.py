"""Traces: what each process writes down while a run is recorded, and the one file that is made of it.

`StrictFlow.trace` returns a `Trace`. While it is open, each process of the flow writes a `Part` of its own; `merge`
makes the trace of them. ``python -m strictflow_mp.trace PATH`` does that for a process that died before it could.

Owns: the directory ``<trace>.parts``, with a file for each process that has something to tell, one line for each event:
    JSON, in the form of Chrome's Trace Event Format.
Written by: each file by its process alone, a line or several with one `write` in append mode, so threads do not mix.
Read by: `merge`, which also draws the arrows: from a submit to its run and its answer, from a P1 to a read that waited.
Order: none between files. Times are those of CLOCK_MONOTONIC, which all processes of a machine share, counted from the
    start of the recording; `merge` sorts by them.
If we die here: half a line is left at the end of a file at most; `merge` drops it, and all other lines stand. A file in
    which all processes write would not forgive that: kill and a full disk may cut a `write` short anywhere.
Invariants: a process that cannot write says so once, in the log, and records no more. Nothing else comes of it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol

from .core import logger
from .errors import CoordinatorLost, FlowNotRunning, StrictFlowError
from .memory.segment import W_TRACE
from .wire import frames

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Event", "Part", "Trace", "merge", "prepare", "process_name"]

SUFFIX = ".parts"
"""The path of a trace with this after it is the directory of its parts."""
TOUCH_MICROSECONDS = 1e-3
"""So long before the end of a slice an arrow still touches it."""

Event = dict[str, Any]
"""One event of Chrome's Trace Event Format: `ph` is its phase, `ts` and `dur` are in microseconds."""


class Part:
    """What one process writes down. Thread-safe.

    Args:
        directory: of the parts.
        origin: when the recording began, monotonic ns.
        name: tells the file from others that the process may have written there.

    Raises:
        OSError: there can be no such file.
    """

    def __init__(self, directory: str, origin: int, name: str, *, flow: str) -> None:
        self.origin = origin
        self._flow = flow
        self._pid = os.getpid()
        self._threads: set[int] = set()  # those whose names are in the file
        path = os.path.join(directory, f"{self._pid}.{name}")
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._is_broken = False  # True from the first write that failed, for ever

    def introduce(self, process: str, rank: int) -> None:
        """Say whose track it is; tracks are shown in the order of their rank."""
        self.write(
            self._about("process_name", name=f"{process} ({self._pid})"),
            self._about("process_sort_index", sort_index=rank),
        )

    def _about(self, what: str, **about: Any) -> Event:
        return {"ph": "M", "name": what, "pid": self._pid, "tid": threading.get_native_id(), "args": about}

    def slice(self, category: str, name: str, began: int, ended: int, **about: Any) -> Event:
        """Something that this thread did from *began* until *ended* (monotonic ns)."""
        duration = max(0, ended - max(began, self.origin)) / 1e3
        return self.event("X", name, began, cat=category, dur=duration, args=about)

    def event(self, phase: str, name: str, when: int, **fields: Any) -> Event:
        """An event of that phase in this thread, at *when* (monotonic ns)."""
        at = (max(when, self.origin) - self.origin) / 1e3
        return {"ph": phase, "name": name, "pid": self._pid, "tid": threading.get_native_id(), "ts": at, **fields}

    def write(self, *events: Event) -> None:
        """Write events down."""
        import json  # 5 ms that a process that is not recorded does not need

        if self._is_broken:
            return
        thread = threading.get_native_id()
        if thread not in self._threads:
            self._threads.add(thread)
            events = (self._about("thread_name", name=threading.current_thread().name), *events)
        lines = "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events).encode()
        try:
            # One write: the kernel appends it whole, between those of other threads.
            if os.write(self._descriptor, lines) == len(lines):
                return
            error: object = "the disk is full"
        except OSError as failed:
            error = failed
        self._is_broken = True
        logger.warning("flow %r: this process is recorded no more: %s", self._flow, error, extra={"flow": self._flow})

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)

    def __repr__(self) -> str:
        return f"<Part of {self._flow!r} by pid {self._pid}>"


def process_name() -> str:
    """What this process is called: as in its log lines, or by its script."""
    multiprocessing = sys.modules.get("multiprocessing")
    name = multiprocessing.current_process().name if multiprocessing is not None else "MainProcess"
    if name != "MainProcess":
        return str(name)
    arguments = getattr(sys, "argv", None) or [""]  # an embedded interpreter may have none
    return os.path.basename(str(arguments[0])) or "python"


def prepare(path: str) -> str:
    """Make sure that a trace can be written there; return the directory of its parts, empty.

    Raises:
        OSError: it cannot.
    """
    with open(path, "w") as file:
        file.write("[]\n")
    directory = path + SUFFIX
    try:
        os.mkdir(directory)
    except FileExistsError:
        for part in os.scandir(directory):
            os.unlink(part)
    return directory


def merge(path: str) -> int:
    """Make the trace of its parts, and remove these; return the number of its events.

    Raises:
        FileNotFoundError: there are no parts.
        OSError: it cannot be written; the parts stay.
    """
    import json

    directory = path + SUFFIX
    parts = sorted(part.path for part in os.scandir(directory))
    events: list[Event] = []
    for part in parts:
        with open(part, "rb") as file:
            for line in file:
                try:
                    events.append(json.loads(line))
                except ValueError:
                    break  # its process died while it wrote this, or the disk was full
    events.sort(key=_order)
    events += _open_ended(events)
    events += _arrows(events)
    events.sort(key=_order)
    with open(path, "w") as file:
        file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
        file.write(",\n".join(json.dumps(event, separators=(",", ":")) for event in events))
        file.write("\n]}\n")
    for part in parts:
        os.unlink(part)
    os.rmdir(directory)
    return len(events)


def _open_ended(events: list[Event]) -> list[Event]:
    """Ends for what nobody ended: its process died, or the recording ended first."""
    begun: dict[tuple[int, str], Event] = {}
    last = 0.0
    for event in events:
        last = max(last, event.get("ts", 0.0) + event.get("dur", 0.0))
        if event["ph"] == "b":
            begun[event["pid"], event["id"]] = event
        elif event["ph"] == "e":
            begun.pop((event["pid"], event["id"]), None)
    return [{**event, "ph": "e", "ts": last, "args": {"open": True}} for event in begun.values()]


def _arrows(events: list[Event]) -> list[Event]:
    """From submit to run to answer; and from the last P1 that a read waited for to that read."""
    stations: dict[tuple[int, int], list[tuple[Event, float]]] = defaultdict(list)  # by session and seq
    writes: dict[tuple[int, int], Event] = {}  # by slot and ticket
    waits: list[Event] = []
    for event in events:
        if event["ph"] != "X":
            continue
        about = event["args"]
        for seq in _seqs(about.get("tasks", ())):
            stations[about["tenant"], seq].append((event, event["ts"]))
        if event["cat"] == "P1":
            writes[about["slot"], about["ticket"]] = event
        elif event["cat"] == "gate":
            waits.append(event)
    ways = [(name, way) for way in stations.values() if (name := _name_of(way)) is not None]
    for wait in waits:
        awaited = [(one["slot"], one["ticket"]) for one in wait["args"]["behind"]]
        if found := [writes[write] for write in awaited if write in writes]:
            last = max(found, key=_end)
            ways.append(("waits", [(last, _touch(last)), (wait, _touch(wait))]))
    arrows = []
    for identifier, (name, way) in enumerate(ways, 1):
        for index, (event, at) in enumerate(way):
            phase = "s" if index == 0 else "f" if index == len(way) - 1 else "t"
            arrow = {"ph": phase, "cat": "flow", "name": name, "id": identifier, "ts": round(at, 3)}
            arrow.update(pid=event["pid"], tid=event["tid"])
            if phase == "f":
                arrow["bp"] = "e"  # to the slice around it, not to the next one
            arrows.append(arrow)
    return arrows


def _seqs(runs: Iterable[tuple[int, int]]) -> Iterable[int]:
    """The seqs in runs of them: (first, how many)."""
    for first, count in runs:
        yield from range(first, first + count)


def _name_of(way: list[tuple[Event, float]]) -> str | None:
    """What an arrow along these slices is called; None if it does not begin with a submit, or ends with it."""
    return "task" if len(way) > 1 and way[0][0]["cat"] == "submit" else None


def _order(event: Event) -> tuple[float, float]:
    """By time; a slice before what is in it."""
    return event.get("ts", -1.0), -event.get("dur", 0.0)


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def _touch(event: Event) -> float:
    """When an arrow meets the end of a slice."""
    return max(float(event["ts"]), _end(event) - TOUCH_MICROSECONDS)


class Attached(Protocol):
    """A process's connection to a coordinator, as far as a trace needs it: `client.attachment.Attachment`."""

    @property
    def words(self) -> memoryview:
        """The flow's shared memory, word by word."""


class Asking(Protocol):
    """A process's end of a flow, as far as a trace needs it: `client.client.Client`."""

    name: str

    def attach(self) -> Attached:
        """The connection; makes one if there is none."""

    def ask(self, kind: int, *fields: Any, attach: float = ...) -> Any:
        """Ask the coordinator, and wait for the answer; *attach* seconds for making a connection."""


class Trace:
    """A recording that goes on until it is closed; a context manager.

    The trace is written when it is closed. If this process dies before, the recording ends, and
    ``python -m strictflow_mp.trace PATH`` makes a trace of what there is.

    Attributes:
        path: where it is written.
        events: how many events it has, once it is closed.
    """

    def __init__(self, client: Asking, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.events = 0
        self._client = client
        self._is_open = False  # True between the coordinator's yes and `close`
        if client.attach().words[W_TRACE]:
            raise StrictFlowError("its run is being recorded already; close that trace first", flow=client.name)
        self._directory = prepare(self.path)
        try:
            client.ask(frames.TRACE, self._directory, True)
        except BaseException:
            for leftover in (*os.scandir(self._directory), self.path):
                os.unlink(leftover)
            os.rmdir(self._directory)
            raise
        self._is_open = True

    def close(self) -> None:
        """End the recording and write the trace. Nothing happens if that was done already.

        Raises:
            OSError: it cannot be written; what was recorded stays, and ``python -m strictflow_mp.trace`` tries again.
        """
        if not self._is_open:
            return
        try:
            self._client.ask(frames.TRACE, self._directory, False, attach=0)
        except (FlowNotRunning, CoordinatorLost):
            pass  # the flow has ended, and the recording with it
        self._is_open = False
        self.events = merge(self.path)

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Trace into {self.path!r}, {'open' if self._is_open else f'{self.events} events'}>"


if __name__ == "__main__":
    print(f"{merge(os.path.abspath(sys.argv[1]))} events")
