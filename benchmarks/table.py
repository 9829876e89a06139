"""The table: what was measured, as plain text and as JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import strictflow_mp

from .measure import Figure, Outcome
from .peers import versions

__all__ = ["Conditions", "Row", "render", "write_json"]

HEADINGS = ("figure", "ours", "beside", "value", "min … max", "bound", "met", "")


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


def render(rows: list[Row], about: dict[str, Any]) -> str:
    """The table as text."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths[:-1]))
    about_text = ", ".join(f"{name} {value}" for name, value in about.items())
    return "\n".join([about_text, "", *text, ""])


def write_json(path: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """The same, with the value of each repetition."""
    found = {"conditions": about, "figures": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
