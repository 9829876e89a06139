"""Check the models of this directory with spin: each must hold, and each of its mutants must fail.

    python models/check.py [name ...]        for example: flag resume

Prints one line for each model and mutant. Exit status: 0 all as it must be, 1 not, 2 spin or gcc is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
MODELS = ("flag", "reach", "waiting", "pins", "next", "resume")
DEPTH = 1_000_000
MEGABYTES = 1000
SECONDS = 120
AT_A_TIME = 2
MUTANT = re.compile(r"^#define\s+([A-Z0-9_]+)\s+([1-9]\d*)\s+/\*\s*(.*?)\s*\*/", re.MULTILINE)
FAILURES = ("assertion violated", "invalid end state", "acceptance cycle", "non-progress cycle")


class Result(NamedTuple):
    """What one search found."""

    states: int
    seconds: float
    failure: str
    problem: str  # why the search proves nothing; empty if it was exhaustive


def run(command: list[str], directory: str) -> str:
    """Run a tool; return what it says."""
    done = subprocess.run(
        command,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.stdout


def search(model: Path, mutant: str) -> Result:
    """Search all states of a model, or those of a mutant up to its first failure."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(model, directory)
        said = run(["spin", "-a", *([f"-DMUTANT={mutant}"] if mutant else []), model.name], directory)
        if not (Path(directory) / "pan.c").exists() or "rror" in said:
            raise SystemExit(f"{model.name}: spin: {said}")
        # A mutant's search is short: there the compiler's work is what takes time.
        options = ["-O0" if mutant else "-O2", "-w", "-DSAFETY", f"-DMEMLIM={MEGABYTES}"]
        said = run(["gcc", *options, "-o", "pan", "pan.c"], directory)
        if not (Path(directory) / "pan").exists():
            raise SystemExit(f"{model.name}: gcc: {said}")
        said = run(["./pan", f"-m{DEPTH}", "-w20"], directory)
    states = re.search(r"(\d+) states, stored", said)
    errors = re.search(r"errors: (\d+)", said)
    if states is None or errors is None:
        raise SystemExit(f"{model.name} {mutant}: the verifier says: {said}")
    failure = next((kind for kind in FAILURES if kind in said), "") if int(errors[1]) else ""
    problem = ""
    if int(errors[1]) and not failure:
        problem = said.splitlines()[0]
    elif not failure:
        for word in ("max search depth too small", "out of memory", "Search not completed", "bit statespace"):
            if word in said:
                problem = word
    return Result(int(states[1]), time.monotonic() - began, failure, problem)


def check(name: str) -> bool:
    """Check a model and its mutants; say how it went."""
    model = HERE / f"{name}.pml"
    head = model.read_text().partition("#ifndef MUTANT")[0]
    is_right = True
    for mutant in ("", *(match[1] for match in MUTANT.finditer(head))):
        found = search(model, mutant)
        right = not found.problem and bool(found.failure) == bool(mutant)
        is_right &= right
        mark, what = "ok  " if right else "BAD ", found.problem or found.failure or "holds"
        took = f"{found.states:9,d} states {found.seconds:6.1f} s"
        print(f"{mark} {name:8} {mutant or '-':24} {took}  {what}", flush=True)
    return is_right


def main(names: list[str]) -> int:
    """Check the models of these names, or all."""
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            print(f"{tool} is not installed; on Debian: apt-get install spin gcc", file=sys.stderr)
            return 2
    unknown = set(names) - set(MODELS)
    if unknown:
        print(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}", file=sys.stderr)
        return 1
    # Two at a time: what takes time is another process. The longest first.
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        verdicts = list(pool.map(check, names or reversed(MODELS)))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
