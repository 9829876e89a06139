"""Start-up. The interpreters find compiled modules, as those of an installed package do."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import strictflow_mp
from strictflow_mp import StrictFlow

from .measure import Bound, Outcome, Size, duration, figure
from .peers import NAME

IMPORT = "import time; t = time.perf_counter(); import strictflow_mp; print(time.perf_counter() - t)"


@contextmanager
def compiled() -> Iterator[None]:
    """Let the interpreters that are started meanwhile keep compiled modules, in a directory of our own."""
    former = {name: os.environ.pop(name, None) for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-pyc-") as directory:
        os.environ["PYTHONPYCACHEPREFIX"] = directory
        is_off, sys.dont_write_bytecode = sys.dont_write_bytecode, False  # a coordinator has the flags of its parent
        try:
            yield
        finally:
            sys.dont_write_bytecode = is_off
            del os.environ["PYTHONPYCACHEPREFIX"]
            os.environ.update({name: value for name, value in former.items() if value is not None})


def fresh(code: str) -> str:
    """Run code in a fresh interpreter; what it printed."""
    path = str(Path(strictflow_mp.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def milliseconds(measure: Callable[[], float], size: Size) -> Outcome:
    """The milliseconds of *measure* (which returns seconds), in turns with an interpreter that does nothing."""
    values, nothing = [], []
    with compiled():
        measure()
        for _ in range(size.repetitions):
            values.append(measure() * 1000)
            began = perf_counter()
            fresh("pass")
            nothing.append(perf_counter() - began)
    peer = f"python -c pass {duration(statistics.median(nothing))}"
    return Outcome(values, duration(statistics.median(values) / 1000), peer)


@figure("start_loop() to the first answer", Bound("≤", 120), "ms")
def first_answer(size: Size) -> Outcome:
    """A new flow: from `start_loop` until the result of a first P1 has arrived. Beside it, for scale, a fresh
    interpreter that does nothing, from its start to its end."""

    def measure() -> float:
        flow = StrictFlow(state={"config": 1})
        began = perf_counter()
        flow.start_loop()
        try:
            flow.put("config", 2).result()
            return perf_counter() - began
        finally:
            flow.stop_loop()

    return milliseconds(measure, size)


@figure("import strictflow_mp", Bound("≤", 40), "ms")
def importing(size: Size) -> Outcome:
    """The statement alone, as a fresh interpreter takes it."""
    return milliseconds(lambda: float(fresh(IMPORT)), size)
