"""Starting: a coordinator in a fresh interpreter, and the wait until it serves or says why not.

The protocol: docs/protocols/meeting.md.
"""

from __future__ import annotations

import os
import pickle
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import configured_level
from ..errors import FlowNotRunning, StrictFlowError
from ..system.descriptors import fill_standard
from ..system.identity import Identity
from ..system.launch import Child, launch
from ..system.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["END_SECONDS", "start_coordinator"]

START_SECONDS = 30.0
"""Seconds that a coordinator may take to start, or in which a takeover may make no progress."""
END_SECONDS = 15.0
"""Seconds that it may take to end after its last task."""


def start_coordinator(name: str, options: dict[str, Any], began: Callable[[Child], None] | None = None) -> Child:
    """Start a coordinator; return when it serves.

    Args:
        began: told of the process as soon as there is one.

    Raises:
        FlowExists: one lives under that name.
        StateFull: there is no room for the first state.
    """
    fill_standard()  # the pipe must not become anybody's standard output
    readable, writable = os.pipe()
    try:
        me = Identity.mine()
        child = launch(
            "strictflow_mp.coordinator.main:main",
            {
                **options,
                "name": name,
                "ready": writable,
                "owner": tuple(me),
                "log_level": configured_level(),
            },
            pass_fds=(writable,),
        )
        if began is not None:
            began(child)
        os.close(writable)
        writable = -1
        answer = _read_answer(readable, START_SECONDS, Place(Path(options["place"])).sign_of_life)
    except StrictFlowError as refusal:
        raise refusal.of(name) from None
    finally:
        os.close(readable)
        if writable >= 0:
            os.close(writable)
    if answer == b"":
        code = child.wait(END_SECONDS)
        if code is None:
            child.kill()
            child.wait()
        raise FlowNotRunning(
            f"its coordinator did not start (exit code {code}); its standard error says why", flow=name
        )
    error = pickle.loads(answer)
    if error is not None:
        child.wait(END_SECONDS)
        raise error.of(name)
    return child


def _read_answer(descriptor: int, patience: float, sign_of_life: Callable[[], int]) -> bytes:
    """What a coordinator that starts has written, until it closed the pipe.

    Nothing when *patience* seconds have passed in which *sign_of_life* did not move: that of a takeover does.
    """
    received: list[bytes] = []
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    last, deadline = sign_of_life(), time.monotonic() + patience
    while True:
        # Twice for each patience, so that a sign which came just after a look is seen in time.
        if not poll.poll(min(max(0.0, deadline - time.monotonic()), patience / 2) * 1000):
            sign = sign_of_life()
            if sign != last:
                last, deadline = sign, time.monotonic() + patience
            elif time.monotonic() >= deadline:
                return b""
            continue
        block = os.read(descriptor, 1 << 16)
        if not block:
            return b"".join(received)
        received.append(block)
