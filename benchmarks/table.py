"""The table: what was measured, as plain text and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import strictflow_mp

from .alternatives import ALTERNATIVES, OURS
from .measure import FIGURES, Figure, Outcome, duration
from .peers import versions

__all__ = ["Conditions", "Row", "fill_in", "read_json", "render", "write_json"]

HEADINGS = ("figure", "ours", "beside", "value", "min … max", "bound", "met", "")
SIDE_BY_SIDE = (
    "alternative",
    "read",
    "÷ ours",
    "read-modify-write",
    "÷ ours",
    "done by",
    "gate",
    "torn reads",
    "survives a killed process",
)
BEGIN, END = "<!-- figures: python -m benchmarks --markdown -->", "<!-- end of the figures -->"
"""Between these two lines `fill_in` puts the tables."""


@dataclass(frozen=True)
class Row:
    """A figure and what came of it: an outcome, or the reason why there is none."""

    figure: Figure
    outcome: Outcome | None
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        figure, outcome = self.figure, self.outcome
        bound = f"{figure.bound} {figure.unit}" if figure.bound else "–"
        if outcome is None:
            return (figure.title, "–", "–", "–", "–", bound, "–", self.reason)
        low, high = number(min(outcome.values)), number(max(outcome.values))
        value = f"{number(outcome.median)} {figure.unit}"
        return (
            figure.title,
            outcome.ours,
            outcome.peer or "–",
            value,
            f"{low} … {high}",
            bound,
            self.met,
            outcome.note,
        )

    @property
    def met(self) -> str:
        """By the median; and whether each repetition agrees."""
        bound = self.figure.bound
        if bound is None or self.outcome is None:
            return "–"
        met = bound.is_met(self.outcome.median)
        agreed = all(bound.is_met(value) is met for value in self.outcome.values)
        return ("yes" if met else "NO") + ("" if agreed else ", barely")

    def as_dict(self) -> dict[str, Any]:
        figure, outcome = self.figure, self.outcome
        fields: dict[str, Any] = {"name": figure.name, "title": figure.title, "unit": figure.unit}
        fields["bound"] = str(figure.bound) if figure.bound else None
        if outcome is None:
            return fields | {"skipped": self.reason}
        met = figure.bound.is_met(outcome.median) if figure.bound else None
        return fields | {"median": outcome.median, "met": met} | asdict(outcome)


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class Conditions:
    """The machine, the versions, and how much of the machine others took during the run."""

    def __init__(self) -> None:
        self._began = self._taken()

    @staticmethod
    def _taken() -> tuple[float, float]:
        """Seconds of all cores, and of them those that this process and its ended children did not use."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return total, total - idle - sum(os.times()[:4])

    def at_the_end(self) -> dict[str, Any]:
        """By name. Children that were not waited for count as others."""
        total, others = (now - began for now, began in zip(self._taken(), self._began, strict=True))
        return {
            "strictflow-mp": strictflow_mp.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "taken by others": f"{100 * max(0.0, others) / max(total, 0.01):.0f} %",
            **versions(),
        }


def _tables(rows: list[Row]) -> list[list[tuple[str, ...]]]:
    """The figures, and side by side the alternatives: each with its headings, and only if it has a row."""
    figures = [row.cells() for row in rows if row.figure.group != "alternatives"]
    return [table for table in ([HEADINGS, *figures], [SIDE_BY_SIDE, *_alternatives(rows)]) if len(table) > 1]


def _alternatives(rows: list[Row]) -> list[tuple[str, ...]]:
    """Ours, then each alternative: what it takes, and what it promises for that."""
    found = {row.figure.name: row for row in rows if row.figure.group == "alternatives"}
    ours: dict[str, list[float]] = {"read": [], "change": []}
    lines = []
    for alternative in ALTERNATIVES:
        cells = []
        missing = ""
        for which, known in ours.items():
            row = found.get(f"alternatives.{alternative.word}_{which}")
            if row is None or row.outcome is None:
                cells += ["–", "–"]
                missing = missing or (row.reason if row is not None else "")
                continue
            outcome = row.outcome
            known.extend(outcome.series["ours"])
            low, high = number(min(outcome.values)), number(max(outcome.values))
            cells += [
                duration(statistics.median(outcome.series["peer"])),
                f"{number(outcome.median)} × ({low} … {high})",
            ]
        if missing or cells != ["–"] * 4:
            promises = alternative.promises
            told = (promises.change, promises.gate, promises.torn, promises.crash)
            lines.append((alternative.name, *cells, missing or told[0], *told[1:]))
    if not lines:
        return []
    read, change = (duration(statistics.median(times)) if times else "–" for times in ours.values())
    mine = ("strictflow-mp", read, "1", change, "1", OURS.change, OURS.gate, OURS.torn, OURS.crash)
    return [mine, *lines]


def _about(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())


def render(rows: list[Row], about: dict[str, Any]) -> str:
    """The tables as text."""
    text = [_about(about)]
    for lines in _tables(rows):
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        laid = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        laid.insert(1, ["-" * width if heading else "" for width, heading in zip(widths, lines[0], strict=True)])
        text += ["", *("  ".join(line).rstrip() for line in laid)]
    return "\n".join([*text, ""])


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """The tables as Markdown."""
    text = [_about(about) + "."]
    for lines in _tables(rows):
        text += ["", *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)]
        text.insert(len(text) - len(lines) + 1, "| --- " * len(lines[0]) + "|")
    return "\n".join([*text, ""])


def fill_in(path: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """Put the tables into a page, in place of those between its two marks.

    Raises:
        ValueError: the page has no such marks.
    """
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(END) < page.index(BEGIN):
        raise ValueError(f"{path} has no place for the figures: a line {BEGIN} and after it a line {END}")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{markdown(rows, about)}\n{END}{after}")


def write_json(path: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """The same, with the value of each repetition."""
    found = {"conditions": about, "figures": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """What `write_json` wrote; figures that there are no more are left out."""
    found = json.loads(path.read_text())
    known = {figure.name: figure for figure in FIGURES}
    rows = []
    for fields in found["figures"]:
        if fields["name"] in known:
            figure = known[fields["name"]]
            parts = {name: fields[name] for name in ("values", "ours", "peer", "note", "series") if name in fields}
            rows.append(Row(figure, Outcome(**parts) if parts else None, fields.get("skipped", "")))
    return rows, found["conditions"]
