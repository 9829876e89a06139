"""A server process, and HTTP to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from strictflow_mp import StrictFlow

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = README.parent / "examples" / "servers"
PATIENCE = 30.0


class Server:
    """A server process, and HTTP to it."""

    def __init__(self, popen: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.popen = popen
        self.pid = popen.pid
        self.port = port
        self._log = log

    def says(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    def ask(self, path: str = "/", method: str = "GET", timeout: float = PATIENCE) -> Any:
        """The answer to a request on a connection of its own, so that any worker may take it."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, headers={"Connection": "close"})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status != 200:  # as when the worker was told to give up
            raise HTTPException(f"{answer.status}: {text}")
        return json.loads(text)

    def tries(self, path: str = "/", method: str = "GET") -> Any:
        """As `ask`, or None when nobody answers."""
        try:
            return self.ask(path, method)
        except (OSError, HTTPException):
            return None

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and say how it ended."""
        self.popen.send_signal(number)
        return self.popen.wait(PATIENCE)


def pids_that_answer(server: Server, path: str, least: int, eventually: Callable[..., Any]) -> set[int]:
    """The workers that answer, when there are that many."""
    seen: set[int] = set()
    eventually(lambda: seen.add(server.ask(path)["pid"]) or len(seen) >= least, PATIENCE)
    return seen


def slots(flow: StrictFlow) -> set[int]:
    """Processes that are attached, beside the coordinator and this one."""
    return {worker.pid for worker in flow.stats().workers} - {os.getpid(), flow.stats().coordinator_pid}


def at_once(server: Server, path: str, number: int, together: int = 16) -> list[Any]:
    """That many answers to requests of which so many are under way at a time. Each must be answered."""
    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(server.ask, [path] * number))
