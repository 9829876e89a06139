"""The tracer: a process's own share of a trace: its submits, its answers, and its waits at the gate.

A process sees by the word TRACE that a run is recorded. It looks there when it submits, when it waits for an answer or
reads one, and when a read waits at the gate: nothing on the way of a read that need not wait. Where to write, it reads
from a link in the flow's place (`Place.trace`), once for each recording.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..memory.segment import W_TRACE, Segment
from ..trace import Part, process_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..memory.gate import Gate
    from ..system.place import Place
    from ..wire.future import TaskFuture

__all__ = ["Tracer"]


class Tracer:
    """What one attachment tells."""

    def __init__(self, flow: str, place: Place, segment: Segment, slot: int, tenant: int) -> None:
        self._flow = flow
        self._place = place
        self._segment = segment
        self._slot = slot
        self._tenant = tenant
        # TRACE as it was when `_part` was opened: the start of the recording, another one for each. 0: none so far.
        self._origin = 0
        # None also while a recording goes on in which this process cannot write: that is tried once.
        self._part: Part | None = None

    def part(self) -> Part | None:
        """Where to write; None when nobody records, or this process cannot."""
        origin = self._segment.words[W_TRACE]
        if origin != self._origin:
            self._origin, self._part = origin, None
            try:
                self._part = self._open(origin) if origin else None
            except FileNotFoundError:
                pass  # it has just ended
            except OSError as error:
                logger.warning(
                    "flow %r: this process is not recorded: %s", self._flow, error, extra={"flow": self._flow}
                )
        return self._part

    def _open(self, origin: int) -> Part | None:
        _, _, directory = os.readlink(self._place.trace).partition(":")
        if self._segment.words[W_TRACE] != origin:
            return None  # that was another recording's
        part = Part(directory, origin, str(self._tenant), flow=self._flow)
        part.introduce(process_name(), self._slot)
        return part

    def submitted(self, name: str, priority: int, futures: Sequence[TaskFuture[Any]], began: int) -> None:
        """Tasks were submitted, in one frame."""
        ended, part = time.monotonic_ns(), self.part()
        if part is not None and futures:
            about = {"tenant": self._tenant, "tasks": [(futures[0].seq, len(futures))], "priority": priority}
            part.write(part.slice("submit", f"submit {name}", began, ended, **about))

    @contextmanager
    def at_gate(self, gate: Gate) -> Iterator[None]:
        """A read waits at the gate."""
        words, pids = self._segment.words, self._segment.pids
        began = time.monotonic_ns()
        # Slot 0 is SF-LOOP's own: a burst, or what tasks have submitted.
        behind = [{"slot": slot, "pid": words[pids + slot], "ticket": ticket} for slot, ticket in gate.unfinished()]
        try:
            yield
        finally:
            ended, part = time.monotonic_ns(), self.part()
            if part is not None and behind:
                part.write(part.slice("gate", "wait at the gate", began, ended, behind=behind))

    @contextmanager
    def at_result(self, future: TaskFuture[Any]) -> Iterator[None]:
        """A thread waits for an answer."""
        began = time.monotonic_ns()
        try:
            yield
        finally:
            ended, part = time.monotonic_ns(), self.part()
            if part is not None and future.is_task:
                about = {"done": future.done_now()}
                part.write(part.slice("result", f"wait for {future.label}", began, ended, **about))

    @contextmanager
    def reading(self, names: Sequence[tuple[int, str]]) -> Iterator[None]:
        """Answers are read, of these tasks: seq and name of each."""
        began = time.monotonic_ns()
        try:
            yield
        finally:
            ended, part = time.monotonic_ns(), self.part()
            if part is not None and names:
                name = f"answer {names[0][1]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                about = {"tenant": self._tenant, "tasks": [(seq, 1) for seq, _ in names]}
                part.write(part.slice("answer", name, began, ended, **about))

    def __repr__(self) -> str:
        return f"<Tracer of {self._flow!r}, tenant {self._tenant}>"
