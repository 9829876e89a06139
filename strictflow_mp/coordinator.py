"""The coordinator: the process that runs SF-LOOP and owns all that has a name.

Owns: the place's lock, key and socket, the segment, the semaphores. It makes them at the start and removes
    them at the end; what a killed one leaves behind is removed by the next start, or by ``strictflow-mp clean``.
Order of a start: take the lock, remove what a dead predecessor left, make the segment, commit the first
    state as version 1, write down who lives here, listen, say "ready".
If we die here: see `leftovers`.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from multiprocessing import current_process
from typing import Any

from . import handshake, leftovers, place
from .core import logger, setup_logging
from .errors import StrictFlowError
from .gate import GateKeeper
from .processes import Identity, let_interrupts_in
from .rendezvous import Lease, Resident
from .segment import R_COUNT, RECORD, RING, W_RING, W_VERSION, Segment
from .sessions import Sessions
from .sfloop import SFLoop
from .stats import FlowStats, WorkerStats
from .store import Pins, StoreReader, StoreWriter

__all__ = ["main"]

FAREWELL = 5.0
"""Seconds that processes have at the end to read their last answers."""


def main(message: dict[str, Any]) -> None:
    """Run a flow until it is stopped. Called in a fresh interpreter by `processes.launch`.

    Args:
        message: the options of `StrictFlow`, the packed first state, the owner's identity, and the
            descriptor on which to say "ready".
    """
    current_process().name = "SF-LOOP"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    let_interrupts_in()  # for the children of tasks; here they are ignored
    if message["log_level"] is not None:
        setup_logging(message["log_level"])
    ready = message["ready"]
    try:
        coordinator = Coordinator(message)
    except BaseException as error:
        text = error if isinstance(error, StrictFlowError) else StrictFlowError(f"{type(error).__name__}: {error}")
        os.write(ready, pickle.dumps(text))
        os.close(ready)
        raise SystemExit(0 if isinstance(error, StrictFlowError) else 1) from None
    try:
        os.write(ready, pickle.dumps(None))
    except BrokenPipeError:
        pass  # the owner has died; the flow will find itself deserted
    os.close(ready)
    coordinator.run()


class Coordinator:
    """Everything that a flow has, from start to end."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._name: str = options["name"]
        self._began = time.monotonic()
        self._lease = Lease.take(self._name)
        self._token = os.urandom(6).hex()
        self._sessions: Sessions | None = None
        self._segment: Segment | None = None
        try:
            if self._lease.former is not None:
                leftovers.remove(self._lease.former.token)
            self._build(options)
        except BaseException:
            self._remove()
            raise

    def _build(self, options: dict[str, Any]) -> None:
        name, me = self._name, Identity.mine()
        slots = options["max_workers"] + 1
        segment = self._segment = Segment.create(
            self._token, name, capacity=options["capacity"], slots=slots, pid=me.pid, start=me.start
        )
        self._writer = StoreWriter(segment, name)
        self._writer.create()
        if options["state"]:
            self._writer.publish(options["state"])
        gate = self._gate = GateKeeper(segment, self._token)
        authkey = self._lease.furnish(Resident(name, self._token, me.pid, me.start, me.boot))
        listener = handshake.listen(self._lease.place.socket)
        welcome = {
            "segment": segment.name,
            "pid": me.pid,
            "max_pending": options["max_pending"],
            "gate_timeout": options["gate_timeout"],
        }
        owner = Identity(*options["owner"]) if options["owner"] else None
        self._sessions = Sessions(listener, authkey, segment, gate, welcome, owner)
        reader = StoreReader(segment, Pins(segment, 0))
        self._loop = SFLoop(
            name, self._writer, reader, gate, self._sessions, task_timeout=options["task_timeout"], report=self._report
        )
        place.enter(self._loop.inside)
        signal.set_wakeup_fd(self._sessions.wakeup_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: self._loop.stop())

    def run(self) -> None:
        """Serve until stopped, then remove everything."""
        logger.info("flow %r is served by pid %d", self._name, os.getpid())
        assert self._sessions is not None
        try:
            try:
                self._loop.run()
                self._loop.close()
            finally:
                self._gate.stop()
            self._loop.answer_stops()
            self._sessions.flush(FAREWELL)
        finally:
            self._remove()
            logger.info("flow %r has ended", self._name)

    def _remove(self) -> None:
        if self._sessions is not None:
            signal.set_wakeup_fd(-1)
            self._sessions.close_all()
        if self._segment is not None:
            self._segment.unlink()
        self._lease.leave()

    def _report(self) -> dict[str, Any]:
        """The fields of `FlowStats`."""
        import psutil  # 15 ms that a start does not need

        segment, loop = self._segment, self._loop
        assert segment is not None
        assert self._sessions is not None
        words = segment.words
        workers = []
        for session in self._sessions:
            cpu = rss = None
            try:
                process = psutil.Process(session.identity.pid)
                with process.oneshot():
                    times = process.cpu_times()
                    lifetime = time.time() - process.create_time()
                    cpu = round(100 * (times.user + times.system) / max(lifetime, 0.01), 1)
                    rss = process.memory_info().rss
            except psutil.Error:
                pass
            workers.append(
                WorkerStats(
                    pid=session.identity.pid,
                    slot=session.slot,
                    state="attached" if session.is_open else "leaving",
                    cpu=cpu,
                    rss=rss,
                    waits=words[segment.waits + session.slot],
                    waited=words[segment.waited + session.slot] / 1e9,
                )
            )
        version = words[W_VERSION]
        counters, scheduler = loop.counters, loop.scheduler
        return FlowStats(
            name=self._name,
            version=version,
            keys=words[W_RING + version % RING * RECORD + R_COUNT],
            coordinator_pid=os.getpid(),
            restarts=0,
            uptime=time.monotonic() - self._began,
            tasks_run={level: counter.run for level, counter in counters.items()},
            tasks_failed={level: counter.failed for level, counter in counters.items()},
            tasks_pending={1: scheduler.writes, 2: scheduler.reads},
            latency={level: counter.latency() for level, counter in counters.items()},
            readers_waited=sum(worker.waited for worker in workers),
            bytes_used=self._writer.bytes_used,
            bytes_free=self._writer.bytes_free,
            bytes_pinned=self._writer.bytes_pinned,
            workers=tuple(workers),
        ).as_dict()
