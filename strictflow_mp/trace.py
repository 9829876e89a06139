"""`Trace`: a recording of a run, as `StrictFlow.trace` returns it.

``python -m strictflow_mp.trace PATH`` writes the trace of a process that died before it did that itself.
"""

from __future__ import annotations

import os
import sys

from . import wire
from .client import Client
from .errors import CoordinatorLost, FlowNotRunning, StrictFlowError
from .parts import merge, prepare
from .segment import W_TRACE

__all__ = ["Trace"]


class Trace:
    """A recording that goes on until it is closed; a context manager.

    The trace is written when it is closed. If this process dies before, the recording ends, and
    ``python -m strictflow_mp.trace PATH`` makes a trace of what there is.

    Attributes:
        path: where it is written.
        events: how many events it has, once it is closed.
    """

    def __init__(self, client: Client, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.events = 0
        self._client = client
        self._is_open = False
        if client.attach().words[W_TRACE]:
            raise StrictFlowError("its run is being recorded already; close that trace first", flow=client.name)
        self._directory = prepare(self.path)
        try:
            client.ask(wire.TRACE, self._directory, True)
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
            self._client.ask(wire.TRACE, self._directory, False, attach=0)
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
