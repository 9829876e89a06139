"""The recorder: the coordinator's share of a trace: bursts, P1 and P2 tasks, commits.

Owns: the word TRACE (written here alone), and the link in the place, which says where the parts of the trace are.
Order: the link is there before TRACE says so, and goes after TRACE is 0 again.
If we die here: TRACE and the link stay, and the next coordinator goes on. What is lost is the burst that was running.

While a run is recorded, the runner and the writer have other classes, whose methods write down what they do. So while
nobody records, nothing is asked anywhere.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..errors import StrictFlowError
from ..memory.segment import W_RESTARTS, W_TRACE
from ..store import StoreWriter
from ..trace import Event, Part
from .runner import Runner

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import CoroutineType

    from .burst import Burst
    from .calls import Call, Function
    from .parts import Parts

__all__ = ["Recorder"]


class Recorder:
    """Records, when it is asked to."""

    def __init__(self, parts: Parts, link: os.PathLike[str]) -> None:
        self._flow = parts.flow
        self._segment = parts.segment
        self._writer = parts.writer
        self._link = os.fspath(link)
        # None until `serve`.
        self._runner: Runner | None = None
        # What the link says: the tenant that asked, ":", the directory. "" exactly while TRACE is 0.
        self._asked = ""

    def serve(self, runner: Runner) -> None:
        """Record what this runner does; go on with what a dead coordinator was recording."""
        self._runner = runner
        origin = self._segment.words[W_TRACE]
        if origin:
            try:
                self._asked = os.readlink(self._link)
                self._begin(origin)
            except OSError as error:
                logger.warning("flow %r is recorded no more: %s", self._flow, error, extra={"flow": self._flow})
                self._end()

    @property
    def is_on(self) -> bool:
        """Whether a run is recorded."""
        return bool(self._segment.words[W_TRACE])

    def start(self, tenant: int, directory: str) -> None:
        """Record, into that directory, for as long as the process of *tenant* lives.

        Raises:
            StrictFlowError: another process has that done already.
            OSError: nothing can be written there.
        """
        asked = f"{tenant}:{directory}"
        if self.is_on:
            if self._asked == asked:
                return  # the question came once more, after a restart
            raise StrictFlowError(
                f"its run is being recorded already, into {self._asked.partition(':')[2]}; close that trace first",
                flow=self._flow,
            )
        self._asked = asked
        try:
            self._begin(time.monotonic_ns())
        except OSError:
            self._end()
            raise

    def _begin(self, origin: int) -> None:
        runner, restarts = self._runner, self._segment.words[W_RESTARTS]
        assert runner is not None
        directory = self._asked.partition(":")[2]
        part = Part(directory, origin, "loop", flow=self._flow)
        part.introduce(f"SF-LOOP, restart {restarts}" if restarts else "SF-LOOP", 0)
        if not self._segment.words[W_TRACE]:
            self._remove_link()
            # The link before the word: a process that sees the word follows the link.
            os.symlink(self._asked, self._link)
            self._segment.words[W_TRACE] = origin
        else:
            part.write(part.event("i", "takeover", time.monotonic_ns(), s="g", args={"restarts": restarts}))
        runner.__class__ = _RecordedRunner
        assert isinstance(runner, _RecordedRunner)
        runner.record(part)
        self._writer.__class__ = _RecordedWriter
        assert isinstance(self._writer, _RecordedWriter)
        self._writer.record(part)

    def stop(self, directory: str) -> None:
        """Record no more into that directory."""
        if self._asked.partition(":")[2] == directory:
            self._end()

    def look(self) -> None:
        """A process has left: record no more if it was the one that asked for it."""
        segment = self._segment
        if self._asked:
            tenants = segment.words[segment.tenants : segment.tenants + segment.slots]
            if int(self._asked.partition(":")[0]) not in tenants.tolist():
                self._end()

    def close(self) -> None:
        """The flow ends."""
        if self._asked:
            self._end()

    def _end(self) -> None:
        self._segment.words[W_TRACE] = 0
        self._asked = ""
        self._remove_link()
        for recorded in (self._runner, self._writer):
            if isinstance(recorded, (_RecordedRunner, _RecordedWriter)):
                recorded.record(None)
                recorded.__class__ = type(recorded).__base__  # type: ignore[assignment]

    def _remove_link(self) -> None:
        try:
            os.unlink(self._link)
        except FileNotFoundError:
            pass

    def __repr__(self) -> str:
        return f"<Recorder of {self._flow!r}, {'on' if self.is_on else 'off'}>"


class _RecordedWriter(StoreWriter):
    """Writes down its commits."""

    part: Part | None

    def record(self, part: Part | None) -> None:
        self.part = part

    def commit(self, changes: Mapping[bytes, bytes | None]) -> None:
        began = time.monotonic_ns()
        super().commit(changes)
        if self.part is not None:
            about = {"version": self.version, "keys": len(changes)}
            self.part.write(self.part.slice("commit", "commit", began, time.monotonic_ns(), **about))


class _RecordedRunner(Runner):
    """Writes down what it runs: a burst's tasks before their answers: what is answered is in the trace."""

    # None only from `record(None)` until the class changes back.
    _part: Part | None
    # Tasks that have run since `_write_events`.
    _events: list[Event]
    # The names of the async P2 tasks whose begin is in this part and whose end is not, by slot and seq.
    _running: dict[tuple[int, int], str]
    # The P2 task that ran last.
    _read: Call
    # How many tasks the burst ran.
    _ran: int

    def record(self, part: Part | None) -> None:
        former = vars(self).get("_part")
        if former is not None and self._running:
            former.write(*(self._async_event(former, "e", key) for key in self._running))
        self._part, self._events, self._running = part, [], {}

    def run_burst(self) -> None:
        began = time.monotonic_ns()
        super().run_burst()
        if self._part is not None:
            about = {"ran": self._ran, "version": self._writer.version}
            self._part.write(self._part.slice("burst", "burst", began, time.monotonic_ns(), **about))

    def _answer_writes(self, calls: list[Call]) -> None:
        self._ran = len(self._events)
        self._write_events()
        super()._answer_writes(calls)

    def _write_events(self) -> None:
        if self._part is not None and self._events:
            self._part.write(*self._events)
        self._events.clear()

    def _run_write(self, call: Call, burst: Burst) -> None:
        began = time.monotonic_ns()
        super()._run_write(call, burst)
        self._note(call, began)

    def run_read(self) -> None:
        began = time.monotonic_ns()
        super().run_read()
        self._note(self._read, began)
        self._write_events()

    def _start_async(self, call: Call, function: Function, coroutine: CoroutineType[Any, Any, Any]) -> None:
        self._read = call
        key = call.slot, call.seq
        self._running[key] = call.name
        if self._part is not None:
            self._events.append(self._async_event(self._part, "b", key))
        super()._start_async(call, function, coroutine)

    def _finish_read(self, call: Call) -> None:
        self._read = call
        key = call.slot, call.seq
        if self._part is not None and key in self._running:
            self._part.write(self._async_event(self._part, "e", key))
            del self._running[key]
        super()._finish_read(call)

    def _async_event(self, part: Part, phase: str, key: tuple[int, int]) -> Event:
        name = f"P2 {self._running[key]}"
        return part.event(phase, name, time.monotonic_ns(), cat="P2", id=f"{key[0]}.{key[1]}")

    def _note(self, call: Call, began: int) -> None:
        """A task has run, or an async one has begun."""
        if self._part is None:
            return
        ended = time.monotonic_ns()
        about: dict[str, Any] = {"queued_us": (began - call.arrived) / 1e3}
        if call.session is not None:
            about |= {"pid": call.session.identity.pid, "tenant": call.session.tenant, "tasks": [(call.seq, 1)]}
        about |= {"slot": call.slot, "ticket": call.ticket}
        if call.failure is not None:
            about["failed"] = type(call.failure).__name__
        level = f"P{call.priority}"
        self._events.append(self._part.slice(level, f"{level} {call.name}", began, ended, **about))
