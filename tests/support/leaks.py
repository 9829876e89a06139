"""What a test leaves behind on the machine: shared memory, semaphores, processes, files.

How things are attributed to a test:

- A process is the test's when its environment names the test's runtime directory, or when it descends from
  this process and was not there before. (A forked child shows the environment that this process was started
  with, so the first rule does not find it. A fork that is an orphan besides is found by neither.)
- A shared object is the test's when it was not there before. That alone would blame, and remove, what another
  suite on this machine creates meanwhile (or another worker of this one); so an object is left alone that somebody
  else has mapped, or that belongs to a flow in the runtime directory of another test.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import TypeVar

import psutil

VARIABLE = "STRICTFLOW_MP_DIR"
PREFIX = "sf-"
"""How the names of the runtime directories begin."""
SHARED = Path("/dev/shm")
T = TypeVar("T")


def wait_for(predicate: Callable[[], T], timeout: float, pause: float = 0.005) -> T:
    """Call *predicate* until it returns something true or *timeout* seconds have passed; its last answer."""
    deadline = time.monotonic() + timeout
    while not (answer := predicate()) and time.monotonic() < deadline:
        time.sleep(pause)
    return answer


class Watch:
    """Remembers how the machine looks before a test, and tells what is new after it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shared = _shared_objects()
        self._children = set(psutil.Process().children(recursive=True))

    def __repr__(self) -> str:
        return f"<Watch on {self.directory}: {self.report() or 'nothing left'}>"

    def processes(self) -> list[psutil.Process]:
        ours = set(psutil.Process().children(recursive=True)) - self._children
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get(VARIABLE) == str(self.directory):
                ours.add(process)
        return sorted((p for p in ours if p.pid != os.getpid()), key=lambda p: p.pid)

    def shared(self) -> list[str]:
        if not (new := _shared_objects() - self._shared):
            return []
        mapped, known = _mapped_by_others(self.processes()), _tokens_but_in(self.directory)
        return sorted(name for name, inode in new if inode not in mapped and not any(token in name for token in known))

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.rglob("*") if not path.is_dir())

    def report(self) -> list[str]:
        """A line for each thing left."""
        return [
            *map(_describe, self.processes()),
            *(f"{_kind(name)} {SHARED / name}" for name in self.shared()),
            *(f"file {path}" for path in self.files()),
        ]

    def left(self, timeout: float) -> list[str]:
        """The report, once it is empty or *timeout* seconds have passed: what is just ending may end."""
        report: list[str] = []

        def nothing() -> bool:
            report[:] = self.report()
            return not report

        wait_for(nothing, timeout, pause=0.02)
        return report

    def clean(self) -> None:
        """Remove by force whatever is left."""
        for _ in range(5):  # one that is killed may just have started another
            if not (processes := self.processes()):
                break
            for process in processes:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            psutil.wait_procs(processes, timeout=5)
        for name in self.shared():
            (SHARED / name).unlink(missing_ok=True)
        for path in self.files():
            path.unlink(missing_ok=True)


def _shared_objects() -> set[tuple[str, int]]:
    """Name and inode of each."""
    if not SHARED.is_dir():
        return set()
    with os.scandir(SHARED) as entries:
        ours = [entry for entry in entries if entry.name.startswith(("sfmp-", "sem.sfmp-"))]
        return {(entry.name, entry.inode()) for entry in ours if not entry.is_dir()}


def _mapped_by_others(ours: list[psutil.Process]) -> set[int]:
    """Inodes of the shared objects mapped by processes that have nothing to do with this test.

    Not names: who created a semaphore has it mapped under the name that it had before it was complete.
    """
    number = SHARED.stat().st_dev
    device = f"{os.major(number):02x}:{os.minor(number):02x}"  # a path would look different from within a chroot
    known = {process.pid for process in ours} | {os.getpid()}
    inodes = set()
    for pid in set(psutil.pids()) - known:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue  # it has ended, or is not ours to look at
        fields = [line.split(maxsplit=5) for line in maps.splitlines()]
        inodes |= {int(inode) for _, _, _, where, inode, *_ in fields if where == device}
    return inodes


def _tokens_but_in(directory: Path) -> set[str]:
    """The tokens in the names of the shared objects of flows in other tests' directories."""
    tokens = set()
    # Not pathlib's: a directory that is removed meanwhile is no error.
    for lock in map(Path, glob(f"{directory.parent}/{PREFIX}*/*/lock")):
        try:
            if directory not in lock.parents and (found := re.search(r'"token": "(\w+)"', lock.read_text())):
                tokens.add(found[1])
        except OSError:
            pass  # it has ended
    return tokens


def _kind(name: str) -> str:
    return "semaphore" if name.startswith("sem.") else "segment"


def _describe(process: psutil.Process) -> str:
    try:
        status = process.status()
        what = process.name() if status == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.Error:
        return f"process {process.pid} (ending)"
    return f"process {process.pid} ({status}): {what}"
