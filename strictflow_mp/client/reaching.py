"""Reaching: how a process connects to the coordinator of a flow, the first time or again after a restart.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

from .. import errors
from ..core import logger
from ..errors import FlowNotRunning, ProtocolError, TooManyWorkers
from ..system.descriptors import fill_standard
from ..system.identity import Identity, beginning_of
from ..system.paths import fitting, own_path
from ..system.place import Place
from ..system.shortage import is_shortage
from ..wire import frames
from ..wire.stream import Stream

__all__ = ["LEAST_PATIENCE_SECONDS", "LET_IN_SECONDS", "Pauses", "Refusal", "reach", "take_leave", "try_to_reach"]

LET_IN_SECONDS = 60.0
"""Seconds that the handshake may take: SF-LOOP has no time for it while a P1 runs."""
LEAST_PATIENCE_SECONDS = 0.005
"""Seconds that it may take in any case, also when the time is over."""
NEXT_SECONDS = 10.0
"""Seconds in which the next coordinator must appear when the one at whose door we stood has gone."""
FIRST_PAUSE_SECONDS = 0.004
"""Seconds between the first two looks whether there is a coordinator."""
LONGEST_PAUSE_SECONDS = 0.04
"""Seconds between later ones: what a process that waits may come late, beside the 0.1 s that a coordinator takes to
start."""
PAUSE_GROWTH = 1.25


class Refusal(TooManyWorkers):
    """A coordinator has not the means to let us in just now. It may have them soon."""


class Pauses:
    """Sleeps between looks whether there is a coordinator: longer and longer, and each process at its own times.

    Whoever waits must leave the processor to what it waits for: many wait at a time.
    """

    def __init__(self) -> None:
        # Of the next sleep, before chance has its part in it.
        self._seconds = FIRST_PAUSE_SECONDS

    def sleep(self, deadline: float | None = None) -> None:
        """Sleep, but not past *deadline*."""
        seconds = self._seconds * (0.5 + os.urandom(1)[0] / 255)
        if deadline is not None:
            seconds = min(seconds, max(0.0, deadline - time.monotonic()))
        time.sleep(seconds)
        self._seconds = min(LONGEST_PAUSE_SECONDS, self._seconds * PAUSE_GROWTH)

    def __repr__(self) -> str:
        return f"<Pauses, about {self._seconds:g} s>"


def reach(
    name: str,
    timeout: float,
    opened: list[socket.socket],
    patience: float = LET_IN_SECONDS,
    place: Place | None = None,
    waited: float = 0.0,
) -> tuple[Stream, dict[str, Any]]:
    """Connect to a flow's coordinator; return the connection and its welcome.

    One that dies while we stand at its door is followed by the next one, for which we wait as those do that were in.

    Args:
        timeout: seconds in which one must appear.
        opened: takes what is connected, to `take_leave` of it when an exception comes before it is used.
        patience: seconds that all may take, when somebody is there all the time but lets nobody in; longer only
            while a takeover goes on.
        place: where the flow is, if that is known already.
        waited: seconds that the caller has waited before, to be told with ours.

    Raises:
        FlowNotRunning: none appeared in time, or the one that is there runs a P1 task all the time.
        TooManyWorkers, ProtocolError: it does not take us.
        OSError: this process is out of descriptors.
    """
    place = place or Place.of(name)
    now = time.monotonic()
    began = now - waited
    latest = now + max(patience, timeout)
    deadline = min(now + timeout, latest)
    pauses = Pauses()
    sign = 0  # of a takeover, when it was last looked for
    while True:
        met = len(opened)
        reached = refusal = None
        try:
            reached = try_to_reach(name, patience=max(latest - now, LEAST_PATIENCE_SECONDS), opened=opened, place=place)
        except Refusal as error:
            refusal = error
        if reached is not None:
            return reached
        now = time.monotonic()
        if refusal is not None:
            if now >= deadline:
                raise TooManyWorkers(f"{refusal} (waited {now - began:.3g} s)", flow=name) from None
        elif len(opened) > met or (now >= deadline and timeout > 0 and place.is_inhabited()):
            # Somebody was there, and has gone; or is there, and does not listen yet (a takeover).
            former, sign = sign, place.sign_of_life()
            if now >= latest and timeout > 0 and sign not in (former, 0):
                latest = now + NEXT_SECONDS  # that goes on
            if now >= latest:
                raise _kept_waiting(name, now - began)
            if timeout > 0:
                deadline = min(now + max(timeout, NEXT_SECONDS), latest)
        elif now >= deadline:
            raise FlowNotRunning(
                f"no coordinator serves it (waited {now - began:.3g} s); start it with `with flow:` or "
                f"`strictflow-mp serve {name}`, or check the name",
                flow=name,
            )
        pauses.sleep(deadline)


def try_to_reach(
    name: str,
    resume: tuple[int, int, int] | None = None,
    patience: float = LET_IN_SECONDS,
    opened: list[socket.socket] | None = None,
    place: Place | None = None,
) -> tuple[Stream, dict[str, Any]] | None:
    """Try once; None when nobody is there, or it ended half-way.

    Args:
        resume: slot and tenant number that a former coordinator of the flow gave us, and the ticket of our first P1
            that it did not answer (0: none).
        patience: seconds that the handshake may take.
        opened: as in `reach`. What it takes was accepted, whatever came of it: somebody was there.

    Raises:
        TooManyWorkers, ProtocolError, CoordinatorLost: it does not take us.
        Refusal: it has not the means just now.
        FlowNotRunning: it has no time for us, and this was the first time.
        OSError: this process is out of descriptors.
    """
    from ..wire import handshake  # multiprocessing.connection takes 8 ms to import

    place = place or Place.of(name)
    began = time.monotonic()
    try:
        place.check()
        authkey = place.authkey()
    except FileNotFoundError:
        return None
    fill_standard()  # neither the connection nor the segment may become somebody's standard output
    try:
        # The caller takes leave of what is opened, whatever comes.
        sock = handshake.connect(place.socket, authkey, patience, opened)
    except handshake.Refused as refusal:
        raise Refusal(f"its coordinator cannot let anybody in: {refusal}") from None
    except (FileNotFoundError, ConnectionError):
        return None
    except (BlockingIOError, TimeoutError):  # nobody has accepted us in time; or the backlog is full
        if resume is None and time.monotonic() - began >= patience:
            raise _kept_waiting(name, time.monotonic() - began) from None
        return None
    except ProtocolError:
        try:
            if place.authkey() == authkey:
                raise
        except FileNotFoundError:
            pass
        return None  # the next coordinator was just moving in
    greeting = {
        "protocol": frames.PROTOCOL,
        "identity": Identity.mine(),
        "beginning": beginning_of(os.getpid()),
        "python": sys.version_info[:2],
        "path": _path_to_tell(name),
        "resume": resume,
    }
    leave = take_leave if resume is None else socket.socket.close  # a process that comes back keeps its slot
    try:
        welcome = handshake.greet(sock, greeting, max(began + patience - time.monotonic(), LEAST_PATIENCE_SECONDS))
        if "refused" in welcome:
            kind = getattr(errors, str(welcome["refused"]), ProtocolError)
            raise kind(str(welcome.get("text")), flow=name)
        welcome["told_path"] = greeting["path"]
        return Stream(sock), welcome
    except (OSError, EOFError) as error:
        leave(sock)
        if is_shortage(error):
            raise
        if resume is None and isinstance(error, (BlockingIOError, TimeoutError)):
            raise _kept_waiting(name, time.monotonic() - began) from None
        return None
    except BaseException:
        leave(sock)
        raise


def _path_to_tell(name: str) -> list[str]:
    """Where we look for modules, as far as a greeting has room for it."""
    from ..wire.handshake import MAX_PATH_BYTES, MAX_PATHS  # as in `try_to_reach`

    whole = own_path()
    told = fitting(whole, MAX_PATHS, MAX_PATH_BYTES)
    if len(told) < len(whole):
        text = "flow %r: its coordinator looks for modules in %d of the %d entries of sys.path that this process has"
        logger.warning(text, name, len(told), len(whole), extra={"flow": name})
    return told


def take_leave(sock: socket.socket) -> None:
    """Close a connection of which nothing is used.

    The coordinator may have let us in already, and would keep the slot for as long as this process lives, unless it
    hears that the slot is not touched.
    """
    try:
        sock.setblocking(False)
        sock.send(frames.pack_frame(frames.GOODBYE))
    except OSError:
        pass  # it has closed its end, and knows
    sock.close()


def _kept_waiting(name: str, seconds: float) -> FlowNotRunning:
    return FlowNotRunning(
        f"its coordinator has let nobody in for {seconds:.3g} s: a P1 task runs in it all the time, or it has been "
        "stopped (SIGSTOP); shorten the task, or give it a timeout=",
        flow=name,
    )
