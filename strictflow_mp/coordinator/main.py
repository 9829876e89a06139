"""The coordinator: the process that runs SF-LOOP and owns all that has a name.

Owns: the lock, key and socket of the flow's place, the segment, the semaphores. It makes them at the start and removes
    them at the end; what a killed one leaves behind is removed by the next start, or by ``strictflow-mp clean``.
Order of a start: take the lock, write down who lives here, make the segment, commit the first state as version 1,
    listen, say "ready". When a dead coordinator has left a segment, that is taken over instead (`takeover`).
If we die here: the lock is free, and its file names all that we made. The owner starts another coordinator; if it is
    gone too, the next start under this name takes over, or removes what is left (`leftovers`).

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing import current_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import logger, serve, setup_logging
from ..errors import FlowNotRunning, ProtocolError, StrictFlowError
from ..memory import leftovers
from ..memory.gatekeeper import GateKeeper
from ..memory.segment import PREFIX, SERVING, STARTING, STOPPED, W_LEFT, W_RESTARTS, W_STATUS, Segment
from ..memory.succession import leave, store_owner
from ..memory.suspect import Marker
from ..store import Pins, StoreReader, StoreWriter
from ..system import outlet
from ..system.forks import in_child, watch
from ..system.identity import Identity
from ..system.launch import let_interrupts_in
from ..system.lease import Lease
from ..system.place import Place, Resident
from ..system.shortage import open_spare, raise_descriptor_limit
from ..wire import handshake
from ..wire import inside as flow_inside
from .admission import Admission
from .child import end_child
from .library import Library
from .loop import SFLoop
from .parts import Parts
from .recorder import Recorder
from .reloads import Reloads
from .report import report
from .scheduler import Scheduler
from .sessions import Sessions
from .slots import Slots
from .stepper import Stepper
from .takeover import take_over

if TYPE_CHECKING:
    import socket

    from ..memory.gatekeeper import Tenancy
    from .calls import Call

__all__ = ["main"]

FAREWELL_SECONDS = 5.0
"""That processes have at the end to read their last answers."""
LAST_LINES_SECONDS = 0.5
"""That a reader of standard output and error has at the end, if it is slow."""
LEFT_EXIT_CODE = 75
"""When the next coordinator is to go on (EX_TEMPFAIL). The word LEFT says so too, wherever exit codes are lost."""
BROKEN_EXIT_CODE = 70
"""After an error of our own (EX_SOFTWARE of sysexits.h)."""


def main(message: dict[str, Any]) -> None:
    """Run a flow until it is stopped. Called in a fresh interpreter by `system.launch`.

    Args:
        message: the options of `StrictFlow`, the packed first state, the owner's identity, and the
            descriptor on which to say "ready".
    """
    current_process().name = "SF-LOOP"
    message["spare"] = open_spare()  # before all others
    outlet.install()  # before anybody keeps a stream: whoever reads it, or does not, SF-LOOP goes on
    serve(message["name"])
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all that run in it
        signal.signal(number, signal.SIG_IGN)
    raise_descriptor_limit()
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
    """Everything that a flow has, from start to end.

    A start has five steps, each of which builds on those before it: the segment, the state in it, the door, the
    sessions and slots, the loop. An exception in any of them undoes what is ours to undo.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._name: str = options["name"]
        self._began = time.monotonic()
        # Where our owner keeps it, whatever user and environment we have inherited.
        self._lease = Lease.take_place(Place(Path(options["place"])), self._name)
        sys.audit("strictflow_mp.start.leased")
        # None until it has been opened or made; then `_remove` removes it.
        self._segment: Segment | None = None
        # None until there are connections and a listener, which `_remove` closes.
        self._admission: Admission | None = None
        # Whether what is here is older than we are: then it outlives a start that fails.
        self._is_heir = False
        # While Python forks: which signals the thread that does had blocked.
        self._mask: set[int | signal.Signals] | None = None
        try:
            self._segment = segment = self._take_segment(options)
            tenancies = self._begin_state(segment, options["state"])
            listener, authkey = self._listen()
            self._open_sessions(segment, listener, authkey, options, tenancies)
            self._make_loop(segment, options)
        except BaseException:
            if self._is_heir:
                self._lease.release()  # it is not ours to remove; the next one may have more luck
            else:
                self._remove()
            raise
        # Before whoever has started us is told: what it writes then stands behind that.
        logger.info("flow %r is served by pid %d", self._name, os.getpid(), extra={"version": self._writer.version})

    # The steps of a start

    def _take_segment(self, options: dict[str, Any]) -> Segment:
        """Take over the segment that a dead coordinator left, or make one."""
        name, former = self._name, self._lease.former
        segment = None
        if options["is_restart"] and (former is None or former.token != options["token"]):
            # A state that nobody has seen may not take the place of the one that is lost. What is here is another's.
            self._is_heir = former is not None
            raise FlowNotRunning(
                f"there is nobody to follow: the lock of its coordinator in {self._lease.place.directory} has been "
                "removed, or is another flow's; start it again, and see what removes files there",
                flow=name,
            )
        if former is not None:
            if options["recover"]:
                segment = self._inherited(former)
            if segment is None:
                leftovers.remove(former.token)
                if options["is_restart"]:
                    raise FlowNotRunning("its coordinator died while it stopped, or before it had begun", flow=name)
        self._is_heir = segment is not None
        me = Identity.mine()
        # In the name of the segment and of each semaphore: so whoever cleans up finds all of them.
        self._token = former.token if former is not None and segment is not None else os.urandom(6).hex()
        # Before anything is made under that name: else nobody would know what to remove.
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
        return segment

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

    def _begin_state(self, segment: Segment, state: dict[bytes, bytes | None]) -> list[Tenancy]:
        """Take over the state, or commit the first one; return which processes had a slot."""
        # By `time.monotonic_ns`, when the last coordinator left for us; 0 if it died, or there was none.
        self._left = segment.words[W_LEFT]
        self._pause: float | None = None  # seconds from then until we served
        self._writer = StoreWriter(segment, self._name)
        self._gate = GateKeeper(segment, self._token)
        tenancies: list[Tenancy] = []
        if self._is_heir:
            tenancies = take_over(segment, self._writer, self._gate, self._name, Identity.mine(), self._lease.go_on)
        else:
            self._writer.create()
            if state:
                self._writer.publish(state)
            segment.words[W_STATUS] = SERVING  # from here on the state is worth to be taken over
        self._marker = Marker(segment, end_child)
        self._marker.reset()
        return tenancies

    def _listen(self) -> tuple[socket.socket, bytes]:
        """Open the door; nobody is let in yet. Return the socket, and the key that newcomers must know."""
        authkey = self._lease.new_key()
        listener = handshake.listen(self._lease.place.socket)
        self._lease.note_door()
        sys.audit("strictflow_mp.start.listening")
        return listener, authkey

    def _open_sessions(
        self,
        segment: Segment,
        listener: socket.socket,
        authkey: bytes,
        options: dict[str, Any],
        tenancies: list[Tenancy],
    ) -> None:
        """Make room for processes; those that had a slot may come back to it."""
        owner = Identity(*options["owner"]) if options["owner"] else None
        welcome = {
            "segment": segment.name,
            "pid": os.getpid(),
            "identity": list(Identity.mine()),
            "owner": list(owner) if owner is not None and options["restart"] else None,
            "restarts": segment.words[W_RESTARTS],
            "max_pending": options["max_pending"],
            "gate_timeout": options["gate_timeout"],
        }
        store_owner(segment, owner, always=options["restart"])
        self._scheduler: Scheduler[Call] = Scheduler()
        self._sessions = Sessions(owner, options["linger"])
        self._slots = Slots(self._sessions, segment, self._gate, self._writer, self._scheduler.withdraw)
        self._admission = Admission(self._sessions, self._slots, listener, authkey, welcome, options["spare"])
        self._slots.expect(tenancies)
        watch()
        in_child(self._leave_to_parent)
        os.register_at_fork(before=self._hold_signals, after_in_parent=self._let_signals_in)

    def _make_loop(self, segment: Segment, options: dict[str, Any]) -> None:
        """Make what runs tasks, and have signals reach it."""
        assert self._admission is not None
        self._parts = parts = Parts(
            flow=self._name,
            segment=segment,
            writer=self._writer,
            reader=StoreReader(segment, Pins(segment, 0)),
            gate=self._gate,
            sessions=self._sessions,
            slots=self._slots,
            admission=self._admission,
            marker=self._marker,
            scheduler=self._scheduler,
            library=Library(self._name, self._lease.place),
            stepper=Stepper(self._sessions.epoll.fileno()),
        )
        self._loop = SFLoop(
            parts,
            Recorder(parts, self._lease.place.trace),
            task_timeout=options["task_timeout"],
            max_pending=options["max_pending"],
            report=self._report,
            is_at_home=self._is_at_home,
            reloads=Reloads(parts, lambda: self._pause),
        )
        flow_inside.enter(self._loop.inside)
        signal.set_wakeup_fd(self._sessions.wakeup_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: self._loop.stop())

    def run(self) -> None:
        """Serve until stopped, then remove everything."""
        if self._left:
            self._pause = (time.monotonic_ns() - self._left) / 1e9
        try:
            self._loop.run()
        except BaseException:
            # As after any other death: the last commit stands, and the next coordinator takes over.
            logger.critical("flow %r: the coordinator broke; please report this", self._name, exc_info=True)
            logging.shutdown()
            traceback.print_exc()  # whether or not anybody has set up logging
            outlet.drain(LAST_LINES_SECONDS)
            os._exit(BROKEN_EXIT_CODE)
        if self._loop.is_leaving:
            self._leave()
        self._loop.close()
        self._gate.stop()
        sys.audit("strictflow_mp.stop.stopped")
        self._loop.requests.answer_stops()
        self._sessions.flush(FAREWELL_SECONDS)
        self._remove()
        logger.info("flow %r has ended", self._name, extra={"version": self._writer.version})
        outlet.drain(LAST_LINES_SECONDS)

    def _leave(self) -> None:
        """End, and leave everything to the next coordinator, which our owner starts when we have ended."""
        assert self._segment is not None
        logger.info("flow %r: pid %d leaves for the next coordinator", self._name, os.getpid())
        leave(self._segment)
        sys.audit("strictflow_mp.reload.left")
        logging.shutdown()
        outlet.drain(LAST_LINES_SECONDS)
        os._exit(LEFT_EXIT_CODE)

    def _is_at_home(self) -> bool:
        """Whether whoever looks for this flow finds us; a lock that was removed is put back, if that is all.

        False only when that is seen: that we cannot look proves nothing.
        """
        assert self._segment is not None
        lease = self._lease
        if self._segment.is_named() and lease.has_door():
            if lease.is_held():
                return True
            try:
                if lease.put_back():
                    text = "flow %r: its lock file was removed, and is put back; see what removes files in %s"
                    logger.warning(text, self._name, lease.place.directory)
                    return True
            except OSError:
                return True  # out of descriptors, perhaps: we look again
        logger.critical(
            "flow %r: its files in %s, or its shared memory %s, were removed, so that no process can find it: it ends, "
            "and its state with it; see what removes them (RemoveIPC=yes of systemd-logind, a cleaner of /tmp)",
            self._name,
            lease.place.directory,
            self._segment.name,
        )
        return False

    def _hold_signals(self) -> None:
        """Before a fork: a SIGTERM that reaches the child before our handler is gone there would end nothing.

        A pool that is terminated sends one to children that have just begun, and then waits for them for ever.
        """
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))

    def _let_signals_in(self) -> None:
        mask, self._mask = self._mask, None
        if mask is not None:  # a fork of C's held none
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _leave_to_parent(self) -> None:
        """In a process that a task forked: the lock and the connections are its parent's, and end with it.

        From here on it is a process like any other: its handles are outside (`wire.inside`), and attach anew. It never
        comes back here: see `child`.
        """
        flow_inside.leave()
        assert self._admission is not None
        # Ours would stop a loop that does not run there, and write into our pipe. They are the main thread's to set,
        # which Python makes of the one that forks; a thread that C lets fork has to leave them as they are.
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)  # before its descriptor is closed, which might be another file's next
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
        self._let_signals_in()
        ours = (self._lease.fileno(), self._admission.door.listener.fileno(), *self._sessions.descriptors())
        for descriptor in ours:
            with suppress(OSError):
                os.close(descriptor)

    def _remove(self) -> None:
        if self._admission is not None:
            signal.set_wakeup_fd(-1)  # before its descriptor is closed, which might be another file's next
            self._slots.close()
            self._admission.door.close()
            self._sessions.shut()
            sys.audit("strictflow_mp.stop.closed")
        if self._segment is not None:
            self._segment.unlink()
            sys.audit("strictflow_mp.stop.unlinked")
        self._lease.leave()

    def _report(self) -> dict[str, Any]:
        """The fields of `FlowStats`."""
        return report(self._parts, self._loop.runner.counters, self._began).as_dict()
