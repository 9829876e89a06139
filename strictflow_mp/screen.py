"""The screen of `top`: a flow's statistics as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .rates import Rates
from .stats import FlowStats

__all__ = ["Usage", "screen"]

UNITS = ("B", "KB", "MB", "GB", "TB")


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
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _tasks(stats: FlowStats, rates: Rates) -> Table:
    table = _table("", "per s", "failed/s", "pending", "p50", "p90", "p99", "max", "run", "failed")
    for level in (1, 2):
        latency = stats.latency[level]
        failed = rates.failed[level]
        table.add_row(
            f"P{level}",
            f"{rates.tasks[level]:,.0f}",
            Text(f"{failed:,.0f}", style="red" if failed else ""),
            f"{stats.tasks_pending[level]:,}",
            *map(duration, (latency.p50, latency.p90, latency.p99, latency.max)),
            f"{stats.tasks_run[level]:,}",
            f"{stats.tasks_failed[level]:,}",
        )
    return table


def _workers(stats: FlowStats, usage: Mapping[int, Usage]) -> Table:
    table = _table("worker", "slot", "state", "cpu", "memory", "waits", "waited", left=1)
    for worker in sorted(stats.workers, key=lambda worker: worker.slot):
        used = usage.get(worker.pid)
        table.add_row(
            str(worker.pid),
            str(worker.slot),
            Text("at the gate", style="yellow") if worker.is_waiting else worker.state,
            f"{used.cpu:.0f} %" if used else "-",
            amount(used.rss) if used else "-",
            f"{worker.waits:,}",
            duration(worker.waited),
        )
    return table


def screen(stats: FlowStats, rates: Rates, usage: Mapping[int, Usage], note: str = "") -> RenderableType:
    """All of it. *usage* by pid; *note* is a line of warning."""
    restarts = f", {stats.restarts} restarts" if stats.restarts else ""
    mine = usage.get(stats.coordinator_pid)
    used = f", {mine.cpu:.0f} % of a core, {amount(mine.rss)}" if mine else ""
    waiting = "nobody waits" if rates.wait is None else f"{rates.waits:,.0f} waits/s of {duration(rates.wait)}"
    head = [
        Text.assemble(
            (stats.name, "bold"), f"  version {stats.version:,}, {stats.keys:,} keys, {rates.commits:,.0f} commits/s"
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
    return Group(*head, Text(), _tasks(stats, rates), Text(), _workers(stats, usage))
