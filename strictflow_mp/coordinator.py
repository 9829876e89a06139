"""The coordinator: the process that runs SF-LOOP and owns all that has a name.

Owns: the place's lock, key and socket, the segment, the semaphores. It makes them at the start and removes
    them at the end; what a killed one leaves behind is removed by the next start, or by ``strictflow-mp clean``.
Order of a start: take the lock, write down who lives here, make the segment, commit the first state as version 1,
    listen, say "ready". When a dead coordinator has left a segment, that is taken over instead (`takeover`).
If we die here: the lock is free, and its file names all that we made. The owner starts another coordinator; if it is
    gone too, the next start under this name takes over, or removes what is left (`leftovers`).
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import time
import traceback
from functools import partial
from multiprocessing import current_process
from typing import Any

from . import handshake, leftovers, place
from .core import logger, serve, setup_logging
from .errors import FlowNotRunning, ProtocolError, StrictFlowError
from .gate import GateKeeper
from .processes import Identity, let_interrupts_in
from .recorder import Recorder
from .rendezvous import Lease, Resident
from .segment import (
    PREFIX,
    R_COUNT,
    RECORD,
    RING,
    SERVING,
    STARTING,
    STOPPED,
    W_RESTARTS,
    W_RING,
    W_STATUS,
    W_VERSION,
    Segment,
)
from .sessions import Sessions
from .sfloop import SFLoop
from .stats import FlowStats, WorkerStats
from .store import Pins, StoreReader, StoreWriter
from .suspect import Marker
from .takeover import take_over

__all__ = ["main"]

FAREWELL = 5.0
"""Seconds that processes have at the end to read their last answers."""
BROKEN = 70
"""Exit code after an error of our own (EX_SOFTWARE of sysexits.h)."""


def main(message: dict[str, Any]) -> None:
    """Run a flow until it is stopped. Called in a fresh interpreter by `processes.launch`.

    Args:
        message: the options of `StrictFlow`, the packed first state, the owner's identity, and the
            descriptor on which to say "ready".
    """
    current_process().name = "SF-LOOP"
    serve(message["name"])
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all that run in it
        signal.signal(number, signal.SIG_IGN)
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
        sys.audit("strictflow_mp.start.leased")
        self._sessions: Sessions | None = None
        self._segment: Segment | None = None
        self._heir = False  # whether the state is older than we are
        try:
            self._build(options)
        except BaseException:
            if self._heir:
                self._lease.release()  # it is not ours to remove; the next one may have more luck
            else:
                self._remove()
            raise

    def _build(self, options: dict[str, Any]) -> None:
        name, me = self._name, Identity.mine()
        former = self._lease.former
        segment = None
        if former is not None:
            if options["recover"]:
                segment = self._inherited(former)
            if segment is None:
                leftovers.remove(former.token)
                if options["is_restart"]:
                    raise FlowNotRunning("its coordinator died while it stopped, or before it had begun", flow=name)
        self._heir = segment is not None
        self._token = former.token if former is not None and segment is not None else os.urandom(6).hex()
        self._lease.inscribe(Resident(name, self._token, *me))
        sys.audit("strictflow_mp.start.inscribed")
        if segment is None:
            segment = Segment.create(
                self._token,
                name,
                capacity=options["capacity"],
                slots=options["max_workers"] + 1,
                identity=me,
                status=STARTING,
            )
            sys.audit("strictflow_mp.start.created")
        self._segment = segment
        self._writer = StoreWriter(segment, name)
        gate = self._gate = GateKeeper(segment, self._token)
        if self._heir:
            tenancies = take_over(segment, self._writer, gate, name, me)
        else:
            tenancies = []
            self._writer.create()
            if options["state"]:
                self._writer.publish(options["state"])
            segment.words[W_STATUS] = SERVING  # from here on the state is worth to be taken over
        authkey = self._lease.new_key()
        listener = handshake.listen(self._lease.place.socket)
        sys.audit("strictflow_mp.start.listening")
        owner = Identity(*options["owner"]) if options["owner"] else None
        welcome = {
            "segment": segment.name,
            "pid": me.pid,
            "owner": list(owner) if owner is not None and options["restart"] else None,
            "restarts": segment.words[W_RESTARTS],
            "max_pending": options["max_pending"],
            "gate_timeout": options["gate_timeout"],
        }
        self._sessions = Sessions(
            listener, authkey, segment, gate, self._writer.receipts, partial(self._writer.publish, {}), welcome, owner
        )
        self._sessions.expect(tenancies)
        os.register_at_fork(after_in_child=self._leave_to_parent)
        reader = StoreReader(segment, Pins(segment, 0))
        self._loop = SFLoop(
            name,
            self._writer,
            reader,
            gate,
            self._sessions,
            Marker(segment),
            Recorder(name, segment, self._writer, self._lease.place.trace),
            task_timeout=options["task_timeout"],
            max_pending=options["max_pending"],
            report=self._report,
        )
        place.enter(self._loop.inside)
        signal.set_wakeup_fd(self._sessions.wakeup_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: self._loop.stop())

    @staticmethod
    def _inherited(former: Resident) -> Segment | None:
        """The segment that a dead coordinator left; None if there is nothing to be had from it."""
        try:
            segment = Segment.open(PREFIX + former.token)
        except (FileNotFoundError, ProtocolError):
            return None  # it died before it was made, or is another version's
        if segment.words[W_STATUS] in (STARTING, STOPPED):
            segment.close()  # it died before its first state was there, or while it removed everything
            return None
        return segment

    def run(self) -> None:
        """Serve until stopped, then remove everything."""
        logger.info("flow %r is served by pid %d", self._name, os.getpid(), extra={"version": self._writer.version})
        assert self._sessions is not None
        try:
            self._loop.run()
        except BaseException:
            # As after any other death: the last commit stands, and the next coordinator takes over.
            logger.critical("flow %r: the coordinator broke; please report this", self._name, exc_info=True)
            logging.shutdown()
            traceback.print_exc()  # whether or not anybody has set up logging
            os._exit(BROKEN)
        self._loop.close()
        self._gate.stop()
        sys.audit("strictflow_mp.stop.stopped")
        self._loop.answer_stops()
        self._sessions.flush(FAREWELL)
        self._remove()
        logger.info("flow %r has ended", self._name, extra={"version": self._writer.version})

    def _leave_to_parent(self) -> None:
        """In a process that a task forked: the lock and the connections are its parent's, and end with it."""
        place.leave()
        for descriptor in (self._lease.fileno(), *(self._sessions.descriptors() if self._sessions else ())):
            try:
                os.close(descriptor)
            except OSError:
                pass

    def _remove(self) -> None:
        if self._sessions is not None:
            signal.set_wakeup_fd(-1)
            self._sessions.close_all()
            sys.audit("strictflow_mp.stop.closed")
        if self._segment is not None:
            self._segment.unlink()
            sys.audit("strictflow_mp.stop.unlinked")
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
                    state=session.state,
                    cpu=cpu,
                    rss=rss,
                    waits=words[segment.waits + session.slot],
                    waited=words[segment.waited + session.slot] / 1e9,
                    is_waiting=bool(words[segment.waiting + session.slot]),
                )
            )
        version = words[W_VERSION]
        counters, scheduler = loop.runner.counters, loop.scheduler
        return FlowStats(
            name=self._name,
            version=version,
            keys=words[W_RING + version % RING * RECORD + R_COUNT],
            coordinator_pid=os.getpid(),
            restarts=words[W_RESTARTS],
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
