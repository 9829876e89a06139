"""``python -m benchmarks``: measure, print the table. Progress goes to standard error."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from . import memory, reads, startup, waits, writes  # noqa: F401 (each adds its figures)
from .measure import FIGURES, FULL, QUICK, Figure, Missing, Size
from .table import Conditions, Row, render, write_json

GROUPS = ("reads", "writes", "waits", "startup", "memory")
"""In the order of the table."""


def run(figure: Figure, size: Size) -> Row:
    """Measure one figure; a missing peer costs its own figure only."""
    try:
        return Row(figure, figure.measure(size))
    except Missing as missing:
        return Row(figure, None, f"skipped: {missing}")


def chosen(names: Sequence[str]) -> list[Figure]:
    """The figures of these names: ``reads.unchanged``, or ``reads`` for the whole group. All, given none."""
    known = {*GROUPS, *(figure.name for figure in FIGURES)}
    if unknown := sorted(set(names) - known):
        raise SystemExit(f"no figure or group {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    wanted = set(names) or known
    found = [figure for figure in FIGURES if wanted & {figure.name, figure.group}]
    return sorted(found, key=lambda figure: GROUPS.index(figure.group))


def main(arguments: Sequence[str] | None = None, *, size: Size | None = None) -> int:
    """Measure and print; 1 if a figure could not be measured because something broke."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="figures (reads.unchanged) or groups (reads)"
    )
    parser.add_argument("--quick", action="store_true", help="a look, in seconds; too short to judge a bound")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the value of each repetition there")
    options = parser.parse_args(arguments)
    size = size or (QUICK if options.quick else FULL)
    conditions = Conditions()
    rows = []
    broken = False
    for figure in chosen(options.only):
        print(f"{figure.name} … ", end="", file=sys.stderr, flush=True)
        began = perf_counter()
        try:
            rows.append(run(figure, size))
        except Exception:
            broken = True
            rows.append(Row(figure, None, "broken: see standard error"))
            print(traceback.format_exc(), file=sys.stderr)
        print(f"{perf_counter() - began:.1f} s", file=sys.stderr)
    about = conditions.at_the_end()
    print(render(rows, about), end="")
    if options.json:
        write_json(options.json, rows, about)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
