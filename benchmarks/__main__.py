"""``python -m benchmarks``: measure, print the table. Progress goes to standard error."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import alternatives, curves, idle, large, memory, reads, scale, startup, waits, writes  # noqa: F401 (their figures)
from .measure import FIGURES, FULL, QUICK, Figure, Missing, Size
from .plots import draw
from .progress import following
from .table import Conditions, Row, fill_in, read_json, render, write_json

GROUPS = ("reads", "writes", "waits", "scale", "large", "idle", "startup", "memory", "curves", "alternatives")
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


def measure(figures: Sequence[Figure], size: Size) -> tuple[list[Row], bool]:
    """Measure them all; what came of each, and whether something broke."""
    rows = []
    broken = False
    with following(list(figures)) as followed:
        for figure in followed:
            try:
                rows.append(run(figure, size))
            except Exception:
                broken = True
                rows.append(Row(figure, None, "broken: see standard error"))
                print(traceback.format_exc(), file=sys.stderr)
    return rows, broken


def main(arguments: Sequence[str] | None = None, *, size: Size | None = None) -> int:
    """Measure and print; 1 if a figure could not be measured because something broke."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="figures (reads.unchanged) or groups (reads)"
    )
    parser.add_argument("--quick", action="store_true", help="a look, in minutes; too short to judge a bound")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the value of each repetition there")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw the plots there, as SVG")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables into that page, at its marks")
    parser.add_argument(
        "--from", dest="former", type=Path, metavar="FILE", help="show what an earlier --json wrote; measure nothing"
    )
    options = parser.parse_args(arguments)
    size = size or (QUICK if options.quick else FULL)
    figures = chosen(options.only)
    broken = False
    if options.former:
        rows, about = read_json(options.former)
        rows = [row for row in rows if row.figure in figures]
    else:
        conditions = Conditions()
        rows, broken = measure(figures, size)
        about = conditions.at_the_end()
    print(render(rows, about), end="")
    if options.json:
        write_json(options.json, rows, about)
    if options.markdown:
        fill_in(options.markdown, rows, about)
    if options.plots:
        try:
            for word in draw(rows, options.plots):
                print(word, file=sys.stderr)
        except Missing as missing:
            print(f"no plots: {missing}", file=sys.stderr)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
