"""Check the litmus tests of `litmus/` with herd7: each must say Never, and each of its twins Sometimes.

    python models/litmus.py [name ...]        for example: gate-wait pin-take

A litmus test is a step of a protocol in a few instructions of ARM64, and an outcome that may not be. A **twin** is the
same test with one of them taken out or replaced: a fence that is not needed would have a twin that says Never. The
comment at the head of each file has its twins, one a line:

    twin NAME: P1: DMB ISH/2 => nothing; what that stands for         (/2: the second of them in that column)

Every DMB of a test must have a twin. Prints one line for each test and twin. Exit status: 0 all as it must be, 1 not,
2 herd7 is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent / "litmus"
SECONDS = 60
TWIN = re.compile(r"^ *twin ([A-Z_]+): P(\d): (.+?)(?:/(\d))? => (.+?); ", re.MULTILINE)
OBSERVATION = re.compile(r"^Observation (\S+) (Never|Sometimes|Always) \d+ (\d+)$", re.MULTILINE)


class Twin(NamedTuple):
    """A test with one instruction less, or another one."""

    name: str
    column: int
    instruction: str
    which: int
    """Of those that are the same, from 1."""
    instead: str
    """What stands in its place; empty for nothing."""


def names() -> list[str]:
    """All the tests that there are."""
    return sorted(path.stem for path in HERE.glob("*.litmus"))


def twins_of(text: str) -> list[Twin]:
    """The twins that a test's comment names."""
    return [
        Twin(name, int(column), instruction, int(which or 1), "" if instead == "nothing" else instead)
        for name, column, instruction, which, instead in TWIN.findall(text)
    ]


def cells(text: str) -> list[list[str]]:
    """The instructions of a test, row by row."""
    rows = [line[: line.rindex(";")].split("|") for line in text.splitlines() if line.rstrip().endswith(" ;")]
    return [[cell.strip() for cell in row] for row in rows[1:]]  # the first names the processes


def weakened(text: str, twin: Twin) -> str:
    """The text of a twin."""
    lines = text.splitlines()
    rows = [number for number, line in enumerate(lines) if line.rstrip().endswith(" ;")][1:]
    found = 0
    for number in rows:
        row = lines[number].rstrip()[:-1].split("|")
        if row[twin.column].strip() == twin.instruction:
            found += 1
            if found == twin.which:
                row[twin.column] = f" {twin.instead} "
                lines[number] = "|".join(row) + ";"
                return "\n".join(lines) + "\n"
    raise SystemExit(f"{text.split()[1]}: there is no {twin.instruction} for the twin {twin.name}")


def unproved(text: str) -> list[str]:
    """The fences of a test that no twin takes out."""
    tried = {(twin.column, twin.instruction, twin.which) for twin in twins_of(text)}
    seen: dict[tuple[int, str], int] = {}
    found = []
    for row in cells(text):
        for column, cell in enumerate(row):
            if cell.startswith("DMB"):
                which = seen[column, cell] = seen.get((column, cell), 0) + 1
                if (column, cell, which) not in tried:
                    found.append(f"P{column}: {cell}/{which}")
    return found


def observe(name: str, text: str) -> str:
    """What herd7 says of a test: Never, Sometimes or Always."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{name}.litmus"
        path.write_text(text)
        done = subprocess.run(
            ["herd7", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    said = OBSERVATION.search(done.stdout)
    if done.returncode or said is None or said[1] != name:
        raise SystemExit(f"{name}: herd7: {done.stdout}")
    return said[2]


def check(name: str) -> bool:
    """Check a test and its twins; say how it went."""
    text = (HERE / f"{name}.litmus").read_text()
    is_right = True
    for twin in (None, *twins_of(text)):
        said = observe(name, text if twin is None else weakened(text, twin))
        right = said == ("Never" if twin is None else "Sometimes")
        is_right &= right
        print(f"{'ok  ' if right else 'BAD '} {name:22} {'-' if twin is None else twin.name:16} {said}", flush=True)
    for fence in unproved(text):
        is_right = False
        print(f"BAD  {name:22} {fence} has no twin", flush=True)
    return is_right


def main(asked: list[str]) -> int:
    """Check the tests of these names, or all."""
    if shutil.which("herd7") is None:
        print("herd7 is not installed; it is in the package herdtools7 of Debian sid", file=sys.stderr)
        return 2
    unknown = set(asked) - set(names())
    if unknown:
        print(f"no such test: {', '.join(sorted(unknown))}; there are {', '.join(names())}", file=sys.stderr)
        return 1
    verdicts = [check(name) for name in asked or names()]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
