"""The plots that docs/performance.md shows, drawn from what a run has found. Needs matplotlib.

The background is transparent and every colour is of middle brightness, so that they can be read on white and on black.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle
from math import log10
from pathlib import Path
from typing import Any

from .alternatives import ALTERNATIVES
from .measure import SHARES, Missing
from .table import Row

__all__ = ["PLOTS", "draw"]

INK = "#808080"
COLOURS = ("#2f81f7", "#e0782f", "#2ea36f", "#c2569b", "#8a6fdb", "#b58900", "#1f9ea8", "#d64550", "#808080")
STYLE = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text, so that files are small
    "svg.hashsalt": "strictflow-mp",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SLOWEST = [0, 1, 2, 3, 4]
"""Powers of ten: the slowest one of 1, 10, … operations."""

Series = Mapping[str, list[float]]


def draw(rows: Iterable[Row], directory: Path) -> list[str]:
    """Draw each plot whose figures were measured, as SVG into *directory*; a word about each.

    Raises:
        Missing: there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise Missing("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {row.figure.name: row.outcome.series for row in rows if row.outcome is not None}
    directory.mkdir(parents=True, exist_ok=True)
    words = []
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTS.items():
            file = directory / name
            figure = plot(pyplot, found)
            if figure is None:
                words.append(f"{file}: not drawn, its figures were not measured")
                continue
            figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            words.append(f"{file}: {file.stat().st_size / 1000:.0f} KB")
    return words


def latencies(pyplot: Any, found: Mapping[str, Series]) -> Any:
    """How long the slowest 1 of so many took, for ours and each alternative: reads, and read-modify-writes."""
    panels = []
    for which, title in (("read", "small read"), ("change", "atomic read-modify-write")):
        lines: dict[str, list[float]] = {}
        for alternative in ALTERNATIVES:
            series = found.get(f"alternatives.{alternative.word}_{which}", {})
            if "peer, distribution" in series:
                lines.setdefault("strictflow-mp", series["ours, distribution"])
                lines[alternative.name.partition(" (")[0]] = series["peer, distribution"]
        panels.append((title, lines))
    if not any(lines for _, lines in panels):
        return None
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    colours = dict(zip(names, cycle(COLOURS), strict=False))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.4), sharey=True)
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for name, times in lines.items():
            wide = 2.6 if name == "strictflow-mp" else 1.4
            _by_slowness(axis, times, label=name, color=colours[name], linewidth=wide)
        axis.set_title(title)
    axes[0].set_ylabel("microseconds")
    handles = {}
    for axis in axes:
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    return figure


def _by_slowness(axis: Any, times: list[float], **style: Any) -> None:
    """One line: of how many operations it is the slowest, and how long that took."""
    slowness = [-log10(1 - share) for share in SHARES[: len(times)]]
    axis.plot(slowness, [1e6 * time for time in times], **style)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.set_xlim(0, SLOWEST[-1])
    axis.set_xticks(SLOWEST, ["all", "1 in 10", "100", "1,000", "10,000"])
    axis.set_xlabel("how long the slowest took")


def throughput(pyplot: Any, found: Mapping[str, Series]) -> Any:
    """Operations a second by number of processes; the band is from the lowest to the highest repetition."""
    if "scale.readers" not in found and "scale.writers" not in found:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4))
    panels = (
        (axes[0], "gated reads, million a second", 1e6, [("scale.readers", "", "all read")]),
        (
            axes[1],
            "P1 tasks a second",
            1,
            [
                ("scale.writers", "", "all write"),
                ("scale.mixed", "", "half write, half read"),
                ("scale.mixed", "echo, ", "floor: half echo, half spin"),
            ],
        ),
    )
    for axis, title, unit, lines in panels:
        for (name, prefix, label), colour in zip(lines, (*COLOURS[:2], INK), strict=False):
            series = found.get(name)
            if series is None:
                continue
            processes = series["processes"]
            keys = (prefix + key for key in ("lowest rate", "rate", "highest rate"))
            low, rate, high = ([each / unit for each in series[key]] for key in keys)
            axis.plot(processes, rate, marker="o", markersize=4, label=label, color=colour)
            axis.fill_between(processes, low, high, alpha=0.2, color=colour, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(processes, [f"{each:.0f}" for each in processes])
        axis.minorticks_off()
        if len(lines) > 1:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:,g}")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.set_xlabel("processes")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def commit_cost(pyplot: Any, found: Mapping[str, Series]) -> Any:
    """The time of one commit by number of keys."""
    series = found.get("curves.commit_by_keys")
    if series is None:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    for (name, label), colour in zip({"ours": "strictflow-mp", "LMDB": "LMDB, no sync"}.items(), COLOURS, strict=False):
        if series.get(name):
            axis.plot(series["keys"], [1e6 * time for time in series[name]], marker="o", color=colour, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_title("commit of one key, microseconds")
    axis.set_xlabel("keys in the state")
    axis.legend()
    return figure


def under_load(pyplot: Any, found: Mapping[str, Series]) -> Any:
    """How long the slowest 1 of so many gated reads took, while so many processes write."""
    series = found.get("curves.read_under_load")
    if series is None:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 3.8))
    for (name, times), colour in zip(series.items(), COLOURS, strict=False):
        _by_slowness(
            axis, times, label=name.replace("0 writers", "nobody writes").replace("1 writers", "1 writer"), color=colour
        )
    axis.set_title("gated read under write load, microseconds")
    axis.legend()
    return figure


PLOTS = {
    "latency.svg": latencies,
    "processes.svg": throughput,
    "commit.svg": commit_cost,
    "under-load.svg": under_load,
}
"""By file."""
