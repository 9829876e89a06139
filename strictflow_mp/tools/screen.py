"""The screen of `top`: a flow's statistics as tables that fit, by leaving out what matters least."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core import READ_PRIORITY, WRITE_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ..wire.stats import FlowStats, WorkerStats
    from .glance import Glance
    from .rates import Rates

__all__ = ["Usage", "dark", "screen"]

UNITS = ("B", "KB", "MB", "GB", "TB")
GAP = 2
"""Columns of the terminal between two of a table."""

Row = dict[str, "str | Text"]


class Usage(NamedTuple):
    """What a process takes: percent of one core, bytes."""

    cpu: float
    rss: int


def amount(number: float) -> str:
    """Bytes, in a unit that keeps them short."""
    for unit in UNITS[:-1]:
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} {UNITS[-1]}"


def duration(seconds: float) -> str:
    """Seconds, in a unit that keeps them short."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def fitting(rows: Sequence[Row], width: int, spare: Sequence[str]) -> list[str]:
    """The columns of *rows* that fit: figures are not cut off, columns are left out, those of *spare* in its order."""
    columns = list(rows[0])
    widths = {column: max(cell_len(column), *(cell_len(str(row[column])) for row in rows)) + GAP for column in columns}
    for column in spare:
        if sum(widths[kept] for kept in columns) - GAP <= width:
            break
        columns.remove(column)
    return columns


def _table(rows: Sequence[Row], width: int, spare: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = fitting(rows, width, spare)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def _tasks(stats: FlowStats, rates: Rates, width: int) -> Table:
    rows: list[Row] = []
    for level in (WRITE_PRIORITY, READ_PRIORITY):
        latency = stats.latency[level]
        failed = rates.failed[level]
        rows.append(
            {
                "": f"P{level}",
                "per s": f"{rates.tasks[level]:,.0f}",
                "failed/s": Text(f"{failed:,.0f}", style="red" if failed else ""),
                "pending": f"{stats.tasks_pending[level]:,}",
                "p50": duration(latency.p50),
                "p90": duration(latency.p90),
                "p99": duration(latency.p99),
                "max": duration(latency.max),
                "run": f"{stats.tasks_run[level]:,}",
                "failed": f"{stats.tasks_failed[level]:,}",
            }
        )
    return _table(rows, width, ("p90", "run", "failed", "max", "p50", "failed/s"))


def _workers(workers: Collection[WorkerStats], usage: Mapping[int, Usage], width: int, height: int) -> RenderableType:
    """One line each; when there are more than *height* lines, those that wait come first."""
    listed = sorted(workers, key=lambda worker: worker.slot)
    if not listed:
        return Text("no process is attached", style="dim")
    more = len(listed) + 1 - height
    if more > 0:
        listed = sorted(listed, key=lambda worker: not worker.is_waiting)[: max(height - 2, 1)]
    rows: list[Row] = []
    for worker in listed:
        used = usage.get(worker.pid)
        rows.append(
            {
                "worker": str(worker.pid),
                "slot": str(worker.slot),
                "state": Text("at the gate", style="yellow") if worker.is_waiting else worker.state,
                "cpu": f"{used.cpu:.0f} %" if used else "-",
                "memory": amount(used.rss) if used else "-",
                "waits": f"{worker.waits:,}",
                "waited": duration(worker.waited),
            }
        )
    table = _table(rows, width, ("slot", "waits", "memory", "waited", "cpu"))
    if more <= 0:
        return table
    return Group(table, Text(f"and {len(workers) - len(listed)} more", style="dim"))


def _fill(
    console: Console,
    head: Sequence[Text],
    table: Table | None,
    workers: Collection[WorkerStats],
    usage: Mapping[int, Usage],
    is_live: bool,
) -> RenderableType:
    width = console.width
    above: list[RenderableType] = [*head, Text()]
    taken = sum(len(line.wrap(console, width)) for line in head) + 1
    if table is not None:
        above += [table, Text()]
        taken += table.row_count + 2
    height = console.height - taken if is_live else len(workers) + 1
    return Group(*above, _workers(workers, usage, width, height))


def screen(
    stats: FlowStats,
    rates: Rates,
    usage: Mapping[int, Usage],
    note: str = "",
    *,
    console: Console,
    is_live: bool = False,
) -> RenderableType:
    """All of it.

    Args:
        usage: by pid.
        note: a line of warning.
        console: whose width it fits.
        is_live: whether it has to fit the height too, and somebody has to be told how it ends.
    """
    restarts = f", restarts: {stats.restarts:,}" if stats.restarts else ""
    mine = usage.get(stats.coordinator_pid)
    used = f", {mine.cpu:.0f} % of a core, {amount(mine.rss)}" if mine else ""
    waiting = "none had to wait" if rates.wait is None else f"{rates.waits:,.0f} waits/s of {duration(rates.wait)}"
    head = [
        Text.assemble(
            (stats.name, "bold"),
            f"  version {stats.version:,}, {stats.keys:,} keys, {rates.commits:,.0f} commits/s",
            ("  (q ends)" if is_live else "", "dim"),
        ),
        Text(f"coordinator {stats.coordinator_pid}, up {stats.uptime:,.0f} s{restarts}{used}"),
        Text(
            f"state {amount(stats.bytes_used)} used ({amount(stats.bytes_pinned)} for snapshots), "
            f"{amount(stats.bytes_free)} free"
        ),
        Text(f"readers: {stats.readers_waiting} at the gate, {waiting}"),
    ]
    if note:
        head.append(Text(note, style="bold red"))
    return _fill(console, head, _tasks(stats, rates, console.width), stats.workers, usage, is_live)


def dark(
    name: str, seen: Glance | None, usage: Mapping[int, Usage], note: str, *, console: Console, is_live: bool = False
) -> RenderableType:
    """What can be said while SF-LOOP has not answered once. Arguments as for `screen`."""
    about = f"  version {seen.version:,}, {seen.keys:,} keys" if seen else ""
    head = [Text.assemble((name, "bold"), about, ("  (q ends)" if is_live else "", "dim"))]
    if seen is not None:
        waiting = sum(worker.is_waiting for worker in seen.workers)
        head.append(Text(f"coordinator {seen.pid}, {amount(seen.bytes)} of shared memory"))
        head.append(Text(f"readers: {waiting} at the gate"))
    head.append(Text(note, style="bold red"))
    return _fill(console, head, None, seen.workers if seen else (), usage, is_live)
