"""Progress, on standard error: a live bar on a terminal that `rich` can draw on, else a line for each figure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from .measure import Figure

__all__ = ["following"]


@contextmanager
def following(figures: list[Figure]) -> Iterator[Iterator[Figure]]:
    """Iterate over the figures; whoever watches sees which one is measured, and how many are left."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError:
            pass
        else:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            # Few redraws, for the thread that draws takes time from what is measured.
            with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as bar:
                task = bar.add_task("", total=len(figures))

                def drawn() -> Iterator[Figure]:
                    for figure in figures:
                        bar.update(task, description=figure.name)
                        bar.refresh()
                        yield figure
                        bar.advance(task)

                yield drawn()
            return
    yield _told(figures)


def _told(figures: list[Figure]) -> Iterator[Figure]:
    for number, figure in enumerate(figures, 1):
        print(f"{number}/{len(figures)} {figure.name} … ", end="", file=sys.stderr, flush=True)
        began = perf_counter()
        yield figure
        print(f"{perf_counter() - began:.1f} s", file=sys.stderr)
