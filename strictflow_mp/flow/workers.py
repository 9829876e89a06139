"""Workers: processes that a flow starts and watches.

Each is a fresh interpreter, so it starts from anywhere and shares no lock and no descriptor with its parent.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Literal

import cloudpickle

from ..core import configured_level, logger, setup_logging
from ..system.launch import Child, launch, let_interrupts_in, wait_for_end
from ..wire import functions
from ..wire.byvalue import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Restart", "Worker", "WorkerGroup", "main"]

Restart = Literal["never", "on-failure", "always"]

WORKER_PAUSE_SECONDS = 0.1
"""Seconds before the first restart of a worker; doubled each time, up to LONGEST_PAUSE_SECONDS."""
LONGEST_PAUSE_SECONDS = 5.0
"""A worker that has run for longer than these begins with the shortest pause again."""
TERMINATE_SECONDS = 5.0
"""Seconds between SIGTERM and SIGKILL."""


class Worker:
    """One worker process."""

    def __init__(self, child: Child, name: str, number: int) -> None:
        # The process that was started last; it may have ended. Replaced by the supervisor alone.
        self._child = child
        self.name = name
        self.number = number  # from 1 on; the same after a restart
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._child.pid

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._child.exitcode

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.exitcode is None

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._child.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._child.kill()

    def __repr__(self) -> str:
        return f"<Worker {self.name} pid={self.pid} exitcode={self.exitcode}>"


class WorkerGroup:
    """The worker processes of one `StrictFlow.spawn`. Iterate over it for the workers.

    A context manager: leaving it joins, or terminates when an exception leaves it.
    """

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], processes: int, restart: Restart) -> None:
        if restart not in ("never", "on-failure", "always"):
            raise ValueError(f'restart must be "never", "on-failure" or "always", not {restart!r}')
        if processes < 1:
            raise ValueError(f"processes must be at least 1, not {processes}")
        by_value, code, *_ = functions.encode(target)
        # Target and arguments as they were when the group was made: a worker that is restarted gets the same.
        self._message = {"by_value": by_value, "code": code}
        self._args = args
        self._is_numbered = _takes_number(target, args)
        self._label = getattr(target, "__name__", "worker")
        self._restart = restart
        self._ending = threading.Event()  # set for good by `terminate`: nobody is restarted after that
        self._supervisor: threading.Thread | None = None  # None: nobody is restarted
        self.workers: list[Worker] = []  # by number; the list is not changed when all have been started
        try:
            for number in range(1, processes + 1):
                name = f"{self._label}-{number}"
                self.workers.append(Worker(self._launch(name, number), name, number))
        except BaseException:
            self.terminate()
            raise
        if restart != "never":
            self._wakeup, self._wake = socket.socketpair()  # both are closed by the supervisor when it ends
            self._supervisor = threading.Thread(target=self._supervise, name="strictflow-supervisor", daemon=True)
            self._supervisor.start()

    def _launch(self, name: str, number: int) -> Child:
        args = (number, *self._args) if self._is_numbered else self._args
        message = {
            **self._message,
            "args": dumps(args),
            "name": name,
            "log_level": configured_level(),
        }
        return launch("strictflow_mp.flow.workers:main", message)

    def _supervise(self) -> None:
        with self._wakeup, self._wake:
            self._restart_those_who_end()

    def _restart_those_who_end(self) -> None:
        pauses = dict.fromkeys(self.workers, WORKER_PAUSE_SECONDS)
        began = {worker: time.monotonic() for worker in self.workers}
        watched = set(self.workers)
        while watched and wait_for_end([worker._child for worker in watched], self._wakeup.fileno()):
            for worker in list(watched):
                code = worker.exitcode
                if code is None:
                    continue
                if code == -signal.SIGINT or (code == 0 and self._restart == "on-failure"):
                    watched.discard(worker)
                    continue
                if time.monotonic() - began[worker] > LONGEST_PAUSE_SECONDS:
                    pauses[worker] = WORKER_PAUSE_SECONDS
                if self._ending.wait(pauses[worker]):
                    return
                pauses[worker] = min(LONGEST_PAUSE_SECONDS, pauses[worker] * 2)
                worker.restarts += 1
                about = {"peer": worker.pid, "exit_code": code, "restarts": worker.restarts}
                logger.warning(
                    "worker %s (pid %d) ended with %s: restarted", worker.name, worker.pid, code, extra=about
                )
                worker._child = self._launch(worker.name, worker.number)
                began[worker] = time.monotonic()

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to *timeout* seconds until all have ended (and none will be restarted); whether they have."""
        deadline = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        if self._supervisor is not None:
            self._supervisor.join(left())
            if self._supervisor.is_alive():
                return False
        ended = [worker._child.wait(left()) for worker in self.workers]
        return None not in ended

    def terminate(self) -> None:
        """End them all: SIGTERM, and after five seconds SIGKILL. None is restarted."""
        self._ending.set()
        # The supervisor first: as long as it runs, it may put another process in a worker's place.
        if self._supervisor is not None:
            try:
                self._wake.send(b"\0")
            except OSError:
                pass  # it has ended, and closed it
            self._supervisor.join()
        for worker in self.workers:
            worker.terminate()
        deadline = time.monotonic() + TERMINATE_SECONDS
        for worker in self.workers:
            if worker._child.wait(max(0.0, deadline - time.monotonic())) is None:
                worker.kill()
                worker._child.wait()

    @property
    def exitcodes(self) -> list[int | None]:
        """The exit code of each worker, None for those that run."""
        return [worker.exitcode for worker in self.workers]

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers)

    def __len__(self) -> int:
        return len(self.workers)

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        if kind is not None:
            self.terminate()
        else:
            self.join()

    def __repr__(self) -> str:
        return f"<WorkerGroup {self._label}: {self.exitcodes}>"


def _takes_number(target: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the target takes just one argument more than there are: then it is given its number."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(*args)
    except TypeError:
        pass
    else:
        return False
    try:
        signature.bind(0, *args)
    except TypeError:
        return False
    return True


def main(message: dict[str, Any]) -> None:
    """Where a worker process begins (`system.launch.launch`)."""
    multiprocessing.current_process().name = message["name"]
    if message["log_level"] is not None:
        setup_logging(message["log_level"])
    try:
        let_interrupts_in()
        _, target = functions.decode(message["by_value"], message["code"])
        args = cloudpickle.loads(message["args"])
        target(*args)
    except KeyboardInterrupt:
        # Ctrl-C reaches the whole process group: end by the same signal, without a traceback for each worker.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        traceback.print_exc()
        if sys.stderr is not None:  # it is None where the parent keeps the descriptor to itself
            sys.stderr.flush()
        raise SystemExit(1) from None
