"""The library: the modules that functions of processes have had this coordinator load, and whose they are.

Owns: the file ``code`` of the place: a JSON object, by module the file and the digest of what is loaded here.
Written by: SF-LOOP's thread, after a function has been loaded and before any call of it runs; replaced as a whole.
Read by: a process that is about to introduce a function (`client.introducing`): what it has otherwise travels by value.
Order: the modules are loaded, then compared with what the process says that it has (`wire.origins`), then told of. Two
    processes may name the same new module before it has been told of: then the first one's is loaded, and calls of the
    other's function fail with a word, until it introduces that again.
If we die here: the next coordinator removes the file before it listens, for it has loaded nothing.
Invariants: no function is called whose modules are not those of the process that sent it. The first process that names
    a module has it loaded from where that process would load it, whatever comes first on our own path.

The protocol: docs/protocols/loop.md.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..core import logger
from ..wire.origins import differs, look
from .calls import Broken

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..system.place import Place
    from ..wire.origins import Entry

__all__ = ["Library"]

TICK_NS = 10_000_000
"""How old the times are, at most, that the kernel gives to files."""


class Library:
    """What is loaded here."""

    def __init__(self, flow: str, place: Place) -> None:
        self._flow = flow
        self._place = place
        # By module, file and digest, as the file of the place says it.
        self._told: dict[str, tuple[str, str]] = {}

    @contextmanager
    def loading(self, entries: tuple[Entry, ...], path: list[str]) -> Iterator[None]:
        """In here modules that are new are looked for where the process looks, in its order."""
        new = [name for name, _, _ in entries if name not in sys.modules]
        if not new:
            yield
            return
        before, began = sys.path[:], time.time_ns() - TICK_NS
        sys.path[:] = path + [entry for entry in before if entry not in set(path)]
        during = set(sys.path)
        try:
            yield
        finally:
            sys.path[:] = before + [entry for entry in sys.path if entry not in during]
            for name in new:
                look(name, began)

    def compare(self, entries: tuple[Entry, ...]) -> str:
        """Why the code of a process is not what is loaded here; "" when it is, or is not loaded here at all."""
        why = ""
        for name, file, digest in entries:
            seen = look(name)
            if seen is None:
                continue
            if not why and differs(seen, file, digest):
                what = "is another file" if seen.file != file else "has changed since the coordinator loaded it"
                why = f"module {name!r} {what}: {file} in the process that called it, {seen.file} in the coordinator"
            self._told.setdefault(name, (seen.file, seen.digest.hex()))
        return why

    def vet(self, name: str, target: Any, entries: tuple[Entry, ...]) -> tuple[Any, bool]:
        """The function, if its code is that of its process; else what says that it is not. And whether it is."""
        known = len(self._told)
        why = self.compare(entries)
        if len(self._told) != known:
            self.tell()  # before it is called, and before its process is told
        if not why:
            return target, True
        logger.warning("flow %r: %s() is not called: %s", self._flow, name, why, extra={"task": name})
        return Broken(
            f"{name}() was not called, for the coordinator has other code under its name: {why}. Call it again, and it "
            f"travels by value; `strictflow-mp reload {shlex.quote(self._flow)}` (flow.reload()) loads all modules "
            "anew; modules of different programs need different names"
        ), False

    def tell(self) -> None:
        """Tell processes what is loaded here."""
        fresh = self._place.code.with_name("code.new")
        try:
            with open(fresh, "w", encoding="utf-8", errors="surrogatepass", opener=_private) as file:
                json.dump(self._told, file)
            os.replace(fresh, self._place.code)
        except OSError as error:  # then they find out by a call that fails
            about: dict[str, Any] = {"flow": self._flow, "error": type(error).__name__}
            logger.warning("flow %r: which modules are loaded cannot be told: %s", self._flow, error, extra=about)

    def __repr__(self) -> str:
        return f"<Library of {len(self._told)} modules>"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
