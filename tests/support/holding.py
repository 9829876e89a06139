"""A P1 that runs for as long as a test needs it, and how to see that somebody waits for it."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from strictflow_mp import StrictFlow, TaskFuture, write
from strictflow_mp.system.place import Place

LISTENING = 0x10000
"""In the flags of a socket (`__SO_ACCEPTCON` of the kernel)."""


@contextmanager
def held(flow: StrictFlow, **changes: Any) -> Iterator[TaskFuture[None]]:
    """A P1 that makes these changes runs in SF-LOOP until the block ends."""
    with tempfile.TemporaryDirectory() as directory:
        fifo = os.path.join(directory, "fifo")
        os.mkfifo(fifo)

        @write(flow)
        def hold() -> None:
            flow.state.update(changes)
            with open(fifo, "rb") as file:
                file.read()

        future = hold()
        with open(fifo, "wb"):  # opens when the task has opened it too
            yield future


def has_a_sleeping_reader(flow: StrictFlow) -> bool:
    """Whether a thread of this process waits at the gate."""
    attachment = flow._client.attach()
    return bool(attachment.segment.words[attachment.segment.waiting + attachment.slot])


def stand_at_the_door(name: str) -> int:
    """How many have connected to the coordinator's socket, whether or not they were accepted."""
    path = str(Place.of(name).socket)
    with open("/proc/net/unix") as file:
        sockets = [line.split() for line in file if line.rstrip().endswith(path)]
    return sum(int(flags, 16) & LISTENING == 0 for _, _, _, flags, *_ in sockets)


def is_inside(thread: threading.Thread, function: str) -> bool:
    """Whether a thread is in a function of that name, or in what that calls."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False
